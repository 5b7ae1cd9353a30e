"""Claims about whole runs, seen from outside: command line, folders, interruptions, seeds (train.py)."""

import importlib.util
import io
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model
import train as loop
from test_model import write_bert
# small_data holds for these tests, too
from test_train import PIECES, ROOT, SCHEDULE, SMALL, equal, every_review, history
from test_train import run, small_data, weights, write
from transfer import InputError

DATA = ROOT.parent / "shared" / "data"
TINY = "--steps 2 --finetune_steps 1 --sparsity 0 --n_layer 1 --n_head 1 --d_model 4 --device cpu".split()


def main(*flags, module=loop, stdin=b"", encoding="utf-8"):
    """The command line inside this process: (exit code, stdout, stderr)."""
    out, error = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        try:
            code = module.main() or 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.buffer.getvalue().decode(encoding), error.getvalue()


def is_one_line(code, error):
    return code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 600


def same(a, b):
    """The same result, but for times and flags that do not matter, the same history and the same
    weights."""
    one, other = (json.loads((folder / "result.json").read_text()) for folder in (a, b))
    for name in ("seconds", "args"):
        assert one.pop(name) and other.pop(name)
    return one == other and history(a) == history(b) and equal(weights(a), weights(b))


def interrupted(folder, *flags, step=25, every=10):
    """A run that Ctrl-C ends in this step."""
    real, stop = loop.task_loss, lambda: signal.default_int_handler(signal.SIGINT, None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "task_loss", lambda *a: stop() if a[3] == step else real(*a))
        run(folder, *flags, every=every)


# ---- what a run leaves behind


def test_the_first_command_shortened_runs_and_leaves_what_it_promises(tmp_path):
    """As a user types it, in a folder of its own; the numbers in result.json agree with the network on
    disk."""
    flags = "--aux_weight 0.5 --transfer_start 30 --sparsity 0.6 --n_layer 3".split()  # no structure has 0.6
    command = [sys.executable, ROOT / "train.py", *SMALL, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path / "out")) == ["history.jsonl", "pruned.pt", "result.json"]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    small = model.GatedTransformer.load(tmp_path / "out" / "pruned.pt")
    texts, names = zip(*every_review("restaurant")["test"])
    right = [a == b for a, b in zip(small.predict(list(texts)), names)]
    assert result["test_accuracy"] == pytest.approx(statistics.mean(right), abs=1e-6)
    assert result["test_majority"] == max(names.count(name) for name in names) / 2000
    assert result["params_pruned"] == sum(p.numel() for p in small.parameters()) < result["params_dense"]
    assert result["delivered_sparsity"] == pytest.approx(1 - model.prunable(small) / (3 * 12 * 8 * 8)) != 0.6
    kept = [result[key] for key in ("heads_kept", "ffn_kept", "target_sparsity")]
    assert [list(map(sum, kept[0])), *kept[1:]] == [small.config.heads, small.config.ffn, 0.6]
    assert (result["args"]["transfer_start"], result["seed"], result["torch"]) == (30, 0, torch.__version__)
    told = ["2 classes: negative", "step    60  finetune", *(f"note: {note}" for note in result["notes"])]
    told.append(f"accuracy {result['test_accuracy']:.3f}")
    told.append("layer 2   heads " + "".join(".#"[n] for n in kept[0][2]))
    assert not [line for line in told if line not in done.stdout]


def test_a_folder_belongs_to_one_run(tmp_path, monkeypatch):
    """What an earlier run left is removed before the first step, and said; a refused run removes nothing.
    Where there is nothing to resume, a run starts at step 0, and says so. A loss that is not finite ends a
    run with one line, and leaves its last checkpoint."""
    out = main(*SMALL, "--out_dir", tmp_path, "--resume")[1]
    assert "to resume: starting at step 0" in out and "removed" not in out
    assert main(*SMALL, "--out_dir", tmp_path, "--n_target", 9999)[0] == 2
    assert len(os.listdir(tmp_path)) == 3
    real = loop.task_loss
    monkeypatch.setattr(loop, "task_loss", lambda *a: real(*a) * (float("nan") if a[3] == 15 else 1))
    monkeypatch.setattr(loop, "EVAL_EVERY", 10)
    code, out, error = main(*SMALL, "--out_dir", tmp_path)
    assert is_one_line(code, error) and "step 15" in error and "nan" in error and "--lr" in error
    assert f"note: {tmp_path / 'result.json'} of an earlier run is removed" in out and "to resume" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "history.jsonl"]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 10


