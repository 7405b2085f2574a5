"""The bytes of a file → rows of text fields, in any dialect.

A reader yields (where, fields, label): `where` names file and line for messages; fields is a list
of text, [] for a blank line, None for a row that is left out and counted (--drop_bad_rows); label
is text. A new file format is one function in READERS, which takes (the file's name, its binary
stream, the data settings).
"""
import contextlib
import csv
import functools
import io
import itertools
import json
import re
import sys
import zipfile
import zlib
from pathlib import Path

from configurator import UserError, say_once

from values import join_labels, label_of, scalar

# --------------------------------------------------------------------------------------------------
# Lines

BOMS = {  # longest first
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16"}


def decoded_lines(raw, name, encoding, max_row_mb, drop_damaged=False):
    """Yield (number, text) of each line of a binary stream, without a byte-order mark. A line ends
    in \\n, \\r\\n, or, as on old Macs, \\r. drop_damaged: a line that cannot be decoded is None,
    instead of an error."""
    limit = min(max_row_mb * 1_000_000, sys.maxsize)
    number = 0
    try:
        encoding = known_encoding(raw) or encoding
        if encoding.lower().startswith(("utf-16", "utf_16", "utf-32", "utf_32")):
            stream = io.TextIOWrapper(raw, encoding, newline="")
            lines = iter(lambda: stream.readline(limit), "")
        else:
            lines = byte_lines(raw, limit)
        for number, line in enumerate(lines, 1):
            if len(line) >= limit:
                raise UserError(f"{name}, line {number}: longer than {max_row_mb} MB; is the file "
                                "damaged? If not, raise --max_row_mb")
            try:
                if isinstance(line, bytes):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    line = decode(line, encoding, f"{name}, line {number}")
                if "\0" in line:
                    raise UserError(f"{name}, line {number}: holds zero bytes: is the file "
                                    "damaged, or UTF-16 without a mark (--encoding=utf-16-le)?")
            except UserError:
                if not drop_damaged:
                    raise
                line = None
            yield number, line
    except UnicodeError as error:
        raise UserError(f"{name}, line {number + 1}: not valid {encoding}: {error}; give "
                        "its --encoding") from None
    except LookupError:
        raise UserError(f"--encoding={encoding}: Python knows no encoding "
                        f"'{encoding}'") from None
    except UNREADABLE as error:
        raise unreadable(name, error) from error


UNREADABLE = OSError, EOFError, zlib.error, zipfile.BadZipFile


def unreadable(name, error):
    """A UserError: of the system, or because a file is damaged or cut short."""
    if isinstance(error, OSError) and error.errno:
        return UserError(f"{name}: cannot be read: {error.strerror}")
    problem = str(error).partition("\n")[0].rstrip(".")
    return UserError(f"{name}: cannot be read: {problem}; fetch it again, or write it anew")


def known_encoding(raw):
    """The encoding that a byte-order mark at a stream's start says, or None."""
    start = raw.peek(4)[:4]
    return next((encoding for bom, encoding in BOMS.items() if start.startswith(bom)), None)


def byte_lines(raw, limit):
    rest = b""
    while chunk := raw.readline(limit):  # up to \n, or so many bytes
        if b"\r" not in chunk[:-2] and chunk[-1:] == b"\n" and not rest:
            yield chunk
            continue
        *lines, rest = re.split(rb"(?<=\r)(?!\n)", rest + chunk)
        yield from lines
        if rest.endswith(b"\n") or len(rest) >= limit:
            yield rest
            rest = b""
    if rest:
        yield rest


def decode(line, encodings, where):
    """A line by the first of the comma-separated encodings that fits."""
    for encoding in encodings.split(","):
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            failed = error
    raise UserError(f"{where}: not valid {encoding} (byte 0x{line[failed.start]:02x} at column "
                    f"{failed.start}); save it as UTF-8, or give its --encoding")


# --------------------------------------------------------------------------------------------------
# Text


def read_txt(name, raw, cfg):
    """A document a line (--lines=True), or fastText's lines, `__label__x text`, or one document in
    all, whose label is its folder's name."""
    each_is_a_row = cfg.target == "none" and cfg.lines
    lines = decoded_lines(raw, name, cfg.encoding, cfg.max_row_mb,
                          each_is_a_row and cfg.drop_bad_rows)
    if each_is_a_row:
        for number, line in lines:
            where = f"{name}, line {number}"
            if line is None:
                yield where, None, ""
                continue
            text = line.rstrip("\r\n")
            yield where, [text] if text.strip() else [], ""
        return
    first = []  # the lines up to the first that is not blank
    for number, line in lines:
        first.append((number, line))
        if line.strip():
            break
    lines = itertools.chain(first, lines)
    is_fasttext = first and first[-1][1].lstrip().startswith("__label__")
    if cfg.target in ("class", "labels") and is_fasttext:
        yield from read_fasttext(name, lines, cfg)
    else:
        folder = Path(name.rpartition("!")[2]).parent.name  # in an archive: of its member
        yield name, ["".join(line for _, line in lines)], folder


def read_fasttext(name, lines, cfg):
    for number, line in lines:
        where = f"{name}, line {number}"
        words = line.split()
        labels = list(itertools.takewhile(lambda word: word.startswith("__label__"), words))
        labels = [label.removeprefix("__label__") for label in labels]
        n_labels = sum(word.startswith("__label__") for word in words)
        if not words:
            yield where, [], ""
        elif n_labels > len(labels):
            yield from bad_row(where, f"{where}: a label stands within the text", cfg)
        elif cfg.target == "class" and len(labels) != 1:
            problem = f"{where}: {len(labels)} labels; several are for --target=labels"
            yield from bad_row(where, problem, cfg)
        else:
            text = line.split(maxsplit=len(labels))[len(labels) :]
            yield where, text or [""], join_labels(labels, where, cfg)


def bad_row(where, problem, cfg):
    """What a reader yields for a row that cannot be used. Raises UserError unless such rows are
    left out."""
    if not cfg.drop_bad_rows:
        raise UserError(f"{problem}; mend it, or build without such rows: --drop_bad_rows=True")
    yield where, None, ""


# --------------------------------------------------------------------------------------------------
# Tables

HEADER_WORDS = {"text", "texts", "label", "labels", "class", "category", "sentence", "target",
                "sentiment", "review", "title", "content", "question", "intent", "topic", "y"}
DELIMITERS = {",": "a comma", ";": "a semicolon", "|": "a bar", "\t": "a tab"}


def read_table(name, raw, cfg, usual):
    """Fields in quotes may hold delimiters and newlines (RFC 4180)."""
    table, dialect = open_table(name, raw, cfg, usual)
    no_quotes = dialect["quoting"] == csv.QUOTE_NONE and cfg.quotechar is None
    header = has_header(cfg)
    names = None
    try:
        for row in table:
            where = f"{name}, line {table.line_num}"
            if not row or len(row) < len(names or ()) and not "".join(row).strip():
                yield where, [], ""
                continue
            if names is None:
                values, labels = column_indices(row, cfg, name)
                names, width = row, len(row)
                needed = max(values + labels) + 1
                if header:
                    continue
                if cfg.header is None and cfg.target == "none" and is_header_word(row[values[0]]):
                    raise UserError(f"{where}: is {row[values[0]]!r} the name of the column? Give "
                                    "--header=True, or --header=False if it is a text")
            if header and row == names:
                problem = f"{where}: repeats the header"
            elif any(row[width:]):  # empty fields at the end do no harm
                problem = (f"{where}: {len(row)} fields, but the first row has {width} (a text "
                           f"with {dialect['delimiter']!r} in it that is not in quotes?)")
            elif len(row) < needed:
                problem = f"{where}: {len(row)} fields where {needed} are needed"
            elif no_quotes and any(map(is_quoted, row)):
                raise UserError(f"{where}: is a field in quotes? --quotechar='\"' reads it so, "
                                "--quotechar= takes all quotes as parts of texts")
            else:
                yield from labelled_row(where, [row[i] for i in values], [row[i] for i in labels],
                                        cfg)
                continue
            yield from bad_row(where, problem, cfg)
    except csv.Error as error:
        way_out = "is a quote left open? --quotechar= takes quotes as parts of texts"
        if "limit" in str(error):
            way_out = "is a quote left open? If not, raise --max_row_mb"
        raise UserError(f"{name}, line {table.line_num}: {error} ({way_out})") from error


def open_table(name, raw, cfg, usual):
    """(a csv.reader, the dialect that it reads). Raises UserError for a setting that csv cannot
    use."""
    for setting in ("delimiter", "quotechar", "escapechar"):
        value = getattr(cfg, setting)
        none = setting == "quotechar" and value == ""
        if value is not None and not none and len(value) != 1:
            raise UserError(f"--{setting}={value} must be one character")
    csv.field_size_limit(cfg.max_row_mb * 1_000_000)
    lines = (line for _, line in decoded_lines(raw, name, cfg.encoding, cfg.max_row_mb))
    sample = list(itertools.islice(first_lines(lines), 200))
    rest = list(itertools.islice(lines, 1))  # none: the sample is all of it
    dialect = choose_dialect(sample, not rest, cfg, usual, name)
    return parse(itertools.chain(sample, rest, lines), dialect), dialect


def is_quoted(field):
    """Does a field look like one in quotes, in which quotes are doubled?"""
    return '""' in field[1:-1] and field[0] == field[-1] == '"' and len(field) > 2


def labelled_row(where, fields, cells, cfg):
    try:
        label = label_of(cells, where, cfg)
    except UserError as error:
        yield from bad_row(where, str(error), cfg)
    else:
        yield where, fields, label


def parse(lines, dialect):
    """A csv.reader. With "unescape", backslashes go that stand before a quote or a backslash."""
    options = {key: value for key, value in dialect.items() if key != "unescape"}
    if "unescape" in dialect:
        lines = (re.sub(r'\\(["\\])', lambda m: m[1].replace('"', '""'), line) for line in lines)
    return csv.reader(lines, strict=True, **options)


def first_lines(lines):
    """The lines up to 100,000 characters."""
    size = 0
    while size < 100_000 and (line := next(lines, None)) is not None:
        yield line
        size += len(line)


def choose_dialect(sample, is_all, cfg, usual, name):
    """The csv dialect of a table's first lines: of those in which the first row has the columns
    that are asked for, the most usual one, if possible one that makes all rows of one length. Said
    where it is not the usual one. By number, where delimiters could be several, none is guessed."""
    candidates = possible_dialects(sample, cfg, usual)
    of_equal_rows = [d for d in candidates if fits(sample, is_all, d, cfg)]
    of_first_row = [d for d in candidates if fits(sample[:1], True, d, cfg)]
    if is_wide(cfg) and not has_header(cfg):
        delimiters = {d["delimiter"] for d in of_equal_rows + of_first_row[:1]}
        if len(delimiters) > 1:
            raise UserError(f"{name}: its rows could be parted by "
                            f"{' or '.join(sorted(delimiters))!r}: give --delimiter")
    dialect = (of_equal_rows or of_first_row or candidates)[0]
    if dialect != candidates[0]:
        how = "quoted fields" if dialect["quoting"] == csv.QUOTE_MINIMAL else "no quotes"
        if "unescape" in dialect:
            how = "quotes escaped by a backslash"
        delimiter = DELIMITERS.get(dialect["delimiter"], dialect["delimiter"])
        say_once(f"{name}: read with {delimiter} between fields and {how} (--delimiter, "
                 "--quotechar and --escapechar say otherwise)")
    return dialect


def possible_dialects(sample, cfg, usual):
    """csv's settings for tables like this one, the most usual first. "unescape": see parse."""
    delimiters = [cfg.delimiter or usual]
    if not cfg.delimiter and is_wide(cfg):
        delimiters += [delimiter for delimiter in DELIMITERS if delimiter != usual]
    quoted = {"quoting": csv.QUOTE_MINIMAL, "quotechar": cfg.quotechar or '"'}
    unquoted = {"quoting": csv.QUOTE_NONE}
    if cfg.quotechar == "":
        ways = [unquoted]
    elif cfg.escapechar:
        ways = [quoted | {"escapechar": cfg.escapechar, "doublequote": False}]
    elif cfg.quotechar is None and usual == "\t" and not quotes_explain_all(sample):
        ways = [unquoted, quoted]
    else:
        ways = [quoted]
    if cfg.quotechar != "" and not cfg.escapechar and any('\\"' in line for line in sample):
        ways.append(quoted | {"unescape": True})
    return [{"delimiter": delimiter} | way for delimiter in delimiters for way in ways]


def quotes_explain_all(sample):
    """Is every field of a table between tabs that begins with a quote a quoted field, and does one
    hold a doubled quote, as only quoted fields do, or are all fields quoted?"""
    fields = [field for line in sample for field in line.rstrip("\r\n").split("\t")]
    quoted = [field for field in fields if field.startswith('"')]
    proper = all(re.fullmatch(r'"(?:[^"]|"")*"', field) for field in quoted)
    return proper and (any('""' in field[1:-1] for field in quoted) or len(quoted) == len(fields))


def fits(sample, is_all, dialect, cfg):
    """Do the lines make rows of one length under a dialect, with the columns that are asked for?"""
    table = parse(sample, dialect)
    rows = []
    try:
        rows.extend(row for row in table if row)
    except csv.Error:
        if is_all or table.line_num < len(sample):
            return False  # else the sample ends within a row
    try:
        column_indices(rows[0], cfg, "")
    except (UserError, IndexError):
        return False
    return len({len(row) for row in rows}) == 1


def has_header(cfg):
    if cfg.header is not None:
        return cfg.header
    values, labels = named_columns(cfg)
    return any(isinstance(column, str) for column in values + labels)


def is_wide(cfg):
    """Are columns behind the first asked for?"""
    values, labels = named_columns(cfg)
    return values + labels != [0]


def is_header_word(text):
    return text.strip().casefold() in HEADER_WORDS


def named_columns(cfg):
    """(the columns that hold the value, those of the label), as the settings name them."""
    values = cfg.text_column if cfg.kind == "text" else cfg.columns or []
    labels = [] if cfg.target == "none" else cfg.label_column
    values, labels = (columns if isinstance(columns, list) else [columns]
                      for columns in (values, labels))
    if cfg.text_pair_column is not None:
        values = [*values, cfg.text_pair_column]
    return values, labels


def column_indices(row, cfg, name):
    """Where the columns stand, by a table's first row: (the value's, the label's)."""
    values, labels = named_columns(cfg)
    header = has_header(cfg)
    settings = "--text_column" if cfg.kind == "text" else "--columns"
    if cfg.text_pair_column is not None:
        settings += ", --text_pair_column"
    if cfg.target != "none":
        settings += ", --label_column"

    def index_of(column):
        if header and row.count(column) > 1:
            raise UserError(f"{name}: {row.count(column)} columns have the name {column!r}; give "
                            "them different names")
        index = row.index(column) if header and column in row else column
        if isinstance(index, str) or not 0 <= index < len(row):
            hint = "; or give --delimiter" if len(row) == 1 else ""
            raise UserError(f"{name}: there is no column {column!r} in its first row, "
                            f"{[field[:40] for field in row]}; give its columns by name, or by "
                            f"number from 0 without a header ({settings}){hint}")
        return index
    label_indices = [index_of(column) for column in labels]
    if cfg.kind != "text" and not cfg.columns:  # all but the label's
        return [i for i in range(len(row)) if i not in label_indices], label_indices
    return [index_of(column) for column in values], label_indices


# --------------------------------------------------------------------------------------------------
# Records


def unique_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


# numbers stay as they are written
JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=str, parse_int=str)
WHITESPACE = re.compile(r"\s*")


