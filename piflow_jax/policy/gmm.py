"""The GM policy: a Gaussian mixture over x_0 at each latent position, and the flow that it implies in closed form.

Every position evolves by itself, so the arrays here hold positions on the minor axis: mixtures are [B, C, K, P] with
P = H W, points [B, C, P]. Tiny axes (C, K) in minor place would be padded to 8 x 128 tiles on a TPU, and on a CPU
would not fill a vector register. Nothing outside this file looks into that layout.
"""

import functools
from typing import Any

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax.models import layers
from piflow_jax.policy import gmm_kernel

# A tile of K = 32, C = 4 then takes a third of a megabyte, which a core's own cache holds.
TILE_LANES = 448
_LEAST = 1e-30  # of a sum of weights, whose largest is 1 but for rounding


@flax.struct.dataclass
class Mixture:
  """What the network says, in u-space: per position K isotropic Gaussians over the velocity at (x_src, t_src)."""

  means: jax.Array  # [B, C, K, P]
  logweights: jax.Array  # [B, K, P], log-softmaxed over K
  logstd: jax.Array  # [B]


@flax.struct.dataclass
class GMPolicy:
  """q(x_0 | x_src) = sum_k w_k N(x_0; means_k, var) at each position, as seen from (x_src, t_src)."""

  means: jax.Array  # [B, C, K, P], x_0-space
  logweights: jax.Array  # [B, K, P]
  var: jax.Array  # [B]
  x_src: jax.Array  # [B, C, P]
  t_src: jax.Array  # [B] noise level
  eps: float = flax.struct.field(pytree_node=False, default=1e-6)  # least noise level and least posterior denominator

  def velocity(self, x, t):
    """u = (x - E[x_0 | x_src, x]) / t; x [B, H, W, C], t [B] noise level -> [B, H, W, C]."""
    y = to_positions(x)
    return from_positions(self._around(y).velocity(y, column(t)), x.shape)

  def posterior_mean(self, x, t):
    """E[x_0 | x_src, x]; x [B, H, W, C], t [B] noise level -> [B, H, W, C]."""
    y = to_positions(x)
    return x + from_positions(x_0_offset(self._around(y), y, column(t)), x.shape)

  def _around(self, x):
    # With x itself as the reference point nothing large is ever subtracted from something large.
    return centred(self.means, self.logweights, column(self.var), self.x_src, column(self.t_src), x, self.eps)

  def by_position(self, integrate, x, n, *times):
    """integrate(policy, x, n, *times, n_max=) with policy, x, n and times in this file's layout; x [B, H, W, C], others [B].

    All that integrate may know is that n and times broadcast to x, and that n_max [] is the largest of its n. On a CPU it
    is called on a few positions at a time, which stay in cache while it goes through all its substeps; on a TPU, told that
    it need not be differentiable, on a few positions of one sample.
    """
    per_position = self.means, self.logweights, self.x_src, to_positions(x)
    per_sample = [column(s) for s in (n, self.var, self.t_src, *times)]

    def run(means, logweights, x_src, x, n, var, t_src, *times, unrolled=False, **how):
      # A reference that does not move with x lets all substeps share delta and its squares. The result does not depend on
      # it, so nor does a derivative: one taken through it cancels, and near the data takes float32's digits along.
      reference = jax.lax.stop_gradient(weighted_mean(jnp.exp(logweights), means))
      policy = centred(means, logweights, var, x_src, t_src, reference, self.eps, unrolled)
      return integrate(policy, x, n, *times, **how)

    def by_xla(per_position, per_sample):
      # Of the whole batch, and found once: a tile's lanes lie on all devices.
      n_max = per_sample[0].max()
      return jax.lax.platform_dependent(
          per_position, per_sample,
          cpu=functools.partial(map_tiles, functools.partial(run, unrolled=True, n_max=n_max)),
          default=lambda per_position, per_sample: run(*per_position, *per_sample, n_max=n_max))

    y = (on_tpu(run, by_xla) if gmm_kernel.suits(x) else by_xla)(per_position, per_sample)
    return from_positions(y, x.shape)


def on_tpu(run, by_xla):
  """The kernel; where a derivative is taken, XLA's loop, which remembers what that needs."""
  rollout = jax.custom_vjp(functools.partial(gmm_kernel.integrate, functools.partial(run, differentiable=False)))
  rollout.defvjp(functools.partial(jax.vjp, by_xla), lambda vjp, g: vjp(g))
  return rollout


