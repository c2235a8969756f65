"""config.py: one typed configuration from defaults, a file and the command line; --help without torch."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from conftest import ROOT

import config
from config import ConfigError, from_dict, parse_config, to_dict


@dataclass(frozen=True)
class Shape:
    """Shape."""

    width: int = 8  # width
    name: str = "plain"  # name
    causal: bool = True  # flag
    heads: int | None = 4  # optional
    compile: bool | None = None  # optional flag


@dataclass(frozen=True)
class Optim:
    """Optimizer."""

    max_lr: float = 3e-4  # rate
    schedule: Literal["cosine", "linear"] = "cosine"  # way down
    sources: dict[str, float] = field(default_factory=lambda: {"data/web": 1.0})  # mixture

    def __post_init__(self):
        if self.max_lr <= 0:
            raise ValueError(f"max_lr must be above 0, got {self.max_lr}")


@dataclass(frozen=True)
class Both:
    """Both."""

    shape: Shape = field(default_factory=Shape)
    optim: Optim = field(default_factory=Optim)


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[shape]\nwidth = 16\nname = "file"\n[optim]\nmax_lr = 1e-3\n')
    return str(path)


def refusal(capsys, *argv) -> str:
    """The one line that `argv` is answered with, after exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(Both, argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), f"not one line: {err!r}"
    return err


def test_command_line_beats_file_beats_default(toml):
    cfg = parse_config(Both, [toml, "--width=32"])
    assert (cfg.shape.width, cfg.shape.name, cfg.shape.causal) == (32, "file", True)
    assert parse_config(Both, []) == Both()


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e9", 3_000_000_000), ("500M", 500_000_000), ("1_000", 1000), ("10B", 10**10), ("1.5K", 1500), ("-3", -3)],
)
def test_integers_may_be_written_as_people_write_them(text, value):
    width = parse_config(Both, [f"--width={text}"]).shape.width
    assert width == value and type(width) is int


def test_integers_beyond_float_precision_stay_exact():
    assert parse_config(Both, ["--width=9007199254740993"]).shape.width == 9007199254740993


@pytest.mark.parametrize("text", ["1.5", "nan", "inf", "1e400", "three", "", "true", "0x10", "M"])
def test_what_is_no_integer_is_refused(text, capsys):
    assert f"shape.width expects int, got '{text}'" in refusal(capsys, f"--width={text}")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "fast"])
def test_what_is_no_finite_number_is_refused(text, capsys):
    assert "optim.max_lr expects float" in refusal(capsys, f"--max_lr={text}")


def test_none_clears_an_optional_and_nothing_else(capsys):
    assert parse_config(Both, ["--heads=none"]).shape.heads is None
    assert parse_config(Both, ["--name=none"]).shape.name == "none"
    assert "shape.width expects int" in refusal(capsys, "--width=none")
    assert "expects int or none" in refusal(capsys, "--heads=few")


def test_hyphens_are_underscores_in_names_only():
    cfg = parse_config(Both, ["--max-lr=1e-2", "--name=two-words"])
    assert (cfg.optim.max_lr, cfg.shape.name) == (1e-2, "two-words")


@pytest.mark.parametrize(
    ("argv", "value"),
    [(["--causal"], True), (["--causal=false"], False), (["--causal=True"], True), (["--causal", "false"], False)],
)
def test_a_bare_flag_means_true(argv, value):
    assert parse_config(Both, argv).shape.causal is value


def test_a_bare_optional_flag_means_true_as_well():
    assert parse_config(Both, ["--compile"]).shape.compile is True
    assert parse_config(Both, ["--compile=none"]).shape.compile is None


def test_a_flag_takes_no_other_words(capsys):
    assert "shape.causal expects bool, got 'yes'" in refusal(capsys, "--causal=yes")


