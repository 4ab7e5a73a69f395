"""Configs: fields by noun, the run's own fields, their comments, and a config written as JSON and read back.

A config file returns `base()` with its nouns filled in:

  c = config.base()
  c.data, c.network, c.method = digits.config(), dit.config(depth=3), flow_matching.config()
"""

import importlib
import inspect
import math
import operator
import re
import sys

from ml_collections import ConfigDict
from ml_collections import config_dict

_INT32 = 2**31 - 1
_LARGE = 1e9  # a number without an upper bound of its own that is larger than this is a slip


def noun(make, defaults, fields):
  """A locked ConfigDict {make, every field with its default or as given}: what a module's `config(**fields)` returns.

  Args:
    make: function or class that build.py calls with the noun's surroundings and all fields.
    defaults: {field: value}; a comment beside each is what --help prints.
    fields: those that the caller sets.
  Raises:
    ValueError: a field that the noun has not.
  """
  if not hasattr(make, "__qualname__"):
    raise ValueError(f"make: {make!r} has no name that a workdir's config.json could hold; give a function of a module")
  for name in fields:
    if name not in defaults:
      raise ValueError(f"{name}: {make.__module__.split('.')[-1]} has no such field, only {', '.join(defaults)}")
  values = {k: config_dict.placeholder(object) if v is None else v for k, v in (defaults | fields).items()}
  return ConfigDict(dict(make=make, **values)).lock()


def whole(name, value, least=1, most=_INT32):
  """Raises ValueError unless value is a whole number from least to most."""
  if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
    raise ValueError(f"{name}: {value!r} must be a whole number from {least} to {most}")


def number(name, value, *, least=None, most=None, above=None, below=None):
  """Raises ValueError unless value is a finite number within the bounds that are given, and below 1e9 if none is."""
  bounds = [(least, "at least", operator.ge), (above, "above", operator.gt), (most, "at most", operator.le),
            (below, "below", operator.lt)]
  bounds = [b for b in bounds if b[0] is not None]
  good = not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < math.inf
  good = good and (abs(value) < _LARGE or below is not None or most is not None)
  if not good or not all(holds(value, bound) for bound, _, holds in bounds):
    words = " and ".join(f"{word} {bound}" for bound, word, _ in bounds)
    raise ValueError(f"{name}: {value!r} must be a number{' ' + words if words else ''}")


def one_of(name, value, choices):
  """Raises ValueError unless value is one of the choices."""
  if value not in choices:
    raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, choices))}")


# Fields of `base` that say how a run is watched, placed or how long it is, not what it computes: a restart may change
# them. (Not the length of a cosine schedule, which is in every step's learning rate.) A noun's module has its own FREE.
FREE = ("steps", "log_every", "eval_every", "eval_batches", "image_every", "checkpoint_every", "keep_checkpoints",
        "keep_every", "profile_steps", "zero", "microbatches", "mesh.", "sampling.", "evaluation.")


