"""Checkpoints by Orbax: {state, position} out and in, and a teacher's weights in. The only file that knows Orbax."""

import contextlib
import functools
import os

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_lib
from orbax.checkpoint.experimental.v1 import Context
from orbax.checkpoint.experimental.v1 import partial

from piflow_jax import errors
from piflow_jax import params as params_lib

_SLICE = 4 << 20  # bytes of an array from which on a device writes its share


class _Manager(ocp.CheckpointManager):

  def reached_preemption(self, step):
    # Asked at every save with the run's step; the training loop asks with the session's, and JAX can keep one count only.
    del step
    return False

  def _wait_for_checkpointers(self):
    # In the thread that ends a save. Of several processes one whose write has failed would go on to a barrier at which no other
    # arrives, and all would wait there for ten minutes.
    try:
      with _storing(self):
        super()._wait_for_checkpointers()
    except errors.NotWritten as e:
      if jax.process_count() == 1:
        raise
      errors.leave(2, e)


@contextlib.contextmanager
def open_manager(workdir, *, keep=2, keep_every=None):
  """The manager of workdir/checkpoints: saves in the background, commits by rename, keeps the latest and every n-th.

  What a kill left half written is removed.
  """
  policies = [keep_lib.LatestN(keep)] + ([keep_lib.EveryNSteps(keep_every)] if keep_every else [])
  options = ocp.CheckpointManagerOptions(
      preservation_policy=keep_lib.AnyPreservationPolicy(policies), enable_async_checkpointing=True,
      cleanup_tmp_directories=True)
  manager = _Manager(_folder(workdir), options=options, item_handlers={
      "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_arrays()), "position": ocp.JsonCheckpointHandler()})
  try:
    yield manager
  except BaseException as e:
    # Closing waits for a write: in which a lost process had a part, or which has failed already.
    if not errors.process_lost(e) and not isinstance(e, errors.NotWritten):
      manager.close()
    raise
  with _storing(manager):
    manager.close()


def _arrays():
  # Of an array that several devices hold each writes a slice. For a small one that is no gain, and every slice is a program to
  # be compiled, for its shape, its place and its device, while the devices wait at a session's first save.
  return ocp.type_handlers.create_type_handler_registry(
      (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE)))


def _storing(manager):
  return errors.storing(f"--workdir: a checkpoint under {manager.directory}")


def _folder(workdir):
  """Where a workdir's checkpoints are, absolute, as Orbax wants local paths."""
  return epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir)) / "checkpoints"


def save(manager, step, state, position):
  """Start writing the state, and the data position and other plain values, of a step; returns while it is written.

  Raises:
    errors.NotWritten: this one, or the one before it, which was written meanwhile.
  """
  with _storing(manager):
    manager.save(step, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(position)))


def finish(manager):
  """Wait until all is written. Raises errors.NotWritten."""
  with _storing(manager):
    manager.wait_until_finished()


def restore_latest(manager, abstract_state):
  """(step, state, position) of the newest checkpoint that can be read, or None where there is none.

  One that cannot be read (torn by a crash of the disk, say) is set aside as `torn_<step>` with a warning. Of several processes
  all take the same one: one that all can read.

  Args:
    manager: of `open_manager`.
    abstract_state: shapes, dtypes and shardings to restore to.
  Raises:
    errors.UserError: checkpoints are there, but none can be read.
  """
  failures = []
  for step in sorted(manager.all_steps(), reverse=True):
    # Not by the manager: a process that could read its part would wait there, at a barrier, for one that could not.
    folder, why = manager.directory / str(step), ""
    try:
      state = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))
      position = ocp.JsonCheckpointHandler().restore(folder / "position", args=ocp.args.JsonRestore())
    except Exception as e:  # whatever the storage layer makes of broken bytes
      why = " ".join(str(e).split())[:200] or type(e).__name__
    if not np.any(multihost_utils.process_allgather(np.array(bool(why)))):
      break
    failures.append((step, why or "another process could not"))
    logging.warning("checkpoint %d cannot be read and is passed over: %s", *failures[-1])
  else:
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
  return step, state, position


def load_weights(workdir, abstract_params, which, field):
  """The newest weights of another run: its `ema` or its `params`, with the shardings of abstract_params.

  Args:
    workdir: of that run.
    abstract_params: the tree expected, shapes and shardings.
    which: "ema" or "params".
    field: name of the config field that gave the workdir, for the messages.
  Raises:
    errors.UserError: no such run, one that is not a checkpoint of this program, or shapes that do not fit.
  """
  with _newest(workdir, which, field) as (manager, step, shapes):
    _check_shapes(params_lib.named_leaves(abstract_params), params_lib.named_leaves(shapes), f"{field}: {str(workdir)!r}")
    restore_args = ocp.checkpoint_utils.construct_restore_args({which: abstract_params})
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
        {which: abstract_params}, restore_args=restore_args, partial_restore=True)))
  return restored["state"][which]


