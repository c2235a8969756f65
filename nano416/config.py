"""Command lines from dataclasses: a TOML or JSON file and --name=value options become one typed, frozen object.

    cfg = parse_config(Config)                      # [FILE.toml] [--name=value ...]; Config's fields are dataclasses
    cfg = parse_config(ChatConfig)                  # a flat dataclass: fields without a default are positional
    run_subcommand(sample, download, prepare)       # prepare(cfg: PrepareConfig) is `data_pipeline.py prepare ...`
    cfg = from_dict(ModelConfig, checkpoint["config"]["model"])

Precedence, lowest to highest: dataclass default, config file, command line. The comment at the end of a field's line is
its help text, so an option cannot be documented in two places. Option names are unique across sections: the command
line is flat (--max_lr) and files have tables ([optim]). Standard library only.
"""

import argparse
import difflib
import inspect
import json
import math
import os
import re
import sys
import threading
import time
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
# 1d2h3m4s, each part optional.
DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
MAGNITUDES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# Characters that a terminal obeys instead of showing: C0 except \n and \t, DEL, C1, line separators, direction marks.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)


class Failure(RuntimeError):
    """A failure that is not the user's mistake, such as a full disk. Shown as one line, exit code 1."""


# ---- Running a script ------------------------------------------------------------------------------------------------


def run_cli(main: Callable[[], Any]) -> None:
    """Call `main`. A ValueError becomes one line on stderr and exit code 2, a failure of the machine exit code 1."""
    try:
        main()
    except ValueError as error:
        if os.environ.get("NANO416_TRACEBACK"):
            raise
        # As argparse does for bad usage.
        exit_with_error(f"{program_name()}: error: {error}", 2)
    except KeyboardInterrupt:
        # A shell's code for a process that a signal ended: 128 + 2 (SIGINT), below 128 + 13 (SIGPIPE).
        exit_with_error(f"{program_name()}: interrupted", 130)
    except BrokenPipeError:
        # `... | head` has closed the pipe. Python would complain once more when it flushes stdout on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(final_exit_code(141))
    except (OSError, Failure) as error:
        if os.environ.get("NANO416_TRACEBACK"):
            raise
        exit_with_error(f"{program_name()}: failed: {error}", 1)


def exit_with_error(message: str, code: int) -> typing.NoReturn:
    """Print one line to stderr and exit. Under torchrun all ranks meet the same error and only rank 0 prints it."""
    if os.environ.get("RANK", "0") != "0":
        # torchrun ends this process as soon as rank 0 has left. An error of this rank alone is printed after 5 s.
        time.sleep(5)
    print(visible(" ".join(message.split())), file=sys.stderr, flush=True)
    code = final_exit_code(code)
    if "RANK" in os.environ:
        for thread in threading.enumerate():
            # A checkpoint that is being written.
            if not thread.daemon and thread is not threading.current_thread():
                thread.join(timeout=30)
        # Tearing down a process group while other ranks wait in it can hang or abort.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def final_exit_code(code: int) -> int:
    """The exit code that makes whoever started this process see `code`, and not start it again unless `code` is 1.

    torchrun starts a process with any code but 0 again while it has restarts left. launcher.py reads the code that was
    meant in a file.
    """
    path = os.environ.get("NANO416_EXIT_CODE_FILE")
    if path:
        Path(path).write_text(str(code), encoding="utf-8")
    allowed = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    used = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return code if code == 1 or allowed == used else 0


