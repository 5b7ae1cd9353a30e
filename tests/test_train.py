"""Claims about the loop: what a step does, the phases, the cut, and what a run starts from (train.py)."""

import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import masks
import model
import train as loop
import transfer
from test_model import write_bert
from test_transfer import save
from transfer import InputError

ROOT = Path(__file__).parent.parent
SCHEDULE = "--steps 60 --prune_start 10 --prune_ramp 20 --finetune_steps 20 --gate_lr 1".split()
SCHEDULE += "--batch_size 4 --sparsity 0.5 --transfer_start 1000 --device cpu".split()
SMALL = [*SCHEDULE, *"--n_layer 2 --n_head 2 --d_model 8".split()]
SIZES = 128, 512  # parameters of a head and of a feed-forward sublayer of it
LETTERS = "abcdefghijklmnopqrstuvwxyz,.'-"
PIECES = [*LETTERS, *("##" + letter for letter in LETTERS), "the", "was", "##ing"]  # of a BERT


every_review = functools.cache(transfer.reviews)


def few_reviews(domain):
    """The built-in task with fewer sentences: loading it is most of the time of a small run."""
    sizes = {"train": 400, "validation": 100, "test": 50}
    return {split: pairs[: sizes[split]] for split, pairs in every_review(domain).items()}


@pytest.fixture(scope="module", autouse=True)
def small_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "reviews", few_reviews)
        yield


def arguments(folder, *flags, base=SMALL):
    return loop.parse_args([*base, "--out_dir", str(folder), *map(str, flags)])


def run(folder, *flags, every=100, base=SMALL):
    """A short run through the importable loop, evaluated after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "EVAL_EVERY", every)
        return loop.train(arguments(folder, *flags, base=base))


def history(folder):
    return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


def weights(folder):
    return torch.load(Path(folder) / "pruned.pt", weights_only=True)["state"]


def prunable(net):
    """Number of weights in the matrices of the blocks."""
    return sum(p.numel() for p in net.blocks.parameters() if p.dim() == 2)


def equal(a, b):
    """Whether two dicts of tensors are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- a run that is watched

STEPS, PRUNE, RAMP, TUNE, START, STOP = 130, 10, 20, 110, 50, 120


def watch(folder, *flags, every=1):
    """A run and what was seen: every forward pass, what the optimizers had before every step, and what the
    structure was chosen from. Times are replaced by numbers of parameters."""
    seen = SimpleNamespace(calls=[], weights=[], gates=[], chosen=[], folder=folder)
    forward, select = model.GatedTransformer.forward, masks.select

    def watched_forward(net, ids, task, z=None, dropout_masks=None):
        logits = forward(net, ids, task, z, dropout_masks)
        call = SimpleNamespace(ids=ids, task=task, z=z, drop=dropout_masks, training=logits.requires_grad)
        seen.calls.append(call)
        if z is not None and not logits.requires_grad:
            small = model.extract(net, z)
            call.size = prunable(small)
            call.apart = (forward(small, ids, task) - logits).abs().max().item()
        return logits

    def watched_step(optimizer, *_):
        groups = [SimpleNamespace(**group) for group in optimizer.param_groups]
        for group in groups:
            group.values = [p.detach().clone() for p in group.params]
            group.moved = group.params[0].grad is not None
        (seen.weights if isinstance(optimizer, torch.optim.AdamW) else seen.gates).append(groups)

    hook = register_optimizer_step_pre_hook(watched_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.GatedTransformer, "forward", watched_forward)
        patch.setattr(masks, "select", lambda prob, *args: seen.chosen.append(prob) or select(prob, *args))
        seen.result = run(folder, *flags, every=every)
    hook.remove()
    seen.training = [call for call in seen.calls if call.training]
    return seen


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """All three phases, windows whose ends all differ, and a learning rate of the gates that is high."""
    flags = f"--steps {STEPS} --prune_start {PRUNE} --prune_ramp {RAMP} --finetune_steps {STEPS - TUNE} "
    flags += f"--gate_lr 3 --weight_decay 0.03 --transfer_start {START} --transfer_stop {STOP}"
    return watch(tmp_path_factory.mktemp("watched"), *flags.split())


