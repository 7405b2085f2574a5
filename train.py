"""Training: `torchrun train.py config/textcls.py`, or `python train.py …`.

On 8 GPUs: `torchrun --nproc_per_node=8 train.py …`. The same command again continues an interrupted
run. It ends in the same weights, bit for bit, as one that was not interrupted (on CUDA with
--deterministic=True), because what happens in step i is a function of (seed, i) alone: the batch,
its masks, and the random generators, which are seeded anew at each step.
"""
import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from shlex import quote

from configurator import UserError, configure, run

import torch

import memory
import optim
from baselines import build_model
from batches import GlobalBatches, eval_requests
from distributed import Machine, average_gradients, gradient_sync
from examples import ceil_div
from graphs import Graphs, are_worth_it
from model import ModelConfig
from run_data import open_task
from runs import (
    Checkpoints,
    FolderLock,
    Log,
    Progress,
    StopSignal,
    begin_run,
    begins_anew,
    check_nothing_later,
    checkpoint_facts,
    facts_of,
    finish_wandb,
    new_run_id,
    open_checkpoint,
    open_run,
    restore,
    start_wandb,
)
from settings import Config, check_settings, without_effect
from sharding import is_finite, shard
from sources import resolve
from speed import Profile, flops_per_token, is_worth_compiling
from tasks import autocast, describe, eval_tokens, run_model, task_class
from trials import RANGE_TEST_STEPS, cross_validate, find_learning_rate
from weights import load_weights

# --------------------------------------------------------------------------------------------------
# One step, one evaluation


class ModelWithLoss(torch.nn.Module):
    """A model and its task's loss as one module, for torch.compile and DDP."""

    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs, targets):
        return self.task.batch_loss(self.model, inputs, targets)


def add_gradient(model_with_loss, machine, weight_sum, targets, *inputs):
    """Add the gradient of a micro-batch's loss, divided by weight_sum; returns that loss."""
    with autocast(machine.device, machine.dtype):
        loss = model_with_loss(inputs, targets) / weight_sum
    (loss * machine.world).backward()  # gradients are averaged over processes; we want the sum
    return loss.detach()


def compute_gradient(model_with_loss, micro_batches, task, machine, add=None):
    """Accumulate the gradient of a global batch's mean loss over this process's micro-batches.

    Returns (this process's share of that loss, the number of tokens over all processes).
    add(weight_sum, targets, *inputs) adds a micro-batch's gradient; None: as add_gradient does."""
    add = add or functools.partial(add_gradient, model_with_loss, machine)
    counts = [sum(task.weight_sum(batch) for batch in micro_batches),
              sum(batch.n_tokens for batch in micro_batches)]
    weight_sum, n_tokens = machine.sum(counts)
    total = 0.0
    for i, batch in enumerate(micro_batches):
        batch = batch.to(machine.device)
        with gradient_sync(model_with_loss, on=i == len(micro_batches) - 1):
            total += add(weight_sum, batch.targets, *batch.inputs)
    return total, n_tokens


def figures_on_val(model, task, run_data, cfg, machine, stop):
    """What the model is worth now, a dict; empty where there is no val, None where a signal came
    meanwhile. A head that is fitted, not learnt, is fitted first."""
    if run_data.head_set:
        found = vectors_of(model, run_data.head_set, cfg, machine, stop)
        if found is None:
            return None
        task.fit_head(model, *found)
    if not run_data.val_set:
        return {}
    mirror = cfg.flip and run_data.meta["kind"] == "image"
    return evaluate(model, task, run_data.val_set, cfg, machine, stop, mirror)


def evaluate(model, task, examples, cfg, machine, stop, mirror=False):
    """The task's figures over all of a split, on all processes; None where a signal came meanwhile.
    Touches no generator. mirror: see tasks.run_model."""
    totals = []
    model.eval()
    for batch in eval_batches(examples, cfg, machine, stop):
        logits = run_model(model, batch, machine.device, machine.dtype, mirror)
        if batch.n_targets:
            totals.append(task.totals(logits, batch.targets))
    model.train()
    if stop.is_set_on_any(machine):
        return None
    sums = [sum(column) for column in zip([0.0] * task.n_totals, *totals)]
    return task.figures(machine.sum(sums), examples)


