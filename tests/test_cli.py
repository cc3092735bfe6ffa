"""Both scripts end to end, through the command line: every flag in a short run, what a run leaves, and every bad input."""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, command_line, differences, read_json, read_pt, read_scalars, run_script
from torch.optim.optimizer import register_optimizer_step_pre_hook

SMALL = "--num-envs 2 --num-steps 32 --minibatch-size 64 --hidden-size 32 --eval-episodes 2"
SHORT = f"{SMALL} --total-timesteps 700"  # rounded up to 704; Pendulum's episodes have 200 steps, Reacher's 50
REACH = f"--env-id reach-v3 {SMALL} --total-timesteps 2000 --eval-every 1000 --checkpoint-every 500"
RATES = "--learning-rate 1e-4 --critic-learning-rate 5e-4 --lr-schedule cosine --critic-lr-schedule constant --lr-warmup 0.1"
HORIZON = "--gamma 0.95 --gae-lambda 0.9 --reward-scale 0.02 --seed 3"
LOSS = "--kl-coef 0.1 --ent-coef 0.01 --vf-coef 1 --max-grad-norm 1 --adv-std-floor 0 --init-log-std -1"
HEAD = "--policy-head categorical --num-bins 32 --ratio per-dim"

RUNS = {  # name -> script, flags; each runs once, and every field of Args appears here or in SPECIAL
    "gipo-reach": ("gipo_continuous", f"{REACH} {RATES} {HORIZON} --buffer-size 512 --exp-name a --updates-per-iteration 2"),
    "gipo-turns": ("gipo_continuous", f"{REACH} --no-overlap --sigma 0.5 --sigma-neg-ratio 0.5"),
    "gipo-mt10": (
        "gipo_continuous",
        "--env-id MT10 --num-envs 10 --num-steps 64 --total-timesteps 5120 --minibatch-size 64 --eval-episodes 1"
        " --hidden-size 32 --updates-per-iteration 8",
    ),
    "gipo-bins": ("gipo_continuous", f"--env-id Reacher-v5 {SHORT} {HEAD} {LOSS} --kernel laplacian --async-envs"),
    "gipo-per-dim": (
        "gipo_continuous",
        f"--env-id Reacher-v5 {SHORT} --overlap --ratio per-dim --kernel gaussian --trust-weight gipo",
    ),
    "gipo-vtrace": ("gipo_continuous", f"--env-id Reacher-v5 {SHORT} {LOSS} --vtrace --kernel cauchy --buffer-size 128"),
    "gipo-sapo": (
        "gipo_continuous",
        f"--env-id Reacher-v5 {SHORT} --trust-weight sapo --sapo-tau-pos 2 --sapo-tau-neg 2 --no-recompute-advantages"
        " --lr-schedule constant --critic-lr-schedule linear",
    ),
    "gipo-none": (
        "gipo_continuous",
        f'--env-id Pendulum-v1 {SHORT} --trust-weight none --buffer-size 0 --env-kwargs {{"g":2.5}}',
    ),
    "ppo-reach": ("ppo_baseline", f"{REACH} {RATES} {HORIZON} --exp-name a --update-epochs 2 --clip-coef 0.1"),
    "ppo-bins": ("ppo_baseline", f"--env-id Reacher-v5 {SHORT} {HEAD} {LOSS} --async-envs"),
    "ppo-replay": (
        "ppo_baseline",
        f'--env-id Reacher-v5 {SHORT} --buffer-size 256 --updates-per-iteration 3 --vtrace --env-kwargs {{"frame_skip":4}}',
    ),
    "ppo-stored": (
        "ppo_baseline",
        f"--env-id Reacher-v5 {SHORT} --buffer-size 128 --no-recompute-advantages --ratio per-dim --no-overlap",
    ),
}
SPECIAL = {  # what the tests further down do
    "no evaluation": f"--env-id Pendulum-v1 {SHORT} --eval-episodes 0",
    "evaluate": "--evaluate",
    "overwrite": "--overwrite",
    "resume": "--resume",
    "track": f"--env-id gymnasium.envs.classic_control:Pendulum-v1 {SHORT} --track --wandb-project paper",
    "video": f"--env-id InvertedPendulum-v5 {SHORT} --capture-video --total-timesteps 64",
    "cuda": f"--env-id Pendulum-v1 {SHORT} --cuda",
    "compiled": f"--env-id Pendulum-v1 {SHORT} --torch-compile",
    "threads": f"--env-id Pendulum-v1 {SHORT} --torch-threads 2 --total-timesteps 64",
}

