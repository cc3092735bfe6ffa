"""Interrupted and killed runs: resumed, they equal the run that was left alone, bit for bit on the CPU."""

import importlib
import os
import random
import shutil
import signal
import sys
import time

import pytest
import tyro
from conftest import SCRIPTS, TINY, differences, read_json, read_pt, read_scalars, start_script

PENDULUM = ["--env-id", "Pendulum-v1", *TINY, "--total-timesteps", "4000", "--eval-every", "1000", "--eval-episodes", "2"]
REACH = ["--env-id", "reach-v3", *TINY, "--total-timesteps", "2500", "--eval-every", "2000", "--eval-episodes", "1"]
ON_POLICY = ["--buffer-size", "0", "--update-epochs", "2"]
TIMING = {"sps", "wall_seconds", "peak_memory_mb", "git_commit"}  # the commit may change while the tests run
ALL_SCRIPTS = pytest.mark.parametrize("script", SCRIPTS)


def run_inline(script, run_dir, flags):
    """Run to the end in this process, to save the imports: -> the run folder."""
    module = importlib.import_module(script)
    if "--resume" in flags:
        time.sleep(1.0)  # TensorBoard orders event files by the second in their names; a user is not faster than that
    module.main(tyro.cli(module.Args, args=[*flags, "--run-dir", str(run_dir)]))
    (folder,) = run_dir.iterdir()
    return folder


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def start_training(script, run_dir, flags):
    """Start a run and return once its training loop has begun: process, run folder."""
    process = start_script(script, run_dir, *flags)
    line = ""
    for line in process.stdout:
        if "from step" in line:
            break
    assert "from step" in line, line
    (folder,) = run_dir.iterdir()
    return process, folder


def stop_at_checkpoint(script, run_dir, flags, signum, whole_group=False):
    """Send a signal once a new checkpoint has been written: -> exit code, output."""
    checkpoints = [*run_dir.glob("*/checkpoint.pt")]
    before = checkpoints[0].stat().st_mtime_ns if checkpoints else 0
    process, folder = start_training(script, run_dir, flags)
    path = folder / "checkpoint.pt"
    wait_for(lambda: path.exists() and path.stat().st_mtime_ns > before, process)
    (os.killpg if whole_group else os.kill)(process.pid, signum)
    output = process.communicate()[0]
    return process.returncode, output


def assert_equal_runs(folder, reference):
    """Everything two runs leave, apart from time and the flags that may differ."""
    a, b = read_pt(folder / "checkpoint.pt"), read_pt(reference / "checkpoint.pt")
    assert differences({**a, "seconds": 0}, {**b, "seconds": 0}) == []
    for file in ("model.pt", "best_model.pt"):
        a, b = ({**read_pt(path / file), "args": 0} for path in (folder, reference))
        assert differences(a, b) == [], file
    a, b = (read_json(path / "result.json") for path in (folder, reference))
    assert differences(*({k: v for k, v in result.items() if k not in {*TIMING, "args"}} for result in (a, b))) == []
    own = ("run_dir", "resume", "overwrite")
    assert differences(*({k: v for k, v in result["args"].items() if k not in own} for result in (a, b))) == []
    assert_equal_curves(folder, reference)


def assert_equal_curves(folder, reference):
    a, b = (read_scalars(path) for path in (folder, reference))
    assert a.keys() == b.keys()
    for tag in b:
        if tag.startswith("eval/"):  # a run that died right after an evaluation repeats it: the same point twice
            a[tag] = sorted(set(a[tag]))
        assert [step for step, _ in a[tag]] == [step for step, _ in b[tag]], tag
        if not tag.startswith("time/") and tag != "charts/SPS":
            assert a[tag] == b[tag], tag


