"""The experiments behind tests/results/README.md and the pictures of both READMEs.

    python tests/experiments.py run                 # every run whose row is missing, in this process
    python tests/experiments.py run 0 2             # the even seeds; "run 1 2" in a second shell: the others
    python tests/experiments.py run 0 1 built_in "real:sst2"  # of one file; of settings that start so
    python tests/experiments.py yardstick           # TF-IDF and a frozen encoder with linear classifiers
    python tests/experiments.py proxy               # a cheap score of every auxiliary task
    python tests/experiments.py speed out/a out/b   # networks of finished runs: 32 texts, timed
    python tests/experiments.py tables              # tests/results/README.md, from the rows; also: pictures

A row keeps what tables, pictures and the notebook need of result.json; it is appended to
tests/results/NAME.jsonl as soon as it is there, and found by its setting and its seed. In its flags
`%encoder` is the folder of a BERT in the Hub's layout, which the environment variable ENCODER names (all
rows: all-MiniLM-L6-v2), `%TASK_after` the same BERT fine-tuned on the auxiliary task of TASK, without the
texts that TASK holds out, `%shuffled` the film reviews with their labels in random order, any other `%NAME` a
parent trained before; `@NAME` is a structure: of another setting's row, drawn at random, or of a rule.

The arms of the comparison from a BERT, one command each (after `export ENCODER=folder`):

    python tests/experiments.py run 0 1 "bert:sst2, 200, 0.7, 1e-4: alone"     # also: after, both, ...

rows of `pretrained` were made with a vocabulary reduced to what occurs in training, by earlier commits.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import nn

import masks
import model
import train as loop
import transfer

RESULTS = Path(__file__).resolve().parent / "results"
PARENTS = Path("out/parents")  # networks to start from, made when first needed
SEEDS = range(5)
DATA = "../shared/data/"
KEPT = "test_accuracy test_macro_f1 validation_accuracy accuracy_before_cut accuracy_after_cut heads_kept "
KEPT += "ffn_kept expected_sparsity delivered_sparsity params_dense params_pruned read_differently"

# ----------------------------------------------------------------------------- settings: name -> flags

# of finished experiments, from scratch: their names and flags are in the rows (`settings_of`)
RECIPES = ("none", "always")
STOPS = {"until the cut": "stops", "goes on": "goes on"}
# other rules for the four heads that fit at 90 %; gates found two layers of two heads in 4 of 10 runs
RULES = {"two layers": [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4], "every layer": [[1, 0, 0, 0]] * 4}
PAIRS = {  # name -> target, auxiliary task, labels of the target; the last is unrelated, to see the harm
    "kitchen <- kitchen_rest, 200 labels": ("kitchen", "kitchen_rest", 200),
    "dvd <- dvd_rest, 200 labels": ("dvd", "dvd_rest", 200),
    "sst2 <- sst5, 200 labels": ("sst2", "sst5", 200),
    "trec_coarse <- trec_fine, 200 labels": ("trec_coarse", "trec_fine", 200),
    "trec_fine <- trec_coarse, 400 labels": ("trec_fine", "trec_coarse", 400),
    "acl_arc <- scicite, all labels": ("acl_arc", "scicite", 0),
    "kitchen <- kitchen_rest, 50 labels": ("kitchen", "kitchen_rest", 50),
    "kitchen <- kitchen_rest, 1000 labels": ("kitchen", "kitchen_rest", 1000),
    "trec_fine <- sst2, 400 labels": ("trec_fine", "sst2", 400),
}

# from a pre-trained BERT with its whole vocabulary; a setting is "task, labels, sparsity, learning rate: arm"
BERT_PAIRS = ("sst2", "trec_coarse")
AUXILIARY = {"sst2": "sst5", "trec_coarse": "trec_fine", "acl_arc": "scicite", "kitchen": "kitchen_rest"}
READ = {"acl_arc": 64, "kitchen": 128}  # pieces of a text; elsewhere 32
SCHEDULE = "--steps 480 --prune_start 50 --prune_ramp 200 --gate_lr 0.1 --finetune_steps 150"
BOTH = "--init %encoder"
ARMS = {  # after: one task after the other, from a BERT fine-tuned on the whole auxiliary task
    "both": BOTH,
    "after": "--init %TASK_after --aux none",
    "alone": f"{BOTH} --aux none",
    "both until the cut": f"{BOTH} --transfer_stop 330",
    "both from the fine-tuned parent": "--init %TASK_after",
}
MAIN = ("both", "after", "alone")
CUTS = (0, 0.5, 0.7, 0.9)
ORDERS = {"every second layer": [1, 3, 5, 0, 2, 4]}  # layers, those to be kept first
GIVEN = {"every second layer": "every second layer", "lowest layers": "bottom", "learned first": "BOTH"}
ARMS |= {kind: f"{BOTH} --finetune_steps 480 --structure @{name}" for kind, name in GIVEN.items()}
PIECES = [f"{size} pieces" for size in (2000, 5000, 10_000)]
ARMS |= {name: f"{BOTH} --vocab_size {name.split()[0]}" for name in PIECES}
ARMS["unrelated"] = f"{BOTH} --aux {DATA}sst2"
TWICE = "--steps 960 --prune_start 100 --prune_ramp 400 --finetune_steps 300"
ARMS |= {f"{arm}, 960 steps": f"{ARMS[arm]} {TWICE}" for arm in ("both", "after")}
LONG = ("both, 960 steps", "after, 960 steps")
RATES = ("1e-4", "3e-5", "1e-5")
# higher learning rates, since a structure that is given does best with them: (arm, rate) -> number of seeds
HIGHER = {("both", "2e-4"): 5, ("both", "3e-4"): 1, ("alone", "2e-4"): 1, ("every second layer", "1e-3"): 1}
HIGHER |= {(kind, lr): 5 if lr == "5e-4" else 1 for kind in GIVEN for lr in ("2e-4", "3e-4", "5e-4")}
TRIED = (*((arm, 0.7) for arm in MAIN), ("after", 0.9))  # arms and sparsities with which all were tried
BERT, SEEDS_OF = {}, {}  # SEEDS_OF: how many, of settings of BERT


def best_rate(task, arm, cut):
    """The learning rate that validation data chose, see the table of rates: at 70 % for all sparsities but
    90 %, where `after` has one of its own.
    """
    own = {("sst2", 0.7): "1e-5", ("sst2", 0.9): "3e-5", ("trec_coarse", 0.7): "3e-5"}
    return own.get((task, max(cut, 0.7)), "1e-4") if arm.startswith("after") else "1e-4"


def bert(task, arm, cut=0.7, lr=None, labels=200, seeds=5):
    """Add the setting of a run from a BERT, and return its name. lr: None for the best learning rate."""
    lr = lr or best_rate(task, arm, cut)
    setting = f"{task}, {labels}, {cut}, {lr}: {arm}"
    flags = f"--target {DATA}{task} --aux {DATA}{AUXILIARY[task]} {SCHEDULE} --n_target {labels} --lr {lr} "
    flags += f"--max_length {READ.get(task, 32)} --sparsity {cut} {ARMS[arm]}"
    if "@BOTH" in flags:  # the structure of the gates' run, whatever rate is given
        flags = flags.replace("@BOTH", f"@{bert(task, 'both', cut, labels=labels)}")
    flags = flags.replace("TASK", task)
    BERT.setdefault(setting, flags)
    SEEDS_OF[setting] = max(seeds, SEEDS_OF.get(setting, 0))
    return setting


def bert_settings():
    """Make all settings, in the order in which they are to be run."""
    for task, (arm, cut), lr in itertools.product(BERT_PAIRS, TRIED, RATES):
        bert(task, arm, cut, lr, seeds=1)
    for task in BERT_PAIRS:  # the rate of 70 %, too: what does a baseline lose with it?
        bert(task, "after", 0.9, best_rate(task, "after", 0.7), seeds=3)
    for task, arm in itertools.product(BERT_PAIRS, [*list(ARMS)[:5], *GIVEN]):
        bert(task, arm)
    for task, arm, cut in itertools.product(BERT_PAIRS, MAIN, CUTS):
        bert(task, arm, cut)
    for task, (arm, lr) in itertools.product(BERT_PAIRS, HIGHER):
        bert(task, arm, lr=lr, seeds=HIGHER[arm, lr])
    for labels, arm in itertools.product((200, 0), MAIN):
        bert("acl_arc", arm, lr="1e-4", labels=labels, seeds=3)
    bert("trec_coarse", "unrelated", seeds=3)
    for task, arm in itertools.product(BERT_PAIRS, (*PIECES, *LONG)):
        bert(task, arm, seeds=3)
    for cut in (0.7, 0):
        bert("kitchen", "both", cut, seeds=1)


# ----------------------------------------------------------------------------- running


def rows(name):
    """The rows of a file, as dicts; none if it is not there."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def settings_of(name):
    """Setting -> flags of the rows of a file, in today's notation: delete a row, and `run` makes it again."""
    found = {row["setting"]: row["flags"] for row in rows(name)}
    today = {" bottom": " @bottom", "random --structure_seed": "@random", "--aux_shuffle": "--aux %shuffled"}
    for setting, flags in found.items():
        for old, new in today.items():
            flags = flags.replace(old, new)
        if "--transfer_start" not in flags and "--aux_weight 0" not in flags:
            flags = f"--transfer_start 1000 {flags}"  # the default of that time
        found[setting] = flags
    return found


