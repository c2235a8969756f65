"""checkpoint.py: what is saved comes back, whatever wrapped it; what is broken is named; a crash costs nothing."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
import torch.distributed
from conftest import ROOT, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import distributed
from model import Transformer
from optimizers import OPTIMIZERS, OptimConfig, build_optimizer


def save(run_dir, model, optimizer, step=3, raw_model: Transformer | None = None, permanent=True):
    writer = checkpoint.Writer(run_dir)
    path = writer.save(
        step=step, tokens=96, model=model, optimizer=optimizer, permanent=permanent, loader={"sequences": 12},
        config={"model": dataclasses.asdict((raw_model or model).config)},
        tokenizer={"name": "bytes", "vocab_size": 257, "eot_id": 256}, metrics={"loss": 2.5},
    )  # fmt: skip
    writer.wait()
    assert not writer.failed
    return path


def learn(model: nn.Module, optimizer, steps: int, seed: int = 0) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        tokens = torch.randint(0, 97, (2, 17), generator=generator)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adam(model: nn.Module, **changes):
    return build_optimizer(model, OptimConfig(**{"optimizer": "adamw", "max_lr": 1e-2, **changes}))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after three steps."""
    model = tiny_model(qk_norm=True)
    optimizer = adam(model)
    learn(model, optimizer, 3)
    return save(tmp_path, model, optimizer)


# ---- What is saved comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2, "qk_norm": True}, {"tie_embeddings": False}])
def test_a_loaded_model_gives_the_same_logits(shape, tmp_path, tokens):
    model = tiny_model(**shape)
    save(tmp_path, model, adam(model))
    loaded, meta = checkpoint.load_model(tmp_path)
    assert torch.equal(loaded(tokens), model(tokens)) and not loaded.training
    assert (meta["step"], meta["tokens"], meta["loader"]["sequences"], meta["metrics"]) == (3, 96, 12, {"loss": 2.5})
    assert meta["path"] == str(tmp_path / "checkpoint_step_3.pt") and "model" not in meta and "optimizer" not in meta


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_for_bit(name, tmp_path):
    model = tiny_model()
    optimizer = adam(model, optimizer=name)
    learn(model, optimizer, 5)
    path = save(tmp_path, model, optimizer)
    expected = learn(model, optimizer, 5, seed=1)

    other = tiny_model(seed=9)
    its_optimizer = adam(other, optimizer=name)
    checkpoint.restore(checkpoint.read(path), other, its_optimizer, path)
    assert learn(other, its_optimizer, 5, seed=1) == expected
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


def test_the_settings_of_the_continuing_run_win_over_the_files(tmp_path):
    model = tiny_model()
    optimizer = adam(model, beta2=0.9, weight_decay=0.5)
    learn(model, optimizer, 2)
    path = save(tmp_path, model, optimizer)
    now = adam(model, beta2=0.99, weight_decay=0.0)
    checkpoint.restore(checkpoint.read(path), model, now, path)
    assert [(g["betas"][1], g["weight_decay"], g["lr"]) for g in now.param_groups] == [(0.99, 0.0, 1e-2)] * 3


def test_random_numbers_continue_where_they_were(tmp_path):
    model = tiny_model()
    path = save(tmp_path, model, adam(model))
    expected = torch.rand(5)
    torch.manual_seed(1)
    checkpoint.restore(checkpoint.read(path), model, adam(model), path)
    assert torch.equal(torch.rand(5), expected)


def test_a_checkpoint_is_plain_types_and_holds_tied_weights_once(saved):
    state = torch.load(saved, weights_only=True)
    keys = "format step tokens config tokenizer model optimizer loader rng metrics"
    assert set(state) == set(keys.split()) and state["format"] == checkpoint.FORMAT
    assert "lm_head.weight" not in state["model"] and not any("rope" in name for name in state["model"])


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.shutdown()


