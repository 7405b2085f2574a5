"""Hugging Face folders in and out: config.json, model.safetensors, tokenizer.json.

families.py says of each family how its weights and settings are named; reading and writing both
follow it.
"""
import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from configurator import (
    UserError,
    cannot_write,
    mismatch,
    read_json,
    scratch_folder,
    write_text,
)

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode

from families import FAMILIES, complete, n_unused_positions, read_config, write_config
from format import END_TOKENS
from model import ModelConfig, Transformer, qkv_rows


def their_names(name, family):
    """Their names for a weight of ours: several where ours is theirs stacked."""
    module, _, parameter = name.rpartition(".")
    module = module or name
    layer = ""
    if module.startswith("blocks."):
        _, i, module = module.split(".", 2)
        layer = family.layer.format(i)
    theirs = family.names[module]
    found = []
    for their in theirs if isinstance(theirs, tuple) else (theirs,):
        full = their[1:] if their.startswith("/") else family.root + layer + their
        found.append(full[:-1] if full.endswith("!") else f"{full}.{parameter}")
    return found


def is_norm(name):
    return name.endswith("norm.weight") or name.endswith(("norm1.weight", "norm2.weight"))


def is_transposed(name, family):
    is_matrix = name.endswith("weight") and not is_norm(name)
    return family.transposed and name.startswith("blocks.") and is_matrix


