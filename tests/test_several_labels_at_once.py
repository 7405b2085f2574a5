"""Multi-label classification: what the source says is what is trained on, every figure is
scikit-learn's, and the thresholds come from val alone."""

import csv
import json
import random
import warnings

from configurator import UserError

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import data
import examples
import finetune
import metrics
import tasks
import train
from predict import Classifier, open_data
from tests.conftest import WORDS, labelled, open_split, report_of
from tests.forks import script
from tests.test_packed_equals_one_at_a_time import LENGTHS, random_documents, random_model

sk = pytest.importorskip("sklearn.metrics")
NAMES = sorted(WORDS)


def write_labels(path, n=240, separator=","):
    """n texts with none to three labels, each told by two of its words; returns {text: set of
    labels}."""
    rng, truth = random.Random(0), {}
    for i in range(n):
        has = {name for name in NAMES if rng.random() < 0.4}
        words = [w for name in sorted(has) for w in rng.choices(WORDS[name].split(), k=2)]
        words += rng.choices("the a of and on in it was".split(), k=8)
        rng.shuffle(words)
        truth[f"{' '.join(words)} {i}"] = has
    with open(path, "w", newline="") as f:
        if path.suffix == ".csv":
            csv.writer(f).writerows(
                [["text", "label"], *([t, f" {separator} ".join(h)] for t, h in truth.items())]
            )
        else:
            f.writelines(json.dumps({"text": t, "label": list(h)}) + "\n" for t, h in truth.items())
    return truth


@pytest.fixture
def several(toy, tmp_path):
    write_labels(tmp_path / "labels.csv")
    return toy | dict(
        dataset="several",
        train_file=str(tmp_path / "labels.csv"),
        target="labels",
        epochs=30.0,
        warmup_steps=3,
        learning_rate=0.01,
    )


@pytest.mark.parametrize("file, separator", [("a.csv", ","), ("a.csv", "|"), ("a.jsonl", ",")])
def test_the_data_set_holds_the_labels_of_the_source(tmp_path, file, separator):
    truth = write_labels(tmp_path / file, separator=separator)
    cfg = train.Config(
        dataset="s",
        train_file=str(tmp_path / file),
        data_dir=str(tmp_path / "data"),
        vocab_size=300,
        val_fraction=0.1,
        target="labels",
        label_separator=separator,
        lowercase=False,
    )
    meta, found = data.build(cfg), {}
    assert (meta["task"], meta["label_names"], meta["conflicting_labels"]) == (
        "multilabel",
        NAMES,
        0,
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "data/s/tokenizer.json"))
    for split in data.SPLITS:
        examples = open_split(cfg, meta, split, 512)
        assert (
            examples.labels.dtype == np.uint8
            and examples.labels.sum(0).tolist() == meta["splits"][split]["per_class"]
        )
        for i, row in enumerate(examples.labels):
            text = tokenizer.decode(examples.document(i, None).tolist()).strip()
            found[text] = {n for n, k in zip(NAMES, row) if k}
    assert (
        found == truth
        and meta["splits"]["val"]["examples"] == meta["splits"]["test"]["examples"] == 24
    )


@pytest.mark.parametrize(
    "rows, says, settings",
    [
        ("x,\ny,\n", "no row has a label", {}),
        ('x,"a,b"\n,a\n', "line 3: the text is empty", {}),
        ("x,a\ny\n", "line 3: 1 fields where 2 are needed", {}),
        ("x,a\n", "needs a --label_separator", dict(label_separator="")),
        ("x,a\n", "--target=labels is for --kind=text", dict(kind="image")),
        (
            '{"text": "x", "label": ["a", "b, c"]}\n',
            r"line 1: label 'b, c' holds ','; give a --label_separator",
            {},
        ),
    ],
)
def test_bad_sources(tmp_path, rows, says, settings):
    path = tmp_path / ("a.jsonl" if rows.startswith("{") else "a.csv")
    path.write_text(rows if path.suffix == ".jsonl" else "text,label\n" + rows)
    with pytest.raises(UserError, match=says):
        data.build(
            train.Config(
                **dict(
                    dataset="s",
                    train_file=str(path),
                    data_dir=str(tmp_path / "data"),
                    target="labels",
                )
                | settings
            )
        )


def test_a_row_that_is_cut_short_is_left_out_with_several_labels(tmp_path):
    truth = write_labels(tmp_path / "a.csv")
    with open(tmp_path / "a.csv", "a") as f:
        f.write("no label follows\n")
    meta = data.build(
        train.Config(
            dataset="s",
            train_file=str(tmp_path / "a.csv"),
            data_dir=str(tmp_path / "data"),
            vocab_size=300,
            target="labels",
            drop_bad_rows=True,
        )
    )
    assert meta["removed"]["bad_rows"] == 1 and sum(
        s["examples"] for s in meta["splits"].values()
    ) == len(truth)


