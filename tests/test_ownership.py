"""Who owns a run folder, a process, a signal: starts of one name, live and killed runs, resume by folder, main() in code."""

import dataclasses
import importlib
import importlib.machinery
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import (
    ROOT,
    SCRIPTS,
    command_line,
    left_running,
    read_json,
    read_pt,
    running,
    start_command,
    start_script,
    wait_for_line,
)

SMALL = (
    "--num-envs 2 --num-steps 32 --buffer-size 128 --minibatch-size 64 --hidden-size 16 --num-bins 8 --updates-per-iteration 2"
)
FLAGS = [
    "--env-id",
    "Pendulum-v1",
    *SMALL.split(),
    "--total-timesteps",
    "640",
    "--eval-episodes",
    "0",
    "--checkpoint-every",
    "64",
]
GATE = ["--env-id", "their_tasks:Gate-v0", *FLAGS[2:]]
MODES = {"process": [], "turns": ["--no-overlap"], "async": ["--async-envs"], "async-turns": ["--async-envs", "--no-overlap"]}
ALL_SCRIPTS = pytest.mark.parametrize("script", SCRIPTS)
# Where a run takes seconds, and nothing that the two scripts do differently (test_diff.py) takes part.
ONE_SCRIPT = pytest.mark.parametrize("script", SCRIPTS[:1])
TASKS = '''"""Tasks of a user."""
import os
import time

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv


class Slow(PendulumEnv):  # a simulator that loads its assets, and makes $GATE-reached before
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        open(os.environ["GATE"] + "-reached", "w").close()
        time.sleep(2.0)


class Gate(PendulumEnv):  # stands still from its 100th step on while the file $GATE exists, and makes $GATE-reached
    steps = 0

    def step(self, action):
        self.steps += 1
        while self.steps >= 100 and os.path.exists(os.environ.get("GATE", "")):
            open(os.environ["GATE"] + "-reached", "w").close()
            time.sleep(0.01)
        return super().step(action)


class OfTwoArguments(Exception):  # pickle cannot rebuild it
    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


class Faulty(PendulumEnv):  # raises at its 150th step if $FAULT says what
    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 150 and os.environ.get("FAULT"):
            raise {"simple": KeyError("my own fault"), "odd": OfTwoArguments("my own fault", 150)}[os.environ["FAULT"]]
        return super().step(action)


for task in (Slow, Gate, Faulty):
    gym.register(f"{task.__name__}-v0", task, max_episode_steps=50)
'''
FAULTY_LINE = next(i + 1 for i, line in enumerate(TASKS.splitlines()) if "raise {" in line)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The user's module on the path of this and of new processes; -> a file that keeps the gate shut while it exists."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "their_tasks.py").write_text(TASKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tasks"))
    monkeypatch.syspath_prepend(str(tmp_path / "tasks"))
    monkeypatch.delitem(sys.modules, "their_tasks", raising=False)
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    gate.touch()
    return gate


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """crashed(script) -> the folder of a run that died at its sixth checkpoint, with gamma 0.9."""
    done = {}

    def run(script):
        if script not in done:
            module, calls = importlib.import_module(script), []
            original = module.save_checkpoint

            def crash(path, state):
                calls.append(path)
                if len(calls) == 6:
                    raise RuntimeError("crash")
                original(path, state)

            run_dir = tmp_path_factory.mktemp("crashed")
            with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
                patch.setattr(module, "save_checkpoint", crash)
                module.main(module.parse_args([*FLAGS, "--gamma", "0.9", "--run-dir", str(run_dir)]))
            (done[script],) = run_dir.iterdir()
        return done[script]

    return run


@pytest.fixture
def unfinished(crashed, tmp_path):
    """unfinished(script) -> a copy of the crashed run, in a folder of another name."""

    def copy(script):
        return shutil.copytree(crashed(script), tmp_path / "elsewhere" / "renamed")

    return copy


def wait_for_gate(gate: Path) -> None:
    """Until an environment stands still there."""
    while not gate.with_name(f"{gate.name}-reached").exists():
        time.sleep(0.01)


def only_folder(run_dir: Path) -> Path:
    (folder,) = run_dir.iterdir()
    return folder


def assert_sentence(code, error, *words):
    """Exit code 2 and one sentence with these words."""
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def assert_finished(folder, steps=640):
    assert read_json(folder / "result.json")["total_timesteps"] == steps


