"""Frozen dataclasses in, one typed configuration out: --help, a TOML or JSON file, the command line, a plain dict.

    cfg = parse_config(Config)                       # sys.argv: [FILE.toml] [--name=value ...]
    torch.save({"config": to_dict(cfg), ...}, path)  # plain dict, loads with weights_only=True
    model_cfg = from_dict(ModelConfig, checkpoint["config"]["model"])

Precedence, lowest to highest: dataclass default, config file, command line. The comment on a field's line is its
--help text, so a knob cannot be documented in two places. Names are unique across sections, which lets the command
line stay flat (--max_lr) while files keep their tables ([optim]). Standard library only.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import time
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
USAGE = "%(prog)s [FILE.toml] [--name=value ...]"
DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
MAGNITUDES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class ConfigError(ValueError):
    """A mistake the user can fix; entry points show the message without a traceback."""


class Failure(RuntimeError):
    """Something that went wrong without the user: a full disk, bad numbers. Entry points show the message alone."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, with --max-lr read as --max_lr and a suggestion for an unknown option."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("description", sys.modules["__main__"].__doc__)
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            name = rest[0].split("=")[0]
            if name.startswith("-"):
                self.error(unknown("option", name, self._option_string_actions))
            self.error(f"unexpected argument {name!r}; options are written --name=value, see --help")
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(arg) for arg in args], namespace)

    def error(self, message: str) -> typing.NoReturn:  # one line instead of argparse's usage plus message
        die(f"{self.prog}: error: {message}", 2)


def run(main: Callable[[], Any]) -> None:
    """Call `main`; what the user can mend is one line on stderr and exit 2, what the machine did wrong one and exit 1."""
    prog = Path(sys.argv[0]).name
    try:
        main()
    except ValueError as error:
        if os.environ.get("NANO416_TRACEBACK"):
            raise
        die(f"{prog}: error: {error}", 2)
    except KeyboardInterrupt:
        die(f"{prog}: interrupted", 130)
    except BrokenPipeError:  # `... | head`: nobody reads what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, Failure) as error:
        if os.environ.get("NANO416_TRACEBACK"):
            raise
        die(f"{prog}: failed: {error}", 1)


def die(message: str, code: int) -> typing.NoReturn:
    """One line on stderr, then exit. Under torchrun all ranks meet the same error; rank 0 says it for all."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # torchrun ends this process as soon as rank 0 has left; alone with its error, it speaks
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    if "RANK" in os.environ:  # tearing down a process group while other ranks wait in it can hang or abort
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def parse_config(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """Build `cls` (a dataclass of sections) from its defaults, an optional file and --name=value overrides."""
    parser = ArgumentParser(usage=USAGE, add_help=False)
    parser.add_argument("config_file", nargs="?")
    section_of: dict[str, str] = {}
    for section, section_cls in _sections(cls).items():
        hints = typing.get_type_hints(section_cls)
        for f in fields(section_cls):
            assert f.name not in section_of, f"option {f.name} is in both [{section_of[f.name]}] and [{section}]"
            section_of[f.name] = section
            is_flag = bool in (hints[f.name], *typing.get_args(hints[f.name]))  # bare --compile
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if is_flag else {}
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **flag)
    overrides = vars(parser.parse_args(argv))
    try:
        data = load_file(overrides.pop("config_file"))
        for name, text in overrides.items():
            section = data.setdefault(section_of[name], {})
            if not isinstance(section, dict):
                raise ConfigError(f"{section_of[name]} is a table: write [{section_of[name]}] and its options below it")
            section[name] = text
        return from_dict(cls, data)
    except ConfigError as error:
        parser.error(str(error))


def call(commands: Sequence[Callable[..., Any]], argv: Sequence[str] | None = None) -> Any:
    """Call the function that the first argument names. Its parameters are the options, their comments the --help text;
    parameters without a default come first, without a name."""
    argv, names = sys.argv[1:] if argv is None else argv, "|".join(command.__name__ for command in commands)
    first = ArgumentParser(usage=f"%(prog)s {names} [--name=value ...]")
    first.add_argument("command", choices=[command.__name__ for command in commands], metavar=names)
    chosen = first.parse_args(argv[:1] or ["--help"]).command
    command = next(command for command in commands if command.__name__ == chosen)
    return command(**_options(command, f"{first.prog} {chosen}", argv[1:]))


def _options(command: Callable[..., Any], prog: str, argv: Sequence[str]) -> dict[str, Any]:
    parameters, hints = inspect.signature(command).parameters, typing.get_type_hints(command)
    positional = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    usage = " ".join(
        [prog, *(name.upper() + "..." * (hints[name] == list[str]) for name in positional), "[--name=value ...]"]
    )
    parser = ArgumentParser(prog=prog, usage=usage, description=command.__doc__)
    comments = dict(re.findall(r"^\s+(\w+): .*?  # (.+)$", inspect.getsource(command), re.MULTILINE))
    for name, parameter in parameters.items():
        text = comments[name].replace("%", "%%")
        if name in positional:
            parser.add_argument(name, nargs="+" if hints[name] == list[str] else None, help=text)
        else:
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if hints[name] is bool else {}
            default = "none" if parameter.default is None else parameter.default
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{text} [{default}]", **flag)
    schema = dataclasses.make_dataclass(
        "Options",
        [(n, hints[n]) if n in positional else (n, hints[n], parameters[n].default) for n in parameters],
    )
    return vars(from_dict(schema, vars(parser.parse_args(argv))))


def answer_help(doc: str | None, sections: Mapping[str, str]) -> None:
    """On --help, print the options of {"section": "file.py:Dataclass"} and leave.

    Reads the files instead of importing them: rooms import torch, which takes seconds.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        run(lambda: _print_help(doc, sections))
        sys.exit(0)


