"""Measure training speed: version 2 against version 1 in alternation, the stock environment, and the arithmetic limit.

    python tests/throughput.py --output results/throughput.json      # or ./benchmark.sh throughput

Every figure is of a process of its own on the cores that it is given, and every round runs all contenders once, so that ratios
within a round hold on a noisy machine. Version 1 comes from this repository's history. stable-baselines3 is measured where it
is installed, cleanrl where its script is given:

    pip install --no-deps --target old gymnasium==0.29.1
    python tests/throughput.py --cleanrl ppo_continuous_action.py --cleanrl-path old

Prints JSON.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
VERSION_1 = "5a39e45"  # its last commit
EQUAL = "--num-envs 8 --num-steps 16 --minibatch-size 128 --hidden-size 64"  # 10 updates of 128 per 128 steps, as the others
CONTENDERS = {  # name -> cores, script of version 1 or 2, flags
    "gipo, version 1": (1, "v1/gipo_continuous.py", ""),
    "gipo": (1, "v2/gipo_continuous.py", ""),
    "gipo, two cores": (2, "v2/gipo_continuous.py", ""),
    "ppo, version 1": (1, "v1/ppo_baseline.py", ""),
    "ppo": (1, "v2/ppo_baseline.py", ""),
    "HalfCheetah: ppo": (1, "v2/ppo_baseline.py", f"--env-id HalfCheetah-v5 {EQUAL}"),
    "HalfCheetah: gipo": (1, "v2/gipo_continuous.py", f"--env-id HalfCheetah-v5 {EQUAL} --policy-head gaussian --ratio joint"),
}
CLEANRL = "--num-envs 8 --num-steps 16 --num-minibatches 1 --update-epochs 10"
LIMIT = """
import time, torch
torch.set_num_threads(1)
layers = [(39, 256), (256, 256), (256, 1024), (39, 256), (256, 256), (256, 1)]  # of actor and critic on Meta-World
tensors = [(torch.randn(128, i), torch.randn(i, o), torch.randn(128, o)) for i, o in layers]
def update():
    for x, weight, grad in tensors:
        x @ weight, x.T @ grad  # forward, gradient of the weight
        if len(weight) > 39:
            grad @ weight.T  # gradient of the input
for _ in range(30):
    update()
start = time.perf_counter()
for _ in range(300):
    update()
print((time.perf_counter() - start) / 300)
"""
STOCK = """
import time, gymnasium as gym, metaworld, numpy as np
env = gym.make("Meta-World/MT1", env_name="{env_id}", seed=1, disable_env_checker=True)
actions = np.random.default_rng(0).uniform(-1, 1, (3000, 4)).astype(np.float32)
start = time.perf_counter()
for i, action in enumerate(actions):
    if i % 500 == 0:
        env.reset()
    env.step(action)
print(len(actions) / (time.perf_counter() - start))
"""
SB3 = """
import time, gymnasium as gym, torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
torch.set_num_threads(1)
model = PPO("MlpPolicy", make_vec_env("HalfCheetah-v5", 8), n_steps=16, batch_size=128, n_epochs=10, device="cpu")
model.learn(1280)
start = time.perf_counter()
model.learn({steps})
print({steps} / (time.perf_counter() - start))
"""


@dataclass
class Args:
    env_id: str = "reach-v3"
    """Meta-World task"""
    steps: int = 30_000
    """environment steps of each run"""
    rounds: int = 5
    """how often every contender runs"""
    cleanrl: str | None = None
    """cleanrl's ppo_continuous_action.py, to be measured beside the others"""
    cleanrl_path: str = ""
    """PYTHONPATH for it: its script needs gymnasium 0.29"""
    output: str | None = None
    """JSON file to write"""


