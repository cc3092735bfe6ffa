"""The POPO part of report.py and benchmark.sh: a hand-computed table, the run matrix, and the committed results."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT

import popo_countdown as popo
import report


def run(method, seed, curve, iterations=2):
    """Two iterations of 10 x 10 rollouts; `curve` is a list of (rollouts, updates, pass rate)."""
    keys = "rollouts", "updates", "success_rate"
    args = {"num_prompts": 10, "group_size": 10, "total_timesteps": 200, "learning_rate": 1e-4}
    return {
        "env_id": "countdown-3",
        "exp_name": method,
        "seed": seed,
        "iterations": iterations,
        "total_timesteps": curve[-1][0],
        "eval_success_rate": curve[-1][2],
        "versions": {"algorithm": 1},
        "machine": "abacus",
        "args": args,
        "curve": [dict(zip(keys, point, strict=True)) for point in curve],
    }


METHODS = {
    "grpo": [run("grpo", seed, [(0, 0, 0.1), (200, 8, 0.1)]) for seed in (1, 2)],
    "dapo": [run("dapo", seed, [(0, 0, 0.1), (400, 4, 0.2), (1000, 8, 0.3)]) for seed in (1, 2)],
    "popo": [run("popo", 1, [(0, 0, 0.1), (200, 8, 0.5)]), run("popo", 2, [(0, 0, 0.1), (200, 8, 0.3)])],
}


def test_table_by_hand():
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in report.popo_table(METHODS).splitlines()
    }
    grpo, dapo, popo_row = rows["grpo"], rows["dapo"], rows["popo"]
    assert grpo[1:7] == ["2", "200", *["10.0 [10.0, 10.0]"] * 4]
    assert grpo[7:] == ["-", "not reached: 33% of its accuracy"]
    # At 200 of its 1,000 rollouts DAPO is half way from 0.1 to 0.2; its area there is the mean of 0.1 and 0.15.
    assert dapo[1:] == [
        "2",
        "1,000",
        *["30.0 [30.0, 30.0]"] * 2,
        "15.0 [15.0, 15.0]",
        "12.5 [12.5, 12.5]",
        "1.00 [1.00, 1.00]",
        "-",
    ]
    # POPO's mean curve rises from 0.1 to 0.4 over 200 rollouts and crosses 0.3 at two thirds: 133 of DAPO's 1,000.
    assert popo_row[1:5] == ["2", "200", "40.0 [30.0, 50.0]", "40.0 [30.0, 50.0]"]
    assert popo_row[6:] == ["25.0 [20.0, 30.0]", "1.00 [1.00, 1.00]", "13%"]


def test_table_of_old_answers_by_hand():
    """Area and end of GRPO by objective and lag; without a lag it is the method's own run. Not among the methods' rows."""
    runs = []
    for objective, lag, ends in (("decoupled", 0, (0.3, 0.5)), ("decoupled", 4, (0.2,)), ("gipo", 4, (0.1, 0.3))):
        for seed, end in enumerate(ends, 1):
            name = f"grpo-{objective}-lag-{lag}" if lag else "grpo"
            runs.append(run(name, seed, [(0, 0, 0.1), (200, 8, end)]))
            runs[-1]["args"] |= {"method": "grpo", "objective": objective, "lag": lag}
    assert report.lag_table(runs).splitlines() == [
        "| objective | seeds | area, lag 0 | area, lag 4 | end, lag 0 | end, lag 4 |",
        "|---|---|---|---|---|---|",
        "| decoupled | 2/1 | 25.0 [20.0, 30.0] | 15.0 | 40.0 [30.0, 50.0] | 20.0 |",
        "| gipo | -/2 | - | 15.0 [10.0, 20.0] | - | 20.0 [10.0, 30.0] |",
    ]
    assert [report.is_about_age(result) for result in runs] == [False, False, True, True, True]
    for rate in ("fast", "lr-3e-4"):  # all of a table have one step size: no part of a row's name
        faster = [result | {"exp_name": f"{result['exp_name']}-{rate}"} for result in runs]
        assert report.lag_table(faster) == report.lag_table(runs)
    for result in runs[-2:]:  # another sigma is another row
        other = result | {"exp_name": "grpo-gipo-sigma-2-lag-4", "args": result["args"] | {"sigma": 2.0}}
        runs.append(other | {"eval_success_rate": 0.7})
    assert report.lag_table(runs).splitlines()[-1] == (
        "| gipo-sigma-2 | -/2 | - | 15.0 [10.0, 20.0] | - | 70.0 [70.0, 70.0] |"
    )


def test_a_language_models_runs_have_a_folder_and_a_table_of_their_own(tmp_path):
    """Of equal task, method, seed and length, on the model and on the small network: neither is stored over the other."""
    for suite, model in (("popo-200", None), ("popo-smollm2-200", "models/smollm2")):
        result = run("popo", 1, [(0, 0, 0.1), (200, 8, 0.5)])
        result["args"]["model"] = model
        folder = tmp_path / "runs" / suite / f"{result['env_id']}__{result['exp_name']}__{result['seed']}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
    report.main(report.Args(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), readme="none"))
    kept = sorted(path.parent.name for path in (tmp_path / "results").rglob("runs/*/*.json"))
    assert kept == ["200", "200-smollm2"]
    assert len([*(tmp_path / "results" / "popo_countdown").glob("*.md")]) == 2


def test_a_method_that_the_plot_does_not_know_is_in_it():
    """Such as a line of benchmark.sh's table that no committed result has, or one of a fork."""
    panels = report.plot_popo(METHODS | {"mine": METHODS["popo"], "popo-gipo": METHODS["dapo"]}, "rollouts").axes
    labels = {panel.get_title(): [line.get_label() for line in panel.lines] for panel in panels}
    assert labels == {"methods": ["grpo", "dapo", "popo"], "ablations": ["popo", "mine", "popo-gipo"]}


