"""report.py and benchmark.sh: statistics against hand-computed cases, what counts as finished, failures and resuming."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tyro
import warm
from conftest import ROOT, read_json
from torch.utils.tensorboard import SummaryWriter

import gipo_continuous
import ppo_baseline
import report

PYTHON = {**os.environ, "PYTHON": sys.executable}
VERSION = gipo_continuous.ALGORITHM_VERSION


def sample(exp_name="gipo_20000", **changes):
    """A stored run of version 1 under a name of today, when a regime is a number of steps; other entries as told."""
    result = read_json(ROOT / "results" / "v1" / "runs" / "300000" / "reach-v3__gipo_stale__1.json")
    return result | {"exp_name": exp_name, "args": result["args"] | {"exp_name": exp_name}} | changes


# -------------------- Statistics --------------------
def test_interquartile_mean():
    assert report.interquartile_mean([np.array([0.0, 1.0]), np.array([5.0, 100.0])]) == 3.0  # of 0 1 5 100: 1 and 5
    assert report.interquartile_mean([np.arange(8.0)]) == 3.5
    assert report.interquartile_mean([np.array([2.0, 4.0, 9.0])]) == 5.0  # a quarter of 3 is less than one score


def test_tasks_with_more_runs_count_no_more():
    """Two runs of an easy task and three of a hard one weigh the same: six of each, three cut from either side."""
    assert report.interquartile_mean([[1.0, 0.8], [0.0, 0.2, 0.4]]) == pytest.approx((0.2 + 0.4 * 2 + 0.8 * 3) / 6)
    assert report.interquartile_mean([[1.0, 1.0, 1.0], [0.0]]) == pytest.approx(0.5)
    # Numbers of seeds with a least common multiple of 180,180: that many copies of every task would be 9 GB.
    scores = [np.random.default_rng(0).random(count) for count in (7, 9, 10, 11, 12, 13)]
    pooled = np.sort(np.concatenate([np.repeat(task, 180_180 // len(task)) for task in scores]))
    middle = pooled[len(pooled) // 4 : -(len(pooled) // 4)].mean()
    assert report.interquartile_mean(scores) == pytest.approx(middle, abs=1e-12)
    tracemalloc.start()
    low, high = report.bootstrap_interval(scores, report.interquartile_mean, repetitions=1000)
    assert tracemalloc.get_traced_memory()[1] < 20e6 and low < middle < high
    tracemalloc.stop()


def test_probability_of_improvement():
    ours, theirs = [np.array([1.0, 2.0]), np.array([0.0])], [np.array([1.0, 0.0]), np.array([3.0])]
    # First task: 1 > 1 is a tie, 1 > 0, 2 > 1, 2 > 0, so 3.5 of 4. Second task: 0.
    assert report.probability_of_improvement(ours, theirs) == pytest.approx((3.5 / 4 + 0) / 2)
    assert report.probability_of_improvement(theirs, ours) == pytest.approx(1 - (3.5 / 4 + 0) / 2)


def test_gap_and_interval():
    """By hand: two tasks of two and three seeds, whose means have the variances 0.02 / 2 and 0.04 / 3; t(2.882) = 3.257."""
    gaps = [np.array([0.1, 0.3]), np.array([-0.2, 0.0, 0.2])]
    gap, (low, high) = report.gap_and_interval(gaps)
    assert gap == pytest.approx(0.1)
    reach = 3.257208 * np.sqrt(0.01 + 0.04 / 3) / 2
    assert (low, high) == pytest.approx((0.1 - reach, 0.1 + reach), abs=1e-5)
    assert report.span(*report.gap_and_interval([np.array([0.1]), np.array([0.3])])) == "0.20"
    assert report.span(*report.gap_and_interval([np.array([0.1, 0.2]), np.array([0.3])])) == "0.23"
    assert report.gap_and_interval([np.array([0.5, 0.5])]) == (0.5, (0.5, 0.5))
    assert report.span(-0.001, (-0.004, 0.2)) == "0.00 [0.00, 0.20]" and report.number(-0.0001, "+.3f") == "+0.000"


def test_gap_intervals_hold_the_truth_as_often_as_they_say():
    """Four tasks, three seeds, normal errors, of equal size or much larger on one task: about 95 % of 2,000; a bootstrap's
    hold it less often, and with one variance for all tasks it would be 88 % of the second kind."""
    for deviations in ([0.1, 0.1, 0.1, 0.1], [0.05, 0.05, 0.05, 0.3]):
        rng, held = np.random.default_rng(1), np.zeros(2)
        for _ in range(2000):
            gaps = [rng.normal(0.1, deviation, 3) for deviation in deviations]
            intervals = (
                report.gap_and_interval(gaps)[1],
                report.bootstrap_interval(gaps, report.mean_of_tasks, repetitions=200),
            )
            held += [low < 0.1 < high for low, high in intervals]
        assert 0.92 < held[0] / 2000 < 0.98 and held[1] / 2000 < 0.9


def test_share_of_pairs():
    """A tie is half a win, tasks weigh the same whatever their number of pairs, and what is unknown is no defeat."""
    gaps = [np.array([0.5, 0.0, -1.0, 2.0]), np.array([-3.0])]  # 2 wins and a tie of 4; a defeat
    assert report.share_of_pairs(gaps) == pytest.approx((2.5 / 4 + 0) / 2)
    assert report.share_of_pairs([-gap for gap in gaps]) == pytest.approx(1 - (2.5 / 4 + 0) / 2)
    assert np.isnan(report.share_of_pairs([*gaps, np.array([1.0, np.nan])]))
    draws = report.share_of_pairs([np.array([[1.0, 1.0], [1.0, -1.0], [0.0, -1.0]])])  # of a bootstrap: one share each
    np.testing.assert_array_equal(draws, [1.0, 0.5, 0.25])
    # Not every run with every run: 1 beats 0 and 3 beats 2 on their seeds, though 1 does not beat 2.
    ours, theirs = np.array([1.0, 3.0]), np.array([0.0, 2.0])
    assert report.share_of_pairs([ours - theirs]) == 1.0 and report.probability_of_improvement([ours], [theirs]) == 0.75


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
    improvement = lambda s: report.probability_of_improvement(s[:1], s[1:2])  # noqa: E731
    for statistic in (report.interquartile_mean, improvement, lambda s: report.share_of_pairs([task - 0.4 for task in s])):
        expected = np.percentile([statistic(draw) for draw in draws], [2.5, 97.5])
        np.testing.assert_array_equal(report.bootstrap_interval(scores, statistic), expected)


def test_single_runs_have_no_interval():
    """Resampling one run per task would give an interval of width 0."""
    single, double = [np.array([0.2, 0.3]), np.array([0.7])], [np.array([0.2, 0.3]), np.array([0.7, 0.7])]
    assert report.span(0.5, report.bootstrap_interval(single, report.interquartile_mean)) == "0.50"
    assert report.span(0.5, report.improvement_interval(single, double)) == "0.50"
    assert report.span(0.5, report.improvement_interval(double, single)) == "0.50"
    assert report.span(0.5, report.bootstrap_interval(single, report.share_of_pairs)) == "0.50"
    assert "[" in report.span(0.5, report.bootstrap_interval(double, report.interquartile_mean))
    assert "[" in report.span(0.5, report.bootstrap_interval(double, report.share_of_pairs))
    assert "[" in report.span(0.5, report.improvement_interval(double, double))


def test_cells_with_other_arguments_are_refused(tmp_path):
    """A fork's runs under the same name: the report names both and what differs."""
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    for task in ("push-v3", "reach-v3"):
        (folder / f"{task}.json").write_text(json.dumps(sample(env_id=task)))
    command = [sys.executable, str(ROOT / "report.py"), "--runs", "none", "--readme", "none", "--results", str(tmp_path)]
    assert subprocess.run([*command], capture_output=True).returncode == 0
    run = sample()
    (folder / "reach-v3.json").write_text(json.dumps(run | {"args": run["args"] | {"ent_coef": 0.01}}))
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("error: gipo 20000, 300,000 steps: ")
    assert "push-v3 seed 1 and reach-v3 seed 1 differ in ent_coef" in process.stderr and process.stderr.count("\n") == 1


def test_arguments_that_decide_the_outcome():
    """Where and how a run is computed does not; version 1's flags are read as it did, from files of before they came, too."""
    args = {"env_id": "reach-v3", "policy_head": "categorical", "sigma": 0.2}
    assert report.outcome_args(args | {"overlap": True}) == report.outcome_args(args | {"overlap": False, "num_bins": 256})
    assert report.outcome_args(args | {"env_kwargs": "{}"}) != report.outcome_args(args | {"env_kwargs": '{"size": 2}'})
    version_1 = args | {"trust_side": "both"}
    assert report.outcome_args(version_1) == report.outcome_args(version_1 | {"adaptive_sigma": 0.0, "fast_env": True})
    assert report.outcome_args(version_1) != report.outcome_args(version_1 | {"adaptive_sigma": 0.7})
    graph = {"advantage": "grpo", "reward": "sparse", "model": None, "kl_coef": 0.0}
    said = {"learning_rate": 1e-3, "ent_coef": 0.01, "success_reward": 1.0}  # GraphGPO's first runs stored None
    assert report.outcome_args(graph | said) == report.outcome_args(graph | dict.fromkeys(said))
    assert report.outcome_args(graph | said) != report.outcome_args(graph | dict.fromkeys(said) | {"learning_rate": 3e-4})


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
    runs = [run("gipo", "20000", seed, 1.0, 10, 0.5) for seed in (1, 2)]
    runs += [run("ppo-clip-0.2", "20000", seed, 0.5, 9, 0.2) for seed in (1, 2)]
    for stored in runs:
        stored["curves"]["steps"] = list(range(30))
    lost = runs[1]
    lost["curves"] = {"steps": lost["curves"]["steps"]} | missing
    assert np.isnan(report.area_under_curve(lost, "success"))
    gipo, clip = [row.strip("| ").split(" | ") for row in report.aggregate_table(runs).splitlines()[2:]]
    assert clip[4] == "0.10 [0.10, 0.10]" and gipo[3:6] == ["1.00 [1.00, 1.00]", "-", "10"]
    (row,) = [row.strip("| ").split(" | ") for row in report.same_replay_table(runs).splitlines()[2:]]
    assert row[6] == "- against 0.10" and row[7] == row[9] == "-" and row[8] == row[10] == "1.00 [1.00, 1.00]"
    figure = report.plot_curves(runs)
    figure.canvas.draw()
    words = figure._supylabel.get_window_extent()
    assert words.y0 >= 0 and words.y1 <= figure.bbox.y1  # of one row of panels, too
    lines = figure.axes[0].lines
    assert [list(line.get_ydata())[-1] for line in lines] == [0.5, 0.2]  # GIPO's is that of the run that has one
    areas = report.plot_against_buffer(runs, {"area": "area", "utilization": "utilization"}).axes
    assert [text.get_text() for text in areas[0].get_legend().get_texts()] == ["ppo-clip-0.2"]
    assert "| 20000 | gipo | - | - |" in report.diagnostics_table(runs)


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
    """One task, two seeds each. The shares are of pairs with equal seed, and a tie is half a win; an area counts stretches
    without an episode as 0."""
    ppo = [run("ppo", "on-policy", 1, 1.0, 2000, 0.4), run("ppo", "on-policy", 2, 1.0, 4000, 0.8)]
    gipo = [run("gipo", "20000", 2, 0.5, 5000, 0.6), run("gipo", "20000", 1, 1.0, 3000, 0.6)]
    _, _, ppo_row, gipo_row = report.aggregate_table(gipo + ppo).splitlines()
    assert ppo_row == "| on-policy | ppo | 2 | 1.00 [1.00, 1.00] | 0.30 [0.20, 0.40] | 3,000 | - | - | - |"
    cells = gipo_row.strip("| ").split(" | ")
    assert cells[:6] == ["20000", "gipo", "2", "0.75 [0.50, 1.00]", "0.30 [0.30, 0.30]", "4,000"]
    # Success: a tie and a defeat. Area: 0.3 against 0.2 and 0.4. Return: two wins, though 3,000 is less than 4,000.
    assert cells[6:] == ["0.25 [0.00, 0.50]", "0.50 [0.00, 1.00]", "1.00 [1.00, 1.00]"]
    more = [run("gipo", "20000", 3, 0.0, 0, 0.0)]  # counts in its own scores, but meets no PPO run of its seed
    with_more = report.aggregate_table(ppo + gipo + more).splitlines()[3].strip("| ").split(" | ")
    assert with_more[2] == "3" and with_more[6:] == cells[6:]


def test_same_replay_table_by_hand():
    """Only PPO-clip's replay size, only the tasks and seeds that both have; on-policy PPO and other sizes have no row."""
    clip = [run("ppo-clip-0.2", "20000", seed, 0.5, 1000 * seed, 0.2) for seed in (1, 2)]
    gipo = [run("gipo", "20000", 2, 0.5, 2500, 0.4), run("gipo", "20000", 1, 1.0, 1500, 0.6)]
    others = [run("gipo", "20000", 1, 0.0, 0, 0.0, "push-v3"), run("gipo", "20000", 3, 0.0, 0, 0.0)]
    others += [run("gipo", "20000", 1, 0.0, 0, 0.0, "door-open-v3")]
    others += [run("ppo-clip-0.2", "20000", 2, 1.0, 9, 1.0, "door-open-v3")]
    others += [run("gipo", "5120", 1, 1.0, 1, 1.0), run("ppo", "on-policy", 1, 1.0, 1, 1.0)]
    (row,) = report.same_replay_table(clip + gipo + others).splitlines()[2:]
    cells = row.strip("| ").split(" | ")
    assert cells[:7] == ["20000", "gipo", "ppo-clip-0.2", "1", "2", "0.75 against 0.50", "0.25 against 0.10"]
    # Success: a win and a tie. Return: two wins, though 1,500 is less than the other seed's 2,000.
    assert cells[7:] == ["0.15 [-0.49, 0.79]", "0.75 [0.50, 1.00]", "1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]"]
    more = [run("gipo", "20000", 1, 0.0, 0, 0.1, "push-v3"), run("ppo-clip-0.2", "20000", 1, 0.5, 1, 0.1, "push-v3")]
    (row,) = report.same_replay_table(clip + gipo + more).splitlines()[2:]  # a task with a single pair weighs the same
    assert row.strip("| ").split(" | ")[3:5] + row.strip("| ").split(" | ")[7:] == [
        "2",
        "3",
        "0.07",
        "0.38",
        "0.75",
        "0.50",
    ]
    others = [r for r in others if r["method"] != "ppo-clip-0.2"]
    assert report.same_replay_table(gipo + others) == report.same_replay_table(clip) == ""


def test_tuning_table_by_hand():
    """Means over all runs of a row, whatever its tasks; the largest area first."""
    gipo = [run("gipo", "5120", 1, 1.0, 1000, 0.5), run("gipo", "5120", 2, 0.5, 2000, 1.0)]
    gipo += [run("gipo", "5120", 1, 0.0, 0, 0.0, "push-v3")]
    clips = [run("ppo-clip-0.2", "20000", 1, 0.25, 1234, 0.8), run("ppo-clip-0.5", "5120", 1, 0.75, 10, 0.2)]
    assert report.tuning_table(gipo + clips).splitlines() == [
        "| replay | method | runs | success | area | return |",
        "|---|---|---|---|---|---|",
        "| 20000 | ppo-clip-0.2 | 1 | 0.25 | 0.400 | 1,234 |",
        "| 5120 | gipo | 3 | 0.50 | 0.250 | 1,000 |",
        "| 5120 | ppo-clip-0.5 | 1 | 0.75 | 0.100 | 10 |",
    ]


def test_rows_with_fewer_tasks_are_named_above_the_diagnostics(tmp_path):
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    for name in ("gipo_20000", "sapo_20000", "gipo-joint_20000"):
        for task in ("reach-v3", "push-v3")[: 1 if "joint" in name else 2]:
            (folder / f"{name}{task}.json").write_text(json.dumps(sample(name, seed=4) | {"env_id": task}))
    report.write_report(report.Args(results=str(tmp_path), readme="none"))
    part = (tmp_path / "benchmark-300000-v1.md").read_text().split(report.DIAGNOSTICS)[1]
    assert part.startswith(" Over the 2 tasks that the standard rows have (push, reach); fewer of them in gipo-joint 20000:")
    assert "| 20000 | gipo-joint |" in part


def test_rows_of_tuning_and_diagnostics_are_averaged_over_equal_tasks(tmp_path):
    """A row with more tasks than the others counts on those that all have; without such a task the text says so."""
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    args = report.Args(results=str(tmp_path), readme="none")
    for seed in (1, 4):  # of tuning, and of the tables
        easy = sample(seed=seed, eval_success_rate=1.0)
        easy["curves"]["utilization"] = [0.75] * 30
        hard = easy | {"env_id": "push-v3", "eval_success_rate": 0.0}
        hard["curves"] = easy["curves"] | {"utilization": [0.25] * 30}
        other = sample("sapo_20000", seed=seed, eval_success_rate=0.5)
        for name, one in (("easy", easy), ("hard", hard), ("other", other)):
            (folder / f"{name}{seed}.json").write_text(json.dumps(one))
    report.write_report(args)
    text = (tmp_path / "benchmark-300000-v1.md").read_text()
    tuning, diagnostics = (text.split(before)[1] for before in (report.TUNING, report.DIAGNOSTICS))
    for part, row in ((tuning, "| 20000 | gipo | 1 | 1.00 |"), (diagnostics, "| 20000 | gipo | 0.75 / 0.75 |")):
        assert part.startswith(" Over the 1 task that every row has (reach):") and row in part
    for task in ("assembly-v3", "basketball-v3", "coffee-pull-v3"):  # tasks that one row alone has drop no other row
        (folder / f"{task}.json").write_text(json.dumps(sample(seed=4, eval_success_rate=0.0) | {"env_id": task}))
    report.write_report(args)
    after = (tmp_path / "benchmark-300000-v1.md").read_text().split(report.DIAGNOSTICS)[1]
    assert after == diagnostics and "| 20000 | sapo |" in after
    (folder / "other1.json").write_text(json.dumps(sample("sapo_20000", seed=1) | {"env_id": "door-open-v3"}))
    report.write_report(args)
    assert f"{report.TUNING} The tasks differ between the rows:" in (tmp_path / "benchmark-300000-v1.md").read_text()


