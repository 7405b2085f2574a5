"""A student learns from a teacher's logits on train, and on text without labels; never on test."""

from configurator import UserError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import examples
import tasks
import teacher
import train
from predict import Classifier
from tests.conftest import labelled, write_toy
from weights import load_checkpoint


@pytest.fixture
def taught(toy, tmp_path):
    """Settings of a student of another tokenizer than its teacher, which is trained."""
    teacher_run = toy | dict(out_dir=str(tmp_path / "teacher"), epochs=6.0, learning_rate=3e-3)
    train.train(train.Config(**teacher_run))
    student = {k: v for k, v in toy.items() if k != "vocab_size"}
    return student | dict(
        tokenizer="words", teacher=teacher_run["out_dir"], out_dir=str(tmp_path / "student")
    )


def task(weight, temperature, n_classes=3):
    meta = {"label_names": list("abc")[:n_classes], "splits": {"train": {"per_class": [1] * 3}}}
    cfg = train.Config(teacher="x", teacher_weight=weight, teacher_temperature=temperature)
    return tasks.TaughtTask(cfg, meta)


def test_the_loss_is_hintons():
    torch.manual_seed(0)
    z, t = torch.randn(4, 3), torch.randn(4, 3)
    y = torch.tensor([0, 2, -100, 1])  # the third has no label
    targets = torch.cat((y[:, None].float(), t), 1)
    filler = torch.tensor([[-100.0, torch.nan, torch.nan, torch.nan]])
    targets, z = torch.cat((targets, filler)), torch.cat((z, torch.randn(1, 3)))
    hard = F.cross_entropy(z[:4], y, reduction="sum")
    p, q = (t / 3).softmax(1), (z[:4] / 3).softmax(1)
    soft = 9 * (p * (p / q).log()).sum()
    for weight in (0.0, 0.3, 1.0):
        got = task(weight, 3.0).loss_sum(z, targets)
        torch.testing.assert_close(got, (1 - weight) * hard + weight * soft)
    z.requires_grad_()
    task(0.5, 3.0).loss_sum(z, targets).backward()
    assert z.grad.isfinite().all() and not z.grad[4].any()


def test_targets_are_the_classes_and_the_teachers_logits():
    known = labelled([np.array([1, 2]), np.array([3])], [1, 0])
    texts = examples.PackedText(
        np.array([1, 2, 3]), np.array([0, 2, 3]), np.array([1, 0]), max_len=8, n_suffix=0
    )
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    whole = examples.Taught(texts, logits)
    batch = whole.batch(0, np.array([1, 0]), examples.PaddedShape(16, 3, 8))
    assert batch.targets[:2].tolist() == [[0, 3, 4], [1, 1, 2]]
    assert batch.targets[2:, 0].eq(-100).all() and batch.targets[2:, 1:].isnan().all()
    assert whole.empty_batch().targets.shape == (1, 3) and known.n_targets == 2


def test_a_student_of_another_tokenizer(taught, tmp_path, capsys):
    train.train(train.Config(**taught | dict(epochs=2.0)))
    assert "asking " in capsys.readouterr().out
    cfg = train.Config(**taught)
    meta = data.open_meta(cfg)
    values, labels = data.train_examples(cfg)
    (kept,) = (tmp_path / "data/teachers").glob("*.npy")
    logits = np.load(kept)
    clf = Classifier(taught["teacher"])
    expected = clf.logits(clf.examples(values)).numpy()
    np.testing.assert_allclose(logits, expected, atol=0.05)  # bfloat16 where it is native
    assert len(values) == meta["splits"]["train"]["examples"] == 96
    # the second run reads what is kept
    train.train(train.Config(**taught | dict(overwrite=True, seed=2, epochs=2.0)))
    assert "asking " not in capsys.readouterr().out
    # nothing but train's texts was asked for
    assert logits.shape == (96, 3)


def test_a_taught_student_is_nearer_to_its_teacher(taught, tmp_path):
    def distance(**changes):
        out = str(tmp_path / f"s{len(changes)}")
        settings = taught | dict(epochs=6.0, learning_rate=3e-3, out_dir=out) | changes
        train.train(train.Config(**settings))
        student, big = Classifier(out), Classifier(taught["teacher"])
        texts, _ = data.train_examples(train.Config(**taught))
        p, q = (clf.logits(clf.examples(texts)).softmax(1) for clf in (student, big))
        return (p - q).abs().mean().item()

    alone = distance(teacher=None)
    assert distance(teacher_weight=1.0, teacher_spans=2, teacher_temperature=1.0) < 0.8 * alone


def test_spans_are_runs_of_words_and_no_text_twice():
    texts = ["a b c d e", "f g", "a b c d e f"]
    found = teacher.spans(texts, 6, seed=0)
    assert found and len(set(found)) == len(found) and not set(found) & set(texts)
    assert all(any(f" {span} " in f" {text} " for text in texts) for span in found)
    assert found == teacher.spans(texts, 6, seed=0) and teacher.spans(texts, 0, seed=0) == []


def test_unlabelled_text_counts_too(taught, tmp_path):
    (tmp_path / "more.txt").write_text("a goal of the striker\nthe bank and the market\n\n")
    cfg = train.Config(**taught | dict(unlabelled_file=str(tmp_path / "more.txt"), epochs=1.0))
    train.train(cfg)
    (kept,) = (tmp_path / "data/teachers").glob("*.npy")
    assert np.load(kept).shape == (98, 3)
    assert load_checkpoint(f"{taught['out_dir']}/last.pt")["step"] == -(-98 // cfg.batch_size)


def test_teachers_that_cannot_teach_are_refused(taught, toy, tmp_path):
    path = write_toy(tmp_path / "two.csv", 60)
    path.write_text("".join(line for line in open(path) if not line.startswith("tech")))
    other = taught | dict(dataset="two", train_file=str(path))
    with pytest.raises(UserError, match="it knows the labels .* the data has"):
        train.train(train.Config(**other))
    with pytest.raises(UserError, match="there is no such checkpoint"):
        train.train(train.Config(**taught | dict(teacher="nowhere")))
    with pytest.raises(UserError, match="--teacher is for --target=class"):
        train.train(train.Config(**taught | dict(objective="mlm", mask_prob=0.3)))
    with pytest.raises(UserError, match="do not go with --teacher"):
        train.train(train.Config(**taught | dict(class_weights="balanced")))
    with pytest.raises(UserError, match="--teacher_weight=1.5 must be from 0 to 1"):
        train.train(train.Config(**taught | dict(teacher_weight=1.5)))
