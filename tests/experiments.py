"""The experiments behind tests/results/README.md and the pictures of the README.

    python tests/experiments.py run                 # every run whose row is missing, in this process
    python tests/experiments.py run 0 2             # one half of them; "run 1 2" in a second shell: the other
    python tests/experiments.py run 0 1 built_in    # the rows of one file
    python tests/experiments.py yardstick           # TF-IDF and a frozen encoder (needs scikit-learn, see there)
    python tests/experiments.py tables              # tests/results/README.md and pictures, from the rows

Every row is what train(args) returned, appended to tests/results/NAME.jsonl as soon as it is there. Runs that
are equal up to the cut share their steps until then: the row has the same bits as that of its flags alone.
"""

import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import train as loop

RESULTS = Path(__file__).resolve().parent / "results"
PARENTS = ROOT / "out" / "parents"  # networks to start from, made when first needed
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
    "aux_weight 0.1": f"{ALWAYS} --aux_weight 0.1",
    "aux_weight 3": f"{ALWAYS} --aux_weight 3",
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
    "sst5 <- sst2, 400 labels": ("sst5", "sst2", 400),
    "trec_fine <- trec_coarse, 400 labels": ("trec_fine", "trec_coarse", 400),
    "acl_arc <- scicite, all labels": ("acl_arc", "scicite", 0),
    "acl_arc <- scicite, 300 labels": ("acl_arc", "scicite", 300),
    "kitchen <- kitchen_rest, 50 labels": ("kitchen", "kitchen_rest", 50),
    "kitchen <- kitchen_rest, 1000 labels": ("kitchen", "kitchen_rest", 1000),
    "trec_fine <- sst2, 400 labels": ("trec_fine", "sst2", 400),
}
RECIPES = {"none": "--aux_weight 0", "always": ALWAYS}


def task_flags(pair):
    target, aux, n = PAIRS[pair]
    return f"--target {DATA}{target} --aux {DATA}{aux} --n_target {n}"


REAL = {f"{pair}: {name}": f"{task_flags(pair)} {flags}" for pair in PAIRS for name, flags in RECIPES.items()}
REAL |= {
    f"trec_fine <- trec_coarse, 400 labels: {name}, no smoothing":
        f"{task_flags('trec_fine <- trec_coarse, 400 labels')} {flags} --label_smoothing 0"
    for name, flags in RECIPES.items()
}

# what is cut in one step keeps the network of dense training; "@NAME" is the result.json of another setting
TASKS = {"built in": "", "trec_coarse": task_flags("trec_coarse <- trec_fine, 200 labels")}
TASKS |= {"sst2": task_flags("sst2 <- sst5, 200 labels")}
CUTS = {}
for task, flags in TASKS.items():
    for window, stop in (("until the cut", UNTIL), ("goes on", ALWAYS)):
        for steps in (800, 400, 100, 25, 1):
            end = f"{flags} {stop} --steps {2200 + steps} --finetune_steps {steps}"
            CUTS[f"{task}, learned, {window}, {steps}"] = end
            CUTS[f"{task}, learned then cut, {window}, {steps}"] = (
                f"{end} --structure @{task}, learned, until the cut, 800"
            )
            CUTS[f"{task}, bottom, {window}, {steps}"] = f"{end} --structure bottom"
            for i in range(3):
                CUTS[f"{task}, random {i}, {window}, {steps}"] = f"{end} --structure random --structure_seed {i}"

FILM = "--init %film --aux_weight 0 --lr 3e-4 --steps 2000 --prune_start 0 --prune_ramp 700 --finetune_steps 600"
SPARSITY = {}
for cut in (0.5, 0.6, 0.7, 0.8, 0.9):
    for start, flags in (("scratch", UNTIL), ("parent", FILM)):
        name, flags = f"{start}, {cut}", f"{flags} --sparsity {cut}"
        SPARSITY[f"{name}, learned"] = flags
        SPARSITY[f"{name}, learned then cut"] = f"{flags} --structure @{name}, learned"
        SPARSITY[f"{name}, bottom"] = f"{flags} --structure bottom"
        for i in range(3):
            SPARSITY[f"{name}, random {i}"] = f"{flags} --structure random --structure_seed {i}"
