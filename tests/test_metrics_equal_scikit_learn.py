"""Every figure that eval.py reports is scikit-learn's, on random and degenerate inputs;
prediction ignores batching."""

import json

import numpy as np
import pytest

import metrics
import train
from predict import Classifier
from tests.conftest import report_of, write_toy
from tests.forks import script

sk = pytest.importorskip("sklearn.metrics")


def class_figures(logp, y):
    return metrics.class_sample(logp, y)(np.ones(len(y), np.int32))


def label_figures(z, y):
    return metrics.label_sample(z, y)(np.ones(len(y), np.int32))


def number_figures(predicted, true):
    return metrics.number_sample(predicted, true)(np.ones(len(true)))


@pytest.mark.parametrize(
    "case",
    ["random", "one class in the truth", "a class that is never predicted", "one example", "ties"],
)
def test_metrics(case):
    rng = np.random.default_rng(0)
    n = 1 if case == "one example" else 200
    logits, y = rng.normal(size=(n, 4)), rng.integers(0, 4, n)
    if case == "one class in the truth":
        y[:] = 2
    if case == "a class that is never predicted":
        logits[:, 1] = -9
        y[y == 3] = 0
    if case == "ties":
        logits = logits.round()
    m, predicted = metrics.class_report(logits, y), logits.argmax(1)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert m["loss"] == pytest.approx(sk.log_loss(y, p, labels=range(4)), rel=1e-9)
    assert m["accuracy"] == pytest.approx(sk.accuracy_score(y, predicted))
    assert m["macro_f1"] == pytest.approx(
        sk.f1_score(y, predicted, average="macro", zero_division=0)
    )
    for average in ("micro", "weighted"):
        assert m[f"{average}_f1"] == pytest.approx(
            sk.f1_score(y, predicted, average=average, zero_division=0)
        )
    assert m["mcc"] == pytest.approx(sk.matthews_corrcoef(y, predicted), abs=1e-12)
    both = [c for c in range(4) if 0 < (y == c).sum() < n]
    areas = [
        sk.roc_auc_score(y == c, np.exp(metrics.log_softmax(logits)[:, c])) for c in both
    ]  # the same ties
    assert m["auroc"] == (pytest.approx(np.mean(areas)) if both else None)
    expected = sk.precision_recall_fscore_support(y, predicted, labels=range(4), zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "support"), expected):
        assert m["per_class"][key] == pytest.approx(values)
    assert m["confusion"] == sk.confusion_matrix(y, predicted, labels=range(4)).tolist()


def test_two_classes_and_regression():
    rng = np.random.default_rng(1)
    logits, y = rng.normal(size=(300, 2)).round(1), rng.integers(0, 2, 300)  # with ties
    score = metrics.log_softmax(logits)
    assert class_figures(score, y)["auroc"] == pytest.approx(
        sk.roc_auc_score(y, np.exp(score[:, 1]))
    )
    stats = pytest.importorskip("scipy.stats")
    a, b = rng.normal(size=(2, 50))
    assert number_figures(a, b) == pytest.approx(
        {
            "rmse": sk.root_mean_squared_error(b, a),
            "mae": sk.mean_absolute_error(b, a),
            "r2": sk.r2_score(b, a),
            "pearson": stats.pearsonr(a, b)[0],
            "spearman": stats.spearmanr(a, b)[0],
        }
    )


def test_calibration_and_temperature():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4000, 3)) * 3
    p = np.exp(
        metrics.log_softmax(logits / 2)
    )  # the truth is drawn at temperature 2: as given, logits are too sure
    y = (p.cumsum(1) < rng.random((4000, 1))).sum(1)
    T = metrics.temperature(logits, y)
    best = optimize.minimize_scalar(
        lambda t: -metrics.log_softmax(logits / t)[np.arange(4000), y].mean(), (1, 3)
    )
    assert T == pytest.approx(best.x, rel=1e-4) and abs(T - 2) < 0.15
    before, after = (class_figures(metrics.log_softmax(logits / t), y) for t in (1, T))
    assert after["accuracy"] == before["accuracy"] and after["ece"] < 0.03 < before["ece"]
    sure, right = np.exp(metrics.log_softmax(logits)).max(1), logits.argmax(1) == y
    by_hand = sum(
        abs(right[m].mean() - sure[m].mean()) * m.mean()
        for k in range(15)
        if (m := (sure >= k / 15) & (sure < (k + 1) / 15 + (k == 14))).any()
    )
    assert before["ece"] == pytest.approx(by_hand)


