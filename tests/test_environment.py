"""What the scripts rely on in Gymnasium, Meta-World, tyro and torch, and the environment code built on it."""

import contextlib
import dataclasses
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import metaworld
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, differences, read_pt, read_scalars
from metaworld.policies import ENV_POLICY_MAP
from scipy.spatial.transform import Rotation

import gipo_continuous as gipo
import ppo_baseline as ppo

pytestmark = [
    pytest.mark.filterwarnings("ignore:Constant"),  # the experts ask for more than the action box allows
    pytest.mark.filterwarnings("ignore:.*precision lowered"),  # the bounds of MT10's observations, which nobody uses
]
SCRIPTS = pytest.mark.parametrize("script", [gipo, ppo], ids=["gipo", "ppo"])


class Counting(gym.Env):
    """Observation (episode, step), reward = action; even episodes terminate and odd ones are truncated after `length` steps.

    `successes` is what info["success"] says at each step, None leaves it out. A reset seed makes the episodes longer.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, length=3, successes=None, render_mode=None):
        self.shortest, self.length, self.successes, self.episode = length, length, successes, -1

    def observe(self):
        return np.array([self.episode, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.length = self.shortest + seed % 1000
            self.episode = -1
        self.episode, self.steps = self.episode + 1, 0
        return self.observe(), {"of": "reset"}

    def step(self, action):
        self.steps += 1
        done, terminates = self.steps == self.length, self.episode % 2 == 0
        info = {} if self.successes is None else {"success": self.successes[self.steps - 1]}
        return self.observe(), float(action[0]), done and terminates, done and not terminates, info


def expert_action(task, policy, obs, rng, noise=0.2):
    """The scripted expert with noise, so that things are touched; uniform actions where there is no expert."""
    if task not in ENV_POLICY_MAP:
        return rng.uniform(-1, 1, 6 if task == "HalfCheetah-v5" else 1).astype(np.float32)
    return np.clip(policy.get_action(np.asarray(obs, np.float64)) + noise * rng.normal(size=4), -1, 1).astype(np.float32)


def goal_of(task):
    return tuple(pickle.loads(task.data)["rand_vec"])


# -------------------- Meta-World --------------------
@pytest.fixture(scope="module")
def stock_reach():
    """The stock package's reach-v3, 50 goals of seed 1."""
    env = gym.make("Meta-World/MT1", env_name="reach-v3", seed=1, disable_env_checker=True)
    yield env
    env.close()


def test_stock_episode(stock_reach):
    """Success comes and goes, `terminated` stays False, truncation is at 500, and one step more is an error."""
    rng, policy = np.random.default_rng(0), ENV_POLICY_MAP["reach-v3"]()
    obs, _ = stock_reach.reset()
    successes, truncations = [], []
    for step in range(500):
        action = expert_action("reach-v3", policy, obs, rng) if step < 250 else -np.ones(4, np.float32)
        obs, reward, terminated, truncated, info = stock_reach.step(action)
        assert not terminated and 0.0 <= reward <= 10.0
        successes.append(info["success"])
        truncations.append(truncated)
    assert max(successes) == 1.0 and successes[-1] == 0.0
    assert truncations == [False] * 499 + [True]
    assert obs.shape == (39,) and info["episode"]["l"] == 500
    with pytest.raises(ValueError, match="truncate"):
        stock_reach.unwrapped.step(np.zeros(4, np.float32))


def test_reset_seed_is_ignored(stock_reach):
    goals = {tuple(stock_reach.reset(seed=5)[0][-3:]) for _ in range(3)}
    assert len(goals) > 1


def test_goals_are_fixed_by_the_constructor_seed():
    """50 different ones, the same ones in every environment of a run, none shared by two seeds, no trace in np.random."""
    state = np.random.get_state()
    again = metaworld.MT1("reach-v3", seed=1).train_tasks
    assert all(np.array_equal(a, b) for a, b in zip(state, np.random.get_state(), strict=True))
    goals = [goal_of(task) for task in gipo.meta_world_goals("reach-v3", 1)]
    assert goals == [goal_of(task) for task in again]
    assert len(set(goals)) == 50
    assert not set(goals) & {goal_of(task) for task in gipo.meta_world_goals("reach-v3", 2)}


def test_mt10_is_ten_tasks_in_a_fixed_order():
    assert gipo.MT10 == [
        *("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3"),
        *("drawer-close-v3", "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3"),
    ]
    assert len(gipo.META_WORLD) == 50 and set(gipo.MT10) <= set(gipo.META_WORLD)


# -------------------- tyro and torch --------------------
@SCRIPTS
def test_triton_is_loaded_before_mujoco(script, tmp_path):
    """CUDA builds of PyTorch bring it; after OSMesa, which mujoco loads with MUJOCO_GL=osmesa, its import crashes Python."""
    (tmp_path / "triton.py").write_text("import sys; print('triton', 'mujoco' in sys.modules)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", f"import {script.__name__}"]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "triton False\n"), process.stderr


@SCRIPTS
def test_boolean_flags(script):
    """Every boolean of Args is switched by --flag and --no-flag, with dashes or underscores; `--cuda False` is an error."""
    booleans = [field.name for field in dataclasses.fields(script.Args) if isinstance(field.default, bool)]
    assert {"overlap", "recompute_advantages", "cuda", "resume"} <= set(booleans)
    for name in set(booleans) - {"resume"}:
        assert getattr(tyro.cli(script.Args, args=[f"--no-{name.replace('_', '-')}"]), name) is False
        assert getattr(tyro.cli(script.Args, args=[f"--{name}"]), name) is True
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=["--cuda", "False"])


@SCRIPTS
def test_resume_takes_a_folder_or_nothing(script):
    """Also before other flags, and from a default that is a folder."""
    for flags, value in (([], False), (["--resume"], True), (["--resume", "a b"], "a b"), (["--resume", "--cuda"], True)):
        assert tyro.cli(script.Args, args=flags).resume == value
    assert tyro.cli(script.Args, args=["--cuda"], default=script.Args(resume="a b")) == script.Args(resume="a b", cuda=True)
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=["--no-resume"])


