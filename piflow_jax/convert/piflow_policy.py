"""pi-Flow's policies, and the sampler that lets them walk, in PyTorch: for any network.

What `sample` takes for a model is any object with

  settings             "piflow_jax" in an export's config.json: policy, shift, nfe, final_scale, total_substeps, ...
  shape                of x_0 without the batch, (C, H, W)
  outputs(x, t, cond)  one network call at x [B, *shape] and noise level t [B]: what `policy` below takes, float32
  null(cond)           the condition of guidance's unconditional pass
  block_velocity(x, t, cond, weights)  of parallel decoding alone: u by one output layer, `weights`' average of the many

This file stands alone: it needs torch, `read` also safetensors, and nothing of piflow_jax. t is the noise level, 1 at
the noise; velocities are noise - data; tau is the time before the schedule's shift.
"""

import json
import math
import os

import torch

KINDS = ("velocity", "GMFlow", "DX", "ParallelDecoding")


def kind(settings):
  """Which of KINDS a model is; "velocity" is a teacher."""
  found = (settings["policy"] or {"type": "velocity"})["type"]
  if found not in KINDS:
    raise ValueError(f"policy {found!r} is none of {', '.join(KINDS)}")
  return found


def policy(settings, out, x_src, t_src, temperature=1.0):
  """The policy, (x, t) -> u, that a network's output at x_src and t_src stands for.

  Args:
    settings: see above.
    out: GMFlow: means [B, K, C, H, W] of the velocity, log-weights [B, K, 1, H, W] (normalised), log standard deviation
      [B, 1]; DX: velocities [B, N, C, H, W]; a teacher: its velocity [B, C, H, W].
    x_src, t_src: [B, C, H, W] and [B], where the network was called.
    temperature: of GMFlow; below 1 sharpens.
  """
  made = kind(settings)
  if made == "GMFlow":
    return GMPolicy(*out, x_src, t_src, temperature)
  if made == "DX":
    return DXPolicy(out, x_src, t_src, settings["policy"])
  return Constant(out)


class Constant:
  """A teacher's velocity, for one Euler step."""

  def __init__(self, u):
    self.u = u

  def __call__(self, x, t):
    return self.u


class GMPolicy:
  """The velocity of a Gaussian mixture's posterior, E[x_0 | x] (GMFlow, arXiv 2504.05304), around the prior mean.

  With a = (1 - t) / t: zeta = a^2 - a_src^2, nu = a x / t - a_src x_src / t_src, d = v zeta + 1,
    logit_k = log w_k + (mu_k . nu - zeta |mu_k|^2 / 2) / d,  E[x_0 | x] = (v nu + sum_k w_k mu_k) / d.
  nu and zeta grow as 1 / t^2 and cancel; relative to a reference they do not, which is what float32 needs.
  """

  def __init__(self, means, logweights, logstd, x_src, t_src, temperature, eps=1e-4):
    temperature, t_src = max(temperature, eps), column(t_src, x_src)
    self.logweights = logweights if temperature == 1 else (logweights / temperature).log_softmax(1)
    means = x_src[:, None] - t_src[:, None] * means
    self.var = ((t_src * column(logstd[:, 0], x_src).exp()) ** 2 * temperature).clamp(min=1e-18)
    self.reference = (self.logweights.exp() * means).sum(1)
    self.delta = means - self.reference[:, None]  # [B, K, C, H, W]
    self.half_square = self.delta.square().sum(2, keepdim=True) / 2
    self.x_src, self.t_src, self.eps = x_src, t_src.clamp(min=eps), eps

  def __call__(self, x, t):
    t = column(t, x).clamp(min=self.eps)
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

  def __init__(self, u, x_src, t_src, settings, eps=1e-4):
    self.x_0 = x_src[:, None] - column(t_src, u) * u
    self.shift, self.polynomial, self.eps = settings["shift"], settings["mode"] == "polynomial", eps
    self.tau_src = unwarp(t_src, self.shift)
    self.tau_dst = (self.tau_src - settings["segment_size"]).clamp(min=0)

  def __call__(self, x, t):
    tau, n = unwarp(t, self.shift), torch.arange(self.x_0.shape[1], device=t.device)
    if self.polynomial:
      weights = (self.tau_src - tau)[:, None] ** n
    else:
      place = ((tau - self.tau_dst) / (self.tau_src - self.tau_dst).clamp(min=self.eps)).clamp(0, 1) * (len(n) - 1)
      weights = (1 - (place[:, None] - n).abs()).clamp(min=0)
    return (x - torch.einsum("bn,bnchw->bchw", weights, self.x_0)) / column(t, x).clamp(min=self.eps)


class Guided:
  """Classifier-free guidance of two velocities."""

  def __init__(self, cond, null, scale):
    self.cond, self.null, self.scale = cond, null, scale

  def __call__(self, x, t):
    return self.cond(x, t) + (self.scale - 1) * (self.cond(x, t) - self.null(x, t))


def block_weights(settings, count, tau_src, tau_dst):
  """Parallel decoding: the share of each of `count` intervals in the mean velocity of a block, float64 [count]."""
  edges = (1 - torch.arange(count + 1, dtype=torch.float64) / count).clamp(tau_dst, tau_src)
  spans = warp(edges, settings["policy"]["shift"]).diff()
  return spans / spans.sum()


