"""Begin with somebody else's data: what does a replay that another policy filled give a new run, under which objective?

    for task in button-press-topdown-v3 door-open-v3 drawer-open-v3; do                       # whose replay is taken
        python gipo_continuous.py --env-id $task --seed 4 --buffer-size 20000 --exp-name gipo_20000 --eval-every 0
    done
    python tests/other_data.py --output results/other_data.json

Every run is made twice: with an empty replay buffer, and with the last 20,000 steps of a finished run of another seed in it
(other goals, other networks). For that the script resumes from a checkpoint that holds this replay, its statistics for the
normaliser of observations, and new networks. The foreign samples keep the log-probs of the policy that acted, and leave the
buffer as own ones come in. Step sizes are constant, so that both runs have the same after equal steps of their own.
Finished runs in --output are skipped.
"""

import concurrent.futures
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import report  # noqa: E402

PPO = "ppo_baseline --num-steps 16 --minibatch-size 128 --policy-head categorical --ratio per-dim --ent-coef 0.001"
METHODS = {
    "gipo": "gipo_continuous",
    "ppo-clip-0.2": f"{PPO} --clip-coef 0.2",
    "ppo-clip-0.5": f"{PPO} --clip-coef 0.5",
    "sapo": "gipo_continuous --trust-weight sapo",
    "none": "gipo_continuous --trust-weight none",
}
KEYS = "task", "seed", "method", "steps", "data"
EQUAL = "--buffer-size 20000 --lr-schedule constant --critic-lr-schedule constant --eval-every 0 --no-overlap"


@dataclass
class Args:
    output: Path
    """JSON file of all results; it grows run by run"""
    donors: Path = Path("runs")
    """folder with the finished runs {task}__gipo_20000__{donor_seed}"""
    donor_seed: int = 4
    """seed of the finished runs"""
    tasks: tuple[str, ...] = ("button-press-topdown-v3", "door-open-v3", "drawer-open-v3")
    """Meta-World tasks"""
    seeds: tuple[int, ...] = (5, 6, 7)
    """seeds of the new runs"""
    methods: tuple[str, ...] = tuple(METHODS)
    """rows of METHODS"""
    steps: int = 150_000
    """environment steps of a new run's own"""
    run_dir: Path = Path("runs/other-data")
    """parent folder of the new runs"""
    workers: int = 2
    """runs at a time"""


def start_from(script, args, replay: dict[str, torch.Tensor]) -> Path:
    """Make a run folder whose checkpoint has new networks and this replay, (T, S, ...), which must fill the buffer -> folder.

    The replay's rollouts count as the run's first ones: own steps begin after them.
    """
    rollouts = replay["rewards"].shape[1] // args.num_envs
    order = replay["versions"][0].argsort(stable=True)  # the oldest leave first
    replay = {key: value[:, order] for key, value in replay.items()}
    collector = script.Collector(args)
    collector.reset()
    collector.steps = rollouts * args.num_envs * args.num_steps
    with script.seeded(args.seed):
        agent = script.Agent(collector.obs_space.shape[0], collector.action_space.shape[0], args)
    agent.update_normalizer(replay["obs"])
    groups = [{"params": agent.actor_parameters()}, {"params": list(agent.critic.parameters())}]
    checkpoint = {
        "model": agent.state_dict(),
        "optimizer": torch.optim.Adam(groups, lr=0.0, eps=1e-5, fused=True).state_dict(),
        "replay": replay | {"versions": replay["versions"] - replay["versions"].max() + rollouts},
        "iteration": rollouts,
        "seconds": {"env": 0.0, "policy": 0.0, "update": 0.0, "training": 1e-9, "wall": 0.0},
        "recent_returns": [],
        "recent_successes": [],
        "collector": collector.snapshot(),
        "next_rollout": None,
        "generator": torch.Generator().manual_seed(2 * args.seed).get_state(),
    }
    collector.close()
    folder = script.run_folder_of(args)
    folder.mkdir(parents=True, exist_ok=True)
    script.write_json(folder / "args.json", vars(args) | {"algorithm_version": script.ALGORITHM_VERSION, "wandb_id": None})
    script.save_checkpoint(folder / "checkpoint.pt", checkpoint)  # last: without it the folder is made again
    return folder


