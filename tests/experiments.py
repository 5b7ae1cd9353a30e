"""The experiments behind the tables of the README.

    python tests/experiments.py run           # every run whose row is missing, in this process
    python tests/experiments.py run 0 2       # one half of them; "run 1 2" in a second shell: the other
    python tests/experiments.py yardstick     # TF-IDF with logistic regression (needs scikit-learn)
    python tests/experiments.py tables        # write the tables into the README, from tests/results/*.jsonl

Every row is what train(args) returned, appended to tests/results/NAME.jsonl as soon as it is there.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as loop
from model import interval

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = range(5)
DATA = "../shared/data/"

BUILT_IN = {  # name -> flags; defaults are not repeated
    "none": "--aux_weight 0",
    "from 1000 on": "",
    "always": "--transfer_start 0",
    "always, project": "--transfer_start 0 --coupling project",
    "before pruning": "--transfer_start 0 --transfer_stop 500",
    "while pruning": "--transfer_start 500 --transfer_stop 2200",
    "while fine-tuning": "--transfer_start 2200",
    "sequential": "--transfer_start 0 --transfer_stop 1000 --target_start 1000 --prune_start 1000",
    "gates": "--transfer_start 0 --transfer gates",
    "weights": "--transfer_start 0 --transfer weights",
    "shuffled": "--transfer_start 0 --aux_shuffle",
    "shuffled, project": "--transfer_start 0 --aux_shuffle --coupling project",
}
for sparsity, what in ((0.7, "pruned"), (0, "unpruned")):
    for n in (50, 100, 500, 2000):
        BUILT_IN[f"{n} labels, {what}, none"] = f"--n_target {n} --sparsity {sparsity} --aux_weight 0"
        BUILT_IN[f"{n} labels, {what}, always"] = f"--n_target {n} --sparsity {sparsity} --transfer_start 0"
BUILT_IN |= {
    "aux_weight 0.1": "--transfer_start 0 --aux_weight 0.1",
    "aux_weight 1": "--transfer_start 0 --aux_weight 1",
    "aux_weight 3": "--transfer_start 0 --aux_weight 3",
    "unpruned, none": "--sparsity 0 --aux_weight 0",
    "unpruned, always": "--sparsity 0 --transfer_start 0",
    "random structure, none": "--structure random --aux_weight 0",
    "random structure, always": "--structure random --transfer_start 0",
    "small dense, none": "--sparsity 0 --n_layer 1 --d_model 68 --aux_weight 0",
    "small dense, always": "--sparsity 0 --n_layer 1 --d_model 68 --transfer_start 0",
}
for sparsity in (0.5, 0.8, 0.9):
    BUILT_IN[f"sparsity {sparsity}, none"] = f"--sparsity {sparsity} --aux_weight 0"
    BUILT_IN[f"sparsity {sparsity}, always"] = f"--sparsity {sparsity} --transfer_start 0"

PAIRS = {
    "sst2": ("sst5", 200),
    "trec_coarse": ("trec_fine", 200),
    "sst5": ("sst2", 400),
    "trec_fine": ("trec_coarse", 400),
    "acl_arc": ("scicite", 0),
}
RECIPES = {
    "none": "--aux_weight 0",
    "always": "--transfer_start 0",
    "until fine-tuning": "--transfer_start 0 --transfer_stop 2200",
    "always, project": "--transfer_start 0 --coupling project",
}
REAL = {
    f"{target} <- {aux}: {name}": f"--target {DATA}{target} --aux {DATA}{aux} --n_target {n} {flags}"
    for name, flags in RECIPES.items()
    for target, (aux, n) in PAIRS.items()
}


def rows(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def run(part=0, parts=1):
    """Run what is missing; built-in and real settings take turns, so that an interrupted series has some of
    both."""
    built_in, real = (
        [(name, setting, flags, seed) for setting, flags in settings.items() for seed in SEEDS]
        for name, settings in (("built_in", BUILT_IN), ("real", REAL))
    )
    jobs = []
    while built_in or real:
        jobs += built_in[:2] + real[:1]
        built_in, real = built_in[2:], real[1:]
    have = {(row["setting"], row["seed"]) for name in ("built_in", "real") for row in rows(name)}
    for name, setting, flags, seed in [job for job in jobs if (job[1], job[3]) not in have][part::parts]:
        with tempfile.TemporaryDirectory() as folder:
            result = loop.train(loop.parse_args([*flags.split(), "--seed", str(seed), "--out_dir", folder]))
        del result["args"]["out_dir"]
        with open(RESULTS / f"{name}.jsonl", "a") as file:
            print(json.dumps({"setting": setting, "flags": flags.strip(), **result}), file=file)


def yardstick():
    """Accuracy and macro-F1 of TF-IDF (words and pairs) with logistic regression, C = 10, on the same
    subsets."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    def texts(data, examples):
        bounds = zip(examples.start[:-1], examples.start[1:])
        return [" ".join(data.vocab[t] for t in examples.tokens[a:b]) for a, b in bounds]

    with open(RESULTS / "yardstick.jsonl", "w") as file:
        for target, (_, n) in PAIRS.items():
            for seed in SEEDS:
                data = loop.prepare(DATA + target, "none", n, 64, 10**6, seed=seed)
                vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
                x = vectorizer.fit_transform(texts(data, data.train))
                fitted = LogisticRegression(C=10, max_iter=1000).fit(x, data.train.label)
                predicted = fitted.predict(vectorizer.transform(texts(data, data.test)))
                row = {
                    "setting": target,
                    "seed": seed,
                    "test_accuracy": float((predicted == data.test.label).mean()),
                }
                row["test_macro_f1"] = f1_score(data.test.label, predicted, average="macro")
                print(json.dumps(row), file=file)


