"""A network that no file of the package knows: a layer a position, no patches, no heads, any rank of x_0."""

from flax import linen as nn
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax.models import layers
from piflow_jax.models import network

FREE = ("loud",)


class Net(nn.Module):
  """x [B, ..., C], t [B], cond {} -> what head makes."""

  head: nn.Module
  width: int
  time_scale: float

  @nn.compact
  def __call__(self, x, t, cond):
    del cond
    embedding = nn.Dense(self.width, name="time")(layers.time_features(self.time_scale * t))
    tokens = nn.Dense(self.width, name="in")(x.reshape(len(x), -1, x.shape[-1]))
    return self.head(jnp.tanh(tokens + embedding[:, None]), embedding, layers.positions(x.shape[1:]))


def config(**fields):
  """The network's fields."""
  return config_lib.noun(make, dict(
      width=8,  # of a token
      time_scale=1.0,  # of the embedded noise level
      loud=False,  # how, not what
  ), fields)


def make(spec, *, width, time_scale, loud):
  """The Network of any data without a condition."""
  del spec, loud

  def module(head):
    return Net(head, width, time_scale)

  return network.Network(module, None, (), "float32")
