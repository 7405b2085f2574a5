"""Training: `torchrun train.py config/textcls.py`, or `python train.py …`.

On 8 GPUs: `torchrun --nproc_per_node=8 train.py …`. The same command again continues an interrupted
run. It ends in the same weights, bit for bit, as one that was not interrupted, because what happens
in step i is a function of (seed, i) alone: the batch, its masks, and the random generators, which
are seeded anew at each step.
"""
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, configure, run, write_json, write_text

import numpy as np
import torch

import data
import memory
import metrics
import optim
from baselines import build_model
from batches import (
    GlobalBatches,
    assign_folds,
    eval_requests,
    open_split,
    stratified_subset,
)
from distributed import Machine, average_gradients, gradient_sync
from examples import Mixture, Subset, ceil_div
from format import read_tokenizer
from model import ModelConfig
from runs import (
    FolderLock,
    Log,
    StopSignal,
    begin_run,
    facts_of,
    finish_wandb,
    hash_of,
    open_run,
    start_wandb,
)
from sharding import (
    ShardedSaver,
    is_finite,
    parameters_of_states,
    read_parts,
    shard,
    shard_like,
    shard_state,
    whole,
)
from sources import DataConfig, rebuild_command, resolve
from speed import Profile, flops_per_token
from tasks import (
    autocast,
    describe,
    eval_tokens,
    run_model,
    task_class,
)
from teacher import teach
from weights import CHECKPOINT_FORMAT, load_checkpoint, load_weights, save_checkpoint


