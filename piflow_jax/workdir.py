"""A workdir and the config that it belongs to: written when a run first saves, read back by every later program."""

import json
import pathlib

from absl import logging
from etils import epath

from piflow_jax import config as config_lib
from piflow_jax import errors

_FORMAT = 2  # of config.json; 1 was a flat table of fields that do not exist any more
_NOUNS = ("data", "network", "lora", "policy", "method", "teacher", "flow")
_CHOOSE = "choose a folder that you may write"
_MEND = "put back the one that the run was begun with, or choose another workdir"
_MEANING = ("network", "lora", "policy", "method", "flow")  # nouns that say what weights are


def path_of(text, flag="--workdir"):
  """A folder as given on the command line: local (~ is the home folder) or gs://.

  Raises:
    errors.UserError: empty, of another scheme, or a file.
  """
  if not text:
    raise errors.UserError(f"{flag}: is empty; give a folder")
  scheme, found, _ = str(text).partition("://")
  if found and scheme not in ("gs", "file"):
    raise errors.UserError(f"{flag}: {str(text)!r}: {scheme}:// is not supported; give a local folder or a gs:// path")
  if not found:
    text = str(pathlib.Path(text).expanduser())
    if pathlib.Path(text).exists() and not pathlib.Path(text).is_dir():
      raise errors.UserError(f"{flag}: {text!r} is a file; give a folder")
  return str(text)


def _file(workdir):
  return epath.Path(workdir) / "config.json"


def write(workdir, config):
  """Make config.json of a workdir, whole or not at all. Raises errors.NotWritten."""
  text = json.dumps({"format": _FORMAT, "config": config_lib.to_plain(config)}, indent=1, allow_nan=False)
  with errors.storing(f"--workdir: config.json of {workdir}"):
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "config.json.tmp"
    temporary.write_text(text)
    temporary.replace(_file(workdir))


def plain(workdir, flag="--workdir"):
  """The plain table in config.json, or None where there is no such file. Raises errors.UserError: it cannot be read."""
  path = _file(workdir)
  try:
    if not path.exists():
      return None
    known = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f"{flag}: {path} is no config that can be read ({type(e).__name__}); {_MEND}") from e
  if isinstance(known, dict) and known.get("format") == _FORMAT and isinstance(known.get("config"), dict):
    return known["config"]
  if isinstance(known, dict) and "format" not in known and known:
    raise errors.UserError(f"{flag}: {path} is of a version whose fields are gone; start that run anew in another "
                           "workdir")
  raise errors.UserError(f"{flag}: {path} is no config of this program; {_MEND}")


def completed(known):
  """A plain config, fields that have come since it was written at their defaults; itself where it cannot be read."""
  try:
    return config_lib.to_plain(config_lib.from_plain(known))
  except (ValueError, TypeError, KeyError):
    return known


def read(workdir, flag="--workdir"):
  """The config that a workdir belongs to. Raises errors.UserError: there is none, or it cannot be read."""
  known = plain(workdir, flag)
  if known is None:
    raise errors.UserError(f"{flag}: {str(workdir)!r} has no config.json; give a run's workdir, or --config=FILE")
  try:
    return config_lib.from_plain(known)
  except (ValueError, TypeError, KeyError) as e:
    raise errors.UserError(f"{flag}: {_file(workdir)}: {e}") from e


def begun(workdir):
  """Whether checkpoints lie in a workdir."""
  folder = epath.Path(workdir) / "checkpoints"
  try:
    return folder.exists() and any(child.name.isdigit() for child in folder.iterdir())
  except (OSError, NotImplementedError):
    return False