def part_sizes(name, n_parts, w, c):
    """How many rows of our weight `w` each of their n_parts has."""
    if n_parts == 3 and name.rpartition(".")[0].endswith("attention.qkv"):
        return qkv_rows(c)
    return [len(w) // n_parts] * n_parts


# --------------------------------------------------------------------------------------------------
# In

MOST_POSITION_VALUES = 2**26  # of rope tables: half a GiB
CHUNK_VALUES = 2**20  # of a file that are read at once
KINDS = "F64", "F32", "F16", "BF16"  # of numbers that are read


def read_hf(folder, pooling=None):
    """(ModelConfig, our state dict) of a Hugging Face folder; n_classes=0 where it holds no
    classifier. Of a folder that save_hf wrote for our own trunk: (dict, state dict).

    A sentence-transformers folder says itself how tokens become one vector (modules.json), which
    goes before the family's way, but not before one that is asked for: pooling, with the family's
    head.
    """
    folder = Path(folder)
    try:
        hf = complete(read_json(folder / "config.json"))
        theirs = read_safetensors(folder)
        if hf.get("model_type") == "textcls":
            return dict(hf["model_config"]), theirs
        config = read_config(hf, folder)
        own = read_sentence_settings(folder)
        if own and pooling is None:
            config = replace(config, **own)
    except FileNotFoundError as error:
        missing = os.path.relpath(error.filename or str(error), folder)
        hint = "a folder with config.json and model.safetensors is needed"
        if list(folder.glob("*.bin")):
            hint += " (.bin files can run code: convert them)"
        raise UserError(f"{folder}: there is no {missing}; {hint}") from None
    except KeyError as error:
        raise UserError(f"{folder}/config.json: {error} is missing") from None
    except UserError:
        raise
    except (ArithmeticError, AttributeError, OSError, RecursionError, TypeError, ValueError,
            SafetensorError) as error:
        raise UserError(f"{folder}: damaged: {error}") from None
    types = {field.name: field.type for field in fields(ModelConfig)}
    if wrong := mismatch(vars(config), types):
        raise UserError(f"{folder}/config.json: {wrong}={getattr(config, wrong)!r} is not what it "
                        "should be")
    return config, rename_weights(config, theirs, hf, folder)


def read_label_names(folder):
    """The classes' names in config.json, in order; [] where it has none, or LABEL_0 and so on."""
    names = read_json(Path(folder) / "config.json").get("id2label") or {}
    names = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else []
    if not all(isinstance(name, str) for name in names):
        return []
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return [] if generic else names


def read_sentence_settings(folder):
    """What a sentence-transformers folder says of its vectors, as settings of ModelConfig; {} of
    another folder, and where modules.json names no pooling. Raises UserError for what we would not
    compute exactly."""
    path = folder / "modules.json"
    if not path.exists():
        return {}
    found = {"pooling": None, "normalize": False, "head_dense": None, "head_norm": False}
    for module in json.loads(path.read_text(encoding="utf-8")):
        kind = module["type"].rpartition(".")[2]
        if kind == "Normalize":
            found["normalize"] = True
        elif kind == "Pooling":
            found["pooling"] = read_pooling(folder / module.get("path", "") / "config.json")
        elif kind != "Transformer":
            raise UserError(f"{path}: its {kind} layer is not supported; to begin with what stands "
                            "before it, delete modules.json")
    return found if found["pooling"] else {}


def read_pooling(path):
    """The pooling that a sentence-transformers Pooling layer's config.json names."""
    settings = read_json(path)
    modes = [key.removeprefix("pooling_mode_") for key, value in settings.items()
             if key.startswith("pooling_mode_") and value is True]
    modes = modes or [settings.get("pooling_mode", "mean")]
    ours = {"mean_tokens": "mean", "max_tokens": "max", "cls_token": "cls", "lasttoken": "last",
            "mean": "mean", "max": "max", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in ours:
        raise UserError(f"{path}: the pooling {modes} is not supported, only one of mean, max, cls "
                        "and last token is; to choose one, delete modules.json")
    return ours[modes[0]]


def ends_with_padding(folder):
    """Does a folder's tokenizer end each text with the token that config.json calls padding?"""
    folder = Path(folder)
    pad = read_json(folder / "config.json").get("pad_token_id")
    if pad is None or not (folder / "tokenizer.json").exists():
        return False
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").ids[-1:] == [pad]


def read_safetensors(folder):
    shards = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / shards[0]).exists():
        shards = sorted({Path(shard).name for shard in read_json(index)["weight_map"].values()})
    weights = {}
    for path in [folder / shard for shard in shards]:
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            with open(path, "rb") as beginning:
                is_pointer = beginning.read(20).startswith(b"version https://git")
            reason = f"damaged ({error}): fetch it again"
            if is_pointer:
                reason = "only names the file that Git LFS keeps: fetch that with git lfs pull"
            raise UserError(f"{path}: {reason}") from None
        with file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                shape = tuple(stored.get_shape())
                weights[name] = StoredWeight([(path, name, shape)], shape, stored.get_dtype())
    return weights


@dataclass
class StoredWeight:
    """A weight of ours as it lies in a folder's files: nothing is read before `copy_to`."""
    parts: list  # [(file, its name there, its shape)], to be stacked along their first dimension
    shape: tuple
    kind: str  # of its numbers, as safetensors calls it
    transposed: bool = False  # it lies there as (inputs, outputs)
    skip: int = 0  # so many rows of it are not ours
    offset: float = 0.0  # is added to it
    scale: "StoredWeight | None" = None  # (rows,): each row is multiplied

    def copy_to(self, out):
        """Fill `out`, a contiguous tensor of this shape, in its dtype; returns whether all of it is
        finite."""
        if is_fake(out):  # only its memory is asked for, see memory.py
            return True
        finite = True
        stacked = out.T if self.transposed else out
        if len(self.parts) == 1 and not self.transposed and not self.skip:
            stacked = stacked.view(self.parts[0][2])
        row = 0  # of those that are filled
        for chunk in self.chunks():
            finite = finite and bool(chunk.isfinite().all())
            stacked[row : row + len(chunk)].copy_(chunk)
            row += len(chunk)
        if self.offset:
            out.add_(self.offset)
        if self.scale is not None:
            out.mul_(self.scale.tensor().view(-1, *[1] * (out.ndim - 1)))
        return finite

    def chunks(self):
        """Its rows as the files have them, some at a time. A file is opened anew for each: what is
        read of it counts as memory until it is closed."""
        for file, name, shape in self.parts:
            step = max(1, CHUNK_VALUES // max(1, math.prod(shape[1:])))
            for start in range(self.skip, shape[0], step):
                with safe_open(file, "pt") as opened:
                    yield opened.get_slice(name)[start : start + step]

    def equals(self, other):
        """Does another weight hold the same values?"""
        if is_fake(torch.empty(0)):  # only memory is asked for: copies are the rule
            return True
        return self.shape == other.shape and all(
            torch.equal(*pair) for pair in zip(self.chunks(), other.chunks()))

    def tensor(self):
        out = torch.empty(self.shape)
        self.copy_to(out)
        return out


class SkipInit(TorchFunctionMode):
    """Leaves new weights as they are: without memory they need no values, and to draw some would
    import much (0.8 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(make, config, weights, path):
    """The state dict of make(config), without memory for its values. Raises UserError for settings
    that cannot be those of these weights: a stranger's file may say what no memory would hold."""
    c = config
    try:
        limits = {"n_layer": max(len(weights), 100), "n_head": c.d_model, "ngrams": 100,
                  "char_ngrams": 100, "dropout": 1, "head_dropout": 1,
                  "n_positions": MOST_POSITION_VALUES * c.n_head // c.d_model}
        for name, limit in limits.items():
            if not 0 <= getattr(c, name) <= limit:
                raise ValueError(f"{name}={getattr(c, name)}")
        if c.position == "rope":
            c = replace(c, position="")  # its tables are no weights
        with torch.device("meta"), SkipInit():
            return make(c).state_dict()
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: its settings cannot be those of its weights "
                        f"({reason[:120]})") from None


def rename_weights(config, theirs, hf, folder):
    """Their weights under our names; sets config.n_classes to what their head has, and
    config.lm_head."""
    family = FAMILIES[config.family]
    theirs = {current_name(name): w for name, w in theirs.items()
              if not is_of_another_task(name, hf)}
    if not any(name.startswith(family.root) for name in theirs):  # saved from the bare trunk
        theirs = {family.root + name: w for name, w in theirs.items()}
    ignored = family.ignored
    if "dense" in family.names and not config.head_dense:
        ignored += (their_names("dense.weight", family)[0].removesuffix("weight"),)
    for name in list(theirs):
        if any(name.startswith(i) or i[0] == "." and i in name for i in ignored):
            del theirs[name]
    head = their_names("head.weight", family)[0]
    config.n_classes = theirs[head].shape[0] if head in theirs else 0
    if "lm_head" in family.names:
        read_lm_head(config, theirs, hf)
    with_head = replace(config, n_classes=config.n_classes or 1)
    expected = skeleton(Transformer, with_head, theirs, folder)
    scales = read_scales(config, theirs, folder)
    ours = {}
    for name, meta in expected.items():
        names = their_names(name, family)
        parts = [theirs.pop(their) for their in names if their in theirs]
        if len(parts) < len(names):
            if name == "lm_head.weight":  # of a trunk that is saved alone, or a classifier
                continue
            if config.n_classes or not name.startswith(("dense", "head")):
                raise UserError(f"{folder}: {', '.join(names)} is missing")
            continue
        ours[name] = stack(parts, folder)
        w = ours[name]
        if is_transposed(name, family):
            w.transposed, w.shape = True, w.shape[::-1]
        if config.image_size and math.prod(w.shape) == meta.numel():
            w.shape = tuple(meta.shape)  # theirs is a convolution's, or begins with a 1
        if is_norm(name):
            w.offset = family.norm_offset
        if name == "position.weight" and family.pads_positions:
            w.skip = n_unused_positions(hf, folder)
            w.shape = w.shape[0] - w.skip, *w.shape[1:]
        w.scale = scales.get(name.rpartition(".")[0])
    if theirs:
        more = f" (and {len(theirs) - 1} more)" if len(theirs) > 1 else ""
        raise UserError(f"{folder}: {next(iter(theirs))} is left over{more}")
    return ours


def current_name(name):
    """A weight's name; Google's BERTs call those of norms otherwise."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def is_of_another_task(name, hf):
    """Is it of a head for tokens, choices or answers? Its name may be that of a classifier's."""
    others = "TokenClassification", "MultipleChoice", "QuestionAnswering"
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return False
    heads = "classifier.", "score.", "qa_outputs."
    return str(architectures[0]).endswith(others) and name.startswith(heads)


def stack(weights, folder):
    """StoredWeights as one, if they can be."""
    first = weights[0]
    for w in weights:
        (_, name, shape), = w.parts
        if not shape:
            raise UserError(f"{folder}: {name} is a single number, which no weight of the model is")
        if w.kind not in KINDS:
            raise UserError(f"{folder}: {name} is stored as {w.kind}, which is not supported: only "
                            f"{', '.join(KINDS)} are; save the weights in one of them")
        if shape[1:] != first.shape[1:]:
            raise UserError(f"{folder}: {name} is {shape}, {first.parts[0][1]} is {first.shape}")
    n_rows = sum(w.shape[0] for w in weights)
    parts = [part for w in weights for part in w.parts]
    return StoredWeight(parts, (n_rows, *first.shape[1:]), first.kind)


def read_lm_head(config, theirs, hf):
    """Set config.lm_head; forget a copy of the embedding."""
    family = FAMILIES[config.family]
    tied = hf.get("tie_word_embeddings", False)
    embedding = theirs.get(their_names("embedding.weight", family)[0])
    lm_head = theirs.get("lm_head.weight")
    if tied and lm_head and embedding:
        tied = lm_head.equals(embedding)  # if they differ, its own counts, as in transformers 5
    if tied:
        theirs.pop("lm_head.weight", None)
    else:
        config.lm_head = "own"


def read_scales(config, theirs, folder):
    """Take out of their weights the vectors that outputs are multiplied with: our module → (D,)."""
    family = FAMILIES[config.family]
    found = {}
    for module, their in family.scales.items():
        for i in range(config.n_layer):
            name = family.root + family.layer.format(i) + their.removesuffix("!")
            if name not in theirs:
                raise UserError(f"{folder}: {name} is missing")
            found[f"blocks.{i}.{module}"] = theirs.pop(name)
    return found


# --------------------------------------------------------------------------------------------------
# Out

SPECIAL_TOKENS = {  # role → what such a token is called, in order of preference
    "pad_token": ("[PAD]", "<pad>", "<|finetune_right_pad_id|>", "<|endoftext|>",
                  "<|end_of_text|>", "</s>", "<s>"),
    "unk_token": ("[UNK]", "<unk>", "<|endoftext|>"),
    "cls_token": ("[CLS]", "<s>"), "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": END_TOKENS}


def save_hf(model, folder, label_names, tokenizer_json, multilabel=False, scaling=None,
            max_len=None):
    """Write a folder that transformers' AutoModelForSequenceClassification and AutoTokenizer load
    (of our own trunk: that weights.from_pretrained loads). scaling: of a regression, the target's;
    theirs predicts in its unit. max_len: tokens of a text that are read; None: as many as it can.
    Raises UserError where their classes cannot compute what ours does.
    """
    c = model.config
    weights = model.state_dict()
    if c.n_classes and not label_names and c.family != "ours":
        if "head.bias" not in weights:
            raise UserError("a regression of this family has no bias in its head, so it cannot be "
                            "written as a Hugging Face folder: predict.py labels with it")
        weights |= head_in_unit(weights, scaling["target_std"], scaling["target_mean"])
    folder = Path(folder)
    if c.image_size or c.model != "transformer":
        what = c.family if c.image_size else c.model
        raise UserError(f"a {what} model cannot be written as a Hugging Face folder")
    # does transformers' class look for the last token that is no padding?
    finds_last = c.family != "ours" and c.n_classes and c.pooling == "last"
    ids, roles = special_tokens(tokenizer_json, finds_last)
    config = {"model_type": "textcls", "model_config": vars(c), "scaling": scaling or {}}
    if c.family != "ours":
        config = their_config(c, ids.get(roles.get("pad_token"), None if finds_last else 0))
        if finds_last and "pad_token" not in roles:
            print(f"{folder}: has no token for padding, so transformers reads one text at a time",
                  flush=True)
        config["bos_token_id"] = ids.get(roles.get("bos_token"))
        config["eos_token_id"] = [ids[name] for name in END_TOKENS if name in ids] or None
        weights = their_weights(c, weights, config)
    if label_names:
        config |= {"id2label": dict(enumerate(label_names)),
                   "label2id": {name: i for i, name in enumerate(label_names)}}
    if multilabel:
        config["problem_type"] = "multi_label_classification"
    if c.n_classes and not label_names:
        config |= {"problem_type": "regression", "id2label": {0: "LABEL_0"},
                   "label2id": {"LABEL_0": 0}}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast",
                        "model_max_length": max_len or c.max_len} | roles
    if c.n_segments > 1:  # else transformers leaves the types of pairs out
        tokenizer_config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    weights = {name: w.cpu().contiguous() for name, w in weights.items()}
    with scratch_folder(folder) as work:
        try:
            save_file(weights, work / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:
            raise cannot_write(folder, OSError(str(error))) from error
        write_text(work / "tokenizer.json", tokenizer_json)
        write_text(work / "tokenizer_config.json", json.dumps(tokenizer_config, indent=1))
        write_text(work / "config.json", json.dumps(config, indent=1))
        folder.mkdir(exist_ok=True)
        for file in work.iterdir():  # only when all of them are written
            os.replace(file, folder / file.name)


def special_tokens(tokenizer_json, finds_last):
    """({a tokenizer's special tokens: their numbers}, {role: such a token}). finds_last: padding is
    none that a text can end with."""
    added = json.loads(tokenizer_json).get("added_tokens", ())
    ids = {token["content"]: token["id"] for token in added}
    roles = {}
    for role, names in SPECIAL_TOKENS.items():
        possible = [name for name in names if name in ids]
        if role == "pad_token" and finds_last:
            ends = Tokenizer.from_str(tokenizer_json).encode("").ids[-1:]
            possible += [token["content"] for token in added if token["special"]]
            possible = [name for name in possible if ids[name] not in ends]
        if possible:
            roles[role] = possible[0]
    return ids, roles


def head_in_unit(weights, factor, shift):
    """The weights of a regression's head whose outputs are multiplied and shifted."""
    return {"head.weight": weights["head.weight"] * factor,
            "head.bias": weights["head.bias"] * factor + shift}


def their_config(c, pad_token_id):
    """config.json for a ModelConfig of a published family. Raises UserError."""
    family = FAMILIES[c.family]
    poolings = family.poolings
    own_head = family.constants.get("head_dense")
    if c.n_classes and (c.pooling not in poolings or c.normalize or c.head_dense != own_head):
        normalized = ", vectors of length 1" if c.normalize else ""
        raise UserError(f"transformers' {c.family} classifier cannot compute this head (pooling "
                        f"by {c.pooling}{normalized}): fine-tune with --pooling={poolings[0]} and "
                        "--objective=classify to export it")
    if not c.n_classes and (not family.language_model or not c.causal):
        raise UserError(f"transformers' {c.family} language model has a layer before its words "
                        "that ours lacks; make a classifier of it with finetune.py --init_from")
    return write_config(c, pad_token_id, c.n_classes)


def their_weights(c, weights, config):
    """Our state dict under their names."""
    family = FAMILIES[c.family]
    theirs = {}
    for name, w in weights.items():
        if family.pads_positions and name == "position.weight":
            w = torch.cat((w.new_zeros(config["pad_token_id"] + 1, c.d_model), w))
        if is_transposed(name, family):
            w = w.T
        if is_norm(name):
            w = w - family.norm_offset
        names = their_names(name, family)
        sizes = part_sizes(name, len(names), w, c)
        theirs |= dict(zip(names, w.split(sizes)))
    return theirs
