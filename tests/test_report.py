"""report.py and benchmark.sh: statistics against hand-computed cases, what counts as finished, failures and resuming."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT, read_json
from torch.utils.tensorboard import SummaryWriter

import gipo_continuous
import report

PYTHON = {**os.environ, "PYTHON": sys.executable}
VERSION = gipo_continuous.ALGORITHM_VERSION


# -------------------- Statistics --------------------
def test_interquartile_mean():
    assert report.interquartile_mean([np.array([0.0, 1.0]), np.array([5.0, 100.0])]) == 3.0  # of 0 1 5 100: 1 and 5
    assert report.interquartile_mean([np.arange(8.0)]) == 3.5
    assert report.interquartile_mean([np.array([2.0, 4.0, 9.0])]) == 5.0  # a quarter of 3 is less than one score


def test_tasks_with_more_runs_count_no_more():
    """Two runs of an easy task and three of a hard one weigh the same: six of each, three cut from either side."""
    assert report.interquartile_mean([[1.0, 0.8], [0.0, 0.2, 0.4]]) == pytest.approx((0.2 + 0.4 * 2 + 0.8 * 3) / 6)
    assert report.interquartile_mean([[1.0, 1.0, 1.0], [0.0]]) == pytest.approx(0.5)


def test_probability_of_improvement():
    ours, theirs = [np.array([1.0, 2.0]), np.array([0.0])], [np.array([1.0, 0.0]), np.array([3.0])]
    # First task: 1 > 1 is a tie, 1 > 0, 2 > 1, 2 > 0, so 3.5 of 4. Second task: 0.
    assert report.probability_of_improvement(ours, theirs) == pytest.approx((3.5 / 4 + 0) / 2)
    assert report.probability_of_improvement(theirs, ours) == pytest.approx(1 - (3.5 / 4 + 0) / 2)


def test_bootstrap_is_stratified_by_task():
    """Tasks that differ, but whose seeds are equal, have no uncertainty: seeds never move between tasks."""
    scores = [np.zeros(5), np.ones(5)]
    assert report.bootstrap_interval(scores, lambda s: np.concatenate(s, axis=-1).mean(-1)) == (0.5, 0.5)


def test_bootstrap_interval_of_a_mean():
    """Against the exact percentiles of the mean of two draws from {0, 1}: 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4."""
    assert report.bootstrap_interval([np.array([0.0, 1.0])], report.seed_mean) == (0.0, 1.0)
    many = np.array([0.0, 1.0] * 200)  # normal approximation: 0.5 +- 1.96 * 0.5 / sqrt(400)
    low, high = report.bootstrap_interval([many], report.seed_mean)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)


def test_bootstrap_draws_are_those_of_a_loop():
    """All draws at once are the draws one by one, also where tasks have different numbers of seeds."""
    scores = [np.array([0.1, 0.5]), np.array([0.2, 0.9, 0.4, 0.7]), np.array([0.0, 0.3, 1.0])]
    rng = np.random.default_rng(0)
    draws = [[task[rng.integers(0, len(task), len(task))] for task in scores] for _ in range(2000)]
    for statistic in (report.interquartile_mean, lambda s: report.probability_of_improvement(s[:1], s[1:2])):
        expected = np.percentile([statistic(draw) for draw in draws], [2.5, 97.5])
        np.testing.assert_array_equal(report.bootstrap_interval(scores, statistic), expected)


def test_single_runs_have_no_interval():
    """Resampling one run per task would give an interval of width 0."""
    single, double = [np.array([0.2, 0.3]), np.array([0.7])], [np.array([0.2, 0.3]), np.array([0.7, 0.7])]
    assert report.span(0.5, report.bootstrap_interval(single, report.interquartile_mean)) == "0.50"
    assert report.span(0.5, report.improvement_interval(single, double)) == "0.50"
    assert report.span(0.5, report.improvement_interval(double, single)) == "0.50"
    assert "[" in report.span(0.5, report.bootstrap_interval(double, report.interquartile_mean))
    assert "[" in report.span(0.5, report.improvement_interval(double, double))


def test_paper_score():
    """Min and max of the method means, per task: task x has means 10 and 20, task y 100 and 300."""
    a, b = [np.array([10.0]), np.array([300.0])], [np.array([15.0, 25.0]), np.array([100.0])]
    assert report.paper_score([*a, *b], 2, 0) == pytest.approx((0.0 + 1.0) / 2)
    assert report.paper_score([*a, *b], 2, 1) == pytest.approx(
        (0.5 + 0.0) / 2
    )  # of 0.5, 1.5, 0, 0 a quarter is cut on either side
    # The worst method's interval has a width too: in other draws of the seeds it is not the worst.
    returns = [np.array([10.0, 30.0]), np.array([15.0, 25.0])]
    low, high = report.bootstrap_interval(returns, lambda draw: report.paper_score(draw, 1, 0))
    assert high > low


def test_cells_with_other_arguments_are_refused(tmp_path):
    """A fork's runs under the same name: the report names both and what differs."""
    for source in (ROOT / "results" / "runs" / "300000").glob("*__gipo_stale__1.json"):
        (tmp_path / "runs" / "300000").mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "runs" / "300000")
    command = [sys.executable, str(ROOT / "report.py"), "--runs", "none", "--readme", "none", "--results", str(tmp_path)]
    assert subprocess.run([*command], capture_output=True).returncode == 0
    path = tmp_path / "runs" / "300000" / "reach-v3__gipo_stale__1.json"
    run = read_json(path)
    path.write_text(json.dumps(run | {"args": run["args"] | {"ent_coef": 0.01}}))
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("error: gipo stale, 300,000 steps: ")
    assert "reach-v3 seed 1 differ in ent_coef" in process.stderr and process.stderr.count("\n") == 1


def test_arguments_that_decide_the_outcome():
    """Where and how a run is computed does not; version 1's flags are read as it did, from files of before they came, too."""
    args = {"env_id": "reach-v3", "policy_head": "categorical", "sigma": 0.2}
    assert report.outcome_args(args | {"overlap": True}) == report.outcome_args(args | {"overlap": False, "num_bins": 256})
    assert report.outcome_args(args | {"env_kwargs": "{}"}) != report.outcome_args(args | {"env_kwargs": '{"size": 2}'})
    version_1 = args | {"trust_side": "both"}
    assert report.outcome_args(version_1) == report.outcome_args(version_1 | {"adaptive_sigma": 0.0, "fast_env": True})
    assert report.outcome_args(version_1) != report.outcome_args(version_1 | {"adaptive_sigma": 0.7})


def test_grid_means():
    points = [(5, 1.0), (10, 3.0), (11, 5.0), (300, 7.0)]  # 30 stretches of 10 steps: (0, 10], (10, 20], ...
    grid = report.on_grid(points, 300)
    assert grid[:3] == [2.0, 5.0, None] and grid[-1] == 7.0 and len(grid) == 30


