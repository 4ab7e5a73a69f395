"""Who may import what: the arrows of the house, read from the imports themselves."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "piflow_jax"

# Module, or a folder for all modules in it that have no row of their own -> what of the package it may import, beside
# its own folder and errors. Floors from the ground up: nothing imports from a floor above its own.
_PURE = {"config", "flow", "data.spec"}
_RUN = {"build", "config", "data.spec", "params", "sampler", "sharding", "train_step", "weights", "workdir"}
ALLOWED = {
    # values and arrays
    "errors": set(),
    "config": set(),
    "params": set(),
    "images": set(),
    "pickles": set(),
    "checksums": set(),
    "adam8": set(),
    "sharding": {"params"},
    "flow": {"config"},
    # nouns
    "data": {"config"},
    "models": {"config", "sharding"},
    "policy": {"config", "flow", "models.layers", "sharding"},
    "teacher": {"config", "flow"},
    "sampler": {"flow", "policy.rollout"},
    "lora": {"config", "models.layers", "params", "sharding"},
    "student": {"lora", "models.layers", "params"},
    "distill": {"config", "flow", "params", "policy.rollout", "sampler", "student", "teacher"},
    "data.emoji": {"program"},
    "data.imagenet": {"program", "sharding", "weights", "workdir"},
    "data.prompt_pictures": {"models.autoencoder"},
    "data.prompts": {"program", "sharding", "weights", "workdir"},
    # what is kept
    "lock": set(),
    "checkpoint": {"checksums"},
    "weights": {"checkpoint", "checksums", "models.autoencoder", "models.qwen_autoencoder",
                "models.tiny_autoencoder", "params"},
    "run_log": {"images"},
    "workdir": {"config"},
    # a config made a run
    "build": {"adam8", "config", "data.spec", "distill.method", "flow", "lora", "models.layers", "models.network",
              "params", "sampler", "sharding", "student", "teacher"},
    "train_step": {"build", "params", "sampler", "sharding", "weights"},
    "train_loop": {"build", "checkpoint", "data.loader", "data.spec", "evaluation.during", "images", "lock", "params",
                   "run_log", "sharding", "train_step", "workdir"},
    # measuring: figures of arrays first, of runs then
    "evaluation": {"config", "data.spec", "images"},
    "evaluation.inception_features": {
        "config", "convert.inception", "models.inception", "sharding", "weights", "workdir"},
    "evaluation.pictures": {"models.autoencoder", "sharding"},
    "evaluation.torch_features": {"config", "sharding"},
    "evaluation.references": {"pickles"},
    "evaluation.draws": {"build", "data.spec", "sampler", "sharding"},
    "evaluation.during": {"build", "config", "data.spec", "sharding", "weights"},
    "evaluation.naming": {"config", "workdir"},
    "evaluation.measure": {"build", "config", "data.spec", "images", "sharding"},
    "evaluation.analytic": _RUN | {"program", "train_loop"},
    "evaluation.compare": _RUN | {"program", "run_log", "train_loop"},
    # programs
    "program": {"config", "workdir"},
    "main": {"program", "train_loop"},
    "sample": _RUN | {"convert.adapters", "convert.trees", "data.text_encoders", "images", "models.autoencoder",
                      "program"},
    "evaluate": _RUN | {"evaluation", "fid", "images", "program", "run_log"},
    "fid": _RUN | {"convert.inception", "evaluation"},
    "convert": {"build", "config", "flow", "lock", "lora", "models", "params", "weights", "workdir"},
    "convert.inception": {"models.inception", "params", "pickles", "program"},
    "convert.__main__": {"models.autoencoder", "program", "weights"},
    "convert.trees": {"build", "config", "distill.flow_matching", "flow", "params", "workdir"},
    "plan": {"build", "sharding", "train_step"},
    "plan.__main__": {"program"},
    "plan.flops": {"models.layers"},
}


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "piflow_jax":
      for name in node.names:
        yield ".".join([*node.module.split(".")[1:], name.name])


MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def _row(module):
  """The row that a module belongs to, or None."""
  return next((name for name in (module, module.rpartition(".")[0]) if name in ALLOWED), None)


def test_every_module_has_a_row_and_every_row_a_module():
  rows = {_row(name) for name in MODULES if not name.endswith("__init__") or name == "policy.__init__"}
  assert None not in rows, [name for name in MODULES if _row(name) is None]
  assert rows == set(ALLOWED)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_arrows_point_inwards(module):
  folder = module.partition(".")[0]
  allowed = ALLOWED[_row(module)] | {folder, "errors"}
  for name in _imports(MODULES[module]):
    assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{module} imports {name}"


def test_there_is_no_circle():
  """Of modules, found by walking; a folder's modules may import one another, but not in a ring."""
  arrows = {module: {_module_of(name) for name in _imports(path)} - {module} for module, path in MODULES.items()}
  done, way = set(), []

  def walk(module):
    assert module not in way, f"a circle: {' -> '.join([*way[way.index(module):], module])}"
    if module in done:
      return
    way.append(module)
    for other in arrows.get(module, ()):
      walk(other)
    done.add(way.pop())

  for module in arrows:
    walk(module)


def _module_of(name):
  for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
    if candidate in MODULES:
      return candidate
  return name


def test_pytorch_is_imported_by_functions_that_need_it():
  for file in PACKAGE.rglob("*.py"):
    top = [a.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import) for a in node.names]
    # The modules that are shipped with an export stand alone, and nothing here imports them.
    shipped = ("piflow_torch.py", "piflow_policy.py", "piflow_dit.py", "piflow_text_to_image.py")
    assert "torch" not in top or file.name in shipped, file
    assert not any(f"{name.rpartition('.')[2]}.py" in shipped for name in _imports(file)), file


def test_importing_the_package_changes_no_global_setting_of_jax():
  import subprocess
  import sys

  code = ("import jax; before = dict(jax.config.values); import piflow_jax.train_loop, piflow_jax.build; "
          "import configs.digits; assert before == dict(jax.config.values); "
          "import jax._src.xla_bridge as b; assert not b._backends, 'a device was touched'")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
