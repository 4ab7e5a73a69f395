"""Prompts in several sizes: which picture goes where, the cache that holds them, and the data that they are."""

import itertools

from etils import epath
import numpy as np
from PIL import Image
import pytest

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.data import loader
from piflow_jax.data import prompt_cache
from piflow_jax.data import prompt_list
from piflow_jax.data import prompt_pictures
from piflow_jax.data import prompts
from piflow_jax.data import spec as spec_lib
from piflow_jax.data import text_encoders
from piflow_jax.data import texts

SIZES = ((8, 8), (6, 12), (12, 6))  # (height, width)


def _encoder():
  """Of two tokens a letter's number tells apart."""
  def encode(given):
    return [{"text": np.full((1 + len(text) % 2, 3), ord((text or " ")[-1]), prompt_cache.BFLOAT16)} for text in given]

  return text_encoders.Encoder("auto:nowhere", 3, 0, False, 2, encode)


def _picture(folder, name, width, height, colour, **how):
  Image.new("RGB", (width, height), colour).save(folder / name, **how)
  return str(folder / name)


@pytest.fixture
def listed(tmp_path):
  """Prompts with pictures: square, wide, tall, and wide by how the camera was held."""
  held = Image.Exif()
  held[0x0112] = 6
  kinds = {"square": (40, 44), "wide": (60, 28), "tall": (20, 50)}
  found = [prompt_list.Prompt(f"{kind} {c}", _picture(tmp_path, f"{kind}{c}.png", *kinds[kind], (ord(c), 0, 0)))
           for c in "abcdefgh" for kind in kinds]
  turned = _picture(tmp_path, "turned.jpg", 28, 60, (0, 0, 0), exif=held)
  return [*found, prompt_list.Prompt("wide turned", turned)]


def _cache(folder, listed, pictures):
  job = prompts.Job(listed, "", _encoder(), pictures, {}, 3)
  return prompts.make(job, epath.Path(folder), 4)


def test_each_picture_goes_to_the_size_of_its_aspect(listed):
  ordered, counts = prompt_pictures.placed(listed, SIZES)
  assert counts == [8, 9, 8] and sorted(ordered) == sorted(listed)
  kinds = [prompt.text.split()[0] for prompt in ordered]
  assert kinds == ["square"] * 8 + ["wide"] * 9 + ["tall"] * 8
  # Of one aspect twice, the nearer area counts; what a list says goes before a picture.
  said = [prompt_list.Prompt("small", None, (500, 510)), prompt_list.Prompt("large", None, (1000, 990)),
          listed[1]._replace(size=(2000, 2000))]
  ordered, counts = prompt_pictures.placed(said, ((1024, 1024), (512, 512)))
  assert [p.text for p in ordered] == ["large", listed[1].text, "small"] and counts == [2, 1]


@pytest.mark.parametrize("text, want", [
    ("32", ((32, 32),)), ("1024x768", ((768, 1024),)), ("64,96x32", ((64, 64), (32, 96)))])
def test_sizes_are_width_by_height(text, want):
  assert prompt_pictures.parsed(text) == want


@pytest.mark.parametrize("text", ["", "0", "12x", "a", "8x8x8", "-4", "8,8x8", "1e3"])
def test_what_is_no_size_is_refused(text):
  with pytest.raises(ValueError, match="size: "):
    prompt_pictures.parsed(text)


def test_a_prompt_without_aspect_and_a_factor_that_does_not_divide_are_refused(listed):
  with pytest.raises(ValueError, match="'none' has neither a picture"):
    prompt_pictures.placed([*listed, prompt_list.Prompt("none")], SIZES)
  with pytest.raises(ValueError, match="12x6 is no multiple of 4"):
    prompt_pictures.without(SIZES[:2], [1, 1], 4)


def _data(path, **fields):
  noun = texts.config(path=str(path), **fields)
  return noun.make(**config_lib.fields_of(noun))


def test_a_cache_of_several_sizes_is_data_of_several_sizes(listed, tmp_path):
  ordered, counts = prompt_pictures.placed(listed, SIZES)
  out = tmp_path / "cache"
  manifest = _cache(out, ordered, prompt_pictures.reader(SIZES, counts, None))
  assert manifest.sizes == ((8, 8, 8), (6, 12, 9), (12, 6, 8)) and manifest.shape == (8, 8, 3)
  assert prompt_cache.check(out).count == 25
  data = _data(out)
  sizes = data.sizes()
  assert data.spec.x_0 == (8, 8, 3) and list(sizes) == [(8, 8, 3), (6, 12, 3), (12, 6, 3)]
  for (rows, columns, _), records in sizes.items():
    both = [*records("train"), *records("held_out")]
    assert len(records("held_out")) == 1 and {r["x_0"].shape for r in both} == {(rows, columns, 3)}
  # A picture's red is its letter's number, the text's too: pictures lie beside their own prompts.
  for records in sizes.values():
    for record in records("train"):
      letter = float(record["cond"]["text"][0, 0])
      red = (record["x_0"][0, 0, 0] + 1) * 127.5
      assert abs(red - letter) < 1e-3 or letter == ord("d") and abs(red) < 3  # "wide turned", a JPEG
  np.testing.assert_array_equal(data.null()["mask"], [1, 0])
  assert list(_data(out, sizes=((12, 6, 3), (8, 8, 3))).sizes()) == [(12, 6, 3), (8, 8, 3)]
  assert _data(out, shape=(6, 12, 3)).records("train")[0]["x_0"].shape == (6, 12, 3)


