"""The network, and the same network smaller: a transformer encoder for text classification, whose
heads and layers can be gated and cut out; the words that it reads; and how it takes over the
weights of a BERT.

    python model.py out/pruned.pt < texts.txt        # label and probability of every line

One class is the dense network and the pruned one: `Config.heads` says how many heads each layer
has, `Config.ffn` whether it has a feed-forward sublayer. `extract` copies the open units of a gated
network into a smaller instance. Two kinds differ in `Config.bert`: a small pre-norm network without
biases, which starts from random weights and reads words, and a BERT (Devlin et al. 2019), post-norm
with biases, which reads word pieces. In both a closed unit contributes exactly nothing. With
pre-norm a closed sublayer is the identity, and its norm goes with it; with post-norm its norm
remains, and so does its output bias, which belongs to no unit. Left out on purpose: causal
attention, the second token type of a BERT (both texts of a pair have the first), its pooler
(features are the mean over tokens), cased vocabularies.

Letters in shape comments: B batch, T tokens, C channels (d_model), L layers, H heads of a layer, D
head size.
"""

import json
import math
import re
import string
import sys
import unicodedata
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that says what to change."""


# ---------------------------------------------------------------------------- words and word pieces

PAD, UNK, SEP = 0, 1, 2  # ids of padding, unknown word, end of a text
SPECIAL = ["[PAD]", "[UNK]", "[SEP]"]
CLS = "[CLS]"  # the first token that a BERT reads
# combining marks are parts of a word: without them \w would cut the words of Hindi, Thai and others
# to pieces
MARKS = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c).startswith("M"))
WORD = re.compile(rf"\w[\w{MARKS}]*(?:'\w[\w{MARKS}]*)*|[^\w\s]")


def normalise(text):
    """Lower-case text with single spaces, composed accents (NFC) and plain apostrophes."""
    return " ".join(unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'").split())


def words(text):
    """Lower-case words and punctuation marks of a string: the tokens of the small network."""
    return [sys.intern(word) for word in WORD.findall(normalise(text))]  # equal ones share memory


CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f"


@lru_cache(maxsize=None)
def bert_character(c):
    """What BERT's tokenizer makes of one character of a lower-case, decomposed (NFD) text."""
    category = unicodedata.category(c)
    if c in "\t\n\r":
        return " "
    if category == "Mn" or category[0] == "C" or c == "\ufffd":  # accents, control characters
        return ""
    apart = category[0] == "P" or c in string.punctuation or re.match(f"[{CHINESE}]", c)
    return f" {c} " if apart else c


def word_pieces(vocab):
    """The tokenizer of an uncased BERT, a function from a string to pieces of `vocab`.

    A word is cut greedily: the longest piece that it starts with, then the longest that the rest
    starts with, written with ##; or [UNK], if that fails.
    """
    known = set(vocab)

    @lru_cache(maxsize=2**17)
    def pieces(word):
        if len(word) > 100:  # the tokenizer's limit
            return [SPECIAL[UNK]]
        found, start = [], 0
        while start < len(word):
            prefix, end = "##" if start else "", len(word)
            while end > start and prefix + word[start:end] not in known:
                end -= 1
            if end == start:
                return [SPECIAL[UNK]]
            found.append(sys.intern(prefix + word[start:end]))
            start = end
        return found

    def tokenizer(text):
        plain = "".join(map(bert_character, unicodedata.normalize("NFD", text.lower())))
        return [piece for word in plain.split() for piece in pieces(word)]

    return tokenizer


def tokenize(texts, tokenizer, max_length, bert):
    """The tokens of an example, at most max_length, and whether some were cut off.

    texts: a tuple of strings; tokenizer: `words` or what `word_pieces` returns. Small: a [SEP] b; a
    BERT's: [CLS] a [SEP] b [SEP]. The longer text is cut first.
    """
    parts = [tokenizer(text) for text in texts]
    marks = len(parts) + 1 if bert else len(parts) - 1  # [CLS] and a [SEP] each, or [SEP] between
    room = max(1, max_length - marks)
    cut = sum(len(part) for part in parts) > room
    parts = [part[:room] for part in parts]
    while sum(len(part) for part in parts) > room:
        longest = max(len(part) for part in parts)
        [part for part in parts if len(part) == longest][-1].pop()  # of equally long ones the last
    tokens = [token for part in parts for token in (*part, SPECIAL[SEP])]
    tokens = [CLS, *tokens] if bert else tokens[:-1]
    return tokens[:max_length] or [SPECIAL[UNK]], cut


