"""Claims about what a run does, seen from outside: its files, its command line, and the calls it makes."""

import contextlib
import inspect
import itertools
import json
import re
import statistics
import sys
from functools import lru_cache
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
from test_transfer import write

# ---- names that may move, each in one line

interval = loop.interval
Examples = transfer.Examples
TARGET_SPARSITY = "target_sparsity"  # key of a row of history.jsonl


def replace(patch, name, new, *modules):
    """Put `new` wherever `name` is looked up: in the module that defines it, and where it was imported."""
    for module in (*modules, loop):
        if hasattr(module, name):
            patch.setattr(module, name, new)


# ---- a run that is watched

STEPS, PRUNE, RAMP, TUNE = 130, 10, 20, 110  # of the watched run; it fine-tunes from TUNE on
SMALL = (
    "--steps 60 --prune_start 10 --prune_ramp 20 --finetune_steps 20 --gate_lr 1 --n_layer 2 --n_head 2 "
    "--d_model 8 --batch_size 4 --sparsity 0.5 --device cpu"
).split()
ONE = "--steps 1 --finetune_steps 1 --sparsity 0".split()


@lru_cache
def few_reviews(domain, real=transfer.reviews):
    """The built-in task with fewer sentences: loading it is most of the time of a small run."""
    sizes = {"train": 400, "validation": 100, "test": 50}
    return {split: pairs[: sizes[split]] for split, pairs in real(domain).items()}


@pytest.fixture(scope="module", autouse=True)
def small_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "reviews", few_reviews)
        yield


def run(folder, *flags):
    return loop.train(loop.parse_args([*SMALL, "--out_dir", str(folder), *map(str, flags)]))


def history(folder):
    return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


def weights(folder):
    return torch.load(Path(folder) / "pruned.pt", weights_only=True)["state"]


def digest(tensor):
    return tensor.detach().contiguous().numpy().tobytes()


def watch(folder, *flags, scale=1, evaluate_every=1):
    """A run, and what was seen: each update of the weights and of the gates, each forward pass, the noise of
    each gate sample, and what the structure was chosen from. scale: factor on every gradient of the gates.
    """
    seen = SimpleNamespace(weights=[], gates=[], forward=[], noise=[], chosen=[], folder=folder)
    seen.current = seen.cut = None  # the gates in use; the network that the last evaluation's gates cut out
    made, busy = [], []
    init, forward = masks.Gates.__init__, model.GatedTransformer.forward
    sample, select = masks.sample_z, masks.select
    signature = inspect.signature(forward)

    def watched_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.log_alpha.register_hook(lambda gradient: gradient * scale)
        made.append(self)

    def before_update(optimizer, args, kwargs):
        groups = {"weights": [], "gates": []}
        for group in optimizer.param_groups:
            of_gates = [g for g in made if any(p is g.log_alpha for p in group["params"])]
            multipliers = [p for g in made for p in g.parameters() if p is not g.log_alpha]
            if of_gates:
                seen.current = of_gates[0]
            elif any(p is q for p in group["params"] for q in multipliers):
                continue
            gradients = [None if p.grad is None else p.grad.clone() for p in group["params"]]
            values = [p.detach().clone() for p in group["params"]]
            groups["gates" if of_gates else "weights"].append(
                SimpleNamespace(lr=group["lr"], betas=group["betas"], gradients=gradients, values=values)
            )
        if groups["weights"]:
            seen.weights.append(groups["weights"])
        if groups["gates"] and groups["gates"][0].gradients[0] is not None:
            seen.gates += groups["gates"]

    def watched_forward(self, *args, **kwargs):
        logits = forward(self, *args, **kwargs)
        if not busy:
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            ids, task, z, drop = (call.arguments[name] for name in ("ids", "task", "z", "drop"))
            drop = drop and torch.cat([drop.embedding, *drop.attention, *drop.ffn])
            one = SimpleNamespace(task=task, z=z, drop=drop, training=torch.is_grad_enabled(), apart=None)
            one.texts = [tuple(self.vocab[i] for i in text if i) for text in ids.tolist()]
            if z is not None and not one.training:
                one.deterministic = seen.current.deterministic()
                seen.cut = model.extract(self, z)
                busy.append(True)
                one.apart = (seen.cut(ids, task) - logits).abs().max().item()
                busy.clear()
            seen.forward.append(one)
        return logits

    def watched_sample(log_alpha, generator=None):
        state = generator.get_state()
        seen.noise.append(digest(sample(torch.zeros_like(log_alpha), generator)))
        generator.set_state(state)
        return sample(log_alpha, generator)

    def watched_select(prob, *args, **kwargs):
        seen.chosen.append((prob, seen.current and seen.current.prob_open()))
        return select(prob, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(before_update).remove)
        patch.setattr(loop, "EVAL_EVERY", evaluate_every)
        patch.setattr(loop, "latency_ms", lambda models, *args: [1.0] * len(models))
        patch.setattr(masks.Gates, "__init__", watched_init)
        patch.setattr(model.GatedTransformer, "forward", watched_forward)
        patch.setattr(masks, "sample_z", watched_sample)
        replace(patch, "select", watched_select, masks)
        seen.result = run(folder, *flags)
    return seen


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """All three phases, with windows whose six ends all differ, and a learning rate of gates that is high."""
    flags = f"--steps {STEPS} --prune_start {PRUNE} --prune_ramp {RAMP} --finetune_steps {STEPS - TUNE} "
    flags += "--gate_lr 3 --target_start 5 --transfer_start 50 --transfer_stop 120"
    return watch(tmp_path_factory.mktemp("watched"), *flags.split())


