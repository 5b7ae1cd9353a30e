"""Claims about the second task and about data (transfer.py)."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from model import PAD, SPECIAL, words
from transfer import (
    NAMES,
    Examples,
    InputError,
    Source,
    aux_weight_at,
    batch_order,
    couple,
    epoch_order,
    held_out,
    limited_subset,
    load_task,
    prepare,
    reviews,
    tokenize,
    transferred,
)


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


def load(spec, text_columns=None, label_column=None, flag="", word_id=None):
    """A target's splits, class names, record and notes."""
    source = Source(str(spec), text_columns, label_column, flag)
    word_id = {word: i for i, word in enumerate(SPECIAL)} if word_id is None else word_id
    return load_task(source, tuple(NAMES), 64, word_id)


def data(target, aux=None, n_target=0, max_length=64, vocab_size=1000, seed=0):
    """Everything a run reads, from the names of its tasks."""
    aux = Source(str(aux), flag="aux_") if aux else None
    sizes = {"n_target": n_target, "max_length": max_length, "vocab_size": vocab_size}
    return prepare(Source(str(target)), aux, **sizes, seed=seed)


def texts_of(examples, vocab):
    """The texts of Examples, as far as they were read, as a list of strings."""
    bounds = zip(examples.start[:-1], examples.start[1:])
    return [" ".join(vocab[t] for t in examples.tokens[a:b]) for a, b in bounds]


# ---- when, what, how


def test_aux_weight_is_on_exactly_in_its_window():
    assert [aux_weight_at(s, 0.5, 3, 6) for s in range(8)] == [0, 0, 0, 0.5, 0.5, 0.5, 0, 0]


def test_transferred_names_what_the_auxiliary_gradient_may_touch():
    """Its own classifier always, the target's never; of the shared parameters what --transfer says."""
    names = [
        "token.weight",
        "blocks.0.up.weight",
        "classifier.target.bias",
        "classifier.auxiliary.bias",
        "log_alpha",
    ]
    parameters = {name: object() for name in names}
    shared = {"weights": names[:2], "gates": names[4:], "both": names[:2] + names[4:]}
    for what, expected in shared.items():
        reached = transferred(parameters, what)
        assert reached.keys() == {*expected, "classifier.auxiliary.bias"}
        assert all(reached[name] is parameters[name] for name in reached)


