"""Bad input gets one sentence that names the place and the way out, a non-zero exit, and changes
nothing on disk."""

import gzip
import json
import os
import pickle
import subprocess
import sys

from configurator import UserError, configure, run

import pytest
import torch

import data
import eval as eval_script
import train
from predict import Classifier, open_data
from tests.conftest import ROOT
from tests.forks import script
from weights import load_checkpoint, save_checkpoint

GOOD = "label,text\n" + "".join(f"{'ab'[i % 2]},text number {i}\n" for i in range(40))


@pytest.mark.parametrize(
    "train_csv, says, settings",
    [
        ("", "holds no examples", {}),
        ("label,text\n", "holds no examples", {}),
        (GOOD.replace("text\n", "body\n", 1), r"no column 'text'.*'body'.*--text_column", {}),
        (GOOD, r"no column 5", dict(text_column=5, label_column=0)),
        (GOOD + "a,   \n", r"train.csv, line 42: the text is empty.*drop_bad_rows", {}),
        (GOOD + ",text\n", r"line 42: the label is empty", {}),
        (GOOD + "a\n" + GOOD, r"line 42: 1 fields where 2 are needed", {}),
        (GOOD + "a,great food, but slow\n", r"line 42: 3 fields, but the first row has 2", {}),
        (GOOD.replace("b,", "a,"), "every example has the label 'a'", {}),
        (GOOD.encode() + b"a,caf\xe9\n", r"line 42: not valid utf-8 \(byte 0xe9.*--encoding", {}),
        (GOOD + 'a,"never closed\n' + GOOD, r"line 83: .*quote", {}),
        (GOOD, "no encoding 'klingon'", dict(encoding="klingon")),
        (
            "label,text\na,x\nb,y\na,z\n",
            "val would be empty: too few examples",
            dict(val_fraction=0.1),
        ),
        (GOOD, "at least 258", dict(vocab_size=100)),
        (GOOD, "no such file", dict(tokenizer="nowhere.json")),
        (GOOD, "no such file", dict(train_file="nowhere.csv")),
        (GOOD, "of files, .*.csv, .* can be read", dict(train_file=__file__)),
        (GOOD, "is built in|built-in", dict(dataset="bbc")),
        (GOOD, "needs --train_file", dict(train_file=None)),
        (GOOD, "label .a. is not a number", dict(target="number")),
    ],
)
def test_sources(tmp_path, train_csv, says, settings):
    (tmp_path / "train.csv").write_bytes(
        train_csv if isinstance(train_csv, bytes) else train_csv.encode()
    )
    cfg = train.Config(
        **dict(
            dataset="d",
            data_dir=str(tmp_path / "data"),
            train_file=str(tmp_path / "train.csv"),
            vocab_size=300,
        )
        | settings
    )
    with pytest.raises(UserError, match=says):
        data.open_or_build(cfg)
    assert not os.path.exists(tmp_path / "data") or not os.listdir(tmp_path / "data")


def test_rows_with_too_many_fields_are_counted_or_harmless(tmp_path):
    settings = dict(data_dir=str(tmp_path / "data"), vocab_size=300)
    (tmp_path / "a.csv").write_text(GOOD + "a,great food, but slow\n")
    cfg = train.Config(
        dataset="a", train_file=str(tmp_path / "a.csv"), drop_bad_rows=True, **settings
    )
    meta = data.build(cfg)
    assert meta["removed"]["bad_rows"] == 1 and meta["label_names"] == ["a", "b"]
    (tmp_path / "b.csv").write_text(GOOD + "a,as spreadsheets end their rows,,\n")
    meta = data.build(train.Config(dataset="b", train_file=str(tmp_path / "b.csv"), **settings))
    assert sum(split["examples"] for split in meta["splits"].values()) == 41
    (tmp_path / "c.tsv").write_text(
        "".join(f"{'ab'[i % 2]}\ttext {i}\n" for i in range(40)) + "a\tx\ty\n"
    )
    cfg = train.Config(
        dataset="c", train_file=str(tmp_path / "c.tsv"), text_column=1, label_column=0, **settings
    )
    with pytest.raises(UserError, match=r"line 41: 3 fields, but the first row has 2.*'\\t'"):
        data.build(cfg)


