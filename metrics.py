"""Figures, intervals, tests, calibration: NumPy in, numbers out.

Of classes: log-probabilities logp or logits z (N, C) float64, and true classes y (N,) int64. Of
several labels: logits z (N, C) and multi-hot y (N, C).

What sorts or counts all N·C values is done once: `class_sample`, `label_sample`, `number_sample`
and `language_sample` return a function of weights (N,), how often each example counts, which the
bootstrap calls again and again. A new metric is one more entry in the figures of its task.
"""
import math

import numpy as np
from tqdm import tqdm


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


def with_intervals(sample, n, resamples):
    """The figures of n examples: {"n": n, name: value, ..., "interval": {name: [low, high]}}, the
    last only if there are resamples. sample: see the top."""
    figures = {"n": n, **as_floats(sample(np.ones(n, np.int32)))}
    if resamples:
        figures["interval"] = intervals(sample, n, resamples)
        if figures.get("accuracy") in (0.0, 1.0):  # of which resamples say nothing
            figures["interval"]["accuracy"] = list(wilson_interval(figures["accuracy"], n))
    return figures


def f1_score(hits, support, predicted):
    return 2 * hits / np.maximum(support + predicted, 1)


def per_class(hits, support, predicted):
    """Of each class: precision, recall, F1 (0 where undefined) and support, as lists."""
    return {"precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(support, 1)).tolist(),
            "f1": f1_score(hits, support, predicted).tolist(), "support": support.tolist()}


