"""What every program shares: flags, --help, configs from files and workdirs, joining processes, exit statuses."""

import importlib.util
import os
import pathlib
import signal
import sys
from typing import Any, Callable, NamedTuple

from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import workdir as workdir_lib

_HEARTBEAT = 60  # seconds without a sign of life after which JAX takes a process for dead


class Program(NamedTuple):
  """A program as the shell starts it."""

  main: Callable  # (Given) -> exit status, or None for 0
  define: Callable = lambda values: None  # FlagValues -> None: defines the program's own flags in them
  doc: str = ""  # what --help begins with
  needs: tuple = ("workdir",)  # flags that must be given
  # "file": --config is needed; "workdir": else the workdir's own; "workdir or none": or none at all; "optional": the
  # file's, or none.
  config: str = "workdir"


class Given(NamedTuple):
  """What the command line gave."""

  config: Any  # locked ConfigDict, or None
  workdir: str | None
  flags: flags.FlagValues
  config_of: Callable  # (name, number) -> the config file's config of that argument, with the command line's values


def run(program, argv=None):
  """Runs a program and ends this process with its status."""
  status, text = invoke(program, sys.argv if argv is None else argv)
  if text:
    if jax.distributed.is_initialized():  # the other processes may know nothing of it, and go on
      errors.leave(status, text)
    print(f"error: {text}", file=sys.stderr, flush=True)
  sys.exit(status)


def invoke(program, argv):
  """(exit status, the error's one line or "") of a program in this process.

  What nobody foresaw is raised: a traceback is for the programmer.
  """
  try:
    if any(word.lstrip("-").split("=")[0] in ("help", "helpfull", "helpshort", "h") and word.startswith("-")
           for word in argv[1:]):
      print(_help(program, argv))
      return 0, ""
    given = parse(program, argv)
    _prepare(given.flags)
    return program.main(given) or 0, ""
  except errors.UserError as e:
    return 2, _line(e)
  except errors.NotFinite as e:
    return 3, _line(e)
  except errors.NotWritten as e:
    errors.leave(2, _line(e))
  except KeyboardInterrupt:
    return errors.INTERRUPTED, "interrupted"
  except ImportError as e:
    if "gcsfs" not in str(e):
      raise
    return 2, "gs:// paths need gcsfs: pip install -e '.[gcs]'"
  except Exception as e:
    if not errors.process_lost(e):
      raise
    errors.leave(errors.RESTART, "another process of this run is gone; start all of them again, they go on from the "
                 f"last checkpoint ({_line(e)[:200]})")


def _line(error):
  return " ".join(str(error).split())


def parse(program, argv):
  """Given, of the command line. Raises errors.UserError."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Folder (or gs:// path) of the run.", flag_values=values)
  flags.DEFINE_string("distributed", None, "Join the processes of a TPU pod, of SLURM or the like: auto. Or "
                      "HOST:PORT,INDEX,COUNT.", flag_values=values)
  flags.DEFINE_integer("verbosity", None, "Of the libraries' messages: 0 warnings, 1 information.", flag_values=values)
  program.define(values)
  path, rest = _take_config(argv)
  rest = [_spelled(word, values) for word in rest]
  overrides = [word for word in rest[1:] if word.startswith(("--config.", "-config.", "--noconfig."))]
  workdir = _value_of(rest, "workdir")
  config = None
  if path is not None:
    config = load(path)
  elif program.config.startswith("workdir") and workdir:
    config = workdir_lib.read(workdir_lib.path_of(workdir))
  if config is None and overrides:
    own = " or a --workdir that has a config.json" if program.config.startswith("workdir") else ""
    where = f"--config=FILE{own}"
    raise errors.UserError(f"{overrides[0]}: there is no config to set it in; give {where} before it")
  for word in overrides:
    _check_override(config, word.lstrip("-").removeprefix("noconfig.").removeprefix("config.").partition("=")[0])
  try:
    if config is not None:
      config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=rest)
    left = values(rest)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    lines = str(e).strip().splitlines()
    raise errors.UserError(lines[0] if lines else type(e).__name__) from e
  if len(left) > 1:
    raise errors.UserError(f"{left[1]}: not understood; options are written --name=value")
  needs = program.needs + (("config",) if program.config == "file" else ())
  for name in dict.fromkeys(needs):
    if (path if name == "config" else values[name].value) is None:
      raise errors.UserError(f"--{name}: missing; {_needed(name, values)}")
  if values.workdir is not None:
    values.workdir = workdir_lib.path_of(values.workdir)
  if config is None and program.config == "workdir":
    raise errors.UserError("--workdir: missing; give a run's folder")
  set_here = {word.lstrip("-").removeprefix("config.").partition("=")[0] for word in overrides}
  return Given(config, values.workdir, values, _config_of(path, config, set_here))


def _needed(name, values):
  if name == "config":
    return "name a config file, e.g. --config=configs/digits.py:teacher"
  return values[name].help.strip()


def _prepare(values):
  """Quiet libraries, simulated devices that cannot lock one another up, other processes."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])  # absl's own, and grain's, ask for it
  logging.use_absl_handler()
  if values.verbosity is None:
    errors.quiet()
  logging.set_verbosity(logging.WARNING if values.verbosity is None else values.verbosity)
  # Simulated devices wait in a collective each in a thread of XLA's pool; with one thread a device, the default,
  # collectives that run side by side lock one another up for good.
  if jax.config.jax_num_cpu_devices > 1:
    os.environ.setdefault("NPROC", str(max(os.cpu_count(), 4 * jax.config.jax_num_cpu_devices)))
  if values.distributed:
    join(values.distributed)


