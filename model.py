"""The models: a transformer for text and images, an MLP, a linear model. Stands alone: needs no data set, no config file.

    model = Transformer(ModelConfig(vocab_size=8192, n_classes=5))
    logits = model(tokens, cu_seqlens)         # (T,) int64, (B+1,) int32 → (B, n_classes)
    hidden = model.hidden(tokens, cu_seqlens)  # (T, d_model)
    model = Transformer.from_pretrained("out/textcls")  # or a Hugging Face folder of one of the families below
    logits = Transformer(ModelConfig(image_size=(1, 28, 28), patch=4, n_classes=10))(pixels)  # (B, C, H, W) uint8 or float
    logits = MLP(ModelConfig(n_features=7, n_classes=3))(x)  # (B, F) float32; a regression has n_classes = 1
    logits = Transformer(ModelConfig(vocab_size=258, lm_head="own", causal=True))(tokens, cu_seqlens)  # (T, vocab_size)

The default trunk is the modern one: pre-norm RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), QK-norm
(Dehghani et al. 2023), no biases, and zero-initialised output projections and head, so that each block starts as the
identity and the first loss is log(n_classes) exactly. The published trunks are other values of the same ModelConfig.

A batch is packed: one row of T tokens, `cu_seqlens` marking where each document starts. Everything but attention works
on (T, D), so nothing is computed for padding (but for up to 15 tokens that fill a batch in training up to a multiple of 16,
as CPUs want it); only attention knows about documents.
"""
import functools
import itertools
import json
import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

CHECKPOINT_FORMAT = 2


@dataclass
class ModelConfig:
    model: str = "transformer"  # transformer, mlp, linear
    vocab_size: int = 0  # of text
    n_features: int = 0  # of rows of numbers
    image_size: tuple = ()  # (channels, height, width) of images
    patch: int = 4  # images: side of the squares that are its tokens
    n_classes: int = 0  # outputs; 0: no head
    lm_head: str = ""  # instead of a classifier, a language model's head: own, or tied to the embedding
    max_len: int = 512  # tokens of the longest document
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 128
    d_ff: int = 512
    mlp: str = "relu2"  # relu2 (squared ReLU, So et al. 2021), gelu, gelu_tanh, swiglu or geglu (gated, Shazeer 2020)
    qk_norm: bool = True
    causal: bool = False
    checkpoint_activations: bool = False  # keep no block's inside for the backward pass: less memory, a third more time
    pooling: str = "mean"  # mean, max, cls (first token), last
    dropout: float = 0.0  # after the embedding, attention and MLP
    rope_theta: float = 10000.0
    stem: str = "tokens"  # words: the transformer reads words, as hashed runs of their bytes and of words
    ngrams: int = 3  # that stem, linear model of text: runs of up to so many words are features
    char_ngrams: int = 0  # and of so many bytes, with
    letters: tuple = ()  # the bytes that make words, and
    blanks: tuple = ()  # those that stand between
    buckets: int = 2**18  # rows that the runs are hashed to
    # what the published trunks need
    family: str = "ours"  # ours, or one of FAMILIES below: how weights are named in a Hugging Face folder
    position: str = "rope"  # rope, learned
    n_segments: int = 0  # BERT's token types: all tokens are of type 0
    norm: str = "rms"  # rms, layer
    norm_eps: float | None = None
    norm_bias: bool = False
    post_norm: bool = False  # normalise after adding to the residual stream, as in BERT
    embedding_norm: bool = False
    first_norm: bool = True  # False: the first block's attention has no norm (ModernBERT)
    bias: bool = False  # in the blocks' linear layers
    window: int = 0  # attention reaches so many tokens to either side; 0: everywhere
    global_every: int = 1  # with a window: every so many blocks, from the first on, there is none
    window_rope_theta: float = 10000.0  # rope_theta of blocks with a window
    head_dense: str | None = None  # a layer between pooling and head: tanh, relu or gelu of it
    head_dense_bias: bool = True
    head_norm: bool = False  # and a norm
    head_bias: bool = False
    head_dropout: float = 0.0
    cls_token: bool = False  # images: a learned first token
    pixel_mean: float = 0.5  # of pixels as 0..1
    pixel_std: float = 0.5


class Layout:
    """Where the documents of a packed batch are: made once per batch, used by every layer.

    doc (T,), position (T,): each token's document, and its place in it. lengths (B,). first, last (B,): its outer tokens.
    """

    def __init__(self, cu_seqlens, T, max_len):
        self.cu_seqlens, self.max_len, self.lengths = cu_seqlens, max_len, cu_seqlens.diff()
        self.first, self.last = cu_seqlens[:-1].clamp(max=T - 1), (cu_seqlens[1:] - 1).clamp(min=0)  # if empty, any token
        token = torch.arange(T, device=cu_seqlens.device)
        self.doc = torch.bucketize(token, cu_seqlens[1:], right=True)
        self.position = token - cu_seqlens[self.doc]

    @functools.cached_property
    def runs(self):
        """[(b, L), ...]: so many documents of length L follow each other."""
        return [(len(list(same)), L) for L, same in itertools.groupby(self.lengths.tolist()) if L]

    @functools.cached_property
    def blocks(self):
        """For attention without a varlen kernel: documents of like length, padded to (b, L) blocks of tokens.

        (place, token, padding, [(mask, b, L), ...], order): of all blocks end to end, P rows, `token` (P,) says which token
        stands there (token 0 at `padding`) and `place` (T,) where each token stands; `mask` (b, L) is False at padding
        (None: there is none); `order` (B,) is each document's place among those of all blocks, 0 for empty ones."""
        start, lengths = self.cu_seqlens[:-1].tolist(), self.lengths.tolist()
        runs, waste = [], MAX_WASTE
        for d in sorted((d for d, n in enumerate(lengths) if n), key=lambda d: -lengths[d]):
            waste += lengths[runs[-1][0]] - lengths[d] if runs else 0  # of padding to the longest of this block
            if waste >= MAX_WASTE:
                runs.append([])
                waste = 0
            runs[-1].append(d)
        blocks, tokens, masks = [], [], []
        for run in runs:
            b, L = len(run), lengths[run[0]]
            mask = torch.arange(L) < torch.tensor([lengths[d] for d in run])[:, None]
            tokens.append((torch.tensor([start[d] for d in run])[:, None] + torch.arange(L)).where(mask, 0).flatten())
            masks.append(mask.flatten())
            blocks.append((None if mask.all() else mask.to(self.doc.device), b, L))
        token, mask = torch.cat(tokens), torch.cat(masks)
        place = torch.empty(int(mask.sum()), dtype=torch.int64)
        place[token[mask]] = mask.nonzero()[:, 0]
        order = torch.zeros(len(lengths), dtype=torch.int64)
        order[torch.tensor([d for run in runs for d in run])] = torch.arange(sum(map(len, runs)))
        return *(t.to(self.doc.device) for t in (place, token, (~mask).nonzero()[:, 0])), blocks, order.to(self.doc.device)

    def pool(self, x, kind):
        """The mean or max of each document's rows: x (T, D) → (B, D)."""
        B, D = len(self.lengths), x.shape[-1]
        if kind == "max":
            index = self.doc[:, None].expand_as(x)
            most = x.new_full((B, D), -math.inf).scatter_reduce(0, index, x, "amax")
            return most.where(self.lengths[:, None] > 0, 0)  # what stands for no document must not make NaN of its gradient
        return x.new_zeros(B, D).index_add(0, self.doc, x) / self.lengths.clamp(min=1)[:, None]


