"""The sampling program: images of a run without its teacher, and each thing that it refuses."""

import json

import jax
import numpy as np
from PIL import Image
import pytest

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import latents
from piflow_jax import params as params_lib
from piflow_jax import sample
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax.evaluation import figures
from piflow_jax.models import autoencoder
from tests import tiny

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
  workdir = tmp_path_factory.mktemp("tiny") / "autoencoder"
  net = autoencoder.Autoencoder(**SETTINGS)
  params = jax.jit(net.init)(jax.random.key(1), np.zeros((1, 8, 8, 3)))["params"]
  checkpoint.save_weights(workdir, ((path, np.asarray(leaf)) for path, leaf in params_lib.named_leaves(params).items()))
  (workdir / autoencoder.FILE).write_text(json.dumps(dict(settings=SETTINGS, scales=SCALES, config={})))
  return workdir, net, params


def _sample(role, workdir, out, *arguments):
  # As a user would whose teacher is not there.
  return tiny.command(role, workdir, f"--out={out}", "--config.teacher.checkpoint=", *arguments, program="piflow_jax.sample")


def _mesh():
  return sharding.make_mesh()


def _draw(config, workdir, labels, numbers, seed=0):
  return sample.draw(config, workdir, np.array(labels, np.int32), np.array(numbers, np.int32), seed=seed, mesh=_mesh())


@pytest.mark.slow
def test_a_student_is_drawn_from_without_its_teacher(tiny_student, tmp_path):
  status, out, err = tiny.run(_sample("student", tiny_student, tmp_path / "a.png", "--labels=7,2", "--num=3"))
  assert status == 0 and "a.png: 6 images" in out, err
  picture = Image.open(tmp_path / "a.png")
  assert picture.size == (3 * 33 - 1, 2 * 33 - 1) and picture.mode == "RGB"  # pixels four times as large, lines between
  status, _, err = tiny.run(_sample("student", tiny_student, tmp_path / "a.npz", "--labels=7,2", "--num=3"))
  assert status == 0, err
  found = np.load(tmp_path / "a.npz")
  assert sorted(found) == ["labels", "x_0"] and found["labels"].tolist() == [7, 7, 7, 2, 2, 2]
  assert found["x_0"].shape == (6, 8, 8, 1) and found["x_0"].dtype == np.float32
  np.testing.assert_array_equal(np.asarray(picture), figures.image_grid(found["x_0"], 3))
  # What the student is: its averaged weights, one call, from the noise of (seed, label, number), on any mesh.
  want = _draw(tiny.config("student"), tiny_student, [2, 7], [1, 0])
  np.testing.assert_allclose(want, found["x_0"][[4, 0]], atol=1e-5)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png"]


@pytest.mark.slow
def test_draws_are_those_of_the_averaged_weights_and_of_the_settings(tiny_student, tiny_teacher):
  config = tiny.config("student")
  labels, numbers = [3, 3, 5], [0, 1, 0]
  one = _draw(config, tiny_student, labels, numbers)
  jitted = train_loop.compile_run(config, _mesh(), build.run(config))
  ema, params = (checkpoint.load_weights(tiny_student, jitted["state"].ema, which, "") for which in ("ema", "params"))
  key = lambda label, number: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), label), number)
  noise = np.stack([jax.random.normal(key(*pair), (8, 8, 1)) for pair in zip(labels, numbers)])
  by = lambda weights: np.asarray(jitted["draw"](weights, None, noise, np.array(labels), jax.random.key(0)))
  np.testing.assert_allclose(one, by(ema), atol=1e-5)
  assert np.abs(one - by(params)).max() > 1e-3
  # A batch of 8 each on 8 devices: the cut changes nothing.
  config.evaluation.batch_size = 2
  many = _draw(config, tiny_student, labels * 4, np.arange(12))
  np.testing.assert_allclose(many[[0, 1]], one[[0, 1]], atol=1e-5)
  assert np.abs(_draw(config, tiny_student, labels, numbers, seed=1) - one).max() > 0.1
  teacher = tiny.config("teacher", sampling__nfe=8)
  euler = _draw(teacher, tiny_teacher, labels, numbers)
  teacher.sampling.solver = "heun"
  assert 1e-4 < np.abs(_draw(teacher, tiny_teacher, labels, numbers) - euler).max() < 1


@pytest.mark.slow
def test_weights_drawn_from_as_what_they_are_not_are_remarked(tiny_student, caplog):
  config = tiny.config("student", sampling__nfe=2, network__attention="xla", batch_size=8, teacher__checkpoint="")
  _draw(config, tiny_student, [3], [0])
  remarks = lambda: [message for message in caplog.messages if "trained otherwise" in message]
  assert not remarks()
  config.flow.final_scale, config.network.time_scale = 0.5, 1000.0
  _draw(config, tiny_student, [3], [0])
  [said] = remarks()
  assert "config.flow.final_scale is 0.5, was 1.0; config.network.time_scale is 1000.0, was 1.0" in said