# ----------------------------------------------------------------------------- the network


@dataclass
class Config:
    """The shapes of all tensors but those of the classifiers, and what an example is."""

    vocab_size: int
    max_length: int  # tokens; longer texts are cut
    d_model: int
    d_head: int
    heads: list  # (L,) number of heads in each layer, 0 = no attention
    ffn: list  # (L,) 1 or 0: has the layer a feed-forward sublayer?
    n_texts: int = 1  # texts of an example: 2 for pairs
    bert: bool = False  # post-norm with biases and GELU, on word pieces


def scale(x, factor):
    """x times a gate or a dropout factor; None: there is none."""
    return x if factor is None else x * factor


class Block(nn.Module):
    """The two sublayers of a layer, each with its norm; matrices that were cut are not there."""

    def __init__(self, config, n_head, has_ffn):
        super().__init__()
        C, D, bert = config.d_model, config.d_head, config.bert
        eps = 1e-12 if bert else 1e-5
        self.n_head, self.d_head, self.has_ffn, self.bert = n_head, D, has_ffn, bert
        if n_head or bert:
            self.attn_norm = nn.LayerNorm(C, eps)
        if n_head:
            self.qkv = nn.Linear(C, 3 * n_head * D, bias=bert)
            self.out = nn.Linear(n_head * D, C, bias=False)
        if has_ffn or bert:
            self.ffn_norm = nn.LayerNorm(C, eps)
        if has_ffn:
            self.up = nn.Linear(C, 4 * C, bias=bert)
            self.down = nn.Linear(4 * C, C, bias=False)
        if bert:  # the output biases, which stay when a whole sublayer is cut
            self.attn_bias = nn.Parameter(torch.zeros(C))
            self.ffn_bias = nn.Parameter(torch.zeros(C))

    def attention(self, x, attn_mask, z=None):
        """x: (B, T, C); attn_mask: (B, 1, 1, T), added to the scores; z: (H,) gates or None."""
        if not self.n_head:
            return torch.zeros_like(x)
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, self.d_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_head) + attn_mask  # (B, H, T, T)
        at_least_float32 = torch.promote_types(x.dtype, torch.float32)
        context = scores.softmax(-1, dtype=at_least_float32).to(x.dtype) @ v  # (B, H, T, D)
        if z is not None:
            context = context * z.view(-1, 1, 1)  # a closed head contributes zero
        return self.out(context.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def feed_forward(self, x, z=None):
        """x: (B, T, C); z: () gate, None = open."""
        if not self.has_ffn:
            return torch.zeros_like(x)
        hidden = F.gelu(self.up(x)) if self.bert else F.relu(self.up(x))  # (B, T, 4 C)
        return scale(self.down(hidden), z)  # (B, T, C)

    def forward(self, x, attn_mask, z_head=None, z_ffn=None, drop_attn=None, drop_ffn=None):
        """x: (B, T, C); gates and attn_mask as above; drop_*: dropout factors (B, 1, C)."""
        if self.bert:
            context = self.attention(x, attn_mask, z_head) + self.attn_bias
            x = self.attn_norm(x + scale(context, drop_attn))
            return self.ffn_norm(x + scale(self.feed_forward(x, z_ffn) + self.ffn_bias, drop_ffn))
        if self.n_head:
            x = x + scale(self.attention(self.attn_norm(x), attn_mask, z_head), drop_attn)
        if self.has_ffn:
            x = x + scale(self.feed_forward(self.ffn_norm(x), z_ffn), drop_ffn)
        return x


class GatedTransformer(nn.Module):
    """Transformer encoder with one linear classifier per task.

    vocab: words or word pieces in order of id, SPECIAL first. labels: task name -> list of label
    names.
    """

    def __init__(self, config, vocab, labels):
        super().__init__()
        self.config, self.vocab, self.labels = config, vocab, labels
        self.word_id = {word: i for i, word in enumerate(vocab)}
        self.tokenizer = word_pieces(vocab) if config.bert else words
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config, n, f) for n, f in zip(config.heads, config.ffn))
        self.norm = nn.LayerNorm(config.d_model, 1e-12 if config.bert else 1e-5)
        linears = {task: nn.Linear(config.d_model, len(names)) for task, names in labels.items()}
        self.classifier = nn.ModuleDict(linears)
        nn.init.normal_(self.token.weight, std=0.02)  # with torch's 1.0 texts are easy to memorise
        nn.init.normal_(self.position.weight, std=0.02)

    def features(self, ids, z=None, drop=None):
        """The mean over tokens of the last hidden states, (B, C). Arguments as in `forward`."""
        B, T = ids.shape
        real = ids != PAD  # (B, T)
        x = self.token(ids) + self.position.weight[:T]  # (B, T, C)
        attn_mask = torch.where(real, 0.0, -torch.inf)  # no token sees padding
        attn_mask = attn_mask.to(x.dtype).view(B, 1, 1, T)
        z_head = z_ffn = [None] * len(self.blocks)  # all open
        if z is not None:
            z_head, z_ffn = z.head.to(x.dtype), z.ffn.to(x.dtype)
        drop = drop or [None] * (2 * len(self.blocks) + 1)
        if self.config.bert:
            x = self.norm(x)
        x = scale(x, drop[-1])  # the last factor is that of the embedding
        for block, *factors in zip(self.blocks, z_head, z_ffn, drop[::2], drop[1::2]):
            x = block(x, attn_mask, *factors)
        if not self.config.bert:
            x = self.norm(x)
        x = x * real.unsqueeze(2)  # (B, T, C), padding set to 0
        return x.sum(1) / real.sum(1, keepdim=True)

    def forward(self, ids, task, z=None, drop=None):
        """Class scores of a batch.

        ids: (B, T) token ids, PAD on the right. task: "target" or "auxiliary". z: gates, Units of
        masks.py or anything with head (L, H) and ffn (L,); None = all open. drop: what
        `dropout_noise` drew, None = no dropout. Returns logits (B, labels).
        """
        return self.classifier[task](self.features(ids, z, drop))

    @torch.no_grad()
    def probabilities(self, texts):
        """Class probabilities of the target task: (N, labels), in the order of labels["target"].

        texts: a list of strings or, where an example has several texts, of tuples of strings.
        Raises TypeError for anything else, ValueError for another number of texts than it was
        trained on.
        """
        if not isinstance(texts, list):
            raise TypeError(f"texts are a list, not a {type(texts).__name__}")
        encoded = [torch.tensor(self.encode(text, number)) for number, text in enumerate(texts, 1)]
        parts = [torch.zeros(0, len(self.labels["target"]))]
        for start in range(0, len(texts), 64):
            ids = nn.utils.rnn.pad_sequence(encoded[start : start + 64], True, PAD)  # (B, T)
            parts.append(self(ids.to(self.norm.weight.device), "target").float().softmax(1).cpu())
        return torch.cat(parts)

    def encode(self, text, number):
        """Token ids of an example, a string or a tuple of strings; number: its place."""
        texts = (text,) if isinstance(text, str) else text
        if not isinstance(texts, tuple) or not all(isinstance(part, str) for part in texts):
            raise TypeError(f"text {number} is no string and no tuple of strings: {text!r:.80}")
        n_texts = self.config.n_texts
        if len(texts) != n_texts:
            raise ValueError(f"text {number} has {len(texts)} parts, the network reads {n_texts}")
        tokens, _ = tokenize(texts, self.tokenizer, self.config.max_length, self.config.bert)
        return [self.word_id.get(token, UNK) for token in tokens]

    def predict(self, texts):
        """The most probable label name of each text. texts: as in `probabilities`."""
        return [self.labels["target"][i] for i in self.probabilities(texts).argmax(1).tolist()]

    def save(self, path):
        """Write weights, shapes, vocabulary and label names."""
        parts = {"config": asdict(self.config), "vocab": self.vocab, "labels": self.labels}
        torch.save({**parts, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote, on the CPU. Executes no code of the file. Raises InputError."""
        try:
            parts = torch.load(path, map_location="cpu", weights_only=True)
            model = cls(Config(**parts["config"]), parts["vocab"], parts["labels"])
            model.load_state_dict(parts["state"])
        except Exception:  # whatever a missing, truncated or foreign file provokes
            raise InputError(f"{path} is missing, or not a network that train.py saved") from None
        if model.vocab[: len(SPECIAL)] != SPECIAL:
            raise InputError(f"{path} was saved by an earlier version: make it again")
        return model


def dropout_noise(model, batch_size, p, generator):
    """Draw the dropout factors of a batch, each 0 or 1 / (1 - p): 2 L + 1 times (B, 1, C), for
    attention and feed-forward of every layer in turn, and last for the embedding.

    One draw serves all tokens of a text (Gal and Ghahramani 2016): T times fewer random numbers,
    and the noise of a text depends neither on padding nor on its neighbours in the batch.
    """
    n = 2 * len(model.blocks) + 1
    noise = torch.empty(batch_size, n, model.config.d_model, device=generator.device)
    noise.bernoulli_(1 - p, generator=generator).div_(1 - p)
    return noise.unsqueeze(2).unbind(1)


# ------------------------------------------------------------------------- the same network smaller


def unit_sizes(d_model, n_head):
    """Parameters of one head (its slices of Q, K, V and output) and of one feed-forward sublayer:
    matrices count, biases do not.
    """
    return 4 * d_model * (d_model // n_head), 8 * d_model**2


def prunable(model):
    """Number of prunable parameters: the matrices of the attention and feed-forward sublayers."""
    return sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)


@torch.no_grad()
def extract(model, z):
    """A physically smaller model that computes what the unpruned `model` computes under gates z.

    z: head (L, H), ffn (L,). Units with z = 0 are cut out of the weights; other gate values are
    multiplied into the output projections. All heads of a layer closed means that the layer has no
    attention any more.
    """
    D, state, device = model.config.d_head, model.state_dict(), model.norm.weight.device
    z_head, z_ffn = z.head.to(device), z.ffn.to(device)
    for i in range(len(model.blocks)):
        keep = z_head[i].nonzero().squeeze(1)
        for name in (f"blocks.{i}.qkv.weight", f"blocks.{i}.qkv.bias"):
            if name in state:
                qkv = state[name].unflatten(0, (3, -1, D))  # (3, H, D, C), of the bias (3, H, D)
                state[name] = qkv[:, keep].flatten(0, 2)
        out = state[f"blocks.{i}.out.weight"].unflatten(1, (-1, D))  # (C, H, D)
        state[f"blocks.{i}.out.weight"] = (out * z_head[i].view(-1, 1))[:, keep].flatten(1)
        state[f"blocks.{i}.down.weight"] = state[f"blocks.{i}.down.weight"] * z_ffn[i]
    heads, ffn = (z.head > 0).sum(1).tolist(), (z.ffn > 0).long().tolist()
    small = GatedTransformer(replace(model.config, heads=heads, ffn=ffn), model.vocab, model.labels)
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    return small.to(model.norm.weight)  # device and precision


# ----------------------------------------------------------------------------- loading a BERT

SUPPORTED = {  # what config.json and tokenizer_config.json may say: the rest would be misread
    "model_type": ["bert"], "hidden_act": ["gelu"], "position_embedding_type": ["absolute"],
    "is_decoder": [False], "layer_norm_eps": [1e-12], "do_lower_case": [True],
    "strip_accents": [None, True], "tokenize_chinese_chars": [True],
    "tokenizer_class": ["BertTokenizer", "BertTokenizerFast"],
}  # fmt: skip
FILES = ["config.json", "tokenizer_config.json", "vocab.txt", "*.index.json", "model.safetensors"]
OURS = {  # parts of names, theirs -> ours, replaced in this order; query, key, value are stacked
    "bert.": "", "Norm.gamma": "Norm.weight", "Norm.beta": "Norm.bias", "encoder.layer": "blocks",
    "embeddings.word_embeddings": "token", "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "kind", "embeddings.LayerNorm": "norm",
    "attention.output.LayerNorm": "attn_norm", "attention.output.dense.bias": "attn_bias",
    "attention.output.dense": "out", "intermediate.dense": "up", "output.LayerNorm": "ffn_norm",
    "output.dense.bias": "ffn_bias", "output.dense": "down",
}  # fmt: skip


def load_bert(name):
    """A dense GatedTransformer without classifiers, with the weights and the vocabulary of a BERT.

    name: a folder in the layout of the hub, or owner/name on the hub. Raises InputError, with one
    line, for anything that would not be read as BERT's own implementation reads it.
    """
    try:
        folder = Path(name) if Path(name).is_dir() else download(name)
        return bert_from(*read_config(folder), read_tensors(folder))
    except KeyError as error:
        raise InputError(f"{name} lacks {error}") from None
    except Exception as error:  # the hub's and the file readers' dozens of types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be loaded: {reason}") from None


def download(name):
    """The folder of a network of the hub, with the files that are needed."""
    from huggingface_hub import snapshot_download  # here: a folder needs no package but torch

    folder = Path(snapshot_download(name, allow_patterns=FILES))
    if not (folder / "model.safetensors").exists():
        folder = Path(snapshot_download(name, allow_patterns=[*FILES, "pytorch_model.bin"]))
    return folder


def read_config(folder):
    """config.json, a dict, and the word pieces of vocab.txt, a list. Raises ValueError."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        config |= json.loads(tokenizer.read_text(encoding="utf-8"))
    for key, values in SUPPORTED.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{key} {config[key]!r} is not supported, only {values[0]!r}")
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise ValueError("intermediate_size is not four times hidden_size")
    vocab = (folder / "vocab.txt").read_bytes().decode().removesuffix("\n").split("\n")
    for piece in vocab:
        if piece != piece.lower() and not re.fullmatch(r"\[.*\]", piece):
            raise ValueError(f"a cased vocabulary is not supported: {piece!r} in vocab.txt")
    return config, vocab


def read_tensors(folder):
    """name -> tensor of model.safetensors, else of pytorch_model.bin, renamed by OURS.

    A safetensors file is eight bytes (a length), JSON of that length, and raw little-endian
    numbers.
    """
    if any(folder.glob("*.index.json")):
        raise ValueError("weights in several files are not supported")
    if (folder / "model.safetensors").exists():
        content = bytearray((folder / "model.safetensors").read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        dtypes, tensors = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}, {}
        for name, about in json.loads(content[8:start]).items():
            if dtype := dtypes.get(about.get("dtype")):  # no others are needed
                first, last = about["data_offsets"]
                numbers = torch.frombuffer(content[start + first : start + last], dtype=dtype)
                tensors[name] = numbers.view(about["shape"])
    else:
        tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = {}
    for name, tensor in tensors.items():
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        state[name] = tensor.float()
    return state


def bert_from(config, vocab, state):
    """The network of `load_bert` from the parts that were read. Raises KeyError."""
    L, H, C = config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]
    row = {piece: i for i, piece in enumerate(vocab)}
    ours = {piece: row[piece] for piece in (*SPECIAL, CLS)} | row  # in our order: SPECIAL first
    state["token.weight"] = state["token.weight"][list(ours.values())]
    state["position.weight"] = state["position.weight"] + state["kind.weight"][0]
    for i in range(L):
        for part in ("weight", "bias"):
            qkv = [f"blocks.{i}.attention.self.{name}.{part}" for name in ("query", "key", "value")]
            state[f"blocks.{i}.qkv.{part}"] = torch.cat([state[name] for name in qkv])
    shape = (len(ours), len(state["position.weight"]), C, C // H, [H] * L, [1] * L)
    model = GatedTransformer(Config(*shape, bert=True), list(ours), {})
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


# ----------------------------------------------------------------------------- the command line


def say(line):
    """Print a line; characters that the console cannot encode (latin-1) are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main():
    """Print label and probability of every line of stdin; a tab separates two texts."""
    try:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise ValueError("usage: python model.py out/pruned.pt < texts.txt")
        model = GatedTransformer.load(sys.argv[1])
        texts = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
        lines = texts.removesuffix("\n").split("\n") if texts else []
        probabilities = model.probabilities([tuple(line.split("\t")) for line in lines])
    except ValueError as error:  # what was read is no network, no UTF-8, or no such number of texts
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        for probability, best in zip(*probabilities.max(1)):
            say(f"{model.labels['target'][best]}\t{probability:.3f}")
    except BrokenPipeError:  # the reader has seen enough, as in "| head -1"
        sys.stdout = None


if __name__ == "__main__":
    main()
