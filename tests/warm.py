"""Python processes that start in no time: forks of one that has imported what the scripts import, which costs 3 to 5 s each.

A fork runs a script as `python script.py` does, with arguments, streams, working directory and session of its own. Libraries
read the environment when they are imported, so a process with other variables is started as usual.

The tests use Popen(); for benchmark.sh, stand_in() is a program that can be given to it as Python.
"""

import atexit
import ctypes
import functools
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRELOADED = "gipo_continuous graphgpo_sokoban popo_countdown gipo_vla_libero report".split()
PRELOADED += "torch._dynamo torch.utils.tensorboard matplotlib.pyplot".split()
# What no library reads at import: set by bash and pytest, and by tests. What benchmark.sh exports is in lower case.
FREE = "_ OLDPWD PWD SHLVL BASH_FUNC_run%% PYTHON PYTHONPATH PYTEST_CURRENT_TEST WARM_SERVER".split()
FREE += "FAULT GATE WANDB_MODE WANDB_DIR".split()
PR_SET_CHILD_SUBREAPER = 36  # of Linux


def fixed(environment: dict[str, str]) -> dict[str, str]:
    """The variables that libraries may read at import."""
    return {name: value for name, value in environment.items() if name not in FREE and name != name.lower()}


def ask(environment: dict, streams: list[int], **request) -> tuple[socket.socket, int]:
    """Connection to the server, and the id of the process that it has forked; 0: it cannot have this environment."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect("\0" + os.environ["WARM_SERVER"])
    request |= {"environment": dict(environment)}
    socket.send_fds(connection, [json.dumps(request).encode()], streams)
    return connection, int(connection.recv(100))


# -------------------- The server --------------------
def serve(listener: socket.socket) -> None:
    """Fork for every request, until stdin is closed."""
    import gc
    import importlib
    import select

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored after `nohup pytest`, and every fork would inherit it
    ours = fixed(os.environ)
    sys.path[0] = str(Path(__file__).parents[1])
    for name in PRELOADED:
        importlib.import_module(name)
    for path in Path(sys.path[0]).glob("*.py"):
        sys.modules.pop(path.stem, None)  # a process may have others of these names in its folder
    gc.freeze()
    while select.select([listener, sys.stdin], [], [])[0] == [listener]:
        connection, _ = listener.accept()
        request, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
        request = json.loads(request)
        if fixed(request["environment"]) != ours:
            connection.send(b"0")
        elif between := os.fork():
            if request["adopt"]:
                os.waitpid(between, 0)
        else:
            between = os.getpid()
            if pid := os.fork():
                if not request["adopt"]:
                    status = os.waitpid(pid, 0)[1]
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
                os._exit(0)
            while request["adopt"] and os.getppid() == between:
                time.sleep(0.001)  # until the process that asks is its parent
            connection.send(str(os.getpid()).encode())
            return run(request, streams)
        for stream in (*streams, connection.detach()):
            os.close(stream)


def run(request: dict, streams: list[int]) -> None:
    import runpy

    if request["new_session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 2**10)
    os.chdir(request["folder"])
    for name in FREE:
        os.environ.pop(name, None)
    os.environ |= request["environment"]
    sys.argv = request["command"]
    sys.path[:1] = [os.path.dirname(os.path.abspath(sys.argv[0])), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    runpy.run_path(sys.argv[0], run_name="__main__")


# -------------------- In the tests --------------------
@functools.cache
def start_server() -> None:
    """For this process and those that it starts, until it ends."""
    os.environ["WARM_SERVER"] = f"warm-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + os.environ["WARM_SERVER"])
    listener.listen()
    command = [sys.executable, __file__, "serve", str(listener.fileno())]
    pipes = {"pass_fds": [listener.fileno()], "stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    atexit.register(process.communicate)


class Popen(subprocess.Popen):
    """subprocess.Popen of [sys.executable, script, ...]."""

    def _execute_child(self, *values):
        given = inspect.signature(super()._execute_child).bind(*values).arguments
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        start_server()
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        how = {"command": [*map(str, given["args"][1:])], "folder": str(given["cwd"] or os.getcwd())}
        how["new_session"] = given["start_new_session"]
        connection, self.pid = ask(given["env"], streams, adopt=True, **how)
        prctl(PR_SET_CHILD_SUBREAPER, 0)
        connection.close()
        if not self.pid:
            return super()._execute_child(*values)
        self._child_created = True
        self._close_pipe_fds(*pipes)


@functools.cache
def stand_in() -> str:
    """Path of a program that takes Python's place: it waits for the fork, and has its exit code."""
    start_server()
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    program = Path(folder.name, "python")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def run_in_place(command: list[str]) -> int:
    if command[0].endswith(".py"):
        how = {"command": command, "folder": os.getcwd(), "new_session": False}
        connection, pid = ask(os.environ, [0, 1, 2], adopt=False, **how)
        if pid:
            for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, lambda signum, frame: os.kill(pid, signum))
            code = int(connection.recv(100))
            return code if code >= 0 else 128 - code
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        sys.exit(run_in_place(sys.argv[1:]))
