"""Success of gipo_vla_libero.py's scripted expert in the real simulator, without noise, per task of libero_spatial.

    python tests/vla_expert.py --states 10 50 --output results/vla_tiny/expert_task0.json
    python tests/vla_expert.py --tasks 0 1 2 3 4 5 6 7 8 9 --states 10 20 --output results/vla_tiny/expert_tasks.json

Every episode begins with the script's full reset. Prints JSON: for each task the initial states that were solved, in steps.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gipo_vla_libero as vla


@dataclass
class Args:
    tasks: tuple[int, ...] = (0,)
    """tasks of libero_spatial"""
    states: tuple[int, int] = (10, 50)
    """first initial state and the one after the last"""
    num_envs: int = 2
    """simulators at a time"""
    output: str | None = None
    """JSON file to write"""


def measure(args: Args) -> dict:
    """-> {"solved": {task: {initial state: steps}}, "rates": {task: share}, ...}; failed episodes are not in "solved"."""
    settings = vla.PRESETS["tiny"] | {"num_envs": args.num_envs, "demo_noise": 0.0}
    script, states = vla.Args(preset="tiny", **settings), range(*args.states)
    with tempfile.TemporaryDirectory() as folder:
        demos = vla.collect_demonstrations(script, Path(folder) / "demos.npz", args.tasks, states, 1)
    solved, start = {task: {} for task in args.tasks}, 0
    for end in sorted(set(demos["ends"].tolist())):
        solved[int(demos["tasks"][start])][int(demos["init_states"][start])] = end - start
        start = end
    rates = {task: len(found) / len(states) for task, found in solved.items()}
    run = {"suite": script.suite, "states": list(args.states), "rates": rates, "solved": solved}
    return run | {"commit": vla.git_commit(), "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    args = tyro.cli(Args)
    result = json.dumps(measure(args))
    print(result)
    if args.output:
        Path(args.output).write_text(result + "\n")
