"""Data sets on disk → deterministic batches, packed where they are text.

A data set is a folder that data.py wrote (all little-endian, no headers):

    {train,val,test}.bin   text: token ids of all documents end to end, uint16 (uint32 for more than
                           65,536 tokens); images: uint8 (N, C, H, W); numbers: float32 (N, F),
                           standardised
    {train,val,test}.idx   text only: int64 (N+1,), where each document starts
    {train,val,test}.first pairs of texts only: int32 (N,), tokens of the first text, without
                           special ones
    {train,val,test}.lbl   int64 (N,): its class; float32 (N,): its number, standardised; uint8
                           (N, C): 1 for each label it has; without targets there is none
    {train,val}-00000.bin  text in shards (corpus.py): these and so on instead of .bin, and with
    {train,val}-00000.idx  int64 (N, 2), where each document starts and ends, instead of .idx
    tokenizer.json         text only: Hugging Face `tokenizers` format
    meta.json              everything else, with the SHA-256 of every file; written last, so a
                           folder without it is no data set

What is in a global batch, and in what order, is a function of (seed, step) alone. Windows, masks
and augmentation are functions of (seed, epoch, example) alone. So neither depends on the number of
processes, on micro-batches, on evaluation, or on having been interrupted.
"""
from configurator import UserError, has_sha256

import numpy as np
import torch

from examples import Arrays, PackedPairs, PackedText, PaddedShape, Request, ceil_div
from format import check_labels, check_pairs, check_text, damaged
from language import LanguageBlocks, ShardedTokens

TARGET_DTYPES = {"classification": np.int64, "multilabel": np.uint8, "regression": np.float32}


# --------------------------------------------------------------------------------------------------
# Opening


def open_split(folder, meta, split, max_len, rebuild, objective="classify", seed=0, **changes):
    """One split, memory-mapped: PackedText, LanguageBlocks or Arrays.

    changes: what training does to examples, see the classes. Raises UserError for a split or
    targets that are not there, and where a file is not the one that was built, or holds what no
    data set does.
    """
    if split not in meta["splits"]:
        raise UserError(f"{folder}: this data set has no {split} split, only "
                        f"{', '.join(meta['splits'])}: evaluate one of these with --split=…, or a "
                        "labelled file with --test_file=…")
    is_text = meta["kind"] == "text"
    names = [f"{split}.bin"]
    if is_text:
        names.append(f"{split}.idx")
    shards = meta["splits"][split].get("shards")
    if shards:
        if objective == "classify":
            raise UserError(f"{folder} holds text without labels, for --objective=mlm or clm")
        tokens, spans = open_shards(folder, meta, split, shards, rebuild)
        return LanguageBlocks(tokens, spans, max_len, objective, meta["splits"][split]["bytes"],
                              meta["mask_id"], seed, **changes)
    pair = meta.get("pair")
    if pair:
        names.append(f"{split}.first")
    if meta["task"] != "none":
        names.append(f"{split}.lbl")
    for name in names:
        path = folder / name
        if not has_sha256(path, meta["sha256"].get(name)):
            raise damaged(path, rebuild)
    n = meta["splits"][split]["examples"]
    n_classes = len(meta["label_names"])
    common = dict(max_len=max_len, seed=seed, **changes)
    try:
        # a plain ndarray: slicing a memmap is slower
        values = np.memmap(folder / f"{split}.bin", meta["dtype"], mode="r").view(np.ndarray)
        if is_text:
            starts = np.fromfile(folder / f"{split}.idx", np.int64)
            check_text(values, starts, n, meta)
            common |= dict(tokens=values, starts=starts, mask_id=meta["mask_id"])
            if objective == "classify":
                common |= dict(n_prefix=meta.get("n_prefix", 1), n_suffix=meta["n_suffix"])
            if pair:
                first_lengths = np.fromfile(folder / f"{split}.first", np.int32)
                check_pairs(first_lengths, starts, pair)
        else:
            if min(meta["shape"], default=0) < 1:
                raise ValueError(f"its examples have the shape {meta['shape']}")
            values = values.reshape(n, *meta["shape"])
            if not np.isfinite(values.sum(dtype=np.float64)):
                raise ValueError("it holds numbers that are not finite")
        if objective == "classify":
            labels = np.fromfile(folder / f"{split}.lbl", TARGET_DTYPES[meta["task"]])
            if meta["task"] == "multilabel":
                labels = labels.reshape(n, n_classes)
            check_labels(labels, n, n_classes, meta["task"])
    except ValueError as error:
        raise UserError(f"{folder}: the {split} split is damaged ({error}); rebuild the data set "
                        f"with: {rebuild}") from None
    if objective != "classify":
        starts = common.pop("starts")
        spans = np.stack((starts[:-1], starts[1:]), 1)
        n_bytes = meta["splits"][split]["bytes"]
        return LanguageBlocks(spans=spans, objective=objective, bytes_of_text=n_bytes, **common)
    if pair:
        return PackedPairs(first_lengths, pair, labels=labels, **common)
    if is_text:
        return PackedText(labels=labels, **common)
    return Arrays(values, labels, n_classes, **common)


