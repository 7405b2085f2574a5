"""A report for a person: on the terminal, as plots, as one page, and in W&B."""
import base64
import html
import math
import os
from pathlib import Path

from configurator import replacing, write_text

import numpy as np

import metrics

# --------------------------------------------------------------------------------------------------
# The terminal


def print_report(r):
    """A report as eval.full_report makes it."""
    print(f"{r['checkpoint']} on {r['dataset']} {r['split']}: n {r['n']}, with 95 % intervals")
    if not r["label_names"]:
        print_figures(r, r["interval"])
    elif "hamming_loss" in r:
        names = "micro_f1", "macro_f1", "samples_f1", "accuracy", "hamming_loss"
        print_figures(r, names)
        if "at_thresholds" in r:
            used = ""
            if r["split"] in ("test", "train"):  # a file's report leaves eval.json as it was
                used = ", which predict.py now uses too"
            print(f"  at thresholds fitted on val{used}:")
            print_figures(r["at_thresholds"], names)
        print_labels(r)
    else:
        print_figures(r, ("accuracy", "macro_f1", "mcc"))
        print_figures(r, ("log_loss", "auroc", "ece"))
        if "temperature" in r:
            t = r["temperature"]
            print(f"  temperature {t['fitted_on_val']:.2f} (fitted on val): "
                  f"log_loss {t['log_loss']:.4f}  ece {t['ece']:.4f}")
        if "in_train" in r:
            print(f"  also in train: {r['in_train']['share']:.2%} of it")
        print_classes(r)


def print_figures(r, names):
    """One line of figures with their intervals."""
    parts = []
    for name in names:
        if r[name] is not None:
            interval = ""
            if name in r["interval"]:
                low, high = r["interval"][name]
                interval = f" [{in_digits(low)}, {in_digits(high)}]"
            parts.append(f"{name} {in_digits(r[name])}{interval}")
    print(f"  {'  '.join(parts)}")


def in_digits(x):
    """A figure in four decimals, or of a small one three digits."""
    return f"{x:.4f}" if not x or abs(x) >= 0.01 else f"{x:.3g}"


def print_classes(r, most=50):
    """A row for each class; of many, those with the lowest F1."""
    names = [name[:20] for name in r["label_names"]]
    width = max(map(len, [*names, "class"]))
    head = "   confusion: true in rows, predicted in columns" if r["confusion"] else ""
    print(f"\n{'class':{width}}  precision  recall      F1  support{head}")
    shown = range(len(names))
    if len(names) > most:
        shown = np.argsort(r["per_class"]["f1"], kind="stable")[:most]
    for i in shown:
        p, recall, f1, n = class_row(r, i)
        cells = ""
        if r["confusion"]:
            cells = "   " + " ".join(f"{count:5}" for count in r["confusion"][i][:20])
        print(f"{names[i]:{width}}  {p:9.4f}  {recall:6.4f}  {f1:6.4f}  {n:7}{cells}")
    if len(names) > most:
        print(f"({most} of {len(names)} classes, with the lowest F1; eval.json holds all)")


def class_row(r, i):
    return [r["per_class"][key][i] for key in ("precision", "recall", "f1", "support")]


def print_labels(r):
    """A row for each label, at probability 0.5 and at the thresholds fitted on val."""
    names = [name[:20] for name in r["label_names"]]
    fitted = r.get("at_thresholds")
    width = max(map(len, [*names, "label"]))
    more = "   threshold      F1 there" if fitted else ""
    print(f"\n{'label':{width}}  precision  recall      F1   AUROC  support{more}")
    for i, name in enumerate(names):
        p, recall, f1, n = class_row(r, i)
        area = r["per_class"]["auroc"][i]
        area = math.nan if area is None else area
        if fitted:
            more = f"   {r['thresholds'][i]:9.4f}  {fitted['per_class']['f1'][i]:12.4f}"
        print(f"{name:{width}}  {p:9.4f}  {recall:6.4f}  {f1:6.4f}  {area:6.4f}  {n:7}{more}")


