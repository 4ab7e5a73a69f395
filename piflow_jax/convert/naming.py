"""Names that weights go by: what a network's file of namings fills in, and which namings a config's network has."""

import contextlib
import importlib
import importlib.util
from typing import Any, Callable, NamedTuple

from piflow_jax import errors
from piflow_jax.convert import files

_NETWORKS, _NAMES = "piflow_jax.models.", "piflow_jax.convert."


class Weights(NamedTuple):
  """A tree of weights and what it means.

  Attributes:
    role: "teacher", a network of one velocity; "student", whatever else is trained.
    config: of the run.
    network: the noun that the trunk is of; a teacher may have one of its own.
    field: where that noun is in the config, for messages.
    spec: `data.spec.Spec`.
    clock: `flow.Clock` to sample with, for a student the one that it is trained for.
    per_call: whether a student belongs to clock.nfe alone.
    leaves: {path: ShapeDtypeStruct} of all leaves.
    frozen: paths of those that a student's checkpoints leave to the teacher's.
    head: makes a student's policies; None where there are none.
    policy: `export_config` of the head; None without a head, and for a head that has none.
  """

  role: str
  config: Any
  network: Any
  field: str
  spec: Any
  clock: Any
  per_call: bool
  leaves: dict
  frozen: frozenset = frozenset()
  head: Any = None
  policy: dict | None = None

  @property
  def shapes(self):
    """{path: shape} of all leaves."""
    return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}

  @property
  def alone(self):
    """These, less the leaves that are the teacher's."""
    return self._replace(leaves={path: leaf for path, leaf in self.leaves.items() if path not in self.frozen})

  @property
  def stored(self):
    """{path: shape} of the leaves in the run's checkpoints."""
    return {path: shape for path, shape in self.shapes.items() if path not in self.frozen}


def _nothing(*_):
  return {}


def _none(*_):
  return frozenset()


def _no_words(*_):
  return ""


def _as_it_is(source, *_):
  return source


def latent_shape(about):
  """The shape of x_0 that a config.json of this program says, or None."""
  ours = about.get("piflow_jax")
  return ours.get("latent_shape") if isinstance(ours, dict) else None


class Naming(NamedTuple):
  """One project's names for the weights of a network.

  Attributes:
    says: what it is, for people.
    recognised: {key: shape} -> whether a file may be of this naming.
    rows: Weights -> table of rows.
    about: Weights -> the naming's own part of an export's config.json, under "piflow_jax" what sampling needs of it.
    students: whether there are names for a student's head.
    alone: whether a student's file has its trained arrays alone, and leaves the frozen ones to the teacher's.
    network: fields of the network without which the weights mean something else.
    unless_stated: such fields where no config.json beside the weights says otherwise.
    stated: config.json -> such fields, as it says them; raises ValueError for values that are none.
    latents: config.json -> the shape of x_0 that it says, a list, or None.
    classes: {class in config.json: its policy, {} a teacher's}.
    sizes: Weights -> [`table.Size`].
    prepared: (Source, Weights of the teacher, Weights of what the config trains, stored policy or None) -> Source,
      without those parts of tensors that no tree has.
    constants: Weights -> {key: array} that lie beside the weights and are known here; `check_constant` compares them.
    check_constant: (array of the file, array of `constants`, where) -> None; raises errors.UserError.
    ignored: patterns of keys that are not needed.
    spare: Weights -> keys of tensors that no output depends on: not written, and zeros where a file lacks them.
    refuse: Weights -> why these names cannot say what the weights are, or "".
    remark: (Weights, fields that `stated` found, or None at an export) -> what the weights mean beyond shapes, or "".
    beside: files of this folder that an export is shipped with.
  """

  says: str
  recognised: Callable
  rows: Callable
  about: Callable
  students: bool = False
  alone: bool = False
  network: dict = {}
  unless_stated: dict = {}
  stated: Callable = _nothing
  latents: Callable = latent_shape
  classes: dict = {}
  sizes: Callable = _nothing
  prepared: Callable = _as_it_is
  constants: Callable = _nothing
  check_constant: Callable = _nothing
  ignored: tuple[str, ...] = ()
  spare: Callable = _none
  refuse: Callable = _no_words
  remark: Callable = _no_words
  beside: tuple[str, ...] = ()


def of_network(make):
  """{name: Naming} that there are for the networks that `make` makes; {} for one that no file here knows.

  The namings of piflow_jax.models.X are in piflow_jax.convert.X.
  """
  module = getattr(make, "__module__", "")
  if not module.startswith(_NETWORKS):
    return {}
  name = _NAMES + module.removeprefix(_NETWORKS)
  if importlib.util.find_spec(name) is None:
    return {}
  return getattr(importlib.import_module(name), "NAMINGS", {})


def settings(weights, name):
  """What sampling needs to know beside the weights: "piflow_jax" in the config.json of every export.

  Args:
    weights: Weights.
    name: of the naming.
  """
  clock = weights.clock
  return dict(
      naming=name, role=weights.role, policy=weights.policy, latent_shape=list(weights.spec.x_0),
      nfe=clock.nfe, total_substeps=clock.total_substeps, final_scale=clock.final_scale, shift=float(clock.shift),
      temperature=getattr(weights.head, "temperature", 1.0))


def stored_policy(source, classes):
  """The policy that a file says it is of, as `export_config` has it; {} of a teacher, None where it says nothing.

  Args:
    source: `files.Source`.
    classes: of the naming.
  Raises:
    errors.UserError: what it says is no such table.
  """
  about = source.config
  if "policy_config" in source.metadata:
    said, found = "policy_config in the header", source.metadata["policy_config"]
    with contextlib.suppress(ValueError):  # a text that is no JSON is refused below, like all that is no table
      found = files.parse(found)
  elif isinstance(about.get("piflow_jax"), dict):
    said, found = "piflow_jax.policy in config.json", about["piflow_jax"].get("policy") or {}
  else:
    name = about.get("_class_name")
    return classes.get(name) if isinstance(name, str) else None
  if not isinstance(found, dict) or (found and not isinstance(found.get("type"), str)):
    raise errors.UserError(f"--source: {source.where}: {said} is {str(found)[:99]!r}, no table with a type; mend it or "
                           "take it away")
  # pi-Flow's release takes these where a DX policy's table leaves them out.
  return (dict(segment_size=1.0, shift=1.0, mode="grid") if found.get("type") == "DX" else {}) | found
