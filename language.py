"""Text for a language model, as blocks of tokens: of documents in one file or in shards, and of
several corpora, each with its share.

Where documents are cut and what is masked are functions of (seed, epoch, block) alone.
"""
import bisect
import functools
import math

from configurator import UserError

import numpy as np
import torch
import torch.nn.functional as F

from examples import IGNORE, Batch, Examples, ceil_div, pack


class ShardedTokens:
    """Tokens in several files, end to end, as one array that is sliced within a file. Raises
    UserError for tokens that the vocabulary lacks, as a damaged file may hold."""

    def __init__(self, paths, dtype, vocab_size):
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [np.memmap(path, dtype, mode="r").view(np.ndarray) for path in paths]
        self.starts = np.cumsum([0, *map(len, self.shards)]).tolist()

    def __getitem__(self, span):
        shard = bisect.bisect_right(self.starts, span.start) - 1
        first = self.starts[shard]
        found = self.shards[shard][span.start - first : span.stop - first]
        if found.size and found.max() >= self.vocab_size:
            raise UserError(f"{self.paths[shard]} is damaged: it holds tokens that the vocabulary "
                            "lacks; build the data set anew, with --overwrite=True")
        return found


class LanguageBlocks(Examples):
    """Text for a language model: documents cut into blocks of up to max_len tokens. spans (N, 2):
    where each document starts and ends.

    In training every block of a longer document is full: the last one starts earlier. All of them
    move by up to half a block either way, so that each epoch cuts elsewhere.

    clm: the target of each token is the one that follows it. mlm (Devlin et al. 2019): a block's
    first token is the document's, [CLS]; mask_prob of the others become [MASK], and only these have
    targets. There are no random tokens, and none left as they are (Wettig et al. 2023 find no harm
    in that). Evaluation masks the same ones each time.
    """

    def __init__(self, tokens, spans, max_len, objective, bytes_of_text=0, mask_id=None, seed=0,
                 mask_prob=0.0):
        self.tokens, self.spans, self.bytes_of_text = tokens, spans, bytes_of_text
        self.objective, self.max_len = objective, max_len
        self.seed, self.mask_prob, self.mask_id = seed, mask_prob, mask_id
        if objective == "mlm" and mask_id is None:
            raise UserError("--objective=mlm needs a tokenizer with a [MASK] or <mask> token")
        n_readable = spans[:, 1] - spans[:, 0]
        if objective == "clm":
            n_readable = n_readable - 1  # a last token has none to predict
        n_blocks = ceil_div(n_readable, max_len)
        self.first_block = n_blocks.cumsum() - n_blocks  # of each document
        self.document = np.repeat(np.arange(len(spans), dtype=np.int32), n_blocks)  # of each block
        self.lengths = np.minimum(max_len, n_readable).astype(np.int32)[self.document]
        if not len(self.document) or objective == "mlm" and self.lengths.max() < 2:
            raise UserError(f"--objective={objective}: no document has two tokens, so there is "
                            "nothing to learn")
        self.same_length = objective == "clm" and self.lengths.min() == max_len
        self.moves = {}  # epoch → how far it moves each block; of the latest two
        self.labels = np.broadcast_to(np.int64(0), len(self.document))  # none

    @functools.cached_property
    def n_bytes(self):
        """Bytes of the text, if bits per byte can be said: where every byte is predicted, as after
        a [CLS]; else 0."""
        first = {self.tokens[start : start + 1].item() for start in self.spans[:, 0]}
        return self.bytes_of_text if len(first) == 1 and self.objective == "clm" else 0

    def block(self, i, epoch=None):
        """(input ids (L,), targets (L,), IGNORE where there is none), int64."""
        document = self.document[i]
        first, end = self.spans[document].tolist()
        end -= self.objective == "clm"
        start = first + int(i - self.first_block[document]) * self.max_len
        L = int(self.lengths[i])
        if epoch is None:
            L = min(L, end - start)
        else:
            start += int(self.epoch_moves(epoch)[i])
            start = max(first, min(end - L, start))
        if self.objective == "clm":
            ids = self.tokens[start : start + L + 1].astype(np.int64)
            return ids[:-1], ids[1:]
        ids = self.tokens[start : start + L].astype(np.int64)
        ids[:1] = self.tokens[first : first + 1]
        draw = np.random.default_rng((self.seed, 0 if epoch is None else epoch + 1, i)).random(L)
        draw[0] = 1.0
        at_least_one = (draw == draw.min()) & (L > 1)
        masked = (draw < self.mask_prob) | at_least_one
        return np.where(masked, self.mask_id, ids), np.where(masked, ids, IGNORE)

    def epoch_moves(self, epoch):
        if epoch not in self.moves:
            rng = np.random.default_rng((self.seed, epoch))
            half = self.max_len // 2
            moves = rng.integers(-half, half, len(self), np.int32, endpoint=True)
            self.moves = dict([*self.moves.items(), (epoch, moves)][-2:])
        return self.moves[epoch]

    def batch(self, epoch, indices, shape=None):
        """clm: inputs (tokens (T,), cu_seqlens), or, in training on blocks of one length, (tokens,
        None, length); targets (T,). mlm: inputs (tokens, cu_seqlens, None, query_index (M,)), and
        targets (M,), of what is masked only."""
        epochs = np.broadcast_to(epoch, len(indices))
        blocks = [self.block(i, e) for i, e in zip(indices, epochs)]
        tokens, cu_seqlens = pack([ids for ids, _ in blocks], shape)
        targets = torch.from_numpy(np.concatenate([targets for _, targets in blocks]))
        n_tokens = len(targets)
        if self.objective == "mlm":
            query_index = (targets != IGNORE).nonzero()[:, 0]
            n_targets = len(query_index)
            targets = targets[query_index]
            if shape and shape.few_sizes:  # filled up by token 0, with targets that do not count
                unit = math.ceil(shape.n_tokens * self.mask_prob / 7.5)  # nearly always 8 of them
                fill = -n_targets % unit
                query_index = F.pad(query_index, (0, fill))
                targets = F.pad(targets, (0, fill), value=IGNORE)
            inputs = tokens, cu_seqlens, None, query_index
            return Batch(inputs, targets, n_targets, n_tokens)
        targets = F.pad(targets, (0, len(tokens) - n_tokens), value=IGNORE)
        inputs = tokens, cu_seqlens
        if epoch is not None and self.same_length:
            inputs = tokens, None, self.max_len
        return Batch(inputs, targets, n_tokens, n_tokens)

    def empty_batch(self):
        tokens, cu_seqlens = pack([np.zeros(self.max_len, np.int64)])
        if self.objective == "mlm":
            none = torch.zeros(0, dtype=torch.int64)
            return Batch((tokens, cu_seqlens, None, none), none, 0, 0)
        inputs = (tokens, None, self.max_len) if self.same_length else (tokens, cu_seqlens)
        return Batch(inputs, torch.full_like(tokens, IGNORE), 0, 0)


