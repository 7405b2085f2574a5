"""What only a GPU can show: that its kernels compute what the plain paths do on CPUs, that runs
learn the same there, and that no step waits. `pytest -m cuda -n 8` runs these alone."""

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import generate
import graphs
import optim
import predict
import train
from model import PackedLayout, attend
from tests.conftest import ROOT, class_task, interrupted, packed
from tests.test_evaluating_changes_nothing import records
from tests.test_fine_tuning_moves_what_it_should import bert, settings, tuned  # noqa: F401
from tests.test_images_and_tables import images  # noqa: F401
from tests.test_memory_is_what_it_is_said_to_be import settings_of
from tests.test_packed_equals_one_at_a_time import LENGTHS, random_documents, random_model
from tests.test_resume_is_bitwise import assert_same, state
from weights import load_checkpoint

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(autouse=True)
def exact_products():
    torch.set_float32_matmul_precision("highest")  # a run in bfloat16 sets TF32 for its process


def error(got, expected):
    """‖got − expected‖ / ‖expected‖ of tensors, or of lists of them as one."""
    if isinstance(got, torch.Tensor):
        got, expected = [got], [expected]
    got, expected = (torch.cat([x.float().cpu().flatten() for x in xs]) for xs in (got, expected))
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("width", [8, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 3])
def test_attention_within_documents(width, causal, window):
    g = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor(np.cumsum([0, *LENGTHS, 0, 0]), dtype=torch.int32)
    n_tokens = sum(LENGTHS)
    qkv = torch.randn(n_tokens, 3, 2, width, generator=g).bfloat16()
    grad = torch.randn(n_tokens, 2, width, generator=g).bfloat16()

    def result(device, dtype):
        x = qkv.to(device, dtype).detach().requires_grad_()
        y = attend(x, PackedLayout(cu_seqlens.to(device), n_tokens, 64), causal, window)
        y.backward(grad.to(device, dtype))
        return y, x.grad

    for got, expected in zip(result("cuda", torch.bfloat16), result("cpu", torch.float32)):
        assert error(got, expected) < 0.01


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "kw",
    [
        dict(pooling="mean"),
        dict(pooling="max", position="learned", norm="layer", mlp="gelu"),
        dict(pooling="cls", n_layer=3, window=3, window_layers=(0, 2)),
        dict(pooling="last", causal=True, n_kv_head=1, mlp="swiglu"),
    ],
)
def test_a_step_on_packed_documents(kw, compiled):
    documents = random_documents()
    targets = torch.arange(20) % 4
    targets[len(documents) :] = -100
    inputs = packed(documents, shape=(512, 20, 64))

    def gradients(device, dtype):
        module = train.ModelWithLoss(random_model(**kw).train().to(device), class_task(4))
        if compiled and device == "cuda":
            module.compile(fullgraph=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = module([x.to(device) for x in inputs], targets.to(device))
        loss.backward()
        return loss.detach(), [p.grad for p in module.parameters()]

    loss, got = gradients("cuda", torch.bfloat16)
    expected_loss, expected = gradients("cpu", torch.float32)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.01)
    # in bfloat16 another token can be the largest
    assert error(got, expected) < (0.1 if kw["pooling"] == "max" else 0.05)


RUNS = [
    dict(),
    dict(pooling="cls", dropout=0.0, ema_decay=0.9, micro_batch_tokens=96),
    dict(objective="mlm", mask_prob=0.3, optimizer="muon"),
    dict(objective="clm"),
    dict(model="linear", optimizer="adagrad", learning_rate=0.1),
    dict(optimizer="adagrad", learning_rate=0.01),
]


def run(toy, **changes):
    """The losses of a run's steps, and on val."""
    out = f"{toy['out_dir']}-{'-'.join(map(str, changes.values()))}"
    train.train(train.Config(**toy | changes | dict(out_dir=out)))
    return [row.get("loss", row.get("val_loss")) for row in records(out)]


