"""Claims about the second task and about data (transfer.py)."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from model import PAD, words
from transfer import (
    InputError,
    aux_weight_at,
    batch_order,
    couple,
    epoch_order,
    limited_subset,
    load_task,
    prepare,
    reviews,
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


def load(spec, text_columns=None, label_column=None):
    return load_task(str(spec), text_columns, label_column, 64, {"<pad>": 0, "<unk>": 1, "<sep>": 2})


def said(word_id, examples, i):
    known = list(word_id)
    return [known[t] for t in examples.tokens[examples.start[i] : examples.start[i + 1]]]


# ---- when, what, how


def test_aux_weight_is_on_exactly_in_its_window():
    assert [aux_weight_at(s, 0.5, 3, 6) for s in range(8)] == [0, 0, 0, 0.5, 0.5, 0.5, 0, 0]


def test_transferred_names_what_the_auxiliary_gradient_may_touch():
    assert [transferred(["w"], ["g"], what) for what in ("weights", "gates", "both")] == [
        ["w"],
        ["g"],
        ["w", "g"],
    ]


@pytest.mark.parametrize("seed", range(10))
def test_projection_never_points_against_the_target_and_equals_the_sum_when_they_agree(seed):
    """The auxiliary part of the update has inner product >= 0 with the target gradient (1e-4: float32
    rounding)."""
    generator = torch.Generator().manual_seed(seed)
    g_target = [torch.randn(shape, generator=generator) for shape in [(5, 4), (7,), ()]]
    g_aux = [torch.randn(t.shape, generator=generator) for t in g_target]
    flat = lambda tensors: torch.cat([t.flatten() for t in tensors])
    dot = flat(g_target) @ flat(g_aux)
    aux_part = flat(couple(g_target, g_aux, "project")) - flat(g_target)
    assert aux_part @ flat(g_target) > -1e-4
    if dot < 0:  # what is left is the orthogonal part, by Gram-Schmidt
        expected = flat(g_aux) - dot / flat(g_target).square().sum() * flat(g_target)
        torch.testing.assert_close(aux_part, expected, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(
            flat(couple(g_target, g_aux, "project")), flat(couple(g_target, g_aux, "sum"))
        )
    torch.testing.assert_close(flat(couple(g_target, g_aux, "sum")), flat(g_target) + flat(g_aux))


def test_coupling_nothing_is_nothing():
    """With --transfer gates nothing is shared outside the pruning phase."""
    assert couple([], [], "project") == couple([], [], "sum") == []


def test_the_auxiliary_task_may_have_other_columns_than_the_target(tmp_path):
    """Names given for the target are used for the auxiliary task only if it has them."""
    write(tmp_path / "t", "train.jsonl", [{"a": f"w{i}", "b": "x", "kind": i % 2} for i in range(30)])
    aux = small_task(tmp_path / "a", train=20)
    data = prepare(str(tmp_path / "t"), aux, 0, 64, 1000, ["a"], ["kind"])
    assert data.labels == {"target": ["0", "1"], "auxiliary": ["no", "yes"]} and len(data.aux.label) == 20


def test_a_test_split_of_minus_ones_adds_no_class(tmp_path):
    write(tmp_path, "train.jsonl", sentences(30, label=lambda i: i % 2))
    write(tmp_path, "test.jsonl", sentences(5, 50, label=lambda i: -1))
    splits, names, notes = load(tmp_path)
    assert names == ["0", "1"] and any("no labels" in note for note in notes)


def test_projection_without_a_target_gradient_is_the_auxiliary_gradient():
    zero, g_aux = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 3.0])]
    assert couple(zero, g_aux, "project")[0].tolist() == [1, -2, 3]


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


def test_the_subset_is_the_same_with_and_without_a_second_task(tmp_path):
    target = small_task(tmp_path / "t", train=60, validation=10, test=10)
    aux = small_task(tmp_path / "a", train=60)
    alone, helped = (prepare(target, a, 20, 64, 1000, seed=3) for a in ("none", aux))
    text = lambda d: [
        [d.vocab[t] for t in d.train.tokens[a:b]] for a, b in zip(d.train.start, d.train.start[1:])
    ]
    assert text(alone) == text(helped) and alone.train.label.tolist() == helped.train.label.tolist()


def test_auxiliary_examples_of_the_held_out_splits_are_dropped_and_counted(tmp_path):
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)  # sentences 0-19, 20-24, 25-29
    same = {"text": "SENTENCE  number 22 of many", "label": "no"}
    write(tmp_path / "a", "train.jsonl", [*sentences(40, 10), same])
    data = prepare(target, str(tmp_path / "a"), 0, 64, 1000)
    assert len(data.aux.label) == 30
    assert any("dropped 11 auxiliary" in note for note in data.notes)
    numbers = {data.vocab[t] for t in data.aux.tokens}
    assert not numbers & {str(i) for i in range(20, 30)} and {str(i) for i in range(30, 50)} <= numbers


def test_the_vocabulary_holds_training_words_only_most_frequent_first(tmp_path):
    target = small_task(tmp_path / "t", train=20, validation=5, test=5)
    data = prepare(target, "none", 10, 64, 1000)
    assert data.vocab[:3] == ["<pad>", "<unk>", "<sep>"]
    assert set(data.vocab[3:7]) == {"sentence", "number", "of", "many"}
    assert len(data.vocab) == 3 + 4 + 10 and not {str(i) for i in range(20, 30)} & set(data.vocab)
    assert prepare(target, "none", 10, 64, 5).vocab[3:] == data.vocab[3:5]
    assert (data.test.tokens == 1).sum() == 5  # the numbers, unknown


# ---- order and batches


def test_every_epoch_visits_every_example_once_and_the_order_is_a_function_of_seed_and_step(tmp_path):
    data = prepare(small_task(tmp_path, train=70, validation=5, test=5), "none", 0, 64, 1000)
    order = batch_order(data.train, 7, seed=1)
    seen = np.concatenate([order(step) for step in range(30)])
    for epoch in range(3):
        assert sorted(seen[70 * epoch : 70 * (epoch + 1)]) == list(range(70))
    assert (batch_order(data.train, 7, seed=1)(17) == order(17)).all()
    assert (batch_order(data.train, 7, seed=2)(17) != order(17)).any()
    assert len(batch_order(data.train, 200, seed=1)(0)) == 200  # a batch may be larger than the data


def test_neighbours_in_the_order_have_similar_lengths():
    """Padding to the longest of a batch wastes little: under 10 % against over 40 % in a random order."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 60, size=4096)
    waste = lambda order: (
        1 - length.sum() / sum(32 * length[order[i : i + 32]].max() for i in range(0, 4096, 32))
    )
    assert waste(epoch_order(length, 32, rng)) < 0.1 and waste(rng.permutation(4096)) > 0.4