class Rows(torch.autograd.Function):
    """x[there], where `back` undoes `there`, except that nothing comes back to the rows `unused`. (The backward of indexing,
    which could not know this, adds row to row: 8 % of a fine-tuning step's time.)"""

    @staticmethod
    def forward(ctx, x, there, back, unused):
        ctx.back, ctx.unused = back, unused
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.back).index_fill_(0, ctx.unused, 0), None, None, None


MAX_WASTE = 64  # padded tokens that one more call of the attention kernel is worth (measured on 2 CPU cores)


class EvenLayout:
    """Where the documents are of a batch of (B, L) tokens, flattened to (B·L, D): a language model's blocks, the patches of
    images, and, with a mask (B, L) of the tokens that count, padded text, for exports."""

    def __init__(self, B, L, device, mask=None):
        self.shape, self.mask, self.at = (B, L), mask, torch.arange(L, device=device)
        self.position, self.first = self.at.repeat(B), torch.arange(B, device=device) * L
        self.last = self.first + (L if mask is None else mask.sum(1)) - 1

    @property
    def runs(self):
        return [self.shape]

    def pool(self, x, kind):
        """The mean or max of each document's rows: x (B·L, D) → (B, D)."""
        x = x.view(*self.shape, -1)
        if self.mask is None:
            return x.amax(1) if kind == "max" else x.mean(1)
        mask = self.mask[..., None]
        return x.masked_fill(~mask, torch.finfo(x.dtype).min).amax(1) if kind == "max" else (x * mask).sum(1) / mask.sum(1)


class Padded(nn.Module):
    """A transformer of text as other programs call it: (input_ids (B, L) int64, attention_mask (B, L), 1 at a document's
    tokens, which stand first, and 0 at padding) → logits (B, n_classes)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, attention_mask):
        mask = attention_mask.expand_as(inputs).bool()  # tells torch.export that the sizes are the same
        return self.model.read(self.model.embedding(inputs.flatten()), EvenLayout(*inputs.shape, inputs.device, mask))


def full(x):
    """x in float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def attend(qkv, layout, causal=False, window=0, first=False):
    """Attention within each document (and `window` tokens to either side, if any): qkv (T, 3, H, d) → (T, H, d); `first`:
    only that of each document's first token, (B, H, d), where what an empty document gets means nothing."""
    if first and (causal or window or qkv.is_cuda):
        return attend(qkv, layout, causal, window)[layout.first]
    even, dtype, device = isinstance(layout, EvenLayout), qkv.dtype, qkv.device
    if not even and qkv.is_cuda and dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(*qkv.unbind(1), layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len,
                           window_size=(window or -1, 0 if causal else window or -1))
    if dtype == torch.bfloat16 and device.type == "cpu" and not torch.is_grad_enabled() \
            and (not even or layout.mask is None) and all(L <= 1024 for _, L in layout.runs):  # or scores need much memory
        out = attend_bf16(*qkv.unbind(1), layout.runs, causal, window, first)
        return out[((layout.lengths > 0).cumsum(0) - 1).clamp(min=0)] if first and not even else out
    if even:
        return attend_blocks(qkv, *layout.shape, layout.mask, causal, window, first)
    place, token, padding, blocks, order = layout.blocks
    padded = Rows.apply(qkv, token, place, padding[:0])  # (P, 3, H, d)
    out = []
    for (mask, b, L), block in zip(blocks, padded.split([b * L for _, b, L in blocks])):
        # under causality padding needs no mask: it stands after every token that counts; nor does a window wider than L
        out.append(attend_blocks(block, b, L, None if causal else mask, causal, window if L > window + 1 else 0, first))
    out = torch.cat(out)
    return out[order] if first else Rows.apply(out, place, token, padding)


def attend_blocks(qkv, B, L, mask, causal, window, first):
    """`attend` where every document has L tokens, of which those in the mask (B, L) count: qkv (B·L, 3, H, d)."""
    (*_, H, d), device, allowed = qkv.shape, qkv.device, None
    rounded = qkv.dtype == torch.bfloat16 and device.type == "cpu"
    if rounded and causal and not window and L <= 256:
        return EvenAttention.apply(qkv, L)
    # in float32: on CPUs, bf16 attention's backward is many times slower
    q, k, v = (qkv.float() if rounded else qkv).view(B, L, 3, H, d).permute(2, 0, 3, 1, 4)
    if mask is not None or window:
        at = torch.arange(L, device=device)
        distance = at[:, None] - at
        allowed = torch.ones_like(at, dtype=torch.bool) if mask is None else mask[:, None, None]  # (B, 1, 1, L)
        if causal:
            allowed = allowed & (distance >= 0)
        if window:
            allowed = allowed & (distance.abs() <= window) | (distance == 0)  # softmax over nothing is not a number
    with torch.autocast(device.type, enabled=False):  # which would make it bf16 again
        y = F.scaled_dot_product_attention(q[:, :, :1] if first else q, k, v, allowed, is_causal=causal and allowed is None)
    return y.transpose(1, 2).reshape(-1, H, d).to(qkv.dtype)


