"""Draw images from a run: from a student in its few network calls, from a teacher in many.

  python -m piflow_jax.sample --workdir=runs/digits/student --out=samples.png
  python -m piflow_jax.sample --workdir=DIR --labels=207,360 --autoencoder=DIR --out=samples.png
  python -m piflow_jax.sample --workdir=runs/emoji/student --prompt="a green apple" --prompt="sad cat" --out=apple.png

--workdir is one of piflow_jax.main, or what piflow_jax.convert from-torch made of a PyTorch checkpoint; its own
config is read from it. The averaged weights are drawn from; a student needs no teacher's, unless a part of it is the
teacher's.

How is set by --config.sampling.nfe=N calls (of a student those that it is trained for), --config.sampling.h
(stochasticity), --config.policy.temperature (GM), --config.method.solver (a teacher's). Guidance is in a student's
weights; a teacher is drawn from without any. --config.evaluation.batch_size=N bounds how many are drawn at once.

--labels chooses rows: classes by number or name; where conditions are more than a label, numbers of held-out records.
--prompt (as often as you like) and --prompts=FILE, a prompt a line, are for runs on texts: they are encoded by the
encoder that the run's cache was made by, or by --encoder. --size=WIDTHxHEIGHT in pixels draws another size than the
run was trained at. --lora=FILE:0.8, several with commas between, adds others' adapters to the network at that strength;
--teacher-steps=N puts the teacher's N Euler steps from the same noises below each row.

--out=FILE.png is a grid, a row a label or prompt: pictures of 1 or 3 channels in [-1, 1], frames of a video in a row.
Latents become pictures by --autoencoder, the workdir that piflow_jax.convert from-torch made of Stable Diffusion's or
FLUX's; its scale and shift are applied. The file says how it was drawn, in its texts: rows, seed, calls. --out=FOLDER/
has each picture in a file of its own, and grid.png. --out=FILE.npz holds x_0 [n, ...] and labels [n], and with
--autoencoder also images, not clipped. The same seed, label or prompt, and number in its row give the same noise,
whatever else is drawn.
"""

import functools
import json
import pathlib
import re

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
from piflow_jax.convert import adapters
from piflow_jax.convert import trees
from piflow_jax.data import spec as spec_lib
from piflow_jax.data import text_encoders
from piflow_jax.models import autoencoder as autoencoder_lib

_DECODED = 8  # images a device decodes at once: 256 x 256 ones take 0.22 GiB each, by XLA
_WAY = 2**31 - 1  # folded into the key of what is drawn on the way (h > 0)


