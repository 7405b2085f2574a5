"""Speed and accuracy beside peers, run by run in turn, each in a process of its own, on the same split.

    python bench.py finetune trainer --seeds=1,2,3 --epochs=2      # BBC News; other data: the settings of finetune.py
    python bench.py train fasttext svm config/bow.py               # a config file and the settings of train.py
    python bench.py train svm config/imagecls.py
    python bench.py train train config/textcls.py                  # the noise of this machine: the same thing twice

Ours: `train`, `finetune`. Peers: `trainer`, Hugging Face's Trainer (pip install accelerate) at its best settings: bfloat16
where the processor has it, dynamic padding, batches grouped by length; weights, tokens, split, epochs, batch size, rate,
warm-up and decay are ours. `fasttext` (pip install fasttext-community): word pairs, 25 epochs, rate 0.5. `svm`,
scikit-learn's: of text linear on TF-IDF of words and word pairs, of images and features RBF with C = 10. Seconds are those
of training alone: imports, reading and evaluation aside.

    python bench.py predict pipeline trainer_predict --init_from=out/trec --dataset=trec …     # labels for test, 2 cores

From texts to labels with one checkpoint (of a published family): `predict`, ours in bfloat16, `predict_int8`,
`predict_float32`; `pipeline`, Hugging Face's, and `trainer_predict`, both with bfloat16 weights, on texts sorted by length,
64 at a time.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from tokenizers import Tokenizer

import data
import finetune
import train
from configurator import UserError, configure, run
from eval import Classifier, evaluate, open_data
from model import WeightsError, bf16_is_native, save_hf

# ---------------------------------------------------------------------------------------------------------------------
# Contenders: each takes a config and returns (seconds of training, accuracy on test)


def ours(main):
    def contender(cfg):
        cfg.overwrite, cfg.wandb_mode = True, "disabled"
        main(cfg)
        with open(f"{cfg.out_dir}/metrics.jsonl") as f:
            seconds = [r["elapsed_s"] for r in map(json.loads, f) if "elapsed_s" in r][-1]
        clf = Classifier(cfg.out_dir)
        return seconds, evaluate(clf, open_data(clf, "test"))[0]["accuracy"]
    return contender


def splits(cfg):
    meta = data.open_or_build(cfg)
    return meta, *(data.open_split(cfg, meta, s, train.tokens_per_example(cfg, meta)) for s in ("train", "test"))


def texts(cfg, split):
    tokenizer = Tokenizer.from_file(str(data.folder_of(cfg) / "tokenizer.json"))
    return [tokenizer.decode(split.document(i, None).tolist()).strip() for i in range(len(split))]


def trainer(cfg):
    import transformers as hf
    hf.logging.set_verbosity_error()
    path, tokenizer = finetune.find_weights(cfg)
    cfg.tokenizer = str(tokenizer)
    meta, *both = splits(cfg)
    rows = [[{"input_ids": d.document(i, None), "label": int(d.labels[i])} for i in range(len(d))] for d in both]
    hf.set_seed(cfg.seed)
    model = hf.AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(meta["label_names"]))
    machine = train.Machine(cfg)
    t = hf.Trainer(model, hf.TrainingArguments(
        output_dir=cfg.out_dir, num_train_epochs=cfg.epochs, learning_rate=cfg.learning_rate, seed=cfg.seed,
        warmup_steps=cfg.warmup_steps, weight_decay=cfg.weight_decay, per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=64, bf16=machine.dtype == torch.bfloat16, train_sampling_strategy="group_by_length",
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=machine.device.type == "cpu"),
        train_dataset=rows[0], data_collator=hf.DataCollatorWithPadding(
            hf.PreTrainedTokenizerFast(tokenizer_file=cfg.tokenizer, pad_token="[PAD]")))
    started = time.time()
    t.train()
    seconds = time.time() - started
    out = t.predict(rows[1])  # grouped by length, so in an order of its own
    return seconds, (out.predictions.argmax(1) == out.label_ids).mean()


def fasttext(cfg):
    import fasttext
    _, learn, test = splits(cfg)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as f:
        f.writelines(f"__label__{y} {' '.join(t.split())}\n" for t, y in zip(texts(cfg, learn), learn.labels))
        f.flush()
        started = time.time()
        model = fasttext.train_supervised(f.name, lr=0.5, epoch=25, wordNgrams=2, thread=os.cpu_count(), verbose=0)
        seconds = time.time() - started
    said = model.predict([" ".join(t.split()) for t in texts(cfg, test)])[0]
    return seconds, np.mean([s[0] == f"__label__{y}" for s, y in zip(said, test.labels)])


def svm(cfg):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC, LinearSVC
    meta, learn, test = splits(cfg)
    if meta["kind"] == "text":
        x, xt = texts(cfg, learn), texts(cfg, test)
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    else:
        scale = 255 if meta["kind"] == "image" else 1
        x, xt = (d.values.reshape(len(d), -1) / scale for d in (learn, test))
        model = SVC(C=10)
    started = time.time()
    model.fit(x, learn.labels)
    return time.time() - started, model.score(xt, test.labels)


def prediction(make):
    """A contender that labels the texts of test: make(cfg) returns a function from texts to label names. It labels 64 of
    them, then all once (first_pass_s: memory and kernels are new), then all again and again for 3 seconds: that counts."""
    def contender(cfg):
        cfg.tokenizer = str(finetune.find_weights(cfg)[1])
        _, _, test = splits(cfg)
        x, exact = texts(cfg, test), Classifier(cfg.init_from)
        label = make(cfg, exact)
        label(x[:64])
        times = [time.time()]
        while len(times) < 3 or times[-1] - times[1] < 3:
            said = label(x)
            times.append(time.time())
        seconds = (times[-1] - times[1]) / (len(times) - 2)
        same = np.mean([a == b["label"] for a, b in zip(said, exact(x))])
        return seconds, np.mean([a == exact.label_names[y] for a, y in zip(said, test.labels)]), {
            "texts_per_s": len(x) / seconds, "first_pass_s": times[1] - times[0], "labels_as_float32_%": 100 * same}
    return contender


def predict(dtype):
    def make(cfg, exact):
        clf = Classifier(cfg.init_from, cfg.device, dtype)
        return lambda x: [r["label"] for r in clf(x)]
    return prediction(make)


def hugging_face(cfg, exact):
    import transformers as hf
    hf.logging.set_verbosity_error()
    folder = f"{cfg.out_dir}/hf"
    save_hf(exact.model, folder, exact.label_names, exact.tokenizer.to_str())
    dtype = torch.bfloat16 if bf16_is_native(exact.device.type) else torch.float32
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    return hf, model, hf.AutoTokenizer.from_pretrained(folder)


def in_order(x, key, label):
    """label(x, the longest first) → in the order of x."""
    order = sorted(range(len(x)), key=lambda i: -key(x[i]))
    return [said for _, said in sorted(zip(order, label([x[i] for i in order])))]


def pipeline(cfg, exact):
    hf, model, tokenizer = hugging_face(cfg, exact)
    pipe = hf.pipeline("text-classification", model=model, tokenizer=tokenizer, device=exact.device)
    return lambda x: in_order(x, len, lambda x: [r["label"] for r in pipe(x, batch_size=64, truncation=True)])


def trainer_predict(cfg, exact):
    hf, model, tokenizer = hugging_face(cfg, exact)
    t = hf.Trainer(model, hf.TrainingArguments(
        output_dir=cfg.out_dir, per_device_eval_batch_size=64, bf16_full_eval=model.dtype == torch.bfloat16, report_to=[],
        disable_tqdm=True, use_cpu=exact.device.type == "cpu"), data_collator=hf.DataCollatorWithPadding(tokenizer))

    def label(rows):
        return [exact.label_names[i] for i in t.predict(rows).predictions.argmax(1)]
    return lambda x: in_order([{"input_ids": ids} for ids in tokenizer(x, truncation=True)["input_ids"]],
                              lambda row: len(row["input_ids"]), label)


CONTENDERS = {"train": ours(train.train), "finetune": ours(finetune.finetune), "trainer": trainer, "fasttext": fasttext,
              "svm": svm, "predict": predict(torch.bfloat16), "predict_int8": predict(torch.int8),
              "predict_float32": predict(torch.float32), "pipeline": prediction(pipeline),
              "trainer_predict": prediction(trainer_predict)}
TRAINED_HERE = {"train", "fasttext", "svm"}  # with the settings of train.py, the others with those of finetune.py


def main():
    names = [a for a in sys.argv[1:] if a in CONTENDERS]
    rest = [a for a in sys.argv[1:] if a not in CONTENDERS and not a.startswith("--seeds=")]
    seeds = next((a[8:].split(",") for a in sys.argv[1:] if a.startswith("--seeds=")), ["1"])
    if not names:
        raise UserError(f"name one or more of {', '.join(CONTENDERS)}; see the top of bench.py")
    cfg = configure(finetune.Config if set(names) - TRAINED_HERE else train.Config, rest)
    if os.environ.get("BENCH_ALONE"):
        seconds, accuracy, *more = CONTENDERS[names[0]](cfg)
        print(json.dumps({"accuracy_%": 100 * float(accuracy), "seconds": seconds} | dict(*more)))
        return
    results = [[] for _ in names]
    for seed in seeds:
        for name, result in zip(names, results):
            done = subprocess.run([sys.executable, __file__, name, *rest, f"--seed={seed}", f"--out_dir=out/bench/{name}"],
                                  stdout=subprocess.PIPE, text=True, env=os.environ | {"BENCH_ALONE": "1"})
            if done.returncode:
                raise UserError(f"{name} failed; its messages are above")
            result.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"seed {seed}  {name:9} " + "  ".join(f"{k} {v:.2f}" for k, v in result[-1].items()), flush=True)
    for name, result in zip(names, results):
        ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(results[0], result)]
        print(f"{name:9} " + "  ".join(f"{k} {np.mean(v):.2f} ± {np.std(v, ddof=1) if len(v) > 1 else 0:.2f}"
                                       for k in result[0] for v in [[r[k] for r in result]])
              + f"  {np.median(ratios):.2f} times the seconds of {names[0]} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    run(main, WeightsError)
