"""Work on a GPU, recorded as a CUDA graph and replayed.

The kernels of a small model are so short that a GPU waits for Python, which starts each by itself.
A graph starts all kernels of a pass at once.
"""
from configurator import UserError

import torch

from speed import peak_flops

MOST_RECORDED = 8  # sets of shapes
LONGEST_PASS = 0.01  # seconds at the card's peak; longer ones hide the starting of kernels
USUAL_PEAK = 3e14  # operations per second, of a card that is not known


def are_worth_it(cfg, machine, flops):
    """Should a compiled run record its steps? flops: the operations of a micro-batch."""
    possible = machine.device.type == "cuda" and machine.world == 1 and cfg.optimizer != "lbfgs"
    # others wait for values: a linear model for its features, float32 for how long texts are
    possible &= cfg.model == "transformer" and machine.dtype == torch.bfloat16
    # recorded passes keep their memory, which auto would give away
    if not cfg.cuda_graphs or not possible or cfg.micro_batch_tokens == "auto":
        return False
    peak = peak_flops(torch.cuda.get_device_name(machine.device)) or USUAL_PEAK
    return flops / peak < LONGEST_PASS


class Graphs:
    """A function whose calls are recorded: for each new set of shapes of its arguments the first
    call runs it (that compiles and allocates), the second records it, and all later ones replay
    that. Beyond MOST_RECORDED sets it is run as it is.

    Its arguments are tensors on the device, numbers (floats, which it gets as tensors) and plain
    values (which are part of the shapes). It must do the same work whatever the values are, must
    not wait for the device, and what it changes (gradients, weights) must stay where it is. Python
    runs only in the first two calls, so that a counter in it would stand still. What it returns is
    overwritten by the next call.
    """

    def __init__(self, work):
        self.work, self.seen, self.recorded = work, set(), {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *arguments):
        shapes = tuple(map(shape_of, arguments))
        if shapes not in self.recorded:
            if shapes not in self.seen or len(self.recorded) == MOST_RECORDED:
                self.seen.add(shapes)
                return self.work(*map(hold, arguments))
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
        except RuntimeError as error:
            if "out of memory" in f"{error} {error.__context__}":
                raise
            raise UserError("a step cannot be recorded as a CUDA graph; does it read a value of a "
                            "tensor, as .item() does? The same command with --cuda_graphs=False "
                            f"goes on without ({error})") from error
        return graph, held, result


def shape_of(x):
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype
    return float if isinstance(x, float) else x


def hold(x):
    """A tensor that stays: a copy of one, or a number's."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    return torch.full((), x, device="cuda") if isinstance(x, float) else x
