"""Processes of their own that start at once: forks of one that has imported torch, which takes a new Python seconds.

They can be killed and be ranks of a run like any other. What `python` and torchrun themselves do is tested with those,
and so are commands that start workers of their own.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import data_pipeline  # noqa: F401
import metrics
import training  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", "torch._refs", "torch._dynamo", "torch.distributed.fsdp"])


class Process:
    """`python argv` or `python -c code ...`: some of subprocess.Popen. It draws no pictures, which take a second each."""

    def __init__(self, argv: list[str], **env: str):
        with pytest.MonkeyPatch.context() as patch:  # the one to be forked, if it does not run yet, finds the project
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            multiprocessing.forkserver.ensure_running()
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        self.out.touch()
        self.process = CONTEXT.Process(
            target=become, args=(argv, {**os.environ, **env}, self.out, self.err), daemon=True
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60) -> int:
        self.process.join(timeout)
        assert self.returncode is not None, f"it still runs: {self.out.read_text()}"
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def lines(self) -> Iterator[str]:
        """What it prints, line by line, until it ends."""
        with open(self.out) as file:
            text = ""
            while True:
                ended = self.returncode is not None
                text += file.readline()
                if text.endswith("\n"):
                    yield text
                    text = ""
                elif ended:
                    return
                else:
                    time.sleep(0.001)


def become(argv: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    """In the child: be `python argv`, in the folder of the project."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.freeze()  # what the fork brought along is not searched again and again
    metrics.plot = lambda *_: None
    if argv[0] == "-c":
        sys.argv = argv[:1] + argv[2:]
        exec(compile(argv[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")


def python(*argv: str, **env: str) -> tuple[int, str, str]:
    """Run to the end: exit code, what it printed, what it complained of."""
    process = Process(list(argv), **env)
    return process.wait(), *process.communicate()


def start_ranks(processes: int, argv: list[str], nodes: int = 1) -> list[Process]:
    """As torchrun starts them; as ranks of several nodes, all on this machine."""
    each, common = processes // nodes, {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(each)}
    return [Process(argv, **common, RANK=str(n), LOCAL_RANK=str(n % each)) for n in range(processes)]


def ranks(processes: int, argv: list[str], nodes: int = 1, timeout: float = 120) -> str:
    """Run ranks to their end. Returns what they printed; a failure of one is an AssertionError of what was said."""
    started, deadline = start_ranks(processes, argv, nodes), time.monotonic() + timeout
    while any(rank.returncode is None for rank in started):
        if any(rank.returncode for rank in started) or time.monotonic() > deadline:
            for rank in started:
                rank.kill()
        time.sleep(0.005)
    said = [rank.communicate() for rank in started]
    assert not any(rank.returncode for rank in started), "\n".join(error[-3000:] for _, error in said)
    return "".join(out for out, _ in said)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
