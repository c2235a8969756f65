"""Resuming: which checkpoint, how much is left, in which order, and what is refused."""

import gc
import json
import shutil
from pathlib import Path

import pytest
from conftest import changed
from processes import python
from test_training import arguments, losses, run, same_weights

import training
from nano416 import checkpoint, metrics
from nano416.config import parse_config
from nano416.dataloader import TokenLoader

pytestmark = pytest.mark.usefixtures("no_plots")

# No --max_steps: the tests count tokens. A step has 512.
SHORT = ["--max_steps=none", "--max_tokens=6144", "--eval_every=0", "--checkpoint_every=4"]
STEP_TOKENS = 512


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if path.suffix == ".pt" or path.name.startswith("abandoned"))


def refusal(data: Path, run_dir: Path, *options: str) -> str:
    with pytest.raises(ValueError) as caught:
        run(data, run_dir, *options)
    text = str(caught.value)
    assert "\n" not in text
    # The frames of the exception hold the lock of the run directory.
    del caught
    gc.collect()
    return text


def stop_at(monkeypatch, step: int) -> None:
    """Runs stop before step `step`, as if they had got a signal."""
    from nano416.fault_tolerance import StopSignal

    calls = []

    def check(self):
        calls.append(1)
        return ("SIGTERM" if len(calls) > step else None), False

    monkeypatch.setattr(StopSignal, "check", check)


def sequences_read(monkeypatch) -> list[int]:
    """The positions of all sequences that runs read from now on."""
    seen: list[int] = []
    real = TokenLoader.next_batch

    def next_batch(self):
        batch = real(self)
        if batch.weight:
            seen.extend(batch.sequence_ids)
        return batch

    monkeypatch.setattr(TokenLoader, "next_batch", next_batch)
    return seen