@pytest.mark.parametrize("seed", range(10))
def test_projection_never_points_against_the_target_and_equals_the_sum_when_they_agree(seed):
    """The auxiliary part of the update has inner product >= 0 with the target gradient (1e-4: float32
    rounding). What only one task touches passes unchanged."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 4), "b": (7,), "c": ()}
    g_target = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    g_aux = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    own = {"target": torch.randn(3, generator=generator), "aux": torch.randn(3, generator=generator)}
    flat = lambda named: torch.cat([named[name].flatten() for name in shapes])
    summed, projected = (
        couple(g_target | {"target": own["target"]}, g_aux | {"aux": own["aux"]}, how)
        for how in ("sum", "project")
    )
    for update in (summed, projected):
        assert torch.equal(update["target"], own["target"]) and torch.equal(update["aux"], own["aux"])
    torch.testing.assert_close(flat(summed), flat(g_target) + flat(g_aux))
    dot = flat(g_target) @ flat(g_aux)
    aux_part = flat(projected) - flat(g_target)
    assert aux_part @ flat(g_target) > -1e-4
    if dot < 0:  # what is left is the orthogonal part, by Gram-Schmidt
        expected = flat(g_aux) - dot / flat(g_target).square().sum() * flat(g_target)
        torch.testing.assert_close(aux_part, expected, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(flat(projected), flat(summed))


def test_coupling_with_nothing_is_what_is_there():
    """With --transfer gates nothing is shared outside the pruning phase; a task may also be silent."""
    g = {"a": torch.tensor([1.0, -2.0, 3.0])}
    for how in ("sum", "project"):
        assert couple({}, {}, how) == {}
        assert couple(g, {}, how).keys() == couple({}, g, how).keys() == {"a"}
        assert torch.equal(couple({}, g, how)["a"], g["a"])
        assert torch.equal(couple({"a": torch.zeros(3)}, g, how)["a"], g["a"])


# ---- the built-in task


def test_built_in_sentences_are_unique_balanced_and_the_same_every_time():
    for domain in ("restaurant", "film"):
        splits = reviews(domain)
        rows = [row for split in splits.values() for row in split]
        assert len({text for text, _ in rows}) == len(rows) == 8500
        assert 0.48 < np.mean([label == "positive" for _, label in rows]) < 0.52
        assert splits == reviews(domain)
    assert reviews("film")["train"][0] == ("the actor was not masterful", "negative")


def test_the_label_is_the_polarity_of_the_main_clause():
    """Parse every sentence again, independently: drop the clause of the conjunction, look up the adjective,
    count negations."""
    from transfer import BLAME, PRAISE

    polarity = {w: 1 for ws in PRAISE.values() for w in ws.split()} | {
        w: -1 for ws in BLAME.values() for w in ws.split()
    }
    for text, label in reviews("restaurant")["train"]:
        main = [c for c in text.split(", ") if not c.startswith(("although", "though", "even", "while"))]
        assert len(main) == 1
        *start, opinion = main[0].split()
        sign = polarity[opinion] * (-1 if {"not", "wasn't", "hardly"} & set(start) else 1)
        assert label == ("positive" if sign > 0 else "negative")


def test_200_sentences_do_not_show_most_of_what_the_opinion_words_mean():
    """At most half of the opinion words occur twice among 200 labelled sentences; the auxiliary task has them
    all."""
    from transfer import BLAME, PRAISE

    opinions = {w for ws in (*PRAISE.values(), *BLAME.values()) for w in ws.split() if "-" not in w}
    count = Counter(
        w for text, _ in reviews("restaurant")["train"][:200] for w in words(text, 64) if w in opinions
    )
    assert sum(n >= 2 for n in count.values()) < len(opinions) / 2
    film = {w for text, _ in reviews("film")["train"] for w in words(text, 64)}
    assert {w for ws in (PRAISE["shared"], BLAME["shared"]) for w in ws.split()} <= film


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


def test_the_subset_is_the_same_with_and_without_an_auxiliary_task(tmp_path):
    target = small_task(tmp_path / "t", train=60, validation=10, test=10)
    aux = small_task(tmp_path / "a", train=60)
    alone, taught = data(target, n_target=20, seed=3), data(target, aux, n_target=20, seed=3)
    assert texts_of(alone.train, alone.vocab) == texts_of(taught.train, taught.vocab)
    assert alone.train.label.tolist() == taught.train.label.tolist()


def test_auxiliary_examples_of_the_held_out_splits_are_dropped_and_counted(tmp_path):
    """Case and spaces make no other text; a word beyond max_length does."""
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)  # sentences 0-19, 20-24, 25-29
    same = {"text": "SENTENCE  number 22 of many", "label": "no"}
    longer = {"text": "sentence number 23 of many more", "label": "no"}
    write(tmp_path / "a", "train.jsonl", [*sentences(40, 10), same, longer])
    read = data(target, tmp_path / "a", max_length=5)
    assert len(read.aux.label) == 31
    assert "dropped 11 auxiliary examples found in the target's held-out data" in read.notes
    kept = texts_of(read.aux, read.vocab)
    assert "sentence number 30 of many" in kept and "sentence number 29 of many" not in kept


def test_a_pair_is_held_out_as_a_pair_whatever_its_words_are_when_joined(tmp_path):
    """A pair that is parted elsewhere is another text, and so is a single text of the same words."""
    pairs = [{"a": f"one {i}", "b": "two three", "label": i % 2} for i in range(9)]
    for split in ("train", "validation", "test"):
        write(tmp_path / "t", f"{split}.jsonl", pairs)
    elsewhere = [{"a": f"one {i} two", "b": "three", "label": i % 2} for i in range(9)]
    single = [{"text": f"one {i} two three", "label": i % 2} for i in range(9)]
    target = Source(str(tmp_path / "t"), ["a", "b"], "label")
    settings = {"n_target": 0, "max_length": 9, "vocab_size": 99, "seed": 0}
    same = {"a": " ONE  0", "b": "two three", "label": 0}  # the only one to be dropped
    for rows, columns in (([*elsewhere, same], ["a", "b"]), (single, ["text"])):
        write(tmp_path / "a", "train.jsonl", rows)
        aux = Source(str(tmp_path / "a"), columns, "label", "aux_")
        assert len(prepare(target, aux, **settings).aux.label) == 9


def test_the_vocabulary_holds_training_words_only_most_frequent_first(tmp_path):
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    read = data(target, n_target=10)
    assert read.vocab[:3] == SPECIAL
    assert set(read.vocab[3:7]) == {"sentence", "number", "of", "many"}
    assert len(read.vocab) == 3 + 4 + 10 and not {str(i) for i in range(20, 30)} & set(read.vocab)
    assert data(target, n_target=10, vocab_size=5).vocab[3:] == read.vocab[3:5]
    assert (read.test.tokens == 1).sum() == 5  # the numbers, unknown
    assert read.record["unknown"] == {"train": 0.0, "test": 0.2}


def test_the_words_of_the_target_come_before_all_of_the_auxiliary_task(tmp_path):
    """However frequent the auxiliary words are; they fill what is left by frequency."""
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    rows = [{"text": "many often often rarely" if i < 9 else "often", "label": i % 2} for i in range(200)]
    write(tmp_path / "a", "train.jsonl", rows)
    alone, taught = data(target), data(target, tmp_path / "a")
    assert taught.vocab == [*alone.vocab, "often", "rarely"]
    small = data(target, tmp_path / "a", vocab_size=len(alone.vocab) + 1)
    assert small.vocab == [*alone.vocab, "often"] and small.record["unknown"]["train"] == 0


def test_marks_and_a_parents_words_take_no_place_of_the_targets_words(tmp_path):
    """<sep> and <unk> occur in texts, but are counted once; all words of a parent stay, at any vocab_size."""
    lines = [f"same {i % 3},{'other' if i % 2 else ''} ,{i % 2}" for i in range(40)]
    path = csv(tmp_path / "pairs.csv", "a,b,label", *lines)
    settings = {"n_target": 0, "max_length": 9, "vocab_size": 6, "seed": 0}
    read = prepare(Source(str(path), ["a", "b"], "label"), None, **settings)
    assert len(read.vocab) == 6 and {"same", "other"} <= set(read.vocab)
    parent = [f"word{i}" for i in range(20)]
    read = prepare(Source(str(path), ["a", "b"], "label"), None, **settings, parent_words=parent)
    assert read.vocab == [*SPECIAL, *read.vocab[3:6], *parent] and "same" in read.vocab[3:6]


# ---- order and batches


def test_every_epoch_visits_every_example_once_and_the_order_is_a_function_of_seed_and_step():
    examples = of_lengths(np.arange(1, 71))
    order = batch_order(examples, 7, seed=1)
    seen = np.concatenate([order(step) for step in range(30)])
    for epoch in range(3):
        assert sorted(seen[70 * epoch : 70 * (epoch + 1)]) == list(range(70))
    assert (batch_order(examples, 7, seed=1)(17) == order(17)).all()
    assert (batch_order(examples, 7, seed=2)(17) != order(17)).any()
    assert len(batch_order(examples, 200, seed=1)(0)) == 200  # a batch may be larger than the data


def of_lengths(length):
    """Examples with texts of these lengths."""
    start = np.concatenate([[0], np.cumsum(length)])
    return Examples(np.zeros(start[-1], dtype=int), start, np.zeros(len(length), dtype=int))


def test_few_texts_meet_by_chance_in_the_next_epoch():
    """200 texts in batches of 25: 24 of 199 others share a batch with a text, 12 %. Sorted by length in one
    pool, 40 % of the pairs of an epoch would meet again in the next. 0.02 is four standard errors over the 9
    pairs of epochs, of 2,400 pairs each."""
    order = batch_order(of_lengths(np.random.default_rng(0).integers(3, 60, 200)), 25, seed=0)
    met = []
    for epoch in range(10):
        together = np.zeros((200, 200), dtype=bool)
        for step in range(8 * epoch, 8 * epoch + 8):
            together[np.ix_(order(step), order(step))] = True
        met.append(together & ~np.eye(200, dtype=bool))
    again = [(a & b).sum() / a.sum() for a, b in zip(met, met[1:])]
    assert abs(np.mean(again) - 24 / 199) < 0.02


def test_neighbours_in_the_order_have_similar_lengths():
    """Padding to the longest of a batch wastes little: under 10 % against over 40 % in a random order."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 60, size=4096)
    waste = lambda order: (
        1 - length.sum() / sum(32 * length[order[i : i + 32]].max() for i in range(0, 4096, 32))
    )
    assert waste(epoch_order(length, 32, rng)) < 0.1 and waste(rng.permutation(4096)) > 0.4


