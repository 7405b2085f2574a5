"""Texts, pictures and rows of numbers as arrays on disk: tokenizers, encoders, writers."""
import hashlib
import itertools
import json
import re
from array import array
from pathlib import Path

from configurator import UserError

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from format import mask_token, pair_template, special_around
from values import texts_of

OWN_TOKENIZERS = "bpe", "bytes", "words"  # made from train; others are given

# --------------------------------------------------------------------------------------------------
# Tokenizers


def given_tokenizer(path):
    """The Tokenizer of a tokenizer.json, or of the folder that holds one."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--tokenizer={path}: no such file; it is 'bpe', 'bytes', 'words' or a "
                        "tokenizer.json") from None
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"--tokenizer={path}: not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_hash(tokenizer):
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def make_tokenizer(cfg, texts):
    """cfg.tokenizer: given, or trained on an iterator of texts; with cfg.template."""
    if cfg.tokenizer in OWN_TOKENIZERS:
        tokenizer = train_tokenizer(cfg, texts)
    else:
        tokenizer = given_tokenizer(cfg.tokenizer)
    if cfg.template is not None:
        add_template(tokenizer, cfg)
    return tokenizer


def add_template(tokenizer, cfg):
    """Let a tokenizer put the template's tokens around each text, in place, as it does with special
    tokens: so they count as these, and are never cut off."""
    before, _, after = cfg.template.replace("\\n", "\n").partition("{text}")
    n_prefix, n_suffix = special_around(tokenizer)
    ids = tokenizer.encode("a").ids
    parts = {"{before}": ids[:n_prefix] + tokenizer.encode(before, add_special_tokens=False).ids,
             "{after}": (tokenizer.encode(after, add_special_tokens=False).ids
                         + ids[len(ids) - n_suffix :])}
    parts = {name: part for name, part in parts.items() if part}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["{before}"] * ("{before}" in parts) + ["$A"] + ["{after}"] * ("{after}" in parts),
        special_tokens=[
            {"id": name, "ids": part, "tokens": [tokenizer.id_to_token(i) for i in part]}
            for name, part in parts.items()])


def train_tokenizer(cfg, texts):
    """A tokenizer of ours, "bpe", "words" or "bytes", trained on an iterator of texts."""
    special = ["[CLS]", "[MASK]"]
    if cfg.text_pair_column is not None:
        special.append("[SEP]")
    n_bytes_and_special = 256 + len(special)
    if cfg.tokenizer == "bpe" and cfg.vocab_size < n_bytes_and_special:
        raise UserError(f"--vocab_size={cfg.vocab_size}: a byte-level vocabulary has at least "
                        f"{n_bytes_and_special} entries")
    if cfg.tokenizer == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        trainer = trainers.WordLevelTrainer(
            vocab_size=cfg.vocab_size, special_tokens=[*special, "[UNK]"],
            show_progress=False)
    else:  # "bytes" is BPE without merges
        tokenizer = Tokenizer(models.BPE())
        size = n_bytes_and_special if cfg.tokenizer == "bytes" else cfg.vocab_size
        trainer = trainers.BpeTrainer(
            vocab_size=size, min_frequency=2, special_tokens=special,
            show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    steps = [normalizers.NFC()]
    if cfg.lowercase:
        steps.append(normalizers.Lowercase())
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=cfg.tokenizer != "bytes")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    # [CLS], so that every document has a token
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair=None if len(special) == 2 else "[CLS] $A [SEP] $B",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special])
    return tokenizer


def describe_tokenizer(tokenizer, cfg):
    """What meta.json holds of a tokenizer: mask_id; n_suffix, the special tokens at the end of each
    document; with a template n_prefix, those at its start; of bytes, which of them are letters and
    blanks (for baselines.LinearModel)."""
    n_prefix, n_suffix = special_around(tokenizer)
    mask = mask_token(tokenizer)
    mask_id = None if mask is None else tokenizer.token_to_id(mask)
    found = {"mask_id": mask_id, "n_suffix": n_suffix}
    if cfg.template is not None:
        found["n_prefix"] = n_prefix
    if cfg.text_pair_column is not None:
        found["pair"] = pair_template(tokenizer)
        found["n_suffix"] = found["pair"]["n_suffix"]
    if cfg.tokenizer == "bytes":
        ids = tokenizer.get_vocab()
        # a blank's token is chr(256 + byte). [CLS] is a word: that a word is the first tells much
        mask_and_blanks = [1, *(ids[chr(256 + byte)] for byte in range(33))]
        letters = [i for token, i in ids.items() if token.isalnum() or not token.isascii()]
        found["blanks"] = mask_and_blanks
        found["letters"] = sorted(set(letters) - set(mask_and_blanks))
    return found


# --------------------------------------------------------------------------------------------------
# Encoding and writing


class Tokens:
    """Texts → token ids.

    Byte-level BPE makes no token of what stands on both sides of a blank. So what lies between
    blanks, most often a word, is encoded once and then looked up: three times as fast on English as
    the library alone (NOTES.md), with the same ids.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.dtype = "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"
        self.pieces = Pieces(tokenizer) if parts_at_blanks(tokenizer) else None
        self.checked = self.pieces is None
        ids = tokenizer.encode("a").ids
        n_prefix, n_suffix = special_around(tokenizer)
        self.prefix = ids[:n_prefix]
        self.suffix = ids[len(ids) - n_suffix :]

    def __call__(self, texts):
        if not self.checked:  # the first texts show whether it is as parts_at_blanks thinks
            self.checked = True
            some = [text[:10_000] for text in texts[:20]]
            if any(self.by_pieces(text) != self.tokenizer.encode(text).ids for text in some):
                self.pieces = None
        if self.pieces is None:
            found = (encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts))
        else:
            found = map(self.by_pieces, texts)
        return (ids or [0] for ids in found)  # no document without a token

    def by_pieces(self, text):
        if len(text) < 2**20:
            pieces = Pieces.CUT.findall(text)
        else:  # slower, but not all of them at once
            pieces = (found[0] for found in Pieces.CUT.finditer(text))
        ids = map(self.pieces.__getitem__, pieces)
        return [*self.prefix, *itertools.chain.from_iterable(ids), *self.suffix]


