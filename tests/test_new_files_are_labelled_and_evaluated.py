"""Files that come after training: labelled row by row, evaluated, however they are written."""

import csv
import json

from configurator import UserError

import numpy as np
import pytest
import torch

import data
import eval as eval_script
import finetune
import pictures
import train
from baselines import build_model
from labelling import label_file
from model import ModelConfig
from predict import Classifier, Config, open_data
from sources import DataConfig


@pytest.fixture(scope="module")
def titled(tmp_path_factory):
    """A run on a table of titles and bodies, parted by semicolons, in latin-1."""
    folder = tmp_path_factory.mktemp("titled")
    lines = ["id;title;body;label"]
    for i in range(120):
        word, label = [("goal", "sport"), ("chip", "tech"), ("bank", "money")][i % 3]
        lines.append(f"{i};{word} caf\xe9 {word};body {i} of it;{label}")
    (folder / "titled.csv").write_bytes("\n".join(lines).encode("latin-1"))
    train.train(
        train.Config(
            dataset="titled", train_file=str(folder / "titled.csv"), encoding="latin-1",
            text_column=["title", "body"], data_dir=str(folder / "data"), vocab_size=300,
            val_fraction=0.1, out_dir=str(folder / "out"),
            max_len=32, n_layer=1, d_model=32, n_head=2,
            batch_size=16, epochs=8.0, warmup_steps=3, learning_rate=0.003,
            wandb_mode="disabled", dtype="float32", device="cpu",
        )
    )  # fmt: skip
    return folder


def labels(folder, content, name="new.csv", **changes):
    """The rows that predict.py writes for a new file."""
    path = folder / name
    path.write_bytes(content.encode("latin-1"))
    output = folder / changes.pop("to", "labels.csv")
    label_file(Classifier(folder / "out"), Config(input=str(path), output=str(output), **changes))
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in open(output, encoding="utf-8")]
    return list(csv.DictReader(open(output, encoding="utf-8")))


NEW = "id;title;body\n7;goal caf\xe9 goal;it\n8;bank bank;of it\n9;;\n"


def test_a_new_file_is_read_as_the_runs_own_files_were(titled):
    found = labels(titled, NEW)
    assert [r["label"] for r in found] == ["sport", "money", ""]  # an empty text gets none
    assert found[2]["probability"] == ""
    with pytest.raises(UserError, match="no column 'title'"):
        labels(titled, "words\ngoal\n")
    assert [r["label"] for r in labels(titled, "words\ngoal\n", text_column="words")] == ["sport"]


def test_what_is_written_beside_the_label(titled):
    found = labels(titled, NEW, keep=["id"], where=True, probabilities=True)
    assert [r["id"] for r in found] == ["7", "8", "9"]
    assert [r["where"].rsplit(", ")[1] for r in found] == ["line 2", "line 3", "line 4"]
    sums = [float(r["p_sport"]) + float(r["p_tech"]) + float(r["p_money"]) for r in found[:2]]
    assert sums == pytest.approx([1, 1], abs=1e-5)
    lines = labels(titled, NEW, keep=["id"], to="labels.jsonl")
    assert [(r["id"], r["label"]) for r in lines] == [("7", "sport"), ("8", "money"), ("9", "")]
    formulas = labels(titled, NEW.replace("7;", "=1+1;"), keep=["id"], spreadsheet=True)
    assert formulas[0]["id"] == "'=1+1"
    with pytest.raises(UserError, match="needs --output=labels.csv"):
        labels(titled, NEW, to="labels.xlsx")


def test_labels_as_parquet(titled):
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(UnicodeDecodeError):
        labels(titled, NEW, keep=["id"], to="labels.parquet")  # which the helper cannot read
    rows = parquet.read_table(titled / "labels.parquet").to_pylist()
    assert [(r["id"], r["label"]) for r in rows] == [("7", "sport"), ("8", "money"), ("9", "")]


