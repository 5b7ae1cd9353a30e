"""A pre-norm transformer encoder for text classification, whose heads and layers can be gated and cut out.

The same class is the dense network and the pruned one: `Config.heads` says how many heads each layer has,
`Config.ffn` whether it has a feed-forward sublayer. `extract` copies the open units of a gated network into a
smaller instance. The projections have no bias, so a closed unit contributes exactly nothing (and pre-norm
keeps the network continuous at z = 0). Left out on purpose: pretrained weights, subword tokens, causal
attention.

Letters in shape comments: B batch, T tokens, C channels (d_model), L layers, H heads of a layer, D head size.
"""

import io
import os
import re
import statistics
import time
from array import array
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PAD, UNK, SEP = 0, 1, 2  # ids of padding, unknown word, boundary between two texts
SPECIAL = ["<pad>", "<unk>", "<sep>"]
WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def onednn(x, weight):
    """x @ weight.T, without gradient. The op is internal to torch: one reason to pin its version."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class Product(torch.autograd.Function):
    """x @ weight.T and its gradients by oneDNN, which torch ships but does not use for float32.

    Same precision, and up to twice as fast on processors for which torch's default library (MKL) has no
    AVX-512 kernels, such as AMD's.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g, y = grad.flatten(0, -2).t(), x.flatten(0, -2).t()  # (O, N), (I, N), N tokens
        by_weight = onednn(y, g).t() if len(g) >= len(y) else onednn(g, y)  # faster: smaller one first
        return onednn(grad, weight.t()), by_weight


def linear(x, weight):
    """x @ weight.T: x (..., I), weight (O, I), returns (..., O). On the CPU in float32 by oneDNN."""
    own = x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return Product.apply(x, weight) if own else F.linear(x, weight)


