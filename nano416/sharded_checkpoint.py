"""Checkpoints as folders, for sharded runs whose whole state does not fit in the memory of one host.

Each rank writes its shards into one file; any number of ranks reads them. A folder holds

    facts.pt          what is not a weight or optimizer tensor, as in a checkpoint file
    rank_<RANK>.bin   the values of that rank's shards, little-endian
    index.json        shape and dtype of each tensor, the place of its shards, size and checksum of the other files

The tensors are named model/NAME, optimizer/NAME/STATE and ema/NAME. Reading maps the files into memory and copies:
nothing in a folder can run code. Folders of version 0.1 have another index: see dcp_checkpoint.py.

Only nano416/checkpoint.py uses this file.
"""

import json
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from nano416 import dcp_checkpoint, distributed
from nano416.files import atomic_write, move_into_place, open_regular, write_text

# The name that version 0.1 gave this file.
METADATA = dcp_checkpoint.METADATA
INDEX = "index.json"
FORMAT = 1
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# Shards begin at multiples of so many bytes: memory can be viewed as numbers of 8 bytes at multiples of 8 only.
ALIGNMENT = 64
# Bytes that are written or checked at a time, so that the checksum finds them in the CPU's cache.
PIECE = 2**20
# About 3 million shards.
MAX_INDEX_BYTES = 2**30


# ---- The index -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A box of a tensor, and the bytes that hold its values in row-major order."""

    offsets: list[int]  # index at which the box begins, per dimension
    sizes: list[int]
    file: str
    start: int  # first byte in the file
    length: int  # in bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a folder."""

    shape: list[int]
    dtype: torch.dtype
    shards: list[Shard]


@dataclass(frozen=True)
class Part:
    """A file of a folder."""

    length: int  # in bytes
    crc32: int | None  # None in folders of version 0.1, whose shards have a checksum each


@dataclass(frozen=True)
class Index:
    """Which tensors a folder holds, and where."""

    tensors: dict[str, StoredTensor]
    parts: dict[str, Part]


def read_index(folder: Path) -> Index:
    """The index of a folder, and nothing in it is believed. Raises ValueError for what is damaged, missing or odd."""
    is_dcp = not (folder / INDEX).exists() and (folder / dcp_checkpoint.INDEX).exists()
    name = dcp_checkpoint.INDEX if is_dcp else INDEX
    with _open_part(folder, name) as file:
        contents = file.read(MAX_INDEX_BYTES)
    try:
        stored = dcp_checkpoint.read_index(folder, contents) if is_dcp else _parse_json(contents)
        index = _check_index(stored, has_checksums=not is_dcp)
    except Exception as error:
        # A damaged JSON or pickle raises a dozen kinds.
        raise ValueError(f"cannot read checkpoint {folder}: {name} is damaged or refused: {error}") from error
    for name, part in index.parts.items():
        with _open_part(folder, name) as file:
            length = os.fstat(file.fileno()).st_size
        if length != part.length:
            raise ValueError(f"{folder / name} is damaged: it has {length:,} bytes instead of {part.length:,}")
    return index


def _open_part(folder: Path, name: str) -> BinaryIO:
    """Open a file of the folder itself: not a link, which may lead anywhere. Raises ValueError."""
    try:
        return open_regular(folder / name, follow_symlinks=False)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {folder}: {name}: {error.strerror or error}") from error


def _parse_json(contents: bytes) -> dict[str, Any]:
    index = json.loads(contents)
    if index.pop("crc32") != zlib.crc32(json.dumps(index).encode()):
        raise ValueError("its checksum does not match")
    if _count(index["format"]) > FORMAT:
        raise ValueError(f"it has format {index['format']}, this version reads up to {FORMAT}; update nano416")
    return index


def _check_index(index: dict[str, Any], has_checksums: bool) -> Index:
    """The typed form of an index. Raises ValueError, KeyError, TypeError or AttributeError if it contradicts itself."""
    parts = {}
    for name, part in index["parts"].items():
        # A path such as ../../secret would lead out of the folder.
        if Path(name).name != name or name == "..":
            raise ValueError(f"it names the file {name!r}")
        parts[name] = Part(_count(part["length"]), _count(part["crc32"]) if has_checksums else None)
    if METADATA not in parts:
        raise ValueError(f"it lacks {METADATA}")
    tensors = {name: _check_tensor(name, entry, parts) for name, entry in index["tensors"].items()}
    used = dict.fromkeys(parts, 0)
    for tensor in tensors.values():
        for shard in tensor.shards:
            used[shard.file] += shard.length
    for name, part in parts.items():
        # A small file that is read a thousand times would fill the memory.
        if used[name] > part.length:
            raise ValueError(f"shards in {name} overlap")
    return Index(tensors, parts)


