r"""Draw images from a run: from a student in its few network calls, from a teacher in many.

  python -m piflow_jax.sample --config=configs/digits.py:student --workdir=runs/digits/student --out=samples.png
  python -m piflow_jax.sample --config=configs/imagenet_dit.py:XL,repa-1nfe --workdir=DIR --labels=207,360 \
      --autoencoder=DIR --out=samples.png

--workdir is one of piflow_jax.main, or what piflow_jax.convert from-torch made of a PyTorch checkpoint; --config its config.
The averaged weights are drawn from; a student needs no teacher's, so config.teacher.checkpoint may be missing or gone.

How is said by config.sampling: --config.sampling.nfe=N calls (of a student those that it is trained for, if its policy has
segments of its own), h (stochasticity), temperature (GM), solver (a teacher's). Guidance is in a student's weights; a
teacher is drawn from without any: --config.teacher is what its student sees. --config.evaluation.batch_size=N bounds how
many are drawn at once.

--out=FILE.png is a grid, a row a label: images of 1 or 3 channels in [-1, 1]. Latents become such ones by --autoencoder, the
workdir that piflow_jax.convert from-torch made of Stable Diffusion's or FLUX's; its scale and shift are applied.
--out=FILE.npz holds x_0 [n, H, W, C] and labels [n], as drawn, and with --autoencoder also images, not clipped.
The same seed, label and number in its row give the same noise, whatever else is drawn.
"""

import pathlib

from absl import flags
import jax
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import latents
from piflow_jax import main as program
from piflow_jax import run_log
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax.evaluation import figures
from piflow_jax.models import autoencoder as autoencoder_lib

LABELS = flags.DEFINE_list("labels", None, "Classes, a row each; the first ten if not given.")
NUM = flags.DEFINE_integer("num", 8, "Images of each label.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the noises.")
OUT = flags.DEFINE_string("out", None, "File to write: .png or .npz.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Workdir of a converted autoencoder, to decode latents by.")

_DECODED = 8  # images a device decodes at once: 256 x 256 ones take 0.22 GiB each, by XLA


def draw(config, workdir, labels, numbers, *, seed, mesh):
  """Images by the averaged weights in workdir, as config.sampling says.

  Args:
    config: of the run.
    workdir: local or gs://.
    labels: [n] classes.
    numbers: [n] which one of its label each image is: its noise is of (seed, label, number).
    seed: a whole number.
    mesh: of `sharding.make_mesh`.
  Returns:
    x_0, [n, H, W, C] float32.
  Raises:
    errors.UserError: fields that do not fit, or no weights that do.
  """
  jitted = train_loop.compile_run(config, mesh, build.run(config))
  params = checkpoint.load_weights(workdir, jitted["state"].ema, "ema", "--workdir")
  run_log.warn_of_other(workdir, config)
  key = jax.random.key(seed)
  noise = jax.vmap(lambda label, i: jax.random.normal(
      jax.random.fold_in(jax.random.fold_in(key, label), i), tuple(config.data.shape)))
  noise = jax.jit(noise, out_shardings=jax.NamedSharding(mesh, sharding.BATCH))
  way = jax.random.fold_in(key, 2**31 - 1)  # of what is drawn on the way, h > 0

  def batch(i, labels, numbers):
    # All weights of today's students are their own: there is nothing to take from the teacher.
    return jitted["draw"](params, None, noise(labels, numbers), labels, jax.random.fold_in(way, i))

  return _by_batches(batch, config.evaluation.batch_size, mesh, f"{workdir}: sampling", labels, numbers)


def decode(autoencoder, x_0, mesh):
  """Images [n, H, W, channels] of latents x_0 [n, h, w, C], by what `latents.load` gave."""
  net, params, scales = autoencoder
  decoded = lambda params, x: net.apply({"params": params}, autoencoder_lib.from_latents(x, **scales), method="decode")
  decoded = jax.jit(sharding.under(mesh, decoded), out_shardings=sharding.replicated(mesh))
  return _by_batches(lambda i, x: decoded(params, x), _DECODED * sharding.sample_parts(mesh), mesh, "decoding", x_0)


