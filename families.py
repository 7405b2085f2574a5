"""What Hugging Face's config.json and the names of its weights mean, family by family.

A family is an entry of FAMILIES: names and settings, which reading and writing both follow
(huggingface.py). What names alone do not say is a function in READ, and, where it is written too,
in WRITE. What we would not compute exactly is refused by name.
"""
import math
import sys
from dataclasses import dataclass, field, fields, replace

from configurator import UserError, mismatch, read_json, say_once

from model import ROPE_SCALINGS, ModelConfig


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
    language_model: str = ""  # transformers' class; "": there is none that computes what ours does
    constants: dict = field(default_factory=dict)  # ModelConfig's other settings
    written: dict = field(default_factory=dict)  # what config.json holds besides
    if_missing: dict = field(default_factory=dict)  # config.json → what transformers then assumes
    defaults: dict = field(default_factory=dict)  # the same for a key that is missing or null
    only: dict = field(default_factory=dict)  # config.json → the values that are supported
    poolings: tuple = ("cls",)  # that their classifier can compute
    pads_positions: bool = False  # learned positions begin behind pad_token_id
    transposed: bool = False  # the matrices of blocks are (inputs, outputs)
    norm_offset: float = 0.0  # the norms' weights are ours less this
    # our module → a vector by which its outputs are multiplied, which we multiply its weights with
    scales: dict = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# Encoders of text

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
    ignored=("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids"),
    if_missing={"pad_token_id": 1})
ELECTRA = replace(
    BERT, classifier="ElectraForSequenceClassification", root="electra.",
    names=ROBERTA.names | {"projection": "embeddings_project"},
    ignored=("discriminator_predictions.", "generator_", "electra.embeddings.position_ids"),
    settings=BERT.settings | {"d_embedding": "embedding_size"},
    constants=BERT.constants | {"head_dense": "gelu"},
    defaults=BERT.defaults | {"embedding_size": 128})
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
    if_missing={"dropout": 0.1, "seq_classif_dropout": 0.2},
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
    if_missing={"local_attention": 128},
    defaults={"norm_eps": 1e-5, "mlp_dropout": 0.0, "attention_bias": False,
              "classifier_pooling": "cls", "classifier_bias": False, "classifier_dropout": 0.0},
    only={"hidden_activation": ("gelu",), "classifier_activation": ("gelu",),
          "norm_bias": (False, None), "position_embedding_type": ("absolute", "sans_pos", None),
          "rope_scaling": (None,)},
    poolings=("cls", "mean"))

# --------------------------------------------------------------------------------------------------
# Language models, which are classifiers by their last token, too

GPT2 = Family(
    "GPT2ForSequenceClassification", "transformer.", "h.{}.",
    names={
        "embedding": "wte", "position": "wpe", "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc",
        "mlp.out": "mlp.c_proj", "norm": "ln_f", "head": "/score", "lm_head": "/lm_head"},
    ignored=(".attn.bias", ".attn.masked_bias"),
    settings={
        "n_layer": "n_layer", "n_head": "n_head", "d_model": "n_embd", "max_len": "n_positions",
        "d_ff": "n_inner", "norm_eps": "layer_norm_epsilon", "dropout": "resid_pdrop"},
    language_model="GPT2LMHeadModel",
    constants={"mlp": "gelu_tanh", "causal": True, "pooling": "last"},
    if_missing={"tie_word_embeddings": True},
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
    only={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
          "reorder_and_upcast_attn": (False, None),
          "scale_attn_by_inverse_layer_idx": (False, None)},
    poolings=("last",), transposed=True)
