"""An easy task with a new goal in every episode, which GIPO's defaults do not learn (new_goals_screening.json).

PYTHONPATH=results/notes python gipo_continuous.py --env-id new_goal_env:MyEnv-v0 --reward-scale 0.1 --total-timesteps 30000
"""

import gymnasium as gym
import numpy as np


class MyEnv(gym.Env):
    """Move a point to a goal; action in [-2, 5]^3, offset so that 1.5 is 'no motion'."""

    def __init__(self, size=1.0, render_mode=None):
        self.size = size
        self.observation_space = gym.spaces.Dict(
            position=gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
            goal=gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
            carried=gym.spaces.Discrete(2),
        )
        self.action_space = gym.spaces.Box(-2.0, 5.0, (3,), np.float32)

    def _obs(self):
        return {"position": self.pos, "goal": self.goal, "carried": 0}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.pos = self.np_random.uniform(-self.size, self.size, 3)
        self.goal = self.np_random.uniform(-self.size, self.size, 3)
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.pos = self.pos + 0.05 * (action - 1.5)
        d = float(np.linalg.norm(self.pos - self.goal))
        return self._obs(), -d, False, False, {"success": d < 0.2}


gym.register("MyEnv-v0", MyEnv, max_episode_steps=50)