def read_json(name, raw, cfg):
    """A JSON object a line, or an array of objects."""
    for where, record in json_records(name, raw, cfg):
        if isinstance(record, dict):
            yield from read_record(record, where, cfg)
        elif record == "":
            yield where, [], ""
        else:
            yield from bad_row(where, f"{where}: not a JSON object", cfg)


def json_records(name, raw, cfg):
    """(where, object) of each; "" of a blank line, None of what is not JSON."""
    try:
        encoding = known_encoding(raw) or cfg.encoding.split(",")[0]
        start = raw.peek(1000)[:1000].decode(encoding, "ignore")
    except (*UNREADABLE, LookupError) as error:
        raise unreadable(name, error) from error
    is_array = start.lstrip("\ufeff \t\r\n").startswith("[")
    return (array_elements if is_array else json_lines)(name, raw, cfg)


def json_lines(name, raw, cfg):
    for number, line in decoded_lines(raw, name, cfg.encoding, cfg.max_row_mb, cfg.drop_bad_rows):
        record = None
        if line is not None and not line.strip():
            record = ""
        elif line is not None:
            with contextlib.suppress(ValueError, RecursionError):
                record = JSON.decode(line)
            record = None if record == "" else record  # which stands for a blank line
        yield f"{name}, line {number}", record


