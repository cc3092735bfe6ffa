"""Environments of other people, trained through main(): their generators, types, spaces, arguments, bad numbers and bugs."""

import collections
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import differences, read_json, read_pt, read_scalars, run_script
from gymnasium import spaces

import gipo_continuous as gipo
import ppo_baseline as ppo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's, about what is odd here on purpose
# test_diff.py finds that ppo_baseline.py has the same functions for environments: one script is enough here.
SCRIPTS = pytest.mark.parametrize("script", [gipo], ids=["gipo"])
OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "inline"])
SIZES = {"num_envs": 2, "num_steps": 8, "buffer_size": 64, "minibatch_size": 16, "updates_per_iteration": 1, "hidden_size": 8}
SIZES |= {"total_timesteps": 96, "checkpoint_every": 16, "eval_episodes": 0}


class Walk(gym.Env):
    """Add up actions and random numbers; an episode has `length` steps and ends in a termination."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    length = 7

    def __init__(self, length=None, render_mode=None):
        self.length = length or self.length

    def draw(self):
        return float(self.np_random.random())

    def observe(self):
        return np.array([self.position, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.position = 0, self.draw()
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.position += float(action[0]) + self.draw()
        return self.observe(), self.position, self.steps == self.length, False, {}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Overlap uses a process wherever the tests run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.fixture
def register():
    """register(entry_point, ...) -> an id, for as long as the test takes."""
    ids = []

    def add(entry_point, **options):
        ids.append(f"Odd{len(ids)}-v0")
        gym.register(ids[-1], entry_point, **options)
        return ids[-1]

    yield add
    for env_id in ids:
        del gym.registry[env_id]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script, env_id, ...) trains in a folder of its own, and returns it; `stop_at`: first it dies in that iteration."""
    number = iter(range(100))

    def train(script, env_id, stop_at=None, before_resume=None, **fields):
        args = script.Args(env_id=env_id, run_dir=str(tmp_path / str(next(number))), **SIZES | fields)
        if stop_at:
            calls, update_normalizer = [], script.Agent.update_normalizer

            def die(self, obs):
                calls.append(obs)
                if len(calls) == stop_at:
                    raise KeyboardInterrupt
                update_normalizer(self, obs)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(script.Agent, "update_normalizer", die)
                script.main(args)
            if before_resume:
                before_resume()
            args = dataclasses.replace(args, resume=True)
        script.main(args)
        return script.run_folder_of(args)

    return train


def state_of(folder):
    """All that a run ends with, its time apart; nan, which is not equal to itself, as None."""
    state = {**read_pt(folder / "checkpoint.pt"), "seconds": None}
    return gipo.convert(state, float, lambda number: None if math.isnan(number) else number)


def assert_equal_runs(folder, reference):
    assert differences(state_of(folder), state_of(reference)) == []


# -------------------- Random numbers --------------------
class OwnGenerator(Walk):
    """np_random is made anew from a reset's seed."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.Generator(self.bits(seed))
        return super().reset()


class LegacyGenerator(Walk):
    """np_random is a RandomState that cannot be assigned, as in shimmy's dm_control."""

    np_random = property(lambda self: self.task_random)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.task_random = np.random.RandomState(seed)
        return super().reset()


GENERATORS = {
    name: type(name, (OwnGenerator,), {"bits": getattr(np.random, name)})
    for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
}
GENERATORS["RandomState"] = LegacyGenerator


@pytest.mark.parametrize("name", GENERATORS)
@SCRIPTS
def test_every_generator_of_numpy_is_resumed_exactly(script, name, register, run, capfd):
    env_id = register(GENERATORS[name])
    resumed = run(script, env_id, stop_at=4)
    assert_equal_runs(resumed, run(script, env_id))
    assert len(state_of(resumed)["collector"]["envs"][0]["actions"]) == 6
    assert "warning" not in capfd.readouterr().err


class NoGenerator(Walk):
    """np_random is None; the random numbers are the environment's own secret."""

    np_random = None

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.secret = random.Random(seed)
        return super().reset()

    def draw(self):
        return self.secret.random()


class UnknownGenerator(NoGenerator):
    """np_random is of another library."""

    np_random = property(lambda self: self.secret)


@pytest.mark.parametrize("cls", [NoGenerator, UnknownGenerator])
@SCRIPTS
@OVERLAP
def test_an_unknown_generator_is_resumed_with_a_warning(script, overlap, cls, register, run, capfd):
    """Its episodes are the same in every new run, and go on otherwise after a resume."""
    env_id = register(cls)
    reference = run(script, env_id, overlap=overlap)
    assert_equal_runs(run(script, env_id, overlap=overlap), reference)
    assert "warning" not in capfd.readouterr().err
    folder = run(script, env_id, stop_at=4, overlap=overlap)
    assert capfd.readouterr().err.count(f": {env_id} has a state that no checkpoint holds, ") == 1
    assert state_of(folder)["iteration"] == 6 and differences(state_of(folder), state_of(reference))


class Fragile(NoGenerator):
    """It fails when it is stepped after its end."""

    def reset(self, *, seed=None, options=None):
        self.over = False
        return super().reset(seed=seed)

    def step(self, action):
        assert not self.over, "step() after the end"
        *results, self.over, truncated, info = super().step(action)
        return *results, self.over, truncated, info


@SCRIPTS
@OVERLAP
def test_an_episode_may_end_while_its_actions_are_replayed(script, overlap, register, run, monkeypatch, capfd):
    """Four of seven actions were taken; on resuming, the episode is over after two of them."""
    folder = run(
        script,
        register(Fragile),
        stop_at=4,
        before_resume=lambda: monkeypatch.setattr(Fragile, "length", 2),
        overlap=overlap,
    )
    assert "no checkpoint holds" in capfd.readouterr().err
    lengths = [value for _, value in read_scalars(folder)["charts/episodic_length"]]
    assert set(lengths) == {7, 2} and state_of(folder)["iteration"] == 6


class GlobalNumbers(Walk):
    """Random numbers from all three global generators, in the constructor, in reset and in step."""

    def __init__(self, render_mode=None):
        super().__init__()
        self.offset = self.draw()

    def draw(self):
        return random.random() + np.random.rand() + torch.rand(()).item()

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs + np.float32(self.offset), info


