"""Weights from PyTorch and to PyTorch, as functions."""

import functools
import json
import pathlib

from etils import epath
import jax
import ml_dtypes
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax.convert import autoencoder
from piflow_jax.convert import dit
from piflow_jax.convert import files
from piflow_jax.convert import table
from piflow_jax.models import autoencoder as autoencoder_lib


def from_torch(path, workdir, config=None, *, naming=None, dry_run=False):
  """Make a PyTorch checkpoint the workdir of a finished run, one tensor after the other.

  Args:
    path: file or folder; see `files.open_source`.
    workdir: that is made; local or gs://.
    config: whose network the weights are for, its teacher's or its student's; an autoencoder needs none.
    naming: name in `dit.NAMINGS`, where the keys do not tell.
    dry_run: print the mapping, write nothing.
  Raises:
    errors.UserError: whatever does not fit, before anything is written.
  """
  checkpoint.check_free(workdir)
  with files.open_source(path) as source:
    source = files.without_prefix(source, lambda keys: bool(autoencoder.recognised(keys) or dit.namings_of(keys)))
    if autoencoder.recognised(source.shapes):
      if naming:
        raise errors.UserError(f"--format: {source.where} is an autoencoder, which has one naming; leave it out")
      return _autoencoder_from_torch(source, workdir, dry_run)
    _check_config(config)
    name = _naming_of(source, naming)
    naming, told = dit.NAMINGS[name], dit.network_of(source.config)
    clash = [f"{k} is {told[k]} there" for k, v in naming.network.items() if told.get(k, v) != v]
    if clash:
      raise errors.UserError(f"--format: {name} is not what config.json beside {source.where} tells: {', '.join(clash)}; "
                             "choose the format that it is of, or take config.json away")
    _check_network(config, naming.says, naming.unless_told | told | naming.network)
    stored = dit.stored_policy(source.metadata, source.config, source.where)
    source = _velocity_channels_alone(source, naming, config, stored)
    role, shapes = _tree_for(config, source, naming, stored)
    entries = table.entries(naming.rows(config.network.depth, config.network.patch),
                            {k: v.shape for k, v in params_lib.named_leaves(shapes).items()}, naming.says)
    left_out = table.check(entries, source.shapes, source.where, (*naming.ignored, *naming.constants), source.faults,
                           source.read)
    for key in naming.constants:
      if key in source.shapes:
        dit.check_positions(source.read(key), config, f"--source: {key}")
    print(f"{source.where}: {naming.says}; a {role} of {len(source.shapes) - len(left_out)} tensors"
          + (f"; left out: {table.listed(left_out)}" if left_out else ""), flush=True)
    print(_taken(config, name, role, told, stored), flush=True)
    _fill_workdir(entries, shapes, source, workdir, dry_run)
  if not dry_run:
    print(f"wrote {workdir}; give it as " + ("--config.teacher.checkpoint" if role == "teacher" else "--workdir"))


def to_torch(workdir, out, config=None, *, naming=None, ema=True, dtype="float32", dry_run=False, max_bytes=5e9):
  """Write the weights of a run as a folder that PyTorch users can load, one tensor after the other.

  Args:
    workdir: of the run, or one that `from_torch` made.
    out: folder to make; a dry run needs none.
    config: of the run; an autoencoder needs none.
    naming: name in `dit.NAMINGS` for a teacher; pi-Flow's release by default, and for students.
    ema: averaged weights, not the last ones.
    dtype: "float32" or "bfloat16".
    dry_run: print the mapping, write nothing.
    max_bytes: of a file.
  Raises:
    errors.UserError: whatever does not fit, before anything is written.
  """
  if out is not None:
    files.check_free(out)
  with checkpoint.open_weights(workdir, "ema" if ema else "params", "--workdir") as (shapes, read):
    settings = epath.Path(workdir) / autoencoder_lib.FILE
    if settings.exists():
      known = json.loads(settings.read_text())
      entries = table.entries(autoencoder.rows(known["settings"], None), shapes, "diffusers' AutoencoderKL")
      about = known["config"] | autoencoder.diffusers_config(known["settings"], known["scales"])
      policy, constants, beside = None, {}, ()
    else:
      _check_config(config)
      entries, about, policy, constants, beside = _network_to_torch(config, shapes, naming or "release", workdir)
    if dry_run:
      return _print_mapping(entries, "->")
    there = {key: entry.shape_there for entry in entries for key in entry.keys}
    there |= {key: tensor.shape for key, tensor in constants.items()}
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    written = files.write(
        out, there, _tensors(entries, read, constants, dtype, out), dtype=dtype, config=about, beside=beside,
        max_bytes=max_bytes, metadata={"policy_config": json.dumps(policy)} if policy else {})
    print(f"wrote {out}: {', '.join(written)}")