def test_generator_state_survives_a_file_with_weights_only(tmp_path):
    """The state is plain types with ints of 128 bits, which torch.load accepts under its default weights_only=True."""
    generator = np.random.default_rng(7)
    gipo.save_checkpoint(tmp_path / "state.pt", {"generator": generator.bit_generator.state})
    expected = generator.random(5)
    generator.bit_generator.state = torch.load(tmp_path / "state.pt", weights_only=True)["generator"]
    np.testing.assert_array_equal(generator.random(5), expected)
    pickled = io.BytesIO()
    torch.save(generator, pickled)  # whereas the generator itself is refused
    pickled.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(pickled)


# -------------------- EpisodeRecorder --------------------
@pytest.mark.parametrize(
    ("successes", "latched"),
    [([0, 0, 0], 0), ([1, 0, 0], 1), ([0, 1, 0], 1), ([0, 0, 1], 1), ([True, True, True], 1), (None, math.nan)],
)
def test_success_is_latched_and_info_is_empty_before_the_end(successes, latched):
    env = gipo.EpisodeRecorder(Counting(3, successes))
    assert env.reset()[1] == {}
    action = np.ones(1, np.float32)
    for _ in range(2):
        *_, info = env.step(action)
        assert info == {}
    *_, info = env.step(action)
    assert info == pytest.approx({"return": 3.0, "length": 3, "success": latched}, nan_ok=True)


def test_success_does_not_carry_over_to_the_next_episode():
    env = gipo.EpisodeRecorder(Counting(2, [1, 0]))
    env.reset()
    for latched in (1.0, 0.0):
        env.step(np.ones(1, np.float32))
        assert env.step(np.ones(1, np.float32))[-1]["success"] == latched
        env.unwrapped.successes = [0, 0]
        env.reset()


def test_the_step_that_ends_an_episode_begins_the_next():
    """The observation to act on is the next one's first; what else comes with it is the ended one's, which stays as it is."""
    env, first = gipo.EpisodeRecorder(Counting(2, [0, 1])), np.ones(1, np.float32)
    env.reset()
    kept = [env.step_and_reset(step * first) for step in range(1, 6)]
    np.testing.assert_array_equal([next_obs for next_obs, *_ in kept], [[0, 1], [1, 0], [1, 1], [2, 0], [2, 1]])
    np.testing.assert_array_equal([obs for _, obs, *_ in kept], [[0, 1], [0, 2], [1, 1], [1, 2], [2, 1]])
    assert [result[2] for result in kept] == [1, 2, 3, 4, 5]  # rewards
    assert [result[3:5] for result in kept] == [(False, False), (True, False), (False, False), (False, True), (False, False)]
    ends = [{"return": total, "length": 2, "success": 1.0} for total in (3.0, 7.0)]
    assert [result[5] for result in kept] == [{}, ends[0], {}, ends[1], {}]


@pytest.mark.parametrize("env_id", ["reach-v3", "pick-place-v3", "basketball-v3", "Pendulum-v1", "HalfCheetah-v5"])
def test_an_episode_is_rebuilt_bit_for_bit(env_id):
    """snapshot -> file -> reset in a fresh environment: the same observations, now and for two more episodes."""
    args, rng, policy = gipo.Args(env_id=env_id), np.random.default_rng(3), ENV_POLICY_MAP.get(env_id, lambda: None)()
    length = {"Pendulum-v1": 200, "HalfCheetah-v5": 1000}.get(env_id, 500)

    env, resumed = (gipo.make_env(args, 0)() for _ in range(2))
    obs, _ = env.reset()
    for _ in range(length + 57):  # into the second episode: its goal or start is not the first of the generator
        obs, *_ = env.step_and_reset(expert_action(env_id, policy, obs, rng))
    file = io.BytesIO()
    assert len(env.snapshot()["actions"]) == 57
    torch.save(env.snapshot(), file)
    file.seek(0)
    np.testing.assert_array_equal(resumed.reset(snapshot=torch.load(file, weights_only=True))[0], obs)
    for _ in range(length):
        action = expert_action(env_id, policy, obs, rng)
        result, repeated = env.step_and_reset(action), resumed.step_and_reset(action)
        np.testing.assert_equal(repeated, result)
        obs = result[0]
    assert resumed.snapshot()["generator"] == env.snapshot()["generator"]


@SCRIPTS
def test_meta_world_is_changed_where_the_environment_lives(script, monkeypatch):
    """In a process of --async-envs, which need not be a fork: by the function, not by make_env."""
    found = []
    monkeypatch.setattr(script, "fast_meta_world", lambda task: found.append(task) or script.META_WORLD[task])
    build = script.make_env(script.Args(), 0)
    assert found == []
    build()
    assert found == ["reach-v3"]


def test_a_rebuilt_episode_keeps_its_latched_success():
    env = gipo.EpisodeRecorder(Counting(4, [0, 1, 0, 0]))
    env.reset()
    for _ in range(3):
        env.step(np.ones(1, np.float32))
    resumed = gipo.EpisodeRecorder(Counting(4, [0, 1, 0, 0]))
    resumed.reset(snapshot=env.snapshot())
    assert resumed.step(np.ones(1, np.float32))[-1]["success"] == 1.0
    assert resumed.reset()[0].tolist() == [1, 0]  # a new episode


# -------------------- make_env --------------------
def visited_goals(args, idx, resets=12):
    env = gipo.make_env(args, idx)()
    goals = []
    for _ in range(resets):
        env.reset()
        goals.append(tuple(env.unwrapped._last_rand_vec))
    env.close()
    return goals


def test_environments_of_a_run_share_the_goals_but_not_their_order():
    args = gipo.Args(env_id="reach-v3", seed=1)
    visits = [visited_goals(args, idx) for idx in (0, 1)]
    assert visits[0] != visits[1]
    assert visits[0] == visited_goals(args, 0)
    training_goals = {goal_of(task) for task in gipo.meta_world_goals("reach-v3", 1)}
    assert set(visits[0]) <= training_goals and set(visits[1]) <= training_goals
    assert len(set(visits[0])) > 5
    assert not set(visited_goals(gipo.Args(env_id="reach-v3", seed=2), 0, 3)) & training_goals


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5"])
def test_gymnasium_environments_start_differently_by_index_and_equally_by_seed(env_id):
    runs = [(1, 0), (1, 0), (1, 1), (2, 0)]
    starts = [gipo.make_env(gipo.Args(env_id=env_id, seed=seed), idx)().reset()[0] for seed, idx in runs]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert all((starts[i] != starts[j]).any() for i, j in ((0, 2), (0, 3), (2, 3)))  # (1, 1) is not (2, 0)