def array_elements(name, raw, cfg):
    """(where, element) of each element of a JSON array, one at a time."""
    encoding = known_encoding(raw) or cfg.encoding.split(",")[0]
    stream = io.TextIOWrapper(raw, "utf-8-sig" if encoding == "utf-8" else encoding)
    waiting = ""  # what is read and not yet understood, from `position` on
    position = 0
    is_open = False
    number = 0
    while True:
        before = position = WHITESPACE.match(waiting, position).end()
        try:
            if waiting[position : position + 1] == "]" and is_open:
                if (waiting[position + 1 :] + stream.read(1000)).strip():
                    raise UserError(f"{name}: something follows the array")
                return
            if number and waiting[position : position + 1] == ",":
                position += 1
            elif number and waiting[position:]:
                raise UserError(f"{name}, element {number}: no comma before it")
            if not is_open and waiting:
                is_open = True
                position += 1  # [
                continue
            position = WHITESPACE.match(waiting, position).end()
            record, end = JSON.raw_decode(waiting, position)
            if end == len(waiting):
                raise ValueError  # a number may go on
        except UserError:
            raise
        except (ValueError, RecursionError):
            position = before
            try:
                more = stream.read(1_000_000)
            except UnicodeError as error:
                raise UserError(f"{name}: not valid {encoding}: {error}; give its one "
                                "--encoding") from None
            except UNREADABLE as error:
                raise unreadable(name, error) from None
            if not more or len(waiting) - position > cfg.max_row_mb * 1_000_000:
                raise UserError(f"{name}, element {number}: not valid JSON, or longer than "
                                f"--max_row_mb={cfg.max_row_mb}") from None
            waiting = waiting[position:] + more
            position = 0
            continue
        yield f"{name}, element {number}", record
        number += 1
        position = end


