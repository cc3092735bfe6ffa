"""Scripts that start in no time: forks of a process that has imported what they import, which costs 3 to 5 s each.

A fork runs a script as `python script.py` does, in a session of its own. But the forks of one server share their hash seed,
and imports print nothing. Variables that libraries read at import cannot change: such a script is started as usual.

The tests use Popen(); for benchmark.sh, stand_in() is a program that can be given to it as Python.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import json
import multiprocessing.process
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

# What the scripts import, and what PyTorch and TensorBoard import when they are first used.
PRELOADED = "gipo_continuous graphgpo_sokoban popo_countdown gipo_vla_libero report".split()
PRELOADED += "torch._dynamo torch.utils.tensorboard matplotlib.pyplot".split()
# Set by bash, readline, pytest and tests. PYTHONPATH is run()'s own business; benchmark.sh's exports are in lower case.
NOT_READ_AT_IMPORT = "_ OLDPWD PWD SHLVL COLUMNS LINES BASH_FUNC_run%% PYTHON PYTHONPATH PYTEST_CURRENT_TEST".split()
NOT_READ_AT_IMPORT += "WARM_SERVER FAULT GATE WANDB_MODE WANDB_DIR".split()
PR_SET_CHILD_SUBREAPER = 36  # of Linux


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in NOT_READ_AT_IMPORT and name != name.lower()}


def ask_for_fork(environment: dict, streams: list[int], **request) -> tuple[socket.socket, int]:
    """Connection to the server, and the id of the fork; 0: it cannot have this environment."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(300)
    connection.connect(os.environ["WARM_SERVER"])
    socket.send_fds(connection, [json.dumps(request | {"environment": dict(environment)}).encode()], streams)
    return connection, int(connection.recv(100))


# -------------------- The server --------------------
def serve(listener: socket.socket) -> None:
    """Fork for every request, until stdin is closed."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored after `nohup pytest`, and every fork would inherit it
    ours = read_at_import(os.environ)
    sys.path[0] = str(Path(__file__).parents[1])
    for name in PRELOADED:
        importlib.import_module(name)
    for path in Path(sys.path[0]).glob("*.py"):
        sys.modules.pop(path.stem, None)  # a fork may have others of these names in its folder
    gc.freeze()
    while select.select([listener, sys.stdin], [], [])[0] == [listener]:
        connection, _ = listener.accept()
        try:
            request, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
            request = json.loads(request)
        except (OSError, ValueError):  # of a process that is gone
            connection.close()
            continue
        if read_at_import(request["environment"]) != ours:
            with contextlib.suppress(OSError):
                connection.send(b"0")
        elif intermediate := os.fork():
            if request["adopt"]:
                os.waitpid(intermediate, 0)
        else:
            # Forked twice. When the process between has ended, the kernel gives the script to pytest, a subreaper, which then
            # waits for it like for a child of its own. Or the process between waits, and sends the exit code.
            intermediate = os.getpid()
            os.close(listener.detach())
            if not (pid := os.fork()):
                while request["adopt"] and os.getppid() == intermediate:
                    time.sleep(0.001)
                return run(request, streams, connection.detach())
            if not request["adopt"]:
                wait(pid, connection)
            os._exit(0)
        for stream in (*streams, connection.detach()):
            os.close(stream)


def wait(pid: int, connection: socket.socket) -> None:
    """Send the exit code; end the script if nobody waits for it any more."""
    if connection in select.select([connection, os.pidfd_open(pid)], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(code).encode())


def run(request: dict, streams: list[int], connection: int) -> None:
    """The script, in this process."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    multiprocessing.process.ORIGINAL_DIR = request["folder"]
    for name in NOT_READ_AT_IMPORT:
        os.environ.pop(name, None)
    os.environ |= request["environment"]
    sys.argv = request["command"]
    file = os.path.abspath(sys.argv[0])
    sys.path[:1] = [os.path.dirname(file), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    sys.modules["numpy"].random.seed()
    os.write(connection, f"{os.getpid()}".encode())
    os.close(connection)
    main = types.ModuleType("__main__")
    main.__file__, sys.modules["__main__"] = file, main
    exec(compile(Path(file).read_bytes(), file, "exec"), vars(main))


# -------------------- In the tests --------------------
@functools.cache
def start_server() -> dict[str, str]:
    """Its environment; it serves this process and those that it starts, until it ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.environ["WARM_SERVER"] = f"{folder.name}/socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.environ["WARM_SERVER"])
    listener.listen()
    command = [sys.executable, __file__, "serve", str(listener.fileno())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"pass_fds": [listener.fileno()], "stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    atexit.register(process.communicate)
    return environment


class Popen(subprocess.Popen):
    """subprocess.Popen of [sys.executable, script, ...]; `forked` tells whether it is a fork."""

    def _execute_child(self, *values):
        given = inspect.signature(super()._execute_child).bind(*values).arguments
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        start_server()
        prctl = ctypes.CDLL(None).prctl
        how = {"command": [*map(str, given["args"][1:])], "folder": os.path.abspath(given["cwd"] or ".")}
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            connection, self.pid = ask_for_fork(given["env"], streams, adopt=True, **how)
        finally:
            prctl(PR_SET_CHILD_SUBREAPER, 0)
        connection.close()
        self.forked = self.pid > 0
        if not self.forked:
            return super()._execute_child(*values)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # ChildProcessError if it was not adopted
        self._child_created = True
        self._close_pipe_fds(*pipes)


@functools.cache
def stand_in() -> str:
    """Path of a program that takes Python's place: it waits for the fork, and has its exit code."""
    start_server()
    program = Path(os.environ["WARM_SERVER"]).with_name("python")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def main_of_stand_in(command: list[str]) -> int:
    if command[0].endswith(".py"):
        connection, pid = ask_for_fork(os.environ, [0, 1, 2], adopt=False, command=command, folder=os.getcwd())

        def pass_on(signum, frame):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

        if pid:
            for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, pass_on)
            connection.settimeout(None)
            code = int(connection.recv(100))
            return code if code >= 0 else 128 - code
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        sys.exit(main_of_stand_in(sys.argv[1:]))
