"""Schedules are their formulas; every parameter is optimised once, by the optimizer it should
be."""

import copy
import json
import math
import os

from configurator import UserError

import numpy as np
import pytest
import torch

import optim
import tasks
import train
import trials
from baselines import build_model
from model import ModelConfig
from tests.conftest import class_task, packed
from tests.test_packed_equals_one_at_a_time import random_documents, random_model
from weights import load_checkpoint


@pytest.mark.parametrize(
    "schedule, formula",
    [
        ("cosine", lambda x: 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2),
        ("linear", lambda x: 0.1 + 0.9 * (1 - x)),
        ("trapezoid", lambda x: 1.0 if x < 0.75 else 0.1 + 0.9 * (1 - x) / 0.25),
        ("constant", lambda x: 1.0),
    ],
)
def test_learning_rate_at_every_step(schedule, formula):
    cfg = train.Config(
        learning_rate=1.0, min_lr=0.1, warmup_steps=20, schedule=schedule, cooldown=0.25
    )
    for step in range(100):
        expected = (step + 1) / 21 if step < 20 else formula((step - 20) / 80)
        assert optim.learning_rate_at(cfg, step, 100) == pytest.approx(expected, rel=1e-12)


def test_the_rates_of_a_run_are_the_schedules(toy, tmp_path):
    from tests.test_evaluating_changes_nothing import records

    cfg = train.Config(**toy)
    train.train(cfg)
    rates = [r["lr"] for r in records(toy["out_dir"]) if "lr" in r]
    assert (
        rates == [optim.learning_rate_at(cfg, s, len(rates)) for s in range(len(rates))]
        and len(rates) == 12
    )


def test_every_parameter_is_in_exactly_one_group():
    model = random_model(n_layer=2, mlp="swiglu")
    model.blocks[0].norm1.weight.requires_grad = False
    for optimizer in ("adamw", "muon", "adagrad", "sgd"):
        optimizers = optim.make_optimizers(
            model, train.Config(weight_decay=0.3, optimizer=optimizer), torch.device("cpu")
        )
        groups = [g for o in optimizers for g in o.param_groups]
        ids = [id(p) for g in groups for p in g["params"]]
        assert len(ids) == len(set(ids)) and set(ids) == {
            id(p) for p in model.parameters() if p.requires_grad
        }
        decayed = {id(p) for g in groups for p in g["params"] if g.get("weight_decay")}
        assert decayed == {
            id(p)
            for n, p in model.named_parameters()
            if p.ndim >= 2 and (optimizer in ("adagrad", "sgd") or n != "embedding.weight")
        }


def test_muon_gets_the_hidden_matrices_and_nothing_else():
    for model, hidden in (
        (random_model(n_layer=2, bias=True, position="learned"), "blocks"),
        (build_model(ModelConfig(model="mlp", n_features=5, n_classes=3)), "layers"),
    ):
        optimizers = optim.make_optimizers(
            model, train.Config(optimizer="muon"), torch.device("cpu")
        )
        (muon,) = (o for o in optimizers if isinstance(o, optim.Muon))
        assert {id(p) for g in muon.param_groups for p in g["params"]} == {
            id(p) for n, p in model.named_parameters() if n.startswith(hidden) and p.ndim == 2
        }
        assert {p.shape for g in muon.param_groups for p in g["params"] if g["rows"]} == {
            p.shape for n, p in model.named_parameters() if "qkv.weight" in n
        }


