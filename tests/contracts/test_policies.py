"""What every policy and its head must satisfy, on latents of every rank: a new policy is a new row."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import policy as contract
from piflow_jax.models import layers
from piflow_jax.models import network
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel
from piflow_jax.policy import rollout

B, WIDTH = 3, 8
PICTURE, POINT, VIDEO = layers.patches((4, 4, 2), 2), layers.positions((2,)), layers.positions((2, 3, 1, 2))


class SharpHead(gmm.GMHead):
  """Policies as they are sampled with a temperature."""

  def to_policy(self, out, x_src, t_src, clock, *, eps):
    return self.sharpen(super().to_policy(out, x_src, t_src, clock, eps=eps), jnp.array([False, False, True]))


class Row(NamedTuple):
  head: nn.Module
  layout: network.Layout = PICTURE
  shift: Any = 1.0

  def clock(self, total_substeps=128):
    return flow.Clock(self.shift, total_substeps, 1, 1.0)


GM = gmm.GMHead(components=4, logstd_width=8, dropout=0.5)
GRID, PARALLEL = dx.DXHead(points=5, segment=0.5), parallel.ParallelHead(intervals=8)
ROWS = {
    "gm": Row(GM),
    "gm of one component": Row(gmm.GMHead(components=1, logstd_width=8)),
    "gm with temperature": Row(SharpHead(components=4, logstd_width=8, temperature=0.3)),
    "gm, point": Row(GM, POINT),
    "gm, video": Row(GM, VIDEO),
    "dx grid": Row(GRID, shift=3.2),
    "dx of one point": Row(dx.DXHead(points=1)),
    "dx polynomial": Row(dx.DXHead(points=4, polynomial=True)),
    "dx, point": Row(GRID, POINT),
    "dx, video": Row(GRID, VIDEO, 3.2),
    "parallel": Row(PARALLEL, shift=3.2),
    "parallel, point": Row(PARALLEL, POINT, 3.2),
    "parallel, video": Row(PARALLEL, VIDEO),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
PICTURES = {name: row for name, row in ROWS.items() if row.layout is PICTURE}
every_picture = pytest.mark.parametrize("row", PICTURES.values(), ids=PICTURES.keys())
OTHERS = {name: row for name, row in ROWS.items() if row.layout is not PICTURE}
every_other = pytest.mark.parametrize("row", OTHERS.values(), ids=OTHERS.keys())
TAU_SRC = jnp.array([1.0, 0.9, 0.6])


def _random(key, *shape):
  return jax.random.normal(jax.random.key(key), shape)


def _tokens(row):
  positions = int(np.prod(row.layout.shape[:-1]))
  return _random(0, B, positions // row.layout.cells, WIDTH), _random(1, B, WIDTH), row.layout


def _init(row):
  return row.head.init(jax.random.key(2), *_tokens(row))["params"]


def _output(row):
  """What the head makes with every weight drawn, those that start at zero too."""
  leaves, tree = jax.tree.flatten(_init(row))
  keys = jax.random.split(jax.random.key(3), len(leaves))
  params = jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])
  return row.head.apply({"params": params}, *_tokens(row))


def _x_src(row):
  return _random(4, B, *row.layout.shape)


def _policy(row, output=None, eps=1e-4, clock=None):
  output, clock = _output(row) if output is None else output, clock or row.clock()
  return row.head.to_policy(output, _x_src(row), clock.warp(TAU_SRC), clock, eps=eps)


@every_row
def test_goes_through_jit_scan_vmap_and_stop_gradient(row):
  policy, x, t = _policy(row), _x_src(row), jnp.array([0.5, 0.4, 0.3])
  u = policy.velocity(x, t)
  assert u.shape == x.shape and u.dtype == x.dtype
  close = lambda got: np.testing.assert_allclose(got, u, rtol=2e-5, atol=2e-5)  # float32 sums in another order
  close(jax.jit(lambda p, x, t: p.velocity(x, t))(policy, x, t))
  close(jax.lax.scan(lambda p, _: (p, p.velocity(x, t)), policy, None, length=2)[1][1])
  one = lambda p, x, t: jax.tree.map(lambda leaf: leaf[None], p).velocity(x[None], t[None])[0]
  close(jax.vmap(one)(policy, x, t))
  detached = jax.grad(lambda p: jnp.sum(jax.lax.stop_gradient(p).velocity(x, t)))(policy)
  assert all(not leaf.any() for leaf in jax.tree.leaves(detached))


@every_row
def test_rolls_out_under_vmap(row):
  """Sample by sample it ends where the batch does, each in its own number of substeps."""
  roll = lambda *args: rollout.rollout(*args, row.clock(32))
  one = lambda *args: roll(*(jax.tree.map(lambda leaf: leaf[None], arg) for arg in args))[0]
  args = _policy(row), _x_src(row), TAU_SRC, jnp.array([0.0, 0.7, 0.2])
  np.testing.assert_allclose(jax.jit(jax.vmap(one))(*args), jax.jit(roll)(*args), rtol=2e-5, atol=2e-5)


@every_picture
def test_a_shift_may_be_an_argument_of_the_program(row):
  """Policy and rollout of a traced shift are those of a shift that is compiled in."""
  output, x, tau_dst = _output(row), _x_src(row), jnp.array([0.0, 0.7, 0.2])

  @jax.jit
  def end(output, clock):
    return rollout.rollout(_policy(row, output, clock=clock), x, TAU_SRC, tau_dst, clock)

  clock = row.clock(32)
  got = end(output, clock.replace(shift=jnp.array(clock.shift, jnp.float32)))
  np.testing.assert_allclose(got, end(output, clock), rtol=5e-5, atol=5e-5)


@every_picture
@pytest.mark.parametrize("t", [1e-3, 1e-6, 0.0])
def test_finite_towards_data(row, t):
  output, x, t = _output(row), _x_src(row), jnp.full(B, t)
  policy = _policy(row, output, eps=1e-6)
  square = lambda output, x: jnp.sum(_policy(row, output, eps=1e-6).velocity(x, t) ** 2)
  u, gradients = jax.value_and_grad(square, argnums=(0, 1))(output, x)
  assert np.isfinite(u) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  end = rollout.rollout(policy, x, TAU_SRC, jnp.zeros(B), row.clock(16))
  assert np.isfinite(end).all() and float(jnp.abs(end).max()) < 1e3


@every_picture
def test_every_output_of_the_head_is_learnt(row):
  """A rollout over the whole segment, and on the way: no entry of the head's output is without a gradient."""
  output, x = _output(row), _x_src(row)

  def loss(output):
    policy = _policy(row, output)
    on_the_way, to_the_end = (jnp.sum(rollout.average_velocity(
        policy, x, TAU_SRC, share * TAU_SRC, row.clock(32)) ** 2) for share in (0.35, 0.0))
    return on_the_way + to_the_end  # a grid's estimates on the way are forgotten at its end

  gradients = jax.jit(jax.grad(loss))(output)
  for leaf in jax.tree.leaves(gradients):
    assert np.isfinite(leaf).all()
    if isinstance(row.head, gmm.GMHead) and row.head.components == 1 and leaf.ndim == 3:
      continue  # one component has nothing to weigh
    reached, wanted = np.asarray(leaf) != 0, np.ones(leaf.shape, bool)
    if isinstance(row.head, parallel.ParallelHead):  # intervals before a sample's start are not on its way
      late = np.arange(row.head.intervals) + 1 > row.head.intervals * (1 - np.asarray(TAU_SRC)[:, None])
      wanted &= late.reshape(*late.shape, *(1,) * (leaf.ndim - 2))
    np.testing.assert_array_equal(reached, wanted)