def with_scipy(task, function, *args):
    """Call a function of the stock package with scipy's Rotation, which fast_meta_world has replaced in the task's module."""
    module = sys.modules[gipo.META_WORLD[task].__module__]
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "Rotation"):
            assert module.Rotation.__name__ == "FastRotation"
            patch.setattr(module, "Rotation", Rotation)
        return function(*args)


@pytest.mark.parametrize("task", ["reach-v3", "pick-place-v3"])
def test_make_env_equals_the_stock_stack(task):
    """Observations, rewards, truncation and episode statistics for the same goal and actions; success apart, it latches."""
    stock = gym.make("Meta-World/MT1", env_name=task, seed=1, disable_env_checker=True)
    ours = gipo.make_env(gipo.Args(env_id=task, seed=1), 0)()
    rng, policy = np.random.default_rng(1), ENV_POLICY_MAP[task]()
    assert [goal_of(goal) for goal in stock.get_wrapper_attr("tasks")] == [
        goal_of(goal) for goal in ours.get_wrapper_attr("tasks")
    ]
    for env in (stock, ours):
        env.get_wrapper_attr("toggle_sample_tasks_on_reset")(False)
        env.unwrapped.set_task(stock.get_wrapper_attr("tasks")[7])
    obs, _ = with_scipy(task, stock.reset)
    np.testing.assert_allclose(ours.reset()[0], obs, rtol=0, atol=1e-14)
    success = 0.0
    for _ in range(500):
        action = expert_action(task, policy, obs, rng)
        obs, reward, terminated, truncated, info = with_scipy(task, stock.step, action)
        our_obs, our_reward, *our_ends, our_info = ours.step(action)
        np.testing.assert_allclose(our_obs, obs, rtol=0, atol=1e-14)
        assert our_reward == pytest.approx(reward, rel=0, abs=1e-12)
        assert not terminated and our_ends == [False, truncated]
        success = max(success, info["success"])
    assert truncated and success == 1.0
    assert our_info == pytest.approx({"return": info["episode"]["r"], "length": 500, "success": 1.0}, rel=1e-6)
    stock.close()
    ours.close()


def test_mt10_environments_know_their_task():
    """Environment i runs task i % 10 and says so in ten one-hot entries after the 39 of Meta-World."""
    args = gipo.Args(env_id="MT10", num_envs=20)
    for idx in (*range(10), 13):
        env = gipo.make_env(args, idx)()
        assert isinstance(env.unwrapped, gipo.META_WORLD[gipo.MT10[idx % 10]])
        obs, _ = env.reset()
        assert env.observation_space.shape == obs.shape == (49,)
        np.testing.assert_array_equal(obs[39:], np.eye(10)[idx % 10])
        env.close()