def test_bad_rows_can_be_left_out(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD + "a,  \nb\n,x\n")
    cfg = train.Config(
        dataset="d",
        data_dir=str(tmp_path / "data"),
        train_file=str(tmp_path / "train.csv"),
        vocab_size=300,
        drop_bad_rows=True,
    )
    meta = data.build(cfg)
    assert (
        meta["removed"]["bad_rows"] == 3
        and sum(s["examples"] for s in meta["splits"].values()) == 40
    )


@pytest.mark.parametrize("line", ['{"text": "x"}', '["text", "label"]', '{"text": "x", "lab', "5"])
def test_json_lines(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n' + line + "\n")
    with pytest.raises(
        UserError, match="a.jsonl, line 2: (not a JSON object|there is no key 'label')"
    ):
        data.build(
            train.Config(
                dataset="d", data_dir=str(tmp_path / "data"), train_file=str(tmp_path / "a.jsonl")
            )
        )


def test_json_null_is_missing_and_lone_surrogates_are_replaced(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as f:
        f.writelines(
            json.dumps({"text": f"text \ud800 {i}", "label": i % 2}) + "\n" for i in range(40)
        )
        f.write('{"text": null, "label": 1}\n')
    cfg = train.Config(
        dataset="d",
        data_dir=str(tmp_path / "data"),
        train_file=str(tmp_path / "a.jsonl"),
        vocab_size=300,
    )
    with pytest.raises(UserError, match="a.jsonl, line 41: the text is empty"):
        data.build(cfg)
    cfg.drop_bad_rows = True
    assert sum(s["examples"] for s in data.build(cfg)["splits"].values()) == 40


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress((GOOD + GOOD[11:] * 50).encode())[:-30]]
)
def test_damaged_gzip(tmp_path, content):
    (tmp_path / "a.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match="a.csv.gz: cannot be read: .*; fetch it again"):
        data.build(
            train.Config(
                dataset="d", data_dir=str(tmp_path / "data"), train_file=str(tmp_path / "a.csv.gz")
            )
        )


def test_a_folder_where_a_file_should_be(toy, capsys):
    os.makedirs(f"{toy['out_dir']}/config.json")
    with pytest.raises(SystemExit, match="2"):
        run(lambda: train.train(train.Config(**toy)))
    assert "config.json: Is a directory: mend that, or choose" in capsys.readouterr().err


def test_a_folder_of_tables_is_named_by_its_files(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "part-0.1.csv.gz").write_bytes(gzip.compress(GOOD.encode()))
    cfg = train.Config(dataset="d", data_dir=str(tmp_path / "data"), train_file=str(folder))
    with pytest.raises(UserError, match=r"name the files that are in it, as '.*/\*.csv.gz'") as e:
        data.build(cfg)
    cfg.train_file = str(e.value).rpartition(" as ")[2].strip("'")
    assert sum(s["examples"] for s in data.build(cfg)["splits"].values()) == 40


def test_train_py_knows_what_finetune_py_is_for():
    """It would train from nothing, without a word."""
    for argument in ("--lora_rank=8", str(ROOT / "config/finetune_textcls.py")):
        with pytest.raises(UserError, match="finetune.py has it"):
            configure(train.Config, [argument])


def test_label_of_test_that_train_lacks(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "test.csv").write_text("label,text\na,x\nc,y\n")
    with pytest.raises(
        UserError, match="test.csv, line 3: label 'c' does not occur in .*train.csv"
    ):
        data.build(
            train.Config(
                dataset="d",
                data_dir=str(tmp_path / "data"),
                train_file=str(tmp_path / "train.csv"),
                test_file=str(tmp_path / "test.csv"),
            )
        )


def test_damaged_data_sets(toy_config, toy):
    data.build(toy_config)
    folder = f"{toy['data_dir']}/toy"
    for name in ("train.bin", "train.idx", "val.lbl", "val.bin"):
        path = f"{folder}/{name}"
        whole = open(path, "rb").read()
        for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), None):
            os.remove(path) if damaged is None else open(path, "wb").write(damaged)
            with pytest.raises(
                UserError,
                match=f"{name} is missing, truncated or altered.*data.py.*--overwrite=True",
            ):
                train.train(toy_config)
            open(path, "wb").write(whole)
    meta = open(f"{folder}/meta.json").read()
    for text in (None, meta[:-20], meta.replace(f'"format": {data.FORMAT}', '"format": 9')):
        os.remove(f"{folder}/meta.json") if text is None else open(
            f"{folder}/meta.json", "w"
        ).write(text)
        with pytest.raises(
            UserError, match="(not a whole data set|has format 9).*python data.py --dataset=toy"
        ):
            train.train(toy_config)
    assert not os.path.exists(toy["out_dir"])
    open(f"{folder}/meta.json", "w").write(meta)
    with pytest.raises(UserError, match="built with vocab_size=300, not 350; name another"):
        train.train(train.Config(**toy | dict(vocab_size=350)))
    with open(toy["train_file"], "a") as f:
        f.write("tech,one more row\n")
    os.utime(toy["train_file"], (2**31, 2**31))
    with pytest.raises(UserError, match="toy.csv has changed since"):
        train.train(toy_config)


