"""Checked settings: a dataclass's defaults, then `config/*.py` files, then `--key=value`.

Each overrides the one before. The dataclass is the schema: a name that is no field, or a value of
the wrong type, is an error wherever it comes from. (nanoGPT executes config files into globals(),
which ignores a misspelt key in a file and refuses None and an int given for a float.)
"""
import ast
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import os
import runpy
import shutil
import sys
import tempfile
import time
import types
import typing
from pathlib import Path

# libgomp reads this when torch is loaded, so this module is imported before torch. Its threads spin
# 300,000 times at each barrier by default, in vain where another process holds the other core: a
# step of config/textcls.py then takes 95 ms instead of 27; with 3,000 it takes 65 (quiet: 3 % more)
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"


def show_error(kind, error, traceback):
    """sys.excepthook: Ctrl-C is no error, also while torch is being imported, before `run`."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = show_error


class UserError(ValueError):
    """Something the user can mend. The message says what is wrong, where, and the way out."""


def run(main):
    """Call a script's `main()`. A UserError becomes one line on standard error, and status 2."""
    status, rank, world = 0, 0, 1
    with contextlib.suppress(UserError):  # a script that runs in several processes will say it
        rank, world = rank_and_world_size()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale
    try:
        main()
    except SystemExit as stopped:  # --help, or a run that was told to stop
        status = stopped.code or 0
    except BrokenPipeError:  # what was reading our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        status = 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if not (message := plain_message(error)):
            raise
        if rank > 0:
            time.sleep(2)  # if process 0 says the same, torchrun ends the others meanwhile
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        status = 2
    if world > 1:
        # DDP leaves gloo threads behind (torch 2.13). One that wakes while the interpreter shuts
        # down aborts the process, so one of several leaves without shutting down.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


TIMEOUT = datetime.timedelta(hours=2)  # how long processes wait for one that builds a data set


def rank_and_world_size():
    """(rank, number of processes) of a run that torchrun, or another launcher, has started. (0, 1)
    without one, also where RANK or WORLD_SIZE is set alone, as some clusters do for all programs.
    Raises UserError where they do not fit together."""
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if not all(given):
        return 0, 1
    missing = {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    try:
        rank, world = map(int, given)
    except ValueError:
        rank, world = 0, -1
    if not 0 <= rank < world or world > 1 and missing:
        raise UserError("the environment has RANK={} and WORLD_SIZE={}, but not all that torchrun "
                        "sets: unset them, or start the script by torchrun".format(*given))
    return rank, world


def is_first_process():
    """Is it the one that prints? Without a launcher it is."""
    with contextlib.suppress(UserError):
        return rank_and_world_size()[0] == 0
    return True


@functools.cache
def say_once(message, file=None):
    """Print a line that would be printed again, as what it is about is read again."""
    print(message, file=file, flush=True)


def plain_message(error):
    """What an error says that the user can mend, or None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return str(cannot_write(error.filename or "standard output, or a file,", error))
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename}: {error.strerror}: mend that, or choose another place"
    ended = "Connection closed by peer", "Connection reset by peer", "ncclRemoteError"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ended):
        return ("another process of this run has ended: it was killed, or its message is above. "
                "The same command goes on from the last checkpoint; torchrun --max-restarts=3 does "
                "so by itself")
    no_compiler = "Failed to find C compiler", "No working C++ compiler found"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in no_compiler):
        return "torch.compile needs a C++ compiler, as gcc is: install one, or --compile=False"
    no_memory = "out of memory", "not enough memory", "can't allocate memory"
    if isinstance(error, MemoryError) or any(words in str(error) for words in no_memory):
        reason = str(error).partition("\n")[0]
        graphs = " (or --cuda_graphs=False)" if "CUDA" in reason else ""
        return (f"out of memory: lower --micro_batch_tokens{graphs}, --batch_size or the model's "
                f"size; of files, read smaller ones ({reason})")
    return None


def configure(cls, argv=None, positional=None):
    """Return an instance of dataclass `cls` with the command line `argv` applied.

    argv: default sys.argv[1:]. Positional arguments are config files, or, where `positional` names
    a list field, the values of that field. In a string default, `{config}` stands for the name of
    the last config file, or of the script where there is none. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, positional))
        sys.exit(0)
    files = [arg for arg in argv if not arg.startswith("-")]
    options = [arg for arg in argv if arg.startswith("-")]
    values = {}
    origin = {}
    name = Path(sys.argv[0]).stem
    if positional:
        values[positional], files = files, []
    for path in files:
        name = Path(path).stem
        for key, value in read_file(path).items():
            values[key] = check(cls, key, value, path)
            origin[key] = path
    given = {}
    for option in options:
        key, equals, text = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not equals:
            raise UserError(f"cannot read '{option}': settings are written --key=value, "
                            "for instance --seed=2")
        field = find_field(cls, key, "command line")
        value = text if field.metadata.get("verbatim") else parse(field.type, text)
        value = check(cls, key, value, "command line")
        if key in given:  # a list's option may be repeated, once for each value
            both = [*as_list(given[key]), *as_list(value)]
            value = both if conform(field.type, both)[0] else value
        given[key], origin[key] = value, "command line"
    values |= given
    if origin and is_first_process():
        changed = ", ".join(f"{key}={values[key]!r} ({origin[key]})" for key in origin)
        print(f"settings: {changed}", file=sys.stderr, flush=True)
    config = cls(**values)
    for field in dataclasses.fields(cls):
        value = getattr(config, field.name)
        if isinstance(value, str) and "{config}" in value:
            setattr(config, field.name, value.replace("{config}", name))
    return config