# -------------------- Signals --------------------
@pytest.mark.parametrize(
    ("script", "flags", "checkpoint_every", "whole_group"),
    [
        ("gipo_continuous", REACH, 640, False),  # stops in the first and in the second episode, goals drawn at random
        ("gipo_continuous", PENDULUM, 1000, False),
        ("gipo_continuous", [*PENDULUM, "--async-envs"], 1000, True),  # Ctrl-C reaches the workers too
        ("ppo_baseline", [*PENDULUM, *ON_POLICY, "--ratio", "per-dim"], 1000, False),
        ("ppo_baseline", [*REACH, *ON_POLICY], 640, True),
    ],
    ids=["gipo-reach", "gipo-pendulum", "gipo-async", "ppo-pendulum", "ppo-reach"],
)
def test_interrupted_twice_equals_uninterrupted(script, flags, checkpoint_every, whole_group, tmp_path):
    flags = [*flags, "--checkpoint-every", str(checkpoint_every)]
    reference = run_inline(script, tmp_path / "reference", [flag for flag in flags if flag != "--async-envs"])
    run_dir = tmp_path / "stopped"
    code, output = stop_at_checkpoint(script, run_dir, flags, signal.SIGINT, whole_group)
    assert code == 130 and "--resume" in output and "Traceback" not in output
    code, output = stop_at_checkpoint(script, run_dir, [*flags, "--resume"], signal.SIGTERM)
    assert code == 143 and "--resume" in output and "Traceback" not in output
    folder = run_inline(script, run_dir, [*flags, "--resume"])
    if "--async-envs" in flags:  # the workers change nothing, so only this flag tells the two runs apart
        assert read_json(folder / "result.json")["args"]["async_envs"] is True
        assert differences(read_pt(folder / "checkpoint.pt")["model"], read_pt(reference / "checkpoint.pt")["model"]) == []
        assert_equal_curves(folder, reference)
    else:
        assert_equal_runs(folder, reference)


# -------------------- kill -9 --------------------
@pytest.mark.parametrize(
    ("script", "flags", "delays"),
    [
        ("gipo_continuous", [], (0.0, 0.6, 0.9, 1.2)),
        ("ppo_baseline", ON_POLICY, (0.5, 0.8)),
        ("gipo_continuous", ["--async-envs"], (0.5,)),
    ],
    ids=["gipo", "ppo", "gipo-async"],
)
def test_killed_at_random_moments(script, flags, delays, tmp_path):
    """A checkpoint after every iteration, so that most kills hit one being written."""
    flags = [*PENDULUM, *flags, "--checkpoint-every", "1", "--total-timesteps", "16000"]  # so long that no kill comes too late
    chance = random.Random(0)
    for delay in delays:
        process, folder = start_training(
            script, tmp_path / "killed", [*flags, "--resume"] if (tmp_path / "killed").exists() else flags
        )
        time.sleep(delay * chance.random())
        process.kill()
        process.communicate()  # returns once the workers of --async-envs are gone too: they hold its output
        assert not (folder / "result.json").exists()
        if (folder / "checkpoint.pt").exists():
            read_pt(folder / "checkpoint.pt")
    folder = run_inline(script, tmp_path / "killed", [*flags, "--resume"])
    reference = run_inline(script, tmp_path / "reference", flags)
    assert_equal_runs(folder, reference)
    for path in folder.glob("*.pt"):
        read_pt(path)


@ALL_SCRIPTS
def test_killed_before_the_first_checkpoint(script, tmp_path):
    flags = [*PENDULUM, "--eval-every", "0", "--checkpoint-every", "1000000"]
    process, folder = start_training(script, tmp_path / "killed", flags)
    process.kill()
    process.communicate()
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events")} == {"args.json"}
    folder = run_inline(script, tmp_path / "killed", [*flags, "--resume"])
    assert_equal_runs(folder, run_inline(script, tmp_path / "reference", flags))


def test_killed_in_the_final_evaluation(tmp_path):
    script, flags = "gipo_continuous", [*PENDULUM, "--total-timesteps", "500", "--eval-episodes", "50"]
    process, folder = start_training(script, tmp_path / "killed", flags)
    wait_for((folder / "checkpoint.pt").exists, process)  # the only one, written before the evaluation
    process.kill()
    process.communicate()
    assert read_pt(folder / "checkpoint.pt")["iteration"] == 8 and not (folder / "model.pt").exists()
    folder = run_inline(script, tmp_path / "killed", [*flags, "--resume"])
    assert_equal_runs(folder, run_inline(script, tmp_path / "reference", flags))