def vectors_of(model, examples, cfg, machine, stop):
    """(the vectors of all examples (N, D), float32, their labels (N,)), the longest first; None
    where a signal came meanwhile."""
    vectors, labels = [], []
    model.eval()
    for batch in eval_batches(examples, cfg, machine, stop):
        vectors.append(run_model(model.vectors, batch, machine.device, machine.dtype))
        labels.append(batch.targets)
    model.train()
    if stop.is_set_on_any(machine):
        return None
    return torch.cat(vectors), torch.cat(labels)


def eval_batches(examples, cfg, machine, stop):
    """This process's share of all examples, each once, as Batches, until a signal comes."""
    limit = min(cfg.micro_batch_tokens, eval_tokens(machine.device, examples.max_len))
    requests = eval_requests(examples.lengths, limit, machine.rank, machine.world)
    for request in machine.evened(requests, lambda: None):
        # processes with sharded weights compute together, so they end together
        told = stop.is_set_on_any(machine) if machine.sharded else stop.is_set()
        if told:
            return
        yield examples.batch(*request) if request else examples.empty_batch()


# --------------------------------------------------------------------------------------------------
# The run

MODEL_SETTINGS = ({field.name for field in dataclasses.fields(Config)}  # of both
                  & {field.name for field in dataclasses.fields(ModelConfig)}
                  - {"vocab_size", "image_size", "d_ff"})  # which make_model decides


def make_model(cfg, meta, task):
    """A fresh model for a data set and a task. finetune.py has its own."""
    c = ModelConfig(**{name: getattr(cfg, name) for name in MODEL_SETTINGS}, **task.head)
    c.d_ff = cfg.d_ff or 4 * cfg.d_model
    if meta["kind"] == "text":
        c.vocab_size = meta["vocab_size"]
        c.letters = tuple(meta.get("letters", ()))
        c.blanks = tuple(meta.get("blanks", ()))
    elif meta["kind"] == "image":
        c.image_size = tuple(meta["shape"])
    else:
        (c.n_features,) = meta["shape"]
    if cfg.model == "transformer":
        divisor = 4 if c.image_size else 2  # rotary positions turn pairs, of images in two sets
        if cfg.d_model % (divisor * cfg.n_head):
            raise UserError(f"--d_model={cfg.d_model} does not split into n_head={cfg.n_head} "
                            f"heads of a width that {divisor} divides")
        if c.image_size and (c.image_size[1] % c.patch or c.image_size[2] % c.patch):
            _, height, width = c.image_size
            raise UserError(f"--patch={c.patch} does not divide images of {height}×{width}")
    return build_model(c)


def train(cfg, **hooks):
    """Run the training that `cfg` describes. hooks: what finetune.py replaces, see train_locked."""
    check_settings(cfg)
    if cfg.folds and not cfg.dry_run:
        if not cfg.overwrite:
            open_run(cfg, parts=False)  # refuses another run's folder before it takes long
        cross_validate(cfg, functools.partial(run_training, **hooks))
    run_training(cfg, **hooks)


def run_training(cfg, **hooks):
    """One run, in a folder that no other process uses meanwhile."""
    with contextlib.ExitStack() as at_end:
        lock, stop = FolderLock(cfg.out_dir), StopSignal()
        at_end.callback(lock.release)
        at_end.callback(stop.restore)
        stopped_by = train_locked(cfg, lock, stop, at_end, **hooks)
    if hooks.get("fold") is not None:  # other runs would follow
        stopped_by = stopped_by or stop.number
    if stopped_by:
        sys.exit(128 + stopped_by)


