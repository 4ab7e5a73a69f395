"""Weights from PyTorch and to PyTorch, as functions."""

import contextlib
import functools
import json
import pathlib

from etils import epath
import ml_dtypes
import numpy as np
import tqdm

from piflow_jax import errors
from piflow_jax import lock
from piflow_jax import weights as weights_lib
from piflow_jax import workdir as workdir_lib
from piflow_jax.convert import autoencoder
from piflow_jax.convert import files
from piflow_jax.convert import naming as naming_lib
from piflow_jax.convert import paths
from piflow_jax.convert import qwen_autoencoder
from piflow_jax.convert import table
from piflow_jax.convert import tiny_autoencoder
from piflow_jax.convert import trees
from piflow_jax.models import autoencoder as autoencoder_lib

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def from_torch(path, workdir, config=None, *, naming=None, dry_run=False):
  """Make a PyTorch checkpoint the workdir of a finished run, one tensor after the other.

  Args:
    path: file or folder; see `files.open_source`.
    workdir: that is made, local or gs://. Its config.json is of a run that would have these weights.
    config: whose network the weights are for, its teacher's or its student's; an autoencoder needs none.
    naming: name of the naming, where the keys do not tell.
    dry_run: print the mapping, write nothing.
  Raises:
    errors.UserError: whatever does not fit, before anything is written, or with nothing left of what was.
  """
  files.check_writable(workdir, "--workdir")
  weights_lib.check_free(workdir)
  namings = {} if config is None else _namings(*trees.networks_of(config))
  with files.open_source(path) as source:
    source = files.without_prefix(source, functools.partial(_recognised, namings))
    if module := _of_autoencoder(source.shapes):
      if naming:
        raise errors.UserError(f"--format: {source.where} is an autoencoder, which has one naming; leave it out")
      entries, leaves, about = module.read_plan(source)
      write = functools.partial(_write_text, epath.Path(workdir) / autoencoder_lib.FILE, json.dumps(about))
      flag = "--autoencoder"
    elif config is None:
      raise errors.UserError("--config: missing; give the config whose network the weights are for")
    else:
      name = _naming_of(source, naming, namings)
      weights, entries, source, made = _read_plan(source, config, name, namings[name])
      leaves, write = weights.leaves, functools.partial(workdir_lib.write, workdir, made)
      flag = "--config.teacher.checkpoint" if weights.role == "teacher" else "--workdir"
    if dry_run:
      return _print_mapping(entries, "<-")
    _fill_workdir(workdir, _leaves(entries, leaves, source, workdir), write)
  print(f"wrote {workdir}; give it as {flag}")


def to_torch(workdir, out, config=None, *, naming=None, ema=True, dtype="float32", dry_run=False, max_bytes=5e9,
             step=None):
  """Write the weights of a run as a folder that PyTorch users can load, one tensor after the other.

  Args:
    workdir: of the run, or one that `from_torch` made.
    out: folder to make; a dry run needs none.
    config: of the run; None: the workdir's own.
    naming: name of the naming; None: the first that the network has, pi-Flow's release for a DiT.
    ema: averaged weights, not the last ones.
    dtype: "float32" or "bfloat16".
    dry_run: print the mapping, write nothing.
    max_bytes: of a file.
    step: whose checkpoint; None: the newest.
  Raises:
    errors.UserError: whatever does not fit, before anything is written, or with nothing left of what was.
  """
  if out is not None:
    files.check_free(out)
  with contextlib.ExitStack() as stack:
    shapes, read = stack.enter_context(weights_lib.open_weights(workdir, "ema" if ema else "params", "--workdir", step))
    settings = epath.Path(workdir) / autoencoder_lib.FILE
    if settings.exists():
      if naming:
        raise errors.UserError(f"--format: {workdir} holds an autoencoder, which has one naming; leave it out")
      entries, about = autoencoder.write_plan(settings, shapes)
      policy, constants, beside = None, {}, ()
    else:
      weights = trees.of_run(workdir, config, shapes)
      weights, using, entries, about = _write_plan(weights, naming)
      policy, constants, beside = weights.policy, using.constants(weights), using.beside
      read = _over_teachers(weights, read, stack)
    if dry_run:
      return _print_mapping(entries, "->")
    there = {key: entry.shape_there for entry in entries for key in entry.keys}
    there |= {key: tensor.shape for key, tensor in constants.items()}
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    written = files.write(
        out, there, _tensors(entries, read, constants, dtype, workdir), dtype=dtype, config=about, max_bytes=max_bytes,
        beside=[pathlib.Path(__file__).with_name(name) for name in beside],
        metadata={"policy_config": json.dumps(policy)} if policy else {})
    print(f"wrote {out}: {', '.join(written)}")


def _of_autoencoder(keys):
  """The module of the autoencoder whose keys these are, or None."""
  return next((module for module in (tiny_autoencoder, qwen_autoencoder, autoencoder) if module.recognised(keys)), None)


