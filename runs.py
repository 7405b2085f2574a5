"""What a run leaves behind: its folder (who may write there, what is continued), checkpoints,
metrics.jsonl, W&B; and signals."""
import contextlib
import hashlib
import json
import netrc
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from urllib.parse import urlparse

from configurator import (
    UserError,
    cannot_write,
    file_sha256,
    read_json,
    try_lock,
    write_json,
    write_text,
)

import torch

from sharding import (
    ShardedSaver,
    is_finite,
    parameters_of_states,
    read_parts,
    remove_parts,
    shard_like,
    shard_state,
    whole,
)
from speed import peak_flops
from weights import CHECKPOINT_FORMAT, load_checkpoint, save_checkpoint

# settings that may differ between a run and its continuation
FREE = {"overwrite", "save_interval", "lr_find", "folds", "wandb_mode", "wandb_project",
        "wandb_run_name", "log_interval", "data_dir", "out_dir", "max_row_mb", "parallel",
        "profile", "cuda_graphs"}
# `wandb login` keeps a key for the first of these, since wandb 0.31 for the second
WANDB_HOSTS = "api.wandb.ai", "api.forge.coreweave.com"
WANDB_SECONDS = 30.0  # it has to answer in this time; there may be no network


# --------------------------------------------------------------------------------------------------
# The folder


def open_run(cfg, parts=True):
    """Check out_dir. Returns the checkpoint to resume from (parts: see load_checkpoint), or None to
    begin; writes nothing."""
    out = Path(cfg.out_dir)
    if not (out / "config.json").exists():
        for name in ("best.pt", "last.pt"):
            if (out / name).exists():
                raise UserError(f"{out} holds a {name} without its config.json, so not a run that "
                                "could be continued; choose another --out_dir=…, or replace it "
                                "with --overwrite=True")
        return None
    try:
        saved = read_json(out / "config.json")
    except ValueError:
        raise UserError(f"{out}/config.json is damaged; start anew with --overwrite=True") from None
    saved = asdict(type(cfg)()) | saved  # a setting that is newer than the run
    for key, value in json.loads(json.dumps(asdict(cfg))).items():
        if key not in FREE and value != saved[key] and not has_moved(key, value, saved[key]):
            raise UserError(f"{out} holds a run with other settings ({key}={saved[key]!r} there, "
                            f"{value!r} here); choose another --out_dir=…, or replace it with "
                            "--overwrite=True")
    return load_checkpoint(out / "last.pt", parts=parts) if (out / "last.pt").exists() else None


def has_moved(key, *places):
    """Is it a tokenizer's file in two places? What is in it, the data set's hash says."""
    names = {Path(str(place)).name for place in places}
    return key == "tokenizer" and len(names) == 1 and names.pop().endswith(".json")


def open_checkpoint(cfg, machine):
    """What open_run returns on rank 0, on all processes. With --parallel=fsdp and a common disk,
    tensors that lie in parts are not read: `restore` reads each process's share."""
    checkpoint = machine.on_rank0(lambda: open_run(cfg, parts=not machine.sharded))
    if checkpoint and "shards" in checkpoint and not machine.sees(cfg.out_dir):
        return machine.on_rank0(lambda: open_run(cfg))
    return checkpoint


def begins_anew(cfg, machine):
    """Is an earlier run in out_dir to be ignored? With --lr_find, and with --overwrite unless this
    same torchrun began it: it starts its processes again after a crash, and when machines join or
    leave."""
    if cfg.lr_find or not cfg.overwrite:
        return cfg.lr_find
    before = saved_facts(cfg.out_dir).get("launchers", [])
    goes_on = any(name and name in before for name in machine.launchers)
    return not any(machine.gather(goes_on))


def check_nothing_later(cfg, machine, checkpoint):
    """Raise UserError where the out_dir of another machine holds a later last.pt than that of rank
    0, which is continued: torchrun may number the machines anew when it restarts. A last.pt of an
    older run than the one that is continued is ignored."""
    if machine.world == 1:
        return
    here = saved_facts(cfg.out_dir)
    found = machine.gather((began_at(here.get("run_id", "")), here.get("step", 0)))
    latest, own = max(found), (0, 0)
    if checkpoint:
        own = began_at(checkpoint["run_id"]), checkpoint["step"]
    if latest > own:
        machine.refuse(f"the machine of process {found.index(latest)} holds a later {cfg.out_dir} "
                       f"(step {latest[1]}) than that of process 0 (step {own[1]}): copy it there, "
                       "or begin anew with --overwrite=True")