def test_a_blank_line_is_a_row(titled):
    found = labels(titled, "words\ngoal\n\nbank\n\n", text_column="words")
    assert [r["label"] for r in found] == ["sport", "", "money", ""]
    found = labels(titled, "goal\n\nbank\n", name="new.txt", text_column=0)
    assert [r["label"] for r in found] == ["sport", "", "money"]


def test_pictures_and_numbers_are_labelled_too(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for i in range(60):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / "p" / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(level, level + 50, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "p" / name / f"{i}.png")
    common = dict(data_dir=str(tmp_path / "data"), wandb_mode="disabled", device="cpu",
                  model="mlp", n_layer=1, d_model=16, warmup_steps=3, dtype="float32")  # fmt: skip
    train.train(
        train.Config(dataset="p", train_file=str(tmp_path / "p"), kind="image", epochs=8.0,
                     out_dir=str(tmp_path / "pictures"), **common)
    )  # fmt: skip
    (tmp_path / "new").mkdir()
    for name, level, side in (("a.png", 45, 8), ("b.png", 220, 16), ("._c.png", 0, 8)):
        Image.fromarray(np.full((side, side), level, np.uint8)).save(tmp_path / "new" / name)
    clf = Classifier(tmp_path / "pictures")
    output = tmp_path / "labels.csv"
    with pytest.raises(UserError, match="--resize=crop"):
        label_file(clf, Config(input=str(tmp_path / "new"), output=str(output)))
    clf.config["resize"] = "crop"
    label_file(clf, Config(input=str(tmp_path / "new"), output=str(output), where=True))
    found = list(csv.DictReader(open(output)))
    found = [(r["where"][-5:], r["label"]) for r in found]
    assert found == [("a.png", "dark"), ("b.png", "light")]

    lines = ["x,y,price"] + [f"{x},{y},{3 * x - y + 7}" for x, y in rng.normal(size=(200, 2))]
    (tmp_path / "n.csv").write_text("\n".join(lines))
    train.train(
        train.Config(dataset="n", train_file=str(tmp_path / "n.csv"), kind="features",
                     target="number", label_column="price", columns=["x", "y"], epochs=20.0,
                     out_dir=str(tmp_path / "numbers"), weight_decay=0.0,
                     **common | dict(model="linear", optimizer="lbfgs", batch_size=200))
    )  # fmt: skip
    (tmp_path / "new.csv").write_text("id,y,x\na,1,2\nb,0,-1\n")
    config = Config(input=str(tmp_path / "new.csv"), output=str(output), keep=["id"])
    label_file(Classifier(tmp_path / "numbers"), config)
    found = {r["id"]: float(r["value"]) for r in csv.DictReader(open(output))}
    assert found == pytest.approx({"a": 12, "b": 4}, abs=0.2)


def test_a_labelled_file_gets_a_full_report(titled):
    folder = titled / "out"
    clf = Classifier(folder)
    lines = (titled / "titled.csv").read_bytes().decode("latin-1").splitlines()
    known = "\n".join(lines[:31]) + "\n500;goal;of it;sport\n"
    (titled / "later.csv").write_bytes(known.encode("latin-1"))
    config = eval_script.Config(test_file=str(titled / "later.csv"), resamples=100)
    report, examples, _ = eval_script.full_report(clf, config)
    assert report["n"] == 31 and report["accuracy"] > 0.9 and report["temperature"]
    assert 0.5 < report["in_train"]["share"] < 1  # the lines that train has, too
    own = open_data(clf, "train")
    assert sum(examples.content(i) in {own.content(j) for j in range(len(own))}
               for i in range(31)) == round(report["in_train"]["share"] * 31)  # fmt: skip
    eval_script.report_checkpoint(str(folder), config)
    assert json.load(open(folder / "eval-later.json"))["n"] == 31
    assert (folder / "report-later.html").exists() and not (folder / "eval.json").exists()
    # a file of the same name elsewhere has a report of its own, each of them always the same one
    (titled / "deep").mkdir()
    (titled / "deep/later.csv").write_bytes("\n".join(lines[:11]).encode("latin-1"))
    for file in ("deep/later.csv", "later.csv", "deep/later.csv"):
        config = eval_script.Config(test_file=str(titled / file), resamples=100)
        eval_script.report_checkpoint(str(folder), config)
    found = {path.name: json.load(open(path))["n"] for path in folder.glob("eval-*.json")}
    assert found == {"eval-later.json": 31, "eval-later.csv.json": 10}
    (titled / "odd.csv").write_bytes(b"title;body;label\nx;y;sprot\n")
    with pytest.raises(UserError, match="line 2: label 'sprot' is none that"):
        eval_script.full_report(clf, eval_script.Config(test_file=str(titled / "odd.csv")))


def test_long_texts_are_read_as_asked(toy):
    """The evidence is at the end; windows, by hand, are the mean of their logits."""
    cfg = train.Config(**toy | dict(max_len=8, tokenizer="words"))
    train.train(cfg)
    text = "the a of and on in it was the a of and on in it was shares bank"
    head, tail, windows = (
        Classifier(toy["out_dir"], long=long) for long in ("head", "head+tail", "windows")
    )
    ids = head.tokenizer.encode(text).ids
    z = {clf.long: clf.logits(clf.examples([text]))[0] for clf in (head, tail, windows)}

    def of(ids):
        with torch.no_grad():
            return head.model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))[0]

    torch.testing.assert_close(z["head"], of(ids[:8]))
    torch.testing.assert_close(z["head+tail"], of(ids[:4] + ids[-4:]))
    pieces = [[ids[0], *ids[1 + s : 8 + s]] for s in (0, 5, len(ids) - 8)]
    torch.testing.assert_close(z["windows"], torch.stack([of(p) for p in pieces]).mean(0))
    short = "shares bank"
    for clf in (tail, windows):
        torch.testing.assert_close(
            clf.logits(clf.examples([short])), head.logits(head.examples([short]))
        )


