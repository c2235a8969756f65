"""One run divided in many ways: every mode learns what one process learns, and each rank holds only its shard."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import changed, tiny_model
from processes import ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import training
from nano416 import checkpoint, distributed, metrics
from nano416.config import parse_config
from nano416.distributed import Dist

SHAPE = ["--dim=32", "--n_layers=3", "--n_heads=4", "--n_kv_heads=2", "--seq_len=32", "--qk_norm", "--dtype=fp32"]
BATCH = ["--batch_size=2", "--batch_tokens=512", "--max_steps=20", "--max_lr=3e-3", "--grad_clip=0.3", "--ema=0.9"]
OFTEN = ["--log_every=1", "--eval_every=10", "--eval_tokens=600", "--checkpoint_every=7", "--sample_every=0"]

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("no_plots")


def arguments(data: Path, items: Path, run_dir: Path, *extra: str) -> list[str]:
    paths = [f"--sources={data}", f"--hellaswag={items}", f"--run_dir={run_dir}"]
    return changed([*SHAPE, *BATCH, *OFTEN, "--sample_tokens=8", *paths], *extra)


def train(options: list[str]) -> None:
    training.main(parse_config(training.Config, options))


@pytest.fixture(scope="module")
def one_process(data, items, tmp_path_factory) -> Callable[[str], Path]:
    """The run directory of one process with an optimizer, trained once."""
    run_dirs: dict[str, Path] = {}

    def run(optimizer: str) -> Path:
        if optimizer not in run_dirs:
            run_dirs[optimizer] = tmp_path_factory.mktemp("runs") / optimizer
            train(arguments(data, items, run_dirs[optimizer], f"--optimizer={optimizer}"))
        return run_dirs[optimizer]

    return run


def values(run_dir: Path, key: str) -> list[float]:
    return [row[key] for row in metrics.read_metrics(run_dir) if key in row]


def samples(run_dir: Path) -> list[str]:
    return [
        line.split("sample: ")[1] for line in (run_dir / "train.log").read_text().splitlines() if "sample: " in line
    ]


def assert_same_run(run_dir: Path, reference: Path, optimizer: str) -> None:
    """Losses within 1e-4, the same scores, text, and checkpoints of the same names, shapes and nearly the same values."""
    for key, count in (("loss", 20), ("val_loss", 3), ("hellaswag_acc_norm", 3)):
        assert len(values(run_dir, key)) == count
        assert values(run_dir, key) == pytest.approx(values(reference, key), abs=1e-4), key
    saved, expected = (checkpoint.read(checkpoint.checkpoint_path(folder, 20)) for folder in (run_dir, reference))
    assert saved.keys() == expected.keys()
    assert saved["optimizer"].keys() == expected["optimizer"].keys()
    for part in ("model", "ema"):
        checkpoint.check_shapes(saved[part], expected[part], run_dir)
        assert all(torch.allclose(saved[part][name], expected[part][name], atol=2e-3) for name in expected[part])
    assert len(samples(run_dir)) == len(samples(reference)) == 1
    # Muon's bf16 products may tip a drawn token.
    assert samples(run_dir) == samples(reference) or optimizer == "muon"


@pytest.mark.parametrize(
    ("optimizer", "processes", "nodes", "mode"),
    [
        ("adamw", 2, 1, ["--parallel=fsdp"]),
        ("muon", 2, 1, ["--parallel=fsdp", "--tensor_parallel=2"]),
        pytest.param("adamw", 2, 1, ["--parallel=fsdp", "--recompute=full"], marks=slow),
        pytest.param("adamw", 2, 1, ["--parallel=fsdp", "--recompute=selective", "--cpu_offload"], marks=slow),
        ("adamw", 3, 1, ["--parallel=ddp"]),  # 8 micro-batches on 3 ranks: one sits out the last round
        pytest.param("adamw", 3, 1, ["--parallel=fsdp"], marks=slow),
        pytest.param("muon", 4, 1, ["--parallel=fsdp"], marks=slow),  # matrices of 3 layers on 4 ranks: one has none
        pytest.param("muon", 4, 1, ["--parallel=fsdp", "--tensor_parallel=2"], marks=slow),
        pytest.param("adamw", 4, 2, ["--parallel=hsdp"], marks=slow),
        pytest.param("muon", 4, 2, ["--parallel=hsdp"], marks=slow),
        pytest.param("adamw", 4, 2, ["--parallel=hsdp", "--tensor_parallel=2"], marks=slow),
        pytest.param("adamw", 4, 1, ["--parallel=ddp"], marks=slow),
        pytest.param("adamw", 2, 1, ["--parallel=fsdp", "--compile"], marks=slow),
    ],
)
def test_every_mode_learns_what_one_process_learns(
    one_process, data, items, tmp_path, optimizer, processes, nodes, mode
):
    """Clipped, averaged, evaluated and sampled too."""
    options = arguments(data, items, tmp_path, f"--optimizer={optimizer}", *mode)
    ranks(processes, ["training.py", *options], nodes)
    assert_same_run(tmp_path, one_process(optimizer), optimizer)


def test_in_one_process_every_strategy_is_the_plain_run(one_process, data, items, tmp_path):
    train(arguments(data, items, tmp_path, "--optimizer=adamw", "--parallel=hsdp"))
    assert values(tmp_path, "loss") == values(one_process("adamw"), "loss")


def keep_until(run_dir: Path, step: int) -> None:
    """Remove what a run wrote after a step, as if it had been killed there."""
    for number, path in checkpoint.list_checkpoints(run_dir):
        if number > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run_dir / "final_metrics.json").unlink(missing_ok=True)


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumes_in_another_mode(one_process, data, items, tmp_path, optimizer):
    """ddp on 2 processes to step 7, fsdp on 4 to step 14, one process to the end, each from the other's file."""
    options = arguments(data, items, tmp_path, f"--optimizer={optimizer}")
    ranks(2, ["training.py", *options, "--parallel=ddp"])
    keep_until(tmp_path, 7)
    output = ranks(4, ["training.py", *options, "--parallel=fsdp"])
    assert "checkpoint_step_7.pt at step 7" in output
    keep_until(tmp_path, 14)
    train([*options, "--parallel=fsdp"])
    assert "checkpoint_step_14.pt at step 14" in (tmp_path / "train.log").read_text()
    assert values(tmp_path, "loss") == pytest.approx(values(one_process(optimizer), "loss"), abs=1e-4)
    assert "done: 20 steps" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("world_size", range(1, 33))
