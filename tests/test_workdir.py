"""A workdir knows its config, is held against it, and says so in one line."""

import json

import pytest

from configs import digits
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import workdir
from piflow_jax.distill import imitation
from piflow_jax.evaluation import naming
from piflow_jax.policy import gmm
from tests import tiny


def _begun(folder):
  (folder / "checkpoints" / "2").mkdir(parents=True)


def test_a_workdir_gives_its_config_back(tmp_path):
  config = tiny.config("student")
  workdir.write(tmp_path / "run", config)
  assert config_lib.to_plain(workdir.read(tmp_path / "run")) == config_lib.to_plain(config)
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json"]


def test_until_something_is_saved_a_workdir_is_nobodys(tmp_path):
  workdir.claim(tmp_path, tiny.config("teacher"))
  workdir.claim(tmp_path, tiny.config("teacher", batch_size=8, optimizer__moments="int8"))
  assert workdir.read(tmp_path).batch_size == 8
  _begun(tmp_path)
  with pytest.raises(errors.UserError, match="holds a run of another config .config.batch_size is 4, was 8"):
    workdir.claim(tmp_path, tiny.config("teacher", batch_size=4, optimizer__moments="int8"))


@pytest.mark.parametrize("fields", [
    dict(steps=9), dict(log_every=7), dict(mesh__fsdp=2), dict(network__remat="full"), dict(network__unroll=2),
    dict(sampling__nfe=2), dict(evaluation__samples=3), dict(policy__temperature=0.5), dict(microbatches=2),
    dict(teacher__checkpoint="elsewhere")])
def test_what_does_not_change_the_numbers_may_change(fields, tmp_path):
  workdir.claim(tmp_path, tiny.config("student"))
  _begun(tmp_path)
  workdir.claim(tmp_path, tiny.config("student", **fields))


@pytest.mark.parametrize("role, fields, words", [
    ("student", dict(seed=1), "config.seed is 1, was 0"),
    ("student", dict(network__width=64), "config.network.width is 64, was 32"),
    ("student", dict(policy__components=3), "config.policy.components is 3, was 4"),
    ("student", dict(method__num_states=3), "config.method.num_states is 3, was 2"),
    ("student", dict(flow__shift=2.0), "config.flow.shift is 2.0, was 1.0"),
    ("student", dict(teacher__guidance_scale=2.0), "config.teacher.guidance_scale is 2.0, was 1.0"),
    ("student", dict(trained=("head/.*",)), "config.trained"),
    ("dx", dict(), "config.method.window_substeps is 10, was 0; config.policy"),
    ("student", dict(steps=9, optimizer__schedule="cosine"), "config.optimizer.schedule is 'cosine'"),
])
def test_what_changes_the_numbers_is_refused(role, fields, words, tmp_path):
  workdir.claim(tmp_path, tiny.config("student"))
  _begun(tmp_path)
  before = (tmp_path / "config.json").read_text()
  with pytest.raises(errors.UserError, match=words.replace("(", r"\(")):
    workdir.claim(tmp_path, tiny.config(role, **fields))
  assert (tmp_path / "config.json").read_text() == before


def test_a_run_of_before_a_field_came_goes_on_and_its_figures_keep_their_name(tmp_path):
  config = tiny.config("student")
  workdir.claim(tmp_path, config)
  _begun(tmp_path)
  known = json.loads((tmp_path / "config.json").read_text())
  for name in ("zero", "policy.dropout", "method.num_states", "evaluation.seed"):
    *parents, last = name.split(".")
    table = known["config"]
    for parent in parents:
      table = table[parent]
    del table[last]
  (tmp_path / "config.json").write_text(json.dumps(known))
  # At what such fields are by themselves they change nothing; at another value they do.
  at_default = tiny.config("student", method__num_states=config_lib.fields_of(imitation.config())["num_states"],
                           policy__dropout=config_lib.fields_of(gmm.config())["dropout"])
  assert naming.named("report", at_default, tmp_path) == "report"
  workdir.claim(tmp_path, at_default)
  (tmp_path / "config.json").write_text(json.dumps(known))
  with pytest.raises(errors.UserError, match="config.policy.dropout is 0.25, was"):
    workdir.claim(tmp_path, tiny.config("student", policy__dropout=0.25))


def test_why_a_cosine_run_cannot_be_made_longer_is_said(tmp_path):
  workdir.claim(tmp_path, tiny.config("teacher", optimizer__schedule="cosine"))
  _begun(tmp_path)
  words = "config.steps is 9, was 4, and a cosine schedule's length is in every step"
  with pytest.raises(errors.UserError, match=words):
    workdir.claim(tmp_path, tiny.config("teacher", optimizer__schedule="cosine", steps=9))


@pytest.mark.parametrize("text", ["[]", "{}", "3", "{", '{"format": 2}', '{"format": 9, "config": {}}', "[" * 100_000])
def test_a_config_that_is_none_is_refused_and_nothing_goes_on(text, tmp_path):
  workdir.claim(tmp_path, tiny.config("teacher"))
  _begun(tmp_path)
  (tmp_path / "config.json").write_text(text)
  for f in (lambda: workdir.claim(tmp_path, tiny.config("teacher", seed=4)), lambda: workdir.read(tmp_path)):
    with pytest.raises(errors.UserError, match="--workdir: .*config.json is no config"):
      f()


def test_checkpoints_without_a_config_are_nobodys_to_go_on_with(tmp_path):
  _begun(tmp_path)
  with pytest.raises(errors.UserError, match="has checkpoints but no config.json"):
    workdir.claim(tmp_path, tiny.config("teacher", seed=4))


def test_a_version_whose_fields_are_gone_is_said_to_be_one(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"seed": 0, "network.make": "piflow_jax.models.dit:DiT"}))
  with pytest.raises(errors.UserError, match="is of a version whose fields are gone"):
    workdir.read(tmp_path)


@pytest.mark.parametrize("text, words", [
    ("", "--workdir: is empty"), ("s3://bucket/run", "s3:// is not supported; give a local folder or a gs:// path"),
    ("{file}", "is a file; give a folder")])
def test_paths_that_are_no_folders_are_refused(text, words, tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(errors.UserError, match=words):
    workdir.path_of(text.format(file=tmp_path / "file"))


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir.path_of("~/run") == str(tmp_path / "run")
  assert workdir.path_of("gs://bucket/~run") == "gs://bucket/~run"


def test_a_teachers_own_word_on_its_time_is_heard(tmp_path):
  workdir.write(tmp_path, tiny.config("teacher", network__time_scale=1000.0))
  config = tiny.config("student", teacher__checkpoint=str(tmp_path))
  with pytest.raises(errors.UserError, match="config.network.time_scale is 1.0, was 1000.0.*set config.network to"):
    workdir.check_teacher(config)
  workdir.check_teacher(tiny.config("student", teacher__checkpoint=str(tmp_path), network__time_scale=1000.0,
                                    network__remat="full", network__dtype="bfloat16"))
  own = tiny.config("student", teacher__checkpoint=str(tmp_path))
  own.teacher.network = tiny.config("teacher", network__time_scale=1000.0, network__depth=3).network
  with pytest.raises(errors.UserError, match="config.teacher.network.depth is 3, was 2"):
    workdir.check_teacher(own)


def test_a_config_file_is_as_good_as_its_workdir():
  assert config_lib.to_plain(digits.get_config("dx")) == config_lib.to_plain(
      config_lib.from_plain(config_lib.to_plain(digits.get_config("dx"))))
