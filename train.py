"""One run, from flags to report: prune a transformer for a task while an auxiliary task teaches it.

    python train.py --aux_weight 0.5 --transfer_start 1000      # the built-in pair of tasks
    python train.py --aux_weight 0                              # the same without transfer
    python train.py --target path/to/mine --aux path/to/other   # folders with train.jsonl, ...
    python train.py --init sentence-transformers/all-MiniLM-L6-v2 --lr 1e-4 ...   # from a BERT

Read `train` first: it is the whole run in the order in which things happen. What it calls stands
below it, by topic; above it stand the flags.
"""

import argparse
import hashlib
import io
import json
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
from model import InputError


def between(low, high, kind=float):
    """For argparse: a number of this kind within [low, high], or an error."""

    def number(text):  # the name is part of argparse's error: "invalid number value"
        value = kind(text)
        if not low <= value <= high:  # also true for nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


NATURAL = between(0, 10_000_000, int)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors, like those of bad data."""

    def error(self, message):
        raise InputError(message)


def parse_args(argv=None):
    """Flags of a run as a namespace; argv: list of strings, None = the command line. Raises
    InputError.
    """
    parser = Parser(description=__doc__.split("\n")[0], usage="python train.py [--flag value ...]",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    # data
    add("--target", default="reviews:restaurant", help="task: folder, file, Hugging Face Hub name")
    add("--aux", help="auxiliary task, or none; unset: reviews:film for the default target")
    add("--text_columns", nargs="+", default=["text"], help="columns of the texts: two for pairs")
    add("--label_column", default="label", help="column of the target's label")
    add("--aux_text_columns", nargs="+", default=["text"], help="columns of the auxiliary texts")
    add("--aux_label_column", default="label", help="column of the auxiliary label")
    add("--n_target", type=NATURAL, help="training examples, 0 = all; unset: all, or 200 built-in")
    add("--max_length", type=between(1, 4096, int), default=64, help="maximum sequence length")
    add("--vocab_size", type=between(4, 10**9, int), help="tokens; unset: 10,000, a BERT's: all")
    # model
    add("--init", help="start from a dense run's pruned.pt, or a BERT: folder or Hub name")
    add("--n_layer", type=between(1, 100, int), help="layers; unset: those of --init, else 4")
    add("--n_head", type=between(1, 1000, int), help="heads per layer; unset: likewise")
    add("--d_model", type=between(1, 10_000, int), help="hidden size; unset: likewise, or 64")
    add("--dropout", type=between(0, 0.99), default=0.1, help="dropout probability")
    # pruning; with all log_alpha at their lower limit the expected sparsity is 0.968
    add("--sparsity", type=between(0, 0.96), default=0.7, help="share of prunable weights to prune")
    add("--prune_start", type=NATURAL, default=500, help="step at which sparsity starts to rise")
    add("--prune_ramp", type=NATURAL, default=1000, help="steps over which it rises")
    add("--finetune_steps", type=between(1, 10**7, int), default=800, help="last steps, pruned")
    add("--structure", help="a run's result.json: prune to its structure, without gates")
    # transfer
    add("--aux_weight", type=between(0, 1e6), default=0.5, help="weight of the auxiliary loss")
    add("--transfer_start", type=NATURAL, default=0, help="when: first step with transfer")
    add("--transfer_stop", type=NATURAL, default=10_000_000, help="when: first step without")
    add("--coupling", choices=["sum", "project"], default="sum",
        help="how; project: remove the auxiliary gradient's component against the target's")
    add("--transfer", choices=["both", "weights", "gates"], default="both",
        help="what: parameters that the auxiliary loss trains")
    # optimization
    add("--steps", type=between(1, 10**7, int), default=3000, help="optimizer steps in all")
    add("--batch_size", type=between(1, 10_000, int), default=32, help="examples per task")
    add("--lr", type=between(1e-9, 1e3), default=1e-3, help="learning rate; 1e-4 for a BERT")
    add("--gate_lr", type=between(1e-9, 1e3), default=0.05, help="learning rate of the gates")
    add("--weight_decay", type=between(0, 1e3), default=0.01, help="decay of the matrices")
    add("--label_smoothing", type=between(0, 0.99), default=0.1, help="probability spread evenly")
    # run
    add("--seed", type=between(0, 10**6, int), default=0, help="decides subset, weights and noise")
    add("--seeds", type=between(1, 1000, int), default=1, help="number of seeds to compare")
    add("--resume", action="store_true", help="resume the interrupted run of the same command")
    add("--out_dir", default="out", help="folder for result.json, history.jsonl and pruned.pt")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="where the networks are")
    args = parser.parse_args(argv)
    built_in = args.target == "reviews:restaurant"
    if args.aux is None:  # a user's task trains alone unless a second one is named
        args.aux = "reviews:film" if built_in else "none"
    if args.n_target is None:
        args.n_target = 200 if built_in else 0
    if args.aux == "none":
        args.aux_weight = 0.0

    # what would run, but not do what was meant
    needed = args.finetune_steps
    if args.sparsity and not args.structure:  # the ramp, and the time that a gate takes to close
        needed += args.prune_start + args.prune_ramp
        needed += round((masks.INIT + masks.LIMIT) / args.gate_lr)
    if needed > args.steps:
        parser.error(f"--steps {args.steps}: the phases need {needed}: see --prune_start, ...")
    if args.seeds > 1 and not args.aux_weight:
        parser.error("--seeds compares with and without transfer: it needs --aux and --aux_weight")
    for name in ("target", "aux", "init", "structure", "out_dir"):
        if getattr(args, name) == "":
            parser.error(f"--{name} is empty: is a shell variable not set?")
    for path in (Path(args.init or ""), Path(args.structure or "")):
        if path.is_file() and Path(args.out_dir).resolve() in path.resolve().parents:
            parser.error(f"{path} lies in out_dir, which is overwritten: use another --out_dir")
    return args


# ----------------------------------------------------------------------------- the run

EVAL_EVERY = 100  # steps between two evaluations on the validation split, each with a checkpoint


def train(args):
    """One run from data to network. Returns the dict in result.json. Raises InputError."""
    # ---- data, network, gates
    torch.set_float32_matmul_precision("medium")  # by oneDNN; on some processors in bfloat16
    out = Path(args.out_dir)
    parent = read_parent(args) if args.init else None
    args = argparse.Namespace(**vars(args))  # completed by shape and digest
    args.n_layer = len(parent.config.heads) if parent else args.n_layer or 4
    args.n_head = parent.config.heads[0] if parent else args.n_head or 4
    args.d_model = parent.config.d_model if parent else args.d_model or 64
    if args.d_model % args.n_head:
        raise InputError(f"d_model {args.d_model} is no multiple of n_head {args.n_head}")
    sizes = model.unit_sizes(args.d_model, args.n_head)
    given = given_structure(args) if args.structure else None  # None: gates learn it
    data = transfer.prepare(args, parent)
    print_data(data, args.max_length)
    torch.manual_seed(args.seed)  # not earlier: reading a parent draws random numbers
    net = dense_network(args, data, parent)
    args.data_digest = digest_of(data, parent, given)
    params_dense = sum(p.numel() for p in net.parameters())
    gates = masks.Gates(args.n_layer, args.n_head).to(args.device)
    controller = masks.Controller(args.gate_lr).to(args.device)
    optimizer = weight_optimizer(net, args.weight_decay)
    # a short memory, because the push of the controller changes its sign often
    gate_optimizer = torch.optim.Adam(gates.parameters(), lr=args.gate_lr, betas=(0.5, 0.9))
    structure = gates.combine(torch.ones_like(gates.log_alpha))  # all units, until it is chosen
    start_step, start_time, history, cut = 0, time.time(), [], {}
    best = {"score": (-1.0, 0.0), "weights": None}

    # ---- or all of it as the checkpoint has it
    out.mkdir(parents=True, exist_ok=True)
    saved = read_checkpoint(args)
    if saved and "result" in saved:  # the run was finished
        return saved["result"]
    (out / "pruned.pt").unlink(missing_ok=True)  # of an earlier run
    if saved:
        start_step, history = saved["step"], saved["history"]
        cut, best = saved["cut"], saved["best"]
        if cut:
            structure = masks.Units(*saved["structure"])
            net = model.extract(net, structure)
            optimizer = weight_optimizer(net, args.weight_decay)
        parts = (net, gates, controller, optimizer, gate_optimizer)
        for part, state in zip(parts, saved["states"], strict=True):
            part.load_state_dict(state)

    # ---- schedule and batches
    finetune_start = args.steps - args.finetune_steps
    learned = args.sparsity and given is None
    prune_start = args.prune_start if learned else finetune_start
    target = Task("target", data.splits["train"], args)
    auxiliary = Task("auxiliary", data.splits["aux"], args) if "aux" in data.splits else None

    # ---- the loop; with a bar on a terminal
    for step in tqdm(range(start_step, args.steps), disable=None if sys.stderr else True):
        phase = phase_at(step, prune_start, finetune_start)
        if step == finetune_start and args.sparsity:  # the structure is chosen, the rest pruned
            cut = {"accuracy_before_cut": accuracies(net, gates.deterministic(), data, args.device)}
            structure = given or masks.select(gates.prob_open(), args.sparsity, *sizes)
            net = model.extract(net, structure)
            optimizer = weight_optimizer(net, args.weight_decay)  # its moments had the old shapes
            cut["accuracy_after_cut"] = accuracies(net, None, data, args.device)
        active = gates if phase == "prune" else None  # None: all units are open
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.lr, finetune_start, args.steps)

        # when and what: the gradients of the target's and of the weighted auxiliary loss
        parameters = {**dict(net.named_parameters()), "log_alpha": gates.log_alpha}
        window = (args.transfer_start, args.transfer_stop)
        aux_weight = transfer.aux_weight_at(step, args.aux_weight, *window)
        shared = transfer.transferred(parameters, args.transfer)
        loss_target = task_loss(net, active, target, step, args)
        g_target = gradients(loss_target, parameters)
        g_aux, loss_aux, penalty = {}, torch.zeros(()), torch.zeros(())
        if aux_weight:
            loss_aux = task_loss(net, active, auxiliary, step, args)
            g_aux = gradients(aux_weight * loss_aux, shared)

        # how the gradients of the tasks are coupled; the controller is no task, and comes after
        update = transfer.couple(g_target, g_aux, args.coupling)
        prob = gates.prob_open() if active else structure
        target_sparsity = args.sparsity if phase == "finetune" else 0.0
        if active:
            target_sparsity = masks.sparsity_at(step, args.sparsity, prune_start, args.prune_ramp)
            gap = masks.sparsity(prob, *sizes) - target_sparsity
            penalty = controller.penalty(gap)
            update["log_alpha"] = update["log_alpha"] + gradients(penalty, parameters)["log_alpha"]
        for name, p in parameters.items():
            p.grad = update.get(name)
        lambda1 = controller.lambda1.item()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if not norm.isfinite():
            raise InputError(f"step {step}: the gradient is not finite; try a lower --lr")
        optimizer.step()
        gate_optimizer.step()
        if active:
            gates.clamp_()
            controller.ascend(gap)

        # evaluation, the best network of the fine-tuning, checkpoint
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == args.steps:
            z = gates.deterministic() if active else None
            scores = evaluate(net, data.splits["validation"], z, args.device)
            # losses, penalty, lambda1 and prob are from before the update; z and scores after it
            row = {
                "step": step + 1,
                "phase": phase,
                "aux_weight": aux_weight,
                "loss_target": loss_target.item(),
                "loss_aux": loss_aux.item(),
                "penalty": penalty.item(),
                "lambda1": lambda1,
                "gradient_norm": norm.item(),
                "target_sparsity": target_sparsity,
                **gate_numbers(prob, z or structure, sizes),
                **{f"validation_{name}": score for name, score in scores.items()},
            }
            history.append(row)
            tqdm.write(f"step {step + 1:5d}  {phase:8}  sparsity {row['expected_sparsity']:.3f}  "
                       f"loss {loss_target:.3f}  validation accuracy {scores['accuracy']:.3f}")
            score = (scores["accuracy"], -scores["loss"])  # the lower loss breaks ties
            if phase == "finetune" and score > best["score"]:
                weights = {name: p.clone() for name, p in net.state_dict().items()}
                best = {"score": score, "weights": weights}
            parts = (net, gates, controller, optimizer, gate_optimizer)
            checkpoint = {
                "args": vars(args),
                "step": step + 1,
                "history": history,
                "cut": cut,
                "best": best,
                "structure": tuple(structure),
                "states": [part.state_dict() for part in parts],
            }
            save_checkpoint(checkpoint, out)

    # ---- final report
    net.load_state_dict(best["weights"])
    net.save(out / "pruned.pt")
    result = summary(net, args, data, gates.prob_open() if learned else structure, structure) | cut
    result |= {"validation_accuracy": best["score"][0], "params_dense": params_dense}
    result["seconds"] = time.time() - start_time
    (out / "result.json").write_text(json.dumps(result, indent=1))
    # last, and without the weights: until then --resume makes these files again
    save_checkpoint({"args": vars(args), "history": history, "result": result}, out)
    return result


# ----------------------------------------------------------------------------- before the loop


def read_parent(args):
    """The dense network that --init names, on --device. Raises InputError."""
    read = model.GatedTransformer.load if args.init.endswith(".pt") else model.load_bert
    parent = read(args.init).to(args.device)
    config = parent.config
    if set(config.heads) != {config.d_model // config.d_head} or not all(config.ffn):
        raise InputError(f"init: {args.init} is pruned; a parent is of a run with --sparsity 0")
    if not all(p.isfinite().all() for p in parent.parameters()):
        raise InputError(f"init: {args.init} has weights that are not finite (NaN or infinite)")
    if args.max_length > config.max_length:
        raise InputError(f"max_length: {args.init} reads at most {config.max_length} tokens")
    shape = {"n_layer": len(config.heads), "n_head": config.heads[0], "d_model": config.d_model}
    for name, value in shape.items():
        if getattr(args, name) not in (None, value):
            raise InputError(f"{name}: {args.init} has {value}; leave the flag out")
    return parent


def given_structure(args):
    """The structure of the run whose result.json --structure names, Units of zeros and ones. Raises
    InputError for one of another shape or sparsity.
    """
    try:
        result = json.loads(Path(args.structure).read_text())
        kept = masks.Units(torch.tensor(result["heads_kept"]), torch.tensor(result["ffn_kept"]))
        sparsity, shape = result["target_sparsity"], (*kept.head.shape, *kept.ffn.shape)
    except Exception as error:  # whatever a missing, truncated or foreign file provokes
        raise InputError(f"structure: {args.structure} is no run's result.json: {error}") from None
    if shape != (args.n_layer, args.n_head, args.n_layer) or sparsity != args.sparsity:
        raise InputError(f"structure: {args.structure} is of another shape, or another --sparsity")
    return masks.Units(kept.head.float(), kept.ffn.float())


def print_data(data, max_length):
    """What was read, in a few lines."""
    for task, names in data.labels.items():
        print(f"{task}: {len(names)} classes: {str(names):.70}")
    for split, examples in data.splits.items():
        n = len(examples.ids)
        full = np.mean([len(ids) == max_length for ids in examples.ids])
        unknown = np.mean(np.concatenate(examples.ids) == model.UNK)
        print(f"  {split}: {n} texts, {full:.0%} at max_length; {unknown:.1%} of tokens unknown")
        if full > 0.1:
            print(f"note: many {split} texts fill --max_length: longer ones are truncated")
        if n < 100 and split in ("validation", "test"):
            print(f"note: only {n} {split} texts: accuracies are uncertain")
    train_split = data.splits["train"]
    text = " ".join(data.vocab[token] for token in train_split.ids[0])
    print(f"  the first: {text:.70}: {data.labels['target'][train_split.label[0]]}")


@torch.no_grad()
def dense_network(args, data, parent=None):
    """The network before pruning: with random weights, or with the parent's where shapes agree.

    Embeddings are copied by word. The target's classifier starts anew; the auxiliary one becomes a
    copy of that of the parent's target, if they have the same class names.
    """
    shape = (len(data.vocab), args.max_length, args.d_model, args.d_model // args.n_head)
    heads, ffn, n_texts = [args.n_head] * args.n_layer, [1] * args.n_layer, len(args.text_columns)
    bert, cased = (parent.config.bert, parent.config.cased) if parent else (False, False)
    config = model.Config(*shape, heads, ffn, n_texts, bert, cased)
    net = model.GatedTransformer(config, data.vocab, data.labels).to(args.device)
    if parent:
        own = ("token.", "position.", "classifier.")  # depend on vocabulary, max_length, labels
        state = {name: p for name, p in parent.state_dict().items() if not name.startswith(own)}
        net.load_state_dict(state, strict=False)
        net.position.weight.copy_(parent.position.weight[: args.max_length])
        common = [word for word in net.vocab if word in parent.word_id]
        theirs = parent.token.weight[[parent.word_id[word] for word in common]]
        net.token.weight[[net.word_id[word] for word in common]] = theirs
        if "auxiliary" in net.labels and net.labels["auxiliary"] == parent.labels.get("target"):
            net.classifier["auxiliary"].load_state_dict(parent.classifier["target"].state_dict())
    return net


def weight_optimizer(net, weight_decay):
    """AdamW; only matrices are decayed. The loop sets the rate, `lr_at`."""
    groups = [{"params": [p for p in net.parameters() if p.dim() >= 2]},
              {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)


def digest_of(data, parent, given):
    """A hash of what a run reads: words, class names, examples, a parent's weights, a structure."""
    digest = hashlib.sha256(repr([data.vocab, data.labels]).encode())
    for examples in data.splits.values():
        for array in (examples.label, [len(ids) for ids in examples.ids], *examples.ids):
            digest.update(np.asarray(array).tobytes())
    for tensor in (*(parent.parameters() if parent else ()), *(given or ())):
        digest.update(tensor.numpy(force=True))
    return digest.hexdigest()


