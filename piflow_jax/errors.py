"""What a user can mend: told in one line, without a traceback."""


class UserError(Exception):
  """Bad input: the field, what is wrong with it, what to do."""


class NotFinite(Exception):
  """A loss that is no number: the run stops, its last good checkpoint stays."""
