"""Claims about the gates, the controller and the choice of a structure (masks.py)."""

import itertools
import math
import re
import textwrap

import pytest
import torch

import masks
from masks import Controller, Gates, Units, deterministic_z, prob_open, sample_z
from masks import select, sparsity, sparsity_at

HEAD, FFN = 4 * 64 * 16, 8 * 64 * 64  # sizes of a head and of a feed-forward sublayer at d_model 64, 4 heads


def random_gates(seed, n_layer=4, n_head=4):
    torch.manual_seed(seed)
    gates = Gates(n_layer, n_head)
    torch.nn.init.uniform_(gates.log_alpha, -4, 4)
    return gates


def test_prob_open_is_the_sampling_frequency():
    """The closed form P(z > 0) agrees with sampling; 5e-3 is over four standard errors at 200k samples."""
    generator = torch.Generator().manual_seed(0)
    for value in (-4.0, -1.0, 0.0, 1.0, 3.0):
        log_alpha = torch.full((200_000,), value)
        frequency = (sample_z(log_alpha, generator) > 0).float().mean()
        torch.testing.assert_close(frequency, prob_open(log_alpha[:1])[0], atol=5e-3, rtol=0)


def test_samples_are_in_the_unit_interval_with_exact_zeros_and_exact_ones():
    z = sample_z(torch.zeros(100_000), torch.Generator().manual_seed(0))
    assert z.min() == 0 and z.max() == 1
    for end in (0, 1):  # five standard errors around the closed form, sigmoid(2/3 log(1/11))
        assert (z == end).float().mean().item() == pytest.approx(1 / (1 + 11 ** (2 / 3)), abs=0.006)


def test_expected_sparsity_is_the_mean_over_sampled_masks():
    """Sampled masks z > 0, averaged; 4 standard errors of the mean are the tolerance."""
    gates, generator = random_gates(0), torch.Generator().manual_seed(0)
    seen = []
    for _ in range(4000):
        z = gates.sample(generator)
        seen.append(sparsity(Units((z.head > 0).float(), (z.ffn > 0).float()), HEAD, FFN).item())
    seen = torch.tensor(seen)
    error = seen.mean() - sparsity(gates.prob_open(), HEAD, FFN)
    assert abs(error) < 4 * seen.std() / len(seen) ** 0.5


def test_expected_sparsity_falls_as_any_log_alpha_rises():
    gates = random_gates(1)
    gradient = torch.autograd.grad(sparsity(gates.prob_open(), HEAD, FFN), gates.log_alpha)[0]
    assert (gradient < 0).all()


def test_sparsity_counts_parameters():
    """Closing one head and one feed-forward sublayer of two layers, counted by hand."""
    z = Units(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0]))
    assert sparsity(z, 3, 7).item() == pytest.approx((3 + 7) / (4 * 3 + 2 * 7))


def test_all_gates_start_wide_open():
    gates = Gates(3, 5)
    assert (gates.deterministic().head == 1).all() and (gates.deterministic().ffn == 1).all()
    assert sparsity(gates.prob_open(), HEAD, FFN) < 0.03
    assert abs(masks.INIT) < masks.LIMIT


def test_the_gate_at_evaluation_is_the_stretched_sigmoid_without_temperature():
    """Louizos et al. 2018, written out: sigmoid(log_alpha) stretched to (-0.1, 1.1) and clipped; the largest
    log_alpha reaches both ends."""
    assert deterministic_z(torch.tensor([-masks.LIMIT, masks.LIMIT])).tolist() == [0, 1]
    for value in (-4.0, -1.0, 0.5, 1.5, 4.0):
        expected = min(1.0, max(0.0, 1.2 / (1 + math.exp(-value)) - 0.1))
        assert deterministic_z(torch.tensor(value)).item() == pytest.approx(expected, abs=1e-6)


def test_a_closed_layer_gate_closes_every_head_of_the_layer():
    gates = Gates(2, 3)
    gates.log_alpha.data[1, -2] = -masks.LIMIT
    z = gates.deterministic()
    assert (z.head[0] == 1).all() and (z.head[1] == 0).all() and (z.ffn == 1).all()


def test_sparsity_schedule_is_zero_then_linear_then_constant():
    wanted = [sparsity_at(step, 0.8, 10, 4) for step in (0, 10, 11, 12, 14, 99)]
    assert wanted == pytest.approx([0, 0, 0.2, 0.4, 0.8, 0.8])
    assert [sparsity_at(step, 0.8, 10, 0) for step in (9, 10, 11)] == [0, 0, 0.8]  # a jump


def test_gates_have_the_precision_of_log_alpha_when_sampled_and_when_evaluated():
    for dtype in (torch.float16, torch.float32, torch.float64):
        log_alpha = torch.linspace(-4, 4, 50, dtype=dtype)
        for z in (sample_z(log_alpha), deterministic_z(log_alpha), prob_open(log_alpha)):
            assert z.dtype == dtype and z.isfinite().all()


