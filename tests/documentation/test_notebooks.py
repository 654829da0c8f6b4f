"""The notebooks run from top to bottom, and are pages of the site."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tests.documentation.scenery as scenery
from tests.documentation.blocks import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """The name of a kernel of this very Python, which need not be installed for anybody."""
    folder = tmp_path / "jupyter" / "kernels" / "zellige-test"
    folder.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "here", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    return "zellige-test"


def run(name: str, folder: Path, kernel: str) -> str:
    """What the cells print. Raises where one of them fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it shows no picture"
    return "".join(output.get("text", "") for output in outputs)


def test_both_stages_are_trained(tmp_path, monkeypatch, kernel):
    monkeypatch.setenv("ZELLIGE_QUICK", "1")
    said = run("train_both_stages", tmp_path, kernel)
    assert "7x7 codes of 128" in said
    assert (tmp_path / "models" / "notebook" / "model_index.json").exists()


def test_a_model_is_used(tmp_path, monkeypatch, kernel):
    scenery.digit_model(tmp_path / "model")
    monkeypatch.setenv("ZELLIGE_MODEL", str(tmp_path / "model"))
    said = run("use_a_model", tmp_path, kernel)
    assert "bytes for 10 digits of 784 bytes each" in said
    assert "as decoded: True" in said
    assert len(list((tmp_path / "samples").glob("*.png"))) == 10


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    """They would be out of date at the next change, and hide what changed."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs"), cell["source"]
        assert cell.get("execution_count") is None
