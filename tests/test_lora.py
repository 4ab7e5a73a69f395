"""Adapters: at their start the teacher, merged the same as beside, trained without a second copy of the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax import lora
from piflow_jax import params as params_lib
from piflow_jax import student as student_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.flow import Clock
from piflow_jax.models import dit
from piflow_jax.models import flux
from piflow_jax.models import layers
from piflow_jax.policy import gmm
from tests.models.test_text_to_image import FLUX
from tests.models.test_text_to_image import made
from tests.models.test_text_to_image import text_spec

SPEC = text_spec()
TARGETS = ("mlp_in", "single_blocks/out", "time_in")
CLOCK = Clock(3.2, total_substeps=8, nfe=4, final_scale=0.5)


def _lora(**fields):
  noun = lora.config(**dict(rank=3, targets=TARGETS, dropout=0.0) | fields)
  return noun.make(**config_lib.fields_of(noun))


def _inputs():
  cond = {k: jax.random.normal(jax.random.key(i), (2, *a.shape)) for i, (k, a) in enumerate(SPEC.cond.items())}
  return jax.random.normal(jax.random.key(9), (2, *SPEC.x_0)), jnp.array([0.9, 0.4]), cond


def _teacher():
  net = made(flux, SPEC, **FLUX | dict(double_depth=2, single_depth=2))
  module = net.module(layers.VelocityHead())
  params = module.init(jax.random.key(0), *_inputs())["params"]
  return net, module, jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def _student(adapters, teacher_params, net):
  return student_lib.make(net, gmm.GMHead(4, logstd_width=8), SPEC, trained=("adaln_out/.*", "head/.*"),
                          teacher_shapes=teacher_params, lora=adapters)


def test_a_student_with_adapters_starts_as_its_teacher_and_trains_nothing_else():
  net, module, theirs = _teacher()
  student = _student(_lora(), theirs, net)
  params = student.init(jax.random.key(1), theirs)
  x, t, cond = _inputs()
  policy = student.policy(params, theirs, x, t, cond, CLOCK)
  u = module.apply({"params": theirs}, x, t, cond)
  bias = params["head"]["means"]["bias"].mean(1) - theirs["head"]["out"]["bias"]  # the components' own offsets
  want = u + layers.patches(SPEC.x_0, 2).place(jnp.broadcast_to(bias[None, None], (2, 6, 4, 4))).reshape(x.shape)
  np.testing.assert_allclose(policy.velocity(x, t), want, atol=2e-5)
  names = set(params_lib.named_leaves(params))
  assert {n for n in names if not n.endswith(("lora_a", "lora_b"))} == {
      n for n in params_lib.named_leaves(params) if n.startswith(("adaln_out", "head"))}
  adapters = {n: leaf.shape for n, leaf in params_lib.named_leaves(params).items() if "lora" in n}
  assert adapters["double_blocks/text/mlp_in/lora_a"] == (2, 32, 3)
  assert adapters["single_blocks/out/lora_a"] == (2, 160, 3) and adapters["single_blocks/out/lora_b"] == (2, 3, 32)
  assert adapters["time_in/lora_a"] == (256, 3) and len(adapters) == 2 * 5  # mlp_in of three, out, time_in
  # The base is the teacher's own arrays, and none that is trained.
  assert not set(params_lib.named_leaves(student.frozen)) & names


def test_a_starts_at_the_authors_deviation_and_b_at_zero():
  net, _, theirs = _teacher()
  params = _student(_lora(rank=16), theirs, net).init(jax.random.key(1), theirs)
  for name, leaf in params_lib.named_leaves(params).items():
    if name.endswith("lora_b"):
      assert not leaf.any()
    elif name.endswith("lora_a"):
      np.testing.assert_allclose(leaf.std(), 1 / 16, rtol=0.1)
  a, b = (params["double_blocks"][side]["mlp_in"]["lora_a"] for side in ("image", "text"))
  assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1  # each layer draws its own


@pytest.mark.parametrize("fields, scale", [({}, 1), (dict(alpha=6.0), 2), (dict(alpha=6.0, rslora=True), 6 / 3**0.5)])
def test_merged_is_the_same_as_beside(fields, scale):
  net, _, theirs = _teacher()
  adapters = _lora(**fields)
  assert adapters.scale == pytest.approx(scale)
  student = _student(adapters, theirs, net)
  params = student.init(jax.random.key(1), theirs)
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  x, t, cond = _inputs()
  got = student.policy(params, theirs, x, t, cond, CLOCK).velocity(x, t)
  whole = params_lib.overlay(theirs, params, params_lib.joined(
      {k: v for k, v in theirs.items() if k != "head"}, params))
  merged = lora.merge(whole, scale)
  assert not any("lora" in name for name in params_lib.named_leaves(merged))
  out = net.module(gmm.GMHead(4, logstd_width=8)).apply({"params": merged}, x, t, cond)
  want = gmm.to_policy(out, x, t).velocity(x, t)
  np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
  without = net.module(gmm.GMHead(4, logstd_width=8)).apply(
      {"params": {k: v for k, v in whole.items()} | {"head": params["head"]}}, x, t, cond)
  assert jnp.abs(gmm.to_policy(without, x, t).velocity(x, t) - want).max() > 1e-2


def test_dropout_is_of_the_adapters_input_alone_and_only_where_keys_are_given():
  net, _, theirs = _teacher()
  student = _student(_lora(dropout=0.5), theirs, net)
  assert student.noisy
  params = student.init(jax.random.key(1), theirs)
  x, t, cond = _inputs()
  keys = jax.random.split(jax.random.key(5), 2)

  def u(params, keys=None):
    return student.policy(params, theirs, x, t, cond, CLOCK, keys=keys).velocity(x, t)

  np.testing.assert_array_equal(u(params, keys), u(params))  # B is zero, and nothing else drops anything
  params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  np.testing.assert_array_equal(u(params), u(params))
  drawn = jax.lax.map(lambda key: u(params, jax.random.split(key, 2)), jax.random.split(jax.random.key(6), 200))
  assert drawn.std(0).max() > 1e-3
  # Small adapters act nearly linearly, so that dropping changes nothing on average: within 5 standard errors.
  error = jnp.abs(drawn.mean(0) - u(params))
  assert (error < 5 * drawn.std(0) / 200**0.5 + 2e-3).all()


def test_a_mask_has_its_share_and_its_draws_know_nothing_of_one_another():
  # A and B are the identity and W is zero, so that the layer gives its own dropped input.
  one = {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64), lora.A: jnp.eye(64), lora.B: jnp.eye(64)}
  module, x = layers.dense(64, jnp.float32), jnp.ones((2, 1001, 64))  # four do not divide 1,001

  def kept(seed, x=x):
    with lora.adapted(0.05):
      return module.apply({"params": one}, x, rngs={layers.DROPOUT: jax.random.key(seed)})

  y, rate = kept(0), 13 / 256
  np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
  dropped = y == 0
  deviation = (rate * (1 - rate) / dropped.size) ** 0.5
  assert abs(dropped.mean() - rate) < 5 * deviation
  # One number in `rate` of those that are dropped is dropped elsewhere too: 251 tokens on, where one draw serves both,
  # beside it, in the other sample, and by another key.
  for other in (jnp.roll(dropped, 251, 1), jnp.roll(dropped, 1, 1), jnp.roll(dropped, 1, 2), dropped[::-1],
                kept(1) == 0):
    assert abs((dropped & other).mean() - rate**2) < 5 * rate / dropped.size**0.5
  assert 0 < (kept(0, jnp.ones((200, 64))) == 0).mean() < 0.1  # a vector a sample, as of the time's embedding


def test_adapters_of_another_network_drop_inside_its_blocks_too():
  noun = dit.config(depth=2, width=16, heads=2, dtype="float32")
  net = noun.make(spec_lib.Spec((4, 4, 4), spec_lib.label(3)), **config_lib.fields_of(noun))
  module, x = net.module(layers.VelocityHead()), jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
  given = x, jnp.array([0.3, 0.8]), {"label": jnp.array([0, 2])}
  params = module.init(jax.random.key(1), *given)["params"]
  adapters = lora.init(lora.shapes_of(_lora(targets=("mlp/in",)), params), jax.random.key(2))
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape),
                        params_lib.joined(params, adapters))

  def u(**rngs):
    with lora.adapted(0.5):
      return module.apply({"params": params}, *given, rngs=rngs)

  assert jnp.abs(u() - module.apply({"params": params}, *given)).max() > 1e-3  # they are used
  assert jnp.abs(u(lora=jax.random.key(3)) - u()).max() > 1e-4  # and drop


@pytest.mark.parametrize("fields, words", [
    (dict(rank=0), "rank: 0"), (dict(alpha=-1.0), "alpha: -1"), (dict(rslora=2), "rslora: 2"),
    (dict(dropout=1.0), "dropout: 1"), (dict(targets=()), "targets: is empty"),
    (dict(rslora=True), "rslora: has no effect")])
def test_a_field_out_of_its_range_is_refused_by_name(fields, words):
  with pytest.raises(ValueError, match=f"^{words}"):
    _lora(**fields)


def test_targets_that_name_no_layer_or_no_matrix_are_refused():
  net, _, theirs = _teacher()
  with pytest.raises(ValueError, match="^lora.targets: 'nothing' names no layer"):
    _student(_lora(targets=("mlp_in", "nothing")), theirs, net)
  with pytest.raises(ValueError, match="^lora.targets: head/means has a kernel .*no plain matrix"):
    _student(_lora(targets=("head/means",)), theirs, net)
