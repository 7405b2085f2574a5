"""Training: `torchrun train.py config/textcls.py`, or `python train.py …`; 8 GPUs: `torchrun --nproc_per_node=8 train.py …`.

The same command again continues an interrupted run: it ends in the same weights, bit for bit, as one that was not
interrupted, because what happens in step i is a function of (seed, i) alone: the batch, its masks, and the generators,
which are seeded anew at each step.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from configurator import UserError, configure, finish_wandb, run, start_wandb
from data import DataConfig
from model import (
    CHECKPOINT_FORMAT,
    ModelConfig,
    WeightsError,
    bf16_is_native,
    build_model,
    find_device,
    flops_per_token,
    full,
    lm_losses,
    load_checkpoint,
    load_weights,
    predict,
    save_checkpoint,
)


@dataclass
class Config(DataConfig):
    # the run
    out_dir: str = "out/{config}"  # checkpoints, metrics.jsonl, config.json; {config} is the config file's name
    seed: int = 1  # of weights, batches, masks, dropout; report several
    # model
    model: Literal["transformer", "mlp", "linear"] = "transformer"  # the other two are the baselines to beat, and fast
    objective: Literal["classify", "mlm", "clm"] = "classify"  # mlm: pretrain by filling in masked tokens (a share of
    # mask_prob); clm: by predicting the next token. Then classify with finetune.py --init_from=<its out_dir>
    n_layer: int = 2  # deeper for more data (mlp: hidden layers)
    n_head: int = 4  # d_model / n_head of 32-64 for small models, 64-128 for large ones
    d_model: int = 128  # wider for more data
    d_ff: int | None = None  # None: 4·d_model
    mlp: Literal["relu2", "gelu", "swiglu"] = "relu2"  # swiglu has half as many weights again
    norm: Literal["rms", "layer"] = "rms"  # layer: a little faster on CPUs
    qk_norm: bool = True  # bounds attention logits, so that higher learning rates stay stable
    pooling: Literal["mean", "max", "cls", "last"] = "mean"  # how a document's tokens become one vector
    position: Literal["rope", "learned"] = "rope"  # rope: relative, of images in two dimensions; learned: a vector for each
    max_len: int = 512  # tokens of a document that are read; longer is slower, and better where late words matter
    stem: Literal["tokens", "words"] = "tokens"  # words, with tokenizer = "bytes": the transformer reads whole words, as
    # hashed runs of bytes and of words; much better than tokens for small data, without pretraining
    ngrams: int = 3  # of that stem and of a linear model of text: runs of up to so many words are features
    char_ngrams: int = 5  # of both, with tokenizer = "bytes": and runs of up to so many bytes
    buckets: int = 2**18  # of both: hashed to so many; more for much text
    patch: int = 4  # of images: the side of a token
    crop: int | None = None  # text: train on a random window of so many tokens of each document; evaluation reads max_len
    dropout: float = 0.0  # 0.1-0.3 for small data and many epochs
    shift: float = 0.0  # images: moved in training by up to this share of their side
    rotate: float = 0.0  # images: turned by up to so many degrees
    scale: float = 0.0  # images: scaled by a factor of up to 1 + scale, either way
    flip: bool = False  # images: mirrored half the time, and evaluation averages both; not for digits or text
    cutout: float = 0.0  # images: a black square of up to this share of the side
    mixup: float = 0.0  # images: blended with another by up to mixup / 2 (1: half and half); for long training
    mask_prob: float = 0.0  # text: share of input tokens masked in training; 0.1-0.3 is a strong regulariser for small data
    checkpoint_activations: bool = False  # True where memory runs out at micro_batch_tokens=max_len: a third slower
    train_fraction: float = 1.0  # train on so much of train, to see what more labels would bring; smaller ones are nested
    # optimisation
    batch_size: int = 32  # documents per step, over all processes and micro-batches
    micro_batch_tokens: int = 16384  # most tokens that one device holds at once; lower it when memory runs out
    epochs: float = 10.0  # passes over train
    max_steps: int | None = None  # stops (and ends the schedule) sooner than epochs
    optimizer: Literal["adamw", "muon", "adagrad", "sgd", "lbfgs"] = "adamw"  # adamw: decoupled weight decay (Loshchilov &
    # Hutter). muon: for the matrices of blocks (MLP: of layers), with adamw for the rest; fewer steps to the same loss.
    # adagrad: for linear models of text (Duchi et al. 2011). sgd: with Nesterov momentum beta1. lbfgs: for convex models,
    # with all of train in one batch. In these three weight_decay is ridge's: weight_decay / 2 · |W|² is added to the loss
    learning_rate: float = 1e-3  # the peak; 1e-3 for small models from scratch, less for larger ones
    min_lr: float = 0.0  # where the schedule ends
    warmup_steps: int = 50  # linear from 0; more for large models or rates
    schedule: Literal["cosine", "linear", "trapezoid", "constant"] = "cosine"  # trapezoid: flat, then cooldown
    cooldown: float = 0.4  # of trapezoid: share of the steps in which the rate falls linearly
    weight_decay: float = 0.1  # on matrices only, and (with adamw and muon) not on embeddings of text
    beta1: float = 0.9
    beta2: float = 0.99  # 0.95 for large batches
    grad_clip: float = 1.0  # norm above which the gradient is scaled down; 0: never
    label_smoothing: float = 0.0  # 0.1 where labels are noisy
    class_weights: str | list[float] | None = None  # "balanced" (n / (n_classes · count)), or one per class: for rare ones
    focal_gamma: float = 0.0  # 1-3: weigh easy examples down by (1 - p)^gamma (Lin et al. 2017); for rare classes
    ema_decay: float = 0.0  # 0.99-0.9999: evaluate and keep an exponential moving average of the weights
    patience: int | None = None  # stop after so many evaluations without a better one; None: never
    lr_find: bool = False  # True: no run, but a learning-rate range test: lr_find.png, and a learning_rate to begin with
    # evaluation and logging
    eval_interval: int | None = None  # steps between evaluations on val (and checkpoints); None: an epoch
    log_interval: int = 10  # steps between lines
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if logged in, else offline
    wandb_project: str = "textcls"
    wandb_run_name: str | None = None  # None: out_dir's name
    # machine
    device: str = "auto"  # cuda, mps or cpu, in this order
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the device computes it natively
    compile: bool | Literal["auto"] = "auto"  # auto: on CUDA (a minute at start, then much faster). True, on CPUs: images
    # train 1.4 times as fast after half a minute, language models 1.2 times; packed texts do not, as their lengths differ
    deterministic: bool = False  # True: bitwise repeatable on CUDA too, slower (on the CPU it always is)


# settings that may differ between a run and its continuation
FREE = {"overwrite", "lr_find", "wandb_mode", "wandb_project", "wandb_run_name", "log_interval", "data_dir", "out_dir"}
PEAK_FLOPS = {  # bf16 dense, data sheets
    "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}


# ---------------------------------------------------------------------------------------------------------------------
# Machine


class Machine:
    """Where this process stands: rank of world, device, dtype. Joins the process group under torchrun."""

    def __init__(self, cfg):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        kind = find_device(cfg.device)
        try:
            self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device={cfg.device} cannot be used here: {str(e).splitlines()[0]}") from None
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if kind == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            for option, value in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: keep freed memory, as
                libc.mallopt(option, value)  # the next step needs it again (a page's first touch costs 1-2 µs)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        native = bf16_is_native(kind) and cfg.optimizer != "lbfgs"  # whose line search needs the exact loss
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" or cfg.dtype == "auto" and native else torch.float32
        if kind == "cuda" and self.dtype == torch.bfloat16:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        self.compile = kind == "cuda" and cfg.model == "transformer" if cfg.compile == "auto" else cfg.compile
        if self.compile and kind == "cpu":  # or an embedding's gradient were added up atomically: slowly, and in any order
            from torch._inductor.decomposition import decompositions
            decompositions.pop(torch.ops.aten.embedding_dense_backward.default, None)
        if self.world > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=self.device if kind == "cuda" else None,
                                    timeout=datetime.timedelta(hours=2))  # the others wait while rank 0 builds the data set

    def print(self, *args):
        if self.rank == 0:
            print(*args, flush=True)

    def seed(self, seed):
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed sees to other devices too, which takes 0.5 ms
        else:
            torch.manual_seed(seed)

    def sum(self, values):
        """A float64 tensor of `values`, added up over all processes."""
        total = torch.tensor(values, dtype=torch.float64 if self.device.type != "mps" else torch.float32,
                             device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.cpu()

    def first(self, work):
        """work() on rank 0 before the others: they find what it wrote."""
        if self.world == 1:
            return work()
        if self.rank > 0:
            dist.barrier()
        done = work()
        if self.rank == 0:
            dist.barrier()
        return done


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made nearly orthogonal, so that a matrix moves as far in each direction (Jordan et al.
    2024): all its singular values come near 1 by 5 Newton-Schulz steps. Scaled by 0.2·√(longer side) it is as large as
    AdamW's, so that one learning rate serves both (Liu et al. 2025). As torch.optim.Muon, but matrices of one shape go
    through together, and of attention's stacked q, k and v each is a matrix of its own (`parts`)."""

    def __init__(self, groups, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "parts": 1})
        self.dtype = dtype  # of the Newton-Schulz steps; bfloat16 is enough, and a third of the time where it is native

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates, alike = {}, {}
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates[p] = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
                alike.setdefault(p.shape, []).append(p)
            for shape, ps in alike.items():
                stack = torch.cat([updates[p].view(group["parts"], -1, shape[1]) for p in ps]).to(self.dtype)
                size = group["lr"] * 0.2 * max(stack.shape[1:]) ** 0.5
                for p, update in zip(ps, orthogonal(stack).split(group["parts"])):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.reshape(shape).to(p.dtype), alpha=size)