@pytest.mark.parametrize(
    ("script", "buffer_size"), [(gipo, 64), (ppo, 64), (ppo, 0)], ids=["gipo", "ppo-replay", "ppo-on-policy"]
)
def test_global_random_numbers_are_reproducible(script, buffer_size, register, run):
    """With and without overlap and evaluation, which is the same at any time and leaves the caller's random numbers alone."""
    env_id, sizes = register(GlobalNumbers), {"buffer_size": buffer_size}
    reference = run(script, env_id, **sizes)
    evaluations = []
    for overlap in (True, False):
        random.seed(overlap)  # what the caller has drawn before does not matter
        folder = run(script, env_id, overlap=overlap, eval_every=32, eval_episodes=3, **sizes)
        assert_equal_runs(folder, reference)
        evaluations.append(read_scalars(folder)["eval/return_mean"])
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 3
    args, model = script.saved_run(script.Args(evaluate=str(folder / "model.pt")))
    agent = script.Agent(2, 1, args)
    agent.load_state_dict(model)
    state = random.getstate()
    assert script.evaluate(agent, args, 3)["return_mean"] == pytest.approx(evaluations[0][-1][1], rel=1e-6)
    assert random.getstate() == state
    with pytest.raises(AssertionError):  # the numbers decide something
        assert_equal_runs(run(script, env_id, seed=2, **sizes), reference)


# -------------------- What step() returns --------------------
class Typed(Walk):
    """Episodes end in a termination or a truncation in turn; every other one succeeds; all of it as `kind` makes it."""

    def __init__(self, kind=lambda value: value, render_mode=None):
        super().__init__()
        self.kind, self.episode = kind, 0

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, over, _, _ = super().step(action)
        ends = over and self.episode % 2 == 0, over and self.episode % 2 == 1
        return obs, self.kind(reward), *map(self.kind, ends), {"success": self.kind(self.episode % 2 == 0)}


KINDS = {
    "numpy": lambda value: np.float64(value) if isinstance(value, float) else np.bool_(value),
    "array": np.array,
    "array of one": lambda value: np.array([value]),
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.bool),
    "tensor with a gradient": lambda value: (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) if isinstance(value, float) else torch.tensor(value)
    ),
    "tensor of one": lambda value: torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.bool),
}


@pytest.fixture
def plain_run(register, run):
    """plain_run(script) -> the folder of a run with floats and bools."""
    return lambda script, **fields: run(script, register(Typed), **fields)


@pytest.mark.parametrize("kind", KINDS)
@SCRIPTS
def test_numbers_may_be_arrays_and_tensors(script, kind, register, run, plain_run):
    """Rewards, both ends and success; equal to a run with plain ones, bit for bit."""
    folder = run(script, register(Typed, kwargs={"kind": KINDS[kind]}))
    assert_equal_runs(folder, plain_run(script))
    assert state_of(folder)["recent_successes"][:4] == [1.0, 1.0, 0.0, 0.0]


def test_numbers_may_be_arrays_in_processes_too(register, run, plain_run):
    folder = run(gipo, register(Typed, kwargs={"kind": KINDS["array of one"]}), async_envs=True)
    assert_equal_runs(folder, plain_run(gipo))


class Counts(Typed):
    """info["episode"] is the environment's own."""

    def step(self, action):
        *results, info = super().step(action)
        return *results, {**info, "episode": self.episode, "return": "unknown", "length": None}


