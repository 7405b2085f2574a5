"""Optimizers, parameter groups, clipping, schedules, weight averaging.

A new optimizer is an entry in `make`, a new schedule one in `learning_rate_at`; each also gets its
name in settings.Config.
"""
import math

from configurator import UserError

import torch

from model import qkv_rows
from sharding import all_parameters, is_sharded, shard_like

# Weights above which an embedding has sparse gradients on CPUs: a dense one would take longer to
# make than the rows that a batch reads.
LARGE_EMBEDDING = 2**20


def make_optimizers(model, cfg, device, lr_scale=None, dtype=torch.float32):
    """The optimizers of cfg.optimizer. Each trainable parameter is in exactly one of their groups.

    lr_scale(name, model, cfg): what a parameter's learning rate is multiplied by; None: 1. dtype:
    of Muon's products. Weight decay is for matrices; with adamw and muon not for text embeddings.
    """
    if cfg.optimizer == "lbfgs":  # searches for its rate; step_lbfgs adds the decay to the loss
        return [torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-9)]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    embedding = getattr(model, "embedding", None)
    if not isinstance(embedding, torch.nn.Embedding) or not embedding.weight.requires_grad:
        embedding = None
    if embedding is not None:
        embedding.sparse = uses_sparse_gradients(model, embedding.weight, cfg, device)
    grouped = {}  # optimizer → group's settings → parameters
    for name, p in parameters.items():
        is_embedding = embedding is not None and p is embedding.weight
        optimizer = cfg.optimizer
        if optimizer == "muon":
            optimizer = "muon" if is_hidden_matrix(name, p) else "adamw"
        if optimizer == "adamw" and is_embedding and embedding.sparse:
            optimizer = "sparse"
        decay = cfg.weight_decay if p.ndim >= 2 else 0.0
        if is_embedding and optimizer not in ("adagrad", "sgd"):
            decay = 0.0
        rows = ()
        if cfg.optimizer == "muon" and name.endswith("qkv.weight"):
            rows = qkv_rows(model.config)
        scale = lr_scale(name, model, cfg) if lr_scale else 1.0
        grouped.setdefault(optimizer, {}).setdefault((scale, decay, rows), []).append(p)
    lr = cfg.learning_rate or 1.0  # each step sets it; SparseAdam refuses 0
    betas = (cfg.beta1, cfg.beta2)
    fused = embedding is None or not embedding.sparse
    sharded = any(map(is_sharded, parameters.values()))  # SGD has no fused step of these
    make = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr, betas, fused=True),
        # beta1 = 0: with 0.9 a row that is read once would move by a tenth of its step
        "sparse": lambda groups: torch.optim.SparseAdam(groups, lr, (0.0, cfg.beta2)),
        "muon": lambda groups: Muon(groups, lr, dtype=dtype),
        "adagrad": lambda groups: Adagrad(groups, lr),
        "sgd": lambda groups: torch.optim.SGD(groups, lr, cfg.beta1, nesterov=cfg.beta1 > 0,
                                              fused=fused and not sharded)}
    optimizers = []
    for name, by_settings in grouped.items():
        groups = []
        for (scale, decay, rows), group in by_settings.items():
            groups.append({"params": group, "lr_scale": scale})
            if name != "sparse":
                groups[-1]["weight_decay"] = decay
            if name == "muon":
                groups[-1]["rows"] = rows
        optimizers.append(make[name](groups))
    in_groups = [id(p) for optimizer in optimizers for p in all_parameters(optimizer)]
    assert sorted(in_groups) == sorted(map(id, parameters.values()))
    return optimizers


def is_hidden_matrix(name, p):
    """Is it a matrix of the blocks (MLP: of the layers)?"""
    return p.ndim == 2 and name.startswith(("blocks", "layers"))