def test_area_fills_gaps():
    """Episodes that end together, as in eight environments in step, leave stretches without a value in a short run."""
    curve = [None, None, 1.0, None, 0.5, None]
    filled = report.filled_curve({"curves": {"success": curve}}, "success")
    np.testing.assert_array_equal(filled, [np.nan, np.nan, 1.0, 1.0, 0.5, 0.5])  # in a plot nothing, in the area no success
    assert report.area_under_curve({"curves": {"success": curve}}, "success") == pytest.approx(3 / 6)


@pytest.mark.parametrize("missing", [{"success": [None] * 30}, {}])
def test_a_missing_curve_is_missing(missing):
    """Not 0: neither its area, nor what it is compared with, nor its line in the plots."""
    runs = [run("gipo", "stale", seed, 1.0, 10, 0.5) for seed in (1, 2)]
    runs += [run("ppo-clip", "stale", seed, 0.5, 9, 0.2) for seed in (1, 2)]
    for stored in runs:
        stored["curves"]["steps"] = list(range(30))
        stored["args"] = {"buffer_size": 20_000, "num_envs": 8, "num_steps": 64}
    lost = runs[1]
    lost["curves"] = {"steps": lost["curves"]["steps"]} | missing
    assert np.isnan(report.area_under_curve(lost, "success"))
    clip, gipo = [row.strip("| ").split(" | ") for row in report.aggregate_table(runs).splitlines()[2:]]
    assert clip[4] == "0.10 [0.10, 0.10]" and gipo[3:6] == ["1.00 [1.00, 1.00]", "-", "10"]
    (row,) = [row.strip("| ").split(" | ") for row in report.same_replay_table(runs).splitlines()[2:]]
    assert row[6] == "- against 0.10" and row[8] == "-" and row[9] == "1.00 [1.00, 1.00]"
    lines = report.plot_curves(runs).axes[0].lines
    assert [list(line.get_ydata())[-1] for line in lines] == [0.2, 0.5]  # GIPO's is that of the run that has one
    areas = report.plot_against_buffer(runs, {"area": "area", "utilization": "utilization"}).axes
    assert [text.get_text() for text in areas[0].get_legend().get_texts()] == ["ppo-clip"]
    assert "| stale | gipo | 2.0 | - |" in report.diagnostics_table(runs)


def test_a_missing_curve_of_the_other_scripts():
    """GraphGPO's held-out success without an evaluation, and the VLA's success where no episode ended."""
    curves = {"success": [0.5] * 30, "episodes": list(range(30))}
    sokoban = {"graphgpo": {1: {"curves": curves}, 2: {"curves": curves | {"held_out_success": [None, *[0.25] * 29]}}}}
    training, held_out = report.plot_graphgpo(sokoban).axes
    assert training.lines[0].get_ydata()[-1] == 0.5 and held_out.lines[0].get_ydata()[-1] == 0.25
    del sokoban["graphgpo"][2]
    assert not report.plot_graphgpo(sokoban).axes[1].lines
    curves = {name: [0.5] * 3 for name in report.VLA_CURVES if name != "clipfrac"} | {
        "steps": [1, 2, 3],
        "success": [None] * 3,
    }
    successes = [[0, k, 1.0] for k in range(50)]
    libero = {
        "args": {"critic_warmup": 2},
        "versions": {"algorithm": 2},
        "evaluations": [{"successes": successes}],
        "curves": curves,
        "seed": 1,
    }
    rows = report.vla_tables({(1024, "gipo"): {1: libero | {"train_success_rate": None}}})
    assert "| 1,024 | gipo | 1 | 100 | 100 | 100 | 100 | - | - | - |" in rows[0]
    assert "| 1,024 | gipo | 1 | 0.500 | 0.500 | 0.500 | - | 0.500 | 0.500 |" in rows[-1]
    assert not report.plot_vla({(1024, "gipo"): {1: libero}}).axes[0].lines


def run(method, regime, seed, success, score, area, env_id="reach-v3"):
    """What the tables read of a result."""
    names = {"method": method, "regime": regime, "seed": seed, "env_id": env_id}
    curves = {"success": [None] * 15 + [area] * 15}
    return names | {"eval_success_rate": success, "eval_return_mean": score, "wall_seconds": 120.0, "curves": curves}


def test_aggregate_table_by_hand():
    """One task, two seeds each: success ties half, returns do not, and an area counts stretches without an episode as 0."""
    ppo = [run("ppo", "on-policy", seed, 1.0, 4000 + seed, 0.5) for seed in (1, 2)]
    gipo = [run("gipo", "stale", 1, 1.0, 3000, 1.0), run("gipo", "stale", 2, 0.5, 5000, 1.0)]
    rows = report.aggregate_table(ppo + gipo).splitlines()
    assert rows[2] == "| on-policy | ppo | 2 | 1.00 [1.00, 1.00] | 0.25 [0.25, 0.25] | 4,002 | - | - | - |"
    cells = rows[3].strip("| ").split(" | ")
    assert cells[:6] == ["stale", "gipo", "2", "0.75 [0.50, 1.00]", "0.50 [0.50, 0.50]", "4,000"]
    assert [cell.split(" ")[0] for cell in cells[6:]] == ["0.25", "1.00", "0.50"]
    more = [run("gipo", "stale", 3, 0.0, 0, 0.0)]  # counts in its own scores, but meets no PPO run of its seed
    assert report.aggregate_table(ppo + gipo + more).splitlines()[3].split(" | ")[6:] == rows[3].split(" | ")[6:]


def test_same_replay_table_by_hand():
    """Only PPO-clip's regime, only the tasks and seeds that both have; on-policy PPO and other regimes have no row."""
    clip = [run("ppo-clip", "stale", seed, 0.5, 1000, 0.2) for seed in (1, 2)]
    gipo = [run("gipo", "stale", 1, 1.0, 2000, 0.6), run("gipo", "stale", 2, 0.5, 900, 0.4)]
    others = [run("gipo", "stale", 1, 0.0, 0, 0.0, "push-v3"), run("gipo", "stale", 3, 0.0, 0, 0.0)]
    others += [run("gipo", "stale", 1, 0.0, 0, 0.0, "door-open-v3"), run("ppo-clip", "stale", 2, 1.0, 9, 1.0, "door-open-v3")]
    others += [run("gipo", "recent", 1, 1.0, 1, 1.0), run("ppo", "on-policy", 1, 1.0, 1, 1.0)]
    (row,) = report.same_replay_table(clip + gipo + others).splitlines()[2:]
    cells = row.strip("| ").split(" | ")
    assert cells[:7] == ["stale", "gipo", "ppo-clip", "1", "2", "0.75 against 0.50", "0.25 against 0.10"]
    assert [cell.split(" ")[0] for cell in cells[7:]] == ["0.75", "1.00", "0.50"]
    others = [r for r in others if r["method"] != "ppo-clip"]
    assert report.same_replay_table(gipo + others) == report.same_replay_table(clip) == ""


