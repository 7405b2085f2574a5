"""The transformer, for text and images. It stands alone: it needs no data set and no config file.

    model = Transformer(ModelConfig(vocab_size=8192, n_classes=5))
    logits = model(tokens, cu_seqlens)         # (T,) int64, (B+1,) int32 → (B, n_classes)
    hidden = model.hidden(tokens, cu_seqlens)  # (T, d_model)

    model = Transformer(ModelConfig(image_size=(1, 28, 28), patch=4, n_classes=10))
    logits = model(pixels)                     # (B, C, H, W) uint8 or float → (B, n_classes)

    model = Transformer(ModelConfig(vocab_size=258, lm_head="own", causal=True))
    logits = model(tokens, cu_seqlens)         # (T, vocab_size)

The default trunk: pre-norm RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021),
QK-norm (Dehghani et al. 2023), no biases, and output projections and head that begin at zero. So
each block begins as the identity, and the first loss is log(n_classes) exactly. The published
trunks are other values of the same ModelConfig.

A batch of text is packed: one row of T tokens, with cu_seqlens marking where each document starts.
Everything but attention works on (T, D), so nothing is computed for padding. Only attention knows
about documents. B: documents, T: tokens, D: d_model, H: heads, d = D / H, L: tokens of a document.

Each operation has one plain path here. The lines that call `cpu` hand it to a faster one on CPUs.
They are optional: what follows them computes the same.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cpu


@dataclass
class ModelConfig:
    model: str = "transformer"  # transformer, mlp, linear
    vocab_size: int = 0  # of text
    n_features: int = 0  # of rows of numbers
    image_size: tuple = ()  # (channels, height, width) of images
    patch: int = 4  # images: side of the squares that are its tokens
    n_classes: int = 0  # outputs; 0: no classification head
    lm_head: str = ""  # of a language model, instead of n_classes: own, or tied to the embedding
    max_len: int = 512  # tokens of the longest document
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 128
    d_ff: int = 512
    mlp: str = "relu2"  # relu2 (So et al. 2021), gelu, gelu_tanh, swiglu, geglu (Shazeer 2020)
    qk_norm: bool = True
    causal: bool = False
    checkpoint_activations: bool = False  # recompute blocks in backward: less memory, 1/3 more time
    pooling: str = "mean"  # mean, max, cls (first token), last
    dropout: float = 0.0  # after the embedding, attention and MLP
    rope_theta: float = 10000.0
    # the linear model of text (baselines.py)
    ngrams: int = 3  # runs of up to this many words are features
    char_ngrams: int = 0  # and runs of up to this many bytes
    letters: tuple = ()  # tokens of the bytes that words consist of
    blanks: tuple = ()  # tokens of the bytes that separate words
    buckets: int = 2**18  # rows that n-grams are hashed to
    # what the published trunks need
    family: str = "ours"  # ours, or one of huggingface.FAMILIES
    position: str = "rope"  # rope, learned
    n_segments: int = 0  # BERT's token types: 1 for the second of two texts
    norm: str = "rms"  # rms, layer
    norm_eps: float | None = None
    norm_bias: bool = False
    post_norm: bool = False  # normalise after adding to the residual stream, as BERT does
    embedding_norm: bool = False
    first_norm: bool = True  # False: the first block's attention has no norm (ModernBERT)
    bias: bool = False  # in the linear layers of blocks
    window: int = 0  # attention reaches this many tokens to either side; 0: everywhere
    global_every: int = 1  # with a window: every so many blocks, from the first on, have none
    window_rope_theta: float = 10000.0  # rope_theta of blocks with a window
    normalize: bool = False  # pooled vectors get the length √d_model
    head_dense: str | None = None  # a layer between pooling and head, then tanh, relu or gelu
    head_dense_bias: bool = True
    head_norm: bool = False  # and a norm
    head_bias: bool = False
    head_dropout: float = 0.0
    cls_token: bool = False  # images: a learned first token
    pixel_mean: float = 0.5  # of pixels as 0..1
    pixel_std: float = 0.5

    @property
    def n_positions(self):
        """Tokens of the longest example: patches of an image, else max_len."""
        if not self.image_size:
            return self.max_len
        _, height, width = self.image_size
        return height // self.patch * (width // self.patch) + self.cls_token


# --------------------------------------------------------------------------------------------------
# Layouts: where the documents of a batch are. Made once per batch, used by every layer.


class PackedLayout:
    """Documents of any lengths, end to end.

    cu_seqlens (B+1,) int32; lengths (B,); document (T,): each token's document; position (T,): its
    index in that document; first, last (B,): the index of each document's first and last token
    (arbitrary for empty documents); segments (T,): BERT's token types, None where all are 0.
    """
    same_length, valid, cached = False, None, False

    def __init__(self, cu_seqlens, n_tokens, max_len, segments=None):
        self.cu_seqlens, self.max_len, self.segments = cu_seqlens, max_len, segments
        self.lengths = cu_seqlens.diff()
        self.first = cu_seqlens[:-1].clamp(max=n_tokens - 1)
        self.last = (cu_seqlens[1:] - 1).clamp(min=0)
        token = torch.arange(n_tokens, device=cu_seqlens.device)
        self.document = torch.bucketize(token, cu_seqlens[1:], right=True)
        self.position = token - cu_seqlens[self.document]

    @functools.cached_property
    def on_cpu(self):
        return cpu.DocumentLengths(self.cu_seqlens)  # what the fast paths need, once per batch

    def add_positions(self, x, table):
        return x + table(self.position)

    def pool(self, x, pooling):
        """The mean or max of each document's rows: x (T, D) → (B, D); 0 for empty documents."""
        B = len(self.lengths)
        D = x.shape[-1]
        if pooling == "max":
            index = self.document[:, None].expand_as(x)
            largest = x.new_full((B, D), -math.inf).scatter_reduce(0, index, x, "amax")
            return largest.where(self.lengths[:, None] > 0, 0)  # not −inf, whose gradient is NaN
        total = x.new_zeros(B, D).index_add(0, self.document, x)
        return total / self.lengths.clamp(min=1)[:, None]

    def pad(self, qkv):
        """(T, 3, H, d) → q, k, v, each (B, H, L, d), and which keys are tokens, (B, L)."""
        B = len(self.lengths)
        L = int(self.lengths.max())
        padded = qkv.new_zeros(B, L, *qkv.shape[1:])
        padded = padded.index_put((self.document, self.position), qkv)
        valid = torch.arange(L, device=qkv.device) < self.lengths[:, None]
        return *padded.permute(2, 0, 3, 1, 4), valid

    def unpad(self, y):
        """(B, H, L, d) → (T, H, d)."""
        return y.transpose(1, 2)[self.document, self.position]


