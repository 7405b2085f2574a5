"""The truth about a checkpoint, and which of several is best.

    python eval.py out/textcls                   # every figure with its 95 % interval, and plots
    python eval.py out/a out/b out/c             # one table, and whether the difference is luck
    python eval.py out/textcls --cheaper=True    # what bfloat16, int8, … cost and gain
    python eval.py out/textcls --export=onnx     # or pt2, hf: checked against the checkpoint

Writes eval.json, plots (.png) and report.html beside the checkpoint. Only this script opens the
test split; what is fitted (temperature, thresholds) is fitted on val.
"""
import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configurator import UserError, configure, read_json, run, write_json

import numpy as np
import torch
from tqdm import tqdm

import metrics
from baselines import build_model
from batches import eval_requests
from examples import Request
from labelling import labelled_examples
from predict import Classifier, open_classifier, open_data
from report import (
    log_to_wandb,
    plot_comparison,
    plot_learning_curves,
    plot_report,
    print_report,
    write_page,
)
from runs import finish_wandb, read_records, saved_facts, start_wandb
from speed import flops_per_token
from tasks import run_model, token_losses
from weights import checkpoint_file


@dataclass
class Config:
    checkpoint: list[str] = field(default_factory=list)  # runs' folders (their best.pt is taken) or
    #   checkpoint files
    split: Literal["test", "val", "train"] = "test"  # val while you still choose between models;
    #   test once, at the end
    test_file: str | None = None  # evaluate on this labelled file instead of a split; it is read
    #   as the run's own files were, and compared with its train
    drop_bad_rows: bool = False  # of test_file: True: leave out rows that cannot be read
    impute: bool | None = None  # of test_file; None: as the run's own files were read
    resize: Literal["no", "crop", "fit"] | None = None  # of test_file: pictures of other sizes
    long: Literal["head", "head+tail", "windows"] = "head"  # of texts longer than max_len: the
    #   start; half of it and the end; or all of it, in windows whose logits are averaged
    resamples: int = 1000  # of the bootstrap that makes the intervals
    cheaper: bool = False  # True: what bfloat16, int8, torch.compile and shorter texts cost in
    #   accuracy and gain in speed
    export: Literal["hf", "pt2", "onnx"] | None = None  # hf: a folder that transformers loads (of
    #   our own trunk: that finetune.py does); pt2: torch.export's format; onnx. These take
    #   (input_ids, attention_mask), padded, of any size
    wandb_mode: Literal["auto", "online", "offline", "disabled"] | None = None  # None: as the run
    #   was trained
    wandb_texts: bool = True  # False: the mistakes go to W&B without their texts
    data_dir: str | None = None  # None: where the checkpoint's data set was
    micro_batch_tokens: int | None = None  # most tokens at once; None: 2048 on CPUs, whose cache
    #   holds them, else 16384
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # auto: float32


def open_examples(clf, cfg):
    """What a checkpoint is evaluated on: cfg.test_file, or a split."""
    if cfg.test_file:
        return labelled_examples(clf, cfg.test_file, cfg)
    return open_data(clf, cfg.split, cfg.data_dir)


# --------------------------------------------------------------------------------------------------
# One checkpoint on a split


def full_report(clf, cfg):
    """(everything that is known of a checkpoint on cfg.split, for eval.json; the examples; their
    logits (N, C) float64, None of a language model)."""
    if cfg.test_file and clf.is_language_model:
        raise UserError(f"{clf.path} is a language model; --test_file is for labelled files")
    split = cfg.test_file or cfg.split
    examples = open_examples(clf, cfg)
    report = {"checkpoint": str(clf.path), "dataset": clf.config["dataset"], "split": split,
              "step": clf.step, "label_names": clf.label_names}
    size = len(examples) * max(1, len(clf.label_names))
    resamples = metrics.affordable_resamples(cfg.resamples, size)
    if clf.is_language_model:
        return report | report_language(clf, examples, resamples), examples, None
    z = clf.logits(examples).double().numpy()
    report |= basic_report(clf, z, examples.labels, resamples)
    if not clf.label_names:
        return report, examples, z
    if split not in ("val", "train"):
        report["in_train"] = report_overlap(clf, cfg, examples, z)
    val = None
    if split != "val" or clf.multilabel:
        val = open_data(clf, "val", cfg.data_dir, optional=True)
    if clf.multilabel:
        report |= report_labels(clf, cfg, examples, z, val, resamples)
    else:
        report |= report_classes(clf, examples, z, val)
    return report, examples, z


