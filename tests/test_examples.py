"""The notebook and the page on Python run from top to bottom, as a new user would run them."""

import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from flatcl.utils.registry import ROOT

NOTEBOOK = ROOT / "examples/first_steps.ipynb"


def outputs(notebook):
    """The text that each cell has printed or shown, but for what differs between runs (times, folders)."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(part.get("data", {}).get("text/plain", "") for part in cell.outputs) for cell in cells]


def test_the_notebook_runs_and_shows_what_is_kept_in_it(tmp_path):
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in fresh.cells:
        cell["source"] = cell["source"].replace('sys.path.insert(0, "..")', f"sys.path.insert(0, {str(ROOT)!r})")
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(outputs(fresh)) == len(outputs(kept)) > 10
    assert "True" in outputs(fresh) and any("<Figure" in text for text in outputs(fresh))
    assert len(list((tmp_path / "results").rglob("summary.json"))) == 6
    assert [len(text) > 0 for text in outputs(fresh)] == [len(text) > 0 for text in outputs(kept)]
    assert all(cell.execution_count is not None for cell in kept.cells if cell.cell_type == "code")


@pytest.mark.parametrize("cell", [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"],
                         ids=lambda cell: cell["id"])  # fmt: skip
def test_the_kept_notebook_has_no_error_and_no_path_of_a_machine(cell):
    text = str(cell.outputs)
    assert "Traceback" not in text and str(ROOT) not in text and "/home" not in text and sys.prefix not in text


def test_the_page_on_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
    scope = {}
    for block in blocks:
        exec(re.sub(r'flatcl.load\("results/[^"]+"\)', "flatcl.load(run.folder)", block), scope)
    assert len(blocks) == 4 and scope["run"].status == "finished" and scope["run"].flags["optimizer"] == "gsam"
    assert scope["run"].benchmark.class_order() == [0, 1, 4, 2, 3]