def code_args(script, run_dir, flags=()):
    module = importlib.import_module(script)
    return module, module.parse_args([*FLAGS, "--run-dir", str(run_dir), *flags])


# -------------------- One owner per folder --------------------
@ONE_SCRIPT
def test_two_starts_of_one_name_at_once(script, tasks, tmp_path):
    """Both build their environments before either writes: one run, whole, and one sentence."""
    flags = ["--env-id", "their_tasks:Slow-v0", *FLAGS[2:], "--num-envs", "1", "--minibatch-size", "32"]
    processes = [start_script(script, tmp_path / "runs", *flags, "--gamma", gamma) for gamma in (0.9, 0.5)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], outputs
    refusal = outputs[codes.index(2)]
    assert refusal.startswith("error: ") and refusal.count("\n") == 1
    assert "is in use by a run that goes on" in refusal or "exists: --resume continues it" in refusal
    folder = only_folder(tmp_path / "runs")
    assert_finished(folder)
    assert len([*folder.glob("events*")]) == 1
    for file in ("args.json", "result.json"):
        args = read_json(folder / file)
        assert args.get("args", args)["gamma"] == (0.9, 0.5)[codes.index(0)]


@ALL_SCRIPTS
def test_a_run_that_came_between(script, tmp_path, monkeypatch):
    """Another start of this name has begun and ended while this one built its environments."""
    module, args = code_args(script, tmp_path)
    original = module.lock_folder

    def come_between(run_folder):
        run_folder.mkdir()
        (run_folder / "result.json").write_text("theirs")
        return original(run_folder)

    monkeypatch.setattr(module, "lock_folder", come_between)
    with pytest.raises(module.ArgumentError, match="exists: --resume continues it"):
        module.main(args)
    assert (only_folder(tmp_path) / "result.json").read_text() == "theirs"
    assert {path.name for path in only_folder(tmp_path).iterdir()} == {".lock", "result.json"}


@ONE_SCRIPT
def test_a_live_run_is_left_alone(script, tasks, tmp_path, inline):
    process = start_script(script, tmp_path / "runs", *GATE)
    wait_for_line(process, "from step")
    folder = only_folder(tmp_path / "runs")
    before = (folder / "args.json").read_bytes()
    other = [*GATE, "--run-dir", tmp_path / "runs"]
    assert_sentence(*inline(script, other)[::2], f"{folder} exists: --resume continues it")
    assert_sentence(
        *inline(script, [*other, "--overwrite", "--gamma", "0.5"])[::2], f"{folder} is in use by a run that goes on"
    )
    assert_sentence(*inline(script, [*other, "--resume"])[::2], f"{folder} is in use by a run that goes on")
    assert_sentence(*inline(script, ["--resume", folder])[::2], f"{folder} is in use by a run that goes on")
    tasks.unlink()
    assert process.communicate(timeout=120)[0].splitlines()[-2] == f"files:  {folder}" and process.returncode == 0
    assert (folder / "args.json").read_bytes() == before and len([*folder.glob("events*")]) == 1
    assert_finished(folder)


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_can_be_resumed_at_once(mode, tasks, tmp_path, inline, monkeypatch):
    """kill -9 of the main process alone, while the environments stand still: they end, and they hold no lock."""
    process = start_script("gipo_continuous", tmp_path / "runs", *GATE, *MODES[mode])
    wait_for_line(process, "from step")
    folder = only_folder(tmp_path / "runs")
    wait_for_gate(tasks)
    assert len(running(process.pid)) == {"process": 2, "turns": 1, "async": 4, "async-turns": 3}[mode]
    process.kill()
    process.wait()
    monkeypatch.delenv("GATE")  # it stays shut for the killed run
    code, _, error = inline("gipo_continuous", ["--resume", folder])
    assert code == 0, error
    assert left_running(process.pid, seconds=1.0) == []
    assert_finished(folder)


@pytest.mark.parametrize(
    ("mode", "signum"), [*((mode, signal.SIGINT) for mode in MODES), ("process", signal.SIGTERM), ("async", signal.SIGTERM)]
)
def test_a_signal_while_the_environments_are_built(mode, signum, tasks, tmp_path):
    """To all of it, as from a terminal: nothing is written, said at length, or left running."""
    flags = ["--env-id", "their_tasks:Slow-v0", *FLAGS[2:], *MODES[mode]]
    process = start_script("gipo_continuous", tmp_path / "runs", *flags)
    wait_for_gate(tasks)
    os.killpg(process.pid, signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if signum == signal.SIGINT else -signum) and left_running(process.pid) == []
    assert "Traceback" not in output and not (tmp_path / "runs").exists(), output


