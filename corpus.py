"""Text for language models, too much for one file: shards that are built in parallel.

    python data.py --dataset=web --target=none --train_file="web/*.parquet" --shards=100
    python data.py … --shards=0-9/100     # only these, on this machine; later all, to join them

A shard is a folder data_dir/<dataset>.shards/00007 with its documents' tokens. It is written whole
or not at all, and is a function of the source, the settings and its number. So what was stopped
goes on with the shards that are missing, and machines without a common disk can each build some,
whose folders are then put together. When all are there they are checked, documents that occur twice
are left out, and the data set is made of them. Memory stays flat.

Which split a document goes to is a function of its text alone, so that one that occurs twice cannot
be in both train and val.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from array import array
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from configurator import (
    UserError,
    cannot_write,
    file_sha256,
    has_changed,
    has_sha256,
    mismatch,
    read_json,
    scratch_folder,
    sweep,
    try_lock,
    write_json,
    write_text,
)

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from encoding import (
    OWN_TOKENIZERS,
    Tokens,
    Writer,
    describe_lengths,
    describe_tokenizer,
    make_tokenizer,
)
from format import FORMAT
from sources import examples_of, file_rows, members
from splits import fingerprint
from values import is_missing

VAL_FRACTION = 0.001
SAMPLE = 100_000_000  # characters that a tokenizer of our own is trained on
KEYS_AT_ONCE = 2**24  # fingerprints that are compared at once: 0.4 GiB


def is_sharded(source):
    """Does a source become shards? Raises UserError for one that cannot."""
    if source.shards is None and source.max_tokens is None:
        return False
    if source.target != "none" or source.val_file or source.test_file:
        raise UserError("--shards and --max_tokens are for text to pretrain on, of which a part "
                        "becomes val: --target=none, without --val_file and --test_file")
    if source.val_fraction is not None and not 0 <= source.val_fraction < 1:
        raise UserError(f"--val_fraction={source.val_fraction} must be from 0 to below 1")
    if source.max_tokens is not None and source.max_tokens < 1:
        raise UserError(f"--max_tokens={source.max_tokens} must be above 0")
    if (source.train_file or "").startswith("hf:"):
        raise UserError(f"--shards: {source.train_file} is no list of files; download them "
                        "(hf download … --repo-type=dataset) and name these")
    return True


def parse_shards(text):
    """"100" → (all numbers below 100, 100); "0-9/100" and "7/100" → (these, 100). Raises UserError.
    """
    found = re.fullmatch(r"(?:(\d+)(?:-(\d+))?/)?(\d+)", str(1 if text is None else text))
    first, last, n = (int(x) if x else None for x in found.groups()) if found else (0, 0, 0)
    if first is None:
        first, last = 0, (n or 0) - 1
    last = first if last is None else last
    if not 0 <= first <= last < n <= 100_000:
        raise UserError(f"--shards={text!r} is neither a number of shards, as 100, nor some of "
                        "them, as 0-9/100 or 7/100, counted from 0")
    return range(first, last + 1), n


def is_in_shards(build):
    """Do the settings that a data set was built with say that it is in shards?"""
    return bool({"shards", "max_tokens"} & build.keys())


def is_partial(shards):
    """Does a setting of --shards name some of them only?"""
    return "/" in str(shards)


def without_number(name):
    """The name of a shard's file without its number: train.bin for train-00007.bin."""
    return re.sub(r"-\d{5}(?=\.)", "", name)


# --------------------------------------------------------------------------------------------------
# What is built: the same for every shard


SHARD = {  # what shard.json holds, for configurator.mismatch
    "number": int, "facts": dict, "bad_rows": int, "splits": {"*": dict | None},
    "sha256": {"*": str}, "sources": {"*": str}, "sizes": {"*": int}}


