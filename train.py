"""One run, from flags to report: prune a transformer for a task while an auxiliary task teaches it.

    python train.py --aux_weight 0.5 --transfer_start 1000      # the built-in pair of tasks
    python train.py --aux_weight 0                              # the same without transfer
    python train.py --target path/to/mine --aux path/to/other   # folders with train.jsonl, ...
    python train.py --init sentence-transformers/all-MiniLM-L6-v2 --lr 1e-4 ...   # from a BERT

Read `train` first: it is the whole run in the order in which things happen. What it calls stands
below it, by topic; above it stand the flags and the check of what they say together.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import masks
import model
import transfer
from model import InputError, say


def between(low, high, kind=float):
    """For argparse: a number of this kind within [low, high]; else the run ends, exit code 2."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also true for nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


NATURAL = between(0, 10_000_000, int)
POSITIVE = between(1, 10_000_000, int)
FRACTION = between(0, 0.99)


def parse_args(argv=None):
    """Flags of a run as a namespace; argv: list of strings, None = the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.usage = "python train.py [--flag value ...], see --help"
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    # data
    add("--target", default="reviews:restaurant", help="task to solve: folder, file, hub name")
    add("--aux", help="auxiliary task, or none; None: reviews:film for the built-in target")
    add("--text_columns", nargs="+", default=["text"], help="columns of the texts: two for pairs")
    add("--label_column", default="label", help="column of the target's label")
    add("--aux_text_columns", nargs="+", default=["text"], help="columns of the auxiliary texts")
    add("--aux_label_column", default="label", help="column of the auxiliary label")
    add("--n_target", type=NATURAL, default=200, help="target examples to train on; 0 = all")
    add("--max_length", type=between(1, 4096, int), default=64, help="tokens read of a text")
    add("--vocab_size", type=between(4, 10**9, int), help="tokens known; None: 10,000, a BERT: all")
    # model
    add("--init", help="start from a dense run's pruned.pt, or a BERT: folder or hub name")
    add("--n_layer", type=between(1, 100, int), help="layers; None: the parent's, else 4")
    add("--n_head", type=between(1, 1000, int), help="heads per layer; None: likewise")
    add("--d_model", type=between(1, 10_000, int), help="width; None: the parent's, else 64")
    add("--dropout", type=FRACTION, default=0.1, help="dropout probability")
    # pruning
    add("--sparsity", type=FRACTION, default=0.7, help="fraction of the prunable weights to cut")
    add("--prune_start", type=NATURAL, default=500, help="step at which sparsity starts to rise")
    add("--prune_ramp", type=NATURAL, default=1000, help="steps over which it rises")
    add("--finetune_steps", type=POSITIVE, default=800, help="last steps, after the cut")
    add("--structure", default="learned", help="learned, random, bottom, or a result.json")
    # transfer
    add("--aux_weight", type=between(0, 1e6), default=0.5, help="weight of the auxiliary loss")
    add("--transfer_start", type=NATURAL, default=1000, help="when: first step with transfer")
    add("--transfer_stop", type=NATURAL, default=10_000_000, help="when: first step without")
    add("--coupling", choices=["sum", "project"], default="sum", help="how; project: no conflicts")
    add("--transfer", choices=["both", "weights", "gates"], default="both", help="what it changes")
    # optimization
    add("--steps", type=POSITIVE, default=3000, help="optimizer steps in all")
    add("--batch_size", type=between(1, 10_000, int), default=32, help="examples per task and step")
    add("--lr", type=between(1e-9, 1e3), default=1e-3, help="learning rate; 1e-4 for a BERT")
    add("--gate_lr", type=between(1e-9, 1e3), default=0.05, help="learning rate of the gates")
    add("--weight_decay", type=between(0, 1e3), default=0.01, help="decay of the matrices")
    add("--label_smoothing", type=FRACTION, default=0.1, help="probability spread over all labels")
    # run
    add("--seed", type=between(0, 10**6, int), default=0, help="decides subset, weights and noise")
    add("--seeds", type=between(1, 1000, int), default=1, help="seeds, with and without transfer")
    add("--resume", action="store_true", help="resume the interrupted run of the same command")
    add("--out_dir", default="out", help="folder for result.json, history.jsonl and pruned.pt")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.aux is None:  # a user's task trains alone unless a second one is named
        args.aux = "reviews:film" if args.target == "reviews:restaurant" else "none"
    if args.aux == "none":
        args.aux_weight = 0.0
    return args


def check(args):
    """Raise InputError for flags that contradict each other; ranges stand in `parse_args`."""
    for path in (args.init or "", args.structure):
        if Path(path).is_file() and Path(path).resolve().parent == Path(args.out_dir).resolve():
            raise InputError(f"{path} lies in out_dir, which is overwritten: use another --out_dir")
    head, ffn = model.unit_sizes(args.d_model, args.n_head)
    room = (1 - args.sparsity) * args.n_layer * (args.n_head * head + ffn)  # may stay
    closed = masks.prob_open(torch.full((args.n_layer, args.n_head + 2), -masks.LIMIT))
    reachable = masks.sparsity(masks.Gates.combine(closed), head, ffn).item()
    available = args.steps - args.finetune_steps - args.prune_start  # steps in which gates can move
    closing = (masks.INIT + masks.LIMIT) / args.gate_lr  # steps, at Adam's speed, to close a gate
    # the ramp or, if longer, two closings (gates follow it at half Adam's speed); then one more, in
    # which the multiplier settles
    needed = math.ceil(max(args.prune_ramp, 2 * closing) + closing)
    learned = args.sparsity and args.structure == "learned"
    wrong = [
        (not args.out_dir, "out_dir is empty"),
        (args.d_model % args.n_head, f"d_model {args.d_model} is no multiple of n_head"),
        (args.finetune_steps > args.steps, f"finetune_steps exceed the {args.steps} steps"),
        (learned and args.sparsity >= reachable, f"sparsity: gates reach at most {reachable:.3f}"),
        (room < head, f"sparsity {args.sparsity} leaves no room for a single head"),
        (learned and needed > available,
         f"pruning needs {needed} steps with this prune_ramp and gate_lr, there are {available} "
         "between prune_start and fine-tuning"),
    ]  # fmt: skip
    for is_wrong, message in wrong:
        if is_wrong:
            raise InputError(message)


# ----------------------------------------------------------------------------- the run

EVAL_EVERY = 100  # steps between two evaluations on the validation split, each with a checkpoint


def train(args):
    """One run from data to network. Returns the dict in result.json. Raises InputError."""
    # ---- data, network, gates; whatever can be refused is refused before anything is written
    parent = read_parent(args)
    args = with_shape(args, parent)
    check(args)
    torch.set_float32_matmul_precision("medium")  # faster products by oneDNN; see README, Limits
    given = given_structure(args)  # None if gates learn it
    data = load(args, parent)
    fingerprint = fingerprint_of(data, parent, given)
    torch.manual_seed(args.seed)  # not earlier: reading a parent draws random numbers
    net = dense_network(args, data, parent)
    if parent:
        inherit(net, parent)
    gates = masks.Gates(args.n_layer, args.n_head).to(args.device)
    controller = masks.Controller(args.gate_lr).to(args.device)
    optimizer = weight_optimizer(net, args.weight_decay)
    # a short memory, because the push of the controller changes its sign often
    gate_optimizer = torch.optim.Adam(gates.parameters(), lr=args.gate_lr, betas=(0.5, 0.9))
    structure = gates.combine(torch.ones_like(gates.log_alpha))  # all units, until it is chosen
    first, history, cut, began = 0, [], {}, time.time()
    best = {"score": (-1.0, 0.0), "weights": None}

    # ---- or all of it as the checkpoint has it
    saved = saved_run(args, fingerprint)
    if saved and "step" not in saved:
        return saved  # the result of a finished run
    if saved:
        first, began = saved["step"], time.time() - saved["seconds"]
        history, cut, best = saved["history"], saved["cut"], saved["best"]
        if cut:
            structure = masks.Units(*saved["structure"])
            net = model.extract(net, structure)
            optimizer = weight_optimizer(net, args.weight_decay)
        net.load_state_dict(saved["net"])
        gates.load_state_dict(saved["gates"])
        controller.load_state_dict(saved["controller"])
        optimizer.load_state_dict(saved["optimizer"])
        gate_optimizer.load_state_dict(saved["gate_optimizer"])

    # ---- schedule and batches
    finetune_start = args.steps - args.finetune_steps
    learned = args.sparsity and given is None
    prune_start = args.prune_start if learned else finetune_start
    prune_ramp = args.prune_ramp if learned else 0
    sizes = model.unit_sizes(args.d_model, args.n_head)
    target = Task("target", data.train, args)
    auxiliary = Task("auxiliary", data.aux, args) if data.aux else None

    # ---- the loop; with a bar on a terminal
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, disable=None):
        phase = phase_at(step, prune_start, finetune_start)
        if step == finetune_start and args.sparsity:  # the structure is chosen and cut out
            cut = {"accuracy_before_cut": accuracies(net, gates.deterministic(), data, args.device)}
            structure = given or masks.select(gates.prob_open(), args.sparsity, *sizes)
            net = model.extract(net, structure)
            optimizer = weight_optimizer(net, args.weight_decay)  # Adam's had the old shapes
            cut["accuracy_after_cut"] = accuracies(net, None, data, args.device)
        at_work = gates if phase == "prune" else None  # None: all units are open
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.lr, finetune_start, args.steps)

        # when and what is transferred; minimised are the losses of both tasks and the penalty
        parameters = {**dict(net.named_parameters()), "log_alpha": gates.log_alpha}
        window = (args.transfer_start, args.transfer_stop)
        aux_weight = transfer.aux_weight_at(step, args.aux_weight, *window)
        shared = transfer.transferred(parameters, args.transfer)
        loss_target = task_loss(net, at_work, target, step, args)
        g_target, g_aux = gradients(loss_target, parameters), {}
        terms = {"smoothed_loss_target": loss_target.item(), "smoothed_loss_aux": 0.0}
        if aux_weight:
            loss_aux = task_loss(net, at_work, auxiliary, step, args)
            g_aux = gradients(aux_weight * loss_aux, shared)
            terms["smoothed_loss_aux"] = loss_aux.item()

        # how the gradients of the tasks are coupled; the controller is no task, and comes after
        update = transfer.couple(g_target, g_aux, args.coupling)
        prob = gates.prob_open() if at_work else structure
        terms["penalty"] = 0.0
        terms["target_sparsity"] = masks.sparsity_at(step, args.sparsity, prune_start, prune_ramp)
        if at_work:
            gap = masks.sparsity(prob, *sizes) - terms["target_sparsity"]
            penalty = controller.penalty(gap)
            update["log_alpha"] = update["log_alpha"] + gradients(penalty, parameters)["log_alpha"]
            terms["penalty"] = penalty.item()
        for name, p in parameters.items():
            p.grad = update.get(name)
        terms["gradient_norm"] = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item()
        terms["lambda1"] = controller.lambda1.item()
        if not all(math.isfinite(term) for term in terms.values()):
            raise InputError(f"step {step}: {terms}; try a lower --lr")
        optimizer.step()
        gate_optimizer.step()
        if at_work:
            gates.clamp_()
            controller.ascend(gap)

        # evaluation, the best network of the fine-tuning, checkpoint
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == args.steps:
            z = gates.deterministic() if at_work else None
            scores = evaluate(net, data.validation, z, args.device)
            # terms and prob are from before the update, as the controller saw them; z is from after
            row = {"step": step + 1, "phase": phase, "aux_weight": aux_weight, **terms}
            row |= gate_numbers(prob, z or structure, sizes)
            row |= {f"validation_{name}": scores[name] for name in ("accuracy", "macro_f1", "loss")}
            history.append(row)
            tqdm.write(f"step {step + 1:5d}  {phase:8}  sparsity {row['expected_sparsity']:.3f}  "
                       f"loss {loss_target:.3f}  validation accuracy {scores['accuracy']:.3f}")
            score = (scores["accuracy"], -scores["loss"])  # the lower loss breaks ties
            if phase == "finetune" and score > best["score"]:
                best = {"score": score, "weights": copy.deepcopy(net.state_dict())}
            checkpoint = {
                "args": vars(args),
                "fingerprint": fingerprint,
                "step": step + 1,
                "seconds": time.time() - began,
                "history": history,
                "cut": cut,
                "best": best,
                "structure": tuple(structure),
                "net": net.state_dict(),
                "gates": gates.state_dict(),
                "controller": controller.state_dict(),
                "optimizer": optimizer.state_dict(),
                "gate_optimizer": gate_optimizer.state_dict(),
            }
            save_checkpoint(checkpoint, args.out_dir)

    # ---- final report
    net.load_state_dict(best["weights"])
    result = summary(net, args, data, parent, gates if learned else None, structure) | cut
    result |= {"validation_accuracy": best["score"][0], "fingerprint": fingerprint}
    result["seconds"] = time.time() - began
    save_result(result, net, args.out_dir)
    return result


# ----------------------------------------------------------------------------- before the loop


def read_parent(args):
    """The dense network that --init names, on --device, or None. Raises InputError."""
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        raise InputError(f"device {args.device} is not available here") from None
    if args.init is None:
        return None
    read = model.GatedTransformer.load if args.init.endswith(".pt") else model.load_bert
    parent = read(args.init).to(args.device)
    config = parent.config
    if set(config.heads) != {config.d_model // config.d_head} or not all(config.ffn):
        raise InputError(f"init: {args.init} is pruned; a parent is of a run with --sparsity 0")
    return parent


def with_shape(args, parent):
    """The flags, completed by the shape of the network: the parent's, or the default."""
    shape = {"n_layer": 4, "n_head": 4, "d_model": 64}
    if parent:
        heads, longest = parent.config.heads, parent.config.max_length
        shape = {"n_layer": len(heads), "n_head": heads[0], "d_model": parent.config.d_model}
        if args.max_length > longest:
            raise InputError(f"max_length: {args.init} reads at most {longest} tokens")
    named = {name: value for name, value in vars(args).items() if value is not None}
    for name, value in shape.items():
        if parent and named.get(name, value) != value:
            raise InputError(f"{name} {named[name]}: {args.init} has {value}; leave the flag out")
    return argparse.Namespace(**(vars(args) | shape | named))


