"""The truth about a checkpoint: `python eval.py out/textcls`. Which of several is best: `python eval.py out/a out/b out/c`.
Labels: `python eval.py out/textcls --text="…"`, or `--input=texts.csv --output=labels.csv`.

Writes eval.json, plots (.png) and report.html beside the checkpoint. Only this script opens the test split; what is fitted
(the temperature) is fitted on val. From Python: `clf = load_classifier("out/textcls"); clf(["Shares fell again"])`.
"""
import base64
import csv
import dataclasses
import gzip
import html
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import data
from configurator import UserError, configure, finish_wandb, run, start_wandb
from model import (
    Padded,
    WeightsError,
    bf16_is_native,
    build_model,
    find_device,
    flops_per_token,
    lm_losses,
    load_checkpoint,
    load_weights,
    lower,
    predict,
    save_hf,
)


@dataclass
class Config:
    checkpoint: list[str] = field(default_factory=list)  # a run's folder (its best.pt is taken) or a checkpoint file
    split: Literal["test", "val", "train"] = "test"  # val while you still choose between models; test once, at the end
    text: list[str] = field(default_factory=list)  # label this text (repeatable); - reads lines from standard input
    input: str | None = None  # label the texts of this .csv, .tsv, .jsonl (each also .gz) or .txt (one a line), in order …
    output: str | None = None  # … into this .csv
    text_column: str | int | list[str | int] = "text"  # of input
    header: bool | None = None  # of input: is the first row names? None: yes where text_column is a name
    resamples: int = 1000  # of the bootstrap that makes the intervals
    cheaper: bool = False  # True: what bfloat16, int8, torch.compile and shorter texts cost in accuracy and gain in speed
    export: Literal["hf", "pt2", "onnx"] | None = None  # hf: a folder that transformers loads (of our own trunk:
    # that finetune.py does); pt2: torch.export's format; onnx. These take (input_ids, attention_mask), padded, of any size
    wandb_mode: Literal["auto", "online", "offline", "disabled"] | None = None  # None: as the run was trained
    data_dir: str | None = None  # None: where the checkpoint's data set was
    micro_batch_tokens: int | None = None  # most tokens at once; None: 2048 on CPUs, whose cache holds them, else 16384
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # auto: float32 for figures; for labels bfloat16 where
    # that is native, which differs in a text of a thousand. int8: on CPUs, differs in a text of sixty


class Classifier:
    """A checkpoint, ready to label texts. `model`, `tokenizer`, `label_names`, and the run's `config` are public.

    dtype: torch.float32; bfloat16, or on CPUs int8, with which the model can only predict."""

    def __init__(self, path, device="auto", dtype=torch.float32, micro_batch_tokens=None):
        self.path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
        c = load_checkpoint(self.path)
        self.device, self.dtype = torch.device(find_device(device)), dtype
        self.micro_batch_tokens = micro_batch_tokens or (2048 if self.device.type == "cpu" else 16384)
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device={device} cannot be used here: {str(e).splitlines()[0]}") from None
        self.model = build_model(c["model_config"])
        load_weights(self.model, c["model"], self.path)
        self.model.to(self.device).eval()
        transformer = self.device.type == "cpu" and c["kind"] == "text" and self.model.config.model == "transformer" \
            and self.model.config.stem == "tokens"  # sums of hashed rows stay in float32
        if dtype == torch.int8 and not (transformer and hasattr(torch.ops.onednn, "qlinear_prepack")):
            raise UserError(f"--dtype=int8 is for transformers of tokens on CPUs, and a torch with oneDNN: {self.path} is a "
                            f"{self.model.config.model} model of {c['kind']}, on {self.device.type}")
        if transformer and (dtype == torch.int8 or dtype == torch.bfloat16 and bf16_is_native("cpu")):
            lower(self.model, dtype)
            self.dtype = torch.float32  # no autocast: each layer has its own
        self.config, self.n_suffix, self.step = c["config"], c["n_suffix"], c["step"]
        self.objective = self.config.get("objective", "classify")
        self.label_names = c["label_names"] if self.objective == "classify" else []
        self.tokenizer = c["tokenizer"] and Tokenizer.from_str(c["tokenizer"])
        self.data_folder, self.max_len, self.kind, self.scaling, self.data_sha256 = (
            c[k] for k in ("data_folder", "max_len", "kind", "scaling", "data_sha256"))
        self.multilabel = self.config.get("target") == "labels" and self.objective == "classify"
        self.thresholds = np.full(len(self.label_names), 0.5)
        if self.multilabel and (report := self.path.parent / "eval.json").exists():
            report = json.loads(report.read_text())
            if report["step"] == self.step and report["label_names"] == self.label_names:
                self.thresholds = np.array(report["thresholds"])  # fitted on val, for this very checkpoint

    def logits(self, examples):
        """Logits (N, n_outputs) float32 of a Dataset's examples, in their order; independent of how they are batched."""
        batches = data.eval_batches(examples.lengths, max(self.micro_batch_tokens, self.max_len))
        out = torch.empty(len(examples), self.model.config.n_classes)
        flip, cores = self.kind == "image" and self.config.get("flip", False), torch.get_num_threads()

        def work(batch):
            (logits,) = predict(self.model, [examples.batch(None, batch[1])], self.device, self.dtype, flip)
            out[torch.tensor(batch[1])] = logits
        if self.device.type != "cpu" or cores == 1 or len(batches) < 4 * cores:
            for batch in batches:
                work(batch)
            return out
        # a core for each batch keeps all of them busier than all cores for one: many operations are too small to be shared
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, batches))
        torch.set_num_threads(cores)
        return out

    def __call__(self, texts):
        """Texts → [{"label": str, "probability": float, "probabilities": {label: float}}, ...]. With --target=labels, also
        "labels": those that reach their `thresholds` (0.5, or what eval.py fitted); "label" is these joined by the data's
        separator, "probability" that of just this set, labels taken as independent. Of a text, the first 100·max_len
        characters are read: more could only count after words of a hundred letters."""
        if self.kind != "text" or self.objective != "classify":
            raise UserError(f"{self.path} " + (f"reads {self.kind}, not text" if self.kind != "text" else
                                               "is a language model; make a classifier of it with finetune.py --init_from"))
        ids = [e.ids or [0] for e in self.tokenizer.encode_batch_fast([
            data.clean(t[: 100 * self.max_len]) for t in texts])]  # GPT-2 has no [CLS]
        documents = data.PackedText(np.concatenate([[], *ids]).astype(np.int64), np.cumsum([0, *map(len, ids)]),
                                    np.zeros(len(ids), np.int64), {"n_suffix": self.n_suffix, "mask_id": None}, self.max_len)
        logits = self.logits(documents).double()
        if self.multilabel:
            p = logits.sigmoid().numpy()
            sets = [[n for n, k in zip(self.label_names, row) if k] for row in p >= self.thresholds]
            sure = np.where(p >= self.thresholds, p, 1 - p).prod(1)
            return [{"label": self.config["label_separator"].join(s), "labels": s, "probability": float(q),
                     "probabilities": dict(zip(self.label_names, row.tolist()))} for s, q, row in zip(sets, sure, p)]
        return [{"label": self.label_names[p.argmax()], "probability": float(p.max()),
                 "probabilities": dict(zip(self.label_names, p.tolist()))} for p in logits.softmax(1)]


