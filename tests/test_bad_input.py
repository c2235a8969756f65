"""What a user can get wrong: one line on stderr that names the value and the way out, exit code 2, no half-written file."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import data_pipeline
import eval_hellaswag
import training
from nano416 import checkpoint
from nano416.config import parse_config, run_cli
from tools import plot

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_plots")]

Damage = Callable[[Path], object]
TINY_RUN = [
    "--dim=32",
    "--n_layers=1",
    "--n_heads=2",
    "--seq_len=32",
    "--batch_size=2",
    "--batch_tokens=64",
    "--max_steps=1",
    "--hellaswag=none",
    "--eval_tokens=64",
    "--sample_tokens=0",
]
CHECKPOINT = "run/checkpoint_step_1.pt"
SHARD = "data/train_000000.bin"


@pytest.fixture(scope="module")
def finished_run(no_plots, tmp_path_factory) -> Path:
    """A folder with a dataset in data/ and a finished run in run/, copied for each case."""
    folder = tmp_path_factory.mktemp("finished")
    data_pipeline.sample(data_pipeline.SampleConfig(out_dir=f"{folder}/data"))
    argv = [*TINY_RUN, f"--sources={folder}/data", f"--run_dir={folder}/run"]
    training.main(parse_config(training.Config, argv))
    return folder


def assert_refused(main: Callable[[], object], words: list[str], capsys) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- Damage to files -------------------------------------------------------------------------------------------------


def overwrite(name: str, content: bytes, offset: int = 0) -> Damage:
    def change(folder: Path) -> None:
        with open(folder / name, "r+b") as file:
            file.seek(offset)
            file.write(content)

    return change


def truncate(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def edit_meta(change: Callable[[dict], object]) -> Damage:
    def edit(folder: Path) -> None:
        meta = json.loads((folder / "data/meta.json").read_text())
        change(meta)
        (folder / "data/meta.json").write_text(json.dumps(meta))

    return edit


def drop_mlp_weights(folder: Path) -> None:
    state = dict(checkpoint.read(folder / CHECKPOINT))
    state["model"] = {name: tensor for name, tensor in state["model"].items() if "mlp" not in name}
    checkpoint.write(folder / CHECKPOINT, state)


def raise_token_ids(folder: Path) -> None:
    """All tokens become 300; the vocabulary has 257."""
    n_tokens = ((folder / SHARD).stat().st_size - 1024) // 2
    overwrite(SHARD, np.full(n_tokens, 300, dtype=np.uint16).tobytes(), offset=1024)(folder)


def plant_bomb(folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    torch.save({"format": 1, "model": Bomb(), "config": {}}, folder / CHECKPOINT)


def move_out_of_folder(meta: dict) -> None:
    meta["shards"][0]["file"] = f"../{CHECKPOINT}"


def drop_validation_shards(meta: dict) -> None:
    meta["shards"] = [shard for shard in meta["shards"] if shard["split"] == "train"]


# ---- training.py -----------------------------------------------------------------------------------------------------

# {} is the folder of the run. Case: (options, words of the message).
BAD_OPTIONS = {
    "unknown option": (["--lr=1e-3"], ["unknown option --lr", "max_lr"]),
    "abbreviated option": (["--max_step=3"], ["unknown option --max_step", "--max_steps"]),
    "option of config files": (["--norm_eps=1e-5"], ["norm_eps is set in a config file", "[model]"]),
    "not a duration": (["--time_limit=3 hours"], ["time_limit", "3 hours"]),
    "no time between saves": (["--save_interval=0"], ["save_interval", "0"]),
    "kill switch is on": (["--kill_switch={}/data/meta.json"], ["kill switch", "meta.json"]),
    "word for a number": (["--max_steps=many"], ["max_steps", "int", "many"]),
    "fraction of a step": (["--max_steps=1.5"], ["max_steps", "1.5"]),
    "learning rate is not a number": (["--max_lr=nan"], ["max_lr", "nan"]),
    "negative learning rate": (["--max_lr=-1"], ["max_lr", "-1"]),
    "minimum above maximum": (["--min_lr=1"], ["min_lr", "max_lr"]),
    "unknown schedule": (["--schedule=cosin"], ["schedule", "cosine", "cosin"]),
    "heads do not divide the width": (["--n_heads=5"], ["dim (32)", "n_heads (5)"]),
    "key/value heads do not divide the heads": (["--n_kv_heads=3"], ["n_kv_heads (3)"]),
    "odd head width": (["--n_heads=32"], ["head_dim", "even"]),
    "no layers": (["--n_layers=0"], ["n_layers", "0"]),
    "batch is not divisible": (["--batch_tokens=100", "--run_dir={}/new"], ["batch_tokens (100)", "--batch_tokens=96"]),
    "budget below one step": (["--max_steps=none", "--max_tokens=10"], ["max_tokens=10", "64"]),
    "vocabulary too small": (["--vocab_size=100"], ["vocab_size (100)", "257"]),
    "missing config file": (["nowhere.toml"], ["nowhere.toml", "No such file"]),
    "no data folder": (["--sources={}/nowhere"], ["nowhere", "data_pipeline.py"]),
    "weight of a source is a word": (["--sources={}/data=half"], ["sources", "half"]),
    "context longer than the data": (["--seq_len=1M", "--batch_tokens=2M", "--run_dir={}/new"], ["1000001"]),
    "resume from nowhere": (["--resume={}/nowhere.pt"], ["nowhere.pt"]),
    "resume mistyped": (["--resume=latst"], ["latst"]),
    "resume never, yet there is a run": (["--resume=never"], ["never", "checkpoint_step_1.pt"]),
    "checkpoint of another shape": (["--dim=64", "--max_steps=2"], ["dim: 32 -> 64"]),
    "init_from another shape": (["--init_from={}/run", "--run_dir={}/new", "--dim=64"], ["dim: 32 -> 64"]),
    "run directory is a file": (["--run_dir={}/data/meta.json"], ["run_dir", "meta.json"]),
}
CONTINUE = ["--max_steps=2"]
START = ["--run_dir={}/new"]
# Case: (what is damaged first, options, words of the message).
DAMAGED_FILES = {
    "truncated checkpoint": (truncate(CHECKPOINT, 3000), CONTINUE, ["checkpoint_step_1.pt"]),
    "flipped bytes in a checkpoint": (overwrite(CHECKPOINT, b"\0\1\2", 20_000), CONTINUE, ["damaged"]),
    "checkpoint that runs code": (plant_bomb, CONTINUE, ["refused", "run code"]),
    "checkpoint without some weights": (drop_mlp_weights, CONTINUE, ["missing", "mlp"]),
    "missing shard": (remove(SHARD), START, ["train_000000.bin"]),
    "truncated shard": (truncate(SHARD, 5000), START, ["train_000000.bin"]),
    "another file as shard": (overwrite(SHARD, b"PK\3\4"), START, ["train_000000.bin"]),
    "token outside the vocabulary": (raise_token_ids, START, ["300", "257"]),
    "truncated meta.json": (truncate("data/meta.json", 40), START, ["meta.json"]),
    "shard name leaves its folder": (edit_meta(move_out_of_folder), START, ["../run"]),
    "no validation shards": (edit_meta(drop_validation_shards), START, ["val"]),
}


def assert_training_refuses(folder: Path, options: list[str], words: list[str], capsys) -> None:
    """Nothing in `folder` is touched and no checkpoint is written, not even a part of one."""
    before = contents(folder)
    options = [option.format(folder) for option in options]
    given = {option.split("=")[0] for option in options}
    usual = [*TINY_RUN, f"--sources={folder}/data", f"--run_dir={folder}/run"]
    argv = [option for option in usual if option.split("=")[0] not in given] + options
    assert_refused(lambda: training.main(parse_config(training.Config, argv)), words, capsys)
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before
    written = after.keys() - before.keys()
    assert not any(".pt" in name or ".tmp" in name or not name.startswith("new/") for name in written), written


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_training_refuses_a_bad_option_in_one_line_and_touches_no_file(case, finished_run, tmp_path, capsys):
    options, words = BAD_OPTIONS[case]
    folder = shutil.copytree(finished_run, tmp_path / "case")
    assert_training_refuses(folder, options, words, capsys)


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_training_refuses_a_damaged_file_in_one_line_and_touches_no_file(case, finished_run, tmp_path, capsys):
    damage, options, words = DAMAGED_FILES[case]
    folder = shutil.copytree(finished_run, tmp_path / "case")
    damage(folder)
    assert_training_refuses(folder, options, words, capsys)


# ---- The other scripts -----------------------------------------------------------------------------------------------

HELLASWAG = {
    "no checkpoint": (["--checkpoint={}/nowhere"], ["nowhere"]),
    "empty run directory": (["--checkpoint={}/data"], ["data", "checkpoint_step"]),
    "no items": (["--checkpoint={}/run", "--data={}/nowhere.jsonl"], ["nowhere.jsonl"]),
    "not HellaSwag items": (["--checkpoint={}/run", "--data={}/run/metrics.jsonl"], ["metrics.jsonl:1"]),
    "zero examples": (["--checkpoint={}/run", "--num_examples=0"], ["num_examples", "0"]),
    "unwritable output": (["--checkpoint={}/run", "--output={}/nowhere/scores.json"], ["scores.json"]),
    "checkpoint forgotten": ([], ["--checkpoint"]),
}


@pytest.mark.parametrize("case", HELLASWAG)
def test_eval_hellaswag_refuses_bad_input_in_one_line(case, finished_run, capsys):
    options, words = HELLASWAG[case]
    argv = [option.format(finished_run) for option in options]
    assert_refused(lambda: eval_hellaswag.main(parse_config(eval_hellaswag.EvalConfig, argv)), words, capsys)


@pytest.mark.parametrize(("argv", "word"), [(["nowhere"], "nowhere"), ([], "run_dirs")])
def test_plot_refuses_bad_input_in_one_line(argv, word, capsys):
    assert_refused(lambda: plot.main(parse_config(plot.PlotConfig, argv)), [word], capsys)


SCRIPTS = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")] if "\n    run_cli(" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_answers_a_mistyped_option_in_one_line(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--moddel=1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    out, error = capsys.readouterr()
    assert (stopped.value.code, out, error.count("\n")) == (2, "", 1), error
    assert "--moddel" in error
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_the_line_comes_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = ["training.py", *TINY_RUN, "--sources=nowhere", f"--run_dir={tmp_path}/run"]
    done = subprocess.run([*torchrun, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("training.py: error:") == 1, done.stderr[-3000:]