def test_gain_table_by_hand():
    """One task, two seeds: stale less fresh, and GIPO's gain less PPO-clip's; methods that lack a regime have no row."""
    runs = [run("gipo", "fresh", s, 0.2, 1000, 0.2) for s in (1, 2)] + [
        run("gipo", "stale", s, 0.9, 3000, 0.6) for s in (1, 2)
    ]
    runs += [run("ppo-clip", "fresh", s, 0.4, 2000, 0.4) for s in (1, 2)]
    runs += [run("ppo-clip", "stale", 1, 0.4, 2500, 0.4), run("ppo-clip", "stale", 2, 0.8, 2500, 0.4)]
    rows = [
        row.strip("| ").split(" | ") for row in report.gain_table([*runs, run("ppo", "on-policy", 1, 1, 1, 1)]).splitlines()
    ]
    assert rows[2] == ["ppo-clip", "+0.20 [+0.00, +0.40]", "+0.00 [+0.00, +0.00]", "+500 [+500, +500]"]
    assert rows[3] == ["gipo", "+0.70 [+0.70, +0.70]", "+0.20 [+0.20, +0.20]", "+2,000 [+2,000, +2,000]"]
    assert rows[4][0] == "gipo less ppo-clip"
    assert rows[4][1:] == ["+0.50 [+0.30, +0.70]", "+0.20 [+0.20, +0.20]", "+1,500 [+1,500, +1,500]"]
    assert len(rows) == 5 and report.gain_table(runs[:2]) == ""


def test_tasks_without_a_success_flag_have_returns_only(tmp_path):
    """HalfCheetah in the benchmark: its cell shows the return, and the comparisons by success leave the task out."""
    runs = [run("gipo", "stale", 1, 0.5, 2000, 0.5), run("gipo", "stale", 1, None, 3000, 0.0, "HalfCheetah-v5")]
    rows = report.task_table(runs).splitlines()
    assert rows[2:] == ["| HalfCheetah-v5 | (3,000) |", "| reach | 50% (2,000) |"]

    meta_world = read_json(ROOT / "results" / "runs" / "300000" / "reach-v3__gipo_stale__1.json")
    cheetah = meta_world | {"env_id": "HalfCheetah-v5", "eval_success_rate": None}
    cheetah["curves"] = meta_world["curves"] | {"success": [None] * 30}
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    args = report.Args(results=str(tmp_path), readme=str(tmp_path / "README.md"))
    (folder / "HalfCheetah-v5__gipo_stale__1.json").write_text(json.dumps(cheetah))
    report.write_report(args)
    assert "No task with a success flag" in (tmp_path / "benchmark-300000-v1.md").read_text()
    (folder / "reach-v3__gipo_stale__1.json").write_text(json.dumps(meta_world))
    report.write_report(args)
    table = (tmp_path / "benchmark-300000-v1.md").read_text()
    assert "| stale | gipo | 1 |" in table and f"| HalfCheetah-v5 | ({cheetah['eval_return_mean']:,.0f}) |" in table


def test_rows_that_lack_tasks_are_shown_on_what_all_have(tmp_path):
    """They have no place among the rows of all tasks, so a table and a plot of their own, on fewer tasks, show them."""
    stored = read_json(ROOT / "results" / "runs" / "300000" / "reach-v3__gipo_stale__1.json")
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    for task, name in [(task, name) for task in ("reach-v3", "push-v3") for name in ("ppo_on-policy", "gipo_stale")]:
        (folder / f"{task}_{name}.json").write_text(json.dumps(stored | {"env_id": task, "exp_name": name}))
    args = report.Args(results=str(tmp_path), readme=str(tmp_path / "README.md"))
    report.write_report(args)
    assert "Over 2 tasks:" in (tmp_path / "benchmark-300000-v1.md").read_text()
    assert "every row has" not in (tmp_path / "benchmark-300000-v1.md").read_text()
    (folder / "recent.json").write_text(json.dumps(stored | {"exp_name": "gipo_recent"}))
    report.write_report(args)
    text = (tmp_path / "benchmark-300000-v1.md").read_text()
    every_row = text[text.index("Over the 1 tasks that every row has (reach):") :]
    assert text.index("without the rows that lack some of them (gipo recent):") < text.index(every_row)
    assert "| recent | gipo | 1 |" in every_row and "| stale | gipo | 1 |" in every_row
    assert (tmp_path / "buffer-all-rows-300000-v1.png").stat().st_size > 10_000


def test_plots_are_drawn_again_only_for_other_data(tmp_path):
    """Also those that somebody damaged."""
    stored = read_json(ROOT / "results" / "runs" / "300000" / "reach-v3__gipo_stale__1.json")
    file = tmp_path / "runs" / "300000" / "reach-v3__gipo_stale__1.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(stored))
    args = report.Args(results=str(tmp_path), readme="none")
    plots = [tmp_path / f"{name}-300000-v1.png" for name in ("curves", "buffer", "staleness")]

    def drawn():
        before = [plot.exists() and plot.stat().st_mtime_ns for plot in plots]
        report.write_report(args)
        return [plot.stat().st_mtime_ns != time for plot, time in zip(plots, before, strict=True)]

    assert drawn() == [True] * 3 and drawn() == [False] * 3
    plots[0].write_bytes(b"half a file")
    assert drawn() == [True, False, False]
    file.write_text(json.dumps(stored | {"eval_return_mean": 1.0}))
    assert drawn() == [True] * 3 and drawn() == [False] * 3


def test_readme_shows_the_largest_set_of_runs(tmp_path):
    """A few runs of another length have their own tables, and leave the README's block as it is."""
    result = read_json(ROOT / "results" / "runs" / "300000" / "reach-v3__gipo_stale__1.json")
    (tmp_path / "README.md").write_text("<!-- benchmark -->\n<!-- /benchmark -->\n")
    for steps, seeds in (("300000", (1, 2)), ("2000000", (1,))):
        (tmp_path / "runs" / steps).mkdir(parents=True)
        for seed in seeds:
            args = result["args"] | {"total_timesteps": int(steps)}
            (tmp_path / "runs" / steps / f"{seed}.json").write_text(json.dumps(result | {"seed": seed, "args": args}))
    report.write_report(report.Args(results=str(tmp_path), readme=str(tmp_path / "README.md")))
    assert "2 runs of 300,000 steps" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "benchmark-2000000-v1.md").exists()


def test_a_newer_version_is_not_overwritten(tmp_path):
    """Other arguments are, and so is an older version."""
    result = read_json(ROOT / "results" / "runs" / "300000" / "reach-v3__gipo_stale__1.json")
    assert not report.is_stored(result, tmp_path / "x.json")
    for version, gamma, stored in [(1, 0.99, True), (1, 0.5, False), (0, 0.99, False), (2, 0.99, True)]:
        file = result | {"args": result["args"] | {"gamma": gamma}, "versions": {"algorithm": version}}
        (tmp_path / "x.json").write_text(json.dumps(file))
        assert report.is_stored(result, tmp_path / "x.json") == stored