def test_muon_equals_torchs_and_is_nearly_orthogonal():
    torch.manual_seed(0)
    shapes = [(24, 8), (24, 8), (8, 24), (16, 16)]
    start = [torch.randn(s) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    stacked = torch.nn.Parameter(
        torch.cat([w.detach() for w in (ours[0], ours[3][:, :8], ours[1])])
    )  # as q, k and v are, whose heads need not be as many
    theirs.append(torch.nn.Parameter(ours[3][:, :8].detach().clone()))
    start.append(theirs[-1].detach().clone())
    a = optim.Muon(
        [
            {"params": ours, "weight_decay": 0.1},
            {"params": [stacked], "weight_decay": 0.1, "rows": (24, 16, 24)},
        ],
        0.02,
    )
    b = torch.optim.Muon(theirs, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        before = ours[0].detach().clone()
        for x, y in zip(ours, theirs):
            x.grad = y.grad = torch.randn_like(x)
        theirs[4].grad = torch.randn_like(theirs[4])
        stacked.grad = torch.cat([ours[0].grad, theirs[4].grad, ours[1].grad])
        a.step(), b.step()
        update = (before * (1 - 0.02 * 0.1) - ours[0].detach()) / (0.02 * 0.2 * 24**0.5)
        values = torch.linalg.svdvals(update)
        assert 0.6 < values.min() and values.max() < 1.3
    q, k, v = stacked.detach().split((24, 16, 24))
    for x, y, w in zip([*ours, k], theirs, start):  # theirs iterates in bfloat16
        assert (x - y).norm() < 0.02 * (x - w).norm()
    for x, y in ((q, ours[0]), (v, ours[1])):
        torch.testing.assert_close(x, y.detach(), atol=1e-5, rtol=0)


def test_sparse_embeddings_move_only_the_rows_that_are_read(
    monkeypatch,
):
    monkeypatch.setattr(optim, "LARGE_EMBEDDING", 0)
    cfg, read = train.Config(optimizer="adamw", weight_decay=0.0), torch.tensor([3, 5, 6])
    model, dense = (
        build_model(ModelConfig(model="mlp", vocab_size=20, n_classes=3, d_model=8))
        for _ in range(2)
    )
    dense.load_state_dict(before := copy.deepcopy(model.state_dict()))
    ours, plain = (
        optim.make_optimizers(model, cfg, torch.device("cpu")),
        torch.optim.AdamW(dense.parameters(), cfg.learning_rate, (0.0, cfg.beta2), weight_decay=0),
    )
    for m, optimizers in ((model, ours), (dense, [plain])):
        torch.manual_seed(0)
        for _ in range(3):
            (m.embedding(read) * torch.randn(3, 8)).sum().backward()
            assert m.embedding.weight.grad.is_sparse == (m is model)
            for o in optimizers:
                o.step()
                o.zero_grad()
    after = model.embedding.weight.detach()
    torch.testing.assert_close(after, dense.embedding.weight.detach(), atol=1e-6, rtol=1e-5)
    still = torch.ones(20, dtype=torch.bool).index_fill(0, read, False)
    assert torch.equal(after[still], before["embedding.weight"][still])
    assert not torch.isclose(after[read], before["embedding.weight"][read]).any()


def test_a_row_that_is_read_once_moves_as_far_as_with_adamw(monkeypatch):
    """Within 3 %: meanwhile AdamW's second moment decays, and its correction for a young run goes
    on."""
    monkeypatch.setattr(optim, "LARGE_EMBEDDING", 0)
    moved, cfg = [], train.Config(optimizer="adamw", beta2=0.999)
    for lazy in (True, False):
        torch.manual_seed(0)
        model = build_model(ModelConfig(model="mlp", vocab_size=20, n_classes=3, d_model=8))
        start, weight = model.embedding.weight.detach().clone(), model.embedding.weight
        optimizers = (
            optim.make_optimizers(model, cfg, torch.device("cpu"))
            if lazy
            else [
                torch.optim.AdamW(
                    [weight], cfg.learning_rate, (cfg.beta1, cfg.beta2), weight_decay=0
                )
            ]
        )
        for step in range(300):  # word 3 in the first two hundred steps once, at the last of them
            word = 3 if step == 199 else 5
            (model.embedding(torch.tensor([word])) * torch.linspace(-1, 1, 8)).sum().backward()
            for o in optimizers:
                o.step()
                o.zero_grad()
        moved.append((weight.detach() - start)[3])
    torch.testing.assert_close(*moved, rtol=0.03, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad_is_torchs(decay, monkeypatch):
    """Without decay the gradient of a text embedding is sparse."""
    monkeypatch.setattr(optim, "LARGE_EMBEDDING", 0)
    ours, plain = random_model(), random_model()
    optimizers = (
        optim.make_optimizers(
            ours, train.Config(optimizer="adagrad", weight_decay=decay), torch.device("cpu")
        ),
        [
            torch.optim.Adagrad(
                [
                    {"params": [p], "weight_decay": decay * (p.ndim >= 2)}
                    for p in plain.parameters()
                ],
                lr=1e-3,
            )
        ],
    )
    for _ in range(3):
        for model, of_model in zip((ours, plain), optimizers):
            model(*packed(random_documents())).square().sum().backward()
            assert model.embedding.weight.grad.is_sparse == (model is ours and not decay)
            optim.clip_gradients(of_model, 0.0)
            for o in of_model:
                o.step()
                o.zero_grad()
    for x, y in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("large", [0, 2**20])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adagrad", "sgd"])
def test_a_gradient_above_the_limit_is_scaled_down_to_it(optimizer, large, monkeypatch):
    """One step with clipping equals one with the gradient scaled by hand."""
    monkeypatch.setattr(optim, "LARGE_EMBEDDING", large)
    results = []
    for by_hand in (True, False):
        model = random_model()
        optimizers = optim.make_optimizers(
            model, train.Config(optimizer=optimizer, beta1=0.9), torch.device("cpu")
        )
        model(*packed(random_documents())).square().sum().backward()
        norm = torch.stack(
            [
                p.grad.to_dense().norm() if p.grad.is_sparse else p.grad.norm()
                for p in model.parameters()
            ]
        ).norm()
        if by_hand:
            for p in model.parameters():
                p.grad = p.grad * (0.01 / norm)
        got = optim.clip_gradients(optimizers, 0.0 if by_hand else 0.01)
        torch.testing.assert_close(got, torch.tensor(0.01) if by_hand else norm)
        for o in optimizers:
            o.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_label_smoothing_and_ignored_targets():
    logits, targets = torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 1])
    task = class_task(3, label_smoothing=0.2)
    keep = targets >= 0
    q = torch.nn.functional.one_hot(targets[keep], 3) * 0.8 + 0.2 / 3
    expected = -(q * logits[keep].log_softmax(1)).sum()
    assert task.loss_sum(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_numbers_without_a_target_neither_count_nor_move_anything():
    """A process without examples has one without a target: NaN."""
    logits = torch.randn(4, 1, requires_grad=True)
    targets = torch.tensor([0.5, torch.nan, -1.0, torch.nan])
    task = tasks.NumberTask(train.Config(), {})
    loss = task.loss_sum(logits, targets)
    loss.backward()
    kept = ~targets.isnan()
    error = logits.detach()[:, 0] - targets
    torch.testing.assert_close(loss.detach(), error[kept].square().sum())
    torch.testing.assert_close(logits.grad[:, 0], torch.where(kept, 2 * error, 0.0))


def test_class_weights_and_focal_loss():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 2, 0, 1, 0, 0])
    weights = tasks.class_weights(train.Config(class_weights="balanced"), [4, 1, 1])
    assert weights.tolist() == [0.5, 2.0, 2.0]
    p = logits.softmax(1)[torch.arange(6), targets]
    task = class_task(3, [4, 1, 1], focal_gamma=2.0, class_weights="balanced")
    expected = -(weights[targets] * (1 - p) ** 2 * p.log()).sum()
    assert task.loss_sum(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UserError, match="neither 'balanced' nor a list of 3"):
        tasks.class_weights(train.Config(class_weights=[1.0]), [4, 1, 1])
    for wrong in ([0.0, 1.0, 1.0], [-1.0, 1.0, 1.0]):
        with pytest.raises(UserError, match="each must be above 0"):
            tasks.class_weights(train.Config(class_weights=wrong), [4, 1, 1])


