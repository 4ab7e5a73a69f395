"""Every number of every noun, with values that nobody means: a line that names a field, or a run that can be traced.

tests/data has the same for pictures, whose fields want files.
"""

import jax
import pytest

from configs import digits
from configs import gaussians
from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import main
from piflow_jax import program
from piflow_jax import sharding
from piflow_jax import train_step
from tests import tiny

VALUES = ("0", "-1", "nan", "inf", "1e30", str(2**40), "x")
# What is right of these: field, or a role's field, or the end of either -> values.
RIGHT = {
    "seed": "0", "eval_every": "0", "image_every": "0", "keep_every": "0", "profile_steps": "0", "warmup_steps": "0",
    "ema.start": "0", "ema.gamma": "0", "evaluation.seed": "0", "evaluation.every": "0",
    "weight_decay": "0", "b1": "0", "b2": "0",
    "sampling.h": "0 inf", "window_substeps": "0", "num_decay_steps": "0", "label_dropout": "0", "norm_power": "0",
    "meanflow:method.logit_mean": "0 -1", "meanflow-data:method.logit_mean": "0 -1", "teacher:method.logit_mean": "0",
    "ratio": "0", "policy.dropout": "0", "policy.segment": "0", "orthogonal": "0", "teacher.guidance_scale": "0",
    "meanflow-data:method.guidance_scale": "0", "time_offset": "0 -1", "time_scale": "-1", "frequency_shift": "0",
    "mesh.data": "-1",
    # A rate that is far too large ends with a word of its own.
    "learning_rate": str(2**40),
    # A text that no program can judge before it looks there.
    "teacher.checkpoint": "x 0 -1 nan inf 1e30 " + str(2**40),
}
ROLES = {role: f"configs/digits.py:{role}"
         for role in ("teacher", "student", "dx", "parallel", "meanflow", "meanflow-data")}


def _right(role, name, value, text):
  if isinstance(value, bool):
    return text == "0"
  ends = [end for end in RIGHT if f"{role}:{name}" == end or name == end or name.endswith(f".{end}")]
  return any(text in RIGHT[end].split() for end in ends)


def _traced(config):
  run = build.run(config)
  mesh = build.mesh(config, jax.devices()[:1])
  train_step.check_batch(config, mesh)
  jitted = train_step.compile(config, mesh, run)
  split = jax.NamedSharding(mesh, sharding.BATCH)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=split)

  spec = run.data.spec
  batch = {"x_0": array(spec.x_0, "float32"), "cond": {k: array(a.shape, a.dtype) for k, a in spec.cond.items()}}
  jax.eval_shape(jitted.step, jitted.state, jitted.teacher, batch, jax.random.key(0))


def _fields():
  for role, path in ROLES.items():
    known = tiny.fields(digits.get_config(role))
    for name, value, _ in config_lib.described(digits.get_config(role)):
      # A field of the run itself is the same for every role.
      if role == "teacher" or name.split(".")[0] in ("policy", "method", "teacher"):
        yield pytest.param(role, path, name, value, known, id=f"{role}-{name}")
  for name, value, _ in config_lib.described(gaussians.get_config()):
    if name.startswith("data"):
      yield pytest.param("gm", "configs/gaussians.py:gm,2", name, value, {}, id=f"gaussians-{name}")


@pytest.mark.parametrize("role, path, name, value, known", _fields())
def test_a_value_that_nobody_means_is_named_or_works(role, path, name, value, known, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  silent = []
  for text in VALUES:
    words = [f"--config.{k}={v}" for k, v in known.items() if k != name]
    try:
      words = ["main", f"--config={path}", "--workdir=w", *words, f"--config.{name}={text}"]
      given = program.parse(main.PROGRAM, words)
      build.check(given.config)
      if _right(role, name, value, text):
        _traced(given.config)
        continue
      build.mesh(given.config, jax.devices()[:1])
      train_step.check_batch(given.config, build.mesh(given.config, jax.devices()[:1]))
      build.run(given.config)
      silent.append(text)
    except errors.UserError as e:
      line = str(e)
      assert "\n" not in line and "config." in line and len(line) < 500, (text, line)
      assert not _right(role, name, value, text), (text, line)
  assert not silent, f"accepted without a word: {name} = {', '.join(silent)}"
