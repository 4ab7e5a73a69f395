"""Vectors computed by the authors' PyTorch code, turned from NCHW to the layouts used here."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.policy import dx
from piflow_jax.policy import gmm

FOLDER = pathlib.Path(__file__).parent / "goldens"


def load(name, dtype=np.float32):
  """All arrays of a file by name, in float32 or as the float64 twin (of inputs, a cast)."""
  data = dict(np.load(FOLDER / f"{name}.npz"))
  if dtype == np.float64:
    plain = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in data.items() if not k.endswith("_f64")}
    return plain | {k.removesuffix("_f64"): v for k, v in data.items() if k.endswith("_f64")}
  return data


def nhwc(x):
  """[..., C, H, W] -> [..., H, W, C]."""
  return jnp.moveaxis(jnp.asarray(x), -3, -1)


def means(x):
  """[B, K, C, H, W] -> [B, C, K, P]."""
  x = jnp.asarray(x)
  return jnp.swapaxes(x.reshape(*x.shape[:3], -1), 1, 2)


def logweights(x):
  """[B, K, 1, H, W] -> [B, K, P]."""
  x = jnp.asarray(x)
  return x.reshape(*x.shape[:2], -1)


def scalars(x):
  return jnp.asarray(x).reshape(-1)


def mixture(data, prefix):
  """The u-space mixture stored as {prefix}means, {prefix}logweights, {prefix}logstds."""
  return gmm.Mixture(
      means(data[f"{prefix}means"]),
      logweights(data[f"{prefix}logweights"]),
      scalars(data[f"{prefix}logstds"]))


def dx_policy(den, x_src, t_src, clock, **settings):
  """The DX policy of velocities [B, N, C, H, W] given by the network at x_src [B, C, H, W], t_src [B]."""
  return dx.to_policy(nhwc(den), nhwc(x_src), scalars(t_src), clock, **settings)


def dit_params(data, depth, heads, head):
  """A DiT state dict in diffusers' naming -> the tree of `models.dit.DiT`; `head` converts the output layers."""
  def get(name):
    return jnp.asarray(data[f"param/{name}"])

  def linear(name):
    return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

  width = data["param/pos_embed.proj.bias"].shape[0]

  def block(i):
    name = f"transformer_blocks.{i}"
    q, k, v = (linear(f"{name}.attn1.to_{c}") for c in "qkv")
    fused = lambda leaf: jnp.stack([q[leaf], k[leaf], v[leaf]], -2)
    out = linear(f"{name}.attn1.to_out.0")
    return {
        "adaln": linear(f"{name}.norm1.linear"),
        "attention": {
            "qkv": {
                "kernel": fused("kernel").reshape(width, 3, heads, -1),
                "bias": fused("bias").reshape(3, heads, -1),
            },
            "out": {"kernel": out["kernel"].reshape(heads, -1, width), "bias": out["bias"]},
        },
        "mlp": {"in": linear(f"{name}.ff.net.0.proj"), "out": linear(f"{name}.ff.net.2")},
    }

  patch = get("pos_embed.proj.weight")  # [D, C, p, p]
  return {
      "patch_embed": {
          "kernel": patch.transpose(2, 3, 1, 0).reshape(-1, width), "bias": get("pos_embed.proj.bias")},
      "time_in": linear("emb.timestep_embedder.linear_1"),
      "time_out": linear("emb.timestep_embedder.linear_2"),
      "class_embed": {"embedding": get("emb.class_embedder.embedding_table.weight")},
      "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(block(i) for i in range(depth))),
      "adaln_out": linear("proj_out_1"),
      "head": head(linear),
  }


def velocity_head(linear, name="proj_out_2", channels=4):
  """Rows of the official layer are ordered (patch position, channel)."""
  out = linear(name)
  return {"out": {"kernel": out["kernel"].reshape(out["kernel"].shape[0], -1, channels),
                  "bias": out["bias"].reshape(-1, channels)}}


def gm_head(linear, components=4, channels=4):
  """Rows of the official means are ordered (patch position, component, channel)."""
  means, weights = linear("proj_out_means"), linear("proj_out_logweights")
  return {
      "means": {"kernel": means["kernel"].reshape(means["kernel"].shape[0], -1, components, channels),
                "bias": means["bias"].reshape(-1, components, channels)},
      "logweights": {"kernel": weights["kernel"].reshape(weights["kernel"].shape[0], -1, components),
                     "bias": weights["bias"].reshape(-1, components)},
      "logstd_in": linear("proj_out_logstds.1"),
      "logstd_out": linear("proj_out_logstds.3"),
  }


def dx_head(linear, points=3, channels=4):
  """Rows of the official layer are ordered (patch position, point, channel)."""
  out = linear("proj_out_2")
  return {"out": {"kernel": out["kernel"].reshape(out["kernel"].shape[0], -1, points, channels),
                  "bias": out["bias"].reshape(-1, points, channels)}}
