"""Two tasks: what they say, and how the auxiliary one may teach the network that is pruned for the
other.

First three small functions for the three questions: `aux_weight_at` (when), `transferred` (what),
`couple` (how). Then data: `reviews` is the built-in pair of tasks, `read_task` reads it, files, or
a data set of the Hugging Face Hub, and `prepare` turns a target and an auxiliary task into token
ids, takes the limited training subset and drops auxiliary examples that would leak. Last, the order
of the batches.

A task is a folder with train and perhaps validation and test, each .jsonl or .csv; or one such
file, a train split; or a name on the Hub. Texts are strings in column `text`, labels strings,
integers or booleans in column `label`, unless other columns are named. Nothing is guessed: what
does not fit is refused with its row.

Left out on purpose: more than two tasks, tasks that are not classification.
"""

import csv
import hashlib
import json
import random
import unicodedata
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import CLS, PAD, SPECIAL, UNK, InputError, is_hub_name, tokenize, words

# ----------------------------------------------------------------------------- when, what, how


def aux_weight_at(step, aux_weight, transfer_start, transfer_stop):
    """When: the weight of the auxiliary loss, `aux_weight` if start <= step < stop, else 0."""
    return aux_weight if transfer_start <= step < transfer_stop else 0.0


def transferred(parameters, transfer):
    """What: the parameters that the auxiliary gradient may touch, by the value of --transfer.

    parameters: name -> parameter of the network and, as "log_alpha", of the gates; returns some of
    them. The auxiliary classifier always learns (and counts in the norm by which the weights'
    gradient is clipped). To share only some layers, test the name here.
    """

    def is_shared(name):
        if name.startswith("classifier."):
            return name.startswith("classifier.auxiliary.")
        kind = "gates" if name == "log_alpha" else "weights"
        return transfer in ("both", kind)

    return {name: p for name, p in parameters.items() if is_shared(name)}