@pytest.mark.slow
@pytest.mark.parametrize("role", ["dx", "parallel", "meanflow", "improved-meanflow"])
def test_every_kind_of_student_is_drawn_from(role, tiny_teacher, tmp_path):
  config = tiny.config(role, teacher__checkpoint=str(tiny_teacher), sampling__nfe=2)
  run = build.run(config)
  teacher_params = train_loop.load_teacher(config, train_loop.compile_run(config, _mesh(), run)["teacher"])
  fresh = run.init(jax.random.key(0), teacher_params)
  checkpoint.save_weights(tmp_path / "run", ((k, np.asarray(v)) for k, v in params_lib.named_leaves(fresh).items()))
  config.teacher.checkpoint = ""
  x_0 = _draw(config, tmp_path / "run", [1, 4], [0, 0])
  # What starts from the teacher draws nearly like it.
  teacher = _draw(tiny.config("teacher", sampling__nfe=2), tiny_teacher, [1, 4], [0, 0])
  assert x_0.shape == (2, 8, 8, 1) and np.abs(x_0 - teacher).max() < 0.2 * np.abs(teacher).max()


@pytest.mark.slow
def test_latents_are_decoded_by_their_scale_and_shift(tiny_student, tiny_autoencoder, tmp_path):
  workdir, net, params = tiny_autoencoder
  found, read, scales = latents.load(workdir, sharding.replicated(_mesh()))
  assert found == net and scales == SCALES
  jax.tree.map(np.testing.assert_array_equal, read, params)
  out = tmp_path / "a.npz"
  status, _, err = tiny.run(_sample("student", tiny_student, out, f"--autoencoder={workdir}", "--labels=7,2", "--num=6"))
  assert status == 0, err
  drawn = np.load(out)
  x_0, images = drawn["x_0"], drawn["images"]
  assert x_0.shape == (12, 8, 8, 1) and images.shape == (12, 16, 16, 3)
  want = jax.jit(lambda x: net.apply({"params": params}, x / 0.25 + 2.0, method="decode"))(x_0)
  np.testing.assert_allclose(images, want, atol=1e-4 * np.abs(want).max())
  status, _, err = tiny.run(_sample("student", tiny_student, tmp_path / "a.png", f"--autoencoder={workdir}", "--num=2"))
  assert status == 0, err
  assert Image.open(tmp_path / "a.png").size == (2 * 33 - 1, 10 * 33 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name, arguments, words", [
    ("a.png", ["--labels=3,10"], ["--labels", "3,10", "0 to 9"]),
    ("a.png", ["--labels=-1"], ["--labels", "-1"]),
    ("a.png", ["--labels=cat"], ["--labels", "cat"]),
    ("a.png", ["--labels=1,1"], ["--labels", "once"]),
    ("a.png", ["--labels="], ["--labels", "nothing"]),
    ("a.png", ["--num=0"], ["num", "0"]),
    ("a.jpg", [], ["--out", "a.jpg", ".png", ".npz"]),
    ("none/a.png", [], ["--out", "none/a.png", "cannot be written"]),
    ("a.png", ["--config.data.shape=(8,8,4)"], ["--out", "4", "--autoencoder", ".npz"]),
    ("a.png", ["--config.network.width=64"], ["--workdir", "does not fit"]),
    ("a.png", ["--autoencoder=nowhere"], ["--autoencoder", "nowhere", "autoencoder.json", "from-torch"]),
])
def test_what_cannot_be_drawn_is_told(name, arguments, words, tiny_student, tmp_path):
  tiny.refused(_sample("student", tiny_student, tmp_path / name, *arguments), *words)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bad_workdirs_are_told(tiny_student, tiny_autoencoder, tmp_path):
  out, (folder, *_) = tmp_path / "a.npz", tiny_autoencoder
  tiny.refused(_sample("student", tmp_path / "gone", out), "--workdir", "gone", "no checkpoint")
  tiny.refused(_sample("student", tiny_student, out, f"--autoencoder={tiny_student}"), "--autoencoder", "autoencoder.json")
  tiny.refused(_sample("student", tiny_student, out, f"--autoencoder={folder}", "--config.data.shape=(8,8,4)"),
               "--autoencoder", "1 channels", "(8, 8, 4)")
  (tmp_path / "b.png").mkdir()
  tiny.refused(_sample("student", tiny_student, tmp_path / "b.png"), "--out", "b.png")
  args = [a for a in _sample("student", tiny_student, out) if not a.startswith("--out")]
  tiny.refused(args, "out")
  assert not out.exists()


@pytest.mark.slow
def test_help_teaches():
  status, out, err = tiny.run([tiny.sys.executable, "-m", "piflow_jax.sample", "--help"])
  for word in ("--workdir=runs/digits/student --out=samples.png", "config.sampling.nfe", "without any", "--labels"):
    assert word in out + err
