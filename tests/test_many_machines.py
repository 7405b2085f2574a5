"""Processes that die, disagree, or have no common disk; checkpoints in parts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from configurator import UserError

import pytest
import torch
from conftest import ROOT
from test_resume_is_bitwise import wait_for_losses
from test_sharded_training_equals_plain import assert_same, run
from torch.utils._pytree import tree_leaves

import runs
import train
from distributed import Machine
from tests.forks import Script, free_port, script
from weights import load_checkpoint, save_checkpoint


def program(toy, cwd, before):
    """A script that trains, after running the code `before`."""
    path = Path(cwd) / "started.py"
    path.write_text(
        "import os, configurator, runs, train\n"
        "rank = int(os.environ['RANK'])\n"
        "restart = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))\n"
        f"{before}\n"
        f"configurator.run(lambda: train.train(train.Config(**{toy!r})))"
    )
    return str(path)


def in_two(toy, cwd, before):
    """Runs that in two processes. Returns (standard output, standard error, exit status)."""
    with contextlib.chdir(cwd):
        done = script(program(toy, cwd, before), processes=2)
    return done.stdout, done.stderr, done.returncode


def launch(n, toy, cwd, before="", torchrun=("--standalone",)):
    """Starts that in n processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, f"--nproc-per-node={n}"]
    return subprocess.Popen(
        [*command, program(toy, cwd, before)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(running):
    """(standard output, standard error, exit status) of processes that were launched."""
    return *running.communicate(timeout=200), running.returncode


CRASH = (  # of process 1, in step 11, once
    "real, calls = train.compute_gradient, []\n"
    "def compute_gradient(*args):\n"
    "    calls.append(1)\n"
    "    if rank == 1 and restart == 0 and len(calls) == 11: os._exit(7)\n"
    "    return real(*args)\n"
    "train.compute_gradient = compute_gradient"
)


STOP = (  # process 1 alone, once, in the third evaluation
    "import signal\n"
    "real, calls = train.eval_batches, []\n"
    "def eval_batches(*args):\n"
    "    calls.append(1)\n"
    "    for batch in real(*args):\n"
    "        yield batch\n"
    "        if rank == 1 and len(calls) == 3: signal.raise_signal(signal.SIGTERM)\n"
    "train.eval_batches = eval_batches"
)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_told_in_an_evaluation_stops_all(toy, tmp_path, parallel):
    toy |= dict(n_layer=2, eval_interval=2, max_steps=10, dropout=0.1, micro_batch_tokens=64)
    whole = run(toy, 2, "whole", parallel=parallel)
    settings = toy | dict(out_dir=f"{toy['out_dir']}-stopped", parallel=parallel)
    out, err, status = in_two(settings, tmp_path, STOP)
    assert status == 128 + signal.SIGTERM and "is saved at step 6" in out, err[-3000:]
    assert "step 7/" not in out and "Traceback" not in err
    assert_same(run(toy, 2, "stopped", parallel=parallel), whole, 0.0)


def test_a_restart_after_a_crash_goes_on_bit_for_bit(toy, tmp_path, parallel="fsdp"):
    toy |= dict(n_layer=2, epochs=3.0, eval_interval=99, save_interval=4, dropout=0.1)
    whole = run(toy, 2, "whole", parallel=parallel)
    settings = toy | dict(out_dir=f"{toy['out_dir']}-crashed", parallel=parallel)
    restarting = "--standalone", "--max-restarts=3"
    out, err, status = ended(launch(2, settings, tmp_path, CRASH, restarting))
    assert status == 0, err[-3000:]
    assert "continuing at step 4" in out or "continuing at step 8" in out
    last, best = (load_checkpoint(f"{settings['out_dir']}/{n}.pt") for n in ("last", "best"))
    assert_same((whole[0], *whole[1:]), (whole[0], last, best), 0.0)


def test_a_process_that_dies_ends_the_others_with_one_line(toy, tmp_path, parallel="ddp"):
    toy |= dict(n_layer=2, epochs=300.0, eval_interval=9999, parallel=parallel)
    began = time.monotonic()
    _, err, status = ended(launch(2, toy, tmp_path, CRASH))
    assert status != 0 and time.monotonic() - began < 60
    ours = [line for line in err.splitlines() if line.startswith("started.py: error")]
    assert len(ours) <= 1 and "train.py" not in err.partition("Traceback")[0]
    assert all("another process of this run has ended" in line for line in ours)


@pytest.mark.parametrize("what,before", [
    ("--learning_rate", "import dataclasses; real = train.train; train.train = lambda cfg: "
                        "real(dataclasses.replace(cfg, learning_rate=0.5) if rank else cfg)"),
    ("data set", "import data; real = data.open_or_build\n"
                 "def other(cfg):\n"
                 "    folder, meta = real(cfg)\n"
                 "    meta['sha256']['train.bin'] += str(rank)\n"
                 "    return folder, meta\n"
                 "data.open_or_build = other"),
])  # fmt: skip
def test_processes_that_disagree_are_told_so(toy, tmp_path, what, before):
    _, err, status = in_two(toy, tmp_path, before)
    lines = [line for line in err.splitlines() if "error: " in line and "started.py" in line]
    assert status != 0 and len(lines) == 1
    assert f"process 1 has another {what} than process 0" in lines[0]
    assert not (Path(toy["out_dir"]) / "last.pt").exists()


def test_processors_of_two_kinds_do_not_mix_dtypes(toy, tmp_path):
    before = "import distributed; distributed.bf16_is_native = lambda device: rank == 0"
    _, err, status = in_two(toy | dict(dtype="auto"), tmp_path, before)
    lines = [line for line in err.splitlines() if "started.py: error: " in line]
    assert status != 0 and len(lines) == 1
    assert "--dtype=auto is torch.bfloat16 or torch.float32" in lines[0]


def test_what_one_process_alone_knows_of_is_a_disagreement():
    machine = object.__new__(Machine)
    machine.world, machine.rank = 2, 0
    machine.gather = lambda facts: [facts, {"code": "a"}]
    with pytest.raises(UserError, match="process 1 has another --new than process 0"):
        machine.check_agreement(lambda: {"code": "a", "--new": 1})


def test_the_code_and_the_version_of_torch_are_among_what_is_compared():
    facts = runs.facts_of(train.Config())
    assert {"code", "version of torch", "--learning_rate"} <= facts.keys()


def on_two_machines(toy, tmp_path, crash=""):
    """Runs with one process on each of two machines, which are working folders here."""
    end = f"127.0.0.1:{free_port()}"
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={end}"]
    machines = []
    for name in "ab":
        (tmp_path / name).mkdir(exist_ok=True)
        settings = toy | dict(data_dir="data", out_dir="out")
        machines.append(launch(1, settings, tmp_path / name, crash, rendezvous))
    return [ended(machine) for machine in machines]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_machines_without_a_common_disk_train_and_go_on(toy, tmp_path, parallel):
    """Each builds its data; rank 0 alone has the run's folder, and tells the other its state."""
    toy |= dict(n_layer=2, epochs=3.0, eval_interval=99, save_interval=4, ema_decay=0.9)
    toy |= dict(parallel=parallel)
    whole = run(toy, 2, "whole", parallel=parallel)
    assert any(code for _, _, code in on_two_machines(toy, tmp_path, CRASH))
    a, b = tmp_path / "a/out", tmp_path / "b/out"
    home, other = (a, b) if (a / "last.pt").exists() else (b, a)
    home.rename(other)  # as if torchrun had numbered the machines anew
    said = [err for _, err, _ in on_two_machines(toy, tmp_path)]
    assert sum("the machine of process 1 holds a later out" in err for err in said) == 1
    other.rename(home)
    for _, err, code in on_two_machines(toy, tmp_path):
        assert code == 0, err[-3000:]
    folders = [name for name in "ab" if (tmp_path / name / "out/last.pt").exists()]
    assert len(folders) == 1 and (tmp_path / "a/data/toy/meta.json").exists()
    assert (tmp_path / "b/data/toy/meta.json").exists()
    out = tmp_path / folders[0] / "out"
    last, best = (load_checkpoint(out / f"{name}.pt") for name in ("last", "best"))
    assert_same((whole[0], *whole[1:]), (whole[0], last, best), 0.0)


def test_an_older_run_on_another_machine_is_no_matter(toy, tmp_path, monkeypatch):
    machine = Machine(train.Config(device="cpu"))
    saved = {}
    monkeypatch.setattr(runs, "saved_facts", lambda out_dir: saved)
    machine.world = 2
    machine.gather = lambda own: [own, (100, 9)]  # a run that began in second 100, at step 9
    for run_id, step, is_later in (("out-99", 11, True), ("out-100", 8, True),
                                   ("out-100", 9, False), ("out-101", 1, False)):  # fmt: skip
        saved = checkpoint = dict(run_id=run_id, step=step)
        refusal = pytest.raises(UserError, match="the machine of process 1 holds a later")
        with refusal if is_later else contextlib.nullcontext():
            runs.check_nothing_later(train.Config(), machine, checkpoint)
    saved = {}
    with pytest.raises(UserError, match=r"holds a later .* \(step 9\) than that of process 0"):
        runs.check_nothing_later(train.Config(), machine, None)


def test_what_all_processes_say_is_said_once(toy, tmp_path):
    running = launch(2, toy | dict(warmup_steps=1000), tmp_path)
    _, err, status = ended(running)
    assert status != 0 and err.count("started.py: error: --warmup_steps=1000: ") == 1


def test_machines_may_join_and_leave(toy, tmp_path, monkeypatch):
    """One begins, another joins it after step 4, and dies in step 8: the first goes on alone."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see SCALING.md
    toy |= dict(n_layer=2, epochs=3.0, eval_interval=99, save_interval=2, overwrite=True)
    whole = run(toy, 0, "whole", parallel="ddp")
    run(toy | dict(max_steps=3), 0, "older", parallel="ddp")
    os.rename(f"{toy['out_dir']}-older", toy["out_dir"])  # is overwritten once
    starts = tmp_path / "starts"
    change = (
        "import signal, time; from pathlib import Path\n"
        f"starts = Path({str(starts)!r})\n"
        "if rank == 0: starts.open('a').write(os.environ['WORLD_SIZE'])\n"
        "remember, told = runs.StopSignal.remember, []\n"
        "def note(self, *args):\n"
        "    told.append(1)\n"
        "    remember(self, *args)\n"
        "runs.StopSignal.remember = note\n"
        "real, calls = train.compute_gradient, []\n"
        "def compute_gradient(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4 and starts.read_text() == '1':\n"
        "        while not told: time.sleep(0.05)\n"
        "    if len(calls) == 4 and os.getcwd().endswith('b'):\n"
        "        os.kill(os.getppid(), signal.SIGKILL); os._exit(1)\n"
        "    return real(*args)\n"
        "train.compute_gradient = compute_gradient"
    )
    rendezvous = ["--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d",
                  f"--rdzv-endpoint=localhost:{free_port()}",
                  "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1"]  # fmt: skip
    machines = []
    for name in "ab":
        (tmp_path / name).mkdir()
        machines.append(launch(1, toy, tmp_path / name, change, rendezvous))
        while not starts.exists():
            time.sleep(0.1)
    out, err, status = ended(machines[0])
    ended(machines[1])
    assert status == 0, err[-3000:]
    assert starts.read_text() == "121"
    assert "continuing at step 4" in out and "continuing at step 6" in out
    last, best = (load_checkpoint(f"{toy['out_dir']}/{name}.pt") for name in ("last", "best"))
    assert_same((whole[0], *whole[1:]), (whole[0], last, best), 3e-4)


def test_sharded_weights_are_gathered_as_they_are_computed(toy, tmp_path):
    """Half as many bytes in bfloat16; test_sharded_training_equals_plain.py compares the losses."""
    toy |= dict(n_layer=2, max_steps=2, parallel="fsdp", dtype="bfloat16")
    look = (
        "real = train.shard\n"
        "def shard(model, machine):\n"
        "    real(model, machine)\n"
        "    look = lambda block, _: print('gathered', block.mlp.up.weight.dtype, flush=True)\n"
        "    model.blocks[1].register_forward_pre_hook(look)\n"
        "train.shard = shard"
    )
    out, err, status = in_two(toy, tmp_path, look)
    assert status == 0, err[-3000:]
    assert "gathered torch.bfloat16" in out and "gathered torch.float32" not in out
    saved = load_checkpoint(f"{toy['out_dir']}/last.pt")["model"]
    assert {w.dtype for w in saved.values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# Checkpoints in parts


def test_parts_stay_small_and_only_the_last_are_kept(toy):
    toy |= dict(n_layer=2, epochs=2.0, save_interval=3, parallel="fsdp", d_model=64)
    _, last, best = run(toy, 2, "parts", best_by="last")
    out = Path(f"{toy['out_dir']}-parts")
    (folder,) = [f for f in out.iterdir() if f.is_dir() and f.name.startswith("last-")]
    assert folder.name == f"last-{last['step']}"
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)  # half by each process
    assert (out / "last.pt").stat().st_size < (out / "best.pt").stat().st_size
    assert all(torch.equal(last["model"][name], w) for name, w in best["model"].items())


def test_a_step_is_saved_once(toy, tmp_path):
    """Else the folder that last.pt names would be written anew, and a kill could tear it."""
    toy |= dict(n_layer=2, epochs=2.0, eval_interval=4, save_interval=4, parallel="fsdp")
    note = (
        "import torch.distributed.checkpoint as dcp; real = dcp.HuggingFaceStorageWriter\n"
        "def writer(path, **more):\n"
        "    if rank == 0: print('wrote', path.rpartition('/')[2], flush=True)\n"
        "    return real(path, **more)\n"
        "dcp.HuggingFaceStorageWriter = writer"
    )
    out, err, _ = in_two(toy, tmp_path, note)
    wrote = [line for line in out.splitlines() if line.startswith("wrote")]
    assert wrote == ["wrote last-4", "wrote last-8", "wrote last-12"], err[-2000:]


def test_what_is_saved_is_the_step_and_not_what_follows(toy, tmp_path):
    """Training goes on while the parts are written: a slow disk changes nothing."""
    toy |= dict(
        n_layer=2, epochs=2.0, eval_interval=99, parallel="fsdp", out_dir=str(tmp_path / "o")
    )
    slow = (
        "import time, torch.distributed.checkpoint.filesystem as f\n"
        "write = f.FileSystemWriter._write_data\n"
        "def late(*args):\n"
        "    time.sleep(1.5)\n"
        "    return write(*args)\n"
        "f.FileSystemWriter._write_data = late\n"
        "wait, steps = runs.ShardedSaver.wait, []\n"
        "real = train.compute_gradient\n"
        "def compute(*args):\n"
        "    steps.append(1)\n"
        "    return real(*args)\n"
        "train.compute_gradient = compute\n"
        "save = runs.ShardedSaver.save\n"
        "def once(self, checkpoint):\n"
        "    if checkpoint['step'] == 4: save(self, checkpoint)\n"
        "runs.ShardedSaver.save = once\n"
        "poll = runs.ShardedSaver.poll\n"
        "def note(self):\n"
        "    before = self.future\n"
        "    poll(self)\n"
        "    if before and not self.future: print('written after', len(steps), flush=True)\n"
        "runs.ShardedSaver.poll = note"
    )  # fmt: skip
    out, err, status = in_two(toy | dict(save_interval=4), tmp_path, slow)
    assert status == 0, err[-3000:]
    found = load_checkpoint(f"{toy['out_dir']}/last.pt")
    assert found["step"] == 4
    assert int(out.partition("written after ")[2].split()[0]) > 4  # steps went on meanwhile
    whole = toy | dict(out_dir=f"{toy['out_dir']}-stopped", save_interval=4)
    stop = (
        "save = runs.ShardedSaver.save\n"
        "def once(self, checkpoint):\n"
        "    save(self, checkpoint); self.wait()\n"
        "    if checkpoint['step'] == 4: os._exit(0)\n"
        "runs.ShardedSaver.save = once"
    )
    in_two(whole, tmp_path, stop)
    then = load_checkpoint(f"{whole['out_dir']}/last.pt")
    assert then["step"] == 4
    for key in ("model", "optimizers"):
        for x, y in zip(tree_leaves(found[key]), tree_leaves(then[key]), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_parts_on_one_machine_are_sent_to_the_others(toy, tmp_path):
    toy |= dict(n_layer=2, epochs=3.0, eval_interval=99, save_interval=4, parallel="fsdp")
    toy |= dict(data_dir="data", out_dir="out")
    stop = "real = train.compute_gradient\nimport signal\n" + CRASH.partition("\n")[2].replace(
        "os._exit(7)", "os.kill(os.getpid(), signal.SIGTERM)"
    )
    out, err, status = in_two(toy, tmp_path, "calls = []\n" + stop)
    assert (tmp_path / "out/last-11").is_dir(), out + err
    away = "if rank == 1: os.makedirs('away'); os.chdir('away')"
    out, err, status = in_two(toy, tmp_path, away)
    assert status == 0 and "continuing at step 11" in out, err[-3000:]
    assert (tmp_path / "away/data").is_dir() and not (tmp_path / "away/out").exists()


def test_an_older_run_elsewhere_makes_no_common_disk(toy, tmp_path):
    toy |= dict(n_layer=2, max_steps=4, parallel="fsdp", data_dir="data", out_dir="out")
    (tmp_path / "away/out").mkdir(parents=True)
    (tmp_path / "away/out/config.json").write_text("{}")
    _, err, status = in_two(toy, tmp_path, "if rank == 1: os.chdir('away')")
    assert status == 0, err[-3000:]
    assert load_checkpoint(tmp_path / "out/last.pt")["step"] == 4
    assert os.listdir(tmp_path / "away/out") == ["config.json"]


@pytest.mark.parametrize("parallel, what", [("fsdp", "last-8"), ("ddp", "last.pt")])
def test_a_full_disk_during_a_save_leaves_the_last_checkpoint(toy, tmp_path, parallel, what):
    toy |= dict(n_layer=2, epochs=2.0, eval_interval=999, save_interval=4, parallel=parallel)
    full = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = runs.Checkpoints.save_last\n"
        "def fill(self, progress):\n"
        "    if progress.step == 8:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    save(self, progress)\n"
        "runs.Checkpoints.save_last = fill"
    )
    _, err, status = in_two(toy, tmp_path, full)
    assert status != 0 and 'started.py", line' not in err, err[-3000:]  # no traceback of ours
    lines = [line for line in err.splitlines() if line.startswith("started.py: error")]
    (said,) = {line for line in lines if "cannot be written" in line}
    assert what in said and "File too large" in said, err[-3000:]
    assert load_checkpoint(f"{toy['out_dir']}/last.pt")["step"] == 4
    done = script("train.py", processes=2, **toy)
    assert done.returncode == 0 and "continuing at step 4" in done.stdout
    assert not (Path(toy["out_dir"]) / "last-8").exists()


def test_a_kill_while_parts_are_written_leaves_the_last_checkpoint(toy):
    toy |= dict(n_layer=2, epochs=300.0, eval_interval=9999, save_interval=1, parallel="fsdp")
    for n_losses in (3, 9):
        running = Script("train.py", processes=2, **toy)
        wait_for_losses(toy, n_losses, running.is_running)
        running.send_signal(signal.SIGKILL)
        running.ended()
        assert load_checkpoint(f"{toy['out_dir']}/last.pt")["step"] >= 1


def test_damaged_parts_are_refused_by_name(toy):
    toy |= dict(n_layer=2, epochs=2.0, parallel="fsdp")
    run(toy, 2, "parts")
    out = Path(f"{toy['out_dir']}-parts")
    part = sorted(out.glob("last-*/*.safetensors"))[0]
    content = part.read_bytes()
    part.write_bytes(content[:-8])
    with pytest.raises(UserError, match=f"{part.name} is missing or truncated.*--overwrite=True"):
        load_checkpoint(out / "last.pt")
    part.write_bytes(b"\xff" * len(content))
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(out / "last.pt")
    part.unlink()
    with pytest.raises(UserError, match="missing or truncated"):
        load_checkpoint(out / "last.pt")
    assert load_checkpoint(out / "best.pt")


def test_another_data_set_under_a_run_is_refused(toy):
    train.train(train.Config(**toy | dict(max_steps=3)))
    path = f"{toy['data_dir']}/toy/meta.json"
    meta = json.load(open(path))
    del meta["checksum"]
    meta["sha256"]["other"] = "0"
    json.dump(meta, open(path, "w"))
    last = load_checkpoint(f"{toy['out_dir']}/last.pt")
    last["finished"] = False
    save_checkpoint(Path(toy["out_dir"]) / "last.pt", last)
    with pytest.raises(UserError, match="holds a run on another data set than"):
        train.train(train.Config(**toy | dict(max_steps=3)))