def _namings(*networks):
  found = {}
  for network in networks:
    found |= naming_lib.of_network(network.make)
  return found | paths.NAMINGS


def _recognised(namings, keys):
  return _of_autoencoder(keys) is not None or any(naming.recognised(keys) for naming in namings.values())


def _chosen(given, namings):
  if given not in namings:
    raise errors.UserError(f"--format: {given!r} is none of {', '.join(namings)}, which there are for config.network")
  return given


def _naming_of(source, given, namings):
  """The name of a file's naming."""
  if given:
    _chosen(given, namings)
  found = [name for name, naming in namings.items() if naming.recognised(source.shapes)]
  if not found:
    some = ", ".join(list(source.shapes)[:3])
    raise errors.UserError(f"--source: {source.where} is of no naming that is known here (keys like {some}); known are "
                           + "; ".join(naming.says for naming in namings.values()))
  if given:
    if given not in found:
      raise errors.UserError(f"--format: {given}, but the keys of {source.where} are those of {', '.join(found)}")
    return given
  if len(found) > 1:
    says = "; ".join(f"{n}: {namings[n].says}" for n in found)
    raise errors.UserError(f"--format: missing; the keys of {source.where} are those of {', '.join(found)} alike, and "
                           f"their time and velocity differ ({says})")
  return found[0]


def _read_plan(source, config, name, naming):
  """What is to become of a file, after all checks; prints what it is.

  Returns:
    (Weights, table entries, Source less what no tree has, config of a run of these weights).
  """
  try:
    stated, latents = naming.stated(source.config), naming.latents(source.config)
  except (ValueError, OverflowError) as e:
    raise errors.UserError(f"--source: config.json beside {source.where}: {str(e)[:200]}; mend it or take it "
                           "away") from e
  clash = [f"{k} is {stated[k]} there" for k, v in naming.network.items() if stated.get(k, v) != v]
  if clash:
    raise errors.UserError(f"--format: {name} is not what config.json beside {source.where} says: {', '.join(clash)}; "
                           "choose the format that it is of, or take config.json away")
  teacher, own = trees.weights_of(config)
  stored = naming_lib.stored_policy(source, naming.classes)
  named = [weights for weights in (teacher, own) if naming in _namings(weights.network).values()]
  if len(named) == 2:
    source = naming.prepared(source, teacher, own, stored)
    weights = trees.of_file(source, teacher, own, stored, naming.rows(teacher))
  else:
    weights = named[0]  # the other is of a network that does not go by these names
  if naming.alone and weights.frozen:
    weights = weights.alone
  trees.check_network(weights, naming.says, naming.unless_stated | stated | naming.network)
  trees.check_file(source, weights, stored, latents)
  rows, constants = naming.rows(weights), naming.constants(weights)
  entries = table.entries(rows, weights.shapes, naming.says)
  wanted = {key: entry.shape_there for entry in entries for key in entry.keys}
  source = _with_zeros(source, {key: wanted[key] for key in naming.spare(weights) & wanted.keys()})
  left_out = table.check(
      entries, source.shapes, source.where, (*naming.ignored, *constants), source.faults, source.read,
      table.hints(rows, naming.sizes(weights), wanted, source.shapes))
  for key, array in constants.items():
    if key in source.shapes:
      if faults := [what for what, keys in source.faults.items() if key in keys]:
        raise errors.UserError(f"--source: {source.where}: {faults[0]}: {key}")
      naming.check_constant(source.read(key), array, f"--source: {key}")
  print(f"{source.where}: {naming.says}; a {weights.role} of {len(source.shapes) - len(left_out)} tensors"
        + (f"; left out: {table.listed(left_out)}" if left_out else ""), flush=True)
  if line := "; ".join(filter(None, [naming.remark(weights, stated), trees.unsaid(weights, stored)])):
    print(line, flush=True)
  return weights, entries, source, trees.config_for(weights, own)


def _write_plan(weights, given):
  """(Weights that are written, Naming, table entries, config.json) of an export, after all checks."""
  namings = _namings(weights.network)
  name = _chosen(given, namings) if given else next(iter(namings))
  naming = namings[name]
  if weights.head is not None and not naming.students:
    raise errors.UserError(f"--format: {name} has no names for a student's head; leave it out")
  if why := naming.refuse(weights):
    raise errors.UserError(f"--format: {name}: {why}; --format=paths writes every array under its own path")
  trees.check_network(weights, naming.says, naming.network)
  if naming.alone and weights.frozen:
    weights = weights.alone
  spare = naming.spare(weights)
  entries = [entry for entry in table.entries(naming.rows(weights), weights.shapes, naming.says)
             if not spare.issuperset(entry.keys)]
  about = naming.about(weights)
  about["piflow_jax"] = naming_lib.settings(weights, name) | about["piflow_jax"]
  if remark := naming.remark(weights, None):
    print(remark, flush=True)
  return weights, naming, entries, about


