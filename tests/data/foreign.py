"""Others' caches of latents, written by their own definitions in a few lines."""

import json

import numpy as np

SHAPE = (4, 6, 5)  # C, H, W: channels come first


def moments(n, seed=0):
  """(means [n, C, H, W], log variances)."""
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((n, *SHAPE)).astype(np.float32) * 5,
          rng.uniform(-12, -1, (n, *SHAPE)).astype(np.float32))


def last(x):
  return np.moveaxis(x, 1, -1)


def repa(folder, mean, logvar, labels):
  """img-mean-std-*.npy of mean and deviation, dataset.json of names and labels."""
  folder.mkdir()
  names = [f"00000/img-mean-std-{i:08}.npy" for i in range(len(mean))]
  (folder / "00000").mkdir()
  for name, m, v in zip(names, mean, logvar):
    np.save(folder / name, np.concatenate([m, np.exp(v / 2)]))
  (folder / "dataset.json").write_text(json.dumps({"labels": [[n, int(label)] for n, label in zip(names, labels)]}))


def mar(folder, mean, logvar, labels):
  """CLASS/NAME.npz of moments and moments_flip; the flipped one is twice the first, to be told from it."""
  for i, (m, v, label) in enumerate(zip(mean, logvar, labels)):
    (folder / f"n{label:04}").mkdir(parents=True, exist_ok=True)
    both = np.concatenate([m, v])
    np.savez(folder / f"n{label:04}" / f"{i:03}.npz", moments=both, moments_flip=np.concatenate([2 * m, v]))
