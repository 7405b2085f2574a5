"""Drills: what must not go wrong, tried at random, many times (`python bench.py drills`).

    kills      a run is built, trained and evaluated, killed at random moments, and started again
               until it is finished; then it must be what it is without kills, with nothing left
               behind
    torn       one byte of a data set's or a run's files is altered: evaluation and the run's
               continuation give what they gave before, or refuse
    hostile    data sets, checkpoints, Hugging Face folders and source files as a stranger might
               make them: accepted or refused in one line; no traceback, hang, or more than 1 GiB

Each prints a row: how many were tried, how many ended well (clean), left something behind or lost
rows (lost), or gave another result, a traceback, a hang (wrong). A trial runs in a fork of this
process, which has imported torch already.
"""
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import configurator
from configurator import UserError, file_sha256

import numpy as np
import torch

import data
import eval as evaluation
import finetune
import train
from huggingface import save_hf
from predict import Classifier, open_data
from runs import read_records
from weights import from_pretrained, load_checkpoint

WORDS = {"sport": "goal match referee coach", "tech": "chip code laptop network",
         "money": "shares bank profit market"}


def write_texts(path, n=90):
    """A .csv of n texts in three classes."""
    rng = random.Random(0)
    rows = ["label,text"]
    for i in range(n):
        label = sorted(WORDS)[i % 3]
        words = rng.choices(WORDS[label].split() + "the of and it".split(), k=rng.randint(2, 30))
        rows.append(f"{label},{' '.join(words)} {i}")
    path.write_text("\n".join(rows))


