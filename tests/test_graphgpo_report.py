"""report.py and benchmark.sh on runs of graphgpo_sokoban.py: collected curves, numbers of the table, skipped runs."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_json, read_scalars

import report
from graphgpo_sokoban import Args, main


def written(folder, exp_name, seed, level, final, version=1, env_id="Sokoban"):
    """A collected run whose success rises in a line to twice the mean `level`."""
    curves = {"success": np.linspace(0, 2 * level, 30).tolist(), "held_out_success": [None, *[final] * 29]}
    curves |= {"entropy": [1.0] * 30, "episodes": list(range(100, 3001, 100))}
    run = {"exp_name": exp_name, "seed": seed, "total_episodes": 3000, "eval_success_rate": final, "curves": curves}
    run |= {
        "credit_seconds": 1.0,
        "wall_seconds": 10.0,
        "machine": "a computer",
        "args": {"env_id": env_id},
        "versions": {"algorithm": version},
    }
    path = folder / "graphgpo_sokoban" / "runs" / "3000" / f"{env_id}-{exp_name}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


def test_table_and_plot(tmp_path):
    for seed in (1, 2, 3):
        written(tmp_path, "grpo", seed, 0.1 + 0.01 * seed, 0.3)
        written(tmp_path, "gigpo", seed, 0.15 + 0.01 * seed, 0.3)
        written(tmp_path, "graphgpo", seed, 0.2 + 0.01 * seed, 0.4 + 0.1 * seed)
    text = report.graphgpo_report(report.Args(results=str(tmp_path), runs=str(tmp_path)))
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| g")}
    line = next(line for line in text.splitlines() if line.startswith("| graphgpo | 3"))
    assert line.split(" | ")[2:] == ["0.220 [0.210, 0.230]", "0.220", "1.00 [1.00, 1.00]", "0.600 [0.500, 0.700]",
                                     "1.00 [1.00, 1.00]", "10% |"]  # fmt: skip
    line = next(line for line in text.splitlines() if line.startswith("| gigpo | 3"))
    assert line.split(" | ")[6] == "0.50 [0.50, 0.50]"  # equal final success: ties count half
    assert rows["graphgpo - gigpo"][2] == "+0.050 [+0.050, +0.050]"
    assert rows["gigpo - grpo"][3] == "+0.000 [+0.000, +0.000] |"
    plot = tmp_path / "graphgpo_sokoban" / "curves-3000-v1.png"
    assert plot.stat().st_size > 10_000
    plot.unlink()
    assert report.graphgpo_report(report.Args(results=str(tmp_path), runs=str(tmp_path), check=True)) == text
    assert not plot.exists()


def test_ablations_alone_have_a_table_and_no_plot(tmp_path):
    written(tmp_path, "graphgpo-step", 1, 0.1, 0.3)
    assert "| graphgpo-step | 1 |" in report.graphgpo_report(report.Args(results=str(tmp_path), runs=str(tmp_path)))
    assert not [*tmp_path.rglob("*.png")]


def test_tasks_are_not_mixed(tmp_path):
    """Of runs of one method, length and seed on two tasks none is dropped."""
    for seed in (1, 2):
        written(tmp_path, "grpo", seed, 0.1, 0.3)
        written(tmp_path, "grpo", seed, 0.2, 0.3, env_id="MiniGrid-Empty-5x5-v0")
    text = report.graphgpo_report(report.Args(results=str(tmp_path), runs=str(tmp_path)))
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| grpo | 2 |")]
    assert [line[2].split()[0] for line in lines] == ["0.200", "0.100"] and "## MiniGrid-Empty-5x5-v0, 3,000 episodes" in text
    assert len([*tmp_path.glob("graphgpo_sokoban/*.png")]) == 2


def test_versions_are_not_mixed(tmp_path):
    written(tmp_path, "grpo", 1, 0.1, 0.3)
    written(tmp_path, "grpo", 2, 0.2, 0.3, version=2)
    text = report.graphgpo_report(report.Args(results=str(tmp_path), runs=str(tmp_path), check=True))
    assert "## 3,000 episodes, algorithm version 1\n" in text and "## 3,000 episodes, algorithm version 2\n" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| grpo | 1 |")]
    assert [line[2].split()[0] for line in lines] == ["0.100", "0.200"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run where the benchmark puts it."""
    parent = tmp_path_factory.mktemp("runs")
    main(Args(exp_name="graphgpo", run_dir=str(parent / "graphgpo-384"), total_episodes=384, max_solution=4, eval_every=128))
    return parent


