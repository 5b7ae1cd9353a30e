"""One run, from flags to report: prune a small transformer for a task while an auxiliary task teaches it.

    python train.py --aux_weight 0.5 --transfer_start 1000              # built-in pair of tasks, no download
    python train.py --aux_weight 0                                      # the same without transfer
    python train.py --target path/to/mine --aux path/to/other           # folders with train.jsonl, ...
    python train.py --target cornell-movie-review-data/rotten_tomatoes  # the hub; owner/name:configuration

    0 ............ prune_start ....... prune_start+prune_ramp ....... steps-finetune_steps ....... steps
    dense training | target sparsity rises | held at its full value   | structure fixed, fine-tune  |
         transfer_start ........................................ transfer_stop

Read `train` first; what it calls stands below it, by topic, and the check of the flags above it.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import masks
import model
import transfer
from transfer import InputError


def parse_args(argv=None):
    """Flags of a run as a namespace; argv: list of strings, None = the command line. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = fail
    add = parser.add_argument
    # data
    add("--target", default="reviews:restaurant", help="task to solve: hub name[:config], folder or file")
    add("--aux", help="auxiliary task, or none; left out: reviews:film for the default target, else none")
    add("--text_columns", nargs="+", help="text columns of the target, if several could be meant")
    add("--label_column", help="label column of the target, if several could be meant")
    add("--aux_text_columns", nargs="+", help="text columns of the auxiliary task, in the same way")
    add("--aux_label_column", help="label column of the auxiliary task, in the same way")
    add("--n_target", type=int, default=200, help="labelled target examples to train on, >= 2; 0 = all")
    add("--max_length", type=int, default=64, help="words of a text that are read, 1 to 4096")
    add("--vocab_size", type=int, default=10000, help="words known, the most frequent ones, >= 4")
    # model
    add("--init", help="start from this network, the pruned.pt of a run with --sparsity 0")
    add("--n_layer", type=int, default=4, help="layers, >= 1")
    add("--n_head", type=int, default=4, help="attention heads per layer, >= 1")
    add("--d_model", type=int, default=64, help="width of the network, a multiple of n_head")
    add("--dropout", type=float, default=0.1, help="dropout probability, 0 to 0.99")
    # pruning
    add("--sparsity", type=float, default=0.7, help="fraction of the prunable weights to cut, up to 0.96")
    add("--prune_start", type=int, default=500, help="step at which the target sparsity starts to rise")
    add("--prune_ramp", type=int, default=1000, help="steps over which it rises to its full value, >= 1")
    add("--finetune_steps", type=int, default=800, help="last steps, in which the structure is fixed, >= 1")
    add("--structure", default="learned", help="learned, random, bottom, or another run's result.json")
    add("--structure_seed", type=int, default=0, help="which of the random structures of a seed, 0 to 99")
    # transfer
    add("--aux_weight", type=float, default=0.5, help="weight of the auxiliary loss, >= 0; 0 = no transfer")
    add("--transfer_start", type=int, default=1000, help="when: first step with the auxiliary loss")
    add("--transfer_stop", type=int, default=10**9, help="when: first step after transfer")
    add("--target_start", type=int, default=0, help="when: first step with the loss of the target")
    add("--coupling", choices=["sum", "project"], default="sum", help="how: project removes conflicts")
    add("--transfer", choices=["both", "weights", "gates"], default="both", help="what it may change")
    add("--aux_shuffle", action="store_true", help="a control: auxiliary labels in random order")
    # optimization
    add("--steps", type=int, default=3000, help="optimizer steps in all, >= 1")
    add("--batch_size", type=int, default=32, help="examples of each task per step, >= 1")
    add("--lr", type=float, default=1e-3, help="learning rate of the weights, > 0")
    add("--gate_lr", type=float, default=0.05, help="most that a gate moves per step, about, > 0")
    add("--weight_decay", type=float, default=0.01, help="decay of the matrices, never of gates, >= 0")
    add("--label_smoothing", type=float, default=0.1, help="probability spread over all labels, 0 to 0.99")
    # run
    add("--seed", type=int, default=0, help="subset, initialisation, order and noise follow it, >= 0")
    add("--resume", action="store_true", help="resume the interrupted run of the same command")
    add("--checkpoint_every", type=int, default=500, help="steps between two checkpoints, >= 1")
    add("--seeds", type=int, default=1, help="runs, with seeds seed, seed + 1, ...; >= 1")
    add("--baseline", action="store_true", help="run every seed without transfer too, and compare")
    add("--out_dir", default="out", help="folder for result.json, history.jsonl and pruned.pt")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.aux is None:  # a user's task trains alone unless a second one is named
        args.aux = "reviews:film" if args.target == "reviews:restaurant" else "none"
    if args.aux == "none":
        args.aux_weight = 0.0
    return args