def test_tuning_seeds_have_a_table_of_their_own(tmp_path):
    """Seeds 1 to 3 are in no other table, unless the runs have no other seeds: then they are somebody's own benchmark."""
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    args = report.Args(results=str(tmp_path), readme="none")
    for seed in (1, 2, 3):
        (folder / f"{seed}.json").write_text(json.dumps(sample(seed=seed, eval_success_rate=0.25)))
    (folder / "sigma.json").write_text(json.dumps(sample("gipo-sigma-0.5_20000", seed=2, eval_success_rate=0.75)))
    report.write_report(args)
    text = (tmp_path / "benchmark-300000-v1.md").read_text()
    assert "4 runs of 300,000 steps each: 1 task, up to 3 seeds" in text and report.TUNING not in text
    assert "| 20000 | gipo | 3 | 0.25 [0.25, 0.25] |" in text and re.search(r"\n\| 20000 \| gipo \| 0.\d\d · 25% \(", text)

    for seed in (0, 4):
        (folder / f"{seed}.json").write_text(json.dumps(sample(seed=seed, eval_success_rate=1.0)))
    report.write_report(args)
    head, tail = (tmp_path / "benchmark-300000-v1.md").read_text().split(report.TUNING)
    assert "2 runs of 300,000 steps each: 1 task, up to 2 seeds" in head
    assert "| 20000 | gipo | 2 | 1.00 [1.00, 1.00] |" in head and re.search(r"\n\| 20000 \| gipo \| 0.\d\d · 100% \(", head)
    table, diagnostics = tail.split(report.DIAGNOSTICS)
    rows = [line.split(" | ")[:4] for line in table.splitlines() if line.startswith("| 20000 |")]
    assert sorted(rows) == [["| 20000", "gipo", "3", "0.25"], ["| 20000", "gipo-sigma-0.5", "1", "0.75"]]
    assert "sigma" not in head + diagnostics  # in no other table


def test_a_task_of_ones_own_is_averaged_with_no_other(tmp_path):
    """Neither with the stored tasks of few seeds nor, for its seeds 1 to 3, with those on which settings were chosen."""
    folder, gaps = tmp_path / "runs" / "300000", {}
    folder.mkdir(parents=True)
    for task, seed in itertools.product(("reach-v3", "assembly-v3", "my_module:Mine-v3"), (1, 2, 4, 5)):
        for name in ("gipo_20000", "ppo-clip-0.2_20000"):
            run = sample(name, seed=seed, env_id=task, eval_success_rate=0.5 + 0.5 * (name[0] == "g" and task[0] == "m"))
            (folder / f"{task}__{name}__{seed}.json").write_text(json.dumps(run))
    report.write_report(report.Args(results=str(tmp_path), readme="none"))
    text = (tmp_path / "benchmark-300000-v1.md").read_text()
    head, tuning = text.split(report.TUNING)
    assert "16 runs of 300,000 steps each: 3 tasks" in head and "| 20000 | gipo | 4 |" in tuning  # reach and assembly, 1 and 2
    for words in ("", ", other tasks", ", further tasks"):
        table = head.split(f"by the tasks and seeds that both have{words}:\n\n")[1].split("\n\n")[0]
        (row,) = [line.split(" | ") for line in table.splitlines() if line.startswith("| 20000 | gipo ")]
        gaps[words] = (row[3:5], row[5])
    shared, alone = "0.50 against 0.50", "1.00 against 0.50"
    assert gaps == {
        "": (["1", "2"], shared),
        ", other tasks": (["1", "2"], shared),
        ", further tasks": (["1", "4"], alone),
    }
    assert head.count("| replay | method | my_module:Mine |\n|---|---|---|\n| 20000 | gipo | ") == 1


def test_tasks_without_a_success_flag_have_returns_only(tmp_path):
    """HalfCheetah in the benchmark: its cell shows the return, and the comparisons by success leave the task out."""
    runs = [run("gipo", "20000", 1, 0.5, 2000, 0.5), run("gipo", "20000", 1, None, 3000, 0.0, "HalfCheetah-v5")]
    rows = report.task_table(runs).splitlines()
    assert rows[0] == "| replay | method | HalfCheetah-v5 | reach |"
    assert rows[2:] == ["| 20000 | gipo | 3,000 | 0.25 · 50% (2,000) |"]
    runs += [run("gipo", "20000", 2, None, 4000, 0.0, "HalfCheetah-v5")]
    rows = report.task_table(runs).splitlines()
    assert rows[2:] == ["| 20000 | gipo | 3,500 (3,000 to 4,000) | 0.25 · 50% (2,000), n = 1 |"]
    for cheetah in runs[1:]:
        cheetah["curves"]["return"] = [None] * 15 + [100.0 * cheetah["seed"]] * 15
    assert report.task_table(runs).splitlines()[2].startswith("| 20000 | gipo | 3,500 (3,000 to 4,000), in training 150 |")

    meta_world = sample()
    cheetah = meta_world | {"env_id": "HalfCheetah-v5", "eval_success_rate": None}
    cheetah["curves"] = meta_world["curves"] | {"success": [None] * 30}
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    args = report.Args(results=str(tmp_path), readme=str(tmp_path / "README.md"))
    (folder / "HalfCheetah-v5__gipo_20000__1.json").write_text(json.dumps(cheetah))
    report.write_report(args)
    assert "| runs |" not in (tmp_path / "benchmark-300000-v1.md").read_text()  # no table of success
    (folder / "reach-v3__gipo_20000__1.json").write_text(json.dumps(meta_world))
    report.write_report(args)
    table = (tmp_path / "benchmark-300000-v1.md").read_text()
    assert "| 20000 | gipo | 1 |" in table and "| method | HalfCheetah-v5 |" in table
    assert f"\n| 20000 | gipo | {cheetah['eval_return_mean']:,.0f}, in training " in table


def test_a_table_without_success_has_curves_of_the_return(tmp_path):
    """The suite `gymnasium`: every table has its plot."""
    cheetah = sample() | {"env_id": "HalfCheetah-v5", "eval_success_rate": None}
    cheetah["curves"] = cheetah["curves"] | {"success": [None] * 30}
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    (folder / "HalfCheetah-v5__gipo_20000__1.json").write_text(json.dumps(cheetah))
    report.write_report(report.Args(results=str(tmp_path), readme="none"))
    assert (tmp_path / "curves-300000-v1.png").stat().st_size > 10_000


def test_runs_of_other_tasks_of_a_suite_are_not_averaged():
    """LIBERO's tasks are a flag, not the environment's name."""
    one = {"args": {"suite": "libero_spatial", "tasks": [0], "seed": 1}, "versions": {"algorithm": 3}}
    other = {"args": {"suite": "libero_spatial", "tasks": [0, 1], "seed": 2}, "versions": {"algorithm": 3}}
    assert report.differences([report.setting(one), report.setting(other)]) == ["tasks"]


def test_compare_needs_a_folder(tmp_path):
    """An empty variable of the shell must not rewrite results/ and the README."""
    process = subprocess.run([sys.executable, ROOT / "report.py", "--compare"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and "--compare" in process.stderr and not any(tmp_path.iterdir())


def test_rows_that_lack_tasks_are_shown_on_what_all_have(tmp_path):
    """They have no place among the rows of all tasks, so a table and a plot of their own, on fewer tasks, show them."""
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    for task, name in [(task, name) for task in ("reach-v3", "push-v3") for name in ("ppo_on-policy", "gipo_20000")]:
        (folder / f"{task}_{name}.json").write_text(json.dumps(sample(name, env_id=task)))
    args = report.Args(results=str(tmp_path), readme=str(tmp_path / "README.md"))
    report.write_report(args)
    assert "Over 2 tasks:" in (tmp_path / "benchmark-300000-v1.md").read_text()
    assert "every row has" not in (tmp_path / "benchmark-300000-v1.md").read_text().split(report.DIAGNOSTICS)[0]
    (folder / "5120.json").write_text(json.dumps(sample("gipo_5120")))
    report.write_report(args)
    text = (tmp_path / "benchmark-300000-v1.md").read_text()
    every_row = text[text.index("Over the 1 task that every row has (reach):") :]
    assert text.index("without the rows that lack some of them (gipo 5120):") < text.index(every_row)
    assert "| 5120 | gipo | 1 |" in every_row and "| 20000 | gipo | 1 |" in every_row
    assert (tmp_path / "buffer-all-rows-300000-v1.png").stat().st_size > 10_000


def test_plots_are_drawn_again_only_for_other_data(tmp_path):
    """Also those that somebody damaged."""
    file = tmp_path / "runs" / "300000" / "reach-v3__gipo_20000__1.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(sample()))
    args = report.Args(results=str(tmp_path), readme="none")
    plots = [tmp_path / f"{name}-300000-v1.png" for name in ("curves", "buffer", "staleness")]

    def drawn():
        before = [plot.exists() and plot.stat().st_mtime_ns for plot in plots]
        report.write_report(args)
        return [plot.stat().st_mtime_ns != time for plot, time in zip(plots, before, strict=True)]

    assert drawn() == [True] * 3 and drawn() == [False] * 3
    plots[0].write_bytes(b"half a file")
    assert drawn() == [True, False, False]
    file.write_text(json.dumps(sample(eval_return_mean=1.0)))
    assert drawn() == [True] * 3 and drawn() == [False] * 3


def test_scores_against_the_buffer_by_hand():
    """A point per replay size, which the regime is, from the smallest on; on-policy PPO is a line."""
    runs = [run("gipo", size, 1, success, 1, 1.0) for size, success in (("20000", 1.0), ("5120", 0.5), ("512", 0.75))]
    runs += [run("ppo", "on-policy", 1, 0.25, 1, 1.0)]
    (axis,) = report.plot_against_buffer(runs, {"success rate": "success"}).axes
    ((points, *_),) = [container.lines for container in axis.containers]
    assert points.get_xydata().tolist() == [[512, 0.75], [5120, 0.5], [20000, 1.0]]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["512", "5,120", "20,000"]
    (level,) = [line for line in axis.lines if line.get_label() == "ppo, on-policy"]
    assert {*level.get_ydata()} == {0.25}


def test_lines_of_the_curves():
    """A row per replay size, a column per task; a method has one colour in all of them."""
    names = [("gipo", "5120"), ("gipo", "20000"), ("sapo", "20000"), ("gipo", "777"), ("ppo", "on-policy")]
    runs = [run(*name, 1, 1.0, 1, 0.5, task) for name in names for task in ("push-v3", "reach-v3")]
    for stored in runs:
        stored["curves"]["steps"] = list(range(30))
    figure = report.plot_curves(runs)
    panels = [(axis.get_ylabel(), axis.get_title(), [line.get_label() for line in axis.lines]) for axis in figure.axes]
    assert panels[:4] == [
        ("on-policy", "push", ["ppo"]),
        ("", "reach", ["ppo"]),
        ("replay of 777", "", ["gipo"]),
        ("", "", ["gipo"]),
    ]
    assert [labels for *_, labels in panels[4:]] == [["gipo"], ["gipo"], ["gipo", "sapo"], ["gipo", "sapo"]]
    colors = {(line.get_label(), line.get_color()) for axis in figure.axes for line in axis.lines}
    assert len(colors) == len({color for _, color in colors}) == 3


def test_methods_keep_their_colours_where_only_returns_are_drawn():
    """As in all other plots, whatever the order; names that are no methods get colours in their order."""
    for names, places in ((("ppo, on-policy", "gipo, 5120"), (5, 0)), (("mine", "gipo, 5120"), (0, 1))):
        drawn = {("HalfCheetah-v5", name): [run("gipo", "5120", 1, None, 1, 0.5, "HalfCheetah-v5")] for name in names}
        for (stored,) in drawn.values():
            stored["curves"] = {"steps": list(range(30)), "return": [1.0] * 30}
        lines = {line.get_label(): line.get_color() for line in report.plot_comparison(drawn).axes[0].lines}
        assert [lines[name] for name in names] == [report.COLORS[place] for place in places]


def test_tuning_table_of_tasks_without_a_success_flag():
    """./benchmark.sh gymnasium --seeds "1 4": returns only, as in the other tables."""
    runs = [run("gipo", "5120", seed, None, 1000 * seed, 0.0, "HalfCheetah-v5") for seed in (1, 2)]
    for stored in runs:
        stored["curves"]["success"] = [None] * 30
    assert report.tuning_table(runs).splitlines()[2] == "| 5120 | gipo | 2 | - | - | 1,500 |"


# -------------------- The README's block --------------------
def every_readme_run(method, regime, scores):
    """A run of every task and seed of the README; scores(task's place, seed) -> success and curve's level."""
    cells = [(i, seed) for i in range(8) for seed in (4, 5, 6)]
    return [run(method, regime, seed, *scores(i, seed), f"{report.README_TASKS[i]}-v3") for i, seed in cells]


def test_readme_table_by_hand():
    """Means of 24 runs, seeds drawn within their task. A row without a replay size has nothing there,
    and a method without replay stands in the first."""
    # Success 0, 0.1, ... 0.7 by task. Areas, half of the curve's level: their sum is 1.8, and one of the tasks has
    # 0, 0.2, 0.4 by seed: three draws of it move the mean of eight tasks by 0.025 at most.
    level = [0.0, 0.0, 0.4, 0.4, 0.4, 0.4, 1.0, 1.0]
    gipo = every_readme_run("gipo", "5120", lambda i, seed: (i / 10, 1, 0.4 * (seed - 4) if i == 5 else level[i]))
    ppo = every_readme_run("ppo", "on-policy", lambda i, seed: (1.0, 1, 0.5))
    sapo = every_readme_run("sapo", "20000", lambda i, seed: (0.5, 1, 0.3))
    short = report.readme_table(sapo + ppo + gipo).splitlines()
    assert short[2:4] == ["| `gipo` | 0.23 · 35 % |  |", "| `sapo` |  | 0.15 · 50 % |"]
    assert report.readme_table(sapo + ppo + gipo, intervals=True).splitlines() == [
        "| area · success | replay of 5,120 | 20,000 |",
        "|---|---|---|",
        "| `gipo` | 0.23 [0.20, 0.25] · 35 % |  |",
        "| `sapo` |  | 0.15 [0.15, 0.15] · 50 % |",
        "| `ppo`, without replay | 0.25 [0.25, 0.25] · 100 % |  |",
    ]


def test_lead_table_by_hand():
    """Four tasks, three seeds: areas 0.3, 0.3, 0.3 on two and 0.2, 0.28, 0.24 on two, against 0.1, 0.2, 0.15 on all."""
    one, two = (0.6, 0.6, 0.6), (0.4, 0.56, 0.48)  # twice the areas
    levels = {"reach-v3": one, "push-v3": two, "door-open-v3": one, "drawer-open-v3": two}
    more = {"window-open-v3": two}  # which the others lack
    areas = [(task, seed, level) for task, row in (levels | more).items() for seed, level in zip((4, 5, 6), row, strict=True)]
    runs = [run("gipo", "5120", seed, 1, 1, level, task) for task, seed, level in areas]
    for task in levels:
        clips = [run("ppo-clip-0.2", "5120", seed, 1, 1, (0.2, 0.4, 0.3)[seed - 4], task) for seed in (4, 5, 6)]
        # SAPO lacks the last seed, and a variant is no method of the benchmark's own: no rows.
        none = [run("none", "5120", seed, 1, 1, 1.0, task) for seed in (4, 5, 6)]
        runs += [*clips, *none, *(one | {"method": "sapo"} for one in none[:2])]
        runs += [one | {"method": "gipo-sigma-0.5"} for one in clips]
    runs += [run("ppo-clip-0.5", "20000", 4, 1, 1, 0.2), run("ppo", "on-policy", 4, 1, 1, 0.2)]  # without a partner
    _, _, *rows = report.lead_table(runs).splitlines()
    # Gaps 0.2, 0.1, 0.15 and 0.1, 0.08, 0.09, of variance 0.0025 and 0.0001, twice each: 0.12, with a standard error of
    # sqrt(2 * 0.0026 / 3) / 4 = 0.0104 and 2 * 2 * 0.0026^2 / (0.0025^2 + 0.0001^2) = 4.3 degrees of freedom, t = 2.70: 0.028.
    # Against 0.5 throughout: -0.2 and -0.3, -0.22, -0.26. Variances 0 and 0.0016: t(4) = 2.776, and 2.776 * 0.00816 = 0.023.
    assert rows == [
        "| 5,120 | clip of 0.2 | 4 | 0.27 | 0.15 | **0.12 [0.09, 0.15]** | 12 of 12 |",
        "| 5,120 | no weight | 4 | 0.27 | 0.50 | **-0.23 [-0.25, -0.21]** | 0 of 12 |",
    ]
    assert len(report.lead_table([one for one in runs if one["env_id"] != "reach-v3"]).splitlines()) == 2  # three tasks


def test_paper_score_by_hand():
    """A task's worst mean has 0 and its best 1, single runs lie beyond; a task on which all are equal is left out."""
    gipo, clip = [np.array([4.0, 8.0]), np.array([1.0]), np.array([3.0])], [np.array([2.0]), np.array([1.0]), np.array([5.0])]
    best, worst = report.paper_score([gipo, clip])
    assert [scores.tolist() for scores in best] == [[0.5, 1.5], [0.0]]
    assert [scores.tolist() for scores in worst] == [[0.0], [1.0]]


def test_paper_table_by_hand():
    """Ten tasks, one seed; nothing before every task has all three rows."""
    runs = []
    for i, task in enumerate(report.PAPER_TASKS):
        for method, success, level in (("gipo", 1.0, 100 + i), ("ppo-clip-0.2", 0.5, 0), ("ppo-clip-0.5", 0.25, 200)):
            runs.append(run(method, "20000", 4, success, 1, 1.0, f"{task}-v3") | {"train_return_mean": level})
    others = [run("gipo", "20000", 5, 0.0, 1, 1.0, "assembly-v3"), run("gipo", "5120", 4, 0.0, 1, 1.0, "assembly-v3")]
    others = [one | {"train_return_mean": 9} for one in others] + [run("gipo", "20000", 4, 0.0, 1, 1.0, "push-v3")]
    assert report.paper_table(runs[1:] + others) == ""
    header, _, first, *middle, means, score = report.paper_table(runs + others).splitlines()
    assert header == "| task | success: GIPO | clip of 0.2 | clip of 0.5 | return: GIPO | clip of 0.2 | clip of 0.5 |"
    assert first == "| assembly | 1.00 | 0.50 | 0.25 | 100 | 0 | 200 |" and len(middle) == 9
    assert means == "| mean | 1.00 | 0.50 | 0.25 | 104 | 0 | 200 |"
    # Scores 0.500, 0.505, ... 0.545 of GIPO: the middle six have the mean 0.5225.
    assert score == "| the paper's score | | | | 0.52 | 0.00 | 1.00 |"


def test_readme_shows_complete_rows_only():
    """A task of which a row lacks one run is not shown, nor does a run of another task or seed stand in for it or count
    beside it; a row that lacks more than half of its tasks is not shown."""
    gipo = [one for method in report.README_ROWS for one in every_readme_run(method, "5120", lambda i, seed: (1.0, 1, 0.5))]
    others = [run("gipo", "5120", 7, 0.0, 1, 0.0, "push-v3"), run("gipo", "5120", 4, 0.0, 1, 0.0, "pick-place-v3")]
    assert report.readme_runs(gipo + others) == gipo
    for i in (0, 13, 23):
        lacking = [run | {"regime": "20000"} for run in gipo[:i] + gipo[i + 1 : 24]]
        assert report.readme_runs(lacking + others) == []
        shown = [run for run in lacking + gipo if run["env_id"] != gipo[i]["env_id"]]
        assert report.readme_runs(lacking + gipo + others) == shown
    assert report.readme_runs([run | {"regime": "20000"} for run in gipo[:11]] + gipo) == gipo  # three tasks and two seeds


def test_a_task_joins_the_readme_once_it_is_finished_at_every_size_there():
    """./benchmark.sh main makes all of 5,120 before 20,000: half-way its fifth task would drop the rows of old data."""
    rows = [(method, size) for size in ("5120", "20000") for method in report.README_ROWS]
    runs = [one for method, size in rows for one in every_readme_run(method, size, lambda i, seed: (1.0, 1, 0.5))]
    four = [run for run in runs if run["env_id"].removesuffix("-v3") in report.README_TASKS[:4]]
    begun = [run for run in runs if run["regime"] == "5120" or run in four]
    assert report.readme_runs(four) == four == report.readme_runs(begun)
    assert report.readme_runs(runs) == runs


def test_readme_counts_further_seeds_of_a_size_once_its_rows_have_them():
    """Of that size alone, and not while one run is missing; a row that lacks them is left out."""
    rows = [(method, size) for size in ("5120", "20000") for method in (*report.README_ROWS, "none")]
    runs = [one for method, size in rows for one in every_readme_run(method, size, lambda i, seed: (1.0, 1, 0.5))]
    more = [
        run(method, "20000", 7, 1.0, 1, 0.5, f"{task}-v3") for method in report.README_ROWS for task in report.README_TASKS
    ]
    assert report.readme_runs(runs + more[1:]) == runs
    without = [one for one in runs if (one["method"], one["regime"]) != ("none", "20000")]
    assert report.readme_runs(runs + more) == without + more


def test_readme_shows_the_tasks_that_are_finished():
    """Four at least, on which every row has every seed."""
    runs = [
        one for method in (*report.README_ROWS, "none") for one in every_readme_run(method, "5120", lambda i, seed: (1, 1, 1))
    ]
    none = [run for run in runs if run["method"] == "none"]
    for left_out in (1, 4, 5):  # tasks: PPO with a clip of 0.5 lacks one seed on each
        lacking = {(f"{task}-v3", 6) for task in report.README_TASKS[:left_out]}
        part = [run for run in runs if run["method"] != "ppo-clip-0.5" or (run["env_id"], run["seed"]) not in lacking]
        shown = report.readme_runs(part)
        tasks = {f"{task}-v3" for task in report.README_TASKS[left_out:]}
        assert shown == ([run for run in runs if run["env_id"] in tasks] if left_out < 5 else [])
        fewer = [run for run in shown if run["env_id"] != none[-1]["env_id"]]
        few = left_out >= 4  # three tasks would be left
        assert report.readme_runs([run for run in part if run is not none[-1]]) == ([] if few else fewer)


MEASURED = {"gipo_5120": 0.75, "ppo-clip-0.2_5120": 0.6, "ppo-clip-0.5_5120": 0.7, "ppo_on-policy": 0.5, "none_5120": 0.25}
MEASURED["gipo-sigma-0.5_5120"] = 1.0  # a variant, which has no place there


def test_readme_block(tmp_path, monkeypatch):
    """It is replaced once a main row is complete; what stands around it, and until then the block itself, stays."""
    monkeypatch.setattr(report, "draw", lambda *_: None)  # the figures would take 15 s
    before, old, after = "before\n<!-- benchmark -->\n", "old\n", "<!-- /benchmark -->\nafter\n"
    readme, folder, longer = tmp_path / "README.md", tmp_path / "runs" / "300000", tmp_path / "runs" / "2000000"
    readme.write_text(before + old + after)
    folder.mkdir(parents=True)
    longer.mkdir()
    runs = {
        (task, name, seed): sample(name, seed=seed, env_id=f"{task}-v3", eval_success_rate=success)
        for name, success in MEASURED.items()
        for task in report.README_TASKS
        for seed in (4, 5, 6)
    }
    lacking = {(task, "gipo_5120", 5) for task in report.README_TASKS[3:]}  # three tasks have everything
    lacking |= {("button-press-topdown", "none_5120", 6), ("window-open", "ppo_on-policy", 4)}
    for (task, name, seed), run in runs.items():
        if (task, name, seed) not in lacking:
            (folder / f"{task}__{name}__{seed}.json").write_text(json.dumps(run))
    args = report.Args(results=str(tmp_path), readme=str(readme))
    assert report.write_report(args) == [str(tmp_path / "benchmark-300000-v1.md")]
    assert readme.read_text() == before + old + after

    lacking -= {("button-press-topdown", "none_5120", 6), ("window-open", "gipo_5120", 5)}
    for task, name, seed in lacking:
        (folder / f"{task}__{name}__{seed}.json").write_text(json.dumps(runs[task, name, seed]))
    for task, name, seed in runs:  # a further seed of its main rows: in the table of gaps, not in the README's
        if seed == 6 and name[:-5] in report.README_ROWS:
            more = sample(name, seed=7, env_id=f"{task}-v3", eval_success_rate=0.0)
            (folder / f"{task}__{name}__7.json").write_text(json.dumps(more))
    for key, one in runs.items():  # of another length: a table of its own, no place in the block
        one = one | {"args": one["args"] | {"total_timesteps": 2_000_000}}
        (longer / "{}__{}__{}.json".format(*key)).write_text(json.dumps(one))
    page = tmp_path / "docs" / "benchmark.md"
    page.parent.mkdir()
    page.write_text(before + old + after)
    report.write_report(dataclasses.replace(args, readme=str(tmp_path / "none")))
    assert page.read_text() == before + old + after  # it goes with the README
    (tmp_path / "benchmark-300000-v1.md").unlink()
    (tmp_path / "benchmark-2000000-v1.md").unlink()
    changed = report.write_report(args)
    tables = [str(tmp_path / f"benchmark-{steps}-v1.md") for steps in (300000, 2000000)]
    assert changed == [*tables, str(readme), str(page)]
    assert "| 5,120 | clip of 0.2 | 7 | 0." in page.read_text() and page.read_text().endswith(after)
    text = readme.read_text()
    assert text.startswith(before) and text.endswith(after)
    first, _, header, _, *rows, _, link = text.removeprefix(before).removesuffix(after).splitlines()
    names = ", ".join(task for task in report.README_TASKS if task not in ("window-open", "button-press-topdown"))
    assert first.startswith(f"Six Meta-World tasks of eight ({names}), seeds 4 to 6, 300,000 steps.")
    assert first.endswith("`none` with no weight.")
    assert header == "| area · success | replay of 5,120 |"
    shown = {row.split(" | ")[0]: row.split(" · ")[1] for row in rows}
    assert shown == {
        "| `gipo`": "75 % |",
        "| `ppo-clip-0.2`": "60 % |",
        "| `ppo-clip-0.5`": "70 % |",
        "| `none`": "25 % |",
        "| `ppo`, without replay": "50 % |",
    }
    assert "(results/benchmark-300000-v1.md)" in link
    assert report.write_report(args) == []


def test_a_missing_score_is_not_cut_away_as_the_best():
    assert np.isnan(report.interquartile_mean([np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, np.nan])]))


