"""Speed and accuracy beside peers, run by run in turn, each in a process of its own, on the same
split.

    python bench.py finetune trainer --seeds=1,2,3 --epochs=2      # BBC News, or finetune.py's data
    python bench.py train fasttext svm config/bow.py               # the settings of train.py
    python bench.py train svm config/imagecls.py
    python bench.py train train config/textcls.py                  # the noise of this machine

Ours: `train`, `finetune`. Peers: `trainer`, Hugging Face's Trainer (pip install accelerate) at its
best settings: bfloat16 where the processor has it, dynamic padding, batches grouped by length;
weights, tokens, split, epochs, batch size, rate, warm-up and decay are ours. `fasttext` (pip
install fasttext-community): word pairs, 25 epochs, rate 0.5. `svm`, scikit-learn's: of text linear
on TF-IDF of words and word pairs, of images and features RBF with C = 10. Seconds are those of
training alone: imports, reading and evaluation aside.

    python bench.py predict pipeline trainer_predict --init_from=out/trec --dataset=trec …

From texts to labels of test with one checkpoint (of a published family): `predict`, ours in
bfloat16, `predict_int8`, `predict_float32`; `pipeline`, Hugging Face's, and `trainer_predict`, both
with bfloat16 weights, on texts sorted by length, 64 at a time.

    python bench.py few --per_class=8 --splits=10 --dataset=trec --train_file=… --test_file=…

Few labels: draws splits of 8 texts a class from train, and fine-tunes the same weights on each by
`finetune --objective=contrastive` and by `setfit` (pip install setfit; its paper's 20 iterations of
pairs, 1 epoch, batches of 16 pairs, 2e-5), evaluated on all of test.

    python bench.py gpu                        # on a GPU: see bench_gpu.py
    python bench.py busy config/textcls.py     # the speed beside a process that keeps a core busy
    python bench.py drills                     # kills, torn bytes, hostile files: see drills.py
"""
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configurator import UserError, configure, run

import numpy as np
import torch
from tokenizers import Tokenizer

import bench_gpu
import data
import finetune
import optim
import train
from batches import open_split
from drills import drill
from eval import basic_report
from examples import ceil_div
from huggingface import save_hf
from predict import Classifier, open_data
from run_data import tokens_per_example
from runs import read_records
from sources import rebuild_command, resolve, rows
from tasks import bf16_is_native, open_device

# --------------------------------------------------------------------------------------------------
# Contenders: each takes a config and returns (seconds of training, accuracy on test)


def ours(main):
    def contender(cfg):
        started = time.time()
        main(dataclasses.replace(cfg, overwrite=True, wandb_mode="disabled"))
        whole = time.time() - started
        elapsed = [r["elapsed_s"] for r in read_records(Path(cfg.out_dir)) if "elapsed_s" in r]
        figures = bench_gpu.rates(read_records(Path(cfg.out_dir)), open_device(cfg.device))
        if cfg.objective == "clm":
            return elapsed[-1], math.nan, figures
        clf = Classifier(cfg.out_dir)
        test = open_data(clf, "test")
        accuracy = basic_report(clf, clf.logits(test).numpy(), test.labels)["accuracy"]
        return elapsed[-1], accuracy, {"whole_s": whole} | figures
    return contender


def splits(cfg):
    """(meta, train, test) of a config's data set."""
    folder, meta = data.open_or_build(cfg)
    max_len = tokens_per_example(cfg, meta)
    return meta, *(open_split(folder, meta, split, max_len, rebuild_command(cfg))
                   for split in ("train", "test"))


def texts(cfg, split):
    tokenizer = Tokenizer.from_file(str(data.folder_of(cfg) / "tokenizer.json"))
    return [tokenizer.decode(split.document(i).tolist()).strip() for i in range(len(split))]