def test_settings_for_one_class_are_refused(several):
    for setting in (
        dict(class_weights="balanced"),
        dict(focal_gamma=2.0),
        dict(label_smoothing=0.1),
    ):
        with pytest.raises(UserError, match="are for --target=class"):
            train.train(train.Config(**several | setting))


def test_the_loss_is_torchs_however_the_batch_is_cut(toy_config):
    documents, y = random_documents(), np.random.default_rng(0).integers(0, 2, (len(LENGTHS), 4))
    model, machine = random_model().double(), train.Machine(toy_config)
    whole = labelled(documents, y)
    meta = {"kind": "text", "task": "multilabel", "label_names": list("abcd")}
    task = tasks.LabelsTask(toy_config, meta)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        model(*whole.inputs), torch.tensor(y).double()
    )
    expected.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    cut = [
        labelled([documents[i] for i in r], y[r], (512, 20, 64))
        for r in ([0, 1], [2], [3, 4, 5, 6, 7, 8], [9, 10])
    ]
    texts = examples.PackedText(None, np.zeros(1, np.int64), y, max_len=64, n_suffix=0)
    none = texts.__getitems__([])  # what a process without a document gets
    for micro_batches in ([whole], cut, [*cut, *none]):
        model.zero_grad()
        loss, _ = train.compute_gradient(
            train.ModelWithLoss(model, task), micro_batches, task, machine
        )
        assert abs(loss - expected) < 1e-9
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradient[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        "random",
        "a label that never occurs",
        "a label that is never given",
        "nothing at all",
        "one example",
        "ties",
    ],
)
@pytest.mark.parametrize("thresholds", [0.5, [0.2, 0.5, 0.7, 0.4]])
def test_figures(case, thresholds):
    rng = np.random.default_rng(0)
    n = 1 if case == "one example" else 200
    z, y = rng.normal(size=(n, 4)) - 0.5, rng.integers(0, 2, (n, 4))
    if case == "a label that never occurs":
        y[:, 1] = 0
    if case == "a label that is never given":
        z[:, 2] = -9
    if case == "nothing at all":
        z[:], y[:] = -9, 0
    if case == "ties":
        z = z.round()
    m, p = metrics.label_report(z, y, thresholds), torch.tensor(z).sigmoid().numpy()
    said = (p >= thresholds).astype(int)
    assert m["n"] == n and m["accuracy"] == pytest.approx(sk.accuracy_score(y, said))
    assert m["hamming_loss"] == pytest.approx(sk.hamming_loss(y, said))
    assert m["micro_f1"] == pytest.approx(sk.f1_score(y, said, average="micro", zero_division=0))
    assert m["weighted_f1"] == pytest.approx(
        sk.f1_score(y, said, average="weighted", zero_division=0)
    )
    assert m["samples_f1"] == pytest.approx(
        sk.f1_score(y, said, average="samples", zero_division=1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mean of nothing
        macro = sk.f1_score(
            y, said, average="macro", zero_division=np.nan
        )  # over the labels that occur or are given
    assert m["macro_f1"] == pytest.approx(np.nan_to_num(macro))
    assert m["loss"] == pytest.approx(
        torch.nn.functional.binary_cross_entropy_with_logits(
            torch.tensor(z), torch.tensor(y).double()
        ).item()
    )
    expected = sk.precision_recall_fscore_support(y, said, average=None, zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "support"), expected):
        assert m["per_class"][key] == pytest.approx(values)
    areas = [
        sk.roc_auc_score(y[:, c], z[:, c]) if 0 < y[:, c].sum() < n else None for c in range(4)
    ]
    assert m["per_class"]["auroc"] == [a if a is None else pytest.approx(a) for a in areas]
    defined = [a for a in areas if a is not None]
    assert m["auroc"] == (pytest.approx(np.mean(defined)) if defined else None)


@pytest.mark.parametrize("digits", [1, 9])
def test_the_thresholds_have_the_best_f1_of_all(digits):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, (150, 3))
    z, y[:, 2] = (rng.normal(size=(150, 3)) + y).round(digits), 0
    (t,) = metrics.f1_thresholds(z, y, np.ones((1, len(z)), int))
    p = torch.tensor(z).sigmoid().numpy()
    for c in range(2):
        precision, recall, _ = sk.precision_recall_curve(y[:, c], p[:, c])
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()
        assert sk.f1_score(y[:, c], p[:, c] >= t[c]) == pytest.approx(best)
    assert t[2] == 0.5  # never seen: nothing to fit
    assert metrics.fit_thresholds(z, y)[:2] == pytest.approx(t[:2], abs=0.15)


