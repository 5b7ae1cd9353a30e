"""Claims about whole runs: the loop, the command line, and what a run leaves behind (train.py)."""

import contextlib
import io
import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import masks
import train as loop
import transfer
from model import GatedTransformer, prunable
from test_transfer import write
from transfer import Examples, InputError

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
SHORT = (
    "--steps 60 --prune_start 10 --prune_ramp 20 --finetune_steps 20 --gate_lr 1 --n_layer 2 "
    "--d_model 16 --sparsity 0.5"
).split()


def run(tmp_path, *flags):
    """A short run through the importable loop."""
    return loop.train(loop.parse_args([*SHORT, "--out_dir", str(tmp_path), *map(str, flags)]))


def command(*flags, cwd=ROOT):
    """The real command line, as a user types it."""
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, flags)], capture_output=True, text=True, cwd=cwd
    )


def run_main(*flags):
    """The command line inside this process: (exit code, stderr)."""
    error = io.StringIO()
    before, sys.argv = sys.argv, ["train.py", *map(str, flags)]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            loop.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return code, error.getvalue()


def weights(folder):
    return torch.load(Path(folder) / "pruned.pt", weights_only=True)["state"]


def read_data(target="reviews:restaurant", aux="reviews:film", n_target=200):
    """What a run with these tasks and otherwise the defaults reads."""
    flags = ["--target", target, "--aux", aux, "--n_target", str(n_target)]
    return loop.load(loop.parse_args(flags))


def couplings(monkeypatch, folder, *flags):
    """Run, and return the gradients of the two tasks that were coupled at every step: (g_target, g_aux)."""
    steps, couple = [], transfer.couple

    def recorded(g_target, g_aux, coupling):
        steps.append((g_target, g_aux))
        return couple(g_target, g_aux, coupling)

    monkeypatch.setattr(transfer, "couple", recorded)
    run(folder, *flags)
    monkeypatch.undo()
    return steps


# ---- transfer inside a run


def test_before_transfer_start_the_run_is_bit_for_bit_the_run_without_transfer(tmp_path):
    """Parameters, not losses: equal when transfer would start after the last step, which is said, different
    when it starts just before."""
    run(tmp_path / "off", "--aux_weight", 0)
    notes = run(tmp_path / "late", "--aux_weight", 0.5, "--transfer_start", 60)["notes"]
    assert notes[-1].startswith("no transfer")
    notes = run(tmp_path / "last", "--aux_weight", 0.5, "--transfer_start", 59)["notes"]
    assert not notes[-1].startswith("no transfer")
    off, late, last = (weights(tmp_path / name) for name in ("off", "late", "last"))
    assert off.keys() == late.keys() and all(torch.equal(off[n], late[n]) for n in off)
    shared = [n for n in off if not n.startswith("classifier")]
    assert any(not torch.equal(off[n], last[n]) for n in shared)


def test_transfer_stop_closes_the_window(tmp_path):
    """An empty window is no transfer, at every step, and the report says so."""
    run(tmp_path / "off", "--aux_weight", 0)
    flags = "--aux_weight", 0.5, "--transfer_start", 5, "--transfer_stop"
    assert run(tmp_path / "empty", *flags, 5)["notes"][-1].startswith("no transfer")
    assert not run(tmp_path / "open", *flags, 6)["notes"][-1].startswith("no transfer")
    off, empty = weights(tmp_path / "off"), weights(tmp_path / "empty")
    assert all(torch.equal(off[n], empty[n]) for n in off)


def test_what_is_transferred_decides_what_the_auxiliary_gradient_reaches(tmp_path, monkeypatch):
    """gates: no weight hears the auxiliary task. weights: no gate does. both: all do. Its own classifier
    always learns, the target's never; and gates hear it only while they are at work."""
    own = {"classifier.auxiliary.weight", "classifier.auxiliary.bias"}
    flags = "--transfer_start", 5, "--transfer"
    reached = {}
    for what in ("gates", "weights", "both"):
        steps = couplings(monkeypatch, tmp_path, *flags, what)
        reached[what] = [set(g_aux) for _, g_aux in steps]
        assert not any(reached[what][:5]) and all(names >= own for names in reached[what][5:])
        assert not any("classifier.target.weight" in names for names in reached[what])
    assert reached["gates"][5] == own and reached["gates"][15] == own | {"log_alpha"}
    assert reached["weights"][15] == reached["both"][15] - {"log_alpha"}
    assert {"token.weight", "norm.bias", "blocks.1.qkv.weight"} <= reached["weights"][15]
    assert "log_alpha" not in reached["both"][5] | reached["both"][45]


def test_a_run_that_transfers_to_the_gates_alone_projects_without_gates_too(tmp_path):
    """In the dense and in the fine-tuning phase nothing is shared; the run ends all the same."""
    result = run(tmp_path, "--transfer", "gates", "--coupling", "project", "--transfer_start", 0)
    assert result["delivered_sparsity"] >= 0.5