def _network_to_torch(config, shapes, name, workdir):
  """(entries, config.json, policy_config or None, constants, files beside) of a network whose leaves have `shapes`."""
  if config.method is build.meanflow:
    raise errors.UserError("--config: config.method is meanflow, and networks of two times have no names in PyTorch")
  teacher = {k: v.shape for k, v in params_lib.named_leaves(build.teacher_shapes(config)).items()}
  student = _has_policy(config) and shapes.get("head/out/kernel") != teacher.get("head/out/kernel", ())
  if student and name != "release":
    raise errors.UserError(f"--format: {name} has no names for a student's head; leave it out")
  height, width, _ = config.data.shape
  if name != "release" and height != width:
    raise errors.UserError(f"--format: {name} has square latents only, not {height} x {width}; leave it out")
  naming, policy = dit.NAMINGS[name], dit.policy_config(build.policy_head(config)) if student else None
  _check_network(config, naming.says, naming.network)
  expected = {k: v.shape for k, v in params_lib.named_leaves(_student_shapes(config)).items()} if student else teacher
  if expected != shapes:
    raise errors.UserError(f"--workdir: {str(workdir)!r} does not fit the config's network: "
                           f"{table.difference(expected, shapes)}; give the config that it was trained with")
  entries = table.entries(naming.rows(config.network.depth, config.network.patch), shapes, naming.says)
  constants = {key: dit.positions(config) for key in naming.constants}
  if name == "release":
    told, n = dit.release_diffusion(config.network), config.network
    print("pi-Flow's release: " + (
        f"set {', '.join(f'{k}={v}' for k, v in told.items())} in the diffusion that it runs this network in" if told else
        f"no setting of it embeds {n.time_offset} + {n.time_scale} t, as this network wants; piflow_torch.py does"),
          flush=True)
  beside = [pathlib.Path(__file__).with_name("piflow_torch.py")] if name == "release" else []
  return entries, dit.model_config(config, name, policy, float(build.shift(config))), policy, constants, beside


def _tensors(entries, read, constants, dtype, out):
  leaf = functools.lru_cache(1)(read)  # the layers of a leaf come one after the other
  for entry in tqdm.tqdm(entries, unit="tensor", desc=str(out), disable=None):
    array = leaf(entry.path)
    for key, tensor in entry.to_there(array if entry.layer is None else array[entry.layer]):
      yield key, tensor.astype(dtype)
  for key, tensor in constants.items():
    yield key, tensor.astype(dtype)


def _autoencoder_from_torch(source, workdir, dry_run):
  if not source.config:
    raise errors.UserError(f"--source: no config.json beside {source.where}; an autoencoder's settings are read from it")
  settings, scales = autoencoder_lib.settings_of(source.config)
  net = autoencoder_lib.Autoencoder(**settings)
  shapes = autoencoder_lib.shapes(net)
  entries = table.entries(autoencoder.rows(settings, source.shapes),
                          {k: v.shape for k, v in params_lib.named_leaves(shapes).items()}, "diffusers' AutoencoderKL")
  table.check(entries, source.shapes, source.where, faults=source.faults)
  print(f"{source.where}: diffusers' AutoencoderKL of {len(source.shapes)} tensors", flush=True)
  about = {"settings": settings, "scales": scales, "config": source.config}
  _fill_workdir(entries, shapes, source, workdir, dry_run, beside=about)
  if not dry_run:
    print(f"wrote {workdir}")


def _fill_workdir(entries, shapes, source, workdir, dry_run, beside=None):
  if dry_run:
    return _print_mapping(entries, "<-")
  settings = epath.Path(workdir) / autoencoder_lib.FILE
  settings.unlink(missing_ok=True)  # of an autoencoder whose import was killed: there are no weights to it

  def leaves():
    with tqdm.tqdm(total=len(entries), unit="tensor", desc=str(workdir), disable=None) as bar:
      for path, shape in params_lib.named_leaves(shapes).items():
        leaf = np.empty(shape.shape, shape.dtype)
        for entry in (e for e in entries if e.path == path):
          leaf[() if entry.layer is None else entry.layer] = entry.to_here(source.read)
          bar.update()
        yield path, leaf
    if beside:  # before the weights are whole: weights without it would be taken for a network's
      settings.write_text(json.dumps(beside))

  try:
    checkpoint.save_weights(workdir, leaves())
  except BaseException:
    settings.unlink(missing_ok=True)
    if settings.parent.exists() and not list(settings.parent.iterdir()):
      settings.parent.rmdir()
    raise


def _print_mapping(entries, arrow):
  for entry in entries:
    here = entry.path if entry.layer is None else f"{entry.path}[{entry.layer}]"
    print(f"{here} {entry.shape} {arrow} {', '.join(entry.keys)} {entry.shape_there}")


