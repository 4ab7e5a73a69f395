"""How near a student comes to an exactly known flow, as its policy and its training grow.

  python -m piflow_jax.evaluation.analytic --config=configs/gaussians.py --workdir=runs/gaussians

The config file must take POLICY,N as its argument. GM students of K components and DX students of N points are trained,
each in its own folder of the workdir, and stopped on the way to be measured: the end points of one call against the
exact flow of the same noise. Leaves analytic.png and analytic.json in the workdir and prints the figures.
"""

import functools
import json

from absl import flags
from etils import epath
import jax
import numpy as np

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import program
from piflow_jax import sampler
from piflow_jax import train_loop
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import figures
from piflow_jax.evaluation import metrics

_EXACT_STEPS, _SAMPLES = 256, 1024


def exact_ends(run, teacher_params, noise, cond):
  """The ends of the exact flow from noise: by a fifth-order solver in so many steps that its error is float32's."""
  clock = build.teacher_clock(run, _EXACT_STEPS)

  def velocity(x, t):
    return run.teacher.velocity(teacher_params, x, t, cond)

  return sampler.sample(sampler.velocity_flow_map(velocity, clock, method="Dopri5"), noise, None, clock)


def endpoint_error(config, workdir):
  """Endpoint error of the student in workdir against the exact flow, one call, 1,024 noises."""
  mesh, run = build.mesh(config), build.run(config)
  jitted = train_step.compile(config, mesh, run)
  teacher_params = train_step.load_teacher(config, run, jitted.teacher)
  params = weights.load(workdir, jitted.state.ema, "ema", "--workdir")
  noise = jax.random.normal(jax.random.key(config.evaluation.seed), (_SAMPLES, *run.data.spec.x_0))
  labels = np.arange(_SAMPLES, dtype=np.int32) % max(spec_lib.num_classes(run.data.spec), 1)
  cond = {name: labels.astype(array.dtype) for name, array in run.data.spec.cond.items()}
  keys = jax.random.split(jax.random.key(0), _SAMPLES)
  got = jitted.draw(params, train_step.load_base(config, run, jitted), noise, cond, keys)
  want = jax.jit(functools.partial(exact_ends, run))(teacher_params, noise, cond)
  return metrics.endpoint_error(np.asarray(got), np.asarray(want), labels)


def sweep(config_of, workdir, *, sizes, stops, policies=("gm", "dx")):
  """{policy: {size: [endpoint error at each stop]}}, training what is missing."""
  found = {}
  for policy in policies:
    for n in sizes:
      folder = epath.Path(workdir) / f"{policy}-{n}"
      # A run goes on from stop to stop and keeps no weights of those behind it, so each figure is written down at once.
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
  by_size = {policy.upper(): (sizes, [errors_of[n][-1] for n in sizes]) for policy, errors_of in found.items()}
  panels = [("by the policy's size, trained out", "K components (GM), N points (DX)", "endpoint error", by_size, "xy")]
  for policy, errors_of in found.items():
    by_step = {f"{name[policy]} = {n}": (stops, values) for n, values in errors_of.items()}
    panels.append((f"{policy.upper()} by training", "step", "endpoint error", by_step, "xy"))
  plain = {policy: {str(n): values for n, values in errors_of.items()} for policy, errors_of in found.items()}
  folder = epath.Path(workdir)
  (folder / "analytic.png").write_bytes(figures.lines(panels, "One call against the exact flow"))
  (folder / "analytic.json").write_text(json.dumps({"stops": stops, "endpoint_error": plain}, indent=1))


def _define(values):
  flags.DEFINE_list("sizes", ["1", "2", "4", "8", "16"], "K of GM students, N of DX students.", flag_values=values)
  flags.DEFINE_list("stops", ["100", "400", "1600"], "Training steps at which to measure.", flag_values=values)


def _main(given):
  sizes, stops = (program.whole_numbers(given.flags, name) for name in ("sizes", "stops"))
  found = sweep(given.config_of, given.workdir, sizes=sizes, stops=stops)
  write(given.workdir, found, sizes, stops)
  print("endpoint error after".ljust(22) + "".join(f"{stop:>9}" for stop in stops))
  for policy, errors_of in found.items():
    for n, values in errors_of.items():
      print(f"{policy} {n}".ljust(22) + "".join(f"{value:9.3f}" for value in values))
  print(epath.Path(given.workdir) / "analytic.png")
  return 0


PROGRAM = program.Program(_main, _define, __doc__, config="file")

if __name__ == "__main__":
  program.run(PROGRAM)
