"""Checked settings: a dataclass's defaults, then `config/*.py` files, then `--key=value`, each overriding the one before.

The dataclass is the schema. A name that is no field and a value of the wrong type are errors, whichever way they arrive
(nanoGPT's exec into globals() ignores a misspelt key in a file, and fails on None and on int given for float).
"""
import ast
import dataclasses
import difflib
import inspect
import netrc
import os
import runpy
import sys
import types
import typing
from pathlib import Path
from urllib.parse import urlparse


class UserError(ValueError):
    """Something the user can mend; the message is a sentence that says what is wrong, where, and the way out."""


def run(main, *errors):
    """Call a script's `main()`; a UserError, or one of `errors`, becomes one line on standard error and exit status 2."""
    status = 0
    try:
        main()
    except (UserError, *errors) as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr, flush=True)
        status = 2
    if "TORCHELASTIC_RUN_ID" in os.environ:  # DDP leaves threads of gloo's behind (seen in torch 2.13), and one that wakes
        sys.stdout.flush()                   # while the interpreter shuts down aborts the process: so it does not shut down
        os._exit(status)
    sys.exit(status)


def configure(cls, argv=None, positional=None):
    """Returns an instance of dataclass `cls` with the command line `argv` (default: sys.argv[1:]) applied.

    Positional arguments are config files, or, where `positional` names a list field, that field's values. In a string
    default, `{config}` stands for the name of the last config file (without one: of the script). Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, positional))
        sys.exit(0)
    values, origin, stem = {}, {}, Path(sys.argv[0]).stem
    if positional:
        values[positional] = [a for a in argv if not a.startswith("-")]
    for arg in argv:
        if arg.startswith("-") or positional:
            continue
        stem = Path(arg).stem
        for key, value in read_file(arg).items():
            values[key], origin[key] = check(cls, key, value, arg), arg
    given = {}
    for arg in (a for a in argv if a.startswith("-")):
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals:
            raise UserError(f"cannot read '{arg}': settings are written --key=value, for instance --seed=2")
        value = check(cls, key, parse(field(cls, key, "command line").type, text), "command line")
        given[key] = given[key] + value if key in given and isinstance(value, list) else value  # repeatable
        origin[key] = "command line"
    values |= given
    if origin and int(os.environ.get("RANK", 0)) == 0:
        print("settings: " + ", ".join(f"{k}={values[k]!r} ({origin[k]})" for k in origin), file=sys.stderr, flush=True)
    config = cls(**values)
    for f in dataclasses.fields(cls):
        if isinstance(value := getattr(config, f.name), str) and "{config}" in value:
            setattr(config, f.name, value.replace("{config}", stem))
    return config


def read_file(path):
    """The settings that a config file assigns: its public names, less modules, functions and classes."""
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, [str(p) for p in Path(path).parent.glob("*.py")], 1)
        raise UserError(f"config file '{path}' does not exist" + (f"; did you mean '{near[0]}'?" if near else
                        "; settings are written --key=value"))
    sys.path.append(str(Path(path).resolve().parent))  # a config may build on its neighbour: from textcls import *
    try:
        names = runpy.run_path(path)
    except Exception as e:
        line = next((f":{f.lineno}" for f in reversed(inspect.getinnerframes(e.__traceback__)) if f.filename == path), "")
        raise UserError(f"config file {path}{line} cannot be run: {type(e).__name__}: {e}") from e
    finally:
        sys.path.pop()
    return {k: v for k, v in names.items()
            if not (k.startswith("_") or callable(v) or isinstance(v, types.ModuleType))}


def field(cls, key, where):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1, cutoff=0.5)
        raise UserError(f"unknown setting '{key}' ({where})" + (f"; did you mean '{near[0]}'?" if near else "")
                        + " --help lists them all")
    return fields[key]


def check(cls, key, value, where):
    """Returns `value` as the field's annotation has it (an int given for a float becomes one), or raises UserError."""
    annotation = field(cls, key, where).type
    ok, value = conform(annotation, value)
    if not ok:
        raise UserError(f"{key}={value!r} ({where}) is not {describe(annotation)}")
    return value


def conform(t, value):
    """(does value fit the annotation t, the value converted)."""
    origin, args = typing.get_origin(t), typing.get_args(t)
    if origin in (typing.Union, types.UnionType):
        for a in sorted(args, key=lambda a: a is not type(value)):  # an exact match before a conversion
            ok, converted = conform(a, value)
            if ok:
                return True, converted
        return False, value
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in args), value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            value = [value]  # one value is a list of one
        done = [conform(args[0] if args else object, v) for v in value]
        return all(ok for ok, _ in done), origin(v for _, v in done)
    if t in (None, type(None)):
        return value is None, value
    if t is float and type(value) is int:
        return True, float(value)
    return (type(value) is t) if t in (int, float, bool, str) else isinstance(value, t), value


def parse(t, text):
    """A command-line value: a Python literal where the annotation `t` admits one of that type, else the text itself."""
    try:
        value = {"true": True, "false": False}[text] if text in ("true", "false") else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(value, str) and not conform(t, 0)[0]:
        return text  # where no number could be meant, quotes are part of the text
    return value if conform(t, value)[0] else text


def describe(t):
    args = typing.get_args(t)
    if typing.get_origin(t) is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if typing.get_origin(t) in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if typing.get_origin(t) in (list, tuple):
        return f"a list of {describe(args[0])}"
    return {type(None): "None", str: "text", bool: "True or False"}.get(t, getattr(t, "__name__", str(t)))


def help_text(cls, positional=None):
    """Every field with its default, its type and the comment beside it in the source."""
    lines = [f"usage: {Path(sys.argv[0]).name} [{positional or 'config/NAME.py'} ...] [--key=value ...]", ""]
    comments, titles = {}, {}
    for c in reversed(cls.__mro__[:-1]):
        title = None
        for line in inspect.getsource(c).splitlines():
            code, _, comment = line.partition("  # ")
            if line.startswith("    # "):
                title = line.strip("# ")
            elif ":" in code and (name := code.split(":")[0].strip()).isidentifier():
                comments[name], titles[name], title = comment, title, None
    for f in dataclasses.fields(cls):
        if titles.get(f.name):
            lines += ["", titles[f.name]]
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        lines += [f"  --{f.name}={default!r}", f"        {describe(f.type)}. {comments.get(f.name, '')}"]
    return "\n".join(lines)


def start_wandb(settings, run_id):
    """The W&B run of a training run's settings, a dict (None if disabled): online if the user is logged in, else offline;
    never a prompt."""
    mode = settings["wandb_mode"]
    if mode == "auto":
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        try:
            known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            known = None
        mode = os.environ.get("WANDB_MODE") or ("online" if known or os.environ.get("WANDB_API_KEY") else "offline")
    if mode == "disabled":
        return None
    import wandb
    return wandb.init(project=settings["wandb_project"], name=settings["wandb_run_name"] or Path(settings["out_dir"]).name,
                      id=run_id, resume="allow" if mode == "online" else None, mode=mode, dir=settings["out_dir"],
                      config=settings, settings=wandb.Settings(silent=True, console="off"))


def finish_wandb(wandb_run):
    """Ends it; says where it lies if it was not sent."""
    folder, offline = wandb_run.settings.sync_dir, wandb_run.offline
    wandb_run.finish()
    if offline:
        print(f"W&B run kept offline; upload it with: wandb sync {os.path.relpath(folder)}", flush=True)