def test_6000_classes_make_no_matrix_of_36_million_numbers(tmp_path):
    rows = [{"text": f"w{i} x", "label": f"class number {i}"} for i in range(6000)]
    for split, part in (("train", rows), ("validation", rows[:200]), ("test", rows[::30])):
        write(tmp_path / "task" / f"{split}.jsonl", part)
    result = run(tmp_path / "out", *TINY, "--target", tmp_path / "task", "--n_target", 0, "--max_length", 2)
    assert result["test_confusion"] is None and len(result["label_order"]) == 6000
    assert (tmp_path / "out" / "result.json").stat().st_size < 2e6


@pytest.mark.parametrize("encoding, name, other", [
    ("ascii", r"na\xefve", r"\u6771"), ("cp1252", "naïve", r"\u6771"), ("utf-8", "naïve", "東")
])  # fmt: skip
def test_what_the_console_cannot_encode_is_escaped(tmp_path, encoding, name, other):
    """Class names, texts and folders, in both programs."""
    rows = [{"text": f"{('日 ø', '本')[i % 2]} {i}", "label": ("naïve", "東")[i % 2]} for i in range(60)]
    write(tmp_path / "本" / "train.jsonl", rows)
    flags = "--n_target=0 --lr=0.05 --sparsity=0 --target".split()
    flags += [tmp_path / "本", "--out_dir", tmp_path / "出"]
    for _ in range(2):  # the second one removes what the first one has left
        code, out, error = main(*SMALL, *flags, encoding=encoding)
        assert (code, error) == (0, "") and f"2 classes: {name}, {other}" in out
    texts = "日 ø\n本".encode()
    code, out, error = main(tmp_path / "出" / "pruned.pt", module=model, stdin=texts, encoding=encoding)
    assert (code, error) == (0, "") and [line.split("\t")[0] for line in out.splitlines()] == [name, other]


PAIRS = [("sst2", "sst5"), ("trec_coarse", "trec_fine"), ("acl_arc", "scicite")]


@pytest.mark.skipif(not DATA.exists(), reason="no real data on this machine")
@pytest.mark.parametrize("target, aux", PAIRS)
def test_real_pairs_run_to_the_end(tmp_path, target, aux):
    """The classes of the target's file, by name; and the accuracy that the network on disk has on the file
    itself."""
    result = run(tmp_path, "--target", DATA / target, "--aux", DATA / aux,
                 "--transfer_start=5", "--n_layer=3")
    rows = [json.loads(line) for line in (DATA / target / "test.jsonl").read_text().splitlines()]
    network, names = model.GatedTransformer.load(tmp_path / "pruned.pt"), [row["label"] for row in rows]
    assert network.labels["target"] == sorted({*names}) and 0.5 <= result["delivered_sparsity"] < 0.5 + 8 / 36
    right = sum(a == b for a, b in zip(network.predict([row["text"] for row in rows]), names))
    assert abs(result["test_accuracy"] * len(rows) - right) < 2.5  # ties that rounding decides


# ---- interrupted and resumed


def killed(folder, flags, where, name, when=lambda *_: True, base=SMALL):
    """A run, resumed if there is anything to resume, in a process that ends by SIGKILL when `name` of
    `where` is called and `when` holds for its arguments."""
    if (child := os.fork()) == 0:
        real = getattr(where, name)
        setattr(where, name, lambda *a: os.kill(os.getpid(), signal.SIGKILL) if when(*a) else real(*a))
        try:
            run(folder, *flags, "--resume", every=10, base=base)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["learned", "from a parent, a structure given", "from a BERT"])