@pytest.fixture(scope="module")
def ten_seeds(tmp_path_factory):
    """Three steps of ten seeds, with a random structure and every training example in every batch."""
    flags = "--steps 3 --finetune_steps 1 --structure random --n_layer 8 --n_head 8 --batch_size 20 "
    flags += "--n_target 20 --transfer_start 0"
    folder = tmp_path_factory.mktemp("seeds")
    return [
        watch(folder / str(seed), *flags.split(), "--seed", seed, evaluate_every=100) for seed in range(10)
    ]


# ---- transfer


def test_the_auxiliary_weight_scales_what_the_auxiliary_task_does(tmp_path):
    """Weights 0.1 and 0.9 lead to different shared parameters."""
    for weight in (0.1, 0.9):
        run(tmp_path / str(weight), *ONE, "--steps", 3, "--transfer_start", 0, "--aux_weight", weight)
    little, much = weights(tmp_path / "0.1"), weights(tmp_path / "0.9")
    assert not any(torch.equal(little[n], much[n]) for n in little if n.endswith(("qkv.weight", "up.weight")))


def test_during_pruning_the_auxiliary_task_reaches_the_gates_unless_only_weights_are_transferred(tmp_path):
    """The gates' first gradient, before which all four runs are the same run: it is that of a run without
    transfer for `weights`, and another one for `gates` and `both`."""
    first = {}
    for what in ("none", "weights", "gates", "both"):
        flags = ["--aux_weight", 0] if what == "none" else ["--transfer_start", PRUNE, "--transfer", what]
        first[what] = watch(tmp_path / what, *flags, evaluate_every=100).gates[0].gradients[0]
    assert torch.equal(first["none"], first["weights"])
    assert (first["none"] - first["gates"]).abs().max() > 1e-3
    torch.testing.assert_close(first["gates"], first["both"])


def test_label_smoothing_mixes_the_loss_with_that_of_uniform_labels(tmp_path):
    """The first loss of both tasks is a linear function of --label_smoothing, and not a constant one."""
    rows = []
    for smoothing in (0, 0.2, 0.4):
        run(tmp_path, *ONE, "--lr", 1, "--transfer_start", 0, "--label_smoothing", smoothing)
        rows.append(history(tmp_path)[-1])
    for name in ("smoothed_loss_target", "smoothed_loss_aux"):
        none, some, more = (row[name] for row in rows)
        assert some == pytest.approx((none + more) / 2, abs=1e-6) and abs(none - more) > 1e-4


def test_dropout_changes_the_loss_of_both_tasks(tmp_path):
    rows = []
    for dropout in (0, 0.3):
        run(tmp_path, *ONE, "--transfer_start", 0, "--dropout", dropout)
        rows.append(history(tmp_path)[-1])
    assert all(
        abs(rows[0][name] - rows[1][name]) > 1e-4 for name in ("smoothed_loss_target", "smoothed_loss_aux")
    )


# ---- noise, subsets, batches


def test_dropout_noise_differs_between_tasks_steps_and_seeds(ten_seeds):
    """No two of the 60 draws of ten seeds, two tasks and three steps are equal."""
    training = [call for seen in ten_seeds for call in seen.forward if call.training]
    assert [call.task for call in training] == ["target", "auxiliary"] * 30
    assert len({digest(call.drop) for call in training}) == 60