def append(name, row):
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        print(json.dumps(row, separators=(",", ":")), file=file)


def quick(flags, seed, folder):
    """Train with flags, in a folder, and print nothing; returns what is in result.json and, with
    --vocab_size, the share of the test texts that are read differently from the parent.
    """
    flags = [*flags.split(), "--seed", str(seed), "--out_dir", str(folder), "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = loop.train(loop.parse_args(flags))
    share = re.search(r"([\d.]+)% of the test texts are read differently", printed.getvalue())
    return result | ({"read_differently": float(share[1]) / 100} if share else {})


def write_task(folder, splits):
    """A folder with a task; splits: name -> pairs of text and class name. Returns its path."""
    for split, pairs in splits.items():
        lines = [json.dumps({"text": text, "label": str(label)}) + "\n" for text, label in pairs]
        Path(folder, f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def shuffled(seed, folder):
    """A folder with the film reviews, the labels of each split in random order."""
    splits = {}
    for split, pairs in transfer.reviews("film").items():
        labels = np.array([label for _, label in pairs])
        np.random.default_rng(seed).shuffle(labels)
        splits[split] = [(text, label) for (text, _), label in zip(pairs, labels)]
    return write_task(folder, splits)


def auxiliary_texts(target, aux):
    """Pairs of text and class name: the auxiliary training texts that the target does not hold out."""
    held_out = [x for split in ("validation", "test") for x in texts(DATA + target, split)[0]]
    held_out = {transfer.text_key((x,)) for x in held_out}
    return [(x, y) for x, y in zip(*texts(DATA + aux, "train")) if transfer.text_key((x,)) not in held_out]


def without_held_out(task):
    """A folder with the auxiliary task of a pair, its training texts without those held out of the target."""
    folder, aux = PARENTS / f"{task}_auxiliary", AUXILIARY[task]
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": auxiliary_texts(task, aux), "validation": zip(*texts(DATA + aux, "validation"))}
    return write_task(folder, splits)


def parent_network(name, seed):
    """The file of a network trained on a whole auxiliary task; made when first needed."""
    file = PARENTS / f"{name}_{seed}.pt"
    if not file.exists():
        own = {"film": "reviews:film", "film8x8": "reviews:film --n_layer 8 --n_head 8"}
        flags = f"--target {own.get(name, DATA + name)} --aux none --n_target 0 --sparsity 0 --steps 2000"
        if name.endswith("_after"):
            task = name.removesuffix("_after")
            flags = f"--init {os.environ['ENCODER']} --target {without_held_out(task)} --aux none "
            flags += f"--sparsity 0 --max_length {READ.get(task, 32)} --lr 1e-4 {SCHEDULE}"
        PARENTS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PARENTS) as made:  # two processes may make it at once
            quick(flags, seed, made)
            Path(made, "pruned.pt").replace(file)
    return str(file)


def place(name, seed, folder):
    """The path that %NAME stands for; what has to be made for one run goes into the folder."""
    if name == "encoder":
        return os.environ["ENCODER"]
    if name == "shuffled":
        return shuffled(seed, folder)
    return parent_network(name, 0 if name.endswith("_after") else seed)  # after: one for all seeds


def structure(name, file, flags, seed):
    """The structure that @NAME stands for, with the keys of a result.json."""
    shapes = {"%encoder": (6, 12, 384), "8x8": (8, 8, 64), "--n_layer 8": (8, 8, 64), "": (4, 4, 64)}
    L, H, width = next(shape for mark, shape in shapes.items() if mark in flags)
    sparsity, prob = float(f"{flags} --sparsity 0.7".partition("--sparsity ")[2].split()[0]), None
    if name in ("bottom", *ORDERS):
        order = torch.tensor(ORDERS.get(name, range(L)))
        height = torch.linspace(1, 0, L)[order.argsort()]
        prob = masks.Units(height.view(L, 1).expand(L, H), height)
    elif name.startswith("random"):
        generator = torch.Generator().manual_seed(100 * seed + int(name.split()[1]))
        prob = masks.Units(torch.rand(L, H, generator=generator), torch.rand(L, generator=generator))
    if prob:
        kept = masks.select(prob, sparsity, *model.unit_sizes(width, H))
        heads, ffn = (part.int().tolist() for part in kept)
    elif name in RULES:
        heads, ffn = RULES[name], [0] * L
    else:
        row = next(row for row in rows(file) if row["setting"] == name and row["seed"] == seed)
        heads, ffn = row["heads_kept"], row["ffn_kept"]
    return {"heads_kept": heads, "ffn_kept": ffn, "target_sparsity": sparsity}


def make(file, setting, seed):
    """Run a setting with a seed; returns its row."""
    flags = FILES[file][setting]
    with tempfile.TemporaryDirectory() as folder:
        words, _, name = flags.partition("@")
        if name:
            Path(folder, "given.json").write_text(json.dumps(structure(name, file, flags, seed)))
            words += f"{folder}/given.json"
        for word in words.split():
            if word.startswith("%"):
                words = words.replace(word, place(word[1:], seed, folder))
        result = quick(words, seed, f"{folder}/out")
        history = [json.loads(line) for line in open(f"{folder}/out/history.jsonl")]
    result = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 6))
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    row = {"setting": setting, "seed": seed, "flags": flags, "commit": commit}
    row["cpu"] = torch.backends.cpu.get_cpu_capability()  # numbers differ a little between processors
    row |= {key: result[key] for key in KEPT.split() if result.get(key) is not None}
    row["validation_curve"] = [[h["step"], round(h["validation_accuracy"], 4)] for h in history]
    return row | {"seconds": round(result["seconds"])}