def test_any_number_of_ranks_trains_on_the_batch_in_tokens(world_size):
    """The 416M run's 640 sequences on 1 to 32 GPUs: the same steps, and few ranks idle."""
    plan = training.make_plan(training.Config(), Dist(world_size=world_size), None, max_batch_size=128)
    layout = plan.layout
    computed = layout.batch_size * layout.grad_accum_steps * world_size
    assert (plan.total_steps, layout.batch_sequences) == (15_258, 640)
    assert 640 <= computed < 640 * 1.25
    assert computed == 640 or 640 % world_size


@pytest.mark.parametrize(
    ("layout", "hint"),
    [
        (("ddp", 2, 8, 8), "needs --parallel=fsdp or hsdp"),
        (("fsdp", 3, 8, 8), "must divide the processes of a node"),
        (("fsdp", 2, 1, 1), "start more with torchrun"),
        (("hsdp", 1, 6, 4), "equally many processes on every node"),
    ],
)
def test_an_impossible_layout_is_one_line(layout, hint):
    with pytest.raises(ValueError, match=hint):
        distributed.check_layout(*layout)


def test_offloading_needs_shards():
    with pytest.raises(ValueError, match="cpu_offload needs --parallel=fsdp"):
        distributed.build_model(tiny_model, Dist(), cpu_offload=True)


class LiveBytes(TorchDispatchMode):
    """Bytes of all results that are alive."""

    def __init__(self):
        super().__init__()
        self.by_storage: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.by_storage:
                storage = tensor.untyped_storage()
                self.by_storage[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.by_storage.pop, storage._cdata)
        return out


def test_activation_checkpointing_gives_the_same_gradients_from_less_memory():
    """Bytes alive between the forward and the backward pass: everything, results of matmuls, or a block's input."""
    tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    kept = {}
    grads = {}
    for policy in get_args(distributed.Recompute):
        model = tiny_model(n_layers=4, seq_len=32).train()
        distributed.apply_ac(model, policy)
        with LiveBytes() as live:
            loss = model(tokens, tokens)
            gc.collect()
            kept[policy] = sum(live.by_storage.values())
        loss.backward()
        grads[policy] = [p.grad for p in model.parameters()]
    assert kept["full"] < 0.5 * kept["selective"], kept
    assert kept["selective"] < 0.8 * kept["none"], kept
    for policy in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(grads[policy], grads["none"], strict=True))


def test_activation_checkpointing_repeats_the_dropout_of_the_forward_pass():
    tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    grads = {}
    for policy in get_args(distributed.Recompute):
        model = tiny_model(seq_len=32).train()
        distributed.apply_ac(model, policy, has_dropout=True)
        torch.manual_seed(1)
        model(tokens, tokens, attention_dropout=0.5).backward()
        grads[policy] = [p.grad for p in model.parameters()]
    for policy in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(grads[policy], grads["none"], strict=True))


# ---- What each rank holds --------------------------------------------------------------------------------------------

