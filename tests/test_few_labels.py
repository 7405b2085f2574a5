"""Few labels: all of them are learnt from, the run is long enough to learn, and what is said of it
is honest."""

import json
import os
from pathlib import Path

from configurator import UserError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import finetune
import metrics
import optim
import run_data
import tasks
import train
from huggingface import save_hf
from predict import Classifier, open_data
from tests.conftest import interrupted, open_split, write_toy
from tests.forks import script
from weights import from_pretrained, load_checkpoint

hf = pytest.importorskip("transformers")


@pytest.fixture
def few(toy, tmp_path):
    """Settings of a run on 24 texts, with a test file."""
    write_toy(tmp_path / "few.csv", 24, seed=5)
    write_toy(tmp_path / "test.csv", 90, seed=6)
    return toy | dict(
        dataset="few", train_file=str(tmp_path / "few.csv"), val_fraction=None,
        test_file=str(tmp_path / "test.csv"),
    )  # fmt: skip


def test_every_label_is_learnt_from_where_val_would_say_nothing(few, tmp_path, capsys):
    train.train(train.Config(**few | dict(epochs=2.0)))
    said = capsys.readouterr().out
    assert (
        "24 examples / 16" in said and "no val: the weights of step 4, the last, are kept" in said
    )
    best, last = (load_checkpoint(f"{few['out_dir']}/{name}.pt") for name in ("best", "last"))
    assert all(torch.equal(w, last["model"][name]) for name, w in best["model"].items())
    assert best["step"] == 4
    done = script("eval.py", few["out_dir"], "--wandb_mode=disabled")
    assert done.returncode == 0, done.stderr
    report = json.load(open(f"{few['out_dir']}/eval.json"))
    assert report["n"] == 90 and "temperature" not in report
    done = script("eval.py", few["out_dir"], "--split=val")
    assert done.returncode == 2 and "has no val split" in done.stderr
    # of enough texts a tenth is val, and --val_fraction holds some out all the same
    write_toy(tmp_path / "many.csv", 500)
    enough = few | dict(dataset="many", train_file=str(tmp_path / "many.csv"))
    assert data.build(train.Config(**enough))["splits"]["val"]["examples"] == 50
    given = few | dict(val_fraction=0.25, overwrite=True)
    assert data.build(train.Config(**given))["splits"]["val"]["examples"] == 6
    data.open_meta(train.Config(**few))  # None: as it was built


def test_a_run_is_long_enough_to_warm_up():
    cfg = train.Config(learning_rate=1.0)
    assert [optim.warmup_steps(cfg, n) for n in (4, 30, 400, 10**6)] == [0, 3, 40, 50]
    assert optim.learning_rate_at(cfg, 0, 4) == 1.0


def test_settings_of_length(few):
    with pytest.raises(UserError, match="--warmup_steps=4: the run has 4 steps"):
        train.train(train.Config(**few | dict(epochs=2.0, warmup_steps=4)))
    train.train(train.Config(**few | dict(epochs=2.0, min_steps=9)))
    assert load_checkpoint(f"{few['out_dir']}/last.pt")["step"] == 9
    with pytest.raises(UserError, match="--patience.* needs --best_by=val_loss"):
        train.train(train.Config(**few | dict(best_by="last", patience=2)))


def test_fine_tuning_has_a_recipe_for_each_objective():
    few = finetune.with_recipe(finetune.Config(objective="contrastive"))
    many = finetune.with_recipe(finetune.Config())
    assert (few.epochs, few.min_steps, few.learning_rate) == (25.0, 25, 1e-4)
    assert (many.epochs, many.min_steps, many.learning_rate) == (4.0, 100, 2e-4)
    given = finetune.with_recipe(finetune.Config(epochs=1.0, learning_rate=1e-3))
    assert (given.epochs, given.min_steps, given.learning_rate) == (1.0, 0, 1e-3)


def test_the_last_weights_are_kept_where_that_is_asked_for(toy):
    train.train(train.Config(**toy | dict(epochs=3.0, best_by="last")))
    best, last = (load_checkpoint(f"{toy['out_dir']}/{name}.pt") for name in ("best", "last"))
    assert best["step"] == last["step"] == last["best"]["step"]
    assert all(torch.equal(w, last["model"][name]) for name, w in best["model"].items())


# --------------------------------------------------------------------------------------------------
# The contrastive objective


def contrastive_task(n_classes=3):
    meta = {"label_names": list("abc")[:n_classes], "splits": {"train": {"per_class": [1] * 3}}}
    return tasks.ContrastiveTask(train.Config(objective="contrastive"), meta)


def test_the_loss_is_that_of_all_pairs():
    torch.manual_seed(0)
    vectors, y = torch.randn(7, 5), torch.tensor([0, 1, 0, 2, 1, -100, 0])
    same, other = [], []
    for i in range(7):
        for j in range(7):
            if i != j and y[i] >= 0 and y[j] >= 0:
                cosine = F.cosine_similarity(vectors[i], vectors[j], dim=0).item()
                (same if y[i] == y[j] else other).append((cosine - (y[i] == y[j]).item()) ** 2)
    expected = (np.mean(same) + np.mean(other)) / 2
    assert contrastive_task().loss_sum(vectors, y).item() / 6 == pytest.approx(expected, rel=1e-5)
    one_class = contrastive_task().loss_sum(vectors[:1], y[:1])
    assert one_class.item() == 0


