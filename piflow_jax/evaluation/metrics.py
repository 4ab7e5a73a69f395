"""How far samples are from what they should be: numbers over arrays, which know neither models nor data sets."""

import numpy as np
from scipy.spatial import distance


def _feature_sets(*sets, least):
  """The sets as float64 [n, D]; raises ValueError unless they are finite, of one D, with at least `least` rows each."""
  sets = [np.asarray(s, np.float64) for s in sets]
  shapes = ", ".join(str(s.shape) for s in sets)
  if any(s.ndim != 2 for s in sets) or len({s.shape[1] for s in sets}) > 1:
    raise ValueError(f"features must be [n, D] arrays of one D, got {shapes}")
  if min(len(s) for s in sets) < least:
    raise ValueError(f"features need at least {least} samples a set, got {shapes}")
  if not all(np.isfinite(s).all() for s in sets):
    raise ValueError("features hold values that are not finite; did the sampler diverge?")
  return sets


def frechet_distance(features_a, features_b):
  """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), the squared distance of two Gaussians (arXiv 1706.08500, eq. 6).

  Args:
    features_a, features_b: [n, D] and [m, D]; any n and m from 2, also fewer than D.
  Returns:
    float >= 0, with unbiased covariances S.
  Raises:
    ValueError: shapes clash, fewer than 2 samples, or values that are not finite.
  """
  a, b = _feature_sets(features_a, features_b, least=2)
  mean_a, mean_b = a.mean(0), b.mean(0)
  # S = R^T R, so tr (S_a S_b)^1/2 is the sum of the singular values of R_a R_b^T. No root of a covariance is taken:
  # where a covariance is singular, a root would turn rounding errors of 1e-16 into 1e-8.
  root_a = np.linalg.qr(a - mean_a, mode="r") / (len(a) - 1) ** 0.5
  root_b = np.linalg.qr(b - mean_b, mode="r") / (len(b) - 1) ** 0.5
  cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
  return max(float(np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross), 0.0)


def _blocks(a, b, block):
  """(slice of a's rows, their squared distances to b [block, m], the rounding error of these [block, m])."""
  norm_a, norm_b = np.sum(a**2, 1), np.sum(b**2, 1)
  for start in range(0, len(a), block):
    rows = slice(start, start + block)
    size = norm_a[rows, None] + norm_b
    yield rows, size - 2 * a[rows] @ b.T, 1e-12 * size


def _radii(x, k, block):
  """Squared distance of each row to its k-th nearest other row, [n]."""
  radii = np.empty(len(x))
  for rows, d2, _ in _blocks(x, x, block):
    d2[np.arange(len(d2)), np.arange(len(x))[rows]] = np.inf
    radii[rows] = np.partition(d2, k - 1, axis=1)[:, k - 1]
  return radii


def _share_covered(points, centres, radii, block):
  covered = [(d2 <= radii + slack).any(1) for _, d2, slack in _blocks(points, centres, block)]
  return float(np.concatenate(covered).mean())


def precision_recall(real, generated, k=3, *, block=512):
  """Shares of generated samples on the real manifold and of real ones on the generated (arXiv 1904.06991, eq. 1-2).

  A manifold is the union of balls around its samples, each out to the sample's k-th nearest neighbour.

  Args:
    real, generated: [n, D] and [m, D] features.
    k: the neighbour that sets a ball's radius.
    block: rows of distances held at once; it does not change the result.
  Returns:
    (precision, recall), floats in [0, 1].
  Raises:
    ValueError: k < 1, shapes clash, fewer than k + 1 samples, or values that are not finite.
  """
  if k < 1:
    raise ValueError(f"k must be at least 1, got {k}")
  real, generated = _feature_sets(real, generated, least=k + 1)
  # Squared distances come from norms and inner products, which lose digits far from the origin.
  real, generated = real - real.mean(0), generated - real.mean(0)
  precision = _share_covered(generated, real, _radii(real, k, block), block)
  return precision, _share_covered(real, generated, _radii(generated, k, block), block)


def _by_class(samples, labels):
  """[n_c, values a sample] arrays, one for each class that has two samples or more."""
  samples, labels = np.asarray(samples, np.float64), np.asarray(labels)
  if labels.shape != samples.shape[:1]:
    raise ValueError(f"labels must be one a sample, got {labels.shape} for samples {samples.shape}")
  flat = samples.reshape(len(samples), -1)
  classes = [flat[labels == c] for c in np.unique(labels)]
  classes = [x for x in classes if len(x) > 1]
  if not classes:
    raise ValueError("no class has two samples, so there is no pair to compare")
  return classes


def class_diversity(samples, labels):
  """Mean over classes of the mean over a class's pairs of |x_i - x_j| / sqrt(values a sample), a pair's rms difference.

  Args:
    samples: [n, ...].
    labels: [n]; a class with one sample has no pair and is left out.
  Returns:
    float, in the samples' unit.
  Raises:
    ValueError: shapes clash, or no class has two samples.
  """
  return float(np.mean([distance.pdist(x).mean() / x.shape[1] ** 0.5 for x in _by_class(samples, labels)]))


def endpoint_error(endpoints, reference, labels):
  """Rms of endpoints - reference over the rms difference of unrelated reference samples: 0 exact, about 1 unrelated.

  Unrelated: each sample against every other one of its class, E|x_i - x_j|^2 = 2 var(x), the mean taken over samples.

  Args:
    endpoints: [n, ...] where a model ends.
    reference: [n, ...] where the reference ends from the same noise and condition.
    labels: [n]; a class with one sample has no unrelated pair and is left out.
  Returns:
    float.
  Raises:
    ValueError: shapes clash, no class has two samples, or the reference samples of each class are all the same.
  """
  if np.shape(endpoints) != np.shape(reference):
    raise ValueError(f"endpoints {np.shape(endpoints)} and reference {np.shape(reference)} must have one shape")
  differences = _by_class(np.asarray(endpoints, np.float64) - np.asarray(reference, np.float64), labels)
  error = sum(np.sum(x**2) for x in differences)
  unrelated = sum(2 * len(x) * np.sum(np.var(x, axis=0, ddof=1)) for x in _by_class(reference, labels))
  if unrelated == 0:
    raise ValueError("the reference samples of each class are all the same: there is no spread to compare with")
  return float((error / unrelated) ** 0.5)


def accuracy(predicted, labels):
  """Share of predicted [n] that equals labels [n]; raises ValueError for other shapes or n = 0."""
  predicted, labels = np.asarray(predicted), np.asarray(labels)
  if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
    raise ValueError(f"predicted {predicted.shape} and labels {labels.shape} must both be [n], n > 0")
  return float(np.mean(predicted == labels))
