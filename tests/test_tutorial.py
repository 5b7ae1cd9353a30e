"""Claims about tutorial.ipynb; its run takes some minutes: pytest tests/test_tutorial.py --notebook."""

import inspect
import json
import os
import re
import shutil
import statistics
import time
from unittest.mock import patch

import experiments
import nbclient
import nbformat
import pytest
import torch
from test_train import ROOT, run

import masks
import model
import train
import transfer

NOTEBOOK = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
MODULES = {"masks": masks, "model": model, "transfer": transfer, "train": train}
SOLUTIONS = {
    1: 0.325, 2: 16384, 3: 0.55, 4: False, 5: True, 6: 3, 7: True,
    8: 1.0, 9: 9, 10: False, 11: 0.0, 12: 4, 13: False,
}  # fmt: skip


NUMBER = r"\d+(?:\.\d+)?"
NO_RESULT = rf"{NUMBER} x {NUMBER} = {NUMBER}|^#.*|\(\d[\d., -]*\)|section \d+|1[0-9]\.\d\b"  # sums, places


def exercise(cell):
    """The number of the exercise whose check a cell holds, or None."""
    found = re.match(r"prediction = \.\.\.  # exercise (\d+):", cell.source)
    return int(found[1]) if found else None


def printed(cell):
    """What a cell has written: its lines and its sentences."""
    texts = [o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", [])]
    return "\n".join(texts)


@pytest.mark.skipif("not config.getoption('--notebook')", reason="slow: run with --notebook")
def test_the_notebook_runs_and_every_exercise_can_be_solved(tmp_path):
    """From a new kernel and in a copy of the folder, since it writes to out/; every section draws its
    picture, every solution is right, and all cells but the checks take less than twelve minutes: two and a
    half times what they take on two idle cores.
    """
    for name in ("masks.py", "model.py", "transfer.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    os.symlink(ROOT / "tests", tmp_path / "tests")
    notebook = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        if number := exercise(cell):
            cell.source = cell.source.replace("...", repr(SOLUTIONS[number]), 1)
    seconds = {}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.on_cell_start = lambda cell, cell_index: seconds.update({cell_index: -time.time()})
    client.on_cell_executed = lambda cell, cell_index, execute_reply: seconds.update(
        {cell_index: seconds[cell_index] + time.time()}
    )
    client.execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 25
    checked = re.compile(r"prediction = .*# exercise")
    checks = [i for i, cell in enumerate(notebook.cells) if checked.match(cell.source)]
    assert len(checks) == len(SOLUTIONS)
    assert all("right:" in printed(notebook.cells[i]) for i in checks)
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and i not in checks]
    assert sum(seconds[i] for i in code) < 720


def test_the_notebook_is_small_its_code_short_and_its_outputs_are_there():
    """Under 1.5 MB, code cells of at most 25 lines, ten or fewer in the median, every one of them
    executed.
    """
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in CODE]
    assert (ROOT / "tutorial.ipynb").stat().st_size < 1.5e6
    assert max(lines) <= 25 and statistics.median(lines) <= 10
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not any(output.output_type == "error" for cell in CODE for output in cell.outputs)
    assert not any(output.get("name") == "stderr" for cell in CODE for output in cell.outputs)


def test_every_number_in_the_prose_is_computed_beside_it():
    """Percentages, points and decimals of a section's text occur in its code or in what the code printed,
    or are settings of every run: no number of a result stands in the text alone.
    """
    defaults = [value for value in vars(train.parse_args([])).values() if isinstance(value, (int, float))]
    settings = {f"{value:g}" for value in defaults} | {f"{100 * value:g}" for value in defaults}
    constants = {f"{abs(value):g}" for value in (masks.GAMMA, masks.ZETA)}
    sections, current = [], []
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "markdown" and re.match(r"##+ ", cell.source):
            sections.append(current := [])
        current.append(cell)
    for section in sections:
        code = "\n".join(cell.source + printed(cell) for cell in section if cell.cell_type == "code")
        known = set(re.findall(r"\d+(?:\.\d+)?", code)) | settings | constants
        known |= {f"{100 * float(n):g}" for n in known}
        known |= {f"{100 - float(n):g}" for n in known}  # what is kept, if the code says what goes
        for cell in section:
            text = re.sub(NO_RESULT, "", cell.source, flags=re.MULTILINE)
            if cell.cell_type == "markdown":
                for number in re.findall(r"\d+\.\d+|\d+(?= ?%| points)", text):
                    assert number in known, f"{number} in: {cell.source[:300]}"


