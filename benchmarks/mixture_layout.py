"""What the mixture's layout is worth on a TPU, by its compiler: memory and cycles of a rollout and its gradient.

  PYTHONPATH=.libtpu python -m benchmarks.mixture_layout

From a DiT-XL's tokens: the output layers of a GM head and a rollout, of 128 substeps forward (a sampler's, a
trajectory's) and of 10 with the gradient for layers and tokens (an averaging window's). Once in this project's layout
([B, C, K, P], P the positions), once as the formula is published ([B, H, W, K, C]), both by XLA's loop; and by the
kernel, which is what a TPU runs and whose own cycles the compiler does not state (`benchmarks/rollout_kernel.py` counts
them). Nothing runs: the figures are those of the compiled program for one chip.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rollout
from piflow_jax import sharding
from piflow_jax.models import layers
from piflow_jax.plan import compiled
from piflow_jax.plan import hlo
from piflow_jax.policy import gmm

BATCH, SIDE, PATCH, WIDTH, COMPONENTS, CHANNELS = 256, 32, 2, 1152, 32, 4
LAYOUT = layers.patches((SIDE, SIDE, CHANNELS), PATCH)


def ours(params, tokens, x, substeps):
  """The package's head and rollout."""
  head = gmm.GMHead(COMPONENTS, dtype=jnp.bfloat16)
  mixture = head.apply({"params": params}, tokens, tokens[:, 0], LAYOUT)
  return rollout.fast_rollout(mixture, x, jnp.ones(BATCH), substeps=substeps)


def published(params, tokens, x, substeps):
  """Head and rollout with mixtures [B, H, W, K, C]."""
  def project(name, *features):
    projection = layers.Projection((LAYOUT.cells, *features), jnp.bfloat16)
    y = LAYOUT.place(projection.apply({"params": params[name]}, tokens))
    return y.reshape(BATCH, SIDE, SIDE, *features)

  logweights = jax.nn.log_softmax(project("logweights", COMPONENTS))
  mixture = rollout.Published(project("means", COMPONENTS, CHANNELS), logweights, jnp.full(BATCH, -3.0))
  return rollout.plain_rollout(mixture, x, jnp.ones(BATCH), substeps=substeps)


def report(name, f, substeps, gradient, chip, device):
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
  head = gmm.GMHead(COMPONENTS)
  tokens, x = (BATCH, (SIDE // PATCH)**2, WIDTH), (BATCH, *LAYOUT.shape)
  params = jax.eval_shape(
      lambda: head.init(jax.random.key(0), jnp.zeros((1, *tokens[1:])), jnp.zeros((1, WIDTH)), LAYOUT))["params"]
  params = jax.tree.map(lambda s: shape(s.shape, s.dtype), params)
  arguments = params, shape(tokens, jnp.bfloat16), shape(x, jnp.float32)

  def loss(*arguments):
    return jnp.sum(jnp.square(f(*arguments, substeps)))

  program = jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else loss).lower(*arguments).compile()
  runs = hlo.runs(program.as_text())
  wasted = hlo.padded(runs)
  what = f"{substeps} substeps{' and gradient' if gradient else ''}, {name}"
  print(f"{what:<36} temporaries {program.memory_analysis().temp_size_in_bytes / 2**30:6.2f} GiB, "
        f"{hlo.cycles(runs) / chip.clock:6.3f} s by the compiler's cycles, {len(wasted)} arrays padded over twofold, "
        f"to {max((b.padded for b in wasted), default=0) / 2**20:.0f} MiB")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  chip, devices, where = compiled.devices_of("v5e-1", 1)
  mixture = BATCH * SIDE**2 * COMPONENTS * CHANNELS * 4
  print(f"{where}, {BATCH} samples; the means in float32 are {mixture / 2**20:.0f} MiB")
  by_kernel = sharding.under(sharding.make_mesh(devices=devices), ours)
  for substeps, gradient in ((128, False), (10, True)):
    for name, f in (("published", published), ("ours", ours), ("ours, kernel", by_kernel))[:2 if gradient else 3]:
      report(name, f, substeps, gradient, chip, np.ravel(devices)[0])
