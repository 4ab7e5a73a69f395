"""Who is at work in a workdir: that a second program is told, and that a dead one keeps nobody out."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from piflow_jax import errors
from piflow_jax import lock
from tests import fake_gcs
from tests import tiny

_HOLDER = """
import os, sys, time
from piflow_jax import lock
with lock.hold(sys.argv[1]):
  child = os.fork()  # a loader's worker
  if not child:
    time.sleep(600)
  print(child, flush=True)
  time.sleep(600)
"""


def _refused(workdir, process):
  with pytest.raises(errors.UserError) as e, lock.hold(workdir):
    pass
  said = re.fullmatch(rf"--workdir: '{workdir}' is in use by process {process} on (\S+) since \d\d:\d\d; wait for it, "
                      "or stop it", str(e.value))
  assert said and said[1] == os.uname().nodename, str(e.value)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_another_program_is_told_who_and_goes_on_when_that_one_is_dead(tmp_path, end):
  workdir = tmp_path / "run"
  holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(workdir)], cwd=tiny.ROOT, text=True,
                            stdout=subprocess.PIPE, env=tiny.environment(JAX_PLATFORMS="cpu"))
  child = int(holder.stdout.readline())
  try:
    _refused(workdir, holder.pid)
    holder.send_signal(end)
    holder.wait()
    with lock.hold(workdir):  # at once, although the holder's child lives
      _refused(workdir, os.getpid())
  finally:
    holder.kill()
    os.kill(child, signal.SIGKILL)


def test_it_leaves_nothing_and_can_be_had_again(tmp_path):
  for _ in range(2):
    with lock.hold(tmp_path / "a" / "run"):
      assert json.loads((tmp_path / "a" / "run" / "lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / "a" / "run").exists()
  (tmp_path / "run").mkdir()
  with pytest.raises(KeyboardInterrupt), lock.hold(tmp_path / "run"):
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    raise KeyboardInterrupt
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
  with lock.hold(tmp_path / "run"), lock.hold(tmp_path / "other"):
    pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(errors.UserError, match="^--workdir: cannot write to .*; choose a folder that you may write"):
      with lock.hold(workdir):
        pass


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, "_BEAT", 0.2)
  monkeypatch.setattr(lock, "_STALE", 1.5)


@pytest.fixture
def bucket(quick, monkeypatch):
  with fake_gcs.serve() as served:
    for name, value in served.environment.items():
      monkeypatch.setenv(name, value)
    yield served


def _leave(bucket, **holder):
  known = {"host": "far", "process": 7, "since": "2026-01-01 12:03", "machine": "other", "started": 1, "key": "k"}
  with bucket.lock:
    bucket.put("run/lock", json.dumps(known | holder).encode())


def test_in_a_bucket_whoever_renews_it_holds_it(bucket, capsys):
  with lock.hold("gs://bucket/run"):
    before = json.loads(bucket.objects["run/lock"][1])
    _refused("gs://bucket/run", os.getpid())
    assert "held it last; going on if it gives no sign of life for" in capsys.readouterr().out
    assert json.loads(bucket.objects["run/lock"][1])["beat"] > before["beat"]
  assert "run/lock" not in bucket.objects
  with lock.hold("gs://bucket/run"):
    pass


def test_in_a_bucket_a_holder_elsewhere_that_is_silent_is_waited_for_and_then_dead(bucket, capsys):
  _leave(bucket)
  began = time.monotonic()
  with lock.hold("gs://bucket/run"):
    assert time.monotonic() - began > lock._STALE
    assert json.loads(bucket.objects["run/lock"][1])["process"] == os.getpid()
  assert capsys.readouterr().out == (
      "gs://bucket/run: process 7 on far held it last; going on if it gives no sign of life for 2 s\n")


@pytest.mark.parametrize("ended", ["gone", "another of that number"])
def test_in_a_bucket_a_holder_of_this_machine_that_has_ended_is_dead_at_once(bucket, ended, capsys):
  process = subprocess.Popen(["true"]) if ended == "gone" else None
  if process:
    process.wait()
  _leave(bucket, machine=lock._machine(), process=process.pid if process else os.getpid())
  with lock.hold("gs://bucket/run"):
    assert not capsys.readouterr().out


def test_what_is_no_lock_is_one_of_nobody(bucket):
  with bucket.lock:
    bucket.put("run/lock", b"\xff{")
  with lock.hold("gs://bucket/run"):
    pass


def test_who_was_taken_for_dead_ends_when_it_wakes(bucket, monkeypatch):
  said = []
  monkeypatch.setattr(errors, "leave", lambda status, message: said.append((status, message)))
  with lock.hold("gs://bucket/run"):
    _leave(bucket)  # another has it now
    while not said:
      time.sleep(0.05)
  assert said[0][0] == 2 and "was taken over by process 7 on far, because this one gave no sign of life" in said[0][1]
  assert json.loads(bucket.objects["run/lock"][1])["host"] == "far"  # which is not ours to remove


def test_a_bucket_that_cannot_be_written_or_reached_is_told(bucket, monkeypatch):
  bucket.before_write = lambda name: False
  with pytest.raises(errors.UserError, match="^--workdir: cannot write to 'gs://bucket/run' .*create access"):
    with lock.hold("gs://bucket/run"):
      pass
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
  with pytest.raises(errors.UserError, match="^--workdir: cannot write to 'gs://bucket/run' .*connect") as e:
    with lock.hold("gs://bucket/run"):
      pass
  assert len(str(e.value)) < 500


def test_a_disk_without_flock_is_locked_like_a_bucket(quick, tmp_path, monkeypatch):
  def unsupported(*args):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", unsupported)
  with lock.hold(tmp_path):
    _refused(tmp_path, os.getpid())
  with lock.hold(tmp_path):
    pass
  assert not list(tmp_path.iterdir())
