"""Claims about the second task and about data (transfer.py)."""

import csv
import hashlib
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch

from model import CLS, PAD, SPECIAL, UNK, Config, GatedTransformer, normalise, words
from transfer import BLAME, PRAISE, Examples, InputError, aux_weight_at, batch_order, couple, epoch_order
from transfer import limited_subset, prepare, read_task, reviews, transferred

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS, KINDS = ["train", "validation", "test"], [".jsonl", ".csv", ".parquet"]


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentences(n, start=0, label=lambda i: "yes" if i % 2 else "no"):
    return [{"text": f"sentence number {i} of many", "label": label(i)} for i in range(start, start + n)]


def small_task(folder, **sizes):
    """A data set folder with the splits and sizes asked for, all texts different."""
    start = 0
    for split, n in sizes.items():
        write(folder, f"{split}.jsonl", sentences(n, start))
        start += n
    return str(folder)


def save(path, rows):
    """Rows in the kind of file that the name says."""
    if path.suffix == ".jsonl":
        write(path.parent, path.name, rows)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def lines(path, *content, encoding="utf-8"):
    path.write_bytes("".join(line + "\n" for line in content).encode(encoding))
    return path


def task(spec, text_columns=("text",), label_column="label", flag=""):
    """The splits of a task as they were read, lists of (tuple of texts, class name), and the notes."""
    splits, *_, notes = read_task(str(spec), list(text_columns), label_column, flag)
    return splits, notes


def refused(match, *named, **flag):
    """The task is refused, with one line that matches."""
    with pytest.raises(InputError, match=match) as error:
        task(*named, **flag)
    assert "\n" not in str(error.value)


def data(target, aux=None, columns=("text",), aux_columns=("text",), **settings):
    """Everything a run reads, from the names of its tasks."""
    settings = {"n_target": 0, "max_length": 64, "vocab_size": 1000, "seed": 0, **settings}
    aux = (str(aux), list(aux_columns), "label") if aux else None
    return prepare((str(target), list(columns), "label"), aux, **settings)


def texts_of(examples, vocab):
    """The texts of Examples, as far as they were read, as a list of strings."""
    return [" ".join(vocab[token] for token in ids) for ids in examples.ids]


# ---- when, what, how


def test_aux_weight_is_on_exactly_in_its_window():
    assert [aux_weight_at(s, 0.5, 3, 6) for s in range(8)] == [0, 0, 0, 0.5, 0.5, 0.5, 0, 0]


def test_transferred_names_what_the_auxiliary_gradient_may_touch():
    """Its own classifier always, the target's never; of the shared parameters what --transfer says."""
    shared, gates = {"token.weight": 1, "blocks.0.up.weight": 2}, {"log_alpha": 3}
    own = {"classifier.auxiliary.bias": 4}
    everything = shared | gates | own | {"classifier.target.bias": 5}
    assert transferred(everything, "weights") == shared | own
    assert transferred(everything, "gates") == gates | own
    assert transferred(everything, "both") == shared | gates | own


