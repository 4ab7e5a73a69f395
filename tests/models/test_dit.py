"""DiT and its heads against the authors' vectors (float32; a layer to 1e-5, a model to 1e-4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.models import dit, layers
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from tests import golden

TINY = dict(depth=2, width=16, heads=2, num_classes=10, time_scale=1.0)


def _inputs(data):
  return golden.nhwc(data["x"]), jnp.asarray(data["t"]), jnp.asarray(data["labels"])


def _teacher():
  data = golden.load("dit_teacher")
  net = dit.DiT(head=layers.VelocityHead(4, 2), **TINY)
  return net, golden.dit_params(data, 2, 2, golden.velocity_head), data


def _flat_close(got, want, rtol):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()), err_msg=jax.tree_util.keystr(path))


def test_teacher_vectors():
  net, params, data = _teacher()
  x, t, labels = _inputs(data)
  apply = jax.jit(lambda p, x, t: net.apply({"params": p}, x, t, labels))
  np.testing.assert_allclose(apply(params, x, t), golden.nhwc(data["out_f64"]), atol=1e-4)
  np.testing.assert_allclose(apply(params, x, jnp.asarray(data["t_unit"])), golden.nhwc(data["out_t_unit"]), atol=1e-4)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, labels)["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)


def test_teacher_parts():
  _, _, data = _teacher()
  np.testing.assert_allclose(layers.sincos_positions(4, 4, 16), data["pos_embed"][0], atol=1e-6)
  # Angles reach 1000 radians, where float32 resolves 6e-5.
  np.testing.assert_allclose(layers.time_features(jnp.asarray(data["t"])), data["time_proj"], atol=1e-4)


def test_teacher_gradient_vectors():
  net, params, data = _teacher()
  x, t, labels = _inputs(data)
  cotangent = golden.nhwc(data["cotangent"])
  loss = jax.jit(jax.grad(lambda p, x: jnp.sum(net.apply({"params": p}, x, t, labels) * cotangent), argnums=(0, 1)))
  grads, grad_x = loss(params, x)
  renamed = {k.replace("grad/", "param/"): v for k, v in data.items() if k.startswith("grad/")}
  _flat_close(grads, golden.dit_params(renamed, 2, 2, golden.velocity_head), 1e-4)
  np.testing.assert_allclose(grad_x, golden.nhwc(data["grad_x"]), atol=1e-4)


def test_label_dropout_of_each_block_vectors():
  data, (net, params, _) = golden.load("dit_class_dropout"), _teacher()
  x, t, labels = _inputs(data)
  each = dit.drop_labels(labels, jnp.asarray(data["uniform"])[..., 0], rate=float(data["class_dropout_prob"]), num_classes=10)
  apply = jax.jit(lambda labels: net.apply({"params": params}, x, t, labels))
  np.testing.assert_allclose(apply(each), golden.nhwc(data["out_train"]), atol=1e-4)
  np.testing.assert_allclose(apply(labels), golden.nhwc(data["out_eval"]), atol=1e-4)


def _gm_net(components=4):
  return dit.DiT(head=gmm.GMHead(components, 4, 2, logstd_width=16), **TINY)


def test_gm_student_vectors():
  data = golden.load("dit_gm")
  net, params = _gm_net(), golden.dit_params(data, 2, 2, golden.gm_head)
  x, t, labels = _inputs(data)
  apply = jax.jit(lambda p: net.apply({"params": p}, x, t, labels))
  _flat_close(apply(params), golden.mixture(data, "out_"), 1e-4)
  cotangent = golden.mixture(data, "cotangent_")
  loss = lambda p: sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(apply(p)), jax.tree.leaves(cotangent)))
  renamed = {k.replace("grad/", "param/"): v for k, v in data.items() if k.startswith("grad/")}
  _flat_close(jax.jit(jax.grad(loss))(params), golden.dit_params(renamed, 2, 2, golden.gm_head), 2e-4)


def test_dx_student_vectors():
  data, (_, teacher, _) = golden.load("dit_dx"), _teacher()
  net = dit.DiT(head=dx.DXHead(points=3, channels=4, patch=2, segment=1.0), **TINY)
  x, t, labels = _inputs(data)
  apply = jax.jit(lambda p: net.apply({"params": p}, x, t, labels))
  want = lambda x: jnp.moveaxis(jnp.asarray(x), 2, -1)  # [B, N, C, H, W] -> [B, N, H, W, C]
  params = golden.dit_params(data, 2, 2, golden.dx_head)
  np.testing.assert_allclose(apply(params), want(data["out"]), atol=1e-4)

  data = golden.load("dit_expand")
  x, t, labels = _inputs(data)
  fresh = net.init(jax.random.key(0), x, t, labels)["params"]["head"]
  head = net.head.from_teacher(teacher["head"], fresh, None)
  stored = {"kernel": jnp.asarray(data["dx_student/proj_out_2.weight"]).T,
            "bias": jnp.asarray(data["dx_student/proj_out_2.bias"])}
  _flat_close(head, golden.dx_head(lambda name: stored), 1e-6)
  np.testing.assert_allclose(
      jax.jit(lambda p: net.apply({"params": p}, x, t, labels))(teacher | {"head": head}), want(data["dx_student_out"]),
      atol=1e-4)


def test_a_network_of_two_times_starts_as_its_teacher_and_then_sees_the_span():
  net, params, data = _teacher()
  x, t, labels = _inputs(data)
  two = net.clone(two_times=True)
  fresh = two.init(jax.random.key(0), x, t, labels, t)["params"]
  assert fresh.keys() - params.keys() == {"span_in", "span_out"}
  told = fresh | params
  want = net.apply({"params": params}, x, t, labels)
  np.testing.assert_array_equal(two.apply({"params": told}, x, t, labels, t / 3), want)
  told["span_out"] = jax.tree.map(lambda leaf: leaf + 0.1, told["span_out"])
  here, there = (two.apply({"params": told}, x, t, labels, t_dst) for t_dst in (t, t / 3))
  assert float(jnp.abs(here - there).max()) > 1e-3
  # Only the span counts, which is 0 in both.
  np.testing.assert_array_equal(here[t == 0], there[t == 0])


def test_head_from_teacher_vectors():
  data, (_, teacher, _) = golden.load("dit_expand"), _teacher()
  x, t, labels = _inputs(data)
  net = _gm_net()
  fresh = net.init(jax.random.key(0), x, t, labels)["params"]["head"]
  # The first layer of logstd is drawn, not derived, and so not among the vectors.
  stored = lambda name: {"kernel": jnp.asarray(data[f"gm_student/{name}.weight"]).T,
                         "bias": jnp.asarray(data[f"gm_student/{name}.bias"])}
  want = golden.gm_head(lambda name: fresh["logstd_in"] if name == "proj_out_logstds.1" else stored(name))
  head = gmm.head_from_teacher(teacher["head"]["out"], fresh, jnp.asarray(data["gm_noise"]).reshape(4, 4))
  _flat_close(head, want, 1e-6)
  out = jax.jit(lambda p: net.apply({"params": p}, x, t, labels))(teacher | {"head": head})
  _flat_close(out, golden.mixture(data, "gm_student_out_"), 1e-4)


def test_head_without_teacher_scatters_alike_at_each_patch_position():
  data = golden.load("dit_expand")
  x, t, labels = _inputs(data)
  head = _gm_net().init(jax.random.key(0), x, t, labels)["params"]["head"]
  bias = head["means"]["bias"]
  np.testing.assert_array_equal(bias, jnp.broadcast_to(bias[0], bias.shape))
  scratch = data["gm_scratch/proj_out_means.bias"].reshape(4, 4, 4)
  np.testing.assert_allclose(scratch[0], 0.1 * data["gm_noise"].reshape(4, 4), rtol=1e-6)
  assert 0.05 < float(bias[0].std()) < 0.15
  np.testing.assert_array_equal(head["logstd_out"]["bias"], data["gm_scratch/proj_out_logstds.3.bias"])


def test_teacher_is_what_the_expanded_student_says_on_average():
  """Equal weights and copies of one layer: the mixture's mean is the teacher's velocity plus the mean of the noise."""
  data, (net, teacher, _) = golden.load("dit_expand"), _teacher()
  x, t, labels = _inputs(data)
  student = _gm_net()
  fresh = student.init(jax.random.key(0), x, t, labels)["params"]["head"]
  noise = jax.random.normal(jax.random.key(1), (4, 4))
  params = teacher | {"head": gmm.head_from_teacher(teacher["head"]["out"], fresh, noise - noise.mean(0, keepdims=True))}
  mixture = student.apply({"params": params}, x, t, labels)
  u = net.apply({"params": teacher}, x, t, labels)
  np.testing.assert_allclose(gmm.from_positions(mixture.means.mean(2), u.shape), u, atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots_with_no_batch_dims_saveable"])
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(remat):
  net, params, data = _teacher()
  x, t, labels = _inputs(data)
  half = net.clone(dtype=jnp.bfloat16, remat=remat, head=layers.VelocityHead(4, 2, jnp.bfloat16))
  out = half.apply({"params": params}, x, t, labels)
  assert out.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(half.init(jax.random.key(0), x, t, labels))} == {jnp.dtype("float32")}
  error = float(jnp.abs(out - golden.nhwc(data["out"])).max())
  assert 1e-5 < error < 0.15 * float(np.abs(data["out"]).max())  # 8 bits of mantissa, two blocks; and not float32


def test_label_dropout_replaces_the_labels_below_the_rate():
  labels = jnp.arange(4)
  np.testing.assert_array_equal(
      dit.drop_labels(labels, jnp.array([0.05, 0.1, 0.2, 0.0]), rate=0.1, num_classes=10), [10, 1, 2, 10])
