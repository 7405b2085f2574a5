"""Language models see what they may see, are measured over every token, and lose nothing on the
way to a classifier."""

import collections
import json
import math

from configurator import UserError

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import batches
import data
import eval as eval_script
import examples
import finetune
import language
import report as report_script
import tasks
import train
import values
from model import ModelConfig, Transformer
from predict import Classifier
from runs import StopSignal
from tests.conftest import open_split, packed, task_of, write_toy
from tests.test_evaluating_changes_nothing import records
from tests.test_one_gradient_many_ways import compiling_keeps_the_gradient
from tests.test_packed_equals_one_at_a_time import random_documents
from weights import from_pretrained, load_checkpoint


def language_model(causal, **kw):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, max_len=64, d_model=32, n_head=2, d_ff=64, lm_head="own", causal=causal, **kw
    )
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def unlabelled(toy, tmp_path):
    text = (tmp_path / "toy.csv").read_text()
    (tmp_path / "toy.txt").write_text(text)
    return toy | dict(
        train_file=str(tmp_path / "toy.txt"),
        target="none",
        test_fraction=0.0,
        objective="clm",
        max_len=16,
    )


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_causal_model_sees_no_later_token_and_no_other_document(position):
    model, documents = language_model(True, position=position), random_documents()
    before = model(*packed(documents))
    for d, i in ((2, 20), (5, 63), (6, 0), (9, 3)):
        changed = [x.copy() for x in documents]
        changed[d][i] = (changed[d][i] + 1) % 50
        start = sum(map(len, documents[:d]))
        different = ((model(*packed(changed)) - before).abs() > 1e-6).any(1).nonzero()[:, 0]
        assert different.min() == start + i and different.max() < start + len(documents[d])


def test_a_masked_model_never_reads_what_is_masked(tmp_path, toy):
    cfg = train.Config(**toy)
    meta = data.open_or_build(cfg)[1]
    split = open_split(cfg, meta, "train", 512, 7, objective="mlm", mask_prob=0.4)
    (tokens, cu_seqlens, _, where), targets, *_ = split.batch(0, range(8))
    assert (tokens[where] == meta["mask_id"]).all() and (tokens == meta["mask_id"]).sum() == len(
        where
    ) > 10
    assert not set(where.tolist()) & set(
        cu_seqlens.tolist()
    )  # a document's first token, [CLS], stays
    split.tokens = split.tokens.copy()  # other words under the masks: the model gets the same input
    for i in range(8):
        ids, aim = split.block(i, 0)
        start = split.spans[split.document[i], 0]  # a document is one block here
        split.tokens[start : start + len(ids)][aim >= 0] = 5
    (again, *_), changed, *_ = split.batch(0, range(8))
    assert torch.equal(tokens, again) and not torch.equal(targets, changed)


def test_logits_of_some_tokens_equal_those_of_all():
    model, batch = language_model(False, n_layer=2), packed(random_documents())
    where = torch.tensor([3, 0, 99, 41])
    torch.testing.assert_close(model(*batch, query_index=where), model(*batch)[where])


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_loss_of_a_batch_is_a_plain_implementations(toy, objective):
    """Document by document, attention as its formula, in float64."""
    cfg = train.Config(**toy | dict(objective=objective, mask_prob=0.3 * (objective == "mlm")))
    meta = data.open_or_build(cfg)[1]
    split = open_split(cfg, meta, "train", 12, objective=objective, mask_prob=cfg.mask_prob)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=meta["vocab_size"],
            max_len=12,
            n_layer=1,
            d_model=32,
            n_head=2,
            d_ff=64,
            lm_head="own",
            causal=objective == "clm",
            position="learned",
            qk_norm=False,
        )
    ).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    w, total, n = model.state_dict(), 0.0, 0
    for i in range(20):
        ids, targets = map(torch.from_numpy, split.block(i, 3))
        x = w["embedding.weight"][ids] + w["position.weight"][: len(ids)]
        q, k, v = (
            w["blocks.0.attention.qkv.weight"] @ (norm(x) * w["blocks.0.norm1.weight"]).T
        ).view(3, 2, 16, -1)
        scores = q.mT @ k / 4
        if objective == "clm":
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        x = x + (v @ scores.softmax(-1).mT).reshape(32, -1).T @ w["blocks.0.attention.out.weight"].T
        h = (norm(x) * w["blocks.0.norm2.weight"]) @ w["blocks.0.mlp.up.weight"].T
        x = x + h.relu().square() @ w["blocks.0.mlp.out.weight"].T
        logp = ((norm(x) * w["norm.weight"]) @ w["lm_head.weight"].T).log_softmax(-1)
        here = targets >= 0
        total, n = total - logp[here, targets[here]].sum(), n + int(here.sum())
    cfg.device, cfg.dtype = "cpu", "float32"
    task, machine = task_of(cfg, meta), train.Machine(cfg)
    with_loss = train.ModelWithLoss(model, task)
    loss, tokens = train.compute_gradient(with_loss, [split.batch(3, range(20))], task, machine)
    torch.testing.assert_close(loss, total / n, atol=1e-9, rtol=1e-9)
    assert tokens == (n if objective == "clm" else split.lengths[:20].sum())