LLAMA = Family(
    "LlamaForSequenceClassification", "model.", "layers.{}.",
    names={
        "embedding": "embed_tokens",
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": "self_attn.o_proj", "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm", "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.out": "mlp.down_proj", "norm": "norm", "head": "/score", "lm_head": "/lm_head"},
    ignored=(".rotary_emb.inv_freq",),
    settings=SIZES | {
        "max_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
        "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "bias": "attention_bias"},
    language_model="LlamaForCausalLM",
    constants={"position": "rope", "mlp": "swiglu", "norm": "rms", "norm_bias": False,
               "causal": True, "pooling": "last"},
    written={"hidden_act": "silu"},
    defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 0, "head_dim": 0,
              "attention_bias": False},
    only={"hidden_act": ("silu",)},
    poolings=("last",))
MISTRAL = replace(
    LLAMA, classifier="MistralForSequenceClassification", language_model="MistralForCausalLM",
    if_missing={"num_key_value_heads": 8, "sliding_window": 4096})
QWEN2 = replace(
    LLAMA, classifier="Qwen2ForSequenceClassification", language_model="Qwen2ForCausalLM",
    constants=LLAMA.constants | {"qkv_bias": True, "bias": False},
    settings={ours: theirs for ours, theirs in LLAMA.settings.items()
              if ours not in ("bias", "head_dim")},
    if_missing={"num_key_value_heads": 32, "sliding_window": 4096})
QWEN3 = replace(
    LLAMA, classifier="Qwen3ForSequenceClassification", language_model="Qwen3ForCausalLM",
    names=LLAMA.names | {"attention.q_norm": "self_attn.q_norm",
                         "attention.k_norm": "self_attn.k_norm"},
    constants=LLAMA.constants | {"qk_norm": True, "qk_norm_weight": True},
    if_missing=QWEN2.if_missing,
    defaults=LLAMA.defaults | {"head_dim": 128},
    only=LLAMA.only | {"attention_bias": (False, None)})
GEMMA3 = replace(
    QWEN3, classifier="Gemma3TextForSequenceClassification", language_model="Gemma3ForCausalLM",
    names=QWEN3.names | {
        "norm2": "pre_feedforward_layernorm", "attention_norm": "post_attention_layernorm",
        "mlp_norm": "post_feedforward_layernorm"},
    constants=QWEN3.constants | {"mlp": "geglu_tanh", "branch_norm": True},
    written={"hidden_activation": "gelu_pytorch_tanh"},
    if_missing={"num_key_value_heads": 4, "sliding_window": 4096, "tie_word_embeddings": True},
    defaults=LLAMA.defaults | {"head_dim": 256},
    only={"hidden_activation": ("gelu_pytorch_tanh",), "attn_logit_softcapping": (None,),
          "final_logit_softcapping": (None,), "use_bidirectional_attention": (False, None),
          "attention_bias": (False, None)},
    norm_offset=1.0)

# --------------------------------------------------------------------------------------------------
# Images

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
    if_missing={"num_channels": 3, "image_size": 224, "patch_size": 16},
    defaults={"layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0},
    only={"hidden_act": ("gelu",), "qkv_bias": (True,)})
DEIT = replace(
    VIT, classifier="DeiTForImageClassification", root="deit.",
    names=VIT.names | {"distilled": "embeddings.distillation_token!"},
    ignored=("deit.pooler.", "deit.embeddings.mask_token",
             "cls_classifier.", "distillation_classifier."),  # two heads, whose mean it takes
    constants=VIT.constants | {"distilled_token": True})
DINOV2 = replace(
    VIT, classifier="Dinov2ForImageClassification", root="dinov2.",
    names=VIT.names | {"norm1": "norm1", "norm2": "norm2", "mlp.up": "mlp.fc1",
                       "mlp.out": "mlp.fc2"},
    ignored=("dinov2.embeddings.mask_token",),
    settings={ours: theirs for ours, theirs in VIT.settings.items() if ours != "d_ff"},
    constants=VIT.constants | {"pooling": "cls+mean"},
    if_missing=VIT.if_missing | {"patch_size": 14, "mlp_ratio": 4},
    defaults=VIT.defaults | {"layer_norm_eps": 1e-6},
    only=VIT.only | {"use_swiglu_ffn": (False, None)},
    scales={"attention.out": "layer_scale1.lambda1!", "mlp.out": "layer_scale2.lambda1!"})
SIGLIP = replace(
    VIT, classifier="SiglipForImageClassification", root="vision_model.",
    layer="encoder.layers.{}.",
    names={
        "embedding": "embeddings.patch_embedding", "position": "embeddings.position_embedding",
        "attention.qkv": LLAMA.names["attention.qkv"], "attention.out": "self_attn.out_proj",
        "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.up": "mlp.fc1",
        "mlp.out": "mlp.fc2", "norm": "post_layernorm", "head": "/classifier"},
    ignored=("vision_model.head.", "vision_model.embeddings.position_ids", "text_model.", "logit_"),
    settings=SIZES | {"norm_eps": "layer_norm_eps", "patch": "patch_size"},
    constants={"head_bias": True, "mlp": "gelu_tanh", "pooling": "mean"},
    # a whole SigLIP's config.json leaves out what is as in its smallest model
    if_missing=VIT.if_missing | {"hidden_size": 768, "intermediate_size": 3072,
                                 "num_hidden_layers": 12, "num_attention_heads": 12},
    defaults={"layer_norm_eps": 1e-6},
    only={"hidden_act": ("gelu_pytorch_tanh",)})

FAMILIES = {
    "bert": BERT, "roberta": ROBERTA, "distilbert": DISTILBERT, "modernbert": MODERNBERT,
    "electra": ELECTRA, "gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2,
    "qwen3": QWEN3, "gemma3_text": GEMMA3, "vit": VIT, "deit": DEIT, "dinov2": DINOV2,
    "siglip": SIGLIP, "siglip_vision_model": SIGLIP,
    "xlm-roberta": replace(ROBERTA, classifier="XLMRobertaForSequenceClassification"),
    "camembert": replace(ROBERTA, classifier="CamembertForSequenceClassification"),
}
ONLY = {"is_decoder": (False, None), "add_cross_attention": (False, None),
        "is_encoder_decoder": (False, None), "position_embedding_type": ("absolute", None),
        "partial_rotary_factor": (None, 1)}
BASE = {"qk_norm": False, "norm": "layer", "norm_bias": True, "bias": True, "mlp": "gelu",
        "position": "learned", "pooling": "cls"}  # ModelConfig's, where a family does not say


def complete(hf):
    """config.json, a dict, with what it leaves out, as transformers assumes it."""
    family = FAMILIES.get(hf.get("model_type"))
    if not family:
        return hf
    own = hf.get("vision_config", {}) if family is SIGLIP else {}  # the tower for images
    return family.if_missing | hf | own


def read_config(hf, folder):
    """The meaning of a complete config.json as a ModelConfig. Raises UserError for what is not
    supported, KeyError for what is missing."""
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{folder}: model type {name!r} is not supported; "
                        f"{', '.join(sorted(FAMILIES))} are")
    if quantization := hf.get("quantization_config"):
        raise UserError(f"{folder}: its weights are quantized "
                        f"({quantization.get('quant_method', 'how is not said')}), which is not "
                        "supported: take the model in bfloat16 or float32")
    family = FAMILIES[name]
    for key, supported in (ONLY | family.only).items():
        if hf.get(key, supported[0]) not in supported:
            raise UserError(f"{folder}: {key}={hf[key]!r} is not supported for {name}, "
                            f"only {supported[0]!r} is")
    settings = {"family": name, "vocab_size": hf.get("vocab_size", 0)} | BASE | family.constants
    types = {field.name: field.type for field in fields(ModelConfig)}
    for ours, theirs in family.settings.items():
        value = hf.get(theirs)
        if value is None:
            value = family.defaults[theirs]
        if ours == "patch" and isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, str) and mismatch({ours: value}, {ours: types[ours]}):
            raise UserError(f"{folder}/config.json: {theirs} is the text {value!r}, not a number")
        settings[ours] = value
    if not 0 <= settings["n_layer"] <= 1000:
        raise UserError(f"{folder}: n_layer={settings['n_layer']} cannot be true")
    config = ModelConfig(**settings)
    if config.causal and not hf.get("is_causal", True):
        raise UserError(f"{folder}: is_causal={hf['is_causal']} is not supported for {name}, whose "
                        "tokens see only what is before them")
    if config.pooling not in family.poolings and "classifier_pooling" in hf:
        raise UserError(f"{folder}: classifier_pooling={config.pooling!r} is not supported, only "
                        f"{' and '.join(family.poolings)} are")
    if family.pads_positions:
        config.max_len -= n_unused_positions(hf, folder)
    if name in READ:
        READ[name](config, hf, folder)
    possible = config.max_len >= 1 and 0 <= config.norm_eps < math.inf and config.rope_theta > 1
    if not possible:  # NaN is not, either
        raise UserError(f"{folder}: max_len={config.max_len}, norm_eps={config.norm_eps} and "
                        f"rope_theta={config.rope_theta} cannot all be true")
    if config.head_dropout is None:
        config.head_dropout = config.dropout
    return config