def fail(message):
    raise InputError(message)


def check(args):
    """Raise InputError, with the reason, for settings that cannot work."""
    ones = "max_length n_layer n_head d_model batch_size prune_ramp finetune_steps checkpoint_every steps"
    lowest = dict.fromkeys(ones.split(), 1) | {"vocab_size": 4, "seeds": 1, "lr": 1e-9, "gate_lr": 1e-9}
    highest = {"structure_seed": 99, "dropout": 0.99, "label_smoothing": 0.99, "max_length": 4096}
    highest |= {"steps": 10_000_000, "finetune_steps": args.steps, "target_start": args.steps}
    for name, value in vars(args).items():
        low, high = lowest.get(name, 0), highest.get(name, 1e9)
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"{name} must be at least {low} and at most {high:g}, not {value}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        fail(f"device {args.device} is not available here")
    teaches = args.aux_weight and args.transfer_start < min(args.transfer_stop, args.steps)
    if args.baseline and not teaches:
        fail("--baseline compares with a run without transfer, and this is one")
    if args.d_model % args.n_head:
        fail(f"d_model {args.d_model} is not divisible by n_head {args.n_head}")
    if args.batch_size % rank_and_world()[1]:
        fail(f"batch_size {args.batch_size} is not divisible by the number of processes")
    if dist.is_initialized() and (args.seeds > 1 or args.baseline):
        fail("--seeds and --baseline do not work under torchrun: start one process for each seed")
    if args.sparsity:
        check_pruning(args)
    for name, path in (("init", args.init), ("structure", args.structure)):
        if path and Path(path).is_file() and Path(path).resolve().parent == Path(args.out_dir).resolve():
            fail(f"{name}: {path} lies in out_dir, which this run overwrites: use another --out_dir")


def check_pruning(args):
    """Raise InputError if the requested sparsity cannot be reached."""
    head, ffn = model.unit_sizes(args.d_model, args.n_head)
    closed = masks.Gates(args.n_layer, args.n_head)
    torch.nn.init.constant_(closed.log_alpha, -masks.LIMIT)
    reachable = masks.sparsity(closed.prob_open(), head, ffn).item()
    if args.sparsity >= reachable:
        fail(f"sparsity must be below {reachable:.3f}, which the gates can reach, not {args.sparsity}")
    if (1 - args.sparsity) * args.n_layer * (args.n_head * head + ffn) < head:
        fail(f"sparsity {args.sparsity} leaves no room for a single head: use more heads or layers")
    available = args.steps - args.finetune_steps - args.prune_start  # steps in which gates can move
    closing = (masks.INIT + masks.LIMIT) / args.gate_lr  # steps, at Adam's speed, to close a gate
    # the ramp, or what gates at half that speed take to follow it, and a closing for the multiplier to settle
    needed = math.ceil(max(args.prune_ramp, 2 * closing) + closing)
    if args.structure == "learned" and needed > available:
        fail(f"with prune_ramp {args.prune_ramp} and gate_lr {args.gate_lr} pruning needs {needed} steps "
             f"between prune_start and fine-tuning, not {max(available, 0)}")


def must_match(found, wanted, what, advice):
    """Raise InputError if `what` was made with another setting than this run has. found, wanted: dicts."""
    if other := [name for name in wanted if found.get(name) != wanted[name]]:
        listed = "; ".join(f"{name} {found.get(name)}, not {wanted[name]}" for name in other)
        fail(f"{what} has {listed}: {advice}")


# ----------------------------------------------------------------------------- the run

EVAL_EVERY = 100  # steps between two evaluations on the validation split
ROW = ("step {step:5d}  {phase:8}  sparsity {expected_sparsity:.3f}  loss {smoothed_loss_target:.3f}  "
       "validation accuracy {validation_accuracy:.3f}")  # what an evaluation prints where there is no bar
CAUGHT = []  # signals that asked the process to stop; the loop ends between two steps


