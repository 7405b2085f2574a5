"""What an example is, and how several become a Batch: packed text, pairs, images, rows of numbers;
parts of these, and these with a teacher's logits. (language.py: text without labels.)

Windows, masks and augmentation are functions of (seed, epoch, example) alone.
"""
import copy
import math
from typing import NamedTuple

from configurator import UserError

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = -100  # the target where there is none, F.cross_entropy's default (for numbers: NaN)


class Batch(NamedTuple):
    """A micro-batch. The counts are Python ints, so that a step never asks the device for them."""
    inputs: tuple  # what model(*inputs) takes
    targets: torch.Tensor  # in the shape and dtype of the task; IGNORE where there is none
    n_targets: int  # targets that count
    n_tokens: int  # tokens of text, without what fills a batch up; else examples

    def to(self, device):
        inputs = tuple(move(x, device) for x in self.inputs)
        return self._replace(inputs=inputs, targets=move(self.targets, device))


def ceil_div(a, b):
    return -(-a // b)


def move(x, device):
    return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x


class PaddedShape(NamedTuple):
    """The size that a micro-batch is filled up to."""
    n_tokens: int
    n_documents: int
    max_len: int
    few_sizes: bool = False  # masked tokens are to come in few numbers, too, for torch.compile


class Request(NamedTuple):
    """A micro-batch to be made."""
    epoch: int | np.ndarray | None  # of a mixture one for each index; None: for evaluation, without
    #   windows, masks and augmentation
    indices: np.ndarray
    shape: PaddedShape | None = None


class Examples(torch.utils.data.Dataset):
    """What the classes below share. lengths (N,): tokens of each example, before filling up.
    same_length: all examples have max_len tokens. long: see PackedText."""
    same_length, long = False, "head"

    def __len__(self):
        return len(self.lengths)

    def order(self, seed, epoch):
        """(the indices of an epoch's examples in its order, of a mixture also the epoch of each in
        its own corpus, else None)."""
        return np.random.default_rng((seed, epoch)).permutation(len(self)), None

    def __getitems__(self, requests):
        """A list of Requests → a list of Batches. A process that gets no examples in a step gets an
        empty batch, as all take part in each step."""
        return [self.batch(*request) for request in requests] or [self.empty_batch()]


class Subset(Examples):
    """Some of other Examples, by their indices."""

    def __init__(self, examples, indices):
        self.examples, self.indices = examples, indices
        self.max_len, self.same_length = examples.max_len, examples.same_length
        self.lengths, self.labels = examples.lengths[indices], examples.labels[indices]

    def batch(self, epoch, indices, shape=None):
        return self.examples.batch(epoch, self.indices[indices], shape)

    def empty_batch(self):
        return self.examples.empty_batch()


class Taught(Examples):
    """Examples with a teacher's logits (N, C): targets (B, 1 + C) float32 are the class, IGNORE
    where there is none, and the logits, NaN of what fills a batch up."""

    def __init__(self, examples, logits):
        self.examples, self.logits = examples, logits
        self.lengths, self.labels = examples.lengths, examples.labels
        self.max_len, self.same_length = examples.max_len, examples.same_length

    def batch(self, epoch, indices, shape=None):
        return self.with_logits(self.examples.batch(epoch, indices, shape), indices)

    def empty_batch(self):
        return self.with_logits(self.examples.empty_batch(), [])

    def with_logits(self, batch, indices):
        logits = torch.full((len(batch.targets), self.logits.shape[1]), math.nan)
        logits[: len(indices)] = self.logits[indices]
        return batch._replace(targets=torch.cat((batch.targets[:, None].float(), logits), 1))


class PackedText(Examples):
    """Documents and their labels.

    crop: train on a random window of this many tokens of each document. mask_prob: hide this share
    of the tokens in training. n_prefix, n_suffix: tokens at the start and the end of each document
    that are always read: special ones, and those of a template. long: what is
    read of a document longer than max_len: its head; head+tail, the second half from its end; or,
    by `windows`, all of it.
    """

    def __init__(self, tokens, starts, labels, max_len, n_suffix, n_prefix=1, mask_id=None, seed=0,
                 crop=None, mask_prob=0.0, long="head"):
        self.tokens, self.starts, self.labels = tokens, starts, labels
        self.lengths = np.minimum(np.diff(starts), crop or max_len)
        self.max_len, self.n_suffix, self.mask_id = max_len, n_suffix, mask_id
        self.n_prefix = n_prefix
        self.seed, self.crop, self.mask_prob, self.long = seed, crop, mask_prob, long
        is_number = labels.dtype == np.float32
        self.ignore = math.nan if is_number else IGNORE
        self.target_dtype = np.float32 if is_number else np.int64
        if n_prefix > 1 and min(max_len, crop or max_len) <= n_prefix + n_suffix:
            raise UserError(f"--template and special tokens are {n_prefix + n_suffix} tokens: "
                            "raise --max_len and --crop, so that they hold some of the text, too")
        if mask_prob and mask_id is None:
            raise UserError("mask_prob needs a tokenizer with a [MASK] or <mask> token; "
                            "set --mask_prob=0")

    def document(self, i, epoch=None):
        """Token ids (L,) int64 of example i. In training (epoch given) a window of it, which keeps
        the tokens at the start and the end that are always read, with tokens masked."""
        start = self.starts[i]
        end = self.starts[i + 1]
        if epoch is None or not (self.crop or self.mask_prob):
            ids = self.tokens[start:end].astype(np.int64)
            n_end = self.n_suffix
            if self.long == "head+tail":
                n_end = max(n_end, self.max_len // 2)
            return truncate(ids, self.max_len, n_end)
        rng = np.random.default_rng((self.seed, epoch, i))
        skip = 0
        if self.crop and self.crop < end - start:
            skip = rng.integers(0, end - start - self.crop, endpoint=True)
        ids = self.tokens[start + skip : end].astype(np.int64)
        ids = truncate(ids, self.crop or self.max_len, self.n_suffix)
        ids[: self.n_prefix] = self.tokens[start : start + self.n_prefix]
        return self.mask(ids, rng)

    def mask(self, ids, rng):
        """Hide a share of mask_prob of a document's tokens, the first ones aside, in place."""
        if self.mask_prob:
            body = ids[self.n_prefix :]
            body[rng.random(len(body)) < self.mask_prob] = self.mask_id
        return ids

    def batch(self, epoch, indices, shape=None):
        """inputs (tokens (T,), cu_seqlens (B+1,)); targets (B,) int64, (B, C) int64, or of numbers
        (B,) float32."""
        documents = [self.document(i, epoch) for i in indices]
        return self.pack_labelled(documents, self.labels[indices], shape)

    def pack_labelled(self, documents, labels, shape=None):
        inputs = pack(documents, shape)
        n_filled = len(inputs[1]) - 1 - len(documents)
        ignored = np.full((n_filled, *self.labels.shape[1:]), self.ignore)
        targets = np.concatenate([labels, ignored])
        targets = torch.from_numpy(targets.astype(self.target_dtype))
        return Batch(inputs, targets, len(labels), sum(map(len, documents)))

    def with_unlabelled(self, documents):
        """These and further documents, lists of token ids, without labels."""
        more = copy.copy(self)
        more.tokens = np.concatenate([self.tokens, *documents]).astype(np.int64)
        ends = self.starts[-1] + np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        more.starts = np.concatenate([self.starts, ends])
        more.labels = np.concatenate([self.labels, np.full(len(documents), self.ignore)])
        more.lengths = np.minimum(np.diff(more.starts), self.crop or self.max_len)
        return more

    def windows(self):
        """All documents in pieces of up to max_len tokens, each with the tokens that are always
        read: (PackedText, each piece's document (W,) int64). The last piece of a
        longer document is full, too: it starts earlier."""
        pieces, document = [], []
        first = self.n_prefix
        width = self.max_len - first - self.n_suffix
        for i in range(len(self)):
            ids = self.tokens[self.starts[i] : self.starts[i + 1]].astype(np.int64)
            n_body = len(ids) - first - self.n_suffix
            n = max(1, ceil_div(n_body, width))
            for start in np.linspace(0, max(0, n_body - width), n).astype(int):
                body = ids[first + start : first + min(start + width, n_body)]
                pieces.append([ids[:first], body, ids[len(ids) - self.n_suffix :]])
                document.append(i)
        tokens = np.concatenate([part for piece in pieces for part in piece])
        starts = np.cumsum([0, *(sum(map(len, piece)) for piece in pieces)])
        labels = self.labels[document]
        return (PackedText(tokens, starts, labels, self.max_len, self.n_suffix, first),
                torch.tensor(document))

    def empty_batch(self):
        targets = np.full((1, *self.labels.shape[1:]), self.ignore, self.target_dtype)
        return Batch(pack([np.zeros(1, np.int64)]), torch.from_numpy(targets), 0, 0)

    def content(self, i):
        """A document's bytes, to compare documents by: all of it, not only what is read."""
        return self.tokens[self.starts[i] : self.starts[i + 1]].astype(np.uint32).tobytes()


class PackedPairs(PackedText):
    """Pairs of texts, each pair one document, and their labels.

    first_lengths (N,): tokens of the first text. pair: how they are joined (format.pair_template).
    truncation: what a pair longer than max_len loses: the ends of the longer text first, or
    only_second. In training a pair is read as in evaluation: a window of it would be another one.
    """

    def __init__(self, first_lengths, pair, truncation="longest_first", crop=None, **common):
        super().__init__(**common)
        self.first_lengths, self.pair, self.truncation = first_lengths, pair, truncation
        self.n_special = pair["n_prefix"] + pair["n_middle"] + pair["n_suffix"]
        if self.max_len <= self.n_special:
            raise UserError(f"--max_len={self.max_len}: a pair has {self.n_special} special tokens "
                            "besides its texts: raise it")
        if self.long != "head":
            raise UserError(f"--long={self.long} is for single texts, not for pairs")

    def lengths_read(self, i):
        """How many tokens of the first and of the second text of example i are read."""
        n_first = int(self.first_lengths[i])
        n_second = int(self.starts[i + 1] - self.starts[i]) - self.n_special - n_first
        room = self.max_len - self.n_special
        return truncate_pair(n_first, n_second, room, self.truncation)

    def document(self, i, epoch=None):
        """Token ids (L,) int64 of example i; in training (epoch given) with tokens masked."""
        ids = self.tokens[self.starts[i] : self.starts[i + 1]].astype(np.int64)
        n_first, n_second = self.lengths_read(i)
        end_of_first = self.pair["n_prefix"] + self.first_lengths[i]
        second = end_of_first + self.pair["n_middle"]
        ids = np.concatenate([
            ids[: self.pair["n_prefix"] + n_first], ids[end_of_first : second + n_second],
            ids[len(ids) - self.pair["n_suffix"] :]])
        if epoch is None or not self.mask_prob:
            return ids
        return self.mask(ids, np.random.default_rng((self.seed, epoch, i)))

    def batch(self, epoch, indices, shape=None):
        """As PackedText's; where the tokenizer tells the texts apart, inputs (tokens, cu_seqlens,
        None, None, segments (T,))."""
        batch = super().batch(epoch, indices, shape)
        if not self.pair["segments"]:
            return batch
        tokens, cu_seqlens = batch.inputs
        segments = torch.zeros_like(tokens)
        for i, start, end in zip(indices, cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            n_first, _ = self.lengths_read(i)
            second = self.pair["n_prefix"] + n_first + self.pair["n_middle"]
            segments[start + second : end] = 1
        return batch._replace(inputs=(tokens, cu_seqlens, None, None, segments))


def truncate_pair(n_first, n_second, room, truncation):
    """(tokens of the first text, of the second) that are left where `room` is for both, as the
    `tokenizers` library cuts them."""
    if n_first + n_second <= room:
        return n_first, n_second
    if truncation == "only_second":
        n_first = min(n_first, room)
        return n_first, room - n_first
    half, other_half = room // 2, room - room // 2
    if min(n_first, n_second) > half:
        return (half, other_half) if n_first <= n_second else (other_half, half)
    if n_first <= n_second:
        return n_first, room - n_first
    return room - n_second, n_second


class Arrays(Examples):
    """Images (N, C, H, W) uint8 or rows of numbers (N, F) float32, and their labels.

    augmentation: the settings of `augment`, for training. With mixup (Zhang et al. 2018) targets
    are shares of the classes, (B, n_classes) float32.
    """
    same_length = True

    def __init__(self, values, labels, n_classes, max_len=1, seed=0, augmentation=None):
        self.values, self.labels, self.n_classes = values, labels, n_classes
        self.max_len, self.seed, self.augmentation = max_len, seed, augmentation
        self.mixup = augmentation["mixup"] if augmentation else 0.0
        self.lengths = np.full(len(labels), max_len)
        self.ignore = math.nan if labels.dtype == np.float32 else IGNORE

    def batch(self, epoch, indices, shape=None):
        """inputs (x,): (B, C, H, W) or (B, F); targets (B,). With `shape`, the last example is
        repeated, without a target, until they are as many as it says."""
        n = len(indices)
        if shape and not self.mixup:
            indices = np.pad(indices, (0, shape.n_tokens // self.max_len - n), "edge")
        x = torch.from_numpy(self.values[indices])
        targets = torch.from_numpy(self.labels[indices])
        targets[n:] = self.ignore
        if epoch is None or not self.augmentation:
            return Batch((x,), targets, n, n)
        draws = [np.random.default_rng((self.seed, epoch, i)).random(24) for i in indices]
        draws = torch.from_numpy(np.stack(draws).astype(np.float32))
        if self.mixup:
            other = (draws[:, PARTNER] * len(self)).numpy().astype(int) % len(self)
            x = torch.cat((x, torch.from_numpy(self.values[other])))
            both = torch.stack((targets, torch.from_numpy(self.labels[other])))
            share = draws[:, SHARE, None] * self.mixup / 2
            targets = torch.lerp(*F.one_hot(both, self.n_classes).float(), share)
        x = augment(x, draws, **self.augmentation)
        return Batch((x,), targets, n, n)

    def empty_batch(self):
        batch = self.batch(0, np.array([0]))
        targets = batch.targets
        ignored = torch.zeros_like(targets) if self.mixup else targets.fill_(self.ignore)
        return batch._replace(targets=ignored, n_targets=0, n_tokens=0)

    def content(self, i):
        return self.values[i].tobytes()


# which of an image's 24 random numbers is for what; one that is blended in has the last 12
RIGHT, DOWN, TURN, ZOOM, MIRROR, HOLE_Y, HOLE_X, HOLE_SIDE = range(8)
PARTNER, SHARE = 10, 11  # 8 and 9 are free


def augment(x, draws, shift=0.0, rotate=0.0, scale=0.0, flip=False, cutout=0.0, mixup=0.0):
    """Images (B, C, H, W) uint8 → (B, C, H, W) float32; draws (B, 24) are uniform in 0..1.

    Each is moved by up to `shift` of its side, turned by up to `rotate` degrees, scaled by a factor
    of up to 1 + scale either way, mirrored half the time with `flip`, and loses a square of up to
    `cutout` of its side (DeVries & Taylor 2017). With mixup, x holds as many images again, of which
    up to mixup / 2 is blended in.
    """
    if mixup:
        x, others = x.chunk(2)
        settings = dict(shift=shift, rotate=rotate, scale=scale, flip=flip, cutout=cutout)
        share = draws[:, SHARE, None, None, None] * mixup / 2
        others = augment(others, draws[:, 12:], **settings)
        return torch.lerp(augment(x, draws, **settings), others, share)
    _, _, H, W = x.shape
    either_way = draws * 2 - 1  # −1..1
    angle = either_way[:, TURN] * rotate * math.pi / 180
    zoom = (1 + scale) ** either_way[:, ZOOM]
    mirror = torch.ones_like(angle)
    if flip:
        mirror = torch.where(either_way[:, MIRROR] < 0, -1.0, 1.0)
    cos = torch.cos(angle) * zoom
    sin = torch.sin(angle) * zoom
    right, down = either_way[:, RIGHT] * 2 * shift, either_way[:, DOWN] * 2 * shift
    # from the new image's coordinates to the old one's, both −1..1 whatever the sides
    theta = torch.stack((cos * mirror, -sin * (H / W), right,
                         sin * (W / H) * mirror, cos, down), 1).view(-1, 2, 3)
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 pixels would be misplaced
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        x = F.grid_sample(x.float(), grid, align_corners=False)
    if cutout:
        half_side = cutout / 2 * draws[:, HOLE_SIDE, None]
        in_rows = (torch.arange(H) + 0.5 - draws[:, HOLE_Y, None] * H).abs() < half_side * H
        in_columns = (torch.arange(W) + 0.5 - draws[:, HOLE_X, None] * W).abs() < half_side * W
        x = x.masked_fill((in_rows[:, :, None] & in_columns[:, None])[:, None], 0)
    return x


def truncate(ids, max_len, n_suffix):
    """The first max_len tokens of a document; the n_suffix special tokens at its end stay."""
    if len(ids) <= max_len:
        return ids
    return np.concatenate([ids[: max_len - n_suffix], ids[len(ids) - n_suffix :]])


def pack(documents, shape=None):
    """Documents end to end: (tokens (T,) int64, cu_seqlens (B+1,) int32).

    With a PaddedShape, filled up to exactly that, so that torch.compile sees one size: by documents
    of up to max_len copies of the first token, and by empty documents.
    """
    lengths = [len(document) for document in documents]
    if shape:
        fill = shape.n_tokens - sum(lengths)
        filler = [shape.max_len] * (fill // shape.max_len) + [fill % shape.max_len]
        filler += [0] * (shape.n_documents - len(documents) - len(filler))
        documents = [*documents, np.full(fill, documents[0][0])]
        lengths += filler
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return torch.from_numpy(np.concatenate(documents)), torch.from_numpy(cu_seqlens)
