"""The whole job small: teacher, student, report; settings that differ, runs without a teacher, several processes."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from piflow_jax import evaluate
from piflow_jax import train_loop
from piflow_jax import workdir as workdir_lib
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import naming
from piflow_jax.evaluation import pca
from tests import tiny

COLUMNS = sorted({"model", "calls", *metrics.METRICS} - {"seconds_per_step"})


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_teacher):
  """The workdir of a tiny student's finished run."""
  workdir = tmp_path_factory.mktemp("evaluated") / "student"
  assert train_loop.train(tiny.config("student", teacher__checkpoint=str(tiny_teacher)), workdir) == 0
  return workdir


def _report(folder):
  return json.loads((folder / "report.json").read_text())


def _figures(rows):
  return [{k: v for k, v in row.items() if k != "seconds_per_1000"} for row in rows]


@pytest.mark.slow
def test_report_of_a_tiny_student(student, capsys):
  """By the workdir alone: config, checks and teacher are the run's own."""
  status, line = tiny.invoke("piflow_jax.evaluate", [f"--workdir={student}"])
  assert (status, line) == (0, "")
  out = capsys.readouterr().out.splitlines()
  assert out[-1] == str(student / "report" / "report.html")
  report = _report(student / "report")
  assert [(r["model"], r["calls"]) for r in report["rows"]] == [
      ("teacher", 128), ("teacher", 4), ("teacher", 2), ("teacher", 1), ("student", 1)]
  assert all(sorted(row) == COLUMNS for row in report["rows"])
  assert report["rows"][0]["endpoint_error"] == 0 < report["rows"][4]["endpoint_error"]
  assert set(report["minutes"]) == {"teacher", "student", "evaluation"}
  assert report["settings"] == {
      "nfe": 1, "h": 0.0, "temperature": 1.0, "guidance_scale": 1.0, "samples": 40, "seed": 0,
      "features": "a digit classifier", "held_out_records": 360}
  assert len(report["checks"]) == len(tiny.config("student").evaluation.checks)
  assert any("40 samples and 360 held-out ones are few" in note for note in report["notes"])
  page = (student / "report" / "report.html").read_text()
  assert page.count("data:image/png;base64,") == 4
  assert "Fréchet distance of training records to held-out ones" in page and "guidance_scale" in page
  assert not [name for name in report["reference"] if "_" in name]  # words, not keys
  words = ["teacher", "student", *(metrics.heading(key) for key in ("frechet", "accuracy", "endpoint_error"))]
  assert all(any(word in line for line in out) for word in words)

  again = evaluate.evaluate(workdir_lib.read(student), student)
  assert _figures(_report(again.parent)["rows"]) == _figures(report["rows"])  # one seed, one set of figures
  # Batches of another size draw the same samples, and leave no report of their own.
  status, _ = tiny.invoke("piflow_jax.evaluate", [f"--workdir={student}", "--config.evaluation.batch_size=16"])
  assert status == 0 and len(list(student.glob("report*"))) == 1
  for one, other in zip(_figures(_report(student / "report")["rows"]), _figures(report["rows"])):
    for key in one.keys() - {"model", "agreement", "clip_score"}:  # digits have no texts
      np.testing.assert_allclose(one[key], other[key], rtol=1e-3, atol=1e-6, err_msg=key)


@pytest.mark.slow
def test_other_settings_have_a_report_of_their_own(student):
  asked = ["--config.sampling.nfe=2", "--config.sampling.h=0.5", "--config.policy.temperature=0.5",
           "--config.evaluation.seed=3"]
  status, _ = tiny.invoke("piflow_jax.evaluate", [f"--workdir={student}", *asked])
  assert status == 0
  folder, = student.glob("report-*")
  assert folder.name == "report-nfe=2,h=0.5,seed=3,temperature=0.5"
  report = _report(folder)
  assert (report["rows"][-1]["model"], report["rows"][-1]["calls"]) == ("student", 2)
  found = {key: report["settings"][key] for key in ("nfe", "h", "temperature", "seed")}
  assert found == {"nfe": 2, "h": 0.5, "temperature": 0.5, "seed": 3}
  # A model for one call that is sampled in two: said on the page.
  assert any("config.sampling.nfe: 2, trained for 1" in note for note in report["notes"])
  page = (folder / "report.html").read_text()
  assert "temperature" in page and "trained for 1" in page


@pytest.mark.slow
def test_a_teacher_s_own_workdir_is_measured_at_several_steps(tiny_teacher, tmp_path):
  config = workdir_lib.read(tiny_teacher)
  config.evaluation.features = None
  config.sampling.nfe = 3
  workdir = tmp_path / "teacher"
  workdir.symlink_to(tiny_teacher)
  path = evaluate.evaluate(config, workdir)
  assert path.parent.name.startswith("report-") and "nfe=3" in path.parent.name
  report = _report(path.parent)
  assert [(r["model"], r["calls"]) for r in report["rows"]] == [("model", n) for n in (128, 4, 3, 2, 1)]
  assert report["rows"][0]["endpoint_error"] == 0
  ends = [row["endpoint_error"] for row in report["rows"]]
  assert ends == sorted(ends) and ends[1] > 0
  assert all(row["frechet"] is None and row["pixel_frechet"] > 0 for row in report["rows"])
  assert set(report["minutes"]) == {"training", "evaluation"} and report["settings"]["solver"] == "euler"
  assert any("config.evaluation.features is not set" in note for note in report["notes"])


