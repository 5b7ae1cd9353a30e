"""The network, and the same network smaller: a pre-norm transformer encoder for text classification, whose
heads and layers can be gated and cut out.

    python model.py out/pruned.pt < texts.txt        # label and probability of every line

The same class is the dense network and the pruned one: `Config.heads` says how many heads each layer has,
`Config.ffn` whether it has a feed-forward sublayer. `extract` copies the open units of a gated network into a
smaller instance. The projections have no bias, so that a closed unit contributes exactly nothing, and with
pre-norm a closed sublayer is the identity, so that its norm goes with it (with post-norm it would remain).
Left out on purpose: pretrained weights, subword tokens, causal attention.

Letters in shape comments: B batch, T tokens, C channels (d_model), L layers, H heads of a layer, D head size.
"""

import math
import re
import sys
import unicodedata
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

PAD, UNK, SEP = 0, 1, 2  # ids of padding, unknown word, boundary between two texts
SPECIAL = ["<pad>", "<unk>", "<sep>"]
MARKS = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c).startswith("M"))  # as in Hindi
WORD = re.compile(rf"\w[\w{MARKS}]*(?:'\w[\w{MARKS}]*)*|[^\w\s]")


def normalise(text):
    """Lower-case text with single spaces, composed accents (NFC) and plain apostrophes."""
    return " ".join(unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'").split())


def words(text, max_length):
    """Lower-case words and punctuation marks of a text, or of a tuple of texts with <sep> between them.

    Returns at least one and at most max_length strings; of two texts the longer one is cut first. Reads no
    further than 32 characters a word, so that a text of many megabytes costs no more than a long one.
    Raises TypeError for anything but strings.
    """
    parts = text if isinstance(text, tuple) else (text,)
    if not parts or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"a text is a string or a tuple of strings, not {text!r:.80}")
    room = max(1, max_length - (len(parts) - 1))  # words, beside the <sep> between parts
    starts = [" ".join(part.split(maxsplit=room)[:room])[: 32 * room] for part in parts]
    found = [WORD.findall(normalise(start))[:room] for start in starts]
    while sum(len(part) for part in found) > room:
        max(reversed(found), key=len).pop()  # of equally long parts the last one is cut
    joined = [word for part in found for word in (SPECIAL[SEP], *part)][1:]  # none before the first part
    return joined[:max_length] or [SPECIAL[UNK]]


@dataclass
class Config:
    """What determines the shapes of all tensors but those of the classifiers."""

    vocab_size: int
    max_length: int  # tokens; longer texts are cut
    d_model: int
    d_head: int
    heads: list  # (L,) number of heads in each layer, 0 = no attention sublayer
    ffn: list  # (L,) 1 or 0: has the layer a feed-forward sublayer?