@dataclass
class Config(DataConfig):
    # the run
    out_dir: str = "out/{config}"  # for checkpoints and metrics; {config}: the config file's name
    seed: int = 1  # of weights, batches, masks, dropout; report several
    # model
    model: Literal["transformer", "mlp", "linear"] = "transformer"  # the others: fast baselines
    objective: Literal["classify", "contrastive", "mlm", "clm"] = "classify"  # contrastive:
    #   classify few labels, by what makes texts of one class alike. mlm: pretrain by filling in
    #   masked tokens (a share of mask_prob); clm: by predicting the next token. Then classify with
    #   finetune.py --init_from=<its out_dir>
    n_layer: int = 2  # deeper for more data (mlp: hidden layers)
    n_head: int = 4  # d_model / n_head of 32-64 for small models, 64-128 for large ones
    d_model: int = 128  # wider for more data
    d_ff: int | None = None  # None: 4·d_model
    mlp: Literal["relu2", "gelu", "swiglu"] = "relu2"  # swiglu has 1.5 times as many weights
    norm: Literal["rms", "layer"] = "rms"  # layer: a little faster on CPUs
    qk_norm: bool = True  # bounds attention logits, so that higher learning rates stay stable
    pooling: Literal["mean", "max", "cls", "last"] = "mean"  # how tokens become one vector
    position: Literal["rope", "learned"] = "rope"  # rope: relative, of images in two dimensions
    max_len: int = 512  # tokens of a document that are read; longer is slower, and better where
    #   late words matter
    truncation: Literal["longest_first", "only_second"] = "longest_first"  # which text of a pair
    #   that is longer than max_len loses its end
    ngrams: int = 3  # linear model of text: runs of up to this many words are features
    char_ngrams: int = 5  # and, with tokenizer = "bytes", runs of up to this many bytes
    buckets: int = 2**18  # rows that these are hashed to; more for much text
    patch: int = 4  # images: the side of a token
    crop: int | None = None  # text: train on a random window of this many tokens of each document
    #   (not of pairs); evaluation reads max_len
    dropout: float = 0.0  # 0.1-0.3 for small data and many epochs
    shift: float = 0.0  # images: moved in training by up to this share of their side
    rotate: float = 0.0  # images: turned by up to this many degrees
    scale: float = 0.0  # images: scaled by a factor of up to 1 + scale, either way
    flip: bool = False  # images: mirrored half the time, and evaluation averages both; not for
    #   digits or text
    cutout: float = 0.0  # images: a black square of up to this share of the side
    mixup: float = 0.0  # images: blended with another by up to mixup / 2; for long training
    mask_prob: float = 0.0  # text: share of input tokens masked in training; 0.1-0.3 is a strong
    #   regulariser for small data
    checkpoint_activations: bool = False  # True where memory runs out at
    #   micro_batch_tokens=max_len: a third slower
    mix: str | None = None  # language models: train on several data sets, each with a share of the
    #   tokens, as web:0.7,books:0.3; those besides --dataset have to be built, val is --dataset's
    train_fraction: float = 1.0  # train on this share of train, to see what more labels would
    #   bring; smaller shares are nested
    # optimisation
    batch_size: int = 32  # documents per step, over all processes and micro-batches
    micro_batch_tokens: int | Literal["auto"] = 16384  # most tokens that one device holds at once;
    #   lower it when memory runs out; auto: what fits
    epochs: float = 10.0  # passes over train
    min_steps: int = 0  # at least so many steps, whatever the epochs: for few labels
    max_steps: int | None = None  # stops (and ends the schedule) sooner than epochs
    optimizer: Literal["adamw", "muon", "adagrad", "sgd", "lbfgs"] = "adamw"
    #   adamw: decoupled weight decay (Loshchilov & Hutter 2019). muon: for the matrices of blocks
    #   (MLP: of layers), with adamw for the rest; fewer steps to the same loss. adagrad: for linear
    #   models of text (Duchi et al. 2011). sgd: with Nesterov momentum beta1. lbfgs: for convex
    #   models, with all of train in one batch. For adagrad, sgd and lbfgs weight_decay is ridge's:
    #   weight_decay / 2 · |W|² is added to the loss
    learning_rate: float = 1e-3  # the peak; 1e-3 for small models from scratch, less for larger
    min_lr: float = 0.0  # where the schedule ends
    warmup_steps: int | None = None  # linear from 0; more for large models or rates; None: a tenth
    #   of all steps, at most 50
    schedule: Literal["cosine", "linear", "trapezoid", "constant"] = "cosine"  # trapezoid: flat,
    #   then cooldown
    cooldown: float = 0.4  # of trapezoid: share of the steps in which the rate falls linearly
    weight_decay: float = 0.1  # on matrices, and (with adamw and muon) not on text embeddings
    beta1: float = 0.9
    beta2: float = 0.99  # 0.95 for large batches
    grad_clip: float = 1.0  # norm above which the gradient is scaled down; 0: never
    label_smoothing: float = 0.0  # 0.1 where labels are noisy
    class_weights: str | list[float] | None = None  # for rare classes: "balanced"
    #   (n / (n_classes · count)), or one per class
    focal_gamma: float = 0.0  # for rare classes: 1-3 weights easy examples less, by (1 - p)^gamma
    #   (Lin et al. 2017)
    huber_delta: float = 0.0  # of --target=number, where some targets are far off: 1.0 counts
    #   errors above 1 standard deviation by their size, not squared; 0: all squared
    ema_decay: float = 0.0  # 0.99-0.9999: evaluate and keep an exponential moving average of the
    #   weights
    best_by: str | None = None  # the figure on val that says which checkpoint is best.pt: val_loss,
    #   val_accuracy, val_micro_f1, val_r2; None: accuracy, of several labels micro-F1, else loss;
    #   last: none, the weights at the end are kept
    patience: int | None = None  # stop after this many evaluations without a better one
    teacher: str | None = None  # a classifier of ours: learn what it says of train's texts, too
    teacher_weight: float = 0.5  # of what it says; the labels have the rest
    teacher_temperature: float = 2.0  # higher: its second choices count more
    teacher_spans: int = 0  # 5-20: learn so many random runs of words of each text, too, by what
    #   the teacher says of them
    unlabelled_file: str | None = None  # and these texts; it must not hold test's
    folds: int = 0  # 5: before the run, how good it will be, by cross-validation on train: as many
    #   runs, each without a part of the labels, that is tested on it. For few labels
    lr_find: bool = False  # True: no run, but a learning-rate range test: lr_find.png, and a
    #   learning_rate to begin with
    dry_run: bool = False  # True: no run, but how much memory one would need; the values of weights
    #   are not read
    # evaluation and logging
    eval_interval: int | None = None  # steps between evaluations on val (and checkpoints); None: an
    #   epoch, or what min_steps makes of it
    save_interval: int | None = None  # steps between checkpoints besides; None: only at evaluations
    #   and when the run is told to stop (Ctrl-C, SIGTERM)
    log_interval: int = 10  # steps between lines
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if logged
    #   in, else offline
    wandb_project: str = "textcls"
    wandb_run_name: str | None = None  # None: out_dir's name
    # machine
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes, each holds all of the model,
    #   or (fsdp) a part of it, where a device cannot hold it all
    device: str = "auto"  # cuda, mps or cpu, in this order
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is native
    compile: bool | Literal["auto"] = "auto"  # auto: on CUDA (a minute at start, then much faster).
    #   True, on CPUs: images train 1.4 times as fast after half a minute, language models 1.2
    #   times; packed texts gain nothing, as their lengths differ
    profile: bool = False  # True: see what a few steps spend their time on, and write trace.json
    deterministic: bool = False  # True: bitwise repeatable on CUDA too, slower (on CPUs it always
    #   is)


