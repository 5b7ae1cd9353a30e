"""Claims about the transformer, its gates in place, and extraction (model.py)."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from masks import Z
from model import (
    PAD,
    SEP,
    SPECIAL,
    UNK,
    Config,
    GatedTransformer,
    dropout_noise,
    extract,
    interval,
    linear,
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


def test_the_product_and_its_gradients_equal_torchs_linear():
    """Float32 rounding apart (1e-5 relative), for two and three dimensions and odd sizes."""
    for shape, width in (((5, 7, 33), 9), ((64, 64), 256), ((1, 3), 1)):
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(width, shape[-1], requires_grad=True)
        grad = torch.randn(*shape[:-1], width)
        ours, theirs = linear(x, weight), F.linear(x, weight)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, theirs))):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_attention_equals_a_loop_over_texts_heads_and_tokens():
    """Scaled dot-product attention written out, without padding and batches."""
    model, ids = network(), texts()
    block, D = model.blocks[0], C // H
    x = torch.randn(*ids.shape, C, generator=torch.Generator().manual_seed(1))
    y = block.attention(x, (ids != PAD).view(6, 1, 1, 9), None)
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


def test_dropout_noise_has_mean_one_and_is_the_same_for_all_tokens_of_a_text():
    model = network()
    drop = dropout_noise(model, 500, 0.25, torch.Generator().manual_seed(0))
    assert drop.shape == (500, 2 * L + 1, C)
    assert drop.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(drop.mean().item() - 1) < 5 * (1 / 3) ** 0.5 / drop.numel() ** 0.5  # five standard errors
    silent = torch.zeros(1, 2 * L + 1, C)
    x = model(texts()[:1], "target", None, silent)  # all dropped: only the final norm's bias is left
    torch.testing.assert_close(x, model.classifier["target"](model.norm(torch.zeros(1, C))))


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


def test_interval_is_the_t_interval():
    """Against the textbook: 1 to 5 have mean 3 and deviation sqrt(2.5); the 0.975 quantile of t with 4 df is
    2.776."""
    mean, deviation, half = interval([1, 2, 3, 4, 5])
    assert (mean, deviation) == (3, pytest.approx(2.5**0.5))
    assert half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=1e-3)
    assert math.isnan(interval([1])[2])


def test_the_interval_covers_the_true_mean_in_95_of_100_series():
    """5,000 series of 5 normal values; 0.012 is four standard errors of a share of 0.95."""
    values = torch.randn(5000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    covered = sum(abs(mean) <= half for mean, _, half in map(interval, values)) / 5000
    assert abs(covered - 0.95) < 0.012