def orthogonal(x):
    """The nearest (semi-)orthogonal matrix of each of x (N, a, b), roughly: singular values within 0.7 .. 1.2."""
    y = x.mT if x.shape[1] > x.shape[2] else x
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y.mT if x.shape[1] > x.shape[2] else y


class Adagrad(torch.optim.Optimizer):
    """Each weight's step is divided by the root of the sum of its squared gradients so far (Duchi et al. 2011). As
    torch.optim.Adagrad, but with a sparse gradient (coalesced) in a fifth of its time."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["sum"] = torch.zeros_like(p)
                total = self.state[p]["sum"]
                if p.grad.is_sparse:
                    (rows,), g = p.grad.indices(), p.grad.values()
                    squares = total.index_select(0, rows).addcmul_(g, g)
                    total.index_copy_(0, rows, squares)
                    moved = p.index_select(0, rows).addcdiv_(g, squares.sqrt_().add_(1e-10), value=-group["lr"])
                    p.index_copy_(0, rows, moved)
                else:
                    g = p.grad.add(p, alpha=group["weight_decay"])
                    p.addcdiv_(g, total.addcmul_(g, g).sqrt().add_(1e-10), value=-group["lr"])


LARGE = 2**20  # weights of a table whose whole gradient would take longer to make than that of the rows that a batch reads


def make_optimizers(model, cfg, device, lr_scale=None, dtype=torch.float32):
    """The optimizers of cfg.optimizer; each trainable parameter is in exactly one group of one of them. Weight decay is for
    matrices, text embeddings aside. `lr_scale(name, model, cfg)` is what a parameter's learning rate is multiplied by
    (None: 1). `dtype` is that of Muon's products.

    On the CPU the rows of a large text embedding that a batch does not read are left as they are: to decay their moments
    would take a sixth of a fine-tuning step. Those that it reads move without momentum, at once as far as AdamW moves them
    in the steps to come; with momentum, but in one step only, rare words would learn a tenth as fast (NOTES.md)."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    table = getattr(model, "embedding", None)
    table = table if isinstance(table, torch.nn.Embedding) and table.weight.requires_grad else None
    if table:
        table.sparse = device.type == "cpu" and model.config.lm_head != "tied" and table.weight.numel() > LARGE and (
            cfg.optimizer in ("adamw", "muon") or not cfg.weight_decay and (
                cfg.optimizer == "adagrad" or cfg.optimizer == "sgd" and not cfg.beta1))
    groups = {}
    for name, p in params.items():
        kind, decay, parts = cfg.optimizer, cfg.weight_decay if p.ndim >= 2 else 0.0, 1
        if kind == "muon":
            parts = 3 if name.endswith("qkv.weight") else 1
            kind = "muon" if p.ndim == 2 and name.startswith(("blocks", "layers")) else "adamw"
        if table and p is table.weight and kind == "adamw":
            kind, decay = "sparse" if table.sparse else kind, 0.0
        scale = lr_scale(name, model, cfg) if lr_scale else 1.0
        groups.setdefault(kind, {}).setdefault((scale, decay, parts), []).append(p)
    assert sorted(id(p) for k in groups.values() for ps in k.values() for p in ps) == sorted(id(p) for p in params.values())
    betas, lr = (cfg.beta1, cfg.beta2), cfg.learning_rate or 1.0  # which each step sets
    make = {"adamw": lambda g: torch.optim.AdamW(g, lr, betas, fused=True),
            "sparse": lambda g: torch.optim.SparseAdam(g, lr, (0.0, cfg.beta2)),
            "muon": lambda g: Muon(g, lr, dtype=dtype),
            "adagrad": lambda g: Adagrad(g, lr),
            "sgd": lambda g: torch.optim.SGD(g, lr, cfg.beta1, nesterov=cfg.beta1 > 0,
                                             fused=not (table and table.sparse))}
    return [make[kind]([{"params": ps, "lr_scale": scale} | ({"weight_decay": decay} if kind != "sparse" else {})
                        | ({"parts": parts} if kind == "muon" else {}) for (scale, decay, parts), ps in of_kind.items()])
            for kind, of_kind in groups.items()]