MODEL_SETTINGS = (  # that are ModelConfig's, too
    "model", "n_layer", "n_head", "d_model", "mlp", "norm", "qk_norm", "pooling", "position",
    "dropout", "max_len", "ngrams", "char_ngrams", "buckets", "patch", "checkpoint_activations")
# lowest and highest value of settings, also of finetune.py's, and how that is said
ABOVE_0 = 1e-9, math.inf, "above 0"
NOT_NEGATIVE = 0, math.inf, "0 or more"
SHARE = 0, 1, "from 0 to 1"
BELOW_1 = 0, 1 - 1e-9, "from 0 to below 1"
RANGES = {
    ABOVE_0: ("batch_size", "micro_batch_tokens", "log_interval", "eval_interval", "save_interval",
              "epochs", "max_steps", "patience", "n_head", "d_model", "d_ff", "patch", "max_len",
              "crop", "ngrams", "char_ngrams", "buckets", "max_row_mb", "teacher_temperature"),
    NOT_NEGATIVE: ("seed", "split_seed", "n_layer", "learning_rate", "min_lr", "warmup_steps",
                   "weight_decay", "grad_clip", "focal_gamma", "huber_delta", "shift", "rotate",
                   "scale", "lora_rank", "lora_alpha", "layer_lr_decay", "min_steps", "folds",
                   "teacher_spans"),
    SHARE: ("teacher_weight", "mixup", "cutout", "cooldown", "val_fraction", "test_fraction"),
    BELOW_1: ("dropout", "mask_prob", "ema_decay", "label_smoothing", "beta1", "beta2")}


def check_settings(cfg):
    """Raise UserError for values that cannot work on any data."""
    for (low, high, allowed), names in RANGES.items():
        for name in names:
            value = getattr(cfg, name, None)  # None: not set, or no setting of this script
            if value not in (None, "auto") and not low <= value <= high:
                raise UserError(f"--{name}={value} must be {allowed}")
    if cfg.mix is not None and (cfg.objective not in ("mlm", "clm") or cfg.train_fraction < 1):
        raise UserError("--mix is for --objective=mlm and clm, without --train_fraction")
    if not 0 < cfg.train_fraction <= 1 or cfg.mixup and cfg.train_fraction < 1:
        raise UserError(f"--train_fraction={cfg.train_fraction} must be above 0 and at most 1, and "
                        "1 with --mixup, which blends with any example of train")
    if cfg.folds and (cfg.folds < 2 or "WORLD_SIZE" in os.environ):
        raise UserError(f"--folds={cfg.folds}: cross-validation takes 2 folds or more, and runs in "
                        "one process: python instead of torchrun")
    if cfg.folds and (cfg.train_fraction < 1 or cfg.teacher or cfg.objective in ("mlm", "clm")):
        raise UserError("--folds tests each label of train once, by runs that have not seen it: "
                        "not with --train_fraction, with a --teacher, who may have seen it, or "
                        "with language models")
    if cfg.parallel == "fsdp" and cfg.model != "transformer":
        raise UserError("--parallel=fsdp spreads blocks over processes: it is for "
                        "--model=transformer; smaller models fit on one device")
    if cfg.patience and cfg.best_by == "last":
        raise UserError("--best_by=last keeps the weights at the end, so --patience, which waits "
                        "for better ones, needs --best_by=val_loss or another figure")
    if cfg.lr_find and cfg.optimizer == "lbfgs":
        raise UserError("--optimizer=lbfgs searches for its rate in each step: there is nothing "
                        "for --lr_find to find")


# --------------------------------------------------------------------------------------------------
# One step, one evaluation


class ModelWithLoss(torch.nn.Module):
    """A model and its task's loss as one module, for torch.compile and DDP."""

    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs, targets):
        return self.task.batch_loss(self.model, inputs, targets)


def compute_gradient(model_with_loss, micro_batches, task, machine):
    """Accumulate the gradient of a global batch's mean loss over this process's micro-batches.

    Returns (this process's share of that loss, the number of tokens over all processes)."""
    counts = [sum(task.weight_sum(batch) for batch in micro_batches),
              sum(batch.n_tokens for batch in micro_batches)]
    weight_sum, n_tokens = machine.sum(counts)
    total = 0.0
    for i, batch in enumerate(micro_batches):
        batch = batch.to(machine.device)
        with gradient_sync(model_with_loss, on=i == len(micro_batches) - 1), \
             autocast(machine.device, machine.dtype):
            loss = model_with_loss(batch.inputs, batch.targets) / weight_sum
        (loss * machine.world).backward()  # gradients are averaged over processes; we want the sum
        total += loss.detach()
    return total, n_tokens