def test_the_average_is_the_formulas_and_leaves_training_alone(toy):
    weights = []
    for decay in (0.0, 0.9):
        out = f"{toy['out_dir']}-{decay}"
        train.train(train.Config(**toy | dict(ema_decay=decay, out_dir=out)))
        weights.append(load_checkpoint(f"{out}/last.pt"))
    assert all(torch.equal(weights[0]["model"][k], w) for k, w in weights[1]["model"].items())
    p = torch.nn.Linear(1, 1, bias=False)
    ema, expected = optim.EMA(p, 0.9), p.weight.item()
    for step in range(1, 200):
        p.weight.data.fill_(step)
        ema.update(step)
        d = min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * step
    assert ema.values[0].item() == pytest.approx(expected, rel=1e-5)
    ema.swap()
    assert p.weight.item() == pytest.approx(expected, rel=1e-5) and ema.values[0].item() == 199


def test_the_range_test_finds_a_rate_that_trains_and_leaves_no_run(toy):
    settings = toy | dict(batch_size=8, lr_find=True)
    found = []
    for out in ("a", "b"):
        train.train(train.Config(**settings | dict(out_dir=f"{toy['out_dir']}/{out}")))
        found.append(json.load(open(f"{toy['out_dir']}/{out}/lr_find.json")))
    assert found[0] == found[1]  # the same seed, the same suggestion
    assert sorted(os.listdir(f"{toy['out_dir']}/a")) == ["lr_find.json", "lr_find.png"]
    rates, losses = np.array(found[0]["rates"]), found[0]["losses"]
    assert rates[0] == 1e-6 and np.diff(np.log10(rates)) == pytest.approx(
        1 / 20
    )  # 20 steps for each factor of 10
    trained = toy | dict(
        learning_rate=found[0]["suggestion"],
        warmup_steps=0,
        epochs=10.0,
        out_dir=f"{toy['out_dir']}/a",
    )
    train.train(train.Config(**trained))  # the folder is free for a run
    run = [
        f"{toy['out_dir']}/a/{name}"
        for name in ("metrics.jsonl", "config.json", "last.pt", "best.pt")
    ]
    assert json.loads(open(run[0]).readlines()[-1])["val_loss"] < losses[0] / 2
    before = [open(f, "rb").read() for f in run]
    train.train(train.Config(**trained | dict(lr_find=True)))
    assert before == [
        open(f, "rb").read() for f in run
    ]  # a range test beside a run touches nothing of it