for structure in ("learned", "learned then cut", "bottom", "random 0", "random 1", "random 2"):
    flags = SPARSITY[f"scratch, 0.8, {structure}"].replace("@scratch, 0.8", "@8x8, 0.8")
    SPARSITY[f"8x8, 0.8, {structure}"] = f"--n_layer 8 --n_head 8 {flags}"

SHORT = "--steps 2000 --prune_start 0 --prune_ramp 700 --finetune_steps 600"
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
for name, pair in (("kitchen_rest", "kitchen <- kitchen_rest, 200 labels"), ("sst5", "sst2 <- sst5, 200 labels")):
    for recipe, flags in RECIPES.items():
        PARENT[f"{name}, lr 3e-4, {recipe}"] = f"--init %{name} --lr 3e-4 {SHORT} {task_flags(pair)} {flags}"

SHAPES = {  # what the benchmark cuts out of a network of its size, learned with seed 0
    f"d_model {d_model}, sparsity {cut}": f"--d_model {d_model} --n_layer {n_layer} --sparsity {cut}"
    for d_model, n_layer in ((64, 4), (128, 4), (256, 6))
    for cut in (0.5, 0.7, 0.9)
}
FILES = {"built_in": BUILT_IN, "cuts": CUTS, "sparsity": SPARSITY, "parent": PARENT, "real": REAL}

# ----------------------------------------------------------------------------- running


def rows(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def append(name, row):
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        print(json.dumps(row), file=file)


def parent_network(name, seed):
    """The file of a network trained on a whole auxiliary task; made when first needed."""
    folder, task = PARENTS / f"{name}_{seed}", "reviews:film" if name == "film" else DATA + name
    if not (folder / "result.json").exists():
        flags = f"--target {task} --aux none --n_target 0 --sparsity 0 --steps 2000 --seed {seed}"
        loop.train(loop.parse_args([*flags.split(), "--out_dir", str(folder)]))
    return str(folder / "pruned.pt")


class SharedStart:
    """Runs that are equal up to the cut start there, from a copy of the first one's state."""

    def __init__(self):
        self.kept, self.key, self.start, self.choose = {}, None, loop.start, loop.choose_structure
        loop.start, loop.choose_structure = self.start_or_copy, self.choose_and_keep

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

    def choose_and_keep(self, gates, args):
        self.kept.setdefault(self.key, copy.deepcopy(self.run))
        return self.choose(gates, args)


def result_of(file, setting, flags, seed):
    """Run one setting with one seed. @NAME in the flags is that setting's structure, %NAME a parent."""
    with tempfile.TemporaryDirectory() as folder:
        if "@" in flags:
            flags, other = flags.split("@")
            row = next(r for r in rows(file) if r["setting"] == other and r["seed"] == seed)
            structure = {key: row[key] for key in ("heads_kept", "ffn_kept", "target_sparsity")}
            Path(folder, "result.json").write_text(json.dumps(structure))
            flags += f"{folder}/result.json"
        words = flags.split()
        words = [parent_network(word[1:], seed) if word.startswith("%") else word for word in words]
        args = loop.parse_args([*words, "--seed", str(seed), "--out_dir", f"{folder}/out", "--device", "cpu"])
        result = loop.train(args)
        history = [json.loads(line) for line in open(f"{folder}/out/history.jsonl")]
    curve = [[row["step"], round(row["validation_accuracy"], 4)] for row in history]
    for key in ("prob_open", "test_confusion", "test_precision", "test_recall", "test_f1", "data"):
        if len(str(result[key])) > 2000:  # fifty classes
            del result[key]
    return {**result, "validation_curve": curve}


def run(part=0, parts=1, *files):
    """Run what is missing. A unit of work is a seed of settings that share a start; units go to the parts."""
    shared = SharedStart()
    for file in files or FILES:
        units = {}
        for setting, flags in FILES[file].items():
            group = setting.split(",")[0] if file in ("cuts", "sparsity") else setting
            units.setdefault(group, []).append((setting, flags))
        units = [(seed, unit) for unit in units.values() for seed in SEEDS]
        for seed, unit in units[int(part) :: int(parts)]:
            shared.kept.clear()
            for setting, flags in unit:
                if not any(r["setting"] == setting and r["seed"] == seed for r in rows(file)):
                    began = time.time()
                    append(file, {"setting": setting, "flags": flags, **result_of(file, setting, flags, seed)})
                    print(f"{file}: {setting}, seed {seed}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    actions = {"run": run}
    actions[sys.argv[1]](*sys.argv[2:])
