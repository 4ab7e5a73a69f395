"""FLUX.1 and Qwen-Image, and heads on them, against the authors' vectors (float32)."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax import params as params_lib
from piflow_jax.convert import naming
from piflow_jax.convert import table
from piflow_jax.data import spec as spec_lib
from piflow_jax.models import flux
from piflow_jax.models import joint
from piflow_jax.models import layers
from piflow_jax.models import qwen_image
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from tests import golden

AXES = (4, 6, 6)
FLUX = dict(double_depth=1, single_depth=1, heads=2, axes=AXES, dtype="float32")
QWEN = dict(depth=1, heads=2, axes=AXES, dtype="float32")


def text_spec(shape=(4, 6, 4), tokens=5, width=32, pooled=16, mask=False):
  """The spec of a tiny text-to-image set."""
  cond = {"text": spec_lib.Array((tokens, width), "float32")}
  cond |= {"pooled": spec_lib.Array((pooled,), "float32")} if pooled else {}
  cond |= {"mask": spec_lib.Array((tokens,), "int32")} if mask else {}
  return spec_lib.Spec(shape, cond)


def made(module, spec, **fields):
  """The Network that a module's fields make."""
  noun = module.config(**fields)
  return noun.make(spec, **config_lib.fields_of(noun))


def tree(module, net, spec, head, stored):
  """Parameters of a network under a head, read from {PyTorch's key: array} by the converter's own table."""
  x, t, cond = jnp.zeros((1, *spec.x_0)), jnp.zeros(1), {k: jnp.zeros((1, *a.shape), a.dtype)
                                                         for k, a in spec.cond.items()}
  shapes = params_lib.named_leaves(jax.eval_shape(net.module(head).init, jax.random.key(0), x, t, cond)["params"])
  (found,) = naming.of_network(module.make).values()
  weights = types.SimpleNamespace(network=types.SimpleNamespace(patch=2), config=types.SimpleNamespace(lora=None))
  leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
  used = set()
  for entry in table.entries(found.rows(weights), {k: v.shape for k, v in shapes.items()}, ""):
    leaves[entry.path][() if entry.layer is None else entry.layer] = entry.to_here(stored.__getitem__)
    used |= set(entry.keys)
  assert used == stored.keys()
  return params_lib.nested(leaves)


def _stored(*files):
  """{key: array} of the parameters of vectors; those of a later file stand in the place of the first's output layer."""
  body = {k.removeprefix("param/"): v for k, v in files[0].items() if k.startswith("param/")}
  if len(files) > 1:
    body = {k: v for k, v in body.items() if not k.startswith("proj_out")}
    body |= {k.removeprefix("param/"): v for k, v in files[1].items() if k.startswith("param/")}
  return body


def _flux_inputs(data):
  cond = {"text": data["encoder_hidden_states"], "pooled": data["pooled_projections"], "guidance": data["guidance"]}
  return golden.nhwc(data["x"]), jnp.asarray(data["t"]), {k: jnp.asarray(v) for k, v in cond.items()}


def _qwen_inputs(data):
  # The authors' wrapper cuts texts to the longest of the batch, and diffusers 0.36 attends to all of what is left.
  length = int(data["mask"].sum(1).max())
  return golden.nhwc(data["x"]), jnp.asarray(data["t"]), {
      "text": jnp.asarray(data["encoder_hidden_states"][:, :length]), "mask": jnp.asarray(data["mask"][:, :length])}


