"""The network, and the same network smaller: a transformer encoder for text classification, whose
heads and layers can be gated and pruned; the words that it reads; and how it takes over the weights
of a BERT.

    python model.py out/pruned.pt < texts.txt        # label and probability of every line

One class is the dense network and the pruned one: `Config.heads` says how many heads each layer
has, `Config.ffn` whether it has a feed-forward sublayer. `extract` copies the open units of a gated
network into a smaller instance. Two kinds differ in `Config.bert`: a small pre-norm network without
biases, which starts from random weights and reads words, and a BERT (Devlin et al. 2019), post-norm
with biases, which reads WordPiece tokens, here called pieces. In both a closed unit contributes
exactly nothing. With pre-norm a closed sublayer is the identity, and its norm goes with it; with
post-norm its norm remains, and so does its output bias, which belongs to no unit. Left out on
purpose: causal attention, the second token type of a BERT (both texts of a pair have the first),
and its pooler (features are the mean over tokens).

Letters in shape comments: B batch, T tokens, C channels (d_model), L layers, H heads of a layer, D
head size.
"""

import json
import math
import re
import sys
import unicodedata
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that says what to change."""


# ---------------------------------------------------------------------------- words and WordPiece

PAD, UNK, SEP = 0, 1, 2  # ids of padding, unknown word, end of a text
SPECIAL = ["[PAD]", "[UNK]", "[SEP]"]
CLS = "[CLS]"  # the first token that a BERT reads
WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def words(text):
    """Lower-case words and punctuation marks of a string: the tokens of the small network."""
    text = unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'")
    return [sys.intern(word) for word in WORD.findall(text)]  # equal ones share memory


CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f"


@lru_cache(maxsize=None)
def bert_character(c, cased):
    """What BERT's tokenizer makes of a character: a space, nothing, itself, or itself in spaces."""
    category = unicodedata.category(c)
    if c in "\t\n\r":
        return " "
    if (category == "Mn" and not cased) or category[0] == "C" or c == "\ufffd":
        return ""  # accents (Mn), control characters
    apart = category[0] == "P" or c in "$+<=>^`|~" or re.match(f"[{CHINESE}]", c)
    return f" {c} " if apart else c


def split_word(word, known):
    """The pieces of a word: the longest piece of `known` that it starts with, then the longest that
    the rest starts with, written with ##; or [UNK], if that fails.
    """
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


def word_pieces(text, known, cased):
    """WordPiece, the tokenizer of a BERT (Devlin et al. 2019): the pieces of a string.

    known: all pieces, a frozenset. cased: keep case and accents, instead of removing both.
    """
    if not cased:
        text = unicodedata.normalize("NFD", text.lower())
    plain = "".join(bert_character(c, cased) for c in text)
    return [piece for word in plain.split() for piece in split_word(word, known)]


def tokenize(texts, tokenizer, max_length, bert):
    """The tokens of an example, at most max_length.

    texts: a tuple of strings; tokenizer: a function from a string to its tokens. The small network
    reads a [SEP] b, a BERT [CLS] a [SEP] b [SEP]. The longer text is truncated first.
    """
    parts = [tokenizer(text) for text in texts]
    n_special = len(parts) + 1 if bert else len(parts) - 1  # [SEP] after each, or between
    room = max(1, max_length - n_special)
    parts = [part[:room] for part in parts]
    while sum(len(part) for part in parts) > room:
        max(reversed(parts), key=len).pop()  # the longest; of equally long ones the last
    tokens = [token for part in parts for token in (*part, SPECIAL[SEP])]
    tokens = [CLS, *tokens] if bert else tokens[:-1]
    return tokens[:max_length] or [SPECIAL[UNK]]


# ----------------------------------------------------------------------------- the network


