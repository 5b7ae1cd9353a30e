"""Speed, measured side by side in one process: python tests/benchmark.py [section numbers]

Competitors take turns and medians are reported, so that a busy machine disturbs all of them alike. Sections:
1 training step, 2 cost of the gates, 3 extracted network, 4 share of the machine's peak, 5 the first command,
6 how cost grows. Products run at the precision that train.py sets, "medium", except where a line says so.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import masks
import model
import train as loop
import transfer
from experiments import rows

SHAPES = [(64, 4, 12), (128, 4, 64), (256, 6, 128)]  # d_model, n_layer, tokens; the first is the default
VOCAB, CLASSES, BATCH = 1000, 5, 32


def alternate(steps, repeats, calls=5):
    """Median milliseconds of every function of steps, name -> function, in `repeats` turns of `calls` calls.

    The first call of a turn is not counted: it finds the caches full of the others' data, as no call of a
    training run does.
    """
    times = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            for call in range(calls + 1):
                start = time.perf_counter()
                step()
                if turn and call:  # the first turn is warm-up
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(ms) for name, ms in times.items()}


def at(precision, step):
    """`step` at a precision of products, a setting of the whole process; torch's default is "highest"."""

    def switched():
        torch.set_float32_matmul_precision(precision)
        step()
        torch.set_float32_matmul_precision("medium")

    return switched


