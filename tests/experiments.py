"""The experiments behind the tables of the README.

    python tests/experiments.py run           # every run whose row is missing, in this process
    python tests/experiments.py run 0 2       # one half of them; "run 1 2" in a second shell: the other
    python tests/experiments.py yardstick     # TF-IDF with logistic regression (needs scikit-learn)
    python tests/experiments.py tables        # write the tables into the README, from tests/results/*.jsonl

Every row is what train(args) returned, appended to tests/results/NAME.jsonl as soon as it is there.
"""

import json
import re
import statistics
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
    "until fine-tuning": "--transfer_start 0 --transfer_stop 2200",
    "always, project": "--transfer_start 0 --coupling project",
    "before pruning": "--transfer_start 0 --transfer_stop 500",
    "while pruning": "--transfer_start 500 --transfer_stop 2200",
    "while fine-tuning": "--transfer_start 2200",
    "sequential": "--transfer_start 0 --transfer_stop 1000 --target_start 1000 --prune_start 1000",
    "gates": "--transfer_start 0 --transfer gates",
    "weights": "--transfer_start 0 --transfer weights",
    "shuffled": "--transfer_start 0 --aux_shuffle",
    "shuffled, project": "--transfer_start 0 --aux_shuffle --coupling project",
    "aux_weight 0.1": "--transfer_start 0 --aux_weight 0.1",
    "aux_weight 1": "--transfer_start 0 --aux_weight 1",
    "aux_weight 3": "--transfer_start 0 --aux_weight 3",
}
CHANGES = {f"{n} labels, pruned": f"--n_target {n}" for n in (50, 100, 500, 2000)}
CHANGES |= {
    "sparsity 0.5": "--sparsity 0.5",
    "sparsity 0.8": "--sparsity 0.8",
    "sparsity 0.9": "--sparsity 0.9",
    "random structure": "--structure random",
    "small dense": "--sparsity 0 --n_layer 1 --d_model 68",
    "unpruned": "--sparsity 0",
}
CHANGES |= {f"{n} labels, unpruned": f"--n_target {n} --sparsity 0" for n in (50, 100, 500, 2000)}
for name, flags in CHANGES.items():
    BUILT_IN[f"{name}, none"] = f"{flags} --aux_weight 0"
    BUILT_IN[f"{name}, always"] = f"{flags} --transfer_start 0"

PAIRS = {  # name -> target, auxiliary task, labels of the target; the last is unrelated, to see the harm
    "sst2 <- sst5": ("sst2", "sst5", 200),
    "trec_coarse <- trec_fine": ("trec_coarse", "trec_fine", 200),
    "sst5 <- sst2": ("sst5", "sst2", 400),
    "trec_fine <- trec_coarse": ("trec_fine", "trec_coarse", 400),
    "acl_arc <- scicite": ("acl_arc", "scicite", 0),
    "acl_arc <- scicite, 300 labels": ("acl_arc", "scicite", 300),
    "trec_fine <- sst2": ("trec_fine", "sst2", 400),
}
RECIPES = {recipe: BUILT_IN[recipe] for recipe in ("none", "always", "until fine-tuning")}
REAL = {  # setting -> flags
    f"{pair}: {recipe}": f"--target {DATA}{target} --aux {DATA}{aux} --n_target {n} {flags}"
    for recipe, flags in RECIPES.items()
    for pair, (target, aux, n) in PAIRS.items()
}
GUARDS = {  # what else could protect against a coarse or an unrelated auxiliary task
    "trec_fine <- trec_coarse": {
        "sequential": BUILT_IN["sequential"],
        "none, no smoothing": "--aux_weight 0 --label_smoothing 0",
        "always, no smoothing": "--transfer_start 0 --label_smoothing 0",
    },
    "trec_fine <- sst2": {
        "always, project": BUILT_IN["always, project"],
        "aux_weight 0.1": BUILT_IN["aux_weight 0.1"],
    },
}
for pair, guards in GUARDS.items():
    task_flags = REAL[f"{pair}: none"].removesuffix(RECIPES["none"])
    REAL |= {f"{pair}: {guard}": task_flags + flags for guard, flags in guards.items()}
