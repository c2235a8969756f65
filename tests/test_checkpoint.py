"""Checkpoints: what is saved comes back, whatever wrapped it; what is broken is named; a crash costs nothing."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from conftest import ROOT, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nano416 import checkpoint, distributed
from nano416.checkpoint import CheckpointWriter, TrainState
from nano416.fault_tolerance import StepGuard
from nano416.optimizers import EMA, OPTIMIZERS, OptimConfig, build_optimizer


class Counter:
    """Stands in for a loader or a guard: a thing with state."""

    def __init__(self, value: int):
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def train_state(model: nn.Module, optimizer=None, ema=None) -> TrainState:
    return TrainState(model, optimizer or adamw(model), Counter(12), Counter(34), ema)


def metadata(raw_model: Any) -> dict[str, Any]:
    return {
        "tokens": 96,
        "config": {"model": dataclasses.asdict(raw_model.config)},
        "tokenizer": {"name": "bytes", "vocab_size": 257, "eot_id": 256},
        "metrics": {"loss": 2.5},
    }


def save(run_dir: Path, state: TrainState, step: int = 3, permanent: bool = True, raw_model: Any = None) -> Path:
    writer = CheckpointWriter(run_dir)
    path = writer.save(step, state, metadata(raw_model or state.model), permanent)
    writer.wait()
    assert not writer.failed
    return path


def restore(path: Path, state: TrainState) -> None:
    checkpoint.restore(checkpoint.read(path), state, path)


def train(model: nn.Module, optimizer, steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 97, (2, 17), generator=generator)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module, **changes):
    return build_optimizer(model, OptimConfig(**{"optimizer": "adamw", "max_lr": 1e-2, **changes}))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint after three steps."""
    model = tiny_model(qk_norm=True)
    optimizer = adamw(model)
    train(model, optimizer, 3)
    return save(tmp_path, train_state(model, optimizer))


