"""Images and rows of numbers: what is stored is what the source holds; augmentation is
reproducible, for training only."""

import functools
import gzip
import http.server
import io
import json
import math
import os
import struct
import tarfile
import threading

from configurator import UserError, file_sha256

import numpy as np
import pytest
import torch
from PIL import Image

import batches
import data
import examples
import finetune
import predict
import tasks
import train
from labelling import file_settings
from model import ModelConfig, Transformer
from predict import Classifier
from tests.conftest import open_split, report_of, task_of
from tests.forks import script
from tests.test_one_gradient_many_ways import compiling_keeps_the_gradient
from weights import from_pretrained


def write_images(folder, n=120, shape=(12, 12), mode="L", seed=0):
    """Folders `bar` and `ring` of n small pictures in all, told apart by what is drawn."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        x = rng.integers(0, 60, (*shape, 3) if mode == "RGB" else shape).astype(np.uint8)
        r, c = rng.integers(1, shape[0] - 7), rng.integers(1, shape[1] - 7)
        label = ("bar", "ring")[i % 2]
        x[r : r + 6, c : c + 6] = 255 if label == "ring" else x[r : r + 6, c : c + 6]
        x[r + 1 : r + 5, c + 1 : c + 3 if label == "bar" else c + 5] = 255 if label == "bar" else 0
        os.makedirs(f"{folder}/{label}", exist_ok=True)
        Image.fromarray(x).save(f"{folder}/{label}/{i:03}.png")
    return str(folder)


@pytest.fixture
def images(tmp_path):
    return dict(
        dataset="shapes",
        kind="image",
        train_file=write_images(tmp_path / "pictures"),
        data_dir=str(tmp_path / "data"),
        out_dir=str(tmp_path / "out"),
        n_layer=2,
        d_model=32,
        n_head=2,
        batch_size=16,
        epochs=25.0,
        warmup_steps=5,
        learning_rate=3e-3,
        wandb_mode="disabled",
        dtype="float32",
        device="cpu",
    )


def test_an_image_folder_is_stored_learnt_and_told_apart(images):
    done = script("train.py", **images, shift=0.1)
    assert done.returncode == 0, done.stderr
    cfg = train.Config(**images)
    meta = data.open_meta(cfg)
    assert meta["shape"] == [1, 12, 12] and meta["label_names"] == ["bar", "ring"]
    stored = {s: open_split(cfg, meta, s, 9) for s in data.SPLITS}
    pixels = {bytes(x.tobytes()): y for d in stored.values() for x, y in zip(d.values, d.labels)}
    assert len(pixels) == 120
    for label, name in enumerate(meta["label_names"]):
        folder = f"{images['train_file']}/{name}"
        for f in os.listdir(folder):
            assert pixels[np.asarray(Image.open(f"{folder}/{f}")).tobytes()] == label
    done = script("eval.py", images["out_dir"])
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(images["out_dir"])) >= {"eval.json", "confusion.png", "mistakes.png"}
    report = report_of(Classifier(images["out_dir"]), "test")
    assert report["accuracy"] >= 0.9


STRONG = dict(shift=0.2, rotate=20.0, scale=0.2, flip=True, cutout=0.5, mixup=0.5)


def test_augmentation_is_a_function_of_seed_epoch_and_example(images):
    cfg = train.Config(**images)
    meta = data.build(cfg)
    a, b, other = (
        open_split(cfg, meta, "train", 9, seed, augmentation=STRONG) for seed in (1, 1, 2)
    )

    def batch(d, epoch, indices):
        made = d.batch(epoch, np.array(indices))
        return made.inputs[0], made.targets

    x, y = batch(a, 3, [5, 2, 9])
    assert x.dtype == torch.float32 and x.shape == (3, 1, 12, 12) and y.shape == (3, 2)
    torch.testing.assert_close(y.sum(1), torch.ones(3))
    alone = [batch(b, 3, [i]) for i in (5, 2, 9)]  # whatever stands beside it
    torch.testing.assert_close(torch.cat([v for v, _ in alone]), x, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(torch.cat([t for _, t in alone]), y)
    assert not torch.allclose(batch(b, 4, [5, 2, 9])[0], x, atol=1)
    assert not torch.allclose(batch(other, 3, [5, 2, 9])[0], x, atol=1)
    for d in (a, open_split(cfg, meta, "val", 9), open_split(cfg, meta, "test", 9)):
        made = d.batch(None, np.arange(10))  # evaluation sees what is stored
        (x,), y = made.inputs, made.targets
        assert x.dtype == torch.uint8 and np.array_equal(x.numpy(), d.values[:10])
        assert np.array_equal(y.numpy(), d.labels[:10])


def test_compiling_keeps_the_gradient_of_images(images):
    cfg = train.Config(**images | dict(compile=True))
    meta = data.build(cfg)
    examples = open_split(cfg, meta, "train", 9)
    requests = list(
        batches.GlobalBatches(examples, 20, 16384, 1, 0, len(examples) // 20 + 1, fixed_shapes=True)
    )
    assert {len(made.inputs[0]) for r in requests for made in examples.__getitems__(r)} == {20}
    ((epoch, indices, shape),) = requests[-1]
    batch, filled = examples.batch(epoch, indices), examples.batch(epoch, indices, shape)
    assert (
        compiling_keeps_the_gradient(cfg, meta, task_of(cfg, meta), batch, filled, 1e-5)
        == len(indices)
        == len(examples) % 20
        > 0
    )


def test_each_augmentation_is_what_it_says():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    x[0, 0, 4, 2] = 200
    still, draws = torch.full((1, 24), 0.5), torch.full((1, 24), 0.5)
    same = examples.augment(x, still, shift=0.3, rotate=90.0, scale=0.5)
    torch.testing.assert_close(same, x.float(), atol=1e-3, rtol=0)  # draws of 0.5: no change
    draws[0, 4] = 0.2
    torch.testing.assert_close(
        examples.augment(x, draws, flip=True), x.float().flip(-1), atol=1e-3, rtol=0
    )
    draws[0, :5] = torch.tensor([1, 0.5, 0.5, 0.5, 0.9])
    torch.testing.assert_close(
        examples.augment(x, draws, shift=2 / 9), torch.roll(x.float(), -2, -1), atol=1e-2, rtol=0
    )
    draws[0, :4] = torch.tensor([0.5, 0.5, 1, 0.5])
    turned = examples.augment(x, draws, rotate=90.0)
    assert max((turned - torch.rot90(x.float(), k, (2, 3))).abs().max() < 0.1 for k in (1, -1))
    for rows, columns in ((slice(31, 33), slice(76, 116)), (slice(12, 52), slice(95, 97))):
        wide = torch.zeros(1, 1, 64, 192, dtype=torch.uint8)
        wide[0, 0, rows, columns] = 255  # a bar of 2 × 40 pixels
        turned = examples.augment(wide, draws, rotate=30.0)[0, 0]
        spread = [torch.cov(torch.nonzero(x > 64).T.double()) for x in (wide[0, 0], turned)]
        angles = [torch.atan2(2 * c[0, 1], c[1, 1] - c[0, 0]).item() / 2 for c in spread]
        assert abs(angles[1] - angles[0]) % math.pi == pytest.approx(math.radians(30), abs=0.03)
    cut = examples.augment(torch.full((1, 1, 10, 10), 255, dtype=torch.uint8), still, cutout=0.8)
    assert (cut == 0).sum() == 16 and (
        cut[0, 0, 3:7, 3:7] == 0
    ).all()  # half of 0.8 of the side, in the middle
    draws = torch.full((1, 24), 0.5)
    draws[0, 11] = 0.9
    blended = examples.augment(torch.cat((x, x.flip(-1))), draws, mixup=0.5)
    torch.testing.assert_close(
        blended, torch.lerp(x.float(), x.float().flip(-1), 0.225), atol=1e-2, rtol=0
    )


def test_augmentation_is_exact_under_autocast():
    x, draws = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8), torch.rand(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        inside = examples.augment(x, draws, shift=0.1, rotate=20.0, scale=0.2)
    assert torch.equal(inside, examples.augment(x, draws, shift=0.1, rotate=20.0, scale=0.2))


def test_flip_averaging(images):
    model = Transformer(
        ModelConfig(image_size=(1, 12, 12), n_classes=2, d_model=32, n_head=2)
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    x = torch.randint(0, 255, (3, 1, 12, 12), dtype=torch.uint8)
    batch = examples.Batch((x,), None, 3, 3)._replace(targets=torch.zeros(3))
    got = tasks.run_model(model, batch, torch.device("cpu"), torch.float32, mirror=True)
    torch.testing.assert_close(got, (model(x) + model(x.flip(-1))) / 2)


@pytest.mark.parametrize(
    "name, content, says",
    [
        (
            "bar/bad.png",
            b"\x89PNG\r\n\x1a\n broken",
            r"bad.png: not a readable image .*drop_bad_rows",
        ),
        ("bar/short.png", None, r"short.png: not a readable image"),
        (
            "ring/colour.png",
            Image.new("RGB", (12, 12)),
            r"colour.png: .* are \(3, 12, 12\), not \(1, 12, 12\)",
        ),
        (
            "ring/wide.png",
            Image.new("L", (13, 12)),
            r"wide.png: .* are \(1, 12, 13\), not \(1, 12, 12\)",
        ),
    ],
)
def test_bad_images_are_named(images, name, content, says):
    path = f"{images['train_file']}/{name}"
    if isinstance(content, Image.Image):
        content.save(path)
    else:
        open(path, "wb").write(
            content or open(f"{images['train_file']}/bar/000.png", "rb").read()[:-40]
        )
    with pytest.raises(UserError, match=says):
        data.build(train.Config(**images))
    assert os.listdir(images["data_dir"]) == []


GOOD = "x,y,label\n" + "".join(f"{i},{i * i},{'ab'[i % 2]}\n" for i in range(40))


@pytest.mark.parametrize(
    "row, settings, says",
    [
        ("1,,a", {}, "table.csv, line 42: feature 1 is empty or NaN; .*--impute=True"),
        ("nan,2,a", {}, "line 42: feature 0 is empty or NaN"),
        ("1,inf,a", {}, "line 42: feature 1 is infinite"),
        ("1,inf,a", dict(impute=True), "line 42: feature 1 is infinite; .*--drop_bad_rows=True$"),
        ("1,two,a", {}, "line 42: could not convert string to float: 'two': --columns must name"),
        (
            "1,2,a",
            dict(label_column="x", target="number", columns=["label"]),
            "could not convert.*'a'",
        ),
        (
            "1,2,a",
            dict(target="number"),
            "line 2: label 'a' is not a number, which --target=number needs",
        ),
        ("1,2", {}, "line 42: 2 fields where 3 are needed"),
        (
            "-1e155,2,a",
            dict(label_column="x", target="number", columns=["y"]),
            "line 42: label '-1e155' is too large: its square would overflow",
        ),
        ("1,2,a", dict(kind="image"), r"line 2: 2 pixels; give --image_size"),
        (
            "1,2,a",
            dict(kind="image", image_size=[1, 1, 2]),
            r"line 18: pixels are whole numbers from 0 to 255",
        ),
    ],
)
def test_bad_tables_are_named(tmp_path, row, settings, says):
    (tmp_path / "table.csv").write_text(GOOD + row + "\n")
    with pytest.raises(UserError, match=says):
        data.build(
            train.Config(
                **dict(
                    dataset="t",
                    train_file=str(tmp_path / "table.csv"),
                    kind="features",
                    data_dir=str(tmp_path / "data"),
                )
                | settings
            )
        )


def test_large_numbers_that_differ_by_little_are_told_apart(tmp_path, capsys):
    """As timestamps do; a column that does not vary has no effect, in a new file neither."""
    rng = np.random.default_rng(0)
    rows = ["ts,same,label"]
    for i in range(300):
        late = rng.random() < 0.5
        rows.append(f"{1_700_000_000_000 + 5000 * late + i},7,{'late' if late else 'early'}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    settings = dict(dataset="t", train_file=str(tmp_path / "t.csv"), kind="features",
                    model="linear", data_dir=str(tmp_path / "data"), epochs=20.0,
                    learning_rate=0.1, out_dir=str(tmp_path / "out"), wandb_mode="disabled",
                    val_fraction=0.1, device="cpu", columns=["ts", "same"])  # fmt: skip
    train.train(train.Config(**settings))
    assert "without effect, as they do not vary in train: same" in capsys.readouterr().out
    clf = Classifier(settings["out_dir"])
    again = file_settings(clf, predict.Config(columns=["same", "ts"]))
    assert again.columns == ["ts", "same"]  # by name, not by place
    assert report_of(clf, "val")["accuracy"] > 0.95
    one, other = clf([np.array([1.7e12 + 5000, 7.0]), np.array([1.7e12 + 5000, 2000.0])])
    assert one == other


def test_rows_with_infinite_numbers_are_left_out_if_asked(tmp_path):
    (tmp_path / "table.csv").write_text(GOOD + "1,inf,a\n2,,a\n")
    for impute, n_bad in ((False, 2), (True, 1)):
        cfg = train.Config(
            dataset=f"t{impute}",
            train_file=str(tmp_path / "table.csv"),
            kind="features",
            data_dir=str(tmp_path / "data"),
            drop_bad_rows=True,
            impute=impute,
        )
        meta = data.build(cfg)
        assert meta["removed"]["bad_rows"] == n_bad
        assert sum(split["examples"] for split in meta["splits"].values()) == 42 - n_bad


def test_a_target_that_does_not_vary_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("x,y\n" + "".join(f"{i},5\n" for i in range(40)))
    settings = dict(train_file=str(tmp_path / "table.csv"), data_dir=str(tmp_path / "data"))
    cfg = train.Config(dataset="t", kind="features", target="number", label_column="y", **settings)
    with pytest.raises(UserError, match="every row has the target 5: there is nothing to predict"):
        data.build(cfg)


def test_an_empty_feature_becomes_trains_mean_if_asked(tmp_path):
    (tmp_path / "table.csv").write_text(GOOD + ",1600,a\n")
    cfg = train.Config(
        dataset="t",
        train_file=str(tmp_path / "table.csv"),
        kind="features",
        data_dir=str(tmp_path / "data"),
        impute=True,
    )
    meta = data.build(cfg)
    x = np.concatenate([open_split(cfg, meta, s, 1).values for s in data.SPLITS])
    assert (x[:, 0] == 0).sum() == 1 and np.isfinite(x).all()  # 0 is the mean, standardised


def test_truth_values_are_features(tmp_path):
    rows = "".join(f"{i},{('True', 'false')[i % 2]},{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "table.csv").write_text("x,wet,label\n" + rows)
    cfg = train.Config(dataset="t", train_file=str(tmp_path / "table.csv"), kind="features",
                       data_dir=str(tmp_path / "data"))  # fmt: skip
    meta = data.build(cfg)
    split = open_split(cfg, meta, "train", 1)
    assert ((split.values[:, 1] > 0) == (split.labels == 0)).all()


def test_a_text_and_an_image_model_are_not_for_tables(tmp_path):
    (tmp_path / "table.csv").write_text(GOOD)
    cfg = dict(
        dataset="t",
        train_file=str(tmp_path / "table.csv"),
        kind="features",
        data_dir=str(tmp_path / "data"),
        out_dir=str(tmp_path / "out"),
        wandb_mode="disabled",
    )
    with pytest.raises(
        UserError, match="reads text and images; for rows of numbers take --model=mlp or linear"
    ):
        train.train(train.Config(**cfg))
    train.train(train.Config(**cfg, model="mlp", epochs=2.0))


# ------------------------------------------------------------------------------------------------
# Published ViT weights

hf = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_channels=1,
            num_labels=3,
            initializer_range=0.2,
        )
    ).eval()
    model.save_pretrained(folder := tmp_path_factory.mktemp("vit"))
    return model, folder


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_vit_parity_at_its_own_and_another_resolution(vit, size):
    model, folder = vit
    x = torch.randint(0, 256, (5, 1, *size), dtype=torch.uint8)
    ours = from_pretrained(folder, image_size=(1, *size))
    with torch.no_grad():
        theirs = model(
            (x / 255 - 0.5) / 0.5, interpolate_pos_encoding=True, output_hidden_states=True
        )
        torch.testing.assert_close(ours(x), theirs.logits, atol=1e-4, rtol=1e-4)
        hidden = model.vit.layernorm(theirs.hidden_states[-1])
        torch.testing.assert_close(ours.hidden(x), hidden.flatten(0, 1), atol=1e-4, rtol=1e-4)


IMAGES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_channels=3)
IMAGES |= dict(image_size=16, patch_size=4, num_labels=3)
TOWERS = {
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**IMAGES, intermediate_size=64)),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config(**IMAGES, mlp_ratio=2)),
    "siglip": (
        hf.SiglipForImageClassification,
        hf.SiglipConfig(
            vision_config=IMAGES | dict(intermediate_size=64),
            text_config=dict(vocab_size=9, hidden_size=8, num_attention_heads=1, bos_token_id=1,
                             eos_token_id=2),
            num_labels=3,
        ),
    ),
    "siglip_vision_model": (
        hf.SiglipVisionModel,
        hf.SiglipVisionConfig(**IMAGES, intermediate_size=64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_other_towers_for_images(tmp_path, name, size):
    torch.manual_seed(0)
    cls, config = TOWERS[name]
    model = cls(config).eval()
    for key, p in model.named_parameters():
        is_norm = p.ndim == 1 and key.endswith("weight")
        torch.nn.init.normal_(p, mean=float(is_norm), std=0.2)
    model.save_pretrained(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": mean, "image_std": std})
    )
    x = torch.randint(0, 256, (5, 3, *size), dtype=torch.uint8)
    pixels = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    loaded = from_pretrained(tmp_path, image_size=(3, *size))
    with torch.no_grad():
        theirs = model(pixels, interpolate_pos_encoding=True)
        if name == "siglip_vision_model":
            got, expected = loaded.hidden(x), theirs.last_hidden_state.flatten(0, 1)
        else:
            got, expected = loaded(x), theirs.logits
            assert expected.std(0).min() > 0.05
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    fresh = from_pretrained(tmp_path, n_classes=4, new_head=True, image_size=(3, *size))
    assert fresh(x).shape == (5, 4)


@pytest.mark.parametrize(
    "how, scaled",
    [
        (dict(do_normalize=False), lambda x: x / 255),
        (dict(do_rescale=False), lambda x: (x - 0.4) / 0.2),
        (dict(rescale_factor=1 / 127.5), lambda x: (x / 127.5 - 0.4) / 0.2),
        (dict(image_mean=None, image_std=None), lambda x: x / 127.5 - 1),
    ],
)
def test_pixels_are_scaled_as_the_folder_says(tmp_path, how, scaled):
    cls, config = TOWERS["dinov2"]
    model = cls(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    how = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3} | how
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(how))
    x = torch.randint(0, 256, (5, 3, *[config.image_size] * 2), dtype=torch.uint8)
    with torch.no_grad():
        got, expected = from_pretrained(tmp_path)(x), model(scaled(x.double()).float()).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "other.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": how}))
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(x), got, atol=0, rtol=0)
    for std in (0.0, float("nan"), "x"):
        wrong = how | {"image_std": [std] * 3, "do_normalize": True}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="preprocessor_config.json: image_std"):
            from_pretrained(tmp_path)


def test_pixels_that_fill_no_patch_are_left_out(tmp_path):
    config = hf.ViTConfig(
        image_size=17, patch_size=5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    x = torch.randint(0, 256, (5, 3, 17, 17), dtype=torch.uint8)
    with torch.no_grad():
        got, expected = from_pretrained(tmp_path)(x), model(x / 127.5 - 1).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_trunk_of_a_distilled_deit_gets_a_new_head(tmp_path):
    config = TOWERS["deit"][1]
    hf.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, n_classes=4)
    assert loaded.head.weight.shape == (4, config.hidden_size)


def test_vit_refusals(vit):
    with pytest.raises(UserError, match="reads images of 1 channels, not images of 3 channels"):
        from_pretrained(vit[1], image_size=(3, 16, 16))
    with pytest.raises(UserError, match="patches of 4×4 do not divide images of 18×16"):
        from_pretrained(vit[1], image_size=(1, 18, 16))


def test_the_patch_of_a_tower_with_a_text_half_is_read(tmp_path, images):
    """SigLIP's config.json has two parts, and its folder a tokenizer."""
    hf = pytest.importorskip("transformers")
    half = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    seeing = half | dict(patch_size=3, image_size=12)
    config = hf.SiglipConfig(text_config=half | dict(vocab_size=100), vision_config=seeing)
    hf.SiglipModel(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    names = "n_layer", "d_model", "n_head", "patch"
    settings = {k: v for k, v in images.items() if k not in names}
    cfg = finetune.with_weights_settings(finetune.Config(**settings), tmp_path)
    assert cfg.patch == 3


def test_a_vit_is_fine_tuned_on_an_image_folder(images, vit):
    settings = {k: v for k, v in images.items() if k not in ("n_layer", "d_model", "n_head")}
    still = finetune.Config(
        **settings
        | dict(
            init_from=str(vit[1]),
            new_head=True,
            freeze="body",
            epochs=1.0,
            out_dir=images["out_dir"] + "-frozen",
        )
    )
    finetune.finetune(still)
    moved = from_pretrained(still.out_dir).state_dict()
    start = from_pretrained(vit[1], image_size=(1, 12, 12)).state_dict()
    assert {k for k in start if not torch.equal(start[k], moved[k]) or k.startswith("head")} == {
        k for k in start if k.startswith("head")
    }
    cfg = finetune.Config(**settings | dict(init_from=str(vit[1]), new_head=True, dropout=0.0))
    finetune.finetune(cfg)
    clf = Classifier(cfg.out_dir)
    assert clf.model.config.family == "vit" and clf.model.config.image_size == (1, 12, 12)
    assert report_of(clf, "test")["accuracy"] > 0.7


# ------------------------------------------------------------------------------------------------
# The formats of CIFAR and MNIST, from a server


@pytest.fixture
def server(tmp_path):
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www")
    )
    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


