"""Batches from any random-access source, shuffled by seed, split by process, resumable at any batch."""

import functools
from typing import Any, NamedTuple

import grain
import numpy as np

from piflow_jax import errors
from piflow_jax.data import spec as spec_lib


def batches(records, spec, **how):
  """`mixed` of records that have one shape."""
  return mixed([(records, spec)], **how)


def mixed(sources, *, batch_size, seed, rows=None, start=0, num_threads=4, prefetch=8):
  """An endless iterator over {x_0, cond} batches, or over some rows of them; batch n is a function of (seed, n) alone.

  Args:
    sources: (records, spec) of each shape of x_0. A batch is of one of them, and of each there are as many batches as
      it has records. Records are random access to {"x_0": [...], "cond": {name: [...]}}, with a length; `next` raises
      errors.UserError with the number of one that differs from its data.spec.Spec.
    batch_size: of all processes together.
    seed: of the shuffle, anew in each epoch.
    rows: numbers of those rows of each batch that are this process's, ascending; None for all. However rows are dealt
      out to however many processes, all of them together see the same data in the same order.
    start: batches to pass over: where an earlier run left off.
    num_threads, prefetch: of the background reader.
  """
  rows = np.arange(batch_size) if rows is None else rows
  parts = []
  for records, spec in sources:
    share = _Share(_endless(grain.MapDataset.source(records), seed), spec, batch_size, rows, seed, len(records),
                   f" of {' x '.join(map(str, spec.x_0))}" if len(sources) > 1 else "")
    parts.append(grain.MapDataset.source(share).batch(len(rows), drop_remainder=True).map_with_index(share.checked))
  data = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [len(records) for records, _ in sources])
  iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))
  iterator.set_state({"next_index": start})
  return iterator


def _endless(data, seed):
  return data.seed(seed).shuffle().repeat(None)


class _Share(NamedTuple):
  """A process's records of data that all share; access by number."""

  data: Any
  spec: spec_lib.Spec
  batch_size: int
  rows: np.ndarray
  seed: int
  size: int  # records of an epoch
  what: str  # batches are of, where there are others

  def __len__(self):
    return len(self.data) // self.batch_size * len(self.rows)

  def __getitem__(self, i):
    batch, place = divmod(i, len(self.rows))
    record = self.data[batch * self.batch_size + int(self.rows[place])]
    if words := spec_lib.misfit(record, self.spec):
      raise errors.UserError(f"{self._where(batch, place)}: {words}")
    return record

  def checked(self, number, batch):
    """The process's share of batch `number`, its values looked at and its conditions in the spec's types."""
    spec_lib.check_batch(batch, self.spec, functools.partial(self._where, number))
    cond = {name: batch["cond"][name].astype(array.dtype, copy=False) for name, array in self.spec.cond.items()}
    return {"x_0": batch["x_0"], "cond": cond}

  def _where(self, batch, place):
    # Only who reports a fault needs the record's number: the same shuffle of numbers gives it.
    record = _endless(grain.MapDataset.range(self.size), self.seed)[batch * self.batch_size + int(self.rows[place])]
    return f"config.data: batch {batch}{self.what}, record {record}"
