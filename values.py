"""What the fields of a row mean: labels, clean text, numbers."""
import ast
import functools
import io
import json
import math
import re
import tokenize
import unicodedata

from configurator import UserError

import numpy as np

# --------------------------------------------------------------------------------------------------
# Labels


def scalar(value, where, column):
    """A value of JSON as text; of null and NaN "". Raises UserError for lists and objects."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, (list, tuple, dict, bytes)):
        what = "bytes" if isinstance(value, bytes) else "a list or an object"
        raise UserError(f"{where}: {column!r} is {what}, not a single value (several labels of a "
                        "text are for --target=labels)")
    return str(value)


def label_of(cells, where, cfg):
    """A row's label as text: of a list the elements, of several columns those that are 1."""
    if not cells:
        return ""
    if isinstance(cfg.label_column, list):
        given = [name for name, cell in zip(cfg.label_column, cells)
                 if is_one(scalar(cell, where, name), where, name)]
        return join_labels(given, where, cfg)
    (cell,) = cells
    if cfg.target == "labels":
        if isinstance(cell, str) and looks_like_list(cell.strip(), cfg.label_separator):
            cell = written_list(cell.strip(), where)
        if isinstance(cell, (list, tuple)):
            names = [scalar(name, where, "label") for name in cell]
            return join_labels([name for name in names if name], where, cfg)
    return scalar(cell, where, cfg.label_column)


def texts_of(value):
    """The texts of an example: itself, or both of a pair."""
    return value if isinstance(value, tuple) else (value,)


def looks_like_list(cell, separator):
    """In brackets or braces; in parentheses, in which a name may stand, only with a separator."""
    if re.fullmatch(r"\(.*\)", cell, re.DOTALL):
        return separator in cell
    return bool(re.fullmatch(r"\[.*\]|\{.*\}", cell, re.DOTALL))


def written_list(cell, where):
    """The list that a cell holds as Python or JSON writes it. Raises UserError."""
    for read in (json.loads, python_list):
        try:
            found = read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            continue
        if isinstance(found, (list, tuple, set)):
            return sorted(found, key=str) if isinstance(found, set) else found
    raise UserError(f"{where}: {cell[:60]!r} is no list of labels, as Python or JSON writes one")


def python_list(cell):
    """What Python reads. Raises ValueError for strings without a comma between them, which Python
    would make one: NumPy writes arrays so."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline)]
    if (tokenize.STRING, tokenize.STRING) in zip(kinds, kinds[1:]):
        raise ValueError("a comma is missing")
    return ast.literal_eval(cell)


def is_one(cell, where, name):
    """Is a cell of a label's own column 1?"""
    cell = cell.strip().casefold()
    if cell in ("1", "1.0", "true", "yes"):
        return True
    if cell in ("", "0", "0.0", "false", "no"):
        return False
    raise UserError(f"{where}: column {name!r} is {cell!r}, where 1 or 0 says whether a text has "
                    "that label")


def join_labels(names, where, cfg):
    """Several labels as one text. Raises UserError where one holds the separator."""
    if cfg.target == "class":
        return names[0]
    for name in names:
        if cfg.label_separator in name:
            raise UserError(f"{where}: label {name!r} holds {cfg.label_separator!r}; give a "
                            "--label_separator that no label holds")
    return cfg.label_separator.join(names)


INVISIBLE = dict.fromkeys((0x200B, 0x2060, 0xFEFF))  # zero-width spaces


@functools.lru_cache(4096)
def clean_label(label):
    """Labels that look alike are alike: as clean, without zero-width spaces, blanks made one."""
    return " ".join(clean(label.translate(INVISIBLE)).split())


# --------------------------------------------------------------------------------------------------
# Text and numbers

BLANKS = dict.fromkeys((*range(11, 14), *range(28, 32)), " ")  # \v, \f and separators
CONTROL = dict.fromkeys([*range(32), 127]) | BLANKS | {9: "\t", 10: "\n"}
TRUTH_VALUES = {"true": 1.0, "false": 0.0}
MISSING_NUMBERS = {"", "na", "n/a", "nan", "?", "null", "none", "-", "#n/a"}


