"""Whose weights a file or a workdir holds, and what is said of them where they are read again."""

import json

from flax import linen as nn
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import flow
from piflow_jax import params as params_lib
from piflow_jax import teacher
from piflow_jax import weights as weights_lib
from piflow_jax import workdir as workdir_lib
from piflow_jax.convert import run
from piflow_jax.convert import trees
from piflow_jax.data import synthetic
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.distill import meanflow
from piflow_jax.policy import dx
from piflow_jax.policy import gmm
from tests import tiny
from tests.convert import foreign
from tests.convert import making
from tests.convert.making import FILE


def _made(workdir, config, seed=0):
  """A workdir of a run of this config; its weights."""
  tree = making.random(config, seed)
  making.save(workdir, tree)
  workdir_lib.write(workdir, config)
  return tree


def _video(policy=None, **network):
  c = config_lib.base()
  c.data = synthetic.config(shape=(2, 4, 4, 3), num_classes=0)
  c.network, c.flow = foreign.config(**network), flow.config(shift=2.0)
  c.method = flow_matching.config(label_dropout=0.0)
  if policy:
    c.teacher, c.policy, c.method = teacher.config(), policy, imitation.config()
  return c


@pytest.mark.parametrize("head", ["teacher", "gm", "dx", "parallel"])
def test_a_converted_workdir_knows_itself(head, tmp_path):
  config = making.changed(making.config(head), flow__shift=2.0)
  tree = _made(tmp_path / "run", config)
  run.to_torch(tmp_path / "run", tmp_path / "out")  # by the workdir alone
  run.from_torch(tmp_path / "out", tmp_path / "back", config)
  assert config_lib.to_plain(workdir_lib.read(tmp_path / "back")) == config_lib.to_plain(config)
  run.to_torch(tmp_path / "back", tmp_path / "again")
  first, second = (load_file(tmp_path / name / FILE) for name in ("out", "again"))
  assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
  abouts = [(tmp_path / name / "config.json").read_text() for name in ("out", "again")]
  assert abouts[0] == abouts[1]
  making.equal(making.weights(config, tmp_path / "back"), tree)


def test_a_converted_workdir_is_drawn_from_by_itself(tmp_path):
  config = making.config("gm")
  tree = _made(tmp_path / "run", config)
  run.to_torch(tmp_path / "run", tmp_path / "out")
  config = making.changed(config, policy__temperature=0.5)
  run.from_torch(tmp_path / "out", tmp_path / "back", config)
  drawn = []
  for workdir in ("run", "back"):
    out = tmp_path / f"{workdir}.npz"
    arguments = [f"--workdir={tmp_path / workdir}", f"--out={out}", "--labels=3,7", "--num=2"]
    assert tiny.invoke("piflow_jax.sample", arguments) == (0, "")
    drawn.append(np.load(out)["x_0"])
  assert drawn[0].shape == (4, 8, 8, 4) and np.array_equal(*drawn) and np.isfinite(drawn[0]).all()
  assert np.abs(drawn[0]).max() > 0.1 and tree


def test_a_teacher_read_by_a_students_config_gets_a_teachers(tmp_path):
  """A student's config names its teacher's network; who draws from the workdir draws a teacher."""
  save_file(making.state("dit_teacher"), tmp_path / FILE)
  student = making.changed(making.config("gm"), flow__shift=3.0, sampling__h=0.5)
  run.from_torch(tmp_path / FILE, tmp_path / "run", student)
  own = workdir_lib.read(tmp_path / "run")
  assert own.policy is None and own.teacher is None and own.method.make is flow_matching.make
  assert own.network == student.network and own.flow == student.flow and own.sampling.nfe == 50
  assert build.run(own).student is None
  run.to_torch(tmp_path / "run", tmp_path / "out")
  about = json.loads((tmp_path / "out" / "config.json").read_text())
  assert about["piflow_jax"]["role"] == "teacher" and about["piflow_jax"]["shift"] == 3.0
  # A teacher may have a network of its own.
  with student.unlocked():
    student.teacher = teacher.config(network=student.network.copy_and_resolve_references())
    student.network.depth = 3
  run.from_torch(tmp_path / FILE, tmp_path / "other", student)
  assert workdir_lib.read(tmp_path / "other").network.depth == 2
  student.teacher.network.time_scale = 7.0
  with pytest.raises(errors.UserError, match="config.teacher.network.time_scale is 7.0, set 1.0"):
    run.from_torch(tmp_path / "out", tmp_path / "third", student)


@pytest.mark.parametrize("field, value, words", [
    ("network.time_scale", 1000.0, "config.network.time_scale is 1000.0, was 1.0"),
    ("flow.shift", 3.0, "config.flow.shift is 3.0, was 1.0"), ("method.nfe", 2, "config.method.nfe is 2, was 1")])