@pytest.mark.parametrize("changes", RUNS)
def test_a_run_is_that_of_a_cpu(toy, changes):
    toy |= dict(max_steps=12, eval_interval=6, n_layer=2) | changes
    plain = run(toy)
    assert run(toy, device="cuda") == pytest.approx(plain, rel=1e-3)
    assert run(toy, device="cuda", dtype="auto", compile=True) == pytest.approx(plain, rel=0.03)


def test_a_run_on_images_is_that_of_a_cpu(images):  # noqa: F811
    images |= dict(max_steps=12, eval_interval=6, log_interval=1, shift=0.1, mixup=0.2)
    plain = run(images)
    assert run(images, device="cuda") == pytest.approx(plain, rel=1e-3)
    assert run(images, device="cuda", dtype="auto", compile=True) == pytest.approx(plain, rel=0.03)


@pytest.mark.parametrize("changes", [dict(), dict(lora_rank=4), dict(objective="contrastive")])
def test_fine_tuning_is_that_of_a_cpu(settings, changes):  # noqa: F811
    settings |= dict(max_steps=12, eval_interval=6, dropout=0.0) | changes
    losses = []
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "auto")):
        out = f"{settings['out_dir']}-{device}-{dtype}"
        compiled = dtype == "auto"
        tuned(settings | dict(device=device, dtype=dtype, compile=compiled, out_dir=out))
        losses.append([row.get("loss", row.get("val_loss")) for row in records(out)])
    plain, exact, fast = losses
    assert exact == pytest.approx(plain, rel=1e-3)
    assert fast == pytest.approx(plain, rel=0.05)


MORE_RUNS = dict(class_weights="balanced", dropout=0.1), dict(objective="contrastive")


@pytest.fixture
def refuse_waits(monkeypatch):
    """Makes waits for the device errors, from the gradient of a run's step `first` to its end."""

    def start(first):
        compute_gradient, update = train.compute_gradient, optim.EMA.update
        steps = []

        def watched_gradient(*args):
            steps.append(1)
            if len(steps) >= first:
                torch.cuda.set_sync_debug_mode("error")
            return compute_gradient(*args)

        def watched_update(self, step):  # the last work of a step
            update(self, step)
            torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(train, "compute_gradient", watched_gradient)
        monkeypatch.setattr(optim.EMA, "update", watched_update)
        return steps

    yield start
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("changes", [*RUNS[:4], *MORE_RUNS])
def test_no_step_waits_for_the_device(toy, changes, refuse_waits):
    steps = refuse_waits(first=4)  # in the first ones, optimizers make their state
    run(toy | changes, device="cuda", dtype="auto", compile=False, max_steps=8, log_interval=8)
    assert len(steps) == 8


def test_no_recorded_step_waits_for_the_device(toy, refuse_waits):
    toy = settings_of(toy, batch_size=16, max_steps=8, device="cuda", dtype="auto")  # of one shape
    steps = refuse_waits(first=4)
    run(toy, compile=True, log_interval=8, eval_interval=8)
    assert len(steps) == 8


@pytest.mark.parametrize(
    "changes",
    [
        dict(dropout=0.2, micro_batch_tokens=96, ema_decay=0.9),
        dict(optimizer="muon", dropout=0.2, crop=12),
        dict(optimizer="sgd", objective="clm"),
        dict(objective="mlm", mask_prob=0.3),
    ],
)
def test_replayed_steps_are_those_that_are_not(toy, changes, monkeypatch):
    recorded = []

    def record(self, arguments, record=graphs.Graphs.record):
        recorded.append(1)
        return record(self, arguments)

    monkeypatch.setattr(graphs.Graphs, "record", record)
    toy |= dict(max_steps=12, eval_interval=6, device="cuda", dtype="auto", compile=True) | changes
    found = []
    for cuda_graphs in (True, False):
        toy |= dict(cuda_graphs=cuda_graphs, out_dir=f"{toy['out_dir']}-{cuda_graphs}")
        train.train(train.Config(**toy))
        assert bool(recorded) == cuda_graphs
        recorded.clear()
        rows = [[row.get(name, 0.0) for name in ("loss", "grad_norm", "val_loss")]
                for row in records(toy["out_dir"])]  # fmt: skip
        weights = load_checkpoint(f"{toy['out_dir']}/last.pt")["model"].values()
        found.append((np.array(rows), list(weights)))
    (replayed, weights), (plain, plain_weights) = found
    np.testing.assert_allclose(replayed, plain, rtol=5e-3)
    assert error(weights, plain_weights) < 5e-3