def given_structure(args):
    """The structure that --structure names, Units of zeros and ones; None if gates choose it."""
    L, H = args.n_layer, args.n_head
    sizes = model.unit_sizes(args.d_model, H)
    if args.structure == "learned":
        return None
    if args.structure in ("random", "bottom"):
        height = torch.linspace(1, 0, L)
        prob = masks.Units(height.view(L, 1).expand(L, H), height)
        if args.structure == "random":
            draw = torch.Generator().manual_seed(100 * args.seed)  # more: from 100 s + i
            prob = masks.Units(torch.rand(L, H, generator=draw), torch.rand(L, generator=draw))
        return masks.select(prob, args.sparsity, *sizes)
    try:
        result = json.loads(Path(args.structure).read_text())
        heads, ffn = (torch.tensor(result[f"{unit}_kept"]).bool() for unit in ("heads", "ffn"))
        kept = masks.Units(heads, ffn)
        requested, shape = result["target_sparsity"], (*kept.head.shape, *kept.ffn.shape)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        raise InputError("structure is learned, random, bottom or a run's result.json") from None
    delivered = masks.sparsity(kept, *sizes)
    if (requested, shape) != (args.sparsity, (L, H, L)) or delivered < requested - 1e-6:
        raise InputError(f"structure: {args.structure} has other layers or heads, or sparsity")
    return masks.Units(kept.head.float(), kept.ffn.float())


