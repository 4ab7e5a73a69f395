"""What the policy costs beside its network: one sampling call of DiT-B/2 and DiT-XL/2 at 32x32x4, K = 32, 128 substeps.

  python -m benchmarks.sampling [--batch=4]
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks import rollout as rollout_bench
from configs import imagenet_dit
from piflow_jax.models import dit
from piflow_jax.policy import gmm


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=4)
  batch = parser.parse_args().batch
  c = imagenet_dit.get_config("XL,repa-1nfe")
  for size in ("B", "XL"):
    head = gmm.GMHead(c.policy.components, c.data.shape[-1], c.network.patch, c.policy.logstd_width)
    net = dit.DiT(head=head, remat="none", **dit.SIZES[size])
    x, t, labels = jnp.ones((batch, *c.data.shape)), jnp.ones(batch), jnp.zeros(batch, jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, labels)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)  # values do not change the time
    network = jax.jit(lambda params: net.apply(params, x, t, labels))
    mixture = network(params)
    policy = jax.jit(lambda mixture: rollout_bench.fast_rollout(mixture, x, t))
    took = rollout_bench.alternate(
        {"network": functools.partial(network, params), "policy": functools.partial(policy, mixture)}, repeats=3)
    whole = took["network"] + took["policy"]
    print(f"DiT-{size}/2, batch {batch}, float32, {jax.device_count()} device(s): network {took['network']:.2f} s, "
          f"policy {took['policy']:.3f} s: {100 * took['policy'] / whole:.1f}% of a call", flush=True)


if __name__ == "__main__":
  main()
