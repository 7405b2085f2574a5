"""Hugging Face folders in and out: config.json, model.safetensors, tokenizer.json.

FAMILIES says of each family how its weights and settings are named; reading and writing both follow
it. What we would not compute exactly is refused by name. A new family is one more entry (and a
function in ADJUST where names alone do not say it).
"""
import json
import os
from dataclasses import dataclass, field, fields, replace
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
from torch.overrides import TorchFunctionMode

from model import ModelConfig, Transformer


@dataclass
class Family:
    classifier: str  # transformers' class
    root: str  # what the names of the trunk's weights begin with
    layer: str  # what follows in blocks
    # Our module → theirs; several where ours is theirs stacked. "/" in front: without the root.
    # "!" behind: the name of a parameter, not of a module.
    names: dict
    ignored: tuple  # weights that are not read, by prefix; "." in front: by any part of the name
    settings: dict  # ModelConfig → config.json
    constants: dict = field(default_factory=dict)  # ModelConfig's other settings
    written: dict = field(default_factory=dict)  # what config.json holds besides
    defaults: dict = field(default_factory=dict)  # of config.json, where a key is missing or null
    only: dict = field(default_factory=dict)  # config.json → the values that are supported
    pads_positions: bool = False  # learned positions begin behind pad_token_id


SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "d_model": "hidden_size",
         "d_ff": "intermediate_size"}
BERT = Family(
    "BertForSequenceClassification", "bert.", "encoder.layer.{}.",
    names={
        "embedding": "embeddings.word_embeddings", "position": "embeddings.position_embeddings",
        "segment": "embeddings.token_type_embeddings", "embedding_norm": "embeddings.LayerNorm",
        "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense", "mlp.out": "output.dense", "norm2": "output.LayerNorm",
        "dense": "pooler.dense", "head": "/classifier"},
    ignored=("cls.", "bert.embeddings.position_ids"),
    settings=SIZES | {
        "max_len": "max_position_embeddings", "norm_eps": "layer_norm_eps",
        "n_segments": "type_vocab_size", "dropout": "hidden_dropout_prob",
        "head_dropout": "classifier_dropout"},
    constants={"post_norm": True, "embedding_norm": True, "head_bias": True, "head_dense": "tanh"},
    written={"hidden_act": "gelu"},
    defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_dropout_prob": 0.1,
              "classifier_dropout": None},
    only={"hidden_act": ("gelu",)})
ROBERTA = replace(
    BERT, classifier="RobertaForSequenceClassification", root="roberta.", pads_positions=True,
    names=BERT.names | {"dense": "/classifier.dense", "head": "/classifier.out_proj"},
    ignored=("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids"))
DISTILBERT = Family(
    "DistilBertForSequenceClassification", "distilbert.", "transformer.layer.{}.",
    names={
        "embedding": "embeddings.word_embeddings", "position": "embeddings.position_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "attention.qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out": "attention.out_lin", "norm1": "sa_layer_norm", "mlp.up": "ffn.lin1",
        "mlp.out": "ffn.lin2", "norm2": "output_layer_norm", "dense": "/pre_classifier",
        "head": "/classifier"},
    ignored=("vocab_", "distilbert.embeddings.position_ids"),
    settings={
        "n_layer": "n_layers", "n_head": "n_heads", "d_model": "dim", "d_ff": "hidden_dim",
        "max_len": "max_position_embeddings", "dropout": "dropout",
        "head_dropout": "seq_classif_dropout"},
    constants=BERT.constants | {"norm_eps": 1e-12, "head_dense": "relu"},
    written={"activation": "gelu"},
    only={"activation": ("gelu",), "sinusoidal_pos_embds": (False, None)})
MODERNBERT = Family(
    "ModernBertForSequenceClassification", "model.", "layers.{}.",
    names={
        "embedding": "embeddings.tok_embeddings", "embedding_norm": "embeddings.norm",
        "attention.qkv": "attn.Wqkv", "attention.out": "attn.Wo", "norm1": "attn_norm",
        "norm2": "mlp_norm", "mlp.up": "mlp.Wi", "mlp.out": "mlp.Wo", "norm": "final_norm",
        "dense": "/head.dense", "dense_norm": "/head.norm", "head": "/classifier"},
    ignored=("decoder.",),
    settings=SIZES | {
        "max_len": "max_position_embeddings", "norm_eps": "norm_eps", "dropout": "mlp_dropout",
        "bias": "attention_bias", "pooling": "classifier_pooling",
        "head_dense_bias": "classifier_bias", "head_dropout": "classifier_dropout"},
    constants={"position": "rope", "mlp": "geglu", "embedding_norm": True, "first_norm": False,
               "norm_bias": False, "head_dense": "gelu", "head_norm": True, "head_bias": True},
    defaults={"norm_eps": 1e-5, "mlp_dropout": 0.0, "attention_bias": False,
              "classifier_pooling": "cls", "classifier_bias": False, "classifier_dropout": 0.0},
    only={"hidden_activation": ("gelu",), "classifier_activation": ("gelu",),
          "norm_bias": (False, None)})
