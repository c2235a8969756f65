"""Every way to start a run, times every way to stop it, times what it is doing at that moment: what the caller sees.

    python tests/stop_matrix.py                                   # the whole table, about 20 minutes on 2 cores
    python tests/stop_matrix.py --only=script                     # cells whose name contains the word

A cell is LAUNCHER SIGNAL PHASE. The table shows the exit code that the caller sees, the seconds until then, processes
of the run that are left at that moment and how long they stay, the last checkpoint, and what is wrong: a traceback, a
half-written file, a step that was trained and not saved, a second run.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from processes import free_port

from data_pipeline import SampleConfig, sample
from nano416 import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SRUN = """#!{python}
# Slurm's srun for machines that are one: starts the task on each, hands signals on, ends all when one fails.
import os, signal, subprocess, sys, time
command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--")):]
nodes = int(os.environ["SLURM_NNODES"])
tasks = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(n)}}) for n in range(nodes)]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
while any(task.poll() is None for task in tasks):
    time.sleep(0.1)
sys.exit(max(code if code >= 0 else 128 - code for code in [task.returncode for task in tasks]))
"""
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && echo localhost && echo localhost
[ "$1" != requeue ] || echo "$2" > "$REQUEUED"
"""

LAUNCHERS = ("python", "torchrun", "script1", "script2", "nodes", "elastic", "slurm1", "slurm2")
SIGNALS = ("TERM", "USR1", "INT", "limit", "switch", "worker", "parent", "bad")
PHASES = ("startup", "training", "saving", "evaluating")
CODES = {"TERM": 75, "USR1": 75, "INT": 130, "limit": 75, "switch": 0, "worker": 75, "parent": -9, "bad": 2}
# Where the caller sees another code. torchrun knows 0 and 1 alone; SIGUSR1 is not among the signals that it handles.
OTHER_CODES = {
    **{("torchrun", name): 1 for name in ("TERM", "INT", "limit", "worker", "bad")},
    ("torchrun", "USR1"): -signal.SIGUSR1,
    # No launcher, nobody to start it again.
    ("python", "worker"): -9,
    # The job has queued again.
    ("slurm1", "USR1"): 0,
    ("slurm2", "USR1"): 0,
}