def map_tiles(f, per_position, per_sample, *, lanes=TILE_LANES):
  """f of arrays [B, ..., P] and [B, 1, 1], called on one tile of positions at a time; -> [B, C, P].

  A tile is [1, ..., L], its lanes L being p positions of all B samples: the batch may be split over devices and is
  not cut.
  """
  b, n = per_position[0].shape[0], per_position[0].shape[-1]
  p = min(max(lanes // b, 1), n)
  p -= p % 2 == 0  # rows an odd multiple of B apart do not all fall into the same few sets of the cache
  tiles = -(-n // p)

  def cut(a):
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, tiles * p - n)])
    a = jnp.moveaxis(a.reshape(*a.shape[:-1], tiles, p), (-2, 0), (0, -2))  # [tiles, ..., B, p]
    return a.reshape(tiles, 1, *a.shape[1:-2], b * p)

  per_lane = [jnp.broadcast_to(s, (b, 1, p)).reshape(1, 1, b * p) for s in per_sample]
  y = jax.lax.map(lambda tile: f(*tile, *per_lane), [cut(a) for a in per_position])
  y = jnp.moveaxis(y.reshape(tiles, -1, b, p), (2, 1), (0, 1))
  return y.reshape(b, -1, tiles * p)[..., :n]


@flax.struct.dataclass
class Centred:
  """A policy with its means given relative to a reference point, which is what keeps float32 exact enough.

  log-weights differ only by a constant, and the posterior mean moves with the reference, so the result is the same.
  What belongs to a sample broadcasts against its points: [B, 1, 1], or [1, 1, P] where positions are of many samples.
  """

  delta: jax.Array  # [B, C, K, P], means - reference
  half_square: jax.Array  # [B, K, P], |delta|^2 / 2
  logweights: jax.Array  # [B, K, P]
  reference: jax.Array  # [B, C, P]
  var: jax.Array  # [B, 1, 1]
  x_src: jax.Array  # [B, C, P]
  t_src: jax.Array  # [B, 1, 1]
  eps: float = flax.struct.field(pytree_node=False, default=1e-6)
  unrolled: bool = flax.struct.field(pytree_node=False, default=False)  # sums over components written out

  def velocity(self, x, t):
    """As the policy's, in this layout; x [B, C, P], t [B, 1, 1]."""
    return -x_0_offset(self, x, t) / jnp.maximum(t, self.eps)


def centred(means, logweights, var, x_src, t_src, reference, eps, unrolled=False):
  """The mixture around reference [B, C, P]."""
  delta = means - reference[:, :, None]
  half_square = 0.5 * sum(delta[:, c] ** 2 for c in range(delta.shape[1]))
  return Centred(delta, half_square, logweights, reference, var, x_src, t_src, eps, unrolled)


def x_0_offset(p: Centred, x, t):
  """E[x_0 | x_src, x] - x, the posterior of GMFlow (arXiv 2504.05304; spec section 2.1) in a form fit for float32.

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
  v = jnp.maximum(p.var, 1e-18)  # sharper is no different, and the derivative of 1 / v would leave float32
  a, a_src = (1 - t) / t, (1 - t_src) / t_src
  zeta = (a - a_src) * (a + a_src)
  d = v * zeta + 1
  open_ = d > p.eps
  floored = jnp.maximum(d, p.eps)
  drift = jnp.where(open_, 0.0, d / p.eps - 1)
  gain = jnp.where(open_, 1 / jnp.where(open_, 1 / v + zeta, 1.0), v / p.eps)  # v / d

  from_reference = x - p.reference
  residual = zeta * from_reference + a * x - a_src * (p.x_src / t_src - a_src * x)
  mean = (mean_delta_unrolled if p.unrolled else mean_delta)(
      p.delta, p.half_square, p.logweights, residual, zeta, floored)
  return gain * residual + mean / floored - from_reference + drift * p.reference


def mean_delta(delta, half_square, logweights, residual, zeta, d):
  """sum_k w_k delta_k, the weights having moved by (delta_k . residual - zeta half_square_k) / d; [B, C, P]."""
  pull = residual / d
  logits = logweights - (zeta / d) * half_square
  for c in range(delta.shape[1]):
    logits += delta[:, c] * pull[:, c, None]
  return weighted_mean(exp_below(logits - jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))), delta)


def exp_below(x):
  """exp(x) of logits less their maximum, [B, K, P].

  Near t = 0 logits of a sharp mixture reach 1e9, where a rounding is 64. Where a compiler finds the maximum in another way than
  the logits, x is above 0, or all of it far below: `_LEAST` is for that.
  """
  return jnp.exp(jnp.where(x > 0, 0.0, x))


def weighted_mean(weights, x):
  """Weights [B, K, P] of x [B, C, K, P] -> [B, C, P]; channels are few, written out each is a pass that vectorises."""
  sums = [jnp.sum(weights * x[:, c], axis=1) for c in range(x.shape[1])]
  return jnp.stack(sums, axis=1) / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), _LEAST)


@jax.custom_vjp
def mean_delta_unrolled(delta, half_square, logweights, residual, zeta, d):
  """`mean_delta` of a tile as XLA's CPU backend does it fast: loops over positions alone, which it vectorises."""
  weights, total = _unrolled_weights(delta, half_square, logweights, residual, zeta, d)
  return _unrolled(lambda k: weights[:, k:k + 1] * delta[:, :, k], delta) / total