# ----------------------------------------------------------------------------- tables


def column(name, setting, key="test_accuracy"):
    """seed -> 100 * value, of one setting."""
    return {row["seed"]: 100 * row[key] for row in rows(name) if row["setting"] == setting}


def shown(values, signed=False):
    """Mean and 95 % interval as text; a dash if fewer than two runs are there."""
    if len(values) < 2:
        return "-"
    mean, _, half = interval(list(values))
    form = "+.1f" if signed else ".1f"
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def gain(name, setting, baseline, key="test_accuracy"):
    """Difference to the baseline, paired by seed."""
    a, b = column(name, setting, key), column(name, baseline, key)
    return shown([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], signed=True)


def table(head, lines):
    return (
        "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])
        + "\n"
    )


def built_in(settings, baseline="none"):
    """Accuracy and paired gain of settings of the built-in pair that have been run."""
    lines = []
    for setting in settings:
        values = column("built_in", setting).values()
        if values:
            command = f"`{BUILT_IN[setting]}`" if BUILT_IN[setting] else "(defaults)"
            difference = "" if setting == baseline else gain("built_in", setting, baseline)
            lines.append([setting, command, shown(values), difference, len(values)])
    return table(["setting", "flags", "test accuracy, %", "paired gain, points", "n"], lines)


def amounts(settings):
    """Accuracy without and with transfer and the paired gain, for (title, name without, name with)
    triples."""
    lines = []
    for title, alone, helped in settings:
        n = len(column("built_in", alone).keys() & column("built_in", helped).keys())
        if n > 1:
            values = [shown(column("built_in", name).values()) for name in (alone, helped)]
            lines.append([title, *values, gain("built_in", helped, alone), n])
    return table(["", "no transfer, %", "transfer, %", "paired gain, points", "n"], lines)


def real():
    """Every recipe on every real pair: validation, test, macro-F1, delivered sparsity and paired gain."""
    lines = []
    for target, (aux, _) in PAIRS.items():
        for recipe in RECIPES:
            setting, none = f"{target} <- {aux}: {recipe}", f"{target} <- {aux}: none"
            if len(column("real", setting)) < 2:
                continue
            cells = [
                shown(column("real", setting, key).values())
                for key in ("validation_accuracy", "test_accuracy")
            ]
            f1, cut = (
                column("real", setting, key).values() for key in ("test_macro_f1", "delivered_sparsity")
            )
            cells += [f"{sum(f1) / len(f1):.1f}", f"{min(cut):.1f}"]
            lines.append(
                [
                    f"{target} <- {aux}",
                    recipe,
                    *cells,
                    "" if recipe == "none" else gain("real", setting, none),
                ]
            )
        accuracy, f1 = (
            column("yardstick", target, key).values() for key in ("test_accuracy", "test_macro_f1")
        )
        if accuracy:
            lines.append(
                [
                    target,
                    "TF-IDF + logistic regression",
                    "",
                    shown(accuracy),
                    f"{sum(f1) / len(f1):.1f}",
                    "",
                    "",
                ]
            )
    head = [
        "pair",
        "recipe",
        "validation, %",
        "test, %",
        "macro-F1",
        "sparsity",
        "paired gain on test, points",
    ]
    return table(head, lines)


def pruned_and_unpruned(n):
    return [
        (
            f"{n} labels, {how}",
            *(
                f"{how}, {t}"
                if n == 200 and how == "unpruned"
                else t
                if n == 200
                else f"{n} labels, {how}, {t}"
                for t in ("none", "always")
            ),
        )
        for how in ("pruned", "unpruned")
    ]


def tables():
    """Replace what stands between <!-- NAME --> and <!-- end --> in the README."""
    when = [
        "none",
        "before pruning",
        "while pruning",
        "while fine-tuning",
        "from 1000 on",
        "always",
        "sequential",
    ]
    how = [
        "always",
        "always, project",
        "sequential",
        "aux_weight 0.1",
        "aux_weight 1",
        "aux_weight 3",
        "shuffled",
    ]
    sizes = [triple for n in (50, 100, 200, 500, 2000) for triple in pruned_and_unpruned(n)]
    sparse = [(f"{s:.0%} cut", f"sparsity {s}, none", f"sparsity {s}, always") for s in (0.5, 0.8, 0.9)]
    sparse = [("nothing cut", "unpruned, none", "unpruned, always"), ("70% cut", "none", "always"), *sparse]
    others = [
        ("random structure, 70%", "random structure, none", "random structure, always"),
        ("small dense network", "small dense, none", "small dense, always"),
    ]
    parts = {
        "when": built_in(when),
        "what": built_in(["gates", "weights", "always"]),
        "real": real(),
        "how": built_in([*how, "shuffled, project"]),
        "labels": amounts(sizes),
        "sparsity": amounts(sparse + others),
    }
    readme = (ROOT / "README.md").read_text()
    for name, text in parts.items():
        readme = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: m[1] + text + m[2], readme, flags=re.S
        )
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    actions = {"run": run, "yardstick": yardstick, "tables": tables}
    actions[sys.argv[1]](*map(int, sys.argv[2:]))
