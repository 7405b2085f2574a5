"""train_fraction: nested, stratified, the same each time, and nothing else of train is read;
eval.py draws the curve."""

from configurator import UserError

import numpy as np
import pytest

import data
import examples
import run_data
import train
from tests.conftest import open_split
from tests.forks import script


@pytest.mark.parametrize("seed", [0, 1])
def test_shares_are_nested_stratified_and_repeatable(seed):
    labels = np.random.default_rng(seed).choice(4, 1003, p=[0.6, 0.3, 0.09, 0.01])
    shares = [run_data.stratified_subset(labels, f, seed) for f in (0.01, 0.1, 0.3, 0.5, 1.0)]
    assert [len(s) for s in shares] == [10, 100, 301, 502, 1003] and all(
        np.unique(s).tolist() == s.tolist() for s in shares
    )
    for small, large in zip(shares, shares[1:]):
        assert set(small) < set(large)
    for s in shares:
        assert (
            np.abs(
                np.bincount(labels[s], minlength=4) - np.bincount(labels) * len(s) / len(labels)
            ).max()
            <= 1
        )
    assert (
        run_data.stratified_subset(labels, 0.3, seed).tolist()
        == shares[2].tolist()
        != run_data.stratified_subset(labels, 0.3, seed + 1).tolist()
    )
    for other in (labels.astype(np.float32), np.zeros((1003, 3), np.uint8)):
        few, many = (run_data.stratified_subset(other, f, seed) for f in (0.1, 0.3))
        assert len(few) == 100 and set(few) < set(many)


def test_a_run_reads_its_share_and_no_more(toy, monkeypatch):
    seen = set()
    batch = examples.PackedText.batch
    monkeypatch.setattr(
        examples.PackedText,
        "batch",
        lambda self, epoch, indices, shape=None: (
            seen.update(indices if epoch is not None else ()),
            batch(self, epoch, indices, shape),
        )[1],
    )
    cfg = train.Config(**toy | dict(train_fraction=0.3))
    train.train(cfg)
    labels = open_split(cfg, data.open_meta(cfg), "train", 32).labels
    assert seen == set(run_data.stratified_subset(labels, 0.3, cfg.split_seed)) and len(seen) == 29
    for wrong in (
        dict(train_fraction=0.0),
        dict(train_fraction=1.5),
        dict(train_fraction=0.5, mixup=0.5),
    ):
        with pytest.raises(
            UserError, match="--train_fraction=.* must be above 0 and at most 1, and 1 with --mixup"
        ):
            train.train(train.Config(**toy | wrong))


def test_a_language_model_reads_its_share_of_the_blocks(toy):
    settings = toy | dict(objective="mlm", mask_prob=0.3, train_fraction=0.5, max_steps=2)
    train.train(train.Config(**settings))


def test_eval_draws_the_curve(toy, tmp_path):
    runs = [(0.2, 1), (0.2, 2), (1.0, 1)]
    for fraction, seed in runs:
        train.train(
            train.Config(
                **toy
                | dict(
                    train_fraction=fraction,
                    seed=seed,
                    epochs=6.0,
                    out_dir=str(tmp_path / f"runs/{fraction}-{seed}"),
                )
            )
        )
    for fraction in (
        0.2,
        1.0,
    ):  # another model: a curve of its own, whose longer training on few labels does not matter
        train.train(
            train.Config(
                **toy
                | dict(
                    train_fraction=fraction,
                    model="mlp",
                    epochs=1 / fraction,
                    out_dir=str(tmp_path / f"runs/mlp{fraction}"),
                )
            )
        )
    done = script("eval.py", *map(str, (tmp_path / "runs").iterdir()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from 19 to 96 labels") == 2 and "mlp1.0: from 19 to 96" in done.stdout
    table = {
        line.split()[0].split("/")[-1]: float(line.split("%")[0].split()[-1])
        for line in done.stdout.splitlines()
        if "% [" in line
    }
    gain = table["1.0-1"] - table["0.2-1"]
    assert (
        f"1.0-1: from 19 to 96 labels, accuracy changed by {gain:+.1f} points (95 % interval "
        in done.stdout
    )
    assert f"{gain / np.log2(96 / 19):+.1f} for each doubling" in done.stdout
    assert (tmp_path / "runs/learning_curve.png").stat().st_size > 5000
