"""Claims about whole runs: the loop, the command line, and what a run leaves behind (train.py)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import masks
import train as loop
from masks import Gates
from model import Config, Examples, GatedTransformer, evaluate, prunable
from test_transfer import write
from transfer import InputError, batch_order, couple, prepare

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


def weights(folder):
    return torch.load(Path(folder) / "pruned.pt", weights_only=True)["state"]


def setting(*flags):
    """Everything that one step needs, as train() builds it: (model, gates, data, args), small."""
    args = loop.parse_args([*SHORT, "--batch_size", "8", *flags])
    data = prepare(args.target, args.aux, 50, args.max_length, args.vocab_size, seed=args.seed)
    torch.manual_seed(0)
    model = GatedTransformer(Config(len(data.vocab), 64, 16, 4, [4, 4], [1, 1]), data.vocab, data.labels)
    return model, Gates(2, 4), data, args


def gradients(aux, *flags):
    """name -> gradient of every parameter after one backward pass, with or without the auxiliary loss."""
    model, gates, data, args = setting(*flags)
    order = batch_order(data.train, 8, 0)
    loss_target = loop.task_loss(model, gates, "target", data.train, order, 0, args)
    loss_aux = loop.task_loss(model, gates, "auxiliary", data.aux, order, 0, args) if aux else None
    loop.backward(model, gates, True, loss_target, 0 * gates.lambdas.sum(), loss_aux, args)
    return {n: p.grad for m in (model, gates) for n, p in m.named_parameters()}


# ---- transfer inside a run


def test_before_transfer_start_the_run_is_bit_for_bit_the_run_without_transfer(tmp_path):
    """Parameters, not losses: equal when transfer would start after the last step, different when it starts
    just before."""
    run(tmp_path / "off", "--aux_weight", 0)
    run(tmp_path / "late", "--aux_weight", 0.5, "--transfer_start", 60)
    run(tmp_path / "last", "--aux_weight", 0.5, "--transfer_start", 59)
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


def test_what_is_transferred_decides_which_gradients_change():
    """gates: no weight hears the auxiliary task. weights: no gate does. both: all do. Its classifier always
    learns."""
    alone = gradients(False)
    for what, weights_change, gates_change in (
        ("gates", False, True),
        ("weights", True, False),
        ("both", True, True),
    ):
        helped = gradients(True, "--transfer", what)
        assert (
            alone["classifier.auxiliary.weight"] is None
            and helped["classifier.auxiliary.weight"].abs().sum() > 0
        )
        assert torch.equal(alone["classifier.target.weight"], helped["classifier.target.weight"])
        assert torch.equal(alone["log_alpha"], helped["log_alpha"]) != gates_change
        for name in alone:
            if name.startswith("blocks") and name.endswith("weight"):
                assert torch.equal(alone[name], helped[name]) != weights_change


def test_a_run_that_transfers_to_the_gates_alone_projects_without_gates_too(tmp_path):
    """In the dense and in the fine-tuning phase nothing is shared; the run ends all the same."""
    result = run(tmp_path, "--transfer", "gates", "--coupling", "project", "--transfer_start", 0)
    assert result["delivered_sparsity"] >= 0.5


def test_the_update_is_the_coupling_of_the_two_separate_gradients():
    """Against autograd on each loss alone."""
    model, gates, data, args = setting("--coupling", "project")
    order = batch_order(data.train, 8, 0)
    shared = [p for n, p in model.named_parameters() if not n.startswith("classifier")] + [gates.log_alpha]
    losses = [
        loop.task_loss(model, gates, task, examples, order, 3, args)
        for task, examples in (("target", data.train), ("auxiliary", data.aux))
    ]
    g_target, g_aux = (
        torch.autograd.grad(loss, shared, materialize_grads=True, retain_graph=True) for loss in losses
    )
    loop.backward(model, gates, True, losses[0], 0 * gates.lambdas.sum(), losses[1], args)
    for p, g in zip(shared, couple(g_target, g_aux, "project")):
        torch.testing.assert_close(p.grad, g)


def test_sequential_transfer_is_two_windows_that_do_not_overlap(tmp_path):
    """Until target_start the target's classifier keeps its initial values; one step later it does not."""
    model, *_ = setting()
    initial = model.classifier["target"].weight
    flags = "--sparsity 0 --n_target 50 --finetune_steps 5 --transfer_stop 10 --target_start 10".split()
    run(tmp_path / "before", *flags, "--transfer_start", 0, "--steps", 10)
    run(tmp_path / "after", *flags, "--transfer_start", 0, "--steps", 11)
    assert torch.equal(weights(tmp_path / "before")["classifier.target.weight"], initial)
    assert not torch.equal(weights(tmp_path / "after")["classifier.target.weight"], initial)


