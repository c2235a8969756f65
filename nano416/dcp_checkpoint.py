"""Checkpoint folders that version 0.1 wrote with torch.distributed.checkpoint (DCP), read without running their code.

    .metadata         DCP's index, a pickle: name, shape and place of each tensor
    __<RANK>_0.distcp the shards, each an archive of torch.save

torch itself would unpickle the index without any restriction. Here its objects become empty ones that can do nothing,
and the result is an index as sharded_checkpoint.py writes it, which that file checks. Only sharded_checkpoint.py uses
this file.
"""

import io
import pickle
import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nano416.files import check_zip

INDEX = ".metadata"
# The file that holds everything but tensors; its format is that of a checkpoint file.
METADATA = "facts.pt"
# All that torch 2.11 to 2.13 name in an index besides dtypes.
INDEX_TYPES = {
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13's name
}


def read_index(folder: Path, pickled: bytes) -> dict[str, Any]:
    """The contents of .metadata, converted to an index of ours. Raises ValueError, or any error of a damaged pickle."""
    for opcode, _, _ in pickletools.genops(pickled):
        # DCP's pickles only use MEMOIZE. These opcodes name a slot of the memo: a huge number would fill the memory.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            raise ValueError("it is not DCP's")
    index = _IndexUnpickler(io.BytesIO(pickled)).load()
    places = {}
    for key, info in index.state["storage_data"].items():
        place = {"file": info.state["relative_path"], "start": info.state["offset"], "length": info.state["length"]}
        places[key.state["fqn"], _size(key.state["offset"])] = place
    tensors = {name: _tensor(name, entry.state, places) for name, entry in index.state["state_dict_metadata"].items()}
    files = {METADATA, *(place["file"] for place in places.values())}
    # The sizes are those of the files: the index has none, and no checksums.
    parts = {file: {"length": (folder / Path(file).name).lstat().st_size} for file in sorted(files)}
    return {"tensors": tensors, "parts": parts}


def _tensor(name: str, entry: dict[str, Any], places: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """What an index of ours holds of a tensor."""
    if "properties" not in entry:
        # torch would unpickle it without any restriction.
        raise ValueError(f"{name!r} is not a tensor")
    shards = []
    for chunk in entry["chunks"]:
        offsets = _size(chunk.state["offsets"])
        shards.append({"offsets": list(offsets), "sizes": list(_size(chunk.state["sizes"])), **places[name, offsets]})
    return {"shape": list(_size(entry["size"])), "dtype": entry["properties"].state[0], "shards": shards}


def _size(size: "_Record") -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    return size.args[0]


class _Record:
    """Stands in the index for objects of any class: keeps what they were made of."""

    state: Any = None

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        if f"{module}.{name}" not in INDEX_TYPES:
            raise ValueError(f"it names {module}.{name}, which could run code")
        # The class itself is out of reach: a pickle could change it for the whole process.
        return _Record


def is_intact(file: BinaryIO, places: Iterable[tuple[int, int]]) -> bool:
    """Whether the archives at these places (start, length) of a part have the contents they were written with."""
    for start, length in places:
        file.seek(start)
        try:
            check_zip(io.BytesIO(file.read(length)))
        except Exception:
            # For a damaged archive zipfile raises a dozen kinds.
            return False
    return True


def read_shard(data: Tensor, sizes: list[int], path: Path) -> Tensor:
    """The tensor in the bytes of an archive. Raises ValueError if it holds anything else."""
    try:
        values = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises a dozen kinds. Its own text would advise weights_only=False.
        raise ValueError(f"{path} is refused: it is damaged, or could run code on loading") from error
    if type(values) is not Tensor or values.layout != torch.strided or list(values.shape) != sizes:
        raise ValueError(f"{path} is refused: it holds something else than its index says")
    return values
