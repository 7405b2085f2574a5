"""A model whose weights are spread over processes (--parallel=fsdp), and its checkpoints.

Each process holds a part of each weight, its gradient and its optimizer state. A block's weights
are gathered when it computes, and freed after (FSDP2's fully_shard).

last.pt then holds everything but the tensors that are spread. These lie beside it, in a folder
last-STEP that torch.distributed.checkpoint writes while training goes on, each process its part, as
safetensors (DCP's own format is unpickled on reading, which could run a stranger's code). last.pt
is written when the folder is whole, and names it. It can be read by any number of processes, also
without FSDP. Where the processes have no common disk, last.pt holds all, gathered on rank 0.
"""
import os
import shutil
import warnings
from pathlib import Path

from configurator import TIMEOUT, UserError

import torch
import torch.distributed as dist
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_map,
    tree_map_with_path,
)


def shard(model, machine):
    """Spread a Transformer's weights over all processes, in place: each block is gathered by
    itself, in the dtype that it is computed in; embedding and head together. Gradients are added up
    in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(machine.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=machine.mesh, mp_policy=policy)
    fully_shard(model, mesh=machine.mesh)


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


def all_parameters(optimizer):
    """In the order in which its state dict numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameters_of_states(optimizer, saved):
    """An optimizer's saved state dict with each value replaced by the parameter that it is of."""
    parameters = all_parameters(optimizer)
    return {"state": {i: dict.fromkeys(values, parameters[i])
                      for i, values in saved["state"].items()}}


def shard_state(optimizer, state):
    """A saved state dict of whole tensors for this optimizer: spread as its parameters are, with
    its own way to make a step (fused or not), which depends on the device and on --parallel."""
    parameters = all_parameters(optimizer)
    spread = {}
    for i, values in state["state"].items():
        p = parameters[i]
        spread[i] = {
            key: shard_like(x, p) if isinstance(x, torch.Tensor) and x.shape == p.shape else x
            for key, x in values.items()}
    groups = [group | {name: own[name] for name in ("fused", "foreach") if name in own}
              for group, own in zip(state["param_groups"], optimizer.param_groups)]
    return state | {"state": spread, "param_groups": groups}


def whole(tree, machine):
    """Nested dicts and lists with their sharded tensors gathered on rank 0, and None in their place
    on the others. All processes have to call it."""
    def gather(x):
        if not is_sharded(x):
            return x
        x = x.full_tensor()
        return x.cpu() if machine.rank == 0 else None
    return tree_map(gather, tree)


# --------------------------------------------------------------------------------------------------
# Checkpoints in parts


def split_off(tree):
    """Take the sharded tensors out of nested dicts and lists: ({place: tensor}, a copy of the rest
    with an empty tensor at each of these places)."""
    tensors = {}

    def take(path, x):
        if not is_sharded(x):
            return x.clone() if isinstance(x, torch.Tensor) else x
        tensors[keystr(path)] = x.detach()
        return torch.empty(0, dtype=x.dtype)
    return tensors, tree_map_with_path(take, tree)


class ShardedSaver:
    """Writes last.pt with its folder of parts, while training goes on. All processes have to call
    save and wait; write(checkpoint) writes last.pt itself."""

    def __init__(self, out_dir, machine, write):
        self.out, self.machine, self.write = Path(out_dir), machine, write
        # its own, as another thread uses it
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.future = self.folder = self.checkpoint = None

    def save(self, checkpoint):
        """Begin to write a checkpoint, a dict."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save
        self.wait()
        folder = self.out / f"last-{checkpoint['step']}"
        if folder == self.folder:  # written at this step already, and last.pt names it
            return
        tensors, rest = split_off(checkpoint)
        if self.machine.device.type == "cpu":  # else they are copied there anyway
            tensors = {place: x.clone() for place, x in tensors.items()}
        self.folder = folder
        self.checkpoint = rest | {"shards": {
            "folder": self.folder.name,
            "tensors": {place: list(x.shape) for place, x in tensors.items()}}}
        if self.machine.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        dist.barrier(group=self.group)
        writer = HuggingFaceStorageWriter(str(self.folder), save_distributed=True)
        self.future = async_save(tensors, storage_writer=writer, process_group=self.group)

    def poll(self):
        """Write last.pt if the parts are written. Raises UserError where they cannot be."""
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
        if self.future is None or not self.future.done():
            return
        future, self.future = self.future, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:
            raise UserError(f"{self.folder} cannot be written ({reason_of(error)}): make room "
                            f"there, or choose another --out_dir; {self.out} is as its last "
                            "checkpoint left it") from None
        if self.machine.rank == 0:
            files = {file.name: file.stat().st_size for file in self.folder.iterdir()}
            self.checkpoint["shards"]["files"] = files
            self.write(self.checkpoint)
            remove_parts(self.out, but=self.folder.name)

    def wait(self):
        """Until what was begun is written."""
        if self.future is not None:
            self.future.exception()
            self.poll()


def reason_of(error):
    """What went wrong on the first of the processes that failed, in a line."""
    for first, _ in getattr(error, "failures", {}).values():
        error = first
        break
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def remove_parts(out, but=None):
    """Remove a run's folders of parts, except one."""
    for folder in Path(out).glob("last-*"):
        if folder.is_dir() and folder.name != but and folder.name[5:].isdigit():
            shutil.rmtree(folder, ignore_errors=True)


def read_parts(checkpoint, out, like=None):
    """Fill in a checkpoint's tensors that lie in parts; returns it. like: nested dicts and lists in
    which the tensor at the same place is spread as is wanted; None: whole. Raises UserError."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException
    shards = checkpoint["shards"]
    folder = Path(out) / Path(shards["folder"]).name
    for name, size in shards["files"].items():
        if not (folder / name).is_file() or os.path.getsize(folder / name) != size:
            raise UserError(f"{folder / name} is missing or truncated: try again if a run is "
                            "writing there, else restore it, or train again with --overwrite=True")
    wanted = {}
    try:
        for path, x in tree_flatten_with_path(checkpoint)[0]:
            if (shape := shards["tensors"].get(keystr(path))) is not None:
                wanted[keystr(path)] = torch.empty(shape, dtype=x.dtype)
        for path, p in tree_flatten_with_path(like)[0]:
            if keystr(path) in wanted:
                wanted[keystr(path)] = torch.empty_like(p, dtype=wanted[keystr(path)].dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # no_dist: each process reads what it needs, and waits for no other
            load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (Exception, CheckpointException) as error:  # damaged files raise many types
        raise UserError(f"{folder}: cannot be read ({reason_of(error)}): restore it, or train "
                        "again with --overwrite=True") from None
    return tree_map_with_path(lambda path, x: wanted.get(keystr(path), x), checkpoint)