def join(how):
  """Make this process one of several; before anything touches a device. Raises errors.UserError."""
  if how == "auto":
    where = {}
  else:
    address, *numbers = how.split(",")
    good = len(numbers) == 2 and all(n.isdigit() for n in numbers) and ":" in address
    if not good or int(numbers[0]) >= int(numbers[1]):
      raise errors.UserError(f"--distributed: {how!r} is neither auto nor HOST:PORT,INDEX,COUNT with INDEX below COUNT")
    where = dict(coordinator_address=address, process_id=int(numbers[0]), num_processes=int(numbers[1]))
  # JAX aborts where its own thread learns that a process is gone: a dump of all threads would drown its one line.
  signal.signal(signal.SIGABRT, signal.SIG_DFL)
  try:
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=_HEARTBEAT)
  except (RuntimeError, ValueError) as e:
    raise errors.UserError(f"--distributed: {how}: {str(e).splitlines()[0]}") from e


def load(path):
  """The config of FILE or FILE:ARGUMENT. Raises errors.UserError: there is none, or it is wrong."""
  file, colon, argument = path.partition(":")
  config = _call(_module(file), path, *([argument] if colon else []))
  return config.lock()


def _module(file):
  """A config file as a module; what lies beside it can be imported, and so can the file, by its name."""
  found = pathlib.Path(file).expanduser()
  if not found.is_file():
    raise errors.UserError(f"--config: {file!r} is not there; give a config file, e.g. configs/digits.py:teacher")
  folder, name = str(found.resolve().parent), found.stem
  if folder not in sys.path:
    sys.path.append(folder)
  known = sys.modules.get(name)
  if known is not None and pathlib.Path(getattr(known, "__file__", None) or "").resolve() == found.resolve():
    return known
  if known is not None or not name.isidentifier() or _another(name, found):
    name = f"config_{abs(hash(str(found.resolve())))}"
  spec = importlib.util.spec_from_file_location(name, found)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except Exception as e:
    del sys.modules[name]
    raise errors.UserError(f"--config: {file}: {_reason(e, found)}") from e
  return module


def _another(name, found):
  try:
    spec = importlib.util.find_spec(name)
  except (ImportError, ValueError):
    return False
  return spec is not None and pathlib.Path(spec.origin or "").resolve() != found.resolve()


def _reason(error, file):
  """Line and cause of an error in a config file."""
  lines, trace = [], error.__traceback__
  while trace is not None:
    if pathlib.Path(trace.tb_frame.f_code.co_filename).resolve() == pathlib.Path(file).resolve():
      lines.append(trace.tb_lineno)
    trace = trace.tb_next
  where = f"line {lines[-1]}: " if lines else ""
  return f"{where}{type(error).__name__}: {error}"


def _call(module, path, *argument):
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"--config: {path} has no get_config(); give a config file")
  try:
    config = module.get_config(*argument)
  except Exception as e:
    if isinstance(e, ValueError) and "choose" in str(e):  # the file's own words on its argument
      raise errors.UserError(f"--config: {e}") from e
    raise errors.UserError(f"--config: {path}: {_reason(e, module.__file__)}") from e
  if not hasattr(config, "lock"):
    raise errors.UserError(f"--config: {path}: get_config() returned {type(config).__name__}; return "
                           "piflow_jax.config.base() with its fields set")
  return config


def _config_of(path, config, names):
  """(name, number) -> config of NAME,NUMBER from the same file, with what the command line sets."""
  def config_of(name, number):
    file = path.partition(":")[0]
    try:
      found = load(f"{file}:{name},{number}")
    except errors.UserError as e:
      raise errors.UserError(f"--config: {file} with the argument {name},{number}: {e}") from e
    for dotted in names:
      if _has(found, dotted):
        found.update_from_flattened_dict({dotted: config_lib.field(config, dotted)})
    return found

  return config_of