def auroc_sample(scores, example, column):
    """A function of weights (N,) int32 → the areas under the ROC curves (K,) of scores (N, K), ties
    counted half (Mann-Whitney U), NaN where one side does not occur.

    example, column: the indices of the positive ones among the scores.
    """
    scores = np.asarray(scores).T
    K, n = scores.shape
    order = np.argsort(scores, axis=1).astype(np.int32)
    below = np.empty(len(example), np.int32)  # of each positive: scores that are smaller
    up_to = np.empty(len(example), np.int32)  # and those that are not larger
    for k in range(K):
        of_column = np.flatnonzero(column == k)
        ordered = scores[k][order[k]]
        values = scores[k][example[of_column]]
        below[of_column] = np.searchsorted(ordered, values, "left")
        up_to[of_column] = np.searchsorted(ordered, values, "right")
    by_column = np.argsort(column, kind="stable")
    example, column = example[by_column], column[by_column]
    below, up_to = below[by_column], up_to[by_column]
    n_columns = max(1, 1_000_000 // n)  # that are counted at once

    def areas(weight):
        rank = np.empty(len(example))  # the mean rank of equal scores
        counts = np.zeros((n_columns, n + 1), np.int32)
        for first in range(0, K, n_columns):
            columns = order[first : first + n_columns]
            counts[: len(columns), 1:] = weight[columns]
            np.cumsum(counts[: len(columns)], axis=1, out=counts[: len(columns)])
            here = slice(*np.searchsorted(column, [first, first + n_columns]))
            k = column[here] - first
            rank[here] = (counts[k, below[here]] + counts[k, up_to[here]] + 1.0) / 2
        w = weight[example]
        n1 = np.bincount(column, w, K)
        n0 = weight.sum() - n1
        rank_sum = np.bincount(column, w * rank, K)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (rank_sum - n1 * (n1 + 1) / 2) / (n1 * n0)
    return areas


def mean_of_defined(values):
    defined = values[np.isfinite(values)]
    return defined.mean() if len(defined) else None


# --------------------------------------------------------------------------------------------------
# One of several classes

MOST_IN_CONFUSION = 200  # classes; the cells of more would fill the disk


def class_sample(logp, y):
    """A function of weights (N,) → every single-number metric. macro_f1 is over the classes that
    occur or are predicted; auroc the mean, over classes, of one against the rest (two classes: of
    the second; None if only one class occurs); ece the expected calibration error in 15 bins of
    equal width (Guo et al. 2017); mcc Matthews' correlation (Gorodkin 2004)."""
    C = logp.shape[1]
    example = np.arange(len(y))
    predicted = logp.argmax(1)
    correct = (predicted == y).astype(float)
    loss = -logp[example, y]
    bins = confidence_bins(logp, correct)
    if C == 2:
        example = np.flatnonzero(y)
        areas = auroc_sample(np.exp(logp[:, 1:]), example, np.zeros(len(example), int))
    else:
        areas = auroc_sample(np.exp(logp), example, y)

    def figures(weight):
        n = weight.sum()
        hits = np.bincount(y, weight * correct, C)
        support = np.bincount(y, weight, C)
        times = np.bincount(predicted, weight, C)
        f1 = f1_score(hits, support, times)
        occurs = support + times > 0
        spread = ((n**2 - (times**2).sum()) * (n**2 - (support**2).sum())) ** 0.5
        covariance = hits.sum() * n - (support * times).sum()
        return {"accuracy": hits.sum() / n, "macro_f1": f1[occurs].mean(),
                "micro_f1": hits.sum() / n, "weighted_f1": (f1 * support).sum() / n,
                "mcc": covariance / spread if spread else 0.0, "log_loss": weight @ loss / n,
                "auroc": mean_of_defined(areas(weight)), "ece": calibration_error(bins(weight))}
    return figures


def confusion_matrix(predicted, y, C):
    """(C, C) counts: true in rows, predicted in columns."""
    return np.bincount(y * C + predicted, minlength=C * C).reshape(C, C)


def class_report(logits, y, resamples=0):
    """What eval.json says of logits (N, C) and classes (N,): see class_sample and with_intervals,
    and the figures of each class, and confusion[true][predicted] (None of more than 200
    classes)."""
    logp = log_softmax(np.asarray(logits, np.float64))
    C = logp.shape[1]
    figures = with_intervals(class_sample(logp, y), len(y), resamples)
    predicted = logp.argmax(1)
    hits = np.bincount(y[predicted == y], minlength=C)
    counts = np.bincount(y, minlength=C), np.bincount(predicted, minlength=C)
    confusion = confusion_matrix(predicted, y, C).tolist() if C <= MOST_IN_CONFUSION else None
    return {"loss": figures["log_loss"], **figures, "per_class": per_class(hits, *counts),
            "confusion": confusion}


def confidence_bins(logp, correct, n_bins=15):
    """A function of weights (N,) → [(mean confidence, accuracy, share of the examples), ...] of the
    bins of confidence that hold any."""
    confidence = np.exp(logp.max(1))
    index = np.minimum((confidence * n_bins).astype(int), n_bins - 1)

    def bins(weight):
        count = np.bincount(index, weight, n_bins)
        confidence_sum = np.bincount(index, weight * confidence, n_bins)
        correct_sum = np.bincount(index, weight * correct, n_bins)
        return [(confidence_sum[b] / count[b], correct_sum[b] / count[b], count[b] / weight.sum())
                for b in np.flatnonzero(count)]
    return bins


def calibration(logp, y):
    """The bins of confidence_bins, of all examples."""
    correct = logp.argmax(1) == y
    return confidence_bins(logp, correct)(np.ones(len(y)))


def calibration_error(bins):
    return sum(abs(accuracy - confidence) * share for confidence, accuracy, share in bins)


def temperature(logits, y):
    """The T that makes softmax(logits / T) likeliest (Guo et al. 2017): Newton's steps in 1/T, in
    which the loss is convex, within a bracket that they narrow."""
    low, high, inverse = 1e-3, 1e3, 1.0
    z_true = logits[np.arange(len(y)), y].mean()
    for _ in range(60):
        p = np.exp(log_softmax(logits * inverse))
        mean = (p * logits).sum(1)
        slope = mean.mean() - z_true  # of the loss
        if slope > 0:
            high = inverse
        else:
            low = inverse
        curvature = ((p * logits**2).sum(1) - mean**2).mean()
        step = inverse - slope / max(curvature, 1e-300)
        if not low < step < high:
            step = (low * high) ** 0.5
        if abs(step - inverse) <= 1e-9 * inverse:
            break
        inverse = step
    return float(1 / inverse)


# --------------------------------------------------------------------------------------------------
# Several labels


def label_sample(z, y, thresholds=0.5, areas=None):
    """A function of weights (N,) → every single-number metric of predicting the labels whose
    probability is ≥ thresholds, a number or (C,). accuracy is the share of examples with all labels
    right, hamming_loss that of wrong decisions among all N·C, log_loss the mean over them; macro_f1
    is over the labels that occur or are predicted, samples_f1 over the examples (1 where there is
    neither), auroc over the labels for which it is defined. areas: auroc_sample's
    function, where it is made already."""
    predicted = sigmoid(z) >= thresholds
    true = y.astype(bool)
    both = predicted & true
    size = predicted.sum(1) + true.sum(1)  # of each example
    samples_f1 = np.where(size, 2 * both.sum(1) / np.maximum(size, 1), 1.0)
    n_wrong = (predicted != true).sum(1)
    loss = (np.logaddexp(0, z) - true * z).mean(1)
    areas = areas or auroc_sample(z, *true.nonzero())
    counted = [part.astype(np.float32) for part in (both, true, predicted)]

    def figures(weight):
        n = weight.sum()
        exact = weight.astype(np.float32)  # as counts are up to 2^24
        hits, support, times = (exact @ part for part in counted)
        f1 = f1_score(hits, support, times)
        occurs = support + times > 0
        return {"accuracy": weight @ (n_wrong == 0) / n,
                "hamming_loss": weight @ n_wrong / n / z.shape[1],
                "micro_f1": f1_score(hits.sum(), support.sum(), times.sum()),
                "macro_f1": f1[occurs].mean() if occurs.any() else 0.0,
                "weighted_f1": (f1 * support).sum() / max(support.sum(), 1),
                "samples_f1": weight @ samples_f1 / n, "log_loss": weight @ loss / n,
                "auroc": mean_of_defined(areas(weight))}
    return figures


def label_report(z, y, thresholds=0.5, resamples=0):
    """What eval.json says of logits (N, C) and multi-hot y (N, C): see label_sample and
    with_intervals, and the figures of each label (AUROC None where undefined)."""
    z = np.asarray(z, np.float64)
    true = np.asarray(y).astype(bool)
    predicted = sigmoid(z) >= thresholds
    areas = auroc_sample(z, *true.nonzero())
    figures = with_intervals(label_sample(z, true, thresholds, areas), len(z), resamples)
    of_labels = per_class((predicted & true).sum(0), true.sum(0), predicted.sum(0))
    of_labels["auroc"] = [float(area) if np.isfinite(area) else None
                          for area in areas(np.ones(len(z), np.int32))]
    return {"loss": figures["log_loss"], **figures, "per_class": of_labels}


def f1_thresholds(z, y, weights):
    """For each row of weights (R, N), the threshold of each label's probability with the highest
    F1, (R, C): half-way between the two probabilities that it parts; 0.5 of a label that does not
    occur. One per label, as the best is half the F1 that it reaches (Lipton et al. 2014), in which
    labels differ."""
    p = sigmoid(np.asarray(z, np.float64))
    thresholds = np.full((len(weights), p.shape[1]), 0.5)
    for c in tqdm(range(p.shape[1]), desc="thresholds", delay=2, leave=False):
        order = np.argsort(-p[:, c])
        ordered = np.append(p[order, c], 0)
        true = np.asarray(y)[order, c]
        is_tied = ordered[:-1] == ordered[1:]  # equal probabilities are not parted
        for r, weight in enumerate(weights):
            w = weight[order]
            support = w @ true
            if not support:
                continue
            f1 = f1_score(np.cumsum(w * true), support, np.cumsum(w))
            f1[is_tied] = -1
            best = f1.argmax()
            rest = w[best + 1 :] > 0  # the next one that is there
            following = best + 1 + rest.argmax() if rest.any() else len(w)
            thresholds[r, c] = (ordered[best] + ordered[following]) / 2
    return thresholds


def fit_thresholds(z, y, resamples=50):
    """The mean of f1_thresholds over bootstrap resamples. Those of the sample itself follow its
    chance peaks, and did worse on other examples in 8 comparisons of 8 (NOTES.md)."""
    rng = np.random.default_rng(0)
    n = len(z)
    weights = [np.bincount(sample, minlength=n) for sample in rng.integers(n, size=(resamples, n))]
    return f1_thresholds(z, y, np.array(weights)).mean(0)


# --------------------------------------------------------------------------------------------------
# Numbers, and language models


def number_sample(predicted, true):
    """A function of weights (N,) → the figures of predictions and numbers (N,), in the target's
    unit; R² is against the mean of `true`; the correlations are Pearson's, and Spearman's (1904),
    which is that of the ranks, of equal numbers their mean. None where `true` does not vary, or for
    correlations `predicted`."""
    error = predicted - true
    rank_predicted, rank_true = rank_sample(predicted), rank_sample(true)

    def figures(weight):
        share = weight / weight.sum()
        mse = share @ error**2
        spread = variance(true, share)
        return {"rmse": mse**0.5, "mae": share @ np.abs(error),
                "r2": 1 - mse / spread if spread else None,
                "pearson": correlation(predicted, true, share),
                "spearman": correlation(rank_predicted(weight), rank_true(weight), share)}
    return figures


def rank_sample(x):
    """A function of weights (N,) → the rank of each of x (N,), ties by their mean."""
    _, group = np.unique(x, return_inverse=True)

    def ranks(weight):
        of_group = np.bincount(group, weight)  # how often each value is there
        return (np.cumsum(of_group) - of_group / 2)[group]
    return ranks


def correlation(a, b, share):
    """Pearson's of a and b (N,), each example counting by its share."""
    spread = variance(a, share) ** 0.5 * variance(b, share) ** 0.5
    return share @ ((a - share @ a) * (b - share @ b)) / spread if spread else None


def variance(x, share):
    """Of x (N,), each example counting by its share; 0 where it varies by rounding errors alone."""
    found = share @ (x - share @ x) ** 2
    return found if found > 1e-24 * (share @ x**2) else 0.0


def number_report(predicted, true, resamples=0):
    """What eval.json says of predictions and numbers (N,): see number_sample, with_intervals."""
    figures = with_intervals(number_sample(predicted, true), len(true), resamples)
    return {"loss": figures["rmse"] ** 2, **figures}


def language_sample(sums, n_targets, n_bytes):
    """A function of weights (N,) → the figures of blocks: sums (N, 2) of their losses in nats and
    of their right guesses, and their numbers of targets (N,). n_bytes: bytes of text that all of
    them stand for; 0 where that is not known. bits_per_byte is clm's: per byte, however the text
    was made tokens."""
    bytes_per_target = n_bytes / n_targets.sum()

    def figures(weight):
        n = weight @ n_targets
        loss, accuracy = weight @ sums / n
        found = {"loss": loss, "perplexity": np.exp(loss), "token_accuracy": accuracy}
        if n_bytes:
            found["bits_per_byte"] = loss / np.log(2) / bytes_per_target
        return found
    return figures


# --------------------------------------------------------------------------------------------------
# Intervals and tests


def intervals(figures, n, resamples, seed=0):
    """The 95 % percentile-bootstrap interval (Efron 1979) of each metric that figures(weights (n,))
    returns: {name: [low, high]}."""
    rng = np.random.default_rng(seed)
    values = {}
    for _ in tqdm(range(resamples), desc="intervals", delay=2, leave=False):
        weight = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.int32)
        for name, value in figures(weight).items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: np.quantile(v, [0.025, 0.975]).tolist() for name, v in values.items()}