def run(part=0, parts=1, *wanted):
    """Make the rows that are missing, seed by seed: a row's structure may be that of one made before."""
    for name, seed in itertools.product(wanted or FILES, SEEDS[int(part) :: int(parts)]):
        file, _, start = name.partition(":")
        for setting in FILES[file]:
            if not setting.startswith(start) or seed >= SEEDS_OF.get(setting, len(SEEDS)):
                continue
            if not any(row["setting"] == setting and row["seed"] == seed for row in rows(file)):
                append(file, row := make(file, setting, seed))
                print(f"{file}: {setting}, seed {seed}: {row['seconds']} s", flush=True)


# ----------------------------------------------------------------------------- yardsticks


def texts(spec, split):
    """Texts and class names of a split of a folder, as they stand there, or of a built-in task."""
    if spec.startswith("reviews:"):
        return list(zip(*transfer.reviews(spec.removeprefix("reviews:"))[split]))
    lines = [json.loads(line) for line in open(ROOT / spec / f"{split}.jsonl")]
    return [line["text"] for line in lines], [line["label"] for line in lines]


def labelled(x, y, n, seed):
    """The texts and class names among x and y that a run with --n_target n trains on."""
    part = transfer.limited_subset(np.unique(y, return_inverse=True)[1], n or None, seed)
    return [v for v, kept in zip(x, part) if kept], [v for v, kept in zip(y, part) if kept]