def _with_zeros(source, shapes):
  """The source with zeros for those tensors that it has not."""
  lacks = {key: shape for key, shape in shapes.items() if key not in source.shapes}

  def read(key):
    return np.zeros(lacks[key], np.float32) if key in lacks else source.read(key)

  return source._replace(shapes=source.shapes | lacks, read=read) if lacks else source


def _over_teachers(weights, read, stack):
  """read(path) of a student's leaves, and of the teacher's where its own checkpoints leave them to it."""
  if not weights.frozen & weights.leaves.keys():
    return read
  c, field = weights.config.teacher, "config.teacher.checkpoint"
  if not c.checkpoint:
    raise errors.UserError(f"{field}: is empty, and {table.listed(sorted(weights.frozen))} of this student are its "
                           "teacher's; give the workdir of the teacher's run")
  workdir_lib.check_teacher(weights.config)
  shapes, read_teachers = stack.enter_context(weights_lib.open_weights(c.checkpoint, c.weights, field))
  wanted = {path: weights.shapes[path] for path in weights.frozen}
  if wrong := table.difference(wanted, {path: shape for path, shape in shapes.items() if path in wanted}):
    raise errors.UserError(f"{field}: {c.checkpoint!r} does not fit config.network: {wrong}")

  def read_either(path):
    return (read_teachers if path in weights.frozen else read)(path)

  return read_either


def _tensors(entries, read, constants, dtype, workdir):
  """(key, array) of all entries, then of constants. Raises errors.UserError at the end: some are not finite."""
  leaf, broken = functools.lru_cache(1)(read), []  # the layers of a leaf come one after the other
  for entry in tqdm.tqdm(entries, unit="tensor", desc=str(workdir), disable=None):
    array = leaf(entry.path)
    for key, tensor in entry.to_there(array if entry.layer is None else array[entry.layer]):
      if not table.is_finite(tensor):
        broken.append(key)
      yield key, tensor.astype(dtype)
  for key, tensor in constants.items():
    yield key, tensor.astype(dtype)
  if broken:
    raise errors.UserError(f"--workdir: {str(workdir)!r} holds NaN or infinity, in {table.listed(broken)}; export a "
                           "run whose weights are finite")


def _leaves(entries, leaves, source, workdir):
  """(path, array) of all leaves of a file. Raises errors.UserError at the end: some are not finite."""
  of_leaf, broken = {}, []
  for entry in entries:
    of_leaf.setdefault(entry.path, []).append(entry)
  with tqdm.tqdm(total=len(entries), unit="tensor", desc=str(workdir), disable=None) as bar:
    for path, shape in leaves.items():
      leaf = None
      for entry in of_leaf[path]:
        part, array = () if entry.layer is None else entry.layer, entry.to_here(source.read)
        if leaf is None:  # bfloat16 is kept: a checkpoint of 40 GB would be 80 in float32
          leaf = np.empty(shape.shape, array.dtype if array.dtype == _BFLOAT16 else shape.dtype)
        elif leaf.dtype != shape.dtype and array.dtype != leaf.dtype:
          leaf = leaf.astype(shape.dtype)
        with np.errstate(over="ignore"):  # float64 beyond float32's range becomes infinite, and is found
          leaf[part] = array
        if not table.is_finite(leaf[part]):
          broken += entry.keys
        bar.update()
      yield path, leaf
      del leaf
  if broken:
    raise errors.UserError(f"--source: {source.where} holds NaN or infinity, in {table.listed(broken)}; take another "
                           "checkpoint of that run")


def _write_text(path, text):
  path.write_text(text)


def _fill_workdir(workdir, leaves, write):
  """Make a workdir of leaves (path, array) and what `write` writes beside them; all of it, or nothing."""
  folder, kept = epath.Path(workdir), {}
  with lock.hold(workdir):
    weights_lib.check_free(workdir)  # another program may have filled it meanwhile
    for path in (folder / "config.json", folder / autoencoder_lib.FILE):
      if path.exists():  # of a run that saved nothing, or of an import that was killed
        kept[path] = path.read_bytes()
        path.unlink()
    try:
      weights_lib.save_weights(workdir, _then(leaves, write))
    except BaseException as e:
      for name in ("config.json", "config.json.tmp", autoencoder_lib.FILE):
        (folder / name).unlink(missing_ok=True)
      for path, data in kept.items():
        path.write_bytes(data)
      if not isinstance(e, errors.NotWritten):
        raise
      raise errors.UserError(f"--workdir: cannot write to {str(workdir)!r} ({e.__cause__}); choose a folder that you "
                             "may write") from e


def _then(leaves, write):
  yield from leaves
  write()  # before the weights are whole: nobody could say what weights without it are


def _print_mapping(entries, arrow):
  for entry in entries:
    here = entry.path if entry.layer is None else f"{entry.path}[{entry.layer}]"
    print(f"{here} {entry.shape} {arrow} {', '.join(entry.keys)} {entry.shape_there}")