def test_a_config_that_is_not_the_workdirs_is_refused(field, value, words, tmp_path):
  config = making.config("gm")
  _made(tmp_path / "run", config)
  other = making.changed(config, **{field: value})
  with pytest.raises(errors.UserError, match=f"--config: .* was made by another config .{words}"):
    run.to_torch(tmp_path / "run", tmp_path / "out", other)
  # How something is computed is not what it means.
  free = making.changed(config, network__unroll=2, network__dtype="bfloat16", policy__temperature=0.5)
  run.to_torch(tmp_path / "run", tmp_path / "out", free)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["piflow_jax"]["temperature"] == 0.5


@pytest.mark.parametrize("change, words", [
    (dict(method__nfe=2), "config.method.nfe is 2, the file's 1"),
    (dict(method__final_scale=0.5), "config.method.final_scale is 0.5, the file's 1.0"),
    (dict(flow__shift=2.0), "the shift of config.flow is 2.0, the file's 1.0"),
    (dict(data__shape=(16, 16, 4)), r"x_0 of config.data is \(16, 16, 4\), the file's \[8, 8, 4\]")])
def test_what_weights_mean_is_held_against_the_files_config(change, words, tmp_path):
  config = making.config("gm")
  _made(tmp_path / "run", config)
  run.to_torch(tmp_path / "run", tmp_path / "out")
  with pytest.raises(errors.UserError, match=words):
    run.from_torch(tmp_path / "out", tmp_path / "back", making.changed(config, **change))
  assert not (tmp_path / "back").exists()


def test_a_partly_trained_student_is_exported_whole(tmp_path):
  whole = making.config("gm")
  base = _made(tmp_path / "teacher", making.config("teacher"), seed=1)
  part = making.changed(whole, teacher__checkpoint=str(tmp_path / "teacher"))
  part.trained = ("head/.*", "adaln_out/.*")
  tree = making.random(whole)
  trained = params_lib.select(tree, lambda path: path.startswith(("head/", "adaln_out/")))
  making.save(tmp_path / "run", trained)
  workdir_lib.write(tmp_path / "run", part)
  run.to_torch(tmp_path / "run", tmp_path / "out")
  want = params_lib.overlay(base, trained, tree)
  run.from_torch(tmp_path / "out", tmp_path / "back", whole)
  making.equal(making.weights(whole, tmp_path / "back"), want)
  # Read by the same config all of it is there, and its config says so.
  run.from_torch(tmp_path / "out", tmp_path / "again", part)
  own = workdir_lib.read(tmp_path / "again")
  assert own.trained == (".*",)
  making.equal(making.weights(own, tmp_path / "again"), want)
  run.to_torch(tmp_path / "again", tmp_path / "last")
  # Without the teacher's weights, or with those of another, there is nothing to export.
  with pytest.raises(errors.UserError, match="config.teacher.checkpoint: is empty, and .*blocks/adaln/bias"):
    run.to_torch(tmp_path / "run", tmp_path / "none", making.changed(part, teacher__checkpoint=""))
  _made(tmp_path / "wide", making.config("teacher", width=32))
  for name, words in (("nowhere", "no checkpoint in .*nowhere"), ("wide", ".*wide.*network.width is 16, was 32")):
    other = making.changed(part, teacher__checkpoint=str(tmp_path / name))
    with pytest.raises(errors.UserError, match=f"config.teacher.checkpoint: {words}"):
      run.to_torch(tmp_path / "run", tmp_path / "none", other)
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("policy", [None, gmm.config(components=2, logstd_width=4), dx.config(points=2)])
def test_a_network_without_names_goes_by_its_paths(policy, tmp_path, capsys):
  config = _video(policy)
  tree = _made(tmp_path / "run", config)
  run.to_torch(tmp_path / "run", tmp_path / "out")
  stored = load_file(tmp_path / "out" / FILE)
  assert stored.keys() == params_lib.named_leaves(tree).keys()
  about = json.loads((tmp_path / "out" / "config.json").read_text())["piflow_jax"]
  network = {"make": "@tests.convert.foreign:make", "width": 8, "time_scale": 1.0, "loud": False}
  assert about["config"]["network"] == network
  assert about["naming"] == "paths" and about["latent_shape"] == [2, 4, 4, 3] and about["shift"] == 2.0
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", FILE]
  run.from_torch(tmp_path / "out", tmp_path / "back", config)
  assert f"a {'student' if policy else 'teacher'} of" in capsys.readouterr().out
  making.equal(making.weights(config, tmp_path / "back"), tree)
  run.to_torch(tmp_path / "back", tmp_path / "again")
  assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
  for fields, words in ((dict(time_scale=1000.0), "config.network.time_scale is 1000.0, set 1.0"),
                        (dict(width=16), "config.network.width is 16, set 8")):
    with pytest.raises(errors.UserError, match=words):
      run.from_torch(tmp_path / "out", tmp_path / "none", _video(policy, **fields))
  run.from_torch(tmp_path / "out", tmp_path / "loud", _video(policy, loud=True))
  with pytest.raises(errors.UserError, match="--format: 'release' is none of paths"):
    run.to_torch(tmp_path / "run", tmp_path / "none", naming="release")
  assert not (tmp_path / "none").exists()