def load(args, parent=None):
    """The Data of a run. parent: the network to start from."""
    target = (args.target, args.text_columns, args.label_column)
    aux = (args.aux, args.aux_text_columns, args.aux_label_column) if args.aux != "none" else None
    data = transfer.prepare(target, aux, n_target=args.n_target, max_length=args.max_length,
                            vocab_size=args.vocab_size, seed=args.seed, parent=parent)
    if args.aux_weight and args.transfer_start >= min(args.transfer_stop, args.steps):
        data.notes.append("no transfer: transfer_start is not before transfer_stop or steps")
    if parent and parent.config.bert and args.lr > 3e-4:
        data.notes.append(f"lr {args.lr:g} is high for a BERT, which forgets: try 1e-4")
    print_data(data)
    return data


def print_data(data):
    """What was read, in a few lines."""
    for task in data.labels:
        about = data.record[task]
        names = about["labels"]
        say(f"{task} {about['splits']['train']}, {len(names)} classes: {', '.join(names)[:70]}")
        for split, n in about["examples"].items():
            say(f"  {split}: {n} examples of {about['splits'][split]}")
        *texts, name = about["first"]
        say(f"  the first is {name[:40]!r}: {' | '.join(texts)[:80]!r}")
    unknown = data.record["unknown"]
    say(f"{len(data.vocab)} known tokens; unknown are {unknown['train']:.1%} in training, "
        f"{unknown['test']:.1%} in test")
    for note in data.notes:
        say(f"note: {note}")


