"""Small real things to test with: a text data set, a command line, a config of a run that takes a
second."""

import contextlib
import os
import random

import numpy as np
import pytest
import torch

import batches
import data
import examples
import tasks
import train
from eval import basic_report
from predict import open_data
from sources import rebuild_command, resolve
from tests.forks import ROOT

for name in list(os.environ):  # what a login, a launcher or a notebook has left
    of_launcher = name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if of_launcher or name.startswith("WANDB_") or name in ("NETRC", "MPLBACKEND"):
        del os.environ[name]
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: a core each
    torch.set_num_threads(1)
SHARED = (
    ROOT.parent / "shared" / "data"
)  # real data sets; tests that need them skip where they are not
WORDS = {
    "sport": "goal match striker referee coach",
    "tech": "chip code laptop network software",
    "money": "shares bank profit market euro",
}


def write_toy(path, n=120, seed=0, longest=40):
    """A .csv of n different texts of 1 to `longest` words in 3 classes, told apart by a few of
    the words."""
    rng = random.Random(seed)
    with open(path, "w") as f:
        f.write("label,text\n")
        for i in range(n):
            label = sorted(WORDS)[i % 3]
            words = rng.choices(
                WORDS[label].split() + "the a of and on in it was".split(),
                k=rng.randint(1, longest),
            )
            f.write(f'{label},"{" ".join(words)} {i}"\n')
    return path


@pytest.fixture
def toy(tmp_path):
    """Settings of a run on the toy data, as a dict."""
    return dict(
        dataset="toy",
        train_file=str(write_toy(tmp_path / "toy.csv")),
        data_dir=str(tmp_path / "data"),
        out_dir=str(tmp_path / "out"),
        val_fraction=0.1,
        vocab_size=300,
        max_len=32,
        n_layer=1,
        d_model=32,
        n_head=2,
        batch_size=16,
        epochs=2.0,
        learning_rate=0.003,
        wandb_mode="disabled",
        dtype="float32",
        device="cpu",
        log_interval=1,
    )


@pytest.fixture
def toy_config(toy):
    from train import Config

    return Config(**toy)


def open_split(cfg, meta, split, max_len, seed=0, **changes):
    """A split of the data set that a config names."""
    folder, rebuild = data.folder_of(cfg), rebuild_command(cfg)
    return batches.open_split(folder, meta, split, max_len, rebuild, seed=seed, **changes)


@contextlib.contextmanager
def interrupted(n_steps):
    """A run that is started within is interrupted after n_steps steps."""
    real, calls = train.compute_gradient, []

    def failing(*args):
        calls.append(1)
        if len(calls) > n_steps:
            raise KeyboardInterrupt
        return real(*args)

    train.compute_gradient = failing
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        train.compute_gradient = real


def labelled(documents, labels, shape=None):
    """A Batch of text: token ids and a class (or a multi-hot row) for each document."""
    labels = np.asarray(labels)
    empty = examples.PackedText(None, np.zeros(1, np.int64), labels, max_len=64, n_suffix=0)
    return empty.pack_labelled(documents, labels, shape and examples.PaddedShape(*shape))


def packed(documents, shape=None):
    """The inputs of a model: (tokens, cu_seqlens)."""
    return examples.pack(documents, shape and examples.PaddedShape(*shape))


def class_task(n_classes=4, per_class=None, **settings):
    """The task of telling n_classes apart, as train.py makes it."""
    meta = {
        "label_names": list("abcdefgh")[:n_classes],
        "splits": {"train": {"per_class": per_class or [1] * n_classes}},
    }
    return tasks.ClassTask(train.Config(**settings), meta)


def task_of(cfg, meta):
    """The task of a config on its data set, as train.py makes it."""
    return tasks.task_class(cfg, resolve(cfg))(cfg, meta)


def report_of(clf, split):
    """What eval.py would report of a Classifier on a split, without intervals."""
    examples = open_data(clf, split)
    return basic_report(clf, clf.logits(examples).double().numpy(), examples.labels)