def as_list(value):
    return value if isinstance(value, list) else [value]


def read_file(path):
    """The settings that a config file assigns: its public names, without modules and functions."""
    if not os.path.isfile(path):
        files = [str(file) for file in Path(path).parent.glob("*.py") if file.is_file()]
        near = difflib.get_close_matches(path, files, 1)
        hint = f"did you mean '{near[0]}'?" if near else "settings are written --key=value"
        raise UserError(f"config file '{path}' does not exist; {hint}")
    folder = str(Path(path).resolve().parent)
    sys.path.append(folder)  # a config may build on its neighbour: from textcls import *
    try:
        names = runpy.run_path(path)
    except Exception as error:
        frames = reversed(inspect.getinnerframes(error.__traceback__))
        line = next((f":{f.lineno}" for f in frames if f.filename == path), "")
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"config file {path}{line} cannot be run: {problem}") from error
    finally:
        sys.path.pop()
    return {key: value for key, value in names.items() if is_setting(key, value)}


def is_setting(name, value):
    """Is a name in a config file a setting, rather than an import or a helper?"""
    helper = callable(value) or isinstance(value, types.ModuleType)
    return not name.startswith("_") and not helper


def find_field(cls, key, where):
    """The dataclass field named `key`. Raises UserError with the nearest name."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        if any(key in wider.__dataclass_fields__ for wider in cls.__subclasses__()):
            raise UserError(f"unknown setting '{key}' ({where}): finetune.py has it, this script "
                            "has not")
        raise UserError(f"unknown setting '{key}' ({where}); {hint}--help lists them all")
    return fields[key]


def check(cls, key, value, where):
    """Return `value` as the field's annotation has it (an int given for a float becomes one)."""
    annotation = find_field(cls, key, where).type
    fits, value = conform(annotation, value)
    if not fits:
        raise UserError(f"{key}={value!r} ({where}) is not {describe(annotation)}")
    return value


def conform(annotation, value):
    """Return (whether the value fits the annotation, the value converted to it)."""
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        # an exact match before a conversion
        for option in sorted(args, key=lambda option: option is not type(value)):
            fits, converted = conform(option, value)
            if fits:
                return True, converted
        return False, value
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args), value
    if origin is list:
        values = value if isinstance(value, (list, tuple)) else [value]  # one value: a list of one
        results = [conform(args[0], v) for v in values]
        return all(fits for fits, _ in results), [converted for _, converted in results]
    if annotation is type(None):
        return value is None, value
    if annotation is float and type(value) is int:
        return True, float(value)
    if annotation is int:
        return type(value) is int, value  # to isinstance a bool is one
    return isinstance(value, annotation), value


def parse(annotation, text):
    """A command-line value: a Python literal where the annotation admits its type, else text."""
    if text in ("true", "false"):
        value = text == "true"
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
    admits_numbers, _ = conform(annotation, 0)
    if isinstance(value, str) and not admits_numbers:
        return text  # where no number could be meant, quotes are part of the text
    fits, _ = conform(annotation, value)
    return value if fits else text


def describe(annotation):
    """An annotation in words, for messages and --help."""
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is list:
        return f"a list of {describe(args[0])} ([…, …], or the option again for each)"
    words = {type(None): "None", str: "text", bool: "True or False"}
    return words.get(annotation, annotation.__name__)