def test_gate_noise_differs_between_tasks_and_steps(watched):
    """Every loss that is computed while pruning draws new noise for its gates."""
    pruning = [call for call in watched.forward if call.training and call.z is not None]
    assert len(pruning) == (TUNE - PRUNE) + (TUNE - 50)  # target and, from step 50 on, auxiliary
    assert len(watched.noise) == len(set(watched.noise)) == len(pruning)


def test_every_seed_trains_on_its_own_subset(ten_seeds):
    """Ten seeds, ten different sets of twenty examples."""
    subsets = set()
    for seen in ten_seeds:
        first = next(call for call in seen.forward if call.task == "target" and call.training)
        assert len(set(first.texts)) == 20
        subsets.add(frozenset(first.texts))
    assert len(subsets) == 10


def test_initial_weights_and_order_follow_the_seed(tmp_path):
    """With all examples, so that every seed has the same: in the first step of two seeds, no task has the
    same batch and no matrix the same values."""
    flags = [*ONE, "--n_target", 0, "--transfer_start", 0]
    seen = [watch(tmp_path / str(seed), *flags, "--seed", seed) for seed in (0, 1)]
    batches = [[set(call.texts) for call in one.forward if call.training] for one in seen]
    matrices = [one.weights[0][0].values for one in seen]
    assert len(batches[0]) == 2 and not any(a == b for a, b in zip(*batches, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(*matrices, strict=True))


def texts_of_random_length():
    length = np.random.default_rng(0).integers(1, 60, 256)
    start = np.concatenate([[0], np.cumsum(length)])
    return length, Examples(np.zeros(start[-1], dtype=int), start, np.zeros(256, dtype=int))


def test_every_epoch_has_other_batches():
    """As sets of examples: the second epoch's batches are neither the first's nor in its order."""
    order = transfer.batch_order(texts_of_random_length()[1], 4, 0)
    epochs = [[frozenset(order(step)) for step in range(64 * e, 64 * e + 64)] for e in range(3)]
    for one, other in itertools.combinations(epochs, 2):
        assert len(set(one) & set(other)) < 32


def test_batches_do_not_come_in_order_of_length():
    """Between neighbours the mean length rises about as often as it falls; 0.2 is five standard errors."""
    length, examples = texts_of_random_length()
    order = transfer.batch_order(examples, 4, 0)
    means = [length[order(step)].mean() for step in range(64)]
    rises = np.mean([a < b for a, b in itertools.pairwise(means)])
    assert 0.3 < rises < 0.7


# ---- gates and their controller


def test_the_evaluation_gate_is_the_stretched_sigmoid_without_a_temperature():
    """By hand: sigmoid(log 3) is 3/4, and 3/4 of (-0.1, 1.1) is 0.8; sigmoid(log 1/3) gives 0.2."""
    log_alpha = torch.tensor([3.0, 1.0, 1 / 3]).log()
    torch.testing.assert_close(masks.deterministic_z(log_alpha), torch.tensor([0.8, 0.5, 0.2]))


def test_during_pruning_the_network_that_is_evaluated_is_the_extracted_one(watched):
    """Evaluation multiplies by the deterministic gates: the network cut out by them has the same logits (1e-5
    is rounding) and the validation accuracy of the row. No other phase has gates."""
    evaluated = [call for call in watched.forward if not call.training and call.z is not None]
    evaluated, at_the_cut = evaluated[:-2], evaluated[-2:]  # validation and test
    assert len(evaluated) == TUNE - PRUNE and all(call.task == "target" for call in at_the_cut)
    for call in evaluated:
        assert all(torch.equal(a, b) for a, b in zip(call.z, call.deterministic)) and call.apart < 1e-5
    assert any((call.z.head < 1).any() for call in evaluated)
    texts, labels = zip(*few_reviews("restaurant")["validation"])
    hits = [a == b for a, b in zip(watched.cut.predict(list(texts)), labels)]
    row = next(row for row in history(watched.folder) if row["step"] == TUNE)
    assert statistics.mean(hits) == pytest.approx(row["validation_accuracy"], abs=1e-6)
    gone = 1 - model.prunable(watched.cut) / (2 * 12 * 8 * 8)
    assert row["deterministic_sparsity"] == pytest.approx(gone, abs=1e-6) and gone > 0


def test_gates_stay_within_their_limit_at_a_high_rate(watched):
    """No gate is ever further out than LIMIT (1e-6: float32), though at this rate one is pushed there."""
    furthest = max(update.values[0].abs().max().item() for update in watched.gates)
    assert furthest == pytest.approx(masks.LIMIT, abs=1e-6)
    assert watched.current.log_alpha.abs().max() <= masks.LIMIT + 1e-6


def test_learning_rates_of_weights_follow_the_schedule_and_those_of_gates_stay(watched):
    """At --lr 0.001: a hundredth in the first step, half of it in the middle of the warm-up, all of it before
    fine-tuning, a twentieth in the last of the twenty steps of fine-tuning. Gates: --gate_lr throughout."""
    assert len(watched.weights) == STEPS
    for step, lr in ((0, 1e-5), (49, 5e-4), (105, 1e-3), (TUNE, 1e-3), (STEPS - 1, 5e-5)):
        assert [group.lr for group in watched.weights[step]] == pytest.approx([lr, lr])
    assert len(watched.gates) == TUNE - PRUNE and {update.lr for update in watched.gates} == {3.0}


def test_adam_forgets_sooner_for_gates_than_for_weights(watched):
    assert {update.betas for update in watched.gates} == {(0.5, 0.9)}
    assert {group.betas for groups in watched.weights for group in groups} == {(0.9, 0.98)}


def test_a_huge_gradient_of_the_gates_does_not_shrink_the_step_of_the_weights(tmp_path):
    """With the gates' gradient a million times as large, the weights' gradients of the first step of pruning
    are the same bits: clipping looks at the weights alone."""
    one, many = (watch(tmp_path, "--transfer_start", 0, scale=s, evaluate_every=100) for s in (1, 1e6))
    assert many.gates[0].gradients[0].abs().max() > 1e5 * one.gates[0].gradients[0].abs().max()
    for ours, theirs in zip(one.weights[PRUNE], many.weights[PRUNE], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True))
    norm = sum(g.square().sum() for group in one.weights[PRUNE] for g in group.gradients) ** 0.5
    assert 0 < norm < 1.0001