@torch.no_grad()
def features(net, sentences):
    """What a classifier reads, the mean of the final states of every text, and a constant 1: (N, C + 1)."""
    parts = []
    for start in range(0, len(sentences), 32):
        ids = [torch.tensor(net.encode(text)) for text in sentences[start : start + 32]]
        parts.append(net.features(torch.nn.utils.rnn.pad_sequence(ids, True, model.PAD)))
    return nn.functional.pad(torch.cat(parts), (0, 1), value=1.0)


COARSER = {"very positive": "positive", "very negative": "negative"}


def yardstick():
    """TF-IDF, and a frozen pre-trained encoder, each with logistic regression on the same labels and seeds;
    and TF-IDF on the auxiliary data too, where their classes are the target's, or finer than these.
    By hand only: pip install scikit-learn.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    done, bert = {(row["setting"], row["seed"]) for row in rows("yardstick")}, None
    for (target, aux, n), seed in itertools.product(PAIRS.values(), SEEDS):
        splits = {split: texts(DATA + target, split) for split in ("train", "validation", "test")}
        kinds = dict.fromkeys(["TF-IDF", "MiniLM, frozen"], labelled(*splits["train"], n, seed))
        # classes of SST-5 and of fine TREC become those of SST-2 and of coarse TREC
        more = [(x, COARSER.get(y, y.partition(":")[0])) for x, y in auxiliary_texts(target, aux)]
        if (classes := set(splits["train"][1])) <= {name for _, name in more}:
            more = [(x, name) for x, name in more if name in classes]
            kinds["TF-IDF, auxiliary data too"] = list(zip(*zip(*kinds["TF-IDF"]), *more))
        for name, own in kinds.items():
            setting = f"{target}, {n or 'all'} labels: {name}"
            if (setting, seed) in done:
                continue
            if "TF-IDF" in name:
                counts = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]")
                vectors = counts.fit(own[0]).transform
            else:
                bert = bert or model.load_bert(os.environ["ENCODER"])
                bert.config.max_length = 128
                vectors = lambda x: nn.functional.normalize(features(bert, x)[:, :-1]).numpy()  # noqa: E731
            x = vectors(own[0])
            tried = [LogisticRegression(C=C, max_iter=2000).fit(x, own[1]) for C in (1, 10, 100, 1000)]
            x, y = vectors(splits["validation"][0]), splits["validation"][1]
            best = max(tried, key=lambda fitted: fitted.score(x, y))  # C is chosen on validation data
            right = best.score(vectors(splits["test"][0]), splits["test"][1])
            append("yardstick", {"setting": setting, "seed": seed, "C": best.C, "test_accuracy": right})
            done.add((setting, seed))


def speed(*folders):
    """Milliseconds from 32 test texts to class probabilities, on one thread, of the networks in folders."""
    torch.set_num_threads(1)
    for folder in map(Path, folders):
        result, seconds = json.loads((folder / "result.json").read_text()), []
        net = model.GatedTransformer.load(folder / "pruned.pt")
        sample = texts(result["args"]["target"], "test")[0][:32]
        for _ in range(30):
            began = time.perf_counter()
            net.probabilities(sample)
            seconds.append(time.perf_counter() - began)
        row = {"setting": folder.name, "seed": result["args"]["seed"], "parameters": result["params_pruned"]}
        row["ms"] = round(1000 * statistics.median(seconds), 2)
        row["megabytes"] = round((folder / "pruned.pt").stat().st_size / 1e6, 1)
        append("speed", row)


# ----------------------------------------------------------------------------- a cheap proxy


def probe(net, train, validation):
    """Validation accuracy of a linear classifier on the features of a network that stays as it is.

    train, validation: (texts, class names). The classifier is a ridge regression on one column of 0 and 1 a
    class, solved at once.
    """
    names = sorted(set(train[1]))
    y = torch.tensor([[float(name == label) for name in names] for label in train[1]])
    x = features(net, train[0])
    w = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)
    predicted = (features(net, validation[0]) @ w).argmax(1).tolist()
    return statistics.mean(names[i] == label for i, label in zip(predicted, validation[1]))


PROXIES = {"built in, 200 labels": ("reviews:restaurant", "reviews:film", 200)}
PROXIES |= {pair: (DATA + target, DATA + aux, n) for pair, (target, aux, n) in PAIRS.items()}


def proxy():
    """Score every auxiliary task without a run on both tasks: 400 steps on the auxiliary task alone, then a
    linear classifier for the target's labels, with the features of this network and of an untrained one.
    """
    (RESULTS / "proxy.jsonl").unlink(missing_ok=True)
    for seed, aux in itertools.product(SEEDS, dict.fromkeys(aux for _, aux, _ in PROXIES.values())):
        flags = f"--target {aux} --aux none --n_target 0 --sparsity 0 --steps 400 --finetune_steps 100"
        with tempfile.TemporaryDirectory() as folder:
            quick(flags, seed, folder)
            trained = model.GatedTransformer.load(f"{folder}/pruned.pt")
        torch.manual_seed(seed)
        untrained = model.GatedTransformer(trained.config, trained.vocab, trained.labels)
        for pair, (target, own_aux, n) in PROXIES.items():
            if own_aux == aux:
                own = labelled(*texts(target, "train"), n, seed)
                before, after = (probe(net, own, texts(target, "validation")) for net in (untrained, trained))
                append("proxy", {"setting": pair, "seed": seed, "untrained": before, "proxy": after})


# ----------------------------------------------------------------------------- tables


CHOICE = ("validation_accuracy", "test_accuracy")  # what chooses, and what is reported


def column(name, setting, key="test_accuracy"):
    """seed -> 100 * value, of one setting; "after_cut" is the test accuracy right after the cut."""
    found = {}
    for row in rows(name):
        if row["setting"] == setting:
            after_cut = row.get("accuracy_after_cut", {}).get("test")
            found[row["seed"]] = after_cut if key == "after_cut" else row[key]
    return {seed: 100 * value for seed, value in found.items() if value is not None}


def structure_column(name, setting, key="test_accuracy"):
    """`column`; for "random", seed -> the mean over the three random structures of that seed."""
    if ", random" not in setting:
        return column(name, setting, key)
    parts = [column(name, setting.replace("random", f"random {i}"), key) for i in range(3)]
    common = parts[0].keys() & parts[1].keys() & parts[2].keys()
    return {seed: statistics.mean(part[seed] for part in parts) for seed in sorted(common)}


def minus(a, b):
    """seed -> difference, of two columns paired by seed."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def difference(name, setting, baseline, key="test_accuracy"):
    """Differences to the baseline, paired by seed, as a list."""
    return list(minus(column(name, setting, key), column(name, baseline, key)).values())