def test_meanflow_has_no_names_but_its_paths(tmp_path):
  config = making.config("teacher")
  with config.unlocked():
    config.method = meanflow.config()
  tree = _made(tmp_path / "run", config)
  assert "span_in" in tree
  words = "--format: pi-Flow's release: .* has no name for span_in/bias.*; paths has"
  with pytest.raises(errors.UserError, match=words):
    run.to_torch(tmp_path / "run", tmp_path / "none")
  run.to_torch(tmp_path / "run", tmp_path / "out", naming="paths")
  run.from_torch(tmp_path / "out", tmp_path / "back", config)
  making.equal(making.weights(config, tmp_path / "back"), tree)
  assert workdir_lib.read(tmp_path / "back").method.make is meanflow.make


class _Head(dx.DXHead):
  """A head that pi-Flow's release does not know."""

  export_config = None


def _head_config(**fields):
  return config_lib.noun(_make_head, dict(points=3, segment=0.0, polynomial=False), fields)


def _make_head(dtype, *, points, segment, polynomial):
  head = _Head(points, segment, polynomial, dtype)
  return head


def test_a_head_that_does_not_say_what_it_is_is_not_exported(tmp_path, monkeypatch):
  """It used to be called ParallelDecoding."""
  config = making.config("dx")
  with config.unlocked():
    config.policy = _head_config()
  monkeypatch.delattr(dx.DXHead, "export_config")
  monkeypatch.delattr(_Head, "export_config")
  making.save(tmp_path / "run", making.random(config))
  with pytest.raises(errors.UserError, match="release: _Head cannot be exported under these names: .*--format=paths"):
    run.to_torch(tmp_path / "run", tmp_path / "none", config)
  assert not (tmp_path / "none").exists()
  run.to_torch(tmp_path / "run", tmp_path / "out", config, naming="paths")
  run.from_torch(tmp_path / "out", tmp_path / "back", config)
  making.equal(making.weights(config, tmp_path / "back"), making.random(config))
  monkeypatch.setattr(_Head, "export_config", lambda self, clock: dict(type="Mine"), raising=False)
  with pytest.raises(errors.UserError, match="a policy 'Mine' cannot be exported under these names, which have GMFlow"):
    run.to_torch(tmp_path / "run", tmp_path / "none", config)


def test_a_students_wrong_size_names_its_field(tmp_path):
  """It used to be called a misfit of the network, or, of a file that came alone, of the teacher."""
  config = making.config("gm")
  save_file(making.state("dit_gm"), tmp_path / "gm.safetensors")
  save_file(making.state("dit_dx"), tmp_path / "dx.safetensors")
  run.from_torch(tmp_path / "gm.safetensors", tmp_path / "run", config)
  cases = [("gm", making.changed(config, policy__components=8), "config.policy.components is 8, set 4"),
           ("gm", making.changed(config, policy__logstd_width=32), "config.policy.logstd_width is 32, set 16"),
           ("dx", making.changed(making.config("dx"), policy__points=5), "config.policy.points is 5, set 3"),
           ("gm", making.config("gm", depth=3), "config.network.depth is 3, set 2"),
           ("gm", making.config("gm", width=32), "config.network.width is 32, set 16"),
           ("gm", making.config("gm", patch=4), "config.network.patch is 4, set 2"),
           ("gm", making.config("gm", num_classes=1000), "the number of classes of config.data is 1000, set 10"),
           ("gm", making.config("gm", shape=(8, 8, 3)), "the number of channels of config.data is 3, set 4")]
  for name, other, words in cases:
    with pytest.raises(errors.UserError, match=words) as e:
      run.from_torch(tmp_path / f"{name}.safetensors", tmp_path / "none", other)
    assert "teacher" not in str(e.value)
  with pytest.raises(errors.UserError, match="--workdir: .* does not fit .*: config.policy.components is 8, set 4"):
    with (tmp_path / "run" / "config.json").open("w") as f:
      json.dump({"format": 2, "config": config_lib.to_plain(cases[0][1])}, f)
    run.to_torch(tmp_path / "run", tmp_path / "none")


def test_both_weights_of_a_config(tmp_path):
  theirs, own = trees.weights_of(making.config("gm"))
  assert theirs.role == "teacher" and own.role == "student" and own.policy == {"type": "GMFlow"}
  assert "head/means/kernel" in own.shapes and "head/out/kernel" in theirs.shapes and own.stored == own.shapes
  assert trees.weights_of(making.config("teacher"))[0].shapes == trees.weights_of(making.config("teacher"))[1].shapes
  assert isinstance(own.head, nn.Module)
  weights_lib.save_weights(tmp_path / "run", [("a", np.zeros(1, np.float32))])
  with pytest.raises(errors.UserError, match="missing: .*; unknown: a"):
    run.to_torch(tmp_path / "run", tmp_path / "out", making.config("gm"))
