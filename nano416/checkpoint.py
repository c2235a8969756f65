"""The only reader and writer of run checkpoints.

    state = TrainState(raw_model, optimizer, loader, guard, ema)
    writer = CheckpointWriter(run_dir)
    writer.save(step, state, metadata, permanent=True)      # all ranks call; rank 0 writes in the background
    path, checkpoint = read_latest(run_dir, print)          # a plain dict, checked
    restore(checkpoint, state, path)                        # and training continues where it was
    model, metadata = load_model("checkpoints", "cpu")      # file, run directory or Hub repository

One checkpoint is one file: `checkpoint_step_<N>.pt` is permanent, `temporary_step_<N>.pt` is removed once a newer one
is complete. A file that exists under its name is complete. It holds tensors and plain types only, so that loading it
runs no code (weights_only=True), under the keys

    format step tokens config tokenizer metrics             what the run is
    model optimizer loader guard rng ema ema_updates        what training needs to continue; ema only with --ema

Where that does not fit in the memory of rank 0's host, `checkpoint_step_<N>.pt` is a folder: see sharded_checkpoint.py.
Checkpoints of the original 416M run have another format: see seed_checkpoint.py.
"""

import json
import math
import os
import pickle
import re
import reprlib
import shlex
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from model import ModelConfig, Transformer
from nano416 import distributed, seed_checkpoint, sharded_checkpoint
from nano416.config import from_dict, visible
from nano416.devices import free_host_memory_gb, memory_gb
from nano416.files import atomic_write, check_zip, move_into_place, open_regular, remove
from nano416.hub import hub_errors
from nano416.tokenizer import Tokenizer, load_tokenizer

# Raised when older versions could no longer read what this one writes.
FORMAT = 1
REQUIRED = {"format", "step", "tokens", "config", "tokenizer"}
FILE_NAME = re.compile(r"(checkpoint|temporary)_step_(\d+)\.pt")
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")  # USER/NAME or USER/NAME@REVISION


# ---- Which file ------------------------------------------------------------------------------------------------------


def checkpoint_path(run_dir: str | Path, step: int, permanent: bool = True) -> Path:
    """Where the checkpoint of `step` is written."""
    return Path(run_dir) / f"{'checkpoint' if permanent else 'temporary'}_step_{step}.pt"