def train_locked(cfg, lock, stop, at_end, make_model=make_model, lr_scale=None,
                 state_for_best=torch.nn.Module.state_dict, fold=None):
    """Returns the number of the signal that stopped the run, or None. at_end: an ExitStack.

    make_model(cfg, meta, task) → the model; lr_scale(name, model, cfg) → what a parameter's
    learning rate is multiplied by; state_for_best(model) → the state dict that best.pt gets; fold:
    the part of train that is val, see trials.py."""
    started = time.monotonic()
    source = resolve(cfg)
    make_task = task_class(cfg, source)  # checked before a data set is built
    machine = Machine(cfg)
    if idle := without_effect(cfg, source):
        machine.print(f"{', '.join(idle)}: for --kind=image, without effect on {source.kind}")
    if machine.rank == 0 and not cfg.lr_find and not cfg.dry_run:
        lock.acquire()
    machine.check_agreement(lambda: facts_of(cfg))
    checkpoint = None
    if not cfg.dry_run and not begins_anew(cfg, machine):
        checkpoint = open_checkpoint(cfg, machine)
        check_nothing_later(cfg, machine, checkpoint)
    if checkpoint and checkpoint["finished"]:
        machine.print(f"{cfg.out_dir}: this run is finished ({summary(checkpoint['best'])}); "
                      f"evaluate it with: python eval.py {quote(cfg.out_dir)}   "
                      "(or train anew: --overwrite=True)")
        machine.leave()
        return
    given = cfg  # is saved; below, cfg gets the micro-batch that --micro_batch_tokens=auto chose

    # data and task
    task, run_data = open_task(cfg, make_task, machine, checkpoint, fold)
    meta = run_data.meta
    best_by = cfg.best_by or task.figure_names[-1]
    if best_by not in (*task.figure_names, "last"):
        raise UserError(f"--best_by={best_by}: there are {', '.join(task.figure_names)}, and last")
    if cfg.dry_run or cfg.micro_batch_tokens == "auto":
        def measure(n_tokens):
            return memory.measure_step(
                cfg, lambda: make_model(cfg, meta, task), lambda model: ModelWithLoss(model, task),
                run_data.train_set, machine, lr_scale, n_tokens)
        cfg = dataclasses.replace(cfg, micro_batch_tokens=memory.choose_micro_batch(
            cfg, measure, machine, run_data.max_len, checkpoint))
        if cfg.dry_run:
            machine.print(memory.describe(measure(cfg.micro_batch_tokens)))
            machine.leave()
            return
    steps_per_epoch, eval_interval, total_steps = count_steps(cfg, len(run_data.train_set))

    # model, optimizers, where the run stands
    def begin():
        return begin_model(cfg, make_model, task, run_data, machine, checkpoint)
    model = machine.in_turn(begin) if machine.sharded else begin()
    optimizers = optim.make_optimizers(model, cfg, machine.device, lr_scale, machine.dtype)
    ema = optim.EMA(model, cfg.ema_decay)
    progress = Progress(run_id=new_run_id(cfg.out_dir))
    if checkpoint:
        progress = restore(checkpoint, cfg.out_dir, machine, model, optimizers, ema)
        machine.print(f"{cfg.out_dir}: continuing at step {progress.step}")
        before = checkpoint.get("dtype", str(machine.dtype))
        if before != str(machine.dtype):
            machine.print(f"{cfg.out_dir}: in {machine.dtype} from here on, which is --dtype=auto "
                          f"on this machine; until here it was {before}")
    wandb_run = None
    if machine.rank == 0:
        begin_run(given, checkpoint, lock)
        if not cfg.lr_find:
            wandb_run = start_wandb(dataclasses.asdict(given), progress.run_id)
            at_end.push(lambda *error: finish_wandb(wandb_run, failed=error[0] is not None))
    checkpoint = None  # what it held is where it belongs, and would be in memory twice

    # what runs in a step
    on_cuda = machine.device.type == "cuda"
    n_parameters = sum(p.numel() for p in model.parameters())
    lengths = run_data.train_set.lengths
    flops = flops_per_token(model, lengths, cfg.mask_prob or 1.0)
    compiled = machine.compile and (cfg.compile is True or is_worth_compiling(
        total_steps, flops * total_steps * cfg.batch_size * lengths.mean()))
    model_with_loss = ModelWithLoss(model, task)
    if compiled:
        compile_in_place(model_with_loss, cfg)
    if machine.world > 1 and not machine.sharded:
        model_with_loss = average_gradients(model_with_loss)
    sampler = GlobalBatches(run_data.train_set, cfg.batch_size, cfg.micro_batch_tokens, cfg.seed,
                            progress.step, total_steps, machine.rank, machine.world, compiled)
    n_workers = 2 if on_cuda and meta["kind"] == "image" else 0
    loader = torch.utils.data.DataLoader(
        run_data.train_set, batch_sampler=sampler, collate_fn=list, pin_memory=on_cuda,
        # packing texts takes less time than sending them from another process
        num_workers=n_workers, multiprocessing_context="fork" if n_workers else None)
    n_train = len(run_data.train_set)
    machine.print(
        f"{cfg.model}: {n_parameters:,} parameters, {flops / 1e6:.2g} MFLOP/token; "
        f"{machine.device}, {machine.dtype}, {machine.world} process(es); {n_train:,} examples / "
        f"{cfg.batch_size} = {steps_per_epoch} steps per epoch, {total_steps} in all; "
        f"ready after {time.monotonic() - started:.1f} s")

    in_a_pass = min(sampler.limit, cfg.batch_size * lengths.mean())  # tokens
    recorded = compiled and not cfg.lr_find and are_worth_it(given, machine, flops * in_a_pass)
    optim.prepare(optimizers, recorded)
    add = functools.partial(add_gradient, model_with_loss, machine)
    step = functools.partial(optim.clip_and_step, optimizers, cfg.grad_clip)
    if recorded:
        add = Graphs(add)
        step = Graphs(step) if optim.can_be_recorded(optimizers) else step

    def gradient_of(micro_batches):
        micro_batches = machine.evened(micro_batches, run_data.train_set.empty_batch)
        return compute_gradient(model_with_loss, micro_batches, task, machine, add)
    if cfg.lr_find:
        find_learning_rate(cfg, gradient_of, optimizers, loader, machine)
        machine.leave()
        return
    facts = checkpoint_facts(given, cfg.micro_batch_tokens, model, run_data, machine)
    checkpoints = Checkpoints(
        cfg.out_dir, machine, facts, model, optimizers, ema, state_for_best)
    tokens_per_unit = run_data.max_len if meta["kind"] == "image" else 1  # rates count images
    log = Log(cfg, machine, progress, total_steps, lambda rate: flops * rate * tokens_per_unit,
              "tok" if meta["kind"] == "text" else "ex", wandb_run)
    profile = Profile(cfg.out_dir, machine.device) if cfg.profile and machine.rank == 0 else None
    finite_check = optim.FiniteGradients(cfg)

    def is_evaluation_due():
        at_interval = progress.step % eval_interval == 0 or progress.step == total_steps
        return at_interval and progress.evaluated < progress.step

    def evaluate_and_save():
        """Does neither if a signal comes meanwhile."""
        ema.swap()
        figures = figures_on_val(model, task, run_data, cfg, machine, stop)
        if figures is None:
            ema.swap()
            return
        n = {} if fold is None else {"n": len(run_data.val_set)}
        figures = {"step": progress.step} | n | figures
        check_finite(model, figures, cfg)
        log.write(figures)
        keeps_last = best_by == "last" or not run_data.val_set
        improved = keeps_last or progress.best is None or task.better(
            figures, progress.best, best_by)
        progress.evaluated = progress.step
        progress.bad_evals = 0 if improved else progress.bad_evals + 1
        if improved:
            progress.best = figures
            checkpoints.save_best(progress)
        if run_data.val_set:
            remark = "  (best so far)" if improved and not keeps_last else ""
            machine.print(f"      {describe(figures)}{remark}")
        ema.swap()
        out_of_patience = cfg.patience is not None and progress.bad_evals >= cfg.patience
        progress.finished = progress.step == total_steps or out_of_patience
        checkpoints.save_last(progress)

    def end_of_step():
        """Evaluate and save where that is due; returns whether the run goes on."""
        log.read_clock()
        if is_evaluation_due():
            finite_check.check()
            with log.paused():
                evaluate_and_save()
            if progress.finished:
                return False
        checkpoints.poll()
        stopped = stop.is_set_on_any(machine)
        if stopped or cfg.save_interval and progress.step % cfg.save_interval == 0:
            finite_check.check()
            checkpoints.save_last(progress)
        if stopped:
            machine.print(f"told to stop: {cfg.out_dir} is saved at step {progress.step}; the same "
                          "command goes on from there")
        return not stopped

    # the loop
    stop.listen()
    goes_on = True
    if is_evaluation_due():  # the run was stopped before one
        goes_on = end_of_step()
    for micro_batches in loader if goes_on else ():
        machine.seed_step(cfg.seed, progress.step)
        lr = optim.learning_rate_at(cfg, progress.step, total_steps)
        if cfg.optimizer == "lbfgs":  # moves, and computes gradients on the way
            loss, n_tokens = optim.step_lbfgs(
                optimizers[0], functools.partial(gradient_of, micro_batches), cfg.weight_decay)
            grad_norm = optim.clip_gradients(optimizers, cfg.grad_clip)
        else:
            loss, n_tokens = gradient_of(micro_batches)
            grad_norm = step(lr)
            optim.set_learning_rate(optimizers, lr)  # a number again: last.pt holds it
        finite_check.add(grad_norm, progress.step, waits=not on_cuda)
        ema.update(progress.step)
        progress.step += 1
        progress.epoch = progress.step / steps_per_epoch
        log.n_tokens += n_tokens
        if profile:
            profile.step()

        if progress.step % cfg.log_interval == 0 or progress.step == total_steps:
            finite_check.check()
            (loss,) = machine.sum([float(loss)])
            log.line(loss, lr, grad_norm.item())

        if not end_of_step():
            break

    checkpoints.wait()
    if profile:
        profile.stop()
    if wandb_run:
        best = progress.best or {}
        wandb_run.summary.update({f"best_{key}": value for key, value in best.items()})
        finish_wandb(wandb_run)  # not later, so that what to do next is printed last
    machine.leave()
    if not progress.finished:
        return stop.number or signal.SIGTERM  # no process ends as if all were done
    next_step = "" if fold is not None else f". {advice(cfg, meta, task)}"
    seconds = time.monotonic() - started
    machine.print(f"done in {seconds:.0f} s: {summary(progress.best)}{next_step}")


