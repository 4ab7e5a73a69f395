"""Counted FLOPs against those of a formula written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import flow
from piflow_jax.data import synthetic
from piflow_jax.distill import flow_matching
from piflow_jax.models import dit
from piflow_jax.models import joint
from piflow_jax.plan import flops


def test_products_loops_and_branches():
  assert flops.count(jnp.matmul, jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))) == 2 * 3 * 5 * 7 * 11
  square = jnp.ones((4, 4))

  def loop(x):
    return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, x), None), x, None, length=6)[0]

  def branches(p, x):
    return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x, x)

  def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  assert flops.count(loop, square) == 6 * 128
  assert flops.count(branches, True, square) == 2 * 128
  image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
  assert flops.count(conv, image, kernel) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


def test_a_product_that_only_moves_numbers_is_no_work():
  x = jnp.ones((2, 3, 4, 8))
  turns = joint.rotary(np.zeros((3, 1)), (8,))
  assert flops.count(lambda x: joint.rotate(x, turns), x) == 0
  assert flops.count(jax.grad(lambda x: joint.rotate(x, turns).sum()), x) == 0


def test_a_loop_of_unknown_length_is_not_taken_for_one_turn():
  def until(f, x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 10, f, x)

  square = jnp.ones((4, 4))
  # A loop without products may run as long as it likes.
  assert flops.count(lambda x: until(lambda x: x + 1, x) @ x, square) == 128
  with pytest.raises(errors.UserError, match="ends by a condition"):
    flops.count(lambda x: until(lambda x: x @ x, x), square)


@pytest.mark.parametrize("remat, passes", [("none", 3), ("full", 4)])
def test_a_dit_by_hand(remat, passes):
  """Forward: 2 N (12 D^2) + 4 N^2 D a block for its tokens, 12 D^2 for its modulation; backward twice that."""
  c = config_lib.base()
  c.data, c.flow, c.method = synthetic.config(shape=(16, 16, 4)), flow.config(), flow_matching.config()
  c.network = dit.config(depth=5, width=128, heads=4, remat=remat, attention="xla")
  run = build.run(c)
  d, n = 128, 64
  params = jax.eval_shape(run.method.init, jax.random.key(0), None)
  batch = {"x_0": jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.float32),
           "cond": {"label": jax.ShapeDtypeStruct((2,), jnp.int32)}}
  keys = jax.random.split(jax.random.key(0), 2)
  got = flops.count(run.method.objective, params, None, batch, keys, jax.ShapeDtypeStruct((), jnp.int32))
  blocks = 2 * 5 * (2 * n * 12 * d**2 + 4 * n**2 * d + 2 * 6 * d**2)
  # Embeddings, the last modulation, the output layer.
  ends = 2 * (2 * n * 16 * d + 2 * 256 * d + 2 * d**2 + 2 * 2 * d**2 + 2 * n * d * 16)
  # The first layers have nothing before them to hand a gradient to.
  first = 2 * (2 * n * 16 * d + 2 * 256 * d)
  assert got == passes * blocks + 3 * ends - first
