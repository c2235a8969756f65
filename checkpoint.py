"""The only reader and writer of run checkpoints.

    writer = checkpoint.Writer(run_dir)
    writer.save(step=..., model=raw_model, optimizer=optimizer, ...)   # all ranks call; rank 0 writes in the background
    state = checkpoint.read(path)                                      # plain dict, checked
    model, meta = checkpoint.load_model("checkpoints", "cpu")          # file, run directory or Hub id

One checkpoint is one file: `checkpoint_step_<N>.pt` is permanent, `temporary_step_<N>.pt` goes once a newer one is safe.
A file is complete whenever it exists under its name: it is written beside it, flushed to the disk and renamed. It holds
plain types and tensors only, so it loads with weights_only=True:

    format step tokens config tokenizer model optimizer loader rng metrics

Where a whole checkpoint would not fit in the memory of rank 0's host, `checkpoint_step_<N>.pt` is a folder: every rank
writes its part. It is read like a file, by any number of ranks, and `python checkpoint.py FOLDER FILE.pt` makes it one.

Checkpoints of the seed (dankit/language-model-pretraining: other names, interleaved RoPE) are converted on reading.
"""

import os
import pickle
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import distributed
from config import ArgumentParser, from_dict, run
from model import VOCAB_MULTIPLE, ModelConfig, Transformer

FORMAT = 1
FACTS = "facts.pt"  # in a folder of parts: all that is not a large tensor
NAME = re.compile(r"(checkpoint|temporary)_step_(\d+)\.pt")
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")  # user/repository, and @revision to pin it
GPT2 = {"name": "gpt2", "vocab_size": 50257, "eot_id": 50256}  # the only tokenizer the seed ever had


def path_of(run_dir: str | Path, step: int, permanent: bool = True) -> Path:
    """Where the checkpoint of `step` lies."""
    return Path(run_dir) / f"{'checkpoint' if permanent else 'temporary'}_step_{step}.pt"


def all_of(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, file) of every checkpoint in a run directory, newest first. The listing is the truth: no pointer file."""
    folder = Path(run_dir)
    found = [(int(m[2]), p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))] if folder.is_dir() else []
    return sorted(found, reverse=True)


def latest(run_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run directory, or None."""
    return next((path for _, path in all_of(run_dir)), None)


def read_latest(run_dir: str | Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; damaged ones are named and passed over. ValueError if all are damaged."""
    errors = []
    for _, path in all_of(run_dir):
        try:
            return path, read(path)
        except ValueError as error:
            errors.append(str(error))
            warn(f"passed over: {error}")
    if errors:
        raise ValueError(f"no readable checkpoint in {run_dir}, not starting over in there: {errors[0]}")
    return None


def find(path: str | Path) -> Path:
    """The checkpoint file that `path` means: a file, a run directory (its newest) or a Hub id. Raises ValueError."""
    path = Path(path)
    if path.is_dir() and not NAME.fullmatch(path.name):
        if found := latest(path):
            return found
        raise ValueError(
            f"no checkpoint_step_<N>.pt in {path}; a run writes one at its end and at each checkpoint_every"
        )
    if path.exists():
        return path
    if (hub := HUB_ID.fullmatch(str(path))) and not path.parent.exists():  # runs/typo is no repository of a user "runs"
        return _from_hub(hub[1], hub[2])
    raise ValueError(f"no checkpoint at {path}: neither a file nor a run directory")


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        listing = HfApi().model_info(repo, revision=revision).siblings or []
        names = [file.rfilename for file in listing if file.rfilename.endswith(".pt")]
        newest = max(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)] or [-1], default=None)
        if newest:
            return Path(hf_hub_download(repo, newest, revision=revision))
    except Exception as error:  # the hub client's, its HTTP library's
        status = getattr(getattr(error, "response", None), "status_code", None)
        answer = f"the Hub says {status}" if status else "the Hub cannot be reached"
        raise ValueError(f"no checkpoint at {repo}: no such file or folder, and {answer}") from error
    raise ValueError(f"no checkpoint at {repo}: the Hub repository of that name holds no .pt file")


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint file as a dict on the CPU, memory mapped, in today's format. Raises ValueError that says what is wrong."""
    path = Path(path)
    if path.is_dir():
        return _read_parts(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no CRC: a flipped bit would load without a word
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged!r} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:  # torch's own text would advise weights_only=False
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain types, which could run code on loading; "
            "take a checkpoint from nano416 or from a source that publishes weights only"
        ) from error
    except Exception as error:  # a damaged archive makes zipfile and torch raise a dozen kinds
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) {_what_is_it(path)}") from error
    if isinstance(state, dict) and "model_state_dict" in state:
        state = _from_seed(state, path)
    _check(state, path)
    return state