def list_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in a run directory, newest first."""
    if not Path(run_dir).is_dir():
        return []
    matches = [(FILE_NAME.fullmatch(path.name), path) for path in Path(run_dir).iterdir()]
    return sorted(((int(match[2]), path) for match, path in matches if match), reverse=True)


def latest(run_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run directory, or None."""
    checkpoints = list_checkpoints(run_dir)
    return checkpoints[0][1] if checkpoints else None


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: a file, a run directory (its newest) or a Hub repository. Raises ValueError."""
    path = Path(path)
    folder = path.parent if path.suffix in (".safetensors", ".bin") else path
    if latest(folder) is None and _is_hugging_face(folder):
        out = f"{folder.resolve().name}.pt"
        command = f"python -m tools.convert_hf import {shlex.quote(str(folder))} {shlex.quote(out)}"
        raise ValueError(f"{path} is a Hugging Face model, not a checkpoint; make one of it: {command}")
    if _is_run_dir(path):
        newest = latest(path)
        if newest is None:
            raise ValueError(
                f"no checkpoint_step_<N>.pt in {path}; a run writes one at its end and at each checkpoint_every"
            )
        return newest
    if path.exists():
        return path
    match = HUB_ID.fullmatch(str(path))
    # A mistyped runs/NAME is not looked up as a repository of a user "runs".
    if match and not path.parent.exists():
        return _from_hub(match[1], match[2])
    raise ValueError(f"no checkpoint at {path}: neither a file nor a run directory")


def _is_hugging_face(folder: Path) -> bool:
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return bool(weights) and (folder / "config.json").exists()


def _is_run_dir(path: Path) -> bool:
    return path.is_dir() and not FILE_NAME.fullmatch(path.name)


def _from_hub(repo: str, revision: str | None) -> Path:
    """Download the .pt file of the highest step."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        with hub_errors(repo):
            files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or []]
            checkpoints = [name for name in files if name.endswith(".pt")]
            if checkpoints:
                # By the numbers in the names: in alphabetical order step_900 would follow step_1000.
                newest = max(checkpoints, key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [-1])
                return Path(hf_hub_download(repo, newest, revision=revision))
    except (ValueError, ConnectionError) as error:
        reason = str(error).removeprefix(f"{repo}: ")
        raise ValueError(f"no checkpoint at {repo}: no such file or folder, and {reason}") from error
    name = repo.rpartition("/")[2]
    advice = f"for a model in Hugging Face's format: python -m tools.convert_hf import {repo} {name}.pt"
    raise ValueError(f"no checkpoint at {repo}: the Hub repository of that name holds no .pt file; {advice}")


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint as a dict on the CPU, memory mapped, in the current format. Of a folder, all but its large tensors.

    All ranks call it and get the same answer. Raises ValueError that says what is wrong with the file.
    """
    checkpoint = {}
    error = None
    try:
        checkpoint = _read_folder(Path(path)) if Path(path).is_dir() else _read_file(Path(path))
    except ValueError as own_error:
        error = own_error
    errors = distributed.all_gather_object(str(error) if error else None)
    for message in errors:
        # Where one rank cannot read, none continues: the others would train from another checkpoint, or wait for it.
        if message:
            raise ValueError(message) from error
    return checkpoint


def _read_folder(path: Path) -> dict[str, Any]:
    sharded_checkpoint.verify(path)
    metadata = _read_file(path / sharded_checkpoint.METADATA)
    # Only restore reads the optimizer's tensors, each rank its own.
    return {**metadata, "optimizer": {}}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            check_zip(file)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # torch's own text would advise weights_only=False.
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain types, which could run code on loading; "
            "take a checkpoint from nano416 or from a source that publishes weights only"
        ) from error
    except Exception as error:
        # For a damaged archive zipfile and torch raise a dozen kinds.
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) {_describe_bad_file(path)}") from error
    if isinstance(checkpoint, dict) and "model_state_dict" in checkpoint:
        checkpoint = seed_checkpoint.convert(checkpoint, path)
    _check(checkpoint, path)
    return checkpoint


def read_latest(run_dir: str | Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The path and contents of the newest readable checkpoint of a run directory; None if there are no checkpoints.

    All ranks call it and get the same answer. Damaged ones are skipped with a warning. Raises ValueError if all are
    damaged.
    """
    errors = []
    # Rank 0's list: on a network file system a rank may see a file later than another.
    for step, path in distributed.all_gather_object(list_checkpoints(run_dir))[0]:
        try:
            checkpoint = read(path)
            if checkpoint["step"] != step:
                # Renamed. A run that continued from it would begin there again at every start.
                raise ValueError(f"{path} holds step {checkpoint['step']}; rename it, or move it away")
            return path, checkpoint
        except ValueError as error:
            errors.append(str(error))
            warn(visible(f"passed over: {error}"))
    if errors:
        raise ValueError(f"no readable checkpoint in {run_dir}, so the run is not started over there: {errors[0]}")
    return None


def _check(checkpoint: Any, path: Path) -> None:
    """Raise ValueError unless `checkpoint` holds what every reader relies on."""
    required = REQUIRED if path.name == sharded_checkpoint.METADATA else REQUIRED | {"model"}
    if not isinstance(checkpoint, dict) or not required <= checkpoint.keys():
        contents = sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} is not a nano416 checkpoint: it holds {contents}, which lacks some of {sorted(required)}"
        )
    for name in ("format", "step", "tokens"):
        if not _is_count(checkpoint[name]):
            raise ValueError(f"{path} is not a nano416 checkpoint: its {name} is {_describe(checkpoint[name])}")
    if checkpoint["format"] > FORMAT:
        raise ValueError(f"{path} has format {checkpoint['format']}, this version reads up to {FORMAT}; update nano416")
    config = checkpoint["config"]
    if not _is_plain_dict(config) or not all(isinstance(section, dict) for section in config.values()):
        raise ValueError(f"{path} is not a nano416 checkpoint: its config is not a dict of dicts of options")
    try:
        from_dict(ModelConfig, config["model"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} describes a model that this version does not know: {error}; update nano416"
        ) from error
    _check_tokenizer(checkpoint["tokenizer"], path)
    for part in ("model", "ema"):
        if part in checkpoint:
            _check_weights(checkpoint[part], part, path)


def _check_tokenizer(info: Any, path: Path) -> None:
    """Raise ValueError unless this is the name or the info() of a tokenizer."""
    if isinstance(info, str):
        return
    if not _is_plain_dict(info) or not isinstance(info.get("name"), str) or not isinstance(info.get("sha256", ""), str):
        raise ValueError(f"{path} is not a nano416 checkpoint: its tokenizer has no name, or an odd sha256")


