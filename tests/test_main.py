"""The programs' command lines: bad input gets one line and a status, nothing is written or lost; --help teaches."""

import pathlib
import re
import shutil
import sys

import numpy as np
import pytest

from configs import digits
from piflow_jax import config as config_lib
from piflow_jax.convert import __main__ as convert
from tests import tiny

MAIN = "piflow_jax.main"
PROGRAMS = ("main", "sample", "evaluate", "convert.__main__", "plan.__main__", "evaluation.compare",
            "evaluation.analytic")


def _tree(folder):
  return {p: p.read_bytes() if p.is_file() else None for p in sorted(pathlib.Path(folder).rglob("*"))}


@pytest.mark.parametrize("arguments, words", [
    (["--config.nonsense=3"], ["config.nonsense", "config has no field"]),
    (["--config.optimizer.learning_rat=3"], ["learning_rat", "learning_rate"]),
    (["--config.batch_size=many"], ["config.batch_size", "many"]),
    (["--config.batch_size=1.5"], ["config.batch_size", "1.5"]),
    (["--config.batch_size=0"], ["config.batch_size"]),
    (["--config.microbatches=3"], ["config.batch_size", "16", "multiple of"]),
    (["--config.mesh.data=7"], ["config.mesh", "7", "8 devices"]),
    (["--config.network.heads=5"], ["config.network.heads", "5", "32"]),
    (["--config.network.patch=3"], ["config.network.patch", "3"]),
    (["--config.network.dtype=float8"], ["config.network.dtype", "bfloat16"]),
    (["--config.optimizer.schedule=linear"], ["config.optimizer.schedule", "cosine"]),
    (["--config.network.make=dit.DiT"], ["--config.network.make", "set in a config file"]),
    (["--config.policy.components=3"], ["--config.policy.components", "config.policy is not set"]),
    (["--config.network=3"], ["--config.network", "set in a config file"]),
    (["--config.steps.more=3"], ["--config.steps.more", "config.steps is 3000, which has no fields"]),
    (["stray"], ["stray"]),
    (["--nosuch=3"], ["nosuch"]),
])
def test_bad_fields_are_named(arguments, words, tmp_path):
  tiny.refused(MAIN, tiny.arguments("teacher", tmp_path / "run", *arguments), *words)
  assert not (tmp_path / "run").exists()


def test_a_user_sees_the_line_and_the_status(tmp_path):
  """One real start of each program: the line is the only one, and no traceback is near it."""
  for module in PROGRAMS[:3]:
    args = [sys.executable, "-m", f"piflow_jax.{module}", "--config=configs/digits.py:teacher", "--config.batch_size=0",
            f"--workdir={tmp_path / 'run'}", *(["--out=a.png"] if module == "sample" else [])]
    status, out, err = tiny.run(args)
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: config.batch_size"), (module, err, out)


def test_bad_configs_are_named(tmp_path):
  workdir = f"--workdir={tmp_path / 'run'}"
  tiny.refused(MAIN, tiny.arguments("nobody", tmp_path / "run"), "nobody", "teacher, student")
  tiny.refused(MAIN, ["--config=configs/digits.py:dx,0", workdir], "dx,0", "choose ROLE")
  tiny.refused(MAIN, [workdir, "--config=configs/none.py"], "configs/none.py", "is not there")
  tiny.refused(MAIN, [workdir, "--config=tests/tiny.py"], "tests/tiny.py", "no get_config")
  tiny.refused(MAIN, [workdir, "--config.steps=4"], "--config.steps=4: there is no config to set it in",
               "--config=FILE")
  tiny.refused(MAIN, [workdir], "--config: missing", "configs/digits.py")
  tiny.refused(MAIN, ["--config=configs/digits.py:teacher"], "--workdir: missing")
  broken = tmp_path / "broken.py"
  broken.write_text("import nosuchmodule\n")
  tiny.refused(MAIN, [workdir, f"--config={broken}"], "broken.py", "line 1", "nosuchmodule")
  broken = tmp_path / "wrong.py"
  broken.write_text("def get_config():\n  return undefined_name\n")
  tiny.refused(MAIN, [workdir, f"--config={broken}"], "wrong.py", "line 2", "undefined_name")
  broken = tmp_path / "nothing.py"
  broken.write_text("def get_config():\n  return None\n")
  tiny.refused(MAIN, [workdir, f"--config={broken}"], "nothing.py", "returned NoneType")
  empty = tmp_path / "empty.py"
  empty.write_text("from piflow_jax import config\ndef get_config():\n  return config.base()\n")
  tiny.refused(MAIN, [workdir, f"--config={empty}"], "config.data", "noun")


def test_a_config_file_is_found_with_what_lies_beside_it(tmp_path):
  (tmp_path / "mine_beside.py").write_text("WIDTH = 12\n")
  (tmp_path / "mine.py").write_text(
      "import mine_beside\nfrom configs import digits\n"
      "def get_config():\n  c = digits.get_config('teacher')\n  c.network.width = mine_beside.WIDTH\n  return c\n")
  tiny.refused(MAIN, [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}", "--config.batch_size=0"],
               "config.batch_size")


