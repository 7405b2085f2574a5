"""Learning from a larger model (Hinton et al. 2015): a teacher's logits for the texts of train, for
unlabelled texts, and for runs of words of train's texts (Tang et al. 2019 make such text, too).

    python finetune.py --dataset=reviews … --out_dir=out/big
    python train.py config/bow.py --dataset=reviews … --teacher=out/big --teacher_spans=5

The teacher reads the texts themselves, so its tokenizer may be another one. It is asked once: its
logits are kept in data_dir/teachers.
"""
import dataclasses
import hashlib
from pathlib import Path

from configurator import UserError, file_sha256, replacing

import numpy as np
import torch
from tokenizers import Tokenizer

import data
from examples import Taught
from predict import Classifier
from sources import resolve, rows
from tasks import bf16_is_native, open_device
from weights import checkpoint_file


def teach(train_set, cfg, folder, meta, tokenizer_json):
    """train_set (PackedText) with the teacher's logits, and with further texts that it labels."""
    source = resolve(cfg)
    if source.kind != "text" or source.text_pair_column is not None:
        raise UserError("--teacher is for single texts")
    path = checkpoint_file(cfg.teacher)
    if not path.exists():
        raise UserError(f"--teacher={cfg.teacher}: there is no such checkpoint")
    built = dataclasses.replace(cfg, val_fraction=meta["build"]["val_fraction"])
    texts, labels = data.train_examples(built)
    if labels != train_set.labels.tolist():
        raise UserError(f"{folder}: its source says other labels than when it was built; rebuild "
                        "it with --overwrite=True")
    more = unlabelled_texts(cfg, source) + spans(texts, cfg.teacher_spans, cfg.split_seed)
    logits = known_logits(path, cfg, meta["label_names"], texts + more)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    ids = [encoding.ids or [0] for encoding in tokenizer.encode_batch_fast(more)]
    return Taught(train_set.with_unlabelled(ids), logits)


def unlabelled_texts(cfg, source):
    """The texts of cfg.unlabelled_file, read as train was, but for the label."""
    if not cfg.unlabelled_file:
        return []
    source = dataclasses.replace(source, train_file=None, target="none", lines=True)
    return [text for _, text, _ in rows(cfg.unlabelled_file, source) if text]


def spans(texts, n, seed):
    """n random runs of words of each text, of 1 to all its words, without repetitions."""
    rng = np.random.default_rng((seed, n))
    found = {}
    for text in texts:
        words = text.split()
        for _ in range(n):
            length = rng.integers(1, len(words), endpoint=True)
            start = rng.integers(0, len(words) - length, endpoint=True)
            found[" ".join(words[start : start + length])] = True
    known = set(texts)
    return [text for text in found if text not in known]


def known_logits(path, cfg, label_names, texts):
    """The teacher's logits (N, C) float32 of texts, its classes in the order of label_names, from
    the file that holds them, or made and kept."""
    digest = hashlib.sha256(file_sha256(path).encode())
    for text in (*label_names, *texts):
        digest.update(text.encode() + b"\0")
    file = Path(cfg.data_dir) / "teachers" / f"{digest.hexdigest()[:16]}.npy"
    if file.exists():
        logits = np.load(file, allow_pickle=False)
        if logits.shape == (len(texts), len(label_names)) and np.isfinite(logits).all():
            return torch.from_numpy(logits)
    device = open_device(cfg.device)
    dtype = torch.bfloat16 if bf16_is_native(device) else torch.float32
    clf = Classifier(path, cfg.device, dtype)
    if clf.modality != "text" or clf.multilabel or clf.pair:
        raise UserError(f"--teacher={cfg.teacher}: it does not tell classes of single texts apart")
    if sorted(clf.label_names) != sorted(label_names):
        raise UserError(f"--teacher={cfg.teacher}: it knows the labels {clf.label_names[:20]}, the "
                        f"data has {label_names[:20]}")
    print(f"asking {path} for {len(texts):,} texts", flush=True)
    order = [clf.label_names.index(name) for name in label_names]
    logits = clf.logits(clf.examples(texts)).numpy()[:, order]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        np.save(temporary, logits)
    return torch.from_numpy(logits)