def evaluate(model, task, examples, cfg, machine, mirror=False):
    """The task's figures over all of a split, on all processes; touches no generator. mirror: see
    tasks.run_model."""
    totals = []
    model.eval()
    for batch in eval_batches(examples, cfg, machine):
        logits = run_model(model, batch, machine.device, machine.dtype, mirror)
        if batch.n_targets:
            totals.append(task.totals(logits, batch.targets))
    model.train()
    sums = [sum(column) for column in zip(*totals)] or [0.0] * task.n_totals
    return task.figures(machine.sum(sums), examples)


def vectors_of(model, examples, cfg, machine):
    """(the vectors of all examples (N, D), float32, their labels (N,)), the longest first."""
    vectors, labels = [], []
    model.eval()
    for batch in eval_batches(examples, cfg, machine):
        vectors.append(run_model(model.vectors, batch, machine.device, machine.dtype))
        labels.append(batch.targets)
    model.train()
    return torch.cat(vectors), torch.cat(labels)


def eval_batches(examples, cfg, machine):
    """This process's share of all examples, each once, as Batches."""
    limit = min(cfg.micro_batch_tokens, eval_tokens(machine.device, examples.max_len))
    requests = eval_requests(examples.lengths, limit, machine.rank, machine.world)
    for request in machine.evened(requests, lambda: None):
        yield examples.batch(*request) if request else examples.empty_batch()


# --------------------------------------------------------------------------------------------------
# The run


def make_model(cfg, meta, task):
    """A fresh model for a data set and a task. finetune.py has its own."""
    c = ModelConfig(**{name: getattr(cfg, name) for name in MODEL_SETTINGS}, **task.head)
    c.d_ff = cfg.d_ff or 4 * cfg.d_model
    if meta["kind"] == "text":
        c.vocab_size = meta["vocab_size"]
        c.letters = tuple(meta.get("letters", ()))
        c.blanks = tuple(meta.get("blanks", ()))
    elif meta["kind"] == "image":
        c.image_size = tuple(meta["shape"])
    else:
        (c.n_features,) = meta["shape"]
    if cfg.model == "transformer":
        divisor = 4 if c.image_size else 2  # rotary positions turn pairs, of images in two sets
        if cfg.d_model % (divisor * cfg.n_head):
            raise UserError(f"--d_model={cfg.d_model} does not split into n_head={cfg.n_head} "
                            f"heads of a width that {divisor} divides")
        if c.image_size and (c.image_size[1] % c.patch or c.image_size[2] % c.patch):
            _, height, width = c.image_size
            raise UserError(f"--patch={c.patch} does not divide images of {height}×{width}")
    return build_model(c)


def tokens_per_example(cfg, meta):
    """Tokens of the longest example: what micro_batch_tokens is measured in."""
    if meta["kind"] == "text":
        return cfg.max_len
    if cfg.model != "transformer":
        return 1
    if meta["kind"] == "features":
        raise UserError("--model=transformer reads text and images; for rows of numbers take "
                        "--model=mlp or linear")
    _, height, width = meta["shape"]
    return height // cfg.patch * (width // cfg.patch)


def train(cfg, **hooks):
    """Run the training that `cfg` describes. hooks: what finetune.py replaces, see train_locked."""
    check_settings(cfg)
    if cfg.folds and not cfg.dry_run:
        cross_validate(cfg, hooks)
    run_training(cfg, **hooks)


def cross_validate(cfg, hooks):
    """Train cfg.folds times, each time without a part of train, and print what the weights at the
    end say of these parts: every label is tested once, and none is learnt before it is tested."""
    found = []
    for fold in range(cfg.folds):
        print(f"fold {fold + 1} of {cfg.folds}", flush=True)
        out_dir = f"{cfg.out_dir}-folds/{fold}"
        part = dataclasses.replace(cfg, out_dir=out_dir, best_by="last", wandb_mode="disabled")
        run_training(part, fold=fold, **hooks)
        found.append(load_checkpoint(f"{out_dir}/last.pt")["best"])
    write_json(Path(f"{cfg.out_dir}-folds") / "folds.json", summarise_folds(found))


def summarise_folds(found):
    """Print the figures of all folds, a dict each, as those of one val; returns them."""
    n = sum(figures["n"] for figures in found)
    whole = {key: sum(f[key] * f["n"] for f in found) / n
             for key in found[0] if key not in ("step", "n")}
    text = describe(whole)
    if "val_accuracy" in whole:
        low, high = metrics.wilson_interval(whole["val_accuracy"], n)
        whole["interval"] = [low, high]
        text += f" [{low:.1%}, {high:.1%}]"
    print(f"cross-validated on all {n} examples: {text}", flush=True)
    return whole | {"n": n}