def _has(config, dotted):
  for name in dotted.split("."):
    if not hasattr(config, "keys") or name not in config:
      return False
    config = config[name]
  return True


def _spelled(word, values):
  """A word of the command line as absl knows it: --teacher-steps=4 as --teacher_steps=4, --no-mirror as --nomirror."""
  name, equals, value = word.partition("=")
  known = name.replace("-", "_").lstrip("_")
  if name.startswith("--") and known in values:
    return f"--{known}{equals}{value}"
  if name.startswith("--no-") and known.removeprefix("no_") in values:
    return f"--no{known.removeprefix('no_')}{equals}{value}"
  return word


def _take_config(argv):
  """(value of --config or None, the command line without it)."""
  rest, path, words = argv[:1], None, iter(argv[1:])
  for word in words:
    if word in ("--config", "-config"):
      path = next(words, "")
    elif word.startswith(("--config=", "-config=")):
      path = word.partition("=")[2]
    else:
      rest.append(word)
  return path, rest


def _value_of(argv, name):
  """The value of a flag before all flags are defined."""
  found = None
  for word, after in zip(argv[1:], [*argv[2:], None]):
    if word in (f"--{name}", f"-{name}"):
      found = after
    elif word.startswith((f"--{name}=", f"-{name}=")):
      found = word.partition("=")[2]
  return found


def _check_override(config, dotted):
  """Raises errors.UserError: there is no such field to set on the command line."""
  node, told = config, "config"
  *parents, last = dotted.split(".")
  for name in (*parents, last):
    if node is None:
      raise errors.UserError(f"--config.{dotted}: {told} is not set in this config; a config file sets it")
    if not hasattr(node, "keys"):
      raise errors.UserError(f"--config.{dotted}: {told} is {node!r}, which has no fields")
    if name not in node:
      fields = [k for k in node if k != "make"]
      raise errors.UserError(f"--config.{dotted}: {told} has no field {name!r}, only {', '.join(fields)}")
    node, told = node[name], f"{told}.{name}"
  if node is None:
    raise errors.UserError(f"--config.{dotted}: is for a noun, which a config file sets to what a config() returns")
  if hasattr(node, "keys") or last == "make" or callable(node):
    raise errors.UserError(f"--config.{dotted}: a function, or a noun with its fields, is set in a config file")


def whole_numbers(values, name):
  """The values of a list flag as ascending integers. Raises errors.UserError."""
  value = values[name].value
  if not value or not all(n.isdigit() and int(n) for n in value):
    raise errors.UserError(f"--{name}: {','.join(value) or 'nothing'}; give positive whole numbers, as in 1,2,4")
  return sorted({int(n) for n in value})


def check_file(values, name):
  """Raises errors.UserError: what a flag names cannot be written, before the work whose outcome it would hold."""
  path = os.path.expanduser(values[name].value)
  if os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
    raise errors.UserError(f"--{name}: {values[name].value!r} cannot be written; name a file in a folder that you may "
                           "write")


def _help(program, argv):
  """The program's text, its flags, and every field of the config given."""
  values = flags.FlagValues()
  program.define(values)
  lines = [program.doc.strip(), "", "Flags:"]
  config_text = {"file": "Config file, e.g. configs/digits.py:student.",
                 "workdir": "Config file; the workdir's own where there is none.",
                 "workdir or none": "Config file; the workdir's own where there is none.",
                 "optional": "Config file, where one is needed."}[program.config]
  own = [("config", config_text), ("config.FIELD", "Sets a field of the config; all are listed below."),
         ("workdir", "Folder (or gs:// path) of the run."),
         ("distributed", "Join the processes of a TPU pod, of SLURM or the like: auto. Or HOST:PORT,INDEX,COUNT.")]
  own += [(name, values[name].help) for name in values]
  lines += [f"  --{name}: {' '.join(text.split())}" for name, text in own]
  path, rest = _take_config(argv)
  workdir = _value_of(rest, "workdir")
  if path is not None:
    config, where = load(path), path
  elif workdir and program.config.startswith("workdir"):
    config, where = workdir_lib.read(workdir_lib.path_of(workdir)), workdir
  else:
    config, where = config_lib.base(), "every config; give --config=FILE to see its nouns' fields too"
  lines += ["", f"Fields of {where}:"]
  rows = [(f"--config.{name}{_shown(value)}", comment) for name, value, comment in config_lib.described(config)]
  width = min(max(len(left) for left, _ in rows), 52)
  lines += [f"  {left:<{width}}  {comment}".rstrip() for left, comment in rows]
  return "\n".join(lines)


def _shown(value):
  text = "" if value is None else f"={value!r}"
  return text if len(text) < 60 else "=..."