# ---- transfer


def test_before_transfer_start_the_run_is_bit_for_bit_the_run_without_transfer(tmp_path):
    """Parameters, not losses: equal when transfer would start after the last step or stop before it starts,
    and different when it has one step."""
    flags = {"off": ["--aux_weight", 0], "late": ["--transfer_start", 60], "last": ["--transfer_start", 59],
             "empty": ["--transfer_start", 5, "--transfer_stop", 5]}  # fmt: skip
    for name in flags:
        run(tmp_path / name, *flags[name])
    off, late, last, empty = (weights(tmp_path / name) for name in flags)
    assert equal(off, late) and equal(off, empty)
    shared = [name for name in off if not name.startswith("classifier")]
    assert not equal({name: off[name] for name in shared}, {name: last[name] for name in shared})


def test_what_is_transferred_decides_what_the_auxiliary_gradient_reaches(tmp_path, monkeypatch):
    """gates: no weight hears the auxiliary task. weights: no gate does. both: all do. Its own classifier
    always learns, the target's never; and gates hear it only while they are active."""
    own, couple, reached = {"classifier.auxiliary.weight", "classifier.auxiliary.bias"}, transfer.couple, {}
    for what in ("gates", "weights", "both"):
        steps = reached[what] = []
        seen = lambda g, aux, how: steps.append(set(aux)) or couple(g, aux, how)  # noqa: E731
        monkeypatch.setattr(transfer, "couple", seen)
        run(tmp_path, "--transfer_start", 5, "--transfer", what, "--coupling", "project")
        assert len(steps) == 60 and not any(steps[:5]) and all(names >= own for names in steps[5:])
        assert not any("classifier.target.weight" in names for names in steps)
    assert reached["gates"][5] == own and reached["gates"][15] == own | {"log_alpha"}
    assert reached["weights"][15] == reached["both"][15] - {"log_alpha"}
    assert {"token.weight", "norm.bias", "blocks.1.qkv.weight"} <= reached["weights"][15]
    assert "log_alpha" not in reached["both"][5] | reached["both"][45]


@pytest.mark.parametrize("coupling", ["sum", "project"])
def test_the_gradient_of_a_step_is_the_coupled_one_plus_the_controllers(tmp_path, monkeypatch, coupling):
    """Each loss alone, by autograd, against what the optimizers are given in the first step: that of the
    weights is clipped to norm 1, and neither clipped nor lengthened by that of the gates."""
    found, real = {}, loop.task_loss

    def look(net, gates, task, step, args):
        if step:
            raise KeyboardInterrupt
        loss = 30 * real(net, gates, task, step, args)
        found["all"] = {**dict(net.named_parameters()), "log_alpha": gates.log_alpha}
        parts = torch.autograd.grad(loss, [*found["all"].values()], retain_graph=True, materialize_grads=True)
        found[task.name] = dict(zip(found["all"], parts))
        penalty = masks.Controller(1.0).penalty(masks.sparsity(gates.prob_open(), *SIZES))
        (found["push"],) = torch.autograd.grad(penalty, gates.log_alpha)
        return loss

    monkeypatch.setattr(loop, "task_loss", look)
    flags = f"--prune_start 0 --transfer_start 0 --aux_weight 0.3 --seed 1 --coupling {coupling}"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *flags.split(), every=1)
    target, aux = found["target"], {name: 0.3 * g for name, g in found["auxiliary"].items()}
    shared = [name for name in target if not name.startswith("classifier")]  # what both tasks touch
    dot, square = (sum((target[n] * other[n]).sum() for n in shared) for other in (aux, target))
    assert dot < 0
    against = {name: dot / square if coupling == "project" and name in shared else 0 for name in target}
    update = {name: (1 - against[name]) * target[name] + aux[name] for name in target}
    norm = sum(g.square().sum() for name, g in update.items() if name != "log_alpha").sqrt()
    for name, p in found["all"].items():
        expected = update[name] + found["push"] if name == "log_alpha" else update[name] / norm
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)
    assert history(tmp_path)[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5) and norm > 2