def shown(values, form=".1f"):
    """Mean ± half of the 95 % interval, as text: a dash if nothing is there, no interval below three."""
    values = list(values.values() if isinstance(values, dict) else values)
    if not values:
        return "-"
    if len(values) < 3 or len(set(values)) == 1:
        return f"{statistics.mean(values):{form}}"
    mean, half = loop.interval(values)
    return f"{mean:{form}}±{half:.1f}"


def table(head, lines):
    """Markdown. The last column counts seeds, and is left out if all lines have all of them."""
    if {line[-1] for line in lines} == {len(SEEDS)}:
        head, lines = head[:-1], [line[:-1] for line in lines]
    lines = [head, ["---"] * len(head), *lines]
    return "".join("|" + "|".join(map(str, line)) + "|\n" for line in lines)


def scores(file, settings, baseline="none", keys=("test_accuracy",)):
    """Scores in %, and gains over a baseline, in points, paired by seed; settings without rows are left out.

    settings: setting -> the one that is its baseline; baseline: what that is called.
    """
    lines, names = [], [key.replace("_", " ").removesuffix(" accuracy") for key in keys]
    for setting, other in settings.items():
        found = [shown(column(file, setting, key)) for key in keys]
        gains = [shown(difference(file, setting, other, key), "+.1f") for key in keys]
        if n := len(column(file, setting)):
            name = setting.replace(", 0, 0.7,", ", all labels,")  # from a BERT
            name = name.replace(", 200,", ",").replace(", 0.7,", ",")  # what most of these runs have
            lines.append([name, *found, *(gains if setting != other else [""] * len(keys)), n])
    return table(["setting", *names, *(f"{name} minus {baseline}" for name in names), "n"], lines)


