"""Features for 8x8 digits, where Inception's would mean nothing: the last hidden layer of a small digit classifier."""

import dataclasses
import functools
import warnings

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax.evaluation import extract as extract_lib

HIDDEN = (128, 64)
_NOISE = 0.2
_COPIES = 2


def config(**fields):
  """A classifier of 8x8 digits, trained on the training records; it has no fields."""
  return config_lib.noun(make, dict(), fields)


def make(data):
  """Features of a classifier trained on all of `data`'s training records."""
  if data.spec.x_0 != (8, 8, 1):
    raise ValueError(f"make: digit_features are for pictures of 8 x 8 in grey, not {data.spec.x_0}; take "
                     "evaluation.classifier.config() or evaluation.pca.config()")
  images, labels = extract_lib.first_records(data, len(data.records("train")))
  if labels is None:
    raise ValueError("make: digit_features need labels, and nothing else that conditions")
  classifier = train(images, labels)
  return extract_lib.Features(
      functools.partial(features, classifier), functools.partial(predict, classifier), "a digit classifier")


@dataclasses.dataclass(frozen=True)
class DigitClassifier:
  """A trained ReLU network: its layers' kernels [in, out] and biases [out], and the label of each output."""
  kernels: tuple
  biases: tuple
  classes: np.ndarray


def _flat(images):
  images = np.asarray(images, np.float64)
  if images.shape[1:] != (8, 8, 1):
    raise ValueError(f"digits must be [n, 8, 8, 1], got {images.shape}")
  return images.reshape(len(images), -1)


def _augmented(images, rng):
  """The images and their shifts by a pixel, each with fresh Gaussian noise: samples to be judged are a bit off, too."""
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
  shifted = [padded[:, y:y + 8, x:x + 8] for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))]
  x = np.concatenate(shifted * _COPIES)
  return x + _NOISE * rng.standard_normal(x.shape), len(shifted) * _COPIES


def fit_network(images, labels, seed=0):
  """scikit-learn's fitted MLPClassifier behind `train`."""
  from sklearn import exceptions  # only those who use the digits need scikit-learn
  from sklearn import neural_network
  import threadpoolctl

  _flat(images)
  x, copies = _augmented(np.asarray(images, np.float64), np.random.default_rng(seed))
  network = neural_network.MLPClassifier(
      HIDDEN, batch_size=128, learning_rate_init=2e-3, alpha=1e-3, max_iter=20, random_state=seed)
  # Threads cost more than they save on matrices this small, forty times more where other programs hold the cores.
  with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
    # Twenty epochs are the plan, not a failure to converge.
    warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
    return network.fit(_flat(x), np.tile(np.asarray(labels), copies))


def train(images, labels, seed=0):
  """A DigitClassifier of images [n, 8, 8, 1] in [-1, 1] and labels [n], alike for one seed; raises ValueError."""
  network = fit_network(images, labels, seed)
  return DigitClassifier(tuple(network.coefs_), tuple(network.intercepts_), network.classes_)


def features(classifier, images):
  """[n, 64] float64 activations of the last hidden layer for images [n, 8, 8, 1]; raises ValueError for others."""
  x = _flat(images)
  for kernel, bias in zip(classifier.kernels[:-1], classifier.biases[:-1]):
    x = np.maximum(x @ kernel + bias, 0)
  return x


def predict(classifier, images):
  """[n] labels for images [n, 8, 8, 1]; raises ValueError for other shapes."""
  logits = features(classifier, images) @ classifier.kernels[-1] + classifier.biases[-1]
  return classifier.classes[np.argmax(logits, 1)]