@ALL_SCRIPTS
def test_nothing_is_written_before_all_cheap_failures_were_tried(script, tmp_path, inline, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    runs, file = tmp_path / "runs", tmp_path / "file"
    runs.mkdir()
    file.touch()
    for flags, named in (
        (["--seed", 4294967296], "--seed"),
        (["--buffer-size", 4 * 10**12], "--buffer-size"),
        (["--buffer-size", 4 * 10**11], "--buffer-size"),
        (["--exp-name", "a/b"], "--exp-name"),
        (["--exp-name", "x" * 300], "--exp-name"),
        (["--init-log-std", "nan", "--policy-head", "gaussian"], "--init-log-std"),
        (["--env-kwargs", '{"nothing": 1}'], "--env-kwargs"),
        (["--capture-video", "--env-id", "InvertedPendulum-v5"], "--capture-video"),
        (["--run-dir", file], "--run-dir"),
        (["--run-dir", file / "sub"], "--run-dir"),
    ):
        code, output, error = inline(script, [*FLAGS, "--run-dir", runs, *flags])
        assert_sentence(code, error, named)
        assert output == "" and not any(path.name != ".lock" for folder in runs.iterdir() for path in folder.iterdir()), flags
    assert file.read_bytes() == b""
    assert inline(script, [*FLAGS, "--run-dir", runs])[0] == 0  # the corrected command is not refused


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path, inline):
    tmp_path.chmod(0o500)
    assert_sentence(
        *inline("gipo_continuous", [*FLAGS, "--run-dir", tmp_path / "runs"])[::2], "--run-dir", "Permission denied"
    )


@ALL_SCRIPTS
def test_symbolic_links(script, tmp_path, inline):
    """The run folder may be a link to scratch, what lies in it too; what links point to is no run's to delete."""
    name = f"Pendulum-v1__{'gipo' if script == 'gipo_continuous' else 'ppo'}__1"
    scratch, precious, runs = tmp_path / "scratch", tmp_path / "precious", tmp_path / "runs"
    for folder in (scratch, precious, runs):
        folder.mkdir()
    (precious / "mine").touch()
    (scratch / "old").touch()
    (scratch / "old folder").mkdir()
    (scratch / "link").symlink_to(precious)
    (runs / name).symlink_to(scratch)
    flags = [*FLAGS, "--run-dir", runs]
    assert_sentence(*inline(script, flags)[::2], "exists: --resume continues it")
    code, _, error = inline(script, [*flags, "--overwrite"])
    assert code == 0, error
    assert_finished(scratch)
    assert (runs / name).is_symlink() and (precious / "mine").exists()
    assert not {path.name for path in scratch.iterdir()} & {"old", "old folder", "link"}
    shutil.rmtree(scratch)
    for more in ([], ["--overwrite"]):  # the link leads nowhere
        assert_sentence(*inline(script, [*flags, *more])[::2], "--run-dir", name)
    assert not scratch.exists()


# -------------------- Resume by folder --------------------
@ALL_SCRIPTS
@pytest.mark.parametrize("how", ["absolute", "relative", "with a slash", "from inside"])
def test_resume_needs_the_folder_alone(script, how, unfinished, tmp_path, inline, monkeypatch):
    """Wherever one stands, wherever it was moved, whatever it was renamed to."""
    folder = unfinished(script)
    monkeypatch.chdir(folder if how == "from inside" else tmp_path)
    path = {"absolute": folder, "relative": "elsewhere/renamed", "with a slash": "elsewhere/renamed/", "from inside": "."}[how]
    code, output, error = inline(script, ["--resume", path])
    assert code == 0 and ", from step 320" in output, error
    assert_finished(folder)
    assert read_json(folder / "result.json")["args"]["gamma"] == 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"] and only_folder(folder.parent) == folder


