"""A checkpoint as a classifier, in Python and on the command line.

    python predict.py out/textcls --text="Shares fell again"        # --text=- reads lines
    python predict.py out/textcls --input=texts.csv --output=labels.csv

    clf = Classifier("out/textcls")
    clf(["Shares fell again"])  # [{"label": "business", "probability": 0.98, "probabilities": …}]
"""
import csv
import gzip
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configurator import UserError, cannot_write, configure, mismatch, read_json, run

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import cpu
from batches import PackedText, eval_requests, open_split, read_meta
from readers import clean, decoded_lines
from sources import DataConfig, data_settings, rebuild_command, rows
from tasks import bf16_is_native, eval_tokens, open_device, run_model
from weights import checkpoint_file, load_checkpoint, load_model

FORMULA = "=", "+", "-", "@", "\t", "\r"  # what spreadsheets take for the start of one


@dataclass
class Config:
    checkpoint: list[str] = field(default_factory=list)  # a run's folder or a checkpoint file
    text: list[str] = field(default_factory=list)  # label this text (repeatable); - reads lines
    #   from standard input
    input: str | None = None  # label the texts of this .csv, .tsv, .jsonl (each also .gz) or .txt
    #   (one a line), in order …
    output: str | None = None  # … into this .csv
    text_column: str | int | list[str | int] = "text"  # of input
    header: bool | None = None  # of input: is the first row names? None: yes where text_column is
    #   a name
    encoding: str = "utf-8"  # of input; comma-separated: each is tried in turn
    spreadsheet: bool = False  # True: an apostrophe goes before what a spreadsheet would run as a
    #   formula
    max_row_mb: int = 16  # of input: a longer row is taken for a damaged file
    micro_batch_tokens: int | None = None  # most tokens at once; None: 2048 on CPUs, whose cache
    #   holds them, else 16384
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # auto: bfloat16 where that is
    #   native, whose label differs in a text of a thousand. int8: on CPUs, differs in one of sixty


