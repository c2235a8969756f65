"""Start a run, stay with it until it ends, start it again after a crash, and pass on how it ended.

    python -m nano416.launcher training.py configs/my.toml --dim=512        # the last line of launch_training.sh

Reads the environment variables of launch_training.sh: NGPUS processes (1), RESTARTS after a crash (3), and for several
machines NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, LOCAL_ADDR, RUN_ID. Exit codes are those of training.py
(fault_tolerance.py), or 128 + N if signal N killed it.

A signal to the launcher reaches every process of the run, which saves and ends; a second one ends what hangs. Processes
whose launcher is gone save and end by themselves. One machine needs the standard library alone; on several, torch's
elastic agent finds the others and starts all of them again when one is lost.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nano416.config import Failure, run_cli

# What another start would not change: finished, bad input, stopped early with everything saved, Ctrl-C, and the end of
# whoever reads the output (`| head`).
FINAL_CODES = (0, 2, 75, 130, 141)
# The exit code of a run that a signal ended before it had anything to save.
STOP_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
# Seconds that the agent of a machine gives the processes to save after a signal. On one machine there is no limit: who
# sends SIGTERM also knows when to send SIGKILL, and a second signal ends what hangs.
SAVING_S = 600
# Seconds for the other processes after one has failed: as torchrun, they may be writing a checkpoint.
ENDING_S = 30
# Seconds that a machine's agent waits for those of the others at the end of a run.
FAREWELL_S = 10
POLL_S = 0.1


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes to start where; see launch_training.sh."""

    processes: int = 1
    restarts: int = 3
    min_nodes: int = 1
    max_nodes: int = 1
    node_rank: int = 0
    endpoint: str = ""
    local_addr: str | None = None
    run_id: str = "nano416"


def read_environment(env: Mapping[str, str]) -> LaunchConfig:
    """The configuration that environment variables ask for. Raises ValueError naming the variable."""
    nodes = env.get("NNODES") or "1"
    match = re.fullmatch(r"(\d+)(?::(\d+))?", nodes)
    min_nodes = int(match[1]) if match else 0
    max_nodes = int(match[2] or match[1]) if match else 0
    if not 1 <= min_nodes <= max_nodes:
        raise ValueError(f"NNODES={nodes}: expected a number of machines, or MIN:MAX of them")
    # The older name of RESTARTS.
    restarts = "RESTARTS" if "RESTARTS" in env else "MAX_RESTARTS"
    single = LaunchConfig(_integer(env, "NGPUS", 1, 1), _integer(env, restarts, 3, 0))
    if max_nodes == 1:
        return single
    for name in ("NODE_RANK", "MASTER_ADDR"):
        if not env.get(name):
            raise ValueError(f"NNODES={nodes} needs {name}, see launch_training.sh")
    return replace(
        single,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        node_rank=_integer(env, "NODE_RANK", 0, 0),
        endpoint=f"{env['MASTER_ADDR']}:{_integer(env, 'MASTER_PORT', 29500, 1)}",
        local_addr=env.get("LOCAL_ADDR") or None,
        run_id=env.get("RUN_ID") or "nano416",
    )


def _integer(env: Mapping[str, str], name: str, default: int, at_least: int) -> int:
    text = env.get(name) or str(default)
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < at_least:
        raise ValueError(f"{name}={text}: expected an integer of at least {at_least}")
    return int(text)


def launch(cfg: LaunchConfig, command: list[str]) -> int:
    """Run `python command` until it ends on purpose or has crashed too often. Returns its exit code."""
    os.environ["NANO416_LAUNCHER"] = str(os.getpid())
    # The clock of --time_limit, which does not start again with a restart.
    os.environ["NANO416_START_TIME"] = str(time.monotonic())
    if cfg.processes > 1 or cfg.max_nodes > 1:
        # The cores of a machine without a GPU are shared; with one, launch_training.sh sets 1, as torchrun does.
        threads = -(-(os.cpu_count() or 1) // cfg.processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if cfg.max_nodes > 1:
        return run_agent(cfg, command)
    run = Processes()
    for number in STOP_CODES:
        signal.signal(number, run.on_signal)
    restarts = 0
    while True:
        code = run.run(command, cfg.processes)
        if run.signals:
            # Whoever had not begun to train was ended by the signal itself.
            return code if code >= 0 else STOP_CODES[run.signals[0]]
        if code in FINAL_CODES or restarts == cfg.restarts:
            return code if code >= 0 else 128 - code
        restarts += 1
        print(f"restart {restarts} of {cfg.restarts} after exit code {code}", file=sys.stderr, flush=True)


# ---- One machine -----------------------------------------------------------------------------------------------------


@dataclass
class Processes:
    """The processes of a run on this machine, and the signals that have asked it to stop."""

    children: list[subprocess.Popen] = field(default_factory=list)
    signals: list[signal.Signals] = field(default_factory=list)

    def on_signal(self, number: int, _frame: object) -> None:
        """Hand a signal on to all processes."""
        self.signals.append(signal.Signals(number))
        self.send(number)

    def send(self, number: int) -> None:
        """Send a signal to the processes that are still there."""
        for child in self.children:
            child.send_signal(number)

    def run(self, command: list[str], processes: int) -> int:
        """Start the ranks of a run and wait for all. Returns the first exit code that is not 0, -N for signal N."""
        self.children = []
        rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())} if processes > 1 else {}
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            variables = {name: str(value) for name, value in ranks.items()} if processes > 1 else {}
            env = {**os.environ, **rendezvous, **variables}
            # In a session of its own, or Ctrl-C in a terminal would reach it twice: from there and from on_signal.
            child = subprocess.Popen([sys.executable, "-u", *command], env=env, start_new_session=True)
            self.children.append(child)
        if self.signals:
            # It came before the processes that it was meant for.
            self.send(self.signals[0])
        return self._wait()

    def _wait(self) -> int:
        first_code = 0
        deadline = None
        while True:
            codes = [child.poll() for child in self.children]
            failed = [code for code in codes if code]
            if failed and not first_code:
                first_code = failed[0]
                # After an agreed stop the others are about to end, too. Otherwise they cannot continue without it.
                if first_code not in (75, 130):
                    deadline = time.monotonic() + ENDING_S
                    self.send(signal.SIGTERM)
            if None not in codes:
                return first_code
            if deadline and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


