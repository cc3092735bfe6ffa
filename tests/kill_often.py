"""Kill runs of both scripts with SIGKILL at random moments and resume them: nothing may be lost.

    python tests/kill_often.py --kills 100

Every mode in turn is killed in its start-up, training, checkpoints and evaluations, resumed until its kills are done,
finished, and compared bit for bit with a run that nothing disturbed: checkpoint, models, result, curves. Exit code 1 if they
differ.
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import left_running, run_differences, run_script, start_script

import gipo_continuous

FLAGS = "--env-id Pendulum-v1 --num-envs 2 --num-steps 32 --minibatch-size 64 --hidden-size 32 --num-bins 16"
FLAGS += " --updates-per-iteration 5 --checkpoint-every 1 --eval-every 512 --eval-episodes 3"
MODES = {
    "gipo-overlap": ("gipo_continuous", "--buffer-size 512"),
    "gipo-no-overlap": ("gipo_continuous", "--buffer-size 512 --no-overlap"),
    "gipo-async": ("gipo_continuous", "--buffer-size 512 --async-envs"),
    "gipo-gaussian": ("gipo_continuous", "--buffer-size 512 --policy-head gaussian --ratio joint --vtrace"),
    "gipo-stored": ("gipo_continuous", "--buffer-size 512 --no-recompute-advantages"),
    "ppo-on-policy": ("ppo_baseline", "--update-epochs 3"),
    "ppo-replay": ("ppo_baseline", "--buffer-size 512"),
}


def kill_once(script: str, run_dir: Path, flags: list, chance: random.Random) -> str | None:
    """Start or resume the run and kill it: -> what has gone wrong; "finished" where it was faster; None if all is well."""
    begun = any(run_dir.glob("*/args.json"))
    process = start_script(script, run_dir, *flags, *(["--resume"] if begun else []))
    if chance.random() < 0.8:  # once it trains; else at any moment of its start-up
        for line in process.stdout:
            if "from step" in line:
                break
        time.sleep(chance.expovariate(2.0))
    else:
        time.sleep(chance.uniform(0.0, 2.0))
    whole_group = chance.random() < 0.5
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    if left := left_running(process.pid):
        return f"processes {left} went on"
    if process.returncode == 0:
        return "finished"
    return None if process.returncode == -signal.SIGKILL else f"exit code {process.returncode}: {output}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps of a run")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every event file that purges another's points
    chance, faults = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for i, mode in enumerate(args.modes):
            script, flags = MODES[mode][0], [*FLAGS.split(), *MODES[mode][1].split(), "--total-timesteps", args.steps]
            kills, runs, found = args.kills * (i + 1) // len(args.modes) - args.kills * i // len(args.modes), 0, []
            _, reference = run_script(script, Path(folder, mode, "reference"), *flags)
            done = 0
            while not found and (done < kills or runs == 0):
                run_dir, fault = Path(folder, mode, str(runs)), None
                while not fault and done < kills:
                    fault = kill_once(script, run_dir, flags, chance)
                    done += fault is None
                if fault and fault != "finished":
                    found.append(fault)
                    break
                process, run = run_script(script, run_dir, *flags, *(["--resume"] if any(run_dir.glob("*/args.json")) else []))
                runs += 1
                if process.returncode:
                    found.append(process.stderr)
                else:
                    found += run_differences(run, reference, gipo_continuous.MACHINE_ARGS)
            print(f"{mode}: {done} kills in {runs} runs, {'; '.join(found) or 'nothing lost'}", flush=True)
            faults += found
    print(f"{args.kills} kills, {f'{len(faults)} faults' if faults else 'nothing lost'}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