def read_checkpoint(args):
    """The checkpoint from which --resume goes on, or None. Raises InputError for one of a run with
    other flags, or one that read other data, another parent or structure (data_digest).
    """
    path = Path(args.out_dir, "checkpoint.pt")
    if not args.resume or not path.exists():
        return None
    try:
        saved = torch.load(path, map_location=args.device, weights_only=True)
        flags = dict(saved["args"])
    except Exception:  # whatever a truncated or foreign file provokes
        raise InputError(f"{path} cannot be read: run without --resume") from None
    for name, value in vars(args).items():
        if name not in ("resume", "seeds", "out_dir") and flags.get(name) != value:
            raise InputError(f"{path} is of a run with another {name}: {flags.get(name)}")
    return saved


def save_checkpoint(checkpoint, out):
    """Write history.jsonl and checkpoint.pt; the latter is never left half written."""
    lines = [json.dumps(row) + "\n" for row in checkpoint["history"]]
    (out / "history.jsonl").write_text("".join(lines))
    content = io.BytesIO()  # not into the file at once, where torch hides a full disk and Ctrl-C
    torch.save(checkpoint, content)
    (out / "checkpoint.tmp").write_bytes(content.getvalue())
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")


# ----------------------------------------------------------------------------- one step

WARMUP = 100  # steps in which the learning rate rises to its full value


