"""Where a process stands among all, and what they tell each other.

They may run on several machines without a common disk: each machine builds or fetches its data, and
what rank 0 reads of a run's folder it tells the others.
"""
import contextlib
import os
import socket
import sys
import tempfile
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

from configurator import TIMEOUT, UserError, rank_and_world_size

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
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
        self.rank, self.world = rank_and_world_size()
        self.local_rank, self.n_here = 0, 1  # of so many processes on this machine
        if self.world > 1:
            self.local_rank = int(os.environ.get("LOCAL_RANK") or 0)
            self.n_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        self.sharded = cfg.parallel == "fsdp" and self.world > 1
        self.device = open_device(cfg.device, self.local_rank)
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.device)
        if self.device.type == "cpu":
            cpu.keep_freed_memory()
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.deterministic)
        self.dtype = computing_dtype(cfg, self.device)
        native = bf16_is_native(self.device)
        if on_cuda:
            exact = self.dtype == torch.float32
            if not exact and not native:
                raise UserError(f"--dtype=bfloat16: {torch.cuda.get_device_name()} does not "
                                "compute in it: leave --dtype out")
            # high: TF32, of what stays in float32 all the same
            torch.set_float32_matmul_precision("highest" if exact else "high")
        elif self.device.type == "cpu" and self.dtype == torch.bfloat16 and not native:
            self.print("--dtype=bfloat16: this processor has no instructions for it, which makes "
                       "it several times slower than float32")
        self.compile = cfg.compile
        if cfg.compile == "auto":  # packed texts have few shapes with the bfloat16 kernel only
            self.compile = (on_cuda and cfg.model == "transformer"
                            and self.dtype == torch.bfloat16)
        if self.compile and not on_cuda:
            # inductor adds up an embedding's gradient atomically: slowly, and in any order
            from torch._inductor import decomposition, lowering
            gradient = torch.ops.aten.embedding_dense_backward.default
            if decomposition.decompositions.pop(gradient, None):
                lowering.make_fallback(gradient, warn=False)  # or it is an error where $CI is set
        if self.world > 1:
            try:
                self.cpu_group = self.join()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"the processes do not find each other ({reason}); is what the "
                                "environment says of addresses and networks right (MASTER_ADDR, "
                                "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?") from error
            dtypes = sorted(set(self.gather(str(self.dtype))))
            if len(dtypes) > 1:
                self.refuse(f"--dtype=auto is {' or '.join(dtypes)}, by the processor, on the "
                            "machines of this run: give --dtype=float32 on all")
        self.launchers = self.gather(launcher())
        if self.sharded:
            self.mesh = dist.init_device_mesh(self.device.type, (self.world,))

    def join(self):
        """Join the process group. Returns another one, of gloo, for numbers that are on the CPU, so
        that no sum of them waits for the device."""
        where = {"store": fresh_store(), "rank": self.rank, "world_size": self.world}
        if self.device.type == "cuda":
            dist.init_process_group("nccl", device_id=self.device, timeout=TIMEOUT, **where)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT, **where)
        return dist.new_group(backend="gloo", timeout=TIMEOUT)

    def leave(self):
        if self.world > 1:
            dist.destroy_process_group()

    def print(self, *args):
        if self.rank == 0:
            print(*args, flush=True)

    def seed_step(self, seed, step):
        """Seed the generators: dropout is a function of (seed, step, rank)."""
        seed = seed * 1_000_003 + step * self.world + self.rank
        if self.device.type == "cpu":  # torch.manual_seed looks at other devices too: 0.5 ms
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def sum(self, values):
        """Add up each of a list of numbers over all processes."""
        if self.world == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.cpu_group)
        return total.tolist()

    def largest(self, value):
        """The largest of a whole number over all processes."""
        if self.world == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.cpu_group)
        return found.item()

    def evened(self, batches, empty_batch):
        """A list of batches, extended by empty ones to the length of the longest of all processes'
        lists: with sharded weights all have to compute together."""
        if not self.sharded:
            return batches
        most = self.largest(len(batches))
        return [*batches, *(empty_batch() for _ in range(most - len(batches)))]

    def one_first(self, work):
        """Run work() on rank 0 first, then on one process of each other machine, then on the rest,
        which find what it wrote."""
        if self.world == 1:
            return work()
        if self.rank == 0:
            own_turn = 0
        else:
            own_turn = 1 if self.local_rank == 0 else 2
        return self.take_turns(work, own_turn, 3)

    def in_turn(self, work):
        """Run work() on one process of each machine at a time, for what takes much memory."""
        n_turns = self.largest(self.n_here)
        return self.take_turns(work, self.local_rank, n_turns)

    def take_turns(self, work, own_turn, n_turns):
        for turn in range(n_turns):
            if turn == own_turn:
                result = work()
            dist.barrier(group=self.cpu_group)
        return result

    def on_rank0(self, work):
        """What work() returns on rank 0 (nested dicts and lists of tensors and plain types), on all
        processes. If it raises a UserError there, all end."""
        if self.world == 1:
            return work()
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except UserError as raised:
                error = raised
        tensors = []

        def take(x):  # tensors go by themselves: as objects they would be in memory three times
            if not isinstance(x, torch.Tensor):
                return x
            tensors.append(x)
            return Sent(len(tensors) - 1, x.shape, x.dtype)
        sent = [error is not None, tree_map(take, result)]
        dist.broadcast_object_list(sent, group=self.cpu_group)
        if sent[0]:
            if self.rank > 0:
                sys.exit(2)
            raise error

        def put(x):
            if not isinstance(x, Sent):
                return x
            if self.rank == 0:
                value = tensors[x.number].contiguous()
            else:
                value = torch.empty(x.shape, dtype=x.dtype)
            dist.broadcast(value, 0, group=self.cpu_group)
            return value
        return tree_map(put, sent[1])

    def gather(self, value):
        """The value, of plain types, of each process: a list."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        dist.all_gather_object(found, value, group=self.cpu_group)
        return found

    def refuse(self, message):
        """End all processes by a UserError that process 0 raises; all have to call it."""
        if self.rank > 0:
            sys.exit(2)
        raise UserError(message)

    def check_agreement(self, facts):
        """Raise UserError unless facts() is the same on all processes, a dict of plain values."""
        if self.world == 1:
            return
        found = self.gather(facts())
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other.get(name) != value:
                    self.refuse(f"process {rank} has another {name} than process 0 "
                                f"({other.get(name)!r}, not {value!r}): give all machines the same "
                                "code, command and data")

    def sees(self, folder):
        """Do all processes see the folder that rank 0 sees? It leaves a new file there for a
        moment: another disk may hold older files of the same names."""
        def leave():
            try:
                descriptor, path = tempfile.mkstemp(prefix=".seen-", dir=folder)
            except OSError:
                return None
            os.close(descriptor)
            return os.path.basename(path)
        name = self.on_rank0(leave)
        path = Path(folder) / (name or ".seen")
        seen = all(self.gather(path.exists()))
        if self.rank == 0:
            path.unlink(missing_ok=True)
        return seen


def launcher():
    """What tells the torchrun that started this process from all others; None without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    began, parent = None, os.getppid()
    if os.path.exists(f"/proc/{parent}/stat"):  # process numbers are used again
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {parent} {began}"