def _check_weights(weights: Any, part: str, path: Path) -> None:
    """Raise ValueError unless this is a dict of dense floating-point tensors in host memory."""
    if not isinstance(weights, dict):
        raise ValueError(f"{path} is not a nano416 checkpoint: its {part} is {_describe(weights)}")
    for name, weight in weights.items():
        is_dense = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and not weight.is_nested
        if not isinstance(name, str) or not is_dense or not weight.is_floating_point() or weight.device.type != "cpu":
            raise ValueError(f"{path}: {name!r} in its {part} is {_describe(weight)}, not a dense tensor of floats")


def _is_count(value: Any) -> bool:
    """True for the integers that can count steps, tokens or sequences."""
    return type(value) is int and 0 <= value < 2**63


def _is_plain_dict(value: Any) -> bool:
    """True for a dict that JSON can express."""
    try:
        json.dumps(value)
    except (RecursionError, TypeError, ValueError):
        return False
    return isinstance(value, dict)


def _describe(value: Any) -> str:
    """A value for a message: numbers and short texts as they are, of all else the type."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} ({value.layout})".replace("torch.", "")
    return reprlib.repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"


def _describe_bad_file(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not a checkpoint; download it again"
    return "is damaged, truncated or not a checkpoint; copy or download it again, or use an older one"


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[Transformer, dict[str, Any]]:
    """The model of a checkpoint, fp32 and in eval mode, and the rest of the checkpoint, with its path as a string.

    path: a file, a run directory (its newest readable checkpoint) or a Hub repository. Raises ValueError.
    """
    newest = read_latest(path, lambda text: print(text, file=sys.stderr)) if _is_run_dir(Path(path)) else None
    if newest:
        path, checkpoint = newest
    else:
        path = resolve(path)
        checkpoint = read(path)
    model = _build_model(checkpoint, inference_weights(checkpoint, path), path)
    metadata = {key: value for key, value in checkpoint.items() if key not in ("model", "ema", "optimizer")}
    return model.to(device).eval(), {**metadata, "path": str(path)}


def load_model_and_tokenizer(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[Transformer, Tokenizer, dict[str, Any]]:
    """load_model, and the checkpoint's tokenizer. Raises ValueError if it has more tokens than the model."""
    model, metadata = load_model(path, device)
    tokenizer = load_tokenizer(metadata["tokenizer"])
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{metadata['path']}: its tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, more than its "
            f"model's {model.config.vocab_size}; take the tokenizer that the model was trained with"
        )
    return model, tokenizer, metadata


def _build_model(checkpoint: dict[str, Any], weights: Mapping[str, Tensor], path: Path) -> Transformer:
    """The model of a checkpoint, with `weights`. Raises ValueError, before anything is built, if they do not fit it."""
    config = from_dict(ModelConfig, checkpoint["config"]["model"])
    if config.vocab_size is None or config.n_layers > len(weights):
        raise ValueError(
            f"{path} does not fit the model: it describes {config.n_layers} layers and a vocabulary of "
            f"{config.vocab_size}, and holds {len(weights)} weights"
        )
    # On the meta device nothing is allocated or initialized: every weight is about to be overwritten.
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} describes a model of impossible size: {error}") from error
    check_shapes(weights, model.state_dict(), path)
    needed_gb = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) / 1e9
    if needed_gb > memory_gb(torch.device("cpu")):
        raise ValueError(
            f"{path} describes a model of {needed_gb:,.0f} GB (dim {config.dim}, seq_len {config.seq_len}); this "
            f"machine has {memory_gb(torch.device('cpu')):,.0f} GB"
        )
    model.to_empty(device="cpu")
    # Checkpoints hold no buffers, since they follow from the config.
    model.init_buffers()
    load_weights(model, weights, path)
    return model


def inference_weights(checkpoint: dict[str, Any], path: Path) -> Mapping[str, Tensor]:
    """The averaged weights if the run keeps an average (--ema), otherwise the latest ones."""
    if path.is_dir():
        return sharded_checkpoint.read_weights(path, "ema/") or sharded_checkpoint.read_weights(path, "model/")
    return checkpoint.get("ema", checkpoint["model"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy weights into a model, wrapped or not. Raises ValueError that lists missing names and wrong shapes."""
    check_shapes(weights, get_model_state_dict(model), path)
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def check_shapes(weights: Mapping[str, Any], expected: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError unless `weights` has the names and shapes of `expected`, and no others."""
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in expected]
    for name in expected:
        if name in weights and weights[name].shape != expected[name].shape:
            wrong.append(f"{name} is {list(weights[name].shape)}, the model has {list(expected[name].shape)}")
    if wrong:
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong[:4])} ({len(wrong)} differences)")