class RightAway(Typed):
    """info["episode"] is there after a reset, too."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"episode": {"r": 0.0}, "success": True}


@pytest.mark.parametrize(
    "entry_point",
    [Counts, RightAway, lambda **kwargs: gym.wrappers.RecordEpisodeStatistics(Typed(**kwargs))],
    ids=["step", "reset", "wrapped"],
)
@SCRIPTS
def test_info_may_hold_an_episode_of_its_own(script, entry_point, register, run, plain_run):
    assert_equal_runs(run(script, register(entry_point)), plain_run(script))


class Lucky(Walk):
    """is_success stands in info only where it is true: in every fourth episode, or with a seed that 4 divides."""

    length = 5

    def reset(self, *, seed=None, options=None):
        self.episode = 0 if seed is not None else self.episode + 1
        self.lucky = seed % 4 == 0 if seed is not None else self.episode % 4 == 0
        return super().reset(seed=seed)

    def step(self, action):
        return *super().step(action)[:4], {"is_success": True} if self.lucky else {}


@SCRIPTS
@OVERLAP
def test_a_missing_success_is_a_failure_where_others_are_reported(script, overlap, register, run, capsys):
    """24 episodes of training, the fourth, eighth, ... lucky; 8 of evaluation, two of them lucky."""
    sizes = {"num_envs": 1, "num_steps": 20, "buffer_size": 120, "minibatch_size": 20, "total_timesteps": 120}
    folder = run(script, register(Lucky), overlap=overlap, **sizes | {"eval_episodes": 8})
    result, scalars = read_json(folder / "result.json"), read_scalars(folder)
    assert result["train_success_rate"] == result["eval_success_rate"] == 0.25
    assert ", success 25% of 8 episodes\n" in capsys.readouterr().out
    assert [value for _, value in scalars["eval/success_rate"]] == [0.25]
    logged = scalars["charts/episodic_success"]  # nothing is known before the first success
    assert [value for _, value in logged] == [1.0, *[0.0, 0.0, 0.0, 1.0] * 5]
    assert [step for step, _ in logged] == list(range(20, 121, 5))


# -------------------- Habits --------------------
@SCRIPTS
@pytest.mark.parametrize(
    ("reported", "expected"),
    [((math.nan, 1, math.nan), 1.0), ((1, 0, math.nan), 1.0), ((0, math.nan, 0), 0.0), ((math.nan,) * 3, math.nan)],
)
def test_a_success_stays_whatever_follows(script, reported, expected):
    """nan is no report."""

    class Reports(Walk):
        def step(self, action):
            return *super().step(action)[:4], {"success": reported[self.steps - 1]}

    env = script.EpisodeRecorder(Reports(length=3))
    env.reset(seed=0)
    *_, (*_, info) = [env.step(np.zeros(1, np.float32)) for _ in reported]
    assert info["success"] == pytest.approx(expected, nan_ok=True)


class Moves(Walk):
    """Works in a folder of its own, as if its assets lay there."""

    place = None

    def __init__(self, render_mode=None):
        super().__init__()
        os.chdir(self.place)


@SCRIPTS
@OVERLAP
def test_an_environment_that_changes_the_working_directory(script, overlap, register, tmp_path, monkeypatch, capsys):
    """The files lie where the run began; so does a stopped one, which can be resumed and evaluated from there."""
    monkeypatch.setattr(Moves, "place", tmp_path / "assets")
    Moves.place.mkdir()
    monkeypatch.chdir(tmp_path)
    update = script.Agent.update_normalizer
    sizes = SIZES | {"eval_episodes": 2, "eval_every": 32}
    args = script.Args(env_id=register(Moves), run_dir="runs", overlap=overlap, **sizes)

    def fail(self, obs):
        update(self, obs)
        if self.obs_count >= 64:
            raise RuntimeError("a bug")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug") as caught:
        patch.setattr(script.Agent, "update_normalizer", fail)
        script.main(args)
    folder = script.run_folder_of(args)
    assert caught.value.__notes__ == [f"last good checkpoint: {folder / 'checkpoint.pt'}; --resume {folder} continues from it"]
    os.chdir(tmp_path)
    script.main(dataclasses.replace(args, resume=True))
    assert f"\nfiles:  {folder}\n" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / folder).iterdir()}
    assert not [*Moves.place.iterdir()] and {"result.json", "best_model.pt"} <= files
    os.chdir(tmp_path)
    assert script.main(script.parse_args(["--evaluate", str(folder / "model.pt")]))["episodes"] == 2


class Stuck(Walk):
    def close(self):
        raise RuntimeError("viewer already closed")


@SCRIPTS
@pytest.mark.parametrize("flags", [{}, {"overlap": False}, {"async_envs": True}], ids=["overlap", "inline", "async"])
def test_an_environment_that_cannot_be_closed(script, flags, register, run, capfd):
    """Its run is finished all the same."""
    folder = run(script, register(Stuck), **flags | {"eval_episodes": 2, "eval_every": 32})
    assert read_json(folder / "result.json")["eval_episodes"] == 2
    errors = capfd.readouterr().err
    assert "warning: close() of an environment: RuntimeError: viewer already closed" in errors and "Traceback" not in errors


@SCRIPTS
def test_an_environment_without_a_spec(script, register, run):
    """Gymnasium has none of arguments that cannot be copied; the time limit that it was registered with holds."""

    class Factory:
        def __init__(self):
            self.own_lock = threading.Lock()

        def make(self, render_mode=None):
            return Walk(length=100)

    folder = run(script, register(Factory().make, max_episode_steps=5), eval_episodes=1)
    assert {value for _, value in read_scalars(folder)["charts/episodic_length"]} == {5}


@SCRIPTS
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [(np.float16, -3e4, 6e4), (np.float32, -2.0, 4.0), (np.float64, 1e9, 1e9 + 1)],
)
def test_actions_reach_every_part_of_the_box(script, kind, low, high):
    """Affinely, in its own type: the width of a Box may be more than its type holds."""
    space = spaces.Box(low, high, (1,), kind)
    actions = script.to_env_action(np.array([[-2.0], [-1.0], [0.0], [0.5], [1.0]], np.float32), space)
    assert actions.dtype == kind
    np.testing.assert_array_equal(
        actions[:, 0], [low, low, *(kind(low + share * (high - low)) for share in (0.5, 0.75)), high]
    )


@SCRIPTS
def test_a_start_on_a_full_disk_leaves_nothing_in_the_way(script, register, tmp_path, monkeypatch):
    """It dies as it writes its first file; the same command starts anew."""
    args = script.Args(env_id=register(Walk), run_dir=str(tmp_path), **SIZES)

    def full(self, text):
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_text", full)
        script.main(args)
    assert {path.name for path in script.run_folder_of(args).iterdir()} == {".lock", "args.tmp"}
    assert script.main(args)["total_timesteps"] == 96


# -------------------- Spaces --------------------
class Shows(gym.Env):
    """Always the same observation."""

    def __init__(self, space, value, actions=Walk.action_space, render_mode=None):
        self.observation_space, self.value, self.action_space = space, value, actions

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.value, {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.value, 1.0, False, False, {}


IMAGE = (np.arange(12) * 20).astype(np.uint8)
UNIT = spaces.Box(0.0, 1.0, (2,), np.float32)
HALVES = np.array([0.25, 0.5], np.float32)
OBSERVATIONS = {  # name -> space, observation, what the networks get
    "dict": (spaces.Dict(a=spaces.Discrete(3), b=UNIT), {"a": 2, "b": HALVES}, [0, 0, 1, 0.25, 0.5]),
    "tuple": (spaces.Tuple([spaces.Discrete(2), spaces.MultiBinary(2)]), (1, np.array([1, 0], np.int8)), [0, 1, 1, 0]),
    "nested": (spaces.Dict(a=spaces.Tuple([UNIT, spaces.Discrete(2)])), {"a": (HALVES, 0)}, [0.25, 0.5, 1, 0]),
    "discrete": (spaces.Discrete(4, start=2), 3, [0, 1, 0, 0]),
    "multi-discrete": (spaces.MultiDiscrete([3, 2]), np.array([2, 0]), [0, 0, 1, 1, 0]),
    "multi-binary": (spaces.MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
    "image": (spaces.Box(0, 255, (2, 2, 3), np.uint8), IMAGE.reshape(2, 2, 3), IMAGE.tolist()),
    "number": (spaces.Box(0.0, 1.0, (), np.float32), np.array(0.5, np.float32), [0.5]),
    "doubles": (spaces.Box(0.0, 1.0, (2,), np.float64), HALVES.astype(np.float64), [0.25, 0.5]),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
@SCRIPTS
def test_observations_become_a_vector(script, name, register, run):
    space, value, expected = OBSERVATIONS[name]
    env_id = register(Shows, kwargs={"space": space, "value": value}, max_episode_steps=5)
    folder = run(script, env_id, overlap=script is gipo, eval_episodes=1)
    replay = read_pt(folder / "checkpoint.pt")["replay"]
    for key in ("obs", "next_obs"):
        np.testing.assert_array_equal(replay[key], np.broadcast_to(np.float32(expected), (8, 8, len(expected))))
    model = read_pt(folder / "model.pt")["model"]
    np.testing.assert_allclose(model["obs_mean"], expected, rtol=1e-6)


NO_VECTORS = {
    "sequence": (spaces.Sequence(spaces.Discrete(3)), Walk.action_space, "observations of no fixed size"),
    "graph": (spaces.Graph(UNIT, None), Walk.action_space, "observations of no fixed size"),
    "dict of a sequence": (spaces.Dict(a=spaces.Sequence(UNIT)), Walk.action_space, "observations of no fixed size"),
    "nothing": (spaces.Box(0.0, 1.0, (0,)), Walk.action_space, "empty observations"),
    "no action": (UNIT, spaces.Box(0.0, 1.0, (0,)), "choose one with a Box of shape"),
    "discrete action": (UNIT, spaces.Discrete(3), "choose one with a Box of shape"),
    "binary action": (UNIT, spaces.MultiBinary(3), "choose one with a Box of shape"),
    "whole action": (UNIT, spaces.Box(0, 3, (2,), np.int64), "choose one with real numbers"),
    "unbounded action": (UNIT, spaces.Box(-np.inf, 1.0, (2,)), "choose one with a finite Box"),
}


@pytest.mark.parametrize("name", NO_VECTORS)
@SCRIPTS
@OVERLAP
def test_spaces_that_are_no_vectors_are_refused(script, overlap, name, register, tmp_path):
    """In one sentence that names the flag, before anything is written."""
    space, actions, text = NO_VECTORS[name]
    env_id = register(Shows, kwargs={"space": space, "value": space.sample(), "actions": actions}, max_episode_steps=5)
    args = script.Args(env_id=env_id, run_dir=str(tmp_path / "runs"), overlap=overlap, **SIZES)
    with pytest.raises(script.ArgumentError, match=rf"^--env-id {env_id} has .*{text}") as caught:
        script.main(args)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


# -------------------- --env-kwargs --------------------
@SCRIPTS
def test_env_kwargs_reach_the_constructor(script, register, run):
    """In training and in evaluation, Gymnasium's own arguments among them; a saved model keeps them."""
    env_id = register(Walk)
    for kwargs in ('{"length": 3}', '{"max_episode_steps": 3}'):
        folder = run(script, env_id, env_kwargs=kwargs, eval_episodes=1)
        assert {value for _, value in read_scalars(folder)["charts/episodic_length"]} == {3.0}
        args, _ = script.saved_run(script.Args(evaluate=str(folder / "model.pt")))
        assert args.env_kwargs == kwargs
        env = script.make_env(args, 0)()
        env.reset()
        assert [any(env.step(np.zeros(1, np.float32))[2:4]) for _ in range(3)] == [False, False, True]


