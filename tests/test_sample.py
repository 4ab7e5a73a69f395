"""The sampling program: images of a run without its teacher, and each thing that it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from piflow_jax import build
from piflow_jax import images
from piflow_jax import params as params_lib
from piflow_jax import sample
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax import workdir
from piflow_jax.models import autoencoder
from tests import tiny

SAMPLE = "piflow_jax.sample"
SETTINGS = dict(channels=3, latent_channels=1, widths=(8, 16), layers_per_block=1, groups=4)
SCALES = dict(scaling_factor=0.25, shift_factor=2.0)


@pytest.fixture(scope="module")
def tiny_student(tmp_path_factory, tiny_teacher):
  """The workdir of a tiny student's finished run."""
  workdir = tmp_path_factory.mktemp("tiny") / "student"
  # So fast that the average is not yet where the weights are.
  config = tiny.config("student", teacher__checkpoint=str(tiny_teacher), optimizer__learning_rate=0.05)
  assert train_loop.train(config, workdir) == 0
  return workdir


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory):
  """(workdir, net, params) of an autoencoder as the converter leaves one."""
  folder = tmp_path_factory.mktemp("tiny") / "autoencoder"
  net = autoencoder.Autoencoder(**SETTINGS)
  params = jax.jit(net.init)(jax.random.key(1), np.zeros((1, 8, 8, 3)))["params"]
  _save(folder, params)
  (folder / autoencoder.FILE).write_text(json.dumps(dict(settings=SETTINGS, scales=SCALES, config={})))
  return folder, net, params


def _save(folder, params):
  weights.save_weights(folder, ((path, np.asarray(leaf)) for path, leaf in params_lib.named_leaves(params).items()))


def _sample(folder, out, *arguments):
  return [f"--workdir={folder}", f"--out={out}", *arguments]


def _run(folder, out, *arguments):
  status, line = tiny.invoke(SAMPLE, _sample(folder, out, *arguments))
  assert (status, line) == (0, "")


def _draw(config, folder, labels, seed=0):
  run, ids = build.run(config), np.array(labels, np.int32)
  return sample.draw(config, run, folder, {"label": ids}, ids, seed=seed, mesh=sharding.make_mesh())


@pytest.mark.slow
def test_a_student_is_drawn_from_by_its_workdir_alone(tiny_student, tmp_path):
  # As a user would, whose teacher is not there: in a program of its own, once.
  status, out, err = tiny.run([tiny.sys.executable, "-m", SAMPLE, *_sample(
      tiny_student, tmp_path / "a.png", "--labels=7,2", "--num=3", "--config.teacher.checkpoint=")])
  assert status == 0 and "a.png: 6 samples, rows 7, 2" in out, err
  picture = Image.open(tmp_path / "a.png")
  assert picture.size == (3 * 33 - 1, 2 * 33 - 1) and picture.mode == "RGB"  # pixels four times as large, lines between
  _run(tiny_student, tmp_path / "a.npz", "--labels=7,2", "--num=3")
  found = np.load(tmp_path / "a.npz")
  assert sorted(found) == ["labels", "x_0"] and found["labels"].tolist() == [7, 7, 7, 2, 2, 2]
  assert found["x_0"].shape == (6, 8, 8, 1) and found["x_0"].dtype == np.float32
  # Another program, whose code LLVM has polished: a value may round to the next of 256 levels.
  shown = images.image_grid(found["x_0"], 3).astype(int)
  assert np.abs(np.asarray(picture).astype(int) - shown).max() <= 1
  # What the student is: its averaged weights, one call, from the noise of (seed, label, number), on any mesh.
  want = _draw(tiny.config("student"), tiny_student, [2, 7, 7])
  np.testing.assert_allclose(want, found["x_0"][[3, 0, 1]], atol=1e-5)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png"]


