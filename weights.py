"""Files of weights: our checkpoints, and models from either layout, every weight accounted for.

A checkpoint is one file of tensors and plain types, enough to evaluate or predict anywhere.
"""
import dataclasses
import os
import pickle
import zipfile
from pathlib import Path
from typing import Literal

from configurator import UserError, mismatch, read_json, replacing

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake

from baselines import build_model
from huggingface import (
    SkipInit,
    StoredWeight,
    ends_with_padding,
    head_in_unit,
    read_hf,
    read_label_names,
    skeleton,
)
from model import ModelConfig, Transformer
from sharding import read_parts

CHECKPOINT_FORMAT = 2
CHECKPOINT = {  # what one holds, for configurator.mismatch
    "format": int, "model": {"*": torch.Tensor}, "model_config": dict, "tokenizer": str | None,
    "config": {"dataset": str, "wandb_mode": str}, "label_names": list[str],
    "n_suffix": int | None, "max_len": int, "kind": Literal["text", "image", "features"],
    "scaling": dict, "data_sha256": {"*": str}, "data_folder": str, "step": int, "epoch": float,
    "best": dict | None}
LAST = {"ema": list[torch.Tensor], "bad_evals": int, "optimizers": list[dict], "elapsed": float,
        "run_id": str, "finished": bool}  # and what last.pt holds besides, to resume from
PARTS = {"folder": str, "files": {"*": int}, "tensors": {"*": list[int]}}  # see sharding.py


def save_checkpoint(path, checkpoint):
    """Write a dict: `path` is whole and on disk, or as it was before. Raises UserError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, map_location="cpu", parts=True):
    """The dict that save_checkpoint wrote; for a folder, that of its best.pt.

    parts: with the tensors that lie in parts beside it (sharding.py). Never unpickles anything but
    tensors and plain types. Raises UserError.
    """
    path = checkpoint_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise UserError(f"{path}: damaged in {damaged}; restore it, or train again with "
                                "--overwrite=True")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (UserError, MemoryError, PermissionError):
        raise
    except FileNotFoundError:
        hint = ""
        if (path.parent / "adapter_config.json").exists():
            hint = "; the folder holds an adapter alone: merge it with its model and save that"
        elif is_huggingface(path.parent):
            hint = f"; it is a Hugging Face folder: finetune.py --init_from={path.parent} begins "\
                   "with one"
        raise UserError(f"{path}: there is no such checkpoint{hint}") from None
    except zipfile.BadZipFile:
        raise UserError(f"{path}: refused: truncated, or not a checkpoint (a bare pickle could run "
                        "code); restore it, or train again with --overwrite=True") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: it holds more than tensors and plain types, so loading "
                        "it could run code, or it is not a checkpoint "
                        f"({str(error)[:120]!r})") from None
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        raise UserError(f"{path}: truncated or not a checkpoint ({str(error)[:120]!r}); "
                        "restore it, or train again with --overwrite=True") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project, or of another format than "
                        f"{CHECKPOINT_FORMAT}")
    expected = CHECKPOINT | (LAST if "optimizers" in checkpoint else {})
    wrong = mismatch(checkpoint, expected | ({"shards": PARTS} if "shards" in checkpoint else {}))
    wrong = wrong or next((name for name, w in checkpoint["model"].items() if is_view(w)), None)
    if wrong:
        raise UserError(f"{path}: damaged, or not written by this project: its {wrong} is missing "
                        "or not what it should be")
    if parts and "shards" in checkpoint:
        checkpoint = read_parts(checkpoint, path.parent)
        del checkpoint["shards"]  # none of it lies elsewhere now
    return checkpoint


def is_view(tensor):
    """Is a tensor sparse, or does it show more values than it holds? A small file could then fill
    the memory."""
    if is_fake(tensor):  # only its memory is asked for, see memory.py
        return False
    if tensor.layout != torch.strided:
        return True
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def checkpoint_file(path):
    """A checkpoint's file: of a run's folder, the best one."""
    path = Path(path)
    return path / "best.pt" if path.is_dir() else path


def load_weights(model, weights, source):
    """Load a state dict into a model. Raises UserError for a weight that does not fit."""
    check_weights(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def check_weights(own, weights, source):
    """Raise UserError for a weight that is missing, left over, of another shape than `own` has
    (a state dict), or not finite."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    for name, w in weights.items():
        if name not in own:
            wrong.append(f"{name} is left over")
        elif w.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(w.shape)}, not {tuple(own[name].shape)}")
        elif isinstance(w, torch.Tensor) and not is_fake(w) and not w.isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{source}: {wrong[0]}{more}")