def help_text(cls, positional=None):
    """Every field with its default, its type and the comment beside it in the source, which goes on
    in lines that begin with "#   "; a line "# …" before a field is a heading."""
    comments, titles = {}, {}
    for base in reversed(cls.__mro__[:-1]):
        name = title = None
        for line in inspect.getsource(base).splitlines():
            code, _, comment = line.partition("  # ")
            if line.startswith("    #   ") and name:
                comments[name] += " " + line.strip("# ")  # a comment that goes on
            elif line.startswith("    # "):
                title = line.strip("# ")
                name = None
            elif ":" in code and code.split(":")[0].strip().isidentifier():
                name = code.split(":")[0].strip()
                comments[name] = comment.strip() or comments.get(name, "")
                titles.setdefault(name, title)  # not where a class changes another's default
                title = None
    script = Path(sys.argv[0]).name
    lines = [f"usage: {script} [{positional or 'config/NAME.py'} ...] [--key=value ...]", ""]
    for field in dataclasses.fields(cls):
        if titles.get(field.name):
            lines += ["", titles[field.name]]
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        comment = comments.get(field.name, "")
        lines += [f"  --{field.name}={default!r}", f"        {describe(field.type)}. {comment}"]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Files, so that none is half written and none is trusted unseen


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_sha256(path, expected):
    """Is there a file, with this SHA-256?"""
    return os.path.isfile(path) and file_sha256(path) == expected


def has_changed(path, since, expected):
    """Is there a file that was touched after a time, and has another SHA-256 than expected?"""
    if not os.path.isfile(path):
        return False
    status = os.stat(path)
    touched = max(status.st_mtime, status.st_ctime)  # a file that is moved can keep an old st_mtime
    return touched > since and file_sha256(path) != expected


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name to write to, hidden beside `path`, then renames it: `path` is whole,
    or as it was before. Raises UserError where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if is_of_another_file(error, path):
            raise
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path, error):
    way_out = "make room there, or choose another place"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        way_out = "make its folder, or choose another place"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        way_out = "choose another place"
    return UserError(f"{path} cannot be written: {error.strerror or error}; {way_out}")


def is_of_another_file(error, path):
    """Is it an OSError of a file that was read while `path` was being written?"""
    if not isinstance(error.filename, (str, os.PathLike)):
        return False
    name, path = Path(error.filename).absolute(), Path(path).absolute()
    temporary = path.with_name(f".{path.stem}.tmp")  # what the names of temporary files begin with
    scratch = path.with_name(f".{path.name}.tmp")
    is_temporary = str(name).startswith((str(temporary), str(scratch)))
    return not (is_temporary or name.is_relative_to(path) or path.is_relative_to(name))


def try_lock(folder):
    """A descriptor that holds a folder until it is closed or the process ends; None where another
    process holds it. Raises OSError where the disk knows no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


@contextlib.contextmanager
def scratch_folder(path):
    """Yields a new folder beside `path` to write it in, which is gone at the end, as are those that
    killed processes have left. Raises UserError where nothing can be written."""
    path = Path(path)
    folder = held = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        while held is None or not os.path.isdir(folder):  # until no other process swept it away
            folder = tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent)
            try:
                held = try_lock(folder)
            except FileNotFoundError:
                continue
            except OSError:  # no locks here, so nobody sweeps
                break
        yield Path(folder)
    except OSError as error:
        if is_of_another_file(error, path):
            raise
        raise cannot_write(path, error) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def sweep(path):
    """Remove the scratch folders of `path` that killed processes have left."""
    for left in path.parent.glob(f".{path.name}.tmp-*"):
        with contextlib.suppress(OSError):
            if (held := try_lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)


def write_text(path, text):
    """Write a whole file or nothing. Raises UserError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, content):
    """Write a dict as a whole file or nothing, with a checksum that read_json compares. Raises
    UserError."""
    write_text(path, json.dumps(content | {"checksum": checksum(content)}, indent=1))


def checksum(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_json(path):
    """A JSON object from a file that may be torn or a stranger's. Raises ValueError, OSError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    if found.pop("checksum", None) not in (None, checksum(found)):
        raise ValueError("altered since it was written (its checksum differs)")
    return found


def mismatch(found, schema):
    """The first key of a dict whose value is not of the type that `schema` has for it, or None.

    schema: {key: annotation, or the schema of a dict}; "*" stands for every key.
    """
    for key, expected in schema.items():
        for name in found if key == "*" else [key]:
            value = found.get(name)
            is_list = typing.get_origin(expected) is list
            if name not in found or is_list and not isinstance(value, list):
                return name
            if not isinstance(expected, dict):
                if not conform(expected, value)[0]:
                    return name
            elif not isinstance(value, dict):
                return name
            elif inner := mismatch(value, expected):
                return f"{name}.{inner}"
    return None