def without_transfer(settings, mark):
    """Setting -> its baseline: what starts alike, up to the mark, and ends in none, or else just none."""
    own = {name: name.rpartition(mark)[0] + mark + "none" for name in settings}
    return {name: other if other in own else "none" for name, other in own.items()}


def compared(*groups):
    """Scores of arms from a BERT; groups: (task, cut, arms) and perhaps labels; the first arm is the one
    that the others are compared with.
    """
    settings = {}
    for task, cut, arms, *labels in groups:
        names = [bert(task, arm, cut, None, *labels) for arm in arms]
        settings |= dict.fromkeys(names, names[0])
    return scores("bert", settings, groups[0][2][0], CHOICE)


def pieces_table():
    """What fewer pieces cost in accuracy, and what they save; a parameter takes four bytes."""
    lines = []
    for task, arm in itertools.product(BERT_PAIRS, ("both", *PIECES)):
        own = [row for row in rows("bert") if row["setting"] == bert(task, arm)]
        params = own[0]["params_pruned"] / 1e6
        differ = statistics.mean(row.get("read_differently", 0) for row in own)
        sizes = [f"{params:.1f}", f"{4 * params:.0f}", f"{differ:.1%}", min(row["seconds"] for row in own)]
        lost = [difference("bert", bert(task, arm), bert(task, "both"), key) for key in CHOICE]
        lines.append([f"{task}: {arm}", *(shown(gap, "+.1f") for gap in lost), *sizes, len(own)])
    head = ["setting", "validation minus both", "test minus both", "million parameters", "megabytes"]
    return table([*head, "read differently", "seconds", "n"], lines)


def curve(task, arm, cut=0.7):
    """Step -> (seed -> validation accuracy in %), of an arm with 200 labels."""
    own = [row for row in rows("bert") if row["setting"] == bert(task, arm, cut)]
    curves = {row["seed"]: dict(row["validation_curve"]) for row in own}
    steps = [step for step, _ in own[0]["validation_curve"]]
    return {step: {seed: 100 * found[step] for seed, found in curves.items()} for step in steps}


def curves_table():
    """Accuracy before, while and after gates close; the change while they do, and what it is more than the
    change that the same arm has in these steps unpruned.
    """
    lines = []
    for task, cut, arm in itertools.product(BERT_PAIRS, CUTS, MAIN):
        steps, unpruned = curve(task, arm, cut), curve(task, arm, 0)
        change = minus(steps[300], steps[100])
        more = minus(change, minus(unpruned[300], unpruned[100]))
        accuracies = [shown(steps[step]) for step in (100, 300, 480)]
        changes = [shown(change, "+.1f"), shown(more, "+.1f") if cut else ""]
        lines.append([f"{task}, {cut}: {arm}", *accuracies, *changes, len(change)])
    head = ["setting", "step 100", "step 300", "step 480", "300 minus 100", "minus unpruned", "n"]
    return table(head, lines)


# name -> arms and sparsities: a minus b; of four, (a minus b) minus (c minus d)
GAPS = {"both minus unpruned alone": (("both", 0.7), ("alone", 0))}
AGAINST = {"both until the cut": "after", "both from the fine-tuned parent": "after", LONG[0]: "both"}
for arm, other in (*AGAINST.items(), LONG):
    GAPS[f"{arm} minus {other}"] = ((arm, 0.7), (other, 0.7))
for other, cut in itertools.product(("after", "alone"), (0.5, 0.7, 0.9)):
    GAPS[f"lead over {other}, {cut}"] = (("both", cut), (other, cut), ("both", 0), (other, 0))


def gaps_table():
    """Further differences between arms, in points. A lead is that of both at once; does pruning add to it?"""
    lines = []
    for task, (name, arms) in itertools.product(BERT_PAIRS, GAPS.items()):
        found = []
        for key in CHOICE:
            a, b, *unpruned = [column("bert", bert(task, *arm), key) for arm in arms]
            found.append(minus(minus(a, b), minus(*unpruned)) if unpruned else minus(a, b))
        lines.append([f"{task}: {name}", *(shown(gap, "+.1f") for gap in found), len(found[0])])
    return table(["difference", "validation", "test", "n"], lines)


def rates_table():
    """Validation accuracy of seed 0 by learning rate."""
    lines, rates = [], sorted({lr for _, lr in HIGHER} | {*RATES}, key=float, reverse=True)
    for task, (arm, cut) in itertools.product(BERT_PAIRS, (*TRIED, *((kind, 0.7) for kind in GIVEN))):
        found = [column("bert", bert(task, arm, cut, lr), CHOICE[0]).get(0) for lr in rates]
        name = f"{task}, {cut}: {arm}".replace(", 0.7:", ":")
        lines.append([name, *(f"{x:.1f}" if x else "-" for x in found), 1])
    return table(["setting", *rates, "n"], lines)


