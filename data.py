"""The preparation script: rows of a source → clean splits on disk (batches.py says in what format).

    python data.py config/textcls.py

builds the data set of a config and prints what is in it. train.py does so by itself where the data
set is not there yet. The source is read three times (clean and hash; train the tokenizer; encode)
and never held: memory stays flat, but for one long .txt with --target=none, which is one document.
"""
import contextlib
import json
import math
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

from configurator import (
    UserError,
    configure,
    file_sha256,
    has_changed,
    has_sha256,
    run,
    scratch_folder,
    write_json,
)

import numpy as np
from tqdm import tqdm

import corpus
from encoding import (
    CONSTANT,
    OWN_TOKENIZERS,
    Features,
    PairWriter,
    Pixels,
    Tokens,
    Writer,
    describe_tokenizer,
    given_tokenizer,
    make_tokenizer,
    moments,
    tokenizer_hash,
)
from format import FORMAT, SPLITS, damaged, read_meta
from settings import FinetuneConfig
from sources import (
    DataConfig,
    data_settings,
    feature_columns,
    held_out,
    rebuild_command,
    resolve,
    rows,
    target_of,
    with_built_in,
)
from splits import Survey, assign_splits, is_complete, unit_of
from values import texts_of

TASK_OF_TARGET = {"class": "classification", "labels": "multilabel", "number": "regression",
                  "none": "none"}  # as meta.json names it
IF_GIVEN = "template", "shards", "max_tokens"  # settings that meta.json has only if they are given


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
    for name in IF_GIVEN:
        if settings[name] is None:
            del settings[name]
    if cfg.shards is not None:
        _, settings["shards"] = corpus.parse_shards(cfg.shards)
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
    not_given = dict.fromkeys(IF_GIVEN)
    built = not_given | build_settings(DataConfig()) | meta["build"]  # newer settings: the default
    for key, value in json.loads(json.dumps(not_given | build_settings(cfg))).items():
        as_built = key == "val_fraction" and value is None
        if value != built.get(key, value) and not as_built:
            raise UserError(f"{folder} was built with {key}={built[key]!r}, not {value!r}; "
                            f"name another data set with --dataset=NAME, or rebuild it with: "
                            f"{rebuild}")
    if corpus.is_in_shards(meta["build"]):
        corpus.check_sources(resolve(cfg), meta, folder)
        return meta
    built = os.path.getmtime(folder / "meta.json")
    for split, file in meta["source"].items():
        if has_changed(file, built, meta["source_sha256"].get(split)):
            raise UserError(f"{file} has changed since {folder} was built from it; "
                            f"rebuild it with: {rebuild}")
    return meta


def check_files(folder, meta, rebuild):
    """Raise UserError for a file that is not as it was built."""
    for name, expected in tqdm(meta["sha256"].items(), desc="checking", unit=" files"):
        if not has_sha256(folder / name, expected):
            raise damaged(folder / name, rebuild)


def open_or_build(cfg):
    """(the data set's folder, its meta.json as a dict), built where it is not there."""
    if corpus.is_partial(cfg.shards):
        _, n = corpus.parse_shards(cfg.shards)
        raise UserError(f"--shards={cfg.shards} are some shards of a data set: give --shards={n}")
    meta = open_meta(cfg)
    if meta is None:
        meta = build(cfg)
        print_table(meta)
    return folder_of(cfg), meta


def open_mix(cfg, meta):
    """The data sets that cfg.mix names: a list of ((folder, meta), share). Raises UserError for one
    that is not built, or not with the tokenizer of `meta`."""
    found = []
    for part in cfg.mix.split(","):
        name, _, share = part.strip().rpartition(":")
        try:
            share = float(share)
        except ValueError:
            share = 0.0
        if not name or not 0 < share < math.inf:
            raise UserError(f"--mix={cfg.mix}: {part!r} is not a data set and a share above 0, as "
                            "web:0.7")
        folder = folder_of(replace(cfg, dataset=name))
        given = Path(cfg.data_dir) / f"{name}-{meta['tokenizer_sha256'][:8]}"  # see folder_of
        folder = given if given.exists() else folder
        other = read_meta(folder, f"python data.py --dataset={name} …")
        if other is None:
            raise UserError(f"--mix={cfg.mix}: there is no {folder}; build it first, with the same "
                            f"tokenizer: python data.py --dataset={name} --tokenizer="
                            f"{folder_of(cfg) / 'tokenizer.json'} …")
        if corpus.is_in_shards(other["build"]):
            source = replace(data_settings(vars(cfg)), train_file=other["source"]["train"])
            corpus.check_sources(source, other, folder)
        if other.get("tokenizer_sha256") != meta["tokenizer_sha256"]:
            raise UserError(f"--mix={cfg.mix}: {folder} has another tokenizer than "
                            f"{folder_of(cfg)}; build both with one: --tokenizer="
                            f"{folder_of(cfg) / 'tokenizer.json'}")
        if folder != folder_of(cfg) and not same_splits(meta["build"], other["build"]):
            print(f"--mix: {folder} was split otherwise than {folder_of(cfg)}, so texts of val may "
                  "be in its train", flush=True)
        found.append(((folder, other), share))
    names = [str(folder) for (folder, _), _ in found]
    if len(set(names)) < len(names):
        raise UserError(f"--mix={cfg.mix}: names a data set twice")
    return found