class Pieces(dict):
    """The ids of a text's pieces, which it is cut into at single blanks."""
    CUT = re.compile(r"(?: ?\S+|\s+\S*)(?:(?! \S)\s+\S*)*")
    MOST_BYTES = 60e6  # memory for those that are kept

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.n_bytes = tokenizer, 0

    def __missing__(self, piece):
        ids = self.tokenizer.encode(piece, add_special_tokens=False).ids
        if self.n_bytes < self.MOST_BYTES and len(piece) < 1000:
            self[piece] = ids
            self.n_bytes += 150 + 4 * len(piece) + 36 * len(ids)
        return ids


def parts_at_blanks(tokenizer):
    """Does a tokenizer encode a word and the blank before it without looking at the one before? So
    do byte-level BPEs that first split a text as GPT-2 or its successors."""
    spec = json.loads(tokenizer.to_str())

    def types(name):
        step = spec[name]
        steps = step.get(name.replace("_", "") + "s", [step]) if step else []
        return [step["type"] for step in steps]
    splits = types("pre_tokenizer")
    splits_by_itself = splits == ["ByteLevel"] and spec["pre_tokenizer"].get("use_regex", True)
    return (spec["model"]["type"] == "BPE" and not spec["model"].get("dropout")
            and (splits_by_itself or splits == ["Split", "ByteLevel"])
            and set(types("normalizer")) <= {"NFC", "Lowercase"}
            and not any(" " in token["content"] for token in spec["added_tokens"]))


class Pixels:
    """Images as they are."""
    dtype = "uint8"

    def __call__(self, values):
        return values


class Features:
    """Rows of numbers, standardised; an empty one becomes the mean."""
    dtype = "float32"

    def __init__(self, scaling):
        self.mean = np.array(scaling["mean"])
        self.std = np.array(scaling["std"])

    def __call__(self, values):
        return np.nan_to_num((np.stack(values) - self.mean) / self.std, nan=0.0)


CONSTANT = 1e300  # as a standard deviation: the feature counts as 0, whatever a new file holds