# -------------------- Files that are damaged, or not the benchmark's --------------------
def finished_run(run_dir, exp_name, seed=1, last=512, env_id="reach-v3", **args):
    """A run folder such as gipo_continuous.py leaves, without its checkpoint; its events end at step `last` of 512.

    Its scores follow from the seed. Meta-World's tasks have a success, and its curve rises in a line to 1.
    """
    result = read_json(ROOT / "results" / "runs" / "300000" / "reach-v3__gipo_stale__1.json")
    del result["curves"], result["machine"]
    result |= {"env_id": env_id, "exp_name": exp_name, "seed": seed, "total_timesteps": 512, "sps": 1000.0 * seed}
    result |= {"eval_success_rate": 0.25 * seed, "eval_return_mean": 100.0 * seed, "train_return_mean": 10.0 * seed}
    if not env_id.endswith("-v3"):
        result["eval_success_rate"] = None
    result["args"] |= {"env_id": env_id, "exp_name": exp_name, "seed": seed, "total_timesteps": 512, **args}
    folder = run_dir / f"{env_id}__{exp_name}__{seed}"
    with SummaryWriter(folder) as writer:
        for step in range(64, last + 1, 64):
            writer.add_scalar("charts/episodic_return", seed, step)
            if result["eval_success_rate"] is not None:
                writer.add_scalar("charts/episodic_success", step / 512, step)
    (folder / "args.json").write_text(json.dumps(result["args"] | {"algorithm_version": 1}))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def place(tmp_path):
    """Arguments of report.py with folders of their own, and one good run."""
    finished_run(tmp_path / "runs" / "benchmark-512", "gipo_stale")
    (tmp_path / "results").mkdir()
    return report.Args(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), readme="none")


def stored(args):
    return sorted(str(path.relative_to(args.results)) for path in Path(args.results).rglob("*.*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ('{"env_id": "reach-v', "cannot be read"),
        ("[]", "holds no JSON object"),
        ({"seed": None}, "seed must be an integer, not None"),
        ({"seed": True}, "seed must be an integer, not True"),
        ({"total_timesteps": "512"}, "total_timesteps must be an integer, not '512'"),
        ({"eval_return_mean": None}, "eval_return_mean must be a number, not None"),
        ({"versions": {"torch": "2"}}, "has no versions.algorithm"),
        ({"args": []}, "args must be an object, not []"),
        ({"args": {"gamma": 1}}, "has no args.total_timesteps"),
    ],
)
def test_a_damaged_result_is_named_and_nothing_is_stored(place, text, said):
    file = finished_run(Path(place.runs) / "benchmark-512", "ppo_on-policy") / "result.json"
    file.write_text(text if isinstance(text, str) else json.dumps(read_json(file) | text))
    with pytest.raises(report.ReportError, match=f"^{re.escape(str(file))}.*{re.escape(said)}"):
        report.main(place)
    assert stored(place) == []
    shutil.rmtree(file.parent)
    report.main(place)
    assert "runs/512/reach-v3__gipo_stale__1.json" in stored(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exp_name": "mykernel"}, "exp_name mykernel is not METHOD_REGIME"),
        ({"exp_name": "gipo_old"}, "exp_name gipo_old is not METHOD_REGIME"),
        ({"curves": {"success": [0.5] * 30}}, "has no curves.steps.0"),
        ({"curves": {"steps": [*range(30)], "success": [0.5] * 40}}, "its curves differ in length"),
        ({"curves": {"steps": [*range(30)], "success": ["0.5"] * 30}}, "must be a number or null, not '0.5'"),
    ],
)
def test_a_damaged_file_of_the_results_is_named(place, change, said):
    report.main(place)
    file = Path(place.results) / "runs" / "512" / "reach-v3__gipo_stale__1.json"
    file.write_text(json.dumps(read_json(file) | change))
    with pytest.raises(report.ReportError, match=f"^{re.escape(str(file))}.*{re.escape(said)}"):
        report.write_report(place)


def test_errors_are_one_sentence_and_exit_code_2(place):
    file = Path(place.runs) / "benchmark-512" / "reach-v3__gipo_stale__1" / "result.json"
    file.write_text("")
    command = [sys.executable, str(ROOT / "report.py"), "--runs", place.runs, "--results", place.results, "--readme", "none"]
    for flags in ([], ["--pending"]):
        process = subprocess.run([*command, *flags], capture_output=True, text=True, input="")
        assert process.returncode == 2 and process.stderr.startswith(f"error: {file} ") and process.stderr.count("\n") == 1


@pytest.mark.parametrize("last", [0, 256])
def test_event_files_that_are_missing_or_cut_are_named(place, last):
    folder = finished_run(Path(place.runs) / "benchmark-512", "ppo_on-policy", last=last)
    with pytest.raises(report.ReportError, match=f"^{re.escape(str(folder))}: .* end at step {last} of 512"):
        report.main(place)
    assert stored(place) == []


def test_runs_of_ones_own_do_not_get_into_the_results(place, capsys):
    """In a folder of the benchmark: a name without a regime, and a copy. They are mentioned, and do no harm."""
    report.main(place)
    before = stored(place)
    own = finished_run(Path(place.runs) / "benchmark-512", "mykernel")
    shutil.copytree(Path(place.runs) / "benchmark-512" / "reach-v3__gipo_stale__1", own.with_name("copy"))
    capsys.readouterr()
    report.main(place)
    copied, named, current = capsys.readouterr().out.splitlines()
    assert copied.startswith(f"not collected: {own.with_name('copy')} (it holds the run reach-v3__gipo_stale__1)")
    assert named.startswith(f"not collected: {own} (its exp-name is not METHOD_REGIME") and current == "report is current"
    assert stored(place) == before
    shutil.rmtree(Path(place.runs))
    report.main(place)
    assert capsys.readouterr().out == "report is current\n"


def test_a_mixture_is_refused_before_it_is_stored(place):
    """A run of one's own under a method's name: the report works again once it is moved away."""
    report.main(place)
    before = stored(place)
    own = finished_run(Path(place.runs) / "benchmark-512", "gipo_stale", seed=2, gamma=0.5)
    with pytest.raises(report.ReportError, match="reach-v3 seed 1 and reach-v3 seed 2 differ in gamma"):
        report.main(place)
    assert stored(place) == before
    shutil.rmtree(own)
    report.main(place)
    assert stored(place) == before


def test_a_later_version_leaves_the_earlier_ones_runs(place):
    report.main(place)
    file = Path(place.runs) / "benchmark-512" / "reach-v3__gipo_stale__1" / "result.json"
    file.write_text(json.dumps(read_json(file) | {"versions": {"algorithm": 2}}))
    report.main(place)
    assert {"runs/512/reach-v3__gipo_stale__1.json", "runs/512-v2/reach-v3__gipo_stale__1.json"} <= {*stored(place)}
    assert {"benchmark-512-v1.md", "benchmark-512-v2.md"} <= {*stored(place)}


# -------------------- Any runs --------------------
def compared(capsys, *folders, **args):
    """What report.py prints of these folders: the cells of its table's rows, and the lines below."""
    report.main(report.Args(compare=tuple(map(str, folders)), **args))
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    assert len({len(line) for line in lines if line.startswith("|")}) <= 1  # aligned
    return rows, [line for line in lines if line and not line.startswith("|")]