def test_batches_are_padded_to_their_own_longest_text(tmp_path):
    rows = [{"text": "a b c d e", "label": "x"}, {"text": "f", "label": "y"}, {"text": "g h", "label": "x"}]
    write(tmp_path, "train.jsonl", rows)
    word_id = {"<pad>": 0, "<unk>": 1, "<sep>": 2}
    train = load_task(str(tmp_path), None, None, 64, word_id, ("train",))[0]["train"]
    ids, labels = train.batch(np.array([1, 2]))
    assert ids.tolist() == [[word_id["f"], PAD], [word_id["g"], word_id["h"]]] and labels.tolist() == [1, 0]


# ---- loading


def test_a_folder_like_glue_loads_with_configuration_pairs_and_label_names(tmp_path):
    """Named configurations in a README, two text columns, integer labels with names, a test split without
    labels: the validation split is then reported, a fixed part of train is used for selection, and a note
    says both."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "idx": Value("int32"),
            "label": ClassLabel(names=["entailment", "not_entailment"]),
        }
    )
    for split, n, label in (
        ("train", 50, lambda i: i % 2),
        ("validation", 8, lambda i: i % 2),
        ("test", 9, lambda i: -1),
    ):
        rows = [
            {"sentence1": f"{split} one {i}", "sentence2": f"two {i}", "idx": i, "label": label(i)}
            for i in range(n)
        ]
        (tmp_path / "rte").mkdir(exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rte" / f"{split}-00000.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: rte/{s}-*\n" for s in ("train", "validation", "test"))
        + "- config_name: other\n  data_files:\n  - split: train\n    path: rte/train-*\n---\n"
    )
    word_id = {"<pad>": 0, "<unk>": 1, "<sep>": 2}
    splits, names, notes = load_task(f"{tmp_path}:rte", None, None, 64, word_id)
    assert names == ["entailment", "not_entailment"]
    assert [len(splits[s].label) for s in ("train", "validation", "test")] == [45, 5, 8]
    assert said(word_id, splits["test"], 3) == ["validation", "one", "3", "<sep>", "two", "3"]
    assert said(word_id, splits["validation"], 0)[0] == "train"
    assert splits["test"].label.tolist() == [0, 1] * 4
    assert any("test split" in n and "no labels" in n for n in notes) and any(
        "validation split is reported" in n for n in notes
    )
    with pytest.raises(InputError, match="nope"):
        load(f"{tmp_path}:nope")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_single_file_loads_and_is_split_the_same_way_every_time(tmp_path, kind):
    import datasets

    table, path = datasets.Dataset.from_list(sentences(100)), str(tmp_path / f"mine.{kind}")
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    splits, names, notes = load(path)
    sizes = [len(splits[split].label) for split in ("train", "validation", "test")]
    assert names == ["no", "yes"] and sizes == [81, 10, 9]
    assert len(notes) == 2
    assert (load(path)[0]["test"].tokens == splits["test"].tokens).all()


def test_splits_that_are_made_from_train_never_share_a_text(tmp_path):
    """Fifty texts, ten times each: all ten land in the same split."""
    write(tmp_path, "train.jsonl", sentences(50) * 10)
    splits = load(tmp_path)[0]
    texts = [set(splits[split].texts()) for split in ("train", "validation", "test")]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 50 and min(map(len, texts)) >= 4


def test_a_test_text_that_is_also_trained_on_is_counted_in_a_note(tmp_path):
    target = small_task(tmp_path, train=20, validation=5, test=5)
    assert not any("among the training" in note for note in prepare(target, "none", 0, 64, 1000).notes)
    write(tmp_path, "test.jsonl", sentences(4, 18))  # two old, two new
    notes = prepare(target, "none", 0, 64, 1000).notes
    assert "2 of the test texts also occur among the training examples" in notes


def test_words_of_a_csv_that_other_programs_take_for_missing_are_words(tmp_path):
    path = tmp_path / "a [1].csv"  # and brackets in a file name are brackets
    path.write_text("text,label\nNA,None\nnull,NA\nsome words,None\n" + "more words,NA\n" * 9)
    word_id = {"<pad>": 0, "<unk>": 1, "<sep>": 2}
    assert load_task(str(path), None, None, 64, word_id)[1] == ["NA", "None"]
    assert {"na", "null"} <= set(word_id)


def test_columns_are_found_by_name_and_type_or_named(tmp_path):
    rows = [{"question": f"what {i}", "coarse": i % 2, "fine": f"f{i % 3}", "n": i} for i in range(30)]
    write(tmp_path, "train.jsonl", rows)
    with pytest.raises(InputError, match="--label_column.*question, coarse, fine, n"):
        load(tmp_path)
    with pytest.raises(InputError, match="no column 'missing'"):
        load(tmp_path, label_column="missing")
    with pytest.raises(InputError, match="no column 'absent'"):
        load(tmp_path, ["absent"], "coarse")
    with pytest.raises(InputError, match="'n' .* not text"):
        load(tmp_path, ["n"], "coarse")
    assert load(tmp_path, ["question"], "fine")[1] == ["f0", "f1", "f2"]
    assert load(tmp_path, label_column="coarse")[1] == ["0", "1"]  # with both columns of strings as texts
    with pytest.raises(InputError, match="no column 'misspelt'"):  # named for the auxiliary task alone
        prepare("reviews:film", str(tmp_path), 20, 64, 1000, label_column=["label", "misspelt"])
    with pytest.raises(InputError, match="--label_column"):  # the target's names are optional there
        prepare("reviews:film", str(tmp_path), 20, 64, 1000, label_column=["label"])


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "a", "label": }', "line 3: "),
        ("not json", "line 3: "),
        ('{"text": "a", "label": "x"', "line 3: "),
        ('{"text": "a", "label": "\xff"}'.encode("latin-1"), "line 3: .*utf-8"),
    ],
)
def test_an_unreadable_json_line_is_named_by_its_number(tmp_path, line, reason):
    good = b'{"text": "a", "label": "x"}\n'
    (tmp_path / "train.jsonl").write_bytes(
        2 * good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good
    )
    with pytest.raises(InputError, match=reason):
        load(tmp_path)


@pytest.mark.parametrize(
    "rows, reason",
    [
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": None}],
            "example 2 of the train split .* no label",
        ),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], "holds float64.* empty"),
        ([{"text": "a", "label": ["x"]}, {"text": "b", "label": ["y"]}], "label"),
        ([{"text": 1, "label": "x"}, {"text": 2, "label": "y"}], "--text_columns"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}] * 9, "single class .* has x"),
        ([{"label": "x"}, {"label": "y"}], "--text_columns"),
        ([{"text": "a"}, {"text": "b"}], "--label_column"),
        ([], "cannot load|empty"),
    ],
)
def test_unusable_rows_are_refused_with_the_reason(tmp_path, rows, reason):
    write(tmp_path, "train.jsonl", rows)
    with pytest.raises(InputError, match=reason):
        load(tmp_path)


def test_missing_things_are_refused_at_once(tmp_path):
    for spec in ("reviews:book", str(tmp_path / "none"), "./none.jsonl", "none.csv", "../none", ""):
        with pytest.raises(InputError, match="none|book|no such file or folder: ''"):
            load(spec)
    (tmp_path / "here.tsv").write_text("text\tlabel\n")
    with pytest.raises(InputError, match="only .jsonl, .json, .csv and .parquet"):  # and not asked of the hub
        load(tmp_path / "here.tsv")
    with pytest.raises(InputError, match="n_target 99: .* 20 training"):
        prepare(small_task(tmp_path, train=20, validation=5, test=5), "none", 99, 64, 1000)
