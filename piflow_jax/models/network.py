"""What a network is to the rest of the code, and how its tokens lie in x_0: what every network's file fills in."""

from typing import Any, Callable, NamedTuple


class Layout(NamedTuple):
  """How N tokens make up x_0: what a head needs to know of the network above it.

  Attributes:
    cells: latent positions that one token stands for, e.g. patch^2.
    place: [B, N, cells, ...] -> [B, positions, ...]: each token's cells to their places in x_0, in raster order.
    shape: of x_0 without the batch, (..., C); positions are the product of all but C.
  """

  cells: int
  place: Callable
  shape: tuple[int, ...]


class Network(NamedTuple):
  """A network under any head. A network's file makes one of these from its fields.

  Attributes:
    module: head -> Flax module, or anything with its `init` and `apply`, called as (x [B, ...], t [B] noise level,
      cond); it calls head(tokens [B, N, D], embedding [B, D], Layout) last and returns what that makes.
    null: cond -> the condition of guidance's unconditional pass; None where the network has none.
    sharding: (path pattern, mesh axes of the leaf's axes), first match wins; see `sharding.shardings`.
    dtype: of the computation. Parameters are float32.
    two_times: head -> module called as (x, t, cond, t_dst [B]): MeanFlow's network; None where there is none.
    tokens: shape of x_0 -> number of tokens, which the dynamic shift goes by (method.md, 1); None: it does not say.
  """

  module: Callable
  null: Callable | None
  sharding: tuple
  dtype: Any
  two_times: Callable | None = None
  tokens: Callable | None = None
