"""The course notebook runs from top to bottom in a new kernel. Run apart: python -m pytest
tests/test_tutorial.py --notebook"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif("not config.getoption('--notebook')", reason="slow: run with --notebook")
def test_the_notebook_runs_without_an_error_in_under_ten_minutes(tmp_path):
    import os
    import shutil

    import nbclient
    import nbformat

    for name in (
        "masks.py",
        "model.py",
        "transfer.py",
        "train.py",
        "tutorial.ipynb",
        "tests",
    ):  # it writes to out/
        os.symlink(ROOT / name, tmp_path / name) if (ROOT / name).is_dir() else shutil.copy(
            ROOT / name, tmp_path
        )
    notebook = nbformat.read(tmp_path / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12  # every section has its picture


def test_the_notebook_is_small_its_code_short_and_its_outputs_are_there():
    """Under 1.5 MB, code cells of at most 25 lines, ten or fewer in the median, every one of them
    executed."""
    import json
    import statistics

    text = (ROOT / "tutorial.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [sum(bool(line.strip()) for line in cell["source"]) for cell in cells]
    assert len(text) < 1.5e6 and max(lines) <= 25 and statistics.median(lines) <= 10
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
