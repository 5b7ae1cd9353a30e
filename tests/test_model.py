"""Claims about the transformer, its gates in place, and extraction (model.py)."""

import io
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import model
from masks import Z
from model import (
    PAD,
    SEP,
    SPECIAL,
    UNK,
    Config,
    Dropout,
    GatedTransformer,
    dropout_noise,
    extract,
    prunable,
    words,
)

L, H, C = 3, 4, 32
VOCAB = [*SPECIAL, *(f"w{i}" for i in range(40))]


def network(seed=0):
    torch.manual_seed(seed)
    labels = {"target": ["no", "yes", "maybe"], "auxiliary": ["a", "b"]}
    model = GatedTransformer(Config(len(VOCAB), 16, C, C // H, [H] * L, [1] * L), VOCAB, labels)
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
    return Z(torch.ones(L, H), torch.ones(L))


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
    "soft gates": Z(torch.linspace(0, 1, L * H).view(L, H), torch.tensor([0.3, 0.0, 0.9])),
}


@pytest.mark.parametrize("name", CASES)
def test_extracted_logits_equal_masked_logits(name):
    """Cutting a unit out equals closing its gate; 1e-5 is float32 rounding, sums being taken in another
    order."""
    model, ids, z = network(), texts(), CASES[name]
    small = extract(model, z)
    for task in ("target", "auxiliary"):
        torch.testing.assert_close(small(ids, task), model(ids, task, z), atol=1e-5, rtol=1e-5)
    share = (z.head > 0).sum() * 4 * C * C // H + (z.ffn > 0).sum() * 8 * C * C
    assert prunable(small) == share and prunable(model) == L * 12 * C * C


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
    z = Z(
        torch.full((L, H), 0.7, dtype=torch.double, requires_grad=True),
        torch.full((L,), 0.6, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda head, ffn: model(ids, "target", Z(head, ffn)), (z.head, z.ffn))


def test_the_network_hears_hooks_functional_calls_and_second_derivatives():
    """What a researcher does to a network: a hook on every linear layer fires; torch.func's gradient equals
    .backward()'s; a second derivative agrees with finite differences (1e-5 in double precision)."""
    model, ids = network().double(), texts()
    labels, heard = torch.tensor([0, 1, 2, 0, 1, 2]), []
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, x, y: heard.append(m)) for m in linears]
    loss = F.cross_entropy(model(ids, "target"), labels)
    assert set(heard) == set(linears) - {model.classifier["auxiliary"]} and len(heard) == 4 * L + 1
    for hook in hooks:
        hook.remove()
    loss.backward()

    def loss_of(parameters):
        logits = torch.func.functional_call(model, parameters, (ids, "target"))
        return F.cross_entropy(logits, labels)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradient = torch.func.grad(loss_of)(parameters)
    for name, p in model.named_parameters():
        if not name.startswith("classifier.auxiliary"):
            torch.testing.assert_close(gradient[name], p.grad)

    generator, step = torch.Generator().manual_seed(0), 1e-5
    direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in parameters.items()}
    moved = [{n: p + sign * step * direction[n] for n, p in parameters.items()} for sign in (1, -1)]
    up, down = (torch.func.grad(loss_of)(p) for p in moved)
    second = torch.func.jvp(torch.func.grad(loss_of), (parameters,), (direction,))[1]
    for name in parameters:
        torch.testing.assert_close(second[name], (up[name] - down[name]) / (2 * step), atol=1e-5, rtol=1e-4)


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
    y = block.attention(x, hidden, None)
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
    """One factor for all tokens of a text; a share of the batch gets the numbers that it has in the whole."""
    model = network()
    drop = dropout_noise(model, 500, 0.25, torch.Generator().manual_seed(0))
    parts = [drop.embedding, *drop.attention, *drop.ffn]
    assert len(parts) == 2 * L + 1 and all(part.shape == (500, 1, C) for part in parts)
    noise = torch.stack(parts)
    assert noise.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(noise.mean().item() - 1) < 5 * (1 / 3) ** 0.5 / noise.numel() ** 0.5  # five standard errors
    assert all(not torch.equal(a, b) for i, a in enumerate(parts) for b in parts[:i])
    half = dropout_noise(model, 500, 0.25, torch.Generator().manual_seed(0), slice(1, None, 2))
    assert all(torch.equal(a[1::2], b) for a, b in zip(drop.ffn, half.ffn))


def test_each_dropout_factor_silences_its_own_sublayer():
    """Zeroing the factors of one sublayer equals closing it; zeroing all leaves the final norm's bias."""
    model, ids = network(), texts()
    full = lambda: torch.ones(len(ids), 1, C)
    for layer in range(L):
        drop = Dropout(full(), [full() for _ in range(L)], [full() for _ in range(L)])
        drop.ffn[layer].zero_()
        torch.testing.assert_close(
            model(ids, "target", None, drop), model(ids, "target", closed(ffn=[layer])), atol=1e-5, rtol=1e-5
        )
        drop.ffn[layer].fill_(1)
        drop.attention[layer].zero_()
        torch.testing.assert_close(
            model(ids, "target", None, drop), model(ids, "target", closed([layer])), atol=1e-5, rtol=1e-5
        )
    nothing = torch.zeros(1, 1, C)
    silent = model(ids[:1], "target", None, Dropout(nothing, [nothing] * L, [nothing] * L))
    torch.testing.assert_close(silent, model.classifier["target"](model.norm(torch.zeros(1, C))))


