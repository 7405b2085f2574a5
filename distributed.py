"""Where a process stands among all, and how a model is spread over them.

--parallel=ddp: each process holds the model, gradients are averaged (DistributedDataParallel).
--parallel=fsdp: each process holds a part of each weight, its gradient and its optimizer state; a
block's weights are gathered when it computes, and freed after (FSDP2's fully_shard). What is saved
is the same for both, so that a run can go on with other processes than it began with.
"""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

import cpu
from tasks import bf16_is_native, open_device


def computing_dtype(cfg, device):
    """Of matrix products; weights that learn are in float32 all the same."""
    native = bf16_is_native(device) and cfg.optimizer != "lbfgs"  # which needs the exact loss
    if cfg.dtype == "bfloat16" or cfg.dtype == "auto" and native:
        return torch.bfloat16
    return torch.float32


class Machine:
    """Where this process stands: its rank of `world` processes, device, dtype. Joins the process
    group under torchrun."""

    def __init__(self, cfg):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.sharded = cfg.parallel == "fsdp" and self.world > 1
        self.device = open_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.device)
        if self.device.type == "cpu":
            cpu.keep_freed_memory()
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.dtype = computing_dtype(cfg, self.device)
        if on_cuda and self.dtype == torch.bfloat16:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        self.compile = cfg.compile
        if cfg.compile == "auto":
            self.compile = on_cuda and cfg.model == "transformer"
        if self.compile and not on_cuda:
            # inductor adds up an embedding's gradient atomically: slowly, and in any order
            from torch._inductor.decomposition import decompositions
            decompositions.pop(torch.ops.aten.embedding_dense_backward.default, None)
        if self.world > 1:
            # the others wait while rank 0 builds the data set
            patience = datetime.timedelta(hours=2)
            dist.init_process_group("nccl" if on_cuda else "gloo", timeout=patience,
                                    device_id=self.device if on_cuda else None)

    def leave(self):
        if self.world > 1:
            dist.destroy_process_group()

    def print(self, *args):
        if self.rank == 0:
            print(*args, flush=True)

    def seed(self, seed):
        if self.device.type == "cpu":  # torch.manual_seed looks at other devices too: 0.5 ms
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def sum(self, values):
        """Add up each of a list of numbers over all processes."""
        if self.world == 1:
            return [float(value) for value in values]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def smallest(self, value):
        """The smallest of a whole number over all processes."""
        if self.world == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return found.item()

    def evened(self, batches, empty_batch):
        """A list of batches, filled up with empty ones to as many as the process with most has:
        with sharded weights all have to compute together."""
        if not self.sharded:
            return batches
        most = -self.smallest(-len(batches))
        return [*batches, *(empty_batch() for _ in range(most - len(batches)))]

    def rank0_first(self, work):
        """Run work() on rank 0 first; the others wait, then run it and find what it wrote."""
        if self.world > 1 and self.rank > 0:
            dist.barrier()
        result = work()
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        return result


# --------------------------------------------------------------------------------------------------
# A model over processes


def shard(model, machine):
    """Spread a Transformer's weights over all processes, in place: each block is gathered by
    itself, embedding and head together."""
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(machine.device.type, (machine.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(x):
    return hasattr(x, "full_tensor")  # a DTensor, whose module takes long to import


def is_finite(p):
    """Are all values of a parameter finite? If it is sharded, all processes have to ask."""
    finite = p.isfinite().all()
    return bool(finite.full_tensor() if is_sharded(finite) else finite)


def shard_like(x, p):
    """This process's part of a whole tensor, as parameter p is spread."""
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.detach().to(p.device), p.device_mesh, p.placements,
                             src_data_rank=None)


def shard_state(optimizer, state):
    """An optimizer's state dict of whole tensors, as its parameters are spread."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {}
    for i, values in state["state"].items():
        p = parameters[i]
        spread[i] = {
            key: shard_like(x, p) if isinstance(x, torch.Tensor) and x.shape == p.shape else x
            for key, x in values.items()}
    return state | {"state": spread}


def whole(tree, machine):
    """Nested dicts and lists with their sharded tensors gathered on rank 0, and None in their place
    on the others. All processes have to call it."""
    def gather(x):
        if not is_sharded(x):
            return x
        x = x.full_tensor()
        return x.cpu() if machine.rank == 0 else None
    return tree_map(gather, tree)


def gradient_sync(model_with_loss, on):
    """A context for forward and backward: on: backward averages gradients over processes; off: it
    adds to this process's own."""
    if hasattr(model_with_loss, "no_sync"):
        return contextlib.nullcontext() if on else model_with_loss.no_sync()
    if hasattr(model_with_loss.model, "set_requires_gradient_sync"):
        model_with_loss.model.set_requires_gradient_sync(on)
    return contextlib.nullcontext()
