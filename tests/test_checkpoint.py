"""A run's checkpoints: checksums, what is passed over, what waits for what. On small states, without a run."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from piflow_jax import checkpoint
from piflow_jax import checksums
from piflow_jax import errors
from tests import tiny


def state(step):
  """Float32 draws, which do not compress: a changed bit in them is another number and no broken file."""
  draws = np.random.default_rng(step).standard_normal((2, 64, 512)).astype(np.float32)
  return {"step": jnp.asarray(step), "params": {"a": jnp.asarray(draws[0]), "b": {"c": jnp.full(3, step, jnp.float32)}},
          "ema": {"a": jnp.asarray(draws[1]), "b": {"c": jnp.zeros(3)}}}


def write(workdir, *steps):
  with checkpoint.open_manager(workdir) as manager:
    for step in steps:
      checkpoint.save(manager, step, state(step), {"batches": step, "seconds": 0.5})
  return workdir


def restore(workdir):
  with checkpoint.open_manager(workdir) as manager:
    return checkpoint.restore_latest(manager, jax.eval_shape(lambda: state(0)))


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path, place, bit=3):
  data = bytearray(path.read_bytes())
  data[place] ^= 1 << bit
  path.write_bytes(data)


def arrays(step_folder):
  """The file with the arrays' bytes."""
  return max(files(step_folder), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  return write(tmp_path_factory.mktemp("two") / "run", 1, 2)


@pytest.fixture
def run(two, tmp_path):
  return shutil.copytree(two, tmp_path / "run")


def test_it_comes_back_with_its_position(two):
  step, found, position = restore(two)
  assert step == 2 and position == {"batches": 2, "seconds": 0.5}
  jax.tree.map(np.testing.assert_array_equal, found, state(2))


@pytest.mark.parametrize("eighth", range(8))
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(run, eighth, caplog):
  path = arrays(run / "checkpoints" / "2")
  flip(path, int((eighth + 0.5) * path.stat().st_size / 8), eighth)
  step, found, position = restore(run)
  assert step == 1 and position["batches"] == 1
  jax.tree.map(np.testing.assert_array_equal, found, state(1))
  words = [message for message in caplog.messages if "checkpoint 2 cannot be read and is passed over" in message]
  assert len(words) == 1 and f"the checksum of {path.relative_to(run / 'checkpoints/2/state')} differs" in words[0]
  assert (run / "checkpoints" / "torn_2").exists()


def test_no_file_of_a_checkpoint_may_change(two, tmp_path):
  folder = two / "checkpoints" / "2"
  # Orbax's own record of the save, and empty marks that it is whole, say nothing about the numbers.
  other = ("_CHECKPOINT_METADATA", "commit_success.txt")
  names = [path.relative_to(folder) for path in files(folder) if path.name not in other]
  assert {"manifest.ocdbt", "_METADATA", "metadata", checksums.FILE} <= {name.name for name in names}
  for i, name in enumerate(names):
    run = shutil.copytree(two, tmp_path / str(i))
    flip(run / "checkpoints" / "2" / name, (run / "checkpoints" / "2" / name).stat().st_size // 2)
    assert restore(run)[0] == 1, name
    shutil.rmtree(run)


def test_a_file_that_is_gone_is_told(run, caplog):
  path = arrays(run / "checkpoints" / "2")
  path.unlink()
  assert restore(run)[0] == 1 and any(path.name in message for message in caplog.messages)


def test_where_none_can_be_read_that_is_one_line_and_nothing_is_lost(run):
  for step in "12":
    flip(arrays(run / "checkpoints" / step), 99)
  with pytest.raises(errors.UserError, match="no checkpoint under .* can be read .*the checksum of .* differs") as e:
    restore(run)
  assert "\n" not in str(e.value)
  assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


def test_checkpoints_of_a_version_without_checksums_are_read_with_a_warning(run, monkeypatch):
  for path in run.rglob(checksums.FILE):
    path.unlink()
  for step in "12":
    path = run / "checkpoints" / step / "position" / "metadata"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k in ("batches", "seconds")}))
  said = []
  monkeypatch.setattr(checksums.logging, "log_first_n", lambda level, text, n, *args: said.append((text % args, n)))
  assert restore(run)[0] == 2
  said = [(text, n) for text, n in said if "was written without checksums" in text]
  assert len(said) == 1 and said[0][1] == 1


def test_other_programs_of_orbax_read_it_too(two):
  with ocp.CheckpointManager(two / "checkpoints") as manager:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(), position=ocp.args.JsonRestore())
    found = manager.restore(2, args=args)
  np.testing.assert_array_equal(found["state"]["params"]["a"], state(2)["params"]["a"])
  known = json.loads((two / "checkpoints" / "2" / "_CHECKPOINT_METADATA").read_text())
  assert known["item_handlers"]["state"].startswith("orbax.checkpoint.")


def test_the_loop_does_not_wait_for_checksums_and_nothing_is_committed_without(tmp_path, monkeypatch):
  begun, go_on, write_sums = threading.Event(), threading.Event(), checksums.write

  def slow(folder):
    begun.set()
    assert go_on.wait(60)
    write_sums(folder)

  monkeypatch.setattr(checksums, "write", slow)
  with checkpoint.open_manager(tmp_path) as manager:
    checkpoint.save(manager, 1, state(1), {})
    assert begun.wait(60) and not (tmp_path / "checkpoints" / "1").exists()
    go_on.set()
    checkpoint.finish(manager)
    assert (tmp_path / "checkpoints" / "1" / "state" / checksums.FILE).exists()


