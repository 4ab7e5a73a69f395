"""Every test sees eight simulated CPU devices and strict ranks; programs started by tests see what a user's would."""

import collections
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tests

os.environ.setdefault("XLA_FLAGS", tests.UNOPTIMISED)

# What one run compiled, the next one, and the programs it starts, read back.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Each simulated device blocks a thread of XLA's pool in every collective that it waits in; with one thread a device (the
# default) several collectives at once lock all of them up for good.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
  parser.addoption("--all-meshes", action="store_true", help="one device equals eight in every mesh of eight, not in some")


def pytest_collection_modifyitems(items):
  # Files with many slow tests first: begun last, one would keep a single worker busy at the end.
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])


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
