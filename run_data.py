"""What a run reads: a data set, or several in shares, all of train or a part of it, and val."""
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError

import numpy as np

import data
from batches import open_split
from examples import Examples, Subset
from format import read_tokenizer
from language import Mixture
from runs import hash_of
from sources import rebuild_command
from teacher import teach


@dataclass
class RunData:
    """Splits are PackedText, Arrays and so on (examples.py), or LanguageBlocks (language.py)."""
    folder: Path
    meta: dict  # its meta.json
    tokenizer: str | None  # as JSON: the file may change while the run goes on
    max_len: int  # tokens of the longest example: what micro_batch_tokens is measured in
    train_set: Examples
    val_set: Examples | None
    head_set: Examples | None  # what Task.fit_head is given; None: there is none
    mix_sha256: str | None  # of all corpora of --mix


def open_task(cfg, make_task, machine, checkpoint, fold):
    """(the task, its RunData), which must be those of the checkpoint."""
    folder, meta = machine.one_first(lambda: data.open_or_build(cfg))
    machine.check_agreement(lambda: {"data set": hash_of(meta["sha256"])})
    if checkpoint and checkpoint["data_sha256"] != meta["sha256"]:
        raise UserError(f"{cfg.out_dir} holds a run on another data set than {folder} holds now; "
                        "choose another --out_dir=…, or replace it with --overwrite=True")
    task = make_task(cfg, meta)
    task.to(machine.device)
    run_data = open_run_data(cfg, folder, meta, task, machine, fold)
    if checkpoint and checkpoint.get("mix_sha256", run_data.mix_sha256) != run_data.mix_sha256:
        raise UserError(f"{cfg.out_dir} holds a run on other data than --mix={cfg.mix} holds now: "
                        "a data set of it was built anew; choose another --out_dir=…, or replace "
                        "it with --overwrite=True")
    return task, run_data


def open_run_data(cfg, folder, meta, task, machine, fold=None):
    """Open what a run reads. fold: the part of train that is val, see trials.py."""
    max_len = tokens_per_example(cfg, meta)
    if cfg.micro_batch_tokens != "auto" and max_len > cfg.micro_batch_tokens:
        raise UserError(f"--micro_batch_tokens={cfg.micro_batch_tokens} must hold an example, "
                        f"of up to {max_len} tokens")

    def open_examples(split, seed, training, folder=folder, meta=meta):
        settings = task.example_settings(cfg, meta["kind"], training)
        if "pair" in meta:
            settings["truncation"] = cfg.truncation
        rebuild = rebuild_command(cfg)
        if meta["dataset"] != cfg.dataset:  # of --mix
            rebuild = f"python data.py --dataset={meta['dataset']} … --overwrite=True"
        return open_split(folder, meta, split, max_len, rebuild, seed=seed, **settings)

    # train
    tokenizer = read_tokenizer(folder, meta, rebuild_command(cfg))
    mix_sha256 = None
    if cfg.mix is None:
        train_set = open_examples("train", cfg.seed, training=True)
    else:
        parts = data.open_mix(cfg, meta)
        mix_sha256 = hash_of([other["sha256"] for (_, other), _ in parts])
        machine.check_agreement(lambda: {"data set of --mix": mix_sha256})
        train_set = Mixture([open_examples("train", cfg.seed, True, *part) for part, _ in parts],
                            [share for _, share in parts])
    if machine.rank == 0 and meta["kind"] == "text" and task.head["n_classes"]:
        data.print_cut("train", train_set.starts, max_len)

    # the part of it that is learnt, and val
    learnt, val_set = None, None
    if fold is not None:
        if cfg.folds > len(train_set):
            raise UserError(f"--folds={cfg.folds}: train has only {len(train_set)} examples")
        in_fold = assign_folds(train_set.labels, cfg.folds, cfg.split_seed) == fold
        learnt = np.flatnonzero(~in_fold)
        val_set = Subset(open_examples("train", 0, training=False), np.flatnonzero(in_fold))
    elif "val" in meta["splits"] and not cfg.lr_find:
        val_set = open_examples("val", 0, training=False)
    if cfg.train_fraction < 1:
        learnt = stratified_subset(train_set.labels, cfg.train_fraction, cfg.split_seed)
    if learnt is not None:
        train_set = Subset(train_set, learnt)

    head_set = None
    if task.compares_examples:
        check_one_micro_batch(cfg, machine, train_set)
        head_set = open_examples("train", 0, training=False)
        if learnt is not None:
            head_set = Subset(head_set, learnt)
    if cfg.teacher:
        labelled_set = train_set
        train_set = machine.one_first(lambda: teach(labelled_set, cfg, folder, meta, tokenizer))
    return RunData(folder, meta, tokenizer, max_len, train_set, val_set, head_set, mix_sha256)


def tokens_per_example(cfg, meta):
    """Tokens of the longest example."""
    if meta["kind"] == "text":
        return cfg.max_len
    if cfg.model != "transformer":
        return 1
    if meta["kind"] == "features":
        raise UserError("--model=transformer reads text and images; for rows of numbers take "
                        "--model=mlp or linear")
    _, height, width = meta["shape"]
    return height // cfg.patch * (width // cfg.patch)


def check_one_micro_batch(cfg, machine, train_set):
    """Raise UserError unless each batch is computed at once, as its examples are compared."""
    if cfg.micro_batch_tokens == "auto":
        return  # memory.py refuses it for these objectives
    n_tokens = cfg.batch_size * int(train_set.lengths.max())
    if machine.world > 1 or n_tokens > cfg.micro_batch_tokens:
        raise UserError(f"--objective={cfg.objective} compares all examples of a batch with each "
                        "other, so they go through one process at once: without torchrun's "
                        f"--nproc_per_node, and with a --micro_batch_tokens of {n_tokens} or more, "
                        "or a smaller --batch_size")


def classes_of(labels):
    """(N,): numbers and sets of labels are one class."""
    return labels if labels.dtype == np.int64 else np.zeros(len(labels))


def stratified_subset(labels, fraction, seed):
    """Sorted indices of round(fraction · N) of N examples, with the same share of each class, give
    or take one example. A smaller fraction's examples are among a larger one's. (Numbers and sets
    of labels are drawn at random.)"""
    classes = classes_of(labels)
    rank = np.empty(len(labels))
    rng = np.random.default_rng(seed)
    for c in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == c))
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)  # spread evenly over 0..1
    n = max(1, round(fraction * len(labels)))
    return np.sort(np.argsort(rank, kind="stable")[:n])


def assign_folds(labels, k, seed):
    """Which of k folds each of N examples is in, (N,): each fold has the same share of each class,
    give or take one example."""
    classes = classes_of(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(classes[order], kind="stable")]
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % k
    return fold
