"""What the test files share: the scripts on sys.path, the command line as a user types it, and readers of a run folder."""

import inspect
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

try:  # before mujoco, as in the scripts
    import triton  # noqa: F401
except ImportError:
    pass

import numpy as np
import pytest
import torch
import warm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gipo_continuous", "ppo_baseline")
TIMING = {"sps", "wall_seconds", "peak_memory_mb", "git_commit"}  # of result.json; the commit may change while the tests run
TINY = "--num-envs 2 --num-steps 32 --buffer-size 256 --minibatch-size 64 --hidden-size 32".split()

# Files whose tests start scripts or the LIBERO simulator: `pytest -m "not slow"` leaves them out.
SLOW = "cli cuda graphgpo_cli graphgpo_model learning odd_environments ownership popo_cli popo_model warm wiring"
SLOW += " report resume smollm2 vla_environment vla_faults vla_learning vla_policy vla_script vla_sharded vla_wiring"
SLOW = [f"test_{name}" for name in SLOW.split()]

# The files that take minutes go first, the longest before all: else one of the two processes would wait for the other's last.
LONGEST = [
    f"test_{name}" for name in "vla_script report vla_environment resume cli ownership vla_sharded popo_cli smollm2".split()
]

# What the source of a test holds that reads the text, tables or pictures of the repository: `pytest -m pages`.
READS_PAGES = r"\bROOT\b.*(README|docs|\.md\b)|\bPAGES\b|def test_committed|\bfigures\b"

STARTED = []  # processes of start_command

sys.path.insert(0, str(ROOT))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a script's `pytest &` leaves it, and every process would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads per process would only fight over the cores


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
        if re.search(READS_PAGES, inspect.getsource(item.function)):
            item.add_marker(pytest.mark.pages)


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """The main() of some scripts leaves its handlers in this process: give Ctrl-C back to pytest afterwards."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def end_processes():
    """A test that fails must leave no process running."""
    yield
    while STARTED:
        for pid in running(STARTED.pop().pid):
            os.kill(pid, signal.SIGKILL)


def command_line(script: str, run_dir: Path, flags) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), "--run-dir", str(run_dir), *map(str, flags)]


def run_script(script: str, run_dir: Path, *flags, **environment) -> tuple[subprocess.CompletedProcess, Path | None]:
    """Run a script to its end: -> the finished process, and the run folder it has left if there is exactly one."""
    process = run_command(command_line(script, run_dir, flags), **environment)
    folders = [path for path in run_dir.iterdir() if path.is_dir()] if run_dir.exists() else []
    return process, folders[0] if len(folders) == 1 else None


def new_process(command: list, environment: dict, **how) -> subprocess.Popen:
    """A script is forked to save its imports (warm.py)."""
    forked = command[0] == sys.executable and str(command[1]).endswith(".py")
    return (warm.Popen if forked else subprocess.Popen)(command, env={**os.environ, **environment}, **how)


def run_command(command: list, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end, 10 minutes at most; keywords are variables of its environment."""
    pipe = subprocess.PIPE
    with new_process(command, environment, stdout=pipe, stderr=pipe, text=True, cwd=cwd) as process:
        try:
            output = process.communicate(timeout=600)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, *output)


def start_command(command: list[str], **environment) -> subprocess.Popen:
    """Start a command in a session of its own, with its output as one stream of lines."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a process inherits it ignored from `nohup pytest`
    STARTED.append(new_process(command, environment, **pipes))
    signal.signal(signal.SIGHUP, hangup)
    return STARTED[-1]


def start_script(script: str, run_dir: Path, *flags, **environment) -> subprocess.Popen:
    """Start a script in a session of its own, with its output as one stream of lines."""
    return start_command(command_line(script, run_dir, flags), **environment)


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    """Read the output of a process until a line has this text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"no line with {text!r} in the output:\n{''.join(lines)}")


def running(session: int) -> list[int]:
    """Ids of the live processes of a session, zombies left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(sid) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def left_running(session: int, seconds: float = 10.0) -> list[int]:
    """Processes of a session that do not end by themselves within some seconds."""
    deadline = time.monotonic() + seconds
    while running(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    return running(session)


@pytest.fixture
def inline(monkeypatch, capfd):
    """inline(script, flags) -> exit code, stdout, stderr of the file run as __main__, in this process to save the imports."""

    def run(script, flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        return code, *capfd.readouterr()

    return run


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_pt(path: Path) -> dict:
    """Every .pt file must load without unpickling code."""
    return torch.load(path, weights_only=True)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of all the event files of a run, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def differences(a, b, where: str = "") -> list[str]:
    """Where two nested structures of tensors and plain types differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i in range(len(a)) for line in differences(a[i], b[i], f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.numpy(), b.numpy()
        equal = a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    else:
        equal = type(a) is type(b) and (a == b or (a != a and b != b))  # nan equals nan
    return [] if equal else [where]


def run_differences(folder: Path, reference: Path, machine_args) -> list[str]:
    """Where two finished runs differ, apart from time and from the arguments that concern the machine."""
    a, b = ({**read_pt(path / "checkpoint.pt"), "seconds": None} for path in (folder, reference))
    if a["next_rollout"] or b["next_rollout"]:
        return ["a finished run has another rollout"]
    found = differences(a, b, "checkpoint")
    for file in ("model.pt", "best_model.pt"):
        a, b = ({**read_pt(path / file), "args": None} for path in (folder, reference))
        found += differences(a, b, file)
    a, b = (read_json(path / "result.json") for path in (folder, reference))
    for result in (a, b):
        result |= dict.fromkeys(TIMING) | {"args": result["args"] | dict.fromkeys(machine_args)}
    return found + differences(a, b, "result") + curve_differences(folder, reference)


def curve_differences(folder: Path, reference: Path) -> list[str]:
    """Where the curves of two runs differ: in their steps, or, but for times, in their values."""
    a, b = (read_scalars(path) for path in (folder, reference))
    found = [] if a.keys() == b.keys() else ["tags"]
    for tag in a.keys() & b.keys():
        if tag.startswith("eval/"):  # a run that died right after an evaluation repeats it: the same point twice
            a[tag] = sorted(set(a[tag]))
        if tag.startswith("time/") or tag == "charts/SPS":
            a[tag], b[tag] = ([step for step, _ in points] for points in (a[tag], b[tag]))
        found += [] if a[tag] == b[tag] else [tag]
    return found
