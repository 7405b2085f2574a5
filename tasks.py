"""What is learnt: one small class per task, and how a model is run on a batch.

A task knows its loss, its figures on val, and which of two results is better; train.py knows no
task by name. A new kind of target is one more class with an entry in TASKS; a new loss is a
subclass that takes an entry over.
"""
import math

from configurator import UserError

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import at_least_float32


def task_class(cfg, source):
    """The class of a training config's task, its settings checked. source: the settings of the data
    set (sources.resolve). Raises UserError."""
    learns_labels = cfg.objective in ("classify", "contrastive")
    if learns_labels and source.target == "none":
        raise UserError(f"--objective={cfg.objective} needs labels, and --target=none has none; "
                        "use --objective=mlm or clm")
    if cfg.objective == "contrastive" and source.target != "class":
        raise UserError("--objective=contrastive is for --target=class")
    if not learns_labels and source.kind != "text":
        raise UserError(f"--objective={cfg.objective} needs text, not --kind={source.kind}")
    task = TASKS[source.target if cfg.objective == "classify" else cfg.objective]
    if cfg.teacher:
        if task is not ClassTask:
            raise UserError("--teacher is for --target=class and --objective=classify")
        task = TaughtTask
    if cfg.huber_delta and task is not NumberTask:
        raise UserError("--huber_delta is for --target=number")
    task.check_settings(cfg)
    return task


MOST_LOGITS = 2**27  # of a micro-batch that are made at once: 0.5 GiB in float32
LOWER_IS_BETTER = "val_loss",


class Task:
    """What all tasks share.

    head: the settings of ModelConfig that say what the model's outputs are. n_totals: how many
    numbers `totals` returns. figure_names: of what `figures` returns, by what checkpoints can be
    compared (--best_by): by the last one, unless told otherwise.
    """
    n_totals = 3
    figure_names = ("val_loss",)
    compares_examples = False  # True: the loss is of pairs in a batch, and `fit_head` is called
    #   before each evaluation

    def __init__(self, cfg, meta):
        self.head = {"n_classes": len(meta["label_names"])}

    @staticmethod
    def check_settings(cfg):
        """Raise UserError for settings that do not apply to this task."""

    def to(self, device):
        """Move what the loss needs to the device: once, as doing so in each step would stall it."""

    def example_settings(self, cfg, modality, training):
        """Settings of batches.open_split: what is read, and in training, how it is varied."""
        if training and modality == "text":
            return {"crop": cfg.crop and min(cfg.crop, cfg.max_len), "mask_prob": cfg.mask_prob}
        if training and modality == "image":
            names = "shift", "rotate", "scale", "flip", "cutout", "mixup"
            augmentation = {name: getattr(cfg, name) for name in names}
            return {"augmentation": augmentation if any(augmentation.values()) else None}
        return {}

    def batch_loss(self, model, inputs, targets):
        """loss_sum of a model's outputs."""
        return self.loss_sum(model(*inputs), targets)

    def loss_sum(self, logits, targets):
        """The loss, summed over the targets that count; float32 scalar."""
        raise NotImplementedError

    def weight_sum(self, batch):
        """What the loss of a global batch is divided by: its targets, or their weights added up."""
        return batch.n_targets

    def totals(self, logits, targets):
        """Sums over a batch of val that `figures` is made of: a list of floats."""
        raise NotImplementedError

    def figures(self, totals, examples):
        """The figures on val, from the totals over all batches."""
        raise NotImplementedError

    def better(self, a, b, by):
        """Are figures `a` better than `b` in the figure `by`? Of equal ones, the lower loss."""
        sign = -1 if by in LOWER_IS_BETTER else 1
        return (sign * a[by], -a["val_loss"]) > (sign * b[by], -b["val_loss"])


class ClassTask(Task):
    """One of several classes: cross-entropy."""
    figure_names = "val_loss", "val_accuracy"

    def __init__(self, cfg, meta):
        super().__init__(cfg, meta)
        self.label_smoothing, self.mixup = cfg.label_smoothing, cfg.mixup
        self.focal_gamma = cfg.focal_gamma
        self.class_weights = class_weights(cfg, meta["splits"]["train"]["per_class"])
        self.weights_on_device = self.class_weights

    def to(self, device):
        if self.class_weights is not None:
            self.weights_on_device = self.class_weights.to(device)

    def loss_sum(self, logits, targets):
        """logits (B, C); targets (B,) int64, or with mixup (B, C) shares of the classes."""
        logits = at_least_float32(logits)
        losses = F.cross_entropy(logits, targets, self.weights_on_device, reduction="none",
                                 label_smoothing=self.label_smoothing)
        if self.focal_gamma:
            p = logits.softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
            losses = losses * (1 - p) ** self.focal_gamma
        return losses.sum()

    def weight_sum(self, batch):
        if self.class_weights is None or self.mixup:
            return batch.n_targets
        return self.class_weights[batch.targets[batch.targets >= 0]].sum().item()

    def totals(self, logits, targets):
        logits = logits.cpu()
        loss = F.cross_entropy(logits.double(), targets, reduction="sum")
        return [loss.item(), (logits.argmax(1) == targets).sum().item(), len(targets)]

    def figures(self, totals, examples):
        loss, correct, n = totals
        return {"val_loss": loss / n, "val_accuracy": correct / n}