def basic_report(clf, z, y, resamples=0):
    """What metrics.py says of logits z (N, C) and the data set's labels y, with intervals if there
    are resamples."""
    if clf.multilabel:
        return metrics.label_report(z, y, resamples=resamples)
    if clf.label_names:
        return metrics.class_report(z, y, resamples)
    return metrics.number_report(metrics.own_unit(z[:, 0], clf.scaling),
                                 metrics.own_unit(y, clf.scaling), resamples)


def report_classes(clf, examples, z, val):
    """Calibration, a temperature fitted on val (None: z is val's, or there is none), mistakes."""
    y = examples.labels
    logp = metrics.log_softmax(z)
    predicted = z.argmax(1)
    report = {"calibration": metrics.calibration(logp, y)}
    if val is not None:
        T = metrics.temperature(clf.logits(val).double().numpy(), val.labels)
        scaled = metrics.log_softmax(z / T)
        bins = metrics.calibration(scaled, y)
        report["temperature"] = {
            "fitted_on_val": T, "log_loss": -float(scaled[np.arange(len(y)), y].mean()),
            "ece": float(metrics.calibration_error(bins)), "calibration": bins}
    confidence = np.where(predicted != y, np.exp(logp.max(1)), 0)  # of mistakes
    report["mistakes"] = [
        mistake(clf, examples, i, clf.label_names[predicted[i]], confidence[i])
        for i in confidence.argsort()[::-1][:20] if predicted[i] != y[i]]
    return report


def report_labels(clf, cfg, examples, z, val, resamples):
    """Thresholds fitted on val (None: there is none) and what they reach, mistakes."""
    y = examples.labels
    report = {}
    if val is not None:
        thresholds = metrics.fit_thresholds(clf.logits(val), val.labels)
        report["thresholds"] = thresholds.tolist()
        if cfg.test_file or cfg.split != "val":
            report["at_thresholds"] = metrics.label_report(z, y, thresholds, resamples)
    error = np.abs(metrics.sigmoid(z) - y).max(1)
    report["mistakes"] = [mistake(clf, examples, i, clf.truth(z[i] >= 0), error[i])
                          for i in error.argsort()[::-1][:20] if error[i] >= 0.5]
    return report


def mistake(clf, examples, i, predicted, probability):
    entry = {"true": clf.truth(examples.labels[i]), "predicted": predicted,
             "probability": float(probability), "example": int(i)}
    if clf.tokenizer:
        entry["text"] = clf.tokenizer.decode(examples.document(i).tolist())
    return entry


def report_overlap(clf, cfg, examples, z):
    """The share of the examples that stand in train too, and the accuracy without them."""
    train = open_data(clf, "train", cfg.data_dir)
    rows = tqdm(range(len(train)), desc="also in train?", delay=2, leave=False)
    known = {train.content(i) for i in rows}
    new = np.array([examples.content(i) not in known for i in range(len(examples))])
    correct = metrics.is_correct(z, examples.labels, clf.multilabel)
    return {"share": float(1 - new.mean()),
            "accuracy_without": float(correct[new].mean()) if new.any() else None}


def report_language(clf, examples, resamples):
    """The figures of a language model over a whole split, intervals over its blocks."""
    sums = np.zeros((len(examples), 2))  # of each block: loss in nats, right guesses
    n_targets = np.zeros(len(examples))
    for request in tqdm(eval_requests(examples.lengths, clf.micro_batch_tokens), unit=" batches"):
        batch = examples.batch(*request)
        tokens, cu_seqlens, *rest = batch.inputs
        logits = run_model(clf.model, batch, clf.device, clf.dtype)
        losses, correct = token_losses(logits, batch.targets)
        query_index = torch.arange(len(tokens)) if clf.objective == "clm" else rest[1]
        target_index = query_index[batch.targets >= 0]
        blocks = request.indices[torch.bucketize(target_index, cu_seqlens[1:], right=True)]
        np.add.at(sums[:, 0], blocks, losses.numpy())
        np.add.at(sums[:, 1], blocks, correct.numpy())
        np.add.at(n_targets, blocks, 1)
    sample = metrics.language_sample(sums, n_targets, examples.n_bytes)
    figures = metrics.with_intervals(sample, len(n_targets), resamples)
    return figures | {"n": int(n_targets.sum())}


