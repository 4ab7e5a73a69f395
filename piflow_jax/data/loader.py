"""Batches from any random-access source, shuffled by seed, split by process, resumable at any batch."""

from typing import Any, NamedTuple

import grain
import numpy as np


def batches(source, *, batch_size, seed, rows=None, start=0, num_threads=4, prefetch=8):
  """An endless iterator over {x_0, cond} batches, or over some rows of them; batch n is a function of (seed, n) alone.

  Args:
    source: random access to records {"x_0": [H, W, C], "cond": ...}, with a length.
    batch_size: of all processes together.
    seed: of the shuffle, anew in each epoch.
    rows: numbers of those rows of each batch that are this process's, ascending; None for all. However rows are dealt out
      to however many processes, all of them together see the same data in the same order.
    start: batches to pass over: where an earlier run left off.
    num_threads, prefetch: of the background reader.
  """
  rows = np.arange(batch_size) if rows is None else rows
  data = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
  data = grain.MapDataset.source(_Share(data, batch_size, rows)).batch(len(rows), drop_remainder=True)
  iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))
  iterator.set_state({"next_index": start})
  return iterator


class _Share(NamedTuple):
  """A process's records of data that all share; access by number."""

  data: Any
  batch_size: int
  rows: np.ndarray

  def __len__(self):
    return len(self.data) // self.batch_size * len(self.rows)

  def __getitem__(self, i):
    batch, place = divmod(i, len(self.rows))
    return self.data[batch * self.batch_size + int(self.rows[place])]
