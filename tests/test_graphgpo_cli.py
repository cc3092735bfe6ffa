"""graphgpo_sokoban.py end to end: what a run leaves, every flag, bad input, signals, exact resume, learning."""

import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import test_diff
import torch
import tyro
from conftest import ROOT, curve_differences, differences, read_json, read_pt, read_scalars, run_script, start_script
from test_resume import wait_for

import graphgpo_sokoban
from graphgpo_sokoban import Args, ArgumentError, main, parse_args

SCRIPT = "graphgpo_sokoban"
TINY = "--num-groups 2 --group-size 4 --hidden-size 16 --eval-episodes 4 --minibatch-size 64"
MINIGRID = "--env-id MiniGrid-Empty-5x5-v0 --max-steps 12"
SMALL_ROOM = {"room_size": 5, "wall_density": 0.0, "min_solution": 2, "max_solution": 4, "max_steps": 8}
RESULT_KEYS = (
    "env_id exp_name seed total_timesteps total_episodes eval_success_rate eval_return_mean eval_episodes eval_spl "
    "train_return_mean train_success_rate sps wall_seconds credit_seconds peak_memory_mb git_commit versions args"
).split()
SCALARS = {
    *(f"charts/{name}" for name in "episodic_return episodic_success episodic_length invalid_actions SPS env_steps".split()),
    *("charts/learning_rate", "credit/mean_abs_step", "credit/mean_abs_episode"),
    *(f"losses/{name}" for name in "policy_loss entropy approx_kl clipfrac grad_norm".split()),
    *(f"graph/{name}" for name in "nodes edges frac_unreachable frac_singleton_steps mean_group_size".split()),
    *("graph/groups_without_success", "graph/groups_all_success"),
    *(f"time/{part}" for part in ("env", "policy", "credit", "update")),
}
SOMETIMES = {"charts/excess_length", "graph/start_distance", "credit/correlation", "credit/frac_progress_steps_in_failures"}
SOMETIMES |= {"credit/frac_nonprogress_in_successes"}
RUNS = {  # every field of Args appears here or in SPECIAL
    "default": f"{TINY} --total-episodes 50 --eval-every 16 --checkpoint-every 8 --seed 3 --exp-name a --learning-rate 1e-2",
    "gigpo": f"{TINY} --total-episodes 8 --advantage gigpo --step-gamma 0.9 --beta-graph 0.5 --beta-episode 2 --ent-coef 0.1",
    "grpo": f"{TINY} --total-episodes 24 --advantage grpo --episode-norm steps --no-divide-by-std --kl-coef 0.1"
    " --update-epochs 2 --step-penalty 0.01 --success-reward 2",
    "room": f"{TINY} --total-episodes 24 --room-size 7 --num-boxes 2 --wall-density 0.05 --min-solution 2 --max-solution 9"
    " --max-steps 20 --eval-temperature 0 --torch-threads 2",
    "credit": f"{TINY} --total-episodes 24 --omega 0.5 --unreachable-distance inf"
    " --clip-coef 0.1 --max-grad-norm 0.5 --reward gym-sokoban",
    "minigrid": f"{TINY} --total-episodes 32 {MINIGRID} --eval-every 8",
}
SPECIAL = """--run-dir --resume --overwrite --evaluate --track --wandb-project --cuda
    --model --prompt --max-new-tokens --micro-batch --generation-batch --dtype
    --invalid-penalty --game-level"""  # the last two lines: test_graphgpo_model.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(name) -> the folder and the result of one of RUNS, which runs at the first call."""
    done = {}

    def run(name):
        if name not in done:
            parent = tmp_path_factory.mktemp(name)
            result = main(tyro.cli(Args, args=[*RUNS[name].split(), "--run-dir", str(parent)]))
            (folder,) = parent.iterdir()
            done[name] = folder, result
        return done[name]

    return run


# -------------------- Good runs --------------------
def test_every_flag_is_exercised():
    words = {word for flags in [*RUNS.values(), SPECIAL] for word in flags.split()}
    flags = [field.name.replace("_", "-") for field in dataclasses.fields(Args)]
    assert [flag for flag in flags if not {f"--{flag}", f"--no-{flag}"} & words] == []


