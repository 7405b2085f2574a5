"""The preparation script: rows of a source → clean splits on disk (batches.py says in what format).

    python data.py config/textcls.py

builds the data set of a config and prints what is in it. train.py does so by itself where the data
set is not there yet. The source is read three times (clean and hash; train the tokenizer; encode)
and never held: memory stays flat, but for one long .txt with --target=none, which is one document.
"""
import ast
import hashlib
import json
import os
import shutil
import sys
from array import array
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Literal

from configurator import UserError, configure, file_sha256, run, scratch_folder, write_json

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
from tqdm import tqdm

from format import FORMAT, SPLITS, mask_token, pair_template, read_meta, special_around
from sources import (
    DataConfig,
    data_settings,
    feature_columns,
    held_out,
    rebuild_command,
    resolve,
    rows,
    target_of,
)
from splits import Survey, assign_splits, is_complete, unit_of
from values import texts_of

TASK_OF_TARGET = {"class": "classification", "labels": "multilabel", "number": "regression",
                  "none": "none"}  # as meta.json names it
OWN_TOKENIZERS = "bpe", "bytes", "words"  # made from train; others are given


# --------------------------------------------------------------------------------------------------
# Which data set a config means


def folder_of(cfg):
    """data_dir/<dataset>, or, for another tokenizer than "bpe", data_dir/<dataset>-<its name or
    hash> beside it. Raises UserError for a name that is no folder's."""
    if cfg.dataset in ("", ".", "..") or Path(cfg.dataset).name != cfg.dataset:
        raise UserError(f"--dataset={cfg.dataset!r} names a folder in data_dir, so it can be "
                        "neither empty nor a path; for instance --dataset=reviews")
    if cfg.tokenizer == "bpe":
        return Path(cfg.data_dir) / cfg.dataset
    name = cfg.tokenizer
    if name not in OWN_TOKENIZERS:
        name = tokenizer_hash(given_tokenizer(cfg.tokenizer))[:8]
    return Path(cfg.data_dir) / f"{cfg.dataset}-{name}"


def build_settings(cfg):
    """What a data set depends on. A given tokenizer counts by its content: see folder_of."""
    settings = {field.name: getattr(cfg, field.name) for field in fields(DataConfig)}
    for name in ("data_dir", "overwrite", "dataset", "max_row_mb"):
        del settings[name]
    if cfg.target != "labels":
        del settings["label_separator"]
    if cfg.template is None:  # as data sets from before there was one
        del settings["template"]
    if cfg.tokenizer == "bytes":
        settings["vocab_size"] = "of bytes"
    elif cfg.tokenizer not in OWN_TOKENIZERS:
        settings |= dict.fromkeys(("tokenizer", "vocab_size", "lowercase"), "given")
    return settings


def open_meta(cfg):
    """meta.json of the data set that `cfg` names, or None where there is none. Raises UserError
    where it was built otherwise."""
    folder = folder_of(cfg)
    rebuild = rebuild_command(cfg)
    meta = read_meta(folder, rebuild)
    if meta is None:
        return None
    if not cfg.train_file:  # the command must say what it was built from
        files = {f"{split}_file": meta["build"].get(f"{split}_file") for split in SPLITS}
        rebuild = rebuild_command(replace(data_settings(vars(cfg)), **files))
    built = build_settings(DataConfig()) | meta["build"]  # settings newer than it: the default
    for key, value in json.loads(json.dumps(build_settings(cfg))).items():
        as_built = key == "val_fraction" and value is None
        if value != built.get(key, value) and not as_built:
            raise UserError(f"{folder} was built with {key}={built[key]!r}, not {value!r}; "
                            f"name another data set with --dataset=NAME, or rebuild it with: "
                            f"{rebuild}")
    built = os.path.getmtime(folder / "meta.json")
    for split, file in meta["source"].items():
        touched = os.path.isfile(file) and os.path.getmtime(file) > built
        if touched and file_sha256(file) != meta["source_sha256"].get(split):
            raise UserError(f"{file} has changed since {folder} was built from it; "
                            f"rebuild it with: {rebuild}")
    return meta


def open_or_build(cfg):
    """(the data set's folder, its meta.json as a dict), built where it is not there."""
    meta = open_meta(cfg)
    if meta is None:
        meta = build(cfg)
        print_table(meta)
    return folder_of(cfg), meta


