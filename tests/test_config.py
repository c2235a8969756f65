"""nano416/config.py: one typed, frozen object from defaults, a config file and the command line; errors are one line."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from conftest import ROOT

import training
from nano416 import config
from nano416.config import from_dict, parse_config, parse_value, run_cli, run_subcommand, to_dict, visible

UNSET: Any = None  # default of a field that __post_init__ fills in


@dataclass(frozen=True)
class Shape:
    """Shape of the network."""

    width: int = 8  # width
    heads: int = UNSET  # heads; none = width
    name: str = "plain"  # name
    bias: bool = True  # flag
    compile: bool | None = None  # optional flag
    limit: float | None = None  # seconds
    epsilon: float = field(default=1e-6, metadata={"file_only": True})
    retired: ClassVar[dict[str, Any]] = {"depth": 12, "rate": None, "schedule": "cosine"}


@dataclass(frozen=True)
class Optim:
    """Optimizer."""

    max_lr: float = 3e-4  # learning rate
    schedule: Literal["cosine", "linear"] = "cosine"  # decay
    sources: dict[str, float] = field(default_factory=lambda: {"data/web": 1.0})  # mixture
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay rates

    def __post_init__(self):
        if self.max_lr <= 0:
            raise ValueError(f"max_lr must be above 0, got {self.max_lr}")


@dataclass(frozen=True)
class Run:
    """Two sections."""

    shape: Shape = field(default_factory=Shape)
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Copy:
    """A flat command line."""

    files: list[str]  # what to copy
    target: str  # where to
    move: bool = False  # delete the originals
    size: int | None = None  # bytes at most


def error_of(*argv: str, cls: type = Run) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(cls, argv)
    return str(caught.value)


def write_toml(tmp_path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


# ---- The command line ------------------------------------------------------------------------------------------------


def test_command_line_beats_file_beats_default(tmp_path):
    path = write_toml(tmp_path, '[shape]\nwidth = 16\nname = "file"\n[optim]\nmax_lr = 1e-3\n')
    cfg = parse_config(Run, [path, "--width=32"])
    assert (cfg.shape.width, cfg.shape.name, cfg.shape.bias, cfg.optim.max_lr) == (32, "file", True, 1e-3)
    assert parse_config(Run, []) == Run()


def test_fields_without_a_default_are_positional():
    assert parse_config(Copy, ["a,b", "c", "d"]) == Copy(["a,b", "c"], "d")
    assert "required: files, target" in error_of(cls=Copy)
    assert "unknown option --mov; did you mean --move?" in error_of("--mov", cls=Copy)
    assert "target is written without its name" in error_of("a", "--target=b", cls=Copy)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--bias"], True),
        (["--bias=false"], False),
        (["--bias=True"], True),
        (["--bias", "false"], False),
        (["--compile"], True),
        (["--compile=none"], None),
    ],
)
def test_a_bare_flag_means_true(argv, value):
    shape = parse_config(Run, argv).shape
    assert (shape.compile if "--compile" in argv[0] else shape.bias) is value


def test_a_bare_flag_takes_no_positional_argument_with_it():
    expected = Copy(["a"], "xxmove", move=True)
    for argv in (["--move", "a", "xxmove"], ["a", "xxmove", "--move"], ["--move", "true", "a", "xxmove"]):
        assert parse_config(Copy, argv) == expected


def test_hyphens_are_underscores_in_names_but_not_in_values():
    cfg = parse_config(Run, ["--max-lr=1e-2", "--name=two-words"])
    assert (cfg.optim.max_lr, cfg.shape.name) == (1e-2, "two-words")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_lrr=1"], "unknown option --max_lrr; did you mean --max_lr?"),
        (["--widht=3"], "unknown option --widht; did you mean --width?"),
        (["--lr=3"], "unknown option --lr; did you mean --max_lr?"),
        (["--zzz=3"], "unknown option --zzz; --help lists them all"),
        (["--max_l=3"], "unknown option --max_l; did you mean --max_lr?"),  # no abbreviations
        (["a.toml", "b.toml"], "unexpected argument 'b.toml'"),
        (["--schedule=step"], "optim.schedule expects {cosine,linear}, got 'step'"),
        (["--bias=yes"], "shape.bias expects bool, got 'yes'"),
        (["--max_lr=0"], "max_lr must be above 0"),  # the dataclass's own check
        (["--width"], "argument --width: expected one argument"),
        (["absent.toml"], "cannot read config file absent.toml: No such file"),
        (["--epsilon=1e-5"], "epsilon is set in a config file, below [shape]"),
        (["--depth=12"], "--depth is no longer an option (see CHANGELOG.md)"),
    ],
)
def test_a_mistake_names_the_next_step(argv, message):
    assert message in error_of(*argv)


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e9", 3_000_000_000),
        ("500M", 500_000_000),
        ("1_000", 1000),
        ("10B", 10**10),
        ("1.5K", 1500),
        ("-3", -3),
        ("9007199254740993", 2**53 + 1),  # beyond the precision of a float
    ],
)
def test_integers_can_be_written_with_exponents_and_suffixes(text, value):
    width = parse_config(Run, [f"--width={text}"]).shape.width
    assert width == value
    assert type(width) is int


@pytest.mark.parametrize("text", ["1.5", "nan", "inf", "1e400", "three", "", "true", "0x10", "M"])
def test_what_is_not_an_integer_is_refused(text):
    assert f"shape.width expects int, got '{text}'" in error_of(f"--width={text}")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "fast"])
def test_what_is_not_a_finite_number_is_refused(text):
    assert "optim.max_lr expects float" in error_of(f"--max_lr={text}")


@pytest.mark.parametrize(("text", "seconds"), [("3h50m", 13800.0), ("90s", 90.0), ("1d", 86400.0), ("2.5", 2.5)])
def test_durations_are_seconds(text, seconds):
    assert parse_config(Run, [f"--limit={text}"]).shape.limit == seconds


def test_none_clears_what_can_be_none():
    assert parse_config(Run, ["--limit=none", "--heads=none", "--name=none"]).shape == Shape(name="none")
    assert "shape.width expects int" in error_of("--width=none")
    assert "expects int or none" in error_of("--heads=few")


def test_dicts_and_lists_are_written_with_commas():
    optim = parse_config(Run, ["--sources=data/web=0.8,data/code=0.2", "--betas=0.8,0.9"]).optim
    assert optim.sources == {"data/web": 0.8, "data/code": 0.2}
    assert optim.betas == [0.8, 0.9]
    assert parse_config(Run, ["--sources=data/mine"]).optim.sources == {"data/mine": 1.0}


def test_a_union_takes_the_first_type_that_fits():
    assert parse_value("8", int | Literal["auto"], "batch_size") == 8
    assert parse_value("auto", int | Literal["auto"], "batch_size") == "auto"
    with pytest.raises(ValueError, match=r"batch_size expects int or \{auto\}, got 'most'"):
        parse_value("most", int | Literal["auto"], "batch_size")


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[shape]\nwidht = 3\n", "unknown key shape.widht; did you mean shape.width?"),
        ("width = 3\n", "unknown key width; did you mean shape.width?"),
        ('[shape]\nwidth = "wide"\n', "shape.width expects int, got 'wide'"),
        ("[shape]\nwidth = true\n", "shape.width expects int, got True"),
        ("[shape]\nname = 3\n", "shape.name expects str, got 3"),
        ("shape = 3\n", "shape is a table"),
        ("[shape\n", "run.toml: "),
        ("[optim]\nmax_lr = nan\n", "optim.max_lr expects float, got nan"),
        ("[optim]\nsources = 3\n", "optim.sources expects NAME=WEIGHT,..."),
        ("[shape]\ndepth = 13\n", "shape.depth is no longer an option"),
        ('[shape]\nschedule = "linear"\n', "unknown key shape.schedule; did you mean optim.schedule?"),
    ],
)
def test_a_mistake_in_a_file_names_the_key(text, message, tmp_path):
    path = write_toml(tmp_path, text)
    assert message in error_of(path)
    if text == "shape = 3\n":
        assert message in error_of(path, "--width=3")


def test_a_json_file_must_be_an_object(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("[1, 2]")
    assert "expected tables of options, found a list" in error_of(str(path))


def test_file_only_and_retired_options_are_read_from_files(tmp_path):
    path = write_toml(tmp_path, '[shape]\nepsilon = 1e-5\ndepth = 12\nrate = "none"\nschedule = "cosine"\n')
    assert parse_config(Run, [path]) == Run(shape=Shape(epsilon=1e-5))


def test_a_config_survives_json_and_toml(tmp_path):
    cfg = Run(Shape(width=3, limit=None, bias=False), Optim(max_lr=1e-5, sources={"a/b": 0.25, "c": 0.75}))
    assert from_dict(Run, to_dict(cfg)) == cfg
    json_file = tmp_path / "run.json"
    json_file.write_text(json.dumps(to_dict(cfg)))
    optim = '[optim]\nmax_lr = 1e-5\nsources = {"a/b" = 0.25, c = 0.75}\n'
    toml_file = write_toml(tmp_path, '[shape]\nwidth = 3\nlimit = "none"\nbias = false\n' + optim)
    assert parse_config(Run, [str(json_file)]) == parse_config(Run, [toml_file]) == cfg


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run().shape.width = 3  # type: ignore[misc]


def test_differences_are_written_as_options_are():
    old = {"max_lr": 3e-4, "heads": None, "same": 1, "sources": {"a": 1.0}}
    new = {"max_lr": 1e-4, "heads": 4, "same": 1, "sources": {"a": 0.5, "b": 0.5}}
    expected = ["max_lr: 0.0003 -> 0.0001", "heads: none -> 4", "sources: a=1 -> a=0.5,b=0.5"]
    assert config.differences(old, new) == expected


# ---- Subcommands and scripts -----------------------------------------------------------------------------------------


def copy(cfg: Copy) -> Copy:
    """Copy files."""
    return cfg


def import_(cfg: Copy) -> str:
    """Import files."""
    return cfg.target


def test_the_first_argument_names_the_command():
    assert run_subcommand(copy, import_, argv=["copy", "--move", "a", "b"]) == Copy(["a"], "b", move=True)
    assert run_subcommand(copy, import_, argv=["import", "a", "b"]) == "b"  # `import` is a keyword of Python
    with pytest.raises(ValueError, match="unknown command cpoy; did you mean copy"):
        run_subcommand(copy, import_, argv=["cpoy"])
    with pytest.raises(ValueError, match=r"unknown command delete; usage: .*\{copy,import\}"):
        run_subcommand(copy, import_, argv=["delete"])


def test_help_lists_sections_options_and_what_only_files_can_set(capsys):
    with pytest.raises(SystemExit):
        parse_config(Run, ["--help"], "What it does.", "run.py")
    out = capsys.readouterr().out
    assert out.startswith("usage: run.py [FILE.toml] [--name=value ...]\n\nWhat it does.\n")
    assert "\n[shape] Shape of the network.\n  --width              width [8]\n" in out
    assert "  --sources            mixture [data/web=1]\n  --betas              decay rates [0.9,0.95]\n" in out
    assert "--epsilon" not in out
    assert "config files only: epsilon" in out


def test_subcommands_have_their_own_help(capsys):
    for argv in ([], ["--help"], ["copy", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            run_subcommand(copy, import_, argv=argv)
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.count("{copy,import} [--name=value ...]") == 2
    assert "copy FILES... TARGET [--name=value ...]\n\nCopy files.\n" in out
    assert re.search(r"^  TARGET +where to$", out, re.MULTILINE)
    assert re.search(r"^  --move +delete the originals \[false\]$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left"), 1, "failed: [Errno 28] No space left\n"),
        (config.Failure("disk full"), 1, "failed: disk full\n"),
        (ValueError("a\x1b[31mb\u202e"), 2, "error: a\\x1b[31mb\\u202e\n"),
    ],
)
def test_an_error_becomes_one_line_and_an_exit_code(error, code, last_line, capsys, monkeypatch):
    monkeypatch.delenv("NANO416_TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == code
    err = capsys.readouterr().err
    assert err.endswith(last_line)
    assert err.count("\n") == 1


def test_bugs_are_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)
    monkeypatch.setenv("NANO416_TRACEBACK", "1")
    with pytest.raises(ValueError, match="invalid literal"):
        run_cli(lambda: int("x"))


def test_visible_escapes_what_a_terminal_would_obey():
    assert visible("tab\t and é stay\n") == "tab\t and é stay\n"
    assert visible("\x07 \x9b \u2028 \ud800 \U000e0041") == r"\x07 \u009b \u2028 \ud800 \U000e0041".replace(
        r"\u009b", ascii("\x9b")[1:-1]
    )


SCRIPT = '''"""What the script does."""
from dataclasses import dataclass
from nano416.config import parse_config, run_cli

@dataclass(frozen=True)
class C:
    """Options."""

    n: int = 1  # lines

def main(cfg):
    for i in range(cfg.n):
        print(i)

run_cli(lambda: main(parse_config(C)))
'''


@pytest.mark.parametrize(("start", "name"), [(["script.py"], "script.py"), (["-m", "script"], "python -m script")])
def test_messages_name_the_program_as_it_was_started(start, name, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    help = subprocess.run([sys.executable, *start, "--help"], **run)
    assert help.stdout.startswith(f"usage: {name} [--name=value ...]\n\nWhat the script does.\n")
    mistake = subprocess.run([sys.executable, *start, "--m=2"], **run)
    assert (mistake.returncode, mistake.stderr) == (2, f"{name}: error: unknown option --m; --help lists them all\n")


def test_a_closed_pipe_ends_a_script_silently(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f"{shlex.quote(sys.executable)} script.py --n=1M | head -1; exit ${{PIPESTATUS[0]}}"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


# ---- The options of training.py --------------------------------------------------------------------------------------


@pytest.fixture
def help_text(capsys) -> str:
    with pytest.raises(SystemExit):
        parse_config(training.Config, ["--help"], training.__doc__, "training.py")
    return capsys.readouterr().out


def option_lines(help_text: str) -> list[str]:
    return [line for line in help_text.splitlines() if line.startswith("  --")]


def test_training_has_at_most_sixty_options(help_text):
    names = [line.split()[0] for line in option_lines(help_text)]
    assert len(set(names)) == len(names) <= 60


def test_help_begins_with_the_usage_and_the_commands_of_the_header(help_text):
    assert help_text.startswith("usage: training.py [FILE.toml] [--name=value ...]\n")
    assert "torchrun --standalone --nproc_per_node=8 training.py" in help_text
    assert "\n[optim] " in help_text


def test_help_shows_a_comment_and_a_default_for_every_option(help_text):
    for line in option_lines(help_text):
        assert re.fullmatch(r"  --\w+ +\S.* \[[^\[\]]*\]", line), line
        assert "type: ignore" not in line


def test_every_default_that_help_shows_can_be_given_as_shown(help_text):
    shown = [line.split()[0] + "=" + line.rpartition(" [")[2][:-1] for line in option_lines(help_text)]
    assert parse_config(training.Config, shown) == parse_config(training.Config, [])


def test_the_defaults_of_training_survive_a_config_file():
    assert from_dict(training.Config, to_dict(training.Config())) == training.Config()
