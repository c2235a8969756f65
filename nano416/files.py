"""Files that are whole or absent, and folders with one writer at a time.

    with atomic_write(path) as file:                # a temporary file in the same folder, renamed to `path` at the end
        torch.save(state, file)
    with open_regular(path) as file: ...            # OSError for what never ends: a FIFO, a device
    with locked(Path("data/mine")): ...             # raises Locked if another process holds the folder

Standard library only.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file; when the block succeeds it is flushed to the device and renamed to `path`.

    A crash or an exception leaves the old file or the new one, never half of one. OSErrors name the path.
    """
    require_local("the target", path)
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


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`. What is there, such as a damaged folder, is then removed."""
    # A rename replaces no folder that has contents. With a name of CheckpointWriter's leftovers: a crash in between
    # costs what was there, and nothing keeps its space.
    aside = path.with_name(f".{path.name}.replaced.tmp")
    remove(aside)
    if os.path.lexists(path):
        os.replace(path, aside)
    os.replace(partial, path)
    sync_folder(path.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_regular(path: Path, follow_symlinks: bool = True) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError for all that is not a file: reading a FIFO would wait for ever."""
    mode = os.stat(path, follow_symlinks=follow_symlinks).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a symbolic link" if stat.S_ISLNK(mode) else "it is not a regular file")
    return open(path, "rb")


def check_zip(file: BinaryIO) -> None:
    """Raise zipfile.BadZipFile unless an archive of torch.save is intact: torch.load ignores its checksums."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        # torch.save never compresses; a small file that another program has made could unpack to any size.
        if sum(member.file_size for member in archive.infolist()) > size:
            raise zipfile.BadZipFile("it unpacks to more than its size")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged!r} does not match")


def write_text(path: str | Path, text: str) -> None:
    """Replace a small text file as a whole."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Replace a small JSON file as a whole."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def require_local(name: str, path: str | Path | None) -> None:
    """Raise ValueError for an address such as gs://bucket/runs, which would become a folder named "gs:".

    The empty path of an unset shell variable would be the current folder.
    """
    if path == "":
        raise ValueError(f"{name} is empty; name a file or folder, or leave the option out")
    if path is not None and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:/", str(path)):
        raise ValueError(f"{name} must be a path on this machine, got {path}; mount the bucket, or copy later")


def make_folder(folder: str | Path) -> None:
    """Create a folder and those above it, if it is not there. Raises ValueError for an address, OSError."""
    require_local("the folder", folder)
    Path(folder).mkdir(parents=True, exist_ok=True)


def append_text(path: str | Path, text: str) -> None:
    """Append to a file, all of the text or nothing. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        data = text.encode()
        try:
            written = os.write(handle, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            # A full disk takes the first bytes; half a line would spoil the next one.
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


class Locked(ValueError):
    """Another process writes to the folder."""


def lock(folder: str | Path) -> int:
    """Lock an existing folder for this process. Closing the returned descriptor releases it. Raises Locked.

    On a file system without locks it only warns: there nothing keeps two processes from writing to the folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        # The kernel releases the lock of a process that dies, so a crash leaves no lock file that blocks the next run.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            os.close(handle)
            raise Locked(f"another process is writing to {folder}; wait for it, or choose another folder") from error
        # ENOSYS, EOPNOTSUPP: Lustre mounted without -o flock. ENOLCK, EBADF: NFS without a lock service, or one that
        # locks only files that are open for writing.
        print(
            f"{folder} cannot be locked ({error.strerror}): its file system has no locks; start one process at a time "
            "that writes there",
            file=sys.stderr,
            flush=True,
        )
    return handle


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock inside the block. Raises Locked, or ValueError if it is not a folder."""
    try:
        make_folder(folder)
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
