"""Claims about the second task and about data (transfer.py)."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

import train
from model import CLS, PAD, SPECIAL, Config, GatedTransformer, InputError, words
from transfer import BLAME, PRAISE, Examples, aux_weight_at, batch_order, couple, epoch_order
from transfer import limited_subset, prepare, read_task, reviews, transferred

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS = ["train", "validation", "test"]


def sentences(n, start=0, label=lambda i: "yes" if i % 2 else "no"):
    return [{"text": f"sentence number {i} of many", "label": label(i)} for i in range(start, start + n)]


def lines(path, *content, encoding="utf-8"):
    path.write_bytes("".join(line + "\n" for line in content).encode(encoding))
    return path


def save(path, rows):
    """Rows in the kind of file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".jsonl":
        return lines(path, *(json.dumps(row) for row in rows))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    return path


def small_task(folder, **sizes):
    """A folder with splits of the sizes asked for, all texts different: 0, 1, 2, ... of many."""
    start = 0
    for split, n in sizes.items():
        save(folder / f"{split}.jsonl", sentences(n, start))
        start += n
    return folder


def texts_task(folder, **splits):
    """A folder with these texts; labels alternate."""
    for split, texts in splits.items():
        save(folder / f"{split}.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    return folder


def task(spec, text_columns=("text",), label_column="label"):
    """The splits of a task as they are read, lists of (tuple of texts, class name)."""
    return read_task(str(spec), list(text_columns), label_column)


def refused(match, *named):
    """The task is refused, with one line that matches."""
    with pytest.raises(InputError, match=match) as error:
        task(*named)
    assert "\n" not in str(error.value)


def data(target, aux="none", columns=("text",), aux_columns=("text",), parent=None, **settings):
    """Everything a run reads, from the names of its tasks."""
    settings = {"n_target": 0, "max_length": 64, "vocab_size": None, "seed": 0, **settings}
    flags = {"text_columns": columns, "label_column": "label", "aux_text_columns": aux_columns}
    args = SimpleNamespace(target=str(target), aux=str(aux), aux_label_column="label", **flags, **settings)
    return prepare(args, parent)


def texts_of(read, split):
    """The texts of a split, as far as they were read, as a list of strings."""
    return [" ".join(read.vocab[token] for token in ids) for ids in read.splits[split].ids]


def classes_of(read, split):
    names = read.labels["auxiliary" if split == "aux" else "target"]
    return [names[i] for i in read.splits[split].label]


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
    assert task("reviews:film")["train"][0] == (("the actor was not masterful",), "negative")


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


def test_a_folder_has_one_file_a_split_and_others_are_named_as_not_read(tmp_path, capsys):
    """Suffixes in capitals are read, too, in a folder and of a file. Two of a name not read are fine."""
    for i, file in enumerate(["train.CSV", "validation.jsonl", "test.JSONL"]):
        save(tmp_path / file, sentences(3, 3 * i))
    for other in ("extra.csv", "dev.jsonl", "dev.csv", "README.md", "train.txt"):
        lines(tmp_path / other, "not read")
    splits = task(tmp_path)
    for i, split in enumerate(SPLITS):
        assert [texts for texts, _ in splits[split]] == [(row["text"],) for row in sentences(3, 3 * i)]
    assert capsys.readouterr().out == f"note: these splits of {tmp_path} are not used: dev, extra\n"
    assert task(save(tmp_path / "a" / "TEST.CSV", sentences(3))) == {"train": splits["train"]}
    save(tmp_path / "train.jsonl", sentences(3))
    refused("two files for the train split", tmp_path)


def test_what_is_no_task_is_refused_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    """A path that does not exist: its suffix is one that is read, or its folder is there."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *spec: asked.append(spec))
    monkeypatch.chdir(tmp_path)
    save(Path("data/here.csv"), sentences(9))
    for name in ("none", "../none", "none.jsonl", "a/none.csv", "a/none.JSONL", "a/b/c", "./a/b", "x [1]",
                 "data/missing.txt", "data/here.csv:part", "reviews:book"):  # fmt: skip
        refused(re.escape(f"no such file or folder: '{name}'"), name)
    assert asked == []
    refused("no training examples", ".")
    for path in (lines(Path("none.jsonl"), ""), lines(Path("a.csv"), "text,label"), lines(Path("b.csv"))):
        refused(f"{path} has no training examples", path)


def pairs(label):
    """A data set as GLUE's are: two texts, and classes by number with their names."""
    rows = {"one": [f"one {i}" for i in label], "two": [f"two {i}" for i in label], "label": label}
    return datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["same", "other"]))


