"""Draw images from a run: from a student in its few network calls, from a teacher in many.

  python -m piflow_jax.sample --workdir=runs/digits/student --out=samples.png
  python -m piflow_jax.sample --workdir=DIR --labels=207,360 --autoencoder=DIR --out=samples.png

--workdir is one of piflow_jax.main, or what piflow_jax.convert from-torch made of a PyTorch checkpoint; its own
config is read from it. The averaged weights are drawn from; a student needs no teacher's, unless a part of it is the
teacher's.

How is set by --config.sampling.nfe=N calls (of a student those that it is trained for), --config.sampling.h
(stochasticity), --config.policy.temperature (GM), --config.method.solver (a teacher's). Guidance is in a student's
weights; a teacher is drawn from without any. --config.evaluation.batch_size=N bounds how many are drawn at once.

--labels chooses rows: classes by number or name; where conditions are more than a label, numbers of held-out records.
--out=FILE.png is a grid, a row a label: pictures of 1 or 3 channels in [-1, 1], a video's frames side by side. Latents
become pictures by --autoencoder, the workdir that piflow_jax.convert from-torch made of Stable Diffusion's or
FLUX's; its scale and shift are applied. --out=FILE.npz holds x_0 [n, ...] and labels [n], and with --autoencoder
also images, not clipped. The same seed, label and number in its row give the same noise, whatever else is drawn.
"""

import pathlib

from absl import flags
from absl import logging
import jax
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import images
from piflow_jax import program
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax import workdir as workdir_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.models import autoencoder as autoencoder_lib

_DECODED = 8  # images a device decodes at once: 256 x 256 ones take 0.22 GiB each, by XLA
_WAY = 2**31 - 1  # folded into the key of what is drawn on the way (h > 0)