def read_parquet(name, raw, cfg):
    """Parquet, or Arrow's own files (.arrow, .feather)."""
    for where, record in parquet_records(name, raw, cfg):
        if isinstance(record, dict):
            yield from read_record(record, where, cfg)
        else:
            yield from bad_row(where, f"{where}: {record}", cfg)


def parquet_records(name, raw, cfg):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: needs a package that is not here: pip install pyarrow") from None
    try:
        if name.endswith(".parquet"):
            file = pyarrow.parquet.ParquetFile(raw)
            columns = columns_to_read(file.schema_arrow.names, name, cfg)
            batches = file.iter_batches(1000, columns=columns)
        else:
            file = pyarrow.ipc.open_file(raw)
            columns = columns_to_read(file.schema.names, name, cfg)
            batches = (file.get_batch(i).select(columns) for i in range(file.num_record_batches))
        number = 0
        for batch in batches:
            for record in records_of(batch):
                yield f"{name}, row {number}", record
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(name, error) from None


def columns_to_read(columns, name, cfg):
    """Of a table's columns those that are used; all, where one of these is not there and such rows
    are left out."""
    if twice := next((c for c in columns if columns.count(c) > 1), None):
        raise UserError(f"{name}: {columns.count(twice)} columns have the name {twice!r}; give "
                        "them different names")
    values, labels = named_columns(cfg)
    all_but_label = cfg.kind != "text" and not cfg.columns
    missing = [column for column in values + labels if column not in columns]
    if missing and not all_but_label and not cfg.drop_bad_rows:
        raise UserError(f"{name}: there is no column {missing[0]!r} among {columns[:20]} (give "
                        "--text_column and --label_column)")
    if missing or all_but_label:
        return columns
    return list(dict.fromkeys(values + labels))


