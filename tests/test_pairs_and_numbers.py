"""Pairs of texts are read as their tokenizer joins them, packed as alone, in their order; numbers
are predicted from texts in their own unit."""

import csv
import json

from configurator import UserError

import numpy as np
import pytest
import torch

import data
import examples
import finetune
import metrics
import train
from format import pair_template
from labelling import label_file
from predict import Classifier, open_data
from predict import Config as PredictConfig
from tests.conftest import open_split, packed
from tests.forks import script
from weights import from_pretrained

hf = pytest.importorskip("transformers")
WORDS = "goal match chip code bank market rain snow film book".split()
SPECIAL = {  # special tokens, then how each family joins two texts
    "bert": (("[CLS]", "[SEP]"), "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": (("<s>", "</s>"), "<s> $A </s> </s> $B </s>"),
    "distilbert": (("[CLS]", "[SEP]"), "[CLS] $A [SEP] $B [SEP]"),
    "modernbert": (("[CLS]", "[SEP]"), "[CLS] $A [SEP] $B [SEP]"),
    "gpt2": ((), "$A $B"),
    "llama": (("<s>",), "<s> $A <s>:1 $B:1"),
}
SIZES = dict(num_labels=3, pad_token_id=1, bos_token_id=0, eos_token_id=2, vocab_size=20)
TRUNK = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
CONFIGS = {
    "bert": hf.BertConfig(**SIZES, **TRUNK, max_position_embeddings=40),
    "roberta": hf.RobertaConfig(**SIZES, **TRUNK, type_vocab_size=1,
                                max_position_embeddings=40),
    "distilbert": hf.DistilBertConfig(**SIZES, dim=32, n_layers=3, n_heads=2, hidden_dim=64,
                                      max_position_embeddings=40),
    "modernbert": hf.ModernBertConfig(**SIZES, **TRUNK, cls_token_id=1, sep_token_id=2,
                                      local_attention=8, max_position_embeddings=40),
    "gpt2": hf.GPT2Config(**SIZES, n_embd=32, n_layer=3, n_head=2, n_positions=40),
    "llama": hf.LlamaConfig(**SIZES, **TRUNK, max_position_embeddings=40),
}  # fmt: skip


def make_tokenizer(family):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special, pair = SPECIAL[family]
    names = [*special[:1], "<pad>", *special[1:], "[UNK]"]  # RoBERTa's pad_token_id is 1
    vocabulary = {word: i for i, word in enumerate([*names, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(names)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = pair.split(" $B")[0]
    if family == "roberta":
        single = "<s> $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, vocabulary[name]) for name in special]
    )
    return tokenizer


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    """A Hugging Face folder of each family, with random weights that all show."""
    family = request.param
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(CONFIGS[family])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer(family).save(str(tmp_path / "hf/tokenizer.json"))
    return tmp_path / "hf"


def random_pairs(n=40, longest=40, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        lengths = rng.integers(1, longest, 2)
        first, second = (" ".join(rng.choice(WORDS, length)) for length in lengths)
        pairs.append((first, second if i % 9 else ""))
    return pairs


def write_pairs(path, pairs, labels):
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["premise", "hypothesis", "label"])
        table.writerows([a, b, label] for (a, b), label in zip(pairs, labels))
    return str(path)


def settings_of(tmp_path, pairs, labels, **changes):
    return dict(
        dataset="pairs", train_file=write_pairs(tmp_path / "pairs.csv", pairs, labels),
        data_dir=str(tmp_path / "data"), text_column="premise", text_pair_column="hypothesis",
        max_len=24, vocab_size=320, dedup=False, wandb_mode="disabled", dtype="float32",
        device="cpu", out_dir=str(tmp_path / "out"),
    ) | changes  # fmt: skip


@pytest.mark.parametrize("truncation", ["longest_first", "only_second"])
def test_a_pair_is_what_transformers_makes_of_it(tmp_path, folder, truncation):
    """The ids, where they are cut, their types, and the logits, packed in batches of any order."""
    pairs = random_pairs(longest=18 if truncation == "only_second" else 40)
    cfg = train.Config(
        **settings_of(
            tmp_path, pairs, ["a", "b", "c", "a"] * 10, tokenizer=str(folder / "tokenizer.json"),
            val_fraction=0.0, test_fraction=0.0, truncation=truncation,
        )
    )  # fmt: skip
    built = data.build(cfg)
    examples = open_split(cfg, built, "train", 24, truncation=truncation)
    names = ["input_ids", "attention_mask"]
    if (folder / "config.json").read_text().count('"model_type": "bert"'):
        names.append("token_type_ids")
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", model_input_names=names
    )
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours = from_pretrained(folder)
    order = np.random.default_rng(1).permutation(len(pairs))
    with torch.no_grad():
        got = ours(*examples.batch(None, order).inputs)
        for row, i in zip(got, order):
            first, second = pairs[i]  # as lists: transformers takes a lone "" for no text
            encoded = tokenizer(
                [first], [second], truncation=truncation, max_length=24, return_tensors="pt"
            )
            assert examples.document(i).tolist() == encoded["input_ids"][0].tolist()
            torch.testing.assert_close(row, model(**encoded).logits[0], atol=1e-4, rtol=1e-4)
    alone = torch.cat([ours(*examples.batch(None, np.array([i])).inputs) for i in order])
    torch.testing.assert_close(got, alone.detach(), atol=1e-5, rtol=1e-5)


def test_pairs_are_cut_as_the_library_cuts_them():
    tokenizer = make_tokenizer("bert")
    for n_first in range(0, 12):
        for n_second in range(0, 12):
            for max_len in range(3, 14):
                tokenizer.enable_truncation(max_len)
                e = tokenizer.encode(" ".join(["goal"] * n_first), " ".join(["rain"] * n_second))
                ids = e.sequence_ids
                kept = examples.truncate_pair(n_first, n_second, max_len - 3, "longest_first")
                assert (ids.count(0), ids.count(1)) == kept, (n_first, n_second, max_len)


def same_or_not(n, seed=0):
    """Pairs that begin with the same word, or not, and which of the two."""
    rng = np.random.default_rng(seed)
    pairs, labels = [], []
    for i in range(n):
        first = rng.choice(WORDS)
        second = first if i % 2 else rng.choice([w for w in WORDS if w != first])
        pairs.append((f"{first} the a {i}", f"{second} of it {i}"))
        labels.append(["differs", "same"][i % 2])
    return pairs, labels


def test_pairs_from_scratch_to_labels(tmp_path):
    """With our own tokenizer; predict.py reads them from files, from options, and in Python."""
    pairs, labels = same_or_not(600)
    settings = settings_of(
        tmp_path, pairs, labels, n_layer=2, d_model=64, n_head=2, epochs=30.0, batch_size=32,
        learning_rate=3e-3,
    )  # fmt: skip
    assert script("train.py", **settings).returncode == 0
    clf = Classifier(settings["out_dir"])
    tokens = clf.tokenizer.encode("goal", "rain").tokens
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 1
    report = json.loads(script_output(tmp_path, "eval.py", settings["out_dir"], "eval.json"))
    assert report["accuracy"] > 0.9 and report["in_train"]["share"] == 0
    new, _ = same_or_not(40, seed=7)
    (tmp_path / "new.jsonl").write_text(
        "".join(json.dumps({"premise": a, "hypothesis": b, "id": i}) + "\n"
                for i, (a, b) in enumerate([*new, ("goal alone", None)]))
    )  # fmt: skip
    out = str(tmp_path / "labels.csv")
    done = script("predict.py", settings["out_dir"], "--input=" + str(tmp_path / "new.jsonl"),
                  f"--output={out}", "--keep=id", "--dtype=float32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = list(csv.DictReader(open(out)))
    alone = clf(new)
    assert [row["label"] for row in found[:40]] == [result["label"] for result in alone]
    assert found[40]["id"] == "40" and found[40]["label"]  # an empty second text is allowed
    turned = clf([(b, a) for a, b in new])
    assert any(x["probability"] != y["probability"] for x, y in zip(alone, turned))
    done = script("predict.py", settings["out_dir"], "--text=goal", "--text_pair=goal")
    assert done.returncode == 0 and "goal | goal" in done.stdout
    done = script("predict.py", settings["out_dir"], "--text=goal")
    assert done.returncode == 2 and "give a --text_pair for each --text" in done.stderr


def script_output(tmp_path, name, out_dir, file):
    done = script(name, out_dir)
    assert done.returncode == 0, done.stderr
    return (tmp_path / "out" / file).read_text()


def test_a_pair_the_other_way_round_is_no_duplicate(tmp_path):
    pairs = [("goal one", "rain two"), ("rain two", "goal one"), ("goal one rain", "two")] * 4
    settings = settings_of(tmp_path, pairs, ["a", "b", "a"] * 4, dedup=True, test_fraction=0.0)
    meta = data.build(train.Config(**settings))
    assert meta["splits"]["train"]["examples"] == 3
    assert meta["removed"]["duplicates_in_train"] == 9


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(text_pair_column="answer"), "no column 'answer'"),
        (dict(kind="features"), "--text_pair_column is for --kind=text"),
        (dict(text_pair_column="label"), "--text_pair_column=label is another column too"),
        (dict(text_pair_column="premise"), "--text_pair_column=premise is another column too"),
        (dict(target="none"), "--text_pair_column is for --kind=text"),
        (dict(max_len=2), "a pair has 2 special tokens besides its texts: raise it"),
    ],
)
def test_pairs_that_cannot_be_are_refused(tmp_path, changes, says):
    pairs, labels = same_or_not(40)
    with pytest.raises(UserError, match=says):
        train.train(train.Config(**settings_of(tmp_path, pairs, labels, **changes)))


