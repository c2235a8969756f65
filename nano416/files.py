"""Files that are whole or absent, and folders with one writer at a time.

    with atomic_write(path) as file:                # a temporary file in the same folder, renamed to `path` at the end
        torch.save(state, file)
    with locked(Path("data/mine")): ...             # raises Locked if another process holds the folder

Standard library only.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file; when the block succeeds it is flushed to the device and renamed to `path`.

    A crash or an exception leaves the old file or the new one, never half of one. OSErrors name the path.
    """
    path = Path(path)
    # In the same folder, since only a rename within a file system is atomic. With the process id, so that two writers
    # never share a temporary file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            # Before the rename, or a power cut could leave the new name with no contents.
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        # The same class, which callers tell apart: PermissionError, FileNotFoundError, ...
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # After a successful rename there is nothing left to remove.
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder to the device: only then does a rename in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Replace a small text file as a whole."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Replace a small JSON file as a whole."""
    write_text(path, json.dumps(data, indent=2) + "\n")


class Locked(ValueError):
    """Another process writes to the folder."""


def lock(folder: str | Path) -> int:
    """Lock an existing folder for this process. Closing the returned descriptor releases it. Raises Locked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # The kernel releases the lock of a process that dies, so a crash leaves no lock file that blocks the next run.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise Locked(f"another process is writing to {folder}; wait for it, or choose another folder") from error
    return handle


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock inside the block. Raises Locked, or ValueError if it is not a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is not a folder; choose another one") from error
    handle = lock(folder)
    try:
        yield
    finally:
        # A command that failed early leaves no empty folder behind.
        if not os.listdir(folder):
            folder.rmdir()
        os.close(handle)