load_classifier = Classifier


def open_classifier(path, cfg, for_labels=False):
    fast = for_labels and bf16_is_native(find_device(cfg.device))
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if fast else "float32"
    return Classifier(path, cfg.device, getattr(torch, dtype), cfg.micro_batch_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics. Of classes: from log-probabilities logp (N, C) float64 and true classes y (N,) int64


def scores(logp, y):
    """Every single-number metric, as a dict of floats. macro_f1 is over the classes that occur or are predicted; auroc the
    mean, over classes, of one against the rest (two classes: of the second; None if one class only occurs); ece the expected
    calibration error in 15 bins of equal width (Guo et al. 2017); mcc Matthews' correlation (Gorodkin 2004)."""
    n, C = logp.shape
    p, said = np.exp(logp), logp.argmax(1)
    confusion = np.bincount(y * C + said, minlength=C * C).reshape(C, C).astype(np.float64)
    hit, support, called = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1, seen = 2 * hit / np.maximum(support + called, 1), support + called > 0
    spread = ((n**2 - (called**2).sum()) * (n**2 - (support**2).sum())) ** 0.5
    areas = [a for c in (range(C) if C > 2 else [1]) if (a := auroc(p[:, c], y == c)) is not None]
    return {"accuracy": hit.sum() / n, "macro_f1": f1[seen].mean(), "micro_f1": hit.sum() / n,
            "weighted_f1": (f1 * support).sum() / n,
            "mcc": (hit.sum() * n - (support * called).sum()) / spread if spread else 0.0,
            "log_loss": -logp[np.arange(n), y].mean(), "auroc": np.mean(areas) if areas else None,
            "ece": sum(abs(right - sure) * share for sure, right, share in calibration(p, y))}


def auroc(score, positive):
    """Area under the ROC curve, ties counted half (Mann-Whitney U), or None where one class only occurs."""
    n1, n0 = positive.sum(), (~positive).sum()
    if not n1 or not n0:
        return None
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # the mean rank of equal scores
    return (rank[inverse][positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)


def calibration(p, y, bins=15):
    """[(mean confidence, accuracy, share of the examples), ...] of the bins of confidence that hold any."""
    sure, right = p.max(1), p.argmax(1) == y
    which = np.minimum((sure * bins).astype(int), bins - 1)
    n, total, hits = (np.bincount(which, w, bins) for w in (None, sure, right))
    return [(total[b] / n[b], hits[b] / n[b], n[b] / len(y)) for b in range(bins) if n[b]]


def temperature(logits, y):
    """The T that makes softmax(logits / T) likeliest (Guo et al. 2017), by bisection: the loss is convex in 1/T."""
    low, high = np.log(1e-3), np.log(1e3)
    for _ in range(60):
        b = (low + high) / 2
        p = np.exp(log_softmax(logits * np.exp(b)))
        slope = ((p * logits).sum(1) - logits[np.arange(len(y)), y]).mean()  # of the loss in 1/T
        low, high = (low, b) if slope > 0 else (b, high)
    return float(np.exp(-b))


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def regression_scores(predicted, true):
    """Of predictions and numbers (N,), in the target's unit; R² is against the mean of `true`."""
    error = predicted - true
    return {"rmse": np.mean(error**2) ** 0.5, "mae": np.abs(error).mean(),
            "r2": 1 - np.mean(error**2) / max(np.var(true), 1e-12)}


def intervals(score, a, b, resamples, seed=0):
    """The 95 % percentile-bootstrap interval (Efron 1979) of each metric that score(a, b) returns: {name: [low, high]}."""
    rng, n, drawn = np.random.default_rng(seed), len(b), []
    for _ in range(resamples):
        i = rng.integers(n, size=n)
        drawn.append(score(a[i], b[i]))
    columns = {k: [d[k] for d in drawn if d[k] is not None] for k in drawn[0]} if drawn else {}
    return {k: [float(q) for q in np.quantile(v, [0.025, 0.975])] for k, v in columns.items() if v}


def metrics(logits, targets, n_classes):
    """What eval.json says of logits (N, C) and classes (N,): `scores`, loss (nats), and per class precision, recall, F1 (0
    where undefined) and support, and confusion[true][predicted]."""
    logits, y = np.asarray(logits, np.float64), np.asarray(targets)
    logp = log_softmax(logits)
    confusion = np.bincount(y * n_classes + logp.argmax(1), minlength=n_classes**2).reshape(n_classes, n_classes)
    hit, support, called = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    figures = scores(logp, y)
    return {"n": len(y), "loss": float(figures["log_loss"]), **{k: v if v is None else float(v) for k, v in figures.items()},
            "per_class": {"precision": (hit / np.maximum(called, 1)).tolist(),
                          "recall": (hit / np.maximum(support, 1)).tolist(),
                          "f1": (2 * hit / np.maximum(support + called, 1)).tolist(), "support": support.tolist()},
            "confusion": confusion.tolist()}


# Of several labels: from logits z (N, C) float64 and multi-hot y (N, C)


def label_scores(z, y, thresholds=0.5):
    """Every single-number metric of giving the labels whose probability is ≥ thresholds, a number or (C,). accuracy is the
    share of examples with all labels right, hamming_loss that of wrong decisions among all N·C, log_loss the mean over them;
    macro_f1 is over the labels that occur or are given, samples_f1 over the examples (1 where none is true and none given),
    auroc over the labels for which it is defined."""
    said, true = sigmoid(z) >= thresholds, y.astype(bool)
    both = said & true
    size = said.sum(1) + true.sum(1)  # of each example; below, of each label
    samples = np.where(size, 2 * both.sum(1) / np.maximum(size, 1), 1.0)
    size, hit = said.sum(0) + true.sum(0), both.sum(0)
    f1 = 2 * hit / np.maximum(size, 1)
    areas = [a for c in range(z.shape[1]) if (a := auroc(z[:, c], true[:, c])) is not None]
    return {"accuracy": (said == true).all(1).mean(), "hamming_loss": (said != true).mean(),
            "micro_f1": 2 * hit.sum() / max(size.sum(), 1), "macro_f1": f1[size > 0].mean() if size.any() else 0.0,
            "weighted_f1": (f1 * true.sum(0)).sum() / max(true.sum(), 1), "samples_f1": samples.mean(),
            "log_loss": (np.logaddexp(0, z) - true * z).mean(), "auroc": np.mean(areas) if areas else None}


def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))