@pytest.mark.parametrize("coupling", ["sum", "project"])
def test_the_gradient_of_a_step_is_the_coupling_of_the_two_tasks_plus_the_controllers(
    tmp_path, monkeypatch, coupling
):
    """Each loss alone, by autograd, against what the optimizers are given at the first step of a run."""
    flags = "--prune_start 0 --transfer_start 0 --aux_weight 0.3 --coupling".split()
    args = loop.parse_args([*SHORT, *flags, coupling, "--out_dir", str(tmp_path)])
    data = loop.load(args)
    run, given = loop.start(args, data), []
    named = {**dict(run.net.named_parameters()), "log_alpha": run.gates.log_alpha}
    losses = [
        loop.task_loss(run.net, run.gates, loop.Task(name, examples, args.batch_size, args.seed), 0, args)
        for name, examples in (("target", data.train), ("auxiliary", data.aux))
    ]
    g_target, g_aux = (
        dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True)))
        for loss in losses
    )
    shared = [n for n in named if not n.startswith("classifier")]  # what both tasks touch
    dot = sum((g_aux[n] * g_target[n]).sum() * 0.3 for n in shared)
    norm = sum((g_target[n] ** 2).sum() for n in shared)
    against = min(dot / norm, 0) if coupling == "project" else 0
    gap = masks.sparsity(run.gates.prob_open(), *loop.model.unit_sizes(16, 4))
    (push,) = torch.autograd.grad(run.controller.penalty(gap), run.gates.log_alpha)

    start = loop.start
    monkeypatch.setattr(loop, "start", lambda *a: given.append(start(*a)) or given[0])

    def look(parameters, limit):
        named = {**dict(given[0].net.named_parameters()), "log_alpha": given[0].gates.log_alpha}
        given.append({n: p.grad.clone() for n, p in named.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    with pytest.raises(KeyboardInterrupt):
        loop.train(args)
    for name, gradient in given[1].items():
        expected = g_target[name] * (1 - against if name in shared else 1) + 0.3 * g_aux[name]
        torch.testing.assert_close(gradient, expected + (push if name == "log_alpha" else 0))


def test_sequential_transfer_is_two_windows_that_do_not_overlap(tmp_path):
    """Until target_start the target's classifier keeps its initial values; one step later it does not."""
    args = loop.parse_args([*SHORT, "--sparsity", "0", "--n_target", "50", "--out_dir", str(tmp_path)])
    initial = loop.start(args, loop.load(args)).net.classifier["target"].weight
    flags = "--sparsity 0 --n_target 50 --finetune_steps 5 --transfer_stop 10 --target_start 10".split()
    run(tmp_path / "before", *flags, "--transfer_start", 0, "--steps", 10)
    run(tmp_path / "after", *flags, "--transfer_start", 0, "--steps", 11)
    assert torch.equal(weights(tmp_path / "before")["classifier.target.weight"], initial)
    assert not torch.equal(weights(tmp_path / "after")["classifier.target.weight"], initial)


# ---- optimizer, schedule, evaluation


def test_only_weight_matrices_are_decayed(tmp_path):
    args = loop.parse_args([*SHORT, "--out_dir", str(tmp_path)])
    run = loop.start(args, loop.load(args))
    for _ in ("dense", "after the cut"):
        decayed = {id(p) for g in run.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        assert decayed == {id(p) for p in run.net.parameters() if p.dim() >= 2}
        loop.cut_out(run, run.structure, args.weight_decay)
    held = [
        p
        for optimizer in (run.optimizer, run.gate_optimizer)
        for g in optimizer.param_groups
        for p in g["params"]
    ]
    assert {id(p) for p in held} == {id(p) for p in (*run.net.parameters(), run.gates.log_alpha)}
    assert run.gate_optimizer.param_groups[0]["weight_decay"] == 0


def test_learning_rate_warms_up_stays_and_ends_near_zero():
    lr = [loop.lr_at(step, 0.5, 2200, 3000) for step in range(3000)]
    assert lr[0] == 0.5 / loop.WARMUP and lr[loop.WARMUP - 1] == lr[loop.WARMUP] == lr[2200] == 0.5
    assert 0 < lr[-1] < 0.001 and all(a <= b for a, b in zip(lr[:100], lr[1:100]))
    assert lr[2600] == pytest.approx(0.25)


@pytest.mark.parametrize("longest, at_once", [(64, 300), (256, 300), (1024, 17), (4096, 1)])
def test_an_evaluation_reads_fewer_texts_at_once_the_longer_they_are(longest, at_once):
    """Attention scores take the square of the length, for every text that is read at once."""
    shapes = []

    class Watched(torch.nn.Module):
        def forward(self, ids, task, z):
            shapes.append(ids.shape)
            return torch.zeros(len(ids), 2)

    start = np.arange(301) * longest
    examples = Examples(np.zeros(start[-1], dtype=int), start, np.zeros(300, dtype=int))
    assert loop.evaluate(Watched(), examples, None, "cpu")["accuracy"] == 1
    assert max(B for B, _ in shapes) == at_once and sum(B for B, _ in shapes) == 300


def test_scores_by_hand():
    """Confusion counts written out; a class that is only predicted, or only present, counts with F1 0, and
    one that is neither does not count."""

    class Fixed(torch.nn.Module):
        def forward(self, ids, task, z):
            return torch.nn.functional.one_hot(ids[:, 0], 5).float()

    predicted, label = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 3])
    examples = Examples(predicted, np.arange(7), label)
    scores = loop.evaluate(Fixed(), examples, None, "cpu")
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["macro_f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (2 + 2) + 0 + 0) / 4)
    assert scores["precision"] == pytest.approx([2 / 3, 1 / 2, 0, 0, 0])
    assert scores["recall"] == pytest.approx([1, 1 / 2, 0, 0, 0])
    assert scores["f1"] == pytest.approx([0.8, 0.5, 0, 0, 0])
    assert scores["confusion"][:4] == [[2, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [0, 1, 1, 0, 0]]
    e = math.e  # the cross-entropy of one-hot scores, right and wrong
    assert scores["loss"] == pytest.approx((3 * math.log((e + 4) / e) + 3 * math.log(e + 4)) / 6)


def test_interval_is_the_t_interval():
    """Against the textbook: 1 to 5 have mean 3 and deviation sqrt(2.5); the 0.975 quantile of t with 4 df is
    2.776."""
    mean, deviation, half = loop.interval([1, 2, 3, 4, 5])
    assert (mean, deviation) == (3, pytest.approx(2.5**0.5))
    assert half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=1e-3)
    assert math.isnan(loop.interval([1])[2])


def test_the_interval_covers_the_true_mean_in_95_of_100_series():
    """5,000 series of 5 normal values; 0.012 is four standard errors of a share of 0.95."""
    values = torch.randn(5000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    covered = sum(abs(mean) <= half for mean, _, half in map(loop.interval, values)) / 5000
    assert abs(covered - 0.95) < 0.012


# ---- what a run leaves behind


def test_the_first_command_shortened_runs_and_leaves_what_it_promises(tmp_path):
    """Through the real command line, in a folder of its own; the numbers in result.json agree with the
    network on disk."""
    flags = "--aux_weight", 0.5, "--transfer_start", 30, "--sparsity", 0.6  # which no structure has exactly
    done = command(*SHORT, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["history.jsonl", "pruned.pt", "result.json"]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    numbers = (
        "test_accuracy test_macro_f1 validation_accuracy target_sparsity delivered_sparsity "
        "expected_sparsity params_dense params_pruned latency_dense_ms latency_pruned_ms speedup seconds seed"
    )
    assert all(isinstance(result[key], (int, float)) for key in numbers.split())
    assert result["args"]["transfer_start"] == 30 and f"{result['test_accuracy']:.3f}" in done.stdout
    small = GatedTransformer.load(tmp_path / "out" / "pruned.pt")
    assert result["params_pruned"] == sum(p.numel() for p in small.parameters()) < result["params_dense"]
    assert result["delivered_sparsity"] == pytest.approx(1 - prunable(small) / (2 * 12 * 16 * 16)) != 0.6
    assert [sum(heads) for heads in result["heads_kept"]] == small.config.heads
    assert result["ffn_kept"] == small.config.ffn
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    terms = (
        "step phase smoothed_loss_target smoothed_loss_aux penalty lambda1 expected_sparsity target_sparsity "
        "validation_accuracy"
    )
    for row in rows:
        assert set(terms.split()) <= row.keys()
        assert all(np.isfinite(v) for v in row.values() if not isinstance(v, (str, dict)))
    data = read_data()
    texts = [text for text, _ in transfer.reviews("restaurant")["test"]]
    names = [data.labels["target"][i] for i in data.test.label]
    right = [a == b for a, b in zip(small.predict(texts), names)]
    assert np.mean(right) == pytest.approx(
        result["test_accuracy"], abs=1e-6
    )  # the file on disk has this accuracy
    assert result["test_interval"] == pytest.approx(loop.wilson(result["test_accuracy"], len(texts)))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, "--seed", seed, "--transfer_start", 20)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(a[n].shape != c.get(n, a[n][:0]).shape or not torch.equal(a[n], c[n]) for n in a)


def test_the_network_kept_is_the_best_on_validation_of_the_fine_tuning_phase(tmp_path, monkeypatch):
    """Whatever the larger network scored before; the file on disk has the validation accuracy that is
    reported."""
    monkeypatch.setattr(loop, "EVAL_EVERY", 2)
    result = run(tmp_path, "--lr", 0.01, "--n_target", 500)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    tuned = [row["validation_accuracy"] for row in rows if row["phase"] == "finetune"]
    assert len(tuned) == 10 and len(set(tuned)) > 1 and result["validation_accuracy"] == max(tuned)
    data = read_data(n_target=500)
    small = GatedTransformer.load(tmp_path / "pruned.pt")
    assert loop.evaluate(small, data.validation, None, "cpu")["accuracy"] == result["validation_accuracy"]


def test_a_series_keeps_every_row_goes_on_where_it_stopped_and_pairs_by_seed(tmp_path, monkeypatch, capsys):
    """Two seeds with and without transfer are four runs; after losing two rows, exactly these two are run
    again."""
    calls, real = [], loop.train
    monkeypatch.setattr(loop, "train", lambda args: calls.append((args.seed, args.aux_weight)) or real(args))
    flags = [*SHORT, *"--seeds 2 --seed 3 --baseline --transfer_start 0 --out_dir".split(), str(tmp_path)]
    first = loop.series(loop.parse_args(flags))
    assert calls == [(3, 0.5), (3, 0.0), (4, 0.5), (4, 0.0)]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["test_accuracy"] for line in lines] == [
        first[weight][i]["test_accuracy"] for i in (0, 1) for weight in (0.5, 0.0)
    ]
    assert all(json.loads(line)["torch"] == torch.__version__ for line in lines)
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:2]) + "\n")
    calls.clear()
    again = loop.series(loop.parse_args([*flags, "--checkpoint_every", "7", "--resume"]))  # nothing to resume
    assert calls == [(4, 0.5), (4, 0.0)]
    scores = {w: [100 * row["test_accuracy"] for row in rows] for w, rows in again.items()}
    assert scores == {w: [100 * row["test_accuracy"] for row in rows] for w, rows in first.items()}
    for name, old, new in (("lr", "0.001", "0.01"), ("aux_weight", "0.5", "0.1")):  # a folder has one owner
        with pytest.raises(InputError, match=f"has {name} {old}, not {new}: use another --out_dir"):
            loop.series(loop.parse_args([*flags, f"--{name}", new]))
    assert len(calls) == 2


