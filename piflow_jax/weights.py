"""Weights alone: of a run's newest checkpoint in, and of a converter out."""

import contextlib
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental.v1 import Context
from orbax.checkpoint.experimental.v1 import partial

from piflow_jax import checkpoint
from piflow_jax import checksums
from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax.models import autoencoder
from piflow_jax.models import qwen_autoencoder
from piflow_jax.models import tiny_autoencoder

_UNFINISHED = "0.partial_save"  # what Orbax calls a partial save until it is finalized
BEST = "best.json"  # in a workdir: {"step", "frechet"} of the checkpoint with the least distance
_AT_ONCE = 64 << 20  # bytes; a partial save costs a fifth of a second whatever its size


def load(workdir, abstract, which, field, strict=True, step=None):
  """The newest weights of a run that can be read.

  The checksums of the whole checkpoint are verified meanwhile; one that is torn is passed over with a warning.

  Args:
    workdir: of that run, local or gs://.
    abstract: the tree expected: shapes, dtypes to cast to, and shardings.
    which: "ema" or "params".
    field: name of what gave the workdir, for the messages.
    strict: whether leaves in the checkpoint that `abstract` does not ask for are an error.
    step: whose checkpoint; None: the newest that can be read.
  Returns:
    a tree like `abstract`.
  Raises:
    errors.UserError: no such run, one that is not of this program, leaves that do not fit or are not finite, or nothing
      that can be read.
  """
  wanted = params_lib.named_leaves(abstract)

  def read(folder):
    _check_fit(wanted, _leaves(folder, which, field, workdir), f"{field}: {str(workdir)!r}", strict)
    args = ocp.args.PyTreeRestore({which: abstract}, partial_restore=True,
                                  restore_args=ocp.checkpoint_utils.construct_restore_args({which: abstract}))
    with checksums.verified(folder / "state"):
      return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)[which]

  found = _newest(workdir, field, read, step)[1]
  bad = [name for name, good in params_lib.named_leaves(jax.device_get(_finite(found))).items() if not good]
  if bad:
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise errors.UserError(f"{field}: {str(workdir)!r} holds NaN or infinity, in {bad[0]}{more}; take another run's")
  return found


@jax.jit
def _finite(tree):
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


@contextlib.contextmanager
def open_weights(workdir, which, field, step=None):
  """The newest weights of a run that can be read, leaf by leaf: yields ({path: shape}, read(path) -> numpy array).

  Args:
    workdir, which, field, step: as in `load`.
  Raises:
    errors.UserError: as `load`.
  """
  def look(folder):
    with checksums.verified(folder / "state"):
      return _leaves(folder, which, field, workdir)

  folder, leaves = _newest(workdir, field, look, step)

  def read(path):
    args = ocp.args.PyTreeRestore(
        {which: params_lib.nested({path: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype)})},
        restore_args={which: params_lib.nested({path: ocp.RestoreArgs(restore_type=np.ndarray)})}, partial_restore=True)
    return jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)[which])[0]

  yield {path: tuple(leaf.shape) for path, leaf in leaves.items()}, read


def step_of(workdir, text, flag="--step"):
  """The step that a flag names: a number, or "best", the one of the least Frechet distance; None for None.

  Raises:
    errors.UserError: it is neither, or the run never measured one.
  """
  if text is None or text.isdecimal():
    return None if text is None else int(text)
  if text != "best":
    raise errors.UserError(f"{flag}: {text!r}; give a step, or best")
  try:
    return int(json.loads((epath.Path(workdir) / BEST).read_text())["step"])
  except (OSError, KeyError, TypeError, ValueError) as e:
    raise errors.UserError(f"{flag}: {str(workdir)!r} has no {BEST}: the run measured no distances; train with "
                           "--config.evaluation.every=N, or give a step") from e


def _newest(workdir, field, read, step=None):
  """(folder, read(folder)) of the newest checkpoint of a run for which `read` does not fail, or of that of a step."""
  folder = checkpoint.folder_of(workdir)
  try:
    if not folder.exists():
      raise errors.UserError(
          f"{field}: no checkpoint in {str(workdir)!r} (no folder {folder}); give a finished run's workdir")
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
      steps = manager.all_steps()
  except (errors.UserError, ImportError):
    raise
  except Exception as e:  # gcsfs raises types of its own, aiohttp's and Google's
    if errors.process_lost(e):
      raise
    raise errors.UserError(f"{field}: {str(workdir)!r} cannot be read ({errors.reason(e)})") from e
  if step is not None:
    if step not in steps:
      raise errors.UserError(f"{field}: {str(workdir)!r} has no checkpoint of step {step}, only of "
                             f"{', '.join(map(str, sorted(steps))) or 'none'}")
    steps = [step]
  if not steps:
    raise errors.UserError(f"{field}: no finished checkpoint in {str(workdir)!r}; let that run save one first")
  chosen, found, failures = checkpoint.newest(folder, steps, read)
  if chosen is None:
    newest, why = failures[0]
    raise errors.UserError(f"{field}: no checkpoint in {str(workdir)!r} can be read (step {newest}: {why})")
  return folder / str(chosen), found