def records_of(batch):
    """The rows of a pyarrow batch as dicts; an error for one that cannot be: no UTF-8, a date that
    Python has not."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for i in range(len(batch)):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield error


def read_record(record, where, cfg):
    """A dict as a row."""
    values, labels = named_columns(cfg)
    if cfg.kind != "text" and not cfg.columns:  # all but the label's
        values = [key for key in record if key not in labels]
    for column in values + labels:
        if column not in record:
            problem = (f"{where}: there is no key {column!r} among {list(record)[:20]} (give "
                       "--text_column and --label_column)")
            yield from bad_row(where, problem, cfg)
            return
    try:
        fields = [scalar(record[column], where, column) for column in values]
    except UserError as error:  # a list or an object
        yield from bad_row(where, str(error), cfg)
        return
    yield from labelled_row(where, fields, [record[column] for column in labels], cfg)


def column_names(name, raw, cfg, suffix):
    """The columns of a table or of a file's first record: names, or without a header numbers."""
    if suffix in TABLES:
        table, _ = open_table(name, raw, cfg, TABLES[suffix])
        row = next((row for row in table if row), [])
        return row if has_header(cfg) else list(range(len(row)))
    records = parquet_records if suffix in PARQUET else json_records
    found = (record for _, record in records(name, raw, cfg) if isinstance(record, dict))
    return list(next(found, {}))


TABLES = {".csv": ",", ".tsv": "\t"}  # suffix → the usual delimiter
PARQUET = ".parquet", ".arrow", ".feather"
READERS = {
    ".txt": read_txt, ".json": read_json, ".jsonl": read_json, ".ndjson": read_json,
    **{suffix: functools.partial(read_table, usual=usual) for suffix, usual in TABLES.items()},
    **dict.fromkeys(PARQUET, read_parquet),
}
