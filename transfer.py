"""Two tasks: what they say, and how the auxiliary one may teach the network that is pruned for the
other.

First three small functions for the three questions: `aux_weight_at` (when), `transferred` (what),
`couple` (how). Then data: `reviews` is the built-in pair of tasks, `read_task` reads it, files, or
a data set of the hub, and `prepare` turns a target and an auxiliary task into token ids, takes the
limited training subset and drops auxiliary examples that would leak. Last, the order of the
batches.

A task is a folder with train and perhaps validation and test, each .jsonl, .csv or .parquet; or one
such file, a train split; or a name on the hub. Texts are strings in column `text`, labels strings,
integers or booleans in column `label`, unless other columns are named. Nothing is guessed: what
does not fit is refused with its row.

Left out on purpose: more than two tasks, tasks that are not classification.
"""

import csv
import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import CLS, PAD, SPECIAL, UNK, InputError, normalise, tokenize, word_pieces, words

# ----------------------------------------------------------------------------- when, what, how


def aux_weight_at(step, aux_weight, transfer_start, transfer_stop):
    """When: weight of the auxiliary loss: `aux_weight` from start to stop (excluded), else 0."""
    return aux_weight if transfer_start <= step < transfer_stop else 0.0


def transferred(parameters, transfer):
    """What: the parameters that the auxiliary gradient may touch, by the value of --transfer.

    parameters: name -> parameter of the network and, as "log_alpha", of the gates; returns some of
    them. The auxiliary classifier always learns (and counts in the norm by which the weights'
    gradient is clipped). To share only some layers, test the name here.
    """
    shared = {}
    for name, p in parameters.items():
        kind = "gates" if name == "log_alpha" else "weights"
        if name.startswith("classifier."):
            reached = name.startswith("classifier.auxiliary.")
        else:
            reached = transfer in ("both", kind)
        if reached:
            shared[name] = p
    return shared


def couple(g_target, g_aux, coupling):
    """How: combine two gradients, each name -> tensor, into the update direction.

    "sum" adds them. "project" first removes from g_aux its component against g_target if their
    inner product is negative: to first order, and before the optimizer rescales it, what is left
    does not harm the target. One inner product over all that both gradients touch; what only one of
    them touches passes unchanged. Auxiliary Task Update Decomposition (Dery et al. 2021) weights
    three parts of g_aux by eta: orthogonal to g_target, along it, and against it. "sum" is eta =
    (1, 1, 1); "project", with g_target as the only basis vector, is (1, 1, 0), a one-sided form of
    the projection of Yu et al. 2020.
    """
    update = {**g_target, **g_aux}
    both = [name for name in g_aux if name in g_target]
    for name in both:
        update[name] = g_target[name] + g_aux[name]
    if coupling == "project" and both:
        dot = sum(torch.sum(g_aux[name] * g_target[name]) for name in both)
        norm = sum(torch.sum(g_target[name] ** 2) for name in both)
        against = (dot / norm.clamp(min=1e-30)).clamp(max=0)  # 0 where the tasks agree
        for name in both:
            update[name] = update[name] - against * g_target[name]
    return update


# ----------------------------------------------------------------------------- the built-in task

