"""Interrupted and killed runs: resumed, they equal the run that was left alone, bit for bit on the CPU."""

import contextlib
import dataclasses
import errno
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    TINY,
    differences,
    left_running,
    read_json,
    read_pt,
    run_differences,
    start_script,
    wait_for_line,
)

PENDULUM = ["--env-id", "Pendulum-v1", *TINY, "--total-timesteps", "4000", "--eval-every", "1000", "--eval-episodes", "2"]
REACH = ["--env-id", "reach-v3", *TINY, "--total-timesteps", "2500", "--eval-every", "2000", "--eval-episodes", "1"]
ON_POLICY = ["--buffer-size", "0", "--update-epochs", "2"]
ALL_SCRIPTS = pytest.mark.parametrize("script", SCRIPTS)


def run_inline(script, run_dir, flags):
    """Run to the end in this process, to save the imports: -> the run folder."""
    module = importlib.import_module(script)
    if "--resume" in flags:
        time.sleep(1.0)  # TensorBoard orders event files by the second in their names; a user is not faster than that
    module.main(module.parse_args([*flags, "--run-dir", str(run_dir)]))
    (folder,) = run_dir.iterdir()
    return folder


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def start_training(script, run_dir, flags):
    """Start a run and return once its training loop has begun: process, run folder."""
    process = start_script(script, run_dir, *flags)
    wait_for_line(process, "from step")
    (folder,) = run_dir.iterdir()
    return process, folder


def stop_at_checkpoint(script, run_dir, flags, signum, whole_group):
    """Send a signal once a new checkpoint has been written: -> exit code, output, processes that are left."""
    checkpoints = [*run_dir.glob("*/checkpoint.pt")]
    before = checkpoints[0].stat().st_mtime_ns if checkpoints else 0
    process, folder = start_training(script, run_dir, flags)
    path = folder / "checkpoint.pt"
    wait_for(lambda: path.exists() and path.stat().st_mtime_ns > before, process)
    (os.killpg if whole_group else os.kill)(process.pid, signum)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output, left_running(process.pid)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(script, flags) -> the folder of the run that nothing disturbs, made once."""
    done = {}

    def run(script, flags):
        key = (script, *flags)
        if key not in done:
            done[key] = run_inline(script, tmp_path_factory.mktemp("reference"), flags)
        return done[key]

    return run


def assert_equal_runs(folder, reference):
    module = importlib.import_module("gipo_continuous")
    assert run_differences(folder, reference, module.MACHINE_ARGS) == []


# -------------------- Signals --------------------
@pytest.mark.parametrize(
    ("script", "flags", "modes", "signals", "whole_group"),
    [  # modes: flags of the first, second and third part of the run
        ("gipo_continuous", PENDULUM, ("", "", ""), (signal.SIGINT, signal.SIGTERM), True),
        (
            "gipo_continuous",
            PENDULUM,
            ("--no-overlap", "--no-overlap", "--no-overlap"),
            (signal.SIGTERM, signal.SIGHUP),
            False,
        ),
        ("gipo_continuous", PENDULUM, ("--async-envs",) * 3, (signal.SIGTERM, signal.SIGINT), True),
        (
            "gipo_continuous",
            PENDULUM,
            ("--async-envs --no-overlap", "", "--no-async-envs"),
            (signal.SIGINT, signal.SIGHUP),
            True,
        ),
        ("gipo_continuous", REACH, ("", "--no-overlap", ""), (signal.SIGTERM, signal.SIGINT), False),  # goals drawn at random
        ("ppo_baseline", [*PENDULUM, *ON_POLICY], ("", "", ""), (signal.SIGINT, signal.SIGHUP), True),
    ],
    ids=["gipo", "gipo-turns", "gipo-async", "gipo-async-turns", "gipo-reach", "ppo"],
)
def test_interrupted_twice_equals_uninterrupted(script, flags, modes, signals, whole_group, reference, tmp_path):
    """Whatever the signal, whoever gets it, and whether the environments have processes of their own or not."""
    checkpoint_every = 640 if flags[1] == "reach-v3" else 1000  # in the first, and in the second episode of reach-v3
    flags, resume = [*flags, "--checkpoint-every", str(checkpoint_every)], []
    for signum, mode in zip(signals, modes, strict=False):
        code, output, left = stop_at_checkpoint(script, tmp_path, [*flags, *mode.split(), *resume], signum, whole_group)
        assert code == 128 + signum and "continue with: python" in output and "Traceback" not in output, output
        assert "stopping soon; Ctrl-C now stops at once, without a new checkpoint" in output and left == []
        (model,) = tmp_path.glob("*/model.pt")  # of an unfinished run, too
        if "reach-v3" not in flags:
            module = importlib.import_module(script)
            module.main(module.parse_args(["--evaluate", str(model)]))
        resume = ["--resume"]
    folder = run_inline(script, tmp_path, [*flags, *modes[2].split(), "--resume"])
    assert_equal_runs(folder, reference(script, [*flags, "--no-overlap"]))


@ALL_SCRIPTS
def test_a_signal_right_after_the_look_for_one(script, tmp_path):
    """An iteration without a checkpoint is never the last: the signal comes after the place where one would be written."""
    module, iterations = importlib.import_module(script), []

    class Args(module.Args):
        def __getattribute__(self, name):
            frame = sys._getframe(1)
            if name == "eval_episodes" and frame.f_code.co_name == "evaluation_phase":
                iterations.append(frame.f_back.f_locals["iteration"])
                if iterations[-1] == 3:
                    signal.raise_signal(signal.SIGTERM)
            return super().__getattribute__(name)

    args = module.parse_args([*PENDULUM, "--checkpoint-every", "4000", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        module.main(Args(**vars(args)))
    (folder,) = tmp_path.iterdir()
    assert end.value.code == 128 + signal.SIGTERM and read_pt(folder / "checkpoint.pt")["iteration"] == 4


def test_a_second_signal_ends_at_once(tmp_path):
    """No checkpoint, no traceback, and nothing that goes on."""
    process, folder = start_training("gipo_continuous", tmp_path, [*PENDULUM, "--updates-per-iteration", "100000"])
    time.sleep(0.5)  # into the first update, which takes minutes
    deadline = time.monotonic() + 10  # of 100,000 updates, which take minutes
    while process.poll() is None and time.monotonic() < deadline:  # a busy machine may take two signals as one
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGINT and "Traceback" not in output
    assert left_running(process.pid) == [] and not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(("script", "name"), [("gipo_continuous", "catch_stop_signals"), ("gipo_vla_libero", "catch_signals")])
def test_a_copy_that_interrupts_the_handler_says_nothing(script, name, capfd):
    """The other scripts have the first one's function (test_diff.py)."""
    with contextlib.ExitStack() as at_exit:
        caught = getattr(importlib.import_module(script), name)(at_exit)
        handler = signal.getsignal(signal.SIGTERM)
        handler(signal.SIGTERM, None)
        handler(signal.SIGTERM, None)
    assert caught == [signal.SIGTERM] * 2
    assert capfd.readouterr().err.count("stopping soon") == 1


