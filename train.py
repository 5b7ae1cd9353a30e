"""Prune a small transformer for one task while a second task helps: the whole run, readable from top to
bottom.

    python train.py --aux_weight 0.5 --transfer_start 1000              # built-in pair of tasks, no download
    python train.py --aux_weight 0                                      # the same without transfer
    python train.py --target path/to/mine --aux path/to/other           # folders with train.jsonl, ...
    python train.py --target nyu-mll/glue:rte --aux nyu-mll/glue:mnli   # the hub, with configuration

    0 ............ prune_start ....... prune_start+prune_ramp ....... steps-finetune_steps ....... steps
    dense training | sparsity target rises | held at the target      | structure fixed, fine-tune  |
         transfer_start ........................................ transfer_stop
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from masks import Z, Gates, lagrangian, max_sparsity, select, sparsity, sparsity_at, steps_to_settle
from model import Config, GatedTransformer, dropout_noise, evaluate, extract, interval, latency_ms, prunable
from transfer import InputError, aux_weight_at, batch_order, couple, prepare, transferred

EVAL_EVERY = 100  # steps between two evaluations on the validation split
WARMUP = 100  # steps in which the learning rate rises to its full value
LAMBDA_LR = 0.3  # learning rate of the two multipliers


def keep_freed_memory():
    """Tell glibc not to hand freed memory back to the system: fetching it again for every tensor costs a
    quarter of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def parse_args(argv=None):
    """Flags of a run as a namespace; argv: list of strings, None = the command line. Raises InputError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    add = parser.add_argument
    # data
    add("--target", default="reviews:restaurant", help="task to solve: hub name[:config], folder or file")
    add("--aux", default="reviews:film", help="task that helps, named in the same way; none = no second task")
    add("--text_columns", nargs="+", help="text columns of the target, and of aux if it has them")
    add("--label_column", nargs="+", help="label column of the target, and of aux if different")
    add("--n_target", type=int, default=200, help="labelled target examples to train on, >= 2; 0 = all")
    add("--max_length", type=int, default=64, help="words of a text that are read, 1 to 4096")
    add("--vocab_size", type=int, default=10000, help="words known, the most frequent ones, >= 4")
    # model
    add("--n_layer", type=int, default=4, help="layers, >= 1")
    add("--n_head", type=int, default=4, help="attention heads per layer, >= 1")
    add("--d_model", type=int, default=64, help="width of the network, a multiple of n_head")
    add("--dropout", type=float, default=0.1, help="dropout probability, in [0, 1)")
    # pruning
    add("--sparsity", type=float, default=0.7, help="prunable weights to remove, in [0, reachable)")
    add("--prune_start", type=int, default=500, help="step at which the sparsity target starts to rise")
    add("--prune_ramp", type=int, default=1000, help="steps over which it rises to its full value, >= 1")
    add("--finetune_steps", type=int, default=800, help="last steps, in which the structure is fixed, >= 1")
    add("--structure", choices=["learned", "random"], default="learned", help="random: a control")
    # transfer
    add("--aux_weight", type=float, default=0.5, help="weight of the auxiliary loss, >= 0; 0 = no transfer")
    add("--transfer_start", type=int, default=1000, help="when: first step with the auxiliary loss")
    add("--transfer_stop", type=int, default=None, help="when: first step without it again; default: never")
    add("--target_start", type=int, default=0, help="when: first step with the target loss")
    add("--coupling", choices=["sum", "project"], default="sum", help="how: conflicts stay or go")
    add("--transfer", choices=["both", "weights", "gates"], default="both", help="what it reaches")
    add("--aux_shuffle", action="store_true", help="a control: auxiliary labels in random order")
    # optimization
    add("--steps", type=int, default=3000, help="optimizer steps in all, >= 1")
    add("--batch_size", type=int, default=32, help="examples of each task per step, >= 1")
    add("--lr", type=float, default=1e-3, help="learning rate of the weights, > 0")
    add("--gate_lr", type=float, default=0.05, help="most that a gate moves per step, about, > 0")
    add("--weight_decay", type=float, default=0.01, help="decay of the matrices, never of gates, >= 0")
    add("--label_smoothing", type=float, default=0.1, help="probability spread over all labels, in [0, 1)")
    # run
    add("--seed", type=int, default=0, help="subset, initialisation, order and noise follow it, >= 0")
    add("--seeds", type=int, default=1, help="runs, with seeds seed, seed + 1, ...; >= 1")
    add("--baseline", action="store_true", help="run every seed without transfer too, and compare")
    add("--out_dir", default="out", help="folder for result.json, history.jsonl and pruned.pt")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args(argv)


def fail(message):
    raise InputError(message)


def check(args):
    """Raise InputError, with the reason, for settings that cannot work."""
    lowest = {"vocab_size": 4, "lr": 1e-9, "gate_lr": 1e-9}
    lowest |= dict.fromkeys(["max_length", "n_layer", "n_head", "d_model"], 1)
    lowest |= dict.fromkeys(["prune_ramp", "finetune_steps", "steps", "batch_size", "seeds"], 1)
    highest = {"dropout": 0.99, "label_smoothing": 0.99, "max_length": 4096}
    for name, value in vars(args).items():
        low, high = lowest.get(name, 0), highest.get(name, 1e9)
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"{name} must be at least {low} and at most {high:g}, not {value}")
    if args.transfer_stop is not None and args.transfer_stop < args.transfer_start:
        fail(f"transfer_stop {args.transfer_stop} lies before transfer_start {args.transfer_start}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        fail(f"device {args.device} is not available here")
    if args.d_model % args.n_head:
        fail(f"d_model {args.d_model} is not divisible by n_head {args.n_head}")
    reachable = max_sparsity(args.n_layer, args.n_head, *unit_sizes(args))
    if args.sparsity >= reachable:
        fail(f"sparsity must be below {reachable:.3f}, which the gates can reach, not {args.sparsity}")
    if args.sparsity:
        window = args.steps - args.finetune_steps - args.prune_start
        if args.prune_ramp > window:
            fail(f"prune_start + prune_ramp + finetune_steps is more than the {args.steps} steps")
        if steps_to_settle(args.gate_lr) > window:
            needed = steps_to_settle(args.gate_lr)
            fail(f"at gate_lr {args.gate_lr} pruning needs {needed} steps before fine-tuning, not {window}")


def unit_sizes(args):
    """Parameters of one head and of one feed-forward sublayer."""
    return 4 * args.d_model * (args.d_model // args.n_head), 8 * args.d_model**2


def make_optimizer(model, gates, args):
    """One fused AdamW: matrices are decayed, gates never are, and the multipliers go uphill."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "lr": args.lr, "weight_decay": args.weight_decay},
        {"params": vectors, "lr": args.lr},
        {"params": [gates.log_alpha], "lr": args.gate_lr, "betas": (0.5, 0.9)},  # short memory: no overshoot
        {"params": [gates.lambdas], "lr": LAMBDA_LR, "maximize": True},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98), fused=True)


