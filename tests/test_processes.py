"""Several processes of one run, as launch/local.sh starts them: the numbers of one process, through any end of one."""

import os
import pathlib
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from piflow_jax import checkpoint
from tests import tiny

pytestmark = pytest.mark.slow
STEPS = 40
FIELDS = ["--config.steps=40", "--config.checkpoint_every=5", "--config.mesh.data=2", "--config.mesh.fsdp=4"]


def _start(workdir, processes, devices, *arguments):
  env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
  command = tiny.command("teacher", workdir, *FIELDS, *arguments)
  return subprocess.Popen(["launch/local.sh", str(processes), str(devices), *command], cwd=tiny.ROOT, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def _finish(process, timeout=240):
  try:
    out = process.communicate(timeout=timeout)[0]
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
  # Gloo greets.
  return process.returncode, "\n".join(line for line in out.splitlines() if "[Gloo]" not in line)


def _workers(process):
  """Process ids of the training programs, by number."""
  found = {}
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().decode().split("\0")
    except OSError:
      continue
    which = [re.search(r"--distributed=.*,(\d+),\d+", word) for word in words]
    if any(which) and os.getpgid(int(path.parent.name)) == process.pid and "bash" not in words[0]:
      found[int(next(filter(None, which))[1])] = int(path.parent.name)
  return found


def _wait_for_step(workdir, step, process):
  for _ in range(1200):
    if process.poll() is not None:
      raise AssertionError(f"ended early: {process.stdout.read()}")
    if any(line["step"] >= step for line in _metrics(workdir)):
      return
    time.sleep(0.1)
  raise AssertionError(f"step {step} was not reached")


def _metrics(workdir):
  return tiny.metrics(workdir) if (workdir / "metrics.jsonl").exists() else []


def _weights(workdir):
  with checkpoint.open_weights(workdir, "params", "--workdir") as (shapes, read):
    return {path: read(path) for path in shapes}


def _same(a, b):
  a, b = _weights(a), _weights(b)
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The workdir of the run of two processes that nobody disturbs."""
  workdir = tmp_path_factory.mktemp("processes") / "alone"
  status, out = _finish(_start(workdir, 2, 4))
  assert status == 0, out
  return workdir


def test_two_processes_are_one(alone, tmp_path):
  status, out = _finish(_start(tmp_path / "one", 1, 8))
  assert status == 0, out
  two, one = _metrics(alone), _metrics(tmp_path / "one")
  assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, STEPS + 1))
  # Sums of floats run in another order; forty updates on.
  np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)
  two, one = _weights(alone), _weights(tmp_path / "one")
  for path in one:
    np.testing.assert_allclose(two[path], one[path], atol=2e-3 * np.abs(one[path]).max(), err_msg=path)


def test_a_notice_to_one_saves_on_all_at_one_step(alone, tmp_path):
  process = _start(tmp_path / "run", 2, 4)
  _wait_for_step(tmp_path / "run", 8, process)
  os.kill(_workers(process)[1], signal.SIGTERM)
  status, out = _finish(process)
  assert status == 75 and "Traceback" not in out, out
  stopped = _metrics(tmp_path / "run")[-1]["step"]
  assert stopped < STEPS and f"stopped by a signal at step {stopped}, saved" in out
  status, out = _finish(_start(tmp_path / "run", 2, 4))
  assert status == 0 and f"going on from step {stopped} of {STEPS}" in out, out
  _same(tmp_path / "run", alone)
  assert _metrics(tmp_path / "run") == _metrics(alone)


def test_one_that_dies_ends_the_others_with_a_word(alone, tmp_path):
  process = _start(tmp_path / "run", 2, 4)
  _wait_for_step(tmp_path / "run", 8, process)
  os.kill(_workers(process)[1], signal.SIGKILL)
  began = time.time()
  status, out = _finish(process, timeout=120)
  assert status != 0 and time.time() - began < 100, out
  assert "error: " in out and "one of 2 processes is gone; start all of them again" in out, out
  status, out = _finish(_start(tmp_path / "run", 2, 4))
  assert status == 0 and "going on from step" in out, out
  _same(tmp_path / "run", alone)


def test_bad_calls_are_told(tmp_path):
  for how in ("somewhere", "127.0.0.1:1,2,2", "127.0.0.1,0,1"):
    status, _, err = tiny.run(tiny.command("teacher", tmp_path / "run", f"--distributed={how}"))
    assert status == 2 and len(err.strip().splitlines()) == 1 and f"--distributed: '{how}'" in err, err
  called = subprocess.run([tiny.ROOT / "launch" / "local.sh", "0", "4", "x"], capture_output=True, text=True)
  assert called.returncode == 2 and "launch/local.sh PROCESSES DEVICES_EACH COMMAND" in called.stdout