def test_prompts_alone_keep_their_sizes(tmp_path):
  listed = [prompt_list.Prompt(f"{i}", None, SIZES[i % 3]) for i in range(12)]
  ordered, counts = prompt_pictures.placed(listed, SIZES)
  out = tmp_path / "cache"
  manifest = _cache(out, ordered, prompt_pictures.without(SIZES, counts, 2))
  assert manifest.sizes == ((4, 4, 4), (3, 6, 4), (6, 3, 4)) and manifest.shape == ()
  assert prompt_cache.check(out).count == 12
  data = _data(out, shape=(4, 4, 16))
  assert list(data.sizes()) == [(4, 4, 16), (3, 6, 16), (6, 3, 16)]
  assert data.sizes()[3, 6, 16]("train")[0]["x_0"].shape == (3, 6, 16)
  # The same shards, written by two processes and after a kill, are the same bytes: a shard holds several sizes.
  again = tmp_path / "again"
  job = prompts.Job(ordered, "", _encoder(), prompt_pictures.without(SIZES, counts, 2), {}, 3)
  assert prompts.make(job, epath.Path(again), 4, 0, 2) is None
  assert prompts.make(job, epath.Path(again), 4, 1, 2).sizes == manifest.sizes
  for path in out.glob("*.array_record"):
    assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize("fields, words", [
    (dict(shape=(8, 4, 16)), r"shape: \(8, 4, 16\) is none of the cache's sizes, 4 x 4, 6 x 3"),
    (dict(shape=(4, 4, 16), sizes=((4, 4, 16), (2, 2, 16))), r"shape: \(2, 2, 16\) is none of the cache's"),
    (dict(shape=(4, 4, 16), sizes=((6, 3, 16),)), "sizes: .* that one among them"),
    (dict(shape=(4, 4, 16), sizes=((4, 4, 16), (6, 3, 8))), "sizes: "),
    (dict(shape=(4, 4, 16), sizes=((4, 4, 16), (4, 4, 16))), "sizes: .* each once"),
    (dict(shape=(4, 4, 16), sizes=((4, 4, 16), (0, 4, 16))), "sizes: "),
    (dict(shape=(4, 4, 16), sizes=4), "sizes: 4"),
])
def test_a_size_that_is_not_the_caches_is_refused(fields, words, tmp_path):
  listed = [prompt_list.Prompt(f"{i}", None, (8, 8) if i % 2 else (12, 6)) for i in range(6)]
  ordered, counts = prompt_pictures.placed(listed, ((8, 8), (12, 6)))
  _cache(tmp_path / "cache", ordered, prompt_pictures.without(((8, 8), (12, 6)), counts, 2))
  with pytest.raises((ValueError, errors.UserError), match=words):
    data = _data(tmp_path / "cache", **fields)
    for records in (data.records, *data.sizes().values()):
      records("train")


def test_held_out_prompts_of_their_own_need_only_the_runs_size(tmp_path):
  listed = [prompt_list.Prompt(f"{i}", None, SIZES[i % 3]) for i in range(12)]
  ordered, counts = prompt_pictures.placed(listed, SIZES)
  _cache(tmp_path / "cache", ordered, prompt_pictures.without(SIZES, counts, 1))
  _cache(tmp_path / "held_out", ordered[:6], prompt_pictures.without(SIZES[:2], [4, 2], 1))
  data = _data(tmp_path / "cache", shape=(8, 8, 3), held_out=str(tmp_path / "held_out"))
  assert [len(records("train")) for records in data.sizes().values()] == [4, 4, 4]
  assert [len(records("held_out")) for records in data.sizes().values()] == [4, 2, 0]
  with pytest.raises(errors.UserError, match="config.data.held_out: .* none of the cache's sizes"):
    _data(tmp_path / "cache", shape=(12, 6, 3), held_out=str(tmp_path / "held_out")).records("held_out")


def _sources():
  shapes = {(4, 2): 30, (2, 4): 20, (8, 1): 10}
  return [([{"x_0": np.full(shape, i, np.float32), "cond": {}} for i in range(count)], spec_lib.Spec(shape, {}))
          for shape, count in shapes.items()]


def _batches(n, sources=None, **how):
  iterator = loader.mixed(sources or _sources(), batch_size=4, seed=0, **how)
  return [batch["x_0"] for batch in itertools.islice(iterator, n)]


def test_batches_are_of_one_size_each_in_the_records_shares():
  ahead = _batches(60)
  shapes = [x.shape[1:] for x in ahead]
  assert {shape: shapes.count(shape) for shape in set(shapes)} == {(4, 2): 30, (2, 4): 20, (8, 1): 10}
  assert len(set(shapes[:6])) == 3  # spread evenly, not one after the other
  for batch, later in zip(ahead[17:30], _batches(13, start=17)):  # where a run goes on
    np.testing.assert_array_equal(batch, later)
  mine, theirs = (_batches(60, rows=np.array(rows)) for rows in ([0, 3], [1, 2]))
  for batch, some, others in zip(ahead, mine, theirs):  # processes see the same size at the same step
    np.testing.assert_array_equal(batch[[0, 3, 1, 2]], np.concatenate([some, others]))
  # Each size's own batches are those that it has alone: an epoch holds each record once.
  alone = _batches(5, [_sources()[1]])
  np.testing.assert_array_equal([x for x in ahead if x.shape[1:] == (2, 4)][:5], alone)
  assert sorted(np.concatenate(alone)[:, 0, 0]) == list(range(20))


def test_a_fault_names_the_size_its_record_is_of():
  sources = _sources()
  sources[1][0][7]["x_0"] = np.zeros((2, 2), np.float32)
  with pytest.raises(errors.UserError, match=r"config.data: batch \d of 2 x 4, record 7: x_0 has shape \(2, 2\)"):
    _batches(60, sources)