class TaughtTask(ClassTask):
    """One of several classes, by their labels and a teacher's logits (Hinton et al. 2015): a
    weighted mean of cross-entropy and, at a temperature, of the divergence from the teacher, times
    the temperature's square, which keeps its gradients as large."""

    def __init__(self, cfg, meta):
        super().__init__(cfg, meta)
        self.weight, self.temperature = cfg.teacher_weight, cfg.teacher_temperature

    @staticmethod
    def check_settings(cfg):
        if cfg.class_weights or cfg.focal_gamma or cfg.mixup or cfg.train_fraction < 1:
            raise UserError("--class_weights, --focal_gamma, --mixup and --train_fraction do not "
                            "go with --teacher")

    def loss_sum(self, logits, targets):
        """logits (B, C); targets (B, 1 + C) as examples.Taught makes them."""
        logits = at_least_float32(logits)
        T = self.temperature
        teacher = targets[:, 1:]
        exists = ~teacher[:, :1].isnan()
        teacher = teacher.where(exists, 0.0)
        divergence = F.kl_div((logits / T).log_softmax(1), (teacher / T).log_softmax(1),
                              reduction="none", log_target=True)
        soft = T**2 * (divergence * exists).sum()
        hard = super().loss_sum(logits, targets[:, 0].long())
        return (1 - self.weight) * hard + self.weight * soft


class ContrastiveTask(ClassTask):
    """One of several classes, of few labels. The cosine of the vectors of two texts is to be 1 if
    they are of one class, else 0, for all pairs in a batch (as in SetFit, Tunstall et al. 2022,
    which draws pairs instead); the head is a logistic regression on these vectors."""
    compares_examples = True

    def __init__(self, cfg, meta):
        super().__init__(cfg, meta)
        self.head |= {"normalize": True, "head_dense": None, "head_norm": False, "head_bias": True}

    @staticmethod
    def check_settings(cfg):
        if cfg.class_weights or cfg.focal_gamma or cfg.label_smoothing or cfg.mixup:
            raise UserError("--class_weights, --focal_gamma, --label_smoothing and --mixup are for "
                            "--objective=classify")
        if cfg.model != "transformer":
            raise UserError("--objective=contrastive is for --model=transformer")

    def batch_loss(self, model, inputs, targets):
        return self.loss_sum(model.vectors(*inputs), targets)

    def loss_sum(self, vectors, targets):
        """vectors (B, D); targets (B,) int64, IGNORE where there is none. Pairs of one class weigh
        as much, together, as pairs of two."""
        counts = targets >= 0
        vectors = F.normalize(vectors, dim=1)
        cosine = vectors @ vectors.T
        is_pair = (counts[:, None] & counts).fill_diagonal_(False)
        same = targets[:, None] == targets
        loss = (mean_where((cosine - 1).square(), is_pair & same)
                + mean_where(cosine.square(), is_pair & ~same))
        return loss / 2 * counts.sum()

    @torch.no_grad()
    def fit_head(self, model, vectors, labels):
        """Fit the head to vectors (N, D) of train and their classes (N,)."""
        x = F.normalize(vectors, dim=1).cpu().double()
        weight, bias = logistic_regression(x, labels, model.config.n_classes)
        model.head.weight.copy_(weight / model.config.d_model**0.5)  # its vectors have that length
        model.head.bias.copy_(bias)


def mean_where(x, mask):
    """The mean of x where mask is True; 0 where that is nowhere."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


@torch.enable_grad()
def logistic_regression(x, y, n_classes):
    """(weight (C, D), bias (C,)) that minimise the summed cross-entropy of x (N, D) float64 and
    classes y (N,), plus half the squared weights, as scikit-learn's default; by L-BFGS."""
    weight = torch.zeros(n_classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-6)

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y, reduction="sum")
        loss = loss + weight.square().sum() / 2
        loss.backward()
        return loss
    optimizer.step(loss)
    return weight.detach(), bias.detach()


