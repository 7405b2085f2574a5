"""What a GPU makes of this code, beside its peers: `python bench.py gpu`.

First the tests that need CUDA; then three cases on made-up texts and random weights, each beside a
peer with the same sizes, batches and number of steps: MiniLM with 32 short texts a batch and
BERT-base with 64 texts of 128 tokens, beside Hugging Face's Trainer; and GPT-2 with 124 million
weights, beside nanoGPT's settings in plain PyTorch (compiled, fused AdamW, blocks of 1,024). Prints
a table, and writes it as out/bench/gpu.json. `--tiny=True` runs the same with tiny models on any
machine, to see that it works.
"""
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from configurator import write_json

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
import train
from batches import open_split
from examples import ceil_div
from sources import rebuild_command
from speed import Profile
from tasks import autocast

OUT = Path("out/bench")
N_WARM = 10  # steps of a peer that do not count
WAITS = "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"


@dataclasses.dataclass
class Case:
    """A comparison. sizes: of the model; length: the tokens of a text, at most if ragged."""
    name: str
    peer: str
    sizes: dict
    vocab_size: int
    length: int
    batch_size: int
    ragged: bool = False


def cases(tiny):
    if tiny:
        sizes = {"n_layer": 2, "d_model": 64, "n_head": 2}
        return [Case("BERT", "trainer", sizes, 2000, 16, 8, ragged=True),
                Case("GPT-2", "nanogpt", sizes, 2000, 32, 4)]
    minilm = {"n_layer": 6, "d_model": 384, "n_head": 12}
    base = {"n_layer": 12, "d_model": 768, "n_head": 12}
    return [Case("MiniLM", "trainer", minilm, 30522, 24, 32, ragged=True),
            Case("BERT-base", "trainer", base, 30522, 128, 64),
            Case("GPT-2 124M", "nanogpt", base, 50257, 1024, 64)]


def main(options, run_alone):
    """options: of the command line; run_alone(name, options, seed) → a contender's figures."""
    tiny = "--tiny=True" in options
    OUT.mkdir(parents=True, exist_ok=True)
    card, tests_pass = "no GPU", None
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        tests = Path(__file__).parent / "tests"
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(tests)])
        tests_pass = done.returncode == 0
    print(card)
    table = []
    for case in cases(tiny):
        given = prepare(case, n_steps=20 if tiny else 200)
        ours = "train" if case.peer == "nanogpt" else "finetune"
        for name in (ours, case.peer):
            found = run_alone(name, given, 1)
            found = {key: x for key, x in found.items() if x == x}  # NaN: not measured
            table.append({"case": case.name, "contender": name, **found})
            print(f"{case.name:11} {name:9} " + "  ".join(
                f"{key} {value:.4g}" for key, value in found.items()), flush=True)
        table[-2]["waits_a_step"] = count_waits(ours, given, run_alone)
    write_json(OUT / "gpu.json", {"card": card, "torch": torch.__version__,
                                  "tests_pass": tests_pass, "rows": table})
    print(f"{OUT}/gpu.json")