def test_comparison_by_hand(tmp_path, capsys):
    for seed in (1, 2):
        finished_run(tmp_path, "gipo", seed)
    finished_run(tmp_path, "mykernel")
    finished_run(tmp_path, "mykernel", env_id="Pendulum-v1")
    rows, lines = compared(capsys, tmp_path)
    assert rows[0][:8] == ["task", "run", "seeds", "steps", "success", "return", "training return", "area, success"]
    assert rows[0][8:] == ["area, return", "steps/s"]
    assert rows[2] == ["Pendulum-v1", "mykernel", "1", "512", "-", "100", "10", "-", "1", "1,000"]
    # On the grid of 30 stretches the points 1/8 ... 8/8 fill 4, 4, 3, 4, 4, 4, 3, 1 of those from the fourth on: 110/8 of 27.
    expected = ["reach-v3", "gipo", "2", "512", "0.375 [0.25, 0.5]", "150 [100, 200]", "15 [10, 20]", "0.509"]
    assert rows[3] == [*expected, "1.5 [1, 2]", "1,500 [1,000, 2,000]"]
    assert rows[4] == ["reach-v3", "mykernel", "1", "512", "0.25", "100", "10", "0.509", "1", "1,000"] and len(rows) == 5
    assert lines[-1] == f"written: {tmp_path / 'compare.md'}, {tmp_path / 'compare.png'}"
    text = (tmp_path / "compare.md").read_text()
    assert "| mykernel" in text and "![training curves](compare.png)" in text
    assert (tmp_path / "compare.png").stat().st_size > 10_000

    runs, _ = report.read_runs([tmp_path])
    panels = {axis.get_title(): axis for axis in report.plot_comparison(runs).axes if axis.get_title()}
    assert [*panels] == ["Pendulum-v1, return", "reach-v3, return", "reach-v3, success"]
    ends = {line.get_label(): line.get_ydata()[-1] for line in panels["reach-v3, return"].lines}
    assert ends == {"gipo": 1.5, "mykernel": 1.0}
    assert np.isnan(panels["reach-v3, return"].lines[0].get_ydata()[:3]).all()  # no episode had ended
    band = panels["reach-v3, return"].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (1.0, 2.0)


def test_runs_without_a_benchmark_are_compared(place, capsys):
    """--runs does it where there is nothing else to do; results/ and the README stay as they are."""
    plain = Path(place.runs).parent / "mine"
    finished_run(plain, "gipo")
    readme = plain / "README.md"
    readme.write_text("<!-- benchmark -->\n<!-- /benchmark -->\n")
    report.main(report.Args(runs=str(plain), results=place.results, readme=str(readme)))
    assert "| reach-v3 | gipo | 1 " in capsys.readouterr().out and (plain / "compare.md").exists()
    assert stored(place) == [] and readme.read_text().count("\n") == 2
    finished_run(Path(place.runs), "gipo")
    report.main(place)
    assert f"report.py --compare {place.runs} shows them" in capsys.readouterr().out
    assert "runs/512/reach-v3__gipo_stale__1.json" in stored(place) and not (Path(place.runs) / "compare.md").exists()


def test_runs_with_other_arguments_are_not_averaged(tmp_path, capsys):
    finished_run(tmp_path, "gipo", 1)
    finished_run(tmp_path, "gipo", 2, gamma=0.5)
    rows, lines = compared(capsys, tmp_path)
    assert [row[1] for row in rows[2:]] == ["gipo, seed 1", "gipo, seed 2"]
    assert "* not averaged: gipo on reach-v3, whose runs differ in gamma (0.99, 0.5)" in lines
    file = finished_run(tmp_path, "gipo", 3) / "result.json"
    file.write_text(json.dumps(read_json(file) | {"versions": {"algorithm": 7}}))
    _, lines = compared(capsys, tmp_path)
    assert lines[1].endswith("whose runs differ in gamma (0.99, 0.5, 0.99), algorithm_version (1, 1, 7)")


def test_unfinished_runs_and_missing_curves_are_listed(tmp_path, capsys):
    finished_run(tmp_path, "gipo")
    (finished_run(tmp_path, "gipo", 2, last=128) / "result.json").unlink()
    (finished_run(tmp_path, "gipo", 3, last=0) / "result.json").unlink()
    cut, lost = finished_run(tmp_path, "cut", last=256), finished_run(tmp_path, "lost", last=0)
    rows, lines = compared(capsys, tmp_path)
    assert f"* unfinished: {tmp_path / 'reach-v3__gipo__2'}, at step 128 of 512" in lines
    assert f"* unfinished: {tmp_path / 'reach-v3__gipo__3'}, at step 0 of 512" in lines
    assert f"* without its curves: {cut}: its TensorBoard files end at step 256 of 512" in "\n".join(lines)
    by_name = {row[1]: row for row in rows}
    assert by_name["cut"][7:9] == by_name["lost"][7:9] == ["-", "-"] and by_name["lost"][4] == "0.25"
    assert by_name["gipo"][2] == "1" and by_name["gipo"][8] == "1"
    lines = [line.get_label() for line in report.plot_comparison(report.read_runs([tmp_path])[0]).axes[0].lines]
    assert lines == ["gipo"]
    for folder in (cut, lost, tmp_path / "reach-v3__gipo__1"):
        shutil.rmtree(folder)
    rows, lines = compared(capsys, tmp_path)
    assert not rows and len(lines) == 2


def test_several_folders_are_compared(tmp_path, capsys):
    """The folder is part of the name: the same flags in a fork are another method."""
    for folder in ("ours", "fork"):
        finished_run(tmp_path / folder, "gipo")
    rows, _ = compared(capsys, tmp_path / "ours", tmp_path / "fork")
    assert [row[1] for row in rows[2:]] == [f"{tmp_path}/fork/gipo", f"{tmp_path}/ours/gipo"]
    assert (tmp_path / "ours" / "compare.md").exists() and not (tmp_path / "fork" / "compare.md").exists()


def test_what_cannot_be_compared_is_named(tmp_path):
    arguments = report.Args(compare=(str(tmp_path),))
    with pytest.raises(report.ReportError, match=f"--compare {tmp_path}: no folder in it holds a run"):
        report.main(arguments)
    folder = finished_run(tmp_path, "gipo")
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(report.ReportError, match=f"copy and {folder} hold runs of one task, name and seed"):
        report.main(arguments)
    (tmp_path / "copy" / "result.json").write_text('{"exp_name": "gi')
    with pytest.raises(report.ReportError, match=f"^{tmp_path / 'copy' / 'result.json'} cannot be read"):
        report.main(arguments)
    assert not (tmp_path / "compare.md").exists()


