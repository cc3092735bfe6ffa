"""Measure training speed against the stock environment, and where the time goes.

    taskset -c 0 python tests/throughput.py --output results/throughput.json     # on one core

Prints JSON; --output FILE also appends it to the list in that file. Everything is timed in one process, the stock environment
before and after the training run, so that ratios hold on a noisy machine.
"""

import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gipo_continuous
import ppo_baseline


@dataclass
class Args:
    script: str = "gipo_continuous"
    """gipo_continuous or ppo_baseline"""
    env_ids: list[str] = field(default_factory=lambda: ["reach-v3"])
    """Meta-World tasks"""
    total_timesteps: int = 30_000
    """length of the training run"""
    buffer_size: int = 20_000
    """replay buffer in environment steps"""
    num_steps: int = 16
    """steps of each of the 8 environments per rollout"""
    minibatch_size: int = 128
    """environment steps per update"""
    updates_per_iteration: int = 10
    """updates per rollout"""
    policy_head: str = "categorical"
    """gaussian or categorical"""
    num_bins: int = 256
    """of the categorical head"""
    fast_env: bool = True
    """the rewritten helper functions of Meta-World"""
    async_envs: bool = False
    """environments in processes"""
    output: str | None = None
    """JSON file to extend"""


def stock_steps_per_second(env_id: str, steps: int = 2000) -> float:
    """Random actions in the package's own environment, resets included."""
    env = gym.make("Meta-World/MT1", env_name=env_id, seed=1, disable_env_checker=True)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 4)).astype(np.float32)
    start = time.perf_counter()
    for i, action in enumerate(actions):
        if i % 500 == 0:
            env.reset()
        env.step(action)
    return steps / (time.perf_counter() - start)


def timed(function, seconds: dict, key: str):
    """`function`, adding its duration to seconds[key]."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[key] += time.perf_counter() - start

    return wrapper


def measure(args: Args, env_id: str) -> dict:
    """One short training run with timers around the simulator, the networks and the optimiser."""
    script = {"gipo_continuous": gipo_continuous, "ppo_baseline": ppo_baseline}[args.script]
    vector_env = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    seconds = {"simulator": 0.0, "networks": 0.0, "optimizer": 0.0}
    places = [
        (vector_env, "step", "simulator"),
        (torch.nn.Sequential, "forward", "networks"),
        (torch.Tensor, "backward", "networks"),
        (torch.optim.Adam, "step", "optimizer"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]
    before = stock_steps_per_second(env_id)
    for (owner, name, key), original in zip(places, originals, strict=True):
        setattr(owner, name, timed(original, seconds, key))
    with tempfile.TemporaryDirectory() as run_dir:
        run_args = script.Args(
            env_id=env_id,
            run_dir=run_dir,
            total_timesteps=args.total_timesteps,
            num_envs=8,
            num_steps=args.num_steps,
            buffer_size=args.buffer_size,
            minibatch_size=args.minibatch_size,
            updates_per_iteration=args.updates_per_iteration,
            policy_head=args.policy_head,
            num_bins=args.num_bins,
            hidden_size=256,
            eval_episodes=0,
            fast_env=args.fast_env,
            async_envs=args.async_envs,
        )
        result = script.main(run_args)
        (checkpoint,) = Path(run_dir).glob("*/checkpoint.pt")
        update_seconds = script.load_checkpoint(checkpoint)["seconds"]["update"]
    for (owner, name, _), original in zip(places, originals, strict=True):
        setattr(owner, name, original)
    stock = (before + stock_steps_per_second(env_id)) / 2
    training = result["total_timesteps"] / result["sps"]
    updates = result["total_timesteps"] // (8 * args.num_steps) * args.updates_per_iteration
    shares = {key: value / training for key, value in seconds.items()}
    return {
        "env_id": env_id,
        **{key: value for key, value in dataclasses.asdict(args).items() if key not in ("env_ids", "output")},
        "stock_random_steps_per_second": round(stock),
        "training_steps_per_second": round(result["sps"]),
        "ratio": round(result["sps"] / stock, 3),
        "shares": {key: round(value, 3) for key, value in shares.items()} | {"other": round(1 - sum(shares.values()), 3)},
        "milliseconds_per_update": round(1000 * update_seconds / updates, 2),
        "peak_memory_mb": round(result["peak_memory_mb"]),
        "command": "tests/throughput.py " + " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "versions": result["versions"],
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="gymnasium")
    args = tyro.cli(Args)
    results = [measure(args, env_id) for env_id in args.env_ids]
    print(json.dumps(results, indent=2))
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(exist_ok=True)
        earlier = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps(earlier + results, indent=2) + "\n")
