"""What samples are held against: statistics of real pictures from the files that people have, or made here.

  ADM's .npz        mu, sigma, mu_s, sigma_s (sFID's), arr_0 uint8 [10000, 256, 256, 3] (for precision and recall)
  MAR's .npz        mu, sigma: ADM's
  MeanFlow's .npz   ref_mu, ref_sigma
  LakonLab's .pkl   mean, cov, real_feats_np, num_real_feeded; read without running it
  ours, .npz        mu, sigma, count, and where they were made mu_s, sigma_s, rows
"""

import io
from typing import NamedTuple

from etils import epath
import numpy as np

from piflow_jax import pickles
from piflow_jax.evaluation import protocol
from piflow_jax.evaluation import samples_file
from piflow_jax.evaluation import statistics

WIDTH = 2048  # of pool_3


class Reference(NamedTuple):
  """Real pictures, as far as they are known."""

  name: str
  pool: statistics.Statistics
  spatial: statistics.Statistics | None = None
  rows: np.ndarray | None = None  # [m, 2048], features of single pictures
  pictures: epath.Path | None = None  # a file with arr_0, whose features are the rows
  counted: bool = True  # whether the file says of how many; else ImageNet's number of training images is assumed


def load(path, *, pool=WIDTH):
  """The Reference in a file, by what is in it.

  Args:
    path: .npz or .pkl, here or at gs://.
    pool: width of the features.
  Raises:
    ValueError: "path: ...": none of the forms above, or numbers that are no statistics of such features.
  """
  path = epath.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(f"path: {str(path)!r} is no file; give statistics of real pictures: docs/evaluation.md says whose")
  found = _of_pickle(path) if path.suffix in (".pkl", ".pickle") else _of_npz(path)
  if len(found.pool.mean) != pool:
    raise ValueError(f"path: {path} holds statistics of {len(found.pool.mean)} features, not Inception's {pool}")
  return found


def _of_npz(path):
  try:
    with path.open("rb") as file, np.load(file) as archive:
      names = set(archive.files)
      arrays = {name: archive[name] for name in names - {"arr_0", "mu_clip", "sigma_clip"}}
  except (OSError, ValueError, EOFError, KeyError) as e:  # np.load's, at what is no .npz or is a pickle
    raise ValueError(f"path: {path} cannot be read as .npz ({str(e)[:150]})") from e
  mean, covariance = next((pair for pair in (("mu", "sigma"), ("ref_mu", "ref_sigma")) if names >= set(pair)),
                          (None, None))
  if mean is None:
    raise ValueError(f"path: {path} holds {', '.join(sorted(names)) or 'nothing'}; a reference holds mu and sigma, or "
                     "ref_mu and ref_sigma")
  count, where = int(arrays.get("count", protocol.IMAGENET)), f"path: {path}"
  spatial = None
  if {"mu_s", "sigma_s"} <= names:
    spatial = statistics.from_moments(arrays["mu_s"], arrays["sigma_s"], count, where)
  rows = arrays.get("rows")
  return Reference(path.name, statistics.from_moments(arrays[mean], arrays[covariance], count, where), spatial,
                   None if rows is None else _rows(rows, path), path if "arr_0" in names else None, "count" in names)


def _of_pickle(path):
  tree = pickles.load(path)
  if not isinstance(tree, dict) or not {"mean", "cov"} <= tree.keys():
    raise ValueError(f"path: {path} holds no mean and cov; it is not LakonLab's reference")
  rows, count = tree.get("real_feats_np"), tree.get("num_real_feeded")
  counted = isinstance(count, (int, np.integer)) and count > 1
  pool = statistics.from_moments(
      tree["mean"], tree["cov"], count if counted else protocol.IMAGENET, f"path: {path}")
  return Reference(path.name, pool, None, None if rows is None else _rows(rows, path), None, counted)


def _rows(rows, path):
  rows = np.asarray(rows)
  if rows.ndim != 2 or rows.dtype.kind != "f" or not np.isfinite(rows).all():
    raise ValueError(f"path: {path} holds features {rows.dtype} {rows.shape}, not finite numbers [m, {WIDTH}]")
  return rows.astype(np.float32)


def rows_of(reference, extract, most, batch_size=256):
  """Features [m, D] of the reference's single pictures, m <= most; None where it has none."""
  if reference.rows is not None:
    return reference.rows[:most]
  if reference.pictures is None:
    return None
  found, count = [], 0
  for images in samples_file.batches(reference.pictures, batch_size):
    found.append(extract(images[:most - count])["pool"])
    count += len(found[-1])
    if count == most:
      break
  return np.concatenate(found)


def save(path, pool, spatial, rows):
  """Write statistics as a reference of ours; all of the file, or nothing."""
  path = epath.Path(path)
  arrays = dict(mu=pool.mean, sigma=pool.covariance, count=pool.count)
  if spatial is not None:
    arrays |= dict(mu_s=spatial.mean, sigma_s=spatial.covariance)
  if rows is not None:
    arrays |= dict(rows=np.asarray(rows, np.float32))
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(buffer.getvalue())
  partial.replace(path)
