"""Claims about everything that can go wrong: kills, hostile input, full disks, several processes
(train.py)."""

import csv
import errno
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train as loop
from test_train import ROOT, run_main, weights
from test_transfer import sentences, small_task, write

TIMES = ("seconds", "latency_dense_ms", "latency_pruned_ms", "speedup", "args")
FLAGS = (
    "--steps 240 --prune_start 60 --prune_ramp 40 --finetune_steps 80 --gate_lr 0.4 "
    "--n_layer 2 --d_model 16 --sparsity 0.5 --transfer_start 50 --checkpoint_every 40"
).split()
TINY = "--steps 2 --finetune_steps 1 --sparsity 0 --n_layer 1 --n_head 1 --d_model 4".split()


def numbers(folder):
    """result.json without times; flags that do not matter for the numbers left out."""
    result = json.loads((Path(folder) / "result.json").read_text())
    return {k: v for k, v in result.items() if k not in TIMES}, loop.essential(result["args"])


def same(a, b):
    """The same result and, bit for bit, the same weights."""
    wa, wb = weights(a), weights(b)
    return numbers(a) == numbers(b) and wa.keys() == wb.keys() and all(torch.equal(wa[n], wb[n]) for n in wa)


def start(folder, *flags):
    line = [sys.executable, ROOT / "train.py", *FLAGS, "--out_dir", folder, *flags]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, folder, step):
    """Until the run's checkpoint has reached `step`, or the run has ended."""
    while process.poll() is None:
        if (folder / "checkpoint.pt").exists():
            try:
                if torch.load(folder / "checkpoint.pt", weights_only=True)["step"] >= step:
                    return
            except FileNotFoundError:
                pass  # the run has just ended
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_main(*FLAGS, "--out_dir", folder) == (0, "")
    return folder


def test_a_run_killed_in_every_phase_and_resumed_ends_as_if_it_had_not_been(tmp_path, undisturbed):
    """SIGKILL before the first checkpoint, then at a random moment of the dense, pruning and fine-tuning
    phases."""
    rng = random.Random(0)
    for moment in [0, rng.randrange(0, 60), rng.randrange(60, 160), rng.randrange(160, 200)]:
        process = start(tmp_path, "--resume")
        if moment:
            wait_for_step(process, tmp_path, moment)
        time.sleep(rng.random() * (0.05 if moment else 2))
        process.kill()
        process.wait()
    assert run_main(*FLAGS, "--out_dir", tmp_path, "--resume") == (0, "")
    assert same(tmp_path, undisturbed) and not (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "history.jsonl").read_text() == (undisturbed / "history.jsonl").read_text()


def test_what_a_kill_leaves_of_a_checkpoint_is_removed_by_the_next_run(tmp_path):
    tmp_path.joinpath("checkpoint.pt.tmp").write_bytes(b"half")
    assert run_main(*TINY, "--out_dir", tmp_path)[0] == 0
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_run_writes_a_checkpoint_says_so_and_goes_on(tmp_path, undisturbed):
    """Stopped by Ctrl-C, resumed, stopped by the signal of a batch system, resumed: as if it had not been."""
    for number, step in ((signal.SIGINT, 100), (signal.SIGTERM, 200)):
        process = start(tmp_path, "--resume", "--checkpoint_every", "100")
        wait_for_step(process, tmp_path, step)
        process.send_signal(number)
        error = process.communicate()[1]
        assert process.returncode == 130 and error.count("\n") == 1 and "--resume" in error
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] % 100  # written on demand
    assert run_main(*FLAGS, "--out_dir", tmp_path, "--resume") == (0, "") and same(tmp_path, undisturbed)