class Task:
    """A task as the loop sees it: examples, and `order`, from a step to its batch's indices."""

    def __init__(self, name, examples, args):
        self.name, self.examples = name, examples  # "target" or "auxiliary", as in net.classifier
        self.order = transfer.batch_order(examples, args.batch_size, noise_seed(args.seed, name, 0))


def phase_at(step, prune_start, finetune_start):
    """The phase of a run at `step`; gates are active in "prune"."""
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
    return (2 * seed + (task == "auxiliary")) * 10_000_000 + step


def task_loss(net, gates, task, step, args):
    """Cross-entropy (nats per example, with label smoothing) of one task's batch of this step.

    gates: None when every unit is open. Order and noise are functions of (seed, task, step): they
    never depend on the other task.
    """
    generator = torch.Generator(args.device).manual_seed(noise_seed(args.seed, task.name, step))
    ids, labels = task.examples.batch(task.order(step), args.device)
    z = gates.sample(generator) if gates else None
    dropout_masks = model.dropout_masks(net, args.batch_size, args.dropout, generator)
    logits = net(ids, task.name, z, dropout_masks)
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
    without label smoothing).
    """
    # similar lengths together: little padding
    order = np.argsort([len(ids) for ids in examples.ids], kind="stable")
    parts = [order[start : start + 128] for start in range(0, len(order), 128)]
    logits = torch.cat([net(examples.batch(part, device)[0], "target", z) for part in parts]).cpu()
    labels, predicted = torch.from_numpy(examples.label[order]), logits.argmax(1)
    C = logits.shape[1]
    hits = labels[labels == predicted].bincount(minlength=C)
    f1 = 2 * hits.double() / (labels.bincount(minlength=C) + predicted.bincount(minlength=C))
    return {
        "accuracy": hits.sum().item() / len(labels),
        "macro_f1": f1.nanmean().item(),  # nan: a class that neither occurs nor is predicted
        "loss": F.cross_entropy(logits, labels).item(),
    }


def accuracies(net, z, data, device):
    """Accuracy on the validation and on the test split."""
    return {s: evaluate(net, data.splits[s], z, device)["accuracy"] for s in ("validation", "test")}


def gate_numbers(prob, z, sizes):
    """What is reported about gates: probabilities and values, Units; sizes of model.unit_sizes."""
    return {
        "expected_sparsity": masks.sparsity(prob, *sizes).item(),
        "deterministic_sparsity": masks.sparsity(masks.Units(z.head > 0, z.ffn > 0), *sizes).item(),
        "prob_open": {"head": prob.head.tolist(), "ffn": prob.ffn.tolist()},
    }


def summary(net, args, data, prob, structure):
    """What result.json says of the final network: scores, gates, size. prob, structure: Units."""
    sizes, label = model.unit_sizes(args.d_model, args.n_head), data.splits["test"].label
    scores = evaluate(net, data.splits["test"], None, args.device)
    return {
        **{f"test_{name}": score for name, score in scores.items()},
        "test_majority": np.bincount(label).max().item() / len(label),
        "target_sparsity": args.sparsity,
        "delivered_sparsity": masks.sparsity(structure, *sizes).item(),
        **gate_numbers(prob, structure, sizes),
        "heads_kept": structure.head.int().tolist(),
        "ffn_kept": structure.ffn.int().tolist(),
        "params_pruned": sum(p.numel() for p in net.parameters()),
        "class_names": data.labels,
        "examples": {split: len(examples.ids) for split, examples in data.splits.items()},
        "args": vars(args),
        "torch": str(torch.__version__),
    }


def report(r):
    """Print what a reader of r, the dict in result.json, would look for first."""
    print("test accuracy {test_accuracy:.3f}   macro-F1 {test_macro_f1:.3f}   validation accuracy "
          "{validation_accuracy:.3f}   (majority class {test_majority:.3f})".format(**r))
    print("sparsity delivered {delivered_sparsity:.3f}, requested {target_sparsity:.3f}; "
          "{params_pruned:,} of {params_dense:,} parameters left".format(**r))
    if "accuracy_before_cut" in r:
        before, after = r["accuracy_before_cut"]["test"], r["accuracy_after_cut"]["test"]
        print(f"test accuracy before the cut {before:.3f}, right after it {after:.3f}")
    for i, (heads, ffn) in enumerate(zip(r["heads_kept"], r["ffn_kept"])):
        print(f"  layer {i}   heads {''.join('.#'[h] for h in heads)}   feed-forward {'.#'[ffn]}")
    print(f"pruned.pt and result.json are in {r['args']['out_dir']}/ after {r['seconds']:.0f} s")


# ----------------------------------------------------------------------------- several seeds


def compare(args):
    """Run every seed with transfer and without, each in a folder of its own in out_dir; print means
    and what transfer adds, paired by seed. All runs are tested on the same texts: where these are
    few, their chance is not in the interval. With --resume no complete run is trained again.
    """
    results = {"transfer": [], "no_transfer": []}
    for seed in range(args.seed, args.seed + args.seeds):
        for name, aux_weight in zip(results, (args.aux_weight, 0.0)):
            out_dir = f"{args.out_dir}/{name}_{seed}"
            print(f"seed {seed}, {name}, in {out_dir}:")
            changed = {"seed": seed, "aux_weight": aux_weight, "out_dir": out_dir}
            results[name].append(train(argparse.Namespace(**(vars(args) | changed))))
    for split in ("validation", "test"):
        helped, alone = ([100 * r[f"{split}_accuracy"] for r in runs] for runs in results.values())
        gain, half = interval(np.subtract(helped, alone))
        print(f"{split} accuracy {np.mean(helped):.1f} with transfer, {np.mean(alone):.1f} without,"
              f" gain {gain:.1f}, 95 % interval over seeds {gain - half:.1f} to {gain + half:.1f}")


def interval(values):
    """Mean and half-width of the 95 % t-interval of two or more independent values."""
    t975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # 1 to 7 degrees of freedom
    t975 += (2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145)
    t = t975[min(len(values), 15) - 2]  # beyond 14 a little too wide
    return np.mean(values), t * np.std(values, ddof=1) / len(values) ** 0.5


# ----------------------------------------------------------------------------- the command line


def main():
    """The command line."""
    # names that the console cannot encode are escaped, and a log file grows line by line
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        args = parse_args()
        if args.seeds > 1:
            compare(args)
        else:
            report(train(args))
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command with --resume continues from the last checkpoint")


if __name__ == "__main__":
    main()
