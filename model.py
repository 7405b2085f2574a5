"""The models: a transformer over packed documents. Stands alone: needs no data set, config file or process group.

    model = Transformer(ModelConfig(vocab_size=8192, n_classes=5))
    logits = model(tokens, cu_seqlens)         # (T,) int64, (B+1,) int32 → (B, n_classes)
    hidden = model.hidden(tokens, cu_seqlens)  # (T, d_model)

The trunk is the modern one: pre-norm RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), QK-norm (Dehghani
et al. 2023), no biases, and zero-initialised output projections and head, so that each block starts as the identity and
the first loss is log(n_classes) exactly.

A batch is packed: one row of T tokens, `cu_seqlens` marking where each document starts. Everything but attention works
on (T, D), so nothing is ever computed for padding; only attention knows about documents.
"""
import functools
import math
import os
import pickle
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

CHECKPOINT_FORMAT = 1


@dataclass
class ModelConfig:
    vocab_size: int = 0
    n_classes: int = 0
    max_len: int = 512  # tokens of the longest document
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 128
    d_ff: int = 512
    mlp: str = "relu2"  # relu2 (squared ReLU, So et al. 2021), gelu, or swiglu (gated, Shazeer 2020)
    qk_norm: bool = True
    causal: bool = False
    pooling: str = "mean"  # mean, max, cls (first token), last
    dropout: float = 0.0
    rope_theta: float = 10000.0


class Layout:
    """Where the documents of a packed batch are: made once per batch, used by every layer.

    doc (T,), position (T,): each token's document, and its place in it. lengths (B,).
    """

    def __init__(self, cu_seqlens, T, max_len):
        self.cu_seqlens, self.max_len, self.lengths = cu_seqlens, max_len, cu_seqlens.diff()
        token = torch.arange(T, device=cu_seqlens.device)
        self.doc = torch.bucketize(token, cu_seqlens[1:], right=True)
        self.position = token - cu_seqlens[self.doc]

    @functools.cached_property
    def blocks(self):
        """For attention without a varlen kernel: documents of like length, padded to a (b, L) block of tokens.

        ([(index, mask, b, L), ...], restore): `index` (b·L,) are the block's tokens, `mask` (b, L) is False at padding
        (None: there is none). The blocks' unpadded outputs, end to end, are put in order by `restore` (T,) (None: are)."""
        start, lengths = self.cu_seqlens[:-1].tolist(), self.lengths.tolist()
        runs, waste = [], MAX_WASTE
        for d in sorted((d for d, n in enumerate(lengths) if n), key=lambda d: -lengths[d]):
            waste += lengths[runs[-1][0]] - lengths[d] if runs else 0  # of padding to the longest of this block
            if waste >= MAX_WASTE:
                runs.append([])
                waste = 0
            runs[-1].append(d)
        blocks, order = [], []
        for run in runs:
            b, L = len(run), lengths[run[0]]
            mask = torch.arange(L) < torch.tensor([lengths[d] for d in run])[:, None]
            index = (torch.tensor([start[d] for d in run])[:, None] + torch.arange(L)).where(mask, 0)  # (b, L)
            order.append(index[mask])
            first, whole = int(index[0, 0]), bool(mask.all())
            together = whole and index[-1, -1] - first == b * L - 1  # then a view will do
            blocks.append((slice(first, first + b * L) if together else index.flatten().to(self.doc.device),
                           None if whole else mask.to(self.doc.device), b, L))
        order = torch.cat(order)
        return blocks, None if (order.diff() == 1).all() else order.argsort().to(self.doc.device)


MAX_WASTE = 512  # padded tokens that one more call of the attention kernel is worth (measured on 2 CPU cores)


def full(x):
    """x in float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def attend(q, k, v, layout, causal):
    """Attention within each document: q, k, v (T, H, d) → (T, H, d)."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len,
                           window_size=(-1, 0) if causal else (-1, -1))
    dtype, (_, H, d) = q.dtype, q.shape
    blocks, restore = layout.blocks
    out = []
    for index, mask, b, L in blocks:  # in float32: on CPUs, bf16 attention's backward is many times slower
        block = [full(x[index]).view(b, L, H, d).transpose(1, 2) for x in (q, k, v)]  # (b, H, L, d)
        # under causality padding needs no mask: it stands after every token that counts
        y = F.scaled_dot_product_attention(*block, attn_mask=None if mask is None or causal else mask[:, None, None],
                                           is_causal=causal).transpose(1, 2)
        out.append(y.reshape(b * L, H, d) if mask is None else y[mask])
    out = torch.cat(out).to(dtype)
    return out if restore is None else out[restore]


