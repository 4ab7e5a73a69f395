"""The figures of the house: what keeps its code short to read. `make lint` asks these, ruff and shellcheck."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "piflow_jax"
MADE = {"build", "runs"}  # what programs write here; environments and caches start with a dot


def _files(*endings):
  """Files of the clone with these endings, whether committed yet or not."""
  found = [path for path in ROOT.iterdir() if path.suffix in endings]
  for folder in ROOT.iterdir():
    if folder.is_dir() and folder.name[0] != "." and folder.name not in MADE:
      found += [path for path in folder.rglob("*") if path.suffix in endings]
  assert found
  return sorted(path.relative_to(ROOT) for path in found)


def _parsed(*folders):
  """(path, tree) of each Python file of the clone that lies in one of these folders."""
  for path in _files(".py"):
    if path.parts[0] in folders:
      yield path, ast.parse((ROOT / path).read_text())


def _lambdas(tree):
  return [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]


def _arguments(function):
  """The names that a call may give; self and cls are none of them."""
  every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
  return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_no_function_takes_more_than_ten_arguments():
  long = {}
  for path, tree in _parsed("piflow_jax"):
    for node in ast.walk(tree):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and len(_arguments(node)) > 10:
        long[f"{path}:{node.lineno}"] = len(_arguments(node))
  assert not long, str(long)


def test_lambdas_are_few():
  lambdas = {str(path): len(_lambdas(tree)) for path, tree in _parsed("piflow_jax")}
  lines = sum(len((ROOT / path).read_text().splitlines()) for path in lambdas)
  most = sorted(lambdas.items(), key=lambda item: -item[1])[:8]
  assert 1000 * sum(lambdas.values()) <= 8 * lines, f"{sum(lambdas.values())} in {lines} lines; most in {most}"


def test_a_lambda_is_one_expression_on_one_line():
  long = []
  for path, tree in _parsed("piflow_jax", "configs", "benchmarks", "tests"):
    long += [f"{path}:{node.lineno}" for node in _lambdas(tree) if node.end_lineno > node.lineno]
  assert not long, str(long)


def test_no_line_is_wider_than_120_columns():
  wide = []
  for path in _files(".py", ".sh"):
    lines = (ROOT / path).read_text().splitlines()
    wide += [f"{path}:{number}" for number, line in enumerate(lines, 1) if len(line) > 120]
  assert not wide, str(wide)


def test_no_module_is_called_utils():
  assert not [str(path) for path in _files(".py") if path.stem in ("util", "utils")]


def test_an_installed_package_has_all_of_it():
  # setup.py finds folders with an __init__.py, and of those the Python files.
  for path in PACKAGE.rglob("*"):
    if path.is_file() and "__pycache__" not in path.parts:
      assert path.suffix == ".py", f"{path}: setup.py installs Python files only; name it in package_data"
      assert (path.parent / "__init__.py").exists(), f"{path.parent}: setup.py does not find it without __init__.py"