def _print_help(doc: str | None, sections: Mapping[str, str]) -> None:
    print(
        f"usage: {USAGE % {'prog': Path(sys.argv[0]).name}}\n\n{doc}\noptions (`none` clears one; 10e9, 500M are numbers):"
    )
    for section, place in sections.items():
        file, _, name = place.partition(":")
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
        print(f"\n[{section}] {(ast.get_docstring(body) or '').splitlines()[0]}")
        for option, (default, comment) in field_table(source, body).items():
            print(f"  --{option:<18} {comment} [{default}]")
    sys.stdout.flush()


def field_table(source: str, body: ast.ClassDef) -> dict[str, tuple[str, str]]:
    """{field: (default as written, the comment that ends it)} of a dataclass."""
    lines, table = source.splitlines(), {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            default = ast.unparse(node.value).strip("'").lower()
            inner = re.fullmatch(r"field\(default_factory=lambda: (.*)\)", ast.unparse(node.value))
            if inner:  # a dict of weights, as the command line writes it
                default = ",".join(f"{k}={v:g}" for k, v in ast.literal_eval(inner[1]).items())
            table[node.target.id] = (default, lines[(node.end_lineno or node.lineno) - 1].partition("  # ")[2])
    return table


def load_file(path: str | None) -> dict[str, Any]:
    """Read a .toml or .json config file into nested dicts; None gives {}."""
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except ValueError as error:  # JSONDecodeError, TOMLDecodeError and UnicodeDecodeError all are one
        raise ConfigError(f"config file {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path}: expected tables of options, found a {type(data).__name__}")
    return data


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "", root: type | None = None) -> T:
    """Dict to dataclass, nested. Raises ConfigError naming the key that is unknown or has the wrong type."""
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ConfigError(unknown("key", f"{where}{key}", _dotted_names(root or cls)))
    values = {}
    for key, value in data.items():
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}{key} is a table: write [{key}] and put its options below it")
            values[key] = from_dict(hints[key], value, f"{where}{key}.", root or cls)
        else:
            values[key] = _cast(value, hints[key], f"{where}{key}")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # __post_init__ checks, missing required fields
        raise ConfigError(str(error)) from error


def to_dict(cfg: Any) -> dict[str, Any]:
    """Dataclass to plain JSON types."""
    return json.loads(json.dumps(asdict(cfg)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """["max_lr: 0.0003 -> 0.0001", ...] for two plain dicts of one section."""
    return [
        f"{key}: {_show(old.get(key))} -> {_show(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _underscored(arg: str) -> str:
    """--max-lr=a-b becomes --max_lr=a-b; values and a lone -- stay."""
    return re.sub(r"^--[A-Za-z][^=]*", lambda m: "--" + m[0][2:].replace("-", "_"), arg)


def _sections(cls: type) -> dict[str, type]:
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}


def _dotted_names(cls: type) -> list[str]:
    sections = _sections(cls)
    return [f"{name}.{f.name}" for name in sections for f in fields(sections[name])] or [f.name for f in fields(cls)]


def unknown(kind: str, name: str, known: Iterable[str], advice: str = "--help lists them all") -> str:
    """What to say of a name that is none of `known`: the nearest of them, or `advice`."""
    known = [k for k in known if k not in ("-h", "--help")]
    last = name.split(".")[-1].strip("-")
    near = [k for k in known if k.split(".")[-1] == last] or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [k for k in known if last and last in k][:3]
    return f"unknown {kind} {name}; " + (f"did you mean {' or '.join(near)}?" if near else advice)


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={weight:g}" for key, weight in value.items())
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("none" if a is types.NoneType else _type_name(a) for a in typing.get_args(hint))
    return "NAME=WEIGHT,..." if typing.get_origin(hint) is dict else getattr(hint, "__name__", str(hint))


def _cast(value: Any, hint: Any, name: str) -> Any:
    """One rule for files and command line: accept the type itself or a string that spells it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in args and (value is None or value == "none"):
            return None
        for arm in (a for a in args if a is not types.NoneType):
            try:
                return _cast(value, arm, name)
            except ConfigError:
                pass
    try:
        if origin is Literal:
            return {str(choice): choice for choice in args}[str(value)]
        if origin is dict:  # --sources=data/web=0.8,data/code=0.2; a name alone weighs 1
            pairs = dict(_pair(p) for p in value.split(",") if p) if isinstance(value, str) else value
            return {key: _cast(item, args[1], name) for key, item in pairs.items()}
        if origin is list:  # --flops=1e18,3e18
            return [_cast(item, args[0], name) for item in (value.split(",") if isinstance(value, str) else value)]
        if hint is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if hint is str and isinstance(value, str):
            return value
        if hint in (int, float):
            return _number(value, hint)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ConfigError(f"{name} expects {_type_name(hint)}, got {value!r}")


def _pair(text: str) -> tuple[str, str]:
    key, equals, weight = text.rpartition("=")
    return (key, weight) if equals else (text, "1")


def _number(value: Any, kind: type) -> int | float:
    """10e9, 10_000_000_000, 10B and 10.5M are numbers, 3h50m are seconds; nan, inf and 1.5 for an integer are not."""
    text, scale = str(value), 1
    if isinstance(value, str) and kind is float and (m := DURATION.fullmatch(text)) and text:
        return float(sum(int(n or 0) * s for n, s in zip(m.groups(), (86400, 3600, 60, 1))))
    if isinstance(value, str) and text[-1:].upper() in MAGNITUDES:
        text, scale = text[:-1], MAGNITUDES[text[-1].upper()]
    if kind is int and scale == 1 and not re.search(r"[.eE]", text):
        return int(text)
    number = float(text) * scale
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(text)
    return kind(number)
