"""One run, many ways to share it out: every mode learns what one process learns, and each rank holds its part only."""

import gc
import pickle
import shutil
import weakref
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import tiny_model
from processes import ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import distributed
import metrics
import training
from config import parse_config

SHAPE = ["--dim=32", "--n_layers=3", "--n_heads=4", "--n_kv_heads=2", "--seq_len=32", "--qk_norm", "--dtype=fp32"]
BATCH = ["--batch_size=2", "--batch_tokens=512", "--max_steps=20", "--max_lr=3e-3", "--grad_clip=0.3", "--ema=0.9"]
OFTEN = ["--log_every=1", "--eval_every=10", "--eval_tokens=600", "--checkpoint_every=7", "--sample_every=0"]


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def alone(data, items, tmp_path_factory):
    """What one process learns with an optimizer, computed once."""
    done: dict[str, Path] = {}

    def run(optimizer: str) -> Path:
        if optimizer not in done:
            done[optimizer] = tmp_path_factory.mktemp("runs") / optimizer
            options = arguments(data, items, done[optimizer], f"--optimizer={optimizer}")
            training.main(parse_config(training.Config, options))
        return done[optimizer]

    return run


def arguments(data: Path, items: Path, run_dir: Path, *extra: str) -> list[str]:
    return [*SHAPE, *BATCH, *OFTEN, f"--sources={data}", f"--hellaswag={items}", f"--run_dir={run_dir}", *extra]


def values(run_dir: Path, key: str) -> list[float]:
    return [row[key] for row in metrics.read_metrics(run_dir) if key in row]


def same_run(a: Path, b: Path, optimizer: str) -> None:
    """Losses within 1e-4, the same text (Muon's bf16 products may tip a drawn token), the same HellaSwag scores, and checkpoints of the same names and shapes."""
    for key, count in (("loss", 20), ("val_loss", 3), ("hellaswag_acc_norm", 3)):
        assert len(values(a, key)) == count and values(a, key) == pytest.approx(values(b, key), abs=1e-4), key
    one, other = (checkpoint.read(checkpoint.path_of(run_dir, 20)) for run_dir in (a, b))
    assert one.keys() == other.keys() and one["optimizer"].keys() == other["optimizer"].keys()
    for part in ("model", "ema"):
        checkpoint.check_shapes(other[part], one[part], b)
        assert all(torch.allclose(other[part][name], one[part][name], atol=2e-3) for name in one[part])
    texts = [[line for line in (d / "train.log").read_text().splitlines() if "sample: " in line] for d in (a, b)]
    assert len(texts[0]) == len(texts[1]) == 1 and (texts[0] == texts[1] or optimizer == "muon")


HEAD = """
import sys, torch, distributed, training
from config import parse_config
training.SAMPLE_TOKENS = 8
"""
RUN = HEAD + "training.main(parse_config(training.Config))"

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("optimizer", "processes", "nodes", "mode"),
    [
        ("adamw", 2, 1, ["--parallel=fsdp"]),
        ("muon", 2, 1, ["--parallel=fsdp", "--tensor_parallel=2"]),
        pytest.param("adamw", 2, 1, ["--parallel=fsdp", "--recompute=full"], marks=slow),
        pytest.param("adamw", 2, 1, ["--parallel=fsdp", "--recompute=selective", "--cpu_offload"], marks=slow),
        ("adamw", 3, 1, ["--parallel=ddp"]),  # 8 micro-batches on 3 ranks: one sits out the last round
        pytest.param("adamw", 3, 1, ["--parallel=fsdp"], marks=slow),
        pytest.param("muon", 4, 1, ["--parallel=fsdp"], marks=slow),
        pytest.param("muon", 4, 1, ["--parallel=fsdp", "--tensor_parallel=2"], marks=slow),
        pytest.param("adamw", 4, 2, ["--parallel=hsdp"], marks=slow),
        pytest.param("muon", 4, 2, ["--parallel=hsdp"], marks=slow),
        pytest.param("adamw", 4, 2, ["--parallel=hsdp", "--tensor_parallel=2"], marks=slow),
        pytest.param("adamw", 4, 1, ["--parallel=ddp"], marks=slow),
        pytest.param("adamw", 2, 1, ["--parallel=fsdp", "--compile"], marks=slow),
    ],
)
def test_every_mode_learns_what_one_process_learns(alone, data, items, tmp_path, optimizer, processes, nodes, mode):
    """Two layers' worth of matrices on four ranks, so that one has none; clipped, averaged, evaluated, sampled."""
    ranks(processes, ["-c", RUN, *arguments(data, items, tmp_path, f"--optimizer={optimizer}", *mode)], nodes)
    same_run(tmp_path, alone(optimizer), optimizer)


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_in_another_mode(alone, data, items, tmp_path, optimizer):
    """ddp on 2 processes to step 7, fsdp on 4 to step 14, one process to the end, each from the other's file."""
    run_dir, done = tmp_path / "run", tmp_path / "done"
    for step, processes, mode in ((0, 2, "ddp"), (7, 4, "fsdp"), (14, 1, "fsdp")):
        for path in run_dir.glob("*") if step else []:
            if path.name == "final_metrics.json" or int("0" + "".join(filter(str.isdigit, path.stem))) > step:
                path.unlink()
        command = arguments(data, items, run_dir, f"--optimizer={optimizer}", f"--parallel={mode}")
        if processes > 1:
            said = ranks(processes, ["-c", RUN, *command])
            assert not step or f"checkpoint_step_{step}.pt at step {step}" in said
        else:
            training.main(parse_config(training.Config, command))
    shutil.copytree(run_dir, done)
    assert values(done, "loss") == pytest.approx(values(alone(optimizer), "loss"), abs=1e-4)
    assert "done: 20 steps" in (done / "train.log").read_text()


