"""What build.py puts together: the flow maps of every method, and fields that do not fit one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from configs import gaussians
from configs import imagenet_dit
from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import flow
from piflow_jax import params as params_lib
from piflow_jax import sharding
from piflow_jax import teacher as teacher_lib
from piflow_jax import train_step
from piflow_jax.distill import parallel_decoding
from piflow_jax.policy import gmm
from piflow_jax.policy import rollout
from tests import golden
from tests import tiny

NOISE, COND = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), {"label": jnp.array([0, 4, 9])}


def _trees(run):
  """(params, teacher's params) with every weight drawn, those that start at zero too."""
  def draw(shapes, key):
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree, [0.1 * jax.random.normal(k, s.shape) for k, s in zip(jax.random.split(key, len(leaves)), leaves)])

  teacher = None if run.teacher_shapes is None else draw(run.teacher_shapes, jax.random.key(1))
  shapes = jax.eval_shape(run.method.init, jax.random.key(0), teacher)
  return draw(shapes, jax.random.key(2)), teacher


def _at(tau):
  return jnp.full(3, tau)


def _step(config, tau_src, tau_dst, nfe):
  run = build.run(config)
  params, teacher = _trees(run)
  clock = build.sampling_clock(config, run, nfe)

  def step(params, teacher):
    return run.method.flow_map(params, teacher, COND, clock)(NOISE, _at(tau_src), _at(tau_dst))

  return jax.jit(step)(params, teacher)


@pytest.mark.slow
def test_temperature_sharpens_every_call_but_the_last():
  def step(temperature, *taus):
    config = tiny.config("student,2", policy__dropout=0.0, flow__shift=3.0, policy__temperature=temperature)
    return _step(config, *taus, nfe=2)

  plain, sharp = (step(temperature, 1.0, 0.5) for temperature in (1.0, 0.3))
  assert float(jnp.abs(plain - sharp).max()) > 1e-3
  np.testing.assert_allclose(step(1.0, 0.5, 0.0), step(0.3, 0.5, 0.0), atol=1e-6)  # two programs, one result

  run = build.run(tiny.config("student,2", policy__dropout=0.0, flow__shift=3.0))
  params, teacher = _trees(run)
  policy = run.student.policy(params, teacher, NOISE, jnp.ones(3), COND, run.method.clock, eps=1e-4)
  want = rollout.rollout(gmm.with_temperature(policy, 0.3), NOISE, jnp.ones(3), _at(0.5), run.method.clock)
  assert run.method.clock == flow.Clock(3.0, total_substeps=16, nfe=2, final_scale=1.0)
  np.testing.assert_allclose(sharp, want, atol=1e-5)