@ALL_SCRIPTS
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no folder", "there is no"),
        ("no args.json", "args.json is missing or damaged"),
        ("", "args.json is missing or damaged"),
        ('{"env_id": "Pend', "args.json is missing or damaged"),
        ("[]", "args.json is missing or damaged"),
        ("null", "args.json is missing or damaged"),
        ("{}", "args.json is missing or damaged"),
        ("\x00\x01", "args.json is missing or damaged"),
        ({"temperature": 1.0}, "is another script's or version's run"),
        ({"algorithm_version": 1}, "is of version 1, not 2"),
        ({"algorithm_version": None}, "is of version None, not 2"),
        ("the other script", ".py: continue it with that file"),
        ({"script": "mine.py"}, "is a run of mine.py: continue it with that file"),
    ],
    ids=str,
)
def test_a_folder_that_cannot_be_resumed(script, damage, words, unfinished, crashed, tmp_path, inline):
    folder = unfinished(script)
    file = folder / "args.json"
    if damage == "no folder":
        shutil.rmtree(folder)
    elif damage == "no args.json":
        file.unlink()
    elif damage == "the other script":
        folder = crashed(next(other for other in SCRIPTS if other != script))
    else:
        file.write_text(damage if isinstance(damage, str) else json.dumps(read_json(file) | damage))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    code, output, error = inline(script, ["--resume", folder])
    assert_sentence(code, error, "--resume", words, str(folder))
    assert output == "" and {path: path.stat().st_mtime_ns for path in folder.glob("*")} == before


@ALL_SCRIPTS
def test_what_concerns_the_machine_may_change(script, unfinished, inline):
    """A run begun with --cuda on another machine."""
    folder = unfinished(script)
    args = read_json(folder / "args.json") | {"cuda": True, "async_envs": True, "torch_threads": 2, "track": True}
    (folder / "args.json").write_text(json.dumps(args))
    more = "--no-cuda --no-async-envs --torch-threads 1 --no-track --no-overlap --checkpoint-every 128".split()
    if not torch.cuda.is_available():
        assert_sentence(*inline(script, ["--resume", folder, *more[1:]])[::2], "--cuda: PyTorch sees no GPU")
    code, _, error = inline(script, ["--resume", folder, *more])
    assert code == 0, error
    now = read_json(folder / "args.json")
    assert [now[key] for key in ("cuda", "async_envs", "torch_threads", "overlap", "checkpoint_every")] == [
        False,
        False,
        1,
        False,
        128,
    ]
    assert_finished(folder)


@ALL_SCRIPTS
def test_what_decides_the_results_may_not_change(script, unfinished, inline):
    """Every other argument, in code; a few on the command line, one with its default value."""
    module, folder = importlib.import_module(script), unfinished(script)
    saved, _ = module.saved_run(module.Args(resume=str(folder)))
    names = sorted({field.name for field in dataclasses.fields(saved)} - set(module.MACHINE_ARGS))
    assert len(names) > 30
    for name in names:
        value = getattr(saved, name)
        choices = {
            "policy_head": "gaussian",
            "ratio": "joint",
            "env_id": "reach-v3",
            "env_kwargs": '{"g": 5}',
            "exp_name": "other",
        }
        other = choices.get(name) or (
            not value if isinstance(value, bool) else "linear" if isinstance(value, str) else value + 1
        )
        other = "constant" if other == value else other
        with pytest.raises(
            module.ArgumentError, match=f"--{name.replace('_', '-')} .* contradicts the run to resume, which has"
        ):
            module.main(dataclasses.replace(saved, **{name: other}))
    for flags in (["--gamma", 0.99], ["--total-timesteps", 1280], ["--no-recompute-advantages"], ["--seed", 2]):
        assert_sentence(*inline(script, ["--resume", folder, *flags])[::2], flags[0].replace("--no-", "--"), "contradicts")


