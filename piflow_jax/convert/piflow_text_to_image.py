"""Sample a pi-Flow student of FLUX.1 or Qwen-Image with PyTorch alone.

  python piflow_text_to_image.py --base=FOLDER --cond=cond.safetensors --out=latents.pt [--noise=noise.pt] [--nfe=4]

run in the folder that `python -m piflow_jax.convert to-torch` made, or with --model=FOLDER. --base is the folder of the
teacher's transformer in diffusers' form, which the student's adapters are for. From Python, there:

  model = piflow_text_to_image.load(folder, base)
  x_0 = piflow_text_to_image.sample(model, noise, cond)  # noise [B, C, H, W]; cond: text [B, L, D], pooled or mask

--cond holds the encoded prompts: text, and pooled (FLUX.1) or mask (Qwen-Image). x_0 are latents as the autoencoder's
scale and shift leave them. It needs torch, safetensors and piflow_policy.py beside it, and nothing of piflow_jax.
"""

import argparse
import math
import os

from piflow_policy import read
from piflow_policy import sample
import torch
from torch.nn import functional as F


def norm(x):
  return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rms(x, weight):
  y = x.float()
  return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


class Weights:
  """A state dict whose linear layers are called by name, adapters merged into them."""

  def __init__(self, state):
    self.state = state

  def __call__(self, name, x):
    return F.linear(x, self.state[f"{name}.weight"].to(x.dtype), self.state[f"{name}.bias"].to(x.dtype))

  def rms(self, name, x):
    return rms(x, self.state[f"{name}.weight"].to(x.dtype))

  def embed(self, name, x):
    return self(f"{name}.linear_2", F.silu(self(f"{name}.linear_1", x)))

  def has(self, name):
    return f"{name}.weight" in self.state


def time_features(t):
  angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)[None]
  return torch.cat([angles.cos(), angles.sin()], -1)


def rotary(positions, axes):
  """[N, 3] -> (cos, sin) [N, head], each value twice."""
  parts = [positions[:, i, None].double() * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)[None]
           for i, width in enumerate(axes)]
  angles = torch.cat(parts, 1).repeat_interleave(2, 1)
  return angles.cos().float(), angles.sin().float()


def rotate(x, turns):
  cos, sin = (table[None, :, None].to(x.device) for table in turns)
  pairs = x.float().unflatten(-1, (-1, 2))
  turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
  return (x.float() * cos + turned * sin).to(x.dtype)