def _unrolled(row, delta, add=jnp.add):
  return functools.reduce(add, [row(k) for k in range(delta.shape[2])])


def _unrolled_weights(delta, half_square, logweights, residual, zeta, d):
  # That backend computes again, for each reader, whatever it broadcasts, unless a division comes last. Hence one in
  # each thing that the components share; where there is nothing to divide by it is d's sign, 1, so that nothing is
  # rounded.
  logits = logweights - half_square * (zeta / d)
  for c in range(delta.shape[1]):
    logits += delta[:, c] * (residual[:, c:c + 1] / d)
  weights = exp_below(logits - _unrolled(lambda k: logits[:, k:k + 1], delta, jnp.maximum) / jnp.sign(d))
  return weights, jnp.maximum(_unrolled(lambda k: weights[:, k:k + 1], delta), _LEAST)


def _unrolled_backward(args, g):
  # By hand: the derivative of each component's slice would be a sum over all of the mixture.
  delta, half_square, _, residual, zeta, d = args
  weights, total = _unrolled_weights(*args)
  mean = _unrolled(lambda k: weights[:, k:k + 1] * delta[:, :, k], delta) / total
  g = g / total
  centre = sum(g[:, c:c + 1] * mean[:, c:c + 1] for c in range(delta.shape[1])) / jnp.sign(d)
  pull, pull_zeta = residual / d, zeta / d
  d_logits = weights * (sum(g[:, c:c + 1] * delta[:, c] for c in range(delta.shape[1])) - centre)
  d_delta = weights[:, None] * g[:, :, None] + d_logits[:, None] * pull[:, :, None]
  d_pull = _unrolled(lambda k: d_logits[:, k:k + 1] * delta[:, :, k], delta) / d
  d_zeta = -_unrolled(lambda k: d_logits[:, k:k + 1] * half_square[:, k:k + 1], delta) / d
  d_d = -jnp.sum(d_pull * pull, axis=1, keepdims=True) - d_zeta * pull_zeta
  return d_delta, -pull_zeta * d_logits, d_logits, d_pull, d_zeta, d_d


mean_delta_unrolled.defvjp(lambda *args: (mean_delta_unrolled(*args), args), _unrolled_backward)


def column(s):
  """[B] -> [B, 1, 1]."""
  return s[:, None, None]


