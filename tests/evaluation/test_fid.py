"""FID and its neighbours: figures of known sets, sums that do not depend on how they are split, the program."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax.convert import inception as inception_weights
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import fid
from piflow_jax.evaluation import gates
from piflow_jax.evaluation import pictures
from piflow_jax.evaluation import protocol
from piflow_jax.evaluation import references
from piflow_jax.evaluation import samples_file
from piflow_jax.evaluation import statistics
from tests import random_inception
from tests import tiny

ADM, MEANFLOW = (protocol.PROTOCOLS[name] for name in ("adm", "meanflow"))


def _features(rng, n, width=6):
  return {"pool": rng.standard_normal((n, width)).astype(np.float32),
          "spatial": rng.standard_normal((n, 4)).astype(np.float32),
          "logits": rng.standard_normal((n, 5)).astype(np.float32)}


def _sums(features, parts, rows=True):
  sums = fid.Sums(rows)
  for index in parts:
    sums.update(index, {name: x[index] for name, x in features.items()})
  return sums


def _reference(pool, spatial=None, rows=None):
  return references.Reference("ours", statistics.of(pool), None if spatial is None else statistics.of(spatial), rows)


def test_figures_do_not_depend_on_how_the_samples_came():
  features = _features(np.random.default_rng(0), 60)
  real = np.random.default_rng(1).standard_normal((80, 6)).astype(np.float32)
  order = np.random.default_rng(2).permutation(60)
  found = []
  for parts in ([np.arange(60)], [np.arange(0, 60, 2), np.arange(1, 60, 2)], [order[:7], order[7:50], order[50:]]):
    sums = _sums(features, parts)
    np.testing.assert_array_equal(sums.rows, features["pool"])
    np.testing.assert_array_equal(sums.logits, features["logits"])
    found.append(fid.figures(sums, _reference(real, real[:, :4]), ADM._replace(block=7), real).values)
  for other in found[1:]:
    assert other["precision"] == found[0]["precision"] and other["recall"] == found[0]["recall"]
    for key in ("fid", "sfid", "inception_score", "inception_score_std"):
      np.testing.assert_allclose(other[key], found[0][key], rtol=1e-10, err_msg=key)  # sums of float64 in another order


def test_figures_of_known_sets():
  rng = np.random.default_rng(0)
  features = _features(rng, 50)
  moved = features["pool"] + np.float32(30)  # the same covariance, means 30 apart in 6 directions
  found = fid.figures(_sums(features, [np.arange(50)]), _reference(moved), ADM, moved).values
  # Float32 features: their sums are rounded to 6e-8 of 30.
  np.testing.assert_allclose(found["fid"], 5400, rtol=1e-6)
  assert found["sfid"] is None and found["precision"] == found["recall"] == 0
  constant = {name: np.ones_like(x) for name, x in features.items()}
  found = fid.figures(_sums(constant, [np.arange(50)]), _reference(constant["pool"]), ADM, constant["pool"]).values
  assert found["fid"] == 0 and abs(found["inception_score"] - 1) < 1e-12 and found["precision"] == found["recall"] == 1


def test_fewer_samples_than_features_and_too_few():
  rng = np.random.default_rng(0)
  few, real = _features(rng, 5, width=20), rng.standard_normal((9, 20))
  found = fid.figures(_sums(few, [np.arange(5)]), _reference(real), MEANFLOW._replace(splits=2), real)
  covariances = np.cov(few["pool"].T.astype(np.float64)), np.cov(real.T)
  values = np.linalg.eigvals(covariances[0] @ covariances[1])
  expected = (np.sum((few["pool"].mean(0, dtype=np.float64) - real.mean(0)) ** 2)
              + sum(np.trace(c) for c in covariances) - 2 * np.sqrt(values.astype(complex)).real.sum())
  # Square roots of eigenvalues that are 0 but for rounding: 1e-8 each.
  np.testing.assert_allclose(found.values["fid"], expected, rtol=1e-6)
  assert "more so below 2,048" in found.remarks[0] and found.values["precision"] is None
  with pytest.raises(ValueError, match="^samples: 1 of them; give 2 at least"):
    fid.figures(_sums(_features(rng, 1), [np.arange(1)]), None, ADM)
  with pytest.raises(ValueError, match="^logits: 5 samples are too few for 10 parts"):
    fid.figures(_sums(few, [np.arange(5)]), None, MEANFLOW)


def test_labels_are_of_seed_and_number():
  whole = draws.labels(np.arange(5000), 10, 3, "random")
  parts = [draws.labels(np.arange(a, min(a + 777, 5000)), 10, 3, "random") for a in range(0, 5000, 777)]
  np.testing.assert_array_equal(whole, np.concatenate(parts))
  assert (draws.labels(np.arange(5000), 10, 4, "random") != whole).mean() > 0.8
  # 500 expected of each, of a standard deviation of 21.
  assert np.abs(np.bincount(whole, minlength=10) - 500).max() < 100
  np.testing.assert_array_equal(draws.labels(np.arange(7), 3, 0, "balanced"), [0, 1, 2, 0, 1, 2, 0])


@pytest.fixture(scope="module")
def run(tiny_teacher):
  config = tiny.config("teacher")
  return config, build.run(config)


def test_samples_are_the_same_on_any_devices_at_any_batch_size(run):
  """Noises and labels bit for bit; what a model makes of them is the caller's rounding."""
  _, built = run
  found = []
  for devices, size in ((jax.devices()[:1], 7), (jax.devices(), 16), (jax.devices(), 40)):
    mesh = sharding.make_mesh(devices=devices)
    noises = draws.Noises(5, draws.NOISE, 40, tuple(built.data.spec.x_0))

    def conditions(index):
      return {"label": draws.labels(index, 10, 5, "random")}

    rows = {}
    for batch in draws.batches(noises, conditions, 40, size, mesh):
      for place, number in zip(batch.own, batch.index):
        rows[int(number)] = (np.asarray(batch.placed["noise"])[place], int(batch.placed["cond"]["label"][place]))
    assert sorted(rows) == list(range(40))
    found.append(rows)
  for rows in found[1:]:
    for number, (noise, label) in rows.items():
      np.testing.assert_array_equal(noise, found[0][number][0])
      assert label == found[0][number][1]


