"""The step and the loop around it: same numbers on any mesh, in any number of parts, through any interruption."""

import functools
import json
import math
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import images
from piflow_jax import params as params_lib
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax import train_step
from piflow_jax.data import loader
from tests import tiny

_RUNS = {}  # results of `_steps` by all that they depend on: compiling is most of its time


def _steps(config, mesh, n, teacher_workdir=None, spread=0.0):
  """n updates without the loop around them: (state, losses, jitted), made once for the same arguments.

  The tiny teacher has hardly left its zero velocity: `spread` is added to its weights where losses are to be compared,
  which would otherwise be rounding themselves.
  """
  if config.teacher is not None:
    config.teacher.checkpoint = str(teacher_workdir)
  name = (json.dumps(config_lib.to_plain(config), sort_keys=True), tuple(mesh.shape.values()), spread)
  if name not in _RUNS:
    _RUNS[name] = _begin(config, mesh, spread)
  states, losses, jitted, step = _RUNS[name]
  while len(losses) < n:
    loss, state = step()
    losses.append(loss)
    states.append(state)
  assert jitted.step._cache_size() <= 1  # an update compiles once, however many there are
  return states[n], losses[:n], jitted


def _begin(config, mesh, spread):
  run = build.run(config)
  jitted = train_step.compile(config, mesh, run)
  teacher = None
  if jitted.teacher is not None:
    teacher = train_step.load_teacher(config, run, jitted.teacher)
  if spread:
    teacher = jax.tree.map(
        lambda x, s: jax.device_put(x + spread * np.random.default_rng(x.size).standard_normal(x.shape, np.float32), s),
        jax.device_get(teacher), jax.tree.map(lambda x: x.sharding, teacher))
  key = jax.random.key(config.seed)
  live = [jitted.init(jax.random.fold_in(key, 2**31 - 1), teacher)]
  batches = loader.batches(run.data.records("train"), run.data.spec, batch_size=config.batch_size, seed=config.seed)

  def snapshot(state):
    return jax.tree.map(jnp.copy, state)  # the step donates what it is given

  def step():
    batch = sharding.place_batch(next(batches), mesh, config.batch_size)
    live[0], metrics = jitted.step(live[0], teacher, batch, key)
    return float(metrics["loss"]), snapshot(live[0])

  return [snapshot(live[0])], [], jitted, step


def _close(a, b, rtol):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if "qkv" in str(path) and "bias" in str(path):
      x, y = x[:, ::2], y[:, ::2]  # softmax does not see the keys' bias: Adam makes steps of its rounding
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(), 1e-3), err_msg=str(path))