def _check_tensor(name: str, entry: dict[str, Any], parts: dict[str, Part]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}")
    dtype = getattr(torch, entry["dtype"])
    shape = [_count(size) for size in entry["shape"]]
    shards = []
    for shard in entry["shards"]:
        offsets = [_count(offset) for offset in shard["offsets"]]
        sizes = [_count(size) for size in shard["sizes"]]
        start = _count(shard["start"])
        length = _count(shard["length"])
        part = parts[shard["file"]]
        is_inside = all(offset + size <= end for offset, size, end in zip(offsets, sizes, shape, strict=True))
        n_bytes = math.prod(sizes) * dtype.itemsize
        # Version 0.1 has archives, which are larger than their values.
        fits = n_bytes == length and start % dtype.itemsize == 0 if part.crc32 is not None else n_bytes <= length
        if not is_inside or not fits or start + length > part.length:
            raise ValueError(f"a shard of {name!r} does not fit into {shard['file']}")
        shards.append(Shard(offsets, sizes, shard["file"], start, length))
    if sum(math.prod(shard.sizes) for shard in shards) != math.prod(shape):
        raise ValueError(f"shards of {name!r} are missing")
    return StoredTensor(shape, dtype, shards)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("it holds something else where a size is due")
    return value


# ---- Reading ---------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> None:
    """Compare the files with their checksums, each rank its share of them. Raises ValueError that names a file."""
    index = read_index(folder)
    for name in list(index.parts)[distributed.rank() :: distributed.world_size()]:
        with _open_part(folder, name) as file:
            if index.parts[name].crc32 is None:
                shards = [shard for tensor in index.tensors.values() for shard in tensor.shards if shard.file == name]
                is_intact = dcp_checkpoint.is_intact(file, [(shard.start, shard.length) for shard in shards])
            else:
                is_intact = index.parts[name].crc32 == _checksum(file)
        if not is_intact:
            raise ValueError(f"{folder / name} is damaged: its checksum does not match; copy it again, or remove it")


def _checksum(file: BinaryIO) -> int:
    crc32 = 0
    for piece in iter(lambda: file.read(PIECE), b""):
        crc32 = zlib.crc32(piece, crc32)
    return crc32


def read_weights(folder: Path, prefix: str = "model/") -> dict[str, Tensor]:
    """All tensors whose names begin with `prefix`, unsharded and in host memory; {} if there are none."""
    stored = read_index(folder).tensors
    weights = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }
    load_into(weights, folder)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