def _check(state: Any, path: Path) -> None:
    """Raise ValueError unless `state` holds what every reader of a checkpoint relies on."""
    wanted = {"format", "step", "tokens", "config", "tokenizer"} | ({"model"} if path.name != FACTS else set())
    if not isinstance(state, dict) or not wanted <= state.keys():
        held = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is not a nano416 checkpoint: it holds {held}, which lacks some of {sorted(wanted)}")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update nano416")
    try:
        from_dict(ModelConfig, state["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} describes a model that this version does not know: {error}; update nano416"
        ) from error


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[Transformer, dict[str, Any]]:
    """The network of a checkpoint in fp32, in eval mode, and the rest of the checkpoint (without the weights)."""
    is_run = Path(path).is_dir() and not NAME.fullmatch(Path(path).name)
    newest = read_latest(path, lambda text: print(text, file=sys.stderr)) if is_run else None
    path, state = newest or (find(path), read(find(path)))
    config = from_dict(ModelConfig, state["config"]["model"])
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.build_tables()
    weights = state.pop("model")
    load_weights(model, state.pop("ema", weights), path)  # the averaged ones, where a run keeps an average
    state.pop("optimizer", None)
    return model.to(device).eval(), {**state, "path": str(path)}


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy weights into a model (any wrapping). Raises ValueError that lists what is missing or has another shape."""
    check_shapes(weights, get_model_state_dict(model), path)
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def check_shapes(have: Mapping[str, Any], want: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError unless `have` holds the names and shapes of `want`, and no others."""
    wrong = [f"{k} is missing" for k in want if k not in have]
    wrong += [f"{k} is unknown" for k in have if k not in want]
    wrong += [
        f"{k} is {list(have[k].shape)}, the model has {list(want[k].shape)}"
        for k in want
        if k in have and have[k].shape != want[k].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong[:4])} ({len(wrong)} differences)")