def clean(text):
    """NFC, \\n line ends, no control characters nor lone surrogates, no blanks at the ends."""
    if text.isascii() and text.isprintable():
        return text.strip()  # as most are: the rest takes four times as long
    text = text.encode("utf-8", "replace").decode()
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.translate(CONTROL).strip()


def is_missing(value):
    """Is there no value, or an empty text? (The second of a pair may be empty.)"""
    first = value[0] if isinstance(value, tuple) else value
    return first is None or isinstance(first, str) and not first


def to_float(text, cfg):
    """A field as a number, NaN where it says that it has none. Raises ValueError."""
    text = text.strip()
    if text.casefold() in MISSING_NUMBERS:
        return math.nan
    if "_" in text:
        raise ValueError(f"{text!r} is not a number")
    if cfg.decimal == ",":
        if "." in text and not re.fullmatch(r"[-+]?[1-9]\d{0,2}(\.\d{3})+(,\d+)?", text):
            raise ValueError(f"{text!r} has a point, and --decimal=, is set")
        text = text.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"[-+]?\d+,\d+", text):
        raise ValueError(f"{text!r} has a comma: give --decimal=, if that is the decimal point; if "
                         "it parts thousands, write the number without it")
    return float(text)


def parse_number(text, where, cfg):
    """A row's label as a number."""
    hint = ""
    try:
        value = to_float(text, cfg)
    except ValueError as error:
        value = math.nan
        hint = f" ({error})" if "--decimal" in str(error) else ""
    if not math.isfinite(value):
        raise UserError(f"{where}: label {text!r} is not a number, which --target=number "
                        f"needs{hint}")
    if abs(value) > 1e100:
        raise UserError(f"{where}: label {text!r} is too large: its square would overflow; use "
                        "another unit, or the logarithm")
    return value


def parse_numbers(fields, where, cfg):
    """The fields of a row as features (F,), float64, or pixels (C, H, W), uint8; None where one is
    missing."""
    def column_of(i):
        return f"column {cfg.columns[i]!r} of " if cfg.columns else ""
    values = []
    for field in fields:
        try:
            values.append(to_float(field, cfg))
        except ValueError as error:
            truth = TRUTH_VALUES.get(field.strip().casefold())
            if truth is not None:
                values.append(truth)
                continue
            if cfg.drop_bad_rows:
                return None
            raise UserError(f"{where}: {error}: --columns must name columns of numbers only; mend "
                            f"{column_of(len(values))}the row, or leave such rows out with "
                            "--drop_bad_rows=True; if it holds names: --header=True") from None
    x = np.array(values)
    if cfg.kind == "image":
        return parse_pixels(x, where, cfg)
    infinite = np.isinf(x)
    empty = np.isnan(x)
    index = int(np.argmin(np.isfinite(x)))
    if infinite.any() and not cfg.drop_bad_rows:
        raise UserError(f"{where}: feature {index} is infinite; mend {column_of(index)}the row, or "
                        "leave such rows out with --drop_bad_rows=True")
    if empty.any() and not cfg.impute and not cfg.drop_bad_rows:
        raise UserError(f"{where}: feature {index} is empty or NaN; mend {column_of(index)}the "
                        "row, leave such rows out with --drop_bad_rows=True, or take train's mean "
                        "with --impute=True")
    if infinite.any() or empty.any() and not cfg.impute:
        return None
    return x


def parse_pixels(x, where, cfg):
    if not cfg.image_size or math.prod(cfg.image_size) != len(x):
        raise UserError(f"{where}: {len(x)} pixels; give --image_size=[channels,height,width] with "
                        "that many")
    if not (np.isfinite(x) & (x >= 0) & (x <= 255) & (x == np.round(x))).all():
        raise UserError(f"{where}: pixels are whole numbers from 0 to 255")
    return x.astype(np.uint8).reshape(cfg.image_size)