RESULT_KEYS = (
    "env_id exp_name seed total_timesteps eval_success_rate eval_return_mean eval_episodes train_return_mean "
    "train_success_rate sps wall_seconds peak_memory_mb git_commit versions args"
).split()
PER_ITERATION = {
    *(f"charts/{name}" for name in ("SPS", "learning_rate")),
    *(f"losses/{name}" for name in "policy_loss value_loss entropy approx_kl clipfrac explained_variance grad_norm".split()),
    *(f"gipo/{name}" for name in "trust_mean trust_min effective_sample_size utilization logratio_std".split()),
    *("gipo/policy_lag", "gipo/log_ratio_max"),
    *(f"time/{part}" for part in ("env", "policy", "update")),
}
ALL_SCRIPTS = pytest.mark.parametrize("script", SCRIPTS)
# Where a run takes seconds, and nothing that the two scripts do differently (test_diff.py) takes part.
ONE_SCRIPT = pytest.mark.parametrize("script", SCRIPTS[:1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(name) -> the process and the folder of one of RUNS, which runs at the first call."""
    done = {}

    def run(name):
        if name not in done:
            script, flags = RUNS[name]
            done[name] = run_script(script, tmp_path_factory.mktemp(name), *flags.split())
        return done[name]

    return run


def arguments(script, **values):
    """Args of a script by field name, tiny by default."""
    module = importlib.import_module(script)
    tiny = {
        "num_envs": 2,
        "num_steps": 32,
        "minibatch_size": 64,
        "hidden_size": 32,
        "total_timesteps": 200,
        "eval_episodes": 0,
    }
    return module.main, module.Args(**{"env_id": "Pendulum-v1", **tiny, **values})


# -------------------- Good runs --------------------
@ALL_SCRIPTS
def test_every_flag_is_exercised(script):
    words = {word for name, flags in RUNS.values() if name == script for word in flags.split()}
    words |= {word for flags in SPECIAL.values() for word in flags.split()} | {"--run-dir"}
    flags = [field.name.replace("_", "-") for field in dataclasses.fields(importlib.import_module(script).Args)]
    assert [flag for flag in flags if not {f"--{flag}", f"--no-{flag}"} & words] == []


@pytest.mark.parametrize("name", RUNS)
def test_run_leaves_what_the_design_says(finished, name):
    process, folder = finished(name)
    assert process.returncode == 0, process.stderr
    args, result = read_json(folder / "args.json"), read_json(folder / "result.json")
    success, multi_task = args["env_id"] in ("reach-v3", "MT10"), args["env_id"] == "MT10"
    assert folder.name == f"{args['env_id']}__{args['exp_name']}__{args['seed']}"
    files = {path.name for path in folder.iterdir()}
    events = {file for file in files if file.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == {".lock", "args.json", "checkpoint.pt", "model.pt", "best_model.pt", "result.json"}

    rollout = args["num_envs"] * args["num_steps"]
    total = -(-args["total_timesteps"] // rollout) * rollout
    assert list(result) == RESULT_KEYS[:7] + ["eval_success_by_task"] * multi_task + RESULT_KEYS[7:]
    assert [result[key] for key in ("env_id", "exp_name", "seed")] == [args[key] for key in ("env_id", "exp_name", "seed")]
    assert result["total_timesteps"] == total
    assert result["eval_episodes"] == args["eval_episodes"] * (10 if multi_task else 1)
    for kind in ("eval", "train"):
        assert np.isfinite(result[f"{kind}_return_mean"])
        rate = result[f"{kind}_success_rate"]
        assert (0.0 <= rate <= 1.0) if success else (rate is None)
    assert result["sps"] > 0 and result["wall_seconds"] > 0 and result["peak_memory_mb"] < 2000
    assert args.pop("script") in ("gipo_continuous.py", "ppo_baseline.py")
    assert result["args"] | {"algorithm_version": 2, "wandb_id": None} == args
    assert result["versions"]["algorithm"] == 2

    scalars = read_scalars(folder)
    per_episode = {"charts/episodic_return", "charts/episodic_length"} | ({"charts/episodic_success"} if success else set())
    evaluation = {"eval/return_mean"} | ({"eval/success_rate"} if success else set())
    by_task = {tag for tag in scalars if tag.startswith("eval/success_rate/")}
    assert len(by_task) == (10 if multi_task else 0)
    assert scalars.keys() == PER_ITERATION | per_episode | evaluation | by_task
    for tag, points in scalars.items():
        assert np.isfinite([value for _, value in points]).all(), tag
        steps = [step for step, _ in points]
        if tag in PER_ITERATION:
            assert steps == list(range(rollout, total + 1, rollout)), tag
        elif tag in per_episode:  # all environments run in step and truncate at the same time: N points at one step
            period = {"Pendulum-v1": 200, "Reacher-v5": 50}.get(args["env_id"], 500) * args["num_envs"]
            assert steps == sorted([*range(period, total + 1, period)] * args["num_envs"]), tag
        else:
            assert steps == ([1024, 2048] if args["env_id"] == "reach-v3" else [total]), tag
    assert max(value for _, value in scalars["gipo/log_ratio_max"]) < 1e-4
    for tag in ("losses/clipfrac", "gipo/trust_mean", "gipo/trust_min", "gipo/effective_sample_size", "gipo/utilization"):
        assert all(-1e-6 <= value <= 1.0 + 1e-6 for _, value in scalars[tag]), tag
    for part in ("env", "policy", "update"):  # with --overlap their sum may be above 1
        assert 0.0 < min(scalars[f"time/{part}"])[1] and max(value for _, value in scalars[f"time/{part}"]) <= 1.05, part

    lines = process.stdout.splitlines()
    assert "\r" not in process.stdout
    assert any(line.startswith("step ") and "steps/s" in line and "left" in line for line in lines)
    assert lines[-4].startswith("finished in ") and lines[-3] == f"files:  {folder}"
    assert lines[-2] == f"curves: tensorboard --logdir {folder.parent}"
    assert lines[-1].startswith("watch:  python ") and f"--evaluate {folder / 'best_model.pt'}" in lines[-1]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("name", ["gipo-reach", "ppo-reach"])
def test_model_files(finished, name):
    _, folder = finished(name)
    last, best, checkpoint = (read_pt(folder / f"{file}.pt") for file in ("model", "best_model", "checkpoint"))
    assert last["global_step"] == 2048 and best["score"] >= last["score"]
    assert differences(last["model"], checkpoint["model"]) == []
    result = read_json(folder / "result.json")
    assert last["score"] == [result["eval_episodes"], result["eval_success_rate"], result["eval_return_mean"]]
    replay = checkpoint["replay"]
    segments = 16 if name == "gipo-reach" else 2  # a buffer of 512 steps, or one rollout of 64, in segments of 32
    assert {value.shape[:2] for value in replay.values()} == {(32, segments)}
    lag = 1 if name == "gipo-reach" else 0  # a replayed rollout is collected during the update before it
    assert replay["versions"].unique().tolist() == list(range(33 - lag - segments // 2, 33 - lag))
    assert replay["obs"].shape[2:] == (39,) and replay["actions"].shape[2:] == (4,)


@pytest.mark.parametrize("name", ["gipo-bins", "ppo-bins"])
def test_number_of_bins(finished, name):
    actor = read_pt(finished(name)[1] / "model.pt")["model"]["actor.4.weight"]
    assert actor.shape == (2 * 32, 32)  # Reacher's two action dimensions; hidden units


def test_schedules_move_the_learning_rate(finished):
    rates = {
        name: read_scalars(finished(name)[1])["charts/learning_rate"] for name in ("gipo-reach", "gipo-sapo", "ppo-replay")
    }
    progress = np.arange(32) / 32
    expected = np.where(progress < 0.1, progress / 0.1, 0.5 + 0.5 * np.cos(np.pi * progress)) * 1e-4
    np.testing.assert_allclose([value for _, value in rates["gipo-reach"]], expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose([value for _, value in rates["gipo-sapo"]], 3e-4, rtol=1e-5)
    np.testing.assert_allclose([value for _, value in rates["ppo-replay"]], 3e-4 * (1 - np.arange(11) / 11), rtol=1e-5)
    groups = read_pt(finished("gipo-reach")[1] / "checkpoint.pt")["optimizer"]["param_groups"]
    assert groups[1]["lr"] == 5e-4  # the critic's, constant
    optimizer = read_pt(finished("gipo-sapo")[1] / "checkpoint.pt")["optimizer"]
    assert optimizer["param_groups"][1]["lr"] == pytest.approx(1e-3 / 11)  # the critic's, linear, in the last of 11 iterations
    last = optimizer["state"][optimizer["param_groups"][1]["params"][-1]]
    assert last["exp_avg"].shape == (1,) and last["step"] == 110  # the bias of the value: the second group is the critic's


def test_replay_ages_and_a_single_rollout_does_not(finished):
    """The first rollout is made by the policy that it updates; a later one by the policy before the update before it."""
    lag = {
        name: [value for _, value in read_scalars(finished(name)[1])["gipo/policy_lag"]]
        for name in ("gipo-reach", "gipo-none", "ppo-reach", "ppo-replay")
    }
    assert lag["ppo-reach"] == [0.0] * 32
    assert lag["gipo-none"] == [0.0] + [1.0] * 10  # GIPO on one rollout
    for name, last in (("gipo-reach", 4.5), ("ppo-replay", 2.5)):  # ages 1 to 8, and 1 to 4
        assert lag[name][:2] == [0.0, 1.0] and np.mean(lag[name][8:]) == pytest.approx(last, abs=0.5)


@pytest.mark.parametrize("name", ["gipo-reach", "gipo-none", "ppo-reach", "ppo-replay"])
def test_saved_model_evaluates_to_the_runs_own_result(finished, inline, name):
    _, folder = finished(name)
    before, result = sorted(folder.iterdir()), read_json(folder / "result.json")
    episodes = read_json(folder / "args.json")["eval_episodes"]
    flags = f"{SPECIAL['evaluate']} {folder / 'model.pt'} --eval-episodes {episodes}"
    code, output, _ = inline(RUNS[name][0], flags.split())
    evaluation = json.loads(output[output.index("{") :])
    assert code == 0 and sorted(folder.iterdir()) == before
    assert evaluation["success_rate"] == result["eval_success_rate"]
    assert evaluation["return_mean"] == result["eval_return_mean"]
    assert evaluation["episodes"] == result["eval_episodes"]
    assert evaluation.get("success_by_task") == result.get("eval_success_by_task")
    code, _, error = inline(RUNS[name][0], [*flags.split(), "--gamma", "0.123"])  # it would change nothing
    assert code == 2 and error.startswith("error: --gamma 0.123 contradicts the run of the model") and error.count("\n") == 1


@ALL_SCRIPTS
def test_a_program_evaluates_with_the_arguments_it_trained_with(script, tmp_path):
    """Textbook PPO trains on stored advantages whatever its arguments say, which then contradicted its own model."""
    main, args = arguments(script, run_dir=str(tmp_path), eval_episodes=1)
    trained = main(args)
    found = main(dataclasses.replace(args, evaluate=str(next(tmp_path.glob("*/model.pt")))))
    assert found["return_mean"] == trained["eval_return_mean"]


@ALL_SCRIPTS
def test_without_evaluation_and_overwrite(script, tmp_path, inline):
    flags = [*SPECIAL["no evaluation"].split(), "--run-dir", str(tmp_path)]
    code, _, _ = inline(script, flags)
    (folder,) = tmp_path.iterdir()
    result, model = read_json(folder / "result.json"), read_pt(folder / "checkpoint.pt")["model"]
    assert differences(read_pt(folder / "model.pt")["model"], model) == [] and not (folder / "best_model.pt").exists()
    assert code == 0 and (result["eval_return_mean"], result["eval_success_rate"], result["eval_episodes"]) == (None, None, 0)
    assert not [tag for tag in read_scalars(folder) if tag.startswith("eval/")]
    (folder / "left-over").touch()
    code, _, _ = inline(script, [*flags, SPECIAL["overwrite"]])
    assert code == 0 and not (folder / "left-over").exists()
    assert differences(read_pt(folder / "checkpoint.pt")["model"], model) == []  # the same seed, so the same model


@ONE_SCRIPT
def test_environment_of_the_users_own_package(script, tmp_path):
    """`module:Name-v0` is imported and registered by gym.make, in training and for --evaluate."""
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    line = f"gymnasium.register('Mine-v0', {entry_point!r}, max_episode_steps=50)"
    (tmp_path / "my_tasks.py").write_text(f"import gymnasium\n{line}\n")
    flags, environment = ["--env-id", "my_tasks:Mine-v0", *SHORT.split()], {"PYTHONPATH": str(tmp_path)}
    process, folder = run_script(script, tmp_path / "runs", *flags, **environment)
    assert process.returncode == 0, process.stderr
    result = read_json(folder / "result.json")
    process, _ = run_script(script, tmp_path, "--evaluate", folder / "model.pt", "--eval-episodes", "2", **environment)
    assert process.returncode == 0 and json.loads(process.stdout)["return_mean"] == result["eval_return_mean"]
    process, _ = run_script(script, tmp_path, "--evaluate", folder / "model.pt")  # the package is not there
    assert process.returncode == 2 and process.stderr.startswith(
        "error: --env-id my_tasks:Mine-v0: there is no module my_tasks"
    )


@ALL_SCRIPTS
def test_compiled_run_equals_the_eager_one(script, inline, tmp_path):
    """--torch-compile makes one graph of the loss; after 110 updates the weights agree but for rounding."""
    flags, models, counters = SPECIAL["compiled"].split(), [], torch._dynamo.utils.counters
    torch._dynamo.reset()  # what other tests of this process have compiled
    counters.clear()
    for kind in (flags[:-1], flags):
        assert counters["frames"]["ok"] == 0
        assert inline(script, [*kind, "--run-dir", str(tmp_path / str(len(kind)))])[0] == 0
        (folder,) = (tmp_path / str(len(kind))).iterdir()
        models.append(read_pt(folder / "model.pt")["model"])
    assert counters["frames"]["ok"] == counters["frames"]["total"] == 1 and not counters["graph_break"]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


@ONE_SCRIPT
def test_two_threads(script, tmp_path, monkeypatch):
    process, folder = run_script(script, tmp_path, *SPECIAL["threads"].split())
    assert process.returncode == 0 and read_json(folder / "result.json")["args"]["torch_threads"] == 2, process.stderr
    module, threads = importlib.import_module(script), set()
    original = module.compute_loss
    monkeypatch.setattr(module, "compute_loss", lambda *args: threads.add(torch.get_num_threads()) or original(*args))
    before = torch.get_num_threads()
    main, args = arguments(script, run_dir=str(tmp_path / "inline"), torch_threads=2)
    main(args)
    torch.set_num_threads(before)
    assert threads == {2}


@ONE_SCRIPT
def test_track(script, tmp_path):
    """The real package, offline: a run of the right name, with the configuration and the event file."""
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    process, folder = run_script(script, tmp_path / "runs", *SPECIAL["track"].split(), **environment)
    assert process.returncode == 0 and (folder / "result.json").exists(), process.stderr
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert log.name == f"run-{read_json(folder / 'args.json')['wandb_id']}.wandb"
    content, words = (
        log.read_bytes(),
        ("paper", folder.name, "total_timesteps", "charts/episodic_return", "losses/policy_loss"),
    )
    assert all(word.encode() in content for word in words)


@ALL_SCRIPTS
@pytest.mark.parametrize(
    "spec", [None, importlib.machinery.ModuleSpec("wandb", None, is_package=True)], ids=["none", "folder"]
)
def test_track_without_the_package(script, spec, tmp_path, inline, monkeypatch):
    """Nor is it there where only the folder wandb/ lies, in which the package keeps its logs: Python would import that."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "wandb" else find_spec(name))
    code, _, error = inline(script, [*SPECIAL["track"].split(), "--run-dir", str(tmp_path)])
    assert code == 2 and error == "error: --track needs the package wandb: pip install wandb\n" and not any(tmp_path.iterdir())


@ONE_SCRIPT
def test_capture_video(script, tmp_path):
    for backend in [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]:
        process, folder = run_script(script, tmp_path, *SPECIAL["video"].split(), MUJOCO_GL=backend)
        if process.returncode == 0:
            break
        # No OpenGL library: the error tells what to install, and nothing is written.
        assert process.returncode == 2 and folder is None
        assert "error: --capture-video cannot render" in process.stderr and "Debian: libegl1" in process.stderr
    else:
        assert os.environ.get("GIPO_REQUIRE_ALL") != "1", process.stderr
        pytest.skip("no OpenGL library here: apt-get install libegl1 libgl1 libopengl0")
    (video,) = (folder / "videos").rglob("*.mp4")
    assert video.parent.name == "64" and video.stat().st_size > 1000
    flags = ["--evaluate", folder / "model.pt", "--capture-video", "--eval-episodes", "1"]
    process, _ = run_script(script, tmp_path, *flags, MUJOCO_GL=backend)
    assert process.returncode == 0 and (folder / "videos" / "task0.mp4").stat().st_size > 1000, process.stderr


@ALL_SCRIPTS
def test_the_best_model_is_that_of_equal_evaluations(script, tmp_path):
    """MT10's evaluations have 50 episodes, the last one 500: a lucky one of the short ones does not win."""
    module = importlib.import_module(script.removesuffix(".py"))
    for step, (episodes, success) in enumerate([(50, 0.5), (50, 0.7), (50, 0.6), (500, 0.6), (500, 0.5)]):
        evaluation = {"episodes": episodes, "success_rate": success, "return_mean": 1.0}
        module.save_models(tmp_path, torch.nn.Linear(1, 1), {}, evaluation, step)
        best = read_pt(tmp_path / "best_model.pt")["global_step"]
        assert best == [0, 1, 1, 3, 3][step]


@ALL_SCRIPTS
def test_capture_video_changes_nothing(script, tmp_path, monkeypatch, inline):
    """Of an environment that draws from NumPy's global generator, in the process that tries whether it can be rendered."""
    (tmp_path / "noisy.py").write_text(
        """import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv
class Noisy(PendulumEnv):
    def reset(self, **kwargs):
        return super().reset(**kwargs)[0] + np.random.random(3).astype(np.float32), {}
    def render(self):
        return np.zeros((16, 16, 3), np.uint8)
gym.register("Noisy-v0", Noisy, max_episode_steps=20)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noisy", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    flags = ["--env-id", "noisy:Noisy-v0", *TINY, "--total-timesteps", "192", "--eval-episodes", "1", "--no-overlap"]
    models = []
    for video in ("--no-capture-video", "--capture-video"):
        code, _, error = inline(script, [*flags, video, "--run-dir", str(tmp_path / video)])
        assert code == 0, error
        models.append(read_pt(next((tmp_path / video).glob("*/model.pt")))["model"])
    assert differences(*models) == []


@ONE_SCRIPT
def test_the_peak_of_memory_is_the_runs_own(script, tmp_path):
    """Not that of the program which starts it, as Linux's ru_maxrss counts it."""
    large = b"x" * 2**30  # in this process, which starts the run
    flags = ["--env-id", "Pendulum-v1", *TINY, "--total-timesteps", "200", "--eval-episodes", "0", "--no-overlap"]
    process = subprocess.Popen(command_line(script, tmp_path, flags), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    (file,) = tmp_path.glob("*/result.json")
    assert 100 < read_json(file)["peak_memory_mb"] < len(large) / 2**20 <= usage.ru_maxrss / 1024

    module = importlib.import_module(script)
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    child.start()
    deadline = time.monotonic() + 60
    while (childs := module.peak_memory_mb([child]) - module.peak_memory_mb()) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)  # until the new interpreter is up
    child.kill()
    assert 5 <= childs < len(large) / 2**20


@ALL_SCRIPTS
@pytest.mark.parametrize(
    ("render", "modes", "said"),
    [
        ("return None", ["rgb_array"], "render() of unlit:Unlit-v0 returns NoneType, not an image"),
        ("raise KeyError('no lamp')", ["rgb_array"], "cannot render (KeyError: 'no lamp'); without"),
        ("return None", ["human"], "cannot render (AssertionError: "),
        ("return None\n    def __init__(self):\n        super().__init__()", ["rgb_array"], "cannot render (ArgumentError: "),
    ],
)
def test_capture_video_of_what_gives_no_image(script, render, modes, said, tmp_path, monkeypatch, inline):
    """Found before training, and the environment's own words are in the message."""
    (tmp_path / "unlit.py").write_text(
        f"""import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv
class Unlit(PendulumEnv):
    metadata = {{"render_modes": {modes}, "render_fps": 20}}
    def render(self):
        {render}
gym.register("Unlit-v0", Unlit, max_episode_steps=200)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.delitem(sys.modules, "unlit", raising=False)
    code, _, error = inline(script, ["--env-id", "unlit:Unlit-v0", "--capture-video", "--run-dir", tmp_path / "runs"])
    assert code == 2 and error.startswith("error: --capture-video") and said in error and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


@ALL_SCRIPTS
def test_only_mujoco_needs_a_display(script, monkeypatch):
    """Pendulum draws into memory; MuJoCo without a display would end the process."""
    module = importlib.import_module(script.removesuffix(".py"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    module.check_video(module.Args(env_id="Pendulum-v1"))
    for env_id in ("HalfCheetah-v5", "reach-v3"):
        with pytest.raises(module.ArgumentError, match="--capture-video finds no display"):
            module.check_video(module.Args(env_id=env_id))


@ALL_SCRIPTS
def test_an_old_moviepy_is_found_before_training(script, monkeypatch):
    """Version 1 has no ImageSequenceClip at its top."""
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setitem(sys.modules, "moviepy", types.ModuleType("moviepy"))
    with pytest.raises(module.ArgumentError, match="--capture-video needs moviepy 2 or newer: pip install -U moviepy"):
        module.check_video(module.Args(env_id="Pendulum-v1"))


@ALL_SCRIPTS
@pytest.mark.parametrize("flags", ["--cuda", "--track", "--resume", "--overwrite"])
def test_flags_that_mean_nothing_for_an_evaluation(script, flags, tmp_path, inline):
    code, _, error = inline(script, ["--evaluate", tmp_path / "model.pt", flags])
    assert (code, error) == (2, f"error: {flags} means nothing with --evaluate: drop it\n")


@ALL_SCRIPTS
def test_cuda(script, tmp_path, inline):
    code, _, error = inline(script, [*SPECIAL["cuda"].split(), "--run-dir", str(tmp_path)])
    if torch.cuda.is_available():
        assert code == 0 and len([*tmp_path.glob("*/result.json")]) == 1
    else:
        assert code == 2 and error.startswith("error: --cuda") and error.count("\n") == 1 and not any(tmp_path.iterdir())


@ALL_SCRIPTS
def test_progress_updates_in_place_on_a_terminal(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main, args = arguments(script, run_dir=str(tmp_path))
    main(args)
    assert capsys.readouterr().out.count("\rstep ") == 4


# -------------------- The update of main() --------------------
@ALL_SCRIPTS
@pytest.mark.parametrize("ratio", ["joint", "per-dim"])
def test_first_update_by_hand(script, ratio, tmp_path):
    """At l = 0 GIPO and PPO are the policy gradient, here with every coefficient of the loss: the gradient by autograd."""
    once = {"update_epochs": 1} if script == "ppo_baseline" else {"updates_per_iteration": 1}
    coefficients = {"ent_coef": 0.3, "kl_coef": 0.2, "vf_coef": 0.7, "max_grad_norm": 1e9, "policy_head": "gaussian"}
    sizes = {"env_id": "Reacher-v5", "total_timesteps": 64, "buffer_size": 0}
    main, args = arguments(script, run_dir=str(tmp_path), ratio=ratio, **sizes, **coefficients, **once)
    found, module = [], importlib.import_module(script)

    def keep(optimizer, *_):
        found.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

    hook = register_optimizer_step_pre_hook(keep)
    main(args)
    hook.remove()
    replay = read_pt(next(tmp_path.glob("*/checkpoint.pt")))["replay"]
    torch.manual_seed(args.seed)
    agent = module.Agent(replay["obs"].shape[-1], 2, args)  # as it was before its update
    _, logprob, entropy = agent.get_action_and_logprob(replay["obs"], replay["actions"])
    value, next_value = agent.get_value(replay["obs"]), agent.get_value(replay["next_obs"]).detach()
    gae = (value.detach(), next_value, replay["terminations"], replay["dones"], args.gamma, args.gae_lambda)
    advantage = module.compute_gae(replay["rewards"] * args.reward_scale, *gae)
    weight = ((advantage - advantage.mean()) / advantage.std(correction=0)).unsqueeze(-1)
    logprob = logprob.sum(-1, keepdim=True) if ratio == "joint" else logprob
    value_loss = 0.5 * ((value - advantage - value.detach()) ** 2).mean()
    loss = -(weight * logprob).mean() - 0.3 * entropy.sum(-1).mean() - 0.2 * logprob.mean() + 0.7 * value_loss
    expected = torch.autograd.grad(loss, [*agent.actor_parameters(), *agent.critic.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@ALL_SCRIPTS
def test_ratios_of_an_update(script, tmp_path, monkeypatch):
    """V-trace gets the joint log ratio, the surrogate those per dimension, and both have moved away from 0."""
    main, args = arguments(script, env_id="Reacher-v5", run_dir=str(tmp_path), buffer_size=256, vtrace=True, ratio="per-dim")
    module, joint, per_dimension = importlib.import_module(script), [], []

    def spy(name, position, seen):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: seen.append(args[position].detach().clone()) or function(*args))

    spy("compute_vtrace", 5, joint)
    spy("policy_objective", 0, per_dimension)
    main(args)
    for sums, terms in zip(joint, per_dimension, strict=True):
        torch.testing.assert_close(sums, terms.sum(-1))
    assert per_dimension[-1].std() > 1e-4


@ALL_SCRIPTS
def test_gradients_of_both_networks_are_clipped(script, tmp_path):
    norms = []

    def keep(optimizer, *_):
        norms.extend(torch.cat([p.grad.flatten() for p in group["params"]]).norm().item() for group in optimizer.param_groups)

    main, args = arguments(script, run_dir=str(tmp_path), max_grad_norm=1e-3)
    hook = register_optimizer_step_pre_hook(keep)
    main(args)
    hook.remove()
    assert norms and max(norms) < 1.01e-3
    assert min(norms) > 0.99e-3  # each apart: together the larger one would leave the other next to nothing


def test_every_epoch_of_ppo_takes_every_step_once(tmp_path, monkeypatch):
    """In minibatches, each with an update."""
    module, seen = importlib.import_module("ppo_baseline"), []
    original = module.compute_loss
    monkeypatch.setattr(
        module, "compute_loss", lambda agent, mb, args: seen.append(mb["actions"]) or original(agent, mb, args)
    )
    main, args = arguments("ppo_baseline", run_dir=str(tmp_path), minibatch_size=16, update_epochs=3, total_timesteps=64)
    main(args)
    (every,) = (read_pt(path)["replay"]["actions"].flatten() for path in tmp_path.glob("*/checkpoint.pt"))
    assert [len(mb) for mb in seen] == [16] * 12 and len(every.unique()) == 64
    for epoch in range(3):
        assert torch.equal(torch.cat(seen[4 * epoch : 4 * epoch + 4]).flatten().sort().values, every.sort().values)


@ALL_SCRIPTS
@pytest.mark.parametrize("recompute", [True, False])
def test_a_minibatch_holds_what_an_update_reads(script, recompute, tmp_path, monkeypatch):
    """Nothing else is gathered from the replay, which would cost time in every update."""
    module, found = importlib.import_module(script), {}

    class Recorder(dict):
        def __getitem__(self, key):
            found[self.name].add(key)
            return super().__getitem__(key)

    original = module.compute_loss

    def record(agent, mb, args):
        found.setdefault("held", set(mb))
        recorder = Recorder(mb)
        recorder.name = "read"
        found.setdefault("read", {"versions"})  # for gipo/policy_lag
        return original(agent, recorder, args)

    monkeypatch.setattr(module, "compute_loss", record)
    values = {"recompute_advantages": recompute, "buffer_size": 256, "overlap": False}
    main, args = arguments(script, run_dir=str(tmp_path), **values)
    main(args)
    extra = {"next_obs"} if recompute else set()  # next_obs: for end_values
    assert found["held"] == found["read"] | extra


@ALL_SCRIPTS
def test_the_normaliser_has_seen_the_observations_that_were_acted_on(script, tmp_path):
    main, args = arguments(script, run_dir=str(tmp_path), buffer_size=64, total_timesteps=64)
    main(args)
    (checkpoint,) = map(read_pt, tmp_path.glob("*/checkpoint.pt"))
    torch.testing.assert_close(checkpoint["model"]["obs_mean"], checkpoint["replay"]["obs"].flatten(0, 1).mean(0))


@ALL_SCRIPTS
def test_both_step_sizes_warm_up(script, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups]))
    extra = {"lr_schedule": "constant", "critic_lr_schedule": "constant", "learning_rate": 1e-4, "critic_learning_rate": 1e-3}
    main, args = arguments(script, run_dir=str(tmp_path), lr_warmup=0.5, total_timesteps=256, buffer_size=64, **extra)
    main(args)
    hook.remove()
    found = sorted({tuple(round(rate, 9) for rate in pair) for pair in rates})
    assert found == [(0.0, 0.0), (5e-5, 5e-4), (1e-4, 1e-3)]


@ALL_SCRIPTS
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(script, tmp_path, monkeypatch):
    module, calls = importlib.import_module(script), []
    original = module.compute_loss

    def breaks(agent, mb, args):
        loss, stats = original(agent, mb, args)
        calls.append(loss)
        return loss, stats | ({"losses/value_loss": stats["losses/value_loss"] * math.nan} if iteration() == 3 else {})

    def iteration():
        once = args.update_epochs if script == "ppo_baseline" else args.updates_per_iteration
        return (len(calls) - 1) // once + 1

    monkeypatch.setattr(module, "compute_loss", breaks)
    main, args = arguments(script, run_dir=str(tmp_path), total_timesteps=256, checkpoint_every=1, buffer_size=64)
    with pytest.raises(module.BadNumber, match="losses/value_loss is nan at step 192"):
        main(args)
    (checkpoint,) = map(read_pt, tmp_path.glob("*/checkpoint.pt"))
    assert checkpoint["iteration"] == 2


def test_epochs_of_ppo_are_shuffled(tmp_path, monkeypatch):
    calls, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: calls.append(n) or randperm(n, **kwargs))
    main, args = arguments("ppo_baseline", run_dir=str(tmp_path), update_epochs=3)
    main(args)
    assert calls == [64] * 12  # four rollouts


# -------------------- Bad input --------------------
class OddBox(gym.Env):
    """An environment whose spaces or numbers no run can use."""

    def __init__(self, low=-1.0, high=1.0, shape=(1,), dtype=np.float32, observation_space=None, nan_at=None, inf_at=None):
        self.action_space, self.nan_at, self.inf_at = gym.spaces.Box(low, high, shape, dtype), nan_at, inf_at
        self.observation_space = observation_space or gym.spaces.Box(-1.0, 1.0, (3,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.full(3, np.inf if self.steps == self.inf_at else 0.0, np.float32)
        return obs, float("nan") if self.steps == self.nan_at else 1.0, False, False, {}


ODD = {"Infinite": {"high": np.inf}, "Huge": {"high": np.finfo(np.float32).max}, "Matrix": {"shape": (2, 2)}}
ODD |= {"Integer": {"dtype": np.int32}, "NoAction": {"shape": (0,)}, "NaN": {"nan_at": 100}, "Inf": {"inf_at": 100}}
ODD |= {
    "Sequence": {"observation_space": gym.spaces.Sequence(gym.spaces.Box(-1.0, 1.0))},
    "Blind": {"observation_space": gym.spaces.Box(-1.0, 1.0, (0,))},
}
for name, kwargs in ODD.items():
    gym.register(f"{name}-v0", entry_point=OddBox, kwargs=kwargs, disable_env_checker=True)

NEGATIVE = (
    "seed total_timesteps num_envs num_steps minibatch_size updates_per_iteration learning_rate critic_learning_rate "
    "reward_scale max_grad_norm hidden_size checkpoint_every torch_threads buffer_size eval_every eval_episodes gamma "
    "gae_lambda lr_warmup kl_coef ent_coef vf_coef adv_std_floor"
).split()
ZERO = "total_timesteps num_envs num_steps minibatch_size hidden_size learning_rate checkpoint_every torch_threads".split()
OWN = {
    "gipo_continuous": dict.fromkeys("sigma sigma_neg_ratio sapo_tau_pos sapo_tau_neg".split(), -1.0),
    "ppo_baseline": {"clip_coef": -0.1, "update_epochs": 0},
}
NAN, INF = float("nan"), float("inf")
BAD = [  # fields, and what the sentence must name
    ({"hidden_size": 1_000_000}, "--hidden-size 1000000 must be 16,384 or fewer"),
    ({"torch_threads": 5_000_000_000}, "--torch-threads 5000000000 must be 1,024 or fewer"),
    *[({name: -1}, f"--{name.replace('_', '-')} -1 must be ") for name in NEGATIVE],
    *[({name: 0}, f"--{name.replace('_', '-')} 0 must be positive") for name in ZERO],
    ({"gamma": 1.5}, "--gamma 1.5"),
    ({"gae_lambda": NAN}, "--gae-lambda nan"),
    ({"lr_warmup": 2.0}, "--lr-warmup 2.0"),
    ({"learning_rate": INF}, "--learning-rate inf must be positive, at most 1e12"),
    ({"critic_learning_rate": NAN}, "--critic-learning-rate nan"),
    ({"ent_coef": INF}, "--ent-coef inf"),
    ({"reward_scale": NAN}, "--reward-scale nan"),
    ({"max_grad_norm": INF}, "--max-grad-norm inf"),
    ({"init_log_std": NAN}, "--init-log-std nan must be between -20 and 2"),
    ({"init_log_std": 2.5}, "--init-log-std 2.5"),
    ({"init_log_std": -21.0}, "--init-log-std -21.0"),
    ({"seed": 4_000_001}, "--seed 4000001 must be between 0 and 4,000,000"),
    ({"seed": 2**32}, "--seed 4294967296"),
    ({"num_bins": 1}, "--num-bins 1"),
    ({"num_bins": 1_000_000}, "--num-bins 1000000 must be 2 or more, at most 100,000"),
    ({"total_timesteps": 10**13}, "--total-timesteps 10000000000000"),
    ({"buffer_size": 63}, "--buffer-size 63"),
    ({"buffer_size": 4 * 10**11}, "--buffer-size 400000000000 needs "),
    ({"buffer_size": 4 * 10**12}, "--buffer-size 4000000000000"),
    ({"buffer_size": 128, "minibatch_size": 160}, "--minibatch-size 160"),
    ({"buffer_size": 128, "minibatch_size": 48}, "--minibatch-size 48"),
    (
        {"num_envs": 8, "num_steps": 16, "buffer_size": 200, "minibatch_size": 192},
        "--minibatch-size 192 must not exceed the buffer of 128",
    ),
    (
        {"vtrace": True, "recompute_advantages": False, "buffer_size": 128},
        "--vtrace needs the current ratios: drop --no-recompute-advantages",
    ),
    ({"exp_name": "a/b"}, "--exp-name 'a/b'"),
    ({"exp_name": "a\0b"}, "--exp-name 'a\\x00b'"),
    ({"capture_video": True, "eval_episodes": 0}, "--capture-video records evaluations: drop it, or give 1 or more"),
    ({"resume": True}, "--resume: there is no "),
    ({"resume": "nowhere"}, "--resume: there is no nowhere"),
    ({"resume": ""}, "--resume"),
    ({"resume": True, "overwrite": True}, "--resume and --overwrite contradict each other"),
    ({"resume": "", "overwrite": True}, "--resume"),
    ({"evaluate": ""}, "--evaluate '' is no file"),
    ({"evaluate": "nowhere.pt"}, "--evaluate 'nowhere.pt' is no file"),
    ({"evaluate": "."}, "--evaluate '.' is no file"),
    ({"env_id": ""}, "--env-id  is unknown"),
    ({"env_id": "reech-v3"}, "--env-id reech-v3 is unknown; try reach-v3"),
    ({"env_id": "zzz"}, "--env-id zzz is unknown"),
    ({"env_id": "Pendulum"}, "--env-id Pendulum is unknown; try Pendulum-v1"),
    ({"env_id": "HalfCheetah-v3"}, "--env-id HalfCheetah-v3 cannot be built"),  # registered, but moved away
    ({"env_id": "Meta-World/MT1"}, "--env-id Meta-World/MT1: give the name of a task"),
    ({"env_id": "Meta-World/reach-v3"}, "--env-id Meta-World/reach-v3: give the name of a task"),
    ({"env_id": "no_module_here:X-v0"}, "--env-id no_module_here:X-v0: there is no module no_module_here"),
    ({"env_id": "./my_env:X-v0"}, "--env-id ./my_env:X-v0: there is no module ./my_env"),
    ({"env_id": "json:X-v0"}, "--env-id json:X-v0 cannot be built"),  # a module that registers nothing
    ({"env_id": ":Pendulum-v1"}, "--env-id :Pendulum-v1"),
    ({"env_id": "CartPole-v1"}, "--env-id CartPole-v1 has the action space"),
    ({"env_id": "Infinite-v0"}, "--env-id Infinite-v0 has the action space"),
    ({"env_id": "Matrix-v0"}, "--env-id Matrix-v0 has the action space"),
    ({"env_id": "Huge-v0"}, "--env-id Huge-v0 has the action space"),
    ({"env_id": "Integer-v0"}, "--env-id Integer-v0 has the action space"),
    ({"env_id": "NoAction-v0"}, "--env-id NoAction-v0 has the action space"),
    ({"env_id": "Sequence-v0"}, "--env-id Sequence-v0 has observations of no fixed size"),
    ({"env_id": "Blind-v0"}, "--env-id Blind-v0 has empty observations"),
    ({"env_id": "MT10", "num_envs": 8}, "--num-envs 8 must be a multiple of 10"),
    ({"env_id": "reach-v3", "eval_episodes": 51}, "--eval-episodes 51"),
    ({"env_kwargs": ""}, "--env-kwargs  must be a JSON object"),
    ({"env_kwargs": "{"}, "--env-kwargs { must be a JSON object"),
    ({"env_kwargs": "[1]"}, "--env-kwargs [1] must be a JSON object"),
    ({"env_kwargs": "null"}, "--env-kwargs null must be a JSON object"),
    ({"env_kwargs": "g=5"}, "--env-kwargs g=5 must be a JSON object"),
    ({"env_kwargs": '{"gravity": 5}'}, "cannot be built with --env-kwargs {"),
    ({"env_kwargs": '{"max_episode_steps": 0}'}, "--env-kwargs {"),
    ({"env_kwargs": '{"max_episode_steps": "9"}'}, "needs 1 or more max_episode_steps"),
]


@ALL_SCRIPTS
@pytest.mark.parametrize(("fields", "message"), BAD, ids=[f"{i}-{message[:30]}" for i, (_, message) in enumerate(BAD)])
def test_bad_arguments(script, fields, message, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main, args = arguments(script, run_dir=str(tmp_path / "runs"), **fields)
    with pytest.raises(importlib.import_module(script).ArgumentError) as error:
        main(args)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]


@ALL_SCRIPTS
def test_a_compiler_is_missing(script, tmp_path, monkeypatch):
    """Training is refused; an evaluation, which compiles nothing, of a run that was compiled elsewhere is not."""
    main, args = arguments(script, run_dir=str(tmp_path), torch_compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"--torch-compile needs a C\+\+ compiler, no-such-compiler: install it, or give --no"
    ):
        main(args)
    assert not any(tmp_path.iterdir())
    module = importlib.import_module(script)
    trained = dataclasses.asdict(dataclasses.replace(args, env_id="Pendulum-v1", eval_episodes=1))
    agent = module.Agent(3, 1, module.Args(**trained))
    module.save_checkpoint(tmp_path / "model.pt", {"model": agent.state_dict(), "args": trained, "score": None})
    assert main(module.parse_args(["--evaluate", str(tmp_path / "model.pt")]))["episodes"] == 1


@ALL_SCRIPTS
def test_the_best_score_is_read_on_the_cpu(script, tmp_path, monkeypatch):
    """A run may go on without the GPU that it began on; and a GPU need not hold a second model."""
    module, original, read = importlib.import_module(script), torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **how: (read.append(how), original(path, **how))[1])
    agent = module.Agent(3, 1, module.Args())
    for success, best in ((0.5, 0.5), (0.25, 0.5), (0.75, 0.75)):
        evaluation = {"episodes": 1, "success_rate": success, "return_mean": 0.0}
        module.save_models(tmp_path, agent, {}, evaluation, 0)
        assert original(tmp_path / "best_model.pt", weights_only=True)["score"][1] == best
    assert [how["map_location"] for how in read] == ["cpu"] * 2


@pytest.mark.parametrize(
    ("script", "flags", "uses"),
    [
        ("gipo_continuous", "--updates-per-iteration 5", "5"),
        ("gipo_continuous", "--num-envs 1 --updates-per-iteration 1 --minibatch-size 32", "1"),
        ("gipo_continuous", "--num-envs 8 --updates-per-iteration 3", "0.75"),
        ("ppo_baseline", "--updates-per-iteration 5", "5"),
        ("ppo_baseline", "--buffer-size 0 --update-epochs 3", "3"),
    ],
)
def test_the_start_says_how_often_a_step_is_used(script, flags, uses, tmp_path, inline):
    """The number of updates stays when that of the environments changes, so this is what changes."""
    common = ["--env-id", "Pendulum-v1", *TINY, "--total-timesteps", "64", "--eval-episodes", "0", "--run-dir", tmp_path]
    code, output, error = inline(script, [*common, *flags.split()])
    assert code == 0 and f" steps of Pendulum-v1, each used {uses} times, from step 0\n" in output, error


def test_vtrace_needs_replay(tmp_path):
    main, args = arguments("ppo_baseline", run_dir=str(tmp_path), vtrace=True, buffer_size=0, recompute_advantages=True)
    with pytest.raises(ValueError, match=r"--vtrace needs replayed segments: raise --buffer-size to \d+ or more"):
        main(args)


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in OWN.items() for name in names])
def test_bad_arguments_of_one_script(script, name, tmp_path):
    main, args = arguments(script, run_dir=str(tmp_path), **{name: OWN[script][name]})
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
        main(args)
    assert not any(tmp_path.iterdir())


@ALL_SCRIPTS
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--env-id reech-v3", "--env-id"),
        ("--env-id CartPole-v1", "--env-id"),
        ("--env-id MT10 --num-envs 8 --num-steps 64", "--num-envs"),
        ("--num-envs -1", "--num-envs"),
        ("--eval-episodes 51", "--eval-episodes"),
        ("--buffer-size 10", "--buffer-size"),
        ("--minibatch-size 1000000", "--minibatch-size"),
        ("--exp-name a/b", "--exp-name"),
        ("--resume", "--resume"),
        ("--resume nowhere", "there is no nowhere"),
        ("--resume --overwrite", "--resume and --overwrite"),
        ("--evaluate no-such-file.pt", "no-such-file.pt"),
    ],
)
def test_bad_command_line(script, flags, named, tmp_path, inline):
    code, output, error = inline(script, [*flags.split(), "--run-dir", str(tmp_path / "runs")])
    assert code == 2 and output == "" and not any(tmp_path.iterdir())
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


@ALL_SCRIPTS
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-env", "8"], "--num-env"),
        (["--num-envs", "two"], "two"),
        (["--num-envs", "2.5"], "2.5"),
        (["--num-envs"], "--num-envs"),
        (["--gamma", "high"], "high"),
        (["--ratio", "global"], "global"),
        (["--lr-schedule", "exponential"], "exponential"),
        (["--vtrace", "yes"], "yes"),
        (["reach-v3"], "reach-v3"),
    ],
)
def test_command_line_that_cannot_be_read(script, flags, named, tmp_path, inline):
    code, output, error = inline(script, [*flags, "--run-dir", str(tmp_path / "runs")])
    assert code == 2 and named in output + error and "Traceback" not in error and not any(tmp_path.iterdir())


@ALL_SCRIPTS
@pytest.mark.parametrize("flags", [["--resume", ""], ["--resume", "", "--overwrite"], ["--resume", "a", "b"]])
def test_resume_needs_one_folder(script, flags, tmp_path, inline, monkeypatch):
    """An unset shell variable, or a pattern of two folders, must neither start a run here nor delete what is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").touch()
    code, _, error = inline(script, ["--env-id", "Pendulum-v1", *SHORT.split(), *flags])
    assert code == 2 and "--resume" in error and "Traceback" not in error
    assert [*tmp_path.iterdir()] == [tmp_path / "mine.txt"]


@ONE_SCRIPT
def test_bad_command_line_in_a_process_of_its_own(script, tmp_path):
    process, folder = run_script(script, tmp_path / "runs", "--env-id", "reech-v3")
    assert process.returncode == 2 and folder is None and process.stdout == ""
    assert process.stderr.startswith("error: --env-id reech-v3 is unknown; try reach-v3") and process.stderr.count("\n") == 1


@ALL_SCRIPTS
def test_existing_folder(script, tmp_path, inline):
    """Neither mixed, nor resumed with other flags, nor resumed from a broken file."""
    flags = ["--env-id", "Pendulum-v1", *TINY, "--total-timesteps", "128", "--eval-episodes", "0", "--run-dir", str(tmp_path)]
    assert inline(script, flags)[0] == 0
    (folder,) = tmp_path.iterdir()
    (folder / "result.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for more, names in {
        (): ["--resume", "--overwrite", folder.name],
        ("--resume", "--overwrite"): ["--resume and --overwrite contradict each other"],
        ("--resume", "--gamma", "0.5"): ["--gamma 0.5"],
        ("--resume", "--num-steps", "16"): ["--num-steps 16"],
    }.items():
        code, _, error = inline(script, [*flags, *more])
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert all(name in error for name in names)
    (folder / "checkpoint.pt").write_bytes(b"half a file")
    before["checkpoint.pt"] = (folder / "checkpoint.pt").stat().st_mtime_ns
    code, _, error = inline(script, [*flags, "--resume"])
    assert code == 2 and error.startswith("error: cannot read") and "checkpoint.pt" in error and error.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@ALL_SCRIPTS
def test_evaluate_refuses_other_files(script, finished, tmp_path, inline):
    """A checkpoint, a model of the other script, any other .pt file: one sentence."""
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    _, own = finished("gipo-bins" if script == "gipo_continuous" else "ppo-bins")
    _, other = finished("ppo-bins" if script == "gipo_continuous" else "gipo-bins")
    for path in (own / "checkpoint.pt", tmp_path / "tensor.pt", other / "model.pt"):
        code, _, error = inline(script, ["--evaluate", str(path)])
        assert code == 2 and error.startswith("error: ") and path.name in error and error.count("\n") == 1, path
    code, _, error = inline(script, ["--evaluate", str(own / "model.pt"), "--eval-episodes", "0"])
    assert code == 2 and error == "error: --eval-episodes 0 must be positive with --evaluate\n"


@ALL_SCRIPTS
def test_a_forks_own_flag_may_have_any_number(script):
    """What a fork adds to Args is its own business: 0 and negative numbers pass."""
    module = importlib.import_module(script)
    fork = dataclasses.make_dataclass("Fork", [("bonus", float, 0.0), ("shift", int, -3)], bases=(module.Args,))
    module.check_args(fork(run_dir="unused"))


@ALL_SCRIPTS
def test_a_package_that_lacks_another_is_not_called_missing(script, tmp_path, monkeypatch):
    """A user's package whose import fails keeps its own error, also where the other's name begins like its own."""
    module = importlib.import_module(script)
    (tmp_path / "lacking_envs").mkdir()
    (tmp_path / "lacking_envs" / "__init__.py").write_text("import lacking\n")
    monkeypatch.syspath_prepend(tmp_path)
    module.check_args(module.Args(env_id="lacking_envs.arm:Arm-v0"))  # so that building it shows what is lacking
    with pytest.raises(module.ArgumentError, match=r"there is no module nowhere\.at\.all"):
        module.check_args(module.Args(env_id="nowhere.at.all:Arm-v0"))


@ALL_SCRIPTS
def test_weights_of_other_networks_are_refused(script, finished, tmp_path, inline):
    """A fork that changed Agent since: --evaluate and --resume say so in one sentence."""
    _, folder = finished("gipo-bins" if script == "gipo_continuous" else "ppo-bins")
    older = tmp_path / folder.name
    shutil.copytree(folder, older)
    (older / "result.json").unlink()
    for name in ("model.pt", "checkpoint.pt"):
        saved = torch.load(older / name, weights_only=True)
        saved["model"]["encoder.weight"] = torch.zeros(3, 3)
        torch.save(saved, older / name)
    for flags, name in ((["--evaluate", older / "model.pt"], "model.pt"), (["--resume", older], "checkpoint.pt")):
        code, _, error = inline(script, list(map(str, flags)))
        assert code == 2 and f"{name} does not fit the networks of this script" in error and error.count("\n") == 1


@ALL_SCRIPTS
def test_tensorboards_table_of_runs(script, finished):
    """The hyperparameter tab has every argument of a run, and its final scores by their tags."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    _, folder = finished("gipo-bins" if script == "gipo_continuous" else "ppo-bins")
    content = EventAccumulator(str(folder)).Reload().summary_metadata
    experiment, start = (
        HParamsPluginData.FromString(content[f"_hparams_/{part}"].plugin_data.content)
        for part in ("experiment", "session_start_info")
    )
    args = read_json(folder / "args.json")
    assert {*start.session_start_info.hparams} == args.keys() - {"algorithm_version", "wandb_id", "script"}
    assert start.session_start_info.hparams["num_bins"].number_value == args["num_bins"]
    metrics = {info.name.tag for info in experiment.experiment.metric_infos}
    assert metrics == {"eval/success_rate", "eval/return_mean"} and "eval/return_mean" in read_scalars(folder)


@ALL_SCRIPTS
def test_a_run_of_an_older_file_goes_on(script, finished, tmp_path, inline):
    """A field added to Args since has its default, for --resume and --evaluate; a field that is gone is another script's."""
    _, folder = finished("gipo-bins" if script == "gipo_continuous" else "ppo-bins")
    older = tmp_path / folder.name
    shutil.copytree(folder, older)
    (older / "result.json").unlink()
    args, model = read_json(older / "args.json"), read_pt(older / "model.pt")
    del args["adv_std_floor"], args["wandb_project"], model["args"]["wandb_project"]
    (older / "args.json").write_text(json.dumps(args))
    torch.save(model, older / "model.pt")
    flags = ["--env-id", "Reacher-v5", "--run-dir", str(tmp_path), "--resume"]
    code, _, error = inline(script, flags)
    assert code == 0, error  # 0 is not its default, but the older file did not say so
    assert read_json(older / "args.json")["adv_std_floor"] == 0.1 and (older / "result.json").exists()
    code, output, error = inline(script, ["--evaluate", str(older / "model.pt"), "--eval-episodes", "1"])
    assert code == 0 and json.loads(output)["episodes"] == 1, error
    (older / "args.json").write_text(json.dumps(args | {"temperature": 1.0}))
    code, _, error = inline(script, flags)
    assert code == 2 and "is another script's or version's run" in error


@ALL_SCRIPTS
def test_a_checkpoint_holds_no_more_replay_than_there_is(script, tmp_path):
    main, args = arguments(script, run_dir=str(tmp_path), buffer_size=100_000)
    main(args)
    (path,) = tmp_path.glob("*/checkpoint.pt")
    assert read_pt(path)["replay"]["obs"].shape == (32, 8, 3) and path.stat().st_size < 200_000


@ALL_SCRIPTS
@pytest.mark.parametrize(
    ("env_id", "what"),
    [
        ("Inf-v0", "observation after a step inf of environment 0 at step 200"),
        ("NaN-v0", "reward nan of environment 0 at step 200"),
    ],
)
def test_a_bad_number_stops_the_run_before_it_spoils_the_model(script, env_id, what, tmp_path, inline):
    """One sentence, exit code 1, and the checkpoint of before the rollout that has it."""
    flags = ["--env-id", env_id, *SHORT.split(), "--run-dir", str(tmp_path), "--checkpoint-every", "1"]
    code, _, error = inline(script, flags)
    (folder,) = tmp_path.iterdir()
    assert code == 1 and error == f"error: --env-id {env_id}: {what}; last good checkpoint: {folder / 'checkpoint.pt'}\n"
    checkpoint = read_pt(folder / "checkpoint.pt")
    assert checkpoint["iteration"] == (3 if script == "ppo_baseline" else 2)  # GIPO was one rollout ahead
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