@pytest.mark.parametrize("name", RUNS)
def test_run_leaves_what_the_design_says(finished, name):
    folder, result = finished(name)
    args = read_json(folder / "args.json")
    assert folder.name == f"{args['env_id']}__{args['exp_name']}__{args['seed']}"
    files = {path.name for path in folder.iterdir()}
    events = {file for file in files if file.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == {".lock", "args.json", "checkpoint.pt", "model.pt", "best_model.pt", "result.json"}
    assert result == read_json(folder / "result.json") and list(result) == RESULT_KEYS
    batch = args["num_groups"] * args["group_size"]
    assert result["total_episodes"] == -(-args["total_episodes"] // batch) * batch
    assert result["eval_episodes"] == 4 and 0 <= result["eval_success_rate"] <= 1
    assert (result["eval_spl"] is None) == (name == "minigrid")
    scalars = read_scalars(folder)
    assert SCALARS | {"eval/success_rate", "eval/return_mean"} <= scalars.keys()
    assert scalars.keys() - SCALARS - SOMETIMES <= {"eval/success_rate", "eval/return_mean", "eval/spl", "losses/reference_kl"}
    for tag in SCALARS:
        assert [step for step, _ in scalars[tag]] == list(range(batch, result["total_episodes"] + 1, batch)), tag
    assert scalars["charts/env_steps"][-1][1] == result["total_timesteps"]
    assert all(math.isfinite(value) for points in scalars.values() for _, value in points)
    assert scalars["losses/approx_kl"][0][1] < 0.1
    read_pt(folder / "model.pt")


def test_command_line(tmp_path):
    """As a user types it: progress, held-out success, the folder; a second time it refuses, resumes as finished, replaces."""
    flags = [*TINY.split(), "--total-episodes", 16]
    process, folder = run_script(SCRIPT, tmp_path, *flags)
    assert process.returncode == 0, process.stderr
    assert "16 episodes of Sokoban, from episode 0" in process.stdout and "of 4 held-out levels" in process.stdout
    assert f"files:  {folder}" in process.stdout
    args = tyro.cli(Args, args=[*map(str, flags), "--run-dir", str(tmp_path)])
    with pytest.raises(ValueError, match="exists: --resume continues it, --overwrite replaces it"):
        main(args)
    before = (folder / "result.json").read_text()
    assert main(dataclasses.replace(args, resume=True)) == json.loads(before)
    assert main(dataclasses.replace(args, overwrite=True, total_episodes=8))["total_episodes"] == 8


def test_defaults_that_the_policy_decides_are_recorded(finished, tmp_path):
    """As numbers; the same numbers as flags do not contradict the run, nor one from before, which stored None."""
    folder, result = finished("gigpo")
    wanted = {"learning_rate": 1e-3, "kl_coef": 0.0, "ent_coef": 0.1, "success_reward": 1.0, "max_new_tokens": None}
    assert wanted.items() <= result["args"].items() and wanted.items() <= read_json(folder / "args.json").items()
    assert finished("credit")[1]["args"]["success_reward"] is None  # --reward gym-sokoban has none
    for flags in (["--learning-rate", "0.001"], ["--success-reward", "1"], []):
        assert (
            main(parse_args(["--evaluate", str(folder / "model.pt"), *flags]))["success_rate"] == result["eval_success_rate"]
        )
    shutil.copytree(folder, tmp_path / folder.name)
    for stored in (1e-3, None):
        saved = read_json(folder / "args.json") | {"learning_rate": stored, "run_dir": str(tmp_path)}
        (tmp_path / folder.name / "args.json").write_text(json.dumps(saved))
        assert main(parse_args(["--resume", str(tmp_path / folder.name), "--learning-rate", "0.001"])) == result
        with pytest.raises(ArgumentError, match=r"--learning-rate 0.01 contradicts the run to resume, which has 0.001"):
            main(parse_args(["--resume", str(tmp_path / folder.name), "--learning-rate", "0.01"]))


def test_evaluate_gives_the_number_of_the_run(finished, capsys, tmp_path):
    folder, result = finished("default")
    capsys.readouterr()
    found = main(parse_args(["--evaluate", str(folder / "model.pt")]))
    assert found["success_rate"] == result["eval_success_rate"] and found["spl"] == result["eval_spl"]
    assert json.loads(capsys.readouterr().out) == found
    best = ["--evaluate", str(folder / "best_model.pt")]
    assert main(parse_args([*best, "--eval-episodes", "3"]))["episodes"] == 3
    with pytest.raises(ArgumentError, match="--eval-episodes 9: the run held out 4 levels and may have trained on others"):
        main(parse_args([*best, "--eval-episodes", "9"]))
    with pytest.raises(ArgumentError, match=r"--omega 0.9 contradicts the run of the model, which has 0.8"):
        main(parse_args([*best, "--omega=0.9"]))
    with pytest.raises(ArgumentError, match=r"--model smollm2 contradicts the run of the model, which has None"):
        main(parse_args([*best, "--model=smollm2"]))
    with pytest.raises(ArgumentError, match="--eval-episodes 0 leaves nothing to evaluate"):
        main(parse_args([*best, "--eval-episodes", "0"]))
    with pytest.raises(ArgumentError, match="is no model of this script"):
        parse_args(["--evaluate", str(folder / "checkpoint.pt")])
    none = torch.load(folder / "model.pt", weights_only=True)
    none["args"]["eval_episodes"] = 0
    torch.save(none, tmp_path / "model.pt")
    with pytest.raises(ArgumentError, match="nothing to evaluate: the run held out no levels"):
        main(parse_args(["--evaluate", str(tmp_path / "model.pt")]))


def test_evaluation_leaves_training_alone(tmp_path):
    for every in (8, 0):
        flags = {"num_groups": 2, "group_size": 4, "eval_episodes": 4, "eval_every": every, "total_episodes": 32}
        main(Args(run_dir=str(tmp_path), exp_name=str(every), **flags))
    a, b = (read_pt(tmp_path / f"Sokoban__{every}__1" / "checkpoint.pt") for every in (8, 0))
    assert differences(a["model"], b["model"]) == []


# -------------------- The methods --------------------
def test_graphgpo_without_graph_is_grpo(tmp_path):
    """beta_graph 0 is GRPO bit for bit, and so is GiGPO's; with their own credit all three differ."""
    flags = {
        "num_groups": 4,
        "group_size": 8,
        "eval_episodes": 0,
        "total_episodes": 320,
        "max_solution": 4,
        "run_dir": str(tmp_path),
    }
    models = {}
    for method, beta in (("grpo", 1.0), ("gigpo", 0.0), ("graphgpo", 0.0), ("gigpo", 1.0), ("graphgpo", 1.0)):
        main(Args(advantage=method, beta_graph=beta, exp_name=f"{method}{beta}", **flags))
        models[method, beta] = read_pt(tmp_path / f"Sokoban__{method}{beta}__1" / "model.pt")["model"]
    grpo = models.pop("grpo", None) or models.pop(("grpo", 1.0))
    assert differences(grpo, models["gigpo", 0.0]) == differences(grpo, models["graphgpo", 0.0]) == []
    assert differences(grpo, models["gigpo", 1.0]) and differences(grpo, models["graphgpo", 1.0])
    assert differences(models["gigpo", 1.0], models["graphgpo", 1.0])


@pytest.mark.parametrize("beta_episode", [0.0, 1.0])
def test_graphgpo_learns(beta_episode, tmp_path):
    """Open 3x3 rooms, also from the graph's credit alone: from a tenth of the rollouts to a quarter at least."""
    flags = {"num_groups": 8, "total_episodes": 2560, "minibatch_size": 256, "learning_rate": 3e-3, "eval_episodes": 16}
    main(Args(beta_episode=beta_episode, run_dir=str(tmp_path), eval_every=0, **flags, **SMALL_ROOM))
    success = [value for _, value in read_scalars(tmp_path / "Sokoban__graphgpo__1")["charts/episodic_success"]]
    assert np.mean(success[:3]) < 0.25 and np.mean(success[-10:]) > 0.28, np.round(success, 2)


def test_held_out_levels_are_excluded_wherever_that_is_possible(tmp_path, monkeypatch):
    """Also from an environment that somebody has added."""
    excluded = []
    monkeypatch.setattr(graphgpo_sokoban.MiniGrid, "exclude", lambda self, levels: excluded.extend(levels), raising=False)
    flags = [*MINIGRID.split(), *TINY.split(), "--total-episodes", "8", "--run-dir", str(tmp_path)]
    main(parse_args(flags))
    assert excluded == [(0, 0), (0, 1), (0, 2), (0, 3)]
    model = next(tmp_path.glob("*/model.pt"))
    with pytest.raises(ArgumentError, match="the run held out 4 levels and may have trained on others"):
        main(parse_args(["--evaluate", str(model), "--eval-episodes", "5"]))


def test_minigrid_is_learned(tmp_path):
    """Its small room from the partial view."""
    flags = {"env_id": "MiniGrid-Empty-5x5-v0", "max_steps": 12, "num_groups": 4, "eval_episodes": 4, "learning_rate": 3e-3}
    main(Args(run_dir=str(tmp_path), total_episodes=32 * 22, eval_every=0, minibatch_size=128, **flags))
    success = [value for _, value in read_scalars(tmp_path / "MiniGrid-Empty-5x5-v0__graphgpo__1")["charts/episodic_success"]]
    assert np.mean(success[:2]) < 0.3 and np.mean(success[-3:]) > 0.7, success


# -------------------- Bad input --------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"env_id": "Sokobann"}, "--env-id Sokobann is unknown; try Sokoban"),
        ({"env_id": "MiniGrid-Nothing-v0"}, "--env-id MiniGrid-Nothing-v0 cannot be built: "),
        ({"env_id": "tw-coin_collector"}, "is text: name a language model with --model"),
        ({"env_id": "tw-coin_collector", "model": "x", "game_level": 51}, "--game-level 51 must be 1 to 100, 101 to 150 or"),
        ({"env_id": "tw-coin_collector", "model": "x", "game_level": 180, "max_steps": 99}, "--game-level 180 must be 1 to"),
        ({"env_id": "tw-coin_collector", "model": "x", "game_level": 301}, "--game-level 301 must be 1 to 100"),
        (
            {"env_id": "tw-treasure_hunter", "model": "x", "game_level": 31},
            "--game-level 31 must be 1 to 30",
        ),
        ({"group_size": 1}, "--group-size 1 must be 2 or more"),
        ({"omega": 1.0}, "--omega 1.0 must be above 0 and below 1"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0 must be positive"),
        ({"total_episodes": -5}, "--total-episodes -5 must be positive"),
        ({"step_gamma": 1.5}, "--step-gamma 1.5 must be between 0 and 1"),
        ({"beta_graph": -1.0}, "--beta-graph -1.0 must be 0 or more"),
        ({"room_size": 11}, "--room-size 11 must be from 5 to 10"),
        ({"num_boxes": 3}, "--num-boxes 3 must be 1 or 2"),
        ({"min_solution": 9, "max_solution": 8}, "--min-solution 9 must be from 1 to --max-solution 8"),
        ({"max_solution": 20}, "--max-solution 20 must not exceed the 15 steps of --max-steps"),
        ({"wall_density": 1.0}, "--wall-density, --min-solution and --max-solution leave hardly any Sokoban level"),
        ({"wall_density": 1.0, "eval_episodes": 0}, "--wall-density, --min-solution and --max-solution leave hardly any"),
        ({"env_id": "MiniGrid-WFC-MazeSimple-v0"}, "--env-id MiniGrid-WFC-MazeSimple-v0 cannot be built: "),  # at its reset
        ({"evaluate": "nothing.pt"}, "--evaluate 'nothing.pt' is no file"),
        ({"learning_rate": math.inf}, "--learning-rate inf must be positive and finite"),
        ({"seed": 2**64}, "--seed 18446744073709551616 must be between 0 and 4,294,967,295"),
        ({"eval_temperature": 50.0}, "--eval-temperature 50.0 must be 0, or between 0.01 and 10"),
        ({"eval_temperature": 1e-45}, "--eval-temperature 1e-45 must be 0, or between 0.01 and 10"),
        ({"clip_coef": 1.5}, "--clip-coef 1.5 must be above 0 and below 1"),
        ({"exp_name": "a/b"}, "--exp-name a/b is part of a folder's name"),
        ({"advantage": "grpo", "omega": 0.5}, "--omega 0.5 needs --advantage graphgpo"),
        ({"advantage": "grpo", "beta_graph": 0.5}, "--beta-graph 0.5 needs --advantage graphgpo or gigpo"),
        ({"step_gamma": 0.5}, "--step-gamma 0.5 needs --advantage gigpo"),
        ({"env_id": "MiniGrid-Empty-5x5-v0", "room_size": 7}, "--room-size 7 belongs to --env-id Sokoban"),
        ({"reward": "gym-sokoban", "step_penalty": 0.1}, "--step-penalty 0.1 contradicts --reward gym-sokoban"),
        ({"reward": "gym-sokoban", "env_id": "MiniGrid-Empty-5x5-v0"}, "--reward gym-sokoban belongs to --env-id Sokoban"),
        ({"success_reward": 0.0}, "--success-reward 0.0 must be positive"),
        ({"game_level": 2}, "--game-level 2 belongs to tw-coin_collector and tw-treasure_hunter"),
        ({"env_id": "tw-simple", "model": "x", "game_level": 2}, "--game-level 2 belongs to tw-coin_collector and tw-"),
        ({"invalid_penalty": 0.2}, "--invalid-penalty 0.2 needs --model"),
        ({"model": "x", "hidden_size": 32}, "--hidden-size 32 belongs to the small network"),
        ({"resume": True}, "--resume: there is no"),
        pytest.param(
            {"cuda": True},
            "--cuda finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one"),
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(flags, words, tmp_path):
    with pytest.raises(ArgumentError, match=re.escape(words)) as error:
        main(Args(run_dir=str(tmp_path / "runs"), **flags))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ({"env_id": "MiniGrid-Empty-5x5-v0"}, "minigrid"),
        ({"env_id": "tw-simple", "model": "x"}, "textworld"),
        ({"model": "x"}, "transformers"),
        ({"track": True}, "wandb"),
    ],
)
def test_missing_packages_are_named(flags, package, tmp_path, monkeypatch):
    find = graphgpo_sokoban.importlib.util.find_spec
    monkeypatch.setattr(graphgpo_sokoban.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ValueError, match=f"needs the package {package}: pip install {package}$"):
        main(Args(run_dir=str(tmp_path), **flags))


def test_exit_code_of_bad_arguments(tmp_path):
    process, folder = run_script(SCRIPT, tmp_path, "--omega", 2)
    assert process.returncode == 2 and folder is None
    assert process.stderr == "error: --omega 2.0 must be above 0 and below 1\n"


def test_commands_of_the_page_are_accepted(monkeypatch):
    """Every command line of the docs page but those that need a run folder: known flags, and none that contradicts another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    page = (ROOT / "docs" / "graphgpo_sokoban.md").read_text().replace("\\\n", " ")
    commands = [
        shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("python graphgpo_sokoban.py")
    ]
    assert len(commands) > 5
    for _, _, *flags in commands:
        if not {"--resume", "--evaluate"} & set(flags):
            graphgpo_sokoban.check_args(graphgpo_sokoban.parse_args(flags))


def test_resume_refuses_other_arguments(finished):
    folder, _ = finished("default")
    with pytest.raises(ValueError, match=re.escape("--omega 0.5 contradicts the run to resume, which has 0.8: drop the flag")):
        main(parse_args(["--resume", str(folder), "--omega", "0.5"]))


def test_nan_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        graphgpo_sokoban, "episode_advantage", lambda returns, trajectories, *_: np.full(len(trajectories), np.nan)
    )
    with pytest.raises(FloatingPointError, match=r"losses/policy_loss is nan at episode 8; last good checkpoint: none yet"):
        main(Args(run_dir=str(tmp_path), num_groups=2, group_size=4, eval_episodes=0))
    assert not (tmp_path / "Sokoban__graphgpo__1" / "result.json").exists()


def test_tracking_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(
        Args(
            run_dir=str(tmp_path), num_groups=2, group_size=4, eval_episodes=0, total_episodes=8, track=True, wandb_project="p"
        )
    )
    assert wandb.run is None and list(tmp_path.glob("wandb/offline-run-*"))
    assert read_json(tmp_path / "Sokoban__graphgpo__1" / "args.json")["wandb_id"]


# -------------------- Interrupted runs --------------------
def assert_equal_runs(folder, reference):
    a, b = read_pt(folder / "checkpoint.pt"), read_pt(reference / "checkpoint.pt")
    assert differences({**a, "seconds": 0, "scalars": 0}, {**b, "seconds": 0, "scalars": 0}) == []
    for file in ("model.pt", "best_model.pt"):
        a, b = ({**read_pt(path / file), "args": 0} for path in (folder, reference))
        assert differences(a, b) == []
    own = {"sps", "wall_seconds", "credit_seconds", "peak_memory_mb", "git_commit", "args"}
    a, b = ({k: v for k, v in read_json(path / "result.json").items() if k not in own} for path in (folder, reference))
    assert differences(a, b) == []
    assert curve_differences(folder, reference) == []


def stopped(run_dir, flags, signum):
    """Send a signal once a new checkpoint has been written: -> exit code, output."""
    old = [path.stat().st_mtime_ns for path in run_dir.glob("*/checkpoint.pt")]
    process = start_script(SCRIPT, run_dir, *flags)
    wait_for(lambda: [p.stat().st_mtime_ns for p in run_dir.glob("*/checkpoint.pt")] not in ([], old), process)
    process.send_signal(signum)
    output = process.communicate()[0]
    return process.returncode, output


@pytest.mark.parametrize("env", ["--total-episodes 1200", f"{MINIGRID} --total-episodes 400"], ids=["sokoban", "minigrid"])
def test_interrupted_twice_equals_uninterrupted(env, tmp_path):
    flags = f"{TINY} {env} --eval-every 200 --checkpoint-every 40".split()
    main(tyro.cli(Args, args=[*flags, "--run-dir", str(tmp_path / "reference")]))
    code, output = stopped(tmp_path / "stopped", flags, signal.SIGINT)
    assert code == 130 and "--resume" in output and "Traceback" not in output
    code, output = stopped(tmp_path / "stopped", [*flags, "--resume"], signal.SIGTERM)
    assert code == 143 and "--resume" in output and "Traceback" not in output
    (model,) = (tmp_path / "stopped").glob("*/model.pt")  # of the last iteration, to be evaluated
    assert (read_pt(model)["score"], read_pt(model)["global_step"] % 8) == (None, 0)
    time.sleep(1.0)  # TensorBoard orders event files by the second in their names
    main(tyro.cli(Args, args=[*flags, "--run-dir", str(tmp_path / "stopped"), "--resume"]))
    (folder,), (reference,) = (list((tmp_path / name).iterdir()) for name in ("stopped", "reference"))
    assert_equal_runs(folder, reference)


def test_a_run_killed_after_its_evaluation_has_every_point_once(tmp_path, monkeypatch):
    """kill -9 between the evaluation and the next checkpoint: the evaluation is made again, its points are not doubled."""
    flags = {"num_groups": 2, "group_size": 4, "eval_episodes": 4, "total_episodes": 48, "eval_every": 16, "hidden_size": 16}
    main(Args(run_dir=str(tmp_path / "reference"), **flags))
    original, calls = graphgpo_sokoban.graph_diagnostics, []

    def die(*args):
        calls.append(1)
        if len(calls) == 5:  # two groups per iteration: in the third, after the evaluation that followed the second
            raise KeyError
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(graphgpo_sokoban, "graph_diagnostics", die)
        with pytest.raises(KeyError):
            main(Args(run_dir=str(tmp_path / "dead"), **flags))
    time.sleep(1.0)
    main(Args(run_dir=str(tmp_path / "dead"), resume=True, **flags))
    (folder,), (reference,) = (list((tmp_path / name).iterdir()) for name in ("dead", "reference"))
    for tag, points in read_scalars(folder).items():
        assert len({step for step, _ in points}) == len(points), tag
    assert_equal_runs(folder, reference)


def test_one_run_one_owner(tmp_path):
    """A folder whose run goes on is neither resumed nor overwritten; killed, it is free."""
    flags = [*TINY.split(), "--total-episodes", "1000000", "--eval-every", "0", "--checkpoint-every", "8"]
    process = start_script(SCRIPT, tmp_path, *flags)
    wait_for(lambda: [*tmp_path.glob("*/checkpoint.pt")], process)
    for more in ("--resume", "--overwrite"):
        other, _ = run_script(SCRIPT, tmp_path, *flags, more)
        assert other.returncode == 2 and "is in use by a run that goes on" in other.stderr, other.stderr
    process.kill()
    process.communicate()
    small = [*TINY.split(), "--total-episodes", "8", "--run-dir", str(tmp_path), "--overwrite"]
    assert main(tyro.cli(Args, args=small))["total_episodes"] == 8


def test_an_exception_of_the_users_own_keeps_its_traceback(tmp_path):
    source = (ROOT / f"{SCRIPT}.py").read_text()
    (tmp_path / "fork.py").write_text(source.replace("    index = {}\n", "    int('a fork went wrong')\n    index = {}\n", 1))
    command = [sys.executable, str(tmp_path / "fork.py"), *TINY.split(), "--run-dir", str(tmp_path / "runs")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" in process.stderr and "a fork went wrong" in process.stderr


def test_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="--run-dir: "):
        main(Args(run_dir=str(tmp_path / "file"), num_groups=2, eval_episodes=4))


def test_evaluation_needs_no_log_probs(monkeypatch, tmp_path):
    """Of a language model they would cost as much again as a training pass."""
    calls = []
    monkeypatch.setattr(
        graphgpo_sokoban.Agent,
        "act",
        lambda self, obs, choices, *_, want_logprobs=True: (
            calls.append(want_logprobs),
            (np.zeros(len(obs), dtype=int), *[torch.zeros(len(obs), 1)] * 3),
        )[1],
    )
    args = graphgpo_sokoban.with_defaults(Args(eval_episodes=2))
    envs = graphgpo_sokoban.make_env(args, 2)
    graphgpo_sokoban.evaluate(graphgpo_sokoban.make_agent(args, envs), args, envs)
    assert set(calls) == {False}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_evaluation_says_how_far_it_is(terminal, monkeypatch, capsys):
    """A language model takes minutes for one step of all episodes. On a terminal it first ends the line of the progress."""
    args = graphgpo_sokoban.with_defaults(Args(eval_episodes=4))
    envs = graphgpo_sokoban.make_env(args, 4)
    clock = itertools.count(step=6.0)
    monkeypatch.setattr(graphgpo_sokoban.time, "time", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    graphgpo_sokoban.evaluate(graphgpo_sokoban.make_agent(args, envs), args, envs)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("") == terminal and (lines.pop(0) == "" if terminal else True)
    assert re.fullmatch(r"evaluation: \d of 4 episodes have ended after 2 steps", lines[0]) and len(lines) <= 7


def test_the_seed_decides(tmp_path):
    flags = {"num_groups": 2, "group_size": 4, "eval_episodes": 4, "total_episodes": 64}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(Args(run_dir=str(tmp_path / name), seed=seed, **flags))
    folders = [next((tmp_path / name).iterdir()) for name in "abc"]
    assert_equal_runs(folders[0], folders[1])
    assert differences(*(read_pt(folder / "model.pt")["model"] for folder in folders[1:]))


# -------------------- One file --------------------
def test_it_stands_alone(tmp_path):
    path = ROOT / f"{SCRIPT}.py"
    test_diff.test_no_project_module_is_imported(path)
    test_diff.test_importing_has_no_side_effects(path, tmp_path)
    assert not {"minigrid", "textworld", "transformers"} & set(re.findall(r"^import (\w+)", path.read_text(), re.MULTILINE)), (
        sys.path
    )
