"""Others' caches: read back to the moments that they were written of, and what is no such cache."""

import json

import numpy as np
import pytest

from piflow_jax.data import foreign_caches
from piflow_jax.data import latent_cache
from piflow_jax.data import shards
from tests import tiny
from tests.data import foreign

LABELS = [0, 0, 1, 2]


@pytest.fixture
def repa(tmp_path):
  foreign.repa(tmp_path / "repa", *foreign.moments(4), LABELS)
  return tmp_path / "repa"


@pytest.fixture
def mar(tmp_path):
  foreign.mar(tmp_path / "mar", *foreign.moments(4), LABELS)
  return tmp_path / "mar"


def test_repas_deviations_become_log_variances(repa):
  mean, logvar = map(foreign.last, foreign.moments(4))
  found = foreign_caches.open_cache("repa", str(repa))
  assert (found.shape, found.views, found.moments, found.classes) == ((6, 5, 4), 1, True, ("0", "1", "2"))
  assert found.labels.tolist() == LABELS and found.scale.tolist() == [np.float32(0.18215)] * 4
  for i in range(4):
    # exp and log in float32, of a deviation's 6e-8.
    np.testing.assert_allclose(found.read(i), np.concatenate([mean[i], logvar[i]], -1)[None], rtol=1e-5, atol=1e-5)


def test_mars_moments_of_both_views(mar):
  mean, logvar = map(foreign.last, foreign.moments(4))
  found = foreign_caches.open_cache("mar", str(mar))
  assert (found.shape, found.views, found.moments) == ((6, 5, 4), 2, True)
  assert found.classes == ("n0000", "n0001", "n0002") and found.labels.tolist() == LABELS
  assert found.scale.tolist() == [np.float32(0.2325)] * 4
  for i in range(4):
    want = [np.concatenate([k * mean[i], logvar[i]], -1) for k in (1, 2)]
    np.testing.assert_array_equal(found.read(i), want)


def test_a_foreign_cache_becomes_ours(mar, tmp_path):
  out = tmp_path / "latents"
  assert tiny.invoke("piflow_jax.data.imagenet", [f"--source=mar:{mar}", f"--out={out}", "--shards=2"]) == (0, "")
  manifest, _ = latent_cache.check(out)
  assert (manifest.count, manifest.counts, manifest.shape) == (4, (2, 1, 1), (6, 5, 4))
  theirs, data = foreign_caches.open_cache("mar", str(mar)), shards.open_records(out, manifest)
  for i in range(4):
    label, array = latent_cache.decode(data[i], manifest.stored)
    assert label == LABELS[i]
    np.testing.assert_array_equal(array, theirs.read(i).astype(np.float16))


def _npy(folder, x):
  np.save(next((folder / "00000").glob("*.npy")), x)


def _json(folder, labels):
  (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


@pytest.mark.parametrize("spoil, words", [
    (lambda f: _npy(f, np.zeros((8, 6, 5), np.float32) - 1), "should be standard deviations are below 0.*MAR"),
    (lambda f: _npy(f, np.full((8, 6, 5), np.nan, np.float32)), "not finite"),
    (lambda f: _npy(f, np.zeros((8, 6, 5), np.int32)), "is int32"),
    (lambda f: next((f / "00000").glob("*1.npy")).unlink(), "00000001.npy cannot be read"),
    (lambda f: next((f / "00000").glob("*1.npy")).write_bytes(b"\x93NUMPY"), "00000001.npy cannot be read"),
    (lambda f: _json(f, [["a", -1]]), "label of a is -1"), (lambda f: _json(f, [["a", 1.5]]), "label of a is 1.5"),
    (lambda f: _json(f, []), "names no latents"), (lambda f: _json(f, 3), "dataset.json has no 'labels'"),
    (lambda f: (f / "dataset.json").unlink(), "dataset.json has no 'labels'"),
])
def test_what_is_no_repa(spoil, words, repa):
  spoil(repa)
  with pytest.raises(ValueError, match=f"^source: .*{words}"):
    foreign_caches.open_cache("repa", str(repa))


def test_a_record_of_another_shape_is_found_when_it_is_read(repa):
  found = foreign_caches.open_cache("repa", str(repa))
  np.save(repa / found.names[3], np.zeros((8, 3, 5), np.float32))
  with pytest.raises(ValueError, match=r"^source: .*00000003.npy is float32 \(8, 3, 5\), the first record \(8, 6, 5\)"):
    found.read(3)


def test_mar_of_deviations_is_told(tmp_path):
  mean, logvar = foreign.moments(4)
  foreign.mar(tmp_path / "mar", mean, np.exp(logvar / 2), LABELS)
  with pytest.raises(ValueError, match="^source: .*no log variance of the first records is below 0.*REPA"):
    foreign_caches.open_cache("mar", str(tmp_path / "mar"))


def test_what_is_not_there():
  for kind in foreign_caches.KINDS:
    with pytest.raises(ValueError, match="^source: 'nowhere' is not there; give "):
      foreign_caches.open_cache(kind, "nowhere")