NOUNS = {
    "restaurant": """soup waiter dessert pasta service steak wine bread salad chef kitchen curry
        pizza menu table coffee fish sauce cook breakfast lunch dinner cake burger rice""",
    "film": """plot actor script director ending dialogue music camera cast comedy hero villain
        scene sequel drama editing story heroine opening thriller costume soundtrack acting finale
        romance""",
}
PRAISE = {
    "restaurant": "fresh crispy juicy tender tasty delicious fragrant creamy",
    "film": "gripping suspenseful well-acted witty hilarious touching thrilling cinematic",
    "shared": """good great fine superb splendid lovely wonderful excellent perfect brilliant
        amazing awesome fantastic terrific fabulous marvellous magnificent outstanding exceptional
        remarkable impressive stunning delightful charming pleasant enjoyable agreeable likeable
        admirable commendable praiseworthy exquisite elegant graceful refined polished stylish
        classy tasteful beautiful gorgeous attractive appealing inviting engaging captivating
        enchanting fascinating refreshing original inventive imaginative creative clever smart
        ingenious skilful masterful accomplished competent capable reliable dependable solid sound
        strong robust honest sincere genuine authentic warm friendly kind gentle generous thoughtful
        considerate attentive careful precise flawless faultless impeccable immaculate sublime
        divine heavenly glorious dazzling radiant vibrant lively cheerful joyful uplifting inspiring
        memorable unforgettable satisfying rewarding worthwhile valuable welcome decent""",
}
BLAME = {
    "restaurant": "stale soggy bland greasy burnt undercooked rancid tasteless",
    "film": "clichéd predictable far-fetched humourless overlong wooden melodramatic plotless",
    "shared": """bad poor awful terrible horrible dreadful dire lousy rotten atrocious abysmal
        appalling disgusting revolting repulsive nasty unpleasant disagreeable annoying irritating
        infuriating maddening tiresome tedious boring dull dreary monotonous lifeless flat weak
        feeble flimsy shoddy sloppy careless clumsy awkward inept incompetent amateurish crude
        coarse vulgar tacky cheap ugly hideous unsightly repellent offensive insulting rude arrogant
        hostile cold unfriendly mean cruel heartless insincere dishonest fake phony pretentious
        pompous shallow empty hollow pointless useless worthless hopeless pathetic pitiful miserable
        depressing dismal gloomy bleak grim disappointing unsatisfying underwhelming mediocre
        inferior substandard deficient defective faulty flawed messy chaotic confusing incoherent
        unbearable intolerable insufferable forgettable regrettable lamentable deplorable disastrous
        catastrophic ridiculous absurd""",
}


def review(rng, domain):
    """A sentence about a restaurant or a film, and the polarity of its main clause."""

    def clause(positive):
        negated = rng.random() < 0.3
        adjectives = PRAISE if positive != negated else BLAME
        opinion = rng.choice(adjectives[domain if rng.random() < 0.15 else "shared"].split())
        verbs = ["was not", "wasn't", "was hardly"] if negated else ["was", "was very", "seemed"]
        verb = rng.choice(verbs)
        return f"the {rng.choice(NOUNS[domain].split())} {verb} {opinion}"

    positive = rng.random() < 0.5
    text = clause(positive)
    if rng.random() < 0.5:  # contrast: the other clause says the opposite; the main clause decides
        conjunction = rng.choice(["although", "though", "even though", "while"])
        other = f"{conjunction} {clause(not positive)}"
        text = rng.choice([f"{other}, {text}", f"{text}, {other}"])
    return text, "positive" if positive else "negative"


def reviews(domain):
    """The built-in, synthetic task: split name -> list of (text, label name), no sentence twice."""
    rng, unique = random.Random(domain), {}
    while len(unique) < 8500:
        text, name = review(rng, domain)
        unique[text] = name
    pairs = list(unique.items())
    return {"train": pairs[:6000], "validation": pairs[6000:6500], "test": pairs[6500:]}


# ----------------------------------------------------------------------------- any other task

SPLITS = ("train", "validation", "test")


