"""Work on a GPU, recorded as a CUDA graph and replayed.

The kernels of a small model are so short that a GPU waits for Python, which starts each by itself.
A graph starts all kernels of a pass at once.
"""
from configurator import UserError

import torch

from speed import peak_flops

MOST = 8  # sets of shapes that are recorded: each keeps its memory
WORTH_IT = 0.01  # seconds at the peak: longer passes hide the starting of kernels


def are_worth_it(cfg, machine, flops):
    """Should a compiled run record its steps? flops: the operations of a micro-batch."""
    possible = machine.device.type == "cuda" and machine.world == 1 and cfg.optimizer != "lbfgs"
    if not (cfg.cuda_graphs and possible):
        return False
    peak = peak_flops(torch.cuda.get_device_name(machine.device)) or 3e14
    return flops / peak < WORTH_IT


class Graphs:
    """A function whose calls are recorded: for each new set of shapes of its arguments the first
    call runs it (that compiles and allocates), the second records it, and all later ones replay
    that.

    Its arguments are tensors on the device, numbers (floats, which may change) and plain values
    (which are part of the shapes). It must do the same work whatever the values are, must not wait
    for the device, and what it changes (gradients, weights) must stay where it is. What it returns
    is overwritten by the next call.
    """

    def __init__(self, work):
        self.work, self.seen, self.recorded = work, set(), {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *arguments):
        shapes = tuple(map(shape_of, arguments))
        if shapes not in self.recorded:
            if shapes not in self.seen or len(self.recorded) == MOST:
                self.seen.add(shapes)
                return self.work(*arguments)
            self.recorded[shapes] = self.record(arguments)
        graph, held, result = self.recorded[shapes]
        for own, given in zip(held, arguments):
            if isinstance(given, torch.Tensor):
                own.copy_(given)
            elif isinstance(given, float):
                own.fill_(given)
        graph.replay()
        return result

    def record(self, arguments):
        """(the graph, the tensors that it reads its arguments from, what it returns). Raises
        UserError."""
        held = [hold(x) for x in arguments]
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, which load batches, may allocate meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = self.work(*held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError("a step cannot be recorded as a CUDA graph; does it read a value of a "
                            f"tensor, as .item() does? --cuda_graphs=False ({error})") from error
        return graph, held, result


def shape_of(x):
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype
    return float if isinstance(x, float) else x


def hold(x):
    if isinstance(x, torch.Tensor):
        return x.clone()
    return torch.tensor(x, device="cuda") if isinstance(x, float) else x