def report_checkpoint(path, cfg):
    """Print, write and log everything about a checkpoint."""
    clf = open_classifier(path, cfg, torch.float32)
    report, examples, z = full_report(clf, cfg)
    print_report(report)
    folder = clf.path.parent
    suffix = suffix_for(cfg.test_file, folder) if cfg.test_file else ""
    write_json(folder / f"eval{suffix}.json", report)
    plots = plot_report(clf, report, examples, z, read_records(folder), folder, suffix)
    write_page(report, folder, plots, suffix)
    print(f"\nwritten to {folder}: eval{suffix}.json, {', '.join(plots)}, report{suffix}.html")
    settings = clf.config | {"out_dir": str(folder)}
    if cfg.wandb_mode:
        settings["wandb_mode"] = cfg.wandb_mode
    if settings["wandb_mode"] == "disabled":
        return
    run_id = saved_facts(folder).get("run_id")  # the training run's page
    if wandb_run := start_wandb(settings, run_id):
        log_to_wandb(wandb_run, report, folder, plots, cfg.wandb_texts)
        finish_wandb(wandb_run)


def suffix_for(test_file, folder):
    """What the names of a file's report end in: its stem, or as much more of its path as tells it
    from another file that the folder has a report on."""
    path = Path(test_file).resolve()
    names = [path.stem, *("-".join(path.parts[-n:]) for n in range(1, len(path.parts)))]
    for name in names:
        suffix = "-" + re.sub(r"[^\w.-]+", "-", name).strip("-")  # test_file may be a pattern
        report = folder / f"eval{suffix}.json"
        if not report.exists() or Path(read_json(report)["split"]).resolve() == path:
            break
    return suffix


# --------------------------------------------------------------------------------------------------
# Several checkpoints


def compare(paths, cfg):
    """Print a table of runs and a plain sentence on which is best. Runs that differ in the seed
    alone are one row. p-values: two-sided, of a paired bootstrap over the examples (of the mean
    over seeds); of single runs also McNemar's exact test. Latency is that of one example at a
    time, throughput that of the whole split."""
    same_config, expected = {}, None
    for path in paths:
        clf = open_classifier(path, cfg, torch.float32)
        if not clf.label_names:
            raise UserError(f"{path}: is no classifier; only classifiers can be compared")
        examples = open_examples(clf, cfg)
        truth = [clf.truth(y) for y in examples.labels]
        if expected is not None and truth != expected:
            raise UserError(f"{path}: its {cfg.split} split has other examples or labels than that "
                            f"of {paths[0]}: only runs on the same split of the same data can be "
                            "compared, or all on one --test_file")
        expected = truth
        settings = {key: value for key, value in clf.config.items()
                    if key not in ("seed", "out_dir", "overwrite")}
        same_config.setdefault(json.dumps(settings), []).append(measure(path, clf, examples))
    groups = sorted(same_config.values(), key=lambda runs: -mean_correct(runs).mean())
    resamples = max(cfg.resamples, 100)
    points = print_comparison(groups, resamples)
    plot = clf.path.parent.parent / "comparison.png"
    plot_comparison(points, plot)
    print(f"accuracy against speed: {plot}")
    curves = {}  # runs that differ in train_fraction (and how long they trained) alone
    for runs in groups:
        curves.setdefault(runs[0]["curve"], {}).setdefault(runs[0]["fraction"], runs)
    complete = len(groups) == sum(map(len, curves.values()))
    if complete and min(map(len, curves.values())) > 1:
        n_train = len(open_data(clf, "train", cfg.data_dir))
        report_learning_curves(curves.values(), n_train, clf.path.parent.parent, resamples)


