"""Batches from any random-access source, shuffled by seed, split by process, resumable at any batch."""

import grain
import jax


def batches(source, *, batch_size, seed, start=0, num_threads=4, prefetch=8):
  """An endless iterator over {x_0, cond} batches of this process's rows; batch n is a function of (seed, n) alone.

  Args:
    source: random access to records {"x_0": [H, W, C], "cond": ...}, with a length.
    batch_size: of all processes together.
    seed: of the shuffle, anew in each epoch.
    start: batches to pass over: where an earlier run left off.
    num_threads, prefetch: of the background reader.
  """
  rows = batch_size // jax.process_count()
  # Batched before it is split: process p has rows p * rows ... of the global batch however many processes there are,
  # so another number of them sees the same data in the same order.
  data = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).batch(rows, drop_remainder=True)
  data = data[jax.process_index()::jax.process_count()]
  iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))
  iterator.set_state({"next_index": start})
  return iterator
