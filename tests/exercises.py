"""The exercises of tutorial.ipynb: solutions, and hints that follow from wrong answers.

    python tests/exercises.py solved.ipynb      # a copy of the notebook with all exercises solved

The notebook calls `check` for predictions and `tested` for functions that a student writes. A wrong
number is compared with known mistakes; a wrong function with known slips, on the same random input.
"""

import inspect
import math
import re
import statistics
import sys
from pathlib import Path
from textwrap import shorten

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

import experiments
import masks
import model
import transfer

torch.set_printoptions(sci_mode=False)

# ----------------------------------------------------------------------------- predictions

GATES_ALONE = statistics.mean(experiments.column("built_in", "gates").values())


def blue():
    """The probability of negative in exercise 11, once the notebook has trained the network."""
    net = model.GatedTransformer.load("out/helped/pruned.pt")
    return net.probabilities(["the service was blue"])[0, 0].item()


SLOW = 'net.probabilities(["the service was slow"])[0, 0].item()'  # the solution of exercise 11
PERCENT = "a share is asked for, from 0 to 1, and not a percentage."
PREDICTIONS = {  # exercise -> for every number: answer, tolerance, hint, {wrong number: its own hint}
    2: [(0.325, 0.01, "for which s is s (zeta - gamma) + gamma below 0, and for which u is s that small?", {
        32.5: PERCENT,
        0.675: "this is the share that is not exactly 0.",
        0.25: "z is 0 where s < 0.25, but s is not uniform. Only u is: solve s = 0.25 for u."})],
    4: [(15, 0, "the cheapest close first. How many close fully, and what do these still count?", {
        14: "it closes fully. A closed gate still counts 0.05, so that fourteen closed ones are not enough.",
        6: "the cheapest close first: gate 1 is the cheapest one."}),
        (-1.5, 0.05, "the gate in between rests where the slopes of its cost and of the penalty cancel.", {
        1.5: "the size is right, but not the sign: lambda1 adds up gaps, and the gates lag behind.",
        -1.4: "gate 14 is at its lower end, where slopes need not cancel. Which gate is free to move?",
        -0.075: "the cost of a gate is divided by 20, but so is what it counts in the sparsity."})],
    5: [(-1.7, 0.5, "the slope of the penalty, lambda1 + 2 PENALTY gap, has to stay. lambda1 is 0.", {
        1.7: "the size is right, but not the sign: the loss pushes the gates open.",
        0: "then the penalty would have no slope, and nothing would hold the gates against the loss.",
        -0.0017: "in thousandths, please.",
        -3.45: "the derivative of PENALTY gap^2 is 2 PENALTY gap."}),
        (3, 0, "answer 1, 2 or 3.", {
        1: "when the gap passes 0, lambda1 is not 0: what stops the gates there?",
        2: "at a constant gap other than 0 lambda1 would change for ever."})],
    6: [(0.1985, 0.005, "no network does better than to answer 0.95 and 0.05 itself.", {
        0: "only if labels were exactly 0 and 1: here such an answer would cost infinitely much.",
        0.051: "this is -log 0.95 alone. The other class has a part of 0.05 in the loss.",
        0.693: "this is the loss of guessing."})],
    8: [(GATES_ALONE, 4, "what do film reviews teach, and can a choice of heads hold it?", {
        0.516: "a percentage is asked for.",
        76: "as in the toy? There the choice of inputs is all that there is to know."})],
    11: [(blue, 0.01, "look for both words in net.vocab. What does the network read in their place?", {})],
    12: [(1, 0.01, "what does an even number of nots do to the value, and what an odd one?", {
        100: PERCENT,
        0.5: "this would be guessing. Follow one chain from its end to its start."})],
}  # fmt: skip


def check(number, *predictions):
    """Say of each number whether it is right; stop at the first that is not, with a hint."""
    for (answer, tolerance, hint, mistakes), given in zip(PREDICTIONS[number], predictions):
        if given is ...:
            return print("no prediction yet: write a number in place of the dots")
        try:
            value = float(given)
        except (TypeError, ValueError):
            return print(f"a number is asked for, such as 0.5, and not {given!r}")
        answer = answer() if callable(answer) else answer
        if not abs(value - answer) <= tolerance:
            for wrong, own_hint in mistakes.items():
                if math.isclose(value, wrong, rel_tol=0.02, abs_tol=0.001):
                    hint = own_hint
            return print(f"not yet, try again. Hint: {hint}")
        print(f"right: {answer:.3g}")


# ----------------------------------------------------------------------------- solutions


def my_sample_z(log_alpha, generator=None):
    u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((torch.logit(u) + log_alpha) / masks.BETA)
    stretched = s * (masks.ZETA - masks.GAMMA) + masks.GAMMA
    return stretched.clamp(0, 1)