def dense_network(args, data, parent=None):
    """The network before pruning, with random weights; of the parent's kind, if there is one."""
    bert = parent is not None and parent.config.bert
    shape = (len(data.vocab), args.max_length, args.d_model, args.d_model // args.n_head)
    heads, ffn = [args.n_head] * args.n_layer, [1] * args.n_layer
    config = model.Config(*shape, heads, ffn, n_texts=len(args.text_columns), bert=bert)
    return model.GatedTransformer(config, data.vocab, data.labels).to(args.device)


@torch.no_grad()
def inherit(net, parent):
    """Copy the parent's weights into a network of the same shape, embeddings of words by name.

    The target's classifier starts anew; the auxiliary one becomes a copy of that of the parent's
    target, if they have the same class names.
    """
    own = ("token.", "position.", "classifier.")  # depend on vocabulary, max_length, labels
    state = {name: p for name, p in parent.state_dict().items() if not name.startswith(own)}
    net.load_state_dict(state, strict=False)
    net.position.weight.copy_(parent.position.weight[: len(net.position.weight)])
    common = [word for word in net.vocab if word in parent.word_id]
    theirs = parent.token.weight[[parent.word_id[word] for word in common]]
    net.token.weight[[net.word_id[word] for word in common]] = theirs
    if "auxiliary" in net.labels and net.labels["auxiliary"] == parent.labels.get("target"):
        net.classifier["auxiliary"].load_state_dict(parent.classifier["target"].state_dict())


def weight_optimizer(net, weight_decay):
    """AdamW; only matrices are decayed. The loop sets the rate, `lr_at`."""
    matrices = [p for p in net.parameters() if p.dim() >= 2]
    vectors = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)


