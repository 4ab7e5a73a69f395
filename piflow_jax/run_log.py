"""What a run leaves to look at: metrics.jsonl, TensorBoard events, pictures, and the config that it belongs to."""

import contextlib
import functools
import io
import json
import time

from absl import logging
from etils import epath
import numpy as np
import tensorboardX

from piflow_jax import errors

# Fields that say how a run is watched, placed or how long it is, not what it computes: these may change on a restart.
# (Not the length of a cosine schedule, which is in every step's learning rate.)
_FREE = ("steps", "log_every", "eval_every", "eval_batches", "image_every", "checkpoint_every", "keep_checkpoints",
         "keep_every", "profile_steps", "sharding_rules", "zero", "microbatches", "network.remat", "network.attention",
         "network.unroll", "mesh.", "sampling.", "evaluation.")
_MEANING = ("method", "network.", "policy.", "flow.")  # fields that say what the weights are


def _plain(value):
  if callable(value):
    return f"{value.__module__}:{value.__qualname__}"
  if isinstance(value, (tuple, list)):
    return [_plain(v) for v in value]
  return value


def flat_config(config):
  """{"a.b": plain value} of a config, references as "module:name"."""
  flat = {}
  for key, value in config.items():
    if hasattr(value, "items"):
      flat |= {f"{key}.{k}": v for k, v in flat_config(value).items()}
    else:
      flat[key] = _plain(value)
  return flat


def claim(workdir, config, write=True):
  """Make the workdir this config's, or find that it already is; only one process is to `write`.

  Raises:
    errors.UserError: it cannot be written, or belongs to a run of another config.
  """
  folder, flat = epath.Path(workdir), flat_config(config)
  path = folder / "config.json"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
      _compare(json.loads(path.read_text()), flat, workdir)
    if write:
      temporary = folder / "config.json.tmp"
      temporary.write_text(json.dumps(flat, indent=1))
      temporary.replace(path)
  except (OSError, NotImplementedError) as e:
    raise errors.UserError(f"--workdir: cannot write to {str(workdir)!r} ({e}); choose a folder that you may write") from e
  except json.JSONDecodeError as e:
    raise errors.UserError(f"--workdir: {path} is not a config ({e}); choose another workdir") from e


def _compare(old, new, workdir):
  fixed = ("steps",) if new.get("optimizer.schedule") == "cosine" else ()
  matter = lambda keys: [k for k in sorted(keys) if k in fixed or not k.startswith(_FREE)]
  if differ := _differences(old, new, matter(old.keys() & new.keys())):
    raise errors.UserError(
        f"--workdir: {str(workdir)!r} holds a run of another config ({differ}); choose another workdir or that config")
  # Of another version of the package: a field that did not exist then has done no harm, and its default should be what was.
  if other := matter(old.keys() ^ new.keys()):
    logging.warning("%s was begun by a version without, or with other, fields of the config (%s): check that they mean what it was "
                    "begun with", workdir, ", ".join(f"config.{k}={new.get(k, old.get(k))!r}" for k in other[:5]))


def _differences(old, new, keys):
  differ = [k for k in keys if old[k] != new[k]]
  shown = "; ".join(f"config.{k} is {new[k]!r}, was {old[k]!r}" for k in differ[:3])
  return shown + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")


def warn_of_other(workdir, config):
  """Warn where `config`, by which a run is to be drawn from, has another network, policy or flow than it was trained with.

  Weights can fit and mean something else. A converted checkpoint has no config to be held against.
  """
  try:
    old = json.loads((epath.Path(workdir) / "config.json").read_text())
  except (OSError, json.JSONDecodeError):
    return
  new = flat_config(config)
  keys = [k for k in sorted(old.keys() & new.keys()) if k.startswith(_MEANING) and not k.startswith(_FREE)]
  if differ := _differences(old, new, keys):
    logging.warning("%s was trained otherwise: %s", workdir, differ)


def stopwatch(before, clock=time.time):
  """() -> seconds of the sessions before, and of this one from now on."""
  began = clock()
  return lambda: before + clock() - began


class Goodput:
  """The share of wall time since the run first started that went into steps which are still part of it.

  Counted as steps: the time from handing a step to the devices until the loss of the one before is known. Not counted:
  start-up, restoring and compiling (all before a session's second step), evaluation, pictures, saving, waiting for data (even
  where the devices were still at work), the time between sessions, and steps made after the checkpoint from which a later
  session went on. The clock starts with the first session that saved anything, at the beginning of its `train`, which the
  imports precede.
  """

  def __init__(self, position, clock=time.time):
    """position: of the checkpoint, in which `saved` is; or without it at a run's start."""
    self._clock = clock
    self._began = position.get("began", clock())
    self._in_steps = position.get("in_steps", 0.0)
    self._compiled = False

  @contextlib.contextmanager
  def step(self):
    entered = self._clock()
    yield
    if self._compiled:
      self._in_steps += self._clock() - entered
    self._compiled = True

  def share(self):
    return self._in_steps / max(self._clock() - self._began, 1e-9)

  def saved(self):
    return {"began": self._began, "in_steps": self._in_steps}


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
    from PIL import Image

    self._events.add_image(name, np.asarray(pixels), step, dataformats="HWC")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    folder = self._path.parent / "pictures"
    with self._storing():
      folder.mkdir(exist_ok=True)
      (folder / f"{name}_{step:07d}.png").write_bytes(buffer.getvalue())

  def flush(self):
    with self._storing():
      self._events.flush()

  def close(self):
    with self._storing():
      self._events.close()


def read_metrics(workdir):
  """The lines of metrics.jsonl; a last line that was cut off by a kill is left out."""
  path = epath.Path(workdir) / "metrics.jsonl"
  lines = []
  for text in path.read_text().splitlines() if path.exists() else []:
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      break
  return lines