def test_variants_meet_their_counterparts():
    """Stored advantages against PPO-clip with fresh and with stored ones, the paper's settings against PPO's under them,
    GIPO with any sigma also against PPO-clip with another epsilon, short segments and other step sizes also the usual."""
    names = ["ppo-clip", "gipo", "ppo-clip-stored", "gipo-stored", "paper", "paper-ppo", "ppo-clip-0.5", "gipo-1.0-1.0"]
    names += ["gipo-short", "ppo-clip-0.5-short", "gipo-lr-6e-4"]
    runs = [run(name, "stale", 1, 1.0, 1, 1.0) for name in names]
    pairs = {tuple(row.strip("| ").split(" | ")[1:3]) for row in report.same_replay_table(runs).splitlines()[2:]}
    assert pairs == {(name, "ppo-clip") for name in names if not name.startswith("paper") and name != "ppo-clip"} | {
        ("gipo-stored", "ppo-clip-stored"),
        ("gipo", "ppo-clip-0.5"),
        ("gipo-1.0-1.0", "ppo-clip-0.5"),
        ("paper", "paper-ppo"),
        ("gipo-short", "gipo"),
        ("gipo-lr-6e-4", "gipo"),
        ("gipo-short", "ppo-clip-0.5-short"),
        ("ppo-clip-0.5-short", "ppo-clip-0.5"),
    }
    assert [run["method"] for run in runs if not report.is_variant(run)] == [*names[:2], "ppo-clip-0.5"]


def test_only_rows_with_the_same_tasks_are_compared():
    """All tasks, without the rows that lack some, once on-policy PPO has them all; until then the tasks that all rows have."""
    ppo = [run("ppo", "on-policy", 1, 1.0, 1, 1.0, task) for task in ("reach-v3", "push-v3")]
    gipo = [run("gipo", "stale", 1, 1.0, 1, 1.0, task) for task in ("reach-v3", "push-v3")]
    part = run("gipo", "recent", 1, 1.0, 1, 1.0)
    runs, scope = report.comparable([*ppo, *gipo, part])
    assert runs == [*ppo, *gipo] and scope == "Over 2 tasks; without the rows that lack some of them (gipo recent):"
    assert report.comparable([*ppo, *gipo]) == ([*ppo, *gipo], "Over 2 tasks:")
    clip = [r | {"method": "ppo-clip"} for r in gipo]
    runs, scope = report.comparable([ppo[0], *gipo, *clip, part])
    assert runs == [ppo[0], gipo[0], clip[0], part] and scope == "Over the 1 tasks that every row has (reach):"
    assert report.comparable([ppo[0], gipo[1]]) == ([], "Over the 0 tasks that every row has (none):")


def test_diagnostics_table_by_hand():
    """First and last fifth of 30 stretches; empty stretches and curves that an old file lacks are left out."""
    runs = [run("gipo", "stale", seed, 1.0, 1, 1.0) for seed in (1, 2)] + [run("ppo", "on-policy", 1, 1.0, 1, 1.0)]
    runs[0]["curves"]["entropy"] = [None, 20.0, 20.0, 20.0, 20.0, 20.0] + [99.0] * 18 + [6.0] * 6
    runs[1]["curves"]["entropy"] = [10.0] * 6 + [99.0] * 18 + [8.0] * 6
    runs[1]["wall_seconds"] = 180.0
    header, _, ppo, gipo = [[cell.strip() for cell in line.split("|")] for line in report.diagnostics_table(runs).splitlines()]
    column = header.index("entropy")
    assert gipo[column] == f"{(5 * 20 + 6 * 10) / 11:.2g} / 7" and ppo[column] == "-"
    assert gipo[header.index("minutes")] == "2.5" and ppo[header.index("minutes")] == "2.0"


# -------------------- benchmark.sh --------------------
def benchmark(*flags, cwd=ROOT, **environment):
    command = ["./benchmark.sh", *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**PYTHON, **environment}, timeout=600)