@pytest.mark.slow
def test_bad_teachers_are_named(tmp_path, tiny_teacher):
  def refused(teacher, *words, more=()):
    args = tiny.arguments("student", tmp_path / "run", f"--config.teacher.checkpoint={teacher}", *more)
    tiny.refused(MAIN, args, *words)

  field = "config.teacher.checkpoint"
  refused("", field, "empty")
  refused(tmp_path / "nowhere", field, "nowhere", "no checkpoint")
  foreign = tmp_path / "foreign" / "checkpoints" / "7"
  foreign.mkdir(parents=True)
  (foreign / "weights.bin").write_bytes(b"not Orbax")
  refused(tmp_path / "foreign", field, "foreign", "not a checkpoint")
  refused(tiny_teacher, field, "config.network.width is 16, was 32", more=["--config.network.width=16"])
  refused(tiny_teacher, field, "config.network.time_scale is 1000.0, was 1.0",
          more=["--config.network.time_scale=1000"])
  unknown = tmp_path / "unknown"  # weights that came without a config
  shutil.copytree(tiny_teacher, unknown)
  (unknown / "config.json").unlink()
  refused(unknown, field, "does not fit", more=["--config.network.depth=3"])
  refused(tiny_teacher, "config.teacher.weights", "best", more=["--config.teacher.weights=best"])
  torn = tmp_path / "torn"
  shutil.copytree(tiny_teacher, torn)
  for step in ("2", "4"):
    for path in (torn / "checkpoints" / step / "state").rglob("*"):
      if path.is_file() and path.stat().st_size > 10_000:
        path.write_bytes(path.read_bytes()[:100])
  refused(torn, field, "torn")
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_bad_workdirs_are_named_and_left_alone(tmp_path, tiny_teacher):
  occupied = tmp_path / "file"
  occupied.write_text("mine")
  tiny.refused(MAIN, tiny.arguments("teacher", occupied), "--workdir", "file")
  tiny.refused(MAIN, tiny.arguments("teacher", occupied / "below"), "--workdir", "below")
  tiny.refused(MAIN, tiny.arguments("teacher", "s3://bucket/run"), "--workdir", "s3://")
  tiny.refused(MAIN, tiny.arguments("teacher", ""), "--workdir: is empty")
  assert occupied.read_text() == "mine"
  before = _tree(tiny_teacher)
  tiny.refused(MAIN, tiny.arguments("teacher", tiny_teacher, "--config.seed=5"), "--workdir", "another config",
               "config.seed is 5, was 0")
  assert _tree(tiny_teacher) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_its_own_status(tmp_path):
  status, line = tiny.invoke(MAIN, tiny.arguments(
      "teacher", tmp_path / "run", "--config.optimizer.learning_rate=1e17", "--config.checkpoint_every=1"))
  assert status == 3 and re.match(r"\w+ is (inf|nan)", line) and "at step" in line and "last good checkpoint" in line


@pytest.mark.parametrize("module", PROGRAMS)
def test_help_teaches(module, capsys):
  if module == "convert.__main__":
    status, line = convert.invoke(["convert", "--help"])  # two programs under one name
  else:
    status, line = tiny.invoke(f"piflow_jax.{module}", ["--help"])
  out = capsys.readouterr().out
  assert status == 0 and not line
  for word in ("python -m piflow_jax", "--config:", "--workdir:", "--config.optimizer.learning_rate=5e-05"):
    assert word in out, word


def test_help_lists_every_field_of_the_config_given(capsys):
  assert tiny.invoke(MAIN, ["--config=configs/digits.py:student", "--help"]) == (0, "")
  out = capsys.readouterr().out
  for name, _, comment in config_lib.described(digits.get_config()):
    assert f"--config.{name}" in out and comment in out, name
  assert "--config.policy.components=8" in out and "Exit status" in out


@pytest.mark.slow
def test_help_of_a_workdir_lists_its_own_config(tiny_teacher, capsys):
  assert tiny.invoke("piflow_jax.sample", [f"--workdir={tiny_teacher}", "--help"]) == (0, "")
  assert "--config.network.width=32" in capsys.readouterr().out


@pytest.mark.parametrize("program, arguments, words", [
    ("compare", ["--config=configs/digits.py:student", "--methods="], ["--methods", "nothing"]),
    ("compare", ["--config=configs/digits.py", "--calls=1,two"], ["--calls", "1,two"]),
    ("compare", ["--config=configs/digits.py", "--methods=artist"], ["artist,1", "choose ROLE"]),
    ("analytic", ["--config=configs/gaussians.py", "--stops="], ["--stops", "nothing"]),
    ("compare", ["--config=configs/digits.py", "stray"], ["stray"]),
])
def test_bad_comparisons_are_named(program, arguments, words, tmp_path):
  tiny.refused(f"piflow_jax.evaluation.{program}", [f"--workdir={tmp_path / 'run'}", *arguments], *words)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_workdir_alone_is_enough_to_draw(tiny_teacher, tmp_path):
  status, line = tiny.invoke("piflow_jax.sample", [
      f"--workdir={tiny_teacher}", f"--out={tmp_path / 'a.npz'}", "--labels=3", "--num=2", "--config.sampling.nfe=4"])
  assert (status, line) == (0, "") and np.load(tmp_path / "a.npz")["x_0"].shape == (2, 8, 8, 1)
  tiny.refused("piflow_jax.sample", [f"--workdir={tmp_path}", f"--out={tmp_path / 'b.npz'}"], "--workdir",
               "no config.json")
