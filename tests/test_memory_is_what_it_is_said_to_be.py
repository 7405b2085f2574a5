"""A dry run says how much memory a run takes, and `auto` keeps to what there is."""

import contextlib
import json
import os
import re
import subprocess
import sys

from configurator import UserError

import pytest
import torch

import finetune
import memory
import train
from tests.conftest import ROOT, interrupted
from weights import load_checkpoint

PROGRAM = """
import json, sys
import train

def used(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if key in line) * 1024

small, large = json.load(sys.stdin)
train.train(train.Config(**small))  # imports much
before = used("VmRSS")
train.train(train.Config(**large))
print("PEAK", used("VmHWM") - before)
"""


def settings_of(toy, **changes):
    words = " ".join(["goal match the a of and on in it was"] * 30)
    with open(toy["train_file"], "w") as file:
        file.write("label,text\n")
        file.writelines(f"{'ab'[i % 2]},{words} {i}\n" for i in range(80))
    large = dict(n_layer=3, d_model=384, n_head=6, max_len=256, batch_size=24, max_steps=2)
    return toy | large | dict(eval_interval=2, vocab_size=300, dedup=False, epochs=9.0) | changes


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measured on Linux")
@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="auto"),  # bfloat16 where the processor has it
        dict(micro_batch_tokens=2048, optimizer="muon", ema_decay=0.9),
        dict(objective="mlm", mask_prob=0.2, mlp="swiglu", checkpoint_activations=True),
        dict(objective="mlm", mask_prob=0.2, batch_size=12),
    ],
)
def test_a_dry_run_says_what_a_run_takes(toy, capsys, changes):
    settings = settings_of(toy, **changes)
    train.train(train.Config(**settings | dict(dry_run=True)))
    said = capsys.readouterr().out.splitlines()[-1]
    assert not os.path.exists(settings["out_dir"])
    number, unit = re.search(r"takes ([\d.]+) (MiB|GiB)", said).groups()
    expected = float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]
    small = settings | dict(n_layer=1, d_model=12, out_dir=settings["out_dir"] + "-small")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([small, settings]),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = int(re.search(r"PEAK (\d+)", run.stdout)[1])
    assert measured == pytest.approx(expected, rel=0.05)


def test_a_dry_run_counts_a_processs_share(toy, monkeypatch, capsys):
    toy |= dict(n_layer=6, d_model=192, n_head=4, dry_run=True)
    measure = memory.measure_step

    def of_one_of_two(cfg, make_model, module, train_set, machine, *args):
        machine.world, machine.sharded = 2, True
        found = measure(cfg, make_model, module, train_set, machine, *args)
        machine.world = 1
        return found

    train.train(train.Config(**toy))
    monkeypatch.setattr(memory, "measure_step", of_one_of_two)
    train.train(train.Config(**toy))
    one, two = (line for line in capsys.readouterr().out.splitlines() if "a step with" in line)
    for what in ("weights", "gradients", "optimizer"):
        whole, share = (int(re.search(rf"{what} (\d+) MiB", line)[1]) for line in (one, two))
        assert share == pytest.approx(whole / 2, abs=1)


def test_auto_takes_what_fits_and_keeps_it(toy, monkeypatch, capsys):
    settings = settings_of(toy, micro_batch_tokens="auto", n_layer=2, d_model=96, n_head=4)
    taken = {}
    for n in (256, 512, 1024, 6144):
        train.train(train.Config(**settings | dict(dry_run=True, micro_batch_tokens=n)))
        said = capsys.readouterr().out.splitlines()[-1]
        taken[n] = float(re.search(r"takes ([\d.]+) MiB", said)[1]) * 2**20
    assert list(taken.values()) == sorted(taken.values())
    for free, expected in ((taken[512] * 1.02, 512), (taken[1024] * 1.02, 1024), (1e15, 6144)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free / 0.5)
        train.train(train.Config(**settings | dict(dry_run=True)))
        assert f"auto: {expected}\n" in capsys.readouterr().out
    # a run that goes on where less is free goes on as it began
    monkeypatch.setattr(memory, "free_memory", lambda device: taken[1024] * 1.02 / 0.5)
    fixed = settings | dict(micro_batch_tokens=1024, out_dir=settings["out_dir"] + "-fixed")
    for run in (settings | dict(max_steps=4), fixed | dict(max_steps=4)):
        with interrupted(3) if run["micro_batch_tokens"] == "auto" else contextlib.nullcontext():
            train.train(train.Config(**run | dict(save_interval=2, eval_interval=4)))
    monkeypatch.setattr(memory, "free_memory", lambda device: taken[512] * 1.02 / 0.5)
    train.train(train.Config(**settings | dict(max_steps=4, save_interval=2, eval_interval=4)))
    whole, resumed = (
        load_checkpoint(f"{run['out_dir']}/last.pt")["model"] for run in (fixed, settings)
    )
    assert all(torch.equal(w, resumed[name]) for name, w in whole.items())
    monkeypatch.setattr(memory, "free_memory", lambda device: taken[256] / 2)
    with pytest.raises(UserError, match="an example of 256 tokens alone takes"):
        train.train(train.Config(**settings | dict(dry_run=True)))
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    with pytest.raises(UserError, match="give a number"):
        train.train(train.Config(**settings | dict(dry_run=True)))