def test_embeddings_of_words_and_places_start_small():
    """With a standard deviation of 0.02, not torch's 1."""
    torch.manual_seed(0)
    new = GatedTransformer(Config(1000, 64, C, C // H, [H], [1]), SPECIAL, {"target": ["no", "yes"]})
    for embedding in (new.token, new.position):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_few_steps_overfit_one_batch():
    model, ids, labels = network(), texts(), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids, "target"), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_words_are_lower_case_limited_and_never_none():
    assert words("The soup wasn't BLAND, at all!", 20) == "the soup wasn't bland , at all !".split()
    assert words("a b c d", 2) == ["a", "b"]
    assert words("", 5) == words("  \t", 5) == [SPECIAL[UNK]]
    assert words(("a b c d", "e f g h"), 5) == ["a", "b", SPECIAL[SEP], "e", "f"]
    assert words(("a b c d", "e"), 5) == ["a", "b", "c", SPECIAL[SEP], "e"]  # the longer one is cut first
    assert words(("a b", "c d"), 1) == ["a"] and len(words(("a b", "c d"), 2)) == 2
    assert words("<pad>", 5) == ["<", "pad", ">"]
    assert len(words("x " * 10_000_000, 64)) == 64
    assert words("a" + " " * 5000 + "b", 2) == ["a", "b"]  # spaces are not what is limited


def test_one_word_in_several_spellings_is_one_word():
    """Typographic apostrophes, accents in one or two code points, and marks that belong to a word."""
    assert words("Don\u2019t", 5) == words("don't", 5) == ["don't"]
    assert words("cafe\u0301 noir", 5) == words("caf\u00e9 noir", 5) == ["caf\u00e9", "noir"]
    assert words("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e!", 5) == [
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\u092d\u093e\u0937\u093e",
        "!",
    ]


def test_white_space_before_a_text_does_not_hide_it():
    assert words(" \n" * 10_000 + "here", 5) == ["here"]
    assert words(("", "\t" * 10_000 + "there"), 5) == [SPECIAL[SEP], "there"]


@pytest.mark.parametrize("text", [None, 5, ["a", "b"], ("a", None), (), b"bytes"])
def test_what_is_no_text_is_refused_with_what_it_is(text):
    with pytest.raises(TypeError, match="a text is a string or a tuple of strings, not"):
        words(text, 5)


def test_a_saved_network_answers_the_same_in_a_new_process(tmp_path):
    """One file is enough: shapes, weights, vocabulary and label names; loaded with weights_only."""
    small = extract(network(), CASES["some heads"])
    small.save(tmp_path / "pruned.pt")
    asked = ["w1 w2 w3", "w4 unheard-of w5", ("w6", "w7 w8"), "", "w9 " * 99]
    loaded = f"GatedTransformer.load({str(tmp_path / 'pruned.pt')!r})"
    code = f"from model import GatedTransformer; print({loaded}.predict({asked!r}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == str(small.predict(asked))
    assert (
        len(set(small.predict([f"w{i}" for i in range(40)]))) > 1
    )  # it does not give one answer to everything


def test_predict_has_one_rule_for_pairs_and_gives_probabilities():
    """A list is a list of texts; a string or a tuple is one text; anything else is refused by name."""
    model = network()
    assert len(model.predict("w1 w2")) == len(model.predict(("w1", "w2"))) == len(model.predict(["w1"])) == 1
    asked = ["w1 w2", ("w1", "w2"), "w5"]
    p = model.probabilities(asked)
    assert p.shape == (3, 3) and torch.allclose(p.sum(1), torch.ones(3))
    assert model.predict(asked) == [model.labels["target"][i] for i in p.argmax(1)]
    assert model.predict([]) == []
    for wrong in (None, ["w1", None], [3]):
        with pytest.raises(TypeError, match="text"):
            model.predict(wrong)


def test_the_command_line_prints_a_label_and_its_probability_for_every_line(tmp_path, monkeypatch, capsys):
    """A tab parts the texts of a pair; a missing or foreign file and other encodings are one line."""
    net = network()
    net.save(tmp_path / "pruned.pt")
    (tmp_path / "foreign.pt").write_text("something else")

    def command(path, texts):
        """(exit code, stdout, stderr) of the command line, inside this process."""
        monkeypatch.setattr(sys, "argv", ["model.py", *([str(path)] if path else [])])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts)))
        try:
            code = model.main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    texts = "w1 w2\n\nw1\tw2\n".encode()
    code, out, _ = command(tmp_path / "pruned.pt", texts)
    printed = [line.split("\t") for line in out.splitlines()]
    asked = ["w1 w2", "", ("w1", "w2")]
    assert code == 0 and [label for label, _ in printed] == net.predict(asked)
    best = net.probabilities(asked).amax(1).tolist()
    assert [float(p) for _, p in printed] == pytest.approx(best, abs=6e-4)
    line = [sys.executable, "model.py", tmp_path / "pruned.pt"]  # as a user types it
    assert subprocess.run(line, input=texts, capture_output=True).stdout.decode() == out
    assert command(tmp_path / "pruned.pt", b"")[:2] == (0, "")  # no text, no label
    mark = b"\xef\xbb\xbf"  # with which some editors begin a file
    assert command(tmp_path / "pruned.pt", mark + texts)[1] == out
    odd = "w1\u2028w2 \x0c w3\r\nw4"  # a line ends at a line feed, and nowhere else
    assert command(tmp_path / "pruned.pt", odd.encode())[1].count("\n") == 2
    for path, texts, reason in (
        (tmp_path / "none.pt", b"a", "none.pt"),
        (tmp_path / "foreign.pt", b"a", "foreign.pt"),
        (tmp_path / "pruned.pt", b"\xff\xfe", "UTF-8"),
        (None, b"a", "usage"),
    ):
        code, _, error = command(path, texts)
        assert code == 2 and error.count("\n") == 1 and reason in error