def label_metrics(z, y, thresholds=0.5):
    """What eval.json says of logits (N, C) and multi-hot y (N, C): `label_scores`, loss (nats), and of each label precision,
    recall, F1 (0 where undefined), support and AUROC (None where undefined)."""
    z, true = np.asarray(z, np.float64), np.asarray(y).astype(bool)
    said, figures = sigmoid(z) >= thresholds, label_scores(z, true, thresholds)
    hit, support, called = (said & true).sum(0), true.sum(0), said.sum(0)
    areas = [auroc(z[:, c], true[:, c]) for c in range(z.shape[1])]
    return {"n": len(z), "loss": float(figures["log_loss"]), **{k: v if v is None else float(v) for k, v in figures.items()},
            "per_class": {"precision": (hit / np.maximum(called, 1)).tolist(),
                          "recall": (hit / np.maximum(support, 1)).tolist(),
                          "f1": (2 * hit / np.maximum(support + called, 1)).tolist(), "support": support.tolist(),
                          "auroc": [a if a is None else float(a) for a in areas]}}


def f1_thresholds(z, y):
    """The threshold of each label's probability, (C,), with the highest F1 on logits z and multi-hot y (N, C): half-way
    between the two probabilities that it parts; 0.5 of a label that does not occur. One per label, as the best is half the
    F1 that it reaches (Lipton et al. 2014), in which labels differ."""
    thresholds = []
    for p, true in zip(sigmoid(np.asarray(z, np.float64)).T, np.asarray(y).T):
        order = np.argsort(-p)
        p, n = np.append(p[order], 0), len(p)
        f1 = 2 * np.cumsum(true[order], dtype=float) / (np.arange(1, n + 1) + true.sum())
        f1[p[:-1] == p[1:]] = -1  # equal probabilities are not parted
        k = f1.argmax()
        thresholds.append((p[k] + p[k + 1]) / 2 if true.any() else 0.5)
    return np.array(thresholds)


def fit_thresholds(z, y, resamples=50):
    """The mean of `f1_thresholds` over bootstrap resamples of (z, y): those of the sample itself follow its chance peaks,
    and did worse on other examples in 8 comparisons of 8 (NOTES.md)."""
    z, y, rng = np.asarray(z, np.float64), np.asarray(y), np.random.default_rng(0)
    return np.mean([f1_thresholds(z[i], y[i]) for i in rng.integers(len(z), size=(resamples, len(z)))], 0)


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint on a split


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
    labels = meta["label_names"] if clf.objective == "classify" else []
    for ours, theirs, what in ((clf.label_names, labels, "labels are {}, not {}"),
                               (clf.tokenizer and data.tokenizer_hash(clf.tokenizer), meta.get("tokenizer_sha256"),
                                "tokenizer differs"), (clf.scaling, meta["scaling"], "scaling differs"),
                               (clf.data_sha256, meta["sha256"], "files differ: what is test now may have been train")):
        if ours != theirs:
            raise UserError(f"{clf.path} was trained on other data than {folder} is now: its {what.format(ours, theirs)}")
    language = {k: clf.config[k] for k in ("objective", "mask_prob")} if clf.objective != "classify" else {}
    return data.open_split(cfg, meta, split, clf.max_len, folder=folder, **language)


def truth(clf, y):
    """The label of a class, or of a row of a multi-hot matrix: all its labels, joined."""
    if not clf.multilabel:
        return clf.label_names[y]
    return clf.config["label_separator"].join(n for n, k in zip(clf.label_names, y) if k)


def hits(clf, z, y):
    """(N,) bool: which of logits z (N, C) say the class that y has, or all its labels and no other."""
    return ((z >= 0) == y).all(1) if clf.multilabel else z.argmax(1) == y


def numbers(clf, values):
    """Standardised targets or outputs in the target's own unit."""
    return np.asarray(values, np.float64) * clf.scaling["target_std"] + clf.scaling["target_mean"]


def language_scores(sums, n, n_bytes):
    """Of blocks: sums (N, 2) of their losses in nats and of their right guesses, and their numbers of targets (N,).
    bits_per_byte is clm's: per byte of text, however that was made tokens, if nothing of it was lost."""
    nats, right = sums.sum(0) / n.sum()
    return {"loss": nats, "perplexity": np.exp(nats), "token_accuracy": right} | (
        {"bits_per_byte": sums[:, 0].sum() / np.log(2) / n_bytes} if n_bytes else {})


