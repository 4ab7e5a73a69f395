"""Own pictures: folders and .npz files as a user has them, and each thing that is wrong with them in one line."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from configs import images as recipe
from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.data import images
from piflow_jax.data import loader
from piflow_jax.data import spec
from tests import fake_gcs


def _make(path, **fields):
  config = images.config(path=str(path), **{"size": 8, **fields})
  data = config.make(**{k: v for k, v in config.items() if k != "make"})
  spec.check(data)
  return data


def _pixels(seed=0, height=10, width=12, channels=3):
  return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def _write(path, seed=0, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(_pixels(seed)).save(path, **kwargs)


@pytest.fixture
def classes(tmp_path):
  """Two class folders of six pictures each."""
  for i, name in enumerate(["dog", "cat"]):
    for j in range(6):
      _write(tmp_path / "pets" / name / f"{j}.png", 10 * i + j)
  return tmp_path / "pets"


def _all(records):
  return [records[i] for i in range(len(records))]


def test_class_folders_are_labels_in_alphabetical_order(classes):
  data = _make(classes, flips=False)
  assert data.spec.x_0 == (8, 8, 3) and data.spec.cond == spec.label(2) and tuple(data.names) == ("cat", "dog")
  train, held_out = (spec.checked_records(data, split) for split in ("train", "held_out"))
  assert len(train) + len(held_out) == 12 and len(held_out) >= 1
  by_name = {seed: images.fitted(_pixels(seed), size=8, channels=3, crop=True) for seed in [*range(6), *range(10, 16)]}
  for record in _all(train) + _all(held_out):
    pixels = (record["x_0"] + 1) * np.float32(127.5)
    seed, = (seed for seed, known in by_name.items() if np.array_equal(np.round(pixels), known))
    assert record["cond"]["label"] == (0 if seed >= 10 else 1)
    del by_name[seed]
  assert not by_name  # each picture is in one split, once
  batch = next(loader.batches(train, data.spec, batch_size=4, seed=0))
  assert batch["x_0"].shape == (4, 8, 8, 3) and batch["cond"]["label"].dtype == np.int32


def test_mirror_images_are_a_second_half_of_what_is_trained_on(classes):
  plain, both = _make(classes, flips=False).records("train"), _make(classes).records("train")
  assert len(both) == 2 * len(plain)
  for i in range(len(plain)):
    np.testing.assert_array_equal(both[i]["x_0"], plain[i]["x_0"])
    np.testing.assert_array_equal(both[len(plain) + i]["x_0"], plain[i]["x_0"][:, ::-1])
    assert both[len(plain) + i]["cond"] == plain[i]["cond"]
  assert len(_make(classes).records("held_out")) == len(_make(classes, flips=False).records("held_out"))


def test_more_pictures_do_not_move_those_there_are(classes):
  before = {record["x_0"].tobytes() for record in _all(_make(classes, held_out=0.4).records("held_out"))}
  for j in range(6, 40):
    _write(classes / "cat" / f"{j}.png", 100 + j)
  after = {record["x_0"].tobytes() for record in _all(_make(classes, held_out=0.4).records("held_out"))}
  assert before < after and len(after) < 30
  trained = {record["x_0"].tobytes() for record in _all(_make(classes, held_out=0.4).records("train"))}
  assert not trained & after


def test_a_flat_folder_has_no_labels(tmp_path):
  for i in range(3):
    _write(tmp_path / f"{i}.jpg", i)
  data = _make(tmp_path, channels=1)
  assert data.spec.x_0 == (8, 8, 1) and data.spec.cond == {} and data.found == {"labels": False}
  assert spec.checked_records(data, "train")[0]["cond"] == {} and len(data.records("held_out")) == 1


def test_without_labels_pictures_of_all_folders_are_one_set(classes):
  _write(classes / "loose.png", 50)
  data = _make(classes, labels=False, flips=False)
  assert data.spec.cond == {} and len(data.records("train")) + len(data.records("held_out")) == 13


def test_what_a_workdir_knows_needs_no_pictures(classes):
  found = _make(classes).found
  assert found == {"classes": ("cat", "dog")}
  data = _make("nowhere", **found)
  assert data.spec == _make(classes).spec
  assert spec.conditions(data, ["dog"], num=2)[0]["label"].tolist() == [1, 1]
  assert _make("nowhere", labels=False).spec.cond == {}
  with pytest.raises(errors.UserError, match="config.data.path: 'nowhere' does not exist"):
    data.records("train")
  _write(classes / "bird" / "1.png")
  with pytest.raises(errors.UserError, match="config.data.classes: are cat, dog, but .* has bird, cat, dog"):
    _make(classes, **found).records("train")


def test_files_that_are_no_pictures_are_left_out(classes):
  for name in (".DS_Store", "notes.txt", "cat/labels.csv", "cat/.hidden.png", ".git/x.png", "__MACOSX/cat/0.png",
               "dog/.thumbs/0.png"):
    (classes / name).parent.mkdir(exist_ok=True, parents=True)
    (classes / name).write_bytes(b"no picture")
  data = _make(classes, flips=False)
  assert tuple(data.names) == ("cat", "dog") and len(data.records("train")) + len(data.records("held_out")) == 12


def test_linked_class_folders_and_deeper_ones_are_read(tmp_path, classes):
  (tmp_path / "linked").mkdir()
  for name in ("cat", "dog"):
    (tmp_path / "linked" / name).symlink_to(classes / name)
  _write(classes / "dog" / "puppies" / "1.png", 60)
  data = _make(tmp_path / "linked", flips=False)
  assert len(data.records("train")) + len(data.records("held_out")) == 13


def _encode(image, kind="PNG", **kwargs):
  file = io.BytesIO()
  image.save(file, kind, **kwargs)
  return file.getvalue()


def _fitted(image, kind="PNG", size=8, channels=3, crop=True, **kwargs):
  raw = image if isinstance(image, np.ndarray) else _encode(image, kind, **kwargs)
  return images.fitted(raw, size=size, channels=channels, crop=crop)


def test_a_picture_is_cut_as_in_adm():
  """Against guided-diffusion's center_crop_arr, written out."""
  for width, height in ((8, 8), (9, 8), (12, 10), (50, 33), (33, 50), (7, 5), (100, 16)):
    image = Image.fromarray(_pixels(0, height, width))
    expected = image
    while min(*expected.size) >= 2 * 8:
      expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)
    scale = 8 / min(*expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.BICUBIC)
    expected = np.array(expected)
    y, x = (expected.shape[0] - 8) // 2, (expected.shape[1] - 8) // 2
    np.testing.assert_array_equal(_fitted(image), expected[y:y + 8, x:x + 8])


