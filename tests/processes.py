"""Commands of the project as processes of their own, and ranks as torchrun starts them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from conftest import ROOT


class Process(subprocess.Popen):
    """`python argv` in the folder of the project."""

    def __init__(self, argv: list[str], **env: str):
        environment = {**os.environ, **env}
        PIPE = subprocess.PIPE
        super().__init__([sys.executable, *argv], cwd=ROOT, env=environment, text=True, stdout=PIPE, stderr=PIPE)

    def lines(self) -> Iterator[str]:
        """What it prints, line by line, until it ends."""
        assert self.stdout
        # Not `yield from`, which would close the pipe together with this generator.
        for line in self.stdout:  # noqa: UP028
            yield line


def python(*argv: str, **env: str) -> tuple[int, str, str]:
    """Run to the end: exit code, stdout, stderr."""
    process = Process(list(argv), **env)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def start_ranks(processes: int, argv: list[str], nodes: int = 1) -> list[Process]:
    """The ranks of one run; nodes: as if they were on that many machines."""
    per_node = processes // nodes
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    common["LOCAL_WORLD_SIZE"] = str(per_node)
    return [Process(argv, **common, RANK=str(n), LOCAL_RANK=str(n % per_node)) for n in range(processes)]


def ranks(processes: int, argv: list[str], nodes: int = 1, timeout: float = 180) -> str:
    """Run all ranks to their end and return what they printed. If one fails the others are ended."""
    started = start_ranks(processes, argv, nodes)
    deadline = time.monotonic() + timeout
    while any(rank.poll() is None for rank in started):
        if any(rank.returncode for rank in started) or time.monotonic() > deadline:
            for rank in started:
                rank.kill()
        time.sleep(0.01)
    printed = [rank.communicate() for rank in started]
    assert not any(rank.returncode for rank in started), "\n".join(error[-3000:] for _, error in printed)
    return "".join(out for out, _ in printed)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
