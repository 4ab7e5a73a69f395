"""What the makers say of their chips (cloud.google.com/tpu/docs, "System architecture"; per chip, bytes and FLOPs a second).

`link` is one way of one ICI link (Google's figures for a chip count all links and both ways); `network` is a chip's share
of the data-centre network that joins slices (from "How to Scale Your Model", 2025), the least certain number here.
"""

from typing import NamedTuple

from piflow_jax import errors


class Chip(NamedTuple):
  flops: float  # bfloat16
  memory: float  # bytes of HBM that XLA has for a program
  hbm: float  # bytes a second
  link: float  # bytes a second
  network: float  # bytes a second
  clock: float  # Hz, of the compiler's cycles: peak FLOPs over those of a cycle
  devices: int = 1  # as JAX counts them, in a chip


CHIPS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1.2e12, 45e9, 6.25e9, 1.05e9),
    "v5e": Chip(197e12, 15.75 * 2**30, 0.82e12, 45e9, 6.25e9, 1.5e9),
    "v5p": Chip(459e12, 94.75 * 2**30, 2.77e12, 90e9, 6.25e9, 1.75e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1.64e12, 90e9, 12.5e9, 1.75e9),
}

# Slices of so many chips, where people say "v5e-16". v4 and v5p are named by cores, two a chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}


def slice_name(said):
  """(generation, shape) of "v5e:4x4", or of "v5e-16". Raises errors.UserError."""
  kind, colon, shape = said.partition(":")
  if not colon:
    kind, _, count = said.partition("-")
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    cores = 2 if kind in ("v4", "v5p") else 1
    shape = (_CUBE if cores == 2 else _FLAT).get(int(count) // cores if count.isdigit() else 0, "")
  if kind not in CHIPS or not shape:
    raise errors.UserError(f"--topology: {said!r} is no slice known here; write a generation ({', '.join(CHIPS)}) and its "
                           "shape, as in v5e:4x4 or v5p:4x4x4, or its size, as in v5e-16")
  return kind, shape
