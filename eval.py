"""The truth about a checkpoint: `python eval.py out/textcls` (on test), or `--text="…"` for the labels of texts.

Writes eval.json and plots (.png) beside the checkpoint: for classes the confusion matrix, for images the worst mistakes,
for a number to predict its predictions against the truth. Only this script opens the test split.

From Python: `clf = load_classifier("out/textcls"); clf(["Shares fell again"])`.
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
        self.tokenizer = c["tokenizer"] and Tokenizer.from_str(c["tokenizer"])
        self.data_folder, self.max_len, self.kind, self.scaling = (
            c[k] for k in ("data_folder", "max_len", "kind", "scaling"))

    def logits(self, examples):
        """Logits (N, n_outputs) float32 of a Dataset's examples, in their order; independent of how they are batched."""
        batches = data.eval_batches(examples.lengths, max(self.micro_batch_tokens, self.max_len))
        inputs = (examples.batch(None, indices) for _, indices, _ in batches)
        out = torch.empty(len(examples), self.model.config.n_classes)
        flip = self.config.get("flip", False)
        for (_, indices, _), logits in zip(batches, predict(self.model, inputs, self.device, self.dtype, flip)):
            out[torch.tensor(indices)] = logits
        return out

    def __call__(self, texts):
        """Texts → [{"label": str, "probabilities": {label: float}}, ...]."""
        if self.kind != "text":
            raise UserError(f"{self.path} reads {self.kind}, not text")
        ids = [e.ids or [0] for e in self.tokenizer.encode_batch_fast([data.clean(t) for t in texts])]  # GPT-2 has no [CLS]
        documents = data.PackedText(np.concatenate([[], *ids]).astype(np.int64), np.cumsum([0, *map(len, ids)]),
                                    np.zeros(len(ids), np.int64), {"n_suffix": self.n_suffix, "mask_id": None}, self.max_len)
        probabilities = self.logits(documents).double().softmax(1)
        return [{"label": self.label_names[p.argmax()], "probabilities": dict(zip(self.label_names, p.tolist()))}
                for p in probabilities]


load_classifier = Classifier


def regression_metrics(predicted, targets):
    """Of predictions and numbers (N,), in the target's unit: RMSE, MAE, and R² against the mean of `targets`."""
    error = np.asarray(predicted, np.float64) - targets
    return {"n": len(targets), "loss": float(np.mean(error**2)), "rmse": float(np.mean(error**2) ** 0.5),
            "mae": float(np.abs(error).mean()), "r2": float(1 - np.mean(error**2) / np.var(targets))}


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


def open_data(clf, split, data_dir=None):
    """The split of the data set that a Classifier was trained on. Raises UserError where that is not there or another."""
    known = {f.name for f in dataclasses.fields(data.DataConfig)}
    cfg = data.DataConfig(**{k: v for k, v in clf.config.items() if k in known})
    cfg.data_dir = data_dir or cfg.data_dir
    folder, rebuild = Path(cfg.data_dir) / clf.data_folder, data.rebuild_command(cfg)
    meta = data.read_meta(folder, f"rebuild it with: {rebuild}")
    if meta is None:
        raise UserError(f"{folder}: the checkpoint's data set is not there; give its --data_dir=…, or "
                        f"build it with: {rebuild}")
    for ours, theirs, what in ((clf.label_names, meta["label_names"], "labels are {}, not {}"),
                               (clf.tokenizer and data.tokenizer_hash(clf.tokenizer), meta.get("tokenizer_sha256"),
                                "tokenizer differs"), (clf.scaling, meta["scaling"], "scaling differs")):
        if ours != theirs:
            raise UserError(f"{clf.path} was trained on other data than {folder} is now: its {what.format(ours, theirs)}")
    return data.open_split(cfg, meta, split, clf.max_len, folder=folder)


def evaluate(clf, examples):
    """(the metrics of a Classifier on a split, its logits)."""
    logits = clf.logits(examples)
    if clf.label_names:
        return metrics(logits, examples.labels, len(clf.label_names)), logits
    scale, shift = clf.scaling["target_std"], clf.scaling["target_mean"]
    return regression_metrics(logits[:, 0].double().numpy() * scale + shift,
                              examples.labels.astype(np.float64) * scale + shift), logits


