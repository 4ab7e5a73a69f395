"""Precision and recall against their definition, Inception scores against theirs, files of samples and references."""

import pickle
import zipfile

import numpy as np
from PIL import Image
import pytest

from piflow_jax.evaluation import inception_score
from piflow_jax.evaluation import manifold
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import references
from piflow_jax.evaluation import samples_file
from piflow_jax.evaluation import statistics


def _two(n, m, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((n, width)).astype(np.float32), rng.standard_normal((m, width)).astype(np.float32) + 0.3


@pytest.mark.parametrize("rows", [7, 64, 5000])
def test_precision_and_recall_by_definition_in_any_blocks(rows):
  reference, samples = _two(90, 130, 6)
  assert manifold.precision_recall(reference, samples, 3, rows=rows) == metrics.precision_recall(reference, samples, 3)
  # Far from the origin inner products lose their digits unless the middle is taken off.
  far = manifold.precision_recall(reference + 1000, samples + 1000, 3, rows=rows)
  np.testing.assert_allclose(far, metrics.precision_recall(reference, samples, 3), atol=0.02)


def test_half_precision_moves_little_and_overflows_into_single():
  reference, samples = _two(200, 200, 16)
  exact, half = (manifold.precision_recall(reference, samples, 3, half=kind) for kind in (False, True))
  assert half != (0, 0)
  np.testing.assert_allclose(half, exact, atol=0.03)
  # Squares of 300 are beyond float16's 65504 after one: all in float32 then.
  large = manifold.precision_recall(reference * 300, samples * 300, 3, half=True)
  np.testing.assert_allclose(large, exact, atol=1e-6)


def test_too_few_rows_other_widths_and_nan():
  reference, samples = _two(5, 5, 3)
  with pytest.raises(ValueError, match="^features: 3 rows are too few for a 3-th"):
    manifold.precision_recall(reference[:3], samples)
  with pytest.raises(ValueError, match="^features: must be"):
    manifold.precision_recall(reference, samples[:, :2])
  with pytest.raises(ValueError, match="^features: hold values that are not finite"):
    manifold.precision_recall(reference * np.nan, samples)


def _score(p):
  return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0, keepdims=True))), 1)))


def test_inception_score_by_definition():
  logits = np.random.default_rng(0).standard_normal((23, 6)) * 2
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  parts = [_score(p[:10]), _score(p[10:20]), _score(p[20:])]
  found = inception_score.inception_score(logits, block=10)
  np.testing.assert_allclose(found, (np.mean(parts), np.std(parts)), rtol=1e-12)
  order = np.random.RandomState(2020).permutation(23)
  halves = [_score(p[order][:11]), _score(p[order][11:])]
  found = inception_score.inception_score(logits, splits=2, permuted=True)
  np.testing.assert_allclose(found[0], np.mean(halves), rtol=1e-12)
  # Sure of a class each, all classes alike: as many as there are classes.
  sure = np.where(np.eye(6, dtype=bool), 0.0, -2000.0)
  np.testing.assert_allclose(inception_score.inception_score(sure, splits=1), (6, 0), rtol=1e-12)
  np.testing.assert_allclose(inception_score.inception_score(np.zeros((5, 4)), splits=1)[0], 1, rtol=1e-12)
  with pytest.raises(ValueError, match="^logits: 3 samples are too few for 10"):
    inception_score.inception_score(logits[:3])
  with pytest.raises(ValueError, match="^logits: must be"):
    inception_score.inception_score(logits * np.inf)


# Files.


def test_a_file_of_samples_is_what_numpy_reads(tmp_path):
  x = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3)).astype(np.uint8)
  with samples_file.writer(tmp_path / "x.npz", x.shape) as add:
    add(x[:4])
    add(x[4:])
  with np.load(tmp_path / "x.npz") as file:
    np.testing.assert_array_equal(file["arr_0"], x)
  np.savez_compressed(tmp_path / "y.npz", arr_0=x)
  for name in ("x.npz", "y.npz"):
    assert samples_file.shape_of(tmp_path / name) == (11, 4, 5, 3)
    parts = list(samples_file.batches(tmp_path / name, 3))
    assert [len(p) for p in parts] == [3, 3, 3, 2]
    np.testing.assert_array_equal(np.concatenate(parts), x)
    np.testing.assert_array_equal(np.concatenate(list(samples_file.batches(tmp_path / name, 3, 7))), x[:7])
  (tmp_path / "folder").mkdir()
  for i, picture in enumerate(x):
    Image.fromarray(picture).save(tmp_path / "folder" / f"{i:03}.png")
  np.testing.assert_array_equal(np.concatenate(list(samples_file.batches(tmp_path / "folder", 4))), x)