class Mixture(LanguageBlocks):
    """Several LanguageBlocks, each with a share of the tokens that are trained on.

    An epoch has as many blocks as all of them. Each corpus is shuffled and read through by itself,
    one with a larger share more often; what is in a batch is a function of (seed, step) all the
    same.
    """

    def __init__(self, parts, shares):
        self.parts = parts
        first = parts[0]
        self.objective, self.max_len = first.objective, first.max_len
        self.ends = np.cumsum([len(part) for part in parts]).tolist()
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.labels = np.broadcast_to(np.int64(0), len(self))
        self.same_length = all(part.same_length for part in parts)
        claims = [share / part.lengths.mean() for part, share in zip(parts, shares)]
        counts = np.cumsum(claims) / sum(claims) * len(self)
        self.counts = np.diff(counts.round().astype(int), prepend=0).tolist()  # blocks an epoch

    def block(self, i, epoch=None):
        part = bisect.bisect_right(self.ends, i)
        return self.parts[part].block(i - self.ends[part] + len(self.parts[part]), epoch)

    def order(self, seed, epoch):
        indices, epochs = [], []
        for number, (part, end, count) in enumerate(zip(self.parts, self.ends, self.counts)):
            read = np.arange(epoch * count, (epoch + 1) * count)  # since the run began
            own_epoch, place = np.divmod(read, len(part))
            epochs.append(own_epoch)
            for e in np.unique(own_epoch):
                order = np.random.default_rng((seed, number, e)).permutation(len(part))
                indices.append(end - len(part) + order[place[own_epoch == e]])
        shuffled = np.random.default_rng((seed, epoch)).permutation(len(self))
        return np.concatenate(indices)[shuffled], np.concatenate(epochs)[shuffled]