def test_a_resumed_run_with_a_parent_and_a_given_structure_ends_in_the_same_bits(tmp_path, monkeypatch):
    """Stopped in the dense phase, before the cut and after it; with another file as the structure it does
    not go on."""
    small = "--steps 60 --prune_start 10 --prune_ramp 20 --finetune_steps 20 --gate_lr 1"
    small += " --n_layer 2 --d_model 8 --sparsity 0.5"
    structure, real = tmp_path / "learned" / "result.json", loop.task_loss

    def go(name, *flags):
        words = [*small.split(), *map(str, flags), "--out_dir", str(tmp_path / name)]
        loop.train(loop.parse_args(words))

    go("parent", "--target", "reviews:film", "--sparsity", 0, "--steps", 30)
    go("learned")
    written = structure.read_text()
    flags = ["--init", tmp_path / "parent" / "pruned.pt", "--structure", structure, "--transfer_start", 0]
    go("whole", *flags)
    for stop in (7, 30, 50):

        def signalled(*args):
            if args[-2] == stop:
                loop.CAUGHT.append(signal.SIGTERM)
            return real(*args)

        monkeypatch.setattr(loop, "task_loss", signalled)
        with pytest.raises(KeyboardInterrupt):
            go(f"stopped at {stop}", *flags)
        loop.CAUGHT.clear()
        monkeypatch.setattr(loop, "task_loss", real)
        structure.write_text(written + "\n")
        with pytest.raises(loop.InputError, match="has structure file .*: use the same"):
            go(f"stopped at {stop}", *flags, "--resume")
        structure.write_text(written)
        go(f"stopped at {stop}", *flags, "--resume")
        assert same(tmp_path / "whole", tmp_path / f"stopped at {stop}")


def test_unusable_checkpoints_are_refused_with_what_to_do(tmp_path):
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 40)
    process.kill()
    process.wait()
    whole = (tmp_path / "checkpoint.pt").read_bytes()

    def refused(*flags):
        code, error = run_main(*FLAGS, "--out_dir", tmp_path, "--resume", *flags)
        assert code == 2 and error.count("\n") == 1
        return error

    error = refused("--lr", "0.5", "--dropout", "0.3")
    assert "has dropout 0.1, not 0.3; lr 0.001, not 0.5: use the same" in error
    assert "has seed 0, not 1: use the same" in refused("--seed", "1")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    for content in (whole[: len(whole) // 2], b"", (tmp_path / "foreign.pt").read_bytes()):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert "delete it, or run without --resume" in refused()
        assert (tmp_path / "checkpoint.pt").read_bytes() == content  # it is the user's to delete


# ---- numbers and disks that fail


def test_a_loss_that_is_not_finite_ends_the_run_with_step_term_and_hint(tmp_path):
    code, error = run_main(*FLAGS, "--lr", "1e8", "--out_dir", tmp_path)
    assert code == 2 and error.count("\n") == 1
    assert error.startswith("error: step ") and "loss_target is" in error and "--lr" in error
    assert not (tmp_path / "result.json").exists()


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    real = loop.task_loss

    def failing(net, gates, task, step, args):
        return real(net, gates, task, step, args) * (float("nan") if step == 130 else 1)

    monkeypatch.setattr(loop, "task_loss", failing)
    code, error = run_main(*FLAGS, "--out_dir", tmp_path)
    assert code == 2 and "step 130: smoothed_loss_target is nan" in error
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 120 and all(p.isfinite().all() for p in saved["net"].values())


def test_a_checkpoint_of_other_data_is_refused(tmp_path, monkeypatch):
    """Two labels swapped are other data, and so are rows in another order: a run depends on it."""
    rows = sentences(20)
    write(tmp_path / "task", "train.jsonl", rows)
    real = loop.task_loss
    monkeypatch.setattr(loop, "task_loss", lambda *a: real(*a) * (float("nan") if a[3] == 30 else 1))
    flags = ["--target", tmp_path / "task", "--aux", "none", "--n_target", 0, "--out_dir", tmp_path / "out"]
    flags = [*TINY, *flags, "--steps", 40, "--checkpoint_every", 20]
    assert run_main(*flags)[0] == 2 and (tmp_path / "out" / "checkpoint.pt").exists()
    monkeypatch.undo()
    first, second, *others = rows
    swapped = [first | {"label": second["label"]}, second | {"label": first["label"]}, *others]
    for changed in (swapped, rows[::-1]):
        write(tmp_path / "task", "train.jsonl", changed)
        code, error = run_main(*flags, "--resume")
        assert code == 2 and "has target data " in error


def test_a_finished_run_is_not_made_again_by_resuming_it(tmp_path):
    """A batch script that always says --resume must not delete a result."""
    flags = [*TINY, "--out_dir", tmp_path]
    assert run_main(*flags)[0] == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    code, error = run_main(*flags, "--resume")
    assert code == 2 and "is finished" in error
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """The disk fills up while the third checkpoint is written."""
    real, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "checkpoint.pt")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    code, error = run_main(*FLAGS, "--out_dir", tmp_path)
    assert code == 2 and error.count("\n") == 1 and "No space left" in error
    assert not list(tmp_path.glob("*.tmp"))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 80


def test_an_output_folder_that_vanishes_ends_the_run_with_one_line(tmp_path, monkeypatch):
    real = loop.evaluate

    def vanish(*args):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(loop, "evaluate", vanish)
    code, error = run_main(*FLAGS, "--out_dir", tmp_path / "out")
    assert code == 2 and error.count("\n") == 1 and "out" in error


def test_a_machine_without_git_keeps_the_finished_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, error = run_main(*TINY, "--out_dir", tmp_path / "out")
    assert (code, error) == (0, "")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["commit"] is None
    assert (tmp_path / "out" / "pruned.pt").exists()


def test_memory_that_cannot_be_had_is_one_line_even_without_words(tmp_path, monkeypatch):
    def nothing_left(*args):
        raise MemoryError

    monkeypatch.setattr(loop, "train", nothing_left)
    assert run_main(*TINY, "--out_dir", tmp_path) == (2, "error: out of memory\n")


# ---- hostile input


def ends_well(code, error, folder):
    """A correct run, or one clear line and no half-written output folder."""
    if code == 0:
        return (folder / "result.json").exists() and (folder / "pruned.pt").exists()
    return (
        code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and len(error) < 600
        and (not folder.exists() or not list(folder.iterdir()))
    )


NUMBERS = "-1 0 1 2 7 0.5 -0.5 nan inf -inf 1e400 1e3 ٣ 0x10 1_000".split()
VALUES = st.sampled_from([*NUMBERS, *"ten -- True é reviews: reviews:film : none".split(), "", "a b", "\n"])
SLOW = {"out_dir", "seeds", "baseline", "steps", "d_model", "n_layer"}  # or written elsewhere
NAMES = sorted(vars(loop.parse_args([])).keys() - SLOW)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=2))
def test_150_random_flags_end_in_a_run_or_in_one_line(flags):
    with tempfile.TemporaryDirectory() as folder:
        words = [word for name, value in flags for word in (f"--{name}", value)]
        assert ends_well(*run_main(*TINY, "--out_dir", f"{folder}/out", *words), Path(folder) / "out")


