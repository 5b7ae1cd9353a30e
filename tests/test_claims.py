"""Claims about whole runs, seen from outside: command line, folders, interruptions, seeds (train.py)."""

import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import model
import train as loop
from test_model import main, write_bert
# small_data holds for these tests, too
from test_train import PIECES, ROOT, SCHEDULE, SMALL, equal, every_review, history
from test_train import prunable, run, small_data, weights
from test_transfer import save
from transfer import InputError

DATA = ROOT.parent / "shared" / "data"
TINY = "--steps 2 --finetune_steps 1 --sparsity 0 --n_layer 1 --n_head 1 --d_model 4 --device cpu".split()
DONE = ["checkpoint.pt", "history.jsonl", "pruned.pt", "result.json"]  # what a finished run leaves


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
    assert sorted(os.listdir(tmp_path / "out")) == DONE
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    small = model.GatedTransformer.load(tmp_path / "out" / "pruned.pt")
    texts, names = zip(*every_review("restaurant")["test"])
    right = [a == b for a, b in zip(small.predict(list(texts)), names)]
    assert result["test_accuracy"] == pytest.approx(statistics.mean(right), abs=1e-6)
    assert result["test_majority"] == max(names.count(name) for name in names) / 2000
    assert result["params_pruned"] == sum(p.numel() for p in small.parameters()) < result["params_dense"]
    assert result["delivered_sparsity"] == pytest.approx(1 - prunable(small) / (3 * 12 * 8 * 8)) != 0.6
    kept = [result[key] for key in ("heads_kept", "ffn_kept", "target_sparsity")]
    assert [list(map(sum, kept[0])), *kept[1:]] == [small.config.heads, small.config.ffn, 0.6]
    assert (result["args"]["transfer_start"], result["torch"]) == (30, torch.__version__)
    assert result["examples"] == {"train": 200, "validation": 500, "test": 2000, "aux": 6000}
    told = ["2 classes: ['negative', 'positive']", "step    60  finetune", "200 of 6000 training examples"]
    told.append(f"accuracy {result['test_accuracy']:.3f}")
    before, after = (result[f"accuracy_{when}_cut"]["test"] for when in ("before", "after"))
    told.append(f"test accuracy before the cut {before:.3f}, right after it {after:.3f}")
    told.append("layer 2   heads " + "".join(".#"[n] for n in kept[0][2]))
    assert not [line for line in told if line not in done.stdout]


def test_where_nothing_is_to_resume_a_run_starts_and_one_that_diverges_keeps_its_last_checkpoint(
    tmp_path, monkeypatch
):
    """A loss that is not finite ends a run with one line that names the step."""
    assert main(*SMALL, "--out_dir", tmp_path, "--resume")[0] == 0 and sorted(os.listdir(tmp_path)) == DONE
    real = loop.task_loss
    monkeypatch.setattr(loop, "task_loss", lambda *a: real(*a) * (float("nan") if a[3] == 15 else 1))
    monkeypatch.setattr(loop, "EVAL_EVERY", 10)
    code, out, error = main(*SMALL, "--out_dir", tmp_path / "new")
    assert is_one_line(code, error) and "step 15" in error and "--lr" in error
    assert torch.load(tmp_path / "new" / "checkpoint.pt", weights_only=True)["step"] == 10


def test_a_run_without_a_standard_error_stream_works(tmp_path, monkeypatch):
    """As in a process without a console, where sys.stderr is None: there is no bar."""
    monkeypatch.setattr(sys, "stderr", None)
    assert run(tmp_path)["params_pruned"] > 0


def test_a_text_with_a_lone_surrogate_is_read_and_printed(tmp_path):
    r"""JSON may have "\ud83d", half of a pair, which no encoding can write."""
    rows = [{"text": f"half \ud83d of {i} {'ab'[i % 2]}", "label": "ab"[i % 2]} for i in range(40)]
    save(tmp_path / "mine.jsonl", rows)
    code, out, error = main(*SMALL, "--target", tmp_path / "mine.jsonl", "--out_dir", tmp_path / "out")
    assert (code, error) == (0, "") and r"half \ud83d of" in out
    assert "\ud83d" in model.GatedTransformer.load(tmp_path / "out" / "pruned.pt").vocab