def warp(tau, shift):
  return shift * tau / (1 + (shift - 1) * tau)


def unwarp(t, shift):
  return t / (shift + (1 - shift) * t)


def column(t, x):
  """t [B] with the rank of x."""
  return t.reshape(-1, *[1] * (x.ndim - 1))


def plan(settings, nfe, h):
  """For each network call (tau_src, tau_dst, t_src, t_dst, t_next, m).

  The call is made at src, its policy walks to dst, and there so much noise is added that the next call is made at
  t_next; m is the share of the noise at t_next that is kept, the rest is drawn anew.
  """
  shift, length = settings["shift"], nfe - 1 + settings["final_scale"]
  taus = [max((length - i) / length, 0.0) for i in range(nfe)] + [0.0]
  rows = []
  for tau_src, tau_next in zip(taus, taus[1:]):
    t_src, t_next = (float(warp(torch.tensor(tau, dtype=torch.float64), shift)) for tau in (tau_src, tau_next))
    ratio = t_next * (1 - t_src) / (t_src * (1 - t_next)) if t_next < 1 else 1.0
    m = 1.0 if h == 0 else 0.0 if math.isinf(h) else ratio ** (h * h)
    t_dst = t_next * m / (1 - t_next + t_next * m)
    tau_dst = float(unwarp(torch.tensor(t_dst, dtype=torch.float64), shift))
    rows.append((tau_src, tau_dst, t_src, t_dst, t_next, m))
  return rows


def read(folder):
  """(config.json, {key: tensor}) of a folder of diffusers' form: one safetensors file, or the shards of its index."""
  from safetensors.torch import load_file

  with open(os.path.join(folder, "config.json")) as f:
    config = json.load(f)
  name, state = "diffusion_pytorch_model.safetensors", {}
  shards = [name]
  if os.path.exists(os.path.join(folder, f"{name}.index.json")):
    with open(os.path.join(folder, f"{name}.index.json")) as f:
      shards = sorted(set(json.load(f)["weight_map"].values()))
  for shard in shards:  # and nothing else that lies there
    state |= load_file(os.path.join(folder, shard))
  return config, state


@torch.no_grad()
def sample(model, noise, cond, *, nfe=None, h=0.0, guidance=1.0, guidance_interval=(0.0, 1.0), generator=None,
           progress=None):
  """Draw x_0 from noise.

  Args:
    model: see above.
    noise: [B, *model.shape] standard normal.
    cond: what the model takes; of one with classes their numbers [B].
    nfe: network calls; by default as many as the student was trained for, of a teacher 50.
    h: stochasticity between calls, 0 (deterministic) to inf.
    guidance: w of classifier-free guidance, of a teacher; a student has learnt what its own training was given.
    guidance_interval: noise levels, both included, where it is active.
    generator: of torch, for h > 0.
    progress: called with each call's number.
  Returns:
    x_0 [B, *model.shape], float32.
  """
  settings, what = model.settings, kind(model.settings)
  if tuple(noise.shape[1:]) != tuple(model.shape) or (hasattr(cond, "shape") and len(cond) != len(noise)):
    raise ValueError(f"noise {tuple(noise.shape)} and labels {tuple(getattr(cond, 'shape', ()))}: want [B, "
                     f"{', '.join(map(str, model.shape))}] and [B]")
  if nfe is not None and nfe < 1:
    raise ValueError(f"nfe {nfe} is less than 1")
  if guidance != 1 and what != "velocity":
    raise ValueError(f"guidance {guidance}: a student's was fixed when it was trained; leave it out")
  nfe = nfe or (50 if what == "velocity" else settings["nfe"])
  x = noise.float()

  def time(tau):
    return warp(torch.full(x.shape[:1], tau, device=x.device), settings["shift"])

  for i, (tau_src, tau_dst, t_src, t_dst, t_next, m) in enumerate(plan(settings, nfe, h)):
    if what == "ParallelDecoding":
      weights = block_weights(settings, model.count, tau_src, tau_dst)
      x = x + (t_dst - t_src) * model.block_velocity(x, time(tau_src), cond, weights)
    else:
      temperature = settings["temperature"] if i < nfe - 1 else 1.0
      walker = policy(settings, model.outputs(x, time(tau_src), cond), x, time(tau_src), temperature)
      if guidance > 1 and guidance_interval[0] <= t_src <= guidance_interval[1]:
        null = policy(settings, model.outputs(x, time(tau_src), model.null(cond)), x, time(tau_src))
        walker = Guided(walker, null, guidance)
      steps = 1 if what == "velocity" else max(round((tau_src - tau_dst) * settings["total_substeps"]), 1)
      for k in range(steps):
        here, there = (tau_src + (tau_dst - tau_src) * j / steps for j in (k, k + 1))
        x = x + column(time(there) - time(here), x) * walker(x, time(here))
    if h > 0:
      fresh = torch.randn(x.shape, generator=generator, device=x.device)
      x = (1 - t_next + t_next * m) * x + t_next * (1 - m * m) ** 0.5 * fresh
    if progress:
      progress(i + 1)
  return x
