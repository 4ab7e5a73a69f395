"""What build.py puts together: the flow maps of every method, and fields that do not fit one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from configs import gaussians
from piflow_jax import build
from piflow_jax import errors
from piflow_jax import flow
from piflow_jax import sharding
from piflow_jax import teacher as teacher_lib
from piflow_jax import train_loop
from piflow_jax.policy import gmm
from piflow_jax.policy import rollout
from tests import golden
from tests import tiny

NOISE, COND = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.array([0, 4, 9])


def _trees(config, run):
  """(params, teacher's params) with every weight drawn, those that start at zero too."""
  def draw(shapes, key):
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree, [0.1 * jax.random.normal(k, s.shape) for k, s in zip(jax.random.split(key, len(leaves)), leaves)])

  teacher = None if run.teacher_shapes is None else draw(run.teacher_shapes, jax.random.key(1))
  shapes = jax.eval_shape(run.init, jax.random.key(0), teacher)
  return draw(shapes, jax.random.key(2)), teacher


def _step(config, tau_src, tau_dst, nfe):
  run = build.run(config)
  params, teacher = _trees(config, run)
  at = lambda tau: jnp.full(3, tau)
  return jax.jit(lambda p, w: run.flow_map(p, w, COND, nfe)(NOISE, at(tau_src), at(tau_dst), jax.random.key(0)))(
      params, teacher)


@pytest.mark.slow
def test_temperature_sharpens_every_call_but_the_last():
  step = lambda temperature, *taus: _step(
      tiny.config("student,2", policy__dropout=0.0, flow__shift=3.0, sampling__temperature=temperature), *taus, nfe=2)
  plain, sharp = (step(temperature, 1.0, 0.5) for temperature in (1.0, 0.3))
  assert float(jnp.abs(plain - sharp).max()) > 1e-3
  np.testing.assert_allclose(step(1.0, 0.5, 0.0), step(0.3, 0.5, 0.0), atol=1e-6)  # two programs, one result

  config = tiny.config("student,2", policy__dropout=0.0, flow__shift=3.0)
  run, student = build.run(config), build._student(config)
  params, teacher = _trees(config, run)
  policy = gmm.with_temperature(student.policy(params, teacher, NOISE, jnp.ones(3), COND, eps=1e-4), 0.3)
  want = rollout.rollout(policy, NOISE, jnp.ones(3), jnp.full(3, 0.5), shift=3.0, total_substeps=16)
  np.testing.assert_allclose(sharp, want, atol=1e-5)