def write_pictures(path, n=60):
    """A .csv of n pictures, 8×8, of three classes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (n, 64))
    pixels[np.arange(n), np.arange(n) % 3] = 255
    path.write_text("\n".join(f"{i % 3}," + ",".join(map(str, row))
                              for i, row in enumerate(pixels)))


def settings(folder, **changes):
    """Settings of a small run on the texts in a folder."""
    return dict(dataset="toy", train_file=str(folder / "texts.csv"), data_dir=str(folder / "data"),
                vocab_size=300, max_len=32, n_layer=1, d_model=32, n_head=2, batch_size=16,
                max_steps=30, warmup_steps=3, learning_rate=0.003, wandb_mode="disabled",
                dtype="float32", device="cpu", log_interval=1, eval_interval=3, save_interval=2,
                dropout=0.1) | changes


# --------------------------------------------------------------------------------------------------
# A trial in a process of its own


def start(work, environment=None, memory=None, seconds=None):
    """Fork a process that does work() and exits with 0, with 2 for a UserError in one line, with 3
    where memory ran out, else with 1. What it says goes to the file `messages`. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.environ.update(environment or {})
        if memory:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        if seconds:
            signal.alarm(seconds)
        sys.stdout = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)
        with open("messages", "a") as messages:
            os.dup2(messages.fileno(), 2)
        work()
        status = 0
    except UserError as error:
        status = 1 if "\n" in str(error) else 2
        os.write(2, f"{error}\n".encode())
    except MemoryError:
        status = 3
    except SystemExit as stopped:
        status = stopped.code
    except BaseException as error:
        status = 3 if configurator.plain_message(error) else 1
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def finish(pid):
    """Wait for a process; returns its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --------------------------------------------------------------------------------------------------
# Kills


def kill_variants(folder):
    """{name: (main, config, number of processes)} of the runs that are killed."""
    plain = settings(folder)
    base = str(folder / "base")
    run(train.train, train.Config(**plain | {"out_dir": base}))
    images = dict(dataset="pictures", train_file=str(folder / "pictures.csv"), kind="image",
                  image_size=[1, 8, 8], label_column=0, shift=0.1)
    tuned = {key: plain[key] for key in ("dataset", "train_file", "data_dir", "batch_size",
             "max_steps", "wandb_mode", "dtype", "device", "eval_interval", "save_interval")}
    tuned |= dict(init_from=base, max_len=32, lora_rank=4, warmup_steps=3)
    return {
        "plain": (train.train, train.Config(**plain), 1),
        "two ranks": (train.train, train.Config(**plain), 2),
        "EMA": (train.train, train.Config(**plain | {"ema_decay": 0.9}), 1),
        "LoRA": (finetune.finetune, finetune.Config(**tuned), 1),
        "mlm": (train.train, train.Config(**plain | dict(objective="mlm", mask_prob=0.3,
                                                         optimizer="muon")), 1),
        "images": (train.train, train.Config(**plain | images), 1),
        "W&B offline": (train.train, train.Config(**plain | {"wandb_mode": "offline"}), 1)}


def run(main, cfg, world=1, kill_after=None, rng=None):
    """Train and evaluate in `world` processes, killed after so many seconds: all, or one whose end
    the others must notice. Returns whether they finished by themselves."""
    def work():
        main(cfg)
        if int(os.environ.get("RANK", 0)) == 0:
            evaluation.report_checkpoint(cfg.out_dir, evaluation.Config(resamples=100))
    port = random.randint(20000, 60000)
    pids = [start(work, {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                         "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}, seconds=120)
            for rank in range(world)]
    if kill_after is not None:
        time.sleep(kill_after)
        for pid in pids if rng.random() < 0.7 else [rng.choice(pids)]:
            os.kill(pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
    statuses = [finish(pid) for pid in pids]
    return not any(statuses)


def kills(n):
    """Rows (name, tried, clean, lost, wrong) of n kills of each kind of run."""
    folder = Path.cwd()
    write_texts(folder / "texts.csv")
    write_pictures(folder / "pictures.csv")
    for name, (main, cfg, world) in kill_variants(folder).items():
        rng = random.Random(0)
        whole = place(cfg, folder / name / "whole")
        started = time.monotonic()
        run(main, whole, world)
        seconds = time.monotonic() - started
        expected = outcome(whole)
        tried = lost = wrong = attempt = 0
        while tried < n:
            attempt += 1
            cfg = place(cfg, folder / name / str(attempt))
            n_kills = 0
            # later and later, as the machine may be slower now than when it took so many seconds
            while not run(main, cfg, world, 0.2 + rng.random() * seconds * (1 + n_kills / 10), rng):
                n_kills += 1
            tried += n_kills
            found = outcome(cfg)
            wrong += n_kills * (found["results"] != expected["results"])
            lost += n_kills * (found["files"] != expected["files"])
            shutil.rmtree(folder / name / str(attempt))
        yield f"kills: {name}", tried, tried - max(lost, wrong), lost, wrong


def place(cfg, folder):
    """A config with a data_dir and an out_dir of its own."""
    return dataclasses.replace(cfg, out_dir=str(folder / "out"), data_dir=str(folder / "data"))


def outcome(cfg):
    """What a run has led to: hashes of its weights and figures, and the files that are there."""
    out = Path(cfg.out_dir)
    results = {}
    for name in ("last.pt", "best.pt"):
        checkpoint = load_checkpoint(out / name)
        tensors = [*checkpoint["model"].values(), *checkpoint.get("ema", ())]
        results[name] = [hash(t.numpy().tobytes()) for t in tensors]
    results["rows"] = [(r["step"], r.get("loss"), r.get("val_loss")) for r in read_records(out)]
    report = json.loads((out / "eval.json").read_text())
    results["eval"] = {key: value for key, value in report.items()
                       if key not in ("checkpoint", "checksum")}
    files = [str(p.relative_to(out.parent)) for p in out.parent.rglob("*")
             if "wandb" not in p.parts]
    return {"results": results, "files": sorted(files)}


# --------------------------------------------------------------------------------------------------
# Torn bytes


def torn(n):
    """A row for n altered bytes, over all files of a data set and a run."""
    folder = Path.cwd()
    cfg = a_run(folder)
    with contextlib.redirect_stdout(None):
        expected = results_of(cfg)
        assert expected == results_of(cfg)
    files = [p for p in [*Path(cfg.data_dir, "toy").iterdir(), *Path(cfg.out_dir).iterdir()]
             if p.suffix in (".pt", ".json", ".bin", ".idx", ".lbl")]
    rng = random.Random(0)
    clean = wrong = 0
    for _ in range(n):
        path = rng.choice(files)
        whole = path.read_bytes()
        torn = bytearray(whole)
        torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        path.write_bytes(torn)
        status = finish(start(lambda: same_results(cfg, expected), memory=2**30, seconds=60))
        path.write_bytes(whole)
        clean += status in (0, 2)
        wrong += status not in (0, 2)
    yield "torn bytes", n, clean, 0, wrong


def a_run(folder, **changes):
    """A config whose run is finished and evaluated, with several labels for each text."""
    write_texts(folder / "texts.csv")
    cfg = train.Config(**settings(folder, target="labels", out_dir=str(folder / "out")) | changes)
    run(train.train, cfg)
    return cfg


def results_of(cfg):
    """What evaluation, labelling and the run's continuation come to: (logits, labels, what eval.py
    fitted)."""
    clf = Classifier(cfg.out_dir)
    logits = clf.logits(open_data(clf, "test")).tolist()
    train.train(cfg)  # is finished: reads its folder and says so
    return logits, clf(["goal coach chip", "bank"])


def same_results(cfg, expected):
    if results_of(cfg) != expected:
        raise AssertionError("another result")


# --------------------------------------------------------------------------------------------------
# Hostile files

ABSURD = None, "../x", -1, 10**12, float("nan"), [], {}


def hostile(n=None):
    """A row for each kind of folder or file, as a stranger might make it."""
    folder = Path.cwd()
    for name, trials in (("data sets", hostile_data_sets), ("checkpoints", hostile_checkpoints),
                         ("Hugging Face folders", hostile_hf_folders),
                         ("source files", hostile_sources)):
        tried = wrong = 0
        for what, work in trials(folder):
            status = finish(start(work, memory=2**30, seconds=30))
            tried += 1
            if status not in (0, 2):
                wrong += 1
                print(f"  {name}: {what}: {'hang' if status == -signal.SIGALRM else status}")
        yield f"hostile: {name}", tried, tried - wrong, 0, wrong


def altered(content):
    """(what, copy) of a nested dict with each entry in turn taken out, or absurd."""
    for key in content:
        yield f"without {key}", {k: v for k, v in content.items() if k != key}
        for value in ABSURD:
            yield f"{key}={value}", content | {key: value}
        if isinstance(content[key], dict):
            for what, inner in altered(content[key]):
                yield f"{key}: {what}", content | {key: inner}


def hostile_data_sets(folder):
    cfg = a_run(folder, target="class")
    pictures = folder / "pictures.csv"
    write_pictures(pictures)
    images = settings(folder, dataset="pictures", train_file=str(pictures), kind="image",
                      image_size=[1, 8, 8], label_column=0, out_dir=str(folder / "images"))
    for base in (cfg, train.Config(**images)):
        run(train.train, base)
        again = dataclasses.replace(base, overwrite=True, max_steps=1, out_dir=str(folder / "new"))
        path = data.folder_of(base)
        meta = json.loads((path / "meta.json").read_text())
        del meta["checksum"]

        def work(base=base, again=again):
            train.train(again)
            clf = Classifier(base.out_dir)
            clf.logits(open_data(clf, "test"))
        for what, changed in altered(meta):
            if not what.startswith(("build", "source", "sha256")):
                (path / "meta.json").write_text(json.dumps(changed))
                yield f"meta.json, {what}", work
        (path / "meta.json").write_text("[" * 100_000)
        yield "nested JSON", work
        for name in meta["sha256"]:
            whole = (path / name).read_bytes()
            for what, content in altered_bytes(name, whole):
                (path / name).write_bytes(content)
                hashes = meta["sha256"] | {name: file_sha256(path / name)}
                changed = meta | {"sha256": hashes}
                if name == "tokenizer.json":
                    changed["tokenizer_sha256"] = hashes[name]
                (path / "meta.json").write_text(json.dumps(changed))
                yield f"{name}, {what}", work
            (path / name).write_bytes(whole)


def altered_bytes(name, whole):
    """(what, bytes) of a data set's file with other values in it."""
    yield "empty", b""
    yield "half of it", whole[: len(whole) // 2]
    yield "twice", whole * 2
    yield "zeros", bytes(len(whole))
    yield "255s", b"\xff" * len(whole)
    if name.endswith((".idx", ".lbl")):
        values = np.frombuffer(whole, np.int64)
        for what, value in (("-100", -100), ("a million", 10**6), ("2^62", 2**62)):
            for index in (0, len(values) // 2, -1):
                changed = values.copy()
                changed[index] = value
                yield f"{what} at {index}", changed.tobytes()
        yield "from behind", values[::-1].tobytes()


def hostile_checkpoints(folder):
    cfg = a_run(folder)
    path = Path(cfg.out_dir) / "best.pt"
    whole = torch.load(path, weights_only=True)
    last = torch.load(Path(cfg.out_dir) / "last.pt", weights_only=True)

    def label(changed):
        torch.save(changed, path)
        clf = Classifier(path)
        clf.logits(open_data(clf, "test"))
        with contextlib.suppress(UserError):
            clf(["goal"])

    def tune(changed):
        torch.save(changed, path)
        from_pretrained(path, 3, new_head=True)

    def resume(changed):
        torch.save(changed, Path(cfg.out_dir) / "last.pt")
        train.train(cfg)
    slim = {key: value for key, value in whole.items() if key not in ("model", "data_sha256")}
    for what, changed in altered(slim):
        changed |= {key: whole[key] for key in ("model", "data_sha256")}
        yield f"best.pt, {what}", functools.partial(label, changed)
        if what.startswith("model_config"):
            yield f"weights to begin with, {what}", functools.partial(tune, changed)
    name = next(iter(whole["model"]))
    value = whole["model"][name]
    for what, changed in (
            ("view", value[:1].expand(10**9, value.shape[1])), ("NaN", value * float("nan")),
            ("transposed", value.T), ("empty", value[:0]), ("complex", value.to(torch.complex64)),
            ("int8", value.to(torch.int8)), ("sparse", value.to_sparse()), ("text", "x"),
            ("float64", value.double()), ("bool", value > 0)):
        changed = whole | {"model": whole["model"] | {name: changed}}
        yield f"best.pt, {name}: {what}", functools.partial(label, changed)
    torch.save(whole, path)
    slim = {key: last[key] for key in ("step", "best", "bad_evals", "elapsed", "run_id")}
    for what, changed in altered(slim | {"ema": None, "optimizers": None}):
        changed = last | {"finished": False, "step": 2} | changed
        yield f"last.pt, {what}", functools.partial(resume, changed)


def hostile_hf_folders(folder):
    import transformers
    cfg = a_run(folder, target="class")
    for name in ("BertForSequenceClassification", "ModernBertForSequenceClassification",
                 "GPT2ForSequenceClassification"):
        config_class = getattr(transformers, name).config_class
        sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=64, max_position_embeddings=64, pad_token_id=0, num_labels=3)
        path = folder / "hf"
        shutil.rmtree(path, ignore_errors=True)
        getattr(transformers, name)(config_class(**sizes)).save_pretrained(path)
        yield from hostile_configs(path)
    clf = Classifier(cfg.out_dir)
    save_hf(clf.model, folder / "own", clf.label_names, clf.tokenizer.to_str())
    yield from hostile_configs(folder / "own")


def hostile_configs(path):
    config = json.loads((path / "config.json").read_text())
    for what, changed in altered(config):
        (path / "config.json").write_text(json.dumps(changed))
        yield f"{config['model_type']}, {what}", lambda: from_pretrained(path, 3, max_len=16)
    (path / "config.json").write_text(json.dumps(config))
    whole = (path / "model.safetensors").read_bytes()
    for what, content in (("half", whole[: len(whole) // 2]), ("empty", b""),
                          ("header of 2^60 bytes", b"\0" * 7 + b"\x10" + whole[8:]),
                          ("pickle", b"\x80\x04cos\nsystem\n.")):
        (path / "model.safetensors").write_bytes(content)
        yield f"{config['model_type']}, safetensors: {what}", lambda: from_pretrained(path, 3)
    (path / "model.safetensors").write_bytes(whole)


def hostile_sources(folder):
    def build(name, content, **changes):
        path = folder / name
        path.write_bytes(content)
        shutil.rmtree(folder / "data", ignore_errors=True)
        return lambda: data.build(train.Config(
            **settings(folder, train_file=str(path)) | changes))
    good = b"label,text\n" + b"a,x y\nb,z w\n" * 40
    zeros = gzip.compress(bytes(4 * 10**9 // 10), 9)
    yield "zeros.csv.gz", build("zeros.csv.gz", zeros)
    yield "zeros.jsonl.gz", build("zeros.jsonl.gz", zeros)
    yield "a field of 500 MB", build("field.csv", good + b'a,"' + b"x" * 500_000_000 + b'"\n')
    yield "a quote left open", build("open.csv", good + b'a,"' + b"x y\n" * 50_000_000)
    yield "nested JSON", build("nested.jsonl", b'{"text": ' + b"[" * 10**6 + b"\n")
    yield "nested JSON, closed", build("closed.jsonl",
                                       b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n")
    yield "a large number", build("number.jsonl", b'{"label": 1' + b"0" * 10**6 + b', "text": 1}\n')
    yield "a million columns", build("wide.csv", b"text," * 10**6 + b"label\n" + b"a," * 10**6)
    yield "zero bytes", build("zeros.csv", good + bytes(10**6))
    yield "random bytes", build("random.csv", os.urandom(10**6))
    yield "an empty file", build("empty.csv", b"")
    picture = folder / "pictures" / "a"
    picture.mkdir(parents=True, exist_ok=True)
    for name, content in hostile_pictures():
        (picture / name).write_bytes(content)
        shutil.rmtree(folder / "data", ignore_errors=True)
        yield name, lambda: data.build(train.Config(**settings(
            folder, train_file=str(picture.parent), kind="image")))
        (picture / name).unlink()


def hostile_pictures():
    import struct
    import zlib

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check
    for side in (10**5, 2 * 10**4):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        lines = zlib.compress(bytes(10**6))
        yield f"{side}.png", b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", lines)
    yield "text.png", b"no picture"
    yield "empty.jpg", b""


DRILLS = {"kills": (kills, 100), "torn": (torn, 1000), "hostile": (hostile, None)}


def drill(arguments):
    """Run the drills that are named (all where none is); --n=N: so many trials of each."""
    torch.set_num_threads(1)
    names = [name for name in arguments if name in DRILLS] or list(DRILLS)
    n = next((int(a.removeprefix("--n=")) for a in arguments if a.startswith("--n=")), None)
    print(f"{'drill':32}   tried   clean    lost   wrong")
    for name in names:
        trials, usual = DRILLS[name]
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for row in trials(n or usual):
                print(f"{row[0]:32}" + "".join(f"{count:8}" for count in row[1:]), flush=True)