def test_collected_run(finished, tmp_path):
    report.collect_graphgpo(report.Args(runs=str(finished), results=str(tmp_path)))
    run = read_json(tmp_path / "graphgpo_sokoban" / "runs" / "384" / "Sokoban__graphgpo__1.json")
    folder = finished / "graphgpo-384" / "Sokoban__graphgpo__1"
    assert {key: run[key] for key in read_json(folder / "result.json")} == read_json(folder / "result.json")
    points = read_scalars(folder)
    for name, tag in (("success", "charts/episodic_success"), ("held_out_success", "eval/success_rate")):
        values = [value for value in run["curves"][name] if value is not None]
        np.testing.assert_allclose(values, [value for _, value in points[tag]], atol=1e-4)
    assert run["curves"]["episodes"][-1] == 384
    file = finished / "graphgpo-384" / "Sokoban__graphgpo__1" / "result.json"
    result, newer = file.read_text(), read_json(file)
    newer["versions"]["algorithm"] = 2  # of a fork: beside the older run, not over it
    file.write_text(json.dumps(newer))
    report.collect_graphgpo(report.Args(runs=str(finished), results=str(tmp_path)))
    file.write_text(result)
    stored = {path.parent.name: read_json(path) for path in tmp_path.glob("graphgpo_sokoban/runs/*/*.json")}
    assert {name: content["versions"]["algorithm"] for name, content in stored.items()} == {"384": 1, "384-v2": 2}


def test_a_language_models_run_has_a_table_of_its_own(finished, tmp_path):
    """Of the same name, length and seed as a network's."""
    args = report.Args(runs=str(finished), results=str(tmp_path))
    report.collect_graphgpo(args)
    (file,) = tmp_path.rglob("*.json")
    run = read_json(file)
    run |= {"args": run["args"] | {"model": "/models/qwen"}, "eval_success_rate": 0.987}
    (other := file.parent.with_name("384-qwen")).mkdir()
    (other / file.name).write_text(json.dumps(run))
    text = report.graphgpo_report(report.Args(results=str(tmp_path), check=True))
    assert text.count("| graphgpo | 1 |") == 2 and text.count("| 0.987 |") == 1 and "Sokoban-qwen" in text


def test_benchmark_lists_and_skips(finished, tmp_path):
    """All nine runs of three seeds; the one that is finished with equal arguments is left out, a flag away it is not."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "benchmark.sh"), "graphgpo", "--dry-run", "--seeds", "1 2 3", "--steps", "384"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 9 and "9 of 9" in process.stderr
    flags = re.search(r"graphgpo_sokoban.py .*", lines[2])[0]
    assert "--advantage graphgpo --env-id Sokoban --seed 1 --exp-name graphgpo --total-episodes 384" in flags
    here = report.Args(runs=str(finished), results=str(tmp_path))
    same = f"python {flags} --max-solution 4 --eval-every 128"
    assert report.pending([same, lines[3], f"{same} --omega 0.5 --run-dir elsewhere"], here) == [
        lines[3],
        f"{same} --omega 0.5 --run-dir elsewhere",
    ]


def test_the_page_says_what_the_runs_on_text_games_say():
    """docs/graphgpo_sokoban.md: success untrained and by chance, and three runs on level 3; success in percent."""
    page, folder = (ROOT / "docs" / "graphgpo_sokoban.md").read_text(), ROOT / "results/graphgpo_sokoban/textworld"
    for row in json.loads((folder / "untrained.json").read_text())["levels"]:
        cells = row["level"], row["max_steps"], f"{100 * row['random']:.0f}", f"{100 * row['untrained']:.0f}"
        assert row["level"] > 100 or f"| {' | '.join(map(str, cells))} |" in page
    (start,) = (row for row in json.loads((folder / "untrained.json").read_text())["levels"] if row["level"] == 3)
    for name, method in (("GRPO", "grpo"), ("GiGPO", "gigpo"), ("GraphGPO", "graphgpo")):
        run = json.loads((folder / "level-3" / f"{method}.json").read_text())
        invalid, held_out = (
            [f"{100 * value:.0f}" for _, value in run["curve"][key]] for key in ("invalid_actions", "held_out_success")
        )
        assert (run["args"]["advantage"], run["args"]["seed"], run["args"]["game_level"]) == (method, 4, 3)
        warm = run["held_out_at_temperature_1"]["success_rate"]
        assert f"| {name} | {100 * warm:.0f} | {held_out[-1]} | {invalid[-1]} |" in page
        assert f"| untrained | {100 * start['untrained_at_temperature_1']:.0f} | {held_out[0]} | {invalid[0]} |" in page
