"""The experiments behind the tables of the README.

    python tests/experiments.py run             # every run whose row is missing, in this process
    python tests/experiments.py run 0 2         # the even half of them; "run 1 2" in a second shell is the other half
    python tests/experiments.py tables          # the tables, from tests/results/*.jsonl

Every row is what train(args) returned, appended to tests/results/NAME.jsonl as soon as it is there.
"""

import json
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
    "weights": "--transfer_start 0 --transfer weights",
    "gates": "--transfer_start 0 --transfer gates",
    "aux_weight 0.1": "--transfer_start 0 --aux_weight 0.1",
    "aux_weight 1": "--transfer_start 0 --aux_weight 1",
    "aux_weight 3": "--transfer_start 0 --aux_weight 3",
    "shuffled": "--transfer_start 0 --aux_shuffle",
    "shuffled, project": "--transfer_start 0 --aux_shuffle --coupling project",
    "unpruned, none": "--sparsity 0 --aux_weight 0",
    "unpruned, always": "--sparsity 0 --transfer_start 0",
    "random structure, none": "--structure random --aux_weight 0",
    "random structure, always": "--structure random --transfer_start 0",
    "small dense, none": "--sparsity 0 --n_layer 1 --d_model 68 --aux_weight 0",
    "small dense, always": "--sparsity 0 --n_layer 1 --d_model 68 --transfer_start 0",
}
for n in (50, 100, 500, 2000):
    for sparsity, what in ((0.7, "pruned"), (0, "unpruned")):
        BUILT_IN[f"{n} labels, {what}, none"] = f"--n_target {n} --sparsity {sparsity} --aux_weight 0"
        BUILT_IN[f"{n} labels, {what}, always"] = f"--n_target {n} --sparsity {sparsity} --transfer_start 0"
for sparsity in (0.5, 0.8, 0.9):
    BUILT_IN[f"sparsity {sparsity}, none"] = f"--sparsity {sparsity} --aux_weight 0"
    BUILT_IN[f"sparsity {sparsity}, always"] = f"--sparsity {sparsity} --transfer_start 0"

PAIRS = {"sst2": ("sst5", 200), "trec_coarse": ("trec_fine", 200), "sst5": ("sst2", 400),
         "trec_fine": ("trec_coarse", 400), "acl_arc": ("scicite", 0)}
RECIPES = {
    "none": "--aux_weight 0",
    "always": "--transfer_start 0",
    "until fine-tuning": "--transfer_start 0 --transfer_stop 2200",
    "always, project": "--transfer_start 0 --coupling project",
}
REAL = {f"{target} <- {aux}: {name}": f"--target {DATA}{target} --aux {DATA}{aux} --n_target {n} {flags}"
        for name, flags in RECIPES.items() for target, (aux, n) in PAIRS.items()}


def rows(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def run(part=0, parts=1):
    """Run what is missing; built-in and real settings take turns, so that an interrupted series has some of both."""
    jobs = []
    lists = [[(name, s, f, seed) for s, f in settings.items() for seed in SEEDS]
             for name, settings in (("built_in", BUILT_IN), ("real", REAL))]
    while any(lists):
        jobs += [jobs_left.pop(0) for jobs_left in lists if jobs_left]
    for number, (name, setting, flags, seed) in enumerate(jobs):
        if number // 2 % parts != part or any((r["setting"], r["seed"]) == (setting, seed) for r in rows(name)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = loop.train(loop.parse_args([*flags.split(), "--seed", str(seed), "--out_dir", folder]))
        with open(RESULTS / f"{name}.jsonl", "a") as file:
            print(json.dumps({"setting": setting, "flags": flags.strip(), **result}), file=file)


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    if sys.argv[1:2] == ["run"]:
        run(*map(int, sys.argv[2:]))