@every_picture
def test_compiles_once(row):
  count = 0

  @jax.jit
  def run(policy, x, tau_src, tau_dst):
    nonlocal count
    count += 1
    return rollout.rollout(policy, x, tau_src, tau_dst, row.clock(16))

  output = _output(row)
  for i in range(3):
    run(_policy(row, output), _x_src(row) + i, TAU_SRC, TAU_SRC / (i + 2))
    output = jax.tree.map(lambda leaf: 2 * leaf, output)
  assert count == 1


@every_row
def test_starts_as_the_teacher(row):
  """With the teacher's output layer a policy has its velocity where it was made, and inside what follows from that."""
  velocity, channels = layers.VelocityHead(), row.layout.shape[-1]
  teacher = {"out": {"kernel": _random(5, WIDTH, row.layout.cells, channels),
                     "bias": _random(6, row.layout.cells, channels)}}
  fresh = _init(row)
  params = row.head.from_teacher(teacher, fresh, jax.random.key(7))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  policy = _policy(row, row.head.apply({"params": params}, *_tokens(row)))
  x_src, t_src = _x_src(row), row.clock().warp(TAU_SRC)
  u = velocity.apply({"params": teacher}, *_tokens(row))
  # GM scatters its components by 0.05 a channel; float32 elsewhere.
  atol = 0.2 if isinstance(row.head, gmm.GMHead) else 1e-4
  np.testing.assert_allclose(policy.velocity(x_src, t_src), u, atol=atol)

  # Inside: one velocity for all times (parallel decoding), or one x_0 for them, along which the velocity is the same.
  wide, t = lambda time: flow.broadcast_to(time, x_src), 0.8 * t_src
  x = x_src - wide(t_src - t) * u
  if getattr(row.head, "polynomial", False):
    # A velocity of zero is an estimate too, of x_src: its powers of the time since the start (at shift 1) come on top.
    since = wide(t_src - t)
    u = u - (since + since**2 + since**3) * x_src / wide(t)
  np.testing.assert_allclose(policy.velocity(x, t), u, atol=atol)


