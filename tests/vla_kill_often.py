"""Kill a small tiny run of gipo_vla_libero.py with SIGKILL at random moments and resume it: nothing may be lost.

    python tests/vla_kill_often.py --kills 10

The run is resumed after every kill, finished, and compared bit for bit with one that nothing disturbed: weights, Adam's
averages, replay, episodes, random generators, evaluations. Needs LIBERO and its assets. Exit code 1 if anything differs.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import differences, read_json, run_script, start_script
from test_vla_script import NAME, SMALL, checkpoint_of

RUN = [*SMALL, "--total-timesteps", "960", "--eval-every", "320", "--checkpoint-every", "32"]


def kill_once(run_dir: Path, flags: list, chance: random.Random, pause: float) -> bool:
    """Start or resume the run and kill it within `pause` seconds, mostly of its training: -> whether it was still alive."""
    process = start_script(NAME, run_dir, *flags)
    if chance.random() < 0.8:
        for line in process.stdout:
            if "from step" in line:
                break
    time.sleep(chance.uniform(0.0, pause))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--pause", type=float, default=10.0, help="longest time before a kill, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir, chance, kills = Path(folder), random.Random(args.seed), 0
        reference, killed = (run_dir / f"libero_spatial__{name}__1" for name in ("reference", "killed"))
        run_script(NAME, run_dir, *RUN, "--exp-name", "reference")
        while kills < args.kills and not (killed / "result.json").exists():
            begun = (killed / "args.json").exists()
            flags = ["--resume", killed] if begun else [*RUN, "--exp-name", "killed"]
            kills += kill_once(run_dir, flags, chance, args.pause)
            print(f"{kills} kills: {sorted(path.name for path in killed.glob('checkpoint*'))}", flush=True)
        process, _ = run_script(NAME, run_dir, *(["--resume", killed] if (killed / "args.json").exists() else flags))
        found = [process.stderr] if process.returncode else differences(checkpoint_of(reference), checkpoint_of(killed))
        one, two = (read_json(path / "result.json")["evaluations"] for path in (reference, killed))
        found += [] if one == two else ["evaluations"]
    print(f"{kills} kills, {'; '.join(found) or 'nothing lost'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