def saved_facts(out_dir):
    """What a run's last.pt holds, without the values of its tensors; {} where there is none, or
    none that can be read."""
    try:
        found = torch.load(Path(out_dir) / "last.pt", "meta", mmap=True, weights_only=True)
    except Exception:  # damaged bytes can make the unpickler raise anything
        return {}
    return found if isinstance(found, dict) else {}


def facts_of(cfg):
    """What all processes of a run have to have in common."""
    code = {file.name: file_sha256(file) for file in sorted(Path(__file__).parent.glob("*.py"))}
    settings = asdict(cfg)
    for name in ("data_dir", "out_dir", "train_file", "val_file", "test_file", "tokenizer"):
        del settings[name]  # each machine may have its own; what is built is compared, too
    versions = {"version of torch": torch.__version__, "code": hash_of(code)}
    return versions | {f"--{name}": value for name, value in settings.items()}


def hash_of(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def begin_run(cfg, checkpoint, lock):
    """Make out_dir ready: without a former run's files, or cut back to the checkpoint's step."""
    out = Path(cfg.out_dir)
    metrics = out / "metrics.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if cfg.lr_find:
            return
        lock.acquire()
        remove(out, ".config.tmp.json", ".last.tmp.pt", ".best.tmp.pt", ".metrics.tmp.jsonl",
               ".seen-*")  # left by a run that was killed
        if checkpoint is None:
            remove_parts(out)
            if (out / "config.json").exists():  # else such files are not a former run's
                remove(out, "trace.json", "eval-*.json", "report.html", "report-*.html")
            remove(out, "config.json", "last.pt", "best.pt", "metrics.jsonl", "eval.json")
            write_json(out / "config.json", asdict(cfg))
            metrics.touch()
            return
        kept = [r for r in read_records(out) if r["step"] <= checkpoint["step"]]
        write_text(metrics, "".join(json.dumps(record) + "\n" for record in kept))
    except OSError as error:
        raise cannot_write(f"--out_dir={out}", error) from error


def remove(folder, *patterns):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


class FolderLock:
    """Holds a folder against other processes, from `acquire` to `release` or the process's end."""

    def __init__(self, folder):
        self.folder, self.descriptor = folder, None

    def acquire(self):
        """Does nothing where it is held, or where there is no such folder. Raises UserError."""
        if self.descriptor is not None or not os.path.isdir(self.folder):
            return
        try:
            self.descriptor = try_lock(self.folder)
        except OSError as error:
            if error.filename:  # the folder may not be read
                raise
            return  # a disk without locks
        if self.descriptor is None:
            raise UserError(f"{self.folder}: another run is at work there{self.holder()}; wait for "
                            "its end, or choose another --out_dir=…")
        os.register_at_fork(after_in_child=self.release)  # else a worker that outlives us holds it

    def holder(self):
        """The process that holds it, in words, where the system says so."""
        locks = Path("/proc/locks")
        if not locks.exists():
            return ""
        inode = f":{os.stat(self.folder).st_ino}"
        for line in locks.read_text().splitlines():
            if " FLOCK " in line and line.split()[5].endswith(inode):
                return f" (process {line.split()[4]})"
        return ""

    def release(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class StopSignal:
    """Remembers SIGTERM and SIGINT (Ctrl-C), so that a run can save and stop after its step. A
    second signal stops it at once, but not within two seconds: Slurm tells torchrun and all its
    processes, and torchrun tells these again. That torchrun is gone counts as SIGTERM."""

    def __init__(self):
        self.number, self.since, self.handlers = 0, 0.0, {}
        self.parent = os.getppid()

    def listen(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self.remember)

    def is_set(self):
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            self.number = self.number or signal.SIGTERM
        return self.number > 0

    def is_set_on_any(self, machine):
        """Has any process been told? All have to call it."""
        (told,) = machine.sum([self.is_set()])
        return told > 0

    def remember(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 2:
            self.restore()
            signal.raise_signal(number)

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Progress:
    """Where a run stands."""
    run_id: str  # in W&B
    step: int = 0  # how many are done
    epoch: float = 0.0
    evaluated: int = 0  # the step of the last evaluation
    best: dict | None = None  # the figures of best.pt
    bad_evals: int = 0  # evaluations since, none of them better
    elapsed: float = 0.0  # seconds of training
    finished: bool = False


def restore(checkpoint, out_dir, machine, model, optimizers, ema):
    """Load what last.pt holds besides the model's weights, and these, too, where they lie in parts.
    Returns the Progress."""
    if len(optimizers) != len(checkpoint["optimizers"]):
        machine.refuse(f"{out_dir}: begun with another --parallel or on another device, where a "
                       "large embedding has an optimizer of its own: go on as it began, or begin "
                       "anew with --overwrite=True")
    if "shards" in checkpoint:
        states = [parameters_of_states(*pair)
                  for pair in zip(optimizers, checkpoint["optimizers"])]
        checkpoint = read_parts(checkpoint, out_dir, {
            "model": model.state_dict(), "ema": ema.weights, "optimizers": states})
        model.load_state_dict(checkpoint["model"])
        if not all(is_finite(p) for p in model.parameters()):  # of a whole one it was asked before
            machine.refuse(f"{out_dir}/last.pt holds weights that are not finite: restore it, or "
                           "begin anew with --overwrite=True")
    for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(shard_state(optimizer, state))
    ema.values = [shard_like(value.to(machine.device), p)
                      for value, p in zip(checkpoint["ema"], ema.weights)]
    older = {"evaluated": checkpoint["step"]}  # before there was this field
    return Progress(**{f.name: (older | checkpoint)[f.name] for f in fields(Progress)})


def checkpoint_facts(cfg, micro_batch_tokens, model, run_data, machine):
    """What checkpoints hold besides tensors and progress. cfg: as it was given;
    micro_batch_tokens: as they were chosen."""
    meta = run_data.meta
    return {
        "format": CHECKPOINT_FORMAT, "config": asdict(cfg),
        "model_config": asdict(model.config), "tokenizer": run_data.tokenizer,
        "label_names": meta["label_names"], "n_suffix": meta.get("n_suffix"),
        "max_len": run_data.max_len, "kind": meta["kind"], "scaling": meta["scaling"],
        "data_sha256": meta["sha256"], "mix_sha256": run_data.mix_sha256,
        "data_folder": run_data.folder.name, "micro_batch_tokens": micro_batch_tokens,
        "dtype": str(machine.dtype), "launchers": machine.launchers}


class Checkpoints:
    """Writes a run's best.pt, and last.pt, which it can be continued from. All processes have to
    call each method.

    facts: see checkpoint_facts. state_for_best(model) → the state dict that best.pt gets.
    """

    def __init__(self, out_dir, machine, facts, model, optimizers, ema, state_for_best):
        self.out, self.machine, self.facts = Path(out_dir), machine, facts
        self.model, self.optimizers, self.ema = model, optimizers, ema
        self.state_for_best = state_for_best
        self.in_parts = None
        if machine.sharded and machine.sees(self.out):
            self.in_parts = ShardedSaver(self.out, machine, lambda found: self.write("last", found))

    def save_best(self, progress):
        stands = {name: getattr(progress, name) for name in ("step", "epoch", "best")}
        model = self.state_for_best(self.model)
        self.gather_and_write("best", self.facts | stands | {"model": model})

    def save_last(self, progress):
        checkpoint = self.facts | asdict(progress) | {
            "model": self.model.state_dict(), "ema": self.ema.values,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        if self.in_parts:
            self.in_parts.save(checkpoint)
        else:
            self.gather_and_write("last", checkpoint)

    def gather_and_write(self, name, checkpoint):
        checkpoint = whole(checkpoint, self.machine)
        if self.machine.rank == 0:
            self.write(name, checkpoint)
            if name == "last":
                remove_parts(self.out)  # of the run's time with --parallel=fsdp

    def write(self, name, checkpoint):
        save_checkpoint(self.out / f"{name}.pt", checkpoint)

    def poll(self):
        """Finish what was begun to write in parts, if it is written by now."""
        if self.in_parts:
            self.in_parts.poll()

    def wait(self):
        """Until all is written."""
        if self.in_parts:
            self.in_parts.wait()


# --------------------------------------------------------------------------------------------------
# What is logged


def read_records(folder):
    """The records of a run's metrics.jsonl, if there is one. A last line that a kill cut short is
    passed over; a damaged one before it is, too, and said."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    records, n_damaged = [], 0
    for line in lines[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            n_damaged += 1
    if n_damaged:
        print(f"{path}: {n_damaged} of its lines are damaged and left out", file=sys.stderr)
    return records


class Log:
    """Writes metrics.jsonl and W&B, and prints a line. Its clock does not run while `paused`.

    flops_per_second(rate) → what a rate of tokens takes; unit: what these are.
    """

    def __init__(self, cfg, machine, progress, total_steps, flops_per_second, unit, wandb_run):
        self.cfg, self.machine, self.progress, self.wandb_run = cfg, machine, progress, wandb_run
        self.total_steps, self.unit, self.flops_per_second = total_steps, unit, flops_per_second
        self.peak = None
        if machine.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name())
        self.step = progress.step  # of the last line
        self.n_tokens = 0  # since
        self.elapsed = progress.elapsed  # until then
        self.clock = time.monotonic()

    def write(self, record):
        if self.machine.rank == 0:
            path = Path(self.cfg.out_dir) / "metrics.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise cannot_write(path, error) from error
        if self.wandb_run:
            self.wandb_run.log(record, step=record["step"])

    def line(self, loss, lr, grad_norm):
        """Log the last step's figures, and the speed since the last call."""
        now = time.monotonic()
        seconds = max(now - self.clock, 1e-9)
        self.elapsed += seconds
        self.progress.elapsed = self.elapsed
        step, epoch = self.progress.step, self.progress.epoch
        n_steps = step - self.step
        rate = self.n_tokens / seconds
        record = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": grad_norm,
                  "tokens_per_s": rate, "examples_per_s": n_steps * self.cfg.batch_size / seconds,
                  "elapsed_s": self.progress.elapsed}
        mfu = ""
        if self.peak:
            record["mfu"] = self.flops_per_second(rate) / self.peak / self.machine.world
            mfu = f"  MFU {record['mfu']:.0%}"
        self.write(record)
        minutes, rest = divmod(round((self.total_steps - step) * seconds / n_steps), 60)
        self.machine.print(
            f"step {step}/{self.total_steps}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  "
            f"grad {grad_norm:.2f}  {rate:,.0f} {self.unit}/s{mfu}  ETA {minutes}:{rest:02}")
        self.step, self.n_tokens, self.clock = step, 0, now

    def read_clock(self):
        """For what is saved now."""
        self.progress.elapsed = self.elapsed + time.monotonic() - self.clock

    @contextlib.contextmanager
    def paused(self):
        stopped = time.monotonic()
        yield
        self.clock += time.monotonic() - stopped


def new_run_id(out_dir):
    """For W&B, which takes no other characters; it ends in the second in which the run began."""
    name = re.sub(r"[^\w.-]", "-", Path(out_dir).name)
    return f"{name}-{int(time.time())}"


def began_at(run_id):
    """The second in which a run began; 0 of none."""
    second = run_id.rpartition("-")[2]
    return int(second) if second.isdigit() else 0


def start_wandb(settings, run_id):
    """The W&B run of a training run's settings, a dict; None if disabled. Online if the user is
    logged in, else offline; never a prompt."""
    mode = settings["wandb_mode"]
    is_auto = mode == "auto" and not os.environ.get("WANDB_MODE")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_login() else "offline")
        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return None
    if mode == "disabled":
        return None
    import wandb

    def begin(mode):
        return wandb.init(
            project=settings["wandb_project"], id=run_id, mode=mode, dir=settings["out_dir"],
            name=settings["wandb_run_name"] or Path(settings["out_dir"]).name,
            resume="allow" if mode == "online" else None, config=settings,
            settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_SECONDS))
    try:
        return begin(mode)
    except (wandb.Error, ValueError) as error:
        reason = str(error).splitlines()[0]
        if mode != "online" or not is_auto:
            raise UserError(f"--wandb_mode={mode}: {reason}; log in with wandb login, or take "
                            "--wandb_mode=offline") from None
    print(f"W&B does not answer ({reason})", flush=True)
    wandb.teardown()  # else the run's id is in use
    return begin("offline")


def has_wandb_login():
    """Is there a key, without asking the network (as wandb.login does)?"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts = WANDB_HOSTS
    if own := os.environ.get("WANDB_BASE_URL"):
        hosts = urlparse(own).netloc, urlparse(own).hostname
    try:
        found = netrc.netrc(os.environ.get("NETRC"))
        return any(login[2] for login in map(found.authenticators, hosts) if login)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def finish_wandb(wandb_run, failed=False):
    """End a W&B run, if there is one and it has not ended; where it was kept offline, say how to
    upload all of it: a run that was resumed has a folder for each part."""
    if wandb_run is None or wandb_run is not sys.modules["wandb"].run:
        return
    folder = Path(wandb_run.settings.sync_dir)
    offline = wandb_run.offline
    wandb_run.finish(exit_code=int(failed))
    if offline:
        parts = sorted(folder.parent.glob(f"offline-run-*-{wandb_run.id}"))
        folders = " ".join(shlex.quote(os.path.relpath(part)) for part in parts)
        print(f"W&B run kept offline; upload it with: wandb sync {folders}", flush=True)