@pytest.mark.parametrize("wrapping", ["compiled in place", "torch.compile", "ddp", "compiled in place, then ddp"])
def test_every_wrapping_writes_the_same_keys_and_loads_alike(wrapping, tmp_path, process_group, tokens):
    raw_model = tiny_model()
    optimizer = adam(raw_model)
    learn(raw_model, optimizer, 1)
    plain = checkpoint.read(save(tmp_path, raw_model, optimizer, step=1))
    if "in place" in wrapping:
        raw_model.compile()
    model = torch.compile(raw_model) if wrapping == "torch.compile" else raw_model
    model = DistributedDataParallel(model) if "ddp" in wrapping else model
    wrapped = checkpoint.read(save(tmp_path, model, optimizer, step=2, raw_model=raw_model))
    for part in ("model", "optimizer"):
        assert wrapped[part].keys() == plain[part].keys()
    assert wrapped["optimizer"]["state"].keys() == plain["optimizer"]["state"].keys()
    for name, value in plain["model"].items():
        assert torch.equal(value, wrapped["model"][name]), name
    other = tiny_model(seed=9)  # and the other way round: a plain file into a wrapped model
    checkpoint.load_weights(DistributedDataParallel(other) if "ddp" in wrapping else other, plain["model"], "plain")
    assert torch.equal(other(tokens), tiny_logits(raw_model, tokens))


def tiny_logits(model: Transformer, tokens) -> torch.Tensor:
    with torch.compiler.set_stance("force_eager"):
        return model(tokens)


# ---- Which file is meant ---------------------------------------------------------------------------------------------


def test_a_run_directory_means_its_highest_step(tmp_path):
    for name in (
        "checkpoint_step_9.pt",
        "checkpoint_step_10.pt",
        ".checkpoint_step_99.pt.7.tmp",
        "checkpoint_step_x.pt",
    ):
        (tmp_path / name).touch()
    assert checkpoint.find(tmp_path) == checkpoint.latest(tmp_path) == tmp_path / "checkpoint_step_10.pt"
    assert checkpoint.find(tmp_path / "checkpoint_step_9.pt") == tmp_path / "checkpoint_step_9.pt"


@pytest.mark.parametrize("name", ["no/such/folder/file.pt", "absent.pt", "someone/nothing-like-it"])
def test_a_path_that_is_nothing_is_named(name):
    with pytest.raises(ValueError, match=f"no checkpoint at {name}"):
        checkpoint.find(name)


def test_a_mistyped_run_is_not_looked_for_on_the_hub_and_a_silent_hub_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    class ConnectError(Exception):
        """As the hub client's HTTP library has it: no OSError."""

    def refused(*_, **__):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", refused)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="someone/run: no such file or folder, and the Hub cannot be reached"):
        checkpoint.find("someone/run")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs/typo: neither a file nor a run directory"):
        checkpoint.find("runs/typo")


# ---- What is broken is named -----------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def changed(state: dict, **parts) -> dict:
    return {**state, **parts}


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


