"""The loop: what a run writes, and that batching, processes, interruptions and compilation do not change it."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import changed
from processes import Process, python, ranks
from torch.utils._python_dispatch import TorchDispatchMode

import training
from nano416 import checkpoint, dataset, estimate, metrics, optimizers
from nano416.config import parse_config

TINY = [
    "--dim=32",
    "--n_layers=2",
    "--n_heads=2",
    "--seq_len=32",
    "--batch_size=4",
    "--batch_tokens=512",
    "--dtype=fp32",
    "--sample_tokens=8",
]
OTHER_OPTIMIZERS = sorted(optimizers.OPTIMIZERS.keys() - {"adamw", "muon"})
OFTEN = ["--log_every=1", "--eval_every=3", "--eval_tokens=2000", "--checkpoint_every=2", "--sample_every=0"]


def arguments(data: Path, run_dir: Path, *extra: str) -> list[str]:
    own = [f"--sources={data}", f"--run_dir={run_dir}", "--max_steps=6", "--hellaswag=none"]
    own += ["--optimizer=adamw", "--max_lr=3e-3"]  # to the last bit alike; muon's products are bf16
    return changed([*TINY, *OFTEN, *own], *extra)


def run(data: Path, run_dir: Path, *extra: str) -> list[dict]:
    training.main(parse_config(training.Config, arguments(data, run_dir, *extra)))
    return metrics.read_metrics(run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    rows = [row for row in metrics.read_metrics(run_dir) if "loss" in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step is logged twice"
    return {row["step"]: row["loss"] for row in rows}


def weights(run_dir: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.checkpoint_path(run_dir, step))["model"]


def same_weights(a: Path, b: Path, step_a: int = 6, step_b: int = 6) -> bool:
    first, second = weights(a, step_a), weights(b, step_b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(data, run_dir)
    return run_dir


@pytest.fixture(autouse=True)
def no_further_plots(monkeypatch, undisturbed):
    monkeypatch.setattr(metrics, "plot", lambda *_: None)  # a second each; `undisturbed` has drawn one


def test_a_run_learns_and_leaves_what_the_readme_lists(undisturbed):
    values = losses(undisturbed)
    assert list(values) == [1, 2, 3, 4, 5, 6] and values[6] < values[1] - 0.3
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "train.log", "final_metrics.json", "final_metrics.png"),
        *(f"checkpoint_step_{step}.pt" for step in (2, 4, 6)),
    }
    summary = json.loads((undisturbed / "final_metrics.json").read_text())
    assert summary["step"] == 6 and summary["tokens"] == 6 * 512 and 3 < summary["val_loss"] < 5.6
    assert (undisturbed / "final_metrics.png").read_bytes().startswith(b"\x89PNG")


def test_rows_carry_the_documented_names(undisturbed):
    rows = metrics.read_metrics(undisturbed)
    train = next(row for row in rows if "loss" in row)
    common = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "memory_gb", "flops", "elapsed_s"}
    assert set(train) == common  # mfu: GPUs only
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6]
    assert all({"val_loss", "val_bpb"} <= set(row) for row in rows if "val_loss" in row)


def test_bits_per_byte_of_a_byte_model_is_its_loss_in_bits(undisturbed):
    row = next(row for row in metrics.read_metrics(undisturbed) if "val_bpb" in row)
    # a byte is a token here, but for the end-of-text tokens, which cost bits and stand for no bytes
    assert row["val_bpb"] == pytest.approx(row["val_loss"] / 0.6931472, rel=2e-3)


def test_validation_loss_is_the_mean_over_the_validation_tokens(undisturbed, data):
    model, _ = checkpoint.load_model(undisturbed)
    tokens = torch.from_numpy(dataset.read_shard(data / "val_000000.bin").astype("int64"))[: 2000 + 1]
    total = 0.0
    for start in range(0, 2000, 32):
        window = tokens[start : start + 33]
        total += model(window[None, :-1], window[None, 1:], reduction="sum").item()
    last = [row["val_loss"] for row in metrics.read_metrics(undisturbed) if "val_loss" in row][-1]
    assert last == pytest.approx(total / (len(tokens) - 1), rel=2e-2)


def test_resuming_changes_nothing(undisturbed, data, tmp_path):
    run_dir = tmp_path / "resumed"
    shutil.copytree(undisturbed, run_dir)
    for name in ("checkpoint_step_4.pt", "checkpoint_step_6.pt", "final_metrics.json"):
        (run_dir / name).unlink()
    run(data, run_dir)
    assert losses(run_dir) == losses(undisturbed)
    assert same_weights(run_dir, undisturbed)


def test_a_killed_run_continues_as_if_nothing_had_happened(undisturbed, data, tmp_path):
    run_dir = tmp_path / "killed"
    command = ["training.py", *arguments(data, run_dir)]
    process = Process(command)
    while not checkpoint.latest(run_dir) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.wait()
    assert python(*command)[0] == 0
    assert losses(run_dir) == pytest.approx(losses(undisturbed), abs=0)
    assert same_weights(run_dir, undisturbed)


def test_a_finished_run_is_left_alone(undisturbed, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    run(data, undisturbed)
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    assert "talk to it" in capsys.readouterr().out


def test_its_own_config_json_repeats_a_run(undisturbed, tmp_path):
    repeated = tmp_path / "repeated"
    cfg = parse_config(training.Config, [str(undisturbed / "config.json"), f"--run_dir={repeated}"])
    training.main(cfg)
    assert losses(repeated) == losses(undisturbed)


def test_accumulating_micro_steps_is_the_same_as_one_large_batch(undisturbed, data, tmp_path):
    run(data, tmp_path / "large", "--batch_size=16")
    assert losses(tmp_path / "large") == pytest.approx(losses(undisturbed), abs=1e-5)


def test_two_processes_are_the_same_run_as_one(undisturbed, data, tmp_path):
    run_dir = tmp_path / "distributed"
    ranks(2, ["training.py", *arguments(data, run_dir)])
    same_run(run_dir, undisturbed)


@pytest.mark.parametrize("name", ["muon", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHER_OPTIMIZERS)])
def test_two_processes_are_the_same_run_as_one_for_every_optimizer(name, data, tmp_path):
    """Muon's ranks orthogonalise some of the matrices each."""
    options = [f"--optimizer={name}", "--max_lr=1e-3", "--ema=0.9", "--z_loss=1e-4"]
    run(data, tmp_path / "one", *options)
    ranks(2, ["training.py", *arguments(data, tmp_path / "two", *options)])
    same_run(tmp_path / "two", tmp_path / "one")


