"""Every test sees eight simulated CPU devices and strict ranks; programs started by tests see what a user's would."""

import collections
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tests

os.environ.setdefault("XLA_FLAGS", tests.UNOPTIMISED)

# The next run, and programs that tests start, read back what one run compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Each simulated device blocks a thread of XLA's pool in every collective that it waits in; with one thread a device
# (the default) several collectives at once lock all of them up for good.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


DURATIONS = pathlib.Path(__file__).with_name("durations.json")
_seconds = collections.Counter()


def pytest_addoption(parser):
  parser.addoption("--all-meshes", action="store_true",
                   help="one device equals eight in every mesh of eight, not in some")
  parser.addoption("--record-durations", action="store_true", help="write each file's seconds to tests/durations.json")


def _durations():
  return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def pytest_collection_modifyitems(items):
  # The longest files first, by recorded seconds: begun last, one would keep a single worker busy at the end. A file
  # without a record may be long.
  seconds = _durations()
  items.sort(key=lambda item: -seconds.get(item.nodeid.split("::")[0], float("inf")))


def pytest_runtest_logreport(report):
  _seconds[report.nodeid.split("::")[0]] += report.duration  # xdist hands every worker's reports to the controller


def pytest_sessionfinish(session):
  if session.config.getoption("--record-durations") and not hasattr(session.config, "workerinput"):
    merged = _durations() | {file: round(seconds, 1) for file, seconds in _seconds.items()}
    DURATIONS.write_text(json.dumps(dict(sorted(merged.items(), key=lambda item: -item[1])), indent=1) + "\n")


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
  """The workdir of a tiny teacher's finished run."""
  from piflow_jax import train_loop
  from tests import tiny

  workdir = tmp_path_factory.mktemp("tiny") / "teacher"
  assert train_loop.train(tiny.config("teacher"), workdir) == 0
  return workdir
