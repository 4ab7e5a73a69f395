"""The digits' config made small enough that a run takes seconds."""

import json
import os
import pathlib
import subprocess
import sys

from configs import digits

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {
    "batch_size": 16, "steps": 4, "log_every": 1, "checkpoint_every": 2, "eval_every": 0, "image_every": 0,
    "eval_batches": 1,
    "network.depth": 2, "network.width": 32, "network.heads": 2, "network.unroll": 1, "policy.components": 4,
    "policy.logstd_width": 16, "policy.dropout": 0.3, "flow.total_substeps": 16, "optimizer.warmup_steps": 2, "optimizer.schedule": "constant",
    "ema.start": 2,
    "sampling.nfe": 1, "sampling.images": 10, "evaluation.samples": 40, "evaluation.batch_size": 40,
}


def config(role, **fields):
  c = digits.get_config(role)
  c.update_from_flattened_dict(FIELDS | {k.replace("__", "."): v for k, v in fields.items()})
  return c


def command(role, workdir, *arguments, program="piflow_jax.main"):
  """The command line of a user for the same run."""
  options = [f"--config.{k}={v}" for k, v in FIELDS.items()]
  return [sys.executable, "-m", program, f"--config=configs/digits.py:{role}", f"--workdir={workdir}", *options, *arguments]


def environment(**more):
  """What a program of a user's sees, and `more`: not what the tests set for their own compiling and devices."""
  return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")} | more


def start(args, stderr=subprocess.PIPE, env=None, **kwargs):
  """A program as a user starts it: one device, its own process."""
  env = environment(JAX_PLATFORMS="cpu", **(env or {}))
  return subprocess.Popen(args, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=stderr, **kwargs)


def run(args):
  process = start(args)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def refused(args, *words):
  """Holds that a program ends with status 2 and one line that has all the words."""
  status, out, err = run(args)
  lines = [line for line in err.splitlines() if line.strip()]
  assert status == 2 and "Traceback" not in err + out, err
  assert len(lines) == 1, err
  for word in words:
    assert word in lines[0], lines[0]


def metrics(workdir):
  """What a run logged, less what tells of time."""
  lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in ("seconds", "steps_per_second", "goodput")} for line in lines]
