"""Generation says what the whole model says, token for token, and draws what it was asked to."""

import json

from configurator import UserError

import numpy as np
import pytest
import torch

import generate as g
import predict
import train
from model import ModelConfig, Transformer
from tests.forks import script

hf = pytest.importorskip("transformers")


def gpt2(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=2, n_positions=50,
                           bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = hf.GPT2LMHeadModel(config).eval()
    for p in model.parameters():  # larger than initialised, so that the text varies
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(tmp_path / "gpt2")
    words = ["<|endoftext|>", *(f"w{i}" for i in range(59))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.add_special_tokens(words[:1])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "gpt2/tokenizer.json"))
    return model, tmp_path / "gpt2"


def test_greedy_is_what_transformers_generates(tmp_path):
    theirs, folder = gpt2(tmp_path)
    model, tokenizer, objective = predict.open_language_model(folder, "cpu")
    assert objective == "clm"
    for prompt in ([5], [7, 3, 9, 22], list(range(1, 30))):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )[0, len(prompt) :]  # fmt: skip
        for use_cache in (True, False):
            got = list(g.generate(model, prompt, 20, temperature=0, use_cache=use_cache))
            assert got == expected.tolist()


def test_a_folder_that_cannot_write_is_refused(tmp_path):
    _, folder = gpt2(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        predict.open_language_model(folder, "cpu")
    hf.BertModel(hf.BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=1,
                               num_attention_heads=2, intermediate_size=64)
                 ).save_pretrained(tmp_path / "bert")  # fmt: skip
    with pytest.raises(UserError, match="cannot fill in: continue its training"):
        predict.open_language_model(tmp_path / "bert", "cpu")


@pytest.mark.parametrize("position, window", [("rope", 0), ("learned", 0), ("rope", 5)])
def test_cached_generation_equals_uncached(position, window):
    """Also past max_len, where the model goes on from the last half of the text."""
    torch.manual_seed(1)
    model = Transformer(
        ModelConfig(
            vocab_size=40, lm_head="own", causal=True, max_len=24, n_layer=3, n_head=2, d_model=32,
            d_ff=64, position=position, window=window, window_layers=(1,),
        )
    ).eval()  # fmt: skip
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.5)
    for temperature in (0, 1.0):
        cached, uncached = (
            list(g.generate(model, [3, 1, 4], 70, temperature, use_cache=use_cache))
            for use_cache in (True, False)
        )
        assert cached == uncached and len(set(cached)) > 1
    # the first tokens are those of the whole forward pass
    text = [3, 1, 4]
    for token in g.generate(model, text, 20, 0):
        with torch.no_grad():
            cu_seqlens = torch.tensor([0, len(text)], dtype=torch.int32)
            assert model(torch.tensor(text), cu_seqlens)[-1].argmax() == token
        text.append(token)


def test_sampling_draws_from_the_right_tokens_at_the_right_rates():
    logits = torch.tensor([2.0, 0.0, 3.0, 1.0, -1.0])
    p = logits.softmax(0).numpy()  # in order: tokens 2, 0, 3, 1, 4

    def shares(**settings):
        generator = torch.Generator().manual_seed(0)
        settings = dict(temperature=1.0, top_k=None, top_p=None) | settings
        drawn = [g.sample(logits, generator=generator, **settings) for _ in range(4000)]
        return np.bincount(drawn, minlength=5) / 4000

    np.testing.assert_allclose(shares(), p, atol=0.03)
    cold = (logits / 0.5).softmax(0).numpy()
    np.testing.assert_allclose(shares(temperature=0.5), cold, atol=0.03)
    two = shares(top_k=2)
    assert set(np.flatnonzero(two)) == {0, 2}
    assert two[2] == pytest.approx(p[2] / (p[0] + p[2]), abs=0.03)
    assert set(np.flatnonzero(shares(top_p=float(p[2]) - 0.01))) == {2}
    assert set(np.flatnonzero(shares(top_p=float(p[2]) + 0.01))) == {0, 2}
    assert set(np.flatnonzero(shares(top_p=1.0))) == set(range(5))
    assert set(np.flatnonzero(shares(top_k=1))) == {2} == set(np.flatnonzero(shares(temperature=0)))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat and the dog ran off. " * 60)
    return dict(
        dataset="text", train_file=str(tmp_path / "a.txt"), data_dir=str(tmp_path / "data"),
        target="none", out_dir=str(tmp_path / "out"), max_len=16, n_layer=1, n_head=2, d_model=32,
        wandb_mode="disabled", dtype="float32", device="cpu", batch_size=8,
    )  # fmt: skip


def opened(text):
    return predict.open_language_model(text["out_dir"], "cpu")


def test_samples_from_a_run_are_repeatable(text):
    train.train(
        train.Config(
            **text | dict(objective="clm", tokenizer="bytes", min_steps=150, learning_rate=0.01)
        )  # fmt: skip
    )
    command = ["predict.py", text["out_dir"], "--prompt=the ", "--max_new_tokens=60"]
    first, again = (script(*command, "--seed=3", "--num_samples=2").stdout for _ in range(2))
    assert first == again and first.count("--- sample") == 2
    assert "cat" in first or "dog" in first  # it has learnt its words
    one, two = first.split("--- sample 2\n")
    assert one.partition("\n")[2].strip() != two.strip()
    assert script(*command, "--seed=4").stdout.strip() != one.partition("\n")[2].strip()
    assert script(*command, "--temperature=0").stdout.startswith("the ")
    for option, says in (
        ("--temperature=-1", "--temperature=-1.0 must be 0 or more"),
        ("--top_p=1.5", "--top_p=1.5 must be above 0 and at most 1"),
        ("--top_k=0", "--top_k=0 must be above 0"),
        ("--prompt=" + "x" * 40, "--prompt has 41 tokens, and .* reads 16"),
    ):
        cfg = predict.Config(checkpoint=[text["out_dir"]], prompt="the ")
        name, value = option[2:].split("=")
        setattr(cfg, name, value if name == "prompt" else json.loads(value))
        if name == "temperature":
            cfg.temperature = -1.0
        with pytest.raises(UserError, match=says):
            g.print_samples("run", *opened(text), cfg)
    with pytest.raises(UserError, match="reads from left to right: give --prompt"):
        g.print_fillings("run", *opened(text), "the [MASK]")


def test_masks_are_filled_in(text, capsys):
    settings = dict(objective="mlm", mask_prob=0.3, tokenizer="words", min_steps=300)
    lines = text | settings | dict(n_layer=2, d_model=64, optimizer="muon", learning_rate=0.01)
    train.train(train.Config(**lines))
    capsys.readouterr()
    g.print_fillings("run", *opened(text), "the cat [MASK] on the mat and the dog [MASK] off")
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "sat" and second.split()[0] == "ran"
    with pytest.raises(UserError, match=r"masks nothing: write \[MASK\]"):
        g.print_fillings("run", *opened(text), "the cat")
    with pytest.raises(UserError, match="fills in what is masked: give --fill"):
        g.print_samples("run", *opened(text), predict.Config(prompt="the"))


def test_a_classifier_writes_nothing(toy):
    train.train(train.Config(**toy | dict(max_steps=2)))
    done = script("predict.py", toy["out_dir"], "--prompt=x")
    assert done.returncode == 2 and "is a classifier: give --text or --input" in done.stderr
