"""Emoji and their names as pairs for piflow_jax.data.prompts: real words and real pictures that fit a laptop.

  npm pack emoji-datasource-google && tar -xzf emoji-datasource-google-*.tgz
  python -m piflow_jax.data.emoji --source=package --out=pairs.jsonl

--source is the unpacked npm package emoji-datasource-google (Noto Color Emoji: 64 x 64 pixels, names of Unicode). A
picture has a row for each of its names: Unicode's and, where its words are others, the one that people type. Skin tones
are named too. Flags of countries, whose names say nothing of how they look, are left out unless --flags.
--wording="an icon of {}" says the names otherwise, --every=16 takes each sixteenth picture: so a list is made of
wordings that no training saw.
"""

import json
import os
import pathlib
import sys

from absl import flags

from piflow_jax import errors
from piflow_jax import program

_PICTURES = "img/google/64"
_TONES = {"1F3FB": "light skin tone", "1F3FC": "medium light skin tone", "1F3FD": "medium skin tone",
          "1F3FE": "medium dark skin tone", "1F3FF": "dark skin tone"}


def pairs(folder, with_flags=False):
  """[{"prompt", "image"}] of an unpacked package, images by their paths.

  Raises:
    ValueError: "source: ...": it is none.
  """
  folder = pathlib.Path(folder)
  try:
    table = json.loads((folder / "emoji.json").read_text())
    found = [pair for emoji in table if with_flags or emoji["category"] != "Flags" for pair in _of(emoji, folder)]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"source: {folder} is no unpacked emoji-datasource-google ({type(e).__name__}: {e}); npm pack it, "
                     "and give the folder package") from e
  if not found:
    raise ValueError(f"source: {folder} has no pictures in {_PICTURES}; npm pack emoji-datasource-google has")
  return found


def _of(emoji, folder):
  name = emoji["name"] or emoji["short_name"]
  names = [name.lower().replace(":", ""), emoji["short_names"][0].replace("_", " ").replace("-", " ")]
  if set(names[1].split()) <= set(names[0].split()):
    names.pop()
  variants = [("", emoji["image"])]
  variants += [(f", {_TONES[tone]}", variant["image"]) for tone, variant in emoji.get("skin_variations", {}).items()
               if tone in _TONES]
  for tone, image in variants:
    path = folder / _PICTURES / image
    if path.exists():
      for one in names:
        yield {"prompt": one + tone, "image": str(path.resolve())}


def reworded(rows, wording, every):
  """Each every-th picture of rows under its first name, said otherwise; `wording` has {} in the name's place.

  Raises:
    ValueError: "wording: ...": it has no {}, or more than one.
  """
  if wording.count("{}") != 1:
    raise ValueError(f"wording: {wording!r} must have {{}} once, where the name goes")
  first = {row["image"]: row for row in reversed(rows)}
  chosen = list(reversed(first.values()))[::every]
  return [row | {"prompt": wording.format(row["prompt"])} for row in chosen]


def _define(values):
  flags.DEFINE_string("source", None, "The unpacked npm package emoji-datasource-google.", flag_values=values)
  flags.DEFINE_string("out", None, "The .jsonl file to write.", flag_values=values)
  flags.DEFINE_string("wording", "{}", "What a name becomes, {} being the name.", flag_values=values)
  flags.DEFINE_integer("every", 1, "Take one picture of so many.", lower_bound=1, flag_values=values)
  flags.DEFINE_bool("flags", False, "Flags of countries too.", flag_values=values)


def _main(given):
  values = given.flags
  program.check_file(values, "out")
  with errors.flag("source"):
    found = pairs(os.path.expanduser(values.source), values["flags"].value)
  if values.wording != "{}" or values.every > 1:
    with errors.flag("wording"):
      found = reworded(found, values.wording, values.every)
  path = pathlib.Path(values.out).expanduser()
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text("".join(json.dumps(pair) + "\n" for pair in found))
  partial.replace(path)
  print(f"{path}: {len(found):,} names of {len({pair['image'] for pair in found}):,} pictures")
  return 0


PROGRAM = program.Program(_main, _define, __doc__, needs=("source", "out"), config="optional")

if __name__ == "__main__":
  program.run(PROGRAM, sys.argv)
