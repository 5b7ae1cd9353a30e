"""The second task: where its examples come from, and when, what and how it may teach the network that is
being pruned.

Upper half: three small functions for the three questions, `aux_weight_at` (when), `transferred` (what),
`couple` (how). Lower half: data. `load_task` reads the built-in task or anything the `datasets` library
loads; `prepare` turns a target and an auxiliary task into arrays of word ids, takes the limited training
subset and drops auxiliary examples that would leak.

Left out on purpose: more than two tasks, tasks that are not classification, tokenizers other than words.
"""

import json
import logging
import os
import random
import zlib
from functools import lru_cache
from glob import escape
from typing import NamedTuple

import numpy as np
import torch

from model import SPECIAL, UNK, Examples, tokenize

# ----------------------------------------------------------------------------- when, what, how


def aux_weight_at(step, aux_weight, transfer_start, transfer_stop):
    """When: weight of the auxiliary loss, `aux_weight` for transfer_start <= step < transfer_stop, else 0."""
    return aux_weight if transfer_start <= step < transfer_stop else 0.0


def transferred(weights, gates, transfer):
    """What: the shared parameters that the auxiliary gradient may touch, by the value of --transfer."""
    return {"weights": weights, "gates": gates, "both": weights + gates}[transfer]


def couple(g_target, g_aux, coupling):
    """How: combine two gradients, each a list of tensors of the same shapes, into the update direction.

    "sum" adds them. "project" first removes from g_aux its component against g_target if their inner product
    is negative: to first order, and before the optimiser rescales it, what is left does not harm the target.
    One inner product over all tensors (with the gates the Lagrangian's part is in it). Auxiliary Task Update
    Decomposition (Dery et al. 2021) weights three parts of g_aux by eta: orthogonal to g_target, along it,
    and against it. "sum" is eta = (1, 1, 1); "project", with g_target as the only basis vector, is (1, 1, 0),
    a one-sided form of the projection of Yu et al. 2020.
    """
    if coupling == "project" and g_target:
        dot = sum(torch.sum(a * t) for a, t in zip(g_aux, g_target))
        norm = sum(torch.sum(t * t) for t in g_target)
        scale = torch.where(dot < 0, dot / norm.clamp(min=1e-30), 0.0)
        g_aux = [a - scale * t for a, t in zip(g_aux, g_target)]
    return [t + a for t, a in zip(g_target, g_aux)]


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
        words = PRAISE if positive != negated else BLAME
        opinion = rng.choice(words[domain if rng.random() < 0.15 else "shared"].split())
        verb = rng.choice(["was not", "wasn't", "was hardly"] if negated else ["was", "was very", "seemed"])
        return f"the {rng.choice(NOUNS[domain].split())} {verb} {opinion}"

    positive = rng.random() < 0.5
    text = clause(positive)
    if rng.random() < 0.5:  # contrast: the other clause says the opposite, and the main clause decides
        other = f"{rng.choice(['although', 'though', 'even though', 'while'])} {clause(not positive)}"
        text = rng.choice([f"{other}, {text}", f"{text}, {other}"])
    return text, "positive" if positive else "negative"


def reviews(domain, sizes={"train": 6000, "validation": 500, "test": 2000}):
    """The built-in task: split name -> list of (text, label name), no sentence twice."""
    rng, unique = random.Random(domain), {}
    while len(unique) < sum(sizes.values()):
        text, label = review(rng, domain)
        unique[text] = label
    rows = iter(unique.items())
    return {split: [next(rows) for _ in range(n)] for split, n in sizes.items()}


# ----------------------------------------------------------------------------- any other task


class InputError(Exception):
    """The user's input cannot be used; the message is one line that says what to change."""


def bad_json_line(path):
    """Where the first broken line of a JSONL file or folder is, as "file, line 7: reason", or None."""
    inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in sorted(names)]
    for file in (f for f in inside or [path] if f.endswith(".jsonl") and os.path.isfile(f)):
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    json.loads(line.strip() or b"{}")
                except ValueError as error:
                    return f"{file}, line {number}: {error}"


def load_splits(spec):
    """Load a data set with the `datasets` library: a dict of its splits. spec: "hub/name",
    "hub/name:config", or a local folder or file (JSONL, CSV, parquet). Never runs code that comes with
    a data set. Raises InputError.
    """
    import datasets  # here, not above: importing it takes longer than the built-in task takes to load

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel("CRITICAL")  # what went wrong is said once, in the InputError
    ending = os.path.splitext(spec)[1].lower()
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(ending)
    name, _, config = (spec, "", "") if os.path.exists(spec) else spec.partition(":")
    if not os.path.exists(name) and (kind or not name or name[0] in "./~" or name.count("/") > 1):
        raise InputError(f"no such file or folder: {name!r}")
    if os.path.isfile(name) and not kind:
        raise InputError(f"cannot load {name}: only .jsonl, .json, .csv and .parquet files are read")
    as_written = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}  # "None" is a word
    try:
        files = escape(spec) if kind else None
        return dict(datasets.load_dataset(kind or name, config or None, data_files=files, **as_written))
    except Exception as error:  # the library raises dozens of types here, down to those of its file readers
        reason = bad_json_line(name) or " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"cannot load {spec}: {reason or 'a file is empty or unreadable'}") from None