def reshaped(state: dict) -> dict:
    return changed(state, model={**state["model"], "norm.weight": torch.ones(31)})


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BROKEN_BYTES = {
    "a flipped byte": (lambda data: flip(data, len(data) // 2), "damaged"),
    "a flipped byte in the directory": (lambda data: flip(data, len(data) - 200), "damaged"),
    "bytes that are no utf-8": (lambda data: data[:-120] + bytes([data[-120] ^ 0x80]) + data[-119:], "damaged"),
    "half of it": (lambda data: data[: len(data) // 2], "truncated"),
    "nothing": (lambda data: b"", "0 bytes.*truncated"),
    "a web page": (lambda data: b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "a git-lfs pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "text": (lambda data: b"hello", "no checkpoint"),
}
BROKEN_STATE = {
    "a pickle bomb": (lambda state: changed(state, metrics=Bomb()), "refused: .* could run code"),
    "an unknown class": (lambda state: changed(state, metrics=OptimConfig()), "refused"),
    "a list": (lambda state: [1, 2], "not a nano416 checkpoint: it holds list"),
    "another project's file": (
        lambda state: {"state_dict": {}},
        r"not a nano416 checkpoint: it holds \['state_dict'\]",
    ),
    "no weights": (lambda state: without(state, "model"), "not a nano416 checkpoint"),
    "no tokenizer": (lambda state: without(state, "tokenizer"), "not a nano416 checkpoint"),
    "no shape": (lambda state: changed(state, config={}), "describes a model that this version does not know"),
    "a shape of tomorrow": (
        lambda state: changed(state, config={"model": {**state["config"]["model"], "window": 9}}),
        "unknown key window",
    ),
    "an impossible shape": (
        lambda state: changed(state, config={"model": {**state["config"]["model"], "n_heads": 5}}),
        "n_heads",
    ),
    "a newer format": (lambda state: changed(state, format=99), r"format 99, this version reads up to 1; update"),
    "a missing weight": (
        lambda state: changed(state, model=without(state["model"], "norm.weight")),
        r"norm.weight is missing \(1 diff",
    ),
    "an unknown weight": (lambda state: changed(state, model={**state["model"], "x": torch.ones(1)}), "x is unknown"),
    "a wrong shape": (reshaped, r"norm.weight is \[31\], the model has \[32\]"),
    "a foreign model_state_dict": (lambda state: {"model_state_dict": {"w": torch.ones(1)}}, "another project"),
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
    with pytest.raises(ValueError, match=hint) as error:
        checkpoint.load_model(saved)
    assert str(saved) in str(error.value) and "weights_only" not in str(error.value)
    assert not os.path.exists("exploded"), "the file ran code"


def test_a_zip_of_something_else_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("word/document.xml", "<text/>")
    with pytest.raises(ValueError, match=r"x\.pt .*no checkpoint"):
        checkpoint.load_model(tmp_path / "x.pt")


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(saved):
    """Two hundred places: an error that names the file, or exactly the weights that were saved."""
    data, weights = saved.read_bytes(), checkpoint.read(saved)["model"]
    weights = {name: value.clone() for name, value in weights.items()}  # they are mapped from the file
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    for at in torch.randint(0, len(data), (200,), generator=generator).tolist():
        broken = saved.with_name("flipped.pt")
        broken.write_bytes(flip(data, at))
        try:
            loaded = checkpoint.read(broken)["model"]
        except ValueError as error:
            assert str(broken) in str(error)
            noticed += 1
        else:
            assert all(torch.equal(weights[name], loaded[name]) for name in weights), f"byte {at} changed a weight"
    assert noticed > 100


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: None])
def test_a_directory_without_checkpoint_and_an_absent_path_are_named(make, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no checkpoint.* (in|at) .*run"):
        checkpoint.load_model(tmp_path / "run")


# ---- A crash costs nothing -------------------------------------------------------------------------------------------


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way_leaves_the_older_file_alone(failure, tmp_path, monkeypatch):
    model = tiny_model()
    path = save(tmp_path, model, adam(model))
    before, state = path.read_bytes(), checkpoint.read(path)

    def half(state, file):
        file.write(before[: len(before) // 2])
        raise failure

    monkeypatch.setattr(torch, "save", half)
    for step in (3, 4):  # over the old file, and beside it
        with pytest.raises(type(failure)):
            checkpoint.write(checkpoint.path_of(tmp_path, step), state)
    assert files(tmp_path) == [path.name] and path.read_bytes() == before


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path, monkeypatch):
    model, warnings = tiny_model(), []
    writer = checkpoint.Writer(tmp_path, warnings.append)
    facts = {"tokens": 1, "config": {"model": dataclasses.asdict(model.config)}, "tokenizer": {}}
    real, full = torch.save, OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(full))
    writer.save(step=1, model=model, optimizer=adam(model), permanent=True, **facts)
    writer.wait()
    assert "No space left" in warnings[0] and "checkpoint_step_1.pt" in warnings[0] and files(tmp_path) == []
    monkeypatch.setattr(torch, "save", real)
    writer.save(step=2, model=model, optimizer=adam(model), permanent=True, **facts)
    writer.wait()
    assert files(tmp_path) == ["checkpoint_step_2.pt"] and not writer.failed


def test_a_save_holds_the_weights_of_its_moment_though_training_goes_on(tmp_path, monkeypatch):
    model = tiny_model()
    optimizer = adam(model)
    learn(model, optimizer, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = optimizer.state_dict()["state"][0]["exp_avg"].clone(), optimizer.state_dict()["state"][0]["step"].clone()
    go, real = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (go.wait(10), real(*args)))
    writer = checkpoint.Writer(tmp_path)
    facts = {"tokens": 1, "config": {"model": dataclasses.asdict(model.config)}, "tokenizer": {}}
    path = writer.save(step=1, model=model, optimizer=optimizer, permanent=True, **facts)
    learn(model, optimizer, 2)
    go.set()
    writer.wait()
    state = checkpoint.read(path)
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in before.items())
    first = next(iter(state["optimizer"]["state"].values()))
    assert torch.equal(first["exp_avg"], moments[0]) and torch.equal(first["step"], moments[1])


def test_a_temporary_checkpoint_goes_when_a_newer_one_is_safe_and_permanent_ones_stay(tmp_path, monkeypatch):
    model = tiny_model()
    for step, permanent, left in (
        (1, True, ["checkpoint_step_1.pt"]),
        (2, False, ["checkpoint_step_1.pt", "temporary_step_2.pt"]),
        (3, False, ["checkpoint_step_1.pt", "temporary_step_3.pt"]),
        (4, True, ["checkpoint_step_1.pt", "checkpoint_step_4.pt"]),
    ):
        save(tmp_path, model, adam(model), step=step, permanent=permanent)
        assert files(tmp_path) == left
    save(tmp_path, model, adam(model), step=5, permanent=False)
    monkeypatch.setattr(checkpoint, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer = checkpoint.Writer(tmp_path)
    writer.save(step=6, model=model, optimizer=adam(model), permanent=True)
    writer.wait()
    assert "temporary_step_5.pt" in files(tmp_path), "the older one goes only after the newer is complete"


def test_keep_every_thins_out_the_permanent_ones_but_never_the_newest(tmp_path):
    model = tiny_model()
    writer = checkpoint.Writer(tmp_path, keep_every=4)
    for step in (2, 4, 6, 8, 9):
        writer.save(step=step, model=model, optimizer=adam(model), permanent=True)
        writer.wait()
    assert files(tmp_path) == ["checkpoint_step_4.pt", "checkpoint_step_8.pt", "checkpoint_step_9.pt"]


def test_a_hub_revision_can_be_pinned(monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "_from_hub", lambda *args: asked.append(args))
    checkpoint.find("someone/model@1a2b3c")
    checkpoint.find("someone/model")
    assert asked == [("someone/model", "1a2b3c"), ("someone/model", None)]


def test_the_newest_readable_checkpoint_wins(tmp_path):
    model, warnings = tiny_model(), []
    for step, permanent in ((1, True), (2, True), (3, False)):
        save(tmp_path, model, adam(model), step=step, permanent=permanent)
    damage = tmp_path / "temporary_step_3.pt"
    damage.write_bytes(damage.read_bytes()[:-100])
    path, state = checkpoint.read_latest(tmp_path, warnings.append) or (None, {})
    assert path == tmp_path / "checkpoint_step_2.pt" and state["step"] == 2 and "temporary_step_3.pt" in warnings[0]
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        checkpoint.read_latest(tmp_path, warnings.append)
    assert checkpoint.read_latest(tmp_path / "nowhere", warnings.append) is None


KILLED = """
import sys, torch, checkpoint
state = {"format": 1, "step": 7, "tokens": 0, "config": {"model": {}}, "tokenizer": {}, "model": {"w": torch.rand(2**22)}}
path = checkpoint.path_of(sys.argv[1], 7)
checkpoint.write(path, state)
print("ready", flush=True)
while True:
    checkpoint.write(path, state)
"""


def test_a_kill_during_writing_leaves_a_readable_file_and_the_next_write_cleans_up(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        for _ in range(2000):  # until a write is under way
            if any(name.endswith(".tmp") for name in files(tmp_path)):
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    left = files(tmp_path)
    assert checkpoint.read(tmp_path / "checkpoint_step_7.pt")["model"]["w"].shape == (2**22,)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint_step_7.pt"
    model = tiny_model()
    save(tmp_path, model, adam(model), step=8)
    assert files(tmp_path) == ["checkpoint_step_7.pt", "checkpoint_step_8.pt"], f"before the next write: {left}"


# ---- Checkpoints of the seed -----------------------------------------------------------------------------------------

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
    """The seed's network, written out: neighbours (2i, 2i + 1) turn as one complex number."""

    def normed(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def turned(x):  # [T, heads, 8]
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
        q, k = turned(q), turned(k)
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
def test_a_checkpoint_of_the_seed_gives_the_logits_of_its_formula(n_kv_heads, prefix, tmp_path):
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
    assert model.config.seq_len == 24 and model.num_params() == sum(
        value.numel() for name, value in weights.items() if "cached" not in name and name != "lm_head.weight"
    )


@pytest.mark.parametrize(
    ("parts", "hint"),
    [
        ({"config": {}}, "`n_heads` in its `config` is missing"),
        ({"config": None}, "`n_heads` in its `config` is missing"),
        ({"model_state_dict": {**seed_weights(4), "lm_head.weight": torch.ones(97, 32)}}, "an output head of its own"),
    ],
)
def test_a_checkpoint_almost_like_the_seeds_is_refused_instead_of_guessed(parts, hint, tmp_path):
    state = {"model_state_dict": seed_weights(4), "config": SEED, "step": 1, **parts}
    torch.save(state, tmp_path / "seed.pt")
    with pytest.raises(ValueError, match=hint) as error:
        checkpoint.load_model(tmp_path / "seed.pt")
    assert "seed.pt" in str(error.value)
