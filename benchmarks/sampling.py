"""What the policy costs beside its network: one sampling call of DiT-B/2 and DiT-XL/2 at 32x32x4, K = 32, 128 substeps.

  python -m benchmarks.sampling [--batch=4]
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks import rollout as rollout_bench
from configs import imagenet_dit
from piflow_jax import config


def main():
  """Prints a line for each size."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=4)
  batch = parser.parse_args().batch
  for size in ("B", "XL"):
    c = imagenet_dit.get_config(f"{size},repa-1nfe")
    c.network.update(remat="none", dtype="float32")
    spec = c.data.make(**config.fields_of(c.data)).spec
    net = c.network.make(spec, **config.fields_of(c.network))
    module = net.module(c.policy.make(net.dtype, **config.fields_of(c.policy)))
    x, t, cond = jnp.ones((batch, *spec.x_0)), jnp.ones(batch), {"label": jnp.zeros(batch, jnp.int32)}
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, cond)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)  # values do not change the time
    network = jax.jit(functools.partial(module.apply, x=x, t=t, cond=cond))
    mixture = network(params)
    policy = jax.jit(functools.partial(rollout_bench.fast_rollout, x_src=x, t_src=t))
    took = rollout_bench.alternate(
        {"network": functools.partial(network, params), "policy": functools.partial(policy, mixture)}, repeats=3)
    whole = took["network"] + took["policy"]
    print(f"DiT-{size}/2, batch {batch}, float32, {jax.device_count()} device(s): network {took['network']:.2f} s, "
          f"policy {took['policy']:.3f} s: {100 * took['policy'] / whole:.1f}% of a call", flush=True)


if __name__ == "__main__":
  main()
