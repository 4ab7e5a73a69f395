"""What a user can mend, or a restart: told in one line, without a traceback."""

import jax


class UserError(Exception):
  """Bad input: the field, what is wrong with it, what to do."""


class NotFinite(Exception):
  """A loss that is no number: the run stops, its last good checkpoint stays."""


def process_lost(error):
  """Whether an error is what the death of another process looks like: a collective or a barrier that failed."""
  while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
    error = error.__cause__ or error.__context__
  mine = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # starting again would not help
  return error is not None and jax.distributed.is_initialized() and not str(error).startswith(mine)