@SCRIPTS
def test_env_kwargs_reach_meta_world(script):
    for version in ("v1", "v2"):
        args = script.Args(env_id="reach-v3", env_kwargs=json.dumps({"reward_function_version": version}))
        assert script.make_env(args, 0)().unwrapped.reward_function_version == version


@pytest.mark.parametrize("kwargs", ["", "{", "[1]", '"length"', "3", "null", "{'length': 3}"])
@SCRIPTS
def test_env_kwargs_that_are_no_object_are_refused(script, kwargs, register, tmp_path):
    args = script.Args(env_id=register(Walk), run_dir=str(tmp_path / "runs"), env_kwargs=kwargs, **SIZES)
    with pytest.raises(script.ArgumentError, match=r"^--env-kwargs .* must be a JSON object") as caught:
        script.main(args)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


@SCRIPTS
@OVERLAP
@pytest.mark.parametrize("env_id", ["reach-v3", "HalfCheetah-v5", None])
def test_unknown_env_kwargs_are_refused(script, overlap, env_id, register, tmp_path):
    """By the constructor itself, or by the one to which it passes them on, as HalfCheetah's does."""
    env_id = env_id or register(Walk)
    args = script.Args(env_id=env_id, run_dir=str(tmp_path / "runs"), overlap=overlap, env_kwargs='{"wings": 2}', **SIZES)
    with pytest.raises(script.ArgumentError, match=rf'^--env-id {env_id} .*--env-kwargs {{"wings": 2}}.*wings') as caught:
        script.main(args)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


# -------------------- Bad numbers --------------------
class Glitch(Walk):
    """One bad number in environment 1. An episode has five steps; the first one of training is number 1."""

    length, where, when, value = 5, None, 6, math.nan

    def is_bad(self, where, step):
        return (self.index, self.episode, self.where, self.steps) == (1, self.when, where, step)

    def reset(self, *, seed=None, options=None):
        self.index, self.episode = (seed % 1000, 0) if seed is not None else (self.index, self.episode + 1)
        return super().reset(seed=seed)

    def observe(self):
        obs = super().observe()
        if self.is_bad("first", 0) or self.is_bad("next", 2) or self.is_bad("final", 5):
            obs[0] = self.value
        return obs

    def step(self, action):
        assert np.isfinite(action).all(), "the policy has acted on a bad number"
        obs, reward, *rest = super().step(action)
        return obs, self.value if self.is_bad("reward", 2) else reward, *rest


WHERE = {  # name -> attributes of Glitch, what the message says; two environments, so a step of both is two steps
    "reward": ("reward", 6, r"reward {} of environment 1 at step 54"),
    "next": ("next", 6, r"observation after a step {} of environment 1 at step 54"),
    "final": ("final", 6, r"observation after a step {} of environment 1 at step 60"),
    "first": ("first", 6, r"observation {} of environment 1 at step 5[02]"),
    "first after a rollout": ("first", 9, r"observation {} of environment 1 at step 8[02]"),
    "last of a rollout": ("final", 8, r"observation after a step {} of environment 1 at step 80"),
}
RUNS = {  # name -> script, flags
    "gipo": (gipo, {"overlap": True}),
    "gipo-inline": (gipo, {"overlap": False, "policy_head": "gaussian"}),
    "ppo": (ppo, {"overlap": True, "policy_head": "categorical"}),
    "ppo-on-policy": (ppo, {"buffer_size": 0}),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e20])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", RUNS)