def test_a_container_has_as_much_memory_as_it_is_given(tmp_path):
    own = tmp_path / "cgroup"
    assert memory.free_in_group(tmp_path, own) == float("inf")  # a system without groups
    for line, group, limit, used, cached in (
        ("0::/job/step", "job", "memory.max", "memory.current", "inactive_file"),
        ("4:cpu,memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes",
         "total_inactive_file"),
    ):  # fmt: skip
        own.write_text(f"1:cpu:/\n{line}\n")
        root = tmp_path / line.partition(":")[0]
        assert memory.free_in_group(root, own) == float("inf")
        (root / group / "step").mkdir(parents=True)
        (root / group / limit).write_text("1000\n")
        (root / group / used).write_text("700\n")
        (root / group / "memory.stat").write_text(f"anon 5\n{cached} 100\n")
        (root / group / "step" / limit).write_text("max\n")
        assert memory.free_in_group(root, own) == 400


def test_a_dry_run_of_our_own_weights(toy, capsys):
    settings = settings_of(toy, n_layer=2, d_model=96, n_head=4, max_steps=2, eval_interval=2)
    train.train(train.Config(**settings))
    names = "vocab_size", "n_layer", "d_model", "n_head"
    begun = {key: value for key, value in settings.items() if key not in names}
    begun |= dict(init_from=settings["out_dir"], out_dir=settings["out_dir"] + "-begun", crop=None)
    for changes in (dict(dry_run=True), dict(micro_batch_tokens="auto")):
        finetune.finetune(finetune.Config(**begun | changes))
    out = capsys.readouterr().out
    assert "a step with micro-batches of up to" in out and "--micro_batch_tokens=auto: " in out


def test_a_dry_run_reads_no_weights(toy, tmp_path, capsys):
    """Of low-rank updates to a large model, whose folder holds its config and shapes only."""
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=300, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=1024, max_position_embeddings=256,
    )  # fmt: skip
    model = hf.LlamaModel(config).bfloat16()
    n = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "llama")
    settings = settings_of(toy, tokenizer="bytes", dry_run=True, crop=None)
    train.train(train.Config(**settings))  # builds the data set, and its tokenizer
    tokenizer = next((tmp_path / "data").glob("*/tokenizer.json"))
    (tmp_path / "llama/tokenizer.json").write_text(tokenizer.read_text())
    path = tmp_path / "llama/model.safetensors"
    header = path.read_bytes()
    start = 8 + int.from_bytes(header[:8], "little")
    path.write_bytes(header[:start] + b"\xff" * (len(header) - start))  # NaN everywhere
    names = "vocab_size", "n_layer", "d_model", "n_head", "tokenizer"
    settings = {name: value for name, value in settings.items() if name not in names}
    settings |= dict(init_from=str(tmp_path / "llama"), dtype="bfloat16")
    weights, whole = {}, []
    for recompute in (False, True):
        changes = dict(lora_rank=4, checkpoint_activations=recompute, max_len=8, crop=None)
        finetune.finetune(finetune.Config(**settings | changes))
        said = capsys.readouterr().out.splitlines()[-1]
        whole.append(float(re.search(r"takes ([\d.]+) MiB", said)[1]))
    assert whole[1] < 0.9 * whole[0] < 4 * 2 * n / 2**20  # not what is made without memory
    for rank in (0, 4):
        finetune.finetune(finetune.Config(**settings | dict(lora_rank=rank)))
        said = capsys.readouterr().out.splitlines()[-1]
        weights[rank] = float(re.search(r"weights ([\d.]+) MiB", said)[1]) * 2**20
        optimizer = float(re.search(r"optimizer ([\d.]+) MiB", said)[1]) * 2**20
        assert optimizer < weights[rank] / 4 if rank else optimizer > 1.5 * weights[rank]
    assert weights[0] == pytest.approx(4 * n, rel=0.05)
    assert weights[4] == pytest.approx(2 * n, rel=0.1)
    for changes in (dict(dry_run=True), dict(dry_run=False, micro_batch_tokens="auto")):
        with pytest.raises(UserError, match="not for .*lbfgs or --objective=contrastive"):
            finetune.finetune(finetune.Config(**settings | dict(objective="contrastive") | changes))
    finetune.finetune(finetune.Config(**settings | dict(folds=3)))  # says it once, trains nothing
    assert capsys.readouterr().out.count("takes") == 1
    assert not (tmp_path / "out-folds").exists()