class Transformer:
  """Either network, as the model that `piflow_policy.sample` takes."""

  def __init__(self, state, config, base):
    self.w, self.settings, self.base = Weights(state), config["piflow_jax"], base
    self.heads, self.axes = base["num_attention_heads"], base["axes_dims_rope"]
    self.patch, self.half = self.settings.get("patch", 2), self.settings.get("half_times", False)
    height, width, channels = self.settings["latent_shape"]
    self.shape = (channels, height, width)
    self.flux = self.w.has("context_embedder")
    self.count = config.get("num_gaussians") or max(
        len(state.get("proj_out.weight", [])) // (self.patch**2 * channels), 1)
    self.mixture = "proj_out_means.weight" in state

  def null(self, cond):
    raise ValueError("guidance of a teacher wants the negative prompt's condition; a student has its guidance in it")

  def _thousandfold(self, t):
    if not self.half:
      return 1000 * t
    half = t.bfloat16()
    return (half * 1000).float() if self.flux else 1000 * half.float()

  def tokens(self, x, t, cond):
    w, p = self.w, self.patch
    dtype = w.state["norm_out.linear.weight"].dtype
    b, c, h, width = x.shape
    grid = h // p, width // p
    y = x.unflatten(3, (grid[1], p)).unflatten(2, (grid[0], p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    image = w("x_embedder" if self.flux else "img_in", y.to(dtype))
    text = cond["text"].to(dtype)
    text = w("context_embedder", text) if self.flux else w("txt_in", w.rms("txt_norm", text))
    name = "time_text_embed"
    embedding = w.embed(f"{name}.timestep_embedder", time_features(self._thousandfold(t)).to(dtype))
    if w.has(f"{name}.guidance_embedder.linear_1"):
      guidance = torch.full_like(t, self.settings["guidance"])
      features = time_features(self._thousandfold(guidance)).to(dtype)
      embedding = embedding + w.embed(f"{name}.guidance_embedder", features)
    if w.has(f"{name}.text_embedder.linear_1"):
      embedding = embedding + w.embed(f"{name}.text_embedder", cond["pooled"].to(dtype))
    n, mask = image.shape[1], None
    if self.settings.get("masked", True) and "mask" in cond:
      mask = torch.cat([torch.ones(b, n, device=x.device), cond["mask"].float()], 1)[:, None, None] > 0
    turns = rotary(self._positions(grid, text.shape[1]), self.axes)
    for i in range(self.base["num_layers"]):
      image, text = self._double(f"transformer_blocks.{i}", image, text, embedding, turns, mask)
    both = torch.cat([image, text], 1)
    for i in range(self.base.get("num_single_layers") or 0):
      both = self._single(f"single_transformer_blocks.{i}", both, embedding, turns, mask)
    scale, shift = w("norm_out.linear", F.silu(embedding))[:, None].chunk(2, -1)
    return norm(both[:, :n]) * (1 + scale) + shift, embedding

  def _positions(self, grid, text):
    rows, columns = (torch.arange(size) for size in grid)
    if not self.flux:
      rows, columns = (r - (size - size // 2) for r, size in zip((rows, columns), grid))
    image = torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float())
    first = max(grid[0] // 2, grid[1] // 2)
    words = torch.zeros(text, 3) if self.flux else (first + torch.arange(text)).float()[:, None].repeat(1, 3)
    return torch.cat([image, words])

  def _attend(self, q, k, v, turns, mask):
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, turns), rotate(k, turns), v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

  def _split(self, x):
    return x.unflatten(-1, (self.heads, -1))

  def _double(self, block, image, text, embedding, turns, mask):
    w, act = self.w, F.silu(embedding)
    names = {"image": ("norm1.linear" if self.flux else "img_mod.1", "to_q", "to_k", "to_v", "", "to_out.0",
                       "ff" if self.flux else "img_mlp"),
             "text": ("norm1_context.linear" if self.flux else "txt_mod.1", "add_q_proj", "add_k_proj", "add_v_proj",
                      "added_", "to_add_out", "ff_context" if self.flux else "txt_mlp")}
    qkv, rest = [], {}
    for side, x in (("image", image), ("text", text)):
      mod, q, k, v, added, _, _ = names[side]
      shift, scale, *rest[side] = w(f"{block}.{mod}", act)[:, None].chunk(6, -1)
      y = norm(x) * (1 + scale) + shift
      q, k, v = (self._split(w(f"{block}.attn.{one}", y)) for one in (q, k, v))
      qkv.append((w.rms(f"{block}.attn.norm_{added}q", q), w.rms(f"{block}.attn.norm_{added}k", k), v))
    y = self._attend(*(torch.cat(pair, 1) for pair in zip(*qkv)), turns, mask)
    out = []
    for side, x, part in (("image", image, y[:, :image.shape[1]]), ("text", text, y[:, image.shape[1]:])):
      gate_a, shift, scale, gate_m = rest[side]
      x = x + gate_a * w(f"{block}.attn.{names[side][5]}", part)
      mlp = f"{block}.{names[side][6]}.net"
      hidden = F.gelu(w(f"{mlp}.0.proj", norm(x) * (1 + scale) + shift), approximate="tanh")
      out.append(x + gate_m * w(f"{mlp}.2", hidden))
    return out

  def _single(self, block, x, embedding, turns, mask):
    w = self.w
    shift, scale, gate = w(f"{block}.norm.linear", F.silu(embedding))[:, None].chunk(3, -1)
    y = norm(x) * (1 + scale) + shift
    q, k, v = (self._split(w(f"{block}.attn.to_{c}", y)) for c in "qkv")
    attended = self._attend(w.rms(f"{block}.attn.norm_q", q), w.rms(f"{block}.attn.norm_k", k), v, turns, mask)
    hidden = F.gelu(w(f"{block}.proj_mlp", y), approximate="tanh")
    return x + gate * w(f"{block}.proj_out", torch.cat([attended, hidden], -1))

  def grid(self, y, shape, count):
    """[B, N, count C p p] -> [B, count, C, H, W], float32."""
    p, (_, _, h, width) = self.patch, shape
    y = y.float().unflatten(1, (h // p, width // p)).unflatten(-1, (count, -1, p, p))
    return y.permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)

  def outputs(self, x, t, cond):
    """What `piflow_policy.policy` takes."""
    tokens, embedding = self.tokens(x, t, cond)
    if self.mixture:
      logstd = self.w("proj_out_logstds.3", F.silu(self.w("proj_out_logstds.1", F.silu(embedding))))
      return (self.grid(self.w("proj_out_means", tokens), x.shape, self.count),
              self.grid(self.w("proj_out_logweights", tokens), x.shape, self.count).log_softmax(1), logstd.float())
    u = self.grid(self.w("proj_out", tokens), x.shape, self.count)
    return u[:, 0] if self.settings["policy"] is None else u

  def block_velocity(self, x, t, cond, weights):
    """Parallel decoding: the mean velocity of a block, by one output layer that is the average of the many."""
    tokens, _ = self.tokens(x, t, cond)
    layer = [self.w.state[f"proj_out.{name}"].float() for name in ("weight", "bias")]
    share = weights.to(tokens.device, torch.float32)
    weight, bias = (torch.einsum("g...,g->...", one.unflatten(0, (self.count, -1)), share) for one in layer)
    return self.grid(F.linear(tokens, weight.to(tokens.dtype), bias.to(tokens.dtype)), x.shape, 1)[:, 0]


def load(folder, base=None, device="cpu", dtype=None):
  """The model of an export: a student's adapters merged into the base's weights, its head and last norm in their place.

  Args:
    folder: of the export.
    base: of the teacher's transformer; None: the export has all weights itself.
    device, dtype: of the weights; by default as stored.
  """
  config, own = read(folder)
  about, state = read(base) if base else (config, {})
  if any(key.startswith("proj_out_") for key in own):
    state = {key: w for key, w in state.items() if key not in ("proj_out.weight", "proj_out.bias")}
  for key, w in own.items():
    if key.endswith(".lora_B.weight"):
      name = key.removesuffix(".lora_B.weight")
      delta = w.float() @ own[f"{name}.lora_A.weight"].float()
      state[f"{name}.weight"] = (state[f"{name}.weight"].float() + delta).to(state[f"{name}.weight"].dtype)
    elif not key.endswith(".lora_A.weight"):
      state[key] = w
  state = {key: w.to(device, dtype or w.dtype) for key, w in state.items()}
  return Transformer(state, config, about)


def main():
  from safetensors.torch import load_file

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default=os.path.dirname(os.path.abspath(__file__)), help="folder of the export")
  parser.add_argument("--base", help="folder of the teacher's transformer; none for an export of all weights")
  parser.add_argument("--cond", required=True, help="safetensors file: text, and pooled or mask")
  parser.add_argument("--out", required=True, help="file to save x_0 [B, C, H, W] to (torch.save)")
  parser.add_argument("--noise", help="file with noise [B, C, H, W]; drawn with --seed otherwise")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--nfe", type=int, help="network calls; default: what the student was trained for")
  parser.add_argument("--h", type=float, default=0.0, help="stochasticity, 0 to inf")
  parser.add_argument("--device", default="cpu")
  args = parser.parse_args()
  try:
    model = load(args.model, args.base, args.device)
    cond = {key: w.to(args.device) for key, w in load_file(args.cond).items()}
    generator = torch.Generator(args.device).manual_seed(args.seed)
    if args.noise:
      noise = torch.load(args.noise, weights_only=True).to(args.device)
    else:
      noise = torch.randn((len(cond["text"]), *model.shape), generator=generator, device=args.device)
    x_0 = sample(model, noise, cond, nfe=args.nfe, h=args.h, generator=generator)
  except (OSError, RuntimeError, ValueError, KeyError, IndexError) as e:
    parser.error(str(e))
  torch.save(x_0.cpu(), args.out)
  print(f"{args.out}: {tuple(x_0.shape)}, mean {x_0.mean():.4f}, std {x_0.std():.4f}")


if __name__ == "__main__":
  main()
