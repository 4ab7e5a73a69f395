"""Weights from PyTorch and to PyTorch.

  python -m piflow_jax.convert from-torch --source=FILE_OR_FOLDER --config=FILE --workdir=DIR
  python -m piflow_jax.convert to-torch --workdir=runs/digits/student --out=DIR
  python -m piflow_jax.convert adapters --source=FILE_OR_FOLDER --out=DIR --format=kohya

from-torch reads safetensors (also sharded, with their index) and .pt/.pth files (weights only; needs PyTorch) of DiT
teachers (diffusers, facebookresearch/DiT, SiT, REPA, pi-Flow's release), of students of pi-Flow's release, of any
network whose weights to-torch wrote under their own paths, and of Stable Diffusion's autoencoder (which needs no
--config). The naming is recognised from the keys. DIR is then what --config.teacher.checkpoint, --workdir of
piflow_jax.sample and piflow_jax.evaluate, or to-torch take; its config.json is made of --config.

to-torch writes safetensors with config.json, averaged weights unless --no-ema. A DiT's go by the names of pi-Flow's
release, or others by --format, and beside them are files that sample it with nothing but PyTorch: python
DIR/piflow_torch.py --help. The weights of any other network go by their own paths.

adapters writes a file of adapters (LoRA) in another naming: --format is release (pi-Flow's), diffusers, peft or kohya;
whose the source's is, its keys tell. What a student has beside its adapters is written by release alone.

--dry-run prints what would become of what, and writes nothing. --source and --out are local paths.
"""

import math
import os
import sys

from absl import flags
from etils import epath
import jax

from piflow_jax import errors
from piflow_jax import program
from piflow_jax import weights
from piflow_jax.convert import adapters
from piflow_jax.convert import run
from piflow_jax.convert import table
from piflow_jax.models import autoencoder


def _define(values):
  flags.DEFINE_string("source", None, "from-torch: a file, or a folder with one checkpoint.", flag_values=values)
  flags.DEFINE_string("out", None, "to-torch: the folder to make.", flag_values=values)
  flags.DEFINE_string("format", None, "from-torch: whose names, where the keys do not tell. to-torch: whose names to "
                      "write. A DiT's: release (pi-Flow's), of a teacher also diffusers, repa, sit, dit "
                      "(facebookresearch's); any network's: paths.", flag_values=values)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "to-torch: of the weights written.",
                    flag_values=values)
  flags.DEFINE_float("max_shard_size", 5.0, "to-torch: GB of weights in a file, before there is another (pi-Flow's "
                     "release reads one file).", lower_bound=0.0, flag_values=values)
  flags.DEFINE_string("step", None, "to-torch: the checkpoint to write: a step, or best; the newest if not given.",
                      flag_values=values)
  flags.DEFINE_bool("ema", True, "to-torch: averaged weights. --no-ema: the last ones.", flag_values=values)
  flags.DEFINE_bool("dry_run", False, "Print the mapping, write nothing.", flag_values=values)


def _not_of(verb, values, *names):
  """Raises errors.UserError: a flag that the other verb reads."""
  for name in names:
    if values[name].present:
      raise errors.UserError(f"--{name}: {verb} does not read it; leave it out")


def _from_torch(given):
  values = given.flags
  _not_of("from-torch", values, "out", "dtype", "max_shard_size", "ema", "step")
  if not values.source:
    raise errors.UserError("--source: missing; name the checkpoint to read")
  run.from_torch(
      os.path.expanduser(values.source), given.workdir, given.config, naming=values.format, dry_run=values.dry_run)


def _to_torch(given):
  values = given.flags
  _not_of("to-torch", values, "source")
  if not values.out and not values.dry_run:
    raise errors.UserError("--out: missing; name the folder to make")
  if math.isnan(values.max_shard_size):
    raise errors.UserError("--max_shard_size: nan; give a number of gigabytes")
  out = os.path.expanduser(values.out) if values.out else None
  run.to_torch(given.workdir, out, given.config, naming=values.format, ema=values.ema, dtype=values.dtype,
               dry_run=values.dry_run, max_bytes=values.max_shard_size * 1e9,
               step=weights.step_of(given.workdir, values.step))


def _adapters(given):
  values = given.flags
  _not_of("adapters", values, "dtype", "max_shard_size", "ema", "step", "dry_run")
  for name in ("source", "out"):
    if not values[name].value:
      raise errors.UserError(f"--{name}: missing; {values[name].help}")
  if values.format not in adapters.NAMINGS:
    raise errors.UserError(f"--format: {values.format!r} is none of {', '.join(adapters.NAMINGS)}")
  loaded = adapters.read(os.path.expanduser(values.source))
  adapters.write(os.path.expanduser(values.out), loaded, values.format)
  left = "" if values.format == "release" or not loaded.others else f"; left out: {table.listed(sorted(loaded.others))}"
  print(f"wrote {values.out}: {len(loaded.adapters)} adapters as {values.format} has them{left}")


def _is_autoencoder(argv):
  """Whether the workdir that a command line names is an autoencoder's."""
  words = [word.partition("=")[2] for word in argv if word.startswith("--workdir=")]
  return bool(words) and "://" not in words[-1] and (epath.Path(words[-1]).expanduser() / autoencoder.FILE).exists()


def program_of(argv):
  """(Program, its command line) of `from-torch ...` or `to-torch ...`, as people write it. Raises errors.UserError."""
  verb = next((word for word in argv[1:] if word in ("from-torch", "to-torch", "adapters")), None)
  rest = [argv[0], *(word for word in argv[1:] if word != verb)]
  if verb == "from-torch":
    return program.Program(_from_torch, _define, __doc__, config="optional"), rest
  if verb == "adapters":
    return program.Program(_adapters, _define, __doc__, needs=(), config="optional"), rest
  if verb == "to-torch" or any(word.startswith(("--help", "-help", "-h")) for word in rest):
    config = "optional" if _is_autoencoder(rest) else "workdir"
    return program.Program(_to_torch, _define, __doc__, config=config), rest
  raise errors.UserError("say what to do: python -m piflow_jax.convert from-torch, to-torch or adapters ... "
                         "(--help tells more)")


def invoke(argv):
  """(exit status, the error's one line or "") in this process."""
  try:
    return program.invoke(*program_of(argv))
  except errors.UserError as e:
    return 2, str(e)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")  # a conversion needs no accelerator, and must not take one
  status, text = invoke(sys.argv)
  if text:
    print(f"error: {text}", file=sys.stderr, flush=True)
  sys.exit(status)