@pytest.mark.slow
def test_parallel_decodings_flow_map_is_its_policys_rollout():
  """Through the whole network: one fused layer against all velocities and their sum."""
  config = tiny.config("parallel", policy__intervals=8, method__min_block=2, method__max_block=8, flow__shift=3.0)
  run = build.run(config)
  params, teacher = _trees(run)
  clock = run.method.clock
  policy = run.student.policy(params, teacher, NOISE, clock.warp(_at(0.75)), COND, clock)
  want = policy.advance(NOISE, _at(0.75), _at(0.25))
  np.testing.assert_allclose(_step(config, 0.75, 0.25, 2), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_teacher_is_sampled_by_the_solver_named(solver):
  config = tiny.config("teacher", method__solver=solver)
  run = build.run(config)
  params, _ = _trees(run)
  velocity = jax.jit(build.velocity_net(run.network, run.data.spec).apply)
  here = velocity(params, NOISE, jnp.ones(3), COND)
  mean = here if solver == "euler" else (here + velocity(params, NOISE - 0.5 * here, _at(0.5), COND)) / 2
  np.testing.assert_allclose(_step(config, 1.0, 0.5, 2), NOISE - 0.5 * mean, atol=1e-5)


@pytest.mark.slow
def test_a_meanflow_student_starts_as_one_euler_step_of_its_teacher():
  run = build.run(tiny.config("meanflow"))
  _, teacher = _trees(run)
  params, clock = run.method.init(jax.random.key(3), teacher), run.method.clock
  maps = [run.method.flow_map(params, teacher, COND, clock), build.teacher_flow_map(run, teacher, COND, clock)]
  got, want = (m(NOISE, _at(0.8), _at(0.2)) for m in maps)
  np.testing.assert_array_equal(got, want)


def test_a_teacher_is_guided_by_every_field_of_it():
  fields = dict(teacher__guidance_scale=3.0, teacher__guidance_interval=(0.2, 0.7), teacher__orthogonal=0.5)
  run = build.run(tiny.config("student", **fields))
  _, teacher = _trees(run)
  t, plain = jnp.array([0.1, 0.5, 0.9]), build.run(tiny.config("student")).teacher.velocity
  u_cond, u_null = (plain(teacher, NOISE, t, cond) for cond in (COND, {"label": jnp.full(3, 10)}))
  want = teacher_lib.guided_velocity(u_cond, u_null, NOISE, t, scale=3.0, interval=(0.2, 0.7), orthogonal=0.5)
  np.testing.assert_allclose(run.teacher.velocity(teacher, NOISE, t, COND), want, atol=1e-5)
  without = teacher_lib.guided_velocity(u_cond, u_null, NOISE, t, scale=3.0, interval=(0.2, 0.7))
  assert float(jnp.abs(without - want).max()) > 1e-2


@pytest.mark.slow
def test_a_schedule_mixes_the_teacher_in():
  """By the loss at each step: while the schedule runs, states are the teacher's, and then as without one."""
  def losses(**fields):
    run = build.run(tiny.config("student", policy__dropout=0.0, **fields))
    params, teacher = _trees(run)
    batch = {"x_0": jax.random.normal(jax.random.key(3), NOISE.shape), "cond": COND}
    keys = jax.random.split(jax.random.key(4), 3)
    at = jax.jit(lambda step: run.method.objective(params, teacher, batch, keys, step)[1]["loss"])
    return [float(at(step)) for step in (0, 3, 6, 9)]

  plain, mixed = losses(), losses(method__num_decay_steps=6)
  assert len(set(plain)) == 1 and len(set(mixed)) == 3
  np.testing.assert_allclose(mixed[2:], plain[2:], rtol=1e-3)  # averages by a rollout of one substep are velocities


@pytest.mark.slow
def test_stochasticity_is_the_samplings():
  """h = 0 is the same for every key; h > 0 is not, and differs from it."""
  def draw(h, seed):
    config = tiny.config("student,2", sampling__nfe=2, sampling__h=h)
    run = build.run(config)
    jitted = train_step.compile(config, sharding.make_mesh(1, 1, devices=jax.devices()[:1]), run)
    params, teacher = _trees(run)
    return jitted.draw(params, teacher, NOISE, COND, jax.random.split(jax.random.key(seed), 3))

  plain = draw(0.0, 0)
  np.testing.assert_array_equal(plain, draw(0.0, 1))
  some = [draw(1.0, seed) for seed in (0, 1)]
  for a, b in ((some[0], plain), (some[0], some[1])):
    assert float(jnp.abs(a - b).max()) > 0.1


def test_the_exact_teacher_is_the_datas():
  run = build.run(gaussians.get_config("gm,4"))
  records = run.data.records("train")
  x_0 = jnp.stack([records[i]["x_0"] for i in range(256)])
  # So little noise says what the data are: E[noise - x_0 | x] is within its spread of -x.
  u = run.teacher.velocity(run.teacher.params(), x_0, jnp.full(256, 1e-3), {"label": jnp.zeros(256, jnp.int32)})
  np.testing.assert_allclose(u, -x_0, atol=0.05)
  assert len({tuple(np.asarray(records[i]["x_0"]).ravel()) for i in range(64)}) == 64
  np.testing.assert_array_equal(records[3]["x_0"], records[3]["x_0"])


@pytest.mark.parametrize("tokens, size", [(256, 32), (1024, 64), (4096, 128)])
def test_dynamic_shift_counts_tokens(tokens, size):
  def shift(patch=2, **fields):
    config = imagenet_dit.get_config("tiny,repa-1nfe")
    config.data.shape, config.network.patch = (size, size, 4), patch
    config.flow = flow.dynamic_config(**fields)
    return build.run(config).method.clock.shift

  data = golden.load("sample_t", np.float64)
  np.testing.assert_allclose(shift(), data[f"dyn{tokens}_shift"], rtol=1e-6)
  # The authors count positions before they are patched, and have ends four times as far: the same line.
  ends = dict(base_tokens=4 * 256, max_tokens=4 * 4096)
  np.testing.assert_allclose(shift(patch=1, **ends), data[f"dyn{tokens}_shift"], rtol=1e-6)
  np.testing.assert_allclose(shift(base_log_shift=0.7, max_log_shift=0.7), np.exp(0.7))


@pytest.mark.parametrize("role, fields, field", [
    ("dx", dict(policy__segment=-0.5), "config.policy.segment: -0.5"),
    ("student", dict(method__label="midpoint"), "config.method.label: 'midpoint'.*window_substeps"),
    ("student", dict(method__label="rk4"), "config.method.label: 'rk4'"),
    ("parallel", dict(method__min_block=5), "min_block: 5.*128"),
    ("parallel", dict(method__max_block=256), "max_block: 256"),
    ("meanflow", dict(method__target="both"), "config.method.target: 'both'"),
    ("student", dict(policy__components=0), "config.policy.components: 0"),
    ("dx", dict(policy__points=0), "config.policy.points: 0"),
    ("student", dict(policy__logstd_width=0), "config.policy.logstd_width: 0"),
    ("student", dict(policy__dropout=1.5), "config.policy.dropout: 1.5"),
    ("student", dict(method__final_scale=0.0), "config.method.final_scale: 0.0"),
    ("student", dict(method__final_scale=3.0), "config.method.final_scale: 3.0"),
    ("student", dict(flow__shift=0.0), "config.flow.shift: 0.0"),
    ("student", dict(sampling__h=-1.0), "config.sampling.h: -1.0"),
    ("student", dict(method__num_decay_steps=-3), "config.method.num_decay_steps: -3"),
    ("student", dict(method__window_substeps=-2), "config.method.window_substeps: -2"),
    ("meanflow", dict(method__ratio=-1.0), "config.method.ratio: -1.0"),
    ("teacher", dict(method__solver="Euler2"), "config.method.solver: 'Euler2'"),
    ("parallel", dict(policy__intervals=0), "config.policy.intervals: 0"),
    ("parallel", dict(sampling__nfe=3), "config.sampling.nfe: 3.* multiples of 32 of 128 .*1, 2, 4$"),
    ("parallel", dict(sampling__nfe=8), "config.sampling.nfe: 8"),
    ("parallel", dict(method__max_block=64), "config.sampling.nfe: 1.* at most 64.*2, 4$"),
    ("parallel", dict(method__max_block=64, sampling__nfe=2, sampling__h=1.0), "sampling.nfe: 2; .*no number of calls"),
    ("meanflow", dict(method__guidance_scale=2.0), "config.method.guidance_scale: 2.0"),
    ("meanflow", dict(method__label_dropout=0.3), "config.method.label_dropout: 0.3"),
    ("meanflow", dict(method__logit_std=0.0), "config.method.logit_std: 0.0"),
    ("meanflow", dict(method__norm_eps=0.0), "config.method.norm_eps: 0.0"),
    ("teacher", dict(method__label_dropout=-0.1), "config.method.label_dropout: -0.1"),
    ("teacher", dict(method__logit_std=float("nan")), "config.method.logit_std: nan"),
    ("student", dict(policy__temperature=0.0), "config.policy.temperature: 0.0"),
    ("student", dict(policy__temperature=float("nan")), "config.policy.temperature: nan"),
    ("student", dict(teacher__guidance_interval=(0.7, 0.2)), r"config.teacher.guidance_interval: \(0.7, 0.2\)"),
    ("student", dict(teacher__guidance_interval=(0.0, 1.5)), "config.teacher.guidance_interval"),
    ("student", dict(teacher__guidance_interval=(0.5,)), "config.teacher.guidance_interval"),
    ("student", dict(teacher__orthogonal=0.5), "config.teacher.orthogonal: 0.5"),
    ("student", dict(method__num_states=0), "config.method.num_states: 0"),
    ("teacher", dict(optimizer__clip_norm=0.0), "config.optimizer.clip_norm: 0.0"),
    ("teacher", dict(ema__gamma=-1.0), "config.ema.gamma: -1.0"),
    ("student", dict(trained=("nothing",)), "config.trained: .'nothing',. names no array"),
    ("student", dict(trained=("(",)), "config.trained: '.' is no regular expression"),
    ("teacher", dict(trained=("head/.*",)), "config.trained: only a student"),
    ("student", dict(trained=("blocks/.*",)),
     "config.trained: head/.* is not trained, and the teacher has no such array"),
])
def test_fields_that_do_not_fit_are_named(role, fields, field):
  with pytest.raises(errors.UserError, match=field):
    build.run(tiny.config(role, **fields))


def test_nouns_that_do_not_fit_are_named():
  config = tiny.config("student")
  config.method = parallel_decoding.config()
  with pytest.raises(errors.UserError, match="config.method.*GMHead"):
    build.run(config)
  for noun, words in (
      ("flow", "config.flow: is not set"), ("data", "config.data: None is no noun"),
      ("method", "config.method: None is no noun"), ("policy", "config.method"), ("network", "config.")):
    config = tiny.config("student")
    config[noun] = None
    with pytest.raises(errors.UserError, match=words):
      build.run(config)


def test_a_field_that_its_noun_has_not_cannot_be_set():
  for role, field in (("dx", "components"), ("student", "points"), ("parallel", "segment")):
    with pytest.raises(KeyError, match=f'"{field}" does not exist'):
      tiny.config(role).policy[field] = 3
  assert "solver" not in tiny.config("student").method and "final_scale" not in tiny.config("parallel").method
  assert tiny.config("teacher").teacher is None and tiny.config("teacher").policy is None


def test_digits_roles_are_what_they_say():
  plain = {role: config_lib.to_plain(digits.get_config(role)) for role in digits.ROLES}
  assert {plain[role]["method"]["make"] for role in ("dx", "gm32", "student", "dx-no-window")} == {
      "@piflow_jax.distill.imitation:make"}
  assert digits.get_config("gm32,4").policy.components == 32 and digits.get_config("gm32,4").method.nfe == 4
  assert [digits.get_config(role).method.window_substeps for role in ("dx", "dx-no-window")] == [10, 0]
  assert digits.get_config("improved-meanflow").method.improved and not digits.get_config("meanflow").method.improved
  with pytest.raises(ValueError, match="student,x: choose ROLE or ROLE,NFE"):
    digits.get_config("student,x")


@pytest.mark.slow
def test_a_student_trained_in_part_is_its_teacher_elsewhere():
  config = tiny.config("student", trained=("head/.*", "adaln_out/.*"), network__dtype="bfloat16")
  run = build.run(config)
  full = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), run.teacher_shapes)
  teacher = jax.tree.map(lambda s: 0.1 * jax.random.normal(jax.random.key(s.size), s.shape), full)
  params = run.method.init(jax.random.key(0), teacher)
  assert {name.split("/")[0] for name in params_lib.named_leaves(params)} == {"head", "adaln_out"}
  for name, leaf in params_lib.named_leaves(run.base_shapes).items():
    # The step keeps one copy of what is frozen, in the computation's type: teacher, student and average read it.
    assert leaf.dtype == (jnp.bfloat16 if name.endswith(("kernel", "embedding")) else jnp.float32), name
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  jitted = train_step.compile(config, mesh, run)
  assert jax.tree.structure(jitted.state.params) == jax.tree.structure(jitted.state.ema) == jax.tree.structure(params)
  kept = jax.tree.map(lambda x, s: x.astype(s.dtype), teacher, run.teacher_shapes)
  state = jitted.init(jax.random.key(0), teacher)
  batch = {"x_0": jax.random.normal(jax.random.key(3), (16, 8, 8, 1)), "cond": {"label": jnp.arange(16) % 10}}
  before = jax.device_get(state.params)
  state, metrics = jitted.step(state, kept, batch, jax.random.key(1))
  assert np.isfinite(metrics["loss"])
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(state.params))
  assert max(jax.tree.leaves(moved)) > 0
  x = jitted.draw(state.ema, run.student.tree(state.ema, kept), NOISE, COND, jax.random.split(jax.random.key(0), 3))
  frozen = params_lib.select(kept, params_lib.named_leaves(run.base_shapes).__contains__)
  np.testing.assert_array_equal(x, jitted.draw(state.ema, frozen, NOISE, COND, jax.random.split(jax.random.key(0), 3)))


@pytest.mark.slow
def test_a_student_of_another_size_than_its_teacher_starts_anew():
  config = tiny.config("student")
  config.teacher.network = tiny.config("teacher", network__depth=3).network
  run = build.run(config)
  assert params_lib.named_leaves(run.teacher_shapes)["blocks/mlp/in/kernel"].shape[0] == 3
  _, teacher = _trees(run)
  params = run.method.init(jax.random.key(0), teacher)
  assert params_lib.named_leaves(params)["blocks/mlp/in/kernel"].shape[0] == 2
  fresh = build.run(tiny.config("student")).method.init(jax.random.key(0), None)
  jax.tree.map(np.testing.assert_array_equal, params, fresh)
