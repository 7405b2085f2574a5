"""Words out of a language model: sampled from left to right, or filled in where they are masked.

    python predict.py out/shakespeare_char --prompt="ROMEO:" --temperature=0.8 --top_k=50
    python predict.py out/pretrain_mlm --fill="The [MASK] fell sharply"

A token's keys and values are kept in each layer, so that the next token costs one token's work.
"""
import re
import sys
import time

from configurator import UserError

import torch

from format import END_TOKENS, mask_token
from model import at_least_float32


class CachedLayout:
    """The next tokens of one document, whose earlier tokens' keys and values are kept: a layout for
    model.py, as PackedLayout is."""
    same_length, segments, valid, cached = True, None, None, True

    def __init__(self, config, length, device, dtype):
        c = config
        self.group = c.n_head // (c.n_kv_head or c.n_head)  # heads that share a key and a value
        shape = 2, c.n_layer, 1, c.n_head // self.group, min(length, c.max_len), c.head_width
        self.keys, self.values = torch.empty(shape, device=device, dtype=dtype)
        self.n_read = 0  # tokens so far, without those that are read now
        self.position = None  # (L,) of those that are read now
        self.layer = 0  # that comes next

    def read(self, n_tokens):
        """Begin to read the next n_tokens tokens."""
        self.n_read = 0 if self.position is None else self.n_read + len(self.position)
        self.position = torch.arange(self.n_read, self.n_read + n_tokens, device=self.keys.device)
        self.layer = 0

    def add_positions(self, x, table):
        return x + table(self.position)

    def pad(self, qkv):
        """(L, 3, H, d) → q (1, H, L, d), and k and v of all tokens so far, (1, H, S, d)."""
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]
        k, v = k[:, :: self.group], v[:, :: self.group]
        end = self.n_read + len(self.position)
        keys, values = self.keys[self.layer, :, :, :end], self.values[self.layer, :, :, :end]
        keys[:, :, self.n_read :] = k
        values[:, :, self.n_read :] = v
        self.layer += 1
        if self.group > 1:
            keys, values = (x.repeat_interleave(self.group, 1) for x in (keys, values))
        return q, keys, values, None

    def unpad(self, y):
        """(1, H, L, d) → (L, H, d)."""
        return y[0].transpose(0, 1)


