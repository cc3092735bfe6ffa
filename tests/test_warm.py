"""warm.py: what a script finds as a fork is what `python script.py` finds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import warm
from conftest import differences

SCRIPT = """
import json, os, signal, sys
signals = {number: str(signal.getsignal(number)) for number in signal.valid_signals()}
found = {"argv": sys.argv, "file": __file__, "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ)}
blocked = [*signal.pthread_sigmask(signal.SIG_BLOCK, [])]
found |= {"signals": signals, "blocked": blocked, "leads_its_session": os.getsid(0) == os.getpid()}
found |= {"name": __name__, "files": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1], "stdin": sys.stdin.read()}
print(json.dumps(found))
sys.stderr.write("said")
exec(sys.argv[1])
"""


def outcome(popen, folder, end):
    """What the script found, its exit code and its stderr."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    env = {**warm.start_server(), "PYTHONPATH": str(folder), "GATE": "open"}
    with popen([sys.executable, "script.py", end], cwd=folder, text=True, env=env, **pipes) as process:
        output, error = process.communicate("asked", timeout=120)
    return json.loads(output), process.returncode, error.splitlines()[-1]


ENDS = [("", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -signal.SIGKILL)]
ENDS += [("raise KeyError('mine')", 1), ("raise OSError('mine')", 1)]


@pytest.mark.parametrize(("end", "code"), ENDS)
def test_a_fork_is_like_any_other_process(end, code, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    real, forked = (outcome(popen, tmp_path, end) for popen in (subprocess.Popen, warm.Popen))
    imported = forked[0]["environment"].keys() - real[0]["environment"].keys()  # set by libraries
    assert imported <= {"PYGAME_HIDE_SUPPORT_PROMPT", "PYOPENGL_PLATFORM", "TORCHINDUCTOR_CACHE_DIR"}
    for name in imported:
        del forked[0]["environment"][name]
    assert differences(forked[0], real[0]) == [] and real[0]["stdin"] == "asked"
    assert forked[1:] == real[1:] and real[1] == code


@pytest.mark.parametrize(("variables", "forked"), [({"FAULT": "1"}, True), ({"MUJOCO_GL": "egl"}, False)])
def test_variables_that_libraries_read_at_import_need_a_process_of_their_own(variables, forked, tmp_path):
    (tmp_path / "script.py").write_text("import os; print(os.environ['FAULT'], os.environ.get('MUJOCO_GL'))")
    env = {"FAULT": "", **warm.start_server(), **variables}
    with warm.Popen([sys.executable, tmp_path / "script.py"], env=env, stdout=subprocess.PIPE, text=True) as process:
        output = process.communicate(timeout=120)[0]
    assert process.forked == forked and output == f"{env['FAULT']} {env.get('MUJOCO_GL')}\n"


@pytest.mark.parametrize(("end", "code"), ENDS)
def test_a_program_that_takes_pythons_place(end, code, tmp_path):
    """Its exit code is a shell's: 137 after SIGKILL."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command, env = [warm.stand_in(), "script.py", end], warm.start_server()
    process = subprocess.run(command, cwd=tmp_path, env=env, input="asked", capture_output=True, text=True)
    assert process.returncode == (code if code >= 0 else 128 - code)
    found = json.loads(process.stdout)
    assert found["leads_its_session"]  # so it is a fork
    assert (found["stdin"], found["folder"], found["argv"]) == ("asked", str(tmp_path), ["script.py", end])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_to_it_reach_the_script(signum, tmp_path):
    (tmp_path / "script.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([warm.stand_in(), "script.py"], cwd=tmp_path, env=warm.start_server(), **pipes)
    pid = int(process.stdout.readline())
    start = time.monotonic()
    process.send_signal(signum)
    assert process.stdout.read() == b"" and time.monotonic() - start < 30  # at the script's end, before its minute is over
    assert process.wait(10) == (-signum if signum == signal.SIGKILL else 128 + signum)
    assert not os.path.exists(f"/proc/{pid}")