@torch.no_grad()
def clip(optimizers, limit):
    """The norm of the whole gradient; above `limit` (0: never) it is scaled down to it."""
    params = [p for o in optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]
    for p in params:
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    grads = [p.grad.values() if p.grad.is_sparse else p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads)
    if limit:
        scale = (norm / limit).clamp(min=1)
        for o in optimizers:
            if o.defaults.get("fused"):
                o.grad_scale = scale  # the fused step divides by it
            else:
                for p in (p for g in o.param_groups for p in g["params"]):
                    (p.grad.values() if p.grad.is_sparse else p.grad).div_(scale)
    return norm


def learning_rate(cfg, step, total):
    """The rate of step 0 ≤ step < total: linear warm-up to the peak, then the schedule down to min_lr."""
    if cfg.lr_find:
        return 1e-6 * 1e8 ** (step / total)
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_steps + 1)
    x = (step - cfg.warmup_steps) / max(1, total - cfg.warmup_steps)  # 0 → 1
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * x)), "linear": 1 - x, "constant": 1.0,
            "trapezoid": min(1.0, (1 - x) / max(cfg.cooldown, 1e-9))}[cfg.schedule]
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * fall


def range_test(losses):
    """Of the losses of a learning-rate range test (Smith 2017): (smoothed, the index of the rate to suggest or None, whether
    they diverge). Suggested is where a quarter of the fall is made: the steepest point and a tenth of the lowest one, which
    others take, differ by a factor of up to 30 between seeds, this by 2 (NOTES.md)."""
    smooth, mean = [], 0.0
    for i, loss in enumerate(losses):
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean / (1 - 0.9 ** (i + 1)))
    start = sum(smooth[:20]) / 20  # at rates that do not matter yet
    low = min(smooth[20:], default=start)
    quarter = start - (start - low) / 4
    found = next(i for i, s in enumerate(smooth) if i >= 20 and s <= quarter) if low < 0.98 * start else None
    return smooth, found, len(smooth) > 20 and smooth[-1] > 1.5 * min(low, start)