def test_a_newer_version_is_not_overwritten(tmp_path):
    """Other arguments are, and so is an older version."""
    result = sample()
    assert not report.is_stored(result, tmp_path / "x.json")
    for version, gamma, stored in [(1, 0.99, True), (1, 0.5, False), (0, 0.99, False), (2, 0.99, True)]:
        file = result | {"args": result["args"] | {"gamma": gamma}, "versions": {"algorithm": version}}
        (tmp_path / "x.json").write_text(json.dumps(file))
        assert report.is_stored(result, tmp_path / "x.json") == stored


def test_a_repetition_that_is_not_collected_is_named(place, capsys):
    """Of an edited environment, say: the stored run has equal arguments. And runs that are not finished are in no table."""
    folder = finished_run(Path(place.runs) / "benchmark-512", "gipo_20000")
    report.main(place)
    report.main(place)
    assert "not collected" not in capsys.readouterr().out
    run = read_json(folder / "result.json") | {"sps": 1234.5, "eval_success_rate": 1.0}
    (folder / "result.json").write_text(json.dumps(run))
    unfinished = finished_run(Path(place.runs) / "benchmark-512", "gipo_20000", seed=2)
    (unfinished / "result.json").unlink()
    report.main(place)
    output = capsys.readouterr().out
    assert (
        "not collected: another run than that of " in output and "reach-v3__gipo_20000__1.json, with equal arguments" in output
    )
    assert f"not finished, and so in no table: {unfinished} and 0 more" in output


def test_runs_are_found_three_folders_deep(tmp_path):
    folder = finished_run(tmp_path / "sweep" / "lr", "gipo")
    finished_run(folder / "inside", "a-copy")  # not what lies within a run
    assert report.run_folders(tmp_path) == [folder]


# -------------------- Files that are damaged, or not the benchmark's --------------------
def finished_run(run_dir, exp_name, seed=1, last=512, env_id="reach-v3", **args):
    """A run folder such as gipo_continuous.py leaves, without its checkpoint; its events end at step `last` of 512.

    Its scores follow from the seed. Meta-World's tasks have a success, and its curve rises in a line to 1.
    """
    result = sample()
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
    finished_run(tmp_path / "runs" / "benchmark-512", "gipo_20000")
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
    assert "runs/512/reach-v3__gipo_20000__1.json" in stored(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exp_name": "mykernel"}, "exp_name mykernel is not METHOD_REGIME"),
        ({"exp_name": "gipo_old"}, "exp_name gipo_old is not METHOD_REGIME, as in gipo_5120: move it away"),
        ({"exp_name": "gipo_very-stale"}, "exp_name gipo_very-stale is not METHOD_REGIME"),
        ({"exp_name": "gipo_5e3"}, "exp_name gipo_5e3 is not METHOD_REGIME"),
        ({"exp_name": "_5120"}, "exp_name _5120 is not METHOD_REGIME"),
        ({"curves": {"success": [0.5] * 30}}, "has no curves.steps.0"),
        ({"curves": {"steps": [*range(30)], "success": [0.5] * 40}}, "its curves differ in length"),
        ({"curves": {"steps": [*range(30)], "success": ["0.5"] * 30}}, "must be a number or null, not '0.5'"),
    ],
)
def test_a_damaged_file_of_the_results_is_named(place, change, said):
    report.main(place)
    file = Path(place.results) / "runs" / "512" / "reach-v3__gipo_20000__1.json"
    file.write_text(json.dumps(read_json(file) | change))
    with pytest.raises(report.ReportError, match=f"^{re.escape(str(file))}.*{re.escape(said)}"):
        report.write_report(place)


def test_errors_are_one_sentence_and_exit_code_2(place):
    file = Path(place.runs) / "benchmark-512" / "reach-v3__gipo_20000__1" / "result.json"
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
    shutil.copytree(Path(place.runs) / "benchmark-512" / "reach-v3__gipo_20000__1", own.with_name("copy"))
    capsys.readouterr()
    report.main(place)
    copied, named, current = capsys.readouterr().out.splitlines()
    assert copied.startswith(f"not collected: {own.with_name('copy')} (it holds the run reach-v3__gipo_20000__1)")
    assert named.startswith(f"not collected: {own} (its exp-name is not METHOD_REGIME") and current == "report is current"
    assert stored(place) == before
    shutil.rmtree(Path(place.runs))
    report.main(place)
    assert capsys.readouterr().out == "report is current\n"


def test_two_folders_of_one_run_are_refused(place):
    """An older one that was moved aside under a name that the benchmark looks at would come back at every report."""
    report.main(place)
    before = stored(place)
    other = finished_run(Path(place.runs) / "benchmark-512-old", "gipo_20000", gamma=0.5)
    with pytest.raises(report.ReportError, match=f"benchmark-512/.* and {re.escape(str(other))} hold runs of one name"):
        report.main(place)
    assert stored(place) == before
    shutil.copytree(Path(place.runs) / "benchmark-512", Path(place.runs) / "benchmark-512-backup")  # this one does no harm
    shutil.move(other.parent, Path(place.runs).parent)
    report.main(place)
    assert stored(place) == before


def test_runs_that_lie_too_deep_are_mentioned(place, capsys):
    deep = finished_run(Path(place.runs) / "machineB" / "benchmark-512", "gipo_20000", seed=2)
    report.main(place)
    assert f"not looked at: {deep} and 0 more: runs belong into {place.runs}/SUITE/RUN" in capsys.readouterr().out


def test_two_runs_that_were_copied_into_one_folder_are_refused(place):
    """TensorBoard reads both files, one after the other, and an area would be the mean of two runs."""
    folder = Path(place.runs) / "benchmark-512" / "reach-v3__gipo_20000__1"
    for _ in range(2):
        with SummaryWriter(folder) as writer:
            for step in range(64, 513, 64):
                writer.add_scalar("losses/entropy", 1.0, step)
    with pytest.raises(report.ReportError, match=f"^{re.escape(str(folder))}: its TensorBoard files are those of two runs"):
        report.main(place)
    assert stored(place) == []


def test_a_row_that_was_only_begun_empties_no_table(place):
    """Its task is none of the others'."""
    for seed in (1, 2):
        for task in ("push-v3", "door-open-v3"):
            for name in ("gipo_5120", "sapo_5120"):
                finished_run(Path(place.runs) / "benchmark-512", name, seed, env_id=task)
    shutil.rmtree(Path(place.runs) / "benchmark-512" / "reach-v3__gipo_20000__1")
    finished_run(Path(place.runs) / "benchmark-512", "none_5120", env_id="reach-v3")
    report.main(place)
    text = (Path(place.results) / "benchmark-512-v1.md").read_text()
    scope = "Over the 2 tasks that every row has (door-open, push); without the rows with too few of them (none 5120):"
    table = text.split(scope)[1].split("\n\n")[1]
    assert "\n| 5120 | gipo | 4 |" in table and "\n| 5120 | sapo | 4 |" in table and "none" not in table
    for task in ("push-v3", "door-open-v3", "drawer-open-v3"):  # nor is there less of it if it is one of theirs
        for name in ("gipo_5120", "sapo_5120"):
            finished_run(Path(place.runs) / "benchmark-512", name, 3, env_id=task)
    finished_run(Path(place.runs) / "benchmark-512", "none_20000", env_id="push-v3")
    report.main(place)
    text = (Path(place.results) / "benchmark-512-v1.md").read_text()
    scope = "Over the 3 tasks that every row has (door-open, drawer-open, push); without the rows with too few of them "
    assert text.count(f"{scope}(none 5120, none 20000):") == 1
    table = text.split(scope)[1].split("\n\n")[1]
    assert "\n| 5120 | gipo | 7 |" in table and "\n| 5120 | sapo | 7 |" in table and "none" not in table


def test_a_mixture_is_refused_before_it_is_stored(place):
    """A run of one's own under a method's name: the report works again once it is moved away."""
    report.main(place)
    before = stored(place)
    own = finished_run(Path(place.runs) / "benchmark-512", "gipo_20000", seed=2, gamma=0.5)
    with pytest.raises(report.ReportError, match="reach-v3 seed 1 and reach-v3 seed 2 differ in gamma"):
        report.main(place)
    assert stored(place) == before
    shutil.rmtree(own)
    report.main(place)
    assert stored(place) == before


