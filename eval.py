"""The truth about a checkpoint: `python eval.py out/textcls` (on test), or `--text="…"` for the labels of texts.

Only this script opens the test split. From Python: `clf = load_classifier("out/textcls"); clf(["Shares fell again"])`.
"""
import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer

import data
from configurator import UserError, configure, run
from model import WeightsError, build_model, find_device, load_checkpoint, load_weights, predict, save_hf


@dataclass
class Config:
    checkpoint: list[str] = field(default_factory=list)  # a run's folder (its best.pt is taken) or a checkpoint file
    split: Literal["test", "val", "train"] = "test"  # val while you still choose between models; test once, at the end
    text: list[str] = field(default_factory=list)  # label this text (repeatable); - reads lines from standard input
    export: Literal["hf"] | None = None  # hf: write a folder that transformers loads (our own trunk: that finetune.py does)
    data_dir: str | None = None  # None: where the checkpoint's data set was
    micro_batch_tokens: int = 16384  # most tokens at once; lower it when memory runs out
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is faster, and may differ in a text out of hundreds


class Classifier:
    """A checkpoint, ready to label texts. `model`, `tokenizer`, `label_names`, and the run's `config` are public."""

    def __init__(self, path, device="auto", dtype=torch.float32, micro_batch_tokens=16384):
        self.path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
        c = load_checkpoint(self.path)
        self.device, self.dtype, self.micro_batch_tokens = torch.device(find_device(device)), dtype, micro_batch_tokens
        self.model = build_model(c["model_config"])
        load_weights(self.model, c["model"], self.path)
        self.model.to(self.device).eval()
        self.label_names, self.config, self.n_suffix, self.step = c["label_names"], c["config"], c["n_suffix"], c["step"]
        self.tokenizer, self.data_folder, self.max_len = Tokenizer.from_str(c["tokenizer"]), c["data_folder"], c["max_len"]

    def logits(self, documents):
        """Logits (N, n_classes) float32 of token id arrays, in their order; independent of how they are batched."""
        lengths = [len(d) for d in documents]
        batches = data.eval_batches(lengths, max(self.micro_batch_tokens, *lengths, 0))
        packed = (data.pack([documents[i] for i in indices], [-100] * len(indices)) for _, indices, _ in batches)
        out = torch.empty(len(documents), len(self.label_names))
        for (_, indices, _), logits in zip(batches, predict(self.model, packed, self.device, self.dtype)):
            out[torch.tensor(indices)] = logits
        return out

    def __call__(self, texts):
        """Texts → [{"label": str, "probabilities": {label: float}}, ...]."""
        texts = [data.clean(t) for t in texts]
        documents = [data.cut(np.array(e.ids or [0], np.int64), self.max_len, self.n_suffix)  # [0]: GPT-2 has no [CLS]
                     for e in self.tokenizer.encode_batch_fast(texts)]
        probabilities = self.logits(documents).double().softmax(1)
        return [{"label": self.label_names[p.argmax()], "probabilities": dict(zip(self.label_names, p.tolist()))}
                for p in probabilities]


load_classifier = Classifier


def metrics(logits, targets, n_classes):
    """Of logits (N, C) and classes (N,): loss (nats), accuracy, macro F1 over the classes that occur or are predicted,
    per-class precision, recall, F1 (0 where undefined) and support, and confusion[true][predicted]."""
    logits, targets = torch.as_tensor(logits).double(), torch.as_tensor(targets)
    predicted = logits.argmax(1)
    confusion = torch.bincount(targets * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)
    hit, support, called = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    precision, recall = hit / called.clamp(min=1), hit / support.clamp(min=1)
    f1 = 2 * hit / (support + called).clamp(min=1)
    seen = (support + called) > 0
    return {"n": len(targets), "loss": torch.nn.functional.cross_entropy(logits, targets).item(),
            "accuracy": (hit.sum() / len(targets)).item(), "macro_f1": f1[seen].mean().item(),
            "per_class": {"precision": precision.tolist(), "recall": recall.tolist(), "f1": f1.tolist(),
                          "support": support.tolist()},
            "confusion": confusion.tolist()}