def moments(examples, source):
    """Mean and standard deviation of each feature (NaN aside), and of the target where it is a
    number, in one pass (Chan, Golub & LeVeque 1979). A feature that does not vary gets the standard
    deviation CONSTANT."""
    count = mean = square = 0.0
    for value, target in examples:
        numbers = value if source.kind == "features" else []
        x = np.append(numbers, target)
        seen = ~np.isnan(x)
        count = count + seen
        step = np.where(seen, x - mean, 0) / np.maximum(count, 1)
        square = square + np.where(seen, step * count * (x - mean - step), 0)
        mean = mean + step
    std = np.sqrt(square / np.maximum(count, 1))
    if source.target == "number" and std[-1] == 0:
        raise UserError(f"{source.train_file}: every row has the target {mean[-1]:g}: there is "
                        "nothing to predict (is --label_column the right one?)")
    std[std == 0] = CONSTANT
    scaling = {}
    if source.kind == "features":
        scaling = {"mean": mean[:-1].tolist(), "std": std[:-1].tolist(), "columns": source.columns}
    if source.target == "number":
        scaling |= {"target_mean": float(mean[-1]), "target_std": float(std[-1])}
    return scaling


def describe_lengths(lengths):
    """What meta.json holds of the lengths of a split's documents, (N,)."""
    quantiles = np.quantile(lengths, [0, .25, .5, .75, .95, 1]).astype(int).tolist()
    return {"tokens": int(lengths.sum()), "length_quantiles": quantiles}


class Writer:
    """Writes {split}.bin .idx .lbl, about a million characters or values at a time."""

    def __init__(self, path, encode, scaling, target):
        self.path, self.encode, self.scaling, self.target = path, encode, scaling, target
        self.out = open(f"{path}.bin", "wb")
        self.lengths = array("q")
        self.shape = []
        self.labels = array({"number": "d", "labels": "B"}.get(target, "q"))
        self.n_bytes, self.waiting, self.size = 0, [], 0
        self.n_written = 0  # values: of text, tokens

    def add(self, value, target):
        """Returns a text's bytes, or an example's values."""
        self.waiting.append(value)
        self.labels.extend(target if isinstance(target, bytes) else [target])
        if isinstance(value, (str, tuple)):
            self.size += sum(map(len, texts_of(value)))
            size = sum(len(text.encode()) for text in texts_of(value))
            self.n_bytes += size
        else:
            size = value.size
            self.size += size
        if self.size > 1_000_000:
            self.flush()
        return size

    def flush(self):
        for x in self.encode(self.waiting):
            x = np.asarray(x, self.encode.dtype)
            self.out.write(x.tobytes())
            self.lengths.append(len(x))
            self.n_written += x.size
            self.shape = list(x.shape)
        self.waiting = []
        self.size = 0

    def close(self, n_classes):
        """Write what waits and the labels; returns the split's entry in meta.json."""
        if self.waiting:
            self.flush()
        self.out.close()
        lengths = np.array(self.lengths)
        labels = np.array(self.labels)
        counts = {"examples": len(lengths)}
        if isinstance(self.encode, Tokens):
            starts = np.concatenate([[0], np.cumsum(lengths)])
            starts.astype(np.int64).tofile(f"{self.path}.idx")
            counts |= {**describe_lengths(lengths), "bytes": self.n_bytes}
        if self.target == "number":
            standard = (labels - self.scaling["target_mean"]) / self.scaling["target_std"]
            standard.astype(np.float32).tofile(f"{self.path}.lbl")
            quantiles = np.quantile(labels, [0, .25, .5, .75, 1])
            counts["target_quantiles"] = [float(f"{q:.6g}") for q in quantiles]
        elif self.target == "labels":
            labels.tofile(f"{self.path}.lbl")
            counts["per_class"] = labels.reshape(-1, n_classes).sum(0, dtype=int).tolist()
        elif self.target == "class":
            labels.astype(np.int64).tofile(f"{self.path}.lbl")
            counts["per_class"] = np.bincount(labels, minlength=n_classes).tolist()
        return counts


class PairWriter(Writer):
    """Writes {split}.first, too, of pairs of texts."""

    def __init__(self, *args):
        super().__init__(*args)
        self.first_lengths = array("i")

    def flush(self):
        for encoding in self.encode.tokenizer.encode_batch_fast(self.waiting):
            self.out.write(np.array(encoding.ids, self.encode.dtype).tobytes())
            self.lengths.append(len(encoding.ids))
            self.first_lengths.append(encoding.sequence_ids.count(0))
        self.waiting = []
        self.size = 0

    def close(self, n_classes):
        counts = super().close(n_classes)
        np.array(self.first_lengths, np.int32).tofile(f"{self.path}.first")
        return counts