def test_a_picture_of_the_right_size_is_untouched_and_one_that_is_not_cropped_is_all_there():
  np.testing.assert_array_equal(_fitted(_pixels(0, 8, 8)), _pixels(0, 8, 8))
  halves = np.zeros((16, 64, 3), np.uint8)
  halves[:, 60:] = 255
  assert _fitted(halves, crop=True).max() < 10 and _fitted(halves, crop=False)[:, -1].min() > 100


def test_a_picture_is_cut_to_any_aspect():
  pixels = np.zeros((30, 50, 3), np.uint8)
  pixels[:, :25, 0], pixels[:15, :, 1] = 255, 255  # red is left, green above
  for height, width in ((6, 12), (12, 6), (10, 9), (40, 100)):
    got = _fitted(pixels, size=(height, width))
    assert got.shape == (height, width, 3)
    # Half a cell may go either way.
    assert (got[:, 0, 0] > 250).all() and (got[:, -1, 0] < 5).all() and abs(got[..., 0].mean() - 127.5) < 22
    assert (got[0, :, 1] > 250).all() and (got[-1, :, 1] < 5).all() and abs(got[..., 1].mean() - 127.5) < 22
  np.testing.assert_array_equal(_fitted(_pixels(0, 9, 8), size=(9, 8)), _pixels(0, 9, 8))
  assert _fitted(pixels, size=(6, 12), crop=False).shape == (6, 12, 3)


