"""Checks of a config against rows: what passes, what falls short, what cannot be a check."""

import pytest

from configs import digits
from piflow_jax.evaluation import checks

NAMES = [("teacher", 128), ("teacher", 4), ("teacher", 2), ("teacher", 1), ("student", 1)]


def _rows(**student):
  row = dict(frechet=1.0, frechet_to_teacher=1.0, accuracy=0.99, diversity=1.0, endpoint_error=0.1)
  return [row | dict(model=model, calls=calls) | (student if model == "student" else {}) for model, calls in NAMES]


def test_the_digits_checks_fail_what_falls_short():
  config = digits.get_config("student")
  checks.validate(config.evaluation.checks, NAMES)
  good = checks.hold(config.evaluation.checks, _rows(frechet=0.6))
  assert len(good) >= 6 and all(passed for *_, passed in good)
  bad = dict(frechet=1.3, frechet_to_teacher=1.1, accuracy=0.5, endpoint_error=0.9)
  for diversity in (0.5, 2.0):
    found = checks.hold(config.evaluation.checks, _rows(**bad, diversity=diversity))
    assert sum(passed for *_, passed in found) == 1  # of the two sides of diversity, one holds
  assert not checks.hold(digits.get_config("teacher").evaluation.checks, [])


def test_a_check_is_of_a_value_or_of_a_ratio():
  rows = _rows(frechet=3.0)
  rows[1]["frechet"] = 4.0
  found = checks.hold((
      ("alone", "frechet", "student", "", "<=", 3), ("ratio", "frechet", "student", "teacher@4", ">=", 0.8),
      ("named", "frechet", "student@1", "teacher@128", "<=", 2.5)), rows)
  assert found == [("alone", 3.0, "<= 3", True), ("ratio", 0.75, ">= 0.8", False), ("named", 3.0, "<= 2.5", False)]


def test_what_was_not_measured_has_not_passed():
  check = (("a", "frechet", "student", "teacher@128", "<=", 9.0),)
  assert checks.hold(check, _rows(frechet=None)) == [("a", None, "<= 9", False)]
  rows = _rows()
  for value in (None, 0.0):
    rows[0]["frechet"] = value
    assert checks.hold(check, rows) == [("a", None, "<= 9", False)]


@pytest.mark.parametrize("check, message", [
    ("accuracy", "must be a tuple of checks"),
    ((("a", "accuracy"),), r"checks\[0\]: .* must be \(text, metric, row, over, op, bound\)"),
    ((3,), r"checks\[0\]"),
    ((("a", "fid", "student", "", "<=", 1),), "metric: 'fid' is none of 'frechet'"),
    ((("a", "frechet", "teacher@64", "", "<=", 1),), "row: 'teacher@64' is none of .*'teacher@128'"),
    ((("a", "frechet", "student", "x", "<=", 1),), "over: 'x' is none of"),
    ((("a", "frechet", "student", "", "==", 1),), "op: '==' is none of '<=', '>='"),
    ((("a", "frechet", "student", "", "<=", float("nan")),), "bound: nan must be a number"),
    ((("a", "frechet", "student", "", "<=", "x"),), "bound: 'x' must be a number"),
])
def test_what_is_no_check_is_refused_in_one_line(check, message):
  with pytest.raises(ValueError, match=message) as error:
    checks.validate(check, NAMES)
  assert str(error.value).startswith("evaluation.checks") and "\n" not in str(error.value)
