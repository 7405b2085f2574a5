"""Documents packed in one row get the outputs they get alone, whatever stands beside them."""
import pytest
import torch

import data
from model import Layout, ModelConfig, Transformer, attend

LENGTHS = [7, 1, 40, 40, 3, 64, 1, 22, 63, 12, 40]


def random_model(seed=0, **kw):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=50, n_classes=4, max_len=64, d_model=32, n_head=2, d_ff=64, **kw))
    for p in model.parameters():  # the zero-initialised ones too, so that every weight matters
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def random_documents(lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=g).numpy() for n in lengths]


def packed(documents, shape=None):
    return data.pack(documents, [0] * len(documents), shape)[:2]


@pytest.mark.parametrize("kw", [{}, {"pooling": "max"}, {"pooling": "cls"}, {"pooling": "last", "causal": True},
                                {"mlp": "swiglu", "qk_norm": False}, {"mlp": "gelu", "n_layer": 1}])
def test_packed_logits_and_hidden_states(kw, monkeypatch):
    model, documents = random_model(**kw), random_documents()
    alone = torch.cat([model(*packed([d])) for d in documents])
    hidden = torch.cat([model.hidden(*packed([d])) for d in documents])
    assert alone.std() > 0.05
    for max_waste in (0, 30, 10**9):  # a block per length, a few blocks, one block
        monkeypatch.setattr("model.MAX_WASTE", max_waste)
        torch.testing.assert_close(model(*packed(documents)), alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.hidden(*packed(documents)), hidden, atol=1e-5, rtol=1e-5)
        filled = model(*packed(documents, shape=(512, 20, 64)))  # the fixed shape that torch.compile gets
        torch.testing.assert_close(filled[: len(documents)], alone, atol=1e-5, rtol=1e-5)


def test_attention_equals_its_formula():
    lengths = torch.tensor(LENGTHS)
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    q, k, v = torch.randn(3, int(cu[-1]), 2, 8, dtype=torch.float64).float()
    for causal in (False, True):
        out = attend(q, k, v, Layout(cu, len(q), 64), causal)
        for a, b in zip(cu[:-1], cu[1:]):
            s = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) / 8**0.5
            if causal:
                s = s.masked_fill(torch.ones(b - a, b - a, dtype=bool).triu(1), -torch.inf)
            torch.testing.assert_close(out[a:b], torch.einsum("hij,jhd->ihd", s.softmax(-1), v[a:b]), atol=1e-5, rtol=1e-5)


def test_first_loss_is_log_of_the_number_of_classes():
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=50, n_classes=4, max_len=64))
    logits = model(*packed(random_documents()))
    assert (logits == 0).all()  # so the loss is log 4 exactly, whatever the targets


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_varlen_kernel_agrees():
    model, documents = random_model().cuda(), random_documents()
    with torch.autocast("cuda", torch.bfloat16):
        together = model(*(t.cuda() for t in packed(documents, shape=(512, 20, 64))))[: len(documents)].float()
    expected = random_model()(*packed(documents))
    assert (together.cpu() - expected).abs().max() < 0.05 * expected.std()
