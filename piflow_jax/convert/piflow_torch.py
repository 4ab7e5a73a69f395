"""Sample a pi-Flow student (GM, DX, parallel decoding) or a teacher (with guidance, if you like) with PyTorch alone.

  python piflow_torch.py --labels=0,1,2,3 --out=samples.pt [--noise=noise.pt] [--nfe=1] [--device=cuda]

run in the folder that `python -m piflow_jax.convert to-torch` made, or with --model=FOLDER. From Python, there:

  model = piflow_torch.load(folder)
  x_0 = piflow_torch.sample(model, noise, labels)  # noise [B, C, H, W] standard normal, labels [B]

(a teacher takes guidance=2, say).

It needs torch, safetensors and the two files beside it: piflow_policy.py (policies and sampler, for any network) and
piflow_dit.py (the network). Nothing of piflow_jax.
"""

import argparse
import os

import piflow_dit
from piflow_policy import read
from piflow_policy import sample
import torch


def load(folder, device="cpu", dtype=None):
  """The model of a folder with config.json and safetensors, its weights in `dtype` (default: as stored)."""
  config, state = read(folder)
  if config.get("piflow_jax", {}).get("naming") != "release":
    raise ValueError(f"{folder}: not an export of piflow_jax in pi-Flow's naming")
  with torch.device("meta"):
    model = piflow_dit.DiT(config)
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
  classes = model.classes
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