class Plan:
    """What all shards of a corpus have in common. `facts` says it, as each shard.json holds it.

    folder: where the shards go. build: the settings that a data set depends on.
    """

    def __init__(self, source, folder, build):
        self.source, self.folder = source, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self.numbers, self.n = parse_shards(source.shards)
        found = named_files(source)
        for empty in (path for _, path, _ in found if path and not os.path.getsize(path)):
            print(f"{empty}: is empty (0 bytes)", flush=True)
        self.n_pieces = (self.n - 1) // len(found) + 1  # of each file
        self.val_fraction = source.val_fraction
        if self.val_fraction is None:
            self.val_fraction = VAL_FRACTION
        self.facts = build | {
            "val_fraction": self.val_fraction,
            "train_file": sha256(json.dumps([own + name.removeprefix(path or name)
                                             for own, path, (name, _) in found]))}
        self.tokenizer = self.open_tokenizer(found)
        self.facts["tokenizer"] = sha256(self.tokenizer)

    def open_tokenizer(self, found):
        """tokenizer.json as text; found: named_files. One of our own is trained once for these
        settings and sizes of files, on the beginning of each; where shards are there, theirs is
        taken."""
        files = [file for *_, file in found]
        sizes = [os.path.getsize(path) for _, path, _ in found if path]
        path = self.folder / f"tokenizer-{sha256(json.dumps([self.facts, sizes]))[:8]}.json"
        own = self.source.tokenizer in OWN_TOKENIZERS
        if own:
            theirs = self.tokenizer_of_shards()
            for file in self.folder.glob("tokenizer-*.json"):
                content = file.read_text(encoding="utf-8")
                if sha256(content) == theirs or not theirs and file == path:
                    return content
        trained = own and self.source.tokenizer != "bytes"
        content = make_tokenizer(self.source, self.sample(files) if trained else ()).to_str()
        if own:
            with scratch_folder(path) as work:  # other machines may write it, too
                (work / path.name).write_text(content, encoding="utf-8")
                os.replace(work / path.name, path)
        return content

    def tokenizer_of_shards(self):
        """The hash of the tokenizer of a shard that is there, or None."""
        for file in sorted(self.folder.glob("[0-9]" * 5 + "/shard.json")):
            try:
                return read_json(file)["facts"]["tokenizer"]
            except (OSError, ValueError, KeyError, TypeError):
                return None  # see shard

    def sample(self, files):
        for file in tqdm(files, desc="sampling for the tokenizer", unit=" files"):
            left = SAMPLE // len(files)
            for text in self.texts([(file, 0)], 1):
                if text and self.split_of(fingerprint(text)) == "train":
                    yield text
                    left -= len(text)
                if left < 0:
                    break

    def split_of(self, key):
        """The split of a document, by its fingerprint."""
        mixed = (key ^ self.source.split_seed) * 0x9E3779B97F4A7C15 % 2**64
        return "val" if mixed < self.val_fraction * 2**64 else "train"

    def pieces(self, number):
        """What a shard reads: a list of ((name of a file, its opener), which of its pieces). Shards
        take whole files in turn, or of fewer files every n-th row."""
        files = members(self.source.train_file, self.source.data_dir)
        pieces = [(file, piece) for file in files for piece in range(self.n_pieces)]
        return pieces[number :: self.n]

    def texts(self, pieces, n_pieces):
        """The texts of pieces of files that have n_pieces each, None for a row without one."""
        for (name, opener), piece in pieces:
            found = examples_of(file_rows(name, opener, self.source), self.source)
            for where, text, _ in itertools.islice(found, piece, None, n_pieces):
                if is_missing(text) and not self.source.drop_bad_rows:
                    raise UserError(f"{where}: the text is empty; mend the row, or leave such rows "
                                    "out with --drop_bad_rows=True")
                yield None if is_missing(text) else text

    def shard(self, number):
        """The folder of a shard and what its shard.json says, None where it is not there. Raises
        UserError for one of another corpus."""
        folder = self.folder / f"{number:05}"
        if not folder.exists():
            return folder, None
        try:
            found = read_json(folder / "shard.json")
            facts, own = found["facts"], found["number"]
            if mismatch(found, SHARD):
                raise ValueError
            differs = [key for key in self.facts if facts.get(key) != self.facts[key]]
            if not found["bad_rows"]:  # there were none to leave out
                differs = [key for key in differs if key != "drop_bad_rows"]
            differs.sort(key="tokenizer".__eq__)  # last: other settings make another one
        except (OSError, ValueError, KeyError, AttributeError):
            raise UserError(f"{folder} is not a whole shard (no readable shard.json), or one of an "
                            "older version: delete it, and the same command builds it anew"
                            ) from None
        if own != number:
            raise UserError(f"{folder} holds shard {own}, not {number}: name it {own:05}, or "
                            "delete it, and the same command builds what is missing")
        if differs:
            key = differs[0]
            what = {"tokenizer": "another tokenizer", "train_file": "other files"}.get(
                key, f"{key}={facts.get(key)!r}, not {self.facts[key]!r}")
            raise UserError(f"{folder} was built with {what}: go on with what it was begun with, "
                            f"or delete {self.folder}")
        return folder, found

    def stale_shards(self, shards, read_all=False):
        """{folder: a file that has changed since the shard was built from it} of (folder, what
        shard.json says). read_all: also files that have not been touched are compared."""
        here = source_files(self.source)
        hash_of = functools.cache(file_sha256)
        stale = {}
        for folder, found in shards:
            built = os.path.getmtime(folder / "shard.json")
            for name, sha in found["sources"].items():
                if not (path := here.get(name)):
                    continue
                touched = read_all or os.path.getmtime(path) > built
                other_size = os.path.getsize(path) != found["sizes"][name]
                if other_size or touched and hash_of(path) != sha:
                    stale[folder] = path
        return stale

    def remove_useless(self, numbers):
        """Remove shards that would be built otherwise now, and the tokenizer if none is left.
        Returns whether something was removed."""
        useless, shards = [], []
        for number in numbers:
            try:
                folder, found = self.shard(number)
                shards += [(folder, found)] if found else []
            except UserError:
                useless.append(self.folder / f"{number:05}")
        useless += self.stale_shards(shards, read_all=True)
        for folder in useless:
            shutil.rmtree(folder, ignore_errors=True)
        none_left = not list(self.folder.glob("[0-9]" * 5))
        if none_left:
            remove_shards(self.folder)
        return none_left or bool(useless)

    def check_sources_of(self, numbers):
        """Raise UserError if a file of the source has changed since shards were built from it, or
        if two shards were built from different versions of one."""
        shards = [(folder, found) for folder, found in map(self.shard, numbers) if found]
        if stale := self.stale_shards(shards):
            names = ", ".join(sorted(folder.name for folder in stale)[:100])
            files = ", ".join(sorted(set(stale.values()))[:5])
            raise UserError(f"{files} has changed since shards {names} were built from it: delete "
                            f"these folders in {self.folder}, and the same command builds them "
                            "anew, as it does with --overwrite=True")
        seen = {}
        for folder, found in shards:
            for name, sha in found["sources"].items():
                seen.setdefault(name, {}).setdefault(sha, folder)
        for name, folders in seen.items():
            if len(folders) > 1:
                first, other, *_ = folders.values()
                raise UserError(f"{first} and {other} were built from different versions of {name}:"
                                " delete the shards of the one that you do not want, and the same "
                                "command builds them anew")


