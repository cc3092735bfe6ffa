"""An independent PPO on the benchmark's tasks: is this repository's textbook PPO as good as the one of stable-baselines3?

    pip install -q -r requirements-dev.txt
    python tests/sb3_ppo.py --output results/sb3_ppo.json
    python tests/sb3_ppo.py --output results/sb3_ppo.json --tasks HalfCheetah-v5 Hopper-v5 --steps 1000000 --methods matched

Environments, goals and the final evaluation are those of ppo_baseline.py, so that only the algorithm and its normalisation
differ. Rows: `matched` has the settings of ppo_baseline.py's defaults where stable-baselines3 has a setting of that name,
`defaults` its own settings. (Equal names are not always equal: its value loss has no factor of a half.) Either row has eight
environments, rollouts of 2,048 steps, and normalised observations and rewards. Finished runs in --output are skipped.
"""

import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from stable_baselines3 import PPO, __version__
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_baseline as ppo  # noqa: E402
import report  # noqa: E402

METHODS = "matched", "defaults"
KEYS = "task", "seed", "method", "steps"


@dataclass
class Args:
    output: Path
    """JSON file of all results; it grows run by run"""
    tasks: tuple[str, ...] = ("button-press-topdown-v3", "door-open-v3", "drawer-open-v3", "push-v3")
    """Meta-World tasks, or Gymnasium ids"""
    seeds: tuple[int, ...] = (4, 5, 6)
    """seeds of the runs"""
    methods: tuple[str, ...] = METHODS
    """rows: matched, defaults"""
    steps: int = 300_000
    """environment steps of a run, rounded up to whole rollouts"""
    eval_episodes: int = 50
    """episodes of the final evaluation; Meta-World: the first so many training goals"""


def settings(method: str, args: ppo.Args) -> dict:
    """Arguments of stable-baselines3's PPO: ppo_baseline.py's, or none but the length of a rollout."""
    if method == "defaults":
        return {"n_steps": 2048 // args.num_envs}
    network = {"net_arch": [args.hidden_size] * 2, "activation_fn": torch.nn.Tanh, "log_std_init": args.init_log_std}
    return {
        "n_steps": args.num_steps,
        "batch_size": args.minibatch_size,
        "n_epochs": args.update_epochs,
        "learning_rate": lambda left: args.learning_rate * left,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "clip_range": args.clip_coef,
        "ent_coef": args.ent_coef,
        "vf_coef": args.vf_coef,
        "max_grad_norm": args.max_grad_norm,
        "policy_kwargs": network,
    }


class Acting:
    """A trained model in the place of ppo_baseline's Agent, as its evaluate() uses one."""

    obs_mean = torch.zeros(())  # whose device evaluate() asks for

    def __init__(self, model, envs):
        self.model, self.envs = model, envs

    def get_action_and_logprob(self, obs: torch.Tensor, deterministic: bool) -> tuple[torch.Tensor]:
        """(N, obs_dim) -> actions (N, action_dim) in [-1, 1], which is also the Box of all tasks here."""
        return (torch.as_tensor(self.model.predict(self.envs.normalize_obs(obs.numpy()), deterministic=deterministic)[0]),)


class Recorder(BaseCallback):
    """Step, return and success of every finished episode, in `episodes`."""

    def __init__(self):
        super().__init__()
        self.episodes = []

    def _on_step(self) -> bool:
        ended = [info for info in self.locals["infos"] if "return" in info]
        self.episodes.extend((self.num_timesteps, info["return"], info["success"]) for info in ended)
        return True


def train(task: str, seed: int, method: str, steps: int, eval_episodes: int = 50) -> dict:
    """One run: success and return on the training goals at the end, and over all of training."""
    start = time.time()
    args = ppo.Args(env_id=task, seed=seed)
    envs = VecNormalize(DummyVecEnv([ppo.make_env(args, i) for i in range(args.num_envs)]), gamma=args.gamma)
    if not (np.all(envs.action_space.low == -1) and np.all(envs.action_space.high == 1)):
        raise ValueError(f"{task}: actions must be in [-1, 1], since stable-baselines3 does not map them")
    recorder = Recorder()
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings(method, args)).learn(steps, recorder)
    episodes, total = recorder.episodes, model.num_timesteps
    scalars = {"charts/episodic_return": [(step, value) for step, value, _ in episodes]}
    scalars |= {"charts/episodic_success": [(step, value) for step, _, value in episodes if not math.isnan(value)]}
    curves = report.gridded(scalars, {name: report.CURVES[name] for name in ("return", "success")}, total, "steps")
    curves = {name: curve for name, curve in curves.items() if any(value is not None for value in curve)}
    envs.training = False
    evaluation = ppo.evaluate(Acting(model, envs), args, eval_episodes)
    envs.close()
    area = report.area_under_curve({"curves": curves}, "success")
    return {
        "eval_success_rate": evaluation["success_rate"],
        "eval_return_mean": evaluation["return_mean"],
        "area": None if math.isnan(area) else area,
        "train_return_mean": float(np.mean([value for _, value, _ in episodes[-100:]])) if episodes else None,
        "total_timesteps": total,
        "wall_seconds": time.time() - start,
        "curves": curves,
        "versions": {"stable-baselines3": __version__, "torch": torch.__version__, "algorithm": ppo.ALGORITHM_VERSION},
    }


def stored_runs(file: Path) -> list[dict]:
    """The runs that a file of results has so far."""
    return json.loads(file.read_text())["runs"] if file.exists() else []


def main(args: Args) -> None:
    """Make what is missing, one run after the other."""
    torch.set_num_threads(1)
    for seed, task, method in itertools.product(args.seeds, args.tasks, args.methods):
        cell = dict(zip(KEYS, (task, seed, method, args.steps), strict=True))
        if cell in [{key: run[key] for key in KEYS} for run in stored_runs(args.output)]:
            continue
        run = cell | train(**cell, eval_episodes=args.eval_episodes)
        run["command"] = shlex.join(["python", *sys.argv])
        run["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        runs = [*stored_runs(args.output), run]  # read again: another process may have added its own meanwhile
        report.store(args.output, {"runs": sorted(runs, key=lambda run: [str(run[key]) for key in KEYS])})
        print(time.strftime("%H:%M"), *cell.values(), run["eval_success_rate"], run["eval_return_mean"], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
