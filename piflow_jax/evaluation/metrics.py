"""How far samples are from what they should be: the table of metrics, and numbers over arrays that know no models."""

from typing import NamedTuple

import numpy as np
from scipy.spatial import distance

LOWER, HIGHER, TEACHERS, FASTER = "lower", "higher", "teachers", "faster"


class Metric(NamedTuple):
  """A column of the reports.

  Attributes:
    heading: of the column.
    better: LOWER, HIGHER, TEACHERS (as near as can be to the many-step teacher's) or FASTER (lower; a tie is nobody's).
    decimals: at least so many.
    description: of what is measured, for the reader of a report.
    title: over a panel of a figure; "" for none.
    needs: what there has to be: "features", "labels" (a classifier, and labels to draw by), "conditions" (which are
      each record's own, a text's say, and records that differ), "texts" (which features can score), "teacher" (or
      another model's samples of the same noises), "pixels" (few enough for a covariance), "clock" or "training".
  """

  heading: str
  better: str
  decimals: int
  description: str
  title: str = ""
  needs: tuple = ()


METRICS = {
    "frechet": Metric(
        "Fréchet", LOWER, 2, "Fréchet distance of features to those of held-out data",
        "Fréchet to held-out data, features", ("features",)),
    "frechet_to_teacher": Metric(
        "Fréchet to teacher", LOWER, 2, "the same to fresh samples of the many-step teacher",
        "Fréchet to the teacher, features", ("features", "teacher")),
    "pixel_frechet": Metric(
        "pixel Fréchet", LOWER, 2, "Fréchet distance of pixels to those of held-out data",
        "Fréchet to held-out data, pixels", ("pixels",)),
    "pixel_frechet_to_teacher": Metric(
        "pixel Fréchet to teacher", LOWER, 2, "that of pixels to fresh samples of the many-step teacher",
        "Fréchet to the teacher, pixels", ("pixels", "teacher")),
    "precision": Metric(
        "precision", HIGHER, 3, "share of samples that lie among held-out ones", needs=("features",)),
    "recall": Metric(
        "recall", HIGHER, 3, "share of held-out samples that lie among generated ones", needs=("features",)),
    "accuracy": Metric(
        "accuracy", HIGHER, 3, "share of samples that a classifier reads as the class asked for",
        "Accuracy of the conditioned class", ("features", "labels")),
    "diversity": Metric(
        "diversity", TEACHERS, 3,
        "mean rms difference of two samples of one class, or of one text; the many-step teacher's is the goal",
        "Diversity within a class"),
    "endpoint_error": Metric(
        "endpoint error", LOWER, 3,
        "rms distance from the many-step teacher's sample of the same noise; 1 = unrelated samples", "Endpoint error",
        ("teacher",)),
    "seconds_per_step": Metric("s / step", FASTER, 2, "seconds a training step", needs=("training",)),
    "seconds_per_1000": Metric("s / 1000", FASTER, 2, "seconds for 1000 samples", needs=("clock",)),
    "agreement": Metric(
        "agreement", HIGHER, 3,
        "share of samples of which the held-out record that they were drawn by is among the 5 nearest, by features",
        "Agreement with the condition", ("features", "conditions")),
    "clip_score": Metric(
        "CLIP score", HIGHER, 2, "mean of 100 times the cosine between a sample's and its text's embeddings",
        "CLIP score", ("features", "texts")),
}
_ARROWS = {LOWER: " ↓", HIGHER: " ↑"}
_NOTES = {LOWER: "lower is better", HIGHER: "higher is better"}


def heading(key):
  """The column's heading with an arrow to what is better."""
  return METRICS[key].heading + _ARROWS.get(METRICS[key].better, "")


def note(key):
  """The column's description, and what is better."""
  better = _NOTES.get(METRICS[key].better)
  return METRICS[key].description + (f"; {better}" if better else "")


