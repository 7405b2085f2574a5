"""A checkpoint as a classifier, in Python and on the command line.

    python predict.py out/textcls --text="Shares fell again"        # --text=- reads lines
    python predict.py out/textcls --input=texts.csv --output=labels.csv
    python predict.py out/shakespeare_char --prompt="ROMEO:"         # see generate.py

    clf = Classifier("out/textcls")
    clf(["Shares fell again"])  # [{"label": "business", "probability": 0.98, "probabilities": …}]
"""
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configurator import UserError, configure, mismatch, read_json, run

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import cpu
from batches import eval_requests, open_split
from examples import Arrays, PackedPairs, PackedText
from format import pair_template, read_meta, special_around
from generate import print_fillings, print_samples
from labelling import label_file
from metrics import own_unit
from readers import decoded_lines
from sources import (
    data_settings,
    rebuild_command,
)
from tasks import bf16_is_native, eval_tokens, open_device, run_model
from values import clean, texts_of
from weights import (
    checkpoint_file,
    from_pretrained,
    is_huggingface,
    load_checkpoint,
    load_model,
)


@dataclass
class Config:
    checkpoint: list[str] = field(default_factory=list)  # a run's folder or a checkpoint file
    text: list[str] = field(default_factory=list, metadata={"verbatim": True})  # label this text
    #   (the option again for each); - reads lines from standard input
    text_pair: list[str] = field(default_factory=list, metadata={"verbatim": True})  # of a model of
    #   pairs: the second text to each --text
    input: str | None = None  # label the rows of this file (of any kind that data.py reads; .txt: a
    #   text a line; a folder: a text a file), in order; of pictures also "new/*.png" …
    output: str | None = None  # … into this .csv, .jsonl or .parquet: a row for each row
    # how to read input; None: as the data set of the run was read
    text_column: str | int | list[str | int] | None = None
    text_pair_column: str | int | None = None
    columns: list[str | int] | None = None  # of features
    header: bool | None = None
    encoding: str | None = None  # comma-separated: each is tried in turn
    delimiter: str | None = None
    quotechar: str | None = None
    escapechar: str | None = None
    decimal: Literal[".", ","] | None = None
    max_row_mb: int = 16  # a longer row is taken for a damaged file
    impute: bool | None = None  # of features
    resize: Literal["no", "crop", "fit"] | None = None  # of pictures of another size
    drop_bad_rows: bool = False  # True: no row in the output for a row that cannot be read, instead
    #   of stopping
    # what to write
    keep: list[str | int] = field(default_factory=list)  # columns of input to copy, such as its ids
    where: bool = False  # True: a column with each row's file and line
    probabilities: bool = False  # True: a column for the probability of each label
    spreadsheet: bool = False  # True: an apostrophe goes before what a spreadsheet would run as a
    #   formula
    # of a language model
    prompt: str | None = field(default=None, metadata={"verbatim": True})  # go on from this text
    max_new_tokens: int = 200
    temperature: float = 1.0  # lower: likelier words; 0: always the likeliest
    top_k: int | None = None  # of the k likeliest tokens only
    top_p: float | None = None  # only of the fewest likeliest tokens that make up this probability
    seed: int = 1
    num_samples: int = 1
    fill: str | None = field(default=None, metadata={"verbatim": True})  # of a masked one: the
    #   likeliest words for each [MASK] in this text
    # how to compute
    long: Literal["head", "head+tail", "windows"] = "head"  # of texts longer than max_len: the
    #   start; half of it and the end; or all of it, in windows whose logits are averaged
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

    def __init__(self, path, device="auto", dtype=torch.float32, micro_batch_tokens=None,
                 long="head"):
        self.path = checkpoint_file(path)
        checkpoint = load_checkpoint(path)
        self.device = open_device(device)
        self.dtype, self.long = dtype, long
        self.model = load_model(checkpoint, self.path).to(self.device)
        self.config = checkpoint["config"]
        self.step = checkpoint["step"]
        self.modality = checkpoint["kind"]
        self.max_len = checkpoint["max_len"]
        self.n_suffix = checkpoint["n_suffix"]
        longest = self.model.config.max_len if self.modality == "text" else self.max_len
        if not 0 <= (self.n_suffix or 0) <= self.max_len <= longest or self.max_len < 1:
            raise UserError(f"{self.path}: damaged: max_len={self.max_len} and n_suffix="
                            f"{self.n_suffix} cannot be true of a model that reads {longest}")
        if self.modality == "text":
            self.model.longest = self.max_len
        self.scaling = checkpoint["scaling"]
        self.data_folder = checkpoint["data_folder"]
        self.data_sha256 = checkpoint["data_sha256"]
        self.micro_batch_tokens = max(micro_batch_tokens or 0, self.max_len)
        if not micro_batch_tokens:
            self.micro_batch_tokens = eval_tokens(self.device, self.max_len)
        self.objective = self.config.get("objective", "classify")
        self.is_language_model = self.objective in ("mlm", "clm")
        self.label_names = [] if self.is_language_model else checkpoint["label_names"]
        if mismatch(self.config, {"label_separator": str, "mask_prob": float}):
            raise UserError(f"{self.path}: its settings are damaged: no label_separator or "
                            "mask_prob")
        self.multilabel = bool(self.label_names) and self.config.get("target") == "labels"
        self.n_cut = 0  # texts so far of which only the start was read
        self.tokenizer = None
        if self.modality == "text":
            try:
                self.tokenizer = Tokenizer.from_str(checkpoint["tokenizer"])
            except Exception as error:  # the library raises plain Exception
                raise UserError(f"{self.path}: its tokenizer is damaged: {error}") from None
        self.n_prefix = 1
        if self.config.get("template") is not None:
            self.n_prefix, _ = special_around(self.tokenizer)
        self.pair = None  # how two texts are joined, where it reads pairs
        if self.config.get("text_pair_column") is not None:
            self.pair = pair_template(self.tokenizer)
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
        if "thresholds" not in report:  # there was no val to fit them on
            return none
        if mismatch(report, {"thresholds": list[float]}) or len(report["thresholds"]) != len(none):
            raise UserError(f"{path} holds no thresholds; delete it, or make it anew: python "
                            f"eval.py {self.path.parent}")
        return np.array(report["thresholds"])

    def logits(self, examples):
        """Logits (N, n_outputs) float32 of a data set's examples (see batches.py), in their order;
        independent of how they are batched. Of windows they are averaged."""
        if examples.long == "windows":
            windows, document = examples.windows()
            total = torch.zeros(len(examples), self.model.config.n_classes)
            total.index_add_(0, document, self.logits(windows))
            return total / document.bincount(minlength=len(examples))[:, None]
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

    def __call__(self, values):
        """Texts (of a model of pairs tuples of two; or uint8 pictures (C, H, W), or rows of numbers
        (F,)) → [{"label": str, "probability": float, "probabilities": {label: float}}, ...]; where
        a number is predicted, [{"value": float}, ...].

        With --target=labels, also "labels": those that reach their thresholds; "label" is these
        joined by the data's separator, "probability" that of just this set, labels taken as
        independent.
        """
        self.check_predicts()
        logits = self.logits(self.examples(values)).double()
        if self.multilabel:
            return [self.label_set(p) for p in logits.sigmoid().numpy()]
        if not self.label_names:
            numbers = own_unit(logits[:, 0].numpy(), self.scaling)
            return [{"value": float(number)} for number in numbers]
        return [{"label": self.label_names[p.argmax()], "probability": float(p.max()),
                 "probabilities": dict(zip(self.label_names, p.tolist()))}
                for p in logits.softmax(1)]

    def examples(self, values, labels=None):
        """Values as the examples of a data set (see batches.py), with labels (N,) or none.

        Of a text of which the start is read, that is the first 100·max_len characters: more could
        only count after words of a hundred letters.
        """
        if labels is None:
            labels = np.zeros(len(values), np.int64)
        if self.modality != "text":
            values = np.stack(values)
            if self.modality == "features":
                mean, std = np.array(self.scaling["mean"]), np.array(self.scaling["std"])
                values = np.nan_to_num((values - mean) / std, nan=0.0).astype(np.float32)
            return Arrays(values, labels, len(self.label_names), self.max_len)
        if self.pair and not all(isinstance(value, tuple) for value in values):
            raise UserError(f"{self.path} reads pairs of texts: give tuples of two")
        limit = 100 * self.max_len if self.long == "head" else None
        values = [tuple(clean(text[:limit]) for text in texts_of(value)) for value in values]
        encodings = self.tokenizer.encode_batch_fast(
            values if self.pair else [text for (text,) in values])
        ids = [e.ids or [0] for e in encodings]  # GPT-2: no [CLS]
        tokens = np.concatenate([[], *ids]).astype(np.int64)
        starts = np.cumsum([0, *map(len, ids)])
        if self.long == "head":
            self.n_cut += int((np.diff(starts) > self.max_len).sum())
        common = dict(tokens=tokens, starts=starts, labels=labels, max_len=self.max_len,
                      n_prefix=self.n_prefix, n_suffix=self.n_suffix, long=self.long)
        if not self.pair:
            return PackedText(**common)
        first_lengths = np.array([e.sequence_ids.count(0) for e in encodings])
        return PackedPairs(first_lengths, self.pair, self.config["truncation"], **common)

    def check_predicts(self):
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
    return Classifier(path, cfg.device, dtype, cfg.micro_batch_tokens, cfg.long)