GPT2 = Family(
    "GPT2ForSequenceClassification", "transformer.", "h.{}.",
    names={
        "embedding": "wte", "position": "wpe", "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc",
        "mlp.out": "mlp.c_proj", "norm": "ln_f", "head": "/score"},
    ignored=("lm_head.", ".attn.bias", ".attn.masked_bias"),
    settings={
        "n_layer": "n_layer", "n_head": "n_head", "d_model": "n_embd", "max_len": "n_positions",
        "d_ff": "n_inner", "norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"},
    constants={"mlp": "gelu_tanh", "causal": True, "pooling": "last"},
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
    only={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
          "reorder_and_upcast_attn": (False, None),
          "scale_attn_by_inverse_layer_idx": (False, None)})
VIT = Family(
    "ViTForImageClassification", "vit.", "encoder.layer.{}.",
    names={
        "embedding": "embeddings.patch_embeddings.projection",
        "position": "embeddings.position_embeddings!", "cls": "embeddings.cls_token!",
        "attention.qkv": ("attention.attention.query", "attention.attention.key",
                          "attention.attention.value"),
        "attention.out": "attention.output.dense", "norm1": "layernorm_before",
        "norm2": "layernorm_after", "mlp.up": "intermediate.dense", "mlp.out": "output.dense",
        "norm": "layernorm", "head": "/classifier"},
    ignored=("vit.pooler.",),
    settings=SIZES | {"norm_eps": "layer_norm_eps", "dropout": "hidden_dropout_prob",
                      "patch": "patch_size"},
    constants={"cls_token": True, "head_bias": True},
    only={"hidden_act": ("gelu",), "qkv_bias": (True,)})
FAMILIES = {
    "bert": BERT, "roberta": ROBERTA, "distilbert": DISTILBERT, "modernbert": MODERNBERT,
    "gpt2": GPT2, "vit": VIT,
}
ONLY = {"is_decoder": (False, None), "add_cross_attention": (False, None),
        "is_encoder_decoder": (False, None), "position_embedding_type": ("absolute", None)}


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


def is_transposed(name, family):
    """GPT-2 keeps the matrices of its blocks as (inputs, outputs)."""
    is_matrix = name.endswith("weight") and "norm" not in name
    return family is GPT2 and name.startswith("blocks.") and is_matrix


# --------------------------------------------------------------------------------------------------
# In

MOST_POSITION_VALUES = 2**26  # of rope tables: half a GiB


def read_hf(folder, pooling=None):
    """(ModelConfig, our state dict) of a Hugging Face folder; n_classes=0 where it holds no
    classifier. Of a folder that save_hf wrote for our own trunk: (dict, state dict).

    A sentence-transformers folder says itself how tokens become one vector (modules.json), which
    goes before the family's way; pooling: another one, with the family's head.
    """
    folder = Path(folder)
    try:
        hf = read_json(folder / "config.json")
        theirs = read_safetensors(folder)
        if hf.get("model_type") == "textcls":
            return dict(hf["model_config"]), theirs
        config = read_config(hf, folder)
        own = read_sentence_settings(folder)
        if own and pooling in (None, own["pooling"]):
            config = replace(config, **own)
    except FileNotFoundError as error:
        missing = Path(error.filename or str(error)).name
        raise UserError(f"{folder}: there is no {missing}; a folder with config.json and "
                        "model.safetensors is needed (older .bin files can run code: "
                        "convert them)") from None
    except KeyError as error:
        raise UserError(f"{folder}/config.json: {error} is missing") from None
    except UserError:
        raise
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError,
            SafetensorError) as error:
        raise UserError(f"{folder}: damaged: {error}") from None
    types = {field.name: field.type for field in fields(ModelConfig)}
    if wrong := mismatch(vars(config), types):
        raise UserError(f"{folder}/config.json: {wrong}={getattr(config, wrong)!r} is not what it "
                        "should be")
    return config, rename_weights(config, theirs, folder)


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
    another folder. Raises UserError for what we would not compute exactly."""
    path = folder / "modules.json"
    if not path.exists():
        return {}
    found = {"pooling": "mean", "normalize": False, "head_dense": None, "head_norm": False}
    for module in json.loads(path.read_text(encoding="utf-8")):
        kind = module["type"].rpartition(".")[2]
        if kind == "Normalize":
            found["normalize"] = True
        elif kind == "Pooling":
            found["pooling"] = read_pooling(folder / module["path"] / "config.json")
        elif kind != "Transformer":
            raise UserError(f"{path}: its {kind} layer is not supported; to begin with what stands "
                            "before it, delete modules.json")
    return found


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


def read_safetensors(folder):
    shards = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted({Path(shard).name for shard in read_json(index)["weight_map"].values()})
    weights = {}
    for shard in shards:
        with safe_open(folder / shard, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights


def read_config(hf, folder):
    """config.json's meaning as a ModelConfig."""
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{folder}: model type {name!r} is not supported; "
                        f"{', '.join(sorted(FAMILIES))} are")
    family = FAMILIES[name]
    for key, supported in (ONLY | family.only).items():
        if hf.get(key, supported[0]) not in supported:
            raise UserError(f"{folder}: {key}={hf[key]!r} is not supported for {name}, "
                            f"only {supported[0]!r} is")
    settings = {"family": name, "vocab_size": hf.get("vocab_size", 0), "qk_norm": False,
                "norm": "layer", "norm_bias": True, "bias": True, "mlp": "gelu",
                "position": "learned", "pooling": "cls"} | family.constants
    for ours, theirs in family.settings.items():
        value = hf.get(theirs)
        settings[ours] = family.defaults[theirs] if value is None else value
    if not 0 <= settings["n_layer"] <= 1000:
        raise UserError(f"{folder}: n_layer={settings['n_layer']} cannot be true")
    config = ModelConfig(**settings)
    if family.pads_positions:
        config.max_len -= hf.get("pad_token_id", 1) + 1
    if name in ADJUST:
        ADJUST[name](config, hf, folder)
    if config.head_dropout is None:
        config.head_dropout = config.dropout
    return config