def test_modes_become_what_a_viewer_shows():
  grey = np.full((8, 8), 100, np.uint8)
  assert (_fitted(Image.fromarray(grey)) == 100).all()
  assert (_fitted(grey) == 100).all() and (_fitted(grey[..., None]) == 100).all()
  assert _fitted(Image.fromarray(_pixels(0, 8, 8)), channels=1).shape == (8, 8, 1)
  cmyk = Image.new("CMYK", (8, 8), (0, 0, 0, 155))
  assert abs(_fitted(cmyk, "TIFF").astype(int) - 100).max() <= 1
  palette = Image.fromarray(np.array([[200, 10, 30]], np.uint8).repeat(64, 0).reshape(8, 8, 3)).quantize(4)
  assert (_fitted(palette, "GIF") == (200, 10, 30)).all()
  assert (_fitted(Image.new("1", (8, 8), 1)) == 255).all()
  # What shines through is white, in every way that a file says it.
  clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
  assert (_fitted(clear) == 255).all() and (_fitted(np.asarray(clear)) == 255).all()
  assert (_fitted(Image.new("LA", (8, 8), (0, 0))) == 255).all()
  assert (_fitted(Image.new("P", (8, 8), 0), transparency=0) == 255).all()
  assert (_fitted(Image.new("RGB", (8, 8), 0), transparency=(0, 0, 0)) == 255).all()
  half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
  assert abs(_fitted(half).astype(int) - 127).max() <= 1
  # Sixteen bits a value.
  deep = Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
  assert (_fitted(deep) == 100).all() and (_fitted(deep, "TIFF") == 100).all()


def test_a_photo_is_turned_as_it_was_held():
  upright = np.zeros((8, 8, 3), np.uint8)
  upright[:4] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # lies on its left side: to be turned by a quarter
  turned = _fitted(Image.fromarray(np.rot90(upright)), exif=exif)
  np.testing.assert_array_equal(turned, upright)


@pytest.mark.parametrize("content", [
    b"", b"no picture at all", _encode(Image.fromarray(_pixels(0, 64, 64)), "JPEG")[:700],
    _encode(Image.fromarray(_pixels(0, 64, 64)))[:2000], _encode(Image.new("F", (8, 8), 0.5), "TIFF"),
    _encode(Image.new("I", (8, 8), 70000), "TIFF"), _encode(Image.new("RGB", (5000, 2)))],
    ids=["empty", "text", "torn JPEG", "torn PNG", "floats", "32 bits", "a line"])
def test_what_will_not_decode_is_named_counted_and_replaced_by_another_of_its_class(classes, content, caplog):
  untouched = _make(classes, flips=False)
  records = untouched.records("train")
  gone = np.flatnonzero([record["cond"]["label"] == 0 for record in _all(records)])[1]
  name = records._pictures.names[records._numbers[gone]]
  (classes / name).write_bytes(content)
  again = spec.checked_records(_make(classes, flips=False), "train")
  assert len(again) == len(records)
  others = [records[i]["x_0"].tobytes() for i in range(len(records)) if i != gone and records[i]["cond"]["label"] == 0]
  for _ in range(3):
    found = again[gone]
    assert found["x_0"].tobytes() in others and found["cond"]["label"] == 0
  lines = [record.getMessage() for record in caplog.records if "cannot be decoded" in record.getMessage()]
  assert len(lines) == 1 and name in lines[0] and "1 of at most" in lines[0] and "\n" not in lines[0]


def test_a_picture_of_another_suffix_is_decoded_by_its_content(classes):
  (classes / "cat" / "0.jpg").write_bytes((classes / "cat" / "0.png").read_bytes())
  (classes / "cat" / "0.png").unlink()
  for split in ("train", "held_out"):
    records = _make(classes).records(split)
    assert len(_all(records)) == len(records) and not records._broken


