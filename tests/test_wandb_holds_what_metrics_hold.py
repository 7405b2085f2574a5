"""An offline W&B run, read back from its file, holds the losses that metrics.jsonl holds."""

import glob
import json
import os
import signal
import struct
import time

import pytest

import train
from tests.forks import script
from tests.test_evaluating_changes_nothing import records
from weights import load_checkpoint

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def wandb_rows(path, field="history"):
    """The logged rows (or the updates of the summary) of a .wandb file: LevelDB's log format (32
    KiB blocks; crc32, length, type) behind a 7-byte header, with a protobuf Record in each entry.
    """
    raw, at, part, rows = open(path, "rb").read(), 7, b"", []
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # the rest of a block too short for an entry's head
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        part, at = part + raw[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, part = pb.Record.FromString(part), b""
            if record.HasField(field):
                items = record.history.item if field == "history" else record.summary.update
                rows.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return rows


def test_offline_run_holds_the_losses(toy):
    done = script("train.py", **toy | dict(wandb_mode="offline"))
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stdout
    (path,) = glob.glob(f"{toy['out_dir']}/wandb/offline-run-*/*.wandb")
    logged = wandb_rows(path)
    for key in ("loss", "lr", "grad_norm", "val_loss", "val_accuracy"):
        expected = [(r["step"], r[key]) for r in records(toy["out_dir"]) if key in r]
        assert [(r["step"], r[key]) for r in logged if key in r] == expected and len(
            expected
        ) >= 2, key


def test_a_run_that_fails_under_torchrun_is_there_too(toy):
    """And is named where the folder's name is not one that W&B takes."""
    toy |= dict(wandb_mode="offline", learning_rate=1e30, out_dir=toy["out_dir"] + "-lr:0.1,a")
    done = script("train.py", processes=2, **toy)
    assert done.returncode == 2 and "not finite" in done.stderr and "wandb sync" in done.stdout
    (path,) = glob.glob(f"{toy['out_dir']}/wandb/offline-run-*/*.wandb")
    assert "out-lr-0.1-a-" in path and any("loss" in row for row in wandb_rows(path))


def test_a_resumed_offline_run_names_all_its_folders(toy):
    """Each part has the steps that it made."""
    toy |= dict(wandb_mode="offline", eval_interval=4)
    train.train(train.Config(**toy | dict(wandb_mode="disabled")))  # builds the data set
    out = toy["out_dir"] + "-resumed"
    real, calls = train.compute_gradient, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    train.compute_gradient = interrupted
    try:
        with pytest.raises(SystemExit):
            train.train(train.Config(**toy | dict(out_dir=out)))
    finally:
        train.compute_gradient = real
    time.sleep(1.1)  # a folder is named by its second
    done = script("train.py", **toy | dict(out_dir=out))
    assert done.returncode == 0 and "continuing at step 7" in done.stdout, done.stderr
    folders = sorted(glob.glob(f"{out}/wandb/offline-run-*"))
    command = next(line for line in done.stdout.splitlines() if "wandb sync" in line)
    named = [os.path.abspath(part) for part in command.split("wandb sync ")[1].split()]
    assert len(folders) == 2 and named == folders
    steps = []
    for folder in folders:
        (path,) = glob.glob(f"{folder}/*.wandb")
        steps += [row["step"] for row in wandb_rows(path) if "loss" in row]
    assert steps == list(range(1, 13))


def test_evaluation_adds_to_the_run_of_training(toy):
    train.train(train.Config(**toy | dict(epochs=1.0)))
    done = script("eval.py", toy["out_dir"], split="val", wandb_mode="offline")
    assert done.returncode == 0 and "wandb sync" in done.stdout, done.stderr
    (path,) = glob.glob(f"{toy['out_dir']}/wandb/offline-run-*/*.wandb")
    assert path.endswith(f"run-{load_checkpoint(toy['out_dir'] + '/last.pt')['run_id']}.wandb")
    report, summary = json.load(open(f"{toy['out_dir']}/eval.json")), {}
    for row in wandb_rows(path, "summary"):
        summary |= row
    for key in ("accuracy", "macro_f1", "mcc", "log_loss", "auroc", "ece", "n"):
        assert summary[f"val_{key}"] == pytest.approx(report[key], abs=1e-12), key
    (logged,) = [row for row in wandb_rows(path) if "val_per_class.path" in row]
    files = f"{path.rsplit('/', 1)[0]}/files/"
    rows = json.load(open(files + logged["val_per_class.path"]))["data"]
    assert [r[0] for r in rows] == report["label_names"] and [r[3] for r in rows] == report[
        "per_class"
    ]["f1"]
    mistakes = json.load(open(files + logged["val_mistakes.path"]))["data"]
    assert [r[4] for r in mistakes] == [m["text"] for m in report["mistakes"]] and mistakes
    assert open(files + logged["val_confusion.path"], "rb").read(4) == b"\x89PNG"


def test_disabled_writes_nothing(toy, tmp_path):
    train.train(train.Config(**toy))
    assert not glob.glob(f"{toy['out_dir']}/**/*wandb*", recursive=True)