def test_a_later_version_leaves_the_earlier_ones_runs(place):
    report.main(place)
    file = Path(place.runs) / "benchmark-512" / "reach-v3__gipo_20000__1" / "result.json"
    file.write_text(json.dumps(read_json(file) | {"versions": {"algorithm": 2}}))
    report.main(place)
    assert {"runs/512/reach-v3__gipo_20000__1.json", "runs/512-v2/reach-v3__gipo_20000__1.json"} <= {*stored(place)}
    assert {"benchmark-512-v1.md", "benchmark-512-v2.md"} <= {*stored(place)}


def test_check_names_what_is_not_current_and_writes_nothing(place):
    """A table that somebody changed, one that is missing, and runs that no table has yet."""
    check = dataclasses.replace(place, check=True)
    report.main(place)
    table, plots = Path(place.results) / "benchmark-512-v1.md", [*Path(place.results).glob("*.png")]
    written = table.read_text()
    report.main(check)
    for plot in plots:  # they need no check: their digest says what they show
        plot.unlink()
    for text in (written.replace("gipo", "GIPO"), None):
        table.unlink()
        if text:
            table.write_text(text)
        with pytest.raises(SystemExit, match=f"^not current: {re.escape(str(table))}; run python report.py$"):
            report.main(check)
        assert (table.read_text() if text else table.exists()) == (text or False)
    assert len(plots) == 3 and not [*Path(place.results).glob("*.png")]
    report.main(place)
    assert table.read_text() == written and {*Path(place.results).glob("*.png")} == {*plots}


# -------------------- Any runs --------------------
def compared(capsys, *folders, **args):
    """What report.py prints of these folders: the cells of its table's rows, and the lines below."""
    report.main(report.Args(compare=tuple(map(str, folders)), **args))
    parts = capsys.readouterr().out.split("\n\n")
    tables = [part.splitlines() for part in parts if part.startswith("|")]
    assert all(len({*map(len, table)}) == 1 for table in tables)  # aligned
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for table in tables[:1] for line in table]
    return rows, [line for part in parts for line in part.splitlines() if line and not line.startswith("|")]


def test_comparison_by_hand(tmp_path, capsys):
    for seed in (1, 2):
        finished_run(tmp_path, "gipo", seed)
    finished_run(tmp_path, "mykernel")
    finished_run(tmp_path, "mykernel", env_id="Pendulum-v1")
    rows, lines = compared(capsys, tmp_path)
    assert rows[0][:8] == ["task", "run", "seeds", "steps", "success", "return", "training return", "area, success"]
    assert rows[0][8:] == ["area, return", "steps/s"]
    assert rows[2] == ["Pendulum-v1", "mykernel", "1", "512", "-", "100", "10", "-", "1", "1,000"]
    # On the grid of 30 stretches the points 1/8 ... 8/8 fill 4, 4, 3, 4, 4, 4, 3, 1 of those from the fourth on: 110/8 of 30,
    # success being 0 before.
    expected = ["reach-v3", "gipo", "1, 2", "512", "0.375 [0.25, 0.5]", "150 [100, 200]", "15 [10, 20]", "0.458"]
    assert rows[3] == [*expected, "1.5 [1, 2]", "1,500 [1,000, 2,000]"]
    assert rows[4] == ["reach-v3", "mykernel", "1", "512", "0.25", "100", "10", "0.458", "1", "1,000"] and len(rows) == 5
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
    for count in (1, 24):  # names in the legend, which takes no room from the panel
        figure = report.plot_comparison({("Pendulum-v1", f"run-{i}"): runs["Pendulum-v1", "mykernel"] for i in range(count)})
        figure.canvas.draw()
        box = figure.axes[0].get_window_extent()
        assert box.height > 150 and figure.legends[0].get_window_extent().y0 > box.y1


def test_gaps_of_any_runs_by_hand(tmp_path, capsys):
    """Of equal seeds, two or more; tasks with success together, others alone; collected rows only against one's own."""

    def group(seeds, quantity, values):  # runs of constant curves
        common = {"args": {}, "versions": {"algorithm": 2}, "total_timesteps": 512}
        curves = [{"steps": [1, 2], quantity: [value] * 2} for value in values]
        return [common | {"seed": seed, "curves": curve} for seed, curve in zip(seeds, curves, strict=True)]

    runs = {
        ("Pendulum-v1", "gipo"): group([2, 3, 4], "return", [2.0, 3.0, 4.0]),
        ("Pendulum-v1", "own"): group([2, 3, 4], "return", [4000.0, 6000.0, 8000.0]),
        ("push-v3", "gipo"): group([1, 2, 3, 4], "success", [0.0, 1.0, 1.0, 1.0]),
        ("push-v3", "own"): group([2, 3, 4], "success", [0.9, 0.8, 0.7]),
        ("reach-v3", "gipo"): group([2, 3, 4], "success", [1.0, 1.0, 0.5]),
        ("reach-v3", "own"): group([2, 3, 4], "success", [0.5, 0.5, 0.0]),
        ("reach-v3", "one-seed"): group([2], "success", [0.5]),
    }
    table, notes = report.gap_table(runs, set())
    pairs = ", ".join(f"reach-v3 of {pair}" for pair in ("gipo and one-seed", "one-seed and own"))
    assert notes == [f"left out, gaps with fewer than two common seeds of one length and --env-kwargs: {pairs}"]
    lines = table.split("\n")
    title, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert title == ["task", "run", "against", "area of", "pairs", "mean gap in area", "larger in"]
    # push: 0.1, 0.2, 0.3, a variance of 0.01 / 3 with two degrees of freedom, t = 4.303; reach: 0.5 without any spread
    reach = 4.303 * np.sqrt(0.01 / 3) / 2
    gap = f"0.350 [{0.35 - reach:.3f}, {0.35 + reach:.3f}]"
    low, high = (-5997 + sign * 4.3027 * 1999 / np.sqrt(3) for sign in (-1, 1))
    assert rows == [
        ["Pendulum-v1", "gipo", "own", "return", "3", f"-5,997 [{low:,.0f}, {high:,.0f}]", "0 of 3"],
        ["push-v3, reach-v3", "gipo", "own", "success", "6", gap, "6 of 6"],
    ]
    for change in ({"total_timesteps": 600}, {"args": {"env_kwargs": "{}"}}):  # another length, another task: no gap
        for run, other in zip(runs["push-v3", "gipo"], runs["push-v3", "own"] * 2, strict=False):
            run |= change
            other |= {"args": {"env_kwargs": '{"size": 3}'}} if "args" in change else {}
        assert "push" not in report.gap_table(runs, set())[0]
        for run in runs["push-v3", "gipo"] + runs["push-v3", "own"]:
            run |= {"total_timesteps": 530, "args": {}}
    for run, text in zip(
        runs["push-v3", "gipo"] + runs["push-v3", "own"], ['{"a": 1, "b": 2}', '{"b":2,"a":1}'] * 4, strict=False
    ):
        run |= {"args": {"env_kwargs": text}}
    assert "push" in report.gap_table(runs, set())[0]  # however the arguments were typed
    for run in runs["push-v3", "gipo"] + runs["push-v3", "own"]:
        run |= {"args": {}}
    for run in runs["push-v3", "own"]:  # pooled only where a name has one setting on all tasks
        run["args"] = {"sigma": 1.0}
    assert [row.split(" | ")[0] for row in report.gap_table(runs, set())[0].split("\n")[3:]] == [
        "| push-v3    ",
        "| reach-v3   ",
    ]
    for run in runs["push-v3", "own"]:
        run["args"] = {}
    runs["push-v3", "own"][0]["curves"].pop("success")  # a lost curve costs its pair only
    assert "| 5     |" in report.gap_table(runs, set())[0]
    many = {("push-v3", f"{name}_{size}"): runs["push-v3", "gipo"] for name in "abcd" for size in (512, 5120)}
    many = {key: [run | {"args": {"buffer_size": int(key[1][2:])}} for run in found] for key, found in many.items()}
    table, notes = report.gap_table(many, set())
    assert table.count("\n") == 1 + 2 * 6  # of each size, as there are many
    assert notes == [
        "left out, gaps between rows of unlike replay size, since the rows are more than six; name fewer folders: "
        "a_512 and a_5120, a_512 and b_5120, a_512 and c_5120, a_512 and d_5120, ..."
    ]
    late = group([1, 2], "return", [1.0, 1.0])  # with more environments: the first episodes end later
    for run in late:
        run["curves"] = {"steps": [1, 2, 3, 4], "return": [None, None, 8.0, 9.0]}
    early = [run | {"curves": {"steps": [1, 2, 3, 4], "return": [0.0, 4.0, 8.0, 9.0]}} for run in late]
    assert (report.gaps_of_seeds(early, late)[1] == 0).all() and report.COLUMNS["area, return"](late[0]) == 8.5
    collected = {(task, f"results/{name}"): found for (task, name), found in runs.items()}
    assert report.gap_table(collected, {"results"}) == ("", [])
    rows = report.gap_table(runs | collected, {"results"})[0].split("\n")[2:]
    assert len(rows) == 2 * 5 and not any(row.split(" | ")[1].startswith("results") for row in rows)
    for name in ("gipo", "own"):
        for seed in (1, 2):
            finished_run(tmp_path, name, seed)
    _, lines = compared(capsys, tmp_path)
    assert report.GAPS in lines and "| reach-v3 | gipo | own" in (tmp_path / "compare.md").read_text()