def program_name() -> str:
    """`training.py`, or `python -m tools.convert_hf` for a module started with -m."""
    # Python sets __spec__ for -m only.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def visible(text: str) -> str:
    """Escape control characters as \\xNN or \\uNNNN, so that a terminal shows them instead of obeying them."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] < "\x80" else ascii(match[0])[1:-1], text)


# ---- The command line ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are a ValueError of one line, with a suggestion for a mistyped option."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        # argparse's own parse_args would reject what it does not know without a suggestion.
        parsed, rest = self.parse_known_args(args, namespace)
        if rest and rest[0].startswith("-"):
            self.error(unknown_name("option", rest[0].split("=")[0], self._option_string_actions))
        if rest:
            self.error(f"unexpected argument {rest[0]!r}; options are written --name=value, see --help")
        return parsed

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)


def parse_config(cls: type[T], argv: Sequence[str] | None = None, doc: str | None = None, prog: str = "") -> T:
    """Build `cls` from its defaults, an optional config file and --name=value options; --help prints them and exits.

    If all fields of `cls` are dataclasses they are sections: a config file may come first, and its tables are the
    sections. Otherwise `cls` is flat, and its fields without a default are positional arguments.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    sections = _sections(cls)
    # No abbreviations: --max would become ambiguous, or another option, when an option is added.
    parser = _Parser(add_help=False, allow_abbrev=False)
    if sections:
        parser.add_argument("config_file", nargs="?")
    section_of: dict[str, str] = {}
    flags: set[str] = set()
    for section, section_cls in (sections or {"": cls}).items():
        hints = typing.get_type_hints(section_cls)
        for f in _options(section_cls):
            assert f.name not in section_of, f"option {f.name} is in both [{section_of[f.name]}] and [{section}]"
            section_of[f.name] = section
            if bool in (hints[f.name], *typing.get_args(hints[f.name])):
                flags.add(f.name)
            if _is_positional(f):
                parser.add_argument(f.name, nargs="+" if hints[f.name] == list[str] else None)
            else:
                # Text, which from_dict converts as a file's values. SUPPRESS: absent options must not hide the file's.
                parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS)
    if {"-h", "--help"} & set(argv):
        print(_help_text(cls, doc or sys.modules["__main__"].__doc__ or "", prog or program_name()), flush=True)
        sys.exit(0)
    argv = _normalize(argv, flags)
    _check_option_names(argv, sections or {"": cls})
    overrides = vars(parser.parse_args(argv))
    if not sections:
        return from_dict(cls, overrides)
    data = load_file(overrides.pop("config_file"))
    for section, section_cls in sections.items():
        given = {name: text for name, text in overrides.items() if section_of[name] == section}
        table = data.get(section, {})
        if given and not isinstance(table, dict):
            raise ValueError(f"{section} is a table: write [{section}] and its options below it")
        # The file's word on the same matter is dropped, or --max_tokens would do nothing for a file with max_steps.
        replaced = [name for group in _alternatives(section_cls, given) for name in group]
        if given:
            data[section] = {name: value for name, value in table.items() if name not in replaced} | given
    return from_dict(cls, data)