def test_batches_can_go_from_easy_to_hard():
    """With a difficulty every epoch is sorted by it, equal ones in an order of their own in every epoch."""
    word_id = {word: i for i, word in enumerate(SPECIAL)}
    examples = tokenize([(f"text {i}", "x") for i in range(60)], 64, word_id, {"x": 0})
    difficulty = np.arange(60) % 6
    order = batch_order(examples, 10, 0, difficulty)
    epochs = [np.concatenate([order(step) for step in range(6 * e, 6 * e + 6)]) for e in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60)) and (np.diff(difficulty[epoch]) >= 0).all()
    assert (epochs[0] != epochs[1]).any()


def test_batches_are_padded_to_their_own_longest_text():
    word_id, label_id = {word: i for i, word in enumerate(SPECIAL)}, {"x": 0, "y": 1}
    pairs = [("a b c d e", "x"), ("f", "y"), ("g h", "x")]
    ids, labels = tokenize(pairs, 64, word_id, label_id).batch(np.array([1, 2]))
    assert ids.tolist() == [[word_id["f"], PAD], [word_id["g"], word_id["h"]]] and labels.tolist() == [1, 0]


# ---- columns


def csv(path, header, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_columns_are_used_where_one_reading_is_possible(tmp_path):
    """By the names text and label; else one column of strings and one other that can hold classes."""
    lines = [f"{i},what is {i},{i % 2}" for i in range(30)]
    record = load(csv(tmp_path / "by_name.csv", "idx,text,label", *lines))[2]
    assert (record["text_columns"], record["label_column"]) == (["text"], "label")
    lines = [line.partition(",")[2] for line in lines]
    record = load(csv(tmp_path / "one.csv", "question,coarse", *lines))[2]
    assert (record["text_columns"], record["label_column"]) == (["question"], "coarse")


@pytest.mark.parametrize(
    "header, line",
    [
        ("id,review,sentiment", "{i},review {i},good{k}"),
        ("review,date,stars", "review {i},2020-01-{i},{k}"),
        ("review,sentiment", "review {i},good{k}"),
        ("sentence1,sentence2,label", "one {i},two {i},{k}"),
        ("text,first,second", "text {i},{k},{k}"),
    ],
)
def test_no_column_is_guessed(tmp_path, header, line):
    """With more than one reading the run ends with every column's type, number of values and first value."""
    path = csv(tmp_path / "mine.csv", header, *(line.format(i=i, k=i % 2) for i in range(10, 30)))
    with pytest.raises(InputError, match="more than one choice.*--text_columns and --label_column") as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message and all(f"{column} (" in message for column in header.split(","))
    with pytest.raises(InputError, match="--aux_text_columns and --aux_label_column"):
        load(path, flag="aux_")


def test_the_list_of_columns_says_type_number_of_values_and_first_value(tmp_path):
    lines = [f"{i},{'long ' * 50} {i},{'good' if i % 2 else 'bad'}" for i in range(20)]
    with pytest.raises(InputError) as error:
        load(csv(tmp_path / "mine.csv", "id,review,sentiment", *lines))
    message = str(error.value)
    assert "id (int64, 20 different, first '0')" in message and len(message) < 500
    assert "sentiment (large_string, 2 different, first 'bad')" in message


def test_named_columns_are_used_and_the_other_may_be_found(tmp_path):
    rows = [{"question": f"what {i}", "coarse": i % 2, "fine": f"f{i % 3}"} for i in range(30)]
    write(tmp_path, "train.jsonl", rows)
    assert load(tmp_path, ["question"], "fine")[1] == ["f0", "f1", "f2"]
    assert load(tmp_path, label_column="fine")[2]["text_columns"] == ["question"]
    word_id = {word: i for i, word in enumerate(SPECIAL)}
    splits = load(tmp_path, ["question", "fine"], "coarse", word_id=word_id)[0]
    assert texts_of(splits["test"], list(word_id))[0].split()[2] == "<sep>"
    with pytest.raises(InputError, match="no text as strings and missing as classes.*coarse .*fine"):
        load(tmp_path, label_column="missing")
    for text in ("absent", "coarse"):
        with pytest.raises(InputError, match=f"no .*{text}.* as strings and fine as classes"):
            load(tmp_path, [text], "fine")


def test_the_label_is_never_a_text(tmp_path):
    target = small_task(tmp_path, train=30)
    with pytest.raises(InputError, match="no .*text.*label.* as strings and label as classes"):
        load(target, ["text", "label"], "label")


def test_the_auxiliary_task_has_columns_of_its_own(tmp_path):
    target = small_task(tmp_path / "t", train=30)
    write(tmp_path / "a", "train.jsonl", [{"a": f"w{i}", "b": "x", "kind": i % 2} for i in range(30)])
    aux = Source(str(tmp_path / "a"), ["a"], "kind", "aux_")
    read = prepare(Source(target), aux, n_target=0, max_length=64, vocab_size=1000, seed=0)
    assert read.labels == {"target": ["no", "yes"], "auxiliary": ["0", "1"]} and len(read.aux.label) == 30
    assert read.record["auxiliary"]["text_columns"] == ["a"]


def test_labels_are_stripped_and_whole_numbers_are_classes(tmp_path):
    write(tmp_path / "a", "train.jsonl", sentences(30, label=lambda i: [" neg", "neg", "pos "][i % 3]))
    assert load(tmp_path / "a")[1] == ["neg", "pos"]
    write(tmp_path / "b", "train.jsonl", [{"review": f"r {i}", "stars": i % 5 + 1.0} for i in range(40)])
    assert load(tmp_path / "b")[1] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "row 2 of .*train.jsonl has no label"),
        ([{"text": "a", "label": " "}, {"text": "b", "label": "x"}], "row 1 of .*train.jsonl has no label"),
        ([{"text": "a", "label": 1.0}, {"text": "b", "label": None}], "row 2 of .*train.jsonl has no label"),
        ([{"text": "a", "label": "x"}, {"text": None, "label": "y"}], "row 2 of .*train.jsonl has no text"),
        ([{"text": "a", "label": "x"}, {"label": "y"}], "row 2 of .*train.jsonl has no text"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], "label .float64, 2 diff.*, first '0.5'"),
        ([{"text": "a", "label": ["x"]}, {"text": "b", "label": ["y"]}], "label .nested"),
        ([{"text": ["a"], "label": "x"}, {"text": ["b"], "label": "y"}], "text .nested"),
        ([{"text": 1, "label": "x"}, {"text": 2, "label": "y"}], "text .int64"),
        ([{"text": f"a {i}", "label": "x"} for i in range(20)], "single class .* has x"),
        ([{"text": "a", "label": "x"}], "too few different texts"),
        ([{"label": "x"}, {"label": "y"}], "--text_columns"),
        ([{"text": "a"}, {"text": "b"}], "--label_column"),
        ([], "cannot load|empty"),
    ],
)
def test_unusable_rows_are_refused_with_the_reason(tmp_path, rows, reason):
    write(tmp_path, "train.jsonl", rows)
    with pytest.raises(InputError, match=reason):
        load(tmp_path)