def _by_batches(f, size, mesh, name, *arrays):
  """f(batch's number, *parts) of arrays [n, ...], split over the mesh, at most about `size` rows at once."""
  n, parts = len(arrays[0]), sharding.sample_parts(mesh)
  size = -(-min(n, max(size, 1)) // parts) * parts
  split, done = jax.NamedSharding(mesh, sharding.BATCH), []
  with tqdm.tqdm(total=n, unit="image", desc=name, disable=jax.process_index() > 0 or None) as bar:
    for i, batch in enumerate(sampler.batches(size, *arrays)):
      done.append(np.asarray(f(i, *(jax.device_put(x, split) for x in batch)), np.float32))
      bar.update(min(size, n - bar.n))
  return np.concatenate(done)[:n]


def _chosen_labels(classes):
  chosen = LABELS.value
  if chosen is None:
    return list(range(min(10, classes)))
  if not chosen or not all(label.isdecimal() and int(label) < classes for label in chosen) or len(set(chosen)) < len(chosen):
    raise errors.UserError(f"--labels: {','.join(chosen) or 'nothing'}; give classes from 0 to {classes - 1}, each once")
  return [int(label) for label in chosen]


def _load_autoencoder(config, mesh):
  if AUTOENCODER.value is None:
    return None
  found = latents.load(AUTOENCODER.value, sharding.replicated(mesh))
  if found[0].latent_channels != config.data.shape[-1]:
    raise errors.UserError(f"--autoencoder: {AUTOENCODER.value!r} has latents of {found[0].latent_channels} channels, "
                           f"config.data.shape is {tuple(config.data.shape)}; give the one that these latents are of")
  return found


def _check_channels(channels):
  if OUT.value.lower().endswith(".png") and channels not in (1, 3):
    raise errors.UserError(f"--out: a .png shows 1 or 3 channels, not {channels}; give --autoencoder for latents, or a .npz")


def _write(path, x_0, labels, images, columns):
  """All of the file, or nothing."""
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as f:
      if path.suffix.lower() == ".npz":
        np.savez(f, x_0=x_0, labels=labels, **({} if images is None else {"images": images}))
      else:
        from PIL import Image

        Image.fromarray(figures.image_grid(x_0 if images is None else images, columns)).save(f, "PNG")
    partial.replace(path)
  except OSError as e:
    partial.unlink(missing_ok=True)
    raise errors.UserError(f"--out: cannot write {str(path)!r} ({e})") from e


def _main(argv):
  del argv
  config = program.CONFIG.value
  if not OUT.value.lower().endswith((".png", ".npz")):
    raise errors.UserError(f"--out: {OUT.value!r} ends neither in .png nor in .npz")
  program.check_file(OUT)
  chosen = _chosen_labels(config.data.num_classes)
  mesh = sharding.make_mesh(**config.mesh)
  autoencoder = _load_autoencoder(config, mesh)
  _check_channels(autoencoder[0].channels if autoencoder else config.data.shape[-1])
  labels, numbers = (x.ravel().astype(np.int32) for x in np.meshgrid(chosen, np.arange(NUM.value), indexing="ij"))
  x_0 = draw(config, program.WORKDIR.value, labels, numbers, seed=SEED.value, mesh=mesh)
  images = decode(autoencoder, x_0, mesh) if autoencoder else None
  if jax.process_index() == 0:
    _write(pathlib.Path(OUT.value), x_0, labels, images, NUM.value)
    print(f"wrote {OUT.value}: {len(x_0)} images, labels {','.join(map(str, chosen))}")
  return 0


if __name__ == "__main__":
  program.run(_main, required=("config", "workdir", "out"))