@pytest.mark.slow
def test_draws_are_those_of_the_averaged_weights_and_of_the_settings(tiny_student, tiny_teacher):
  config = tiny.config("student")
  labels = [3, 3, 5]
  one = _draw(config, tiny_student, labels)
  run = build.run(config)
  jitted = train_step.compile(config, sharding.make_mesh(), run)
  ema, params = (weights.load(tiny_student, jitted.state.ema, which, "") for which in ("ema", "params"))

  def noise(label, number):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), label), number), (8, 8, 1))

  noises, keys = np.stack([noise(3, 0), noise(3, 1), noise(5, 0)]), jax.random.split(jax.random.key(0), 3)
  by = [np.asarray(jitted.draw(w, None, noises, {"label": np.array(labels)}, keys)) for w in (ema, params)]
  np.testing.assert_allclose(one, by[0], atol=1e-5)
  assert np.abs(one - by[1]).max() > 1e-3
  # A batch of 8 each on 8 devices: the cut changes nothing.
  config.evaluation.batch_size = 2
  many = _draw(config, tiny_student, labels * 4)
  np.testing.assert_allclose(many[[0, 1, 2]], one, atol=1e-5)
  assert np.abs(_draw(config, tiny_student, labels, seed=1) - one).max() > 0.1
  teacher = tiny.config("teacher", sampling__nfe=8)
  euler = _draw(teacher, tiny_teacher, labels)
  teacher.method.solver = "heun"
  assert 1e-4 < np.abs(_draw(teacher, tiny_teacher, labels) - euler).max() < 1


@pytest.mark.slow
def test_with_stochasticity_a_sample_does_not_hang_on_its_neighbours(tiny_student):
  config = tiny.config("student", sampling__nfe=2, sampling__h=1.0)
  alone, among = _draw(config, tiny_student, [3]), _draw(config, tiny_student, [5, 3, 3, 1])
  np.testing.assert_allclose(among[1], alone[0], atol=1e-5)
  assert np.abs(among[1] - among[2]).max() > 0.1


@pytest.mark.slow
def test_weights_drawn_from_as_what_they_are_not_are_remarked(tiny_student, tmp_path, caplog):
  def remarks(*arguments):
    caplog.clear()
    _run(tiny_student, tmp_path / "a.npz", "--num=1", "--labels=3", *arguments)
    return [record.getMessage() for record in caplog.records if "piflow_jax" in record.pathname]

  assert not remarks("--config.network.attention=xla", "--config.batch_size=8", "--config.teacher.checkpoint=")
  [said] = remarks("--config.network.time_scale=1000", "--config.method.final_scale=0.5")
  assert "config.method.final_scale is 0.5, was 1.0; config.network.time_scale is 1000.0, was 1.0" in said
  [said] = remarks("--config.sampling.nfe=4")
  assert "config.sampling.nfe: 4, trained for 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("role", ["dx", "parallel", "meanflow", "improved-meanflow"])
def test_every_kind_of_student_is_drawn_from(role, tiny_teacher, tmp_path):
  config = tiny.config(role, teacher__checkpoint=str(tiny_teacher), sampling__nfe=2)
  run = build.run(config)
  jitted = train_step.compile(config, sharding.make_mesh(), run)
  fresh = run.method.init(jax.random.key(0), train_step.load_teacher(config, run, jitted.teacher))
  _save(tmp_path / "run", fresh)
  config.teacher.checkpoint = ""
  x_0 = _draw(config, tmp_path / "run", [1, 4])
  # What starts from the teacher draws nearly like it.
  teacher = _draw(tiny.config("teacher", sampling__nfe=2), tiny_teacher, [1, 4])
  assert x_0.shape == (2, 8, 8, 1) and np.abs(x_0 - teacher).max() < 0.2 * np.abs(teacher).max()