class EvenAttention(torch.autograd.Function):
    """Causal attention in bfloat16 where all documents have L tokens, as a language model's blocks have:
    qkv (T, 3, H, d) → (T, H, d). On CPUs it takes half the time of the fused kernel in float32."""

    @staticmethod
    def forward(ctx, qkv, L):
        T, _, H, d = qkv.shape
        q, k, v = qkv.view(-1, L, 3, H, d).permute(2, 0, 3, 1, 4).reshape(3, -1, L, d)
        future = torch.full((L, L), -math.inf, dtype=qkv.dtype).triu(1)
        p = torch.baddbmm(future, q, k.mT, alpha=d**-0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        return (p @ v).view(-1, H, L, d).transpose(1, 2).reshape(T, H, d)

    @staticmethod
    def backward(ctx, grad):
        (q, k, v, p), (T, H, d) = ctx.saved_tensors, grad.shape
        L = q.shape[1]
        grad = grad.view(-1, L, H, d).transpose(1, 2).reshape(-1, L, d)
        grad_s = torch._softmax_backward_data(grad @ v.mT, p, -1, p.dtype) * d**-0.5
        out = torch.stack((grad_s @ k, grad_s.mT @ q, p.mT @ grad))  # (3, b·H, L, d)
        return out.view(3, -1, H, L, d).permute(1, 3, 0, 2, 4).reshape(T, 3, H, d), None


def attend_bf16(q, k, v, runs, causal, window, first):
    """`attend` in bfloat16 without a backward pass, on CPUs in half the time of the fused kernel (NOTES.md). Nothing is
    padded or moved: it is fast where documents of one length follow each other, as in evaluation."""
    (_, H, d), sizes, out = q.shape, [b * L for b, L in runs], []
    for (b, L), *block in zip(runs, *(x.split(sizes) for x in (q, k, v))):
        q, k, v = (x.unflatten(0, (b, L)).transpose(1, 2) for x in block)  # (b, H, L, d)
        q = q[:, :, :1] if first else q
        s = q * d**-0.5 @ k.mT  # (b, H, L, L)
        if causal or window:
            distance = torch.arange(L)[:, None] - torch.arange(L)
            s = s.masked_fill((distance < 0 if causal else distance > L) | (distance.abs() > (window or L)), -math.inf)
        p = s.softmax(-1, torch.float32) if L >= 16 or first else \
            s.mT.contiguous().softmax(-2, torch.float32).mT  # along short rows it is slow
        out.append((p.to(q.dtype) @ v).transpose(1, 2).reshape(-1, H, d))
    return torch.cat(out)


def dropout(x, p, training):
    """F.dropout. On the CPU with 16 random bits an element, at 2/5 of its time, which draws 64 for each of them."""
    if not (p and training):
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[: x.numel()]
    cut = round(p * 2**16)
    return x * ((bits.view(x.shape) >= cut - 2**15).to(x.dtype) * (2**16 / (2**16 - cut)))


def rotate(x, cos, sin):
    """Rotary position embedding: x (T, 2, H, d) with cos, sin (T, 1, 1, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class CPUNorm(torch.autograd.Function):
    """F.rms_norm and its backward pass, which torch makes of a dozen operations on CPUs, in less than half the time."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = (norm.square() / x.shape[-1] + eps).rsqrt()
        y = x * inverse
        ctx.save_for_backward(y, weight, inverse)
        ctx.dtype = x.dtype
        return (y if weight is None else y * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, weight, inverse = ctx.saved_tensors
        g = grad if weight is None else grad * weight
        grad_weight = None if weight is None else (grad * y).flatten(0, -2).sum(0)
        return ((g - y * (g * y).mean(-1, keepdim=True)) * inverse).to(ctx.dtype), grad_weight, None


def rms_norm(x, weight=None, eps=None):
    """F.rms_norm over the last dimension."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps  # as F.rms_norm has it
    return CPUNorm.apply(x, weight, eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def make_norm(c):
    return RMSNorm(c.d_model, eps=c.norm_eps) if c.norm == "rms" else \
        nn.LayerNorm(c.d_model, eps=c.norm_eps or 1e-5, bias=c.norm_bias)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.causal, self.qk_norm = c.n_head, c.causal, c.qk_norm
        self.window = c.window if layer % c.global_every else 0
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model, bias=c.bias)
        self.out = nn.Linear(c.d_model, c.d_model, bias=c.bias)

    def forward(self, x, layout, keep=None):
        T, D = x.shape
        qkv = self.qkv(x).view(T, 3, self.n_head, D // self.n_head)
        if self.qk_norm or layout.rope:
            qk, v = qkv.split((2, 1), 1)  # (T, 2, H, d), (T, 1, H, d)
            if self.qk_norm:
                qk = rms_norm(qk)
            if layout.rope:
                qk = rotate(qk, *layout.rope[bool(self.window)])
            qkv = torch.cat((qk.to(v.dtype), v), 1)  # CUDA's autocast makes norms float32
        first = keep is not None and keep is layout.first
        y = attend(qkv, layout, self.causal, self.window, first).flatten(1)
        return self.out(y if keep is None or first else y[keep])


class FeedForward(nn.Module):
    ACTIVATIONS = {"relu2": lambda x: F.relu(x).square(), "gelu": F.gelu, "swiglu": F.silu, "geglu": F.gelu,
                   "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}

    def __init__(self, c):
        super().__init__()
        self.gated, self.activation = c.mlp.endswith("glu"), self.ACTIVATIONS[c.mlp]
        self.up = nn.Linear(c.d_model, c.d_ff * (2 if self.gated else 1), bias=c.bias)
        self.out = nn.Linear(c.d_ff, c.d_model, bias=c.bias)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.out(self.activation(gate) * x)
        return self.out(self.activation(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm1 = make_norm(c) if c.first_norm or layer else nn.Identity()
        self.attention, self.norm2, self.mlp = Attention(c, layer), make_norm(c), FeedForward(c)
        self.dropout, self.post_norm = c.dropout, c.post_norm

    def forward(self, x, layout, keep=None):
        """(T, D) → (T, D), or with `keep` (B,) only those rows: what a last block owes to a head that reads no more."""
        def drop(y):
            return dropout(y, self.dropout, self.training)
        y = drop(self.attention(x if self.post_norm else self.norm1(x), layout, keep))
        x = y + (x if keep is None else x[keep])
        if self.post_norm:
            x = self.norm1(x)
            return self.norm2(x + drop(self.mlp(x)))
        return x + drop(self.mlp(self.norm2(x)))


def patchify(x, p):
    """Images as rows of patches: (B, C, H, W) → (B, H/p · W/p, C·p·p)."""
    B, C, H, W = x.shape
    return x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, H // p * (W // p), C * p * p)


def rope_angles(c, theta):
    """The angle of each position and pair of dimensions, (max_len, d/2). Of images, half the pairs turn with a patch's row,
    half with its column (Heo et al. 2024, axial)."""
    if not c.image_size:
        return torch.outer(torch.arange(c.max_len), theta ** -torch.arange(0, 1, 2 * c.n_head / c.d_model))
    _, H, W = c.image_size
    place = torch.cartesian_prod(torch.arange(H // c.patch), torch.arange(W // c.patch))  # (N, 2)
    frequency = 100.0 ** -torch.arange(0, 1, 4 * c.n_head / c.d_model)  # (d/4,): there are few rows
    return (place[:, :, None] * frequency).flatten(1)


class Transformer(nn.Module):
    """`config` → a model with fresh weights, drawn from torch's global generator."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.image_size:
            C, H, W = c.image_size
            c.max_len = H // c.patch * (W // c.patch) + c.cls_token
            self.embedding = nn.Linear(C * c.patch**2, c.d_model)
        else:
            self.embedding = nn.Embedding(c.buckets if c.stem == "words" else c.vocab_size, c.d_model)
        if c.stem == "words":
            self.register_buffer("kind", byte_kinds(c), persistent=False)
        self.cls = nn.Parameter(torch.zeros(c.d_model)) if c.cls_token else None
        self.position = nn.Embedding(c.max_len, c.d_model) if c.position == "learned" else None
        self.segment = nn.Embedding(c.n_segments, c.d_model) if c.n_segments else None
        self.embedding_norm = make_norm(c) if c.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = nn.Identity() if c.post_norm else make_norm(c)
        self.dense = nn.Linear(c.d_model, c.d_model, bias=c.head_dense_bias) if c.n_classes and c.head_dense else None
        self.dense_norm = make_norm(c) if c.head_norm and c.n_classes else nn.Identity()
        self.head = nn.Linear(c.d_model, c.n_classes, bias=c.head_bias) if c.n_classes else None
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False) if c.lm_head == "own" else None
        if c.position == "rope":
            for name, theta in (("rope", c.rope_theta), ("window_rope", c.window_rope_theta)):
                angle = rope_angles(c, theta)
                self.register_buffer(name, torch.stack((angle.cos(), angle.sin())), persistent=False)  # (2, max_len, d/2)
        for name, p in self.named_parameters():
            if name.endswith("bias") or c.family == "ours" and name.endswith(("head.weight", "out.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                matrix = c.family == "ours" and (name.startswith("blocks") or c.image_size and name == "embedding.weight")
                nn.init.normal_(p, std=p.shape[1] ** -0.5 if matrix else 0.02)

    def embed(self, inputs, cu_seqlens):
        """Text, (T,) tokens, or images, (B, C, H, W) pixels of 0..255 → vectors (T, D) of tokens, words or patches; their
        layout."""
        c = self.config
        if c.stem == "words":
            return self.embed_words(inputs, cu_seqlens)
        if not c.image_size:
            T = len(inputs)
            return self.embedding(inputs), EvenLayout(T // cu_seqlens, cu_seqlens, inputs.device) \
                if isinstance(cu_seqlens, int) else Layout(cu_seqlens, T, c.max_len)
        x = self.embedding(patchify((full(inputs) / 255 - c.pixel_mean) / c.pixel_std, c.patch))  # (B, N, D)
        if self.cls is not None:
            x = torch.cat((self.cls.expand(x.shape[0], 1, -1).to(x.dtype), x), 1)
        return x.flatten(0, 1), EvenLayout(*x.shape[:2], x.device)

    def embed_words(self, tokens, cu_seqlens):
        """Bytes (T,) → (W, D), a vector for each word: of its runs of bytes and of the runs of words that end with it."""
        c, B = self.config, len(cu_seqlens) - 1
        doc = torch.bucketize(torch.arange(len(tokens), device=tokens.device), cu_seqlens[1:], right=True)
        word, place, start = words_of(self.kind, tokens, doc)
        W, inside = len(start), word >= 0
        words = ngram_buckets(hash_words(tokens, word, place, W), doc[start], c.ngrams, c.buckets)
        letters = ngram_buckets(tokens[inside], word[inside], c.char_ngrams, c.buckets)
        x = bags(self.embedding, [(*words, torch.arange(W, device=doc.device)), (*letters, word[inside])], W)
        return x, Layout(F.pad(torch.bincount(doc[start], minlength=B).cumsum(0), (1, 0)).int(), W, c.max_len)

    def trunk(self, x, layout, keep=None):
        c = self.config
        layout.rope = c.position == "rope" and [  # of blocks without and with a window: cos, sin (T, 1, 1, d/2)
            table[:, layout.position, None, None] for table in (self.rope, self.window_rope)]
        if self.position is not None:
            x = x + self.position(layout.position) if isinstance(layout, Layout) else \
                (x.view(*layout.shape, -1) + self.position(layout.at)).flatten(0, 1)  # its gradient is faster
        if self.segment is not None:
            x = x + self.segment.weight[0]
        x = dropout(self.embedding_norm(x), c.dropout, self.training)
        run = functools.partial(checkpoint, use_reentrant=False) if c.checkpoint_activations and self.training else \
            lambda block, *inputs: block(*inputs)
        for i, block in enumerate(self.blocks):
            x = run(block, x, layout, keep if i == len(self.blocks) - 1 else None)
        return self.norm(x if keep is None or self.blocks else x[keep])

    def hidden(self, inputs, cu_seqlens=None):
        """(T, d_model): every token's vector after the last norm."""
        return self.trunk(*self.embed(inputs, cu_seqlens))

    def forward(self, inputs, cu_seqlens=None, where=None):
        """Logits (B, n_classes), float32, of packed text (inputs (T,), cu_seqlens (B+1,), or an int: the length of each
        document) or images (B, C, H, W). Of a language model (T, vocab_size) for each token, or (M, vocab_size) for those
        of the indices `where` (M,)."""
        x, layout = self.embed(inputs, cu_seqlens)
        if not self.config.lm_head:
            return self.read(x, layout)
        x = self.trunk(x, layout, where)
        return F.linear(x, self.embedding.weight if self.lm_head is None else self.lm_head.weight)

    def read(self, x, layout):
        """Trunk, pooling and head: (T, D) → (B, n_classes)."""
        kind = self.config.pooling
        keep = {"cls": layout.first, "last": layout.last}.get(kind)
        x = self.trunk(x, layout, keep)
        with torch.autocast(x.device.type, enabled=False):
            return self.classify(full(x) if keep is not None else layout.pool(full(x), kind))

    def classify(self, x):
        """The head: (B, D) → (B, n_classes)."""
        c = self.config
        if self.dense is not None:
            x = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}[c.head_dense](self.dense(x))
        return self.head(dropout(self.dense_norm(x), c.head_dropout, self.training))

    @staticmethod
    def from_pretrained(path, n_classes=None, new_head=False, max_len=None, image_size=None):
        """The model of a checkpoint (a file, or a run's folder) or of a Hugging Face folder, in eval mode.

        With n_classes it gets a head: the weights' own, or a fresh one where they have none or with new_head; with
        n_classes = 0 a language model's: of ours its own, of others one tied to the embedding, which is GPT-2's exactly, and
        for the rest a new beginning without the layer that theirs has before it. For images of another size, learned
        positions are interpolated (bicubic; Dosovitskiy et al. 2021, section 3.2). Raises WeightsError for what is not
        supported, missing, left over, of the wrong shape, or not finite."""
        path = Path(path)
        if (path / "config.json").exists() and not (path / "best.pt").exists():
            config, weights = read_hf(path)
        else:
            saved = load_checkpoint(path / "best.pt" if path.is_dir() else path)
            config, weights = ModelConfig(**saved["model_config"]), saved["model"]
        if n_classes == 0:
            config.n_classes, config.lm_head = 0, config.lm_head or "tied"
            weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
        elif n_classes:
            config.lm_head = ""
            weights = {k: v for k, v in weights.items() if not k.startswith("lm_head.")}
        if n_classes and config.n_classes != n_classes:
            if config.n_classes and not new_head:
                raise WeightsError(f"{path}: its head tells {config.n_classes} classes apart, the data has {n_classes}; "
                                   "give it a new one with --new_head=True")
            config.n_classes, new_head = n_classes, True
        if config.image_size and not image_size and max_len:
            raise WeightsError(f"{path}: reads images, not text")
        if max_len and max_len > config.max_len and config.position == "learned" and not config.image_size:
            raise WeightsError(f"{path}: reads {config.max_len} tokens at the most; set --max_len={config.max_len}")
        if image_size and tuple(image_size) != tuple(config.image_size):
            (C, H, W), (channels, h, w), p = image_size, config.image_size or (0, 0, 0), config.patch
            if C != channels:
                reads = f"images of {channels} channels" if channels else "text"
                raise WeightsError(f"{path}: reads {reads}, not images of {C} channels")
            if H % p or W % p:
                raise WeightsError(f"{path}: its patches of {p}×{p} do not divide images of {H}×{W}")
            config.image_size = (C, H, W)
            if config.position == "learned":
                cls, grid = weights["position.weight"].split([int(config.cls_token), h // p * (w // p)])
                grid = F.interpolate(grid.T.reshape(1, -1, h // p, w // p).float(), (H // p, W // p), mode="bicubic")
                weights["position.weight"] = torch.cat((cls, grid[0].flatten(1).T))
        if max_len and config.position == "rope" and not config.image_size:
            config.max_len = max(max_len, config.max_len)
        model = Transformer(config)
        if new_head:
            weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
            weights |= {k: v for k, v in model.state_dict().items() if k.startswith("head.") or
                        k.startswith("dense") and k not in weights}
        if not config.n_classes:  # a bare trunk may bring a pooler
            weights = {k: v for k, v in weights.items() if not k.startswith("dense")}
        load_weights(model, weights, path)
        return model.eval()


class LinearModel(nn.Module):
    """Softmax (or, with one output, least-squares) regression. On rows of numbers: x (B, F) → x·Wᵀ + b, (B, n_classes).

    On text: a bag of hashed n-grams of words (fastText's features, Joulin et al. 2017, without its factorisation): each run
    of 1 … ngrams tokens has a row of n_classes weights; the rows of a document are added up and divided by √(their number).
    With `letters`, tokens are bytes: runs of 1 … char_ngrams bytes are one bag, runs of words (letters without a break, or
    one other byte that is no blank) a second one."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.vocab_size:
            self.embedding = nn.Embedding(c.buckets, c.n_classes)
            nn.init.zeros_(self.embedding.weight)
            self.bias = nn.Parameter(torch.zeros(c.n_classes))
            self.register_buffer("kind", byte_kinds(c), persistent=False)
        else:
            self.head = nn.Linear(c.n_features or math.prod(c.image_size), c.n_classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x, cu_seqlens=None):
        c, B = self.config, len(cu_seqlens) - 1 if cu_seqlens is not None else 0
        if not c.vocab_size:
            with torch.autocast(x.device.type, enabled=False):
                return self.head(flat(x))
        doc = torch.bucketize(torch.arange(len(x), device=x.device), cu_seqlens[1:], right=True)
        runs = [(x, doc, c.char_ngrams if c.letters else c.ngrams)]
        if c.letters:
            word, place, start = words_of(self.kind, x, doc)
            runs.append((hash_words(x, word, place, len(start)), doc[start], c.ngrams))
        return bags(self.embedding, [(*ngram_buckets(t, d, n, c.buckets), d) for t, d, n in runs], B) + self.bias


def byte_kinds(c):
    """(vocab_size,) int64 of each byte's token: 0 for a blank, 1 for a word by itself, 2 for a part of one."""
    kind = torch.ones(c.vocab_size, dtype=torch.int64)
    kind[list(c.blanks)], kind[list(c.letters)] = 0, 2
    return kind


def words_of(kind, tokens, doc):
    """Bytes (T,) of documents doc (T,) as W words: (word (T,) of each byte, -1 of a blank; place (T,) in it; start (W,))."""
    kinds = kind[tokens]
    same = F.pad((kinds[1:] == 2) & (kinds[:-1] == 2) & (doc[1:] == doc[:-1]), (1, 0))  # goes on with the word before it
    start = ((kinds > 0) & ~same).nonzero()[:, 0]
    at = torch.arange(len(tokens), device=tokens.device)
    word = torch.bucketize(at, start, right=True) - 1
    place = at - F.pad(start, (0, 1))[word]
    return word.where(kinds > 0, -1), place, start


def hash_words(tokens, word, place, n_words):
    """A hash (W,) int64 of each word's bytes."""
    mixed = (tokens + 1) * (place + 1) * 0x9E3779B97F4A7C15 ^ tokens << 40
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9
    inside = word >= 0
    return tokens.new_zeros(n_words).index_add(0, word[inside], mixed[inside])


def ngram_buckets(tokens, doc, n, buckets):
    """Of tokens (T,) and their documents (T,), ascending: (bucket (T, n) of the runs of 1 … n tokens that end at each token,
    bool (T, n) of those that begin in its document). Of equal runs the buckets are equal; others seldom are."""
    hashes, inside, h = [], [], torch.zeros_like(tokens)
    for k in range(n):
        before = F.pad(tokens, (k, 0))[: len(tokens)]
        h = (h + before + 1) * 0x9E3779B97F4A7C15  # Fibonacci hashing (Knuth, vol. 3, 6.4), wrapping int64
        h = h ^ (h >> 31)
        hashes.append(((h * 0xBF58476D1CE4E5B9) >> 20) % buckets)
        inside.append(F.pad(doc, (k, 0), value=-1)[: len(doc)] == doc)
    return torch.stack(hashes, 1), torch.stack(inside, 1)


def bags(table, runs, n_segments):
    """Of each segment the sum of the table's rows of its runs, divided by √(their number), added up over kinds of `runs`:
    [(bucket (T, n), bool (T, n) of those that there are, segment (T,), ascending), ...] → (n_segments, width)."""
    count = torch.stack([segment.new_zeros(n_segments).index_add(0, segment, there.sum(1)) for _, there, segment in runs])
    rows = torch.cat([bucket.masked_select(there) for bucket, there, _ in runs])
    total = SumRows.apply(table.weight, rows, count.flatten(), table.sparse)
    return (total.view(*count.shape, -1) / count.clamp(min=1).sqrt()[..., None].to(total.dtype)).sum(0)


class SumRows(torch.autograd.Function):
    """Sums of a table's `rows` (N,), the next count[0], count[1], … of them: → (len(count), width). F.embedding_bag, but for
    a backward pass in a quarter of its time on CPUs."""

    @staticmethod
    def forward(ctx, weight, rows, count, sparse):
        ctx.save_for_backward(rows, count)
        ctx.shape, ctx.sparse = weight.shape, sparse
        return F.embedding_bag(rows, weight, F.pad(count.cumsum(0)[:-1], (1, 0)), mode="sum")

    @staticmethod
    def backward(ctx, grad):
        rows, count = ctx.saved_tensors
        grad = grad.repeat_interleave(count, 0, output_size=len(rows))
        if not ctx.sparse:
            return grad.new_zeros(ctx.shape).index_add_(0, rows, grad), None, None, None
        used, place = rows.unique(return_inverse=True)
        values = grad.new_zeros(len(used), grad.shape[1]).index_add_(0, place, grad)
        grad = torch.sparse_coo_tensor(used[None], values, ctx.shape, is_coalesced=True, check_invariants=False)
        return grad, None, None, None


class MLP(nn.Module):
    """n_layer hidden layers of d_model ReLU units, on rows of numbers, on pixels, or on the mean of a text's embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.vocab_size:
            self.embedding = nn.Embedding(c.vocab_size, c.d_model)
            nn.init.normal_(self.embedding.weight)
        widths = [c.d_model if c.vocab_size else c.n_features or math.prod(c.image_size), *[c.d_model] * c.n_layer]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(widths[-1], c.n_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, cu_seqlens=None):
        if self.config.vocab_size:
            x = Layout(cu_seqlens, len(x), self.config.max_len).pool(full(self.embedding(x)), "mean")
        else:
            x = flat(x)
        for layer in self.layers:
            x = dropout(F.relu(layer(x)), self.config.dropout, self.training)
        return self.head(x).float() if x.dtype != torch.float64 else self.head(x)


def flat(x):
    """Numbers as they are, images as rows of numbers from -1 to 1."""
    return x if x.ndim == 2 else full(x).flatten(1) / 127.5 - 1


def build_model(config):
    """The model of a ModelConfig, or of the dict that a checkpoint keeps of one."""
    c = ModelConfig(**config) if isinstance(config, dict) else config
    return {"transformer": Transformer, "mlp": MLP, "linear": LinearModel}[c.model](c)


def flops_per_token(model, length):
    """Floating-point operations of a forward and backward pass per token (MLP, linear: per example), in documents of
    `length` tokens: 6 for each weight of a matrix, and 12·length·d_model a layer for attention (Chowdhery et al. 2022,
    appendix B)."""
    c = model.config
    weights = sum(p.numel() for n, p in model.named_parameters()
                  if p.ndim == 2 and not (c.vocab_size and "embedding" in n and c.lm_head != "tied"))
    attention = 12 * c.n_layer * length * c.d_model / (2 if c.causal else 1) if c.model == "transformer" else 0
    return 6 * weights + attention


def find_device(name):
    """The kind of device that a setting names; auto: the first of cuda, mps and cpu that is there."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def bf16_is_native(kind):
    """Does the device compute bfloat16 matrix products faster than float32 ones?"""
    return torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else \
        kind == "cpu" and torch.cpu._is_avx512_bf16_supported()


class LowLinear(nn.Module):
    """A linear layer that only predicts, on a CPU, its weight laid out as oneDNN reads it, GELU (`gelu`: none, tanh, or ""
    for no GELU) computed on the way out: in bfloat16, or in int8, weights scaled row by row, inputs batch by batch."""

    def __init__(self, linear, dtype, gelu):
        super().__init__()
        self.unary, self.int8 = ("gelu" if gelu else "none", [], gelu), dtype == torch.int8
        w, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        if self.int8:
            self.scale = w.abs().amax(1).clamp(min=1e-12) / 127
            self.zero = torch.zeros(len(w), dtype=torch.int64)
            self.packed = torch.ops.onednn.qlinear_prepack((w / self.scale[:, None]).round().to(dtype), None)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(w.to(dtype), 2048)  # a usual number of rows
            self.bias = None if self.bias is None else self.bias.to(dtype)

    def forward(self, x):
        if not self.int8:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.unary)
        low, high = (float(v) for v in torch.aminmax(x))
        scale = max(max(high, 0.0) - min(low, 0.0), 1e-12) / 255
        zero = round(-min(low, 0.0) / scale)
        q = x.float().div(scale).add_(zero + 0.5).clamp_(max=255).to(torch.uint8)  # rounds
        return torch.ops.onednn.qlinear_pointwise(q, scale, zero, self.packed, self.scale, self.zero, self.bias, 1.0, 0,
                                                  x.dtype, *self.unary)


@torch.no_grad()
def lower(model, dtype):
    """Makes a Transformer of text, in place, one that only predicts, on a CPU: in bfloat16, or with its blocks' matrices in
    int8 and the rest in bfloat16 where that is native, else in float32. The head stays in float32."""
    gelu = {"gelu": "none", "gelu_tanh": "tanh"}.get(model.config.mlp, "")
    for block in model.blocks:
        for part, name in ((block.attention, "qkv"), (block.attention, "out"), (block.mlp, "up"), (block.mlp, "out")):
            setattr(part, name, LowLinear(getattr(part, name), dtype, gelu if name == "up" else ""))
        block.mlp.activation = nn.Identity() if gelu else block.mlp.activation
    for name, p in model.named_parameters():
        if not name.startswith(("dense", "head")) and bf16_is_native("cpu"):
            p.data = p.data.bfloat16()


@torch.no_grad()
def predict(model, batches, device, dtype, flip=False):
    """Of a model in eval mode, yields the logits (B, n_classes), on the CPU, of each (*inputs, targets). `flip`: of
    images, the mean with their mirror images' logits."""
    for *inputs, _ in batches:
        inputs = [t.to(device) for t in inputs]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(*inputs)
            if flip:
                logits = (logits + model(inputs[0].flip(-1))) / 2
        yield logits.float().cpu()


@torch.no_grad()
def lm_losses(model, batches, device, dtype):
    """Of a language model in eval mode, yields of each batch (*inputs, targets) the loss (M,) in nats, float64, of each
    target that counts, and whether it was the likeliest token (M,)."""
    for *inputs, targets in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(*(t.to(device) for t in inputs))
        counts = targets >= 0
        logits, targets = logits[counts.to(device)].float(), targets[counts].to(device)
        yield F.cross_entropy(logits, targets, reduction="none").cpu().double(), (logits.argmax(1) == targets).cpu()


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
    weights = {k: v.float() for k, v in weights.items()}
    wrong = ([f"{k} is missing" for k in own if k not in weights] + [f"{k} is left over" for k in weights if k not in own]
             + [f"{k} is {tuple(weights[k].shape)}, not {tuple(v.shape)}" for k, v in own.items()
                if k in weights and weights[k].shape != v.shape]
             + [f"{k} is not finite" for k, v in weights.items() if not v.isfinite().all()])
    if wrong:
        raise WeightsError(f"{source}: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
    model.load_state_dict(weights)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders: config.json, model.safetensors, tokenizer.json. One table of names serves reading and writing.

QKV = "attention.qkv"
FAMILIES = {  # family → our module → theirs; names below "root" unless they begin with "/"; "!" ends that of a parameter
    "bert": {
        "root": "bert.", "layer": "encoder.layer.{}.", "embedding": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings", "segment": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm", "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        QKV: ("attention.self.query", "attention.self.key", "attention.self.value"), "up": "intermediate.dense",
        "down": "output.dense", "norm2": "output.LayerNorm", "dense": "pooler.dense", "head": "/classifier",
        "ignored": ("cls.", "bert.embeddings.position_ids")},
    "distilbert": {
        "root": "distilbert.", "layer": "transformer.layer.{}.", "embedding": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings", "embedding_norm": "embeddings.LayerNorm", "out": "attention.out_lin",
        QKV: ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "norm1": "sa_layer_norm", "up": "ffn.lin1",
        "down": "ffn.lin2", "norm2": "output_layer_norm", "dense": "/pre_classifier", "head": "/classifier",
        "ignored": ("vocab_", "distilbert.embeddings.position_ids")},
    "modernbert": {
        "root": "model.", "layer": "layers.{}.", "embedding": "embeddings.tok_embeddings",
        "embedding_norm": "embeddings.norm", QKV: ("attn.Wqkv",), "out": "attn.Wo", "norm1": "attn_norm",
        "norm2": "mlp_norm", "up": "mlp.Wi", "down": "mlp.Wo",
        "norm": "final_norm", "dense": "/head.dense", "dense_norm": "/head.norm", "head": "/classifier",
        "ignored": ("decoder.",)},
    "gpt2": {
        "root": "transformer.", "layer": "h.{}.", "embedding": "wte", "position": "wpe", QKV: ("attn.c_attn",),
        "out": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj", "norm": "ln_f",
        "head": "/score", "ignored": ("lm_head.", ".attn.bias", ".attn.masked_bias")},
    "vit": {
        "root": "vit.", "layer": "encoder.layer.{}.", "embedding": "embeddings.patch_embeddings.projection",
        "position": "embeddings.position_embeddings!", "cls": "embeddings.cls_token!", "out": "attention.output.dense",
        QKV: ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "norm1": "layernorm_before", "norm2": "layernorm_after", "up": "intermediate.dense", "down": "output.dense",
        "norm": "layernorm", "head": "/classifier", "ignored": ("vit.pooler.",)},
}
FAMILIES["roberta"] = FAMILIES["bert"] | {
    "root": "roberta.", "dense": "/classifier.dense", "head": "/classifier.out_proj",
    "ignored": ("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids")}
OURS_TO_HF = {"mlp.up": "up", "mlp.out": "down", "attention.out": "out"}


def hf_names(key, family):
    """Their names for our weight: several where ours is theirs stacked."""
    names = FAMILIES[family]
    module, _, kind = key.rpartition(".") if "." in key else (key, "", "")
    layer = ""
    if module.startswith("blocks."):
        _, i, module = module.split(".", 2)
        layer = names["layer"].format(i)
    theirs = names[OURS_TO_HF.get(module, module)]
    whole = [n[1:] if n.startswith("/") else names["root"] + layer + n
             for n in (theirs if isinstance(theirs, tuple) else (theirs,))]
    return [n.removesuffix("!") if n.endswith("!") else f"{n}.{kind}" for n in whole]


def transposed(key, family):
    return family == "gpt2" and key.startswith("blocks.") and "norm" not in key and key.endswith("weight")  # their Conv1D


def read_hf(folder):
    """(ModelConfig, our state dict) of a Hugging Face folder; n_classes 0 where it holds no classifier."""
    folder = Path(folder)
    try:
        hf = json.loads((folder / "config.json").read_text())
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
        theirs = {}
        for shard in sorted(shards):
            with safe_open(folder / shard, "pt") as f:
                theirs |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as e:
        raise WeightsError(f"{folder}: there is no {Path(e.filename or str(e)).name}; a folder with config.json and "
                           "model.safetensors is needed (older .bin files can run code: convert them)") from None
    except (ValueError, KeyError, SafetensorError) as e:
        raise WeightsError(f"{folder}: damaged: {e}") from None
    if hf.get("model_type") == "textcls":
        return ModelConfig(**hf["model_config"]), theirs
    try:
        c = hf_config(hf, folder)
    except KeyError as e:
        raise WeightsError(f"{folder}/config.json: {e} is missing") from None
    names = FAMILIES[c.family]
    if not any(k.startswith(names["root"]) for k in theirs):  # saved from the bare trunk
        theirs = {names["root"] + k: v for k, v in theirs.items()}
    theirs = {k: v for k, v in theirs.items()
              if not any(k.startswith(i) or i[0] == "." and i in k for i in names["ignored"])}
    head = hf_names("head.weight", c.family)[0]
    c.n_classes = len(theirs[head]) if head in theirs else 0
    with torch.device("meta"):
        wanted = Transformer(ModelConfig(**vars(c) | {"n_classes": c.n_classes or 1})).state_dict()
    ours = {}
    for key, meta in wanted.items():
        parts = [theirs.pop(n, None) for n in hf_names(key, c.family)]
        if all(p is not None for p in parts):
            w = torch.cat(parts)
            w = w.T.contiguous() if transposed(key, c.family) else w
            if c.family == "vit" and w.numel() == meta.numel():
                w = w.reshape(meta.shape)  # of a convolution's weight, or without a first dimension of 1
            ours[key] = w[len(w) - len(meta) :] if key == "position.weight" else w  # RoBERTa's begin at pad_token_id + 1
        elif c.n_classes or not key.startswith(("dense", "head")):
            raise WeightsError(f"{folder}: {', '.join(hf_names(key, c.family))} is missing")
    if theirs:
        raise WeightsError(f"{folder}: {next(iter(theirs))} is left over (and {len(theirs) - 1} more)")
    return c, ours


def hf_config(hf, folder):
    """config.json's meaning as a ModelConfig. What we would not compute exactly is refused by name."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise WeightsError(f"{folder}: model type {family!r} is not supported; {', '.join(sorted(FAMILIES))} are")

    def only(key, *allowed):
        if hf.get(key, allowed[0]) not in allowed:
            raise WeightsError(f"{folder}: {key}={hf[key]!r} is not supported for {family}, only {allowed[0]!r} is")
    for key in ("is_decoder", "add_cross_attention", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx",
                "is_encoder_decoder", "sinusoidal_pos_embds"):
        only(key, False, None)
    only("position_embedding_type", "absolute", None)
    only("scale_attn_weights", True)
    only("activation_function" if family == "gpt2" else "hidden_act", *(("gelu_new", "gelu_pytorch_tanh")
                                                                          if family == "gpt2" else ("gelu",)))
    only("activation", "gelu")
    only("hidden_activation", "gelu")
    c = ModelConfig(family=family, vocab_size=hf.get("vocab_size", 0), qk_norm=False, norm="layer", norm_bias=True,
                    bias=True, mlp="gelu", position="learned", pooling="cls")
    if family in ("bert", "roberta", "modernbert", "vit"):
        c.n_layer, c.n_head, c.d_model, c.d_ff = (hf[k] for k in (
            "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"))
        c.max_len = hf.get("max_position_embeddings", 0)
    if family == "vit":
        only("qkv_bias", True)
        size = hf["image_size"]
        c.image_size, c.patch = (hf["num_channels"], *(size if isinstance(size, list) else (size, size))), hf["patch_size"]
        c.cls_token, c.head_bias, c.norm_eps, c.dropout = True, True, hf["layer_norm_eps"], hf["hidden_dropout_prob"]
        scaling = folder / "preprocessor_config.json"
        for key in ("image_mean", "image_std"):
            values = set(json.loads(scaling.read_text()).get(key, [0.5])) if scaling.exists() else {0.5}
            if len(values) > 1:
                raise WeightsError(f"{folder}: {key}={sorted(values)} is not supported, only one for all channels")
            setattr(c, key.replace("image", "pixel"), values.pop())
    if family in ("bert", "roberta", "distilbert"):
        c.post_norm = c.embedding_norm = c.head_bias = True
        c.norm_eps = hf.get("layer_norm_eps", 1e-12)
        c.n_segments, c.dropout = hf.get("type_vocab_size", 2), hf.get("hidden_dropout_prob", 0.1)
        c.head_dense, c.head_dropout = "tanh", hf.get("classifier_dropout") or c.dropout
    if family == "roberta":
        c.max_len -= hf.get("pad_token_id", 1) + 1
    if family == "distilbert":
        c.n_layer, c.n_head, c.d_model, c.d_ff, c.max_len = (hf[k] for k in (
            "n_layers", "n_heads", "dim", "hidden_dim", "max_position_embeddings"))
        c.n_segments, c.head_dense, c.dropout, c.head_dropout = 0, "relu", hf["dropout"], hf["seq_classif_dropout"]
    if family == "modernbert":
        rope = hf.get("rope_parameters") or {}
        for kind in ("full_attention", "sliding_attention"):
            if rope.get(kind, {}).get("rope_type", "default") != "default":
                raise WeightsError(f"{folder}: rope_type={rope[kind]['rope_type']!r} is not supported, only 'default' is")
        c.rope_theta = rope.get("full_attention", {}).get("rope_theta") or hf.get("global_rope_theta", 160000.0)
        c.window_rope_theta = rope.get("sliding_attention", {}).get("rope_theta") or hf.get("local_rope_theta") or 10000.0
        every = hf.get("global_attn_every_n_layers", 3)
        kinds = hf.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(c.n_layer)]
        whole = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        c.global_every = whole[1] if len(whole) > 1 else len(kinds)
        if whole != list(range(0, len(kinds), c.global_every)):
            raise WeightsError(f"{folder}: layer_types={kinds} is not supported: global attention must recur evenly")
        if len({hf.get(k, False) for k in ("attention_bias", "mlp_bias")}) > 1 or hf.get("norm_bias"):
            raise WeightsError(f"{folder}: biases in some layers only are not supported for modernbert")
        only("classifier_activation", "gelu")
        c.window, c.position, c.mlp, c.bias = hf["local_attention"] // 2, "rope", "geglu", hf.get("attention_bias", False)
        c.embedding_norm, c.first_norm, c.norm_bias, c.norm_eps = True, False, False, hf.get("norm_eps", 1e-5)
        c.head_dense, c.head_norm, c.head_bias, c.head_dense_bias = "gelu", True, True, hf.get("classifier_bias", False)
        c.pooling, c.head_dropout = hf.get("classifier_pooling", "cls"), hf.get("classifier_dropout", 0.0)
        c.dropout = hf.get("mlp_dropout", 0.0)
    if family == "gpt2":
        c.n_layer, c.n_head, c.d_model, c.max_len = (hf[k] for k in ("n_layer", "n_head", "n_embd", "n_positions"))
        c.d_ff, c.mlp, c.causal, c.pooling = hf.get("n_inner") or 4 * c.d_model, "gelu_tanh", True, "last"
        c.norm_eps, c.dropout = hf.get("layer_norm_epsilon", 1e-5), hf.get("resid_pdrop", 0.1)
    return c


def save_hf(model, folder, label_names, tokenizer_json, multilabel=False):
    """Writes a folder that transformers' AutoModelForSequenceClassification and AutoTokenizer load (for our own trunk:
    that `Transformer.from_pretrained` loads). Raises WeightsError where their classes cannot compute what ours does."""
    c, weights, folder = model.config, model.state_dict(), Path(folder)
    ids = {t["content"]: t["id"] for t in json.loads(tokenizer_json).get("added_tokens", ())}
    roles = {role: next((t for t in names if t in ids), None) for role, names in (
        ("pad_token", ("[PAD]", "<pad>", "<|endoftext|>")), ("unk_token", ("[UNK]", "<unk>", "<|endoftext|>")),
        ("cls_token", ("[CLS]", "<s>")), ("sep_token", ("[SEP]", "</s>")), ("mask_token", ("[MASK]", "<mask>")),
        ("bos_token", ("<s>", "<|endoftext|>")), ("eos_token", ("</s>", "<|endoftext|>")))}
    roles = {k: v for k, v in roles.items() if v}
    config = {"model_type": "textcls", "model_config": vars(c)}
    if c.family == "vit" or c.model != "transformer":
        raise WeightsError(f"a {c.model if c.family == 'ours' else 'vit'} model cannot be written as a Hugging Face folder")
    if c.family != "ours":
        if c.pooling != {"gpt2": "last"}.get(c.family, c.pooling if c.family == "modernbert" else "cls") \
                or c.pooling not in ("cls", "mean", "last"):
            raise WeightsError(f"transformers' {c.family} classifier cannot pool by {c.pooling}: "
                               "fine-tune with --pooling=None to export it")
        config = {"model_type": c.family, "vocab_size": c.vocab_size,
                  "pad_token_id": ids.get(roles.get("pad_token"), 0)}
        stem = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "modernbert": "ModernBert", "gpt2": "GPT2"}
        config["architectures"] = [stem[c.family] + "ForSequenceClassification"]
    if c.family in ("bert", "roberta", "modernbert"):
        config |= {"num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "hidden_size": c.d_model,
                   "intermediate_size": c.d_ff, "max_position_embeddings": c.max_len}
    if c.family in ("bert", "roberta"):
        config |= {"hidden_act": "gelu", "layer_norm_eps": c.norm_eps, "type_vocab_size": c.n_segments,
                   "hidden_dropout_prob": c.dropout, "classifier_dropout": c.head_dropout}
    if c.family == "roberta":  # positions begin behind the padding's
        offset = config["pad_token_id"] + 1
        config["max_position_embeddings"] += offset
        w = weights["position.weight"]
        weights["position.weight"] = torch.cat((w.new_zeros(offset, c.d_model), w))
    if c.family == "distilbert":
        config |= {"n_layers": c.n_layer, "n_heads": c.n_head, "dim": c.d_model, "hidden_dim": c.d_ff, "activation": "gelu",
                   "max_position_embeddings": c.max_len, "dropout": c.dropout, "seq_classif_dropout": c.head_dropout}
    if c.family == "modernbert":
        config |= {"local_attention": 2 * c.window, "layer_types": [
            "sliding_attention" if i % c.global_every else "full_attention" for i in range(c.n_layer)],
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": c.rope_theta},
                                "sliding_attention": {"rope_type": "default", "rope_theta": c.window_rope_theta}},
            "attention_bias": c.bias, "mlp_bias": c.bias, "norm_eps": c.norm_eps, "classifier_pooling": c.pooling,
            "classifier_bias": c.head_dense_bias, "classifier_dropout": c.head_dropout}
    if c.family == "gpt2":
        config |= {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.d_model, "n_inner": c.d_ff,
                   "n_positions": c.max_len, "layer_norm_epsilon": c.norm_eps, "resid_pdrop": c.dropout}
    config |= {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    config |= {"problem_type": "multi_label_classification"} if multilabel else {}
    if c.family != "ours":
        theirs = {}
        for key, w in weights.items():
            names = hf_names(key, c.family)
            parts = (w.T if transposed(key, c.family) else w).chunk(len(names))
            theirs |= {n: part.contiguous() for n, part in zip(names, parts)}
        weights = theirs
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.max_len} | roles, indent=1))
    save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