def fingerprint_of(data, parent, given):
    """A hash of all that a run reads. Runs that share it and their flags end in the same bits."""
    arrays = [part.numpy() for part in given or ()]
    if parent:
        arrays += [p.detach().cpu().numpy() for p in parent.parameters()]
    for examples in (data.train, data.validation, data.test, data.aux):
        if examples:
            arrays += [examples.label, np.array([len(ids) for ids in examples.ids]), *examples.ids]
    digest = hashlib.sha256(repr([data.vocab, data.labels]).encode(errors="replace"))
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def saved_run(args, fingerprint):
    """What --resume finds: a checkpoint, else the result of a finished run, else None.

    Raises InputError if it is of a run with other flags or one that read something else. For a new
    run the folder is made, or emptied: it belongs to one run.
    """
    out = Path(args.out_dir)
    found = [out / name for name in ("checkpoint.pt", "result.json") if (out / name).exists()]
    if not args.resume or not found:
        if args.resume:
            say(f"note: there is no run in {out} to resume: starting at step 0")
        out.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoint.pt", "result.json", "history.jsonl", "pruned.pt"):
            if (out / name).exists():
                say(f"note: {out / name} of an earlier run is removed")
                (out / name).unlink()
        return None
    try:
        if found[0].suffix == ".pt":
            saved = torch.load(found[0], map_location=args.device, weights_only=True)
        else:
            saved = json.loads(found[0].read_text())
        flags = dict(saved["args"])
    except Exception:  # whatever a truncated or foreign file provokes
        raise InputError(f"{found[0]} cannot be read: run without --resume") from None
    for name, value in vars(args).items():
        if name not in ("resume", "seeds", "out_dir") and flags.get(name) != value:
            raise InputError(f"{args.out_dir} holds a run with {name} {flags.get(name)}")
    if saved.get("fingerprint") != fingerprint:
        raise InputError(f"{args.out_dir} holds a run on other data, parent or structure")
    return saved


def save_checkpoint(checkpoint, out_dir):
    """Write history.jsonl, and checkpoint.pt: whole or as before, whatever happens."""
    lines = [json.dumps(row) + "\n" for row in checkpoint["history"]]
    Path(out_dir, "history.jsonl").write_text("".join(lines))
    torch.save(checkpoint, Path(out_dir, "checkpoint.tmp"))
    os.replace(Path(out_dir, "checkpoint.tmp"), Path(out_dir, "checkpoint.pt"))


def save_result(result, net, out_dir):
    """Write pruned.pt and result.json, and remove the checkpoint."""
    net.save(Path(out_dir, "pruned.pt"))
    Path(out_dir, "result.json").write_text(json.dumps(result, indent=1))
    Path(out_dir, "checkpoint.pt").unlink()  # the last: until then --resume makes these files again