@ALL_SCRIPTS
def test_a_finished_run_has_nothing_to_resume(script, unfinished, inline):
    folder = unfinished(script)
    assert inline(script, ["--resume", folder])[0] == 0
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, output, _ = inline(script, ["--resume", folder])
    assert code == 0 and output == f"{folder} is finished already: nothing to resume\n"
    code, _, error = inline(script, ["--resume", folder, "--total-timesteps", 1280])
    assert_sentence(code, error, "--total-timesteps 1280 contradicts the run to resume, which has 640")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_printed_commands_can_be_pasted(tmp_path):
    """Script and runs lie in folders with spaces: resume, curves and watch as they are printed."""
    home = tmp_path / "my home"
    home.mkdir()
    shutil.copy(ROOT / "gipo_continuous.py", home / "my gipo.py")

    def paste(command, **tools):
        words = command.split(" ", 1)
        command = f"{tools[words[0]]} {words[1]}"
        return subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, timeout=120)

    python = shlex.quote(warm.stand_in())
    flags = [*FLAGS, "--total-timesteps", "3200", "--eval-episodes", "1"]
    command = ["bash", "-c", f'cd "{home}" && exec {python} "my gipo.py" --run-dir "my runs" {shlex.join(flags)}']
    process = start_command(command)
    wait_for_line(process, "from step")
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "continue with: python 'my gipo.py' --resume 'my runs/" in output
    resumed = paste(output.split("continue with: ")[1].strip(), python=python)
    assert resumed.returncode == 0, resumed.stderr
    curves, watch = (line.split(":", 1)[1].strip() for line in resumed.stdout.splitlines()[-2:])
    assert shlex.split(curves) == ["tensorboard", "--logdir", "my runs"]
    shown = paste(f"{curves} --inspect", tensorboard=f"{python} -m tensorboard.main")
    assert shown.returncode == 0 and "charts/SPS" in shown.stdout, shown.stderr
    assert watch.endswith(" --capture-video")  # which needs an OpenGL library
    watched = paste(watch.removesuffix(" --capture-video"), python=python)
    assert watched.returncode == 0 and json.loads(watched.stdout)["episodes"] == 1, watched.stderr


# -------------------- main() in code --------------------
@ALL_SCRIPTS
@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_main_gives_the_signal_handlers_back(script, end, tmp_path, monkeypatch):
    """However it ends; while it trains they are its own, and Ctrl-C makes a checkpoint."""
    module, args = code_args(script, tmp_path)
    mine = {signum: (lambda *_: None) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {signum: signal.signal(signum, handler) for signum, handler in mine.items()}
    during, original = [], module.save_checkpoint

    def spy(path, state):
        original(path, state)
        during.extend(signal.getsignal(signum) for signum in mine)
        if end == "stopped" and path.name == "checkpoint.pt":
            signal.raise_signal(signal.SIGINT)
        if end == "failed":
            raise RuntimeError("disk full")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_checkpoint", spy)
            if end == "finished":
                assert module.main(args)["total_timesteps"] == 640
            else:
                with pytest.raises({"stopped": SystemExit, "failed": RuntimeError}[end]) as error:
                    module.main(args)
                assert end == "failed" or error.value.code == 130
        after = {signum: signal.getsignal(signum) for signum in mine}
        assert multiprocessing.active_children() == []
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert after == mine and not set(during) & set(mine.values())
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    module.main(dataclasses.replace(args, exp_name="again"))  # no lock, no process is left to disturb the next run


@pytest.mark.parametrize("flags", [[], ["--no-overlap"]])
def test_main_in_a_thread(flags, tmp_path):
    """Where no signal handler can be installed."""
    module, args = code_args("gipo_continuous", tmp_path, flags=flags)
    results, handler = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: results.append(module.main(args)))
    thread.start()
    thread.join(timeout=60)
    assert results[0]["total_timesteps"] == 640 and signal.getsignal(signal.SIGINT) is handler


def test_main_in_a_daemonic_process(tmp_path):
    """Which may have no children: the environments stay in it."""
    module, args = code_args("gipo_continuous", tmp_path)
    process = multiprocessing.get_context("fork").Process(target=module.main, args=(args,), daemon=True)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert_finished(only_folder(tmp_path))


@ONE_SCRIPT
def test_main_after_other_work_with_many_threads(script, tmp_path):
    """A notebook that has used torch: its threads do not exist in the process of the environments."""
    lines = f"""
        import sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        import {script} as script
        torch.set_num_threads(2)
        torch.linalg.qr(torch.randn(1000, 1000).exp() @ torch.randn(1000, 1000))
        for name in ("one", "two"):
            script.main(script.parse_args([*{FLAGS!r}, "--run-dir", {str(tmp_path)!r}, "--exp-name", name]))
    """
    code = "\n".join(line.strip() if "script.main" not in line else f"    {line.strip()}" for line in lines.splitlines())
    process = start_command([sys.executable, "-c", code])
    try:
        output = process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0 and output.count("finished in") == 2, output