# ---- structure and schedules


def test_a_random_structure_chooses_heads_uniformly(ten_seeds):
    """In 80 layers of eight heads, the number of heads kept in a layer varies as if heads were drawn from all
    64 without replacement (a ratio of variances; its standard error is 0.16), and no place is preferred."""
    kept = np.array([seen.result["heads_kept"] for seen in ten_seeds])  # (10, layers, heads)
    share = kept.mean((1, 2), keepdims=True)
    expected = (8 * share * (1 - share) * 56 / 63).mean()
    assert 0.5 < (kept.sum(2, keepdims=True) - 8 * share).var() / expected < 1.6
    for places in (kept.mean((0, 1)), kept.mean((0, 2))):
        assert (abs(places - kept.mean()) < 0.2).all()  # over three standard errors of a share of 80


def test_a_learned_structure_is_chosen_by_the_probability_that_a_unit_is_open(watched):
    ((given, prob),) = watched.chosen
    assert torch.equal(given.head, prob.head) and torch.equal(given.ffn, prob.ffn)
    assert given.head.unique().numel() > 1 and 0 < given.head.min() and given.head.max() < 1


def test_phases_begin_and_end_where_the_flags_say(watched):
    """A row is written after its step, so that row s + 1 tells about step s. The same for the gates: they are
    updated in the pruning phase alone."""
    phases = [row["phase"] for row in history(watched.folder)]
    assert phases == ["dense"] * PRUNE + ["prune"] * (TUNE - PRUNE) + ["finetune"] * (STEPS - TUNE)
    gated = [call.z is not None for call in watched.forward if call.training and call.task == "target"]
    assert gated == [False] * (PRUNE - 5) + [True] * (TUNE - PRUNE) + [False] * (STEPS - TUNE)


def test_losses_are_there_exactly_in_their_windows(watched):
    rows = history(watched.folder)
    assert [row["smoothed_loss_target"] > 0 for row in rows] == [False] * 5 + [True] * (STEPS - 5)
    window = [False] * 50 + [True] * 70 + [False] * 10
    assert [row["smoothed_loss_aux"] > 0 for row in rows] == window == [row["aux_weight"] > 0 for row in rows]