def adjust_gpt2(c, hf, folder):
    c.d_ff = c.d_ff or 4 * c.d_model


def adjust_modernbert(c, hf, folder):
    rope = hf.get("rope_parameters") or {}
    whole, sliding = (rope.get(key, {}) for key in ("full_attention", "sliding_attention"))
    for part in (whole, sliding):
        if part.get("rope_type", "default") != "default":
            raise UserError(f"{folder}: rope_type={part['rope_type']!r} is not supported, "
                            "only 'default' is")
    if hf.get("mlp_bias", False) != c.bias:
        raise UserError(f"{folder}: biases in some layers only are not supported for modernbert")
    c.rope_theta = whole.get("rope_theta") or hf.get("global_rope_theta", 160000.0)
    c.window_rope_theta = sliding.get("rope_theta") or hf.get("local_rope_theta") or 10000.0
    c.window = hf["local_attention"] // 2
    every = hf.get("global_attn_every_n_layers", 3)
    types = hf.get("layer_types") or layer_types(c.n_layer, every)
    full = [i for i, layer_type in enumerate(types) if layer_type == "full_attention"]
    c.global_every = full[1] if len(full) > 1 else len(types)
    if types != layer_types(c.n_layer, c.global_every):
        raise UserError(f"{folder}: layer_types={types} is not supported: "
                        "global attention must recur evenly")


def layer_types(n_layer, global_every):
    return ["sliding_attention" if i % global_every else "full_attention" for i in range(n_layer)]


def adjust_vit(c, hf, folder):
    size = hf["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    c.image_size = hf["num_channels"], height, width
    path = folder / "preprocessor_config.json"
    scaling = read_json(path) if path.exists() else {}
    for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        values = sorted(set(scaling.get(theirs, [0.5])))
        if len(values) > 1:
            raise UserError(f"{folder}: {theirs}={values} is not supported, "
                            "only one for all channels")
        setattr(c, ours, values[0])


ADJUST = {"gpt2": adjust_gpt2, "modernbert": adjust_modernbert, "vit": adjust_vit}


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


def rename_weights(config, theirs, folder):
    """Their weights under our names; sets config.n_classes to what their head has."""
    family = FAMILIES[config.family]
    if not any(name.startswith(family.root) for name in theirs):  # saved from the bare trunk
        theirs = {family.root + name: w for name, w in theirs.items()}
    ignored = family.ignored
    if "dense" in family.names and not config.head_dense:
        ignored += (their_names("dense.weight", family)[0].removesuffix("weight"),)
    for name in list(theirs):
        if any(name.startswith(i) or i[0] == "." and i in name for i in ignored):
            del theirs[name]
    head = their_names("head.weight", family)[0]
    config.n_classes = len(theirs[head]) if head in theirs else 0
    with_head = replace(config, n_classes=config.n_classes or 1)
    expected = skeleton(Transformer, with_head, theirs, folder)
    ours = {}
    for name, meta in expected.items():
        names = their_names(name, family)
        parts = [theirs.pop(their) for their in names if their in theirs]
        if len(parts) < len(names):
            if config.n_classes or not name.startswith(("dense", "head")):
                raise UserError(f"{folder}: {', '.join(names)} is missing")
            continue
        w = torch.cat(parts)
        if is_transposed(name, family):
            w = w.T.contiguous()
        if family is VIT and w.numel() == meta.numel():
            w = w.reshape(meta.shape)  # a convolution's, or with a first dimension of 1
        if name == "position.weight":
            w = w[len(w) - len(meta) :]  # without those up to pad_token_id
        ours[name] = w
    if theirs:
        more = f" (and {len(theirs) - 1} more)" if len(theirs) > 1 else ""
        raise UserError(f"{folder}: {next(iter(theirs))} is left over{more}")
    return ours


# --------------------------------------------------------------------------------------------------
# Out

SPECIAL_TOKENS = {  # role → what such a token is called, in order of preference
    "pad_token": ("[PAD]", "<pad>", "<|endoftext|>"), "unk_token": ("[UNK]", "<unk>",
                                                                    "<|endoftext|>"),
    "cls_token": ("[CLS]", "<s>"), "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"), "bos_token": ("<s>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|endoftext|>")}