def same_run(a: Path, b: Path) -> None:
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    rows = [[r["val_loss"] for r in metrics.read_metrics(d) if "val_loss" in r] for d in (a, b)]
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)
    for name, tensor in weights(a).items():
        assert torch.allclose(tensor, weights(b)[name], atol=1e-4), name


def test_weights_of_another_run_can_start_a_new_one(undisturbed, data, tmp_path):
    run(data, tmp_path / "fresh", f"--init_from={undisturbed}", "--max_steps=1")
    rows = [metrics.read_metrics(folder) for folder in (undisturbed, tmp_path / "fresh")]
    last, first = ([r["val_loss"] for r in part if "val_loss" in r][i] for part, i in zip(rows, (-1, 0), strict=True))
    assert first == last


def test_seed_decides_the_run(undisturbed, data, tmp_path):
    run(data, tmp_path / "other", "--seed=1", "--max_steps=1")
    assert losses(tmp_path / "other")[1] != losses(undisturbed)[1]


def test_hellaswag_is_scored_at_checkpoints_where_its_items_are(data, tmp_path, items):
    rows = run(data, tmp_path / "scored", f"--hellaswag={items}", "--max_steps=2")
    scored = [row for row in rows if "hellaswag_acc_norm" in row]
    assert [row["step"] for row in scored] == [2] and 0 <= scored[0]["hellaswag_acc_norm"] <= 1