def over_seeds(values):
  """(mean, sample standard deviation) of the values that are finite; None where there are too few of them."""
  known = np.array([value for value in values if value is not None and np.isfinite(value)], np.float64)
  return (float(known.mean()) if len(known) else None, float(known.std(ddof=1)) if len(known) > 1 else None)


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


def agreeing(points, records, own, k, *, block=512):
  """How many points lie so near to their own record that fewer than k others are nearer (R-precision's kin).

  Args:
    points: [n, D] features of samples.
    records: [m, D], of real ones.
    own: [n] rows of `records`; those beyond m agree with none.
    k: see above. By chance k of m points agree.
    block: points that are looked at together.
  """
  points, records = _feature_sets(points, records, least=1)
  found, known = 0, own < len(records)
  for rows, d2, slack in _blocks(points, records, block):
    mine = np.take_along_axis(d2, np.where(known, own, 0)[rows, None], 1)
    found += int(np.sum(((d2 < mine - slack).sum(1) < k) & known[rows]))
  return found


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


class Spread:
  """Count, mean and sum of squares of samples by class, gathered batch by batch: all that unrelated pairs need."""

  def __init__(self):
    self._classes = {}

  def update(self, samples, labels):
    """Take in samples [n, ...] of labels [n]; returns self."""
    samples, labels = np.asarray(samples, np.float64), np.asarray(labels)
    if labels.shape != samples.shape[:1]:
      raise ValueError(f"labels must be one a sample, got {labels.shape} for samples {samples.shape}")
    flat = samples.reshape(len(samples), -1)
    for label in np.unique(labels):
      x = flat[labels == label]
      mean = x.mean(0)
      self._take(int(label), len(x), mean, float(np.sum((x - mean) ** 2)))
    return self

  def merge(self, other):
    """Take in what another has gathered; returns self."""
    for label, part in other._classes.items():
      self._take(label, *part)
    return self

  def _take(self, label, count, mean, squares):
    n, old, sum_ = self._classes.get(label, (0, mean, 0.0))
    way = mean - old
    total = n + count
    self._classes[label] = total, old + way * (count / total), sum_ + squares + float(way @ way) * n * count / total

  def unrelated(self):
    """{label: n E|x_i - x_j|^2 = 2 n var(x)} of the classes that have two samples or more."""
    return {label: 2 * n * squares / (n - 1) for label, (n, _, squares) in self._classes.items() if n > 1}


def squared_errors(endpoints, reference, labels):
  """{label: sum over its samples of |endpoints - reference|^2}; raises ValueError where shapes clash."""
  if np.shape(endpoints) != np.shape(reference):
    raise ValueError(f"endpoints {np.shape(endpoints)} and reference {np.shape(reference)} must have one shape")
  difference = (np.asarray(endpoints, np.float64) - np.asarray(reference, np.float64)).reshape(len(endpoints), -1)
  squares = np.sum(difference**2, 1)
  return {int(label): float(squares[np.asarray(labels) == label].sum()) for label in np.unique(labels)}


def relative_error(errors, spread):
  """`endpoint_error` of what `squared_errors` and a Spread of the reference have gathered."""
  unrelated = spread.unrelated()
  if not unrelated:
    raise ValueError("no class has two samples, so there is no pair to compare")
  if not sum(unrelated.values()):
    raise ValueError("the reference samples of each class are all the same: there is no spread to compare with")
  return float((sum(errors[label] for label in unrelated) / sum(unrelated.values())) ** 0.5)


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
  return relative_error(squared_errors(endpoints, reference, labels), Spread().update(reference, labels))


def accuracy(predicted, labels):
  """Share of predicted [n] that equals labels [n]; raises ValueError for other shapes or n = 0."""
  predicted, labels = np.asarray(predicted), np.asarray(labels)
  if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
    raise ValueError(f"predicted {predicted.shape} and labels {labels.shape} must both be [n], n > 0")
  return float(np.mean(predicted == labels))
