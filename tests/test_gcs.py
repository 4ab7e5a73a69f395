"""Runs whose workdir is a gs:// path, by the real gcsfs, Orbax and TensorStore against a bucket in memory."""

import json
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from piflow_jax import checksums
from piflow_jax import weights
from tests import fake_gcs
from tests import group
from tests import small_autoencoder
from tests import tiny
from tests.data import making

pytestmark = pytest.mark.slow
STEPS = ["--config.steps=6", "--config.image_every=6"]


@pytest.fixture
def bucket():
  with fake_gcs.serve() as served:
    yield served


def _start(bucket, *arguments, role="teacher"):
  return tiny.start(tiny.command(role, "gs://bucket/run", *arguments), stderr=subprocess.STDOUT, env=bucket.environment)


def _run(*args, **kwargs):
  process = _start(*args, **kwargs)
  out, _ = process.communicate(timeout=300)
  return process.returncode, out


def _fetch(bucket, folder):
  for name, (_, data) in bucket.objects.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  return folder / "run"


def _weights(workdir):
  with weights.open_weights(workdir, "params", "--workdir") as (shapes, read):
    return {path: read(path) for path in shapes}


def test_refused_and_killed_while_it_saves_it_is_the_run_on_a_disk(bucket, tmp_path):
  status, _, err = tiny.run(tiny.command("teacher", tmp_path / "disk", *STEPS))
  assert status == 0, err

  bucket.before_write = lambda name: "checkpoints/4/state" not in name
  status, out = _run(bucket, *STEPS)
  last = out.strip().splitlines()[-1]
  words = "error: --workdir: a checkpoint under gs://bucket/run/checkpoints could not be written .*create access"
  assert status == 2 and re.match(words, last), out

  saving = threading.Event()
  go_on = threading.Event()

  def hold(name):
    if "checkpoints/4/" in name and name.endswith("commit_success.txt"):
      saving.set()
      go_on.wait(60)
      return False
    return True

  bucket.before_write = hold
  process = _start(bucket, *STEPS)
  assert saving.wait(120)
  process.send_signal(signal.SIGKILL)
  assert "going on from step 2 of 6" in process.communicate()[0]
  go_on.set()
  assert "run/checkpoints/4/commit_success.txt" not in bucket.objects
  assert any("checkpoints/4/" in name for name in bucket.objects)

  bucket.before_write = lambda name: True
  status, out = _run(bucket, *STEPS)
  assert status == 0 and "going on from step 2 of 6" in out, out
  fetched, disk = _fetch(bucket, tmp_path / "fetched"), tmp_path / "disk"
  assert tiny.metrics(fetched) == tiny.metrics(disk)
  ours, theirs = _weights(fetched), _weights(disk)
  for path in theirs:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
  picture = "pictures/samples_0000006.png"
  assert (fetched / picture).read_bytes() == (disk / picture).read_bytes()
  assert json.loads((fetched / "config.json").read_text()) == json.loads((disk / "config.json").read_text())

  # A student of the teacher that lies there.
  status, out = _run(
      bucket, "--config.teacher.checkpoint=gs://bucket/run", "--workdir=gs://bucket/student", role="student")
  assert status == 0 and "student/checkpoints/4/commit_success.txt" in bucket.objects, out


def test_two_processes_and_one_that_may_not_write(bucket):
  fields = ["--config.steps=4", "--config.mesh.data=1", "--config.mesh.fsdp=8"]  # both write a half
  bucket.before_write = lambda name: "4/state/ocdbt.process_1" not in name
  status, out = group.finish(group.start("gs://bucket/run", 2, 4, *fields, **bucket.environment))
  words = r"^\[1\] error: --workdir: a checkpoint under .* could not be written"
  assert status == 2 and re.search(words, out, re.M), out

  bucket.before_write = lambda name: True
  status, out = group.finish(group.start("gs://bucket/run", 2, 4, *fields, **bucket.environment))
  assert status == 0 and "going on from step 2 of 4" in out, out
  lines = [json.loads(line) for line in bucket.objects["run/metrics.jsonl"][1].decode().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4]


def _call(text, environment):
  return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tiny.ROOT, timeout=200,
                        env=tiny.environment(JAX_PLATFORMS="cpu", **environment))


def test_a_bit_that_flips_in_a_bucket_is_found(bucket):
  done = _call("from tests import test_checkpoint as t; t.write('gs://bucket/run', 1, 2)", bucket.environment)
  assert done.returncode == 0, done.stderr
  assert f"run/checkpoints/2/state/{checksums.FILE}" in bucket.objects
  assert f"run/checkpoints/2/state/ocdbt.process_0/{checksums.FILE}" in bucket.objects
  _, arrays = max((len(data), name) for name, (_, data) in bucket.objects.items() if "checkpoints/2/" in name)
  data = bytearray(bucket.objects[arrays][1])
  data[len(data) // 2] ^= 4
  with bucket.lock:
    bucket.put(arrays, data)
  text = "from tests import test_checkpoint as t; print('step', t.restore('gs://bucket/run')[0])"
  done = _call(text, bucket.environment)
  assert done.returncode == 0 and "step 1" in done.stdout and "the checksum of" in done.stderr, done.stderr
  assert any("checkpoints/torn_2/" in name for name in bucket.objects)


_TEACHER = """
import asyncio
import jax, numpy as np
from absl import logging
sleep = asyncio.sleep
asyncio.sleep = lambda seconds, *args: sleep(seconds / 20, *args)  # gcsfs tries for half a minute
from piflow_jax import errors, weights
logging.use_absl_handler()
errors.quiet()
try:
  weights.load("gs://bucket/run", {"a": jax.ShapeDtypeStruct((1,), np.float32)}, "ema", "config.teacher.checkpoint")
except errors.UserError as e:
  errors.leave(2, e)
"""


def test_a_bucket_that_cannot_be_reached_is_one_line(bucket):
  nowhere = {name: re.sub(r"\d+$", "9", value) for name, value in bucket.environment.items()}
  done = _call(_TEACHER, nowhere)
  lines = [line for line in done.stderr.splitlines() if line]
  assert done.returncode == 2 and len(lines) == 1, done.stderr
  assert lines[0].startswith("error: config.teacher.checkpoint: 'gs://bucket/run' cannot be read (Cannot connect to")


def test_a_cache_in_a_bucket_is_the_one_on_a_disk(bucket, tmp_path):
  small_autoencoder.make(tmp_path / "autoencoder")
  making.tars(tmp_path, classes=2, pictures=3)

  def make(out):
    return tiny.run([
        sys.executable, "-m", "piflow_jax.data.imagenet", f"--source=tars:{tmp_path}", f"--out={out}", "--size=16",
        f"--autoencoder={tmp_path / 'autoencoder'}", "--shards=2", "--batch=2"], env=bucket.environment)

  for out in (tmp_path / "cache", "gs://bucket/cache", "gs://bucket/cache"):  # the third finds all of it there
    status, said, err = make(out)
    assert status == 0 and "6 records of 2 classes" in said, err
  theirs = {name.removeprefix("cache/"): data for name, (_, data) in bucket.objects.items()}
  ours = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
  assert {name: data for name, data in theirs.items() if data} == ours
  tiny.refused("piflow_jax.main", [
      "--config=configs/imagenet_dit.py:tiny,teacher,cache", f"--workdir={tmp_path / 'run'}",
      "--config.data.path=gs://bucket/cache"], "give a folder on a local disk")