def train(args):
    """One run from data to network. Returns the dict in result.json (torchrun's other processes: None)."""
    # ---- settings and data: everything that can be refused is refused before anything is written
    out = Path(args.out_dir)
    check(args)
    torch.set_float32_matmul_precision("medium")  # faster products by oneDNN; see README, Limits
    given = given_structure(args)  # None if gates learn it
    parent = read_parent(args)  # None if the weights start at random
    data = load(args, parent)
    run = start(args, data, parent)  # new, or as the interrupted run left it
    began = time.time() - run.seconds

    # ---- schedule and tasks
    finetune_start = args.steps - args.finetune_steps
    prune_start = args.prune_start if args.sparsity and not given else finetune_start
    sizes = model.unit_sizes(args.d_model, args.n_head)
    target = Task("target", data.train, args.batch_size, args.seed)
    auxiliary = Task("auxiliary", data.aux, args.batch_size, args.seed) if data.aux else None
    writes = rank_and_world()[0] == 0  # of several processes, one writes
    bar = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, disable=not writes or None)

    # ---- the loop
    for step in bar:
        phase = "dense" if step < prune_start else "prune" if step < finetune_start else "finetune"
        gates = run.gates if phase == "prune" else None  # the gates that are at work
        if step == finetune_start and args.sparsity:  # the structure is chosen and cut out
            before = accuracies(run.net, run.gates.deterministic(), data, args.device)
            structure = given or masks.select(run.gates.prob_open(), args.sparsity, *sizes)
            cut_out(run, structure, args.weight_decay)
            after = accuracies(run.net, None, data, args.device)
            run.cut = {"accuracy_before_cut": before, "accuracy_after_cut": after}
        for group in run.optimizer.param_groups:
            group["lr"] = lr_at(step, args.lr, finetune_start, args.steps)

        # when and what is transferred; what is minimised: the penalty, the target's loss, the auxiliary loss
        parameters = {**dict(run.net.named_parameters()), "log_alpha": run.gates.log_alpha}
        aux_weight = transfer.aux_weight_at(step, args.aux_weight, args.transfer_start, args.transfer_stop)
        shared = transfer.transferred(parameters, args.transfer)
        penalty = loss_target = loss_aux = torch.zeros(())
        target_sparsity = args.sparsity if phase == "finetune" else 0.0
        if gates:
            target_sparsity = masks.sparsity_at(step, args.sparsity, prune_start, args.prune_ramp)
            gap = masks.sparsity(gates.prob_open(), *sizes) - target_sparsity
            penalty = run.controller.penalty(gap)
        if step >= args.target_start:
            loss_target = task_loss(run.net, gates, target, step, args)
        if aux_weight:
            loss_aux = task_loss(run.net, gates, auxiliary, step, args)

        # how: the gradients of the two tasks are coupled
        g_target = gradients(loss_target, parameters)
        g_aux = gradients(aux_weight * loss_aux, shared)
        update = transfer.couple(g_target, g_aux, args.coupling)
        if gates:  # the controller is no task: its gradient is added afterwards
            update["log_alpha"] = update.get("log_alpha", 0) + gradients(penalty, parameters)["log_alpha"]
        for name, p in parameters.items():
            p.grad = update.get(name)
        norm = torch.nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
        terms = {"smoothed_loss_target": loss_target.item(), "smoothed_loss_aux": loss_aux.item(),
                 "penalty": penalty.item(), "gradient_norm": norm.item()}  # smoothed: with label smoothing
        for name, term in terms.items():
            if not math.isfinite(term):
                fail(f"step {step}: {name} is {term}; try a lower --lr. The last checkpoint, if any, remains")
        run.optimizer.step()
        run.gate_optimizer.step()
        if gates:
            gates.clamp_()
            run.controller.ascend(gap)
        run.step, run.seconds = step + 1, time.time() - began

        # evaluation, the best network of the fine-tuning, checkpoint
        bar.set_postfix(terms, phase=phase, refresh=False)
        if writes and (run.step % EVAL_EVERY == 0 or run.step == args.steps):
            scores = evaluate(run.net, data.validation, gates.deterministic() if gates else None, args.device)
            row = {"step": run.step, "phase": phase, "aux_weight": aux_weight, **terms,
                   "target_sparsity": target_sparsity, **gate_numbers(run, gates, sizes), **run.cut,
                   **{f"validation_{name}": scores[name] for name in ("accuracy", "macro_f1", "loss")}}
            run.history.append(row)
            write_rows(out / "history.jsonl", run.history)
            if bar.disable:  # None above lets tqdm decide: no bar without a terminal
                print(ROW.format(**row), flush=True)
            score = scores["accuracy"], -scores["loss"]  # of equal accuracies, the lower loss wins
            if phase == "finetune" and score > run.best_score:
                run.best_score = score
                run.best_weights = {name: p.clone() for name, p in run.net.state_dict().items()}
        if writes and (run.step % args.checkpoint_every == 0 or CAUGHT):
            save_checkpoint(run, out / "checkpoint.pt")
        if CAUGHT:
            raise KeyboardInterrupt(f"stopped after step {run.step}; to resume, add --resume to the command")

    # ---- final report
    if not writes:
        return None
    run.net.load_state_dict(run.best_weights)
    result = summary(run, args, data)
    run.net.save(file := io.BytesIO())
    write(out / "pruned.pt", file.getvalue())
    write(out / "result.json", json.dumps(result, indent=1).encode())
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return result


