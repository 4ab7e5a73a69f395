"""Measuring batch by batch: against whole arrays, however the samples are split; draws by number; what is refused."""

import copy
import functools
import io
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax.data import digits
from piflow_jax.data import gaussians
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import extract
from piflow_jax.evaluation import measure
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import statistics
from tests import tiny


def _means(x_0):
  """Four features: the mean of each corner's pixels."""
  x = np.asarray(x_0, np.float64).reshape(len(x_0), 2, -1, 2, x_0.shape[2] // 2)
  return x.mean((2, 4)).reshape(len(x_0), 4)


def _brightness(x_0):
  """A label by how bright the picture is."""
  return (np.asarray(x_0).mean((1, 2, 3)) * 20).round().astype(int) % 10


def _features(data):
  del data
  return extract.Features(_means, _brightness, "means of corners")


def _noun(make=_features):
  return config_lib.noun(make, {}, {})


def _bench(data=None, *, features=True, samples=40, batch_size=16, seed=0, devices=1):
  config = config_lib.base()
  config.evaluation.update(samples=samples, batch_size=batch_size, seed=seed)
  if features:
    config.evaluation.features = features if features is not True else _noun()
  run = types.SimpleNamespace(data=data or digits.make())
  return measure.Bench(config, run, sharding.make_mesh(devices, 1, devices=jax.devices()[:devices]))


def _bar():
  return tqdm.tqdm(file=io.StringIO(), disable=True)


def _model(f, name="model", calls=1):
  return draws.Model(name, calls, jax.jit(f))


def _half(batch, seed):
  """x_0 a function of noise, label and number, so that a mistake in any of them is seen."""
  del seed
  label = batch["cond"]["label"].astype(jnp.float32)[:, None, None, None]
  number = batch["index"].astype(jnp.float32)[:, None, None, None]
  return 0.5 * batch["noise"] + 0.1 * label + 0.01 * number


def _exact(batch, seed):
  return _half(batch, seed) + 0.2 * jnp.sin(9 * batch["noise"])


def _whole(f, samples, seed=0, stream=0):
  """What a model of the digits draws, by today's noise all at once."""
  key = jax.random.fold_in(jax.random.key(seed), stream)
  index = jnp.arange(samples, dtype=jnp.int32)
  batch = {"noise": jax.random.normal(key, (samples, 8, 8, 1)), "cond": {"label": index % 10}, "index": index}
  return np.asarray(jax.jit(f)(batch, seed)), np.asarray(index % 10)


def test_a_sample_s_noise_is_of_its_seed_stream_and_number(monkeypatch):
  whole = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(3), 1), (50, 2, 2, 3)))
  rows = draws.Noises(3, 1, 50, (2, 2, 3)).rows
  np.testing.assert_array_equal(rows(0, 50), whole)
  np.testing.assert_array_equal(rows(17, 29), whole[17:29])
  few = draws.Noises(3, 1, 20, (2, 2, 3)).rows
  np.testing.assert_array_equal(few(0, 20), whole[:20])
  assert not np.array_equal(draws.Noises(3, 0, 50, (2, 2, 3)).rows(0, 50), whole)
  # Many large ones are drawn block by block, in blocks that the shape alone determines.
  monkeypatch.setattr(draws, "_BLOCK", 8 * 12)
  blocks = draws.Noises(3, 1, 50, (2, 2, 3)).rows
  np.testing.assert_array_equal(blocks(0, 8), whole[:8])
  joined = np.concatenate([blocks(start, min(start + 7, 50)) for start in range(0, 50, 7)])
  np.testing.assert_array_equal(joined, blocks(0, 50))
  np.testing.assert_array_equal(draws.Noises(3, 1, 33, (2, 2, 3)).rows(20, 33), joined[20:33])
  assert len(np.unique(joined)) == joined.size