def test_action_map_is_affine_and_clipped():
    space = gym.spaces.Box(np.array([-1.0, -2.0, 0.0], np.float32), np.array([1.0, 6.0, 0.5], np.float32))
    policy_actions = np.array([[-1, -1, -1], [0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [-7, 9, 1.0001]], np.float32)
    mapped = gipo.to_env_action(policy_actions, space)
    expected = [[-1, -2, 0], [0, 2, 0.25], [1, 6, 0.5], [0.5, 4, 0.375], [-1, 6, 0.5]]
    np.testing.assert_allclose(mapped, expected, atol=1e-6)
    assert mapped.dtype == space.dtype and all(space.contains(action) for action in mapped)


def test_rounding_does_not_overstep_the_action_box():
    bounds = np.arange(-300, 301, 7, dtype=np.float32) / 100
    for low, high in ((low, high) for low in bounds for high in bounds if low < high):
        space = gym.spaces.Box(low, high, (2,))
        assert space.contains(gipo.to_env_action(np.array([-1, 1], np.float32), space)), space


@pytest.mark.parametrize("seed", range(3))
def test_fast_rotation_is_scipys(seed):
    """Every branch (largest of x, y, z, trace), half turns and the identity, the sign of the quaternion included."""
    axes = np.random.default_rng(seed).normal(size=(200, 3))
    vectors = [*axes, *np.pi * np.eye(3), *-np.pi * np.eye(3), *0.5 * np.pi * np.eye(3), np.zeros(3), *1e-9 * np.eye(3)]
    vectors += [*(np.pi - 1e-6) * axes[:50] / np.linalg.norm(axes[:50], axis=1, keepdims=True)]
    for vector in vectors:
        matrix = Rotation.from_rotvec(vector).as_matrix()
        ours, theirs = gipo.FastRotation.from_matrix(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14)


GRASPS = ("pick-place-v3", "push-v3", "hand-insert-v3", "shelf-place-v3", "stick-push-v3", "sweep-v3")


@pytest.mark.parametrize("task", list(metaworld.ALL_V3_ENVIRONMENTS))
def test_fast_environment_equals_the_stock_package(task):
    """One noisy expert episode's first 130 steps in both: observation, reward and every entry of info."""
    stock, fast = gipo.META_WORLD[task](), gipo.fast_meta_world(task)()
    stock.seeded_rand_vec, stock._freeze_rand_vec, stock._set_task_called = True, False, True
    stock.seed(3)
    with_scipy(task, stock.reset)  # draws a goal: cheaper than the 50 of MT1
    data = {"rand_vec": stock._last_rand_vec, "env_cls": type(stock), "partially_observable": False}
    touches, touching = [], fast.touching_object
    fast.touching_object = lambda geom_id: touches.append(touching(geom_id)) or touches[-1]
    for env in (stock, fast):
        env.set_task(metaworld.Task(env_name=task, data=pickle.dumps(data)))
    (obs, _), (fast_obs, _) = with_scipy(task, stock.reset), fast.reset()
    np.testing.assert_allclose(fast_obs, obs, rtol=0, atol=1e-14)
    rng, policy = np.random.default_rng(0), ENV_POLICY_MAP[task]()
    for _ in range(130):
        action = expert_action(task, policy, obs, rng)
        obs, reward, *ends, info = with_scipy(task, stock.step, action)
        fast_obs, fast_reward, *fast_ends, fast_info = fast.step(action)
        np.testing.assert_allclose(fast_obs, obs, rtol=0, atol=1e-14)
        assert fast_reward == pytest.approx(reward, rel=0, abs=1e-14)
        assert fast_ends == ends and fast_info["success"] == info["success"]
        assert {k: float(v) for k, v in fast_info.items()} == pytest.approx({k: float(v) for k, v in info.items()}, abs=1e-13)
    if task in GRASPS:  # else the comparison of contacts says nothing
        assert True in touches and False in touches
    stock.close()
    fast.close()


def test_fast_environment_changes_one_name_of_the_package():
    """Rotation in the task's own module; the stock class keeps its functions, and the subclass is made once."""
    stock, fast = gipo.META_WORLD["pick-place-v3"], gipo.fast_meta_world("pick-place-v3")
    assert issubclass(fast, stock) and fast is gipo.fast_meta_world("pick-place-v3")
    assert sys.modules[stock.__module__].Rotation.__name__ == "FastRotation"
    changed = [name for name in vars(fast) if name in dir(stock) and getattr(fast, name) is not getattr(stock, name)]
    assert {"touching_object", "_get_curr_obs_combined_no_goal"} <= set(changed)
    assert all(getattr(stock, name).__module__.startswith("metaworld.") for name in changed if callable(getattr(stock, name)))
    assert Rotation.__module__.startswith("scipy.") and fast._get_quat_objects is stock._get_quat_objects


# -------------------- evaluate --------------------
class Expert:
    """An agent for evaluate(): the scripted expert of the task that the one-hot names, remembering what it saw."""

    obs_mean = torch.zeros(1)

    def __init__(self, task):
        self.task, self.seen = task, []

    def get_action_and_logprob(self, obs, action=None, deterministic=False):
        assert deterministic and obs.dtype == torch.float32
        self.seen.append(obs.numpy().copy())
        actions = []
        for one in self.seen[-1]:
            task = gipo.MT10[int(one[39:].argmax())] if self.task == "MT10" else self.task
            actions.append(ENV_POLICY_MAP[task]().get_action(one[:39].astype(np.float64)))
        return torch.tensor(np.array(actions), dtype=torch.float32), None, None


def test_evaluation_visits_the_first_goals_in_order_and_is_reproducible(monkeypatch):
    """The expert succeeds on all; a longer evaluation, with every environment used twice, starts with the same episodes."""
    args = gipo.Args(env_id="reach-v3", seed=1)
    expert, again = Expert("reach-v3"), Expert("reach-v3")
    result = gipo.evaluate(expert, args, 3)
    monkeypatch.setattr(gipo, "MAX_EVAL_ENVS", 2)
    longer = gipo.evaluate(again, args, 4)
    assert result["episodes"] == 3 and [len(obs) for obs in expert.seen] == [3] * 500
    goals = [goal_of(task)[3:] for task in gipo.meta_world_goals("reach-v3", 1)]
    np.testing.assert_allclose(np.concatenate(again.seen[::500])[:, 36:39], goals[:4], atol=1e-6)
    assert result["success_rate"] == longer["success_rate"] == 1.0
    assert result["returns"] == longer["returns"][:3]
    assert result["return_mean"] == pytest.approx(np.mean(result["returns"])) and result["return_mean"] > 3000
    assert len(set(result["returns"])) == 3


def test_evaluation_of_all_goals_visits_each_once(monkeypatch):
    """All 50 goals, ten at a time, with the episodes cut short."""
    original = gym.wrappers.TimeLimit
    monkeypatch.setattr(gym.wrappers, "TimeLimit", lambda env, steps: original(env, 2))
    expert = Expert("reach-v3")
    assert gipo.evaluate(expert, gipo.Args(env_id="reach-v3", seed=1), 50)["episodes"] == 50
    goals = [goal_of(task)[3:] for task in gipo.meta_world_goals("reach-v3", 1)]
    np.testing.assert_allclose(np.concatenate(expert.seen[::2])[:, 36:39], goals, atol=1e-6)


@SCRIPTS
def test_episodes_side_by_side_equal_episodes_one_by_one(script, counting_env_id, monkeypatch):
    """Of different lengths, 3, 4, 5, ...: no action reaches another's environment, none is stepped after its end."""
    sizes = []

    def get_action_and_logprob(obs, deterministic):
        sizes.append(len(obs))
        return torch.tanh(0.1 * obs[:, 1:] - 0.05 * obs[:, :1]), None, None

    agent = SimpleNamespace(obs_mean=torch.zeros(1), get_action_and_logprob=get_action_and_logprob)
    together = script.evaluate(agent, script.Args(env_id=counting_env_id), 13)
    assert sizes == [10, 10, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1] + [3] * 13 + [2, 1]
    monkeypatch.setattr(script, "MAX_EVAL_ENVS", 1)
    assert script.evaluate(agent, script.Args(env_id=counting_env_id), 13) == together
    assert set(sizes[27:]) == {1} and len(sizes) == 27 + sum(range(3, 16))
    assert len(set(together["returns"])) == 13


def test_evaluation_without_skill_has_no_success():
    idle = SimpleNamespace(obs_mean=torch.zeros(1), get_action_and_logprob=lambda obs, deterministic: (torch.zeros(2, 4),))
    result = gipo.evaluate(idle, gipo.Args(env_id="button-press-topdown-v3"), 2)
    assert result["success_rate"] == 0.0 and result["episodes"] == 2


def test_evaluation_of_mt10_reports_every_task():
    result = gipo.evaluate(Expert("MT10"), gipo.Args(env_id="MT10", num_envs=10, seed=1), 1)
    assert result["episodes"] == 10
    assert result["success_by_task"] == dict.fromkeys(gipo.MT10, 1.0)
    assert result["success_rate"] == 1.0


class OneStep:
    """An environment of MT10 that ends at once; the first three tasks succeed, and the fifth on its first goal."""

    action_space, unwrapped = gym.spaces.Box(-1.0, 1.0, (4,)), property(lambda self: self)

    def __init__(self, idx):
        self.idx = idx

    def get_wrapper_attr(self, name):
        return {"toggle_sample_tasks_on_reset": lambda on: None, "tasks": range(50)}[name]

    def set_task(self, goal):
        self.goal = goal

    def reset(self, seed):
        return np.zeros(3), {}

    def step(self, action):
        success = float(self.idx < 3 or (self.idx, self.goal) == (4, 0))
        return np.zeros(3), 0.0, True, False, {"return": 10.0 * self.idx + self.goal, "length": 1, "success": success}

    def close(self):
        pass


def test_the_success_of_a_task_is_that_of_its_own_episodes(monkeypatch):
    monkeypatch.setattr(gipo, "make_env", lambda args, idx, render_mode=None: lambda: OneStep(idx))
    agent = SimpleNamespace(obs_mean=torch.zeros(1))
    agent.get_action_and_logprob = lambda obs, deterministic: (torch.zeros(len(obs), 4), None, None)
    result = gipo.evaluate(agent, gipo.Args(env_id="MT10", num_envs=10), 3)
    expected = [1.0, 1.0, 1.0, 0.0, pytest.approx(1 / 3), 0.0, 0.0, 0.0, 0.0, 0.0]
    assert result["success_by_task"] == dict(zip(gipo.MT10, expected, strict=True))
    assert result["returns"] == [10.0 * task + goal for task in range(10) for goal in range(3)]
    assert result["success_rate"] == pytest.approx(10 / 30)


@pytest.mark.parametrize("script", [gipo, ppo], ids=["gipo", "ppo"])
def test_mt10_is_evaluated_on_few_goals_before_the_end(script, monkeypatch, tmp_path):
    asked = []
    result = {"success_rate": 0.0, "return_mean": 0.0, "episodes": 1, "returns": [0.0]}
    monkeypatch.setattr(script, "evaluate", lambda agent, args, episodes, *_: asked.append(episodes) or result)
    monkeypatch.setattr(script, "make_env", lambda args, idx, render_mode=None: make_pendulum(script, idx))
    sizes = {"num_envs": 10, "num_steps": 4, "minibatch_size": 8, "buffer_size": 80, "hidden_size": 8, "overlap": False}
    args = script.Args(env_id="MT10", run_dir=str(tmp_path), total_timesteps=80, eval_every=40, eval_episodes=7, **sizes)
    script.main(args)
    assert asked == [5, 7]


def make_pendulum(script, idx):
    """In the place of Meta-World's environments, which take seconds to build."""
    return lambda: script.EpisodeRecorder(gym.make("Pendulum-v1"))


def test_a_stopped_evaluation_of_mt10_builds_no_more_environments(monkeypatch):
    """The signal comes while the second task's are built."""
    stop_signals, built, make_env = [], [], gipo.make_env

    def counted(args, idx, render_mode=None):
        built.append(idx)
        stop_signals.extend([signal.SIGINT] * (idx == 1))
        return make_env(args, idx, render_mode)

    monkeypatch.setattr(gipo, "make_env", counted)
    args = gipo.Args(env_id="MT10", num_envs=10, seed=1)
    result = gipo.evaluate(Expert("MT10"), args, 1, stop_signals=stop_signals)
    assert built == [0, 1] and result["episodes"] == 1


def test_evaluation_where_no_success_is_reported():
    """Fixed reset seeds instead of goals: different starts, the same ones every time."""
    seen = []

    def get_action_and_logprob(obs, deterministic):
        seen.append(obs.tolist())
        return torch.full((2, 1), 0.3), None, None

    agent = SimpleNamespace(obs_mean=torch.zeros(1), get_action_and_logprob=get_action_and_logprob)
    args = gipo.Args(env_id="Pendulum-v1")
    results = [gipo.evaluate(agent, args, 2) for _ in range(2)]
    assert results[0] == results[1] and results[0]["success_rate"] is None
    assert len(seen) == 400 and seen[0][0] != seen[0][1] and seen[:200] == seen[200:]
    stopped = gipo.evaluate(agent, args, 2, stop_signals=[signal.SIGTERM])
    assert stopped["episodes"] == 0 and stopped["return_mean"] is None


# -------------------- Environments of other people --------------------
class Careless(gym.Env):
    """No `render_mode`, no time limit, one array for every observation, actions changed in place, global random numbers."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self):
        self.state = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state[:] = 0
        return self.state, {}

    def step(self, action):
        action *= 0.5
        self.state += 1 + action + 0.1 * np.float32(np.random.rand()) + 0.1 * np.float32(random.random())
        return self.state, float(self.state[0]), False, False, {"is_success": self.state[0] > 3}


@pytest.fixture
def careless_env_id():
    gym.register("Careless-v0", entry_point=Careless, disable_env_checker=True)
    yield "Careless-v0"
    del gym.registry["Careless-v0"]


@SCRIPTS
def test_a_careless_environment_is_recorded_faithfully(script, careless_env_id, monkeypatch):
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 5)
    args = script.Args(env_id=careless_env_id)
    env = script.make_env(args, 0)()
    env.reset()
    for step in range(1, 6):
        next_obs, obs, _, terminated, truncated, info = env.step_and_reset(np.full(1, 0.4, np.float32))
        assert not terminated and truncated == (step == 5)  # no time limit of its own: it gets one
        if step == 4:
            before, taken = obs.copy(), env.snapshot()["actions"].numpy()
    np.testing.assert_array_equal(taken, np.float32(0.4))  # not what the environment made of them
    np.testing.assert_array_equal(next_obs, 0.0)
    assert (obs > before + 1).all()  # the last observation, not the reset's in the same memory
    assert info["success"] == 1.0 and info["length"] == 5


@SCRIPTS
def test_a_careless_environment_trains_reproducibly(script, careless_env_id, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 5)
    sizes = {
        "num_envs": 2,
        "num_steps": 16,
        "total_timesteps": 64,
        "minibatch_size": 32,
        "hidden_size": 16,
        "eval_episodes": 2,
    }
    for name in ("one", "two"):
        result = script.main(script.Args(env_id=careless_env_id, run_dir=str(tmp_path), exp_name=name, **sizes))
        assert result["eval_success_rate"] == result["train_success_rate"] == 1.0
    one, two = (script.load_checkpoint(path)["model"] for path in tmp_path.glob("*/checkpoint.pt"))
    assert differences(one, two) == []


# -------------------- The rollout of main() --------------------
@pytest.fixture
def counting_env_id():
    """Counting as a Gymnasium id, for as long as the test takes."""
    gym.register("Counting-v0", entry_point=Counting, disable_env_checker=True)
    yield "Counting-v0"
    del gym.registry["Counting-v0"]


@SCRIPTS
def test_what_the_rollout_stores(script, counting_env_id, tmp_path):
    """Three rollouts into a buffer of two, read back from the checkpoint: environment 1's episodes are one step longer.

    next_obs is the episode's own last observation at a done row and the next row's observation elsewhere; a termination is
    told from a truncation; actions are unclipped samples, rewards raw; the oldest segments are overwritten.
    """
    sizes = {"num_envs": 2, "num_steps": 16, "total_timesteps": 96, "buffer_size": 64, "minibatch_size": 32, "hidden_size": 16}
    args = script.Args(env_id=counting_env_id, run_dir=str(tmp_path), updates_per_iteration=1, eval_episodes=0, **sizes)
    script.main(dataclasses.replace(args, policy_head="gaussian", init_log_std=0.5))
    (checkpoint,) = tmp_path.glob("*/checkpoint.pt")
    saved = script.load_checkpoint(checkpoint)
    replay = saved["replay"]
    assert saved["model"]["obs_count"] == 96  # the normaliser has seen every observation once
    assert len(saved["recent_returns"]) == 48 // 3 + 48 // 4  # an entry per finished episode, none per running one
    assert min(value for _, value in read_scalars(checkpoint.parent)["charts/episodic_length"]) >= 3
    assert replay["dones"].shape == (16, 4)
    np.testing.assert_array_equal(replay["versions"], np.broadcast_to([2.0, 2.0, 1.0, 1.0], (16, 4)))
    for idx, length in ((0, 3), (1, 4)):
        rows = {key: np.concatenate([value[:, 2 + idx].numpy(), value[:, idx].numpy()]) for key, value in replay.items()}
        episode, step = rows["obs"].T
        np.testing.assert_array_equal(16 + np.arange(32), (episode - 1) * length + step)  # no row is missing or doubled
        np.testing.assert_array_equal(rows["next_obs"], np.stack([episode, step + 1], 1))
        dones = step == length - 1
        np.testing.assert_array_equal(rows["dones"], dones)
        np.testing.assert_array_equal(rows["terminations"], dones & (episode % 2 == 0))
        np.testing.assert_array_equal(rows["next_obs"][:-1][~dones[:-1]], rows["obs"][1:][~dones[:-1]])
        actions = rows["actions"][:, 0]
        assert np.abs(actions).max() > 1.0
        np.testing.assert_allclose(rows["rewards"], 2.0 * np.clip(actions, -1, 1), rtol=1e-6, atol=1e-6)
        assert np.isfinite(rows["logprobs"]).all()


@SCRIPTS
@pytest.mark.parametrize("recompute", [True, False])
def test_what_gae_is_given(script, recompute, counting_env_id, tmp_path, monkeypatch):
    """With the critic V = 10 episode + step the real next observation is worth V + 1 in every row, also where episodes end."""
    seen, compute_gae = [], script.compute_gae
    monkeypatch.setattr(script, "compute_gae", lambda *args: seen.append(args) or compute_gae(*args))
    value = lambda self, obs: obs @ torch.tensor([10.0, 1.0]) + 0 * self.critic[0].bias.sum()  # noqa: E731
    monkeypatch.setattr(script.Agent, "get_value", value)
    sizes = {"num_envs": 2, "num_steps": 16, "total_timesteps": 96, "buffer_size": 64, "minibatch_size": 32, "hidden_size": 16}
    rates = {"reward_scale": 0.01, "gamma": 0.9, "gae_lambda": 0.8, "recompute_advantages": recompute, "eval_episodes": 0}
    script.main(script.Args(env_id=counting_env_id, run_dir=str(tmp_path), **sizes, **rates))
    assert seen
    for rewards, values, next_values, terminations, dones, gamma, gae_lambda in seen:
        assert torch.equal(next_values, values + 1) and (gamma, gae_lambda) == (0.9, 0.8)
        assert 0 < rewards.abs().max() <= 0.0201  # of up to 2, scaled
        assert 0 < terminations.sum() < dones.sum()


# -------------------- The order of data --------------------
PENDULUM = {"env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 8, "minibatch_size": 16, "hidden_size": 8, "eval_episodes": 0}
IN_TURN, ONE_BEHIND = [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]  # the update before which a rollout's policy acted, from 0
ORDERS = {
    "gipo": (gipo, {"buffer_size": 64}, ONE_BEHIND),
    "gipo-one-rollout": (gipo, {"buffer_size": 0, "num_bins": 9}, ONE_BEHIND),
    "ppo-replay": (ppo, {"buffer_size": 64, "policy_head": "categorical"}, ONE_BEHIND),
    "ppo-two-rollouts": (ppo, {"buffer_size": 32}, ONE_BEHIND),
    "ppo-on-policy": (ppo, {"buffer_size": 0}, IN_TURN),
    "ppo-on-policy-bins": (ppo, {"buffer_size": 31, "policy_head": "categorical"}, IN_TURN),
}


def copy_of(weights):
    return {key: value.clone() for key, value in weights.items()}


@pytest.fixture
def two_cores(monkeypatch):
    """Overlap uses a process wherever the tests run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "inline"])
