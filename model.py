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
from dataclasses import dataclass, field

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
    n_kv_head: int = 0  # heads of keys and values, each for a group of queries (Ainslie et al.
    #   2023); 0: n_head
    head_dim: int = 0  # 0: d_model / n_head
    d_model: int = 128
    d_ff: int = 512
    mlp: str = "relu2"  # a key of FeedForward.ACTIVATIONS
    qk_norm: bool = True
    causal: bool = False
    checkpoint_activations: bool = False  # recompute blocks in backward: less memory, 1/3 more time
    pooling: str = "mean"  # mean, max, cls (first token), last; of images cls+mean, side by side
    dropout: float = 0.0  # after the embedding, attention and MLP
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # how it is stretched for longer texts: a key
    #   of ROPE_SCALINGS as rope_type, and what that needs
    # the linear model of text (baselines.py)
    ngrams: int = 3  # runs of up to this many words are features
    char_ngrams: int = 0  # and runs of up to this many bytes
    letters: tuple = ()  # tokens of the bytes that words consist of
    blanks: tuple = ()  # tokens of the bytes that separate words
    buckets: int = 2**18  # rows that n-grams are hashed to
    # what the published trunks need
    family: str = "ours"  # ours, or one of families.FAMILIES
    position: str = "rope"  # rope, learned
    d_embedding: int = 0  # of tokens, if a layer then brings them to d_model (ELECTRA)
    embedding_scale: float = 1.0
    n_segments: int = 0  # BERT's token types: 1 for the second of two texts
    norm: str = "rms"  # rms, layer
    norm_eps: float | None = None
    norm_bias: bool = False
    post_norm: bool = False  # normalise after adding to the residual stream, as BERT does
    branch_norm: bool = False  # before adding, too, as Gemma does
    embedding_norm: bool = False
    first_norm: bool = True  # False: the first block's attention has no norm (ModernBERT)
    qk_norm_weight: bool = False  # QK-norm's scale is learned
    bias: bool = False  # in the linear layers of blocks
    qkv_bias: bool = False  # in those for queries, keys and values at least
    window: int = 0  # attention reaches this many tokens to either side …
    window_layers: tuple = ()  # … in these blocks
    window_rope_theta: float | None = None  # their rope_theta, unscaled; None: as elsewhere
    normalize: bool = False  # pooled vectors get the length √d_model
    head_dense: str | None = None  # a layer between pooling and head, then tanh, relu or gelu
    head_dense_bias: bool = True
    head_norm: bool = False  # and a norm
    head_bias: bool = False
    head_dropout: float = 0.0
    cls_token: bool = False  # images: a learned first token
    distilled_token: bool = False  # and a second one (DeiT)
    pixel_mean: float | tuple = 0.5  # of pixels as 0..1; or one for each channel
    pixel_std: float | tuple = 0.5

    @property
    def head_width(self):
        return self.head_dim or self.d_model // self.n_head

    @property
    def n_positions(self):
        """Tokens of the longest example: patches of an image, else max_len."""
        if not self.image_size:
            return self.max_len
        _, height, width = self.image_size
        patches = height // self.patch * (width // self.patch)
        return patches + self.cls_token + self.distilled_token


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

    To change it, change the plain path, the last one, and keep the two before from being taken.
    """
    if cpu.attends(qkv, layout):  # optional: what follows computes the same
        return cpu.attend(qkv, layout, causal, window, first_only)
    if takes_varlen(qkv, layout):
        from torch.nn.attention.varlen import varlen_attn
        reach = window or -1  # −1: without end
        y = varlen_attn(*qkv.unbind(1), layout.cu_seqlens, layout.cu_seqlens, layout.max_len,
                        layout.max_len, window_size=(reach, 0 if causal else reach))
    else:
        q, k, v, valid = layout.pad(qkv)
        mask = attention_mask(valid, q.shape[2], k.shape[2], causal, window, q.device)
        is_causal = causal and mask is None and q.shape[2] > 1  # a single query sees all keys
        y = layout.unpad(F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal))
    return y[layout.first] if first_only else y


def takes_varlen(qkv, layout):
    """Is this for CUDA's kernel for packed documents?"""
    half = qkv.dtype in (torch.bfloat16, torch.float16)
    return qkv.is_cuda and half and not layout.same_length


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


def qkv_rows(c):
    """The rows of attention's first layer that make queries, keys and values."""
    n_kv_head = c.n_kv_head or c.n_head
    return tuple(n_head * c.head_width for n_head in (c.n_head, n_kv_head, n_kv_head))