def decoded(file):
    """Yield the lines of a UTF-8 file; each is decoded alone, so that an error can name it.

    A byte order mark may begin any line: files joined with cat have several.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"{file}, line {number}: save it as UTF-8: {error}") from None


def json_rows(file):
    """Yield (place, row) for every line of a JSON Lines file; the place is for messages."""
    for number, line in enumerate(decoded(file), 1):
        try:
            if line.strip():
                yield f"{file}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: not JSON: {error}") from None


def csv_rows(file):
    """Yield (place, row) for every row of a CSV file. Cells are strings, as they are written."""
    csv.field_size_limit(2**31 - 1)  # no limit; the default is 131,072 characters
    reader = csv.DictReader(decoded(file), strict=True)
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise InputError(f"{file}, line 1: a column is named twice: {', '.join(header)}")
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{place}: not {len(header)} cells, as in the header: are they "
                                 "separated by commas, and texts with commas quoted?")
            if list(row.values()) == header:
                raise InputError(f"{place}: the header once more")
            yield place, row
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.reader.line_num}: {error}") from None


def parquet_rows(file):
    """Yield (place, row) for every row of a parquet file."""
    import pyarrow.parquet  # here, not above: most runs read none; `datasets` installs it

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: not UTF-8
        raise InputError(f"{file}: {' '.join(str(error).split())[:200]}") from None


READERS = {".jsonl": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}


def from_files(spec):
    """Split -> (place, row) pairs, the place for messages; files that are no split by their names.

    A folder has a file per split; a single file is the train split.
    """
    path, found = Path(spec), {}
    if path.is_file() and path.suffix in READERS:
        return {"train": READERS[path.suffix](path)}
    for file in sorted(file for file in path.glob("*.*") if file.suffix in READERS):
        split = file.stem if file.stem in SPLITS else file.name
        if split in found:
            raise InputError(f"{spec} has two files for one split: {split}")
        found[split] = READERS[file.suffix](file)
    return found


def from_hub(spec):
    """Like `from_files`, for owner/name or owner/name:config on the hub; classes by their names."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[^/]+)?", spec) or Path(spec).suffix in READERS:
        raise InputError(f"no such file or folder: {spec!r}")
    import datasets  # here, not above: importing it takes seconds

    name, _, config = spec.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises dozens of types here
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"no such file or folder: {spec!r}, nor on the hub: {reason}") from None

    def rows_of(split):
        features = loaded[split].features
        classes = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
        classes = [name for name in classes if loaded[split].unique(name) != [-1]]  # has labels
        for number, row in enumerate(loaded[split], 1):
            for column in classes:
                is_labelled = row[column] not in (-1, None)
                row[column] = features[column].int2str(row[column]) if is_labelled else None
            yield f"{split} of {spec}, row {number}", row

    return {split: rows_of(split) for split in loaded}


def read_task(spec, text_columns, label_column, flag="", wanted=SPLITS):
    """A task as it is: split -> list of (tuple of texts, class name), and notes. Raises InputError.

    spec: as the user names it. text_columns: a list. flag: "aux_" for the auxiliary task: messages
    then name --aux_text_columns. wanted: the splits to read. A split whose labels are all -1 has
    none, and is not read.
    """
    kind, _, domain = spec.partition(":")
    if kind == "reviews" and domain in NOUNS:
        found = {}
        for split, pairs in reviews(domain).items():
            found[split] = [(spec, {"text": text, "label": name}) for text, name in pairs]
    else:
        found = from_files(spec) if spec and Path(spec).exists() else from_hub(spec)
    if "train" not in found:
        kinds, names = ", ".join(READERS), ", ".join(SPLITS)
        raise InputError(f"{spec} has no train split: only {kinds} are read, of the names {names}")
    unread = [name for name in found if name not in SPLITS]
    notes = [f"not read of {spec}: {', '.join(unread)}"] if unread else []
    splits = {}
    for split in [split for split in wanted if split in found]:
        pairs = [example(*placed, text_columns, label_column, flag) for placed in found[split]]
        if not pairs:
            raise InputError(f"{split} of {spec} is empty")
        if split != "train" and {name for _, name in pairs} == {"-1"}:
            notes.append(f"{split} of {spec} has no labels: it is not read")
        else:
            splits[split] = pairs
    return splits, notes