def same_splits(build, other):
    """Is no text of a data set's val in the other's train? So it is where both are in shards, as
    then the text decides. build, other: the settings that they were built with."""
    if not corpus.is_in_shards(build) or not corpus.is_in_shards(other):
        return False
    same_draw = build["split_seed"] == other["split_seed"]
    return same_draw and build["val_fraction"] <= other["val_fraction"]


# --------------------------------------------------------------------------------------------------
# Building: clean → remove duplicates → split → tokenize → write


def build(cfg):
    """Build the data set's folder from its source and return its meta. What fails leaves nothing
    behind. An older folder goes only when the new one stands, and only if we made all of it."""
    folder = folder_of(cfg)
    if aside(folder).exists() and not folder.exists():
        os.rename(aside(folder), folder)  # a kill came between the two renames of put_in_place
    check_replaceable(folder, resolve(cfg))
    if not is_sharded(cfg):
        return put_in_place(folder, cfg, lambda work: build_into(work, cfg))
    with corpus.only_one(shards_folder(cfg)):
        plan = build_shards(cfg)
        meta = put_in_place(
            folder, cfg, lambda work: corpus.join(plan, work, build_settings(cfg)))
        corpus.remove_shards(plan.folder)
        with contextlib.suppress(OSError):  # something else is in it
            plan.folder.rmdir()
    return meta


def aside(folder):
    """Where an older data set is while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def put_in_place(folder, cfg, build_into):
    """Let build_into(work) make a data set in a scratch folder, put it in place of `folder`, and
    return what it returned, its meta. If another process has put one there meanwhile, that is
    taken. Raises UserError where it was built otherwise."""
    was_there = (folder / "meta.json").exists()
    with scratch_folder(folder) as scratch:
        work = scratch / "new"
        work.mkdir()
        result = build_into(work)
        if not was_there and (meta := open_meta(cfg)):
            return meta
        check_replaceable(folder, resolve(cfg))  # again: building may take long
        shutil.rmtree(aside(folder), ignore_errors=True)
        if folder.exists():
            os.rename(folder, aside(folder))
        os.rename(work, folder)
        shutil.rmtree(aside(folder), ignore_errors=True)
    return result


def is_sharded(cfg):
    """Does a config's data set become shards? Raises UserError for one that cannot."""
    return corpus.is_sharded(with_built_in(data_settings(vars(cfg))))


def shards_folder(cfg):
    """Where the shards of a config's data set are until they are joined."""
    folder = folder_of(cfg)
    return folder.with_name(f"{folder.name}.shards")


def build_shards(cfg):
    """Build the shards of a corpus that cfg.shards names; returns the corpus.Plan. Those that are
    there and would be the same again stay, also with cfg.overwrite."""
    def make_plan():
        return corpus.Plan(resolve(cfg), shards_folder(cfg), build_settings(cfg))
    plan = make_plan()
    if cfg.overwrite and plan.remove_useless(plan.numbers):
        plan = make_plan()  # without them it may have another tokenizer
    corpus.build_shards(plan)
    return plan


def check_replaceable(folder, source):
    """Raise UserError where to build `folder` anew would delete what we did not make."""
    ours = {"meta.json", "meta.json.tmp", "tokenizer.json"}
    suffixes = "bin", "idx", "first", "lbl"
    ours |= {f"{split}.{suffix}" for split in SPLITS for suffix in suffixes}
    others = []
    if folder.is_dir():
        others = sorted(f.name for f in folder.iterdir()
                        if corpus.without_number(f.name) not in ours or f.is_dir())
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
        return ("too few examples; give it a file (--val_file, --test_file), a larger share, as "
                "--val_fraction=0.3 or --test_fraction=0.3, or none (0)")
    if n_elsewhere >= max(n_bad, n_twice):
        return "train's rows stand in val or test, too: give other files, or --dedup=False"
    if n_twice >= n_bad:
        return "most rows stand there several times; if that is right: --dedup=False"
    return "most rows lack a text or a label: are --text_column and --label_column right?"


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
    constant = [i for i, std in enumerate(meta["scaling"].get("std", ())) if std == CONSTANT]
    if constant:
        columns = meta["scaling"]["columns"]
        names_of = [columns[i] if columns else f"number {i}" for i in constant]
        print(f"without effect, as they do not vary in train: {', '.join(map(str, names_of))}")
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


def main():
    # a config file is checked whole, so with the settings of training; --help shows data.py's own
    asks_for_help = {"--help", "-h"} & set(sys.argv)
    cfg = configure(DataConfig if asks_for_help else FinetuneConfig)
    if is_sharded(cfg) and corpus.is_partial(cfg.shards):
        plan = build_shards(cfg)
        anew = " --overwrite=True" if folder_of(cfg).exists() else ""
        print(f"{plan.folder}: shards {plan.numbers[0]} to {plan.numbers[-1]} of {plan.n} are "
              f"there; --shards={plan.n}{anew} builds those that are missing and joins all",
              flush=True)
        return
    meta = None if cfg.overwrite else open_meta(cfg)
    if meta:
        check_files(folder_of(cfg), meta, rebuild_command(cfg))
        if is_sharded(cfg) and shards_folder(cfg).exists():
            print(f"{shards_folder(cfg)}: what a rebuild that did not end has left; --overwrite="
                  "True goes on with it, or delete it", flush=True)
    meta = meta or build(cfg)
    print_table(meta)
    if meta["kind"] == "text" and meta["task"] != "none" and getattr(cfg, "max_len", None):
        for split in meta["splits"]:
            starts = np.fromfile(folder_of(cfg) / f"{split}.idx", np.int64)
            print_cut(split, starts, cfg.max_len)


if __name__ == "__main__":
    run(main)
