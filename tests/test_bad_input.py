"""What a user can get wrong: each is one line on stderr that names the value and the way out, exit code 2, and nothing
half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoint
import config
import data_pipeline
import eval_hellaswag
import metrics
import training

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_plots")]

TINY = [
    "--dim=32",
    "--n_layers=1",
    "--n_heads=2",
    "--seq_len=32",
    "--batch_size=2",
    "--batch_tokens=64",
    "--max_steps=1",
]


@pytest.fixture(scope="module")
def made(no_plots, tmp_path_factory) -> Path:
    """A prepared corpus and a finished run, copied for each case."""
    folder = tmp_path_factory.mktemp("made")
    data_pipeline.sample(folder / "data")
    args = [*TINY, f"--sources={folder}/data", f"--run_dir={folder}/run", "--hellaswag=none", "--eval_tokens=64"]
    training.main(config.parse_config(training.Config, args))
    return folder


def edit_meta(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        meta = json.loads((folder / "data/meta.json").read_text())
        change(meta)
        (folder / "data/meta.json").write_text(json.dumps(meta))

    return edit


def other_vocabulary(folder: Path) -> None:
    state = dict(checkpoint.read(checkpoint.path_of(folder / "run", 1)))
    state["model"] = {k: v for k, v in state["model"].items() if "mlp" not in k}
    checkpoint.write(checkpoint.path_of(folder / "run", 1), state)


def big_token(folder: Path) -> None:
    shard = folder / "data/train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[1024:] = np.full((len(raw) - 1024) // 2, 300, dtype=np.uint16).tobytes()
    shard.write_bytes(raw)


def bomb(folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    torch.save({"format": 1, "model": Bomb(), "config": {}}, folder / "run/checkpoint_step_1.pt")


def overwrite(name: str, content: bytes, at: int | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        if at is None:
            raw[:] = content
        else:
            raw[at : at + len(content)] = content
        (folder / name).write_bytes(raw)

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def nothing(folder: Path) -> None:
    pass


TRAIN = [  # name, options after the tiny run's, what is broken first, words of the message
    ("unknown option", ["--lr=1e-3"], nothing, ["unknown option --lr", "max_lr"]),
    ("abbreviated option", ["--max_step=3"], nothing, ["unknown option --max_step", "--max_steps"]),
    ("duration that is none", ["--time_limit=3 hours"], nothing, ["time_limit", "3 hours"]),
    ("no time between saves", ["--save_interval=0"], nothing, ["save_interval", "0"]),
    ("kill switch is on", ["--kill_switch={}/data/meta.json"], nothing, ["kill switch", "meta.json"]),
    ("word for a number", ["--max_steps=many"], nothing, ["max_steps", "int", "many"]),
    ("fraction of a step", ["--max_steps=1.5"], nothing, ["max_steps", "1.5"]),
    ("learning rate not a number", ["--max_lr=nan"], nothing, ["max_lr", "nan"]),
    ("negative learning rate", ["--max_lr=-1"], nothing, ["max_lr", "-1"]),
    ("minimum above maximum", ["--min_lr=1"], nothing, ["min_lr", "max_lr"]),
    ("unknown schedule", ["--schedule=cosin"], nothing, ["schedule", "cosine", "cosin"]),
    ("heads do not divide the width", ["--n_heads=5"], nothing, ["dim (32)", "n_heads (5)"]),
    ("key/value heads do not divide heads", ["--n_kv_heads=3"], nothing, ["n_kv_heads (3)"]),
    ("odd head width", ["--n_heads=32"], nothing, ["head_dim", "even"]),
    ("no layers", ["--n_layers=0"], nothing, ["n_layers", "0"]),
    ("batch not divisible", ["--batch_tokens=100"], nothing, ["batch_tokens (100)", "--batch_tokens=96"]),
    ("budget below one step", ["--max_steps=none", "--max_tokens=10"], nothing, ["max_tokens (10)", "64"]),
    ("vocabulary too small", ["--vocab_size=100"], nothing, ["vocab_size (100)", "257"]),
    ("missing config file", ["nowhere.toml"], nothing, ["nowhere.toml", "No such file"]),
    ("no data folder", ["--sources={}/nowhere"], nothing, ["nowhere", "data_pipeline.py"]),
    ("weight of a source is a word", ["--sources={}/data=half"], nothing, ["sources", "half"]),
    ("context longer than the data", ["--seq_len=1M", "--batch_tokens=2M", "--run_dir={}/new"], nothing, ["1000001"]),
    ("resume from nowhere", ["--resume={}/nowhere.pt"], nothing, ["nowhere.pt"]),
    ("resume mistyped", ["--resume=latst"], nothing, ["latst"]),
    ("resume never, yet there is a run", ["--resume=never"], nothing, ["never", "checkpoint_step_1.pt"]),
    ("checkpoint of another shape", ["--dim=64", "--max_steps=2"], nothing, ["dim: 32 -> 64"]),
    ("truncated checkpoint", ["--max_steps=2"], cut("run/checkpoint_step_1.pt", 3000), ["checkpoint_step_1.pt"]),
    ("flipped bytes in a checkpoint", ["--max_steps=2"], overwrite("run/checkpoint_step_1.pt", b"\0\1\2", 20_000), ["damaged"]),
    ("checkpoint that runs code", ["--max_steps=2"], bomb, ["refused", "run code"]),
    ("checkpoint without some weights", ["--max_steps=2"], other_vocabulary, ["missing", "mlp"]),
    ("init_from weights of another shape", ["--init_from={}/run", "--run_dir={}/new", "--dim=64"], nothing, ["dim: 32 -> 64"]),
    ("run directory is a file", ["--run_dir={}/data/meta.json"], nothing, ["run_dir", "meta.json"]),
    ("missing shard", ["--run_dir={}/new"], remove("data/train_000000.bin"), ["train_000000.bin"]),
    ("truncated shard", ["--run_dir={}/new"], cut("data/train_000000.bin", 5000), ["train_000000.bin"]),
    ("foreign file as shard", ["--run_dir={}/new"], overwrite("data/train_000000.bin", b"PK\3\4", 0), ["train_000000.bin"]),
    ("token outside the vocabulary", ["--run_dir={}/new"], big_token, ["300", "257"]),
    ("torn meta.json", ["--run_dir={}/new"], cut("data/meta.json", 40), ["meta.json"]),
    ("shard name leaves its folder", ["--run_dir={}/new"],
        edit_meta(lambda meta: meta["shards"][0].update(file="../run/checkpoint_step_1.pt")), ["../run"]),
    ("no validation shard", ["--run_dir={}/new"],
        edit_meta(lambda meta: meta.update(shards=[s for s in meta["shards"] if s["split"] == "train"])), ["val"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "breaks", "words"), [case[1:] for case in TRAIN], ids=[case[0] for case in TRAIN])
def test_what_training_cannot_use_is_one_line_and_no_file_is_touched(
    made, tmp_path, capsys, monkeypatch, options, breaks, words
):
    folder = tmp_path / "case"
    shutil.copytree(made, folder)
    breaks(folder)
    before = contents(folder)
    given = {option.split("=")[0] for option in options}
    usual = [*TINY, f"--sources={folder}/data", f"--run_dir={folder}/run", "--hellaswag=none", "--eval_tokens=64"]
    argv = [option for option in usual if option.split("=")[0] not in given] + [o.format(folder) for o in options]
    refused(lambda: training.main(config.parse_config(training.Config, argv)), capsys, words)
    after = contents(folder)
    new = {name for name in after if name not in before and not name.startswith("new")}
    assert not new and all(after[name] == content for name, content in before.items()), "an existing file was touched"
    assert not any(".pt" in name or ".tmp" in name for name in after if name.startswith("new"))


def refused(main: Callable[[], object], capsys, words: list[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        config.run(main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    assert all(word in error for word in words), error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


HELLASWAG = [
    ("no checkpoint", ["--checkpoint={}/nowhere"], ["nowhere"]),
    ("empty run directory", ["--checkpoint={}/data"], ["data", "checkpoint_step"]),
    ("no items", ["--checkpoint={}/run", "--data={}/nowhere.jsonl"], ["nowhere.jsonl"]),
    ("no HellaSwag items", ["--checkpoint={}/run", "--data={}/run/metrics.jsonl"], ["metrics.jsonl:1"]),
    ("zero examples", ["--checkpoint={}/run", "--num_examples=0"], ["num_examples", "0"]),
    ("unwritable output", ["--checkpoint={}/run", "--output={}/nowhere/scores.json"], ["scores.json"]),
    ("checkpoint forgotten", [], ["--checkpoint"]),
]


@pytest.mark.parametrize(("options", "words"), [case[1:] for case in HELLASWAG], ids=[case[0] for case in HELLASWAG])
def test_what_hellaswag_cannot_use_is_one_line(made, capsys, options, words):
    argv = [option.format(made) for option in options]
    refused(lambda: eval_hellaswag.main(eval_hellaswag.parse(argv)), capsys, words)


@pytest.mark.parametrize("argv", [["nowhere"], []])
def test_what_metrics_cannot_read_is_one_line(capsys, monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["metrics.py", *argv])
    refused(metrics.main, capsys, ["run_dir"] if not argv else ["nowhere"])


@pytest.mark.parametrize("script", ["training.py", "data_pipeline.py", "eval_hellaswag.py", "metrics.py", "chat.py"])
def test_a_mistyped_option_of_a_real_process_is_one_line(script, tmp_path):
    argv = [sys.executable, ROOT / script, *(["sample"] if script == "data_pipeline.py" else []), "--moddel=1"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and script in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_the_line_comes_once(made, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "training.py"]
    argv = [*TINY, "--sources=nowhere", f"--run_dir={tmp_path}/run"]
    done = subprocess.run([sys.executable, *command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("training.py: error:") == 1, done.stderr[-3000:]