@dataclass
class Config:
    """Everything that determines a tensor shape."""

    n_vocab: int
    max_length: int  # tokens; longer texts are cut
    d_model: int
    d_head: int
    heads: list  # (L,) number of heads in each layer, 0 = no attention sublayer
    ffn: list  # (L,) 1 or 0: has the layer a feed-forward sublayer?


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); a sublayer that was cut away is the identity."""

    def __init__(self, d_model, d_head, n_head, has_ffn):
        super().__init__()
        self.n_head, self.d_head, self.has_ffn = n_head, d_head, has_ffn
        if n_head:
            self.attn_norm = nn.LayerNorm(d_model)
            self.qkv = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
            self.out = nn.Linear(n_head * d_head, d_model, bias=False)
        if has_ffn:
            self.ffn_norm = nn.LayerNorm(d_model)
            self.up = nn.Linear(d_model, 4 * d_model, bias=False)
            self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def attention(self, x, attn_mask, z):
        """x: (B, T, C); attn_mask: (B, 1, 1, T) added to the scores, or None; z: (H D,) gates or None.

        A gate multiplies its head's context. Multiplying the columns of the output matrix that read this
        context is the same product and cheaper, since there are more tokens than rows of the matrix.
        """
        B, T, _ = x.shape
        qkv = linear(self.attn_norm(x), self.qkv.weight).view(B, T, 3, self.n_head, self.d_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)  # (B, H, T, D)
        out = self.out.weight if z is None else self.out.weight * z  # (C, H D)
        return linear(y.transpose(1, 2).reshape(B, T, -1), out)  # (B, T, C)

    def feed_forward(self, x, z):
        """x: (B, T, C), z: () gate or None; it multiplies the output, which is again done in the matrix."""
        down = self.down.weight if z is None else self.down.weight * z  # (C, 4 C)
        return linear(F.relu(linear(self.ffn_norm(x), self.up.weight)), down)  # (B, T, C)


def add(x, y, scale):
    """x + y * scale in one pass; x and y (B, T, C), scale broadcastable to them or None for 1."""
    return x + y if scale is None else torch.addcmul(x, y, scale)


class GatedTransformer(nn.Module):
    """Transformer encoder with one linear classifier per task.

    vocab: words in order of id, the three SPECIAL ones first. labels: task name -> list of label names.
    """

    def __init__(self, config, vocab, labels):
        super().__init__()
        self.config, self.vocab, self.labels = config, vocab, labels
        self.word_id = {word: i for i, word in enumerate(vocab)}
        self.token = nn.Embedding(config.n_vocab, config.d_model)
        self.position = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.d_head, n, f) for n, f in zip(config.heads, config.ffn)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.classifier = nn.ModuleDict({t: nn.Linear(config.d_model, len(n)) for t, n in labels.items()})
        nn.init.normal_(self.token.weight, std=0.02)  # large vectors make it easy to learn texts by heart
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids, task, z=None, drop=None):
        """Class scores of a batch.

        ids: (B, T) word ids, PAD on the right. z: gates (z.head (L, H), z.ffn (L,)), None = all open.
        drop: factors (B, 2L + 1, C) from `dropout_noise`, None = no dropout. Returns logits (B, labels).
        """
        B, T = ids.shape
        real = ids != PAD  # (B, T)
        x = self.token(ids) + self.position.weight[:T]  # (B, T, C)
        # numbers, because torch would convert booleans in every layer anew
        attn_mask = None if bool(real.all()) else torch.where(real, 0.0, -torch.inf).to(x).view(B, 1, 1, T)
        L = len(self.blocks)
        head = ffn = [None] * L
        if z is not None:
            head, ffn = z.head.repeat_interleave(self.config.d_head, dim=1).unbind(), z.ffn.unbind()
        drop = [None] * (2 * L + 1) if drop is None else drop.unsqueeze(2).unbind(1)  # each (B, 1, C)
        x = x if drop[-1] is None else x * drop[-1]
        for i, block in enumerate(self.blocks):
            if block.n_head:
                x = add(x, block.attention(x, attn_mask, head[i]), drop[2 * i])
            if block.has_ffn:
                x = add(x, block.feed_forward(x, ffn[i]), drop[2 * i + 1])
        weight = real.to(x) / real.sum(1, keepdim=True)  # (B, T), for the mean over words
        return self.classifier[task]((weight.unsqueeze(1) @ self.norm(x)).squeeze(1))

    @torch.no_grad()
    def predict(self, texts):
        """Label names of the target task. texts: a list of strings, or of tuples for pairs of texts."""
        texts = [texts] if isinstance(texts, str) else texts
        names, device = [], self.norm.weight.device
        for chunk in (texts[i : i + 64] for i in range(0, len(texts), 64)):
            found = [words(text, self.config.max_length) for text in chunk]
            ids = [torch.tensor([self.word_id.get(w, UNK) for w in ws]) for ws in found]
            logits = self(nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device), "target")
            names += [self.labels["target"][i] for i in logits.argmax(1).tolist()]
        return names

    def save(self, path):
        """Write weights, shapes, vocabulary and label names to one file."""
        parts = {"config": asdict(self.config), "vocab": self.vocab, "labels": self.labels}
        write(path, {**parts, "state": self.state_dict()})

    @classmethod
    def load(cls, path):
        """Read what `save` wrote, on the CPU. Executes no code from the file (weights_only)."""
        parts = torch.load(path, map_location="cpu", weights_only=True)
        model = cls(Config(**parts["config"]), parts["vocab"], parts["labels"])
        model.load_state_dict(parts["state"])
        return model


def write(path, parts):
    """Write a dict of tensors and plain values so that, whatever fails, the file is complete or as before.

    Raises OSError, and leaves nothing half-written, when the disk is full or the folder gone.
    """
    torch.save(parts, content := io.BytesIO())
    with open(f"{path}.tmp", "wb") as file:
        file.write(content.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def words(text, max_length):
    """Lower-case words and punctuation marks of a text, or of a tuple of texts with <sep> between them.

    Returns at least one and at most max_length strings; of two texts the longer one is cut first. Reads no
    further than 32 characters a word, so that a text of many megabytes costs no more than a long one.
    """
    parts = (text,) if isinstance(text, str) else text
    limit = max(1, max_length - len(parts) + 1)
    found = [WORD.findall(part[: 32 * limit].lower())[:limit] for part in parts]
    while sum(map(len, found)) > limit:
        max(reversed(found), key=len).pop()
    return [w for part in found for w in [SPECIAL[SEP], *part]][1 : max_length + 1] or [SPECIAL[UNK]]


class Examples(NamedTuple):
    """N labelled texts in three flat arrays: without a Python object each, a million cost their ids only."""

    tokens: np.ndarray  # word ids of all texts, one text after the other
    start: np.ndarray  # (N + 1,) text i is tokens[start[i]:start[i + 1]]
    label: np.ndarray  # (N,) class ids, -1 where there is none

    def take(self, keep):
        """The examples for which the boolean array keep (N,) is True."""
        length = np.diff(self.start)
        start = np.concatenate([[0], np.cumsum(length[keep])])
        return Examples(self.tokens[np.repeat(keep, length)], start, self.label[keep])

    def texts(self):
        """Iterate over the texts as byte strings, comparable between Examples that share their word ids."""
        return (self.tokens[a:b].tobytes() for a, b in zip(self.start[:-1], self.start[1:]))

    def batch(self, index, device="cpu"):
        """ids (B, T), padded to the longest of these texts, and labels (B,), for an integer array (B,)."""
        start, length = self.start[index, None], np.diff(self.start)[index, None]
        column = np.arange(length.max())
        ids = np.where(column < length, self.tokens[np.minimum(start + column, len(self.tokens) - 1)], PAD)
        return torch.from_numpy(ids).long().to(device), torch.from_numpy(self.label[index]).long().to(device)


def tokenize(pairs, max_length, word_id, label_id):
    """Turn (text, label name) pairs into Examples; new words and names get the next free id of the dicts."""
    tokens, start, label = array("i"), array("q", [0]), array("i")
    for text, name in pairs:
        tokens.extend([word_id.setdefault(w, len(word_id)) for w in words(text, max_length)])
        start.append(len(tokens))
        label.append(-1 if name is None else label_id.setdefault(name, len(label_id)))
    return Examples(np.asarray(tokens), np.asarray(start), np.asarray(label))  # the same memory, no copy


def dropout_noise(model, batch_size, p, generator):
    """Dropout factors (B, 2L + 1, C), 0 or 1 / (1 - p), for every sublayer's output and for the embeddings.

    One draw serves all tokens of an example (Gal and Ghahramani 2016): T times fewer random numbers, and the
    noise of an example depends neither on padding nor on its neighbours in the batch.
    """
    shape = (batch_size, 2 * len(model.blocks) + 1, model.config.d_model)
    return torch.empty(shape, device=generator.device).bernoulli_(1 - p, generator=generator).div_(1 - p)


def prunable(model):
    """Number of prunable parameters: the matrices of the attention and feed-forward sublayers."""
    return sum(p.numel() for name, p in model.blocks.named_parameters() if "norm" not in name)


@torch.no_grad()
def extract(model, z):
    """A physically smaller model that computes what `model` computes under the gates z.

    z: head (L, H), ffn (L,). Units with z = 0 are cut out of the weights; other gate values are multiplied
    into the output projections. All heads of a layer closed means that the layer has no attention any more.
    """
    D, state = model.config.d_head, model.state_dict()
    for i in range(len(model.blocks)):
        keep = z.head[i].nonzero().squeeze(1)
        qkv = state[f"blocks.{i}.qkv.weight"].unflatten(0, (3, -1, D))  # (3, H, D, C)
        out = state[f"blocks.{i}.out.weight"].unflatten(1, (-1, D)) * z.head[i].view(-1, 1)  # (C, H, D)
        state[f"blocks.{i}.qkv.weight"] = qkv[:, keep].flatten(0, 2)
        state[f"blocks.{i}.out.weight"] = out[:, keep].flatten(1)
        state[f"blocks.{i}.down.weight"] = state[f"blocks.{i}.down.weight"] * z.ffn[i]
    heads, ffn = (z.head > 0).sum(1).tolist(), (z.ffn > 0).long().tolist()
    small = GatedTransformer(replace(model.config, heads=heads, ffn=ffn), model.vocab, model.labels)
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    return small.to(model.norm.weight.device)


@torch.no_grad()
def evaluate(model, examples, z, device):
    """Accuracy, macro_f1 (mean over classes) and loss (nats) of the target task. z: gates or None."""
    order = np.argsort(np.diff(examples.start), kind="stable")  # similar lengths together: little padding
    parts = np.array_split(order, max(1, len(order) // 256))
    logits = torch.cat([model(examples.batch(part, device)[0], "target", z) for part in parts])
    labels = torch.from_numpy(examples.label[order]).long().to(device)
    predicted = logits.argmax(1)
    hit, present = predicted == labels, torch.cat([predicted, labels])
    f1 = [2 * (hit & (labels == c)).sum() / (present == c).sum() for c in present.unique()]
    scores = {"accuracy": hit.double().mean(), "macro_f1": sum(f1) / len(f1)}
    return {name: x.item() for name, x in (scores | {"loss": F.cross_entropy(logits, labels)}).items()}


@torch.no_grad()
def latency_ms(models, ids, repeats=50):
    """Median milliseconds of a forward pass of ids (B, T), for each model; the models take turns."""
    times = [[] for _ in models]
    for _ in range(repeats):
        for model, seconds in zip(models, times):
            start = time.perf_counter()
            model(ids, "target").cpu()
            seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds) for seconds in times]


def interval(values):
    """Mean, standard deviation and half-width of the 95 % t-interval of independent values (nan for one)."""
    t975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145)
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    t = t975[min(max(len(values) - 1, 1), 14) - 1]  # beyond 14 degrees of freedom a little too wide
    return statistics.mean(values), deviation, t * deviation / len(values) ** 0.5