def _close(got, want, atol=2e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=atol * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("name, guidance", [("flux", 3.5), ("flux_noguid", 0.0)])
def test_flux_vectors(name, guidance):
  data, spec = golden.load(name), text_spec()
  net = made(flux, spec, **FLUX, guidance=guidance)
  params = tree(flux, net, spec, layers.VelocityHead(), _stored(data))
  x, t, cond = _flux_inputs(data)
  module = net.module(layers.VelocityHead())
  _close(jax.jit(module.apply)({"params": params}, x, t, cond), golden.nhwc(data["out"]))
  # The field says it where the condition does not.
  one = module.clone(guidance=float(cond.pop("guidance")[0])) if guidance else module
  _close(one.apply({"params": params}, x[:1], t[:1], jax.tree.map(lambda c: c[:1], cond)),
         golden.nhwc(data["out"])[:1])


def test_flux_rotary_vectors():
  data = golden.load("flux")
  cos, sin = joint.rotary(flux.positions(2, 3, 5), AXES)
  # Text comes first there, the image here.
  for mine, theirs in ((cos, data["rope_cos"]), (sin, data["rope_sin"])):
    np.testing.assert_allclose(np.concatenate([mine[6:], mine[:6]]), theirs, rtol=0, atol=6e-8)


def test_qwen_vectors():
  data, spec = golden.load("qwen"), text_spec((6, 10, 4), pooled=0, mask=True)
  net = made(qwen_image, spec, **QWEN, masked=False)
  params = tree(qwen_image, net, spec, layers.VelocityHead(), _stored(data))
  x, t, cond = _qwen_inputs(data)
  module = net.module(layers.VelocityHead())
  _close(jax.jit(module.apply)({"params": params}, x, t, cond), golden.nhwc(data["out"]))
  # With the mask, the sample whose text is the longest has no padding, and stays what it was; the other does not.
  longest = int(np.argmax(data["mask"].sum(1)))
  masked = np.asarray(jax.jit(module.clone(masked=True).apply)({"params": params}, x, t, cond))
  _close(masked[longest], golden.nhwc(data["out"])[longest])
  assert np.abs(masked - golden.nhwc(data["out"]))[1 - longest].max() > 0.05


def test_qwen_rotary_vectors():
  data = golden.load("qwen")
  cos, sin = (np.asarray(x)[:, ::2] for x in joint.rotary(qwen_image.positions(3, 5, 5), AXES))
  for mine, part in ((cos, "re"), (sin, "im")):
    theirs = np.concatenate([data[f"rope_img_{part}"], data[f"rope_txt_{part}"]])
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=6e-8)


@pytest.mark.parametrize("module, body, student, spec, fields", [
    (flux, "flux", "gmflux", text_spec(), FLUX),
    (qwen_image, "qwen", "gmqwen", text_spec((6, 10, 4), pooled=0, mask=True), QWEN | dict(masked=False))])
def test_gm_student_vectors(module, body, student, spec, fields):
  body, data, net = golden.load(body), golden.load(student), made(module, spec, **fields)
  x, t, cond = (_flux_inputs if module is flux else _qwen_inputs)(body | {k: v for k, v in data.items() if k == "x"})
  head = gmm.GMHead(4, logstd_width=16)
  params = tree(module, net, spec, head, _stored(body, data))
  apply = jax.jit(net.module(head).apply)
  _close(apply({"params": params}, x, t, cond), golden.mixture(data, "out_"))
  # As it starts from the teacher: the authors' own noise, and the first layer of the deviation as they drew it.
  teacher = tree(module, net, spec, layers.VelocityHead(), _stored(body))
  fresh = params["head"] | {"logstd_in": tree(module, net, spec, head, _stored(body, {
      k.replace("expanded/", "param/"): v for k, v in data.items() if k.startswith("expanded/")}))["head"]["logstd_in"]}
  made_head = gmm.head_from_teacher(teacher["head"]["out"], fresh, jnp.asarray(data["init_noise"]).reshape(4, 4))
  _close(apply({"params": teacher | {"head": made_head}}, x, t, cond), golden.mixture(data, "expanded_out_"))


@pytest.mark.parametrize("module, body, student, prefix, spec, fields", [
    (flux, "flux", "dxflux", "", text_spec(), FLUX),
    (qwen_image, "qwen", "dxqwen", "grid/", text_spec((6, 10, 4), pooled=0, mask=True), QWEN | dict(masked=False)),
    (qwen_image, "qwen", "dxqwen", "poly/", text_spec((6, 10, 4), pooled=0, mask=True), QWEN | dict(masked=False))])
def test_dx_student_vectors(module, body, student, prefix, spec, fields):
  body, net = golden.load(body), made(module, spec, **fields)
  data = {k.removeprefix(prefix): v for k, v in golden.load(student).items() if k.startswith(prefix)}
  x, t, cond = (_flux_inputs if module is flux else _qwen_inputs)(body)
  head = dx.DXHead(points=3, segment=1.0, polynomial=prefix == "poly/")
  params = tree(module, net, spec, head, _stored(body, data))
  apply = jax.jit(net.module(head).apply)
  _close(apply({"params": params}, x, t, cond), golden.nhwc(data["out"]))
  teacher = tree(module, net, spec, layers.VelocityHead(), _stored(body))
  made_head = head.from_teacher(teacher["head"], params["head"], None)
  _close(apply({"params": teacher | {"head": made_head}}, x, t, cond), golden.nhwc(data["expanded_out"]))