def test_a_run_without_hellaswag_items_says_so_once(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(data, tmp_path / "without", "--hellaswag=data/hellaswag_val.jsonl", "--max_steps=4")
    assert capsys.readouterr().out.count("no HellaSwag items") == 1


def test_the_plan_of_the_416m_run_needs_no_data(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    training.main(parse_config(training.Config, ["--dry_run"]))
    plan = capsys.readouterr().out
    assert "416,420,864 parameters" in plan and "15,258 steps" in plan
    assert list(tmp_path.iterdir()) == []


def test_the_batch_in_tokens_is_split_over_any_number_of_processes():
    cfg = training.resolve_vocab_size(training.Config(), 50257)
    plans = {n: training.make_plan(cfg, training.Dist(world_size=n), None, max_batch_size=128) for n in (1, 2, 8)}
    assert {n: plan.layout.grad_accum_steps for n, plan in plans.items()} == {1: 5, 2: 4, 8: 1}
    assert {(plan.total_steps, plan.layout.batch_sequences) for plan in plans.values()} == {(15_258, 640)}


def test_bf16_on_a_cpu_learns_as_well(data, tmp_path, undisturbed):
    run(data, tmp_path / "bf16", "--dtype=bf16")
    assert losses(tmp_path / "bf16")[6] == pytest.approx(losses(undisturbed)[6], abs=0.05)


@pytest.mark.slow
def test_the_compiled_model_gives_the_losses_of_the_eager_one(undisturbed, data, tmp_path):
    run(data, tmp_path / "compiled", "--compile")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(undisturbed), abs=1e-4)
    assert weights(tmp_path / "compiled").keys() == weights(undisturbed).keys()


def test_vocabulary_follows_the_data_unless_given():
    cfg = training.Config()
    assert training.resolve_vocab_size(cfg, 257).model.vocab_size == 257
    wider = replace(cfg, model=replace(cfg.model, vocab_size=300))
    assert training.resolve_vocab_size(wider, 257).model.vocab_size == 300


def test_a_run_with_an_average_evaluates_it_and_goes_on_with_the_weights(data, tmp_path):
    options = ["--ema=0.5", "--dtype=fp32"]
    run(data, tmp_path / "whole", *options)
    state = checkpoint.read(checkpoint.checkpoint_path(tmp_path / "whole", 6))
    assert state["ema_updates"] == 6 and state["ema"].keys() == state["model"].keys()
    model, _ = checkpoint.load_model(tmp_path / "whole")
    assert torch.equal(model.norm.weight, state["ema"]["norm.weight"])
    assert not torch.equal(state["ema"]["norm.weight"], state["model"]["norm.weight"])
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for left in ("final_metrics.json", "checkpoint_step_6.pt"):
        (killed / left).unlink()
    run(data, killed, *options)
    again = checkpoint.read(checkpoint.checkpoint_path(killed, 6))
    assert all(torch.equal(again["ema"][name], tensor) for name, tensor in state["ema"].items())
    assert losses(killed) == losses(tmp_path / "whole")


def test_the_micro_batch_begins_at_the_estimate_and_shrinks_until_it_fits(monkeypatch):
    tried = []

    def needs_memory_for_20(model, cfg, batch_size, dist):
        tried.append(batch_size)
        if batch_size > 20:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(training, "dummy_forward_backward", needs_memory_for_20)
    monkeypatch.setattr(training.devices, "memory_gb", lambda device: 100.0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1e9)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    cfg = training.resolve_vocab_size(training.Config(), 50257)
    dist = training.Dist(world_size=2, device=torch.device("cuda"))
    estimated = training.estimate.largest_batch_size(training.workload(cfg, dist), 100.0)
    batch_size = training.find_batch_size(torch.nn.Linear(1, 1), cfg, dist)
    divisors = [n for n in (80, 64, 40, 32, 20) if n <= estimated]
    assert (tried, batch_size) == (divisors, 20) and len(divisors) >= 2
    assert training.make_plan(cfg, dist, None, batch_size).layout.grad_accum_steps == 16


@pytest.mark.parametrize("options", [["--qk_norm=false"], ["--z_loss=1e-4", "--dtype=bf16"]])
def test_the_compiled_step_is_one_graph(options):
    """What breaks a graph costs a launch and hides work from the compiler."""
    cfg = parse_config(training.Config, changed([*TINY, "--vocab_size=97"], *options))
    model = training.Transformer(cfg.model)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    dtype = training.compute_dtype(cfg, torch.device("cpu"))
    with training.autocast(torch.device("cpu"), dtype):
        explained = torch._dynamo.explain(model)(tokens, tokens, z_loss=cfg.optim.z_loss)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adam", "sgd"])
def test_between_log_lines_nothing_waits_for_the_device(name, data, tmp_path):
    """Every .item() of a step stops the GPU until the host has caught up: longer runs have no more of them."""
    never = ["--eval_every=0", "--checkpoint_every=0", "--ema=0.9", "--skip_spikes"]
    waits = {}
    for steps in (3, 9):
        with Waits() as counter:
            run(data, tmp_path / str(steps), f"--optimizer={name}", f"--max_steps={steps}", *never, "--log_every=0")
        waits[steps] = counter.count
    with Waits() as counter:
        run(data, tmp_path / "logged", f"--optimizer={name}", "--max_steps=9", *never, "--log_every=1")
    assert waits[3] == waits[9] < counter.count - 9


class Waits(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_statistics_are_written_and_rewound_with_the_log(undisturbed, data, tmp_path):
    run(data, tmp_path / "a", "--stats_every=2")
    assert losses(tmp_path / "a") == losses(undisturbed), "watching changes nothing"
    whole = (tmp_path / "a" / "stats.jsonl").read_text()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [2, 4, 6]
    for name in ("checkpoint_step_6.pt", "final_metrics.json"):
        (tmp_path / "a" / name).unlink()
    run(data, tmp_path / "a", "--stats_every=2")
    assert (tmp_path / "a" / "stats.jsonl").read_text() == whole


def test_the_log_says_where_the_time_went_and_how_the_plan_came_out(undisturbed):
    text, summary = (
        (undisturbed / "train.log").read_text(),
        json.loads((undisturbed / "final_metrics.json").read_text()),
    )
    assert set(summary["seconds"]) == {"training", "validation", "saving", "HellaSwag", "sampling"}
    assert "training" in text and "validation" in text and f"planned {summary['planned_memory_gb']:.1f} GB" in text
    last = [row for row in metrics.read_metrics(undisturbed) if "loss" in row][-1]
    assert last["flops"] == last["tokens"] * config_of(undisturbed).model.flops_per_token()
    assert 0 < last["elapsed_s"] < 600


def config_of(run_dir: Path) -> training.Config:
    return parse_config(training.Config, [str(run_dir / "config.json")])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_estimated_memory_is_what_the_compiled_model_keeps(on_gpu):
    """Bytes saved for the backward pass, counted, against the estimate; on a GPU all logits are among them."""
    options = ["--vocab_size=1024", "--dim=64", "--dtype=bf16", "--compile"]
    cfg = parse_config(training.Config, changed(TINY, *options))
    kept = {batch_size: kept_bytes(cfg, batch_size, on_gpu) for batch_size in (2, 6)}
    dist = training.Dist(device=torch.device("cuda" if on_gpu else "cpu"))
    estimated = {n: 1e9 * estimate.training_memory_gb(training.workload(cfg, dist, n)) for n in (2, 6)}
    assert kept[6] - kept[2] == pytest.approx(estimated[6] - estimated[2], rel=0.5)


def kept_bytes(cfg: training.Config, batch_size: int, with_logits: bool) -> int:
    torch.compiler.reset()
    model = training.Transformer(cfg.model)
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # This backend keeps what the default keeps and builds no kernels.
    model.compile(dynamic=False, backend="aot_eager_decomp_partition")
    tokens = torch.zeros(batch_size, cfg.model.seq_len, dtype=torch.long)
    dtype = training.compute_dtype(cfg, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), training.autocast(torch.device("cpu"), dtype):
        model(tokens, tokens, reduction="none" if with_logits else "mean")
    return sum(kept.values())
