"""What the test files share: the scripts on sys.path, the command line as a user types it, and readers of a run folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gipo_continuous", "ppo_baseline")
TINY = "--num-envs 2 --num-steps 32 --buffer-size 256 --minibatch-size 64 --hidden-size 32".split()

sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads per process would only fight over the cores


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """main() installs its handlers in this process: give Ctrl-C back to pytest afterwards."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def command_line(script: str, run_dir: Path, flags) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), "--run-dir", str(run_dir), *map(str, flags)]


def run_script(script: str, run_dir: Path, *flags, **environment) -> tuple[subprocess.CompletedProcess, Path | None]:
    """Run a script to its end: -> the finished process, and the run folder it has left if there is exactly one."""
    command = command_line(script, run_dir, flags)
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)
    folders = [path for path in run_dir.iterdir() if path.is_dir()] if run_dir.exists() else []
    return process, folders[0] if len(folders) == 1 else None


def start_script(script: str, run_dir: Path, *flags) -> subprocess.Popen:
    """Start a script in a process group of its own, with its output as one stream of lines."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command_line(script, run_dir, flags), **pipes)


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
        equal = type(a) is type(b) and a == b
    return [] if equal else [where]
