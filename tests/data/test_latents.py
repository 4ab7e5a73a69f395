"""A cache of latents: made of pictures, killed, damaged, read, trained on."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest

from configs import imagenet_dit
from piflow_jax import errors
from piflow_jax import train_loop
from piflow_jax.data import imagenet
from piflow_jax.data import images
from piflow_jax.data import latent_cache
from piflow_jax.data import latents
from piflow_jax.data import shards
from piflow_jax.data import sources
from tests import small_autoencoder
from tests import tiny
from tests.data import making

PROGRAM = "piflow_jax.data.imagenet"
CLASSES = ("n01", "n02", "n03")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(folder of all, net, params): pictures as class folders and as a tar of tars, and an autoencoder."""
  folder = tmp_path_factory.mktemp("imagenet")
  net, params = small_autoencoder.make(folder / "autoencoder")
  making.tars(folder, classes=3, pictures=5, also=folder / "pictures")
  return folder, net, params


def _arguments(folder, out, *more, kind="folder", place="pictures"):
  return [f"--source={kind}:{folder / place}", f"--autoencoder={folder / 'autoencoder'}", f"--out={out}", "--size=16",
          "--shards=4", "--batch=1", *more]


@pytest.fixture(scope="module")
def cache(made, tmp_path_factory):
  out = tmp_path_factory.mktemp("cache") / "latents"
  assert tiny.invoke(PROGRAM, _arguments(made[0], out)) == (0, "")
  return out


