"""Several processes of one run, as launch/local.sh starts them: the numbers of one process, through any end of one."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from piflow_jax import checkpoint
from piflow_jax import train_loop
from tests import chaos
from tests import group
from tests import tiny

pytestmark = pytest.mark.slow
STEPS = 40
# Every process holds, writes and reads a half of the state.
FIELDS = ["--config.steps=40", "--config.checkpoint_every=5", "--config.mesh.data=1", "--config.mesh.fsdp=8"]


def _start(workdir, processes, devices, *arguments):
  return group.start(workdir, processes, devices, *FIELDS, *arguments)


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
  status, out = group.finish(_start(workdir, 2, 4))
  assert status == 0, out
  return workdir


def test_two_processes_are_one(alone, tmp_path):
  status, out = group.finish(_start(tmp_path / "one", 1, 8))
  assert status == 0, out
  two, one = _metrics(alone), _metrics(tmp_path / "one")
  assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, STEPS + 1))
  # Sums of floats run in another order; forty updates on.
  np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)
  two, one = _weights(alone), _weights(tmp_path / "one")
  for path in one:
    np.testing.assert_allclose(two[path], one[path], atol=2e-3 * np.abs(one[path]).max(), err_msg=path)


@pytest.mark.parametrize("data, fsdp, tensor", [(2, 4, 1), (1, 1, 8)])
def test_whatever_processes_split_they_see_the_same_rows(data, fsdp, tensor, tmp_path):
  fields = [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}",
            "--config.network.heads=8", "--config.steps=2"]
  losses = []
  for processes in (1, 2):
    workdir = tmp_path / str(processes)
    status, out = group.finish(_start(workdir, processes, 8 // processes, *fields))
    assert status == 0, out
    losses.append([line["loss"] for line in _metrics(workdir)])
  # Sums of floats run in another order.
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_one_process_cannot_do_ends_all_and_is_no_reason_to_start_again(tmp_path):
  # Only the first process writes the config.
  (tmp_path / "run" / "config.json.tmp").mkdir(parents=True)
  began = time.time()
  status, out = group.finish(_start(tmp_path / "run", 2, 4))
  assert status == 2 and "error: --workdir" in out and time.time() - began < 100, out


def test_a_notice_to_one_saves_on_all_at_one_step(alone, tmp_path):
  process = _start(tmp_path / "run", 2, 4)
  _wait_for_step(tmp_path / "run", 8, process)
  os.kill(group.workers(process)[1], signal.SIGTERM)
  status, out = group.finish(process)
  assert status == 75 and "Traceback" not in out, out
  stopped = _metrics(tmp_path / "run")[-1]["step"]
  assert stopped < STEPS and f"stopped by a signal at step {stopped}, saved" in out
  status, out = group.finish(_start(tmp_path / "run", 2, 4))
  assert status == 0 and f"going on from step {stopped} of {STEPS}" in out, out
  _same(tmp_path / "run", alone)
  assert _metrics(tmp_path / "run") == _metrics(alone)


def test_a_notice_before_the_first_step_of_a_later_session_is_heard(alone, tmp_path):
  shutil.copytree(alone, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
  process = _start(tmp_path / "run", 2, 4)
  while "going on from step" not in (line := process.stdout.readline()):
    assert line, "ended early"
  os.kill(group.workers(process)[0], signal.SIGTERM)
  status, out = group.finish(process)
  assert status == 75 and f"stopped by a signal at step {STEPS - 3}, saved" in out, out


def test_one_that_dies_ends_the_others_with_a_word(alone, tmp_path):
  process = _start(tmp_path / "run", 2, 4)
  _wait_for_step(tmp_path / "run", 12, process)
  os.kill(group.workers(process)[1], signal.SIGKILL)
  began = time.time()
  status, out = group.finish(process, timeout=120)
  # Mostly within a second. After about one death in five a receive of Gloo's waits for ever: JAX's heartbeats end that, and a save.
  assert status == 75 and time.time() - began < 100, out
  statuses, problems = chaos.verdict(status, out, hit=[1])
  assert statuses[0] != 0 and not problems, out
  status, out = group.finish(_start(tmp_path / "run", 2, 4))
  assert status == 0 and "going on from step" in out, out
  _same(tmp_path / "run", alone)


def test_both_pass_over_a_checkpoint_that_one_cannot_read(alone, tmp_path):
  shutil.copytree(alone, tmp_path / "run")
  parts = tmp_path / "run" / "checkpoints" / str(STEPS) / "state"
  largest = max((p for p in parts.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  status, out = group.finish(_start(tmp_path / "run", 2, 4))
  assert status == 0 and f"going on from step {STEPS - 5} of {STEPS}" in out, out
  assert (tmp_path / "run" / "checkpoints" / f"torn_{STEPS}").exists()
  _same(tmp_path / "run", alone)


def test_a_run_goes_on_on_another_mesh_and_then_on_two_processes(tmp_path):
  # The same sums in another order, a few updates on: the loss's own float32 rounding is 1e-7, the rest is what Adam made of
  # gradients' rounding in the updates before, which grows with their number.
  fsdp, both = dict(mesh__data=1, mesh__fsdp=8), dict(mesh__data=2, mesh__fsdp=4)
  assert train_loop.train(tiny.config("teacher", steps=9, **fsdp), tmp_path / "alone") == 0
  assert train_loop.train(tiny.config("teacher", steps=3, **fsdp), tmp_path / "moved") == 0
  assert train_loop.train(tiny.config("teacher", steps=6, **both), tmp_path / "moved") == 0
  status, out = group.finish(group.start(
      tmp_path / "moved", 2, 4, "--config.steps=9", "--config.mesh.data=2", "--config.mesh.fsdp=4"))
  assert status == 0 and "going on from step 6 of 9" in out, out
  alone, moved = ([line["loss"] for line in _metrics(tmp_path / name)] for name in ("alone", "moved"))
  assert len(alone) == 9
  np.testing.assert_allclose(moved, alone, rtol=1e-5)


def test_bad_calls_are_told(tmp_path):
  for how in ("somewhere", "127.0.0.1:1,2,2", "127.0.0.1,0,1"):
    status, _, err = tiny.run(tiny.command("teacher", tmp_path / "run", f"--distributed={how}"))
    assert status == 2 and len(err.strip().splitlines()) == 1 and f"--distributed: '{how}'" in err, err
  called = subprocess.run([tiny.ROOT / "launch" / "local.sh", "0", "4", "x"], capture_output=True, text=True)
  assert called.returncode == 2 and "launch/local.sh PROCESSES DEVICES_EACH COMMAND" in called.stdout


def test_killed_at_random_moments_it_is_the_run_left_alone(tmp_path):
  # `make chaos` kills it twenty times.
  assert chaos.run(kills=2, seed=0, steps=12, folder=tmp_path, bound=100) == []
