"""What a training method is given and what it returns: the types between build.py and the files beside this one."""

from typing import Any, Callable, NamedTuple

from piflow_jax import flow
from piflow_jax import teacher as teacher_lib


class Net(NamedTuple):
  """A network with its head, as pure functions.

  Attributes:
    init: key -> params.
    apply: (params, x [B, ...], t [B] noise level, cond) -> u; of a network of two times (..., cond, t_dst [B]) -> u.
  """

  init: Callable
  apply: Callable


class Parts(NamedTuple):
  """The surroundings of a method, made from the config's other nouns.

  Attributes:
    shift: of the noise schedule (method.md, 1).
    velocity: the network under a plain flow model's output layer.
    two_times: the same with a second time, which MeanFlow needs; None where the network has none.
    student: `student.Student`; None where the config has no policy.
    teacher: `teacher.Teacher`; None where the config has none.
    null: cond -> condition of the unconditional pass; None where the network has none.
    inherits: the teacher's weights are those of such a network, so that a student may start from them.
  """

  shift: Any
  velocity: Net
  two_times: Net | None = None
  student: Any = None
  teacher: teacher_lib.Teacher | None = None
  null: Callable | None = None
  inherits: bool = False


class Method(NamedTuple):
  """A way to train, as functions.

  Attributes:
    init: (key, teacher_params) -> params, the trained leaves; teacher_params is None where there is no teacher.
    objective: (params, teacher_params, batch, keys [B], step) -> (grads, metrics); batch is {"x_0": [B, ...], "cond":
      tree of [B, ...]}, and each sample's draws come from its own key.
    flow_map: (params, base, cond, clock) -> flow map, (x, tau_src [B], tau_dst [B]) -> x, which `sampler.sample` calls
      clock.nfe times.
    clock: `flow.Clock` that the model is trained for. Sampling may replace its nfe; see `calls`.
    passes: network passes of a sample and update: a forward pass 1, a backward pass 2, a forward-mode derivative 1; the
      teacher's too.
    per_call: a model belongs to the one nfe that it was trained for.
    calls: (nfe, h) -> None, or a remark on sampling in so many calls with so much stochasticity; raises ValueError
      where the model cannot.
  """

  init: Callable
  objective: Callable
  flow_map: Callable
  clock: flow.Clock
  passes: int
  per_call: bool
  calls: Callable


def any_calls(nfe, h):
  """`Method.calls` of a model that may be sampled in any number of calls."""
  del nfe, h