def _check_config(config):
  if config is None:
    raise errors.UserError("--config: missing; give the config whose network the weights are for")
  build.run(config)  # fields that do not fit one another are told now


def _has_policy(config):
  return config.method not in (build.flow_matching, build.meanflow)


def _naming_of(source, given):
  found = dit.namings_of(source.shapes)
  if not found:
    some = ", ".join(list(source.shapes)[:3])
    raise errors.UserError(f"--source: {source.where} is of no naming that is known here (keys like {some}); known are "
                           + "; ".join(n.says for n in dit.NAMINGS.values()))
  if given:
    if given not in found:
      raise errors.UserError(f"--format: {given}, but the keys of {source.where} are those of {', '.join(found)}")
    return given
  if len(found) > 1:
    raise errors.UserError(f"--format: missing; the keys of {source.where} are those of {', '.join(found)} alike, and their "
                           "time and velocity differ (" + "; ".join(f"{n}: {dit.NAMINGS[n].says}" for n in found) + ")")
  return found[0]


def _check_network(config, what, fields):
  """Fields of the network that no shape tells. Raises errors.UserError."""
  wrong = [f"config.network.{k} is {config.network[k]}, set {v}" for k, v in fields.items() if config.network[k] != v]
  if wrong:
    raise errors.UserError(f"--config: for {what}: {'; '.join(wrong)}")


def _taken(config, name, role, told, stored):
  """A line on what the weights are taken to mean and no shape of theirs tells."""
  n = config.network
  line = (f"taken to embed {n.time_offset} + {n.time_scale} t (config.network.time_offset, time_scale) and to have "
          f"mlp_norm_eps {n.mlp_norm_eps}")
  if name == "release" and "time_scale" not in told:
    line += ("; these files do not tell: the time_scale is num_timesteps of the release's own config (1 for REPA, 1000 for "
             "FM-DiT); with flip_model_timesteps there (SiT) it is -num_timesteps, and time_offset is num_timesteps")
  if role == "student":
    mine = dit.policy_config(build.policy_head(config))
    unsaid = [f"{k} {v}" for k, v in mine.items() if k not in (stored or {}) and (k != "type" or v != "GMFlow")]
    line += f"; policy, by the config alone: {', '.join(unsaid)}" if unsaid else ""
  return line


def _velocity_channels_alone(source, naming, config, policy):
  """The source without the rows of its output layer that no velocity needs."""
  keys = (naming.output, naming.output.replace("weight", "bias"))
  channels, patch = config.data.shape[-1], config.network.patch
  stored = dit.first_channels(source.shapes.get(naming.output, (0,)), channels, patch)
  is_students = source.shapes.get(naming.output) == _rows_of_student(config)
  if stored and is_students and policy is None and not source.config:
    raise errors.UserError(f"--config: {source.where} may be a teacher with a variance or a student of {stored // channels} "
                           "points; give a config of other config.policy.points to read it as a teacher")
  if not stored or policy is not None or any(key not in source.shapes for key in keys):
    return source
  print(f"{naming.output}: {stored} channels a position, of which the first {channels} are the velocity", flush=True)
  cut = lambda shape: (patch**2 * channels, *shape[1:])
  read = lambda key: dit.cut_channels(source.read(key), stored, channels) if key in keys else source.read(key)
  return source._replace(shapes=source.shapes | {key: cut(source.shapes[key]) for key in keys}, read=read)


def _rows_of_student(config):
  """Shape of the weight of a student's output layer, if it is one layer of many velocities."""
  if not _has_policy(config):
    return None
  out = params_lib.named_leaves(_student_shapes(config)).get("head/out/kernel")
  return None if out is None else (int(np.prod(out.shape[1:])), out.shape[0])


def _tree_for(config, source, naming, policy):
  """("teacher" or "student", tree of shapes): whose output layers the file has."""
  told = policy is not None or bool(source.config)  # of a file that comes alone, the shapes have to tell
  if policy or "proj_out_means.weight" in source.shapes or (
      not told and source.shapes.get(naming.output, ()) == _rows_of_student(config)):
    if not _has_policy(config):
      raise errors.UserError(f"--config: {source.where} is a student; give a student's config")
    mine = dit.policy_config(build.policy_head(config))
    differ = [f"{k} is {mine.get(k)!r}, the file's {v!r}" for k, v in (policy or {}).items() if mine.get(k, v) != v]
    if differ:
      raise errors.UserError(f"--config: its policy is not the one of {source.where}: {'; '.join(differ)}; set config.policy "
                             "and config.flow to the file's")
    return "student", _student_shapes(config)
  return "teacher", build.teacher_shapes(config)


def _student_shapes(config):
  return jax.eval_shape(build.run(config).init, jax.random.key(0), build.teacher_shapes(config))
