"""The digits' config made small enough that a run takes seconds."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from configs import digits
from piflow_jax import program
import tests

ROOT = pathlib.Path(__file__).parents[1]
# Of these a role takes what its nouns have.
FIELDS = {
    "batch_size": 16, "steps": 4, "log_every": 1, "checkpoint_every": 2, "eval_every": 0, "image_every": 0,
    "eval_batches": 1, "network.depth": 2, "network.width": 32, "network.heads": 2, "network.unroll": 1,
    "policy.components": 4, "policy.logstd_width": 16, "policy.dropout": 0.3, "method.total_substeps": 16,
    "optimizer.warmup_steps": 2, "optimizer.schedule": "constant", "ema.start": 2, "sampling.nfe": 1,
    "sampling.images": 10, "evaluation.samples": 40, "evaluation.batch_size": 40,
}


def only_known(config, fields):
  """Those of some dotted fields that a config has."""
  return {k: v for k, v in fields.items() if _has(config, k)}


def fields(config):
  """Those of FIELDS that a config has."""
  return only_known(config, FIELDS)


def _has(config, dotted):
  for name in dotted.split("."):
    if config is None or name not in config:
      return False
    config = config[name]
  return True


def config(role, **more):
  """The tiny config of a role, with fields written a__b."""
  c = digits.get_config(role)
  c.update_from_flattened_dict(fields(c) | {k.replace("__", "."): v for k, v in more.items()})
  return c


def arguments(role, workdir, *more):
  """What a user writes after a program's name for the same run."""
  known = fields(digits.get_config(role)) if role.partition(",")[0] in digits.ROLES else {}
  options = [f"--config.{k}={v}" for k, v in known.items()]
  return [f"--config=configs/digits.py:{role}", f"--workdir={workdir}", *options, *more]


def command(role, workdir, *more, module="piflow_jax.main"):
  """The command line of a user for the same run."""
  return [sys.executable, "-m", module, *arguments(role, workdir, *more)]


def environment(**more):
  """What a program of a user's sees, and `more`: not the tests' own devices, but without LLVM's optimisations, too."""
  own = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  return own | {"XLA_FLAGS": tests.UNOPTIMISED} | more


def start(args, stderr=subprocess.PIPE, env=None, **kwargs):
  """A program as a user starts it: one device, its own process."""
  env = environment(JAX_PLATFORMS="cpu", **(env or {}))
  return subprocess.Popen(args, cwd=kwargs.pop("cwd", ROOT), env=env, text=True, stdout=subprocess.PIPE, stderr=stderr,
                          **kwargs)


def run(args, **kwargs):
  """(status, output, errors) of a program as a user starts it."""
  process = start(args, **kwargs)
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def done(*args):
  """What a Python with these arguments says; it must end well."""
  status, out, err = run([sys.executable, *map(str, args)])
  assert status == 0, (args, out, err)
  return out


def kill(until, *args):
  """A Python that is killed as soon as `until` holds; it must not have ended by itself."""
  process = start([sys.executable, *map(str, args)])
  began = time.monotonic()
  while not until() and process.poll() is None:
    assert time.monotonic() - began < 300
    time.sleep(0.02)
  ended = process.poll()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert ended is None, f"{args} ended with {ended} before it could be killed"


def invoke(module, args):
  """(status, its one line) of a program in this process; `module` has a PROGRAM."""
  here = os.getcwd()
  os.chdir(ROOT)
  try:
    return program.invoke(importlib.import_module(module).PROGRAM, ["program", *map(str, args)])
  finally:
    os.chdir(here)


def refused(module, args, *words, status=2):
  """Holds that a program ends with a status and one line that has all the words, in this process."""
  got, line = invoke(module, args)
  assert got == status and line and "\n" not in line, (got, line)
  for word in words:
    assert word in line, line
  return line


def metrics(workdir):
  """What a run logged, less what tells of time."""
  lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in ("seconds", "steps_per_second", "goodput")} for line in lines]
