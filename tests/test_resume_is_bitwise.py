"""A run that is killed and started again ends as one that was not, bit for bit."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import configurator
from configurator import UserError

import pytest
import torch

import distributed
import runs
import train
from tests.conftest import ROOT, interrupted
from tests.forks import script
from tests.test_evaluating_changes_nothing import records
from weights import load_checkpoint


def state(folder):
    last, best = load_checkpoint(f"{folder}/last.pt"), load_checkpoint(f"{folder}/best.pt")
    moments = [
        v
        for o in last["optimizers"]
        for s in o["state"].values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    ]
    return (
        [*last["model"].values(), *moments, *best["model"].values()],
        last["best"],
        [
            [r.get(k) for k in ("step", "loss", "lr", "grad_norm", "val_loss", "val_accuracy")]
            for r in records(folder)
        ],
    )


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and a[1:] == b[1:]


def test_killed_and_continued_equals_uninterrupted(toy):
    toy |= dict(dropout=0.2, mask_prob=0.2, eval_interval=5, epochs=40.0)  # 240 steps
    args = [f"--{k}={v}" for k, v in toy.items()]
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = f"{toy['out_dir']}/metrics.jsonl"
    while running.poll() is None and not (
        os.path.exists(metrics) and open(metrics).read().count("val_loss") >= 3
    ):
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    stopped_at = load_checkpoint(f"{toy['out_dir']}/last.pt")
    assert 10 <= stopped_at["step"] < 240 and not stopped_at["finished"]
    with open(metrics, "a") as f:
        f.write('{"step": 9')  # as a kill in the middle of a write leaves it
    for out in (toy["out_dir"], toy["out_dir"] + "-whole"):
        done = script("train.py", **toy | dict(out_dir=out))
        assert done.returncode == 0, done.stderr
        assert ("continuing at step" in done.stdout) == (out == toy["out_dir"])
    assert_same(state(toy["out_dir"]), state(toy["out_dir"] + "-whole"))

    again = script("train.py", **toy)  # finished: says so, and changes nothing
    assert again.returncode == 0 and "finished" in again.stdout and "eval.py" in again.stdout


def test_a_run_that_goes_on_in_another_dtype_says_so(toy, monkeypatch, capsys):
    toy |= dict(dtype="auto", eval_interval=2, save_interval=2)
    monkeypatch.setattr(distributed, "bf16_is_native", lambda device: True)
    with interrupted(5):
        train.train(train.Config(**toy))
    monkeypatch.setattr(distributed, "bf16_is_native", lambda device: False)
    train.train(train.Config(**toy))
    said = capsys.readouterr().out
    assert "continuing at step 4" in said
    assert "in torch.float32 from here on" in said and "it was torch.bfloat16" in said


def test_told_to_stop_when_all_is_done_it_has_finished(toy, monkeypatch, capsys):
    real = runs.Checkpoints.save_best

    def save_best(*args):
        signal.raise_signal(signal.SIGTERM)
        real(*args)

    monkeypatch.setattr(runs.Checkpoints, "save_best", save_best)
    toy |= dict(max_steps=4, eval_interval=4)
    train.train(train.Config(**toy))  # exits with 0
    assert "done in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):  # other folds would follow
        train.train(train.Config(**toy | dict(folds=2, out_dir=toy["out_dir"] + "-other")))
    assert "fold 2 of 2" not in capsys.readouterr().out


def test_time_is_counted_up_to_the_step_that_is_saved(toy):
    toy |= dict(log_interval=100, eval_interval=100, save_interval=3)
    began = time.monotonic()
    with interrupted(5):
        train.train(train.Config(**toy))
    first = load_checkpoint(f"{toy['out_dir']}/last.pt")["elapsed"]
    assert 0 < first < time.monotonic() - began
    with interrupted(4):
        train.train(train.Config(**toy))
    assert first < load_checkpoint(f"{toy['out_dir']}/last.pt")["elapsed"]


def test_damaged_lines_of_metrics_are_left_out(toy, capsys):
    toy |= dict(save_interval=2, eval_interval=99)
    with interrupted(5):
        train.train(train.Config(**toy))
    with open(f"{toy['out_dir']}/metrics.jsonl", "a") as file:
        file.write('{"step": "5"}\n{"step": Infinity}\n[]\n{"loss": 1}\n{\n')
    train.train(train.Config(**toy))
    assert "5 of its lines are damaged and left out" in capsys.readouterr().err
    steps = [row["step"] for row in records(toy["out_dir"]) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


def test_a_new_run_keeps_nothing_of_the_former(toy):
    train.train(train.Config(**toy | dict(max_steps=2)))
    folder = runs.Path(toy["out_dir"])
    for name in ("eval.json", "eval-new.json", "report.html", "report-new.html", "trace.json"):
        (folder / name).write_text("{}")
    train.train(train.Config(**toy | dict(max_steps=2, overwrite=True)))
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"config.json", "metrics.jsonl", "last.pt", "best.pt"}


def test_what_no_run_has_left_in_a_folder_stays(toy):
    folder = runs.Path(toy["out_dir"])
    folder.mkdir()
    own = {"eval-notes.json", "report-2024.html", "report.html", "trace.json", "notes.txt"}
    for name in own:
        (folder / name).write_text("mine")
    train.train(train.Config(**toy | dict(max_steps=2)))
    assert own <= {path.name for path in folder.iterdir()}


def test_a_data_folder_may_move(toy):
    """Also where the tokenizer lies in it, as finetune.py puts it there."""
    toy |= dict(save_interval=2, eval_interval=99, max_steps=6)
    train.train(train.Config(**toy | dict(out_dir=toy["out_dir"] + "-before")))
    given = []
    for name in "ab":
        folder = runs.Path(toy["data_dir"] + name)
        folder.mkdir()
        shutil.copy(f"{toy['data_dir']}/toy/tokenizer.json", folder / "its.json")
        given.append(toy | dict(data_dir=str(folder), tokenizer=str(folder / "its.json")))
    with interrupted(5):
        train.train(train.Config(**given[0]))
    train.train(train.Config(**given[1]))
    assert load_checkpoint(f"{toy['out_dir']}/last.pt")["finished"]
    with pytest.raises(UserError, match="tokenizer='.*its.json' there, 'bytes' here"):
        train.train(train.Config(**toy | dict(tokenizer="bytes")))


def test_a_run_that_is_older_than_a_setting_is_still_its_run(toy, capsys):
    train.train(train.Config(**toy))
    path = f"{toy['out_dir']}/config.json"
    config = json.load(open(path))
    del config["checksum"], config["grad_clip"]  # as if the setting had been added since
    json.dump(config, open(path, "w"))
    train.train(train.Config(**toy))
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="grad_clip=1.0 there, 2.0 here"):
        train.train(train.Config(**toy | dict(grad_clip=2.0)))


def started(toy, torchrun=0, n_losses=5):
    """A training process (or `torchrun` of them under one) that has logged so many losses."""
    launch = [sys.executable]
    if torchrun:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    command = [*launch, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in toy.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    wait_for_losses(toy, n_losses, lambda: running.poll() is None)
    return running


def wait_for_losses(toy, n_losses, is_running):
    """Until a run has logged so many losses."""
    metrics = f"{toy['out_dir']}/metrics.jsonl"
    while not (os.path.exists(metrics) and open(metrics).read().count("loss") >= n_losses):
        assert is_running()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number, torchrun", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 2)]
)
def test_told_to_stop_it_saves_its_step_and_goes_on_from_there(toy, number, torchrun):
    """No evaluation falls before the signal, so that the step is saved for the signal alone."""
    toy |= dict(dropout=0.2, eval_interval=1000, epochs=40.0, ema_decay=0.9999)
    running = started(toy, torchrun)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    if torchrun:  # which says in its own words that it was told to stop
        assert running.returncode != 0
    else:
        assert running.returncode == 128 + number and "Traceback" not in err
    stopped_at = load_checkpoint(f"{toy['out_dir']}/last.pt")
    assert 5 <= stopped_at["step"] < 240 and not stopped_at["finished"]
    assert f"told to stop: {toy['out_dir']} is saved at step {stopped_at['step']}" in out
    assert not os.path.exists(f"{toy['out_dir']}/best.pt")
    for folder in (toy["out_dir"], toy["out_dir"] + "-whole"):
        done = script("train.py", processes=torchrun, **toy | dict(out_dir=folder))
        assert done.returncode == 0, done.stderr
    assert_same(state(toy["out_dir"]), state(toy["out_dir"] + "-whole"))


@pytest.mark.parametrize(
    "call, step, changes",
    [
        (2, 8, {}),
        (6, 24, {}),  # the last, so that no step follows
        (2, 8, dict(patience=1, learning_rate=0.0)),  # which ends the run
        (5, 12, dict(objective="contrastive", ema_decay=0.9)),  # what its head is fitted to
    ],
)
def test_told_to_stop_in_an_evaluation_it_begins_with_that(toy, monkeypatch, call, step, changes):
    toy |= dict(eval_interval=4, max_steps=24, epochs=9.0, dropout=0.2) | changes
    train.train(train.Config(**toy | dict(out_dir=toy["out_dir"] + "-whole")))
    real, calls = train.eval_batches, []

    def eval_batches(*args):
        calls.append(1)
        for batch in real(*args):
            yield batch
            if len(calls) == call:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "eval_batches", eval_batches)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        train.train(train.Config(**toy))
    stopped_at = load_checkpoint(f"{toy['out_dir']}/last.pt")
    assert (stopped_at["step"], stopped_at["evaluated"]) == (step, step - 4)
    train.train(train.Config(**toy))
    assert_same(state(toy["out_dir"]), state(toy["out_dir"] + "-whole"))


def test_told_again_it_stops_at_once():
    """But not if the second signal follows the first, as when Slurm tells torchrun and the run."""
    stop = runs.StopSignal()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    stop.listen()
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        stop.since -= 3  # seconds
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
        signal.signal(signal.SIGINT, before)


def test_save_interval_saves_between_evaluations(toy):
    cfg = train.Config(**toy | dict(save_interval=5, eval_interval=1000))
    steps, real = [], runs.save_checkpoint

    def save(path, checkpoint):
        steps.append((path.name, checkpoint["step"]))
        real(path, checkpoint)

    runs.save_checkpoint = save
    try:
        train.train(cfg)
    finally:
        runs.save_checkpoint = real
    assert steps == [("last.pt", 5), ("last.pt", 10), ("best.pt", 12), ("last.pt", 12)]


def test_two_runs_in_one_folder_are_one_too_many(toy):
    running = started(toy | dict(epochs=2000.0), n_losses=2)
    for more in (dict(epochs=2000.0), dict(overwrite=True)):
        second = script("train.py", **toy | more)
        assert second.returncode == 2 and "Traceback" not in second.stderr
        expected = f"another run is at work there (process {running.pid}); wait"
        assert expected in second.stderr.splitlines()[-1]
    assert running.poll() is None  # and is not disturbed
    running.kill()
    running.communicate()
    train.train(train.Config(**toy | dict(overwrite=True)))  # who was killed holds nothing


def test_a_restart_by_torchrun_goes_on_though_it_was_told_to_overwrite(toy, monkeypatch, capsys):
    """But another torchrun does, though it may have crashed before it could."""
    toy |= dict(overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for finished in (False, True):
        train.train(train.Config(**toy))
        assert ("this run is finished" in capsys.readouterr().out) == finished
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.train(train.Config(**toy))
    assert "this run is finished" not in capsys.readouterr().out


def test_a_worker_does_not_hold_the_folder(tmp_path):
    lock = runs.FolderLock(tmp_path)
    lock.acquire()
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    worker = fork.Process(target=lambda: (begun.set(), time.sleep(60)))
    worker.start()
    begun.wait()
    with pytest.raises(UserError, match="another run is at work there"):
        runs.FolderLock(tmp_path).acquire()
    lock.release()  # as the end of a killed process does
    runs.FolderLock(tmp_path).acquire()
    worker.kill()


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(configurator.fcntl, "flock", no_locks)
    runs.FolderLock(tmp_path).acquire()
    with configurator.scratch_folder(tmp_path / "new") as one:
        with configurator.scratch_folder(tmp_path / "new") as other:  # sweeps nothing
            assert one.is_dir() and other.is_dir() and one != other
    assert not os.listdir(tmp_path)


def test_two_runs_are_bitwise_identical(toy):
    states = []
    for out in ("a", "b"):
        train.train(train.Config(**toy | dict(out_dir=f"{toy['out_dir']}-{out}", dropout=0.2)))
        states.append(state(f"{toy['out_dir']}-{out}"))
    assert_same(*states)


def test_another_config_in_the_same_folder_is_refused_and_harmless(toy):
    train.train(train.Config(**toy))
    before = {f: open(f"{toy['out_dir']}/{f}", "rb").read() for f in os.listdir(toy["out_dir"])}
    with pytest.raises(UserError, match="learning_rate=0.003 there, 0.5 here.*--out_dir"):
        train.train(train.Config(**toy | dict(learning_rate=0.5)))
    assert before == {
        f: open(f"{toy['out_dir']}/{f}", "rb").read() for f in os.listdir(toy["out_dir"])
    }
    train.train(train.Config(**toy | dict(learning_rate=0.01, overwrite=True)))
    assert load_checkpoint(f"{toy['out_dir']}/best.pt")["config"]["learning_rate"] == 0.01
    shutil.rmtree(toy["out_dir"])