def to_positions(x):
  """[B, H, W, C] -> [B, C, H W]."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 1, 2)


def from_positions(x, shape):
  """[B, C, H W] -> [B, H, W, C]."""
  return jnp.moveaxis(x, 1, 2).reshape(shape)


def to_policy(mixture, x_src, t_src, *, eps=1e-6):
  """The network's mixture over velocities as a belief about x_0: mu_k = x_src - t_src means_k, v = t_src^2 std^2.

  Args:
    mixture: Mixture of the head.
    x_src: [B, H, W, C] where the network was called.
    t_src: [B] its noise level.
    eps: 1e-6 in training, 1e-4 in sampling (pi-Flow's release).
  """
  x_src = to_positions(x_src)
  means = x_src[:, :, None] - t_src[:, None, None, None] * mixture.means
  var = (t_src * jnp.exp(mixture.logstd)) ** 2
  return GMPolicy(means, mixture.logweights, var, x_src, t_src, eps)


def with_temperature(policy, temperature):
  """The policy sharpened for sampling: w <- softmax(log w / T), v <- v T, T (a number or [B]) floored at eps."""
  temperature = jnp.broadcast_to(jnp.maximum(temperature, policy.eps), policy.var.shape)
  return policy.replace(
      logweights=jax.nn.log_softmax(policy.logweights / column(temperature), axis=1), var=policy.var * temperature)


def drop_components(policy, uniform, *, rate):
  """Each sample loses component k at all positions where uniform [B, K] < rate; a sample that would lose all, none."""
  dropped = uniform < rate
  dropped &= ~jnp.all(dropped, axis=1, keepdims=True)
  return policy.replace(logweights=jnp.where(dropped[:, :, None], -jnp.inf, policy.logweights))


class GMHead(nn.Module):
  """Tokens [B, N, D] and conditioning embedding [B, D] -> Mixture (GMFlow's GM-DiT V2).

  Attributes:
    components: K.
    channels, patch: of the latent and its tokens.
    logstd_width: hidden width of the layers that say how sure the policy is.
    dropout: of `perturb`.
  """

  components: int
  channels: int
  patch: int
  logstd_width: int = 1024
  dropout: float = 0.0
  dtype: Any = jnp.float32

  def to_policy(self, out, x_src, t_src, *, eps):
    """See the function `to_policy`."""
    return to_policy(out, x_src, t_src, eps=eps)

  def perturb(self, policy, keys):
    """The behaviour policy: components dropped, each sample by its own key [B]."""
    if not self.dropout:
      return policy
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (self.components,)))(keys)
    return drop_components(policy, uniform, rate=self.dropout)

  def sharpen(self, policy, temperature):
    """See `with_temperature`."""
    return with_temperature(policy, temperature)

  def from_teacher(self, teacher_head, fresh, key):
    """Parameters that start where the teacher is; see `head_from_teacher`."""
    noise = jax.random.normal(key, (self.components, self.channels))
    return head_from_teacher(teacher_head["out"], fresh, noise)

  @nn.compact
  def __call__(self, tokens, embedding, grid):
    zeros = nn.initializers.zeros_init()
    project = lambda name, *features: unpatchify_last(
        layers.Projection((self.patch**2, *features), self.dtype, name=name, kernel_init=zeros,
                          bias_init=scatter_bias if name == "means" else zeros)(tokens), grid, self.patch)
    means = jnp.swapaxes(project("means", self.components, self.channels), 1, 2)
    logweights = jax.nn.log_softmax(project("logweights", self.components), axis=1)
    # Detached: how sure the policy is must not steer what the trunk attends to.
    hidden = nn.silu(jax.lax.stop_gradient(embedding))
    hidden = nn.silu(layers.Projection((self.logstd_width,), self.dtype, name="logstd_in")(hidden))
    logstd = layers.Projection((1,), self.dtype, kernel_init=zeros, name="logstd_out")(hidden)[:, 0]
    return Mixture(means, logweights, logstd)


def unpatchify_last(y, grid, patch):
  """[B, N, p p, ...] -> [B, ..., H W]."""
  return jnp.moveaxis(layers.unpatchify(y, grid, patch), 1, -1)


def scatter_bias(key, shape, dtype=jnp.float32):
  """Without a teacher the components start N(0, 0.1) apart, alike at each patch position; shape (p p, K, C)."""
  return jnp.broadcast_to(0.1 * jax.random.normal(key, shape[1:], dtype), shape)


def head_from_teacher(teacher_out, head, noise, *, scatter=0.05, std=0.05):
  """The head that starts where the teacher is: K copies of its output layer, a little apart.

  Args:
    teacher_out: the teacher's output layer {kernel [D, p p, C], bias [p p, C]}.
    head: freshly initialised parameters of GMHead; gives the shapes, and the first layer of logstd.
    noise: [K, C] standard normal, which sets the components apart; the same at each patch position.
    scatter, std: its scale, and the standard deviation that the policy starts with.
  Returns:
    Parameters for GMHead.
  """
  kernel, bias = teacher_out["kernel"], teacher_out["bias"]
  shape = head["means"]["kernel"].shape
  return {
      "means": {
          "kernel": jnp.broadcast_to(kernel[:, :, None], shape),
          "bias": bias[:, None] + scatter * noise[None],
      },
      "logweights": jax.tree.map(jnp.zeros_like, head["logweights"]),
      "logstd_in": head["logstd_in"],
      "logstd_out": {
          "kernel": jnp.zeros_like(head["logstd_out"]["kernel"]),
          "bias": jnp.full_like(head["logstd_out"]["bias"], jnp.log(std)),
      },
  }