def test_cifars_and_mnists_files_are_read(server, tmp_path):
    folder, url = server
    rng = np.random.default_rng(0)
    pixels, labels = (
        rng.integers(0, 256, (60, 3, 4, 4)).astype(np.uint8),
        np.arange(60, dtype=np.uint8) % 3,
    )
    parts_of_cifar = [
        b"".join(bytes([y]) + x.tobytes() for x, y in zip(pixels[a:b], labels[a:b]))
        for a, b in ((0, 25), (25, 60))
    ]
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        for i, batch in enumerate(parts_of_cifar):
            info = tarfile.TarInfo(f"batches/data_batch_{i}.bin")
            info.size = len(batch)
            archive.addfile(info, io.BytesIO(batch))
        archive.addfile(tarfile.TarInfo("batches/readme.html"), io.BytesIO())
    cifar = f"{url}/cifar.tar.gz!*/data_batch*.bin#sha256={file_sha256(folder / 'cifar.tar.gz')}"
    parts = []
    for name, head, body in (
        ("images-idx3", (2051, 60, 4, 12), pixels),
        ("labels-idx1", (2049, 60), labels),
    ):
        with gzip.open(folder / f"t-{name}-ubyte.gz", "wb") as f:
            f.write(struct.pack(f">{len(head)}i", *head) + body.tobytes())
        parts.append(f"{url}/t-{name}-ubyte.gz#sha256={file_sha256(folder / f't-{name}-ubyte.gz')}")
    for source, shape in ((cifar, [3, 4, 4]), (" + ".join(parts), [1, 4, 12])):
        cfg = train.Config(
            dataset=f"d{shape[0]}",
            kind="image",
            image_size=shape,
            train_file=source,
            data_dir=str(tmp_path / "d"),
        )
        meta = data.build(cfg)
        splits = [open_split(cfg, meta, s, 1) for s in data.SPLITS]
        found = {x.tobytes(): y for d in splits for x, y in zip(d.values, d.labels)}
        assert found == {x.tobytes(): y for x, y in zip(pixels, labels)} and meta["shape"] == shape
    with pytest.raises(UserError, match="the download has SHA-256 .* not 0000"):
        data.build(
            train.Config(
                **dict(
                    vars(cfg),
                    dataset="e",
                    train_file=f"{url}/cifar.tar.gz!*.bin#sha256=" + "0" * 64,
                )
            )
        )