@pytest.fixture
def checkout(tmp_path):
    """The files that the benchmark needs, in a folder of their own."""
    for file in ("benchmark.sh", "report.py", "gipo_continuous.py", "ppo_baseline.py", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


SMALL = ["--tasks", "reach-v3", "--seeds", "1", "--methods", "gipo ppo", "--regimes", "fresh", "--steps", "512"]


def test_dry_run_prints_exact_commands(checkout):
    process = benchmark("main", "--dry-run", cwd=checkout)
    commands = process.stdout.splitlines()
    # 10 tasks x 5 seeds: PPO on-policy once, nine other methods in four regimes. None differs from another by its name only.
    assert process.returncode == 0 and len(commands) == 10 * 5 * (1 + 9 * 4)
    assert len({re.sub(r"--exp-name \S+", "", command) for command in commands}) == len(commands)
    assert {m for m in report.PAPER_METHODS if not any(f"--exp-name {m}_stale" in command for command in commands)} == set()
    assert all("--total-timesteps 300000" in command for command in commands)
    (stale,) = (c for c in commands if "reach-v3 --seed 2 --exp-name ppo-clip_stale" in c)
    assert "ppo_baseline.py --buffer-size 20000 --num-steps 64 --minibatch-size 512 --policy-head categorical" in stale
    assert "--ratio per-dim --ent-coef 0.001 --updates-per-iteration 10" in stale
    (sigma,) = (c for c in commands if "reach-v3 --seed 2 --exp-name gipo-0.2-0.5_very-stale" in c)
    assert "--buffer-size 100000 --num-steps 64 --minibatch-size 512 --sigma 0.2 --sigma-neg-ratio 0.5" in sigma
    assert not (checkout / "runs").exists()


def test_the_row_of_the_defaults_has_the_defaults(checkout):
    """The row that the documents call the defaults runs gipo_continuous.py as it is."""
    regime, method = report.DEFAULTS
    flags = ["--methods", method, "--regimes", regime, "--seeds", "1", "--tasks", "reach-v3"]
    command = benchmark("main", *flags, "--dry-run", cwd=checkout).stdout.split()
    assert command[1] == "gipo_continuous.py"
    args, default = vars(tyro.cli(gipo_continuous.Args, args=command[2:])), vars(gipo_continuous.Args())
    assert {name for name in args if args[name] != default[name]} == {"exp_name", "run_dir", "eval_every", "overlap"}
    run = {"method": method, "regime": regime}
    assert not report.is_variant(run) and report.is_variant(run | {"regime": "stale"})
    assert report.is_variant(run | {"method": "gipo-1.0-1.0"}) and not report.is_variant(run | {"method": "gipo"})


def test_other_methods(checkout):
    """Stored advantages, the paper's own settings, and variants; every printed command is accepted by its script."""
    methods = "gipo-stored ppo-clip-stored gipo-0.5-1.0-stored paper paper-ppo ppo-clip-0.5"
    methods += " gipo-short ppo-clip-0.5-short ppo-clip-0.5-lr-6e-4"
    process = benchmark("quick", "--methods", methods, "--seeds", "1", "--tasks", "reach-v3", "--dry-run", cwd=checkout)
    commands = process.stdout.splitlines()
    assert process.returncode == 0 and len(commands) == 9
    assert ["--no-recompute-advantages" in command for command in commands] == [True] * 5 + [False] * 4
    assert "--sigma 0.5 --sigma-neg-ratio 1.0" in commands[2] and "--policy-head categorical" in commands[3]
    assert "--ent-coef 0 " in commands[3] and "--num-bins 256" in commands[3] and "--sigma 1 " in commands[3]
    assert "ppo_baseline.py" in commands[4] and "--num-steps 64" in commands[4]
    assert "ppo_baseline.py" in commands[5] and "--clip-coef 0.5" in commands[5]
    for command in commands[6:8]:
        assert command.count("--num-steps") == 1 and "--num-steps 16 --minibatch-size 128 " in command
        assert command.count("--minibatch-size") == 1
    assert "--clip-coef 0.5 --learning-rate 6e-4" in commands[8]
    process = benchmark("quick", "--methods", "paper-ppo", "--regimes", "fresh", "--dry-run", cwd=checkout)
    assert all("--update-epochs 5" in command for command in process.stdout.splitlines()) and process.returncode == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["all"], "suite"),
        (["quick", "--method", "gipo"], "--method"),
        (["quick", "--methods", "dqn"], "dqn"),
        (["quick", "--regimes", "old"], "old"),
        (["quick", "--seeds"], "--seeds"),
        (["quick", "--methods", "gipo-0.5-1-outward"], "unknown method 'gipo-0.5-1-outward'"),
        (["quick", "--methods", "gipo-adaptive-0.7"], "unknown method 'gipo-adaptive-0.7'"),
        (["quick", "--methods", "ppo-clip-wide"], "unknown method 'ppo-clip-wide'"),
        (["quick", "--methods", "ppo-stored"], "ppo-stored"),
        (["quick", "--methods", "ppo-short"], "ppo-short"),
        (["quick", "--methods", "ppo-lr-1e-3"], "ppo-lr-1e-3"),
        (["quick", "--methods", "gipo-lr-"], "gipo-lr-"),
        (["quick", "--methods", "dqn-stored"], "unknown method 'dqn'"),
        (["quick", "--workers", "0"], "--workers 0"),
        (["quick", "--steps", "-5"], "--steps -5 must be a positive integer"),
        (["quick", "--steps", "0"], "--steps 0"),
        (["graphgpo", "--steps", "1e3"], "--steps 1e3"),
        (["throughput", "--steps", "many"], "--steps many"),
        (["quick", "--seeds", "1 -1"], "--seeds: '-1' must be an integer, 0 or more"),
        (["popo", "--seeds", "1.5"], "--seeds: '1.5'"),
        (["quick", "--seeds", ""], "--seeds ''"),
        (["quick", "--seeds", "1,2"], "--seeds '1,2' must be names with spaces between them"),
        (["quick", "--tasks", "*"], "--tasks '*'"),
        (["quick", "--tasks", "reach-v3 push"], "--tasks push is unknown; try push-v3"),
        (["popo", "--tasks", "countdown3"], "--tasks countdown3 is unknown; try countdown-3"),
        (["vla", "--tasks", "libero_spatia"], "--tasks libero_spatia is unknown; try libero_spatial"),
        (["quick", "--methods", "gipo-0-1"], "--sigma 0.0 must be positive"),
        (["quick", "--methods", "gipo-lr-fast"], "does not take the flags --buffer-size 5120"),
        (["graphgpo", "--methods", "gigop-step"], "unknown method 'gigop'"),
        (["graphgpo", "--tasks", "Sokoban"], "--tasks means nothing for graphgpo"),
        (["popo", "--regimes", "stale"], "--regimes means nothing for popo"),
    ],
)
def test_bad_options(flags, named):
    process = benchmark(flags[0], "--dry-run", *flags[1:])  # so that a mistake starts no benchmark
    assert process.returncode == 2 and named in process.stderr and process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert not process.stdout or named == "suite"  # there the usage


def test_python_in_a_folder_with_a_space(tmp_path):
    """The commands printed can be pasted, the runs start, and so do those of the job script, in a project with one, too."""
    project = tmp_path / "my project"
    project.mkdir()
    for file in ("benchmark.sh", "report.py", "gipo_continuous.py", "ppo_baseline.py"):
        shutil.copy(ROOT / file, project)
    python = tmp_path / "my env" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$1" >>"{tmp_path}/started"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    flags = [*SMALL, "--methods", "gipo"]
    (command,) = benchmark("quick", *flags, "--dry-run", cwd=project, PYTHON=str(python)).stdout.splitlines()
    assert shlex.split(command)[:2] == [str(python), "gipo_continuous.py"]
    process = subprocess.run(["bash", "-c", f"{command} --help"], cwd=project, capture_output=True, text=True)
    assert process.returncode == 0 and "--buffer-size" in process.stdout
    process = benchmark("quick", *flags, cwd=project, PYTHON=str(python))
    folder = project / "runs" / "benchmark-512" / "reach-v3__gipo_fresh__1"
    assert process.returncode == 0 and (folder / "result.json").exists(), process.stdout + process.stderr
    shutil.rmtree(folder)
    shutil.rmtree(project / "results")
    assert benchmark("quick", *flags, "--slurm", cwd=project, PYTHON=str(python)).returncode == 0
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", folder.parent / "array.sbatch"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (folder / "result.json").exists()
    assert (tmp_path / "started").read_text().split().count("gipo_continuous.py") == 3


def test_runs_skips_resumes_and_reports(checkout):
    process = benchmark("quick", *SMALL, cwd=checkout)
    assert process.returncode == 0, process.stdout + process.stderr
    folders = [checkout / "runs" / "benchmark-512" / f"reach-v3__{name}__1" for name in ("gipo_fresh", "ppo_on-policy")]
    assert all((folder / "result.json").exists() for folder in folders) and "2 of 2 runs" in process.stdout
    steps = f"512-v{VERSION}"
    stored = [read_json(checkout / "results" / "runs" / steps / f"{folder.name}.json") for folder in folders]
    assert all(run["machine"] and len(run["curves"]["steps"]) == 30 for run in stored)
    table = (checkout / "results" / f"benchmark-512-v{VERSION}.md").read_text()
    assert "| fresh | gipo | 1 |" in table and "| on-policy | ppo | 1 |" in table
    assert {path.name for path in (checkout / "results").glob("*.png")} == {
        f"{name}-512-v{VERSION}.png" for name in ("curves", "buffer", "staleness")
    }

    # A stored run with other arguments is replaced by the run folder's.
    path = checkout / "results" / "runs" / steps / f"{folders[0].name}.json"
    other = stored[0] | {"args": stored[0]["args"] | {"gamma": 0.5}}
    path.write_text(json.dumps(other))
    subprocess.run([sys.executable, "report.py"], cwd=checkout, check=True, capture_output=True)
    assert read_json(path) == stored[0]

    # The committed JSON alone makes a run finished; other arguments or another algorithm version do not.
    shutil.rmtree(checkout / "runs")
    assert benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout.strip() == ""
    ppo_path = path.with_name(f"{folders[1].name}.json")
    for run_path, run, bins, finished in [
        (ppo_path, stored[1], 64, True),  # bins are a flag of the categorical head only
        (path, stored[0], 64, False),
        (path, stored[0], None, True),  # runs from before the flag had 256
    ]:
        run_path.write_text(json.dumps(run | {"args": {**run["args"], "num_bins": bins}}))
        if bins is None:
            older = {k: v for k, v in run["args"].items() if k != "num_bins"}
            run_path.write_text(json.dumps(run | {"args": older}))
        assert (benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout.strip() == "") == finished
    run = stored[0] | {"args": stored[0]["args"] | {"overlap": not stored[0]["args"]["overlap"]}}  # equal bit for bit
    path.write_text(json.dumps(run))
    assert benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout.strip() == ""
    stored[0]["versions"]["algorithm"] = 0
    path.write_text(json.dumps(stored[0]))
    left = benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout
    assert "gipo_fresh" in left and "ppo_on-policy" not in left


