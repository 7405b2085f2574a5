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

from format import SPLITS
from readers import is_header_word
from sources import (
    FEWEST_OF_VAL,
    VAL_FRACTION,
    held_out,
    is_skipped,
    rows,
    skipped_files,
    split_labels,
)
from values import is_missing, parse_number, texts_of


def unit_of(source):
    return {"text": " texts", "image": " images", "features": " rows"}[source.kind]


def is_complete(value, label, source):
    """Has a row both a value and a label? (With --target=labels it may have none.)"""
    if is_skipped(label, source):
        return False
    return not is_missing(value) and (label != "" or source.target == "labels")


class Survey:
    """The first reading: of each file's complete rows, in order, a fingerprint and a label.

    fingerprints {split: (N,) uint64}; labels {split: (N,)}: class; number; with --target=labels a
    hash of the set (label_sets holds the set); with --target=none the split. names: the labels, in
    order. source: the data settings, with image_size and val_fraction filled in.
    """

    def __init__(self, source, files):
        self.source, self.files, self.n_bad_rows = source, files, 0
        self.n_skipped = 0  # rows of skip_labels
        self.n_empty_seconds = 0  # pairs whose second text is empty
        self.unseen = set(source.skip_labels)
        self.fingerprints, self.labels = {}, {}
        self.ids = {}  # label → its number in order of first sight
        self.label_sets = {}  # with --target=labels: hash → labels
        for split in files:
            self.read(split)
        if source.val_fraction is None:
            n_val = VAL_FRACTION * len(self.labels["train"])
            too_few = n_val < FEWEST_OF_VAL and source.kind == "text" and source.target != "none"
            self.source = replace(self.source, val_fraction=0.0 if too_few else VAL_FRACTION)
        if self.unseen:
            raise UserError(f"--skip_labels={min(self.unseen)}: no row has that label; the others "
                            f"are {sorted(self.ids)[:20]}")
        if source.target == "class" and len(self.ids) < 2:
            raise UserError(f"{files['train']}: every example has the label {list(self.ids)[0]!r}; "
                            "a classifier needs two labels or more (is --label_column the right "
                            "one? Text without labels, for a language model: --target=none)")
        if source.target == "labels" and not self.ids:
            raise UserError(f"{files['train']}: no row has a label (is --label_column the right "
                            "one?)")
        self.names = sorted(self.ids)
        if source.target == "class":
            self.check_names()
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
                self.n_empty_seconds += isinstance(value, tuple) and not value[1]
                fingerprints.append(fingerprint(value))
                labels.append(self.label_id(label, where, split))
            elif is_skipped(label, source):
                self.n_skipped += 1
                self.unseen -= set(split_labels(label, source))
            elif source.drop_bad_rows:
                self.n_bad_rows += 1
            else:
                empty = "text" if is_missing(value) else "label"
                raise UserError(f"{where}: the {empty} is empty; mend the row, or leave such rows "
                                "out with --drop_bad_rows=True")
        if not fingerprints:
            left_out = f": {self.n_bad_rows} bad rows are left out" if self.n_bad_rows else ""
            raise UserError(f"{file}: holds no examples{left_out}")
        self.fingerprints[split] = np.array(fingerprints, np.uint64)
        self.labels[split] = np.array(labels)

    def label_id(self, label, where, split):
        if self.source.target == "number":
            return parse_number(label, where, self.source)
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
        key = fingerprint(str(found)) >> 1
        self.label_sets[key] = found
        return key

    def check_names(self):
        """Raise UserError for a label that is a column's name, and for two that are one number."""
        first = next(iter(self.ids))
        is_alone = (self.labels["train"] == 0).sum() == 1
        if self.source.header is None and is_alone and is_header_word(first):
            raise UserError(f"{self.files['train']}: the label of the first row, {first!r}, occurs "
                            "once: is that row names? Give --header=True, or --header=False if it "
                            "is an example")
        if self.source.header is None and is_alone and len(self.labels["train"]) > 20:
            print(f"the first row's label, {first!r}, occurs once: if that row is names, give "
                  "--header=True", flush=True)
        numbers = {}
        for name in self.names:
            try:
                other = numbers.setdefault(float(name), name)
            except ValueError:
                continue
            if other != name:
                raise UserError(f"{self.files['train']}: the labels {other!r} and {name!r} are the "
                                "same number: write them alike")

    def conflicts(self):
        """How many more pairs (value, label) train has than values."""
        if self.source.target not in ("class", "labels"):
            return 0
        values = self.fingerprints["train"]
        odd = np.uint64(0x9E3779B97F4A7C15)  # mixes a label into 64 bits
        pairs = values ^ (self.labels["train"].astype(np.uint64) + np.uint64(1)) * odd
        return len(np.unique(pairs)) - len(np.unique(values))