STRUCTURES = {  # what the benchmark cuts out of a network of its size, learned with seed 0
    f"d_model {d_model}, sparsity {cut}": f"--d_model {d_model} --n_layer {n_layer} --sparsity {cut}"
    for d_model, n_layer in ((64, 4), (128, 4), (256, 6))
    for cut in (0.5, 0.7, 0.9)
}


def rows(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def append(name, row):
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        print(json.dumps(row), file=file)


def run(part=0, parts=1):
    """Run what is missing, real settings first, one seed of each after the other."""
    have = {(r["setting"], r["seed"]) for name in ("built_in", "real", "structures") for r in rows(name)}
    jobs = [("real", *item, seed) for seed in SEEDS for item in REAL.items()]
    jobs += [("built_in", *item, seed) for item in BUILT_IN.items() for seed in SEEDS]
    jobs += [("structures", *item, 0) for item in STRUCTURES.items()]
    for name, setting, flags, seed in [job for job in jobs[part::parts] if (job[1], job[3]) not in have]:
        with tempfile.TemporaryDirectory() as folder:
            result = loop.train(loop.parse_args([*flags.split(), "--seed", str(seed), "--out_dir", folder]))
        del result["args"]["out_dir"]
        append(name, {"setting": setting, "flags": flags, **result})


def yardstick():
    """Accuracy and macro-F1 of TF-IDF (words and pairs of words) with logistic regression, on the same
    subsets.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    def texts(data, examples):
        bounds = zip(examples.start[:-1], examples.start[1:])
        return [" ".join(data.vocab[t] for t in examples.tokens[a:b]) for a, b in bounds]

    (RESULTS / "yardstick.jsonl").unlink(missing_ok=True)
    for target, n in dict.fromkeys((target, n) for target, _, n in PAIRS.values()):
        for seed in SEEDS:
            data = loop.prepare(DATA + target, "none", n, 64, 10**6, seed=seed)
            vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
            x = vectorizer.fit_transform(texts(data, data.train))
            fitted = LogisticRegression(C=10, max_iter=1000).fit(x, data.train.label)
            predicted = fitted.predict(vectorizer.transform(texts(data, data.test)))
            f1 = f1_score(data.test.label, predicted, average="macro")
            accuracy = float((predicted == data.test.label).mean())
            scores = {"test_accuracy": accuracy, "test_macro_f1": f1}
            append("yardstick", {"setting": f"{target}, {n or 'all'} labels", "seed": seed, **scores})


# ----------------------------------------------------------------------------- tables


def column(name, setting, key="test_accuracy"):
    """seed -> 100 * value, of one setting."""
    return {row["seed"]: 100 * row[key] for row in rows(name) if row["setting"] == setting}


def difference(name, setting, baseline, key="test_accuracy"):
    """Differences to the baseline, paired by seed."""
    a, b = column(name, setting, key), column(name, baseline, key)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def shown(values, form=".1f"):
    """Mean and 95 % interval as text; a dash if fewer than two runs are there, no interval if all agree."""
    if len(values) < 2:
        return "-"
    mean, _, half = interval(list(values))
    if half == 0:
        return f"{mean:{form}}"
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def table(head, lines):
    lines = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def built_in(settings):
    """Accuracy and paired gain over no transfer, for settings of the built-in pair that have been run."""
    lines = []
    for setting in settings:
        values = column("built_in", setting).values()
        if values:
            command = f"`{BUILT_IN[setting]}`" if BUILT_IN[setting] else "(defaults)"
            gain = "" if setting == "none" else shown(difference("built_in", setting, "none"), "+.1f")
            lines.append([setting, command, shown(values), gain, len(values)])
    return table(["setting", "flags", "test accuracy, %", "paired gain, points", "n"], lines)


def amounts(settings):
    """Accuracy without and with transfer and the paired gain, for settings of the built-in pair: title ->
    name.
    """
    lines = []
    for title, name in settings.items():
        alone, helped = f"{name}none", f"{name}always"
        gain = difference("built_in", helped, alone)
        if len(gain) > 1:
            command = CHANGES.get(name.rstrip(", "), "")
            accuracies = [shown(column("built_in", setting).values()) for setting in (alone, helped)]
            lines.append([title, command and f"`{command}`", *accuracies, shown(gain, "+.1f"), len(gain)])
    return table(["", "flags", "no transfer, %", "transfer, %", "paired gain, points", "n"], lines)


def chosen(pair):
    """The recipe that validation data choose: the largest paired gain whose interval lies above 0, else
    none.
    """
    clear = {"none": 0.0}
    for recipe in RECIPES:
        gains = difference("real", f"{pair}: {recipe}", f"{pair}: none", "validation_accuracy")
        mean, _, half = interval(gains or [0.0])
        if mean > half:
            clear[recipe] = mean
    return max(clear, key=clear.get)


def real(recipes):
    """Lines of recipes on real pairs; recipes: pair -> names. The choice of the validation data is marked."""
    lines = []
    for pair, names in recipes.items():
        for recipe in names:
            name, mark = f"{pair}: {recipe}", " (chosen)" if recipe == chosen(pair) else ""
            splits = [column("real", name, f"{split}_accuracy").values() for split in ("validation", "test")]
            f1, cut = (column("real", name, key).values() for key in ("test_macro_f1", "delivered_sparsity"))
            keys = "test_accuracy", "test_macro_f1"
            gains = [shown(difference("real", name, f"{pair}: none", key), "+.1f") for key in keys]
            if len(f1) > 1:
                cells = [*map(shown, splits), f"{statistics.mean(f1):.1f}", f"{min(cut):.1f}"]
                cells += ["", ""] if recipe == "none" else gains
                lines.append([pair, recipe + mark, *cells, len(f1)])
    head = ["pair", "recipe", "validation, %", "test, %", "macro-F1", "sparsity"]
    return table([*head, "paired gain on test", "gain in macro-F1", "n"], lines)


def outside():
    """Accuracy and macro-F1 of the yardstick."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows("yardstick")):
        keys = "test_accuracy", "test_macro_f1"
        accuracy, f1 = (column("yardstick", setting, key).values() for key in keys)
        lines.append([setting, shown(accuracy), shown(f1), len(f1)])
    return table(["target", "test, %", "macro-F1", "n"], lines)


def tables():
    """Replace what stands between <!-- NAME --> and <!-- end --> in the README."""
    when = ["none", "before pruning", "while pruning", "while fine-tuning", "until fine-tuning"]
    how = ["always", "aux_weight 0.1", "aux_weight 1", "aux_weight 3", "always, project", "sequential"]
    titles = [f"{n} labels, {state}" for state in ("pruned", "unpruned") for n in (50, 100, 200, 500, 2000)]
    labels = {title: f"{title}, " for title in titles}
    labels |= {"200 labels, pruned": "", "200 labels, unpruned": "unpruned, "}
    sparse = {"nothing cut": "unpruned, ", "50 % cut": "sparsity 0.5, ", "70 % cut": ""}
    sparse |= {"80 % cut": "sparsity 0.8, ", "90 % cut": "sparsity 0.9, "}
    sparse |= {"70 % cut at random": "random structure, ", "small dense network": "small dense, "}
    parts = {
        "when": built_in([*when, "from 1000 on", "always", "sequential"]),
        "what": built_in(["gates", "weights", "always"]),
        "how": built_in([*how, "shuffled", "shuffled, project"]),
        "labels": amounts(labels),
        "sparsity": amounts(sparse),
        "real": real(dict.fromkeys(PAIRS, RECIPES)),
        "guards": real(GUARDS),
        "yardstick": outside(),
    }
    readme = (ROOT / "README.md").read_text()
    for name, text in parts.items():
        found = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        readme = re.sub(found, lambda m: m[1] + text + m[2], readme, flags=re.S)
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    actions = {"run": run, "yardstick": yardstick, "tables": tables}
    actions[sys.argv[1]](*map(int, sys.argv[2:]))
