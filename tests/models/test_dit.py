"""DiT and its heads against the authors' vectors (float32; a layer to 1e-5, a model to 1e-4)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.distill import segments
from piflow_jax.models import attention
from piflow_jax.models import dit
from piflow_jax.models import layers
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from tests import golden

TINY = dict(depth=2, width=16, heads=2, num_classes=10, time_scale=1.0)


def _inputs(data):
  return golden.nhwc(data["x"]), jnp.asarray(data["t"]), {"label": jnp.asarray(data["labels"])}


def _teacher():
  data = golden.load("dit_teacher")
  net = dit.DiT(head=layers.VelocityHead(), **TINY)
  return net, golden.dit_params(data, 2, 2, golden.velocity_head), data


def _flat_close(got, want, rtol):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()), err_msg=jax.tree_util.keystr(path))


def test_teacher_vectors():
  net, params, data = _teacher()
  x, t, cond = _inputs(data)
  apply = jax.jit(lambda p, x, t: net.apply({"params": p}, x, t, cond))
  np.testing.assert_allclose(apply(params, x, t), golden.nhwc(data["out_f64"]), atol=1e-4)
  np.testing.assert_allclose(apply(params, x, jnp.asarray(data["t_unit"])), golden.nhwc(data["out_t_unit"]), atol=1e-4)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)


def test_teacher_parts():
  _, _, data = _teacher()
  np.testing.assert_allclose(layers.sincos_positions(4, 4, 16), data["pos_embed"][0], atol=1e-6)
  # Angles reach 1000 radians, where float32 resolves 6e-5.
  np.testing.assert_allclose(layers.time_features(jnp.asarray(data["t"])), data["time_proj"], atol=1e-4)


def test_teacher_gradient_vectors():
  net, params, data = _teacher()
  x, t, cond = _inputs(data)
  cotangent = golden.nhwc(data["cotangent"])
  grad = jax.jit(jax.grad(lambda p, x: jnp.sum(net.apply({"params": p}, x, t, cond) * cotangent), argnums=(0, 1)))
  grads, grad_x = grad(params, x)
  renamed = {k.replace("grad/", "param/"): v for k, v in data.items() if k.startswith("grad/")}
  _flat_close(grads, golden.dit_params(renamed, 2, 2, golden.velocity_head), 1e-4)
  np.testing.assert_allclose(grad_x, golden.nhwc(data["grad_x"]), atol=1e-4)


def test_label_dropout_of_each_block_vectors():
  data, (net, params, _) = golden.load("dit_class_dropout"), _teacher()
  x, t, cond = _inputs(data)
  dropped = jnp.asarray(data["uniform"])[..., 0] < float(data["class_dropout_prob"])
  each = segments.drop(cond, functools.partial(dit.null_label, num_classes=10), dropped)
  apply = jax.jit(lambda cond: net.apply({"params": params}, x, t, cond))
  np.testing.assert_allclose(apply(each), golden.nhwc(data["out_train"]), atol=1e-4)
  np.testing.assert_allclose(apply(cond), golden.nhwc(data["out_eval"]), atol=1e-4)


def _gm_net(components=4):
  return dit.DiT(head=gmm.GMHead(components, logstd_width=16), **TINY)


def test_gm_student_vectors():
  data = golden.load("dit_gm")
  net, params = _gm_net(), golden.dit_params(data, 2, 2, golden.gm_head)
  x, t, cond = _inputs(data)
  apply = jax.jit(lambda p: net.apply({"params": p}, x, t, cond))
  _flat_close(apply(params), golden.mixture(data, "out_"), 1e-4)
  cotangent = golden.mixture(data, "cotangent_")

  def loss(p):
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(apply(p)), jax.tree.leaves(cotangent)))

  renamed = {k.replace("grad/", "param/"): v for k, v in data.items() if k.startswith("grad/")}
  _flat_close(jax.jit(jax.grad(loss))(params), golden.dit_params(renamed, 2, 2, golden.gm_head), 2e-4)


def test_dx_student_vectors():
  data, (_, teacher, _) = golden.load("dit_dx"), _teacher()
  net = dit.DiT(head=dx.DXHead(points=3, segment=1.0), **TINY)
  x, t, cond = _inputs(data)
  apply = jax.jit(lambda p: net.apply({"params": p}, x, t, cond))
  params = golden.dit_params(data, 2, 2, golden.dx_head)
  np.testing.assert_allclose(apply(params), golden.nhwc(data["out"]), atol=1e-4)

  data = golden.load("dit_expand")
  x, t, cond = _inputs(data)
  fresh = net.init(jax.random.key(0), x, t, cond)["params"]["head"]
  head = net.head.from_teacher(teacher["head"], fresh, None)
  stored = {"kernel": jnp.asarray(data["dx_student/proj_out_2.weight"]).T,
            "bias": jnp.asarray(data["dx_student/proj_out_2.bias"])}
  _flat_close(head, golden.dx_head(lambda name: stored), 1e-6)
  np.testing.assert_allclose(
      jax.jit(lambda p: net.apply({"params": p}, x, t, cond))(teacher | {"head": head}),
      golden.nhwc(data["dx_student_out"]), atol=1e-4)


def test_a_network_of_two_times_starts_as_its_teacher_and_then_sees_the_span():
  net, params, data = _teacher()
  x, t, cond = _inputs(data)
  two = net.clone(two_times=True)
  fresh = two.init(jax.random.key(0), x, t, cond, t)["params"]
  assert fresh.keys() - params.keys() == {"span_in", "span_out"}
  told = fresh | params
  want = net.apply({"params": params}, x, t, cond)
  np.testing.assert_array_equal(two.apply({"params": told}, x, t, cond, t / 3), want)
  told["span_out"] = jax.tree.map(lambda leaf: leaf + 0.1, told["span_out"])
  here, there = (two.apply({"params": told}, x, t, cond, t_dst) for t_dst in (t, t / 3))
  assert float(jnp.abs(here - there).max()) > 1e-3
  # Only the span counts, which is 0 in both.
  np.testing.assert_array_equal(here[t == 0], there[t == 0])


def test_head_from_teacher_vectors():
  data, (_, teacher, _) = golden.load("dit_expand"), _teacher()
  x, t, cond = _inputs(data)
  net = _gm_net()
  fresh = net.init(jax.random.key(0), x, t, cond)["params"]["head"]
  # The first layer of logstd is drawn, not derived, and so not among the vectors.
  def stored(name):
    if name == "proj_out_logstds.1":
      return fresh["logstd_in"]
    return {"kernel": jnp.asarray(data[f"gm_student/{name}.weight"]).T,
            "bias": jnp.asarray(data[f"gm_student/{name}.bias"])}

  want = golden.gm_head(stored)
  head = gmm.head_from_teacher(teacher["head"]["out"], fresh, jnp.asarray(data["gm_noise"]).reshape(4, 4))
  _flat_close(head, want, 1e-6)
  out = jax.jit(lambda p: net.apply({"params": p}, x, t, cond))(teacher | {"head": head})
  _flat_close(out, golden.mixture(data, "gm_student_out_"), 1e-4)


def test_head_without_teacher_scatters_alike_at_each_patch_position():
  data = golden.load("dit_expand")
  x, t, cond = _inputs(data)
  head = _gm_net().init(jax.random.key(0), x, t, cond)["params"]["head"]
  bias = head["means"]["bias"]
  np.testing.assert_array_equal(bias, jnp.broadcast_to(bias[0], bias.shape))
  scratch = data["gm_scratch/proj_out_means.bias"].reshape(4, 4, 4)
  np.testing.assert_allclose(scratch[0], 0.1 * data["gm_noise"].reshape(4, 4), rtol=1e-6)
  assert 0.05 < float(bias[0].std()) < 0.15
  np.testing.assert_array_equal(head["logstd_out"]["bias"], data["gm_scratch/proj_out_logstds.3.bias"])


def test_teacher_is_what_the_expanded_student_says_on_average():
  """Equal weights and copies of one layer: the mixture's mean is the teacher's velocity plus the mean of the noise."""
  data, (net, teacher, _) = golden.load("dit_expand"), _teacher()
  x, t, cond = _inputs(data)
  student = _gm_net()
  fresh = student.init(jax.random.key(0), x, t, cond)["params"]["head"]
  noise = jax.random.normal(jax.random.key(1), (4, 4))
  head = gmm.head_from_teacher(teacher["head"]["out"], fresh, noise - noise.mean(0, keepdims=True))
  params = teacher | {"head": head}
  mixture = student.apply({"params": params}, x, t, cond)
  u = net.apply({"params": teacher}, x, t, cond)
  np.testing.assert_allclose(gmm.from_positions(mixture.means.mean(2), u.shape), u, atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots_with_no_batch_dims_saveable"])
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(remat):
  net, params, data = _teacher()
  x, t, cond = _inputs(data)
  half = net.clone(dtype=jnp.bfloat16, remat=remat, head=layers.VelocityHead(jnp.bfloat16))
  out = half.apply({"params": params}, x, t, cond)
  assert out.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(half.init(jax.random.key(0), x, t, cond))} == {jnp.dtype("float32")}
  error = float(jnp.abs(out - golden.nhwc(data["out"])).max())
  assert 1e-5 < error < 0.15 * float(np.abs(data["out"]).max())  # 8 bits of mantissa, two blocks; and not float32


def _make(shape=(8, 8, 4), classes=10, **fields):
  noun = dit.config(**(dict(depth=2, width=16, heads=2, time_scale=1.0, dtype="float32") | fields))
  return noun.make(spec_lib.Spec(shape, spec_lib.label(classes)), **config_lib.fields_of(noun))


def test_made_by_its_fields_it_is_the_same_network():
  _, params, data = _teacher()
  x, t, cond = _inputs(data)
  net = _make(x.shape[1:])
  out = net.module(layers.VelocityHead()).apply({"params": params}, x, t, cond)
  np.testing.assert_allclose(out, golden.nhwc(data["out"]), atol=1e-4)
  np.testing.assert_array_equal(net.null(cond)["label"], jnp.full(len(x), 10))
  assert net.sharding == dit.SHARDING and net.dtype == jnp.float32 and net.tokens((8, 6, 4)) == 12
  two = net.two_times(layers.VelocityHead())
  assert two == dit.DiT(head=layers.VelocityHead(), attention="xla", two_times=True, dtype=jnp.dtype("float32"), **TINY)


def test_without_a_label_it_has_no_table_and_reads_no_condition():
  net = _make(classes=0)
  module, x, t = net.module(layers.VelocityHead()), jnp.ones((2, 8, 8, 4)), jnp.array([0.2, 0.8])
  params = module.init(jax.random.key(0), x, t, {})["params"]
  labelled = _make().module(layers.VelocityHead()).init(jax.random.key(0), x, t, {"label": jnp.zeros(2, jnp.int32)})
  assert labelled["params"].keys() - params.keys() == {"class_embed"} and net.null is None
  # The label's embedding is added to time's: a table of zeros is no label.
  table = {"class_embed": {"embedding": jnp.zeros((11, 16))}}
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)
  want = _make().module(layers.VelocityHead()).apply(
      {"params": params | table}, x, t, {"label": jnp.zeros(2, jnp.int32)})
  np.testing.assert_array_equal(module.apply({"params": params}, x, t, {}), want)


def test_kernels_without_a_forward_derivative_make_no_network_of_two_times():
  for kernel in attention.KERNELS:
    assert (_make(attention=kernel).two_times is None) == (kernel in ("splash", "flash", "cudnn"))


@pytest.mark.parametrize("name, values", {
    "depth": (0, -1, 2**40, 1e30, float("nan"), "x", True), "width": (0, -4, 18, 2**40, "x"),
    "heads": (0, -1, 3, 2**40, "x"),
    "patch": (0, -1, 3, 2**40, 1e30, "x"), "time_scale": (float("nan"), float("inf"), 1e30, "x"),
    "time_offset": (float("nan"), float("-inf"), "x"), "frequency_shift": (-1, 2, 0.5, "x"),
    "mlp_norm_eps": (0, -1e-6, 1, float("nan"), "x"), "remat": ("x", 0, "save_only_these_names"), "attention": ("x", 0),
    "unroll": (0, -1, 2**40, "x"), "dtype": ("x", "float16", 0),
}.items())
def test_a_field_out_of_its_range_is_refused_by_name(name, values):
  for value in values:
    with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape(str(value))}"):
      _make(**{name: value})


@pytest.mark.parametrize("shape", [(8, 7, 4), (7, 8, 4), (8, 8), (4, 8, 8, 2), (2,)])
def test_data_that_are_no_pictures_of_whole_patches_are_refused(shape):
  with pytest.raises(ValueError, match="^patch: 2 does not divide"):
    _make(shape)


@pytest.mark.parametrize("cond", [
    {"text": spec_lib.Array((3,), "float32")}, {"label": spec_lib.Array((2,), "int32", 10)},
    {"label": spec_lib.Array()},
    {"label": spec_lib.Array(classes=3), "text": spec_lib.Array((3,), "float32")}])
def test_a_condition_that_it_would_not_read_is_refused(cond):
  noun = dit.config(depth=1, width=8, heads=2)
  with pytest.raises(ValueError, match="^make: DiT's condition is one label"):
    noun.make(spec_lib.Spec((8, 8, 4), cond), **config_lib.fields_of(noun))


@pytest.mark.parametrize("shape", [(4,), (3, 2), (2, 3, 1, 5)], ids=["point", "sequence", "video"])
def test_a_layout_of_single_positions_puts_each_token_in_its_place(shape):
  layout = layers.positions(shape)
  tokens = jax.random.normal(jax.random.key(0), (2, int(np.prod(shape[:-1])), 8))
  head = layers.VelocityHead()
  params = head.init(jax.random.key(1), tokens, None, layout)
  params = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(2), leaf.shape), params)
  out = params["params"]["out"]
  assert out["kernel"].shape == (8, 1, shape[-1])
  want = tokens @ out["kernel"][:, 0] + out["bias"][None]
  np.testing.assert_allclose(head.apply(params, tokens, None, layout), want.reshape(2, *shape), rtol=1e-5, atol=1e-5)


def test_a_layout_of_patches_is_where_patchify_took_them_from():
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  layout = layers.patches((4, 6, 3), 2)
  cells = layers.patchify(x, 2).reshape(2, 6, layout.cells, 3)
  np.testing.assert_array_equal(layout.place(cells).reshape(x.shape), x)
