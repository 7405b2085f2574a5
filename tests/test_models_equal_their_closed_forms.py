"""Linear models end where algebra says; every model's gradient is that of finite differences."""

from configurator import UserError

import numpy as np
import pytest
import torch

import data
import train
from baselines import build_model
from model import ModelConfig, patchify
from predict import Classifier, open_data
from tests.conftest import open_split, packed, report_of


def write_table(path, n=300, classes=0, seed=0):
    """A .csv of 5 correlated features and y: a number, or one of `classes` labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5)) @ rng.normal(size=(5, 5)) * [1, 10, 0.1, 5, 1] + [3, -40, 0, 1, 100]
    z = (x - x.mean(0)) / x.std(0)
    y = z @ rng.normal(size=(5, max(classes, 1))) + rng.normal(size=(n, max(classes, 1))) * 1.5
    target = [f"class{c}" for c in y.argmax(1)] if classes else 20 + 8 * y[:, 0]
    with open(path, "w") as f:
        f.write("a,b,c,d,e,y\n")
        f.writelines(",".join(map(repr, map(float, row))) + f",{t}\n" for row, t in zip(x, target))
    return str(path)


def run(tmp_path, classes=0, **settings):
    """Trains the linear model by L-BFGS; returns (train x, train y, weights (C, F), bias (C,),
    eval's figures on test)."""
    cfg = train.Config(
        **dict(
            dataset="table",
            train_file=write_table(tmp_path / "table.csv", classes=classes),
            kind="features",
            label_column="y",
            target="class" if classes else "number",
            data_dir=str(tmp_path / "data"),
            out_dir=str(tmp_path / "out"),
            wandb_mode="disabled",
            device="cpu",
            dtype="float32",
            model="linear",
            optimizer="lbfgs",
            batch_size=300,
            epochs=20.0,
            eval_interval=20,
            overwrite=True,
        )
        | settings
    )
    train.train(cfg)
    d = open_split(cfg, data.open_meta(cfg), "train", 1)
    clf = Classifier(cfg.out_dir)
    figures = report_of(clf, "test")
    w, b = (p.detach().numpy() for p in clf.model.head.parameters())
    return d.values.astype(np.float64), d.labels, w, b, figures, clf


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_least_squares_and_ridge(tmp_path, decay):
    x, y, w, b, figures, clf = run(tmp_path, weight_decay=decay)
    assert (
        abs(x.mean(0)).max() < 1e-5 and abs(x.std(0) - 1).max() < 1e-5
    )  # standardised by train's own statistics
    n = len(x)
    # minimise |Xw + b - y|²/n + decay/2·|w|²; x and y have mean 0, so b = 0
    expected = np.linalg.solve(x.T @ x / n + decay / 2 * np.eye(5), x.T @ y / n)
    np.testing.assert_allclose(w[0], expected, rtol=0.01, atol=1e-4)
    assert abs(b[0]) < 1e-5
    test = open_data(clf, "test")
    predicted, true = test.values @ expected, test.labels.astype(np.float64)
    assert figures["r2"] == pytest.approx(
        1 - ((predicted - true) ** 2).mean() / true.var(), abs=1e-3
    )
    raw = np.loadtxt(tmp_path / "table.csv", delimiter=",", skiprows=1)[:, 5]
    assert true.mean() * raw.std() + raw.mean() == pytest.approx(
        raw.mean(), abs=raw.std()
    )  # figures are in y's own unit:
    assert figures["rmse"] == pytest.approx(
        ((predicted - true) ** 2).mean() ** 0.5 * clf.scaling["target_std"], rel=1e-2
    )


def test_softmax_regression_equals_scikit_learns(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, w, b, figures, clf = run(tmp_path, classes=3, weight_decay=0.02)
    theirs = linear_model.LogisticRegression(C=1 / (0.02 * len(x)), tol=1e-8, max_iter=1000).fit(
        x, y
    )
    np.testing.assert_allclose(w, theirs.coef_, rtol=0.01, atol=1e-3)
    np.testing.assert_allclose(
        b - b.mean(), theirs.intercept_ - theirs.intercept_.mean(), rtol=0.01, atol=1e-3
    )
    test = open_data(clf, "test")
    assert figures["accuracy"] == pytest.approx(theirs.score(test.values, test.labels), abs=1e-9)


def test_adamw_comes_to_the_same_line(tmp_path):
    x, y, w, b, *_ = run(
        tmp_path,
        optimizer="adamw",
        batch_size=32,
        epochs=150.0,
        learning_rate=0.03,
        weight_decay=0.0,
        eval_interval=10**6,
        warmup_steps=0,
    )
    expected, *_ = np.linalg.lstsq(x, y, rcond=None)
    ours, theirs = (1 - ((fit - y) ** 2).mean() / y.var() for fit in (x @ w[0] + b, x @ expected))
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_lbfgs_needs_all_of_train(tmp_path):
    with pytest.raises(UserError, match="lbfgs needs all 240 examples.*--batch_size=240"):
        run(tmp_path, batch_size=100)


@pytest.mark.parametrize(
    "kw",
    [
        dict(vocab_size=30, max_len=16),
        dict(vocab_size=30, max_len=16, mlp="swiglu", pooling="cls", causal=True),
        dict(image_size=(2, 8, 8), patch=4),
        dict(
            image_size=(1, 8, 8),
            patch=4,
            cls_token=True,
            pooling="cls",
            position="learned",
            norm="layer",
            norm_bias=True,
            bias=True,
            mlp="gelu",
            head_bias=True,
        ),
        dict(model="mlp", n_features=5),
        dict(model="mlp", vocab_size=30),
        dict(model="mlp", image_size=(1, 4, 4)),
        dict(model="linear", n_features=5),
        dict(model="linear", vocab_size=30, buckets=64),
    ],
)
def test_gradients_are_those_of_finite_differences(kw):
    torch.manual_seed(0)
    model = (
        build_model(ModelConfig(**dict(n_classes=3, n_layer=2, d_model=16, n_head=2, d_ff=8) | kw))
        .double()
        .eval()
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if model.config.vocab_size:
        inputs = packed([torch.randint(0, 30, (n,)).numpy() for n in (5, 1, 9)])
    elif model.config.image_size:
        inputs = (torch.rand(3, *model.config.image_size, dtype=torch.float64) * 255,)
    else:
        inputs = (torch.randn(3, 5, dtype=torch.float64),)
    targets = torch.tensor([0, 2, 1])

    def loss():
        return torch.nn.functional.cross_entropy(model(*inputs), targets)

    model.zero_grad()
    loss().backward()
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        slopes = []
        with torch.no_grad():
            for h in (1e-5, -1e-5):
                p += h * direction
                slopes.append(loss().item())
                p -= h * direction
        assert (p.grad * direction).sum().item() == pytest.approx(
            (slopes[0] - slopes[1]) / 2e-5, rel=1e-4, abs=1e-8
        ), name


def test_patches_hold_each_pixel_once_and_go_back():
    x = torch.randn(2, 3, 8, 12)
    patches = patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    for i in range(6):
        r, c = divmod(i, 3)
        assert torch.equal(
            patches[:, i].view(2, 3, 4, 4), x[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
        )
