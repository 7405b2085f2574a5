"""The path that CUDA takes, run on CPUs: its attention kernel gets a plain twin here, so that all
that stands around it is compared and compiled."""

import contextlib
from types import SimpleNamespace

from configurator import UserError

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
import model as model_file
import optim
import tasks
import train
from batches import GlobalBatches
from examples import PackedText
from model import ModelConfig
from tests.conftest import class_task, packed
from tests.test_evaluating_changes_nothing import records
from tests.test_packed_equals_one_at_a_time import random_documents, random_model
from tests.test_published_weights_mean_the_same import documents, reference
from weights import from_pretrained, load_checkpoint

pytest.importorskip("transformers")


CALLS = []  # of the kernel


def by_document(query, key, value, cu_seq, window, scale):
    """Of each document: its rows, and q, k, v, the softmax, each (H, L, d or L)."""
    scale = scale or query.shape[-1] ** -0.5
    for start, end in zip(cu_seq.tolist(), cu_seq.tolist()[1:]):
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = (reach if reach >= 0 else end for reach in window)
        hidden = (distance > left) | (-distance > right)
        p = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        yield slice(start, end), q * scale, k * scale, v, p


def check(query, cu_seq, longest):
    assert cu_seq.dtype == torch.int32 and cu_seq[-1] == len(query)
    assert longest >= cu_seq.diff().max()


@varlen._varlen_attn.register_kernel("cpu")
def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None,
            window_size=None, *_, **__):  # fmt: skip
    check(query, cu_seq_q, max_q)
    CALLS.append(1)
    y = torch.zeros_like(query)
    for rows, _, _, v, p in by_document(query, key, value, cu_seq_q, window_size, scale):
        y[rows] = (p @ v).transpose(0, 1)
    lse = torch.zeros(query.shape[1], len(query))
    return y, lse, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def backward(grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal,
             rng_state, scale=None, window_size=None):  # fmt: skip
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for rows, q, k, v, p in by_document(query, key, value, cu_seq_q, window_size, scale):
        g = grad[rows].transpose(0, 1).float()
        of_p = g @ v.mT
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True))
        for x, of_x in zip(grads, (of_scores @ k, of_scores.mT @ q, p.mT @ g)):
            x[rows] = of_x.transpose(0, 1)
    return tuple(grads)


@pytest.fixture
def gpu_path(monkeypatch):
    """Turns the path of CUDA on, and those for CPUs off."""
    CALLS.clear()

    @contextlib.contextmanager
    def turned(on):
        with monkeypatch.context() as patch:
            patch.setattr(model_file.cpu, "attends", lambda *a: False)
            patch.setattr(model_file.cpu, "handles", lambda *a: False)
            if on:
                packs = lambda qkv, layout: not layout.same_length  # noqa: E731
                patch.setattr(model_file, "takes_varlen", packs)
            yield

    return turned


@pytest.mark.parametrize(
    "settings",
    [
        dict(pooling="mean"),
        dict(pooling="max", position="learned", norm="layer"),
        dict(pooling="cls", n_layer=3, window=3, window_layers=(0, 2)),
        dict(pooling="last", causal=True, n_kv_head=1),
        dict(causal=True, window=4, window_layers=(1,), lm_head="own", n_classes=0),
        dict(lm_head="own", n_classes=0, mlp="swiglu"),
    ],
)
def test_our_trunk_in_values_and_gradients(gpu_path, settings):
    turned = gpu_path
    inputs = packed(random_documents(), shape=(512, 20, 64))
    if settings.get("lm_head"):
        inputs = (*inputs, None, torch.tensor([0, 3, 11, 100]))
    found = []
    for on in (True, False):
        model = random_model(**settings).train()
        with turned(on):
            logits = model(*inputs)
            logits[: len(random_documents())].square().mean().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    assert len(CALLS) == model.config.n_layer
    n = len(random_documents()) if not settings.get("lm_head") else 4
    torch.testing.assert_close(found[0][0][:n], found[1][0][:n], atol=1e-5, rtol=1e-4)
    for a, b in zip(found[0][1:], found[1][1:]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "modernbert", "gpt2", "llama", "mistral", "qwen3", "gemma3"]
)
def test_published_trunks(gpu_path, tmp_path, name):
    turned = gpu_path
    reference(name).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    inputs = packed([d.numpy() for d in documents(58)])
    with torch.no_grad():
        with turned(True):
            got = model(*inputs)
        torch.testing.assert_close(got, model(*inputs), atol=1e-4, rtol=1e-4)
    assert len(CALLS) == model.config.n_layer


