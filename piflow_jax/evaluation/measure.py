"""Models measured batch by batch: the same noises through all of them, and statistics kept instead of samples.

Every process takes in the samples that lie on its own devices; `Tally.gather` puts the parts together at the end.
"""

import math
import time

import jax
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import images
from piflow_jax import sharding
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import extract
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import statistics

NEAREST = 3  # the neighbour that sets the radius of a ball in precision and recall
_AGREEING = 5  # a sample agrees with its record where fewer others are nearer
_MOST_PIXELS = 1024  # values of a sample: the distance between covariances of 4,096 takes minutes
_MOST_RECORDS = 50_000  # real ones that are looked at
_MOST_FEATURES = 10_000  # rows kept for precision and recall, which take each against each
_MOST_KEPT = 2**25  # values of samples kept for the distances within a class
_SHOWN = 20  # samples in a picture, at most


class Tally:
  """What is kept of one model's samples, or of real ones.

  Attributes:
    count: samples.
    finite: whether all of them are numbers; what comes after one that is none is not taken in.
    features, pixels: Statistics.
    correct: samples that are classified as they are labelled.
    agreeing: samples that lie near the record that they were drawn by, see `metrics.agreeing`.
    scores: of samples with their texts, summed.
    errors: {label: squared errors}, see `metrics.squared_errors`.
    spread: metrics.Spread.
    shown: {number of a sample: sample} of the first ones.
    seconds: for 1000 samples; None of real ones.
  """

  def __init__(self):
    # As many from each process: those that lie on the first few devices alone could be of some classes only.
    parts = jax.process_count()
    self.count, self.finite, self.correct, self.agreeing, self.scores, self.seconds = 0, True, 0, 0, 0.0, None
    self.features, self.pixels = statistics.Statistics(keep=-(-_MOST_FEATURES // parts)), statistics.Statistics()
    self.errors, self.spread, self.shown = {}, metrics.Spread(), {}
    self._room, self._kept = _MOST_KEPT // parts, []

  def keep(self, samples, labels):
    """Keep samples [n, ...] of labels [n], what they are drawn by, for distances within it, as far as there is room."""
    rows = min(len(samples), self._room // max(math.prod(samples.shape[1:]), 1))
    self._room -= rows * math.prod(samples.shape[1:])
    self._kept.append((samples[:rows].copy(), np.array(labels[:rows])))

  def add_errors(self, samples, reference, labels):
    """Take in squared errors of samples [n, ...] against the reference's of the same noises."""
    self._sum_errors(metrics.squared_errors(samples, reference, labels))

  def _sum_errors(self, found):
    for label, error in found.items():
      self.errors[label] = self.errors.get(label, 0.0) + error

  def diversity(self):
    """`metrics.class_diversity` of the samples kept; None where no two are of one class or condition."""
    samples, labels = (np.concatenate(parts) for parts in zip(*self._kept))
    if len(labels) < 2 or np.unique(labels, return_counts=True)[1].max() < 2:
      return None
    return metrics.class_diversity(samples, labels)

  def gather(self):
    """This tally with all that other processes took in; a call for all of them."""
    for other in draws.from_all(self)[1:]:
      self._merge(other)
    return self

  def _merge(self, other):
    self.count, self.finite = self.count + other.count, self.finite and other.finite
    self.correct += other.correct
    self.agreeing += other.agreeing
    self.scores += other.scores
    self.features.merge(other.features)
    self.pixels.merge(other.pixels)
    self.spread.merge(other.spread)
    self._sum_errors(other.errors)
    self.shown |= other.shown
    self._kept += other._kept


class Bench:
  """What models of one data set are held against.

  Attributes:
    data: data.spec.Data.
    features: extract.Features, or None.
    have: what there is of `metrics.Metric.needs`.
    classes: labels that samples are drawn by, where these are all that conditions; else 0.
    samples, seed: of config.evaluation.
    held_out, train: Tally of real ones.
  """

  def __init__(self, config, run, mesh):
    """Reads the data and makes the features. Raises errors.UserError before anything is drawn."""
    c = config.evaluation
    self.data, self.samples, self.seed, self._mesh = run.data, c.samples, c.seed, mesh
    self.classes = spec_lib.num_classes(self.data.spec)
    self._shape = tuple(self.data.spec.x_0)
    parts = sharding.sample_parts(mesh)
    self._size = -(-min(c.batch_size, c.samples) // parts) * parts
    check_samples(c.samples, self.data.spec)
    records = spec_lib.checked_records(self.data, "held_out")
    # Two noises of a condition at least, by which diversity is measured.
    self._conditions_drawn = max(min(len(records), c.samples // 2), 1)
    self._conditions = draws.conditions_of(self.data.spec, records, self._conditions_drawn)
    if c.features is not None and len(records) <= NEAREST:
      raise errors.UserError(f"config.data: held_out: {len(records)} records; features are compared with those "
                             f"of {NEAREST + 1} or more")
    self.features = None
    if c.features is not None:
      with build.field("evaluation.features"):
        self.features = c.features.make(self.data, **config_lib.fields_of(c.features))
    known = {"teacher": True, "clock": True, "features": self.features is not None,
             "labels": bool(self.classes) and self.features is not None and self.features.predict is not None,
             "pixels": math.prod(self._shape) <= _MOST_PIXELS}
    self.have = {need for need, met in known.items() if met}
    self._text_of = getattr(records, "prompt", None)
    if self._text_of is not None and self.features is not None and self.features.score is not None:
      self.have.add("texts")
    self.shown = _number_shown(self._shape, self.classes, self.samples)
    self.held_out, self.train = (self._real(split) for split in ("held_out", "train"))
    # Of a cache of prompts alone all pictures are alike; and of several processes each has kept features of its own.
    if self.features is not None and not self.classes and self.data.spec.cond and jax.process_count() == 1 and np.ptp(
        self.held_out.features.rows, axis=0).any():
      self.have.add("conditions")

  def batches(self, seed, stream=draws.NOISE):
    """draws.Batch of all samples of a seed."""
    noises = draws.Noises(seed, stream, self.samples, self._shape)
    return draws.batches(noises, self._conditions, self.samples, self._size, self._mesh)

  def labels(self, index):
    """[n] classes of samples by number; where a label is not all that conditions, all are of one class."""
    return index % max(self.classes, 1)

  def conditions(self, index):
    """[n] what samples are drawn by: their class, else the number of the record whose condition it is, else 0."""
    if self.classes or not self.data.spec.cond:
      return self.labels(index)
    return index % self._conditions_drawn

  def real(self, index):
    """x_0 [n, ...] of real records beside samples by number: those that they are drawn by, or `real_like` a class."""
    if self.classes or not self.data.spec.cond:
      return real_like(self.data, self.labels(index))
    records = self.data.records("held_out")
    return np.stack([records[int(i)]["x_0"] for i in self.conditions(index)])

  def measure(self, models, seed, bar, stream=draws.NOISE):
    """The Tally of each draws.Model over all samples of a seed; squared errors are against the first one's samples."""
    tallies, seconds, batches = [Tally() for _ in models], np.zeros(len(models)), 0
    for batch in self.batches(seed, stream):
      reference = None
      for i, (model, tally) in enumerate(zip(models, tallies)):
        if not batches:
          jax.block_until_ready(model.draw(batch.placed, seed))  # compiles
        began = time.perf_counter()
        x_0 = jax.block_until_ready(model.draw(batch.placed, seed))
        seconds[i] += time.perf_counter() - began
        samples = draws.rows_of(x_0, batch.own)
        reference = samples if reference is None else reference
        self._take(tally, samples, reference, batch.index, is_reference=i == 0)
        bar.update(min(self._size, self.samples - batches * self._size))
      batches += 1
    for tally, spent in zip(tallies, seconds):
      tally.gather().seconds = float(spent * 1000 / (batches * self._size))
    return tallies

  def _take(self, tally, samples, reference, index, is_reference):
    if not len(samples):  # a last batch that is filled up may leave a process without any
      return
    labels = self.labels(index)
    tally.count += len(samples)
    tally.finite &= bool(np.isfinite(samples).all())
    if not tally.finite:
      return
    features = self._take_statistics(tally, samples, labels)
    if "texts" in self.have:
      tally.scores += self._scores(features, self.conditions(index))
    if "conditions" in self.have:
      tally.agreeing += metrics.agreeing(features, self.held_out.features.rows, self.conditions(index), _AGREEING)
    tally.keep(samples, self.conditions(index))
    if images.shows(self._shape):
      tally.shown |= {int(i): x for i, x in zip(index, samples) if i < self.shown}
    if np.isfinite(reference).all():
      tally.add_errors(samples, reference, labels)
    if is_reference:
      tally.spread.update(samples, labels)

  def _scores(self, features, records):
    return float(np.sum(self.features.score(features, [self._text_of(int(i)) for i in records])))

  def _take_statistics(self, tally, samples, labels):
    """Takes samples in; returns their features, or None."""
    features = self.features.extract(samples) if "features" in self.have else None
    if features is not None:
      tally.features.update(features)
    if "labels" in self.have:
      tally.correct += int(np.sum(self.features.predict(samples) == labels))
    if "pixels" in self.have:
      tally.pixels.update(samples.reshape(len(samples), -1))
    return features

  def _real(self, split):
    """The Tally of a split's records, at most _MOST_RECORDS of them."""
    tally, records = Tally(), spec_lib.checked_records(self.data, split)
    if not self.have & {"features", "pixels"}:
      tally.count = min(len(records), _MOST_RECORDS)
      return tally
    count = min(len(records), _MOST_RECORDS)
    for start in tqdm.tqdm(range(0, count, self._size), desc=f"{split} records", unit="batch", leave=False,
                           disable=jax.process_index() > 0 or None):
      block = range(start, min(start + self._size, count))
      mine = block[jax.process_index()::jax.process_count()]
      found = [records[i] for i in mine]
      tally.count += len(found)
      if found:
        labels = extract.labels_of(self.data.spec, [record["cond"] for record in found])
        features = self._take_statistics(tally, np.stack([record["x_0"] for record in found]), labels)
        if "texts" in self.have and split == "held_out":
          tally.scores += self._scores(features, mine)
    return tally.gather()

  def values(self, tally, reference, fresh):
    """{metric: value, None for what cannot be measured here} of a model.

    Args:
      tally: of the model.
      reference: of the model that errors are against.
      fresh: of the many-step teacher's samples of other noises.
    """
    found = dict.fromkeys(key for key, metric in metrics.METRICS.items() if "training" not in metric.needs)
    found["seconds_per_1000"] = tally.seconds
    if not tally.finite:
      return found
    found["diversity"] = tally.diversity()
    if reference.finite and sum(reference.spread.unrelated().values()) > 0:
      found["endpoint_error"] = metrics.relative_error(tally.errors, reference.spread)
    for kind, need in (("", "features"), ("pixel_", "pixels")):
      if need in self.have:
        found[f"{kind}frechet"] = distance(kind, self.held_out, tally)
        found[f"{kind}frechet_to_teacher"] = distance(kind, fresh, tally) if fresh.finite else None
    if "features" in self.have:
      found["precision"], found["recall"] = metrics.precision_recall(
          self.held_out.features.rows, tally.features.rows, NEAREST)
    if "labels" in self.have:
      found["accuracy"] = tally.correct / tally.count
    if "conditions" in self.have:
      found["agreement"] = tally.agreeing / tally.count
    if "texts" in self.have:
      found["clip_score"] = tally.scores / tally.count
    return found

  def remarks(self):
    """What a reader of the figures should know, a list of texts."""
    found = []
    if self.features is None:
      found.append("config.evaluation.features is not set: nothing is compared with real data by features; set it in a "
                   "config file, e.g. to piflow_jax.evaluation.features.auto_config().")
      return found
    width, least = len(self.held_out.features.mean), min(self.samples, self.held_out.count)
    if least < 10 * width:
      bias = statistics.frechet_bias(self.train.features, self.samples, self.held_out.count)
      found.append(
          f"{self.samples} samples and {self.held_out.count} held-out ones are few for {width} features: Fréchet "
          f"distances are too large, by about {bias:.2g} where the distributions are alike. Compare them only with "
          "distances of as many samples.")
    return found


def distance(kind, a, b):
  """Fréchet distance of two tallies' features (kind "") or pixels ("pixel_"); None where one of them has too few."""
  name = "pixels" if kind else "features"
  a, b = getattr(a, name), getattr(b, name)
  return statistics.frechet_distance(a, b) if min(a.count, b.count) > 1 else None


def check_samples(samples, spec):
  """Raises errors.UserError: too few samples for the metrics to mean anything."""
  classes = spec_lib.num_classes(spec)
  needed = {NEAREST + 1: f"one and its {NEAREST} nearest", 2 * classes: f"two of each of {classes} classes"}
  for least, why in needed.items():
    if samples < least:
      raise errors.UserError(f"config.evaluation.samples: {samples} is less than {least}, {why}; give more")


def _number_shown(shape, classes, samples):
  side = shape[-2] * (shape[0] if len(shape) == 4 else 1) if len(shape) > 1 else 1
  return min(2 * classes or _SHOWN, _SHOWN, samples, max(1600 // side, 4))


def real_like(data, labels):
  """A training record's x_0 for each label [n], another one each time that a label recurs; [n, *shape].

  Where a label is not all that conditions: the first records.
  """
  records, wanted = data.records("train"), {}
  if not spec_lib.num_classes(data.spec):
    return np.stack([records[i % len(records)]["x_0"] for i in range(len(labels))])
  for place, label in enumerate(labels):
    wanted.setdefault(int(label), []).append(place)
  found, last = [None] * len(labels), {}
  for i in range(len(records)):
    label = int(next(iter(records[i]["cond"].values())))
    last.setdefault(label, records[i]["x_0"])
    if wanted.get(label):
      found[wanted[label].pop(0)] = records[i]["x_0"]
    if not any(wanted.values()):
      break
  grey = np.zeros(data.spec.x_0, np.float32)
  return np.stack([last.get(int(label), grey) if x is None else x for x, label in zip(found, labels)])
