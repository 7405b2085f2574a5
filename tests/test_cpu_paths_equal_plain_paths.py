"""Each fast path of cpu.py computes what its plain twin computes: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

import baselines
import cpu
import model
from model import DenseLayout, PackedLayout, attend, dropout, rms_norm

LENGTHS = [40, 40, 17, 1, 0, 5, 5, 64]


def layouts():
    """(layout, tokens) of ragged documents, one of them empty, and of documents of one length."""
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = PackedLayout(cu_seqlens, sum(LENGTHS), 64)
    return {
        "packed": (packed, sum(LENGTHS)),
        "dense": (DenseLayout(4, 24, torch.device("cpu")), 96),
    }


def plainly(monkeypatch):
    """From here on no fast path is taken."""
    monkeypatch.setattr(cpu, "attends", lambda qkv, layout: False)
    monkeypatch.setattr(cpu, "handles", lambda x: False)


def used_rows(layout, first_only):
    """The rows of attention's output that are defined."""
    if first_only and not layout.same_length:
        return layout.lengths > 0
    return slice(None)


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 5, 50])
@pytest.mark.parametrize("first_only", [False, True])
def test_attention_and_its_gradient(layout, causal, window, first_only, monkeypatch):
    layout, n_tokens = layouts()[layout]
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(n_tokens, 3, 2, 8, generator=g, dtype=torch.float64)
    rows = used_rows(layout, first_only)
    for max_waste in (0, 30, 10**9):  # a block per length, a few blocks, one block
        results = []
        with monkeypatch.context() as m:
            m.setattr(cpu, "MAX_WASTE", max_waste)
            layout.__dict__.pop("on_cpu", None)
            for fast in (True, False):
                if not fast:
                    plainly(m)
                x = qkv.clone().requires_grad_()
                y = attend(x, layout, causal, window, first_only)[rows]
                (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
                results.append([y.detach(), x.grad])
        torch.testing.assert_close(*results, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first_only", [False, True])
def test_attention_in_bfloat16(layout, causal, first_only, monkeypatch):
    """With and without a gradient, up to bfloat16's rounding."""
    layout, n_tokens = layouts()[layout]
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(n_tokens, 3, 2, 8, generator=g).bfloat16()
    weight = torch.randn(n_tokens, 2, 8, generator=g)
    rows = used_rows(layout, first_only)
    fast = qkv.clone().requires_grad_()
    y = attend(fast, layout, causal, 0, first_only)[rows]
    if layout.same_length and causal and not first_only:
        assert type(y.grad_fn.next_functions[0][0]).__name__ == "CausalAttentionBackward"
    (y * weight[: len(y)].to(y.dtype)).sum().backward()
    with torch.no_grad():
        predicted = attend(qkv, layout, causal, 0, first_only)[rows]
    plainly(monkeypatch)
    exact = qkv.double().requires_grad_()
    expected = attend(exact, layout, causal, 0, first_only)[rows]
    (expected * weight[: len(expected)]).sum().backward()
    for got, want in ((y, expected), (predicted, expected), (fast.grad, exact.grad)):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("causal, window", [(False, 0), (True, 0), (False, 5), (True, 5)])
def test_attention_for_prediction_with_windows(causal, window, monkeypatch):
    layout, n_tokens = layouts()["packed"]
    qkv = torch.randn(n_tokens, 3, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        got = attend(qkv, layout, causal, window)
    plainly(monkeypatch)
    exact = attend(qkv.float(), layout, causal, window)
    torch.testing.assert_close(got.float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [3, 0.003])
@pytest.mark.parametrize("dtype, atol", [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 0.02)])
def test_rms_norm(weighted, scale, dtype, atol, monkeypatch):
    torch.manual_seed(0)
    dtype, results = getattr(torch, dtype), []
    x, grad = torch.randn(7, 2, 16, dtype=dtype) * scale, torch.randn(7, 2, 16, dtype=dtype)
    w = torch.linspace(0.5, 2, 16, dtype=dtype)
    for fast in (True, False):
        if not fast:
            plainly(monkeypatch)
        inputs = [x.clone().requires_grad_(), w.clone().requires_grad_() if weighted else None]
        y = rms_norm(*inputs)
        y.backward(grad)
        results.append([y, *(i.grad for i in inputs if i is not None)])
    torch.testing.assert_close(*results, atol=atol * 30 / min(scale, 1), rtol=atol * 3)


def test_dropout_drops_the_share_it_is_told_and_keeps_the_mean():
    """As F.dropout: it cannot draw the same elements, but as many, and scaled as much."""
    x = torch.ones(1000, 1001, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.3, training=True)
    kept, n = y != 0, x.numel()
    assert abs(kept.sum() - 0.7 * n) < 5 * (n * 0.21) ** 0.5  # binomial
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7), atol=1e-4, rtol=0)
    neighbours = (kept[:, 1:] & kept[:, :-1]).float().mean()  # independent, though drawn in fours
    assert abs(neighbours - 0.49) < 0.002
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3, training=True), y)
    assert dropout(x, 0.999999, training=True).isfinite().all()
    assert dropout(x, 0.3, training=False) is x and dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("sparse", [False, True])
def test_sums_of_embeddings(sparse, monkeypatch):
    table = torch.nn.Embedding(50, 3).double()
    rows, count = torch.randint(50, (40,)), torch.tensor([7, 0, 30, 3])
    grad = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.stack([part.sum(0) for part in table(rows).split(count.tolist())])
    (expected_grad,) = torch.autograd.grad(expected, table.weight, grad)
    for fast in (True, False):
        if not fast:
            plainly(monkeypatch)
        sums = baselines.embedding_bag_sum(table.weight, rows, count, sparse)
        torch.testing.assert_close(sums, expected)
        (got,) = torch.autograd.grad(sums, table.weight, grad)
        assert got.is_sparse == sparse
        torch.testing.assert_close(got.to_dense(), expected_grad)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.01), (torch.int8, 0.02)])
@pytest.mark.parametrize("gelu", ["", "none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear(dtype, error, gelu, bias):
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor computes no bfloat16")
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96, bias=bias)
    x = torch.randn(40, 64)
    with torch.no_grad():
        expected = linear(x)
        if gelu:
            expected = F.gelu(expected, approximate=gelu)
        inputs = x.bfloat16() if dtype == torch.bfloat16 else x
        got = cpu.PackedLinear(linear, dtype, gelu)(inputs).float()
    assert (got - expected).norm() < error * expected.norm()


def test_a_whole_model_is_the_same_without_any_fast_path(monkeypatch):
    torch.manual_seed(0)
    config = model.ModelConfig(
        vocab_size=50, n_classes=4, max_len=64, d_model=32, n_head=2, d_ff=64
    )
    transformer = model.Transformer(config).double()
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens = torch.randint(50, (sum(LENGTHS),))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    results = []
    for fast in (True, False):
        if not fast:
            plainly(monkeypatch)
        transformer.zero_grad()
        logits = transformer(tokens, cu_seqlens)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in transformer.parameters())])
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-7)
