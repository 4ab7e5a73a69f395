"""Distances while a run trains, and the best checkpoint that stays."""

import json

import numpy as np
import pytest
import tqdm

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import train_loop
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import during
from piflow_jax.evaluation import measure
from piflow_jax.evaluation import pca
from tests import tiny


def _steps(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def _config(**more):
  c = tiny.config("teacher", checkpoint_every=1, keep_checkpoints=1, evaluation__every=2,
                  evaluation__during=40, **more)
  c.evaluation.features = pca.config()
  return c


@pytest.mark.slow
def test_the_best_checkpoint_stays_and_can_be_drawn_from(tmp_path):
  c = _config(steps=2)
  assert train_loop.train(c, tmp_path / "run") == 0
  note = tmp_path / "run" / weights.BEST
  assert json.loads(note.read_text())["step"] == 2
  note.write_text(json.dumps({"step": 2, "frechet": 0.0}))  # no later one is better
  c.steps = 6
  assert train_loop.train(c, tmp_path / "run") == 0
  lines = [line for line in tiny.metrics(tmp_path / "run") if "frechet" in line]
  assert [line["step"] for line in lines] == [2, 4, 6] and all(line["frechet_bias"] > 0 for line in lines)
  assert json.loads(note.read_text())["step"] == 2
  assert _steps(tmp_path / "run") == [2, 6]
  note.write_text(json.dumps({"step": 2, "frechet": 1e9}))  # any later one is better
  c.steps = 8
  assert train_loop.train(c, tmp_path / "run") == 0
  assert weights.step_of(tmp_path / "run", "best") == 8
  note.write_text(json.dumps({"step": 8, "frechet": 0.0}))
  c.steps, c.evaluation.every = 9, 0  # a session that measures nothing leaves it alone
  assert train_loop.train(c, tmp_path / "run") == 0
  assert _steps(tmp_path / "run") == [8, 9]
  out = [f"--workdir={tmp_path / 'run'}", "--num=1"]
  for step in ("best", "9"):
    assert tiny.invoke("piflow_jax.sample", [*out, f"--step={step}", f"--out={tmp_path / step}.npz"]) == (0, "")
  one, two = (np.load(tmp_path / f"{name}.npz")["x_0"] for name in ("best", "9"))
  assert (one != two).any()
  tiny.refused("piflow_jax.sample", [*out, "--step=3", "--out=x.npz"], "has no checkpoint of step 3, only of")
  tiny.refused("piflow_jax.sample", [*out, "--step=last", "--out=x.npz"], "--step: 'last'; give a step, or best")


@pytest.mark.slow
def test_the_distance_is_the_reports(tiny_teacher):
  """Of the same samples: what evaluation.measure finds of the average."""
  c = tiny.config("teacher", evaluation__samples=40, evaluation__during=40)
  c.evaluation.features = pca.config()
  run, mesh = build.run(c), build.mesh(c)
  bench = measure.Bench(c, run, mesh)
  params = weights.load(tiny_teacher, train_step.compile(c, mesh, run).state.ema, "ema", "--workdir")
  draw = draws.model_drawer(mesh, c, run, c.sampling.nfe)
  tally, = bench.measure([draws.Model("model", 1, lambda batch, seed: draw((params, None), batch, seed))], 0,
                         tqdm.tqdm(disable=True))
  found = during.watcher(c, run, mesh)(params, None)
  np.testing.assert_allclose(found["frechet"], measure.distance("", bench.held_out, tally), rtol=1e-9)


def test_what_it_needs_is_said():
  c = _config()
  c.evaluation.features = None
  with pytest.raises(errors.UserError, match="^config.evaluation.every: needs config.evaluation.features"):
    during.watcher(c, build.run(c), build.mesh(c))
  c = _config()
  c.evaluation.during = 1
  with pytest.raises(errors.UserError, match="^config.evaluation.during: 1 is too few"):
    during.watcher(c, build.run(c), build.mesh(c))


def test_a_run_that_measured_nothing_has_no_best(tiny_teacher):
  tiny.refused("piflow_jax.sample", [f"--workdir={tiny_teacher}", "--step=best", "--out=x.npz"], "--step", "best.json",
               "measured no distances")


def test_the_least_distance_is_noted(tmp_path):
  best = set()
  for step, value in ((2, 3.0), (4, 5.0), (6, 1.0), (8, float("nan"))):
    during.note(tmp_path, best, step, {"frechet": value}, write_it=True)
  assert best == {6} == during.best_steps(tmp_path)
  during.note(tmp_path, set(), 9, {"frechet": 7.0}, write_it=False)  # another process's: nothing is written
  assert during.best_steps(tmp_path) == {6}