@ALL_SCRIPTS
def test_an_encoder_that_a_fork_adds_is_trained(script, tmp_path, monkeypatch):
    module, args = code_args(script, tmp_path)
    begun = []

    class Fork(module.Agent):
        def __init__(self, obs_dim, action_dim, args):
            super().__init__(obs_dim, action_dim, args)
            self.encoder = torch.nn.Linear(obs_dim, obs_dim)
            begun.append(self.encoder.weight.detach().clone())

        def normalize(self, obs):
            return self.encoder(super().normalize(obs))

    monkeypatch.setattr(module, "Agent", Fork)
    module.main(args)
    checkpoint = read_pt(only_folder(tmp_path) / "checkpoint.pt")
    change = (checkpoint["model"]["encoder.weight"] - begun[0]).abs()
    assert change.min() > 1e-6 and change.max() > 1e-4
    moments = [state["exp_avg"].shape for state in checkpoint["optimizer"]["state"].values()]
    assert moments.count((3, 3)) == 1  # Pendulum's three numbers, and no other layer has this shape


@ALL_SCRIPTS
def test_a_frozen_part_in_bfloat16_reaches_the_environments(script, tmp_path, monkeypatch):
    """NumPy has no such type, and with overlap the weights go through it."""
    module, args = code_args(script, tmp_path)

    class Fork(module.Agent):
        def __init__(self, obs_dim, action_dim, args):
            super().__init__(obs_dim, action_dim, args)
            self.register_buffer("frozen", torch.full((obs_dim,), 0.1, dtype=torch.bfloat16))

        def normalize(self, obs):
            assert self.frozen.dtype == torch.bfloat16
            return super().normalize(obs) + self.frozen

    monkeypatch.setattr(module, "Agent", Fork)
    module.main(args)
    assert read_pt(only_folder(tmp_path) / "model.pt")["model"]["frozen"].dtype == torch.bfloat16


@ALL_SCRIPTS
@pytest.mark.parametrize("overlap", [True, False])
def test_random_numbers_of_the_caller_and_of_a_fork(script, overlap, tmp_path, monkeypatch):
    """A loop over main() draws on as if there had been no run; what a fork draws in the update depends on the seed alone."""
    module, args = code_args(script, tmp_path)
    args.overlap, args.torch_threads, drawn = overlap, 2, []

    class Fork(module.Agent):
        def update_normalizer(self, obs):
            drawn.append(float(torch.rand(())))
            super().update_normalizer(obs)

    monkeypatch.setattr(module, "Agent", Fork)
    torch.set_num_threads(3)
    for _ in range(2):
        args.overwrite = True
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        module.main(args)
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        torch.manual_seed(len(drawn))  # another state of the caller's
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert len(drawn) > 4 and drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]


@ALL_SCRIPTS
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_acting_and_learning_that_differ_are_reported(script, rate, tmp_path, monkeypatch):
    """Dropout, as a state that is not reset would, gives the same weights two log-probabilities."""
    module, args = code_args(script, tmp_path)

    class Fork(module.Agent):
        def normalize(self, obs):
            return torch.nn.functional.dropout(super().normalize(obs) + 1.0, rate)

    monkeypatch.setattr(module, "Agent", Fork)
    args.overlap = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        module.main(args)
    shown = [str(one.message) for one in caught if "gipo/log_ratio_max" in str(one.message)]
    assert len(shown) == (rate > 0)  # once, in many iterations


# -------------------- Terminals --------------------
@pytest.mark.parametrize(
    ("script", "reader", "lines"),
    [
        ("ppo_baseline", "| head -1", 1),
        ("gipo_continuous", "| true", 0),
        ("gipo_continuous", ">&-", 0),
    ],
)
def test_a_closed_stdout_ends_nothing(script, reader, lines, tmp_path):
    command = shlex.join(command_line(script, tmp_path, [*FLAGS, "--total-timesteps", "1280"]))
    command = f"{command} {reader}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and process.stderr == "" and process.stdout.count("\n") == lines
    assert_finished(only_folder(tmp_path), 1280)


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("*.py")))
def test_help_that_nobody_reads_to_its_end(script):
    read, write = os.pipe()
    os.close(read)  # as `| head` does once it has its lines
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert process.returncode == 0 and process.stderr == ""


def test_nohup(tmp_path):
    """The terminal is closed: SIGHUP to all of it, which nohup has them ignore."""
    command = ["nohup", *command_line("gipo_continuous", tmp_path, [*FLAGS, "--total-timesteps", "3200"])]
    process = start_command(command)
    wait_for_line(process, "from step")
    os.killpg(process.pid, signal.SIGHUP)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "finished in" in output, output
    assert_finished(only_folder(tmp_path), 3200)


