"""Kill a run of two processes again and again: at the end it has to be the run that was left alone, bit for bit.

  python -m tests.chaos --kills=20 --seed=0

A kill hits somebody (one process, the other, both) with something (SIGKILL, SIGTERM, a notice that is not waited for)
at some moment: while a checkpoint is written, between two steps, before the first step, while the last checkpoint is
written. Each time the same command starts the group again. Exit status 1: something differs, a restart ended by
anything but 0, 75 or a kill, or a survivor did not end within --bound seconds.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time

from absl import logging
import jax
import numpy as np

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import sharding
from piflow_jax import train_step
from tests import group
from tests import tiny

EVERY = 3  # steps between checkpoints
MOMENTS = ("save", "step", "save", "start", "save", "step")
# Attack -> [(who: a process, both of them, or the launcher too; signal)], sent in turn with pauses of up to a second.
ATTACKS = {
    "KILL 1": [(1, signal.SIGKILL)], "TERM 0": [(0, signal.SIGTERM)], "KILL 0": [(0, signal.SIGKILL)],
    "TERM 1": [(1, signal.SIGTERM)], "KILL both": [("both", signal.SIGKILL)], "TERM group": [("group", signal.SIGTERM)],
    "TERM 0, KILL 1": [(0, signal.SIGTERM), (1, signal.SIGKILL)],
    "TERM 1, KILL 1": [(1, signal.SIGTERM), (1, signal.SIGKILL)],
}
KILLED = {128 + s for s in (signal.SIGKILL, signal.SIGTERM)}
# Status that a survivor ends with -> words that it or the launcher writes then.
WORDS = {
    75: ["another process of this run is gone; start all of them again"],
    # JAX's own thread aborts, or Gloo does over a half-sent message, before Python learns of the death.
    134: ["This most likely indicates that another task died", "Received data size doesn't match expected size"],
    # JAX waits five minutes for a process that died before they knew one another, the launcher does not.
    137: ["a process died 75 seconds ago and others still wait for it: killed"],
}


def draw(kills, steps, rng):
  """[(moment, attack, step from which)] in the order of their steps: MOMENTS and ATTACKS in turn, shuffled."""
  moments = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
  attacks = [list(ATTACKS)[i % len(ATTACKS)] for i in range(kills)]
  rng.shuffle(moments)
  rng.shuffle(attacks)
  # Not later: a run that a notice stops makes two more steps, and a finished run cannot be killed.
  froms = [round((steps - 9) * (i + rng.random()) / kills) for i in range(kills)]
  if kills >= 10:
    moments[-1], froms[-1] = "last save", steps
  return list(zip(moments, attacks, froms))


class Session:
  """One start of the group, its output in a file."""

  def __init__(self, workdir, steps, log):
    self.workdir, self._log = pathlib.Path(workdir), pathlib.Path(log)
    self.began = time.time()
    with self._log.open("w") as out:
      self.process = group.start(
          workdir, 2, 4, f"--config.steps={steps}", f"--config.checkpoint_every={EVERY}", "--config.mesh.data=1",
          "--config.mesh.fsdp=8", out=out)

  def running(self):
    return self.process.poll() is None

  def output(self):
    """The output without Gloo's greetings and the progress bar."""
    return "\n".join(line for line in re.split(r"[\r\n]+", self._log.read_text())
                     if not re.search(r"\[Gloo\]|step/s|s/step", line))

  def logged(self):
    """The last step in the log."""
    path = self.workdir / "metrics.jsonl"
    try:
      return json.loads(path.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
      return 0

  def stepped(self):
    """Whether this session has made a step."""
    said = re.search(r"going on from step (\d+)|all new", self.output())
    return said is not None and self.logged() > int(said[1] or 0)

  def writing(self):
    """Steps of the checkpoints that this session is writing; an earlier one's may lie there too for a while."""
    found = set()
    for path in (self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp/_CHECKPOINT_METADATA"):
      try:
        if path.stat().st_mtime > self.began:
          found.add(int(path.parent.name.split(".")[0]))
      except OSError:
        pass  # renamed since
    return found

  def wait_for(self, moment, step, rng, warm):
    """Waits until the moment comes or the run ends; returns whether a checkpoint is being written then."""
    pause = rng.uniform(0, 0.3)
    if moment == "start":
      begin = rng.uniform(0.5, warm)
      self._until(lambda: time.time() - self.began > begin)
    elif moment == "step":
      self._until(lambda: self.logged() >= step and self.stepped())
    else:
      self._until(lambda: any(s >= step for s in self.writing()))
    if moment != "start":
      time.sleep(pause)
    return bool(self.writing())

  def _until(self, ready, limit=300):
    deadline = time.time() + limit
    while self.running() and not ready() and time.time() < deadline:
      time.sleep(0.01)

  def strike(self, attack, rng):
    """Send the attack's signals; returns which processes were there to be hit."""
    hit = []
    for i, (who, what) in enumerate(ATTACKS[attack]):
      if i:
        time.sleep(rng.uniform(0, 1))
      found = group.workers(self.process)
      if who == "group" and found:
        os.killpg(self.process.pid, what)
        hit += found
      for number, pid in found.items():
        if who in ("both", number):
          try:
            os.kill(pid, what)
          except ProcessLookupError:
            continue
          hit.append(number)
    return hit

  def end(self, bound):
    """(status, seconds) of the end; where it does not end within the bound, all are killed and status is None."""
    began = time.time()
    self._until(lambda: False, bound)
    status = self.process.poll()
    if status is None:
      os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait()
    return status, time.time() - began


def verdict(status, out, hit):
  """({process: status that it ended with}, problems in words) from a launcher's status and output."""
  ended = re.findall(r"^\[(\d)\] ended with status (\d+)$", out, re.M)
  statuses = {i: 0 for i in range(2)} | {int(i): int(s) for i, s in ended}
  problems = [] if status in (0, errors.RESTART) else [f"the launcher ended with {status}"]
  for i, s in statuses.items():
    if i in hit and s in KILLED or s == 0 or s == errors.RESTART and "stopped by a signal" in out:
      continue
    if not any(words in out for words in WORDS.get(s, [])):
      problems.append(f"process {i} ended with {s} and without a word")
  return statuses, problems


def state_of(workdir, steps):
  """(state, data position) as saved at the last step."""
  config = tiny.config("teacher", steps=steps, mesh__data=1, mesh__fsdp=8)
  jitted = train_step.compile(config, sharding.make_mesh(**config.mesh), build.run(config))
  with checkpoint.open_manager(workdir) as manager:
    step, state, position = checkpoint.restore_latest(manager, jitted.state)
  assert step == steps, f"{workdir} ended at step {step} of {steps}"
  return jax.device_get(state), position["batches"]


def differences(a, b, steps):
  """What differs between two runs, in words."""
  found = []
  (state_a, batches_a), (state_b, batches_b) = state_of(a, steps), state_of(b, steps)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(state_a), jax.tree.leaves(state_b), strict=True):
    if np.asarray(x).tobytes() != np.asarray(y).tobytes():
      found.append(f"state{jax.tree_util.keystr(path)}")
  if batches_a != batches_b:
    found.append(f"data position {batches_a}, {batches_b}")
  lines_a, lines_b = tiny.metrics(a), tiny.metrics(b)
  if lines_a != lines_b:
    found.append(f"logged lines ({len(lines_a)}, {len(lines_b)})")
  return found


def run(kills, seed, steps, folder, bound):
  """Both runs and their comparison; returns what is wrong, in words."""
  rng, folder = random.Random(seed), pathlib.Path(folder)
  wrong, rows, began = [], [], time.time()
  session = Session(folder / "alone", steps, folder / "alone.log")
  session._until(lambda: session.logged() > 0)
  warm = time.time() - session.began
  status, _ = session.end(600)
  if status != 0:
    return [f"the run that was left alone ended with {status}:\n{session.output()}"]
  print(f"left alone: {steps} steps in {time.time() - session.began:.0f} s, the first after {warm:.0f} s", flush=True)
  for i, (moment, attack, step) in enumerate(draw(kills, steps, rng)):
    session = Session(folder / "killed", steps, folder / f"killed_{i}.log")
    saving = session.wait_for(moment, step, rng, warm)
    at, after, alive, early = session.logged(), time.time() - session.began, session.running(), not session.stepped()
    hit = session.strike(attack, rng)
    status, seconds = session.end(bound)
    statuses, problems = verdict(status, session.output(), set(hit))
    if hit and status == 0 and at < steps - 2 * EVERY:
      problems.append("the notice was not heard: the run went on to its end")
    wrong += [f"kill {i + 1} ({attack}, {moment}): {problem}\n{session.output()}" for problem in problems]
    print(f"{i + 1:3d} {moment:9s} {attack:14s} hit {sorted(set(hit))} at step {at:3d}, {after:4.1f} s after the start"
          f"{', in a save' if saving else ''}: {statuses} after {seconds:.1f} s", *problems, flush=True)
    rows.append(dict(moment=moment, attack=attack, saving=saving, statuses=statuses, seconds=seconds, early=early,
                     hit=alive and hit))
  session = Session(folder / "killed", steps, folder / "killed_last.log")
  status, _ = session.end(600)
  if status != 0:
    return wrong + [f"the last start ended with {status}:\n{session.output()}"]
  missed = sum(not row["hit"] for row in rows)
  if missed:
    wrong.append(f"{missed} kills found nobody: take more --steps")
  wrong += [f"not as in the run left alone: {d}" for d in differences(folder / "alone", folder / "killed", steps)]
  attacks = [row["attack"] for row in rows]
  print(f"{len(rows)} kills in {time.time() - began:.0f} s: "
        + ", ".join(f"{attacks.count(attack)} {attack}" for attack in ATTACKS if attack in attacks))
  ends = [status for row in rows for status in row["statuses"].values()]
  saving, early = (sum(row[kind] for row in rows) for kind in ("saving", "early"))
  print(f"in a save {saving}, before the first step {early}; processes ended with "
        + ", ".join(f"{status}: {ends.count(status)}" for status in sorted(set(ends)))
        + f"; slowest end {max(row['seconds'] for row in rows):.1f} s")
  return wrong


def _parse():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
  parser.add_argument("--seed", type=int, default=0, help="seed of who is killed, how and when")
  parser.add_argument("--steps", type=int, help="updates of the run; default: three a kill and nine more")
  parser.add_argument("--bound", type=float, default=100, help="seconds that survivors may take to end")
  parser.add_argument("--workdir", help="where the two runs go; default: a folder that is removed at the end")
  args = parser.parse_args()
  args.steps = args.steps or 3 * args.kills + 9
  if args.kills < 1 or args.steps < 10:
    parser.error("--kills: at least 1, and --steps at least 10")
  if args.workdir and pathlib.Path(args.workdir, "alone").exists():
    parser.error(f"--workdir: {args.workdir} has runs in it; choose another")
  return args


def main():
  args = _parse()
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  with tempfile.TemporaryDirectory() as folder:
    if args.workdir:
      folder = args.workdir
      pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    wrong = run(args.kills, args.seed, args.steps, folder, args.bound)
  for line in wrong:
    print(f"wrong: {line}", file=sys.stderr)
  print("bit-equal to the run left alone" if not wrong else f"{len(wrong)} things are wrong")
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