def test_a_file_that_is_not_finished_is_not_there(tmp_path):
  x = np.zeros((2, 4, 5, 3), np.uint8)
  for wrong in (lambda add: add(x), lambda add: add(x.astype(float)), lambda add: [add(x)] * 2):
    with pytest.raises(ValueError, match="^images: "):
      with samples_file.writer(tmp_path / "x.npz", (3, 4, 5, 3)) as add:
        wrong(add)
        add(x[:1].astype(float))
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_samples(tmp_path):
  (tmp_path / "text.npz").write_text("no zip")
  np.savez(tmp_path / "other.npz", x=np.zeros(3))
  np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
  np.savez(tmp_path / "first.npz", arr_0=np.zeros((2, 3, 4, 4), np.uint8))
  (tmp_path / "empty").mkdir()
  for name, words in (("text.npz", "cannot be read as .npz"), ("other.npz", "holds x.npy, no arr_0"),
                      ("float.npz", "arr_0 is float64"), ("first.npz", "not uint8"), ("empty", "holds no pictures")):
    with pytest.raises(ValueError, match=f"^path: .*{name}.*{words}"):
      samples_file.shape_of(tmp_path / name)
  with zipfile.ZipFile(tmp_path / "torn.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
    np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (5, 4, 4, 3)})
    member.write(bytes(100))
  with pytest.raises(ValueError, match="ends after 2 of 5 pictures"):
    list(samples_file.batches(tmp_path / "torn.npz", 5))


def _statistics(seed=0, n=40, width=6):
  return statistics.of(np.random.default_rng(seed).standard_normal((n, width)))


def test_references_in_every_form(tmp_path):
  found, rows = _statistics(), np.random.default_rng(1).standard_normal((9, 6)).astype(np.float32)
  mean, cov = found.mean, found.covariance
  picture = np.random.default_rng(2).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
  np.savez(tmp_path / "adm.npz", mu=mean, sigma=cov, mu_s=mean, sigma_s=cov, arr_0=picture)
  np.savez(tmp_path / "mar.npz", mu=mean.astype(np.float32), sigma=cov.astype(np.float32))
  np.savez(tmp_path / "meanflow.npz", ref_mu=mean, ref_sigma=cov)
  with open(tmp_path / "lakonlab.pkl", "wb") as file:
    pickle.dump(dict(mean=mean, cov=cov, real_feats_np=rows, num_real_feeded=40), file)
  references.save(tmp_path / "ours.npz", found, found, rows)
  other = _statistics(3)
  want = statistics.frechet_distance(found, other)
  for name, counted in (("adm.npz", False), ("mar.npz", False), ("meanflow.npz", False), ("lakonlab.pkl", True),
                        ("ours.npz", True)):
    reference = references.load(tmp_path / name, pool=6)
    # MAR's are kept in float32.
    np.testing.assert_allclose(statistics.frechet_distance(reference.pool, other), want, rtol=1e-6, err_msg=name)
    assert reference.counted == counted and reference.pool.count == (40 if counted else 1_281_167)
    assert (reference.spatial is not None) == (name in ("adm.npz", "ours.npz"))
    got = references.rows_of(reference, lambda images: {"pool": images.reshape(len(images), -1)[:, :6]}, 7, 2)
    if name in ("lakonlab.pkl", "ours.npz"):
      np.testing.assert_array_equal(got, rows[:7])
    elif name == "adm.npz":
      np.testing.assert_array_equal(got, picture.reshape(9, -1)[:7, :6])
    else:
      assert got is None


class _Runs:

  def __reduce__(self):
    return exec, ("raise SystemExit('it ran')",)


def test_references_that_are_none(tmp_path):
  mean, cov = _statistics().mean, _statistics().covariance
  files = {
      "none.npz": dict(x=mean), "width.npz": dict(mu=mean, sigma=cov[:3]), "nan.npz": dict(mu=mean * np.nan, sigma=cov),
      "negative.npz": dict(mu=mean, sigma=-cov), "lopsided.npz": dict(mu=mean, sigma=np.triu(cov) + np.eye(6, k=1))}
  for name, arrays in files.items():
    np.savez(tmp_path / name, **arrays)
  pickles = {"runs.pkl": _Runs(), "list.pkl": [1], "deep.pkl": dict(mean=_Runs(), cov=cov), "rows.pkl": dict(
      mean=mean, cov=cov, real_feats_np=np.zeros(3), num_real_feeded=4)}
  for name, tree in pickles.items():
    with open(tmp_path / name, "wb") as file:
      pickle.dump(tree, file)
  (tmp_path / "text.npz").write_text("x")
  (tmp_path / "torn.pkl").write_bytes((tmp_path / "rows.pkl").read_bytes()[:40])
  for name, words in (
      ("none.npz", "holds x; a reference holds mu and sigma"), ("width.npz", "mu .6,. and sigma .3, 6."),
      ("nan.npz", "not finite"), ("negative.npz", "no covariance"), ("lopsided.npz", "no covariance"),
      ("runs.pkl", "no pickle of NumPy arrays"), ("list.pkl", "holds no mean and cov"),
      ("deep.pkl", "no pickle of NumPy arrays"), ("rows.pkl", "holds features float64 .3,."),
      ("text.npz", "cannot be read as .npz"), ("torn.pkl", "no pickle of NumPy arrays"), ("lost.npz", "is no file")):
    with pytest.raises(ValueError, match=f"^path: .*{name}.*{words}"):
      references.load(tmp_path / name, pool=6)
  np.savez(tmp_path / "good.npz", mu=mean, sigma=cov)
  with pytest.raises(ValueError, match="statistics of 6 features, not Inception's 2048"):
    references.load(tmp_path / "good.npz")