def test_a_run_killed_in_every_phase_and_resumed_ends_as_if_it_had_not_been(tmp_path, kind):
    """Before the first checkpoint, in all phases, at the cut and right after it, while a checkpoint is
    written, and after the last step: the cut is at step 40 of 60, checkpoints are at every tenth."""
    flags, base = ["--transfer_start", 5, "--coupling", "project", "--lr", 0.01], SMALL
    if "parent" in kind:
        run(tmp_path / "parent", "--target", "reviews:film", "--sparsity", 0)
        run(tmp_path / "learned")
        structure = tmp_path / "learned" / "result.json"
        flags += ["--init", tmp_path / "parent" / "pruned.pt", "--structure", structure]
    elif "BERT" in kind:
        flags += ["--init", write_bert(tmp_path / "bert", pieces=PIECES), "--max_length", 20]
        base = SCHEDULE
    whole, ours = tmp_path / "whole", tmp_path / "ours"
    run(whole, *flags, every=10, base=base)
    for step in (5, 17, 38):
        killed(ours, flags, loop, "task_loss", lambda *a: a[3] == step, base)
    killed(ours, flags, model, "extract", base=base)
    for step in (40, 47, 50):
        killed(ours, flags, loop, "task_loss", lambda *a: a[3] == step, base)
    assert torch.load(ours / "checkpoint.pt", weights_only=True)["step"] == 50
    killed(ours, flags, os, "replace", base=base)  # a new checkpoint is written, but not in place
    killed(ours, flags, model.GatedTransformer, "save", base=base)
    killed(ours, flags, Path, "unlink", lambda path: path.name == "checkpoint.pt", base)
    run(ours, *flags, "--resume", every=10, base=base)
    assert same(ours, whole)
    assert sorted(path.name for path in ours.iterdir()) == ["history.jsonl", "pruned.pt", "result.json"]


def test_the_best_network_of_before_an_interruption_and_its_seconds_are_kept(tmp_path, monkeypatch):
    """The first evaluation of fine-tuning is the best; by a clock that goes on by a minute whenever it is
    read."""
    accuracy, real, clock = iter([0.1] * 8 + [0.9] + [0.5] * 9), loop.evaluate, iter(range(0, 10**6, 60))
    monkeypatch.setattr(loop, "evaluate", lambda *a: real(*a) | {"accuracy": next(accuracy)})
    monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: next(clock)))
    interrupted(tmp_path, step=52)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    result = run(tmp_path, "--resume", every=10)
    assert result["validation_accuracy"] == 0.9 and equal(weights(tmp_path), saved["best"]["weights"])
    assert saved["step"] == 50 and 0 < saved["seconds"] <= result["seconds"] - 60


def test_resume_refuses_another_run_and_returns_a_finished_one(tmp_path):
    """Other flags, labels swapped in a file of the same name, size and time, another structure, another
    parent: before and after the run is finished. --seeds and --out_dir may differ. A finished run is not
    touched."""
    task, parent, out = tmp_path / "task.jsonl", tmp_path / "film0" / "pruned.pt", tmp_path / "out"
    write(task, [{"text": f"word{i % 7} of {i}", "label": "ab"[i % 2]} for i in range(80)])
    for seed in (0, 1):
        run(tmp_path / f"film{seed}", "--target=reviews:film", "--sparsity=0", "--n_target=0", "--seed", seed)
    structure = tmp_path / "structure.json"
    structure.write_text('{"heads_kept": [[1, 1], [0, 0]], "ffn_kept": [1, 0], "target_sparsity": 0.5}')
    changes = {task: task.read_bytes().translate(bytes.maketrans(b"ab", b"ba")).replace(b"lbael", b"label")}
    changes[structure] = structure.read_bytes().replace(b"[[1, 1], [0, 0]]", b"[[0, 0], [1, 1]]")
    changes[parent] = (tmp_path / "film1" / "pruned.pt").read_bytes()
    flags = ["--target", task, "--n_target", 0, "--init", parent, "--structure", structure]

    def refuses_all_others():
        for name, value in (("lr", 0.5), ("seed", 1)):
            with pytest.raises(InputError, match=f"holds a run with {name} "):
                run(out, *flags, "--resume", f"--{name}", value, every=10)
        for path, changed in changes.items():
            before, times = path.read_bytes(), path.stat()
            path.write_bytes(changed)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            with pytest.raises(InputError, match="holds a run on other data, parent or structure"):
                run(out, *flags, "--resume", every=10)
            path.write_bytes(before)

    interrupted(out, *flags)
    refuses_all_others()
    out.rename(tmp_path / "moved")
    result = run(tmp_path / "moved", *flags, "--resume", "--seeds", 3, every=10)
    (tmp_path / "moved").rename(out)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    refuses_all_others()
    assert run(out, *flags, "--resume", every=10) == json.loads(json.dumps(result)) and len(files) == 3
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}