def test_bootstrap_intervals_cover_at_about_their_rate():
    rng, covered = np.random.default_rng(3), 0
    for trial in range(200):
        right = (rng.random(200) < 0.8).astype(float)
        figures = metrics.number_sample(np.zeros(200), 1 - right)  # rmse² is the share of wrong
        low, high = metrics.intervals(figures, 200, 200, seed=trial)["rmse"]
        covered += 1 - high**2 <= 0.8 <= 1 - low**2
    assert 0.90 <= covered / 200 <= 0.985  # 95 % ± three standard errors of 1.5


def test_weights_are_how_often_an_example_counts():
    rng = np.random.default_rng(5)
    i = rng.integers(50, size=50)
    weight = np.bincount(i, minlength=50).astype(np.int32)
    logp, y = metrics.log_softmax(rng.normal(size=(50, 4)).round(1)), rng.integers(0, 4, 50)
    z, several = rng.normal(size=(50, 4)).round(1), rng.integers(0, 2, (50, 4))
    numbers = rng.normal(size=(2, 50))
    for weighted, copies in (
        (metrics.class_sample(logp, y), class_figures(logp[i], y[i])),
        (
            metrics.class_sample(logp[:, :2], y % 2),
            class_figures(logp[i, :2], y[i] % 2),
        ),
        (metrics.label_sample(z, several), label_figures(z[i], several[i])),
        (metrics.number_sample(*numbers), number_figures(*numbers[:, i])),
    ):
        assert weighted(weight) == pytest.approx(copies)
    fitted = metrics.f1_thresholds(z, several, [weight])
    of_copies = metrics.f1_thresholds(z[i], several[i], [np.ones(50, int)])
    assert fitted == pytest.approx(of_copies)


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e8, 1e100])
def test_figures_of_numbers_do_not_depend_on_the_unit(scale):
    true = np.random.default_rng(0).normal(3, 1, 200)
    predicted = true + np.random.default_rng(1).normal(0, 0.5, 200)
    one = metrics.number_report(predicted, true)
    other = metrics.number_report(predicted * scale, true * scale)
    for name in ("r2", "pearson", "spearman"):
        assert other[name] == pytest.approx(one[name], rel=1e-9)


def test_what_is_undefined_is_said_to_be_none():
    for true in (np.full(5, 0.1), np.array([3.0])):
        report = metrics.number_report(true + np.arange(len(true)), true, 50)
        assert report["r2"] is report["pearson"] is report["spearman"] is None
        assert "r2" not in report["interval"]


def test_an_interval_of_few_examples_that_are_all_right_has_a_width():
    logp = np.log([[0.9, 0.1]] * 31)
    low, high = metrics.class_report(logp, np.zeros(31, int), 100)["interval"]["accuracy"]
    assert (low, high) == pytest.approx((0.8897, 1.0), abs=1e-3)  # Wilson's
    assert metrics.share_interval(np.ones(31), 100) == pytest.approx([low, high])


def test_paired_tests():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    rng = np.random.default_rng(4)
    a, b = (rng.random((2, 500)) < [[0.9], [0.75]]).astype(float)
    p, mcnemar = metrics.paired_tests(a, b, 1000)
    assert mcnemar == pytest.approx(binomtest(int((a > b).sum()), int((a != b).sum())).pvalue)
    assert p < 0.01 and metrics.paired_tests(a, a, 1000) == (1.0, 1.0)
    mirrored, _ = metrics.paired_tests(b, a, 1000)
    assert abs(p - mirrored) < 0.01
    rejected = sum(
        metrics.paired_tests(*(rng.random((2, 300)) < 0.8).astype(float), 300)[0] < 0.05
        for _ in range(200)
    )
    assert rejected <= 22  # 5 % of 200, and four standard errors


@pytest.fixture
def trained(toy):
    train.train(train.Config(**toy | dict(epochs=6.0)))
    return toy["out_dir"]


def test_eval_reports_test_and_labels_texts(trained):
    done = script("eval.py", trained)
    assert done.returncode == 0, done.stderr
    report = json.load(open(f"{trained}/eval.json"))
    assert report["split"] == "test" and report["n"] == 12 and report["accuracy"] > 0.8
    assert f"accuracy {report['accuracy']:.4f} [" in done.stdout
    assert (
        report["interval"]["accuracy"][0] <= report["accuracy"] <= report["interval"]["accuracy"][1]
    )
    assert report["in_train"]["share"] == 0 and report["temperature"]["fitted_on_val"] > 0
    page = open(f"{trained}/report.html").read()
    assert (
        page.count("data:image/png;base64,") >= 4 and 'src="http' not in page and "</html>" in page
    )
    assert all(m["text"] in open(f"{trained}/eval.json").read() for m in report["mistakes"])
    said = script(
        "predict.py", trained, "--text=goal striker coach", "--text=shares, profit = euro"
    ).stdout.splitlines()
    assert said[0].startswith("sport 0.") and said[1].startswith("money 0.")