def given_structure(args):
    """The structure, a Z, that --structure asks for without looking at the gates; None if they choose it."""
    L, H = args.n_layer, args.n_head
    if args.structure == "learned":
        return None
    if args.structure == "random":
        generator = torch.Generator().manual_seed(100 * args.seed + args.structure_seed)
        prob = masks.Z(torch.rand(L, H, generator=generator), torch.rand(L, generator=generator))
    elif args.structure == "bottom":
        height = torch.linspace(1, 0, L)
        prob = masks.Z(height.view(L, 1).expand(L, H), height)
    else:
        return read_structure(args)
    return masks.select(prob, args.sparsity, *model.unit_sizes(args.d_model, H))


def read_structure(args):
    """The structure, a Z, of the run whose result.json --structure names. Raises InputError if it is not one
    of this shape and sparsity.
    """
    try:
        result = json.loads(Path(args.structure).read_text())
        ffn = torch.tensor(result["ffn_kept"]).float()  # (L,)
        head = torch.tensor(result["heads_kept"]).float()  # (L, H)
        L, H = torch.column_stack([head, ffn]).shape[0], head.shape[1]  # refuses two different L
        its = {"n_layer": L, "n_head": H, "sparsity": result["target_sparsity"]}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        fail(f"structure {args.structure} is not learned, random, bottom, or the result.json of a run")
    must_match(its, {name: vars(args)[name] for name in its}, f"structure: {args.structure}", "use the same")
    return masks.Z(head, ffn)


def read_parent(args):
    """The network that --init names, or None. Raises InputError unless it has the shape of this run's."""
    if not args.init:
        return None
    try:
        parent = model.GatedTransformer.load(args.init).to(args.device)
    except Exception:  # whatever a missing, truncated or foreign file provokes
        fail(f"init: {args.init} is not a network that train.py saved")
    must_match(vars(parent.config), shape(args), f"init: {args.init}", "a parent is dense and of this shape")
    return parent


def shape(args):
    """The fields of model.Config that the flags determine, for the network before pruning."""
    return {"max_length": args.max_length, "d_model": args.d_model, "d_head": args.d_model // args.n_head,
            "heads": [args.n_head] * args.n_layer, "ffn": [1] * args.n_layer}


def load(args, parent=None):
    """The Data of a run; prints what was found. parent: the network to start from, whose words stay known."""
    target = transfer.Source(args.target, args.text_columns, args.label_column)
    aux = transfer.Source(args.aux, args.aux_text_columns, args.aux_label_column, "aux_")
    data = transfer.prepare(target, None if args.aux == "none" else aux, n_target=args.n_target,
                            max_length=args.max_length, vocab_size=args.vocab_size, seed=args.seed,
                            parent_words=parent.vocab if parent else [])
    if args.aux_shuffle and data.aux:
        np.random.default_rng(args.seed).shuffle(data.aux.label)
    if args.aux_weight and args.transfer_start >= min(args.transfer_stop, args.steps):
        data.notes.append(f"no transfer: transfer_start {args.transfer_start} is not before transfer_stop, "
                          f"or not before the last of {args.steps} steps")
    if rank_and_world()[0] == 0:
        print_data(data, args.target, args.aux)
    return data


def print_data(data, target, aux):
    """What was decided about the data, in a few lines: nothing is guessed in silence."""
    for task, spec in (("target", target), ("auxiliary", aux)):
        if about := data.record.get(task):
            counts = ", ".join(f"{n} {split}" for split, n in about["examples"].items())
            print(f"{task} {spec}: {counts} examples; text from {' and '.join(about['text_columns'])}, "
                  f"label from {about['label_column']}")
            for split, origin in about["splits"].items():
                if origin != spec:
                    print(f"  {split}: {origin}")
            names = ", ".join(about["labels"])
            print(f"  {len(about['labels'])} classes: {names if len(names) < 70 else names[:66] + ' ...'}")
    print("{} known words; unknown are {train:.1%} of the words in training, {test:.1%} in test".format(
          len(data.vocab), **data.record["unknown"]))
    for note in data.notes:
        print(f"note: {note}")


def start(args, data, parent=None):
    """The State of a new run or, with --resume, of the interrupted one. Prepares the output folder."""
    torch.manual_seed(args.seed)
    run, out = State(args, data, parent), Path(args.out_dir)
    if args.resume and (out / "checkpoint.pt").exists():
        resume(run, out / "checkpoint.pt", args)
    elif args.resume and (out / "result.json").exists():
        fail(f"the run in {out} is finished: without --resume it would be made again")
    elif rank_and_world()[0] == 0:
        clear(out, args.resume)
    (out / "checkpoint.pt.tmp").unlink(missing_ok=True)  # of a process that was killed while it wrote
    return run