def test_a_check_waits_for_a_prediction_and_tells_right_from_wrong(capsys):
    """Dots are no prediction, and nothing is computed for them; a wrong one raises, with the answer."""
    place = {}
    exec(inspect.cleandoc(next(c.source for c in CODE if "def check" in c.source)), place)
    place["check"](..., lambda: 1 / 0)
    place["check"](0.74, lambda: 0.75, 0.05)
    place["check"](True, lambda: True)
    assert capsys.readouterr().out.count("right:") == 2
    with pytest.raises(AssertionError, match="you predicted 3, and it is 4"):
        place["check"](3, lambda: 4)


def test_every_function_that_the_notebook_replaces_takes_part_in_a_run(tmp_path):
    """patch.object(module, name, ...) with a function of the student's changes what train() does."""
    replaced = set(re.findall(r"patch\.object\((\w+), \"(\w+)\"", "\n".join(cell.source for cell in CODE)))
    assert len(replaced) >= 4
    for name, attribute in replaced:
        if callable(original := getattr(MODULES[name], attribute)):
            with patch.object(MODULES[name], attribute, wraps=original) as spy:
                run(tmp_path, "--transfer_start", 0)
            assert spy.called, f"{name}.{attribute}"


def test_what_the_prose_names_exists():
    """Functions in backticks, sections that are referred to, and settings of the committed rows."""
    for name, attribute in re.findall(r"`(masks|model|transfer|train)\.(\w+)", PROSE):
        assert attribute == "py" or hasattr(MODULES[name], attribute), f"{name}.{attribute}"
    sections = set(re.findall(r"^##+ (\d+(?:\.\d)?)", PROSE, re.MULTILINE))
    assert set(re.findall(r"section (\d+)", PROSE)) <= sections
    assert {exercise(cell) for cell in CODE} - {None} == set(SOLUTIONS)
    assert set(re.findall(r"\*\*Exercise (\d+)\.", PROSE)) == {str(n) for n in SOLUTIONS}


def mean(file, setting, get=experiments.structure_column):
    """Mean over seeds in %, nan (which fails no comparison by `not`) if fewer than two are there."""
    values = list(get(file, setting).values())
    return statistics.mean(values) if len(values) > 1 else float("nan")


def random_after_cut(file, setting):
    return experiments.three(file, setting, experiments.after_cut)


def gain(setting, baseline):
    """Mean gain over seeds in points, in the rows of networks with a parent; nan if there are none."""
    return statistics.mean(experiments.difference("parent", setting, baseline) or [float("nan")])


def curve(setting):
    """Mean validation curve over seeds, in %; a single nan if there are no two."""
    found = [row["validation_curve"] for row in experiments.rows("built_in") if row["setting"] == setting]
    if len(found) < 2:
        return [float("nan")]
    return [100 * statistics.mean(accuracy for _, accuracy in points) for points in zip(*found)]


def validation(file, setting):
    return experiments.column(file, setting, "validation_accuracy")


def score(file, setting):
    return experiments.column(file, setting, "proxy")


def kitchen_gain(n):
    pair = f"kitchen <- kitchen_rest, {n} labels"
    return experiments.difference("real", f"{pair}: always", f"{pair}: none") or [float("nan")]