def prepare(case, n_steps):
    """Write texts, a tokenizer and random weights of a case; returns the options of its runs."""
    folder = OUT / case.name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{i}" for i in range(case.vocab_size - len(special))]
    vocabulary = {token: i for i, token in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[MASK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    n_texts = case.batch_size * n_steps
    words = np.array(words)
    with open(folder / "train.jsonl", "w") as file:
        for i in range(n_texts + 2 * case.batch_size):
            n_words = case.length - 1 if case.peer == "nanogpt" else case.length - 2
            if case.ragged:
                n_words = int(rng.integers(n_words // 3, n_words + 1))
            text = " ".join(words[rng.integers(len(words), size=n_words)])
            file.write(json.dumps({"text": text, "label": "ab"[i % 2]}) + "\n")
    name = f"gpu-{case.name.replace(' ', '-')}-{n_steps}"
    given = {"dataset": name, "train_file": folder / "train.jsonl", "max_len": case.length,
             "batch_size": case.batch_size, "max_steps": n_steps, "log_interval": n_steps // 4,
             "tokenizer": folder / "tokenizer.json", "test_fraction": 2 / (n_steps + 2),
             "val_fraction": 0.0}
    if torch.cuda.is_available():
        given["compile"] = True  # as in a long run
    if case.peer == "nanogpt":
        given |= {"target": "none", "objective": "clm", "mlp": "gelu", "optimizer": "adamw",
                  "lowercase": False, "test_fraction": 0.0, "val_fraction": 2 / (n_steps + 2)}
        given |= case.sizes
    else:
        save_bert(case, folder)
        del given["tokenizer"]
        given |= {"init_from": folder, "crop": None}
    return [f"--{key}={value}" for key, value in given.items()]


def save_bert(case, folder):
    import transformers as hf
    torch.manual_seed(0)
    width = case.sizes["d_model"]
    hf.BertModel(hf.BertConfig(
        vocab_size=case.vocab_size, hidden_size=width, num_hidden_layers=case.sizes["n_layer"],
        num_attention_heads=case.sizes["n_head"], intermediate_size=4 * width,
        max_position_embeddings=max(512, case.length))).save_pretrained(folder)


def count_waits(ours, given, run_alone):
    """How often a steady step of ours waits for the device, the profiler's own wait at its end
    aside."""
    n = Profile.FIRST + Profile.N_STEPS
    run_alone(ours, [*given, "--profile=True", f"--max_steps={n + 1}"], 1)
    trace = json.loads((OUT / ours / "trace.json").read_text())
    waits = sum(event.get("name") in WAITS for event in trace["traceEvents"])
    return max(0, waits - 1) / Profile.N_STEPS


def nanogpt(cfg):
    """A contender for bench.py: nanoGPT's settings in plain PyTorch; returns (seconds, nan,
    figures)."""
    import transformers as hf
    folder, meta = data.open_or_build(cfg)
    blocks = open_split(folder, meta, "train", cfg.max_len, rebuild_command(cfg), "clm")
    machine = train.Machine(cfg)
    torch.manual_seed(cfg.seed)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=64 * ceil_div(meta["vocab_size"], 64), n_positions=cfg.max_len,
        n_embd=cfg.d_model, n_layer=cfg.n_layer, n_head=cfg.n_head, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)).to(machine.device)
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    step = torch.compile(model) if machine.device.type == "cuda" else model
    ids = torch.from_numpy(np.stack([blocks.block(i, 0)[0] for i in range(len(blocks))]))
    batches = ids.split(cfg.batch_size)[:-1]
    size = max(1, cfg.micro_batch_tokens // cfg.max_len)
    for number in range(cfg.max_steps):
        if number == N_WARM:
            synchronize(machine.device)
            started = time.time()
        for part in batches[number % len(batches)].split(size):
            part = part.to(machine.device, non_blocking=True)
            with autocast(machine.device, machine.dtype):
                loss = step(input_ids=part, labels=part).loss
            (loss * len(part) / cfg.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(machine.device)
    seconds = time.time() - started
    n_tokens = (cfg.max_steps - N_WARM) * cfg.batch_size * cfg.max_len
    return seconds, float("nan"), {"tokens_per_s": n_tokens / seconds} | memory_of(machine.device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_of(device):
    """The most that a process has had of a GPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gib": torch.cuda.max_memory_reserved() / 2**30}


def rates(records, device):
    """tokens/s and MFU of a run of ours, of the last half of its lines."""
    lines = [r for r in records if "tokens_per_s" in r]
    steady = lines[len(lines) // 2 :]
    found = {"tokens_per_s": float(np.median([r["tokens_per_s"] for r in steady]))}
    if "mfu" in steady[0]:
        found["mfu_%"] = 100 * float(np.median([r["mfu"] for r in steady]))
    return found | memory_of(device)
