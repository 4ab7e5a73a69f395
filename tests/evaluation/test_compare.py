"""The comparison small: what is trained, for how long, and what the report says of it."""

import json

import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax.evaluation import compare
from piflow_jax.evaluation import run as run_lib
from tests import tiny

# Times are left out, which differ from run to run.
FIGURES = list(compare.METRICS)


@pytest.mark.slow
def test_a_small_comparison(tmp_path, tiny_teacher, capsys, monkeypatch):
  def config_of(role, nfe):
    own = dict(sampling__h=0.5) if role == "parallel" else dict(flow__final_scale=0.5)
    return tiny.config(f"{role},{nfe}", teacher__checkpoint=str(tiny_teacher), policy__intervals=8,
                       parallel_decoding__min_block=4, parallel_decoding__max_block=8, steps=2, checkpoint_every=2, **own)

  asked, bench = [], run_lib.bench

  def recording(config, mesh):
    b = bench(config, mesh)
    return b._replace(draw=lambda *args: asked.append(args[1:]) or b.draw(*args))

  monkeypatch.setattr(run_lib, "bench", recording)

  run = lambda: compare.compare(config_of, tmp_path / "compare", methods=["student", "parallel"], calls=[1, 2], seeds=2)
  path = run()
  # Each method is drawn as its own config says, whatever the first one's.
  of_students = [(nfe, h, config.flow.final_scale) for nfe, h, config in (args for args in asked if len(args) == 3)]
  assert sorted(set(of_students)) == [(1, 0.0, 0.5), (1, 0.5, 1.0), (2, 0.0, 0.5), (2, 0.5, 1.0)]
  trained = sorted(str(p.parent.relative_to(tmp_path / "compare")) for p in tmp_path.glob("compare/**/config.json"))
  assert trained == ["parallel/seed0", "parallel/seed1", "student-1/seed0", "student-1/seed1", "student-2/seed0",
                     "student-2/seed1"]
  rows = json.loads((path.parent / "compare.json").read_text())["rows"]
  assert [(r["method"], r["calls"]) for r in rows] == [
      *(("teacher", n) for n in (1, 2, 4, 8, 128)), ("student", 1), ("student", 2), ("parallel", 1), ("parallel", 2)]
  assert rows[4]["mean"]["endpoint_error"] == 0
  for row in rows:
    assert row["seeds"] == [0, 1]
    assert set(row["values"]) == {*FIGURES, "seconds_per_step", "seconds_per_1000"}
    assert all(len(v) == 2 and v[0] != v[1] for k, v in row["values"].items() if k == "frechet")
    for k in FIGURES:
      np.testing.assert_allclose(row["mean"][k], np.mean(row["values"][k]))
  assert [r["steps"] for r in rows[5:]] == [2, 2, 2, 2]

  capsys.readouterr()
  again = json.loads((run().parent / "compare.json").read_text())["rows"]
  assert capsys.readouterr().out.count("finished before") == 6  # nothing is trained twice
  assert [[r["values"][k] for k in FIGURES] for r in again] == [[r["values"][k] for k in FIGURES] for r in rows]


@pytest.mark.parametrize("role, fields, want", [
    ("student", {}, 5),  # forward, backward, two queries of the teacher
    ("student", dict(teacher__guidance_scale=2.0), 7),
    ("student", dict(imitation__data_free=True, flow__nfe=4), 20),
    ("dx", dict(imitation__label="midpoint"), 7),
    ("parallel", {}, 5),
    ("parallel", dict(imitation__label="euler"), 5),
    ("meanflow", {}, 5),  # u and its derivative, backward, the teacher
    ("improved-meanflow", {}, 6),  # and the network's own velocity
    ("meanflow-data", {}, 4),
])
def test_passes(role, fields, want):
  assert compare.passes(tiny.config(role, **fields)) == want


def test_every_method_gets_the_same_passes(tmp_path):
  plan = compare._plan(lambda role, nfe: tiny.config(f"{role},{nfe}", steps=300), tmp_path,
                       ["student", "improved-meanflow", "meanflow-data"], [1, 2], 1)
  assert [(job["name"], job["calls"], job["config"].steps) for job in plan] == [
      ("student", [1], 300), ("student", [2], 300), ("improved-meanflow", [1, 2], 250), ("meanflow-data", [1, 2], 375)]


@pytest.mark.slow
def test_a_method_that_diverges_is_a_row_without_figures(tmp_path, tiny_teacher):
  config_of = lambda role, nfe: tiny.config(
      f"{role},{nfe}", teacher__checkpoint=str(tiny_teacher), steps=4, checkpoint_every=4,
      **(dict(optimizer__learning_rate=1e38) if role == "dx" else {}))
  path = compare.compare(config_of, tmp_path / "compare", methods=["student", "dx"], calls=[1], seeds=1)
  rows = json.loads((path.parent / "compare.json").read_text())["rows"]
  assert rows[-2]["method"] == "student" and rows[-2]["mean"]["frechet"] > 0
  assert rows[-1]["method"] == "dx" and rows[-1]["values"]["frechet"] == [None] and rows[-1]["mean"]["frechet"] is None


def test_methods_are_named_once(tmp_path):
  for methods, words in ((["student", "student"], "student,student; name each method once"), ([], "nothing")):
    with pytest.raises(errors.UserError, match=f"--methods: {words}"):
      compare.compare(None, tmp_path, methods=methods, calls=[1], seeds=1)
  assert not list(tmp_path.iterdir())


def test_what_is_no_student_is_told_so():
  with pytest.raises(errors.UserError, match="--methods: flow_matching trains no student"):
    compare.passes(tiny.config("teacher"))