# ----------------------------------------------------------------------------- one step

WARMUP = 100  # steps in which the learning rate rises to its full value


class Task:
    """A task as the loop sees it: examples, and `order`, from a step to its batch's indices."""

    def __init__(self, name, examples, args):
        self.name, self.examples = name, examples  # "target" or "auxiliary", as in net.classifier
        self.order = transfer.batch_order(examples, args.batch_size, noise_seed(args.seed, name, 0))


def phase_at(step, prune_start, finetune_start):
    """The phase of a run at `step`; gates are at work in "prune"."""
    if step >= finetune_start:
        return "finetune"
    return "prune" if step >= prune_start else "dense"


def lr_at(step, lr, finetune_start, steps):
    """Learning rate of the weights: linear warm-up, constant, linear to zero while fine-tuning."""
    return lr * min((step + 1) / WARMUP, 1, (steps - step) / (steps - finetune_start))


def noise_seed(seed, task, step):
    """Seed of everything random about the batch of one task ("target" or "auxiliary") at one step.

    Distinct for every task and step of all runs with seeds below 200: they are spaced by the most
    steps that a run may have, and stay below 2**32, since torch's CPU generator reads no further
    bits of a seed.
    """
    place = 2 * seed + 1 if task == "auxiliary" else 2 * seed
    return place * 10_000_000 + step


def task_loss(net, gates, task, step, args):
    """Cross-entropy (nats per example, with label smoothing) of one task's batch of this step.

    gates: None when every unit is open. Order and noise are functions of (seed, task, step): they
    never depend on the other task.
    """
    generator = torch.Generator(args.device).manual_seed(noise_seed(args.seed, task.name, step))
    ids, labels = task.examples.batch(task.order(step), args.device)
    z = gates.sample(generator) if gates else None
    drop = model.dropout_noise(net, args.batch_size, args.dropout, generator)
    logits = net(ids, task.name, z, drop)
    return F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)