def _leaves(folder, which, field, workdir):
  """{path: shape and dtype} of a checkpoint's `which`."""
  there = (folder / "state").exists()
  tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree if there else {}
  if "ema" not in tree:
    raise errors.UserError(
        f"{field}: {folder} is not a checkpoint of this program (no {'ema' if there else 'state'} in it); give the "
        "workdir of a training run")
  if which not in tree:
    raise errors.UserError(f"{field}: {str(workdir)!r} holds averaged weights alone, no {which!r}")
  return params_lib.named_leaves(tree[which])


def _check_fit(wanted, found, what, strict):
  wrong = [f"{name} is missing" for name in wanted if name not in found]
  wrong += [f"{name} is not in this network" for name in found if name not in wanted and strict]
  wrong += [f"{name} is {tuple(found[name].shape)}, expected {tuple(leaf.shape)}"
            for name, leaf in wanted.items() if name in found and tuple(found[name].shape) != tuple(leaf.shape)]
  if wrong:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise errors.UserError(f"{what} does not fit this config: {'; '.join(wrong[:3])}{more}")


def check_free(workdir):
  """Raises errors.UserError: there is a run in workdir, over which no weights may be written."""
  folder = checkpoint.folder_of(workdir)
  # A write that was killed is no checkpoint.
  if folder.exists() and list(folder.iterdir()) not in ([], [folder / _UNFINISHED]):
    raise errors.UserError(f"--workdir: {str(workdir)!r} holds checkpoints already; choose another")


def save_weights(workdir, leaves):
  """Write weights that come one after the other as the `ema` of a finished run of 0 steps; all of them, or nothing.

  Args:
    workdir: in which there must be no checkpoint yet.
    leaves: iterable of (path, array). Memory holds those that make up 64 MB, or one that is larger, and a copy.
  Raises:
    errors.UserError: there is a run in workdir, or it cannot be written.
  """
  check_free(workdir)
  folder = checkpoint.folder_of(workdir)
  if folder.exists():
    folder.rmtree()
  try:
    folder.mkdir(parents=True)
    context = Context()
    context.array.saving.use_compression = False  # two more copies of an array in memory, for 7% off random float32
    with context:
      for tree in _batched(leaves):
        partial.save(folder / "0", {"ema": tree})
      partial.finalize(folder / "0")
    # After the commit: Orbax moves the files in it. A kill between the two leaves whole weights without checksums.
    checksums.write(folder / "0" / "state")
  except BaseException as e:
    for remove in (folder.rmtree, folder.parent.rmdir):  # the workdir too, if there is nothing else in it
      try:
        remove()
      except (OSError, ValueError, NotImplementedError):
        pass
    if isinstance(e, OSError):
      raise errors.UserError(
          f"--workdir: cannot write to {str(workdir)!r} ({e}); choose a folder that you may write") from e
    raise


def _batched(leaves):
  """Nested dicts of leaves that make up a write each."""
  found, size = {}, 0
  for path, array in leaves:
    found[path] = array
    size += array.nbytes
    del array
    if size > _AT_ONCE:
      yield params_lib.nested(found)
      found, size = {}, 0
  if found:
    yield params_lib.nested(found)


# By "kind" in autoencoder.FILE.
_AUTOENCODERS = {None: autoencoder.Autoencoder, qwen_autoencoder.KIND: qwen_autoencoder.QwenAutoencoder,
                 tiny_autoencoder.KIND: tiny_autoencoder.TinyAutoencoder}


def load_autoencoder(workdir, sharding, field="--autoencoder", channels=None):
  """(net, params, scales) of an autoencoder that `python -m piflow_jax.convert from-torch` made a workdir of.

  Args:
    workdir: local or gs://.
    sharding: of all parameters.
    field: name of what gave the workdir, for the messages.
    channels: of the latents that it is for; None: any.
  Returns:
    models.autoencoder.Autoencoder, its parameters, and the arguments of `to_latents` and `from_latents`.
  Raises:
    errors.UserError: there is no autoencoder, or another version's, or one of other latents.
  """
  path = epath.Path(workdir) / autoencoder.FILE
  if not path.exists():
    raise errors.UserError(f"{field}: {str(workdir)!r} holds no autoencoder (no {autoencoder.FILE}); make one "
                           "of diffusers' by python -m piflow_jax.convert from-torch")
  try:
    known = json.loads(path.read_text())
    settings, scales = known["settings"], known["scales"]
    make = _AUTOENCODERS[known.get("kind")]
    net = make(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
    raise errors.UserError(f"{field}: {path} is not of this program ({type(e).__name__}: {e}); convert it again") from e
  if channels is not None:
    check_channels((net, None, None), channels, workdir, field)
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), autoencoder.shapes(net))
  return net, load(workdir, placed, "ema", field), scales


def check_channels(autoencoder, channels, workdir, field="--autoencoder"):
  """Raises errors.UserError: what `load_autoencoder` gave is of other latents than these channels."""
  if (there := autoencoder[0].latent_channels) != channels:
    raise errors.UserError(f"{field}: {str(workdir)!r} has latents of {there} channels, the data's have {channels}; "
                           "give the one that these latents are of")
