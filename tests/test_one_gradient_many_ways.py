"""The gradient of a global batch is the same as one batch, as accumulated micro-batches, and over
several processes."""

import json

import pytest
import torch

import optim
import train
from tests.conftest import class_task, labelled, packed
from tests.forks import script
from tests.test_packed_equals_one_at_a_time import LENGTHS, random_documents, random_model


@pytest.fixture
def machine(toy_config):
    return train.Machine(toy_config)


def gradients(model, micro_batches, machine):
    model.zero_grad()
    task = class_task(label_smoothing=0.1)
    with_loss = train.ModelWithLoss(model, task)
    loss, tokens = train.compute_gradient(with_loss, micro_batches, task, machine)
    return loss, tokens, {n: p.grad.clone() for n, p in model.named_parameters()}


def compiling_keeps_the_gradient(cfg, meta, task, batch, filled, error):
    """Of the model of cfg on the batch; compiled, on the same one `filled` up. Returns the tokens
    (examples) it counts."""
    machine, results = train.Machine(cfg), []
    for compiled in (False, True):
        torch.manual_seed(0)
        with_loss = train.ModelWithLoss(train.make_model(cfg, meta, task), task)
        for p in with_loss.parameters():
            torch.nn.init.normal_(p, std=0.1)
        if compiled:
            # or what other tests compiled would make the sizes symbols: minutes of algebra
            torch.compiler.reset()
            with_loss.compile(fullgraph=True)
        micro_batches = [filled if compiled else batch]
        loss, tokens = train.compute_gradient(with_loss, micro_batches, task, machine)
        results.append(
            (loss, torch.cat([p.grad.flatten() for p in with_loss.parameters()]), tokens)
        )
    (loss, grad, tokens), (compiled_loss, compiled_grad, compiled_tokens) = results
    assert tokens == compiled_tokens and loss > 0.1
    assert (loss - compiled_loss).abs() < error * loss and (
        grad - compiled_grad
    ).norm() < error * grad.norm()
    return tokens


def test_four_micro_batches_equal_one_batch(machine):
    documents, labels = random_documents(), torch.arange(len(LENGTHS)).numpy() % 4
    model = random_model().double()
    one = gradients(model, [labelled(documents, labels)], machine)
    runs = [[0, 1], [2], [3, 4, 5, 6, 7, 8], [9, 10]]
    four = gradients(model, [labelled([documents[i] for i in r], labels[r]) for r in runs], machine)
    fixed = gradients(
        model,
        [labelled([documents[i] for i in r], labels[r], (512, 20, 64)) for r in runs],
        machine,
    )
    for loss, tokens, grads in (four, fixed):
        assert abs(loss - one[0]) < 1e-6 * abs(one[0]) and tokens == one[1] == sum(LENGTHS)
        for name, g in one[2].items():
            assert g.norm() > 0
            assert (grads[name] - g).norm() <= 1e-6 * g.norm(), (
                name
            )  # in float64, so that only the mathematics counts


def test_the_loss_is_the_mean_over_the_global_batch(machine):
    documents, labels = random_documents(), torch.arange(len(LENGTHS)) % 4
    model = random_model()
    logits = model(*packed(documents))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    loss, _, _ = gradients(model, [labelled([d], [y]) for d, y in zip(documents, labels)], machine)
    assert abs(loss - expected) < 1e-6


def test_the_gradient_of_the_rows_that_occur_is_the_whole_gradient(machine, monkeypatch):
    monkeypatch.setattr(optim, "LARGE_EMBEDDING", 0)
    documents, labels = random_documents(), (torch.arange(len(LENGTHS)) % 4).numpy()
    batches = [labelled(documents[:4], labels[:4]), labelled(documents[4:6], labels[4:6])]
    expected = gradients(random_model(), batches, machine)[2]
    model = random_model()
    optimizers = optim.make_optimizers(model, train.Config(), torch.device("cpu"))
    task = class_task(label_smoothing=0.1)
    train.compute_gradient(train.ModelWithLoss(model, task), batches, task, machine)
    norm = optim.clip_gradients(optimizers, 0.0)
    assert model.embedding.weight.grad.is_sparse
    torch.testing.assert_close(
        model.embedding.weight.grad.to_dense(), expected["embedding.weight"], atol=1e-7, rtol=1e-6
    )
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in expected.values()]).norm())


def losses(folder):
    records = [json.loads(x) for x in open(f"{folder}/metrics.jsonl")]
    return torch.tensor(
        [[r["loss"], r["grad_norm"]] for r in records if "loss" in r]
    ), torch.tensor([[r["val_loss"], r["val_accuracy"]] for r in records if "val_loss" in r])


@pytest.mark.parametrize(
    "kw", [{}, dict(model="linear", optimizer="adagrad", buckets=2**20)]
)  # whose gradient is sparse
def test_two_processes_and_accumulation_give_the_losses_of_one(toy, kw):
    # 97 train examples / 16: the last batch of an epoch has one document, so that one of two
    # processes has none
    toy |= dict(val_fraction=0.1, test_fraction=0.09) | kw
    expected = train.train(train.Config(**toy)) or losses(toy["out_dir"])
    assert len(expected[0]) == 14
    for name, processes, tokens in (("two", 2, 16384), ("accumulated", 0, 64), ("both", 2, 64)):
        settings = toy | dict(out_dir=f"{toy['out_dir']}-{name}", micro_batch_tokens=tokens)
        done = script("train.py", processes=processes, **settings)
        assert done.returncode == 0, done.stderr
        for got, want in zip(losses(f"{toy['out_dir']}-{name}"), expected):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