@dataclass
class Cell:
    """One run, how it is stopped, and what was seen."""

    launcher: str
    stop: str
    phase: str
    folder: Path
    code: int | None = None
    seconds: float = 0.0
    orphan_count: int = 0
    orphan_s: float = 0.0
    saved: int = -1
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.launcher} {self.stop} {self.phase}"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def expected_code(self) -> int:
        if self.launcher in ("python", "torchrun") and self.phase == "startup" and self.stop in ("TERM", "USR1", "INT"):
            # Before the signal handlers are there, nothing is lost.
            return -getattr(signal, f"SIG{self.stop}")
        return OTHER_CODES.get((self.launcher, self.stop), CODES[self.stop])

    def log(self) -> str:
        path = self.run_dir / "train.log"
        return path.read_text() if path.exists() else ""

    def last_step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return max((row["step"] for row in rows if "loss" in row), default=0)

    def pids(self) -> list[int]:
        """Processes that train, or that launch those."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
                if f"--run_dir={self.run_dir}".encode() in words and "zombie" not in (entry / "status").read_text():
                    found.append(int(entry.name))
        return sorted(found)

    def workers(self) -> list[int]:
        """The processes that train: those that have started no other."""
        pids = self.pids()
        return [pid for pid in pids if not set(children(pid)) & set(pids)]

    def orphans(self) -> list[int]:
        """Who is left. The launcher on another machine may wait for the one that is lost."""
        several = self.launcher in ("nodes", "elastic")
        launchers = [pid for pid in self.pids() if b"nano416.launcher" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return [pid for pid in self.pids() if not (several and pid in launchers)]


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def start(cell: Cell, data: Path, items: Path) -> list[subprocess.Popen]:
    """What a user would start: one command, or one on each of two machines."""
    (cell.folder / "bin").mkdir(parents=True)
    (cell.folder / "env").mkdir()
    shutil.copy(ROOT / "requirements.txt", cell.folder / "env/.nano416-requirements.txt")
    (cell.folder / "empty.toml").write_text("")
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (cell.folder / "bin" / name).write_text(text)
        (cell.folder / "bin" / name).chmod(0o755)
    options = training_options(cell, data, items)
    env = os.environ | {"OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(cell.folder / "env"), "REQUEUED": f"{cell.folder}/q"}
    env["PATH"] = f"{cell.folder / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
    script = [str(ROOT / "launch_training.sh"), *options]
    nodes = {"NNODES": "1:2" if cell.launcher == "elastic" else "2", "MASTER_ADDR": "localhost", "NGPUS": "1"}
    nodes["MASTER_PORT"] = str(free_port())
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_SUBMIT_DIR": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    commands: dict[str, list[tuple[list[str], dict[str, str]]]] = {
        "python": [([sys.executable, "training.py", *options], {})],
        "torchrun": [([*torchrun, "training.py", *options], {})],
        "script1": [(script, {"NGPUS": "1"})],
        "script2": [(script, {"NGPUS": "2"})],
        "nodes": [(script, {**nodes, "NODE_RANK": str(n)}) for n in (0, 1)],
        "elastic": [(script, {**nodes, "NODE_RANK": str(n)}) for n in (0, 1)],
        "slurm1": [(["bash", "slurm/train.sbatch", *options], {**slurm, "NGPUS": "1"})],
        "slurm2": [(["bash", "slurm/train.sbatch", *options], {**slurm, "NGPUS": "2"})],
    }
    output = open(cell.folder / "output", "w")  # noqa: SIM115
    return [
        subprocess.Popen(command, cwd=ROOT, env=env | own, stdout=output, stderr=output)
        for command, own in commands[cell.launcher]
    ]


def training_options(cell: Cell, data: Path, items: Path) -> list[str]:
    shape = ["--dim=32", "--n_layers=2", "--n_heads=2", "--seq_len=32", "--batch_size=4", "--batch_tokens=512"]
    often = ["--log_every=1", "--eval_every=0", "--checkpoint_every=0", "--sample_tokens=0", "--max_steps=1000000"]
    paths = [f"--sources={data}", f"--run_dir={cell.run_dir}", f"--kill_switch={cell.folder / 'switch'}"]
    extra = ["--hellaswag=none", "--save_interval=1s"]
    if cell.phase == "evaluating":
        extra = [f"--hellaswag={items}", "--checkpoint_every=5"]
    if cell.stop == "limit":
        # At start-up it is over before the first step.
        extra.append("--time_limit=1s" if cell.phase == "startup" else "--time_limit=20s")
    if cell.stop == "bad":
        extra.append("--dimm=3")
    return [str(cell.folder / "empty.toml"), *shape, *often, *paths, "--dtype=fp32", "--optimizer=adamw", *extra]


def wait_until(condition: Callable[[], object], seconds: float = 100) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def reach_phase(cell: Cell) -> bool:
    """Wait until the run does what the cell is about."""
    if cell.phase == "startup":
        return wait_until(cell.workers) and not time.sleep(1)
    # Whoever is killed before the first checkpoint starts over.
    if not wait_until(lambda: cell.last_step() >= 3 and (cell.stop != "worker" or saved_step(cell))):
        return False
    if cell.phase == "saving":
        return wait_until(lambda: any(cell.run_dir.glob(".*.tmp")))
    if cell.phase == "evaluating":
        return wait_until(lambda: (cell.run_dir / "checkpoint_step_5.pt").exists()) and not time.sleep(0.5)
    return True


def measure(cell: Cell, data: Path, items: Path) -> Cell:
    """Start, stop and look."""
    callers = start(cell, data, items)
    try:
        _stop(cell, callers)
    finally:
        for pid in cell.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for caller in callers:
            caller.kill()
            caller.wait()
    return cell


def _stop(cell: Cell, callers: list[subprocess.Popen]) -> None:
    caller = callers[-1]
    if cell.stop not in ("bad", "limit") and not reach_phase(cell):
        cell.problems.append("never began")
        return
    workers = cell.workers()
    began = time.monotonic()
    if cell.stop in ("TERM", "USR1", "INT"):
        # Two machines agree from the first step on; before that, one that is lost would be waited for.
        for target in callers if cell.phase == "startup" else [caller]:
            target.send_signal(getattr(signal, f"SIG{cell.stop}"))
    elif cell.stop == "switch":
        (cell.folder / "switch").touch()
    elif cell.stop == "worker":
        os.kill(workers[-1], signal.SIGKILL)
        restarts = cell.launcher not in ("python", "torchrun")
        if restarts and wait_until(lambda: cell.log().count("resumed") and cell.last_step() > saved_step(cell) + 3):
            began = time.monotonic()
            caller.send_signal(signal.SIGTERM)
    elif cell.stop == "parent":
        # With srun between them, the process that launch_training.sh has become.
        parents = [pid for pid in cell.pids() if set(children(pid)) & set(workers)]
        os.kill(parents[-1] if cell.launcher.startswith("slurm") else caller.pid, signal.SIGKILL)
    if not wait_until(lambda: all(c.poll() is not None for c in callers) or (cell.stop == "parent" and caller.poll())):
        cell.problems.append("does not end")
        return
    cell.seconds = time.monotonic() - began
    cell.code = max((c.returncode or 0 for c in callers), key=abs) if cell.stop != "parent" else caller.returncode
    ended = time.monotonic()
    cell.orphan_count = len(cell.orphans())
    if not wait_until(lambda: not cell.orphans(), 40):
        cell.problems.append("orphans stay")
    cell.orphan_s = time.monotonic() - ended
    look(cell)


def saved_step(cell: Cell) -> int:
    return max((step for step, _ in checkpoint.list_checkpoints(cell.run_dir)), default=0)


def look(cell: Cell) -> None:
    """Collect what is wrong."""
    output = (cell.folder / "output").read_text()
    cell.saved = saved_step(cell)
    if cell.code != cell.expected_code and not (cell.stop == "parent" and cell.launcher in ("slurm1", "slurm2")):
        cell.problems.append(f"expected {cell.expected_code}")
    if cell.saved != cell.last_step() and not (cell.launcher == "python" and cell.stop in ("worker", "parent")):
        cell.problems.append(f"step {cell.last_step()} is lost")
    if list(cell.run_dir.glob(".*.tmp")) and not (cell.launcher == "python" and cell.stop in ("worker", "parent")):
        cell.problems.append("half a file")
    # torchrun shows its own; before training begins Python shows where Ctrl-C came.
    if "Traceback" in output and cell.launcher != "torchrun" and (cell.stop, cell.phase) != ("INT", "startup"):
        cell.problems.append("traceback")
    if cell.stop == "bad" and output.count("error:") != 1 and cell.launcher not in ("nodes", "elastic", "torchrun"):
        cell.problems.append(f"{output.count('error:')} errors")
    starts = output.count("parameters, ")
    if starts > (2 if cell.stop == "worker" else 1):
        cell.problems.append(f"started {starts} times")


def cells(folder: Path) -> list[Cell]:
    """All that make sense: bad options and time limits have no phase; a killed worker is not in two."""
    table = []
    for launcher in LAUNCHERS:
        for stop in SIGNALS:
            for phase in PHASES:
                if stop == "bad" and phase != "startup":
                    continue
                if stop in ("limit", "switch", "worker", "parent") and phase == "saving":
                    continue
                if stop in ("switch", "worker") and phase == "startup":
                    continue
                if launcher.startswith("slurm") and stop == "INT":
                    continue
                name = f"{launcher}-{stop}-{phase}"
                table.append(Cell(launcher, stop, phase, folder / name))
    return table


def main() -> None:
    only = [word.removeprefix("--only=") for word in sys.argv[1:]]
    folder = Path(tempfile.mkdtemp(prefix="stop-matrix-"))
    data, items = make_inputs(folder)
    print(
        f"{'launcher signal phase':<30}{'code':>5}{'s':>7}{'orphans':>9}{'for s':>7}{'saved':>8}  problems", flush=True
    )
    for cell in cells(folder):
        if all(word in cell.name for word in only):
            measure(cell, data, items)
            orphans = f"{cell.orphan_count:>9}{cell.orphan_s:>7.1f}"
            problems = ", ".join(cell.problems)
            print(
                f"{cell.name:<30}{cell.code!s:>5}{cell.seconds:>7.1f}{orphans}{cell.saved:>8}  {problems}", flush=True
            )
    print(f"outputs are in {folder}")


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A small dataset, and HellaSwag items for a minute."""
    sample(SampleConfig(out_dir=str(folder / "data")))
    item = {"activity_label": "Cooking", "ctx_a": "A man cracks an egg.", "ctx_b": "he", "label": 1}
    endings = ["flies away.", "drops it into a pan.", "sings to the hen.", "is the pan."]
    items = folder / "items.jsonl"
    items.write_text((json.dumps({**item, "endings": endings}) + "\n") * 20_000)
    return folder / "data", items


if __name__ == "__main__":
    main()