def test_an_unusable_checkpoint_is_one_line_and_remains(tmp_path):
    interrupted(tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    torch.save({"weights": torch.zeros(3)}, foreign := io.BytesIO())
    for content in (whole[: len(whole) // 2], b"", b"odd", foreign.getvalue()):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        code, _, error = main(*SMALL, "--out_dir", tmp_path, "--resume")
        assert is_one_line(code, error) and (tmp_path / "checkpoint.pt").read_bytes() == content


def surroundings():
    """Signal handlers, streams, hooks and loggers of this process, by name."""
    loggers = [logging.getLogger(), *map(logging.getLogger, [*logging.Logger.manager.loggerDict])]
    state = {one.name: (one.level, one.disabled, tuple(one.handlers)) for one in loggers}
    state |= {number: signal.getsignal(number) for number in signal.valid_signals()}
    hooks = (sys.excepthook, threading.excepthook)
    return state | {"streams": (sys.stdin, sys.stdout, sys.stderr), "hooks": hooks}


def test_ctrl_c_is_one_line_and_no_run_changes_the_process(tmp_path, monkeypatch, capsys):
    """Interrupted before and after the first checkpoint, by a real signal; afterwards runs go to the end,
    also in a thread, where no signal handler could be installed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real, before, during = loop.task_loss, surroundings(), []
    monkeypatch.setattr(loop, "EVAL_EVERY", 10)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out_dir", str(tmp_path)])
    for stop in (5, 25):

        def signalled(*a):
            during.append(surroundings())
            return signal.raise_signal(signal.SIGINT) if a[3] == stop else real(*a)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            patch.setattr(loop, "task_loss", signalled)
            loop.main()
        assert re.fullmatch("\ninterrupted.*--resume.*\n", capsys.readouterr().err)
    for state in (*during, surroundings()):  # torch may make loggers, but those that were there stay
        assert before.items() <= state.items()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    thread = threading.Thread(target=loop.main)
    thread.start()
    thread.join()
    run(tmp_path / "whole", every=10)
    assert same(tmp_path, tmp_path / "whole") and not capsys.readouterr().err
    spec = importlib.util.spec_from_file_location("train_once_more", ROOT / "train.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert before.items() <= surroundings().items()


# ---- several seeds


def test_seeds_are_run_with_and_without_transfer_and_compared_by_pairs(tmp_path, monkeypatch):
    """The printed means, t-intervals (12.706 is the quantile for two values) and gains of two seeds, by
    hand; an interrupted comparison goes on where it stopped, and finished runs are used again. Without an
    auxiliary task each seed is run once."""
    flags = [*SMALL, "--transfer_start", 2, "--lr", 0.01, "--seeds", 2, "--seed", 3, "--out_dir", tmp_path]
    steps, real = [], loop.task_loss

    def counted(net, gates, task, step, args):
        steps.append((args.seed, args.aux_weight))
        if len(steps) == 60 + 58 + 45:
            raise KeyboardInterrupt
        return real(net, gates, task, step, args)

    monkeypatch.setattr(loop, "task_loss", counted)
    monkeypatch.setattr(loop, "EVAL_EVERY", 20)
    assert "--resume" in main(*flags)[2]
    code, out, _ = main(*flags, "--resume")
    assert code == 0 and len(steps) == 2 * (60 + 58 + 60) + 5  # five steps were made twice
    assert list(dict.fromkeys(steps)) == [(3, 0.5), (3, 0.0), (4, 0.5), (4, 0.0)]
    assert main(*flags, "--resume")[1].splitlines()[-6:] == out.splitlines()[-6:] and len(steps) == 361
    for split in ("validation", "test"):
        points = {}
        for name in ("transfer", "no_transfer"):
            paths = [tmp_path / f"{name}_{seed}" / "result.json" for seed in (3, 4)]
            results = [json.loads(path.read_text()) for path in paths]
            points[name] = [100 * result[f"{split}_accuracy"] for result in results]
        points["gain,"] = [a - b for a, b in zip(points["transfer"], points["no_transfer"])]
        for name, values in points.items():
            (line,) = [line for line in out.splitlines() if line.split()[:2] == [split, name]]
            mean, half = statistics.mean(values), 12.706 * statistics.stdev(values) / 2**0.5
            printed = [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
            assert printed == pytest.approx([mean, mean - half, mean + half], abs=0.11)
    out = main(*TINY, "--seeds", 2, "--aux_weight", 0, "--out_dir", tmp_path / "alone")[1]
    assert "gain" not in out and out.count("95 % interval") == len(os.listdir(tmp_path / "alone")) == 2


# ---- bad input


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    assert is_one_line(*main(*TINY, "--out_dir", tmp_path)[::2])


OUTSIDE = """sparsity -0.1, sparsity nan, aux_weight -1, lr 0, lr inf, gate_lr 0, dropout 1,
    label_smoothing 1, batch_size 0, finetune_steps 0, prune_ramp -1, vocab_size 1, seed -1,
    transfer_stop -1, max_length 5000"""
OUTSIDE = [entry.split() for entry in OUTSIDE.split(",")]
BAD = [(f"--{name} {value}", f"argument --{name}: {value} is not between") for name, value in OUTSIDE]
BAD += [
    ("--steps ten", "--steps: invalid int value: 'ten'"), ("--steps", "--steps: expected one argument"),
    ("--coupling add", "--coupling: invalid choice: 'add'"), ("--aux_wei 1", "unrecognized arguments: --aux"),
    ("--sparsity 0.98", "gates reach at most 0.96"), ("--n_layer 1 --n_head 1", "no room for a single"),
    ("--d_model 30", "d_model 30 is no multiple"), ("--sparsity 0 --steps 20", "finetune_steps"),
    ("--steps 1500", "pruning needs 1142 steps"), ("--gate_lr 0.001", "pruning needs 21300 steps"),
    ("--n_target 7000", "n_target 7000: of 400"), ("--n_target 1", "n_target 1: of 400"),
    ("--target reviews:book", "reviews:book"), ("--target ./none", "no such file or folder: './none'"),
    ("--device meta", "device meta is not"), ("--device cuda:99", "device cuda:99 is not available"),
    ("--device cuda:99 --init none.pt", "device cuda:99"), ("--structure botom", "structure is learned"),
    ("--init none.pt", "none.pt is missing, or"), ("--init .", ". cannot be loaded"),
    ("--init=", "cannot be loaded"), ("--structure .", "structure"), ("--out_dir=", "out_dir is"),
    ("--out_dir file/out", "file/out"),
]  # fmt: skip


@pytest.mark.parametrize("flags, reason", BAD)
def test_bad_flags_end_with_the_reason_and_nothing_is_written(tmp_path, monkeypatch, flags, reason):
    """argparse says how the program is used, too; what it does not know is one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, error = main(*flags.split())
    *usage, line = error.splitlines()
    assert code == 2 and "error: " in line and reason in line and len(line) < 300
    assert len(usage) == (0 if line.startswith("error: ") else 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_says_something_about_every_flag_and_a_users_target_trains_alone():
    alone = loop.parse_args(["--target", "mine", "--aux_weight", "0.3"])
    assert loop.parse_args([]).aux == "reviews:film" and (alone.aux, alone.aux_weight) == ("none", 0)
    code, out, error = main("--help")
    assert (code, error) == (0, "") and all(f"--{name} " in out for name in vars(loop.parse_args([])))