def run(command: list[str], cores: int, folder: Path, **variables: str) -> str:
    """Run a command on so many cores, with these environment variables: -> what it prints."""
    taskset = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
    process = subprocess.run([*taskset, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def training_speed(folder: Path, script: str, flags: str, cores: int, args: Args) -> float:
    """Steps per second of a run without evaluation."""
    flags = f"--env-id {args.env_id} --total-timesteps {args.steps} --eval-episodes 0 --run-dir runs --overwrite {flags}"
    run([sys.executable, script, *flags.split()], cores, folder)
    (result,) = (folder / "runs").glob("*/result.json")
    speed = json.loads(result.read_text())["sps"]
    result.unlink()
    return speed


def main(args: Args) -> dict:
    """All rounds: -> medians, ratios and every single figure."""
    rounds = []
    if not hasattr(os, "sched_getaffinity") or shutil.which("taskset") is None:
        sys.exit("error: this measurement needs Linux with taskset (Debian: util-linux)")
    if subprocess.run(["git", "-C", str(ROOT), "cat-file", "-e", VERSION_1], capture_output=True).returncode:
        sys.exit(f"error: commit {VERSION_1}, version 1, is not in this clone: git fetch --unshallow")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for version in ("v1", "v2"):
            (folder / version).mkdir()
            for script in ("gipo_continuous.py", "ppo_baseline.py"):
                command = ["git", "-C", str(ROOT), "show", f"{VERSION_1}:{script}"]
                source = (ROOT / script).read_bytes() if version == "v2" else subprocess.check_output(command)
                (folder / version / script).write_bytes(source)
        for _ in range(args.rounds):
            seconds = float(run([sys.executable, "-c", LIMIT], 1, folder))
            figures = {"stock environment": float(run([sys.executable, "-c", STOCK.format(env_id=args.env_id)], 1, folder))}
            figures["matrix products of the updates alone"] = 128 / (10 * seconds)
            for contender, (cores, script, flags) in CONTENDERS.items():
                figures[contender] = training_speed(folder, script, flags, cores, args)
            steps = args.steps // 128 * 128
            if subprocess.run([sys.executable, "-c", "import stable_baselines3"], capture_output=True).returncode == 0:
                printed = run([sys.executable, "-c", SB3.format(steps=steps)], 1, folder)
                figures["HalfCheetah: stable-baselines3"] = float(printed.split()[-1])
            if args.cleanrl:
                flags = f"--env-id HalfCheetah-v4 --no-cuda --total-timesteps {steps} {CLEANRL}"
                command = [sys.executable, os.path.abspath(args.cleanrl), *flags.split()]
                printed = run(command, 1, folder, PYTHONPATH=os.path.abspath(args.cleanrl_path))
                figures["HalfCheetah: cleanrl"] = float(printed.split("SPS:")[-1].split()[0])
            rounds.append({key: round(value, 1) for key, value in figures.items()})
            print(rounds[-1], file=sys.stderr, flush=True)

    def ratio(a: str, b: str) -> list[float]:
        values = [row[a] / row[b] for row in rounds if a in row and b in row]
        return [round(float(value), 3) for value in (np.median(values), min(values), max(values))] if values else []

    pairs = [(name, "gipo, version 1") for name in CONTENDERS if name.startswith("gipo") and name != "gipo, version 1"]
    pairs += [("ppo", "ppo, version 1"), *((name, "stock environment") for name in ("gipo", "gipo, two cores"))]
    pairs += [(name, "matrix products of the updates alone") for name in ("gipo", "gipo, two cores")]
    pairs += [("HalfCheetah: ppo", f"HalfCheetah: {other}") for other in ("stable-baselines3", "cleanrl")]
    return {
        "command": "python tests/throughput.py " + " ".join(sys.argv[1:]),
        "env_id": args.env_id,
        "median_steps_per_second": {key: round(float(np.median([row[key] for row in rounds]))) for key in rounds[0]},
        "ratios_median_least_most": {f"{a} / {b}": ratio(a, b) for a, b in pairs if ratio(a, b)},
        "rounds": rounds,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    args = tyro.cli(Args)
    content = json.dumps(main(args), indent=2)
    print(content)
    if args.output:
        Path(args.output).write_text(content + "\n")