def named_files(source):
    """A source's files as (own name, path, (name, opener)). path: where it lies, an archive for
    instance; None where it was downloaded. The own name is the path without the folder that all of
    them lie in, which each machine may call otherwise."""
    found = []
    parts = source.train_file.split(" + ")
    for number, part in enumerate(parts):
        files = members(part, source.data_dir)
        if part.startswith(("pypi:", "https://", "http://")):
            found += [(f"{part}!{file[0]}", None, file) for file in files]
            continue
        paths = [name if os.path.isfile(name) else name.partition("!")[0] for name, _ in files]
        common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        for path, file in zip(paths, files):
            own = os.path.relpath(os.path.abspath(path), common)
            found.append((f"{number}: {own}" if parts[1:] else own, path, file))
    return found


def source_files(source):
    """The files on this machine that a source lies in: {own name: path}."""
    return {own: path for own, path, _ in named_files(source) if path}


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Shards, each by itself


def build_shards(plan):
    """Build the shards that are asked for and not there, on all cores."""
    plan.check_sources_of(plan.numbers)
    missing = [number for number in plan.numbers if not plan.shard(number)[1]]
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    n_processes = min(len(missing), n_cores)
    print(f"{plan.folder}: {len(plan.numbers) - len(missing)} of {len(plan.numbers)} shards are "
          f"there; {len(missing)} to build, in {n_processes} processes", flush=True)
    if n_processes < 2:
        for number in missing:
            build_shard(plan, number, progress=True)
        return
    context = multiprocessing.get_context("spawn")
    with (handling(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)),
          ProcessPoolExecutor(n_processes, context, begin_worker, (os.getpid(),)) as pool):
        try:
            with handling(signal.SIGINT, signal.SIG_IGN):  # which processes that start here keep
                found = [pool.submit(build_shard, plan, number) for number in missing]
            for done in tqdm(as_completed(found), total=len(found), desc="shards"):
                done.result()
        except BrokenProcessPool:
            raise UserError(f"{plan.folder}: a process was killed, perhaps for want of memory; the "
                            "same command goes on with the shards that are missing") from None
        except BaseException:  # Ctrl-C, or what went wrong in one of them
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            for number in missing:
                sweep(plan.shard(number)[0])


