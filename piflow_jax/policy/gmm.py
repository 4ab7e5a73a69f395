"""The GM policy: a Gaussian mixture over x_0 at each latent position, and the flow that it implies (method.md, 3).

Every position evolves by itself, so the arrays here hold positions on the minor axis: mixtures are [B, C, K, P], points
[B, C, P], P being the product of all axes of x between batch and channels. A TPU would pad small minor axes (C, K) to
8 x 128 tiles; on a CPU they would not fill a vector register. Only the files gmm*.py know that layout.
"""

from typing import Any

import chex
import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax.models import layers
from piflow_jax.policy import gmm_posterior
from piflow_jax.policy import gmm_tiles


@flax.struct.dataclass
class Mixture:
  """A head's output, in u-space: per position K isotropic Gaussians over the velocity at (x_src, t_src)."""

  means: jax.Array  # [B, C, K, P]
  logweights: jax.Array  # [B, K, P], log-softmaxed over K
  logstd: jax.Array  # [B]


@flax.struct.dataclass
class GMPolicy:
  """q(x_0 | x_src) = sum_k w_k N(x_0; means_k, var) at each position, as seen from (x_src, t_src) (method.md, 3)."""

  means: jax.Array  # [B, C, K, P], x_0-space
  logweights: jax.Array  # [B, K, P]
  var: jax.Array  # [B]
  x_src: jax.Array  # [B, C, P]
  t_src: jax.Array  # [B] noise level
  eps: float = flax.struct.field(pytree_node=False, default=1e-6)  # least noise level and least posterior denominator

  def velocity(self, x, t):
    """u = (x - E[x_0 | x_src, x]) / t (method.md, 3.1); x [B, ..., C], t [B] noise level -> [B, ..., C]."""
    y = to_positions(x)
    return from_positions(self._around(y).velocity(y, column(t)), x.shape)

  def posterior_mean(self, x, t):
    """E[x_0 | x_src, x] (method.md, 3.1); x [B, ..., C], t [B] noise level -> [B, ..., C]."""
    y = to_positions(x)
    return x + from_positions(gmm_posterior.x_0_offset(self._around(y), y, column(t)), x.shape)

  def _around(self, x):
    # With x itself as the reference, no two large numbers are ever subtracted.
    return gmm_posterior.centred(
        self.means, self.logweights, column(self.var), self.x_src, column(self.t_src), x, self.eps)

  def by_position(self, integrate, x, n, *times):
    """Of `policy.ByPosition`: a CPU calls integrate on a few positions at a time, a TPU on a few of one sample."""
    per_position = self.means, self.logweights, self.x_src, to_positions(x)
    per_sample = [column(s) for s in (n, self.var, self.t_src, *times)]

    def run(means, logweights, x_src, x, n, var, t_src, *times, mean_delta=gmm_posterior.mean_delta, **how):
      # A reference that does not move with x lets all substeps share delta and its squares. The result does not depend
      # on the reference, so a derivative through it is zero in sum; its terms cancel, and near the data they would take
      # float32's digits along. Hence the stop_gradient.
      reference = jax.lax.stop_gradient(gmm_posterior.weighted_mean(jnp.exp(logweights), means))
      policy = gmm_posterior.centred(means, logweights, var, x_src, t_src, reference, self.eps, mean_delta)
      return integrate(policy, x, n, *times, **how)

    return from_positions(gmm_tiles.by_position(run, per_position, per_sample), x.shape)


def column(s):
  """[B] -> [B, 1, 1]."""
  return s[:, None, None]