# ---- Several machines ------------------------------------------------------------------------------------------------


def run_agent(cfg: LaunchConfig, command: list[str]) -> int:
    """This machine's part of a run on several: torch's agent meets the others' agents and restarts with them.

    The agent knows no exit code but 0 for a run that is not to be started again, so the processes leave theirs in a
    file (config.final_exit_code).
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"
    # torch warns of addresses without a host name and of agents that end before this one. It reads this when imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError

    def on_signal(number: int, _frame: object) -> None:
        raise SignalException(f"signal {number}", signal.Signals(number))

    # The agent does the same, but only once its processes have started: it may wait for other machines first.
    for number in STOP_CODES:
        signal.signal(number, on_signal)
    with tempfile.TemporaryDirectory(prefix="nano416-") as folder:
        code_file = Path(folder, "exit_code")
        code_file.touch()
        os.environ["NANO416_EXIT_CODE_FILE"] = str(code_file)
        try:
            failed_with = _agent(cfg, command)
        except SignalException as stop:
            return int(code_file.read_text() or STOP_CODES.get(stop.sigval, 128 + stop.sigval))
        except RendezvousError as error:
            if code_file.read_text():
                # The first machine has ended a moment earlier.
                return int(code_file.read_text())
            raise Failure(f"no contact with the other machines through {cfg.endpoint}: {error}") from error
        if failed_with == 0:
            return int(code_file.read_text() or 0)
        return failed_with if failed_with > 0 else 128 - failed_with


def _agent(cfg: LaunchConfig, command: list[str]) -> int:
    """Run the agent to its end. Returns 0, or the first exit code when its restarts are used up."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    # The agent warns of every signal that it hands on, and shows a traceback if another machine's agent ends first.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    # The first machine keeps the list of the others and must stay alive.
    options = {"local_addr": cfg.local_addr, "is_host": cfg.node_rank == 0}
    parameters = RendezvousParameters("c10d", cfg.endpoint, cfg.run_id, cfg.min_nodes, cfg.max_nodes, **options)
    rendezvous = get_rendezvous_handler(parameters)
    spec = WorkerSpec(
        role="training",
        local_world_size=cfg.processes,
        entrypoint=sys.executable,
        args=("-u", *command),
        rdzv_handler=rendezvous,
        max_restarts=cfg.restarts,
        local_addr=cfg.local_addr,
    )
    logs = DefaultLogsSpecs(log_dir=os.devnull)
    agent = LocalElasticAgent(spec, logs, exit_barrier_timeout=FAREWELL_S, shutdown_timeout=SAVING_S)
    result: Any = agent.run()
    # Not after a signal: the other machines may continue without this one.
    rendezvous.shutdown()
    return min(result.failures.items())[1].exitcode if result.is_failed() else 0


def main() -> None:
    """Launch what the arguments name, as the environment says."""
    if len(sys.argv) < 2:
        raise ValueError("name a script to launch: python -m nano416.launcher training.py [OPTIONS]")
    cfg = read_environment(os.environ)
    download = int(os.environ.pop("NANO416_DOWNLOAD", 0))
    try:
        code = launch(cfg, sys.argv[1:])
    finally:
        if download:
            end_child(download)
    sys.exit(code)


def end_child(pid: int) -> None:
    """Send SIGTERM to a download that launch_training.sh has started, and wait until it has ended."""
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    run_cli(main)