class LayerNorm(nn.LayerNorm):
    """Also of float32 where FSDP has made its weights bfloat16, which torch refuses on CPUs."""

    def forward(self, x):
        def widened(p):
            return p if p is None else p.to(torch.promote_types(p.dtype, x.dtype))
        return F.layer_norm(x, self.normalized_shape, widened(self.weight), widened(self.bias),
                            self.eps)


def make_norm(c, width=None):
    width = width or c.d_model
    if c.norm == "rms":
        return RMSNorm(width, eps=c.norm_eps)
    return LayerNorm(width, eps=1e-5 if c.norm_eps is None else c.norm_eps, bias=c.norm_bias)


def apply_rope(x, cos, sin):
    """Rotary position embedding: x (T, H, d) with cos, sin (T, 1, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_table(c, theta, scaling):
    """cos and sin of the angle of each position and pair of dimensions: (2, n_positions, d/2).

    In images half the pairs turn with a patch's row, half with its column (axial; Heo et al. 2024).
    """
    d = c.head_width
    if c.image_size:
        _, H, W = c.image_size
        patches = torch.cartesian_prod(torch.arange(H // c.patch), torch.arange(W // c.patch))
        # (d/4,); 100 and not 10,000, as images have few rows and columns
        frequency = 100.0 ** -torch.arange(0, 1, 4 / d)
        angle = (patches[:, :, None] * frequency).flatten(1)
        return torch.stack((angle.cos(), angle.sin()))
    frequency = theta ** -(torch.arange(0, d, 2) / d)  # (d/2,)
    size = 1.0
    if scaling:
        frequency, size = ROPE_SCALINGS[scaling["rope_type"]](frequency, theta, scaling)
    angle = torch.outer(torch.arange(c.max_len), frequency)
    return torch.stack((angle.cos(), angle.sin())) * size


def linear_rope(frequency, theta, scaling):
    """Positions divided by a factor (Chen et al. 2023). This and what follows: frequencies (d/2,) →
    (the stretched ones, a factor for cos and sin)."""
    return frequency / scaling["factor"], 1.0


def llama3_rope(frequency, theta, scaling):
    """Slow turns are divided by the factor, fast ones kept, those between blended (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling["factor"], 1.0


def yarn_rope(frequency, theta, scaling):
    """As llama3_rope, blended along the dimensions; attention sharpened (YaRN; Peng et al. 2023).
    """
    factor, half = scaling["factor"], len(frequency)

    def dimension(turns):  # of the pair that turns so often in the original length
        turn = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return half * math.log(turn) / math.log(theta)
    low = dimension(scaling.get("beta_fast", 32.0))
    high = dimension(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    kept = 1 - ((torch.arange(half) - low) / max(high - low, 1e-3)).clamp(0, 1)

    def sharpness(scale):
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1
    size = scaling.get("attention_factor")
    if size is None:
        size = sharpness(1.0)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            size = sharpness(scaling["mscale"]) / sharpness(scaling["mscale_all_dim"])
    return kept * frequency + (1 - kept) * frequency / factor, size


ROPE_SCALINGS = {"linear": linear_rope, "llama3": llama3_rope, "yarn": yarn_rope}


def patchify(x, p):
    """Images as rows of patches: (B, C, H, W) → (B, H//p · W//p, C·p·p). Pixels at the right and at
    the bottom that fill no patch are left out, as by a convolution."""
    B, C, H, W = x.shape
    h, w = H // p, W // p
    if H % p or W % p:
        x = x[:, :, : h * p, : w * p]
    x = x.view(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, h * w, C * p * p)


# --------------------------------------------------------------------------------------------------
# The transformer


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.heads = [c.n_head, c.n_kv_head or c.n_head, c.n_kv_head or c.n_head]  # of q, k, v
        self.causal, self.qk_norm = c.causal, c.qk_norm
        self.window = c.window if layer in c.window_layers else 0
        d = c.head_width
        self.qkv = nn.Linear(c.d_model, sum(qkv_rows(c)), bias=c.bias or c.qkv_bias)
        self.q_norm = make_norm(c, d) if c.qk_norm_weight else None
        self.k_norm = make_norm(c, d) if c.qk_norm_weight else None
        self.out = nn.Linear(c.n_head * d, c.d_model, bias=c.bias)

    def forward(self, x, layout, rope, rows=None, first_only=False):
        H, H_kv, _ = self.heads
        qkv = self.qkv(x).unflatten(1, (H + 2 * H_kv, -1))
        if self.qk_norm or rope is not None:
            qk, v = qkv.split((H + H_kv, H_kv), 1)  # (T, H + H_kv, d), (T, H_kv, d)
            if self.q_norm is not None:
                q, k = qk.split((H, H_kv), 1)
                qk = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
            elif self.qk_norm:
                qk = rms_norm(qk)
            if rope is not None:
                qk = apply_rope(qk, *rope)
            qkv = torch.cat((qk.to(v.dtype), v), 1)  # CUDA's autocast makes norms float32
        if H_kv < H:  # each group of queries gets its key and value
            q, k, v = qkv.split(self.heads, 1)
            group = H // H_kv
            qkv = torch.cat((q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)), 1)
        qkv = qkv.unflatten(1, (3, H))
        y = attend(qkv, layout, self.causal, self.window, first_only).flatten(1)
        if rows is not None and not first_only:
            y = y[rows]
        return self.out(y)


class FeedForward(nn.Module):
    ACTIVATIONS = {
        "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
        "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "swiglu": F.silu, "geglu": F.gelu,  # gated (Shazeer 2020)
        "geglu_tanh": functools.partial(F.gelu, approximate="tanh")}

    def __init__(self, c):
        super().__init__()
        self.gated = "glu" in c.mlp
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
        self.attention_norm = make_norm(c) if c.branch_norm else nn.Identity()
        self.mlp_norm = make_norm(c) if c.branch_norm else nn.Identity()
        self.dropout, self.post_norm = c.dropout, c.post_norm

    def forward(self, x, layout, rope, rows=None, first_only=False):
        """(T, D) → (T, D). If only some rows are needed, the last block is given their indices,
        rows (M,), and returns (M, D). first_only: these are the first tokens of all documents,
        which allows cheaper attention."""
        normed = x if self.post_norm else self.norm1(x)
        y = self.attention_norm(self.attention(normed, layout, rope, rows, first_only))
        y = self.drop(y)
        x = y + (x if rows is None else x[rows])
        if self.post_norm:
            x = self.norm1(x)
            return self.norm2(x + self.drop(self.mlp(x)))
        return x + self.drop(self.mlp_norm(self.mlp(self.norm2(x))))

    def drop(self, x):
        return dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """`config` → a model with fresh weights, drawn from torch's global generator."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.longest = c.max_len  # tokens of the documents to come; fewer make CUDA's kernel faster
        width = c.d_embedding or c.d_model
        if c.image_size:
            self.embedding = nn.Linear(c.image_size[0] * c.patch**2, c.d_model)
        else:
            self.embedding = nn.Embedding(c.vocab_size, width)
        self.cls = nn.Parameter(torch.zeros(c.d_model)) if c.cls_token else None
        self.distilled = nn.Parameter(torch.zeros(c.d_model)) if c.distilled_token else None
        learned = c.position == "learned"
        self.position = nn.Embedding(c.n_positions, width) if learned else None
        self.segment = nn.Embedding(c.n_segments, width) if c.n_segments else None
        self.embedding_norm = make_norm(c, width) if c.embedding_norm else nn.Identity()
        self.projection = nn.Linear(width, c.d_model) if c.d_embedding else nn.Identity()
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
            pooled = c.d_model * (2 if c.pooling == "cls+mean" else 1)
            self.head = nn.Linear(pooled, c.n_classes, bias=c.head_bias)
        if c.lm_head == "own":
            self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.make_tables()
        self.initialise()

    def make_tables(self):
        """Buffers, which are computed from the config alone. All are made here: a model is loaded
        by one that is built without memory, then given its weights and these."""
        c = self.config
        if c.position == "rope":
            table = rope_table(c, c.rope_theta, c.rope_scaling)
            self.register_buffer("rope", table, persistent=False)
            if c.window_rope_theta:
                table = rope_table(c, c.window_rope_theta, {})
                self.register_buffer("window_rope", table, persistent=False)
        if c.image_size:
            for name in ("pixel_mean", "pixel_std"):
                value = torch.tensor(getattr(c, name), dtype=torch.float32).reshape(-1, 1, 1)
                self.register_buffer(name, value, persistent=False)

    def initialise(self, names=None):
        """Weights at the start (names: only these), by kind.

            norms                                 one
            biases, an image's first tokens       zero
            ours: head, output projections        zero
            ours: other matrices of blocks, and   normal, std 1/√(inputs)
                  the embedding of patches
            everything else                       normal, std 0.02
        """
        c = self.config
        ours = c.family == "ours"
        for name, p in self.named_parameters():
            if names is not None and name not in names:
                continue
            if name.endswith("norm.weight"):
                nn.init.ones_(p)
            elif name.endswith("bias") or ours and name.endswith(("head.weight", "out.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                patches = c.image_size and name == "embedding.weight"
                scaled = ours and (name.startswith("blocks") or patches)
                nn.init.normal_(p, std=p.shape[1] ** -0.5 if scaled else 0.02)

    def embed(self, inputs, cu_seqlens=None, length=None, segments=None):
        """Text, (T,) tokens, or images, (B, C, H, W) pixels of 0..255 → ((T, D), their layout)."""
        c = self.config
        if c.image_size:
            pixels = (at_least_float32(inputs) / 255 - self.pixel_mean) / self.pixel_std
            x = self.embedding(patchify(pixels, c.patch))  # (B, N, D)
            for token in (self.distilled, self.cls):
                if token is not None:
                    x = torch.cat((token.expand(x.shape[0], 1, -1).to(x.dtype), x), 1)
            return x.flatten(0, 1), DenseLayout(*x.shape[:2], x.device)
        x = self.embedding(inputs)
        if length is not None:
            return x, DenseLayout(len(inputs) // length, length, inputs.device)
        return x, PackedLayout(cu_seqlens, len(inputs), self.longest, segments)

    def trunk(self, x, layout, rows=None, first_only=False):
        """All blocks: x (T, D) → (T, D), or with rows (B,), only these rows: (B, D)."""
        c = self.config
        if torch.is_autocast_enabled(x.device.type):
            x = at_least_float32(x)  # of a bfloat16 embedding: sums are float32
        rope = window_rope = None
        if c.position == "rope":
            rope = self.rope[:, layout.position, None]  # cos, sin: (2, T, 1, d/2)
            window_rope = rope
            if c.window_rope_theta:
                window_rope = self.window_rope[:, layout.position, None]
        if c.embedding_scale != 1:
            x = x * c.embedding_scale
        if self.position is not None:
            x = layout.add_positions(x, self.position)
        if self.segment is not None and layout.segments is not None:
            x = x + self.segment(layout.segments)
        elif self.segment is not None:
            x = x + self.segment.weight[0]
        x = self.projection(dropout(self.embedding_norm(x), c.dropout, self.training))
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

    def output_weight(self):
        """A language model's last layer: (vocab_size, D)."""
        return (self.lm_head or self.embedding).weight

    def forward(self, inputs, cu_seqlens=None, length=None, query_index=None, segments=None,
                with_head=True):
        """Logits (B, n_classes), float32; of a language model (T, vocab_size).

        inputs: text (T,) int64, packed by cu_seqlens (B+1,) int32, or documents of one `length`
        each; or images (B, C, H, W). query_index (M,): of a language model, only the logits of
        these tokens, (M, vocab_size). segments (T,): 0 and 1, of pairs of texts. with_head=False:
        of a language model, (what the last layer gets, (T, D), its weight).
        """
        x, layout = self.embed(inputs, cu_seqlens, length, segments)
        if not self.config.lm_head:
            return self.classify(x, layout)
        x = self.trunk(x, layout, query_index)
        if not with_head:
            return x, self.output_weight()
        return F.linear(x, self.output_weight())

    def vectors(self, inputs, cu_seqlens=None, length=None, query_index=None, segments=None):
        """(B, d_model) float32: one vector for each example, as the head gets it. (query_index is
        here for the arguments to be forward's.)"""
        return self.pool(*self.embed(inputs, cu_seqlens, length, segments))

    def pool(self, x, layout):
        """Trunk and pooling: embedded tokens (T, D) → (B, D), float32."""
        pooling = self.config.pooling
        if pooling == "cls":
            x = self.trunk(x, layout, layout.first, first_only=True)
        elif pooling == "last":
            x = self.trunk(x, layout, layout.last)
        elif pooling in ("mean", "max", "cls+mean"):
            x = self.trunk(x, layout)
        else:
            raise ValueError(f"there is no pooling {pooling!r}")
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            if pooling in ("mean", "max"):
                x = layout.pool(x, pooling)
            elif pooling == "cls+mean":
                x = x.unflatten(0, layout.shape)
                x = torch.cat((x[:, 0], x[:, 1:].mean(1)), 1)
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