def test_the_history_holds_the_target_sparsity_of_the_schedule(watched):
    """0 in the first step of pruning, half of the way in the middle of the ramp, all of it at its end and
    from then on."""
    found = {row["step"] - 1: row.get(TARGET_SPARSITY) for row in history(watched.folder)}
    assert not any(found[step] for step in range(PRUNE + 1))
    for step in range(PRUNE, TUNE):
        assert found[step] == pytest.approx(0.5 * min(1, (step - PRUNE) / RAMP))


# ---- reports, series, several processes


def test_three_classes_come_out_with_their_own_names(tmp_path):
    """Labels that first appear as b, c, a; a network that has learned the three words gives each its name."""
    rows = [{"text": f"{word} {i}", "label": word[0]} for i in range(20) for word in ("bee", "cat", "ant")]
    for split in ("train", "validation", "test"):
        write(tmp_path / "task", f"{split}.jsonl", rows)
    flags = f"--target {tmp_path / 'task'} --aux none --n_target 0 --sparsity 0 --lr 0.1 --dropout 0".split()
    result = run(tmp_path / "out", *flags)
    assert result["test_accuracy"] == 1
    network = model.GatedTransformer.load(tmp_path / "out" / "pruned.pt")
    assert network.predict(["bee", "cat", "ant", "cat 3"]) == ["b", "c", "a", "c"]


def script(patch, accuracy, loss, stop=None):
    """Replace evaluation: call i returns accuracy(i) and loss(i), call `stop` is interrupted. Returns the
    list of states of the networks that were evaluated."""
    states = []

    def scripted(*args, **kwargs):
        network, i = args[0] if args else kwargs["model"], len(states)
        if i == stop:
            raise KeyboardInterrupt
        states.append({name: p.clone() for name, p in network.state_dict().items()})
        return {"accuracy": accuracy(i), "macro_f1": accuracy(i), "loss": loss(i)}

    patch.setattr(loop, "evaluate", scripted)
    patch.setattr(loop, "accuracies", lambda *args: {})
    patch.setattr(loop, "EVAL_EVERY", 5)  # twelve evaluations, the last four of them while fine-tuning
    return states


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_of_equal_validation_accuracies_the_lower_loss_wins(tmp_path, monkeypatch):
    """Among the networks of the fine-tuning phase, though larger ones had a lower loss."""
    losses = [0.1] * 8 + [0.9, 0.3, 0.6, 0.5, 0.7]
    states = script(monkeypatch, lambda i: 0.5, lambda i: losses[i])
    run(tmp_path)
    assert same(weights(tmp_path), states[9]) and not same(states[9], states[11])


def test_a_resumed_run_keeps_the_best_network_of_before_the_interruption(tmp_path, monkeypatch):
    """The first evaluation of fine-tuning is the best; the run stops five steps later and is resumed."""
    flags = ["--checkpoint_every", 1]
    before = script(monkeypatch, lambda i: 0.9 if i == 8 else 0.5, lambda i: 1.0, stop=9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *flags)
    after = script(monkeypatch, lambda i: 0.6, lambda i: 0.1)
    result = run(tmp_path, *flags, "--resume")
    assert len(after) == 4  # steps 50, 55 and 60, and the test split
    assert same(weights(tmp_path), before[8]) and result["validation_accuracy"] == 0.9


def interrupt(patch, step):
    """Make the next run stop after this step, as on Ctrl-C. Returns the list of steps that it takes."""
    steps, real = [], loop.task_loss

    def watched_loss(*args):
        steps.append(args[3])
        if args[3] == step:
            patch.setattr(loop, "CAUGHT", [2])
        return real(*args)

    patch.setattr(loop, "task_loss", watched_loss)
    return steps


def test_the_time_of_a_resumed_run_includes_that_before_the_interruption(tmp_path, monkeypatch):
    """By a clock that goes on by a second whenever it is read, which is once a step."""
    clock = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: next(clock)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 40)
        run(tmp_path, "--aux_weight", 0)
    assert run(tmp_path, "--aux_weight", 0, "--resume")["seconds"] >= 60


def test_a_series_that_was_interrupted_goes_on_in_the_middle_of_its_run(tmp_path, monkeypatch):
    """The second of two runs stops after step 40: resumed, the series takes the 19 steps that are left."""
    flags = [*SMALL, "--aux_weight", "0", "--seeds", "2", "--out_dir", str(tmp_path)]
    loop.series(loop.parse_args([*flags, "--seeds", "1"]))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 40)
        loop.series(loop.parse_args(flags))
    steps = interrupt(monkeypatch, None)
    loop.series(loop.parse_args([*flags, "--resume"]))
    assert steps == list(range(41, 60))


