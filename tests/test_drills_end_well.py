"""Kills, torn bytes, hostile files, full disks: a sample of what `bench.py drills` tries."""

import itertools
import os
import resource
import signal

import pytest
import torch

import data
import drills
import eval as eval_script
import predict
import train
from export import export
from predict import Classifier


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no other threads
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", ["plain", "two ranks", "LoRA"])
def test_killed_runs_end_as_others_do(variant, tmp_path, monkeypatch):
    whole = drills.kill_variants
    monkeypatch.setattr(drills, "kill_variants", lambda folder: {variant: whole(folder)[variant]})
    ((_, tried, clean, lost, wrong),) = drills.kills(2)
    assert (lost, wrong) == (0, 0) and clean == tried >= 2


def test_torn_bytes_are_refused_or_do_no_harm():
    ((_, tried, clean, lost, wrong),) = drills.torn(40)
    assert (tried, clean, lost, wrong) == (40, 40, 0, 0)


@pytest.mark.parametrize(
    "trials, sample",
    [
        (drills.hostile_data_sets, 23),
        (drills.hostile_checkpoints, 23),
        (drills.hostile_hf_folders, 31),
        (drills.hostile_sources, 3),
    ],
)
def test_hostile_files_are_refused_in_one_line(trials, sample, tmp_path):
    for what, work in itertools.islice(trials(tmp_path), 0, None, sample):
        status = drills.finish(drills.start(work, memory=2**30, seconds=60))
        assert status in (0, 2), (what, (tmp_path / "messages").read_text()[-2000:])


@pytest.mark.parametrize("what", ["build", "train", "evaluate", "hf", "pt2", "predict"])
def test_a_full_disk_is_named_and_nothing_half_written_stays(what, tmp_path):
    cfg = drills.a_run(tmp_path, target="class")
    files = sorted(tmp_path.rglob("*"))
    predicting = predict.Config(
        [cfg.out_dir], input=cfg.train_file, output=str(tmp_path / "labels.csv")
    )
    work, place = {
        "build": (lambda: data.build(train.Config(**vars(cfg) | {"dataset": "b"})), "data/b"),
        "train": (lambda: train.train(train.Config(**vars(cfg) | {"out_dir": "o"})), "o/last.pt"),
        "evaluate": (
            lambda: eval_script.report_checkpoint(cfg.out_dir, eval_script.Config()),
            "out/eval.json",
        ),
        "hf": (lambda: export(Classifier(cfg.out_dir), "hf"), "out/hf"),
        "pt2": (lambda: export(Classifier(cfg.out_dir), "pt2"), "out/model.pt2"),
        "predict": (lambda: predict.label_file(Classifier(cfg.out_dir), predicting), "labels.csv"),
    }[what]

    def on_a_full_disk():
        limit = {"predict": 500, "build": 2000, "evaluate": 500}.get(what, 9000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        work()

    os.remove(tmp_path / "messages")
    assert drills.finish(drills.start(on_a_full_disk)) == 2
    message = (tmp_path / "messages").read_text().splitlines()[-1]
    assert place in message and "cannot be written" in message and "make room" in message
    left = {str(f.relative_to(tmp_path)) for f in set(tmp_path.rglob("*")) - set(files)}
    assert left <= {"o", "o/config.json", "o/metrics.jsonl", "messages"}  # a run that can go on


def test_ranks_end_when_torchrun_is_gone(tmp_path):
    """A launcher that is killed leaves ranks that stop at their next step, saved."""
    drills.write_texts(tmp_path / "texts.csv")
    cfg = train.Config(**drills.settings(tmp_path, max_steps=100_000, out_dir=str(tmp_path / "o")))

    def launcher():
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
        drills.start(lambda: train.train(cfg))
        signal.pause()

    pid = drills.start(launcher)
    while not (tmp_path / "o" / "last.pt").exists():
        pass
    os.kill(pid, signal.SIGKILL)
    drills.finish(pid)
    from runs import FolderLock

    lock = FolderLock(cfg.out_dir)
    for _ in range(600):
        try:
            return lock.acquire()  # the run has let go of it
        except train.UserError:
            signal.sigtimedwait([], 0.1)
    raise AssertionError("the rank still runs")


def test_processes_do_not_sweep_away_what_others_are_writing(tmp_path):
    """As the ranks of torchrun, which all come by at once."""
    from configurator import scratch_folder

    def work():
        for i in range(200):
            with scratch_folder(tmp_path / "x") as folder:
                (folder / "file").write_text(str(i))

    pids = [drills.start(work) for _ in range(4)]
    assert [drills.finish(pid) for pid in pids] == [0, 0, 0, 0]
    assert [f for f in os.listdir(tmp_path) if f.startswith(".x")] == []