def _alternatives(cls: type, given: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The groups of options that say one thing in several ways, of which `given` sets one. Raises ValueError for two.

    A dataclass lists them in `alternatives`. The value none clears an option and says nothing.
    """
    groups = []
    for group in getattr(cls, "alternatives", ()):
        names = [f"--{name}" for name in group if given.get(name, "none") != "none"]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} say the same thing in two ways; give only one of them")
        if names:
            groups.append(group)
    return groups


def run_subcommand(*commands: Callable[[Any], Any], argv: Sequence[str] | None = None) -> Any:
    """Call the function that the first argument names, with the dataclass that its one parameter is annotated with."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # import_ is the command `import`, which is a keyword of Python.
    by_name = {command.__name__.removesuffix("_"): command for command in commands}
    usage = f"{program_name()} {{{','.join(by_name)}}} [--name=value ...]"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n{inspect.cleandoc(sys.modules['__main__'].__doc__ or '')}", flush=True)
        sys.exit(0)
    if argv[0] not in by_name:
        raise ValueError(unknown_name("command", argv[0], by_name, f"usage: {usage}"))
    command = by_name[argv[0]]
    hints = typing.get_type_hints(command)
    hints.pop("return", None)
    (cls,) = hints.values()
    return command(parse_config(cls, argv[1:], command.__doc__, f"{program_name()} {argv[0]}"))


def _check_option_names(argv: Sequence[str], sections: Mapping[str, type]) -> None:
    """Raise ValueError for the first --name that is not an option, or that is given twice."""
    # Before argparse, which would complain of a missing positional argument first and hide the typing error.
    section_of = {f.name: section for section, cls in sections.items() for f in fields(cls)}
    field_of = {f.name: f for cls in sections.values() for f in fields(cls)}
    options = [f.name for cls in sections.values() for f in _options(cls) if not _is_positional(f)]
    given: set[str] = set()
    for arg in argv:
        match = re.match(r"--(\w+)(=|$)", arg)
        name = match[1] if match else ""
        if name in given:
            raise ValueError(f"--{name} is given twice; give it once (several values are separated by commas)")
        if not match:
            continue
        given.add(name)
        if name in options:
            continue
        if name not in field_of and any(name in getattr(cls, "retired", {}) for cls in sections.values()):
            raise ValueError(f"--{name} is no longer an option (see CHANGELOG.md); leave it out")
        if name not in field_of:
            raise ValueError(unknown_name("option", f"--{name}", [f"--{option}" for option in options]))
        if _is_positional(field_of[name]):
            raise ValueError(f"{name} is written without its name: VALUE instead of --{name}=VALUE")
        raise ValueError(f"{name} is set in a config file, below [{section_of[name]}], not on the command line")


def _options(cls: type) -> list[Field]:
    """The fields that the command line shows; the others are set in config files or by code."""
    return [f for f in fields(cls) if not f.metadata.get("file_only")]


def _is_positional(f: Field) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _sections(cls: type) -> dict[str, type]:
    """{field: its dataclass} of the fields that are dataclasses; {} for a flat one."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if is_dataclass(hints[f.name])}


def _normalize(argv: Sequence[str], flags: set[str]) -> list[str]:
    """--max-lr=a-b becomes --max_lr=a-b, and a bare --compile becomes --compile=true."""
    args = [re.sub(r"^--[A-Za-z][^=]*", lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in argv]
    for i, arg in enumerate(args):
        has_value = args[i + 1 : i + 2] and args[i + 1].lower() in ("true", "false", "none")
        if arg.startswith("--") and arg[2:] in flags and not has_value:
            args[i] = f"{arg}=true"
    return args


def _help_text(cls: type, doc: str, prog: str) -> str:
    """Usage, the script's own docstring, and one line per option from the comments of the dataclasses."""
    sections = _sections(cls)
    arguments = ["[FILE.toml]"] if sections else []
    lines = []
    for section, section_cls in (sections or {"": cls}).items():
        # {option: the comment at the end of its line}. Only the source has it.
        comments = dict(re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(section_cls), re.MULTILINE))
        if section:
            lines += ["", f"[{section}] {(section_cls.__doc__ or '').splitlines()[0]}"]
        for f in _options(section_cls):
            if _is_positional(f):
                several = "..." if typing.get_type_hints(section_cls)[f.name] == list[str] else ""
                arguments.append(f.name.upper() + several)
                lines.append(f"  {f.name.upper():<20} {comments[f.name]}")
            else:
                default = f.default if f.default_factory is MISSING else f.default_factory()
                lines.append(f"  --{f.name:<18} {comments[f.name]} [{format_value(default)}]")
        file_only = [f.name for f in fields(section_cls) if f.metadata.get("file_only")]
        if file_only:
            lines.append(f"  (in config files only: {', '.join(file_only)})")
    usage = " ".join([prog, *arguments, "[--name=value ...]"])
    hint = "options (`none` clears one; 10e9 and 500M are numbers, 3h50m is a duration):"
    return "\n".join([f"usage: {usage}", "", inspect.cleandoc(doc), "", hint, *lines])


# ---- Files and dicts -------------------------------------------------------------------------------------------------


def load_file(path: str | None) -> dict[str, Any]:
    """Read a .toml or .json config file into nested dicts; None gives {}."""
    if path is None:
        return {}
    if Path(path).exists() and not Path(path).is_file():
        # Reading a pipe or /dev/zero would never end.
        raise ValueError(f"cannot read config file {path}: it is not a file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read config file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, TOMLDecodeError and UnicodeDecodeError; nesting
        raise ValueError(f"config file {path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"config file {path}: expected tables of options, found a {type(data).__name__}")
    return data


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "", root: type | None = None) -> T:
    """Dict to dataclass, nested. Raises ValueError naming the key that is unknown or has the wrong type.

    A dataclass may list options of older versions in `retired` as {name: the value that had no effect}; files that
    hold such a value are read as if it were absent.
    """
    hints = typing.get_type_hints(cls)
    defaults = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]
    # Of the class and not a field: a field would be an option.
    retired = getattr(cls, "retired", {})
    values = {}
    known = _dotted_names(root or cls)
    for key, value in data.items():
        # As text too: TOML has no null, so its files write "none".
        if key in retired and value in (retired[key], format_value(retired[key])):
            continue
        # One that has moved to another section is an unknown key, which names the new place.
        if key in retired and not any(name.endswith(f".{key}") for name in known):
            raise ValueError(f"{where}{key} is no longer an option (see CHANGELOG.md); remove it from the file")
        if key not in defaults:
            raise ValueError(unknown_name("key", f"{where}{key}", known))
        if is_dataclass(hints[key]) and not isinstance(value, Mapping):
            raise ValueError(f"{where}{key} is a table: write [{key}] and put its options below it")
        if is_dataclass(hints[key]):
            values[key] = from_dict(hints[key], value, f"{where}{key}.", root or cls)
        else:
            # ModelConfig's sizes are int, but may be left to __post_init__ as None.
            hint = hints[key] | None if defaults[key] is None else hints[key]
            values[key] = parse_value(value, hint, f"{where}{key}")
    return cls(**values)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Dataclass to plain JSON types."""
    # Through JSON, so that a config compares equal to the same config read from a file (tuples become lists).
    return json.loads(json.dumps(asdict(cfg)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """["max_lr: 0.0003 -> 0.0001", ...] for two plain dicts of one section."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {format_value(old.get(key))} -> {format_value(new.get(key))}" for key in changed]