def test_the_loss_is_the_smoothed_cross_entropy_of_the_batch_of_the_step(tmp_path):
    """By hand, text by text, without padding and neighbours."""
    args = arguments(tmp_path, "--dropout", 0, "--label_smoothing", 0.2, "--seed", 3)
    data = transfer.prepare(args)
    args.n_layer, args.n_head, args.d_model = 2, 2, 8
    net = loop.dense_network(args, data)
    seeds = {"target": 6 * 10**7, "auxiliary": 7 * 10**7}  # of the order: two for each seed of a run
    for (name, seed), step in itertools.product(seeds.items(), (0, 7)):
        examples = data.splits["train" if name == "target" else "aux"]
        task, losses = loop.Task(name, examples, args), []
        for i in transfer.batch_order(examples, 4, seed)(step):
            log_p = net(torch.from_numpy(examples.ids[i]).long()[None], name)[0].log_softmax(0)
            losses.append(-0.8 * log_p[examples.label[i]] - 0.2 * log_p.mean())
        torch.testing.assert_close(loop.task_loss(net, None, task, step, args), torch.stack(losses).mean())


# ---- noise, subsets, batches


def test_noise_subset_order_and_initial_weights_follow_the_seed(tmp_path):
    """Seeds of the noise of all tasks and of 200 runs are apart by the most steps of a run, and have 32
    bits, which is what torch reads. Three steps of four seeds: no two draws of dropout are equal, whatever
    the task, step and seed; nor two first texts of the subsets of twenty, nor two initial matrices of
    positions."""
    first = sorted(loop.noise_seed(seed, task, 0) for seed in range(200) for task in ("target", "auxiliary"))
    assert min(b - a for a, b in itertools.pairwise(first)) >= 10**7 and max(first) + 10**7 <= 2**32
    flags = "--steps 3 --finetune_steps 1 --sparsity 0 --transfer_start 0 --n_target 20 --dropout 0.2"
    seen = [watch(tmp_path, *flags.split(), "--batch_size", 20, "--seed", i, every=100) for i in range(4)]
    assert [call.task for one in seen for call in one.training] == ["target", "auxiliary"] * 12
    draws = [tuple(call.drop[-1].flatten().tolist()) for one in seen for call in one.training]
    assert len(set(draws)) == 24 and {max(draw) for draw in draws} == {1.25}  # of what is kept
    subsets = set()
    for seed in range(4):
        data = transfer.prepare(arguments(tmp_path, "--n_target", 20, "--seed", seed))
        subsets.add(" ".join(data.vocab[token] for ids in data.splits["train"].ids for token in ids))
    assert len(subsets) == 4
    assert len({tuple(one.weights[0][0].values[1].flatten().tolist()) for one in seen}) == 4


# ---- optimizer, schedules, phases


def test_only_weight_matrices_are_decayed(watched, tmp_path):
    """Of the small network and of a BERT, before and after the cut; never the gates. No parameter is left
    out."""
    small = model.GatedTransformer.load(watched.folder / "pruned.pt")
    for net in model.load_bert(write_bert(tmp_path)), small:
        groups = loop.weight_optimizer(net, 0.3).param_groups
        found = {group["weight_decay"]: {*map(id, group["params"])} for group in groups}
        assert found[0.3] == {id(p) for p in net.parameters() if p.dim() >= 2}
        assert found[0.0] == {id(p) for p in net.parameters() if p.dim() < 2}
    assert {group.weight_decay for groups in watched.gates for group in groups} == {0}
    assert {tuple(group.weight_decay for group in groups) for groups in watched.weights} == {(0.03, 0)}