def series_rows(validation, test):
    """What series returns for one setting: a row a seed, with the accuracies given."""
    return [
        {"validation_accuracy": v, "test_accuracy": t, "args": {"out_dir": f"out/seed{i}"}}
        for i, (v, t) in enumerate(zip(validation, test))
    ]


@pytest.mark.parametrize(
    "validation, chosen",
    [
        ((0.7, 0.9, 0.8), "aux_weight 0.5; its best network on validation is out/seed1/"),
        ((0.6, 0.4, 0.7), "aux_weight 0 (the gain is not clearly above 0);"),
    ],
)
def test_a_series_reports_paired_intervals_and_chooses_by_validation_alone(capsys, validation, chosen):
    """The interval of three differences by hand, and a choice that test accuracies cannot move."""
    test = (0.9, 0.8, 0.85)
    without = series_rows((0.5, 0.6, 0.55), (0.6, 0.6, 0.6))
    loop.report_series({0.5: series_rows(validation, test), 0.0: without})
    printed = capsys.readouterr().out
    half = 4.303 * 5 / 3**0.5  # t(0.975, 2) times the standard deviation of 30, 20 and 25 by the root of n
    assert f"25.0 points, standard deviation 5.0, 95 % interval [{25 - half:.1f}, {25 + half:.1f}]" in printed
    assert f"validation favours {chosen}" in printed