# (data, fsdp, tensor, slices) of 8 devices: some of a student, whose two heads are split at most in two; of a
# teacher with eight heads more of them, or with --all-meshes all there are of one slice.
_SOME = ((8, 1), (1, 8), (1, 1, 8), (4, 2, 1), (1, 2, 4))
_ALL = tuple((data, fsdp, 8 // data // fsdp) for data in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) if data * fsdp <= 8)
_MESHES = ((1, 8), (2, 2, 2), (1, 2, 2, 2))
# Window and mixing on: every branch of the segment is in the step.
_ALL_OF_IT = dict(method__nfe=2, method__window_substeps=2, method__num_decay_steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["teacher", "student", "dx", "parallel", "meanflow"])
def test_one_device_equals_eight(role, tiny_teacher, request):
  # Sums run in another order on a mesh; Adam divides by the root of a tiny second moment, which carries float32
  # rounding of a gradient near zero into a parameter.
  fields = dict(optimizer__clip_norm=1.0) | (_ALL_OF_IT if role in ("student", "dx") else {})
  runs, more = {}, dict(network__heads=8) if role == "teacher" else {}
  meshes = _MESHES if role == "student" else ((2, 4),)
  if role == "teacher":
    meshes = _ALL if request.config.getoption("all_meshes") else _SOME
  for sizes in ((1, 1), *meshes):
    devices = jax.devices()[: math.prod(sizes)]
    mesh, spread = sharding.make_mesh(*sizes, devices=devices), 0.0 if role == "teacher" else 0.1
    state, losses, _ = _steps(tiny.config(role, **fields, **more), mesh, 10, tiny_teacher, spread)
    runs[sizes] = jax.device_get((state.params, state.ema)), losses
  for sizes in meshes:
    np.testing.assert_allclose(runs[sizes][1], runs[1, 1][1], rtol=2e-5)
    _close(runs[sizes][0], runs[1, 1][0], 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("then", [dict(mesh__data=2, mesh__fsdp=4), dict(mesh__data=4, mesh__fsdp=1, mesh__tensor=2)])
def test_a_run_goes_on_on_another_mesh(then, tmp_path):
  first = dict(mesh__data=1, mesh__fsdp=8)
  assert train_loop.train(tiny.config("teacher", steps=8, **first), tmp_path / "alone") == 0
  assert train_loop.train(tiny.config("teacher", steps=4, **first), tmp_path / "moved") == 0

  def restored(fields):
    config = tiny.config("teacher", **fields)
    jitted = train_step.compile(config, sharding.make_mesh(**config.mesh), build.run(config))
    with checkpoint.open_manager(tmp_path / "moved") as manager:
      return checkpoint.restore_latest(manager, jitted.state)[1]

  for a, b in zip(*(jax.tree.leaves(restored(fields)) for fields in (first, then)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert train_loop.train(tiny.config("teacher", steps=8, **then), tmp_path / "moved") == 0
  losses = [[line["loss"] for line in tiny.metrics(tmp_path / folder)] for folder in ("alone", "moved")]
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("moments, nbytes", [("bfloat16", 6), ("int8", 3)])
def test_lean_moments_train_alike_and_lie_where_their_parameters_do(moments, nbytes, tiny_teacher):
  fields = dict(network__width=64, optimizer__learning_rate=1e-3)
  mesh = sharding.make_mesh(2, 4)
  state, losses, jitted = _steps(tiny.config("teacher", **fields, optimizer__moments=moments), mesh, 8)
  _, want, _ = _steps(tiny.config("teacher", **fields), mesh, 8)
  np.testing.assert_allclose(losses, want, rtol=0.02)
  assert losses[-1] < losses[0]
  leaves = params_lib.named_leaves(jitted.state.opt_state)
  name = next(name for name in leaves if name.endswith("mu/blocks/mlp/in/kernel"))
  assert "fsdp" in leaves[name].sharding.spec and leaves[name].dtype == moments
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
  assert size < nbytes * 1.1 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_zero_splits_what_no_forward_pass_reads_and_changes_nothing():
  fields = dict(network__width=64, mesh__data=4, mesh__fsdp=2)
  mesh = sharding.make_mesh(4, 2)
  state, losses, jitted = _steps(tiny.config("teacher", **fields, zero=True), mesh, 5)
  want, want_losses, _ = _steps(tiny.config("teacher", **fields), mesh, 5)
  np.testing.assert_allclose(losses, want_losses, rtol=2e-5)
  _close(jax.device_get((state.params, state.ema)), jax.device_get((want.params, want.ema)), 2e-4)
  spec = {name: leaf.sharding.spec for name, leaf in params_lib.named_leaves(state).items()}
  for name in ("ema/blocks/mlp/in/kernel", "opt_state/1/0/nu/blocks/mlp/in/kernel"):
    assert spec[name] == jax.P(None, ("fsdp", "slice", "data"), "tensor"), name
  assert spec["params/blocks/mlp/in/kernel"] == jitted.state.params["blocks"]["mlp"]["in"]["kernel"].sharding.spec
  assert "data" not in str(spec["params/blocks/mlp/in/kernel"])

  def held(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

  assert held(state.ema) < held(want.ema) / 4 * 1.1


def test_a_sum_in_half_precision_is_near_and_no_more():
  def objective(params, teacher, batch, keys, step):
    return {"w": batch.mean(0) * params["w"]}, {"loss": batch.mean()}

  def grads(dtype):
    batch = jax.random.uniform(jax.random.key(0), (64, 100))
    keys = jax.random.split(jax.random.key(1), 64)
    return train_step.accumulate(objective, {"w": jnp.ones(100)}, None, batch, keys, jnp.array(0), 16, dtype)[0]["w"]

  exact, half = grads(jnp.float32), grads(jnp.bfloat16)
  assert half.dtype == jnp.float32
  # Sixteen roundings to 8 bits of sums of up to 16 parts.
  assert 1e-4 < np.abs(half / exact - 1).max() < 16 * 2**-8


def test_parameters_are_stored_in_parts():
  mesh = sharding.make_mesh(1, 8)
  jitted = train_step.compile(tiny.config("teacher"), mesh, build.run(tiny.config("teacher")))
  leaves = params_lib.named_leaves(jitted.state)
  for name in ("params/blocks/mlp/in/kernel", "ema/blocks/mlp/in/kernel", "opt_state/1/0/mu/blocks/mlp/in/kernel"):
    assert "fsdp" in leaves[name].sharding.spec, name


_METHODS = [("student", _ALL_OF_IT), ("student", dict(method__data_free=True)), ("dx", _ALL_OF_IT), ("parallel", {}),
            ("improved-meanflow", {})]


@pytest.mark.slow
@pytest.mark.parametrize("role, fields", _METHODS)
def test_microbatches_equal_one_batch(role, fields, tiny_teacher):
  # Draws hang on the sample, not on the microbatch it is in.
  mesh, fields = sharding.make_mesh(devices=jax.devices()[:1]), fields | dict(optimizer__clip_norm=1.0)
  whole, losses, _ = _steps(tiny.config(role, **fields), mesh, 3, tiny_teacher, 0.1)
  parts, parts_losses, _ = _steps(tiny.config(role, microbatches=4, **fields), mesh, 3, tiny_teacher, 0.1)
  np.testing.assert_allclose(parts_losses, losses, rtol=1e-5)
  _close(parts.params, whole.params, 2e-4)


@pytest.mark.slow
def test_student_starts_at_its_teacher(tiny_teacher):
  state, _, jitted = _steps(tiny.config("student"), sharding.make_mesh(), 0, tiny_teacher)
  config = tiny.config("student", teacher__checkpoint=str(tiny_teacher))
  teacher = train_step.load_teacher(config, build.run(config), jitted.teacher)
  for name, leaf in params_lib.named_leaves(teacher).items():
    if not name.startswith("head/"):
      np.testing.assert_array_equal(leaf, params_lib.named_leaves(state.params)[name], err_msg=name)
  kernel = state.params["head"]["means"]["kernel"]
  np.testing.assert_array_equal(kernel, jnp.broadcast_to(teacher["head"]["out"]["kernel"][:, :, None], kernel.shape))


def test_clipping_begins_when_the_warm_up_is_over():
  config = tiny.config(
      "teacher", optimizer__clip_norm=1e-3, optimizer__warmup_steps=2, optimizer__learning_rate=1e-3).optimizer
  optimizer, rate = build.optimizer(config, 10)
  np.testing.assert_allclose([rate(0), rate(1)], [1e-6, (1e-6 + 1e-3) / 2], rtol=1e-5)
  params = {"w": jnp.ones(3)}
  state = optimizer.init(params)
  norms = []
  for _ in range(4):
    _, state = optimizer.update({"w": jnp.full(3, 2.0)}, state, params)
    norms.append(float(state[1][0].mu["w"][0]))
  increments = np.diff([0, *norms]) + 0.1 * np.array([0, *norms[:-1]])  # mu <- 0.9 mu + 0.1 g
  np.testing.assert_allclose(increments / 0.1, [2, 2, 1e-3 / 3**0.5, 1e-3 / 3**0.5], rtol=1e-3)


def _files(workdir):
  return {p.name for p in pathlib.Path(workdir).iterdir()}


def _checkpoint(workdir, config, step):
  mesh = sharding.make_mesh(**config.mesh)
  jitted = train_step.compile(config, mesh, build.run(config))
  with checkpoint.open_manager(workdir) as manager:
    assert manager.latest_step() == step
    return checkpoint.restore_latest(manager, jitted.state)[1]


@pytest.mark.slow
def test_stopped_and_started_again_is_the_same_run(tmp_path, tiny_teacher):
  config = functools.partial(tiny.config, "student", teacher__checkpoint=str(tiny_teacher))
  assert train_loop.train(config(), tmp_path / "whole") == 0
  assert train_loop.train(config(steps=2), tmp_path / "parts") == 0
  assert train_loop.train(config(), tmp_path / "parts") == 0
  assert tiny.metrics(tmp_path / "parts") == tiny.metrics(tmp_path / "whole")
  a, b = (_checkpoint(tmp_path / name, config(), 4) for name in ("whole", "parts"))
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_killed_and_started_again_is_the_same_run_bit_for_bit(tmp_path, tiny_teacher):
  # 2n steps, against SIGKILL after n and the same command again; component dropout on; a process and one device each.
  def args(name):
    return tiny.command("student", tmp_path / name, "--config.steps=12", "--config.checkpoint_every=3",
                        f"--config.teacher.checkpoint={tiny_teacher}")

  assert tiny.run(args("whole"))[0] == 0
  process = tiny.start(args("killed"))
  checkpoints = tmp_path / "killed" / "checkpoints"
  deadline = time.time() + 240
  while not (checkpoints / "6").exists() and process.poll() is None and time.time() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
  before = len(tiny.metrics(tmp_path / "killed"))
  status, out, err = tiny.run(args("killed"))
  assert status == 0 and "going on from step" in out, err
  assert 6 <= before < 12
  assert tiny.metrics(tmp_path / "killed") == tiny.metrics(tmp_path / "whole")
  config = tiny.config("student", steps=12)
  a, b = (_checkpoint(tmp_path / name, config, 12) for name in ("whole", "killed"))
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_sigterm_saves_and_asks_for_a_restart(tmp_path):
  args = tiny.command("teacher", tmp_path / "run", "--config.steps=100000", "--config.checkpoint_every=100000")
  process = tiny.start(args)
  _wait_for_steps(process, tmp_path / "run")
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=300)
  assert process.returncode == errors.RESTART, err
  saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
  assert len(saved) == 1 and saved[0] >= tiny.metrics(tmp_path / "run")[-1]["step"]
  assert f"at step {saved[0]}" in out + err


@pytest.mark.slow
def test_a_first_ctrl_c_saves_and_a_second_ends_at_once(tmp_path):
  args = tiny.command("teacher", tmp_path / "run", "--config.steps=100000", "--config.checkpoint_every=100000")
  process = tiny.start(args)
  _wait_for_steps(process, tmp_path / "run")
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=300)
  assert process.returncode == errors.RESTART and "Traceback" not in err, err
  assert "once more ends at once" in err and "the same command goes on from there" in out + err
  saved = int(next((tmp_path / "run" / "checkpoints").iterdir()).name)

  process = tiny.start([*args, "--config.profile_steps=0"])
  _wait_for_steps(process, tmp_path / "run", beyond=saved)
  for _ in range(2):
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)  # two presses
  _, err = process.communicate(timeout=300)
  assert process.returncode in (130, errors.RESTART) and "Traceback" not in err, err


def _wait_for_steps(process, workdir, beyond=0):
  deadline = time.time() + 600
  while not (workdir / "metrics.jsonl").exists() or not any(line["step"] > beyond for line in tiny.metrics(workdir)):
    assert process.poll() is None and time.time() < deadline
    time.sleep(0.05)


@pytest.mark.slow
def test_a_picture_that_fails_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
  def broken(*_):
    raise RuntimeError("no such colour")

  monkeypatch.setattr(images, "image_grid", broken)
  assert train_loop.train(tiny.config("teacher", image_every=2), tmp_path) == 0
  assert sum("no picture of step" in message and "no such colour" in message for message in caplog.messages) == 2
  assert _files(tmp_path / "checkpoints") == {"2", "4"}


@pytest.mark.slow
def test_a_held_out_loss_that_a_kill_cut_off_is_measured_again(tmp_path):
  def config(steps):
    return tiny.config("teacher", steps=steps, eval_every=2)

  assert train_loop.train(config(4), tmp_path / "whole") == 0
  assert train_loop.train(config(2), tmp_path / "cut") == 0
  path = tmp_path / "cut" / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(line for line in lines if "eval_loss" not in line))
  assert train_loop.train(config(4), tmp_path / "cut") == 0
  assert tiny.metrics(tmp_path / "cut") == tiny.metrics(tmp_path / "whole")


def _tear(step_folder):
  """Cut the largest file in half, as a full disk or a dying machine would."""
  largest = max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog):
  config = tiny.config("teacher")
  train_loop.train(config, tmp_path / "run")
  shutil.copytree(tmp_path / "run", tmp_path / "whole")
  _tear(tmp_path / "run" / "checkpoints" / "4")
  with caplog.at_level("WARNING"):
    assert train_loop.train(config, tmp_path / "run") == 0
  assert any("checkpoint 4 cannot be read" in message for message in caplog.messages)
  assert "torn_4" in _files(tmp_path / "run" / "checkpoints")
  a, b = (_checkpoint(tmp_path / name, config, 4) for name in ("whole", "run"))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert tiny.metrics(tmp_path / "run") == tiny.metrics(tmp_path / "whole")


@pytest.mark.slow
def test_an_unfinished_write_is_not_a_checkpoint(tmp_path):
  config = tiny.config("teacher", steps=2)
  train_loop.train(config, tmp_path)
  shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-1")
  state = _checkpoint(tmp_path, config, 2)
  assert int(state.step) == 2
  assert _files(tmp_path / "checkpoints") == {"2"}  # what a kill has left does not pile up


@pytest.mark.slow
def test_nothing_readable_is_said_and_nothing_is_lost(tmp_path):
  config = tiny.config("teacher", steps=2)
  train_loop.train(config, tmp_path)
  _tear(tmp_path / "checkpoints" / "2")
  with pytest.raises(errors.UserError, match="no checkpoint under .* can be read"):
    train_loop.train(config, tmp_path)
  assert _files(tmp_path / "checkpoints") == {"2"}


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_in_one_line_and_the_run_goes_on_later(tmp_path):
  args = tiny.command("teacher", tmp_path / "run")
  assert tiny.run(tiny.command("teacher", tmp_path / "run", "--config.steps=2"))[0] == 0
  # A limit on the size of a file (64 KiB) stands in for the disk.
  status, _, err = tiny.run(["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *args])
  last, folder = err.strip().splitlines()[-1], tmp_path / "run" / "checkpoints"
  assert status == 2 and last.startswith(f"error: --workdir: a checkpoint under {folder} could not be written"), err
  assert "File too large" in last
  status, out, err = tiny.run(args)
  assert status == 0 and "going on from step 2 of 4" in out, err


@pytest.mark.slow
def test_a_figure_that_is_not_finite_stops_the_run(tmp_path):
  config = tiny.config("teacher", steps=8, optimizer__learning_rate=1e17, optimizer__warmup_steps=3, checkpoint_every=1)
  with pytest.raises(errors.NotFinite, match=r"(loss|grad_norm) is (nan|inf) at step \d.*\(step \d\)"):
    train_loop.train(config, tmp_path)
  lines = tiny.metrics(tmp_path)
  finite = [np.isfinite(list(line.values())).all() for line in lines]
  assert all(finite[:-1]) and not finite[-1]
  saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert saved and saved[-1] < lines[-1]["step"]
  state = _checkpoint(tmp_path, config, saved[-1])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_not_saved_after_a_loss_that_was(tmp_path):
  config = tiny.config("teacher", optimizer__learning_rate=9e29, checkpoint_every=1)
  with pytest.raises(errors.NotFinite, match=r"param_norm is inf at step 1; nothing was saved before"):
    train_loop.train(config, tmp_path)
  assert np.isfinite(tiny.metrics(tmp_path)[-1]["loss"]) and not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_relative_workdir_will_do(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert train_loop.train(tiny.config("teacher"), "here/teacher") == 0
  student = tiny.config("student", teacher__checkpoint="here/teacher", steps=1)
  assert train_loop.train(student, "here/student") == 0
  assert (tmp_path / "here" / "student" / "checkpoints" / "1").exists()


@pytest.mark.slow
def test_pictures_and_held_out_losses_come_on_their_period(tmp_path, tiny_teacher):
  config = tiny.config("student", teacher__checkpoint=str(tiny_teacher), eval_every=2, image_every=4)
  train_loop.train(config, tmp_path)
  assert [line["step"] for line in tiny.metrics(tmp_path) if "eval_loss" in line] == [2, 4]
  assert _files(tmp_path / "pictures") == {"samples_0000004.png"}
  assert any(p.name.startswith("events") for p in (tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_profile_is_traced_when_asked_for(tmp_path):
  train_loop.train(tiny.config("teacher", steps=14, profile_steps=2), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