def one_of_two(rank, folder, flags):
    """The body of one of two processes, as torchrun would start them."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    run(folder / "two", *flags)
    torch.distributed.destroy_process_group()


def test_two_processes_report_the_gradient_norm_of_one(tmp_path, monkeypatch):
    """In every step of the three phases, with projection: 1e-4 is rounding, while the gradient of half a
    batch has a norm that is some per cent off."""
    monkeypatch.setattr(loop, "EVAL_EVERY", 1)
    flags = "--steps 34 --prune_start 3 --finetune_steps 3 --prune_ramp 5 --transfer_start 1 --lr 1e-5 "
    flags = [*flags.split(), "--coupling", "project"]
    run(tmp_path / "one", *flags)
    torch.multiprocessing.start_processes(one_of_two, (tmp_path, flags), nprocs=2, start_method="fork")
    norms = [[row["gradient_norm"] for row in history(tmp_path / name)] for name in ("one", "two")]
    assert len(norms[0]) == 34 and norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("n, quantile", [(4, 3.182), (16, 2.131), (30, 2.045)])
def test_the_interval_of_a_gain_is_that_of_pairs(tmp_path, monkeypatch, capsys, n, quantile):
    """Through the command line, with runs whose accuracies are made up and rise and fall with the seed: the
    printed interval has the mean and the t-interval of the differences, to the last digit but for 5 %, by
    which it may be too wide beyond 14 degrees of freedom."""
    rng = np.random.default_rng(n + 1)
    without, gain = rng.uniform(0.3, 0.6, n), rng.uniform(-0.1, 0.3, n)

    def made_up(args):
        accuracy = float(without[args.seed] + (gain[args.seed] if args.aux_weight else 0))
        return {"validation_accuracy": accuracy, "test_accuracy": accuracy, "args": vars(args)}

    monkeypatch.setattr(loop, "train", made_up)
    monkeypatch.setattr(loop.signal, "signal", lambda *args: None)
    flags = ["--seeds", str(n), "--baseline", "--out_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    loop.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if "test" in line and "gain" in line)
    low, high = map(float, re.search(r"\[(-?[\d.]+), (-?[\d.]+)\]", line).groups())
    half = 100 * quantile * statistics.stdev(gain) / n**0.5
    assert (low + high) / 2 == pytest.approx(100 * gain.mean(), abs=0.11)
    assert half - 0.11 < (high - low) / 2 < (1.05 if n > 15 else 1) * half + 0.11


def test_intervals_of_many_values_are_never_too_narrow():
    """0.975 quantiles of t from a table: 2.145, 2.131, 2.045 and 1.984 with 14, 15, 29 and 99 degrees of
    freedom; up to a tenth too wide is allowed."""
    for n, quantile in ((15, 2.145), (16, 2.131), (30, 2.045), (100, 1.984)):
        values = [float(i % 7) for i in range(n)]
        mean, deviation, half = interval(values)
        exact = quantile * statistics.stdev(values) / n**0.5
        assert (mean, deviation) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
        assert 0.999 * exact < half < (1.001 if n == 15 else 1.1) * exact


def test_a_smaller_network_has_a_speedup_above_one(tmp_path):
    """Nine tenths of eight layers are cut away, and the two times are in the right places."""
    flags = "--steps 1 --finetune_steps 1 --structure random --sparsity 0.9 --n_layer 8".split()
    result = run(tmp_path, *flags)
    assert result["speedup"] > 1.5
    assert result["speedup"] == pytest.approx(result["latency_dense_ms"] / result["latency_pruned_ms"])


# ---- dropout and refusals


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--baseline --aux none", "^--baseline compares"),
        ("--baseline --aux_weight 0", "^--baseline compares"),
        ("--baseline --transfer_start 60", "^--baseline compares"),  # of 60 steps
        ("--baseline --transfer_start 5 --transfer_stop 5", "^--baseline compares"),
        ("--label_smoothing 1", "^label_smoothing must be at least 0 and at most 0.99"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, flags, reason):
    with pytest.raises(transfer.InputError, match=reason):
        run(tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(tmp_path, monkeypatch):
    """As the first of three processes would see it; the batch has four examples."""
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda *args, value=value: value)
    with pytest.raises(transfer.InputError, match="^batch_size 4 is not divisible by the number"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