@pytest.mark.parametrize("seed", range(10))
def test_projection_never_points_against_the_target_and_equals_the_sum_when_they_agree(seed):
    """The auxiliary part of the update has inner product >= 0 with the target gradient (1e-4: float32
    rounding). What only one task touches passes unchanged."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda **shapes: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    flat = lambda named: torch.cat([named[name].flatten() for name in "abc"])
    g_target, g_aux = draw(a=(5, 4), b=(7,), c=(), target=(3,)), draw(a=(5, 4), b=(7,), c=(), aux=(3,))
    summed, projected = (couple(g_target, g_aux, how) for how in ("sum", "project"))
    for update in (summed, projected):
        assert update["target"].equal(g_target["target"]) and update["aux"].equal(g_aux["aux"])
    torch.testing.assert_close(flat(summed), flat(g_target) + flat(g_aux))
    dot, aux_part = flat(g_target) @ flat(g_aux), flat(projected) - flat(g_target)
    assert aux_part @ flat(g_target) > -1e-4
    against = min(dot, 0) / flat(g_target).square().sum()  # by Gram-Schmidt, if they disagree
    torch.testing.assert_close(aux_part, flat(g_aux) - against * flat(g_target), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["sum", "project"])
def test_coupling_with_nothing_is_what_is_there(how):
    """With --transfer gates nothing is shared outside the pruning phase; a task may also be silent."""
    g = torch.tensor([1.0, -2.0, 3.0])
    assert couple({}, {}, how) == {} and couple({"a": g}, {}, how)["a"].equal(g)
    assert couple({}, {"a": g}, how)["a"].equal(g)
    assert couple({"a": torch.zeros(3)}, {"a": g}, how)["a"].equal(g)


# ---- the built-in task


def test_built_in_sentences_are_unique_balanced_and_the_same_every_time():
    for domain in ("restaurant", "film"):
        splits = reviews(domain)
        rows = [row for split in SPLITS for row in splits[split]]
        assert len({text for text, _ in rows}) == len(rows) == 8500 and splits == reviews(domain)
        assert 0.48 < np.mean([label == "positive" for _, label in rows]) < 0.52
    assert task("reviews:film")[0]["train"][0] == (("the actor was not masterful",), "negative")


def test_the_label_is_the_polarity_of_the_main_clause():
    """Parse every sentence again, independently: drop the clause of the conjunction, look up the adjective,
    count negations."""
    polarity = {word: 1 for listed in PRAISE.values() for word in listed.split()}
    polarity |= {word: -1 for listed in BLAME.values() for word in listed.split()}
    for text, label in reviews("restaurant")["train"]:
        (main,) = [c for c in text.split(", ") if not c.startswith(("although", "though", "even", "while"))]
        *start, opinion = main.split()
        sign = polarity[opinion] * (-1 if {"not", "wasn't", "hardly"} & set(start) else 1)
        assert label == ("positive" if sign > 0 else "negative")


def test_200_sentences_do_not_show_most_of_what_the_opinion_words_mean():
    """At most half of them occur twice among 200 labelled sentences; the auxiliary task has all it shares."""
    opinions = {w for listed in (*PRAISE.values(), *BLAME.values()) for w in listed.split() if "-" not in w}
    count = Counter(w for text, _ in reviews("restaurant")["train"][:200] for w in words(text))
    assert sum(count[w] >= 2 for w in opinions) < len(opinions) / 2
    film = {w for text, _ in reviews("film")["train"] for w in words(text)}
    assert {*PRAISE["shared"].split(), *BLAME["shared"].split()} <= film


# ---- what a task is


def test_a_folder_has_one_file_a_split_of_any_kind_and_others_are_named_as_not_read(tmp_path):
    for i, file in enumerate(["train.csv", "validation.jsonl", "test.parquet"]):
        save(tmp_path / file, sentences(3, 3 * i))
    for other in ("extra.csv", "dev.jsonl", "train-00001.parquet", "README.md", "train.txt"):
        lines(tmp_path / other, "not read")
    splits, notes = task(tmp_path)
    for i, split in enumerate(SPLITS):
        assert [texts for texts, _ in splits[split]] == [(row["text"],) for row in sentences(3, 3 * i)]
    assert notes == [f"not read of {tmp_path}: dev.jsonl, extra.csv, train-00001.parquet"]
    assert task(tmp_path / "test.parquet") == ({"train": splits["test"]}, [])  # a file is a train split
    refused("two files for one split", save(tmp_path / "test.csv", sentences(3)).parent)


def test_what_is_no_task_is_refused_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("here.csv"), sentences(9))
    for name in ("", "none", "../none", "none.jsonl", "a/none.csv", "a/b/c", "x [1]", "here.csv:part"):
        refused("no such file or folder: '[^']*'$", name)
    refused("no train split", ".")
    refused("only .jsonl, .csv, .parquet", lines(Path("here.tsv"), "text\tlabel"))
    refused("no such file or folder: 'reviews:book'", "reviews:book")
    for path in (lines(Path("none.jsonl"), ""), lines(Path("a.csv"), "text,label"), lines(Path("b.csv"))):
        refused(f"{path} is empty", path)


def pairs(label):
    """A data set as GLUE's are: two texts, and classes by number with their names."""
    rows = {"one": [f"one {i}" for i in label], "two": [f"two {i}" for i in label], "label": label}
    return datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["same", "other"]))