def fresh_store():
    """The store in which processes find each other, without what an earlier attempt left there.

    torchrun keeps one store for all its restarts (torch 2.13), so that gloo could read the address
    of a process that is gone. Here rank 0 tells all who ask, by an id of their own, a prefix for
    this attempt's keys."""
    store, rank, world = next(rendezvous("env://"))
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks {rank}", own)
        prefix = store.get(own).decode()  # waits for it
        store.add(f"{prefix} told", 1)
        return dist.PrefixStore(prefix, store)
    while store.add(f"{own} told", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"asks {other}"]):  # perhaps of an earlier attempt: then none listens
                store.set(store.get(f"asks {other}").decode(), own)
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


@dataclass
class Sent:
    """A tensor's place in what on_rank0 sends."""
    number: int
    shape: torch.Size
    dtype: torch.dtype


def average_gradients(module):
    """The module in DistributedDataParallel: backward averages gradients over processes."""
    with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, which 2.11 needs
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.parallel.DistributedDataParallel(
            module, gradient_as_bucket_view=True, broadcast_buffers=False)


def gradient_sync(model_with_loss, on):
    """A context for one micro-batch. on (for the last one): backward averages gradients over
    processes; off: it only adds to this process's own."""
    if hasattr(model_with_loss, "no_sync"):
        return contextlib.nullcontext() if on else model_with_loss.no_sync()
    if hasattr(model_with_loss.model, "set_requires_gradient_sync"):
        model_with_loss.model.set_requires_gradient_sync(on)
    return contextlib.nullcontext()
