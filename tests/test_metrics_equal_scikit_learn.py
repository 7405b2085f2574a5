"""Every figure that eval.py reports is scikit-learn's, on random and degenerate inputs; prediction ignores batching."""
import json

import numpy as np
import pytest
import torch

import eval as eval_script
import train
from tests.conftest import script

sk = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("case", ["random", "one class in the truth", "a class that is never predicted", "one example",
                                  "ties"])
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
    m, predicted = eval_script.metrics(torch.tensor(logits), y, 4), logits.argmax(1)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert m["loss"] == pytest.approx(sk.log_loss(y, p, labels=range(4)), rel=1e-9)
    assert m["accuracy"] == pytest.approx(sk.accuracy_score(y, predicted))
    assert m["macro_f1"] == pytest.approx(sk.f1_score(y, predicted, average="macro", zero_division=0))
    expected = sk.precision_recall_fscore_support(y, predicted, labels=range(4), zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "support"), expected):
        assert m["per_class"][key] == pytest.approx(values)
    assert m["confusion"] == sk.confusion_matrix(y, predicted, labels=range(4)).tolist()


@pytest.fixture
def trained(toy):
    train.train(train.Config(**toy | dict(epochs=6.0)))
    return toy["out_dir"]


def test_eval_reports_test_and_labels_texts(trained):
    done = script("eval.py", trained)
    assert done.returncode == 0, done.stderr
    report = json.load(open(f"{trained}/eval.json"))
    assert report["split"] == "test" and report["n"] == 12 and report["accuracy"] > 0.8
    assert f"accuracy {report['accuracy']:.2%}" in done.stdout
    said = script("eval.py", trained, "--text=goal striker coach", "--text=shares, profit = euro").stdout.splitlines()
    assert said[0].startswith("sport 0.") and said[1].startswith("money 0.")


def test_val_figures_are_those_of_training_and_prediction_ignores_batching(trained, toy):
    clf = eval_script.load_classifier(trained)
    report, _ = eval_script.evaluate(clf, eval_script.open_data(clf, "val"))
    best = [r for r in map(json.loads, open(f"{trained}/metrics.jsonl")) if "val_loss" in r and r["step"] == clf.step][0]
    assert report["loss"] == pytest.approx(best["val_loss"], rel=1e-6) and report["accuracy"] == best["val_accuracy"]
    texts = [f"{'goal ' * (i % 50)} bank {i}" for i in range(70)] + [""]
    together = clf(texts)
    clf.micro_batch_tokens = 40
    for small, big, alone in zip(clf(texts), together, [clf([t])[0] for t in texts]):
        assert small["label"] == big["label"] == alone["label"]
        assert list(small["probabilities"].values()) == pytest.approx(list(alone["probabilities"].values()), abs=1e-5)
        assert sum(big["probabilities"].values()) == pytest.approx(1)
