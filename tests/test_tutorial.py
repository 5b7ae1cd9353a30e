"""Claims about tutorial.ipynb; its run takes some minutes: pytest tests/test_tutorial.py --notebook."""

import ast
import builtins
import json
import math
import os
import re
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import exercises
import experiments
import nbclient
import nbformat
import pytest
import torch

import masks
import model
import train
import transfer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
MODULES = {"masks": masks, "model": model, "transfer": transfer, "train": train}
ASKED = {exercises.number_of(cell): cell.source for cell in CODE if exercises.number_of(cell)}


def printed(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


@pytest.mark.skipif("not config.getoption('--notebook')", reason="slow: run with --notebook")
def test_the_notebook_runs_and_every_exercise_can_be_solved(tmp_path):
    """From a new kernel, in a copy of the folder: it writes to out/. Every solution is right, and all takes
    less than fifteen minutes: two and a half times what it should on two idle cores.
    """
    for name in ("masks.py", "model.py", "transfer.py", "train.py", "tests"):
        os.symlink(ROOT / name, tmp_path / name)
    notebook = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
    exercises.solve(notebook)
    began = time.time()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert time.time() - began < 900
    for cell in notebook.cells:
        if number := exercises.number_of(cell):
            assert printed(cell).count("right: ") == len(exercises.PREDICTIONS.get(number, [0])), cell


@pytest.mark.parametrize("number", exercises.SOLUTIONS)
def test_an_exercise_says_what_is_missing_gives_the_hint_of_a_slip_and_takes_the_solution(number, capsys):
    """Every slip has a hint of its own; only a right function is used, and the module's otherwise."""
    place = {"torch": torch, "masks": masks, "math": math}
    exec(ASKED[number].partition("\n\n")[0], place)
    solution, theirs = exercises.SOLUTIONS[number], exercises.THEIRS[number]
    assert exercises.tested(number, place[solution.__name__]) is theirs
    assert "replace the dots" in capsys.readouterr().out
    for right, wrong, hint in exercises.SLIPS[number]:
        assert exercises.tested(number, exercises.with_slip(number, right, wrong)) is theirs
        assert f"Hint: {hint}\n" in capsys.readouterr().out
    assert exercises.tested(number, solution) is solution
    assert f"exercise {number}" in ASKED[number] and "right: " in capsys.readouterr().out


def test_a_prediction_is_right_or_gets_the_hint_of_its_mistake(capsys):
    """Dots and what is no number are no predictions. Exercise 11 needs a network that the notebook trains."""
    for number in exercises.PREDICTIONS.keys() - {11}:
        rights = [answer for answer, *_ in exercises.PREDICTIONS[number]]
        exercises.check(number, *rights)
        assert capsys.readouterr().out.count("right: ") == len(rights)
        for i, (_, _, hint, mistakes) in enumerate(exercises.PREDICTIONS[number]):
            for wrong, expected in {**mistakes, 12345: hint, math.nan: hint}.items():
                exercises.check(number, *rights[:i], wrong)
                assert capsys.readouterr().out.endswith(f"Hint: {expected}\n")
    for given, says in ((..., "no prediction yet"), ("many", "a number is"), (None, "a number is")):
        exercises.check(2, given)
        assert says in capsys.readouterr().out


def test_the_notebook_has_the_form_of_a_course():
    """Sizes, executed outputs, and plumbing that is folded."""
    lines = [[line for line in cell.source.splitlines() if line.strip()] for cell in CODE]
    pictures = [o for cell in CODE for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(NOTEBOOK.cells) <= 100 and len(PROSE.split()) <= 4300 and 18 <= len(pictures) <= 22
    assert max(map(len, lines)) <= 20 and max(map(len, sum(lines, []))) <= 100
    for cell in CODE:
        is_folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert is_folded == cell.source.startswith(("# setup: ", "# picture: "))
    assert (ROOT / "tutorial.ipynb").stat().st_size < 1.5e6
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert not re.search(r"/tmp/|/home/|/work/|/root", json.dumps(NOTEBOOK))
    assert ASKED.keys() == exercises.PREDICTIONS.keys() | exercises.SOLUTIONS.keys()


def test_part_two_needs_only_the_cells_that_say_setup():
    """Every name that part II reads is a builtin, its own, or made by a setup cell."""
    second = next(i for i, cell in enumerate(NOTEBOOK.cells) if "\n# Part II" in cell.source)
    sources = [cell.source for cell in CODE if cell.source.startswith("# setup")]
    sources += [cell.source for cell in NOTEBOOK.cells[second:] if cell.cell_type == "code"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    made = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ExceptHandler | ast.alias)}
    made |= {n.asname for n in nodes if isinstance(n, ast.alias)} | {*dir(builtins)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    made |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert {n.id for n in nodes if isinstance(n, ast.Name)} <= made


def test_every_number_in_the_prose_is_computed_beside_it():
    """Percentages, points and decimals of a section's text occur in its code or in what the code printed,
    or are settings of every run: no number of a result stands in the text alone.
    """
    defaults = [value for value in vars(train.parse_args([])).values() if isinstance(value, (int, float))]
    settings = {f"{value:g}" for value in defaults} | {f"{100 * value:g}" for value in defaults}
    settings |= {"0.1", "1.1", "1.5", "95"}  # of stretches, and of the intervals
    parts = [cell.source if cell.cell_type == "markdown" else f"\0{cell.source}\n{printed(cell)}\0"
             for cell in NOTEBOOK.cells]
    for section in re.split(r"\n(?=## )", "\n".join(parts)):
        prose, code = ("\n".join(section.split("\0")[start::2]) for start in (0, 1))
        known = set(re.findall(r"\d+(?:\.\d+)?", code)) | settings
        known |= {f"{100 * float(n):g}" for n in known}
        elsewhere = r"^#.*|\(\d[\d., -]*\)|section \d+|11\.\d|\]\(http\S+\)|error of [\d.]+"
        text = re.sub(elsewhere, "", prose, flags=re.MULTILINE)
        assert set(re.findall(r"\d+\.\d+|\d+(?= ?%| points)", text)) <= known, prose[:80]


def test_what_the_notebook_names_exists_and_what_it_replaces_takes_part_in_a_run(tmp_path):
    """Functions in backticks, sections; a function given to patch.object is called by train()."""
    for name, attribute in re.findall(r"`(masks|model|transfer|train)\.((?!py|safetensors|jsonl)\w+)", PROSE):
        assert hasattr(MODULES[name], attribute), f"{name}.{attribute}"
    headings = set(re.findall(r"^##+ (\d+(?:\.\d)?)", PROSE, re.MULTILINE))
    assert set(re.findall(r"section (\d+)", PROSE)) <= headings
    code = "\n".join(cell.source for cell in CODE)
    replaced = set(re.findall(r"patch\.object\((\w+), \"(\w+)\", \w+\)", code))
    flags = f"--steps 2 --finetune_steps 1 --sparsity 0 --transfer_start 0 --out_dir {tmp_path}"
    for name, attribute in replaced:
        with patch.object(MODULES[name], attribute, wraps=getattr(MODULES[name], attribute)) as spy:
            train.train(train.parse_args(flags.split()))
        assert spy.called, f"{name}.{attribute}"


def mean(file, setting, key="test_accuracy"):
    """Mean over seeds in %; nan, which no comparison finds false, where there is no row."""
    return statistics.mean(experiments.column(file, setting, key).values() or [math.nan])


END, ON = "until the cut, 800", "goes on, 800"
CUT, RANDOM, NINETY = "built in, learned then cut", "built in, random 0", "parent, 0.9"
ALWAYS = mean("built_in", "always")
CLAIMS = {  # a sentence of the prose -> comparisons of rows that must not be false: (smaller, larger)
    "gates alone bring nothing measurable, weights all of it":
        [(mean("built_in", "gates"), 55), (ALWAYS - 4, mean("built_in", "weights"))],
    "a window that ends before pruning leaves almost nothing in the end":
        [(mean("built_in", "before pruning"), 55)],
    "projecting changes nothing that five seeds could show":
        [(ALWAYS - 3, mean("built_in", "always, project")), (mean("built_in", "shuffled"), 56)],
    "even random structures come within a few points; if it stops, they do not":
        [(mean("cuts", f"{CUT}, {ON}") - 4, mean("cuts", f"{RANDOM}, {ON}")),
         (mean("cuts", f"{RANDOM}, {END}") + 10, mean("cuts", f"{CUT}, {END}"))],
    "there the rule is as good as the gates; at 90 % the gates are above it in every seed":
        [(mean("sparsity", "parent, 0.7, learned then cut") - 2, mean("sparsity", "parent, 0.7, bottom")),
         (0, min(experiments.difference("sparsity", f"{NINETY}, learned then cut", f"{NINETY}, bottom")))],
    "TF-IDF on both tasks' data is above this network":
        [(mean("real", "sst2 <- sst5, 200 labels: always") + 3,
          mean("yardstick", "sst2, 200 labels: TF-IDF, auxiliary data too"))],
}  # fmt: skip


@pytest.mark.parametrize("sentence", CLAIMS)
def test_what_the_prose_says_of_committed_rows_holds(sentence):
    assert sentence in " ".join(PROSE.split())
    assert not any(smaller > larger for smaller, larger in CLAIMS[sentence])
