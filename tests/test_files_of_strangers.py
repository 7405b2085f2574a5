"""Files that nobody here made: every row is in the data set as it stands in the file, or in a
count, or refused with its place and a way out. No value is guessed into another."""

import csv
import io
import json
import random
import zipfile

from configurator import UserError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import splits
import train
from sources import DataConfig, resolve, rows
from splits import stratify, stratify_sets

TEXTS = [f"the film number {i} was {w}, {v}" for i, (w, v) in enumerate(
    [("grim", "really stale"), ("warm", "really fine")] * 20)]  # fmt: skip
LABELS = ["neg", "pos"] * 20
ROWS = list(zip(TEXTS, LABELS))


def read(path, content=None, **changes):
    """[(text, label), ...] of a source."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    cfg = DataConfig(dataset="x", train_file=str(path), **changes)
    return [(value, label) for _, value, label in rows(resolve(cfg).train_file, resolve(cfg))]


def build(tmp_path, path, content=None, **changes):
    """meta.json of the data set of a source."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    changes = dict(dataset="x", vocab_size=300, val_fraction=0.1) | changes
    cfg = train.Config(data_dir=str(tmp_path / "data"), train_file=str(path), **changes)
    return data.build(cfg)


def table(rows, header=("text", "label"), **dialect):
    out = io.StringIO()
    writer = csv.writer(out, **dialect)
    writer.writerows([header, *rows] if header else rows)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# Dialects


@pytest.mark.parametrize(
    "name, content, changes",
    [
        ("semicolon.csv", table(ROWS, delimiter=";"), {}),
        ("tab.csv", table(ROWS, delimiter="\t"), {}),
        ("bar.csv", table(ROWS, delimiter="|"), {}),
        ("comma.tsv", table(ROWS), {}),
        ("bang.csv", table(ROWS, delimiter="!"), {"delimiter": "!"}),
        ("quoted.tsv", table(ROWS, delimiter="\t", quoting=csv.QUOTE_ALL), {}),
        ("single.csv", table(ROWS, quotechar="'"), {"quotechar": "'"}),
        (
            "by_number.csv",
            table(ROWS, None, delimiter=";"),
            {"text_column": 0, "label_column": 1, "delimiter": ";"},
        ),
        ("utf16le.csv", b"\xff\xfe" + table(ROWS).encode("utf-16-le"), {}),
        ("utf16be.csv", b"\xfe\xff" + table(ROWS).encode("utf-16-be"), {}),
        ("utf32.csv", table(ROWS).encode("utf-32"), {}),
        ("no_bom.csv", table(ROWS).encode("utf-16-le"), {"encoding": "utf-16-le"}),
        ("mac.csv", table(ROWS, lineterminator="\r"), {}),
        ("records.json", json.dumps([{"text": t, "label": x} for t, x in ROWS]), {}),
        ("pretty.json", json.dumps([{"text": t, "label": x} for t, x in ROWS], indent=2), {}),
        ("array.jsonl", json.dumps([{"text": t, "label": x} for t, x in ROWS]), {}),
        ("x.ndjson", "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in ROWS), {}),
        ("utf16.json", json.dumps([{"text": t, "label": x} for t, x in ROWS]).encode("utf-16"), {}),
        ("fasttext.txt", "".join(f"__label__{x} {t}\n" for t, x in ROWS), {}),
    ],
)
def test_dialects_are_read_as_written(tmp_path, name, content, changes):
    assert read(tmp_path / name, content, **changes) == ROWS


def test_quotes_within_texts(tmp_path):
    said = [(t.replace("film", '"film"'), x) for t, x in ROWS]
    spark = "".join(
        '"{}","{}"\n'.format(*(f.replace('"', '\\"') for f in r))
        for r in [("text", "label"), *said]
    )
    assert read(tmp_path / "spark.csv", spark) == said
    assert read(tmp_path / "a.tsv", table(said, delimiter="\t")) == said  # quoted as pandas does
    plain = "text\tlabel\n" + "".join(f'"{t}\t{x}\n' for t, x in ROWS)  # a quote that opens nothing
    assert read(tmp_path / "b.tsv", plain) == [(f'"{t}', x) for t, x in ROWS]
    ends = [(f"C:\\{i}\\", x) for i, (_, x) in enumerate(ROWS)]  # backslashes that escape nothing
    assert read(tmp_path / "c.csv", table(ends, quoting=csv.QUOTE_ALL)) == ends


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_tables_are_read_back(tmp_path_factory, data):
    character = st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])
    text = st.text(character, min_size=1, max_size=12).map(lambda t: f"x{t}x")
    text = text | st.sampled_from(['say "hi"', "a\tb", "a\nb", '"', "a;b|c", "x,y", "\\", "\\n"])
    found = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=8))
    found = [(f"a{t}b", f"c{x}d") for t, x in found]
    delimiter = data.draw(st.sampled_from(",;|\t"))
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    path = tmp_path_factory.mktemp("t") / "a.csv"
    content = table(found, ("text", "label"), delimiter=delimiter, quoting=quoting)
    from values import clean, clean_label

    expected = [(clean(t), clean_label(x)) for t, x in found]
    assert read(path, content) == expected
    lines = [json.dumps({"text": t, "label": x}, ensure_ascii=False) for t, x in found]
    assert read(path.with_suffix(".jsonl"), "\n".join(lines)) == expected
    assert read(path.with_suffix(".json"), "[" + ",\n ".join(lines) + "]") == expected