def open_language_model(path, device):
    """(model, tokenizer, its objective) of a run of ours, or of a Hugging Face folder of a language
    model."""
    if not is_huggingface(path):
        clf = Classifier(path, device)
        if not clf.is_language_model:
            raise UserError(f"{path} is a classifier: give --text or --input")
        return clf.model, clf.tokenizer, clf.objective
    model = from_pretrained(path, n_classes=0)
    if not model.config.causal:
        raise UserError(f"{path}: the layer before its words is not read, so it cannot fill in: "
                        "continue its training with finetune.py --objective=mlm --mask_prob=0.3")
    file = Path(path) / "tokenizer.json"
    try:
        return model, Tokenizer.from_file(str(file)), "clm"
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} cannot be read: {error}; save it with transformers' "
                        "AutoTokenizer.from_pretrained(…).save_pretrained(…)") from None


def open_data(clf, split, data_dir=None, optional=False):
    """The split of the data set that a Classifier was trained on. Raises UserError where that is
    not there (optional: None where only the split is not), or is another."""
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
    if optional and split not in meta["splits"]:
        return None
    settings = {"long": clf.long} if clf.modality == "text" else {}
    if clf.pair:
        settings["truncation"] = clf.config["truncation"]
    if clf.is_language_model:
        settings = {"objective": clf.objective, "mask_prob": clf.config["mask_prob"]}
    return open_split(folder, meta, split, clf.max_len, rebuild, **settings)