def _bytes(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_records_are_the_moments_of_the_cut_picture_and_of_its_mirror_image(made, cache):
  folder, net, params = made
  manifest = latent_cache.read_manifest(cache)
  assert (manifest.count, manifest.shape, manifest.views, manifest.moments) == (15, (8, 8, 4), 2, True)
  assert manifest.classes == CLASSES and manifest.counts == (5, 5, 5) and manifest.scale == (0.18215,) * 4
  data, found = shards.open_records(cache, manifest), []
  for number in range(15):
    label, array = latent_cache.decode(data[number], manifest.stored)
    name = f"n0{number // 5 + 1}"
    assert label == number // 5
    picture = images.adm_crop((folder / "pictures" / name / f"{name}_{number % 5}.JPEG").read_bytes(), 16)
    for view, x in enumerate((picture, picture[:, ::-1])):
      x = x[None].astype(np.float32) / 127.5 - 1
      mean, logvar = net.apply({"params": params}, x, method="encode")
      want = np.concatenate([mean, logvar], -1)[0]
      np.testing.assert_allclose(array[view], want, rtol=1e-3, atol=1e-3)  # float16: 5e-4 of a value
    assert np.abs(array[1].astype(np.float32) - array[0, :, ::-1]).max() > 1e-2  # the latent's mirror image is another
    found.append(array.astype(np.float64))
  means, logvars = np.split(np.stack(found), 2, axis=-1)
  np.testing.assert_allclose(manifest.mean, means.mean((0, 1, 2, 3)), rtol=1e-9)
  deviation = np.sqrt(means.var((0, 1, 2, 3)) + np.exp(logvars).mean((0, 1, 2, 3)))
  np.testing.assert_allclose(manifest.deviation, deviation, rtol=1e-9)


def test_a_tar_of_tars_is_its_folders(made, cache, tmp_path):
  out = tmp_path / "latents"
  assert tiny.invoke(PROGRAM, _arguments(made[0], out, kind="tars", place=".")) == (0, "")
  ours, theirs = _bytes(out), _bytes(cache)
  for name in ours:
    if name.endswith(".array_record"):
      assert ours[name] == theirs[name], name


@pytest.mark.filterwarnings("ignore")
def test_a_prepared_builder_is_read_without_tensorflow(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  rng = np.random.default_rng(0)
  raws = [making.jpeg(rng) for _ in range(4)]

  class Small(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
          "image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.ClassLabel(names=["a", "b"])}))

    def _split_generators(self, manager):
      del manager
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i, raw in enumerate(raws):
        yield i, {"image": io.BytesIO(raw), "label": i % 2}

  builder = Small(data_dir=str(tmp_path), file_format="array_record")
  builder.download_and_prepare()
  source = sources.open_source("tfds", str(builder.data_dir))
  assert source.classes == ("a", "b") and len(source.names) == 4
  found = [source.read(i) for i in range(4)]
  assert sorted(raw for raw, _ in found) == sorted(raws)
  assert all(label == raws.index(raw) % 2 for raw, label in found)
  with pytest.raises(ValueError, match="^source: tfds:.* is no prepared TFDS builder with 'nothing'"):
    sources.open_source("tfds", f"{builder.data_dir}:nothing")


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (1201, 1024), (60, 37), (511, 700), (512, 600)])
def test_adms_crop_step_by_step(width, height):
  rng = np.random.default_rng(width)
  image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
  file = io.BytesIO()
  image.save(file, "PNG")
  want = image
  while min(want.width, want.height) >= 512:
    want = want.resize((want.width // 2, want.height // 2), resample=Image.BOX)
  scale = 256 / min(want.width, want.height)
  want = np.array(want.resize((round(want.width * scale), round(want.height * scale)), resample=Image.BICUBIC))
  top, left = (want.shape[0] - 256) // 2, (want.shape[1] - 256) // 2
  if (width, height) == (500, 375):
    assert want.shape == (256, 341, 3) and left == 42
  np.testing.assert_array_equal(images.adm_crop(file.getvalue(), 256), want[top:top + 256, left:left + 256])


def test_adms_crop_takes_grey_and_cmyk_and_leaves_exif_alone():
  rng = np.random.default_rng(0)
  grey = images.adm_crop(making.jpeg(rng, mode="L"), 16)
  assert grey.shape == (16, 16, 3) and (grey[..., 0] == grey[..., 1]).all()
  assert images.adm_crop(making.jpeg(rng, mode="CMYK"), 16).shape == (16, 16, 3)
  image, exif = Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)), Image.Exif()
  exif[0x0112] = 6  # held a quarter turned
  plain, turned = io.BytesIO(), io.BytesIO()
  image.save(plain, "JPEG")
  image.save(turned, "JPEG", exif=exif)
  np.testing.assert_array_equal(images.adm_crop(plain.getvalue(), 16), images.adm_crop(turned.getvalue(), 16))


# A life of kills.


def _start(folder, out, process):
  command = [sys.executable, "-m", PROGRAM, *_arguments(folder, out, "--processes=2", f"--process={process}")]
  return subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8"),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.processes
def test_processes_that_are_killed_leave_the_same_bytes(made, cache, tmp_path):
  """PIFLOW_CACHE_KILLS=20 for the long one."""
  out, rng = tmp_path / "latents", np.random.default_rng(0)
  kills, hit = int(os.environ.get("PIFLOW_CACHE_KILLS", "3")), 0
  while hit < kills:
    pair = [_start(made[0], out, process) for process in range(2)]
    time.sleep(rng.uniform(0.5, 12))
    for process in pair:
      if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        hit += 1
      process.communicate()
    if (out / latent_cache.FILE).exists():  # all was written: what a kill could still spoil is taken away
      for path in [*out.glob("*00002*"), out / latent_cache.FILE]:
        path.unlink()
  for pair in ([_start(made[0], out, process) for process in range(2)],):
    words = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], words
  ours = {name: data for name, data in _bytes(out).items() if not name.endswith(".partial")}
  assert ours == _bytes(cache)


# What does not fit, one line each.


@pytest.fixture
def broken(cache, tmp_path):
  out = tmp_path / "latents"
  out.mkdir()
  for name, data in _bytes(cache).items():
    (out / name).write_bytes(data)
  return out


def _shard(folder):
  return sorted(folder.glob("*.array_record"))[1]