def test_a_reader_that_stops_reading_breaks_no_comparison(tmp_path):
    """As `| head -1` does."""
    finished_run(tmp_path, "gipo")
    command = [sys.executable, str(ROOT / "report.py"), "--compare", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0 and (tmp_path / "compare.png").exists()


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
    assert "runs/512/reach-v3__gipo_20000__1.json" in stored(place) and not (Path(place.runs) / "compare.md").exists()


def test_one_unfinished_run_that_cannot_be_read_stops_no_comparison(tmp_path, capsys):
    finished_run(tmp_path, "gipo", 1)
    folder = finished_run(tmp_path, "gipo", 2)
    (folder / "result.json").unlink()
    for _ in range(2):  # copied together from two machines
        with SummaryWriter(folder) as writer:
            for step in (64, 128):
                writer.add_scalar("losses/entropy", 1.0, step)
    rows, lines = compared(capsys, tmp_path)
    assert rows[2][:3] == ["reach-v3", "gipo", "1"]
    assert any(line.startswith(f"* unfinished: {folder}: its TensorBoard files are those of two runs") for line in lines)


def test_a_comparison_that_cannot_be_written_is_shown(tmp_path, capsys, monkeypatch):
    """Of somebody else's folder, or on a full disk."""
    finished_run(tmp_path, "gipo")

    def refuse(self, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(report.ReportError, match=r"compare\.md and its plot cannot be written: Permission denied$"):
        report.main(report.Args(compare=(str(tmp_path),)))
    assert "| reach-v3 | gipo" in capsys.readouterr().out


def test_runs_without_a_success_are_failures_where_others_report_it(tmp_path, capsys):
    """An environment that says is_success only when it is true: a seed that never got there has no rate and no curve."""
    for seed in (1, 2, 3):
        folder = finished_run(tmp_path, "gipo", seed, env_id="Mine-v0")
        result = read_json(folder / "result.json")
        result["eval_success_rate"] = 1.0 if seed == 2 else None
        (folder / "result.json").write_text(json.dumps(result))
    finished_run(tmp_path, "gipo", env_id="Pendulum-v1")
    rows, _ = compared(capsys, tmp_path)
    assert [row[4] for row in rows[2:]] == ["0.333 [0, 1]", "-"]
    one = {"env_id": "Mine-v0", "eval_success_rate": None, "eval_return_mean": 5.0}
    curves = {"return": [None, 1.0, 2.0], "success": [None] * 3}
    failed, not_evaluated, solved, _ = report.with_failures(
        [
            one | {"curves": curves},
            one | {"curves": curves, "eval_return_mean": None},
            one | {"curves": curves | {"success": [None, 0.5, 1.0]}},
            one | {"curves": curves, "env_id": "Pendulum-v1"},
        ]
    )
    assert failed["eval_success_rate"] == 0.0 and failed["curves"]["success"] == [None, 0.0, 0.0]
    assert not_evaluated["eval_success_rate"] is None and solved["curves"]["success"] == [None, 0.5, 1.0]


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
    finished_run(tmp_path, "mine")
    saved = tmp_path / "reach-v3__mine__1" / "model"  # as gipo_vla_libero.py saves one: no run
    saved.mkdir()
    (saved / "args.json").write_text("{}")
    rows, _ = compared(capsys, tmp_path)  # benchmark.sh's runs are in a folder within runs/
    assert [row[1] for row in rows[2:]] == [f"{tmp_path}/fork/gipo", f"{tmp_path}/ours/gipo", "mine"]


def test_runs_are_compared_with_collected_ones(tmp_path, capsys):
    """Of their tasks and replay sizes, and without replay; alone, all of them are shown."""
    finished_run(tmp_path / "ours", "mine", env_id="push-v3", buffer_size=20_000)
    collected = tmp_path / "300000-v2"
    collected.mkdir()
    cells = [("push-v3", 4, 20_000), ("push-v3", 5, 20_000), ("push-v3", 4, 0), ("push-v3", 4, 512), ("reach-v3", 4, 20_000)]
    for task, seed, size in cells:
        run = sample(f"gipo_{size}", env_id=task, seed=seed)
        run["args"]["buffer_size"] = size
        (collected / f"{task}__gipo_{size}__{seed}.json").write_text(json.dumps(run))
    rows, _ = compared(capsys, tmp_path / "ours", collected)
    assert [row[:3] for row in rows[2:]] == [
        ["push-v3", f"{collected}/gipo_0", "4"],
        ["push-v3", f"{collected}/gipo_20000", "4, 5"],
        ["push-v3", f"{tmp_path}/ours/mine", "1"],
    ]
    assert (tmp_path / "ours" / "compare.png").stat().st_size > 10_000
    rows, _ = compared(capsys, collected)
    assert [row[0] for row in rows[2:]] == ["push-v3"] * 3 + ["reach-v3"]
    file = collected / "push-v3__gipo_20000__4.json"
    for seed in (3, 6):  # settings were chosen with 3 in version 2; 6 has a copy of one's own run, as report.py collects it
        run = read_json(file) | {"seed": seed, "versions": {"algorithm": 2}}
        if seed == 6:
            own = read_json(tmp_path / "ours" / "push-v3__mine__1" / "result.json")
            run |= {key: own[key] for key in ("args", "versions", "sps")}
        (collected / f"push-v3__gipo_20000__{seed}.json").write_text(json.dumps(run))
    rows, lines = compared(capsys, tmp_path / "ours", collected)
    assert [row[2] for row in rows[2:]] == ["4", "4, 5", "1"]
    assert f"* left out of {collected}, for seeds that chose settings: 1 of 5 runs" in lines
    assert "* no gaps: they need two rows of one task, --env-kwargs and length with two common seeds or more" in lines
    copy = collected / "push-v3__gipo_20000__6.json"
    copy.write_text(json.dumps(read_json(copy) | {"sps": 1.5, "exp_name": "again"}))  # a repetition, to be compared with
    rows, _ = compared(capsys, tmp_path / "ours", collected)
    assert [row[2] for row in rows[2:]] == ["6", "4", "4, 5", "1"]
    copy.unlink()
    (tmp_path / "ours" / "push-v3__mine__1" / "result.json").unlink()  # of no finished run, the task and size
    rows, lines = compared(capsys, tmp_path / "ours", collected)
    assert len(rows) == 4 and any("unfinished: " in line for line in lines)
    finished_run(tmp_path / "theirs", "mine", env_id="reach-v3", buffer_size=99)
    _, lines = compared(capsys, tmp_path / "theirs", collected)
    assert f"* {collected} has no run of these tasks and replay sizes" in lines


def test_collected_runs_of_other_scripts(capsys):
    """GraphGPO's curves are over episodes; POPO's files have none."""
    folder = ROOT / "results" / "graphgpo_sokoban" / "runs" / "32000"
    runs, _ = report.read_runs([folder])
    assert len(report.plot_comparison(runs).axes[0].lines) == len(runs) > 2
    with pytest.raises(report.ReportError, match="its runs have no training curves, so that only their own table shows them"):
        report.read_runs([ROOT / "results" / "popo_countdown" / "runs" / "51200"])


def test_odd_names_are_compared(tmp_path, capsys):
    for name in ("$\\foo$", "_hidden", "a|b"):
        finished_run(tmp_path, name)
    compared(capsys, tmp_path)
    assert "| a\\|b " in (tmp_path / "compare.md").read_text()
    figure = report.plot_comparison(report.read_runs([tmp_path])[0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"\$\foo\$", " _hidden", "a|b"]
    figure.canvas.draw()


def test_what_cannot_be_compared_is_named(tmp_path):
    arguments = report.Args(compare=(str(tmp_path),))
    with pytest.raises(report.ReportError, match="--compare nowhere: there is no such folder"):
        report.main(report.Args(compare=("nowhere",)))
    run = finished_run(tmp_path / "runs", "gipo")
    with pytest.raises(
        report.ReportError, match=f"--compare {run} is a run itself: name the folder that holds it, {run.parent}$"
    ):
        report.main(report.Args(compare=(str(run),)))
    shutil.rmtree(tmp_path / "runs")
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


def test_every_method_meets_every_ppo_clip_of_its_replay():
    """Whatever its clip and step size, but none of another replay size, and no PPO-clip another one."""
    clips = ["ppo-clip-0.2", "ppo-clip-0.5", "ppo-clip-0.2-lr-6e-4"]
    others = ["gipo", "sapo", "none", "gipo-sigma-0.5-lr-6e-4"]
    names = [("20000", method) for method in reversed(clips + others)]
    names += [("5120", "ppo-clip-0.1"), ("5120", "sapo"), ("512", "gipo"), ("100000", "ppo-clip-0.2"), ("on-policy", "ppo")]
    runs = [run(method, regime, 1, 1.0, 1, 1.0) for regime, method in names]
    rows = [tuple(row.strip("| ").split(" | ")[:3]) for row in report.same_replay_table(runs).splitlines()[2:]]
    expected = [("5120", "sapo", "ppo-clip-0.1")] + [("20000", method, clip) for method in others for clip in clips]
    assert [row for row in rows if row[2].startswith("ppo")] == expected
    own = ("gipo", "ppo-clip-0.2", "ppo-clip-0.5", "sapo", "none", "ppo-clip-0.2-lr-6e-4")  # one's own meets every method
    assert rows[-6:] == [("20000", others[-1], opponent) for opponent in own]


def test_a_method_and_a_task_of_ones_own_are_in_the_tables(tmp_path):
    """A new line of benchmark.sh's table has its area beside GIPO's; a task that the benchmark lacks has rows of its own."""
    folder = tmp_path / "runs" / "300000"
    folder.mkdir(parents=True)
    scores = {"gipo_512": 0.4, "mine_512": 0.6, "mine-too_on-policy": 0.7, "ppo_on-policy": 0.3}
    tasks = {"reach-v3": 0.0, "my_tasks/Swing-v0": 0.1}
    for (name, score), (task, more), seed in itertools.product(scores.items(), tasks.items(), (4, 5)):
        found = sample(name, env_id=task, seed=seed, eval_success_rate=score + more)
        (folder / f"{name}{seed}{more}.json").write_text(json.dumps(found))
    report.write_report(report.Args(results=str(tmp_path), readme="none"))
    text = (tmp_path / "benchmark-300000-v1.md").read_text()
    first, second, third, fourth, *_ = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert "| 512 | gipo | 2 | 0.40 [" in first and "| 512 | gipo | 2 | 0.50 [" in second and "mine" not in first + second
    assert "| 512 | mine | gipo | 1 | 2 | 0.60 against 0.40 |" in third
    assert "| on-policy | mine-too | ppo | 1 | 2 | 0.70 against 0.30 |" in third
    assert "| 512 | mine | gipo | 1 | 2 | 0.70 against 0.50 |" in fourth
    assert "| on-policy | mine-too | ppo | 1 | 2 | 0.80 against 0.40 |" in fourth


def test_order_of_the_rows():
    """On-policy, replay sizes from the smallest on; the main rows, then others by name; tasks and seeds."""
    regimes = ["on-policy", "512", "5120", "20000", "100000"]
    methods = [*report.METHODS, "a-kernel", "ppo-clip-0.1", "z-kernel"]
    runs = [run(method, regime, 1, 1.0, 1, 1.0) for regime in sorted(regimes) for method in sorted(methods)]
    runs += [run("gipo", "512", seed, 1.0, 1, 1.0, task) for task in ("reach-v3", "push-v3") for seed in (10, 9)]
    table = report.cells(runs)
    assert [*table] == [(regime, method) for regime in regimes for method in methods]
    assert [*table["512", "gipo"]] == ["push-v3", "reach-v3"]
    assert [run["seed"] for run in table["512", "gipo"]["reach-v3"]] == [1, 9, 10]
    assert [line.split(" | ")[:2] for line in report.aggregate_table(runs).splitlines()[2:]] == [
        [f"| {regime}", method] for regime, method in table
    ]


@pytest.mark.parametrize(
    ("exp_name", "method", "regime"),
    [
        ("gipo_5120", "gipo", "5120"),
        ("ppo-clip-0.2-lr-6e-4_20000", "ppo-clip-0.2-lr-6e-4", "20000"),
        ("my_kernel_512", "my_kernel", "512"),
        ("ppo_on-policy", "ppo", "on-policy"),
        ("gipo_stale", None, None),  # of LIBERO's runs only
        ("gipo_²", None, None),
        *[(name, None, None) for name in ("gipo", "5120", "_5120", "gipo_", "gipo_5120_", "gipo_-512", "gipo_5k", "gipo_0.5")],
        *[(name, None, None) for name in ("gipo_very-stale", "gipo-5120", "gipo_5120-", "gipo_5 120")],
    ],
)
def test_method_and_regime_of_a_name(exp_name, method, regime):
    assert report.method_and_regime(exp_name) == ({"method": method, "regime": regime} if method else {})


def test_only_rows_with_the_same_tasks_are_compared():
    """All tasks, without the rows that lack some, once on-policy PPO has them all; until then the tasks that all rows have."""
    ppo = [run("ppo", "on-policy", 1, 1.0, 1, 1.0, task) for task in ("reach-v3", "push-v3")]
    gipo = [run("gipo", "20000", 1, 1.0, 1, 1.0, task) for task in ("reach-v3", "push-v3")]
    part = run("gipo", "5120", 1, 1.0, 1, 1.0)
    runs, scope = report.comparable([*ppo, *gipo, part])
    assert runs == [*ppo, *gipo] and scope == "Over 2 tasks; without the rows that lack some of them (gipo 5120):"
    assert report.comparable([*ppo, *gipo]) == ([*ppo, *gipo], "Over 2 tasks:")
    clip = [r | {"method": "ppo-clip-0.2"} for r in gipo]
    runs, scope = report.comparable([ppo[0], *gipo, *clip, part])
    assert runs == [ppo[0], gipo[0], clip[0], part] and scope == "Over the 1 task that every row has (reach):"
    runs, scope = report.comparable([ppo[0], gipo[1]])  # nothing in common: one of them stays
    assert runs == [gipo[1]]
    assert scope == "Over the 1 task that every row has (push); without the rows with too few of them (ppo on-policy):"


def test_diagnostics_table_by_hand():
    """First and last fifth of 30 stretches; empty stretches and curves that an old file lacks are left out."""
    runs = [run("gipo", "20000", seed, 1.0, 1, 1.0) for seed in (1, 2)] + [run("ppo", "on-policy", 1, 1.0, 1, 1.0)]
    runs[0]["curves"]["entropy"] = [None, 20.0, 20.0, 20.0, 20.0, 20.0] + [99.0] * 18 + [6.0] * 6
    runs[1]["curves"]["entropy"] = [10.0] * 6 + [99.0] * 18 + [8.0] * 6
    header, _, ppo, gipo = [[cell.strip() for cell in line.split("|")] for line in report.diagnostics_table(runs).splitlines()]
    column = header.index("entropy")
    assert gipo[column] == f"{(5 * 20 + 6 * 10) / 11:.2g} / 7" and ppo[column] == "-"


# -------------------- benchmark.sh --------------------
def benchmark(*flags, cwd=ROOT, **environment):
    """A finished call; its Python processes are forked (warm.py) unless the test has a Python of its own."""
    environment = {"PYTHON": warm.stand_in()} | environment
    command = ["./benchmark.sh", *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)


def copy_benchmark(folder):
    """What the benchmark needs; its scripts evaluate two episodes by default: 50 would take longer than the runs."""
    for file in ("benchmark.sh", "report.py", "README.md"):
        shutil.copy(ROOT / file, folder)
    for script in ("gipo_continuous.py", "ppo_baseline.py"):
        before, after = (ROOT / script).read_text().split("eval_episodes: int = 50\n")
        (folder / script).write_text(f"{before}eval_episodes: int = 2\n{after}")


@pytest.fixture
def checkout(tmp_path):
    """The files that the benchmark needs, in a folder of their own."""
    copy_benchmark(tmp_path)
    return tmp_path


SMALL = ["--tasks", "reach-v3", "--seeds", "1", "--methods", "gipo ppo", "--regimes", "512", "--steps", "512"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a first `benchmark.sh quick` printed, and the folder it has left."""
    folder = tmp_path_factory.mktemp("finished")
    copy_benchmark(folder)
    return benchmark("quick", *SMALL, cwd=folder), folder


@pytest.fixture
def finished_checkout(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "checkout")
    return tmp_path / "checkout"


def commands(*flags, cwd=ROOT):
    """The commands that a dry run prints."""
    process = benchmark(*flags, "--dry-run", cwd=cwd)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def arguments(command):
    """Script of a command, and its arguments as that script parses them."""
    _, script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    return script, vars(module.parse_args(flags) if hasattr(module, "parse_args") else tyro.cli(module.Args, args=flags))


def table_of_methods():
    """(suite, name, script and flags) of every line of benchmark.sh's table."""
    table = re.search(r'^METHODS="\n(.*?)^"$', (ROOT / "benchmark.sh").read_text(), re.DOTALL | re.MULTILINE)[1]
    return [line.split(maxsplit=2) for line in table.splitlines()]


SUITES_OF_THE_TABLE = {"core": "quick", "graphgpo": "graphgpo", "popo": "popo", "vla": "vla"}


@pytest.fixture(scope="module")
def every_line():
    """{suite: {name: (exp_name, script, arguments)}} of the whole table: one seed, one task, one replay size."""
    found = {}
    for table, suite in SUITES_OF_THE_TABLE.items():
        names = [name for of, name, _ in table_of_methods() if of == table]
        flags = ["--methods", " ".join(names), "--seeds", "77", "--steps", "10240"]  # no stored run has this seed
        flags += {"core": ["--tasks", "push-v3", "--regimes", "5120"], "vla": ["--regimes", "recent"]}.get(table, [])
        lines = commands(suite, *flags)
        assert len(lines) == len(names)
        rows = [arguments(line) for line in lines]
        found[table] = {name: (row[1]["exp_name"], *row) for name, row in zip(names, rows, strict=True)}
    return found


def changed(args, default):
    """What two sets of arguments differ in, of those that both have."""
    return {name: args[name] for name in args.keys() & default.keys() if args[name] != default[name]}


@pytest.mark.parametrize(("module", "name"), [(gipo_continuous, "gipo_5120"), (ppo_baseline, "ppo_on-policy")])
def test_the_defaults_are_those_of_the_stored_runs(module, name):
    """Textbook PPO's too: one epoch fewer would make another baseline."""
    stored = read_json(ROOT / "results" / "runs" / "300000-v2" / f"push-v3__{name}__4.json")["args"]
    named = {"env_id", "exp_name", "seed", "run_dir", "eval_every", "overlap"}
    named |= {"recompute_advantages"} if module is ppo_baseline else set()  # has no meaning on-policy
    assert set(changed(stored, vars(module.Args()))) <= named and stored.keys() == vars(module.Args()).keys()


def test_every_line_of_the_table_is_another_method(every_line):
    """Each is accepted by its script, none is there twice, and none differs from another by its name only."""
    keys = [(suite, name) for suite, name, _ in table_of_methods()]
    assert len(keys) == len({*keys}) and {suite for suite, _ in keys} == {*SUITES_OF_THE_TABLE}
    assert [*every_line["core"]][:1] == ["gipo"] and {*report.METHODS} < {*every_line["core"]}
    for rows in every_line.values():
        outcomes = [json.dumps([script, args | {"exp_name": ""}], sort_keys=True) for _, script, args in rows.values()]
        assert len(outcomes) == len({*outcomes})
    names = {table: {name: exp_name for name, (exp_name, _, _) in rows.items()} for table, rows in every_line.items()}
    assert all(exp_name == name for table in ("graphgpo", "popo") for name, exp_name in names[table].items())
    assert all(exp_name == f"{name}_recent" for name, exp_name in names["vla"].items())
    assert all(names["core"].pop(name) == f"{name}_on-policy" for name in ("ppo", "ppo-categorical"))
    assert all(exp_name == f"{name}_5120" for name, exp_name in names["core"].items())
    assert all(report.method_and_regime(exp_name)["method"] == name for name, exp_name in names["core"].items())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "my_gipo gipo_continuous.py --kernel cauchy",
            "gipo_continuous.py replays 5,120 steps: its line needs the word replay",
        ),
        ("gipo-cauchy gipo_continuous.py replay --kernel cauchy", None),
        ("my_ppo my_ppo.py --gamma 0.98", None),
    ],
)
def test_a_line_of_ones_own(checkout, line, said):
    """It is run, it joins no other suite, and a finished run of it counts, also of a copy of textbook PPO."""
    shutil.copy(checkout / "ppo_baseline.py", checkout / "my_ppo.py")
    before = len(commands("tune", cwd=checkout))
    script = checkout / "benchmark.sh"
    script.write_text(script.read_text().replace("core      sapo ", f"core {line}\ncore      sapo "))
    name = line.split()[0]
    flags = ["quick", "--methods", name, "--tasks", "reach-v3", "--steps", "10240"]
    process = benchmark(*flags, "--dry-run", cwd=checkout)
    if said:
        assert process.returncode == 2 and process.stderr == f"error: {said}\n"
        return
    _, module, *words = shlex.split(process.stdout)
    result = sample() | {"args": arguments(process.stdout.replace("my_ppo.py", "ppo_baseline.py"))[1], "seed": 1}
    result["args"]["eval_episodes"] = 2  # of the copies
    if module == "my_ppo.py":
        result["args"]["recompute_advantages"] = False
    exp_name = words[words.index("--exp-name") + 1]
    result |= {"exp_name": exp_name, "env_id": "reach-v3", "versions": {"algorithm": VERSION}}
    folder = checkout / "runs" / "benchmark-10240" / f"reach-v3__{exp_name}__1"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "args.json").write_text(json.dumps(result["args"] | {"algorithm_version": VERSION}))
    assert benchmark(*flags, "--dry-run", cwd=checkout).stderr == "# 0 of 1 runs are left\n"
    assert len(commands("tune", cwd=checkout)) == before


def test_the_rows_of_the_scripts_themselves(checkout):
    """`gipo` at 5,120 steps and `ppo` are the two scripts without flags, but for where and when they write."""
    flags = ["--methods", "gipo ppo", "--tasks", "reach-v3", "--seeds", "1", "--regimes", "5120"]
    rows = [arguments(command) for command in commands("main", *flags, cwd=checkout)]
    named = {"run_dir": "runs/benchmark-300000", "eval_every": 0, "overlap": False}
    for (script, args), module, name in zip(
        rows, (gipo_continuous, ppo_baseline), ("gipo_5120", "ppo_on-policy"), strict=True
    ):
        assert script == f"{module.__name__}.py" and args.keys() == vars(module.Args()).keys()
        assert changed(args, vars(module.Args())) == named | {"exp_name": name}


def test_the_rows_differ_from_gipo_as_their_names_say(every_line):
    """PPO-clip in its objective, clip and step size only: the replay, its segments and minibatches, head and ratio, entropy
    bonus and the rest are GIPO's. The other rows of gipo_continuous.py in one argument or two."""
    _, _, gipo = every_line["core"]["gipo"]
    own = ppo_baseline.Args.__dataclass_fields__.keys() - gipo.keys()
    assert own == {"clip_coef", "update_epochs"}
    clips = {}
    own = re.compile(r"(gipo(-sigma-0.[15])?|sapo|none|ppo-clip-0.[1235])(-lr-6e-4)?")
    rows = [name for name in every_line["core"] if own.fullmatch(name)]
    assert len(rows) == 16
    for name in rows:  # and not a line of somebody's own
        exp_name, script, args = every_line["core"][name]
        rest, _, rate = name.partition("-lr-")
        expected = ({} if name == "gipo" else {"exp_name": exp_name}) | ({"learning_rate": float(rate)} if rate else {})
        if rest.startswith("ppo-clip-"):
            assert script == "ppo_baseline.py" and args["clip_coef"] == float(rest.removeprefix("ppo-clip-"))
            assert args["update_epochs"] == ppo_baseline.Args.update_epochs
            clips.setdefault(rate, []).append(args["clip_coef"])
        else:
            assert script == "gipo_continuous.py"
            if rest.startswith("gipo-sigma-"):
                expected["sigma"] = float(rest.removeprefix("gipo-sigma-"))
            elif rest != "gipo":
                expected["trust_weight"] = {"sapo": "sapo", "none": "none"}[rest]
        assert changed(args, gipo) == expected, name
        assert args["buffer_size"] == 5120
    assert clips == {"": [0.1, 0.2, 0.3, 0.5], "6e-4": [0.1, 0.2, 0.3, 0.5]}  # the same for both step sizes


@pytest.mark.parametrize(
    ("processors", "memory", "workers"),
    [
        ("max 100000", "max", 6),
        ("250000 100000", "max", 2),
        ("50000 100000", "max", 1),
        ("max 100000", "3500000000", 2),
        ("", "", 6),
    ],
)
def test_a_containers_limits_are_kept(processors, memory, workers, checkout, tmp_path):
    """Inside it nproc and getconf count what the machine has."""
    (tmp_path / "cgroup").mkdir()
    for name, text in (("cpu.max", processors), ("memory.max", memory)):
        if text:
            (tmp_path / "cgroup" / name).write_text(text + "\n")
    (tmp_path / "bin").mkdir()
    programs = {"nproc": "echo 6", "getconf": '[ "$1" = PAGESIZE ] && echo 4096 || echo 4000000'}
    programs["python"] = '[ "$2" != --pending ] || cat >/dev/null'  # no run is left
    for name, words in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{words}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = (checkout / "benchmark.sh").read_text()
    assert script.count("cgroup=/sys/fs/cgroup") == 1
    (checkout / "benchmark.sh").write_text(script.replace("cgroup=/sys/fs/cgroup", f"cgroup={tmp_path}/cgroup"))
    found = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": f"{tmp_path}/bin/python"}
    process = benchmark("quick", cwd=checkout, **found)
    assert f"0 of 8 runs are left, {workers} at a time" in process.stdout and "cgroup" not in process.stderr