# --------------------------------------------------------------------------------------------------
# The command line


def label_texts(clf, texts, seconds, encoding):
    """Print a line per text: its label's probability, then the others'. `-` stands for the lines of
    standard input, in an encoding. seconds: of a model of pairs, the second texts."""
    if clf.pair and (len(seconds) != len(texts) or "-" in texts):
        raise UserError(f"{clf.path} reads pairs: give a --text_pair for each --text, or --input")
    if seconds and not clf.pair:
        raise UserError(f"{clf.path} reads single texts: leave --text_pair out")
    if clf.pair:
        texts = list(zip(texts, seconds))
    for text in texts:
        if text != "-":
            print_label(clf, text)
            continue
        if sys.stdin is None:
            raise UserError("--text=-: standard input is closed")
        n_lines = 0
        for _, line in decoded_lines(sys.stdin.buffer, "standard input", encoding, 16):
            if line.strip():
                print_label(clf, line)
                n_lines += 1
        if not n_lines:
            raise UserError("standard input: holds no texts")


def print_label(clf, text):
    if clf.modality != "text":
        raise UserError(f"{clf.path} reads {clf.modality}, not text: give --input")
    (result,) = clf([text])
    start = " | ".join(texts_of(text)).strip()[:60]
    if "value" in result:
        print(f"{result['value']:.6g}   {start}", flush=True)
        return
    ranked = sorted(result["probabilities"].items(), key=lambda item: -item[1])
    labels = f"{result['label'] or 'none'}: " if clf.multilabel else ""
    probabilities = "  ".join(f"{name} {p:.4f}" for name, p in ranked)
    print(f"{labels}{probabilities}   {start}", flush=True)


def main():
    cfg = configure(Config, positional="checkpoint")
    if len(cfg.checkpoint) != 1:
        raise UserError("which checkpoint? One, for instance: python predict.py out/textcls")
    asked = [cfg.prompt is not None, cfg.fill is not None, bool(cfg.text), bool(cfg.input)]
    if sum(asked) > 1:
        raise UserError("--prompt, --fill, --text and --input are four things to do: one at a time")
    if not cfg.input and (cfg.output or cfg.keep or cfg.where or cfg.probabilities):
        raise UserError("--output, --keep, --where and --probabilities are for --input")
    if cfg.prompt is not None or cfg.fill is not None:
        opened = open_language_model(cfg.checkpoint[0], cfg.device)
        if cfg.prompt is not None:
            print_samples(cfg.checkpoint[0], *opened, cfg)
        else:
            print_fillings(cfg.checkpoint[0], *opened, cfg.fill)
        return
    if not cfg.text and not cfg.input:
        raise UserError("which texts? Give --text=…, --text=- for the lines of standard input, or "
                        "--input=new.csv --output=labels.csv")
    native = bf16_is_native(open_device(cfg.device))
    clf = open_classifier(cfg.checkpoint[0], cfg, torch.bfloat16 if native else torch.float32)
    if cfg.text:
        label_texts(clf, cfg.text, cfg.text_pair, cfg.encoding or "utf-8")
    else:
        label_file(clf, cfg)


if __name__ == "__main__":
    run(main)