def filled_transformer(config, weights, source, fresh=(), dtype=torch.float32):
    """A Transformer with these weights (name → tensor or StoredWeight, which check_weights has
    seen), in dtype, but the head in float32, in which it is computed. No weight is in memory twice,
    but one that has to change its dtype. fresh: the names of weights that are drawn instead."""
    with torch.device("meta"), SkipInit():
        model = Transformer(config)
    state = {}
    for name, p in model.state_dict().items():
        wanted = torch.float32 if name.startswith(("head", "dense")) else dtype
        w = weights.get(name)
        if isinstance(w, torch.Tensor):
            state[name] = w.to(wanted).contiguous()  # itself, if it is so already
            continue
        state[name] = torch.empty(p.shape, dtype=wanted)
        if isinstance(w, StoredWeight) and not w.copy_to(state[name]):
            raise UserError(f"{source}: {name} is not finite")
    model.load_state_dict(state, assign=True)
    model.make_tables()
    model.initialise(fresh)
    return model.eval()


def read_model_config(saved, path):
    """The ModelConfig of the dict that a checkpoint keeps of it."""
    saved = dict(saved)
    if saved.pop("stem", "tokens") != "tokens":  # until 2026-11-25 there was stem="words"
        raise UserError(f"{path}: reads hashed words (stem=words), which is no longer supported; "
                        "config/bow.py reads the same features")
    if every := saved.pop("global_every", 0):  # until 2026-11-26
        layers = range(saved.get("n_layer", 0))
        saved["window_layers"] = tuple(i for i in layers if i % every)
    known = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(saved.keys() - known.keys()):
        raise UserError(f"{path}: its model has a setting {unknown[0]!r} that this code lacks")
    for name, value in saved.items():
        if isinstance(value, list):  # JSON has no tuples
            saved[name] = tuple(value)
    if wrong := mismatch(saved, {name: known[name] for name in saved}):
        raise UserError(f"{path}: its model's {wrong}={saved[wrong]!r} is not what it should be")
    return ModelConfig(**saved)


def load_model(checkpoint, path):
    """The model of a checkpoint (as load_checkpoint returns it), in eval mode."""
    config = read_model_config(checkpoint["model_config"], path)
    weights = checkpoint["model"]
    check_weights(skeleton(build_model, config, weights, path), weights, path)
    if config.model == "transformer":
        return filled_transformer(config, weights, path)
    model = build_model(config)
    model.load_state_dict(weights)
    return model.eval()


def is_huggingface(path):
    """Is it a Hugging Face folder, not a checkpoint or a run's folder?"""
    path = Path(path)
    is_run = (path / "best.pt").exists() or (path / "metrics.jsonl").exists()
    return (path / "config.json").exists() and not is_run


def from_pretrained(path, n_classes=None, new_head=False, max_len=None, image_size=None,
                    label_names=None, scaling=None, pooling=None, changes=None,
                    dtype=torch.float32):
    """The Transformer of a checkpoint (a file, or a run's folder) or of a Hugging Face folder, in
    eval mode.

    n_classes: return a classifier, with the weights' own head, or a fresh one where they have none
    or with new_head. label_names: the classes in the data's order, to which the head's rows are
    brought; None: its own order. scaling: of a regression, the target's mean and spread, to which
    the head is brought. n_classes=0: return a language model. Our checkpoints and decoders keep
    their own head; encoders get one that is tied to the embedding, and lack the layer before it, so
    that it has to be trained. max_len: tokens that the model must read. image_size: for images of
    another size, learned positions are interpolated (bicubic; Dosovitskiy et al. 2021, section
    3.2). pooling: how tokens become one vector; None: as the weights say. changes: to the
    ModelConfig. dtype: of all but the head; a folder's weights are in memory once, in it; None:
    bfloat16 if they are stored in it, else float32. Raises UserError for what is not supported,
    missing, left over, of the wrong shape, or not finite.
    """
    config, weights, names, own_scaling = read_weights(path, pooling)
    if n_classes is None and config.lm_head == "own" and "lm_head.weight" not in weights:
        config.lm_head = ""  # of a trunk that is saved alone
    if n_classes == 0:
        if config.d_embedding and not config.lm_head:
            raise UserError(f"{path}: its embedding is narrower than its blocks, so no language "
                            "model can be made of it: it can be a classifier")
        config.n_classes = 0
        config.lm_head = config.lm_head or "tied"
        weights = without(weights, "head.")
    elif n_classes:
        config.lm_head = ""
        weights = without(weights, "lm_head.")
        if config.n_classes not in (0, n_classes) and not new_head:
            raise UserError(f"{path}: its head tells {config.n_classes} classes apart, the data "
                            f"has {n_classes}; give it a new one with --new_head=True")
        new_head = new_head or config.n_classes != n_classes
        config.n_classes = n_classes
        if label_names and not new_head:
            weights = weights | head_in_order(weights, names, label_names, path)
        if "target_mean" in (scaling or {}) and not new_head:
            weights = weights | standardised_head(weights, own_scaling, scaling, path)
    own_head = config.n_classes and not new_head and is_huggingface(path)
    if own_head and config.pooling == "last" and ends_with_padding(path):
        raise UserError(f"{path}: its tokenizer ends texts with the token that is padding, so that "
                        "its classifier reads the one before, which is not supported: give it a "
                        "new head with --new_head=True")
    if config.image_size:
        weights = fit_image_size(config, weights, image_size, max_len, path)
    elif image_size:
        raise UserError(f"{path}: reads text, not images of {image_size[0]} channels")
    elif max_len and max_len > config.max_len:
        if config.position == "learned":
            raise UserError(f"{path}: reads {config.max_len} tokens at the most; "
                            f"set --max_len={config.max_len}")
        config.max_len = max_len
    config = dataclasses.replace(config, **{"pooling": pooling or config.pooling} | (changes or {}))
    if new_head:
        weights = without(weights, "head.")
    if not config.n_classes or not config.head_dense:
        weights = without(weights, "dense")  # a bare trunk may bring a pooler
    expected = skeleton(Transformer, config, weights, path)
    fresh = [name for name in expected
             if new_head and name.startswith(("head", "dense")) and name not in weights]
    check_weights({name: w for name, w in expected.items() if name not in fresh}, weights, path)
    if dtype is None:
        stored = [w.kind for w in weights.values() if isinstance(w, StoredWeight)]
        dtype = torch.bfloat16 if stored and set(stored) == {"BF16"} else torch.float32
    return filled_transformer(config, weights, path, fresh, dtype)