def test_many_files_archives_and_folders(tmp_path):
    for i in range(4):
        (tmp_path / f"part-{i}.csv").write_text(table(ROWS[10 * i : 10 * i + 10]))
    assert read(tmp_path / "part-*.csv") == ROWS
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/a.csv", table(ROWS))
        archive.writestr("__MACOSX/in/._a.csv", b"\0\1")
        archive.writestr("readme.md", "no data")
    assert read(tmp_path / "all.zip") == ROWS
    assert read(f"{tmp_path}/all.zip!in/*.csv") == ROWS
    with pytest.raises(UserError, match="holds no file none/"):
        read(f"{tmp_path}/all.zip!none/*")
    for split, part in (("train", ROWS[:20]), ("val", ROWS[20:30]), ("test", ROWS[30:])):
        for i, (text, label) in enumerate(part):
            (tmp_path / f"folder/{split}/{label}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"folder/{split}/{label}/{i}.txt").write_text(text)
    meta = build(tmp_path, tmp_path / "folder")
    assert [meta["splits"][s]["examples"] for s in ("train", "val", "test")] == [20, 10, 10]


def test_hidden_and_other_files_of_a_folder(tmp_path):
    for i, (text, label) in enumerate(ROWS):
        (tmp_path / f"f/{label}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"f/{label}/{i}.txt").write_text(text)
    for hidden in (".git/x.txt", "pos/._0.txt", "pos/.DS_Store"):
        (tmp_path / "f" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "f" / hidden).write_bytes(b"\0\1\2\xff")
    (tmp_path / "f/pos/notes.md").write_text("x")
    (tmp_path / "f/readme.txt").write_text("x")
    (tmp_path / "f/pos/more").mkdir()
    (tmp_path / "f/pos/more/1.txt").write_text("x")
    meta = build(tmp_path, tmp_path / "f")
    assert meta["label_names"] == ["neg", "pos"]
    assert sum(split["examples"] for split in meta["splits"].values()) == 40
    removed = meta["removed"]
    assert removed["skipped_.md_files"] == 1
    assert removed["skipped_files_above_the_label_folders"] == 1
    assert removed["skipped_files_below_the_label_folders"] == 1


def test_what_a_parquet_holds_besides_is_not_read(tmp_path):
    """And a row that cannot be read is named, or left out."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    broken = pa.array([b"a", b"\xe9", b"b"]).view(pa.string())
    far = pa.array([1, 2**31 - 1, 3], pa.date32())
    table = pa.table({"text": ["a", "c", "b"], "label": ["x", "y", "x"], "url": broken, "day": far})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("a", "x"), ("c", "y"), ("b", "x")]
    with pytest.raises(UserError, match="a.parquet, row 1: .*--drop_bad_rows=True"):
        read(tmp_path / "a.parquet", text_column="url")
    left = read(tmp_path / "a.parquet", text_column="url", drop_bad_rows=True)
    assert left == [("a", "x"), (None, ""), ("b", "x")]  # which is counted


def test_parquet_and_arrow(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    columns = pa.table({"text": TEXTS, "label": LABELS})
    pyarrow.parquet.write_table(columns, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        with pa.ipc.new_file(sink, columns.schema) as writer:
            writer.write_table(columns)
    assert read(tmp_path / "a.parquet") == read(tmp_path / "a.arrow") == ROWS
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "b.parquet", b"PAR1 nothing")


def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    feature = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )

    def part(rows):
        columns = {
            "text": [t for t, _ in rows],
            "label": [["neg", "pos"].index(x) for _, x in rows],
        }
        return datasets.Dataset.from_dict(columns, features=feature)

    whole = datasets.DatasetDict(train=part(ROWS[:30]), validation=part(ROWS[30:]))
    whole.save_to_disk(str(tmp_path / "saved"))
    assert read(f"hf:{tmp_path}/saved") == ROWS[:30]
    meta = build(tmp_path, f"hf:{tmp_path}/saved")
    assert meta["label_names"] == ["neg", "pos"] and meta["splits"]["val"]["examples"] == 10


# --------------------------------------------------------------------------------------------------
# Rows and values


@pytest.mark.parametrize(
    "name, content, changes, says",
    [
        ("a.csv", "label,text\nneg,the film was stale, really\npos,fine\n", {}, "line 2: 3 fields"),
        ("l.jsonl", '{"text": "a", "label": ["x"]}\n', {}, "line 1: 'label' is a list.*=labels"),
        ("t.jsonl", '{"text": ["a", "b"], "label": "x"}\n', {}, "'text' is a list or an object"),
        ("d.jsonl", '{"text": {"a": 1}, "label": "x"}\n', {}, "'text' is a list or an object"),
        ("n.jsonl", '{"text": "a", "label": NaN}\n', {}, "the label is empty"),
        ("m.jsonl", '{"text": NaN, "label": "x"}\n', {}, "the text is empty"),
        ("f.csv", table([(t, i % 2 + 0.0 if i % 3 else i % 2) for i, t in enumerate(TEXTS)]), {},
         "labels '0' and '0.0' are the same number"),
        ("h.csv", table(ROWS), {"text_column": 0, "label_column": 1}, "'label', occurs once"),
        ("n.csv", table(ROWS, None, delimiter=";"), {"text_column": 0, "label_column": 1},
         "could be parted by ', or ;': give --delimiter"),
        ("two.csv", table(ROWS) + table(ROWS[:3]), {}, "line 42: repeats the header"),
        ("o.csv", "text,a,b\nx,1,2\n", {"label_column": ["a", "b"], "target": "labels"},
         "column 'b' is '2'"),
        ("o.csv", "text,a,b\nx,1,0\n", {"label_column": ["a", "b"]}, "--target=labels is needed"),
        ("x.json", "[" + json.dumps({"text": "a", "label": "x"}), {}, "element 0: not valid JSON"),
        ("x.json", '[{"text": "a", "label": "x"}, 5]', {}, "element 1: not a JSON object"),
        ("big.csv", table([("x" * 3_000_000, "a")]), {"max_row_mb": 1}, "raise --max_row_mb"),
        ("big.jsonl", '{"text": "' + "x" * 3_000_000, {"max_row_mb": 1}, "raise --max_row_mb"),
        ("de.csv", "x;y\n1,5;2,5\n", {"kind": "features", "target": "number", "label_column": "y",
                                     "columns": ["x"], "delimiter": ";"}, "give --decimal=,"),
    ],
)  # fmt: skip
def test_refused_with_the_place_and_a_way_out(tmp_path, name, content, changes, says):
    with pytest.raises(UserError, match=says):
        build(tmp_path, tmp_path / name, content, **changes)


def test_bad_rows_are_counted_when_they_are_left_out(tmp_path):
    lines = [json.dumps({"text": t, "label": x}) for t, x in ROWS]
    lines += ["{broken", '{"text": "no label"}', "[1]", '{"text": null, "label": "neg"}', ""]
    meta = build(tmp_path, tmp_path / "a.jsonl", "\n".join(lines), drop_bad_rows=True)
    assert meta["removed"]["bad_rows"] == 4
    table_ = table(ROWS) + "a,b,c\n" + "text,label\n" + "alone\n"
    meta = build(tmp_path, tmp_path / "a.csv", table_, drop_bad_rows=True, dataset="y")
    assert meta["removed"]["bad_rows"] == 3
    numbers = "x,y\n" + "".join(f"{i},{i * i}\n" for i in range(40)) + "much,3\n"
    features = dict(kind="features", target="number", label_column="y", dataset="z")
    meta = build(tmp_path, tmp_path / "n.csv", numbers, drop_bad_rows=True, **features)
    assert meta["removed"]["bad_rows"] == 1


def test_lines_that_are_no_text_are_bad_rows(tmp_path):
    records = "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in ROWS).encode()
    damaged = b'{"text": "caf\xe9", "label": "neg"}\n{"text": "\0", "label": "neg"}\n'
    with pytest.raises(UserError, match=f"line {len(ROWS) + 1}: not valid utf-8"):
        build(tmp_path, tmp_path / "a.jsonl", records + damaged)
    meta = build(tmp_path, tmp_path / "a.jsonl", records + damaged, drop_bad_rows=True)
    assert meta["removed"]["bad_rows"] == 2
    plain = "".join(f"{t}\n" for t, _ in ROWS).encode() + b"caf\xe9\n"
    settings = dict(target="none", lines=True, drop_bad_rows=True, dataset="y")
    meta = build(tmp_path, tmp_path / "a.txt", plain, **settings)
    assert meta["removed"]["bad_rows"] == 1


def test_labels_that_look_alike_are_alike(tmp_path):
    forms = ["café", "cafe\u0301", "caf\u200bé", " café", "café\u00a0"]
    found = [(t, forms[i % 5] if i % 2 else "b b" if i % 4 else "b\u00a0 b") for i, (t, _) in
             enumerate(ROWS)]  # fmt: skip
    assert {label for _, label in read(tmp_path / "a.csv", table(found))} == {"café", "b b"}


def test_several_labels_in_lists_cells_and_columns(tmp_path):
    several = [["x", "y"], ["x"], [], ["y", "z"]]
    expected = ["x,y", "x", "", "y,z"]
    texts = TEXTS[:4]
    lists = table(zip(texts, several))
    assert [x for _, x in read(tmp_path / "a.csv", lists, target="labels")] == expected
    lines = "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in zip(texts, several))
    assert [x for _, x in read(tmp_path / "a.jsonl", lines, target="labels")] == expected
    one_hot = table(
        [[t, *(int(c in x) for c in "xyz")] for t, x in zip(texts, several)],
        ("text", "x", "y", "z"),
    )
    found = read(tmp_path / "b.csv", one_hot, target="labels", label_column=["x", "y", "z"])
    assert [x for _, x in found] == expected
    found = read(tmp_path / "b.csv", one_hot, target="labels", label_column=["z"])
    assert [x for _, x in found] == ["", "", "", "z"]
    tags = "__label__x __label__y one\n__label__x two\n"
    found = read(tmp_path / "f.txt", tags, target="labels")
    assert found == [("one", "x,y"), ("two", "x")]


def test_blanks_between_words(tmp_path):
    assert read(tmp_path / "a.csv", "text,label\none\ftwo\vthree\x1cfour,x\n") == [
        ("one two three four", "x")
    ]
    text = "first\rsecond\r\nthird\n"
    found = read(tmp_path / "a.txt", text, target="none", lines=True)
    assert [t for t, _ in found] == ["first", "second", "third"]


def test_missing_and_foreign_numbers(tmp_path):
    rows_ = "x,y\n" + "".join(f"{x},{i}\n" for i, x in enumerate(["NA", "?", "null", "", "n/a", 5]))
    features = dict(kind="features", target="number", label_column="y", impute=True)
    values = np.array([v[0] for v, _ in read(tmp_path / "a.csv", rows_, **features)])
    assert np.isnan(values[:5]).all() and values[5] == 5
    german = "x;y\n1.234,5;1\n-0,25;2\n"
    found = read(tmp_path / "b.csv", german, decimal=",", **features)
    assert [float(v[0]) for v, _ in found] == [1234.5, -0.25]


def test_rows_with_labels_to_skip_are_counted(tmp_path):
    found = [(t, "unsup" if i % 4 == 0 else x) for i, (t, x) in enumerate(ROWS)]
    meta = build(tmp_path, tmp_path / "a.csv", table(found), skip_labels=["unsup"])
    assert meta["label_names"] == ["neg", "pos"] and meta["removed"]["rows_of_skip_labels"] == 10
    assert sum(split["examples"] for split in meta["splits"].values()) == 30


# --------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("n_classes, n_each", [(200, 2), (77, 6), (3, 1), (5, 40)])
def test_every_class_keeps_rows_in_train_and_lots_decide_the_rest(n_classes, n_each):
    labels = np.repeat(np.arange(n_classes), n_each)
    held = {"val": 0.1, "test": 0.1}
    found = []
    for seed in range(5):
        assignment = np.zeros(len(labels), int)
        stratify(assignment, labels, held, seed)
        assert set(labels[assignment == 0]) == set(range(n_classes))
        n = round(0.1 * len(labels))
        if n_each > 1:
            assert (assignment == 1).sum() == (assignment == 2).sum() == n
        found.append(set(labels[assignment == 1]))
        if n_each < 10:  # test goes on where val stopped
            both = found[-1] & set(labels[assignment == 2])
            assert len(both) == max(0, 2 * n - n_classes)
    if 1 < n_each < 10:
        assert any(classes != found[0] for classes in found)


def test_sets_of_labels_are_stratified(tmp_path):
    rng = random.Random(0)
    sets = [[f"l{c}" for c in range(20) if rng.random() < 1 / (c + 2)] for _ in range(2000)]
    sets += [["rare"], ["pair"], ["pair"]]
    assignment = np.zeros(len(sets), int)
    stratify_sets(assignment, sets, {"val": 0.1, "test": 0.1}, 0)
    sizes = np.bincount(assignment)
    assert abs(sizes[1] - 200) < 10 and abs(sizes[2] - 200) < 10
    for label in {label for found in sets for label in found}:
        counts = np.bincount([k for k, x in zip(assignment, sets) if label in x], minlength=3)
        assert counts[0] >= 1
        assert np.abs(counts - counts.sum() * np.array([0.8, 0.1, 0.1])).max() <= 2


def test_classes_that_a_split_lacks_are_named(tmp_path, capsys):
    pairs = [
        (f"intent {i} variant {j} word{i}", f"intent_{i:03}") for i in range(50) for j in (0, 1)
    ]
    data.print_table(build(tmp_path, tmp_path / "pairs.csv", table(pairs)))
    assert "val lacks 40 of the 50 classes: intent_0" in capsys.readouterr().out
    assert splits.SPLITS[0] == "train"


def test_why_a_split_would_be_empty(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(table(ROWS))
    with pytest.raises(UserError, match="train would be empty: train's rows stand in val"):
        build(tmp_path, path, val_file=str(path))
    with pytest.raises(UserError, match="stand there several times; if that is right: --dedup"):
        build(tmp_path, path, table([("same", x) for x in LABELS]))


def test_how_much_is_cut_is_said(tmp_path, capsys):
    data.print_cut("train", np.array([0, 10, 30, 60]), 20)
    assert "train: 1 texts (33.3%) are longer than max_len=20" in capsys.readouterr().out
    data.print_cut("train", np.array([0, 10, 30, 50]), 20)
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------
# What a careful tester found


def test_features_go_by_their_names_in_every_file_and_row(tmp_path):
    numbers = dict(kind="features", target="number", label_column="y")
    a = "a,b,y\n" + "".join(f"{i},{-i},{i * 3}\n" for i in range(1, 30))
    (tmp_path / "p1.csv").write_text(a)
    (tmp_path / "p2.csv").write_text(
        "y,b,a\n" + "".join(f"{i * 3},{-i},{i}\n" for i in range(30, 60))
    )
    meta = build(tmp_path, tmp_path / "p*.csv", **numbers)
    assert meta["scaling"]["columns"] == ["a", "b"]
    assert meta["scaling"]["mean"][0] > 0 > meta["scaling"]["mean"][1]
    lines = [json.dumps({"a": i, "b": -i, "y": 3 * i}) for i in range(1, 30)]
    lines += [json.dumps({"b": -i, "y": 3 * i, "a": i}) for i in range(30, 60)]
    other = build(tmp_path, tmp_path / "p.jsonl", "\n".join(lines), dataset="j", **numbers)
    assert other["scaling"] == meta["scaling"]
    with pytest.raises(UserError, match="line 60: there is no key 'b'"):
        lines.append(json.dumps({"a": 1, "c": 2, "y": 3}))
        build(tmp_path, tmp_path / "q.jsonl", "\n".join(lines), dataset="k", **numbers)


@pytest.mark.parametrize(
    "name, content, changes, says",
    [
        ("short.csv", "good; film,pos\nfine; film,neg\nbad; film\n",
         {"text_column": 0, "label_column": 1}, "could be parted by"),
        ("two.json", '[{"text": "a", "label": "x"}]\n[{"text": "b", "label": "y"}]', {},
         "something follows the array"),
        ("comma.json", '[{"text": "a", "label": "x"} {"text": "b", "label": "y"}]', {}, "no comma"),
        ("twice.jsonl", '{"text": "a", "label": "x", "label": "y"}', {}, "not a JSON object"),
        ("late.tsv", "text\tlabel\n" + "a\tx\n" * 300 + '"He said ""hi"""\tx\n', {},
         "line 302: is a field in quotes"),
        ("zero.txt", "Привет мир\nда нет\n".encode("utf-16-le"), {"target": "none", "lines": True},
         "zero bytes.*--encoding=utf-16-le"),
        ("names.csv", "text,text,label\na,b,x\n", {}, "2 columns have the name 'text'"),
        ("np.csv", "text,label\na,\"['joy' 'anger']\"\n", {"target": "labels"}, "is no list"),
        ("bare.csv", 'text,label\na,"[a, b]"\n', {"target": "labels"}, "no list of labels"),
        ("tuple.csv", 'text,label\na,"(a, b)"\n', {"target": "labels"}, "no list of labels"),
        ("in.txt", "__label__a one\ntwo __label__b\n", {"target": "labels"}, "within the text"),
        ("d.csv", table(ROWS), {"delimiter": "||"}, "--delimiter=.* must be one character"),
    ],
)  # fmt: skip
def test_what_a_careful_tester_found_is_refused(tmp_path, name, content, changes, says):
    with pytest.raises(UserError, match=says):
        build(tmp_path, tmp_path / name, content, **changes)