class Writer:
    """Writes a run's checkpoints. The training loop waits only for a copy in host memory; a thread does the rest."""

    def __init__(self, run_dir: str | Path, warn: Callable[[str], None] = print, keep_every: int | None = None):
        self.run_dir, self.warn, self.keep_every = Path(run_dir), warn, keep_every
        self.thread: threading.Thread | None = None
        self.pool: dict[Any, Tensor] = {}  # host buffers, used again by every save
        self.failed: str | None = None

    def save(self, *, step: int, model: torch.nn.Module, optimizer: Optimizer, permanent: bool, **facts: Any) -> Path:
        """Take a copy and start writing it. `step` counts the steps that are done. A second save waits for the first."""
        self.wait()
        path = path_of(self.run_dir, step, permanent)
        if distributed.is_sharded(model) and not fits(sum(p.numel() for p in model.parameters())):
            return self._save_parts(path, model, optimizer, {"step": step, **facts})
        options = StateDictOptions(full_state_dict=True, cpu_offload=distributed.is_sharded(model))
        state = {
            "format": FORMAT,
            "step": step,
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            "rng": distributed.gather(rng_state()),
            **distributed.whole(facts),
        }
        if distributed.rank() == 0:
            state = snapshot(state, self.pool, {})
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.thread = threading.Thread(target=self._write, args=(path, state), name="checkpoint")
            self.thread.start()
        return path

    def _save_parts(self, path: Path, model: torch.nn.Module, optimizer: Optimizer, facts: dict[str, Any]) -> Path:
        """Each rank copies its part and writes it in the background; the folder gets its name when all are done."""
        partial = path.with_name(f".{path.name}.tmp")
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while writing
        distributed.barrier()
        tensors = tensors_of(model, optimizer) | {f"ema/{k}": v for k, v in facts.pop("ema", {}).items()}
        groups: Any = get_optimizer_state_dict(model, optimizer)["param_groups"]
        facts |= {"format": FORMAT, "rng": distributed.gather(rng_state()), "param_groups": groups}
        saving, facts = distributed.save_parts(tensors, partial), snapshot(facts, {}, {})
        self.thread = threading.Thread(target=self._finish, args=(saving, partial, path, facts), name="checkpoint")
        self.thread.start()
        return path

    def _finish(self, saving: Any, partial: Path, path: Path, facts: dict[str, Any]) -> None:
        self.failed = None
        try:
            saving.result()
            if distributed.rank() == 0:
                write(partial / FACTS, facts)
                os.replace(partial, path)
                sync_folder(path.parent)
                prune(self.run_dir, path, self.keep_every)
        except Exception as error:  # a run of hours must survive a full disk
            self.failed = f"{path} NOT written: {error}"
            self.warn(f"{self.failed}; the checkpoints before it are intact")

    def wait(self) -> None:
        """Until the last save is on the disk, or has failed and said so (`failed`)."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        self.failed = None
        try:
            write(path, state)
        except Exception as error:  # a run of hours must survive a full disk
            cause: BaseException = error
            while cause.__context__ is not None:  # torch hides "No space left" behind "unexpected pos 6016 vs 5910"
                cause = cause.__context__
            self.failed = f"{path} NOT written: {cause}"
            self.warn(f"{self.failed}; the checkpoints before it are intact")
        else:
            prune(self.run_dir, path, self.keep_every)


def prune(run_dir: Path, newest: Path, keep_every: int | None = None) -> None:
    """Now that `newest` is complete, remove temporary checkpoints, and permanent ones off the multiples of keep_every."""
    for step, path in all_of(run_dir):
        if path != newest and (path.name.startswith("temporary") or (keep_every and step % keep_every)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def fits(n_params: int) -> bool:
    """Can rank 0's host hold a whole checkpoint, twice (put together, then copied)? fp32 weights and AdamW's two means."""
    return 2 * 12 * n_params < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def tensors_of(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state themselves (not copies) under flat names: model/NAME, optimizer/NAME/WHAT."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    weights: Any = get_model_state_dict(model)
    tensors: dict[str, Any] = {
        f"optimizer/{name}/{key}": t for name, entry in state.items() for key, t in entry.items()
    }
    return tensors | {f"model/{name}": t for name, t in weights.items()}


class Parts(Mapping[str, Tensor]):
    """Whole tensors in a folder of parts, each read when it is asked for."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix, shapes = folder, prefix, distributed.shapes_of_parts(folder)
        self.shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name])
        distributed.load_parts({self.prefix + name: tensor}, self.folder)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _read_parts(folder: Path) -> dict[str, Any]:
    """What `read` returns, for a folder; weights and averages come from the disk when they are asked for."""
    state: dict[str, Any] = {**read(folder / FACTS), "model": Parts(folder, "model/")}
    if len(average := Parts(folder, "ema/")):
        state["ema"] = average
    entries: dict[str, dict[str, Any]] = {}
    for name in (means := Parts(folder, "optimizer/")):
        entries.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = name
    state["optimizer"] = {"parts": folder, "names": entries, "means": means}
    return state


def one_file(folder: Path, path: Path) -> None:
    """Write a folder of parts as one file, in a host's memory that holds it all."""
    if not folder.is_dir() or not NAME.fullmatch(folder.name):
        raise ValueError(f"{folder} is no folder of parts; one is named checkpoint_step_<N>.pt")
    state = read(folder)
    held = state.pop("optimizer")
    entries = {n: {k: held["means"][at] for k, at in entry.items()} for n, entry in held["names"].items()}
    state["optimizer"] = {"state": entries, "param_groups": state.pop("param_groups")}
    write(path, {name: dict(value) if isinstance(value, Parts) else value for name, value in state.items()})


def snapshot(value: Any, pool: dict[Any, Tensor], seen: dict[Any, Tensor]) -> Any:
    """A copy of nested state in host memory. Plain `.cpu()` would share CPU tensors with the run (Adam's `step`!)."""
    if isinstance(value, Tensor):
        key = (value.data_ptr(), tuple(value.shape), value.dtype)  # tied weights stay tied
        if key not in seen or value.numel() == 0:
            slot = (len(seen), tuple(value.shape), value.dtype)
            if slot not in pool:
                pool[slot] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            seen[key] = pool[slot].copy_(value.detach(), non_blocking=value.is_cuda)
        return seen[key]
    if isinstance(value, dict):
        return {k: snapshot(v, pool, seen) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(v, pool, seen) for v in value)
    assert value is None or type(value) in (bool, int, float, str), f"a {type(value)} does not load with weights_only"
    return value