def test_pairs_are_not_read_from_lines(tmp_path):
    (tmp_path / "a.txt").write_text("__label__a goal\n__label__b rain\n" * 20)
    pairs, labels = same_or_not(4)
    settings = settings_of(tmp_path, pairs, labels, train_file=str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="a.txt, line 1: has no second text"):
        data.build(train.Config(**settings))


def test_types_that_are_not_berts_are_refused_where_the_model_reads_them(tmp_path):
    from tokenizers import processors

    tokenizer = make_tokenizer("bert")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A:1 $B:0", special_tokens=[]
    )
    assert not pair_template(tokenizer)["segments"]
    hf.BertModel(CONFIGS["bert"]).save_pretrained(tmp_path / "hf")
    tokenizer.save(str(tmp_path / "hf/tokenizer.json"))
    settings = settings_of(tmp_path, *same_or_not(40), init_from=str(tmp_path / "hf"))
    settings.pop("vocab_size")
    with pytest.raises(UserError, match=r"types \[1, 0\], which is not supported"):
        finetune.finetune(finetune.Config(**settings))


# --------------------------------------------------------------------------------------------------
# Numbers


def scored(tmp_path, n=400, name="score.csv", outlier=None):
    """Sentences, and a score that their words say."""
    rng = np.random.default_rng(3)
    with open(tmp_path / name, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sentence", "score"])
        for i in range(n):
            words = rng.choice(WORDS, 6)
            score = 100 + 10 * sum(WORDS.index(w) for w in words) / 6
            table.writerow([f"{' '.join(words)} {i}", outlier or round(score, 2)])
            outlier = None
    return str(tmp_path / name)


def number_settings(tmp_path, **changes):
    return dict(
        dataset="score", train_file=scored(tmp_path), data_dir=str(tmp_path / "data"),
        text_column="sentence", label_column="score", target="number", vocab_size=300,
        wandb_mode="disabled", dtype="float32", device="cpu", out_dir=str(tmp_path / "out"),
        max_len=32, batch_size=32,
    ) | changes  # fmt: skip


def test_numbers_from_texts(tmp_path):
    settings = number_settings(
        tmp_path, n_layer=1, d_model=64, n_head=2, epochs=30.0, learning_rate=3e-3
    )
    assert script("train.py", **settings).returncode == 0
    report = json.loads(script_output(tmp_path, "eval.py", settings["out_dir"], "eval.json"))
    assert report["r2"] > 0.8 and set(report["interval"]) == {
        "rmse", "mae", "r2", "pearson", "spearman"}  # fmt: skip
    clf = Classifier(settings["out_dir"])
    low, high = clf(["goal goal goal goal goal goal", "book book book book book book"])
    assert 90 < low["value"] < 130 < high["value"] < 210  # in the score's own unit
    done = script("predict.py", settings["out_dir"], "--text=book film")
    assert done.returncode == 0 and float(done.stdout.split()[-3]) > 130
    # its head has no bias: for another target it stays about the mean, and so it does out and back
    assert script("eval.py", settings["out_dir"], "--export=hf").returncode == 0
    for path in (settings["out_dir"], f"{settings['out_dir']}/hf"):
        wider = clf.scaling | {"target_std": 2 * clf.scaling["target_std"], "target_mean": 0.0}
        head = from_pretrained(path, n_classes=1, scaling=wider).head.weight
        torch.testing.assert_close(head, clf.model.head.weight / 2)


def test_small_numbers_keep_their_digits(tmp_path):
    """As the target's unit may be: nothing is rounded to 0. An empty text gets no value."""
    settings = number_settings(tmp_path, max_steps=5, n_layer=1, d_model=32, n_head=2)
    rows = list(csv.reader(open(settings["train_file"])))
    with open(settings["train_file"], "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([text, f"{float(x)}e-9"] for text, x in rows[1:])])
    train.train(train.Config(**settings))
    (tmp_path / "new.csv").write_text("sentence\ngoal rain book\n\nfilm film\n")
    clf = Classifier(settings["out_dir"])
    output = str(tmp_path / "o.csv")
    label_file(clf, PredictConfig(input=str(tmp_path / "new.csv"), output=output))
    first, empty, _ = (row["value"] for row in csv.DictReader(open(output)))
    assert float(first) == pytest.approx(clf(["goal rain book"])[0]["value"], rel=1e-6)
    assert 0 < float(first) < 1e-6 and empty == ""
    one_row = tmp_path / "one.csv"
    one_row.write_text("sentence,score\ngoal rain,1e-7\n")
    done = script("eval.py", settings["out_dir"], f"--test_file={one_row}")
    assert done.returncode == 0 and "rmse 0.0000" not in done.stdout and "r2" not in done.stdout


def test_fine_tuned_numbers_go_out_in_their_own_unit(tmp_path):
    torch.manual_seed(0)
    hf.BertModel(CONFIGS["bert"]).save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save(str(tmp_path / "bert/tokenizer.json"))
    settings = number_settings(tmp_path, init_from=str(tmp_path / "bert"), max_steps=10)
    del settings["vocab_size"]
    finetune.finetune(finetune.Config(**settings))
    assert script("eval.py", settings["out_dir"], "--export=hf").returncode == 0
    folder = f"{settings['out_dir']}/hf"
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.problem_type == "regression" and model.config.num_labels == 1
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == settings["max_len"]  # what is read, not what could be
    (ours,) = Classifier(settings["out_dir"])(["goal rain book"])
    with torch.no_grad():
        theirs = model(**tokenizer("goal rain book", return_tensors="pt")).logits.item()
    assert ours["value"] == pytest.approx(theirs, abs=1e-3) and theirs > 50
    # and come back from there, or from our checkpoint, for a target with another mean and spread
    for path in (folder, settings["out_dir"]):
        scaling = {"target_mean": 7.0, "target_std": 3.0}
        model = from_pretrained(path, n_classes=1, scaling=scaling)
        ids = np.array(tokenizer("goal rain book")["input_ids"])
        with torch.no_grad():
            value = model(*packed([ids])).item() * 3.0 + 7.0
        assert value == pytest.approx(theirs, abs=1e-3)


def test_pairs_go_out_to_transformers(tmp_path):
    torch.manual_seed(0)
    hf.BertModel(CONFIGS["bert"]).save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save(str(tmp_path / "bert/tokenizer.json"))
    pairs, labels = same_or_not(80)
    settings = settings_of(tmp_path, pairs, labels, init_from=str(tmp_path / "bert"), max_steps=10)
    del settings["vocab_size"]
    finetune.finetune(finetune.Config(**settings))
    assert script("eval.py", settings["out_dir"], "--export=hf").returncode == 0
    folder = f"{settings['out_dir']}/hf"
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    for (a, b), ours in zip(pairs[:8], Classifier(settings["out_dir"])(pairs[:8])):
        with torch.no_grad():
            p = model(**tokenizer(a, b, return_tensors="pt")).logits.softmax(1)[0]
        theirs = {model.config.id2label[i]: x.item() for i, x in enumerate(p)}
        assert ours["probabilities"] == pytest.approx(theirs, abs=1e-5)


def test_huber_counts_far_errors_by_their_size(tmp_path):
    task = lambda delta: train_task(huber_delta=delta)  # noqa: E731
    logits, targets = torch.tensor([[0.5], [4.0], [1.0]]), torch.tensor([0.0, 0.0, torch.nan])
    assert task(0.0).loss_sum(logits, targets).item() == pytest.approx(0.25 + 16)
    assert task(1.0).loss_sum(logits, targets).item() == pytest.approx(0.25 + 2 * (4 - 0.5))


def train_task(**settings):
    import tasks

    return tasks.NumberTask(train.Config(**settings), {})


def test_correlations_equal_scipy():
    from scipy import stats

    rng = np.random.default_rng(0)
    true = rng.integers(0, 20, 200).astype(float)  # with ties
    predicted = np.round(true / 3 + rng.normal(size=200), 1)
    found = metrics.number_report(predicted, true)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, true)[0], abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, true)[0], abs=1e-12)
    sample = rng.integers(0, 200, 200)  # a resample is what its copied rows are
    weight = np.bincount(sample, minlength=200)
    figures = metrics.number_sample(predicted, true)(weight)
    copied = stats.spearmanr(predicted[sample], true[sample])[0]
    assert figures["spearman"] == pytest.approx(copied, abs=1e-12)
    assert metrics.number_report(np.ones(5), np.arange(5.0))["pearson"] is None


def test_a_number_that_is_none_is_refused(tmp_path):
    settings = number_settings(tmp_path, train_file=scored(tmp_path, 20, "bad.csv", outlier="x"))
    with pytest.raises(UserError, match="bad.csv, line 2: .*'x'"):
        data.build(train.Config(**settings))


def test_open_data_reads_pairs_as_training_did(tmp_path):
    pairs, labels = same_or_not(80)
    settings = settings_of(
        tmp_path, pairs, labels, n_layer=1, d_model=32, n_head=2, max_steps=2, max_len=8,
        truncation="only_second",
    )  # fmt: skip
    train.train(train.Config(**settings))
    clf = Classifier(settings["out_dir"])
    stored, anew = open_data(clf, "test"), clf.examples(pairs)
    assert stored.truncation == anew.truncation == "only_second"
    assert {stored.content(i) for i in range(len(stored))} <= {anew.content(i) for i in range(80)}
    torch.testing.assert_close(clf.logits(anew)[:1], clf.logits(clf.examples(pairs[:1])))
