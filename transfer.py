"""Two tasks: what they say, and how the auxiliary one may teach the network that is pruned for the other.

First three small functions for the three questions: `aux_weight_at` (when), `transferred` (what), `couple`
(how). Then data: `reviews` is the built-in pair of tasks, `load_task` reads it or anything the `datasets`
library loads, and `prepare` turns a target and an auxiliary task into arrays of word ids, takes the limited
training subset and drops auxiliary examples that would leak. Last, the order of the batches.

Left out on purpose: more than two tasks, tasks that are not classification, tokenizers other than words.
"""

import csv
import hashlib
import json
import logging
import os
import random
import re
from array import array
from functools import lru_cache
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import PAD, SPECIAL, UNK, normalise, words

# ----------------------------------------------------------------------------- when, what, how


def aux_weight_at(step, aux_weight, transfer_start, transfer_stop):
    """When: weight of the auxiliary loss, `aux_weight` for transfer_start <= step < transfer_stop, else 0."""
    return aux_weight if transfer_start <= step < transfer_stop else 0.0


def transferred(parameters, transfer):
    """What: the parameters that the auxiliary gradient may touch, by the value of --transfer.

    parameters: name -> parameter of the network and, as "log_alpha", of the gates; returns some of them. The
    auxiliary classifier always learns (and counts in the norm by which the weights' gradient is clipped). To
    share only some layers, test the name here.
    """

    def reached(name):
        if name.startswith("classifier."):
            return name.startswith("classifier.auxiliary.")
        return transfer == "both" or transfer == ("gates" if name == "log_alpha" else "weights")

    return {name: p for name, p in parameters.items() if reached(name)}


def couple(g_target, g_aux, coupling):
    """How: combine two gradients, each name -> tensor, into the update direction.

    "sum" adds them. "project" first removes from g_aux its component against g_target if their inner product
    is negative: to first order, and before the optimizer rescales it, what is left does not harm the target.
    One inner product over all that both gradients touch; what only one of them touches passes unchanged.
    Auxiliary Task Update Decomposition (Dery et al. 2021) weights three parts of g_aux by eta: orthogonal to
    g_target, along it, and against it. "sum" is eta = (1, 1, 1); "project", with g_target as the only basis
    vector, is (1, 1, 0), a one-sided form of the projection of Yu et al. 2020.
    """
    both = [name for name in g_aux if name in g_target]
    update = g_target | g_aux | {name: g_target[name] + g_aux[name] for name in both}
    if coupling == "project" and both:
        dot = sum(torch.sum(g_aux[name] * g_target[name]) for name in both)
        norm = sum(torch.sum(g_target[name] ** 2) for name in both)
        scale = (dot / norm.clamp(min=1e-30)).clamp(max=0)  # 0 where the tasks agree
        update |= {name: update[name] - scale * g_target[name] for name in both}
    return update


# ----------------------------------------------------------------------------- the built-in task