def test_learning_rates_of_weights_follow_the_schedule_and_those_of_gates_stay(watched):
    for step in range(STEPS):
        expected = 1e-3 * min((step + 1) / 100, 1, (STEPS - step) / (STEPS - TUNE))
        assert [group.lr for group in watched.weights[step]] == pytest.approx([expected] * 2)
        assert [group.lr for group in watched.gates[step]] == [3.0]
    assert {group.betas for groups in watched.gates for group in groups} == {(0.5, 0.9)}
    assert {group.betas for groups in watched.weights for group in groups} == {(0.9, 0.98)}


def test_phases_begin_and_end_where_the_flags_say(watched):
    """Row s + 1 tells about step s. Gates are sampled, and move, in the pruning phase alone; the small
    network is trained in the last one."""
    expected = ["dense"] * PRUNE + ["prune"] * (TUNE - PRUNE) + ["finetune"] * (STEPS - TUNE)
    rows = history(watched.folder)
    assert [(row["step"], row["phase"]) for row in rows] == [*enumerate(expected, 1)]
    pruning = [phase == "prune" for phase in expected]
    assert [call.z is not None for call in watched.training if call.task == "target"] == pruning
    assert len({str(call.z) for call in watched.training if call.z is not None}) > 60  # often all are 0 or 1
    assert [group.moved for (group,) in watched.gates] == pruning
    sizes = [sum(p.numel() for group in groups for p in group.values) for groups in watched.weights]
    dense, small = watched.result["params_dense"], watched.result["params_pruned"]
    assert sizes == [dense] * TUNE + [small] * (STEPS - TUNE) and small < dense
    for one, other in itertools.pairwise(watched.weights[TUNE:]):
        assert not torch.equal(one[0].values[0], other[0].values[0])


def test_the_auxiliary_task_is_there_exactly_in_its_window(watched):
    rows, window = history(watched.folder), [START <= step < STOP for step in range(STEPS)]
    assert [row["aux_weight"] for row in rows] == [0.5 * inside for inside in window]
    assert [row["loss_aux"] > 0 for row in rows] == window
    order = [task for inside in window for task in ("target", "auxiliary")[: 1 + inside]]
    assert [call.task for call in watched.training] == order


# ---- gates and their controller


def test_a_row_holds_what_the_controller_used_in_its_step(watched):
    """The schedule; the expected sparsity of the gates before they moved; the penalty of this gap; and the
    multiplier, which ascends from row to row. Tolerances are float32's, times PENALTY or DUAL_LR and the
    rate 3. Gates reach their limit at this rate, and stay within it."""
    rows = history(watched.folder)
    assert max(group.values[0].abs().max().item() for (group,) in watched.gates) == pytest.approx(masks.LIMIT)
    assert all(row["penalty"] == row["lambda1"] == row["target_sparsity"] == 0 for row in rows[:PRUNE])
    lambda1 = 0.0
    for step in range(PRUNE, TUNE):
        row, ((log_alpha,),) = rows[step], [group.values for group in watched.gates[step]]
        p = torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1))
        open_ = 128 * (p[:, :2] * p[:, 2:3]).sum() + 512 * p[:, 3].sum()
        assert row["expected_sparsity"] == pytest.approx(1 - open_.item() / 1536, abs=1e-6)
        assert row["target_sparsity"] == pytest.approx(0.5 * min(1, (step - PRUNE) / RAMP))
        assert row["lambda1"] == pytest.approx(lambda1, abs=1e-4)
        gap = row["expected_sparsity"] - row["target_sparsity"]
        assert row["penalty"] == pytest.approx(row["lambda1"] * gap + 200 * gap**2, abs=1e-4)
        lambda1 = row["lambda1"] + 60 * 3 * min(max(gap, -0.02), 0.02)
    for row in rows[TUNE:]:
        found = [row[key] for key in ("penalty", "target_sparsity", "lambda1")]
        assert found == pytest.approx([0, 0.5, lambda1], abs=1e-4)
        assert row["expected_sparsity"] == row["deterministic_sparsity"]