@pytest.mark.parametrize(("script", "signum"), [(SCRIPTS[0], signal.SIGHUP), (SCRIPTS[1], signal.SIGTERM)])
def test_a_signal_and_its_copies(script, signum, tmp_path):
    """An interactive bash sends SIGHUP to its jobs, and so does the kernel when bash is gone; a cluster's scheduler SIGTERM to
    all processes, and a launcher passes its own on. The run still ends in order."""
    process, folder = start_training(script, tmp_path, [*PENDULUM, "--checkpoint-every", "320", "--eval-every", "0"])
    wait_for((folder / "checkpoint.pt").exists, process)
    for _ in range(4):
        os.killpg(process.pid, signum)
        time.sleep(0.005)  # time to handle one: those that wait together arrive as one
    output = process.communicate(timeout=120)[0]
    assert process.returncode in (128 + signum, -signum)  # the latter: one came after all was done
    assert output.count("stopping soon") == 1
    (steps,) = re.findall(r"stopped at step ([0-9,]+)", output)
    args = read_json(folder / "args.json")
    rollout = args["num_envs"] * args["num_steps"]
    assert (
        read_pt(folder / "checkpoint.pt")["iteration"] * rollout == int(steps.replace(",", "")) and "Traceback" not in output
    )


# -------------------- kill -9 --------------------
def test_killed_at_random_moments():
    """A short instance of tests/kill_often.py, whose longer ones are started by hand."""
    command = [sys.executable, str(ROOT / "tests" / "kill_often.py"), "--kills", "3", "--steps", "2000"]
    command += ["--modes", "gipo-overlap"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-1].startswith("3 kills, nothing lost"), process.stdout