def test_bytes_are_the_nearest():
  x = np.linspace(-1.2, 1.2, 2000, dtype=np.float32).reshape(8, 10, 25, 1)
  found = np.asarray(pictures.maker(sharding.make_mesh())(x))
  want = np.clip(np.floor(np.clip(127.5 * (x.astype(np.float64) + 1), 0, 255) + 0.5), 0, 255)
  assert found.shape == (8, 10, 25, 3) and found.dtype == np.uint8
  np.testing.assert_array_equal(found, np.broadcast_to(want, found.shape))


def _project(images):
  """An extractor that needs no network: for what surrounds it."""
  flat = images.reshape(len(images), -1).astype(np.float32) / 255
  mix = np.random.default_rng(0).standard_normal((flat.shape[1], 12)).astype(np.float32)
  pool = flat @ mix
  return {"pool": pool, "spatial": pool[:, :5], "logits": pool[:, :9]}


def test_gates_of_the_files_that_are_there(tmp_path):
  rng = np.random.default_rng(0)
  real, fake = (rng.integers(0, 256, (12, 4, 4, 3)).astype(np.uint8) for _ in range(2))
  sums = fid.take([real], _project, rows=True)
  np.savez(tmp_path / "real.npz", arr_0=real, mu=sums.pool.mean, sigma=sums.pool.covariance,
           mu_s=sums.spatial.mean, sigma_s=sums.spatial.covariance)
  np.savez(tmp_path / "fake.npz", arr_0=fake)
  published = (("fake.npz", {"fid": (0.0, 1e-3)}), ("real.npz", {"fid": (0.0, 1e-6), "precision": (1.0, 0.0)}),
               ("absent.npz", {"fid": (1.0, 0.1)}))
  rows = gates.run(tmp_path, _project, published, "real.npz", width=12)
  assert [row.passed for row in rows] == [True, False, True, True, None]
  assert rows[1].found > 1


