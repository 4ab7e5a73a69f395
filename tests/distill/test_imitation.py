"""The training segment against the authors' vectors, in every setting of them."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax import teacher as teacher_lib
from piflow_jax.distill import imitation
from piflow_jax.distill import segments
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from tests import golden
from tests.distill import making


def _segment(data, case):
  get = lambda name: data[f"{case}_{name}"]
  matrix, bias = jnp.asarray(data["teacher_A"]), jnp.asarray(data["teacher_b"])

  def teacher(x, t):
    return jnp.einsum("ij,bhwj->bhwi", matrix, x) + bias[None, None, None] + jnp.sin(x) * flow.broadcast_to(t, x)

  nfe, final_scale = {"nfe1": (1, 1.0), "nfe4": (4, 0.5)}[case.rpartition("_")[2]]
  clock = flow.Clock(float(get("shift")), 128, nfe, final_scale)
  x_src, tau_src = golden.nhwc(get("x_t_src")), jnp.asarray(get("raw_t_src"))
  t_src, segment = clock.warp(tau_src), jnp.asarray(get("segment_size"))
  draws = imitation.Draws(jnp.asarray(get("uniform_student")), jnp.asarray(get("uniform_teacher")))
  is_gm, ratio = case.startswith("gm"), float(get("teacher_ratio"))
  dropout = float(get("gm_dropout")) if is_gm else 0.0

  def loss(output):
    if is_gm:
      policy = gmm.to_policy(output, x_src, t_src, eps=1e-6)
    else:
      policy = golden.dx_policy(output, get("x_t_src"), t_src, clock.replace(shift=float(get("policy_shift"))),
                                segment=float(get("policy_segment_size")))
    behaviour = policy
    if dropout:
      behaviour = gmm.drop_components(policy, jnp.asarray(get("uniform_dropout"))[:, :, 0, 0, 0], rate=dropout)
    matching = imitation.Matching(window_substeps=int(get("window_substeps")), loss_scale=3.0)
    return imitation.segment_loss(
        policy, behaviour, teacher, x_src, tau_src, segment, draws, clock, matching, teacher_ratio=ratio)

  output = golden.mixture(data, f"{case}_den_") if is_gm else jnp.asarray(get("den"))
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(output), get


SETTINGS = ["gm_dropout", "dx_mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "gm_plain", "gm_mixed", "gm_full_teacher", "gm_mixed_w3_2", "dx_plain", "dx_full_teacher", "dx_mixed_w3_2"))]


@pytest.mark.parametrize("regime", ["nfe1", "nfe4"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_segment_vectors_float64(x64, setting, regime):
  data = golden.load("piid_segment", np.float64)
  case = f"{setting}_{regime}"
  ((loss, aux), grads), get = _segment(data, case)

  def close(got, want, rtol=1e-8):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(np.asarray(want)).max())

  close(aux["tau_a"], get("raw_t_a"))
  close(aux["tau_average"], get("raw_t_avg_end"))
  close(aux["tau_dst"], get("raw_t_dst"))
  close(aux["x_a"], golden.nhwc(get("x_t_a")))
  close(aux["u_teacher"], golden.nhwc(get("tgt_u")))
  close(aux["u_policy"], golden.nhwc(get("pred_u")))
  close(aux["x_dst"], golden.nhwc(get("x_t_dst")))
  close(loss, get("loss"))
  if setting.startswith("dx"):
    close(grads, get("grad_den"))
    return
  want = golden.mixture(data, f"{case}_grad_")
  close(grads.means, want.means)
  close(grads.logweights, want.logweights, 1e-7)
  close(grads.logstd, want.logstd, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gm", "dx"])
@pytest.mark.parametrize("regime", ["nfe1", "nfe4"])
def test_segment_vectors_float32(kind, regime):
  # float32 sums 128 substeps; gradients to the 1e-3 that tests/goldens/README.md names.
  case = f"{kind}_mixed_{regime}"
  ((loss, _), grads), _ = _segment(golden.load("piid_segment"), case)
  want = golden.load("piid_segment", np.float64)
  np.testing.assert_allclose(loss, want[f"{case}_loss"], rtol=1e-4)
  got, means = grads, want[f"{case}_grad_den" if kind == "dx" else f"{case}_grad_means"]
  if kind == "gm":
    got, means = grads.means, golden.means(means)
  np.testing.assert_allclose(got, means, rtol=1e-3, atol=1e-3 * float(np.abs(means).max()))


@pytest.mark.slow
def test_midpoint_label_is_the_teachers_mean_over_the_window():
  """A teacher u = t (whatever x): its mean over [t_a, t_b] is (t_a + t_b) / 2, by a midpoint step exactly."""
  b, window = 3, 4
  x_src, tau_src = jnp.zeros((b, 1, 1, 1)), jnp.ones(b)
  policy = gmm.GMPolicy(jnp.zeros((b, 1, 1, 1)), jnp.zeros((b, 1, 1)), jnp.full(b, 0.1), jnp.zeros((b, 1, 1)), tau_src)
  draws = imitation.Draws(jax.random.uniform(jax.random.key(0), (b, 2)), jax.random.uniform(jax.random.key(1), (b, 1)))
  clock = flow.Clock(2.0, 16, 1, 1.0)

  def trajectory(label):
    return imitation.segment_loss(
        policy, policy, lambda x, t: flow.broadcast_to(t, x) + 0 * x, x_src, tau_src, jnp.ones(b), draws, clock,
        imitation.Matching(window, label))[1]

  euler, midpoint = trajectory("euler"), trajectory("midpoint")
  t_a, t_b = (clock.warp(jnp.maximum(euler[k], 0)) for k in ("tau_a", "tau_average"))
  np.testing.assert_allclose(euler["u_teacher"][..., 0, 0, 0], t_a, rtol=1e-6)
  np.testing.assert_allclose(midpoint["u_teacher"][..., 0, 0, 0], (t_a + t_b) / 2, rtol=1e-6)
  np.testing.assert_array_equal(euler["x_a"], midpoint["x_a"])


def test_teacher_ratio_falls_to_zero():
  np.testing.assert_allclose([imitation.teacher_ratio_at(s, 4) for s in range(6)], [1, 0.75, 0.5, 0.25, 0, 0])
  assert imitation.teacher_ratio_at(3, 0) == 0


def test_the_schedule_hands_the_trajectory_from_the_teacher_to_the_policy():
  """A teacher u = 5 and a policy that bets on x_0 = 0: who walked how far tells where a segment ends."""
  def student(params, base, x, t, cond):
    means = 0 * x.reshape(4, 1, 1, 1) + params
    return gmm.GMPolicy(means, jnp.zeros((4, 1, 1)), jnp.full(4, 1e-9), x.reshape(4, 1, 1), t)

  clock = flow.Clock(2.0, 16, 2, 1.0)
  segment_fn = imitation.segment(student, lambda params, x, t, cond: 5 + 0 * x, _unchanged, clock, imitation.Matching(),
                                 num_states=3, num_decay_steps=4)
  x, keys = jnp.arange(1, 5.0).reshape(4, 1, 1, 1), jax.random.split(jax.random.key(0), 4)
  taus, lengths = jnp.full(4, 1.0), jnp.full(4, 0.5)
  end = jax.jit(lambda step: segment_fn(jnp.zeros(()), None, x, taus, lengths, {}, keys, step)[1])
  t_dst = clock.warp(0.5)
  by_teacher, by_policy = x - 5 * (1 - t_dst), x * t_dst
  np.testing.assert_allclose(end(0), by_teacher, rtol=1e-5)
  for step in (4, 9):
    np.testing.assert_allclose(end(step), by_policy, rtol=1e-5)
  assert ((by_teacher + 0.1 < end(2)) & (end(2) < by_policy - 0.1)).all()


def _unchanged(policy, keys):
  del keys
  return policy


def _objective(teacher, make):
  def student(params, base, x, t, cond):
    del base, cond
    b, positions = x.shape[0], x.shape[1] * x.shape[2]
    means = jnp.broadcast_to(params[None, None, :, None], (b, x.shape[3], params.shape[0], positions))
    logweights = jnp.full((b, params.shape[0], positions), -jnp.log(params.shape[0]))
    return gmm.to_policy(gmm.Mixture(means, logweights, jnp.full(b, jnp.log(0.5))), x, t)

  def perturb(policy, keys):
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(keys)
    return gmm.drop_components(policy, uniform, rate=0.5)

  clock = flow.Clock(1.0, 16, 2, 1.0)
  segment = imitation.segment(student, teacher, perturb, clock, imitation.Matching(window_substeps=2), num_states=2)
  return make(segment, clock)


@pytest.mark.parametrize("make", [segments.on_data, segments.data_free])
def test_objective_is_a_function_of_each_samples_own_key(make):
  """Half of the batch alone gives the same losses: draws hang on the sample's key, not on the batch around it."""
  teacher = lambda params, x, t, cond: -x
  objective = _objective(teacher, make)
  x_0 = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
  keys = jax.random.split(jax.random.key(1), 4)
  params = jnp.array([-0.5, 0.7])

  def batch(x_0):
    return {"x_0": x_0, "cond": {"label": jnp.zeros(len(x_0))}}

  run = jax.jit(lambda x_0, keys: objective(params, None, batch(x_0), keys, 0))
  grads, metrics = run(x_0, keys)
  halves = [run(x_0[i:i + 2], keys[i:i + 2]) for i in (0, 2)]
  np.testing.assert_allclose(metrics["loss"], np.mean([m["loss"] for _, m in halves]), rtol=1e-6)
  np.testing.assert_allclose(grads, np.mean([g for g, _ in halves], axis=0), rtol=1e-5)
  other = run(x_0, jax.random.split(jax.random.key(2), 4))
  assert not np.allclose(other[1]["loss"], metrics["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 2])
def test_a_perfect_student_has_no_loss(window):
  """Data are one Gaussian, the policy its exact posterior: the teacher's label is the policy's own velocity.

  With a window the label is instantaneous and the policy's is a mean over it, so the loss is small but not zero.
  """
  mean, var = 0.3, 0.25

  def exact(params, x, t, cond):  # E[noise - x_0 | x] for x_0 ~ N(mean, var)
    s = flow.broadcast_to(t, x)
    total = (1 - s) ** 2 * var + s**2
    x_0 = mean + (1 - s) * var / total * (x - (1 - s) * mean)
    return jnp.where(s > 0, (x - x_0) / jnp.maximum(s, 1e-6), 0)

  def student(params, base, x, t, cond):
    b, positions = x.shape[0], x.shape[1] * x.shape[2]
    s = t[:, None, None]
    total = (1 - s) ** 2 * var + s**2
    y = gmm.to_positions(x)
    x_0 = mean + (1 - s) * var / total * (y - (1 - s) * mean)
    policy_var = (var * t**2 / total[:, 0, 0])
    return gmm.GMPolicy(x_0[:, :, None] + params, jnp.zeros((b, 1, positions)), policy_var, y, t, 1e-6)

  clock = flow.Clock(1.0, 256, 2, 1.0)
  objective = segments.on_data(
      imitation.segment(student, exact, _unchanged, clock, imitation.Matching(window), num_states=3), clock)
  x_0 = mean + var**0.5 * jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
  batch, keys = {"x_0": x_0, "cond": {}}, jax.random.split(jax.random.key(1), 64)
  loss = lambda p: objective(p, None, batch, keys, 2)[1]["loss"]
  bound = 1e-9 if not window else 2e-3
  assert float(jax.jit(loss)(jnp.zeros(()))) < bound
  assert float(jax.jit(loss)(jnp.full((), 0.3))) > 5 * bound


@pytest.mark.parametrize("final_scale", [1.0, 0.5])
def test_a_student_that_is_the_exact_posterior_is_elastic_in_nfe(x64, final_scale):
  """Its policies follow the exact flow from wherever they are made, so that calls only split the same substeps."""
  mixture = teacher_lib.GaussianMixture(
      jnp.array([[-1.5, 0.4], [0.3, 1.2], [1.0, -1.0]])[:, None, None], 0.3, jnp.log(jnp.array([0.2, 0.5, 0.3])))

  def student(x, t):  # of x_0 given x: one Gaussian for each of the data's, all as wide
    s = t[:, None, None]
    total = (1 - s) ** 2 * mixture.std**2 + s**2
    means = jnp.swapaxes(mixture.means[:, 0, 0], 0, 1)[None]  # [1, C, K]
    away = x[:, 0, 0, :, None] - (1 - s) * means
    logweights = jax.nn.log_softmax(mixture.logweights[None] - jnp.sum(away**2, 1) / (2 * total[:, :, 0]), axis=1)
    means = means + (1 - s) * mixture.std**2 / total * away
    return gmm.GMPolicy(means[..., None], logweights[..., None], mixture.std**2 * t**2 / total[:, 0, 0],
                        gmm.to_positions(x), t, 1e-4)

  noise = jax.random.normal(jax.random.key(0), (64, 1, 1, 2))

  def ends(flow_map, clock):
    return jax.jit(lambda x: sampler.sample(flow_map, x, None, clock))(noise)

  many = flow.Clock.of_shift(2.0).replace(nfe=256)
  exact = ends(sampler.velocity_flow_map(
      lambda x, t: teacher_lib.gaussian_mixture_teacher(mixture, x, t), many, method="Dopri5"), many)
  # 112 substeps: a multiple of all steps below, halved or not.
  clocks = [flow.Clock(2.0, 112, nfe, final_scale) for nfe in (1, 2, 4, 7)]
  errors = [float(jnp.abs(ends(sampler.policy_flow_map(student, c), c) - exact).mean()) for c in clocks]
  np.testing.assert_allclose(errors, errors[0], rtol=0.1)
  assert errors[0] < 0.03


FIELDS = dict(nfe=2, final_scale=0.5, total_substeps=16, num_states=3, window_substeps=2, loss_scale=1.0)


@functools.cache
def _parts():
  return making.parts(
      gmm.config(components=2, logstd_width=4, dropout=0.0), shift=2.0, teacher=dict(guidance_scale=2.0))


def _make(**fields):
  return making.method(imitation.config(**(FIELDS | fields)), _parts())


@pytest.mark.parametrize("name, values", {
    "nfe": (0, -1, 17, 2**40, 1e30, "x", 1.5), "total_substeps": (0, -1, 2**40, float("nan")),
    "final_scale": (0, -1, 1.5, float("nan"), float("inf"), "x"), "num_states": (0, -1, 2**40, "x"),
    "window_substeps": (-1, 17, 2**40), "num_decay_steps": (-1, 2**40, float("inf")),
    "loss_scale": (0, -3.0, float("nan"), float("inf"), 1e30, "x"), "label": ("x", 0), "data_free": ("x", 2),
}.items())
def test_a_field_out_of_its_range_is_refused_by_name(name, values):
  for value in values:
    with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape(str(value))}"):
      _make(**{name: value})


def test_what_does_not_fit_is_refused_by_name():
  with pytest.raises(ValueError, match="^label: 'midpoint' .*set window_substeps"):
    _make(label="midpoint", window_substeps=0)
  with pytest.raises(ValueError, match="no such field"):
    imitation.config(points=4)
  noun, parts = imitation.config(), _parts()
  with pytest.raises(ValueError, match="^make: .*config.policy is not set"):
    making.method(noun, parts._replace(student=None))
  with pytest.raises(ValueError, match="^make: .*config.teacher is not set"):
    making.method(noun, parts._replace(teacher=None))


@pytest.mark.parametrize("fields, passes", [
    ({}, 3 + 3 * 2), (dict(label="midpoint"), 3 + 3 * 2 * 2), (dict(data_free=True, num_states=1), (3 + 2) * 2)])
def test_a_method_counts_its_passes_and_knows_its_clock(fields, passes):
  """One pass forward, two backward, and the guided teacher's two for each state, in each segment that is walked."""
  method = _make(**fields)
  assert method.passes == passes and method.per_call
  assert method.clock == flow.Clock(2.0, total_substeps=16, nfe=2, final_scale=0.5)
  assert method.calls(2, 0.0) is None
  for nfe, why in ((4, "noise levels that the network was not trained at"), (1, "covers more than it was trained to")):
    remark = method.calls(nfe, 0.0)
    assert remark.startswith(f"config.sampling.nfe: {nfe}, trained for 2:") and why in remark


@pytest.mark.parametrize("policy, segment", [(dx.config(points=3), 1 / 1.5), (dx.config(points=3, segment=0.4), 0.4)])
def test_a_dx_policys_points_lie_as_in_training_however_many_calls_are_made(policy, segment, monkeypatch):
  method = making.method(imitation.config(**FIELDS), making.parts(policy))
  seen = []
  monkeypatch.setattr(sampler, "policy_flow_map", lambda student, clock: seen.append(student))
  params = jax.jit(method.init)(jax.random.key(0), making.teacher_params())
  method.flow_map(params, {}, making.cond(2), method.clock.replace(nfe=8))
  made = seen[0](jnp.zeros((2, *making.SHAPE)), jnp.ones(2))
  np.testing.assert_allclose(made.tau_src - made.tau_dst, segment, rtol=1e-6)


def test_only_the_last_calls_policy_is_left_as_it_is(monkeypatch):
  seen = []
  monkeypatch.setattr(sampler, "policy_flow_map", lambda student, clock: seen.append(student))

  def var(temperature, t):
    method = making.method(imitation.config(**FIELDS), making.parts(
        gmm.config(components=2, logstd_width=4, temperature=temperature), shift=2.0))
    params = jax.jit(method.init)(jax.random.key(0), making.teacher_params())
    method.flow_map(params, {}, making.cond(2), method.clock)
    return seen.pop()(jnp.zeros((2, *making.SHAPE)), jnp.full(2, t)).var

  last = 2 / 3 / (1 + 1 / 3)  # raw time 1/3, shifted by 2
  np.testing.assert_allclose(var(0.25, 1.0), 0.25 * var(1.0, 1.0), rtol=1e-6)
  np.testing.assert_array_equal(var(0.25, last), var(1.0, last))


@flax.struct.dataclass
class _Broadcasting:
  """A policy whose velocity has no channels, positions nor values of its own."""

  u: jax.Array

  def velocity(self, x, t):
    del x
    return flow.broadcast_to(0 * t + self.u, self.u[None, None, None, None])


@pytest.mark.parametrize("who", ["policy", "teacher"])
def test_a_velocity_that_would_only_broadcast_is_refused(who):
  """[B, 1, 1, 1] against latents [B, 2, 2, 1]: a loss could be computed, of something else."""
  policy = gmm.GMPolicy(jnp.zeros((2, 1, 1, 4)), jnp.zeros((2, 1, 4)), jnp.ones(2), jnp.zeros((2, 1, 4)), jnp.ones(2))
  full = lambda x, t: flow.broadcast_to(t, x) + 0 * x
  one = lambda x, t: flow.broadcast_to(t, x)
  draws = imitation.Draws(jnp.full((2, 1), 0.5), jnp.zeros((2, 0)))

  def loss(live, teacher):
    return imitation.segment_loss(live, policy, teacher, jnp.zeros((2, 2, 2, 1)), jnp.ones(2), jnp.ones(2), draws,
                                  flow.Clock(1.0, 4, 1, 1.0), imitation.Matching())[0]

  assert np.isfinite(loss(policy, full))
  with pytest.raises(AssertionError, match="shape"):
    loss(*((policy, one) if who == "teacher" else (_Broadcasting(jnp.array(1.0)), full)))
