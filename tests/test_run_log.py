"""The log and goodput: what counts, what does not, and that both outlive a session, a bad line and a clock set back."""

import json

import pytest

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
  goodput = run_log.Goodput(position, clock, clock)
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


@pytest.mark.parametrize("jump", [-3600.0, -1e9, 3600.0, 1e9])
def test_a_clock_that_is_set_gives_a_share_all_the_same(jump):
  clock, ticks = _Clock(), _Clock()

  def run(goodput):
    for _ in range(5):
      for either in (clock, ticks):
        either.now += 3
      with goodput.step():
        for either in (clock, ticks):
          either.now += 7

  first = run_log.Goodput({"began": clock.now}, clock, ticks)
  run(first)
  assert first.share() == pytest.approx(4 * 7 / 50)
  clock.now += jump  # while the session runs: it does not look
  run(first)
  assert first.share() == pytest.approx(9 * 7 / 100)
  saved = first.saved()
  clock.now += jump  # between sessions: an hour too much, or none at all
  second = run_log.Goodput(saved, clock, ticks)
  run(second)
  assert second.share() == pytest.approx((9 + 4) * 7 / (max(100 + jump, 63) + 50)) and 0 <= second.share() <= 1
  assert run_log.stopwatch(5.0, ticks)() == 5.0


@pytest.mark.slow
def test_a_run_logs_it_and_takes_it_along(tmp_path):
  assert train_loop.train(tiny.config("teacher", steps=40), tmp_path) == 0
  assert train_loop.train(tiny.config("teacher", steps=42), tmp_path) == 0
  shares = [json.loads(line)["goodput"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert shares[0] == 0 and all(0 < share < 1 for share in shares[1:])
  # The second session's start-up, and a first step that does not count; what the first one did is not forgotten.
  assert 0 < shares[40] < shares[39]


_BAD = [b"{", b"[]", b"3", b"{}", b'{"step": "x"}', b'{"step": 1e999}', b"\xff\xfe", b"\x00" * 40, b"[" * 100_000]


@pytest.mark.parametrize("bad", _BAD)
def test_a_bad_line_costs_itself_alone(tmp_path, bad, caplog):
  path = tmp_path / "metrics.jsonl"
  good = [json.dumps({"step": i, "loss": float(i)}).encode() for i in range(1, 6)]
  path.write_bytes(b"\n".join([*good[:2], bad, *good[2:], b'{"step": 6, "lo']))  # a kill cut off the last one
  log = run_log.RunLog(tmp_path, 4)
  assert len(caplog.messages) == 1 and "metrics.jsonl: line 3 cannot be read" in caplog.messages[0]
  log.write(5, {"loss": 7.0})
  log.close()
  assert path.read_bytes().splitlines() == [*good[:4], b'{"step": 5, "loss": 7.0}']
  caplog.clear()
  assert [line["step"] for line in run_log.read_metrics(tmp_path)] == [1, 2, 3, 4, 5] and not caplog.messages


def test_several_bad_lines_are_one_warning(tmp_path, caplog):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nx\n\ny\nz\n{"step": 2}\n')
  assert [line["step"] for line in run_log.read_metrics(tmp_path)] == [1, 2]
  assert len(caplog.messages) == 1 and "line 2 and 2 more" in caplog.messages[0]
  assert run_log.read_metrics(tmp_path / "none") == []
