"""How much memory a run needs, before it needs it.

    python train.py config/textcls.py --dry_run=True
    python train.py config/textcls.py --micro_batch_tokens=auto

A training step runs on tensors without values (PyTorch's FakeTensorMode), and those that are alive
at its peak are added up. An allocator that keeps freed memory takes more: on Linux' CPUs a process
takes up to 1.8 times this sum; with MALLOC_MMAP_THRESHOLD_=1000000 in the environment it takes
nearly the sum itself, and is a little slower.
"""
import contextlib
import math
import os
import weakref
from pathlib import Path

from configurator import UserError

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim
from examples import ceil_div
from huggingface import SkipInit
from tasks import autocast


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within, while they are alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if (isinstance(x, torch.Tensor) and x.layout == torch.strided
                    and x.device.type != "meta"):  # which takes nothing
                self.add(x.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        self.alive.remove(key)
        self.now -= size


def measure_step(cfg, make_model, model_with_loss, train_set, machine, lr_scale, n_tokens):
    """What a training step takes at its peak, with micro-batches of up to n_tokens tokens in
    documents of the length of train's longest: {"tokens": of a micro-batch, and in bytes "weights",
    "gradients", "optimizer", "activations" and what else is alive then, "all" of these}. With
    --parallel=fsdp it is an estimate, not measured: a process's share of the first three, and what
    is gathered at once.

    make_model() → the model; model_with_loss(model) → the module that computes its loss.
    """
    if cfg.optimizer == "lbfgs" or cfg.objective == "contrastive" or cfg.model != "transformer":
        raise UserError("--dry_run and --micro_batch_tokens=auto are for transformers, and not for "
                        "--optimizer=lbfgs or --objective=contrastive")
    own_share = ceil_div(cfg.batch_size, machine.world)
    n_examples, batch = longest_batch(train_set, n_tokens, own_share, machine.device)
    n_micro_batches = 2 if n_examples < own_share else 1
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, PeakMemory() as memory:
        batch = without_values(batch, mode).to(machine.device)
        with SkipInit(), machine.device:
            model = make_model()
        optimizers = optim.make_optimizers(model, cfg, machine.device, lr_scale, machine.dtype)
        sparse = freeze_sparse_embedding(model, batch)
        average = optim.EMA(model, cfg.ema_decay)
        module = model_with_loss(model)
        for step in range(2):  # the second one has the optimizer's state
            for _ in range(n_micro_batches):
                with autocast(machine.device, machine.dtype):
                    loss = module(batch.inputs, batch.targets)
                loss.backward()
                del loss
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found = {"weights": n_bytes(model.parameters()), "gradients": n_bytes(gradients)}
            del gradients
            optim.clip_gradients(optimizers, cfg.grad_clip)
            optim.step_all(optimizers)
            average.update(step)
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        found["optimizer"] = n_bytes(x for x in tree_leaves(states) if isinstance(x, torch.Tensor))
        found = {name: size + sparse.get(name, 0) for name, size in found.items()}
        total = memory.peak + sum(sparse.values())
        if machine.sharded:
            blocks = [n_bytes(block.parameters()) for block in model.blocks]
            root = found["weights"] - sum(blocks)
            gathered = 2 * (root + 2 * max(blocks, default=0))  # with their gradients
            spread = {name: size // machine.world for name, size in found.items()}
            total += gathered + sum(spread.values()) - sum(found.values())
            found = spread
    found["activations"] = total - sum(found.values())
    return found | {"all": total, "tokens": n_examples * int(train_set.lengths.max())}


def n_bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def freeze_sparse_embedding(model, batch):
    """How large an embedding's sparse gradient is depends on values, which there are none of here.
    So such an embedding is frozen; returned are the bytes of its gradient and its moments."""
    embedding = getattr(model, "embedding", None)
    if not getattr(embedding, "sparse", False):
        return {}
    weight = embedding.weight.requires_grad_(False)
    rows = 2 * batch.n_tokens * weight.shape[1] * weight.element_size()  # as made, and coalesced
    return {"gradients": rows, "optimizer": 2 * weight.numel() * weight.element_size()}


def longest_batch(train_set, n_tokens, batch_size, device):
    """(n, a Batch of n copies of the longest example): what a micro-batch of n_tokens tokens holds
    at the most. Off CPUs it is not packed, as attention would need the values of cu_seqlens."""
    longest = int(np.argmax(train_set.lengths))
    length = int(train_set.lengths[longest])
    n = max(1, min(n_tokens // length, batch_size))
    batch = train_set.batch(0, np.full(n, longest))
    if is_packed(batch) and device.type != "cpu":
        tokens, _, _, *more = batch.inputs + (None,) * (3 - len(batch.inputs))
        batch = batch._replace(inputs=(tokens, None, length, *more[:1]))
    return n, batch


def is_packed(batch):
    return len(batch.inputs) > 1 and isinstance(batch.inputs[1], torch.Tensor)


def without_values(batch, mode):
    """The batch, its tensors without their values."""
    def fake(x):
        return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
    inputs = [fake(x) for x in batch.inputs]
    if is_packed(batch):  # attention on CPUs groups documents by the values of cu_seqlens
        bounds = batch.inputs[1].tolist()
        inputs[1].tolist = lambda: bounds
    return batch._replace(inputs=tuple(inputs), targets=fake(batch.targets))


def describe(found):
    """In words."""
    parts = ", ".join(f"{name} {in_words(found[name])}"
                      for name in ("weights", "gradients", "optimizer", "activations"))
    return (f"a step with micro-batches of up to {found['tokens']:,} tokens takes "
            f"{in_words(found['all'])}: {parts}")


def in_words(size):
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def fitting_tokens(measure, device, max_len, batch_size, share):
    """The largest micro_batch_tokens, a multiple of max_len, with which a step takes at most this
    share of the free memory; measure(n_tokens) → measure_step's. Raises UserError."""
    free = free_memory(device)
    if free is None:
        raise UserError("--micro_batch_tokens=auto: this machine does not say how much memory is "
                        "free; give a number, as 16384")
    one, two = (measure(n)["all"] for n in (max_len, 2 * max_len))
    if one > share * free:
        raise UserError(f"--micro_batch_tokens=auto: an example of {max_len} tokens alone takes "
                        f"{in_words(one)}, {in_words(share * free)} are free: a smaller model or "
                        "--max_len, --lora_rank=8, or --checkpoint_activations=True")
    per_example = max(two - one, 1)
    n = min(batch_size, 1 + int((share * free - one) / per_example))
    while n > 1 and measure(n * max_len)["all"] > share * free:  # where it is not linear
        n = n * 3 // 4
    return n * max_len


def free_memory(device):
    """Bytes, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return min(int(lines["MemAvailable"].split()[0]) * 1024, free_in_group())
    return None


def free_in_group(root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """Bytes that this process's control group, of a container or a Slurm job, leaves it, and the
    groups above; infinity without a limit. What only caches files is free."""
    free = math.inf
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit: "max"
                most = int((folder / limit).read_text())
                taken = int((folder / used).read_text())
                rows = (folder / "memory.stat").read_text().splitlines()
                stat = dict(row.split() for row in rows)
                free = min(free, most - taken + int(stat.get(cached, 0)))
    return free


def choose_micro_batch(cfg, measure, machine, max_len, checkpoint):
    """cfg.micro_batch_tokens as a number: of an interrupted run the one that it began with."""
    if cfg.micro_batch_tokens != "auto":
        return cfg.micro_batch_tokens
    if checkpoint and type(checkpoint.get("micro_batch_tokens")) is int:
        return checkpoint["micro_batch_tokens"]
    share = 0.85
    if machine.device.type == "cpu":  # whose allocator takes up to 1.8 times what tensors do
        share = 0.5 / machine.n_here
    found = fitting_tokens(measure, machine.device, max_len, cfg.batch_size, share)
    found = min(machine.gather(found))
    machine.print(f"--micro_batch_tokens=auto: {found}")
    return found