def class_weights(cfg, per_class):
    """The weight of each class in the loss, (C,) float32, or None. per_class: train's counts."""
    if cfg.class_weights is None:
        return None
    count = torch.tensor(per_class, dtype=torch.float32)
    if cfg.class_weights == "balanced":
        return count.sum() / (len(count) * count.clamp(min=1))
    if not isinstance(cfg.class_weights, list) or len(cfg.class_weights) != len(count):
        raise UserError(f"--class_weights={cfg.class_weights!r} is neither 'balanced' nor a list "
                        f"of {len(count)} numbers")
    if min(cfg.class_weights) <= 0:
        raise UserError(f"--class_weights={cfg.class_weights}: each must be above 0; "
                        "--skip_labels leaves a class out")
    return torch.tensor(cfg.class_weights)


class LabelsTask(Task):
    """Any number of labels: binary cross-entropy, the mean over labels."""
    n_totals = 6
    figure_names = "val_loss", "val_accuracy", "val_micro_f1"  # accuracy is too coarse

    @staticmethod
    def check_settings(cfg):
        if cfg.class_weights or cfg.focal_gamma or cfg.label_smoothing:
            raise UserError("--class_weights, --focal_gamma and --label_smoothing are for "
                            "--target=class; of several labels, rare ones are helped by the "
                            "thresholds that eval.py fits on val. If a config sets one: "
                            "--class_weights=None --focal_gamma=0 --label_smoothing=0")

    def losses(self, logits, targets):
        """(B,) losses of logits (B, C) and multi-hot targets (B, C), IGNORE where there is none."""
        logits = at_least_float32(logits)
        truth = targets.clamp(min=0).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        return losses * (targets[:, 0] >= 0)

    def loss_sum(self, logits, targets):
        return self.losses(logits, targets).sum()

    def totals(self, logits, targets):
        logits = logits.cpu()
        predicted = logits >= 0
        true = targets == 1
        sums = (self.losses(logits.double(), targets), (predicted == true).all(1),
                predicted & true, predicted, true)
        return [x.sum().item() for x in sums] + [len(targets)]

    def figures(self, totals, examples):
        """accuracy: the share of examples with all labels right."""
        loss, correct, hits, predicted, true, n = totals
        micro_f1 = 2 * hits / max(predicted + true, 1)
        return {"val_loss": loss / n, "val_accuracy": correct / n, "val_micro_f1": micro_f1}


class NumberTask(Task):
    """A number: squared error of the standardised target, or Huber's loss (1964)."""
    n_totals = 4
    figure_names = "val_r2", "val_loss"

    def __init__(self, cfg, meta):
        self.head = {"n_classes": 1}
        self.huber_delta = cfg.huber_delta

    @staticmethod
    def check_settings(cfg):
        if cfg.class_weights or cfg.focal_gamma or cfg.label_smoothing or cfg.mixup:
            raise UserError("--class_weights, --focal_gamma, --label_smoothing and --mixup are for "
                            "classes, not for --target=number")

    def loss_sum(self, logits, targets):
        """logits (B, 1); targets (B,) float32, NaN where there is none."""
        error = (logits[:, 0] - targets).where(~targets.isnan(), 0.0)
        if not self.huber_delta:
            return error.square().sum()
        zero = torch.zeros_like(error)
        return 2 * F.huber_loss(error, zero, reduction="sum", delta=self.huber_delta)

    def totals(self, logits, targets):
        targets = targets.double()
        error = logits[:, 0].cpu().double() - targets
        sums = error.square(), targets, targets.square()
        return [x.sum().item() for x in sums] + [len(targets)]

    def figures(self, totals, examples):
        loss, total, squares, n = totals
        variance = max(squares / n - (total / n) ** 2, 1e-12)
        return {"val_loss": loss / n, "val_r2": 1 - loss / n / variance}