def test_an_epoch_of_ragged_batches_is_few_graphs_without_breaks(gpu_path):
    turned = gpu_path
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 300)
    starts = np.concatenate([[0], lengths.cumsum()])
    text = PackedText(
        rng.integers(0, 50, starts[-1]), starts, rng.integers(0, 4, 300), max_len=64, n_suffix=0
    )
    batches = GlobalBatches(text, 16, 1024, seed=1, start=0, stop=19, fixed_shapes=True)
    module = train.ModelWithLoss(random_model().train(), class_task(4))
    plain_losses = [
        module(batch.inputs, batch.targets).item()
        for requests in batches
        for batch in text.__getitems__(requests)
    ]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with turned(True):
        losses = [
            compiled(batch.inputs, batch.targets).item()
            for requests in batches
            for batch in text.__getitems__(requests)
        ]
    torch._dynamo.reset()
    assert losses == pytest.approx(plain_losses, abs=1e-4)
    assert 1 <= len(graphs) <= 3
    assert any("varlen" in str(node.target) for g in graphs for node in g.graph.nodes)


@pytest.mark.parametrize("draw", ["uniform", "short", "long tail"])
def test_batches_are_filled_up_by_a_tenth_at_the_most(draw):
    rng = np.random.default_rng(0)
    lengths = {
        "uniform": rng.integers(1, 129, 5000),
        "short": rng.poisson(9, 5000) + 3,
        "long tail": np.clip(rng.lognormal(4.5, 0.8, 5000), 3, 512).astype(int),
    }[draw]
    starts = np.concatenate([[0], lengths.cumsum()])
    labels = np.zeros(5000, np.int64)
    text = PackedText(np.zeros(starts[-1], int), starts, labels, max_len=512, n_suffix=0)
    for limit in (2048, 16384):
        requests = [
            request
            for step in GlobalBatches(text, 32, limit, seed=1, start=0, stop=471, fixed_shapes=True)
            for request in step
        ]
        n_tokens = sum(text.lengths[request.indices].sum() for request in requests)
        assert sum(request.shape.n_tokens for request in requests) <= 1.12 * n_tokens
        assert all(text.lengths[r.indices].sum() <= r.shape.n_tokens <= limit for r in requests)
        assert len({request.shape for request in requests}) <= 4  # three, and one if at all


def test_heads_that_the_kernel_refuses_are_refused_by_name():
    machine = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    for d_model, fits in ((64, True), (80, False), (4 * 264, False), (4 * 256, True)):
        config = ModelConfig(vocab_size=10, d_model=d_model, n_head=4)
        if fits:
            train.check_head_width(config, machine)
        else:
            with pytest.raises(UserError, match=f"heads of width {d_model // 4}: on CUDA"):
                train.check_head_width(config, machine)


def test_a_gradient_that_is_not_finite_is_found_before_anything_is_saved():
    cfg = train.Config()
    waiting = optim.FiniteGradients(cfg)
    waiting.add(torch.tensor(1.0), 3, waits=False)
    waiting.check()
    for step, norm in enumerate((1.0, float("nan"), 2.0), 4):
        waiting.add(torch.tensor(norm), step, waits=False)
    with pytest.raises(UserError, match="the gradient of one of steps 4 to 6 is not finite"):
        waiting.check()


def language_task(objective):
    mask_prob = 0.3 * (objective == "mlm")
    return tasks.LanguageTask(train.Config(objective=objective, mask_prob=mask_prob), {})