def n_unused_positions(hf, folder):
    """Of a family that pads_positions: how many positions no token has."""
    pad = hf["pad_token_id"]
    if not isinstance(pad, int):
        raise UserError(f"{folder}: pad_token_id={pad!r} is not supported for {hf['model_type']}, "
                        "whose positions begin behind it")
    return pad + 1


def write_config(c, pad_token_id, n_classes):
    """config.json for a ModelConfig of a published family. Raises UserError."""
    family = FAMILIES[c.family]
    architecture = family.classifier if n_classes else family.language_model
    config = {"model_type": c.family, "architectures": [architecture],
              "vocab_size": c.vocab_size, "pad_token_id": pad_token_id} | family.written
    config |= {theirs: getattr(c, ours) for ours, theirs in family.settings.items()}
    if family.pads_positions:
        config["max_position_embeddings"] += pad_token_id + 1
    if c.family in WRITE:
        config |= WRITE[c.family](c)
    return config


def read_electra(c, hf, folder):
    if c.d_embedding == c.d_model:
        c.d_embedding = 0


def write_electra(c):
    return {"embedding_size": c.d_embedding or c.d_model}


def read_gpt2(c, hf, folder):
    c.d_ff = c.d_ff or 4 * c.d_model


def write_gpt2(c):
    return {"tie_word_embeddings": c.lm_head != "own"}


