"""Count, mean and covariance of features, gathered batch by batch in float64, and distances between such Gaussians."""

import io

from etils import epath
import numpy as np

EPS = np.finfo(np.float64).eps


class Statistics:
  """Moments of features that come in batches, in any split and order.

  Rows are held relative to the first batch's mean (`shift`), so that features far from the origin keep their digits: a
  variance of 1 around 1e8 has none left in a plain sum of squares.

  Attributes:
    count: rows so far.
    mean: [D].
    covariance: [D, D], unbiased.
    rows: [k, D], the first `keep` rows.
  """

  def __init__(self, keep=0):
    """keep: rows to keep, which precision and recall need."""
    self.count = 0
    self._keep, self._kept = keep, []
    self._shift = self._offset = self._scatter = self._root = None

  def update(self, features):
    """Take in features [n, D]; returns self. Raises ValueError for another D, or for values that are not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
      raise ValueError(f"features: must be [n, D], got {features.shape}")
    if not len(features):
      return self
    if not np.isfinite(features).all():
      raise ValueError("features: hold values that are not finite; did the sampler diverge?")
    part = Statistics()
    part.count, part._shift = len(features), features.mean(0) if self._shift is None else self._shift
    self._check_width(features.shape[1])
    centred = features - part._shift
    part._offset = centred.mean(0)
    centred -= part._offset
    part._scatter = centred.T @ centred
    part._kept = [features]
    return self.merge(part)

  def merge(self, other):
    """Take in what another has gathered; returns self."""
    if not other.count:
      return self
    self._root = None
    if not self.count:
      self._shift, self._offset, self._scatter = other._shift, other._offset.copy(), other._scatter.copy()
      self.count = other.count
    else:
      self._check_width(len(other._shift))
      # Chan, Golub, LeVeque 1979: sums of squares around two means, and the square of the way between these.
      total = self.count + other.count
      way = other._relative_to(self._shift) - self._offset
      self._scatter += other._scatter + np.outer(way, way) * (self.count * other.count / total)
      self._offset = self._offset + way * (other.count / total)
      self.count = total
    for rows in other._kept:
      room = self._keep - sum(map(len, self._kept))
      if room > 0:
        self._kept.append(rows[:room].copy())
    return self

  def _relative_to(self, shift):
    return (self._shift - shift) + self._offset

  def _check_width(self, width):
    if self._shift is not None and len(self._shift) != width:
      raise ValueError(f"features: {width} values a row, others have {len(self._shift)}")

  @property
  def mean(self):
    return self._shift + self._offset

  @property
  def covariance(self):
    return self._scatter / max(self.count - 1, 1)

  @property
  def rows(self):
    return np.concatenate(self._kept) if self._kept else np.zeros((0, 0))

  def root(self):
    """R with R^T R = covariance, [rank, D], computed once."""
    if self._root is None:
      self._root = _root(self.covariance)
    return self._root

  def save(self, path):
    """Write mu, sigma (unbiased) and count to an npz file, as FID's references are; kept rows too, as `rows`."""
    buffer = io.BytesIO()
    kept = {"rows": self.rows} if self._kept else {}
    np.savez(buffer, mu=self.mean, sigma=self.covariance, count=self.count, **kept)
    epath.Path(path).write_bytes(buffer.getvalue())

  @classmethod
  def load(cls, path, count=None):
    """Of an npz file with mu, sigma and count; or, where it has none, with the count that is given.

    Raises:
      ValueError: the file has no such arrays, or other shapes.
    """
    with np.load(io.BytesIO(epath.Path(path).read_bytes())) as file:
      found = {name: file[name] for name in file.files}
    count = found.get("count", count)
    if not {"mu", "sigma"} <= found.keys() or count is None:
      raise ValueError(f"path: {path} holds {', '.join(sorted(found)) or 'nothing'}; it must hold mu, sigma and count")
    self = from_moments(found["mu"], found["sigma"], count, f"path: {path}")
    if "rows" in found:
      self._kept, self._keep = [found["rows"]], len(found["rows"])
    return self


def from_moments(mean, covariance, count, where="mean"):
  """Statistics of a mean [D] and an unbiased covariance [D, D] of `count` rows, in any types of numbers.

  Raises:
    ValueError: `where` they are from, and: shapes that differ, values that are not finite, no covariance.
  """
  mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
  if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
    raise ValueError(f"{where} holds mu {mean.shape} and sigma {covariance.shape}, not [D] and [D, D]")
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise ValueError(f"{where} holds values that are not finite")
  # Statistics are kept in float32 by some, whose rounding is not symmetric, nor are small eigenvalues above 0 by it.
  largest = max(np.abs(np.diag(covariance)).max(), np.finfo(np.float64).tiny)
  if np.abs(covariance - covariance.T).max() > 1e-4 * largest or np.diag(covariance).min() < -1e-4 * largest:
    raise ValueError(f"{where} holds a sigma that is no covariance: it is not symmetric, or a variance is negative")
  self = Statistics()
  self.count, self._shift, self._offset = int(count), mean, np.zeros_like(mean)
  self._scatter = (covariance + covariance.T) / 2 * max(self.count - 1, 1)
  return self


def of(features, keep=0):
  """Statistics of features [n, D]."""
  return Statistics(keep).update(features)


def _root(covariance):
  """R with R^T R = covariance, without the directions in which it is singular, up to rounding.

  Left in, their eigenvalues, 1e-16 of the largest instead of 0, would have roots of 1e-8.
  """
  values, vectors = np.linalg.eigh(covariance)
  kept = values > len(values) * EPS * values.max()
  return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def frechet_distance(a, b):
  """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), the squared distance of two Gaussians (arXiv 1706.08500, eq. 6).

  Args:
    a, b: Statistics of two rows or more; fewer than D are enough.
  Returns:
    float >= 0, with unbiased covariances S.
  Raises:
    ValueError: feature widths differ, or there are fewer than 2 rows.
  """
  if min(a.count, b.count) < 2:
    raise ValueError(f"features: need at least 2 samples a set, got {a.count} and {b.count}")
  a._check_width(len(b._shift))
  # With S = R^T R, tr (S_a S_b)^1/2 is the sum of the singular values of R_a R_b^T.
  cross = np.linalg.svd(a.root() @ b.root().T, compute_uv=False).sum()
  means = np.sum((b._relative_to(a._shift) - a._offset) ** 2)
  return max(float(means + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross), 0.0)


def frechet_bias(reference, n, m):
  """Expected Fréchet distance of n and m samples of one and the same Gaussian, of the reference's covariance.

  To second order in the deviations of the sample means and covariances, so low where n is not far above D. With
  eigenvalues v_i of the covariance: (1/n + 1/m) (sum_i v_i + 1/2 (sum_i v_i + sum_{i != j} v_i v_j / (v_i + v_j))).
  """
  v = np.maximum(np.linalg.eigvalsh(reference.covariance), 0)
  v = v[v > len(v) * EPS * v.max()]
  # The sum over all pairs has v_i / 2 of each i = j.
  pairs = np.sum(v[:, None] * v / (v[:, None] + v)) + v.sum() / 2
  return float((1 / n + 1 / m) * (v.sum() + pairs / 2))
