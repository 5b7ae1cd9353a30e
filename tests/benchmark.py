"""A training step, measured side by side with transformers' BERT: python tests/benchmark.py

Both take turns and medians are reported, so that a busy machine disturbs them alike. Products run at the
precision that train.py sets, "medium". How fast pruned networks read is measured by `python
tests/experiments.py speed FOLDERS`. By hand only: pip install transformers.
"""

import os
import statistics
import sys
import time
from itertools import count
from pathlib import Path
from typing import NamedTuple

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

CLASSES, BATCH = 5, 32


class Shape(NamedTuple):
    """Of a network, and of the texts that it reads."""

    d_model: int
    n_layer: int
    tokens: int
    n_head: int = 4
    vocab: int = 1000
    bert: bool = False


# the default, two larger ones, all-MiniLM-L6-v2
SHAPES = [Shape(64, 4, 12), Shape(128, 4, 64), Shape(256, 6, 128), Shape(384, 6, 32, 12, 30_522, True)]


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


def random_texts(shape, n=1000):
    """Examples of random words, between half and all of the tokens long."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(1, shape.tokens // 2), shape.tokens + 1, n)
    ids = [rng.integers(3, shape.vocab, length) for length in lengths]
    return transfer.Examples(ids, rng.integers(0, CLASSES, n))


def setting(shape):
    """Flags, random data and network of a run of this shape."""
    flags = f"--d_model {shape.d_model} --n_layer {shape.n_layer} --n_head {shape.n_head} --device cpu"
    args = loop.parse_args([*flags.split(), "--max_length", str(shape.tokens)])
    texts, labels = random_texts(shape), [str(i) for i in range(CLASSES)]
    vocab = [*model.SPECIAL, *map(str, range(shape.vocab - len(model.SPECIAL)))]
    labels = {"target": labels, "auxiliary": labels}
    heads, ffn = [shape.n_head] * shape.n_layer, [1] * shape.n_layer
    sizes = (shape.vocab, shape.tokens, shape.d_model, shape.d_model // shape.n_head)
    net = model.GatedTransformer(model.Config(*sizes, heads, ffn, bert=shape.bert), vocab, labels)
    return args, texts, net


def our_step(shape):
    """A step of the loop of train.py with both tasks and active gates."""
    args, texts, net = setting(shape)
    gates, controller = masks.Gates(shape.n_layer, shape.n_head), masks.Controller(args.gate_lr)
    optimizer = loop.weight_optimizer(net, args.weight_decay)
    gate_optimizer = torch.optim.Adam(gates.parameters(), lr=args.gate_lr, betas=(0.5, 0.9))
    target, auxiliary = (loop.Task(name, texts, args) for name in ("target", "auxiliary"))
    sizes, number = model.unit_sizes(shape.d_model, shape.n_head), count()

    def step():
        i = next(number)
        parameters = {**dict(net.named_parameters()), "log_alpha": gates.log_alpha}
        loss_target = loop.task_loss(net, gates, target, i, args)
        g_target = loop.gradients(loss_target, parameters)
        loss_aux = loop.task_loss(net, gates, auxiliary, i, args)
        g_aux = loop.gradients(args.aux_weight * loss_aux, transfer.transferred(parameters, args.transfer))
        update = transfer.couple(g_target, g_aux, args.coupling)
        gap = masks.sparsity(gates.prob_open(), *sizes) - 0.3
        penalty = controller.penalty(gap)
        update["log_alpha"] = update["log_alpha"] + loop.gradients(penalty, parameters)["log_alpha"]
        for name, p in parameters.items():
            p.grad = update.get(name)
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert np.isfinite([loss_target.item(), loss_aux.item(), penalty.item(), norm.item()]).all()
        optimizer.step()
        gate_optimizer.step()
        gates.clamp_()
        controller.ascend(gap)

    return step


def peer_step(shape):
    """The same two batches in a BERT of transformers of this shape, without gates."""
    from transformers import BertConfig, BertModel

    names = "hidden_size num_hidden_layers max_position_embeddings num_attention_heads vocab_size".split()
    config = BertConfig(**dict(zip(names, shape)), intermediate_size=4 * shape.d_model)
    config.hidden_act = "gelu" if shape.bert else "relu"
    net = BertModel(config, add_pooling_layer=False).train()
    heads, texts, number = [nn.Linear(shape.d_model, CLASSES) for _ in range(2)], random_texts(shape), count()
    parameters = [*net.parameters(), *heads[0].parameters(), *heads[1].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    order = transfer.batch_order(texts, BATCH, 0)

    def step():
        optimizer.zero_grad()
        i = next(number)
        for head in heads:
            ids, labels = texts.batch(order(i))
            is_token = ids != model.PAD
            states = net(ids, is_token.long()).last_hidden_state
            pooled = (states * is_token.unsqueeze(2)).sum(1) / is_token.sum(1, keepdim=True)
            F.cross_entropy(head(pooled), labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    torch.set_float32_matmul_precision("medium")  # as in a run
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    print("training step (two batches of 32), milliseconds")
    for shape in SHAPES:
        steps = {"ours": our_step(shape), "transformers": peer_step(shape)}
        ms = alternate(steps, 20) if shape.d_model < 256 else alternate(steps, 4, calls=2)
        ours, theirs = ms.values()
        print(f"{shape}: ours {ours:.1f}, transformers {theirs:.1f}, ratio {ours / theirs:.2f}", flush=True)