@pytest.mark.parametrize("name", ORDERS)
def test_with_which_policy_rollouts_are_collected(name, overlap, two_cores, tmp_path, monkeypatch):
    """With replay the one from before the last update, on-policy the newest; the buffer's versions and log-probs agree."""
    script, flags, order = ORDERS[name]
    start, update_normalizer = script.Worker.start, script.Agent.update_normalizer
    sent, models, in_processes = [], [], []

    def spy_start(self, name, *arguments, **keywords):
        if name == "collect":
            sent.append((copy_of(arguments[0]), arguments[1]))
            in_processes.append(self.process is not None)
        start(self, name, *arguments, **keywords)

    def spy_update(self, obs):
        update_normalizer(self, obs)
        models.append(copy_of(self.state_dict()))

    monkeypatch.setattr(script.Worker, "start", spy_start)
    monkeypatch.setattr(script.Agent, "update_normalizer", spy_update)
    args = script.Args(run_dir=str(tmp_path), overlap=overlap, total_timesteps=80, learning_rate=0.03, **PENDULUM, **flags)
    script.main(args)
    assert in_processes == [overlap and order is ONE_BEHIND] * 5
    models.insert(0, sent[0][0])
    assert len(models) == 6 and all(differences(a, b) for a, b in itertools.pairwise(models))
    assert [version - 1 for _, version in sent] == order
    assert [differences(weights, models[k]) for (weights, _), k in zip(sent, order, strict=True)] == [[]] * 5

    (folder,) = tmp_path.iterdir()
    replay = read_pt(folder / "checkpoint.pt")["replay"]
    rollouts = max(args.buffer_size // 16, 1)
    assert sorted(replay["versions"][0].tolist()) == sorted(2 * [k + 1.0 for k in order[-rollouts:]])
    agent = script.Agent(3, 1, args)
    for segment, version in enumerate(replay["versions"][0].int().tolist()):
        errors = []
        for weights in models:
            agent.load_state_dict(weights)
            logprob = agent.get_action_and_logprob(replay["obs"][:, segment], replay["actions"][:, segment])[1]
            errors.append((logprob - replay["logprobs"][:, segment]).abs().max().item())
        assert int(np.argmin(errors)) == version - 1 and min(errors) < 1e-4
    lag = [value for _, value in read_scalars(folder)["gipo/policy_lag"]]
    assert lag[0] == 0.0
    if rollouts == 1:
        assert lag == [k - acted for k, acted in enumerate(order)]


@pytest.mark.parametrize("head", ["gaussian", "categorical"])
def test_log_ratios_of_fresh_on_policy_data_are_zero(head, tmp_path, monkeypatch):
    """In the first update after every rollout, and in no other."""
    compute_loss, spreads = ppo.compute_loss, []

    def spy(agent, mb, args):
        loss, stats = compute_loss(agent, mb, args)
        spreads.append(stats["gipo/logratio_std"].item())
        return loss, stats

    monkeypatch.setattr(ppo, "compute_loss", spy)
    args = ppo.Args(run_dir=str(tmp_path), total_timesteps=64, policy_head=head, update_epochs=3, **PENDULUM)
    ppo.main(args)
    spreads = np.reshape(spreads, (4, 3))
    assert spreads[:, 0].max() < 1e-6 and spreads[:, 1:].min() > 1e-5


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (gipo, {"env_id": "reach-v3"}),
        (gipo, {"env_id": "Pendulum-v1", "num_bins": 9}),
        (gipo, {"env_id": "Pendulum-v1", "policy_head": "gaussian", "async_envs": True}),
        (ppo, {"env_id": "Pendulum-v1"}),
    ],
    ids=["reach", "bins", "async", "gaussian"],
)
def test_a_rollout_is_the_same_in_any_process(script, flags):
    """Three rollouts under other weights each, the state after them, and one more, also from that state in a new collector."""
    args = script.Args(num_envs=2, num_steps=90, hidden_size=16, **flags)
    results = {}
    for own_process in (True, False):
        worker = script.Worker(script.Collector, args, own_process=own_process)
        dims = worker.call("sizes")[:2]
        torch.manual_seed(9)
        weights = [script.Agent(*dims, args).state_dict() for _ in range(4)]
        worker.call("reset", None)
        answers = [worker.call("collect", weights[version], version) for version in range(3)]
        answers.append(worker.call("snapshot"))
        going_on = worker.call("collect", weights[3], 7)
        worker.close()
        worker = script.Worker(script.Collector, args, own_process=own_process)
        worker.call("reset", answers[-1])
        answers.append(worker.call("collect", weights[3], 7))
        worker.close()
        assert differences(answers[-1]["data"], going_on["data"]) == []
        answers = [{**answer, "seconds": 0} for answer in answers]
        results[own_process] = gipo.convert(answers, float, lambda number: None if math.isnan(number) else number)
    assert differences(results[True], results[False]) == []
    *rollouts, snapshot, last = results[True]
    assert snapshot["steps"] == 3 * 180 and [rollout["version"] for rollout in rollouts] == [0, 1, 2]
    assert torch.equal(last["data"]["obs"][0], snapshot["next_obs"])
    assert last["data"]["obs"].shape == (90, 2, dims[0]) and last["log_ratio_max"] < 1e-4


