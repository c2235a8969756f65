"""Checkpoints as folders, for sharded runs whose whole state does not fit in the memory of one host.

Every rank writes its shards with torch.distributed.checkpoint (DCP); any number of ranks reads them. A folder holds

    facts.pt          what is not a weight or optimizer tensor, as in a checkpoint file
    .metadata         DCP's index: name, shape and place of each tensor
    __<RANK>_0.distcp the tensors, named model/NAME, optimizer/NAME/STATE and ema/NAME

Only nano416/checkpoint.py uses this file.
"""

import os
import pickle
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from nano416.files import atomic_write, sync_folder

# The name that version 0.1 gave this file.
METADATA = "facts.pt"
# The classes that DCP's index may name besides dtypes, in torch 2.11 to 2.13. They only hold data, where unpickling any
# other could run code.
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


def named_tensors(model: nn.Module, optimizer: Optimizer, averages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, optimizer state and averaged weights, still sharded, by the names they have in a folder."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    tensors: dict[str, Any] = {f"model/{name}": weight for name, weight in get_model_state_dict(model).items()}
    for name, entry in state.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in entry.items()}
    return tensors | {f"ema/{name}": average for name, average in averages.items()}


def start_save(tensors: dict[str, Tensor], path: Path, group: Any) -> Future:
    """Copy this rank's shards and start writing them. When rank 0's future is done, all ranks have finished.

    group: a process group for the writing threads, whose messages must not mix with those of the training loop.
    """
    saving = async_save(tensors, checkpoint_id=_partial(path), process_group=group)
    assert isinstance(saving, Future)
    return saving


def finish_save(saving: Future, path: Path, metadata: dict[str, Any], is_main: bool) -> None:
    """Wait for start_save; then rank 0 adds the metadata and renames the folder to `path`. Raises OSError."""
    failures = {}
    try:
        saving.result()
    except CheckpointException as error:
        failures = error.failures
    # Raised outside the except block: CheckpointException has the traceback of every rank in its text, and as the
    # context of this error it would be what CheckpointWriter reports.
    if failures:
        raise OSError("; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in failures.items()))
    if is_main:
        with atomic_write(_partial(path) / METADATA) as file:
            torch.save(metadata, file)
        # Only now does it count as a checkpoint: list_checkpoints skips temporary names.
        os.replace(_partial(path), path)
        sync_folder(path.parent)


def _partial(path: Path) -> Path:
    # CheckpointWriter removes leftovers of this form.
    return path.with_name(f".{path.name}.tmp")


def load_into(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors in place, each rank its own shards. Raises ValueError if names or shapes are not the folder's."""
    index = read_index(folder)
    entries = tensor_entries(index)
    wrong = [name for name, tensor in tensors.items() if name not in entries or entries[name].size != tensor.shape]
    if wrong:
        raise ValueError(f"{folder} does not fit the model: {', '.join(wrong[:4])} differ ({len(wrong)} differences)")
    with warnings.catch_warnings():
        # Intended: each rank reads what it needs from the files, without talking to the others.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, storage_reader=_Reader(folder, index), no_dist=True)


def read_weights(folder: Path, prefix: str = "model/") -> dict[str, Tensor]:
    """All tensors whose names begin with `prefix`, unsharded and in host memory; {} if there are none."""
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in tensor_entries(read_index(folder)).items()
        if name.startswith(prefix)
    }
    if weights:
        load_into(weights, folder)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def tensor_entries(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of each tensor. Raises ValueError for other entries, which DCP would unpickle unchecked."""
    entries = {}
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name!r} in the checkpoint's index is refused: it is not a tensor")
        entries[name] = entry
    return entries


def read_index(folder: Path) -> Metadata:
    """DCP's index. Raises ValueError if it is damaged, could run code or names files outside the folder."""
    try:
        with open(folder / ".metadata", "rb") as file:
            index = _IndexUnpickler(file).load()
        for info in index.storage_data.values():
            # A path such as ../../secret would make DCP read outside the folder.
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"its index names the file {info.relative_path}")
    except Exception as error:
        # A damaged pickle raises a dozen kinds.
        raise ValueError(f"cannot read checkpoint {folder}: {getattr(error, 'strerror', None) or error}") from error
    return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and f"{module}.{name}" not in INDEX_TYPES:
            raise ValueError(f"its index names {module}.{name}, which could run code")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's reader with an index that has been checked: by itself it would unpickle the file."""

    def __init__(self, folder: Path, index: Metadata):
        super().__init__(folder)
        self.index = index

    def read_metadata(self) -> Metadata:
        """The checked index."""
        return self.index