def find_columns(split, spec, text_columns, label_column, optional=()):
    """Names of the text columns and of the label column of a Dataset: as asked for, else found.

    Found: label = the column "label", else the only column of whole numbers or classes; text = the column
    "text", else all remaining columns of strings (two at most). Names in optional may be absent and are then
    not asked for. Raises InputError for other absent names, and if that leaves no column or several.
    """
    features, columns = split.features, f"the columns of {spec} are {', '.join(split.column_names)}"
    dtype = {c: getattr(f, "dtype", "nested") for c, f in features.items()}
    missing = [c for c in [*(text_columns or []), label_column] if c and c not in features]
    if refused := [c for c in missing if c not in optional]:
        raise InputError(f"no column {refused[0]!r}: {columns}")
    text_columns = [c for c in text_columns or [] if c not in missing]
    label_column = None if label_column in missing else label_column
    label = [label_column] if label_column else [c for c in features if c == "label"]
    label = label or [c for c in features if "int" in dtype[c] or dtype[c] == "bool"]
    if len(label) != 1:
        raise InputError(f"name the label column with --label_column: {columns}")
    strings = [c for c in features if "string" in dtype[c] and c != label[0]]
    text = text_columns or [c for c in strings if c == "text"] or strings
    if not text_columns and not 1 <= len(text) <= 2:
        raise InputError(f"name the text columns with --text_columns: {columns}")
    for c in text:
        if "string" not in dtype[c]:
            raise InputError(f"column {c!r} of {spec} holds {dtype[c]}, not text")
    if not any(kind in dtype[label[0]] for kind in ("int", "string", "bool")):
        raise InputError(f"column {label[0]!r} of {spec} holds {dtype[label[0]]}, not classes; is one empty?")
    return text, label[0]


def rows(split, text_columns, label_column):
    """Iterate over (text, label name) of a Dataset; name None for a null label, or -1 of a class."""
    feature = split.features[label_column]
    names = getattr(feature, "names", None)
    for batch in split.select_columns([*text_columns, label_column]).iter(1000):
        for *text, label in zip(*(batch[c] for c in text_columns), batch[label_column]):
            if names:
                label = names[label] if label is not None and label >= 0 else None
            yield tuple(t or "" for t in text), None if label is None else str(label)


# ----------------------------------------------------------------------------- from texts to batches


class Data(NamedTuple):
    """Everything a run reads."""

    train: Examples
    validation: Examples
    test: Examples
    aux: Examples | None
    vocab: list
    labels: dict  # "target" and "auxiliary" -> list of label names
    notes: list  # what the reader of a report should know about these data


