"""Sample a pi-Flow student (GM, DX, parallel decoding) or a teacher (with guidance, if you like) with PyTorch alone.

  python piflow_torch.py --labels=0,1,2,3 --out=samples.pt [--noise=noise.pt] [--nfe=1] [--device=cuda]

run in the folder that `python -m piflow_jax.convert to-torch` made, or with --model=FOLDER. From Python:

  model = piflow_torch.load(folder)
  x_0 = piflow_torch.sample(model, noise, labels)  # noise [B, C, H, W] standard normal, labels [B]; a teacher: guidance=2

This file stands alone: it needs torch and safetensors, nothing of piflow_jax. t is the noise level, 1 at the noise;
velocities are noise - data; tau is the time before the schedule's shift.
"""

import argparse
import json
import math
import os

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


class Block(nn.Module):
  def __init__(self, width, heads, mlp_norm_eps):
    super().__init__()
    self.norm1, self.attn1, self.ff = Modulation(width), Attention(width, heads), FeedForward(width)
    self.mlp_norm_eps = mlp_norm_eps

  def forward(self, x, embedding):
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.norm1.linear(F.silu(embedding))[:, None].chunk(6, -1)
    norm = lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps)
    x = x + gate_a * self.attn1(norm(x, 1e-6) * (1 + scale_a) + shift_a)
    y = norm(x, self.mlp_norm_eps) * (1 + scale_m) + shift_m
    for layer in self.ff.net:
      y = layer(y)
    return x + gate_m * y