class DenseLayout:
    """B documents of L tokens each, flattened to (B·L, D): a language model's blocks, the patches
    of images, and, with valid (B, L), False at padding, padded text (for exports)."""
    same_length, segments, cached = True, None, False

    def __init__(self, B, L, device, valid=None):
        self.shape = (B, L)
        self.valid = valid
        self.index = torch.arange(L, device=device)
        self.position = self.index.repeat(B)
        self.first = torch.arange(B, device=device) * L
        self.last = self.first + (L if valid is None else valid.sum(1)) - 1

    def add_positions(self, x, table):
        x = x.view(*self.shape, -1)  # broadcasting: faster in backward than a table row per token
        return (x + table(self.index)).flatten(0, 1)

    def pool(self, x, pooling):
        """The mean or max of each document's rows: x (B·L, D) → (B, D)."""
        x = x.view(*self.shape, -1)
        if self.valid is None:
            return x.amax(1) if pooling == "max" else x.mean(1)
        valid = self.valid[..., None]
        if pooling == "max":
            return x.masked_fill(~valid, torch.finfo(x.dtype).min).amax(1)
        return (x * valid).sum(1) / valid.sum(1)

    def pad(self, qkv):
        """(B·L, 3, H, d) → q, k, v, each (B, H, L, d), and which keys are tokens, (B, L)."""
        return *qkv.unflatten(0, self.shape).permute(2, 0, 3, 1, 4), self.valid

    def unpad(self, y):
        """(B, H, L, d) → (B·L, H, d)."""
        return y.transpose(1, 2).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# Operations


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(qkv, layout, causal=False, window=0, first_only=False):
    """Attention within each document: qkv (T, 3, H, d) → (T, H, d).

    window: how many tokens it reaches to either side; 0: all. first_only: only the first token of
    each document asks: → (B, H, d), undefined for empty documents.
    """
    if cpu.attends(qkv, layout):  # optional: what follows computes the same
        return cpu.attend(qkv, layout, causal, window, first_only)
    if qkv.is_cuda and not layout.same_length and qkv.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn
        reach = (window or -1, 0 if causal else window or -1)  # to the left, to the right
        y = varlen_attn(*qkv.unbind(1), layout.cu_seqlens, layout.cu_seqlens,
                        layout.max_len, layout.max_len, window_size=reach)
    else:
        q, k, v, valid = layout.pad(qkv)
        mask = attention_mask(valid, q.shape[2], k.shape[2], causal, window, q.device)
        is_causal = causal and mask is None and q.shape[2] > 1  # a single query sees all keys
        y = layout.unpad(F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal))
    return y[layout.first] if first_only else y