def test_heads_go_by_the_names_of_their_classes(toy, tmp_path):
    train.train(train.Config(**toy))
    lines = open(toy["train_file"]).read()
    (tmp_path / "renamed.csv").write_text(lines.replace("tech,", "aaa,"))
    (tmp_path / "same.csv").write_text(lines.replace("\n", " again\n").replace(" again", "", 1))
    common = dict(init_from=toy["out_dir"], data_dir=toy["data_dir"], device="cpu", max_steps=1,
                  learning_rate=0.0, wandb_mode="disabled",
                  dtype="float32", max_len=32)  # fmt: skip
    renamed = dict(common, dataset="r", train_file=str(tmp_path / "renamed.csv"))
    with pytest.raises(UserError, match="its head tells .*'tech'.* apart, the data has .*'aaa'"):
        finetune.finetune(finetune.Config(**renamed, out_dir=str(tmp_path / "r")))
    finetune.finetune(finetune.Config(**renamed, out_dir=str(tmp_path / "r"), new_head=True))
    from weights import from_pretrained

    names = Classifier(toy["out_dir"]).label_names
    as_it_was = from_pretrained(toy["out_dir"], 3, label_names=names)
    other_way = from_pretrained(toy["out_dir"], 3, label_names=names[::-1])
    torch.testing.assert_close(other_way.head.weight, as_it_was.head.weight.flip(0))


# --------------------------------------------------------------------------------------------------
# Pictures


def picture(tmp_path, image, name="a.png", **changes):
    """The pixels of a picture that is written and read back."""
    image.save(tmp_path / name, **changes.pop("save", {}))
    cfg = DataConfig(kind="image", **changes)
    return pictures.decode_picture((tmp_path / name).read_bytes(), name, cfg)