# --------------------------------------------------------------------------------------------------
# Building: clean → remove duplicates → split → tokenize → write


def build(cfg):
    """Build the data set's folder from its source and return its meta. What fails leaves nothing
    behind. An older folder goes only when the new one stands, and only if we made all of it."""
    folder = folder_of(cfg)
    aside = folder.with_name(f".{folder.name}.old")
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)  # a kill came between the two renames below
    check_replaceable(folder, resolve(cfg))
    with scratch_folder(folder) as scratch:
        work = scratch / "new"
        work.mkdir()
        meta = build_into(work, cfg)
        check_replaceable(folder, resolve(cfg))  # again: building may take long
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            os.rename(folder, aside)
        os.rename(work, folder)
        shutil.rmtree(aside, ignore_errors=True)
    return meta


def check_replaceable(folder, source):
    """Raise UserError where to build `folder` anew would delete what we did not make."""
    ours = {"meta.json", "meta.json.tmp", "tokenizer.json"}
    suffixes = "bin", "idx", "first", "lbl"
    ours |= {f"{split}.{suffix}" for split in SPLITS for suffix in suffixes}
    others = []
    if folder.is_dir():
        others = sorted(f.name for f in folder.iterdir() if f.name not in ours or f.is_dir())
    if others or folder.is_file():
        what = f"holds {others[0]}" if others else "is a file"
        raise UserError(f"{folder} {what}, which is no part of a data set and would be deleted; "
                        "name the data set otherwise (--dataset=NAME), or move it away")
    for file in (source.train_file, source.val_file, source.test_file):
        if file and folder.resolve() in (Path(file).resolve(), *Path(file).resolve().parents):
            raise UserError(f"{file} lies in {folder}, which building the data set replaces; "
                            "name the data set otherwise: --dataset=NAME")


def files_of(source):
    """{split: its file} of the splits that have one."""
    return {split: file for split in SPLITS if (file := getattr(source, f"{split}_file"))}


def build_into(work, cfg):
    source = resolve(cfg)
    files = files_of(source)
    print(f"building {folder_of(cfg)} from {files['train']}", flush=True)
    if source.kind == "features" and not source.columns:
        source = replace(source, columns=feature_columns(files["train"], source))
    survey = Survey(source, files)
    source = survey.source
    assignment, removed, overlaps = assign_splits(survey, source)

    def examples(file_split):
        return kept_examples(files[file_split], source, assignment[file_split], survey.names)

    # the tokenizer, or means and standard deviations, from train only
    def of_train():
        return ((value, target) for value, target, split in examples("train") if split == "train")
    vocab_size = 0
    scaling = {}
    encode = Pixels()
    if source.kind == "text":
        if survey.n_empty_seconds:
            print(f"{survey.n_empty_seconds} pairs have an empty second text", flush=True)
        texts = (text for value, _ in of_train() for text in texts_of(value))
        tokenizer = make_tokenizer(cfg, texts)
        encode = Tokens(tokenizer)
        vocab_size = tokenizer.get_vocab_size()
        (work / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    if source.kind == "features" or source.target == "number":
        scaling = moments(of_train(), source)
    if source.kind == "features":
        encode = Features(scaling)

    # encode and write
    sizes = {split: sum(int((a == i).sum()) for a in assignment.values())
             for i, split in enumerate(SPLITS)}
    for split in ("train", *files, *held_out(source)):
        if not sizes[split]:
            counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in removed.items())
            raise UserError(f"{files['train']}: {split} would be empty: {why_empty(removed)} "
                            f"(removed: {counts})")
    make_writer = Writer if source.text_pair_column is None else PairWriter
    writers = {split: make_writer(work / split, encode, scaling, source.target)
               for split, size in sizes.items() if size}
    with tqdm(total=sum(sizes.values()), desc="encoding", unit=unit_of(source)) as bar:
        for file_split in files:
            for value, target, split in examples(file_split):
                writers[split].add(value, target)
                bar.update()
    splits = {split: writer.close(len(survey.names)) for split, writer in writers.items()}
    meta = {
        "format": FORMAT, "kind": source.kind, "task": TASK_OF_TARGET[source.target],
        "dataset": cfg.dataset, "label_names": survey.names, "dtype": encode.dtype,
        "vocab_size": vocab_size, "shape": writers["train"].shape, "scaling": scaling,
        "build": build_settings(cfg) | {"val_fraction": source.val_fraction}, "source": files,
        "source_sha256": {s: file_sha256(f) for s, f in files.items() if os.path.isfile(f)},
        "removed": removed, "conflicting_labels": survey.conflicts(), "overlaps": overlaps,
        "splits": splits, "sha256": {f.name: file_sha256(f) for f in sorted(work.iterdir())}}
    if source.kind == "text":
        meta |= describe_tokenizer(tokenizer, cfg) | {
            "tokenizer_sha256": meta["sha256"]["tokenizer.json"]}
    write_json(work / "meta.json", meta)
    return meta