def attention_mask(valid, L, S, causal, window, device):
    """Which of S keys each of the last L queries sees: bool (B or 1, 1, L or 1, S), or None where
    the kernel's is_causal is enough. valid (B, S): False at padding; None: there is none."""
    if valid is None and not window:
        return None
    index = torch.arange(S, device=device)
    distance = index[S - L :, None] - index
    mask = torch.ones(1, 1, 1, S, dtype=torch.bool, device=device)
    if valid is not None:
        mask = valid[:, None, None]
    if causal:
        mask = mask & (distance >= 0)
    if window:
        mask = mask & (distance.abs() <= window)
    return mask | (distance == 0)  # a query that sees nothing would be NaN


def dropout(x, p, training):
    if cpu.handles(x):
        return cpu.dropout(x, p, training)  # optional, too
    return F.dropout(x, p, training)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x, weight=None, eps=None):
    """Divide the last dimension by its root mean square. eps None: float32's machine epsilon."""
    if cpu.handles(x):
        return cpu.rms_norm(x, weight, eps)  # optional, too
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def make_norm(c):
    if c.norm == "rms":
        return RMSNorm(c.d_model, eps=c.norm_eps)
    return nn.LayerNorm(c.d_model, eps=c.norm_eps or 1e-5, bias=c.norm_bias)


def apply_rope(x, cos, sin):
    """Rotary position embedding: x (T, 2, H, d) with cos, sin (T, 1, 1, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_table(c, theta):
    """cos and sin of the angle of each position and pair of dimensions: (2, n_positions, d/2).

    In images half the pairs turn with a patch's row, half with its column (axial; Heo et al. 2024).
    """
    if c.image_size:
        _, H, W = c.image_size
        patches = torch.cartesian_prod(torch.arange(H // c.patch), torch.arange(W // c.patch))
        # (d/4,); 100 and not 10,000, as images have few rows and columns
        frequency = 100.0 ** -torch.arange(0, 1, 4 * c.n_head / c.d_model)
        angle = (patches[:, :, None] * frequency).flatten(1)
    else:
        frequency = theta ** -torch.arange(0, 1, 2 * c.n_head / c.d_model)  # (d/2,)
        angle = torch.outer(torch.arange(c.max_len), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def patchify(x, p):
    """Images as rows of patches: (B, C, H, W) → (B, H/p · W/p, C·p·p)."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, H // p * (W // p), C * p * p)