def test_a_data_set_of_the_hub_has_classes_by_name_and_splits_of_exactly_three_names(monkeypatch, capsys):
    """Its configuration is named after a colon. A class of -1 is none; one that is missing is refused."""
    rte = {"train": [0, -1, 1], "dev": [0], "validation": [1], "test": [-1, -1]}
    hub = {("owner/name", "rte"): rte, ("owner/name", None): {"train": [-1, 0, None]}}
    load = lambda name, config=None: {split: pairs(label) for split, label in hub[name, config].items()}
    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = task("owner/name:rte", ["one", "two"])
    assert splits["train"] == [(("one 0", "two 0"), "same"), (("one 1", "two 1"), "other")]
    assert splits["validation"] == splits["train"][1:] and list(splits) == SPLITS[:2]
    assert capsys.readouterr().out == "note: these splits of owner/name:rte are not used: dev\n"
    refused("'owner/name:other' cannot be read from the Hub", "owner/name:other")
    refused(r"\['one', 'two', 'label'\].* \['text'\].* --text_columns", "owner/name:rte")
    refused(r"train of owner/name, example 3\b", "owner/name", ["one"])


# ---- columns, texts and labels


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_columns_are_text_and_label_unless_flags_name_them(tmp_path, kind):
    """The line that says what is missing lists the columns, and names the flags."""
    rows = [{"question": f"what {i}", "coarse": i % 2, "fine": f"f{i % 3}"} for i in range(4)]
    path = save(tmp_path / f"mine{kind}", rows)
    assert task(path, ["fine", "question"], "coarse")["train"][3] == (("f0", "what 3"), "1")
    there = r"columns \['question', 'coarse', 'fine'\].* not "
    refused(rf"{there}\['text', 'label'\].* --text_columns, --label_column", path)
    refused(rf"{there}\['label'\]", path, ["question"])
    refused(rf"{there}\['Fine'\].* out of the folder", path, ["question"], "Fine")


def test_a_test_file_without_labels_is_to_be_taken_out_of_the_folder(tmp_path):
    small_task(tmp_path, train=9)
    refused(r"test.csv, row 2 .*out of the folder", lines(tmp_path / "test.csv", "text", "a").parent)


@pytest.mark.parametrize("header", ["text;label", "text\tlabel", "text|label", "text, label", "text ,label"])
def test_a_header_with_another_separator_or_a_space_is_shown_as_it_is_read(tmp_path, header):
    """Also where a text has a comma."""
    shown = re.escape(str(header.split(",")))
    row = header.replace("text", "a text").replace("label", "x")
    refused(rf"row 2 .*{shown}, separated by commas", lines(tmp_path / "a.csv", header, row))
    refused(rf"row 2\b.*{shown}", lines(tmp_path / "b.csv", header, row.replace("a text", "a, or b")))


def test_columns_without_a_name_are_not_read_and_no_name_comes_twice(tmp_path):
    path = lines(tmp_path / "a.csv", ",v1,v2,,", "0,spam,see,,", "1,ham,you,x,")
    assert task(path, ["v2"], "v1")["train"] == [(("see",), "spam"), (("you",), "ham")]
    refused(r"a.csv, row 1\b.*twice: \['text', 'label', 'text'\]", lines(path, "text,label,text", "a,x,b"))


def test_labels_are_strings_integers_and_booleans_stripped_and_texts_are_left_as_they_are(tmp_path):
    values = ["x", " x\t", "\u00e9", "True", "1.0", 7, -7, True, False, "\ud800"]
    names = ["x", "x", "\u00e9", "True", "1.0", "7", "-7", "true", "false", "\ud800"]
    rows = [{"text": " As It Is \udfff", "label": value} for value in values]
    path = save(tmp_path / "a.jsonl", rows)
    assert task(path)["train"] == [((" As It Is \udfff",), name) for name in names]
    written = ["01", "1", "1.0", "1e2", "true", "True", "NA", "null", "None", "nan", "-1"]
    path = lines(tmp_path / "a.csv", "text,label", *(f"{name},{name}" for name in written))
    assert task(path)["train"] == [((name,), name) for name in written]