@dataclass
class Config:
    """The shapes of all tensors but those of the classifiers, and what an example is."""

    vocab_size: int
    max_length: int  # tokens; longer texts are truncated
    d_model: int
    d_head: int
    heads: list  # (L,) number of heads in each layer, 0 = no attention
    ffn: list  # (L,) 1 or 0: has the layer a feed-forward sublayer?
    n_texts: int = 1  # texts of an example: 2 for pairs
    bert: bool = False  # post-norm with biases and GELU, on pieces
    cased: bool = False  # a BERT whose pieces have capital letters and accents


def scale(x, factor):
    """x times a gate or a dropout mask; x itself if the factor is None."""
    return x if factor is None else x * factor.to(x.dtype)


class Block(nn.Module):
    """The two sublayers of a layer, each with its norm; pruned matrices are not there."""

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
        if bert:  # the output biases, which stay when a whole sublayer is pruned
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
        z = None if z is None else z.view(-1, 1, 1)
        context = scale(scores.softmax(-1) @ v, z)  # (B, H, T, D), a closed head contributes zero
        return self.out(context.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def feed_forward(self, x, z=None):
        """x: (B, T, C); z: () gate, None = open."""
        if not self.has_ffn:
            return torch.zeros_like(x)
        hidden = F.gelu(self.up(x)) if self.bert else F.relu(self.up(x))  # (B, T, 4 C)
        return scale(self.down(hidden), z)  # (B, T, C)

    def forward(self, x, attn_mask, z_head=None, z_ffn=None, drop_attn=None, drop_ffn=None):
        """x: (B, T, C); gates and attn_mask as above; drop_*: dropout masks (B, 1, C)."""
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

    vocab: words or pieces in order of id, SPECIAL first. labels: task name -> list of label
    names.
    """

    def __init__(self, config, vocab, labels):
        super().__init__()
        self.config, self.vocab, self.labels = config, vocab, labels
        self.word_id = {word: i for i, word in enumerate(vocab)}
        self.tokenizer = words
        if config.bert:  # a partial function can be pickled, and takes another `known`
            self.tokenizer = partial(word_pieces, known=frozenset(vocab), cased=config.cased)
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config, n, f) for n, f in zip(config.heads, config.ffn))
        self.norm = nn.LayerNorm(config.d_model, 1e-12 if config.bert else 1e-5)
        linears = {task: nn.Linear(config.d_model, len(names)) for task, names in labels.items()}
        self.classifier = nn.ModuleDict(linears)
        nn.init.normal_(self.token.weight, std=0.02)  # with torch's 1.0 texts are easy to memorise
        nn.init.normal_(self.position.weight, std=0.02)

    def features(self, ids, z=None, dropout_masks=None):
        """The mean over tokens of the last hidden states, (B, C). Arguments as in `forward`."""
        B, T = ids.shape
        is_token = ids != PAD  # (B, T)
        x = self.token(ids) + self.position.weight[:T]  # (B, T, C)
        # no token sees padding
        attn_mask = torch.where(is_token, 0.0, -torch.inf).to(x.dtype).view(B, 1, 1, T)
        all_open = [None] * len(self.blocks)
        z_head, z_ffn = z or (all_open, all_open)
        drop = dropout_masks or [None] * (2 * len(self.blocks) + 1)
        if self.config.bert:
            x = self.norm(x)
        x = scale(x, drop[-1])  # the last mask is that of the embedding
        for i, block in enumerate(self.blocks):
            x = block(x, attn_mask, z_head[i], z_ffn[i], drop[2 * i], drop[2 * i + 1])
        if not self.config.bert:
            x = self.norm(x)
        x = x * is_token.unsqueeze(2)  # (B, T, C), padding set to 0
        return x.sum(1) / is_token.sum(1, keepdim=True)

    def forward(self, ids, task, z=None, dropout_masks=None):
        """Class scores of a batch.

        ids: (B, T) token ids, PAD on the right. task: "target" or "auxiliary". z: gates, Units of
        masks.py or another pair of tensors (L, H) and (L,); None = all open. dropout_masks: what
        the function of this name drew, None = no dropout. Returns logits (B, labels).
        """
        return self.classifier[task](self.features(ids, z, dropout_masks))

    @torch.no_grad()
    def probabilities(self, texts):
        """Class probabilities of the target task: (N, labels), in the order of labels["target"].

        texts: a list of strings or, where an example has several texts, of tuples of strings.
        """
        if isinstance(texts, str):
            raise TypeError("texts are a list of strings, not one string")
        encoded = [torch.tensor(self.encode(text)) for text in texts]
        parts = [torch.zeros(0, len(self.labels["target"]))]
        for start in range(0, len(texts), 64):
            ids = nn.utils.rnn.pad_sequence(encoded[start : start + 64], True, PAD)  # (B, T)
            parts.append(self(ids.to(self.norm.weight.device), "target").float().softmax(1).cpu())
        return torch.cat(parts)

    def encode(self, text):
        """Token ids of an example: a string or a tuple of strings."""
        texts = (text,) if isinstance(text, str) else text
        if len(texts) != self.config.n_texts:
            raise ValueError(f"{text!r:.80} is not {self.config.n_texts} text(s), as in training")
        tokens = tokenize(texts, self.tokenizer, self.config.max_length, self.config.bert)
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
            assert parts["vocab"][: len(SPECIAL)] == SPECIAL  # earlier versions had other names
            model = cls(Config(**parts["config"]), parts["vocab"], parts["labels"])
            model.load_state_dict(parts["state"])
        except Exception:  # whatever a missing, truncated or foreign file provokes
            raise InputError(f"{path} is missing, or this train.py did not write it") from None
        return model


def dropout_masks(model, batch_size, p, generator):
    """Draw the dropout masks of a batch, of numbers 0 or 1 / (1 - p): 2 L + 1 times (B, 1, C), for
    attention and feed-forward of every layer in turn, and last for the embedding.

    One draw serves all tokens of a text (Gal and Ghahramani 2016): T times fewer random numbers,
    and the masks of a text depend neither on padding nor on its neighbours in the batch.
    """
    n = 2 * len(model.blocks) + 1
    drawn = torch.empty(batch_size, n, model.config.d_model, device=generator.device)
    drawn.bernoulli_(1 - p, generator=generator).div_(1 - p)
    return drawn.unsqueeze(2).unbind(1)


# ----------------------------------------------------------------------------- the pruned network


def unit_sizes(d_model, n_head):
    """Parameters of one head (its slices of Q, K, V and output) and of one feed-forward sublayer:
    matrices count, biases do not.
    """
    return 4 * d_model * (d_model // n_head), 8 * d_model**2


@torch.no_grad()
def extract(model, z):
    """A physically smaller model that computes what the unpruned `model` computes under gates z.

    z: Units of masks.py. Those with z = 0 are removed from the weights; other gate values are
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

FILES = ["config.json", "vocab.txt", "model.safetensors"]
THEIRS = {  # our part of a tensor's name -> theirs
    "token": "embeddings.word_embeddings", "position": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm", "blocks": "encoder.layer", "up": "intermediate.dense",
    "qkv": "attention.self.query", "out": "attention.output.dense", "down": "output.dense",
    "attn_bias": "attention.output.dense.bias", "attn_norm": "attention.output.LayerNorm",
    "ffn_bias": "output.dense.bias", "ffn_norm": "output.LayerNorm",
}  # fmt: skip


def is_hub_name(name):
    """Whether a name has the form owner/name and is no path, since there is no folder `owner`."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).parent.exists()


def read_bert(name):
    """config.json, vocab.txt and the weights of a BERT: a dict, a list of pieces, and name ->
    float32 tensor, with today's names. Raises InputError, which names the file.
    """
    from huggingface_hub import snapshot_download  # here: only this function needs them
    from safetensors.torch import load_file

    file = folder = Path(name)
    if not is_hub_name(name) and not folder.is_dir():
        raise InputError(f"no such folder: {name!r} (a name on the Hugging Face Hub is owner/name)")
    try:
        if is_hub_name(name):
            folder = Path(snapshot_download(name, allow_patterns=FILES))
            if not (folder / "model.safetensors").exists():
                snapshot_download(name, allow_patterns=["pytorch_model.bin"])
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file = folder / "vocab.txt"
        vocab = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        file = folder / "model.safetensors"
        if file.exists():
            tensors = load_file(file)
        else:
            file = folder / "pytorch_model.bin"
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        for old, new in (("bert.", ""), ("Norm.gamma", "Norm.weight"), ("Norm.beta", "Norm.bias")):
            tensors = {key.replace(old, new): tensor.float() for key, tensor in tensors.items()}
    except Exception as error:  # the Hub and the readers raise dozens of types
        raise InputError(f"{file} cannot be read; missing, truncated, a web page, Git LFS pointer? "
                         f"{(str(error) or repr(error)).splitlines()[0]:.150}") from None
    return config, vocab, tensors


def load_bert(name):
    """A dense GatedTransformer without classifiers, with the weights and the vocabulary of a BERT.

    name: a folder with FILES (or pytorch_model.bin), or owner/name on the Hugging Face Hub. Raises
    InputError for one that cannot be read, or is of a kind that is not supported here.
    """
    config, vocab, tensors = read_bert(name)
    try:
        L, H, C = config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]
        supported = {"model_type": "bert", "hidden_act": "gelu", "intermediate_size": 4 * C,
                     "position_embedding_type": "absolute", "layer_norm_eps": 1e-12}  # fmt: skip
        for key, value in supported.items():
            if config.get(key, value) != value:
                raise InputError(f"{name}: {key} {config[key]!r} is not supported, only {value!r}")
        token = tensors["embeddings.word_embeddings.weight"]
        position = tensors["embeddings.position_embeddings.weight"]
        if not 0 <= len(token) - len(vocab) < 64:  # some have padding, up to a multiple of 64
            raise InputError(f"{name}: vocab.txt has {len(vocab)} lines, the weights {len(token)}")
        row = {piece: i for i, piece in enumerate(vocab)}
        row = {piece: row[piece] for piece in (*SPECIAL, CLS)} | row  # these come first
        cased = any(piece != piece.lower() and not piece.startswith("[") for piece in row)
        shape = (len(row), len(position), C, C // H, [H] * L, [1] * L)
        model = GatedTransformer(Config(*shape, bert=True, cased=cased), list(row), {})
        state = {}
        for ours in model.state_dict():
            theirs = ".".join(THEIRS.get(part, part) for part in ours.split("."))
            parts = ("query", "key", "value") if "query" in theirs else ("query",)
            state[ours] = torch.cat([tensors[theirs.replace("query", part)] for part in parts])
        state["token.weight"] = token[list(row.values())]
        state["position.weight"] += tensors["embeddings.token_type_embeddings.weight"][0]
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:  # a name that is missing, sizes that do not fit
        reason = f"{' '.join(str(error).split()):.200}; the first tensor is {min(tensors)!r}"
        raise InputError(f"{name} is not complete, or not a BERT: {reason}") from None
    return model


# ----------------------------------------------------------------------------- the command line


def lines_of_stdin():
    """The lines of the standard input, as strings. Raises InputError."""
    for number, line in enumerate(sys.stdin.buffer.read().splitlines(), 1):
        try:
            yield line.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"line {number}: save it as UTF-8") from None


def main():
    """Print label and probability of every line of stdin; a tab separates two texts."""
    try:
        if len(sys.argv) != 2:
            raise InputError("usage: python model.py out/pruned.pt < texts.txt")
        sys.stdout.reconfigure(errors="backslashreplace")  # what the console cannot encode
        model = GatedTransformer.load(sys.argv[1])
        texts = [tuple(line.split("\t")) for line in lines_of_stdin()]
        for probability, best in zip(*model.probabilities(texts).max(1)):
            print(f"{model.labels['target'][best]}\t{probability:.3f}", flush=True)
    except ValueError as error:  # no network, no UTF-8, or another number of texts
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has seen enough, as in "| head -1"
        sys.stdout = None  # or it would be flushed once more


if __name__ == "__main__":
    main()
