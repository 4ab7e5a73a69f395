"""The GM policy: a Gaussian mixture over x_0 at each latent position, and the flow that it implies in closed form.

Every position evolves by itself, so the arrays here hold positions on the minor axis: mixtures are [B, C, K, P] with
P = H W, points [B, C, P]. Tiny axes (C, K) in minor place would be padded to 8 x 128 tiles on a TPU, and on a CPU
would not fill a vector register. The arithmetic itself has the batch beside the positions, [C, K, B, P], so that a tile of
few positions of many samples is one long run of numbers. Nothing outside this file looks into either layout.
"""

from typing import Any

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax.models import layers


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
    return -self._offset(x, t) / flow.broadcast_to(jnp.maximum(t, self.eps), x)

  def posterior_mean(self, x, t):
    """E[x_0 | x_src, x]; x [B, H, W, C], t [B] noise level -> [B, H, W, C]."""
    return x + self._offset(x, t)

  def _offset(self, x, t):
    # With x itself as the reference point nothing large is ever subtracted from something large.
    y = to_positions(x)
    offset = x_0_offset(centred(self, y), jnp.swapaxes(y, 0, 1), t)
    return from_positions(jnp.swapaxes(offset, 0, 1), x.shape)

  def tiles(self, x):
    """The policy and x [B, H, W, C] cut into tiles of positions that fit a CPU's cache, for a rollout's sake.

    Only positions are cut: the batch may be spread over devices.

    Returns:
      (policies, points [T, C, B, p], join): `policies` has a leading axis of tiles, too; `join` turns points back into x.
    """
    y = to_positions(x)
    # Around the prior mean the squares are those of the mixture's spread, and one set of them serves all substeps.
    prior = jnp.sum(jnp.exp(self.logweights)[:, None] * self.means, axis=2) / jnp.sum(
        jnp.exp(self.logweights), axis=1)[:, None]
    batch, channels, positions = y.shape
    size = _tile_size(batch, positions)
    cut = lambda a: jnp.moveaxis(a.reshape(*a.shape[:-1], positions // size, size), -2, 0)
    copies = lambda a: jnp.broadcast_to(a, (positions // size, *a.shape))
    c = centred(self, prior)
    policies = Centred(cut(c.delta), cut(c.half_square), cut(c.logweights), cut(c.reference), copies(c.var),
                       cut(c.x_src), copies(c.t_src), c.eps)

    def join(points):
      return from_positions(jnp.moveaxis(points, 0, 2).reshape(channels, batch, positions).swapaxes(0, 1), x.shape)

    return policies, cut(jnp.swapaxes(y, 0, 1)), join


def _tile_size(batch, positions, target=1024):
  """Positions a tile: on a CPU such that batch x tile stays in cache through all substeps; elsewhere all of them."""
  if jax.default_backend() != "cpu":
    return positions
  return max(n for n in range(1, positions + 1) if positions % n == 0 and (n == 1 or n * batch <= target))


@flax.struct.dataclass
class Centred:
  """A policy with its means given relative to a reference point, which is what keeps float32 exact enough.

  log-weights differ only by a constant, and the posterior mean moves with the reference, so the result is the same.
  """

  delta: jax.Array  # [C, K, B, P], means - reference
  half_square: jax.Array  # [K, B, P], |delta|^2 / 2
  logweights: jax.Array  # [K, B, P]
  reference: jax.Array  # [C, B, P]
  var: jax.Array  # [B]
  x_src: jax.Array  # [C, B, P]
  t_src: jax.Array  # [B]
  eps: float = flax.struct.field(pytree_node=False, default=1e-6)

  def velocity(self, x, t):
    """As GMPolicy's, of points [C, B, P]."""
    return -x_0_offset(self, x, t) / jnp.maximum(t, self.eps)[None, :, None]


def centred(policy, reference):
  """The policy around reference [B, C, P]."""
  delta = jnp.moveaxis(policy.means - reference[:, :, None], 0, 2)
  half_square = 0.5 * sum(delta[c] ** 2 for c in range(delta.shape[0]))
  first = lambda a: jnp.swapaxes(a, 0, 1)
  return Centred(delta, half_square, first(policy.logweights), first(reference), policy.var, first(policy.x_src),
                 policy.t_src, policy.eps)


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
    x: [C, B, P] points.
    t: [B] noise levels.
  Returns:
    [C, B, P].
  """
  column = lambda s: s[None, :, None]
  t = column(jnp.maximum(t, p.eps))
  t_src = column(jnp.maximum(p.t_src, p.eps))
  v = column(p.var)
  a, a_src = (1 - t) / t, (1 - t_src) / t_src
  zeta = (a - a_src) * (a + a_src)
  d = v * zeta + 1
  open_ = d > p.eps
  inv_d = 1 / jnp.maximum(d, p.eps)
  drift = jnp.where(open_, 0.0, d / p.eps - 1)
  gain = jnp.where(open_, 1 / jnp.where(open_, 1 / v + zeta, 1.0), v / p.eps)  # v / d

  from_reference = x - p.reference
  residual = zeta * from_reference + a * x - a_src * (p.x_src / t_src - a_src * x)
  # Channels are few: written out, each product is one pass over memory that vectorises. A sum over an axis does not.
  channels = range(p.delta.shape[0])
  likelihood = sum(p.delta[c] * residual[c][None] for c in channels)
  logits = p.logweights + inv_d * (likelihood - zeta * p.half_square)
  weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=0, keepdims=True)))
  mean = jnp.stack([jnp.sum(weights * p.delta[c], axis=0) for c in channels]) / jnp.sum(weights, axis=0)[None]
  return gain * residual + inv_d * mean - from_reference + drift * p.reference


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
  """The policy sharpened for sampling: w <- softmax(log w / T), v <- v T, T floored at eps."""
  temperature = max(temperature, policy.eps)
  return policy.replace(
      logweights=jax.nn.log_softmax(policy.logweights / temperature, axis=1), var=policy.var * temperature)


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