def test_too_many_that_will_not_decode_are_one_line(tmp_path):
  for i in range(40):
    _write(tmp_path / f"{i:02}.png", i)
    if i % 2:
      (tmp_path / f"{i:02}.png").write_bytes(b"no picture")
  with pytest.raises(errors.UserError, match=r"path: .*: 11 of \d\d pictures cannot be decoded, the last \d\d.png"):
    _all(_make(tmp_path).records("train"))


def test_a_class_without_any_that_will_decode_is_one_line(classes):
  for file in (classes / "cat").iterdir():
    file.write_bytes(b"no picture")
  with pytest.raises(errors.UserError, match="config.data.path: .* no picture of the class of cat/"):
    _all(_make(classes).records("train"))


def test_pictures_that_vanish_while_it_runs_are_one_line(classes):
  records = _make(classes, cache_mib=0).records("train")
  shutil.rmtree(classes)
  with pytest.raises(errors.UserError, match="config.data.path: .*cannot be read") as refused:
    records[0]
  assert "\n" not in str(refused.value)


def test_decoded_pictures_are_kept_where_all_of_them_fit(classes):
  kept, read = _make(classes).records("train"), _make(classes, cache_mib=0).records("train")
  large = _make(classes, size=512, cache_mib=7).records("train")  # 12 x 0.75 MiB
  for records in (kept, read, large):
    _all(records)
  assert len(kept._kept) == len(kept) // 2 and not read._kept and not large._kept


def _npz(path, **arrays):
  np.savez(path, **arrays)
  return path


def _stack(count=10, **kwargs):
  return np.stack([_pixels(i, **kwargs) for i in range(count)])


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
def test_arrays_of_a_file_are_pictures_with_labels(tmp_path, keys):
  stack, labels = _stack(height=8, width=8), np.arange(10) % 3
  data = _make(_npz(tmp_path / "a.npz", **dict(zip(keys, (stack, labels)))), flips=False)
  assert data.spec.cond == spec.label(3) and tuple(data.names) == ("0", "1", "2")
  every = [record for split in ("train", "held_out") for record in _all(spec.checked_records(data, split))]
  assert len(every) == 10
  for record in every:
    seed, = (i for i in range(10) if np.array_equal(np.round((record["x_0"] + 1) * 127.5), stack[i]))
    assert record["cond"]["label"] == labels[seed]


@pytest.mark.parametrize("stack", [
    _stack(channels=1), _stack(channels=3), _stack(channels=4), _stack()[..., 0], _stack(height=100, width=40)])
def test_arrays_of_any_channels_and_size_without_labels_are_pictures(tmp_path, stack):
  for channels in (1, 3):
    data = _make(_npz(tmp_path / "a.npz", images=stack), channels=channels)
    assert data.spec == spec.Spec((8, 8, channels), {}, bounds=(-1, 1))
    spec.checked_records(data, "train")


def test_labels_of_a_file_can_be_left_aside(tmp_path):
  data = _make(_npz(tmp_path / "a.npz", images=_stack(), labels=np.zeros(10, int)), labels=False)
  assert data.spec.cond == {}


