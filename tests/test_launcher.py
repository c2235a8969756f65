"""The launcher: signals, restarts, exit codes and orphans, with scripts of a few lines in the place of training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from nano416 import config, launcher

pytestmark = pytest.mark.faults

# Says that it has started, and leaves when a signal says so, with the code for it: like training.
POLITE = """
import os, signal, sys, time
def leave(number, frame):
    os.write(1, f"got {signal.Signals(number).name}\\n".encode())
    time.sleep(0.3)
    sys.exit({signal.SIGINT: 130}.get(number, 75))
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, leave)
os.write(1, f"start {os.getpid()}\\n".encode())
time.sleep(60)
"""
# Notes the first signal and hangs; the second one ends it.
HANGING = """
import signal, time
def note(number, frame):
    signal.signal(number, signal.SIG_DFL)
    print("noted", flush=True)
signal.signal(signal.SIGINT, note)
print("start", flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def launch(script: Path, *shell: str, **env: str) -> subprocess.Popen:
    """The launcher with a script; `shell`: a shell's words before it."""
    command = [*shell, sys.executable, "-m", "nano416.launcher", str(script)]
    environment = {**os.environ, "NGPUS": "1", **env}
    pipe = subprocess.PIPE
    # A process group of its own, which Ctrl-C in a terminal would reach as a whole.
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, process_group=0)


def wait_for(process: subprocess.Popen, word: str, count: int = 1) -> list[str]:
    """The next lines of a process until `count` begin with `word`; returns the rest of those."""
    assert process.stdout
    found = []
    while len(found) < count:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        if line.startswith(word):
            found.append(line.removeprefix(word).strip())
    return found


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("code", launcher.FINAL_CODES)
def test_what_ends_on_purpose_is_not_started_again(script, code, processes):
    process = launch(script(f"import sys; print('start'); sys.exit({code})"), NGPUS=processes)
    out, error = process.communicate(timeout=60)
    # The other process may be ended before it says anything.
    assert process.returncode == code and 1 <= out.count("start") <= int(processes) and not error


@pytest.mark.parametrize("name", ["RESTARTS", "MAX_RESTARTS"])
@pytest.mark.parametrize(
    "crash, said, code",
    [("sys.exit(1)", 1, 1), ("os.kill(os.getpid(), 9)", -9, 137), ("os.abort()", -6, 134), ("1 / 0", 1, 1)],
)
def test_what_crashes_is_started_again_as_often_as_restarts_says(script, crash, said, code, name):
    process = launch(script(f"import os, sys\nprint('start', flush=True)\n{crash}"), **{name: "2"})
    out, error = process.communicate(timeout=60)
    assert process.returncode == code and out.count("start") == 3
    messages = [line for line in error.splitlines() if line.startswith("restart")]
    assert messages == [f"restart {n} of 2 after exit code {said}" for n in (1, 2)]


def test_a_crash_that_does_not_come_again_is_forgotten(script, tmp_path):
    once = f"import os, sys\nif not os.path.exists({str(tmp_path / 'was')!r}):\n open({str(tmp_path / 'was')!r}, 'w')\n sys.exit(1)"
    process = launch(script(once))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == "restart 1 of 3 after exit code 1\n"


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_reaches_every_process_once(script, name, code, processes, whole_group):
    process = launch(script(POLITE), NGPUS=str(processes))
    pids = wait_for(process, "start", processes)
    (os.killpg if whole_group else os.kill)(process.pid, getattr(signal, name))
    out, error = process.communicate(timeout=60)
    assert process.returncode == code and out.count(f"got {name}") == processes and not error
    assert not any(is_alive(int(pid)) for pid in pids)


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_before_anybody_listens_ends_the_run_with_the_same_code(script, name, code):
    process = launch(
        script("import signal, time; signal.signal(2, signal.SIG_DFL); print('start', flush=True); time.sleep(60)")
    )
    wait_for(process, "start")
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == code