def base():
  """The run's own fields; the nouns are for the config file to fill in."""
  c = ConfigDict()
  c.seed = 0  # every draw of a run comes from (seed, step, sample)
  c.steps = 1000  # updates in all
  c.batch_size = 128  # over all devices and microbatches
  c.microbatches = 1  # gradient accumulation: the batch is worked through in so many parts
  c.accumulator = "float32"  # what gradients of microbatches are summed in; or "bfloat16"
  # Patterns of the parameters' paths that are trained; all others stay the teacher's and exist once. Adapters are
  # trained in any case.
  c.trained = (".*",)

  nothing = config_dict.placeholder  # a field each: fields that share a reference change together
  c.data = nothing(object)  # records, e.g. piflow_jax.data.digits.config()
  c.network = nothing(object)  # e.g. piflow_jax.models.dit.config(); the teacher's too, unless that has its own
  c.lora = nothing(object)  # adapters of a student's frozen matrices: piflow_jax.lora.config()
  c.policy = nothing(object)  # what a student returns: config() of policy.gmm, policy.dx or policy.parallel
  c.method = nothing(object)  # how: config() of distill.flow_matching, .imitation, .parallel_decoding, .meanflow
  c.teacher = nothing(object)  # piflow_jax.teacher.config() or .exact_config()
  c.flow = nothing(object)  # the noise schedule: piflow_jax.flow.config() or .dynamic_config()

  c.optimizer = ConfigDict()  # AdamW
  c.optimizer.learning_rate = 5e-5  # after the warm-up
  c.optimizer.warmup_steps = 400  # linear, from 0.001 of the rate
  c.optimizer.schedule = "constant"  # or "cosine", to 0 at the last step
  c.optimizer.b1 = 0.9  # decay of the first moment
  c.optimizer.b2 = 0.95  # decay of the second moment
  c.optimizer.weight_decay = 0.0  # share of a weight that an update takes off, times the rate
  c.optimizer.decayed = (".*",)  # patterns of the paths that weight_decay shrinks
  c.optimizer.moments = "float32"  # or "bfloat16": the first ones in it; "int8": both in a byte each, block by block
  c.optimizer.clip_norm = 50.0  # global norm, above 0; clips once the warm-up is over; a large one clips nothing

  c.ema = ConfigDict()
  c.ema.gamma = 7.0  # the average keeps (1 - 1/n)^(gamma + 1) of itself
  c.ema.start = 400  # n counts from here; before, the average is a copy

  # Devices along each axis; -1 infers one of data, fsdp, tensor. Samples are split over slices, data and fsdp,
  # parameters over fsdp and (by heads and hidden units) tensor.
  c.mesh = ConfigDict()
  c.mesh.data = -1  # devices that samples are split over
  c.mesh.fsdp = 1  # devices that samples, and parameters by their width, are split over
  c.mesh.tensor = 1  # devices that parameters are split over by heads and hidden units
  c.mesh.slices = 1  # slices, joined by the data-centre network
  c.zero = False  # optimizer and EMA are split over data too, which no forward pass reads

  c.sampling = ConfigDict()  # the pictures drawn during training, `sample` and `evaluate`
  c.sampling.nfe = 1  # network calls: steps of a teacher, segments of a student
  c.sampling.h = 0.0  # stochasticity: 0 deterministic, inf full re-noising
  c.sampling.images = 64  # in a picture

  c.evaluation = ConfigDict()
  c.evaluation.features = config_dict.placeholder(object)  # config() of evaluation.features or .digit_features
  c.evaluation.samples = 2000  # of each model
  c.evaluation.batch_size = 500  # samples drawn at once
  c.evaluation.seed = 0  # of the noises
  # Steps between Frechet distances of the average's samples to held-out data, by `features`; 0 is never. The checkpoint
  # with the least one is kept: --step=best draws from it.
  c.evaluation.every = 0
  c.evaluation.during = 2000  # samples of such a distance: fewer than a published figure's, so it is larger
  # What a good result is: (text, metric, row, row to divide by or "", "<=" or ">=", bound), a row being "student" or
  # "teacher@128"; see evaluation/checks.py.
  c.evaluation.checks = ()

  c.log_every = 50  # steps between lines of metrics
  c.eval_every = 1000  # steps between losses on held-out data; 0 is never
  c.eval_batches = 4  # batches of held-out data in such a loss
  c.image_every = 1000  # steps between pictures; 0 is never
  c.checkpoint_every = 1000  # steps between checkpoints
  c.keep_checkpoints = 2  # the latest so many
  c.keep_every = 0  # and each whose step this divides; 0 is none
  c.profile_steps = 0  # trace so many steps, from the tenth of the session on, to workdir/profile
  return c.lock()


def field(config, dotted):
  """The value of a field "a.b"."""
  for name in dotted.split("."):
    config = config[name]
  return config


def is_noun(value):
  """Whether a value of a config is a noun: fields with the function that takes them."""
  return isinstance(value, ConfigDict) and "make" in value


def fields_of(value):
  """A noun's fields as keyword arguments of its `make`."""
  return {name: field for name, field in value.items() if name != "make"}


def free_of(value):
  """Names of a noun's fields that may change on a restart."""
  return getattr(sys.modules.get(value.make.__module__), "FREE", ())