def test_a_dict_is_written_as_names_and_weights():
    sources = parse_config(Both, ["--sources=data/web=0.8,data/code=0.2"]).optim.sources
    assert sources == {"data/web": 0.8, "data/code": 0.2}
    assert parse_config(Both, ["--sources=data/mine"]).optim.sources == {"data/mine": 1.0}


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--max_lrr=1"], "unknown option --max_lrr; did you mean --max_lr?"),
        (["--widht=3"], "unknown option --widht; did you mean --width?"),
        (["--zzz=3"], "unknown option --zzz; --help lists them all"),
        (["--max_l=3"], "unknown option --max_l; did you mean --max_lr?"),  # no abbreviations
        (["a.toml", "b.toml"], "unexpected argument 'b.toml'"),
        (["--schedule=step"], "optim.schedule expects {cosine,linear}, got 'step'"),
        (["--max_lr=0"], "max_lr must be above 0"),  # the dataclass's own check
        (["absent.toml"], "cannot read config file absent.toml: No such file"),
    ],
)
def test_a_mistake_is_one_line_with_the_next_step(argv, hint, capsys):
    assert hint in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "hint"),
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
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(text, hint, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert hint in refusal(capsys, str(path))


def test_a_table_in_the_way_of_an_option_is_named(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("shape = 3\n")
    assert "shape is a table" in refusal(capsys, str(path), "--width=3")


def test_a_json_file_that_is_no_object_is_refused(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text("[1, 2]")
    assert "expected tables of options, found a list" in refusal(capsys, str(path))


def test_a_config_survives_json_and_toml(tmp_path):
    cfg = Both(Shape(width=3, heads=None, causal=False), Optim(max_lr=1e-5, sources={"a/b": 0.25, "c": 0.75}))
    assert from_dict(Both, to_dict(cfg)) == cfg
    as_json, as_toml = tmp_path / "c.json", tmp_path / "c.toml"
    as_json.write_text(json.dumps(to_dict(cfg)))
    as_toml.write_text(
        '[shape]\nwidth = 3\nheads = "none"\ncausal = false\n[optim]\nmax_lr = 1e-5\nsources = {"a/b" = 0.25, c = 0.75}\n'
    )
    assert parse_config(Both, [str(as_json)]) == parse_config(Both, [str(as_toml)]) == cfg


def test_a_config_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Both().shape.width = 3  # type: ignore[misc]


def test_differences_are_listed_as_they_are_written():
    old = {"max_lr": 3e-4, "heads": None, "same": 1, "sources": {"a": 1.0}}
    new = {"max_lr": 1e-4, "heads": 4, "same": 1, "sources": {"a": 0.5, "b": 0.5}}
    assert config.differences(old, new) == [
        "max_lr: 0.0003 -> 0.0001",
        "heads: none -> 4",
        "sources: a=1 -> a=0.5,b=0.5",
    ]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(ValueError("two\nlines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_run_turns_an_error_into_one_line(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        config.run(main)
    assert stopped.value.code == code and capsys.readouterr().err.endswith(said)


def test_run_hides_no_bug():
    with pytest.raises(ZeroDivisionError):
        config.run(lambda: 1 / 0)


def test_from_dict_names_the_nested_key():
    with pytest.raises(ConfigError, match=r"unknown key optim\.lr"):
        from_dict(Both, {"optim": {"lr": 1}})


# ---- The knobs of training.py ----------------------------------------------------------------------------------------


def knobs() -> dict[str, list[str]]:
    import training

    return {s: [f.name for f in dataclasses.fields(c)] for s, c in config._sections(training.Config).items()}


def test_every_knob_has_one_name_and_there_are_at_most_sixty_six_and_nine_of_diffusion():
    names = [name for section in knobs().values() for name in section]
    assert len(names) == len(set(names)) <= 75 and len(knobs()["diffusion"]) <= 9


def test_the_defaults_of_training_survive_a_config_file():
    import training

    assert from_dict(training.Config, to_dict(training.Config())) == training.Config()


@pytest.fixture(scope="module")
def help_text(tmp_path_factory) -> str:
    """`training.py --help` of a machine where importing torch, numpy or tiktoken fails."""
    absent = tmp_path_factory.mktemp("absent")
    for name in ("torch", "numpy", "tiktoken"):
        (absent / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    command = [sys.executable, str(ROOT / "training.py"), "--help"]
    done = subprocess.run(command, env={"PYTHONPATH": str(absent)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_help_lists_every_knob_with_its_comment_and_default(help_text):
    lines = {line.split()[0]: line for line in help_text.splitlines() if line.startswith("  --")}
    assert list(lines) == [f"--{name}" for section in knobs().values() for name in section]
    for option, line in lines.items():
        comment, bracket, default = line.removeprefix(f"  {option}").rpartition(" [")
        assert comment.strip() and bracket and default.endswith("]"), f"{option} has no comment on its line"


def test_every_default_that_help_shows_can_be_given_as_it_is_shown(help_text):
    import training

    shown = [
        line.split()[0] + "=" + line.rpartition(" [")[2][:-1] for line in help_text.splitlines() if line[:4] == "  --"
    ]
    assert parse_config(training.Config, shown) == parse_config(training.Config, []) and "--schedule=linear" in shown


def test_help_begins_with_usage_and_the_commands_of_the_header(help_text):
    assert help_text.startswith("usage: training.py [FILE.toml] [--name=value ...]")
    assert "torchrun --standalone --nproc_per_node=8 training.py" in help_text


@pytest.mark.parametrize("script", ["eval_hellaswag.py", "metrics.py"])
def test_help_of_other_scripts_needs_no_torch_either(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