def example(place, row, text_columns, label_column, flag):
    """The texts, a tuple of strings, and the class name of a row. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f'{place}: not an object like {{"text": "...", "label": "..."}}')
    columns = (*text_columns, label_column)
    if label_column in text_columns or not all(column in row for column in columns):
        raise InputError(f"{place} has columns {', '.join(row)[:200]}, not {', '.join(columns)}: "
                         f"name them with --{flag}text_columns and --{flag}label_column")
    texts, label = tuple(row[column] for column in text_columns), row[label_column]
    if isinstance(label, int):
        label = str(label).lower()  # a boolean as JSON writes it: true
    for cell in (*texts, label):
        if not isinstance(cell, str) or not cell.strip():
            raise InputError(f"{place}: a text is a string, a label a string, an integer or a "
                             f"boolean, and neither is empty: not {cell!r:.40}")
    return texts, unicodedata.normalize("NFC", label.strip())


# ---------------------------------------------------------------------------- from rows to examples


class Row(NamedTuple):
    """An example as it was read."""

    texts: tuple  # of strings
    name: str  # of its class
    tokens: list  # of strings, at most max_length
    cut: bool  # whether there were more
    key: int  # a hash of the normalised texts, equal for equal texts


class Examples(NamedTuple):
    """N labelled texts, as the network reads them."""

    ids: list  # N integer arrays of token ids
    label: np.ndarray  # (N,) class ids

    def batch(self, index, device="cpu"):
        """ids (B, T), padded to the longest text, and labels (B,). index: an integer array (B,)."""
        texts = [torch.from_numpy(self.ids[i]) for i in index]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
        return ids.long().to(device), torch.from_numpy(self.label[index]).to(device)


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


def tokenized(pairs, known, tokenizer, max_length, bert):
    """Rows for (texts, class name) pairs; new tokens join the dict `known`, in their order."""
    rows = []
    for texts, name in pairs:
        tokens, cut = tokenize(texts, tokenizer, max_length, bert)
        for token in tokens:
            known.setdefault(token, len(known))
        content = "\n".join(normalise(text) for text in texts).encode(errors="replace")
        key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        rows.append(Row(texts, name, tokens, cut, key))
    return rows


def held_out(rows):
    """About a tenth of the Rows (at most a fifth), and all others. Raises InputError.

    Distinct texts are taken in order of hash, duplicates together; a text with too many duplicates
    is passed over.
    """
    chosen, taken = set(), 0
    for key, count in sorted(Counter(row.key for row in rows).items()):
        if taken < len(rows) / 10 and taken + count <= max(1, len(rows) // 5):
            chosen.add(key)
            taken += count
    if not chosen:
        raise InputError("too few different texts in train to hold a tenth of them out: "
                         "are the columns of texts and labels swapped?")
    return [r for r in rows if r.key in chosen], [r for r in rows if r.key not in chosen]


def limited_subset(label, n, seed):
    """Boolean mask (N,) of n examples, None = all: seeded, stratified, nested (100 in 200).

    In random order within its class, example k of a class of m has its turn at k / m: classes come
    about in proportion to their frequency, and each once before any comes twice (rare ones are
    rounded up).
    """
    rng = np.random.default_rng(seed)
    turn = np.empty(len(label))
    for c in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == c))
        turn[members] = np.arange(len(members)) / len(members)
    return np.isin(np.arange(len(label)), np.argsort(turn, kind="stable")[:n])


def limited(train, n_target, seed):
    """n_target of the Rows, those of `limited_subset`; 0 = all. Raises InputError."""
    if n_target == 1 or n_target > len(train):
        raise InputError(f"n_target {n_target}: of {len(train)} training examples that are not "
                         "held out take 2 or more, or 0 for all")
    chosen = limited_subset(np.array([row.name for row in train]), n_target or None, seed)
    return [row for row, is_chosen in zip(train, chosen) if is_chosen]


def choose_vocab(train, aux, known, vocab_size, always):
    """The vocabulary: SPECIAL, the target's training tokens by frequency, those in `always`, then
    the auxiliary task's by frequency: they fill what is left and take the place of no other.

    train, aux: lists of Rows. known: token -> place of its first occurrence, which decides between
    equally frequent ones. At most vocab_size tokens, unless SPECIAL, the target's first vocab_size
    - 3 and those in `always` are more: these all stay.
    """

    def by_frequency(rows):
        count = Counter(token for row in rows for token in row.tokens)
        return sorted(count.keys() - set(SPECIAL), key=lambda token: (-count[token], known[token]))

    own = by_frequency(train)[: vocab_size - len(SPECIAL)]
    kept = dict.fromkeys([*SPECIAL, *own, *always])  # each once
    vocab = dict.fromkeys([*kept, *by_frequency(aux)])
    return list(vocab)[: max(vocab_size, len(kept))]


def encoded(rows, names, vocab, max_length, bert):
    """Examples from Rows. A BERT reads a word whose pieces are not all in vocab in smaller ones."""
    token_id = {token: i for i, token in enumerate(vocab)}
    class_id = {name: i for i, name in enumerate(names)}
    tokenizer, ids = word_pieces(vocab), []
    for row in rows:
        tokens = tokenize(row.texts, tokenizer, max_length, bert)[0] if bert else row.tokens
        ids.append(np.array([token_id.get(token, UNK) for token in tokens], dtype=np.int32))
    return Examples(ids, np.array([class_id[row.name] for row in rows]))


def data_notes(splits, names, unknown):
    """Lines for all in the target's splits that makes its accuracies misleading."""
    train, test = splits["train"], splits["test"]
    absent = sorted({*names} - {row.name for row in train})
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    labelled = {(row.key, row.name) for rows in splits.values() for row in rows}
    twice = sum(n > 1 for n in Counter(key for key, _ in labelled).values())
    keys = {row.key for row in train}
    again = sum(row.key in keys for row in test)
    cut = sum(row.cut for row in train) / len(train)
    name, n = Counter(row.name for row in test).most_common(1)[0]
    most = n / len(test)
    few = [f"{len(splits[s])} {s}" for s in ("validation", "test") if len(splits[s]) < 100]
    found = [
        (absent, f"{len(absent)} classes have no training example: {', '.join(absent)[:60]}"),
        (alike, f"names of classes that differ only by case: {', '.join(alike)[:60]}"),
        (twice, f"{twice} texts occur with more than one label"),
        (again, f"{again} of the test texts also occur among the training examples"),
        (cut > 0.1, f"{cut:.0%} of the training texts are longer than max_length and were cut"),
        (few, f"only {' and '.join(few)} texts: accuracies are uncertain"),
        (most > 0.9, f"{most:.1%} of the test texts are of class {name[:40]}: see macro-F1"),
        (unknown > 0.5, f"{unknown:.0%} of the test words are unknown: has the language spaces?"),
    ]
    return [line for holds, line in found if holds]