@pytest.mark.parametrize("column, value", [
    *((column, v) for column in ("text", "label") for v in (0.5, 1.0, float("nan"), None, "", " \t ", ["x"])),
    ("label", {"a": 1}), ("text", 1), ("text", True),
])  # fmt: skip
def test_any_other_text_or_label_is_refused_with_file_and_row(tmp_path, column, value):
    good, bad = {"text": "a", "label": "x"}, {"text": "a", "label": "x", column: value}
    refused(r"mine.jsonl, row 3\b", save(tmp_path / "mine.jsonl", [good, good, bad, good]))
    if isinstance(value, str):
        refused(r"mine.csv, row 4\b", save(tmp_path / "mine.csv", [good, good, bad]))


# ---- files


@pytest.mark.parametrize("line", [
    '{"text": "a", "label": }', '{"text": "a", "label": "x"', '{"text": "a", "label": ' + 5000 * "9" + "}",
    "[" * 100_000, '["a", "x"]', "null", "1", '\ufeff{"text": "a", "label": "x"}', "[", '"text": "a",',
])  # fmt: skip
def test_a_line_of_json_that_is_no_row_is_named(tmp_path, line):
    """As in a pretty-printed array, or in files joined with cat, each with a mark."""
    good = '{"text": "a", "label": "x"}'
    refused(r"a.jsonl, row 2: .*one object per line", lines(tmp_path / "a.jsonl", good, line, good))


@pytest.mark.parametrize("line, reason", [
    ("a", "cells"), ("the soup, a delight,x", "cells"), (",x", "text"), ("a,", "label"), ('a,"x', ""),
    ('"a"b,', ""), ("text,label", "header"), ("\ufefftext,label", "header"), ('\ufeff"text",label', "header"),
])  # fmt: skip
def test_a_line_of_csv_that_is_no_row_is_named(tmp_path, line, reason):
    """Files joined with cat have the header once more, some with a mark before it."""
    path = lines(tmp_path / "a.csv", "\ufefftext,label", '"b\nc",x', line)
    refused(rf"a.csv, row 3\b.*{reason}", path)


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_both_kinds_of_file_say_the_same(tmp_path, kind):
    """With commas, quotes, ends of lines and a megabyte in a cell; with a mark; with the lines of Windows."""
    texts = ['say "yes", or', "two\nlines", "\u0939\u093f\u0928\u094d\u0926\u0940 \u2028", "long " * 2**18]
    path = save(tmp_path / f"a{kind}", [{"text": text, "label": f"l{i}"} for i, text in enumerate(texts)])
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + path.read_bytes())
        assert task(path)["train"] == [((text,), f"l{i}") for i, text in enumerate(texts)]
    content = save(path, sentences(2)).read_bytes().replace(b"\r", b"")
    path.write_bytes(content.replace(b"\n", b"\r\n") + b"\r\n")
    assert [name for _, name in task(path)["train"]] == ["no", "yes"]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, encoding):
    for file, *content in (["a.csv", "text,label", "é,x"], ["a.jsonl", '{"text": "a", "label": 1}', '"é"']):
        refused(f"{file}: save it as UTF-8", lines(tmp_path / file, *content, encoding=encoding))


# ---- splits, and the same text

SAME = ["A Café park.", "a cafe park .", "A CAFE\u0301  PARK", "\u200bA Café park", "a-caf\u00e9-p\u00adark",
        "\uff21 \uff23af\u00e9 park!", "\u201cA Cafe\u201d p\u00e4rk\u2026", "\u24d0 cafe park"]  # fmt: skip
OTHER = ["A Café parks.", "A Café park 1", "cafe a park", ":-)", "\u0430 cafe park"]  # the last: Cyrillic