# ---- splits


def sizes_and_origin(spec):
    splits, _, record, notes = load(spec)
    return {split: len(part.label) for split, part in splits.items()}, record["splits"], notes


@pytest.mark.parametrize("name", ["validation", "val", "dev", "Eval", "validation_matched"])
def test_a_validation_split_has_several_names(tmp_path, name):
    sizes, origin, notes = sizes_and_origin(small_task(tmp_path, Train=30, Test=7, **{name: 5}))
    assert sizes == {"train": 30, "validation": 5, "test": 7} and notes == []
    assert [Path(origin[split]).stem for split in NAMES] == ["Train", name, "Test"]


def test_exact_names_come_first_and_the_rest_is_named_as_unused(tmp_path):
    task = small_task(tmp_path, dev=3, valid_a=4, validation=5, extra=6, test=7, train=30)
    sizes, origin, notes = sizes_and_origin(task)
    assert sizes == {"train": 30, "validation": 5, "test": 7}
    assert notes == [f"not used of {task}: dev, extra, valid_a"]


def test_a_split_without_labels_hides_none_with_labels(tmp_path):
    task = small_task(tmp_path, train=30, val=5, test=7)
    write(tmp_path, "validation.jsonl", [{"text": f"hidden {i}"} for i in range(9)])
    sizes, origin, notes = sizes_and_origin(task)
    assert sizes == {"train": 30, "validation": 5, "test": 7}
    assert notes == [f"not used of {task}: validation (no labels)"]


