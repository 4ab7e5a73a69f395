"""What a user can mend: told in one line, without a traceback."""


class UserError(Exception):
  """Bad input: the field, what is wrong with it, what to do."""


class ProcessLost(Exception):
  """Another process of this run is gone: all have to start again."""


class NotFinite(Exception):
  """A loss that is no number: the run stops, its last good checkpoint stays."""