class Classifier:
    """A checkpoint, ready to label texts.

    Public: model, tokenizer (a tokenizers.Tokenizer, or None), label_names (empty for numbers and
    language models), modality (text, image, features), objective, multilabel, config (the settings
    of its training). dtype: torch.float32; torch.bfloat16, or on CPUs torch.int8, with which the
    model can only predict. Raises UserError.
    """

    def __init__(self, path, device="auto", dtype=torch.float32, micro_batch_tokens=None):
        self.path = checkpoint_file(path)
        checkpoint = load_checkpoint(path)
        self.device = open_device(device)
        self.dtype = dtype
        self.model = load_model(checkpoint, self.path).to(self.device)
        self.config = checkpoint["config"]
        self.step = checkpoint["step"]
        self.modality = checkpoint["kind"]
        self.max_len = checkpoint["max_len"]
        self.n_suffix = checkpoint["n_suffix"]
        self.scaling = checkpoint["scaling"]
        self.data_folder = checkpoint["data_folder"]
        self.data_sha256 = checkpoint["data_sha256"]
        self.micro_batch_tokens = max(micro_batch_tokens or 0, self.max_len)
        if not micro_batch_tokens:
            self.micro_batch_tokens = eval_tokens(self.device, self.max_len)
        self.objective = self.config.get("objective", "classify")
        self.is_language_model = self.objective != "classify"
        self.label_names = [] if self.is_language_model else checkpoint["label_names"]
        if mismatch(self.config, {"label_separator": str, "mask_prob": float}):
            raise UserError(f"{self.path}: its settings are damaged: no label_separator or "
                            "mask_prob")
        self.multilabel = bool(self.label_names) and self.config.get("target") == "labels"
        self.tokenizer = checkpoint["tokenizer"] and Tokenizer.from_str(checkpoint["tokenizer"])
        self.thresholds = self.fitted_thresholds() if self.multilabel else None
        if dtype != torch.float32:
            self.lower_precision()

    def lower_precision(self):
        """Make the model one that only predicts, where the CPU has fast products for its dtype."""
        kind = self.model.config.model
        packable = self.device.type == "cpu" and self.modality == "text" and kind == "transformer"
        if self.dtype == torch.int8:
            if not packable or not hasattr(torch.ops.onednn, "qlinear_prepack"):
                raise UserError("--dtype=int8 is for transformers of tokens on CPUs, and a torch "
                                f"with oneDNN: {self.path} is a {kind} model of {self.modality}, "
                                f"on {self.device.type}")
        elif not packable or not bf16_is_native(self.device):
            return
        cpu.quantize_for_inference(self.model, self.dtype, bf16_is_native(self.device))
        self.dtype = torch.float32  # no autocast: each layer has its own dtype

    def fitted_thresholds(self):
        """The probability from which each label is given: 0.5, or what eval.py fitted on val for
        this very checkpoint."""
        path = self.path.parent / "eval.json"
        none = np.full(len(self.label_names), 0.5)
        if not path.exists():
            return none
        try:
            report = read_json(path)
        except ValueError:
            raise UserError(f"{path} is damaged; delete it, or make it anew: python eval.py "
                            f"{self.path.parent}") from None
        if report.get("step") != self.step or report.get("label_names") != self.label_names:
            return none
        if mismatch(report, {"thresholds": list[float]}) or len(report["thresholds"]) != len(none):
            raise UserError(f"{path} holds no thresholds; delete it, or make it anew: python "
                            f"eval.py {self.path.parent}")
        return np.array(report["thresholds"])

    def logits(self, examples):
        """Logits (N, n_outputs) float32 of a data set's examples (see batches.py), in their order;
        independent of how they are batched."""
        requests = eval_requests(examples.lengths, self.micro_batch_tokens)
        out = torch.empty(len(examples), self.model.config.n_classes)
        mirror = self.modality == "image" and self.config.get("flip", False)

        def work(request):
            batch = examples.batch(*request)
            logits = run_model(self.model, batch, self.device, self.dtype, mirror)
            out[torch.from_numpy(request.indices)] = logits.cpu()
        cores = torch.get_num_threads()
        if self.device.type != "cpu" or cores == 1 or len(requests) < 4 * cores:
            for request in tqdm(requests, unit=" batches", delay=2, leave=False):
                work(request)
            return out
        # A core for each batch keeps all of them busier than all cores for one batch, many of whose
        # operations are too small to be shared.
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = pool.map(work, requests)
            list(tqdm(done, total=len(requests), unit=" batches", delay=2, leave=False))
        torch.set_num_threads(cores)
        return out

    def __call__(self, texts):
        """Texts → [{"label": str, "probability": float, "probabilities": {label: float}}, ...].

        With --target=labels, also "labels": those that reach their thresholds; "label" is these
        joined by the data's separator, "probability" that of just this set, labels taken as
        independent. Of a text the first 100·max_len characters are read: more could only count
        after words of a hundred letters.
        """
        self.check_labels_texts()
        texts = [clean(text[: 100 * self.max_len]) for text in texts]
        ids = [e.ids or [0] for e in self.tokenizer.encode_batch_fast(texts)]  # GPT-2: no [CLS]
        tokens = np.concatenate([[], *ids]).astype(np.int64)
        starts = np.cumsum([0, *map(len, ids)])
        none = np.zeros(len(ids), np.int64)
        documents = PackedText(tokens, starts, none, self.max_len, self.n_suffix)
        logits = self.logits(documents).double()
        if self.multilabel:
            return [self.label_set(p) for p in logits.sigmoid().numpy()]
        return [{"label": self.label_names[p.argmax()], "probability": float(p.max()),
                 "probabilities": dict(zip(self.label_names, p.tolist()))}
                for p in logits.softmax(1)]

    def check_labels_texts(self):
        if self.modality != "text":
            raise UserError(f"{self.path} was trained on --kind={self.modality}; only texts can be "
                            "labelled")
        if self.is_language_model:
            raise UserError(f"{self.path} is a language model; make a classifier of it with "
                            "finetune.py --init_from")

    def label_set(self, p):
        """The result of a text from its labels' probabilities (C,)."""
        given = p >= self.thresholds
        labels = [name for name, is_given in zip(self.label_names, given) if is_given]
        return {"label": self.config["label_separator"].join(labels), "labels": labels,
                "probability": float(np.where(given, p, 1 - p).prod()),
                "probabilities": dict(zip(self.label_names, p.tolist()))}

    def truth(self, y):
        """The label of a class, or of a row of a multi-hot matrix: all its labels, joined."""
        if not self.multilabel:
            return self.label_names[y]
        labels = [name for name, has in zip(self.label_names, y) if has]
        return self.config["label_separator"].join(labels)


def open_classifier(path, cfg, auto):
    """The Classifier that the settings ask for; auto: the dtype that "auto" stands for."""
    dtype = auto if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    return Classifier(path, cfg.device, dtype, cfg.micro_batch_tokens)