HOLD = (
    HEAD
    + """
held = {}

def keep(name, value):
    held[name] = value
    return value

build, build_optimizer = distributed.build, training.build_optimizer
distributed.build = lambda *args: keep("model", build(*args))
training.build_optimizer = lambda *args: keep("optimizer", build_optimizer(*args))
"""
)
COUNT = (
    HOLD
    + """
training.main(parse_config(training.Config))
local = lambda x: x.to_local() if hasattr(x, "to_local") else x
tensors = [*held["model"].parameters(), *(t for s in held["optimizer"].state.values() for t in s.values() if t.dim())]
print("bytes", sum(local(t).numel() * local(t).element_size() for t in tensors), "of", sum(t.numel() * 4 for t in tensors))
"""
)
POISON = (
    HEAD
    + """
clip, done = training.clip_gradients, []

def poisoned(model, max_norm):
    done.append(None)
    if len(done) in (3, 4) and distributed.rank() == 1:
        next(p for p in model.parameters() if p.dim() > 1).grad.to_local().view(-1)[:1] = float("nan")
    return clip(model, max_norm)

training.clip_gradients = poisoned
training.main(parse_config(training.Config))
"""
)


@pytest.mark.parametrize(
    ("processes", "mode", "parts"),
    [
        (2, ["--parallel=fsdp"], 2),
        pytest.param(4, ["--parallel=fsdp"], 4, marks=slow),
        pytest.param(4, ["--parallel=fsdp", "--tensor_parallel=2"], 4, marks=slow),
        pytest.param(4, ["--parallel=ddp"], 1, marks=slow),
    ],
)
def test_each_rank_holds_its_part_of_weights_and_optimizer_state(data, items, tmp_path, processes, mode, parts):
    options = arguments(data, items, tmp_path / "run", "--max_steps=2", "--qk_norm=false", *mode)
    out = ranks(processes, ["-c", COUNT, *options])
    found = [line.split() for line in out.splitlines() if line.startswith("bytes")]
    assert len(found) == processes
    for _, held, _, whole in found:  # the embedding is cut by fully_shard alone
        share = int(held) / int(whole)
        assert share == pytest.approx(1 / parts, rel=0.01 if "--tensor_parallel=2" not in mode else 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=slow)])
def test_a_bad_number_in_one_part_is_skipped_by_all(data, items, tmp_path, optimizer):
    plain = [
        f"--optimizer={optimizer}",
        "--schedule=constant",
        "--warmup_frac=0",
        "--parallel=fsdp",
        "--sample_every=0",
    ]
    for code, steps in ((RUN, 2), (POISON, 4)):
        ranks(2, ["-c", code, *arguments(data, items, tmp_path / str(steps), *plain, f"--max_steps={steps}")])
    rows = metrics.read_metrics(tmp_path / "4")
    assert [row.get("skipped_steps") for row in rows if "loss" in row] == [None, None, 1, 1]
    two, four = (checkpoint.read(checkpoint.path_of(tmp_path / str(n), n))["model"] for n in (2, 4))
    assert all(torch.equal(two[name], four[name]) for name in two)


@pytest.mark.parametrize(
    ("layout", "hint"),
    [
        (("ddp", 2, 8, 8), "goes with --parallel=fsdp or hsdp"),
        (("fsdp", 3, 8, 8), "must divide the processes of a node"),
        (("fsdp", 2, 1, 1), "start more with torchrun"),
        (("hsdp", 1, 6, 4), "as many processes on every node"),
    ],
)
def test_an_arrangement_that_cannot_be_is_one_line(layout, hint):
    with pytest.raises(ValueError, match=hint):
        distributed.check_layout(*layout)


def test_in_one_process_every_strategy_is_the_plain_run(alone, data, items, tmp_path):
    training.main(
        parse_config(training.Config, arguments(data, items, tmp_path, "--optimizer=adamw", "--parallel=hsdp"))
    )
    assert values(tmp_path, "loss") == values(alone("adamw"), "loss")