def test_report_from_json_files_alone(tmp_path):
    folder = tmp_path / "popo_countdown" / "runs" / "200"
    folder.mkdir(parents=True)
    for method, runs in METHODS.items():
        for result in runs:
            (folder / f"{method}-{result['seed']}.json").write_text(json.dumps(result))
    args = report.Args(runs=str(tmp_path / "none"), results=str(tmp_path), readme=str(tmp_path / "README.md"))
    assert report.write_report(args) == [str(tmp_path / "popo_countdown" / "benchmark-countdown-3-200-lr0.0001-v1.md")]
    text = (tmp_path / "popo_countdown" / "benchmark-countdown-3-200-lr0.0001-v1.md").read_text()
    assert "6 runs, 2 seeds, algorithm version 1. Machine: abacus." in text and report.popo_table(METHODS) in text
    for axis in ("rollouts", "updates"):
        assert (tmp_path / "popo_countdown" / f"{axis}-countdown-3-200-lr0.0001-v1.png").stat().st_size > 10_000
        assert f"({axis}-countdown-3-200-lr0.0001-v1.png)" in text
    assert report.write_report(args) == []


def matrix(*flags, suite="popo"):
    command = ["./benchmark.sh", suite, "--dry-run", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_matrix_and_what_is_finished(tmp_path):
    """A length that no committed run has: five seeds of every method, with the flags of its ablation."""
    lines = matrix("--steps", "777")
    assert len(lines) == 35 and len(set(lines)) == 35
    names = {
        word for line in lines for flag, word in zip(line.split(), line.split()[1:], strict=False) if flag == "--exp-name"
    }
    assert (
        names
        == {"grpo", "grpo-filter", "dapo", "popo", "popo-stale", "popo-pi_old", "popo-behaviour"}
        < set(report.POPO_METHODS)
    )
    assert all(" --run-dir runs/popo-777 " in line for line in lines)
    assert sum("--replay-age-min 10" in line for line in lines) == sum("--objective pi_old" in line for line in lines) == 5
    folder = tmp_path / "popo-777" / "countdown-3__grpo__1"
    folder.mkdir(parents=True)
    args = popo.with_defaults(popo.Args(method="grpo", exp_name="grpo", total_timesteps=777))
    (folder / "result.json").write_text(json.dumps({"versions": {"algorithm": popo.ALGORITHM_VERSION}, "args": vars(args)}))
    left = report.pending(lines, report.Args(runs=str(tmp_path), results=str(tmp_path)))
    assert len(left) == 34 and not any("--exp-name grpo " in line and "--seed 1 " in line for line in left)


def test_matrix_of_old_answers():
    """Six objectives at three ages; on fresh answers those around pi_prox and pi_b are GRPO itself. Five seeds of each."""
    runs = [vars(tyro.cli(popo.Args, args=shlex.split(line)[2:])) for line in matrix("--steps", "7777", suite="lag")]
    cells = [(run["objective"], run["lag"], run["seed"]) for run in runs]
    fresh, others = {"decoupled", "gipo", "sapo", "cispo", "m2po"}, {"pi_old"}
    wanted = [(name, lag, seed) for lag in (0, 4, 16) for name in (fresh | others if lag else fresh) for seed in range(1, 6)]
    assert sorted(cells) == sorted(wanted)
    rest = [{key: value for key, value in run.items() if key not in ("objective", "lag", "seed", "exp_name")} for run in runs]
    assert all(run == rest[0] for run in rest) and rest[0]["method"] == "grpo"


def test_matrix_of_the_language_model():
    """The four methods with equal flags but the method's, on seeds that chose nothing; the script accepts the flags."""
    lines = [shlex.split(line)[2:] for line in matrix("--steps", "777", suite="smollm2")]
    runs = [vars(tyro.cli(popo.Args, args=flags)) for flags in lines]
    assert sorted((run["seed"], run["method"]) for run in runs) == [
        (seed, method) for seed in (4, 5, 6) for method in ("dapo", "grpo", "grpo-filter", "popo")
    ]
    assert all(run.pop("method") == run.pop("exp_name") and run.pop("seed") and run == runs[0] for run in runs)
    assert runs[0]["model"] == "smollm2" and runs[0]["env_id"] == "countdown-2"


RESULTS = sorted((ROOT / "results" / "popo_countdown").glob("runs/*/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_committed_run(path):
    """What a reader needs to repeat it, and a curve that begins at the weights that all methods of the seed share."""
    result = json.loads(path.read_text())
    assert result.keys() >= {"args", "git_commit", "versions", "machine", "curve", "eval_success_rate", "wall_seconds"}
    real_model = path.parent.name == "768-smollm2"  # of ./benchmark.sh smollm2
    gone = {"bf16", "response_length", "micro_batch_groups", "generate_groups"}  # flags of --model, which none of them has
    gone |= {"lr_schedule", "lr_warmup"}
    assert set(result["args"]) - set(vars(popo.Args())) <= gone
    assert result["args"]["model"] == ("smollm2" if real_model else None)
    before = result["args"].get("lr_schedule", "constant"), result["args"].get("lr_warmup", 0.0)
    assert before == ("constant", 0.0)  # as every run is now
    # benchmark.sh writes its tables after a suite, so those that followed were started beside changed tables.
    assert result["git_commit"].removesuffix("-dirty").startswith("1750e31") or not result["git_commit"].endswith("-dirty")
    updates = [point["updates"] for point in result["curve"]]
    assert (
        updates == sorted(updates) and updates[0] == 0 and result["curve"][-1]["success_rate"] == result["eval_success_rate"]
    )
    same = [
        json.loads(other.read_text()) for other in RESULTS if other.parent == path.parent and other.stem[-1] == path.stem[-1]
    ]
    same = [
        other for other in same if (other["machine"], other["env_id"]) == (result["machine"], result["env_id"])
    ]  # the warm-up rounds as its CPU does
    assert len({other["curve"][0]["success_rate"] for other in same if other["seed"] == result["seed"]}) == 1


def test_the_committed_matrix_is_complete():
    """Five seeds or more of the four methods; of every method the seeds from 1 on without a gap: none was dropped."""
    seeds = {}
    for path in RESULTS:
        result = json.loads(path.read_text())
        seeds.setdefault((path.parent.name, result["exp_name"]), set()).add(result["seed"])
        assert 0 <= result["eval_success_rate"] < 1
    first = {"768-smollm2": 4}  # SmolLM2: its settings were chosen on seeds below
    assert all(found == {first.get(steps, 1) + i for i in range(len(found))} for (steps, _), found in seeds.items())
    assert all(len(seeds["51200", method]) >= 5 for method in ("grpo", "grpo-filter", "dapo", "popo"))


def test_the_page_says_what_the_runs_on_old_answers_say():
    """The areas of the page's table, of five seeds each."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS) if path.parent.name == "51200"]
    runs = [run for run in runs if report.is_about_age(run) or run["exp_name"] == "grpo"]
    rows = [line.strip("| ").split(" | ") for line in report.lag_table(runs).splitlines()[2:]]
    variants = {"geometric": "--is-level geometric", "sequence": "--is-level sequence --sigma 2"}
    variants |= {f"sigma-{sigma}": f"--sigma {sigma}" for sigma in (1, 2, 4)}
    assert len(rows) == 11 and all(set(row[1].split("/")) <= {"5", "-"} for row in rows)
    page = (ROOT / "docs" / "popo_countdown.md").read_text().split("### How old is too old")[1].split("\n## ")[0]
    for name, _, *areas in (row[:5] for row in rows):
        objective, _, variant = name.partition("-")
        empty = " as `decoupled` " if name == "pi_old" else " "
        cells = [empty if area == "-" else f" {area.split()[0]} " for area in areas]
        assert f"| `{f'{objective} {variants[variant]}' if variant else name}` |{'|'.join(cells)}|" in page


def test_the_pages_say_what_the_methods_reach_on_the_real_model():
    """docs/popo_countdown.md: answers sampled, end and area of each method, of the seeds 4 to 6; the README: start and end."""
    page, readme = ((ROOT / name).read_text() for name in ("docs/popo_countdown.md", "README.md"))
    runs = [json.loads(path.read_text()) for path in RESULTS if path.match("768-smollm2/countdown-2__*")]

    def area(run):
        return 100 * report.popo_curve(run, "rollouts", np.linspace(0, 768, report.GRID_POINTS + 1)).mean()

    ends = {}
    for method in ("popo", "grpo", "grpo-filter", "dapo"):
        found = [run for run in runs if run["exp_name"] == method]
        assert [run["seed"] for run in found] == [4, 5, 6]
        ends[method] = np.array([100 * run["eval_success_rate"] for run in found])
        sampled = np.mean([run["curve"][-1]["rollouts"] for run in found])
        areas = [area(run) for run in found]
        cells = f"{sampled:,.0f} | {ends[method].mean():.0f} [{ends[method].min():.0f}, {ends[method].max():.0f}]"
        assert f"| {method} | {cells} | {np.mean(areas):.1f} |" in page
    lagging = [run for run in runs if "lag-4" in run["exp_name"]]
    rates, areas = [100 * run["eval_success_rate"] for run in lagging], [area(run) for run in lagging]
    words = f"end at {min(rates):.0f} to {max(rates):.0f} %, with areas of {min(areas):.0f} to {max(areas):.0f}. "
    (fresh,) = [run for run in runs if (run["exp_name"], run["seed"]) == ("grpo", 4)]
    words += f"With fresh answers GRPO ends this seed at {ends['grpo'][0]:.0f} %, too, but its area is {area(fresh):.0f}."
    assert words in page
    (three,) = (json.loads(path.read_text()) for path in RESULTS if path.match("768-smollm2/countdown-3__popo__4.json"))
    curve = [f"{100 * three['curve'][i]['success_rate']:.1f}" for i in (0, -1)]
    assert f"POPO goes from {curve[0]} to {curve[1]} %" in page
    start = {round(100 * run["curve"][0]["success_rate"]) for run in runs}
    assert start == {25} and f"from 25 to {ends['popo'].mean():.0f} % right answers" in readme