@pytest.mark.parametrize("hidden", [{"label": -1}, {"label": None}, {"label": "-1"}, {}])
def test_a_hidden_test_split_adds_no_class_and_validation_is_reported(tmp_path, hidden):
    write(tmp_path, "train.jsonl", sentences(30, label=lambda i: i % 2))
    write(tmp_path, "validation.jsonl", sentences(6, 40, label=lambda i: i % 2))
    write(tmp_path, "test.jsonl", [{"text": f"secret {i}", **hidden} for i in range(5)])
    splits, names, record, notes = load(tmp_path)
    assert names == ["0", "1"] and len(splits["test"].label) == 6
    assert any("test (no labels)" in note for note in notes)
    assert any("validation split is reported as the test" in note for note in notes)
    assert record["splits"]["test"].endswith("validation.jsonl")
    assert record["splits"]["validation"] == "a part of train"


def test_a_fraction_among_the_labels_of_the_test_split_is_no_class_of_training(tmp_path):
    write(tmp_path, "train.jsonl", sentences(30, label=lambda i: i % 2))
    write(tmp_path, "test.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.0}])
    assert load(tmp_path)[1] == ["0", "0.5", "1"]


def test_several_files_with_other_names_are_refused_and_a_single_one_is_train(tmp_path):
    write(tmp_path, "mine.jsonl", sentences(30))
    assert load(tmp_path)[2]["splits"]["train"].endswith("mine.jsonl")
    write(tmp_path, "yours.jsonl", sentences(30))
    with pytest.raises(InputError, match="no train split, only mine, yours"):
        load(tmp_path)
    for other in ("train.csv", "Train.jsonl", "old/train.jsonl"):
        folder = tmp_path / other.replace("/", "_")
        csv(folder / other, "text,label", "a,0")
        write(folder, "train.jsonl", sentences(30))
        with pytest.raises(InputError, match="two files for one split"):
            load(folder)


@pytest.mark.parametrize(
    "other", ["de/train-00001-of-00002.csv", "en/train.csv", "en/train-00000-of-00001.csv"]
)
def test_only_the_shards_of_one_file_are_one_split(tmp_path, other):
    """Files of another folder, an unsharded one, or another number of shards: it is not guessed which."""
    csv(tmp_path / "en" / "train-00000-of-00002.csv", "text,label", "a,0", "b,1")
    csv(tmp_path / other, "text,label", "c,0", "d,1")
    with pytest.raises(InputError, match="two files for one split"):
        load(tmp_path)


def test_numbers_of_rows_are_not_taken_for_classes_unless_they_are_named(tmp_path):
    """The only column of integers, if all of them differ; a small integer that repeats is a class."""
    path = csv(tmp_path / "mine.csv", "review,id", *(f"review {i},{i}" for i in range(20)))
    with pytest.raises(InputError, match="no text as strings and label as classes.*20 different"):
        load(path)
    assert load(path, label_column="id")[2]["label_column"] == "id"
    stars = csv(tmp_path / "stars.csv", "review,stars", *(f"review {i},{i % 5}" for i in range(20)))
    assert load(stars)[2]["label_column"] == "stars"


def test_files_in_folders_below_are_found_by_the_same_names(tmp_path):
    small_task(tmp_path / "data", train=30, dev=5, test=7)
    for hidden in (".test.jsonl", ".old/test.jsonl"):
        write((tmp_path / hidden).parent, Path(hidden).name, sentences(3))
    sizes, origin, notes = sizes_and_origin(tmp_path)
    assert sizes == {"train": 30, "validation": 5, "test": 7} and notes == []
    (tmp_path / "other" / "train").mkdir(parents=True)
    for part in "ab":
        write(tmp_path / "other" / "train", f"{part}.jsonl", sentences(10))
    with pytest.raises(InputError, match="no train split, only a, b"):
        load(tmp_path / "other")


def test_a_configuration_that_a_folder_does_not_have_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot load .*:small"):
        load(small_task(tmp_path, train=30) + ":small")


def test_shards_of_a_split_are_read_together(tmp_path):
    for i in range(2):
        write(tmp_path, f"train-0000{i}-of-00002.jsonl", sentences(10, 10 * i))
    write(tmp_path, "test.jsonl", sentences(5, 20))
    splits, _, record, _ = load(tmp_path)
    assert len(splits["train"].label) + len(splits["validation"].label) == 20
    assert record["splits"]["train"].count("-of-00002") == 2


def made_splits(rows, folder, max_length=64):
    """The texts, by their hashes, of the test and of the validation split that are made from train."""
    write(folder, "train.jsonl", rows)
    splits = load_task(Source(str(folder)), tuple(NAMES), max_length, {"<pad>": 0})[0]
    return set(splits["test"].text_hash.tolist()), set(splits["validation"].text_hash.tolist())


def test_splits_made_from_train_depend_on_the_texts_alone(tmp_path):
    """Not on the order of rows, nor on the length at which texts are cut; subset and words come later."""
    rows = sentences(300)
    test, validation = made_splits(rows, tmp_path / "a")
    assert 30 <= len(test) <= 31 and 27 <= len(validation) <= 28 and not test & validation
    assert made_splits(rows[::-1], tmp_path / "b", max_length=2) == (test, validation)
    one = data(tmp_path / "a", n_target=20, seed=0, vocab_size=10).record["target"]["fingerprint"]
    other = data(tmp_path / "a", n_target=50, seed=1, max_length=3).record["target"]["fingerprint"]
    assert one == other


def test_equal_texts_stay_together_and_a_made_split_is_at_most_a_fifth(tmp_path):
    """Fifty texts, ten times each; then one text, the first in order of hashes, with 40 % of the rows."""
    write(tmp_path / "a", "train.jsonl", sentences(50) * 10)
    splits = load(tmp_path / "a")[0]
    texts = [set(splits[split].text_hash) for split in NAMES]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 50 and min(map(len, texts)) >= 4
    hashes = np.array([1] * 40 + list(range(2, 62)))
    assert hashes[held_out(hashes)].tolist() == list(range(2, 12))
    hashes = np.repeat(np.arange(6), 10)
    assert hashes[held_out(hashes)].tolist() == [0] * 10  # more than a tenth, less than a fifth


def test_too_few_different_texts_for_a_split_are_refused(tmp_path):
    write(tmp_path, "train.jsonl", sentences(2) * 10)
    with pytest.raises(InputError, match="too few different texts"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_single_file_loads_and_is_split_the_same_way_every_time(tmp_path, kind):
    import datasets

    table, path = datasets.Dataset.from_list(sentences(100)), str(tmp_path / f"mine.{kind}")
    writer = {"jsonl": table.to_json, "json": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}
    writer[kind](path)
    splits, names, record, notes = load(path)
    assert names == ["no", "yes"] and [len(splits[split].label) for split in NAMES] == [81, 9, 10]
    assert len(notes) == 2 and record["splits"]["train"] == path
    write(tmp_path, "same.jsonl", sentences(100))
    assert load(tmp_path / "same.jsonl")[2]["fingerprint"] == record["fingerprint"]  # of any format


def test_a_folder_like_glue_loads_with_configuration_pairs_and_label_names(tmp_path):
    """Named configurations in a README, two text columns, integer labels with names, a test split without
    labels."""
    from datasets import ClassLabel, Dataset, Features, Value

    label = ClassLabel(names=["entailment", "not_entailment"])
    strings = {"sentence1": Value("string"), "sentence2": Value("string")}
    features = Features(strings | {"idx": Value("int32"), "label": label})
    (tmp_path / "rte").mkdir()
    for split, n in (("train", 50), ("validation", 8), ("test", 9)):
        rows = [
            {"sentence1": f"{split} one {i}", "sentence2": f"two {i}", "idx": i, "label": i % 2}
            for i in range(n)
        ]
        rows = [row | {"label": -1} for row in rows] if split == "test" else rows
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rte" / f"{split}-00000.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: rte/{s}-*\n" for s in ("train", "validation", "test"))
        + "- config_name: other\n  data_files:\n  - split: train\n    path: rte/train-*\n---\n"
    )
    with pytest.raises(InputError, match="more than one choice.*sentence1.*label .int64, 2 different"):
        load(f"{tmp_path}:rte")
    word_id = {word: i for i, word in enumerate(SPECIAL)}
    splits, names, record, notes = load(f"{tmp_path}:rte", ["sentence1", "sentence2"], word_id=word_id)
    assert names == ["entailment", "not_entailment"] and record["label_column"] == "label"
    assert [len(splits[split].label) for split in NAMES] == [45, 5, 8]
    assert texts_of(splits["test"], list(word_id))[3] == "validation one 3 <sep> two 3"
    assert splits["test"].label.tolist() == [0, 1] * 4
    assert any("test (no labels)" in note for note in notes)
    with pytest.raises(InputError, match="nope"):
        load(f"{tmp_path}:nope")


# ---- notes and record


def test_each_of_these_surprises_has_a_note_and_good_data_have_none(tmp_path):
    train, test = sentences(300), sentences(120, 500)
    held_out = {"validation": sentences(100, 400), "test": test}

    def notes(max_length=64, n_target=0, **splits):
        for split, rows in ({"train": train} | held_out | splits).items():
            write(tmp_path, f"{split}.jsonl", rows)
        return " | ".join(data(tmp_path, n_target=n_target, max_length=max_length).notes)

    assert notes() == ""
    unseen = [{"text": f"new {i}", "label": "maybe"} for i in range(3)]
    assert "1 of 3 classes have no training example, but 3 test texts: maybe" in notes(test=test + unseen)
    many = [row | {"label": str(i % 30)} for i, row in enumerate(train)]
    assert "30 of 32 classes have no training example" in notes(train=many, n_target=2)
    assert "2 of the test texts also occur among the training" in notes(test=test + sentences(2))
    assert "3 of the test texts also occur among the training" in notes(test=test + sentences(1) * 3)
    assert "100% of the training texts are longer than max_length" in notes(max_length=4)
    assert "longer" not in notes(max_length=5)
    assert "only 7 test texts" in notes(test=test[:7])
    assert "only 9 validation texts" in notes(validation=held_out["validation"][:9])
    rare = [row | {"label": "yes" if i == 0 else "no"} for i, row in enumerate(test)]
    assert "99.2% of the test texts are of class no" in notes(test=rare)


def test_the_record_describes_both_tasks_and_can_be_written_as_json(tmp_path):
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    aux = small_task(tmp_path / "a", train=40)
    record = json.loads(json.dumps(data(target, aux, n_target=10, max_length=4).record))
    about = record["target"]
    assert about["examples"] == {"train": 10, "validation": 5, "test": 5}
    assert about["labels"] == {"no": 5, "yes": 5}
    assert about["text_columns"] == ["text"] and about["label_column"] == "label"
    assert about["splits"] == {split: f"{target}/{split}.jsonl" for split in NAMES}
    assert record["auxiliary"]["examples"] == {"train": 30}  # ten are held out of the target
    assert set(record["target"]["fingerprint"]) == set(NAMES) and set(record["unknown"]) == {"train", "test"}
    assert record["cut"] == 1.0


def test_the_share_of_cut_texts_is_that_of_the_training_subset(tmp_path):
    """Three of twenty texts are long: of ten texts, another share is."""
    target = small_task(tmp_path, train=20, validation=5, test=5)
    rows = sentences(20)
    long = [row | {"text": f"long {row['text']}"} for row in rows[:3]]
    write(tmp_path, "train.jsonl", [*long, *rows[3:]])
    read = data(target, n_target=10, max_length=5)
    share = np.mean([text.startswith("long") for text in texts_of(read.train, read.vocab)])
    assert read.record["cut"] == pytest.approx(share)


def test_the_fingerprint_changes_with_every_text_and_label_and_with_the_order_of_rows(tmp_path):
    """Also with a word beyond max_length, and for two labels swapped: whatever a run could depend on."""
    rows = sentences(40)

    def fingerprint(rows):
        write(tmp_path, "train.jsonl", rows)
        write(tmp_path, "test.jsonl", sentences(9, 90))
        write(tmp_path, "validation.jsonl", sentences(9, 80))
        return data(tmp_path, max_length=3, n_target=10).record["target"]["fingerprint"]["train"]

    other = [dict(row) for row in rows]
    other[7]["text"] += " indeed"
    swapped = [dict(row) for row in rows]
    swapped[0]["label"], swapped[1]["label"] = rows[1]["label"], rows[0]["label"]
    renamed = [row | {"label": row["label"] + "!"} for row in rows]
    changed = (other, swapped, renamed, rows[1:], rows[::-1])
    assert len({fingerprint(r) for r in (rows, *changed)}) == 6


# ---- files


def test_words_of_a_csv_that_other_programs_take_for_missing_are_words(tmp_path):
    lines = ["NA,None", "null,NA", *(f"some words {i},None\nmore words {i},NA" for i in range(9))]
    path = csv(tmp_path / "a [1]" / "b [1].csv", "text,label", *lines)  # and brackets are brackets
    word_id = {word: i for i, word in enumerate(SPECIAL)}
    assert load(path, word_id=word_id)[1] == load(path.parent)[1] == ["NA", "None"]
    assert {"na", "null"} <= set(word_id)


@pytest.mark.parametrize("line, what", [(",y", "text"), ("b,", "label")])
def test_an_empty_cell_of_a_csv_is_missing(tmp_path, line, what):
    path = csv(tmp_path / "train.csv", "text,label", "a,x", line, "c,y")
    with pytest.raises(InputError, match=f"row 2 of .*train.csv has no {what}"):
        load(path)


@pytest.mark.parametrize("line", ['{"text": "a", "label": }', "not json", '{"text": "a", "label": "x"'])
def test_an_unreadable_json_line_is_named_by_its_number(tmp_path, line):
    good = '{"text": "a", "label": "x"}\n'
    (tmp_path / "train.jsonl").write_text(2 * good + line + "\n" + good)
    with pytest.raises(InputError, match="train.jsonl, line 3: "):
        load(tmp_path)


@pytest.mark.parametrize("encoding, line", [("latin-1", 2), ("utf-16", 1)])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_that_is_not_utf_8_is_named_with_the_line(tmp_path, kind, encoding, line):
    rows = ["text,label", "café,x"] if kind == "csv" else ['{"text": "a"}', '{"text": "café"}']
    (tmp_path / f"train.{kind}").write_bytes("\n".join(rows).encode(encoding))
    with pytest.raises(InputError, match=f"train.{kind}, line {line}: 'utf-8' codec"):
        load(tmp_path)


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("text", ["one or two", "one, or two", "one, two, or three"])
def test_another_separator_is_recognised(tmp_path, separator, text):
    """Whether the texts hold commas or not, the message says that columns are separated by them."""
    path = csv(tmp_path / "train.csv", f"text{separator}label", f"a{separator}x", f"{text}{separator}y")
    with pytest.raises(InputError, match="separated by commas"):
        load(path)


def test_a_csv_with_more_columns_than_its_header_is_refused(tmp_path):
    """The library would take the first part of every text for a row's name, and drop it in silence."""
    lines = [f"the soup, a delight {i},{i % 2}" for i in range(10)]
    with pytest.raises(InputError, match="line 2: 3 columns, but 2 in the header"):
        load(csv(tmp_path / "train.csv", "text,label", *lines))
    quoted = [f'"the soup, a delight {i}",{i % 2}' for i in range(10)]
    load(csv(tmp_path / "quoted.csv", "text,label", *quoted), word_id=(word_id := {}))
    assert "soup" in word_id


def test_a_csv_without_a_header_is_refused_unless_its_columns_are_named(tmp_path):
    """Its first row would be lost, and its values would be names."""
    (tmp_path / "bare.csv").write_text("".join(f"text {i},{i % 2}\n" for i in range(40)))
    with pytest.raises(InputError, match=r"Columns .*text 0 \(.*, 0 \(int64, 2 different, first '1'\)"):
        load(str(tmp_path / "bare.csv"))


def test_a_line_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"text": "a", "label": "b"}\n' + "[" * 100_000)
    with pytest.raises(InputError, match="cannot load .*deep.jsonl, line 2: "):
        load(str(tmp_path / "deep.jsonl"))