def settle(gates, gate_lr, target, ramp, steps, task_loss=lambda z: 0.0, ascent=True):
    """Gates and controller in the loop's order, without a network. Returns (last gap, lambda1)."""
    controller = Controller(gate_lr)
    optimizer = torch.optim.Adam(gates.parameters(), lr=gate_lr, betas=(0.5, 0.9))
    for step in range(steps):
        z = gates.prob_open()
        gap = sparsity(z, HEAD, FFN) - sparsity_at(step, target, 0, ramp)
        optimizer.zero_grad()
        (controller.penalty(gap) + task_loss(z)).backward()
        optimizer.step()
        gates.clamp_()
        if ascent:
            controller.ascend(gap)
    return sparsity(gates.prob_open(), HEAD, FFN).item() - target, controller.lambda1.item()


def test_the_penalty_pulls_sparsity_towards_the_target_from_both_sides():
    """With lambda1 = 0 it is least at the target; lambda1 adds a slope of its own size."""
    controller, gap = Controller(0.05), torch.tensor([-0.2, 0.0, 0.2], requires_grad=True)
    values = controller.penalty(gap)
    assert values[1] == 0 and values[0] == values[2] > 0
    controller.lambda1 += 3
    slope = torch.autograd.grad(controller.penalty(gap).sum(), gap)[0]
    torch.testing.assert_close(slope, 3 + 2 * masks.PENALTY * gap.detach())


def test_the_multiplier_ascends_by_the_gap_and_a_large_gap_counts_as_lag():
    controller = Controller(0.1)
    for gap, change in ((0.01, 0.01), (-0.01, -0.01), (0.7, masks.MAX_GAP), (-0.7, -masks.MAX_GAP)):
        before = controller.lambda1.item()
        controller.ascend(torch.tensor(gap))
        assert controller.lambda1.item() - before == pytest.approx(masks.DUAL_LR * 0.1 * change, rel=1e-4)


@pytest.mark.parametrize("target, ramp", list(itertools.product((0.3, 0.5, 0.7, 0.9), (1, 70, 140))))
def test_controller_reaches_the_target_in_the_shortest_window_that_a_run_accepts(target, ramp):
    """Gates alone, in the fewest steps that the flags may leave: the ramp, and the time that a gate takes to
    get from its start to its limit, by hand."""
    import train

    shortest = ramp + round((2.5 + 4.6) / 0.1)
    flags = f"--sparsity {target} --gate_lr 0.1 --prune_ramp {ramp} --prune_start 0 --finetune_steps 1"
    train.parse_args([*flags.split(), "--steps", str(shortest + 1)])
    with pytest.raises(train.InputError, match=f"--steps {shortest}: the phases need {shortest + 1}:"):
        train.parse_args([*flags.split(), "--steps", str(shortest)])
    gap, _ = settle(Gates(4, 4), 0.1, target, ramp, shortest)
    assert abs(gap) < 0.02


def test_lambda1_is_the_price_of_a_parameter():
    """A task that loses `push` times the worth of what is cut: twice the push is twice the price, and the gap
    that the quadratic term alone leaves (push / (2 PENALTY), about) is closed."""
    worth = torch.linspace(0.5, 1.5, 20).view(4, 5)
    found = {}
    for push, ascent in ((2, True), (4, True), (4, False)):
        task_loss = lambda z: push * sparsity(Units(z.head * worth[:, :4], z.ffn * worth[:, 4]), HEAD, FFN)
        found[push, ascent] = settle(Gates(4, 4), 0.2, 0.6, 1, 200, task_loss, ascent)
    assert all(abs(found[push, True][0]) < 0.004 for push in (2, 4)) and abs(found[4, False][0]) > 0.01
    assert found[4, True][1] < 0 and found[4, True][1] / found[2, True][1] == pytest.approx(2, rel=0.05)


def test_the_dozen_lines_of_the_docstring_gate_a_torch_encoder():
    """Exactly the snippet that masks.py shows, on a small torch.nn.TransformerEncoder: the task is learned,
    the structure meets its budget, and units whose gate is 0 add nothing."""
    snippet = textwrap.dedent(re.search(r"\n\n(    gates, controller.*?)\n\n", masks.__doc__, re.S)[1])
    torch.manual_seed(0)
    n_layer, n_head, d_head = 2, 4, 4
    kind = {"batch_first": True, "norm_first": True, "bias": False}
    layer = torch.nn.TransformerEncoderLayer(16, n_head, 64, 0.0, **kind)
    network = torch.nn.TransformerEncoder(layer, n_layer, enable_nested_tensor=False)

    def batches():
        for _ in range(500):
            x = torch.randn(16, 5, 16)
            yield x, (x[:, :, 0].sum(1) > 0).long()

    def loss_of(hidden, y):
        return torch.nn.functional.cross_entropy(hidden.mean(1)[:, :2], y)

    names = {**vars(masks), "head_size": 4 * 16 * 4, "ffn_size": 8 * 16 * 16}
    names |= dict(n_layer=n_layer, n_head=n_head, d_head=d_head, network=network, batches=batches)
    exec(snippet, names | {"loss_of": loss_of}, names)
    structure, z, gated = names["structure"], names["z"], names["gated"]
    assert 0.7 <= sparsity(structure, 256, 2048).item() < 0.7 + 1 / 3
    assert abs(sparsity(names["gates"].prob_open(), 256, 2048).item() - 0.7) < 0.02
    assert names["loss"] < 0.5  # nats; guessing is 0.69
    for i in range(n_layer):
        out = gated[f"layers.{i}.self_attn.out_proj.weight"].view(16, n_head, d_head)
        silent = out.abs().sum((0, 2)) == 0
        assert torch.equal(silent, z.head[i] == 0)
        assert (gated[f"layers.{i}.linear2.weight"].abs().sum() == 0) == (z.ffn[i] == 0)


