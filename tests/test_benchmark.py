"""tools.benchmark: all methods compute the same, and each table has a row for every method."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import shared, tiny_model

from nano416 import checkpoint, config, devices
from nano416.generate import Sampling, generate
from nano416.tokenizer import load_tokenizer
from tools import benchmark


def table_of(command, tmp_path: Path, *args: str) -> dict[str, dict[str, str]]:
    """{row: {column: cell}} of `python -m tools.benchmark *args`."""
    output = tmp_path / "table.json"
    config.run_subcommand(command, argv=[*args, f"--output={output}"])
    return json.loads(output.read_text())["rows"]


@pytest.fixture
def tiny_checkpoint(tmp_path) -> str:
    """A checkpoint of two layers with the byte tokenizer."""
    model = tiny_model(vocab_size=257, seq_len=64, scale=2.0)
    options = {"config": {"model": config.to_dict(model.config)}, "tokenizer": load_tokenizer("bytes").info()}
    state = {"format": checkpoint.FORMAT, "step": 0, "tokens": 0, **options, "model": model.state_dict()}
    checkpoint.write(tmp_path / "model.pt", state)
    return str(tmp_path / "model.pt")


def test_methods_take_turns_after_a_round_to_warm_up():
    calls = []
    timings = benchmark.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(rounds) for rounds in timings.values()] == [2, 2]


def test_a_spread_is_the_median_and_both_ends():
    assert benchmark.spread([3.0, 1.0, 2000.0]) == "3.0 (1.0..2,000.0)"


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"qk_norm": True}], ids=str)
def test_transformers_decodes_the_same_tokens_with_our_weights(changes):
    pytest.importorskip("transformers")
    model = tiny_model(vocab_size=257, seq_len=64, **changes)
    # The peer's weights are bf16. Rounded to bf16, ours are the same in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    peer = benchmark.to_transformers(model).float()
    expected = list(generate(model, [5, 80, 33], 20, Sampling(temperature=0)))
    assert benchmark.decode_transformers(peer, [5, 80, 33], 20) == expected


def test_decode_prints_speed_and_what_each_dtype_costs_in_loss(tiny_checkpoint, data, tmp_path):
    options = [f"--checkpoint={tiny_checkpoint}", f"--source={data}", "--new_tokens=8", "--rounds=1", "--device=cpu"]
    rows = table_of(benchmark.decode, tmp_path, "decode", *options)
    assert {"ours, bf16", "ours, int8"} <= set(rows)
    for dtype in ("bf16", "int8"):
        loss, _, difference = rows[f"ours, {dtype}"]["validation loss (minus fp32's)"].partition(" (")
        assert float(loss) > 1 and abs(float(difference.rstrip(")"))) < 0.05


def test_decode_needs_a_checkpoint_to_measure_a_loss():
    with pytest.raises(ValueError, match="give --checkpoint"):
        benchmark.DecodeBenchmark(source="data/mine")


def test_every_trainee_learns_from_the_same_batches():
    """The first loss is that of a uniform guess, and ten steps lower it."""
    shape = tiny_model().config
    work = benchmark.Workload(shape, batch_size=4, grad_accum_steps=2, device=devices.pick_device("cpu"))
    builders = benchmark.training_methods(None)
    assert {"ours", "ours, default recipe", "ours, eager"} <= set(builders)
    for name, build in builders.items():
        torch.manual_seed(0)
        trainee = build(work)
        batches = benchmark.zipf_batches(work)
        losses = [float(benchmark.optimizer_step(trainee, work, batches)) for _ in range(10)]
        assert losses[0] == pytest.approx(math.log(shape.vocab_size), abs=0.1), name
        assert losses[-1] < losses[0], name


@pytest.mark.slow
def test_train_prints_speeds_and_why_a_method_fails(tmp_path, monkeypatch):
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt" / "model.py").write_text("raise RuntimeError('needs another torch')")
    broken = partial(benchmark.build_nanogpt, path=tmp_path / "nanogpt" / "model.py")
    # Eager, since compiling takes half a minute.
    methods = {"ours, eager": partial(benchmark.build_ours, compile=False), "nanogpt": broken}
    monkeypatch.setattr(benchmark, "training_methods", lambda peers: methods)
    rows = table_of(benchmark.train, tmp_path, "train", "--device=cpu", "--rounds=1", "--vocab_size=97")
    assert rows["nanogpt"]["parameters"] == "RuntimeError: needs another torch"
    assert rows["ours, eager"]["parameters"] == "3.8M"
    assert float(rows["ours, eager"]["tokens/s"].split()[0].replace(",", "")) > 0
    assert float(rows["ours, eager"]["first loss"]) == pytest.approx(math.log(97), abs=0.1)


def test_peers_must_be_a_folder_of_known_projects(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of nanogpt/model.py"):
        benchmark.training_methods(str(tmp_path))
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "gpt.py").touch()
    assert "nanochat" in benchmark.training_methods(str(tmp_path))


@pytest.mark.slow
def test_checkpoint_prints_a_row_for_each_way_to_save(tmp_path):
    rows = table_of(benchmark.checkpoint_, tmp_path, "checkpoint", "--rounds=1", "--device=cpu")
    assert list(rows) == ["torch.save", "CheckpointWriter.save"]


@pytest.mark.slow
def test_data_prints_a_row_for_each_method(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    rows = table_of(benchmark.data, tmp_path, "data", "--megabytes=1", "--rounds=1")
    assert {"prepare, tiktoken", "prepare, fast encoder", "TokenLoader"} <= set(rows)


@pytest.mark.slow
def test_hellaswag_methods_agree(items, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    rows = table_of(benchmark.hellaswag, tmp_path, "hellaswag", f"--data={items}", "--rounds=1", "--device=cpu")
    differences = {name: float(row["largest difference in nats"]) for name, row in rows.items()}
    assert differences["ours, fp32"] == 0 and differences["ours, bf16"] < 0.5
    assert all(difference < 0.01 for name, difference in differences.items() if "lm_eval, fp32" in name)
