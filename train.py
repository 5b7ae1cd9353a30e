"""Prune a small transformer for one task while a second task helps: the whole run, from top to bottom.

    python train.py --aux_weight 0.5 --transfer_start 1000              # built-in pair of tasks, no download
    python train.py --aux_weight 0                                      # the same without transfer
    python train.py --target path/to/mine --aux path/to/other           # folders with train.jsonl, ...
    python train.py --target nyu-mll/glue:rte --aux nyu-mll/glue:mnli   # the hub, with configuration

    0 ............ prune_start ....... prune_start+prune_ramp ....... steps-finetune_steps ....... steps
    dense training | sparsity target rises | held at the target      | structure fixed, fine-tune  |
         transfer_start ........................................ transfer_stop
"""

import argparse
import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from masks import (Z, Gates, lagrangian, lr_at, make_optimizer, phase_at, select, sparsity, sparsity_at,
                   unit_sizes, why_unreachable)
from model import (UNK, Config, GatedTransformer, dropout_noise, evaluate, extract, interval, latency_ms,
                   prunable, write)
from transfer import InputError, aux_weight_at, batch_order, couple, prepare, transferred

EVAL_EVERY = 100  # steps between two evaluations on the validation split
CAUGHT = []  # signals that asked the process to stop; the loop ends between two steps


def parse_args(argv=None):
    """Flags of a run as a namespace; argv: list of strings, None = the command line. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
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
    add("--dropout", type=float, default=0.1, help="dropout probability, 0 to 0.99")
    # pruning
    add("--sparsity", type=float, default=0.7, help="share of the prunable weights to cut, in [0, reachable)")
    add("--prune_start", type=int, default=500, help="step at which the sparsity target starts to rise")
    add("--prune_ramp", type=int, default=1000, help="steps over which it rises to its full value, >= 1")
    add("--finetune_steps", type=int, default=800, help="last steps, in which the structure is fixed, >= 1")
    add("--structure", choices=["learned", "random"], default="learned", help="random: a control")
    # transfer
    add("--aux_weight", type=float, default=0.5, help="weight of the auxiliary loss, >= 0; 0 = no transfer")
    add("--transfer_start", type=int, default=1000, help="when: first step with the auxiliary loss")
    add("--transfer_stop", type=int, default=10**9, help="when: first step without it again")
    add("--target_start", type=int, default=0, help="when: first step with the target loss")
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
    add("--resume", action="store_true", help="go on where the interrupted run of the same command stopped")
    add("--checkpoint_every", type=int, default=500, help="steps between two checkpoints, >= 1")
    add("--seeds", type=int, default=1, help="runs, with seeds seed, seed + 1, ...; >= 1")
    add("--baseline", action="store_true", help="run every seed without transfer too, and compare")
    add("--out_dir", default="out", help="folder for result.json, history.jsonl and pruned.pt")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args(argv)


def fail(message):
    raise InputError(message)


def check(args):
    """Raise InputError, with the reason, for settings that cannot work."""
    ones = "max_length n_layer n_head d_model batch_size prune_ramp finetune_steps checkpoint_every steps"
    lowest = dict.fromkeys(ones.split(), 1) | {"vocab_size": 4, "seeds": 1, "lr": 1e-9, "gate_lr": 1e-9}
    highest = {"dropout": 0.99, "label_smoothing": 0.99, "max_length": 4096}
    highest |= {"finetune_steps": args.steps, "target_start": args.steps}
    for name, value in vars(args).items():
        low, high = lowest.get(name, 0), highest.get(name, 1e9)
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"{name} must be at least {low} and at most {high:g}, not {value}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        fail(f"device {args.device} is not available here")
    if args.baseline and (args.aux_weight == 0 or args.aux == "none"):
        fail("--baseline compares with a run without transfer, and this is one")
    if args.d_model % args.n_head:
        fail(f"d_model {args.d_model} is not divisible by n_head {args.n_head}")
    if args.batch_size % rank_and_world()[1] or (args.seeds > 1 or args.baseline) and dist.is_initialized():
        fail("torchrun needs a batch_size divisible by its processes, and neither --seeds nor --baseline")
    # a random structure is cut in one step
    window = math.inf if args.structure == "random" else args.steps - args.finetune_steps - args.prune_start
    shape = args.n_layer, args.n_head, args.d_model
    if reason := why_unreachable(args.sparsity, window, args.prune_ramp, args.gate_lr, *shape):
        fail(reason)


def rank_and_world():
    """Number of this process and number of processes: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(gradients):
    """Replace each gradient by its mean over all processes, in one exchange."""
    if dist.is_initialized():
        gradients = list(gradients)
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