def open_shards(folder, meta, split, n_tokens, rebuild):
    """(ShardedTokens, spans (N, 2)) of a split in shards of n_tokens tokens each. The sizes of .bin
    files are compared, and the hashes of .idx files: to hash all would take minutes at each start.
    `python data.py` with the same settings does. Raises UserError."""
    paths = [folder / f"{split}-{i:05}.bin" for i in range(len(n_tokens))]
    spans, before = [], 0
    for path, n in zip(paths, n_tokens):
        index = path.with_suffix(".idx")
        n_bytes = n * np.dtype(meta["dtype"]).itemsize
        if not path.is_file() or path.stat().st_size != n_bytes:
            raise damaged(path, rebuild)
        if not has_sha256(index, meta["sha256"].get(index.name)):
            raise damaged(index, rebuild)
        spans.append(np.fromfile(index, np.int64).reshape(-1, 2) + before)
        before += n
    return ShardedTokens(paths, meta["dtype"], meta["vocab_size"]), np.concatenate(spans)


# --------------------------------------------------------------------------------------------------
# Which examples are in which batch


class GlobalBatches(torch.utils.data.Sampler):
    """Yields, per optimizer step, this process's Requests; it may have none.

    The documents of a global batch are sorted by length (attention then pads least) and dealt to
    the processes like cards. fixed_shapes: fill micro-batches up to few shapes, for torch.compile.
    """

    def __init__(self, examples, batch_size, micro_batch_tokens, seed, start, stop, rank=0, world=1,
                 fixed_shapes=False):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world
        self.micro_batch_tokens, self.fixed_shapes = micro_batch_tokens, fixed_shapes
        self.steps_per_epoch = ceil_div(len(examples), batch_size)
        self.limit = micro_batch_tokens  # of tokens in a micro-batch
        if examples.same_length:  # micro-batches of one size
            share = ceil_div(batch_size, world)
            n_micro_batches = ceil_div(share * examples.max_len, micro_batch_tokens)
            self.limit = ceil_div(share, n_micro_batches) * examples.max_len
        elif fixed_shapes:
            self.sizes = self.choose_sizes()

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.stop):
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order, epochs = self.examples.order(self.seed, epoch)
            first = step % self.steps_per_epoch * self.batch_size
            batch = order[first : first + self.batch_size]
            lengths = self.examples.lengths[batch]
            longest_first = np.argsort(-lengths, kind="stable")
            mine = longest_first[self.rank :: self.world]
            yield [Request(epoch if epochs is None else epochs[first + part], batch[part],
                           self.shape(lengths[part].sum(), len(part)))
                   for part in split_by_tokens(mine, lengths, self.limit)]

    def shape(self, n_tokens, n_documents):
        max_len = self.examples.max_len
        if self.examples.same_length:
            n_tokens = self.limit if self.fixed_shapes else n_tokens
            return PaddedShape(n_tokens, n_documents, max_len, self.fixed_shapes)
        if not self.fixed_shapes:
            # multiples of 16: matrix products of ragged sizes are up to 15 % slower on CPUs, and
            # each new size is new to oneDNN
            return PaddedShape(16 * ceil_div(n_tokens, 16), n_documents + 1, max_len)
        T = next(size for size in self.sizes if n_tokens <= size)
        B = ceil_div(self.batch_size, self.world) + self.micro_batch_tokens // max_len + 1
        return PaddedShape(T, B, max_len, True)

    def choose_sizes(self):
        """The sizes that micro-batches are filled up to, for torch.compile: three with which the
        first epoch needs least filling, and larger ones for what a later epoch may bring."""
        order, _ = self.examples.order(self.seed, 0)
        found = []
        for step in range(min(self.steps_per_epoch, 2000)):
            batch = order[step * self.batch_size :][: self.batch_size]
            lengths = np.sort(self.examples.lengths[batch])[::-1][self.rank :: self.world]
            parts = split_by_tokens(np.arange(len(lengths)), lengths, self.limit)
            found += [int(lengths[part].sum()) for part in parts]
        found = np.array(sorted(found) or [1])
        largest = int(found[-1])
        candidates = sorted({int(x) for x in np.quantile(found, np.arange(1, 24) / 24)})
        pairs = [(a, b) for a in candidates for b in candidates if a <= b]

        def filled(pair):  # tokens after filling up
            sizes = np.array([*pair, largest])
            return sizes[np.searchsorted(sizes, found)].sum()
        best = min(pairs, key=filled)
        return sorted({min(16 * ceil_div(size, 16), self.limit)
                       for size in (*best, largest, largest * 5 // 4, self.limit)})


def eval_requests(lengths, micro_batch_tokens, rank=0, world=1):
    """All examples once, for evaluation: this process's Requests, longest examples first."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    parts = split_by_tokens(order, lengths, micro_batch_tokens)
    return [Request(None, indices) for indices in parts][rank::world]


def split_by_tokens(indices, lengths, limit):
    """Cut a list of examples into parts whose lengths add up to at most `limit`."""
    parts, total = [], 0
    for i in indices:
        if not parts or total + lengths[i] > limit:
            parts.append([])
            total = 0
        parts[-1].append(i)
        total += lengths[i]
    return [np.array(part) for part in parts]
