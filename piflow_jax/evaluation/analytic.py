"""How near a student comes to an exactly known flow, as its policy, its training grow.

  python -m piflow_jax.evaluation.analytic --config=configs/gaussians.py --workdir=runs/gaussians

The config file must take POLICY,N as its argument. GM students of K components and DX students of N points are
trained, each in its own folder of the workdir, and stopped on the way to be measured: the end points of one call against
the exact flow of the same noise. Leaves analytic.png and analytic.json in the workdir and prints the figures.
"""

import functools
import json

from absl import flags
from etils import epath
import jax
import numpy as np

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import main as program
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax.evaluation import figures
from piflow_jax.evaluation import metrics

SIZES = flags.DEFINE_list("sizes", ["1", "2", "4", "8", "16"], "K of GM students, N of DX students.")
STEPS = flags.DEFINE_list("stops", ["100", "400", "1600"], "Training steps at which to measure.")
_EXACT_STEPS, _SAMPLES = 256, 1024


def exact_ends(config, teacher_params, noise, cond):
  """Where the exact flow takes the noise: a fifth-order solver in so many steps that its error is float32's."""
  flow_map = sampler.velocity_flow_map(
      lambda x, t: build.teacher(config)(teacher_params, x, t, cond), shift=build.shift(config), method="Dopri5")
  return sampler.sample(flow_map, noise, jax.random.key(0), nfe=_EXACT_STEPS, shift=build.shift(config))


def endpoint_error(config, workdir):
  """Endpoint error of the student in workdir against the exact flow, one call, 1,024 noises."""
  mesh, run = sharding.make_mesh(**config.mesh), build.run(config)
  jitted = train_loop.compile_run(config, mesh, run)
  teacher_params = train_loop.load_teacher(config, jitted["teacher"])
  params = checkpoint.load_weights(workdir, jitted["state"].ema, "ema", "--workdir")
  noise = jax.random.normal(jax.random.key(config.evaluation.seed), (_SAMPLES, *config.data.shape))
  cond = jax.numpy.arange(_SAMPLES) % config.data.num_classes
  got = jitted["draw"](params, teacher_params, noise, cond, jax.random.key(0))
  want = jax.jit(functools.partial(exact_ends, config))(teacher_params, noise, cond)
  return metrics.endpoint_error(np.asarray(got), np.asarray(want), np.asarray(cond))


def sweep(config_of, workdir, *, sizes, stops, policies=("gm", "dx")):
  """{policy: {size: [endpoint error at each stop]}}, training what is missing."""
  found = {}
  for policy in policies:
    for n in sizes:
      folder = epath.Path(workdir) / f"{policy}-{n}"
      # A run goes on from stop to stop, so that what was measured on the way is not to be had again: it is written down.
      known = folder / "endpoint_error.json"
      measured = json.loads(known.read_text()) if known.exists() else {}
      for stop in stops:
        if str(stop) in measured:
          continue
        if measured and stop < max(map(int, measured)):
          raise errors.UserError(f"--stops: {stop}: the run in {folder} is past that; choose another workdir")
        config = config_of(policy, n)
        config.steps = config.checkpoint_every = stop
        status = train_loop.train(config, str(folder))
        if status:
          raise SystemExit(status)
        measured[str(stop)] = endpoint_error(config, str(folder))
        known.write_text(json.dumps(measured))
        jax.clear_caches()
      found.setdefault(policy, {})[n] = [measured[str(stop)] for stop in stops]
  return found


def write(workdir, found, sizes, stops):
  """analytic.json and analytic.png of `sweep`'s figures."""
  name = {"gm": "K", "dx": "N"}
  by_size = {f"{policy.upper()}": (sizes, [of[n][-1] for n in sizes]) for policy, of in found.items()}
  panels = [("by the policy's size, trained out", "K components (GM), N points (DX)", "endpoint error", by_size, "xy")]
  for policy, of in found.items():
    panels.append((f"{policy.upper()} by training", "step", "endpoint error",
                   {f"{name[policy]} = {n}": (stops, values) for n, values in of.items()}, "xy"))
  folder = epath.Path(workdir)
  (folder / "analytic.png").write_bytes(figures.lines(panels, "One call against the exact flow"))
  (folder / "analytic.json").write_text(json.dumps(
      {"stops": stops, "endpoint_error": {p: {str(n): v for n, v in of.items()} for p, of in found.items()}}, indent=1))


def _main(argv):
  del argv
  sizes, stops = (program.whole_numbers(flag) for flag in (SIZES, STEPS))
  found = sweep(program.configs_of(program.CONFIG), program.WORKDIR.value, sizes=sizes, stops=stops)
  write(program.WORKDIR.value, found, sizes, stops)
  print("endpoint error after".ljust(22) + "".join(f"{stop:>9}" for stop in stops))
  for policy, of in found.items():
    for n, values in of.items():
      print(f"{policy} {n}".ljust(22) + "".join(f"{value:9.3f}" for value in values))
  print(epath.Path(program.WORKDIR.value) / "analytic.png")
  return 0


if __name__ == "__main__":
  program.run(_main)
