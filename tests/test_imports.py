"""Who may import what: the arrows of the house, read from the imports themselves."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "piflow_jax"

# module or folder -> what of the package it may import, beside itself and errors
ALLOWED = {
    "flow": set(),
    "errors": set(),
    "params": set(),
    "sharding": {"params"},
    "models": {"params", "sharding"},
    "policy": {"flow", "sharding", "models.layers"},
    "teacher": {"flow"},
    "sampler": {"flow"},
    "distill": {"flow", "policy.rollout"},
    "data": set(),
    "evaluation.metrics": set(),
    "evaluation.figures": set(),
    "evaluation.report": set(),
    "evaluation.digit_features": set(),
    "checkpoint": {"params"},
    "latents": {"checkpoint", "models"},
    "run_log": set(),
    "convert": {"build", "checkpoint", "main", "models", "params", "policy"},
}


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "piflow_jax":
      for name in node.names:
        yield ".".join([*node.module.split(".")[1:], name.name])


@pytest.mark.parametrize("place", ALLOWED)
def test_arrows_point_inwards(place):
  path = PACKAGE / place.replace(".", "/")
  files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
  assert files
  allowed = ALLOWED[place] | {place, "errors"}
  for file in files:
    for name in _imports(file):
      assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{file.name} imports {name}"


def test_pytorch_is_imported_by_functions_that_need_it():
  for file in PACKAGE.rglob("*.py"):
    top = [a.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import) for a in node.names]
    # The module that is shipped with an export stands alone, and nothing here imports it.
    assert "torch" not in top or file.name == "piflow_torch.py", file
    assert not any(name.endswith("piflow_torch") for name in _imports(file)), file


def test_importing_the_package_changes_no_global_setting_of_jax():
  import subprocess
  import sys

  code = ("import jax; before = dict(jax.config.values); import piflow_jax.train_loop, piflow_jax.build; "
          "import configs.digits; assert before == dict(jax.config.values); "
          "import jax._src.xla_bridge as b; assert not b._backends, 'a device was touched'")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