def test_one_run_gets_no_interval_and_one_setting_no_advice(capsys):
    loop.report_series({0.5: series_rows((0.7,), (0.6,))})
    printed = capsys.readouterr().out
    assert "60.0 points\n" in printed and "nan" not in printed and "favours" not in printed
    assert "the best network on validation is out/seed0/pruned.pt" in printed


@pytest.mark.parametrize("validation, chosen", [(0.7, "0.5"), (0.5, "0"), (0.3, "0")])
def test_one_seed_with_and_without_transfer_is_decided_by_its_gain_on_validation(capsys, validation, chosen):
    loop.report_series({0.5: series_rows((validation,), (0.1,)), 0.0: series_rows((0.5,), (0.2,))})
    why = " (the gain is not clearly above 0)" if chosen == "0" else ""
    assert f"validation favours aux_weight {chosen}{why};" in capsys.readouterr().out


@pytest.mark.parametrize("structure", ["random", "bottom"])
def test_a_structure_by_rule_has_the_same_budget_and_trains_no_gates(tmp_path, structure):
    result = run(tmp_path, "--structure", structure, "--gate_lr", 0.001)  # which no gate feels
    assert 0.5 <= result["delivered_sparsity"] < 0.5 + 8 / 24
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert all(row["penalty"] == 0 and row["phase"] != "prune" for row in rows)
    if structure == "bottom":
        assert result["heads_kept"] == [[1, 1, 1, 1], [0, 0, 0, 0]] and result["ffn_kept"] == [1, 0]