def unknown_name(kind: str, name: str, known: Iterable[str], advice: str = "--help lists them all") -> str:
    """An error message for a name that is not among `known`: suggests the nearest one, or gives `advice`."""
    known = [k for k in known if k not in ("-h", "--help")]
    # In order: the same name in another section, a typing error, a name that contains it (--lr: --max_lr, --min_lr).
    last = name.split(".")[-1].strip("-")
    near = [k for k in known if k.split(".")[-1] == last]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [k for k in known if last and last in k][:3]
    return f"unknown {kind} {name}; " + (f"did you mean {' or '.join(near)}?" if near else advice)


def _dotted_names(cls: type) -> list[str]:
    sections = _sections(cls)
    dotted = [f"{section}.{f.name}" for section in sections for f in fields(sections[section])]
    return dotted or [f.name for f in fields(cls)]


def format_value(value: Any) -> str:
    """A value as the command line writes it: none, true, a=0.7,b=0.3."""
    if isinstance(value, dict):
        # A checkpoint's config may hold anything.
        weights = {key: f"{x:g}" if isinstance(x, int | float) else format_value(x) for key, x in value.items()}
        return ",".join(f"{key}={weight}" for key, weight in weights.items())
    if isinstance(value, list):
        return ",".join(map(format_value, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# ---- Values ----------------------------------------------------------------------------------------------------------


def parse_value(value: Any, hint: Any, name: str) -> Any:
    """Convert to the type `hint`: accepts the type itself, as files have it, or a string that spells it."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in args and (value is None or value == "none"):
            return None
        for alternative in (a for a in args if a is not types.NoneType):
            # int | Literal["auto"]: the first type that accepts the value.
            try:
                return parse_value(value, alternative, name)
            except ValueError:
                continue
    if origin is dict and isinstance(value, str):
        value = _parse_weights(value, name)
    try:
        if origin is Literal:
            # By the text of the choices, which need not be strings.
            return {str(choice): choice for choice in args}[str(value)]
        if origin is dict:
            return {key: parse_value(item, args[1], name) for key, item in value.items()}
        if origin is list:
            items = value.split(",") if isinstance(value, str) else value
            return [parse_value(item, args[0], name) for item in items]
        if hint is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if hint is str and isinstance(value, str):
            return value
        if hint in (int, float):
            return _number(value, hint)
    except (AttributeError, KeyError, TypeError, ValueError):
        # The message below says what was expected.
        pass
    raise ValueError(f"{name} expects {_type_name(hint)}, got {value!r}")


def _parse_weights(text: str, name: str) -> dict[str, str]:
    """{"data/web": "0.8", "data/code": "0.2"} for "data/web=0.8,data/code=0.2"; a name alone has weight 1."""
    weights: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        # The last "=", since a folder's name may hold one.
        key, equals, weight = part.strip().rpartition("=")
        key = key.strip() if equals else weight
        if key in weights:
            raise ValueError(f"{name} names {key} twice; name it once, with the sum of its weights")
        weights[key] = weight if equals else "1"
    return weights


def _number(value: Any, kind: type) -> int | float:
    """10e9, 10_000_000_000, 10B and 10.5M are numbers, 3h50m are seconds; nan, inf and 1.5 as an integer are not."""
    text = str(value)
    scale = 1
    # The pattern matches the empty text too.
    duration = DURATION.fullmatch(text)
    if isinstance(value, str) and kind is float and text and duration:
        return float(sum(int(n or 0) * s for n, s in zip(duration.groups(), (86400, 3600, 60, 1))))
    if isinstance(value, str) and text[-1:].upper() in MAGNITUDES:
        scale = MAGNITUDES[text[-1].upper()]
        text = text[:-1]
    if kind is int and scale == 1 and not re.search(r"[.eE]", text):
        # Not through float, which is exact only up to 2**53.
        return int(text)
    number = float(text) * scale
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(text)
    return kind(number)


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is types.NoneType else _type_name(a) for a in typing.get_args(hint))
    return "NAME=WEIGHT,..." if origin is dict else getattr(hint, "__name__", str(hint))