# ---- The state of a run ----------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Everything that training changes. The last three are objects with state_dict() and load_state_dict()."""

    model: nn.Module
    optimizer: Optimizer
    loader: Any
    guard: Any
    ema: Any = None  # an optimizers.EMA, or None


def restore(checkpoint: dict[str, Any], state: TrainState, path: str | Path) -> None:
    """Restore the state of a run from a checkpoint, on every rank; any number of ranks may have written it.

    The optimizer keeps this run's settings, such as weight decay. The random number generators continue if the number
    of ranks is the same. Raises ValueError if the data, the model or the optimizer differ.
    """
    _check_state(checkpoint, state, path)
    # First, because the loader refuses other data before any tensor is read.
    _load_state(state.loader, checkpoint["loader"], path)
    if Path(path).is_dir():
        # The averages of a folder are among its tensors; ema_updates tells whether it has any.
        averages = state.ema.state_dict()["ema"] if state.ema and "ema_updates" in checkpoint else {}
        tensors = sharded_checkpoint.named_tensors(state.model, state.optimizer, averages)
        sharded_checkpoint.load_into(tensors, Path(path))
        if averages:
            checkpoint = {**checkpoint, "ema": averages}
    else:
        load_weights(state.model, checkpoint["model"], path)
        _load_optimizer(checkpoint["optimizer"].get("state", {}), state, path)
    # The first files had no guard.
    _load_state(state.guard, checkpoint.get("guard", {}), path)
    if state.ema:
        state.ema.load_state_dict(checkpoint, distributed.distribute_like)
    if len(checkpoint["rng"]) == distributed.world_size():
        set_rng_state(checkpoint["rng"][distributed.rank()])


def _check_state(checkpoint: dict[str, Any], state: TrainState, path: str | Path) -> None:
    """Raise ValueError unless what a run continues from has the types and shapes of this run's."""
    for part, current in (("loader", state.loader.state_dict()), ("guard", state.guard.state_dict())):
        saved = checkpoint.get(part, {})
        if not isinstance(saved, dict):
            raise _cannot_resume(path, part, saved)
        for name, value in saved.items():
            if not _is_like(value, current.get(name)):
                raise _cannot_resume(path, f"{part}'s {name!r}", value)
    for part in ("loader", "optimizer", "rng", "metrics"):
        if part not in checkpoint:
            raise _cannot_resume(path, part, None)
    if not _is_count(checkpoint.get("ema_updates", 0)):
        raise _cannot_resume(path, "ema_updates", checkpoint["ema_updates"])
    if state.ema and "ema" in checkpoint:
        check_shapes(checkpoint["ema"], state.ema.state_dict()["ema"], path)
    metrics = checkpoint["metrics"]
    elapsed_s = metrics.get("elapsed_s", 0.0) if isinstance(metrics, dict) else math.nan
    if not isinstance(elapsed_s, int | float) or not 0 <= elapsed_s < math.inf:
        raise _cannot_resume(path, "metrics", metrics)
    if not isinstance(checkpoint["rng"], list) or not all(map(_is_rng_state, checkpoint["rng"])):
        raise _cannot_resume(path, "rng", checkpoint["rng"])
    optimizer = checkpoint["optimizer"]
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state", {}), dict):
        raise _cannot_resume(path, "optimizer", optimizer)


def _is_rng_state(saved: Any) -> bool:
    if not isinstance(saved, dict) or "cpu" not in saved:
        return False
    return all(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in saved.values())


def _load_state(target: Any, saved: dict[str, Any], path: str | Path) -> None:
    try:
        target.load_state_dict(saved)
    except KeyError as error:
        raise ValueError(f"{path} cannot be resumed: it has no {error}; start from it with --init_from") from error


def _cannot_resume(path: str | Path, part: str, value: Any) -> ValueError:
    return ValueError(
        f"{path} cannot be resumed: its {part} is {_describe(value)}, not what this version writes; "
        "start a new run from its weights with --init_from"
    )


