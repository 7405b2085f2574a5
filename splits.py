"""Which rows of a source stay, and which split each goes to.

The first reading of a source leaves a fingerprint and a label of each complete row (Survey). From
these follow duplicates, overlaps between files, and stratified splits (assign_splits).
"""
import hashlib
import unicodedata
from array import array
from dataclasses import replace

from configurator import UserError

import numpy as np
from tqdm import tqdm

from batches import SPLITS
from sources import held_out, is_missing, parse_number, rows, split_labels


def unit_of(source):
    return {"text": " texts", "image": " images", "features": " rows"}[source.kind]


def is_complete(value, label, source):
    """Has a row both a value and a label? (With --target=labels it may have none.)"""
    return not is_missing(value) and (label != "" or source.target == "labels")


class Survey:
    """The first reading: of each file's complete rows, in order, a fingerprint and a label.

    fingerprints {split: (N,) uint64}; labels {split: (N,)}: class; number; with --target=labels a
    hash of the set; with --target=none the split. names: the labels, in order. source: the data
    settings, with image_size filled in.
    """

    def __init__(self, source, files):
        self.source, self.files, self.n_bad_rows = source, files, 0
        self.fingerprints, self.labels = {}, {}
        self.ids = {}  # label → its number in order of first sight
        for split in files:
            self.read(split)
        if source.target == "class" and len(self.ids) < 2:
            raise UserError(f"{files['train']}: every example has the label {list(self.ids)[0]!r}; "
                            "a classifier needs two labels or more (is --label_column the right "
                            "one?)")
        if source.target == "labels" and not self.ids:
            raise UserError(f"{files['train']}: no row has a label (is --label_column the right "
                            "one?)")
        self.names = sorted(self.ids)
        if all(name.removeprefix("-").isdecimal() for name in self.names):
            self.names.sort(key=lambda name: (int(name), name))
        if source.target == "class":
            rank = np.array([self.names.index(name) for name in self.ids])
            self.labels = {split: rank[ids] for split, ids in self.labels.items()}

    def read(self, split):
        source = self.source
        file = self.files[split]
        fingerprints = array("Q")
        labels = array("d" if source.target == "number" else "q")
        progress = tqdm(rows(file, source), desc=f"reading {split}", unit=unit_of(source))
        for where, value, label in progress:
            if is_complete(value, label, source):
                if source.kind == "image":
                    self.source = replace(source, image_size=list(value.shape))
                fingerprints.append(fingerprint(value))
                labels.append(self.label_id(label, where, split))
            elif source.drop_bad_rows:
                self.n_bad_rows += 1
            else:
                empty = "text" if is_missing(value) else "label"
                raise UserError(f"{where}: the {empty} is empty; mend the row, or leave such rows "
                                "out with --drop_bad_rows=True")
        if not fingerprints:
            raise UserError(f"{file}: holds no examples")
        self.fingerprints[split] = np.array(fingerprints, np.uint64)
        self.labels[split] = np.array(labels)

    def label_id(self, label, where, split):
        if self.source.target == "number":
            return parse_number(label, where)
        if self.source.target == "none":
            return SPLITS.index(label)
        found = split_labels(label, self.source)
        for name in found:
            if name not in self.ids and split != "train":
                raise UserError(f"{where}: label {name!r} does not occur in {self.files['train']}, "
                                f"whose labels are {sorted(self.ids)[:20]}")
            self.ids.setdefault(name, len(self.ids))
        if self.source.target == "class":
            return self.ids[label]
        return fingerprint(str(found)) >> 1

    def conflicts(self):
        """How many more pairs (value, label) train has than values."""
        if self.source.target not in ("class", "labels"):
            return 0
        values = self.fingerprints["train"]
        pairs = np.stack([values, self.labels["train"].astype(np.uint64)])
        return len(np.unique(pairs, axis=1).T) - len(np.unique(values))


def fingerprint(value):
    """64 bits of an example, to compare examples by: of a text NFKC, casefolded, with runs of
    blanks made one."""
    if isinstance(value, str):
        value = " ".join(unicodedata.normalize("NFKC", value).casefold().split())
        value = value.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(bytes(value), digest_size=8).digest(), "little")


def assign_splits(survey, source):
    """Where each row goes: ({split of its file: (N,) index into SPLITS, -1 for removed}, counts of
    what is removed, overlaps between files)."""
    prints = survey.fingerprints
    assignment = {split: np.full(len(p), SPLITS.index(split)) for split, p in prints.items()}
    overlaps = {}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if a in prints and b in prints:
            overlaps[f"{a}-{b}"] = int(np.isin(prints[a], prints[b]).sum())
    removed = {"bad_rows": survey.n_bad_rows, "duplicates_in_train": 0,
               "train_rows_also_in_val_or_test": 0}
    if source.dedup and source.kind != "features":  # two cars may well have the same numbers
        repeated = np.ones(len(prints["train"]), bool)
        repeated[np.unique(prints["train"], return_index=True)[1]] = False
        others = [p for split, p in prints.items() if split != "train"]
        elsewhere = np.isin(prints["train"], np.concatenate(others or [[]]))
        assignment["train"][repeated | elsewhere] = -1
        removed["duplicates_in_train"] = int(repeated.sum())
        removed["train_rows_also_in_val_or_test"] = int((~repeated & elsewhere).sum())
    labels = survey.labels["train"]
    if source.target == "none" and labels.any():  # a document that was cut
        assignment["train"] = labels
    else:
        if source.target != "class":
            labels = np.zeros(len(labels), int)  # numbers, and sets of labels: split at random
        stratify(assignment["train"], labels, held_out(source), source.split_seed)
    return assignment, removed, overlaps


def stratify(assignment, labels, fractions, seed):
    """Move rows of train (assignment 0), at random but with equal shares of each class, to the
    splits in `fractions`, in place."""
    rng = np.random.default_rng(seed)
    pools = []  # of each class, its rows in random order
    for c in range(labels.max() + 1):
        pools.append(rng.permutation(np.flatnonzero((labels == c) & (assignment == 0))))
    sizes = np.array([len(pool) for pool in pools])
    taken = np.zeros(len(pools), int)
    for split, fraction in fractions.items():
        exact = sizes * fraction
        take = np.floor(exact).astype(int)
        n_missing = round(exact.sum()) - take.sum()
        largest_remainders = np.argsort(take - exact, kind="stable")[:n_missing]
        take[largest_remainders] += 1
        for pool, start, n in zip(pools, taken, take):
            assignment[pool[start : start + n]] = SPLITS.index(split)
        taken += take