def test_values_are_those_of_whole_arrays():
  bench = _bench()
  reference, other = bench.measure([_model(_exact), _model(_half)], 0, _bar())
  fresh, = bench.measure([_model(_exact)], 0, _bar(), draws.FRESH)
  samples, labels = _whole(_half, 40)
  ends, own = _whole(_exact, 40)[0], _whole(_exact, 40, stream=draws.FRESH)[0]
  held_out = digits.arrays("held_out")[0]
  found = bench.values(other, reference, fresh)
  distance = lambda f, a, b: statistics.frechet_distance(statistics.of(f(a)), statistics.of(f(b)))
  flat = lambda x: x.reshape(len(x), -1)
  precision, recall = metrics.precision_recall(_means(held_out), _means(samples), 3)
  expected = dict(
      frechet=distance(_means, held_out, samples), frechet_to_teacher=distance(_means, own, samples),
      pixel_frechet=distance(flat, held_out, samples), pixel_frechet_to_teacher=distance(flat, own, samples),
      precision=precision, recall=recall, accuracy=metrics.accuracy(_brightness(samples), labels),
      diversity=metrics.class_diversity(samples, labels), endpoint_error=metrics.endpoint_error(samples, ends, labels))
  assert found.pop("seconds_per_1000") > 0 and found.pop("agreement") is None and found.pop("clip_score") is None
  assert found.keys() == expected.keys()
  for key in expected:
    np.testing.assert_allclose(found[key], expected[key], rtol=1e-10, err_msg=key)
  assert bench.values(reference, reference, fresh)["endpoint_error"] == 0
  assert bench.held_out.count == 360 and bench.train.count == 1437


@pytest.mark.parametrize("batch_size, devices", [(40, 1), (7, 1), (1, 1), (16, 8), (10**6, 8)])
def test_batches_and_devices_do_not_change_what_is_measured(batch_size, devices):
  found = []
  for size, parts in ((16, 1), (batch_size, devices)):
    bench = _bench(batch_size=size, devices=parts, seed=5)
    tallies = bench.measure([_model(_exact), _model(_half)], 5, _bar())
    fresh, = bench.measure([_model(_exact)], 5, _bar(), draws.FRESH)
    found.append([bench.values(tally, tallies[0], fresh) for tally in tallies])
    assert [sorted(tally.shown) for tally in tallies] == [list(range(20))] * 2
    np.testing.assert_array_equal(tallies[1].shown[3], _whole(_half, 40, seed=5)[0][3])
  for one, other in zip(*found):
    for key in one.keys() - {"seconds_per_1000", "agreement", "clip_score"}:
      np.testing.assert_allclose(one[key], other[key], rtol=1e-9, err_msg=key)


def test_what_processes_took_in_adds_up():
  """Each a part of the batches' rows: the tallies of two, merged, are that of one."""
  bench = _bench()
  batches = list(bench.batches(0))
  whole, parts = measure.Tally(), [measure.Tally(), measure.Tally()]
  for batch in batches:
    x = np.asarray(_half(batch.placed, 0))
    ends = np.asarray(_exact(batch.placed, 0))
    bench._take(whole, x[batch.own], ends[batch.own], batch.index, is_reference=True)
    for part, tally in enumerate(parts):
      mine = slice(part, None, 2)
      share = batch._replace(own=batch.own[mine], index=batch.index[mine])
      bench._take(tally, x[share.own], ends[share.own], share.index, is_reference=True)
  merged = copy.deepcopy(parts[0])
  merged._merge(parts[1])
  assert merged.count == 40 and sorted(merged.shown) == sorted(whole.shown)
  one, two = bench.values(whole, whole, whole), bench.values(merged, merged, whole)
  for key in one.keys() - {"seconds_per_1000", "agreement", "clip_score"}:
    np.testing.assert_allclose(one[key], two[key], rtol=1e-9, atol=1e-9, err_msg=key)


def test_rows_of_a_batch_belong_to_one_process_each():
  class Device:
    def __init__(self, process):
      self.process_index = process

  class Placed:
    def __init__(self, mesh, spec):
      del mesh, spec

    def devices_indices_map(self, shape):
      # Eight rows over four devices of two processes, two of which hold the same: layers are split too.
      del shape
      return {Device(process): (rows,) for process, rows in (
          (0, slice(0, 4)), (1, slice(0, 4)), (1, slice(4, 8)), (1, slice(4, 8)))}

  before = jax.NamedSharding, jax.process_count, jax.process_index
  try:
    jax.NamedSharding, jax.process_count = Placed, lambda: 2
    found = []
    for process in range(2):
      jax.process_index = lambda process=process: process
      found.append(draws.own_rows(None, 8).tolist())
  finally:
    jax.NamedSharding, jax.process_count, jax.process_index = before
  assert found == [[0, 1, 2, 3], [4, 5, 6, 7]]