def test_random_structures_differ_between_seeds_and_between_structure_seeds():
    flags = "--structure random --n_layer 4 --n_head 8 --sparsity 0.8 --seed {} --structure_seed {}"
    seeds = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))
    found = [loop.given_structure(loop.parse_args(flags.format(*pair).split())).head for pair in seeds]
    assert torch.equal(found[0], found[4])
    assert not any(torch.equal(a, b) for i, a in enumerate(found[:4]) for b in found[:i])


def test_a_structure_of_another_run_is_cut_in_one_step_and_must_fit(tmp_path):
    """The partner of random and bottom: dense training, then the structure that a run with gates found."""
    learned = run(tmp_path / "learned")
    path = tmp_path / "learned" / "result.json"
    result = run(tmp_path / "again", "--structure", path)
    assert result["heads_kept"] == learned["heads_kept"] and result["ffn_kept"] == learned["ffn_kept"]
    rows = [json.loads(line) for line in (tmp_path / "again" / "history.jsonl").read_text().splitlines()]
    assert all(row["phase"] != "prune" for row in rows)
    (tmp_path / "odd.json").write_text("[1, 2]")
    wide = {"heads_kept": [[1] * 8], "ffn_kept": [1, 0], "target_sparsity": 0.5}  # one layer, or two?
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    for flags, reason in (
        (["--structure", path, "--sparsity", 0.6], "has sparsity 0.5, not 0.6"),
        (["--structure", path, "--n_layer", 3], "has n_layer 2, not 3"),
        (["--structure", tmp_path / "none.json"], "is not learned, random, bottom, or the result.json"),
        (["--structure", tmp_path / "odd.json"], "is not learned, random, bottom, or the result.json"),
        (["--structure", tmp_path / "wide.json"], "is not learned, random, bottom, or the result.json"),
    ):
        with pytest.raises(InputError, match=reason):
            run(tmp_path / "refused", *flags)
    assert not (tmp_path / "refused").exists()


def test_units_that_were_closed_and_are_kept_are_counted_and_reported(tmp_path, monkeypatch, capsys):
    """A choice that keeps every unit opens all those again that the controller had closed."""
    monkeypatch.setattr(masks, "select", lambda prob, *rest: masks.Z(*(torch.ones_like(p) for p in prob)))
    result = run(tmp_path, "--gate_lr", 2)
    heads, ffn = result["prob_open"]["head"], result["prob_open"]["ffn"]
    closed = sum(p < 0.5 for p in itertools.chain(*heads, ffn))
    assert result["reopened"] == closed > 0
    loop.report(result)
    assert f"{closed} of the units kept had P(open) below 0.5" in capsys.readouterr().out


def test_the_accuracy_right_after_the_cut_is_that_of_a_network_that_does_not_learn_any_more(tmp_path):
    """With a vanishing learning rate it is the accuracy at the end; without a cut there is none."""
    result = run(tmp_path, "--n_target", 500, "--lr", 1e-9)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    end = {split: result[f"{split}_accuracy"] for split in ("validation", "test")}
    assert result["accuracy_after_cut"] == rows[-1]["accuracy_after_cut"] == pytest.approx(end, abs=5e-3)
    assert "accuracy_after_cut" not in run(tmp_path, "--sparsity", 0)


def test_the_cut_changes_nothing_if_the_structure_closes_only_closed_gates(tmp_path, monkeypatch):
    """With gates that are 0 or 1 as the structure is, accuracy before equals accuracy after."""

    def hard(self):
        return masks.select(self.prob_open(), 0.5, *loop.model.unit_sizes(16, 4))

    monkeypatch.setattr(masks.Gates, "deterministic", hard)
    result = run(tmp_path, "--n_target", 500, "--transfer_start", 0)
    assert result["accuracy_before_cut"] == result["accuracy_after_cut"]


# ---- a parent


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    flags = "--target reviews:film --aux none --sparsity 0 --n_target 0".split()
    run(folder, *flags)
    return folder / "pruned.pt"