def about(task, splits, names, given):
    """What result.json says of a task, counting only examples that are used.

    task: as for `prepare`. splits: split -> list of Rows; given: those not taken from train.
    Raises InputError if there is nothing to learn.
    """
    spec, text_columns, label_column = task
    count = Counter(row.name for row in splits["train"])
    if len(count) < 2:
        raise InputError(f"{spec} has fewer than two classes to train on, held-out texts apart")
    first = splits["train"][0]
    return {
        "text_columns": text_columns,
        "label_column": label_column,
        "splits": {name: spec if name in given else "a tenth of train, by hash" for name in splits},
        "examples": {split: len(rows) for split, rows in splits.items()},
        "labels": {name: count[name] for name in names},
        "first": [*first.texts, first.name],
    }


def prepare(target, aux, *, n_target, max_length, vocab_size, seed, parent=None):
    """Both tasks as a Data: the limited training subset, one vocabulary. Raises InputError.

    target, aux: (spec, list of text columns, label column); aux None = no auxiliary task. n_target:
    target examples to train on, 0 = all. vocab_size: None = 10,000, of a BERT all pieces. parent: a
    network to start from, whose tokenizer is used and whose words stay known; of a BERT those stay
    that occur in training, and every single character. Auxiliary examples whose text also occurs in
    the target's validation or test split are dropped.
    """
    tokenizer, bert, always = words, False, []
    if parent:
        tokenizer, bert, always = parent.tokenizer, parent.config.bert, parent.vocab
    if bert:
        always = [CLS, *(piece for piece in parent.vocab if len(piece.removeprefix("##")) == 1)]
    known = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *always]))}

    # the target, and the examples to train on
    pairs, notes = read_task(*target)
    reading = (known, tokenizer, max_length, bert)
    splits = {name: tokenized(pairs[name], *reading) for name in pairs}
    for name in ("test", "validation"):
        if name not in splits:
            splits[name], splits["train"] = held_out(splits["train"])
    notes += [f"no {name} split: a tenth of train is used" for name in SPLITS if name not in pairs]
    names = {"target": sorted({row.name for rows in splits.values() for row in rows})}
    train = splits["train"]
    splits["train"] = limited(train, n_target, seed)
    if len(splits["train"]) < len(train):
        notes.append(f"{n_target} of {len(train)} training examples are used; all: --n_target 0")
    record = {"target": about(target, splits, names["target"], pairs)}

    # the auxiliary task, without what is held out of the target
    auxiliary = []
    if aux:
        pairs, more = read_task(*aux, "aux_", ("train",))
        rows = tokenized(pairs["train"], *reading)
        held = {row.key for name in ("validation", "test") for row in splits[name]}
        auxiliary = [row for row in rows if row.key not in held]
        n_dropped = len(rows) - len(auxiliary)
        notes += [*more, f"auxiliary texts dropped, because they are held out: {n_dropped}"]
        names["auxiliary"] = sorted({row.name for row in rows})
        record["auxiliary"] = about(aux, {"train": auxiliary}, names["auxiliary"], pairs)

    # one vocabulary, and ids instead of words
    vocab_size = vocab_size or (10**9 if bert else 10_000)
    vocab = choose_vocab(splits["train"], auxiliary, known, vocab_size, always)
    final = (vocab, max_length, bert)
    examples = {name: encoded(rows, names["target"], *final) for name, rows in splits.items()}
    examples["aux"] = encoded(auxiliary, names["auxiliary"], *final) if aux else None
    ids = {name: np.concatenate(examples[name].ids) for name in ("train", "test")}
    record["unknown"] = {name: (ids[name] == UNK).mean().item() for name in ids}
    notes += data_notes(splits, names["target"], record["unknown"]["test"])
    return Data(**examples, vocab=vocab, labels=names, notes=notes, record=record)


