"""Programs as users start them: bad input gets one line, a non-zero status, no traceback, and nothing is written or lost."""

import pathlib
import re
import shutil

import pytest

from tests import tiny


def _tree(folder):
  return {p: p.read_bytes() if p.is_file() else None for p in sorted(pathlib.Path(folder).rglob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("arguments, words", [
    (["--config.nonsense=3"], ["nonsense"]),
    (["--config.optimizer.learning_rat=3"], ["learning_rat"]),
    (["--config.batch_size=many"], ["config.batch_size", "many"]),
    (["--config.batch_size=1.5"], ["config.batch_size", "1.5"]),
    (["--config.batch_size=0"], ["config.batch_size"]),
    (["--config.microbatches=3"], ["config.batch_size", "16", "multiple of 3"]),
    (["--config.mesh.data=7"], ["config.mesh", "7", "1 devices"]),
    (["--config.network.heads=5"], ["config.network.heads", "5", "32"]),
    (["--config.network.patch=3"], ["config.network.patch", "3"]),
    (["--config.network.dtype=float8"], ["config.network.dtype", "bfloat16"]),
    (["--config.optimizer.schedule=linear"], ["config.optimizer.schedule", "cosine"]),
    (["--config.data.num_classes=11"], ["config.data", "11"]),
    (["stray"], ["stray"]),
])
def test_bad_fields_are_named(arguments, words, tmp_path):
  tiny.refused(tiny.command("teacher", tmp_path / "run", *arguments), *words)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_configs_are_named(tmp_path):
  tiny.refused(tiny.command("nobody", tmp_path / "run"), "nobody", "teacher, student")
  program = [tiny.sys.executable, "-m", "piflow_jax.main", f"--workdir={tmp_path / 'run'}"]
  tiny.refused([*program, "--config=configs/none.py"], "configs/none.py")
  no_workdir = [a for a in tiny.command("teacher", tmp_path) if not a.startswith("--workdir")]
  tiny.refused(no_workdir, "workdir")


@pytest.mark.slow
def test_bad_teachers_are_named(tmp_path, tiny_teacher):
  command = lambda teacher, *more: tiny.command("student", tmp_path / "run", f"--config.teacher.checkpoint={teacher}", *more)
  field = "config.teacher.checkpoint"
  tiny.refused(command(""), field, "empty")
  tiny.refused(command(tmp_path / "nowhere"), field, "nowhere", "no checkpoint")
  foreign = tmp_path / "foreign" / "checkpoints" / "7"
  foreign.mkdir(parents=True)
  (foreign / "weights.bin").write_bytes(b"not Orbax")
  tiny.refused(command(tmp_path / "foreign"), field, "foreign", "not a checkpoint")
  tiny.refused(command(tiny_teacher, "--config.network.width=16"), field, "does not fit config.network", "expected")
  tiny.refused(command(tiny_teacher, "--config.network.depth=3"), field, "does not fit config.network", "expected")
  tiny.refused(command(tiny_teacher, "--config.teacher.weights=best"), "config.teacher.weights", "best")
  torn = tmp_path / "torn"
  shutil.copytree(tiny_teacher, torn)
  for path in (torn / "checkpoints" / "4" / "state").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      path.write_bytes(path.read_bytes()[:100])
  tiny.refused(command(torn), field, "torn")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_workdirs_are_named_and_left_alone(tmp_path, tiny_teacher):
  occupied = tmp_path / "file"
  occupied.write_text("mine")
  tiny.refused(tiny.command("teacher", occupied), "--workdir", "file")
  tiny.refused(tiny.command("teacher", occupied / "below"), "--workdir", "below")
  assert occupied.read_text() == "mine"
  before = _tree(tiny_teacher)
  tiny.refused(tiny.command("teacher", tiny_teacher, "--config.seed=5"), "--workdir", "another config",
               "config.seed is 5, was 0")
  assert _tree(tiny_teacher) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_its_own_status(tmp_path):
  args = tiny.command("teacher", tmp_path / "run", "--config.optimizer.learning_rate=1e17", "--config.checkpoint_every=1")
  status, _, err = tiny.run(args)
  assert status == 3 and "Traceback" not in err
  last = err.splitlines()[-1]
  assert re.match(r"error: \w+ is (inf|nan)", last) and "at step" in last and "last good checkpoint" in last


@pytest.mark.slow
def test_help_teaches():
  status, out, err = tiny.run([tiny.sys.executable, "-m", "piflow_jax.main", "--help"])
  assert "--config=configs/digits.py:teacher" in out + err and "Exit status" in out + err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("program, arguments, words", [
    ("compare", ["--config=configs/digits.py:student", "--methods="], ["--methods", "nothing"]),
    ("compare", ["--config=configs/digits.py", "--calls=1,two"], ["--calls", "1,two"]),
    ("compare", ["--config=configs/digits.py", "--methods=artist"], ["artist,1", "choose ROLE"]),
    ("compare", ["--config=configs/base.py"], ["configs/base.py", "student,1"]),
    ("compare", ["--config=configs/digits.py", "stray"], ["stray"]),
    ("analytic", ["--config=configs/gaussians.py", "--stops="], ["--stops", "nothing"]),
])
def test_bad_comparisons_are_named(program, arguments, words, tmp_path):
  command = [tiny.sys.executable, "-m", f"piflow_jax.evaluation.{program}", f"--workdir={tmp_path / 'run'}"]
  tiny.refused([*command, *arguments], *words)
  assert not (tmp_path / "run").exists()