@torch.no_grad()
def load_into(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors in place, each rank its own shards. Raises ValueError if names or shapes are not the folder's."""
    index = read_index(folder)
    wrong = [name for name, tensor in tensors.items() if not _matches(index.tensors.get(name), tensor)]
    if wrong:
        raise ValueError(f"{folder} does not fit the model: {', '.join(wrong[:4])} differ ({len(wrong)} differences)")
    # Mapped, a part costs no memory, and only the pages that this rank needs are read.
    parts = {
        name: torch.from_file(str(folder / name), shared=False, size=part.length, dtype=torch.uint8)
        for name, part in index.parts.items()
        if part.length
    }
    for name, tensor in tensors.items():
        local, offsets = distributed.local_shard(tensor)
        stored = index.tensors[name]
        for shard in stored.shards:
            overlap = _overlap(offsets, list(local.shape), shard)
            if overlap is None:
                continue
            data = parts[shard.file][shard.start : shard.start + shard.length]
            if index.parts[shard.file].crc32 is None:
                values = dcp_checkpoint.read_shard(data, shard.sizes, folder / shard.file)
            else:
                values = data.view(stored.dtype).view(shard.sizes)
            here, there = overlap
            local[here].copy_(values[there])


def _matches(stored: StoredTensor | None, tensor: Tensor) -> bool:
    if stored is None or stored.shape != list(tensor.shape):
        return False
    return stored.dtype.is_floating_point == tensor.is_floating_point()


def _overlap(offsets: list[int], sizes: list[int], shard: Shard) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a box of a tensor and a stored shard of it meet, as slices of the one and of the other; None: nowhere."""
    here = []
    there = []
    for offset, size, other_offset, other_size in zip(offsets, sizes, shard.offsets, shard.sizes):
        start = max(offset, other_offset)
        stop = min(offset + size, other_offset + other_size)
        if start >= stop:
            return None
        here.append(slice(start - offset, stop - offset))
        there.append(slice(start - other_offset, stop - other_offset))
    return tuple(here), tuple(there)


# ---- Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalShard:
    """The box of a tensor that this rank writes."""

    shape: list[int]  # of the whole tensor
    offsets: list[int]
    values: Tensor


def named_tensors(model: nn.Module, optimizer: Optimizer, averages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, optimizer state and averaged weights, still sharded, by the names they have in a folder."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    tensors: dict[str, Any] = {f"model/{name}": weight for name, weight in get_model_state_dict(model).items()}
    for name, entry in state.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in entry.items()}
    return tensors | {f"ema/{name}": average for name, average in averages.items()}


def local_shards(tensors: dict[str, Tensor]) -> dict[str, LocalShard]:
    """What this rank writes of the tensors, sharing their memory. All ranks call it, and write each value once."""
    shards = {}
    for name, tensor in tensors.items():
        values, offsets = distributed.local_shard(tensor)
        shards[name] = LocalShard(list(tensor.shape), offsets, values)
    # Several ranks may hold a shard: replicas, and tensor-parallel neighbours of what they do not divide.
    boxes = [shard.offsets if shard.values.numel() else None for shard in shards.values()]
    boxes_of_ranks = distributed.all_gather_object(boxes)
    mine = {}
    for number, (name, shard) in enumerate(shards.items()):
        holders = [rank for rank, boxes in enumerate(boxes_of_ranks) if boxes[number] == shard.offsets]
        # By turns, so that each of them writes an equal part.
        if holders and holders[number % len(holders)] == distributed.rank():
            mine[name] = shard
    return mine


def write(path: Path, shards: dict[str, LocalShard], metadata: dict[str, Any], group: Any) -> None:
    """Write a folder; all ranks call it, in a thread. Raises OSError on all of them if one cannot write its part.

    group: a process group for these threads, whose messages must not mix with those of the training loop.
    """
    # CheckpointWriter removes leftovers of this form.
    partial = path.with_name(f".{path.name}.tmp")
    part: Any = None
    failure = None
    try:
        partial.mkdir(exist_ok=True)
        part = _write_part(partial / f"rank_{distributed.rank()}.bin", shards)
    except Exception as error:
        # Of any kind: the other ranks wait for this one's answer.
        failure = f"rank {distributed.rank()}: {error}"
    answers = distributed.all_gather_object((part, failure), group)
    failures = [failure for _, failure in answers if failure]
    if distributed.rank() == 0:
        if failures:
            # Its space may be what the next checkpoint needs. What cannot be removed, CheckpointWriter tries again.
            shutil.rmtree(partial, ignore_errors=True)
        else:
            _finish(partial, path, metadata, [part for part, _ in answers])
    if failures:
        raise OSError("; ".join(failures))


def _write_part(path: Path, shards: dict[str, LocalShard]) -> dict[str, Any]:
    """Write this rank's shards one after the other. Returns what the index says of them."""
    tensors = {}
    crc32 = 0
    position = 0
    with open(path, "wb") as file:
        for name, shard in shards.items():
            data = shard.values.flatten().view(torch.uint8).numpy()
            padding = bytes(-len(data) % ALIGNMENT)
            for piece in [*(data[start : start + PIECE] for start in range(0, len(data), PIECE)), padding]:
                file.write(piece)
                crc32 = zlib.crc32(piece, crc32)
            place = {"offsets": shard.offsets, "sizes": list(shard.values.shape), "file": path.name}
            tensors[name] = {
                "shape": shard.shape,
                "dtype": str(shard.values.dtype).removeprefix("torch."),
                "shards": [{**place, "start": position, "length": len(data)}],
            }
            position += len(data) + len(padding)
        file.flush()
        os.fsync(file.fileno())
    return {"tensors": tensors, "parts": {path.name: {"length": position, "crc32": crc32}}}


def _finish(partial: Path, path: Path, metadata: dict[str, Any], written: list[dict[str, Any]]) -> None:
    """On rank 0, when all parts are on the disk: add the metadata and the index and rename the folder."""
    with atomic_write(partial / METADATA) as file:
        torch.save(metadata, file)
    with open(partial / METADATA, "rb") as file:
        facts = {"length": os.fstat(file.fileno()).st_size, "crc32": _checksum(file)}
    index: dict[str, Any] = {"format": FORMAT, "parts": {METADATA: facts}, "tensors": {}}
    for part in written:
        index["parts"] |= part["parts"]
        for name, tensor in part["tensors"].items():
            if name in index["tensors"]:
                index["tensors"][name]["shards"] += tensor["shards"]
            else:
                index["tensors"][name] = tensor
    index["crc32"] = zlib.crc32(json.dumps(index).encode())
    write_text(partial / INDEX, json.dumps(index))
    # Only now does it count as a checkpoint: list_checkpoints skips temporary names.
    move_into_place(partial, path)