def run_training(cfg, **hooks):
    """One run, in a folder that no other process uses meanwhile."""
    lock, stop = FolderLock(cfg.out_dir), StopSignal()
    try:
        train_locked(cfg, lock, stop, **hooks)
    finally:
        lock.release()
        stop.restore()
    if stop.number:
        sys.exit(128 + stop.number)


def train_locked(cfg, lock, stop, make_model=make_model, lr_scale=None,
                 state_for_best=torch.nn.Module.state_dict, fold=None):
    """make_model(cfg, meta, task) → the model; lr_scale(name, model, cfg) → what a parameter's
    learning rate is multiplied by; state_for_best(model) → the state dict that best.pt gets; fold:
    the part of train that is val, see cross_validate."""
    started = time.monotonic()
    make_task = task_class(cfg, resolve(cfg))  # checked before a data set is built
    machine = Machine(cfg)
    if machine.rank == 0 and not cfg.lr_find and not cfg.dry_run:
        lock.acquire()
    machine.check_agreement(lambda: facts_of(cfg))
    checkpoint = None
    if not cfg.dry_run:
        checkpoint = machine.on_rank0(lambda: open_run(cfg, parts=not machine.sharded))
    given = cfg  # as it is saved
    if checkpoint and checkpoint["finished"]:
        machine.print(f"{cfg.out_dir}: this run is finished ({summary(checkpoint['best'])}); "
                      f"evaluate it with: python eval.py {cfg.out_dir}   "
                      "(or train anew: --overwrite=True)")
        return

    # data
    folder, meta = machine.one_first(lambda: data.open_or_build(cfg))
    machine.check_agreement(lambda: {"data set": hash_of(meta["sha256"])})
    if checkpoint and checkpoint["data_sha256"] != meta["sha256"]:
        raise UserError(f"{cfg.out_dir} holds a run on another data set than {folder} holds now; "
                        "choose another --out_dir=…, or replace it with --overwrite=True")
    task = make_task(cfg, meta)
    task.to(machine.device)
    best_by = cfg.best_by or task.figure_names[-1]
    if best_by not in (*task.figure_names, "last"):
        raise UserError(f"--best_by={best_by}: there are {', '.join(task.figure_names)}, and last")
    max_len = tokens_per_example(cfg, meta)
    if cfg.micro_batch_tokens != "auto" and max_len > cfg.micro_batch_tokens:
        raise UserError(f"--micro_batch_tokens={cfg.micro_batch_tokens} must hold an example, "
                        f"of up to {max_len} tokens")

    def open_examples(split, seed, training, folder=folder, meta=meta):
        settings = task.example_settings(cfg, meta["kind"], training)
        if "pair" in meta:
            settings["truncation"] = cfg.truncation
        return open_split(folder, meta, split, max_len, rebuild_command(cfg), seed=seed, **settings)
    tokenizer = read_tokenizer(folder, meta, rebuild_command(cfg))  # held: the file may change
    if cfg.mix is not None:
        parts = data.open_mix(cfg, meta)
        hashes = [other["sha256"] for (_, other), _ in parts]
        machine.check_agreement(lambda: {"data set of --mix": hash_of(hashes)})
        train_set = Mixture([open_examples("train", cfg.seed, True, *part) for part, _ in parts],
                            [share for _, share in parts])
    else:
        train_set = open_examples("train", cfg.seed, training=True)
    val_set = subset = None
    if fold is not None:
        in_fold = assign_folds(train_set.labels, cfg.folds, cfg.split_seed) == fold
        if not in_fold.any():
            raise UserError(f"--folds={cfg.folds}: train has only {len(in_fold)} examples")
        subset = np.flatnonzero(~in_fold)
        val_set = Subset(open_examples("train", 0, training=False), np.flatnonzero(in_fold))
    elif "val" in meta["splits"] and not cfg.lr_find:
        val_set = open_examples("val", 0, training=False)
    if machine.rank == 0 and meta["kind"] == "text" and task.head["n_classes"]:
        data.print_cut("train", train_set.starts, max_len)
    mirror = cfg.flip and meta["kind"] == "image"
    if cfg.train_fraction < 1:
        subset = stratified_subset(train_set.labels, cfg.train_fraction, cfg.split_seed)
    head_set = None  # what the head is fitted to, where gradient steps do not learn it
    if task.compares_examples:
        check_one_micro_batch(cfg, machine, train_set)
        head_set = open_examples("train", 0, training=False)
        if subset is not None:
            head_set = Subset(head_set, subset)
    if cfg.teacher:
        labelled_set = train_set
        train_set = machine.one_first(lambda: teach(labelled_set, cfg, folder, meta, tokenizer))
    if cfg.dry_run or cfg.micro_batch_tokens == "auto":
        def measure(n_tokens):
            return memory.measure_step(
                cfg, lambda: make_model(cfg, meta, task), lambda model: ModelWithLoss(model, task),
                train_set, machine, lr_scale, n_tokens)
        cfg = dataclasses.replace(cfg, micro_batch_tokens=choose_micro_batch(
            cfg, measure, machine, max_len, checkpoint))
        if cfg.dry_run:
            found = measure(cfg.micro_batch_tokens)
            machine.print(memory.describe(found))
            machine.leave()
            return
    n_train = len(train_set) if subset is None else len(subset)
    steps_per_epoch = ceil_div(n_train, cfg.batch_size)
    eval_interval = cfg.eval_interval or max(steps_per_epoch, round(cfg.min_steps / cfg.epochs))
    total_steps = max(1, cfg.min_steps, round(cfg.epochs * steps_per_epoch))
    total_steps = min(total_steps, cfg.max_steps or math.inf)
    if cfg.lr_find:
        total_steps = optim.RANGE_TEST_STEPS
    elif total_steps <= (cfg.warmup_steps or 0):
        raise UserError(f"--warmup_steps={cfg.warmup_steps}: the run has {total_steps} steps, so "
                        "it would end before the learning rate is there: leave the warm-up out, or "
                        "train longer (--epochs, --min_steps)")

    # model and optimizers
    in_parts = checkpoint and "shards" in checkpoint

    def begin():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg, meta, task)
        if checkpoint and not in_parts:
            load_weights(model, checkpoint["model"], f"{cfg.out_dir}/last.pt")
        if cfg.model == "transformer" and meta["kind"] == "text":
            model.longest = max_len
        check_head_width(model.config, machine)
        if machine.sharded:
            shard(model, machine)
        return model.to(machine.device)
    model = machine.in_turn(begin) if machine.sharded else begin()
    if cfg.optimizer == "lbfgs":
        if machine.world > 1:
            raise UserError("--optimizer=lbfgs runs in one process, without torchrun's "
                            "--nproc_per_node")
        if cfg.batch_size < n_train:
            raise UserError(f"--optimizer=lbfgs needs all {n_train} examples in each step: "
                            f"--batch_size={n_train}")
        optimizers = [optim.make_lbfgs(model)]
    else:
        optimizers = optim.make_optimizers(model, cfg, machine.device, lr_scale, machine.dtype)
    average = optim.EMA(model, cfg.ema_decay)

    # resume
    step, best, bad_evals, elapsed = 0, None, 0, 0.0
    run_id = f"{Path(cfg.out_dir).name}-{int(time.time())}"  # of the run in W&B
    if in_parts:
        states = [parameters_of_states(*pair)
                  for pair in zip(optimizers, checkpoint["optimizers"])]
        checkpoint = read_parts(checkpoint, cfg.out_dir, {
            "model": model.state_dict(), "ema": average.weights, "optimizers": states})
        model.load_state_dict(checkpoint["model"])
    if checkpoint:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(shard_state(optimizer, state))
        average.values = [shard_like(value.to(machine.device), p)
                          for value, p in zip(checkpoint["ema"], average.weights)]
        step, best, bad_evals = (checkpoint[key] for key in ("step", "best", "bad_evals"))
        elapsed = checkpoint["elapsed"]
        run_id = checkpoint["run_id"]
        machine.print(f"{cfg.out_dir}: continuing at step {step}")
    wandb_run = None
    if machine.rank == 0:
        begin_run(given, checkpoint, lock)
        if not cfg.lr_find:
            wandb_run = start_wandb(dataclasses.asdict(given), run_id)
    saver = None
    if machine.sharded and not cfg.lr_find and machine.sees(f"{cfg.out_dir}/config.json"):
        saver = ShardedSaver(cfg.out_dir, machine,
                             lambda found: save_checkpoint(Path(cfg.out_dir) / "last.pt", found))

    # what runs in a step
    on_cuda = machine.device.type == "cuda"
    model_with_loss = ModelWithLoss(model, task)
    if machine.compile:
        model_with_loss.compile()
    if machine.world > 1 and not machine.sharded:
        model_with_loss = average_gradients(model_with_loss)
    sampler = GlobalBatches(train_set, cfg.batch_size, cfg.micro_batch_tokens, cfg.seed, step,
                            total_steps, machine.rank, machine.world, machine.compile, subset)
    loader = torch.utils.data.DataLoader(
        train_set, batch_sampler=sampler, collate_fn=lambda batches: batches,
        # packing texts takes less time than sending them from another process
        num_workers=2 if on_cuda and meta["kind"] == "image" else 0, pin_memory=on_cuda)
    n_parameters = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(model, train_set.lengths, cfg.mask_prob or 1.0)
    machine.print(
        f"{cfg.model}: {n_parameters:,} parameters, {flops / 1e6:.2g} MFLOP/token; "
        f"{machine.device}, {machine.dtype}, {machine.world} process(es); {n_train:,} examples / "
        f"{cfg.batch_size} = {steps_per_epoch} steps per epoch, {total_steps} in all; "
        f"ready after {time.monotonic() - started:.1f} s")
    if cfg.lr_find:
        find_learning_rate(cfg, model_with_loss, task, optimizers, loader, machine)
        return
    tokens_per_unit = max_len if meta["kind"] == "image" else 1  # rates count images
    log = Log(cfg, machine, step, total_steps, elapsed,
              lambda rate: flops * rate * tokens_per_unit,
              "tok" if meta["kind"] == "text" else "ex", wandb_run)

    def common(finished=False):
        """What both checkpoints hold, besides tensors."""
        return {
            "format": CHECKPOINT_FORMAT, "config": dataclasses.asdict(given),
            "model_config": dataclasses.asdict(model.config), "tokenizer": tokenizer,
            "label_names": meta["label_names"], "n_suffix": meta.get("n_suffix"),
            "max_len": max_len, "kind": meta["kind"], "scaling": meta["scaling"],
            "data_sha256": meta["sha256"], "data_folder": folder.name, "step": step,
            "epoch": step / steps_per_epoch, "best": best, "finished": finished}

    def save(name, checkpoint):
        checkpoint = whole(checkpoint, machine)
        if machine.rank == 0:
            save_checkpoint(Path(cfg.out_dir) / name, checkpoint)

    def save_last(finished=False):
        gradients.check()
        checkpoint = common(finished) | {
            "model": model.state_dict(), "ema": average.values, "bad_evals": bad_evals,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "elapsed": log.elapsed, "run_id": run_id, "micro_batch_tokens": cfg.micro_batch_tokens}
        if saver:
            saver.save(checkpoint)
        else:
            save("last.pt", checkpoint)

    profile = Profile(cfg.out_dir, machine.device) if cfg.profile and machine.rank == 0 else None

    # the loop
    gradients = optim.FiniteGradients(cfg)
    finished = False
    stop.listen()
    for micro_batches in loader:
        micro_batches = machine.evened(micro_batches, train_set.empty_batch)
        # dropout is a function of (seed, step, rank)
        machine.seed(cfg.seed * 1_000_003 + step * machine.world + machine.rank)
        lr = optim.learning_rate_at(cfg, step, total_steps)
        if cfg.optimizer == "lbfgs":
            loss, n_tokens = optim.step_lbfgs(
                optimizers[0],
                lambda: compute_gradient(model_with_loss, micro_batches, task, machine),  # noqa: B023
                cfg.weight_decay)
        else:
            optim.set_learning_rate(optimizers, lr)
            loss, n_tokens = compute_gradient(model_with_loss, micro_batches, task, machine)
        grad_norm = optim.clip_gradients(optimizers, cfg.grad_clip)
        gradients.add(grad_norm, step, waits=not on_cuda)
        if cfg.optimizer != "lbfgs":  # which has moved already
            optim.step_all(optimizers)
        average.update(step)
        step += 1
        log.n_tokens += n_tokens
        if profile:
            profile.step()

        if step % cfg.log_interval == 0 or step == total_steps:
            gradients.check()
            (loss,) = machine.sum([float(loss)])
            log.progress(step, step / steps_per_epoch, loss, lr, grad_norm.item())

        if step % eval_interval == 0 or step == total_steps:
            gradients.check()
            with log.paused():
                average.swap()
                if head_set:
                    task.fit_head(model, *vectors_of(model, head_set, cfg, machine))
                figures = {"step": step}
                if fold is not None:
                    figures["n"] = len(val_set)
                if val_set:
                    figures |= evaluate(model, task, val_set, cfg, machine, mirror)
                check_finite(model, figures, cfg)
                log.write(figures)
                keeps_last = best_by == "last" or not val_set
                improved = best is None or keeps_last or task.better(figures, best, best_by)
                bad_evals = 0 if improved else bad_evals + 1
                if improved:
                    best = figures
                    save("best.pt", common() | {"model": state_for_best(model)})
                remark = "  (best so far)" if improved and not keeps_last else ""
                if val_set:
                    machine.print(f"      {describe(figures)}{remark}")
                average.swap()
                out_of_patience = cfg.patience is not None and bad_evals >= cfg.patience
                finished = step == total_steps or out_of_patience
                save_last(finished)
            if finished:
                break
        if saver:
            saver.poll()
        (stopped,) = machine.sum([stop.is_set()])  # on any process
        if stopped or cfg.save_interval and step % cfg.save_interval == 0:
            save_last()
        if stopped:
            machine.print(f"told to stop: {cfg.out_dir} is saved at step {step}; the same command "
                          "goes on from there")
            break

    if saver:
        saver.wait()
    if wandb_run:
        wandb_run.summary.update({f"best_{key}": value for key, value in (best or {}).items()})
        finish_wandb(wandb_run)
    machine.leave()
    if not finished:
        return
    split = next((split for split in ("test", "val") if split in meta["splits"]), None)
    advice = f"Now: python eval.py {cfg.out_dir}"
    if not split and not task.head["n_classes"]:
        advice = "There is no val, so how good it is was not measured: --val_fraction=0.01"
    elif split != "test":
        advice += " --split=val" if split else " --test_file=…, or, without one, --folds=5"
    machine.print(f"done in {time.monotonic() - started:.0f} s: {summary(best)}. {advice}")