class Block(nn.Module):
    """The two sublayers of a layer, each with its norm; one that was cut away is not there."""

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

    def attention(self, x, attn_mask, z=None):
        """x: (B, T, C); attn_mask: (B, 1, 1, T), added to the scores; z: (H,) gates, None = all open."""
        B, T, _ = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(B, T, 3, self.n_head, self.d_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_head) + attn_mask  # (B, H, T, T)
        context = scores.softmax(-1) @ v  # (B, H, T, D)
        if z is not None:
            context = context * z.view(-1, 1, 1)  # a closed head contributes zero
        return self.out(context.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def feed_forward(self, x, z=None):
        """x: (B, T, C); z: () gate, None = open."""
        y = self.down(F.relu(self.up(self.ffn_norm(x))))  # (B, T, C)
        return y if z is None else y * z


class Dropout(NamedTuple):
    """Dropout factors of a batch, 0 or 1 / (1 - p), from `dropout_noise`; each (B, 1, C)."""

    embedding: torch.Tensor
    attention: list  # (L,)
    ffn: list  # (L,)


class GatedTransformer(nn.Module):
    """Transformer encoder with one linear classifier per task.

    vocab: words in order of id, the three SPECIAL ones first. labels: task name -> list of label names.
    """

    def __init__(self, config, vocab, labels):
        super().__init__()
        self.config, self.vocab, self.labels = config, vocab, labels
        self.word_id = {word: i for i, word in enumerate(vocab)}
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.d_head, n, f) for n, f in zip(config.heads, config.ffn)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.classifier = nn.ModuleDict({t: nn.Linear(config.d_model, len(n)) for t, n in labels.items()})
        nn.init.normal_(self.token.weight, std=0.02)  # with torch's 1.0 it is too easy to memorise texts
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids, task, z=None, drop=None):
        """Class scores of a batch.

        ids: (B, T) word ids, PAD on the right. task: "target" or "auxiliary". z: gates, a Z of masks.py or
        anything with head (L, H) and ffn (L,); None = all open. drop: a Dropout, None = no dropout. Returns
        logits (B, labels).
        """
        B, T = ids.shape
        real = ids != PAD  # (B, T)
        attn_mask = torch.where(real, 0.0, -torch.inf).view(B, 1, 1, T)  # no word looks at padding
        x = self.token(ids) + self.position.weight[:T]  # (B, T, C)
        x = x if drop is None else x * drop.embedding
        for i, block in enumerate(self.blocks):
            if block.n_head:
                y = block.attention(x, attn_mask, None if z is None else z.head[i])
                x = x + (y if drop is None else y * drop.attention[i])
            if block.has_ffn:
                y = block.feed_forward(x, None if z is None else z.ffn[i])
                x = x + (y if drop is None else y * drop.ffn[i])
        x = self.norm(x) * real.unsqueeze(2)  # (B, T, C), padding set to 0
        return self.classifier[task](x.sum(1) / real.sum(1, keepdim=True))  # the mean over words

    @torch.no_grad()
    def probabilities(self, texts):
        """Class probabilities of the target task: (N, labels), in the order of self.labels["target"].

        texts: a list; each text is a string, or a tuple of two strings for a pair. A single text may stand
        without the list. Raises TypeError for anything else.
        """
        texts = texts if isinstance(texts, list) else [texts]
        parts = [torch.zeros(0, len(self.labels["target"]))]
        for chunk in (texts[i : i + 64] for i in range(0, len(texts), 64)):
            found = [words(text, self.config.max_length) for text in chunk]
            ids = [torch.tensor([self.word_id.get(w, UNK) for w in ws]) for ws in found]
            ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
            parts.append(self(ids.to(self.norm.weight.device), "target").softmax(1).cpu())
        return torch.cat(parts)

    def predict(self, texts):
        """The most probable label name of each text. texts: as in `probabilities`."""
        return [self.labels["target"][i] for i in self.probabilities(texts).argmax(1).tolist()]

    def save(self, file):
        """Write weights, shapes, vocabulary and label names. file: a path, or a binary file."""
        parts = {"config": asdict(self.config), "vocab": self.vocab, "labels": self.labels}
        torch.save({**parts, "state": self.state_dict()}, file)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote, on the CPU. Executes no code from the file (weights_only)."""
        parts = torch.load(path, map_location="cpu", weights_only=True)
        model = cls(Config(**parts["config"]), parts["vocab"], parts["labels"])
        model.load_state_dict(parts["state"])
        return model


def dropout_noise(model, batch_size, p, generator, share=slice(None)):
    """Draw a Dropout for a batch of batch_size texts, and keep those of the texts in `share` (a slice).

    One draw serves all tokens of a text (Gal and Ghahramani 2016): T times fewer random numbers, and the
    noise of a text depends neither on padding nor on its neighbours in the batch.
    """
    L = len(model.blocks)
    noise = torch.empty(batch_size, 2 * L + 1, model.config.d_model, device=generator.device)
    noise.bernoulli_(1 - p, generator=generator).div_(1 - p)
    *sublayers, embedding = noise[share].unsqueeze(2).unbind(1)  # each (B, 1, C)
    return Dropout(embedding, sublayers[0::2], sublayers[1::2])


def unit_sizes(d_model, n_head):
    """Parameters of one head (its slices of Q, K, V and output) and of one feed-forward sublayer."""
    return 4 * d_model * (d_model // n_head), 8 * d_model**2


def prunable(model):
    """Number of prunable parameters: the matrices of the attention and feed-forward sublayers."""
    return sum(p.numel() for name, p in model.blocks.named_parameters() if "norm" not in name)


@torch.no_grad()
def extract(model, z):
    """A physically smaller model that computes what the unpruned `model` computes under the gates z.

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


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    """Print label and probability, tab separated, for every line of stdin; a tab separates two texts."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        fail("usage: python model.py out/pruned.pt < texts.txt")
    try:
        model = GatedTransformer.load(sys.argv[1])
    except Exception:  # whatever a missing, truncated or foreign file provokes
        fail(f"{sys.argv[1]} is not a network that train.py saved")
    try:
        texts = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        fail(f"the texts are not UTF-8: {error}")
    lines = texts.removesuffix("\n").split("\n") if texts else []
    probabilities = model.probabilities([tuple(line.split("\t")) for line in lines])
    for probability, best in zip(*probabilities.max(1)):
        print(f"{model.labels['target'][best]}\t{probability:.3f}")


if __name__ == "__main__":
    main()
