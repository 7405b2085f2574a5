"""Training with weights that are spread over processes (--parallel=fsdp) is training with one."""

import json
import signal
from pathlib import Path

from configurator import UserError

import pytest
import torch

import optim
import train
from tests.conftest import interrupted
from tests.forks import Script, script
from tests.test_resume_is_bitwise import wait_for_losses
from weights import load_checkpoint


def run(toy, n, out, script_name="train.py", **changes):
    """Trains in n processes; returns (the losses of steps and on val, last.pt, best.pt)."""
    settings = toy | dict(out_dir=f"{toy['out_dir']}-{out}", parallel="fsdp") | changes
    done = script(script_name, processes=n, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in open(f"{settings['out_dir']}/metrics.jsonl")]
    losses = [row.get("loss", row.get("val_loss")) for row in rows]
    last, best = (load_checkpoint(f"{settings['out_dir']}/{name}.pt") for name in ("last", "best"))
    return losses, last, best


def assert_same(a, b, tolerance):
    losses_a, last_a, best_a = a
    losses_b, last_b, best_b = b
    assert losses_a == pytest.approx(losses_b, abs=tolerance)
    for x, y in ((last_a, last_b), (best_a, best_b)):
        assert x["model"].keys() == y["model"].keys()
        for name, w in x["model"].items():
            torch.testing.assert_close(y["model"][name], w, atol=tolerance, rtol=0, msg=name)
    assert len(last_a["ema"]) == len(last_b["ema"])
    for x, y in zip(last_a["optimizers"], last_b["optimizers"]):
        for state_x, state_y in zip(x["state"].values(), y["state"].values()):
            assert {k: v.shape for k, v in state_x.items()} == {
                k: v.shape for k, v in state_y.items()
            }


@pytest.mark.parametrize(
    "changes",
    [
        # batches of 5 leave the last process without examples, and val has uneven shares
        dict(
            batch_size=5,
            micro_batch_tokens=40,
            ema_decay=0.9,
            pooling="last",
            optimizer="sgd",
            learning_rate=0.1,
        ),
        dict(optimizer="muon", objective="clm", micro_batch_tokens=64),
        dict(optimizer="muon", objective="mlm", mask_prob=0.3, weight_decay=0.0),
        dict(dtype="bfloat16", norm="layer", checkpoint_activations=True, learning_rate=0.0005),
    ],
)
def test_any_number_of_processes_trains_as_one(toy, changes):
    toy = toy | dict(n_layer=2, max_steps=6, eval_interval=3, grad_clip=0.5) | changes
    one = run(toy, 0, "1", parallel="ddp")
    tolerance = 3e-3 if changes.get("dtype") else 2e-5
    for n in (2, 4) if "ema_decay" in changes else (2,):
        assert_same(one, run(toy, n, n), tolerance)


def stopped(settings, n, n_losses):
    """The step at which a run of n processes was told to stop."""
    running = Script("train.py", processes=n, **settings)
    wait_for_losses(settings, n_losses, running.is_running)
    running.send_signal(signal.SIGTERM, running.processes[-1:])  # the others stop with it
    running.ended()
    assert {process.exitcode for process in running.processes} == {128 + signal.SIGTERM}
    return load_checkpoint(f"{settings['out_dir']}/last.pt")["step"]


def test_a_run_goes_on_with_another_number_of_processes(toy):
    toy = toy | dict(n_layer=2, epochs=3.0, eval_interval=99, ema_decay=0.9, optimizer="muon")
    whole = run(toy, 2, "whole")
    cut = toy | dict(out_dir=f"{toy['out_dir']}-cut")
    assert 0 < stopped(cut | dict(parallel="fsdp"), 2, 2) < 18
    assert 0 < stopped(cut | dict(parallel="fsdp"), 4, 6) < 18
    assert 0 < stopped(cut | dict(parallel="ddp"), 2, 10) < 18
    assert_same(whole, run(toy, 0, "cut", parallel="ddp"), 3e-4)
    assert not list(Path(cut["out_dir"]).glob("last-*"))  # all is in last.pt now


def test_sgd_goes_on_with_another_parallel(toy):
    """Its fused step is not for sharded weights."""
    toy |= dict(n_layer=2, epochs=3.0, eval_interval=99, optimizer="sgd", grad_clip=0.1)
    whole = run(toy, 2, "whole")
    cut = toy | dict(out_dir=f"{toy['out_dir']}-cut")
    assert 0 < stopped(cut | dict(parallel="ddp"), 2, 2) < 18
    assert 0 < stopped(cut | dict(parallel="fsdp"), 2, 6) < 18
    assert_same(whole, run(toy, 2, "cut", parallel="ddp"), 1e-5)


def test_as_many_processes_go_on_bit_for_bit(toy):
    toy = toy | dict(n_layer=2, epochs=3.0, eval_interval=99, dropout=0.1, parallel="fsdp")
    whole = run(toy, 2, "whole")
    assert 0 < stopped(toy | dict(out_dir=f"{toy['out_dir']}-cut"), 2, 4) < 18
    assert_same(whole, run(toy, 2, "cut"), 0.0)


def test_the_range_test(toy):
    """Batches of few tokens leave the processes with different numbers of them."""
    toy |= dict(parallel="fsdp", micro_batch_tokens=40, lr_find=True)
    done = script("train.py", processes=2, **toy)
    assert done.returncode == 0 and "lr_find.json" in done.stdout, done.stderr[-3000:]


def test_another_number_of_optimizers_is_refused(toy, monkeypatch):
    """As after --parallel=ddp on CPUs, where a large embedding has one of its own."""
    toy |= dict(save_interval=2, eval_interval=99)
    with monkeypatch.context() as patched, interrupted(3):
        patched.setattr(optim, "LARGE_EMBEDDING", 10)
        train.train(train.Config(**toy))
    with pytest.raises(UserError, match="begun with another --parallel .* go on as it began"):
        train.train(train.Config(**toy))


def test_low_rank_updates(toy, tmp_path):
    """Only what learns has an optimizer state; what is saved is merged as in one process."""
    hf = pytest.importorskip("transformers")
    train.train(train.Config(**toy | dict(max_steps=1)))  # makes a tokenizer
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
        initializer_range=0.1,
    )  # fmt: skip
    hf.LlamaModel(config).bfloat16().save_pretrained(tmp_path / "llama")
    tokenizer = open(f"{toy['data_dir']}/toy/tokenizer.json").read()
    (tmp_path / "llama/tokenizer.json").write_text(tokenizer)
    names = "vocab_size", "n_layer", "d_model", "n_head"
    settings = {name: value for name, value in toy.items() if name not in names}
    settings |= dict(init_from=str(tmp_path / "llama"), lora_rank=2, max_steps=6)
    for dtype in ("float32", "bfloat16"):
        one, two = (
            run(settings, n, f"{dtype}-{n}", script_name="finetune.py", dtype=dtype, **how)
            for n, how in ((0, dict(parallel="ddp")), (2, dict(parallel="fsdp")))
        )
        if dtype == "float32":
            assert_same(one, two, 2e-5)
        assert one[0] == pytest.approx(two[0], abs=1e-3)
        assert {str(w.dtype) for w in two[1]["model"].values()} == {
            "torch.float32",
            f"torch.{dtype}",
        }
        assert {w.dtype for w in two[2]["model"].values()} == {torch.float32}


def test_models_without_blocks_are_refused(toy):
    with pytest.raises(UserError, match="--parallel=fsdp .* is for --model=transformer"):
        train.train(train.Config(**toy | dict(model="linear", parallel="fsdp")))