def test_a_bad_number_is_named_and_the_last_checkpoint_is_good(name, where, value, register, tmp_path, monkeypatch):
    """Quantity, environment and step; the checkpoint in the message is finite throughout, and the run goes on from it."""
    script, flags = RUNS[name]
    args = script.Args(env_id=register(Glitch), run_dir=str(tmp_path), **SIZES | flags)
    with monkeypatch.context() as patch, pytest.raises(script.BadNumber) as caught:
        for key, attribute in zip(("where", "when", "value"), (*WHERE[where][:2], value), strict=True):
            patch.setattr(Glitch, key, attribute)
        script.main(args)
    shown = re.escape(str(torch.tensor(value).item()))
    pattern = rf"--env-id {args.env_id}: {WHERE[where][2].format(shown)}; last good checkpoint: (.*)"
    message = re.fullmatch(pattern, str(caught.value))
    assert message, caught.value
    checkpoint = read_pt(script.run_folder_of(args) / "checkpoint.pt")
    assert message[1] == str(script.run_folder_of(args) / "checkpoint.pt") and checkpoint["iteration"] >= 2
    checkpoint["recent_successes"] = None  # nan stands for none there
    for kind, is_finite in ((torch.Tensor, lambda tensor: tensor.isfinite().all()), (float, math.isfinite)):
        answers = []
        gipo.convert({**checkpoint, "next_rollout": None}, kind, lambda number: answers.append(is_finite(number)))  # noqa: B023
        assert answers and all(answers)
    if checkpoint["next_rollout"]:
        assert all(column.isfinite().all() for column in checkpoint["next_rollout"]["data"].values())
    result = script.main(dataclasses.replace(args, resume=True))
    assert result["total_timesteps"] == 96 and math.isfinite(result["train_return_mean"])


def test_large_numbers_that_training_survives_are_none_of_these(register, run, monkeypatch):
    for key, attribute in {"where": "reward", "value": 1e10}.items():
        monkeypatch.setattr(Glitch, key, attribute)
    assert state_of(run(gipo, register(Glitch)))["iteration"] == 6


class SpoilsEvaluations(Walk):
    """A bad number in evaluations alone, whose seeds are large."""

    where, value, evaluates = None, math.nan, False

    def reset(self, *, seed=None, options=None):
        self.evaluates = self.evaluates if seed is None else seed >= 10_000
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.evaluates and self.steps == 3:
            obs, reward = (obs * self.value, reward) if self.where == "observation" else (obs, self.value)
        return obs, reward, *rest


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["observation", "reward"])
@SCRIPTS
def test_a_bad_number_in_an_evaluation_is_named(script, where, value, register, tmp_path, monkeypatch):
    """Before it is written anywhere as a score."""
    monkeypatch.setattr(SpoilsEvaluations, "where", where)
    monkeypatch.setattr(SpoilsEvaluations, "value", value)
    sizes = SIZES | {"eval_episodes": 2, "policy_head": "categorical"}
    args = script.Args(env_id=register(SpoilsEvaluations), run_dir=str(tmp_path), **sizes)
    with pytest.raises(script.BadNumber, match=args.env_id):
        script.main(args)
    assert not [*script.run_folder_of(args).glob("*model.pt")]


class Grown(Walk):
    """Its observation has got another entry since it was trained on."""

    wide = False

    def __init__(self, render_mode=None):
        super().__init__()
        if self.wide:
            self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def observe(self):
        return np.append(super().observe(), 0.0).astype(np.float32) if self.wide else super().observe()


@SCRIPTS
def test_a_model_of_other_observations_is_refused(script, register, tmp_path, monkeypatch):
    args = script.Args(env_id=register(Grown), run_dir=str(tmp_path), **SIZES | {"eval_episodes": 1})
    script.main(args)
    model = str(script.run_folder_of(args) / "model.pt")
    assert script.main(script.parse_args(["--evaluate", model]))["episodes"] == 1
    monkeypatch.setattr(Grown, "wide", True)
    with pytest.raises(script.ArgumentError, match=r"model.pt does not fit .*: has Agent or the environment changed\?"):
        script.main(script.parse_args(["--evaluate", model]))


# -------------------- Bugs --------------------
class Unpicklable(Exception):
    """It cannot cross to another process."""

    def __init__(self, text):
        super().__init__(text, lambda: None)

    def __str__(self):
        return self.args[0]


class OfTwo(Exception):
    """Nobody can build it from its text."""

    def __init__(self, text, number):
        super().__init__(text)


class Buggy(Walk):
    """It fails in one of its functions, in the second episode if it gets there."""

    where, error = None, None

    def __init__(self, render_mode=None):
        super().__init__()
        self.episode = 0
        self.fail_if("constructor")

    def fail_if(self, where):
        if self.where == where:
            raise self.error

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        if self.episode == 3:
            self.fail_if("reset")
        return super().reset(seed=seed)

    def step(self, action):
        if self.episode == 3:
            self.fail_if("step")
        return super().step(action)


ERRORS = [
    ValueError("operands could not be broadcast"),
    KeyError("goal"),
    AssertionError(),
    OSError("98 % of the disk is full"),
]
ERRORS += [TypeError("Robot.__init__() missing 1 required positional argument: 'arms'")]
OF_A_CONNECTION = [ConnectionResetError("the simulator hung up"), EOFError("no more frames")]  # not of ours


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
@pytest.mark.parametrize("error", ERRORS + OF_A_CONNECTION, ids=lambda error: type(error).__name__)
@SCRIPTS
@OVERLAP
def test_a_bug_of_the_environment_keeps_its_type_and_traceback(script, overlap, error, where, register, tmp_path, monkeypatch):
    """It is no ArgumentError or BadNumber of ours, which would be one line without a place."""
    monkeypatch.setattr(Buggy, "where", where)
    monkeypatch.setattr(Buggy, "error", error)
    args = script.Args(env_id=register(Buggy), run_dir=str(tmp_path), overlap=overlap, **SIZES)
    with pytest.raises(type(error)) as caught:
        script.main(args)
    assert type(caught.value) is type(error) and all(str(argument) in str(caught.value) for argument in error.args)
    text = "".join(traceback.format_exception(caught.value))
    assert "in fail_if" in text and f'self.fail_if("{where}")' in text


@SCRIPTS
def test_a_new_run_that_fails_does_not_point_to_the_one_it_was_to_replace(script, register, tmp_path, monkeypatch):
    args = script.Args(env_id=register(Buggy), run_dir=str(tmp_path), **SIZES)
    script.main(args)
    monkeypatch.setattr(Buggy, "where", "constructor")
    monkeypatch.setattr(Buggy, "error", ValueError("no licence"))
    for again, notes in (({"overwrite": True}, False), ({"resume": str(script.run_folder_of(args))}, False)):
        if again.get("resume"):
            (script.run_folder_of(args) / "result.json").unlink()
            notes = True
        with pytest.raises(ValueError, match="no licence") as caught:
            script.main(dataclasses.replace(args, **again))
        assert bool(getattr(caught.value, "__notes__", [])) == notes


