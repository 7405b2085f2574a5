"""Labels computed in bfloat16 or int8 are those of float32, but for texts on the edge; what
cannot be is refused."""

import copy

from configurator import UserError

import pytest
import torch

import train
from cpu import quantize_for_inference
from eval import Config, compare_cheaper
from predict import Classifier, open_data
from tests.conftest import packed
from tests.test_packed_equals_one_at_a_time import random_documents, random_model
from tests.test_published_weights_mean_the_same import reference
from weights import from_pretrained

BF16 = torch.cpu._is_avx512_bf16_supported()
INT8_ERROR = 0.06 if torch.cpu._is_vnni_supported() else 0.1  # inputs in 8 bits, or in 7


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.02), (torch.int8, INT8_ERROR)])
@pytest.mark.parametrize(
    "name",
    # random weights of more layers are further off, transformers' own in bfloat16 too
    ["ours", "bert", "roberta", "distilbert", "modernbert", "modernbert-mean", "gpt2", "llama"],
)
def test_logits_are_close(tmp_path, name, dtype, error):
    if dtype == torch.bfloat16 and not BF16:
        pytest.skip("this processor computes no bfloat16")
    model = random_model()
    if name != "ours":
        reference(name).save_pretrained(tmp_path)
        model = from_pretrained(tmp_path)
    inputs = packed(random_documents([7, 1, 40, 40, 3, 50, 1, 22]))
    low = copy.deepcopy(model).eval()
    quantize_for_inference(low, dtype, BF16)
    with torch.no_grad():
        exact, got = model.eval()(*inputs), low(*inputs)
    assert (got - exact).square().mean().sqrt() < error * exact.std() and got.dtype == torch.float32


def test_labels_are_the_same(toy):
    train.train(train.Config(**toy | dict(epochs=6.0)))
    texts = [f"{'goal ' * (i % 9)} {'bank ' * (i % 7)} {'chip ' * (i % 5)}{i}" for i in range(200)]
    exact = [
        max(r["probabilities"].items(), key=lambda x: x[1])
        for r in Classifier(toy["out_dir"])(texts)
    ]
    for dtype in (torch.bfloat16, torch.int8):
        labels = [r["label"] for r in Classifier(toy["out_dir"], dtype=dtype)(texts)]
        assert all(a == b for a, (b, p) in zip(labels, exact) if p > 0.55)


def test_the_table_of_cheaper_ways_holds_what_each_scores(toy, capsys):
    train.train(train.Config(**toy))
    capsys.readouterr()
    compare_cheaper(toy["out_dir"], Config(split="train"))
    rows = {
        line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()[2:]
    }
    clf = Classifier(toy["out_dir"])
    examples = open_data(clf, "train")
    said, longest = clf.logits(examples).argmax(1).numpy(), max(examples.lengths)
    assert (
        rows["float32"][:2] == [f"{(said == examples.labels).mean():.2%}", "0.00%"]
        and rows["float32"][3] == "1.00×"
    )
    clf.max_len = int(longest) // 4
    short = clf.logits(open_data(clf, "train")).argmax(1).numpy()
    assert rows[f"first {longest // 4} of {longest} tokens"][:2] == [
        f"{(short == examples.labels).mean():.2%}",
        f"{(short != said).mean():.2%}",
    ]
    assert {"bfloat16", "int8", "torch.compile", f"first {longest // 2} of {longest} tokens"} < set(
        rows
    )


def test_int8_is_refused_where_it_cannot_be(toy):
    train.train(train.Config(**toy | dict(model="linear")))
    with pytest.raises(
        UserError,
        match="--dtype=int8 is for transformers of tokens on CPUs, .* is a linear model of text",
    ):
        Classifier(toy["out_dir"], dtype=torch.int8)


@pytest.mark.skipif(not BF16, reason="this processor computes no bfloat16")
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_our_own_trunk_says_the_same_from_small_embeddings_too(std):
    """The residual stream is in bfloat16 then, and so small that the norm's eps matters."""
    torch.manual_seed(0)
    model = random_model(n_layer=2)
    torch.nn.init.normal_(model.embedding.weight, std=std)
    batch = packed(random_documents())
    low = copy.deepcopy(model)
    quantize_for_inference(low, torch.bfloat16, True)
    with torch.no_grad():
        exact, got = model(*batch), low(*batch)
    assert (got - exact).square().mean().sqrt() < 0.03 * exact.std()
