"""Streaming moments against NumPy's on the whole; Fréchet distances against closed forms and the rows themselves."""

import numpy as np
import pytest
import scipy.linalg

from piflow_jax.data import digits
from piflow_jax.evaluation import digit_features
from piflow_jax.evaluation import statistics


def _distance(a, b):
  return statistics.frechet_distance(statistics.of(a), statistics.of(b))


def _split(x, cuts):
  return np.split(x, np.sort(cuts))


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_any_split_gives_the_moments_of_the_whole(offset):
  """Features of 1e8 too: a plain sum of squares has no digits left of a variance of 1 there."""
  rng = np.random.default_rng(0)
  x = (rng.standard_normal((257, 12)) @ rng.standard_normal((12, 12)) + 3) + offset
  near = x - offset  # exact, so its moments are those of x
  for cuts in ([], [1], [1, 2, 3], range(1, 257), [100, 100, 200], rng.integers(0, 257, 20)):
    found = statistics.Statistics()
    for part in _split(x, np.array(cuts, int)):
      found.update(part)
    assert found.count == 257
    np.testing.assert_allclose(found.covariance, np.cov(near.T), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.mean - offset, near.mean(0), rtol=1e-10, atol=3e-16 * offset)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_processes_that_merge_give_the_moments_of_the_whole(offset):
  rng = np.random.default_rng(1)
  x = np.sort(rng.standard_normal((120, 5)), axis=0) * 10 + offset  # sorted: parts of different means
  for counts in ([60, 60], [1, 119], [40, 0, 80], [7] * 17 + [1]):
    parts = [statistics.of(part, keep=50) for part in _split(x, np.cumsum(counts)[:-1])]
    whole = parts[0]
    for part in parts[1:]:
      whole.merge(part)
    assert whole.count == 120
    np.testing.assert_allclose(whole.covariance, np.cov((x - offset).T), rtol=1e-10)
    np.testing.assert_array_equal(whole.rows, x[:50])
  empty = statistics.Statistics()
  np.testing.assert_array_equal(empty.merge(statistics.of(x)).covariance, statistics.of(x).covariance)


def test_merging_changes_only_the_one_that_takes_in():
  x = np.random.default_rng(2).standard_normal((30, 4))
  first, second = statistics.of(x[:10]), statistics.of(x[10:])
  before = second.covariance.copy(), second.mean.copy()
  total = statistics.Statistics().merge(second)
  total.merge(first)
  first.merge(second)
  np.testing.assert_array_equal(second.covariance, before[0])
  np.testing.assert_array_equal(second.mean, before[1])


def test_a_file_holds_mu_sigma_and_count(tmp_path):
  x = np.random.default_rng(3).standard_normal((50, 6)) + 2
  found = statistics.of(x, keep=5)
  found.save(tmp_path / "kept.npz")
  with np.load(tmp_path / "kept.npz") as file:
    np.testing.assert_array_equal(file["mu"], found.mean)
    np.testing.assert_allclose(file["sigma"], np.cov(x.T), rtol=1e-12)
    assert file["count"] == 50
  again = statistics.Statistics.load(tmp_path / "kept.npz")
  np.testing.assert_array_equal(again.rows, x[:5])
  y = np.random.default_rng(4).standard_normal((40, 6))
  np.testing.assert_allclose(statistics.frechet_distance(again, statistics.of(y)), _distance(x, y), rtol=1e-12)
  more = again.update(y)
  np.testing.assert_allclose(more.covariance, np.cov(np.concatenate([x, y]).T), rtol=1e-12)
  # References of FID have no count.
  np.savez(tmp_path / "bare.npz", mu=found.mean, sigma=found.covariance)
  with pytest.raises(ValueError, match="holds mu, sigma; it must hold mu, sigma and count"):
    statistics.Statistics.load(tmp_path / "bare.npz")
  bare = statistics.Statistics.load(tmp_path / "bare.npz", count=50)
  np.testing.assert_allclose(statistics.frechet_distance(bare, statistics.of(y)), _distance(x, y), rtol=1e-12)
  np.savez(tmp_path / "other.npz", mu=found.mean, sigma=found.covariance[:2], count=50)
  with pytest.raises(ValueError, match="other.npz holds mu .6,. and sigma .2, 6."):
    statistics.Statistics.load(tmp_path / "other.npz")


def _with_moments(n, mean, cov, rng):
  """n samples whose sample mean and unbiased covariance are exactly these."""
  x = rng.standard_normal((n, len(mean)))
  x -= x.mean(0)
  white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
  return mean + white @ np.linalg.cholesky(cov).T


def test_frechet_of_known_gaussians():
  rng = np.random.default_rng(0)
  a = _with_moments(50, np.array([1.0, -2.0, 0.0]), np.diag([1.0, 4.0, 9.0]), rng)
  b = _with_moments(70, np.array([0.0, 0.0, 0.0]), np.diag([4.0, 1.0, 0.25]), rng)
  # Covariances that commute: |mu|^2 + sum (sd_a - sd_b)^2.
  expected = 5 + (1 - 2) ** 2 + (2 - 1) ** 2 + (3 - 0.5) ** 2
  np.testing.assert_allclose(_distance(a, b), expected, rtol=1e-10)