def fingerprint(value):
    """64 bits of an example, to compare examples by: of a text NFKC, casefolded, with runs of
    blanks made one."""
    if isinstance(value, (str, tuple)):
        texts = [" ".join(unicodedata.normalize("NFKC", text).casefold().split())
                 for text in texts_of(value)]
        value = "\n".join(texts).encode("utf-8", "surrogatepass")
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
    if source.skip_labels:
        removed["rows_of_skip_labels"] = survey.n_skipped
    for file in survey.files.values():
        for kind, n in skipped_files(file).items():
            removed[kind] = removed.get(kind, 0) + n
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
        if source.target == "labels":
            stratify_sets(assignment["train"], [survey.label_sets[key] for key in labels.tolist()],
                          held_out(source), source.split_seed)
            return assignment, removed, overlaps
        if source.target != "class":
            labels = np.zeros(len(labels), int)  # numbers: split at random
        stratify(assignment["train"], labels, held_out(source), source.split_seed)
    return assignment, removed, overlaps


def stratify(assignment, labels, fractions, seed):
    """Move rows of train (assignment 0), at random but with equal shares of each class, to the
    splits in `fractions`, in place. A class keeps at least one row in train. Where shares are no
    whole rows and classes have equal claims, those go first of which less was taken; then by lot.
    """
    rng = np.random.default_rng(seed)
    pools = []  # of each class, its rows in random order
    for c in range(labels.max() + 1):
        pools.append(rng.permutation(np.flatnonzero((labels == c) & (assignment == 0))))
    lot = np.random.default_rng((seed, 1)).permutation(len(pools))
    sizes = np.array([len(pool) for pool in pools])
    taken = np.zeros(len(pools), int)
    for split, fraction in fractions.items():
        exact = sizes * fraction
        most = np.maximum(sizes - 1 - taken, 0)
        take = np.minimum(np.floor(exact).astype(int), most)
        n_missing = round(exact.sum()) - take.sum()
        by_claim = np.lexsort((lot, taken, take - exact))
        take[by_claim[take[by_claim] < most[by_claim]][:n_missing]] += 1
        for pool, start, n in zip(pools, taken, take):
            assignment[pool[start : start + n]] = SPLITS.index(split)
        taken += take


def stratify_sets(assignment, label_sets, fractions, seed):
    """As stratify, of rows with several labels (iterative stratification, Sechidis et al. 2011).

    The rarest label's rows are dealt out first, each to the split that lacks most of that label, of
    equal ones to that which lacks most rows. Rows without labels are dealt out last.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(assignment == 0)).tolist()
    shares = {"train": 1 - sum(fractions.values())} | fractions
    rows_of = {}
    for row in rows:
        for label in label_sets[row]:
            rows_of.setdefault(label, []).append(row)
    wanted = {split: {label: share * len(members) for label, members in rows_of.items()}
              for split, share in shares.items()}  # rows of each label that a split still lacks
    lacks = {split: share * len(rows) for split, share in shares.items()}
    left = {label: len(members) for label, members in rows_of.items()}  # not yet dealt out
    dealt = set()

    def deal(row, label=None):
        split = max(shares, key=lambda s: (wanted[s].get(label, 0), lacks[s]))
        assignment[row] = SPLITS.index(split)
        dealt.add(row)
        lacks[split] -= 1
        for other in label_sets[row]:
            wanted[split][other] -= 1
            left[other] -= 1
    while left := {label: n for label, n in left.items() if n}:
        rarest = min(left, key=lambda label: (left[label], label))
        for row in rows_of[rarest]:
            if row not in dealt:
                deal(row, rarest)
    for row in rows:
        if row not in dealt:
            deal(row)