def test_evaluation_reads_every_token_once_and_training_moves_the_blocks(unlabelled):
    cfg = train.Config(**unlabelled)
    meta = data.open_or_build(cfg)[1]
    assert [meta["splits"][s]["examples"] for s in ("train", "val")] == [
        1,
        1,
    ] and "test" not in meta["splits"]
    for split in ("train", "val"):
        blocks = open_split(cfg, meta, split, 16, objective="clm")
        ids, targets = (
            np.concatenate(x) for x in zip(*(blocks.block(i) for i in range(len(blocks))))
        )
        assert (ids == blocks.tokens[:-1]).all() and (targets == blocks.tokens[1:]).all()
        seen = [
            [blocks.block(i, epoch)[0].tolist() for i in range(len(blocks))] for epoch in (0, 0, 1)
        ]
        assert seen[0] == seen[1] != seen[2]
        assert all(
            len(block) == 16 for epoch in seen for block in epoch
        )  # the last one reaches back
    text = values.clean(open(cfg.train_file).read())
    assert meta["splits"]["val"]["bytes"] == len(text[int(len(text) * 0.9) :].encode())


def test_all_micro_batches_have_one_shape_for_compiling(unlabelled):
    """Also an epoch's last: whole blocks without targets fill it up."""
    cfg = train.Config(**unlabelled)
    blocks = open_split(cfg, data.open_or_build(cfg)[1], "train", 16, objective="clm")
    for batch_size, limit, world in ((12, 16384, 1), (20, 100, 1), (13, 100, 2)):
        for rank in range(world):
            steps = len(blocks) // batch_size + 2
            requests = list(
                batches.GlobalBatches(
                    blocks, batch_size, limit, 1, 0, steps, rank, world, fixed_shapes=True
                )
            )
            made = [blocks.__getitems__(r) for r in requests]
            (T,) = {len(batch.inputs[0]) for step in made for batch in step}
            assert T % 16 == 0 and T <= limit
            assert {batch.inputs[2] for step in made for batch in step} == {16}
            for step, of_step in zip(requests, made):
                n_targets = sum((batch.targets >= 0).sum() for batch in of_step)
                assert n_targets == sum(batch.n_targets for batch in of_step)
                assert n_targets == 16 * sum(len(request.indices) for request in step)
                assert (
                    sum(len(batch.targets) for batch in of_step) - 16 * -(-batch_size // world) < T
                )


@pytest.mark.parametrize(
    "dtype, norm, position", [("float32", "layer", "learned"), ("bfloat16", "rms", "rope")]
)
def test_a_compiled_models_gradient_is_the_models(
    unlabelled, tmp_path, monkeypatch, dtype, norm, position
):
    monkeypatch.setenv("CI", "true")  # where torch refuses what is a warning elsewhere
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cfg = train.Config(
        **unlabelled
        | dict(dtype=dtype, norm=norm, position=position, n_layer=2, d_model=64, compile=True)
    )
    cfg.device = "cpu"
    meta = data.open_or_build(cfg)[1]
    blocks = open_split(cfg, meta, "train", 16, objective="clm")
    batch, filled = (
        blocks.batch(0, np.arange(8), examples.PaddedShape(T, 8, 16)) for T in (128, 192)
    )
    error = 1e-5 if dtype == "float32" else 2e-2  # bfloat16 rounds at other places
    assert compiling_keeps_the_gradient(cfg, meta, task_of(cfg, meta), batch, filled, error) == 128


@pytest.mark.parametrize("lines", [False, True])
def test_bits_per_byte_count_bytes_whatever_the_tokens(unlabelled, tmp_path, lines):
    """A model that knows nothing needs log2(vocabulary) bits a token; one that does is added up
    token by token."""
    for tokenizer in ("bytes", "bpe"):
        cfg = train.Config(
            **unlabelled
            | dict(tokenizer=tokenizer, lines=lines, dataset=f"lines{lines}", lowercase=False)
        )
        meta = data.open_or_build(cfg)[1]
        val = open_split(cfg, meta, "val", 16, objective="clm")
        decode = Tokenizer.from_file(str(data.folder_of(cfg) / "tokenizer.json")).decode
        texts = [
            decode(val.tokens[a:b]).removeprefix(" ") for a, b in val.spans
        ]  # bpe puts one there
        assert val.n_bytes == len("".join(texts).encode())
        machine = train.Machine(cfg)
        task = task_of(cfg, meta)
        model = train.make_model(cfg, meta, task).eval()
        got = train.evaluate(model, task, val, cfg, machine, StopSignal())
        n = sum(len(val.tokens[a:b]) - 1 for a, b in val.spans)
        assert got["val_bits_per_byte"] == pytest.approx(
            n * math.log2(meta["vocab_size"]) / val.n_bytes, rel=1e-6
        )
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
        nats = 0.0
        for i in range(len(val)):
            ids, targets = map(torch.from_numpy, val.block(i, None))
            logp = model.eval()(*packed([ids.numpy()])).log_softmax(-1)
            nats -= logp[torch.arange(len(ids)), targets].sum().item()
        got = train.evaluate(model, task, val, cfg, machine, StopSignal())
        assert got["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / val.n_bytes, rel=1e-5)
        assert got["val_loss"] == pytest.approx(nats / n, rel=1e-5)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_eval_says_of_a_language_model_what_training_said(unlabelled, objective, capsys):
    settings = unlabelled | dict(
        objective=objective, mask_prob=0.3 * (objective == "mlm"), lines=True, max_steps=10
    )
    train.train(train.Config(**settings))
    last = [r for r in records(settings["out_dir"]) if "val_loss" in r][-1]
    report, *_ = eval_script.full_report(
        Classifier(settings["out_dir"]), eval_script.Config(split="val")
    )
    report_script.print_report(report)
    for k in ("loss", "token_accuracy", *["bits_per_byte"] * (objective == "clm")):
        low, high = report["interval"][k]
        assert report[k] == pytest.approx(last[f"val_{k}"], rel=1e-5) and low <= report[k] <= high
        assert f"{k} {report[k]:.4f}" in capsys.readouterr().out or k != "loss"
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    with pytest.raises(UserError, match="is a language model"):
        Classifier(settings["out_dir"])(["goal"])


@pytest.mark.parametrize("objective", ["classify", "clm", "mlm"])
def test_overfits_eight_examples_to_zero_loss(toy, tmp_path, objective, monkeypatch):
    """But for what nobody can know: with which of the 8 texts a text that begins alike will go
    on."""
    small = write_toy(tmp_path / "small.csv", 8)
    cfg = train.Config(
        **toy
        | dict(
            objective=objective,
            train_file=str(small),
            val_file=toy["train_file"],
            dataset="eight",
            mask_prob=0.3 * (objective == "mlm"),
            dedup=False,
            epochs=300.0,
            batch_size=8,
            d_model=64,
            learning_rate=0.01,
            eval_interval=300,
            log_interval=1,
            weight_decay=0.0,
            n_layer=2,
            max_len=64,
        )
    )
    block = (
        language.LanguageBlocks.block
    )  # with masks that stay, or there would be new ones to fill in for ever
    monkeypatch.setattr(
        language.LanguageBlocks, "block", lambda self, i, epoch: block(self, i, None)
    )
    train.train(cfg)
    known = 0.0
    if objective == "clm":
        split = open_split(cfg, data.open_meta(cfg), "train", 64, objective="clm")
        begun = collections.Counter(
            tuple(t[:k])
            for i in range(8)
            for t in [split.block(i, None)[0].tolist()]
            for k in range(1, len(t) + 1)
        )
        blocks = [[tuple(x) for x in split.block(i, None)] for i in range(8)]
        chances = [
            begun[(*ids[: k + 1], target)] / begun[ids[: k + 1]]
            if k + 1 < len(ids)
            else 1 / begun[ids]
            for ids, targets in blocks
            for k, target in enumerate(targets)
        ]
        known = -np.log(chances).mean()
    assert min(r["loss"] for r in records(toy["out_dir"]) if "loss" in r) - known < 1e-3


def test_activation_checkpointing_changes_memory_not_gradients():
    batch, kept, gradients = packed(random_documents()), [], []
    for checkpointing in (False, True):
        model = language_model(
            False, n_layer=3, dropout=0.2, checkpoint_activations=checkpointing
        ).train()
        kept.append(0)

        def keep(t):
            kept[-1] += t.numel()
            return t

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(*batch).square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < kept[0] / 3


def test_pretraining_then_classifying_begins_from_those_weights(toy):
    pretrained = toy | dict(
        objective="mlm", mask_prob=0.3, epochs=1.0, out_dir=f"{toy['out_dir']}-mlm"
    )
    train.train(train.Config(**pretrained))
    before = load_checkpoint(f"{pretrained['out_dir']}/best.pt")["model"]
    assert "lm_head.weight" in before and not any(k.startswith("head.") for k in before)
    settings = {
        k: v for k, v in toy.items() if k not in ("n_layer", "d_model", "n_head", "vocab_size")
    }
    finetune.finetune(
        finetune.Config(
            **settings | dict(init_from=pretrained["out_dir"], epochs=1.0, freeze="body")
        )
    )
    after = load_checkpoint(f"{toy['out_dir']}/last.pt")["model"]
    assert all(
        torch.equal(after[k], w) for k, w in before.items() if k.startswith(("embedding", "blocks"))
    )
    assert not any(k.startswith("lm_head") for k in after) and "head.weight" in after
    # and pretraining goes on from either, with the head that there is
    for objective, good in (("mlm", True), ("clm", False)):
        cfg = finetune.Config(
            **settings
            | dict(
                init_from=pretrained["out_dir"],
                objective=objective,
                max_steps=2,
                out_dir=f"{toy['out_dir']}-{objective}2",
                mask_prob=0.3 * (objective == "mlm"),
            )
        )
        if good:
            finetune.finetune(cfg)
            assert "lm_head.weight" in load_checkpoint(f"{cfg.out_dir}/last.pt")["model"]
        else:
            with pytest.raises(UserError, match="reads both ways"):
                finetune.finetune(cfg)


def test_gpt2s_language_model_is_transformers(tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, 0).eval()
    assert ours.config.lm_head == "tied" and ours.lm_head is None
    for d in random_documents():
        with torch.no_grad():
            expected = theirs(torch.from_numpy(d)[None]).logits[0]
            torch.testing.assert_close(ours(*packed([d])), expected, atol=1e-4, rtol=1e-4)


def test_two_processes_pretrain_as_one(toy):
    from tests.forks import script

    losses = []
    for processes, objective in ((0, "mlm"), (2, "mlm"), (0, "clm"), (2, "clm")):
        out = f"{toy['out_dir']}-{objective}-{processes}"
        done = script(
            "train.py",
            processes=processes,
            **toy
            | dict(
                objective=objective,
                mask_prob=0.3 * (objective == "mlm"),
                out_dir=out,
                optimizer="muon",
                max_steps=8,
            ),
        )
        assert done.returncode == 0, done.stderr
        losses.append(
            torch.tensor(
                [
                    [r["loss"], r["grad_norm"]]
                    for r in map(json.loads, open(f"{out}/metrics.jsonl"))
                    if "loss" in r
                ]
            )
        )
    for a, b in (losses[:2], losses[2:]):
        assert len(a) == 8
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_objectives_that_do_not_fit_the_data_are_refused(toy, unlabelled):
    for settings, message in (
        (toy | dict(objective="mlm"), "--mask_prob above 0"),
        (unlabelled | dict(mask_prob=0.1), "of 0"),
        (unlabelled | dict(objective="classify"), "needs labels"),
        (unlabelled | dict(model="mlp"), "for --model=transformer"),
        (toy | dict(objective="clm", class_weights="balanced"), "are for --objective=classify"),
        (toy | dict(model="linear", char_ngrams=0), "--char_ngrams=0 must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            train.train(train.Config(**settings))


def test_a_language_model_of_labelled_data_is_no_classifier(toy):
    train.train(train.Config(**toy | dict(objective="mlm", mask_prob=0.3, max_steps=2)))
    clf = Classifier(toy["out_dir"])
    assert clf.label_names == []
    for work in (
        lambda: eval_script.compare([toy["out_dir"]] * 2, eval_script.Config()),
        lambda: eval_script.compare_cheaper(toy["out_dir"], eval_script.Config()),
        lambda: clf(["goal"]),
    ):
        with pytest.raises(UserError, match="is no classifier|is a language model"):
            work()


def test_every_block_of_two_tokens_has_one_to_fill_in(toy):
    meta = data.open_or_build(train.Config(**toy))[1]
    split = open_split(train.Config(**toy), meta, "train", 3, objective="mlm", mask_prob=0.001)
    for epoch in (None, 0):
        targets = [split.block(i, epoch)[1] for i in range(50)]
        assert all((t >= 0).sum() == (len(t) > 1) for t in targets)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("lm_head", ["own", "tied"])
def test_logits_in_parts_have_the_loss_and_gradient_of_all(toy, objective, lm_head, monkeypatch):
    cfg = train.Config(**toy | dict(objective=objective, mask_prob=0.3 * (objective == "mlm")))
    meta = data.open_or_build(cfg)[1]
    task = task_of(cfg, meta)
    batch = open_split(cfg, meta, "train", 32, 1, **task.example_settings(cfg, "text", True)).batch(
        0, np.arange(9)
    )
    config = ModelConfig(vocab_size=300, lm_head=lm_head, causal=objective == "clm", d_model=32)
    module = train.ModelWithLoss(Transformer(config), task).double()
    torch.nn.init.normal_(module.model.output_weight())
    found = []
    for most in (tasks.MOST_LOGITS, 300 * 20):
        monkeypatch.setattr(tasks, "MOST_LOGITS", most)
        module.zero_grad()
        loss = module(batch.inputs, batch.targets)
        loss.backward()
        found.append([loss, *(p.grad for p in module.parameters())])
    for whole, parts in zip(*found):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_masked_tokens_come_in_few_numbers(toy):
    """For torch.compile: what fills their number up changes no loss."""
    cfg = train.Config(**toy | dict(objective="mlm", mask_prob=0.3))
    folder, meta = data.open_or_build(cfg)
    task = task_of(cfg, meta)
    blocks = open_split(cfg, meta, "train", 32, 1, **task.example_settings(cfg, "text", True))
    config = ModelConfig(vocab_size=meta["vocab_size"], lm_head="own", max_len=32, d_model=32)
    module = train.ModelWithLoss(Transformer(config), task)
    torch.nn.init.normal_(module.model.output_weight())
    sizes = set()
    for epoch in range(20):
        plain, filled = (
            blocks.batch(epoch, np.arange(16), examples.PaddedShape(512, 40, 32, few_sizes))
            for few_sizes in (False, True)
        )
        assert len(plain.targets) == plain.n_targets == filled.n_targets
        assert len(filled.targets) == len(filled.inputs[3])
        losses = [module(batch.inputs, batch.targets).item() for batch in (plain, filled)]
        assert losses[0] == pytest.approx(losses[1])
        sizes.add(len(filled.targets))
    assert len(sizes) <= 3