def test_what_a_careful_tester_found_is_read(tmp_path):
    slashes = [('a "q" and \\new C:\\dir', "pos"), ("foo", "\\N")]
    content = '"text","label"\n"a \\"q\\" and \\new C:\\dir","pos"\n"foo","\\N"\n'
    assert read(tmp_path / "slashes.csv", content) == slashes
    numbers = '{"text": "1.10", "label": 1e2}\n{"text": 123456789.123456789123, "label": 1.10}\n'
    assert read(tmp_path / "numbers.jsonl", numbers) == [
        ("1.10", "1e2"),
        ("123456789.123456789123", "1.10"),
    ]
    sets = 'text,label\na,"{\'y\', \'x\'}"\nb,"[""x"", null]"\n'
    assert [x for _, x in read(tmp_path / "s.csv", sets, target="labels")] == ["x,y", "x"]
    apostrophes = (
        'text,label\na,"[""it\'s"", ""rock \'n\' roll"", """"]"\nb,"(\'x\', \'y\')"\nc,(other)\n'
    )
    found = read(tmp_path / "apostrophes.csv", apostrophes, target="labels")
    assert [x for _, x in found] == ["it's,rock 'n' roll", "x,y", "(other)"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("data.csv", table(ROWS))
        archive.writestr("README.txt", "about it")
    meta = build(tmp_path, tmp_path / "a.zip")
    assert meta["label_names"] == ["neg", "pos"]
    assert meta["removed"]["skipped_files_of_the_archive"] == 1
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for i, (text, label) in enumerate(ROWS):
            archive.writestr(f"{label}/{i}.txt", text)
    assert sorted(read(tmp_path / "b.zip")) == sorted(ROWS)
    several = table([(t, "a,b" if i % 2 else "a" if i % 3 else "b") for i, t in enumerate(TEXTS)])
    settings = dict(target="labels", skip_labels=["b"])
    meta = build(tmp_path, tmp_path / "skip.csv", several, dataset="s", **settings)
    assert meta["label_names"] == ["a"] and meta["removed"]["rows_of_skip_labels"] == 27


def test_what_a_newcomer_stumbled_over(tmp_path, capsys):
    """One short row leaves the delimiter as it is; misspelt labels to skip, splits in an archive,
    and names in the first row are said."""
    lines = table([(i, *r) for i, r in enumerate(ROWS)], ("id", "text", "label"), delimiter=";")
    with pytest.raises(UserError, match="line 42: 2 fields where 3 are needed"):
        build(tmp_path, tmp_path / "a.csv", lines + "40;short\n")
    meta = build(tmp_path, tmp_path / "a.csv", lines + "40;short\n", drop_bad_rows=True)
    assert meta["removed"]["bad_rows"] == 1
    with pytest.raises(UserError, match="--skip_labels=poss: no row has that label"):
        build(tmp_path, tmp_path / "a.csv", lines, skip_labels=["poss"], dataset="y")
    with zipfile.ZipFile(tmp_path / "split.zip", "w") as archive:
        for i, (text, label) in enumerate(ROWS):
            archive.writestr(f"x/{['train', 'test'][i > 29]}/{label}/{i}.txt", text)
    with pytest.raises(UserError, match=r"--train_file='.*split.zip!\*train/\*' --test_file="):
        build(tmp_path, tmp_path / "split.zip", dataset="z")
    meta = build(tmp_path, f"{tmp_path}/split.zip!*train/*", dataset="z",
                 test_file=f"{tmp_path}/split.zip!*test/*")  # fmt: skip
    assert meta["splits"]["test"]["examples"] == 10
    stars = table([(t, i % 3) for i, t in enumerate(TEXTS)], ("comment", "stars"))
    build(tmp_path, tmp_path / "s.csv", stars, text_column=0, label_column=1, dataset="s")
    assert "the first row's label, 'stars', occurs once" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resize=crop needs --image_size"):
        build(tmp_path, tmp_path / "s.csv", kind="image", resize="crop", dataset="r")