def test_a_data_set_of_the_hub_has_classes_by_name_and_splits_of_exactly_three_names(monkeypatch):
    """Its configuration is named after a colon; a class that is missing is refused with its row."""
    hub = {("owner/name", "rte"): {"train": pairs([0, 1]), "dev": pairs([0]), "validation": pairs([1])}}
    hub["owner/name", "rte"]["test"] = pairs([-1, -1])
    hub["owner/name", None], hub["o/n", None] = {"train": pairs([0, None])}, {"train": pairs([0, 1, -1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config=None: hub[name, config])
    splits, notes = task("owner/name:rte", ["one", "two"])
    assert splits["train"] == [(("one 0", "two 0"), "same"), (("one 1", "two 1"), "other")]
    assert splits["validation"] == splits["train"][1:] and list(splits) == SPLITS[:2]
    no_labels = "test of owner/name:rte has no labels: it is not read"
    assert notes == ["not read of owner/name:rte: dev", no_labels]
    refused("owner/name:other.* hub", "owner/name:other")
    refused("one, two, label.* --text_columns", "owner/name:rte")
    refused(r"train of owner/name, row 2\b", "owner/name", ["one"])
    refused(r"train of o/n, row 3\b", "o/n", ["one"])


def test_a_split_whose_labels_are_all_minus_one_has_none_and_a_tenth_of_train_stands_for_it(monkeypatch):
    label = {"train": lambda i: i % 2, "validation": lambda i: -(i % 2), "test": lambda i: -1}
    hub = {split: datasets.Dataset.from_list(sentences(100, label=label[split])) for split in SPLITS}
    monkeypatch.setattr(datasets, "load_dataset", lambda *spec: hub)
    read = data("owner/name")
    assert "test of owner/name has no labels: it is not read" in read.notes
    assert read.labels == {"target": ["-1", "0", "1"]} and len(read.test.label) == 10
    assert "tenth of train" in read.record["target"]["splits"]["test"]


# ---- columns, texts and labels


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_text_and_label_unless_flags_name_them(tmp_path, kind):
    """A missing one ends the run with a line that lists the columns and names the flags of its task."""
    rows = [{"question": f"what {i}", "coarse": i % 2, "fine": f"f{i % 3}"} for i in range(4)]
    path = save(tmp_path / f"mine{kind}", rows)
    assert task(path, ["fine", "question"], "coarse")[0]["train"][3] == (("f0", "what 3"), "1")
    refused("question, coarse, fine.* text, label.* --text_columns and --label_column", path)
    refused("question, coarse, fine.* --aux_text_columns and --aux_label_column", path, flag="aux_")
    refused("question, coarse, fine.* label", path, ["question"])
    refused("question, coarse, fine.* Fine", path, ["question"], "Fine")


def test_the_label_is_never_a_text(tmp_path):
    refused("label", save(tmp_path / "a.csv", sentences(9)), ["text", "label"])


def test_labels_are_strings_integers_and_booleans_stripped_and_composed(tmp_path):
    """An accent may be written in two ways: they are one class. Texts are left as they are."""
    values = ["x", " x\t", "e\u0301 ", "\u00e9", "True", "1.0", 7, -7, True, False]
    names = ["x", "x", "\u00e9", "\u00e9", "True", "1.0", "7", "-7", "true", "false"]
    rows = [{"text": " As It Is ", "label": value} for value in values]
    read = task(save(tmp_path / "a.jsonl", rows))[0]["train"]
    for some in (rows[:6], rows[6:8], rows[8:]):  # a column has one type
        read += task(save(tmp_path / "a.parquet", some))[0]["train"]
    assert read == [((" As It Is ",), name) for name in names * 2]


@pytest.mark.parametrize("column, value", [
    *((column, v) for column in ("text", "label") for v in (0.5, 1.0, float("nan"), None, "", " \t ", ["x"])),
    ("label", {"a": 1}), ("text", 1), ("text", True),
])  # fmt: skip
def test_any_other_text_or_label_is_refused_with_file_and_row(tmp_path, column, value):
    good, bad = {"text": "a", "label": "x"}, {"text": "a", "label": "x", column: value}
    refused(r"mine.jsonl, line 3\b", save(tmp_path / "mine.jsonl", [good, good, bad, good]))
    refused(r"mine.parquet, row 1\b", save(tmp_path / "mine.parquet", [bad]))
    if isinstance(value, str):
        refused(r"mine.csv, line 4\b", save(tmp_path / "mine.csv", [good, good, bad]))


# ---- files


@pytest.mark.parametrize("line", [
    '{"text": "a", "label": }', '{"text": "a", "label": "x"', '{"text": "a", "label": ' + 5000 * "9" + "}",
    "[" * 100_000, '["a", "x"]', "null", "1", '{"text": "a"}',
])  # fmt: skip
def test_a_line_of_json_that_is_no_row_is_named(tmp_path, line):
    """Empty lines are no rows, but they count."""
    good = '{"text": "a", "label": "x"}'
    refused(r"a.jsonl, line 3\b", lines(tmp_path / "a.jsonl", good, " ", line, good))


@pytest.mark.parametrize("line, reason", [
    ("a", "cells"), ("the soup, a delight,x", "cells"), (",x", "text"), ("a,", "label"), ('a,"x', ""),
    ('"a"b,', ""), ("text,label", "header"), ("\ufefftext,label", "header"), ('\ufeff"text",label', "header"),
])  # fmt: skip
def test_a_line_of_csv_that_is_no_row_is_named(tmp_path, line, reason):
    """Files joined with cat have the header once more, some with a mark before it."""
    refused(rf"a.csv, line 4\b.*{reason}", lines(tmp_path / "a.csv", "text,label", '"b\nc",x', line))


def test_a_header_is_refused_that_names_a_column_twice_or_uses_another_separator(tmp_path):
    refused(r"a.csv, line 1\b.*twice", lines(tmp_path / "a.csv", "text,label,text", "a,x,b"))
    for separator in ";\t|":
        header = f"text{separator}label"
        refused(r"line 2\b.*text.label.*_columns", lines(tmp_path / "a.csv", header, f"a{separator}x"))
        refused(r"line 2\b.*separated by commas", lines(tmp_path / "a.csv", header, f"a, or b{separator}x"))


def test_cells_of_a_csv_are_names_and_texts_as_they_are_written(tmp_path):
    names = ["01", "1", "1.0", "1e2", "100", "true", "True", "NA", "null", "None", "nan", "-1"]
    path = lines(tmp_path / "a.csv", "text,label", *(f"{name},{name}" for name in names))
    assert task(path)[0]["train"] == [((name,), name) for name in names]


@pytest.mark.parametrize("names", [["false", "mixture", "true"], ["01", "02", "1A"]])
def test_a_class_has_the_same_name_in_every_file_of_a_task(tmp_path, names):
    """Test files that hold only some of the classes, which look like other types, have the same ones."""
    for split, n in zip(SPLITS, (3, 2, 2)):
        save(tmp_path / f"{split}.csv", [{"text": f"a {name}", "label": name} for name in names[:n] * 20])
    read = data(tmp_path)
    assert read.labels["target"] == names
    assert texts_of(read.test, read.vocab) == [f"a {names[i]}".lower() for i in read.test.label]


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_kinds_of_file_say_the_same(tmp_path, kind):
    """With commas, quotes, ends of lines and a megabyte in a cell; with a mark; with the lines of Windows."""
    texts = ['say "yes", or', "two\nlines", "\u0939\u093f\u0928\u094d\u0926\u0940 \u2028", "long " * 2**18]
    path = save(tmp_path / f"a{kind}", [{"text": text, "label": f"l{i}"} for i, text in enumerate(texts)])
    for mark in (b"", b"\xef\xbb\xbf") if kind != ".parquet" else (b"",):
        path.write_bytes(mark + path.read_bytes())
        assert task(path)[0]["train"] == [((text,), f"l{i}") for i, text in enumerate(texts)]
    if kind != ".parquet":
        content = save(path, sentences(2)).read_bytes().replace(b"\r", b"")
        path.write_bytes(content.replace(b"\n", b"\r\n") + b"\r\n")
        assert [name for _, name in task(path)[0]["train"]] == ["no", "yes"]


@pytest.mark.parametrize("encoding, line", [("latin-1", 2), ("cp1252", 2), ("utf-16", 1)])
def test_a_file_that_is_not_utf_8_is_named_with_the_line(tmp_path, encoding, line):
    for file, *content in (["a.csv", "text,label", "é,x"], ["a.jsonl", '{"text": "a", "label": 1}', '"é"']):
        refused(rf"{file}, line {line}\b.*UTF-8", lines(tmp_path / file, *content, encoding=encoding))


def test_a_broken_parquet_file_is_refused(tmp_path):
    """Cut off, empty, other bytes; and strings that are not UTF-8."""
    path = save(tmp_path / "a.parquet", sentences(30))
    for content in (path.read_bytes()[:500], b"", b"PAR1 and no more"):
        path.write_bytes(content)
        refused("a.parquet", path)
    latin = pyarrow.array([b"a", b"\xe9"]).view("string")
    pyarrow.parquet.write_table(pyarrow.table({"text": latin, "label": ["x", "y"]}), path)
    refused("a.parquet", path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_replaced_under_the_same_path_size_and_time_is_read_anew(tmp_path, kind):
    for odd in ("yes", "not"):
        names = [odd if i % 2 else "yesnot".replace(odd, "") for i in range(20)]
        os.utime(save(tmp_path / f"train{kind}", sentences(20, label=names.__getitem__)), (1e9, 1e9))
        assert [name for _, name in task(tmp_path)[0]["train"]] == names


# ---- splits


def tenth(texts):
    """By hand: of N texts those with the smallest hashes, duplicates together, until they are a tenth of N;
    a text is passed over by which they would be more than a fifth."""
    value = lambda text: int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    count, taken = Counter(map(normalise, texts)), Counter()
    for text in sorted(count, key=value):
        if taken.total() < len(texts) / 10 and taken.total() + count[text] <= len(texts) // 5:
            taken[text] = count[text]
    return taken


@pytest.mark.parametrize("times", [1, 40])
def test_missing_splits_are_a_tenth_of_train_each_by_the_hash_of_the_normalised_text(tmp_path, times):
    """First for test, then of what is left for validation. Case and spaces make no other text; the text whose
    hash is the smallest may be too frequent."""
    texts = [row["text"] for row in sentences(60)] + [f" SENTENCE number  {i} of many" for i in range(60)]
    texts += list(tenth(texts))[:1] * times
    rows = [{"text": text, "label": f"{i % 2} {normalise(text)}"} for i, text in enumerate(texts)]
    read = data(save(tmp_path / "a.jsonl", rows), max_length=5)
    left = [text for text in texts if normalise(text) not in tenth(texts)]
    train = Counter(map(normalise, left)) - tenth(left)
    for split, expected in zip(SPLITS, (train, tenth(left), tenth(texts))):
        names = [read.labels["target"][i] for i in getattr(read, split).label]
        assert Counter(name[2:] for name in names) == expected
    assert sum("tenth of train" in note for note in read.notes) == 2


def test_the_same_texts_are_in_the_same_split_whatever_else_differs(tmp_path):
    """Order of rows, max_length, seed, subset and vocabulary; the class of a text tells which text it is."""
    rows = [{"text": f"some words {i}", "label": f"class {i}"} for i in range(300)]

    def made(rows, **settings):
        read = data(save(tmp_path / "a.jsonl", rows), **settings)
        return [{read.labels["target"][i] for i in split.label} for split in (read.validation, read.test)]

    validation, test = made(rows)
    assert len(validation) == 27 and len(test) == 30 and not validation & test
    assert made(rows[::-1], max_length=2, seed=1, n_target=50, vocab_size=9) == [validation, test]


def test_too_few_texts_or_classes_are_refused(tmp_path):
    few = save(tmp_path / "few.jsonl", sentences(2) * 10)
    one = save(tmp_path / "one.jsonl", sentences(30, label=lambda i: -1))
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    cases = [("too few", 0, few), ("too few", 0, save(tmp_path / "single.jsonl", sentences(1)))]
    cases += [("two classes", 0, one), ("two classes", 0, target, one)]
    cases += [("--aux_text_columns", 0, target, save(tmp_path / "other.csv", [{"a": "b"}]))]
    for reason, n, *tasks in [*cases, *((f"n_target {n}: of 20", n, target) for n in (1, 21))]:
        with pytest.raises(InputError, match=reason):
            data(*tasks, n_target=n)


# ---- limited data


def test_limited_subset_is_stratified_nested_and_seeded():
    label = np.random.default_rng(0).choice(4, size=3000, p=[0.6, 0.3, 0.09, 0.01])
    before = np.zeros(len(label), dtype=bool)
    for n in (4, 10, 50, 100, 200, 1000, 3000):
        keep = limited_subset(label, n, seed=7)
        assert keep.sum() == n and (keep | ~before).all()  # nested
        share = np.bincount(label[keep], minlength=4) - n * np.bincount(label) / len(label)
        assert (np.abs(share) < 4).all() and (np.bincount(label[keep], minlength=4) > 0).all()
        before = keep
    assert (limited_subset(label, 100, 7) == limited_subset(label, 100, 7)).all()
    assert (limited_subset(label, 100, 7) != limited_subset(label, 100, 8)).any()


def test_auxiliary_examples_of_the_held_out_splits_are_dropped_and_counted(tmp_path):
    """Case and spaces make no other text; a word beyond max_length does. Those of training may stay."""
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)  # sentences 0-19, 20-24, 25-29
    texts = "SENTENCE  number 22 of many", "sentence number 23 of many more"
    write(tmp_path / "a", "train.jsonl", sentences(40, 10) + [{"text": t, "label": "no"} for t in texts])
    read = data(target, tmp_path / "a", max_length=3)
    kept = [f"sentence number {i}" for i in (*range(10, 20), *range(30, 50), 23)]
    assert texts_of(read.aux, read.vocab) == kept
    assert "auxiliary texts dropped, because they are held out: 11" in read.notes


def test_a_pair_is_held_out_as_a_pair_whatever_its_words_are_when_joined(tmp_path):
    """A pair that is parted elsewhere is another text, and so is a single text of the same words."""
    make = lambda *texts: [dict(zip("ab", (t.format(i) for t in texts)), label=i % 2) for i in range(9)]
    for split in SPLITS:
        write(tmp_path / "t", f"{split}.jsonl", make("one {}", "two three"))
    same = {"a": " ONE  0", "b": "two three", "label": 0}  # the only one to be dropped
    for rows, columns in ((make("one {} two", "three") + [same], "ab"), (make("one {} two three"), "a")):
        path = save(tmp_path / "a.jsonl", rows)
        assert len(data(tmp_path / "t", path, "ab", columns).aux.label) == 9


def test_of_a_pair_the_longer_text_is_cut_first(tmp_path):
    """Of equally long ones the second; a pair of 6 tokens has 5 words and a mark, which no text can write."""
    cases = {
        ("a b c d e f", "x y"): "a b c [SEP] x y", ("a b", "u v w x y z"): "a b [SEP] u v w",
        ("a b c d e f", "u v w x y z"): "a b c [SEP] u v", ("a [SEP]", "u"): "a [ sep ] [SEP] u",
    }  # fmt: skip
    rows = [{"a": a, "b": b, "label": i % 2} for i, (a, b) in enumerate(cases)]
    for split in SPLITS:
        save(tmp_path / f"{split}.csv", rows)
    read = data(tmp_path, columns="ab", max_length=6)
    assert texts_of(read.train, read.vocab) == list(cases.values())


# ---- vocabulary


def test_the_vocabulary_is_that_of_a_count_by_hand(tmp_path):
    """The target's training words come first, then a parent's, then the auxiliary task's, which fill what is
    left; each by frequency, equally frequent ones in the order in which they occur in whole train files."""
    rng = np.random.default_rng(0)
    make = lambda names: [{"text": " ".join(rng.choice(names, 4)), "label": i % 2} for i in range(100)]
    rows, more = make([f"w{i}" for i in range(60)]), make([f"w{i}" for i in range(30, 90)])
    tasks = save(tmp_path / "t.jsonl", rows), save(tmp_path / "a.jsonl", more)
    first = list(dict.fromkeys(" ".join(row["text"] for row in rows + more).split()))

    def by_frequency(examples):
        count = Counter(" ".join(texts_of(examples, read.vocab)).split())
        return sorted(count, key=lambda word: (-count[word], first.index(word)))

    read, alone, other = (data(*t, n_target=20, seed=s) for t, s in ((tasks, 0), (tasks[:1], 0), (tasks, 1)))
    own = by_frequency(read.train)
    full = list(dict.fromkeys([*SPECIAL, *own, *by_frequency(read.aux)]))
    assert read.vocab == full and alone.vocab == [*SPECIAL, *own] and len(own) < 50 < len(full)
    assert texts_of(read.train, full) == texts_of(alone.train, full) and other.vocab != full  # subsets
    assert data(*tasks, n_target=20, vocab_size=50).vocab == full[:50]
    vocab = [*SPECIAL, *(f"z{i}" for i in range(60))]
    parent = GatedTransformer(Config(63, 9, 8, 4, [2], [1]), vocab, {"target": ["x"]})
    assert data(*tasks, n_target=20, vocab_size=50, parent=parent).vocab == [*SPECIAL, *own, *vocab[3:]]


LETTERS = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
PIECES = ["sentence", "number", "of", "man", "often", "un", "##used", "zebra", "##bra"]


def bert_task(folder, **settings):
    """A BERT, and a target and an auxiliary task that are read by its word pieces."""
    vocab = [*SPECIAL, CLS, *PIECES, *LETTERS]
    bert = GatedTransformer(Config(len(vocab), 32, 8, 4, [2], [1], bert=True), vocab, {"target": ["x"]})
    small_task(folder / "t", train=20, validation=5)
    write(folder / "t", "test.jsonl", [{"text": "A zebra, sentence 7", "label": i % 2} for i in range(9)])
    write(folder / "a", "train.jsonl", sentences(20, 50) + [{"text": "often unof", "label": "no"}] * 99)
    return bert, data(folder / "t", folder / "a", parent=bert, **settings)


def test_of_a_berts_vocabulary_stays_what_occurs_in_training_and_single_characters(tmp_path):
    """Training texts are read as by the whole vocabulary; an unseen word in smaller pieces."""
    bert, read = bert_task(tmp_path)
    assert read.vocab[:3] == SPECIAL and len(read.vocab) == len(set(read.vocab))
    assert set(read.vocab) == {*SPECIAL, CLS, *LETTERS, "sentence", "number", "of", "man", "often", "un"}
    for examples, rows in ((read.train, sentences(20)), (read.aux, sentences(20, 50))):
        expected = [" ".join([CLS, *bert.tokenizer(row["text"]), "[SEP]"]) for row in rows]
        assert texts_of(examples, read.vocab)[:20] == expected
    assert bert.tokenizer("zebra,") == ["zebra", "[UNK]"]  # this vocabulary has no comma
    assert texts_of(read.test, read.vocab)[0] == "[CLS] a z ##e ##b ##r ##a [UNK] sentence 7 [SEP]"


def test_a_part_of_the_training_examples_has_a_note(tmp_path):
    notes = data(small_task(tmp_path / "t", train=40, validation=5, test=5), n_target=20).notes
    assert "20 of 40 training examples are used; all: --n_target 0" in notes


def test_of_an_auxiliary_task_only_train_is_read(tmp_path):
    """A test split without labels, as many have, stops no run."""
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    write(tmp_path / "a", "train.jsonl", sentences(20, 50))
    write(tmp_path / "a", "test.jsonl", [{"text": "no label here"}])
    assert len(data(target, tmp_path / "a").aux.label) == 20


def test_the_size_of_a_berts_vocabulary_is_capped_by_frequency(tmp_path):
    """The pieces of several characters are: the target's come first, however frequent those of the auxiliary
    task are."""
    several = lambda vocab: [piece for piece in vocab if len(piece.strip("#")) > 1 and piece[0] != "["]
    for size, n in ((1000, 6), (10, 4), (7, 2)):
        bert, read = bert_task(tmp_path, vocab_size=size)
        assert several(read.vocab) == ["sentence", "number", "of", "man", "often", "un"][:n]
        assert {*SPECIAL, CLS, *LETTERS} < set(read.vocab)


# ---- notes and record


def test_each_of_these_surprises_has_a_note_and_good_data_have_none(tmp_path):
    good = {"train": sentences(300), "validation": sentences(100, 400), "test": sentences(120, 500)}
    train, test = good["train"], good["test"]

    def notes(max_length=5, n_target=0, **splits):
        for split, rows in (good | splits).items():
            write(tmp_path, f"{split}.jsonl", rows)
        return data(tmp_path, n_target=n_target, max_length=max_length).notes

    assert notes() == []
    no = [{"text": f"SENTENCE  number {i} of many", "label": "no"} for i in (0, 2, 2)]
    for expected, change in (
        ("1 classes have no training", {"test": test + [{"text": "sentence number 9", "label": "maybe"}]}),
        ("30 classes have", {"train": sentences(300, label=lambda i: f"{i % 30}"), "n_target": 2}),
        ("3 of the test texts also occur", {"test": test + no}),
        ("100% of the training texts are longer than max_length", {"max_length": 4}),
        ("only 9 validation and 99 test", {"validation": test[:9], "test": test[:99]}),
        ("99.2% of the test texts are of", {"test": sentences(120, 500, lambda i: ["yes", "no"][i > 500])}),
        ("100% of the test words", {"test": [r | {"text": r["text"].replace(" ", "")} for r in test]}),
        ("differ only by case: Yes, yes", {"train": [train[1] | {"label": "Yes"}, *train[2:]]}),
        ("2 texts occur with more than one label", {"train": train + [row | {"label": "yes"} for row in no]}),
    ):
        assert any(expected in note for note in notes(**change)), (expected, notes(**change))


def test_the_record_describes_both_tasks_and_can_be_written_as_json(tmp_path):
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    aux = small_task(tmp_path / "a", train=40)
    record = json.loads(json.dumps(data(target, aux, n_target=10, max_length=4).record))
    about, auxiliary = record["target"], record["auxiliary"]
    assert about["text_columns"] == ["text"] and about["label_column"] == "label"
    assert list(about["splits"]) == SPLITS and all(target in source for source in about["splits"].values())
    assert about["examples"] == {"train": 10, "validation": 5, "test": 5}
    assert about["labels"] == {"no": 5, "yes": 5}  # of the subset
    assert auxiliary["examples"] == {"train": 30} and auxiliary["labels"] == {"no": 15, "yes": 15}
    assert about["first"] in [[row["text"], row["label"]] for row in sentences(20)]
    assert record["unknown"] == {"train": 0.0, "test": 0.25}


def test_thousands_of_classes_and_of_pairs_need_little_memory(tmp_path):
    """6,000 classes would be 288 MB in a matrix of integers; 400,000 pairs in 2.5 GB are 6 kB a pair."""
    rows = [{"a": f"word{i} and others " * 4, "b": f"of number {i} " * 3, "label": i} for i in range(6000)]
    tracemalloc.start()
    read = data(save(tmp_path / "a.jsonl", rows), columns="ab")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read.labels["target"]) == 6000 and peak < 6000 * 6000


@pytest.mark.skipif(not DATA.exists(), reason="no real data here")
@pytest.mark.parametrize("target, aux", [("trec_coarse", "trec_fine"), ("sst2", "sst5")])
def test_real_texts_are_read_as_by_hand(target, aux):
    """Splits, words, labels, and what is dropped of a second task on the same sentences."""
    files = [DATA / name / "train.jsonl" for name in (target, aux)]
    rows, more = ([json.loads(line) for line in file.open(encoding="utf-8")] for file in files)
    read = data(files[0], DATA / aux, vocab_size=10**6)
    test = tenth([row["text"] for row in rows])
    left = [row for row in rows if normalise(row["text"]) not in test]
    held = test | tenth([row["text"] for row in left])
    for task, examples, kept in (("target", read.train, left), ("auxiliary", read.aux, more)):
        kept = [row for row in kept if normalise(row["text"]) not in held]
        assert texts_of(examples, read.vocab) == [" ".join(words(row["text"])[:64]) for row in kept]
        assert [read.labels[task][i] for i in examples.label] == [row["label"] for row in kept]


# ---- order and batches


def of_lengths(length):
    """Examples with texts of these lengths."""
    return Examples([np.ones(n, dtype=int) for n in length], np.zeros(len(length), dtype=int))


def test_every_epoch_visits_every_example_once_and_the_order_is_a_function_of_seed_and_step():
    examples = of_lengths(np.arange(1, 71))
    order = batch_order(examples, 9, seed=1)
    epochs = np.concatenate([order(step) for step in range(24)])[:210].reshape(3, 70)
    assert (np.sort(epochs) == np.arange(70)).all() and (epochs[0] != epochs[1]).any()
    assert (batch_order(examples, 9, seed=1)(17) == order(17)).all()
    assert (batch_order(examples, 9, seed=2)(17) != order(17)).any()
    assert len(batch_order(examples, 200, seed=1)(0)) == 200  # a batch may be larger than the data


def test_few_texts_meet_by_chance_in_the_next_epoch():
    """200 texts in batches of 25: 24 of 199 others share a batch with a text, 12 %. Sorted by length in one
    pool, 40 % of the pairs of an epoch would meet again in the next. 0.02 is four standard errors over the 9
    pairs of epochs, of 2,400 pairs each."""
    order = batch_order(of_lengths(np.random.default_rng(0).integers(3, 60, 200)), 25, seed=0)
    met = np.zeros((10, 200, 200), dtype=bool)
    for step in range(80):
        met[step // 8][np.ix_(order(step), order(step))] = True
    met &= ~np.eye(200, dtype=bool)
    again = [(a & b).sum() / a.sum() for a, b in zip(met, met[1:])]
    assert abs(np.mean(again) - 24 / 199) < 0.02


def test_neighbours_in_the_order_have_similar_lengths():
    """Padding to the longest of a batch wastes little: under 10 % against over 40 % in a random order."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 60, size=4096)
    padded = lambda order: 32 * length[order].reshape(-1, 32).max(1).sum()
    assert 1 - length.sum() / padded(epoch_order(length, 32, rng)) < 0.1
    assert 1 - length.sum() / padded(rng.permutation(4096)) > 0.4


def test_batches_are_padded_to_their_own_longest_text():
    examples = Examples([np.array(ids) for ids in ([3, 4, 5, 6], [7], [8, 9])], np.array([0, 1, 2]))
    ids, label = examples.batch(np.array([1, 2, 1]))
    assert ids.tolist() == [[7, PAD], [8, 9], [7, PAD]] and label.tolist() == [1, 2, 1]