def measure(path, clf, examples):
    """A run's row of the table, as a dict."""
    seconds = math.inf
    for _ in range(2):  # the first pass also warms up
        started = time.perf_counter()
        z = clf.logits(examples).double().numpy()
        seconds = min(seconds, time.perf_counter() - started)
        if seconds > 2:
            break
    latencies = []
    for i in np.random.default_rng(0).integers(len(examples), size=100):
        batch = examples.batch(*Request(None, np.array([i])))
        started = time.perf_counter()
        run_model(clf.model, batch, clf.device, clf.dtype)
        latencies.append(1000 * (time.perf_counter() - started))
    elapsed = [r["elapsed_s"] for r in read_records(clf.path.parent) if "elapsed_s" in r]
    length = float(np.mean(examples.lengths))
    tokens = length if clf.modality != "features" else 1
    with torch.device("meta"):
        whole = build_model(clf.model.config)  # in int8 a model has other parameters
    schedule = ("seed", "out_dir", "overwrite", "train_fraction", "epochs", "max_steps",
                "eval_interval")
    curve = {key: value for key, value in clf.config.items() if key not in schedule}
    return {"name": str(path), "fraction": clf.config.get("train_fraction", 1.0),
            "curve": json.dumps(curve),
            "correct": metrics.is_correct(z, examples.labels, clf.multilabel),
            "macro_f1": basic_report(clf, z, examples.labels)["macro_f1"],
            "parameters": sum(p.numel() for p in whole.parameters()),
            "mflop": flops_per_token(whole, examples.lengths, backward=False) * tokens / 1e6,
            "train_s": elapsed[-1] if elapsed else math.nan, "per_s": len(examples) / seconds,
            "p50": np.quantile(latencies, 0.5), "p95": np.quantile(latencies, 0.95),
            "mb": clf.path.stat().st_size / 1e6}


def mean_correct(runs):
    """(N,): of each example, the share of the runs that are right."""
    return np.mean([run["correct"] for run in runs], 0)


def print_comparison(groups, resamples):
    """Print the table, and how each row compares with the best one, the first. Returns the rows'
    (name, accuracy, low, high, examples per second)."""
    points = []
    width = max(len(runs[0]["name"]) for runs in groups) + 6
    print(f"{'run':{width}}  accuracy [95 % interval]     macro-F1  parameters  MFLOP/ex  train s"
          "     ex/s   p50 ms   p95 ms  disk MB   p against the best")
    best = mean_correct(groups[0])
    best_rate = None
    verdicts = []
    for runs in groups:
        first = runs[0]
        correct = mean_correct(runs)
        low, high = metrics.share_interval(correct, resamples)
        p, mcnemar = metrics.paired_tests(best, correct, resamples)
        mean = {key: float(np.mean([run[key] for run in runs]))
                for key in ("macro_f1", "train_s", "per_s", "p50", "p95")}
        name = first["name"] if len(runs) == 1 else f"{first['name']} (×{len(runs)})"
        note = ""
        if runs is not groups[0]:
            note = f"{p:.3f}"
            if len(runs) == len(groups[0]) == 1:
                note += f", McNemar {mcnemar:.3f}"
        print(f"{name:{width}}  {correct.mean():7.2%} [{low:7.2%}, {high:7.2%}]  "
              f"{mean['macro_f1']:9.4f}  {first['parameters']:10,}  {first['mflop']:8.2f}  "
              f"{mean['train_s']:7.1f}  {mean['per_s']:7.0f}  {mean['p50']:7.2f}  "
              f"{mean['p95']:7.2f}  {first['mb']:7.1f}   {note}")
        points.append((name, correct.mean(), low, high, mean["per_s"]))
        if runs is groups[0]:
            best_name = name
            best_rate = mean["per_s"]
        else:
            gap = 100 * (best.mean() - correct.mean())
            verdicts.append(verdict(best_name, name, gap, p, mean["per_s"] / best_rate))
    nothing = "these are seeds of one config: there is nothing to compare"
    print(f"\n{'; '.join(verdicts) or nothing}.")
    return points


def verdict(best, other, gap, p, speed):
    if p < 0.05:
        return f"{best} is better than {other} by {gap:.1f} points, p = {p:.3f}"
    remark = ""
    if speed > 1.2:
        remark = f" and {speed:.1f}× as fast"
    elif speed < 0.8:
        remark = f", at {speed:.1f}× its speed"
    return (f"{other} cannot be told from {best} (behind by {gap:.1f} points, p = {p:.2f})"
            f"{remark}")


