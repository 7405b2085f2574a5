"""The changes that the README shows under "Change it" apply to the code as it is, and work."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, WORDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGES = dict(re.findall(r"\*\*(A[^.:*]*)[^\n]*\n\n```diff\n(.*?)```", README, re.S))


@pytest.fixture
def changed(tmp_path):
    """A function that makes a copy of the code with one change; returns a function that runs a
    command in it."""

    def change(title):
        code = tmp_path / "code"
        code.mkdir()
        for file in ROOT.glob("*.py"):
            shutil.copy(file, code)
        (tmp_path / "change.diff").write_text(CHANGES[title], encoding="utf-8")
        apply = ["git", "apply", "--unidiff-zero", "-p1", str(tmp_path / "change.diff")]
        subprocess.run(apply, cwd=code, check=True)

        def run(*command):
            done = subprocess.run(
                [sys.executable, *command], cwd=code, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        return run

    return change


def options(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def losses(toy, key):
    records = map(json.loads, open(f"{toy['out_dir']}/metrics.jsonl"))
    return [record[key] for record in records if key in record]


def test_there_are_six_and_each_is_short():
    assert len(CHANGES) == 6
    for diff in CHANGES.values():
        lines = [line for line in diff.splitlines() if line[0] in "+-" and line[:3] not in "+++---"]
        assert 0 < len(lines) < 10


def test_a_pooling(changed, toy):
    changed("A pooling")("train.py", *options(toy | dict(pooling="ends", epochs=6.0)))
    assert losses(toy, "val_accuracy")[-1] > 0.6


def test_an_optimizer(changed, toy):
    changed("An optimizer")("train.py", *options(toy | dict(optimizer="nadam", epochs=6.0)))
    assert losses(toy, "val_accuracy")[-1] > 0.6


def test_a_task(changed, toy):
    changed("A task")("train.py", *options(toy | dict(epochs=6.0)))
    start, *_, end = losses(toy, "loss")
    assert start == pytest.approx(2 / 3)  # the margin of 1 to each of two other classes, by 3
    assert end < 0.2 and losses(toy, "val_accuracy")[-1] > 0.8


def test_a_file_format(changed, tmp_path):
    rows = [f"{label}|{words} {i}\n" for i in range(20) for label, words in WORDS.items()]
    (tmp_path / "rows.psv").write_text("".join(rows))
    settings = dict(
        dataset="rows", train_file=tmp_path / "rows.psv", data_dir=tmp_path / "data",
        label_column=0, text_column=1, vocab_size=300,
    )  # fmt: skip
    printed = changed("A file format")("data.py", *options(settings))
    meta = json.load(open(tmp_path / "data/rows/meta.json"))
    assert meta["label_names"] == sorted(WORDS) and "rows: 3 classes" in printed
    assert sum(split["examples"] for split in meta["splits"].values()) == 60


def test_a_metric(changed, toy):
    run = changed("A metric")
    run("train.py", *options(toy))
    run("eval.py", toy["out_dir"])
    report = json.load(open(f"{toy['out_dir']}/eval.json"))
    assert report["balanced_accuracy"] == pytest.approx(np.mean(report["per_class"]["recall"]))
    low, high = report["interval"]["balanced_accuracy"]
    assert low <= report["balanced_accuracy"] <= high
    assert "balanced_accuracy" in open(f"{toy['out_dir']}/report.html").read()


def test_a_model_family(changed, tmp_path):
    pytest.importorskip("transformers")
    program = """
import json, torch, transformers as hf
from huggingface import save_hf
from weights import from_pretrained
torch.manual_seed(0)
config = hf.Data2VecTextConfig(vocab_size=90, num_labels=3, pad_token_id=1, hidden_size=32,
    num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=60)
theirs = hf.Data2VecTextForSequenceClassification(config).eval()
theirs.save_pretrained("theirs")
ours = from_pretrained("theirs")
ids = torch.randint(3, 90, (17,))
logits = ours(ids, torch.tensor([0, 17], dtype=torch.int32))
torch.testing.assert_close(logits, theirs(ids[None]).logits, atol=1e-4, rtol=1e-4)
pad = json.dumps({"added_tokens": [{"content": "<pad>", "id": 1}]})
save_hf(ours, "ours", list("abc"), pad)
back = hf.AutoModelForSequenceClassification.from_pretrained("ours").eval()
assert type(back) is type(theirs)
torch.testing.assert_close(back(ids[None]).logits, logits, atol=1e-5, rtol=1e-5)
"""
    changed("A model family")("-c", program)