NOUNS = {
    "restaurant": """soup waiter dessert pasta service steak wine bread salad chef kitchen curry pizza menu
        table coffee fish sauce cook breakfast lunch dinner cake burger rice""",
    "film": """plot actor script director ending dialogue music camera cast comedy hero villain scene sequel
        drama editing story heroine opening thriller costume soundtrack acting finale romance""",
}
PRAISE = {
    "restaurant": "fresh crispy juicy tender tasty delicious fragrant creamy",
    "film": "gripping suspenseful well-acted witty hilarious touching thrilling cinematic",
    "shared": """good great fine superb splendid lovely wonderful excellent perfect brilliant amazing awesome
        fantastic terrific fabulous marvellous magnificent outstanding exceptional remarkable impressive
        stunning delightful charming pleasant enjoyable agreeable likeable admirable commendable praiseworthy
        exquisite elegant graceful refined polished stylish classy tasteful beautiful gorgeous attractive
        appealing inviting engaging captivating enchanting fascinating refreshing original inventive
        imaginative creative clever smart ingenious skilful masterful accomplished competent capable reliable
        dependable solid sound strong robust honest sincere genuine authentic warm friendly kind gentle
        generous thoughtful considerate attentive careful precise flawless faultless impeccable immaculate
        sublime divine heavenly glorious dazzling radiant vibrant lively cheerful joyful uplifting inspiring
        memorable unforgettable satisfying rewarding worthwhile valuable welcome decent""",
}
BLAME = {
    "restaurant": "stale soggy bland greasy burnt undercooked rancid tasteless",
    "film": "clichéd predictable far-fetched humourless overlong wooden melodramatic plotless",
    "shared": """bad poor awful terrible horrible dreadful dire lousy rotten atrocious abysmal appalling
        disgusting revolting repulsive nasty unpleasant disagreeable annoying irritating infuriating maddening
        tiresome tedious boring dull dreary monotonous lifeless flat weak feeble flimsy shoddy sloppy careless
        clumsy awkward inept incompetent amateurish crude coarse vulgar tacky cheap ugly hideous unsightly
        repellent offensive insulting rude arrogant hostile cold unfriendly mean cruel heartless insincere
        dishonest fake phony pretentious pompous shallow empty hollow pointless useless worthless hopeless
        pathetic pitiful miserable depressing dismal gloomy bleak grim disappointing unsatisfying
        underwhelming mediocre inferior substandard deficient defective faulty flawed messy chaotic confusing
        incoherent unbearable intolerable insufferable forgettable regrettable lamentable deplorable
        disastrous catastrophic ridiculous absurd""",
}


def review(rng, domain):
    """A sentence about a restaurant or a film, and the polarity of its main clause."""

    def clause(positive):
        negated = rng.random() < 0.3
        adjectives = PRAISE if positive != negated else BLAME
        opinion = rng.choice(adjectives[domain if rng.random() < 0.15 else "shared"].split())
        verb = rng.choice(["was not", "wasn't", "was hardly"] if negated else ["was", "was very", "seemed"])
        return f"the {rng.choice(NOUNS[domain].split())} {verb} {opinion}"

    positive = rng.random() < 0.5
    text = clause(positive)
    if rng.random() < 0.5:  # contrast: the other clause says the opposite, and the main clause decides
        other = f"{rng.choice(['although', 'though', 'even though', 'while'])} {clause(not positive)}"
        text = rng.choice([f"{other}, {text}", f"{text}, {other}"])
    return text, "positive" if positive else "negative"


def reviews(domain):
    """The built-in, synthetic task: split name -> list of (text, label name), no sentence twice."""
    rng, unique = random.Random(domain), {}
    while len(unique) < 8500:
        unique.update([review(rng, domain)])
    pairs = list(unique.items())
    return {"train": pairs[:6000], "validation": pairs[6000:6500], "test": pairs[6500:]}


# ----------------------------------------------------------------------------- any other task


class InputError(Exception):
    """The user's input cannot be used; the message is one line that says what to change."""


class Source(NamedTuple):
    """A task as the user names it."""

    spec: str  # "reviews:film", "owner/name", "owner/name:config", or a local file or folder
    text_columns: list | None = None  # None = to be found
    label_column: str | None = None  # None = to be found
    flag: str = ""  # "aux_" for the auxiliary task: messages then name --aux_text_columns


KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NAMES = {"train": ["train"], "validation": ["validation", "val", "dev", "eval", "valid.*"], "test": ["test"]}