def test_a_second_signal_ends_what_hangs(script):
    process = launch(script(HANGING))
    wait_for(process, "start")
    process.send_signal(signal.SIGINT)
    wait_for(process, "noted")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_other_processes_end_with_the_one_that_dies(script, rank):
    text = f"import os, time\nos.write(1, b'start %d\\n' % os.getpid())\nif os.environ['RANK'] == '{rank}': time.sleep(0.5); os.abort()\ntime.sleep(60)"
    process = launch(script(text), NGPUS="3", RESTARTS="0")
    pids = wait_for(process, "start", 3)
    assert process.wait(30) == 134
    assert not any(is_alive(int(pid)) for pid in pids)


def test_who_has_lost_the_launcher_notices_in_the_next_step(script):
    text = """
import os, sys, time
from nano416.fault_tolerance import StopSignal
with StopSignal() as stop:
    print("start", os.getpid(), stop.check()[0], flush=True)
    while not stop.check()[0]:
        time.sleep(0.1)
    print("stop", stop.check()[0], flush=True)
"""
    process = launch(script(text), PYTHONPATH=str(ROOT))
    pid, reason = wait_for(process, "start")[0].split()
    assert reason == "None"
    process.kill()
    process.wait()
    assert wait_for(process, "stop") == ["the end of its launcher"]
    assert_gone(int(pid))


def test_restarts_share_the_clock_of_the_time_limit(script):
    text = "import os, sys\nprint('clock', os.environ['NANO416_START_TIME'], flush=True)\nsys.exit(1)"
    out, _ = launch(script(text)).communicate(timeout=60)
    clocks = {line.split()[1] for line in out.splitlines()}
    assert out.count("clock") == 4 and len(clocks) == 1 and abs(float(clocks.pop()) - time.monotonic()) < 60


def test_a_download_in_the_background_ends_with_the_run(script):
    code = 'sleep 300 & echo "download $!"; export NANO416_DOWNLOAD=$!; exec "$@"'
    process = launch(script("print('start')"), "bash", "-c", code, "bash")
    pid = wait_for(process, "download")[0]
    assert process.wait(30) == 0 and not is_alive(int(pid))


@pytest.mark.parametrize(
    "variable",
    [
        *("NGPUS=x", "NGPUS=0", "NGPUS=-1", "NGPUS=1.5", "NGPUS=²", "NGPUS=99999999999", "RESTARTS=x", "RESTARTS=-1"),
        *("MAX_RESTARTS=x", "NNODES=0", "NNODES=x", "NNODES=2:1", "NNODES=1:", "NNODES=0:2", "NNODES=-2"),
    ],
)
def test_variables_that_make_no_sense_are_named(variable):
    name, _, value = variable.partition("=")
    with pytest.raises(ValueError, match=name):
        launcher.read_environment({name: value})


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_several_machines_need_to_know_each_other(missing):
    env = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launcher.read_environment(env).endpoint == "a:1"
    with pytest.raises(ValueError, match=missing):
        launcher.read_environment({name: value for name, value in env.items() if name != missing})


@pytest.mark.parametrize(
    "code, allowed, used, exit_code",
    [
        *((75, None, None, 75), (75, "0", "0", 75), (2, "3", "3", 2)),  # nobody would start it again
        *((75, "3", "0", 0), (130, "3", "1", 0), (2, "3", "2", 0), (0, "3", "0", 0)),
        *((1, "3", "0", 1), (1, None, None, 1)),  # a failure is worth another try
    ],
)
def test_torchrun_is_given_no_reason_to_start_again_what_has_ended_on_purpose(
    monkeypatch, tmp_path, code, allowed, used, exit_code
):
    monkeypatch.setenv("NANO416_EXIT_CODE_FILE", str(tmp_path / "code"))
    for name, value in (("MAX_RESTARTS", allowed), ("RESTART_COUNT", used)):
        if value is None:
            monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
        else:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert config.final_exit_code(code) == exit_code
    assert (tmp_path / "code").read_text() == str(code)