def begin_worker(parent):
    """Make ready a process that builds shards: it ends when its parent does."""
    tqdm.set_lock(threading.RLock())  # tqdm's is a semaphore, which a killed process would leak

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def handling(number, handler):
    """Within, a signal is handled so. (Only the main thread gets any.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def build_shard(plan, number, progress=False):
    """Write a shard's folder: {train,val}.bin and .idx, as batches.py has them; .key, uint64
    (N, 2), the fingerprint of each document and its bytes; and shard.json."""
    folder, _ = plan.shard(number)
    encode = Tokens(Tokenizer.from_str(plan.tokenizer))
    pieces = plan.pieces(number)
    max_tokens = plan.source.max_tokens
    n_bad = 0
    with scratch_folder(folder) as scratch:
        work = scratch / "new"
        work.mkdir()
        writers = {split: Writer(work / split, encode, {}, "none") for split in ("train", "val")}
        keys = {split: array("Q") for split in writers}
        for text in tqdm(plan.texts(pieces, plan.n_pieces), desc=f"shard {number}",
                         disable=not progress, unit=" texts"):
            if text is None:
                n_bad += 1
                continue
            key = fingerprint(text)
            split = plan.split_of(key)
            keys[split].extend((key, writers[split].add(text, 0)))
            if max_tokens and has_tokens(writers.values(), max_tokens / plan.n):
                break
        splits = {}
        for split, writer in writers.items():
            splits[split] = writer.close(0) if keys[split] else None
            np.array(keys[split], np.uint64).tofile(work / f"{split}.key")
        hashes = {file.name: file_sha256(file) for file in sorted(work.iterdir())}
        read = {name for (name, _), _ in pieces}
        files = {own: path for own, path, (name, _) in named_files(plan.source)
                 if path and name in read}
        write_json(work / "shard.json", {
            "number": number, "facts": plan.facts, "bad_rows": n_bad, "splits": splits,
            "sha256": hashes, "sources": {own: file_sha256(path) for own, path in files.items()},
            "sizes": {own: os.path.getsize(path) for own, path in files.items()}})
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def has_tokens(writers, n):
    """Do writers hold n tokens or more? What waits in them is encoded as soon as it could do, as
    hardly a character is more than one token."""
    n_characters = sum(writer.size for writer in writers)
    if sum(writer.n_written for writer in writers) + n_characters < n:
        return False
    for writer in writers:
        writer.flush()
    return sum(writer.n_written for writer in writers) >= n


# --------------------------------------------------------------------------------------------------
# Shards become a data set


def join(plan, work, build):
    """Make the data set of all shards in folder `work`; returns its meta. build: the settings that
    it depends on."""
    shards = [plan.shard(number) for number in range(plan.n)]
    missing = [str(number) for number, (_, found) in enumerate(shards) if not found]
    if missing:
        raise UserError(f"{plan.folder}: of {plan.n} shards {len(missing)} are missing "
                        f"({', '.join(missing[:10])}): build them with --shards={missing[0]}/"
                        f"{plan.n}, or all with --shards={plan.n}")
    plan.check_sources_of(range(plan.n))
    for folder, found in tqdm(shards, desc="checking", unit=" shards"):
        for name, expected in found["sha256"].items():
            if not has_sha256(folder / name, expected):
                raise UserError(f"{folder / name} is missing, truncated or altered: delete "
                                f"{folder}, and the same command builds it anew")
    splits, hashes, n_twice = {}, {}, 0
    for split in ("train", "val"):
        parts = [(folder, found) for folder, found in shards if found["splits"][split]]
        if parts:
            splits[split], n_left_out, of_files = join_split(split, parts, plan.source.dedup, work)
            n_twice += n_left_out
            hashes |= of_files
    n_bad = sum(found["bad_rows"] for _, found in shards)
    if "train" not in splits:
        hint = f"but {n_bad} bad rows (is --text_column the right one?)" if n_bad else "nor any row"
        raise UserError(f"{plan.source.train_file}: holds no texts for train, {hint}; before "
                        f"another try delete {plan.folder}")
    if "val" not in splits and plan.val_fraction:
        print(f"no text fell to val, of which it gets {plan.val_fraction}: for one, build anew "
              "with more of it (--val_fraction), or --lines=True if each line of a .txt is a text",
              flush=True)
    write_text(work / "tokenizer.json", plan.tokenizer)
    tokenizer = Tokenizer.from_str(plan.tokenizer)
    hashes["tokenizer.json"] = sha256(plan.tokenizer)
    meta = {
        "format": FORMAT, "kind": "text", "task": "none", "dataset": plan.source.dataset,
        "label_names": [], "dtype": Tokens(tokenizer).dtype, "shape": [], "scaling": {},
        "vocab_size": tokenizer.get_vocab_size(),
        "build": build | {"val_fraction": plan.val_fraction},
        "source": {"train": plan.source.train_file}, "overlaps": {}, "source_sha256": {
            name: sha for _, found in shards for name, sha in found["sources"].items()},
        "removed": {"bad_rows": n_bad, "duplicates": n_twice},
        "conflicting_labels": 0, "splits": splits, "sha256": hashes,
        "tokenizer_sha256": hashes["tokenizer.json"], **describe_tokenizer(tokenizer, plan.source)}
    write_json(work / "meta.json", meta)
    return meta


def check_sources(source, meta, folder):
    """Raise UserError if files of a source that are here are others than those that the data set in
    a folder was built from. Files that have not been touched since are not read."""
    built = os.path.getmtime(folder / "meta.json")
    try:
        here = source_files(source)
    except UserError:
        return  # the sources are elsewhere
    for name, expected in meta["source_sha256"].items():
        path = here.get(name, "")
        if has_changed(path, built, expected):
            raise UserError(f"{path} has changed since {folder} was built from it: delete {folder},"
                            " and the same command builds it anew")


def remove_shards(folder):
    """Remove what build_shards made in a folder."""
    for path in folder.glob("[0-9]" * 5):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("tokenizer-*.json"):
        path.unlink()


@contextlib.contextmanager
def only_one(folder):
    """Holds a folder of shards, which is made, against other processes that build all of them.
    Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = try_lock(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if descriptor is None:
        raise UserError(f"{folder}: another process is building these shards; wait for its end")
    try:
        yield
    finally:
        os.close(descriptor)


def join_split(split, parts, dedup, work):
    """Make a split of its shards, a list of (folder, what shard.json says): returns (its entry in
    meta.json, how many documents are left out as duplicates, {file: SHA-256})."""
    paths = [folder / f"{split}.key" for folder, _ in parts]
    repeated = find_repeated(paths) if dedup else [None] * len(parts)
    lengths, hashes = [], {}
    n_bytes = n_repeated = 0
    for i, ((folder, found), twice) in enumerate(zip(parts, repeated)):
        starts = np.fromfile(folder / f"{split}.idx", np.int64)
        sizes = np.fromfile(folder / f"{split}.key", np.uint64).reshape(-1, 2)[:, 1]
        spans = np.stack((starts[:-1], starts[1:]), 1)
        if twice is not None:
            spans = spans[~twice]
            sizes = sizes[~twice]
            n_repeated += int(twice.sum())
        spans.tofile(work / f"{split}-{i:05}.idx")
        link(folder / f"{split}.bin", work / f"{split}-{i:05}.bin")
        lengths.append(np.diff(spans)[:, 0])
        n_bytes += int(sizes.sum())
        hashes[f"{split}-{i:05}.bin"] = found["sha256"][f"{split}.bin"]
        hashes[f"{split}-{i:05}.idx"] = file_sha256(work / f"{split}-{i:05}.idx")
    lengths = np.concatenate(lengths)
    counts = {"examples": len(lengths), **describe_lengths(lengths), "bytes": n_bytes,
              "shards": [found["splits"][split]["tokens"] for _, found in parts]}
    return counts, n_repeated, hashes


def link(file, name):
    """A second name for a file, or where the file system has none a copy."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def find_repeated(paths):
    """Of .key files, which of their documents occurred before, in them or in an earlier one: a list
    of bool (N,)."""
    sizes = [os.path.getsize(path) // 16 for path in paths]
    repeated = [np.zeros(size, bool) for size in sizes]
    n_passes = sum(sizes) // KEYS_AT_ONCE + 1
    for number in range(n_passes):  # each compares the keys that leave this remainder
        keys, files, rows = [], [], []
        for i, path in enumerate(paths):
            found = np.fromfile(path, np.uint64).reshape(-1, 2)[:, 0]
            chosen = np.flatnonzero(found % np.uint64(n_passes) == number)
            keys.append(found[chosen])
            rows.append(chosen)
            files.append(np.full(len(chosen), i))
        rows, files = np.concatenate(rows), np.concatenate(files)
        _, first = np.unique(np.concatenate(keys), return_index=True)
        again = np.ones(len(rows), bool)
        again[first] = False
        for i in np.unique(files[again]):
            repeated[i][rows[again & (files == i)]] = True
    return repeated