def flags_of(args: Args, task: str, seed: int, method: str, steps: int, data: str) -> list[str]:
    """Script and flags of a run."""
    name, *flags = METHODS[method].split()
    flags += [*EQUAL.split(), "--env-id", task, "--seed", str(seed), "--total-timesteps", str(steps)]
    return [name, *flags, "--run-dir", str(args.run_dir), "--exp-name", f"{method}_{data}_{args.steps}"]


def prepare(args: Args, task: str, seed: int, method: str, data: str) -> list[str]:
    """The command of a run; if it begins with data and was not begun yet, its folder is made. Not in threads: it seeds."""
    donor = args.donors / f"{task}__gipo_20000__{args.donor_seed}" / "checkpoint.pt"
    script = importlib.import_module(METHODS[method].split()[0])
    replay = script.load_checkpoint(donor)["replay"] if data != "none" else None
    steps = args.steps + (replay["rewards"].numel() if replay else 0)
    name, *flags = flags_of(args, task, seed, method, steps, data)
    run_args = script.parse_args(flags)
    folder = script.run_folder_of(run_args)
    if replay and not (folder / "checkpoint.pt").exists():
        start_from(script, run_args, replay)
    resume = ["--resume", str(folder)] if (folder / "args.json").exists() else []  # the flags stay: other ones are refused
    return [f"{name}.py", *flags, *resume, str(folder)]


def train(args: Args, command: list[str]) -> dict:
    """One run: its success in training, and diagnostics while the foreign samples leave."""
    *words, folder = command
    subprocess.run([sys.executable, ROOT / words[0], *words[1:]], check=True, stdout=subprocess.DEVNULL)
    result = report.read(Path(folder) / "result.json", report.BENCHMARK)
    scalars = report.read_scalars(Path(folder), result["total_timesteps"])
    steps, success = np.array(scalars["charts/episodic_success"]).T
    foreign = result["args"]["total_timesteps"] - args.steps  # steps of the other run's
    third = np.minimum((steps - foreign - 1) * 3 // args.steps, 2)
    early = {}  # mean over the time in which foreign samples are in the buffer, and as long without
    for tag in ("gipo/effective_sample_size", "gipo/utilization", "gipo/logratio_std", "losses/explained_variance"):
        early[tag] = float(np.mean([value for step, value in scalars[tag] if step <= foreign + 20_000]))
    found = {"area": float(success.mean()), "thirds": [float(success[third == i].mean()) for i in range(3)]}
    found |= {"first_20000_steps": early, "eval_success_rate": result["eval_success_rate"]}
    return found | {key: result[key] for key in ("git_commit", "versions", "wall_seconds", "args")}


def main(args: Args) -> int:
    """Make what is missing; 1 if a run failed."""
    stored = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    stored |= {"command": shlex.join(["python", *sys.argv]), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    version = importlib.import_module("gipo_continuous").ALGORITHM_VERSION
    stored["runs"] = [run for run in stored["runs"] if run["versions"]["algorithm"] == version]  # older ones are made again
    there = {tuple(run[key] for key in KEYS) for run in stored["runs"]}
    donors = "none", f"seed {args.donor_seed}"
    cells = [(t, s, m, args.steps, d) for s in args.seeds for t in args.tasks for m in args.methods for d in donors]
    commands = {cell: prepare(args, *cell[:3], cell[4].replace(" ", "-")) for cell in cells if cell not in there}
    pool, failed = concurrent.futures.ThreadPoolExecutor(args.workers), 0
    try:
        jobs = {pool.submit(train, args, command): cell for cell, command in commands.items()}
        for job in concurrent.futures.as_completed(jobs):
            if job.exception():
                failed += 1
                print(*jobs[job], f"failed: {job.exception()}", file=sys.stderr, flush=True)
                continue
            run = dict(zip(KEYS, jobs[job], strict=True)) | job.result()
            stored["runs"] = sorted([*stored["runs"], run], key=lambda run: [str(run[key]) for key in KEYS])
            report.store(args.output, stored)
            print(time.strftime("%H:%M"), *jobs[job], f"area {run['area']:.3f}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