def lr_at(step, args):
    """Learning rate of the weights: linear warm-up, constant, linear to zero over the fine-tuning steps."""
    left = (args.steps - step) / max(args.finetune_steps, 1)
    return args.lr * min((step + 1) / WARMUP, 1, left)


def random_prob(gates, seed):
    """Random numbers in place of learned probabilities, for the control with a random structure."""
    draw = torch.rand(gates.log_alpha.shape, generator=torch.Generator().manual_seed(seed))
    return Z(draw[:, :-2].to(gates.log_alpha.device), draw[:, -1].to(gates.log_alpha.device))


def phase_at(step, args):
    """Name of the phase that `step` belongs to."""
    if step >= args.steps - args.finetune_steps:
        return "finetune"
    return "prune" if args.sparsity and args.structure == "learned" and step >= args.prune_start else "dense"


def stream(task, args):
    """Seed of everything random about one task; it differs between tasks and between runs."""
    return 2 * args.seed + (task == "auxiliary")


def task_loss(model, gates, task, examples, order, step, args):
    """Cross-entropy (nats per example) of one task's batch of this step, with noise of its own.

    gates: None when every unit is open. Order and noise depend on (seed, step, task) alone: never on the
    other task. """
    generator = torch.Generator(args.device).manual_seed(stream(task, args) * 10_000_019 + step)
    ids, labels = examples.batch(order(step), args.device)
    z = None if gates is None else gates.sample(generator)
    drop = dropout_noise(model, len(ids), args.dropout, generator) if args.dropout else None
    return F.cross_entropy(model(ids, task, z, drop), labels, label_smoothing=args.label_smoothing)


def backward(model, gates, pruning, loss_target, penalty, loss_aux, args):
    """Fill .grad of every parameter with the coupled gradients. loss_aux: already weighted, None = no
    transfer now."""
    for p in [*model.parameters(), *gates.parameters()]:
        p.grad = None
    if loss_target.requires_grad or penalty.requires_grad:
        (loss_target + penalty).backward()
    if loss_aux is not None:
        weights = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
        shared = transferred(weights, [gates.log_alpha] if pruning else [], args.transfer)
        own = list(model.classifier["auxiliary"].parameters())
        g_aux = torch.autograd.grad(loss_aux, shared + own, materialize_grads=True)
        g_target = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
        update = couple(g_target, g_aux[: len(shared)], args.coupling) + list(g_aux[len(shared) :])
        for p, g in zip(shared + own, update):
            p.grad = g