def save_hf(model, folder, label_names, tokenizer_json, multilabel=False, scaling=None):
    """Write a folder that transformers' AutoModelForSequenceClassification and AutoTokenizer load
    (of our own trunk: that weights.from_pretrained loads). scaling: of a regression, the target's;
    theirs predicts in its unit. Raises UserError where their classes cannot compute what ours does.
    """
    c = model.config
    weights = model.state_dict()
    if not label_names and c.family != "ours":
        weights |= head_in_own_unit(weights, scaling)
    folder = Path(folder)
    if c.family == "vit" or c.model != "transformer":
        what = "vit" if c.family == "vit" else c.model
        raise UserError(f"a {what} model cannot be written as a Hugging Face folder")
    added = json.loads(tokenizer_json).get("added_tokens", ())
    ids = {token["content"]: token["id"] for token in added}
    roles = {}
    for role, names in SPECIAL_TOKENS.items():
        if name := next((name for name in names if name in ids), None):
            roles[role] = name
    config = {"model_type": "textcls", "model_config": vars(c)}
    if c.family != "ours":
        config = their_config(c, ids.get(roles.get("pad_token"), 0))
        weights = their_weights(c, weights, config)
    config |= {"id2label": dict(enumerate(label_names)),
               "label2id": {name: i for i, name in enumerate(label_names)}}
    if multilabel:
        config["problem_type"] = "multi_label_classification"
    if not label_names:
        config |= {"problem_type": "regression", "id2label": {0: "LABEL_0"},
                   "label2id": {"LABEL_0": 0}}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast",
                        "model_max_length": c.max_len} | roles
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


def head_in_own_unit(weights, scaling):
    """A regression's head with the target's standardisation undone."""
    if "head.bias" not in weights:
        raise UserError("a regression of this family has no bias in its head, so it cannot be "
                        "written as a Hugging Face folder: predict.py labels with it")
    return {"head.weight": weights["head.weight"] * scaling["target_std"],
            "head.bias": weights["head.bias"] * scaling["target_std"] + scaling["target_mean"]}


def their_config(c, pad_token_id):
    """config.json for a ModelConfig of a published family."""
    family = FAMILIES[c.family]
    poolings = {"gpt2": ("last",), "modernbert": ("cls", "mean")}.get(c.family, ("cls",))
    own_head = family.constants.get("head_dense")
    if c.pooling not in poolings or c.normalize or c.head_dense != own_head:
        raise UserError(f"transformers' {c.family} classifier cannot compute this head (pooling "
                        f"by {c.pooling}): fine-tune with --pooling={poolings[0]} and --objective="
                        "classify to export it")
    config = {"model_type": c.family, "architectures": [family.classifier],
              "vocab_size": c.vocab_size, "pad_token_id": pad_token_id} | family.written
    config |= {theirs: getattr(c, ours) for ours, theirs in family.settings.items()}
    if family.pads_positions:
        config["max_position_embeddings"] += pad_token_id + 1
    if c.family == "modernbert":
        rope = {"full_attention": c.rope_theta, "sliding_attention": c.window_rope_theta}
        config |= {
            "mlp_bias": c.bias, "local_attention": 2 * c.window,
            "layer_types": layer_types(c.n_layer, c.global_every),
            "rope_parameters": {key: {"rope_type": "default", "rope_theta": theta}
                                for key, theta in rope.items()}}
    return config


def their_weights(c, weights, config):
    """Our state dict under their names."""
    family = FAMILIES[c.family]
    theirs = {}
    for name, w in weights.items():
        if family.pads_positions and name == "position.weight":
            w = torch.cat((w.new_zeros(config["pad_token_id"] + 1, c.d_model), w))
        if is_transposed(name, family):
            w = w.T
        names = their_names(name, family)
        theirs |= dict(zip(names, w.chunk(len(names))))
    return theirs