# -------------------- Processes --------------------
class Unpicklable(Exception):
    """It holds something that does not cross to another process."""

    def __init__(self, text):
        super().__init__(text, lambda: None)

    def __str__(self):
        return self.args[0]


class OneWay(Exception):
    """It can be written, not read: its constructor takes other arguments than it keeps."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Tool:
    """What a Worker calls in these tests."""

    def __init__(self, error=None):
        if error:
            raise error
        self.calls = []

    def add(self, tree, number):
        assert isinstance(tree["x"], torch.Tensor)
        self.calls.append(number)
        return {"sum": tree["x"] + number, "calls": self.calls, "pair": (number, None), "process": os.getpid()}

    def fail(self, kind):
        errors = {"key": KeyError("goal"), "lambda": Unpicklable("no way"), "one way": OneWay("a", "b")}
        raise (errors | {"stop": StopIteration(), "tensor": ValueError("bad", torch.zeros(3))})[kind]

    def exit(self, code):
        os._exit(code)

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self):
        time.sleep(100)

    def close(self):
        pass


class KnownProcesses(gipo.Collector):
    """It tells the processes of its environments."""

    def processes(self):
        return [env.process.pid for env in self.envs]


PROCESS_OR_NOT = pytest.mark.parametrize("own_process", [True, False], ids=["process", "inline"])


@pytest.fixture
def worker(request):
    """A Worker with a Tool, closed when the test is over."""
    worker = gipo.Worker(Tool, own_process=getattr(request, "param", True))
    yield worker
    worker.close()


def is_running(pid: int) -> bool:
    """Whether a process does anything yet: a zombie, of which only its end is left to be read, does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_ends(pid: int) -> None:
    for _ in range(500):
        if not is_running(pid):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} goes on")