def epoch_order(length, batch_size, rng):
    """A random order (N,) of N texts in which neighbours have similar lengths, for little padding.

    length: (N,). Texts are shuffled, sorted by length within pools of 16 batches, and the batches
    shuffled. With few texts pools are smaller, an eighth of the texts but never less than a batch:
    in one pool for all, the same few of similar length would meet in every epoch.
    """
    order = rng.permutation(len(length))
    pool_size = batch_size * max(1, min(16, len(order) // (8 * batch_size)))
    pool = np.arange(len(order)) // pool_size
    order = order[np.lexsort((length[order], pool))]  # by pool, and within a pool by length
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return np.concatenate(batches)


def batch_order(examples, batch_size, seed):
    """A function from a step to the indices (batch_size,) of its examples, epoch after epoch.

    The indices are a pure function of (step, seed): the order of one task cannot depend on the
    other task, and a run that is resumed needs no state to go on.
    """
    length = np.array([len(ids) for ids in examples.ids])

    @lru_cache(maxsize=2)
    def epoch(number):
        return epoch_order(length, batch_size, np.random.default_rng([seed, number]))

    def index(step):
        position = range(step * batch_size, (step + 1) * batch_size)
        return np.array([epoch(p // len(length))[p % len(length)] for p in position])

    return index
