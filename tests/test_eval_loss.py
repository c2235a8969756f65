"""tools/eval_loss.py: the validation loss of a checkpoint is the loss that training logged."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, changed

import training
from nano416 import metrics
from nano416.config import parse_config
from nano416.tokenizer import GPT2
from tools import eval_loss

TINY = ["--dim=32", "--n_layers=2", "--n_heads=2", "--seq_len=32", "--batch_size=4", "--batch_tokens=512"]
TINY += ["--max_steps=3", "--dtype=fp32", "--eval_tokens=2000", "--hellaswag=none", "--sample_tokens=8"]
OPTIONS = ["--eval_tokens=2000", "--dtype=fp32"]


def train(data: Path, run_dir: Path, *extra: str) -> Path:
    training.main(parse_config(training.Config, changed([*TINY, f"--sources={data}", f"--run_dir={run_dir}"], *extra)))
    return run_dir


@pytest.fixture(scope="module")
def autoregressive_run(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("runs") / "ar")


@pytest.fixture(scope="module")
def diffusion_run(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("runs") / "mdm", "--objective=mdm", "--num_mc=2")


def evaluate(*argv: str | Path) -> None:
    """The command `python -m tools.eval_loss argv`, in this process."""
    eval_loss.main(parse_config(eval_loss.EvalLossConfig, [str(arg) for arg in argv]))


def last_validation(run_dir: Path) -> dict[str, float]:
    return [row for row in metrics.read_metrics(run_dir) if "val_loss" in row][-1]


def parse_table(text: str) -> dict[str, list[float]]:
    """{first column: the numbers after it} of a printed table."""
    rows = [line.split("  ", 1) for line in text.splitlines()[2:]]
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def test_the_loss_is_the_one_that_training_logged(autoregressive_run, data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    evaluate(autoregressive_run, f"--sources={data},{copy}", *OPTIONS)
    table = parse_table(capsys.readouterr().out)
    row = last_validation(autoregressive_run)
    expected = [row["val_loss"], math.exp(row["val_loss"]), row["val_bpb"]]
    for name in (str(data), str(copy), "all tokens (micro)"):
        assert table[name] == pytest.approx(expected, rel=1e-4)
    assert table["sources (macro)"] == pytest.approx(expected[:2], rel=1e-4)


def test_one_source_is_one_line_and_the_batch_size_does_not_matter(autoregressive_run, data, capsys):
    evaluate(autoregressive_run, f"--sources={data}", *OPTIONS)
    one = parse_table(capsys.readouterr().out)
    evaluate(autoregressive_run, f"--sources={data}", "--batch_size=3", *OPTIONS)
    other = parse_table(capsys.readouterr().out)
    assert list(one) == ["all tokens (micro)"]
    assert one["all tokens (micro)"] == pytest.approx(other["all tokens (micro)"], abs=2e-4)


def test_a_masked_diffusion_checkpoint_is_recognized(diffusion_run, data, capsys):
    evaluate(diffusion_run, f"--sources={data}", "--num_mc=2", *OPTIONS)
    (loss, _, _) = parse_table(capsys.readouterr().out)["all tokens (micro)"]
    assert loss == pytest.approx(last_validation(diffusion_run)["val_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (GPT2, r"tokens of gpt2 \(vocabulary 20940fd36bff\), .* reads bytes \(.*\); prepare .* --tokenizer=bytes"),
        ({"sha256": "0" * 64}, r"tokens of bytes \(vocabulary 000000000000\), .* reads bytes \("),
        ({"eot_id": 0}, "prepare the text again"),
    ],
)
def test_data_of_another_tokenizer_is_refused(changes, hint, autoregressive_run, data, tmp_path):
    """Also of one with the same name, such as an older tokenizer.json."""
    shutil.copytree(data, tmp_path / "other")
    meta = json.loads((data / "meta.json").read_text())
    meta["tokenizer"] |= changes
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=hint):
        evaluate(autoregressive_run, f"--sources={tmp_path / 'other'}")


def test_data_of_the_same_tokenizer_by_another_name_is_accepted(autoregressive_run, data, tmp_path, capsys):
    """A tokenizer.json may have been moved."""
    shutil.copytree(data, tmp_path / "other")
    meta = json.loads((data / "meta.json").read_text())
    meta["tokenizer"]["name"] = "elsewhere/tokenizer.json"
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta))
    evaluate(autoregressive_run, f"--sources={tmp_path / 'other'}", *OPTIONS)
    assert "all tokens (micro)" in capsys.readouterr().out


@pytest.mark.parametrize("seq_len", [1, 7, 100])
def test_any_context_length_can_be_evaluated(seq_len, data, tmp_path, capsys):
    options = [f"--seq_len={seq_len}", "--batch_size=2", f"--batch_tokens={2 * seq_len}", "--max_steps=1"]
    run_dir = train(data, tmp_path / "run", *options)
    capsys.readouterr()
    evaluate(run_dir, f"--sources={data}", *OPTIONS)
    (loss, _, _) = parse_table(capsys.readouterr().out)["all tokens (micro)"]
    assert loss == pytest.approx(last_validation(run_dir)["val_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--num_mc=4", "--num_mc has no effect on an autoregressive model"),
        ("--eval_tokens=0", "eval_tokens must be at least 1, got 0"),
        ("--batch_size=0", "batch_size must be at least 1, got 0"),
        ("--sources=absent", "absent"),
    ],
)
def test_bad_input_is_named(autoregressive_run, data, option, hint):
    sources = [] if option.startswith("--sources") else [f"--sources={data}"]
    with pytest.raises(ValueError, match=hint):
        evaluate(autoregressive_run, *sources, option)


@pytest.mark.slow
def test_two_processes_print_the_table_of_one(autoregressive_run, data):
    outputs = []
    for n in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "-m", "tools.eval_loss"]
        command = [sys.executable, *torchrun, str(autoregressive_run), f"--sources={data}", *OPTIONS]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.append(parse_table(done.stdout))
    assert outputs[1].keys() == outputs[0].keys()
    assert outputs[1]["all tokens (micro)"] == pytest.approx(outputs[0]["all tokens (micro)"], abs=2e-4)