# The program, with the true network of random weights.


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
  path = tmp_path_factory.mktemp("inception") / "random.safetensors"
  inception_weights.write(random_inception.params(), path)
  return path


def _evaluate(*arguments):
  return tiny.invoke("piflow_jax.evaluate", arguments)


@pytest.mark.slow
def test_a_run_is_measured_by_its_workdir_and_by_its_samples_file(tiny_teacher, inception, tmp_path):
  reference, kept, other = (tmp_path / f"{name}.npz" for name in ("reference", "kept", "other"))
  assert _evaluate(f"--workdir={tiny_teacher}", "--real=train", "--count=24", f"--inception={inception}",
                   f"--save-reference={reference}") == (0, "")
  common = [f"--inception={inception}", "--protocol=meanflow", "--count=20"]
  drawn = [f"--workdir={tiny_teacher}", "--config.sampling.nfe=2"]
  one, two = tmp_path / "one.npz", tmp_path / "two.npz"
  assert _evaluate(*drawn, *common, f"--reference={reference}", f"--keep={kept}", f"--save-reference={one}") == (0, "")
  report = json.loads((tiny_teacher / "fid" / "meanflow,20-nfe=2.json").read_text())
  assert report["values"]["fid"] > 1e-3 and report["count"] == 20 and report["labels"] == "balanced"
  assert report["values"]["precision"] is None and report["settings"]["nfe"] == 2
  assert _evaluate(f"--samples={kept}", *common, f"--save-reference={two}") == (0, "")
  with np.load(one) as a, np.load(two) as b:
    assert a["count"] == b["count"] == 20
    for name in ("mu", "sigma", "mu_s", "sigma_s", "rows"):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-12, err_msg=name)  # the same pictures
  assert samples_file.shape_of(kept) == (20, 8, 8, 3)
  # In other batches XLA sums in another order, and a value in some thousand falls on the other side of a byte's edge.
  assert _evaluate(*drawn, *common, "--config.evaluation.batch_size=8", f"--keep={other}",
                   f"--save-reference={tmp_path / 's.npz'}") == (0, "")
  one, two = (next(samples_file.batches(path, 20)).astype(int) for path in (kept, other))
  assert np.abs(one - two).max() <= 1 and (one != two).mean() < 0.01


@pytest.mark.slow
def test_a_teacher_is_measured_at_its_own_steps(tiny_teacher, inception, tmp_path):
  """By a student's config alone: one step of Euler is x_0 = noise - u(noise, 1), in bytes."""
  arguments = [*tiny.arguments("student", tmp_path)[:1], *tiny.arguments("student", tmp_path)[2:],
               f"--config.teacher.checkpoint={tiny_teacher}", f"--inception={inception}", "--count=9",
               "--teacher_steps=1", f"--keep={tmp_path / 'k.npz'}", f"--save-reference={tmp_path / 'r.npz'}"]
  assert _evaluate(*arguments) == (0, "")
  config = tiny.config("teacher")
  built, mesh = build.run(config), build.mesh(config)
  params = weights.load(tiny_teacher, train_step.compile(config, mesh, built).state.ema, "ema", "--workdir")
  noise = draws.Noises(0, draws.NOISE, 9, (8, 8, 1)).rows(0, 9)
  cond = {"label": draws.labels(np.arange(9), 10, 0, "random")}
  u = build.velocity_net(config.network.make(built.data.spec, **config_lib.fields_of(config.network)), built.data.spec)
  x_0 = noise - np.asarray(u.apply(params, noise, np.ones(9, np.float32), cond))
  want = np.asarray(pictures.to_bytes(jax.numpy.asarray(x_0))).astype(int)
  got = next(samples_file.batches(tmp_path / "k.npz", 9)).astype(int)
  assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.02  # rounding, at a byte's edge


