"""The comparison small: what is trained, for how long, and what the report says of it."""

import json

import numpy as np
import pytest

from piflow_jax import build
from piflow_jax import errors
from piflow_jax.evaluation import compare
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import metrics
from tests import tiny

# Times are left out, which differ from run to run.
FIGURES = [key for key, metric in metrics.METRICS.items() if metric.better != metrics.FASTER
           and not {"conditions", "texts"} & set(metric.needs)]  # digits have labels


@pytest.mark.slow
def test_a_small_comparison(tmp_path, tiny_teacher, capsys, monkeypatch):
  def config_of(role, nfe):
    own = dict(method__final_scale=0.5)
    if role == "parallel":
      own = dict(sampling__h=0.5, policy__intervals=8, method__min_block=4, method__max_block=8)
    return tiny.config(f"{role},{nfe}", teacher__checkpoint=str(tiny_teacher), steps=2, checkpoint_every=2, **own)

  asked, drawer = [], draws.drawer

  def recording(mesh, flow_map_of, clock, h=0.0):
    asked.append((clock.nfe, h, clock.final_scale))
    return drawer(mesh, flow_map_of, clock, h)

  monkeypatch.setattr(draws, "drawer", recording)

  def run():
    return compare.compare(config_of, tmp_path / "compare", methods=["student", "parallel"], calls=[1, 2], seeds=2)

  path = run()
  # Each method is drawn as its own config says, whatever the first one's, and by one program for all seeds.
  assert sorted(asked[5:]) == [(1, 0.0, 0.5), (1, 0.5, 1.0), (2, 0.0, 0.5), (2, 0.5, 1.0)]
  assert asked[:5] == [(n, 0.0, 1.0) for n in (128, 8, 4, 2, 1)]  # the teacher in equal steps
  trained = sorted(str(p.parent.relative_to(tmp_path / "compare")) for p in tmp_path.glob("compare/**/config.json"))
  assert trained == ["parallel/seed0", "parallel/seed1", "student-1/seed0", "student-1/seed1", "student-2/seed0",
                     "student-2/seed1"]
  result = json.loads((path.parent / "compare.json").read_text())
  rows = result["rows"]
  assert [(r["method"], r["calls"]) for r in rows] == [
      *(("teacher", n) for n in (1, 2, 4, 8, 128)), ("student", 1), ("student", 2), ("parallel", 1), ("parallel", 2)]
  assert rows[4]["mean"]["endpoint_error"] == 0
  for row in rows:
    assert row["seeds"] == [0, 1]
    assert set(row["values"]) == set(metrics.METRICS)
    assert all(len(v) == 2 and v[0] != v[1] for k, v in row["values"].items() if k == "frechet")
    for k in FIGURES:
      np.testing.assert_allclose(row["mean"][k], np.mean(row["values"][k]))
    assert [v is None for v in row["values"]["seconds_per_step"]] == [row["method"] == "teacher"] * 2
  assert [r["steps"] for r in rows[5:]] == [2, 2, 2, 2]
  assert any("few for 64 features" in note for note in result["notes"])
  assert path.read_text().count("data:image/png;base64,") == 3

  capsys.readouterr()
  again = json.loads((run().parent / "compare.json").read_text())["rows"]
  assert capsys.readouterr().out.count("finished before") == 6  # nothing is trained twice
  assert [[r["values"][k] for k in FIGURES] for r in again] == [[r["values"][k] for k in FIGURES] for r in rows]


@pytest.mark.parametrize("role, fields, passes, per_call", [
    ("student", {}, 5, True),  # forward, backward, two queries of the teacher
    ("student", dict(teacher__guidance_scale=2.0), 7, True),
    ("student,4", dict(method__data_free=True), 20, True),
    ("dx", dict(method__label="midpoint"), 7, True),
    ("parallel", {}, 5, False),
    ("parallel", dict(method__label="euler"), 5, False),
    ("meanflow", {}, 5, False),  # u and its derivative, backward, the teacher
    ("improved-meanflow", {}, 6, False),  # and the network's own velocity
    ("meanflow-data", {}, 4, False),
])
def test_passes(role, fields, passes, per_call):
  method = build.run(tiny.config(role, **fields)).method
  assert (method.passes, method.per_call) == (passes, per_call)


def test_every_method_gets_the_same_passes(tmp_path):
  jobs = compare.plan(lambda role, nfe: tiny.config(f"{role},{nfe}", steps=300), tmp_path,
                      ["student", "improved-meanflow", "meanflow-data"], [1, 2], 1)
  assert [(job.name, job.calls, job.config.steps) for job in jobs] == [
      ("student", [1], 300), ("student", [2], 300), ("improved-meanflow", [1, 2], 250), ("meanflow-data", [1, 2], 375)]


@pytest.mark.slow
def test_a_method_that_diverges_is_a_row_without_figures(tmp_path, tiny_teacher):
  def config_of(role, nfe):
    own = dict(optimizer__learning_rate=1e29) if role == "dx" else {}
    return tiny.config(f"{role},{nfe}", teacher__checkpoint=str(tiny_teacher), steps=4, checkpoint_every=4, **own)

  path = compare.compare(config_of, tmp_path / "compare", methods=["student", "dx"], calls=[1], seeds=1)
  rows = json.loads((path.parent / "compare.json").read_text())["rows"]
  assert rows[-2]["method"] == "student" and rows[-2]["mean"]["frechet"] > 0
  assert rows[-1]["method"] == "dx" and rows[-1]["values"]["frechet"] == [None] and rows[-1]["mean"]["frechet"] is None


def test_methods_are_named_once(tmp_path):
  for methods, words in ((["student", "student"], "student,student; name each method once"), ([], "nothing")):
    with pytest.raises(errors.UserError, match=f"--methods: {words}"):
      compare.compare(None, tmp_path, methods=methods, calls=[1], seeds=1)
  assert not list(tmp_path.iterdir())


def test_what_is_no_student_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="--methods: teacher trains no student"):
    compare.plan(lambda role, nfe: tiny.config(f"{role},{nfe}"), tmp_path, ["teacher"], [1], 1)


def test_its_flags_are_refused_in_one_line(tmp_path):
  file = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
  tiny.refused("piflow_jax.evaluation.compare", [*file, "--calls=0,1"], "--calls: 0,1; give positive whole numbers")
  tiny.refused("piflow_jax.evaluation.compare", [*file, "--methods=none"], "none,1", "choose ROLE")
  tiny.refused("piflow_jax.evaluation.compare", [*file, "--seeds=0"], "seeds")
  tiny.refused("piflow_jax.evaluation.compare", [f"--workdir={tmp_path}"], "--config: missing")