FILM, NO_FILM = "trec_fine <- sst2, 400 labels: always", "trec_fine <- sst2, 400 labels: none"
CLAIMS = {  # a sentence of the prose -> comparisons of rows that must not be false: (smaller, larger)
    "With 50 labels already the auxiliary task does most of the work": [
        (85, mean("built_in", "50 labels, always")), (mean("built_in", "500 labels, none"), 65),
        (90, mean("built_in", "2000 labels, none")), (90, mean("built_in", "unpruned, always")),
    ],
    "Through the gates alone no gain is measurable": [
        (mean("built_in", "gates"), 55), (mean("built_in", "always") - 4, mean("built_in", "weights")),
    ],
    "is almost lost; while pruning it is nearly as good as always": [
        (mean("built_in", "before pruning"), 70), (mean("built_in", "while fine-tuning"), 75),
        (mean("built_in", "always") - 6, mean("built_in", "while pruning")),
        (mean("built_in", "before pruning"), mean("built_in", "sequential")),
        (mean("built_in", "sequential"), mean("built_in", "always")),
    ],
    "what was learned there fades, in the unpruned network too": [
        (curve("before pruning")[-1] + 10, max(curve("before pruning"))),
        (curve("unpruned, before pruning")[-1] + 5, max(curve("unpruned, before pruning"))),
    ],
    "falls as well when its help ends": [(curve("while pruning")[-1] + 4, max(curve("while pruning")))],
    "has hardly begun to rise": [(curve("while fine-tuning")[-1], 65)],
    "The less a run forgets, the less they add": [
        (gain("film, lr 3e-4, always", "film, lr 3e-4, none"),
         gain("film, lr 1e-3, always", "film, lr 1e-3, none")),
        (gain("film, lr 1e-4, always", "film, lr 1e-4, none"),
         gain("film, lr 3e-4, always", "film, lr 3e-4, none")),
        (mean("parent", "film, lr 1e-3, none"), mean("parent", "film, lr 3e-4, none")),
    ],
    "Projecting conflicts away changes nothing that these intervals could show": [
        (mean("built_in", "always") - 3, mean("built_in", "always, project")),
        (mean("built_in", "sequential") + 3, mean("built_in", "always")), (mean("built_in", "shuffled"), 56),
    ],
    "a random choice is close to guessing": [
        (mean("cuts", "built in, random, until the cut, 800", random_after_cut), 65),
        (85, mean("cuts", "built in, learned then cut, until the cut, 800", experiments.after_cut)),
        (85, mean("cuts", "built in, bottom, until the cut, 800", experiments.after_cut)),
    ],
    "bring even a random cut to within a few points": [
        (mean("cuts", "built in, learned then cut, goes on, 800") - 4,
         mean("cuts", "built in, random, goes on, 800")),
        (mean("cuts", "built in, random, until the cut, 800") + 10,
         mean("cuts", "built in, learned then cut, until the cut, 800")),
    ],
    "At 70 % a rule does as well as the gates": [
        (3, experiments.same_shape("scratch, 0.7, learned", "scratch, 0.7, bottom")),
        (mean("sparsity", "scratch, 0.7, learned then cut") - 4, mean("sparsity", "scratch, 0.7, bottom")),
        (mean("built_in", "always") - 4, mean("built_in", "small dense, always")),
    ],
    "At 90 % the curves part": [
        (mean("sparsity", "scratch, 0.9, bottom") + 4, mean("sparsity", "scratch, 0.9, learned then cut")),
        (mean("sparsity", "scratch, 0.9, random") + 4, mean("sparsity", "scratch, 0.9, learned then cut")),
        (mean("sparsity", "parent, 0.9, bottom") + 2, mean("sparsity", "parent, 0.9, learned then cut")),
        (mean("sparsity", "parent, 0.9, random") + 4, mean("sparsity", "parent, 0.9, learned then cut")),
    ],
    "two heads in each of the two lowest layers are closer to the gates": [
        (mean("sparsity", f"{start}, 0.9, {smaller}") + 2, mean("sparsity", f"{start}, 0.9, {larger}"))
        for start in ("scratch", "parent")
        for smaller, larger in (("bottom", "two layers"), ("two layers", "learned then cut"))
    ],
    "this classifier, trained on the examples of both, is above the network *with* transfer, too": [
        (mean("real", f"{pair}, 200 labels: always") + 3,
         mean("yardstick", f"{pair.split()[0]}, 200 labels: TF-IDF, auxiliary data too"))
        for pair in ("kitchen <- kitchen_rest", "dvd <- dvd_rest", "sst2 <- sst5", "trec_coarse <- trec_fine")
    ],
    "comes close to whole runs with transfer": [
        (mean("real", f"{pair}, 200 labels: always", validation) - 4,
         mean("proxy", f"{pair}, 200 labels", score))
        for pair in ("kitchen <- kitchen_rest", "dvd <- dvd_rest", "sst2 <- sst5", "trec_coarse <- trec_fine")
    ],
    "with more labels the gain is smaller": [
        (statistics.mean(kitchen_gain(more)), statistics.mean(kitchen_gain(fewer)))
        for more, fewer in ((1000, 200), (200, 50))
    ],
    "the unrelated task harms as much": [
        (mean("real", NO_FILM.replace("none", "always, project")) + 3, mean("real", NO_FILM)),
        (mean("real", FILM) - 3, mean("real", NO_FILM.replace("none", "always, project"))),
    ],
    "film reviews harm the classification of questions": [
        (statistics.mean(experiments.difference("real", FILM, NO_FILM) or [float("nan")]), 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("sentence", CLAIMS)
def test_what_the_prose_says_of_committed_rows_holds(sentence):
    """Every comparison behind a sentence, on the rows that are there."""
    assert sentence in " ".join(PROSE.split())
    assert not any(smaller > larger for smaller, larger in CLAIMS[sentence])


def test_shapes_and_sizes_of_the_challenge_are_those_of_the_network():
    """A unit that the reader draws costs what the text says: a feed-forward sublayer as much as 8 heads."""
    head, ffn = model.unit_sizes(64, 4)
    assert ffn == 8 * head
    drawn = masks.select(masks.Z(torch.full((4, 4), 0.9), torch.full((4,), 0.1)), 0.8, head, ffn)
    assert drawn.head.sum() == SOLUTIONS[9]


def test_the_cheap_proxy_classifies_what_the_classifier_reads():
    """The features times the classifier's weights are the network's logits; labels that follow from one word
    are found on texts that the probe has not seen.
    """
    vocab = [*model.SPECIAL, "good", "bad", "soup", "film"]
    config = model.Config(len(vocab), 8, 16, 8, [2], [1])
    torch.manual_seed(0)
    net = model.GatedTransformer(config, vocab, {"target": ["a", "b"]})
    texts = ["good soup", "bad soup soup", "bad film", "good film good"]
    layer = net.classifier["target"]
    logits = experiments.features(net, texts) @ torch.cat([layer.weight, layer.bias.view(-1, 1)], 1).T
    assert torch.allclose(logits.softmax(1), net.probabilities(texts), atol=1e-6)
    torch.nn.init.normal_(net.token.weight)
    seen, new = texts * 20, ["good", "soup good", "soup bad", "film bad film"]
    labels = [["no", "yes"]["good" in text] for text in seen], [["no", "yes"]["good" in text] for text in new]
    assert experiments.probe(net, (seen, labels[0]), (new, labels[1])) == 1
    assert experiments.probe(net, (seen, labels[0]), (new, labels[1][::-1])) == 0


def test_the_notebook_speaks_of_the_project_only():
    """No machine's paths, and outputs that do not show one."""
    text = json.dumps(NOTEBOOK)
    assert not re.search(r"/tmp/|/home/|/work/|/root", text)