@contextlib.contextmanager
def open_weights(workdir, which, field):
  """The newest weights of a run, to be read leaf by leaf: yields ({path: shape}, read(path) -> numpy array).

  Args:
    workdir: of that run.
    which: "ema" or "params".
    field: as in `load_weights`.
  Raises:
    errors.UserError: no checkpoint there, or none of this program.
  """
  with _newest(workdir, which, field) as (manager, step, shapes):
    leaves = params_lib.named_leaves(shapes)

    def read(path):
      args = ocp.args.PyTreeRestore(
          {which: _nest(path, jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype))},
          restore_args={which: _nest(path, ocp.RestoreArgs(restore_type=np.ndarray))}, partial_restore=True)
      return jax.tree.leaves(manager.restore(step, args=ocp.args.Composite(state=args))["state"][which])[0]

    yield {path: tuple(leaf.shape) for path, leaf in leaves.items()}, read


@contextlib.contextmanager
def _newest(workdir, which, field):
  """(manager, step, shapes of `which`) of the newest checkpoint of another run."""
  folder = _folder(workdir)
  if not folder.exists():
    raise errors.UserError(f"{field}: no checkpoint in {str(workdir)!r} (no folder {folder}); give a finished run's workdir")
  with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    step = manager.latest_step()
    if step is None:
      raise errors.UserError(f"{field}: no finished checkpoint in {str(workdir)!r}; let that run save one first")
    try:
      shapes = _shapes(folder / str(step) / "state")
      if which not in shapes and "ema" in shapes:
        raise errors.UserError(f"{field}: {str(workdir)!r} holds averaged weights alone, no {which!r}")
      shapes = shapes[which]
    except errors.UserError:
      raise
    except Exception as e:
      raise errors.UserError(f"{field}: {folder}/{step} is not a checkpoint of this program ({type(e).__name__}); "
                             "give the workdir of a training run") from e
    yield manager, step, shapes


_UNFINISHED = "0.partial_save"  # as Orbax's partial saves call it until they are whole
_AT_ONCE = 64 << 20  # bytes; one write costs a fifth of a second whatever its size


def check_free(workdir):
  """Raises errors.UserError: there is a run in workdir, over which no weights may be written."""
  folder = _folder(workdir)
  # What was killed while it wrote is no checkpoint.
  if folder.exists() and list(folder.iterdir()) not in ([], [folder / _UNFINISHED]):
    raise errors.UserError(f"--workdir: {str(workdir)!r} holds checkpoints already; choose another")


def save_weights(workdir, leaves):
  """Write weights that come one after the other as the `ema` of a finished run of 0 steps; all of them, or nothing.

  Args:
    workdir: in which there must be no checkpoint yet.
    leaves: iterable of (path, array). In memory are those that make up 64 MB, or one that is larger, and a copy.
  Raises:
    errors.UserError: there is a run in workdir.
  """
  check_free(workdir)
  folder = _folder(workdir)
  if folder.exists():
    folder.rmtree()
  try:
    folder.mkdir(parents=True)
    context = Context()
    context.array.saving.use_compression = False  # it holds two copies of an array more, to make random float32 7% smaller
    with context:
      tree, size = {}, 0
      for path, array in leaves:
        *parents, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = array
        size += array.nbytes
        if size > _AT_ONCE:
          partial.save(folder / "0", {"ema": tree})
          tree, size = {}, 0
      if tree:
        partial.save(folder / "0", {"ema": tree})
      partial.finalize(folder / "0")
  except BaseException as e:
    for remove in (folder.rmtree, folder.parent.rmdir):  # the workdir too, if there is nothing else in it
      try:
        remove()
      except (OSError, ValueError, NotImplementedError):
        pass
    if isinstance(e, OSError):
      raise errors.UserError(f"--workdir: cannot write to {str(workdir)!r} ({e}); choose a folder that you may write") from e
    raise


def _nest(path, leaf):
  return functools.reduce(lambda tree, key: {key: tree}, reversed(path.split("/")), leaf)


def _shapes(folder):
  metadata = ocp.StandardCheckpointer().metadata(folder)
  tree = getattr(metadata, "item_metadata", metadata)
  return jax.tree.map(lambda m: m, getattr(tree, "tree", tree), is_leaf=lambda m: hasattr(m, "shape"))


def _check_shapes(expected, found, what):
  wrong = [f"{name} is missing" for name in expected if name not in found]
  wrong += [f"{name} is not in this network" for name in found if name not in expected]
  wrong += [f"{name} is {tuple(found[name].shape)}, expected {tuple(leaf.shape)}"
            for name, leaf in expected.items() if name in found and tuple(found[name].shape) != tuple(leaf.shape)]
  if wrong:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise errors.UserError(
        f"{what} does not fit config.network: {'; '.join(wrong[:3])}{more}; use the teacher's own network fields")