TEXT = st.sampled_from(
    ["a b c", "d e", "", " ", "\x00", "x" * 70000, "é ß 漢字", "\U0001f600", "<pad>", "a\nb", "?!"]
)
LABEL = st.sampled_from(["", "maybe", 0, 1, -1, 2**40, None, 0.5, True, False, ["a"], {"b": 1}])
GOOD = st.builds(lambda text, label: {"text": text, "label": label}, TEXT, st.sampled_from(["yes", "no"]))
ODD = st.one_of(
    st.builds(lambda label: {"text": "odd", "label": label}, LABEL),
    st.sampled_from(
        [
            {},
            {"text": "only text"},
            {"label": "yes"},
            {"text": 5, "label": "no"},
            {"text": ["a"], "label": "no"},
            {"text": None, "label": "yes"},
            {"text": "a", "label": "no", "id": 3},
            {"text": "a", "label": "no", "note": "b"},
        ]
    ),
)
RAW = st.sampled_from(
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"\x00\x00",
        b'{"text": "\xff", "label": "yes"}',
        b"\xef\xbb\xbf{}",
        b'{"text": "a", "label": "yes"} {"text": "b"}',
        b'{"text": NaN, "label": "no"}',
        b"text,label",
        b"a,yes",
        b"a,b,c,d",
        b'"open quote',
        b"\xff\xfe,yes",
    ]
)
KIND = st.sampled_from(["train.jsonl", "data.csv", "train.json"])


def as_line(row, kind):
    """A row as a line of JSON or of CSV; bytes are taken as they are."""
    if isinstance(row, bytes):
        return row
    if kind.endswith("csv"):
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator="").writerow([row.get("text"), row.get("label")])
        return out.getvalue().encode()
    return json.dumps(row).encode()


