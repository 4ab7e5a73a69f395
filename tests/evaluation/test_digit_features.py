"""The digit classifier: good enough to judge by, the same each time, and scikit-learn's own forward pass."""

import numpy as np
import pytest

from piflow_jax.data import digits
from piflow_jax.evaluation import digit_features
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import statistics


@pytest.fixture(scope="module")
def classifier():
  return digit_features.train(*digits.arrays("train"))


def test_held_out_accuracy(classifier):
  images, labels = digits.arrays("held_out")
  assert metrics.accuracy(digit_features.predict(classifier, images), labels) >= 0.97
  noisy = images + 0.2 * np.random.default_rng(0).standard_normal(images.shape)
  assert metrics.accuracy(digit_features.predict(classifier, noisy), labels) >= 0.95


def test_training_twice_gives_the_same(classifier):
  again = digit_features.train(*digits.arrays("train"))
  for a, b in zip(classifier.kernels + classifier.biases, again.kernels + again.biases, strict=True):
    np.testing.assert_array_equal(a, b)


def test_features_are_finite_and_tell_classes_apart(classifier):
  images, labels = digits.arrays("held_out")
  features = digit_features.features(classifier, images)
  assert features.shape == (len(images), 64) and features.dtype == np.float64
  assert np.isfinite(features).all() and features.min() >= 0
  same, other = features[labels == 3], features[labels == 1]
  half = len(same) // 2
  first, second, others = (statistics.of(rows) for rows in (same[:half], same[half:], other))
  assert statistics.frechet_distance(first, others) > 3 * statistics.frechet_distance(first, second)


def test_forward_pass_is_scikit_learns():
  images, labels = digits.arrays("held_out")
  labels = labels * 3 + 1  # labels that are not their own positions
  network = digit_features.fit_network(images, labels, seed=1)
  classifier = digit_features.train(images, labels, seed=1)
  x = np.random.default_rng(0).uniform(-1, 1, (200, 8, 8, 1))
  np.testing.assert_array_equal(digit_features.predict(classifier, x), network.predict(x.reshape(200, -1)))
  logits = digit_features.features(classifier, x) @ classifier.kernels[-1] + classifier.biases[-1]
  probabilities = np.exp(logits - logits.max(1, keepdims=True))
  probabilities /= probabilities.sum(1, keepdims=True)
  np.testing.assert_allclose(probabilities, network.predict_proba(x.reshape(200, -1)), atol=1e-10)


def test_other_shapes_are_refused(classifier):
  with pytest.raises(ValueError, match="8, 8, 1"):
    digit_features.features(classifier, np.zeros((2, 8, 8)))
