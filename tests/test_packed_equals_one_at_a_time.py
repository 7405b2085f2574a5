"""Documents packed in one row get the outputs they get alone, whatever stands beside them."""

import re

import numpy as np
import pytest
import torch

from baselines import build_model, hash_words, ngram_bag
from model import ModelConfig, PackedLayout, Transformer, attend
from tests.conftest import packed

LENGTHS = [7, 1, 40, 40, 3, 64, 1, 22, 63, 12, 40]


def random_model(seed=0, **kw):
    torch.manual_seed(seed)
    model = Transformer(
        ModelConfig(
            **{"n_classes": 4} | kw, vocab_size=50, max_len=64, d_model=32, n_head=2, d_ff=64
        )
    )
    for p in model.parameters():  # the zero-initialised ones too, so that every weight matters
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def random_documents(lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=g).numpy() for n in lengths]


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"pooling": "max"},
        {"pooling": "cls"},
        {"pooling": "last", "causal": True},
        {"mlp": "swiglu", "qk_norm": False},
        {"mlp": "gelu", "n_layer": 1},
    ],
)
def test_packed_logits_and_hidden_states(kw, monkeypatch):
    model, documents = random_model(**kw), random_documents()
    alone = torch.cat([model(*packed([d])) for d in documents])
    hidden = torch.cat([model.hidden(*packed([d])) for d in documents])
    assert alone.std() > 0.05
    for max_waste in (0, 30, 10**9):  # a block per length, a few blocks, one block
        monkeypatch.setattr("cpu.MAX_WASTE", max_waste)
        torch.testing.assert_close(model(*packed(documents)), alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.hidden(*packed(documents)), hidden, atol=1e-5, rtol=1e-5)
        filled = model(
            *packed(documents, shape=(512, 20, 64))
        )  # the fixed shape that torch.compile gets
        torch.testing.assert_close(filled[: len(documents)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"pooling": "max", "position": "learned"},
        {"pooling": "cls"},
        {"window": 3},
        {"pooling": "last", "causal": True},
        {"lm_head": "own", "causal": True, "window": 3},
    ],
)
def test_one_length_equals_cu_seqlens(kw):
    kw = {"n_classes": 0} | kw if "lm_head" in kw else kw
    model, documents = random_model(**kw), random_documents([24] * 5)
    tokens, cu_seqlens = packed(documents)
    alone = torch.cat([model(*packed([d])) for d in documents])
    torch.testing.assert_close(model(tokens, length=24), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tokens, cu_seqlens), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
def test_filling_a_batch_up_does_not_change_the_gradient(pooling):
    documents, targets = random_documents(), torch.arange(len(LENGTHS)) % 4
    gradients = []
    for shape in (None, (512, 20, 64)):
        model = random_model(pooling=pooling)
        logits = model(*packed(documents, shape))
        wanted = torch.nn.functional.pad(targets, (0, len(logits) - len(targets)), value=-100)
        torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_packed_baselines(kind):
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(model=kind, vocab_size=50, n_classes=4, d_model=32, buckets=512, ngrams=3)
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    documents = random_documents()
    alone = torch.cat([model(*packed([d])) for d in documents])
    torch.testing.assert_close(model(*packed(documents)), alone, atol=1e-5, rtol=1e-5)
    filled = model(*packed(documents, shape=(512, 20, 64)))
    torch.testing.assert_close(filled[: len(documents)], alone, atol=1e-5, rtol=1e-5)
    swapped = model(*packed([d[[1, 0, *range(2, len(d))]] if len(d) > 1 else d for d in documents]))
    assert torch.allclose(swapped, alone, atol=1e-5) == (
        kind == "mlp"
    )  # only n-grams know about order


def test_the_linear_models_features_are_its_ngrams():
    torch.manual_seed(0)
    texts = ["the cat, the cats", "a", "x1 the-cat  sat", "é ünder the"]
    spelt = sorted({c for t in texts for c in t.encode()})
    ids = {b: i + 2 for i, b in enumerate(spelt)}
    documents = [np.array([0, *(ids[b] for b in t.encode())]) for t in texts]
    letters = tuple(ids[b] for b in spelt if b > 127 or chr(b).isalnum())
    for kw in ({}, {"letters": letters, "blanks": (0, 1, ids[32]), "char_ngrams": 3}):
        model = build_model(
            ModelConfig(model="linear", vocab_size=40, n_classes=2, buckets=2**20, ngrams=2, **kw)
        )
        torch.nn.init.normal_(model.embedding.weight)
        tokens, cu_seqlens = packed(documents)
        doc = torch.repeat_interleave(torch.arange(4), cu_seqlens.diff())
        hashes, word_doc = tokens, doc
        if kw:
            hashes, first_byte = hash_words(model.byte_class, tokens, doc)
            word_doc = doc[first_byte]
        words = (
            [d.tolist() for d in documents]
            if not kw
            else [re.findall(rb"[0-9a-z\x80-\xff]+|[^ ]", t.encode()) for t in texts]
        )
        flat = [(i, w) for i, d in enumerate(words) for w in d]
        assert word_doc.tolist() == [i for i, _ in flat]
        assert all(
            (a == b) == (v == w)
            for a, (_, v) in zip(hashes, flat)
            for b, (_, w) in zip(hashes, flat)
        )
        expected = 0
        for units, n, values in ((words, 2, hashes), (documents, 3, tokens))[: 1 + bool(kw)]:
            where = torch.repeat_interleave(torch.arange(4), torch.tensor([len(d) for d in units]))
            bucket, inside, _ = ngram_bag(values, where, n, 2**20)
            runs = [
                (i, *d[e - k : e + 1])
                for i, d in enumerate(units)
                for e in range(len(d))
                for k in range(n)
                if k <= e
            ]
            assert len(runs) == inside.sum()
            assert len({r[1:] for r in runs}) == len(
                bucket[inside].unique()
            )  # equal runs and no others share a row
            rows = [
                model.embedding(bucket[where == i][inside[where == i]]).sum(0)
                / inside[where == i].sum() ** 0.5
                for i in range(4)
            ]
            expected = expected + torch.stack(rows)
        torch.testing.assert_close(model(tokens, cu_seqlens), expected)


def test_attention_equals_its_formula():
    lengths = torch.tensor(LENGTHS)
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    q, k, v = torch.randn(3, int(cu[-1]), 2, 8, dtype=torch.float64).float()
    for causal in (False, True):
        out = attend(torch.stack((q, k, v), 1), PackedLayout(cu, len(q), 64), causal)
        for a, b in zip(cu[:-1], cu[1:]):
            s = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) / 8**0.5
            if causal:
                s = s.masked_fill(torch.ones(b - a, b - a, dtype=bool).triu(1), -torch.inf)
            torch.testing.assert_close(
                out[a:b], torch.einsum("hij,jhd->ihd", s.softmax(-1), v[a:b]), atol=1e-5, rtol=1e-5
            )


def test_first_loss_is_log_of_the_number_of_classes():
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=50, n_classes=4, max_len=64))
    logits = model(*packed(random_documents()))
    assert (logits == 0).all()  # so the loss is log 4 exactly, whatever the targets