def train(args):
    """One run from data to extracted network. args: as from parse_args. Returns the dict that result.json
    holds."""
    keep_freed_memory()
    # ---- settings and data: everything that can be refused is refused before anything is written
    check(args)
    began = time.time()
    stop = args.steps if args.transfer_stop is None else args.transfer_stop
    data = prepare(args.target, args.aux, args.n_target, args.max_length, args.vocab_size, args.text_columns,
                   args.label_column, args.seed)
    if args.aux_shuffle and data.aux:
        np.random.default_rng(args.seed).shuffle(data.aux.label)
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        history = open(os.path.join(args.out_dir, "history.jsonl"), "w")
    except OSError as error:
        fail(f"cannot write to out_dir: {error}")
    print(f"{args.target}: {len(data.train.label)} training, {len(data.validation.label)} validation, "
          f"{len(data.test.label)} test examples; {len(data.vocab)} known words")
    if data.aux:
        print(f"{args.aux}: {len(data.aux.label)} auxiliary examples")
    print(*(f"note: {note}" for note in data.notes), sep="\n")

    # ---- model and gates
    torch.manual_seed(args.seed)
    d_head = args.d_model // args.n_head
    heads, ffn = [args.n_head] * args.n_layer, [1] * args.n_layer
    config = Config(len(data.vocab), args.max_length, args.d_model, d_head, heads, ffn)
    model = dense = GatedTransformer(config, data.vocab, data.labels).to(args.device)
    gates = Gates(args.n_layer, args.n_head).to(args.device)
    sizes = unit_sizes(args)
    structure = Z(torch.ones(args.n_layer, args.n_head), torch.ones(args.n_layer))
    optimizer = make_optimizer(model, gates, args)
    order = {"target": batch_order(data.train, args.batch_size, stream("target", args))}
    if data.aux:
        order["auxiliary"] = batch_order(data.aux, args.batch_size, stream("auxiliary", args))
    best, expected = None, torch.zeros(())

    # ---- the loop
    bar = tqdm(range(args.steps), disable=None)
    for step in bar:
        phase = phase_at(step, args)
        pruning = phase == "prune"
        if args.sparsity and step == args.steps - args.finetune_steps:  # the structure is chosen and cut out
            prob = gates.prob_open() if args.structure == "learned" else random_prob(gates, args.seed)
            structure = select(prob, args.sparsity, *sizes)
            model = extract(dense, structure)
            optimizer = make_optimizer(model, gates, args)
        for group in optimizer.param_groups[:2]:
            group["lr"] = lr_at(step, args)

        # the objective: target loss + Lagrangian, and the weighted auxiliary loss
        active = gates if pruning else None
        aux_weight = aux_weight_at(step, args.aux_weight, args.transfer_start, stop) if data.aux else 0.0
        loss_target = penalty = torch.zeros(())
        loss_aux = None
        if step >= args.target_start:
            loss_target = task_loss(model, active, "target", data.train, order["target"], step, args)
        if aux_weight:
            loss_aux = task_loss(model, active, "auxiliary", data.aux, order["auxiliary"], step, args)
            loss_aux = aux_weight * loss_aux
        if pruning:
            expected = sparsity(gates.prob_open(), *sizes)
            wanted = sparsity_at(step, args.sparsity, args.prune_start, args.prune_ramp)
            penalty = lagrangian(expected, wanted, gates.lambdas)
        backward(model, gates, pruning, loss_target, penalty, loss_aux, args)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        gates.clamp_()

        terms = {"loss_target": loss_target, "loss_aux": loss_aux, "lagrangian": penalty}
        terms["expected_sparsity"] = expected
        terms = {name: 0.0 if term is None else term.item() for name, term in terms.items()}
        if step % 10 == 0:
            bar.set_postfix({"phase": phase, **{name: f"{term:.3f}" for name, term in terms.items()}})
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == args.steps:
            z = gates.deterministic() if pruning else None
            accuracy, f1, loss = evaluate(model, data.validation, z, args.device)
            row = {"step": step + 1, "phase": phase, **terms, "aux_weight": aux_weight,
                   "wanted_sparsity": sparsity_at(step, args.sparsity, args.prune_start, args.prune_ramp),
                   "lambda1": gates.lambdas[0].item(), "lambda2": gates.lambdas[1].item(),
                   "validation_accuracy": accuracy, "validation_macro_f1": f1, "validation_loss": loss}
            print(json.dumps(row), file=history, flush=True)
            if phase == "finetune" and (best is None or (accuracy, -loss) > best[0]):
                best = (accuracy, -loss), {name: p.clone() for name, p in model.state_dict().items()}

    # ---- final report
    model.load_state_dict(best[1])
    accuracy, f1, _ = evaluate(model, data.test, None, args.device)
    sample = data.test.batch(np.arange(min(32, len(data.test.label))), args.device)[0]
    slow, fast = latency_ms([dense, model], sample)
    result = {
        "test_accuracy": accuracy, "test_macro_f1": f1, "validation_accuracy": best[0][0],
        "target_sparsity": args.sparsity, "expected_sparsity": expected.item(),
        "delivered_sparsity": 1 - prunable(model) / prunable(dense),
        "heads_kept": structure.head.int().tolist(), "ffn_kept": structure.ffn.int().tolist(),
        "params_dense": sum(p.numel() for p in dense.parameters()),
        "params_pruned": sum(p.numel() for p in model.parameters()),
        "latency_dense_ms": slow, "latency_pruned_ms": fast, "speedup": slow / fast,
        "seconds": time.time() - began, "seed": args.seed, "notes": data.notes, "args": vars(args),
        "torch": torch.__version__, "commit": commit(),
    }
    model.save(os.path.join(args.out_dir, "pruned.pt"))
    with open(os.path.join(args.out_dir, "result.json"), "w") as file:
        json.dump(result, file, indent=1)
    return result