@pytest.mark.parametrize("error", ERRORS + OF_A_CONNECTION, ids=lambda error: type(error).__name__)
def test_a_bug_in_a_process_of_one_environment_keeps_its_type(error, register, tmp_path, monkeypatch, recwarn):
    """Its place is told beside it."""
    monkeypatch.setattr(Buggy, "where", "step")
    monkeypatch.setattr(Buggy, "error", error)
    args = gipo.Args(env_id=register(Buggy), run_dir=str(tmp_path), overlap=False, async_envs=True, **SIZES)
    with pytest.raises(type(error)) as caught:
        gipo.main(args)
    assert "in fail_if" in str(caught.value.__cause__)


@SCRIPTS
@OVERLAP
def test_a_bug_that_cannot_be_sent_is_described(script, overlap, register, tmp_path, monkeypatch):
    monkeypatch.setattr(Buggy, "where", "step")
    monkeypatch.setattr(Buggy, "error", Unpicklable("no way"))
    args = script.Args(env_id=register(Buggy), run_dir=str(tmp_path), overlap=overlap, **SIZES)
    with pytest.raises(RuntimeError if overlap else Unpicklable, match="no way") as caught:
        script.main(args)
    assert "in fail_if" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("text", ["no way", "98 % of the disk is full"])
@SCRIPTS
def test_a_bug_that_cannot_be_sent_by_a_process_of_one_environment_ends_the_run(script, text, register, tmp_path, monkeypatch):
    """With its text, and no process left."""
    monkeypatch.setattr(Buggy, "where", "step")
    args = script.Args(env_id=register(Buggy), run_dir=str(tmp_path), async_envs=True, **SIZES)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    for error in (Unpicklable(text), OfTwo(text, 2)):
        monkeypatch.setattr(Buggy, "error", error)
        signal.alarm(30)
        try:
            with pytest.raises(RuntimeError, match=rf"{type(error).__name__}: .*{text}"):
                script.main(dataclasses.replace(args, overwrite=True))
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()


class Elsewhere(Walk):
    """It can be built in the process that has the number `here` only."""

    here = None

    def __init__(self):
        if os.getpid() != self.here:
            raise OSError("the port is taken")


@SCRIPTS
def test_a_constructor_that_fails_in_a_process_of_its_own_ends_the_run(script, register, tmp_path, monkeypatch):
    """As it is, and no process is left, for which Python would wait at its end."""
    monkeypatch.setattr(Elsewhere, "here", os.getpid())
    args = script.Args(env_id=register(Elsewhere), run_dir=str(tmp_path), overlap=False, async_envs=True, **SIZES)
    with pytest.raises(OSError, match="the port is taken"):
        script.main(args)
    assert not multiprocessing.active_children()


class Exits(Walk):
    """It ends its process."""

    def step(self, action):
        os._exit(3)


@SCRIPTS
@pytest.mark.parametrize("async_envs", [False, True])
def test_a_process_that_ends_is_named(script, async_envs, register, tmp_path):
    """As when the system kills it for want of memory."""
    args = script.Args(env_id=register(Exits), run_dir=str(tmp_path), async_envs=async_envs, **SIZES)
    with pytest.raises(RuntimeError, match=r"a process of the environments has died \(exit code 3;"):
        script.main(args)


class Ledger(Walk):
    """Episodes of one step, of which the n-th pays n."""

    length, paid = 1, 0

    def step(self, action):
        obs, _, *rest = super().step(action)
        self.paid += 1
        return obs, float(self.paid), *rest


@SCRIPTS
def test_logged_returns_are_those_of_the_environment(script, register, run):
    """Not scaled, at the steps at which they ended; a run's own average is that of the last hundred episodes."""
    folder = run(script, register(Ledger), total_timesteps=240, reward_scale=0.01)
    scalars = read_scalars(folder)
    assert sorted(scalars["charts/episodic_return"]) == [(2 * n, float(n)) for n in range(1, 121) for _ in range(2)]
    assert {value for _, value in scalars["charts/episodic_length"]} == {1.0}
    assert read_json(folder / "result.json")["train_return_mean"] == sum(range(71, 121)) / 50


@SCRIPTS
def test_stored_advantages_survive_a_resume(script, register, run):
    """Without recomputation the replay's own advantages are what an update reads."""
    env_id, flags = register(Walk), {"recompute_advantages": False, "checkpoint_every": 32}
    whole, resumed = (run(script, env_id, stop_at=stop_at, **flags) for stop_at in (None, 4))
    assert differences(state_of(whole), state_of(resumed)) == []


@SCRIPTS
def test_a_batch_that_scores_otherwise_than_the_actor_is_noticed(script, register, monkeypatch):
    """The alarm gipo/log_ratio_max: the largest difference of a joint log-probability."""
    collector = script.Collector(script.Args(env_id=register(Walk), **SIZES))
    collector.reset()
    weights = collector.agent.state_dict()
    assert collector.collect(weights, 1)["log_ratio_max"] < 1e-4
    original = script.Agent.get_action_and_logprob

    def scored(self, obs, action=None, **kwargs):
        out, logprob, entropy = original(self, obs, action, **kwargs)
        return out, logprob + (0.25 if action is not None else 0.0), entropy

    monkeypatch.setattr(script.Agent, "get_action_and_logprob", scored)
    assert collector.collect(weights, 1)["log_ratio_max"] == pytest.approx(0.25, abs=1e-4)
    collector.close()


@SCRIPTS
def test_a_learner_that_scores_otherwise_than_the_actor_is_noticed(script, register, tmp_path, monkeypatch):
    """The same alarm for what only the learning side does, such as a GPU's rounding: seen in the first iteration."""

    class Learner(script.Agent):
        def to(self, device):  # the collector's own never moves
            self.learns = True
            return super().to(device)

        def get_action_and_logprob(self, obs, action=None, **kwargs):
            out, logprob, entropy = super().get_action_and_logprob(obs, action, **kwargs)
            return out, logprob + (0.25 if hasattr(self, "learns") else 0.0), entropy

    monkeypatch.setattr(script, "Agent", Learner)
    with pytest.warns(UserWarning, match=r"log_ratio_max is above 0\.01"):
        script.main(script.Args(env_id=register(Walk), run_dir=str(tmp_path), overlap=False, **SIZES))
    (folder,) = tmp_path.iterdir()
    (_, first), *rest = read_scalars(folder)["gipo/log_ratio_max"]
    assert first == pytest.approx(0.25, abs=1e-4) and rest and max(value for _, value in rest) < 1e-4