def test_val_figures_equal_those_of_training_and_ignore_batching(trained, toy):
    clf = Classifier(trained)
    report = report_of(clf, "val")
    best = [
        r
        for r in map(json.loads, open(f"{trained}/metrics.jsonl"))
        if "val_loss" in r and r["step"] == clf.step
    ][0]
    assert (
        report["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
        and report["accuracy"] == best["val_accuracy"]
    )
    texts = [f"{'goal ' * (i % 50)} bank {i}" for i in range(70)] + [""]
    together = clf(texts)
    clf.micro_batch_tokens = 40
    for small, big, alone in zip(clf(texts), together, [clf([t])[0] for t in texts]):
        assert small["label"] == big["label"] == alone["label"]
        assert list(small["probabilities"].values()) == pytest.approx(
            list(alone["probabilities"].values()), abs=1e-5
        )
        assert sum(big["probabilities"].values()) == pytest.approx(1)


def test_a_file_of_texts_is_labelled_in_order(trained, tmp_path):
    import csv

    texts = [
        f"{w} {i}"
        for i, w in enumerate(
            ["goal striker", "shares", "laptop, code", 'a "quoted"\nmarket', ""] * 30
        )
    ]
    with open(tmp_path / "in.csv", "w", newline="") as f:
        csv.writer(f).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    done = script(
        "predict.py",
        trained,
        input=tmp_path / "in.csv",
        output=tmp_path / "out.csv",
        dtype="float32",
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "out.csv")))
    expected = Classifier(trained)(texts)
    assert [r["label"] for r in rows] == [e["label"] for e in expected]
    surest = [max(e["probabilities"].values()) for e in expected]
    assert [float(r["probability"]) for r in rows] == pytest.approx(surest, abs=1e-5)
    (tmp_path / "in.txt").write_text("\n".join(texts[:3]) + "\n")
    done = script(
        "predict.py",
        trained,
        input=tmp_path / "in.txt",
        output=tmp_path / "out2.csv",
        dtype="float32",
    )
    assert done.returncode == 0, done.stderr
    assert open(tmp_path / "out2.csv").read() == "".join(open(tmp_path / "out.csv").readlines()[:4])
    for content, says in ((b"", "holds no rows"), (b"caf\xe9\n", "line 1: not valid utf-8")):
        (tmp_path / "bad.txt").write_bytes(content)
        done = script(
            "predict.py", trained, input=tmp_path / "bad.txt", output=tmp_path / "bad.csv"
        )
        assert done.returncode == 2 and says in done.stderr and not list(tmp_path.glob("bad.csv*"))


def test_comparing_runs(trained, toy, tmp_path):
    for name, changes in (("again", dict(seed=2)), ("linear", dict(model="linear"))):
        train.train(train.Config(**toy | dict(epochs=6.0, out_dir=str(tmp_path / name)) | changes))
    done = script("eval.py", trained, str(tmp_path / "again"), str(tmp_path / "linear"))
    assert done.returncode == 0, done.stderr
    assert "(×2)" in done.stdout and done.stdout.strip().splitlines()[-2].endswith(".")
    assert "cannot be told from" in done.stdout or "is better than" in done.stdout
    other = train.Config(
        **toy | dict(dataset="other", split_seed=5, out_dir=str(tmp_path / "other"))
    )
    train.train(other)
    later = write_toy(tmp_path / "later.csv", 30, seed=9)
    done = script("eval.py", trained, str(tmp_path / "other"), f"--test_file={later}")
    assert done.returncode == 0, done.stderr  # on one file they can be
    for more in (["--test_file=none.csv"], ["--test_file=none.csv", "--cheaper=True"],
                 ["--test_file=none.csv", "--export=hf"], ["--resamples=0"]):  # fmt: skip
        done = script("eval.py", trained, str(tmp_path / "again"), *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr, more
    done = script("eval.py", trained, f"{trained}/best.pt")
    assert done.returncode == 2 and "one checkpoint is given twice" in done.stderr
    done = script("eval.py", trained, str(tmp_path / "other"))
    assert (
        done.returncode == 2
        and "only runs on the same split of the same data can be compared" in done.stderr
    )