KINDS = ("learned", "learned then cut", "bottom", "random")
DIFFERENCES = ["learned then cut minus bottom", "minus random", "minus learned", "n"]


def structure_cells(file, name, key="test_accuracy"):
    """Accuracy of every kind of structure, differences, n; name: a setting, with KIND for the kind."""
    found = {kind: structure_column(file, name.replace("KIND", kind), key) for kind in KINDS}
    cut = found["learned then cut"]
    gains = [shown(minus(cut, found[kind]), "+.1f") for kind in ("bottom", "random", "learned")]
    return [*map(shown, found.values()), *gains, len(cut)]


def cuts_table():
    """Accuracy right after the cut, and at the end, by task, structure, window and steps of fine-tuning."""
    lines = []
    for task in ("built in", "trec_coarse", "sst2"):
        right_after = structure_cells("cuts", f"{task}, KIND, until the cut, 800", "after_cut")
        lines.append([task, "", 0, *right_after])
        for window, steps in itertools.product(STOPS, (25, 800)):
            cells = structure_cells("cuts", f"{task}, KIND, {window}, {steps}")
            lines.append([task, STOPS[window], steps, *cells])
    return table(["target", "transfer", "steps", *KINDS, *DIFFERENCES], lines)


def same_shape(setting, other):
    """In how many seeds two settings keep as many heads and the same feed-forward sublayers in each layer."""
    shapes = {
        (row["setting"], row["seed"]): ([sum(heads) for heads in row["heads_kept"]], row["ffn_kept"])
        for row in rows("sparsity")
    }
    return sum(name == setting and shapes.get((other, seed)) == kept for (name, seed), kept in shapes.items())


def sparsity_table():
    lines = []
    for start, cut in itertools.product(("scratch", "parent"), (0.5, 0.6, 0.7, 0.8, 0.9)):
        cells = structure_cells("sparsity", f"{start}, {cut}, KIND")
        same = same_shape(f"{start}, {cut}, learned", f"{start}, {cut}, bottom")
        if cells[-1]:
            lines.append([start, cut, f"{same} of {cells[-1]}", *cells])
    return table(["start", "sparsity", "learned has bottom's shape", *KINDS, *DIFFERENCES], lines)


def proxy_pairs():
    """Pair -> what the cheap score adds over an untrained network, and what whole runs gained, by seed."""
    found = {}
    for pair in PROXIES:
        rise = list(minus(column("proxy", pair, "proxy"), column("proxy", pair, "untrained")).values())
        file, start = ("built_in", "") if pair.startswith("built in") else ("real", f"{pair}: ")
        gain = difference(file, f"{start}always", f"{start}none", "validation_accuracy")
        if len(rise) > 1 and len(gain) > 1:
            found[pair] = rise, gain
    return found


def rank_correlation(found):
    """Spearman's, of the mean rises and the mean gains of `proxy_pairs`."""
    ranks = [np.argsort(np.argsort([statistics.mean(v) for v in values])) for values in zip(*found.values())]
    return np.corrcoef(*ranks)[0, 1]


def proxy_table():
    more = (" 50 labels", " 1000 labels")  # each pair counts once
    lines, found = [], {pair: gains for pair, gains in proxy_pairs().items() if not pair.endswith(more)}
    for pair, gains in found.items():
        levels = [shown(column("proxy", pair, key)) for key in ("untrained", "proxy")]
        lines.append([pair, *levels, *(shown(gain, "+.1f") for gain in gains), len(gains[0])])
    head = ["pair", "untrained, %", "after 400 steps, %", "rise, points", "gain of the runs, points", "n"]
    return f"{table(head, lines)}\nRank correlation of rise and gain: {rank_correlation(found):.2f}.\n"


def yardstick_table():
    """Test accuracy of the yardsticks beside ours on the same labels and seeds."""
    lines, yardsticks = [], ["TF-IDF", "MiniLM, frozen", "TF-IDF, auxiliary data too"]
    for target, aux, n in PAIRS.values():
        pair = f"{target} <- {aux}, {n or 'all'} labels"
        found = [column("yardstick", f"{target}, {n or 'all'} labels: {name}") for name in yardsticks]
        found += [column("real", f"{pair}: {recipe}") for recipe in RECIPES]
        found.append(column("pretrained", f"{target}, {n} labels, 0.7: transfer"))
        whole = bert(target, "both", labels=n) if AUXILIARY.get(target) == aux else ""
        found.append(column("bert", whole))
        found += [minus(found[-1], found[i]) for i in (1, 2)]
        if found[0]:
            lines.append([pair, *map(shown, found), len(found[0])])
    own = ["ours, no transfer", "ours, transfer", "from a BERT, reduced vocabulary", "from a BERT"]
    return table(["pair", *yardsticks, *own, *(f"minus {name}" for name in yardsticks[1:]), "n"], lines)