def test_the_head_is_scikit_learns_logistic_regression():
    sk = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    for n_classes in (3, 5):
        x = F.normalize(torch.randn(60, 8, dtype=torch.float64), dim=1)
        y = torch.arange(60) % n_classes
        weight, bias = tasks.logistic_regression(x, y, n_classes)
        model = sk.LogisticRegression(tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
        got = F.linear(x, weight, bias).softmax(1).numpy()
        np.testing.assert_allclose(got, model.predict_proba(x.numpy()), atol=1e-4)


def test_a_contrastive_run_learns_and_is_resumed(few, tmp_path):
    settings = few | dict(
        objective="contrastive", epochs=30.0, learning_rate=3e-3, eval_interval=5, d_model=64
    )
    train.train(train.Config(**settings))
    whole = load_checkpoint(f"{settings['out_dir']}/last.pt")
    clf = Classifier(settings["out_dir"])
    assert (np.array([r["label"] for r in clf(texts_of(few["train_file"]))])
            == labels_of(few["train_file"])).all()  # fmt: skip
    test = open_data(clf, "test")
    assert (clf.logits(test).argmax(1).numpy() == test.labels).mean() > 0.8
    parts = settings | dict(out_dir=str(tmp_path / "parts"))
    with interrupted(32):
        train.train(train.Config(**parts))
    train.train(train.Config(**parts))
    resumed = load_checkpoint(tmp_path / "parts/last.pt")
    assert all(torch.equal(w, resumed["model"][name]) for name, w in whole["model"].items())


@pytest.mark.parametrize("optimizer", ["adagrad", "muon", "sgd"])
def test_any_optimizer_goes_with_it(few, optimizer):
    """The head has no gradient: it is fitted."""
    train.train(train.Config(**few | dict(
        objective="contrastive", optimizer=optimizer, max_steps=3, eval_interval=3,
    )))  # fmt: skip
    assert load_checkpoint(f"{few['out_dir']}/best.pt")["model"]["head.weight"].any()


def texts_of(path):
    return [line.split('"')[1] for line in open(path) if '"' in line]


def labels_of(path):
    return np.array([line.split(",")[0] for line in open(path) if '"' in line])


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(micro_batch_tokens=64, batch_size=24), "a --micro_batch_tokens of 768 or more"),
        (dict(model="mlp"), "--objective=contrastive is for --model=transformer"),
        (dict(label_smoothing=0.1), "are for --objective=classify"),
        (dict(target="labels"), "--objective=contrastive is for --target=class"),
    ],
)
def test_what_does_not_go_with_it_is_refused(few, changes, says):
    with pytest.raises(UserError, match=says):
        train.train(train.Config(**few | dict(objective="contrastive") | changes))


# --------------------------------------------------------------------------------------------------
# Cross-validation