def choose_micro_batch(cfg, measure, machine, max_len, checkpoint):
    """cfg.micro_batch_tokens as a number: of an interrupted run the one that it began with."""
    if cfg.micro_batch_tokens != "auto":
        return cfg.micro_batch_tokens
    if checkpoint and type(checkpoint.get("micro_batch_tokens")) is int:
        return checkpoint["micro_batch_tokens"]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if machine.device.type == "cpu" else 1
    found = memory.fitting_tokens(measure, machine.device, max_len, cfg.batch_size, 0.85 / here)
    found = machine.smallest(found)
    machine.print(f"--micro_batch_tokens=auto: {found}")
    return found


def check_finite(model, figures, cfg):
    """Raise UserError before weights or figures that are not finite are saved."""
    finite = all(math.isfinite(value) for value in figures.values())
    if not finite or not all(is_finite(p) for p in model.parameters()):
        raise UserError(f"after step {figures['step']} the weights or the figures on val are not "
                        f"finite (val_loss {figures.get('val_loss')}): lower --learning_rate="
                        f"{cfg.learning_rate}, or try --dtype=float32; {cfg.out_dir} is as its "
                        "last checkpoint left it")


def check_head_width(c, machine):
    """Raise UserError for heads that CUDA's kernel for packed texts does not take."""
    packed = c.model == "transformer" and not c.image_size
    if machine.device.type != "cuda" or machine.dtype != torch.bfloat16 or not packed:
        return
    if c.head_width % 8 or c.head_width > 256:
        raise UserError(f"heads of width {c.head_width}: on CUDA, packed texts need a multiple of "
                        "8, up to 256: choose --d_model and --n_head so, or --dtype=float32")


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


