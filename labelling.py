"""New files for a Classifier (predict.py): their rows, read as the run's own files were, and what
is written of them."""
import contextlib
import csv
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

from configurator import UserError, replacing

import numpy as np
from tqdm import tqdm

from pictures import IMAGES
from readers import has_header, named_columns
from sources import (
    data_settings,
    file_rows,
    is_hidden,
    members,
    picture_examples,
    rows,
    split_labels,
    suffix_of,
    target_of,
    value_of,
    with_built_in,
)
from values import is_missing, texts_of

FORMULA = "=", "+", "-", "@", "\t", "\r"  # what spreadsheets take for the start of one


def file_settings(clf, cfg):
    """The data settings of a checkpoint's run, with those that cfg gives, to read a new file."""
    source = with_built_in(data_settings(clf.config))
    given = {name: value for name, value in vars(cfg).items()
             if name in vars(source) and value is not None}
    if "text_pair_column" in given and not clf.pair:
        raise UserError(f"{clf.path} reads single texts: leave --text_pair_column out")
    if given.get("text_column") == [] or given.get("columns") == []:
        raise UserError("--text_column and --columns: no column is named")
    if given.get("max_row_mb", 1) < 1:
        raise UserError(f"--max_row_mb={cfg.max_row_mb} must be above 0")
    if "header" not in given and "text_column" not in given:
        given["header"] = has_header(source)
    if clf.modality == "features":
        own = clf.scaling.get("columns") or source.columns
        columns = given.get("columns")
        if columns is None or own and set(columns) == set(own):  # the same ones, in its order
            given["columns"] = own
    if clf.modality == "image":
        given["image_size"] = list(clf.model.config.image_size)
    return dataclasses.replace(source, train_file=None, **given)


def label_file(clf, cfg):
    """Write cfg.output: a row with the label and its probability for each row of cfg.input, in
    order; memory stays flat. Raises UserError."""
    if not cfg.output or Path(cfg.output).suffix not in WRITERS:
        raise UserError(f"--input needs --output=labels.csv (or {', '.join(WRITERS)})")
    check_is_other(cfg.input, cfg)
    clf.check_predicts()
    names = output_columns(clf, cfg)
    if len(set(names)) < len(names):
        raise UserError(f"--keep={cfg.keep}: two columns of the output would have one name: "
                        f"{names[:20]}")
    n = n_empty = 0
    left_out = Counter()
    with replacing(cfg.output) as temporary, tqdm(unit=" rows", delay=1) as bar:
        with WRITERS[temporary.suffix](temporary, names, cfg) as write:
            for chunk in chunks(input_rows(clf, cfg, left_out)):
                is_empty = [is_missing(value) for _, value, _ in chunk]
                results = clf([value for _, value, _ in chunk])
                write([row_of(result, where, kept, cfg, empty)
                       for (where, _, kept), result, empty in zip(chunk, results, is_empty)])
                n += len(chunk)
                n_empty += sum(is_empty)
                bar.update(len(chunk))
        if not n:
            raise UserError(f"{cfg.input}: holds no rows")
    what = "label" if clf.label_names else "value"
    note = f" ({n_empty} of them empty, which get no {what})" if n_empty else ""
    if left_out:
        note += f"; {left_out.total()} left out, that could not be read (--drop_bad_rows)"
    print(f"{n} rows labelled{note}: {cfg.output}")
    if clf.multilabel:
        how = ("of 0.5; eval.py fits better ones on val" if (clf.thresholds == 0.5).all() else
               "that eval.py fitted on val")
        print(f"labels are given from probabilities {how}")
    if clf.n_cut:
        print(f"{clf.n_cut} texts are longer than max_len={clf.max_len}: their starts were read "
              "(--long)")


def output_columns(clf, cfg):
    names = [str(column) for column in cfg.keep]
    if cfg.where:
        names.insert(0, "where")
    if not clf.label_names:
        return [*names, "value"]
    names += ["label", "probability"]
    if cfg.probabilities:
        names += [f"p_{name}" for name in clf.label_names]
    return names


def input_rows(clf, cfg, left_out):
    """Yield (where, value, the columns to keep) of each row of cfg.input, blank ones too; those
    that cannot be read are counted in left_out, a Counter."""
    source = file_settings(clf, cfg)
    if clf.modality == "image":
        if cfg.keep:
            raise UserError("--keep is for tables; of pictures --where=True gives the files")
        files = input_files(cfg, source, IMAGES)
        for where, pixels, _ in picture_examples(files, source):
            if pixels is None:
                left_out["rows"] += 1
            else:
                yield where, pixels, []
        return
    # of a folder each .txt is a text, of a .txt each line
    source = dataclasses.replace(source, target="none", lines=not Path(cfg.input).is_dir())
    columns, _ = named_columns(source)
    n_values = len(columns)
    setting = "text_column" if clf.modality == "text" else "columns"
    reading = dataclasses.replace(source, text_pair_column=None, **{setting: columns + cfg.keep})
    for name, opener in input_files(cfg, source, (".txt",)):
        if cfg.keep and suffix_of(name) == ".txt":
            raise UserError(f"{name}: has no columns to --keep")
        for where, fields, _ in file_rows(name, opener, reading):
            if fields is None:
                left_out["rows"] += 1
                continue
            if not fields and clf.modality != "text":
                raise UserError(f"{where}: is blank, where numbers are needed; delete the line")
            values = fields[:n_values] or [""] * n_values
            if suffix_of(name) == ".txt" and values[0].startswith("__label__"):
                values = [re.sub(r"^(__label__\S+\s+)+", "", values[0])]  # as fastText trains on
            value = value_of(values, where, source)
            if value is None:
                left_out["rows"] += 1
            else:
                yield where, value, fields[n_values:] or [""] * len(cfg.keep)