def couple(g_target, g_aux, coupling):
    """How: combine two gradients, each name -> tensor, into the update direction.

    "sum" adds them. "project" first removes from g_aux its component against g_target if their
    inner product is negative: to first order, and before the optimizer rescales it, what is left
    does not harm the target. One inner product over all that both gradients touch; what only one of
    them touches passes unchanged. Auxiliary Task Update Decomposition (Dery et al. 2021) weights
    three parts of g_aux by eta: orthogonal to g_target, along it, and against it. "sum" is eta =
    (1, 1, 1); "project", with g_target as the only basis vector, is (1, 1, 0), a one-sided form of
    PCGrad (Yu et al. 2020).
    """
    update = {**g_target, **g_aux}
    both = [name for name in g_aux if name in g_target]
    against = 0.0
    if coupling == "project" and both:
        dot = sum(torch.sum(g_aux[name] * g_target[name]) for name in both)
        squared_norm = sum(torch.sum(g_target[name] ** 2) for name in both)
        against = (dot / squared_norm.clamp(min=1e-30)).clamp(max=0)  # 0 if the gradients agree
    for name in both:
        update[name] = g_target[name] + g_aux[name] - against * g_target[name]
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
    admirable commendable praiseworthy exquisite elegant graceful refined polished stylish classy
    tasteful beautiful gorgeous attractive appealing inviting engaging captivating enchanting
    fascinating refreshing original inventive imaginative creative clever smart ingenious skilful
    masterful accomplished competent capable reliable dependable solid sound strong robust honest
    sincere genuine authentic warm friendly kind gentle generous thoughtful considerate attentive
    careful precise flawless faultless impeccable immaculate sublime divine heavenly glorious
    dazzling radiant vibrant lively cheerful joyful uplifting inspiring memorable unforgettable
    satisfying rewarding worthwhile valuable welcome decent""",
}
BLAME = {
    "restaurant": "stale soggy bland greasy burnt undercooked rancid tasteless",
    "film": "clichéd predictable far-fetched humourless overlong wooden melodramatic plotless",
    "shared": """bad poor awful terrible horrible dreadful dire lousy rotten atrocious abysmal
    appalling disgusting revolting repulsive nasty unpleasant disagreeable annoying irritating
    infuriating maddening tiresome tedious boring dull dreary monotonous lifeless flat weak feeble
    flimsy shoddy sloppy careless clumsy awkward inept incompetent amateurish crude coarse vulgar
    tacky cheap ugly hideous unsightly repellent offensive insulting rude arrogant hostile cold
    unfriendly mean cruel heartless insincere dishonest fake phony pretentious pompous shallow empty
    hollow pointless useless worthless hopeless pathetic pitiful miserable depressing dismal gloomy
    bleak grim disappointing unsatisfying underwhelming mediocre inferior substandard deficient
    defective faulty flawed messy chaotic confusing incoherent unbearable intolerable insufferable
    forgettable regrettable lamentable deplorable disastrous catastrophic ridiculous absurd""",
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


def file_rows(file):
    """Yield (place, row) for every row of a .csv or .jsonl file; the place is for messages. Rows
    are counted from 1; row 1 of a .csv is its header. Columns without a name are not read. Raises
    InputError.
    """
    csv.field_size_limit(2**31 - 1)  # no limit; the default is 131,072 characters
    is_csv, number = file.suffix.lower() == ".csv", 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = (json.loads(line) for line in lines if line.strip())
            if is_csv:
                rows = csv.DictReader(lines, strict=True)
                header = [name for name in rows.fieldnames or [] if name]
                if len(set(header)) < len(header):
                    raise ValueError(f"a column is named twice: {header}")
                number = 2
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                if is_csv and None in (*row, *row.values()):  # surplus cells, and missing ones
                    raise ValueError(f"more or fewer cells, separated by commas, than {header}")
                if is_csv and list(row) == [cell.strip('\ufeff"') for cell in row.values()]:
                    raise ValueError("the header again: were two files joined?")  # with BOMs, too
                yield f"{file}, row {number}", row
                number += 1
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: save it as UTF-8: {error}") from None
    except (ValueError, csv.Error, RecursionError) as error:  # not JSON, not CSV
        hint = "" if is_csv else " (a file is a .csv, or a .jsonl with one object per line)"
        raise InputError(f"{file}, row {number}: {error}{hint}") from None


def from_files(path):
    """Split -> (place, row) pairs. A folder has a file per split; a single file is the train split.
    Raises InputError.
    """
    if path.is_file():
        return {"train": file_rows(path)}
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (".csv", ".jsonl")]
    for split in SPLITS:
        if len([file for file in files if file.stem == split]) > 1:
            raise InputError(f"{path} has two files for the {split} split")
    return {file.stem: file_rows(file) for file in files}


def from_hub(spec, label_column):
    """Like `from_files`, for owner/name or owner/name:config on the Hub. Labels of a ClassLabel are
    its class names; rows of it without a label (-1, as in test splits of GLUE) are left out.
    """
    import datasets  # here, not above: importing it takes seconds

    name, _, config = spec.partition(":")
    if not is_hub_name(name) or Path(name).suffix.lower() in (".csv", ".jsonl"):
        raise InputError(f"no such file or folder: {spec!r} (a name on the Hub is owner/name)")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises dozens of types here
        raise InputError(f"{spec!r} cannot be read from the Hub: {error}") from None
    found = {}
    for split, rows in loaded.items():
        class_name = dict(enumerate(getattr(rows.features.get(label_column), "names", [])))
        rows = [(f"{split} of {spec}, example {i}", row) for i, row in enumerate(rows, 1)]
        if class_name:  # the column is a ClassLabel
            rows = [(place, row | {label_column: class_name.get(row[label_column])})
                    for place, row in rows if row[label_column] != -1]
        found[split] = rows
    return found


def read_task(spec, text_columns, label_column, wanted=SPLITS):
    """A task as it is: split -> list of (tuple of texts, class name). Raises InputError.

    spec: as the user names it. wanted: the splits to read, if they are there.
    """
    kind, _, domain = spec.partition(":")
    if kind == "reviews" and domain in NOUNS:
        pairs = reviews(domain)
        return {split: [((text,), name) for text, name in pairs[split]] for split in wanted}
    found = from_files(Path(spec)) if Path(spec).exists() else from_hub(spec, label_column)
    if unread := [split for split in found if split not in SPLITS]:
        print(f"note: these splits of {spec} are not used: {', '.join(unread)}")
    splits = {}
    for split in wanted:
        rows = found.get(split, [])
        if pairs := [example(place, row, text_columns, label_column) for place, row in rows]:
            splits[split] = pairs
    if "train" not in splits:
        raise InputError(f"{spec} has no training examples: it needs a train split (train.csv)")
    return splits


def example(place, row, text_columns, label_column):
    """The texts, a tuple of strings, and the class name of a row. Raises InputError."""
    columns = [*text_columns, label_column]
    if missing := [column for column in columns if column not in row]:
        raise InputError(f"{place} has the columns {list(row)}, separated by commas, but not "
                         f"{missing}: name yours by --text_columns, --label_column (or --aux_...), "
                         "or take a split without labels out of the folder")
    *texts, label = (row[column] for column in columns)
    label = str(label).lower() if isinstance(label, int) else label  # true, as JSON writes it
    for column, cell in zip(columns, (*texts, label)):
        if not isinstance(cell, str) or not cell.strip():
            raise InputError(f"{place}: {column!r} is {cell!r:.40}; a text is a string, a label a "
                             "string, an integer or a boolean, and neither is empty")
    return tuple(texts), label.strip()


# ---------------------------------------------------------------------------- from rows to examples


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

    splits: dict  # "train", "validation", "test" and, with an auxiliary task, "aux" -> Examples
    vocab: list
    labels: dict  # "target" and "auxiliary" -> list of class names


def text_key(texts):
    """A hash, equal for examples that differ only in case, accents, spaces, punctuation or
    invisible characters: of the letters and digits of each text (if it has none, of the text).
    """
    folded = [unicodedata.normalize("NFKD", text).casefold() for text in texts]
    letters = ["".join(filter(str.isalnum, f)) or text for f, text in zip(folded, texts)]
    return hashlib.blake2b(repr(letters).encode(), digest_size=8).digest()


def held_out(pairs):
    """A tenth of the distinct texts, with all their duplicates, and the rest; by hash, so that the
    split depends neither on the seed nor on the order of the file.
    """
    keys = [text_key(texts) for texts, _ in pairs]
    tenth = set(sorted(set(keys))[: (len(set(keys)) + 9) // 10])  # rounded up
    held = [pair for pair, key in zip(pairs, keys) if key in tenth]
    return held, [pair for pair, key in zip(pairs, keys) if key not in tenth]


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


def choose_vocab(train, aux, seen, size, known, bert):
    """The vocabulary of a run, in order of id: at most `size` tokens, unless those that always stay
    are more. SPECIAL comes first.

    Of words, the target's training tokens (the most frequent ones) and all that a parent knows are
    always kept; the auxiliary task's fill the places that are free. Of a BERT's pieces, single
    characters are always kept, so that any word can be read; then come the target's training
    pieces, the auxiliary task's, and the others in their own order without [unusedN], since BERT
    lists words by frequency.

    train, aux: lists of the tokens of a text. seen: all tokens in the order in which they were
    read, which decides between equally frequent ones. known: the parent's vocabulary, or [].
    """
    place = {token: i for i, token in enumerate(seen)}

    def by_frequency(texts):
        count = Counter(token for tokens in texts for token in tokens)
        return sorted(count, key=lambda token: (-count[token], place[token]))

    own = list(dict.fromkeys([*SPECIAL, *by_frequency(train)]))  # each once
    if bert:
        characters = [piece for piece in known if len(piece.removeprefix("##")) == 1]
        always = dict.fromkeys([*SPECIAL, CLS, *characters])
        others = [piece for piece in known if not piece.startswith("[unused")]
    else:
        always, others = dict.fromkeys([*own[:size], *known]), []
    ranked = dict.fromkeys([*always, *own, *by_frequency(aux), *others])
    return list(ranked)[: max(size, len(always))]


def choose_examples(args):
    """The examples that a run reads: split -> list of (tuple of texts, class name), with "aux" for
    the auxiliary task; class names by task, sorted; and all texts in the order in which they were
    read. Raises InputError.

    The training split is the limited subset. Auxiliary examples whose text also occurs in the
    target's validation or test split are dropped.
    """
    splits = read_task(args.target, args.text_columns, args.label_column)
    read = [texts for pairs in splits.values() for texts, _ in pairs]
    for split in ("test", "validation"):
        if split not in splits:
            print(f"note: no {split} split ({split}.jsonl or .csv): a tenth of train is used")
            splits[split], splits["train"] = held_out(splits["train"])
    names = {"target": sorted({name for pairs in splits.values() for _, name in pairs})}
    whole = splits["train"]
    if args.n_target == 1 or args.n_target > len(whole):
        raise InputError(f"n_target {args.n_target}: take 2 to {len(whole)} examples, or 0 for all")
    chosen = limited_subset(np.array([name for _, name in whole]), args.n_target or None, args.seed)
    splits["train"] = [pair for pair, is_chosen in zip(whole, chosen) if is_chosen]
    print(f"{len(splits['train'])} of {len(whole)} training examples are used (--n_target 0: all)")
    keys = {split: [text_key(texts) for texts, _ in splits[split]] for split in SPLITS}
    for split, other in (("test", "train"), ("validation", "train"), ("validation", "test")):
        others = set(keys[other])
        if again := sum(key in others for key in keys[split]):
            print(f"note: {again} of the {split} texts also occur in {other}")

    if args.aux != "none":
        aux = read_task(args.aux, args.aux_text_columns, args.aux_label_column, ["train"])["train"]
        read += [texts for texts, _ in aux]
        names["auxiliary"] = sorted({name for _, name in aux})
        held = {*keys["validation"], *keys["test"]}
        splits["aux"] = [pair for pair in aux if text_key(pair[0]) not in held]
        print(f"{len(aux) - len(splits['aux'])} auxiliary texts dropped: the target tests on them")
    for split, spec in (("train", args.target), ("aux", args.aux)):
        if split in splits and len({name for _, name in splits[split]}) < 2:
            raise InputError(f"{spec} has fewer than two classes to train on, held-out texts apart")
    return splits, names, read


def prepare(args, parent=None):
    """Both tasks as a Data, with one vocabulary. Raises InputError.

    args: the flags of a run. parent: the network to start from, or None. Its tokenizer is used,
    and its words are kept; of a BERT's pieces --vocab_size may drop some.
    """
    splits, names, read = choose_examples(args)
    known, bert, tokenizer = [], False, words
    if parent:
        known, bert, tokenizer = parent.vocab, parent.config.bert, parent.tokenizer

    @lru_cache(maxsize=None)
    def tokens(texts, tokenizer):
        return tokenize(texts, tokenizer, args.max_length, bert)

    seen = dict.fromkeys([*SPECIAL, *known])
    seen |= dict.fromkeys(token for texts in read for token in tokens(texts, tokenizer))
    train = [tokens(texts, tokenizer) for texts, _ in splits["train"]]
    aux = [tokens(texts, tokenizer) for texts, _ in splits.get("aux", [])]
    vocab = known
    if not bert or args.vocab_size:
        vocab = choose_vocab(train, aux, seen, args.vocab_size or 10_000, known, bert)
    if bert and args.vocab_size:
        theirs, tokenizer = tokenizer, partial(tokenizer, known=frozenset(vocab))
        other = [tokens(texts, tokenizer) != tokens(texts, theirs) for texts, _ in splits["test"]]
        print(f"note: with {len(vocab)} of {len(known)} pieces {np.mean(other):.1%} of the test "
              "texts are read differently from the parent")

    token_id = {token: i for i, token in enumerate(vocab)}
    examples = {}
    for split, pairs in splits.items():
        classes = names["auxiliary" if split == "aux" else "target"]
        class_id = {name: i for i, name in enumerate(classes)}
        lists = (tokens(texts, tokenizer) for texts, _ in pairs)
        ids = [np.array([token_id.get(t, UNK) for t in text], dtype=np.int32) for text in lists]
        examples[split] = Examples(ids, np.array([class_id[name] for _, name in pairs]))
    return Data(examples, vocab, names)


def epoch_order(length, batch_size, rng):
    """A random order (N,) of N texts in which neighbours have similar lengths, for little padding.

    length: (N,). Texts are shuffled, sorted by length within pools of 16 batches, and the batches
    shuffled. With few texts pools are smaller, an eighth of the texts but never less than a batch:
    in one pool for all, the same few of similar length would meet in every epoch. A pool of one
    batch is not sorted by this, and where batches do not divide N, some join two lengths.
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