def test_replays_see_new_values_and_shapes():
    calls = []

    def work(x, n, factor):
        calls.append(x.shape)
        return x * factor + n

    replay = graphs.Graphs(work)
    for n_rows in (3, 5, 3, 3, 5, 5, 3):
        x = torch.rand(n_rows, device="cuda")
        factor = float(len(calls))
        assert torch.equal(replay(x, 2, factor), x * factor + 2)
    assert len(calls) == 4


def test_work_that_waits_is_refused_with_a_way_out():
    program = (  # in a process of its own, as CUDA is of no use after this
        "import torch, graphs; from configurator import run\n"
        "replay = graphs.Graphs(lambda x: x * x.sum().item())\n"
        "run(lambda: [replay(torch.ones(3, device='cuda')) for _ in range(2)])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--cuda_graphs=False" in done.stderr, done.stderr


def resumed_and_whole(main, toy):
    """The states of a run that was interrupted and continued, and of one that was not."""
    toy |= dict(device="cuda", dtype="auto", deterministic=True, dropout=0.2, batch_size=12)
    toy |= dict(max_steps=12, eval_interval=4, micro_batch_tokens=128)
    whole = toy | dict(out_dir=toy["out_dir"] + "-whole")
    try:
        main(whole)
        with interrupted(6):
            main(toy)
        main(toy)
    finally:
        torch.use_deterministic_algorithms(False)
    return state(toy["out_dir"]), state(whole["out_dir"])


@pytest.mark.parametrize("compile", [False, True])
def test_a_resumed_run_is_that_run_bit_for_bit(toy, compile):
    toy |= dict(compile=compile)
    assert_same(*resumed_and_whole(lambda given: train.train(train.Config(**given)), toy))


def test_resumed_fine_tuning_is_that_run_bit_for_bit(settings):  # noqa: F811
    settings |= dict(compile=True)
    assert_same(*resumed_and_whole(lambda given: tuned(given), settings))


def test_labels_of_texts_are_those_of_a_cpu(toy):
    train.train(train.Config(**toy))
    texts = ["goal match referee", "chip", "", "bank " * 100]
    plain = predict.Classifier(toy["out_dir"], "cpu")
    found = predict.Classifier(toy["out_dir"], "cuda")(texts)
    fast = predict.Classifier(toy["out_dir"], "cuda", torch.bfloat16)(texts)
    for a, b, c in zip(plain(texts), found, fast):
        assert a["label"] == b["label"] == c["label"]
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)
        assert a["probability"] == pytest.approx(c["probability"], abs=0.03)


def test_generated_text_is_that_of_a_cpu():
    model = random_model(lm_head="own", n_classes=0, causal=True)
    write = partial(generate.generate, ids=[1, 2, 3], n_new=30, temperature=0.0)
    assert list(write(model)) == list(write(model.cuda()))


@pytest.mark.parametrize("changes", [dict(), dict(objective="mlm", mask_prob=0.2)])
def test_a_dry_run_says_what_a_run_takes(toy, capsys, changes):
    toy = settings_of(toy, d_model=1024, n_head=16, device="cuda", dtype="auto", **changes)
    toy |= dict(compile=False)
    train.train(train.Config(**toy, dry_run=True))
    said = capsys.readouterr().out.splitlines()[-1]
    number, unit = re.search(r"takes ([\d.]+) (MiB|GiB)", said).groups()
    expected = float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train.train(train.Config(**toy))
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected, rel=0.1)