def test_auxiliary_texts_that_are_the_same_as_held_out_ones_are_dropped_and_counted(tmp_path, capsys):
    """Case, accents, spaces, punctuation, width and what cannot be seen make no other text; a letter, a digit
    or their order does. Of texts without letters every mark counts. Those of training may stay."""
    held = ["\ud800", SAME[0], "Straße ²", "!!"]
    target = texts_task(tmp_path / "t", train=["one", "two"], validation=held[:2], test=held[2:])
    aux = texts_task(tmp_path / "a", train=["One!", *SAME, *OTHER, "STRASSE 2", "\ud800", "!!!", ":-(", "!!"])
    read = data(target, aux)
    assert f"\n{len(SAME) + 3} auxiliary texts" in capsys.readouterr().out
    kept = ["One!", *OTHER, "!!!", ":-("]
    assert texts_of(read, "aux") == [" ".join(words(text)) for text in kept]


def test_test_and_validation_texts_that_are_also_elsewhere_have_a_note(tmp_path, capsys):
    splits = {"train": [SAME[0], "one", "two", "two"], "validation": [*SAME[1:4], "three", "TWO", ":-("]}
    data(texts_task(tmp_path, **splits, test=[*SAME[4:6], "Two.", "Three", "four", ":-)"]))
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("note")] == [
        "note: 3 of the test texts also occur in train",
        "note: 4 of the validation texts also occur in train",
        "note: 5 of the validation texts also occur in test",
    ]
    data(small_task(tmp_path / "good", train=20, validation=5, test=5))
    assert "note" not in capsys.readouterr().out


def test_missing_splits_are_a_tenth_of_the_distinct_texts_of_train_by_hash(tmp_path, capsys):
    """First for test, then of what is left for validation; the class of a text says which text it is. Copies
    stay together; order of rows, length, seed, subset and vocabulary change nothing."""
    rows = [{"text": f"{text} {i}", "label": i} for text in SAME[:3] for i in range(300)]

    def made(rows, **settings):
        read = data(save(tmp_path / "a.jsonl", rows), **settings)
        return [Counter(classes_of(read, split)) for split in ("validation", "test")]

    validation, test = made(rows)
    assert capsys.readouterr().out.count("a tenth of train is used") == 2
    assert len(validation) == 27 and len(test) == 30 and not validation.keys() & test.keys()
    assert set(validation.values()) == set(test.values()) == {3}
    assert 100 < np.mean([int(name) for name in test]) < 200  # neither the first nor the last texts
    assert made(rows[::-1], max_length=2, seed=1, n_target=50, vocab_size=9) == [validation, test]


def test_a_pair_is_held_out_as_a_pair_whatever_its_words_are_when_joined(tmp_path):
    """A pair that is parted elsewhere is another text, and so are a pair with one other text, and a single
    text of the same words."""
    make = lambda *texts: [dict(zip("ab", (t.format(i) for t in texts)), label=i % 2) for i in range(9)]
    for split in SPLITS:
        save(tmp_path / "t" / f"{split}.jsonl", make("one {}", "two three"))
    same = [{"a": " ONE  0", "b": "two, three", "label": 0}]  # the only one to be dropped
    half = [{"a": "one 0", "b": "two four", "label": 0}, {"a": "none", "b": "two three", "label": 0}]
    for rows, columns in ((make("one {} two", "three") + half + same, "ab"), (make("one {} two three"), "a")):
        read = data(tmp_path / "t", save(tmp_path / "a.jsonl", rows), "ab", columns)
        assert len(read.splits["aux"].ids) == len(rows) - len(same) * (columns == "ab")


def test_truncated_texts_and_pairs_and_unknown_words_are_counted(tmp_path, capsys):
    """Of a pair the longer text is truncated; the mark between them counts, and no text can write it."""
    cases = {("a b c d e f", "x y"): "a b c [SEP] x y", ("a [SEP]", "u"): "a [ sep ] [SEP] u",
             ("a b", "u v w x y z"): "a b [SEP] u v w", ("a", "b"): "a [SEP] b"}  # fmt: skip
    rows = [{"a": a, "b": b, "label": i % 2} for i, (a, b) in enumerate(cases)]
    save(tmp_path / "train.csv", rows)
    save(tmp_path / "validation.csv", rows[1:])
    save(tmp_path / "test.csv", [{"a": "a unheard", "b": "of", "label": 0}] + rows[3:])
    read = data(tmp_path, columns="ab", max_length=6)
    assert texts_of(read, "train") == list(cases.values()) and classes_of(read, "train") == ["0", "1"] * 2
    train.print_data(read, 6)
    printed = capsys.readouterr().out
    for split, n, share in (("train", 4, "75%"), ("validation", 3, "67%"), ("test", 2, "0%")):
        assert re.search(rf"\b{split}: {n} .*\b{share} .*max_length", printed)
    assert re.search(r"\btest: 2 .*\b28\.6% ", printed)  # unknown are 2 of 7