def test_killed_before_the_first_checkpoint(tmp_path):
    script = "ppo_baseline"
    flags = [*PENDULUM, "--eval-every", "0", "--checkpoint-every", "1000000"]
    process, folder = start_training(script, tmp_path / "killed", flags)
    process.kill()
    process.communicate()
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events")} == {".lock", "args.json"}
    folder = run_inline(script, tmp_path / "killed", [*flags, "--resume"])
    assert_equal_runs(folder, run_inline(script, tmp_path / "reference", flags))


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_ended_in_the_final_evaluation(signum, tmp_path):
    """Training is over and its checkpoint written; the evaluation is made again."""
    script, flags = "gipo_continuous", [*PENDULUM, "--total-timesteps", "500", "--eval-episodes", "50"]
    process, folder = start_training(script, tmp_path / "ended", flags)
    wait_for((folder / "checkpoint.pt").exists, process)  # the only one, written before the evaluation
    process.send_signal(signum)
    process.communicate()
    assert process.returncode == (130 if signum == signal.SIGINT else -signum)
    assert read_pt(folder / "checkpoint.pt")["iteration"] == 8
    assert (folder / "model.pt").exists() == (signum == signal.SIGINT)  # a stopped run leaves what it has learned
    folder = run_inline(script, tmp_path / "ended", [*flags, "--resume"])
    assert_equal_runs(folder, run_inline(script, tmp_path / "reference", flags))


@pytest.mark.parametrize(
    ("script", "function", "call"),
    [
        ("gipo_continuous", "compute_gae", 70),
        ("ppo_baseline", "save_checkpoint", 5),
        ("gipo_continuous", "evaluate", 3),
        ("ppo_baseline", "save_models", 3),
        ("gipo_continuous", "update_normalizer", 33),
        ("gipo_continuous", "collect", 20),  # in the process of the environments
    ],
)
def test_curves_after_a_crash(script, function, call, tmp_path, monkeypatch):
    """Every point written to disk at once, then a crash somewhere: no point is lost or stale."""
    from torch.utils.tensorboard import SummaryWriter

    flags = [*PENDULUM, "--updates-per-iteration", "2", "--total-timesteps", "3000", "--eval-every", "1000"]
    reference = run_inline(script, tmp_path / "reference", flags)
    module, add_scalar, calls = importlib.import_module(script), SummaryWriter.add_scalar, []
    owner = {"update_normalizer": module.Agent, "collect": module.Collector}.get(function, module)
    original = getattr(owner, function)

    def crash(*args, **kwargs):
        calls.append(function)
        if len(calls) == call:
            raise RuntimeError("crash")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", lambda self, *point: (add_scalar(self, *point), self.flush()))
        patch.setattr(owner, function, crash)
        with pytest.raises(RuntimeError, match="crash"):
            run_inline(script, tmp_path / "crashed", flags)
    folder = run_inline(script, tmp_path / "crashed", [*flags, "--resume"])
    assert_equal_runs(folder, reference)


# -------------------- Resuming what is finished or damaged --------------------
@ALL_SCRIPTS
def test_resuming_a_finished_run_changes_nothing(script, tmp_path, capsys):
    flags = [*PENDULUM, "--total-timesteps", "200"]
    folder = run_inline(script, tmp_path, flags)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    run_inline(script, tmp_path, [*flags, "--resume"])
    assert "finished already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@ALL_SCRIPTS
def test_arguments_come_from_the_run(script, tmp_path):
    """In code the folder is enough, wherever it has been moved to."""
    module = importlib.import_module(script)
    flags = [*PENDULUM, "--total-timesteps", "500", "--eval-every", "0"]
    reference = run_inline(script, tmp_path / "reference", flags)
    folder = tmp_path / "moved" / "and renamed"
    shutil.copytree(reference, folder)
    for path in [*folder.glob("*.pt"), *folder.glob("events*"), folder / "result.json"]:
        path.unlink()
    saved, _ = module.saved_run(module.Args(resume=str(folder)))
    result = module.main(saved)
    assert result["args"]["hidden_size"] == 32 and result["args"]["run_dir"] == str(folder.parent)
    assert_equal_runs(folder, reference)
    with pytest.raises(module.ArgumentError, match=r"contradicts the run to resume, which has 256: drop the flag"):
        module.main(module.Args(env_id="Pendulum-v1", resume=str(folder)))