class Embedding(nn.Module):
  def __init__(self, width, classes):
    super().__init__()
    self.timestep_embedder = nn.ModuleDict({"linear_1": nn.Linear(256, width), "linear_2": nn.Linear(width, width)})
    self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})

  def forward(self, time, labels, frequency_shift):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=time.device) / (128 - frequency_shift))
    angles = time.float()[:, None] * frequencies
    embed, dtype = self.timestep_embedder, self.class_embedder["embedding_table"].weight.dtype
    features = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
    return embed["linear_2"](F.silu(embed["linear_1"](features))) + self.class_embedder["embedding_table"](labels)


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
  """The network under the names of pi-Flow's release; `policy(x, t, labels)` makes a policy of its output."""

  def __init__(self, config):
    super().__init__()
    self.config, ours = config, config["piflow_jax"]
    heads, classes, self.patch = config["num_attention_heads"], config["num_embeds_ada_norm"], config["patch_size"]
    width = heads * config["attention_head_dim"]
    self.ours, self.kind = ours, (ours["policy"] or {"type": "velocity"})["type"]
    self.shape = (ours["latent_shape"][2], *ours["latent_shape"][:2])
    self.count = config.get("num_gaussians") or config.get("n_grid") or 1
    self.pos_embed, self.emb = PatchEmbedding(self.shape[0], width, self.patch), Embedding(width, classes)
    self.transformer_blocks = nn.ModuleList(Block(width, heads, config["norm_eps"]) for _ in range(config["num_layers"]))
    self.proj_out_1 = nn.Linear(width, 2 * width)
    rows = self.patch**2 * self.count
    if self.kind == "GMFlow":
      hidden = config["logstd_inner_dim"]
      self.proj_out_means, self.proj_out_logweights = nn.Linear(width, rows * self.shape[0]), nn.Linear(width, rows)
      self.proj_out_logstds = nn.Sequential(nn.SiLU(), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
    else:
      self.proj_out_2 = nn.Linear(width, rows * self.shape[0])

  def tokens(self, x, t, labels):
    dtype = self.proj_out_1.weight.dtype
    embedding = self.emb(self.ours["time_offset"] + self.ours["time_scale"] * t, labels, self.ours["frequency_shift"])
    y = self.pos_embed(x.to(dtype))
    for block in self.transformer_blocks:
      y = block(y, embedding)
    shift, scale = self.proj_out_1(F.silu(embedding))[:, None].chunk(2, -1)
    return F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift, embedding

  def grid(self, y, count):
    """[B, N, p p count C] -> [B, count, C, H, W], float32."""
    p, (height, width) = self.patch, (s // self.patch for s in self.shape[1:])
    y = y.float().unflatten(1, (height, width)).unflatten(-1, (p, p, count, -1))
    return y.permute(0, 5, 6, 1, 3, 2, 4).flatten(5, 6).flatten(3, 4)

  def policy(self, x, t, labels, temperature=1.0):
    tokens, embedding = self.tokens(x, t, labels)
    if self.kind == "GMFlow":
      means = self.grid(self.proj_out_means(tokens), self.count)
      logweights = self.grid(self.proj_out_logweights(tokens), self.count).log_softmax(1)
      logstd = self.proj_out_logstds(embedding).float()[:, :, None, None, None]
      return GMPolicy(means, logweights, logstd, x, _column(t), temperature)
    u = self.grid(self.proj_out_2(tokens), self.count)
    if self.kind == "DX":
      return DXPolicy(u, x, t, self.ours["policy"])
    return lambda x, t: u[:, 0]  # a teacher

  def block_velocity(self, x, t, labels, tau_src, tau_dst):
    """Parallel decoding: the mean velocity of a block, by one output layer that is the average of the many."""
    shift, count = self.ours["policy"]["shift"], self.count
    edges = (1 - torch.arange(count + 1, dtype=torch.float64) / count).clamp(tau_dst, tau_src)
    spans = warp(edges, shift).diff()
    # Summed in float32 and rounded once: in bfloat16 the weights of 128 intervals alone are off by 0.4%.
    mean = lambda w: torch.einsum("pgc...,g->pc...", w.float().unflatten(0, (self.patch**2, count, -1)),
                                  (spans / spans.sum()).to(w.device, torch.float32)).flatten(0, 1).to(w.dtype)
    tokens, _ = self.tokens(x, t, labels)
    return self.grid(F.linear(tokens, mean(self.proj_out_2.weight), mean(self.proj_out_2.bias)), 1)[:, 0]


class GMPolicy:
  """The velocity of a Gaussian mixture's posterior, E[x_0 | x] (GMFlow, arXiv 2504.05304), around the prior mean.

  With a = (1 - t) / t: zeta = a^2 - a_src^2, nu = a x / t - a_src x_src / t_src, d = v zeta + 1,
    logit_k = log w_k + (mu_k . nu - zeta |mu_k|^2 / 2) / d,  E[x_0 | x] = (v nu + sum_k w_k mu_k) / d.
  nu and zeta grow as 1 / t^2 and cancel; relative to a reference they do not, which is what float32 needs.
  """

  def __init__(self, means, logweights, logstd, x_src, t_src, temperature, eps=1e-4):
    temperature = max(temperature, eps)
    self.logweights = logweights if temperature == 1 else (logweights / temperature).log_softmax(1)
    means = x_src[:, None] - t_src[:, None] * means
    self.var = ((t_src * logstd[:, 0].exp()) ** 2 * temperature).clamp(min=1e-18)
    self.reference = (self.logweights.exp() * means).sum(1)
    self.delta = means - self.reference[:, None]  # [B, K, C, H, W]
    self.half_square = self.delta.square().sum(2, keepdim=True) / 2
    self.x_src, self.t_src, self.eps = x_src, t_src.clamp(min=eps), eps

  def __call__(self, x, t):
    t = _column(t).clamp(min=self.eps)
    a, a_src = (1 - t) / t, (1 - self.t_src) / self.t_src
    zeta = (a - a_src) * (a + a_src)
    d = (self.var * zeta + 1).clamp(min=self.eps)
    gain = 1 / (1 / self.var + zeta).clamp(min=self.eps)
    offset = x - self.reference
    residual = zeta * offset + a * x - a_src * (self.x_src / self.t_src - a_src * x)
    pull = (self.delta * (residual / d)[:, None]).sum(2, keepdim=True)
    weights = (self.logweights + pull - self.half_square * (zeta / d)[:, None]).softmax(1)
    return (offset - gain * residual - (weights * self.delta).sum(1) / d) / t


class DXPolicy:
  """x_0 estimates along a segment of tau, interpolated between grid points or as a polynomial."""

  def __init__(self, u, x_src, t_src, policy, eps=1e-4):
    self.x_0 = x_src[:, None] - _column(t_src)[:, None] * u
    self.shift, self.polynomial, self.eps = policy["shift"], policy["mode"] == "polynomial", eps
    self.tau_src = unwarp(t_src, self.shift)
    self.tau_dst = (self.tau_src - policy["segment_size"]).clamp(min=0)

  def __call__(self, x, t):
    tau, n = unwarp(t, self.shift), torch.arange(self.x_0.shape[1], device=t.device)
    if self.polynomial:
      weights = (self.tau_src - tau)[:, None] ** n
    else:
      place = ((tau - self.tau_dst) / (self.tau_src - self.tau_dst).clamp(min=self.eps)).clamp(0, 1) * (len(n) - 1)
      weights = (1 - (place[:, None] - n).abs()).clamp(min=0)
    return (x - torch.einsum("bn,bnchw->bchw", weights, self.x_0)) / _column(t).clamp(min=self.eps)


def warp(tau, shift):
  return shift * tau / (1 + (shift - 1) * tau)


def unwarp(t, shift):
  return t / (shift + (1 - shift) * t)


def _column(t):
  return t[:, None, None, None]


@torch.no_grad()
def sample(model, noise, labels, *, nfe=None, h=0.0, guidance=1.0, guidance_interval=(0.0, 1.0), generator=None,
           progress=None):
  """Draw x_0 from noise.

  Args:
    model: of `load`.
    noise: [B, C, H, W] standard normal.
    labels: [B] classes.
    nfe: network calls; by default as many as the student was trained for, of a teacher 50.
    h: stochasticity between calls, 0 (deterministic) to inf.
    guidance: w of classifier-free guidance, of a teacher; a student has learnt what its own training was given.
    guidance_interval: noise levels, both included, where it is active.
    generator: of torch, for h > 0.
    progress: called with each call's number.
  Returns:
    x_0 [B, C, H, W], float32.
  """
  if len(labels) != len(noise) or tuple(noise.shape[1:]) != model.shape:
    raise ValueError(f"noise {tuple(noise.shape)} and labels {tuple(labels.shape)}: want [B, "
                     f"{', '.join(map(str, model.shape))}] and [B]")
  if nfe is not None and nfe < 1:
    raise ValueError(f"nfe {nfe} is less than 1")
  if guidance != 1 and model.kind != "velocity":
    raise ValueError(f"guidance {guidance}: a student's was fixed when it was trained; leave it out")
  ours = model.ours
  shift, total, temperature = ours["shift"], ours["total_substeps"], ours["temperature"]
  nfe = nfe or (50 if model.kind == "velocity" else ours["nfe"])
  taus = [max((nfe - 1 + ours["final_scale"] - i) / (nfe - 1 + ours["final_scale"]), 0.0) for i in range(nfe)] + [0.0]
  x = noise.float()
  time = lambda tau: warp(torch.full(x.shape[:1], tau, device=x.device), shift)
  for i, (tau_src, tau_next) in enumerate(zip(taus, taus[1:])):
    t_src, t_next = (float(warp(torch.tensor(tau, dtype=torch.float64), shift)) for tau in (tau_src, tau_next))
    ratio = t_next * (1 - t_src) / (t_src * (1 - t_next)) if t_next < 1 else 1.0
    m = 1.0 if h == 0 else 0.0 if math.isinf(h) else ratio ** (h * h)
    t_dst = t_next * m / (1 - t_next + t_next * m)
    tau_dst = float(unwarp(torch.tensor(t_dst, dtype=torch.float64), shift))
    if model.kind == "ParallelDecoding":
      u = model.block_velocity(x, time(tau_src), labels, tau_src, tau_dst)
      x = x + (t_dst - t_src) * u
    else:
      policy = model.policy(x, time(tau_src), labels, temperature if i < nfe - 1 else 1.0)
      if guidance > 1 and guidance_interval[0] <= t_src <= guidance_interval[1]:
        null = torch.full_like(labels, model.config["num_embeds_ada_norm"])
        policy = _guided(policy, model.policy(x, time(tau_src), null), guidance)
      steps = 1 if model.kind == "velocity" else max(round((tau_src - tau_dst) * total), 1)
      for k in range(steps):
        here, there = (tau_src + (tau_dst - tau_src) * j / steps for j in (k, k + 1))
        x = x + _column(time(there) - time(here)) * policy(x, time(here))
    if h > 0:
      fresh = torch.randn(x.shape, generator=generator, device=x.device)
      x = (1 - t_next + t_next * m) * x + t_next * (1 - m * m) ** 0.5 * fresh
    if progress:
      progress(i + 1)
  return x


def _guided(cond, null, scale):
  return lambda x, t: cond(x, t) + (scale - 1) * (cond(x, t) - null(x, t))


def load(folder, device="cpu", dtype=None):
  """The model of a folder with config.json and safetensors, its weights in `dtype` (default: as stored)."""
  from safetensors.torch import load_file

  with open(os.path.join(folder, "config.json")) as f:
    config = json.load(f)
  if config.get("piflow_jax", {}).get("naming") != "release":
    raise ValueError(f"{folder}: not an export of piflow_jax in pi-Flow's naming")
  name, state = "diffusion_pytorch_model.safetensors", {}
  shards = [name]
  if os.path.exists(os.path.join(folder, f"{name}.index.json")):
    with open(os.path.join(folder, f"{name}.index.json")) as f:
      shards = sorted(set(json.load(f)["weight_map"].values()))
  for shard in shards:  # and nothing else that lies there
    state |= load_file(os.path.join(folder, shard))
  with torch.device("meta"):
    model = DiT(config)
  model.load_state_dict({k: v.to(dtype or v.dtype) for k, v in state.items()}, strict=True, assign=True)
  return model.to(device).eval()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default=os.path.dirname(os.path.abspath(__file__)), help="folder of the export")
  parser.add_argument("--labels", required=True, help="classes of the samples, 0,1,2")
  parser.add_argument("--out", required=True, help="file to save x_0 [B, C, H, W] to (torch.save)")
  parser.add_argument("--noise", help="file with noise [B, C, H, W]; drawn with --seed otherwise")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--nfe", type=int, help="network calls; default: what the student was trained for")
  parser.add_argument("--h", type=float, default=0.0, help="stochasticity, 0 to inf")
  parser.add_argument("--guidance", type=float, default=1.0, help="of a teacher; 1 is none")
  parser.add_argument("--device", default="cpu")
  args = parser.parse_args()
  try:
    draw(args)
  except (OSError, RuntimeError, ValueError, KeyError, IndexError) as e:
    parser.error(str(e))


def draw(args):
  model = load(args.model, args.device)
  labels = torch.tensor([int(label) for label in args.labels.split(",")], device=args.device)
  classes = model.config["num_embeds_ada_norm"]
  if not all(0 <= label <= classes for label in labels.tolist()):
    raise ValueError(f"--labels: {args.labels} are not all of the {classes} classes (or {classes}, for none)")
  generator = torch.Generator(args.device).manual_seed(args.seed)
  if args.noise:
    noise = torch.load(args.noise, weights_only=True).to(args.device)
  else:
    noise = torch.randn((len(labels), *model.shape), generator=generator, device=args.device)
  x_0 = sample(model, noise, labels, nfe=args.nfe, h=args.h, guidance=args.guidance, generator=generator)
  torch.save(x_0.cpu(), args.out)
  print(f"{args.out}: {tuple(x_0.shape)}, mean {x_0.mean():.4f}, std {x_0.std():.4f}")


if __name__ == "__main__":
  main()
