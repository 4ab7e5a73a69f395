"""What every policy and its head must satisfy: a new policy is a new row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from piflow_jax.policy import parallel
from piflow_jax.policy import rollout

SHAPE, GRID, WIDTH = (3, 4, 4, 2), (2, 2), 8
LATENT = dict(channels=2, patch=2)


class SharpHead(gmm.GMHead):
  """Policies as they are sampled with a temperature."""

  def to_policy(self, out, x_src, t_src, *, eps):
    return self.sharpen(super().to_policy(out, x_src, t_src, eps=eps), 0.3)


HEADS = {
    "gm": gmm.GMHead(components=4, logstd_width=8, dropout=0.5, **LATENT),
    "gm of one component": gmm.GMHead(components=1, logstd_width=8, **LATENT),
    "gm with temperature": SharpHead(components=4, logstd_width=8, **LATENT),
    "dx grid": dx.DXHead(points=5, segment=0.5, shift=3.2, **LATENT),
    "dx of one point": dx.DXHead(points=1, segment=1.0, **LATENT),
    "dx polynomial": dx.DXHead(points=4, segment=1.0, polynomial=True, **LATENT),
    "parallel": parallel.ParallelHead(intervals=8, shift=3.2, **LATENT),
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def _random(key, *shape):
  return jax.random.normal(jax.random.key(key), shape)


def _tokens():
  return _random(0, SHAPE[0], 4, WIDTH), _random(1, SHAPE[0], WIDTH), GRID


def _output(head):
  """What the head says with every weight drawn, those that start at zero too."""
  params = head.init(jax.random.key(2), *_tokens())
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(3), len(leaves))
  params = jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])
  return head.apply(params, *_tokens())


X_SRC, TAU_SRC = _random(4, *SHAPE), jnp.array([1.0, 0.9, 0.6])


def _policy(head, output=None, eps=1e-4):
  return head.to_policy(_output(head) if output is None else output, X_SRC, TAU_SRC, eps=eps)


@every_head
def test_goes_through_jit_scan_vmap_and_stop_gradient(head):
  policy, x, t = _policy(head), X_SRC, jnp.array([0.5, 0.4, 0.3])
  u = policy.velocity(x, t)
  assert u.shape == x.shape and u.dtype == x.dtype
  close = lambda got: np.testing.assert_allclose(got, u, rtol=2e-5, atol=2e-5)  # float32 sums in another order
  close(jax.jit(lambda p, x, t: p.velocity(x, t))(policy, x, t))
  close(jax.lax.scan(lambda p, _: (p, p.velocity(x, t)), policy, None, length=2)[1][1])
  one = lambda p, x, t: jax.tree.map(lambda leaf: leaf[None], p).velocity(x[None], t[None])[0]
  close(jax.vmap(one)(policy, x, t))
  detached = jax.grad(lambda p: jnp.sum(jax.lax.stop_gradient(p).velocity(x, t)))(policy)
  assert all(not leaf.any() for leaf in jax.tree.leaves(detached))


@every_head
def test_rolls_out_under_vmap(head):
  """Sample by sample it ends where the batch does, each in its own number of substeps."""
  roll = lambda *args: rollout.rollout(*args, shift=3.2, total_substeps=32)
  one = lambda *args: roll(*(jax.tree.map(lambda leaf: leaf[None], arg) for arg in args))[0]
  args = _policy(head), X_SRC, TAU_SRC, jnp.array([0.0, 0.7, 0.2])
  np.testing.assert_allclose(jax.jit(jax.vmap(one))(*args), jax.jit(roll)(*args), rtol=2e-5, atol=2e-5)


@every_head
@pytest.mark.parametrize("t", [1e-3, 1e-6, 0.0])
def test_finite_towards_data(head, t):
  output, t = _output(head), jnp.full(3, t)
  policy = _policy(head, output, eps=1e-6)
  square = lambda output, x: jnp.sum(_policy(head, output, eps=1e-6).velocity(x, t) ** 2)
  u, gradients = jax.value_and_grad(square, argnums=(0, 1))(output, X_SRC)
  assert np.isfinite(u) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  end = rollout.rollout(policy, X_SRC, TAU_SRC, jnp.zeros(3), total_substeps=16)
  assert np.isfinite(end).all() and float(jnp.abs(end).max()) < 1e3


@every_head
def test_every_output_of_the_head_is_learnt(head):
  """A rollout over the whole segment, and on the way: no entry of the head's output is without a gradient."""
  output = _output(head)

  def loss(output):
    policy = _policy(head, output)
    on_the_way, to_the_end = (jnp.sum(rollout.average_velocity(
        policy, X_SRC, TAU_SRC, share * TAU_SRC, total_substeps=32) ** 2) for share in (0.8, 0.0))
    return on_the_way + to_the_end  # what a grid says on the way is forgotten at its end

  gradients = jax.jit(jax.grad(loss))(output)
  for leaf in jax.tree.leaves(gradients):
    assert np.isfinite(leaf).all()
    if isinstance(head, gmm.GMHead) and head.components == 1 and leaf.ndim == 3:
      continue  # one component has nothing to weigh
    reached, asked = np.asarray(leaf) != 0, np.ones(leaf.shape, bool)
    if isinstance(head, parallel.ParallelHead):  # what lies before a sample's start is not on its way
      asked &= (np.arange(head.intervals) + 1 > head.intervals * (1 - np.asarray(TAU_SRC)[:, None]))[:, :, None, None, None]
    np.testing.assert_array_equal(reached, asked)