@ALL_SCRIPTS
def test_multi_task_run_resumes_without_its_other_flags(script, tmp_path):
    """MT10 does not accept the default of --num-envs, but a resumed run has its own."""
    module = importlib.import_module(script)
    args = module.Args(env_id="MT10", num_envs=10, run_dir=str(tmp_path), recompute_advantages=script == "gipo_continuous")
    folder = tmp_path / f"MT10__{args.exp_name}__1"
    folder.mkdir()
    module.write_json(folder / "args.json", vars(args) | {"algorithm_version": module.ALGORITHM_VERSION})
    module.write_json(folder / "result.json", {"eval_success_rate": 1.0})
    result = module.main(module.parse_args(["--env-id", "MT10", "--run-dir", str(tmp_path), "--resume"]))
    assert result == {"eval_success_rate": 1.0}


@ALL_SCRIPTS
def test_another_algorithm_version_is_not_continued(script, tmp_path, monkeypatch):
    """Neither its checkpoint nor its result: one run never mixes two versions."""
    module = importlib.import_module(script)
    flags = [*PENDULUM, "--total-timesteps", "200"]
    folder = run_inline(script, tmp_path, flags)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(module, "ALGORITHM_VERSION", module.ALGORITHM_VERSION + 1)
    with pytest.raises(module.ArgumentError, match=r"--resume: .* is of version 2, not 3: move it away and start anew"):
        run_inline(script, tmp_path, [*flags, "--resume"])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@ALL_SCRIPTS
def test_a_flag_with_its_default_value_contradicts_too(script, tmp_path):
    module = importlib.import_module(script)
    run_inline(script, tmp_path, [*PENDULUM, "--total-timesteps", "200", "--gamma", "0.9"])
    typed = ["--env-id", "Pendulum-v1", "--run-dir", str(tmp_path), "--resume"]
    assert module.main(module.parse_args(typed))["args"]["gamma"] == 0.9
    with pytest.raises(
        module.ArgumentError, match=r"--gamma 0.99 contradicts the run to resume, which has 0.9: drop the flag"
    ):
        module.main(module.parse_args([*typed, "--gamma=0.99"]))


@pytest.mark.parametrize("script", [*SCRIPTS, "gipo_vla_libero", "graphgpo_sokoban", "popo_countdown"])
def test_a_folder_to_resume_stays_where_it_is(script, tmp_path, monkeypatch):
    """--resume FOLDER goes on in that folder: another --run-dir is refused, the same one in other words is not."""
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    args = module.parse_args(["--preset", "tiny"] if script == "gipo_vla_libero" else [])
    folder = module.run_folder_of(args)
    folder.mkdir(parents=True)
    module.write_json(folder / "args.json", dataclasses.asdict(args) | {"algorithm_version": module.ALGORITHM_VERSION})
    for words in ([], ["--run-dir", "runs"], ["--run-dir", f"{tmp_path}/other/../runs/"]):
        module.check_args(module.parse_args(["--resume", str(folder), *words]))
    with pytest.raises(module.ArgumentError, match=r"--run-dir elsewhere contradicts --resume runs/.*: drop one of them"):
        module.main(module.parse_args(["--resume", str(folder), "--run-dir", "elsewhere"]))
    assert not Path("elsewhere").exists()


LANGUAGE = {
    "graphgpo_sokoban": "--num-groups 2 --group-size 4 --hidden-size 16 --eval-episodes 0 --total-episodes 24",
    "popo_countdown": "--hidden-size 32 --num-layers 1 --num-heads 2 --num-prompts 4 --group-size 4 --warmup-steps 2"
    " --eval-episodes 0 --total-timesteps 48",
}


@pytest.mark.parametrize("script", LANGUAGE)
def test_a_slow_run_is_saved_by_the_clock_too(script, tmp_path, monkeypatch):
    """However few its iterations are."""
    module, saved = importlib.import_module(script), []
    save = module.save_checkpoint
    monkeypatch.setattr(module, "save_checkpoint", lambda path, state: (saved.append(path.name), save(path, state)))
    for seconds, times in ((1800, 1), (-1, 3)):
        monkeypatch.setattr(module, "MOST_SECONDS_UNSAVED", seconds)
        module.main(module.parse_args([*LANGUAGE[script].split(), "--run-dir", str(tmp_path), "--overwrite"]))
        assert saved.count("checkpoint.pt") == times
        saved.clear()