def evaluate(clf, split, data_dir=None):
    """The metrics of a Classifier on a split of the data set that it was trained on."""
    known = {f.name for f in dataclasses.fields(data.DataConfig)}
    cfg = data.DataConfig(**{k: v for k, v in clf.config.items() if k in known})
    cfg.data_dir = data_dir or cfg.data_dir
    folder, rebuild = Path(cfg.data_dir) / clf.data_folder, data.rebuild_command(cfg)
    meta = data.read_meta(folder, f"rebuild it with: {rebuild}")
    if meta is None:
        raise UserError(f"{folder}: the checkpoint's data set is not there; give its --data_dir=…, or "
                        f"build it with: {rebuild}")
    if meta["label_names"] != clf.label_names or meta["tokenizer_sha256"] != data.tokenizer_hash(clf.tokenizer):
        raise UserError(f"{clf.path} was trained on other data than {folder} is now: its "
                        + (f"labels are {clf.label_names}, not {meta['label_names']}"
                           if meta["label_names"] != clf.label_names else "tokenizer differs"))
    examples = data.PackedText(cfg, meta, split, clf.max_len, folder=folder)
    logits = clf.logits([examples.document(i, None) for i in range(len(examples))])
    return {"checkpoint": str(clf.path), "dataset": cfg.dataset, "split": split, "step": clf.step,
            **metrics(logits, examples.labels, len(clf.label_names)), "label_names": clf.label_names}


def print_report(r):
    names = [n[:20] for n in r["label_names"]]
    wide = max(map(len, names + ["class"]))
    print(f"{r['checkpoint']} on {r['dataset']} {r['split']}: n {r['n']}  accuracy {r['accuracy']:.2%}  "
          f"macro-F1 {r['macro_f1']:.4f}  loss {r['loss']:.4f}\n")
    print(f"{'class':{wide}}  precision  recall      F1  support   confusion: true in rows, predicted in columns")
    for i, (name, row) in enumerate(zip(names, r["confusion"])):
        p, rec, f1, n = (r["per_class"][k][i] for k in ("precision", "recall", "f1", "support"))
        print(f"{name:{wide}}  {p:9.4f}  {rec:6.4f}  {f1:6.4f}  {n:7}   " + " ".join(f"{c:5}" for c in row[:20]))


def label(clf, texts):
    """Prints a line per text: label, its probability, the others'. `-` reads standard input line by line."""
    for text in texts:
        for line in sys.stdin if text == "-" else [text]:
            if text != "-" or line.strip():
                (result,) = clf([line])
                ranked = sorted(result["probabilities"].items(), key=lambda x: -x[1])
                print("  ".join(f"{name} {p:.4f}" for name, p in ranked) + f"   {line.strip()[:60]}", flush=True)


def main():
    cfg = configure(Config, positional="checkpoint")
    if not cfg.checkpoint:
        raise UserError("which checkpoint? For instance: python eval.py out/textcls")
    for path in cfg.checkpoint:
        clf = Classifier(path, cfg.device, getattr(torch, cfg.dtype), cfg.micro_batch_tokens)
        if cfg.text:
            label(clf, cfg.text)
            continue
        if cfg.export:
            folder = clf.path.parent / "hf"
            save_hf(clf.model, folder, clf.label_names, clf.tokenizer.to_str())
            print(f"written to {folder}")
            continue
        report = evaluate(clf, cfg.split, cfg.data_dir)
        print_report(report)
        to = clf.path.parent / "eval.json"
        temporary = to.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1))
        os.replace(temporary, to)
        print(f"\nwritten to {to}")


if __name__ == "__main__":
    run(main, WeightsError)
