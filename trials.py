"""Before a run: how good it will be (--folds=5), and which learning rate (--lr_find=True)."""
import dataclasses
import json
from pathlib import Path

from configurator import UserError, read_json, write_json, write_text

import metrics
import optim
from tasks import describe
from weights import load_checkpoint


def cross_validate(cfg, run):
    """Train cfg.folds times, each time without a part of train, and print what the weights at the
    end say of these parts: every label is tested once, and none is learnt before it is tested.
    run(cfg, fold=…) is a run."""
    found = []
    for fold in range(cfg.folds):
        print(f"fold {fold + 1} of {cfg.folds}", flush=True)
        out_dir = f"{cfg.out_dir}-folds/{fold}"
        part = dataclasses.replace(cfg, out_dir=out_dir, best_by="last", wandb_mode="disabled",
                                   overwrite=cfg.overwrite or is_of_others(out_dir, cfg.folds))
        run(part, fold=fold)
        found.append(load_checkpoint(f"{out_dir}/last.pt")["best"])
    write_json(Path(f"{cfg.out_dir}-folds") / "folds.json", summarise_folds(found))


def is_of_others(out_dir, folds):
    """Does a folder hold a part of a cross-validation with another number of folds?"""
    try:
        return read_json(Path(out_dir) / "config.json").get("folds") != folds
    except (OSError, ValueError):  # there is none, or the run will say that it is damaged
        return False


def summarise_folds(found):
    """Print the figures of all folds, a dict each, as those of one val; returns them."""
    n = sum(figures["n"] for figures in found)
    whole = {key: sum(f[key] * f["n"] for f in found) / n
             for key in found[0] if key not in ("step", "n")}
    text = describe(whole)
    if "val_accuracy" in whole:
        low, high = metrics.wilson_interval(whole["val_accuracy"], n)
        whole["interval"] = [low, high]
        text += f" [{low:.1%}, {high:.1%}]"
    print(f"cross-validated on all {n} examples: {text}", flush=True)
    return whole | {"n": n}


# --------------------------------------------------------------------------------------------------
# The learning-rate range test (Smith 2017)

RANGE_TEST_STEPS = 160


def range_test_rate(step):
    """1e-6 to 100, exponentially."""
    return 1e-6 * 1e8 ** (step / RANGE_TEST_STEPS)


def read_range_test(losses):
    """(losses smoothed, index of the rate to suggest or None, whether the losses diverge).

    The suggestion is the rate at which the loss has made a quarter of its fall. The usual rules
    (the steepest slope, a tenth of the rate at the minimum) vary up to 30-fold between seeds, this
    one 2-fold (NOTES.md).
    """
    smooth, mean = [], 0.0
    for i, loss in enumerate(losses):
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean / (1 - 0.9 ** (i + 1)))
    n_before = 20  # steps at rates that change nothing yet
    start = sum(smooth[:n_before]) / n_before
    low = min(smooth[n_before:], default=start)
    diverges = len(smooth) > n_before and smooth[-1] > 1.5 * min(low, start)
    if low >= 0.98 * start:
        return smooth, None, diverges
    quarter = start - (start - low) / 4
    found = next(i for i, s in enumerate(smooth) if i >= n_before and s <= quarter)
    return smooth, found, diverges


def find_learning_rate(cfg, compute_gradient, optimizers, loader, machine):
    """Suggest a rate, and write lr_find.json and lr_find.png. compute_gradient(micro_batches) →
    (this process's share of the loss, …)."""
    rates, losses = [], []
    for step, micro_batches in enumerate(loader):
        machine.seed_step(cfg.seed, step)
        lr = range_test_rate(step)
        optim.set_learning_rate(optimizers, lr)
        loss, _ = compute_gradient(micro_batches)
        grad_norm = optim.clip_gradients(optimizers, cfg.grad_clip)
        if not grad_norm.isfinite():
            break
        rates.append(lr)
        losses += machine.sum([float(loss)])
        smooth, found, diverges = read_range_test(losses)
        if diverges:
            break
        optim.step_all(optimizers)
    if not losses:
        raise UserError("the gradient is not finite at the lowest rate: is the data in order?")
    if machine.rank == 0:
        from report import plot_range_test
        out = Path(cfg.out_dir)
        suggestion = None if found is None else rates[found]
        record = {"suggestion": suggestion, "rates": rates, "losses": losses}
        write_text(out / "lr_find.json", json.dumps(record, indent=1))
        plot_range_test(rates, losses, smooth, suggestion, out / "lr_find.png")
        advice = "no rate made the loss fall: there is nothing to suggest"
        if suggestion is not None:
            advice = (f"suggested: --learning_rate={suggestion:.1e}, where the loss has made a "
                      "quarter of its fall; try a third and three times as much too")
        print(f"{advice}. Written to {out}: lr_find.png, lr_find.json")