# ---- What is saved comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2, "qk_norm": True}, {"tie_embeddings": False}])
def test_a_loaded_model_gives_the_same_logits(shape, tmp_path, tokens):
    model = tiny_model(**shape)
    path = save(tmp_path, train_state(model))
    loaded, metadata = checkpoint.load_model(tmp_path)
    assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training
    assert (metadata["step"], metadata["tokens"], metadata["metrics"]) == (3, 96, {"loss": 2.5})
    assert metadata["path"] == str(path)
    assert not metadata.keys() & {"model", "optimizer", "ema"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_for_bit(name, tmp_path):
    model = tiny_model()
    optimizer = adamw(model, optimizer=name)
    train(model, optimizer, 5)
    path = save(tmp_path, train_state(model, optimizer))
    expected = train(model, optimizer, 5, seed=1)

    other = tiny_model(seed=9)
    other_optimizer = adamw(other, optimizer=name)
    restore(path, train_state(other, other_optimizer))
    assert train(other, other_optimizer, 5, seed=1) == expected
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


def test_loader_guard_and_averages_continue_where_they_were(tmp_path):
    model = tiny_model()
    optimizer = adamw(model)
    ema = EMA(model, 0.9)
    train(model, optimizer, 2)
    ema.update()
    path = save(tmp_path, TrainState(model, optimizer, Counter(5), Counter(6), ema))
    state = train_state(tiny_model(seed=9), ema=EMA(tiny_model(seed=9), 0.9))
    restore(path, state)
    assert (state.loader.value, state.guard.value, state.ema.state_dict()["ema_updates"]) == (5, 6, 1)
    averages = ema.state_dict()["ema"]
    assert all(torch.equal(averages[name], weight) for name, weight in state.ema.state_dict()["ema"].items())
    loaded = checkpoint.load_model(path)[0]
    assert all(torch.equal(averages[name], weight) for name, weight in loaded.named_parameters()), "not the averages"
    restore(path, train_state(tiny_model(seed=9)))  # a run without --ema ignores them


def test_the_settings_of_the_resumed_run_win_over_the_files(tmp_path):
    model = tiny_model()
    optimizer = adamw(model, beta2=0.9, weight_decay=0.5)
    train(model, optimizer, 2)
    path = save(tmp_path, train_state(model, optimizer))
    now = adamw(model, beta2=0.99, weight_decay=0.0)
    restore(path, train_state(model, now))
    assert [(g["betas"][1], g["weight_decay"], g["lr"]) for g in now.param_groups] == [(0.99, 0.0, 1e-2)] * 3


def test_the_state_of_another_optimizer_is_refused(saved):
    model = tiny_model(qk_norm=True)
    with pytest.raises(ValueError, match=r"another optimizer .*exp_avg.*momentum.*; resume with the --optimizer"):
        restore(saved, train_state(model, adamw(model, optimizer="lion")))


def test_random_numbers_continue_where_they_were(tmp_path):
    model = tiny_model()
    path = save(tmp_path, train_state(model))
    expected = torch.rand(5)
    torch.manual_seed(1)
    restore(path, train_state(model))
    assert torch.equal(torch.rand(5), expected)


def test_a_checkpoint_is_plain_types_and_holds_tied_weights_once(saved):
    contents = torch.load(saved, weights_only=True)
    keys = "format step tokens config tokenizer model optimizer loader guard rng metrics"
    assert set(contents) == set(keys.split())
    assert contents["format"] == checkpoint.FORMAT
    assert "lm_head.weight" not in contents["model"]
    assert not any("rope" in name for name in contents["model"])


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.shutdown()


@pytest.mark.parametrize("wrapping", ["compiled in place", "torch.compile", "ddp", "compiled in place, then ddp"])
def test_every_wrapping_writes_the_same_keys_and_loads_alike(wrapping, tmp_path, process_group, tokens):
    raw_model = tiny_model()
    optimizer = adamw(raw_model)
    train(raw_model, optimizer, 1)
    plain = checkpoint.read(save(tmp_path, train_state(raw_model, optimizer), step=1))
    if "in place" in wrapping:
        raw_model.compile()
    model: Any = torch.compile(raw_model) if wrapping == "torch.compile" else raw_model
    model = DistributedDataParallel(model) if "ddp" in wrapping else model
    wrapped = checkpoint.read(save(tmp_path, train_state(model, optimizer), step=2, raw_model=raw_model))
    for part in ("model", "optimizer"):
        assert wrapped[part].keys() == plain[part].keys()
    assert wrapped["optimizer"]["state"].keys() == plain["optimizer"]["state"].keys()
    for name, weight in plain["model"].items():
        assert torch.equal(weight, wrapped["model"][name]), name
    # The other way round: a plain file into a wrapped model.
    other = tiny_model(seed=9)
    checkpoint.load_weights(DistributedDataParallel(other) if "ddp" in wrapping else other, plain["model"], "plain")
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(other(tokens), raw_model(tokens))


# ---- Which file is meant ---------------------------------------------------------------------------------------------


def test_a_run_directory_means_its_highest_step(tmp_path):
    for name in (
        "checkpoint_step_9.pt",
        "checkpoint_step_10.pt",
        ".checkpoint_step_99.pt.7.tmp",
        "checkpoint_step_x.pt",
    ):
        (tmp_path / name).touch()
    assert checkpoint.resolve(tmp_path) == checkpoint.latest(tmp_path) == tmp_path / "checkpoint_step_10.pt"
    assert checkpoint.resolve(tmp_path / "checkpoint_step_9.pt") == tmp_path / "checkpoint_step_9.pt"


@pytest.mark.parametrize("name", ["no/such/folder/file.pt", "absent.pt", "someone/nothing-like-it"])
def test_a_path_without_a_checkpoint_is_named(name):
    with pytest.raises(ValueError, match=f"no checkpoint at {name}"):
        checkpoint.resolve(name)


class ConnectError(Exception):
    """As the Hub client's HTTP library has it: not an OSError."""


def test_a_mistyped_run_is_not_looked_up_on_the_hub_and_a_silent_hub_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(*_, **__):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"someone/run: no such file or folder, and the Hub cannot be reached"
    ) as error:
        checkpoint.resolve("someone/run")
    assert "\n" not in str(error.value)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs/typo: neither a file nor a run directory"):
        checkpoint.resolve("runs/typo")