def check_lines(file):
    """Raise InputError, with the number of the line, for a text file that is not UTF-8 or not JSON Lines.

    The library counts lines from the start of a block, and lets some other encodings pass.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                if text and file.lower().endswith(".jsonl"):
                    json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"cannot load {file}, line {number}: {error}") from None


def check_columns(file):
    """Raise InputError if a row of a CSV is wider than its header: the library may shift the whole row."""
    csv.field_size_limit(2**31 - 1)
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)
        width = len(next(reader, []))
        for row in reader:
            if len(row) > width:
                raise InputError(
                    f"cannot load {file}, line {reader.line_num}: {len(row)} columns, but {width} in the "
                    "header; columns are separated by commas, texts with commas need quotes"
                )


def read(spec, loader, **options):
    """What `datasets.load_dataset` returns; it runs no code of a data set. Raises InputError."""
    import datasets  # here, not above: importing it takes longer than the built-in task takes to load

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel("CRITICAL")  # what went wrong is said once, in the InputError
    try:
        return datasets.load_dataset(loader, **options)
    except Exception as error:  # the library raises dozens of types here, down to those of its file readers
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"cannot load {spec}: {reason or 'a file is empty or unreadable'}") from None


def read_files(files):
    """A Dataset of the rows of local files of one kind. Raises InputError."""
    kind, options = KINDS[Path(files[0]).suffix.lower()], {}
    for file in files if kind != "parquet" else []:
        check_lines(file)
        if kind == "csv":
            check_columns(file)
            options = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are words
    return read(files[0], kind, data_files=[escape(file) for file in files], split="train", **options)


def files_by_name(folder):
    """The data files under a folder, {"train": ["folder/Train.csv"], ...}; a split's shards share a name.

    Empty if there are none, or if a README.md lists them: then the library knows better. Raises InputError.
    """
    files, made_of, readme = {}, {}, Path(folder, "README.md")
    if readme.exists() and "configs:" in readme.read_text(errors="replace"):
        return {}
    for file in sorted(map(Path, glob(f"{escape(folder)}/**/*", recursive=True))):  # finds nothing hidden
        if file.suffix.lower() in KINDS and file.is_file():
            whole = file.with_name(re.sub(r"-\d{5}-of-", "-of-", file.name))  # the same for all its shards
            name = re.sub(r"-of-\d{5}$", "", whole.stem).lower()
            if made_of.setdefault(name, whole) != whole:
                raise InputError(f"two files for one split: {files[name][0]} and {file}")
            files.setdefault(name, []).append(str(file))
    return files


def find_splits(spec):
    """The splits of a data set by name, each a Dataset or a list of files. Raises InputError.

    spec: a file or folder, with ":config" if a README.md names configurations; else a name on the hub.
    """
    name, _, config = (spec, "", "") if os.path.exists(spec) else spec.partition(":")
    files = files_by_name(name) if os.path.isdir(name) and not config else {}
    if os.path.isfile(name) and not config:
        if Path(name).suffix.lower() not in KINDS:
            raise InputError(f"cannot load {name}: only {', '.join(KINDS)} files are read")
        files = {"train": [name]}
    elif not os.path.isdir(name):
        hub_like = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).parent.exists()
        if not hub_like or Path(name).suffix.lower() in KINDS:  # the hub can take long to say no
            raise InputError(f"no such file or folder: {spec!r}")
        spec += " (no file or folder; looked for on the hub)"
    return files or dict(read(spec, name, name=config or None))


def may_be_class(kind, values):
    """Can these values of a column be names of classes? Fractions, dates and nested values cannot."""
    if "float" in kind:
        return all(value is None or value != value or value.is_integer() for value in values[:])
    return "string" in kind or "int" in kind or "bool" in kind


def find_columns(table, source):
    """The text columns (a list) and the label column of a Dataset: as the user named them, else found.

    Found are "text" and "label". Without them, a column of strings is the text and one that can hold classes
    is the label, if there is exactly one such pair: nothing is guessed. No column of which all values differ
    is taken for a label, and none whose name is one of its values. Raises InputError with all columns.
    """
    kinds = {column: getattr(f, "dtype", "nested or mixed") for column, f in table.features.items()}
    strings = [column for column in kinds if "string" in kinds[column]]
    classes = [column for column in kinds if may_be_class(kinds[column], table[column])]
    text = source.text_columns or (["text"] if "text" in kinds else None)
    label = source.label_column or ("label" if "label" in kinds else None)
    texts = [text] if text else [[column] for column in strings]
    labels = [label] if label else classes
    pairs = [(t, c) for t in texts for c in labels if c not in t and c in classes and set(t) <= set(strings)]
    if len(pairs) == 1:
        found = pairs[0][1]
        values = set(map(str, table[found][:]))
        if label or (len(values) < len(table) and found not in values):  # a header without names is a row
            return pairs[0]
    listed = []
    for column, kind in kinds.items():
        values = [str(value) for value in table[column][:]]
        listed.append(f"{column[:40]} ({kind}, {len(set(values))} different, first {values[0][:30]!r})")
    reason = "more than one choice of" if len(pairs) > 1 else "no"
    flags = f"--{source.flag}text_columns and --{source.flag}label_column"
    line = f"""{reason} {text or 'text'} as strings and {label or 'label'} as classes in {source.spec}: name
        them with {flags}. Columns (of a CSV, separated by commas): {', '.join(listed)}"""
    raise InputError(" ".join(line.split()))


def class_name(value, names):
    """The name of a class, None if there is none. names: of its numbers, or None; 3.0 is "3", " a" is "a"."""
    if value is None or value != value or (names and value < 0):  # nan is not equal to itself
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return names[value] if names else str(value).strip() or None


def texts_and_labels(table, text_columns, label_column):
    """Two lists from a Dataset, tuples of strings and names of classes; None where one is missing."""
    names = getattr(table.features.get(label_column), "names", None)
    labels = table[label_column][:] if label_column in table.features else [None] * len(table)
    texts = zip(*(table[column][:] for column in text_columns))
    texts = [None if None in text else tuple(str(part) for part in text) for text in texts]
    return texts, [class_name(label, names) for label in labels]


def open_splits(source, wanted):
    """The rows of the wanted splits of a data set, what is recorded about them, and notes. Raises InputError.

    Returns {split: list of (text, class name)}, {"text_columns": ..., "label_column": ..., "splits": {split:
    where it came from}}, and a list of lines. A split without labels (absent, null or -1) is not used.
    """
    found = find_splits(source.spec)
    named = {split: [name for pattern in patterns for name in found if re.fullmatch(pattern, name.lower())]
             for split, patterns in NAMES.items()}
    if len(found) == 1 and not any(named.values()):
        named["train"] = list(found)
    if not named["train"]:
        raise InputError(f"{source.spec} has no train split, only {', '.join(found)}: name one file train")
    opened, origin, unused = {}, {}, dict.fromkeys(found, "")
    for split in wanted:  # train comes first: it decides the columns
        for name in named[split]:
            table, where = found[name], f"split {name} of {source.spec}"
            if isinstance(table, list):
                table, where = read_files(table), ", ".join(table)
            if split == "train":
                text_columns, label_column = find_columns(table, source)
            elif not set(text_columns) <= set(table.features):
                raise InputError(f"{where} has no column {', '.join(text_columns)}")
            texts, labels = texts_and_labels(table, text_columns, label_column)
            if split != "train" and set(labels) <= {None, "-1"}:
                unused[name] = " (no labels)"
                continue
            for what, values in (("text", texts), ("label", labels)):
                if None in values:
                    raise InputError(f"row {values.index(None) + 1} of {where} has no {what}")
            opened[split], origin[split] = list(zip(texts, labels)), where
            del unused[name]
            break
    listed = ", ".join(name + reason for name, reason in unused.items())
    notes = [f"not used of {source.spec}: {listed}"] if unused else []
    return opened, {"text_columns": text_columns, "label_column": label_column, "splits": origin}, notes


# ----------------------------------------------------------------------------- from texts to arrays


class Examples(NamedTuple):
    """N labelled texts in flat arrays, not an object each: a million need little more than their ids."""

    tokens: np.ndarray  # word ids of all texts, one text after the other
    start: np.ndarray  # (N + 1,) text i is tokens[start[i]:start[i + 1]]
    label: np.ndarray  # (N,) class ids
    text_hash: np.ndarray = None  # (N,) of the whole texts: equal for equal texts
    cut: np.ndarray = None  # (N,) 1 where there were more than max_length words, else 0

    def take(self, keep):
        """The examples for which the boolean array keep (N,) is True."""
        length = np.diff(self.start)
        start = np.concatenate([[0], np.cumsum(length[keep])])
        tokens = self.tokens[np.repeat(keep, length)]
        return Examples(tokens, start, self.label[keep], self.text_hash[keep], self.cut[keep])

    def batch(self, index, device="cpu"):
        """ids (B, T), padded to the longest of these texts, and labels (B,), for an integer array (B,)."""
        texts = [torch.from_numpy(self.tokens[self.start[i] : self.start[i + 1]]) for i in index]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
        return ids.long().to(device), torch.from_numpy(self.label[index]).long().to(device)


def hash64(text):
    """A number of 64 bits for a string, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little")


