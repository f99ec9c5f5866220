"""Every notebook runs in a kernel of its own, and is committed as it ran."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# Said in the kernel after the last cell of a notebook.
CLAIMS = {
    "quickstart": 'assert results["accuracy"] > 0.97 and results["confusion"].sum() == 359, results',
    "compute": """
serial, jit = found.ladder[:2]
assert found.devices == 2 and jit.examples_per_sec > 10 * serial.examples_per_sec, found
assert any("Conv_1" in spot.name and roof.bound(spot) == "arithmetic" for spot in roof.spots), roof
""",
}


def outputs(notebook: nbformat.NotebookNode, cell: str) -> list[nbformat.NotebookNode]:
    return next(found.outputs for found in notebook.cells if found.id == cell)


def pictures(outputs: list[nbformat.NotebookNode]) -> int:
    return sum("image/png" in output.get("data", ()) for output in outputs)


@pytest.fixture(params=NOTEBOOKS, ids=lambda file: file.stem)
def notebook(request: pytest.FixtureRequest) -> tuple[str, nbformat.NotebookNode]:
    return request.param.stem, nbformat.read(request.param, as_version=4)


def test_it_runs(notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, cells = notebook
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    cells.cells.append(nbformat.v4.new_code_cell(CLAIMS[name], id="claims"))
    folder = {"metadata": {"path": str(NOTEBOOKS[0].parent)}}
    NotebookClient(cells, timeout=300, kernel_name="python3", resources=folder).execute()
    if name == "quickstart":
        assert pictures(outputs(cells, "train")) == 1  # redrawn, not added to


def test_it_is_committed_as_it_ran(notebook):
    _, cells = notebook
    nbformat.validate(cells)
    code = [cell for cell in cells.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(pictures(cell.outputs) for cell in code) > 0
    for output in [output for cell in code for output in cell.outputs]:
        assert output.output_type != "error"
        text = output.get("text", "") + str(
            {kind: d for kind, d in output.get("data", {}).items() if kind != "image/png"}
        )
        assert not any(path in text for path in ("/root", "/tmp", "/home")), text
