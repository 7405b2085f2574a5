"""How much a step computes, how fast the device could, and where the time goes.

    python train.py config/textcls.py --profile=True
"""
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

PEAK_FLOPS = (  # dense bfloat16 operations per second, from data sheets; the first that matches
    (r"GB200", 2500e12), (r"B200", 2250e12), (r"H200 NVL", 836e12), (r"H200|GH200", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 836e12), (r"H100|H800", 989e12), (r"A100|A800", 312e12), (r"L40S", 362e12),
    (r"L40", 181e12), (r"L4", 121e12), (r"A40", 150e12), (r"A10G?", 125e12), (r"A30", 165e12),
    (r"RTX 6000 Ada", 364e12), (r"RTX A6000", 155e12), (r"RTX 4090", 165e12), (r"RTX 3090", 71e12))


def peak_flops(name):
    """bfloat16 operations per second of a card, by its name, or None for one that is not known."""
    found = (flops for pattern, flops in PEAK_FLOPS if re.search(rf"\b({pattern})\b", name))
    return next(found, None)


def flops_per_token(model, lengths, predicted=1.0, backward=True):
    """Floating-point operations of a training step per token (of an MLP or linear model: per
    example), counted as torch's FlopCounterMode does: two for each multiplication of matrices'
    elements. Attention counts whole, also where a mask hides a part, as is usual in the literature
    (Chowdhery et al. 2022, appendix B).

    lengths (N,): tokens of examples. predicted: the share of the tokens that a language model
    predicts, with mlm mask_prob. backward: False counts the forward pass alone. Weights that do not
    learn have no gradient, and nor has what comes before the first that does.
    """
    c = model.config
    lengths = np.asarray(lengths, np.float64)
    n_examples, n_tokens, n_predicted = len(lengths), lengths.sum(), predicted * lengths.sum()
    is_transformer = c.model == "transformer"
    of_last = n_tokens  # rows that the last block makes
    if is_transformer and c.lm_head:
        of_last = n_predicted
    elif is_transformer and c.pooling in ("cls", "last"):
        of_last = n_examples
    total, learns_before = 0.0, False

    def product(n_rows, n_weights, learns):
        n_passes = 1 + backward * (learns + learns_before)
        return 2 * n_rows * n_weights * n_passes
    for name, module in model.named_modules():
        learns = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            n_rows = n_tokens
            if not is_transformer or name in ("dense", "head"):
                n_rows = n_examples
            elif name == "lm_head":
                n_rows = n_predicted
            elif name.startswith(f"blocks.{c.n_layer - 1}.") and not name.endswith("qkv"):
                n_rows = of_last
            total += product(n_rows, module.weight.numel(), module.weight.requires_grad)
            if hasattr(module, "lora_a"):
                total += product(n_rows, module.lora_a.numel(), True)
                total += 2 * n_rows * module.lora_b.numel() * (1 + 2 * backward)
            learns_before |= learns
            if name.endswith("attention.qkv"):  # attention itself follows
                passes = 1 + 2 * backward * learns_before
                total += 4 * (lengths**2).sum() * c.n_head * c.head_width * passes
        learns_before |= learns
    if is_transformer and c.lm_head == "tied":
        weight = model.embedding.weight
        total += product(n_predicted, weight.numel(), weight.requires_grad)
    return total / (n_tokens if is_transformer else n_examples)


def is_worth_compiling(n_steps, flops):
    """Does a run on a GPU last long enough to win back the half minute or more that compiling
    takes? A small model saves some 20 ms a step by it. flops: of the whole run; 1e16 take a large
    model 20 s or more on an H100."""
    return n_steps >= 2000 or flops >= 1e16


class Profile:
    """Writes out_dir/trace.json of a few steady steps, and prints what took most of their time."""
    FIRST, N_STEPS = 10, 3

    def __init__(self, out_dir, device):
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.by = "self_cpu_time_total"
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.by = "self_device_time_total"
        self.path = Path(out_dir) / "trace.json"
        self.profiler = torch.profiler.profile(activities=activities)
        self.n_steps = 0

    def step(self):
        """To be called at the end of each step."""
        self.n_steps += 1
        if self.n_steps == self.FIRST:
            self.profiler.start()
        elif self.n_steps == self.FIRST + self.N_STEPS:
            self.stop()

    def stop(self):
        """Write what there is, once; to be called at the end of the run, too."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        if self.n_steps >= self.FIRST:
            profiler.stop()
        n = self.n_steps - self.FIRST
        if n < 1:
            print(f"--profile: the first {self.FIRST} steps are not steady: train longer than "
                  f"{self.n_steps}", flush=True)
            return
        profiler.export_chrome_trace(str(self.path))
        table = profiler.key_averages().table(sort_by=self.by, row_limit=10)
        print(f"{table}\n{self.path}: {n} steps, for chrome://tracing or ui.perfetto.dev",
              flush=True)