class NoWaits(TorchDispatchMode):
    """Raises where a step would wait for a GPU: values are read, or decide on a size."""

    WAITING = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.unique_consecutive.default,
        torch.ops.aten.repeat_interleave.Tensor,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [
    dict(), dict(pooling="cls"), dict(pooling="last"), dict(pooling="max"),
    dict(n_classes=0, lm_head="own", causal=True), dict(n_classes=0, lm_head="tied"),
    dict(optimizer="muon"), dict(ema_decay=0.9), dict(class_weights=[1.0, 2.0, 1.0, 1.0]),
])  # fmt: skip
def test_no_step_waits_for_the_device(gpu_path, settings):
    turned = gpu_path
    names = "optimizer", "ema_decay", "class_weights"
    run = {name: settings.pop(name) for name in names if name in settings}
    cfg = train.Config(grad_clip=1.0, **run)
    module = train.ModelWithLoss(random_model(**settings).train(), class_task(4, **run))
    inputs = packed(random_documents(), shape=(512, 20, 64))
    n_targets = 20
    if settings.get("lm_head"):
        module.task = language_task("clm" if settings.get("causal") else "mlm")
        n_targets = 512
    targets = torch.randint(0, 4, (n_targets,))
    device = torch.device("cuda")  # no sparse gradients
    optimizers = optim.make_optimizers(module.model, cfg, device)
    average = optim.EMA(module.model, cfg.ema_decay)
    gradients = optim.FiniteGradients(cfg)
    with turned(True):
        for step in range(3):  # in the first, optimizers make their state
            with NoWaits() if step else contextlib.nullcontext():
                loss = module(inputs, targets) / n_targets
                loss.backward()
                optim.set_learning_rate(optimizers, 1e-3)
                gradients.add(optim.clip_gradients(optimizers, cfg.grad_clip), step, waits=False)
                optim.step_all(optimizers)
                average.update(step)
    gradients.check()
    assert CALLS


class Replay:
    """In place of a CUDA graph: does the work again. (Recording did it, too, unlike CUDA's.)"""

    def __init__(self, work, held, result):
        self.work, self.held, self.result, self.done = work, held, result, True

    def replay(self):
        if not self.done:
            self.result.copy_(self.work(*self.held))
        self.done = False


@pytest.mark.parametrize("changes", [
    dict(ema_decay=0.9, micro_batch_tokens=96, class_weights="balanced", crop=12),
    dict(optimizer="muon", dropout=0.2), dict(optimizer="sgd", objective="clm"),
    dict(optimizer="adagrad", grad_clip=0.0, objective="mlm", mask_prob=0.3),
])  # fmt: skip
def test_recorded_steps_are_those_that_are_not(toy, changes, monkeypatch):
    recorded, places = [], []  # of gradients after each step
    step_all = optim.step_all

    def watched(optimizers):
        step_all(optimizers)
        if on:
            places.append([p.grad.data_ptr() for o in optimizers for p in optim.parameters_of(o)])

    def record(self, arguments):
        held = list(map(graphs.hold, arguments))
        result = self.work(*held)
        recorded.append(1)
        return Replay(self.work, held, result), held, result

    def hold_on_cpu(x):
        if isinstance(x, float):
            return torch.tensor(x)
        return x.clone() if isinstance(x, torch.Tensor) else x

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "hold", hold_on_cpu)
    monkeypatch.setattr(optim, "step_all", watched)
    monkeypatch.setattr(graphs.Graphs, "record", record)
    monkeypatch.setattr(train.ModelWithLoss, "compile", lambda self, **settings: None)
    toy |= dict(compile=True, max_steps=15, eval_interval=6, epochs=9.0) | changes
    found = []
    for on in (True, False):
        monkeypatch.setattr(train, "are_worth_it", lambda *arguments, on=on: on)
        toy |= dict(out_dir=f"{toy['out_dir']}-{on}")
        train.train(train.Config(**toy))
        assert bool(recorded) == on
        recorded.clear()
        assert places[0] and all(place == places[0] for place in places)
        last = load_checkpoint(f"{toy['out_dir']}/last.pt")
        found.append([records(toy["out_dir"]), last["model"], last["optimizers"]])
    for replayed, plain in zip(found[0][0], found[1][0], strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert replayed.get(name, 0) == pytest.approx(plain.get(name, 0), rel=1e-4)
    for a, b in zip(found[0][1].values(), found[1][1].values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for optimizer in found[0][2]:
        assert all(type(group["lr"]) is float for group in optimizer["param_groups"])
