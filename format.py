"""What a data set on disk holds, checked before it is believed: it may be torn, or a stranger's.

batches.py says at its top which files there are.
"""
import hashlib
import math
from typing import Literal

from configurator import UserError, mismatch, read_json

import numpy as np
from tokenizers import Tokenizer

FORMAT = 3
SPLITS = "train", "val", "test"
META = {  # what meta.json holds, for configurator.mismatch
    "format": int, "kind": Literal["text", "image", "features"], "dataset": str,
    "task": Literal["classification", "multilabel", "regression", "none"],
    "label_names": list[str], "dtype": Literal["uint8", "uint16", "uint32", "float32"],
    "vocab_size": int, "shape": list[int], "build": dict,
    "scaling": {"*": float | list[float] | list[str | int]},
    "source": {"*": str}, "source_sha256": {"*": str}, "removed": {"*": int},
    "conflicting_labels": int, "overlaps": {"*": int}, "splits": {"train": {}, "*": {
        "examples": int}}, "sha256": {"*": str}}
META_OF_TASK = {
    "classification": {"splits": {"*": {"per_class": list[int]}}},
    "multilabel": {"splits": {"*": {"per_class": list[int]}}},
    "regression": {"splits": {"*": {"target_quantiles": list[float]}},
                   "scaling": {"target_mean": float, "target_std": float}},
    "none": {}}
META_OF_PAIRS = {"pair": {"n_prefix": int, "n_middle": int, "n_suffix": int, "segments": bool}}
META_OF_TEXT = {"mask_id": int | None, "n_suffix": int, "tokenizer_sha256": str,
                "splits": {"*": {"tokens": int, "bytes": int, "length_quantiles": list[int]}}}


def read_meta(folder, rebuild):
    """meta.json of a data set, or None where there is no folder. Raises UserError for an incomplete
    one.

    rebuild: the command that builds the data set anew, for messages.
    """
    if not folder.exists():
        return None
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError):
        raise UserError(f"{folder} is not a whole data set (no readable meta.json): name another "
                        f"with --dataset=NAME, or rebuild it with: {rebuild}") from None
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder} has format {meta.get('format')}, this code reads {FORMAT}; "
                        f"rebuild it with: {rebuild}")
    wrong = mismatch(meta, META) or mismatch(meta, META_OF_TASK[meta["task"]])
    if not wrong and meta["kind"] == "text":
        wrong = mismatch(meta, META_OF_TEXT | (META_OF_PAIRS if "pair" in meta else {}))
    elif not wrong and len(meta["shape"]) != {"image": 3, "features": 1}[meta["kind"]]:
        wrong = "shape"
    if wrong:
        raise UserError(f"{folder}/meta.json is damaged: its {wrong} is missing or not what it "
                        f"should be; rebuild the data set with: {rebuild}")
    return meta


def damaged(path, rebuild):
    """The error for a file that is not the one that was built."""
    return UserError(f"{path} is missing, truncated or altered (it is not what meta.json says); "
                     f"rebuild the data set with: {rebuild}")


# after which a language model's text is over
END_TOKENS = "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>"


def mask_token(tokenizer):
    """What a tokenizer calls its mask, None where it has none."""
    names = "[MASK]", "<mask>"
    return next((name for name in names if tokenizer.token_to_id(name) is not None), None)


def special_around(tokenizer):
    """How many special tokens a tokenizer puts before a text, and behind it."""
    special = tokenizer.encode("a").special_tokens_mask
    return [*special, 0].index(0), [*special[::-1], 0].index(0)


def pair_template(tokenizer):
    """How a tokenizer joins two texts: {"n_prefix", "n_middle", "n_suffix": special tokens before
    the first, between them, behind the second; "segments": whether its type ids are 1 from the
    second text on, as BERT's}. Raises UserError where it does not join them."""
    encoding = tokenizer.encode("a", "a")
    text = encoding.sequence_ids  # 0 and 1; None of special tokens
    if 0 not in text or 1 not in text:
        raise UserError("the tokenizer does not join pairs of texts")
    end_of_first = len(text) - text[::-1].index(0)
    second = text.index(1)
    types = encoding.type_ids
    segments = types == [int(i >= second) for i in range(len(text))]
    return {"n_prefix": text.index(0), "n_middle": second - end_of_first,
            "n_suffix": text[::-1].index(1), "segments": segments}


def read_tokenizer(folder, meta, rebuild):
    """tokenizer.json as text, None where the data set has none. Raises UserError where it is not
    the one that was built."""
    path = folder / "tokenizer.json"
    if meta["kind"] != "text":
        return None
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != meta["tokenizer_sha256"]:
        raise UserError(f"{path} is missing or altered (its SHA-256 is not the one in meta.json); "
                        f"rebuild the data set with: {rebuild}")
    try:
        size = Tokenizer.from_str(content.decode()).get_vocab_size()
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is no tokenizer: {error}; rebuild the data set with: "
                        f"{rebuild}") from None
    if size != meta["vocab_size"]:
        raise UserError(f"{path} has {size} tokens, meta.json says {meta['vocab_size']}; rebuild "
                        f"the data set with: {rebuild}")
    return content.decode()


def check_text(tokens, starts, n, meta):
    """Raise ValueError unless `starts` cuts the tokens into n documents, none shorter than what
    meta says that each ends in, and every token is in the vocabulary."""
    if len(starts) != n + 1 or starts[0] != 0 or starts[-1] != len(tokens):
        raise ValueError("its .idx does not end where its .bin does")
    n_prefix = meta.get("n_prefix", 0)
    shortest = np.diff(starts).min()
    if not isinstance(n_prefix, int) or min(n_prefix, meta["n_suffix"], shortest - 1) < 0:
        raise ValueError("its .idx or meta.json is damaged")
    if n_prefix + meta["n_suffix"] > shortest:
        raise ValueError("its .idx holds documents without tokens")
    if max(tokens.max(), meta["mask_id"] or 0) >= meta["vocab_size"]:
        raise ValueError("it holds tokens that the vocabulary lacks")


def check_pairs(first_lengths, starts, pair):
    """Raise ValueError unless each document has room for a first text of its length."""
    n_special = pair["n_prefix"] + pair["n_middle"] + pair["n_suffix"]
    room = np.diff(starts) - n_special
    if (len(first_lengths) != len(room) or (first_lengths < 0).any()
            or (first_lengths > room).any() or min(pair.values()) < 0):
        raise ValueError("its .first does not fit its .idx")


def check_labels(labels, n, n_classes, task):
    """Raise ValueError unless there are n labels that can be what they say."""
    highest = {"classification": n_classes - 1, "multilabel": 1, "regression": math.inf}[task]
    if len(labels) != n or not n:
        raise ValueError(f"{len(labels)} labels for {n} examples")
    if not np.isfinite(labels).all() or labels.max() > highest:
        raise ValueError("it holds labels that are none")
    if task != "regression" and labels.min() < 0:
        raise ValueError("it holds labels below 0")