def test_building_deletes_nothing_that_it_did_not_make(tmp_path):
    """Not even where the advice that a message gives is followed."""
    folder = tmp_path / "data/reviews"
    folder.mkdir(parents=True)
    source = folder / "reviews.csv"
    source.write_text(GOOD)
    settings = dict(data_dir=str(tmp_path / "data"), train_file=str(source), vocab_size=300)
    cfg = train.Config(dataset="reviews", **settings)
    with pytest.raises(UserError, match="not a whole data set.*name another with --dataset=NAME"):
        data.open_or_build(cfg)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds reviews.csv, which is no part of a data set"):
            data.build(train.Config(dataset="reviews", overwrite=overwrite, **settings))
    assert os.listdir(folder) == ["reviews.csv"] and source.read_text() == GOOD
    meta = data.build(train.Config(dataset="others", **settings))  # what the message advises
    assert meta["splits"]["train"]["examples"] == 36
    deeper = folder / "texts"
    deeper.mkdir()
    for name in ("", ".", "..", "a/b", "../x", "/tmp"):
        with pytest.raises(UserError, match="can be neither empty nor a path"):
            data.open_or_build(train.Config(dataset=name, **settings))
    built = tmp_path / "data/others"
    (built / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds mine.txt"):
        data.build(train.Config(dataset="others", overwrite=True, **settings))
    os.remove(built / "mine.txt")
    (built / "test.idx").unlink()
    (built / "test.idx").mkdir()  # ours by its name only
    with pytest.raises(UserError, match="holds test.idx"):
        data.build(train.Config(dataset="others", overwrite=True, **settings))
    (built / "test.idx").rmdir()
    data.build(train.Config(dataset="others", overwrite=True, **settings))
    mode = os.stat(built).st_mode & 0o777
    os.mkdir(tmp_path / "plain")
    assert mode == os.stat(tmp_path / "plain").st_mode & 0o777
    assert sorted(os.listdir(tmp_path / "data")) == ["others", "reviews"]


def test_a_tokenizer_that_was_altered_is_refused(toy_config, toy):
    data.build(toy_config)
    path = f"{toy['data_dir']}/toy/tokenizer.json"
    text = open(path).read()
    open(path, "w").write(text.replace("goal", "gaol"))
    with pytest.raises(UserError, match="tokenizer.json is missing or altered.*data.py"):
        train.train(toy_config)
    assert not os.path.exists(toy["out_dir"])


def test_a_flipped_bit_in_a_checkpoint_is_found(toy, toy_config):
    train.train(toy_config)
    path = f"{toy['out_dir']}/best.pt"
    whole = bytearray(open(path, "rb").read())
    weights = load_checkpoint(path)["model"]
    for place in range(200, len(whole), len(whole) // 150):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        open(path, "wb").write(damaged)
        try:
            loaded = load_checkpoint(path)["model"]
        except UserError as error:
            assert "best.pt" in str(error)
        else:  # a byte that means nothing, between the files of the archive
            assert all(torch.equal(weights[k], loaded[k]) for k in weights)


def test_weights_that_are_not_finite_are_not_saved(toy, monkeypatch):
    """Here the step itself makes them so, after its gradient was finite."""
    real, steps = train.optim.step_all, []

    def explode(optimizers):
        real(optimizers)
        steps.append(1)
        if len(steps) == 4:
            parameter = optimizers[0].param_groups[0]["params"][0]
            parameter.data.fill_(torch.nan)

    monkeypatch.setattr(train.optim, "step_all", explode)
    with pytest.raises(
        UserError, match="after step 4 the weights .* are not finite .*val_loss nan"
    ):
        train.train(train.Config(**toy | dict(eval_interval=2)))
    for name in ("best.pt", "last.pt"):
        checkpoint = load_checkpoint(f"{toy['out_dir']}/{name}")
        assert checkpoint["step"] == 2
        assert all(v.isfinite().all() for v in checkpoint["model"].values())


def test_a_build_that_is_killed_leaves_no_data_set(toy_config, toy):
    killed = (
        "import os, data, train; data.Writer.close = lambda *a: os._exit(9); "
        f"data.build(train.Config(**{toy}))"
    )
    done = subprocess.run([sys.executable, "-c", killed], cwd=ROOT)
    assert done.returncode == 9 and data.open_meta(toy_config) is None
    (unfinished,) = os.listdir(toy["data_dir"])
    assert unfinished.startswith(".toy.tmp-")
    data.build(toy_config)
    assert os.listdir(toy["data_dir"]) == ["toy"]  # what the killed one left is gone


class Evil:
    def __reduce__(self):
        return os.system, ("echo gotcha > gotcha",)


def test_checkpoints(toy, toy_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(toy_config)
    best = f"{toy['out_dir']}/best.pt"
    whole, good = open(best, "rb").read(), load_checkpoint(best)

    def refused(says, **changes):
        save_checkpoint("x.pt", good | changes) if changes else None
        with pytest.raises(UserError, match=says):
            open_data(Classifier("x.pt"), "test")

    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        open("x.pt", "wb").write(whole[:cut])
        refused("x.pt: (truncated|refused)")
    torch.save({"format": 1, "model": Evil()}, "x.pt")
    refused("x.pt: refused")
    pickle.dump(Evil(), open("x.pt", "wb"))
    refused("x.pt: refused")
    assert not os.path.exists("gotcha")
    open("x.pt", "w").write("hello")
    refused("x.pt")
    refused("format", format=99)
    old = good["model_config"]
    save_checkpoint("x.pt", good | {"model_config": old | {"stem": "tokens"}})
    Classifier("x.pt")  # as checkpoints were written until 2026-11-25
    refused("reads hashed words", model_config=old | {"stem": "words"})
    refused("has a setting 'extra' that this code lacks", model_config=old | {"extra": 1})
    refused("trained on other data.*labels are", label_names=["x", "y", "z"])
    refused("tokenizer differs", tokenizer=good["tokenizer"].replace("[MASK]", "[MUSK]"))
    w = good["model"]
    refused("head.weight is missing", model={k: v for k, v in w.items() if k != "head.weight"})
    refused("extra is left over", model=w | {"extra": torch.zeros(1)})
    refused(
        r"head.weight is \(2, 32\), not \(3, 32\)", model=w | {"head.weight": torch.zeros(2, 32)}
    )
    refused("norm.weight is not finite", model=w | {"norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(UserError, match="no such checkpoint"):
        Classifier("nowhere")
    os.rename(toy["data_dir"], toy["data_dir"] + "-moved")
    with pytest.raises(
        UserError, match="data set is not there; give its --data_dir.*python data.py"
    ):
        open_data(Classifier(best), "test")
    assert (
        Classifier(best)(["goal"])[0]["label"] in good["label_names"]
    )  # predicting needs no data set
    clf = Classifier(best)
    moved = eval_script.Config(data_dir=toy["data_dir"] + "-moved", resamples=10)
    assert eval_script.full_report(clf, moved)[0]["n"] == 12


def test_runs_that_cannot_start_are_refused(toy, tmp_path):
    (tmp_path / "file").write_text("")
    for changes, says in (
        (dict(out_dir=str(tmp_path / "file/out")), "out_dir=.*cannot be written"),
        (dict(data_dir=str(tmp_path / "file/data")), "data/toy cannot be written"),
        (dict(d_model=33), "d_model=33 does not split"),
        (dict(micro_batch_tokens=8), "must hold an example"),
        (dict(dropout=1.0), "dropout=1.0 must be from 0 to below 1"),
        (dict(batch_size=0), "batch_size=0 must be above 0"),
        (dict(device="cuda" if not torch.cuda.is_available() else "xpu"), "cannot be used here"),
        (dict(mask_prob=0.1, tokenizer=str(tmp_path / "t.json")), "mask_prob needs a tokenizer"),
    ):
        if "mask_prob" in changes:
            from tokenizers import Tokenizer, models

            Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
                str(tmp_path / "t.json")
            )
            changes["dataset"] = "other"
        with pytest.raises(UserError, match=says):
            train.train(train.Config(**toy | changes))
    assert not os.path.exists(toy["out_dir"])


def test_a_checkpoint_without_its_run_is_not_deleted(toy):
    os.makedirs(toy["out_dir"])
    open(f"{toy['out_dir']}/best.pt", "w").write("precious")
    with pytest.raises(UserError, match="holds a best.pt without its config.json"):
        train.train(train.Config(**toy))
    assert os.listdir(toy["out_dir"]) == ["best.pt"]


def test_a_data_set_that_was_split_anew_is_not_evaluated_on(toy):
    train.train(train.Config(**toy | dict(tokenizer="bytes")))
    data.build(train.Config(**toy | dict(tokenizer="bytes", split_seed=7)))
    with pytest.raises(UserError, match="files differ: what is test now may have been train"):
        open_data(Classifier(toy["out_dir"]), "test")


def test_settings_for_images_do_no_harm_to_text(toy, capsys):
    train.train(
        train.Config(**toy | dict(flip=True, crop=64, max_len=16, epochs=0.5))
    )  # flip is for images; crop > max_len
    assert "--flip: for --kind=image, without effect on text" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_stops_the_run(toy, monkeypatch):
    cfg = train.Config(**toy | dict(eval_interval=2))
    real, steps = train.compute_gradient, []

    def explode(model_with_loss, *args):
        result = real(model_with_loss, *args)
        steps.append(1)
        if len(steps) > 4:
            model_with_loss.model.head.weight.grad *= torch.inf
        return result

    monkeypatch.setattr(train, "compute_gradient", explode)
    with pytest.raises(UserError, match="gradient of step 4 is not finite: lower --learning_rate"):
        train.train(cfg)
    last = load_checkpoint(f"{toy['out_dir']}/last.pt")
    assert last["step"] == 4 and all(v.isfinite().all() for v in last["model"].values())


def test_a_script_says_it_in_one_line(tmp_path, toy):
    open(toy["train_file"], "a").write("sport,\n")
    done = script("train.py", **toy)
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (
        done.returncode == 2
        and line.startswith("train.py: error: ")
        and "toy.csv, line 122: the text is empty" in line
    )
    for name, args in (
        ("train.py", ["--learning_rat=1"]),
        ("eval.py", [str(tmp_path)]),
        ("eval.py", []),
        ("data.py", ["nowhere.py"]),
        ("train.py", ["config/textcls.py=3"]),
    ):
        done = script(name, *args)
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and "Traceback" not in done.stderr
        )
    assert json.dumps(os.listdir(tmp_path)) == '["toy.csv"]' or set(os.listdir(tmp_path)) <= {
        "toy.csv",
        "data",
    }


@pytest.mark.parametrize(
    "error, says",
    [
        ("MemoryError()", "out of memory: lower --micro_batch_tokens"),
        ("RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')", "out of memory"),
        ("OSError(28, 'No space left on device', 'x/y')", "x/y cannot be written: No space left"),
    ],
)
def test_what_the_machine_lacks_is_said_in_one_line(error, says):
    program = f"import configurator\ndef main(): raise {error}\nconfigurator.run(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_messages_are_utf8_whatever_the_locale():
    program = r"import configurator; configurator.run(lambda: print('2\u00d73 \u041c'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    )
    assert done.stdout.decode() == "2×3 М\n"


def test_a_reader_that_has_ended_stops_the_script_quietly():
    """As `python data.py … | head` does."""
    lines = "[print('x' * 1000, flush=True) for _ in range(10_000)]"
    program = f"import configurator; configurator.run(lambda: {lines})"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_a_compiler_that_is_missing_is_said_to_be(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = [f"--{key}={value}" for key, value in (toy | dict(compile=True)).items()]
    command = [sys.executable, str(ROOT / "train.py"), *options]  # inductor reads CXX on import
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "a C++ compiler, as gcc is: install one, or --compile=False" in done.stderr