def input_files(cfg, source, suffixes):
    """The files to read; of a folder all in it, however deep, that have one of the suffixes. Raises
    UserError if cfg.output is one of them."""
    folder = Path(cfg.input)
    if not folder.is_dir():
        found = members(cfg.input, source.data_dir)
    else:
        files = [file for file in sorted(folder.rglob("*"))
                 if file.suffix.lower() in suffixes and not is_hidden(file.relative_to(folder))]
        if not files:
            raise UserError(f"{cfg.input}: holds no {', '.join(suffixes)} files")
        found = [(str(file), lambda file=file: open(file, "rb")) for file in files]
    for name, _ in found:
        check_is_other(name, cfg)
    return found


def check_is_other(file, cfg):
    if Path(file).resolve() == Path(cfg.output).resolve():
        raise UserError(f"--output={cfg.output} is the input, which it would replace")


def row_of(result, where, kept, cfg, is_empty):
    """A row of cfg.output: a list of text and numbers."""
    row = [where, *kept] if cfg.where else list(kept)
    if "value" in result:
        return [*row, None if is_empty else result["value"]]
    label, probability = result["label"], round(result["probability"], 6)
    probabilities = [round(p, 6) for p in result["probabilities"].values()]
    if is_empty:
        label, probability, probabilities = "", None, [None for _ in probabilities]
    row += [label, probability]
    return row + probabilities if cfg.probabilities else row


@contextlib.contextmanager
def csv_writer(path, names, cfg):
    digits = ".9g" if names[-1] == "value" else ".6f"  # probabilities are rounded
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)

        def write(rows):
            for row in rows:
                if cfg.spreadsheet:
                    row = [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA)
                           else cell for cell in row]
                table.writerow(format(cell, digits) if isinstance(cell, float) else cell
                               for cell in row)
        write([names])
        yield write


@contextlib.contextmanager
def jsonl_writer(path, names, cfg):
    with open(path, "w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(
            json.dumps(dict(zip(names, row)), ensure_ascii=False) + "\n" for row in rows)


@contextlib.contextmanager
def parquet_writer(path, names, cfg):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{cfg.output}: needs a package that is not here: pip install "
                        "pyarrow") from None
    n_text = len(cfg.keep) + cfg.where + ("value" != names[-1])  # of classes, the label is text
    schema = pyarrow.schema([(name, pyarrow.string() if i < n_text else pyarrow.float64())
                             for i, name in enumerate(names)])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        yield lambda rows: file.write_table(
            pyarrow.table([list(column) for column in zip(*rows)], schema=schema))


WRITERS = {".csv": csv_writer, ".jsonl": jsonl_writer, ".parquet": parquet_writer}


def chunks(found):
    """Lists of up to 4096 rows, or a million characters or numbers."""
    chunk, size = [], 0
    for row in found:
        chunk.append(row)
        value = row[1]
        size += value.size if isinstance(value, np.ndarray) else sum(map(len, texts_of(value)))
        if len(chunk) == 4096 or size > 1_000_000:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def labelled_examples(clf, file, cfg):
    """The examples of a labelled file, to evaluate a checkpoint on. Raises UserError for a label
    that the checkpoint does not know."""
    source = file_settings(clf, cfg)
    values, targets = [], []
    n_left_out = 0
    for where, value, label in rows(file, source):
        if is_missing(value) or label == "" and source.target != "labels":
            if cfg.drop_bad_rows:
                n_left_out += 1
                continue
            raise UserError(f"{where}: the text or the label is empty; mend the row, or leave such "
                            "rows out with --drop_bad_rows=True")
        unknown = set(split_labels(label, source)) - set(clf.label_names)
        if clf.label_names and unknown:
            if cfg.drop_bad_rows:
                n_left_out += 1
                continue
            raise UserError(f"{where}: label {min(unknown)!r} is none that {clf.path} knows: "
                            f"{clf.label_names[:20]}; leave such rows out with "
                            "--drop_bad_rows=True")
        target = target_of(label, where, clf.label_names, source)
        values.append(value)
        targets.append(list(target) if isinstance(target, bytes) else target)
    if not values:
        raise UserError(f"{file}: holds no examples")
    if n_left_out:
        print(f"{file}: {n_left_out} rows are left out (--drop_bad_rows)")
    labels = np.array(targets)
    if not clf.label_names:
        scaling = clf.scaling
        labels = (labels - scaling["target_mean"]) / scaling["target_std"]
        labels = labels.astype(np.float32)
    return clf.examples(values, labels)
