"""Every notebook runs from top to bottom as a reader runs it, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def test_there_is_a_quick_start() -> None:
    # Protects: the tests below, which pass where there is no notebook.
    assert "quick_start.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_no_outputs(path: Path) -> None:
    # Protects: numbers and paths of somebody's machine stay out of the repository.
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    # Protects: what a reader tries first; an error in any cell fails. Run folders go to tmp_path.
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not errors
    if path.stem == "quick_start":
        assert shown.count("image/png") == 2  # the heat map and the comparison
        assert shown.count("text/html") >= 2  # both results as tables