@pytest.mark.parametrize("worker", [True, False], ids=["process", "inline"], indirect=True)
def test_a_worker_answers_in_order_with_what_the_method_returns(worker):
    tensor = torch.arange(4.0)
    for number in (1, 2):
        worker.start("add", {"x": tensor}, number)
        assert worker.busy
        answer = worker.result()
        assert not worker.busy and torch.equal(answer["sum"], tensor + number) and answer["pair"] == (number, None)
    assert answer["calls"] == [1, 2]
    assert (answer["process"] == os.getpid()) == (worker.process is None)


def test_a_worker_may_be_a_new_interpreter(monkeypatch):
    """As on macOS, where processes are not forked: what crosses can be pickled."""
    args = gipo.Args(env_id="Pendulum-v1", num_envs=2, num_steps=4, hidden_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        worker = gipo.Worker(gipo.Collector, args, own_process=True)
    assert type(worker.process).__name__ == "SpawnProcess" and worker.call("sizes") == (3, 1, 200)
    worker.call("reset", None)
    assert worker.call("collect", gipo.Agent(3, 1, args).state_dict(), 1)["data"]["obs"].shape == (4, 2, 3)
    worker.close()
    assert not is_running(worker.process.pid)


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("key", KeyError, "goal"),
        ("lambda", RuntimeError, "Unpicklable: no way"),
        ("one way", RuntimeError, "OneWay: a and b"),
        ("tensor", ValueError, "bad"),
    ],
)
def test_an_exception_arrives_with_its_own_traceback(kind, error, text, worker):
    """Of its own type if it survives the way; then the process has ended, and further calls say so."""
    with pytest.raises(error, match=text) as caught:
        worker.call("fail", kind)
    assert type(caught.value) is error
    remote = str(caught.value.__cause__)
    assert (
        remote.startswith("in a process of the environments:\nTraceback") and "in fail" in remote and "raise (errors" in remote
    )
    with pytest.raises(RuntimeError, match="has died"):
        worker.call("add", {"x": torch.zeros(1)}, 1)
    assert_ends(worker.process.pid)