class State:
    """What changes during a run, and what identifies it; a checkpoint holds all of it."""

    def __init__(self, args, data, parent):
        L, H = args.n_layer, args.n_head
        self.net = dense_network(args, data)  # dense, and from the cut on the smaller one
        if parent:
            inherit(self.net, parent)
        self.gates = masks.Gates(L, H).to(args.device)
        self.controller = masks.Controller(args.gate_lr).to(args.device)
        self.optimizer = weight_optimizer(self.net, args.weight_decay)
        # a short memory, because the push of the controller changes its sign often
        self.gate_optimizer = torch.optim.Adam(self.gates.parameters(), lr=args.gate_lr, betas=(0.5, 0.9))
        self.structure = masks.Z(torch.ones(L, H), torch.ones(L))  # all ones until it is chosen
        self.setting = setting(vars(args), data.record)  # what a run that resumes this one must share
        self.step, self.seconds = 0, 0.0  # steps done, and their time, before and after an interruption
        self.history = []  # the rows of history.jsonl
        self.best_score = (-1.0, 0.0)  # validation accuracy and negative loss of the best network
        self.best_weights = None
        self.cut = {}  # accuracies before and after the cut


def dense_network(args, data):
    """The network before pruning, with random weights."""
    config = model.Config(vocab_size=len(data.vocab), **shape(args))
    try:
        return model.GatedTransformer(config, data.vocab, data.labels).to(args.device)
    except (RuntimeError, MemoryError) as error:  # the shapes fit together: only memory can be missing
        fail(f"no memory for a network of d_model {args.d_model} and {args.n_layer} layers: {error}")


@torch.no_grad()
def inherit(net, parent):
    """Copy the parent's weights into a network of the same shape, word embeddings by name.

    The target's classifier starts anew; the auxiliary one is the parent's, if it has the same class names.
    """
    own = ("token.", "classifier.")  # what depends on vocabulary and labels
    state = {name: p for name, p in parent.state_dict().items() if not name.startswith(own)}
    net.load_state_dict(state, strict=False)
    if net.labels.get("auxiliary") == parent.labels["target"]:
        net.classifier["auxiliary"].load_state_dict(parent.classifier["target"].state_dict())
    net.token.weight[[net.word_id[word] for word in parent.vocab]] = parent.token.weight


def weight_optimizer(net, weight_decay):
    """AdamW for the weights of a network, at the rate of `lr_at`: matrices are decayed, norms are not."""
    matrices = {"params": [p for p in net.parameters() if p.dim() >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.98), fused=True)


def setting(flags, record):
    """What two runs must share to be the same run: flags, data, and files that flags name, as a flat dict.

    flags, record: "args" and "data" of result.json.
    """
    tasks = [task for task in ("target", "auxiliary") if task in record]
    data = {f"{task} data": " ".join(record[task]["fingerprint"].values()) for task in tasks}
    files = [name for name in ("init", "structure") if flags[name] and Path(flags[name]).is_file()]
    contents = {f"{name} file": hashlib.sha256(Path(flags[name]).read_bytes()).hexdigest() for name in files}
    return essential(flags) | data | contents


def essential(flags):
    """The flags that determine the numbers of a run, as a dict. flags: a dict of all of them."""
    neutral = ("resume", "checkpoint_every", "out_dir", "seeds", "baseline")
    return {name: value for name, value in flags.items() if name not in neutral}


def resume(run, path, args):
    """Bring a new State to where the interrupted run stopped. Raises InputError if that was another run."""
    try:
        saved = torch.load(path, map_location=args.device, weights_only=True)
        before, structure = saved.pop("setting"), saved.pop("structure")
    except Exception:  # whatever a truncated or foreign file provokes
        fail(f"{path} is not a complete checkpoint of this program: delete it, or run without --resume")
    must_match(before, run.setting, path, "use the same, or run without --resume")
    cut_out(run, structure, args.weight_decay)
    for name, part in vars(run).items():
        if hasattr(part, "load_state_dict"):
            part.load_state_dict(saved.pop(name))
    vars(run).update(saved)  # numbers and rows


def cut_out(run, structure, weight_decay):
    """Cut the units that a structure (head, ffn) of zeros and ones closes out of the network of a State."""
    run.structure = masks.Z(*(part.to(run.gates.log_alpha.device) for part in structure))
    run.net = model.extract(run.net, run.structure)
    run.optimizer = weight_optimizer(run.net, weight_decay)  # Adam's averages had the old shapes