class MyController(masks.Controller):
    def penalty(self, gap):
        return self.lambda1 * gap + masks.PENALTY * gap**2

    @torch.no_grad()
    def ascend(self, gap):
        clipped = gap.clamp(-masks.MAX_GAP, masks.MAX_GAP)
        self.lambda1 += masks.DUAL_LR * self.gate_lr * clipped


def my_transferred(parameters, what):
    def is_reached(name):
        if name.startswith("classifier."):
            return name.startswith("classifier.auxiliary.")
        if name == "log_alpha":
            return what != "weights"
        return what != "gates"

    return {name: p for name, p in parameters.items() if is_reached(name)}


def my_couple(g_target, g_aux, coupling):
    update = g_target | g_aux
    both = [name for name in g_aux if name in g_target]
    dot = sum((g_aux[name] * g_target[name]).sum() for name in both)
    norm = sum((g_target[name] ** 2).sum() for name in both)
    factor = min(0, dot / norm) if coupling == "project" else 0
    for name in both:
        update[name] = g_target[name] + g_aux[name] - factor * g_target[name]
    return update


def my_select(prob, sparsity, head_size, ffn_size):
    p, n_heads = torch.cat([prob.head.flatten(), prob.ffn]), prob.head.numel()
    size = [head_size] * n_heads + [ffn_size] * len(prob.ffn)
    room = math.floor(sum(size) * (1 - sparsity) + 1e-6)
    if ffn_size + len(prob.ffn) * head_size <= room:
        p[n_heads + prob.ffn.argmax()] = 2.0
    keep = torch.zeros(len(p))
    for i in p.argsort(descending=True, stable=True).tolist():
        if size[i] <= room:
            keep[i] = 1
            room -= size[i]
    return masks.Units(keep[:n_heads].view_as(prob.head), keep[n_heads:])


SOLUTIONS = {1: my_sample_z, 3: MyController, 7: my_transferred, 9: my_couple, 10: my_select}
THEIRS = {1: masks.sample_z, 3: masks.Controller, 7: transfer.transferred, 9: transfer.couple,
          10: masks.select}
SLIPS = {  # exercise -> (part of its solution, what a student may write instead, a hint)
    1: [("(torch.logit(u) + log_alpha) /", "torch.logit(u) + log_alpha /", "BETA divides the whole sum."),
        (" / masks.BETA", "", "the sum is not yet divided by BETA."),
        ("logit(u) + log_alpha)", "logit(u) - log_alpha)", "log_alpha is added: a large one opens."),
        ("stretched.clamp(0, 1)", "stretched", "the clip to [0, 1] comes last, after the stretch."),
        ("stretched.clamp(0, 1)", "s", "s is not yet stretched to (GAMMA, ZETA).")],
    3: [("gap**2", "gap", "in the second term of the penalty the gap is squared."),
        ("gap**2", "gap.clamp(-masks.MAX_GAP, masks.MAX_GAP) ** 2", "in penalty nothing is clipped."),
        ("gap.clamp(-masks.MAX_GAP, masks.MAX_GAP)", "gap", "in ascend the gap is clipped, on both sides."),
        ("self.lambda1 += ", "self.lambda1 -= ", "in ascend lambda1 rises where the gap is positive."),
        (" * self.gate_lr", "", "in ascend the factor gate_lr is missing.")],
    7: [('name.startswith("classifier.auxiliary.")', "True", "the target's own classifier is never reached."),
        ('name.startswith("classifier.auxiliary.")', "False", "the auxiliary classifier is always reached."),
        ('what != "weights"', "True", 'log_alpha is not reached if what is "weights".'),
        ('what != "gates"', "True", 'weights such as token.weight are not reached if what is "gates".')],
    9: [("min(0, dot / norm)", "dot / norm", "only a negative inner product is removed: min(0, ...)."),
        ("both)\n    factor", "g_target)\n    factor", "g.g is a sum over names that both have."),
        (' if coupling == "project" else 0', "", 'with "sum" nothing is removed.'),
        ("- factor", "+ factor", "the component is taken away: mind the sign.")],
    10: [("            room -= size[i]\n", "", "a unit that is kept takes its size off the room."),
         ("size[i] <= room", "size[i] < room", "a unit that is exactly as large as the room fits."),
         ("-= size[i]\n", "-= size[i]\n        else:\n            break\n", "later, smaller ones may fit.")],
}  # fmt: skip
HINTS = {  # for anything else
    1: "compare sign by sign: logit(u) + log_alpha, divided by BETA; ZETA - GAMMA; + GAMMA; the clip last.",
    "penalty": "penalty has two terms, lambda1 gap and PENALTY gap^2.",
    "ascend": "ascend adds DUAL_LR gate_lr times the clipped gap to lambda1.",
    7: "test first for names that start with 'classifier.', then for 'log_alpha'.",
    "sum": "for a name that both gradients have, update is g + h.",
    "project": "h.g and g.g are sums over all names that both gradients have, taken before the loop.",
    10: "go through all units, the most probable first; keep (1) each that is not larger than the room.",
}