# ---- optimizer, schedule, evaluation


def test_only_weight_matrices_are_decayed_and_the_multipliers_go_uphill():
    model, gates, _, args = setting()
    groups = loop.make_optimizer(model, gates, args).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() >= 2}
    assert [g["maximize"] for g in groups if g["params"][0] is gates.lambdas] == [True]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters())) + 2


def test_learning_rate_warms_up_stays_and_ends_near_zero():
    lr = [masks.lr_at(step, 0.5, 2200, 3000) for step in range(3000)]
    assert lr[0] == 0.5 / masks.WARMUP and lr[masks.WARMUP] == lr[2200] == 0.5
    assert 0 < lr[-1] < 0.001 and all(a <= b for a, b in zip(lr[:100], lr[1:100]))


def test_macro_f1_and_accuracy_by_hand():
    """Confusion counts written out; a class that is only predicted, or only present, counts with F1 0."""

    class Fixed(torch.nn.Module):
        def forward(self, ids, task, z):
            return torch.nn.functional.one_hot(ids[:, 0], 4).float()

    predicted, label = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 3])
    scores = evaluate(Fixed(), Examples(predicted, np.arange(7), label), None, "cpu")
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["macro_f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (2 + 2) + 0 + 0) / 4)


# ---- what a run leaves behind


def test_the_first_command_shortened_runs_and_leaves_what_it_promises(tmp_path):
    """Through the real command line, in a folder of its own; the numbers in result.json agree with the
    network on disk."""
    done = command(*SHORT, "--aux_weight", 0.5, "--transfer_start", 30, cwd=tmp_path)
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
    assert result["delivered_sparsity"] == pytest.approx(1 - prunable(small) / (2 * 12 * 16 * 16))
    assert [sum(heads) for heads in result["heads_kept"]] == small.config.heads
    assert result["ffn_kept"] == small.config.ffn
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    terms = (
        "step phase loss_target loss_aux lagrangian lambda1 lambda2 expected_sparsity wanted_sparsity "
        "validation_accuracy"
    )
    for row in rows:
        assert set(terms.split()) <= row.keys()
        assert all(np.isfinite(v) for v in row.values() if not isinstance(v, str))
    data = prepare("reviews:restaurant", "reviews:film", 200, 64, 10000)
    texts = [text for text, _ in __import__("transfer").reviews("restaurant")["test"]]
    names = [data.labels["target"][i] for i in data.test.label]
    right = [a == b for a, b in zip(small.predict(texts), names)]
    assert np.mean(right) == pytest.approx(
        result["test_accuracy"], abs=1e-6
    )  # the file on disk has this accuracy


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
    data = prepare("reviews:restaurant", "reviews:film", 500, 64, 10000)
    small = GatedTransformer.load(tmp_path / "pruned.pt")
    assert evaluate(small, data.validation, None, "cpu")["accuracy"] == result["validation_accuracy"]


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
    again = loop.series(loop.parse_args([*flags, "--checkpoint_every", "7"]))
    assert calls == [(4, 0.5), (4, 0.0)]
    scores = {w: [100 * row["test_accuracy"] for row in rows] for w, rows in again.items()}
    assert scores == {w: [100 * row["test_accuracy"] for row in rows] for w, rows in first.items()}
    for other in (["--lr", "0.01"], ["--aux_weight", "0.1"]):  # the folders of the networks have one owner
        with pytest.raises(InputError, match="other flags: use another --out_dir"):
            loop.series(loop.parse_args([*flags, *other]))
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
        ((0.6, 0.4, 0.7), "aux_weight 0;"),
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
    assert f"validation speaks for {chosen}" in printed


def test_one_run_gets_no_interval_and_one_setting_no_advice(capsys):
    loop.report_series({0.5: series_rows((0.7,), (0.6,))})
    printed = capsys.readouterr().out
    assert "60.0 points\n" in printed and "nan" not in printed and "speaks" not in printed
    assert "the best network on validation is out/seed0/pruned.pt" in printed


def test_a_random_structure_has_the_same_budget_and_trains_no_gates(tmp_path):
    result = run(tmp_path, "--structure", "random")
    assert 0.5 <= result["delivered_sparsity"] < 0.5 + 8 / 24 and result["expected_sparsity"] == 0
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert all(row["lagrangian"] == 0 and row["phase"] != "prune" for row in rows)
    other = run(tmp_path, "--structure", "random", "--seed", 5, "--gate_lr", 0.001)  # which no gate feels
    assert other["heads_kept"] != result["heads_kept"]


def test_shuffled_auxiliary_labels_are_the_same_labels_in_another_order():
    plain, shuffled = (loop.load(loop.parse_args(flags)).aux.label for flags in ([], ["--aux_shuffle"]))
    assert sorted(plain) == sorted(shuffled) and 0.4 < (plain == shuffled).mean() < 0.6


def test_without_sparsity_nothing_is_pruned(tmp_path):
    result = run(tmp_path, "--sparsity", 0)
    assert result["delivered_sparsity"] == 0 and result["params_pruned"] == result["params_dense"]


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_pruning_reaches_its_target_and_does_not_end_at_chance(tmp_path, sparsity):
    """A built-in run of a few hundred steps with all labels: within 0.02 of the target, feed-forward kept
    wherever one fits into the budget, and far from the accuracy 0.5 of guessing."""
    flags = (
        f"--sparsity {sparsity} --n_target 3000 --aux_weight 0 --steps 1000 --prune_start 200 "
        f"--prune_ramp 300 --finetune_steps 350 --out_dir {tmp_path}"
    ).split()
    result = loop.train(loop.parse_args(flags))
    assert abs(result["expected_sparsity"] - sparsity) < 0.02
    assert sparsity <= result["delivered_sparsity"] < sparsity + 8 / 48
    assert sum(result["ffn_kept"]) > 0 or sparsity > 1 - 8 / 48
    assert result["test_accuracy"] > 0.8


# ---- real data


@pytest.mark.skipif(not DATA.exists(), reason="no real data on this machine")
@pytest.mark.parametrize(
    "target, aux", [("sst2", "sst5"), ("trec_coarse", "trec_fine"), ("sst5", "sst2"), ("acl_arc", "scicite")]
)
def test_real_pairs_run_to_the_end(tmp_path, target, aux):
    result = run(
        tmp_path, "--target", DATA / target, "--aux", DATA / aux, "--steps", 50, "--finetune_steps", 10
    )
    assert (
        result["delivered_sparsity"] >= 0.5 and 0 < result["test_macro_f1"] <= result["test_accuracy"] + 0.5
    )


# ---- bad input


BAD = [
    (["--sparsity", "0.99"], "sparsity must be below 0.9"),
    (["--sparsity", "-0.1"], "sparsity"),
    (["--sparsity", "nan"], "sparsity"),
    (["--d_model", "30"], "d_model 30 is not divisible by n_head 4"),
    (["--steps", "1500"], "more than all steps"),
    (["--gate_lr", "0.001"], "pruning needs"),
    (["--aux_weight", "-1"], "aux_weight"),
    (["--lr", "0"], "lr"),
    (["--lr", "inf"], "lr"),
    (["--gate_lr", "-0.1"], "gate_lr"),
    (["--dropout", "1"], "dropout"),
    (["--steps", "ten"], "steps"),
    (["--coupling", "add"], "coupling"),
    (["--aux_wieght", "1"], "aux_wieght"),
    (["--n_target", "7000"], "n_target 7000: .* 6000"),
    (["--n_target", "1"], "one class"),
    (["--target", "reviews:book"], "reviews:restaurant"),
    (["--target", "./none"], "no such file"),
    (["--device", "tpu"], "device"),
    (["--device", "meta"], "device"),
    (["--device", "cuda:99"], "device"),
    (["--aux_weight", "0", "--baseline"], "this is one"),
    (["--n_layer", "1", "--n_head", "1", "--sparsity", "0.7"], "single head"),
    (["--sparsity", "0", "--steps", "20"], "finetune_steps"),
    (["--batch_size", "0"], "batch_size"),
    (["--prune_ramp", "0"], "prune_ramp"),
    (["--vocab_size", "1"], "vocab_size"),
    (["--transfer_stop", "-1"], "transfer_stop"),
    (["--target_start", "3001"], "target_start must be at least 0 and at most 3000"),
]


@pytest.mark.parametrize("flags, reason", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_flags_are_refused_with_the_reason_and_nothing_is_written(tmp_path, flags, reason):
    with pytest.raises(InputError, match=reason) as refused:
        loop.train(loop.parse_args([*flags, "--out_dir", str(tmp_path / "out")]))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_bad_input_ends_the_command_with_one_line_and_exit_code_2(tmp_path):
    write(tmp_path / "broken", "train.jsonl", [{"text": "a", "label": "x"}])
    (tmp_path / "broken" / "train.jsonl").open("a").write("{oops\n")
    (tmp_path / "file").write_text("")
    for flags, reason in (
        (["--sparsity", "2"], "sparsity"),
        (["--target", tmp_path / "broken"], "line 2"),
        (["--wrong", "1"], "--wrong"),
        (["--steps"], "steps"),
        (["--out_dir", tmp_path / "file" / "out"], "file/out"),
        (["--d_model", "100000000"], "memory"),
    ):
        done = command(*flags, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and reason in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "file"]