def test_a_torn_shard(broken):
  _shard(broken).write_bytes(_shard(broken).read_bytes()[:-100])
  torn = "^path: .* bytes, its manifest says .*: is it torn"
  with pytest.raises(ValueError, match=torn):
    latent_cache.read_manifest(broken)
  with pytest.raises(ValueError, match=torn):
    latents.make(path=str(broken), held_out="", shape=(), classes=())
  _shard(broken).unlink()
  with pytest.raises(ValueError, match="^path: .* lacks the shard"):
    latent_cache.read_manifest(broken)


def test_a_flipped_bit(broken):
  raw = bytearray(_shard(broken).read_bytes())
  raw[len(raw) // 2] ^= 1
  _shard(broken).write_bytes(raw)
  tiny.refused(PROGRAM, [f"--out={broken}", "--check"], "--out", _shard(broken).name, "is not what was written")


def test_a_whole_cache_is_told(cache, capsys):
  assert tiny.invoke(PROGRAM, [f"--out={cache}", "--check"]) == (0, "")
  out = capsys.readouterr().out
  assert "15 records of 3 classes, whole" in out and "mean of its channels" in out and "0.865" in out


def _edit(folder, **changes):
  tree = json.loads((folder / latent_cache.FILE).read_text())
  (folder / latent_cache.FILE).write_text(json.dumps(tree | changes))


@pytest.mark.parametrize("changes, words", [
    (dict(format=2), "is no manifest of this program"), (dict(count=7), "do not add up"),
    (dict(counts=[15, 0]), "do not add up"), (dict(scale=[1.0]), "scale is not 4 numbers"),
    (dict(shards=3), "is no manifest"), (dict(classes=None), "is no manifest"), (dict(other=1), "is no manifest")])
def test_a_foreign_manifest(changes, words, broken):
  _edit(broken, **changes)
  with pytest.raises(ValueError, match=f"^path: .*{words}"):
    latent_cache.read_manifest(broken)
  (broken / latent_cache.FILE).write_text("[")
  with pytest.raises(ValueError, match="^path: .*is no manifest of this program"):
    latent_cache.read_manifest(broken)


def test_another_order_of_labels_or_another_shape_is_refused(cache):
  def records(**fields):
    found = latents.make(**dict(path=str(cache), held_out="", shape=(8, 8, 4), classes=CLASSES) | fields)
    return found.records("train")

  assert len(records()) == 14
  with pytest.raises(errors.UserError, match="config.data.path: .* other classes, or in another order: label 0 is "
                     "'n01' there, 'n02' here"):
    records(classes=("n02", "n01", "n03"))
  with pytest.raises(errors.UserError, match=r"config.data.path: .* holds latents of \(8, 8, 4\), this run's are"):
    records(shape=(32, 32, 4))
  with pytest.raises(ValueError, match="^path: 'gs://b/c'; give a folder on a local disk"):
    records(path="gs://b/c")


def test_deviations_in_the_place_of_log_variances_are_found(broken):
  manifest = latent_cache.read_manifest(broken)
  data = shards.open_records(broken, manifest)
  records = [latent_cache.decode(data[i], manifest.stored) for i in range(manifest.count)]
  positive = [(label, np.concatenate([x[..., :4], np.exp(x[..., 4:].astype(np.float32) / 2)], -1))
              for label, x in records]
  first = manifest.shards[0]["name"]
  for shard in manifest.shards[1:]:
    (broken / shard["name"]).unlink()
  shards.write_records(broken / first, (latent_cache.encode(*record) for record in positive))
  size = (broken / first).stat().st_size
  _edit(broken, shards=[{"name": first, "records": 15, "bytes": size, "crc32": shards.crc32(broken / first)}])
  tiny.refused(PROGRAM, [f"--out={broken}", "--check"], "no log variance is below 0", "standard deviations")


def test_bad_calls_are_refused(made, cache, tmp_path):
  folder = made[0]
  good = _arguments(folder, tmp_path / "x")
  for arguments, words in (
      ([*good, "--source=zip:x"], ["--source: 'zip:x'"]), ([*good, "--size=15"], ["--size: 15 is no multiple of 2"]),
      ([*good, "--process=2", "--processes=2"], ["--process: 2 is not below"]),
      ([*good, f"--out={cache}", "--size=32"], ["--out", "was begun with another size"]),
      ([*good, "--source=folder:nowhere"], ["--source: folder", "nowhere", "does not exist"]),
      ([*good, f"--source=tars:{folder / 'pictures'}"], ["--source", "is not there"]),
      ([*good, f"--source=repa:{folder}"], ["--autoencoder: repa holds latents already"]),
      ([f"--out={tmp_path / 'x'}", "--check"], ["--out", "holds no manifest.json"])):
    tiny.refused(PROGRAM, arguments, *words)
  assert not (tmp_path / "x").exists()


def test_a_picture_that_cannot_be_decoded_is_named_and_left_out(made, tmp_path, monkeypatch):
  folder = tmp_path / "pictures"
  rng = np.random.default_rng(0)
  for name in CLASSES:
    (folder / name).mkdir(parents=True)
    for i in range(2):
      (folder / name / f"{i}.jpg").write_bytes(making.jpeg(rng))
  (folder / "n02" / "1.jpg").write_bytes(b"no picture")
  arguments = [f"--source=folder:{folder}", *_arguments(made[0], tmp_path / "out")[1:]]
  assert tiny.invoke(PROGRAM, arguments) == (0, "")
  manifest = latent_cache.read_manifest(tmp_path / "out")
  assert manifest.skipped == ("n02/1.jpg",) and manifest.counts == (2, 1, 2)
  monkeypatch.setattr(imagenet, "_SKIPPED", 0)
  tiny.refused(PROGRAM, [*arguments, f"--out={tmp_path / 'out2'}"], "--source: 1 of 6 pictures", "n02/1.jpg")


# Reading and training.


def test_a_draw_is_of_the_posterior_of_either_view(cache):
  manifest = latent_cache.read_manifest(cache)
  data = shards.open_records(cache, manifest)
  _, x = latent_cache.decode(data[0], manifest.stored)
  x = x.copy()
  x[..., 4:] = np.log(0.25)  # a deviation of .5
  draws = jax.vmap(latents.drawer(manifest), (0, None))(jax.random.split(jax.random.key(0), 4000), jax.numpy.asarray(x))
  z = np.asarray(draws, np.float64) / 0.18215
  views = [x[i, ..., :4].astype(np.float64) for i in range(2)]
  near = np.stack([((z - view) ** 2).mean((1, 2, 3)) for view in views], -1)
  which = near.argmin(-1)
  assert abs(which.mean() - 0.5) < 0.04  # 5 deviations of a coin thrown 4,000 times
  for i, view in enumerate(views):
    left = z[which == i] - view
    np.testing.assert_allclose(left.mean((1, 2, 3)).mean(), 0, atol=0.005)
    np.testing.assert_allclose(left.std(), 0.5, rtol=0.01)  # 500,000 values: 0.1% of it is a deviation


def test_training_reads_moments_and_resumes_bit_for_bit(cache, tmp_path):
  def config(steps):
    c = imagenet_dit.get_config("tiny,teacher")
    c.data = latents.config(path=str(cache))
    c.update(batch_size=16, steps=steps, log_every=1, checkpoint_every=2, eval_every=2, image_every=0, eval_batches=1)
    c.network.update(depth=1, width=32, heads=2)
    return c

  assert train_loop.train(config(4), tmp_path / "whole") == 0
  assert train_loop.train(config(2), tmp_path / "parts") == 0
  assert train_loop.train(config(4), tmp_path / "parts") == 0
  whole, parts = tiny.metrics(tmp_path / "whole"), tiny.metrics(tmp_path / "parts")
  assert whole[-1] == parts[-1] and np.isfinite(whole[-1].get("loss", 0))
  known = json.loads((tmp_path / "whole" / "config.json").read_text())["config"]["data"]
  assert known["classes"] == list(CLASSES) and known["shape"] == [8, 8, 4]