def write(path: Path, state: dict[str, Any]) -> None:
    """Write beside the target, flush to the device, rename, flush the rename. Any failure leaves what was there."""
    for left_over in path.parent.glob(".*_step_*.tmp"):  # of a process that was killed while writing
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """A rename is safe once its folder is on the device."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def restore(state: dict[str, Any], model: torch.nn.Module, optimizer: Optimizer, path: str | Path) -> None:
    """Put a checkpoint's weights, optimizer state and random state into a run that continues it, on every rank."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if "parts" in state["optimizer"]:
        distributed.load_parts(tensors_of(model, optimizer), state["optimizer"]["parts"])
    else:
        load_weights(model, state["model"], path)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)  # this run's lr, betas and decay win over the file's
    ranks = state["rng"]
    if len(ranks) == distributed.world_size():
        set_rng_state(ranks[distributed.rank()])


def rng_state() -> dict[str, Tensor]:
    """Random state of this process, CPU and current GPU."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Undo of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _what_is_it(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not a checkpoint; download it again"
    return "is damaged, truncated or no checkpoint; copy or download it again, or use an older one"


# The seed's checkpoints: {"model_state_dict", "config", "step", "total_tokens", ...}, gpt2 tokenizer.
SEED_NAMES = {
    "embeddings": "embed_tokens",
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_o": "self_attn.o_proj",
    "ffn.w_gate": "mlp.gate_proj",
    "ffn.w_value": "mlp.up_proj",
    "ffn.out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _from_seed(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint of the seed in our format; ValueError if its configuration is missing."""
    old = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): value for name, value in state["model_state_dict"].items()}
    shape = state.get("config")
    known = {"embeddings.weight", "layers.0.ffn.w_gate.weight"} <= old.keys()
    if not known or not isinstance(shape, dict) or "n_heads" not in shape:
        raise ValueError(
            f"{path} looks like a checkpoint of another project: `embeddings.weight` or `n_heads` in its `config` is missing"
        )
    if not torch.equal(old.get("lm_head.weight", old["embeddings.weight"]), old["embeddings.weight"]):
        raise ValueError(f"{path} has an output head of its own; the seed's models share it with the embedding")
    vocab_size, dim = old["embeddings.weight"].shape
    config = {
        "dim": dim,
        "qk_norm": False,
        "n_layers": 1 + max(int(m[1]) for name in old if (m := re.match(r"layers\.(\d+)\.", name))),
        "n_heads": shape["n_heads"],
        "n_kv_heads": shape.get("n_kv_heads", shape["n_heads"]),
        "ffn_dim": old["layers.0.ffn.w_gate.weight"].shape[0],
        "vocab_size": vocab_size,
        "seq_len": shape.get("seq_len", 1024),
    }
    model = {}
    for name, tensor in old.items():
        if name == "lm_head.weight" or "rope" in name or "rotary" in name:  # tied; recomputed
            continue
        for theirs, ours in SEED_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _half_split(tensor, dim // config["n_heads"])
        model[name] = tensor
    padding = -vocab_size % VOCAB_MULTIPLE
    model["embed_tokens.weight"] = torch.nn.functional.pad(model["embed_tokens.weight"], (0, 0, 0, padding))
    return {
        "format": FORMAT,
        "step": state.get("step", 0),
        "tokens": state.get("total_tokens", 0),
        "config": {"model": config},
        "tokenizer": GPT2,
        "model": model,
        "metrics": {},
    }


def _half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection for RoPE on (0,1), (2,3), ... -> rows for RoPE on (0, H/2), (1, H/2 + 1), ..."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def main() -> None:
    """Command line: a folder of parts to one file."""
    parser = ArgumentParser()
    parser.add_argument(
        "folder", help="checkpoint_step_<N>.pt that is a folder, of a run that was too large for one file"
    )
    parser.add_argument("file", help="file to write, readable wherever a checkpoint is")
    args = parser.parse_args()
    one_file(Path(args.folder), Path(args.file))


if __name__ == "__main__":
    run(main)