def uses_sparse_gradients(model, weight, cfg, device):
    """Are only the rows of a text embedding updated that a batch reads?

    Updating AdamW's moments of all rows would take a sixth of a fine-tuning step. SparseAdam
    updates the rows that are read, without momentum: a row moves its whole way in the step that
    reads it, where AdamW would spread that over later steps (NOTES.md).
    """
    large = weight.numel() > LARGE_EMBEDDING and model.config.lm_head != "tied"
    if device.type != "cpu" or not large or is_sharded(weight):
        return False
    if cfg.optimizer in ("adamw", "muon"):
        return True
    without_momentum = cfg.optimizer == "adagrad" or cfg.optimizer == "sgd" and not cfg.beta1
    return without_momentum and not cfg.weight_decay


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made nearly orthogonal, so that a matrix moves as far in each
    direction (Jordan et al. 2024). Scaled by 0.2·√(longer side) an update is as large as AdamW's,
    so that one learning rate serves both (Liu et al. 2025).

    As torch.optim.Muon, but matrices of one shape go through together, and attention's stacked
    queries, keys and values are three matrices, of `rows` rows each (none: the parameter is one).
    dtype: of the Newton-Schulz steps; bfloat16 is enough, and takes a third of the time where it is
    native.
    """

    def __init__(self, groups, lr, momentum=0.95, dtype=torch.float32):
        defaults = {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "rows": ()}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            together = {}  # of sharded parameters, which are gathered, only those of one shape
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                together.setdefault(p.shape if is_sharded(p) else None, []).append(p)
            for parameters in together.values():
                self.step_matrices(parameters, group)

    def step_matrices(self, parameters, group):
        same_shape = {}  # → the directions of the steps of matrices, to be made orthogonal
        directions = []  # of each parameter
        for p in parameters:
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            nesterov = p.grad.lerp(momentum, group["momentum"])
            if is_sharded(nesterov):
                nesterov = nesterov.full_tensor()
            directions.append(nesterov)
            for matrix in nesterov.split(list(group["rows"]) or [len(p)]):
                same_shape.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in same_shape.items():
            updates = orthogonal(torch.stack(matrices).to(self.dtype))
            for matrix, update in zip(matrices, updates):
                matrix.copy_(update).mul_(0.2 * max(shape) ** 0.5)
        for p, direction in zip(parameters, directions):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(shard_like(direction.mul_(group["lr"]), p))


def orthogonal(x):
    """Roughly the nearest (semi-)orthogonal matrix of each of x (N, a, b), by five Newton-Schulz
    steps: singular values come to 0.7 … 1.2."""
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, polynomial, y, beta=3.4445)
    return y.mT if tall else y


class Adagrad(torch.optim.Optimizer):
    """Each weight's step is divided by the root of the sum of its squared gradients so far (Duchi
    et al. 2011). As torch.optim.Adagrad, but a sparse gradient (coalesced) takes a fifth of its
    time. weight_decay is ridge's, for dense gradients."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["sum"] = torch.zeros_like(p)
                update = self.update_rows if p.grad.is_sparse else self.update
                update(p, self.state[p]["sum"], group["lr"], group["weight_decay"])

    def update(self, p, total, lr, weight_decay):
        grad = p.grad.add(p, alpha=weight_decay)
        total.addcmul_(grad, grad)
        p.sub_(grad.mul_(lr).div_(total.sqrt().add_(1e-10)))

    def update_rows(self, p, total, lr, weight_decay):
        rows = p.grad.indices()[0]
        grad = p.grad.values()
        row_total = total.index_select(0, rows).addcmul_(grad, grad)
        total.index_copy_(0, rows, row_total)
        moved = p.index_select(0, rows)
        moved.addcdiv_(grad, row_total.sqrt_().add_(1e-10), value=-lr)
        p.index_copy_(0, rows, moved)


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def clip_gradients(optimizers, limit):
    """Return the norm of the whole gradient; above `limit` (0: never) scale it down to that (fused
    optimizers are given grad_scale, by which their step divides)."""
    parameters = [p for optimizer in optimizers for p in parameters_of(optimizer)]
    for p in parameters:
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    norm = torch.nn.utils.get_total_norm([dense_part(p.grad) for p in parameters])
    sharded = is_sharded(norm)
    if sharded:
        norm = norm.full_tensor()
    if not limit:
        return norm
    scale = (norm / limit).clamp(min=1)
    for optimizer in optimizers:
        if optimizer.defaults.get("fused") and not sharded:
            optimizer.grad_scale = scale  # the fused step divides by it
        else:
            for p in parameters_of(optimizer):
                dense_part(p.grad).div_(scale)
    return norm