def test_times_are_rounded_as_the_authors_students_saw_them():
  """Of four calls and of eight: the numbers that their bfloat16 networks were given."""
  net = flux.Flux(layers.VelocityHead(), half_times=True, **{k: v for k, v in FLUX.items() if k != "dtype"})
  of_four = jnp.array([1.0, 0.88889, 0.70588, 0.34783])
  times = jax.jit(net._thousandfold)
  np.testing.assert_array_equal(times(of_four), [1000, 892, 708, 348])
  of_eight = jnp.array([3.2 * tau / (1 + 2.2 * tau) for tau in (1 - i / 7.5 for i in range(8))])
  np.testing.assert_array_equal(times(of_eight), [1000, 952, 900, 828, 740, 616, 446, 187])
  assert times(jnp.float32(3.5)) == 3504
  np.testing.assert_array_equal(1000 * jax.jit(joint.half)(of_four), [1000, 890.625, 707.03125, 347.65625])


def test_padding_counts_for_nothing_where_there_is_a_mask():
  spec = text_spec(tokens=7, mask=True)
  for module, fields, spec in ((flux, FLUX, spec), (qwen_image, QWEN, text_spec(tokens=7, pooled=0, mask=True))):
    net = made(module, spec, **fields).module(layers.VelocityHead())
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 6, 4)), jnp.array([0.3, 0.9])
    cond = {k: jax.random.normal(jax.random.key(i), (2, *a.shape)) for i, (k, a) in enumerate(spec.cond.items())}
    cond["mask"] = (jnp.arange(7)[None] < jnp.array([[4], [7]])).astype(jnp.int32)
    params = net.init(jax.random.key(0), x, t, cond)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    out = net.apply(params, x, t, cond)
    other = cond | {"text": cond["text"].at[0, 4:].add(3.0)}
    np.testing.assert_allclose(net.apply(params, x, t, other), out, atol=1e-6)
    short = jax.tree.map(lambda c: c[:1], cond) | {"text": cond["text"][:1, :4], "mask": cond["mask"][:1, :4]}
    np.testing.assert_allclose(net.apply(params, x[:1], t[:1], short), out[:1], atol=2e-5)
    assert np.abs(net.apply(params, x, t, cond | {"mask": jnp.ones_like(cond["mask"])}) - out)[0].max() > 1e-3


@pytest.mark.parametrize("module, field, value, words", [
    (flux, "double_depth", 0, "double_depth: 0"), (flux, "single_depth", -1, "single_depth: -1"),
    (flux, "heads", 0, "heads: 0"), (flux, "axes", (4, 6), r"axes: \(4, 6\)"), (flux, "axes", (4, 5, 7), "axes: 5"),
    (flux, "patch", 5, "patch: 5 does not divide"), (flux, "guidance", -1, "guidance: -1"),
    (flux, "half_times", 1.5, "half_times: 1.5"), (flux, "attention", "x", "attention: 'x'"),
    (flux, "dtype", "float16", "dtype: 'float16'"), (flux, "remat", "x", "remat: 'x'"),
    (qwen_image, "depth", 0, "depth: 0"), (qwen_image, "masked", 2, "masked: 2"),
    (qwen_image, "unroll", 0, "unroll: 0")])
def test_a_field_out_of_its_range_is_refused_by_name(module, field, value, words):
  with pytest.raises(ValueError, match=f"^{words}"):
    made(module, text_spec(pooled=0), **{field: value})


@pytest.mark.parametrize("cond", [
    {}, spec_lib.label(3), {"text": spec_lib.Array((3,), "float32")},
    {"text": spec_lib.Array((3, 4), "float32"), "mask": spec_lib.Array((4,))},
    {"text": spec_lib.Array((3, 4), "float32"), "label": spec_lib.Array(classes=3)}])
def test_a_condition_that_they_would_not_read_is_refused(cond):
  for module in (flux, qwen_image):
    with pytest.raises(ValueError, match="^make: the condition"):
      made(module, spec_lib.Spec((4, 6, 4), cond))
