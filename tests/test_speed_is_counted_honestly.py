"""FLOPs are those that torch counts, cards are told apart, a profile shows steady steps."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cpu
import finetune
import train
from model import ModelConfig, Transformer
from speed import flops_per_token, peak_flops
from tests.forks import script

TEXT = dict(vocab_size=1000, n_layer=3, d_model=64, d_ff=256, n_head=4)
CLASSES = TEXT | {"n_classes": 5}
IMAGES = dict(image_size=(3, 16, 16), patch=4, n_classes=5, n_layer=2, d_model=64, n_head=4)


def freeze(n_blocks):
    def change(model):
        for name, p in model.named_parameters():
            p.requires_grad = finetune.layer_of(name, model) > n_blocks

    return change


def add_lora(model):
    freeze(3)(model)
    cfg = SimpleNamespace(lora_targets=["qkv", "out", "up"], lora_rank=8, lora_alpha=16.0)
    finetune.add_lora(model, cfg)


@pytest.mark.parametrize("settings,change,predicted", [
    (CLASSES, None, None),
    (CLASSES | {"pooling": "cls"}, None, None),
    (CLASSES | {"pooling": "last", "causal": True}, None, None),
    (CLASSES | {"window": 8, "window_layers": (0, 1)}, None, None),
    (CLASSES | {"n_kv_head": 2, "mlp": "swiglu", "head_dense": "tanh"}, None, None),
    (CLASSES | {"d_embedding": 32}, None, None),
    (TEXT | {"lm_head": "own", "causal": True}, None, None),
    (TEXT | {"lm_head": "tied", "causal": True}, None, None),
    (TEXT | {"lm_head": "own"}, None, 0.25),
    (IMAGES, None, None),
    (IMAGES | {"cls_token": True, "pooling": "cls", "position": "learned"}, None, None),
    (CLASSES, freeze(0), None),
    (CLASSES, freeze(2), None),
    (CLASSES, freeze(3), None),
    (CLASSES, add_lora, None),
])  # fmt: skip
def test_flops_are_those_that_torch_counts(settings, change, predicted, monkeypatch):
    monkeypatch.setattr(cpu, "attends", lambda *a: False)  # of which FlopCounterMode knows nothing
    monkeypatch.setattr(cpu, "handles", lambda *a: False)
    model = Transformer(ModelConfig(**settings))
    if change:
        change(model)
    c = model.config
    lengths = [c.n_positions if c.image_size else 64] * 8
    inputs = (torch.randint(0, 255, (8, *c.image_size)).float(),)
    if not c.image_size:
        tokens = torch.randint(0, c.vocab_size, (sum(lengths),))
        inputs = tokens, torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    if predicted:
        inputs += None, torch.arange(0, sum(lengths), round(1 / predicted))
    for backward in (True, False):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logits = model(*inputs)
            if backward:
                logits.sum().backward()
        ours = flops_per_token(model, lengths, predicted or 1.0, backward) * sum(lengths)
        assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_an_mlp():
    from baselines import build_model

    model = build_model(ModelConfig(model="mlp", n_features=20, n_classes=3, n_layer=2, d_model=32))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(10, 20)).sum().backward()
    ours = flops_per_token(model, [1] * 10) * 10
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_cards_are_told_apart():
    assert peak_flops("NVIDIA L40") == 181e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12 and peak_flops("NVIDIA H200 NVL") == 836e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A10G") == 125e12 and peak_flops("NVIDIA A40") == 150e12
    assert peak_flops("Tesla V100-SXM2-16GB") is None


def test_a_profile_holds_a_few_steps(toy, capsys):
    train.train(train.Config(**toy | dict(epochs=3.0, profile=True)))
    trace = json.load(open(f"{toy['out_dir']}/trace.json"))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("AdamW" in name and "step" in name for name in names) >= 3
    assert "Self CPU" in capsys.readouterr().out


@pytest.mark.parametrize("n_steps, traced", [(5, 0), (10, 0), (11, 1), (12, 2)])
def test_a_run_that_is_shorter_than_a_profile(toy, n_steps, traced):
    done = script("train.py", **toy | dict(epochs=3.0, profile=True, max_steps=n_steps))
    assert done.returncode == 0, done.stderr  # torch crashes at the end if it still records
    says = f"trace.json: {traced} steps" if traced else "are not steady: train longer"
    assert says in done.stdout