def trainer(cfg):
    import transformers as hf
    hf.logging.set_verbosity_error()
    path = finetune.find_weights(cfg)
    cfg = finetune.with_recipe(finetune.with_weights_settings(cfg, path))
    meta, *both = splits(cfg)
    encoded = [[{"input_ids": d.document(i), "label": int(d.labels[i])} for i in range(len(d))]
               for d in both]
    hf.set_seed(cfg.seed)
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(meta["label_names"]))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=cfg.tokenizer, pad_token="[PAD]")
    machine = train.Machine(cfg)
    total_steps = round(cfg.epochs * ceil_div(len(encoded[0]), cfg.batch_size))
    total_steps = min(total_steps, cfg.max_steps or total_steps)
    learn_length = np.mean(both[0].lengths)
    arguments = hf.TrainingArguments(
        output_dir=cfg.out_dir, num_train_epochs=cfg.epochs, max_steps=cfg.max_steps or -1,
        learning_rate=cfg.learning_rate, seed=cfg.seed,
        warmup_steps=optim.warmup_steps(cfg, total_steps), weight_decay=cfg.weight_decay,
        per_device_train_batch_size=cfg.batch_size, per_device_eval_batch_size=64,
        bf16=machine.dtype == torch.bfloat16, train_sampling_strategy="group_by_length",
        save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=machine.device.type == "cpu")
    warm = []  # when N_WARM steps were over

    class Clock(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == bench_gpu.N_WARM:
                bench_gpu.synchronize(machine.device)
                warm.append(time.time())
    t = hf.Trainer(model, arguments, train_dataset=encoded[0], callbacks=[Clock()],
                   data_collator=hf.DataCollatorWithPadding(tokenizer))
    started = time.time()
    t.train()
    bench_gpu.synchronize(machine.device)
    ended = time.time()
    figures = bench_gpu.memory_of(machine.device)
    if cfg.max_steps and warm:
        n_tokens = (cfg.max_steps - bench_gpu.N_WARM) * cfg.batch_size * learn_length
        figures["tokens_per_s"] = n_tokens / (ended - warm[0])
    out = t.predict(encoded[1])  # grouped by length, so in an order of its own
    return ended - started, (out.predictions.argmax(1) == out.label_ids).mean(), figures


def setfit(cfg):
    import datasets
    from setfit import SetFitModel, Trainer, TrainingArguments
    path = finetune.find_weights(cfg)
    cfg = finetune.with_weights_settings(cfg, path)
    _, learn, test = splits(cfg)
    train_set = datasets.Dataset.from_dict(
        {"text": texts(cfg, learn), "label": learn.labels.tolist()})
    started = time.time()
    torch.manual_seed(cfg.seed)
    model = SetFitModel.from_pretrained(str(path))
    arguments = TrainingArguments(
        output_dir=f"{cfg.out_dir}/setfit", batch_size=16, num_epochs=1, num_iterations=20,
        seed=cfg.seed, report_to="none", save_strategy="no", show_progress_bar=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=train_set)
    training = time.time()
    trainer.train()
    ended = time.time()
    predicted = model.predict(texts(cfg, test), batch_size=64, show_progress_bar=False)
    accuracy = np.mean(np.asarray(predicted.tolist()) == test.labels)
    return ended - training, accuracy, {"whole_s": ended - started}


def fasttext(cfg):
    import fasttext
    _, learn, test = splits(cfg)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        for text, y in zip(texts(cfg, learn), learn.labels):
            file.write(f"__label__{y} {' '.join(text.split())}\n")
        file.flush()
        started = time.time()
        model = fasttext.train_supervised(file.name, lr=0.5, epoch=25, wordNgrams=2,
                                          thread=os.cpu_count(), verbose=0)
        seconds = time.time() - started
    predicted = model.predict([" ".join(text.split()) for text in texts(cfg, test)])[0]
    correct = [p[0] == f"__label__{y}" for p, y in zip(predicted, test.labels)]
    return seconds, np.mean(correct)


def svm(cfg):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC, LinearSVC
    meta, learn, test = splits(cfg)
    if meta["kind"] == "text":
        x = texts(cfg, learn)
        x_test = texts(cfg, test)
        tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        model = make_pipeline(tfidf, LinearSVC())
    else:
        scale = 255 if meta["kind"] == "image" else 1
        x, x_test = (d.values.reshape(len(d), -1) / scale for d in (learn, test))
        model = SVC(C=10)
    started = time.time()
    model.fit(x, learn.labels)
    return time.time() - started, model.score(x_test, test.labels)


def prediction(make):
    """A contender that labels the texts of test: make(cfg, exact) returns a function from texts to
    label names. It labels 64 of them, then all once (first_pass_s: memory and kernels are new),
    then all again and again for 3 seconds: that counts."""
    def contender(cfg):
        cfg = finetune.with_weights_settings(cfg, finetune.find_weights(cfg))
        _, _, test = splits(cfg)
        x = texts(cfg, test)
        exact = Classifier(cfg.init_from)
        label = make(cfg, exact)
        label(x[:64])
        times = [time.time()]
        while len(times) < 3 or times[-1] - times[1] < 3:
            predicted = label(x)
            times.append(time.time())
        seconds = (times[-1] - times[1]) / (len(times) - 2)
        same = np.mean([a == b["label"] for a, b in zip(predicted, exact(x))])
        correct = [a == exact.label_names[y] for a, y in zip(predicted, test.labels)]
        return seconds, np.mean(correct), {
            "texts_per_s": len(x) / seconds, "first_pass_s": times[1] - times[0],
            "labels_as_float32_%": 100 * same}
    return contender


def predict(dtype):
    def make(cfg, exact):
        clf = Classifier(cfg.init_from, cfg.device, dtype)
        return lambda x: [result["label"] for result in clf(x)]
    return prediction(make)


def hugging_face(cfg, exact):
    """(transformers, the model, the tokenizer) of a Classifier."""
    import transformers as hf
    hf.logging.set_verbosity_error()
    folder = f"{cfg.out_dir}/hf"
    save_hf(exact.model, folder, exact.label_names, exact.tokenizer.to_str())
    dtype = torch.bfloat16 if bf16_is_native(exact.device) else torch.float32
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    return hf, model, hf.AutoTokenizer.from_pretrained(folder)


def longest_first(x, length, label):
    """label(x, the longest first) → in the order of x."""
    order = sorted(range(len(x)), key=lambda i: -length(x[i]))
    labels = dict(zip(order, label([x[i] for i in order])))
    return [labels[i] for i in range(len(x))]


def pipeline(cfg, exact):
    hf, model, tokenizer = hugging_face(cfg, exact)
    pipe = hf.pipeline("text-classification", model=model, tokenizer=tokenizer,
                       device=exact.device)

    def label(x):
        return [result["label"] for result in pipe(x, batch_size=64, truncation=True)]
    return lambda x: longest_first(x, len, label)


def trainer_predict(cfg, exact):
    hf, model, tokenizer = hugging_face(cfg, exact)
    arguments = hf.TrainingArguments(
        output_dir=cfg.out_dir, per_device_eval_batch_size=64, report_to=[], disable_tqdm=True,
        bf16_full_eval=model.dtype == torch.bfloat16, use_cpu=exact.device.type == "cpu")
    t = hf.Trainer(model, arguments, data_collator=hf.DataCollatorWithPadding(tokenizer))

    def label(encoded):
        return [exact.label_names[i] for i in t.predict(encoded).predictions.argmax(1)]

    def tokenize_and_label(x):
        encoded = [{"input_ids": ids} for ids in tokenizer(x, truncation=True)["input_ids"]]
        return longest_first(encoded, lambda row: len(row["input_ids"]), label)
    return tokenize_and_label


CONTENDERS = {
    "train": ours(train.train), "finetune": ours(finetune.finetune), "trainer": trainer,
    "nanogpt": bench_gpu.nanogpt, "setfit": setfit, "fasttext": fasttext, "svm": svm,
    "predict": predict(torch.bfloat16),
    "predict_int8": predict(torch.int8), "predict_float32": predict(torch.float32),
    "pipeline": prediction(pipeline), "trainer_predict": prediction(trainer_predict)}
# by the settings of train.py; others: by finetune.py's
TRAINED_HERE = {"train", "fasttext", "svm", "nanogpt"}


def run_alone(name, options, seed):
    """One contender in a process of its own; returns its figures."""
    command = [sys.executable, __file__, name, *options, f"--seed={seed}",
               f"--out_dir=out/bench/{name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"BENCH_ALONE": "1"})
    if done.returncode:
        raise UserError(f"{name} failed; its messages are above")
    return json.loads(done.stdout.splitlines()[-1])


def few(options):
    """Fine-tune on few labels, by ours and by SetFit, on the same splits; see the top."""
    given = dict(option[2:].split("=", 1) for option in options)
    per_class = int(given.pop("per_class", 8))
    n_splits = int(given.pop("splits", 10))
    cfg = configure(finetune.Config, [f"--{name}={value}" for name, value in given.items()])
    source = resolve(cfg)
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    test_file = out / f"{cfg.dataset}-test.jsonl"
    write_jsonl(test_file, [(text, y) for _, text, y in rows(source.test_file, source)])
    of_label = {}
    for _, text, label in rows(source.train_file, source):
        of_label.setdefault(label, {})[text] = label  # each text once
    results = {"finetune": [], "setfit": []}
    for seed in range(n_splits):
        rng = np.random.default_rng((seed, per_class))
        drawn = []
        for _, examples in sorted(of_label.items()):
            examples = list(examples.items())
            drawn += [examples[i] for i in rng.permutation(len(examples))[:per_class]]
        train_file = out / f"{cfg.dataset}-{per_class}-{seed}.jsonl"
        write_jsonl(train_file, drawn)
        split = [f"--dataset={train_file.stem}", f"--train_file={train_file}",
                 f"--test_file={test_file}", f"--init_from={cfg.init_from}"]
        for name, result in results.items():
            more = ["--objective=contrastive"] if name == "finetune" else []
            result.append(run_alone(name, split + more, seed))
            print_figures(f"split {seed}", name, result[-1])
    print_summary(list(results), list(results.values()))


def write_jsonl(path, examples):
    records = [{"text": text, "label": label} for text, label in examples]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def busy(options):
    """Print how fast the settings train and label, alone and beside a process that keeps a core
    busy; three times in turn."""
    configure(train.Config, options)
    found = {False: [], True: []}  # beside a neighbour? → (tokens/s, seconds of eval.py)
    for neighbour in (False, True) * 3:
        command = [sys.executable, "-c", "while True: pass"]
        other = subprocess.Popen(command) if neighbour else None
        try:
            figures = run_alone("train", [*options, "--max_steps=60"], 1)
            out = Path("out/bench/train")
            rates = [r["tokens_per_s"] for r in read_records(out) if "tokens_per_s" in r]
            started = time.perf_counter()
            subprocess.run([sys.executable, "eval.py", str(out), "--wandb_mode=disabled"],
                           check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
        finally:
            if other:
                other.kill()
        found[neighbour].append((np.median(rates), seconds))
        name = "a busy neighbour" if neighbour else "quiet"
        print(f"{name:17} {np.median(rates):10,.0f} tokens/s in training "
              f"({figures['seconds']:.1f} s), {seconds:.1f} s for eval.py", flush=True)
    rate, seconds = np.median(np.array(found[True]) / found[False], axis=0)
    print(f"with a neighbour: {rate:.2f} of quiet in training, {1 / seconds:.2f} in evaluation")


def main():
    if sys.argv[1:2] == ["drills"]:
        drill(sys.argv[2:])
        return
    if sys.argv[1:2] == ["few"]:
        few(sys.argv[2:])
        return
    if sys.argv[1:2] == ["gpu"]:
        bench_gpu.main(sys.argv[2:], run_alone)
        return
    if sys.argv[1:2] == ["busy"]:
        busy(sys.argv[2:])
        return
    names = [arg for arg in sys.argv[1:] if arg in CONTENDERS]
    seeds = ["1"]
    options = []
    for arg in sys.argv[1:]:
        if arg.startswith("--seeds="):
            seeds = arg.removeprefix("--seeds=").split(",")
        elif arg not in CONTENDERS:
            options.append(arg)
    if not names:
        raise UserError(f"name one or more of {', '.join(CONTENDERS)}; see the top of bench.py")
    trained_here = set(names) <= TRAINED_HERE
    cfg = configure(train.Config if trained_here else finetune.Config, options)
    if os.environ.get("BENCH_ALONE"):
        seconds, accuracy, *more = CONTENDERS[names[0]](cfg)
        figures = {"accuracy_%": 100 * float(accuracy), "seconds": seconds} | dict(*more)
        print(json.dumps(figures))
        return
    results = [[] for _ in names]
    for seed in seeds:
        for name, result in zip(names, results):
            result.append(run_alone(name, options, seed))
            print_figures(f"seed {seed}", name, result[-1])
    print_summary(names, results)


def print_figures(what, name, figures):
    shown = "  ".join(f"{key} {value:.2f}" for key, value in figures.items())
    print(f"{what}  {name:9} {shown}", flush=True)


def print_summary(names, results):
    """Means and standard deviations of each contender's figures, and its time beside the first's.
    """
    for name, result in zip(names, results):
        shown = []
        for key in result[0]:
            values = [r[key] for r in result]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0
            shown.append(f"{key} {np.mean(values):.2f} ± {spread:.2f}")
        ratios = [r["seconds"] / first["seconds"] for first, r in zip(results[0], result)]
        print(f"{name:9} {'  '.join(shown)}  {np.median(ratios):.2f} times the seconds of "
              f"{names[0]} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    run(main)
