"""Faster paths for CPUs. Each computes what a plain twin computes; nothing here is needed.

| fast path                         | its plain twin           | gain, whole step                 |
|-----------------------------------|--------------------------|----------------------------------|
| attend: documents of like length  | pad to the longest       | 1.5 config/textcls.py,           |
|                                   |                          | 1.9 fine-tuning on TREC          |
| CausalAttention in bfloat16       | the kernel in bfloat16   | 1.5 config/shakespeare_char.py   |
| attend_without_gradient           | the kernel in bfloat16   | 1.1 labelling SST-2              |
| GatherRows                        | x[index]                 | 1.1 config/textcls.py            |
| dropout                           | F.dropout                | 1.2 textcls with dropout 0.1     |
| rms_norm                          | F.rms_norm               | 1.04 textcls, shakespeare_char   |
| embedding_bag_sum                 | F.embedding_bag          | 2.8 config/bow.py                |
| PackedLinear in bfloat16          | nn.Linear in bfloat16    | 1.1 labelling SST-2              |
| PackedLinear in int8              | nn.Linear in float32     | 3.0 labelling, 1.6 without VNNI  |
| keep_freed_memory                 | –                        | 1.1 config/imagecls.py           |

`handles` and `attends` say where the fast paths are taken. Each is compared with its twin, values
and gradients, in tests/test_cpu_paths_equal_plain_paths.py. NOTES.md says how gains were measured.
"""
import ctypes
import functools
import itertools
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def handles(x):
    """Is x a tensor for the fast paths? torch.compile makes its own of the plain ones."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# --------------------------------------------------------------------------------------------------
# Attention by length: documents of like length together, instead of padding to the longest

MAX_WASTE = 64  # padded tokens that cost as much as one more call of the kernel (2 cores)


def attends(qkv, layout):
    """Does `attend` take these? Padded text (for exports) and kept keys are left to the plain path.
    """
    return qkv.device.type == "cpu" and layout.valid is None and not layout.cached


def attend(qkv, layout, causal, window, first_only):
    """model.attend: qkv (T, 3, H, d) → (T, H, d), or with first_only (B, H, d)."""
    if first_only and (causal or window):
        return attend(qkv, layout, causal, window, False)[layout.first]
    if qkv.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        runs = [layout.shape] if layout.same_length else layout.on_cpu.runs
        if all(L <= 1024 for _, L in runs):  # the scores of longer documents need much memory
            y = attend_without_gradient(qkv, runs, causal, window, first_only)
            if first_only and not layout.same_length:  # empty documents are in no run
                y = y[((layout.lengths > 0).cumsum(0) - 1).clamp(min=0)]
            return y
    if layout.same_length:
        return attend_block(qkv, layout.shape[0], None, causal, window, first_only)
    groups = layout.on_cpu.groups
    none = groups.padding[:0]
    padded = GatherRows.apply(qkv, groups.token, groups.row, none)  # (P, 3, H, d)
    parts = []
    for (B, L, valid), block in zip(groups.blocks, padded.split(groups.sizes)):
        if causal:
            valid = None  # padding stands behind every token that could see it
        reach = window if L > window + 1 else 0  # a window wider than the block needs no mask
        parts.append(attend_block(block, B, valid, causal, reach, first_only))
    y = torch.cat(parts)
    if first_only:
        return y[groups.order]
    return GatherRows.apply(y, groups.row, groups.token, groups.padding)


class DocumentLengths:
    """The lengths of a packed batch's documents as Python ints, and what follows from them."""

    def __init__(self, cu_seqlens):
        bounds = cu_seqlens.tolist()
        self.starts = bounds[:-1]
        self.lengths = [end - start for start, end in itertools.pairwise(bounds)]

    @functools.cached_property
    def runs(self):
        """[(B, L), ...]: B documents of length L follow each other; without empty ones."""
        return [(len(list(same)), L) for L, same in itertools.groupby(self.lengths) if L]

    @functools.cached_property
    def groups(self):
        return LengthGroups(self.starts, self.lengths)