def report_range(cfg, tested):
    """Writes lr_find.json and lr_find.png of [(rate, loss), ...], and prints the suggestion."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rates, losses = zip(*tested)
    smooth, found, _ = range_test(losses)
    out = Path(cfg.out_dir)
    write_json(out / "lr_find.json", {"suggestion": found and rates[found], "rates": rates, "losses": losses})
    figure, ax = plt.subplots(figsize=(6, 4))
    ax.plot(rates, losses, color="lightgrey")
    ax.plot(rates, smooth)
    ax.set(xlabel="learning rate", ylabel="training loss, smoothed", xscale="log", ylim=(0.9 * min(smooth), 1.2 * smooth[0]))
    if found:
        ax.axvline(rates[found], color="black", linewidth=1)
    figure.savefig(out / "lr_find.png", dpi=110, bbox_inches="tight")
    print((f"suggested: --learning_rate={rates[found]:.1e}, where the loss has made a quarter of its fall; try a third and "
           "three times as much too" if found else "no rate made the loss fall: there is nothing to suggest")
          + f". Written to {out}: lr_find.png, lr_find.json")


def class_weights(cfg, per_class):
    """The weight of each class in the loss, (C,) float32, or None."""
    if cfg.class_weights is None:
        return None
    if per_class is None:
        raise UserError("--class_weights is for classes, not for --target=number")
    count = torch.tensor(per_class, dtype=torch.float32)
    if cfg.class_weights == "balanced":
        return count.sum() / (len(count) * count.clamp(min=1))
    if not isinstance(cfg.class_weights, list) or len(cfg.class_weights) != len(count):
        raise UserError(f"--class_weights={cfg.class_weights!r} is neither 'balanced' nor a list of {len(count)} numbers")
    return torch.tensor(cfg.class_weights)


def loss_sum(logits, targets, cfg, weights=None):
    """Cross-entropy summed over the targets that are not -100 (or squared error, where the targets are one number each, or
    `binary_loss`, where they are multi-hot): the caller divides by their number in the global batch (or, with class weights,
    by the sum of their weights)."""
    if targets.is_floating_point() and targets.ndim == 1:
        return (logits[:, 0] - targets).square().sum()
    if targets.ndim == 2 and not targets.is_floating_point():
        return binary_loss(logits, targets).sum()
    losses = F.cross_entropy(full(logits), targets, weights, reduction="none", label_smoothing=cfg.label_smoothing)
    if cfg.focal_gamma and targets.ndim == 1:
        p = logits.softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        losses = losses * (1 - p) ** cfg.focal_gamma
    return losses.sum()


def binary_loss(logits, targets):
    """(B,) losses of logits (B, C) and multi-hot targets (B, C): the mean over the labels; 0 where the target is -100."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast may have made them bfloat16
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0).to(logits.dtype), reduction="none").mean(1)
    return losses * (targets[:, 0] >= 0)


def image_changes(cfg):
    return {k: getattr(cfg, k) for k in ("shift", "rotate", "scale", "flip", "cutout", "mixup")}


class WithLoss(torch.nn.Module):
    """A model and the `loss_sum` of what it says, for torch.compile and DDP to see as one."""

    def __init__(self, model, cfg):
        super().__init__()
        self.model, self.cfg = model, cfg

    def forward(self, inputs, targets, weights=None):
        return loss_sum(self.model(*inputs), targets, self.cfg, weights)


def backward(with_loss, micro_batches, cfg, machine, weights=None):
    """Adds the gradient of the mean loss over the whole global batch; returns (that loss, tokens of all processes).

    DDP averages gradients over processes, so each scales its sum by world / (targets in the global batch)."""
    counted = [targets.new_ones(len(targets), dtype=torch.bool) if targets.is_floating_point() else
               (targets if targets.ndim == 1 else targets[:, 0]) >= 0 for *_, targets in micro_batches]
    n_local = sum(k.sum().item() if weights is None or t.ndim > 1 else weights[t[k]].sum().item()
                  for k, (*_, t) in zip(counted, micro_batches))
    tokens = sum(int(k.sum()) if inputs[0].ndim > 1 or len(inputs[0]) == len(k) else  # examples that are no text; clm
                 int(inputs[1][-1 if len(inputs) > 2 else k.sum()])  # by cu_seqlens: mlm (filled up); the real documents
                 for k, (*inputs, _) in zip(counted, micro_batches))
    n, tokens = machine.sum([n_local, tokens]).tolist()
    weights = weights if weights is None else weights.to(machine.device)
    total = 0.0
    for i, (*inputs, targets) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last or machine.world == 1 else with_loss.no_sync(), \
             torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
            inputs = [t if isinstance(t, int) else t.to(machine.device, non_blocking=True) for t in inputs]
            if inputs[0].ndim == 4 and len(inputs) == 2:
                inputs = [data.augment(*inputs, **image_changes(cfg))]
            loss = with_loss(inputs, targets.to(machine.device, non_blocking=True), weights) / n
        (loss * machine.world).backward()
        total += loss.detach()
    return total, tokens


