"""What a good result is, as a config says it in config.evaluation.checks, held against the rows of a report.

A check is (text, metric, row, over, op, bound): the row's metric, or its ratio to that of the row `over` where this is
not "", is to be at most ("<=") or at least (">=") the bound. A row is "student", or a model with its calls,
"teacher@128"; a metric is a key of `metrics.METRICS`:

  ("accuracy of the student's class", "accuracy", "student", "", ">=", 0.94)
  ("Frechet distance over the teacher's at 4 calls", "frechet", "student", "teacher@4", "<=", 0.7)
"""

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax.evaluation import metrics


def validate(checks, names):
  """Raises ValueError("evaluation.checks: ...") for a check that cannot be held against rows of these names.

  Args:
    checks: tuple of checks.
    names: [(model, calls)] of the report's rows.
  """
  if not isinstance(checks, (tuple, list)):
    raise ValueError(f"evaluation.checks: {checks!r} must be a tuple of checks")
  known = sorted({name for model, calls in names for name in (model, f"{model}@{calls}")})
  for i, check in enumerate(checks):
    where = f"evaluation.checks[{i}]"
    if not isinstance(check, (tuple, list)) or len(check) != 6:
      raise ValueError(f"{where}: {check!r} must be (text, metric, row, over, op, bound)")
    _, metric, row, over, op, bound = check
    config_lib.one_of(f"{where}, metric", metric, tuple(metrics.METRICS))
    config_lib.one_of(f"{where}, row", row, known)
    config_lib.one_of(f"{where}, over", over, ("", *known))
    config_lib.one_of(f"{where}, op", op, ("<=", ">="))
    config_lib.number(f"{where}, bound", bound)


def hold(checks, rows):
  """[(text, value, bound in words, passed)] of valid checks; what was not measured has not passed.

  Args:
    checks: see `validate`.
    rows: dicts {"model", "calls", metric: value or None}.
  """
  found = []
  for text, metric, row, over, op, bound in checks:
    value = _find(rows, row)[metric]
    if over and value is not None:
      divisor = _find(rows, over)[metric]
      value = value / divisor if divisor else None
    passed = value is not None and (value <= bound if op == "<=" else value >= bound)
    found.append((text, None if value is None else float(value), f"{op} {bound:g}", bool(np.bool_(passed))))
  return found


def _find(rows, name):
  """The row of a name; of several of one model, the last."""
  return [row for row in rows if name in (row["model"], f"{row['model']}@{row['calls']}")][-1]