def clear(out, resume):
    """Make the folder of a new run and remove what an earlier one left there: a folder belongs to one run."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("checkpoint.pt", "history.jsonl", "pruned.pt", "result.json")
    if resume:
        print(f"note: {out / 'checkpoint.pt'} is not there: starting at step 0")
    if any((out / name).exists() for name in names):
        print(f"note: the earlier run in {out} is overwritten")
    for name in names:
        (out / name).unlink(missing_ok=True)
    (out / "history.jsonl").touch()  # better to fail now than at the first evaluation


def save_checkpoint(run, path):
    """Write everything that the same command with --resume needs to end in the same bits."""
    parts = {name: p.state_dict() if hasattr(p, "state_dict") else p for name, p in vars(run).items()}
    torch.save({**parts, "structure": tuple(run.structure)}, file := io.BytesIO())
    write(path, file.getvalue())


def write(path, content):
    """Write bytes to a file that is complete or as before, whatever fails; nothing temporary stays.

    Raises OSError when the disk is full or the folder gone.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path, rows):
    """Write dicts as JSONL, in the way of `write`."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# ----------------------------------------------------------------------------- one step

WARMUP = 100  # steps in which the learning rate rises to its full value


class Task:
    """A task as the loop sees it: a batch for every step, which depends on nothing but the seed."""

    def __init__(self, name, examples, batch_size, seed):
        self.name, self.examples = name, examples  # name: "target" or "auxiliary", as in net.classifier
        self.order = transfer.batch_order(examples, batch_size, noise_seed(seed, name, 0))


def lr_at(step, lr, finetune_start, steps):
    """Learning rate of the weights: linear warm-up, constant, linear to zero while fine-tuning."""
    return lr * min((step + 1) / WARMUP, 1, (steps - step) / (steps - finetune_start))


def noise_seed(seed, task, step):
    """Seed of everything random about the batch of one task ("target" or "auxiliary") at one step.

    Distinct for every task and step of all runs with seeds below 200: they are spaced by the most steps that
    a run may have, and stay below 2**32, since torch's CPU generator reads no further bits of a seed.
    """
    return (2 * seed + (task == "auxiliary")) * 10_000_000 + step


def task_loss(net, gates, task, step, args):
    """Cross-entropy (nats per example, with label smoothing) of one task's batch of this step.

    gates: None when every unit is open. Order and noise are functions of (seed, task, step): they never
    depend on the other task, and every process draws those of the whole batch and takes its share.
    """
    rank, world = rank_and_world()
    share = slice(rank, None, world)
    generator = torch.Generator(args.device).manual_seed(noise_seed(args.seed, task.name, step))
    ids, labels = task.examples.batch(task.order(step)[share], args.device)
    z = gates.sample(generator) if gates else None
    drop = model.dropout_noise(net, args.batch_size, args.dropout, generator, share)
    return F.cross_entropy(net(ids, task.name, z, drop), labels, label_smoothing=args.label_smoothing)


def gradients(loss, parameters):
    """name -> gradient of `loss`, the mean over all processes, for the parameters that it depends on.

    parameters: name -> parameter. A constant loss, such as the 0 of a task that is not at work, gives {}.
    """
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {name: g for name, g in zip(parameters, found) if g is not None}
    if dist.is_initialized():
        flat = torch.nn.utils.parameters_to_vector(found.values())  # one exchange for all
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat / dist.get_world_size(), found.values())
    return found


def rank_and_world():
    """Number of this process and number of processes: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ----------------------------------------------------------------------------- measuring and reporting