def claim(workdir, config, write_it=True):
  """Hold a config against the one that a workdir's checkpoints were made with.

  Until a run has saved anything its workdir belongs to nobody: another batch or other moments, say after running out of
  memory, may be tried in it.

  Args:
    workdir: local or gs://.
    config: of the run that is to start, or go on.
    write_it: whether this process writes config.json.
  Raises:
    errors.UserError: the checkpoints are another config's, or nobody can say whose.
  """
  try:
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
  except (OSError, NotImplementedError) as e:
    raise errors.UserError(f"--workdir: cannot write to {str(workdir)!r} ({e}); {_CHOOSE}") from e
  if begun(workdir):
    known = plain(workdir)
    if known is None:
      raise errors.UserError(f"--workdir: {str(workdir)!r} has checkpoints but no config.json to say of which run; put "
                             "it back, or choose another workdir")
    if found := differences(completed(known), config_lib.to_plain(config), free=_free(config)):
      raise errors.UserError(f"--workdir: {str(workdir)!r} holds a run of another config ({found}); choose another "
                             "workdir or that config")
  if write_it:
    try:
      write(workdir, config)
    except errors.NotWritten as e:
      raise errors.UserError(f"--workdir: cannot write to {str(workdir)!r} ({e.__cause__}); {_CHOOSE}") from e


def flat(plain_config, prefix=""):
  """{"a.b": value} of a nested table."""
  found = {}
  for name, value in plain_config.items():
    if isinstance(value, dict):
      found |= flat(value, f"{prefix}{name}.")
    else:
      found[f"{prefix}{name}"] = value
  return found


def _free(config):
  """Starts of the dotted fields that a restart may change."""
  found = list(config_lib.FREE)
  if config.optimizer.schedule == "cosine":
    found.remove("steps")
  for name in _NOUNS:
    if config[name] is not None:
      found += [f"{name}.{k}" for k in config_lib.free_of(config[name])]
  if config.teacher is not None and (own := config.teacher.get("network")) is not None:
    found += [f"teacher.network.{k}" for k in config_lib.free_of(own)]
  return tuple(found)


def differences(old, new, *, free=(), only=None):
  """In words, the fields in which two plain configs differ; "" where they do not.

  Args:
    old, new: of `config.to_plain`.
    free: starts of fields that do not count.
    only: starts of the fields that count alone; None: all.
  """
  old, new = flat(old), flat(new)
  missing = object()
  names = [k for k in sorted(old.keys() | new.keys()) if not k.startswith(free)]
  differ = [k for k in names if (only is None or k.startswith(only)) and old.get(k, missing) != new.get(k, missing)]
  shown = "; ".join(_difference(k, old.get(k, missing), new.get(k, missing), missing) for k in differ[:3])
  return shown + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")


def _difference(name, was, now, missing):
  if now is missing:
    return f"config.{name} was {was!r}, is not there now"
  if was is missing:
    return f"config.{name} is {now!r}, was not there"
  why = ""
  if name == "steps":
    why = ", and a cosine schedule's length is in every step's rate"
  return f"config.{name} is {now!r}, was {was!r}{why}"


def warn_of_other(workdir, config):
  """Warn where `config`, by which a run is drawn from, says otherwise what the weights are than the run's own does."""
  try:
    known = plain(workdir)
  except errors.UserError:
    return
  if known is None:
    return
  meaning = tuple(f"{name}." for name in _MEANING)
  found = differences(completed(known), config_lib.to_plain(config), free=_free(config), only=meaning)
  if found:
    logging.warning("%s was trained otherwise: %s", workdir, found)


def check_teacher(config, field="config.teacher.checkpoint"):
  """Hold what a teacher's workdir says its weights mean against what the run's config takes them for.

  Shapes do not tell a time of 0 to 1 from one of 0 to 1,000, or latents of another scale.

  Raises:
    errors.UserError: they differ.
  """
  workdir = config.teacher.get("checkpoint")
  if not workdir:
    return
  try:
    known = plain(workdir, field)
  except errors.UserError:
    raise
  except Exception:
    return
  if known is None or not isinstance(known.get("network"), dict):
    return
  own = config.teacher.get("network")
  where, noun = ("network", config.network) if own is None else ("teacher.network", own)
  mine = config_lib.to_plain(noun)
  free = ("network.dtype", *(f"network.{k}" for k in config_lib.free_of(noun)))
  # Only fields that both have: a network in the middle of growing adapters has more than its teacher.
  both = mine.keys() & known["network"].keys()
  old = {"network": {k: known["network"][k] for k in both}}
  new = {"network": {k: mine[k] for k in both}}
  if found := differences(old, new, free=free):
    found = found.replace("config.network.", f"config.{where}.")
    raise errors.UserError(f"{field}: {str(workdir)!r} has weights of another network ({found}); set config.{where} to "
                           "the teacher's")