def test_interrupted_runs_are_resumed_and_failures_listed(checkout):
    """A folder with a checkpoint goes on; one with a broken checkpoint fails, is listed with its log, and the rest runs."""
    run_dir = checkout / "runs" / "benchmark-512"
    assert benchmark("quick", *SMALL, cwd=checkout).returncode == 0
    shutil.rmtree(checkout / "results")
    folders = {name: run_dir / f"reach-v3__{name}__1" for name in ("gipo_fresh", "ppo_on-policy")}
    for folder in folders.values():
        (folder / "result.json").unlink()
    (folders["ppo_on-policy"] / "checkpoint.pt").write_bytes(b"half a file")
    process = benchmark("quick", *SMALL, cwd=checkout)
    assert process.returncode == 1
    assert "1 runs failed" in process.stderr and "ppo_on-policy__1.log (exit code 2)" in process.stderr
    assert "from step 512" in (run_dir / "reach-v3__gipo_fresh__1.log").read_text()
    assert (folders["gipo_fresh"] / "result.json").exists()


def test_folder_of_another_run_is_refused(checkout):
    folder = checkout / "runs" / "benchmark-512" / "reach-v3__gipo_fresh__1"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    process = benchmark("quick", *SMALL, cwd=checkout)
    assert process.returncode == 2 and "holds a run of another algorithm version" in process.stderr and not process.stdout
    (folder / "args.json").write_text(json.dumps({"algorithm_version": VERSION}))
    process = benchmark("quick", *SMALL, cwd=checkout)
    assert process.returncode == 2 and "holds a run with other arguments" in process.stderr and not process.stdout


def test_two_invocations_do_not_share_a_run(checkout):
    command = ["./benchmark.sh", "quick", *SMALL, "--methods", "gipo"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": checkout, "env": PYTHON}
    outputs = [process.communicate(timeout=600)[0] for process in [subprocess.Popen(command, **pipes) for _ in range(2)]]
    log = (checkout / "runs" / "benchmark-512" / "reach-v3__gipo_fresh__1.log").read_text()
    assert log.count("finished in") == 1 and "exists" not in log
    assert any("another invocation has it" in output or "0 of 1 runs" in output for output in outputs), outputs


def test_a_lock_that_fails_is_a_failure(checkout):
    """Not "another invocation has it": that would skip every run and end with 0."""
    (checkout / "runs" / "benchmark-512" / "reach-v3__gipo_fresh__1.lock").mkdir(parents=True)
    process = benchmark("quick", *SMALL, "--methods", "gipo", cwd=checkout)
    assert process.returncode == 1 and "reach-v3__gipo_fresh__1.lock cannot be locked" in process.stderr
    assert not [*(checkout / "runs").rglob("result.json")]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_nothing_starts_after_benchmark_was_killed(checkout):
    flags = [
        "--tasks",
        "reach-v3 push-v3 door-open-v3",
        "--seeds",
        "1",
        "--methods",
        "gipo",
        "--regimes",
        "fresh",
        "--steps",
        "512",
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": checkout, "env": PYTHON}
    process = subprocess.Popen(["./benchmark.sh", "quick", *flags, "--workers", "1"], start_new_session=True, **pipes)
    log = checkout / "runs" / "benchmark-512" / "reach-v3__gipo_fresh__1.log"
    wait_for(log.exists)
    process.terminate()
    assert process.wait(60) != 0
    wait_for((log.with_suffix("") / "result.json").exists)  # the run that has begun ends
    time.sleep(3)
    assert [path.name for path in log.parent.glob("*.log")] == [log.name]


def test_slurm_array_of_many_runs(checkout):
    """At most 1,000 jobs, which share the runs; the commands are in the script that sbatch copies, not in a file beside it."""
    process = benchmark("main", "--slurm", cwd=checkout)
    assert process.returncode == 0 and "1850 runs" in process.stdout
    script = (checkout / "runs" / "benchmark-300000" / "array.sbatch").read_text()
    assert "#SBATCH --array=1-1000\n" in script and script.count("--exp-name") > 1850
    lines = re.search(r"cat <<'COMMANDS'\n(.*?)\nCOMMANDS", script, re.DOTALL)[1].splitlines()
    shares = [lines[job::1000] for job in range(1000)]
    assert len(lines) == 1850 and {len(share) for share in shares} == {1, 2}
    fake = script.split("cd ")[0] + "\n" + script[script.index("commands=") :].replace('run "$(sed', 'echo "$left" "$(sed')
    (checkout / "fake.sh").write_text(fake)
    environment = {**PYTHON, "SLURM_ARRAY_TASK_ID": "850"}
    output = subprocess.run(
        ["bash", checkout / "fake.sh"], env=environment, capture_output=True, text=True
    ).stdout.splitlines()
    assert output == [f"2 {line}" for line in shares[849]]


def test_slurm_script(checkout):
    process = benchmark("quick", *SMALL, "--slurm", cwd=checkout)
    assert process.returncode == 0 and "sbatch runs/benchmark-512/array.sbatch" in process.stdout
    script = checkout / "runs" / "benchmark-512" / "array.sbatch"
    environment = {**PYTHON, "SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", script], cwd=checkout, env=environment, check=True, capture_output=True)
    folder = checkout / "runs" / "benchmark-512" / "reach-v3__gipo_fresh__1"
    assert (folder / "result.json").exists()
    (folder / "args.json").unlink()
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"half a file")
    process = subprocess.run(["bash", script], cwd=checkout, env=environment, capture_output=True, text=True)
    assert "0 of" not in process.stdout
    assert process.returncode == 1 and "gipo_fresh__1.log (exit code 2)" in process.stdout  # so that sbatch shows it as failed


# -------------------- What is committed --------------------
def test_committed_report_is_current():
    assert len([*(ROOT / "results" / "runs").glob("*/*.json")]) >= 18
    # 2 s; with a bootstrap in a Python loop 81 s
    process = subprocess.run([sys.executable, "report.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert process.returncode == 0, process.stdout + process.stderr


def test_committed_plots_exist_for_every_table():
    for table in Path(ROOT / "results").glob("benchmark-*.md"):
        assert (ROOT / "results" / f"curves-{table.stem.removeprefix('benchmark-')}.png").stat().st_size > 10_000