def kept_examples(file, source, assignment, names):
    """(value, target, the split it goes to) of the rows of a file that stay."""
    splits = iter(assignment)
    for where, value, label in rows(file, source):
        if is_complete(value, label, source) and (split := next(splits)) >= 0:
            yield value, target_of(label, where, names, source), SPLITS[split]


def train_examples(cfg):
    """(values, targets) of the train split that `build` makes, read from its source again."""
    source = resolve(cfg)
    files = files_of(source)
    survey = Survey(source, files)
    assignment, _, _ = assign_splits(survey, survey.source)
    kept = kept_examples(files["train"], survey.source, assignment["train"], survey.names)
    found = [(value, target) for value, target, split in kept if split == "train"]
    return [value for value, _ in found], [target for _, target in found]


def why_empty(removed):
    """What most likely left a split without examples, and what to do."""
    n_bad, n_twice, n_elsewhere = (removed[key] for key in (
        "bad_rows", "duplicates_in_train", "train_rows_also_in_val_or_test"))
    if not n_bad + n_twice + n_elsewhere:
        return "too few examples; give a --val_file, or a larger --val_fraction"
    if n_elsewhere >= max(n_bad, n_twice):
        return "train's rows stand in val or test, too: give other files, or --dedup=False"
    if n_twice >= n_bad:
        return "most rows stand there several times; if that is right: --dedup=False"
    return "most rows lack a text or a label: are --text_column and --label_column right?"


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
    """Texts → token ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.dtype = "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"

    def __call__(self, texts):
        encodings = self.tokenizer.encode_batch_fast(texts)
        return (encoding.ids or [0] for encoding in encodings)  # no document without a token


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


def moments(examples, source):
    """Mean and standard deviation of each feature (NaN aside), and of the target where it is a
    number, in one pass (Chan, Golub & LeVeque 1979). A feature that does not vary gets standard
    deviation 1."""
    count = mean = square = 0.0
    for value, target in examples:
        numbers = value.astype(np.float64) if source.kind == "features" else []
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
    std[std == 0] = 1
    scaling = {}
    if source.kind == "features":
        scaling = {"mean": mean[:-1].tolist(), "std": std[:-1].tolist(), "columns": source.columns}
    if source.target == "number":
        scaling |= {"target_mean": float(mean[-1]), "target_std": float(std[-1])}
    return scaling


class Writer:
    """Writes {split}.bin .idx .lbl, about a million characters or values at a time."""

    def __init__(self, path, encode, scaling, target):
        self.path, self.encode, self.scaling, self.target = path, encode, scaling, target
        self.out = open(f"{path}.bin", "wb")
        self.lengths = array("q")
        self.shape = []
        self.labels = array({"number": "d", "labels": "B"}.get(target, "q"))
        self.n_bytes, self.waiting, self.size = 0, [], 0

    def add(self, value, target):
        self.waiting.append(value)
        self.labels.extend(target if isinstance(target, bytes) else [target])
        if isinstance(value, (str, tuple)):
            self.size += sum(map(len, texts_of(value)))
            self.n_bytes += sum(len(text.encode()) for text in texts_of(value))
        else:
            self.size += value.size
        if self.size > 1_000_000:
            self.flush()

    def flush(self):
        for x in self.encode(self.waiting):
            x = np.asarray(x, self.encode.dtype)
            self.out.write(x.tobytes())
            self.lengths.append(len(x))
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
            quantiles = np.quantile(lengths, [0, .25, .5, .75, .95, 1]).astype(int).tolist()
            counts |= {"tokens": int(lengths.sum()), "bytes": self.n_bytes,
                       "length_quantiles": quantiles}
        if self.target == "number":
            standard = (labels - self.scaling["target_mean"]) / self.scaling["target_std"]
            standard.astype(np.float32).tofile(f"{self.path}.lbl")
            quantiles = np.quantile(labels, [0, .25, .5, .75, 1]).round(4).tolist()
            counts["target_quantiles"] = quantiles
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


# --------------------------------------------------------------------------------------------------
# For a person


def print_table(meta):
    """What a data set holds."""
    is_text = meta["kind"] == "text"
    names = meta["label_names"]
    what = "labels" if meta["task"] == "multilabel" else "classes"
    targets = {"regression": "a number to predict", "none": "no labels"}.get(
        meta["task"], f"{len(names)} {what}")
    values = f"vocabulary {meta['vocab_size']:,}"
    if not is_text:
        unit = "pixels" if meta["kind"] == "image" else "features"
        values = f"{'×'.join(map(str, meta['shape']))} {unit}"
    removed = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in meta["removed"].items())
    overlaps = ", ".join(f"{splits} {n}" for splits, n in meta["overlaps"].items())
    print(f"{meta['dataset']}: {targets}, {values}; removed: {removed}; "
          f"{meta['conflicting_labels']} examples with conflicting labels; overlaps found: "
          f"{overlaps or 'none (split here)'}")
    heads = {"regression": "target min/25%/median/75%/max", "none": ""}
    lengths_head = f"{'tokens':>12}   length min/25%/median/75%/95%/max " if is_text else ""
    print(f"{'split':6} {'examples':>9} {lengths_head}  "
          f"{heads.get(meta['task'], f'share of each of the {what}')}")
    for split, counts in meta["splits"].items():
        lengths = ""
        if is_text:
            quantiles = "/".join(map(str, counts["length_quantiles"]))
            lengths = f"{counts['tokens']:12,}   {quantiles:34}"
        shares = "/".join(map(str, counts.get("target_quantiles", ())))
        if names:
            shares = "  ".join(f"{name} {n / counts['examples']:.1%}"
                               for name, n in zip(names[:10], counts["per_class"]))
        print(f"{split:6} {counts['examples']:9,} {lengths}  {shares}")
    for split, counts in meta["splits"].items():
        lacking = [name for name, n in zip(names, counts.get("per_class", ())) if not n]
        if lacking:
            print(f"{split} lacks {len(lacking)} of the {len(names)} {what}: "
                  f"{', '.join(lacking[:10])}{', …' if len(lacking) > 10 else ''}")


def print_cut(split, starts, max_len):
    """Say how much of a split's texts is longer than max_len, and so not read. starts (N+1,): where
    each text begins."""
    lengths = np.diff(starts)
    n_cut = (lengths > max_len).sum()
    if n_cut:
        lost = np.maximum(lengths - max_len, 0).sum() / lengths.sum()
        print(f"{split}: {n_cut:,} texts ({n_cut / len(lengths):.1%}) are longer than max_len="
              f"{max_len}: what stands behind, {lost:.1%} of all tokens, is not read", flush=True)


def whole_config():
    """DataConfig with the settings of train.py and finetune.py behind it, so that a config file is
    checked whole. They are read from the scripts' source, which imports nothing."""
    settings = {}
    for script in ("train.py", "finetune.py"):
        tree = ast.parse((Path(__file__).parent / script).read_text(encoding="utf-8"))
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in classes["Config"].body:
            if isinstance(node, ast.AnnAssign):
                annotation = compile(ast.Expression(node.annotation), script, "eval")
                settings[node.target.id] = eval(annotation, {"Literal": Literal})
    others = [(name, annotation, None) for name, annotation in settings.items()]
    return make_dataclass("Config", others, bases=(DataConfig,))


def main():
    asks_for_help = {"--help", "-h"} & set(sys.argv)
    cfg = configure(DataConfig if asks_for_help else whole_config())
    meta = None if cfg.overwrite else open_meta(cfg)
    meta = meta or build(cfg)
    print_table(meta)
    if meta["kind"] == "text" and meta["task"] != "none" and getattr(cfg, "max_len", None):
        for split in meta["splits"]:
            starts = np.fromfile(folder_of(cfg) / f"{split}.idx", np.int64)
            print_cut(split, starts, cfg.max_len)


if __name__ == "__main__":
    run(main)