def speed_table():
    timed = {row["setting"]: row for row in rows("speed")}  # the last of each
    lines = [[name, f"{row['ms']:.1f}", f"{row['parameters']:,}", row.get("megabytes", "-")]
             for name, row in timed.items()]
    return table(["classifier", "milliseconds for 32 texts", "parameters", "megabytes"], lines)


def tables():
    """Fill tests/results/README.md: what stands between <!-- NAME --> and <!-- end --> is written anew."""
    real = [name for pair in PAIRS for name in FILES["real"] if pair in name and name.endswith(RECIPES)]
    parents = sorted(name for name in FILES["parent"] if "rest" not in name and name.endswith(RECIPES))
    kitchen, given = [("kitchen", cut, ["both"]) for cut in (0.7, 0)], {}
    rates = [("1e-4", "1e-4"), ("2e-4", "5e-4")]  # of the gates' run, of a structure that is given
    for task, (own, rate) in itertools.product(BERT_PAIRS, rates):
        gates_run = bert(task, "both", lr=own)
        given |= {gates_run: bert(task, "both")} | {bert(task, kind, lr=rate): gates_run for kind in GIVEN}
    parts = {
        "arms": compared(*((task, 0.7, list(ARMS)[:5]) for task in BERT_PAIRS)),
        "rates": rates_table(),
        "curves": curves_table(),
        "gaps": gaps_table(),
        "by sparsity": compared(*((task, cut, MAIN) for task in BERT_PAIRS for cut in CUTS if cut != 0.7)),
        "structures": scores("bert", given, "both", CHOICE),
        "corpus": compared(*(("acl_arc", 0.7, MAIN, labels) for labels in (200, 0)), *kitchen),
        "unrelated": compared(("trec_coarse", 0.7, ["alone", "unrelated", "both"])),
        "pieces": pieces_table(),
        "built in": scores("built_in", without_transfer(FILES["built_in"], ", ")),
        "cuts": cuts_table(),
        "sparsity": sparsity_table(),
        "parent": scores("parent", without_transfer(parents, ", "), keys=CHOICE),
        "real": scores("real", without_transfer(real, ": "), keys=(*CHOICE, "test_macro_f1")),
        "proxy": proxy_table(),
        "yardstick": yardstick_table(),
        "speed": speed_table(),
    }
    path = RESULTS / "README.md"
    text = path.read_text()
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = f"{before}{mark}{part}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    path.write_text(text)


# ----------------------------------------------------------------------------- pictures

LABELS = {"both": "both at once", "after": "one after the other", "alone": "200 labels alone"}
COLOURS = {"both": "#D55E00", "after": "#009E73", "alone": "#0072B2"}  # told apart by the colour-blind, too


def panels(values, xlabel, ylabel, xlim):
    """A figure with a panel for each pair: three arms from a BERT, every seed a dot, their mean a line.

    values: function of task and arm that returns x -> (seed -> accuracy in %).
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    axes[0].set_ylabel(ylabel)
    for axis, task in zip(axes, BERT_PAIRS):
        ends = []
        for arm in MAIN:
            found = {x: [*seeds.values()] for x, seeds in values(task, arm).items() if seeds}
            dots = [(x, accuracy) for x, seeds in found.items() for accuracy in seeds]
            axis.plot(*zip(*dots), "o", color=COLOURS[arm], alpha=0.4, mec="none")
            mean = [statistics.mean(seeds) for seeds in found.values()]
            axis.plot(list(found), mean, color=COLOURS[arm])
            ends.append((mean[-1], max(found), arm))
        height = -math.inf
        for y, x, arm in sorted(ends):
            height = max(y, height + 2.5)  # so that labels do not overlap
            end = {"xy": (x, height), "xytext": (8, -4), "textcoords": "offset points"}
            axis.annotate(LABELS[arm], color=COLOURS[arm], **end)
        title = {"sst2": "SST-2"}.get(task, "coarse TREC")
        axis.set(title=title, xlabel=xlabel, xlim=xlim, xticks=list(found))
    return figure


def by_step():
    """A figure: validation accuracy by step."""
    figure = panels(curve, "training step (grey: gates are active)", "validation accuracy, %", (80, 640))
    for axis in figure.axes:
        axis.axvspan(50, 330, color="#EEEEEE")
    return figure


def by_sparsity():
    """A figure: test accuracy by the part of the prunable weights that is removed."""

    def at_cuts(task, arm):
        return {100 * cut: column("bert", bert(task, arm, cut)) for cut in CUTS}

    return panels(at_cuts, "removed of the prunable weights, %", "test accuracy, %", (-5, 130))


def pictures():
    """The pictures of both READMEs, from the rows."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    for figure in (by_step, by_sparsity):
        figure().savefig(RESULTS / f"{figure.__name__}.png", dpi=100)


bert_settings()
FILES = {"bert": BERT}
FILES |= {name: settings_of(name) for name in ("built_in", "cuts", "sparsity", "parent", "real")}

if __name__ == "__main__":
    actions = (run, yardstick, speed, proxy, tables, pictures)
    {action.__name__: action for action in actions}[sys.argv[1]](*sys.argv[2:])