@pytest.mark.parametrize("arguments, words", [
    (["--samples=x.npz"], ["--inception: missing"]),
    (["--samples=x.npz", "--inception=nowhere.pth"], ["--inception", "nowhere.pth", "is no file"]),
    (["--keep=x.png", "--reference=x.npz", "--inception=GOOD"], ["--keep", "does not end in .npz"]),
    (["--keep=x.npz", "--samples=x.npz", "--inception=GOOD"], ["--keep: --samples does not read it"]),
    (["--autoencoder=x"], ["--autoencoder: is read for a FID alone; give --reference too"]),
    (["--self_test=x", "--inception=GOOD", "--count=5"], ["--count: --self_test does not read it"]),
    (["--samples=x.npz", "--inception=GOOD"], ["--reference: missing"]),
    (["--samples=nowhere.npz", "--inception=GOOD", "--reference=GOOD"], ["--reference", "cannot be read as .npz"]),
    (["--samples=nowhere.npz", "--inception=GOOD", "--save-reference=r.npz"], ["--samples", "nowhere.npz"]),
    (["--real=train", "--inception=GOOD", "--save-reference=r.npz"], ["--samples: missing"]),
    (["--self-test=", "--inception=GOOD"], ["--self_test: is empty"]),
    ([], ["--workdir: missing", "--samples"]),
])
def test_refusals(arguments, words, inception):
  arguments = [a.replace("GOOD", str(inception)) for a in arguments]
  tiny.refused("piflow_jax.evaluate", arguments, *words)


def test_a_run_that_cannot_be_measured_so_is_refused(tiny_teacher, inception, tmp_path):
  own = [f"--workdir={tiny_teacher}", f"--inception={inception}", f"--save-reference={tmp_path / 'r.npz'}"]
  tiny.refused("piflow_jax.evaluate", [*own, "--teacher_steps=4"], "--teacher_steps", "has no teacher")
  tiny.refused("piflow_jax.evaluate", [*own, "--real=test"], "--real", "choose train or held_out")
  tiny.refused("piflow_jax.evaluate", [*own, f"--autoencoder={tiny_teacher}"], "--autoencoder", "no autoencoder")
  assert not (tmp_path / "r.npz").exists()


@pytest.mark.processes
def test_two_processes_measure_what_one_does(tiny_teacher, inception, tmp_path):
  """The same devices in all, so the same pictures: their sums in another order."""
  found = []
  for processes, devices in ((1, 2), (2, 1)):
    out, kept = tmp_path / f"{processes}.npz", tmp_path / f"kept{processes}.npz"
    command = [sys.executable, "-m", "piflow_jax.evaluate", f"--workdir={tiny_teacher}", f"--inception={inception}",
               "--count=11", "--config.evaluation.batch_size=4", f"--save-reference={out}", f"--keep={kept}"]
    done = subprocess.run(["launch/local.sh", str(processes), str(devices), *command], cwd=tiny.ROOT, text=True,
                          env=tiny.environment(JAX_PLATFORMS="cpu"), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(out) as file:
      found.append({name: file[name] for name in file.files} | {"pictures": next(samples_file.batches(kept, 11))})
  one, two = found
  np.testing.assert_array_equal(one["pictures"], two["pictures"])
  assert one["count"] == two["count"] == 11
  # One picture at a time or two: the network's own sums, in float32.
  np.testing.assert_allclose(two["rows"], one["rows"], rtol=1e-4, atol=1e-6)
  for name in ("mu", "sigma", "mu_s", "sigma_s"):
    np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-7, err_msg=name)
