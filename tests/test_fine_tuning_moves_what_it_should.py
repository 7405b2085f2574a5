"""Fine-tuning begins from the weights it is given, moves what it should, as fast as it should,
and can be resumed."""

import json

from configurator import UserError

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import finetune
import optim
from export import export
from predict import Classifier, open_data
from tests.conftest import class_task, interrupted, packed
from tests.forks import script
from tests.test_evaluating_changes_nothing import records
from weights import from_pretrained, load_checkpoint

hf = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A Hugging Face folder: a small random BERT, and a WordPiece-like tokenizer with [CLS] and
    [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from tests.conftest import WORDS

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a of and on in it was".split()]
    words += " ".join(WORDS.values()).split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(words[:5])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(
        20
    )  # as published tokenizers have it: ours is undone, and cuts at max_len
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    hf.BertModel(
        hf.BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=50,
            initializer_range=0.15,
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(bert, tmp_path):
    """A Llama with random weights and grouped heads, whose tokenizer begins a text."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(f"{bert}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=28, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=50, pad_token_id=0,
        initializer_range=0.15,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save(str(tmp_path / "llama/tokenizer.json"))
    return str(tmp_path / "llama")


@pytest.fixture
def settings(toy, bert):
    return {
        k: v for k, v in toy.items() if k not in ("vocab_size", "n_layer", "d_model", "n_head")
    } | dict(init_from=bert)


def tuned(settings, **changes):
    finetune.finetune(finetune.Config(**settings | changes))
    return load_checkpoint(f"{settings['out_dir']}/last.pt"), load_checkpoint(
        f"{settings['out_dir']}/best.pt"
    )


@pytest.mark.parametrize(
    "freeze, still",
    [
        (0, []),
        ("embeddings", ["embedding", "position", "segment"]),
        (2, ["embedding", "position", "segment", "blocks.0", "blocks.1"]),
        ("body", ["embedding", "position", "segment", "blocks"]),
    ],
)
def test_frozen_weights_do_not_move_by_one_bit(settings, bert, freeze, still):
    last, _ = tuned(settings, freeze=freeze)
    before = from_pretrained(bert, 3).state_dict()
    for name, w in last["model"].items():
        moved = not torch.equal(w, before[name])
        assert moved == (not name.startswith(tuple(still)) if still else True), name


def test_a_layers_learning_rate_is_the_formulas(settings, bert):
    cfg = finetune.Config(**settings | dict(layer_lr_decay=0.5, weight_decay=0.1))
    model = from_pretrained(bert, 3)
    scale = {
        id(p): g["lr_scale"]
        for o in optim.make_optimizers(model, cfg, torch.device("cpu"), finetune.lr_scale)
        for g in o.param_groups
        for p in g["params"]
    }
    for name, p in model.named_parameters():
        depth = (
            3 + 1
            if name.startswith(("embedding", "position", "segment"))
            else 3 - int(name.split(".")[1])
            if name.startswith("blocks")
            else 0
        )
        assert scale[id(p)] == 0.5**depth, name


def test_lora_trains_little_and_merges_exactly(settings, bert):
    last, best = tuned(settings, lora_rank=2, lora_alpha=4.0, epochs=1.0, eval_interval=6)
    before = from_pretrained(bert, 3).state_dict()
    trained = {
        n for n, w in last["model"].items() if n not in before or not torch.equal(w, before[n])
    }
    assert all("lora" in n or n.startswith(("dense", "head")) for n in trained) and any(
        "lora_b" in n for n in trained
    )
    merged = from_pretrained(settings["out_dir"])
    cfg = finetune.Config(**settings | dict(lora_rank=2, lora_alpha=4.0))
    meta = {
        "task": "classification",
        "kind": "text",
        "label_names": "abc",
        "vocab_size": 20,
        "scaling": {},
    }
    unmerged = finetune.make_model(cfg, meta, class_task(3), bert)
    unmerged.load_state_dict(last["model"])
    docs = packed([np.arange(1, 9), np.arange(3, 20)])
    assert not torch.equal(
        best["model"]["blocks.0.mlp.up.weight"], before["blocks.0.mlp.up.weight"]
    )
    torch.testing.assert_close(merged(*docs), unmerged.eval()(*docs), atol=1e-5, rtol=1e-5)


def test_from_weights_to_a_classifier_that_transformers_loads(settings, bert, tmp_path):
    settings |= dict(epochs=15.0)
    done = script("finetune.py", **settings)
    assert done.returncode == 0, done.stderr
    assert script("eval.py", settings["out_dir"]).returncode == 0
    report = json.load(open(f"{settings['out_dir']}/eval.json"))
    assert report["n"] == 12 and report["accuracy"] > 0.8
    done = script("eval.py", settings["out_dir"], "--export=hf")
    assert done.returncode == 0, done.stderr
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(
        f"{settings['out_dir']}/hf"
    ).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(f"{settings['out_dir']}/hf")
    clf = Classifier(settings["out_dir"])
    texts = "goal striker of the coach", "bank", "laptop code in the network was a chip"
    uncleaned = "  a bank\n", "cafe\u0301 goal", "\u00a0goal\r\nof\x0ca\x07 bank \t"
    for text in (*texts, *uncleaned):
        with torch.no_grad():
            p = theirs(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
        got = clf([text])[0]["probabilities"]
        assert got == pytest.approx(
            {theirs.config.id2label[i]: v.item() for i, v in enumerate(p)}, abs=1e-5
        )


def test_resuming_and_from_our_own_checkpoint(settings, bert):
    """A run that ends by an error after half its steps, then goes on, equals one that did not
    end."""
    whole, _ = tuned(settings, eval_interval=3, lora_rank=2, ema_decay=0.9)
    cut = settings | dict(
        out_dir=settings["out_dir"] + "-cut", eval_interval=3, lora_rank=2, ema_decay=0.9
    )
    with interrupted(7):
        finetune.finetune(finetune.Config(**cut))
    assert load_checkpoint(f"{cut['out_dir']}/last.pt")["step"] == 6
    resumed, _ = tuned(cut)
    assert all(torch.equal(w, resumed["model"][k]) for k, w in whole["model"].items())
    assert all(torch.equal(a, b) for a, b in zip(whole["ema"], resumed["ema"], strict=True))

    again, _ = tuned(
        settings
        | dict(init_from=settings["out_dir"], out_dir=settings["out_dir"] + "-2", learning_rate=0.0)
    )
    start = load_checkpoint(f"{settings['out_dir']}/best.pt")["model"]
    assert all(
        torch.equal(w, start[k]) for k, w in again["model"].items()
    )  # began there: at rate 0 nothing moves
    assert records(settings["out_dir"] + "-2")[-1]["val_loss"] > 0


def test_how_much_is_read_is_what_the_weights_can(settings, llama, capsys):
    """Unless more is asked for, which rotary positions allow."""
    path = finetune.Path(settings["init_from"])
    cfg = finetune.Config(**settings | dict(max_len=None))
    assert finetune.with_weights_settings(cfg, path).max_len == 50
    assert "made for texts" not in capsys.readouterr().out
    cfg = finetune.Config(**settings | dict(init_from=llama, max_len=64))
    assert finetune.with_weights_settings(cfg, finetune.Path(llama)).max_len == 64
    assert "made for texts of up to 50 tokens; --max_len=64 is more" in capsys.readouterr().out


def test_weights_that_cannot_be_read_are_refused_before_data_is_built(settings, llama):
    path = finetune.Path(llama) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="its weights are quantized"):
        finetune.finetune(finetune.Config(**settings | dict(init_from=llama)))
    assert not finetune.Path(settings["data_dir"]).exists()


def test_settings_that_cannot_work_are_refused(settings, bert, tmp_path):
    for changes, says in (
        (dict(init_from=str(tmp_path / "nowhere/at all")), "no such file or folder"),
        (dict(max_len=51), "reads 50 tokens at the most"),
        (dict(freeze=9), "the model has 3 blocks"),
        (dict(lora_rank=2, lora_targets=["q"]), "there is no 'q'"),
        (dict(d_model=64), "--d_model=64 comes with the weights"),
        (dict(lora_rank=-1), "--lora_rank=-1 must be 0 or more"),
    ):
        with pytest.raises(UserError, match=says):
            finetune.finetune(finetune.Config(**settings | changes))
    small = tmp_path / "small"
    model = hf.BertModel(
        hf.BertConfig(
            vocab_size=9,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=50,
        )
    )
    model.save_pretrained(small)
    (small / "tokenizer.json").write_text(open(f"{bert}/tokenizer.json").read())
    with pytest.raises(UserError, match="the weights know 9 tokens, their tokenizer 28"):
        finetune.finetune(finetune.Config(**settings | dict(init_from=str(small))))


def test_a_llama_becomes_a_classifier_and_a_better_language_model(settings, llama):
    """By low-rank updates, exported, and the same in transformers."""
    settings = settings | dict(init_from=llama, lora_rank=4, learning_rate=0.01, epochs=20.0)
    for objective, cls in (
        ("classify", hf.AutoModelForSequenceClassification),
        ("clm", hf.AutoModelForCausalLM),
    ):
        run = settings | dict(objective=objective, out_dir=f"{settings['out_dir']}-{objective}")
        last, best = tuned(run)
        rows = [json.loads(line) for line in open(f"{run['out_dir']}/metrics.jsonl")]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert np.mean(losses[-9:]) < 0.8 * np.mean(losses[:3])
        clf = Classifier(run["out_dir"])
        export(clf, "hf")
        theirs = cls.from_pretrained(f"{run['out_dir']}/hf").eval()
        ids = torch.tensor(clf.tokenizer.encode("the goal of a laptop").ids)
        with torch.no_grad():
            got = clf.model(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
            expected = theirs(ids[None]).logits
        torch.testing.assert_close(got, expected.view_as(got), atol=1e-4, rtol=1e-4)


def test_a_template_stands_around_every_text(settings, llama):
    """In training, also where a text is cut, in labelling, and in the exported folder."""
    run = settings | dict(init_from=llama, template="the goal is {text}\\nof a", max_len=12, crop=9)
    _, best = tuned(run, epochs=1.0)
    tokenizer = Tokenizer.from_str(best["tokenizer"])
    plain = Tokenizer.from_file(f"{llama}/tokenizer.json")
    clf = Classifier(run["out_dir"])
    examples = open_data(clf, "train")
    examples.crop = 9
    before, after = plain.encode("the goal is").ids, plain.encode("of a").ids[1:]
    for i in range(len(examples)):
        for epoch in (None, 0, 1):
            ids = examples.document(i, epoch).tolist()
            assert len(ids) <= (12 if epoch is None else 9)
            assert ids[:4] == before and ids[-2:] == after and len(ids) > 6
    text = "shares of a bank"
    whole = plain.encode(f"the goal is {text}\nof a").ids
    assert tokenizer.encode(text).ids == whole
    with torch.no_grad():
        expected = clf.model(torch.tensor(whole), torch.tensor([0, len(whole)], dtype=torch.int32))
    torch.testing.assert_close(clf.logits(clf.examples([text])), expected)
    windows, _ = clf.examples(["shares of a bank " * 9]).windows()
    assert len(windows) > 1
    for i in range(len(windows)):
        ids = windows.document(i).tolist()
        assert ids[:4] == before and ids[-2:] == after
    export(clf, "hf")
    theirs = hf.pipeline("text-classification", f"{run['out_dir']}/hf")(text)[0]
    assert theirs["label"] == clf([text])[0]["label"]
    assert theirs["score"] == pytest.approx(clf([text])[0]["probability"], abs=1e-4)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(template="Review:"), "must hold {text} once"),
        (dict(template="{text} {text}"), "must hold {text} once"),
        (dict(template="the goal is {text}", crop=4), "raise --max_len and --crop"),
        (dict(template="{text}", objective="clm", target="none"), "single texts with labels"),
    ],
)
def test_templates_that_cannot_work_are_refused(settings, llama, change, says):
    with pytest.raises(UserError, match=says):
        finetune.finetune(finetune.Config(**settings | dict(init_from=llama) | change))


def test_a_base_in_bfloat16_learns_the_same(settings, llama, tmp_path):
    """The weights that low-rank updates leave as they are take half the memory; what is stored in
    bfloat16 loses nothing by it; what is saved for others is merged in float32."""
    half = hf.LlamaForCausalLM.from_pretrained(llama).bfloat16()
    half.save_pretrained(llama)
    runs = {}
    for base in ("auto", "float32"):
        run = settings | dict(init_from=llama, lora_rank=4, dtype="bfloat16", learning_rate=0.01)
        run |= dict(base_dtype=base, out_dir=str(tmp_path / base), eval_interval=5, epochs=3.0)
        runs[base] = *tuned(run), records(run["out_dir"])
    (last, best, rows), (last32, best32, rows32) = runs.values()
    for name, w in last["model"].items():
        learns = name.startswith("head") or "lora" in name
        assert w.dtype == (torch.float32 if learns or w.ndim < 2 else torch.bfloat16), name
        assert last32["model"][name].dtype == torch.float32
    for key in ("loss", "val_loss", "grad_norm"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in rows32]
    for name, w in best["model"].items():
        assert w.dtype == torch.float32
        assert torch.equal(w, best32["model"][name]), name
    with interrupted(8):
        cut = run | dict(base_dtype="auto", out_dir=str(tmp_path / "cut"))
        finetune.finetune(finetune.Config(**cut))
    resumed, _ = tuned(cut)
    assert all(torch.equal(w, resumed["model"][name]) for name, w in last["model"].items())
    with pytest.raises(UserError, match="needs --lora_rank=8 and --dtype=bfloat16"):
        tuned(run, base_dtype="bfloat16", lora_rank=0, overwrite=True)