def begin_model(cfg, make_model, task, run_data, machine, checkpoint):
    """The model, on its device, with the checkpoint's weights; those that lie in parts come
    later."""
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, run_data.meta, task)
    if checkpoint and "shards" not in checkpoint:
        load_weights(model, checkpoint["model"], f"{cfg.out_dir}/last.pt")
    if cfg.model == "transformer" and run_data.meta["kind"] == "text":
        model.longest = run_data.max_len
    check_head_width(model.config, machine)
    if machine.sharded:
        shard(model, machine)
    return model.to(machine.device)


def compile_in_place(model_with_loss, cfg):
    # beyond its limit, which is 8, a batch of another size would not be compiled
    torch._dynamo.config.recompile_limit = 64
    # dynamic=False: a batch's kernels depend on its own shape, not on those before it
    model_with_loss.compile(dynamic=False if cfg.deterministic else None)


def count_steps(cfg, n_train):
    """(steps in an epoch, between evaluations, in all). Raises UserError for a run that its
    settings do not fit."""
    if cfg.optimizer == "lbfgs" and cfg.batch_size < n_train:
        raise UserError(f"--optimizer=lbfgs needs all {n_train} examples in each step: "
                        f"--batch_size={n_train}")
    steps_per_epoch = ceil_div(n_train, cfg.batch_size)
    eval_interval = cfg.eval_interval or max(steps_per_epoch, round(cfg.min_steps / cfg.epochs))
    total_steps = max(1, cfg.min_steps, round(cfg.epochs * steps_per_epoch))
    total_steps = min(total_steps, cfg.max_steps or math.inf)
    if cfg.lr_find:
        total_steps = RANGE_TEST_STEPS
    elif total_steps <= (cfg.warmup_steps or 0):
        raise UserError(f"--warmup_steps={cfg.warmup_steps}: the run has {total_steps} steps, so "
                        "it would end before the learning rate is there: leave the warm-up out, or "
                        "train longer (--epochs, --min_steps)")
    return steps_per_epoch, eval_interval, total_steps