def _records(x_0, conds):
  return [{"x_0": x, "cond": cond} for x, cond in zip(x_0, conds)]


def test_conditions_that_are_no_labels_come_from_held_out_records():
  rng = np.random.default_rng(0)
  texts = rng.standard_normal((6, 4, 3)).astype(np.float32)
  x_0 = rng.standard_normal((6, 5)).astype(np.float32)
  records = _records(x_0, [{"text": text, "length": np.int32(i)} for i, text in enumerate(texts)])
  spec = spec_lib.Spec((5,), {"text": spec_lib.Array((4, 3), "float32"), "length": spec_lib.Array((), "int32")})
  bench = _bench(spec_lib.Data(spec, lambda split: records), features=None, samples=14, batch_size=4)
  conds = [batch.placed["cond"] for batch in bench.batches(0)]
  got = np.concatenate([cond["text"] for cond in conds])[:14]
  np.testing.assert_array_equal(got, texts[np.arange(14) % 6])
  assert conds[0]["length"].dtype == np.int32 and conds[0]["length"].tolist() == [0, 1, 2, 3]
  assert [bench.labels(batch.index).tolist() for batch in bench.batches(0)] == [[0] * 4] * 3 + [[0] * 2]
  # Points have no picture and no classes, but distances and errors.
  model = _model(lambda batch, seed: batch["noise"] + batch["cond"]["text"].mean((1, 2))[:, None])
  shifted = _model(lambda batch, seed: 1.1 * batch["noise"] + batch["cond"]["text"].mean((1, 2))[:, None])
  tallies = bench.measure([model, shifted], 0, _bar())
  found = bench.values(tallies[1], *tallies[:1] * 2)
  assert not tallies[0].shown
  assert {key for key, value in found.items() if value is None} == {
      "frechet", "frechet_to_teacher", "precision", "recall", "accuracy", "agreement", "clip_score"}
  assert 0 < found["endpoint_error"] < 0.2 and found["pixel_frechet"] > 0
  assert "config.evaluation.features is not set" in bench.remarks()[0]
  unconditional = spec_lib.Data(spec_lib.Spec((5,), {}), lambda split: _records(x_0, [{}] * 6))
  assert next(_bench(unconditional, features=None, samples=5, batch_size=5).batches(0)).placed["cond"] == {}


@pytest.mark.parametrize("alike", [False, True])
def test_samples_agree_with_the_record_whose_text_they_were_drawn_by(alike):
  rng, n = np.random.default_rng(0), 40
  texts = rng.standard_normal((n, 2, 3)).astype(np.float32)
  x_0 = np.zeros((n, 6), np.float32) if alike else texts.reshape(n, 6)  # "pictures" that say their text
  spec = spec_lib.Spec((6,), {"text": spec_lib.Array((2, 3), "float32")})
  data = spec_lib.Data(spec, lambda split: _records(x_0, [{"text": text} for text in texts]))
  noun = config_lib.noun(lambda data: extract.Features(np.asarray, None, "its own values"), {}, {})
  bench = _bench(data, features=noun, samples=60, batch_size=16)
  tellers = [_model(lambda batch, seed, i=i: jnp.roll(batch["cond"]["text"].reshape(-1, 6), i, axis=0)) for i in (0, 1)]
  right, wrong = bench.measure(tellers, 0, _bar())
  values = [bench.values(tally, right, right)["agreement"] for tally in (right, wrong)]
  np.testing.assert_array_equal(bench.real(np.arange(45)), x_0[np.arange(45) % 30])  # 30 of them are drawn by, twice
  if alike:  # a cache of prompts without pictures
    assert values == [None, None]
  else:
    assert values[0] == 1 and values[1] < 0.4  # by chance 5 of 40