# ----------------------------------------------------------------------------- comparing functions


def draw(number):
    """Random input for the function of an exercise, by name."""
    if number == 1:
        return {"log_alpha": 3 * torch.randn(4)}
    if number == 3:
        method = ["penalty", "ascend"][torch.randint(2, ())]
        return {"method": method, "lambda1": torch.randn(()), "gap": torch.randn(()) / 20}
    if number == 7:
        names = ("token.weight", "classifier.target.weight", "classifier.auxiliary.weight", "log_alpha")
        return {"parameters": {name: torch.randn(()) for name in names},
                "what": ["both", "weights", "gates"][torch.randint(3, ())]}
    if number == 9:  # some names that only one of the gradients has
        return {"g_target": {name: torch.randn(2) for name in "abd"},
                "g_aux": {name: torch.randn(2) for name in "bca"},
                "coupling": ["sum", "project"][torch.randint(2, ())]}
    prob, sizes = masks.Units(torch.rand(4, 4), torch.rand(4)), model.unit_sizes(64, 4)
    sparsity = torch.randint(49, ()).item() / 48  # multiples of a head: often a unit fits exactly
    return {"prob": prob, "sparsity": sparsity, "head_size": sizes[0], "ffn_size": sizes[1]}


def output(number, function, seed):
    """The input of a seed, and what a function makes of it; an exception, if it raises one."""
    torch.manual_seed(seed)
    inputs = draw(number)
    try:
        if number != 3:
            return inputs, function(*inputs.values())
        controller = function(gate_lr=0.05)
        controller.lambda1.fill_(inputs["lambda1"])
        returned = getattr(controller, inputs["method"])(inputs["gap"])
        return inputs, returned if inputs["method"] == "penalty" else controller.lambda1
    except Exception as error:
        return inputs, error


def agree(found, expected):
    try:
        torch.testing.assert_close(found, expected, check_dtype=False)
        return True
    except Exception:
        return False


def shown(value):
    """A value, or what is wrong with it, in one line."""
    if isinstance(value, Exception):
        return shorten(f"{type(value).__name__}: {value}", 400)
    return shorten(re.sub(r"tensor\(([^()]*)\)", r"\1", str(value)), 400)


def with_slip(number, right, wrong):
    """The solution of an exercise with a part of it replaced."""
    name, place = SOLUTIONS[number].__name__, dict(globals())
    exec(inspect.getsource(SOLUTIONS[number]).replace(right, wrong), place)
    return place[name]


def tested(number, mine):
    """`mine`, if it agrees with the module's function on random input; if not, the latter, and a hint."""
    name, theirs = mine.__name__, THEIRS[number]
    for seed in range(30):
        inputs, found = output(number, mine, seed)
        _, expected = output(number, theirs, seed)
        if agree(found, expected):
            continue
        parts = found.values() if isinstance(found, dict) else [found]
        if any(part is ... or "llipsis" in shown(part) for part in parts):
            print(f"{name}: replace the dots; until then the function of the module is used")
            return theirs
        hint = HINTS[inputs.get("method") or inputs.get("coupling") or number]
        if found is None:
            hint = "it returns None: is a return missing?"
        elif isinstance(found, Exception):
            hint = "it stops with an error, which is shown as yours."
        for right, wrong, own_hint in SLIPS[number]:
            if agree(output(number, with_slip(number, right, wrong), seed)[1], found):
                hint = own_hint
        print(f"{name}: not yet, try again.")
        for label, value in {**inputs, "yours": found, "expected": expected}.items():
            print(f"  {label}: {shown(value)}")
        print(f"Hint: {hint}")
        return theirs
    print(f"right: {name} does what the function of the module does")
    return mine


# ----------------------------------------------------------------------------- the solved copy


def number_of(cell):
    """The number of the exercise that a cell of the notebook holds, or 0."""
    found = re.search(r"# exercise (\d+)", cell.source.partition("\n")[0])
    return int(found[1]) if found and cell.cell_type == "code" else 0


def solve(notebook):
    """Fill in all exercises. A function is the first paragraph of its cell, a prediction its first line."""
    for cell in notebook.cells:
        number = number_of(cell)
        if number in SOLUTIONS:
            rest = cell.source.partition("\n\n")[2]
            cell.source = f"# exercise {number}\n{inspect.getsource(SOLUTIONS[number])}\n{rest}"
        for answer, *_ in PREDICTIONS.get(number, []):
            solution = SLOW if callable(answer) else f"{answer:.4g}"
            cell.source = cell.source.replace("...", solution, 1)


if __name__ == "__main__":
    import nbformat

    solved = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
    solve(solved)
    nbformat.write(solved, sys.argv[1])
