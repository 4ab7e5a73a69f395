"""The GM policy's posterior mean in closed form, fit for float32 (method.md, 3.1 and 3.2).

Positions lie on the minor axis: mixtures are [B, C, K, P], points [B, C, P], and numbers of a sample [B, 1, 1] (or
[1, 1, P] where positions of many samples share an axis).
"""

from typing import Callable

import flax
import jax
import jax.numpy as jnp

LEAST = 1e-30  # sum of a position's weights; the largest weight is 1 but for rounding


def mean_delta(delta, half_square, logweights, residual, zeta, d):
  """sum_k w_k delta_k, w = softmax(log w + (delta . residual - zeta half_square) / d) (method.md, 3.2); [B, C, P]."""
  pull = residual / d
  logits = logweights - (zeta / d) * half_square
  for c in range(delta.shape[1]):
    logits += delta[:, c] * pull[:, c, None]
  return weighted_mean(exp_below(logits - jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))), delta)


@flax.struct.dataclass
class Centred:
  """A mixture whose means are relative to a reference point, which keeps float32 exact enough (method.md, 3.2).

  A reference changes the log-weights by a constant, and the posterior mean moves with it: the result stays the same.
  """

  delta: jax.Array  # [B, C, K, P], means - reference
  half_square: jax.Array  # [B, K, P], |delta|^2 / 2
  logweights: jax.Array  # [B, K, P]
  reference: jax.Array  # [B, C, P]
  var: jax.Array  # [B, 1, 1]
  x_src: jax.Array  # [B, C, P]
  t_src: jax.Array  # [B, 1, 1]
  eps: float = flax.struct.field(pytree_node=False)
  mean_delta: Callable = flax.struct.field(pytree_node=False, default=mean_delta)  # or another way to compute the same

  def velocity(self, x, t):
    """u = (x - E[x_0 | x_src, x]) / t (method.md, 3.1); x [B, C, P], t [B, 1, 1]."""
    return -x_0_offset(self, x, t) / jnp.maximum(t, self.eps)


def centred(means, logweights, var, x_src, t_src, reference, eps, mean_delta=mean_delta):
  """The mixture around reference [B, C, P]."""
  delta = means - reference[:, :, None]
  half_square = 0.5 * sum(delta[:, c] ** 2 for c in range(delta.shape[1]))
  return Centred(delta, half_square, logweights, reference, var, x_src, t_src, eps, mean_delta)


def x_0_offset(p: Centred, x, t):
  """E[x_0 | x_src, x] - x, GMFlow's posterior (arXiv 2504.05304) in a form fit for float32 (method.md, 3.1 and 3.2).

  Published form, a = (1 - t) / t:   zeta = a^2 - a_src^2,  nu = a x / t - a_src x_src / t_src,  d = v zeta + 1,
    logit_k = logw_k + (mu_k . nu - zeta |mu_k|^2 / 2) / d,   x0_hat = (v nu + sum_k w_k mu_k) / d.
  At small t both nu and zeta grow as 1 / t^2 and cancel. Around a reference c, with delta_k = mu_k - c,
    r = nu - zeta c = zeta (x - c) + a x - a_src (x_src / t_src - a_src x)          (as 1 / t - a = 1)
    logit_k = logw_k + (delta_k . r - zeta |delta_k|^2 / 2) / d,   x0_hat = c + r v / d + sum_k w_k delta_k / d
  where v / d = 1 / (1 / v + zeta) has a derivative that does not cancel either. (Where d is at its floor eps, which
  only times above t_src can reach, the mixture no longer moves with c: hence `drift`.)

  Args:
    p: the centred policy.
    x: [B, C, P] points.
    t: [B, 1, 1] noise levels.
  Returns:
    [B, C, P].
  """
  t, t_src = jnp.maximum(t, p.eps), jnp.maximum(p.t_src, p.eps)
  v = jnp.maximum(p.var, 1e-18)  # a sharper mixture is no different, and 1 / v's derivative would leave float32
  a, a_src = (1 - t) / t, (1 - t_src) / t_src
  zeta = (a - a_src) * (a + a_src)
  d = v * zeta + 1
  open_ = d > p.eps
  floored = jnp.maximum(d, p.eps)
  drift = jnp.where(open_, 0.0, d / p.eps - 1)
  gain = jnp.where(open_, 1 / jnp.where(open_, 1 / v + zeta, 1.0), v / p.eps)  # v / d

  from_reference = x - p.reference
  residual = zeta * from_reference + a * x - a_src * (p.x_src / t_src - a_src * x)
  mean = p.mean_delta(p.delta, p.half_square, p.logweights, residual, zeta, floored)
  return gain * residual + mean / floored - from_reference + drift * p.reference


def exp_below(x):
  """exp(x) of logits less their maximum, [B, K, P].

  Near t = 0 a sharp mixture's logits reach 1e9, where float32 rounds to 64. If a compiler computes the maximum and the
  logits in two ways, x can be above 0, or far below 0 for every component: hence LEAST under the sum of the weights.
  """
  return jnp.exp(jnp.where(x > 0, 0.0, x))


def weighted_mean(weights, x):
  """Weights [B, K, P] and x [B, C, K, P] -> [B, C, P]. C is small: a sum written out for each channel vectorises."""
  sums = [jnp.sum(weights * x[:, c], axis=1) for c in range(x.shape[1])]
  return jnp.stack(sums, axis=1) / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), LEAST)