ENDS = Counter()


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.lists(GOOD, min_size=4, max_size=12),
    st.lists(st.one_of(ODD, ODD, RAW), max_size=2),
    st.randoms(use_true_random=False),
    KIND,
    st.sampled_from(["good", "none", "same"]),
    st.booleans(),
)
def test_120_random_files_end_in_a_run_or_in_one_line(good, odd, rng, kind, aux, alone):
    """As target and as auxiliary task, as a file and as a folder, with and without other, good splits."""
    rows = [*good, *odd]
    rng.shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        os.mkdir(f"{folder}/task")
        header = [b"text,label"] if kind.endswith("csv") else []
        Path(folder, "task", kind).write_bytes(
            b"\n".join([*header, *(as_line(row, kind) for row in rows)]) + b"\n"
        )
        if not alone and kind.startswith("train"):
            write(Path(folder, "task"), f"test.{kind.split('.')[1]}", sentences(6))
        other = small_task(Path(folder, "good"), train=8, validation=4, test=4)
        task = f"{folder}/task/{kind}" if alone else f"{folder}/task"
        target, second = (other, task) if aux == "good" else (task, task if aux == "same" else "none")
        code, error = run_main(
            *TINY, "--out_dir", f"{folder}/out", "--target", target, "--aux", second, "--n_target", 0
        )
        ENDS[code] += 1
        assert ends_well(code, error, Path(folder) / "out"), (rows, error)


def test_the_random_files_were_neither_all_refused_nor_all_accepted():
    """Both ends of the test above were really reached."""
    if not ENDS:
        pytest.skip("the test above did not run")
    assert ENDS[0] >= 20 and ENDS[2] >= 20


@pytest.mark.parametrize(
    "rows, test",
    [
        (sentences(20) + [{"text": "word " * 2_000_000, "label": "yes"}], sentences(5)),
        (sentences(20), [{"text": "a", "label": "never seen"}, *sentences(3)]),
        (sentences(20), [{"text": "quite other words", "label": "yes"}, {"text": "", "label": "no"}]),
        (sentences(1) * 10 + sentences(2) * 10, sentences(5)),
        ([{"text": "", "label": str(i % 2)} for i in range(20)], [{"text": "", "label": "0"}]),
    ],
    ids=[
        "10 MB line",
        "label only in test",
        "unknown words and empty text",
        "duplicates",
        "only empty texts",
    ],
)
def test_unusual_but_valid_data_end_in_a_correct_run(tmp_path, rows, test):
    write(tmp_path / "task", "train.jsonl", rows)
    write(tmp_path / "task", "validation.jsonl", test)
    write(tmp_path / "task", "test.jsonl", test)
    flags = [*TINY, "--target", tmp_path / "task", "--aux", tmp_path / "task", "--n_target", 0]
    code, error = run_main(*flags, "--aux", "none", "--out_dir", tmp_path / "out")
    assert (code, error) == (0, "")
    assert 0 <= json.loads((tmp_path / "out" / "result.json").read_text())["test_accuracy"] <= 1
    code, error = run_main(
        *flags, "--out_dir", tmp_path / "with_itself"
    )  # the target equals the auxiliary task
    assert code == 0 or "held out" in error


def test_nothing_phones_home(tmp_path):
    """The built-in path and local files run with every socket refused."""
    local = small_task(tmp_path / "task", train=20, validation=5, test=5)
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train; train.main()\n"
        f"sys.argv += ['--target', {str(local)!r}, '--aux', {str(local)!r}, '--n_target', '0']; train.main()"
    )
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    line = [sys.executable, "-c", code, *TINY, "--out_dir", tmp_path / "out"]
    done = subprocess.run(line, capture_output=True, text=True, env=online)
    assert done.returncode == 0 and done.stdout.count("macro-F1") == 2, done.stderr


# ---- determinism and several processes


def test_two_processes_compute_what_one_does(tmp_path):
    """Half of every batch each, noise tied to the example: parameters agree to 1e-5 after 40 steps of all
    three phases, in which gates are sampled and cut.

    The weights move by up to 2e-4 meanwhile. A larger step or many more let rounding grow: Adam divides
    a gradient by its own size, and where it is nearly 0 the order of a sum decides about the direction.
    """
    flags = (
        "--steps 40 --prune_start 8 --prune_ramp 16 --finetune_steps 12 --gate_lr 2 --n_layer 2 "
        "--d_model 16 --sparsity 0.5 --transfer_start 4 --coupling project --lr 3e-5"
    ).split()
    assert run_main(*flags, "--out_dir", tmp_path / "one") == (0, "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    line = [*torchrun, ROOT / "train.py", *flags, "--out_dir", tmp_path / "two"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("macro-F1") == 1  # one process reports
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)