def tokenize(pairs, max_length, word_id, label_id):
    """Turn (text, class name) pairs into Examples; new words get the next free id of the dict word_id.

    A text is a string or a tuple of strings. What is hashed is the whole normalised text: neither the length
    at which it is cut nor the vocabulary decides whether two texts are the same.
    """
    tokens, start, label, hashes, cut = array("i"), array("q", [0]), array("i"), array("Q"), array("b")
    for text, name in pairs:
        found = words(text, max_length)
        parts = (text,) if isinstance(text, str) else text
        tokens.extend(word_id.setdefault(word, len(word_id)) for word in found)
        start.append(len(tokens))
        label.append(label_id[name])
        hashes.append(hash64("\n".join(normalise(part) for part in parts)))
        cut.append(len(found) == max_length and len(words(text, max_length + 1)) > max_length)
    return Examples(*(np.asarray(part) for part in (tokens, start, label, hashes, cut)))  # same memory


def fingerprint(examples, names):
    """A short hash of the texts and class names of Examples, and of their order: a run depends on it."""
    label = np.array([hash64(name) for name in names], dtype=np.uint64)[examples.label]
    return hashlib.sha256(np.stack([examples.text_hash, label]).tobytes()).hexdigest()[:12]


def held_out(text_hash):
    """Boolean mask (N,) of about a tenth of the rows, at most a fifth, by the hashes (N,) of their texts.

    Distinct texts in order of hash, duplicates together; a text with too many duplicates is passed over.
    """
    chosen, taken = [], 0
    for value, count in zip(*np.unique(text_hash, return_counts=True)):  # sorted
        if taken < len(text_hash) / 10 and taken + count <= max(1, len(text_hash) // 5):
            chosen.append(value)
            taken += count
    return np.isin(text_hash, chosen)


def complete(splits, origin, spec):
    """Add the validation and test splits that a target lacks; return notes. Raises InputError.

    splits: {split: Examples}; origin: {split: where it came from}. Both are changed.
    """
    notes = []
    if "test" not in splits and "validation" in splits:
        splits["test"], origin["test"] = splits.pop("validation"), origin.pop("validation")
        notes.append("no labelled test split: the validation split is reported as the test")
    for split in ("test", "validation"):
        if split not in splits:
            train, origin[split] = splits["train"], "a part of train"
            taken = held_out(train.text_hash)
            if not taken.any() or taken.all():
                raise InputError(f"too few different texts in {spec} to take a {split} split from them")
            splits[split], splits["train"] = train.take(taken), train.take(~taken)
            notes.append(f"no {split} split: a fixed tenth of train, by a hash of the text, is used instead")
    return notes


def load_task(source, wanted, max_length, word_id):
    """Load and tokenize a task; word_id grows. wanted: ("train",), or all splits, which then are completed.

    Returns {split: Examples}, class names in alphabetical order, what is recorded, notes. Raises InputError.
    """
    spec = source.spec
    if spec.startswith("reviews:"):
        if (domain := spec.removeprefix("reviews:")) not in NOUNS:
            raise InputError(f"the built-in tasks are reviews:{' and reviews:'.join(NOUNS)}, not {spec}")
        if source.text_columns or source.label_column:
            raise InputError(f"{spec} has one text and one label: there is no column to name")
        pairs, notes = reviews(domain), []
        record = {"text_columns": ["text"], "label_column": "label", "splits": dict.fromkeys(wanted, spec)}
    else:
        pairs, record, notes = open_splits(source, wanted)
    names = sorted({name for split in wanted for _, name in pairs.get(split, [])})
    label_id = {name: i for i, name in enumerate(names)}
    splits = {s: tokenize(pairs[s], max_length, word_id, label_id) for s in wanted if s in pairs}
    if "test" in wanted:  # a target: it needs all splits
        notes += complete(splits, record["splits"], spec)
    if len(set(splits["train"].label)) < 2:
        raise InputError(f"a single class to train on in {spec}, which has {', '.join(names)[:60]}")
    record["fingerprint"] = {split: fingerprint(part, names) for split, part in splits.items()}
    return splits, names, record, notes


# ----------------------------------------------------------------------------- what a run reads


class Data(NamedTuple):
    """Everything a run reads."""

    train: Examples
    validation: Examples
    test: Examples
    aux: Examples | None
    vocab: list
    labels: dict  # "target" and "auxiliary" -> list of label names
    notes: list  # what the reader of a report should know about these data, a line each
    record: dict  # the same data in numbers, for result.json


def limited_subset(label, n, seed):
    """Boolean mask (N,) of n examples, None = all: seeded, stratified, and nested (100 are among 200).

    In random order within its class, example k of a class of m has its turn at k / m: classes come about in
    proportion to their frequency, and each once before any comes twice (rare ones are rounded up).
    """
    rng = np.random.default_rng(seed)
    turn = np.empty(len(label))
    for c in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == c))
        turn[members] = np.arange(len(members)) / len(members)
    return np.isin(np.arange(len(label)), np.argsort(turn, kind="stable")[:n])


