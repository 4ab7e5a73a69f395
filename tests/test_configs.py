"""Every config is read and run: shapes at its full size, and a real update at a tiny one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from configs import gaussians
from configs import imagenet_dit
from piflow_jax import build
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax import train_step
from piflow_jax.evaluation import analytic
from tests import tiny

# Parameters of DiT-B, L, XL at patch 2 with fixed positions (arXiv 2212.09748, table 1: 130M, 458M, 675M), less half of
# their output layer, which there also predicts a variance.
SIZES = {"B": 130e6, "L": 458e6, "XL": 675e6}


@pytest.mark.parametrize("argument", [
    "XL,repa-1nfe", "L,repa-2nfe", "B,fm-1nfe", "XL,teacher", "B,dx-1nfe", "XL,pdd", "B,pdd-midpoint", "L,meanflow",
    "XL,imf-data", "L,dx40-1nfe"])
def test_full_size_configs_trace_and_shard(argument):
  config = imagenet_dit.get_config(argument)
  run, mesh = build.run(config), sharding.make_mesh(2, 4)
  jitted = train_step.compile(config, mesh, run)
  batch = {"x_0": jax.ShapeDtypeStruct((config.batch_size, *config.data.shape), jnp.float32),
           "cond": {"label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}}
  state, metrics = jax.eval_shape(jitted.step, jitted.state, jitted.teacher, batch, jax.random.key(0))
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda s: s.shape, jitted.state)
  assert metrics["loss"].shape == ()
  network = jitted.teacher or jitted.state.params
  count = sum(leaf.size for leaf in jax.tree.leaves(network))
  np.testing.assert_allclose(count, SIZES[argument.split(",")[0]], rtol=0.01)


_SMALL = {"batch_size": 8, "steps": 2, "log_every": 1, "eval_every": 0, "image_every": 0, "data.shape": (8, 8, 4),
          "optimizer.warmup_steps": 1, "policy.components": 4, "policy.logstd_width": 16, "policy.intervals": 8,
          "method.total_substeps": 16, "method.min_block": 1, "method.max_block": 8}


def _small(argument):
  config = imagenet_dit.get_config(f"tiny,{argument}")
  config.update_from_flattened_dict(tiny.only_known(config, _SMALL))
  return config


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
  """time_scale -> workdir of a tiny teacher: two recipes' teachers differ in it."""
  folder, found = tmp_path_factory.mktemp("teachers"), {}
  for recipe in ("repa-1nfe", "fm-1nfe"):
    student, teacher = _small(recipe), _small("teacher")
    teacher.network.update(time_scale=student.network.time_scale, mlp_norm_eps=student.network.mlp_norm_eps)
    found[student.network.time_scale] = folder / recipe
    assert train_loop.train(teacher, folder / recipe) == 0
  return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    # Of the others numbers alone differ.
    name for name in imagenet_dit.RECIPES if not name.endswith(("-40k", "-paper", "-k8"))])
def test_recipes_train(recipe, teachers, tmp_path):
  student = _small(recipe)
  if student.teacher is not None:
    student.teacher.checkpoint = str(teachers[student.network.time_scale])
  assert train_loop.train(student, tmp_path / "student") == 0


@pytest.mark.slow
@pytest.mark.parametrize("role, fields", [
    ("gm32,2", dict(method__data_free=True)),
    ("dx", dict(method__label="midpoint", method__window_substeps=4)),
    ("dx", dict(policy__polynomial=True, policy__points=4, method__window_substeps=4)),
    ("parallel", dict(method__data_free=True, method__label="euler", policy__intervals=8, method__min_block=4,
                      method__max_block=8)),
    ("improved-meanflow", {}),
    ("meanflow-data", dict(method__guidance_scale=2.0, method__ratio=0.5)),
])
def test_every_method_trains_and_draws(role, fields, tmp_path, tiny_teacher):
  config = tiny.config(role, teacher__checkpoint=str(tiny_teacher), steps=3, checkpoint_every=3, eval_every=3,
                       image_every=3, optimizer__learning_rate=1e-3, **fields)
  assert train_loop.train(config, tmp_path / "run") == 0
  losses = [line["loss"] for line in tiny.metrics(tmp_path / "run") if "loss" in line]
  assert len(losses) == 3 and np.isfinite(losses).all() and len(set(losses)) == 3
  assert list((tmp_path / "run" / "pictures").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["gm,2", "dx,3"])
def test_an_exact_teacher_needs_no_checkpoint(argument, tmp_path):
  config = gaussians.get_config(argument)
  config.update(steps=2, batch_size=16, log_every=1)
  config.method.total_substeps = 8
  config.method.window_substeps = 8 // 3 if argument == "dx,3" else 0
  assert train_loop.train(config, tmp_path / "run") == 0
  error = analytic.endpoint_error(config, tmp_path / "run")
  assert 0.1 < error < 2  # two updates: unrelated ends are at 1


def test_arguments_that_are_not_there_are_named():
  with pytest.raises(ValueError, match="XXL,repa-1nfe: choose SIZE,RECIPE or SIZE,RECIPE,cache of tiny, B, L, XL"):
    imagenet_dit.get_config("XXL,repa-1nfe")
  with pytest.raises(ValueError, match="janitor: choose ROLE or ROLE,NFE with a role of teacher, student"):
    digits.get_config("janitor")
  with pytest.raises(ValueError, match="gm,0: choose POLICY,N"):
    gaussians.get_config("gm,0")