def described(config, prefix=""):
  """[(dotted name, value, comment)] of every field that can be set on the command line."""
  comments = _comments(_config_function(config.make)) if is_noun(config) else _comments(base)
  found = []
  for name, value in config.items():
    dotted = f"{prefix}{name}"
    if isinstance(value, ConfigDict):
      if is_noun(value):
        found += described(value, f"{dotted}.")
        continue
      for k, v in value.items():
        if is_noun(v):
          found += described(v, f"{dotted}.{k}.")
        elif v is not None:
          found.append((f"{dotted}.{k}", v, comments.get(f"{name}.{k}", "")))
    elif name != "make" and value is not None and not callable(value):
      found.append((dotted, value, comments.get(name, "")))
  return found


def _config_function(make):
  """The function that makes `make`'s noun: the one of its module that passes it to `noun`."""
  module = sys.modules[make.__module__]
  for function in vars(module).values():
    if inspect.isfunction(function) and function.__module__ == module.__name__:
      try:
        source = inspect.getsource(function)
      except OSError:
        return None
      if re.search(rf"\bnoun\(\s*{make.__name__}\b", source):
        return function
  return None


def _comments(function):
  """{field: the comment beside or above it} in the source of a function that lists fields."""
  found, above = {}, []
  try:
    lines = inspect.getsource(function).splitlines() if function else []
  except OSError:
    lines = []
  for line in lines:
    code, _, comment = line.partition("#")
    if not code.strip():
      above = [*above, comment.strip()] if comment.strip() else []
      continue
    for name in re.findall(r"(?:^\s*c\.|^\s*|[,(]\s*)([a-z_0-9]+(?:\.[a-z_0-9]+)?)\s*=(?!=)", code):
      found[name] = comment.strip() or " ".join(above)
    above = []
  return found


def to_plain(value):
  """What JSON can hold of a config: a function is "@module:name", a text that begins with "@" has one more."""
  if isinstance(value, ConfigDict):
    return {name: to_plain(field) for name, field in value.items()}
  if callable(value):
    name = getattr(value, "__qualname__", f"{type(value).__qualname__} object")
    return f"@{getattr(value, '__module__', type(value).__module__)}:{name}"
  if isinstance(value, (tuple, list)):
    return [to_plain(v) for v in value]
  if isinstance(value, str) and value.startswith("@"):
    return f"@{value}"
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def from_plain(plain):
  """The config that `to_plain` wrote, fields that have come since at their defaults.

  Raises:
    ValueError: no such config, or what it names is not to be found.
  """
  c = base()
  with c.unlocked():
    for name, value in plain.items():
      if name not in c:
        raise ValueError(f"{name} is no field of this version")
      if isinstance(value, dict) and "make" in value:
        c[name] = _noun_from_plain(value, name)
      elif isinstance(value, dict):
        for k, v in value.items():
          if k not in c[name]:
            raise ValueError(f"{name}.{k} is no field of this version")
          c[name][k] = _value(v, c[name].get(k), f"{name}.{k}")
      else:
        c[name] = _value(value, c.get(name), name)
  return c.lock()


def _noun_from_plain(plain, name):
  make = _reference(plain["make"], f"{name}.make")
  function = _config_function(make)
  if function is None:
    raise ValueError(f"{name}.make: {plain['make'][1:]} belongs to no function that lists its fields by noun(...)")
  defaults = function()
  for k in plain:
    if k not in defaults:
      raise ValueError(f"{name}.{k} is no field of {plain['make'][1:]}")
  fields = {k: _value(v, defaults.get(k), f"{name}.{k}") for k, v in plain.items() if k != "make"}
  return function(**fields)


def _value(plain, default, name):
  if isinstance(plain, dict):
    return _noun_from_plain(plain, name)
  if isinstance(plain, str) and plain.startswith("@"):
    return plain[1:] if plain.startswith("@@") else _reference(plain, name)
  if isinstance(plain, list):
    return tuple(_value(v, None, name) for v in plain)
  if isinstance(default, float) and isinstance(plain, (int, str)):
    return float(plain)
  return plain


def _reference(text, name):
  if not isinstance(text, str) or not text.startswith("@"):
    raise ValueError(f"{name}: {text!r} names no function")
  module, _, attribute = text[1:].partition(":")
  try:
    found = importlib.import_module(module)
    for part in attribute.split("."):
      found = getattr(found, part)
  except (ImportError, AttributeError) as e:
    raise ValueError(f"{name}: {text[1:]} is not to be found ({e}); start in the folder that it lies in, or put that "
                     "on PYTHONPATH, or give --config") from e
  return found
