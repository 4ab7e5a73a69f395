"""launch/local.sh by itself: numbers that it refuses, its status, and that it leaves nothing behind."""

import os
import subprocess

import pytest

from tests import tiny

# Ends with the status of the environment's FIRST in process 0; the other one would go on for a minute.
_COMMAND = ["bash", "-c", 'touch "$MARK"; [[ $0 == *,0,2 ]] && exit "$FIRST"; exec sleep 60']


def _run(mark, *numbers, command=_COMMAND, **env):
  return subprocess.run(
      [tiny.ROOT / "launch" / "local.sh", *numbers, *command], capture_output=True, text=True, timeout=50,
      env={**os.environ, "MARK": str(mark), "FIRST": "3"} | env)


@pytest.mark.parametrize("numbers, grace, words", [
    (("2", "1"), "abc", "GRACE: 'abc'"), (("2", "1"), "-5", "GRACE: '-5'"), (("2", "1"), "1 2", "GRACE: '1 2'"),
    (("2", "1"), "0", "GRACE: '0'"), (("2", "1"), "1.5", "GRACE: '1.5'"), (("2", "1"), "9" * 20, "GRACE: '999"),
    (("0", "1"), "5", "PROCESSES: '0'"), (("2x", "1"), "5", "PROCESSES: '2x'"),
    (("9" * 20, "1"), "5", "PROCESSES: '999"),
    (("2", "-1"), "5", "DEVICES_EACH: '-1'"), (("2", "a[$(touch x)]"), "5", "DEVICES_EACH: 'a[")])
def test_a_wrong_number_is_refused_in_one_line_before_anything_runs(tmp_path, numbers, grace, words):
  called = _run(tmp_path / "mark", *numbers, GRACE=grace)
  assert called.returncode == 2 and not called.stdout and len(called.stderr.splitlines()) == 1
  assert called.stderr.startswith(f"launch/local.sh: {words}") and not (tmp_path / "mark").exists()


def test_without_a_command_it_says_how_it_is_called(tmp_path):
  called = _run(tmp_path / "mark", "2", "1", command=())
  assert called.returncode == 2 and "launch/local.sh PROCESSES DEVICES_EACH COMMAND" in called.stdout


def test_who_waits_for_a_dead_one_longer_than_grace_is_killed(tmp_path):
  called = _run(tmp_path / "mark", "2", "1", GRACE="1")
  assert called.returncode == 3 and "a process died 1 seconds ago and others still wait for it: killed" in called.stderr
  assert "[0] ended with status 3" in called.stderr and "[1] ended with status 137" in called.stderr