def test_a_run_starts_from_its_parent_with_words_by_name(tmp_path, parent):
    """Before the first step every weight is the parent's, but for new words and the target's classifier; the
    auxiliary classifier answers the parent's question."""
    args = loop.parse_args([*SHORT, "--init", str(parent), "--out_dir", str(tmp_path)])
    old = loop.read_parent(args)
    data = loop.load(args, old)
    net = loop.start(args, data, old).net
    assert set(old.vocab) <= set(data.vocab) and "waiter" in set(data.vocab) - set(old.vocab)
    for word in ("film", "the", "hero") if "film" in old.word_id else ("the", "hero"):
        assert torch.equal(net.token.weight[net.word_id[word]], old.token.weight[old.word_id[word]])
    mine, theirs = net.state_dict(), old.state_dict()
    for name in mine:
        if not name.startswith(("token", "classifier")):
            assert torch.equal(mine[name], theirs[name])
    assert torch.equal(mine["classifier.auxiliary.weight"], theirs["classifier.target.weight"])
    assert not torch.equal(mine["classifier.target.weight"], theirs["classifier.target.weight"])
    args.aux_label_column = None
    net.labels["auxiliary"] = ["other", "labels"]
    fresh = loop.dense_network(args, data._replace(labels=net.labels))
    before = fresh.classifier["auxiliary"].weight.clone()
    loop.inherit(fresh, old)
    assert torch.equal(fresh.classifier["auxiliary"].weight, before)


def test_what_a_run_starts_from_is_not_overwritten_by_it(tmp_path, parent):
    for flags in (["--init", parent], ["--structure", parent.parent / "result.json", "--sparsity", 0]):
        with pytest.raises(InputError, match="lies in out_dir, which this run overwrites"):
            run(parent.parent, *flags)
    assert parent.exists()


def test_a_parent_that_does_not_fit_is_refused(tmp_path, parent):
    run(tmp_path / "pruned")
    (tmp_path / "odd.pt").write_text("odd")
    for flags, reason in (
        (["--init", tmp_path / "pruned" / "pruned.pt"], "has heads .*, not .*: a parent is dense"),
        (["--init", parent, "--d_model", 32], "has d_model 16, not 32"),
        (["--init", parent, "--max_length", 20], "has max_length 64, not 20"),
        (["--init", tmp_path / "none.pt"], "is not a network that train.py saved"),
        (["--init", tmp_path / "odd.pt"], "is not a network that train.py saved"),
    ):
        with pytest.raises(InputError, match=reason):
            run(tmp_path / "refused", *flags)
    assert not (tmp_path / "refused").exists()


def test_shuffled_auxiliary_labels_are_the_same_labels_in_another_order_for_every_seed():
    flags = ([], ["--aux_shuffle"], ["--aux_shuffle", "--seed", "1"])
    plain, *shuffled = (loop.load(loop.parse_args(f)).aux.label for f in flags)
    assert all(sorted(plain) == sorted(labels) for labels in shuffled)
    for one, other in itertools.combinations([plain, *shuffled], 2):
        assert 0.4 < (one == other).mean() < 0.6


def test_without_sparsity_nothing_is_pruned(tmp_path):
    result = run(tmp_path, "--sparsity", 0)
    assert result["delivered_sparsity"] == 0 and result["params_pruned"] == result["params_dense"]


@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_pruning_reaches_its_target_and_does_not_end_at_chance(tmp_path, sparsity):
    """A built-in run of a few hundred steps with all labels: within 0.02 of the target, feed-forward kept
    wherever one fits into the budget, and far from the accuracy 0.5 of guessing."""
    flags = (
        f"--sparsity {sparsity} --n_target 3000 --aux_weight 0 --steps 700 --prune_start 130 "
        f"--prune_ramp 200 --gate_lr 0.1 --finetune_steps 250 --out_dir {tmp_path}"
    ).split()
    result = loop.train(loop.parse_args(flags))
    assert abs(result["expected_sparsity"] - sparsity) < 0.02
    assert sparsity <= result["delivered_sparsity"] < sparsity + 8 / 48
    assert sum(result["ffn_kept"]) > 0 or sparsity > 1 - 8 / 48
    assert result["test_accuracy"] > 0.8


# ---- what a run says about its data and itself


def test_a_users_target_trains_alone_unless_an_auxiliary_task_is_named():
    named = lambda *flags: loop.parse_args(list(flags)).aux
    assert named() == named("--target", "reviews:restaurant") == "reviews:film"
    assert named("--target", "mine.csv") == named("--target", "reviews:film") == "none"
    assert named("--target", "mine.csv", "--aux", "other.csv") == "other.csv"
    assert loop.parse_args(["--target", "mine.csv", "--aux_weight", "0.3"]).aux_weight == 0  # as at work