class LengthGroups:
    """Documents of like length, padded to blocks (B, L) of tokens; P tokens in all blocks.

    token (P,): the token at each row of the blocks (0 at padding). row (T,): the row of each token.
    padding: the rows that are padding. blocks: [(B, L, valid), ...], valid (B, L) False at padding,
    or None. sizes: B·L of each. order: each document's index among those of all blocks (0 for empty
    ones).
    """

    def __init__(self, starts, lengths):
        members = self.assign(lengths)
        tokens, masks, self.blocks = [], [], []
        for documents in members:
            B = len(documents)
            L = lengths[documents[0]]
            valid = np.arange(L) < np.array([lengths[d] for d in documents])[:, None]
            token = np.array([starts[d] for d in documents])[:, None] + np.arange(L)
            tokens.append(np.where(valid, token, 0).ravel())
            masks.append(valid.ravel())
            self.blocks.append((B, L, None if valid.all() else torch.from_numpy(valid)))
        self.sizes = [B * L for B, L, _ in self.blocks]
        token, is_token = np.concatenate(tokens), np.concatenate(masks)
        row = np.empty(is_token.sum(), np.int64)
        row[token[is_token]] = np.flatnonzero(is_token)
        order = np.zeros(len(lengths), np.int64)
        documents = [d for block in members for d in block]
        order[documents] = np.arange(len(documents))
        self.token, self.row, self.order = map(torch.from_numpy, (token, row, order))
        self.padding = torch.from_numpy(np.flatnonzero(~is_token))

    @staticmethod
    def assign(lengths):
        """Lists of documents, longest first, each with at most MAX_WASTE tokens of padding."""
        members, waste = [], MAX_WASTE
        for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
            if not lengths[d]:
                continue
            if members:
                waste += lengths[members[-1][0]] - lengths[d]
            if waste >= MAX_WASTE:
                members.append([])
                waste = 0
            members[-1].append(d)
        return members


class GatherRows(torch.autograd.Function):
    """x[index], where `inverse` scatters the gradient back; rows `unused` get none.

    The backward pass of plain indexing cannot know the inverse, and adds row to row instead."""

    @staticmethod
    def forward(ctx, x, index, inverse, unused):
        ctx.inverse, ctx.unused = inverse, unused
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.inverse).index_fill_(0, ctx.unused, 0)
        return grad, None, None, None


def attend_block(qkv, B, valid, causal, window, first_only):
    """B documents padded to L tokens: qkv (B·L, 3, H, d) → (B·L, H, d), or (B, H, d)."""
    *_, H, d = qkv.shape
    L = qkv.shape[0] // B  # as a number of its own it would spoil inductor's cache (NOTES.md)
    if qkv.dtype == torch.bfloat16 and causal and not window and L <= 256:
        return CausalAttention.apply(qkv, L)
    # In float32: the backward pass of the bfloat16 kernel is many times slower on CPUs.
    exact = qkv.float() if qkv.dtype == torch.bfloat16 else qkv
    q, k, v = exact.view(B, L, 3, H, d).permute(2, 0, 3, 1, 4)
    mask = None
    if valid is not None or window:
        index = torch.arange(L)
        distance = index[:, None] - index
        mask = torch.ones_like(index, dtype=torch.bool) if valid is None else valid[:, None, None]
        if causal:
            mask = mask & (distance >= 0)
        if window:
            mask = mask & (distance.abs() <= window) | (distance == 0)
    if first_only:
        q = q[:, :, :1]
    is_causal = causal and mask is None
    with torch.autocast("cpu", enabled=False):  # which would make it bfloat16 again
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
    return y.transpose(1, 2).reshape(-1, H, d).to(qkv.dtype)


class CausalAttention(torch.autograd.Function):
    """Causal attention in bfloat16 over documents of L tokens: qkv (T, 3, H, d) → (T, H, d)."""

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
        q, k, v, p = ctx.saved_tensors
        T, H, d = grad.shape
        L = q.shape[1]
        grad = grad.view(-1, L, H, d).transpose(1, 2).reshape(-1, L, d)
        grad_scores = torch._softmax_backward_data(grad @ v.mT, p, -1, p.dtype) * d**-0.5
        grads = torch.stack((grad_scores @ k, grad_scores.mT @ q, p.mT @ grad))  # (3, B·H, L, d)
        return grads.view(3, -1, H, L, d).permute(1, 3, 0, 2, 4).reshape(T, 3, H, d), None


def attend_without_gradient(qkv, runs, causal, window, first_only):
    """Attention in bfloat16 as two products around a float32 softmax, for prediction.

    Nothing is padded or moved: documents of one length that follow each other are one product."""
    _, _, H, d = qkv.shape
    parts = []
    for (B, L), block in zip(runs, qkv.split([B * L for B, L in runs])):
        q, k, v = block.view(B, L, 3, H, d).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        if first_only:
            q = q[:, :, :1]
        scores = q * d**-0.5 @ k.mT  # (B, H, L, L)
        if causal or window:
            distance = torch.arange(L)[:, None] - torch.arange(L)
            hidden = distance.abs() > (window or L)
            if causal:
                hidden = hidden | (distance < 0)
            scores = scores.masked_fill(hidden, -math.inf)
        if L >= 16 or first_only:
            p = scores.softmax(-1, torch.float32)
        else:  # the kernel is slow along short rows
            p = scores.mT.contiguous().softmax(-2, torch.float32).mT
        parts.append((p.to(q.dtype) @ v).transpose(1, 2).reshape(-1, H, d))
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# Dropout, norm, sums of embeddings


