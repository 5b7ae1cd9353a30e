"""Gates: from one number per unit to a 0/1 structure of the size asked for (structured pruning).

One real number log_alpha per gate (of an attention head, an attention sublayer, a feed-forward
sublayer) parametrises a random z in [0, 1] that is often exactly 0 or exactly 1, and lets gradients
through in between (hard concrete, Louizos, Welling, Kingma 2018). A controller steers the
expected sparsity along a schedule (an augmented Lagrangian, as in Wang et al. 2020 and Xia et al.
2022, CoFi), and at the end one global choice turns the probabilities into a structure.

This file needs nothing but torch: copy it into your own project. These lines gate any stack of
n_layer layers with n_head heads of d_head channels. Here `network` is a torch.nn.TransformerEncoder
of layers with bias=False and norm_first=True, batches() and loss_of() are yours, and head_size and
ffn_size count the parameters of a head and of a feed-forward sublayer:

    gates, controller = Gates(n_layer, n_head), Controller(gate_lr=0.05)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    gate_optimizer = torch.optim.Adam([gates.log_alpha], lr=0.05, betas=(0.5, 0.9))
    for step, (x, y) in enumerate(batches()):
        z, gated = gates.sample(), dict(network.named_parameters())
        for i in range(n_layer):  # the output weights of a unit are multiplied by its gate
            heads = z.head[i].repeat_interleave(d_head)  # one for each column that reads a head
            for name, gate in (("self_attn.out_proj.weight", heads), ("linear2.weight", z.ffn[i])):
                gated[f"layers.{i}.{name}"] = gated[f"layers.{i}.{name}"] * gate
        loss = loss_of(torch.func.functional_call(network, gated, x), y)
        gap = sparsity(gates.prob_open(), head_size, ffn_size) - sparsity_at(step, 0.7, 0, 300)
        optimizer.zero_grad()
        gate_optimizer.zero_grad()
        (loss + controller.penalty(gap)).backward()
        optimizer.step()
        gate_optimizer.step()
        gates.clamp_()
        controller.ascend(gap)
    structure = select(gates.prob_open(), 0.7, head_size, ffn_size)  # 0/1: prune, fine-tune

A bias behind a gate has to be gated too, or a closed unit still contributes: linear2.bias by
z.ffn[i]; the bias of an output projection belongs to no head, so leave it out. With norm_first=True
a closed sublayer is the identity and can be removed; with post-norm its norm would remain. Give the
gates no weight decay, and evaluate with gates.deterministic() while you prune. After the ramp gates
need about (INIT + LIMIT) / lr more steps to settle, lr being that of the gates. A network of half
precision takes z.head and z.ffn with `.to(x.dtype)`; log_alpha stays float32. A closed sublayer is
pruned by not calling it; single heads cannot be removed from nn.MultiheadAttention, whose width is
heads times head size: keep their zeros there, or use an attention of your own, as in model.py,
where `extract` shows how units are removed from the weights.

Left out on purpose: gates on single neurons and on the embedding width, and pruning without a size
target (a bare L0 penalty). Letters in shape comments: L layers, H heads per layer.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch interval (Louizos et al. 2018)


def sample_z(log_alpha, generator=None):
    """Sample hard-concrete gates, often exactly 0 or 1 (Louizos et al. 2018). Elementwise."""
    u = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device)
    u = u.clamp(1e-6, 1 - 1e-6)  # the logit stays finite
    s = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)  # binary concrete, in (0, 1)
    # stretch to (GAMMA, ZETA), then clip
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1).to(log_alpha.dtype)


def prob_open(log_alpha):
    """P(z > 0) in (0, 1), the summand of the L0 penalty (Louizos et al. 2018). Elementwise."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def deterministic_z(log_alpha):
    """The gate at evaluation: no noise, no temperature (Louizos et al. 2018). Elementwise."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Units(NamedTuple):
    """One number in [0, 1] per prunable unit: its gate, its probability, or 1 if kept, else 0."""

    head: torch.Tensor  # (L, H), the gate of the attention sublayer already multiplied in
    ffn: torch.Tensor  # (L,)


INIT = 2.5  # every gate starts here: the deterministic gate is exactly 1, and P(open) is 0.98
LIMIT = 4.6  # log_alpha stays in [-LIMIT, LIMIT]: further out a gate is too flat to ever come back


class Gates(nn.Module):
    """Gates of a transformer: per layer H for heads, one for attention, one for feed-forward."""

    def __init__(self, n_layer, n_head):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((n_layer, n_head + 2), INIT))  # (L, H + 2)

    @staticmethod
    def combine(gate):
        """The one place where gates combine: a number per gate (L, H + 2) to Units. A head is open
        if its own gate and that of its sublayer are, so that gates multiply, and so do
        probabilities.
        """
        head, attn, ffn = gate[:, :-2], gate[:, -2:-1], gate[:, -1]
        return Units(head * attn, ffn)

    def sample(self, generator=None):
        """Random gates for a training step, as Units."""
        return self.combine(sample_z(self.log_alpha, generator))

    def deterministic(self):
        """The gates for evaluation, as Units."""
        return self.combine(deterministic_z(self.log_alpha))

    def prob_open(self):
        """P(open) of every head and feed-forward sublayer, as Units."""
        return self.combine(prob_open(self.log_alpha))

    @torch.no_grad()
    def clamp_(self):
        """Keep log_alpha within LIMIT: call it after every optimizer step."""
        self.log_alpha.clamp_(-LIMIT, LIMIT)


def sparsity(z, head_size, ffn_size):
    """Fraction of the prunable parameters that is gone, in [0, 1], if unit i counts z_i times.

    With z = gates.prob_open() this is the expected sparsity, with a 0/1 structure the delivered
    one. head_size, ffn_size: parameters of one head and of one feed-forward sublayer.
    """
    total = z.head.numel() * head_size + z.ffn.numel() * ffn_size
    return 1 - (z.head.sum() * head_size + z.ffn.sum() * ffn_size) / total


def sparsity_at(step, sparsity, prune_start, prune_ramp):
    """Target sparsity at `step`: 0 up to prune_start, then a line to `sparsity`, or a jump."""
    return sparsity * min(max((step - prune_start) / max(prune_ramp, 1), 0.0), 1.0)


# Chosen in simulations of a task that pushes the gates open or closed, as in the tests of this
# file. They go with a loss in nats: with a loss of another scale, scale PENALTY and DUAL_LR alike.
PENALTY = 200.0  # coefficient of the quadratic penalty
DUAL_LR = 60.0  # step size of the multiplier, per unit of gate_lr: a larger one overshoots
MAX_GAP = 0.02  # the multiplier's update clips the gap to [-MAX_GAP, MAX_GAP]


class Controller(nn.Module):
    """Keeps the expected sparsity s at its target t by an augmented Lagrangian. With gap = s - t,

        penalty = lambda1 gap + PENALTY gap^2,    lambda1 <- lambda1 + DUAL_LR gate_lr gap:

    the gates descend on the loss plus the penalty, and the Lagrange multiplier lambda1 ascends on
    the penalty, whose gradient by lambda1 is the gap (dual ascent). Wang et al. 2020 also learn the
    quadratic coefficient; its gradient gap^2 is never negative, so it only grows. Here it is
    constant.

    The quadratic term acts at once, but leaves a gap where the loss pushes back. The multiplier
    sums the gaps until none is left. At convergence -lambda1 is the marginal cost of sparsity: how
    much the loss that the gates minimise (with transfer to the gates the target's plus the weighted
    auxiliary one) rises per unit of sparsity. The update clips the gap, because gates move by about
    gate_lr a step at most: while they catch up with the target, lambda1 would sum a gap that is
    only delay, and overshoot.

    The penalty may be negative; what moves the gates is its slope lambda1 + 2 PENALTY gap: they
    close while it is negative, and open while it is positive.
    """

    def __init__(self, gate_lr):
        super().__init__()
        self.gate_lr = gate_lr  # learning rate of log_alpha
        self.register_buffer("lambda1", torch.zeros(()))

    def penalty(self, gap):
        """To be added to the loss. gap: expected minus target sparsity, ()."""
        return self.lambda1 * gap + PENALTY * gap**2

    @torch.no_grad()
    def ascend(self, gap):
        """A step of dual ascent: call it after every optimizer step. gap: as in `penalty`."""
        self.lambda1 += DUAL_LR * self.gate_lr * gap.clamp(-MAX_GAP, MAX_GAP)


@torch.no_grad()
def select(prob, sparsity, head_size, ffn_size):
    """Turn probabilities into a 0/1 structure: the most probable units that fit the budget.

    prob: Units of probabilities. Returns Units of zeros and ones whose sparsity is at least the
    requested one, and exceeds it by less than the size of any unit that was dropped. One global
    choice, unlike rounding layer by layer, cannot miss the budget: it also keeps improbable units,
    if there is room, and of equally probable ones heads before feed-forward sublayers, and lower
    layers before higher ones.

    A feed-forward sublayer is as large as many heads: a purely greedy choice may spend the budget
    on heads and drop every feed-forward sublayer. Therefore the most probable feed-forward sublayer
    comes first, if it leaves room for a head in every layer. Raises ValueError for a probability
    that is NaN or a sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is a fraction, from 0 to 1, not {sparsity}")
    p = torch.cat([prob.head.flatten(), prob.ffn])  # (L H + L,)
    if p.isnan().any():
        raise ValueError("a probability is NaN: has the training diverged?")
    n_heads, n_layer = prob.head.numel(), prob.ffn.numel()
    size = [head_size] * n_heads + [ffn_size] * n_layer
    room = math.floor(sum(size) * (1 - sparsity) + 1e-6)  # parameters that may stay; 1e-6: rounding
    if ffn_size + n_layer * head_size <= room:
        p[n_heads + prob.ffn.argmax()] = 2.0  # more than any probability: it comes first
    keep = torch.zeros_like(p)
    for i in p.argsort(descending=True, stable=True).tolist():
        if size[i] <= room:
            keep[i] = 1
            room -= size[i]
    return Units(keep[:n_heads].view_as(prob.head), keep[n_heads:])