def choose_vocab(train, aux, vocab_size, n_kept):
    """Old word ids in order of their new ids: SPECIAL, the target's training words by frequency, a parent's
    in their order, the auxiliary task's by frequency: they fill what is left and take the place of no other.

    At most vocab_size, except that the old ids below n_kept, SPECIAL and a parent's words, always stay.
    """

    def by_frequency(examples):
        count = np.bincount(examples.tokens, minlength=len(SPECIAL))
        count[: len(SPECIAL)] = len(examples.tokens) + 1  # SPECIAL come first
        return np.argsort(-count, kind="stable")[: np.count_nonzero(count)].tolist()

    own = by_frequency(train)[:vocab_size]
    kept = list(dict.fromkeys([*own, *range(n_kept)]))  # each once
    more = by_frequency(aux) if aux else []
    return list(dict.fromkeys([*kept, *more]))[: max(vocab_size, len(kept))]


def counts(splits, names):
    """What is recorded: the number of examples of each split, and of each class in training."""
    examples = {split: len(part.label) for split, part in splits.items()}
    labels = np.bincount(splits["train"].label, minlength=len(names)).tolist()
    return {"examples": examples, "labels": dict(zip(names, labels))}


def data_notes(splits, names):
    """Yield a line for everything in the target's splits that makes its accuracies misleading."""
    train, test = splits["train"], splits["test"]
    trained, tested = (np.bincount(part.label, minlength=len(names)) for part in (train, test))
    if absent := [name for name, n in zip(names, trained) if n == 0]:
        yield (f"{len(absent)} of {len(names)} classes have no training example, but "
               f"{tested[trained == 0].sum()} test texts: {', '.join(absent)[:60]}")
    if again := np.isin(test.text_hash, train.text_hash).sum():
        yield f"{again} of the test texts also occur among the training examples"
    if (cut := train.cut.mean()) > 0.1:
        yield f"{cut:.0%} of the training texts are longer than max_length and were cut"
    for split in ("validation", "test"):
        if (n := len(splits[split].label)) < 100:
            yield f"only {n} {split} texts: the {split} accuracy is uncertain"
    if (share := tested.max() / tested.sum()) > 0.9:
        name = names[tested.argmax()][:40]
        yield f"{share:.1%} of the test texts are of class {name}: see macro-F1, not accuracy"