@SCRIPTS
def test_a_replay_that_no_gpu_can_hold_is_refused(script, register, tmp_path, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2e3))
    monkeypatch.setattr(script.Agent, "to", lambda self, device: self)
    args = script.Args(env_id=register(Walk), run_dir=str(tmp_path / "runs"), cuda=True, overlap=False, **SIZES)
    with pytest.raises(script.ArgumentError, match=r"--buffer-size \d+ needs 0 GB, of 0: lower it"):
        script.main(args)
    assert not (tmp_path / "runs").exists()


class Simulator(Walk):
    """It starts a program and ends it as one does, at leisure."""

    folder = None

    def __init__(self):
        self.program = subprocess.Popen(["sleep", "1000"])
        (self.folder / str(self.program.pid)).touch()

    def close(self):
        self.program.terminate()
        self.program.wait()
        time.sleep(1.5)
        (self.folder / str(self.program.pid)).unlink(missing_ok=True)


@SCRIPTS
@pytest.mark.parametrize("async_envs", [False, True])
def test_programs_that_an_environment_starts_are_ended(script, async_envs, register, run, tmp_path, monkeypatch):
    """Ctrl-C does not reach them, SIGTERM does; a close() of three seconds runs to its end."""
    monkeypatch.setattr(Simulator, "folder", tmp_path / "programs")
    Simulator.folder.mkdir()
    folder = run(script, register(Simulator), async_envs=async_envs)
    assert (folder / "result.json").exists() and not [*Simulator.folder.iterdir()]


@SCRIPTS
def test_a_stopped_run_waits_for_its_simulators(script, register, run, tmp_path, monkeypatch):
    """Its checkpoint is written; two seconds, as after an error, would be too short for their close()."""
    monkeypatch.setattr(Simulator, "folder", tmp_path / "programs")
    Simulator.folder.mkdir()
    original, stopped = script.Agent.update_normalizer, []

    def stop(self, obs):
        if not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        original(self, obs)

    monkeypatch.setattr(script.Agent, "update_normalizer", stop)
    with pytest.raises(SystemExit) as ended:
        run(script, register(Simulator))
    assert ended.value.code == 128 + signal.SIGTERM and not [*Simulator.folder.iterdir()]


class LateSimulator(Walk):
    """The first step of all stops the run, and starts a program after that."""

    codes = None

    def step(self, action):
        if not self.codes:
            os.kill(os.getpid(), signal.SIGTERM)
            self.codes.append(None)
            self.program = subprocess.Popen(["sleep", "1000"])
        return super().step(action)

    def close(self):
        if hasattr(self, "program"):
            self.program.terminate()
            self.codes.append(self.program.wait(timeout=20))


@SCRIPTS
def test_a_program_that_starts_after_the_stop_can_be_ended(script, register, run, monkeypatch):
    """It must not inherit that copies of the signal are ignored."""
    monkeypatch.setattr(LateSimulator, "codes", [])
    with pytest.raises(SystemExit):
        run(script, register(LateSimulator), overlap=False)
    assert LateSimulator.codes == [None, -signal.SIGTERM]


@SCRIPTS
def test_the_wait_for_a_rollout_before_a_checkpoint_is_counted(script, register, run, monkeypatch):
    """A slow simulator with a checkpoint in every iteration: the environment takes most of the time, not more than all."""
    monkeypatch.setattr(Walk, "draw", lambda self: time.sleep(0.01) or 0.5)
    extra = {"buffer_size": 64} if script is gipo else {"buffer_size": 64, "recompute_advantages": True}
    result = read_json(run(script, register(Walk), **extra) / "result.json")
    assert result["sps"] < 110 / 0.98  # 10 ms a step, one environment after the other: 100 steps a second at most


@SCRIPTS
def test_a_process_that_ends_between_two_steps_is_named(script, register, tmp_path):
    collector = script.Collector(script.Args(env_id=register(Walk), async_envs=True, **SIZES))
    collector.reset()
    collector.envs[0].process.kill()
    collector.envs[0].process.join()
    with pytest.raises(RuntimeError, match="a process of the environments has died"):
        collector.collect(collector.agent.state_dict(), 1)
    collector.close()
    assert not any(env.process.is_alive() for env in collector.envs)  # Python would wait for them at its end


class Closed(Buggy):
    """It counts those that are open."""

    open = 0

    def __init__(self, render_mode=None):
        super().__init__()
        Closed.open += 1

    def close(self):
        Closed.open -= 1


@pytest.mark.parametrize("where", ["constructor", "step", None])
@SCRIPTS
def test_an_evaluation_closes_its_environments(script, where, register, monkeypatch):
    """Also after an error: what a simulator has started would go on."""
    args = script.Args(env_id=register(Closed), **SIZES)
    agent = script.Agent(2, 1, args)
    monkeypatch.setattr(Closed, "error", ValueError("lost"))
    if where == "constructor":  # of the third
        monkeypatch.setattr(Closed, "fail_if", lambda self, at: None if Closed.open < 2 else (_ for _ in ()).throw(self.error))
    elif where:
        monkeypatch.setattr(Closed, "step", lambda self, action: (_ for _ in ()).throw(self.error))
    with pytest.raises(ValueError, match="lost") if where else contextlib.nullcontext():
        script.evaluate(agent, args, 3)
    assert Closed.open == 0


@SCRIPTS
def test_a_constructor_that_fails_closes_the_environments_before_it(script, register, tmp_path, monkeypatch):
    """Of the second environment: the first one's simulator would go on."""
    monkeypatch.setattr(Closed, "error", ValueError("no licence"))
    monkeypatch.setattr(Closed, "fail_if", lambda self, at: None if Closed.open < 1 else (_ for _ in ()).throw(self.error))
    with pytest.raises(ValueError, match="no licence"):
        script.main(script.Args(env_id=register(Closed), run_dir=str(tmp_path), overlap=False, **SIZES))
    assert Closed.open == 0