def step_lbfgs(optimizer, with_loss, micro_batches, cfg, machine, weights=None):
    """One step of L-BFGS (up to 20 evaluations) on the mean loss plus weight_decay / 2 · |W|²; returns (the loss before it,
    without the penalty, tokens of a batch)."""
    first = []

    def closure():
        optimizer.zero_grad()
        loss, tokens = backward(with_loss, micro_batches, cfg, machine, weights)
        first.append((loss, tokens))
        penalty = sum(cfg.weight_decay / 2 * p.square().sum() for p in with_loss.parameters() if p.ndim >= 2)
        if cfg.weight_decay:
            penalty.backward()
        return loss + penalty
    optimizer.step(closure)
    return first[0]


class EMA:
    """An exponential moving average of the trainable weights, faster at the beginning; does nothing at decay 0."""

    def __init__(self, model, decay):
        self.decay, self.weights = decay, [p for p in model.parameters() if p.requires_grad] if decay else []
        self.values = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self, step):
        if self.weights:
            torch._foreach_lerp_(self.values, self.weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def swap(self):
        """Puts the average into the model and what was there aside; the second call undoes it."""
        for p, v in zip(self.weights, self.values):
            kept = p.clone()
            p.copy_(v)
            v.copy_(kept)


def evaluate(model, split, cfg, machine):
    """{"val_loss", "val_accuracy"} (regression: "val_r2"; of several labels, accuracy is the share with all of them right,
    and there is "val_micro_f1"; of a language model, the loss is per target, and clm has "val_bits_per_byte") over all of a
    split, on all processes; touches no generator."""
    batches = data.eval_batches(split.lengths, cfg.micro_batch_tokens, machine.rank, machine.world)
    loss = correct = hits = said = true = 0.0  # of labels: given rightly, given, and to be given
    model.eval()
    loader = (split.__getitems__([b])[0] for b in batches)
    if isinstance(split, data.Blocks):
        totals = [(nats.sum().item(), right.sum().item(), len(nats))
                  for nats, right in lm_losses(model, loader, machine.device, machine.dtype)]
        model.train()
        nats, right, n = machine.sum([sum(t) for t in zip(*totals)] or [0, 0, 0]).tolist()
        return {"val_loss": nats / n, "val_token_accuracy": right / n} | (
            {"val_bits_per_byte": nats / math.log(2) / split.n_bytes} if split.objective == "clm" and split.n_bytes else {})
    regression, images = split.labels.dtype == "float32", isinstance(split, data.Arrays) and split.values.ndim == 4
    for (_, indices, _), logits in zip(batches, predict(model, loader, machine.device, machine.dtype, cfg.flip and images)):
        targets = torch.from_numpy(split.labels[indices])
        if regression:
            loss += (logits[:, 0].double() - targets).square().sum().item()
        elif targets.ndim == 2:
            loss += binary_loss(logits.double(), targets).sum().item()
            given, targets = logits >= 0, targets == 1
            correct += (given == targets).all(1).sum().item()
            hits, said, true = (a + b.sum().item() for a, b in zip((hits, said, true), (given & targets, given, targets)))
        else:
            loss += F.cross_entropy(logits.double(), targets, reduction="sum").item()
            correct += (logits.argmax(1) == targets).sum().item()
    model.train()
    loss, correct, hits, said, true = machine.sum([loss, correct, hits, said, true]).tolist()
    loss /= len(split)
    if regression:
        return {"val_loss": loss, "val_r2": 1 - loss / max(float(split.labels.astype("float64").var()), 1e-12)}
    f1 = {"val_micro_f1": 2 * hits / max(said + true, 1)} if split.labels.ndim == 2 else {}
    return {"val_loss": loss, "val_accuracy": correct / len(split), **f1}


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def open_run(cfg, machine):
    """Checks out_dir and returns the checkpoint to resume from, or None to begin. Nothing is written yet."""
    out, config = Path(cfg.out_dir), dataclasses.asdict(cfg)
    if cfg.overwrite:
        return None
    if not (out / "config.json").exists():
        if there := [n for n in ("best.pt", "last.pt") if (out / n).exists()]:
            raise UserError(f"{out} holds a {there[0]} without its config.json, so not a run that could be continued; "
                            "choose another --out_dir=…, or replace it with --overwrite=True")
        return None
    try:
        there = json.loads((out / "config.json").read_text())
    except ValueError:
        raise UserError(f"{out}/config.json is damaged; start anew with --overwrite=True") from None
    config = json.loads(json.dumps(config))
    if differ := [k for k in config if k not in FREE and config[k] != there.get(k)]:
        raise UserError(f"{out} holds a run with other settings ({differ[0]}={there.get(differ[0])!r} there, "
                        f"{config[differ[0]]!r} here); choose another --out_dir=…, or replace it with --overwrite=True")
    return load_checkpoint(out / "last.pt") if (out / "last.pt").exists() else None


def begin_run(cfg, checkpoint):
    """Makes out_dir ready: empty of a former run's files, or cut back to the checkpoint's step (lr_find: as it is)."""
    out = Path(cfg.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if cfg.lr_find:
            return
        if checkpoint is None:
            for name in ("config.json", "last.pt", "best.pt", "metrics.jsonl", "eval.json"):
                (out / name).unlink(missing_ok=True)
            write_json(out / "config.json", dataclasses.asdict(cfg))
            open(out / "metrics.jsonl", "w").close()
        else:
            lines = (out / "metrics.jsonl").read_text().splitlines()
            kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= checkpoint["step"]]
            (out / "metrics.jsonl").write_text("".join(x + "\n" for x in kept))
    except OSError as e:
        raise UserError(f"--out_dir={out} cannot be written to: {e.strerror}; choose another") from e


def write_json(path, value):
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def make_model(cfg, meta):
    c = ModelConfig(
        model=cfg.model, n_classes=len(meta["label_names"]) or 1, n_layer=cfg.n_layer, n_head=cfg.n_head,
        d_model=cfg.d_model, d_ff=cfg.d_ff or 4 * cfg.d_model, mlp=cfg.mlp,
        norm=cfg.norm, qk_norm=cfg.qk_norm, pooling=cfg.pooling, position=cfg.position, dropout=cfg.dropout)
    c.checkpoint_activations = cfg.checkpoint_activations
    if cfg.objective != "classify":
        c.n_classes, c.lm_head, c.causal = 0, "own", cfg.objective == "clm"
    if meta["kind"] == "text":
        c.vocab_size, c.max_len, c.ngrams, c.buckets = meta["vocab_size"], cfg.max_len, cfg.ngrams, cfg.buckets
        c.stem = cfg.stem
        if "letters" in meta and (cfg.model == "linear" or cfg.stem == "words"):
            c.char_ngrams, c.letters, c.blanks = cfg.char_ngrams, tuple(meta["letters"]), tuple(meta["blanks"])
    elif meta["kind"] == "image":
        c.image_size, c.patch = tuple(meta["shape"]), cfg.patch
    else:
        (c.n_features,) = meta["shape"]
    if cfg.model == "transformer":
        if cfg.d_model % (parts := (4 if c.image_size else 2) * cfg.n_head):
            raise UserError(f"--d_model={cfg.d_model} does not split into n_head={cfg.n_head} heads of a width that "
                            f"{parts // cfg.n_head} divides")
        if c.image_size and (c.image_size[1] % c.patch or c.image_size[2] % c.patch):
            raise UserError(f"--patch={c.patch} does not divide images of {c.image_size[1]}×{c.image_size[2]}")
    return build_model(c)


def tokens_per_example(cfg, meta):
    """Tokens of the longest example: what micro_batch_tokens is measured in."""
    if meta["kind"] == "text":
        return cfg.max_len
    if meta["kind"] == "features" and cfg.model == "transformer":
        raise UserError("--model=transformer reads text and images; for rows of numbers take --model=mlp or linear")
    return meta["shape"][1] // cfg.patch * (meta["shape"][2] // cfg.patch) if cfg.model == "transformer" else 1


def train(cfg, make_model=make_model, lr_scale=None, merged=torch.nn.Module.state_dict):
    """Runs `cfg`. make_model(cfg, meta) and lr_scale (see make_optimizers) are where finetune.py differs; merged(model) is
    the state dict that best.pt gets."""
    started = time.time()
    for name in ("batch_size", "micro_batch_tokens", "log_interval", "n_head", "d_model", "patch", "max_len", "epochs",
                 "ngrams", "char_ngrams", "buckets"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name}={getattr(cfg, name)} must be above 0")
    for name in ("dropout", "mask_prob", "ema_decay", "label_smoothing"):
        if not 0 <= (getattr(cfg, name) or 0) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be from 0 to below 1")
    if cfg.objective != "classify" and (cfg.model != "transformer" or (cfg.mask_prob > 0) != (cfg.objective == "mlm")):
        raise UserError(f"--objective={cfg.objective} is for --model=transformer, with --mask_prob "
                        + ("above 0, as 0.3" if cfg.objective == "mlm" else "of 0"))
    if cfg.objective != "classify" and (cfg.class_weights or cfg.focal_gamma):
        raise UserError("--class_weights and --focal_gamma are for --objective=classify")
    if cfg.stem == "words" and (cfg.tokenizer != "bytes" or cfg.model != "transformer" or cfg.objective != "classify"
                                or cfg.mask_prob or cfg.crop):
        raise UserError("--stem=words is for a transformer that classifies, with --tokenizer=bytes, and without --mask_prob "
                        "and --crop, which would cut words")
    if cfg.target == "labels" and (cfg.class_weights or cfg.focal_gamma or cfg.label_smoothing):
        raise UserError("--class_weights, --focal_gamma and --label_smoothing are for --target=class; of several labels, "
                        "rare ones are helped by the thresholds that eval.py fits on val")
    if cfg.lr_find and cfg.optimizer == "lbfgs":
        raise UserError("--optimizer=lbfgs searches for its rate in each step: there is nothing for --lr_find to find")
    if not 0 < cfg.train_fraction <= 1 or cfg.train_fraction < 1 and cfg.mixup:
        raise UserError(f"--train_fraction={cfg.train_fraction} must be above 0 and at most 1, and 1 with --mixup, which "
                        "blends with any example of train")
    machine = Machine(cfg)
    checkpoint = None if cfg.lr_find else open_run(cfg, machine)
    if checkpoint and checkpoint["finished"]:
        machine.print(f"{cfg.out_dir}: this run is finished ({summary(checkpoint)}); "
                      f"evaluate it with: python eval.py {cfg.out_dir}   (or train anew: --overwrite=True)")
        return
    # data
    folder = data.folder_of(cfg)
    meta = machine.first(lambda: data.open_or_build(cfg))
    max_len = tokens_per_example(cfg, meta)
    if max_len > cfg.micro_batch_tokens:
        raise UserError(f"--micro_batch_tokens={cfg.micro_batch_tokens} must hold an example, of up to {max_len} tokens")
    language = {} if cfg.objective == "classify" else dict(objective=cfg.objective, mask_prob=cfg.mask_prob)
    changes = language or dict(crop=cfg.crop and min(cfg.crop, max_len), mask_prob=cfg.mask_prob) \
        if meta["kind"] == "text" else {}
    if meta["kind"] == "image":
        changes = dict(draw=any(image_changes(cfg).values()), mixup=cfg.mixup)
    train_set = data.open_split(cfg, meta, "train", max_len, cfg.seed, **changes)
    val_set = None if cfg.lr_find else data.open_split(cfg, meta, "val", max_len, **language)
    among = data.share(train_set.labels, cfg.train_fraction, cfg.split_seed) if cfg.train_fraction < 1 else None
    n_train = len(train_set) if among is None else len(among)
    steps_per_epoch = -(-n_train // cfg.batch_size)
    total = 160 if cfg.lr_find else max(1, min(round(cfg.epochs * steps_per_epoch), cfg.max_steps or math.inf))
    eval_interval = cfg.eval_interval or steps_per_epoch

    # model and optimizer
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, meta).to(machine.device)
    if cfg.optimizer == "lbfgs":
        if machine.world > 1:
            raise UserError("--optimizer=lbfgs runs in one process, without torchrun's --nproc_per_node")
        if cfg.batch_size < n_train:
            raise UserError(f"--optimizer=lbfgs needs all {n_train} examples in each step: --batch_size={n_train}")
        optimizers = [torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", tolerance_grad=1e-9)]
    else:
        optimizers = make_optimizers(model, cfg, machine.device, lr_scale, machine.dtype)
    weights = class_weights(cfg, meta["splits"]["train"].get("per_class"))
    average = EMA(model, cfg.ema_decay)
    step, best, bad_evals, elapsed, run_id = 0, None, 0, 0.0, f"{Path(cfg.out_dir).name}-{int(started)}"
    if checkpoint:
        load_weights(model, checkpoint["model"], f"{cfg.out_dir}/last.pt")
        for o, state in zip(optimizers, checkpoint["optimizers"]):
            o.load_state_dict(state)
        average.values = [v.to(machine.device) for v in checkpoint["ema"]]
        step, best, bad_evals, elapsed, run_id = (checkpoint[k] for k in ("step", "best", "bad_evals", "elapsed", "run_id"))
        machine.print(f"{cfg.out_dir}: continuing at step {step}")
    if machine.rank == 0:
        begin_run(cfg, checkpoint)
    wandb_run = start_wandb(dataclasses.asdict(cfg), run_id) if machine.rank == 0 and not cfg.lr_find else None
    with_loss = WithLoss(model, cfg)
    if machine.compile:
        with_loss.compile()
    if machine.world > 1:
        with_loss = torch.nn.parallel.DistributedDataParallel(with_loss)
    n_params = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(model, train_set.lengths.mean())
    unit = "tok" if meta["kind"] == "text" else "ex"
    machine.print(
        f"{cfg.model}: {n_params:,} parameters, {flops / 1e6:.2g} MFLOP/token; {machine.device}, {machine.dtype}, "
        f"{machine.world} process(es); {n_train:,} examples / {cfg.batch_size} = {steps_per_epoch} steps per epoch, "
        f"{total} in all; ready after {time.time() - started:.1f} s")

    sampler = data.GlobalBatches(train_set, cfg.batch_size, cfg.micro_batch_tokens, cfg.seed, step, total,
                                 machine.rank, machine.world, fixed_shapes=machine.compile, among=among)
    loader = torch.utils.data.DataLoader(train_set, batch_sampler=sampler, collate_fn=lambda batches: batches,
                                         num_workers=2 if machine.device.type == "cuda" else 0)

    def log(record):
        if machine.rank == 0:
            with open(Path(cfg.out_dir) / "metrics.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            if wandb_run:
                wandb_run.log(record, step=record["step"])

    def save(name, weights, finished=False, **more):
        if machine.rank == 0:
            save_checkpoint(Path(cfg.out_dir) / name, {
                "format": CHECKPOINT_FORMAT, "model": weights, "model_config": dataclasses.asdict(model.config),
                "config": dataclasses.asdict(cfg), "label_names": meta["label_names"], "n_suffix": meta.get("n_suffix"),
                "tokenizer": (folder / "tokenizer.json").read_text(encoding="utf-8") if meta["kind"] == "text" else None,
                "max_len": max_len, "kind": meta["kind"], "scaling": meta["scaling"], "data_sha256": meta["sha256"],
                "data_folder": folder.name, "step": step,
                "epoch": step / steps_per_epoch, "best": best, "finished": finished, **more})

    # the loop; the clock stands still while evaluating
    clock, tokens_seen, since, tested = time.time(), 0, step, []
    for micro_batches in loader:
        machine.seed(cfg.seed * 1_000_003 + step * machine.world + machine.rank)  # dropout: a function of (seed, step)
        lr = learning_rate(cfg, step, total)
        if cfg.optimizer == "lbfgs":
            loss, tokens = step_lbfgs(*optimizers, with_loss, micro_batches, cfg, machine, weights)
        else:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr * group["lr_scale"]
            loss, tokens = backward(with_loss, micro_batches, cfg, machine, weights)
        norm = clip(optimizers, cfg.grad_clip)
        if cfg.lr_find and norm.isfinite():
            tested.append((lr, machine.sum([float(loss)]).item()))
        if tested and (not norm.isfinite() or range_test([x for _, x in tested])[2]):
            break
        if not norm.isfinite():
            raise UserError(f"the gradient of step {step} is not finite: lower --learning_rate={cfg.learning_rate}, raise "
                            f"--warmup_steps={cfg.warmup_steps}, or try --dtype=float32; {cfg.out_dir} is as it was before")
        if cfg.optimizer != "lbfgs":
            for o in optimizers:
                o.step()
                o.zero_grad(set_to_none=True)
        average.update(step)
        step += 1
        tokens_seen += tokens
        if cfg.lr_find:
            continue

        if step % cfg.log_interval == 0 or step == total:
            loss = machine.sum([float(loss)]).item()
            now = time.time()
            elapsed, rate = elapsed + now - clock, tokens_seen / (now - clock)
            record = {"step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": lr, "grad_norm": norm.item(),
                      "tokens_per_s": rate, "examples_per_s": (step - since) * cfg.batch_size / (now - clock),
                      "elapsed_s": elapsed}
            if peak := next((v for k, v in PEAK_FLOPS.items() if machine.device.type == "cuda"
                             and k in torch.cuda.get_device_name()), None):
                per = max_len if meta["kind"] == "image" else 1  # rate counts images, flops a patch's
                record["mfu"] = flops * rate * per / peak / machine.world
            log(record)
            eta = (total - step) * (now - clock) / (step - since)
            machine.print(f"step {step}/{total}  epoch {record['epoch']:.2f}  loss {loss:.4f}  lr {lr:.2e}  "
                          f"grad {norm:.2f}  {rate:,.0f} {unit}/s  ETA {eta // 60:.0f}:{eta % 60:02.0f}")
            clock, tokens_seen, since = now, 0, step

        if step % eval_interval == 0 or step == total:
            paused = time.time()
            average.swap()
            result = {"step": step, **evaluate(model, val_set, cfg, machine)}
            log(result)
            improved = best is None or score(result) > score(best)
            best, bad_evals = (result, 0) if improved else (best, bad_evals + 1)
            machine.print(f"      {figures(result)}" + ("  (best so far)" if improved else ""))
            if improved:
                save("best.pt", merged(model))
            average.swap()
            stop = step == total or cfg.patience is not None and bad_evals >= cfg.patience
            save("last.pt", model.state_dict(), stop, optimizers=[o.state_dict() for o in optimizers], ema=average.values,
                 bad_evals=bad_evals, elapsed=elapsed, run_id=run_id)
            clock += time.time() - paused
            if stop:
                break

    if cfg.lr_find and machine.rank == 0:
        report_range(cfg, tested)
    if wandb_run:
        wandb_run.summary.update({f"best_{k}": v for k, v in best.items()})
        finish_wandb(wandb_run)
    if machine.world > 1:
        dist.destroy_process_group()
    if not cfg.lr_find:
        machine.print(f"done in {time.time() - started:.0f} s: {summary({'best': best})}. Now: python eval.py {cfg.out_dir}"
                      + " --split=val" * ("test" not in meta["splits"]))


def score(result):
    # of several labels, accuracy is too coarse: it counts only what is right in all of them. Ties go to the lower loss
    return [result.get("val_micro_f1", result.get("val_accuracy", 0)), -result["val_loss"]]


def figures(result):
    return f"val loss {result['val_loss']:.4f}  " + (
        f"accuracy {result['val_accuracy']:.2%}" if "val_accuracy" in result else f"R² {result['val_r2']:.4f}"
        if "val_r2" in result else f"token accuracy {result['val_token_accuracy']:.2%}") + (
        f"  bits/byte {result['val_bits_per_byte']:.4f}" if "val_bits_per_byte" in result else "") + (
        f"  micro-F1 {result['val_micro_f1']:.4f}" if "val_micro_f1" in result else "")


def summary(checkpoint):
    return f"best: {figures(checkpoint['best'])}, at step {checkpoint['best']['step']}"


if __name__ == "__main__":
    run(lambda: train(configure(Config)), WeightsError)