def read_modernbert(c, hf, folder):
    require_bias(c, hf, folder)
    read_two_ropes(c, hf, folder)
    c.rope_theta = c.rope_theta or hf.get("global_rope_theta", 160000.0)
    c.window_rope_theta = c.window_rope_theta or hf.get("local_rope_theta") or 10000.0
    every = hf.get("global_attn_every_n_layers", 3)
    read_windows(c, hf, folder, hf["local_attention"] // 2, lambda layer: layer % every)


def write_modernbert(c):
    return {"mlp_bias": c.bias, "local_attention": 2 * c.window} | write_two_ropes(c)


def read_llama(c, hf, folder):
    require_bias(c, hf, folder)
    read_rope(c, hf, folder)


def write_llama(c):
    return {"mlp_bias": c.bias} | write_decoder(c) | write_rope(c)


def read_mistral(c, hf, folder):
    read_rope(c, hf, folder)
    read_windows(c, hf, folder, (hf["sliding_window"] or 0) - 1, lambda layer: True)


def write_mistral(c):
    if c.window and len(c.window_layers) < c.n_layer:
        raise UserError("transformers' mistral has a window in all layers, this model in some: it "
                        "cannot be written as a Hugging Face folder")
    return write_decoder(c) | write_rope(c) | {"sliding_window": c.window + 1 if c.window else None}


def read_qwen(c, hf, folder):
    read_rope(c, hf, folder)
    reach = (hf["sliding_window"] or 0) - 1 if hf.get("use_sliding_window") else -1
    first = hf.get("max_window_layers", 28)
    read_windows(c, hf, folder, reach, lambda layer: layer >= first)


def write_qwen(c):
    return write_decoder(c) | write_rope(c) | {
        "use_sliding_window": bool(c.window), "layer_types": layer_types(c),
        "sliding_window": c.window + 1 if c.window else None}


def read_gemma3(c, hf, folder):
    if hf.get("query_pre_attn_scalar", 256) != c.head_dim:
        raise UserError(f"{folder}: query_pre_attn_scalar={hf.get('query_pre_attn_scalar', 256)} "
                        f"is not supported, only head_dim={c.head_dim} is")
    c.embedding_scale = c.d_model**0.5
    read_two_ropes(c, hf, folder)
    c.rope_theta = c.rope_theta or hf.get("rope_theta", 1_000_000.0)
    c.window_rope_theta = c.window_rope_theta or hf.get("rope_local_base_freq", 10_000.0)
    every = hf.get("sliding_window_pattern") or 6
    reach = (hf["sliding_window"] or 0) - 1
    read_windows(c, hf, folder, reach, lambda layer: (layer + 1) % every)


def write_gemma3(c):
    return write_decoder(c) | write_two_ropes(c) | {
        "query_pre_attn_scalar": c.head_dim,
        # transformers needs a number even where no layer has a window
        "sliding_window": c.window + 1 if c.window else 4096}


def read_image(c, hf, folder):
    size = hf["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    c.image_size = hf["num_channels"], height, width
    if "d_ff" not in FAMILIES[c.family].settings:
        c.d_ff = int(hf["mlp_ratio"] * c.d_model)
    path, found = folder / "preprocessor_config.json", {}
    if path.exists():
        found = read_json(path)
    elif (folder / "processor_config.json").exists():
        path = folder / "processor_config.json"
        found = read_json(path).get("image_processor") or {}
    else:
        say_once(f"{folder}: there is no preprocessor_config.json; pixels of 0 to 1 are taken to "
                 "have mean and deviation 0.5", sys.stderr)
    # theirs: (pixels of 0 to 255 · factor − mean) / std; ours: (pixels of 0 to 1 − mean) / std
    factor = 255.0
    if found.get("do_rescale") is not False:
        factor *= number(found.get("rescale_factor") or 1 / 255, "rescale_factor", path)
    for ours, theirs, neutral in (("pixel_mean", "image_mean", 0), ("pixel_std", "image_std", 1)):
        values = found.get(theirs)
        if found.get("do_normalize") is False:
            values = neutral
        elif values is None:
            values = 0.5
        values = values if isinstance(values, list) else [values]
        values = tuple(number(value, theirs, path) / factor for value in values)
        if len(values) not in (1, c.image_size[0]):
            raise UserError(f"{path}: {theirs} has {len(values)} values, for {c.image_size[0]} "
                            "channels")
        if theirs == "image_std" and min(values) <= 0:
            raise UserError(f"{path}: {theirs}={found[theirs]} must be above 0")
        setattr(c, ours, values[0] if len(set(values)) == 1 else values)


def number(value, key, path):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{path}: {key}: {value!r} is not a number")
    return float(value)


READ = {"electra": read_electra, "gpt2": read_gpt2, "modernbert": read_modernbert,
        "llama": read_llama, "mistral": read_mistral, "qwen2": read_qwen, "qwen3": read_qwen,
        "gemma3_text": read_gemma3, "vit": read_image, "deit": read_image, "dinov2": read_image,
        "siglip": read_image, "siglip_vision_model": read_image}
WRITE = {"electra": write_electra, "gpt2": write_gpt2, "modernbert": write_modernbert,
         "llama": write_llama, "mistral": write_mistral, "qwen2": write_qwen, "qwen3": write_qwen,
         "gemma3_text": write_gemma3}


def require_bias(c, hf, folder):
    if hf.get("mlp_bias", False) != c.bias:
        raise UserError(f"{folder}: biases in some layers only are not supported for {c.family}")


def read_windows(c, hf, folder, reach, has_window):
    """Attention of `reach` tokens to either side in the blocks that config.json's layer_types
    names, or for which has_window(index) is true. Raises UserError."""
    types = hf.get("layer_types")
    kinds = {"sliding_attention", "full_attention"}
    if types is not None and (len(types) != c.n_layer or not kinds.issuperset(types)):
        raise UserError(f"{folder}: layer_types={types} does not name the attention of each of "
                        f"{c.n_layer} layers as one of {', '.join(sorted(kinds))}")
    layers = tuple(i for i in range(c.n_layer)
                   if (types[i] == "sliding_attention" if types else has_window(i)))
    if reach < 0 or not layers:
        return
    if reach == 0:
        raise UserError(f"{folder}: a window in which each token sees itself alone "
                        "(sliding_window=1, local_attention=1) is not supported")
    c.window, c.window_layers = reach, layers


def layer_types(c):
    return ["sliding_attention" if i in c.window_layers else "full_attention"
            for i in range(c.n_layer)]


def write_decoder(c):
    """What config.json may leave out when it is read, but not as 0."""
    return {"tie_word_embeddings": c.lm_head != "own", "head_dim": c.head_width,
            "num_key_value_heads": c.n_kv_head or c.n_head}


def read_rope(c, hf, folder):
    """rope_theta and rope_scaling, in the form of transformers 4 or 5."""
    parameters = hf.get("rope_parameters") or {}
    theta = (parameters.get("rope_theta") or (hf.get("rope_scaling") or {}).get("rope_theta")
             or hf.get("rope_theta") or 10000.0)
    c.rope_theta = float(theta)
    if old := hf.get("rope_scaling"):
        its_theta = old.get("rope_theta") or hf.get("rope_theta")
        if parameters.get("rope_theta") not in (None, its_theta):
            raise UserError(f"{folder}/config.json: rope_theta, rope_scaling and rope_parameters "
                            "say different things; write what is meant into rope_parameters alone")
    c.rope_scaling = read_scaling(parameters, hf, c, folder)
    original = "original_max_position_embeddings"
    if hf.get(original) and c.rope_scaling.get("rope_type") in ("llama3", "yarn"):
        c.rope_scaling[original] = hf[original]  # goes before what stands beside the factor


def write_rope(c):
    """For transformers 5, and, with rope_theta, for 4."""
    scaling = c.rope_scaling or {"rope_type": "default"}
    written = {"rope_parameters": scaling | {"rope_theta": c.rope_theta},
               "rope_theta": c.rope_theta}
    return written | ({"rope_scaling": c.rope_scaling} if c.rope_scaling else {})


def read_two_ropes(c, hf, folder):
    """As read_rope, with another theta for blocks with a window; 0 where there is none."""
    parameters = hf.get("rope_parameters") or {}
    if parameters and "full_attention" not in parameters:
        raise UserError(f"{folder}: rope_parameters has nothing for full_attention")
    whole = parameters.get("full_attention") or {}
    sliding = parameters.get("sliding_attention") or {}
    c.rope_theta = float(whole.get("rope_theta") or 0)
    c.window_rope_theta = float(sliding.get("rope_theta") or 0)
    c.rope_scaling = read_scaling(whole, hf, c, folder)
    if read_scaling(sliding, {}, c, folder):
        raise UserError(f"{folder}: a scaled rope in blocks with a window is not supported")


def write_two_ropes(c):
    whole = (c.rope_scaling or {"rope_type": "default"}) | {"rope_theta": c.rope_theta}
    sliding = {"rope_type": "default", "rope_theta": c.window_rope_theta}
    return {"rope_parameters": {"full_attention": whole, "sliding_attention": sliding},
            "layer_types": layer_types(c)}


SCALING_NUMBERS = ("factor", "original_max_position_embeddings", "low_freq_factor",
                   "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
                   "mscale_all_dim")
# transformers takes 0 as not given for these
ZERO_IS_NONE = "beta_fast", "beta_slow", "mscale", "mscale_all_dim"


def read_scaling(parameters, hf, c, folder):
    """How rope is stretched, as ModelConfig.rope_scaling has it, by an entry of rope_parameters, or
    by transformers 4's rope_scaling in hf. Raises UserError."""
    scaling = scaling_of(parameters, c, folder)
    if old := hf.get("rope_scaling"):
        old = scaling_of(old, c, folder)
        if parameters and scaling != old:
            raise UserError(f"{folder}/config.json: rope_scaling and rope_parameters say different "
                            "things; write what is meant into rope_parameters alone")
        return old
    return scaling


def scaling_of(parameters, c, folder):
    """Theirs as ours: the numbers that count, {} where nothing is stretched. Raises UserError."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{folder}: partial_rotary_factor={parameters['partial_rotary_factor']} is "
                        "not supported")
    if kind == "default":
        return {}
    if kind not in ROPE_SCALINGS:
        raise UserError(f"{folder}: rope_type={kind!r} is not supported, only "
                        f"{', '.join(ROPE_SCALINGS)} are")
    scaling = {"original_max_position_embeddings": c.max_len}
    for key in SCALING_NUMBERS:
        value = parameters.get(key)
        if value is not None and not (value == 0 and key in ZERO_IS_NONE):
            scaling[key] = value
    needed = ["factor"] + ["low_freq_factor", "high_freq_factor"] * (kind == "llama3")
    for key in dict.fromkeys([*needed, *scaling]):
        value = scaling.get(key)
        if not (type(value) in (int, float) and value > 0):
            raise UserError(f"{folder}: {key}={value!r} of its rope's scaling is not a number "
                            "above 0")
    if "truncate" in parameters:
        scaling["truncate"] = parameters["truncate"]
    return scaling | {"rope_type": kind}