@pytest.mark.parametrize("what", ["reset", "actions"])
@SCRIPTS
def test_an_environment_that_cannot_be_used_is_closed(script, what, register, tmp_path, monkeypatch):
    """The constructor may have started a simulator."""
    if what == "reset":
        monkeypatch.setattr(Closed, "reset", lambda self, **_: (_ for _ in ()).throw(ValueError("no scene")))
    else:
        monkeypatch.setattr(Closed, "action_space", spaces.Discrete(2))
    with pytest.raises(ValueError, match="no scene" if what == "reset" else "choose one with a Box"):
        script.main(script.Args(env_id=register(Closed), run_dir=str(tmp_path), overlap=False, **SIZES))
    assert Closed.open == 0


class Drawn(Walk):
    """Its action space is drawn in the constructor."""

    bounds: ClassVar = []

    def __init__(self):
        self.bounds.append(len(self.bounds) + 1.0)
        self.action_space = gym.spaces.Box(-self.bounds[-1], self.bounds[-1], (1,))


@SCRIPTS
def test_environments_with_different_spaces_are_refused(script, register, tmp_path, monkeypatch):
    """Actions are mapped to one Box for all."""
    monkeypatch.setattr(Drawn, "bounds", [])
    args = script.Args(env_id=register(Drawn), run_dir=str(tmp_path), overlap=False, **SIZES)
    with pytest.raises(script.ArgumentError, match="has environments with different spaces"):
        script.main(args)


@pytest.mark.parametrize("async_envs", [False, True])
@SCRIPTS
def test_an_observation_of_another_shape_than_its_space_is_an_error(script, async_envs, register, tmp_path, monkeypatch):
    """One number would stand for all of them."""
    monkeypatch.setattr(Walk, "step", lambda self, action: (np.zeros(1, np.float32), 0.0, False, False, {}))
    args = script.Args(env_id=register(Walk), run_dir=str(tmp_path), overlap=False, async_envs=async_envs, **SIZES)
    with pytest.raises(ValueError, match=r"observations have the shape \(1,\), and the space \(2,\)"):
        script.main(args)


Pair = collections.namedtuple("Pair", "x y")


@pytest.mark.parametrize("async_envs", [False, True])
def test_observations_may_be_named_tuples(async_envs, register, run, monkeypatch):
    reset, step = Walk.reset, Walk.step

    def named_step(self, action):
        obs, *others = step(self, action)
        return Pair(*obs), *others

    monkeypatch.setattr(Walk, "reset", lambda self, **kwargs: (Pair(*reset(self, **kwargs)[0]), {}))
    monkeypatch.setattr(Walk, "step", named_step)
    assert (run(gipo, register(Walk), async_envs=async_envs) / "result.json").exists()


class Late(Walk):
    """The first environment fails at once, the others take their time."""

    def reset(self, *, seed=None, options=None):
        if seed == 1000:
            raise ValueError("no licence")
        time.sleep(100)


@SCRIPTS
@OVERLAP
def test_a_constructor_that_fails_waits_for_no_other(script, overlap, register, tmp_path):
    args = script.Args(env_id=register(Late), run_dir=str(tmp_path), overlap=overlap, async_envs=True, **SIZES)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="no licence"):
        script.main(args)
    assert time.monotonic() - begin < 30 and not multiprocessing.active_children()


class Filmed(Walk):
    metadata: ClassVar = {"render_modes": ["rgb_array"]}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize("stopped", [True, False])
@SCRIPTS
def test_ctrl_c_ends_the_encoder_of_a_video_too(script, stopped, register, tmp_path, monkeypatch):
    """That is no error of the run, which goes on to its checkpoint; without a signal it is one."""
    from moviepy import ImageSequenceClip

    signals = []

    def fail(self, *args, **kwargs):
        signals.extend([signal.SIGINT] * stopped)
        raise BrokenPipeError("ffmpeg has ended")

    monkeypatch.setattr(ImageSequenceClip, "write_videofile", fail)
    args = script.Args(env_id=register(Filmed), **SIZES)
    with contextlib.nullcontext() if stopped else pytest.raises(BrokenPipeError):
        script.evaluate(script.Agent(2, 1, args), args, 1, tmp_path, signals)


@SCRIPTS
def test_a_video_is_as_fast_as_the_environment(script, register, tmp_path, monkeypatch):
    """It has every fourth frame; 80 frames a second are Meta-World's."""
    from moviepy import ImageSequenceClip

    speeds = []
    monkeypatch.setattr(ImageSequenceClip, "write_videofile", lambda self, *args, **kwargs: speeds.append(self.fps))
    for rate in ({"render_fps": 20}, {"render_fps": None}, {}):
        monkeypatch.setattr(Filmed, "metadata", {"render_modes": ["rgb_array"]} | rate)
        args = script.Args(env_id=register(Filmed), **SIZES)
        script.evaluate(script.Agent(2, 1, args), args, 1, tmp_path)
    assert speeds == [5, 20, 20]


BUG = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
class Bug(PendulumEnv):
    def step(self, action):
        return self.no_such_thing
gymnasium.register("Bug-v0", Bug, max_episode_steps=50)
"""


def test_a_bug_is_shown_with_its_place_on_the_command_line(tmp_path):
    """Exit code 1 as of any Python program, not 2 as of wrong arguments."""
    (tmp_path / "of_mine.py").write_text(BUG)
    flags = ["--env-id", "of_mine:Bug-v0", "--total-timesteps", 200]
    process, _ = run_script("gipo_continuous", tmp_path / "runs", *flags, PYTHONPATH=str(tmp_path))
    assert process.returncode == 1 and "of_mine.py" in process.stderr and "return self.no_such_thing" in process.stderr
    assert "\nAttributeError: 'Bug' object has no attribute 'no_such_thing'" in process.stderr


# -------------------- Global generators in processes of --async-envs --------------------
class Draws(gym.Env):
    """Its reward is a draw from numpy's global generator."""

    observation_space, action_space = gym.spaces.Box(-1.0, 1.0, (1,)), gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(np.random.rand()), False, False, {}


@SCRIPTS
def test_processes_of_environments_draw_different_numbers(script):
    gym.register("Draws-v0", entry_point=Draws, max_episode_steps=10, disable_env_checker=True)
    collector = script.Collector(script.Args(env_id="Draws-v0", num_envs=3, async_envs=True))
    collector.reset()
    rewards = collector.collect(collector.agent.state_dict(), 1)["data"]["rewards"][0].tolist()
    collector.close()
    del gym.registry["Draws-v0"]
    assert len(set(rewards)) == 3