def load_task(spec, text_columns, label_column, max_length, word_id, optional=None):
    """Load and tokenize a task: ({split: Examples}, label names, notes). word_id grows. Raises InputError.

    optional: None for a target; for an auxiliary task, of which only the train split is used, the names of
    columns that it need not have.
    """
    wanted = ("train", "validation", "test") if optional is None else ("train",)
    built_in, domain = spec.startswith("reviews:"), spec.removeprefix("reviews:")
    if built_in and domain not in NOUNS:
        raise InputError(f"the built-in tasks are {' and '.join('reviews:' + d for d in NOUNS)}, not {spec}")
    splits, label_id, notes = {}, {}, []
    found = reviews(domain) if built_in else load_splits(spec)
    for split in wanted:
        key = next((k for k in found if k.startswith(split[:5])), None)  # "valid" finds validation_matched
        if key is None:
            continue
        pairs, ids = found[key], dict(label_id)
        if not built_in:
            pairs = rows(pairs, *find_columns(pairs, spec, text_columns, label_column, optional or ()))
        try:
            examples = tokenize(pairs, max_length, word_id, ids)
        except UnicodeDecodeError as error:
            raise InputError(f"cannot read {spec}: {bad_json_line(spec) or error}") from None
        if len(examples.label) == 0:
            raise InputError(f"the {key} split of {spec} is empty")
        if set(examples.label) <= {-1, ids.get("-1")} and split != "train":  # hidden: null or "-1"
            notes.append(f"the {split} split of {spec} has no labels")
            continue
        if (examples.label < 0).any():
            row = examples.label.argmin() + 1
            raise InputError(f"example {row} of the {key} split of {spec} has no label")
        splits[split], label_id = examples, ids
    if "train" not in splits:
        raise InputError(f"{spec} has no train split, only {', '.join(found)}")
    if "test" in wanted and "test" not in splits and "validation" in splits:
        notes.append("no labelled test split: the validation split is reported as the test")
        splits["test"] = splits.pop("validation")
    for split in [s for s in wanted if s not in splits]:
        notes.append(f"no {split} split: a fixed tenth of train is used instead")
        # a hash in place of a random number: equal texts stay together
        draw = np.array([zlib.crc32(text + split.encode()) for text in splits["train"].texts()])
        keep = draw > np.sort(draw)[max(1, len(draw) // 10) - 1]
        if len(set(splits["train"].label[keep])) < 2:  # very few different texts: rows have to be divided
            keep = np.random.default_rng(0).permutation(len(draw)) >= max(1, len(draw) // 10)
        splits["train"], splits[split] = splits["train"].take(keep), splits["train"].take(~keep)
    if len(set(splits["train"].label)) < 2:
        raise InputError(f"a single class to train on in {spec}, which has {', '.join(label_id)[:60]}")
    rank = np.argsort(np.argsort(list(label_id)))  # place of each label name in alphabetical order
    return {s: e._replace(label=rank[e.label]) for s, e in splits.items()}, sorted(label_id), notes


def limited_subset(label, n, seed):
    """Boolean mask (N,) of n examples: seeded, stratified, and nested (100 are among 200).

    Examples are ranked at random within their class and taken in order of rank / class size: classes come
    about in proportion to their frequency, and each once before any comes twice (rare ones are rounded up).
    """
    order = np.random.default_rng(seed).permutation(len(label))
    rank = np.empty(len(label))
    for c in np.unique(label):
        members = order[label[order] == c]
        rank[members] = np.arange(len(members)) / len(members)
    keep = np.zeros(len(label), dtype=bool)
    keep[order[np.argsort(rank[order], kind="stable")[:n]]] = True
    return keep


def prepare(target, aux, n_target, max_length, vocab_size, text_columns=None, label_column=None, seed=0):
    """Load both tasks and return a Data: the limited training subset, and one vocabulary.

    n_target: labelled target examples to train on, 0 = all. aux: "none" for no second task. Auxiliary
    examples whose text also occurs in the target's validation or test split are dropped. Raises InputError.
    """
    word_id = {word: i for i, word in enumerate(SPECIAL)}
    column = label_column or [None]
    splits, names, notes = load_task(target, text_columns, column[0], max_length, word_id)
    train, labels, second = splits["train"], {"target": names}, None
    if n_target > len(train.label):
        raise InputError(f"n_target {n_target}: there are {len(train.label)} training examples; 0 takes all")
    train = train.take(limited_subset(train.label, n_target, seed)) if n_target else train
    if len(set(train.label)) < 2:
        raise InputError(f"the {n_target} training examples of {target} are all of one class: raise n_target")
    if again := sum(map(set(train.texts()).__contains__, splits["test"].texts())):
        notes.append(f"{again} of the test texts also occur among the training examples")
    if aux != "none":
        optional = [*(text_columns or []), *(column if len(column) == 1 else [])]
        part, names, more = load_task(aux, text_columns, column[-1], max_length, word_id, optional)
        second, labels["auxiliary"] = part["train"], names
        held_out = {text for split in ("validation", "test") for text in splits[split].texts()}
        keep = np.fromiter((text not in held_out for text in second.texts()), dtype=bool)
        notes += [*more, f"dropped {(~keep).sum()} auxiliary examples found in the target's held-out data"]
        if not keep.any():
            raise InputError(f"every training example of {aux} occurs in the held-out splits of {target}")
        second = second.take(keep)
    parts = [train, splits["validation"], splits["test"], second]
    count = sum(np.bincount(e.tokens, minlength=len(word_id)) for e in (train, second) if e)
    count[: len(SPECIAL)] = count.max() + 1  # they keep their ids
    kept = [i for i in np.argsort(-count, kind="stable")[:vocab_size].tolist() if count[i] > 0]
    new_id = np.full(len(word_id), UNK, dtype=np.int32)
    new_id[kept] = np.arange(len(kept))
    parts = [e and e._replace(tokens=new_id[e.tokens]) for e in parts]
    return Data(*parts, np.array(list(word_id), dtype=object)[kept].tolist(), labels, notes)


def epoch_order(length, batch_size, rng):
    """A random order (N,) of N texts in which neighbours have similar lengths: batches need little padding.

    length: (N,). Texts are shuffled, sorted by length within pools of 16 batches; batches are shuffled again.
    """
    order = rng.permutation(len(length))
    pool = np.arange(len(order)) // (16 * batch_size)
    order = order[np.lexsort((length[order], pool))]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return np.concatenate([batches[i] for i in rng.permutation(len(batches))])


def batch_order(examples, batch_size, seed):
    """A function from a step to the indices (batch_size,) of its examples: one shuffled epoch after another.

    The indices are a pure function of (step, seed): the order of one task cannot depend on the other task,
    and a run that is resumed needs no state to go on.
    """
    length = np.diff(examples.start)

    @lru_cache(maxsize=2)
    def epoch(number):
        return epoch_order(length, batch_size, np.random.default_rng([seed, number]))

    def index(step):
        position = range(step * batch_size, (step + 1) * batch_size)
        return np.array([epoch(p // len(length))[p % len(length)] for p in position])

    return index