def language_report(clf, cfg):
    """What eval.json says of a language model: `language_scores` over a whole split, intervals over its blocks."""
    examples = open_data(clf, cfg.split, cfg.data_dir)
    batches = data.eval_batches(examples.lengths, max(clf.micro_batch_tokens, clf.max_len))
    sums, n = np.zeros((len(examples), 2)), np.zeros(len(examples))
    for _, indices, _ in tqdm(batches, unit=" batches"):
        tokens, cu_seqlens, *where, targets = batch = examples.batch(None, indices)
        ((nats, right),) = lm_losses(clf.model, [batch], clf.device, clf.dtype)
        place = where[0] if where else torch.arange(len(tokens))
        block = np.array(indices)[torch.bucketize(place, cu_seqlens[1:], right=True)[targets >= 0]]
        for column, values in ((sums[:, 0], nats), (sums[:, 1], right), (n, torch.ones_like(nats))):
            np.add.at(column, block, values.numpy())

    def score(sums, n):
        return language_scores(sums, n, examples.n_bytes * n.sum() / total if examples.objective == "clm" else 0)
    total = n.sum()
    return {"checkpoint": str(clf.path), "dataset": clf.config["dataset"], "split": cfg.split, "step": clf.step,
            "n": int(total), **{k: float(v) for k, v in score(sums, n).items()}, "label_names": [],
            "interval": intervals(score, sums, n, min(cfg.resamples, max(100, 20_000_000 // len(examples))))}


def evaluate(clf, examples):
    """(the metrics of a Classifier on a split, its logits)."""
    logits = clf.logits(examples)
    if clf.multilabel:
        return label_metrics(logits, examples.labels), logits
    if clf.label_names:
        return metrics(logits, examples.labels, len(clf.label_names)), logits
    figures = regression_scores(numbers(clf, logits[:, 0]), numbers(clf, examples.labels))
    return {"n": len(examples), "loss": float(figures["rmse"] ** 2), **{k: float(v) for k, v in figures.items()}}, logits


def full_report(clf, cfg):
    """(everything that is known of a checkpoint on cfg.split, for eval.json; the examples; their logits)."""
    if clf.objective != "classify":
        return language_report(clf, cfg), None, None
    examples = open_data(clf, cfg.split, cfg.data_dir)
    figures, logits = evaluate(clf, examples)
    report = {"checkpoint": str(clf.path), "dataset": clf.config["dataset"], "split": cfg.split, "step": clf.step, **figures,
              "label_names": clf.label_names}
    resamples = min(cfg.resamples, max(100, 20_000_000 // len(examples)))  # what takes seconds
    if not clf.label_names:
        predicted, true = numbers(clf, logits[:, 0]), numbers(clf, examples.labels)
        report["interval"] = intervals(regression_scores, predicted, true, resamples)
        return report, examples, logits
    y, z = examples.labels, logits.double().numpy()
    if cfg.split == "test":
        train = open_data(clf, "train", cfg.data_dir)
        seen = {content(train, i) for i in range(len(train))}
        new = np.array([content(examples, i) not in seen for i in range(len(examples))])
        report["in_train"] = {"share": float(1 - new.mean()),
                              "accuracy_without": float(hits(clf, z, y)[new].mean()) if new.any() else None}
    if clf.multilabel:
        resamples = min(resamples, max(100, 20_000_000 // z.size))
        report["interval"] = intervals(label_scores, z, y, resamples)
        wrong = np.abs(sigmoid(z) - y)
        val = open_data(clf, "val", cfg.data_dir)
        t = fit_thresholds(clf.logits(val), val.labels)
        report["thresholds"] = t.tolist()
        if cfg.split != "val":
            report["at_thresholds"] = label_metrics(z, y, t) | {
                "interval": intervals(lambda z, y: label_scores(z, y, t), z, y, resamples)}
        report["mistakes"] = [{"true": truth(clf, y[i]), "predicted": truth(clf, z[i] >= 0),
                               "probability": float(wrong[i].max()), "example": int(i),
                               "text": clf.tokenizer.decode(examples.document(i, None).tolist())}
                              for i in wrong.max(1).argsort()[::-1][:20] if wrong[i].max() >= 0.5]
        return report, examples, logits
    logp = log_softmax(z)
    p = np.exp(logp)
    report["interval"] = intervals(scores, logp, y, resamples)
    report["calibration"] = calibration(p, y)
    if cfg.split != "val":
        val = open_data(clf, "val", cfg.data_dir)
        T = temperature(clf.logits(val).double().numpy(), val.labels)
        cooled = log_softmax(z / T)
        warmed = scores(cooled, y)
        report["temperature"] = {"fitted_on_val": T, "log_loss": warmed["log_loss"], "ece": warmed["ece"],
                                 "calibration": calibration(np.exp(cooled), y)}
    worst = np.where(z.argmax(1) != y, p.max(1), 0).argsort()[::-1][:20]
    report["mistakes"] = [{"true": clf.label_names[y[i]], "predicted": clf.label_names[z[i].argmax()],
                           "probability": float(p[i].max()), "example": int(i)}
                          | ({"text": clf.tokenizer.decode(examples.document(i, None).tolist())} if clf.tokenizer else {})
                          for i in worst if z[i].argmax() != y[i]]
    return report, examples, logits


def content(examples, i):
    """An example's bytes, for comparing: a text's whole, not what is cut off at max_len."""
    if isinstance(examples, data.PackedText):
        return examples.tokens[examples.starts[i] : examples.starts[i + 1]].tobytes()
    return examples.values[i].tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Several checkpoints


def compare(paths, cfg):
    """Prints a table of runs and a plain sentence on which is best; runs that differ in the seed alone are one row.

    p-values: two-sided, of a paired bootstrap over the examples (of the mean over seeds); for single runs also McNemar's
    exact test (1947). Latency is that of one example at a time, throughput that of the whole split."""
    rows, expected = {}, None
    for path in paths:
        clf = open_classifier(path, cfg)
        if not clf.label_names:
            raise UserError(f"{path}: is no classifier; only classifiers can be compared")
        examples = open_data(clf, cfg.split, cfg.data_dir)
        names = [truth(clf, y) for y in examples.labels]
        if expected is not None and names != expected:
            raise UserError(f"{path}: its {cfg.split} split has other examples or labels than that of {paths[0]}: "
                            "only runs on the same split of the same data can be compared")
        expected = names
        started = time.perf_counter()
        logits = clf.logits(examples).double().numpy()
        seconds = time.perf_counter() - started
        alone = []
        for i in np.random.default_rng(0).integers(len(examples), size=100):
            started = time.perf_counter()
            next(predict(clf.model, [examples.batch(None, np.array([i]))], clf.device, clf.dtype))
            alone.append(1000 * (time.perf_counter() - started))
        settings = {k: v for k, v in clf.config.items() if k not in ("seed", "out_dir", "overwrite")}
        key, fraction = json.dumps(settings), settings.pop("train_fraction", 1.0)
        curve = json.dumps({k: v for k, v in settings.items() if k not in ("epochs", "max_steps", "eval_interval")})
        metrics_file = clf.path.parent / "metrics.jsonl"
        elapsed = [r["elapsed_s"] for r in map(json.loads, open(metrics_file)) if "elapsed_s" in r] \
            if metrics_file.exists() else []
        length = float(np.mean(examples.lengths))
        with torch.device("meta"):
            whole = build_model(clf.model.config)  # in int8 a model has other parameters
        rows.setdefault(key, []).append({
            "name": str(path), "fraction": fraction, "curve": curve, "right": hits(clf, logits, examples.labels),
            "macro_f1": (label_scores(logits, examples.labels) if clf.multilabel else
                         scores(log_softmax(logits), examples.labels))["macro_f1"],
            "parameters": sum(p.numel() for p in whole.parameters()),
            "mflop": flops_per_token(whole, length) * (length if clf.kind != "features" else 1) / 3e6,
            "train_s": elapsed[-1] if elapsed else math.nan, "per_s": len(examples) / seconds,
            "p50": np.quantile(alone, 0.5), "p95": np.quantile(alone, 0.95), "mb": clf.path.stat().st_size / 1e6,
            "peak": peak_memory(path, cfg)})
    groups = sorted(rows.values(), key=lambda g: -np.mean([r["right"].mean() for r in g]))
    wide = max(len(g[0]["name"]) for g in groups) + 6
    print(f"{'run':{wide}}  accuracy [95 % interval]     macro-F1  parameters  MFLOP/ex  train s     ex/s   p50 ms   p95 ms"
          "  memory MB  disk MB   p against the best")
    best, table, resamples = np.mean([r["right"] for r in groups[0]], 0), [], max(cfg.resamples, 100)
    for g in groups:
        right = np.mean([r["right"] for r in g], 0)
        low, high = intervals(lambda a, b: {"m": a.mean()}, right, right, resamples)["m"]
        p, mcnemar = paired(best, right, resamples)
        first, mean = g[0], {k: float(np.mean([r[k] for r in g])) for k in ("train_s", "per_s", "p50", "p95", "peak")}
        name = first["name"] + (f" (×{len(g)})" if len(g) > 1 else "")
        f1 = np.mean([r["macro_f1"] for r in g])
        note = "" if g is groups[0] else f"{p:.3f}" + (f", McNemar {mcnemar:.3f}" if len(g) == len(groups[0]) == 1 else "")
        print(f"{name:{wide}}  {right.mean():7.2%} [{low:7.2%}, {high:7.2%}]  {f1:9.4f}  {first['parameters']:10,}  "
              f"{first['mflop']:8.2f}  {mean['train_s']:7.1f}  {mean['per_s']:7.0f}  {mean['p50']:7.2f}  "
              f"{mean['p95']:7.2f}  {mean['peak']:9.0f}  {first['mb']:7.1f}   {note}")
        table.append((name, right.mean(), p, mean["per_s"]))
    sentences = []
    for name, accuracy, p, per_s in table[1:]:
        faster = per_s / table[0][3]
        speed = f" and {faster:.1f}× as fast" if faster > 1.2 else f", at {faster:.1f}× its speed" if faster < 0.8 else ""
        gap = 100 * (table[0][1] - accuracy)
        sentences.append(f"{table[0][0]} is better than {name} by {gap:.1f} points, p = {p:.3f}" if p < 0.05 else
                         f"{name} cannot be told from {table[0][0]} (behind by {gap:.1f} points, p = {p:.2f}){speed}")
    print("\n" + ("; ".join(sentences) or "these are seeds of one config: there is nothing to compare") + ".")
    curves = {}
    for g in groups:
        curves.setdefault(g[0]["curve"], {}).setdefault(g[0]["fraction"], g)
    if len(groups) == sum(map(len, curves.values())) and min(map(len, curves.values())) > 1:
        learning_curve(curves.values(), len(open_data(clf, "train", cfg.data_dir)), clf.path.parent.parent, resamples)


def learning_curve(curves, n_train, folder, resamples):
    """Of {train_fraction: runs} of one or several models: writes folder/learning_curve.png, accuracy against the labels
    used, and prints what the last step of each gained, and what it comes to for each doubling."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def mean(x):  # with its 95 % interval, in %
        return [100 * x.mean(), *(100 * np.array(intervals(lambda a, b: {"m": a.mean()}, x, x, resamples)["m"]))]
    figure, ax = plt.subplots(figsize=(6, 4))
    for runs in curves:
        fractions, groups = zip(*sorted(runs.items()))
        labels, name = [round(f * n_train) for f in fractions], Path(groups[-1][0]["name"]).name
        right = [np.mean([r["right"] for r in g], 0) for g in groups]
        accuracy, low, high = np.array([mean(x) for x in right]).T
        ax.errorbar(labels, accuracy, [accuracy - low, high - accuracy], marker="o", capsize=4, label=name)
        gain, low, high = mean(right[-1] - right[-2])
        pace = gain / math.log2(labels[-1] / labels[-2])
        print(f"{name}: from {labels[-2]:,} to {labels[-1]:,} labels, accuracy changed by {gain:+.1f} points (95 % interval "
              f"{low:+.1f} to {high:+.1f}), {pace:+.1f} for each doubling: " + (
                  "more labels would help, if by less and less" if low > 0 else
                  "that more labels would help cannot be told from luck"))
    ax.set(xlabel="labels trained on", ylabel="accuracy, %", xscale="log")
    ax.set_xticks(labels, [f"{n:,}" for n in labels])
    ax.minorticks_off()
    ax.legend()
    figure.savefig(folder / "learning_curve.png", dpi=110, bbox_inches="tight")
    print(f"Written to {folder / 'learning_curve.png'}")


def peak_memory(path, cfg):
    """MB by which loading a checkpoint and computing the split's logits raise the peak of a fresh process's resident memory;
    NaN where the system is not Linux. (Not getrusage's ru_maxrss, which a process inherits from its parent.)"""
    code = ("import json, sys; sys.path.insert(0, sys.argv[3]); from eval import *\n"
            "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1e3\n"
            "cfg, before = Config(**json.loads(sys.argv[2])), peak(); clf = open_classifier(sys.argv[1], cfg)\n"
            "clf.logits(open_data(clf, cfg.split, cfg.data_dir)); print(peak() - before)")
    command = [sys.executable, "-c", code, path, json.dumps(dataclasses.asdict(cfg)), str(Path(__file__).resolve().parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else math.nan


def cheaper(path, cfg):
    """Prints a table of the ways to compute less: their accuracy on cfg.split, and how many examples a second they do."""
    clf = Classifier(path, cfg.device, micro_batch_tokens=cfg.micro_batch_tokens)
    if not clf.label_names:
        raise UserError(f"{path}: is no classifier; --cheaper=True is for classifiers")
    longest = int(open_data(clf, cfg.split, cfg.data_dir).lengths.max()) if clf.kind == "text" else 0
    ways = [("float32", {}), ("bfloat16", {"dtype": torch.bfloat16}), ("int8", {"dtype": torch.int8}), ("torch.compile", {})]
    ways += [(f"first {longest // k} of {longest} tokens", {"max_len": longest // k}) for k in (2, 4) if longest // k > 2]
    print(f"{path} on {clf.config['dataset']} {cfg.split}\n{'':26}accuracy  other labels      ex/s  speed-up")
    exact = None
    for name, changes in ways:
        try:
            clf = Classifier(path, cfg.device, changes.get("dtype", torch.float32), cfg.micro_batch_tokens)
            clf.max_len = changes.get("max_len", clf.max_len)
            examples = open_data(clf, cfg.split, cfg.data_dir)
            if name == "torch.compile":
                clf.model.compile(dynamic=True)
            clf.logits(examples)  # warms up, compiles
            started = time.perf_counter()
            z = clf.logits(examples).numpy()
            per_s = len(examples) / (time.perf_counter() - started)
            said = z >= 0 if clf.multilabel else z.argmax(1)[:, None]
        except (UserError, RuntimeError) as e:
            print(f"{name:26}not here: {str(e).splitlines()[0][:90]}")
            continue
        exact = (said, per_s) if exact is None else exact
        right, other = hits(clf, z, examples.labels).mean(), (said != exact[0]).any(1).mean()
        print(f"{name:26}{right:8.2%}  {other:12.2%}  {per_s:8.0f}  "
              f"{per_s / exact[1]:7.2f}×", flush=True)


def paired(a, b, resamples):
    """(p of a paired bootstrap, p of McNemar's exact test) that a and b (N,), 1 where right, have the same mean."""
    rng, d = np.random.default_rng(0), a - b
    drawn = np.array([d[rng.integers(len(d), size=len(d))].mean() for _ in range(resamples)])
    p = min(1.0, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()) + 1 / resamples)
    n, k = int((d != 0).sum()), int(min((d > 0).sum(), (d < 0).sum()))
    return p, min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# For a person: a table, plots, a page


def print_report(r):
    interval = {k: f" [{low:.4f}, {high:.4f}]" for k, (low, high) in r["interval"].items()}
    print(f"{r['checkpoint']} on {r['dataset']} {r['split']}: n {r['n']}, with 95 % intervals")
    if not r["label_names"]:
        print("  " + "  ".join(f"{k} {r[k]:.4f}{v}" for k, v in interval.items()))
        return
    print("  " + "  ".join(f"{k} {r[k]:.4f}{interval.get(k, '')}" for k in (
        ("micro_f1", "macro_f1", "samples_f1", "accuracy", "hamming_loss")
        if "hamming_loss" in r else ("accuracy", "macro_f1", "mcc"))))
    if "hamming_loss" in r:
        print_labels(r)
        return
    print("  " + "  ".join(f"{k} {r[k]:.4f}{interval.get(k, '')}" for k in ("log_loss", "auroc", "ece") if r[k] is not None))
    if "temperature" in r:
        t = r["temperature"]
        print(f"  temperature {t['fitted_on_val']:.2f} (fitted on val): log_loss {t['log_loss']:.4f}  ece {t['ece']:.4f}")
    if "in_train" in r:
        print(f"  also in train: {r['in_train']['share']:.2%} of it")
    names = [n[:20] for n in r["label_names"]]
    wide = max(map(len, names + ["class"]))
    print(f"\n{'class':{wide}}  precision  recall      F1  support   confusion: true in rows, predicted in columns")
    for i, (name, row) in enumerate(zip(names, r["confusion"])):
        p, rec, f1, n = (r["per_class"][k][i] for k in ("precision", "recall", "f1", "support"))
        print(f"{name:{wide}}  {p:9.4f}  {rec:6.4f}  {f1:6.4f}  {n:7}   " + " ".join(f"{c:5}" for c in row[:20]))


def print_labels(r):
    """Of several labels: one row each, at probability 0.5 and at the thresholds fitted on val."""
    if t := r.get("at_thresholds"):
        print("  at thresholds fitted on val, which --text and --input now use too:\n  " + "  ".join(
            f"{k} {t[k]:.4f} [{low:.4f}, {high:.4f}]" for k, (low, high) in t["interval"].items() if k in (
                "micro_f1", "macro_f1", "samples_f1", "accuracy", "hamming_loss")))
    names, rows = [n[:20] for n in r["label_names"]], r["per_class"]
    wide = max(map(len, names + ["label"]))
    print(f"\n{'label':{wide}}  precision  recall      F1   AUROC  support" + "   threshold      F1 there" * (t is not None))
    for i, name in enumerate(names):
        area = math.nan if rows["auroc"][i] is None else rows["auroc"][i]
        print(f"{name:{wide}}  {rows['precision'][i]:9.4f}  {rows['recall'][i]:6.4f}  {rows['f1'][i]:6.4f}  {area:6.4f}  "
              f"{rows['support'][i]:7}" + (f"   {r['thresholds'][i]:9.4f}  {t['per_class']['f1'][i]:12.4f}" if t else ""))


def plot(clf, report, examples, logits, folder):
    """Writes the .png files that say most about this kind of model, and report.html with them in it; returns their names."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a label may hold dollars
    from matplotlib import pyplot as plt
    written = []

    def save(figure, name):
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        written.append(f"{name}.png")
    names = report["label_names"]
    if clf.multilabel:
        figure, ax = plt.subplots(figsize=(6, min(1 + len(names) * 0.35, 30)))
        for i, (at, r) in enumerate((("0.5", report), ("the thresholds fitted on val", report.get("at_thresholds")))):
            if r:
                ax.barh(np.arange(len(names)) + 0.35 * i, r["per_class"]["f1"], 0.35,
                        label=f"at {at}: macro {r['macro_f1']:.3f}")
        ax.set_yticks(np.arange(len(names)) + 0.17, [f"{n} ({k})" for n, k in zip(names, report["per_class"]["support"])])
        ax.invert_yaxis()
        ax.set(xlabel="F1", xlim=(0, 1))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
        save(figure, "labels")
    elif names:
        p, right = logits.double().softmax(1).numpy(), logits.argmax(1).numpy() == examples.labels
        confusion = np.array(report["confusion"])
        figure, ax = plt.subplots(figsize=(min(2 + len(names) * 0.6, 20),) * 2)
        ax.imshow(confusion / confusion.sum(1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
        ax.set(xlabel="predicted", ylabel="true", title=f"accuracy {report['accuracy']:.2%}, n {report['n']}")
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names)
        if len(names) <= 30:
            for i, row in enumerate(confusion):
                for j, n in enumerate(row):
                    ax.text(j, i, n or "", ha="center", va="center", color="white" if n > row.sum() / 2 else "black")
        save(figure, "confusion")
        figure, ax = plt.subplots(figsize=(5, 5))
        ax.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for label, bins in (("as trained", report["calibration"]),
                            ("with temperature", report.get("temperature", {}).get("calibration"))):
            if bins:
                ax.plot([b[0] for b in bins], [b[1] for b in bins], marker="o", markersize=4, label=label)
        ax.set(xlabel="confidence", ylabel="share right", title=f"calibration: ECE {report['ece']:.4f}")
        ax.legend()
        save(figure, "reliability")
        figure, ax = plt.subplots(figsize=(6, 4))
        order = p.max(1).argsort()[::-1]
        ax.plot(np.arange(1, len(order) + 1) / len(order), np.cumsum(right[order]) / np.arange(1, len(order) + 1))
        ax.set(xlabel="share of the examples that are answered, the surest first", ylabel="accuracy of these")
        save(figure, "coverage")
        if clf.kind == "text" and len(np.unique(examples.lengths)) > 4:
            edges = np.unique(np.quantile(examples.lengths, np.linspace(0, 1, 7)))
            which = np.clip(np.searchsorted(edges, examples.lengths, "right") - 1, 0, len(edges) - 2)
            figure, ax = plt.subplots(figsize=(6, 4))
            n, hits = (np.bincount(which, w, len(edges) - 1) for w in (None, right))
            ax.bar([f"{a:.0f}–{b:.0f}\n(n {k})" for a, b, k in zip(edges, edges[1:], n.astype(int))], hits / n.clip(min=1))
            ax.set(xlabel="tokens", ylabel="accuracy", ylim=(max(0, (hits / n.clip(min=1)).min() - 0.1), 1))
            save(figure, "length")
        if clf.kind == "image":
            figure, axes = plt.subplots(4, 8, figsize=(12, 7))
            surest = np.where(right, 0, p.max(1)).argsort()[::-1]
            for ax, i in zip(axes.flat, surest):
                ax.axis("off")
                if not right[i]:
                    ax.imshow(examples.values[i].transpose(1, 2, 0).squeeze(), cmap="gray")
                    ax.set_title(f"{names[examples.labels[i]]}, said {names[p[i].argmax()]} {p[i].max():.0%}", fontsize=8)
            save(figure, "mistakes")
    elif "r2" in report:
        true, got = numbers(clf, examples.labels), numbers(clf, logits[:, 0])
        figure, ax = plt.subplots(figsize=(5, 5))
        ax.plot([true.min(), true.max()], [true.min(), true.max()], color="grey", linewidth=1)
        ax.scatter(true, got, s=12, alpha=0.6)
        ax.set(xlabel="true", ylabel="predicted", title=f"R² {report['r2']:.4f}, RMSE {report['rmse']:.4g}, n {report['n']}")
        save(figure, "predicted")
    if (folder / "metrics.jsonl").exists():
        records = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        figure, ax = plt.subplots(figsize=(6, 4))
        for key in ("loss", "val_loss"):
            ax.plot(*zip(*[(r["step"], r[key]) for r in records if key in r]), label=key)
        ax.set(xlabel="step", ylabel="loss", yscale="log")
        ax.legend()
        save(figure, "curves")
    write_page(report, folder, written)
    return [*written, "report.html"]


def write_page(r, folder, pictures):
    """report.html: the figures, the pictures and the worst mistakes on one page that needs no other file."""
    def table(head, rows):
        def line(cells, tag):
            cells = (html.escape(f"{c:.4f}" if isinstance(c, float) else str(c)) for c in cells)
            return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"
        return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
    parts = [f"<h1>{html.escape(r['checkpoint'])}</h1><p>{html.escape(r['dataset'])}, {r['split']}, {r['n']} examples</p>",
             table(("metric", "value", "95 % interval"), [(k, r[k], f"{low:.4f} – {high:.4f}")
                                                          for k, (low, high) in r["interval"].items()])]
    if "temperature" in r:
        t = r["temperature"]
        parts.append(f"<p>With temperature {t['fitted_on_val']:.2f}, fitted on val: log-loss {t['log_loss']:.4f}, ECE "
                     f"{t['ece']:.4f}.</p>")
    if t := r.get("at_thresholds"):
        parts.append("<p>With thresholds fitted on val:</p>" + table(("metric", "value", "95 % interval"), [
            (k, t[k], f"{low:.4f} – {high:.4f}") for k, (low, high) in t["interval"].items()]) + table(
            ("label", "threshold", "F1"), zip(r["label_names"], r["thresholds"], t["per_class"]["f1"])))
    if "in_train" in r:
        without = r["in_train"]["accuracy_without"]
        parts.append(f"<p>{r['in_train']['share']:.2%} of the examples also stand in train; accuracy without them: "
                     f"{'–' if without is None else f'{without:.2%}'}.</p>")
    if r["label_names"]:
        parts.append(table(("class", "precision", "recall", "F1", "support"), zip(
            r["label_names"], *(r["per_class"][k] for k in ("precision", "recall", "f1", "support")))))
    for name in pictures:
        content = base64.b64encode((folder / name).read_bytes()).decode()
        parts.append(f'<img alt="{name.removesuffix(".png")}" src="data:image/png;base64,{content}">')
    if any("text" in m for m in r.get("mistakes", ())):
        parts.append("<h2>The surest mistakes</h2>" + table(("true", "predicted", "probability", "text"), [
            (m["true"], m["predicted"], m["probability"], m["text"][:600]) for m in r["mistakes"]]))
    style = ("body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}img{max-width:100%;"
             "margin:1em 1em 0 0;vertical-align:top}table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px "
             "solid #ddd;padding:.2em .8em;text-align:left;vertical-align:top}")
    write(folder / "report.html", f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(r['checkpoint'])}"
          f"</title><style>{style}</style>" + "\n".join(parts) + "</html>")


def log_to_wandb(clf, report, folder, pictures, mode):
    """Adds the figures to the training run's summary in W&B, and tables and pictures to its page."""
    settings = clf.config | {"out_dir": str(folder)} | ({"wandb_mode": mode} if mode else {})
    if settings["wandb_mode"] == "disabled":
        return
    last = folder / "last.pt"
    if not (wandb_run := start_wandb(settings, load_checkpoint(last)["run_id"] if last.exists() else None)):
        return
    import wandb
    split = report["split"]
    wandb_run.summary.update({f"{split}_{k}": v for k, v in report.items() if isinstance(v, (int, float))})
    logged = {f"{split}_{name.removesuffix('.png')}": wandb.Image(str(folder / name)) for name in pictures}
    if report["label_names"]:
        columns = ["precision", "recall", "f1", "support"]
        logged[f"{split}_per_class"] = wandb.Table(["class", *columns], [list(row) for row in zip(
            report["label_names"], *(report["per_class"][k] for k in columns))])
        columns = ["true", "predicted", "probability", "example", "text"]
        logged[f"{split}_mistakes"] = wandb.Table(columns, [[m.get(k) for k in columns] for m in report["mistakes"]])
    wandb_run.log(logged)
    finish_wandb(wandb_run)


def write(path, text):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Labels for texts


def label(clf, texts):
    """Prints a line per text: label, its probability, the others'. `-` reads standard input line by line."""
    for text in texts:
        n, lines = 0, data.decoded(sys.stdin.buffer, "standard input", "utf-8", None) if text == "-" else [(1, text)]
        for _, line in lines:
            if text != "-" or line.strip():
                n += 1
                (result,) = clf([line])
                ranked = sorted(result["probabilities"].items(), key=lambda x: -x[1])
                print(f"{result['label'] or 'none'}: " * clf.multilabel + "  ".join(f"{name} {p:.4f}" for name, p in ranked)
                      + f"   {line.strip()[:60]}", flush=True)
        if not n:
            raise UserError("standard input: holds no texts")


def chunks(texts):
    """Lists of up to 4096 texts, or a million characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if len(chunk) == 4096 or size > 1_000_000:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def label_file(clf, cfg):
    """Writes cfg.output: label and its probability of each text of cfg.input, in order; memory stays flat."""
    if not cfg.output:
        raise UserError("--input needs --output=labels.csv")
    source = data.DataConfig(text_column=cfg.text_column, header=cfg.header, drop_bad_rows=True,
                             label_column=cfg.text_column[0] if isinstance(cfg.text_column, list) else cfg.text_column)
    if not Path(cfg.input).is_file():
        raise UserError(f"--input={cfg.input}: no such file")
    if cfg.input.endswith((".txt", ".txt.gz")):
        opener = gzip.open if cfg.input.endswith(".gz") else open
        texts = (text.rstrip("\r\n") for _, text in data.decoded(opener(cfg.input, "rb"), cfg.input, "utf-8", None))
    else:
        texts = (text for _, text, _ in data.rows(cfg.input, source))
    temporary, n = Path(f"{cfg.output}.tmp"), 0
    try:
        with open(temporary, "w", newline="", encoding="utf-8") as f, tqdm(unit=" texts") as bar:
            table = csv.writer(f)
            table.writerow(["label", "probability"])
            for chunk in chunks(t[: 100 * clf.max_len] for t in texts):
                for r in clf(chunk):
                    table.writerow([r["label"], f"{r['probability']:.6f}"])
                n += len(chunk)
                bar.update(len(chunk))
        if not n:
            raise UserError(f"{cfg.input}: holds no texts")
        os.replace(temporary, cfg.output)
    except OSError as e:
        raise UserError(f"--output={cfg.output}: cannot be written to: {e.strerror}") from e
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{n} texts labelled: {cfg.output}")


def export(clf, cfg):
    """Writes model.pt2 or model.onnx beside the checkpoint, if what is loaded from it agrees with clf on examples of val."""
    kind, folder = clf.model.config.model, clf.path.parent
    if clf.kind == "text" and (kind != "transformer" or clf.model.config.stem == "words"):
        what = "transformer with stem=words" if kind == "transformer" else f"{kind} model of text"
        raise UserError(f"{clf.path}: a {what} cannot be written as {cfg.export}; transformers of tokens, and models of "
                        "images and of numbers, can")
    if cfg.export == "onnx":
        try:
            import onnxruntime
            import onnxscript  # noqa: F401 (what torch.onnx.export needs)
        except ImportError as e:
            raise UserError("--export=onnx needs packages that are not here: pip install onnx onnxscript onnxruntime") from e
    model = Padded(clf.model).eval() if kind == "transformer" and clf.kind == "text" else clf.model
    examples = open_data(clf, "val", cfg.data_dir)
    some = np.argsort(examples.lengths, kind="stable")[np.linspace(0, len(examples) - 1, min(48, len(examples))).astype(int)]
    some = np.resize(some, max(len(some), 3))
    (expected,) = predict(clf.model, [examples.batch(None, some)], clf.device, clf.dtype)

    def arguments(indices):
        if clf.kind != "text":
            return (examples.batch(None, indices)[0],)
        ids = [torch.from_numpy(examples.document(i, None)) for i in indices]
        return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, [torch.ones_like(d) for d in ids]))
    names = ["input_ids", "attention_mask"] if clf.kind == "text" else ["pixels" if clf.kind == "image" else "x"]
    size = {0: torch.export.Dim("batch")} | ({1: torch.export.Dim("length")} if clf.kind == "text" else {})
    temporary = folder / f"model.tmp.{cfg.export}"
    try:
        program = torch.export.export(model, arguments(some[-3:]), dynamic_shapes=(size,) * len(names))
        if cfg.export == "pt2":
            torch.export.save(program, temporary)
            loaded = torch.export.load(temporary).module()
        else:
            torch.onnx.export(program, f=temporary, input_names=names, output_names=["logits"], dynamo=True,
                              external_data=False, verbose=False)
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

            def loaded(*x):
                return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in zip(names, x)})[0])
        with torch.no_grad():
            got = torch.cat([loaded(*arguments(some[:1])), loaded(*arguments(some[1:]))])
        error = float((got - expected).abs().max())
        if not error <= 1e-4:
            raise UserError(f"{clf.path}: what was written as {cfg.export} computes other logits, by {error:.1e}, so it was "
                            "not kept")
        os.replace(temporary, folder / f"model.{cfg.export}")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"written to {folder}/model.{cfg.export}: ({', '.join(names)}) → logits, on {len(some)} examples of val within "
          f"{error:.1e} of the checkpoint's")


def main():
    cfg = configure(Config, positional="checkpoint")
    if not cfg.checkpoint:
        raise UserError("which checkpoint? For instance: python eval.py out/textcls")
    if len(cfg.checkpoint) > 1 and not (cfg.text or cfg.input or cfg.export or cfg.cheaper):
        compare(cfg.checkpoint, cfg)
        return
    for path in cfg.checkpoint:
        if cfg.cheaper:
            cheaper(path, cfg)
            continue
        clf = Classifier(path, "cpu") if cfg.export else open_classifier(path, cfg, cfg.text or cfg.input)
        if cfg.text:
            label(clf, cfg.text)
        elif cfg.input:
            label_file(clf, cfg)
        elif cfg.export:
            if clf.objective != "classify":
                raise UserError(f"{path} is a language model; make a classifier of it with finetune.py --init_from")
            if cfg.export != "hf":
                export(clf, cfg)
                continue
            if clf.kind != "text":
                raise UserError(f"{path} reads {clf.kind}; only text classifiers can be written as a Hugging Face folder")
            folder = clf.path.parent / "hf"
            save_hf(clf.model, folder, clf.label_names, clf.tokenizer.to_str(), clf.multilabel)
            print(f"written to {folder}")
        else:
            report, examples, logits = full_report(clf, cfg)
            print_report(report)
            folder = clf.path.parent
            write(folder / "eval.json", json.dumps(report, indent=1))
            names = plot(clf, report, examples, logits, folder)
            print(f"\nwritten to {folder}: eval.json, {', '.join(names)}")
            log_to_wandb(clf, report, folder, [n for n in names if n.endswith(".png")], cfg.wandb_mode)


if __name__ == "__main__":
    run(main, WeightsError)
