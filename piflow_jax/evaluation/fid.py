"""FID and what is published beside it, of pictures that come in batches: sums first, figures of them at the end."""

from typing import NamedTuple

import jax
import numpy as np

from piflow_jax.evaluation import draws
from piflow_jax.evaluation import inception_score
from piflow_jax.evaluation import manifold
from piflow_jax.evaluation import references
from piflow_jax.evaluation import statistics

TITLES = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "inception_score_std": "IS std",
          "precision": "precision", "recall": "recall"}


class Sums:
  """What is kept of pictures: moments in float64, logits, and each one's features where neighbours are looked at.

  Attributes:
    pool, spatial: Statistics of FID's and of sFID's features.
  """

  def __init__(self, rows):
    """rows: whether each picture's features are kept, which precision and recall need (8 KB a picture)."""
    self.pool, self.spatial = statistics.Statistics(), statistics.Statistics()
    self._rows, self._parts = rows, []

  def update(self, index, features):
    """Take in pictures of numbers index [n] by what `inception_features.extractor` found of them."""
    pool, spatial = features["pool"], features["spatial"]
    self.pool.update(pool)
    self.spatial.update(spatial.reshape(len(spatial), -1))
    self._parts.append((np.array(index), features["logits"], pool if self._rows else None))

  def gather(self):
    """These sums with all that other processes took in; a call for all of them."""
    for other in draws.from_all(self)[1:]:
      self.pool.merge(other.pool)
      self.spatial.merge(other.spatial)
      self._parts += other._parts
    return self

  @property
  def logits(self):
    """[n, classes], in the order of the pictures' numbers."""
    return self._ordered(1)

  @property
  def rows(self):
    """[n, D] alike, or None."""
    return self._ordered(2) if self._rows else None

  def _ordered(self, which):
    order = np.argsort(np.concatenate([part[0] for part in self._parts]), kind="stable")
    return np.concatenate([part[which] for part in self._parts])[order]


class Figures(NamedTuple):
  """What a report says."""

  values: dict  # {"fid", "sfid", "inception_score", "inception_score_std", "precision", "recall": number or None}
  remarks: list  # what a reader should know, texts


def figures(sums, reference, protocol, reference_rows=None):
  """Figures of samples against a reference.

  Args:
    sums: Sums of the samples.
    reference: references.Reference, or None: the Inception score alone.
    protocol: protocol.Protocol.
    reference_rows: [m, D] features of real pictures, or None.
  Raises:
    ValueError: fewer than 2 samples, or fewer than parts of the Inception score.
  """
  count, remarks = sums.pool.count, []
  if count < 2:
    raise ValueError(f"samples: {count} of them; give 2 at least, 50,000 for a published figure")
  values = dict.fromkeys(TITLES)
  values["inception_score"], values["inception_score_std"] = inception_score.inception_score(
      sums.logits, block=protocol.block, splits=protocol.splits, permuted=protocol.permuted)
  if reference is None:
    return Figures(values, remarks)
  values["fid"] = statistics.frechet_distance(reference.pool, sums.pool)
  if not reference.counted:
    remarks.append(f"{reference.name} does not say of how many pictures it is; taken for ImageNet's "
                   f"{reference.pool.count:,}.")
  if reference.spatial is not None:
    values["sfid"] = statistics.frechet_distance(reference.spatial, sums.spatial)
  bias = statistics.frechet_bias(reference.pool, count, reference.pool.count)
  remarks.append(f"FID of {count:,} samples is about {bias:.2g} too large where the distributions are alike"
                 + (", and more so below 2,048 samples" if count < references.WIDTH else "")
                 + "; compare it only with one of as many.")
  if protocol.neighbours and reference_rows is not None and sums.rows is not None:
    if min(len(reference_rows), count) > 3:
      values["precision"], values["recall"] = manifold.precision_recall(
          reference_rows[:protocol.neighbours], sums.rows, half=protocol.half)
    if len(reference_rows) < protocol.neighbours:
      remarks.append(f"precision and recall are of {len(reference_rows):,} reference rows, not "
                     f"{protocol.neighbours:,}.")
  return Figures(values, remarks)


def take(batches, extract, rows, bar=None):
  """Sums of uint8 pictures [b, H, W, 3] that come batch by batch; each of several processes looks at every n-th batch.

  Args:
    batches: iterable of them.
    extract: of `inception_features.extractor`.
    rows: see Sums.
    bar: tqdm's, or None.
  """
  sums, done = Sums(rows), 0
  for number, images in enumerate(batches):
    if number % jax.process_count() == jax.process_index():
      sums.update(done + np.arange(len(images)), extract(images))
    done += len(images)
    if bar is not None:
      bar.update(len(images))
  return sums.gather()