@pytest.mark.parametrize("script", LANGUAGE)
def test_a_disk_too_small_is_found_at_the_start(script, tmp_path, monkeypatch):
    """12 bytes per parameter beside the 20 that the files of a run have: while a checkpoint is written there are two."""
    module = importlib.import_module(script)
    args = module.parse_args([*LANGUAGE[script].split(), "--hidden-size", "128", "--run-dir", str(tmp_path / "runs")])
    module.main(args)
    (folder,) = (tmp_path / "runs").glob(f"*__{args.exp_name}__1")
    parameters = sum(value.numel() for value in read_pt(folder / "model.pt")["model"].values())
    assert (folder / "model.pt").stat().st_size == pytest.approx(4 * parameters, abs=20_000)
    if script == "graphgpo_sokoban":  # the GPT has not learned anything, so it has no moments yet
        assert (folder / "checkpoint.pt").stat().st_size == pytest.approx(12 * parameters, abs=30_000)
    room, asked = SimpleNamespace(free=31 * parameters), []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: (asked.append(path), room)[1])

    def start(run_dir, **more):
        module.main(dataclasses.replace(args, run_dir=str(tmp_path / run_dir), **more))

    with pytest.raises(module.ArgumentError, match=r"--run-dir .*/other: this run needs 0.0 GB of disk, and 0.0 GB are free"):
        start("other")
    assert asked == [tmp_path] and not (tmp_path / "other").exists()
    start("runs", overwrite=True)  # which frees the old run's
    assert asked[-1] == folder  # a run folder may be a link to another disk
    room.free = 32 * parameters
    start("other")


@ALL_SCRIPTS
def test_a_checkpoint_is_replaced_whole_or_not_at_all(script, tmp_path, monkeypatch):
    """Never written in place: the old file is whole until the new one is on the disk, and after a failure."""
    save_checkpoint, path = importlib.import_module(script).save_checkpoint, tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"iteration": 1})
    with open(path, "rb") as old:
        save_checkpoint(path, {"iteration": 2})
        assert torch.load(old, weights_only=True) == {"iteration": 1} and read_pt(path) == {"iteration": 2}

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"iteration": 3})
    assert read_pt(path) == {"iteration": 2}


@ALL_SCRIPTS
def test_a_checkpoint_holds_everything(script, reference):
    """The next rollout is part of it, as are the environments, two generators and the replay; plain types and tensors only."""
    folder = reference(script, [*PENDULUM, "--checkpoint-every", "1000", "--no-overlap"])
    checkpoint = read_pt(folder / "checkpoint.pt")
    assert set(checkpoint) == {
        *("model", "optimizer", "replay", "iteration", "seconds", "recent_returns", "recent_successes"),
        *("collector", "next_rollout", "generator"),
    }
    assert checkpoint["next_rollout"] is None and checkpoint["collector"]["steps"] == 64 * checkpoint["iteration"] == 4032
    assert len(checkpoint["recent_returns"]) == len(checkpoint["recent_successes"]) == 2 * (4032 // 400)
    assert [len(env["actions"]) for env in checkpoint["collector"]["envs"]] == [4032 % 400 // 2] * 2


# -------------------- Determinism --------------------
@ALL_SCRIPTS
def test_the_seed_decides(script, tmp_path):
    flags = [*PENDULUM, "--total-timesteps", "500", "--seed"]
    folders = [run_inline(script, tmp_path / name, [*flags, name[0]]) for name in ("1a", "1b", "2")]
    assert_equal_runs(folders[0], folders[1])
    one, two = (read_pt(folder / "checkpoint.pt") for folder in folders[1:])
    for part in ("generator", "collector"):  # minibatches and actions: each seed has its own draws
        draws = [state[part]["generator"] if part == "collector" else state[part] for state in (one, two)]
        assert not torch.equal(*draws)
    first, other = (read_pt(folder / "model.pt")["model"] for folder in folders[1:])
    assert any(name.startswith("/actor") for name in differences(first, other))
