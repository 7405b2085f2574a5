"""How often val is evaluated does not change what is trained; training never opens the test
split."""

import json
import sys

import torch

import data
import train
from tests.conftest import class_task
from weights import load_checkpoint


def records(folder):
    return [json.loads(x) for x in open(f"{folder}/metrics.jsonl")]


def test_evaluating_more_often_trains_the_same_weights(toy):
    weights = []
    for interval in (2, 5, 100):
        out = f"{toy['out_dir']}-{interval}"
        train.train(
            train.Config(
                **toy | dict(eval_interval=interval, out_dir=out, dropout=0.1, mask_prob=0.1)
            )
        )
        weights.append(load_checkpoint(f"{out}/last.pt")["model"])
        assert sum("val_loss" in r for r in records(out)) == {2: 6, 5: 3, 100: 1}[interval]
    assert all(torch.equal(w[k], v) for w in weights[1:] for k, v in weights[0].items())
    torch.manual_seed(1)
    meta = {"kind": "text", "vocab_size": 300}
    fresh = train.make_model(train.Config(**toy), meta, class_task(3)).state_dict()
    assert all(
        not torch.equal(fresh[k], v) for k, v in weights[0].items()
    )  # all of them were trained


def test_training_opens_no_test_file(toy):
    cfg = train.Config(**toy)
    data.build(cfg)
    opened = []
    sys.addaudithook(
        lambda event, args: (
            opened.append(str(args[0])) if event == "open" and opened is not None else None
        )
    )
    train.train(cfg)
    names = [path for path in opened if toy["data_dir"] in path]
    assert any("train.bin" in n for n in names) and any("val.bin" in n for n in names)
    assert not [n for n in names if "test" in n.rsplit("/", 1)[1]]
    assert not [n for n in opened if n == toy["train_file"]]  # whose rows include test's


def test_patience_stops_early_and_best_is_kept(toy):
    train.train(
        train.Config(**toy | dict(learning_rate=0.0, epochs=20.0, patience=2, eval_interval=3))
    )
    evals = [r for r in records(toy["out_dir"]) if "val_loss" in r]
    assert [r["step"] for r in evals] == [3, 6, 9]  # nothing improves on the first
    best = load_checkpoint(f"{toy['out_dir']}/best.pt")
    assert best["step"] == 3 and best["best"] == evals[0]
    train.train(train.Config(**toy | dict(learning_rate=0.03, epochs=10.0, overwrite=True)))
    evals = [r for r in records(toy["out_dir"]) if "val_loss" in r]
    best = load_checkpoint(f"{toy['out_dir']}/best.pt")
    assert (
        best["best"] == max(evals, key=lambda r: (r["val_accuracy"], -r["val_loss"])) != evals[-1]
    )
