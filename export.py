"""A checkpoint as a Hugging Face folder, ONNX, or pt2, checked against the checkpoint."""
import io

from configurator import UserError, replacing

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from huggingface import save_hf
from model import DenseLayout
from predict import open_data
from tasks import run_model


class Padded(nn.Module):
    """A Transformer of text as other programs call it: (input_ids (B, L) int64, attention_mask
    (B, L), 1 at a document's tokens, which stand first, and 0 at padding) → logits (B, n_classes).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        valid = attention_mask.expand_as(input_ids).bool()  # tells torch.export of equal sizes
        layout = DenseLayout(*input_ids.shape, input_ids.device, valid)
        return self.model.classify(self.model.embedding(input_ids.flatten()), layout)


def export(clf, how, data_dir=None):
    """Write the folder hf, or model.pt2, or model.onnx, beside a Classifier's checkpoint. Raises
    UserError where that format cannot compute what the checkpoint does."""
    if clf.is_language_model and how != "hf":
        raise UserError(f"{clf.path} is a language model, which can be written as hf only; make a "
                        "classifier of it with finetune.py --init_from")
    if how == "hf":
        if clf.modality != "text":
            raise UserError(f"{clf.path} reads {clf.modality}; only models of text can be written "
                            "as a Hugging Face folder")
        folder = clf.path.parent / "hf"
        tokenizer = clf.tokenizer
        if not clf.is_language_model and clf.model.config.family != "ours":
            tokenizer = with_cleaning(tokenizer)
        save_hf(clf.model, folder, clf.label_names, tokenizer.to_str(), clf.multilabel,
                clf.scaling, clf.max_len)
        print(f"written to {folder}")
        return
    if clf.pair:
        raise UserError(f"{clf.path} reads pairs of texts, which are exported as hf only")
    model_name = clf.model.config.model
    is_text = clf.modality == "text"
    if is_text and model_name != "transformer":
        raise UserError(f"{clf.path}: a {model_name} model of text cannot be written as {how}; "
                        "transformers of tokens, and models of images and of numbers, can")
    write = write_pt2 if how == "pt2" else write_onnx
    model = Padded(clf.model).eval() if is_text else clf.model
    examples = open_data(clf, "val", data_dir, optional=True)
    examples = examples or open_data(clf, "train", data_dir)
    some = spread_by_length(examples.lengths)
    batch = examples.batch(None, some)
    expected = run_model(clf.model, batch, clf.device, clf.dtype)

    def inputs_of(indices):
        if not is_text:
            return (examples.batch(None, indices).inputs[0],)
        ids = [torch.from_numpy(examples.document(i)) for i in indices]
        masks = [torch.ones_like(document) for document in ids]
        return pad_sequence(ids, batch_first=True), pad_sequence(masks, batch_first=True)
    names = ["x"]
    sizes = {0: torch.export.Dim("batch")}
    if clf.modality == "image":
        names = ["pixels"]
    if is_text:
        names = ["input_ids", "attention_mask"]
        sizes = sizes | {1: torch.export.Dim("length")}
    path = clf.path.parent / f"model.{how}"
    program = torch.export.export(model, inputs_of(some[-3:]),
                                  dynamic_shapes=(sizes,) * len(names))
    with replacing(path) as temporary:
        loaded = write(program, temporary, names)
        with torch.no_grad():  # in two batches of other sizes than the one it was made with
            logits = torch.cat([loaded(*inputs_of(some[:1])), loaded(*inputs_of(some[1:]))])
        error = float((logits - expected).abs().max())
        if not error <= 1e-4:
            raise UserError(f"{clf.path}: what was written as {how} computes other logits, by "
                            f"{error:.1e}, so it was not kept")
    print(f"written to {path}: ({', '.join(names)}) → logits, on {len(some)} examples "
          f"within {error:.1e} of the checkpoint's")


def with_cleaning(tokenizer):
    """A tokenizer that first does to a text what values.clean does before ours reads it.
    Blanks at the ends are stripped only where the tokenizer does not drop them itself, because that
    step also strips around special tokens that are written in a text."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy
    steps = [normalizers.Replace(Regex(r"\r\n?"), "\n"), normalizers.NFC(),
             normalizers.Replace(Regex(r"[\x0b\x0c\x1c-\x1f]"), " "),
             normalizers.Replace(Regex(r"[\x00-\x08\x0e-\x1b\x7f]"), "")]
    if tokenizer.encode(" \n a \n ").ids != tokenizer.encode("a").ids:
        steps.append(normalizers.Strip())
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def spread_by_length(lengths):
    """Indices of up to 48 examples, three at least, from the shortest to the longest."""
    n = len(lengths)
    order = np.argsort(lengths, kind="stable")
    some = order[np.linspace(0, n - 1, min(48, n)).astype(int)]
    return np.resize(some, max(len(some), 3))


def write_pt2(program, path, names):
    """Write an exported program; returns what is loaded from it."""
    buffer = io.BytesIO()  # where the disk is full, torch.export.save(program, path) aborts
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    return torch.export.load(path).module()


def write_onnx(program, path, names):
    """As write_pt2, in ONNX."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (what torch.onnx.export needs)
    except ImportError as error:
        raise UserError("--export=onnx needs packages that are not here: "
                        "pip install onnx onnxscript onnxruntime") from error
    torch.onnx.export(program, f=path, input_names=names, output_names=["logits"], dynamo=True,
                      external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs):
        arrays = {name: x.numpy() for name, x in zip(names, inputs)}
        return torch.from_numpy(session.run(None, arrays)[0])
    return run