def test_missing_things_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec in ("none", "./none", "../none", "none.jsonl", "a/none.CSV", "data/none", "", "a/b/c", "x [1]"):
        with pytest.raises(InputError, match="no such file or folder: "):
            load(spec)
    write(tmp_path, "here.csv", [])
    with pytest.raises(InputError, match="no such file or folder: 'here.csv:part'"):
        load("here.csv:part")  # a file has no configurations
    for flag in ({"text_columns": ["text"]}, {"label_column": "label"}):
        with pytest.raises(InputError, match="reviews:film has one text and one label"):
            load("reviews:film", **flag)
    with pytest.raises(InputError, match="owner/name .*looked for on the hub"):
        load("owner/name")
    with pytest.raises(InputError, match="reviews:restaurant and reviews:film, not reviews:book"):
        load("reviews:book")
    with pytest.raises(InputError, match="cannot load ."):
        load(".")
    (tmp_path / "here.tsv").write_text("text\tlabel\n")
    with pytest.raises(InputError, match="only .jsonl, .json, .csv, .parquet"):
        load("here.tsv")


def test_a_subset_larger_than_the_data_is_refused(tmp_path):
    target = small_task(tmp_path, train=20, validation=5, test=5)
    for n in (1, 99):
        with pytest.raises(InputError, match=f"n_target {n}: of 20 training"):
            data(target, n_target=n)
