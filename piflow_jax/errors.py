"""What a user can mend, or a restart: told in one line, without a traceback."""

import contextlib
import os
import re
import sys

import jax


class UserError(Exception):
  """Bad input: the field, what is wrong with it, what to do."""


class NotFinite(Exception):
  """A loss, or parameters, that are no numbers: the run stops, its last good checkpoint stays."""


class NotWritten(Exception):
  """What a run makes could not be stored: a full disk, a permission that is gone. What was stored before is kept."""


@contextlib.contextmanager
def storing(what):
  """Failures of the storage in the block, of whatever library and type, as NotWritten: `what` (with its place) and why."""
  try:
    yield
  except Exception as e:
    if isinstance(e, NotWritten) or process_lost(e):
      raise
    raise NotWritten(f"{what} could not be written ({_reason(e)}); what was written before is kept: when there is space and "
                     "permission again, the same command goes on from the last checkpoint") from e


def _reason(error):
  # TensorStore tells the whole path down to the cause, which comes last, and then all of its own settings.
  text = " ".join(re.split(r" \[\w+='", str(error))[0].split()) or type(error).__name__
  return text if len(text) < 300 else f"{text[:100]} ... {text[-190:]}"


def leave(status, message):
  """Say it and end at once: an orderly exit would wait for other processes, or try a failed write again."""
  # On a line of its own: a progress bar, or what the library that failed had to say, may have left one unfinished.
  print(f"\nerror: {message}", file=sys.stderr, flush=True)
  os._exit(status)


def process_lost(error):
  """Whether an error is what the death of another process looks like: a collective or a barrier that failed."""
  while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
    error = error.__cause__ or error.__context__
  mine = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # starting again would not help
  return error is not None and jax.distributed.is_initialized() and not str(error).startswith(mine)