def summary(best):
    figures = describe(best)
    if not figures:
        return f"no val: the weights of step {best['step']}, the last, are kept"
    return f"best.pt: {figures}, at step {best['step']}"


def find_learning_rate(cfg, model_with_loss, task, optimizers, loader, machine):
    """A learning-rate range test: suggests a rate, writes lr_find.json and lr_find.png."""
    rates, losses = [], []
    for step, micro_batches in enumerate(loader):
        machine.seed(cfg.seed * 1_000_003 + step * machine.world + machine.rank)
        lr = optim.range_test_rate(step)
        optim.set_learning_rate(optimizers, lr)
        loss, _ = compute_gradient(model_with_loss, micro_batches, task, machine)
        grad_norm = optim.clip_gradients(optimizers, cfg.grad_clip)
        if not grad_norm.isfinite():
            break
        rates.append(lr)
        losses += machine.sum([float(loss)])
        smooth, found, diverges = optim.read_range_test(losses)
        if diverges:
            break
        optim.step_all(optimizers)
    if not losses:
        raise UserError("the gradient is not finite at the lowest rate: is the data in order?")
    if machine.rank == 0:
        from report import plot_range_test
        out = Path(cfg.out_dir)
        suggestion = None if found is None else rates[found]
        record = {"suggestion": suggestion, "rates": rates, "losses": losses}
        write_text(out / "lr_find.json", json.dumps(record, indent=1))
        plot_range_test(rates, losses, smooth, suggestion, out / "lr_find.png")
        advice = "no rate made the loss fall: there is nothing to suggest"
        if suggestion is not None:
            advice = (f"suggested: --learning_rate={suggestion:.1e}, where the loss has made a "
                      "quarter of its fall; try a third and three times as much too")
        print(f"{advice}. Written to {out}: lr_find.png, lr_find.json")
    machine.leave()


if __name__ == "__main__":
    run(lambda: train(configure(Config)))