def _define(values):
  flags.DEFINE_list("labels", None, "Classes, or held-out records, a row each; the first ten if not given.",
                    flag_values=values)
  flags.DEFINE_integer("num", 8, "Images of each label.", lower_bound=1, upper_bound=10**6, flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of the noises.", lower_bound=0, upper_bound=2**31 - 1, flag_values=values)
  flags.DEFINE_string("out", None, "File to write: .png or .npz.", flag_values=values)
  flags.DEFINE_string("step", None, "Checkpoint to draw from: a step, or best; the newest if not given.",
                      flag_values=values)
  flags.DEFINE_string("autoencoder", None, "Workdir of a converted autoencoder, to decode latents by.",
                      flag_values=values)


def draw(config, run, workdir, cond, ids, *, seed, mesh, step=None):
  """Samples by the averaged weights in workdir, as config.sampling says.

  Args:
    config: of the run.
    run: of `build.run`.
    workdir: local or gs://.
    cond: tree of conditions [n, ...].
    ids: [n] rows that they are of. The j-th sample of row i has noise of (seed, i, j).
    seed: a whole number.
    mesh: of `sharding.make_mesh`.
    step: of the checkpoint; None: the newest.
  Returns:
    x_0, [n, ...] float32.
  Raises:
    errors.UserError: no weights that fit.
    errors.NotFinite: what is drawn are no numbers.
  """
  jitted = train_step.compile(config, mesh, run)
  params = weights.load(workdir, jitted.state.ema, "ema", "--workdir", step=step)
  base = train_step.load_base(config, run, jitted)
  split = jax.NamedSharding(mesh, sharding.BATCH)
  key = jax.random.key(seed)

  def noise_of(row, number):
    own = jax.random.fold_in(jax.random.fold_in(key, row), number)
    return jax.random.normal(own, run.data.spec.x_0), jax.random.fold_in(own, _WAY)

  noises = jax.jit(jax.vmap(noise_of), out_shardings=split)

  def batch(cond, ids, numbers):
    noise, keys = noises(ids, numbers)
    return jitted.draw(params, base, noise, cond, keys)

  x_0 = _by_batches(batch, config.evaluation.batch_size, mesh, f"{workdir}: sampling", cond, ids, _numbers(ids))
  if not np.isfinite(x_0).all():
    bad = int((~np.isfinite(x_0.reshape(len(x_0), -1)).all(1)).sum())
    raise errors.NotFinite(f"{bad} of {len(x_0)} samples of {workdir} are not finite; its weights are broken, or "
                           "config.sampling takes them where they were not trained")
  return x_0


def _numbers(ids):
  """[n] which one of its row each sample is."""
  order = np.argsort(ids, kind="stable")
  numbers = np.empty(len(ids), np.int32)
  numbers[order] = np.arange(len(ids)) - np.searchsorted(ids[order], ids[order])
  return numbers


def decode(autoencoder, x_0, mesh):
  """Images [n, H, W, channels] of latents x_0 [n, h, w, C], by what `weights.load_autoencoder` gave."""
  net, params, scales = autoencoder

  def decoded(params, x):
    return net.apply({"params": params}, autoencoder_lib.from_latents(x, **scales), method="decode")

  jitted = jax.jit(sharding.under(mesh, decoded), out_shardings=sharding.replicated(mesh))
  size = _DECODED * sharding.sample_parts(mesh)
  return _by_batches(lambda x: jitted(params, x), size, mesh, "decoding", x_0)


def _by_batches(f, size, mesh, name, *trees):
  """f(*parts) of trees of arrays [n, ...], split over the mesh, at most about `size` rows at once."""
  leaves, structure = jax.tree.flatten(trees)
  n, parts = len(leaves[-1]), sharding.sample_parts(mesh)
  size = -(-min(n, max(size, 1)) // parts) * parts
  split, done = jax.NamedSharding(mesh, sharding.BATCH), []
  with tqdm.tqdm(total=n, unit="image", desc=name, disable=jax.process_index() > 0 or None) as bar:
    for batch in sampler.batches(size, *leaves):
      placed = [jax.device_put(x, split) for x in batch]
      done.append(np.asarray(f(*jax.tree.unflatten(structure, placed)), np.float32))
      bar.update(min(size, n - bar.n))
  return np.concatenate(done)[:n]


def _write(path, x_0, ids, decoded, columns):
  """All of the file, or nothing."""
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as f:
      if path.suffix.lower() == ".npz":
        np.savez(f, x_0=x_0, labels=ids, **({} if decoded is None else {"images": decoded}))
      else:
        f.write(images.png(images.image_grid(x_0 if decoded is None else decoded, columns)))
    partial.replace(path)
  except OSError as e:
    partial.unlink(missing_ok=True)
    raise errors.UserError(f"--out: cannot write {str(path)!r} ({e})") from e


def _main(given):
  config, values = given.config, given.flags
  path = pathlib.Path(values.out).expanduser()
  if path.suffix.lower() not in (".png", ".npz"):
    raise errors.UserError(f"--out: {values.out!r} ends neither in .png nor in .npz")
  program.check_file(values, "out")
  mesh, run = build.mesh(config), build.run(config)
  workdir_lib.warn_of_other(given.workdir, config)
  if remark := run.method.calls(config.sampling.nfe, config.sampling.h):
    logging.warning("%s", remark)
  try:
    cond, ids, names = spec_lib.conditions(run.data, values.labels, num=values.num)
  except ValueError as e:
    raise errors.UserError(f"--labels: {str(e).removeprefix('chosen: ')}") from e
  autoencoder = None
  if values.autoencoder is not None:
    folder = workdir_lib.path_of(values.autoencoder, "--autoencoder")
    autoencoder = weights.load_autoencoder(folder, sharding.replicated(mesh), channels=run.data.spec.x_0[-1])
  if autoencoder is None and path.suffix.lower() == ".png" and not images.shows(run.data.spec.x_0):
    raise errors.UserError(f"--out: a .png shows pictures of 1 or 3 channels, x_0 is {run.data.spec.x_0}; give "
                           "--autoencoder for latents, or a .npz")
  x_0 = draw(config, run, given.workdir, cond, ids, seed=values.seed, mesh=mesh,
             step=weights.step_of(given.workdir, values.step))
  decoded = decode(autoencoder, x_0, mesh) if autoencoder else None
  if jax.process_index() == 0:
    _write(path, x_0, ids, decoded, values.num)
    print(f"wrote {values.out}: {len(x_0)} samples" + (f", rows {', '.join(names)}" if any(names) else ""))
  return 0


PROGRAM = program.Program(_main, _define, __doc__, needs=("workdir", "out"))

if __name__ == "__main__":
  program.run(PROGRAM)
