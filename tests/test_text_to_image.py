"""Students of FLUX.1 and Qwen-Image in small: trained, gone on with, drawn from, on one device and on eight."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import emoji
from configs import text_to_image
from piflow_jax import build
from piflow_jax import flow
from piflow_jax import lora
from piflow_jax import params as params_lib
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax import train_step
from piflow_jax import weights as weights_lib
from piflow_jax.convert import run as convert
from piflow_jax.data import loader
from piflow_jax.policy import gmm
from tests import text
from tests import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """{kind: (cache of prompts with latents, cache without, teacher's workdir)}."""
  folder, found = tmp_path_factory.mktemp("text"), {}
  for kind in text.CONFIGS:
    free = text.cache(folder / f"{kind}-free", kind)
    teacher = text.teacher(folder / f"{kind}-t", kind, free)
    found[kind] = text.cache(folder / kind, kind, shape=(4, 6, 4)), free, teacher
  return found


def _config(runs, kind, recipe, **more):
  with_latents, free, teacher = runs[kind]
  cache = free if recipe.endswith("free") else with_latents
  return text.config(kind, recipe, cache, teacher__checkpoint=str(teacher), **more)


def _batch(config, run, mesh):
  split = jax.NamedSharding(mesh, sharding.BATCH)
  return {"x_0": jax.ShapeDtypeStruct((config.batch_size, *run.data.spec.x_0), jnp.float32, sharding=split), "cond": {
      k: jax.ShapeDtypeStruct((config.batch_size, *a.shape), a.dtype, sharding=split)
      for k, a in run.data.spec.cond.items()}}


# Each recipe of one network or the other: they share all but their blocks.
@pytest.mark.slow
@pytest.mark.parametrize("kind, recipe", [
    pair for i, recipe in enumerate(text_to_image.RECIPES) for pair in [(list(text.CONFIGS)[i % 2], recipe)]])
def test_every_recipe_traces(kind, recipe, runs):
  config = _config(runs, kind, recipe)
  run, mesh = build.run(config), sharding.make_mesh(2, 2, 2)
  jitted = train_step.compile(config, mesh, run)
  state, metrics = jax.eval_shape(
      jitted.step, jitted.state, jitted.teacher, _batch(config, run, mesh), jax.random.key(0))
  assert metrics["loss"].shape == () and jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, jitted.state)
  assert run.method.calls(config.sampling.nfe, 0.0) is None
  adapted = {name.rpartition("/")[0] for name in params_lib.named_leaves(jitted.state.params) if "lora" in name}
  # On the feed-forward layers and the time embedder, and nowhere else.
  assert {name.rpartition("/")[2] for name in adapted} == {"mlp_in", "mlp_out", "time_in", "time_out"} | (
      {"out"} if kind == "flux" else set())


@pytest.mark.slow
@pytest.mark.parametrize("kind, recipe", [("flux", "gm-4nfe"), ("qwen", "gm-4nfe-free")])
def test_a_recipe_trains_goes_on_where_it_was_and_is_drawn_from(kind, recipe, runs, tmp_path):
  alone, again = tmp_path / "alone", tmp_path / "again"
  assert train_loop.train(_config(runs, kind, recipe), alone) == 0
  assert train_loop.train(_config(runs, kind, recipe, steps=2), again) == 0
  assert train_loop.train(_config(runs, kind, recipe), again) == 0
  assert tiny.metrics(again) == tiny.metrics(alone)
  losses = [line["loss"] for line in tiny.metrics(alone)]
  assert np.isfinite(losses).all() and len(losses) == 4
  got, line = tiny.invoke("piflow_jax.sample", [f"--workdir={alone}", "--labels=0", "--num=3",
                                                f"--out={tmp_path / 'x.npz'}"])
  assert (got, line) == (0, "")
  x_0 = np.load(tmp_path / "x.npz")["x_0"]
  assert x_0.shape == (3, 4, 6, 4) and np.isfinite(x_0).all() and x_0.std() > 0.1
  convert.to_torch(alone, tmp_path / "out")
  assert (tmp_path / "out" / "piflow_text_to_image.py").exists()
  _check_that_merged_is_the_same(_config(runs, kind, recipe), alone)


SIZES = ((4, 6, 20), (6, 8, 10), (6, 4, 1))


@pytest.mark.slow
def test_sizes_are_trained_in_turns_each_by_its_own_shift(tmp_path):
  cache = text.cache(tmp_path / "cache", "flux", shape=(4, 6, 4), sizes=SIZES)
  line = dict(base_tokens=4, max_tokens=12)

  def config(steps):
    c = text.config("flux", "teacher", cache, eval_every=1, steps=steps)
    with c.unlocked():
      c.flow = flow.dynamic_config(**line)
      c.data.sizes = tuple((rows, columns, 4) for rows, columns, _ in SIZES)
    return c

  by_size = build.sized(config(4), build.run(config(4)))
  shifts = {size: run.method.clock.shift for size, run in by_size.items()}
  assert shifts == {(4, 6, 4): flow.dynamic_shift(6, **line), (6, 8, 4): flow.dynamic_shift(12, **line),
                    (6, 4, 4): flow.dynamic_shift(6, **line)}
  # Of 20 records of one size and 10 of another; the third has one record, which is held out.
  sources = [(run.data.records("train"), run.data.spec) for run in by_size.values() if len(run.data.records("train"))]
  batches = list(itertools.islice(loader.mixed(sources, batch_size=8, seed=0), 4))
  ((place, batch),) = [pair for pair in enumerate(batches) if pair[1]["x_0"].shape == (8, 6, 8, 4)]
  alone, again = tmp_path / "alone", tmp_path / "again"
  run, c = by_size[6, 8, 4], config(place)
  assert train_loop.train(config(4), alone) == 0 and train_loop.train(c, again) == 0
  # That step's loss by hand, from what was trained until then.
  params = weights_lib.load(again, train_step.compile(c, build.mesh(c), run).state.params, "params", "--workdir")
  keys = jax.random.split(jax.random.fold_in(jax.random.key(c.seed), place), 8)
  _, values = jax.jit(run.method.objective)(params, None, batch, keys, jnp.array(place))
  losses = [line["loss"] for line in tiny.metrics(alone) if "loss" in line]
  np.testing.assert_allclose(losses[place], values["loss"], rtol=1e-4)
  assert train_loop.train(config(4), again) == 0
  assert tiny.metrics(again) == tiny.metrics(alone) and len(tiny.metrics(alone)) == 8  # held-out losses too
  # A size that it was not trained at can be drawn.
  assert tiny.invoke("piflow_jax.sample", [f"--workdir={alone}", "--labels=0", "--num=2", "--size=10x8",
                                           "--config.sampling.nfe=1", f"--out={tmp_path / 'x.npz'}"]) == (0, "")
  assert np.load(tmp_path / "x.npz")["x_0"].shape == (2, 8, 10, 4)


@pytest.mark.slow
def test_a_data_free_student_is_trained_at_every_size_of_its_prompts(runs, tmp_path):
  cache = text.cache(tmp_path / "cache", "flux", sizes=SIZES)
  config = text.config("flux", "gm-4nfe-free", cache, teacher__checkpoint=str(runs["flux"][2]))
  mesh, states = sharding.make_mesh(2, 2, 2), []
  for size, run in build.sized(config, build.run(config)).items():
    assert run.data.spec.x_0 == size
    jitted = train_step.compile(config, mesh, run)
    states.append(jax.eval_shape(
        jitted.step, jitted.state, jitted.teacher, _batch(config, run, mesh), jax.random.key(0))[0])
  assert len(states) == 3 and states[0] == states[1] == states[2]


def _check_that_merged_is_the_same(config, workdir):
  run, mesh = build.run(config), sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  jitted = train_step.compile(config, mesh, run)
  teacher = train_step.load_teacher(config, run, jitted.teacher)
  params = weights_lib.load(workdir, jitted.state.ema, "ema", "--workdir")
  (batch,) = itertools.islice(loader.batches(run.data.records("train"), run.data.spec, batch_size=2, seed=0), 1)
  x, t = jax.random.normal(jax.random.key(1), (2, 4, 6, 4)), jnp.array([0.9, 0.4])
  want = run.student.policy(params, teacher, x, t, batch["cond"], run.method.clock).means
  trunk = {k: v for k, v in teacher.items() if k != "head"}
  whole = params_lib.overlay(teacher, params, params_lib.joined(trunk, params))
  module = run.network.module(gmm.GMHead(3, logstd_width=16))

  def means(weights):
    return gmm.to_policy(module.apply({"params": weights}, x, t, batch["cond"]), x, t).means

  np.testing.assert_allclose(means(lora.merge(whole)), want, atol=1e-5 * float(jnp.abs(want).max()))
  assert jnp.abs(means(whole) - want).max() > 1e-3 * jnp.abs(want).max()  # adapters that count for something


@pytest.mark.slow
def test_parallel_decoding_draws_with_the_adapters_too(runs):
  """Through one fused layer, as its flow map samples, and through the policy of all intervals: the same."""
  config = _config(runs, "flux", "parallel-free")
  run, mesh = build.run(config), sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  teacher = train_step.load_teacher(config, run, train_step.compile(config, mesh, run).teacher)
  params = run.student.init(jax.random.key(0), teacher)
  params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  (batch,), clock = itertools.islice(loader.batches(
      run.data.records("train"), run.data.spec, batch_size=2, seed=0), 1), run.method.clock

  def policy(x, t):
    return run.student.policy(params, teacher, x, t, batch["cond"], clock)

  noise = jax.random.normal(jax.random.key(1), (2, 4, 6, 4))
  maps = run.method.flow_map(params, teacher, batch["cond"], clock), sampler.policy_flow_map(policy, clock)
  fused, whole = (jax.jit(lambda x, one=one: sampler.sample(one, x, None, clock))(noise) for one in maps)
  np.testing.assert_allclose(fused, whole, atol=2e-4 * float(jnp.abs(whole).max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind, sizes", [("flux", (1, 4, 2)), ("qwen", (2, 2, 2))])
def test_one_device_equals_eight(kind, sizes, runs):
  config = _config(runs, kind, "gm-4nfe-free" if kind == "qwen" else "gm-4nfe", optimizer__moments="float32",
                   lora__dropout=0.0)
  found = {}
  for mesh in (sharding.make_mesh(1, 1, devices=jax.devices()[:1]), sharding.make_mesh(*sizes)):
    run = build.run(config)
    jitted = train_step.compile(config, mesh, run)
    teacher = train_step.load_teacher(config, run, jitted.teacher)
    state, key, losses = jitted.init(jax.random.key(1), teacher), jax.random.key(0), []
    batches = loader.batches(run.data.records("train"), run.data.spec, batch_size=config.batch_size, seed=0)
    for _ in range(4):
      batch = sharding.place_batch(next(batches), mesh, config.batch_size)
      state, metrics = jitted.step(state, teacher, batch, key)
      losses.append(float(metrics["loss"]))
    found[mesh.size] = losses, jax.device_get(state.params)
    if mesh.size == 8:
      split = params_lib.named_leaves(jitted.teacher)["double_blocks/image/q/kernel" if kind == "flux" else
                                                      "blocks/image/q/kernel"].sharding.spec
      assert tuple(split) == (None, "fsdp", "tensor")
  np.testing.assert_allclose(found[8][0], found[1][0], rtol=5e-5)
  # Adam divides by the root of a tiny second moment, which carries rounding of a gradient near zero into a parameter.
  for a, b in zip(*(jax.tree.leaves(found[n][1]) for n in (8, 1)), strict=True):
    assert np.abs(a - b).max() < 5e-3 and np.abs(a - b).mean() < 1e-4


def test_the_base_exists_once(runs):
  """By the compiled step: its arguments are the teacher's arrays and what is trained, and it makes no second base."""
  config = _config(runs, "flux", "gm-4nfe", batch_size=1, network__heads=16, network__single_depth=6,
                   network__remat="full")
  config.lora.rank = 1
  mesh, run = sharding.make_mesh(1, 1, devices=jax.devices()[:1]), build.run(config)
  jitted = train_step.compile(config, mesh, run)

  def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

  batch = _batch(config, run, mesh)
  memory = jitted.step.lower(jitted.state, jitted.teacher, batch, jax.random.key(0)).compile().memory_analysis()
  base, state = size(jitted.teacher), size(jitted.state)
  assert base > 10 * size(jitted.state.params)
  assert memory.argument_size_in_bytes < base + state + size(batch) + 4096
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < base / 2


def test_full_size_recipes_have_the_published_numbers_of_parameters():
  """Parameters as diffusers counts them, and those that are trained as the authors' files have them."""
  for kind, whole, trained in (("flux", 11_901_408_320, 653_697_569), ("qwen", 20_430_401_088, 961_978_913)):
    config = text.CONFIGS[kind].get_config("gm-4nfe-free")
    run, mesh = build.run(config), sharding.make_mesh(1, 8)
    jitted = train_step.compile(config, mesh, run)

    def count(tree):
      return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(jitted.teacher) == whole
    # The 16 channels of a latent are no axis to split: 64 devices do not divide them.
    assert tuple(jitted.teacher["head"]["out"]["kernel"].sharding.spec) == ("fsdp",)
    spare = 2 * 256 * (3072 + 12288) if kind == "qwen" else 0  # of the last block's text, which nothing reads
    assert count(jitted.state.params) == trained + spare


@pytest.mark.parametrize("role", emoji.ROLES)
def test_emojis_config_is_a_run_and_its_student_is_sampled_as_it_was_trained(role):
  config = emoji.get_config(role)
  run = build.run(config)
  assert run.method.calls(config.sampling.nfe, 0.0) is None
  assert (run.base_shapes is None) == (role == "teacher")
  with pytest.raises(ValueError, match="choose one"):
    emoji.get_config("student2")


def test_names_of_emoji_become_pairs(tmp_path):
  folder = tmp_path / "package"
  (folder / "img/google/64").mkdir(parents=True)
  for name in ("a.png", "b.png", "b-1.png", "c.png"):
    (folder / "img/google/64" / name).write_bytes(b"x")
  table = [
      {"name": "RED APPLE", "short_name": "apple", "short_names": ["apple"], "category": "Food", "image": "a.png"},
      {"name": "WAVING HAND SIGN", "short_name": "wave", "short_names": ["wave"], "category": "People",
       "image": "b.png", "skin_variations": {"1F3FB": {"image": "b-1.png"}, "1F3FC": {"image": "lost.png"}}},
      {"name": "Flag", "short_name": "flag", "short_names": ["flag"], "category": "Flags", "image": "c.png"}]
  (folder / "emoji.json").write_text(json.dumps(table))
  assert tiny.invoke("piflow_jax.data.emoji", [f"--source={folder}", f"--out={tmp_path / 'p.jsonl'}"]) == (0, "")
  rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
  assert [(row["prompt"], pathlib.Path(row["image"]).name) for row in rows] == [
      ("red apple", "a.png"), ("waving hand sign", "b.png"), ("wave", "b.png"),
      ("waving hand sign, light skin tone", "b-1.png"), ("wave, light skin tone", "b-1.png")]
  assert tiny.invoke("piflow_jax.data.emoji", [
      f"--source={folder}", f"--out={tmp_path / 'h.jsonl'}", "--wording=an icon of {}", "--every=2"]) == (0, "")
  rows = [json.loads(line)["prompt"] for line in (tmp_path / "h.jsonl").read_text().splitlines()]
  assert rows == ["an icon of red apple", "an icon of waving hand sign, light skin tone"]
  tiny.refused("piflow_jax.data.emoji", [f"--source={tmp_path}", f"--out={tmp_path / 'x.jsonl'}"],
               "--source:", "no unpacked emoji-datasource-google")
  tiny.refused("piflow_jax.data.emoji", [f"--source={folder}", f"--out={tmp_path / 'x.jsonl'}", "--wording=icon"],
               "--wording:", "must have {} once")


@pytest.mark.parametrize("kind, argument", [("flux", "gm"), ("flux", "gm-4nfe,100x100"), ("qwen", "dx-4nfe,16")])
def test_a_recipe_that_is_none_is_refused(kind, argument):
  with pytest.raises(ValueError, match="choose RECIPE or RECIPE,HEIGHTxWIDTH"):
    text.CONFIGS[kind].get_config(argument)