def prepare(target, aux, *, n_target, max_length, vocab_size, seed, parent_words=()):
    """Load both tasks and return a Data: the limited training subset, and one vocabulary. Raises InputError.

    target, aux: Source; aux None = no auxiliary task. n_target: target examples to train on, 0 = all.
    parent_words: words of a network to start from, which stay in the vocabulary whatever vocab_size is.
    Auxiliary examples whose text also occurs in the target's validation or test split are dropped. The
    record's fingerprints are of whole splits, its counts and shares of the examples that are used.
    """
    word_id = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *parent_words]))}
    n_kept = len(word_id)
    splits, names, about, notes = load_task(target, tuple(NAMES), max_length, word_id)
    train = splits["train"]
    n_all = len(train.label)
    if n_target == 1 or n_target > n_all:
        held = len(splits["validation"].label) + len(splits["test"].label)
        raise InputError(f"n_target {n_target}: of {n_all} training examples take at least 2, or 0 for all "
                         f"({held} others are for validation and test)")
    splits["train"] = train.take(limited_subset(train.label, n_target or None, seed))
    notes += data_notes(splits, names)
    labels, record = {"target": names}, {"target": about | counts(splits, names)}
    if aux:
        part, labels["auxiliary"], about, more = load_task(aux, ("train",), max_length, word_id)
        held_out_texts = [splits[split].text_hash for split in ("validation", "test")]
        leaks = np.isin(part["train"].text_hash, np.concatenate(held_out_texts))
        if leaks.all():
            raise InputError(f"every training example of {aux.spec} is held out in {target.spec}")
        notes += [*more, f"dropped {leaks.sum()} auxiliary examples found in the target's held-out data"]
        splits["aux"] = part["train"].take(~leaks)
        record["auxiliary"] = about | counts({"train": splits["aux"]}, labels["auxiliary"])
    chosen = choose_vocab(splits["train"], splits.get("aux"), vocab_size, n_kept)
    new_id = np.full(len(word_id), UNK, dtype=np.int32)
    new_id[chosen] = np.arange(len(chosen))
    splits = {name: part._replace(tokens=new_id[part.tokens]) for name, part in splits.items()}
    record["unknown"] = {name: (splits[name].tokens == UNK).mean().item() for name in ("train", "test")}
    record["cut"] = splits["train"].cut.mean().item()
    known = list(word_id)
    vocab = [known[i] for i in chosen]
    return Data(**{"aux": None, **splits}, vocab=vocab, labels=labels, notes=notes, record=record)


