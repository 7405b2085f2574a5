"""Speed and accuracy beside peers, run by run in turn, each in a process of its own.

    python bench.py finetune trainer --seeds=1,2,3   # BBC News; other data: the settings of finetune.py
    python bench.py finetune finetune                # the noise of this machine: the same thing twice

`trainer` is Hugging Face's Trainer (pip install accelerate) at its best settings: bfloat16 where the processor has it,
dynamic padding, batches grouped by length; weights, tokens, split, epochs, batch size and learning rate are ours.
"""
import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

import data
import finetune
import train
from configurator import UserError, configure, run
from eval import Classifier, evaluate, open_data
from model import WeightsError


@dataclass
class Config(finetune.Config):
    contenders: list[str] = field(default_factory=list)  # finetune, trainer; one alone runs in this process
    seeds: list[int] = field(default_factory=lambda: [1])  # a pair of runs for each
    out_dir: str = "out/bench"
    wandb_mode: Literal["disabled"] = "disabled"
    warmup_steps: int = 0  # Trainer's default, as the next
    weight_decay: float = 0.0


def settings_of(cfg, cls):
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cls)}


def ours(cfg):
    cfg = finetune.Config(**settings_of(cfg, finetune.Config) | {"overwrite": True})
    finetune.finetune(cfg)
    records = [json.loads(line) for line in open(f"{cfg.out_dir}/metrics.jsonl")]
    seconds = [r["elapsed_s"] for r in records if "elapsed_s" in r][-1]
    examples = len(data.open_split(cfg, data.open_meta(cfg), "train", cfg.max_len)) * cfg.epochs
    clf = Classifier(cfg.out_dir)
    return examples / seconds, seconds, evaluate(clf, open_data(clf, "test"))[0]["accuracy"]


def trainer(cfg):
    import transformers as hf
    hf.logging.set_verbosity_error()
    path, tokenizer = finetune.find_weights(cfg)
    cfg.tokenizer = str(tokenizer)
    meta = data.open_or_build(cfg)
    splits = {s: data.open_split(cfg, meta, s, cfg.max_len) for s in ("train", "test")}
    rows = {s: [{"input_ids": d.document(i, None), "label": int(d.labels[i])} for i in range(len(d))]
            for s, d in splits.items()}
    hf.set_seed(cfg.seed)
    model = hf.AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(meta["label_names"]))
    machine = train.Machine(cfg)
    t = hf.Trainer(model, hf.TrainingArguments(
        output_dir=cfg.out_dir, num_train_epochs=cfg.epochs, learning_rate=cfg.learning_rate, seed=cfg.seed,
        warmup_steps=cfg.warmup_steps, weight_decay=cfg.weight_decay,
        per_device_train_batch_size=cfg.batch_size, per_device_eval_batch_size=64, bf16=machine.dtype == torch.bfloat16,
        train_sampling_strategy="group_by_length", save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=machine.device.type == "cpu"),
        train_dataset=rows["train"], data_collator=hf.DataCollatorWithPadding(
            hf.PreTrainedTokenizerFast(tokenizer_file=cfg.tokenizer, pad_token="[PAD]")))
    started = time.time()
    t.train()
    seconds = time.time() - started
    out = t.predict(rows["test"])  # grouped by length, so in an order of its own
    return len(rows["train"]) * cfg.epochs / seconds, seconds, float((out.predictions.argmax(1) == out.label_ids).mean())


CONTENDERS = {"finetune": ours, "trainer": trainer}


def main():
    cfg = configure(Config, positional="contenders")
    if not cfg.contenders or set(cfg.contenders) - set(CONTENDERS):
        raise UserError(f"name one or two of {', '.join(CONTENDERS)}, not {cfg.contenders}")
    if len(cfg.contenders) == 1:  # in a process of its own
        cfg.seed = cfg.seeds[0]
        print(json.dumps(dict(zip(("samples_per_s", "seconds", "accuracy"), CONTENDERS[cfg.contenders[0]](cfg)))))
        return
    figures = {i: [] for i in range(len(cfg.contenders))}
    for seed in cfg.seeds:
        for i, name in enumerate(cfg.contenders):
            options = [a for a in sys.argv[1:] if a.startswith("--") and not a.startswith(("--seeds", "--out_dir"))]
            done = subprocess.run([sys.executable, __file__, name, *options, f"--seeds={seed}",
                                   f"--out_dir={cfg.out_dir}/{name}"], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"{name} failed; its messages are above")
            figures[i].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"seed {seed}  {name:10} " + "  ".join(f"{k} {v:.4g}" for k, v in figures[i][-1].items()), flush=True)
    for i, name in enumerate(cfg.contenders):
        print(f"{name:10} " + "  ".join(
            f"{k} {np.mean(x):.4g} ± {np.std(x, ddof=1) if len(x) > 1 else 0:.2g}"
            for k in figures[i][0] for x in [[f[k] for f in figures[i]]]))
    ratios = [a["samples_per_s"] / b["samples_per_s"] for a, b in zip(figures[0], figures[len(figures) - 1])]
    print(f"{cfg.contenders[0]} / {cfg.contenders[-1]}: {np.median(ratios):.2f} times the samples per second "
          f"(pair by pair {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    run(main, WeightsError)
