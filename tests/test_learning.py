"""Learning itself: small tasks solved well above chance, with margins that a broken sign or mask does not survive."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_pt, read_scalars

REPLAY = {"num_steps": 16, "buffer_size": 2048, "minibatch_size": 128, "updates_per_iteration": 4, "policy_head": "gaussian"}
ON_POLICY = {"num_steps": 32, "buffer_size": 0, "minibatch_size": 64, "update_epochs": 4}
METHODS = {  # name -> script, fields
    "gipo": ("gipo_continuous", REPLAY),
    "gipo-bins-per-dim": (
        "gipo_continuous",
        {**REPLAY, "policy_head": "categorical", "ratio": "per-dim", "updates_per_iteration": 8, "sigma": 0.5},  # 0.2: slower
    ),
    "gipo-vtrace": ("gipo_continuous", {**REPLAY, "vtrace": True}),
    "gipo-stored": ("gipo_continuous", {**REPLAY, "buffer_size": 512, "recompute_advantages": False}),
    "gipo-sapo": ("gipo_continuous", {**REPLAY, "trust_weight": "sapo", "ratio": "joint"}),
    "ppo-on-policy": ("ppo_baseline", ON_POLICY),
    "ppo-replay": ("ppo_baseline", REPLAY),
}
ALL_METHODS = pytest.mark.parametrize("method", METHODS)
# Between them these run every line that cuts the future value.
MASKS = pytest.mark.parametrize("method", ["gipo", "gipo-vtrace", "gipo-bins-per-dim", "ppo-on-policy"])


class Point(gym.Env):
    """Move a point on [-1, 1]^2 to a random target within 20 steps; reward minus the distance; success within 0.15."""

    observation_space = gym.spaces.Box(-3.0, 3.0, (4,))
    action_space = gym.spaces.Box(-0.2, 0.2, (2,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.target = self.np_random.uniform(-1.0, 1.0, (2, 2))
        return self.observe(), {}

    def observe(self):
        return np.concatenate([self.point, self.target]).astype(np.float32)

    def step(self, action):
        self.point = np.clip(self.point + action, -1.0, 1.0)
        distance = float(np.linalg.norm(self.point - self.target))
        return self.observe(), -distance, False, False, {"success": float(distance < 0.15)}


class Exit(gym.Env):
    """Reward 1 per step; action > 0 takes an exit: 5 at once and a termination. Staying is worth 1 / (1 - 0.9) = 10.

    With the future value cut at the truncation after 4 steps, staying seems to be worth 1 to 3.4, so leaving is best; with a
    future value beyond the exit, leaving seems to be worth 5 + 0.9 * 10 = 14. Only two correct masks stay.
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, reward_of_exit=5.0, render_mode=None):
        self.reward_of_exit = reward_of_exit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        left = bool(action[0] > 0.0)
        return np.zeros(2, np.float32), self.reward_of_exit if left else 1.0, left, False, {}


class Constant(gym.Env):
    """Reward 1 whatever happens, over after 10 steps by a termination or by a truncation; the observation is noise or time."""

    action_space = gym.spaces.Box(-1.0, 1.0, (2,))
    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, terminates=False, render_mode=None):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.array([-1.0], np.float32), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == 10
        return np.array([self.steps / 5 - 1.0], np.float32), 1.0, over and self.terminates, over and not self.terminates, {}


gym.register("Point-v0", entry_point=Point, max_episode_steps=20, disable_env_checker=True)
gym.register("Exit-v0", entry_point=Exit, max_episode_steps=4, disable_env_checker=True)
gym.register("Terminates-v0", entry_point=Constant, kwargs={"terminates": True}, disable_env_checker=True)
gym.register("Truncates-v0", entry_point=Constant, disable_env_checker=True)


def train(method, run_dir, env_id, **fields):
    """Train in this process: -> result, agent."""
    script, own = METHODS[method]
    module = importlib.import_module(script)
    common = {"num_envs": 8, "hidden_size": 64, "reward_scale": 1.0, "critic_learning_rate": 3e-3, "eval_episodes": 20}
    args = module.Args(**{"env_id": env_id, "run_dir": str(run_dir), "learning_rate": 1e-3, **common, **own, **fields})
    result = module.main(args)
    env = gym.make(env_id)
    agent = module.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    agent.load_state_dict(read_pt(next(run_dir.glob("*/model.pt")))["model"])
    return result, agent


@ALL_METHODS
def test_point_reaches_its_target(method, tmp_path):
    result, _ = train(method, tmp_path, "Point-v0", total_timesteps=20_000, gamma=0.9)
    assert result["eval_return_mean"] > -6.0
    assert result["eval_success_rate"] > 0.8


@MASKS
def test_staying_beats_leaving_only_with_correct_masks(method, tmp_path):
    result, _ = train(method, tmp_path, "Exit-v0", total_timesteps=12_000, gamma=0.9, gae_lambda=0.9)
    assert result["eval_return_mean"] == 4.0


@MASKS
def test_critic_knows_a_termination(method, tmp_path):
    """No future value beyond it: the exact values of a reward of 1 for the steps that are left."""
    _, agent = train(method, tmp_path, "Terminates-v0", total_timesteps=12_000, gamma=0.9, gae_lambda=0.9)
    times = torch.arange(10)
    values = agent.get_value((times / 5 - 1.0).unsqueeze(-1)).detach()
    assert (values - (1 - 0.9 ** (10 - times)) / (1 - 0.9)).abs().max() < 0.3


@MASKS
def test_critic_looks_beyond_a_truncation(method, tmp_path):
    """All values tend to 10, the last ones slowest, for they have no other value to lean on; taken as a termination: to 1."""
    _, agent = train(method, tmp_path, "Truncates-v0", total_timesteps=12_000, gamma=0.9, gae_lambda=0.9)
    values = agent.get_value((torch.arange(10) / 5 - 1.0).unsqueeze(-1)).detach()
    assert values[-1] > 4.0 and 7.0 < values[0] < 10.5


@pytest.mark.parametrize("method", ["gipo", "gipo-stored", "ppo-on-policy"])
def test_noise_is_not_blown_up_once_rewards_are_constant(method, tmp_path):
    """The critic predicts everything, so advantages are errors of rounding; divided by their own std they would be 1 again."""
    grad_norm = {}
    for floor in (0.1, 0.0):
        run_dir = tmp_path / str(floor)
        train(method, run_dir, "Terminates-v0", total_timesteps=12_000, gamma=0.9, adv_std_floor=floor)
        grad_norm[floor] = np.mean([value for _, value in read_scalars(next(run_dir.iterdir()))["losses/grad_norm"][-10:]])
    assert grad_norm[0.1] < 0.5 * grad_norm[0.0], grad_norm
