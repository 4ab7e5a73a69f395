"""The numbers of an evaluation against closed forms and second, slower derivations."""

import itertools

import numpy as np
import pytest
import scipy.spatial

from piflow_jax.evaluation import metrics


def _brute_precision_recall(real, generated, k):
  def covered(points, centres):
    share = 0
    for p in points:
      inside = False
      for i, c in enumerate(centres):
        others = sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)
        inside |= bool(np.linalg.norm(p - c) <= others[k - 1])
      share += inside / len(points)
    return share

  return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_brute_force(k):
  rng = np.random.default_rng(3)
  real, generated = rng.standard_normal((40, 3)), 1.3 * rng.standard_normal((30, 3)) + 1.2
  expected = _brute_precision_recall(real, generated, k)
  assert 0.05 < min(expected) and max(expected) < 0.95
  np.testing.assert_allclose(metrics.precision_recall(real, generated, k), expected, rtol=1e-12)


def test_precision_recall_of_identical_disjoint_and_mode_dropped_sets():
  rng = np.random.default_rng(4)
  real = rng.standard_normal((200, 4))
  real[100:] += 50
  assert metrics.precision_recall(real, real) == (1, 1)
  assert metrics.precision_recall(real, real + 500) == (0, 0)
  precision, recall = metrics.precision_recall(real, real[:100] + 0.01)
  assert precision > 0.98 and 0.45 < recall <= 0.5


def test_repeated_samples_cover_their_like():
  """Radii are 0, and distances from inner products are not quite: the more so, the farther from the origin."""
  once = np.random.default_rng(10).standard_normal((20, 300)) + 1e3
  five, four = once.repeat(5, axis=0), once.repeat(4, axis=0)
  for block in (3, 512):
    assert metrics.precision_recall(five, four, block=block) == (1, 1)
    assert metrics.precision_recall(five, four + 1e-2, block=block) == (0, 0)


def test_precision_and_recall_do_not_depend_on_the_origin():
  rng = np.random.default_rng(11)
  real, generated = rng.standard_normal((60, 5)), 1.4 * rng.standard_normal((50, 5))
  near = metrics.precision_recall(real, generated)
  assert 0 < near[0] < 1
  assert metrics.precision_recall(real + 1e6, generated + 1e6) == near


def test_rounding_errors_of_distances_are_within_their_bound():
  x = np.random.default_rng(12).standard_normal((50, 300)) + 10
  exact = scipy.spatial.distance.cdist(x, x, "sqeuclidean")
  for rows, d2, slack in metrics._blocks(x, x, 20):
    assert (abs(d2 - exact[rows]) <= slack).all() and slack.max() < 1e-6


def test_blocks_do_not_change_precision_and_recall():
  rng = np.random.default_rng(5)
  real, generated = rng.standard_normal((101, 6)), 1.5 * rng.standard_normal((83, 6))
  whole = metrics.precision_recall(real, generated, block=1000)
  assert 0 < whole[0] < 1
  for block in (1, 7, 83):
    assert metrics.precision_recall(real, generated, block=block) == whole


def test_class_diversity_is_the_mean_of_pair_distances():
  rng = np.random.default_rng(6)
  x, labels = rng.standard_normal((9, 2, 3, 1)), np.array([4, 0, 4, 0, 0, 4, 4, 7, 0])
  x[labels == 4] *= 5
  classes = [[np.sqrt(np.mean((x[i] - x[j]) ** 2)) for i, j in itertools.combinations(np.flatnonzero(labels == c), 2)]
             for c in (0, 4)]
  np.testing.assert_allclose(metrics.class_diversity(x, labels), np.mean([np.mean(c) for c in classes]), rtol=1e-12)


def test_endpoint_error_against_brute_force():
  rng = np.random.default_rng(7)
  reference, labels = rng.standard_normal((9, 2, 2, 1)), np.array([4, 0, 4, 0, 0, 4, 4, 7, 0])
  reference[labels == 4] *= 5
  endpoints = reference + 0.3 * rng.standard_normal(reference.shape)
  error, unrelated = [], []
  for i in np.flatnonzero(labels != 7):
    error.append(np.mean((endpoints[i] - reference[i]) ** 2))
    others = [j for j in np.flatnonzero(labels == labels[i]) if j != i]
    unrelated.append(np.mean([np.mean((reference[i] - reference[j]) ** 2) for j in others]))
  expected = np.sqrt(np.mean(error) / np.mean(unrelated))
  np.testing.assert_allclose(metrics.endpoint_error(endpoints, reference, labels), expected, rtol=1e-12)
  assert metrics.endpoint_error(reference, reference, labels) == 0