def test_pictures_of_any_kind_keep_what_they_show(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        found = picture(tmp_path, Image.fromarray(levels), name)
        assert found.tolist() == [[[0, 100], [200, 255]]]  # scaled, not clipped
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    white = [[[255, 255]], [[0, 255]], [[0, 255]]]  # red, then what is transparent: white
    for name in ("b.png", "b.webp"):
        found = picture(tmp_path, clear, name, save={} if name == "b.png" else {"lossless": True})
        assert found.tolist() == white
    palette = clear.quantize(4)
    assert picture(tmp_path, palette, "c.png").tolist() == white
    grey = Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8), "LA")
    assert picture(tmp_path, grey, "d.png").tolist() == [[[0, 255]]]
    upright = Image.fromarray(np.array([[0, 50], [100, 150], [200, 250]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: shown turned by 90° to the right
    turned = picture(tmp_path, upright, "e.png", save={"exif": exif})
    assert turned.tolist() == [[[200, 100, 0], [250, 150, 50]]]


def test_pictures_are_made_of_one_size_and_kind_when_asked(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    wide = Image.fromarray(np.repeat(np.array([[10, 200, 90]], np.uint8), 4, 0).repeat(4, 1))
    cropped = picture(tmp_path, wide, image_size=[1, 4, 4], resize="crop")
    assert cropped.shape == (1, 4, 4) and (cropped == 200).all()  # the middle
    fitted = picture(tmp_path, wide, image_size=[3, 12, 12], resize="fit")
    assert fitted.shape == (3, 12, 12) and (fitted[:, 0] == 255).all()  # all of it, on white
    with pytest.raises(UserError, match=r"--image_size=\[1,4,4\] --resize=crop"):
        pictures.check_shape(np.zeros((1, 4, 12)), [1, 4, 4], "a.png")


def test_a_picture_of_more_pixels_than_memory_is_refused(tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 100)
    with pytest.raises(UserError, match="20×20 pixels, more than 100"):
        picture(tmp_path, Image.new("L", (20, 20)))


def test_one_data_set_of_many_sizes(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for i in range(24):
        folder = tmp_path / "p" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (8 + i, 10, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg")
    settings = dict(dataset="p", train_file=str(tmp_path / "p"), data_dir=str(tmp_path / "data"),
                    kind="image")  # fmt: skip
    with pytest.raises(UserError, match="--resize=fit"):
        data.build(train.Config(**settings))
    meta = data.build(train.Config(**settings, image_size=[1, 8, 8], resize="crop"))
    assert meta["shape"] == [1, 8, 8]
    assert sum(split["examples"] for split in meta["splits"].values()) == 24
    assert build_model(ModelConfig(image_size=(1, 8, 8), n_classes=2))(
        torch.zeros(1, 1, 8, 8)
    ).shape == (1, 2)


def test_columns_stay_where_they_belong(titled, tmp_path):
    blank = "id;title;body\n7;goal goal;it\n\n8;bank bank;of\n"
    assert [r["id"] for r in labels(titled, blank, keep=["id"])] == ["7", "", "8"]
    with pytest.raises(UserError, match="has no columns to --keep"):
        labels(titled, "goal\n", name="a.txt", keep=["id"])
    with pytest.raises(UserError, match="two columns of the output would have one name"):
        labels(titled, NEW, keep=["title", "title"])
    short = "id;title;body\n7;goal goal;it\n8\n9;bank bank;it\n"
    with pytest.raises(UserError, match="line 3: 1 fields where 3 are needed"):
        labels(titled, short)
    assert [r["label"] for r in labels(titled, short, drop_bad_rows=True)] == ["sport", "money"]


def test_new_texts_in_files_of_their_own_and_fasttext_lines(titled, capsys):
    (titled / "texts").mkdir(exist_ok=True)
    for name, text in (("a", "goal\ngoal coach"), ("b", "bank\nbank"), (".c", "hidden")):
        (titled / f"texts/{name}.txt").write_text(text)
    config = Config(input=str(titled / "texts"), output=str(titled / "l.csv"), where=True)
    label_file(Classifier(titled / "out"), config)
    found = [(r["where"][-5:], r["label"]) for r in csv.DictReader(open(titled / "l.csv"))]
    assert found == [("a.txt", "sport"), ("b.txt", "money")]
    lines = "__label__money goal goal\nbank bank\n"
    assert [r["label"] for r in labels(titled, lines, name="f.txt")] == ["sport", "money"]
    labels(titled, "bank " * 99, name="long.txt")
    assert "1 texts are longer than max_len=32: their starts were read" in capsys.readouterr().out