def _is_like(saved: Any, current: Any) -> bool:
    """Whether a value has the type, and a tensor the shape, of this run's."""
    if isinstance(current, Tensor):
        return isinstance(saved, Tensor) and saved.shape == current.shape and saved.dtype == current.dtype
    return _is_count(saved) if isinstance(current, int) else type(saved) is type(current)


def _load_optimizer(saved: dict[str, dict[str, Any]], state: TrainState, path: str | Path) -> None:
    # This call creates the state of an optimizer that has none yet, so that the names of both can be compared.
    current: Any = get_optimizer_state_dict(state.model, state.optimizer)
    for name, entry in current["state"].items():
        saved_entry = saved.get(name, {})
        if not isinstance(saved_entry, dict) or saved_entry.keys() != entry.keys():
            contents = sorted(map(str, saved_entry)) if isinstance(saved_entry, dict) else _describe(saved_entry)
            raise ValueError(
                f"{path} has the state of another optimizer ({contents} for {name}, this run's has "
                f"{sorted(entry)}); resume with the --optimizer it was trained with, or start a new run from its "
                "weights with --init_from"
            )
        for key, value in entry.items():
            if not _is_like(saved_entry[key], value):
                raise _cannot_resume(path, f"optimizer's {key} of {name}", saved_entry[key])
    # Parameter groups come from this run: those in the file have the old settings and the old torch's options.
    merged: Any = {"state": saved, "param_groups": current["param_groups"]}
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(state.model, state.optimizer, merged, options=options)


def rng_state() -> dict[str, Tensor]:
    """State of this process's random number generators, on the CPU and the current GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Restore what rng_state returned, on this machine or on one without a GPU. Raises ValueError."""
    try:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint's random state is damaged: {error}; start a new run from its weights"
        ) from error