def test_each_text_is_drawn_by_twice_and_diversity_is_between_its_own_samples():
  n = 40
  texts = np.arange(n, dtype=np.float32).reshape(n, 1, 1)
  spec = spec_lib.Spec((3,), {"text": spec_lib.Array((1, 1), "float32")})
  data = spec_lib.Data(spec, lambda split: _records(np.zeros((n, 3), np.float32), [{"text": text} for text in texts]))
  bench = _bench(data, features=None, samples=24, batch_size=10)
  np.testing.assert_array_equal(bench.conditions(np.arange(24)), np.tile(np.arange(12), 2))
  got = np.concatenate([batch.placed["cond"]["text"][np.asarray(batch.own)] for batch in bench.batches(0)])
  np.testing.assert_array_equal(got[:, 0, 0], np.tile(np.arange(12), 2))

  # It says the text, the second time 3 more: samples of one text differ by 3, those of others by more.
  def draw(batch, seed):
    return jnp.repeat(10 * batch["cond"]["text"][:, 0] + 3.0 * (batch["index"][:, None] >= 12), 3, axis=1)

  tally, = bench.measure([_model(draw)], 0, _bar())
  assert bench.values(tally, tally, tally)["diversity"] == pytest.approx(3.0)


def test_samples_are_scored_with_the_texts_that_they_were_drawn_by():
  rng, n = np.random.default_rng(0), 10
  texts = rng.standard_normal((n, 1, 4)).astype(np.float32)

  class Records(list):
    def prompt(self, i):
      return f"text {i}"

  def score(features, names):  # 1 where a row says its text's number, as `records` below say it
    return np.array([float(np.allclose(row, texts[int(name.split()[1])])) for row, name in zip(features, names)])

  spec = spec_lib.Spec((4,), {"text": spec_lib.Array((1, 4), "float32")})
  records = Records({"x_0": text[0] if i < 6 else 0 * text[0], "cond": {"text": text}} for i, text in enumerate(texts))
  noun = config_lib.noun(lambda data: extract.Features(np.asarray, None, "its own values", score), {}, {})
  bench = _bench(spec_lib.Data(spec, lambda split: records), features=noun, samples=25, batch_size=8)
  assert bench.held_out.scores == 6
  right = _model(lambda batch, seed: batch["cond"]["text"][:, 0])
  first = _model(lambda batch, seed: jnp.where(batch["index"][:, None] < 5, batch["cond"]["text"][:, 0], 0.0))
  tallies = bench.measure([right, first], 0, _bar())
  assert [bench.values(tally, tallies[0], tallies[0])["clip_score"] for tally in tallies] == [1.0, 5 / 25]


def test_pixels_of_large_samples_have_no_covariance():
  large = _bench(gaussians.make(shape=(64, 32, 3), num_classes=2), features=None, samples=8, batch_size=4)
  tallies = large.measure([_model(lambda batch, seed: batch["noise"])], 0, _bar())
  found = large.values(tallies[0], tallies[0], tallies[0])
  assert found["pixel_frechet"] is None and tallies[0].pixels.count == 0
  assert {key for key, value in found.items() if value is not None} == {
      key for key, metric in metrics.METRICS.items() if set(metric.needs) <= large.have} == {
          "diversity", "endpoint_error", "seconds_per_1000"}
  assert found["diversity"] > 0 and found["endpoint_error"] == 0


def test_a_model_that_diverges_has_no_figures_and_harms_no_other():
  def lost(batch, seed):
    return jnp.where(batch["index"][:, None, None, None] == 37, jnp.nan, _half(batch, seed))

  bench = _bench()
  tallies = bench.measure([_model(_exact), _model(lost), _model(_half)], 0, _bar())
  assert [tally.finite for tally in tallies] == [True, False, True]
  values = [bench.values(tally, tallies[0], tallies[0]) for tally in tallies]
  assert all(value is None for key, value in values[1].items() if key != "seconds_per_1000")
  assert [key for key, value in values[2].items() if value is None] == ["agreement", "clip_score"]
  # Nobody can be near to the end points of a reference that has none.
  tallies = bench.measure([_model(lost), _model(_half)], 0, _bar())
  found = bench.values(tallies[1], tallies[0], tallies[1])
  assert found["endpoint_error"] is None and found["frechet"] > 0