def test_folds_test_each_label_once_and_in_equal_shares():
    labels = np.array([0] * 10 + [1] * 21 + [2] * 2)
    fold = run_data.assign_folds(labels, 5, seed=0)
    assert set(fold) == set(range(5))
    for c in range(3):
        counts = np.bincount(fold[labels == c], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_cross_validation_says_what_it_is(few, capsys):
    """Each fold's run has not seen its part, the figure is that of all parts, and the run itself is
    the same as without."""
    settings = few | dict(epochs=4.0, out_dir=few["out_dir"] + "-cv")
    train.train(train.Config(**settings | dict(folds=4)))
    said = capsys.readouterr().out
    found = [load_checkpoint(f"{settings['out_dir']}-folds/{i}/last.pt") for i in range(4)]
    assert all("18 examples / 16" in part for part in said.split("fold ")[1:4])
    cfg = train.Config(**settings)
    folder, meta = data.open_or_build(cfg)
    examples = open_split(cfg, meta, "train", cfg.max_len)
    fold = run_data.assign_folds(examples.labels, 4, cfg.split_seed)
    correct = 0
    for i, checkpoint in enumerate(found):
        clf = Classifier(f"{settings['out_dir']}-folds/{i}/last.pt")
        predicted = clf.logits(examples).argmax(1).numpy()
        right = (predicted == examples.labels)[fold == i]
        assert right.mean() == pytest.approx(checkpoint["best"]["val_accuracy"])
        correct += right.sum()
    assert "cross-validated on all 24 examples: val loss" in said
    written = json.load(open(f"{settings['out_dir']}-folds/folds.json"))
    assert written["val_accuracy"] == pytest.approx(correct / 24)
    low, high = written["interval"]
    assert low < correct / 24 < high
    train.train(train.Config(**few | dict(epochs=4.0)))
    one, other = (load_checkpoint(f"{out}/last.pt")["model"]
                  for out in (few["out_dir"], settings["out_dir"]))  # fmt: skip
    assert all(torch.equal(w, other[name]) for name, w in one.items())


@pytest.mark.parametrize(
    "changes",
    [dict(train_fraction=0.5), dict(teacher="x"), dict(objective="mlm", mask_prob=0.3)],
)
def test_folds_that_would_have_seen_their_part_are_refused(few, changes):
    with pytest.raises(UserError, match="--folds tests each label of train once"):
        train.train(train.Config(**few | dict(folds=3) | changes))


def test_folds_have_no_val_to_stop_early_by(few):
    with pytest.raises(UserError, match="--folds trains without a val that --patience"):
        train.train(train.Config(**few | dict(folds=3, patience=2, best_by="val_loss")))


def test_folds_of_a_run_that_is_there(few, capsys):
    """What a run says to do next: its command with --folds. Another run's folder is refused before
    the folds are trained, and another number of folds begins anew."""
    train.train(train.Config(**few | dict(max_steps=2)))
    with pytest.raises(UserError, match="holds a run with other settings"):
        train.train(train.Config(**few | dict(max_steps=3, folds=2)))
    assert not os.path.exists(f"{few['out_dir']}-folds")
    for folds in (2, 3):
        train.train(train.Config(**few | dict(max_steps=2, folds=folds)))
    said = capsys.readouterr().out
    assert said.count("cross-validated on all 24 examples") == 2 and "-folds/0 --test" not in said
    (Path(f"{few['out_dir']}-folds") / "0/config.json").write_text('{"folds"')
    with pytest.raises(UserError, match="config.json is damaged"):
        train.train(train.Config(**few | dict(max_steps=2, folds=3)))


def test_more_folds_than_labels_are_refused(few):
    with pytest.raises(UserError, match="--folds=25: train has only 24 examples"):
        train.train(train.Config(**few | dict(folds=25, epochs=1.0)))
    assert not os.path.exists(f"{few['out_dir']}-folds/0/best.pt")  # before the first is trained


def test_wilsons_interval():
    low, high = metrics.wilson_interval(0.9, 20)
    assert (low, high) == pytest.approx((0.6990, 0.9721), abs=1e-3)  # Wilson 1927; R's prop.test
    assert metrics.wilson_interval(1.0, 10)[0] < 0.75


# --------------------------------------------------------------------------------------------------
# What sentence-transformers folders say of themselves


@pytest.fixture
def sentence_folder(tmp_path):
    torch.manual_seed(0)
    model = hf.BertModel(
        hf.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
        )  # fmt: skip
    ).eval()
    folder = tmp_path / "sentence"
    model.save_pretrained(folder)
    modules = [dict(type=f"sentence_transformers.models.{name}", path=path)
               for name, path in (("Transformer", ""), ("Pooling", "1_Pooling"),
                                  ("Normalize", "2_Normalize"))]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    return model, folder


def test_the_folder_says_how_tokens_become_a_vector(sentence_folder):
    theirs, folder = sentence_folder
    model = from_pretrained(folder, n_classes=3)
    c = model.config
    assert (c.pooling, c.normalize, c.head_dense, model.dense) == ("mean", True, None, None)
    ids = [[5, 6, 7, 8], [9, 10]]
    with torch.no_grad():
        tokens = torch.tensor(sum(ids, []))
        got = F.normalize(model.vectors(tokens, torch.tensor([0, 4, 6], dtype=torch.int32)), dim=1)
        for row, document in zip(got, ids):
            hidden = theirs(torch.tensor([document]))[0][0]
            torch.testing.assert_close(row, F.normalize(hidden.mean(0), dim=0), atol=1e-5, rtol=0)
    # one that is asked for is the family's, with its own layer before the head
    for pooling in ("cls", "mean"):
        c = from_pretrained(folder, n_classes=3, pooling=pooling).config
        assert (c.pooling, c.normalize, c.head_dense) == (pooling, False, "tanh")
    cfg = finetune.with_weights_settings(finetune.Config(kind="image", dataset="mnist5k"), folder)
    assert cfg.max_len == 12


def test_what_transformers_cannot_pool_is_not_written_as_if_it_could(sentence_folder, tmp_path):
    _, folder = sentence_folder
    model = from_pretrained(folder, n_classes=2)
    with pytest.raises(UserError, match="fine-tune with --pooling=cls"):
        save_hf(model, tmp_path / "hf", ["a", "b"], "{}")
    save_hf(from_pretrained(folder, 2, pooling="cls"), tmp_path / "hf", ["a", "b"], "{}")


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "is not supported"),
        ("1_Pooling/config.json",
         {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
         "is not supported, only one of"),
        ("modules.json", [{"type": "x.Dense", "path": "2_Dense"}], "Dense layer is not supported"),
        ("modules.json", [3], "damaged"),
    ],
)  # fmt: skip
def test_a_folder_that_we_would_not_compute_exactly_is_refused(
    sentence_folder, file, content, says
):
    _, folder = sentence_folder
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        from_pretrained(folder, n_classes=3)