# ---- Writing ---------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes a run's checkpoints. The training loop waits only for a copy to host memory; a thread does the rest.

    warn: called with one line about a checkpoint that could not be written. keep_every: keep only the permanent
    checkpoints whose step is a multiple of it, and the newest; None keeps all.
    """

    def __init__(self, run_dir: str | Path, warn: Callable[[str], None] = print, keep_every: int | None = None):
        self.run_dir = Path(run_dir)
        self.warn = warn
        self.keep_every = keep_every
        self.failed: str | None = None  # what went wrong in the last save
        self._thread: threading.Thread | None = None
        self._buffers = HostBuffers()
        self._group: Any = None  # process group of the threads that write a folder
        self._as_folder: bool | None = None  # decided by the first save, for all ranks alike

    def save(self, step: int, state: TrainState, metadata: dict[str, Any], permanent: bool) -> Path:
        """Copy the state and start writing it, once the previous save has ended. All ranks call it.

        step: number of completed optimizer steps. metadata: tokens, config, tokenizer and metrics.
        """
        # The thread may still be reading the buffers that this save overwrites.
        self.wait()
        if distributed.rank() == 0:
            self._remove_leftovers()
        path = checkpoint_path(self.run_dir, step, permanent)
        averages = state.ema.state_dict() if state.ema else {}
        checkpoint = {
            "format": FORMAT,
            "step": step,
            **metadata,
            "loader": state.loader.state_dict(),
            "guard": state.guard.state_dict(),
            "rng": distributed.all_gather_object(rng_state()),
            **averages,
        }
        is_sharded = distributed.is_sharded(state.model)
        if is_sharded and self._writes_folder(state):
            self._save_folder(path, state, checkpoint)
            return path
        options = StateDictOptions(full_state_dict=True, cpu_offload=is_sharded)
        checkpoint["model"] = get_model_state_dict(state.model, options=options)
        checkpoint["optimizer"] = get_optimizer_state_dict(state.model, state.optimizer, options=options)
        checkpoint = distributed.full_state(checkpoint)
        if distributed.rank() == 0:
            checkpoint = self._buffers.copy(checkpoint)
            self._start(path, lambda: _write_over(path, checkpoint))
        return path

    def _writes_folder(self, state: TrainState) -> bool:
        """Whether a sharded run's state is too large for one host. The same on all ranks, for the whole run."""
        if self._as_folder is None:
            n_params = sum(p.numel() for p in state.model.parameters())
            # The hosts may differ, and each form needs all ranks: the host with the least memory decides.
            self._as_folder = bool(distributed.all_reduce_max([int(not fits_in_host_memory(n_params))])[0])
        return self._as_folder

    def _save_folder(self, path: Path, state: TrainState, checkpoint: dict[str, Any]) -> None:
        """Each rank copies its shards and writes them in the background."""
        averages = checkpoint.pop("ema", {})
        tensors = sharded_checkpoint.named_tensors(state.model, state.optimizer, averages)
        shards = sharded_checkpoint.local_shards(tensors)
        values = {name: shard.values for name, shard in shards.items()}
        copies = self._buffers.copy({"values": values, "metadata": checkpoint})
        shards = {name: replace(shard, values=copies["values"][name]) for name, shard in shards.items()}
        # Rank 0 removes what a killed process left of this folder before anybody writes to it.
        distributed.barrier()
        self._group = self._group or distributed.new_cpu_group()
        self._start(path, lambda: sharded_checkpoint.write(path, shards, copies["metadata"], self._group))

    def _start(self, path: Path, write_it: Callable[[], None]) -> None:
        # Not a daemon: when training ends, Python waits until the checkpoint is written.
        self._thread = threading.Thread(target=self._run, args=(path, write_it), name="checkpoint")
        self._thread.start()

    def _run(self, path: Path, write_it: Callable[[], None]) -> None:
        """In the thread: write, then remove what the new checkpoint replaces."""
        self.failed = None
        try:
            write_it()
            if distributed.rank() == 0:
                self._prune(path)
        except Exception as error:
            # A run of hours must survive a full disk.
            # Report the first cause: torch.save (2.13) hides "No space left on device" behind "unexpected pos 6016".
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            self.failed = f"{path} NOT written: {cause}"
            self.warn(f"{self.failed}; the checkpoints before it are intact")

    def _prune(self, newest: Path) -> None:
        for step, path in list_checkpoints(self.run_dir):
            is_temporary = path.name.startswith("temporary")
            if path != newest and (is_temporary or (self.keep_every and step % self.keep_every)):
                # Renamed first: a process that is killed here leaves no half of a folder under a checkpoint's name.
                removed = path.with_name(f".{path.name}.removed.tmp")
                os.replace(path, removed)
                remove(removed)

    def _remove_leftovers(self) -> None:
        """Remove the partial files of a process that was killed while writing."""
        for path in self.run_dir.glob(".*_step_*.tmp"):
            remove(path)

    def wait(self) -> None:
        """Wait until the last save is on the disk or has failed, which `failed` then tells."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint file atomically: after a failure the old file is still there."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def _write_over(path: Path, checkpoint: dict[str, Any]) -> None:
    """write, also where the checkpoint of this step is a folder so far."""
    if not path.is_dir():
        write(path, checkpoint)
        return
    partial = path.with_name(f".{path.name}.new.tmp")
    write(partial, checkpoint)
    move_into_place(partial, path)


def fits_in_host_memory(n_params: int) -> bool:
    """True if this host has memory for two checkpoints: the gathered state, and its copy for the thread."""
    # fp32 weights, AdamW's two moments and the averages of --ema.
    bytes_per_param = 16
    return 2 * bytes_per_param * n_params < 1e9 * free_host_memory_gb()


class HostBuffers:
    """Copies nested state into host memory, pinned for tensors of a GPU, and reuses that memory for every copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}

    def copy(self, state: Any) -> Any:
        """A copy that training no longer changes, valid until the next call."""
        copied = self._copy(state, {})
        if torch.cuda.is_available():
            # The copies from the GPU are asynchronous.
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, copies: dict[tuple, Tensor]) -> Any:
        if isinstance(value, Tensor):
            # Tensors on the CPU, such as Adam's `step`, need a copy too, which `.cpu()` would not make. A tensor that
            # occurs twice, such as tied weights, is copied once. Empty tensors all have the same address, 0.
            key = (value.data_ptr(), tuple(value.shape), value.dtype)
            if key not in copies or value.numel() == 0:
                # The n-th tensor of one save uses the memory of the n-th tensor of the save before.
                slot = (len(copies), tuple(value.shape), value.dtype)
                if slot not in self._buffers:
                    self._buffers[slot] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                copies[key] = self._buffers[slot].copy_(value.detach(), non_blocking=value.is_cuda)
            return copies[key]
        if isinstance(value, dict):
            return {key: self._copy(item, copies) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, copies) for item in value)
        assert value is None or type(value) in (bool, int, float, str), f"weights_only does not load a {type(value)}"
        return value
