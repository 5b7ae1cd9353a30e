"""Claims about tutorial.ipynb; its run takes some minutes: pytest tests/test_tutorial.py --notebook."""

import json
import os
import shutil
import statistics
import time

import nbclient
import nbformat
import pytest

from test_train import ROOT


@pytest.mark.skipif("not config.getoption('--notebook')", reason="slow: run with --notebook")
def test_the_notebook_runs_without_an_error_in_under_ten_minutes(tmp_path):
    """From a new kernel and in a copy of the folder, since it writes to out/; every section draws its
    picture."""
    for name in ("masks.py", "model.py", "transfer.py", "train.py", "tutorial.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    os.symlink(ROOT / "tests", tmp_path / "tests")
    notebook = nbformat.read(tmp_path / "tutorial.ipynb", as_version=4)
    began = time.time()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    assert time.time() - began < 600


def test_the_notebook_is_small_its_code_short_and_its_outputs_are_there():
    """Under 1.5 MB, code cells of at most 25 lines, ten or fewer in the median, every one of them
    executed."""
    text = (ROOT / "tutorial.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [sum(bool(line.strip()) for line in cell["source"]) for cell in cells]
    assert len(text) < 1.5e6 and max(lines) <= 25 and statistics.median(lines) <= 10
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