@every_picture
def test_perturb_makes_a_policy_of_the_same_kind(row):
  policy = _policy(row)
  other = row.head.perturb(policy, jax.random.split(jax.random.key(0), B))
  assert jax.tree.structure(other) == jax.tree.structure(policy)
  assert np.isfinite(other.velocity(_x_src(row), TAU_SRC / 2)).all()


@every_other
def test_a_latent_of_any_rank_is_a_picture_of_one_row(row):
  """Velocity, rollout and gradient by the head's output are those of the same positions as [B, 1, P, C]."""
  def flat(x):  # [..., C] of the row's shape -> [..., 1, P, C]
    lead = x.shape[:x.ndim - len(row.layout.shape)]
    return x.reshape(*lead, 1, -1, x.shape[-1])

  output, x_src, tau_dst = _output(row), _x_src(row), jnp.array([0.0, 0.7, 0.2])
  as_picture = output if isinstance(output, gmm.Mixture) else flat(output)
  weight = _random(8, *x_src.shape)

  def value(output, x_src, weight):
    policy = row.head.to_policy(output, x_src, row.clock().warp(TAU_SRC), row.clock(), eps=1e-4)
    x = rollout.rollout(policy, x_src, TAU_SRC, tau_dst, row.clock(32))
    return jnp.sum(weight * x), (x, policy.velocity(x_src, TAU_SRC / 2))

  step = jax.jit(jax.grad(value, has_aux=True))
  gradients, values = step(output, x_src, weight)
  want, wanted = step(as_picture, flat(x_src), flat(weight))
  close = lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, (gradients, values), (want, wanted))


def test_times_have_the_batchs_shape():
  row = ROWS["gm"]
  policy = _policy(row)
  with pytest.raises(AssertionError):
    rollout.rollout(policy, _x_src(row), TAU_SRC[:, None], TAU_SRC[:, None], row.clock())


@every_picture
def test_exports_by_the_releases_names(row):
  found = row.head.export_config(row.clock())
  names = {"GMFlow": set(), "DX": {"segment_size", "shift", "mode"}, "ParallelDecoding": {"shift"}}
  assert set(found) - {"type"} == names[found["type"]]
  assert found.get("shift", row.shift) == row.shift
  if found["type"] == "DX":
    assert found["segment_size"] == (row.head.segment or 1.0)  # the clock's, where the head has none of its own


def test_who_offers_more_is_known_by_it():
  assert isinstance(_policy(ROWS["parallel"]), contract.Integral)
  assert isinstance(_policy(ROWS["gm"]), contract.ByPosition)
  assert not isinstance(_policy(ROWS["dx grid"]), (contract.Integral, contract.ByPosition))


def test_a_velocity_of_another_shape_is_refused():
  class Scalar:
    velocity = staticmethod(lambda x, t: x[:, :1, :1, :1])

  with pytest.raises(AssertionError, match="shape"):
    rollout.rollout(Scalar, _x_src(ROWS["gm"]), TAU_SRC, TAU_SRC / 2, ROWS["gm"].clock(8))


# module -> {field: values that it refuses}
REFUSED = {
    gmm: {"components": (0, -1, 1.5), "logstd_width": (0,), "dropout": (-0.1, 1.0), "temperature": (0, -1)},
    dx: {"points": (0, -1), "segment": (-0.5,), "polynomial": (2,)},
    parallel: {"intervals": (0, -1, 2.5)},
}


@pytest.mark.parametrize("module", REFUSED, ids=lambda module: module.__name__.split(".")[-1])
def test_a_config_makes_its_head_and_refuses_what_is_none(module):
  noun = module.config()
  head = noun.make(jnp.bfloat16, **config_lib.fields_of(noun))
  assert head.dtype == jnp.bfloat16
  fields = config_lib.fields_of(noun)
  assert fields == {name: getattr(head, name) for name in fields}
  assert set(REFUSED[module]) == set(fields) >= set(config_lib.free_of(noun))
  for field, values in REFUSED[module].items():
    for value in (*values, float("nan"), float("inf"), 1e30, 2**40, "x"):
      fields = config_lib.fields_of(module.config(**{field: value}))
      with pytest.raises(ValueError, match=f"^{field}: "):
        module.make(jnp.float32, **fields)
  with pytest.raises(ValueError, match="^shift: "):
    module.config(shift=1.0)