def read_weights(path, pooling):
    """(ModelConfig, {name: weight}, the names of its head's classes, the scaling of its head's
    numbers, {} where they are in their own unit) of either layout."""
    if not is_huggingface(path):
        saved = load_checkpoint(path)
        config = read_model_config(saved["model_config"], path)
        return config, saved["model"], saved["label_names"], saved["scaling"]
    config, weights = read_hf(path, pooling)
    scaling = {}
    if isinstance(config, dict):  # a folder that save_hf wrote for our own trunk
        config = read_model_config(config, path)
        scaling = read_json(Path(path) / "config.json").get("scaling", {})
    return config, weights, read_label_names(path), scaling


def head_in_order(weights, names, label_names, path):
    """The head's weights for classes `names`, with their rows in the order of label_names."""
    if sorted(names) != sorted(label_names):
        raise UserError(f"{path}: its head tells {names[:20] or 'unnamed classes'} apart, the data "
                        f"has {label_names[:20]}; give it a new one with --new_head=True")
    order = [names.index(name) for name in label_names]
    return {name: as_tensor(weights[name])[order]
            for name in ("head.weight", "head.bias") if name in weights}


def standardised_head(weights, own, scaling, path):
    """A regression's head, which predicts by `own` scaling ({}: in the target's unit), for another
    scaling."""
    std = scaling["target_std"]
    factor = own.get("target_std", 1.0) / std
    shift = (own.get("target_mean", 0.0) - scaling["target_mean"]) / std
    weight = as_tensor(weights["head.weight"])
    if "head.bias" in weights:
        return head_in_unit({"head.weight": weight, "head.bias": as_tensor(weights["head.bias"])},
                            factor, shift)
    if not own:
        raise UserError(f"{path}: its head has no bias, so it cannot be fitted to the data's mean; "
                        "give it a new one with --new_head=True")
    return {"head.weight": weight * factor}  # about the data's mean, as it was about its own


def as_tensor(w):
    return w.tensor() if isinstance(w, StoredWeight) else w


def without(weights, prefix):
    return {name: w for name, w in weights.items() if not name.startswith(prefix)}


def fit_image_size(config, weights, image_size, max_len, path):
    """Set the config's image_size; returns the weights with positions for it."""
    if not image_size and max_len:
        raise UserError(f"{path}: reads images, not text")
    if not image_size or tuple(image_size) == tuple(config.image_size):
        return weights
    (C, H, W), (channels, h, w), p = image_size, config.image_size, config.patch
    if C != channels:
        raise UserError(f"{path}: reads images of {channels} channels, not images of {C} channels")
    if H % p or W % p:
        raise UserError(f"{path}: its patches of {p}×{p} do not divide images of {H}×{W}")
    config.image_size = (C, H, W)
    if config.position != "learned":
        return weights
    n_patches = h // p * (w // p)
    n_first = weights["position.weight"].shape[0] - n_patches  # learned tokens before the patches
    first, grid = as_tensor(weights["position.weight"]).split([n_first, n_patches])
    grid = grid.T.reshape(1, -1, h // p, w // p).float()
    grid = F.interpolate(grid, (H // p, W // p), mode="bicubic")[0].flatten(1).T
    return weights | {"position.weight": torch.cat((first, grid))}
