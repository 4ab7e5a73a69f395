"""The training segment against the authors' vectors, in every setting of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.distill import imitation
from piflow_jax.policy import gmm
from tests import golden


def _segment(data, case):
  get = lambda name: data[f"{case}_{name}"]
  matrix, bias = jnp.asarray(data["teacher_A"]), jnp.asarray(data["teacher_b"])

  def teacher(x, t):
    return jnp.einsum("ij,bhwj->bhwi", matrix, x) + bias[None, None, None] + jnp.sin(x) * flow.broadcast_to(t, x)

  shift = float(get("shift"))
  x_src, tau_src = golden.nhwc(get("x_t_src")), jnp.asarray(get("raw_t_src"))
  segment = jnp.asarray(get("segment_size"))
  draws = imitation.Draws(jnp.asarray(get("uniform_student")), jnp.asarray(get("uniform_teacher")))
  dropout = float(get("gm_dropout"))
  ratio = float(get("teacher_ratio"))

  def loss(mixture):
    policy = gmm.to_policy(mixture, x_src, flow.warp(tau_src, shift), eps=1e-6)
    behaviour = policy
    if dropout:
      behaviour = gmm.drop_components(policy, jnp.asarray(get("uniform_dropout"))[:, :, 0, 0, 0], rate=dropout)
    return imitation.segment_loss(
        policy, behaviour, teacher, x_src, tau_src, segment, draws, shift=shift, teacher_ratio=ratio, loss_scale=3.0,
        window_substeps=int(get("window_substeps")), max_segment=float(np.max(get("segment_size"))))

  mixture = golden.mixture(data, f"{case}_den_")
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(mixture), get


@pytest.mark.parametrize("regime", ["nfe1", "nfe4"])
@pytest.mark.parametrize("setting", ["dropout", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "mixed", "full_teacher", "mixed_w3_2"))])
def test_segment_vectors_float64(x64, setting, regime):
  data = golden.load("piid_segment", np.float64)
  ((loss, aux), grads), get = _segment(data, f"gm_{setting}_{regime}")
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
  close(grads.means, golden.means(get("grad_means")))
  close(grads.logweights, golden.logweights(get("grad_logweights")), 1e-7)
  close(grads.logstd, golden.scalars(get("grad_logstds")), 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["nfe1", "nfe4"])
def test_segment_vectors_float32(regime):
  # float32 sums 128 substeps; gradients to the 1e-3 that the vectors' README names.
  case = f"gm_mixed_{regime}"
  ((loss, _), grads), _ = _segment(golden.load("piid_segment"), case)
  want = golden.load("piid_segment", np.float64)
  np.testing.assert_allclose(loss, want[f"{case}_loss"], rtol=1e-4)
  means = golden.means(want[f"{case}_grad_means"])
  np.testing.assert_allclose(grads.means, means, rtol=1e-3, atol=1e-3 * float(jnp.abs(means).max()))


def test_teacher_ratio_falls_to_zero():
  np.testing.assert_allclose([imitation.teacher_ratio_at(s, 4) for s in range(6)], [1, 0.75, 0.5, 0.25, 0, 0])
  assert imitation.teacher_ratio_at(3, 0) == 0


def _objective(teacher, captured, **settings):
  def student(params, base, x, t, cond):
    del base, cond
    b, positions = x.shape[0], x.shape[1] * x.shape[2]
    means = jnp.broadcast_to(params[None, None, :, None], (b, x.shape[3], params.shape[0], positions))
    logweights = jnp.full((b, params.shape[0], positions), -jnp.log(params.shape[0]))
    return gmm.to_policy(gmm.Mixture(means, logweights, jnp.full(b, jnp.log(0.5))), x, t)

  def perturb(policy, keys):
    captured.append(policy)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(keys)
    return gmm.drop_components(policy, uniform, rate=0.5)

  return imitation.objective(student, teacher, perturb, **settings)


def test_objective_is_a_function_of_each_samples_own_key():
  """Half of the batch alone gives the same losses: draws hang on the sample's key, not on the batch around it."""
  teacher = lambda params, x, t, cond: -x
  objective = _objective(teacher, [], nfe=2, num_states=2, total_substeps=16, window_substeps=2)
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

  objective = imitation.objective(student, exact, lambda policy, keys: policy, nfe=2, num_states=3,
                                  total_substeps=256, window_substeps=window)
  x_0 = mean + var**0.5 * jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
  batch, keys = {"x_0": x_0, "cond": jnp.zeros(64)}, jax.random.split(jax.random.key(1), 64)
  loss = lambda p: objective(p, None, batch, keys, 2)[1]["loss"]
  bound = 1e-9 if not window else 2e-3
  assert float(jax.jit(loss)(jnp.zeros(()))) < bound
  assert float(jax.jit(loss)(jnp.full((), 0.3))) > 5 * bound