def epoch_order(length, batch_size, rng):
    """A random order (N,) of N texts in which neighbours have similar lengths: batches need little padding.

    length: (N,). Texts are shuffled, sorted by length within pools of 16 batches, and the batches shuffled.
    With few texts pools are smaller, an eighth of the texts but never less than a batch: in one pool for all,
    the same few of similar length would meet in every epoch.
    """
    order = rng.permutation(len(length))
    pool_size = batch_size * max(1, min(16, len(order) // (8 * batch_size)))
    pool = np.arange(len(order)) // pool_size
    order = order[np.lexsort((length[order], pool))]  # by pool, and within a pool by length
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return np.concatenate(batches)


def batch_order(examples, batch_size, seed, difficulty=None):
    """A function from a step to the indices (batch_size,) of its examples: one shuffled epoch after another.

    The indices are a pure function of (step, seed): the order of one task cannot depend on the other task,
    and a run that is resumed needs no state to go on. difficulty: (N,) numbers, for epochs that go from easy
    to hard (a curriculum); None = batches in random order.
    """
    length = np.diff(examples.start)

    @lru_cache(maxsize=2)
    def epoch(number):
        rng = np.random.default_rng([seed, number])
        if difficulty is None:
            return epoch_order(length, batch_size, rng)
        order = rng.permutation(len(length))  # equally difficult ones in random order
        return order[np.argsort(difficulty[order], kind="stable")]

    def index(step):
        position = range(step * batch_size, (step + 1) * batch_size)
        return np.array([epoch(p // len(length))[p % len(length)] for p in position])

    return index
