"""Speed, measured side by side in one process: python tests/benchmark.py [section numbers]

Competitors take turns and medians are reported, so that a busy machine disturbs all of them alike. Sections:
1 training step, 2 cost of the gates, 3 extracted network, 4 share of the machine's peak, 5 the first command,
6 how cost grows."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as loop
from experiments import rows
from masks import Gates, Z, lagrangian, sparsity, unit_sizes
from model import Config, Examples, GatedTransformer, extract, latency_ms, onednn, prunable
from transfer import batch_order

SHAPES = [(64, 4, 12), (128, 4, 64), (256, 6, 128)]  # d_model, n_layer, tokens; the first is the default
VOCAB, CLASSES, BATCH = 1000, 5, 32


def alternate(steps, repeats, run=5):
    """Median milliseconds of every function of `steps` (name -> function), in `repeats` turns of `run` calls.

    The first call of a turn is not counted: it finds the caches full of the others' data, as no call of a
    training run does.
    """
    times = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            for call in range(run + 1):
                start = time.perf_counter()
                step()
                if turn and call:  # the first turn is warm-up
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(ms) for name, ms in times.items()}


def random_texts(tokens, n=1000):
    """Examples of random words, between half and all of `tokens` long."""
    rng = np.random.default_rng(0)
    start = np.concatenate([[0], np.cumsum(rng.integers(max(1, tokens // 2), tokens + 1, n))])
    return Examples(rng.integers(3, VOCAB, start[-1]), start, rng.integers(0, CLASSES, n))


def network(d_model, n_layer, tokens):
    args = loop.parse_args(["--d_model", str(d_model), "--n_layer", str(n_layer), "--device", "cpu"])
    labels = {task: [str(i) for i in range(CLASSES)] for task in ("target", "auxiliary")}
    config = Config(VOCAB, tokens, d_model, d_model // args.n_head, [args.n_head] * n_layer, [1] * n_layer)
    return GatedTransformer(config, [str(i) for i in range(VOCAB)], labels), args


def our_step(d_model, n_layer, tokens, pruning=True):
    """The step of train.py: both batches, gate samples, Lagrangian, coupling, clipping, optimizer."""
    model, args = network(d_model, n_layer, tokens)
    gates, texts, number = Gates(n_layer, args.n_head), random_texts(tokens), iter(range(10**9))
    optimizer = loop.make_optimizer(model, gates, args)
    order = batch_order(texts, BATCH, 0)

    def step():
        i, active = next(number), gates if pruning else None
        loss_target = loop.task_loss(model, active, "target", texts, order, i, args)
        loss_aux = loop.task_loss(model, active, "auxiliary", texts, order, i, args)
        penalty = torch.zeros(())
        if pruning:
            penalty = lagrangian(
                sparsity(gates.prob_open(), *unit_sizes(args.d_model, args.n_head)), 0.3, gates.lambdas
            )
        optimizer.zero_grad()
        loop.backward(model, gates, pruning, loss_target, penalty, loss_aux, args)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        gates.clamp_()

    return step


def other_step(encode, parameters, tokens):
    """The same two batches, without gates, for any encoder: encode(ids, padding) -> (B, T, C)."""
    width = encode(torch.full((1, 2), 3), torch.zeros(1, 2, dtype=torch.bool)).shape[2]
    heads, texts, number = (
        nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(2)),
        random_texts(tokens),
        iter(range(10**9)),
    )
    parameters = [*parameters, *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    order = batch_order(texts, BATCH, 0)

    def step():
        optimizer.zero_grad()
        i = next(number)
        for head in heads:
            ids, labels = texts.batch(order(i))
            real = (ids != 0).unsqueeze(2)
            pooled = (encode(ids, ids == 0) * real).sum(1) / real.sum(1)
            F.cross_entropy(head(pooled), labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return step


def torch_step(d_model, n_layer, tokens):
    layer = nn.TransformerEncoderLayer(
        d_model, 4, 4 * d_model, dropout=0.1, batch_first=True, norm_first=True
    )
    stack = nn.TransformerEncoder(layer, n_layer, enable_nested_tensor=False)
    word, position = nn.Embedding(VOCAB, d_model), nn.Embedding(tokens, d_model)

    def encode(ids, padding):
        x = F.dropout(word(ids) + position.weight[: ids.shape[1]], 0.1)
        return stack(x, src_key_padding_mask=padding)

    return other_step(encode, [*stack.parameters(), *word.parameters(), *position.parameters()], tokens)


def bert_step(d_model, n_layer, tokens):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=d_model,
            num_hidden_layers=n_layer,
            num_attention_heads=4,
            intermediate_size=4 * d_model,
            hidden_act="relu",
            max_position_embeddings=tokens,
        ),
        add_pooling_layer=False,
    )
    bert.train()
    return other_step(lambda ids, pad: bert(ids, (~pad).long()).last_hidden_state, bert.parameters(), tokens)


def training_step():
    print("\n1. training step, ms: two batches of 32, medians of alternating runs")
    print("   d_model layers tokens |   ours  nn.TransformerEncoder  ratio   transformers BERT  ratio")
    for shape in SHAPES:
        steps = {"ours": our_step(*shape), "torch": torch_step(*shape)}
        try:
            steps["bert"] = bert_step(*shape)
        except ImportError:
            print("   (transformers is not installed: BERT skipped)")
        ms = alternate(steps, 20 if shape[0] < 256 else 3)
        bert = f"{ms['bert']:12.1f} {ms['ours'] / ms['bert']:12.2f}" if "bert" in ms else ""
        print(
            f"   {shape[0]:7d} {shape[1]:6d} {shape[2]:6d} | {ms['ours']:6.1f} {ms['torch']:15.1f} "
            f"{ms['ours'] / ms['torch']:13.2f} {bert}"
        )


def cost_of_gates():
    print("\n2. training step with gates and Lagrangian on, against both off, ms")
    for shape in SHAPES:
        steps = {"on": our_step(*shape), "off": our_step(*shape, pruning=False)}
        ms = alternate(steps, 30 if shape[0] < 256 else 5)
        print(f"   {shape}: {ms['on']:.1f} / {ms['off']:.1f} = {ms['on'] / ms['off']:.3f}")


def multiply_adds(model, tokens):
    """Of one text: every prunable weight once per token, and the two products of attention."""
    attention = sum(2 * n * model.config.d_head * tokens for n in model.config.heads)
    return tokens * (prunable(model) + attention)


def extracted_network():
    print("\n3. extracted network, structures learned by train.py: speed-up, and the ratio of multiply-adds")
    learned = {row["setting"]: row for row in rows("structures")}
    for shape in SHAPES:
        dense = network(*shape)[0]
        for cut in (0.5, 0.7, 0.9):
            found = learned[f"d_model {shape[0]}, sparsity {cut}"]
            small = extract(dense, Z(torch.tensor(found["heads_kept"]), torch.tensor(found["ffn_kept"])))
            ratio = multiply_adds(dense, shape[2]) / multiply_adds(small, shape[2])
            row = f"   {shape} sparsity {cut}: multiply-adds {ratio:5.2f}x"
            for batch in (1, 64):
                ids = torch.randint(3, VOCAB, (batch, shape[2]))
                slow, fast = latency_ms(
                    [dense, small], ids, 200 if batch == 1 else 30 if shape[0] < 256 else 15
                )
                gain = slow / fast
                row += f" | batch {batch:2d}: {slow:7.2f} -> {fast:6.2f} ms, "
                row += f"{gain:5.2f}x ({gain / ratio:.2f} of it)"
            print(row)


def share_of_peak():
    print(
        "\n4. GFLOP/s of a training step, and of large products by torch's `@` and by oneDNN on this machine"
    )
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    for shape in SHAPES:
        texts = random_texts(shape[2])
        order = batch_order(texts, BATCH, 0)
        tokens = sum(texts.batch(order(i))[0].numel() for i in range(10)) / 10
        q, k, v = torch.randn(3, 64, 4, shape[2], shape[0] // 4)
        steps = {"torch": lambda: a @ b, "onednn": lambda: onednn(a, b), "step": our_step(*shape)}
        steps["attention"] = lambda: F.scaled_dot_product_attention(q, k, v)
        ms = alternate(steps, 3 if shape[0] == 256 else 10)
        # 2 tasks, 3 passes (forward, and backward for inputs and for weights), 2 operations per multiply-add
        work = 2 * 3 * 2 * tokens * multiply_adds(network(*shape)[0], shape[2]) / shape[2]
        step, *peaks = (
            work / ms["step"] / 1e6,
            *(2 * 2048**3 / ms[name] / 1e6 for name in ("torch", "onednn")),
        )
        print(
            f"   {shape}: step {step:.0f}, {step / peaks[0]:.2f} of {peaks[0]:.0f}, "
            f"{step / peaks[1]:.2f} of {peaks[1]:.0f}; torch's attention, forward: "
            f"{4 * q.numel() * shape[2] / ms['attention'] / 1e6:.0f}"
        )


# MB that this process has needed at most (Linux)
PEAK = r"int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) / 1024"


def run(*flags):
    """Seconds and peak MB of the command line, in a process of its own."""
    code = "import re, runpy, sys; sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')"
    code += f"; print({PEAK})"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return time.perf_counter() - start, float(done.stdout.splitlines()[-1])


def first_command():
    print("\n5. whole processes: python train.py --aux_weight 0.5 --transfer_start 1000")
    with tempfile.TemporaryDirectory() as folder:
        command = ["--aux_weight", "0.5", "--out_dir", folder]
        seconds, mb = run(*command, "--transfer_start", "1000")
        print(f"   the run: {seconds:.1f} s, peak {mb:.0f} MB")
        seconds, _ = run(*command, "--steps", "1", "--finetune_steps", "1", "--sparsity", "0")
        print(f"   start, data, one step and the final report: {seconds:.1f} s")


def growth():
    print("\n6. how cost grows: training step, ms")
    base = (64, 4, 32)
    for what, values in enumerate([(64, 128, 256, 512), (1, 2, 4, 8, 16), (16, 32, 64, 128, 256)]):
        shapes = [base[:what] + (v,) + base[what + 1 :] for v in values]
        ms = alternate({shape: our_step(*shape) for shape in shapes}, 3)
        print(
            f"   {('width', 'layers', 'tokens')[what]:7s}"
            + "".join(f"{s[what]:6d}: {t:6.1f}" for s, t in ms.items())
        )
    print("   loading and tokenizing short texts")
    for n in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/train.jsonl", "w") as file:
                for i in range(n):
                    file.write(
                        f'{{"text": "the number {i % 5000} is w{i % 7919} of {i % 13}", "label": {i % 2}}}\n'
                    )
            code = f"""
import re, sys, time; sys.path.insert(0, {str(ROOT)!r}); import datasets, transfer
start, before = time.time(), {PEAK}
data = transfer.prepare({folder!r}, "none", 0, 64, 10000)
splits = data.train, data.validation, data.test
ids = sum(array.nbytes for examples in splits for array in examples) / 2**20
seconds, more = time.time() - start, round({PEAK} - before)
print(f"{{seconds:.1f}} s, {{ids:.1f}} MB of ids, more memory at the peak, MB:", more)"""
            environment = {**os.environ, "HF_DATASETS_CACHE": folder}
            done = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
            )
            print(f"   {n:9,d} texts: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    sections = [training_step, cost_of_gates, extracted_network, share_of_peak, first_command, growth]
    for number in map(int, sys.argv[1:] or range(1, 7)):
        sections[number - 1]()