def test_a_hub_repository_means_its_highest_step_and_a_revision_can_be_pinned(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    asked = []
    files = [{"rfilename": name} for name in ("checkpoint_step_9.pt", "checkpoint_step_10.pt", "README.md")]

    def model_info(self, repo, revision=None):
        return ModelInfo(id=repo, siblings=files)

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert checkpoint.resolve("someone/model@1a2b3c") == tmp_path / "checkpoint_step_10.pt"
    checkpoint.resolve("someone/model")
    assert asked == [("someone/model", "checkpoint_step_10.pt", revision) for revision in ("1a2b3c", None)]


# ---- What is broken is named -----------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def set_value(name: str, value: Any) -> Callable[[dict], dict]:
    return lambda state: {**state, name: value}


def set_shape(**values: Any) -> Callable[[dict], dict]:
    return lambda state: dict(state, config={"model": {**state["config"]["model"], **values}})


def set_weight(weight: Any) -> Callable[[dict], dict]:
    return lambda state: dict(state, model={**state["model"], "embed_tokens.weight": weight})


COUNTS = ["format", "step", "tokens"]
NO_COUNTS = ["3", None, -1, 1.5, True, 2**70, [3], {}, torch.ones(1), float("nan")]
NO_CONFIGS = [None, 7, [], "model", {"model": {}, "optim": 3}, {"model": {}, "optim": {"a": torch.ones(2)}}]
NO_TOKENIZERS = [None, 7, [], {}, {"name": 7}, {"name": None}, {"name": "gpt2", "sha256": 7}, {"name": "x", "y": {1j}}]
# The shape of the embedding of tiny_model.
ROWS = torch.ones(128, 32)
NO_WEIGHTS = {
    "a number": (7, "7"),
    "nothing": (None, "a NoneType"),
    "integers": (ROWS.int(), "a tensor of int32"),
    "truth values": (ROWS.bool(), "a tensor of bool"),
    "complex": (ROWS.to(torch.complex64), "a tensor of complex64"),
    "sparse": (ROWS.to_sparse(), r"a tensor of float32 \(sparse_coo\)"),
    "sparse rows": (ROWS.to_sparse_csr(), r"a tensor of float32 \(sparse_csr\)"),
    "quantized": (torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8), "a tensor of qint8"),
    "of no memory": (ROWS.to("meta"), "a tensor of float32"),
    "tensors of tensors": (torch.nested.nested_tensor([ROWS]), "a tensor of float32"),
}
BROKEN_BYTES = {
    "a flipped byte": (lambda data: flip(data, len(data) // 2), "damaged"),
    "a flipped byte in the directory": (lambda data: flip(data, len(data) - 200), "damaged"),
    "bytes that are not utf-8": (lambda data: data[:-120] + bytes([data[-120] ^ 0x80]) + data[-119:], "damaged"),
    "half of it": (lambda data: data[: len(data) // 2], "truncated"),
    "nothing": (lambda data: b"", "0 bytes.*truncated"),
    "a web page": (lambda data: b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "a git-lfs pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "text": (lambda data: b"hello", "not a checkpoint"),
}
BROKEN_STATE = {
    "a pickle bomb": (lambda state: dict(state, metrics=Bomb()), "refused: .* could run code"),
    "an unknown class": (lambda state: dict(state, metrics=OptimConfig()), "refused"),
    "a list": (lambda state: [1, 2], "not a nano416 checkpoint: it holds list"),
    "another project's file": (
        lambda state: {"state_dict": {}},
        r"not a nano416 checkpoint: it holds \['state_dict'\]",
    ),
    "no weights": (lambda state: without(state, "model"), "not a nano416 checkpoint"),
    "no tokenizer": (lambda state: without(state, "tokenizer"), "not a nano416 checkpoint"),
    "no shape": (lambda state: dict(state, config={}), "describes a model that this version does not know"),
    "a shape of tomorrow": (
        lambda state: dict(state, config={"model": {**state["config"]["model"], "window": 9}}),
        "unknown key window",
    ),
    "an impossible shape": (
        lambda state: dict(state, config={"model": {**state["config"]["model"], "n_heads": 5}}),
        "n_heads",
    ),
    "a newer format": (lambda state: dict(state, format=99), r"format 99, this version reads up to 1; update"),
    "a missing weight": (
        lambda state: dict(state, model=without(state["model"], "norm.weight")),
        r"norm.weight is missing \(1 diff",
    ),
    "an unknown weight": (lambda state: dict(state, model={**state["model"], "x": torch.ones(1)}), "x is unknown"),
    "a wrong shape": (
        lambda state: dict(state, model={**state["model"], "norm.weight": torch.ones(31)}),
        r"norm.weight is \[31\], the model has \[32\]",
    ),
    "a foreign model_state_dict": (lambda state: {"model_state_dict": {"w": torch.ones(1)}}, "another project"),
    "a model_state_dict that is a list": (lambda state: {"model_state_dict": [1]}, "another project"),
    "a model_state_dict of numbers": (lambda state: {"model_state_dict": {"embeddings.weight": 1}}, "another project"),
    "more layers than weights": (set_shape(n_layers=2000), r"describes 2000 layers .* holds 2\d weights"),
    "a width of 10**6": (set_shape(ffn_dim=10**6), r"mlp.gate_proj.weight is \[48, 32\], the model has \[10"),
    "absurdly many layers": (set_shape(n_layers=10**9), "n_layers must be at most 2,000"),
    "a context of 10**12": (set_shape(seq_len=10**12), r"seq_len 1000000000000\); this machine has|seq_len"),
    "a context of 2**70": (set_shape(seq_len=2**70), "impossible size|seq_len"),
    "no vocabulary": (set_shape(vocab_size=None), "a vocabulary of None"),
    "a shape of texts": (set_shape(dim="wide"), "dim expects int"),
    "a shape of other keys": (
        lambda state: dict(state, config={"model": {1: 2, None: 3}}),
        "that this version does not",
    ),
    **{f"{name} is {value!r}": (set_value(name, value), f"its {name} is") for name in COUNTS for value in NO_COUNTS},
    **{f"config is {value!r}": (set_value("config", value), "its config is not") for value in NO_CONFIGS},
    **{f"tokenizer is {value!r}": (set_value("tokenizer", value), "its tokenizer has") for value in NO_TOKENIZERS},
    **{
        f"weights that are {name}": (set_weight(weight), f"embed_tokens.weight' in its {{}} is {said}")
        for name, (weight, said) in NO_WEIGHTS.items()
    },
    "weights in a list": (set_value("model", [torch.ones(3)]), "its model is a list"),
    "averages in a list": (set_value("ema", [torch.ones(3)]), "its ema is a list"),
    "a weight named 7": (lambda state: dict(state, model={**state["model"], 7: torch.ones(3)}), "7 in its model is"),
}


@pytest.mark.parametrize("what", BROKEN_BYTES)
def test_a_file_of_other_bytes_is_named_with_what_to_do(what, saved):
    damage, hint = BROKEN_BYTES[what]
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(ValueError, match=hint) as error:
        checkpoint.load_model(saved)
    assert str(saved) in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("what", BROKEN_STATE)
def test_a_file_of_other_content_is_named_with_what_to_do(what, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, hint = BROKEN_STATE[what]
    torch.save(damage(torch.load(saved)), saved)
    with pytest.raises(ValueError, match=hint.replace("{}", "model")) as error:
        checkpoint.load_model(saved)
    assert len(str(error.value).splitlines()) == 1
    assert str(saved) in str(error.value) and "weights_only" not in str(error.value)
    assert not os.path.exists("exploded"), "the file ran code"


NO_STATE = {
    "no loader": (lambda state: without(state, "loader"), "its loader is a NoneType"),
    "no optimizer": (lambda state: without(state, "optimizer"), "its optimizer is a NoneType"),
    "no rng": (lambda state: without(state, "rng"), "its rng is a NoneType"),
    "no metrics": (lambda state: without(state, "metrics"), "its metrics is a NoneType"),
    "a loader that is a number": (set_value("loader", 7), "its loader is 7"),
    "an empty loader": (set_value("loader", {}), "it has no 'value'"),
    "a loader of texts": (set_value("loader", {"value": "12"}), "its loader's 'value' is '12'"),
    "a loader before the beginning": (set_value("loader", {"value": -5}), "its loader's 'value' is -5"),
    "a loader beyond all data": (set_value("loader", {"value": 2**70}), "its loader's 'value' is 1180"),
    "a loader of other names": (set_value("loader", {"value": 12, "load_state_dict": 1}), "its loader's 'load_"),
    "a guard of other names": (set_value("guard", {"value": 34, "__class__": 1}), "its guard's '__class__'"),
    "a guard that is a tensor": (set_value("guard", torch.ones(3)), "its guard is a tensor of float32"),
    "metrics in a list": (set_value("metrics", [1]), "its metrics is a list"),
    "seconds in a text": (set_value("metrics", {"elapsed_s": "9"}), "its metrics is a dict"),
    "seconds without end": (set_value("metrics", {"elapsed_s": float("inf")}), "its metrics is a dict"),
    "random numbers in a dict": (set_value("rng", {"cpu": torch.get_rng_state()}), "its rng is a dict"),
    "random numbers as numbers": (set_value("rng", [7]), "its rng is a list"),
    "random numbers without cpu": (set_value("rng", [{}]), "its rng is a list"),
    "random numbers of floats": (set_value("rng", [{"cpu": torch.ones(5056)}]), "its rng is a list"),
    "too few random numbers": (set_value("rng", [{"cpu": torch.get_rng_state()[:9]}]), "random state is damaged"),
    "random numbers of ones": (set_value("rng", [{"cpu": torch.ones_like(torch.get_rng_state())}]), "random state is"),
    "an optimizer that is a list": (set_value("optimizer", [1]), "its optimizer is a list"),
    "an optimizer without state": (set_value("optimizer", {}), r"another optimizer \(\[\] for"),
    "an optimizer of lists": (set_value("optimizer", {"state": [1]}), "its optimizer is a dict"),
    "an optimizer of numbers": (
        lambda state: dict(state, optimizer={"state": dict.fromkeys(state["optimizer"]["state"], 7)}),
        r"another optimizer \(7 for",
    ),
    "moments of another shape": (
        lambda state: dict(state, optimizer={"state": reshaped_moments(state["optimizer"]["state"])}),
        "its optimizer's exp_avg of .* is a tensor of float32",
    ),
}


def reshaped_moments(entries: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {**entry, "exp_avg": torch.ones(3)} for name, entry in entries.items()}


@pytest.mark.parametrize("what", NO_STATE)
def test_a_file_without_the_state_of_a_run_is_for_chat_but_no_run_resumes_from_it(what, saved):
    damage, hint = NO_STATE[what]
    torch.save(damage(torch.load(saved)), saved)
    checkpoint.load_model(saved)
    model = tiny_model(qk_norm=True)
    with pytest.raises(ValueError, match=hint) as error:
        restore(saved, train_state(model))
    assert len(str(error.value).splitlines()) == 1


def test_a_guard_of_another_window_or_of_other_names_is_refused(saved):
    model = tiny_model(qk_norm=True)
    guard = StepGuard(torch.device("cpu"))
    good = guard.state_dict()
    state = torch.load(saved)
    for odd in ({**good, "window": torch.zeros(2, 3)}, {**good, "skip_spikes": torch.ones(1)}, {"good": 3}):
        torch.save({**state, "guard": odd}, saved)
        with pytest.raises(ValueError, match=r"its guard's '(window|skip_spikes|good)' is"):
            restore(saved, TrainState(model, adamw(model), Counter(12), guard))
    for fine in (good, {}):
        torch.save({**state, "guard": fine}, saved)
        restore(saved, TrainState(model, adamw(model), Counter(12), guard))
    assert guard.skip_spikes is False


def test_averages_of_other_names_are_refused(saved):
    model = tiny_model(qk_norm=True)
    torch.save({**torch.load(saved), "ema": {"x": torch.ones(1)}, "ema_updates": 1}, saved)
    with pytest.raises(ValueError, match="does not fit the model"):
        restore(saved, train_state(model, ema=EMA(model, 0.9)))


def test_weights_that_are_not_numbers_load(saved):
    torch.save(set_weight(ROWS * torch.nan)(torch.load(saved)), saved)
    assert checkpoint.load_model(saved)[0].embed_tokens.weight.isnan().all()


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_one_line(saved):
    for tokenizer in ("bytes", {"name": "bytes"}, {"name": "bytes", "vocab_size": 3}):
        torch.save({**torch.load(saved), "tokenizer": tokenizer}, saved)
        with pytest.raises(ValueError, match="tokenizer 'bytes' has 257 tokens, more than its model's 97"):
            checkpoint.load_model_and_tokenizer(saved)


UNREADABLE = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to a FIFO": lambda path: (os.mkfifo(path.parent / "fifo"), path.symlink_to("fifo")),
    "an empty folder": lambda path: path.mkdir(),
    "a link to the run": lambda path: path.symlink_to("."),
    "a file of another step": lambda path: shutil.copy(path.parent / "checkpoint_step_3.pt", path),
    "a file that unpacks to more than its size": lambda path: zip_bomb(path),
}


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_not_the_file_of_its_step_is_passed_over_and_never_waited_for(what, saved, tmp_path):
    odd = tmp_path / "checkpoint_step_99.pt"
    UNREADABLE[what](odd)
    warnings = []
    newest = checkpoint.read_latest(tmp_path, warnings.append)
    assert newest and newest[0] == saved and newest[1]["step"] == 3
    assert len(warnings) == 1 and str(odd) in warnings[0] and "\n" not in warnings[0]
    if what != "a file of another step":
        with pytest.raises(ValueError, match="checkpoint_step_99"):
            checkpoint.load_model(odd)
    else:
        assert checkpoint.load_model(odd)[1]["step"] == 3
    save(tmp_path, train_state(tiny_model()), step=99)
    assert checkpoint.read(odd)["step"] == 99, "the step can be written again"


def test_a_zip_of_something_else_is_not_a_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("word/document.xml", "<text/>")
    with pytest.raises(ValueError, match=r"x\.pt .*not a checkpoint"):
        checkpoint.load_model(tmp_path / "x.pt")


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(saved):
    """Two hundred places: an error that names the file, or exactly the weights that were saved."""
    data = saved.read_bytes()
    weights = {name: weight.clone() for name, weight in checkpoint.read(saved)["model"].items()}
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    broken = saved.with_name("flipped.pt")
    for position in torch.randint(0, len(data), (200,), generator=generator).tolist():
        broken.write_bytes(flip(data, position))
        try:
            loaded = checkpoint.read(broken)["model"]
        except ValueError as error:
            assert str(broken) in str(error)
            noticed += 1
        else:
            assert all(torch.equal(weights[name], loaded[name]) for name in weights), (
                f"byte {position} changed a weight"
            )
    assert noticed > 100


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: None])
def test_a_directory_without_checkpoint_and_an_absent_path_are_named(make, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no checkpoint.* (in|at) .*run"):
        checkpoint.load_model(tmp_path / "run")


# ---- A crash costs nothing -------------------------------------------------------------------------------------------

DISK_FULL = OSError(28, "No space left on device")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("failure", [DISK_FULL, KeyboardInterrupt()])
def test_a_write_that_fails_half_way_leaves_the_older_file_alone(failure, tmp_path, monkeypatch):
    path = save(tmp_path, train_state(tiny_model()))
    before = path.read_bytes()
    contents = checkpoint.read(path)

    def write_half(contents, file):
        file.write(before[: len(before) // 2])
        raise failure

    monkeypatch.setattr(torch, "save", write_half)
    for step in (3, 4):  # over the old file, and a new one
        with pytest.raises(type(failure)):
            checkpoint.write(checkpoint.checkpoint_path(tmp_path, step), contents)
    assert files(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path, monkeypatch):
    state = train_state(tiny_model())
    warnings = []
    writer = CheckpointWriter(tmp_path, warnings.append)

    def refuse(*_):
        raise DISK_FULL

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", refuse)
        writer.save(1, state, metadata(state.model), permanent=True)
        writer.wait()
    assert "No space left" in warnings[0]
    assert "checkpoint_step_1.pt" in warnings[0]
    assert warnings[0].startswith(writer.failed)
    assert files(tmp_path) == []
    writer.save(2, state, metadata(state.model), permanent=True)
    writer.wait()
    assert files(tmp_path) == ["checkpoint_step_2.pt"]
    assert not writer.failed


def test_a_save_holds_the_weights_of_its_moment_though_training_goes_on(tmp_path, monkeypatch):
    model = tiny_model()
    optimizer = adamw(model)
    train(model, optimizer, 1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {key: tensor.clone() for key, tensor in optimizer.state_dict()["state"][0].items()}
    continue_writing = threading.Event()
    torch_save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (continue_writing.wait(10), torch_save(*args)))
    writer = CheckpointWriter(tmp_path)
    path = writer.save(1, train_state(model, optimizer), metadata(model), permanent=True)
    train(model, optimizer, 2)
    continue_writing.set()
    writer.wait()
    contents = checkpoint.read(path)
    assert all(torch.equal(contents["model"][name], tensor) for name, tensor in weights.items())
    first = next(iter(contents["optimizer"]["state"].values()))
    assert all(torch.equal(first[key], tensor) for key, tensor in moments.items())


def test_a_temporary_checkpoint_goes_when_a_newer_one_is_safe_and_permanent_ones_stay(tmp_path, monkeypatch):
    state = train_state(tiny_model())
    for step, permanent, expected in (
        (1, True, ["checkpoint_step_1.pt"]),
        (2, False, ["checkpoint_step_1.pt", "temporary_step_2.pt"]),
        (3, False, ["checkpoint_step_1.pt", "temporary_step_3.pt"]),
        (4, True, ["checkpoint_step_1.pt", "checkpoint_step_4.pt"]),
    ):
        save(tmp_path, state, step, permanent)
        assert files(tmp_path) == expected
    save(tmp_path, state, 5, permanent=False)

    def refuse(*_):
        raise DISK_FULL

    monkeypatch.setattr(torch, "save", refuse)
    writer = CheckpointWriter(tmp_path)
    writer.save(6, state, metadata(state.model), permanent=True)
    writer.wait()
    assert writer.failed
    assert "temporary_step_5.pt" in files(tmp_path), "the older one goes only after the newer is complete"


def test_keep_every_thins_out_the_permanent_ones_but_never_the_newest(tmp_path):
    state = train_state(tiny_model())
    writer = CheckpointWriter(tmp_path, keep_every=4)
    for step in (2, 4, 6, 8, 9):
        writer.save(step, state, metadata(state.model), permanent=True)
        writer.wait()
    assert files(tmp_path) == ["checkpoint_step_4.pt", "checkpoint_step_8.pt", "checkpoint_step_9.pt"]


def test_a_folder_that_is_removed_is_never_seen_in_half(tmp_path, monkeypatch):
    state = train_state(tiny_model())
    older = tmp_path / "temporary_step_1.pt"
    older.mkdir()
    (older / "facts.pt").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed before the first file was removed
    save(tmp_path, state, step=2)
    assert [path.name for _, path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint_step_2.pt"]
    monkeypatch.undo()
    save(tmp_path, state, step=3)
    assert files(tmp_path) == ["checkpoint_step_2.pt", "checkpoint_step_3.pt"]


def test_the_newest_readable_checkpoint_is_taken(tmp_path, capsys):
    state = train_state(tiny_model())
    for step, permanent in ((1, True), (2, True), (3, False)):
        save(tmp_path, state, step, permanent)
    damaged = tmp_path / "temporary_step_3.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    warnings = []
    newest = checkpoint.read_latest(tmp_path, warnings.append)
    assert newest
    path, contents = newest
    assert path == tmp_path / "checkpoint_step_2.pt"
    assert contents["step"] == 2
    assert "temporary_step_3.pt" in warnings[0]
    assert checkpoint.load_model(tmp_path)[1]["step"] == 2
    assert "passed over: " in capsys.readouterr().err
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        checkpoint.read_latest(tmp_path, warnings.append)
    assert checkpoint.read_latest(tmp_path / "nowhere", warnings.append) is None


KILLED = """
import sys, torch
from nano416 import checkpoint
contents = {"format": 1, "step": 7, "tokens": 0, "config": {"model": {}}, "tokenizer": "bytes", "model": {"w": torch.rand(2**22)}}
path = checkpoint.checkpoint_path(sys.argv[1], 7)
checkpoint.write(path, contents)
print("ready", flush=True)
while True:
    checkpoint.write(path, contents)
"""


def test_a_kill_during_writing_leaves_a_readable_file_and_the_next_write_cleans_up(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        for _ in range(2000):
            if any(name.endswith(".tmp") for name in files(tmp_path)):
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    left = files(tmp_path)
    assert checkpoint.read(tmp_path / "checkpoint_step_7.pt")["model"]["w"].shape == (2**22,)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint_step_7.pt"
    save(tmp_path, train_state(tiny_model()), step=8)
    assert files(tmp_path) == ["checkpoint_step_7.pt", "checkpoint_step_8.pt"], f"before the next write: {left}"


# ---- Checkpoints of the original 416M run ----------------------------------------------------------------------------

SEED = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 97, "seq_len": 24, "ffn_hidden_mult": 1.5}


def seed_weights(n_kv_heads: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return 0.3 * torch.randn(rows, columns, generator=generator)

    def gain():
        return 1 + 0.2 * torch.randn(32, generator=generator)

    weights = {"embeddings.weight": matrix(97, 32)}
    for n in range(2):
        weights |= {
            f"layers.{n}.attn_norm.weight": gain(),
            f"layers.{n}.attention.w_q.weight": matrix(32, 32),
            f"layers.{n}.attention.w_k.weight": matrix(8 * n_kv_heads, 32),
            f"layers.{n}.attention.w_v.weight": matrix(8 * n_kv_heads, 32),
            f"layers.{n}.attention.w_o.weight": matrix(32, 32),
            f"layers.{n}.attention.rotary_pe.cos_cached": torch.zeros(24, 4),
            f"layers.{n}.ffn_norm.weight": gain(),
            f"layers.{n}.ffn.w_gate.weight": matrix(48, 32),
            f"layers.{n}.ffn.w_value.weight": matrix(48, 32),
            f"layers.{n}.ffn.out.weight": matrix(32, 48),
        }
    rope = {"shared_rope.cos_cached": torch.zeros(24, 4), "shared_rope.sin_cached": torch.zeros(24, 4)}
    return {**weights, "norm.weight": gain(), **rope, "lm_head.weight": weights["embeddings.weight"]}


def seed_logits(w: dict[str, torch.Tensor], tokens: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """The original network, written out: neighbours (2i, 2i + 1) rotate as one complex number."""

    def normed(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def rotated(x):  # [T, heads, 8]
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(4) / 4)
        pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    x, T = w["embeddings.weight"][tokens], len(tokens)
    for n in range(2):
        name = f"layers.{n}."
        h = normed(x, f"{name}attn_norm.weight")
        q, k, v = (
            (h @ w[f"{name}attention.w_{part}.weight"].T).view(T, heads, 8)
            for part, heads in (("q", 4), ("k", n_kv_heads), ("v", n_kv_heads))
        )
        q, k = rotated(q), rotated(k)
        heads = []
        for head in range(4):
            shared = head * n_kv_heads // 4
            scores = q[:, head] @ k[:, shared].T / 8**0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, dim=-1) @ w[f"{name}attention.w_o.weight"].T
        h = normed(x, f"{name}ffn_norm.weight")
        gate, value = h @ w[f"{name}ffn.w_gate.weight"].T, h @ w[f"{name}ffn.w_value.weight"].T
        x = x + (gate * gate.sigmoid() * value) @ w[f"{name}ffn.out.weight"].T
    return normed(x, "norm.weight") @ w["embeddings.weight"].T


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_checkpoint_of_the_original_run_gives_the_logits_of_its_formula(n_kv_heads, prefix, tmp_path):
    weights = seed_weights(n_kv_heads)
    state = {
        "step": 15_257,
        "model_state_dict": {prefix + name: value for name, value in weights.items()},
        "optimizer_state_dict": {"state": {}},
        "total_tokens": 10**10,
        "config": {**SEED, "n_kv_heads": n_kv_heads, "max_lr": 3e-4},
    }
    torch.save(state, tmp_path / "checkpoint_step_15257.pt")
    model, meta = checkpoint.load_model(tmp_path)
    tokens = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(3))
    expected = seed_logits(weights, tokens, n_kv_heads)
    torch.testing.assert_close(model(tokens[None])[0, :, :97], expected, atol=1e-4, rtol=1e-4)
    assert (meta["step"], meta["tokens"], meta["tokenizer"]["name"]) == (15_257, 10**10, "gpt2")
    assert model.config.seq_len == 24 and model.config.num_params() == sum(
        value.numel() for name, value in weights.items() if "cached" not in name and name != "lm_head.weight"
    )


@pytest.mark.parametrize(
    ("parts", "hint"),
    [
        ({"config": {}}, "`n_heads` in its `config` is missing"),
        ({"config": None}, "`n_heads` in its `config` is missing"),
        ({"model_state_dict": {**seed_weights(4), "lm_head.weight": torch.ones(97, 32)}}, "an untied output head"),
    ],
)
def test_a_checkpoint_almost_like_the_original_runs_is_refused(parts, hint, tmp_path):
    state = {"model_state_dict": seed_weights(4), "config": SEED, "step": 1, **parts}
    torch.save(state, tmp_path / "seed.pt")
    with pytest.raises(ValueError, match=hint) as error:
        checkpoint.load_model(tmp_path / "seed.pt")
    assert "seed.pt" in str(error.value)
