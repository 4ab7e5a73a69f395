"""What a run leaves to look at: metrics.jsonl, TensorBoard events, pictures."""

import contextlib
import functools
import json
import time

from absl import logging
from etils import epath
import numpy as np
import tensorboardX

from piflow_jax import errors
from piflow_jax import images


def stopwatch(before, ticks=time.monotonic):
  """() -> seconds of the sessions before, and of this one from now on."""
  began = ticks()
  return lambda: before + ticks() - began


class Goodput:
  """The share of wall time since the run first started that went into steps which are still part of it.

  Counted as steps: the time from handing a step to the devices until the loss of the one before is known. Not counted:
  start-up, restoring and compiling (all before a session's second step), evaluation, pictures, saving, waiting for data
  (even where the devices were still at work), the time between sessions, and steps made after the checkpoint from which
  a later session went on. The clock starts with the first session that saved anything, at the beginning of its `train`,
  which the imports precede. Only the time between sessions is read off the wall clock: setting that back can shorten
  it to nothing, not below.
  """

  def __init__(self, position, clock=time.time, ticks=time.monotonic):
    """position: of the checkpoint, with what `saved` returned; at a run's start {} or {"began": time}."""
    self._clock, self._ticks, self._entered = clock, ticks, ticks()
    self._in_steps = max(position.get("in_steps", 0.0), 0.0)
    self._before = max(clock() - position.get("began", clock()), self._in_steps)
    self._compiled = False

  @contextlib.contextmanager
  def step(self):
    entered = self._ticks()
    yield
    if self._compiled:
      self._in_steps += self._ticks() - entered
    self._compiled = True

  def share(self):
    return self._in_steps / max(self._total(), 1e-9)

  def saved(self):
    return {"began": self._clock() - self._total(), "in_steps": self._in_steps}

  def _total(self):
    return self._before + self._ticks() - self._entered


class RunLog:
  """Lines of metrics by step. Opening at a step drops what an earlier session logged beyond it."""

  def __init__(self, workdir, start):
    self._path = epath.Path(workdir) / "metrics.jsonl"
    self._storing = functools.partial(errors.storing, f"--workdir: the log of {workdir}")
    self._lines = [line for line in read_metrics(workdir) if line["step"] <= start]
    with self._storing():
      self._rewrite()
      self._events = tensorboardX.SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=start + 1)

  def _rewrite(self):
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
    temporary.replace(self._path)

  def write(self, step, values):
    line = {"step": step} | {k: float(v) for k, v in values.items()}
    self._lines.append(line)
    with self._storing():
      if "://" in str(self._path):
        self._rewrite()  # object stores know no append
      else:
        with self._path.open("a") as f:
          f.write(json.dumps(line) + "\n")
    for name, value in line.items():
      if name != "step":
        self._events.add_scalar(name, value, step)

  def image(self, step, name, pixels):
    """pixels [H, W, 3] uint8, to TensorBoard and to pictures/<name>_<step>.png."""
    self._events.add_image(name, np.asarray(pixels), step, dataformats="HWC")
    folder = self._path.parent / "pictures"
    with self._storing():
      folder.mkdir(exist_ok=True)
      (folder / f"{name}_{step:07d}.png").write_bytes(images.png(pixels))

  def flush(self):
    with self._storing():
      self._events.flush()

  def close(self):
    with self._storing():
      self._events.close()


def read_metrics(workdir):
  """The lines of metrics.jsonl as dicts. Those that cannot be read are left out, with a warning.

  None for a last line without an end: a kill cut it off.
  """
  path = epath.Path(workdir) / "metrics.jsonl"
  lines, bad = [], []
  *texts, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
  for number, text in enumerate([*texts, rest], 1):
    try:
      line = json.loads(text)
      lines.append(line | {"step": int(line["step"])})
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
      if text.strip() and number <= len(texts):
        bad.append(number)
  if bad:
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    logging.warning("%s: line %d%s cannot be read and is left out", path, bad[0], more)
  return lines