def rotate(x, cos, sin):
    """Rotary position embedding: x (T, H, d) with cos, sin (T, 1, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.causal, self.qk_norm = c.n_head, c.causal, c.qk_norm
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model, bias=False)
        self.out = nn.Linear(c.d_model, c.d_model, bias=False)

    def forward(self, x, layout, rope):
        T, D = x.shape
        q, k, v = self.qkv(x).view(T, 3, self.n_head, D // self.n_head).unbind(1)  # each (T, H, d)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
        return self.out(attend(q, k, v, layout, self.causal).reshape(T, D))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.kind = c.mlp
        self.up = nn.Linear(c.d_model, c.d_ff * (2 if c.mlp == "swiglu" else 1), bias=False)
        self.out = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x):
        x = self.up(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return self.out(F.silu(gate) * x)
        return self.out(F.relu(x).square() if self.kind == "relu2" else F.gelu(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(c.d_model), Attention(c)
        self.norm2, self.mlp = nn.RMSNorm(c.d_model), MLP(c)
        self.dropout = c.dropout

    def forward(self, x, layout, rope):
        x = x + F.dropout(self.attention(self.norm1(x), layout, rope), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class Transformer(nn.Module):
    """`config` → a model with fresh weights, drawn from torch's global generator."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, c.n_classes, bias=False)
        angle = torch.outer(torch.arange(c.max_len), c.rope_theta ** -torch.linspace(0, 1, c.d_model // c.n_head // 2))
        self.register_buffer("cos", angle.cos(), persistent=False)  # (max_len, d/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith("out.weight") or name == "head.weight":
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02 if name == "embedding.weight" else p.shape[1] ** -0.5)

    def hidden(self, tokens, cu_seqlens, layout=None):
        layout = layout or Layout(cu_seqlens, len(tokens), self.config.max_len)
        rope = self.cos[layout.position][:, None], self.sin[layout.position][:, None]  # (T, 1, d/2)
        x = F.dropout(self.embedding(tokens), self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, layout, rope)
        return self.norm(x)

    def forward(self, tokens, cu_seqlens):
        layout = Layout(cu_seqlens, len(tokens), self.config.max_len)
        x = self.hidden(tokens, cu_seqlens, layout)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(pool(full(x), layout, self.config.pooling))

    def flops_per_token(self, length):
        """Floating-point operations of a forward and backward pass per token, in documents of `length` tokens: 6 for each
        weight of a matrix, and 12·length·d_model a layer for attention (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        weights = sum(p.numel() for n, p in self.named_parameters() if p.ndim == 2 and n != "embedding.weight")
        return 6 * weights + 12 * c.n_layer * length * c.d_model / (2 if c.causal else 1)


def pool(x, layout, kind):
    """One vector per document: x (T, D) → (B, D)."""
    if kind == "cls":
        return x[layout.cu_seqlens[:-1].clamp(max=len(x) - 1)]
    if kind == "last":
        return x[(layout.cu_seqlens[1:] - 1).clamp(min=0)]
    B, D = len(layout.lengths), x.shape[-1]
    if kind == "max":
        index = layout.doc[:, None].expand_as(x)
        return x.new_full((B, D), -math.inf).scatter_reduce(0, index, x, "amax").clamp(min=torch.finfo(x.dtype).min)
    return x.new_zeros(B, D).index_add(0, layout.doc, x) / layout.lengths.clamp(min=1)[:, None]


def build_model(config):
    """The model of a ModelConfig, or of the dict that a checkpoint keeps of one."""
    return Transformer(ModelConfig(**config) if isinstance(config, dict) else config)


@torch.no_grad()
def predict(model, batches, device, dtype):
    """Of a model in eval mode, yields the logits (B, n_classes), on the CPU, of each (tokens, cu_seqlens, targets)."""
    for tokens, cu_seqlens, _ in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(tokens.to(device), cu_seqlens.to(device))
        yield logits.cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file of tensors and plain types, enough to evaluate or predict anywhere


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message names the file, what is wrong, and the way out."""


def save_checkpoint(path, checkpoint):
    """torch.save under a temporary name, fsynced, then renamed: `path` is always a whole checkpoint or not there."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path, map_location="cpu"):
    """The dict that `save_checkpoint` wrote. Raises WeightsError; never unpickles anything but tensors and plain types."""
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such checkpoint") from None
    except pickle.UnpicklingError as e:
        raise WeightsError(f"{path}: refused: it holds more than tensors and plain types, so loading it could run code, "
                           f"or it is not a checkpoint ({str(e)[:120]!r})") from None
    except Exception as e:  # damaged bytes can make the unpickler raise anything
        raise WeightsError(f"{path}: truncated or not a checkpoint ({str(e)[:120]!r}); "
                           "restore it, or train again with --overwrite=True") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise WeightsError(f"{path}: not a checkpoint of this project, or of another format than {CHECKPOINT_FORMAT}")
    return checkpoint


def load_weights(model, weights, source):
    """Loads a state dict, or raises WeightsError on a weight that is missing, left over, of another shape, not finite."""
    own = model.state_dict()
    wrong = ([f"{k} is missing" for k in own if k not in weights] + [f"{k} is left over" for k in weights if k not in own]
             + [f"{k} is {tuple(weights[k].shape)}, not {tuple(v.shape)}" for k, v in own.items()
                if k in weights and weights[k].shape != v.shape]
             + [f"{k} is not finite" for k, v in weights.items() if not v.isfinite().all()])
    if wrong:
        raise WeightsError(f"{source}: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
    model.load_state_dict(weights)
