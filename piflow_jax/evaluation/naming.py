"""What a report's figures depend on: its name and its settings."""

import re
import zlib

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import workdir as workdir_lib

# Fields, or starts of fields, that change a report's figures.
_SETTINGS = ("sampling.nfe", "sampling.h", "evaluation.samples", "evaluation.seed", "evaluation.features", "data.",
             "policy.", "method.", "flow.", "teacher.guidance", "teacher.orthogonal", "teacher.weights",
             "teacher.mixture")
_REPORTED = {  # setting: field
    "nfe": "sampling.nfe", "h": "sampling.h", "temperature": "policy.temperature", "solver": "method.solver",
    "guidance_scale": "teacher.guidance_scale", "samples": "evaluation.samples", "seed": "evaluation.seed"}


def settings(config):
  """{name: value} of the fields that a report shows."""
  flat = workdir_lib.flat(config_lib.to_plain(config))
  return {name: flat[field] for name, field in _REPORTED.items() if field in flat}


def named(stem, config, workdir):
  """`stem`, or "stem-<what differs>" where a setting is not the workdir's own config's."""
  try:
    known = workdir_lib.plain(workdir)
  except errors.UserError:
    known = None
  if known is None:
    return stem
  old, new = workdir_lib.flat(workdir_lib.completed(known)), workdir_lib.flat(config_lib.to_plain(config))
  # As _SETTINGS lists them, and what a noun is before its fields.
  keys = [key for start in _SETTINGS for key in sorted(new, key=_make_first) if key.startswith(start)]
  differ = [key for key in keys if old.get(key) != new[key]]
  if not differ:
    return stem
  text = ",".join(_difference(key, new[key]) for key in differ)
  if len(text) > 100:
    text = f"{text[:90]}-{zlib.crc32(text.encode()):08x}"
  return f"{stem}-{text}"


def _make_first(key):
  return not key.endswith(".make"), key


def _difference(key, value):
  *parents, last = key.split(".")
  if last == "make":  # a function "@module:name", in the module of its noun
    last, value = parents[-1], str(value).partition(":")[0].split(".")[-1]
  return f"{last}={re.sub('[^A-Za-z0-9.+-]+', '-', str(value)).strip('-')}"