class Live(TorchDispatchMode):
    """Counts the bytes of all results that are alive."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.seen.pop, storage._cdata)
        return out


def test_recomputing_gives_the_same_gradients_from_less_memory():
    """Bytes alive between the forward and the backward pass: all, what is dear, a block's input."""
    tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    kept, grads = {}, {}
    for policy in get_args(distributed.Recompute):
        model = tiny_model(n_layers=4, seq_len=32).train()
        distributed.recompute(model, policy)
        with Live() as live:
            loss = model(tokens, tokens)
            gc.collect()
            kept[policy] = sum(live.seen.values())
        loss.backward()
        grads[policy] = [p.grad for p in model.parameters()]
    assert kept["full"] < 0.5 * kept["selective"] and kept["selective"] < 0.8 * kept["none"], kept
    for policy in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(grads[policy], grads["none"], strict=True))


def test_offloading_needs_parts():
    with pytest.raises(ValueError, match="cpu_offload goes with --parallel=fsdp"):
        distributed.build(tiny_model, distributed.Dist(), cpu_offload=True)


@pytest.mark.parametrize("world_size", range(1, 33))
def test_any_number_of_ranks_trains_on_the_batch_in_tokens(world_size):
    """The 416M run's 640 sequences on 1 to 32 GPUs: the same steps, and few ranks idle."""
    cfg = training.with_vocabulary(training.Config(), None)
    plan = training.make_plan(cfg, world_size)
    done = plan.batch_size * plan.micro_steps * world_size
    assert (plan.steps, plan.batch_sequences) == (15_258, 640) and plan.batch_sequences % plan.batch_size == 0
    assert 640 <= done < 640 * 1.25 and (done == 640 or 640 % world_size)


PARTS = (
    HEAD
    + """
import checkpoint
checkpoint.fits = lambda n_params: False
training.main(parse_config(training.Config))
"""
)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=slow)])
def test_a_checkpoint_in_parts_goes_on_anywhere_and_becomes_one_file(alone, data, items, tmp_path, optimizer):
    """Written by two ranks to step 4, read by three (fsdp) and by one process; the file made of it holds the same."""
    run_dir = tmp_path / "run"
    command = arguments(data, items, run_dir, f"--optimizer={optimizer}", "--parallel=fsdp", "--hellaswag=none")
    ranks(2, ["-c", PARTS, *command])
    folder = run_dir / "checkpoint_step_14.pt"
    assert folder.is_dir() and len(list(folder.glob("*.distcp"))) == 2 and not list(run_dir.glob(".*.tmp"))
    shutil.rmtree(run_dir / "checkpoint_step_20.pt")
    (run_dir / "final_metrics.json").unlink()
    shutil.copytree(run_dir, tmp_path / "three")
    shutil.copytree(run_dir, tmp_path / "file")
    shutil.rmtree(tmp_path / "file/checkpoint_step_14.pt")
    checkpoint.one_file(folder, tmp_path / "file/checkpoint_step_14.pt")
    ranks(3, ["-c", RUN, *command, f"--run_dir={tmp_path / 'three'}"])
    for way in (run_dir, tmp_path / "file"):
        training.main(parse_config(training.Config, [*command, f"--run_dir={way}"]))
    whole = checkpoint.read(checkpoint.path_of(alone(optimizer), 20))
    for way in (run_dir, tmp_path / "three", tmp_path / "file"):
        assert values(way, "loss") == pytest.approx(values(alone(optimizer), "loss"), abs=1e-4)
        ended = checkpoint.read(checkpoint.path_of(way, 20))
        assert all(torch.allclose(ended["ema"][k], whole["ema"][k], atol=2e-3) for k in whole["ema"])
    model, meta = checkpoint.load_model(folder)
    again, _ = checkpoint.load_model(tmp_path / "file/checkpoint_step_14.pt")
    assert meta["step"] == 14 and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_an_index_that_would_run_code_is_refused(tmp_path):
    folder = tmp_path / "checkpoint_step_1.pt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match="could run code"):
        distributed.shapes_of_parts(folder)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


GRADIENTS = (
    HEAD
    + """
from model import ModelConfig, Transformer
strategy, tensor_parallel = sys.argv[1:]
dist = distributed.init(strategy=strategy, tensor_parallel=int(tensor_parallel))

def make():
    torch.manual_seed(0)
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=97, seq_len=32, qk_norm=True)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() > 1 else p.add_(0.2 * torch.randn_like(p))
    return model

whole, parts = make(), distributed.build(make, dist)
tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))
mine = tokens[dist.data_rank :: dist.data_size]
whole(tokens, tokens).backward()
parts(mine, mine).backward()
for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
    assert (b.grad.full_tensor() - a.grad).abs().max() < 1e-5 * a.grad.abs().max(), name
distributed.shutdown()
"""
)


@pytest.mark.parametrize(
    ("processes", "nodes", "mode"),
    [
        (2, 1, ["fsdp", "2"]),
        pytest.param(4, 1, ["fsdp", "2"], marks=slow),
        pytest.param(4, 1, ["fsdp", "1"], marks=slow),
        pytest.param(4, 2, ["hsdp", "2"], marks=slow),
    ],
)
def test_the_gradient_in_parts_is_that_of_the_whole(processes, nodes, mode):
    """Every parameter's, the gains of norms included, which each tensor_parallel rank sees a part of."""
    ranks(processes, ["-c", GRADIENTS, *mode], nodes)
