"""Text in shards: what is built does not depend on how; training reads all of it, and no more."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

from configurator import UserError

import numpy as np
import pyarrow
import pytest
from conftest import ROOT, interrupted
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers

import corpus
import data
import encoding
import language
import train
from batches import GlobalBatches, open_split
from sources import DataConfig
from tests.forks import script
from weights import load_checkpoint

WORDS = "goal match chip code laptop shares bank profit the a of and on in it was".split()


def documents(n, seed):
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=rng.randint(3, 40)))} {seed}-{i}." for i in range(n)]


def write_parts(folder, n_files=6, n=40):
    """Files of documents, of which the first of each stands in the file before, too. Returns all
    different documents."""
    folder.mkdir()
    everything = []
    for i in range(n_files):
        texts = documents(n, i)
        both = texts + everything[-1:]
        everything += texts
        lines = "".join(json.dumps({"text": text}) + "\n" for text in both)
        (folder / f"part-{i}.jsonl").write_text(lines)
    return everything


@pytest.fixture
def web(tmp_path):
    """(settings of a corpus in shards, its different documents)."""
    texts = write_parts(tmp_path / "web")
    return DataConfig(
        dataset="web",
        train_file=str(tmp_path / "web/*.jsonl"),
        target="none",
        tokenizer="bytes",
        lowercase=False,
        shards=6,
        val_fraction=0.1,
        data_dir=str(tmp_path / "data"),
    ), texts


def texts_of(cfg, split, meta=None):
    folder = data.folder_of(cfg)
    meta = meta or data.open_meta(cfg)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    blocks = open_split(folder, meta, split, 16, "", objective="clm")
    return [tokenizer.decode(blocks.tokens[a:b].tolist()) for a, b in blocks.spans]


def files_in(folder):
    """{name: content}, of meta.json without where the source lay."""
    found = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    meta = json.loads(found.pop("meta.json"))
    for key in ("checksum", "source", "build"):
        del meta[key]
    return found | {"meta": meta}


def test_every_document_is_in_one_split_once(web):
    cfg, texts = web
    meta = data.build(cfg)
    found = {split: texts_of(cfg, split) for split in meta["splits"]}
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    assert 5 < len(found["val"]) < 50 and list(meta["splits"]) == ["train", "val"]
    assert meta["removed"] == {"bad_rows": 0, "duplicates": 5}
    for split, kept in found.items():
        counts = meta["splits"][split]
        assert counts["examples"] == len(kept)
        assert counts["bytes"] == sum(len(text.encode()) for text in kept)
        assert counts["tokens"] == counts["bytes"] + len(kept)  # and a [CLS] each


@pytest.mark.parametrize("keys_at_once", [10, 2**24])
def test_repeated_documents_are_found_in_passes_as_at_once(web, monkeypatch, keys_at_once):
    cfg, texts = web
    monkeypatch.setattr(corpus, "KEYS_AT_ONCE", keys_at_once)
    data.build(cfg)
    assert sorted(texts_of(cfg, "train") + texts_of(cfg, "val")) == sorted(texts)


def test_shards_are_the_same_however_they_are_built(web, tmp_path):
    """In one process, in two, some here and some elsewhere, and after a kill."""
    cfg, _ = web
    data.build(cfg)  # in as many processes as there are cores
    whole = files_in(data.folder_of(cfg))

    alone = replace(cfg, data_dir=str(tmp_path / "alone"))
    for part in ("0-1/6", "5/6", "2-4/6"):
        plan = data.build_shards(replace(alone, shards=part))
        for number in plan.numbers:
            os.utime(plan.folder / f"{number:05}", (1, 1))
    data.build(alone)
    assert files_in(data.folder_of(alone)) == whole
    assert not plan.folder.exists()

    shutil.copytree(tmp_path / "web", tmp_path / "elsewhere")  # another machine, without our disk
    there = replace(
        cfg, data_dir=str(tmp_path / "there"), train_file=str(tmp_path / "elsewhere/*.jsonl")
    )
    here = replace(cfg, data_dir=str(tmp_path / "here"))
    plan = data.build_shards(replace(there, shards="3-5/6"))
    other = data.build_shards(replace(here, shards="0-2/6"))
    for number in plan.numbers:
        shutil.copytree(plan.folder / f"{number:05}", other.folder / f"{number:05}")
    data.build(here)
    assert files_in(data.folder_of(here)) == whole


def test_a_kill_loses_only_the_shards_at_work(web, tmp_path):
    cfg, _ = web
    cfg = replace(cfg, data_dir=str(tmp_path / "killed"))
    code = (
        "import sys, os, corpus, data; from sources import DataConfig\n"
        "link = os.rename\n"
        "def rename(a, b):\n"
        "    if str(b).endswith('00003'): os._exit(9)\n"
        "    link(a, b)\n"
        "os.rename = rename\n"
        f"data.build_shards(DataConfig(**{vars(cfg)!r}))"
    )
    one_core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    done = subprocess.run([*one_core, sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    shards = Path(f"{data.folder_of(cfg)}.shards")
    left = sorted(f.name for f in shards.iterdir() if f.is_dir() and f.name[0] != ".")
    assert done.returncode == 9 and left == ["00000", "00001", "00002"]
    before = {name: (shards / name / "shard.json").stat().st_mtime_ns for name in left}
    plan = data.build_shards(cfg)
    after = {name: (plan.folder / name / "shard.json").stat().st_mtime_ns for name in left}
    assert before == after
    data.build(cfg)
    whole = replace(cfg, data_dir=str(tmp_path / "whole"))
    data.build(whole)
    assert files_in(data.folder_of(cfg)) == files_in(data.folder_of(whole))


def test_more_shards_than_files_share_their_rows(web):
    cfg, texts = web
    cfg = replace(cfg, shards=13)
    data.build(cfg)
    assert sorted(texts_of(cfg, "train") + texts_of(cfg, "val")) == sorted(texts)


def test_max_tokens_is_kept(web):
    cfg, _ = web
    whole = data.build(cfg)["splits"]["train"]["tokens"]
    for n in (1, 700, 5000):
        meta = data.build(replace(cfg, dataset=f"of{n}", shards=2, max_tokens=n))
        found = sum(counts["tokens"] for counts in meta["splits"].values())
        assert n <= found <= n + 2 * 300 < whole  # a document more in each shard
    for changes in (dict(max_tokens=6), dict(max_tokens=None), dict(shards=None)):
        (key,) = changes
        with pytest.raises(UserError, match=f"was built with {key}="):
            data.open_meta(replace(cfg, dataset="of1", **dict(shards=2, max_tokens=1) | changes))
    with pytest.raises(UserError, match="--max_tokens=0 must be above 0"):
        data.build(replace(cfg, dataset="none", max_tokens=0))


def test_compressed_files_hold_the_same(web, tmp_path):
    cfg, _ = web
    data.build(cfg)
    packed = tmp_path / "packed"
    packed.mkdir()
    for i, file in enumerate(sorted((tmp_path / "web").iterdir())):
        content = file.read_bytes()
        if i % 2:
            (packed / f"{file.name}.gz").write_bytes(gzip.compress(content))
        else:
            zst = pyarrow.compress(content, codec="zstd", asbytes=True)
            (packed / f"{file.name}.zst").write_bytes(zst)
    other = replace(cfg, dataset="packed", train_file=f"{packed}/*.jsonl.*")
    data.build(other)
    assert texts_of(other, "train") == texts_of(cfg, "train")
    (packed / "part-0.jsonl.zst").write_bytes(zst[:-20])
    with pytest.raises(UserError, match=r"part-0.jsonl.zst: cannot be read: Truncated"):
        data.build(replace(other, dataset="torn"))


def test_a_tokenizer_of_our_own_is_trained_once_on_train(web):
    cfg, texts = web
    cfg = replace(cfg, tokenizer="bpe", vocab_size=300)
    data.build(cfg)
    assert sorted(texts_of(cfg, "train") + texts_of(cfg, "val")) == [
        " " + text for text in sorted(texts)
    ]


def test_a_tokenizer_of_other_settings_is_not_taken(web):
    cfg, _ = web
    cfg = replace(cfg, tokenizer="bpe", vocab_size=300)
    plan = corpus.Plan(cfg, data.folder_of(cfg).with_name("web.shards"), data.build_settings(cfg))
    assert Tokenizer.from_str(plan.tokenizer).get_vocab_size() == 300
    assert data.build(replace(cfg, vocab_size=280))["vocab_size"] == 280


GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+", True)  # fmt: skip
PAIRS_OF_WORDS = (r"\p{L}+ \p{L}+|\s+|\S+", False)  # joins over blanks, so pieces must not be used


@pytest.mark.parametrize("pattern,by_pieces", [GPT2, LLAMA3, PAIRS_OF_WORDS, (None, True)])
def test_ids_by_pieces_are_the_librarys(pattern, by_pieces):
    rng = random.Random(0)
    odd = [
        *"abc AB  \n\t'.,1²½_-é\u0301\u00a0\u3000\x85中İΣσ<>😀",
        "'s",
        "'LL",
        " the",
        "\r\n",
        "[MASK]",
    ]
    texts = documents(200, 0) + [
        "".join(rng.choices(odd, k=rng.randint(0, 15))) for _ in range(3000)
    ]
    cfg = DataConfig(tokenizer="bpe", vocab_size=600, target="none", train_file="x")
    tokenizer = encoding.train_tokenizer(cfg, texts)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=600, special_tokens=["[CLS]", "[MASK]"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    encode = encoding.Tokens(tokenizer)
    assert list(encode(texts)) == [tokenizer.encode(text).ids or [0] for text in texts]
    assert (encode.pieces is not None) == by_pieces


def test_what_is_looked_up_is_bounded(monkeypatch):
    monkeypatch.setattr(encoding.Pieces, "MOST_BYTES", 1e5)
    cfg = DataConfig(tokenizer="bpe", vocab_size=600, target="none", train_file="x")
    encode = encoding.Tokens(encoding.train_tokenizer(cfg, documents(50, 0)))
    long = [f"{i}" * 200 for i in range(100, 400)] + ["a" * 5000]
    assert list(encode(long)) == [encode.tokenizer.encode(text).ids for text in long]
    assert 0 < len(encode.pieces) < 40 and encode.pieces.n_bytes < 2e5


# --------------------------------------------------------------------------------------------------
# Training


def trained(cfg):
    """The weights that a run ends in."""
    train.train(cfg)
    return load_checkpoint(f"{cfg.out_dir}/last.pt")["model"]


def run_settings(cfg, tmp_path, **changes):
    tiny = dict(max_len=16, n_layer=1, n_head=2, d_model=16, batch_size=8, epochs=1.0)
    run = dict(out_dir=str(tmp_path / "out"), wandb_mode="disabled", dtype="float32")
    return train.Config(**vars(cfg) | tiny | run | {"objective": "clm"} | changes)


def test_training_on_shards_is_that_on_one_file(web, tmp_path):
    """The same documents in the same order, in a data set that is not in shards."""
    cfg, _ = web
    data.build(cfg)
    weights = trained(run_settings(cfg, tmp_path))
    folder = data.folder_of(cfg)
    meta = data.open_meta(cfg)
    plain = tmp_path / "plain"
    plain.mkdir()
    for split in ("train", "val"):
        blocks = open_split(folder, meta, split, 16, "", objective="clm")
        parts = [blocks.tokens[a:b] for a, b in blocks.spans]
        np.concatenate(parts).tofile(plain / f"{split}.bin")
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        starts.tofile(plain / f"{split}.idx")
        del meta["splits"][split]["shards"]
    shutil.copy(folder / "tokenizer.json", plain)
    meta["sha256"] = {f.name: data.file_sha256(f) for f in plain.iterdir()}
    data.write_json(plain / "meta.json", {k: v for k, v in meta.items() if k != "checksum"})
    shutil.rmtree(folder)
    plain.rename(folder)
    again = trained(run_settings(cfg, tmp_path, out_dir=str(tmp_path / "again")))
    assert weights.keys() == again.keys() and all((weights[k] == again[k]).all() for k in weights)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_model_of_shards_is_evaluated(web, tmp_path, objective):
    cfg, _ = web
    more = {"mask_prob": 0.3} if objective == "mlm" else {}
    trained(run_settings(cfg, tmp_path, objective=objective, **more))
    done = script("eval.py", str(tmp_path / "out"), split="val", wandb_mode="disabled")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in (tmp_path / "out/eval.json").read_text()


def mixture(web, tmp_path, shares="web:0.75,books:0.25"):
    cfg, _ = web
    data.build(cfg)
    write_parts(tmp_path / "books", n_files=2, n=7)
    other = replace(cfg, dataset="books", train_file=str(tmp_path / "books/*.jsonl"), shards=2)
    data.build(other)
    return run_settings(cfg, tmp_path, mix=shares), other


def test_a_mixture_has_the_shares_that_were_asked_for(web, tmp_path):
    cfg, other = mixture(web, tmp_path)
    seen = []
    blocks = language.Mixture.block

    def spy(self, i, epoch=None):
        ids, targets = blocks(self, i, epoch)
        seen.append((i >= self.ends[0], len(ids), i, epoch))
        return ids, targets

    language.Mixture.block, epochs = spy, 6
    try:
        trained(replace(cfg, epochs=float(epochs)))
    finally:
        language.Mixture.block = blocks
    n_tokens = [sum(n for b, n, *_ in seen if b == books) for books in (False, True)]
    assert n_tokens[1] / sum(n_tokens) == pytest.approx(0.25, abs=0.01)
    times = {}
    for _, _, i, epoch in seen:  # no block twice in an epoch of its corpus
        times[i, int(epoch)] = times.get((i, int(epoch)), 0) + 1
    assert set(times.values()) == {1} and max(epoch for _, epoch in times) > epochs


def test_a_mixture_that_may_leak_val_says_so(web, tmp_path, capsys):
    cfg, other = mixture(web, tmp_path)
    data.open_mix(cfg, data.open_meta(cfg))
    assert "--mix" not in capsys.readouterr().out
    data.build(replace(other, val_fraction=0.01, overwrite=True))
    data.open_mix(cfg, data.open_meta(cfg))
    assert "texts of val may be in its train" in capsys.readouterr().out


def test_a_batch_of_a_mixture_is_a_function_of_seed_and_step(web, tmp_path):
    cfg, _ = mixture(web, tmp_path)
    settings = dict(objective="clm", max_len=16, rebuild="")
    parts = [open_split(*part, "train", seed=1, **settings) for part, _ in data.open_mix(
        cfg, data.open_meta(cfg))]  # fmt: skip
    mixed = language.Mixture(parts, [0.75, 0.25])

    def batches(start, stop, world):
        """Of each step, the (block, epoch) of all processes."""
        samplers = [GlobalBatches(mixed, 8, 64, 1, start, stop, r, world) for r in range(world)]
        found = []
        for of_ranks in zip(*samplers):
            requests = [request for requests in of_ranks for request in requests]
            pairs = [pair for r in requests for pair in zip(r.indices.tolist(), r.epoch.tolist())]
            found.append(sorted(pairs))
        return found

    whole = batches(0, 200, 1)
    assert batches(150, 200, 1) == whole[150:] and batches(0, 200, 2) == whole
    assert all(len(batch) == 8 for batch in whole[:10])


def test_a_mixture_is_resumed_bit_for_bit(web, tmp_path):
    cfg, _ = mixture(web, tmp_path)
    whole = trained(replace(cfg, max_steps=30, out_dir=str(tmp_path / "whole")))
    cfg = replace(cfg, max_steps=30, save_interval=5)
    with interrupted(17):
        train.train(cfg)
    assert load_checkpoint(f"{cfg.out_dir}/last.pt")["step"] == 15
    again = trained(cfg)
    assert all((whole[k] == again[k]).all() for k in whole)


def test_a_mixture_that_has_changed_is_noticed(web, tmp_path):
    cfg, other = mixture(web, tmp_path)
    cfg = replace(cfg, max_steps=30, save_interval=5)
    with interrupted(7):
        train.train(cfg)
    file = tmp_path / "books/part-1.jsonl"
    file.write_text(file.read_text().replace("goal", "aims"))
    os.utime(file, (4e9, 4e9))
    with pytest.raises(UserError, match="books/part-1.jsonl has changed since .*books-"):
        train.train(cfg)
    data.build(replace(other, overwrite=True))
    os.utime(file, (1e9, 1e9))
    with pytest.raises(UserError, match="a data set of it was built anew"):
        train.train(cfg)


def test_a_rebuild_that_was_stopped_goes_on(web, tmp_path):
    """By its own command; what would be the same again is not built twice."""
    cfg, _ = web
    data.build(cfg)
    file = tmp_path / "web/part-3.jsonl"
    file.write_text(file.read_text().replace("goal", "aims"))
    again = replace(cfg, overwrite=True)
    data.build_shards(replace(again, shards="2-3/6"))
    done = data.shards_folder(cfg) / "00003/shard.json"
    before = done.stat().st_mtime_ns
    plan = data.build_shards(again)
    assert done.stat().st_mtime_ns == before
    file.write_text(file.read_text().replace("aims", "hits"))
    os.utime(file, (1e9, 1e9))  # of the same size, and not touched, as it seems
    first = data.shards_folder(cfg) / "00000/shard.json"
    kept = first.stat().st_mtime_ns
    data.build_shards(again)
    assert done.stat().st_mtime_ns != before and first.stat().st_mtime_ns == kept
    meta = data.build(again)
    found = texts_of(cfg, "train", meta) + texts_of(cfg, "val", meta)
    assert any("hits" in text for text in found) and not any("aims" in text for text in found)
    assert not plan.folder.exists()


# --------------------------------------------------------------------------------------------------
# What is refused


def test_damaged_shards_are_refused_by_name(web):
    cfg, _ = web
    plan = data.build_shards(replace(cfg, shards="0-4/6"))
    with pytest.raises(UserError, match=r"of 6 shards 1 are missing \(5\).*--shards=5/6"):
        corpus.join(plan, plan.folder, {})
    (plan.folder / "00002/shard.json").write_text("{")
    with pytest.raises(UserError, match="00002 is not a whole shard"):
        data.build(cfg)
    shutil.rmtree(plan.folder / "00002")
    path = plan.folder / "00003/train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"00003/train.bin is missing, truncated or altered"):
        data.build(cfg)
    shutil.rmtree(plan.folder / "00003")
    with pytest.raises(UserError, match="was built with lowercase=False, not True"):
        data.build(replace(cfg, lowercase=True))
    data.build(cfg)


def test_a_shard_in_anothers_place_is_refused(web):
    cfg, _ = web
    plan = data.build_shards(replace(cfg, shards="0-4/6"))
    shutil.copytree(plan.folder / "00004", plan.folder / "00005")
    with pytest.raises(UserError, match="00005 holds shard 4, not 5"):
        data.build(cfg)


def test_sources_that_change_are_noticed(web, tmp_path):
    """While shards are built and after, of the same size or not; touching them is no change."""
    cfg, texts = web
    plan = data.build_shards(replace(cfg, shards="0-2/6"))
    file = tmp_path / "web/part-1.jsonl"
    content = file.read_text()
    file.write_text(content)
    data.build_shards(replace(cfg, shards="0-4/6"))
    file.write_text(content.replace("goal", "aims"))
    os.utime(file, (4e9, 4e9))
    with pytest.raises(UserError, match="part-1.jsonl has changed since shards 00001 were built"):
        data.build(cfg)
    shutil.rmtree(plan.folder / "00001")
    data.build(cfg)
    assert data.open_meta(cfg)
    os.utime(file, (4e9, 4e9))
    assert data.open_meta(cfg)
    file.write_text(content)
    os.utime(file, (4e9, 4e9))
    with pytest.raises(UserError, match="part-1.jsonl has changed since .*web-bytes was built"):
        data.open_meta(cfg)
    data.build(replace(cfg, overwrite=True))
    assert sorted(texts_of(cfg, "train") + texts_of(cfg, "val")) == sorted(texts)


def test_shards_of_different_files_are_not_joined(web, tmp_path):
    """Of one name, size and time, as another machine may have them."""
    cfg, _ = web
    cfg = replace(cfg, shards=12)
    data.build_shards(replace(cfg, shards="0/12"))
    file = tmp_path / "web/part-0.jsonl"
    file.write_text(file.read_text().replace("goal", "aims"))
    os.utime(file, (1e9, 1e9))
    with pytest.raises(
        UserError, match="00000 and .*00001 were built from different versions of part-0"
    ):
        data.build(cfg)


def test_a_zip_archive_that_changes_is_noticed(web, tmp_path):
    cfg, _ = web
    path = str(tmp_path / "web/part-0.zip")
    cfg = replace(cfg, train_file=f"{path}!*.jsonl", shards=2)

    def pack(names):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.write(tmp_path / "web" / name, "part.jsonl")

    pack(["part-0.jsonl"])
    data.build_shards(replace(cfg, shards="0/2"))
    pack(["part-1.jsonl"])
    with pytest.raises(UserError, match="part-0.zip has changed since shards 00000 were built"):
        data.build(cfg)
    data.build_shards(replace(cfg, shards="0/2", overwrite=True))
    meta = data.build(cfg)
    assert list(meta["source_sha256"]) == ["part-0.zip"]


def test_files_of_one_name_in_two_folders_are_told_apart(web, tmp_path):
    cfg, texts = web
    for i in range(2):
        (tmp_path / f"web/{i}").mkdir()
        (tmp_path / f"web/part-{i}.jsonl").rename(tmp_path / f"web/{i}/part.jsonl")
    cfg = replace(cfg, train_file=str(tmp_path / "web/*/part.jsonl"), shards=2)
    data.build_shards(replace(cfg, shards="0/2"))
    for i in range(2):
        os.utime(tmp_path / f"web/{i}/part.jsonl", (4e9, 4e9))
    data.build(cfg)
    assert data.open_meta(cfg)
    first = tmp_path / "web/0/part.jsonl"
    first.write_text(first.read_text().replace("goal", "aims"))
    os.utime(first, (4e9, 4e9))
    with pytest.raises(UserError, match="0/part.jsonl has changed since"):
        data.open_meta(cfg)


def test_workers_end_with_the_process_that_started_them(web, tmp_path):
    cfg, _ = web
    lines = (json.dumps({"text": text}) + "\n" for text in documents(40_000, 7))
    (tmp_path / "web/part-9.jsonl").write_text("".join(lines) * 5)
    for number in (signal.SIGKILL, signal.SIGTERM):
        options = [f"--{key}={value}" for key, value in options_of(replace(cfg, shards=14)).items()]
        running = subprocess.Popen(
            [sys.executable, "data.py", *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        shards = Path(f"{data.folder_of(cfg)}.shards")
        while not list(shards.glob("0*")):
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        running.send_signal(number)
        _, err = running.communicate(timeout=20)  # until all have closed their standard error
        assert running.returncode in (-9, 128 + 15)
        if number == signal.SIGTERM:
            assert "leaked" not in err and not list(shards.glob(".*.tmp-*"))
        shutil.rmtree(shards)


def test_two_builds_at_once_are_one_too_many(web):
    cfg, _ = web
    with corpus.only_one(data.shards_folder(cfg)):
        with pytest.raises(UserError, match="another process is building these shards"):
            data.build(cfg)
    data.build(cfg)


def test_what_is_not_ours_stays(web):
    cfg, _ = web
    plan = data.build_shards(replace(cfg, shards="0/6"))
    (plan.folder / "notes.txt").write_text("mine")
    data.build(cfg)
    assert [file.name for file in plan.folder.iterdir()] == ["notes.txt"]


def test_shards_of_another_tokenizer_are_refused(web, tmp_path):
    """As another machine trains one, if its files are others. Where files are mended after shards
    are done, these keep theirs."""
    cfg, _ = web
    cfg = replace(cfg, tokenizer="bpe", vocab_size=300)
    file = tmp_path / "web/part-5.jsonl"
    content = file.read_text()
    file.write_text(content.replace("goal", "zebra zebra zebra"))
    elsewhere = data.build_shards(replace(cfg, shards="0/6", data_dir=str(tmp_path / "there")))
    file.write_text(content)
    plan = data.build_shards(replace(cfg, shards="1/6"))
    shutil.copytree(elsewhere.folder / "00000", plan.folder / "00000")
    with pytest.raises(UserError, match="00000 was built with another tokenizer"):
        data.build(cfg)
    shutil.rmtree(plan.folder / "00000")
    file.write_text(content.replace("goal", "zebra zebra zebra"))
    assert data.build(cfg)["tokenizer_sha256"] == plan.facts["tokenizer"]


def test_a_damaged_data_set_is_refused(web, tmp_path):
    cfg, _ = web
    data.build(cfg)
    folder = data.folder_of(cfg)
    first = folder / "train-00001.bin"
    content = first.read_bytes()
    first.write_bytes(content[:-2])
    with pytest.raises(
        UserError, match=r"train-00001.bin is missing, truncated or altered.*data.py"
    ):
        trained(run_settings(cfg, tmp_path))
    first.write_bytes(b"\xff\xff" * (len(content) // 2))  # found when it is read
    with pytest.raises(UserError, match="train-00001.bin is damaged"):
        trained(run_settings(cfg, tmp_path))
    found = script("data.py", **options_of(cfg))
    assert found.returncode == 2 and "train-00001.bin" in found.stderr


def options_of(cfg):
    return {key: value for key, value in vars(cfg).items() if value not in (None, [])}


@pytest.mark.parametrize("changes,says", [
    (dict(shards="0-6/6"), "--shards='0-6/6' is neither"),
    (dict(shards="x"), "--shards='x' is neither"),
    (dict(shards=0), "--shards=0 is neither"),
    (dict(target="class"), "--target=none"),
    (dict(val_file="v.jsonl"), "without --val_file"),
    (dict(train_file="nowhere/*.jsonl"), "no such file"),
])  # fmt: skip
def test_what_cannot_become_shards_is_refused(web, changes, says):
    cfg, _ = web
    with pytest.raises(UserError, match=says):
        data.build(replace(cfg, **changes))


def test_a_data_set_of_the_hub_is_no_list_of_files(web):
    with pytest.raises(UserError, match="download them"):
        corpus.is_sharded(replace(web[0], train_file="hf:web"))


def test_some_shards_are_not_trained_on(web, tmp_path):
    cfg, _ = web
    with pytest.raises(UserError, match="--shards=6"):
        trained(run_settings(replace(cfg, shards="0-2/6"), tmp_path))


@pytest.mark.parametrize("mix,says", [
    ("web", "is not a data set and a share"),
    ("web:0", "a share above 0"),
    ("web:0.5,films:0.5", "there is no .*films.*build it first"),
    ("web:0.5,other:0.5", "has another tokenizer"),
    ("web:0.5,web:0.5", "names a data set twice"),
    ("", "is not a data set and a share"),
])  # fmt: skip
def test_what_cannot_be_mixed_is_refused(web, tmp_path, mix, says):
    cfg, _ = web
    data.build(cfg)
    (tmp_path / "data/other-bytes").mkdir()
    for file in data.folder_of(cfg).iterdir():
        shutil.copy(file, tmp_path / "data/other-bytes")
    meta = json.loads((tmp_path / "data/other-bytes/meta.json").read_text())
    meta["tokenizer_sha256"] = "0"
    del meta["checksum"]
    data.write_json(tmp_path / "data/other-bytes/meta.json", meta)
    with pytest.raises(UserError, match=says):
        trained(run_settings(cfg, tmp_path, mix=mix))


def test_rows_whose_text_is_none_are_left_out_and_counted(web, tmp_path):
    cfg, texts = web
    with open(tmp_path / "web/part-2.jsonl", "a") as file:
        file.write('{"text": {"a": 1}}\n{"text": ["b"]}\n{"text": ""}\n{}\nnothing\n')
    with pytest.raises(UserError, match="part-2.jsonl, line 42: 'text' is a list or an object"):
        data.build(cfg)
    done = data.build_shards(replace(cfg, shards="0-1/6")).folder / "00000/shard.json"
    before = done.stat().st_mtime_ns
    leaving_out = replace(cfg, drop_bad_rows=True)
    data.build_shards(replace(leaving_out, shards="0-4/6"))  # what is done is not lost
    assert done.stat().st_mtime_ns == before
    meta = data.build(leaving_out)
    assert meta["removed"]["bad_rows"] == 5
    assert sorted(texts_of(cfg, "train", meta) + texts_of(cfg, "val", meta)) == sorted(texts)
