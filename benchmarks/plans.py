"""One table of plans: every recipe of configs/imagenet_dit.py on four slices, compiled for them with no TPU attached.

  PYTHONPATH=.libtpu python -m benchmarks.plans --out=plans [--sizes=XL] [--recipes=...] [--fsdp=8]

A minute or more for each slice of each recipe; what is in the folder already is not compiled again. Recipes that differ
in what a step's time does not depend on (guidance, number of updates, noise of the same shape) share a plan. Prints the
table of docs/imagenet.md.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from configs import imagenet_dit
from piflow_jax import config as config_lib
from piflow_jax import workdir

SLICES = ("v5e-64", "v6e-64", "v6e-256", "v5p-128")
_SAME = ("steps", "teacher.guidance", "network.time_scale", "network.mlp_norm_eps", "policy.dropout", "method.ratio",
         "method.guidance_scale", "optimizer.", "data.")


def main():
  """Compiles what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", default="plans")
  parser.add_argument("--sizes", default="XL")
  parser.add_argument("--recipes", default=",".join([*imagenet_dit.RECIPES, "teacher"]))
  parser.add_argument("--fsdp", type=int, default=8)
  parser.add_argument("--table", action="store_true", help="print what is there, compile nothing")
  given = parser.parse_args()
  folder = pathlib.Path(given.out)
  folder.mkdir(parents=True, exist_ok=True)
  names, known = [(size, recipe) for size in given.sizes.split(",") for recipe in given.recipes.split(",")], {}
  for size, recipe in names:
    path = folder / f"{known.setdefault(_signature(size, recipe), f'{size}-{recipe}')}.json"
    if not path.exists() and not given.table:
      command = [sys.executable, "-m", "piflow_jax.plan", f"--config=configs/imagenet_dit.py:{size},{recipe}",
                 f"--config.mesh.fsdp={given.fsdp}", f"--topology={','.join(SLICES)}", f"--json={path}"]
      subprocess.run(command, check=False)
  print("| | " + " | ".join(SLICES) + " |\n" + "|---" * (1 + len(SLICES)) + "|")
  for size, recipe in names:
    path = folder / f"{known[_signature(size, recipe)]}.json"
    if path.exists():
      steps = imagenet_dit.get_config(f"{size},{recipe}").steps
      cells = [_cell(plan, steps) for plan in json.loads(path.read_text())]
      print(f"| {size}, {recipe} | " + " | ".join(cells) + " |")


def _signature(size, recipe):
  flat = workdir.flat(config_lib.to_plain(imagenet_dit.get_config(f"{size},{recipe}")))
  return json.dumps({k: v for k, v in flat.items() if not k.startswith(_SAME)}, sort_keys=True, default=str)


def _cell(plan, steps):
  if not plan["fits"]:
    return f"no, {plan['memory']['total'] / 2**30:.1f} GiB"
  hours = plan["seconds"]["step"] * steps / 3600
  return f"{hours:.3g} h, {hours * plan['chips']:,.0f}; {plan['memory']['total'] / 2**30:.1f} GiB"


if __name__ == "__main__":
  main()