@pytest.mark.parametrize("encoding, name, other", [
    ("ascii", r"na\xefve", r"\u6771"), ("cp1252", "naïve", r"\u6771"), ("utf-8", "naïve", "東")
])  # fmt: skip
def test_what_the_console_cannot_encode_is_escaped(tmp_path, encoding, name, other):
    """Class names, texts and folders, in both programs."""
    rows = [{"text": f"{('日 ø', '本')[i % 2]} {i}", "label": ("naïve", "東")[i % 2]} for i in range(60)]
    save(tmp_path / "本" / "train.jsonl", rows)
    flags = "--lr=0.05 --sparsity=0 --target".split()
    flags += [tmp_path / "本", "--out_dir", tmp_path / "出"]
    code, out, error = main(*SMALL, *flags, encoding=encoding)
    assert (code, error) == (0, "") and f"2 classes: ['{name}', '{other}']" in out
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


def logged(folder, function):
    """task_loss, which also appends every step of the target task to a file beside the folder."""

    def log_and_do(net, gates, task, step, args):
        if task.name == "target":
            with open(f"{folder}.steps", "a") as file:
                print(step, file=file)
        return function(net, gates, task, step, args)

    return log_and_do


def killed(folder, flags, where, name, when=lambda *_: True, base=SMALL):
    """A run, resumed if there is anything to resume, in a process that ends by SIGKILL when `name` of
    `where` is called and `when` holds for its arguments."""
    if (child := os.fork()) == 0:
        loop.task_loss = logged(folder, loop.task_loss)
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
    written, and after the last step: the cut is at step 40 of 60, checkpoints are at every tenth. No step is
    made again that was before a checkpoint. Until the result is there, the checkpoint is."""
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
    # a new checkpoint is written, but not in place
    killed(ours, flags, Path, "replace", lambda path, _: path.name == "checkpoint.tmp", base)
    killed(ours, flags, model.GatedTransformer, "save", base=base)
    killed(ours, flags, Path, "write_text", lambda path, *_: path.name == "result.json", base)
    assert "result" not in torch.load(ours / "checkpoint.pt", weights_only=True)
    (ours / "pruned.pt").unlink()
    killed(ours, flags, loop, "save_checkpoint", base=base)
    assert sorted(path.name for path in ours.iterdir()) == DONE
    run(ours, *flags, "--resume", every=10, base=base)
    assert same(ours, whole) and sorted(path.name for path in ours.iterdir()) == DONE
    assert (ours / "checkpoint.pt").stat().st_size < 20_000  # without weights
    steps = [int(line) for line in Path(f"{ours}.steps").read_text().split()]
    parts = [(0, 5), (0, 17), (10, 38), (30, 40), (40, 47), (40, 50), (50, 60), (50, 60)]
    assert steps == [step for first, last in parts for step in range(first, last)]


def test_the_best_network_of_before_an_interruption_is_kept(tmp_path):
    """Validation labels are swapped, so that what is learned makes the network worse: the best of the
    fine-tuning is the first one, from before the interruption."""
    for split, names in (("train", "ab"), ("validation", "ba"), ("test", "ab")):
        rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": names[i % 2]} for i in range(60)]
        save(tmp_path / "task" / f"{split}.jsonl", rows)
    flags, out = ["--target", tmp_path / "task", "--lr", 0.005, "--sparsity", 0.3], tmp_path / "out"
    interrupted(out, *flags, step=52, every=5)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    result = run(out, *flags, "--resume", every=5)
    losses = [row["validation_loss"] for row in history(out) if row["phase"] == "finetune"]
    assert saved["step"] == 50 and losses == sorted(losses) and len(losses) == 4
    assert equal(weights(out), saved["best"]["weights"]) and result["validation_accuracy"] < 0.5


def test_resume_refuses_another_run_and_returns_a_finished_one(tmp_path):
    """Other flags; one label changed in the file of any split, in one of the same size and time; another
    structure, another parent: before and after the run is finished. --seeds and --out_dir may differ. A
    finished run is not touched."""
    task, parent, out = tmp_path / "task", tmp_path / "film0" / "pruned.pt", tmp_path / "out"
    for split in ("train", "validation", "test", "aux"):
        texts = [f"word{i % 7} of {i} in {split}" for i in range(40)]
        rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
        save(task / f"{split}.jsonl", rows)
    for seed in (0, 1):
        run(tmp_path / f"film{seed}", "--target=reviews:film", "--sparsity=0", "--n_target=0", "--seed", seed)
    structure = tmp_path / "structure.json"
    structure.write_text('{"heads_kept": [[1, 1], [0, 0]], "ffn_kept": [1, 0], "target_sparsity": 0.5}')
    changes = {path: path.read_bytes().replace(b'"a"', b'"b"', 1) for path in task.iterdir()}
    changes[structure] = structure.read_bytes().replace(b"[[1, 1], [0, 0]]", b"[[0, 0], [1, 1]]")
    changes[parent] = (tmp_path / "film1" / "pruned.pt").read_bytes()
    flags = ["--target", task, "--aux", task / "aux.jsonl", "--init", parent, "--structure", structure]

    def refuses_all_others():
        for name, value in (("lr", 0.5), ("seed", 1)):
            with pytest.raises(InputError, match=f"of a run with another {name}: "):
                run(out, *flags, "--resume", f"--{name}", value, every=10)
        for path, changed in changes.items():
            before, times = path.read_bytes(), path.stat()
            path.write_bytes(changed)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            with pytest.raises(InputError, match="of a run with another data_digest"):
                run(out, *flags, "--resume", every=10)
            path.write_bytes(before)

    interrupted(out, *flags)
    refuses_all_others()
    out.rename(tmp_path / "moved")
    result = run(tmp_path / "moved", *flags, "--resume", "--seeds", 3, every=10)
    (tmp_path / "moved").rename(out)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    refuses_all_others()
    assert run(out, *flags, "--resume", every=10) == json.loads(json.dumps(result)) and len(files) == 4
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}


def test_an_unusable_checkpoint_is_one_line_and_remains(tmp_path):
    interrupted(tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    torch.save({"weights": torch.zeros(3)}, foreign := io.BytesIO())
    for content in (whole[: len(whole) // 2], b"", b"odd", foreign.getvalue()):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        code, _, error = main(*SMALL, "--out_dir", tmp_path, "--resume")
        assert is_one_line(code, error) and (tmp_path / "checkpoint.pt").read_bytes() == content


def test_ctrl_c_is_one_line_and_the_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Interrupted before and after the first checkpoint, by a real signal; resumed in a thread, where no
    signal handler could be installed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real = loop.task_loss
    monkeypatch.setattr(loop, "EVAL_EVERY", 10)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out_dir", str(tmp_path)])
    for stop in (5, 25):
        signalled = lambda *a, stop=stop: signal.raise_signal(signal.SIGINT) if a[3] == stop else real(*a)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(loop, "task_loss", signalled)
            loop.main()
        assert re.fullmatch("\ninterrupted.*--resume.*", stopped.value.code)  # printed, the exit code is 1
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    thread = threading.Thread(target=loop.main)
    thread.start()
    thread.join()
    run(tmp_path / "whole", every=10)
    assert same(tmp_path, tmp_path / "whole")


# ---- several seeds


def test_seeds_are_run_with_and_without_transfer_and_compared_by_pairs(tmp_path, monkeypatch):
    """The printed means, t-intervals (12.706 is the quantile for two values) and gains of two seeds, by
    hand; an interrupted comparison goes on where it stopped, and finished runs are used again."""
    flags = [*SMALL, "--transfer_start", 2, "--lr", 0.01, "--seeds", 2, "--seed", 3, "--out_dir", tmp_path]
    steps, real = [], loop.task_loss

    def counted(net, gates, task, step, args):
        steps.append((args.seed, args.aux_weight))
        if len(steps) == 60 + 58 + 45:
            raise KeyboardInterrupt
        return real(net, gates, task, step, args)

    monkeypatch.setattr(loop, "task_loss", counted)
    monkeypatch.setattr(loop, "EVAL_EVERY", 20)
    assert "--resume" in main(*flags)[0]
    code, out, _ = main(*flags, "--resume")
    assert code == 0 and len(steps) == 2 * (60 + 58 + 60) + 5  # five steps were made twice
    assert list(dict.fromkeys(steps)) == [(3, 0.5), (3, 0.0), (4, 0.5), (4, 0.0)]
    assert main(*flags, "--resume")[1].splitlines()[-2:] == out.splitlines()[-2:] and len(steps) == 361
    for split, line in zip(("validation", "test"), out.splitlines()[-2:]):
        points = []
        for name in ("transfer", "no_transfer"):
            paths = [tmp_path / f"{name}_{seed}" / "result.json" for seed in (3, 4)]
            points.append([100 * json.loads(path.read_text())[f"{split}_accuracy"] for path in paths])
        gains = [a - b for a, b in zip(*points)]
        mean, half = statistics.mean(gains), 12.706 * statistics.stdev(gains) / 2**0.5
        printed = [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
        expected = [*map(statistics.mean, points), mean, mean - half, mean + half]
        assert line.startswith(split) and "seeds" in line and printed == pytest.approx(expected, abs=0.11)


# ---- bad input


def test_a_lack_of_memory_is_one_line_and_a_fault_of_the_program_is_not_hidden(tmp_path, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("shapes do not fit")):
        monkeypatch.setattr(loop, "task_loss", Mock(side_effect=error))
        if isinstance(error, torch.OutOfMemoryError):
            assert is_one_line(*main(*TINY, "--out_dir", tmp_path)[::2])
        else:
            with pytest.raises(RuntimeError, match="shapes do not fit"):
                main(*TINY, "--out_dir", tmp_path)


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    assert is_one_line(*main(*TINY, "--out_dir", tmp_path)[::2])


OUTSIDE = """sparsity -0.1, sparsity 0.98, sparsity nan, aux_weight -1, lr 0, lr inf, gate_lr 0, dropout 1,
    label_smoothing 1, batch_size 0, finetune_steps 0, prune_ramp -1, vocab_size 1, seed -1,
    transfer_stop -1, max_length 5000"""
OUTSIDE = [entry.split() for entry in OUTSIDE.split(",")]
BAD = [(f"--{name} {value}", f"argument --{name}: {value} is not between") for name, value in OUTSIDE]
BAD += [
    ("--steps ten", "--steps: invalid number value: 'ten'"), ("--steps", "--steps: expected one argument"),
    ("--coupling add", "--coupling: invalid choice: 'add'"), ("--aux_wei 1", "unrecognized arguments: --aux"),
    ("--d_model 30", "d_model 30 is no multiple of n_head 4"), ("--n_head 100", "of n_head 100"),
    ("--sparsity 0 --steps 20", "--steps 20: the phases need 800"),
    ("--steps 1500", "--steps 1500: the phases need 2442"), ("--gate_lr 0.001", "the phases need 9400"),
    ("--n_target 7000", "n_target 7000: take 2 to 400"), ("--n_target 1", "n_target 1: take 2 to 400"),
    ("--target reviews:book", "reviews:book"), ("--target ./none", "no such file or folder: './none'"),
    ("--device meta", "--device: invalid choice: 'meta'"), ("--device cuda", "invalid choice: 'cuda'"),
    ("--structure botom", "structure: botom is no run's"), ("--target mine --seeds 2", "it needs --aux"),
    ("--init none.pt", "none.pt is missing, or"), ("--init .", "config.json cannot be read"),
    ("--init ./models/typo", "no such folder: './models/typo'"),
    *((f"--{name}=", f"--{name} is empty") for name in ("init", "target", "aux", "structure", "out_dir")),
    ("--out_dir file/out", "file/out"),
]  # fmt: skip
if torch.cuda.is_available():
    BAD.remove(("--device cuda", "invalid choice: 'cuda'"))


@pytest.mark.parametrize("flags, reason", BAD)
def test_bad_flags_end_with_the_reason_and_nothing_is_written(tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, error = main(*flags.split())
    assert is_one_line(code, error) and reason in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_users_target_trains_alone_and_on_all_it_has_unless_flags_say_otherwise():
    alone, built_in = loop.parse_args(["--target", "mine", "--aux_weight", "0.3"]), loop.parse_args([])
    assert (alone.aux, alone.aux_weight, alone.n_target) == ("none", 0, 0)
    assert (built_in.aux, built_in.n_target, built_in.transfer_start) == ("reviews:film", 200, 0)
    few = loop.parse_args("--target mine --aux other --n_target 50 --transfer_start 7".split())
    assert (few.aux, few.aux_weight, few.n_target, few.transfer_start) == ("other", 0.5, 50, 7)


def test_help_says_something_about_every_flag():
    code, out, error = main("--help")
    assert (code, error) == (0, "") and all(f"--{name} " in out for name in vars(loop.parse_args([])))