@pytest.mark.slow
def test_parallel_decodings_flow_map_is_its_policys_rollout():
  """Through the whole network: one fused layer against all velocities and their sum."""
  config = tiny.config("parallel", policy__intervals=8, parallel_decoding__min_block=2, parallel_decoding__max_block=8,
                       flow__shift=3.0)
  student = build._student(config)
  params, teacher = _trees(config, build.run(config))
  policy = student.policy(params, teacher, NOISE, flow.warp(jnp.full(3, 0.75), 3.0), COND)
  want = policy.advance(NOISE, jnp.full(3, 0.75), jnp.full(3, 0.25))
  np.testing.assert_allclose(_step(config, 0.75, 0.25, 2), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_teacher_is_sampled_by_the_solver_named(solver):
  config = tiny.config("teacher", sampling__solver=solver)
  run = build.run(config)
  params, _ = _trees(config, run)
  u = jax.jit(lambda x, t: build._apply(build._network(config, build._velocity_head(config)))(params, x, t, COND))
  here = u(NOISE, jnp.ones(3))
  mean = here if solver == "euler" else (here + u(NOISE - 0.5 * here, jnp.full(3, 0.5))) / 2
  np.testing.assert_allclose(_step(config, 1.0, 0.5, 2), NOISE - 0.5 * mean, atol=1e-5)


@pytest.mark.slow
def test_a_meanflow_student_starts_as_one_euler_step_of_its_teacher():
  config = tiny.config("meanflow")
  run = build.run(config)
  _, teacher = _trees(config, run)
  params = run.init(jax.random.key(3), teacher)
  at = lambda tau: jnp.full(3, tau)
  maps = [run.flow_map(params, teacher, COND, 1), build.teacher_flow_map(config, teacher, COND)]
  got, want = (m(NOISE, at(0.8), at(0.2), jax.random.key(0)) for m in maps)
  np.testing.assert_array_equal(got, want)


def test_a_teacher_is_guided_by_every_field_of_it():
  fields = dict(teacher__guidance_scale=3.0, teacher__guidance_interval=(0.2, 0.7), teacher__orthogonal=0.5)
  config = tiny.config("student", **fields)
  _, teacher = _trees(config, build.run(config))
  t, plain = jnp.array([0.1, 0.5, 0.9]), build.teacher(tiny.config("student"))
  u_cond, u_null = (plain(teacher, NOISE, t, cond) for cond in (COND, jnp.full(3, 10)))
  want = teacher_lib.guided_velocity(u_cond, u_null, NOISE, t, scale=3.0, interval=(0.2, 0.7), orthogonal=0.5)
  np.testing.assert_allclose(build.teacher(config)(teacher, NOISE, t, COND), want, atol=1e-5)
  without = teacher_lib.guided_velocity(u_cond, u_null, NOISE, t, scale=3.0, interval=(0.2, 0.7))
  assert float(jnp.abs(without - want).max()) > 1e-2


@pytest.mark.slow
def test_a_schedule_mixes_the_teacher_in():
  """What a step says of the loss: while the schedule runs, states are the teacher's, and then as without one."""
  def losses(**fields):
    config = tiny.config("student", policy__dropout=0.0, **fields)
    run = build.run(config)
    params, teacher = _trees(config, run)
    batch = {"x_0": jax.random.normal(jax.random.key(3), NOISE.shape), "cond": COND}
    keys = jax.random.split(jax.random.key(4), 3)
    at = jax.jit(lambda step: run.objective(params, teacher, batch, keys, step)[1]["loss"])
    return [float(at(step)) for step in (0, 3, 6, 9)]

  plain, mixed = losses(), losses(imitation__num_decay_steps=6)
  assert len(set(plain)) == 1 and len(set(mixed)) == 3
  np.testing.assert_allclose(mixed[2:], plain[2:], rtol=1e-3)  # averages by a rollout of one substep are velocities


@pytest.mark.slow
def test_stochasticity_is_the_samplings():
  """h = 0 is the same for every key; h > 0 is not, and differs from it."""
  def draw(h, seed):
    config = tiny.config("student,2", flow__nfe=2, sampling__nfe=2, sampling__h=h)
    run = build.run(config)
    jitted = train_loop.compile_run(config, sharding.make_mesh(1, 1, devices=jax.devices()[:1]), run)
    params, teacher = _trees(config, run)
    return jitted["draw"](params, teacher, NOISE, COND, jax.random.key(seed))

  plain = draw(0.0, 0)
  np.testing.assert_array_equal(plain, draw(0.0, 1))
  some = [draw(1.0, seed) for seed in (0, 1)]
  for a, b in ((some[0], plain), (some[0], some[1])):
    assert float(jnp.abs(a - b).max()) > 0.1


def test_the_exact_teacher_is_the_datas():
  config = gaussians.get_config("gm,4")
  params, teacher = build.exact_teacher(config), build.teacher(config)
  source = config.data.source("train", shape=config.data.shape, num_classes=1)
  x_0 = jnp.stack([source[i]["x_0"] for i in range(256)])
  # So little noise says what the data are: E[noise - x_0 | x] is within its spread of -x.
  t = jnp.full(256, 1e-3)
  u = teacher(params, x_0, t, jnp.zeros(256, jnp.int32))
  np.testing.assert_allclose(u, -x_0, atol=0.05)
  assert len({tuple(np.asarray(source[i]["x_0"]).ravel()) for i in range(64)}) == 64
  np.testing.assert_array_equal(source[3]["x_0"], source[3]["x_0"])


@pytest.mark.parametrize("tokens, size", [(256, 32), (1024, 64), (4096, 128)])
def test_dynamic_shift_counts_tokens(tokens, size):
  config = tiny.config("student", flow__dynamic_shift=True, data__shape=(size, size, 1))
  data = golden.load("sample_t", np.float64)
  np.testing.assert_allclose(build.shift(config), data[f"dyn{tokens}_shift"], rtol=1e-6)
  # The authors count positions before they are patched, and have ends four times as far: the same line.
  config.flow.update(base_tokens=4 * 256, max_tokens=4 * 4096)
  config.network.patch = 1
  np.testing.assert_allclose(build.shift(config), data[f"dyn{tokens}_shift"], rtol=1e-6)
  config.flow.base_log_shift = config.flow.max_log_shift = 0.7
  np.testing.assert_allclose(build.shift(config), np.exp(0.7))
  config.flow.dynamic_shift = False
  assert build.shift(config) == 1.0


@pytest.mark.parametrize("role, fields, field", [
    ("dx", dict(sampling__temperature=0.3), "config.sampling.temperature: DXHead"),
    ("dx", dict(policy__segment=-0.5), "config.policy.segment"),
    ("student", dict(imitation__label="midpoint"), "config.imitation.label: 'midpoint'.*window_substeps"),
    ("student", dict(imitation__label="rk4"), "config.imitation.label: 'rk4'"),
    ("student", dict(method=build.parallel_decoding), "config.policy.make: GMHead"),
    ("parallel", dict(parallel_decoding__min_block=5), "min_block=5 must divide config.policy.intervals=128"),
    ("parallel", dict(parallel_decoding__max_block=256), "max_block=256"),
    ("meanflow", dict(meanflow__target="both"), "config.meanflow.target: 'both'"),
    ("meanflow", dict(sampling__temperature=0.3), "config.sampling.temperature: meanflow makes no policies"),
    ("student", dict(policy__components=0), "config.policy.components: 0"),
    ("dx", dict(policy__points=0), "config.policy.points: 0"),
    ("student", dict(policy__logstd_width=0), "config.policy.logstd_width: 0"),
    ("student", dict(policy__dropout=1.5), "config.policy.dropout: 1.5 must be at least 0 and below 1"),
    ("student", dict(flow__final_scale=0.0), "config.flow.final_scale: 0.0 must be above 0"),
    ("student", dict(flow__final_scale=3.0), "config.flow.final_scale: 3.0"),
    ("student", dict(flow__shift=0.0), "config.flow.shift: 0.0"),
    ("student", dict(sampling__h=-1.0), "config.sampling.h: -1.0"),
    ("student", dict(imitation__num_decay_steps=-3), "config.imitation.num_decay_steps: -3"),
    ("student", dict(imitation__window_substeps=-2), "config.imitation.window_substeps: -2"),
    ("meanflow", dict(meanflow__ratio=-1.0), "config.meanflow.ratio: -1.0"),
    ("parallel", dict(flow__final_scale=0.5), "config.flow.final_scale: 0.5; parallel decoding"),
    ("teacher", dict(sampling__solver="Euler2"), "config.sampling.solver: 'Euler2'"),
    ("student", dict(sampling__solver="heun"), "config.sampling.solver: imitation takes no steps"),
    ("parallel", dict(policy__intervals=0), "config.policy.intervals: 0"),
    ("parallel", dict(sampling__nfe=3), "config.sampling.nfe: 3; .* multiples of 32 of 128 .* choose of 1, 2, 4$"),
    ("parallel", dict(sampling__nfe=8), "config.sampling.nfe: 8"),
    ("parallel", dict(parallel_decoding__max_block=64), "config.sampling.nfe: 1; .* at most 64: .* choose of 2, 4$"),
    ("parallel", dict(parallel_decoding__max_block=64, sampling__nfe=2, sampling__h=1.0),
     "config.sampling.h=1.0 choose of none"),
    ("parallel", dict(imitation__num_decay_steps=5), "config.imitation.num_decay_steps: parallel_decoding mixes no"),
    ("parallel", dict(imitation__window_substeps=5), "config.imitation.window_substeps: parallel_decoding has no window"),
    ("meanflow", dict(imitation__window_substeps=5), "config.imitation.window_substeps: meanflow has no window"),
    ("meanflow", dict(imitation__data_free=True), "config.imitation.data_free: meanflow walks no segments"),
    ("teacher", dict(imitation__data_free=True), "config.imitation.data_free: flow_matching"),
    ("meanflow", dict(imitation__label="midpoint"), "config.imitation.label: meanflow takes no mean"),
    ("meanflow", dict(meanflow__guidance_scale=2.0), 'config.meanflow.guidance_scale: 2.0 is for target "data"'),
    ("meanflow", dict(meanflow__logit_std=0.0), "config.meanflow.logit_std: 0.0 must be above 0"),
    ("meanflow", dict(meanflow__norm_eps=0.0), "config.meanflow.norm_eps: 0.0"),
    ("meanflow", dict(meanflow__label_dropout=1.5), "config.meanflow.label_dropout: 1.5"),
    ("teacher", dict(flow_matching__label_dropout=-0.1), "config.flow_matching.label_dropout: -0.1"),
    ("teacher", dict(flow_matching__logit_std=float("nan")), "config.flow_matching.logit_std: nan"),
    ("student", dict(sampling__temperature=0.0), "config.sampling.temperature: 0.0 must be above 0"),
    ("student", dict(sampling__temperature=float("nan")), "config.sampling.temperature: nan"),
    ("student", dict(teacher__guidance_interval=(0.7, 0.2)), r"config.teacher.guidance_interval: \(0.7, 0.2\) must be two"),
    ("student", dict(teacher__guidance_interval=(0.0, 1.5)), "config.teacher.guidance_interval"),
    ("student", dict(teacher__guidance_interval=(0.5,)), "config.teacher.guidance_interval"),
    ("student", dict(flow__max_tokens=256), "config.flow.max_tokens: 256 must be above config.flow.base_tokens=256"),
    ("student", dict(imitation__num_states=0), "config.imitation.num_states: 0"),
    ("student", dict(teacher__mixture=lambda *_: None, teacher__guidance_scale=2.0), "config.teacher.guidance_scale: 2.0"),
])
def test_fields_that_do_not_fit_are_named(role, fields, field):
  with pytest.raises(errors.UserError, match=field):
    build.run(tiny.config(role, **fields))


def test_the_points_of_dx_lie_on_the_flows_segment():
  head = lambda **fields: build.policy_head(tiny.config("dx,4", flow__final_scale=0.5, **fields))
  np.testing.assert_allclose(head().segment, 1 / 3.5)
  assert head(policy__segment=0.7).segment == 0.7 and head(flow__shift=2.0).shift == 2.0


def test_digits_roles_are_what_they_say():
  assert {digits.get_config(role).method for role in ("dx", "gm32", "student", "dx-no-window")} == {build.imitation}
  assert digits.get_config("gm32,4").policy.components == 32 and digits.get_config("gm32,4").flow.nfe == 4
  assert [digits.get_config(role).imitation.window_substeps for role in ("dx", "dx-no-window")] == [10, 0]
  assert digits.get_config("improved-meanflow").meanflow.improved and not digits.get_config("meanflow").meanflow.improved
  with pytest.raises(ValueError, match="student,x: choose ROLE or ROLE,NFE"):
    digits.get_config("student,x")