def test_a_run_learns_and_eval_fits_on_val_alone(several):
    train.train(train.Config(**several))
    out = several["out_dir"]
    evals = [r for r in map(json.loads, open(f"{out}/metrics.jsonl")) if "val_loss" in r]
    clf = Classifier(out)
    best = max(evals, key=lambda r: (r["val_micro_f1"], -r["val_loss"]))
    report = report_of(clf, "val")
    assert clf.step == best["step"] and report["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert (report["accuracy"], report["micro_f1"]) == pytest.approx(
        (best["val_accuracy"], best["val_micro_f1"])
    )
    assert (
        clf(["goal coach shares"])[0]["labels"] == ["money", "sport"]
        and clf.thresholds.tolist() == [0.5] * 3
    )

    done = script("eval.py", out)
    assert done.returncode == 0, done.stderr
    report = json.load(open(f"{out}/eval.json"))
    assert report["micro_f1"] > 0.9 and f"micro_f1 {report['micro_f1']:.4f} [" in done.stdout
    assert (
        report["interval"]["micro_f1"][0] <= report["micro_f1"] <= report["interval"]["micro_f1"][1]
    )
    val = open_data(clf, "val")
    expected = metrics.fit_thresholds(clf.logits(val), val.labels)
    assert report["thresholds"] == pytest.approx(expected.tolist())
    page = open(f"{out}/report.html").read()
    assert 'alt="labels"' in page and 'alt="curves"' in page

    clf = Classifier(out)  # which now takes the thresholds that were fitted
    test = open_data(clf, "test")
    texts = [clf.tokenizer.decode(test.document(i, None).tolist()) for i in range(len(test))]
    said = [[n in r["labels"] for n in NAMES] for r in clf(texts)]
    expected = sk.f1_score(test.labels, said, average="samples", zero_division=1)
    assert report["at_thresholds"]["samples_f1"] == pytest.approx(expected)
    assert (
        script("eval.py", out, "--split=val").returncode == 0
    )  # fits the same, and measures nothing with it
    on_val = json.load(open(f"{out}/eval.json"))
    assert on_val["thresholds"] == report["thresholds"] and "at_thresholds" not in on_val
    (r,) = clf(["goal coach shares"])
    p, given = (
        np.array(list(r["probabilities"].values())),
        np.array([n in r["labels"] for n in NAMES]),
    )
    assert r["probability"] == pytest.approx(np.where(given, p, 1 - p).prod()) and r[
        "label"
    ] == ",".join(r["labels"])


def test_predicting_and_comparing(several, tmp_path):
    other = several | dict(model="linear", out_dir=str(tmp_path / "other"), learning_rate=0.02)
    for settings in (several, other):
        train.train(train.Config(**settings))
    of_the_weights = "n_layer", "d_model", "n_head"
    tuned = {key: value for key, value in several.items() if key not in of_the_weights} | dict(
        init_from=several["out_dir"],
        out_dir=str(tmp_path / "tuned"),
        epochs=1.0,
        learning_rate=1e-4,
    )
    finetune.finetune(finetune.Config(**tuned))
    before, after = (
        json.loads(open(f"{s['out_dir']}/metrics.jsonl").readlines()[-1]) for s in (several, tuned)
    )
    assert after["val_micro_f1"] == pytest.approx(
        before["val_micro_f1"], abs=0.05
    )  # it began where the other ended
    said = script(
        "predict.py", several["out_dir"], "--text=goal coach shares", "--text=the a of"
    ).stdout.splitlines()
    assert said[0].startswith("money,sport: ") and said[1].startswith("none: ")
    (tmp_path / "in.txt").write_text("goal coach shares\nthe a of\n")
    done = script(
        "predict.py", several["out_dir"], input=tmp_path / "in.txt", output=tmp_path / "out.csv"
    )
    assert done.returncode == 0, done.stderr
    assert [r["label"] for r in csv.DictReader(open(tmp_path / "out.csv"))] == ["money,sport", ""]
    done = script("eval.py", several["out_dir"], other["out_dir"])
    assert done.returncode == 0, done.stderr
    clf = Classifier(several["out_dir"])
    report = report_of(clf, "test")
    row = next(
        line for line in done.stdout.splitlines() if line.startswith(several["out_dir"] + " ")
    )
    assert f"{report['accuracy']:7.2%} [" in row and f"{report['macro_f1']:9.4f}" in row