def random_texts(tokens, n=1000):
    """Examples of random words, between half and all of `tokens` long."""
    rng = np.random.default_rng(0)
    start = np.concatenate([[0], np.cumsum(rng.integers(max(1, tokens // 2), tokens + 1, n))])
    return transfer.Examples(rng.integers(3, VOCAB, start[-1]), start, rng.integers(0, CLASSES, n))


def setting(d_model, n_layer, tokens):
    """Flags and random data of a run of this shape."""
    args = loop.parse_args(["--d_model", str(d_model), "--n_layer", str(n_layer), "--device", "cpu"])
    args.max_length, texts = tokens, random_texts(tokens)
    labels = {task: [str(i) for i in range(CLASSES)] for task in ("target", "auxiliary")}
    return args, transfer.Data(texts, None, None, texts, [str(i) for i in range(VOCAB)], labels, [], {})


def our_step(*shape, pruning=True):
    """A step of the loop of train.py with both tasks, in the pruning phase or in a phase without gates."""
    args, data = setting(*shape)
    with tempfile.TemporaryDirectory() as args.out_dir:
        run = loop.start(args, data)
    names = ("target", "auxiliary")
    target, auxiliary = (loop.Task(name, data.train, args.batch_size, args.seed) for name in names)
    gates, sizes, number = run.gates if pruning else None, model.unit_sizes(shape[0], args.n_head), count()

    def step():
        i, penalty = next(number), torch.zeros(())
        loss_target = loop.task_loss(run.net, gates, target, i, args)
        loss_aux = loop.task_loss(run.net, gates, auxiliary, i, args)
        if gates:
            gap = masks.sparsity(gates.prob_open(), *sizes) - 0.3
            penalty = run.controller.penalty(gap)
        parameters = {**dict(run.net.named_parameters()), "log_alpha": run.gates.log_alpha}
        g_target = loop.gradients(loss_target, parameters)
        g_aux = loop.gradients(args.aux_weight * loss_aux, transfer.transferred(parameters, args.transfer))
        update = transfer.couple(g_target, g_aux, args.coupling)
        if gates:
            update["log_alpha"] = update["log_alpha"] + loop.gradients(penalty, parameters)["log_alpha"]
        for name, p in parameters.items():
            p.grad = update.get(name)
        norm = nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
        assert all(math.isfinite(term.item()) for term in (loss_target, loss_aux, penalty, norm))
        run.optimizer.step()
        run.gate_optimizer.step()
        if gates:
            gates.clamp_()
            run.controller.ascend(gap)

    return step


def other_step(encode, parameters, width, tokens):
    """The same two batches, without gates, for any encoder: encode(ids, padding) -> (B, T, width)."""
    heads, texts, number = [nn.Linear(width, CLASSES) for _ in range(2)], random_texts(tokens), count()
    parameters = [*parameters, *heads[0].parameters(), *heads[1].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    order = transfer.batch_order(texts, BATCH, 0)

    def step():
        optimizer.zero_grad()
        i = next(number)
        for head in heads:
            ids, labels = texts.batch(order(i))
            real = (ids != model.PAD).unsqueeze(2)
            pooled = (encode(ids, ids == model.PAD) * real).sum(1) / real.sum(1)
            F.cross_entropy(head(pooled), labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def torch_step(d_model, n_layer, tokens):
    layer = nn.TransformerEncoderLayer(d_model, 4, 4 * d_model, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, n_layer, enable_nested_tensor=False)
    word, position = nn.Embedding(VOCAB, d_model), nn.Embedding(tokens, d_model)

    def encode(ids, padding):
        x = F.dropout(word(ids) + position.weight[: ids.shape[1]], 0.1)
        return stack(x, src_key_padding_mask=padding)

    parameters = [*stack.parameters(), *word.parameters(), *position.parameters()]
    return other_step(encode, parameters, d_model, tokens)


def bert_step(d_model, n_layer, tokens):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=tokens,
        hidden_act="relu",
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layer,
        num_attention_heads=4,
    )
    bert = BertModel(config, add_pooling_layer=False).train()

    def encode(ids, padding):
        return bert(ids, (~padding).long()).last_hidden_state

    return other_step(encode, bert.parameters(), d_model, tokens)


def training_step():
    print("\n1. training step (two batches of 32), ms, medians of alternating runs; in brackets ours / this")
    others = {"nn.TransformerEncoder": torch_step, "transformers BERT": bert_step}
    for shape in SHAPES:
        steps = {"ours": our_step(*shape)}
        for name, make in others.items():
            step = make(*shape)
            steps |= {f"{name} at torch's defaults": at("highest", step), f"{name} at medium": step}
        ms = alternate(steps, 20) if shape[0] < 256 else alternate(steps, 4, calls=2)
        print(f"   {shape}")
        for name, t in ms.items():
            print(f"      {name:42} {t:7.1f}  ({ms['ours'] / t:.2f})", flush=True)


def cost_of_gates():
    print("\n2. training step with gates and controller on, against both off, ms")
    for shape in SHAPES:
        steps = {"on": our_step(*shape), "off": our_step(*shape, pruning=False)}
        ms = alternate(steps, 30 if shape[0] < 256 else 5)
        print(f"   {shape}: {ms['on']:.1f} / {ms['off']:.1f} = {ms['on'] / ms['off']:.3f}", flush=True)


def multiply_adds(net, tokens):
    """Of one text: every prunable weight once per token, and the two products of attention."""
    attention = sum(2 * n * net.config.d_head * tokens for n in net.config.heads)
    return tokens * (model.prunable(net) + attention)


def extracted_network():
    print("\n3. extracted network, structures learned by train.py: speed-up, and the ratio of multiply-adds")
    learned = {row["setting"]: row for row in rows("shapes")}
    for shape in SHAPES:
        dense = loop.dense_network(*setting(*shape))
        for cut in (0.5, 0.7, 0.9):
            found = learned[f"d_model {shape[0]}, sparsity {cut}"]
            z = masks.Z(torch.tensor(found["heads_kept"]), torch.tensor(found["ffn_kept"]))
            small = model.extract(dense, z)
            ratio = multiply_adds(dense, shape[2]) / multiply_adds(small, shape[2])
            line = f"   {shape} sparsity {cut}: multiply-adds {ratio:5.2f}x"
            for batch in (1, 64):
                ids = torch.randint(3, VOCAB, (batch, shape[2]))
                repeats = 200 if batch == 1 else 30 if shape[0] < 256 else 15
                slow, fast = loop.latency_ms([dense, small], ids, repeats)
                line += f" | batch {batch:2d}: {slow:7.2f} -> {fast:6.2f} ms, {slow / fast:5.2f}x "
                line += f"({slow / fast / ratio:.2f} of it)"
            print(line, flush=True)


def share_of_peak():
    print("\n4. GFLOP/s: a training step, attention written out (forward), a large product by torch's `@`")
    a, b = torch.randn(2, 2048, 2048)
    for shape in SHAPES:
        d_model, _, tokens = shape
        args, data = setting(*shape)
        order = transfer.batch_order(data.train, BATCH, 0)
        n_tokens = sum(data.train.batch(order(i))[0].numel() for i in range(10)) / 10  # padding included
        q, k, v = torch.randn(3, 64, args.n_head, tokens, d_model // args.n_head)
        steps = {
            "step": our_step(*shape),
            "attention": lambda: (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v,
            "@, highest": at("highest", lambda: a @ b),
            "@, medium": lambda: a @ b,
        }
        ms = alternate(steps, 3 if d_model == 256 else 10)
        # 2 tasks, 3 passes (forward, and backward for inputs and for weights), 2 operations per multiply-add
        per_text = multiply_adds(loop.dense_network(args, data), tokens)
        work = {"step": 2 * 3 * 2 * n_tokens / tokens * per_text, "attention": 2 * 2 * q.numel() * tokens}
        speed = {name: work.get(name, 2 * 2048**3) / t / 1e6 for name, t in ms.items()}
        print(f"   {shape}: " + "   ".join(f"{name} {s:.0f}" for name, s in speed.items()), flush=True)


HEAD = r"""
import re, runpy, sys, time

def peak():  # MB that this process has needed at most (Linux)
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024

"""


def python(code, *flags, **environment):
    """Run code in a process of its own; returns its seconds and the last line that it printed."""
    start, environment = time.perf_counter(), os.environ | environment
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, *flags],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    return time.perf_counter() - start, done.stdout.splitlines()[-1]


def first_command():
    print("\n5. whole processes: python train.py --aux_weight 0.5 --transfer_start 1000")
    code = "sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__'); print(peak())"
    with tempfile.TemporaryDirectory() as folder:
        command = [code, "--aux_weight", "0.5", "--out_dir", folder]
        seconds, mb = python(*command, "--transfer_start", "1000")
        print(f"   the run: {seconds:.1f} s, peak {float(mb):.0f} MB")
        seconds, _ = python(*command, "--steps", "1", "--finetune_steps", "1", "--sparsity", "0")
        print(f"   start, data, one step and the final report: {seconds:.1f} s")


def growth():
    print("\n6. how cost grows: training step, ms")
    base = {"d_model": 64, "n_layer": 4, "tokens": 32}
    grown = {"d_model": (64, 128, 256, 512), "n_layer": (1, 2, 4, 8, 16), "tokens": (16, 32, 64, 128, 256)}
    for what, values in grown.items():
        steps = {value: our_step(*{**base, what: value}.values()) for value in values}
        print(f"   {what:7}", *(f"{value:5d}: {t:6.1f}" for value, t in alternate(steps, 3).items()))
    print("   loading and tokenizing short texts")
    for n in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            texts = [f"the number {i % 5000} is w{i % 7919} of {i % 13}" for i in range(n)]
            lines = [f'{{"text": "{text}", "label": {i % 2}}}\n' for i, text in enumerate(texts)]
            Path(folder, "train.jsonl").write_text("".join(lines))
            code = f"""import datasets, transfer
start, before, source = time.time(), peak(), transfer.Source({folder!r})
data = transfer.prepare(source, None, n_target=0, max_length=64, vocab_size=10000, seed=0)
ids = sum(array.nbytes for examples in data[:3] for array in examples) / 2**20
print(f"{{time.time() - start:.1f}} s, {{ids:.1f}} MB of ids, {{peak() - before:.0f}} MB more at the peak")"""
            print(f"   {n:9,d} texts:", python(code, HF_DATASETS_CACHE=folder)[1], flush=True)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("medium")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    sections = [training_step, cost_of_gates, extracted_network, share_of_peak, first_command, growth]
    for number in map(int, sys.argv[1:] or range(1, 7)):
        sections[number - 1]()
