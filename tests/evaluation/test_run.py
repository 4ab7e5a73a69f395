"""The whole job small: teacher, student, report."""

import json

import jax
import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax.evaluation import run
from tests import tiny

COLUMNS = ["accuracy", "calls", "diversity", "endpoint_error", "frechet", "frechet_to_teacher", "model",
           "pixel_frechet", "pixel_frechet_to_teacher", "precision", "recall", "seconds_per_1000"]


@pytest.mark.slow
def test_report_of_a_tiny_student(tmp_path, tiny_teacher):
  config = tiny.config("student", teacher__checkpoint=str(tiny_teacher))
  assert train_loop.train(config, tmp_path / "student") == 0
  path = run.evaluate(config, tmp_path / "student")
  report = json.loads((path.parent / "report.json").read_text())
  assert [(r["model"], r["calls"]) for r in report["rows"]] == [
      ("teacher", 128), ("teacher", 4), ("teacher", 2), ("teacher", 1), ("student", 1)]
  assert all(sorted(row) == COLUMNS for row in report["rows"])
  assert report["rows"][0]["endpoint_error"] == 0 < report["rows"][4]["endpoint_error"]
  assert set(report["minutes"]) == {"teacher", "student", "evaluation"}
  assert path.read_text().count("data:image/png;base64,") == 4
  again = json.loads((run.evaluate(config, tmp_path / "student").parent / "report.json").read_text())
  strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds_per_1000"} for row in rows]
  assert strip(again["rows"]) == strip(report["rows"])  # one seed, one set of figures


def test_a_model_is_drawn_by_its_own_schedule():
  """A flow map whose end tells the times that it was asked for, against the sampler itself."""
  config = tiny.config("student,2", evaluation__features=lambda images, labels: (None, None))
  own = tiny.config("student,2", flow__final_scale=0.5, flow__shift=3.0)
  flow_map = lambda x, tau_src, tau_dst, key: x * (1 + tau_src + 2 * tau_dst)[:, None, None, None]
  b = run.bench(config, sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
  noise, _ = b.noises(0)
  drawn = lambda *more: b.draw(lambda weights, cond: flow_map, 2, *more)(None, noise, b.labels, 0)
  want = lambda **more: sampler.sample(flow_map, noise, jax.random.fold_in(jax.random.key(0), 0), nfe=2, **more)
  np.testing.assert_allclose(drawn(0.5, own), want(h=0.5, shift=3.0, final_scale=0.5), rtol=1e-5)
  np.testing.assert_allclose(drawn(), want(), rtol=1e-5)
  assert not np.allclose(want(h=0.5, shift=3.0, final_scale=0.5), want(h=0.5), rtol=0.01)


def test_a_run_without_teacher_or_features_is_told_so(tmp_path):
  with pytest.raises(errors.UserError, match="config.method: .*piflow_jax.sample"):
    run.evaluate(tiny.config("teacher"), tmp_path)
  with pytest.raises(errors.UserError, match="config.evaluation.features: .*piflow_jax.sample"):
    run.evaluate(tiny.config("student", evaluation__features=None), tmp_path)
  with pytest.raises(errors.UserError, match="config.evaluation.batch_size"):
    run.evaluate(tiny.config("student", evaluation__batch_size=3), tmp_path)


def test_checks_fail_what_falls_short():
  row = dict(frechet=1.0, frechet_to_teacher=1.0, accuracy=0.99, diversity=1.0, endpoint_error=0.1)
  rows = [row | dict(model="teacher", calls=n) for n in (128, 4, 2, 1)]
  good = run.checks([*rows, row | dict(model="student", calls=1, frechet=0.7)])
  assert [check[-1] for check in good] == [True] * 7
  bad = run.checks([*rows, dict(model="student", calls=1, frechet=1.2, frechet_to_teacher=1.1, accuracy=0.9, diversity=1.2,
                                endpoint_error=0.3)])
  assert [check[-1] for check in bad] == [False] * 6 + [True]
