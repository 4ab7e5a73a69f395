"""Features for any data: principal components against NumPy's, a classifier that learns, shapes of every rank."""

import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax.data import digits
from piflow_jax.data import gaussians
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import classifier
from piflow_jax.evaluation import digit_features
from piflow_jax.evaluation import extract
from piflow_jax.evaluation import features
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import pca


def _made(noun, data):
  return noun.make(data, **config_lib.fields_of(noun))


def _data(x_0, cond=None, held_out=None):
  """Data of arrays x_0 [n, *shape] with labels or other conditions [n, ...]."""
  conds = [{} if cond is None else {"label": c} for c in (range(len(x_0)) if cond is None else cond)]
  records = [{"x_0": x, "cond": c} for x, c in zip(x_0.astype(np.float32), conds)]
  labels = {} if cond is None else spec_lib.label(int(np.max(cond)) + 1)
  return spec_lib.Data(spec_lib.Spec(x_0.shape[1:], labels, bounds=(-1e9, 1e9)), lambda split: records)


@pytest.mark.parametrize("n, width", [(50, 8), (8, 50)])
def test_principal_components_against_a_singular_value_decomposition(n, width):
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((n, width)) * np.linspace(3, 0.1, width) + 5
  mean, directions = pca.fit(rows, 5)
  np.testing.assert_allclose(mean, rows.mean(0))
  expected = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:5]
  np.testing.assert_allclose(np.abs(np.sum(directions * expected, 1)), 1, rtol=1e-9)
  np.testing.assert_allclose(directions @ directions.T, np.eye(5), atol=1e-9)
  assert (directions[np.arange(5), np.abs(directions).argmax(1)] > 0).all()
  # No more than there are.
  assert len(pca.fit(rows, 100)[1]) == min(n - 1, width)


def test_features_of_points_are_their_coordinates_turned():
  x = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
  found = _made(pca.config(), _data(x))
  assert found.predict is None and found.name == "3 principal components"
  got = found.extract(x)
  assert got.shape == (40, 3) and got.dtype == np.float64
  distances = [np.linalg.norm(a[:, None] - a, axis=-1) for a in (got, x.astype(np.float64))]
  np.testing.assert_allclose(*distances, atol=1e-6)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_shrinking_averages_what_lies_under_a_pixel(size):
  x = np.random.default_rng(2).standard_normal((2, 8, 6, 3))
  got = extract.shrunk(x, size)
  rows, columns = min(size, 8), min(size, 6)
  # Each pixel repeated so often that both grids have whole cells.
  fine = x.repeat(rows, axis=1).repeat(columns, axis=2)
  expected = fine.reshape(2, rows, 8, columns, 6, 3).mean((2, 4))
  np.testing.assert_allclose(got, expected, atol=1e-6)
  assert extract.shrunk(x, 8) is x


@pytest.mark.parametrize("shape, picture", [
    ((3,), (1, 1, 3)), ((5, 3), (1, 5, 3)), ((4, 6, 3), (4, 6, 3)), ((2, 4, 6, 3), (4, 6, 6))])
def test_everything_is_a_picture_with_channels(shape, picture):
  x = np.arange(2 * np.prod(shape)).reshape(2, *shape)
  assert extract.as_picture(x).shape == (2, *picture)
  if len(shape) == 4:
    np.testing.assert_array_equal(extract.as_picture(x)[0, ..., 3:], x[0, 1])


@pytest.mark.parametrize("shape", [(2,), (6, 2), (2, 5, 4, 1), (20, 12, 3)])
def test_a_classifier_learns_classes_of_any_shape(shape):
  data = gaussians.make(shape=shape, num_classes=2)
  noun = classifier.config(records=256, size=8, width=8, steps=120, learning_rate=1e-2)
  found = _made(noun, data)
  x_0, labels = extract.first_records(data, 200, "held_out")
  got = found.extract(x_0)
  assert got.shape == (200, 32) and got.dtype == np.float64 and np.isfinite(got).all()
  assert metrics.accuracy(found.predict(x_0), labels) > 0.65  # chance is 0.5, and four deviations of it 0.64
  # One seed, one classifier; and a sample's features do not depend on those it comes with.
  np.testing.assert_array_equal(_made(noun, data).extract(x_0[:7]), got[:7])


def test_auto_takes_a_classifier_where_there_are_labels():
  x = np.random.default_rng(3).standard_normal((30, 4, 4, 1))
  assert _made(features.auto_config(), _data(x)).predict is None
  monochrome = _data(x, cond=np.zeros(30, np.int32))
  assert _made(features.auto_config(), monochrome).predict is None  # one class: nothing to tell apart


def test_digit_features_are_a_noun():
  data = digits.make()
  found = _made(digit_features.config(), data)
  images, labels = digits.arrays("held_out")
  own = digit_features.train(*digits.arrays("train"))
  np.testing.assert_array_equal(found.extract(images), digit_features.features(own, images))
  np.testing.assert_array_equal(found.predict(images), digit_features.predict(own, images))


@pytest.mark.parametrize("noun, data, message", [
    (digit_features.config(), gaussians.make(shape=(8, 8, 3), num_classes=2), "8 x 8 in grey"),
    (digit_features.config(), _data(np.zeros((5, 8, 8, 1))), "need labels"),
    (classifier.config(), _data(np.zeros((5, 8, 8, 1))), "only condition is a label"),
    (pca.config(), _data(np.zeros((5, 8, 8, 1))), "all the same"),
    (pca.config(), _data(np.ones((1, 4))), "at least 2 are needed"),
    (pca.config(components=0), digits.make(), "components: 0 must be"),
    (pca.config(size=2**40), digits.make(), "size: .* must be"),
    (classifier.config(steps=0), digits.make(), "steps: 0 must be"),
    (classifier.config(noise=float("nan")), digits.make(), "noise: nan must be"),
    (classifier.config(learning_rate=-1.0), digits.make(), "learning_rate: -1.0 must be"),
    (classifier.config(width="x"), digits.make(), "width: 'x' must be"),
])
def test_what_does_not_fit_is_refused_in_one_line(noun, data, message):
  with pytest.raises(ValueError, match=message) as error:
    _made(noun, data)
  assert "\n" not in str(error.value)