# --------------------------------------------------------------------------------------------------
# Plots


def new_figure(*size, **axes):
    """(figure, axes) of matplotlib, drawn without a screen."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be one that is not installed here
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a label may hold dollars
    from matplotlib.figure import Figure
    figure = Figure(figsize=size)
    return figure, figure.subplots(**axes)


def label_log_axis(axis):
    """Plain numbers beside a logarithmic axis: matplotlib's own labels are mathematical markup."""
    from matplotlib.ticker import LogFormatter
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # where decades are few


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


def plot_report(clf, report, examples, z, records, folder, suffix=""):
    """Write the .png files that say most about this kind of model; returns their names. z (N, C):
    the logits of `examples`; records: those of the run's metrics.jsonl."""
    plots = {}
    if clf.multilabel:
        plots["labels"] = plot_labels(report)
    elif clf.label_names:
        p = np.exp(metrics.log_softmax(z))
        correct = p.argmax(1) == examples.labels
        if report["confusion"]:
            plots["confusion"] = plot_confusion(report)
        plots["reliability"] = plot_reliability(report)
        plots["coverage"] = plot_coverage(p.max(1), correct)
        if clf.modality == "text" and len(np.unique(examples.lengths)) > 4:
            plots["length"] = plot_length(examples.lengths, correct)
        if clf.modality == "image":
            plots["mistakes"] = plot_mistakes(clf, examples, p, correct)
    elif "r2" in report:
        plots["predicted"] = plot_predicted(report, metrics.own_unit(examples.labels, clf.scaling),
                                            metrics.own_unit(z[:, 0], clf.scaling))
    if records:
        plots["curves"] = plot_curves(records)
    for name, figure in plots.items():
        save_figure(figure, folder / f"{name}{suffix}.png")
    return [f"{name}{suffix}.png" for name in plots]


def plot_labels(report):
    names = report["label_names"]
    support = report["per_class"]["support"]
    figure, ax = new_figure(6, min(1 + len(names) * 0.35, 30))
    y = np.arange(len(names))
    ax.barh(y, report["per_class"]["f1"], 0.35, label=f"at 0.5: macro {report['macro_f1']:.3f}")
    if fitted := report.get("at_thresholds"):
        label = f"at the thresholds fitted on val: macro {fitted['macro_f1']:.3f}"
        ax.barh(y + 0.35, fitted["per_class"]["f1"], 0.35, label=label)
    ax.set_yticks(y + 0.17, [f"{name} ({n})" for name, n in zip(names, support)])
    ax.invert_yaxis()
    ax.set(xlabel="F1", xlim=(0, 1))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def plot_confusion(report):
    names = report["label_names"]
    confusion = np.array(report["confusion"])
    side = min(2 + len(names) * 0.6, 20)
    figure, ax = new_figure(side, side)
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set(xlabel="predicted", ylabel="true",
           title=f"accuracy {report['accuracy']:.2%}, n {report['n']}")
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    if len(names) <= 30:
        for (i, j), n in np.ndenumerate(confusion):
            color = "white" if shares[i, j] > 0.5 else "black"
            ax.text(j, i, n or "", ha="center", va="center", color=color)
    return figure


def plot_reliability(report):
    figure, ax = new_figure(5, 5)
    ax.plot([0, 1], [0, 1], color="grey", linewidth=1)
    curves = {"as trained": report["calibration"]}
    if "temperature" in report:
        curves["with temperature"] = report["temperature"]["calibration"]
    for label, bins in curves.items():
        confidence, accuracy, _ = zip(*bins)
        ax.plot(confidence, accuracy, marker="o", markersize=4, label=label)
    ax.set(xlabel="confidence", ylabel="accuracy", title=f"calibration: ECE {report['ece']:.4f}")
    ax.legend()
    return figure


def plot_coverage(confidence, correct):
    n = np.arange(1, len(correct) + 1)
    figure, ax = new_figure(6, 4)
    ax.plot(n / len(n), correct[confidence.argsort()[::-1]].cumsum() / n)
    ax.set(xlabel="share of the examples that are answered, the most confident first",
           ylabel="accuracy of these")
    return figure