def test_the_columns_and_splits_that_were_chosen_are_printed_and_recorded(tmp_path, capsys):
    """The auxiliary task has columns of other names, and they are named for it alone."""
    rows = [{"question": f"what is {i} of {i % 7}", "kind": i % 3} for i in range(150)]
    for split in ("Train", "dev", "test", "more"):
        write(tmp_path / "t", f"{split}.jsonl", rows if split == "Train" else rows[:40])
    write(
        tmp_path / "a",
        "train.jsonl",
        [{"said": f"so {i}", "by": "xy"[i % 2], "year": str(i)} for i in range(90)],
    )
    tasks = ["--target", tmp_path / "t", "--aux", tmp_path / "a", "--n_target", 0]
    columns = ["--aux_text_columns", "said", "--aux_label_column", "by"]
    result = run(tmp_path / "out", *tasks, *columns)
    printed, data = capsys.readouterr().out, result["data"]
    assert "text from question, label from kind" in printed and "text from said, label from by" in printed
    assert "validation: " + str(tmp_path / "t" / "dev.jsonl") in printed and "not used" in printed
    assert data["target"]["examples"] == {"train": 150, "validation": 40, "test": 40}
    assert (
        data["target"]["labels"] == {"0": 50, "1": 50, "2": 50} and data["auxiliary"]["label_column"] == "by"
    )
    assert set(data["unknown"]) == {"train", "test"} and data["cut"] == 0
    assert len(result["test_confusion"]) == len(result["label_order"]) == len(result["test_f1"]) == 3
    low, high = result["test_interval"]
    assert (
        low < result["test_accuracy"] < high and f"[{low:.3f}, {high:.3f}]" not in printed
    )  # report prints it
    loop.report(result)
    assert f"[{low:.3f}, {high:.3f}]" in capsys.readouterr().out and result["test_majority"] == 14 / 40
    with pytest.raises(InputError, match="--aux_text_columns"):
        run(tmp_path / "out", *tasks)


def test_wilson_interval_against_the_textbook():
    """The two roots of |share - p| = 1.96 sqrt(p (1 - p) / n), also where all answers are right."""
    for hits, n in ((8, 10), (10, 10), (0, 7), (950, 1000)):
        share = hits / n
        for p in loop.wilson(share, n):
            assert abs(share - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, abs=1e-9)