def test_what_the_range_test_suggests():
    flat, fall = [2.0] * 60, [2.0 - 0.02 * i for i in range(50)]  # 1.0 is the lowest
    smooth, found, diverged = trials.read_range_test(flat + fall)
    assert smooth[found] <= 2 - (2 - min(smooth)) / 4 < smooth[found - 1] and not diverged
    smooth, found, diverged = trials.read_range_test(flat)
    assert smooth == pytest.approx(flat) and found is None and not diverged
    rises = [
        next(n for n in range(1, 40) if trials.read_range_test(losses + [9.0] * n)[2])
        for losses in (flat, flat + fall)
    ]
    assert rises == [2, 1]  # a tenth of 9 at a time: above 3.0, above 1.5 times the lowest


def test_the_best_checkpoint_is_chosen_by_the_figure_that_is_asked_for(toy):
    for by, best in (("val_loss", min), ("val_accuracy", max)):
        out = f"{toy['out_dir']}-{by}"
        changes = dict(out_dir=out, best_by=by, epochs=8.0, learning_rate=0.02, eval_interval=2)
        train.train(train.Config(**toy | changes))
        evals = [r for r in map(json.loads, open(f"{out}/metrics.jsonl")) if "val_loss" in r]
        assert torch.load(f"{out}/best.pt")["best"][by] == best(r[by] for r in evals)
    with pytest.raises(UserError, match="--best_by=val_r2: there are val_loss, val_accuracy"):
        train.train(train.Config(**toy | dict(best_by="val_r2")))
