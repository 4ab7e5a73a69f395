"""A run's checkpoints: {state, position} out and in by Orbax."""

import contextlib
import json
import os
import zlib

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_lib

from piflow_jax import checksums
from piflow_jax import errors

_SLICE = 4 << 20  # bytes; devices that share a larger array write a slice of it each
_SUM = "crc32"  # in a saved position: checksum of the rest of it


class _Manager(ocp.CheckpointManager):

  def reached_preemption(self, step):
    # Orbax calls JAX's preemption sync point at every save, with the run's step. The loop calls it with steps since
    # this session began. JAX keeps one counter, so Orbax's call is switched off.
    del step
    return False

  def _wait_for_checkpointers(self):
    # Runs in Orbax's commit thread. If only one process failed to write, it would wait ten minutes at a barrier the
    # others never reach: exit at once instead.
    try:
      with _storing(self):
        super()._wait_for_checkpointers()
    except errors.NotWritten as e:
      if jax.process_count() == 1:
        raise
      errors.leave(2, e)


class _Arrays(ocp.PyTreeCheckpointHandler):
  """Adds checksums before the commit: every process sums what it wrote, the first one also what it makes of it all."""

  async def async_save(self, directory, *args, **kwargs):
    commits = await super().async_save(directory, *args, **kwargs)
    return [*commits, _Sums(commits, directory / f"ocdbt.process_{jax.process_index()}")]

  def finalize(self, directory):
    super().finalize(directory)
    checksums.write(directory)

  @classmethod
  def typestr(cls):
    # Orbax notes the handler's name in the checkpoint and looks it up to read it, in programs without this class too.
    return ocp.PyTreeCheckpointHandler.typestr()


class _Sums:
  """A future in Orbax's sense, which its commit thread waits for: sums a folder when the commits before it are done."""

  def __init__(self, commits, folder):
    self._commits, self._folder = commits, folder

  def result(self, timeout=None):
    for commit in self._commits:
      commit.result(timeout=timeout)
    if self._folder.exists():  # a process that holds no array's first copy writes nothing
      checksums.write(self._folder)

  def cancel(self):
    pass


class _These:
  """A preservation policy in Orbax's sense: of the steps in a set, as it is when it is asked."""

  def __init__(self, steps):
    self._steps = steps

  def should_preserve(self, checkpoints, *, context):
    del context
    return [found.step in self._steps for found in checkpoints]


@contextlib.contextmanager
def open_manager(workdir, *, keep=2, keep_every=None, these=frozenset()):
  """The manager of workdir/checkpoints: saves in the background, commits by rename, keeps the latest and every n-th.

  Opening removes what a kill left half written.

  Args:
    workdir: local or gs://.
    keep: the latest so many stay.
    keep_every: and each whose step this divides; None or 0: none.
    these: and those of the steps in this set, which may change meanwhile.
  """
  policies = [keep_lib.LatestN(keep), _These(these)] + ([keep_lib.EveryNSteps(keep_every)] if keep_every else [])
  options = ocp.CheckpointManagerOptions(
      preservation_policy=keep_lib.AnyPreservationPolicy(policies), enable_async_checkpointing=True,
      cleanup_tmp_directories=True)
  manager = _Manager(folder_of(workdir), options=options, handler_registry=_handlers())
  try:
    yield manager
  except BaseException as e:
    # Closing waits for a write. One in which a lost process had a part never ends; one that failed would raise again.
    if not errors.process_lost(e) and not isinstance(e, errors.NotWritten):
      manager.close()
    raise
  with _storing(manager):
    manager.close()


def _handlers():
  # Orbax slices an array that several devices hold, so that each writes a part. XLA compiles every slice, for its
  # shape, place and device, while the devices wait at a session's first save; for small arrays that is no gain.
  types = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE)))
  arrays, position = _Arrays(type_handler_registry=types), ocp.JsonCheckpointHandler()
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add("state", ocp.args.PyTreeSave, arrays)
  registry.add("state", ocp.args.PyTreeRestore, arrays)
  registry.add("position", ocp.args.JsonSave, position)
  registry.add("position", ocp.args.JsonRestore, position)
  return registry


def _storing(manager):
  return errors.storing(f"--workdir: a checkpoint under {manager.directory}")


def folder_of(workdir):
  """Where a workdir's checkpoints are; absolute, because Orbax takes no other local paths."""
  return epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir)) / "checkpoints"


def save(manager, step, state, position):
  """Start writing the state, and the data position and other plain values, of a step; returns while it is written.

  Raises:
    errors.NotWritten: this one failed, or the one before it, which was written meanwhile.
  """
  with _storing(manager):
    manager.save(step, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(position | {_SUM: _sum(position)})))


def _sum(position):
  return f"{zlib.crc32(json.dumps(position, sort_keys=True).encode()):08x}"


def finish(manager):
  """Wait until all is written. Raises errors.NotWritten."""
  with _storing(manager):
    manager.wait_until_finished()


def restore_latest(manager, abstract_state):
  """(step, state, position) of the newest checkpoint that can be read, or None where there is none.

  One that cannot be read, or whose checksums differ, is set aside as `torn_<step>` with a warning. All processes take
  the same one: the newest that all of them can read.

  Args:
    manager: of `open_manager`.
    abstract_state: shapes, dtypes and shardings to restore to.
  Raises:
    errors.UserError: checkpoints are there, but none can be read.
  """
  def read(folder):
    # Not by the manager: a process that could read its part would wait at a barrier for one that could not.
    with checksums.verified(folder / "state"):
      state = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))
    position = ocp.JsonCheckpointHandler().restore(folder / "position", args=ocp.args.JsonRestore())
    if position.pop(_SUM, None) not in (None, _sum(position)):
      raise ValueError("the checksum of its position differs")
    return state, position

  step, found, failures = newest(manager.directory, manager.all_steps(), read)
  if step is None:
    if failures:
      raise errors.UserError(
          f"--workdir: no checkpoint under {manager.directory} can be read ({failures[0][1]}); "
          "if the network or the optimizer changed, choose another workdir")
    return None
  if failures:
    if jax.process_index() == 0:
      for torn, _ in failures:
        (manager.directory / str(torn)).rename(manager.directory / f"torn_{torn}")
    multihost_utils.sync_global_devices("torn")
    manager.reload()
  return step, *found


def newest(folder, steps, read):
  """The newest checkpoint that every process can read; each that cannot be read is warned of and passed over.

  Args:
    folder: of the checkpoints.
    steps: those that are there.
    read: called with a checkpoint's folder. An errors.UserError of it ends the search.
  Returns:
    step or None, what `read` returned, [(step, why)] of those passed over.
  """
  failures = []
  for step in sorted(steps, reverse=True):
    found, why = None, ""
    try:
      found = read(folder / str(step))
    except errors.UserError:
      raise
    except Exception as e:  # storage layers raise all kinds of things over broken bytes
      why = errors.reason(e)
    if not np.any(multihost_utils.process_allgather(np.array(bool(why)))):
      return step, found, failures
    failures.append((step, why or "another process could not"))
    logging.warning("%s: checkpoint %d cannot be read and is passed over: %s", folder.parent, *failures[-1])
  return None, None, failures