# --------------------------------------------------------------------------------------------------
# The transformer


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.causal, self.qk_norm = c.n_head, c.causal, c.qk_norm
        self.window = c.window if layer % c.global_every else 0
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model, bias=c.bias)
        self.out = nn.Linear(c.d_model, c.d_model, bias=c.bias)

    def forward(self, x, layout, rope, rows=None, first_only=False):
        T, D = x.shape
        qkv = self.qkv(x).view(T, 3, self.n_head, D // self.n_head)
        if self.qk_norm or rope is not None:
            qk, v = qkv.split((2, 1), 1)  # (T, 2, H, d), (T, 1, H, d)
            if self.qk_norm:
                qk = rms_norm(qk)
            if rope is not None:
                qk = apply_rope(qk, *rope)
            qkv = torch.cat((qk.to(v.dtype), v), 1)  # CUDA's autocast makes norms float32
        y = attend(qkv, layout, self.causal, self.window, first_only).flatten(1)
        if rows is not None and not first_only:
            y = y[rows]
        return self.out(y)


class FeedForward(nn.Module):
    ACTIVATIONS = {
        "relu2": lambda x: F.relu(x).square(), "gelu": F.gelu, "swiglu": F.silu, "geglu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}

    def __init__(self, c):
        super().__init__()
        self.gated = c.mlp.endswith("glu")
        self.activation = self.ACTIVATIONS[c.mlp]
        self.up = nn.Linear(c.d_model, c.d_ff * (2 if self.gated else 1), bias=c.bias)
        self.out = nn.Linear(c.d_ff, c.d_model, bias=c.bias)

    def forward(self, x):
        x = self.up(x)
        if not self.gated:
            return self.out(self.activation(x))
        gate, x = x.chunk(2, dim=-1)
        return self.out(self.activation(gate) * x)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm1 = make_norm(c) if c.first_norm or layer else nn.Identity()
        self.attention = Attention(c, layer)
        self.norm2 = make_norm(c)
        self.mlp = FeedForward(c)
        self.dropout, self.post_norm = c.dropout, c.post_norm

    def forward(self, x, layout, rope, rows=None, first_only=False):
        """(T, D) → (T, D). If only some rows are needed, the last block is given their indices,
        rows (M,), and returns (M, D). first_only: these are the first tokens of all documents,
        which allows cheaper attention."""
        normed = x if self.post_norm else self.norm1(x)
        y = self.drop(self.attention(normed, layout, rope, rows, first_only))
        x = y + (x if rows is None else x[rows])
        if self.post_norm:
            x = self.norm1(x)
            return self.norm2(x + self.drop(self.mlp(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x):
        return dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """`config` → a model with fresh weights, drawn from torch's global generator."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.image_size:
            self.embedding = nn.Linear(c.image_size[0] * c.patch**2, c.d_model)
        else:
            self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.cls = nn.Parameter(torch.zeros(c.d_model)) if c.cls_token else None
        learned = c.position == "learned"
        self.position = nn.Embedding(c.n_positions, c.d_model) if learned else None
        self.segment = nn.Embedding(c.n_segments, c.d_model) if c.n_segments else None
        self.embedding_norm = make_norm(c) if c.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = nn.Identity() if c.post_norm else make_norm(c)
        self.dense = None
        self.dense_norm = nn.Identity()
        self.head = None
        self.lm_head = None
        if c.n_classes and c.head_dense:
            self.dense = nn.Linear(c.d_model, c.d_model, bias=c.head_dense_bias)
        if c.n_classes and c.head_norm:
            self.dense_norm = make_norm(c)
        if c.n_classes:
            self.head = nn.Linear(c.d_model, c.n_classes, bias=c.head_bias)
        if c.lm_head == "own":
            self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.position == "rope":
            self.register_buffer("rope", rope_table(c, c.rope_theta), persistent=False)
            window_rope = rope_table(c, c.window_rope_theta)
            self.register_buffer("window_rope", window_rope, persistent=False)
        self.initialise()

    def initialise(self):
        """Weights at the start, by kind; norms begin at one.

            biases                                zero
            ours: head, output projections        zero
            ours: other matrices of blocks, and   normal, std 1/√(inputs)
                  the embedding of patches
            everything else                       normal, std 0.02
        """
        c = self.config
        ours = c.family == "ours"
        for name, p in self.named_parameters():
            if name.endswith("bias") or ours and name.endswith(("head.weight", "out.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                patches = c.image_size and name == "embedding.weight"
                scaled = ours and (name.startswith("blocks") or patches)
                nn.init.normal_(p, std=p.shape[1] ** -0.5 if scaled else 0.02)

    def embed(self, inputs, cu_seqlens=None, length=None, segments=None):
        """Text, (T,) tokens, or images, (B, C, H, W) pixels of 0..255 → ((T, D), their layout)."""
        c = self.config
        if c.image_size:
            pixels = (at_least_float32(inputs) / 255 - c.pixel_mean) / c.pixel_std
            x = self.embedding(patchify(pixels, c.patch))  # (B, N, D)
            if self.cls is not None:
                x = torch.cat((self.cls.expand(x.shape[0], 1, -1).to(x.dtype), x), 1)
            return x.flatten(0, 1), DenseLayout(*x.shape[:2], x.device)
        x = self.embedding(inputs)
        if length is not None:
            return x, DenseLayout(len(inputs) // length, length, inputs.device)
        return x, PackedLayout(cu_seqlens, len(inputs), c.max_len, segments)

    def trunk(self, x, layout, rows=None, first_only=False):
        """All blocks: x (T, D) → (T, D), or with rows (B,), only these rows: (B, D)."""
        c = self.config
        rope = window_rope = None
        if c.position == "rope":
            rope = self.rope[:, layout.position, None, None]  # cos, sin: (2, T, 1, 1, d/2)
            window_rope = self.window_rope[:, layout.position, None, None]
        if self.position is not None:
            x = layout.add_positions(x, self.position)
        if self.segment is not None and layout.segments is not None:
            x = x + self.segment(layout.segments)
        elif self.segment is not None:
            x = x + self.segment.weight[0]
        x = dropout(self.embedding_norm(x), c.dropout, self.training)
        for i, block in enumerate(self.blocks):
            arguments = x, layout, window_rope if block.attention.window else rope
            if i == len(self.blocks) - 1:
                arguments += rows, first_only
            if c.checkpoint_activations and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        if rows is not None and not self.blocks:
            x = x[rows]
        return self.norm(x)

    def hidden(self, inputs, cu_seqlens=None, length=None):
        """(T, d_model): every token's vector after the last norm."""
        return self.trunk(*self.embed(inputs, cu_seqlens, length))

    def forward(self, inputs, cu_seqlens=None, length=None, query_index=None, segments=None):
        """Logits (B, n_classes), float32; of a language model (T, vocab_size).

        inputs: text (T,) int64, packed by cu_seqlens (B+1,) int32, or documents of one `length`
        each; or images (B, C, H, W). query_index (M,): of a language model, only the logits of
        these tokens, (M, vocab_size). segments (T,): 0 and 1, of pairs of texts.
        """
        x, layout = self.embed(inputs, cu_seqlens, length, segments)
        if not self.config.lm_head:
            return self.classify(x, layout)
        x = self.trunk(x, layout, query_index)
        return F.linear(x, (self.lm_head or self.embedding).weight)

    def vectors(self, inputs, cu_seqlens=None, length=None, query_index=None, segments=None):
        """(B, d_model) float32: one vector for each example, as the head gets it."""
        return self.pool(*self.embed(inputs, cu_seqlens, length, segments))

    def pool(self, x, layout):
        """Trunk and pooling: embedded tokens (T, D) → (B, D), float32."""
        pooling = self.config.pooling
        if pooling == "cls":
            x = self.trunk(x, layout, layout.first, first_only=True)
        elif pooling == "last":
            x = self.trunk(x, layout, layout.last)
        else:
            x = self.trunk(x, layout)
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            if pooling in ("mean", "max"):
                x = layout.pool(x, pooling)
            return rms_norm(x) if self.config.normalize else x

    def classify(self, x, layout):
        """Embedded tokens (T, D) → logits (B, n_classes)."""
        x = self.pool(x, layout)
        with torch.autocast(x.device.type, enabled=False):
            return self.classify_pooled(x)

    def classify_pooled(self, x):
        """The head: (B, D) → (B, n_classes)."""
        c = self.config
        if self.dense is not None:
            activation = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}[c.head_dense]
            x = activation(self.dense(x))
        return self.head(dropout(self.dense_norm(x), c.head_dropout, self.training))


def flops_per_token(model, length):
    """Floating-point operations of a forward and backward pass per token.

    6 for each weight of a matrix, and 12·length·d_model a layer for attention in documents of
    `length` tokens (Chowdhery et al. 2022, appendix B). Of an MLP or linear model: per example.
    """
    c = model.config
    weights = 0
    for name, p in model.named_parameters():
        looked_up = c.vocab_size and "embedding" in name and c.lm_head != "tied"
        if p.ndim == 2 and not looked_up:
            weights += p.numel()
    attention = 0
    if c.model == "transformer":
        attention = 12 * c.n_layer * length * c.d_model / (2 if c.causal else 1)
    return 6 * weights + attention
