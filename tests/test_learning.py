"""Learning itself: small tasks solved well above chance, with margins that a broken sign or mask does not survive."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_pt

REPLAY = {"num_steps": 16, "buffer_size": 2048, "minibatch_size": 128, "updates_per_iteration": 4}
ON_POLICY = {"num_steps": 32, "buffer_size": 0, "minibatch_size": 64, "update_epochs": 4}
METHODS = {  # name -> script, fields
    "gipo": ("gipo_continuous", REPLAY),
    "gipo-bins-per-dim": ("gipo_continuous", {**REPLAY, "policy_head": "categorical", "ratio": "per-dim"}),
    "gipo-vtrace": ("gipo_continuous", {**REPLAY, "vtrace": True}),
    "gipo-stored": ("gipo_continuous", {**REPLAY, "buffer_size": 512, "recompute_advantages": False}),
    "gipo-sapo": ("gipo_continuous", {**REPLAY, "trust_weight": "sapo"}),
    "ppo-on-policy": ("ppo_baseline", ON_POLICY),
    "ppo-replay": ("ppo_baseline", REPLAY),
}
ALL_METHODS = pytest.mark.parametrize("method", METHODS)


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
    print("POINT", method, result["eval_return_mean"], result["eval_success_rate"])
    assert result["eval_return_mean"] > -6.0
    assert result["eval_success_rate"] > 0.8


@ALL_METHODS
def test_staying_beats_leaving_only_with_correct_masks(method, tmp_path):
    result, agent = train(method, tmp_path, "Exit-v0", total_timesteps=12_000, gamma=0.9, gae_lambda=0.9)
    print("EXIT", method, result["eval_return_mean"], result["train_return_mean"], agent.get_value(torch.zeros(2)).item())
    assert result["eval_return_mean"] == 4.0


@ALL_METHODS
@pytest.mark.parametrize("env_id", ["Terminates-v0", "Truncates-v0"])
def test_critic_tells_truncation_from_termination(method, env_id, tmp_path):
    _, agent = train(method, tmp_path, env_id, total_timesteps=12_000, gamma=0.9, gae_lambda=0.9)
    times = torch.arange(10)
    values = agent.get_value((times / 5 - 1.0).unsqueeze(-1)).detach()
    expected = (1 - 0.9 ** (10 - times)) / (1 - 0.9) if env_id == "Terminates-v0" else torch.full((10,), 10.0)
    print("VALUE", method, env_id, (values - expected).abs().max().item(), values.tolist())
    assert (values - expected).abs().max() < 1.0


@ALL_METHODS
def test_policy_stays_where_it_is_once_rewards_are_constant(method, tmp_path):
    _, agent = train(method, tmp_path, "Truncates-v0", total_timesteps=12_000, gamma=0.9)
    means = agent.get_action_and_logprob(torch.linspace(-1.0, 1.0, 11).unsqueeze(-1), deterministic=True)[0]
    print("DRIFT", method, means.abs().max().item(), getattr(agent, "actor_logstd", torch.zeros(1)).tolist())
    assert means.abs().max() < 0.5