def stream(task, args):
    """Seed of everything random about one task; it differs between tasks and between runs."""
    return 2 * args.seed + (task == "auxiliary")


def task_loss(model, gates, task, examples, order, step, args):
    """Cross-entropy (nats per example) of one task's batch of this step, with noise of its own.

    gates: None when every unit is open. Order and noise are functions of (seed, step, task): they never
    depend on the other task, and every process draws those of the whole batch and takes its share.
    """
    rank, world = rank_and_world()
    generator = torch.Generator(args.device).manual_seed(stream(task, args) * 10_000_019 + step)
    z = None if gates is None else gates.sample(generator)
    drop = dropout_noise(model, args.batch_size, args.dropout, generator)[rank::world]
    ids, labels = examples.batch(order(step)[rank::world], args.device)
    return F.cross_entropy(model(ids, task, z, drop), labels, label_smoothing=args.label_smoothing)


def backward(model, gates, pruning, loss_target, penalty, loss_aux, args):
    """Fill .grad of every parameter, empty before, with the coupled gradients.

    loss_aux: already weighted; None = no transfer at this step.
    """
    if loss_target.requires_grad or penalty.requires_grad:
        (loss_target + penalty).backward()
        average(p.grad for p in (*model.parameters(), *gates.parameters()) if p.grad is not None)
    if loss_aux is not None:
        weights = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
        reached = transferred(weights, [gates.log_alpha] if pruning else [], args.transfer)
        reached = [*reached, *model.classifier["auxiliary"].parameters()]  # they learn in any case
        g_aux = torch.autograd.grad(loss_aux, reached, materialize_grads=True)
        average(g_aux)
        g_target = [torch.zeros_like(p) if p.grad is None else p.grad for p in reached]
        for p, g in zip(reached, couple(g_target, g_aux, args.coupling)):
            p.grad = g


def essential(flags):
    """The flags that determine the numbers of a run, as a dict. flags: a dict of all of them."""
    neutral = ("resume", "checkpoint_every", "out_dir", "seeds", "baseline")
    return {name: value for name, value in flags.items() if name not in neutral}


def setting(args, data):
    """What a checkpoint and the run that continues it must share."""
    arrays = [array for e in (data.train, data.validation, data.test, data.aux) if e for array in e]
    return essential(vars(args)) | {"data": [data.vocab, [hashlib.sha256(a).hexdigest() for a in arrays]]}


def read_checkpoint(path, args, data):
    """What the interrupted run wrote. Raises InputError if it cannot be continued with these flags."""
    try:
        saved = torch.load(path, map_location=args.device, weights_only=True)
        before = saved["setting"]
    except Exception:  # whatever a truncated or foreign file provokes
        fail(f"{path} is not a complete checkpoint of this program: delete it, or run without --resume")
    if changed := [name for name, value in setting(args, data).items() if before.get(name) != value]:
        fail(f"{path} was written with another {', '.join(changed)}: use the same, or run without --resume")
    return saved


def load(args):
    """The Data of a run; says on stdout what was found."""
    data = prepare(args.target, args.aux, args.n_target, args.max_length, args.vocab_size, args.text_columns,
                   args.label_column, args.seed)
    if args.aux_shuffle and data.aux:
        np.random.default_rng(args.seed).shuffle(data.aux.label)
    if data.aux and args.aux_weight and args.transfer_start >= min(args.transfer_stop, args.steps):
        data.notes.append("no transfer: it starts after it stops, or after the last step")
    if rank_and_world()[0] == 0:
        print(f"{args.target}: {len(data.train.label)} training, {len(data.validation.label)} validation, "
              f"{len(data.test.label)} test examples; labels {', '.join(data.labels['target'])[:60]}")
        print(f"{len(data.vocab)} known words; unknown in test: {(data.test.tokens == UNK).mean():.1%}")
        if data.aux:
            print(f"{args.aux}: {len(data.aux.label)} auxiliary examples")
        print("".join(f"note: {note}\n" for note in data.notes), end="")
    return data