def gradients(loss, parameters):
    """name -> gradient of `loss`, for those of `parameters` (name -> parameter) that it reaches."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found) if g is not None}


# -------------------------------------------------------------------------- measuring and reporting


@torch.no_grad()
def evaluate(net, examples, z, device):
    """Scores of the target task, a dict. z: gates or None.

    accuracy, macro_f1 (the mean over classes that occur or are predicted), loss (nats per example,
    without label smoothing), confusion (true class, predicted class; None from 100 classes on).
    """
    length = np.array([len(ids) for ids in examples.ids])
    order = np.argsort(length, kind="stable")  # similar lengths together: little padding
    at_once = max(1, 256**3 // max(256, length.max()) ** 2)  # texts; attention takes length**2 each
    parts = np.array_split(order, max(1, len(order) // at_once))
    logits = torch.cat([net(examples.batch(part, device)[0], "target", z) for part in parts])
    logits = logits.float().cpu()  # (N, C)
    labels, predicted = torch.from_numpy(examples.label[order]), logits.argmax(1)
    C = logits.shape[1]
    hits = labels[labels == predicted].bincount(minlength=C)
    f1 = 2 * hits.double() / (labels.bincount(minlength=C) + predicted.bincount(minlength=C))
    pairs = labels * C + predicted
    return {
        "accuracy": hits.sum().item() / len(labels),
        "macro_f1": f1.nanmean().item(),  # nan: a class that neither occurs nor is predicted
        "loss": F.cross_entropy(logits, labels).item(),
        "confusion": pairs.bincount(minlength=C * C).view(C, C).tolist() if C < 100 else None,
    }


def accuracies(net, z, data, device):
    """Accuracy on the validation and on the test split."""
    return {split: evaluate(net, getattr(data, split), z, device)["accuracy"]
            for split in ("validation", "test")}


def gate_numbers(prob, z, sizes):
    """What is reported about gates: probabilities and values, Units; sizes of model.unit_sizes."""
    head, ffn = (p.cpu().double().round(decimals=4).tolist() for p in prob)
    return {
        "expected_sparsity": masks.sparsity(prob, *sizes).item(),
        "deterministic_sparsity": masks.sparsity(masks.Units(z.head > 0, z.ffn > 0), *sizes).item(),
        "prob_open": {"head": head, "ffn": ffn},
    }


def summary(net, args, data, parent, gates, structure):
    """What result.json says of the final network: scores, gates, size beside the dense one's.

    gates: None if they did not learn the structure, Units of zeros and ones. Rest as in `train`.
    """
    prob = gates.prob_open() if gates else structure
    label, dense = data.test.label, dense_network(args, data, parent)
    scores = evaluate(net, data.test, None, args.device)
    return {
        **{f"test_{name}": score for name, score in scores.items()},
        "test_majority": np.bincount(label).max().item() / len(label),
        "label_order": data.labels["target"],
        "target_sparsity": args.sparsity,
        "delivered_sparsity": 1 - model.prunable(net) / model.prunable(dense),
        **gate_numbers(prob, structure, model.unit_sizes(args.d_model, args.n_head)),
        "heads_kept": structure.head.int().tolist(),
        "ffn_kept": structure.ffn.int().tolist(),
        "params_dense": sum(p.numel() for p in dense.parameters()),
        "params_pruned": sum(p.numel() for p in net.parameters()),
        "data": data.record,
        "notes": data.notes,
        "seed": args.seed,
        "args": vars(args),
        "torch": torch.__version__,
    }


def report(r):
    """Print what a reader of r, the dict in result.json, would look for first."""
    print(f"test accuracy {r['test_accuracy']:.3f}   macro-F1 {r['test_macro_f1']:.3f}   "
          f"validation accuracy {r['validation_accuracy']:.3f}   "
          f"(majority class {r['test_majority']:.3f})")
    print(f"sparsity delivered {r['delivered_sparsity']:.3f}, requested {r['target_sparsity']:.3f};"
          f" {r['params_pruned']:,} of {r['params_dense']:,} parameters left")
    if "accuracy_before_cut" in r:
        before, after = r["accuracy_before_cut"]["test"], r["accuracy_after_cut"]["test"]
        print(f"test accuracy before the cut {before:.3f}, right after it {after:.3f}")
    for i, (heads, ffn) in enumerate(zip(r["heads_kept"], r["ffn_kept"])):
        print(f"  layer {i}   heads {''.join('.#'[h] for h in heads)}   feed-forward {'.#'[ffn]}")
    say(f"training took {r['seconds']:.0f} s; pruned.pt, result.json and history.jsonl are in "
        f"{r['args']['out_dir']}/")


# ----------------------------------------------------------------------------- several seeds


def compare(args):
    """Run every seed with transfer and without; print means, 95 % intervals and what transfer adds.

    With --resume finished runs are not made again.
    """
    weights = {"transfer": args.aux_weight} if args.aux_weight else {}
    weights["no_transfer"] = 0.0
    results = {name: [] for name in weights}
    for seed in range(args.seed, args.seed + args.seeds):
        for name, aux_weight in weights.items():
            out_dir = str(Path(args.out_dir, f"{name}_{seed}"))
            say(f"seed {seed}, {name}, in {out_dir}:")
            changed = {"seed": seed, "aux_weight": aux_weight, "out_dir": out_dir}
            results[name].append(train(argparse.Namespace(**{**vars(args), **changed})))
    for split in ("validation", "test"):
        points = {name: [100 * result[f"{split}_accuracy"] for result in runs]
                  for name, runs in results.items()}
        if args.aux_weight:
            gains = np.subtract(points["transfer"], points["no_transfer"])
            points["gain, paired by seed"] = gains.tolist()
        for name, values in points.items():
            mean, half = interval(values)
            print(f"{split:10}  {name:20}  {mean:5.1f}, "
                  f"95 % interval [{mean - half:.1f}, {mean + half:.1f}]")


def interval(values):
    """Mean and half-width of the 95 % t-interval of independent values (nan for a single one)."""
    t975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # 1 to 7 degrees of freedom
    t975 += (2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145)
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    t = t975[min(max(len(values) - 1, 1), 14) - 1]  # beyond 14 a little too wide
    return statistics.mean(values), t * deviation / len(values) ** 0.5


# ----------------------------------------------------------------------------- the command line


def main():
    """The command line."""
    args = parse_args()
    try:
        if args.seeds > 1:
            compare(args)
        else:
            report(train(args))
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        reason = (str(error) or "out of memory").splitlines()[0]
        if isinstance(error, RuntimeError):
            if not re.search("memory|enforce fail", reason):
                raise  # a fault of the program
            reason = f"memory or disk is too small: {reason}"
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; with --resume the same command goes on from its last checkpoint, at "
              f"most {EVAL_EVERY} steps back", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
