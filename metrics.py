"""Figures, intervals, tests, calibration: NumPy in, numbers out.

Of classes: log-probabilities logp or logits z (N, C) float64, and true classes y (N,) int64. Of
several labels: logits z (N, C) and multi-hot y (N, C). A new metric is one more entry in the
figures of its task.
"""
import math

import numpy as np


def log_softmax(z):
    shifted = z - z.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))


def is_correct(z, y, multilabel):
    """(N,) bool: whether logits z (N, C) predict the class that y has, or all its labels and no
    other."""
    return ((z >= 0) == y).all(1) if multilabel else z.argmax(1) == y


def own_unit(values, scaling):
    """Standardised targets or outputs in the target's own unit."""
    return np.asarray(values, np.float64) * scaling["target_std"] + scaling["target_mean"]


def as_floats(figures):
    return {key: value if value is None else float(value) for key, value in figures.items()}


def f1_score(hits, support, predicted):
    return 2 * hits / np.maximum(support + predicted, 1)


def per_class(hits, support, predicted):
    """Of each class: precision, recall, F1 (0 where undefined) and support, as lists."""
    return {"precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(support, 1)).tolist(),
            "f1": f1_score(hits, support, predicted).tolist(), "support": support.tolist()}


def auroc(score, positive):
    """Area under the ROC curve, ties counted half (Mann-Whitney U), or None where one class only
    occurs."""
    n1 = positive.sum()
    n0 = (~positive).sum()
    if not n1 or not n0:
        return None
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # the mean rank of equal scores
    return (rank[inverse][positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)


def mean_of_defined(values):
    defined = [value for value in values if value is not None]
    return np.mean(defined) if defined else None


# --------------------------------------------------------------------------------------------------
# One of several classes


def class_figures(logp, y):
    """Every single-number metric. macro_f1 is over the classes that occur or are predicted; auroc
    the mean, over classes, of one against the rest (two classes: of the second; None if only one
    class occurs); ece the expected calibration error in 15 bins of equal width (Guo et al. 2017);
    mcc Matthews' correlation (Gorodkin 2004)."""
    n, C = logp.shape
    p = np.exp(logp)
    confusion = confusion_matrix(logp, y)
    hits = confusion.diagonal()
    support = confusion.sum(1)
    predicted = confusion.sum(0)
    f1 = f1_score(hits, support, predicted)
    occurs = support + predicted > 0
    spread = ((n**2 - (predicted**2).sum()) * (n**2 - (support**2).sum())) ** 0.5
    covariance = hits.sum() * n - (support * predicted).sum()
    positives = range(C) if C > 2 else [1]
    gaps = [abs(accuracy - confidence) * share
            for confidence, accuracy, share in calibration(p, y)]
    return {"accuracy": hits.sum() / n, "macro_f1": f1[occurs].mean(), "micro_f1": hits.sum() / n,
            "weighted_f1": (f1 * support).sum() / n, "mcc": covariance / spread if spread else 0.0,
            "log_loss": -logp[np.arange(n), y].mean(),
            "auroc": mean_of_defined([auroc(p[:, c], y == c) for c in positives]),
            "ece": sum(gaps)}


def confusion_matrix(logp, y):
    """(C, C) float64 counts: true in rows, predicted in columns."""
    C = logp.shape[1]
    cells = np.bincount(y * C + logp.argmax(1), minlength=C * C)
    return cells.reshape(C, C).astype(np.float64)


def class_report(logits, y):
    """What eval.json says of logits (N, C) and classes (N,): class_figures, the loss in nats, the
    figures of each class, and confusion[true][predicted]."""
    logp = log_softmax(np.asarray(logits, np.float64))
    figures = as_floats(class_figures(logp, y))
    confusion = confusion_matrix(logp, y).astype(int)
    return {"n": len(y), "loss": figures["log_loss"], **figures,
            "per_class": per_class(confusion.diagonal(), confusion.sum(1), confusion.sum(0)),
            "confusion": confusion.tolist()}


def calibration(p, y, n_bins=15):
    """[(mean confidence, accuracy, share of the examples), ...] of the bins of confidence that hold
    any; p (N, C): probabilities."""
    confidence = p.max(1)
    correct = p.argmax(1) == y
    index = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    count = np.bincount(index, minlength=n_bins)
    confidence_sum = np.bincount(index, confidence, n_bins)
    correct_sum = np.bincount(index, correct, n_bins)
    return [(confidence_sum[b] / count[b], correct_sum[b] / count[b], count[b] / len(y))
            for b in np.flatnonzero(count)]


def temperature(logits, y):
    """The T that makes softmax(logits / T) likeliest (Guo et al. 2017), by bisection: the loss is
    convex in 1/T."""
    low = np.log(1e-3)
    high = np.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        p = np.exp(log_softmax(logits * np.exp(middle)))
        slope = ((p * logits).sum(1) - logits[np.arange(len(y)), y]).mean()  # of the loss in 1/T
        if slope > 0:
            high = middle
        else:
            low = middle
    return float(np.exp(-middle))


# --------------------------------------------------------------------------------------------------
# Several labels


def label_figures(z, y, thresholds=0.5):
    """Every single-number metric of predicting the labels whose probability is ≥ thresholds, a
    number or (C,). accuracy is the share of examples with all labels right, hamming_loss that of
    wrong decisions among all N·C, log_loss the mean over them; macro_f1 is over the labels that
    occur or are predicted, samples_f1 over the examples (1 where there is neither), auroc over the
    labels for which it is defined."""
    predicted = sigmoid(z) >= thresholds
    true = y.astype(bool)
    both = predicted & true
    size = predicted.sum(1) + true.sum(1)  # of each example
    samples_f1 = np.where(size, 2 * both.sum(1) / np.maximum(size, 1), 1.0)
    hits = both.sum(0)
    support = true.sum(0)
    n_predicted = predicted.sum(0)  # of each label
    f1 = f1_score(hits, support, n_predicted)
    occurs = support + n_predicted > 0
    return {"accuracy": (predicted == true).all(1).mean(),
            "hamming_loss": (predicted != true).mean(),
            "micro_f1": f1_score(hits.sum(), support.sum(), n_predicted.sum()),
            "macro_f1": f1[occurs].mean() if occurs.any() else 0.0,
            "weighted_f1": (f1 * support).sum() / max(support.sum(), 1),
            "samples_f1": samples_f1.mean(),
            "log_loss": (np.logaddexp(0, z) - true * z).mean(),
            "auroc": mean_of_defined(label_aurocs(z, true))}


def label_aurocs(z, true):
    return [auroc(z[:, c], true[:, c]) for c in range(z.shape[1])]


def label_report(z, y, thresholds=0.5):
    """What eval.json says of logits (N, C) and multi-hot y (N, C): label_figures, the loss in nats,
    and the figures of each label (AUROC None where undefined)."""
    z = np.asarray(z, np.float64)
    true = np.asarray(y).astype(bool)
    predicted = sigmoid(z) >= thresholds
    figures = as_floats(label_figures(z, true, thresholds))
    of_labels = per_class((predicted & true).sum(0), true.sum(0), predicted.sum(0))
    of_labels["auroc"] = [a if a is None else float(a) for a in label_aurocs(z, true)]
    return {"n": len(z), "loss": figures["log_loss"], **figures, "per_class": of_labels}


def f1_thresholds(z, y):
    """The threshold of each label's probability, (C,), with the highest F1: half-way between the
    two probabilities that it parts; 0.5 of a label that does not occur. One per label, as the best
    is half the F1 that it reaches (Lipton et al. 2014), in which labels differ."""
    thresholds = []
    for p, true in zip(sigmoid(np.asarray(z, np.float64)).T, np.asarray(y).T):
        if not true.any():
            thresholds.append(0.5)
            continue
        order = np.argsort(-p)
        p, n = np.append(p[order], 0), len(p)
        f1 = f1_score(np.cumsum(true[order], dtype=float), true.sum(), np.arange(1, n + 1))
        f1[p[:-1] == p[1:]] = -1  # equal probabilities are not parted
        best = f1.argmax()
        thresholds.append((p[best] + p[best + 1]) / 2)
    return np.array(thresholds)


def fit_thresholds(z, y, resamples=50):
    """The mean of f1_thresholds over bootstrap resamples. Those of the sample itself follow its
    chance peaks, and did worse on other examples in 8 comparisons of 8 (NOTES.md)."""
    z = np.asarray(z, np.float64)
    y = np.asarray(y)
    rng = np.random.default_rng(0)
    samples = rng.integers(len(z), size=(resamples, len(z)))
    return np.mean([f1_thresholds(z[i], y[i]) for i in samples], 0)


# --------------------------------------------------------------------------------------------------
# Numbers, and language models


def number_figures(predicted, true):
    """Of predictions and numbers (N,), in the target's unit; R² is against the mean of `true`."""
    error = predicted - true
    return {"rmse": np.mean(error**2) ** 0.5, "mae": np.abs(error).mean(),
            "r2": 1 - np.mean(error**2) / max(np.var(true), 1e-12)}


def number_report(predicted, true):
    figures = as_floats(number_figures(predicted, true))
    return {"n": len(true), "loss": figures["rmse"] ** 2, **figures}


def language_figures(sums, n_targets, n_bytes):
    """Of blocks: sums (N, 2) of their losses in nats and of their right guesses, and their numbers
    of targets (N,). n_bytes: bytes of text that all of them stand for; 0 where that is not known.
    bits_per_byte is clm's: per byte, however the text was made tokens."""
    loss, accuracy = sums.sum(0) / n_targets.sum()
    figures = {"loss": loss, "perplexity": np.exp(loss), "token_accuracy": accuracy}
    if n_bytes:
        figures["bits_per_byte"] = sums[:, 0].sum() / np.log(2) / n_bytes
    return figures


# --------------------------------------------------------------------------------------------------
# Intervals and tests


def intervals(figures, a, b, resamples, seed=0):
    """The 95 % percentile-bootstrap interval (Efron 1979) of each metric that figures(a, b)
    returns: {name: [low, high]}."""
    rng = np.random.default_rng(seed)
    n = len(b)
    values = {}
    for _ in range(resamples):
        i = rng.integers(n, size=n)
        for name, value in figures(a[i], b[i]).items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: np.quantile(v, [0.025, 0.975]).tolist() for name, v in values.items()}


def mean_interval(x, resamples):
    """The 95 % bootstrap interval of the mean of x (N,): [low, high]."""
    return intervals(lambda a, b: {"mean": a.mean()}, x, x, resamples)["mean"]


def affordable_resamples(wanted, size):
    """Fewer resamples of large splits, so that they take seconds."""
    return min(wanted, max(100, 20_000_000 // size))


def paired_tests(a, b, resamples):
    """(p of a paired bootstrap, p of McNemar's exact test, 1947) that a and b (N,), 1 where
    correct, have the same mean; two-sided."""
    rng = np.random.default_rng(0)
    difference = a - b
    n = len(difference)
    means = np.array([difference[rng.integers(n, size=n)].mean() for _ in range(resamples)])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    bootstrap = min(1.0, 2 * tail + 1 / resamples)
    n_only_a = int((difference > 0).sum())
    n_only_b = int((difference < 0).sum())
    discordant = n_only_a + n_only_b
    if not discordant:
        return bootstrap, 1.0
    ways = sum(math.comb(discordant, i) for i in range(min(n_only_a, n_only_b) + 1))
    return bootstrap, min(1.0, 2 * ways / 2**discordant)