def test_the_structure_is_chosen_by_the_probability_that_a_unit_is_open_after_the_last_move(watched):
    (prob,), result = watched.chosen, watched.result
    log_alpha = watched.gates[-1][0].values[0]  # gates have not moved since the cut
    p = torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1))
    torch.testing.assert_close(prob, masks.Units(p[:, :2] * p[:, 2:3], p[:, 3]))
    chosen = masks.select(prob, 0.5, *SIZES)
    assert [part.tolist() for part in chosen] == [result["heads_kept"], result["ffn_kept"]]
    assert result["prob_open"]["head"] == pytest.approx(prob.head.detach().numpy(), abs=1e-4)


def test_during_pruning_the_network_that_is_evaluated_is_the_extracted_one(watched):
    """Evaluation multiplies by the deterministic gates: the network extracted by them has the same logits
    (1e-5 is rounding). No other phase has gates."""
    evaluated = [call for call in watched.calls if not call.training and call.z is not None]
    evaluated = evaluated[: TUNE - PRUNE]  # two more come right before the cut
    assert len(evaluated) == TUNE - PRUNE
    assert max(call.apart for call in evaluated) < 1e-5 and any((call.z.head < 1).any() for call in evaluated)
    for step, (call, row) in enumerate(zip(evaluated, history(watched.folder)[PRUNE:]), PRUNE):
        gate = masks.deterministic_z(watched.gates[step + 1][0].values[0])
        torch.testing.assert_close(call.z, masks.Units(gate[:, :2] * gate[:, 2:3], gate[:, 3]))
        assert row["deterministic_sparsity"] == pytest.approx(1 - call.size / 1536)


def test_hard_gates_have_the_same_accuracy_before_and_after_the_cut(tmp_path, monkeypatch):
    hard = lambda gates: masks.select(gates.prob_open(), 0.5, *SIZES)
    monkeypatch.setattr(masks.Gates, "deterministic", hard)
    result = run(tmp_path, "--lr", 0.01)
    assert result["accuracy_before_cut"] == result["accuracy_after_cut"]


def test_pruning_reaches_its_target_and_classes_come_out_with_their_own_names(tmp_path):
    """Labels that first appear as b, c, a, and a word for each: within 0.02 of the target, and all answers
    right. The auxiliary task has other columns."""
    rows = [{"text": f"{word} {i}", "label": word[0]} for i in range(50) for word in ("bee", "cat", "ant")]
    for split in ("train", "validation", "test"):
        save(tmp_path / "task" / f"{split}.jsonl", rows)
    said = [{"said": f"a {row['text']}", "by": row["label"] * 2} for row in rows]
    save(tmp_path / "aux" / "train.jsonl", said)
    flags = "--steps 300 --prune_ramp 100 --finetune_steps 100 --gate_lr 0.2 --lr 0.01 --n_layer 4"
    flags += " --sparsity 0.7 --transfer_start 0 --n_target 0 --aux_text_columns said --aux_label_column by"
    result = run(tmp_path / "out", *flags.split(), "--target", tmp_path / "task", "--aux", tmp_path / "aux")
    assert result["expected_sparsity"] == pytest.approx(0.7, abs=0.02)
    assert result["test_accuracy"] == 1 and 0.7 <= result["delivered_sparsity"] < 0.7 + 8 / 48
    network = model.GatedTransformer.load(tmp_path / "out" / "pruned.pt")
    assert network.labels["auxiliary"] == ["aa", "bb", "cc"]
    assert network.predict(["bee", "cat", "ant", "cat 3"]) == ["b", "c", "a", "c"]


# ---- evaluation


