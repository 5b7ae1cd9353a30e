"""Claims about the gates, the controller and the choice of a structure (masks.py)."""

import itertools

import pytest
import torch

import masks
from masks import Z, Gates, deterministic_z, lagrangian, prob_open, sample_z, select, sparsity, sparsity_at

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
    assert (
        0.1 < (z == 0).float().mean() < 0.25 and 0.1 < (z == 1).float().mean() < 0.25
    )  # both 0.168 in closed form


def test_expected_sparsity_is_the_mean_over_sampled_masks():
    """Sampled masks z > 0, averaged; 4 standard errors of the mean are the tolerance."""
    gates, generator = random_gates(0), torch.Generator().manual_seed(0)
    seen = []
    for _ in range(4000):
        z = gates.sample(generator)
        seen.append(sparsity(Z((z.head > 0).float(), (z.ffn > 0).float()), HEAD, FFN).item())
    seen = torch.tensor(seen)
    error = seen.mean() - sparsity(gates.prob_open(), HEAD, FFN)
    assert abs(error) < 4 * seen.std() / len(seen) ** 0.5


def test_expected_sparsity_falls_as_any_log_alpha_rises():
    gates = random_gates(1)
    gradient = torch.autograd.grad(sparsity(gates.prob_open(), HEAD, FFN), gates.log_alpha)[0]
    assert (gradient < 0).all()


def test_sparsity_counts_parameters():
    """Closing one head and one feed-forward sublayer of two layers, counted by hand."""
    z = Z(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0]))
    assert sparsity(z, 3, 7).item() == pytest.approx((3 + 7) / (4 * 3 + 2 * 7))


def test_all_gates_start_wide_open():
    gates = Gates(3, 5)
    assert (gates.deterministic().head == 1).all() and (gates.deterministic().ffn == 1).all()
    assert sparsity(gates.prob_open(), HEAD, FFN) < 0.03
    assert abs(masks.INIT) < masks.LIMIT


def test_deterministic_z_is_monotone_and_reaches_both_ends():
    z = deterministic_z(torch.linspace(-masks.LIMIT, masks.LIMIT, 101))
    assert z[0] == 0 and z[-1] == 1 and (z.diff() >= 0).all()


def test_a_closed_layer_gate_closes_every_head_of_the_layer():
    gates = Gates(2, 3)
    gates.log_alpha.data[1, -2] = -masks.LIMIT
    z = gates.deterministic()
    assert (z.head[0] == 1).all() and (z.head[1] == 0).all() and (z.ffn == 1).all()


def test_sparsity_schedule_is_zero_then_linear_then_constant():
    wanted = [sparsity_at(step, 0.8, 10, 4) for step in (0, 10, 11, 12, 14, 99)]
    assert wanted == pytest.approx([0, 0, 0.2, 0.4, 0.8, 0.8])


def test_lagrangian_pulls_sparsity_towards_the_target_from_both_sides():
    """With lambda1 = 0 the penalty is least at the target; the multipliers' own gradients are the gap and its
    square."""
    lambdas = torch.tensor([0.0, 5.0], requires_grad=True)
    values = [lagrangian(torch.tensor(s), 0.5, lambdas) for s in (0.3, 0.5, 0.7)]
    assert values[1] == 0 and values[0] > 0 and values[2] > 0
    torch.testing.assert_close(torch.autograd.grad(values[0], lambdas)[0], torch.tensor([-0.2, 0.04]))


@pytest.mark.parametrize("target, ramp", list(itertools.product((0.3, 0.5, 0.7, 0.9), (1, 140))))
def test_controller_reaches_the_target_without_a_task_in_the_shortest_window_allowed(target, ramp):
    """Gates alone, in the fewest steps that `train.check` accepts, however steep the ramp."""
    import train

    args = train.parse_args(["--sparsity", str(target)])
    gates, model = Gates(4, 4), torch.nn.Linear(1, 1)
    optimizer = train.make_optimizer(model, gates, args)
    for step in range(masks.steps_to_settle(args.gate_lr)):
        optimizer.zero_grad()
        lagrangian(
            sparsity(gates.prob_open(), HEAD, FFN), sparsity_at(step, target, 0, ramp), gates.lambdas
        ).backward()
        optimizer.step()
        gates.clamp_()
    assert abs(sparsity(gates.prob_open(), HEAD, FFN).item() - target) < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_selection_meets_the_budget_by_less_than_one_unit(seed):
    """For every target from 0 to the reachable maximum: asked <= delivered < asked + the smallest dropped
    unit."""
    prob = random_gates(seed).prob_open()
    total = 4 * 4 * HEAD + 4 * FFN
    for target in torch.arange(0, masks.max_sparsity(4, 4, HEAD, FFN), 0.01).tolist():
        z = select(prob, target, HEAD, FFN)
        dropped = [HEAD] * int((z.head == 0).sum()) + [FFN] * int((z.ffn == 0).sum())
        excess = sparsity(z, HEAD, FFN).item() - target
        assert -1e-6 <= excess
        assert excess < min(dropped, default=1) / total


def test_selection_keeps_the_most_probable_units():
    """Where every unit has the same size, the kept ones are the top of the list."""
    prob = Z(torch.tensor([[0.9, 0.1], [0.4, 0.8]]), torch.tensor([0.7, 0.3]))
    z = select(prob, 0.5, 1, 1)
    assert z.head.tolist() == [[1, 0], [0, 1]] and z.ffn.tolist() == [1, 0]


def test_selection_never_drops_all_feed_forward_sublayers_if_one_fits():
    """Heads that are all more probable than any feed-forward sublayer still leave room for one."""
    prob = Z(torch.full((4, 4), 0.9), torch.tensor([0.1, 0.2, 0.3, 0.1]))
    assert select(prob, 0.7, HEAD, FFN).ffn.tolist() == [0, 0, 1, 0]
    assert select(prob, 0.5, HEAD, FFN).ffn.sum() >= 1
    assert (
        select(prob, 0.9, HEAD, FFN).head.sum() == 4
    )  # a feed-forward sublayer is more than 10 % of four layers