def test_frechet_against_matrix_square_root():
  rng = np.random.default_rng(1)
  a = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12)) + 1
  b = rng.standard_normal((90, 12)) @ rng.standard_normal((12, 12))
  s_a, s_b = np.cov(a.T), np.cov(b.T)
  expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s_a + s_b - 2 * scipy.linalg.sqrtm(s_a @ s_b).real)
  np.testing.assert_allclose(_distance(a, b), expected, rtol=1e-9)
  np.testing.assert_allclose(_distance(b, a), expected, rtol=1e-9)


def test_frechet_of_identical_and_of_rank_deficient_sets():
  rng = np.random.default_rng(2)
  few = rng.standard_normal((7, 40)) * 100
  np.testing.assert_allclose(_distance(few, few), 0, atol=1e-9)
  np.testing.assert_allclose(_distance(few, few + 3), 9 * 40, rtol=1e-10)
  # Two samples each, so of rank one: tr (S_a S_b)^1/2 = |a . b| for S = a a^T and b b^T.
  a, b = rng.standard_normal((2, 40))
  pair_a, pair_b = np.stack([a, -a]) / 2**0.5, np.stack([b, -b]) / 2**0.5
  np.testing.assert_allclose(_distance(pair_a, pair_b), a @ a + b @ b - 2 * abs(a @ b), rtol=1e-10)
  # float32 features are computed with in float64, or a large mean would lose the spread.
  far = np.float32(few) + 2**12, np.float32(2 * few[:5]) + 2**12
  np.testing.assert_allclose(_distance(*far), _distance(*(x.astype(np.float64) for x in far)), rtol=1e-10)


def _distance_of_rows(a, b):
  """The distance by the rows' own triangular factors, which square nothing: exact where covariances are singular."""
  root_a = np.linalg.qr(a - a.mean(0), mode="r") / (len(a) - 1) ** 0.5
  root_b = np.linalg.qr(b - b.mean(0), mode="r") / (len(b) - 1) ** 0.5
  cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
  return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross


@pytest.fixture(scope="module")
def digit_sets():
  """{kind: (training rows, held-out rows)}: features, some of them always 0, and pixels, some of them constant."""
  (train, labels), (held_out, _) = digits.arrays("train"), digits.arrays("held_out")
  classifier = digit_features.train(train, labels)
  return {"features": [digit_features.features(classifier, x) for x in (train, held_out)],
          "pixels": [x.reshape(len(x), -1).astype(np.float64) for x in (train, held_out)]}


@pytest.mark.parametrize("kind", ["features", "pixels"])
@pytest.mark.parametrize("n, m", [(1437, 360), (2, 360), (40, 360), (63, 64), (65, 66), (11, 5), (360, 360)])
def test_frechet_of_digits_against_the_rows(digit_sets, kind, n, m):
  a, b = digit_sets[kind][0][:n], digit_sets[kind][1][:m]
  assert (a.std(0) == 0).sum() >= 3
  np.testing.assert_allclose(_distance(a, b), _distance_of_rows(a, b), rtol=1e-11)


def test_frechet_where_eigenvalues_fall_off_steeply():
  """From 1 down to 1e-20, below what a covariance in float64 can hold, along directions that may differ."""
  rng = np.random.default_rng(5)
  sizes = 10.0 ** -np.arange(0, 10, 0.25)
  turn = np.linalg.qr(rng.standard_normal((40, 40)))[0]
  a, b = (rng.standard_normal((300, 40)) * sizes for _ in range(2))
  for x, y in ((a, b), (a @ turn, b @ turn), (a @ turn, b[:, ::-1] @ turn)):
    np.testing.assert_allclose(_distance(x, y), _distance_of_rows(x, y), rtol=1e-8)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_frechet_does_not_depend_on_the_origin(offset):
  rng = np.random.default_rng(6)
  a, b = rng.standard_normal((500, 20)) + offset, 1.3 * rng.standard_normal((400, 20)) + offset
  np.testing.assert_allclose(_distance(a, b), _distance_of_rows(a - offset, b - offset), rtol=1e-11)


def test_bias_is_the_mean_distance_of_two_sets_of_one_gaussian():
  rng = np.random.default_rng(7)
  turn = rng.standard_normal((6, 6))
  n, m = 400, 150
  measured = [_distance(rng.standard_normal((n, 6)) @ turn, rng.standard_normal((m, 6)) @ turn) for _ in range(200)]
  known = statistics.of(_with_moments(1000, np.zeros(6), turn.T @ turn, rng))
  # 200 draws leave 3% of deviation; to second order only, so a little low.
  np.testing.assert_allclose(statistics.frechet_bias(known, n, m), np.mean(measured), rtol=0.1)


_X = np.random.default_rng(9).standard_normal((8, 3))


@pytest.mark.parametrize("call, message", [
    (lambda: _distance(_X, _X[:, :2]), "3 values a row|2 values a row"),
    (lambda: statistics.of(_X[:, 0]), r"must be \[n, D\]"),
    (lambda: statistics.of(_X).update(_X[:, :2]), "2 values a row, others have 3"),
    (lambda: statistics.of(_X).merge(statistics.of(_X[:, :2])), "2 values a row, others have 3"),
    (lambda: _distance(_X[:1], _X), "at least 2"),
    (lambda: statistics.frechet_distance(statistics.Statistics(), statistics.of(_X)), "at least 2"),
    (lambda: statistics.of(np.where(_X > 1, np.nan, _X)), "finite"),
])
def test_bad_input_is_refused_in_one_line(call, message):
  with pytest.raises(ValueError, match=message) as error:
    call()
  assert "\n" not in str(error.value)