def test_too_few_texts_or_classes_are_refused(tmp_path):
    one = save(tmp_path / "one.jsonl", sentences(30, label=lambda i: -1))
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    few = [save(tmp_path / f"{n}.jsonl", sentences(n)) for n in (1, 2, 3)]
    cases = [("two classes", 0, path) for path in (one, *few)] + [("two classes", 0, target, one)]
    for reason, n, *tasks in [*cases, *((f"n_target {n}: take 2 to 20", n, target) for n in (1, 21))]:
        with pytest.raises(InputError, match=reason):
            data(*tasks, n_target=n)


def test_of_an_auxiliary_task_only_train_is_read(tmp_path):
    """A test split without labels, as many have, stops no run."""
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    save(tmp_path / "a" / "train.jsonl", sentences(20, 50))
    save(tmp_path / "a" / "test.jsonl", [{"text": "no label here"}])
    assert len(data(target, tmp_path / "a").splits["aux"].ids) == 20


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


def test_of_examples_whose_turn_comes_at_once_the_first_are_taken():
    """By hand: example k of a class of m has its turn at k / m; sorted() keeps the order of equal ones."""
    label, turn, rng = np.arange(300) % 60, {}, np.random.default_rng(5)
    for c in range(60):
        for k, i in enumerate(rng.permutation(np.flatnonzero(label == c)).tolist()):
            turn[i] = k / 5
    first = sorted(sorted(turn), key=turn.get)[:95]
    assert np.flatnonzero(limited_subset(label, 95, seed=5)).tolist() == sorted(first)


# ---- vocabulary


def test_the_vocabulary_is_that_of_a_count_by_hand(tmp_path, capsys):
    """The target's training words come first, then a parent's, then the auxiliary task's, which fill what is
    left; each by frequency, equally frequent ones in the order in which they occur in whole train files."""
    rng = np.random.default_rng(0)
    make = lambda names: [{"text": " ".join(rng.choice(names, 4)), "label": i % 2} for i in range(100)]
    rows, more = make([f"w{i}" for i in range(60)]), make([f"w{i}" for i in range(30, 90)])
    tasks = save(tmp_path / "t.jsonl", rows), save(tmp_path / "a.jsonl", more)
    first = list(dict.fromkeys(" ".join(row["text"] for row in rows + more).split()))

    def by_frequency(split):
        count = Counter(" ".join(texts_of(read, split)).split())
        return sorted(count, key=lambda word: (-count[word], first.index(word)))

    read, alone, other = (data(*t, n_target=20, seed=s) for t, s in ((tasks, 0), (tasks[:1], 0), (tasks, 1)))
    assert "\n20 of 81 training examples are used" in capsys.readouterr().out
    own = by_frequency("train")
    full = list(dict.fromkeys([*SPECIAL, *own, *by_frequency("aux")]))
    assert read.vocab == full and alone.vocab == [*SPECIAL, *own] and len(own) < 50 < len(full)
    assert texts_of(read, "train") == texts_of(alone, "train") and other.vocab != full  # subsets
    for size in (10, 50):
        assert data(*tasks, n_target=20, vocab_size=size).vocab == full[:size]
    vocab = [*SPECIAL, *(f"z{i}" for i in range(60))]
    parent = GatedTransformer(Config(63, 9, 8, 4, [2], [1]), vocab, {"target": ["x"]})
    assert data(*tasks, n_target=20, vocab_size=50, parent=parent).vocab == [*SPECIAL, *own, *vocab[3:]]


LETTERS = [mark + letter for letter in "zyxwvutsrqponmlkjihgfedcba" for mark in ("", "##")]
PIECES = ["zebra", "seen", "##bra", "often", "man", "of", "##used", "un", "rare"]