def plot_length(lengths, correct):
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 7)))
    n_bins = len(edges) - 1
    index = np.clip(np.searchsorted(edges, lengths, "right") - 1, 0, n_bins - 1)
    count = np.bincount(index, minlength=n_bins)
    accuracy = np.bincount(index, correct, n_bins) / count.clip(min=1)
    labels = [f"{low:.0f}–{high:.0f}\n(n {n})" for low, high, n in zip(edges, edges[1:], count)]
    figure, ax = new_figure(6, 4)
    ax.bar(labels, accuracy)
    ax.set(xlabel="tokens", ylabel="accuracy", ylim=(max(0, accuracy.min() - 0.1), 1))
    return figure


def plot_mistakes(clf, examples, p, correct):
    """The pictures that were predicted wrongly with most confidence."""
    figure, axes = new_figure(12, 7, nrows=4, ncols=8)
    for ax in axes.flat:
        ax.axis("off")
    for ax, i in zip(axes.flat, np.where(correct, 0, p.max(1)).argsort()[::-1]):
        if not correct[i]:
            ax.imshow(examples.values[i].transpose(1, 2, 0).squeeze(), cmap="gray")
            true = clf.truth(examples.labels[i])
            predicted = clf.truth(p[i].argmax())
            ax.set_title(f"{true}, not {predicted} ({p[i].max():.0%})", fontsize=8)
    return figure


def plot_predicted(report, true, predicted):
    r2 = "R² undefined" if report["r2"] is None else f"R² {report['r2']:.4f}"
    figure, ax = new_figure(5, 5)
    ax.plot([true.min(), true.max()], [true.min(), true.max()], color="grey", linewidth=1)
    ax.scatter(true, predicted, s=12, alpha=0.6)
    ax.set(xlabel="true", ylabel="predicted",
           title=f"{r2}, RMSE {report['rmse']:.4g}, n {report['n']}")
    return figure


def plot_curves(records):
    figure, ax = new_figure(6, 4)
    for key in ("loss", "val_loss"):
        ax.plot(*zip(*[(r["step"], r[key]) for r in records if key in r]), label=key)
    ax.set(xlabel="step", ylabel="loss", yscale="log")
    label_log_axis(ax.yaxis)
    ax.legend()
    return figure


def plot_learning_curves(points, path):
    """points: {model: (labels, accuracies, lows, highs)}, in %."""
    figure, ax = new_figure(6, 4)
    for name, (labels, accuracy, low, high) in points.items():
        ax.errorbar(labels, accuracy, [accuracy - low, high - accuracy], marker="o", capsize=4,
                    label=name)
    ax.set(xlabel="labels trained on", ylabel="accuracy, %", xscale="log")
    ax.set_xticks(labels, [f"{n:,}" for n in labels])
    ax.minorticks_off()
    ax.legend()
    save_figure(figure, path)


def plot_comparison(points, path):
    """points: [(name, accuracy, low, high, examples per second), ...]."""
    figure, ax = new_figure(6, 4)
    for name, accuracy, low, high, rate in points:
        error = [[100 * (accuracy - low)], [100 * (high - accuracy)]]
        ax.errorbar([rate], [100 * accuracy], error, marker="o", capsize=4, label=name)
    ax.set(xlabel="examples per second", ylabel="accuracy, %", xscale="log")
    label_log_axis(ax.xaxis)
    ax.legend()
    save_figure(figure, path)


def plot_range_test(rates, losses, smooth, suggestion, path):
    figure, ax = new_figure(6, 4)
    ax.plot(rates, losses, color="lightgrey")
    ax.plot(rates, smooth)
    ax.set(xlabel="learning rate", ylabel="training loss, smoothed", xscale="log",
           ylim=(0.9 * min(smooth), 1.2 * smooth[0]))
    label_log_axis(ax.xaxis)
    if suggestion is not None:
        ax.axvline(suggestion, color="black", linewidth=1)
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# report.html

STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%;margin:1em 1em 0 0;vertical-align:top}
table{border-collapse:collapse;margin:1em 0}
td,th{border-bottom:1px solid #ddd;padding:.2em .8em;text-align:left;vertical-align:top}"""


def write_page(r, folder, plots, suffix=""):
    """report{suffix}.html: figures, plots and the worst mistakes on one page that needs no other
    file."""
    title = html.escape(r["checkpoint"])
    summary = f"{html.escape(r['dataset'])}, {r['split']}, {r['n']} examples"
    parts = [f"<h1>{title}</h1><p>{summary}</p>", figures_table(r)]
    if "temperature" in r:
        t = r["temperature"]
        parts.append(f"<p>With temperature {t['fitted_on_val']:.2f}, fitted on val: "
                     f"log-loss {t['log_loss']:.4f}, ECE {t['ece']:.4f}.</p>")
    if fitted := r.get("at_thresholds"):
        columns = r["label_names"], r["thresholds"], fitted["per_class"]["f1"]
        parts += ["<p>With thresholds fitted on val:</p>", figures_table(fitted),
                  html_table(("label", "threshold", "F1"), zip(*columns))]
    if "in_train" in r:
        without = r["in_train"]["accuracy_without"]
        accuracy = "–" if without is None else f"{without:.2%}"
        parts.append(f"<p>{r['in_train']['share']:.2%} of the examples also stand in train; "
                     f"accuracy without them: {accuracy}.</p>")
    if r["label_names"]:
        rows = [[name, *class_row(r, i)] for i, name in enumerate(r["label_names"])]
        parts.append(html_table(("class", "precision", "recall", "F1", "support"), rows))
    for name in plots:
        content = base64.b64encode((folder / name).read_bytes()).decode()
        alt = name.removesuffix(".png")
        parts.append(f'<img alt="{alt}" src="data:image/png;base64,{content}">')
    mistakes = [m for m in r.get("mistakes", ()) if "text" in m]
    if mistakes:
        rows = [(m["true"], m["predicted"], m["probability"], m["text"][:600]) for m in mistakes]
        parts += ["<h2>The most confident mistakes</h2>",
                  html_table(("true", "predicted", "probability", "text"), rows)]
    body = "\n".join(parts)
    write_text(folder / f"report{suffix}.html", "<!doctype html><html lang=en><meta charset=utf-8>"
               f"<title>{title}</title><style>{STYLE}</style>{body}</html>")


def figures_table(r):
    rows = [(name, r[name], f"{low:.4f} – {high:.4f}")
            for name, (low, high) in r["interval"].items()]
    return html_table(("metric", "value", "95 % interval"), rows)


def html_table(head, rows):
    lines = [html_row(head, "th")] + [html_row(row, "td") for row in rows]
    return f"<table>{''.join(lines)}</table>"


def html_row(cells, tag):
    texts = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells]
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


# --------------------------------------------------------------------------------------------------
# W&B


def log_to_wandb(wandb_run, report, folder, plots, texts):
    """Add the figures to a run's summary, and tables and plots to its page. texts: with the texts
    of the mistakes?"""
    import wandb
    split = Path(report["split"]).stem
    numbers = {key: value for key, value in report.items() if isinstance(value, (int, float))}
    wandb_run.summary.update({f"{split}_{key}": value for key, value in numbers.items()})
    logged = {f"{split}_{name.removesuffix('.png')}": wandb.Image(str(folder / name))
              for name in plots}
    if report["label_names"]:
        rows = [[name, *class_row(report, i)] for i, name in enumerate(report["label_names"])]
        columns = ["class", "precision", "recall", "f1", "support"]
        logged[f"{split}_per_class"] = wandb.Table(columns, rows)
        columns = ["true", "predicted", "probability", "example"]
        if texts:
            columns.append("text")
        rows = [[m.get(column) for column in columns] for m in report["mistakes"]]
        logged[f"{split}_mistakes"] = wandb.Table(columns, rows)
    wandb_run.log(logged)