@every_head
def test_compiles_once(head):
  count = 0

  @jax.jit
  def run(policy, x, tau_src, tau_dst):
    nonlocal count
    count += 1
    return rollout.rollout(policy, x, tau_src, tau_dst, total_substeps=16)

  for i in range(3):
    output = jax.tree.map(lambda leaf: leaf * (1 + i), _output(head))
    run(_policy(head, output), X_SRC + i, TAU_SRC, TAU_SRC / (i + 2))
  assert count == 1


@every_head
def test_starts_as_the_teacher(head):
  """With the teacher's output layer in it, a policy says its velocity where it was made, and what follows from it inside."""
  from piflow_jax.models import layers

  velocity = layers.VelocityHead(**LATENT)
  teacher = {"out": {"kernel": _random(5, WIDTH, 4, 2), "bias": _random(6, 4, 2)}}
  fresh = head.init(jax.random.key(2), *_tokens())["params"]
  params = head.from_teacher(teacher, fresh, jax.random.key(7))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  policy = _policy(head, head.apply({"params": params}, *_tokens()))
  u = velocity.apply({"params": teacher}, *_tokens())
  # GM scatters its components by 0.05 a channel; float32 elsewhere.
  atol = 0.2 if isinstance(head, gmm.GMHead) else 1e-4
  np.testing.assert_allclose(policy.velocity(X_SRC, TAU_SRC), u, atol=atol)

  # Inside: one velocity for all times (parallel decoding), or one x_0 for them, along which the velocity is the same.
  wide, t = lambda time: flow.broadcast_to(time, X_SRC), 0.8 * TAU_SRC
  x = X_SRC - wide(TAU_SRC - t) * u
  if getattr(head, "polynomial", False):
    # A velocity of zero is an estimate too, of x_src: its powers of the time since the start come on top.
    since = wide(TAU_SRC - t)
    u = u - (since + since**2 + since**3) * X_SRC / wide(t)
  np.testing.assert_allclose(policy.velocity(x, t), u, atol=atol)


@every_head
def test_perturb_makes_a_policy_of_the_same_kind(head):
  policy = _policy(head)
  other = head.perturb(policy, jax.random.split(jax.random.key(0), 3))
  assert jax.tree.structure(other) == jax.tree.structure(policy)
  assert np.isfinite(other.velocity(X_SRC, TAU_SRC / 2)).all()