def test_a_folder_belongs_to_one_run(tmp_path, capsys):
    """What an earlier run left is removed before the first step, and said; a refused run removes nothing."""
    run(tmp_path)
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(InputError):
        run(tmp_path, "--lr", -1)
    assert (tmp_path / "result.json").read_text() == before and "overwritten" not in capsys.readouterr().out
    with pytest.raises(InputError, match="step"):
        run(tmp_path, "--lr", 1e8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl"]
    assert f"the earlier run in {tmp_path} is overwritten" in capsys.readouterr().out


def test_without_a_terminal_every_evaluation_is_a_line_at_once(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("builtins.print", lambda *a, flush=False, **k: lines.append((str(a[0]), flush)))
    run(tmp_path, "--steps", 200, "--finetune_steps", 90)
    assert [text[:10] for text, flush in lines if flush] == ["step   100", "step   200"]


def test_a_series_on_other_data_is_refused_and_reused_rows_are_announced(tmp_path, capsys):
    rows = [{"text": f"word{i % 9} of {i}", "label": "ab"[i % 2]} for i in range(80)]
    for split in ("train", "validation", "test"):
        write(tmp_path / "task", f"{split}.jsonl", rows)
    flags = [
        "--target",
        tmp_path / "task",
        "--n_target",
        0,
        "--seeds",
        2,
        "--steps",
        2,
        "--finetune_steps",
        1,
    ]
    flags = [*SHORT, *map(str, flags), "--sparsity", "0", "--out_dir", str(tmp_path / "out")]
    loop.series(loop.parse_args(flags))
    assert "is used again" not in capsys.readouterr().out
    loop.series(loop.parse_args([*flags, "--seeds", "3"]))
    assert capsys.readouterr().out.count("is used again") == 2
    rows[0]["text"] = "another text"
    write(tmp_path / "task", "train.jsonl", rows)
    with pytest.raises(InputError, match="has target data .*, not .*: use another --out_dir"):
        loop.series(loop.parse_args(flags))


def test_a_series_whose_parent_has_changed_is_refused(tmp_path, parent):
    """Rows of two parents do not belong under one interval."""
    path = tmp_path / "parent.pt"
    path.write_bytes(parent.read_bytes())
    flags = [*SHORT, "--init", str(path), "--transfer_start", "0", "--baseline"]
    flags += ["--out_dir", str(tmp_path / "out")]
    loop.series(loop.parse_args(flags))
    net = loop.model.GatedTransformer.load(path)
    torch.nn.init.ones_(net.norm.bias)
    net.save(path)
    with pytest.raises(InputError, match="has init file .*, not .*: use another --out_dir"):
        loop.series(loop.parse_args([*flags, "--seeds", "2"]))


# ---- real data


@pytest.mark.skipif(not DATA.exists(), reason="no real data on this machine")
@pytest.mark.parametrize(
    "target, aux", [("sst2", "sst5"), ("trec_coarse", "trec_fine"), ("sst5", "sst2"), ("acl_arc", "scicite")]
)
def test_real_pairs_run_to_the_end(tmp_path, target, aux):
    """The classes of the target's file, by name; a structure of the size asked for, within a sublayer; and
    the accuracy and macro-F1 that the network on disk has on the file itself, counted class by class."""
    result = run(
        tmp_path, "--target", DATA / target, "--aux", DATA / aux, "--steps", 50, "--finetune_steps", 10
    )
    assert 0.5 <= result["delivered_sparsity"] < 0.5 + 8 / 24
    rows = [json.loads(line) for line in (DATA / target / "test.jsonl").read_text().splitlines()]
    network = GatedTransformer.load(tmp_path / "pruned.pt")
    classes = sorted({row["label"] for row in rows})
    assert network.labels["target"] == classes
    pairs = list(zip(network.predict([row["text"] for row in rows]), (row["label"] for row in rows)))
    f1 = []
    for name in classes:
        right = sum(a == b == name for a, b in pairs)
        f1.append(2 * right / sum((a == name) + (b == name) for a, b in pairs))
    assert result["test_accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]), abs=2 / len(rows))
    assert result["test_macro_f1"] == pytest.approx(np.mean(f1), abs=0.02)  # a tie that rounding decides


# ---- bad input


BAD = [
    (["--sparsity", "0.99"], "sparsity must be below 0.968, which the gates can reach, not 0.99"),
    (["--sparsity", "-0.1"], "^sparsity must be at least 0 and at most .*, not -0.1"),
    (["--sparsity", "nan"], "^sparsity must be .*, not nan"),
    (["--d_model", "30"], "d_model 30 is not divisible by n_head 4"),
    (["--steps", "1500"], "pruning needs 1142 steps .* not 200"),
    (["--gate_lr", "0.001"], "gate_lr 0.001 pruning needs [0-9]+ steps"),
    (["--aux_weight", "-1"], "^aux_weight must be at least 0 .*, not -1"),
    (["--lr", "0"], "^lr must be at least 1e-09 .*, not 0"),
    (["--lr", "inf"], "^lr must be .*, not inf"),
    (["--gate_lr", "-0.1"], "^gate_lr must be .*, not -0.1"),
    (["--dropout", "1"], "^dropout must be at least 0 and at most 0.99, not 1"),
    (["--steps", "ten"], "argument --steps: invalid int value: 'ten'"),
    (["--coupling", "add"], "argument --coupling: invalid choice: 'add'"),
    (["--aux_wieght", "1"], "unrecognized arguments: --aux_wieght 1"),
    (["--n_target", "7000"], "n_target 7000: .* 6000"),
    (["--n_target", "1"], "n_target 1: of 6000 training examples take at least 2"),
    (["--target", "reviews:book"], "reviews:restaurant and reviews:film, not reviews:book"),
    (["--target", "./none"], "no such file or folder: './none'"),
    (["--device", "tpu"], "^device tpu is not available"),
    (["--device", "meta"], "^device meta is not available"),
    (["--device", "cuda:99"], "^device cuda:99 is not available"),
    (["--aux_weight", "0", "--baseline"], "this is one"),
    (["--n_layer", "1", "--n_head", "1", "--sparsity", "0.7"], "single head"),
    (["--sparsity", "0", "--steps", "20"], "^finetune_steps must be at least 1 and at most 20, not 800"),
    (["--batch_size", "0"], "^batch_size must be at least 1 "),
    (["--prune_ramp", "0"], "^prune_ramp must be at least 1 "),
    (["--vocab_size", "1"], "^vocab_size must be at least 4 "),
    (["--transfer_stop", "-1"], "^transfer_stop must be at least 0 "),
    (["--target_start", "3001"], "target_start must be at least 0 and at most 3000"),
]


@pytest.mark.parametrize("flags, reason", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_flags_are_refused_with_the_reason_and_nothing_is_written(tmp_path, flags, reason):
    with pytest.raises(InputError, match=reason) as refused:
        loop.train(loop.parse_args([*flags, "--out_dir", str(tmp_path / "out")]))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_bad_input_ends_the_command_with_one_line_and_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "broken", "train.jsonl", [{"text": "a", "label": "x"}])
    (tmp_path / "broken" / "train.jsonl").open("a").write("{oops\n")
    (tmp_path / "file").write_text("")
    for flags, reason in (
        (["--sparsity", "2"], "sparsity must be below 0.9"),
        (["--target", tmp_path / "broken"], "line 2"),
        (["--wrong", "1"], "unrecognized arguments: --wrong 1"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--out_dir", tmp_path / "file" / "out"], "file/out"),
        (["--d_model", "100000000"], "memory"),
    ):
        code, error = run_main(*flags)
        assert code == 2 and error.count("\n") == 1 and error.startswith("error: ") and reason in error
    done = command(*flags, cwd=tmp_path)  # the last one as a user meets it
    assert done.returncode == 2 and done.stderr == error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "file"]