def test_an_exception_stays_what_it_is_without_a_process():
    for kind, error in (("key", KeyError), ("lambda", Unpicklable), ("one way", OneWay)):
        with pytest.raises(error):
            gipo.Worker(Tool, own_process=False).call("fail", kind)


@PROCESS_OR_NOT
def test_an_exception_of_the_constructor_arrives_with_the_first_call(own_process):
    with pytest.raises(KeyError, match="goal"), contextlib.ExitStack() as at_exit:
        worker = gipo.Worker(Tool, KeyError("goal"), own_process=own_process)
        at_exit.callback(worker.close)
        worker.call("add", {"x": torch.zeros(1)}, 1)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("method", "arguments", "code"), [("exit", (7,), "7"), ("kill", (), "-9")])
def test_a_process_that_dies_is_reported_with_its_exit_code(method, arguments, code, worker):
    with pytest.raises(RuntimeError, match=rf"a process of the environments has died \(exit code {code};"):
        worker.call(method, *arguments)


def test_a_process_that_died_between_two_calls_is_reported_too(worker):
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()
    with pytest.raises(RuntimeError, match="exit code -9"):
        worker.call("add", {"x": torch.zeros(1)}, 1)


@pytest.mark.parametrize("call", ["add", "sleep", None])
def test_closing_a_worker_ends_its_process_whatever_it_does(call):
    worker = gipo.Worker(Tool, own_process=True)
    if call:
        worker.start(call, *[{"x": torch.zeros(1)}, 1][: 2 * (call == "add")])
    begin = time.monotonic()
    worker.close()
    worker.close()  # a second time is nothing
    assert time.monotonic() - begin < 10 and not is_running(worker.process.pid)
    assert multiprocessing.active_children() == []


def test_ctrl_c_while_a_worker_is_closed_ends_its_process(worker, monkeypatch):
    """Python would wait for it at its end."""
    worker.start("sleep")
    join, calls = worker.process.join, []

    def interrupted(timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(timeout)

    monkeypatch.setattr(worker.process, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.close()
    assert not is_running(worker.process.pid)


def test_ctrl_c_while_a_process_starts_leaves_none(monkeypatch):
    """Nobody has the Worker then to close it."""
    start, started = multiprocessing.context.ForkProcess.start, []

    def interrupted(self):
        start(self)
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:  # whose traceback keeps the Worker
        gipo.Worker(Tool, own_process=True)
    assert caught and signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert_ends(started[0].pid)


@pytest.mark.parametrize("busy", [True, False])
def test_closing_a_worker_ends_the_processes_of_its_environments(busy):
    args = gipo.Args(env_id="Pendulum-v1", num_envs=2, num_steps=100_000, hidden_size=8, async_envs=True)
    worker = gipo.Worker(KnownProcesses, args, own_process=True)
    pids = worker.call("processes")
    assert len(pids) == 2 and all(map(is_running, pids))
    worker.call("reset", None)
    if busy:
        worker.start("collect", gipo.Agent(3, 1, args).state_dict(), 1)
    worker.close()
    for pid in pids:
        assert_ends(pid)


def test_a_worker_starts_after_torch_has_used_several_threads():
    """As in a notebook: the child has the memory of OpenMP's threads, not the threads."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(2)
torch.linalg.qr(torch.randn(500, 500)), torch.randn(2000, 2000).exp().sum()
import gipo_continuous as gipo
worker = gipo.Worker(gipo.Collector, gipo.Args(env_id="Pendulum-v1", num_envs=1), own_process=True)
worker.call("reset", None)
print(worker.call("collect", gipo.Agent(3, 1, gipo.Args()).state_dict(), 1)["version"])
worker.close()
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    process = subprocess.run([sys.executable, "-c", code, str(ROOT)], env=environment, capture_output=True, timeout=60)
    assert process.stdout == b"1\n", process.stderr


def test_the_documented_use_of_a_trained_policy(tmp_path, monkeypatch, capsys):
    """The program of docs/gipo_continuous.md plays an episode on a training goal, and equals evaluate()'s on that goal."""
    page = (ROOT / "docs" / "gipo_continuous.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    args = gipo.Args(env_id="door-open-v3", hidden_size=8)
    agent = gipo.Agent(39, 4, args)
    agent.update_normalizer(torch.randn(64, 39))
    folder = gipo.run_folder_of(dataclasses.replace(args, run_dir=str(tmp_path / "runs")))
    folder.mkdir(parents=True)
    gipo.save_models(folder, agent, vars(args), {"episodes": 1, "success_rate": 0.0, "return_mean": 0.0}, 0)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program, names)
    assert capsys.readouterr().out == f"{names['info']}\n" and names["info"]["length"] == 500
    goal = names["env"].unwrapped._last_rand_vec
    goals = [pickle.loads(task.data)["rand_vec"] for task in gipo.meta_world_goals("door-open-v3", args.seed)]
    which = [np.array_equal(goal, other) for other in goals].index(True)
    returns = gipo.evaluate(agent, args, which + 1)["returns"]
    assert math.isclose(names["info"]["return"], returns[which], rel_tol=1e-6)