def test_checksums_that_cannot_be_written_are_a_checkpoint_that_cannot(tmp_path, monkeypatch):
  def full(folder):
    raise OSError(28, "No space left on device")

  write(tmp_path, 1)
  monkeypatch.setattr(checksums, "write", full)
  with pytest.raises(errors.NotWritten, match="could not be written .*No space left"):
    write(tmp_path, 2)
  monkeypatch.undo()
  assert restore(tmp_path)[0] == 1


def test_names_of_orbax_that_are_overridden_are_there():
  # Were one renamed, what checkpoint.py does in it would silently not happen.
  for name in ("_wait_for_checkpointers", "reached_preemption"):
    assert callable(getattr(ocp.CheckpointManager, name)), name
  for name in ("async_save", "finalize", "typestr"):
    assert callable(getattr(ocp.PyTreeCheckpointHandler, name)), name


_DISK = """
import resource, signal, sys
import jax.numpy as jnp
import numpy as np
from absl import logging
from piflow_jax import checkpoint, errors
logging.use_absl_handler()
errors.quiet()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
  with checkpoint.open_manager(sys.argv[1]) as manager:
    checkpoint.save(manager, 1, {str(i): jnp.asarray(np.random.randn(1 << 16)) for i in range(30)}, {})
except errors.NotWritten as e:
  errors.leave(2, e)
"""


def _program(text, *args, **env):
  return subprocess.run([sys.executable, "-c", text, *map(str, args)], capture_output=True, text=True, cwd=tiny.ROOT,
                        timeout=200, env=tiny.environment(JAX_PLATFORMS="cpu", **env))


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_without_the_libraries_pages(tmp_path):
  # A limit on the size of a file (64 KiB) stands in for the disk.
  done = _program(_DISK, tmp_path)
  lines = [line for line in done.stderr.splitlines() if line]
  assert done.returncode == 2 and len(lines) == 1, done.stderr
  assert lines[0].startswith(f"error: --workdir: a checkpoint under {tmp_path}/checkpoints could not be written")
  assert "File too large" in lines[0]


def test_what_is_kept_quiet_and_what_is_not(monkeypatch, capsys):
  def record(path, level):
    return types.SimpleNamespace(pathname=path, levelno=level)

  shown = errors._shown
  assert shown(record("/x/piflow_jax/checkpoint.py", 30)) and shown(record("/site-packages/jax/x.py", 40))
  assert not shown(record("/site-packages/jax/x.py", 30)) and not shown(record("/site-packages/gcsfs/retry.py", 40))
  assert not shown(record("/site-packages/orbax/x.py", 40)) and not shown(record("/lib/python3/asyncio/x.py", 40))
  monkeypatch.setattr(sys, "__unraisablehook__", lambda what: print("shown", what.exc_value))
  for text in ("Event loop is closed", "something else"):
    errors._unraisable(types.SimpleNamespace(exc_value=RuntimeError(text)))
  assert capsys.readouterr().out == "shown something else\n"


_PROCESS = """
import sys
import jax, numpy as np
from absl import logging
logging.use_absl_handler()
port, index, workdir, act = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
from piflow_jax import checkpoint, lock, weights
mesh = jax.make_mesh((4,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.NamedSharding(mesh, jax.P("all"))
with lock.hold(workdir), checkpoint.open_manager(workdir) as manager:
  if act == "write":
    for step in (1, 2):
      value = np.random.default_rng(step).standard_normal((8, 1 << 12)).astype(np.float32)
      array = jax.make_array_from_callback(value.shape, split, lambda place: value[place])
      checkpoint.save(manager, step, {"ema": {"a": array}, "params": {"a": array}}, {"batches": step})
  else:
    shape = jax.ShapeDtypeStruct((8, 1 << 12), np.float32, sharding=split)
    loaded = weights.load(workdir, {"a": shape}, "ema", "--workdir")["a"]
    step, found, position = checkpoint.restore_latest(manager, {"ema": {"a": shape}, "params": {"a": shape}})
    value = np.random.default_rng(step).standard_normal((8, 1 << 12)).astype(np.float32)
    for array in (loaded, found["params"]["a"]):
      for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])
    print("step", step)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_of_two_processes_each_sums_its_own_and_both_pass_over_what_one_finds(tmp_path):
  def both(act):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    command = [sys.executable, "-c", _PROCESS, str(port)]
    env = tiny.environment(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2")
    started = [subprocess.Popen([*command, str(i), str(tmp_path), act], cwd=tiny.ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
    outs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outs
    return outs

  both("write")
  folder = tmp_path / "checkpoints" / "2" / "state"
  assert all((folder / f"ocdbt.process_{i}" / checksums.FILE).exists() for i in range(2))
  assert not (tmp_path / "lock").exists()
  flip(arrays(folder / "ocdbt.process_1"), 99)
  assert all("step 1" in out and "is passed over" in out for out in both("read"))