@pytest.mark.slow
def test_broken_weights_make_no_picture(tiny_student, tmp_path):
  config = tiny.config("student")
  run = build.run(config)
  jitted = train_step.compile(config, sharding.make_mesh(), run)
  ema = jax.device_get(weights.load(tiny_student, jitted.state.ema, "ema", ""))
  bias = ema["head"]["means"]["bias"]
  # NaN is found where weights come in; numbers that overflow on the way, before anything is written.
  for name, value, status, words in (("nan", np.nan, 2, ["--workdir", "NaN", "in head/means/bias"]),
                                     ("huge", 3e38, 3, ["80 of 80 samples", "not finite"])):
    ema["head"]["means"]["bias"] = np.full_like(bias, value)
    _save(tmp_path / name, ema)
    workdir.write(tmp_path / name, config)
    tiny.refused(SAMPLE, _sample(tmp_path / name, tmp_path / "a.png"), *words, status=status)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_latents_are_decoded_by_their_scale_and_shift(tiny_student, tiny_autoencoder, tmp_path):
  folder, net, params = tiny_autoencoder
  found, read, scales = weights.load_autoencoder(folder, sharding.replicated(sharding.make_mesh()), "--autoencoder")
  assert found == net and scales == SCALES
  jax.tree.map(np.testing.assert_array_equal, read, params)
  out = tmp_path / "a.npz"
  _run(tiny_student, out, f"--autoencoder={folder}", "--labels=7,2", "--num=6")
  drawn = np.load(out)
  x_0, decoded = drawn["x_0"], drawn["images"]
  assert x_0.shape == (12, 8, 8, 1) and decoded.shape == (12, 16, 16, 3)
  want = jax.jit(lambda x: net.apply({"params": params}, x / 0.25 + 2.0, method="decode"))(jnp.asarray(x_0))
  np.testing.assert_allclose(decoded, want, atol=1e-4 * np.abs(want).max())
  _run(tiny_student, tmp_path / "a.png", f"--autoencoder={folder}", "--num=2")
  assert Image.open(tmp_path / "a.png").size == (2 * 33 - 1, 10 * 33 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name, arguments, words", [
    ("a.png", ["--labels=3,10"], ["--labels", "3, 10", "0 to 9"]),
    ("a.png", ["--labels=-1"], ["--labels", "-1"]),
    ("a.png", ["--labels=cat"], ["--labels", "cat"]),
    ("a.png", ["--labels=1,1"], ["--labels", "once"]),
    ("a.png", ["--labels="], ["--labels", "nothing"]),
    ("a.png", ["--num=0"], ["num", "0"]),
    ("a.png", ["--seed=-1"], ["seed", "-1"]),
    ("a.jpg", [], ["--out", "a.jpg", ".png", ".npz"]),
    ("none/a.png", [], ["--out", "none/a.png", "cannot be written"]),
    ("a.png", ["--config.network.width=64"], ["--workdir", "does not fit"]),
    ("a.png", ["--config.policy.components=8"], ["--workdir", "does not fit", "head/"]),
    ("a.png", ["--autoencoder=nowhere"], ["--autoencoder", "nowhere", "autoencoder.json", "from-torch"]),
])
def test_what_cannot_be_drawn_is_refused(name, arguments, words, tiny_student, tmp_path):
  tiny.refused(SAMPLE, _sample(tiny_student, tmp_path / name, *arguments), *words)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bad_workdirs_are_refused(tiny_student, tmp_path):
  out = tmp_path / "a.npz"
  tiny.refused(SAMPLE, _sample(tmp_path / "gone", out), "--workdir", "gone", "no config.json")
  args = _sample(tmp_path / "gone", out, "--config=configs/digits.py:student")
  tiny.refused(SAMPLE, args, "--workdir", "gone", "no checkpoint")
  tiny.refused(SAMPLE, _sample(tiny_student, out, f"--autoencoder={tiny_student}"), "--autoencoder", "autoencoder.json")
  (tmp_path / "b.png").mkdir()
  tiny.refused(SAMPLE, _sample(tiny_student, tmp_path / "b.png"), "--out", "b.png")
  tiny.refused(SAMPLE, [f"--workdir={tiny_student}"], "--out: missing")
  assert not out.exists()