def dropout(x, p, training):
    """F.dropout with 16 random bits an element; torch draws 64."""
    if not training or not p:
        return x
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    threshold = min(round(p * 2**16), 2**16 - 1)
    kept = (bits >= threshold - 2**15).to(x.dtype)
    return x * (kept * (2**16 / (2**16 - threshold)))


def rms_norm(x, weight=None, eps=None):
    """F.rms_norm over the last dimension."""
    if eps is None:  # as F.rms_norm has it
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return RMSNorm.apply(x, weight, eps)


class RMSNorm(torch.autograd.Function):
    """torch makes this of a dozen operations on CPUs, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        inverse = (norm.square() / x.shape[-1] + eps).rsqrt()
        y = x * inverse
        ctx.save_for_backward(y, weight, inverse)
        ctx.dtype = x.dtype
        if weight is None:
            return y.to(x.dtype)
        return (y * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, weight, inverse = ctx.saved_tensors
        grad_y, grad_weight = grad, None
        if weight is not None:
            grad_y = grad * weight
            grad_weight = (grad * y).flatten(0, -2).sum(0)
        grad_x = (grad_y - y * (grad_y * y).mean(-1, keepdim=True)) * inverse
        return grad_x.to(ctx.dtype), grad_weight, None


def embedding_bag_sum(weight, rows, count, sparse):
    """Sums of rows of `weight` (V, D): the first count[0] of `rows` (N,), the next count[1], …:
    → (len(count), D)."""
    return EmbeddingBagSum.apply(weight, rows, count, sparse)


class EmbeddingBagSum(torch.autograd.Function):
    """F.embedding_bag, whose own sparse gradient torch coalesces and adds up row by row."""

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
        used, inverse = rows.unique(return_inverse=True)
        values = grad.new_zeros(len(used), grad.shape[1]).index_add_(0, inverse, grad)
        grad = torch.sparse_coo_tensor(used[None], values, ctx.shape, is_coalesced=True,
                                       check_invariants=False)
        return grad, None, None, None


# --------------------------------------------------------------------------------------------------
# Low precision for prediction


class PackedLinear(nn.Module):
    """nn.Linear for prediction, with the weight laid out as oneDNN reads it.

    dtype: torch.bfloat16, or torch.int8 (weights scaled row by row, inputs batch by batch).
    gelu: "none" or "tanh" to apply GELU (with that approximation) on the way out, "" for no GELU.
    """

    def __init__(self, linear, dtype, gelu):
        super().__init__()
        self.int8 = dtype == torch.int8
        self.activation = ("gelu" if gelu else "none", [], gelu)
        weight = linear.weight.detach()
        self.bias = None
        if linear.bias is not None:
            self.bias = linear.bias.detach()
        if self.int8:
            self.scale = weight.abs().amax(1).clamp(min=1e-12) / 127
            self.zero = torch.zeros(len(weight), dtype=torch.int64)
            # without VNNI two products are added in 16 bits, which hold 2 · 127 · 127 at most
            self.levels = 255 if torch.cpu._is_vnni_supported() else 127
            quantized = (weight / self.scale[:, None]).round().to(dtype)
            self.packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        else:
            usual_rows = 2048
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), usual_rows)
            if self.bias is not None:
                self.bias = self.bias.to(dtype)

    def forward(self, x):
        if not self.int8:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.activation)
        low, high = (float(v) for v in torch.aminmax(x))
        scale = max(max(high, 0.0) - min(low, 0.0), 1e-12) / self.levels
        zero = round(-min(low, 0.0) / scale)
        quantized = x.float().div(scale).add_(zero + 0.5).clamp_(max=self.levels).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            quantized, scale, zero, self.packed, self.scale, self.zero, self.bias, 1.0, 0, x.dtype,
            *self.activation)


@torch.no_grad()
def quantize_for_inference(model, dtype, bfloat16):
    """Make a Transformer of text one that only predicts, in place.

    dtype: of the blocks' matrices, torch.bfloat16 or torch.int8. bfloat16: whether the rest is in
    bfloat16, too (the head stays in float32).
    """
    gelu = {"gelu": "none", "gelu_tanh": "tanh"}.get(model.config.mlp, "")
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        attention.qkv = PackedLinear(attention.qkv, dtype, "")
        attention.out = PackedLinear(attention.out, dtype, "")
        mlp.up = PackedLinear(mlp.up, dtype, gelu)
        mlp.out = PackedLinear(mlp.out, dtype, "")
        if gelu:
            mlp.activation = nn.Identity()  # done by `up`
    for name, p in model.named_parameters():
        if bfloat16 and not name.startswith(("dense", "head")):
            p.data = p.data.bfloat16()


# --------------------------------------------------------------------------------------------------
# Memory


def keep_freed_memory():
    """Tell glibc to keep freed memory, which the next step needs again: a page's first touch costs
    1-2 µs. Whoever sets its threshold in the environment, to need less memory, has decided."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
