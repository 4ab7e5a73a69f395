"""The DiT under the names of pi-Flow's release, in PyTorch: a model for `piflow_policy.sample`.

This file stands alone: it needs torch, and nothing of piflow_jax.
"""

import math

import torch
from torch import nn
import torch.nn.functional as F


class Attention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
    self.to_out = nn.ModuleList([nn.Linear(width, width)])

  def forward(self, x):
    q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
    return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Gelu(nn.Module):
  def __init__(self, width, hidden):
    super().__init__()
    self.proj = nn.Linear(width, hidden)

  def forward(self, x):
    return F.gelu(self.proj(x), approximate="tanh")


class Modulation(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.linear = nn.Linear(width, 6 * width)


class FeedForward(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.net = nn.ModuleList([Gelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])


def norm(x, eps):
  return F.layer_norm(x, x.shape[-1:], eps=eps)


class Block(nn.Module):
  def __init__(self, width, heads, mlp_norm_eps):
    super().__init__()
    self.norm1, self.attn1, self.ff = Modulation(width), Attention(width, heads), FeedForward(width)
    self.mlp_norm_eps = mlp_norm_eps

  def forward(self, x, embedding):
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.norm1.linear(F.silu(embedding))[:, None].chunk(6, -1)
    x = x + gate_a * self.attn1(norm(x, 1e-6) * (1 + scale_a) + shift_a)
    y = norm(x, self.mlp_norm_eps) * (1 + scale_m) + shift_m
    for layer in self.ff.net:
      y = layer(y)
    return x + gate_m * y


class Embedding(nn.Module):
  def __init__(self, width, classes):
    super().__init__()
    self.timestep_embedder = nn.ModuleDict({"linear_1": nn.Linear(256, width), "linear_2": nn.Linear(width, width)})
    if classes:  # without any the network is unconditional
      self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
    self.classes = classes

  def forward(self, time, labels, frequency_shift):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=time.device) / (128 - frequency_shift))
    angles = time.float()[:, None] * frequencies
    embed = self.timestep_embedder
    features = torch.cat([angles.cos(), angles.sin()], -1).to(embed["linear_1"].weight.dtype)
    embedding = embed["linear_2"](F.silu(embed["linear_1"](features)))
    return embedding + self.class_embedder["embedding_table"](labels) if self.classes else embedding


class PatchEmbedding(nn.Module):
  def __init__(self, channels, width, patch):
    super().__init__()
    self.proj = nn.Conv2d(channels, width, patch, patch)

  def forward(self, x):
    x = self.proj(x)
    return x.flatten(2).transpose(1, 2) + positions(*x.shape[2:], x.shape[1]).to(x)


def positions(height, width, dim):
  """Fixed sine-cosine table [height width, dim], x first, then y."""
  def table(place):
    angles = place.double()[:, None] / 10000 ** (torch.arange(dim // 4).double() / (dim / 4))
    return torch.cat([angles.sin(), angles.cos()], -1)

  y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
  return torch.cat([table(x.flatten()), table(y.flatten())], -1)


class DiT(nn.Module):
  """The network of a config.json, under a teacher's or a student's output layers."""

  def __init__(self, config):
    super().__init__()
    self.settings = ours = config["piflow_jax"]
    heads, self.classes, self.patch = config["num_attention_heads"], config["num_embeds_ada_norm"], config["patch_size"]
    width = heads * config["attention_head_dim"]
    self.shape = (ours["latent_shape"][2], *ours["latent_shape"][:2])
    self.count = config.get("num_gaussians") or config.get("n_grid") or 1
    self.pos_embed, self.emb = PatchEmbedding(self.shape[0], width, self.patch), Embedding(width, self.classes)
    blocks = (Block(width, heads, config["norm_eps"]) for _ in range(config["num_layers"]))
    self.transformer_blocks = nn.ModuleList(blocks)
    self.proj_out_1 = nn.Linear(width, 2 * width)
    rows, self.mixture = self.patch**2 * self.count, "num_gaussians" in config
    if self.mixture:
      hidden = config["logstd_inner_dim"]
      self.proj_out_means, self.proj_out_logweights = nn.Linear(width, rows * self.shape[0]), nn.Linear(width, rows)
      self.proj_out_logstds = nn.Sequential(nn.SiLU(), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
    else:
      self.proj_out_2 = nn.Linear(width, rows * self.shape[0])

  def tokens(self, x, t, labels):
    dtype, ours = self.proj_out_1.weight.dtype, self.settings
    embedding = self.emb(ours["time_offset"] + ours["time_scale"] * t, labels, ours["frequency_shift"])
    y = self.pos_embed(x.to(dtype))
    for block in self.transformer_blocks:
      y = block(y, embedding)
    shift, scale = self.proj_out_1(F.silu(embedding))[:, None].chunk(2, -1)
    return norm(y, 1e-6) * (1 + scale) + shift, embedding

  def grid(self, y, count):
    """[B, N, p p count C] -> [B, count, C, H, W], float32."""
    p, (height, width) = self.patch, (s // self.patch for s in self.shape[1:])
    y = y.float().unflatten(1, (height, width)).unflatten(-1, (p, p, count, -1))
    return y.permute(0, 5, 6, 1, 3, 2, 4).flatten(5, 6).flatten(3, 4)

  def outputs(self, x, t, labels):
    """What `piflow_policy.policy` takes."""
    tokens, embedding = self.tokens(x, t, labels)
    if self.mixture:
      return (self.grid(self.proj_out_means(tokens), self.count),
              self.grid(self.proj_out_logweights(tokens), self.count).log_softmax(1),
              self.proj_out_logstds(embedding).float())
    u = self.grid(self.proj_out_2(tokens), self.count)
    return u[:, 0] if self.settings["policy"] is None else u

  def block_velocity(self, x, t, labels, weights):
    """Parallel decoding: the mean velocity of a block, by one output layer that is the average of the many."""
    def mean(w):
      # Summed in float32 and rounded once: in bfloat16 the weights of 128 intervals alone are off by 0.4%.
      layers = w.float().unflatten(0, (self.patch**2, self.count, -1))
      return torch.einsum("pgc...,g->pc...", layers, weights.to(w.device, torch.float32)).flatten(0, 1).to(w.dtype)

    tokens, _ = self.tokens(x, t, labels)
    return self.grid(F.linear(tokens, mean(self.proj_out_2.weight), mean(self.proj_out_2.bias)), 1)[:, 0]

  def null(self, labels):
    """The class of guidance's unconditional pass."""
    return torch.full_like(labels, self.classes)