def test_dry_run_prints_exact_commands(checkout):
    process = benchmark("main", "--dry-run", cwd=checkout)
    lines = process.stdout.splitlines()
    # Eight tasks, three seeds: PPO on-policy once, five other methods with two replay sizes. None differs from another by its
    # name only.
    assert process.returncode == 0 and len(lines) == 8 * 3 * (1 + 5 * 2) == 264
    assert process.stderr == "# 264 of 264 runs are left\n"
    assert len({re.sub(r"--exp-name \S+", "", line) for line in lines}) == len(lines)
    (clip,) = (line for line in lines if "reach-v3 --seed 5 --exp-name ppo-clip-0.2_20000" in line)
    expected = "ppo_baseline.py --buffer-size 20000 --num-steps 16 --minibatch-size 128 --policy-head categorical"
    expected += " --ratio per-dim --ent-coef 0.001 --clip-coef 0.2 --env-id reach-v3 --seed 5 --exp-name ppo-clip-0.2_20000"
    end = "--total-timesteps 300000 --run-dir runs/benchmark-300000 --eval-every 0 --no-overlap"
    assert clip == f"{shlex.quote(warm.stand_in())} {expected} {end}"
    assert all(line.endswith(f" {end}") for line in lines)
    assert not (checkout / "runs").exists()

    # These are the runs that the README's table has; the tuning's seeds are not among them.
    words = [line.split() for line in lines]
    rows = {}
    for line in words:
        task, seed, name = (line[line.index(flag) + 1] for flag in ("--env-id", "--seed", "--exp-name"))
        rows.setdefault(name, []).append((task, int(seed)))
    names = {f"{method}_{size}" for method in report.METHODS if method != "ppo" for size in (5120, 20000)}
    assert rows.keys() == {"ppo_on-policy", *names}
    wanted = sorted((f"{task}-v3", seed) for task in report.README_TASKS for seed in report.README_SEEDS)
    assert all(sorted(row) == wanted for row in rows.values())
    assert not {*report.README_SEEDS} & {*report.TUNING_SEEDS}


@pytest.mark.parametrize(
    ("suite", "runs", "seeds"),
    [
        ("quick", 2 * 4, {1}),
        ("age", 5 * 3 * (1 + 5 * 2), {4, 5, 6}),
        ("authors", 10 * 3, {4}),
        ("tune", 2 * 2 * (6 + 8), {1, 2}),
        ("setup", 3 * 3 * 7, {4, 5, 6}),
        ("gymnasium", 5 * 3 * 3, {4, 5, 6}),
    ],
)
def test_runs_of_the_other_suites(checkout, suite, runs, seeds):
    """As many as the usage says; only `tune`, and the small `quick`, have the seeds of the tuning's table."""
    lines = [line.split() for line in commands(suite, cwd=checkout)]
    assert len(lines) == runs and len({tuple(line) for line in lines}) == runs
    assert {int(line[line.index("--seed") + 1]) for line in lines} == seeds
    if suite == "authors":  # what report.paper_table wants
        cells = {(line[line.index("--env-id") + 1], line[line.index("--exp-name") + 1]) for line in lines}
        assert cells == {(f"{task}-v3", f"{row}_20000") for task in report.PAPER_TASKS for row in report.README_ROWS}
    if suite == "tune":
        names = {line[line.index("--exp-name") + 1] for line in lines}
        tuned = r"gipo|ppo-clip-0\.[1235]|gipo-sigma-0\.[15]"
        rows = {name for of, name, _ in table_of_methods() if of == "core" and re.fullmatch(f"({tuned})(-lr-6e-4)?", name)}
        assert names == {f"{name}_5120" for name in rows}


def test_methods_without_replay_run_once(checkout):
    """Whatever the regimes, which are the sizes of the others' buffers; seeds come before methods, so rows fill evenly."""
    flags = ["--methods", "ppo gipo none", "--regimes", "20000 512", "--seeds", "4 9", "--tasks", "reach-v3 push-v3"]
    rows = [arguments(line)[1] for line in commands("quick", *flags, cwd=checkout)]
    first = ["ppo_on-policy", "gipo_20000", "none_20000"]
    expected = [(name, seed) for seed in (4, 9) for name in first]
    expected += [(name, seed) for seed in (4, 9) for name in ("gipo_512", "none_512")]
    assert [(a["exp_name"], a["seed"], a["env_id"]) for a in rows] == [
        (*pair, task) for pair in expected for task in ("reach-v3", "push-v3")
    ]
    sizes = [0 if a["exp_name"] == "ppo_on-policy" else int(a["exp_name"].rpartition("_")[2]) for a in rows]
    assert [a["buffer_size"] for a in rows] == sizes


def test_commands_that_a_script_refuses():
    """A line that somebody adds to the table: what is wrong with its flags shows before a run starts."""
    args = report.Args(runs="none", results="none")
    with pytest.raises(report.ReportError, match=r"^gipo_continuous\.py does not take the flags --sigma wide$"):
        report.pending(["python gipo_continuous.py --sigma wide"], args)
    with pytest.raises(report.ReportError, match=r"^ppo_baseline\.py does not take the flags --sigma 0\.2$"):
        report.pending(["python ppo_baseline.py --sigma 0.2"], args)
    with pytest.raises(report.ReportError, match=r"^gipo_continuous\.py: --sigma 0\.0 must be positive"):
        report.pending(["python gipo_continuous.py --sigma 0"], args)
    for script in ("missing.py", "forks/my.py", "./gipo_continuous.py"):
        with pytest.raises(report.ReportError, match=f"^{script}: a line of benchmark.sh names a script beside it"):
            report.pending([f"python {script} --sigma 1"], args)


def test_a_script_whose_name_begins_with_replay(checkout):
    """The word replay of its line is the buffer, not a part of its name."""
    shutil.copy(checkout / "gipo_continuous.py", checkout / "replay_gipo.py")
    script = checkout / "benchmark.sh"
    script.write_text(
        script.read_text().replace("core      sapo ", "core      mine  replay_gipo.py replay\ncore      sapo ", 1)
    )
    (line,) = commands("quick", "--methods", "mine", "--tasks", "reach-v3", cwd=checkout)
    assert " replay_gipo.py --buffer-size 5120 --env-id reach-v3 " in line


def test_seeds_of_unequal_length_share_an_axis():
    """Such as DAPO's, which samples until its batch is full: up to the end of the shortest, each at its own steps."""
    runs = [{"curves": {"steps": [10, 20, 30], "return": [None, 2.0, 3.0]}}]
    runs += [{"curves": {"steps": [20, 40, 60], "return": [2.0, 4.0, 6.0]}}]
    steps, curves = report.on_one_axis(runs, "return")
    assert steps.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(curves, [[np.nan, 2, 3], [2, 2, 3]])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["all"],
            "unknown suite 'all': quick, main, age, authors, tune, setup, gymnasium, graphgpo, popo, lag, smollm2, vla or "
            "throughput",
        ),
        (["sweep"], "unknown suite 'sweep'"),
        (["quick", "--method", "gipo"], "--method"),
        (["quick", "--methods", "dqn"], "'dqn' is no line of the table in benchmark.sh; there are: gipo gipo-sigma-0.1 "),
        (["quick", "--regimes", "-", "--methods", "ppo"], "'-' is no number of steps"),
        (["quick", "--regimes", "old"], "'old' is no number of steps, such as 5120"),
        (["quick", "--regimes", "5120 stale"], "'stale' is no number of steps"),
        (["quick", "--regimes", "0"], "'0' is no number of steps"),
        (["quick", "--regimes", "05120"], "'05120' is no number of steps"),
        (["quick", "--regimes", "5e3"], "'5e3' is no number of steps"),
        (["quick", "--regimes", "-512"], "'-512' is no number of steps"),
        (["quick", "--regimes", "on-policy", "--methods", "ppo"], "'on-policy' is no number of steps"),
        (["quick", "--regimes", ""], "--regimes ''"),
        (["quick", "--regimes", "100"], "--buffer-size 100 must be 0 or at least num_envs * num_steps = 128"),
        (["vla", "--regimes", "5120"], "'5120' is no regime: fresh, recent or stale"),
        (["vla", "--regimes", "very-stale"], "'very-stale' is no regime: fresh, recent or stale"),
        (["quick", "--seeds"], "--seeds"),
        (["quick", "--methods", "gipo-0.5-1"], "'gipo-0.5-1' is no line of the table"),
        (["quick", "--methods", "gipo ppo-clip"], "'ppo-clip' is no line of the table"),
        (["quick", "--methods", "ppo-clip-wide"], "'ppo-clip-wide' is no line of the table"),
        (["quick", "--methods", "ppo-clip-0.2-lr-"], "'ppo-clip-0.2-lr-' is no line of the table"),
        (["quick", "--methods", "ppo-stored"], "'ppo-stored' is no line of the table"),
        (["quick", "--methods", "gipo-short"], "'gipo-short' is no line of the table"),
        (["quick", "--methods", "gip."], "'gip.' is no line of the table"),
        (["quick", "--methods", "core"], "'core' is no line of the table"),
        (["quick", "--methods", "popo"], "'popo' is no line of the table"),
        (["quick", "--workers", "0"], "--workers 0"),
        (["quick", "--steps", "-5"], "--steps -5 must be a positive integer"),
        (["quick", "--steps", "0"], "--steps 0"),
        (["graphgpo", "--steps", "1e3"], "--steps 1e3"),
        (["throughput", "--steps", "many"], "--steps many"),
        (["quick", "--seeds", "1 -1"], "--seeds: '-1' must be an integer, 0 or more"),
        (["popo", "--seeds", "1.5"], "--seeds: '1.5'"),
        (["quick", "--seeds", ""], "--seeds ''"),
        (["quick", "--seeds", "1,2"], "--seeds '1,2' must be names with spaces between them"),
        (["quick", "--tasks"], "--tasks needs a value"),
        (["quick", "--tasks", "--workers", "1"], "--tasks needs a value"),  # not a task of that name
        (["quick", "--tasks", "*"], "--tasks '*'"),
        (["quick", "--tasks", "reach-v3 push"], "--tasks push is unknown; try push-v3"),
        (["popo", "--tasks", "countdown3"], "--tasks countdown3 is unknown; try countdown-3"),
        (["vla", "--tasks", "libero_spatia"], "--tasks libero_spatia is unknown; try libero_spatial"),
        (["quick", "--seeds", "5000000"], "--seed 5000000 must be between 0 and 4,000,000"),
        (["graphgpo", "--methods", "gigop-step"], "'gigop-step' is no line of the table in benchmark.sh; there are: grpo "),
        (["popo", "--methods", "gigpo"], "'gigpo' is no line of the table in benchmark.sh; there are: grpo grpo-filter"),
        (["vla", "--methods", "gipo-0.2-1"], "'gipo-0.2-1' is no line of the table in benchmark.sh; there are: gipo ppo"),
        (["graphgpo", "--tasks", "Sokoban"], "--tasks means nothing for graphgpo"),
        (["popo", "--regimes", "stale"], "--regimes means nothing for popo"),
        (["throughput", "--methods", "gipo"], "--methods means nothing for throughput"),
        (["throughput", "--slurm"], "--slurm means nothing for throughput"),
        (["throughput", "--workers", "2"], "--workers means nothing for throughput"),
    ],
)
def test_bad_options(flags, named):
    process = benchmark(flags[0], "--dry-run", *flags[1:])  # so that a mistake starts no benchmark
    assert process.returncode == 2 and named in process.stderr and process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert bool(process.stdout) == named.startswith("unknown suite")  # there the usage


def test_usage_names_every_suite():
    """From whatever folder it is started."""
    command = ["bash", f"{ROOT.name}/benchmark.sh"]
    process = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    assert process.returncode == 0 and not process.stderr
    listed = re.findall(r"^  ./benchmark.sh (\S+)   ", process.stdout, re.MULTILINE)
    assert listed == "quick main age authors tune setup gymnasium graphgpo popo lag smollm2 vla throughput".split()


def test_python_in_a_folder_with_a_space(tmp_path):
    """The commands printed can be pasted, the runs start, and so do those of the job script, which fails if its run does."""
    project = tmp_path / "my project"
    project.mkdir()
    copy_benchmark(project)
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
    folder = project / "runs" / "benchmark-512" / "reach-v3__gipo_512__1"
    assert process.returncode == 0 and (folder / "result.json").exists(), process.stdout + process.stderr
    shutil.rmtree(folder)
    shutil.rmtree(project / "results")
    process = benchmark("quick", *flags, "--slurm", cwd=project, PYTHON=str(python))
    assert process.returncode == 0 and re.match(r"sbatch runs/benchmark-512/quick-\d+\.sbatch ", process.stdout)
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    (script,) = folder.parent.glob("*.sbatch")
    subprocess.run(["bash", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (folder / "result.json").exists()
    assert (tmp_path / "started").read_text().split().count("gipo_continuous.py") == 3
    (folder / "args.json").unlink()
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"half a file")
    process = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "0 of" not in process.stdout and process.returncode == 1
    assert "exit code 2, see runs/benchmark-512/reach" in process.stdout


def test_runs_skips_resumes_and_reports(finished, finished_checkout):
    process, checkout = finished[0], finished_checkout
    assert process.returncode == 0, process.stdout + process.stderr
    folders = [checkout / "runs" / "benchmark-512" / f"reach-v3__{name}__1" for name in ("gipo_512", "ppo_on-policy")]
    assert all((folder / "result.json").exists() for folder in folders) and "2 of 2 runs" in process.stdout
    steps = f"512-v{VERSION}"
    stored = [read_json(checkout / "results" / "runs" / steps / f"{folder.name}.json") for folder in folders]
    assert all(run["machine"] and len(run["curves"]["steps"]) == 30 for run in stored)
    table = (checkout / "results" / f"benchmark-512-v{VERSION}.md").read_text()
    assert "| 512 | gipo | 1 |" in table and "| on-policy | ppo | 1 |" in table
    assert {path.name for path in (checkout / "results").glob("*.png")} == {
        f"{name}-512-v{VERSION}.png" for name in ("curves", "buffer", "staleness")
    }

    # A stored run with other arguments is replaced by the run folder's.
    path = checkout / "results" / "runs" / steps / f"{folders[0].name}.json"
    other = stored[0] | {"args": stored[0]["args"] | {"gamma": 0.5}}
    path.write_text(json.dumps(other))
    report_py = subprocess.run([sys.executable, "report.py"], cwd=checkout, check=True, capture_output=True, text=True)
    assert read_json(path) == stored[0]
    assert f"replaced: {path.relative_to(checkout)}, whose run had another gamma\n" in report_py.stdout

    # The committed JSON alone makes a run finished; other arguments or another algorithm version do not.
    shutil.rmtree(checkout / "runs")
    assert benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout.strip() == ""
    ppo_path = path.with_name(f"{folders[1].name}.json")
    for run_path, run, bins, counts in [
        (ppo_path, stored[1], 64, True),  # bins are a flag of the categorical head only
        (path, stored[0], 64, False),
        (path, stored[0], None, True),  # runs from before the flag had 256
    ]:
        run_path.write_text(json.dumps(run | {"args": {**run["args"], "num_bins": bins}}))
        if bins is None:
            older = {k: v for k, v in run["args"].items() if k != "num_bins"}
            run_path.write_text(json.dumps(run | {"args": older}))
        assert (benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout.strip() == "") == counts
    run = stored[0] | {"args": stored[0]["args"] | {"overlap": not stored[0]["args"]["overlap"]}}  # equal bit for bit
    path.write_text(json.dumps(run))
    assert benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout.strip() == ""
    stored[0]["versions"]["algorithm"] = 0
    path.write_text(json.dumps(stored[0]))
    left = benchmark("quick", *SMALL, "--dry-run", cwd=checkout).stdout
    assert "gipo_512" in left and "ppo_on-policy" not in left


def test_a_method_with_arguments_of_the_environment(checkout):
    """The quotes of a flag mean the same when it is checked, printed and run; the run's own processor is kept."""
    script = checkout / "benchmark.sh"
    line = """core      moon  gipo_continuous.py replay --hidden-size 8 --env-kwargs '{\\"g\\":1.6}'\n"""
    text = script.read_text()
    script.write_text(text.replace("core      sapo ", line + "core      sapo ", 1))
    flags = ["--tasks", "Pendulum-v1", "--seeds", "4", "--methods", "moon", "--regimes", "512", "--steps", "512"]
    folder = checkout / "runs" / "benchmark-512" / "Pendulum-v1__moon_512__4"
    folder.mkdir(parents=True)
    (folder / "args.tmp").touch()  # of a start on a full disk, which is no run to resume
    process = benchmark("main", *flags, cwd=checkout)
    assert process.returncode == 0, process.stdout + process.stderr
    assert read_json(folder / "result.json")["args"]["env_kwargs"] == '{"g":1.6}'
    assert (folder / "machine").read_text().strip() == report.machine_of(folder) == report.cpu_name()
    (folder / "machine").write_text("a node of the cluster")
    shutil.rmtree(checkout / "results")
    subprocess.run([sys.executable, "report.py"], cwd=checkout, check=True, capture_output=True)
    (stored,) = (checkout / "results" / "runs").rglob("*.json")
    assert read_json(stored)["machine"] == "a node of the cluster"


def test_interrupted_runs_are_resumed_and_failures_listed(finished_checkout):
    """A folder with a checkpoint goes on; one with a broken checkpoint fails, is listed with its log, and the rest runs."""
    checkout = finished_checkout
    run_dir = checkout / "runs" / "benchmark-512"
    shutil.rmtree(checkout / "results")
    folders = {name: run_dir / f"reach-v3__{name}__1" for name in ("gipo_512", "ppo_on-policy")}
    for folder in folders.values():
        (folder / "result.json").unlink()
    (folders["ppo_on-policy"] / "checkpoint.pt").write_bytes(b"half a file")
    process = benchmark("quick", *SMALL, cwd=checkout)
    assert process.returncode == 1
    assert "1 runs failed or were interrupted" in process.stderr
    assert f"FAILED: exit code 2, see runs/benchmark-512/{folders['ppo_on-policy'].name}.log" in process.stderr
    assert "from step 512" in (run_dir / "reach-v3__gipo_512__1.log").read_text()
    assert (folders["gipo_512"] / "result.json").exists()


def test_folder_of_another_run_is_refused(checkout):
    folder = checkout / "runs" / "benchmark-512" / "reach-v3__gipo_512__1"
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
    log = (checkout / "runs" / "benchmark-512" / "reach-v3__gipo_512__1.log").read_text()
    assert log.count("finished in") == 1 and "exists" not in log
    assert any("another invocation has it" in output or "0 of 1 runs" in output for output in outputs), outputs


def test_a_file_system_without_locks_runs_all_the_same(checkout):
    """As the scripts do there: NFS without its lock daemon and Lustre without flock know no lock."""
    (checkout / "lockless").mkdir()
    flock = "def flock(*_):\n    open(f'asked by {sys.argv[0]}', 'w').close()\n    raise OSError(37, 'No locks available')\n"
    (checkout / "lockless" / "sitecustomize.py").write_text(f"import fcntl, sys\n{flock}fcntl.flock = flock\n")
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(checkout / "lockless")}  # a fork would not see this module
    process = benchmark("quick", *SMALL, "--methods", "gipo", cwd=checkout, **environment)
    assert process.returncode == 0, process.stderr + process.stdout
    assert {path.name for path in checkout.glob("asked by *")} == {"asked by -c", "asked by gipo_continuous.py"}
    assert (checkout / "runs" / "benchmark-512" / "reach-v3__gipo_512__1" / "result.json").exists()


