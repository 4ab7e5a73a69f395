"""Train a teacher or a student.

  python -m piflow_jax.main --config=configs/digits.py:teacher --workdir=runs/digits/teacher
  python -m piflow_jax.main --config=configs/digits.py:student --workdir=runs/digits/student

Numbers and texts of the config can be set on the command line: --config.batch_size=64 --config.optimizer.learning_rate=1e-4.
configs/base.py lists them all. The same command with the same --workdir goes on where it was.
On several hosts every one runs the same command with --distributed=auto (launch/ has scripts that do).
Exit status: 0 done; 2 bad input, or a workdir that cannot be written any more; 3 a loss, or parameters, not finite; 75 start again: stopped
by SIGTERM with everything saved, or another process is gone. That may also end in JAX aborting (134), with a line of its own:
whatever a signal ended is to be started again too.
"""

import importlib.util
import os
import signal
import sys

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from piflow_jax import errors
from piflow_jax import train_loop

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/digits.py:student.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder (or gs:// path) of this run: checkpoints, metrics, pictures.")
DISTRIBUTED = flags.DEFINE_string(
    "distributed", None, "Join the processes of a TPU pod, of SLURM or the like: auto. Or say HOST:PORT,INDEX,COUNT.")
_HEARTBEAT = 60  # seconds without a sign of life after which a process is taken for dead


def _main(argv):
  del argv
  return train_loop.train(CONFIG.value, WORKDIR.value)


def join(how):
  """Make this process one of several; before anything touches a device. Raises errors.UserError."""
  if how == "auto":
    where = {}
  else:
    address, *numbers = how.split(",")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or int(numbers[0]) >= int(numbers[1]) or ":" not in address:
      raise errors.UserError(f"--distributed: {how!r} is neither auto nor HOST:PORT,INDEX,COUNT with INDEX below COUNT")
    where = dict(coordinator_address=address, process_id=int(numbers[0]), num_processes=int(numbers[1]))
  # JAX aborts where its own thread learns that a process is gone: its line of words would drown in a dump of all threads.
  signal.signal(signal.SIGABRT, signal.SIG_DFL)
  try:
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=_HEARTBEAT)
  except (RuntimeError, ValueError) as e:
    raise errors.UserError(f"--distributed: {how}: {str(e).splitlines()[0]}") from e


def whole_numbers(flag):
  """The values of a list flag as ascending integers. Raises errors.UserError."""
  if not flag.value or not all(n.isdigit() and int(n) for n in flag.value):
    raise errors.UserError(f"--{flag.name}: {','.join(flag.value) or 'nothing'}; give positive whole numbers, as in 1,2,4")
  return sorted({int(n) for n in flag.value})


def check_file(flag):
  """Raises errors.UserError: what a flag names cannot be written, told before the work whose outcome it would hold."""
  if os.path.isdir(flag.value) or not os.access(os.path.dirname(os.path.abspath(flag.value)), os.W_OK):
    raise errors.UserError(f"--{flag.name}: {flag.value!r} cannot be written; name a file in a folder that you may write")


def configs_of(holder):
  """(name, number) -> config of NAME,NUMBER, from the file of --config and with what the command line sets.

  Raises:
    errors.UserError: the file takes no such argument.
  """
  flag = flags.FLAGS[holder.name]
  path = config_flags.get_config_filename(flag)
  overrides = config_flags.get_override_values(flag)
  path = path.partition(":")[0]
  spec = importlib.util.spec_from_file_location("configs_of", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def config_of(name, number):
    try:
      config = module.get_config(f"{name},{number}")
    except (ValueError, TypeError) as e:
      raise errors.UserError(f"--config: {path} with the argument {name},{number}: {e}") from e
    config.update_from_flattened_dict(overrides)
    return config

  return config_of


def run(main, required=("config", "workdir")):
  """absl's app.run with bad input told in one line: for every program of the package."""
  flags.mark_flags_as_required(required)

  def parse(argv):
    try:
      rest = flags.FLAGS(argv)
      if CONFIG.value is not None:
        CONFIG.value.seed  # a config file that is missing only says so when it is used
      return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
      lines = str(e).strip().splitlines()
      # Of an error inside a config file absl gives the whole traceback: its head names the file, its end the reason.
      _fail(2, f"{lines[0]} {lines[1]} {lines[-1]}" if "Traceback" in str(e) else e)

  def guarded(argv):
    if not flags.FLAGS["verbosity"].present:
      # The libraries' warnings are theirs; ours are the user's.
      logging.get_absl_logger().addFilter(lambda r: r.levelno >= logging.converter.STANDARD_ERROR or "piflow_jax" in r.pathname)
      logging.set_verbosity(logging.WARNING)
    try:
      if len(argv) > 1:
        raise errors.UserError(f"{argv[1]}: not understood; options are written --name=value")
      # Simulated devices wait in a collective each in a thread of XLA's pool; with one thread a device, the default, collectives
      # that run side by side lock one another up for good.
      if jax.config.jax_num_cpu_devices > 1:
        os.environ.setdefault("NPROC", str(max(os.cpu_count(), 4 * jax.config.jax_num_cpu_devices)))
      if DISTRIBUTED.value:
        join(DISTRIBUTED.value)
      sys.exit(main(argv))
    except errors.UserError as e:
      _fail(2, e)
    except errors.NotFinite as e:
      _fail(3, e)
    except errors.NotWritten as e:
      errors.leave(2, e)
    except ImportError as e:
      if "gcsfs" not in str(e):
        raise
      _fail(2, "gs:// paths need gcsfs: pip install -e '.[gcs]'")
    except Exception as e:
      if not errors.process_lost(e):
        raise
      errors.leave(train_loop.RESTART, "another process of this run is gone; start all of them again, they go on from the last "
                   f"checkpoint ({' '.join(str(e).split())[:200]})")

  app.run(guarded, flags_parser=parse)


def _fail(status, error):
  if jax.distributed.is_initialized():  # the others may know nothing of it, and go on
    errors.leave(status, " ".join(str(error).split()))
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
  sys.exit(status)


if __name__ == "__main__":
  run(_main)
