"""The program itself, on slices that nobody has attached."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from tests import tiny

# What the program compiles on a TPU's host, with no TPU here.
_ON_A_TPUS_HOST = """
import jax
import jax.numpy as jnp
from configs import imagenet_dit
from piflow_jax import build, train_step
from piflow_jax.plan import compiled

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
config = imagenet_dit.get_config("tiny,repa-1nfe")  # 256 tokens, which splash takes
config.mesh.fsdp = 4
_, devices, _ = compiled.devices_of("v5e-4", 1)
mesh = build.mesh(config, devices)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
  run = build.run(config)
  jitted = train_step.compile(config, mesh, run)
key = jax.eval_shape(lambda: jax.random.key(0))


def kernels(compiled):
  return [name for name in ("splash", "gmm_rollout") if name in compiled.as_text()]


def drawn(n):
  noise, label = jax.ShapeDtypeStruct((n, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
  return jitted.draw.lower(jitted.state.ema, jitted.base, noise, {"label": label}, keys).compile()


print("picture", kernels(drawn(62)), kernels(drawn(64)))
jitted.init.lower(key, jitted.teacher).compile()
"""

_FIELDS = ["--config=configs/imagenet_dit.py:tiny,repa-1nfe", "--config.network.depth=2"]
_YOUR_OWN = (tiny.ROOT / "docs" / "your_own.md").read_text()
pytestmark = pytest.mark.libtpu


def _plan(*arguments, shape="(8,8,4)"):
  return _start("-m", "piflow_jax.plan", *_FIELDS, f"--config.data.shape={shape}", *arguments)


def _start(*arguments):
  """(status, output, errors) of a Python that finds libtpu."""
  done = subprocess.run([sys.executable, *arguments], cwd=tiny.ROOT, env=_with_libtpu(), text=True,
                        capture_output=True, timeout=850)
  return done.returncode, done.stdout, done.stderr


def _plan_of(path, *arguments, **kwargs):
  status, out, err = _plan(*arguments, f"--json={path}", **kwargs)
  assert status == 0, err
  return out, json.loads(path.read_text())[0]


def _with_libtpu():
  path = os.pathsep.join([str(tiny.ROOT / ".libtpu"), str(tiny.ROOT / ".libcuda"), str(tiny.ROOT)])
  return tiny.environment(PYTHONPATH=path)


_ADAPTERS = """
import jax
import jax.numpy as jnp
import numpy as np
from piflow_jax import lora, params as params_lib
from piflow_jax.models import joint, layers
from piflow_jax.plan import compiled, hlo

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
_, (device,), _ = compiled.devices_of("v6e-1", 1)
block = layers.loop(joint.DoubleBlock, 2, 256, 2, 4, "xla", jnp.bfloat16, remat="full", unroll=1, name="blocks")
turns = joint.rotary(np.zeros((1536, 1)), (128,))


def given(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))


def apply(params, x, text, embedding, key):
  with lora.adapted(0.05):
    (x, _), _ = block.apply({"params": params}, (x, text), embedding, turns, None,
                            rngs={layers.DROPOUT: jax.random.wrap_key_data(key)})
  return x.astype(jnp.float32).sum()


args = given(4, 1024, 256), given(4, 512, 256), given(4, 256)
params = jax.eval_shape(lambda *args: block.init(jax.random.key(0), args[:2], args[2], turns, None), *args)["params"]
adapters = lora.shapes_of(lora.Lora(("mlp_in", "mlp_out"), 32, 1.0, 0.05), params)
params = jax.tree.map(lambda leaf: given(*leaf.shape), params_lib.joined(params, adapters))
step = jax.jit(jax.grad(apply)).lower(params, *args, given(2, dtype=jnp.uint32))
table, _ = hlo.computations(step.compile().as_text())


def inside(name):
  called = [part.split("calls=%")[1].split(",")[0] for part in (i.rest for i in table[name]) if "calls=%" in part]
  return {i.op for i in table[name]}.union(*map(inside, called))


fusions = [inside(name) for name in table if "fused" in name]
products = [ops for ops in fusions if ops & {"dot", "convolution"}]
print(len(products) > 20, sum("xor" in ops for ops in fusions) > 0, sum("xor" in ops for ops in products))
"""


@pytest.mark.slow
def test_no_product_draws_an_adapters_mask_anew():
  # With masks drawn in the products the compiler had not finished FLUX.1's step after 28 minutes.
  status, out, err = _start("-c", _ADAPTERS)
  assert status == 0, err
  assert out.split() == ["True", "True", "0"]


@pytest.mark.slow
def test_what_is_drawn_on_a_tpu_compiles_whether_or_not_the_mesh_splits_it():
  status, out, err = _start("-c", _ON_A_TPUS_HOST)
  assert status == 0, err
  assert out.splitlines() == ["picture [] ['splash', 'gmm_rollout']"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e-1", "v5p:2x2x1", "v6e-1"])
def test_memory_is_what_the_compiler_grants(topology):
  code = f"""
import jax
import jax.numpy as jnp
import numpy as np
from piflow_jax.plan import chips, compiled

jax.config.update("jax_platforms", "cpu")
chip, devices, _ = compiled.devices_of("{topology}", 1)
one = jax.sharding.SingleDeviceSharding(np.ravel(devices)[0])
placed = jax.ShapeDtypeStruct((50, 2**30), jnp.float32, sharding=one)
try:
  jax.jit(lambda x: x + 1).lower(placed).compile()
except jax.errors.JaxRuntimeError as e:
  print(compiled._too_much(str(e), 0)[1] / chip.memory)
"""
  _, out, err = _start("-c", code)
  assert out and abs(float(out) - 1) < 1e-3, out + err


@pytest.mark.slow
def test_a_step_on_two_kinds_of_slices(tmp_path):
  status, out, err = _plan("--topology=v5e-16,v5p:2x2x2", "--config.mesh.fsdp=4", "--config.batch_size=128",
                           f"--json={tmp_path / 'plan.json'}")
  assert status == 0, err
  plans = json.loads((tmp_path / "plan.json").read_text())
  assert [(p["topology"], p["chips"], p["mesh"]["data"], p["mesh"]["fsdp"]) for p in plans] == [
      ("v5e:4x4", 16, 4, 4), ("v5p:2x2x2", 8, 2, 4)]
  for p in plans:
    memory = dict(p["memory"])
    total, limit = memory.pop("total"), memory.pop("limit")
    assert sum(memory.values()) == total < limit and p["fits"] and memory["padding"] >= 0
    # AdamW's two moments in float32, and its counts; the average is a copy of the parameters.
    assert memory["ema"] == memory["parameters"] and 0 <= memory["optimizer"] - 2 * memory["parameters"] < 64
    assert p["flops"] > p["model_flops"] > 0 and p["seconds"]["step"] == max(
        v for k, v in p["seconds"].items() if k != "step")
    # Matrices are brought together, not sent round in parts.
    assert p["collectives"]["all-gather"]["bytes"] > 0 and "collective-permute" not in p["collectives"]
    assert p["hours"] * p["chips"] == pytest.approx(p["chip_hours"])
  assert plans[0]["model_flops"] == plans[1]["model_flops"]
  for words in ("v5p:2x2x2", "data 4 x fsdp 4", "optimizer, GiB a device", "MFU", "chip-hours"):
    assert words in out


@pytest.mark.slow
def test_leaner_state_shows(tmp_path):
  def memory(name, *more):
    return _plan_of(tmp_path / name, "--topology=v5e-16", "--config.batch_size=128", *more)[1]["memory"]

  plain, lean = memory("plain"), memory("lean", "--config.zero=true", "--config.optimizer.moments=bfloat16")
  assert lean["parameters"] == plain["parameters"]
  # 4 + 2 bytes for each 4 + 4, over 16 devices all but what is too small for so many parts.
  assert lean["optimizer"] < plain["optimizer"] * 0.75 / 16 * 1.2 and lean["ema"] < plain["ema"] / 16 * 1.2


@pytest.mark.slow
def test_a_call_of_the_sampler_has_no_training_batch(tmp_path):
  out, plan = _plan_of(tmp_path / "plan.json", "--topology=v5e-4", "--sampler", "--config.batch_size=101",
                       "--config.evaluation.batch_size=64")
  assert plan["samples"] == 64 and "hours" not in plan and "hours" not in out
  assert {"parameters", "batch"} <= set(plan["memory"]) and not {"ema", "optimizer", "teacher"} & set(plan["memory"])
  assert 0 < plan["model_flops"] == plan["flops"]


@pytest.mark.slow
def test_gradients_cross_the_network_between_slices(tmp_path):
  out, plan = _plan_of(tmp_path / "plan.json", "--topology=v5e-4", "--slices=2", "--config.mesh.slices=2",
                       "--config.mesh.fsdp=4", "--config.batch_size=64")
  assert plan["chips"] == 8 and plan["mesh"]["slice"] == 2 and "v5e:2x2 x 2" in out
  # What is split over a slice's four chips, each of them sends once at least.
  assert plan["collectives"]["send"]["bytes"] > plan["memory"]["parameters"] / 4 and plan["seconds"]["network"] > 0


@pytest.mark.slow
def test_no_array_of_a_mixture_is_padded(tmp_path):
  """With components and channels last it would take up 32 times its place, in tiles of 8 x 128."""
  samples, positions, components = 128, 32 * 32, 32  # 64 samples, being last, were padded to 128
  _, plan = _plan_of(tmp_path / "plan.json", "--topology=v5e-4", f"--config.batch_size={4 * samples}",
                     f"--config.policy.components={components}", shape="(32,32,4)")
  shapes = [re.search(r"\[(.*)\]", found["array"])[1].split(",") for found in plan["padded"]]
  # Latents are padded, with 4 channels last.
  assert shapes and max(math.prod(map(int, s)) for s in shapes) < samples * positions * components, plan["padded"]


@pytest.mark.slow
def test_a_foreign_network_is_planned_by_its_config_alone(tmp_path):
  """The network of docs/your_own.md: no field of it is DiT's, and a record's condition is a dict of two arrays."""
  block, = (block for block in re.findall(r"```python\n(.*?)```", _YOUR_OWN, re.DOTALL) if "class Mixer" in block)
  mine = tmp_path / "mine.py"
  mine.write_text(block)
  status, out, err = _start("-m", "piflow_jax.plan", f"--config={mine}:student", "--topology=v5e-4",
                            "--config.batch_size=64", f"--json={tmp_path / 'plan.json'}")
  assert status == 0, err
  plan, = json.loads((tmp_path / "plan.json").read_text())
  assert plan["fits"] and plan["samples"] == 64 and plan["chips"] == 4 and "MFU" in out
  memory = plan["memory"]
  assert memory["parameters"] == memory["ema"] and memory["teacher"] > 0
  # The network has no attention and no recomputation that could be taken out of the count.
  assert plan["flops"] == plan["model_flops"] > 0


@pytest.mark.slow
def test_a_step_on_gpus_says_what_is_known_of_them_and_no_more(tmp_path):
  out, plan = _plan_of(tmp_path / "plan.json", "--topology=h100-8", "--config.mesh.fsdp=8")
  assert plan["fits"] and plan["chips"] == 8 and plan["mesh"]["fsdp"] == 8
  assert plan["memory"]["limit"] == pytest.approx(0.9 * 79.1 * 2**30, rel=1e-3)
  assert plan["memory"]["activations"] > 0 and plan["collectives"]["all-reduce"]["bytes"] > 0
  assert plan["seconds"]["step"] == max(plan["seconds"]["peak"], plan["seconds"]["links"]) > 0
  assert "mfu" not in plan and "hours" not in plan and "MFU" not in out and "compiler's cycles" not in out


@pytest.mark.slow
def test_each_size_of_pictures_is_a_column(tmp_path):
  status, out, err = _start(
      "-m", "piflow_jax.plan", "--config=configs/flux.py:teacher,64x64,32x160", "--config.network.double_depth=1",
      "--config.network.single_depth=1", "--config.network.heads=2", "--config.network.axes=(8,12,12)",
      "--config.data.tokens=112", "--config.data.width=32", "--config.data.pooled=16", "--config.batch_size=8",
      "--config.mesh.fsdp=4", "--topology=v5e-4", f"--json={tmp_path / 'plan.json'}")
  assert status == 0, err
  one, two = json.loads((tmp_path / "plan.json").read_text())
  assert (one["x_0"], two["x_0"]) == ([8, 8, 16], [4, 20, 16])
  # 16 and 20 tokens beside 112 of text.
  assert 1 < two["model_flops"] / one["model_flops"] < 132 / 128 * 1.1
  assert one["memory"]["parameters"] == two["memory"]["parameters"]
  assert re.search(r"x_0 +8 x 8 x 16 +4 x 20 x 16", out)


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(tmp_path):
  status, out, err = _plan("--topology=v5e-1", "--config.batch_size=256", "--config.network.attention=xla",
                           f"--json={tmp_path / 'plan.json'}", shape="(128,128,4)")
  assert status == 1, err
  plan, = json.loads((tmp_path / "plan.json").read_text())
  assert not plan["fits"] and plan["memory"]["total"] > plan["memory"]["limit"] == 15.75 * 2**30
  assert "NO, by" in out and "MFU" not in out


@pytest.mark.parametrize("arguments, words", [
    (["--topology=v5e-17"], ["--topology", "v5e-17"]),
    ([], ["--topology: missing"]),
    (["--topology=v5e-16", "--config.mesh.fsdp=3"], ["config.mesh", "16 devices"]),
    (["--topology=v5e-16", "--config.batch_size=100"], ["config.batch_size", "100"]),
    (["--topology=v5e-16", "--slices=0"], ["slices"]),
    (["--topology=v5e-16,v5p:3x4x4"], ["--topology", "v5p:3x4x4"]),
    (["--topology="], ["--topology", "empty"]),
    (["--topology=h100-3"], ["--topology", "h100-3", "1, 2, 4 or 8"]),
    (["--topology=h100-8", "--slices=2"], ["--slices"]),
    (["--topology=v5e-16,v5e-16"], ["--topology", "twice"]),
    (["--topology=v5e-16", "--json=/nowhere/plan.json"], ["--json", "/nowhere/plan.json"])])
def test_bad_input_is_refused_in_one_line(arguments, words, monkeypatch):
  monkeypatch.syspath_prepend(str(tiny.ROOT / ".libtpu"))
  try:
    tiny.refused("piflow_jax.plan.__main__", [*_FIELDS, *arguments], *words)
  finally:
    jax.config.update("jax_enable_compilation_cache", True)