class LanguageTask(Task):
    """Tokens of text itself: those that are masked (mlm), or the next one (clm)."""
    figure_names = "val_token_accuracy", "val_loss"

    def __init__(self, cfg, meta):
        self.head = {"n_classes": 0, "lm_head": "own", "causal": cfg.objective == "clm"}
        self.objective, self.label_smoothing = cfg.objective, cfg.label_smoothing
        self.most_compiled = MOST_LOGITS

    def to(self, device):
        if device.type == "cuda":  # logits and their gradients in a sixteenth of its memory
            memory = torch.cuda.get_device_properties(device).total_memory
            self.most_compiled = max(MOST_LOGITS, memory // 64)

    @staticmethod
    def check_settings(cfg):
        if cfg.model != "transformer":
            raise UserError(f"--objective={cfg.objective} is for --model=transformer")
        if (cfg.mask_prob > 0) != (cfg.objective == "mlm"):
            needed = "above 0, as 0.3" if cfg.objective == "mlm" else "of 0"
            raise UserError(f"--objective={cfg.objective} needs a --mask_prob {needed}")
        if cfg.class_weights or cfg.focal_gamma:
            raise UserError("--class_weights and --focal_gamma are for --objective=classify")

    def example_settings(self, cfg, modality, training):
        return {"objective": self.objective, "mask_prob": cfg.mask_prob}

    def loss_sum(self, logits, targets):
        """logits (M, vocab_size); targets (M,) int64."""
        logits = at_least_float32(logits)
        return F.cross_entropy(logits, targets, reduction="none",
                               label_smoothing=self.label_smoothing).sum()

    def batch_loss(self, model, inputs, targets):
        """Logits of many tokens and a large vocabulary would take most of the memory, so a part of
        them is made at a time, and again for its gradient. torch.compile keeps them in bfloat16:
        there more are made at once."""
        x, weight = model(*inputs, with_head=False)
        n_words = len(weight)
        if x.is_cuda:  # whose matrix products are faster by far in sizes that 64 divides
            weight = F.pad(weight, (0, 0, 0, -n_words % 64))

        def loss(x, targets):
            return self.loss_sum(F.linear(x, weight)[:, :n_words], targets)
        most = self.most_compiled if torch.compiler.is_compiling() else MOST_LOGITS
        if n_words * len(targets) <= most:
            return loss(x, targets)
        n_rows = max(1, MOST_LOGITS // 4 // n_words)
        return sum(checkpoint(loss, *part, use_reentrant=False)
                   for part in zip(x.split(n_rows), targets.split(n_rows)))

    def totals(self, logits, targets):
        losses, correct = token_losses(logits, targets)
        return [losses.sum().item(), correct.sum().item(), len(losses)]

    def figures(self, totals, examples):
        loss, correct, n = totals
        figures = {"val_loss": loss / n, "val_token_accuracy": correct / n}
        if examples.n_bytes:
            figures["val_bits_per_byte"] = loss / math.log(2) / examples.n_bytes
        return figures


TASKS = {  # by --target, or by --objective
    "class": ClassTask, "labels": LabelsTask, "number": NumberTask,
    "contrastive": ContrastiveTask, "mlm": LanguageTask, "clm": LanguageTask,
}
FORMATS = {"val_loss": "val loss {:.4f}", "val_accuracy": "accuracy {:.2%}", "val_r2": "R² {:.4f}",
           "val_token_accuracy": "token accuracy {:.2%}", "val_bits_per_byte": "bits/byte {:.4f}",
           "val_micro_f1": "micro-F1 {:.4f}"}


def describe(figures):
    """Figures on val in words."""
    return "  ".join(FORMATS[k].format(v) for k, v in figures.items() if k in FORMATS)


# --------------------------------------------------------------------------------------------------
# Running a model


def open_device(name, local_rank=0):
    """The torch.device that a setting names; auto: the first of cuda, mps and cpu that is there.

    Raises UserError where it cannot be used."""
    device_type = name
    if name == "auto" and torch.cuda.is_available():
        device_type = "cuda"
    elif name == "auto":
        device_type = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device_type, local_rank if device_type == "cuda" else None)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if "Expected one of" in reason:  # torch names all that it has ever known
            reason = "there is no such device; usual ones are auto, cpu, cuda and mps"
        raise UserError(f"--device={name} cannot be used here: {reason}") from None
    return device


def bf16_is_native(device):
    """Does the device compute bfloat16 matrix products faster than float32 ones?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def eval_tokens(device, max_len):
    """Most tokens of a batch without gradients: on CPUs what their cache holds, one document at
    least."""
    return max(2048 if device.type == "cpu" else 16384, max_len)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def run_model(model, batch, device, dtype, mirror=False):
    """The logits of a model in eval mode on a Batch, float32, on its device. mirror: of images, the
    mean with those of their mirror images."""
    inputs = batch.to(device).inputs
    with autocast(device, dtype):
        logits = model(*inputs)
        if mirror:
            logits = (logits + model(inputs[0].flip(-1))) / 2
    return logits.float()


def token_losses(logits, targets):
    """Of logits (M, vocab_size), for each target that counts: (loss in nats, float64, whether it
    was the likeliest token), on the CPU."""
    counts = targets >= 0
    logits, targets = logits[counts.to(logits.device)], targets[counts].to(logits.device)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.cpu().double(), (logits.argmax(1) == targets).cpu()