def check_finite(model, figures, cfg):
    """Raise UserError before weights or figures that are not finite are saved."""
    finite = all(math.isfinite(value) for value in figures.values())
    if not finite or not all(is_finite(p) for p in model.parameters()):
        raise UserError(f"after step {figures['step']} the weights or the figures on val are not "
                        f"finite (val_loss {figures.get('val_loss')}): lower --learning_rate="
                        f"{cfg.learning_rate}, or try --dtype=float32; {cfg.out_dir} is as its "
                        "last checkpoint left it")


def check_head_width(c, machine):
    """Raise UserError for heads that CUDA's kernel for packed texts does not take."""
    packed = c.model == "transformer" and not c.image_size
    if machine.device.type != "cuda" or machine.dtype != torch.bfloat16 or not packed:
        return
    if c.head_width % 8 or c.head_width > 256:
        raise UserError(f"heads of width {c.head_width}: on CUDA, packed texts need a multiple of "
                        "8, up to 256: choose --d_model and --n_head so, or --dtype=float32")


def summary(best):
    figures = describe(best)
    if not figures:
        return f"no val: the weights of step {best['step']}, the last, are kept"
    return f"best.pt: {figures}, at step {best['step']}"


def advice(cfg, meta, task):
    """What to do after a run."""
    if "test" in meta["splits"]:
        return f"Now: python eval.py {quote(cfg.out_dir)}"
    if "val" in meta["splits"]:
        return f"Now: python eval.py {quote(cfg.out_dir)} --split=val"
    if task.head["n_classes"]:
        return (f"Now: python eval.py {quote(cfg.out_dir)} --test_file=…, or, without one, the "
                "same command in one process with --folds=5")
    return "There is no val, so how good it is was not measured: --val_fraction=0.01"


if __name__ == "__main__":
    run(lambda: train(configure(Config)))
