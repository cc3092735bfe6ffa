"""Begin with somebody else's data: what does a replay that another policy filled give a new run, under which objective?

    ./benchmark.sh main --methods gipo --regimes 20000 --seeds 4      # the finished runs whose replay is taken
    python tests/other_data.py --output results/other_data.json

Every run is made twice: with an empty replay buffer, and with the last 20,000 steps of a finished run of another seed in it
(other goals, other networks). The script resumes from a checkpoint that holds this replay and new networks; it has no flag for
it. The foreign samples keep the log-probs of the policy that acted, and leave the buffer as own ones come in. Step sizes are
constant, so that both runs have the same after equal steps of their own. Finished runs in --output are skipped.
"""

import concurrent.futures
import importlib
import json
import os
import platform
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
EQUAL = "--buffer-size 20000 --lr-schedule constant --critic-lr-schedule constant --eval-every 0 --no-overlap"


@dataclass
class Args:
    output: Path
    """JSON file of all results; it grows run by run"""
    donors: Path = Path("runs/benchmark-300000")
    """folder with the finished runs {task}__gipo_20000__{donor_seed}"""
    donor_seed: int = 4
    """seed of the finished runs"""
    tasks: tuple[str, ...] = ("button-press-topdown-v3", "door-open-v3", "drawer-open-v3")
    """Meta-World tasks"""
    seeds: tuple[int, ...] = (5, 6)
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
    script.save_checkpoint(folder / "checkpoint.pt", checkpoint)
    script.write_json(folder / "args.json", vars(args) | {"algorithm_version": script.ALGORITHM_VERSION, "wandb_id": None})
    return folder


def prepare(args: Args, task: str, seed: int, method: str, with_data: bool) -> list[str]:
    """The command of a run; if it begins with data and was not begun yet, its folder is made. Not in threads: it seeds."""
    name, *flags = METHODS[method].split()
    script = importlib.import_module(name)
    replay = script.load_checkpoint(args.donors / f"{task}__gipo_20000__{args.donor_seed}" / "checkpoint.pt")["replay"]
    steps = args.steps + (replay["rewards"].numel() if with_data else 0)
    flags += [*EQUAL.split(), "--env-id", task, "--seed", str(seed), "--total-timesteps", str(steps)]
    flags += ["--run-dir", str(args.run_dir), "--exp-name", f"{method}_{'with' if with_data else 'without'}"]
    run_args = script.parse_args(flags)
    folder = script.run_folder_of(run_args)
    if with_data and not (folder / "checkpoint.pt").exists():
        start_from(script, run_args, replay)
    return [f"{name}.py", *(["--resume", str(folder)] if (folder / "args.json").exists() else flags), str(folder)]


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


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"runs": []}
    stored |= {"command": "python tests/other_data.py", "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    there = {(run["task"], run["seed"], run["method"], run["with_data"]) for run in stored["runs"]}
    cells = [(t, s, m, d) for s in arguments.seeds for t in arguments.tasks for m in arguments.methods for d in (True, False)]
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        commands = {cell: prepare(arguments, *cell) for cell in cells if cell not in there}
        jobs = {pool.submit(train, arguments, command): cell for cell, command in commands.items()}
        for job in concurrent.futures.as_completed(jobs):
            run = dict(zip(("task", "seed", "method", "with_data"), jobs[job], strict=True)) | job.result()
            stored["runs"] = sorted([*stored["runs"], run], key=lambda r: (r["task"], r["seed"], r["method"], r["with_data"]))
            arguments.output.write_text(json.dumps(stored, indent=1) + "\n")
            print(time.strftime("%H:%M"), *jobs[job], f"area {run['area']:.3f}", flush=True)