# ---------------------------------------------------------------------------------------------------------------------
# For a person: a table, plots, labels of texts


def print_report(r):
    if "r2" in r:
        print(f"{r['checkpoint']} on {r['dataset']} {r['split']}: n {r['n']}  R² {r['r2']:.4f}  RMSE {r['rmse']:.4f}  "
              f"MAE {r['mae']:.4f}")
        return
    names = [n[:20] for n in r["label_names"]]
    wide = max(map(len, names + ["class"]))
    print(f"{r['checkpoint']} on {r['dataset']} {r['split']}: n {r['n']}  accuracy {r['accuracy']:.2%}  "
          f"macro-F1 {r['macro_f1']:.4f}  loss {r['loss']:.4f}\n")
    print(f"{'class':{wide}}  precision  recall      F1  support   confusion: true in rows, predicted in columns")
    for i, (name, row) in enumerate(zip(names, r["confusion"])):
        p, rec, f1, n = (r["per_class"][k][i] for k in ("precision", "recall", "f1", "support"))
        print(f"{name:{wide}}  {p:9.4f}  {rec:6.4f}  {f1:6.4f}  {n:7}   " + " ".join(f"{c:5}" for c in row[:20]))


def plot(clf, report, examples, logits, folder):
    """Writes the .png files that say most about this kind of model; returns their names."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    written = []

    def save(figure, name):
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)
        written.append(f"{name}.png")
    names = report["label_names"]
    if not names:
        true, got = (np.asarray(v, float) * clf.scaling["target_std"] + clf.scaling["target_mean"]
                     for v in (examples.labels, logits[:, 0]))
        figure, ax = plt.subplots(figsize=(5, 5))
        ax.plot([true.min(), true.max()], [true.min(), true.max()], color="grey", linewidth=1)
        ax.scatter(true, got, s=12, alpha=0.6)
        ax.set(xlabel="true", ylabel="predicted", title=f"R² {report['r2']:.4f}, RMSE {report['rmse']:.4g}, n {report['n']}")
        save(figure, "predicted")
        return written
    confusion = np.array(report["confusion"])
    figure, ax = plt.subplots(figsize=(2 + len(names) * 0.6,) * 2)
    ax.imshow(confusion / confusion.sum(1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
    ax.set(xlabel="predicted", ylabel="true", title=f"accuracy {report['accuracy']:.2%}, n {report['n']}")
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    if len(names) <= 30:
        for i, row in enumerate(confusion):
            for j, n in enumerate(row):
                ax.text(j, i, n or "", ha="center", va="center", color="white" if n > row.sum() / 2 else "black")
    save(figure, "confusion")
    if clf.kind == "image":
        p = logits.double().softmax(1).numpy()
        surest = np.where(p.argmax(1) != examples.labels, p.max(1), 0).argsort()[::-1]
        figure, axes = plt.subplots(4, 8, figsize=(12, 7))
        for ax, i in zip(axes.flat, surest):
            ax.axis("off")
            if p[i].argmax() != examples.labels[i]:
                ax.imshow(examples.values[i].transpose(1, 2, 0).squeeze(), cmap="gray")
                ax.set_title(f"{names[examples.labels[i]]}, said {names[p[i].argmax()]} {p[i].max():.0%}", fontsize=8)
        save(figure, "mistakes")
    return written


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
        examples = open_data(clf, cfg.split, cfg.data_dir)
        figures, logits = evaluate(clf, examples)
        report = {"checkpoint": str(clf.path), "dataset": clf.config["dataset"], "split": cfg.split, "step": clf.step,
                  **figures, "label_names": clf.label_names}
        print_report(report)
        to = clf.path.parent / "eval.json"
        temporary = to.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1))
        os.replace(temporary, to)
        print(f"\nwritten: {to}, {', '.join(plot(clf, report, examples, logits, to.parent))}")


if __name__ == "__main__":
    run(main, WeightsError)
