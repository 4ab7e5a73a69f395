"""Weights from PyTorch and to PyTorch.

  python -m piflow_jax.convert from-torch --source=FILE_OR_FOLDER --config=configs/imagenet_dit.py:XL,repa-1nfe --workdir=DIR
  python -m piflow_jax.convert to-torch --config=configs/digits.py:student --workdir=runs/digits/student --out=DIR

from-torch reads safetensors (also sharded, with their index) and .pt/.pth files (weights only; needs PyTorch) of DiT
teachers (diffusers, facebookresearch/DiT, SiT, REPA, pi-Flow's release), of students of pi-Flow's release, and of Stable
Diffusion's autoencoder (which needs no --config). The naming is recognised from the keys. DIR is then what
--config.teacher.checkpoint, --workdir of an evaluation, or to-torch take.

to-torch writes safetensors with config.json, averaged weights unless --no-ema, and beside a student piflow_torch.py, which
samples it with nothing but PyTorch: python DIR/piflow_torch.py --help.

--dry-run prints what would become of what, and writes nothing. --source and --out are local paths.
"""

import sys

from absl import flags
import jax

from piflow_jax import errors
from piflow_jax import main as program
from piflow_jax.convert import dit
from piflow_jax.convert import run

SOURCE = flags.DEFINE_string("source", None, "from-torch: a file, or a folder with one checkpoint.")
OUT = flags.DEFINE_string("out", None, "to-torch: the folder to make.")
NAMING = flags.DEFINE_enum("format", None, list(dit.NAMINGS),
                           "from-torch: whose names, where the keys do not tell. to-torch: whose names to write, of a "
                           "teacher; default release, pi-Flow's.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "to-torch: of the weights written.")
MAX_SHARD_SIZE = flags.DEFINE_float("max_shard_size", 5.0, "to-torch: GB of weights in a file, before there is another "
                                    "(pi-Flow's release reads one file). Also --max-shard-size.", lower_bound=0.0)
EMA = flags.DEFINE_bool("ema", True, "to-torch: averaged weights. --no-ema: the last ones.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the mapping, write nothing. Also --dry-run.")


def _from_torch(argv):
  del argv
  if not SOURCE.value:
    raise errors.UserError("--source: missing; name the checkpoint to read")
  run.from_torch(
      SOURCE.value, program.WORKDIR.value, program.CONFIG.value, naming=NAMING.value, dry_run=DRY_RUN.value)


def _to_torch(argv):
  del argv
  if not OUT.value and not DRY_RUN.value:
    raise errors.UserError("--out: missing; name the folder to make")
  run.to_torch(program.WORKDIR.value, OUT.value, program.CONFIG.value, naming=NAMING.value, ema=EMA.value,
               dtype=DTYPE.value, dry_run=DRY_RUN.value, max_bytes=MAX_SHARD_SIZE.value * 1e9)


_VERBS = {"from-torch": _from_torch, "to-torch": _to_torch}

if __name__ == "__main__":
  # absl knows --noema and --dry_run; people write dashes.
  spelling = {"--no-ema": "--noema", "--dry-run": "--dry_run", "--max-shard-size": "--max_shard_size"}
  words = [argument.partition("=") for argument in sys.argv[1:]]
  sys.argv[1:] = [spelling.get(name, name) + equals + value for name, equals, value in words]
  verb = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in _VERBS else None
  if verb is None and not any(argument.startswith("--help") for argument in sys.argv):
    print(f"error: say what to do: python -m piflow_jax.convert {' or '.join(_VERBS)} ... (--help tells more)", file=sys.stderr)
    sys.exit(2)
  jax.config.update("jax_platforms", "cpu")  # a conversion needs no accelerator, and must not take one
  program.run(_VERBS.get(verb), required=("workdir",))