class FiniteGradients:
    """Raises a UserError after a gradient that is not finite. On CUDA only at the next `check`,
    before anything is logged or saved, so that no step waits for the device."""

    def __init__(self, cfg):
        self.cfg, self.finite, self.steps = cfg, None, []  # since the last check

    def add(self, norm, step, waits):
        finite = norm.isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        self.steps.append(step)
        if waits:
            self.check()

    def check(self):
        finite, steps = self.finite, self.steps
        self.finite, self.steps = None, []
        if finite is None or finite:
            return
        where = f"step {steps[0]}" if len(steps) == 1 else f"one of steps {steps[0]} to {steps[-1]}"
        advice = (f"lower --learning_rate={self.cfg.learning_rate}, raise --warmup_steps, or try "
                  "--dtype=float32")
        if steps == [0]:  # the rate has not mattered yet
            advice = "try --dtype=float32; are the data, and weights of --init_from, in order?"
        raise UserError(f"the gradient of {where} is not finite: {advice}; {self.cfg.out_dir} is "
                        "as its last checkpoint left it")


def parameters_of(optimizer):
    """Those that have a gradient."""
    return [p for p in all_parameters(optimizer) if p.grad is not None]


def dense_part(grad):
    return grad.values() if grad.is_sparse else grad


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=not getattr(optimizer, "keeps_gradients", False))


def clip_and_step(optimizers, limit, lr):
    """Clip the gradients and make a step; returns their norm. lr: a number, or a tensor."""
    set_learning_rate(optimizers, lr)
    norm = clip_gradients(optimizers, limit)
    step_all(optimizers)
    return norm


def can_be_recorded(optimizers):
    """Do their steps the same work each time, with all that changes in tensors?"""
    return all("capturable" in optimizer.defaults
               or isinstance(optimizer, (Muon, Adagrad, torch.optim.SGD))
               for optimizer in optimizers)


def prepare(optimizers, recorded):
    """Tell optimizers before their first step whether steps are recorded as CUDA graphs. Then
    gradients are set to zero in place instead of freed, and step counters are on the device."""
    for optimizer in optimizers:
        optimizer.keeps_gradients = recorded
        optimizer._warned_capturable_if_run_uncaptured = True  # the first step is not
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = recorded


def step_lbfgs(optimizer, compute_gradient, weight_decay):
    """One step of L-BFGS on a loss plus weight_decay / 2 · |W|², in up to 20 evaluations.

    compute_gradient() adds the loss's gradient and returns (loss, …). Returns what it returned at
    first, at the weights before the step.
    """
    results = []

    def closure():
        optimizer.zero_grad()
        results.append(compute_gradient())
        loss = results[-1][0]
        if not weight_decay:
            return loss
        matrices = [p for p in parameters_of(optimizer) if p.ndim >= 2]
        penalty = sum(weight_decay / 2 * p.square().sum() for p in matrices)
        penalty.backward()
        return loss + penalty
    optimizer.step(closure)
    return results[0]


def warmup_steps(cfg, total_steps):
    """Steps of warm-up: cfg.warmup_steps, or a tenth of all, at most 50."""
    return min(50, total_steps // 10) if cfg.warmup_steps is None else cfg.warmup_steps


def learning_rate_at(cfg, step, total_steps):
    """The rate of step 0 ≤ step < total_steps: a linear warm-up to cfg.learning_rate, then
    cfg.schedule down to cfg.min_lr."""
    warmup = warmup_steps(cfg, total_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1)
    x = (step - warmup) / max(1, total_steps - warmup)  # 0 → 1
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * x)),
             "linear": 1 - x,
             "constant": 1.0,
             "trapezoid": min(1.0, (1 - x) / max(cfg.cooldown, 1e-9))}[cfg.schedule]
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * share


class EMA:
    """An exponential moving average of the trainable weights, faster at the beginning; does nothing
    at decay 0."""

    def __init__(self, model, decay):
        self.decay, self.weights = decay, []
        if decay:
            self.weights = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self, step):
        if self.weights:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, self.weights, 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchange the average and the model's weights; the second call undoes it."""
        for p, value in zip(self.weights, self.values):
            kept = p.clone()
            p.copy_(value)
            value.copy_(kept)
