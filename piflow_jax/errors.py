"""Failures that a user or a restart can mend: one line each, without a traceback or what libraries print beside it."""

import contextlib
import os
import re
import sys

from absl import logging
import jax

RESTART = 75  # exit status: stopped by a signal, all saved, start me again (sysexits' EX_TEMPFAIL)
INTERRUPTED = 130  # exit status: by a second Ctrl-C, or by one before there was anything to save

# Libraries that log a failure of the storage, by pages, and raise it too.
_LOUD = re.compile(r"[/\\](orbax|gcsfs|fsspec|aiohttp|asyncio|tensorstore)[/\\]")


class UserError(Exception):
  """Bad input: the field, what is wrong with it, what to do."""


class NotFinite(Exception):
  """A loss or a parameter is NaN or infinite: the run stops and its last good checkpoint stays."""


class NotWritten(Exception):
  """Storage refused what a run wrote: a full disk, a lost permission. Earlier checkpoints are kept."""


@contextlib.contextmanager
def flag(name):
  """A library function's ValueError("argument: what") as UserError("--name: what")."""
  try:
    yield
  except ValueError as e:
    raise UserError(f"--{name}: {str(e).partition(': ')[2] or e}") from e


@contextlib.contextmanager
def storing(what):
  """Turn the block's storage failures, of whatever library and type, into NotWritten; `what` names thing and place."""
  try:
    yield
  except Exception as e:
    if isinstance(e, NotWritten) or process_lost(e):
      raise
    raise NotWritten(f"{what} could not be written ({reason(e)}); what was written before is kept: when there is space "
                     "and permission again, the same command goes on from the last checkpoint") from e


def reason(error):
  """An error's text as a part of one line."""
  # TensorStore's text goes from the path to the cause and ends in a list of its settings: keep both ends, not the list.
  text = " ".join(re.split(r" \[\w+='", str(error))[0].split()) or type(error).__name__
  return text if len(text) < 300 else f"{text[:100]} ... {text[-190:]}"


def leave(status, message):
  """Print a message and end the process at once.

  An orderly exit would wait for other processes, or repeat a write that failed.
  """
  # Starts with a line break: a progress bar, or the library that failed, may have left its own line unfinished.
  print(f"\nerror: {message}", file=sys.stderr, flush=True)
  os._exit(status)


def process_lost(error):
  """Whether an error means that another process died: JAX raises it from a collective or a barrier."""
  while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
    error = error.__cause__ or error.__context__
  mine = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # starting again would not help
  return error is not None and jax.distributed.is_initialized() and not str(error).startswith(mine)


def quiet():
  """Keep libraries' words from a user's terminal: their warnings, and their pages about failures that they also raise.

  Their errors about other things stay, and so does all that this package logs. For programs, not for --verbosity.
  """
  # On the handler: a filter on absl's logger would not see what gcsfs and asyncio log, which comes by the root logger.
  logging.get_absl_handler().addFilter(_shown)
  sys.unraisablehook = _unraisable


def _unraisable(what):
  # When a write fails Orbax closes its event loop, and TensorStore then reports every other write to it in vain.
  if str(what.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(what)


def _shown(record):
  if "piflow_jax" in record.pathname:
    return True
  return record.levelno >= logging.converter.STANDARD_ERROR and not _LOUD.search(record.pathname)
