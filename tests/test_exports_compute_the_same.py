"""A model that is exported computes what the checkpoint does, on batches of other sizes than it
was exported with."""

from configurator import UserError

import pytest
import torch

import train
from export import Padded, export
from model import ModelConfig, Transformer
from predict import Classifier, open_data
from tests.conftest import packed
from tests.test_packed_equals_one_at_a_time import random_documents, random_model
from tests.test_published_weights_mean_the_same import CONFIGS, reference
from weights import from_pretrained

TOLERANCE = dict(atol=1e-4, rtol=1e-4)


def padded(documents):
    ids = [torch.as_tensor(d) for d in documents]
    return tuple(
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
        for x in (ids, [torch.ones_like(d) for d in ids])
    )


@pytest.mark.parametrize(
    "kw", [*CONFIGS, *(dict(pooling=p) for p in ("mean", "max", "cls", "last"))], ids=str
)
def test_padded_equals_packed_at_any_size(tmp_path, kw):
    if isinstance(kw, str):
        reference(kw).save_pretrained(tmp_path)
        model = from_pretrained(tmp_path)
    else:
        model = random_model(**kw).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(
        Padded(model), padded(random_documents([9, 4])), dynamic_shapes=(sizes, sizes)
    ).module()
    for lengths in ([7, 1, 40, 40, 3, 50], [22], [1], [58, 2]):
        documents = random_documents(lengths)
        torch.testing.assert_close(
            exported(*padded(documents)), model(*packed(documents)), **TOLERANCE
        )


def test_images():
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(image_size=(1, 8, 8), patch=4, n_classes=3, d_model=32, n_head=2, d_ff=64)
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=sizes)
    x = torch.rand(7, 1, 8, 8) * 255
    torch.testing.assert_close(exported.module()(x), model(x), **TOLERANCE)


def logits_of(clf, run):
    """(run's logits of test, the checkpoint's)."""
    examples = open_data(clf, "test")
    return run(*padded([examples.document(i, None) for i in range(len(examples))])), clf.logits(
        examples
    )


def test_pt2_of_a_run(toy):
    train.train(train.Config(**toy))
    clf = Classifier(toy["out_dir"])
    export(clf, "pt2")
    torch.testing.assert_close(
        *logits_of(clf, torch.export.load(f"{toy['out_dir']}/model.pt2").module()), **TOLERANCE
    )


def test_onnx_of_a_run(toy):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    train.train(train.Config(**toy))
    clf = Classifier(toy["out_dir"])
    export(clf, "onnx")
    session = runtime.InferenceSession(f"{toy['out_dir']}/model.onnx")
    torch.testing.assert_close(
        *logits_of(
            clf,
            lambda ids, mask: torch.from_numpy(
                session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[
                    0
                ]
            ),
        ),
        **TOLERANCE,
    )


def test_what_differs_is_not_kept_and_a_bag_of_ngrams_is_refused(toy, monkeypatch, tmp_path):
    train.train(train.Config(**toy))
    clf = Classifier(toy["out_dir"])
    monkeypatch.setattr(Padded, "forward", lambda self, ids, mask: mask.sum(1)[:, None].float())
    with pytest.raises(UserError, match="computes other logits, by .*, so it was not kept"):
        export(clf, "pt2")
    assert not list((tmp_path / "out").glob("*.pt2"))
    train.train(train.Config(**toy | dict(model="linear", overwrite=True)))
    with pytest.raises(UserError, match="a linear model of text cannot be written as pt2"):
        export(Classifier(toy["out_dir"]), "pt2")
