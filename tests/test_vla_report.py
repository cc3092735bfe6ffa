"""The LIBERO part of report.py and benchmark.sh: a hand-computed table, the run matrix, and the committed results."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import gipo_vla_libero as vla
import report


def run(method, seed, before, after, training, buffer_size=1024):
    """A run whose greedy policy solves the first `before` initial states, later the last `after`; three points of curve."""
    evaluations = [[[0, k, float(k < before)] for k in range(50)], [[0, k, float(k >= 50 - after)] for k in range(50)]]
    curves = {name: [0.25, 0.5, 0.75] for name in report.VLA_CURVES}
    curves |= {"success": [None, before / 100, training], "steps": [1024, 2048, 3072]}
    return {
        "env_id": "libero_spatial",
        "exp_name": f"{method}_fresh",
        "seed": seed,
        "total_timesteps": 2048,
        "train_success_rate": training,
        "versions": {"algorithm": 1},
        "machine": "abacus",
        "args": {"buffer_size": buffer_size, "critic_warmup": 2},
        "evaluations": [{"successes": successes} for successes in evaluations],
        "curves": curves,
    }


def test_table_by_hand(tmp_path):
    folder = tmp_path / "vla_tiny" / "runs" / "2048"
    folder.mkdir(parents=True)
    runs = run("gipo", 1, 10, 30, 0.5), run("gipo", 2, 5, 20, 0.2), run("ppo", 1, 10, 15, 0.2), run("ppo", 2, 5, 5, 0.4)
    for i, result in enumerate(runs):
        (folder / f"{i}.json").write_text(json.dumps(result))
    args = report.Args(runs=str(tmp_path / "none"), results=str(tmp_path), readme=str(tmp_path / "README.md"))
    assert report.write_report(args) == [str(tmp_path / "vla_tiny" / "tables.md")]
    text = (tmp_path / "vla_tiny" / "tables.md").read_text()
    # 30 of 50 are all ten of 40-49 and 20 of the other 40; a stretch before the first finished episode counts 0.
    assert "| 1,024 | gipo | 1, 2 | 20, 10 | 60, 40 | 50, 25 | 100, 100 | 10, 5 | 20, 8 | 50, 20 |" in text
    assert "| 1,024 | ppo | 1, 2 | 20, 10 | 30, 10 | 12, 0 | 100, 50 | 10, 5 | 10, 15 | 20, 40 |" in text
    assert "| 1,024 | ppo | 1, 2 | +0.300 | +0.017 |" in text  # two seeds give no interval
    more = {
        (1024, name): {seed: run(name, seed, 10, after, 0.5) for seed in (1, 2, 3)}
        for name, after in (("gipo", 30), ("ppo", 15), ("ppo-0.5", 40))
    }
    more = "\n".join(report.vla_tables(more))
    assert "| 1,024 | ppo-0.5 | 1, 2, 3 | -0.200 [-0.200, -0.200] |" in more
    assert "| 1,024 | ppo | 1, 2, 3 | +0.300 [+0.300, +0.300] | +0.000 [+0.000, +0.000] |" in more
    assert "| 1,024 | gipo | 1, 2 | 0.500 | 0.500 |" in text and "4 runs, algorithm version 1" in text
    assert (tmp_path / "vla_tiny" / "curves-libero_spatial-2048-v1.png").stat().st_size > 10_000
    assert report.write_report(args) == []
    short = run("gipo", 3, 0, 50, 1.0)  # shorter than the critic's warm-up
    short["args"]["critic_warmup"] = 99
    assert "| 1,024 | gipo | 3 | " in report.vla_tables({(1024, "gipo"): {3: short}})[0]
    (folder / "4.json").write_text(json.dumps(run("gipo", 1, 0, 50, 1.0) | {"total_timesteps": 4096}))
    assert report.write_report(args) == [str(tmp_path / "vla_tiny" / "tables.md")]
    longer = (tmp_path / "vla_tiny" / "tables.md").read_text()
    assert longer.startswith(text.rstrip()) and "tiny preset, 4,096 steps" in longer, "runs of other lengths stand apart"


def test_matrix_and_what_is_finished(tmp_path):
    """Two methods at two buffer sizes, equal but for the objective; a finished run is skipped."""
    command = ["./benchmark.sh", "vla", "--dry-run", "--seeds", "7 8 9"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 12
    args = [vars(vla.parse_args(line.split()[2:])) for line in lines]
    assert all(a["preset"] == "tiny" and a["total_timesteps"] == 102_400 and a["eval_every"] == 0 for a in args)
    first = [a for a in args if a["seed"] == 7]
    assert {(a["trust_weight"], a["buffer_size"]) for a in first} == {
        (m, b) for m in ("gipo", "ppo") for b in (10_240, 102_400)
    }
    assert len({json.dumps({k: v for k, v in a.items() if k not in ("trust_weight", "exp_name")}) for a in first}) == 2
    folder = tmp_path / "vla-tiny" / "libero_spatial__x__7"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"versions": {"algorithm": vla.ALGORITHM_VERSION}, "args": args[0]}))
    assert report.pending(lines, report.Args(runs=str(tmp_path), results=str(tmp_path))) == lines[1:]
    older = {key: value for key, value in args[0].items() if key != "fast_env"}  # LIBERO's own steps, so another run
    (folder / "result.json").write_text(json.dumps({"versions": {"algorithm": vla.ALGORITHM_VERSION}, "args": older}))
    assert report.pending(lines, report.Args(runs=str(tmp_path), results=str(tmp_path))) == lines
    stock = [f"{lines[0]} --no-fast-env"]
    assert report.pending(stock, report.Args(runs=str(tmp_path), results=str(tmp_path))) == []


def test_rows_of_the_objectives():
    """The four methods differ in the objective only, at buffers of one rollout, of ten, and of the whole run."""
    command = ["./benchmark.sh", "vla", "--dry-run", "--seeds", "7", "--regimes", "fresh recent stale"]
    command += ["--methods", "gipo ppo sapo none"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert process.returncode == 0, process.stderr
    runs = [vars(vla.parse_args(line.split()[2:])) for line in process.stdout.splitlines()]
    methods, sizes = ("gipo", "ppo", "sapo", "none"), {"fresh": 1024, "recent": 10_240, "stale": 102_400}
    cells = [(method, regime) for regime in sizes for method in methods]
    assert [run["exp_name"] for run in runs] == [f"{method}_{regime}" for method, regime in cells]
    expected = [runs[0] | {"trust_weight": m, "buffer_size": sizes[r], "exp_name": f"{m}_{r}"} for m, r in cells]
    assert runs == expected
    assert (runs[0]["num_envs"] * runs[0]["num_steps"] * 8, runs[0]["total_timesteps"]) == (1024, 102_400)  # chunks of 8


RESULTS = sorted((ROOT / "results" / "vla_tiny" / "runs").glob("*/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[f"{path.parent.name}-{path.stem}" for path in RESULTS])
def test_committed_run(path):
    """What a reader needs to repeat it, all 50 initial states in every evaluation, and a start that the methods share."""
    result = json.loads(path.read_text())
    assert result.keys() >= {"args", "git_commit", "versions", "machine", "curves", "evaluations", "wall_seconds"}
    gone = {"env_groups", "task_sampling", "demo_timeout"}
    assert result["versions"]["algorithm"] < vla.ALGORITHM_VERSION or set(result["args"]) - gone == set(vars(vla.Args()))
    assert not result["git_commit"].endswith("-dirty")
    steps = [e["step"] for e in result["evaluations"]]
    assert steps == sorted(set(steps)) and (steps[0], steps[-1]) == (0, result["total_timesteps"])
    assert all([state for _, state, _ in e["successes"]] == list(range(50)) for e in result["evaluations"])
    same = [json.loads(p.read_text()) for p in path.parent.glob(f"*__{result['seed']}.json")]
    assert all(other["evaluations"][0]["successes"] == result["evaluations"][0]["successes"] for other in same)
