"""TPUs as Google describes them (cloud.google.com/tpu/docs, "System architecture"): bytes and FLOPs a second of a chip.

Cards as NVIDIA does (data sheets of its SXM cards, dense): of their memory nine tenths are XLA's, the rest CUDA's and
cuDNN's, as with XLA_PYTHON_CLIENT_MEM_FRACTION=.9. `link` of a card is half of what it sends one way by NVLink.

`link` is one way of one ICI link (Google's figures for a chip count all links and both ways). `network` is a chip's
share of the data-centre network that joins slices, from "How to Scale Your Model" (2025): the least certain number
here.
"""

import re
from typing import NamedTuple

from piflow_jax import errors


class Chip(NamedTuple):
  flops: float  # bfloat16
  memory: float  # bytes of HBM that XLA grants a program, as its refusals state them
  link: float  # bytes a second
  network: float  # bytes a second
  clock: float  # Hz of the compiler's cycles: peak FLOPs a second over FLOPs a cycle; 0 of a card

  @property
  def card(self):
    """Whether it is a GPU."""
    return not self.clock


CHIPS = {
    "v5e": Chip(197e12, 15.75 * 2**30, 45e9, 6.25e9, 1.5e9),
    "v5p": Chip(459e12, 95.74 * 2**30, 90e9, 6.25e9, 1.75e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 90e9, 12.5e9, 1.75e9),
    "h100": Chip(989e12, 0.9 * 84942979072, 225e9, 50e9, 0),
    "h200": Chip(989e12, 0.9 * 151397597184, 225e9, 50e9, 0),
    "a100": Chip(312e12, 0.9 * 85100068864, 150e9, 25e9, 0),
}

# Number of chips -> shape, for names like "v5e-16". The number in a v5p's name counts cores, two a chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
         1024: "8x8x16"}


def slice_name(name):
  """(generation, shape) of "v5e:4x4", or of "v5e-16"; (card, number) of "h100-8". Raises errors.UserError."""
  kind, colon, shape = name.partition(":")
  card = re.split("[-:]", name)[0]
  if card in CHIPS and CHIPS[card].card:
    if name not in [f"{card}-{number}" for number in (1, 2, 4, 8)]:
      raise errors.UserError(f"--topology: {name!r}: plan 1, 2, 4 or 8 cards of one host, as in {card}-8")
    return card, name.removeprefix(f"{card}-")
  if not colon:
    kind, _, count = name.partition("-")
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    cores = 2 if kind == "v5p" else 1
    count = int(count) if count.isdigit() else 0
    shape = "" if count % cores else (_CUBE if cores == 2 else _FLAT).get(count // cores, "")
  # The compiler may end the whole program at any other shape.
  fits = re.fullmatch(r"[1-9]\d?(x[1-9]\d?){2}", shape) if kind == "v5p" else shape in _FLAT.values()
  if kind not in CHIPS or not fits:
    raise errors.UserError(
        f"--topology: {name!r} is no slice known here; write a generation ({', '.join(CHIPS)}) and its shape, as in "
        "v5e:4x4 or v5p:4x4x4, or its size, as in v5e-16 or h100-8")
  return kind, shape