def _define(values):
  flags.DEFINE_list("labels", None, "Classes, or held-out records, a row each; the first ten if not given.",
                    flag_values=values)
  flags.DEFINE_integer("num", 8, "Images of each label.", lower_bound=1, upper_bound=10**6, flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of the noises.", lower_bound=0, upper_bound=2**31 - 1, flag_values=values)
  flags.DEFINE_multi_string("prompt", None, "A text to draw by, a row each.", flag_values=values)
  flags.DEFINE_string("prompts", None, "A file of such texts, one a line.", flag_values=values)
  flags.DEFINE_string("encoder", None, "KIND:PLACE of the texts' encoder; the run's own if not given.",
                      flag_values=values)
  flags.DEFINE_string("size", None, "WIDTHxHEIGHT in pixels; what the run was trained at if not given.",
                      flag_values=values)
  flags.DEFINE_list("lora", [], "Adapters to add, FILE or FILE:STRENGTH.", flag_values=values)
  flags.DEFINE_integer("teacher_steps", 0, "Draw the teacher's samples too, in so many Euler steps; 0: none.",
                       lower_bound=0, upper_bound=10**4, flag_values=values)
  flags.DEFINE_string("out", None, "File to write, .png or .npz; or a folder, with a / at its end.", flag_values=values)
  flags.DEFINE_string("step", None, "Checkpoint to draw from: a step, or best; the newest if not given.",
                      flag_values=values)
  flags.DEFINE_string("autoencoder", None, "Workdir of a converted autoencoder, to decode latents by.",
                      flag_values=values)


def draw(config, run, workdir, cond, ids, *, seed, mesh, step=None, added=None, teacher_steps=0):
  """Samples by the averaged weights in workdir, as config.sampling says; or by the teacher's, in teacher_steps.

  Args:
    config: of the run.
    run: of `build.run`.
    workdir: local or gs://.
    cond: tree of conditions [n, ...].
    ids: [n] rows that they are of. The j-th sample of row i has noise of (seed, i, j).
    seed: a whole number.
    mesh: of `sharding.make_mesh`.
    step: of the checkpoint; None: the newest.
    added: weights -> weights with others' adapters; None: there are none.
    teacher_steps: Euler steps of the teacher, whose samples are drawn then.
  Returns:
    x_0, [n, ...] float32.
  Raises:
    errors.UserError: no weights that fit.
    errors.NotFinite: what is drawn are no numbers.
  """
  jitted = train_step.compile(config, mesh, run)
  if teacher_steps:
    params, base = train_step.load_teacher(config, run, jitted.teacher), None
    drawer = _of_teacher(run, teacher_steps, mesh)
  else:
    params = weights.load(workdir, jitted.state.ema, "ema", "--workdir", step=step)
    base, drawer = train_step.load_base(config, run, jitted), jitted.draw
  if added is not None:
    params, base = added(params), None if base is None else added(base)
  split = jax.NamedSharding(mesh, sharding.BATCH)
  key = jax.random.key(seed)

  def noise_of(row, number):
    own = jax.random.fold_in(jax.random.fold_in(key, row), number)
    return jax.random.normal(own, run.data.spec.x_0), jax.random.fold_in(own, _WAY)

  noises = jax.jit(jax.vmap(noise_of), out_shardings=split)

  def batch(cond, ids, numbers):
    noise, keys = noises(ids, numbers)
    return drawer(params, base, noise, cond, keys)

  x_0 = _by_batches(batch, config.evaluation.batch_size, mesh, f"{workdir}: sampling", cond, ids, _numbers(ids))
  if not np.isfinite(x_0).all():
    bad = int((~np.isfinite(x_0.reshape(len(x_0), -1)).all(1)).sum())
    raise errors.NotFinite(f"{bad} of {len(x_0)} samples of {workdir} are not finite; its weights are broken, or "
                           "config.sampling takes them where they were not trained")
  return x_0


def _of_teacher(run, steps, mesh):
  clock = build.teacher_clock(run, steps)

  def draw_(params, base, noise, cond, keys):
    del base
    return sampler.sample(build.teacher_flow_map(run, params, cond, clock), noise, keys, clock)

  return jax.jit(sharding.under(mesh, draw_), out_shardings=sharding.replicated(mesh))


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


def _write(path, x_0, ids, decoded, columns, texts):
  """All of the file, or nothing."""
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as f:
      if path.suffix.lower() == ".npz":
        np.savez(f, x_0=x_0, labels=ids, **({} if decoded is None else {"images": decoded}))
      else:
        f.write(images.png(images.image_grid(x_0 if decoded is None else decoded, columns), texts))
    partial.replace(path)
  except OSError as e:
    partial.unlink(missing_ok=True)
    raise errors.UserError(f"--out: cannot write {str(path)!r} ({e})") from e


def _write_each(folder, pictures, names, columns, texts):
  """A picture a file, 003-02-a-green-apple.png, and all of them in grid.png."""
  folder.mkdir(parents=True, exist_ok=True)
  for i, picture in enumerate(images.to_pixels(pictures)):
    row, number = divmod(i, columns)
    name = re.sub(r"[^a-z0-9]+", "-", names[row].lower()).strip("-")[:60]
    own = dict(texts, prompt=names[row], number=str(number))
    (folder / f"{row:03}-{number:02}-{name or 'sample'}.png").write_bytes(images.png(picture, own))
  _write(folder / "grid.png", pictures, None, None, columns, texts)


def _asked(config, run, values):
  """(cond, ids, names) of what the command line asks for."""
  prompts = list(values.prompt or ())
  if values.prompts:
    try:
      lines = pathlib.Path(values.prompts).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
      raise errors.UserError(f"--prompts: {values.prompts!r} cannot be read ({e})") from e
    prompts += [line.strip() for line in lines if line.strip()]
  if not prompts:
    with errors.flag("labels"):
      return spec_lib.conditions(run.data, values.labels, num=values.num)
  if "encoder" not in config.data:
    raise errors.UserError("--prompt: this run was not trained on texts; leave it out")
  if values.labels:
    raise errors.UserError("--labels: rows are prompts here; leave it out")
  with errors.flag("encoder"):
    encoder = text_encoders.open_encoder(values.encoder or config.data.encoder, run.data.spec.cond["text"].shape[0])
    return text_encoders.conditions(encoder, run.data.spec, prompts, values.num)


def _shape(size, factor, channels):
  """x_0's shape at a size in pixels."""
  sides = size.lower().split("x")
  if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % factor == 0 for side in sides):
    raise errors.UserError(f"--size: {size!r}; give WIDTHxHEIGHT, in pixels that {factor} divides")
  width, height = (int(side) // factor for side in sides)
  return height, width, channels


def _adder(config, run, values):
  """What adds the adapters of --lora to weights, or None."""
  if not values.lora:
    return None
  teacher, own = trees.weights_of(config)
  total = {}
  for text in values.lora:
    place, _, strength = text.rpartition(":")
    try:
      place, strength = (place, float(strength)) if place else (text, 1.0)
    except ValueError:
      place, strength = text, 1.0
    loaded = adapters.read(pathlib.Path(place).expanduser(), "--lora")
    for where, placed in adapters.deltas(loaded, teacher if run.student is None else own, strength, place).items():
      total.setdefault(where, []).extend(placed)
  return functools.partial(adapters.merged, found=total)


def _main(given):
  config, values = given.config, given.flags
  path = pathlib.Path(values.out).expanduser()
  each = values.out.endswith("/")
  if not each:
    if path.suffix.lower() not in (".png", ".npz"):
      raise errors.UserError(f"--out: {values.out!r} ends neither in .png nor in .npz, nor in a / as a folder")
    program.check_file(values, "out")
  mesh, autoencoder = build.mesh(config), None
  if values.autoencoder is not None:
    folder = workdir_lib.path_of(values.autoencoder, "--autoencoder")
    autoencoder = weights.load_autoencoder(folder, sharding.replicated(mesh))
  run = build.run(config)
  if values.size:
    factor = 2 ** (len(autoencoder[0].widths) - 1) if autoencoder else 1
    run = build.run(config, size=_shape(values.size, factor, run.data.spec.x_0[-1]))
  workdir_lib.warn_of_other(given.workdir, config)
  if remark := run.method.calls(config.sampling.nfe, config.sampling.h):
    logging.warning("%s", remark)
  if autoencoder is not None:
    weights.check_channels(autoencoder, run.data.spec.x_0[-1], values.autoencoder)
  elif path.suffix.lower() != ".npz" and not images.shows(run.data.spec.x_0):
    raise errors.UserError(f"--out: a .png shows pictures of 1 or 3 channels, x_0 is {run.data.spec.x_0}; give "
                           "--autoencoder for latents, or a .npz")
  if values.teacher_steps and run.teacher is None:
    raise errors.UserError("--teacher_steps: this run has no teacher; leave it out")
  cond, ids, names = _asked(config, run, values)
  how = dict(seed=values.seed, mesh=mesh, added=_adder(config, run, values))
  x_0 = draw(config, run, given.workdir, cond, ids, step=weights.step_of(given.workdir, values.step), **how)
  if values.teacher_steps:
    beside = draw(config, run, given.workdir, cond, ids, teacher_steps=values.teacher_steps, **how)
    x_0, ids = (_interleaved(a, b, values.num) for a, b in ((x_0, beside), (ids, ids)))
    names = [name for one in names for name in (one, f"{one} (teacher, {values.teacher_steps} steps)")]
  decoded = decode(autoencoder, x_0, mesh) if autoencoder else None
  if jax.process_index() == 0:
    texts = {"piflow_jax": json.dumps(dict(
        workdir=str(given.workdir), rows=names, seed=values.seed, calls=config.sampling.nfe, h=config.sampling.h,
        lora=values.lora))}
    if each:
      _write_each(path, x_0 if decoded is None else decoded, names, values.num, texts)
    else:
      _write(path, x_0, ids, decoded, values.num, texts)
    print(f"wrote {values.out}: {len(x_0)} samples" + (f", rows {', '.join(names)}" if any(names) else ""))
  return 0


def _interleaved(a, b, num):
  """Rows of num from a and from b in turn."""
  a, b = (x.reshape(-1, num, *x.shape[1:]) for x in (a, b))
  return np.stack([a, b], axis=1).reshape(-1, *a.shape[2:])


PROGRAM = program.Program(_main, _define, __doc__, needs=("workdir", "out"))

if __name__ == "__main__":
  program.run(PROGRAM)
