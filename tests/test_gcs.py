"""Runs whose workdir is a gs:// path, by the real gcsfs, Orbax and TensorStore against a bucket in memory."""

import json
import re
import signal
import subprocess
import threading

import numpy as np
import pytest

from piflow_jax import checkpoint
from tests import fake_gcs
from tests import group
from tests import tiny

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
  with checkpoint.open_weights(workdir, "params", "--workdir") as (shapes, read):
    return {path: read(path) for path in shapes}


def test_refused_and_killed_while_it_saves_it_is_the_run_on_a_disk(bucket, tmp_path):
  status, _, err = tiny.run(tiny.command("teacher", tmp_path / "disk", *STEPS))
  assert status == 0, err

  bucket.before_write = lambda name: "checkpoints/4/state" not in name
  status, out = _run(bucket, *STEPS)
  last = out.strip().splitlines()[-1]
  assert status == 2 and re.match("error: --workdir: a checkpoint under gs://bucket/run/checkpoints could not be written .*create access", last), out

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
  assert "run/checkpoints/4/commit_success.txt" not in bucket.objects and any("checkpoints/4/" in name for name in bucket.objects)

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
  status, out = _run(bucket, "--config.teacher.checkpoint=gs://bucket/run", "--workdir=gs://bucket/student", role="student")
  assert status == 0 and "student/checkpoints/4/commit_success.txt" in bucket.objects, out


def test_two_processes_and_one_that_may_not_write(bucket):
  fields = ["--config.steps=4", "--config.mesh.data=1", "--config.mesh.fsdp=8"]  # both write a half
  bucket.before_write = lambda name: "4/state/ocdbt.process_1" not in name
  status, out = group.finish(group.start("gs://bucket/run", 2, 4, *fields, **bucket.environment))
  assert status == 2 and re.search(r"^\[1\] error: --workdir: a checkpoint under .* could not be written", out, re.M), out

  bucket.before_write = lambda name: True
  status, out = group.finish(group.start("gs://bucket/run", 2, 4, *fields, **bucket.environment))
  assert status == 0 and "going on from step 2 of 4" in out, out
  lines = [json.loads(line) for line in bucket.objects["run/metrics.jsonl"][1].decode().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
