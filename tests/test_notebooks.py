"""Every notebook runs from its first cell to its last by the Python that runs the tests, and is stored clean."""

import json
import pathlib

import jupyter_client
from jupyter_client import kernelspec
import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
  assert NOTEBOOKS


@every_notebook
def test_is_stored_without_outputs(path):
  notebook = json.loads(path.read_text())
  nbformat.validate(notebook)
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  assert notebook["metadata"]["kernelspec"]["name"] == "python3"
  for cell in notebook["cells"]:
    assert set(cell["metadata"]) == set(), cell["id"]
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


@pytest.mark.slow
@every_notebook
def test_runs(path, tmp_path, monkeypatch):
  """In an empty folder; what its own asserts say is what is tested."""
  for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
    monkeypatch.setenv(name, str(tmp_path / name.lower()))
  folder = tmp_path / "empty"
  folder.mkdir()
  # Without any folder to look in, "python3" is ipykernel's own specification, whose program is sys.executable. A
  # kernel of that name that a user has installed for another Python would otherwise be found before this one.
  kernels = kernelspec.KernelSpecManager(kernel_dirs=[])
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
      notebook, km=jupyter_client.AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels), timeout=300,
      resources={"metadata": {"path": str(folder)}}).execute(cleanup_kc=True)
  assert not list(folder.iterdir())
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  assert any("image/png" in output.get("data", {}) for output in outputs)
