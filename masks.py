"""Gates that learn which heads and layers to keep (structured pruning).

One real number log_alpha per prunable unit parametrises a random gate z in [0, 1] that is often exactly
0 or exactly 1, yet lets gradients through (hard concrete, Louizos, Welling, Kingma 2018). A
Lagrangian steers the expected sparsity along a schedule (Wang et al. 2020; Xia et al. 2022, CoFi), and at the
end one global choice turns the probabilities into a 0/1 structure of the size that was asked for.

This file needs nothing but torch: copy it into your own project. Left out on purpose: gates on
single neurons and on the embedding width, and pruning without a size target (a bare L0 penalty).

Letters in shape comments: L layers, H heads per layer.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch interval (Louizos et al. 2018)
LIMIT = 4.6  # log_alpha stays in [-LIMIT, LIMIT]: further out a gate is too flat to ever come back
SPRING = 50.0  # lambda2 starts here: a spring from the first step; from 0, all gates would fall at once
WARMUP = 100  # steps in which the learning rate of the weights rises to its full value
LAMBDA_LR = 0.3  # learning rate of the two multipliers
INIT = 2.5  # every gate starts here: the deterministic gate is exactly 1, and P(open) is 0.98


class Z(NamedTuple):
    """One number in [0, 1] per prunable unit: a gate value, or the probability that the gate is open."""

    head: torch.Tensor  # (L, H), the gate of the attention sublayer already multiplied in
    ffn: torch.Tensor  # (L,)


def sample_z(log_alpha, generator=None):
    """Sample hard-concrete gates, often exactly 0 or 1 (Louizos et al. 2018). Shape in = shape out."""
    u = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)  # binary concrete, in (0, 1)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)  # stretch to (GAMMA, ZETA), then clip


def prob_open(log_alpha):
    """P(z > 0) in (0, 1), the summand of the L0 penalty (Louizos et al. 2018). Shape in = shape out."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def deterministic_z(log_alpha):
    """The gate used for evaluation: not divided by BETA (Louizos et al. 2018). Shape in = shape out."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(nn.Module):
    """The gates of a whole transformer: per layer H head gates, one attention gate, one feed-forward gate."""

    def __init__(self, n_layer, n_head):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((n_layer, n_head + 2), INIT))  # (L, H + 2)
        self.lambdas = nn.Parameter(torch.tensor([0.0, SPRING]))  # multipliers; maximised, not minimised

    def effective(self, gate):
        """The one place where gates combine: samples, values or probabilities (L, H + 2) to a Z."""
        head, attn, ffn = gate[:, :-2], gate[:, -2:-1], gate[:, -1]
        return Z(head * attn, ffn)

    def sample(self, generator=None):
        return self.effective(sample_z(self.log_alpha, generator))

    def deterministic(self):
        return self.effective(deterministic_z(self.log_alpha))

    def prob_open(self):
        """P(open) of every unit as a Z: a head needs its own gate and its sublayer's, so they multiply."""
        return self.effective(prob_open(self.log_alpha))

    def random(self, seed):
        """Random numbers in place of P(open), for a control with a random structure."""
        u = torch.rand(self.log_alpha.shape, generator=torch.Generator().manual_seed(seed)).to(self.log_alpha)
        return Z(u[:, :-2], u[:, -1])

    @torch.no_grad()
    def clamp_(self):
        """Call after every optimiser step."""
        self.log_alpha.clamp_(-LIMIT, LIMIT)