def test_a_probability_that_is_nan_and_a_sparsity_that_is_no_fraction_are_refused():
    gates = random_gates(0)
    for wrong in (70, -0.1, float("nan")):
        with pytest.raises(ValueError, match="a fraction, from 0 to 1"):
            select(gates.prob_open(), wrong, HEAD, FFN)
    for place in ((0, 0), (2, -1)):  # a head's, a feed-forward sublayer's
        gates.log_alpha.data[place] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            select(gates.prob_open(), 0.7, HEAD, FFN)
        gates.log_alpha.data[place] = 0


@pytest.mark.parametrize("seed", range(5))
def test_selection_meets_the_budget_by_less_than_one_unit(seed):
    """For every target from 0 to the reachable maximum: asked <= delivered < asked + the smallest dropped
    unit."""
    prob = random_gates(seed).prob_open()
    total = 4 * 4 * HEAD + 4 * FFN
    for target in torch.arange(0, 0.95, 0.01).tolist():
        z = select(prob, target, HEAD, FFN)
        dropped = [HEAD] * int((z.head == 0).sum()) + [FFN] * int((z.ffn == 0).sum())
        excess = sparsity(z, HEAD, FFN).item() - target
        assert -1e-6 <= excess < min(dropped, default=1) / total


def test_a_budget_of_whole_units_is_used_up_whatever_floating_point_makes_of_it():
    """A sparsity of 0.9 leaves one of ten units, though 10 (1 - 0.9) is a little less than one."""
    prob = random_gates(0, n_layer=2).prob_open()
    for kept in range(11):
        z = select(prob, (10 - kept) / 10, 1, 1)
        assert z.head.sum() + z.ffn.sum() == kept


def test_selection_keeps_the_most_probable_units():
    """Where every unit has the same size, the kept ones are the top of the list."""
    prob = Units(torch.tensor([[0.9, 0.1], [0.4, 0.8]]), torch.tensor([0.7, 0.3]))
    z = select(prob, 0.5, 1, 1)
    assert z.head.tolist() == [[1, 0], [0, 1]] and z.ffn.tolist() == [1, 0]


def test_of_equally_probable_units_heads_and_lower_layers_come_first():
    """Of units of the same probability: all heads, in order, before any feed-forward sublayer, but for one of
    these, the lowest, which comes first where it fits."""
    equal = Units(torch.full((3, 2), 0.5), torch.full((3,), 0.5))
    kept = select(equal, 1 - 3 / 12, 1, 2)  # room for three, too little for a sublayer and three heads
    assert kept.head.tolist() == [[1, 1], [1, 0], [0, 0]] and kept.ffn.tolist() == [0, 0, 0]
    for room, heads, ffn in ((5, [[1, 1], [1, 1], [0, 0]], [1, 0, 0]), (8, [[1, 1]] * 3, [1, 1, 0])):
        kept = select(equal, 1 - room / 9, 1, 1)
        assert kept.head.tolist() == heads and kept.ffn.tolist() == ffn


def test_selection_keeps_a_feed_forward_sublayer_if_it_leaves_a_head_to_every_layer():
    """Heads that are all more probable than any feed-forward sublayer leave room for one, but do not give way
    to it where it would take the place of eight of nine heads (80 %); at 90 % it does not fit at all."""
    prob = Units(torch.full((4, 4), 0.9), torch.tensor([0.1, 0.2, 0.3, 0.1]))
    assert select(prob, 0.7, HEAD, FFN).ffn.tolist() == [0, 0, 1, 0]
    assert select(prob, 0.5, HEAD, FFN).ffn.sum() >= 1
    for sparsity, n in ((0.8, 9), (0.9, 4)):
        z = select(prob, sparsity, HEAD, FFN)
        assert z.head.sum() == n and z.ffn.sum() == 0
    room_for_it = 1 - (FFN + 4 * HEAD) / (16 * HEAD + 4 * FFN)  # and exactly one head a layer
    assert select(prob, room_for_it, HEAD, FFN).ffn.sum() == 1
    assert select(prob, room_for_it + 0.001, HEAD, FFN).ffn.sum() == 0