def to_positions(x):
  """[B, ..., C] -> [B, C, P], of any rank from 2 on."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 1, 2)


def from_positions(x, shape):
  """[B, C, P] -> [B, ..., C], of the shape that is given."""
  return jnp.moveaxis(x, 1, 2).reshape(shape)


def to_policy(mixture, x_src, t_src, *, eps=1e-6):
  """The network's mixture over velocities as a belief about x_0: mu_k = x_src - t_src means_k, v = t_src^2 std^2.

  Args:
    mixture: Mixture of the head, P being the positions of x_src.
    x_src: [B, ..., C] where the network was called.
    t_src: [B] its noise level.
    eps: 1e-6 in training, 1e-4 in sampling (pi-Flow's release).
  Returns:
    GMPolicy (method.md, 3).
  """
  x_src = to_positions(x_src)
  chex.assert_equal_shape([mixture.means[:, :, 0], x_src])
  means = x_src[:, :, None] - t_src[:, None, None, None] * mixture.means
  var = (t_src * jnp.exp(mixture.logstd)) ** 2
  return GMPolicy(means, mixture.logweights, var, x_src, t_src, eps)


def with_temperature(policy, temperature):
  """The policy sharpened for sampling: w <- softmax(log w / T), v <- v T, T >= eps a number or [B] (method.md, 3.3)."""
  temperature = jnp.broadcast_to(jnp.maximum(temperature, policy.eps), policy.var.shape)
  return policy.replace(
      logweights=jax.nn.log_softmax(policy.logweights / column(temperature), axis=1), var=policy.var * temperature)


def drop_components(policy, uniform, *, rate):
  """A sample loses component k everywhere where uniform [B, K] < rate, unless it would lose all (method.md, 3.4)."""
  dropped = uniform < rate
  dropped &= ~jnp.all(dropped, axis=1, keepdims=True)
  return policy.replace(logweights=jnp.where(dropped[:, :, None], -jnp.inf, policy.logweights))


class GMHead(nn.Module):
  """Tokens [B, N, D] and conditioning embedding [B, D] -> Mixture (GMFlow's GM-DiT V2).

  Attributes:
    components: K.
    logstd_width: hidden width of the two layers that predict the standard deviation.
    dropout: chance that `perturb` drops a component.
    temperature: of `sharpen`.
  """

  components: int
  logstd_width: int = 1024
  dropout: float = 0.0
  temperature: float = 1.0
  dtype: Any = jnp.float32

  def to_policy(self, out, x_src, t_src, clock, *, eps):
    """GMPolicy of the Mixture out; the mixture lives in noise levels, so the clock does not enter."""
    del clock
    return to_policy(out, x_src, t_src, eps=eps)

  def perturb(self, policy, keys):
    """The behaviour policy: components dropped, each sample by its own key [B] (method.md, 3.4)."""
    if not self.dropout:
      return policy
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (self.components,)))(keys)
    return drop_components(policy, uniform, rate=self.dropout)

  def sharpen(self, policy, last):
    """The policy at the head's temperature, except where last [B] says that this is the sampler's last call.

    Sharpening the last call would cost detail; the calls before it only choose what the image is of.
    """
    if self.temperature == 1:
      return policy
    return with_temperature(policy, jnp.where(last, 1.0, self.temperature))

  def from_teacher(self, teacher_head, fresh, key):
    """Parameters that start as the teacher; see `head_from_teacher`."""
    noise = jax.random.normal(key, (self.components, teacher_head["out"]["bias"].shape[-1]))
    return head_from_teacher(teacher_head["out"], fresh, noise)

  def export_config(self, clock):
    """The policy as pi-Flow's release names it."""
    del clock
    return dict(type="GMFlow")

  @nn.compact
  def __call__(self, tokens, embedding, layout):
    zeros = nn.initializers.zeros_init()

    def project(name, *features, bias_init=zeros):
      projection = layers.Projection((layout.cells, *features), self.dtype, zeros, bias_init, name=name)
      return jnp.moveaxis(layout.place(projection(tokens)), 1, -1)  # [B, ..., P]

    means = jnp.swapaxes(project("means", self.components, layout.shape[-1], bias_init=scatter_bias), 1, 2)
    logweights = jax.nn.log_softmax(project("logweights", self.components), axis=1)
    # Detached: the loss must not turn the trunk's attention towards how sure the policy is.
    hidden = nn.silu(jax.lax.stop_gradient(embedding))
    hidden = nn.silu(layers.Projection((self.logstd_width,), self.dtype, name="logstd_in")(hidden))
    logstd = layers.Projection((1,), self.dtype, kernel_init=zeros, name="logstd_out")(hidden)[:, 0]
    return Mixture(means, logweights, logstd)


def scatter_bias(key, shape, dtype=jnp.float32):
  """Without a teacher the components start N(0, 0.1) apart, alike at each of a token's cells; shape (cells, K, C)."""
  return jnp.broadcast_to(0.1 * jax.random.normal(key, shape[1:], dtype), shape)


def head_from_teacher(teacher_out, head, noise, *, scatter=0.05, std=0.05):
  """A head that starts as the teacher: K copies of its output layer, a little apart.

  Args:
    teacher_out: the teacher's output layer {kernel [D, cells, C], bias [cells, C]}.
    head: freshly initialised parameters of GMHead; gives the shapes, and the first layer of logstd.
    noise: [K, C] standard normal, which sets the components apart; the same at each of a token's cells.
    scatter, std: scale of the noise, and the standard deviation that the policy starts with.
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


FREE = ("temperature",)


def config(**fields):
  """A student that returns GM policies."""
  return config_lib.noun(make, dict(
      components=32,  # K
      logstd_width=1024,  # hidden units of the layers that predict the standard deviation
      dropout=0.05,  # chance that a component is missing from the policy that makes the trajectory
      temperature=1.0,  # sharpens the policies of all sampling calls but the last; 1 leaves them as they are
  ), fields)


def make(dtype, *, components, logstd_width, dropout, temperature):
  """GMHead that computes in dtype. Raises ValueError: a field out of bounds."""
  config_lib.whole("components", components)
  config_lib.whole("logstd_width", logstd_width)
  config_lib.number("dropout", dropout, least=0, below=1)
  config_lib.number("temperature", temperature, above=0, most=1000)
  return GMHead(components, logstd_width, dropout, temperature, dtype)