def test_a_model_is_drawn_by_its_own_schedule_and_by_number():
  """A flow map whose end has the times that it was asked for, against the sampler itself; h > 0 draws by the number."""
  clock = flow.Clock(3.0, total_substeps=16, nfe=2, final_scale=0.5)
  plain = flow.Clock.of_shift(1.0).replace(nfe=2)

  def flow_map(x, tau_src, tau_dst):
    return x * (1 + tau_src + 2 * tau_dst)[:, None, None, None]

  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  bench = _bench(batch_size=16)
  way = jax.random.fold_in(jax.random.key(7), draws._WAY)
  keys = jax.vmap(functools.partial(jax.random.fold_in, way))(jnp.arange(40))
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), 0), (40, 8, 8, 1))
  for own, h in ((clock, 0.5), (plain, 0.0), (plain, 0.5)):
    draw = draws.drawer(mesh, lambda weights, cond: flow_map, own, h)
    got = np.concatenate([draw(None, batch.placed, 7) for batch in bench.batches(7)])[:40]
    np.testing.assert_allclose(got, sampler.sample(flow_map, noise, keys, own, h=h), rtol=1e-5)
  assert not np.allclose(sampler.sample(flow_map, noise, keys, clock, h=0.5), got, rtol=0.01)


def test_drawers_take_a_run_s_own_clock(monkeypatch):
  asked = []
  monkeypatch.setattr(draws, "drawer", lambda mesh, flow_map_of, clock, h=0.0: asked.append((clock, h)))
  config = tiny.config("student,2", method__final_scale=0.5, sampling__h=0.25)
  run = build.run(config)
  draws.model_drawer(None, config, run, 4)
  draws.teacher_drawer(None, run, 8)
  (own, h), (teacher, none) = asked
  assert (own.nfe, own.final_scale, own.total_substeps, h) == (4, 0.5, 16, 0.25)
  assert (teacher.nfe, teacher.final_scale, none) == (8, 1.0, 0.0)


def test_few_samples_are_remarked_on():
  assert not _bench(samples=360, batch_size=360).remarks()
  remark, = _bench(samples=39).remarks()
  assert "39 samples and 360 held-out ones are few for 4 features" in remark and "too large, by about" in remark


def _never(data):
  raise AssertionError("features are made before the samples are counted")


@pytest.mark.parametrize("samples, words", [
    (1, "config.evaluation.samples: 1 is less than 4, one and its 3 nearest"),
    (3, "config.evaluation.samples: 3 is less than 4"),
    (10, "config.evaluation.samples: 10 is less than 20, two of each of 10 classes"),
    (19, "config.evaluation.samples: 19 is less than 20"),
])
def test_too_few_samples_are_refused_before_anything_is_made(samples, words):
  with pytest.raises(errors.UserError, match=words):
    _bench(samples=samples, features=_noun(_never))


def test_held_out_records_that_features_need():
  black = _records(np.zeros((3, 8, 8, 1), np.float32), [{}] * 3)
  few = spec_lib.Data(spec_lib.Spec((8, 8, 1), {}), lambda split: black)
  with pytest.raises(errors.UserError, match="config.data: held_out: 3 records; features are compared with those of 4"):
    _bench(few, features=_noun(_never))
  with pytest.raises(errors.UserError, match="config.evaluation.features.width: 0 is"):
    _bench(features=_noun(_refusing))


def _refusing(data):
  raise ValueError("width: 0 is too little")


def test_real_pictures_are_of_the_labels_asked_for():
  data = digits.make()
  labels = np.array([3, 1, 3, 9, 3, 1])
  found = measure.real_like(data, labels)
  images, classes = digits.arrays("train")
  for place, label in enumerate(labels):
    number = int(np.sum(labels[:place] == label))  # another one each time
    np.testing.assert_array_equal(found[place], images[classes == label][number])
  one = _records(np.ones((1, 8, 8, 1), np.float32), [{"label": np.int32(0)}])
  few = data._replace(records=lambda split: one)
  assert measure.real_like(few, np.array([0, 0, 5])).mean((1, 2, 3)).tolist() == [1, 1, 0]  # grey where there is none


@pytest.mark.parametrize("shape, classes, samples, shown", [
    ((8, 8, 1), 10, 2000, 20), ((8, 8, 1), 10, 12, 12), ((8, 8, 1), 2, 100, 4), ((64, 64, 3), 1000, 5000, 20),
    ((256, 256, 3), 1000, 5000, 6), ((16, 256, 256, 3), 0, 100, 4), ((2,), 0, 100, 20)])
def test_a_picture_holds_as_many_as_can_be_seen(shape, classes, samples, shown):
  assert math.prod(shape) and measure._number_shown(shape, classes, samples) == shown