@torch.no_grad()
def evaluate(net, examples, z, device):
    """Scores of the target task, a dict. z: gates or None.

    accuracy, macro_f1 (the mean over classes that occur or are predicted), loss (nats per example, without
    label smoothing); precision, recall and f1 of every class; confusion (true class, predicted class).
    """
    length = np.diff(examples.start)
    order = np.argsort(length, kind="stable")  # similar lengths together: little padding
    at_once = max(1, 256**3 // max(256, length.max()) ** 2)  # texts: their attention scores take length**2
    parts = np.array_split(order, max(1, len(order) // at_once))
    logits = torch.cat([net(examples.batch(part, device)[0], "target", z) for part in parts])
    labels = torch.from_numpy(examples.label[order]).long().to(device)
    C = logits.shape[1]
    confusion = torch.bincount(labels * C + logits.argmax(1), minlength=C * C).view(C, C).double()
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    per_class = {"precision": hits / predicted, "recall": hits / true, "f1": 2 * hits / (true + predicted)}
    return {
        "accuracy": (hits.sum() / true.sum()).item(),
        "macro_f1": per_class["f1"].nanmean().item(),  # nan: a class that neither occurs nor is predicted
        "loss": F.cross_entropy(logits, labels).item(),
        **{name: score.nan_to_num(0).tolist() for name, score in per_class.items()},
        "confusion": confusion.long().tolist(),
    }


def accuracies(net, z, data, device):
    """Accuracy on the validation and on the test split."""
    splits = {"validation": data.validation, "test": data.test}
    return {name: evaluate(net, examples, z, device)["accuracy"] for name, examples in splits.items()}


def gate_numbers(run, gates, sizes):
    """What history.jsonl says about gates. gates: None when none is at work; the structure then stands for
    their probabilities. sizes: from model.unit_sizes.
    """
    prob = gates.prob_open() if gates else run.structure
    z = gates.deterministic() if gates else run.structure
    return {
        "expected_sparsity": masks.sparsity(prob, *sizes).item(),
        "deterministic_sparsity": masks.sparsity(masks.Z(z.head > 0, z.ffn > 0), *sizes).item(),
        "lambda1": run.controller.lambda1.item(),
        "prob_open": {name: p.double().round(decimals=4).tolist() for name, p in prob._asdict().items()},
    }


@torch.no_grad()
def latency_ms(nets, ids, repeats=50):
    """Median milliseconds of a forward pass of ids (B, T), for each network; the networks take turns."""
    seconds = [[timeit(lambda: net(ids, "target").cpu(), number=1) for net in nets] for _ in range(repeats)]
    return [1000 * statistics.median(of_one) for of_one in zip(*seconds)]


def summary(run, args, data):
    """What result.json says about the finished network."""
    dense, n = dense_network(args, data), len(data.test.label)
    scores = evaluate(run.net, data.test, None, args.device)
    slow, fast = latency_ms([dense, run.net], data.test.batch(np.arange(min(32, n)), args.device)[0])
    learned = args.sparsity and args.structure == "learned"
    prob = run.gates.prob_open() if learned else run.structure
    reopened = [((kept > 0) & (p < 0.5)).sum().item() for kept, p in zip(run.structure, prob)]
    return {
        **{f"test_{name}": score for name, score in scores.items()},
        "test_interval": wilson(scores["accuracy"], n), "label_order": data.labels["target"],
        "test_majority": np.bincount(data.test.label).max() / n,
        "validation_accuracy": run.best_score[0], **run.cut, "target_sparsity": args.sparsity,
        "expected_sparsity": masks.sparsity(prob, *model.unit_sizes(args.d_model, args.n_head)).item(),
        "delivered_sparsity": 1 - model.prunable(run.net) / model.prunable(dense),
        "heads_kept": run.structure.head.int().tolist(), "ffn_kept": run.structure.ffn.int().tolist(),
        "prob_open": {name: p.tolist() for name, p in prob._asdict().items()}, "reopened": sum(reopened),
        "params_dense": sum(p.numel() for p in dense.parameters()),
        "params_pruned": sum(p.numel() for p in run.net.parameters()),
        "latency_dense_ms": slow, "latency_pruned_ms": fast, "speedup": slow / fast,
        "data": data.record, "notes": data.notes, "seed": args.seed, "args": vars(args),
        "setting": run.setting, "torch": torch.__version__, "commit": commit(), "seconds": run.seconds,
    }


def commit():
    """Short hash of the commit of this file, or None without git or a repository."""
    git = ["git", "-C", Path(__file__).absolute().parent, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def wilson(share, n):
    """95 % interval of a share that was counted in n cases (Wilson 1927), as (low, high)."""
    z2 = 1.96**2 / n
    centre, half = share + z2 / 2, (z2 * share * (1 - share) + z2**2 / 4) ** 0.5
    return (centre - half) / (1 + z2), (centre + half) / (1 + z2)


def report(result):
    """Print what a reader of result.json would look for first."""
    print("test accuracy {test_accuracy:.3f}   macro-F1 {test_macro_f1:.3f}   validation accuracy "
          "{validation_accuracy:.3f}\n(test accuracy: 95 % interval over texts [{test_interval[0]:.3f}, "
          "{test_interval[1]:.3f}], majority-class baseline {test_majority:.3f})\n"
          "sparsity delivered {delivered_sparsity:.3f}, requested {target_sparsity:.3f}; "
          "{params_pruned:,} of {params_dense:,} parameters left".format(**result))
    if "accuracy_before_cut" in result:
        print("test accuracy before the cut {accuracy_before_cut[test]:.3f}, right after it "
              "{accuracy_after_cut[test]:.3f}".format(**result))
    if result["reopened"]:
        print("{reopened} of the units kept had P(open) below 0.5: there was room for them".format(**result))
    for i, (heads, ffn) in enumerate(zip(result["heads_kept"], result["ffn_kept"])):
        print(f"  layer {i}   heads {''.join('.#'[h] for h in heads)}   feed-forward {'.#'[ffn]}")
    print("{latency_dense_ms:.2f} ms -> {latency_pruned_ms:.2f} ms for up to 32 texts, "
          "{speedup:.1f} times faster; training took {seconds:.0f} s\n"
          "wrote result.json, history.jsonl and pruned.pt to {args[out_dir]}/".format(**result))


# ----------------------------------------------------------------------------- several seeds


def series(args):
    """Runs over several seeds, with transfer and, for --baseline, without.

    out_dir/results.jsonl keeps their rows; runs whose row is already there are not repeated. Returns
    {aux_weight: list of results in order of seed}.
    """
    check(args)
    path = Path(args.out_dir, "results.jsonl")
    rows = [json.loads(line) for line in open(path)] if path.exists() else []
    done = {(row["args"]["seed"], row["args"]["aux_weight"]): row for row in rows}
    record = load(args, read_parent(args)).record if rows else None
    for (seed, weight), row in done.items():
        ours = {**vars(args), "seed": seed, "aux_weight": args.aux_weight if weight else 0.0}
        must_match(row["setting"], setting(ours, record), path, "use another --out_dir")
    seeds = range(args.seed, args.seed + args.seeds)
    weights = [args.aux_weight, 0.0] if args.baseline else [args.aux_weight]
    for seed, weight in itertools.product(seeds, weights):
        if (seed, weight) in done:
            print(f"seed {seed}, aux_weight {weight:g}: the row in {path} is used again")
        else:
            folder = str(Path(args.out_dir, f"seed{seed}" + ("" if weight else "_no_transfer")))
            changed = {"seed": seed, "seeds": 1, "baseline": False, "aux_weight": weight, "out_dir": folder}
            print(f"seed {seed}, aux_weight {weight:g}:")
            changed["resume"] = args.resume and Path(folder, "checkpoint.pt").exists()
            done[seed, weight] = train(argparse.Namespace(**{**vars(args), **changed}))
            write_rows(path, done.values())
    return {weight: [done[seed, weight] for seed in seeds] for weight in weights}


def interval(values):
    """Mean, standard deviation and half-width of the 95 % t-interval of independent values (nan for one)."""
    t975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145)
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    t = t975[min(max(len(values) - 1, 1), 14) - 1]  # beyond 14 degrees of freedom a little too wide
    return statistics.mean(values), deviation, t * deviation / len(values) ** 0.5


def in_points(results, split):
    """Accuracies in points: name of a setting -> list; of two also what transfer adds, paired by seed."""
    key = f"{split}_accuracy"
    found = {f"aux_weight {weight:g}": [100 * row[key] for row in rows] for weight, rows in results.items()}
    if len(results) == 2:
        found["gain, paired by seed"] = [100 * (a[key] - b[key]) for a, b in zip(*results.values())]
    return found


def chosen_weight(results):
    """The aux_weight that validation data choose: with transfer if the interval of its gain lies above 0 (for
    one seed, its gain); test data have no say.
    """
    mean, _, half = interval(in_points(results, "validation")["gain, paired by seed"])
    return max(results) if mean > (0 if math.isnan(half) else half) else 0.0


def report_series(results):
    """Print means, deviations and intervals on both splits, and the network that validation data choose."""
    for split in ("validation", "test"):
        for name, values in in_points(results, split).items():
            mean, deviation, half = interval(values)
            spread = (f", standard deviation {deviation:.1f}, 95 % interval [{mean - half:.1f}, "
                      f"{mean + half:.1f}], n = {len(values)}")
            print(f"{split:10}  {name:20}  {mean:5.1f} points{spread if len(values) > 1 else ''}")
    weight, advice = max(results), "the"
    if len(results) == 2:
        weight = chosen_weight(results)
        why = "" if weight else " (the gain is not clearly above 0)"
        advice = f"validation favours aux_weight {weight:g}{why}; its"
    best = max(results[weight], key=lambda row: row["validation_accuracy"])["args"]["out_dir"]
    print(f"{advice} best network on validation is {best}/pruned.pt")


# ----------------------------------------------------------------------------- the command line


def catch(number, frame):
    """The first signal stops the loop after its step, a second one stops at once."""
    CAUGHT.append(number)
    signal.signal(number, signal.SIG_DFL)


def main():
    """The command line. Under torchrun every process trains on its share of each batch."""
    try:
        args = parse_args()
        if dist.is_torchelastic_launched():
            if args.device.startswith("cuda"):
                torch.cuda.set_device(dist.get_node_local_rank())
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        else:
            signal.signal(signal.SIGINT, catch)
            signal.signal(signal.SIGTERM, catch)
        if args.seeds > 1 or args.baseline:
            report_series(series(args))
        elif result := train(args):
            report(result)
        if dist.is_initialized():  # threads of gloo may outlive an ordinary exit, which then ends in SIGABRT
            sys.stdout.flush()
            os._exit(0)
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {(str(error) or 'out of memory').splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