@pytest.mark.parametrize("size, several", [
    (None, None), (4, []), (57, ["of"]), (59, ["of", "seen", "man"]), (60, ["of", "seen", "man", "un"]),
    (61, ["of", "seen", "man", "un", "often"]),
    (10**6, ["of", "seen", "man", "un", "often", "[MASK]", "zebra", "##bra", "##used", "rare"]),
])  # fmt: skip
def test_a_berts_vocabulary_is_whole_unless_a_size_is_asked_for(tmp_path, capsys, size, several):
    """By hand: special tokens and single characters always; the target's pieces by frequency, however
    frequent the auxiliary task's are, which are next; then the others as the parent lists them. Of the texts
    to test on, 2 of 8 have a zebra, 4 others are often seen, and 2 have only letters."""
    vocab = [*SPECIAL, CLS, "[unused0]", "[MASK]", *PIECES, *LETTERS]
    bert = GatedTransformer(Config(len(vocab), 32, 8, 4, [2], [1], bert=True), vocab, {"target": ["x"]})
    test = ["A zebra"] * 2 + ["often seen"] * 4 + ["q", "w q"]
    target = texts_task(tmp_path / "t", train=["of man of", "seen seen of"], validation=["un"], test=test)
    aux = texts_task(tmp_path / "a", train=["un un"] * 9 + ["often"] * 9)
    read = data(target, aux, parent=bert, vocab_size=size)
    printed = capsys.readouterr().out
    if size is None:
        assert read.vocab == vocab and "differently" not in printed
        assert texts_of(read, "test")[1:3] == ["[CLS] a zebra [SEP]", "[CLS] often seen [SEP]"]
        return
    assert read.vocab == [*SPECIAL, CLS, *LETTERS, *several]
    share = 2 * ("zebra" not in several) + 4 * (not {"often", "seen"} <= set(several))
    assert f" {share / 8:.1%} of the test texts are read differently" in printed
    assert f"{len(read.vocab)} of {len(vocab)} pieces" in printed
    a_zebra = "zebra" if "zebra" in several else "z ##e ##b ##r ##a"
    assert texts_of(read, "test")[1] == f"[CLS] a {a_zebra} [SEP]"


@pytest.mark.skipif(not DATA.exists(), reason="no real data here")
@pytest.mark.parametrize("target, aux", [("trec_coarse", "trec_fine"), ("sst2", "sst5")])
def test_real_texts_are_read_as_by_hand(target, aux):
    """Splits, words, labels, and what is dropped of a second task on the same sentences."""
    read = data(DATA / target, DATA / aux, vocab_size=10**6)
    rows = {}
    for name, spec in (("train", target), ("validation", target), ("test", target), ("aux", aux)):
        file = DATA / spec / f"{name}.jsonl".replace("aux", "train")
        rows[name] = [json.loads(line) for line in file.open(encoding="utf-8")]
    letters = lambda row: "".join(c for c in row["text"].lower() if c.isalnum() and c.isascii())
    held = {letters(row) for row in rows["validation"] + rows["test"]}
    rows["aux"] = [row for row in rows["aux"] if letters(row) not in held]
    for name, listed in rows.items():
        assert classes_of(read, name) == [row["label"] for row in listed]
    for name in ("train", "aux"):
        assert texts_of(read, name) == [" ".join(words(row["text"])[:64]) for row in rows[name]]


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


def test_batches_are_sorted_by_length_and_themselves_in_random_order():
    """A step has one batch of the epoch, whole: 256 lengths in pools of 16 batches of 2. Longer and shorter
    ones follow each other by chance: 127 pairs of neighbours, 0.5 give or take three standard errors."""
    length = np.random.default_rng(0).permutation(256) + 1
    order = batch_order(of_lengths(length), 2, seed=1)
    batches = np.array([length[order(step)] for step in range(256)])
    assert (batches[:, 0] < batches[:, 1]).all()
    for epoch in batches.mean(1).reshape(2, 128):
        assert abs(np.mean(epoch[1:] > epoch[:-1]) - 0.5) < 3 * (1 / 12 / 127) ** 0.5


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