IMAGES = _stack()
FILES = {  # arrays of a file, and words of the line that refuses it
    "one-hot": (dict(images=IMAGES, labels=np.eye(10)), ["one-hot", "argmax"]),
    "from 1": (dict(images=IMAGES, labels=np.arange(10) % 5 + 1), ["from 1 to 5", "subtract 1"]),
    "from -1": (dict(images=IMAGES, labels=np.arange(10) - 1), ["from -1 to 8"]),
    "a gap": (dict(images=IMAGES, labels=2 * np.arange(10)), ["no image has 1", "gap"]),
    "2^40": (dict(images=IMAGES, labels=np.array([0] * 9 + [2**40])), ["1099511627776", "no image has 1"]),
    "too few labels": (dict(images=IMAGES, labels=np.arange(9)), ["(9,)", "(10,)"]),
    "a column": (dict(images=IMAGES, labels=np.arange(10)[:, None]), ["(10, 1)", "(10,)"]),
    "float labels": (dict(images=IMAGES, labels=np.arange(10.0)), ["float64", "int32"]),
    "text labels": (dict(images=IMAGES, labels=np.array(["cat"] * 10)), ["labels are <U3"]),
    "one class": (dict(images=IMAGES, labels=np.zeros(10, int)), ["all labels are 0", "labels=False"]),
    "float images": (dict(images=IMAGES / 255), ["float64", "uint8"]),
    "channels first": (dict(images=np.moveaxis(IMAGES, -1, 1)), ["channels first", "moveaxis"]),
    "two channels": (dict(images=IMAGES[..., :2]), ["(10, 10, 12, 2)"]),
    "one picture": (dict(images=IMAGES[:1]), ["one picture only"]),
    "one picture without its stack": (dict(images=IMAGES[0, 0]), ["(12, 3)"]),
    "no pictures": (dict(images=IMAGES[:0]), ["(0, 10, 12, 3)"]),
    "other names": (dict(x_train=IMAGES, y_train=np.arange(10)), ["x_train, y_train", "images"]),
    "objects": (dict(images=np.array([IMAGES[0], None], object)), ["neither a folder nor a whole .npz"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_as_it_should_is_one_line(tmp_path, name):
  arrays, words = FILES[name]
  with pytest.raises((ValueError, errors.UserError), match="^(config.data.)?path: ") as refused:
    _make(_npz(tmp_path / "a.npz", **arrays)).records("train")
  line = str(refused.value)
  assert "\n" not in line and all(word in line for word in words), line


def _empty(folder):
  return folder


def _text(folder):
  (folder / "a.txt").write_text("no picture")
  return folder


def _file(folder):
  (folder / "a.npz").write_bytes(b"no arrays")
  return folder / "a.npz"


def _torn(folder):
  path = _npz(folder / "a.npz", images=IMAGES)
  path.write_bytes(path.read_bytes()[:500])
  return path


def _array(folder):
  np.save(folder / "a.npy", IMAGES)
  return folder / "a.npy"


def _one_class(folder):
  _write(folder / "cat" / "0.png")
  return folder


def _empty_class(folder):
  _write(folder / "cat" / "0.png")
  (folder / "dog").mkdir()
  return folder


def _splits(folder):
  for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
    _write(folder / name / "0.png")
  return folder


def _mixed(folder):
  _write(folder / "0.png")
  _write(folder / "cat" / "0.png")
  return folder


def _one_picture(folder):
  _write(folder / "0.png")
  return folder


PATHS = [
    (_empty, ["no pictures", ".png"]), (_text, ["no pictures"]), (_file, ["neither a folder nor a whole .npz"]),
    (_torn, ["neither a folder nor a whole .npz"]), (_array, ["neither a folder nor a whole .npz"]),
    (_one_class, ["one class folder only (cat)", "labels=False"]), (_empty_class, ["without a picture (dog)"]),
    (_splits, ["splits, not classes (train, val)", "/train"]), (_mixed, ["0.png", "cat", "labels=False"]),
    (_one_picture, ["one picture only"])]


@pytest.mark.parametrize("write, words", PATHS, ids=[write.__name__ for write, _ in PATHS])
def test_a_path_that_is_not_as_it_should_is_one_line(tmp_path, write, words):
  with pytest.raises((ValueError, errors.UserError), match="^(config.data.)?path: ") as refused:
    _make(write(tmp_path)).records("train")
  line = str(refused.value)
  assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize("path, words", [
    ("", "give a folder"), ("nowhere/at/all", "does not exist"), ("s3://bucket/x", "cannot be read"),
    ("~/nowhere", "does not exist"), ("a\0b", "")])
def test_paths_that_lead_nowhere_are_one_line(path, words):
  with pytest.raises(ValueError, match="^path: ") as refused:
    _make(path)
  assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_that_may_not_be_read_is_one_line(monkeypatch):
  def refuse(*_):
    raise PermissionError("Permission denied\nby somebody")

  monkeypatch.setattr(images.epath, "Path", refuse)
  with pytest.raises(ValueError, match="^path: .*PermissionError: Permission denied by somebody"):
    _make("anywhere")


@pytest.mark.parametrize("field, values", [
    ("size", [0, -1, 1.5, float("nan"), float("inf"), 1e30, 2**40, "x", True]),
    ("channels", [0, -1, 2, 4, float("nan"), float("inf"), 1e30, 2**40, "x"]),
    ("held_out", [0, -1, 1, float("nan"), float("inf"), 1e30, 2**40, "x"]),
    ("cache_mib", [-1, float("nan"), float("inf"), 1e30, 2**40, "x"]),
    ("crop", [-1, float("nan"), 1e30, "x"]), ("flips", [-1, 2, "x"]), ("labels", [-1, "x"]),
    ("path", [0, -1, float("nan"), 2**40, None, ("a", "b")]),
    ("classes", [0, -1, float("nan"), "x", ("a", "a"), ("a",)]),
])
def test_fields_that_make_no_sense_are_refused(classes, field, values):
  for value in values:
    with pytest.raises(ValueError, match=f"^{field}: "):
      images.make(**{k: v for k, v in images.config(path=str(classes)).items() if k != "make"} | {field: value})


@pytest.mark.parametrize("role, labels", [("teacher", True), ("student,2", True), ("student", False)])
def test_the_recipe_fits_pictures_with_and_without_labels(classes, role, labels):
  config = recipe.get_config(role)
  config.data.update(path=str(classes), labels=labels)
  run = build.run(config)
  assert run.data.spec.x_0 == (32, 32, 3) and len(run.data.names) == (2 if labels else 0)
  shapes = run.teacher_shapes or {}
  assert ("class_embed" in shapes) == (labels and role != "teacher")
  assert config_lib.is_noun(config.evaluation.features)


def test_the_recipe_has_the_roles_that_it_says():
  for argument in ("painter", "student,0", "student,x", "student,-1", ""):
    with pytest.raises(ValueError, match="teacher, student"):
      recipe.get_config(argument)
  assert recipe.get_config("student,4").method.nfe == recipe.get_config("student,4").sampling.nfe == 4


_READ = """
from piflow_jax.data import images, spec
for path in ("gs://bucket/pets", "gs://bucket/a.npz"):
  data = images.make(path=path, **{k: v for k, v in images.config(size=8).items() if k not in ("make", "path")})
  records = {split: spec.checked_records(data, split) for split in ("train", "held_out")}
  print(data.names, len(records["train"]) // 2 + len(records["held_out"]))
try:
  images.make(path="gs://bucket/none", **{k: v for k, v in images.config().items() if k not in ("make", "path")})
except ValueError as e:
  print(e)
"""


@pytest.mark.slow
def test_pictures_in_a_bucket_are_read(tmp_path):
  _write(tmp_path / "0.png")
  with fake_gcs.serve() as bucket:
    for name in ("cat/0", "cat/1", "dog/0", "dog/deep/1"):
      bucket.put(f"pets/{name}.png", (tmp_path / "0.png").read_bytes())
    bucket.put("pets/dog/", b"")  # what some programs leave as a folder
    bucket.put("pets/notes.txt", b"no picture")
    bucket.put("a.npz", _npz(tmp_path / "a.npz", images=_stack(), labels=np.arange(10) % 2).read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", _READ], env=os.environ | bucket.environment, capture_output=True, text=True)
  lines = done.stdout.splitlines()
  assert lines[:2] == ["('cat', 'dog') 4", "('0', '1') 10"], done.stderr
  assert lines[2].startswith("path: 'gs://bucket/none' does not exist")