MODEL = """
import sys
import torch
from model import ModelConfig, Transformer
from nano416 import distributed
from nano416.fault_tolerance import StepGuard
from nano416.optimizers import OptimConfig, build_optimizer, clip_grad_norm_, optimizer_step

strategy, tp_size, optimizer_name = sys.argv[1:]
dist = distributed.init(strategy=strategy, tp_size=int(tp_size))

def make():
    torch.manual_seed(0)
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=97, seq_len=32, qk_norm=True)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() > 1 else p.add_(0.2 * torch.randn_like(p))
    return model

def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

model = distributed.build_model(make, dist)
optimizer = build_optimizer(model, OptimConfig(optimizer=optimizer_name, max_lr=1e-2), distributed.map_sharded)
guard = StepGuard(dist.device)
tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))
mine = tokens[dist.dp_rank :: dist.dp_size]
"""
GRADIENTS = """
whole = make()
whole(tokens, tokens).backward()
model(mine, mine).backward()
for (name, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
    grad = b.grad.full_tensor() if hasattr(b.grad, "full_tensor") else b.grad
    assert (grad - a.grad).abs().max() < 1e-5 * a.grad.abs().max(), name
distributed.shutdown()
"""
BYTES = """
model(mine, mine).backward()
optimizer_step(optimizer, skip=torch.zeros(()))
tensors = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values() if t.dim())]
held = sum(local(t).nbytes for t in tensors)
total = sum(t.numel() * t.element_size() for t in tensors)
print("bytes", held, total, flush=True)
distributed.shutdown()
"""
NAN = """
weights = []
for step in range(4):
    loss = model(mine, mine)
    loss.backward()
    if step >= 2 and dist.rank == 1:
        next(p for p in model.parameters() if p.dim() > 1).grad.to_local().view(-1)[:1] = float("nan")
    grad_norm = clip_grad_norm_(model, 1.0)
    optimizer_step(optimizer, skip=guard.is_bad(distributed.all_reduce_mean(loss.detach()), grad_norm))
    optimizer.zero_grad()
    weights.append([local(p).clone() for p in model.parameters()])
assert guard.newly_skipped() == 2
assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[1]))
assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[3]))
distributed.shutdown()
"""


@pytest.mark.parametrize(
    ("processes", "nodes", "strategy", "tp_size"),
    [
        (2, 1, "fsdp", 2),
        pytest.param(4, 1, "fsdp", 2, marks=slow),
        pytest.param(4, 1, "fsdp", 1, marks=slow),
        pytest.param(4, 2, "hsdp", 2, marks=slow),
    ],
)
def test_a_sharded_gradient_is_that_of_the_whole_model(processes, nodes, strategy, tp_size):
    """Every parameter's; those of norms too, of which each tensor-parallel rank sees a part."""
    ranks(processes, ["-c", MODEL + GRADIENTS, strategy, str(tp_size), "adamw"], nodes)


@pytest.mark.parametrize(
    ("processes", "strategy", "tp_size", "shards"),
    [
        (2, "fsdp", 1, 2),
        pytest.param(4, "fsdp", 1, 4, marks=slow),
        pytest.param(4, "fsdp", 2, 4, marks=slow),
        pytest.param(4, "ddp", 1, 1, marks=slow),
    ],
)
def test_each_rank_holds_its_shard_of_weights_and_optimizer_state(processes, strategy, tp_size, shards):
    output = ranks(processes, ["-c", MODEL + BYTES, strategy, str(tp_size), "adamw"])
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("bytes")]
    assert len(rows) == processes
    for held, total in rows:
        # Tensor parallelism leaves the embedding to fully_shard.
        assert int(held) / int(total) == pytest.approx(1 / shards, rel=0.02 if tp_size == 1 else 0.6)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=slow)])
def test_a_nan_in_one_ranks_shard_is_skipped_by_all_ranks(optimizer):
    ranks(2, ["-c", MODEL + NAN, "fsdp", "1", optimizer])


# ---- Checkpoints that are folders ------------------------------------------------------------------------------------

TOO_LARGE = """
import training
from nano416 import checkpoint
from nano416.config import parse_config
checkpoint.fits_in_host_memory = lambda n_params: False
training.main(parse_config(training.Config))
"""


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=slow)])
def test_a_sharded_checkpoint_resumes_on_any_number_of_ranks(one_process, data, items, tmp_path, optimizer):
    """Written by two ranks; read by three (fsdp), by one process, and as a model."""
    run_dir = tmp_path / "run"
    options = arguments(data, items, run_dir, f"--optimizer={optimizer}", "--parallel=fsdp", "--hellaswag=none")
    ranks(2, ["-c", TOO_LARGE, *options])
    folder = run_dir / "checkpoint_step_14.pt"
    assert sorted(path.name for path in folder.iterdir()) == ["facts.pt", "index.json", "rank_0.bin", "rank_1.bin"]
    assert not list(run_dir.glob(".*.tmp"))
    expected = checkpoint.read(checkpoint.checkpoint_path(one_process(optimizer), 14))["ema"]
    model, metadata = checkpoint.load_model(folder)
    assert metadata["step"] == 14
    assert all(torch.allclose(weight, expected[name], atol=2e-3) for name, weight in model.named_parameters())

    keep_until(run_dir, 14)
    shutil.copytree(run_dir, tmp_path / "three")
    ranks(3, ["training.py", *changed(options, f"--run_dir={tmp_path / 'three'}")])
    train(options)
    expected = checkpoint.read(checkpoint.checkpoint_path(one_process(optimizer), 20))["ema"]
    for resumed in (run_dir, tmp_path / "three"):
        assert values(resumed, "loss") == pytest.approx(values(one_process(optimizer), "loss"), abs=1e-4)
        averages = checkpoint.read(checkpoint.checkpoint_path(resumed, 20))["ema"]
        assert all(torch.allclose(averages[name], expected[name], atol=2e-3) for name in expected)