def report_learning_curves(curves, n_train, folder, resamples):
    """Of [{train_fraction: runs}, …], one for each model: print what the last step of each gained,
    and what it comes to for each doubling; write folder/learning_curve.png."""
    points = {}  # model → (labels, accuracies, lows, highs), in %
    for by_fraction in curves:
        fractions, groups = zip(*sorted(by_fraction.items()))
        labels = [round(f * n_train) for f in fractions]
        name = Path(groups[-1][0]["name"]).name
        correct = [100 * mean_correct(runs) for runs in groups]
        lows, highs = np.array([metrics.mean_interval(c, resamples) for c in correct]).T
        points[name] = labels, np.mean(correct, 1), lows, highs
        difference = correct[-1] - correct[-2]
        gain, (low, high) = difference.mean(), metrics.mean_interval(difference, resamples)
        per_doubling = gain / math.log2(labels[-1] / labels[-2])
        advice = "that more labels would help cannot be told from luck"
        if low > 0:
            advice = "more labels would help, if by less and less"
        print(f"{name}: from {labels[-2]:,} to {labels[-1]:,} labels, accuracy changed by "
              f"{gain:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}), {per_doubling:+.1f} "
              f"for each doubling: {advice}")
    plot_learning_curves(points, folder / "learning_curve.png")
    print(f"Written to {folder / 'learning_curve.png'}")


# --------------------------------------------------------------------------------------------------
# Ways to compute less


def compare_cheaper(path, cfg):
    """Print what cheaper prediction costs: accuracy on cfg.split, labels that differ from those of
    float32, and examples per second."""
    clf = open_classifier(path, cfg, torch.float32)
    if not clf.label_names:
        raise UserError(f"{path}: is no classifier; --cheaper=True is for classifiers")
    ways = [("float32", torch.float32, None), ("bfloat16", torch.bfloat16, None),
            ("int8", torch.int8, None), ("torch.compile", torch.float32, None)]
    if clf.modality == "text":
        longest = int(open_examples(clf, cfg).lengths.max())
        for length in (longest // 2, longest // 4):
            if length > 2:
                ways.append((f"first {length} of {longest} tokens", torch.float32, length))
    print(f"{path} on {clf.config['dataset']} {cfg.test_file or cfg.split}")
    print(f"{'':26}accuracy  other labels      ex/s  speed-up")
    exact = exact_rate = None
    for name, dtype, max_len in ways:
        try:
            clf = Classifier(path, cfg.device, dtype, cfg.micro_batch_tokens)
            clf.max_len = max_len or clf.max_len
            examples = open_examples(clf, cfg)
            if name == "torch.compile":
                clf.model.compile(dynamic=True)
            clf.logits(examples)  # warms up, compiles
            started = time.perf_counter()
            z = clf.logits(examples).numpy()
            rate = len(examples) / (time.perf_counter() - started)
        except (UserError, RuntimeError) as error:
            print(f"{name:26}not here: {str(error).splitlines()[0][:90]}")
            continue
        predicted = z >= 0 if clf.multilabel else z.argmax(1)[:, None]
        if exact is None:
            exact, exact_rate = predicted, rate
        correct = metrics.is_correct(z, examples.labels, clf.multilabel).mean()
        differ = (predicted != exact).any(1).mean()
        print(f"{name:26}{correct:8.2%}  {differ:12.2%}  {rate:8.0f}  {rate / exact_rate:7.2f}×",
              flush=True)


def main():
    for argument in sys.argv[1:]:
        if argument.startswith(("--text=", "--input=", "--output=")):
            raise UserError(f"labelling has moved: python predict.py out/textcls {argument}")
    cfg = configure(Config, positional="checkpoint")
    if not cfg.checkpoint:
        raise UserError("which checkpoint? For instance: python eval.py out/textcls")
    if cfg.resamples < 1:
        raise UserError(f"--resamples={cfg.resamples} must be 1 or more")
    if cfg.export and (cfg.test_file or cfg.cheaper):
        raise UserError("--export writes a run elsewhere: without --test_file and --cheaper")
    if len({checkpoint_file(path).resolve() for path in cfg.checkpoint}) < len(cfg.checkpoint):
        raise UserError("one checkpoint is given twice")
    if len(cfg.checkpoint) > 1 and not cfg.export and not cfg.cheaper:
        compare(cfg.checkpoint, cfg)
        return
    for path in cfg.checkpoint:
        if cfg.cheaper:
            compare_cheaper(path, cfg)
        elif cfg.export:
            from export import export
            export(Classifier(path, "cpu"), cfg.export, cfg.data_dir)
        else:
            report_checkpoint(path, cfg)


if __name__ == "__main__":
    run(main)