@torch.no_grad()
def generate(model, ids, n_new, temperature=1.0, top_k=None, top_p=None, seed=1, use_cache=True):
    """Yield n_new token ids that continue `ids`, a list of at least one and at most
    model.config.max_len. When the text is longer than that, the model goes on from its last half.

    temperature: of the softmax; 0: always the likeliest token. top_k, top_p: see `sample`.
    use_cache=False computes all tokens anew for each one; the result is the same.
    """
    c = model.config
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    context = list(ids)
    layout = None
    for _ in range(n_new):
        if len(context) > c.max_len:
            context = context[-(c.max_len // 2 + 1) :]
            layout = None
        unread = context[-1:]
        if layout is None or not use_cache:
            unread = context
            length = len(context) + n_new
            layout = CachedLayout(c, length, device, model.embedding.weight.dtype)
        layout.read(len(unread))
        x = model.embedding(torch.tensor(unread, device=device))
        x = model.trunk(x, layout, torch.tensor([len(unread) - 1], device=device))
        logits = (x @ (model.lm_head or model.embedding).weight.T)[0]
        context.append(sample(logits.cpu(), temperature, top_k, top_p, generator))
        yield context[-1]


def sample(logits, temperature, top_k, top_p, generator):
    """A token drawn by its logits (V,).

    top_k: of the k likeliest only. top_p: only of the fewest likeliest whose probabilities add up
    to p (nucleus sampling, Holtzman et al. 2020).
    """
    logits = at_least_float32(logits).double()
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / max(temperature, 1e-9)  # the likeliest stays at 0
    p, tokens = logits.softmax(0).sort(descending=True, stable=True)
    p = p[:top_k] / p[:top_k].sum()
    if top_p is not None:
        p = p[: int((p.cumsum(0) - p < top_p).sum())]
    return int(tokens[torch.multinomial(p, 1, generator=generator)])


def print_samples(path, model, tokenizer, objective, cfg):
    """Print cfg.num_samples continuations of cfg.prompt, each word as soon as it is there."""
    for name, allowed in (("temperature", cfg.temperature >= 0),
                          ("top_k", cfg.top_k is None or cfg.top_k > 0),
                          ("top_p", cfg.top_p is None or 0 < cfg.top_p <= 1),
                          ("max_new_tokens", cfg.max_new_tokens > 0),
                          ("num_samples", cfg.num_samples > 0),
                          ("seed", 0 <= cfg.seed <= 2**40)):
        if not allowed:
            limits = {"temperature": "0 or more", "top_p": "above 0 and at most 1",
                      "seed": "0 or more, up to 2^40"}
            raise UserError(f"--{name}={getattr(cfg, name)} must be {limits.get(name, 'above 0')}")
    if objective != "clm":
        raise UserError(f"{path} fills in what is masked: give --fill=… with its mask token")
    ids = tokenizer.encode(cfg.prompt).ids
    ends = {tokenizer.token_to_id(name) for name in END_TOKENS} - {None}
    begin = tokenizer.token_to_id("<|endoftext|>")  # GPT-2's: it begins a text, too
    if not ids and begin is not None:
        ids = [begin]
    if not ids:
        raise UserError(f"{path}: give a --prompt that is not empty")
    if len(ids) > model.config.max_len:
        raise UserError(f"--prompt has {len(ids)} tokens, and {path} reads {model.config.max_len} "
                        "at the most: shorten it")
    started = time.monotonic()
    n_tokens = 0
    for i in range(cfg.num_samples):
        if cfg.num_samples > 1:
            print(f"--- sample {i + 1}")
        print(cfg.prompt, end="", flush=True)
        shown = len(tokenizer.decode(ids))
        new = []
        for token in generate(model, ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k,
                              cfg.top_p, cfg.seed + i):
            n_tokens += 1
            if token in ends:
                break
            new.append(token)
            text = tokenizer.decode(ids + new)
            if not text.endswith("\ufffd"):  # else a character of which bytes are missing
                print(text[shown:], end="", flush=True)
                shown = len(text)
        print(flush=True)
    rate = n_tokens / (time.monotonic() - started)
    print(f"{n_tokens} tokens, {rate:.0f} a second", file=sys.stderr)


@torch.no_grad()
def print_fillings(path, model, tokenizer, objective, text, n_best=5):
    """Print the likeliest tokens for each masked one in a text."""
    if objective != "mlm":
        raise UserError(f"{path} reads from left to right: give --prompt")
    if getattr(tokenizer.pre_tokenizer, "add_prefix_space", False):
        text = re.sub(r"\s+(?=\[MASK\])", "", text)  # a word's token holds the blank before it
    ids = tokenizer.encode(text).ids
    mask = mask_token(tokenizer)
    places = [i for i, token in enumerate(ids) if token == tokenizer.token_to_id(mask)]
    if not places:
        raise UserError(f"--fill={text!r} masks nothing: write {mask} where a word is to be found")
    if len(ids) > model.config.max_len:
        raise UserError(f"--fill has {len(ids)} tokens, and {path} reads {model.config.max_len} at "
                        "the most: shorten it")
    tokens = torch.tensor(ids, device=model.embedding.weight.device)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=tokens.device)
    query_index = torch.tensor(places, device=tokens.device)
    for p in model(tokens, cu_seqlens, None, query_index).float().softmax(1):
        best, words = p.topk(n_best)
        print("  ".join(f"{tokenizer.decode([word]).strip()} {share:.3f}"
                        for word, share in zip(words.tolist(), best.tolist())), flush=True)
