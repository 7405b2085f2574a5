"""The models to beat: an MLP and a linear model, with the calling convention of model.Transformer.

    MLP(ModelConfig(n_features=7, n_classes=3))(x)                     # (B, F) float32 → (B, 3)
    LinearModel(ModelConfig(vocab_size=8192, n_classes=5))(tokens, cu_seqlens)     # → (B, 5)

Both read rows of numbers (B, F), images (B, C, H, W) and packed text. A regression has n_classes=1.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import cpu
from model import PackedLayout, Transformer, at_least_float32, dropout


def build_model(config):
    """The model of a ModelConfig, with fresh weights."""
    return MODELS[config.model](config)


def flat(x, c):
    """Numbers as they are; images as rows of numbers from -1 to 1."""
    return at_least_float32(x).flatten(1) / 127.5 - 1 if c.image_size else x


def n_inputs(c):
    return c.n_features or math.prod(c.image_size)


class MLP(nn.Module):
    """n_layer hidden layers of d_model ReLU units, on numbers, pixels, or the mean of a text's
    embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.vocab_size:
            self.embedding = nn.Embedding(c.vocab_size, c.d_model)
            nn.init.normal_(self.embedding.weight)
        widths = [c.d_model if c.vocab_size else n_inputs(c)] + [c.d_model] * c.n_layer
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(widths[-1], c.n_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, cu_seqlens=None):
        c = self.config
        if c.vocab_size:
            layout = PackedLayout(cu_seqlens, len(x), c.max_len)
            x = layout.pool(at_least_float32(self.embedding(x)), "mean")
        else:
            x = flat(x, c)
        for layer in self.layers:
            x = dropout(F.relu(layer(x)), c.dropout, self.training)
        return at_least_float32(self.head(x))


class LinearModel(nn.Module):
    """Softmax (or, with one output, least-squares) regression.

    Numbers and pixels: x (B, F) → x·Wᵀ + b, (B, n_classes).

    Text: a bag of hashed n-grams (fastText's features, Joulin et al. 2017, without its
    factorisation). Each run of 1 … ngrams tokens has a row of n_classes weights; the rows of a
    document are added up and divided by the root of their number. With `letters`, tokens are bytes,
    and there are two bags: runs of 1 … char_ngrams bytes, and runs of 1 … ngrams words (letters
    without a break, or one other byte that is no blank).
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.vocab_size:
            self.embedding = nn.Embedding(c.buckets, c.n_classes)
            nn.init.zeros_(self.embedding.weight)
            self.bias = nn.Parameter(torch.zeros(c.n_classes))
            self.register_buffer("byte_class", byte_classes(c), persistent=False)
        else:
            self.head = nn.Linear(n_inputs(c), c.n_classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x, cu_seqlens=None):
        c = self.config
        if not c.vocab_size:
            with torch.autocast(x.device.type, enabled=False):
                return self.head(flat(x, c))
        document = PackedLayout(cu_seqlens, len(x), c.max_len).document
        bags = [ngram_bag(x, document, c.char_ngrams if c.letters else c.ngrams, c.buckets)]
        if c.letters:
            words, first_byte = hash_words(self.byte_class, x, document)
            bags.append(ngram_bag(words, document[first_byte], c.ngrams, c.buckets))
        return sum_bags(self.embedding, bags, len(cu_seqlens) - 1) + self.bias


MODELS = {"transformer": Transformer, "mlp": MLP, "linear": LinearModel}
BLANK, WORD, LETTER = range(3)  # what a byte is: between words, a word by itself, a part of one


def byte_classes(c):
    """(vocab_size,) int64: BLANK, WORD or LETTER for each byte's token."""
    classes = torch.full((c.vocab_size,), WORD)
    classes[list(c.blanks)] = BLANK
    classes[list(c.letters)] = LETTER
    return classes


def hash_words(byte_class, tokens, document):
    """The words in bytes `tokens` (T,) of documents (T,): (a hash of each (W,), its first byte's
    index (W,)). Equal words have equal hashes; different ones rarely do."""
    classes = byte_class[tokens]
    letter = classes == LETTER
    goes_on = F.pad(letter[1:] & letter[:-1] & (document[1:] == document[:-1]), (1, 0))
    first_byte = ((classes != BLANK) & ~goes_on).nonzero()[:, 0]
    index = torch.arange(len(tokens), device=tokens.device)
    word = torch.bucketize(index, first_byte, right=True) - 1  # of each byte
    offset = index - F.pad(first_byte, (0, 1))[word]  # of each byte in its word
    mixed = (tokens + 1) * (offset + 1) * 0x9E3779B97F4A7C15 ^ tokens << 40
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9
    inside = classes != BLANK
    hashes = tokens.new_zeros(len(first_byte)).index_add(0, word[inside], mixed[inside])
    return hashes, first_byte


def ngram_bag(tokens, document, n, buckets):
    """The runs of 1 … n tokens (T,) that end at each token and lie in its document (T,).

    Returns (bucket (T, n), exists (T, n) bool: the run begins in the document, document). Equal
    n-grams share a bucket; different ones rarely collide.
    """
    bucket = []
    exists = []
    hashes = torch.zeros_like(tokens)
    for k in range(n):
        before = F.pad(tokens, (k, 0))[: len(tokens)]
        # Fibonacci hashing (Knuth, vol. 3, 6.4) in wrapping int64
        hashes = (hashes + before + 1) * 0x9E3779B97F4A7C15
        hashes = hashes ^ (hashes >> 31)
        bucket.append(((hashes * 0xBF58476D1CE4E5B9) >> 20) % buckets)
        exists.append(F.pad(document, (k, 0), value=-1)[: len(document)] == document)
    return torch.stack(bucket, 1), torch.stack(exists, 1), document


def sum_bags(table, bags, B):
    """Each document's sum of the table's rows for its n-grams, divided by the root of their number,
    added up over the bags: → (B, width)."""
    rows, counts = [], []
    for bucket, exists, document in bags:
        rows.append(bucket.masked_select(exists))
        counts.append(document.new_zeros(B).index_add(0, document, exists.sum(1)))
    count = torch.stack(counts)  # (bags, B)
    total = embedding_bag_sum(table.weight, torch.cat(rows), count.flatten(), table.sparse)
    total = total.view(*count.shape, -1)
    return (total / count.clamp(min=1).sqrt()[..., None].to(total.dtype)).sum(0)


def embedding_bag_sum(weight, rows, count, sparse):
    """Sums of rows of `weight` (V, D): the first count[0] of `rows` (N,), the next count[1], …:
    → (len(count), D). sparse: whether the gradient is."""
    if cpu.handles(weight):
        return cpu.embedding_bag_sum(weight, rows, count, sparse)  # optional: see model.py
    start = F.pad(count.cumsum(0)[:-1], (1, 0))
    return F.embedding_bag(rows, weight, start, mode="sum", sparse=sparse)
