"""DiT, SiT and REPA by their names, against a small network of their definition, written here again (float32, 1e-4)."""

import math

import jax
import numpy as np
import pytest

from piflow_jax.convert import run
from tests.convert import making
from tests.convert.making import FIELDS

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


def _positions(side, dim):
  """[side side, dim]: sines and cosines of the column, then of the row, at 10000^(-i / (dim / 4))."""
  row, column = np.divmod(np.arange(side * side), side)
  angles = lambda place: place[:, None] * 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
  return np.concatenate([f(angles(place)) for place in (column, row) for f in (np.sin, np.cos)], 1).astype(np.float32)


class _Block(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
    self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
    self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

  def forward(self, x, c):
    (b, n, d), m = x.shape, self.adaLN_modulation(c).reshape(len(x), 6, 1, -1)
    shift, scale, gate = m[:, :3].unbind(1)
    q, k, v = self.attn["qkv"](_norm(x) * (1 + scale) + shift).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).softmax(-1)
    x = x + gate * self.attn["proj"]((weights @ v).transpose(1, 2).reshape(b, n, d))
    shift, scale, gate = m[:, 3:].unbind(1)
    return x + gate * self.mlp["fc2"](F.gelu(self.mlp["fc1"](_norm(x) * (1 + scale) + shift), approximate="tanh"))


def _norm(x):
  return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


class _SiT(nn.Module):
  """v(x [B, C, H, W], t, y), each output beside a variance (learn_sigma) that is dropped."""

  def __init__(self, *, side, patch, channels, width, depth, heads, classes, learn_sigma=False, projectors=0):
    super().__init__()
    self.patch, self.channels, out = patch, channels, channels * (2 if learn_sigma else 1)
    self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
    self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
    self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
    self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
    self.final_layer = nn.ModuleDict({
        "linear": nn.Linear(width, patch * patch * out),
        "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})
    if projectors:
      mlp = lambda: nn.Sequential(nn.Linear(width, 7), nn.SiLU(), nn.Linear(7, 5))
      self.projectors = nn.ModuleList(mlp() for _ in range(projectors))
    generator = torch.Generator().manual_seed(0)
    for w in self.parameters():  # as drawn for training, blocks would be the identity and outputs 0
      w.data = torch.randn(w.shape, generator=generator) * (0.02 if w.ndim < 2 else w[0].numel() ** -0.5)
    self.pos_embed = nn.Parameter(torch.tensor(_positions(side // patch, width))[None], requires_grad=False)

  def forward(self, x, t, y):
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder["embedding_table"](y)
    h = self.x_embedder["proj"](x).flatten(2).mT + self.pos_embed
    for block in self.blocks:
      h = block(h, c)
    shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
    out = self.final_layer["linear"](_norm(h) * (1 + scale) + shift)
    return F.pixel_shuffle(self._planes(out, x.shape), self.patch)[:, :self.channels]

  def _planes(self, out, shape):
    """[B, N, p p out] -> [B, out p p, h, w], as pixel_shuffle has it."""
    p = self.patch
    return out.unflatten(-1, (p * p, -1)).permute(0, 3, 2, 1).reshape(len(out), -1, shape[2] // p, shape[3] // p)


@pytest.mark.parametrize("naming, time_scale, more, says", [
    ("dit", 1000.0, {}, "facebookresearch/DiT"), ("dit", 1000.0, {"learn_sigma": True}, "8 channels a position"),
    ("sit", -1.0, {"learn_sigma": True}, "SiT as first released"), ("sit", -1.0, {}, "SiT as first released"),
    ("repa", 1.0, {"projectors": 2}, "REPA"), ("repa", 1.0, {}, "REPA")])
def test_the_same_velocity_by_every_name(naming, time_scale, more, says, tmp_path, capsys):
  config = making.config("teacher", **FIELDS[naming] | {"time_scale": time_scale})
  n, (side, _, channels), classes = config.network, config.data.shape, config.data.num_classes
  theirs = _SiT(side=side, patch=n.patch, channels=channels, width=n.width, depth=n.depth, heads=n.heads,
                classes=classes, **more)
  torch.save({"model": {}, "ema": theirs.state_dict(), "steps": 3}, tmp_path / "0000003.pt")
  run.from_torch(tmp_path / "0000003.pt", tmp_path / "run", config, naming=None if "projectors" in more else naming)
  assert says in capsys.readouterr().out

  x = np.random.default_rng(0).standard_normal((3, side, side, channels)).astype(np.float32)
  t, labels = np.array([0.0, 0.37, 1.0], np.float32), np.array([0, 3, classes])
  # At noise level t: SiT is at its time 1 - t, and its velocity is data - noise.
  time, sign = {"dit": (1000 * t, 1), "sit": (1 - t, -1), "repa": (t, 1)}[naming]
  with torch.no_grad():
    v = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(time), torch.tensor(labels))
  want = sign * v.numpy().transpose(0, 2, 3, 1)
  got = np.asarray(jax.jit(making.velocity(config))(making.weights(config, tmp_path / "run"), x, t, labels))
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
  print(f"{naming} {more}: largest difference {np.abs(got - want).max() / np.abs(want).max():.1e} of the largest entry")