def test_endpoint_error_of_batches_and_processes_is_that_of_the_whole():
  rng = np.random.default_rng(13)
  reference, labels = 100 + rng.standard_normal((60, 4, 4, 1)), rng.integers(0, 7, 60)
  labels[0] = 9  # alone
  endpoints = reference + 0.3 * rng.standard_normal(reference.shape)
  for cuts in ([], [1, 2, 30], range(1, 60)):
    parts = np.split(np.arange(60), cuts)
    errors, first, second = {}, metrics.Spread(), metrics.Spread()
    for i, part in enumerate(parts):
      for label, error in metrics.squared_errors(endpoints[part], reference[part], labels[part]).items():
        errors[label] = errors.get(label, 0) + error
      (first, second)[i % 2].update(reference[part], labels[part])
    found = metrics.relative_error(errors, first.merge(second))
    np.testing.assert_allclose(found, metrics.endpoint_error(endpoints, reference, labels), rtol=1e-12)


def test_endpoint_error_of_unrelated_samples_is_one():
  rng = np.random.default_rng(8)
  labels = np.repeat([0, 1, 2], [4000, 1000, 300])  # uneven classes of uneven spread
  draw = lambda: (1 + 3.0 * labels[:, None]) * rng.standard_normal((len(labels), 8)) + 100 * labels[:, None]
  np.testing.assert_allclose(metrics.endpoint_error(draw(), draw(), labels), 1, atol=0.03)


def test_points_agree_with_their_record_where_few_others_are_nearer():
  records = np.array([[0.0], [1.0], [2.0], [3.0], [3.0]])
  points, own = np.array([[0.1], [0.1], [2.9], [2.9], [0.0]]), np.array([0, 1, 3, 2, 9])
  # Others nearer than their own: 0, 1, 0 (its twin is as near), 2; the last one's own is not there.
  assert [metrics.agreeing(points, records, own, k) for k in (1, 2, 3)] == [2, 3, 4]
  assert metrics.agreeing(points, records, own, 1, block=2) == 2


def test_accuracy():
  assert metrics.accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75


def test_the_table_says_of_every_metric_what_is_better():
  for key, metric in metrics.METRICS.items():
    assert metric.better in (metrics.LOWER, metrics.HIGHER, metrics.TEACHERS, metrics.FASTER)
    assert metric.heading and metric.description and metric.decimals >= 2
    assert set(metric.needs) <= {"features", "labels", "conditions", "texts", "teacher", "pixels", "clock", "training"}
    arrows = [arrow in metrics.heading(key) for arrow in "↓↑"]
    assert arrows == [metric.better == better for better in ("lower", "higher")]
  assert metrics.note("accuracy").endswith("; higher is better") and "better" not in metrics.note("diversity")


def test_means_over_seeds_leave_out_what_was_not_measured():
  assert metrics.over_seeds([2.0, 3.0, 4.0]) == (3.0, 1.0)
  assert metrics.over_seeds([2.0, None, float("nan"), 4.0]) == (3.0, pytest.approx(2**0.5))
  assert metrics.over_seeds([None, 2.0]) == (2.0, None)
  assert metrics.over_seeds([float("inf"), None]) == metrics.over_seeds([]) == (None, None)


_X, _Y = np.random.default_rng(9).standard_normal((8, 3)), np.repeat([0, 1], 4)


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.precision_recall(_X, _X[:, :2]), "one D"),
    (lambda: metrics.precision_recall(_X[:, 0], _X), "one D"),
    (lambda: metrics.precision_recall(_X, np.where(_X > 1, np.nan, _X)), "finite"),
    (lambda: metrics.precision_recall(_X, _X[:3]), "at least 4"),
    (lambda: metrics.precision_recall(_X, _X, k=0), "k must"),
    (lambda: metrics.class_diversity(_X, _Y[:3]), "one a sample"),
    (lambda: metrics.class_diversity(_X, np.arange(8)), "no class"),
    (lambda: metrics.endpoint_error(_X, _X[:4], _Y), "one shape"),
    (lambda: metrics.endpoint_error(_X, np.ones_like(_X), _Y), "no spread"),
    (lambda: metrics.accuracy(_Y, _Y[:3]), "must both be"),
    (lambda: metrics.accuracy([], []), "must both be"),
])
def test_bad_input_is_refused_in_one_line(call, message):
  with pytest.raises(ValueError, match=message) as error:
    call()
  assert "\n" not in str(error.value)
