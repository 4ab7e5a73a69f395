"""The training segment against the authors' vectors, in every setting of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax import teacher as teacher_lib
from piflow_jax.distill import imitation
from piflow_jax.distill import segments
from piflow_jax.policy import gmm
from piflow_jax.policy import rollout
from tests import golden


def _segment(data, case):
  get = lambda name: data[f"{case}_{name}"]
  matrix, bias = jnp.asarray(data["teacher_A"]), jnp.asarray(data["teacher_b"])

  def teacher(x, t):
    return jnp.einsum("ij,bhwj->bhwi", matrix, x) + bias[None, None, None] + jnp.sin(x) * flow.broadcast_to(t, x)

  shift = float(get("shift"))
  x_src, tau_src = golden.nhwc(get("x_t_src")), jnp.asarray(get("raw_t_src"))
  t_src, segment = flow.warp(tau_src, shift), jnp.asarray(get("segment_size"))
  draws = imitation.Draws(jnp.asarray(get("uniform_student")), jnp.asarray(get("uniform_teacher")))
  is_gm, ratio = case.startswith("gm"), float(get("teacher_ratio"))
  dropout = float(get("gm_dropout")) if is_gm else 0.0

  def loss(output):
    if is_gm:
      policy = gmm.to_policy(output, x_src, t_src, eps=1e-6)
    else:
      policy = golden.dx_policy(output, get("x_t_src"), t_src, segment=float(get("policy_segment_size")),
                                shift=float(get("policy_shift")))
    behaviour = policy
    if dropout:
      behaviour = gmm.drop_components(policy, jnp.asarray(get("uniform_dropout"))[:, :, 0, 0, 0], rate=dropout)
    return imitation.segment_loss(
        policy, behaviour, teacher, x_src, tau_src, segment, draws, shift=shift, teacher_ratio=ratio, loss_scale=3.0,
        window_substeps=int(get("window_substeps")), max_segment=float(np.max(get("segment_size"))))

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
  close = lambda got, want, rtol=1e-8: np.testing.assert_allclose(
      got, want, rtol=rtol, atol=rtol * np.abs(np.asarray(want)).max())
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
  # float32 sums 128 substeps; gradients to the 1e-3 that the vectors' README names.
  case = f"{kind}_mixed_{regime}"
  ((loss, _), grads), _ = _segment(golden.load("piid_segment"), case)
  want = golden.load("piid_segment", np.float64)
  np.testing.assert_allclose(loss, want[f"{case}_loss"], rtol=1e-4)
  got, means = (grads.means, golden.means(want[f"{case}_grad_means"])) if kind == "gm" else (grads, want[f"{case}_grad_den"])
  np.testing.assert_allclose(got, means, rtol=1e-3, atol=1e-3 * float(np.abs(means).max()))


@pytest.mark.slow
def test_midpoint_label_is_the_teachers_mean_over_the_window():
  """A teacher u = t (whatever x): its mean over [t_a, t_b] is (t_a + t_b) / 2, by a midpoint step exactly."""
  b, window = 3, 4
  x_src, tau_src = jnp.zeros((b, 1, 1, 1)), jnp.ones(b)
  policy = gmm.GMPolicy(jnp.zeros((b, 1, 1, 1)), jnp.zeros((b, 1, 1)), jnp.full(b, 0.1), jnp.zeros((b, 1, 1)), tau_src)
  draws = imitation.Draws(jax.random.uniform(jax.random.key(0), (b, 2)), jax.random.uniform(jax.random.key(1), (b, 1)))
  label = lambda method: imitation.segment_loss(
      policy, policy, lambda x, t: flow.broadcast_to(t, x) + 0 * x, x_src, tau_src, jnp.ones(b), draws, shift=2.0,
      total_substeps=16, window_substeps=window, method=method)[1]
  euler, midpoint = label("euler"), label("midpoint")
  t_a, t_b = (flow.warp(jnp.maximum(euler[k], 0), 2.0) for k in ("tau_a", "tau_average"))
  np.testing.assert_allclose(euler["u_teacher"][..., 0, 0, 0], t_a, rtol=1e-6)
  np.testing.assert_allclose(midpoint["u_teacher"][..., 0, 0, 0], (t_a + t_b) / 2, rtol=1e-6)
  np.testing.assert_array_equal(euler["x_a"], midpoint["x_a"])


def test_teacher_ratio_falls_to_zero():
  np.testing.assert_allclose([imitation.teacher_ratio_at(s, 4) for s in range(6)], [1, 0.75, 0.5, 0.25, 0, 0])
  assert imitation.teacher_ratio_at(3, 0) == 0


def test_the_schedule_hands_the_trajectory_from_the_teacher_to_the_policy():
  """A teacher u = 5 and a policy that bets on x_0 = 0: who walked how far tells where a segment ends."""
  def student(params, base, x, t, cond):
    return gmm.GMPolicy(0 * x.reshape(4, 1, 1, 1) + params, jnp.zeros((4, 1, 1)), jnp.full(4, 1e-9), x.reshape(4, 1, 1), t)

  segment_fn = imitation.segment(student, lambda params, x, t, cond: 5 + 0 * x, lambda policy, keys: policy,
                                 num_states=3, total_substeps=16, shift=2.0, num_decay_steps=4)
  x, keys, of_each = jnp.arange(1, 5.0).reshape(4, 1, 1, 1), jax.random.split(jax.random.key(0), 4), lambda v: jnp.full(4, v)
  end = jax.jit(lambda step: segment_fn(jnp.zeros(()), None, x, of_each(1.0), of_each(0.5), None, keys, step)[1])
  t_dst = flow.warp(0.5, 2.0)
  by_teacher, by_policy = x - 5 * (1 - t_dst), x * t_dst
  np.testing.assert_allclose(end(0), by_teacher, rtol=1e-5)
  for step in (4, 9):
    np.testing.assert_allclose(end(step), by_policy, rtol=1e-5)
  assert ((by_teacher + 0.1 < end(2)) & (end(2) < by_policy - 0.1)).all()


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

  segment = imitation.segment(student, teacher, perturb, num_states=2, total_substeps=16, window_substeps=2)
  return make(segment, nfe=2)


@pytest.mark.parametrize("make", [segments.on_data, segments.data_free])
def test_objective_is_a_function_of_each_samples_own_key(make):
  """Half of the batch alone gives the same losses: draws hang on the sample's key, not on the batch around it."""
  teacher = lambda params, x, t, cond: -x
  objective = _objective(teacher, make)
  x_0 = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
  keys = jax.random.split(jax.random.key(1), 4)
  params = jnp.array([-0.5, 0.7])
  run = jax.jit(lambda x_0, keys: objective(params, None, {"x_0": x_0, "cond": jnp.zeros(len(x_0))}, keys, 0))
  grads, metrics = run(x_0, keys)
  halves = [run(x_0[i:i + 2], keys[i:i + 2]) for i in (0, 2)]
  np.testing.assert_allclose(metrics["loss"], np.mean([m["loss"] for _, m in halves]), rtol=1e-6)
  np.testing.assert_allclose(grads, np.mean([g for g, _ in halves], axis=0), rtol=1e-5)
  other = objective(params, None, {"x_0": x_0, "cond": jnp.zeros(4)}, jax.random.split(jax.random.key(2), 4), 0)
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

  objective = segments.on_data(imitation.segment(
      student, exact, lambda policy, keys: policy, num_states=3, total_substeps=256, window_substeps=window), nfe=2)
  x_0 = mean + var**0.5 * jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
  batch, keys = {"x_0": x_0, "cond": jnp.zeros(64)}, jax.random.split(jax.random.key(1), 64)
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
  ends = lambda flow_map, nfe, **more: jax.jit(
      lambda x: sampler.sample(flow_map, x, jax.random.key(0), nfe=nfe, shift=2.0, **more))(noise)
  exact = ends(sampler.velocity_flow_map(
      lambda x, t: teacher_lib.gaussian_mixture_teacher(mixture, x, t), shift=2.0, method="Dopri5"), 256)
  roll = functools.partial(rollout.rollout, shift=2.0, total_substeps=112)  # a multiple of all steps below, halved or not
  flow_map = sampler.policy_flow_map(student, roll, shift=2.0)
  error = lambda nfe: float(jnp.abs(ends(flow_map, nfe, final_scale=final_scale) - exact).mean())
  errors = [error(nfe) for nfe in (1, 2, 4, 7)]
  np.testing.assert_allclose(errors, errors[0], rtol=0.1)
  assert errors[0] < 0.03
