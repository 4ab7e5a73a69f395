"""Goodput: what counts, what does not, and that it outlives a session; whose a workdir is."""

import json

import pytest

from piflow_jax import errors
from piflow_jax import run_log
from piflow_jax import train_loop
from tests import tiny


class _Clock:
  now = 1000.0

  def __call__(self):
    return self.now


def _session(position, clock, steps):
  """A session of 10 s of start-up and then steps of 2 s, each followed by 1 s of something else."""
  position = {"began": clock.now} | position
  clock.now += 10
  goodput = run_log.Goodput(position, clock)
  for i in range(steps):
    with goodput.step():
      clock.now += 2 if i else 5  # the first one compiles
    clock.now += 1
  return goodput


def test_steps_but_the_first_over_all_time():
  assert _session({}, clock := _Clock(), 6).share() == pytest.approx(5 * 2 / (clock.now - 1000))
  assert clock.now == 1000 + 10 + 5 + 5 * 2 + 6


def test_a_lost_session_and_the_time_between_count_against_it():
  clock = _Clock()
  first = _session({}, clock, 6)
  saved, share = json.loads(json.dumps(first.saved())), first.share()
  _session(saved, clock, 100)  # killed: nothing of it was saved
  clock.now += 40
  third = _session(saved, clock, 2)
  assert third.share() == pytest.approx((5 * 2 + 2) / (31 + 313 + 40 + 19))
  assert third.share() < share


@pytest.mark.slow
def test_a_run_logs_it_and_takes_it_along(tmp_path):
  assert train_loop.train(tiny.config("teacher", steps=40), tmp_path) == 0
  assert train_loop.train(tiny.config("teacher", steps=42), tmp_path) == 0
  shares = [json.loads(line)["goodput"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert shares[0] == 0 and all(0 < share < 1 for share in shares[1:])
  # The second session's start-up, and a first step that does not count; what the first one did is not forgotten.
  assert 0 < shares[40] < shares[39]


def test_a_workdir_belongs_to_its_config_but_for_what_may_change(tmp_path, caplog):
  run_log.claim(tmp_path, tiny.config("teacher"))
  run_log.claim(tmp_path, tiny.config("teacher", steps=9, mesh__fsdp=4, microbatches=2, network__attention="xla"))
  with pytest.raises(errors.UserError, match="config.batch_size is 8, was 16"):
    run_log.claim(tmp_path, tiny.config("teacher", batch_size=8))
  run_log.claim(tmp_path / "cosine", tiny.config("teacher", steps=8, optimizer__schedule="cosine"))
  with pytest.raises(errors.UserError, match="config.steps is 9, was 8"):
    run_log.claim(tmp_path / "cosine", tiny.config("teacher", steps=9, optimizer__schedule="cosine"))
  assert not caplog.messages


def test_a_run_of_an_older_version_goes_on_with_a_word(tmp_path, caplog):
  run_log.claim(tmp_path, tiny.config("teacher"))
  path = tmp_path / "config.json"
  old = json.loads(path.read_text())
  path.write_text(json.dumps({k: v for k, v in old.items() if k != "accumulator"} | {"optimizer.nesterov": True}))
  run_log.claim(tmp_path, tiny.config("teacher"))
  assert len(caplog.messages) == 1 and "config.accumulator='float32', config.optimizer.nesterov=True" in caplog.messages[0]
  assert json.loads(path.read_text()) == old