def make_optimizer(model, gates, args):
    """One fused AdamW: matrices are decayed, gates never are, and the multipliers go uphill.

    args: anything with lr, gate_lr and weight_decay. Adam's memory is short for the gates, because the push
    of the controller changes its sign often.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [
        {"params": matrices, "lr": args.lr, "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "lr": args.lr},
        {"params": [gates.log_alpha], "lr": args.gate_lr, "betas": (0.5, 0.9)},
        {"params": [gates.lambdas], "lr": LAMBDA_LR, "maximize": True},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98), fused=True)


def unit_sizes(d_model, n_head):
    """Parameters of one head (its slices of Q, K, V and output) and of one feed-forward sublayer."""
    return 4 * d_model * (d_model // n_head), 8 * d_model**2


def sparsity(z, head_size, ffn_size):
    """Fraction of the prunable parameters that is gone, in [0, 1], if unit i is there with weight z_i.

    With z = gates.prob_open() this is the expected sparsity; with the 0/1 structure z > 0, the one that
    counts. head_size, ffn_size: from unit_sizes.
    """
    total = z.head.numel() * head_size + z.ffn.numel() * ffn_size
    return 1 - (z.head.sum() * head_size + z.ffn.sum() * ffn_size) / total


def phase_at(step, prune_start, finetune_start):
    """Name of the phase of a run that `step` belongs to: "dense", "prune" or "finetune"."""
    return "finetune" if step >= finetune_start else "prune" if step >= prune_start else "dense"


def lr_at(step, lr, finetune_start, steps):
    """Learning rate of the weights: linear warm-up, constant, linear to zero while fine-tuning."""
    return lr * min((step + 1) / WARMUP, 1, (steps - step) / (steps - finetune_start))


def sparsity_at(step, sparsity, prune_start, prune_ramp):
    """Sparsity wanted at `step`: 0 up to prune_start, then a straight line up to `sparsity`."""
    return sparsity * min(max((step - prune_start) / prune_ramp, 0.0), 1.0)


def lagrangian(expected, wanted, lambdas):
    """lambda1 (s - t) + lambda2 (s - t)^2, s expected and t wanted sparsity (Wang et al. 2020): to be
    minimised over log_alpha and maximised over the lambdas.

    lambda1 falls below 0 while s lags behind t, so that the value may be negative just after an overshoot.
    That is normal. Where the gates go is told by the slope lambda1 + 2 lambda2 (s - t): they close while it
    is negative, and open while it is positive.
    """
    gap = expected - wanted
    return lambdas[0] * gap + lambdas[1] * gap**2


def max_sparsity(n_layer, n_head, head_size, ffn_size):
    """The largest expected sparsity that gates clamped at -LIMIT can reach."""
    gates = Gates(n_layer, n_head)
    nn.init.constant_(gates.log_alpha, -LIMIT)
    return sparsity(gates.prob_open(), head_size, ffn_size).item()


def steps_to_settle(gate_lr):
    """Optimiser steps that pruning needs at least: Adam moves a gate by about gate_lr a step at most, so
    closing it from INIT takes (INIT + LIMIT) / gate_lr steps, and the controller needs twice as many again.
    """
    return math.ceil(3 * (INIT + LIMIT) / gate_lr)


def why_unreachable(target, steps, ramp, gate_lr, n_layer, n_head, d_model):
    """The reason why a sparsity target cannot be met with `steps` steps of pruning, or None if it can."""
    head_size, ffn_size = unit_sizes(d_model, n_head)
    reachable, needed = max_sparsity(n_layer, n_head, head_size, ffn_size), steps_to_settle(gate_lr)
    if target >= reachable:
        return f"sparsity must be below {reachable:.3f}, which the gates can reach, not {target}"
    if (1 - target) * n_layer * (n_head * head_size + ffn_size) < head_size:
        return f"sparsity {target} leaves no room for a single head: use more heads or layers"
    if target and ramp > steps:
        return f"prune_start, the {ramp} steps of prune_ramp and fine-tuning take more than all steps"
    if target and needed > steps:
        return f"at gate_lr {gate_lr} pruning needs {needed} steps before fine-tuning, not {steps}"


@torch.no_grad()
def select(prob, sparsity, head_size, ffn_size):
    """Turn probabilities into a 0/1 structure: the most probable units that fit the budget.

    prob: a Z of probabilities. Returns a Z of zeros and ones whose sparsity is at least the asked one, and
    exceeds it by less than the size of any unit that was dropped. One global choice, unlike rounding layer by
    layer, cannot miss the budget.

    The most probable feed-forward sublayer is considered before everything else: a feed-forward sublayer is
    as large as many heads, so that under a tight budget a purely greedy choice fills up with heads and may
    drop all of them at once.
    """
    n_heads = prob.head.numel()
    p = torch.cat([prob.head.flatten(), prob.ffn])  # (L H + L,)
    size = [head_size] * n_heads + [ffn_size] * prob.ffn.numel()
    room = math.floor(sum(size) * (1 - sparsity) + 1e-6)  # parameters that may stay; 1e-6 is for rounding
    keep = torch.zeros_like(p)
    first = n_heads + prob.ffn.argmax().item()
    for i in [first] + [j for j in p.argsort(descending=True, stable=True).tolist() if j != first]:
        if size[i] <= room:
            keep[i] = 1
            room -= size[i]
    return Z(keep[:n_heads].view_as(prob.head), keep[n_heads:])