def report(result):
    """Print what a reader of result.json would look for first."""
    print(f"test accuracy {result['test_accuracy']:.3f}   macro-F1 {result['test_macro_f1']:.3f}   "
          f"(validation accuracy {result['validation_accuracy']:.3f})")
    print(f"sparsity delivered {result['delivered_sparsity']:.3f}, asked {result['target_sparsity']:.3f}; "
          f"{result['params_pruned']:,} of {result['params_dense']:,} parameters left")
    for i, (heads, ffn) in enumerate(zip(result["heads_kept"], result["ffn_kept"])):
        print(f"  layer {i}   heads {''.join('.#'[h] for h in heads)}   feed-forward {'.#'[ffn]}")
    print(f"{result['latency_dense_ms']:.2f} ms -> {result['latency_pruned_ms']:.2f} ms for 32 texts, "
          f"{result['speedup']:.1f} times faster; the whole run took {result['seconds']:.0f} s")
    print(f"wrote result.json, history.jsonl and pruned.pt to {result['args']['out_dir']}/")


def commit():
    """Git commit of this file's folder, or None."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def series(args):
    """Runs over several seeds, with transfer and, for --baseline, without; out_dir/results.jsonl keeps their rows.

    Runs whose row is already there are not repeated. Returns {aux_weight: list of results in order of seed}.
    """
    path = os.path.join(args.out_dir, "results.jsonl")
    rows = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
    results = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for weight in [args.aux_weight, 0.0] if args.baseline else [args.aux_weight]:
            folder = os.path.join(args.out_dir, f"seed{seed}" + ("" if weight else "_no_transfer"))
            one = argparse.Namespace(**{**vars(args), "seed": seed, "seeds": 1, "baseline": False,
                                        "aux_weight": weight, "out_dir": folder})
            row = next((row for row in rows if row["args"] == vars(one)), None)
            if row is None:
                row = train(one)
                with open(path, "a") as file:
                    print(json.dumps(row), file=file)
            results.setdefault(weight, []).append(row)
    return results


def report_series(results):
    """Print mean, standard deviation and 95 % interval of each setting, and the paired difference."""
    accuracy = {weight: [100 * row["test_accuracy"] for row in rows] for weight, rows in results.items()}
    for weight, values in accuracy.items():
        mean, deviation, half = interval(values)
        print(f"aux_weight {weight:g}: test accuracy {mean:.1f} %, standard deviation {deviation:.1f}, "
              f"95 % interval [{mean - half:.1f}, {mean + half:.1f}], n = {len(values)}")
    if len(accuracy) == 2:
        helped, alone = accuracy.values()
        mean, _, half = interval([a - b for a, b in zip(helped, alone)])
        print(f"transfer: {mean:+.1f} points [{mean - half:.1f}, {mean + half:.1f}], n = {len(alone)}")


if __name__ == "__main__":
    try:
        arguments = parse_args()
        if arguments.seeds > 1 or arguments.baseline:
            report_series(series(arguments))
        else:
            report(train(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