def dense_network(args, data):
    """The network before pruning, with random weights."""
    heads, ffn = [args.n_head] * args.n_layer, [1] * args.n_layer
    config = Config(len(data.vocab), args.max_length, args.d_model, args.d_model // args.n_head, heads, ffn)
    return GatedTransformer(config, data.vocab, data.labels).to(args.device)


def build(args, data, path):
    """Model, gates, optimizer and running values of the loop: new, or as the checkpoint at path has them."""
    torch.manual_seed(args.seed)
    model, gates = dense_network(args, data), Gates(args.n_layer, args.n_head).to(args.device)
    optimizer = make_optimizer(model, gates, args)
    opened = torch.ones(args.n_layer, args.n_head), torch.ones(args.n_layer)
    first, running = 0, (None, [], opened, torch.zeros(()))  # best, history, structure, expected
    if args.resume != path.exists():
        print(f"note: {path}", "is not there: starting at step 0" if args.resume else "will be overwritten")
    if args.resume and path.exists():
        saved = read_checkpoint(path, args, data)
        model = GatedTransformer(Config(**saved["config"]), data.vocab, data.labels).to(args.device)
        optimizer = make_optimizer(model, gates, args)  # of the network as it was: dense, or cut out
        for part, name in (model, "model"), (gates, "gates"), (optimizer, "optimizer"):
            part.load_state_dict(saved[name])
        first, running = saved["step"], saved["running"]
    return model, gates, optimizer, first, running


def train(args):
    """One run from data to extracted network. args: from parse_args. Returns the dict in result.json."""
    # ---- settings and data: everything that can be refused is refused before anything is written
    began, out, checkpoint = time.time(), Path(args.out_dir), Path(args.out_dir, "checkpoint.pt")
    check(args)
    sizes = unit_sizes(args.d_model, args.n_head)
    data = load(args)

    # ---- model, gates and optimizer, new or as the interrupted run left them
    model, gates, optimizer, first, (best, history, structure, expected) = build(args, data, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    (out / "history.jsonl").touch()  # better to fail now than at the first evaluation
    writes = rank_and_world()[0] == 0  # of several processes, one writes and evaluates
    tasks = {"target": data.train} | ({"auxiliary": data.aux} if data.aux else {})
    order = {task: batch_order(tasks[task], args.batch_size, stream(task, args)) for task in tasks}
    full_weight = args.aux_weight if data.aux else 0.0
    finetune_start = args.steps - args.finetune_steps
    prune_start = args.prune_start if args.sparsity and args.structure == "learned" else finetune_start

    # ---- the loop
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=None if writes else True)
    for step in bar:
        phase = phase_at(step, prune_start, finetune_start)
        active = gates if phase == "prune" else None  # the gates that are at work
        if args.sparsity and step == finetune_start:  # the structure is chosen and cut out
            prob = gates.prob_open() if args.structure == "learned" else gates.random(args.seed)
            structure = select(prob, args.sparsity, *sizes)  # a Z of zeros and ones
            model = extract(model, structure)
            optimizer = make_optimizer(model, gates, args)  # Adam's averages had the old shapes
        for group in optimizer.param_groups[:2]:  # the weights; gates keep their rates
            group["lr"] = lr_at(step, args.lr, finetune_start, args.steps)

        # the objective: target loss + Lagrangian, and the weighted auxiliary loss
        aux_weight = aux_weight_at(step, full_weight, args.transfer_start, args.transfer_stop)
        wanted = sparsity_at(step, args.sparsity, args.prune_start, args.prune_ramp)
        loss_target, loss_aux, penalty = torch.zeros(()), None, torch.zeros(())
        if step >= args.target_start:
            loss_target = task_loss(model, active, "target", data.train, order["target"], step, args)
        if aux_weight:
            loss_aux = task_loss(model, active, "auxiliary", data.aux, order["auxiliary"], step, args)
            loss_aux = aux_weight * loss_aux
        if active:
            expected = sparsity(gates.prob_open(), *sizes)
            penalty = lagrangian(expected, wanted, gates.lambdas)
        optimizer.zero_grad()
        backward(model, gates, bool(active), loss_target, penalty, loss_aux, args)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        terms = {"loss_target": loss_target, "loss_aux": loss_aux, "lagrangian": penalty,
                 "expected_sparsity": expected, "gradient_norm": norm,
                 "lambda1": gates.lambdas[0], "lambda2": gates.lambdas[1]}
        terms = {name: 0.0 if term is None else term.item() for name, term in terms.items()}
        if wrong := [f"{name} is {term}" for name, term in terms.items() if not math.isfinite(term)]:
            fail(f"step {step}: {wrong[0]}; try a lower --lr. The last checkpoint, if any, is still there")
        optimizer.step()
        gates.clamp_()

        # evaluation and checkpoint
        bar.set_postfix(dict(list(terms.items())[:4]), phase=phase, refresh=False)
        done = step + 1
        if writes and (done % EVAL_EVERY == 0 or done == args.steps):
            z = gates.deterministic() if active else None
            scores = evaluate(model, data.validation, z, args.device)
            scores = {f"validation_{name}": score for name, score in scores.items()}
            row = {"step": done, "phase": phase, "aux_weight": aux_weight, "wanted_sparsity": wanted}
            if active:
                row["deterministic_sparsity"] = sparsity(Z(z.head > 0, z.ffn > 0), *sizes).item()
            history.append(row | terms | scores)
            (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
            score = scores["validation_accuracy"], -scores["validation_loss"]
            if phase == "finetune" and (best is None or score > best[0]):
                best = score, {name: p.clone() for name, p in model.state_dict().items()}
        if writes and (done % args.checkpoint_every == 0 or CAUGHT):
            write(checkpoint, {
                "setting": setting(args, data), "config": asdict(model.config), "model": model.state_dict(),
                "gates": gates.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
                "running": (best, history, tuple(structure), expected.detach())})
        if CAUGHT:
            raise KeyboardInterrupt(f"stopped after step {done}; the same command with --resume goes on")

    # ---- final report
    if not writes:
        return None
    model.load_state_dict(best[1])
    measured = {"validation_accuracy": best[0][0], "expected_sparsity": expected.item()}
    result = summary(args, data, model, structure) | measured | {"seconds": time.time() - began}
    model.save(out / "pruned.pt")
    (out / "result.json").write_text(json.dumps(result, indent=1))
    checkpoint.unlink(missing_ok=True)
    return result


def summary(args, data, model, structure):
    """What result.json says about the finished network. structure: 0/1, (L, H) and (L,)."""
    dense, folder = dense_network(args, data), Path(__file__).absolute().parent
    status, commit = subprocess.getstatusoutput(f"git -C '{folder}' rev-parse --short HEAD")
    sample = data.test.batch(np.arange(min(32, len(data.test.label))), args.device)[0]
    slow, fast = latency_ms([dense, model], sample)
    return {
        **{f"test_{name}": score for name, score in evaluate(model, data.test, None, args.device).items()},
        "target_sparsity": args.sparsity, "delivered_sparsity": 1 - prunable(model) / prunable(dense),
        "heads_kept": structure[0].int().tolist(), "ffn_kept": structure[1].int().tolist(),
        "params_dense": sum(p.numel() for p in dense.parameters()),
        "params_pruned": sum(p.numel() for p in model.parameters()),
        "latency_dense_ms": slow, "latency_pruned_ms": fast, "speedup": slow / fast,
        "seed": args.seed, "notes": data.notes, "args": vars(args),
        "torch": torch.__version__, "commit": None if status else commit,
    }


def report(result):
    """Print what a reader of result.json would look for first."""
    print(f"test accuracy {result['test_accuracy']:.3f}   macro-F1 {result['test_macro_f1']:.3f}   "
          f"(validation accuracy {result['validation_accuracy']:.3f})")
    print(f"sparsity delivered {result['delivered_sparsity']:.3f}, asked {result['target_sparsity']:.3f}; "
          f"{result['params_pruned']:,} of {result['params_dense']:,} parameters left")
    for i, (heads, ffn) in enumerate(zip(result["heads_kept"], result["ffn_kept"])):
        print(f"  layer {i}   heads {''.join('.#'[h] for h in heads)}   feed-forward {'.#'[ffn]}")
    print(f"{result['latency_dense_ms']:.2f} ms -> {result['latency_pruned_ms']:.2f} ms for up to 32 texts, "
          f"{result['speedup']:.1f} times faster; the whole run took {result['seconds']:.0f} s")
    print(f"wrote result.json, history.jsonl and pruned.pt to {result['args']['out_dir']}/")


def series(args):
    """Runs over several seeds, with transfer and, for --baseline, without.

    out_dir/results.jsonl keeps their rows; runs whose row is already there are not repeated. Returns
    {aux_weight: list of results in order of seed}.
    """
    path, new = Path(args.out_dir, "results.jsonl"), Path(args.out_dir, "results.jsonl.tmp")
    rows = [json.loads(line) for line in open(path)] if path.exists() else []
    ours = [essential({**vars(args), "seed": 0, "aux_weight": weight}) for weight in (args.aux_weight, 0.0)]
    if any(essential({**row["args"], "seed": 0}) not in ours for row in rows):
        fail(f"{path} holds runs with other flags: use another --out_dir")
    results = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for weight in [args.aux_weight, 0.0] if args.baseline else [args.aux_weight]:
            folder = str(Path(args.out_dir, f"seed{seed}" + ("" if weight else "_no_transfer")))
            changed = {"seed": seed, "seeds": 1, "baseline": False, "aux_weight": weight, "out_dir": folder}
            one = argparse.Namespace(**{**vars(args), **changed})
            row = next((row for row in rows if essential(row["args"]) == essential(vars(one))), None)
            if row is None:
                rows.append(row := train(one))
                new.write_text("".join(json.dumps(row) + "\n" for row in rows))
                new.replace(path)
            results.setdefault(weight, []).append(row)
    return results


def report_series(results):
    """Print mean, deviation and 95 % interval of each setting and of the difference paired by seed, and the
    choice that validation data make: with transfer if its interval lies above 0 (its gain, for one seed).
    """
    chosen = list(results)[0]
    for split in ("validation", "test"):
        lines = {f"aux_weight {w:g}": [100 * row[f"{split}_accuracy"] for row in results[w]] for w in results}
        if len(lines) == 2:
            lines["gain, paired by seed"] = [a - b for a, b in zip(*lines.values())]
        for name, values in lines.items():
            mean, deviation, half = interval(values)
            spread = (f", standard deviation {deviation:.1f}, 95 % interval "
                      f"[{mean - half:.1f}, {mean + half:.1f}], n = {len(values)}")
            print(f"{split:10}  {name:20}  {mean:5.1f} points{spread if len(values) > 1 else ''}")
        if split == "validation" and len(results) == 2 and not mean > (half if len(values) > 1 else 0):
            chosen = 0.0  # mean and half are those of the last line, the gain
    best = max(results[chosen], key=lambda row: row["validation_accuracy"])["args"]["out_dir"]
    advice = f"validation speaks for aux_weight {chosen:g}; its" if len(results) == 2 else "the"
    print(f"{advice} best network on validation is {best}/pruned.pt")


def main():
    """The command line. Under torchrun every process trains on its share of each batch."""
    try:
        args = parse_args()
        if dist.is_torchelastic_launched():
            if args.device.startswith("cuda"):
                torch.cuda.set_device(dist.get_node_local_rank())
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        else:  # the first signal stops the loop after its step, a second one stops at once
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda n, frame: (CAUGHT.append(n), signal.signal(n, signal.SIG_DFL)))
        check(args)
        if args.seeds > 1 or args.baseline:
            report_series(series(args))
        elif result := train(args):
            report(result)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