@ALL_SCRIPTS
@pytest.mark.parametrize(
    ("function", "call"),
    [("compute_gae", 70), ("save_checkpoint", 5), ("evaluate", 3), ("save_models", 3), ("update_normalizer", 33)],
)
def test_curves_after_a_crash(script, function, call, tmp_path, monkeypatch):
    """Every point written to disk at once, then a crash somewhere: no point is lost or stale."""
    from torch.utils.tensorboard import SummaryWriter

    flags = [*PENDULUM, "--updates-per-iteration", "2", "--total-timesteps", "3000", "--eval-every", "1000"]
    reference = run_inline(script, tmp_path / "reference", flags)
    module, add_scalar, calls = importlib.import_module(script), SummaryWriter.add_scalar, []
    owner = module.Agent if function == "update_normalizer" else module
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
    """The flags that name the run are enough, wherever the folder has been moved to."""
    module = importlib.import_module(script)
    flags = [*PENDULUM, "--total-timesteps", "500", "--eval-every", "0"]
    reference = run_inline(script, tmp_path / "reference", flags)
    folder = tmp_path / "moved" / reference.name
    shutil.copytree(reference, folder)
    for file in ("result.json", "model.pt", "best_model.pt"):
        (folder / file).unlink()
    for events in folder.glob("events*"):
        events.unlink()
    result = module.main(module.Args(env_id="Pendulum-v1", run_dir=str(tmp_path / "moved"), resume=True))
    assert result["args"]["hidden_size"] == 32 and result["total_timesteps"] == 512
    assert differences(read_pt(folder / "model.pt")["model"], read_pt(reference / "model.pt")["model"]) == []


@ALL_SCRIPTS
def test_multi_task_run_resumes_without_its_other_flags(script, tmp_path):
    """MT10 does not accept the default of --num-envs, but a resumed run has its own."""
    module = importlib.import_module(script)
    args = module.Args(env_id="MT10", num_envs=10, run_dir=str(tmp_path))
    folder = tmp_path / f"MT10__{args.exp_name}__1"
    folder.mkdir()
    module.write_json(folder / "args.json", vars(args) | {"algorithm_version": module.ALGORITHM_VERSION})
    module.write_json(folder / "result.json", {"eval_success_rate": 1.0})
    result = module.main(module.Args(env_id="MT10", run_dir=str(tmp_path), resume=True))
    assert result == {"eval_success_rate": 1.0}


@ALL_SCRIPTS
def test_another_algorithm_version_is_not_continued(script, tmp_path, monkeypatch):
    """Neither its checkpoint nor its result: one run never mixes two versions."""
    module = importlib.import_module(script)
    flags = [*PENDULUM, "--total-timesteps", "200"]
    folder = run_inline(script, tmp_path, flags)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(module, "ALGORITHM_VERSION", module.ALGORITHM_VERSION + 1)
    with pytest.raises(ValueError, match=r"--resume: .* is of version 1, not 2: --overwrite starts anew"):
        run_inline(script, tmp_path, [*flags, "--resume"])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@ALL_SCRIPTS
def test_a_flag_with_its_default_value_contradicts_too(script, tmp_path, monkeypatch):
    flags = [*PENDULUM, "--total-timesteps", "200", "--gamma", "0.9"]
    run_inline(script, tmp_path, flags)
    typed = ["--env-id", "Pendulum-v1", "--run-dir", str(tmp_path), "--resume"]
    args = importlib.import_module(script).Args(env_id="Pendulum-v1", run_dir=str(tmp_path), resume=True)
    monkeypatch.setattr(sys, "argv", [script, *typed])
    assert importlib.import_module(script).main(args)["args"]["gamma"] == 0.9
    monkeypatch.setattr(sys, "argv", [script, *typed, "--gamma=0.99"])
    with pytest.raises(ValueError, match=r"--gamma 0.99 contradicts the run to resume, which has 0.9: drop the flag"):
        importlib.import_module(script).main(args)


# -------------------- Determinism --------------------
@ALL_SCRIPTS
def test_the_seed_decides(script, tmp_path):
    flags = [*PENDULUM, "--total-timesteps", "500", "--seed"]
    folders = [run_inline(script, tmp_path / name, [*flags, name[0]]) for name in ("1a", "1b", "2")]
    assert_equal_runs(folders[0], folders[1])
    first, other = (read_pt(folder / "model.pt")["model"] for folder in folders[1:])
    assert any(name.startswith("/actor") for name in differences(first, other))