def test_a_lock_that_fails_is_a_failure(checkout):
    """Not "another invocation has it": that would skip every run and end with 0."""
    (checkout / "runs" / "benchmark-512" / "reach-v3__gipo_512__1.lock").mkdir(parents=True)
    process = benchmark("quick", *SMALL, "--methods", "gipo", cwd=checkout)
    assert process.returncode == 1 and "reach-v3__gipo_512__1.lock cannot be locked" in process.stderr
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
        "512",
        "--steps",
        "512",
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": checkout, "env": PYTHON}
    process = subprocess.Popen(["./benchmark.sh", "quick", *flags, "--workers", "1"], start_new_session=True, **pipes)
    log = checkout / "runs" / "benchmark-512" / "reach-v3__gipo_512__1.log"
    wait_for(log.exists)
    process.terminate()
    assert process.wait(60) != 0
    wait_for((log.with_suffix("") / "result.json").exists)  # the run that has begun ends
    time.sleep(3)
    assert [path.name for path in log.parent.glob("*.log")] == [log.name]


@pytest.mark.parametrize("everything", [True, False])
def test_a_run_that_was_asked_to_stop_is_called_interrupted(checkout, tmp_path, everything):
    """Not failed: the same command goes on with it. Ctrl-C reaches everything, a scheduler's signal perhaps one run alone."""
    flags = ["--tasks", "reach-v3", "--methods", "gipo", "--regimes", "512", "--steps", "100000", "--workers", "1"]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$1 $$" >>{tmp_path}/started\nexec {shlex.quote(sys.executable)} "$@"')
    python.chmod(0o755)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes |= {"cwd": checkout, "env": PYTHON | {"PYTHON": str(python)}}
    process = subprocess.Popen(["./benchmark.sh", "quick", *flags], start_new_session=True, **pipes)
    folder = checkout / "runs" / "benchmark-100000" / "reach-v3__gipo_512__1"
    log = folder.with_name(folder.name + ".log")
    wait_for(lambda: log.exists() and "from step" in log.read_text())
    if everything:
        os.killpg(process.pid, signal.SIGINT)
    else:
        (run,) = re.findall(r"^gipo_continuous.py (.*)$", (tmp_path / "started").read_text(), re.MULTILINE)
        os.kill(int(run), signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert out.count("reach-v3__gipo_512__1 interrupted") == 1 and "FAILED" not in out + err
    assert process.returncode == (-signal.SIGINT if everything else 1)
    assert ("interrupted: runs/benchmark-100000/reach-v3__gipo_512__1 goes on with the same command" in err) != everything
    assert (folder / "checkpoint.pt").exists()


def test_slurm_array_of_many_runs(checkout):
    """At most 1,000 jobs, which share the runs; the commands are in the script that sbatch copies, not in a file beside it."""
    process = benchmark("main", "--slurm", "--seeds", " ".join(map(str, range(4, 16))), cwd=checkout)
    assert process.returncode == 0 and "1056 runs" in process.stdout  # 88 of each seed
    limited = benchmark("main", "--slurm", "--workers", "20", cwd=checkout)
    names = [process.stdout.split()[1] for process in (process, limited)]  # of "sbatch NAME ..."
    assert len({*names}) == 2  # neither overwrites the other
    assert limited.returncode == 0 and "#SBATCH --array=1-264%20\n" in (checkout / names[1]).read_text()
    script = (checkout / names[0]).read_text()
    assert "#SBATCH --array=1-1000\n" in script and script.count("--exp-name") > 1056
    lines = re.search(r"cat <<'COMMANDS'\n(.*?)\nCOMMANDS", script, re.DOTALL)[1].splitlines()
    shares = [lines[job::1000] for job in range(1000)]
    assert len(lines) == len({*lines}) == 1056 and {len(share) for share in shares} == {1, 2}
    fake = script.split("cd ")[0] + "\n" + script[script.index("commands=") :].replace('run "$(sed', 'echo "$left" "$(sed')
    (checkout / "fake.sh").write_text(fake)
    for job, count in ((1, 2), (56, 2), (57, 1), (1000, 1)):
        environment = {**PYTHON, "SLURM_ARRAY_TASK_ID": str(job)}
        output = subprocess.run(["bash", checkout / "fake.sh"], env=environment, capture_output=True, text=True)
        assert output.stdout.splitlines() == [f"{count} {line}" for line in shares[job - 1]]


# -------------------- What is committed --------------------
def test_committed_report_is_current():
    """The tables and the README's block are those of the stored runs, and the names of these are of today."""
    # 2 s; with a bootstrap in a Python loop 81 s
    process = subprocess.run([sys.executable, "report.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert process.returncode == 0 and process.stdout == "report is current\n", process.stdout + process.stderr


def test_committed_plots_exist_for_every_table():
    """Those of a table's name, and those that it or the README shows. Version 1 has two tables."""
    tables = [*(ROOT / "results").glob("benchmark-*.md"), *(ROOT / "results" / "v1").glob("benchmark-*.md")]
    assert len(tables) >= 2
    for table in tables:
        assert table.with_name(f"curves-{table.stem.removeprefix('benchmark-')}.png").stat().st_size > 10_000
    for file in [*tables, ROOT / "README.md"]:
        shown = [path for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", file.read_text()) if "://" not in path]
        assert all((file.parent / path).stat().st_size > 10_000 for path in shown), file


@pytest.mark.parametrize("suite", ["graphgpo", "popo"])
def test_committed_runs_of_the_other_methods_count_as_finished(suite):
    """Flags that came to their scripts since, for language models or with the old behaviour as default, change nothing."""
    process = benchmark(suite, "--dry-run")
    assert process.returncode == 0 and process.stdout.strip() == "" and "# 0 of" in process.stderr


FIRST_FOUR = ("button-press-topdown", "door-open", "drawer-open", "push")
FIVE_TASKS = (*FIRST_FOUR, "window-open")


def areas_of(name, size, tasks=FIVE_TASKS, seeds=(4, 5, 6), score="area"):
    """Scores of a row's runs that there are: an array of seeds for every task."""
    folder, score = ROOT / "results" / "runs" / "300000-v2", report.SCORES.get(score, score)
    files = [[folder / f"{task}-v3__{name}_{size}__{seed}.json" for seed in seeds] for task in tasks]
    return [np.array([score(read_json(file)) for file in row if file.exists()]) for row in files]


def span_of(gaps):
    """A gap's mean and interval as the pages write it; of an array or list of tasks."""
    return report.span(*report.gap_and_interval([*gaps]))


def test_the_benchmark_page_says_what_version_2_says():
    """The sentences of docs/benchmark.md with numbers of version 2; its table is report.py's."""
    page, readme = ((ROOT / name).read_text() for name in ("docs/benchmark.md", "README.md"))
    text = page.split("## Results")[1].split("\n## ")[0]
    assert f"Five tasks: {', '.join(FIRST_FOUR)} and window-open, seeds 4 to 6" in text

    def mean_of(*args, **kwargs):
        return report.mean_of_tasks(areas_of(*args, **kwargs))

    def percent(*args, **kwargs):
        return f"{100 * mean_of(*args, score='success', **kwargs):.0f}"

    def gaps(ours, theirs, **kwargs):
        return [a - b for a, b in zip(areas_of(*ours, **kwargs), areas_of(*theirs, **kwargs), strict=True)]

    # GIPO and the clips, by size of the replay.
    lead = gaps(("gipo", 20_000), ("ppo-clip-0.2", 20_000), seeds=range(4, 9))
    means = {task: f"{gap.mean():.2f}" for task, gap in zip(FIVE_TASKS, lead, strict=True)}
    words = (
        "is ahead of a clip of 0.2 by {door-open} on door-open and by {button-press-topdown} on button-press-topdown, in all "
    )
    words += "ten pairs. On push and drawer-open the gap is {push} and {drawer-open}, and it is ahead in four of ten. On "
    words += "window-open it is {window-open}, in all three."
    assert words.format(**means) in text and [len(gap) for gap in lead] == [5, 5, 5, 5, 3]
    ahead = [(gap > 0).sum() for gap in lead]
    assert ahead[:2] == [5, 5] and ahead[2] + ahead[3] == 4 and ahead[4] == 3
    ends = percent("gipo", 20_000), percent("ppo-clip-0.2", 20_000)
    assert "GIPO has reached {} % of the goals, the clip {} % (seeds 4 to 6).".format(*ends) in text
    three, more = (np.mean([gap[:count].mean() for gap in lead]) for count in (3, 5))
    assert f"made GIPO's lead over a clip of 0.2 smaller: from {three:.2f} to {more:.2f}." in text
    sizes = (5_120, 20_000, 100_000)
    narrow, wide = ([gaps(("gipo", size), (clip, size)) for size in sizes] for clip in ("ppo-clip-0.2", "ppo-clip-0.5"))
    growth = [span_of([b - a for a, b in zip(*pair, strict=True)]) for pair in itertools.pairwise(narrow)]
    assert f"over a clip of 0.2 grows from 20,000 to 100,000 steps**, by {growth[1]} (five tasks, seeds 4 to 6)." in text
    assert f"From 5,120 to 20,000 a growth is not shown: {growth[0]}." in text
    assert [report.gap_and_interval(gap)[1][0] > 0 for gap in (*wide, *narrow)] == [False, False, True, True, True, True]
    by_size = [np.mean([gap.mean() for gap in gaps]) for gaps in (*narrow, wide[2])]
    words = (
        f"largest with 100,000 steps**: {by_size[2]:.2f} in area. It is {more:.2f} with 20,000 (with more seeds than in the "
    )
    words += (
        f"table) and {by_size[0]:.2f} with 5,120. Over a clip of 0.5 it leads with 100,000 steps only: by {by_size[3]:.2f}, "
    )
    words += "mostly on button-press-topdown."
    assert words in readme and wide[2][0].sum() > sum(gap.sum() for gap in wide[2]) / 2
    assert [(gap > 0).all() for gap in narrow[2]] == [True, True, False, True, True]
    words = "on five Meta-World tasks, GIPO learns faster than the clip of 0.2 on four."
    assert f"{words} It also leads the clip of 0.5, mostly on one; at the end they are level." in readme
    # Fresh data and textbook PPO, on the first four tasks.
    four = {"tasks": FIRST_FOUR}
    ppo, fresh = ("ppo", "on-policy"), ("ppo-clip-0.2", 512)
    assert f"On the first four tasks textbook PPO reaches {percent(*ppo, **four)} % of the goals." in text
    assert f"on fresh data (512 steps of replay) reaches {percent(*fresh, **four)} %." in text
    words = f"textbook PPO's area is {mean_of(*ppo, **four):.2f} (stable-baselines3's own settings: "
    assert words in readme
    words = "In the shared setup, on almost fresh data (512 steps of replay), PPO's clip of 0.2 has "
    assert f"{words}{mean_of(*fresh, **four):.2f} there." in readme
    gained = [span_of(gaps((name, 5_120), (name, 512))) for name in ("ppo-clip-0.2", "gipo")]
    words = "Over fresh data 5,120 steps add {} to the area of a clip of 0.2, and {} to GIPO's."
    assert words.format(*gained) in text
    goals = np.concatenate(gaps(("gipo", 512), fresh, score="success"))
    words = f"has reached {percent('gipo', 512)} % of the goals and the clip of 0.2 {percent(*fresh)} %. GIPO has "
    assert f"{words}reached fewer in {(goals < 0).sum()} of {len(goals)} pairs, and more in {(goals > 0).sum()}." in text
    tables = (ROOT / "results" / "benchmark-300000-v2.md").read_text()
    number = int(re.search(r"^Over the (\d) tasks that every row has", tables, re.MULTILINE)[1])  # under the figure's table
    assert f"The figure has the {['four', 'five', 'six'][number - 4]} tasks that every row has:" in text
    # Push, with every seed.
    ends = []
    for names in (("gipo",), ("ppo-clip-0.2", "ppo-clip-0.5")):
        cells = [(name, size) for name in names for size in (5_120, 20_000)]
        found = np.concatenate([areas_of(*cell, ("push",), range(4, 9), "success")[0] for cell in cells])
        ends.append(f"{100 * found.min():.0f} to {100 * found.max():.0f} %")
    assert "GIPO's runs end at {} of the goals, those of both clips at {}.".format(*ends) in text
    # The paper's scale: a task's worst of these three rows, by its mean, has 0, its best 1.
    names = ("gipo", "ppo-clip-0.5", "ppo-clip-0.2")
    last = {"tasks": FIRST_FOUR, "seeds": range(4, 9), "score": lambda run: run["train_return_mean"]}
    returns = [areas_of(name, 20_000, **last) for name in names]
    means = np.array([[x.mean() for x in row] for row in returns])
    low, high = means.min(0), means.max(0)
    scaled = [[(x - a) / (b - a) for x, a, b in zip(row, low, high, strict=True)] for row in returns]
    both = report.mean_of_tasks, report.interquartile_mean
    plain, middle = ([f"{round(statistic(row), 2) + 0.0:.2f}" for row in scaled] for statistic in both)
    paper = (ROOT / "docs" / "paper.md").read_text()
    assert f"as in the paper | {' | '.join(middle)} |\n| mean | {' | '.join(plain)} |" in paper
    assert f"differ by {100 * (means[0].mean() / means[2].mean() - 1):.0f} % only" in paper
    # SAPO, and no weight.
    words = f"Its area is {mean_of('sapo', 20_000):.2f}, and its runs end at {percent('sapo', 20_000)} % of the goals."
    assert words in text
    sapo = [gaps(("gipo", size), ("sapo", size)) for size in sizes]
    lows = [report.gap_and_interval(gap)[1][0] for gap in sapo]
    assert max(lows) < 0 and "No difference in area is shown with any size." in text
    on_push = percent("sapo", 5_120, tasks=("push",)), percent("gipo", 5_120, tasks=("push",))
    assert "on push its runs end at {} % of the goals and GIPO's at {} %.".format(*on_push) in text
    assert [(end == 0).sum() for end in areas_of("sapo", 20_000, score="success")] == [0, 0, 1, 3, 0]
    assert "it reaches no goal of push in three seeds, and none of drawer-open in one." in text
    pairs = {9: "nine"}[sum((gap < 0).sum() for gap in sapo[2])]
    assert f"With 100,000 steps it is ahead of GIPO in {pairs} of fifteen pairs." in text
    words = "SAPO's weight is less reliable than GIPO's: with 100,000 steps two of its fifteen runs never succeed."
    assert words in readme and sum((end == 0).sum() for end in areas_of("sapo", 100_000, score="success")) == 2
    assert all((gap > 0).all() for size in sizes for gap in gaps(("gipo", size), ("none", size)))  # "larger in every pair"
    without = mean_of("none", 5_120), mean_of("none", 100_000)
    assert "Without either the area is {:.2f} with 5,120 steps, and {:.2f} with 100,000.".format(*without) in readme
    assert "Without either the area is smaller than GIPO's in every pair." in text
    six = {"tasks": (*FIVE_TASKS, "window-close")}
    assert all((gap > 0).all() for gap in gaps(("gipo", 5_120), ("none", 5_120), **six))
    failed = (ROOT / "docs" / "what_failed.md").read_text()
    assert f"[{mean_of('none', 20_000):.2f} instead of {mean_of('gipo', 20_000):.2f}](benchmark.md#results)" in failed
    ends = percent("none", 5_120), percent("none", 100_000)
    assert "{} % of the goals with 5,120 steps, and {} % with 100,000 (five tasks).".format(*ends) in text


def test_the_page_on_tuning():
    """docs/fair_to_ppo.md: `tune`, both tasks and seeds, seven settings with two step sizes."""
    folder, page = ROOT / "results" / "runs" / "300000-v2", (ROOT / "docs" / "fair_to_ppo.md").read_text()
    places = [(f"{task}-v3", seed) for task in ("button-press-topdown", "door-open") for seed in (1, 2)]

    def areas(row):
        return np.array(
            [report.SCORES["area"](read_json(folder / f"{task}__{row}_5120__{seed}.json")) for task, seed in places]
        )

    names = {f"GIPO, sigma {sigma}": f"gipo-sigma-{sigma}" for sigma in (0.1, 0.5)}
    names["GIPO, sigma 0.2, the default"] = "gipo"
    names |= {f"clip of {clip}": f"ppo-clip-{clip}" for clip in (0.1, 0.2, 0.3, 0.5)}
    table = {words: [areas(name), areas(f"{name}-lr-6e-4")] for words, name in names.items()}
    for words, pair in table.items():
        assert f"| {words} | {pair[0].mean():.2f} | {pair[1].mean():.2f} |\n" in page
    ours = [pair for words, pair in table.items() if words.startswith("GIPO")]
    assert all(np.ptp([pair[i].mean() for pair in ours]) < 0.03 for i in (0, 1))  # "within 0.03 of each other"
    best = max((one for pair in ours for one in pair), key=np.mean)
    assert (table["clip of 0.5"][1] > best).all()  # "in all four pairs"
    gains = {words: pair[1].mean() - pair[0].mean() for words, pair in table.items()}
    assert max(gains, key=gains.get) == "clip of 0.5"  # "a wide clip gains most"

    chosen = ("gipo-sigma-0.5-lr-6e-4", "ppo-clip-0.5-lr-6e-4")  # on other seeds
    assert areas(chosen[0]).mean() == best.mean()
    tasks = [f"{task}-v3" for task in ("button-press-topdown", "door-open", "drawer-open", "push")]

    def by_task(name):
        rows = [[read_json(folder / f"{task}__{name}_5120__{seed}.json") for seed in (4, 5, 6)] for task in tasks]
        return np.array([[report.SCORES["area"](run) for run in row] for row in rows])

    ours, clip, default = by_task(chosen[0]), by_task(chosen[1]), by_task("gipo")
    words = (
        f"The clip of 0.5 has an area of {clip.mean():.2f} there, and GIPO with sigma 0.5 has {ours.mean():.2f}. GIPO's is "
    )
    assert (
        f"{words}smaller in {(ours < clip).sum()} of {ours.size} pairs. Before rounding the gap is {span_of(ours - clip)}."
        in page
        and ours.mean() < default.mean()
    )
    gap, gain = (span_of(clip - other) for other in (default, by_task("ppo-clip-0.5")))
    assert (
        f"The tuned clip gains {gain} over its own default learning rate. The tuned clip's gap to GIPO's defaults is {gap}."
        in page
    )
    larger = by_task("gipo-lr-6e-4")
    readme = (ROOT / "README.md").read_text()
    assert "did not hold on four tasks with other seeds: neither GIPO nor a clip of 0.5 gained." in readme
    assert larger.mean() < default.mean() and gain.startswith("0.00 [-")
    gap = span_of(larger - default)
    words = (
        f"The area is {larger.mean():.2f} with it and {default.mean():.2f} without. The gap is {gap}, and the area is larger "
    )
    assert f"{words}in {(larger > default).sum()} of {larger.size} pairs." in page


def test_the_page_on_the_setups_parts():
    """docs/fair_to_ppo.md: areas of `setup` on door-open and drawer-open, and the gap to GIPO's."""
    page, readme = ((ROOT / name).read_text() for name in ("docs/fair_to_ppo.md", "README.md"))
    section, tasks = page.split("## What the parts of the setup are worth")[1].split("\n## ")[0], ("door-open", "drawer-open")
    whole = np.array(areas_of("gipo", 5_120, tasks))
    assert "| `gipo` | {:.2f} | {:.2f} | |\n".format(*whole.mean(1)) in section
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| ") and "[" in line]
    rows = [(f"gipo-{part}", 5_120) for part in ("gaussian", "no-recompute", "joint", "ent-coef-0")]
    rows += [("gipo", 512), ("ppo-categorical", "on-policy"), ("ppo", "on-policy")]
    areas = [np.array(areas_of(*row, tasks)) for row in rows]
    for line, found in zip(lines, areas, strict=True):
        assert found.shape == (2, 3)
        assert line[1:] == [f"{found[0].mean():.2f}", f"{found[1].mean():.2f}", f"{span_of(found - whole)} |"]
    gaussian, stored, joint, no_bonus, _, bins, textbook = areas
    assert max(abs(part.mean() - whole.mean()) for part in (joint, no_bonus)) < 0.02  # "change little"
    assert max(gaussian.mean(), stored.mean()) - textbook.mean() < 0.05  # "no gain over textbook PPO is shown"
    assert bins.mean() - textbook.mean() > (whole.mean() - textbook.mean()) / 2  # "more than half of the way"
    gaussian, stored, joint, no_bonus, _, ends, _ = (np.concatenate(areas_of(*row, tasks, score="success")) for row in rows)
    assert (gaussian == 1).sum() == 2 and (gaussian[:3] == 1).sum() == 1 and (stored >= 0.98).sum() == 3
    words = f"from a mean area of {textbook.mean():.2f} to {bins.mean():.2f}. The gap is {span_of(bins - textbook)}."
    assert words in section and "All six runs" in section and (ends >= 1).all()
    assert "Without either, all six runs end with all goals." in section and (np.stack([joint, no_bonus]) >= 1).all()
    words = (
        f"On these two tasks textbook PPO has an area of {bins.mean():.2f} with the bins and {textbook.mean():.2f} without."
    )
    assert words in readme
    assert "`gaussian` makes more steps per second, but learned door-open with one seed of three" in readme


def test_the_page_on_very_old_data():
    """docs/old_data.md: areas with 100,000 steps of replay by seed, their means, those with 20,000; goals at the end; gaps."""
    page = (ROOT / "docs" / "old_data.md").read_text()
    names, size = ["gipo", "ppo-clip-0.8", "ppo-clip-0.5", "ppo-clip-0.2", "sapo", "none"], 100_000
    areas = {name: np.array(areas_of(name, size)) for name in names if name != "ppo-clip-0.8"}
    before = {name: np.array(areas_of(name, 20_000)) for name in areas}
    shown = areas | {"ppo-clip-0.8": areas_of("ppo-clip-0.8", size)}
    for i, task in enumerate(FIVE_TASKS):
        cells = [", ".join(f"{value:.2f}" for value in shown[name][i]) for name in names]
        assert f"| {task} | {' | '.join(cells)} |\n" in page
    ends = {name: np.array(areas_of(name, size, score="success")) for name in areas}
    for scores, form, words in (
        (areas, "{:.2f}", "mean"),
        (before, "{:.2f}", "mean with 20,000 steps"),
        (ends, "{:.0%}", "goals reached at the end"),
    ):
        means = [form.format(scores[name].mean()).replace("%", " %") if name in scores else "" for name in names]
        assert f"| {words} | {' | '.join(means)} |\n" in page
    gaps = {name: areas["gipo"] - areas[name] for name in areas if name != "gipo"}
    assert {name: (gap > 0).sum() for name, gap in gaps.items()} == {
        "ppo-clip-0.5": 11,
        "ppo-clip-0.2": 14,
        "sapo": 6,
        "none": 15,
    }
    wide, narrow, sapo = (span_of(gaps[name]) for name in ("ppo-clip-0.5", "ppo-clip-0.2", "sapo"))
    assert f"**GIPO leads the clip of 0.2** by {narrow}, in 14 of 15 pairs" in page
    assert f"**It leads the clip of 0.5** by {wide}, in 11 of 15 pairs. More than half" in page
    assert gaps["ppo-clip-0.5"][0].sum() > gaps["ppo-clip-0.5"].sum() / 2
    assert f"Over the other four tasks no lead is shown: {span_of(gaps['ppo-clip-0.5'][1:])}." in page
    growth = [gaps[name] - before["gipo"] + before[name] for name in ("ppo-clip-0.2", "ppo-clip-0.5")]
    assert [report.gap_and_interval([*more])[1][0] > 0 for more in growth] == [True, False]
    words = "the lead over the clip of 0.2 grows** by {}. Over the clip of 0.5 a growth is not shown: {}."
    assert words.format(*map(span_of, growth)) in page
    assert f"**GIPO and SAPO are not told apart**: the gap is {sapo}. SAPO is ahead in 9 of 15 pairs, but two" in page
    assert (ends["sapo"] == 0).sum() == 2  # "of its runs reach no goal"
    push = areas["sapo"][3], before["sapo"][3]
    assert f"with every seed: {push[0].mean():.2f} against {push[1].mean():.2f}." in page and (push[0] > push[1]).all()
    assert all((before[name] > areas[name]).all() for name in ("gipo", "ppo-clip-0.5", "ppo-clip-0.2"))  # "in every pair"
    losses = (f"{(before[name] - areas[name]).mean():.2f}" for name in ("gipo", "ppo-clip-0.5"))
    assert "By the larger replay GIPO loses {} in area, the clip of 0.5 loses {} (before rounding).".format(*losses) in page
    # The clip of 0.8, on four tasks.
    widest = np.array(areas_of("ppo-clip-0.8", size, FIRST_FOUR))
    gap = areas["gipo"][:4] - widest
    assert (
        f"0.8 and 0.5 are not told apart** (without window-open): the gap is {span_of(widest - areas['ppo-clip-0.5'][:4])}."
        in page
    )
    words = "GIPO's area is larger in ten of twelve pairs, but the gap's interval includes zero: "
    assert f"{words}{span_of(gap)}." in page and (gap > 0).sum() == 10
    last_fifth = {"score": lambda run: np.mean(run["curves"]["logratio_std"][-6:])}
    spreads = (f"{np.mean(areas_of(name, size, FIRST_FOUR, **last_fifth)):.2f}" for name in ("ppo-clip-0.8", "gipo"))
    assert "the log ratio spreads nearly as far as GIPO's at the end: {} and {}.".format(*spreads) in page


def test_the_paper_page_says_what_its_tasks_gave():
    """The sentences below report.py's table of the paper's ten tasks, and README's."""
    page, readme = ((ROOT / name).read_text() for name in ("docs/paper.md", "README.md"))
    table = page.split("<!-- /benchmark -->")[0].splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")]
    rows = {name: row for name, *row in lines}
    gipo, narrow, wide = rows["the paper's score"][-3:]
    assert f"three times a clip of 0.2**: {gipo} against {narrow}." in page and 2.5 < float(gipo) / float(narrow) < 3.5
    assert f"its score is {wide}, and its mean return the same." in page
    returns = [float(text.replace(",", "")) for text in rows["mean"][3:6]]
    gap = f"{100 * (returns[0] / returns[1] - 1):.0f} %"
    assert f"Behind it is a gap of {gap} in the mean return." in page and abs(returns[2] / returns[0] - 1) < 0.005
    unsolved = [task for task in report.PAPER_TASKS if max(map(float, rows[task][:3])) < 0.05]
    words = f"Four of the ten tasks are hardly learned by any row**: {', '.join(unsolved[:-1])} and {unsolved[-1]}."
    assert words in page
    success = [*map(float, rows["mean"][:3])]
    assert success[0] == min(success) and "**In final success GIPO is last**" in page
    folder, areas = ROOT / "results" / "runs" / "300000-v2", {}
    for name in ("gipo", "ppo-clip-0.5", "ppo-clip-0.2"):
        found = [read_json(folder / f"{task}-v3__{name}_20000__4.json") for task in report.PAPER_TASKS]
        areas[name] = np.mean([report.area_under_curve(run, "success") for run in found])
    high, also, low = areas.values()
    assert high > also > low and f"{high:.2f}" == f"{also:.2f}"
    assert f"GIPO and the clip of 0.5 have {high:.2f}, and the clip of 0.2 has {low:.2f}." in page
    wall = read_json(folder / "button-press-topdown-wall-v3__gipo_20000__4.json")
    share, in_training = (f"{100 * wall[key]:.0f} %" for key in ("eval_success_rate", "train_success_rate"))
    assert f"GIPO's final policy reaches {share} of the goals, in training {in_training}." in page
    words = f"GIPO scores {gipo} and a clip of 0.2 scores {narrow}. Their mean returns are {gap} apart. A clip of 0.5 "
    assert f"{words}scores {wide}." in readme


def test_the_page_beyond_meta_world_says_what_mujoco_gave():
    """HalfCheetah and Hopper: the return at the end, and its mean over all of training; how many pairs either wins."""
    page = (ROOT / "docs" / "beyond_meta_world.md").read_text()
    ahead, of_clip = {}, {}
    for task in ("HalfCheetah-v5", "Hopper-v5"):
        cells, found = [], {}
        for name, seeds in {"gipo_5120": (4, 5, 6), "ppo_on-policy": (4, 5, 6), "ppo-clip-0.2_5120": (4, 5, 6)}.items():
            runs = [read_json(ROOT / "results" / "runs" / "1000000-v2" / f"{task}__{name}__{seed}.json") for seed in seeds]
            scores = np.array([(run["eval_return_mean"], report.mean_from_start(run, "return")) for run in runs])
            cells.append("{:,.0f} ({:,.0f})".format(*scores.mean(0)))
            found[name] = scores
        assert f" | {' | '.join(cells)} |\n" in page[page.index(f"| {task}") :]
        ahead[task] = tuple((found["gipo_5120"] > found["ppo_on-policy"]).sum(0))
        of_clip[task] = tuple((found["gipo_5120"] > found["ppo-clip-0.2_5120"]).sum(0))
        if task == "HalfCheetah-v5":
            low, high = (f"{end(found['ppo_on-policy'][:, 0]):,.0f}" for end in (np.min, np.max))
            assert f"Textbook PPO's own seeds end between {low} and {high} on HalfCheetah." in page
    assert ahead == {"HalfCheetah-v5": (2, 1), "Hopper-v5": (1, 0)}  # of three, at the end and on the way
    assert of_clip == {"HalfCheetah-v5": (2, 3), "Hopper-v5": (1, 1)}
    assert "on Hopper with all three seeds, on HalfCheetah with two" in page
    assert "GIPO is ahead of textbook PPO on HalfCheetah with two of three, on Hopper with one." in page
    assert (
        "GIPO learns faster on HalfCheetah with all three seeds, and is ahead at the end with two. On Hopper the clip" in page
    )


def test_the_page_beyond_meta_world_says_what_new_goals_gave():
    """Reacher and Pusher: every cell, and the claims of pairs."""
    page, found = (ROOT / "docs" / "beyond_meta_world.md").read_text(), {}
    for path in (ROOT / "results" / "random_goals").glob("*.json"):
        run = read_json(path)
        assert run["args"]["reward_scale"] == 0.1 and run["eval_episodes"] == 20 and run["args"]["eval_every"] == 0
        scores = run["eval_return_mean"], report.mean_from_start(run, "return")
        found.setdefault((run["exp_name"], run["env_id"]), {})[run["seed"]] = np.array(scores)
    assert len(found) == 10 and all(sorted(runs) == [4, 5, 6] for runs in found.values())
    rows = {
        "ppo": "`ppo_baseline.py` (textbook)",
        "gipo": "`gipo_continuous.py`",
        "ppo-clip-0.5": "the row `ppo-clip-0.5`",
        "gipo-stored": "`gipo_continuous.py --no-recompute-advantages`",
        "gipo-gaussian-stored": "the same with `--policy-head gaussian`",
    }
    for name, row in rows.items():
        means = [np.mean([*found[name, task].values()], axis=0) for task in ("Reacher-v5", "Pusher-v5")]
        assert f"| {row} | {' | '.join(f'{end:.1f} ({whole:.1f})' for end, whole in means)} |\n" in page
        flags = found[name, "Reacher-v5"], found["ppo", "Reacher-v5"]
        assert name == "ppo" or all((flags[1][seed] > flags[0][seed]).all() for seed in (4, 5, 6)), name
    clip, gipo = found["ppo-clip-0.5", "Pusher-v5"], found["gipo", "Pusher-v5"]
    assert all(clip[seed][1] > gipo[seed][1] for seed in (4, 5, 6))


def test_the_page_beyond_meta_world_says_what_unlearned():
    """On the easy task of results/notes: the defaults get worse, the two flags solve it with two seeds of three."""
    page = (ROOT / "docs" / "beyond_meta_world.md").read_text()
    runs = read_json(ROOT / "results" / "notes" / "new_goals_screening.json")["runs"]
    two = {"policy_head": "gaussian", "recompute_advantages": False}

    def scores(task, script, flags):
        found = [r for r in runs if (r["env_id"], r["script"]) == (task, f"{script}.py")]
        return [r for r in found if {k: v for k, v in r["flags"].items() if k != "reward_scale"} == flags]

    defaults, flags = (scores("MyEnv-v0", "gipo_continuous", f) for f in ({}, two))
    textbook = scores("MyEnv-v0", "ppo_baseline", {"recompute_advantages": False})
    assert all(sorted(r["seed"] for r in rows) == [1, 2, 3] for rows in (defaults, flags, textbook))
    assert all(run["last_fifth"] < run["first_tenth"] for run in defaults)
    assert all(run["last_fifth"] > run["first_tenth"] + 10 for run in flags)
    assert sum(run["eval_return"] > -10 for run in flags) == 2 and all(run["eval_return"] > -10 for run in textbook)
    ends = [next(r["eval_return"] for r in scores("Hopper-v5", "gipo_continuous", f) if r["seed"] == 1) for f in (two, {})]
    assert "they had {:,.0f}, the defaults {:,.0f} (one seed".format(*ends) in page