def bootstrap_means(x, resamples):
    """Means of resamples of x (N,), by how often each of its few values is drawn."""
    values, counts = np.unique(x, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(x), counts / len(x), size=resamples)
    return drawn @ values / len(x)


def share_interval(correct, resamples):
    """The 95 % interval of the share of correct (N,), 0..1: by resamples, or where all are alike,
    of which resamples say nothing, Wilson's."""
    if (correct == 0).all() or (correct == 1).all():
        return list(wilson_interval(float(correct[0]), len(correct)))
    return mean_interval(correct, resamples)


def mean_interval(x, resamples):
    """The 95 % bootstrap interval of the mean of x (N,): [low, high]."""
    return np.quantile(bootstrap_means(x, resamples), [0.025, 0.975]).tolist()


def wilson_interval(share, n):
    """The 95 % interval of a share of n (Wilson 1927), which holds for few, too."""
    z = 1.96
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def affordable_resamples(wanted, size):
    """Fewer resamples of large splits, so that they take seconds. size: N·C."""
    return min(wanted, max(100, 100_000_000 // size))


def paired_tests(a, b, resamples):
    """(p of a paired bootstrap, p of McNemar's exact test, 1947) that a and b (N,), 1 where
    correct, have the same mean; two-sided."""
    difference = a - b
    means = bootstrap_means(difference, resamples)
    tail = min((means <= 0).mean(), (means >= 0).mean())
    bootstrap = min(1.0, 2 * tail + 1 / resamples)
    n_only_a = int((difference > 0).sum())
    n_only_b = int((difference < 0).sum())
    discordant = n_only_a + n_only_b
    if not discordant:
        return bootstrap, 1.0
    ways = sum(math.comb(discordant, i) for i in range(min(n_only_a, n_only_b) + 1))
    return bootstrap, min(1.0, 2 * ways / 2**discordant)