def interrupt(data: Path, run_dir: Path, monkeypatch, step: int, *options: str) -> None:
    """Train and stop before step `step`."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_at(patch, step)
        run(data, run_dir, *options)
    assert stopped.value.code == 75


# ---- The budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1024, 256, 768, 320])
def test_another_batch_changes_neither_the_budget_nor_the_sequences(data, tmp_path, monkeypatch, batch_tokens):
    """Half of the run with one batch, half with another: every sequence once, tokens as promised, no jump in lr."""
    interrupt(data, tmp_path, monkeypatch, 6, *SHORT)
    seen = sequences_read(monkeypatch)
    rows = run(data, tmp_path, *SHORT, f"--batch_tokens={batch_tokens}", "--batch_size=1")
    n_steps = 3072 // batch_tokens
    assert seen == list(range(96, 96 + n_steps * batch_tokens // 32))
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 6 + n_steps + 1))
    assert [row["tokens"] for row in logged[5:]] == [3072 + k * batch_tokens for k in range(n_steps + 1)]
    final = checkpoint.read_latest(tmp_path, pytest.fail)
    assert final and final[1]["tokens"] == final[1]["loader"]["sequences"] * 32 == 3072 + n_steps * batch_tokens
    summary = json.loads((tmp_path / "final_metrics.json").read_text())
    assert (summary["step"], summary["tokens"]) == (final[1]["step"], final[1]["tokens"])
    # Linear in the tokens seen before a step, whatever the batch (its length is a whole number of steps).
    seen_before = [0, *(row["tokens"] for row in logged[:-1])]
    expected = [3e-3 * (1 - tokens / 6144) for tokens in seen_before]
    assert [row["lr"] for row in logged] == pytest.approx(expected, abs=3e-5)


def test_a_batch_changed_twice_still_ends_at_the_budget(data, tmp_path, monkeypatch):
    interrupt(data, tmp_path, monkeypatch, 3, *SHORT)
    interrupt(data, tmp_path, monkeypatch, 2, *SHORT, "--batch_tokens=1024")
    rows = run(data, tmp_path, *SHORT, "--batch_tokens=256")
    assert [row["tokens"] for row in rows if "loss" in row][-1] == 6144
    run(data, tmp_path, *SHORT, "--batch_tokens=256")
    assert checkpoint.latest(tmp_path) == checkpoint.checkpoint_path(tmp_path, 3 + 2 + 10)


@pytest.mark.parametrize(
    ("option", "steps"), [("--max_tokens=2048", 4), ("--max_steps=5", 5), ("--epochs=0.0101", None)]
)
def test_a_budget_on_the_command_line_replaces_that_of_the_file(data, tmp_path, option, steps):
    run(data, tmp_path / "first")  # its config.json says max_steps = 6
    cfg = parse_config(training.Config, [f"{tmp_path}/first/config.json", f"--run_dir={tmp_path}/second", option])
    training.main(cfg)
    last = [row for row in metrics.read_metrics(tmp_path / "second") if "loss" in row][-1]
    tokens_per_epoch = json.loads((tmp_path / "second/final_metrics.json").read_text())["unique_tokens"]
    assert last["step"] == (steps or int(0.0101 * tokens_per_epoch) // STEP_TOKENS)


def test_a_larger_budget_continues_a_finished_run_and_a_smaller_one_is_refused(data, tmp_path, capsys):
    run(data, tmp_path, *SHORT)
    assert "6,144 tokens already, which max_tokens=3,000 does not allow" in refusal(
        data, tmp_path, *changed(SHORT, "--max_tokens=3000")
    )
    assert "12 steps" in refusal(data, tmp_path, "--max_steps=5", "--eval_every=0")
    run(data, tmp_path, *changed(SHORT, "--max_tokens=8192"))
    assert checkpoint.latest(tmp_path) == checkpoint.checkpoint_path(tmp_path, 16)
    assert json.loads((tmp_path / "final_metrics.json").read_text())["step"] == 16


def test_stages_count_steps_so_that_another_batch_is_refused(data, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    long = [f"--sources={data},{other}", f"--stages=64: {other}=1", "--max_steps=80", "--eval_every=0"]
    interrupt(data, tmp_path / "run", monkeypatch, 2, *long)
    assert "keep 512" in refusal(data, tmp_path / "run", *long, "--batch_tokens=1024")
    interrupt(data, tmp_path / "run", monkeypatch, 2, *long)


# ---- --resume=PATH ---------------------------------------------------------------------------------------------------


def test_a_branch_starts_at_its_checkpoint_once_and_then_continues(data, tmp_path, monkeypatch, capsys):
    run(data, tmp_path, *SHORT)
    branch = [*SHORT, f"--resume={tmp_path}/checkpoint_step_4.pt", "--max_lr=1e-3"]
    interrupt(data, tmp_path, monkeypatch, 2, *branch)
    out = capsys.readouterr().out
    assert "branches off at step 4" in out and "checkpoint_step_12.pt" in out
    assert names(tmp_path) == ["abandoned_1", "checkpoint_step_4.pt", "temporary_step_6.pt"]
    assert names(tmp_path / "abandoned_1") == ["checkpoint_step_12.pt", "checkpoint_step_8.pt"]
    assert len(losses(tmp_path / "abandoned_1")) == 12, "its log is kept"
    interrupt(data, tmp_path, monkeypatch, 3, *branch)
    assert "temporary_step_6.pt at step 6" in capsys.readouterr().out
    run(data, tmp_path, *SHORT, "--max_lr=1e-3")  # without --resume it is the same branch
    assert names(tmp_path) == ["abandoned_1", *sorted(f"checkpoint_step_{step}.pt" for step in (4, 8, 12))]
    before = (tmp_path / "checkpoint_step_12.pt").stat().st_mtime_ns
    run(data, tmp_path, *branch)
    assert "done: 12 steps" in capsys.readouterr().out.splitlines()[-5]
    assert (tmp_path / "checkpoint_step_12.pt").stat().st_mtime_ns == before
    assert losses(tmp_path).keys() == set(range(1, 13))


def test_an_interrupted_branch_is_the_undisturbed_branch(data, tmp_path, monkeypatch):
    for name in ("a", "b"):
        run(data, tmp_path / name, *SHORT)
    run(data, tmp_path / "a", *SHORT, f"--resume={tmp_path}/a/checkpoint_step_4.pt", "--max_lr=1e-3")
    branch = [*SHORT, f"--resume={tmp_path}/b/checkpoint_step_4.pt", "--max_lr=1e-3"]
    for _ in range(3):
        interrupt(data, tmp_path / "b", monkeypatch, 2, *branch)
    run(data, tmp_path / "b", *branch)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b", 12, 12)
    assert losses(tmp_path / "a") != losses(tmp_path / "a" / "abandoned_1")


def test_a_branch_of_another_run_directory_takes_nothing_of_what_is_here(data, tmp_path, monkeypatch):
    run(data, tmp_path / "theirs", *SHORT)
    run(data, tmp_path / "mine", *changed(SHORT, "--max_tokens=2048", "--checkpoint_every=2", "--max_lr=1e-4"))
    branch = [*SHORT, f"--resume={tmp_path}/theirs/checkpoint_step_4.pt"]
    interrupt(data, tmp_path / "mine", monkeypatch, 1, *branch)
    assert names(tmp_path / "mine") == ["abandoned_1", "temporary_step_5.pt"]
    run(data, tmp_path / "mine", *branch)
    assert same_weights(tmp_path / "mine", tmp_path / "theirs", 12, 12)
    assert len(names(tmp_path / "theirs")) == 3, "the other run is only read"


def test_a_second_branch_sets_the_first_aside(data, tmp_path):
    run(data, tmp_path, *SHORT)
    for number, step in ((1, 8), (2, 4)):
        run(data, tmp_path, *SHORT, f"--resume={tmp_path}/checkpoint_step_{step}.pt")
        assert (tmp_path / f"abandoned_{number}" / "checkpoint_step_12.pt").exists()
    # Back to what was abandoned first.
    run(data, tmp_path, *changed(SHORT, "--max_tokens=7168"), f"--resume={tmp_path}/abandoned_1/checkpoint_step_12.pt")
    assert checkpoint.latest(tmp_path) == checkpoint.checkpoint_path(tmp_path, 14)


def test_the_newest_checkpoint_or_the_run_directory_itself_sets_nothing_aside(data, tmp_path):
    run(data, tmp_path, *SHORT)
    for path in (tmp_path, tmp_path / "checkpoint_step_12.pt"):
        run(data, tmp_path, *SHORT, f"--resume={path}")
    run(data, tmp_path, *changed(SHORT, "--max_tokens=7168"), f"--resume={tmp_path}/checkpoint_step_12.pt")
    assert not list(tmp_path.glob("abandoned*"))


def test_damaged_checkpoints_of_an_abandoned_branch_are_no_obstacle(data, tmp_path):
    run(data, tmp_path / "theirs", *SHORT)
    run(data, tmp_path / "mine", "--max_steps=1")
    (tmp_path / "mine" / "checkpoint_step_1.pt").write_bytes(b"damaged")
    run(data, tmp_path / "mine", *SHORT, f"--resume={tmp_path}/theirs/checkpoint_step_8.pt")
    assert names(tmp_path / "mine") == ["abandoned_1", "checkpoint_step_12.pt"]


# ---- What cannot be continued ----------------------------------------------------------------------------------------


def test_another_sequence_length_is_one_line_that_says_what_can_be_done(data, tmp_path):
    run(data, tmp_path, "--max_steps=2")
    text = refusal(data, tmp_path, "--max_steps=4", "--seq_len=64")
    assert "seq_len: 32 -> 64" in text and f"--init_from={tmp_path}/checkpoint_step_2.pt" in text
    run(data, tmp_path / "longer", "--max_steps=4", "--seq_len=64", f"--init_from={tmp_path}/checkpoint_step_2.pt")


def test_weights_of_another_tokenizer_are_refused(data, tmp_path):
    run(data, tmp_path / "run", "--max_steps=1")
    path = tmp_path / "run" / "checkpoint_step_1.pt"
    state = checkpoint.read(path)
    state = {**state, "tokenizer": {**state["tokenizer"], "sha256": "0" * 64}}
    checkpoint.write(tmp_path / "other.pt", state)
    text = refusal(data, tmp_path / "new", f"--init_from={tmp_path}/other.pt")
    assert "trained with tokenizer bytes (000000000000)" in text and not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"step": 6}', ""])
def test_a_torn_summary_ends_the_run_once_more(data, tmp_path, capsys, text):
    run(data, tmp_path)
    whole = (tmp_path / "final_metrics.json").read_text()
    saved = (tmp_path / "checkpoint_step_6.pt").stat().st_mtime_ns
    (tmp_path / "final_metrics.json").write_text(text)
    run(data, tmp_path)
    summary = json.loads((tmp_path / "final_metrics.json").read_text())
    assert summary["val_loss"] == json.loads(whole)["val_loss"]
    assert (tmp_path / "checkpoint_step_6.pt").stat().st_mtime_ns == saved


def test_a_damaged_log_does_not_keep_a_run_from_continuing(data, tmp_path, monkeypatch, capsys):
    run(data, tmp_path / "whole")
    interrupt(data, tmp_path / "torn", monkeypatch, 4)
    path = tmp_path / "torn" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"loss"', b'"lo\xff', 1) + b'{"step": "x"}\n\0\0\0')
    run(data, tmp_path / "torn")
    assert "metrics.jsonl.damaged" in capsys.readouterr().out
    assert losses(tmp_path / "torn") == {step: loss for step, loss in losses(tmp_path / "whole").items() if step > 1}


# ---- Before the first step -------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hellaswag={}/items.jsonl"], ["items.jsonl", "1"]),
        (["--hellaswag={}/nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--run_dir=gs://bucket/run"], ["gs://bucket/run", "this machine"]),
        (["--resume=s3://bucket/run"], ["s3://bucket/run"]),
        (["--init_from=hf://a/b"], ["hf://a/b"]),
        (["--stages=10: {data}=1"], ["stages", "step 10", "1,024", "96"]),
        (["--stages=1000: {data}=1"], ["stages", "step 1,000"]),
        (["--seed=18446744073709551616"], ["seed", "2^63"]),
        (["--max_steps=none", "--max_tokens=1e30"], ["longer"]),
        (["--max_steps=1e30"], ["longer"]),
        (["--sources={data}=1e-320"], ["sources"]),
        (["--sources={data},{data}/"], ["same folder"]),
        (["--sources={data},{data}/../{data.name}"], ["same folder"]),
    ],
)
def test_problems_are_found_before_the_first_step(data, tmp_path, capsys, options, words):
    write(tmp_path / "items.jsonl", '{"ctx": "a", "endings": ["b"')
    run_dir = tmp_path / "run"
    text = refusal(data, run_dir, *(option.format(tmp_path, data=data) for option in options))
    assert all(word in text for word in words), text
    assert "step 1/" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.pt")) and not list(Path().glob("gs:*"))


def test_an_endless_number_of_epochs_is_trained_until_somebody_stops_it(data, tmp_path, monkeypatch):
    interrupt(data, tmp_path, monkeypatch, 1, "--max_steps=none", "--epochs=1e308", "--eval_every=0")


def test_a_dataset_without_validation_text_is_refused_even_if_it_is_never_asked_for(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["shards"] = [shard for shard in meta["shards"] if shard["split"] == "train"]
    (copy / "meta.json").write_text(json.dumps(meta))
    assert "no val shard" in refusal(copy, tmp_path / "run", "--eval_every=0")


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_refused(data, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "free, a checkpoint needs" in refusal(data, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=600_000))
    run(data, tmp_path)
    assert "make room, or keep fewer with --keep_every" in capsys.readouterr().err


def test_memory_that_is_not_there_is_one_line(data, tmp_path):
    """A limit on address space, which torch meets as an allocation that fails."""
    code = "import resource, runpy, sys; import torch; import training; import resource as r; "
    code += "used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
    code += "r.setrlimit(r.RLIMIT_AS, (used + 300 * 2**20, used + 300 * 2**20)); "
    code += "sys.argv[0] = 'training.py'; from nano416.config import parse_config, run_cli; "
    code += "run_cli(lambda: training.main(parse_config(training.Config)))"
    options = arguments(data, tmp_path, "--dim=4096", "--n_heads=32", "--n_layers=4")
    exit_code, _, error = python("-c", code, *options)
    assert exit_code == 1 and "out of memory; lower --batch_size" in error and "Traceback" not in error