@pytest.mark.parametrize("C, longest", [(5, 40), (300, 7)])
def test_scores_by_brute_force(C, longest):
    """Texts of many lengths whose first token is the answer. A class that is only predicted, or only
    present, has F1 0; one that is neither does not count."""
    rng = np.random.default_rng(C)
    label, answer = rng.integers(C // 2, C, 200), rng.integers(0, C, 200)
    answer[::2] = label[::2]
    ids = [np.full(rng.integers(1, longest + 1), token) for token in answer]
    net = lambda ids, *_: torch.nn.functional.one_hot(ids[:, 0], C).float()
    scores = loop.evaluate(net, transfer.Examples(ids, label), None, "cpu")
    pairs = list(zip(label.tolist(), answer.tolist()))
    right = (label == answer).sum()
    f1 = [2 * pairs.count((c, c)) / sum((a == c) + (b == c) for a, b in pairs) for c in {*sum(pairs, ())}]
    expected = right / 200, np.mean(f1), math.log(math.e + C - 1) - right / 200  # the loss of one-hot scores
    assert [scores[name] for name in ("accuracy", "macro_f1", "loss")] == pytest.approx(expected, rel=1e-5)


def share_within(t, degrees):
    """P(|T| <= t) of Student's t, the density integrated by the trapezoidal rule."""
    x = np.linspace(-t, t, 20_001)
    factor = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = factor * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    return np.trapezoid(density, x)


def test_interval_is_the_t_interval():
    """Of 2 to 15 values it holds 95 % of Student's t, integrated; of more it may be a tenth too wide, never
    too narrow. The quantiles have four digits, which is 0.0003 of the share."""
    for n in (*range(2, 16), 16, 30, 100):
        values = [float(i % 7) for i in range(n)]
        mean, half = loop.interval(values)
        t = half * n**0.5 / statistics.stdev(values)
        assert mean == pytest.approx(statistics.mean(values))
        assert 0.95 - 3e-4 < share_within(t, n - 1) < (0.95 + 3e-4 if n <= 15 else 0.97)


@pytest.mark.parametrize("swapped", [False, True], ids=["labels right", "labels of validation swapped"])
def test_the_best_network_of_the_fine_tuning_by_validation_data_is_kept_and_reported(tmp_path, swapped):
    """The highest accuracy, then the lowest loss, by the file of the validation split, of networks after the
    cut alone: with swapped labels those before it are better. Validation and test are told apart
    everywhere: in result.json, and in what is printed of the cut."""
    texts = [f"{word} {i}" for i in range(40) for word in ("good", "bad")]
    for split in ("train", "validation", "test"):
        names = {"good": "yes", "bad": "no"}
        if swapped and split == "validation":
            names = {"good": "no", "bad": "yes"}
        rows = [{"text": text, "label": names[text.split()[0]]} for text in texts]
        save(tmp_path / "task" / f"{split}.jsonl", rows)
    flags = ["--target", tmp_path / "task", "--lr", 0.005, "--sparsity", 0.3]
    result = run(tmp_path / "out", *flags, every=1)
    rows = [row for row in history(tmp_path / "out") if row["phase"] == "finetune"]
    best = max(rows, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    small = model.GatedTransformer.load(tmp_path / "out" / "pruned.pt")
    found, p, names = {}, small.probabilities(texts), small.labels["target"]
    for split in ("validation", "test"):
        lines = (tmp_path / "task" / f"{split}.jsonl").read_text().splitlines()
        label = [names.index(json.loads(line)["label"]) for line in lines]
        found[split] = (p.argmax(1) == torch.tensor(label)).double().mean().item()
        loss = -p.log()[range(len(label)), label].mean().item()
        if split == "validation":
            assert best["validation_loss"] == pytest.approx(loss, rel=1e-4)
    assert result["validation_accuracy"] == best["validation_accuracy"] == found["validation"]
    assert result["test_accuracy"] == found["test"] and (found["test"] > found["validation"]) == swapped
    assert (rows[0] is best) == swapped  # what is learned makes it worse
    before = result["accuracy_before_cut"]
    assert (before["test"] > 0.9 and before["validation"] < 0.1) == swapped


# ---- structures that are given


def test_a_structure_of_another_run_is_pruned_to_in_one_step_and_must_fit(tmp_path, watched):
    """Also from the first step on; no gate is trained, so that no rate is too low for them."""
    path = watched.folder / "result.json"
    for steps in (20, 60):
        flags = ["--structure", path, "--gate_lr", 0.001, "--finetune_steps", steps]
        result = run(tmp_path / "again", *flags, every=10)
        assert all(result[key] == watched.result[key] for key in ("heads_kept", "ffn_kept", "params_pruned"))
        rows = history(tmp_path / "again")
        assert [row["phase"] for row in rows] == ["dense"] * (6 - steps // 10) + ["finetune"] * (steps // 10)
        assert all(row["penalty"] == 0 for row in rows)
        sparsities = {result[f"{kind}_sparsity"] for kind in ("expected", "deterministic", "delivered")}
        assert len(sparsities) == 1 and sparsities == {rows[-1]["expected_sparsity"]}
    null = {"heads_kept": None, "ffn_kept": [1, 1], "target_sparsity": 0.5}
    (tmp_path / "null.json").write_text(json.dumps(null))
    for flags in ([path, "--sparsity", 0.6], [path, "--n_layer", 3], [path, "--n_head", 4], ["none.json"],
                  [tmp_path / "null.json"], [path, "--sparsity", 0]):  # fmt: skip
        with pytest.raises(InputError, match="structure"):
            run(tmp_path / "refused", "--structure", *flags)
    with pytest.raises(InputError, match="lies in out_dir, which is overwritten"):
        run(tmp_path / "again", "--structure", tmp_path / "again" / "result.json")
    assert not (tmp_path / "refused").exists()


# ---- a parent


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A dense network trained on the auxiliary task, of another shape than the default and than other runs
    here."""
    folder = tmp_path_factory.mktemp("parent")
    flags = "--target reviews:film --aux none --sparsity 0 --n_target 0 --n_layer 3 --d_model 12 --n_head 2"
    assert run(folder, *flags.split())["delivered_sparsity"] == 0
    return folder / "pruned.pt"


def before_the_first_step(init, **aux):
    """What `train` makes first: flags with the parent's shape, data, the parent, and the network that
    starts from it. aux: flags of another auxiliary task."""
    args = arguments("out", "--init", init, "--max_length", 20, base=SCHEDULE)
    old = loop.read_parent(args)
    vars(args).update(aux, n_layer=len(old.config.heads), n_head=old.config.heads[0])
    args.d_model = old.config.d_model
    data = transfer.prepare(args, old)
    return args, data, old, loop.dense_network(args, data, old)


def test_a_run_starts_from_its_parent_with_words_by_name_and_has_its_shape(parent, tmp_path):
    """Before the first step every weight is the parent's, but for new words, positions that are not needed
    and the target's classifier; the auxiliary classifier answers the parent's question, if the names are
    the same, and no other one."""
    args, data, old, net = before_the_first_step(parent)
    assert (net.config.heads, net.config.d_model, net.config.d_head) == ([2, 2, 2], 12, 6)
    assert set(old.vocab) < set(data.vocab) and "waiter" in set(data.vocab) - set(old.vocab)
    mine, theirs = net.state_dict(), old.state_dict()
    ids = [net.word_id[word] for word in old.vocab]
    assert torch.equal(mine["token.weight"][ids], theirs["token.weight"])
    assert torch.equal(mine["position.weight"], theirs["position.weight"][:20])
    common = [name for name in mine if not name.startswith(("token", "position", "classifier"))]
    assert len(common) > 15 and all(torch.equal(mine[name], theirs[name]) for name in common)
    assert torch.equal(mine["classifier.auxiliary.weight"], theirs["classifier.target.weight"])
    assert not torch.equal(mine["classifier.target.weight"], theirs["classifier.target.weight"])
    save(tmp_path / "other.jsonl", [{"text": f"other {i}", "label": f"{i % 2}"} for i in range(20)])
    other = before_the_first_step(parent, aux=str(tmp_path / "other.jsonl"))[3]
    assert not torch.equal(other.classifier["auxiliary"].weight, theirs["classifier.target.weight"])
    assert torch.equal(other.norm.weight, theirs["norm.weight"])


def test_a_parent_that_does_not_fit_is_refused(tmp_path, parent, watched):
    parts = torch.load(parent, weights_only=True)
    torch.save({**parts, "vocab": ["<pad>", "<unk>", "<sep>", *parts["vocab"][3:]]}, tmp_path / "old.pt")
    (tmp_path / "odd.pt").write_text("odd")
    for name, other in (("heads", {"heads": [1] * 3}), ("ffn", {"ffn": [1, 0, 1]})):  # pruned in other ways
        config = model.Config(**{**parts["config"], **other})
        model.GatedTransformer(config, parts["vocab"], parts["labels"]).save(tmp_path / f"{name}.pt")
    parts["state"]["norm.bias"][3] = float("nan")
    torch.save(parts, tmp_path / "nan.pt")
    for init, other, reason in (
        (watched.folder / "pruned.pt", "", "is pruned"), (tmp_path / "old.pt", "", "did not write it"),
        (tmp_path / "none.pt", "", "none.pt is missing"), (tmp_path / "odd.pt", "", "odd.pt is missing, or"),
        (tmp_path / "heads.pt", "", "is pruned"), (tmp_path / "ffn.pt", "", "is pruned"),
        (tmp_path / "nan.pt", "", "weights that are not finite"),
        (parent, "--d_model=16", "d_model: .* has 12"),
        (parent, "--n_layer=4", "n_layer: .* has 3"), (parent, "--n_head=4", "n_head: .* has 2"),
        (parent, "--max_length=65", "at most 64"),
        (parent, f"--out_dir={parent.parent}", "lies in out_dir, which is overwritten"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            run(tmp_path / "refused", "--init", init, *other.split(), base=SCHEDULE)
    assert parent.exists() and not (tmp_path / "refused").exists()
    named = "--n_layer 3 --d_model 12 --n_head 2 --init".split()  # named and equal is no contradiction
    assert run(tmp_path / "fits", *named, parent, base=SCHEDULE)["args"]["d_model"] == 12


def test_a_run_from_a_bert_starts_from_its_weights_learns_prunes_and_predicts(tmp_path):
    """Before the first step token ids and features of test texts are those of the BERT, bit for bit.
    Afterwards the file on disk has the reported accuracy, and the same answers through the command line."""
    bert = write_bert(tmp_path / "bert", pieces=PIECES)
    args, data, old, net = before_the_first_step(bert)
    for text in [text for text, _ in few_reviews("restaurant")["test"][:9]]:
        assert net.encode(text) == old.encode(text)
        assert torch.equal(*(one.features(torch.tensor([one.encode(text)])) for one in (net, old)))
    assert net.vocab == old.vocab and [*PIECES] == net.vocab[-len(PIECES):]
    flags = ["--init", bert, "--max_length", 20, "--transfer_start", 5, "--n_target", 0, "--lr", 3e-4]
    result = run(tmp_path / "out", *flags, every=10, base=SCHEDULE)
    small = model.GatedTransformer.load(tmp_path / "out" / "pruned.pt")
    delivered = 1 - prunable(small) / prunable(old)
    assert 0.5 <= result["delivered_sparsity"] == pytest.approx(delivered)
    assert 0 < (small.norm.weight - old.norm.weight).abs().max() < 0.02  # at most 60 steps at this rate
    texts, names = zip(*few_reviews("restaurant")["test"])
    answers = small.predict(list(texts))
    assert statistics.mean(a == b for a, b in zip(answers, names)) == pytest.approx(result["test_accuracy"])
    command = [sys.executable, ROOT / "model.py", tmp_path / "out" / "pruned.pt"]
    done = subprocess.run(command, input="\n".join(texts), capture_output=True, text=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == answers