@ONE_SCRIPT
def test_wandb_ids(script, tasks, tmp_path, inline, monkeypatch):
    """An id of the run folder's own, legal for any environment, kept by --resume and known to no other run."""
    tasks.unlink()
    calls, codes = [], []

    def init(**kwargs):
        calls.append(kwargs)
        return types.SimpleNamespace(id=kwargs["id"] if sweep is None else sweep)

    sweep, wandb = None, types.SimpleNamespace(init=init, finish=lambda exit_code: codes.append(exit_code))
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb.py")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    runs = [tmp_path / "a", tmp_path / "b"]
    for run_dir in runs:
        assert inline(script, [*GATE, "--run-dir", run_dir, "--track"])[0] == 0
    for run_dir in runs:
        (only_folder(run_dir) / "result.json").unlink()
        assert inline(script, ["--resume", only_folder(run_dir)])[0] == 0
    (only_folder(runs[0]) / "result.json").unlink()
    assert inline(script, ["--resume", only_folder(runs[0]), "--no-track"])[0] == 0 and len(calls) == 4
    assert inline(script, [*GATE, "--run-dir", runs[0], "--track", "--overwrite"])[0] == 0
    ids = [call["id"] for call in calls]
    assert ids[:2] == ids[2:4] and len(set(ids)) == 3 and all(word.isalnum() for word in ids)
    assert [read_json(only_folder(run_dir) / "args.json")["wandb_id"] for run_dir in runs] == [ids[4], ids[1]]
    assert {call["resume"] for call in calls} == {"allow"}
    assert codes == [0] * 5
    monkeypatch.setenv("FAULT", "simple")
    with pytest.raises(Exception, match="my own fault"):
        inline(script, ["--env-id", "their_tasks:Faulty-v0", *FLAGS[2:], *MODES["turns"], "--run-dir", tmp_path, "--track"])
    assert codes == [0] * 5 + [1]  # W&B calls it failed
    sweep = "its-own"  # W&B drops the given id
    monkeypatch.delenv("FAULT")
    assert inline(script, [*GATE, "--run-dir", tmp_path / "c", "--track"])[0] == 0
    assert read_json(only_folder(tmp_path / "c") / "args.json")["wandb_id"] == "its-own"


# -------------------- Environments that fail --------------------
@pytest.mark.parametrize(
    ("script", "mode", "fault"),
    [
        *(("gipo_continuous", mode, "simple") for mode in MODES),
        ("gipo_continuous", "process", "odd"),
        ("ppo_baseline", "process", "simple"),
    ],
)
def test_a_fault_in_the_users_environment(script, mode, fault, tasks, tmp_path, inline):
    """Its file, line and message are in the traceback, nothing goes on, and the corrected environment resumes the run."""
    tasks.unlink()
    flags = ["--env-id", "their_tasks:Faulty-v0", *FLAGS[2:], *MODES[mode]]
    process = start_script(script, tmp_path / "runs", *flags, FAULT=fault)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and left_running(process.pid) == []
    assert "Traceback" in output and "my own fault" in output, output
    assert f'{tmp_path / "tasks" / "their_tasks.py"}", line {FAULTY_LINE}, in step' in output, output
    code, _, error = inline(script, ["--resume", only_folder(tmp_path / "runs")])
    assert code == 0, error


@pytest.mark.parametrize(("mode", "which"), [("process", -1), ("async", -1), ("async-turns", -1), ("async-turns", 1)])
def test_a_process_of_the_environments_that_is_killed(mode, which, tasks, tmp_path, inline):
    """By the out-of-memory killer, say: exit code 1, nothing goes on, and --resume does."""
    process = start_script("gipo_continuous", tmp_path / "runs", *GATE, *MODES[mode])
    wait_for_line(process, "from step")
    folder = only_folder(tmp_path / "runs")
    wait_for_gate(tasks)
    # The process of the environments, or the last or first one's own: the main process, or that, is before it.
    os.kill(sorted(running(process.pid))[which], signal.SIGKILL)
    tasks.unlink()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and left_running(process.pid) == [], output
    assert mode != "process" or "a process of the environments has died (exit code -9" in output, output
    code, _, error = inline("gipo_continuous", ["--resume", folder])
    assert code == 0, error
    assert_finished(folder)
