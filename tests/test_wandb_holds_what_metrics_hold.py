"""An offline W&B run, read back from its file, holds the losses that metrics.jsonl holds."""
import glob
import json
import struct

import pytest

import train
from tests.conftest import script
from tests.test_evaluating_changes_nothing import records

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def wandb_history(path):
    """The logged rows of a .wandb file: LevelDB's log format (32 KiB blocks; crc32, length, type) behind a 7-byte header,
    with a protobuf Record in each entry."""
    raw, at, part, rows = open(path, "rb").read(), 7, b"", []
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # the rest of a block too short for an entry's head
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        part, at = part + raw[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, part = pb.Record.FromString(part), b""
            if record.HasField("history"):
                rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_offline_run_holds_the_losses(toy):
    done = script("train.py", **toy | dict(wandb_mode="offline"))
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stdout
    (path,) = glob.glob(f"{toy['out_dir']}/wandb/offline-run-*/*.wandb")
    logged = wandb_history(path)
    for key in ("loss", "lr", "grad_norm", "val_loss", "val_accuracy"):
        expected = [(r["step"], r[key]) for r in records(toy["out_dir"]) if key in r]
        assert [(r["step"], r[key]) for r in logged if key in r] == expected and len(expected) >= 2, key


def test_disabled_writes_nothing(toy, tmp_path):
    train.train(train.Config(**toy))
    assert not glob.glob(f"{toy['out_dir']}/**/*wandb*", recursive=True)