@pytest.mark.parametrize("field, words", [
    ("evaluation.samples=0", "config.evaluation.samples: 0 must be"),
    ("evaluation.samples=-1", "config.evaluation.samples: -1 must be"),
    ("evaluation.samples=1", "config.evaluation.samples: 1 is less than 4"),
    ("evaluation.samples=10", "config.evaluation.samples: 10 is less than 20, two of each of 10 classes"),
    ("evaluation.batch_size=0", "config.evaluation.batch_size: 0 must be"),
    ("evaluation.batch_size=1099511627776", "config.evaluation.batch_size"),
    ("evaluation.seed=-1", "config.evaluation.seed: -1 must be"),
    ("sampling.h=nan", "config.sampling.h: nan must be"),
    ("sampling.nfe=0", "config.sampling.nfe: 0 must be"),
])
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(field, words, tmp_path):
  """The workdir is empty: had anything been looked for in it, its lack would be the error."""
  tiny.refused("piflow_jax.evaluate", tiny.arguments("student", tmp_path, f"--config.{field}"), words)
  assert not list(tmp_path.iterdir())


def test_checks_that_no_row_can_meet_are_refused_first(tmp_path):
  config = tiny.config("student")
  config.evaluation.checks = (("of a row that is not there", "frechet", "student", "teacher@64", "<=", 1.0),)
  with pytest.raises(Exception, match="config.evaluation.checks.0., over: 'teacher@64' is none of") as error:
    evaluate.evaluate(config, tmp_path)
  assert "\n" not in str(error.value)


def test_a_workdir_without_a_run_is_refused(tmp_path):
  tiny.refused("piflow_jax.evaluate", [f"--workdir={tmp_path}"], "--workdir", "config.json")
  arguments = tiny.arguments("teacher", tmp_path, "--config.evaluation.samples=20")
  tiny.refused("piflow_jax.evaluate", arguments, "--workdir", str(tmp_path))


@pytest.mark.parametrize("fields, name", [
    ({}, "report"),
    ({"evaluation.batch_size": 7, "mesh.data": 1, "log_every": 3}, "report"),
    ({"sampling.nfe": 2, "sampling.h": 0.5}, "report-nfe=2,h=0.5"),
    ({"sampling.h": float("inf")}, "report-h=inf"),
    ({"teacher.guidance_interval": (0.1, 0.9)}, "report-guidance_interval=0.1-0.9"),
])
def test_the_report_s_folder_says_what_differs(tmp_path, fields, name):
  own, asked = tiny.config("student"), tiny.config("student")
  assert naming.named("report", own, tmp_path) == "report"  # a workdir without a config: nothing to differ from
  workdir_lib.write(tmp_path, own)
  asked.update_from_flattened_dict(fields)
  assert naming.named("report", asked, tmp_path) == name


def test_other_features_have_a_report_of_their_own(tmp_path):
  own, asked = tiny.config("student"), tiny.config("student")
  workdir_lib.write(tmp_path, own)
  asked.evaluation.features = pca.config(components=8)
  name = naming.named("report", asked, tmp_path)
  assert name.startswith("report-features=pca,components=8") and "/" not in name
  many = {f"policy.{k}": v for k, v in dict(components=12345678, logstd_width=12345678, dropout=0.123456789).items()}
  many |= {"method.total_substeps": 123456, "method.num_states": 123456, "sampling.h": 0.123456789,
           "sampling.nfe": 123456}
  names = set()
  for seed in range(2):
    asked.update_from_flattened_dict(many | {"evaluation.seed": seed + 1})
    names.add(naming.named("report", asked, tmp_path))
  assert len(names) == 2 and all(len(name) < 120 for name in names)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_measure_what_one_does(student, tmp_path):
  """Each takes in the samples of its own devices; arrays that are split go to the model."""
  config = workdir_lib.read(student)
  alone = evaluate.evaluate(config, student)
  expected = _report(alone.parent)["rows"]
  copy = tmp_path / "student"
  copy.mkdir()
  for name in ("config.json", "checkpoints", "metrics.jsonl"):
    (copy / name).symlink_to(student / name)
  command = ["launch/local.sh", "2", "2", sys.executable, "-m", "piflow_jax.evaluate", f"--workdir={copy}",
             "--config.evaluation.batch_size=12"]
  process = subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
  try:
    out = process.communicate(timeout=600)[0]
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
  assert process.returncode == 0, out
  assert out.count(str(copy / "report" / "report.html")) == 1, out  # one of them prints
  found = _report(copy / "report")["rows"]
  for one, other in zip(_figures(found), _figures(expected), strict=True):
    assert one["model"] == other["model"]
    for key in one.keys() - {"model", "agreement", "clip_score"}:  # digits have no texts
      np.testing.assert_allclose(one[key], other[key], rtol=1e-3, atol=1e-6, err_msg=key)
