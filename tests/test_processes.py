"""Several processes of one run, as launch/local.sh starts them: the numbers of one process, through any end of one."""

import os
import re
import signal
import time

import numpy as np
import pytest

from piflow_jax import train_loop
from piflow_jax import weights
from tests import chaos
from tests import group
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.processes]
STEPS = 40
# Every process holds, writes and reads a half of the state.
FSDP = dict(steps=STEPS, checkpoint_every=5, mesh__data=1, mesh__fsdp=8)


def _flags(fields):
  return [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]


def _start(workdir, **fields):
  return group.start(workdir, 2, 4, *_flags(FSDP | fields))


def _run_here(workdir, **fields):
  """The same run in this process, on the same eight devices."""
  assert train_loop.train(tiny.config("teacher", **(FSDP | fields)), workdir) == 0
  return _metrics(workdir)


def _wait_for_step(workdir, step, process):
  for _ in range(3000):
    if process.poll() is not None:
      raise AssertionError(f"ended early: {process.stdout.read()}")
    if any(line["step"] >= step for line in _metrics(workdir)):
      return
    time.sleep(0.1)
  raise AssertionError(f"step {step} was not reached")


def _metrics(workdir):
  return tiny.metrics(workdir) if (workdir / "metrics.jsonl").exists() else []


def _weights(workdir):
  with weights.open_weights(workdir, "params", "--workdir") as (shapes, read):
    return {path: read(path) for path in shapes}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The workdir of the run of two processes that nobody disturbs."""
  workdir = tmp_path_factory.mktemp("processes") / "alone"
  status, out = group.finish(_start(workdir))
  assert status == 0, out
  return workdir


def test_two_processes_are_one(alone, tmp_path):
  one = _run_here(tmp_path / "one")
  two = _metrics(alone)
  assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, STEPS + 1))
  # Sums of floats run in another order; forty updates on.
  np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)
  two, one = _weights(alone), _weights(tmp_path / "one")
  for path in one:
    a, b = two[path], one[path]
    if path.endswith("qkv/bias"):
      a, b = a[:, ::2], b[:, ::2]  # softmax does not see the keys' bias: Adam makes steps of its rounding
    np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max(), err_msg=path)


@pytest.mark.parametrize("data, fsdp, tensor", [(2, 4, 1), (1, 1, 8)])
def test_whatever_processes_split_they_see_the_same_rows(data, fsdp, tensor, tmp_path):
  fields = dict(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, network__heads=8, steps=2)
  status, out = group.finish(_start(tmp_path / "two", **fields))
  assert status == 0, out
  one, two = _run_here(tmp_path / "one", **fields), _metrics(tmp_path / "two")
  # Sums of floats run in another order.
  np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)


def test_what_one_process_cannot_do_ends_all_and_is_no_reason_to_start_again(tmp_path):
  # Only the first process writes the config.
  (tmp_path / "run" / "config.json.tmp").mkdir(parents=True)
  status, out = group.finish(_start(tmp_path / "run"))
  assert status == 2 and "error: --workdir" in out, out


def test_a_life_of_two_processes_is_the_run_left_alone(alone, tmp_path):
  """A notice to one, one before the first step, a death, a torn checkpoint: after each the same command goes on."""
  run = tmp_path / "run"
  # A notice to one saves on all at one step.
  process = _start(run)
  _wait_for_step(run, 8, process)
  os.kill(group.workers(process)[1], signal.SIGTERM)
  status, out = group.finish(process)
  assert status == 75 and "Traceback" not in out, out
  stopped = _metrics(run)[-1]["step"]
  assert stopped < STEPS and f"stopped by a signal at step {stopped}, saved" in out

  # A notice before the first step of a later session is heard.
  process = _start(run)
  while "going on from step" not in (line := process.stdout.readline()):
    assert line, "ended early"
  assert f"going on from step {stopped} of {STEPS}" in line
  os.kill(group.workers(process)[0], signal.SIGTERM)
  status, out = group.finish(process)
  assert status == 75, out
  stopped = int(re.search(r"stopped by a signal at step (\d+), saved", out)[1])
  assert stopped < STEPS - 5

  # One that dies ends the other, which says a word.
  process = _start(run)
  _wait_for_step(run, stopped + 6, process)
  os.kill(group.workers(process)[1], signal.SIGKILL)
  status, out = group.finish(process)
  statuses, problems = chaos.verdict(status, out, hit=[1])
  assert status == 75 and statuses[0] != 0 and not problems, out

  # Both pass over a checkpoint that one cannot read.
  saved = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
  parts = run / "checkpoints" / str(saved[-1]) / "state"
  largest = max((p for p in parts.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  status, out = group.finish(_start(run))
  assert status == 0 and f"going on from step {saved[-2]} of {STEPS}" in out, out
  assert (run / "checkpoints" / f"torn_{saved[-1]}").exists()

  a, b = _weights(run), _weights(alone)
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)
  assert _metrics(run) == _metrics(alone)


def test_a_run_goes_on_on_another_mesh_and_then_on_two_processes(tmp_path):
  # The same sums in another order, a few updates on: the loss's own float32 rounding is 1e-7, the rest is what Adam
  # made of gradients' rounding in the updates before, which grows with their number.
  fields = dict(checkpoint_every=2)
  both = dict(mesh__data=2, mesh__fsdp=4)
  alone = _run_here(tmp_path / "alone", steps=9, **fields)
  _run_here(tmp_path / "moved", steps=3, **fields)
  _run_here(tmp_path / "moved", steps=6, **fields, **both)
  status, out = group.finish(_start(tmp_path / "moved", steps=9, **fields, **both))
  assert status == 0 and "going on from step 6 of 9" in out, out
  moved = _metrics(tmp_path / "moved")
  assert len(alone) == 9
  np.testing.assert_allclose([line["loss"] for line in moved], [line["loss"] for line in alone], rtol=1e-5)


def test_bad_calls_are_refused(tmp_path):
  for how in ("somewhere", "127.0.0.1:1,2,2", "127.0.0.1,0,1"):
    tiny.refused("piflow_jax.main", tiny.arguments("teacher", tmp_path / "run", f"--distributed={how}"),
                 f"--distributed: '{how}'")