def open_data(clf, split, data_dir=None):
    """The split of the data set that a Classifier was trained on. Raises UserError where that is
    not there, or is another."""
    cfg = data_settings(clf.config)
    cfg.data_dir = data_dir or cfg.data_dir
    folder = Path(cfg.data_dir) / clf.data_folder
    rebuild = rebuild_command(cfg)
    meta = read_meta(folder, rebuild)
    if meta is None:
        raise UserError(f"{folder}: the checkpoint's data set is not there; give its "
                        f"--data_dir=…, or build it with: {rebuild}")
    names = [] if clf.is_language_model else meta["label_names"]
    tokenizer_sha256 = None
    if clf.tokenizer:
        tokenizer_sha256 = hashlib.sha256(clf.tokenizer.to_str().encode()).hexdigest()
    for ours, theirs, difference in (
            (clf.label_names, names, f"labels are {clf.label_names}, not {names}"),
            (tokenizer_sha256, meta.get("tokenizer_sha256"), "tokenizer differs"),
            (clf.scaling, meta["scaling"], "scaling differs"),
            (clf.data_sha256, meta["sha256"],
             "files differ: what is test now may have been train")):
        if ours != theirs:
            raise UserError(f"{clf.path} was trained on other data than {folder} is now: "
                            f"its {difference}")
    settings = {}
    if clf.is_language_model:
        settings = {"objective": clf.objective, "mask_prob": clf.config["mask_prob"]}
    return open_split(folder, meta, split, clf.max_len, rebuild, **settings)


# --------------------------------------------------------------------------------------------------
# The command line


def label_texts(clf, texts):
    """Print a line per text: its label's probability, then the others'. `-` stands for the lines of
    standard input."""
    for text in texts:
        if text != "-":
            print_label(clf, text)
            continue
        n_lines = 0
        for _, line in decoded_lines(sys.stdin.buffer, "standard input", "utf-8", 16):
            if line.strip():
                print_label(clf, line)
                n_lines += 1
        if not n_lines:
            raise UserError("standard input: holds no texts")


def print_label(clf, text):
    (result,) = clf([text])
    ranked = sorted(result["probabilities"].items(), key=lambda item: -item[1])
    labels = f"{result['label'] or 'none'}: " if clf.multilabel else ""
    probabilities = "  ".join(f"{name} {p:.4f}" for name, p in ranked)
    print(f"{labels}{probabilities}   {text.strip()[:60]}", flush=True)


def label_file(clf, cfg):
    """Write cfg.output: the label and its probability of each text of cfg.input, in order; memory
    stays flat."""
    if not cfg.output:
        raise UserError("--input needs --output=labels.csv")
    if not Path(cfg.input).is_file():
        raise UserError(f"--input={cfg.input}: no such file")
    if Path(cfg.output).resolve() == Path(cfg.input).resolve():
        raise UserError(f"--output={cfg.output} is the input, which it would replace")
    clf.check_labels_texts()
    temporary = Path(f"{cfg.output}.tmp")
    n = 0
    try:
        with open(temporary, "w", newline="", encoding="utf-8") as file, tqdm(unit=" texts") as bar:
            table = csv.writer(file)
            table.writerow(["label", "probability"])
            for chunk in chunks(text[: 100 * clf.max_len] for text in input_texts(cfg)):
                for result in clf(chunk):
                    label = result["label"]
                    if cfg.spreadsheet and label.startswith(FORMULA):
                        label = f"'{label}"
                    table.writerow([label, f"{result['probability']:.6f}"])
                n += len(chunk)
                bar.update(len(chunk))
        if not n:
            raise UserError(f"{cfg.input}: holds no texts")
        os.replace(temporary, cfg.output)
    except OSError as error:
        raise cannot_write(f"--output={cfg.output}", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{n} texts labelled: {cfg.output}")


def input_texts(cfg):
    if cfg.input.endswith((".txt", ".txt.gz")):
        opener = gzip.open if cfg.input.endswith(".gz") else open
        stream = opener(cfg.input, "rb")
        for _, line in decoded_lines(stream, cfg.input, cfg.encoding, cfg.max_row_mb):
            yield line.rstrip("\r\n")
        return
    columns = cfg.text_column if isinstance(cfg.text_column, list) else [cfg.text_column]
    source = DataConfig(text_column=columns, header=cfg.header, label_column=columns[0],
                        encoding=cfg.encoding, max_row_mb=cfg.max_row_mb)
    for _, text, _ in rows(cfg.input, source):
        yield text


def chunks(texts):
    """Lists of up to 4096 texts, or a million characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if len(chunk) == 4096 or size > 1_000_000:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def main():
    cfg = configure(Config, positional="checkpoint")
    if len(cfg.checkpoint) != 1:
        raise UserError("which checkpoint? One, for instance: python predict.py out/textcls")
    if not cfg.text and not cfg.input:
        raise UserError("which texts? Give --text=…, --text=- for the lines of standard input, or "
                        "--input=texts.csv --output=labels.csv")
    native = bf16_is_native(open_device(cfg.device))
    clf = open_classifier(cfg.checkpoint[0], cfg, torch.bfloat16 if native else torch.float32)
    if cfg.text:
        label_texts(clf, cfg.text)
    else:
        label_file(clf, cfg)


if __name__ == "__main__":
    run(main)
