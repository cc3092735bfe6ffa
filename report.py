"""Benchmark runs -> results/: one small JSON per run, tables, plots, and the results block of the README.

    python report.py                        # after ./benchmark.sh; also from the committed JSON files alone
    python report.py --compare my/runs      # any runs: a table and a plot of them, written beside them

Statistics as recommended in arXiv 2108.13264: interquartile mean over all runs of a cell, 95 % intervals by a bootstrap that
resamples seeds within each task. Gaps between two rows are paired by task and seed, with intervals by Student's t.
"""

import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

LIBERO_REGIMES = ("fresh", "recent", "stale")  # its buffer sizes
TUNING_SEEDS = range(1, 4)  # settings were chosen on them: they have a table of their own
README_TASKS = "button-press-topdown door-open drawer-close drawer-open push reach window-close window-open".split()
PAPER_TASKS = "assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall".split()
PAPER_TASKS += "button-press-wall coffee-button coffee-pull".split()
README_SEEDS = (4, 5, 6)  # its rows have all of these seeds; tables of gaps may have more
README_STEPS = 300_000  # of a run
README_SIZES = ("on-policy", "5120", "20000", "100000")  # more columns would not fit
README_ROWS = ("gipo", "ppo-clip-0.2", "ppo-clip-0.5")  # without these, at the default replay size, it has no table
LEAST_TASKS = 4  # of a row in its table, and of a row in the table of gaps
NUMBERS = {3: "Three", 4: "Four", 5: "Five", 6: "Six", 7: "Seven", 8: "Eight"}
SUITES = ("benchmark-*", "graphgpo-*", "popo-*", "vla-*")  # folders of benchmark.sh
GRID_POINTS = 30  # of a collected curve
CURVES = {  # name in the JSON -> TensorBoard tag
    "return": "charts/episodic_return",
    "success": "charts/episodic_success",
    "utilization": "gipo/utilization",
    "effective_sample_size": "gipo/effective_sample_size",
    "logratio_std": "gipo/logratio_std",
    "policy_lag": "gipo/policy_lag",
    "trust_mean": "gipo/trust_mean",
    "entropy": "losses/entropy",
    "approx_kl": "losses/approx_kl",
    "clipfrac": "losses/clipfrac",
    "explained_variance": "losses/explained_variance",
    "grad_norm": "losses/grad_norm",
}
# Arguments that name the run or its machine, not its outcome.
NOT_OUTCOME = set("run_dir resume overwrite evaluate eval_every checkpoint_every capture_video track wandb_project".split())
NOT_OUTCOME |= set("torch_threads async_envs overlap wandb_id script env_timeout env_start_timeout demo_timeout".split())
POPO_METHODS = {  # by --exp-name, in the order of the table and of the colours; the panel of the plots
    "grpo": "methods",
    "grpo-filter": "methods",
    "dapo": "methods",
    "popo": "methods and ablations",
    "popo-stale": "ablations",
    "popo-pi_old": "ablations",
    "popo-behaviour": "ablations",
    "popo-ineff": "ablations",
    "popo-uncapped": "ablations",
    "popo-age-50": "ablations",
    "popo-age-50-uncapped": "ablations",
}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9", "#999999"]  # Okabe and Ito, 2008
# A flag that only one script has: what runs of that script had before other flags came, or after they went.
AS_BEFORE = {
    "method": {"kl_coef": 0.0, "sigma": 0.5, "sigma_neg_ratio": 1.0, "kernel": "gaussian", "m2_threshold": 0.04, "lag": 0}
    | {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05, "lr_schedule": "constant", "lr_warmup": 0.0, "generation_batch": None},
    "advantage": {"reward": "sparse", "success_reward": None, "step_penalty": 0.0, "generation_batch": None}
    | {"r_succ": 10.0, "normalize_distance": False, "slippery": 0.0, "plot_graph": False},
    "suite": {"fast_env": False, "episodes_per_task": 1, "env_groups": 2, "task_sampling": "failure"},
}
# What matters to a language model only, some under an earlier name.
MODEL_ONLY = (
    "prompt max_number max_new_tokens response_length micro_batch micro_batch_groups microbatch_size dtype bf16".split()
)
MODEL_ONLY += ["generate_groups", "generation_batch", "export"]
METHODS = ("gipo", "ppo-clip-0.2", "ppo-clip-0.5", "sapo", "none", "ppo")  # the main rows; each has one colour in all plots
LINES = ("solid", "dotted", "dashed", "dashdot")  # of plots with more lines than colours


@dataclass
class Args:
    compare: tuple[str, ...] = ()
    """folders of any runs, or of collected ones: print a table of them, write it and a plot into the first folder, and stop"""
    runs: str = "runs"
    """folder with the benchmark-* folders of benchmark.sh; another one that has run folders instead is compared"""
    results: str = "results"
    """folder of the JSON files, tables and plots"""
    readme: str = "README.md"
    """file whose block between the two `benchmark` comments is replaced"""
    pending: bool = False
    """read commands from the standard input and print those whose run is not finished; do nothing else"""
    check: bool = False
    """write nothing; exit code 1 if the tables or the README block are not what the JSON files give"""


class ReportError(ValueError):
    """What a user can put right: one sentence that names the file or the flag."""


# -------------------- Reading files --------------------
KINDS = {
    "a text": str,
    "an integer": int,
    "a number": int | float,
    "a number or null": int | float | None,
    "an object": dict,
}


def of_kind(kind: str, keys: str) -> dict[str, str]:
    """{key: kind} of several keys; a dot leads into an object or list, and a star stands for all that is in it."""
    return dict.fromkeys(keys.split(), kind)


# What the tables need of a result.json.
IDENTITY = of_kind("an integer", "versions.algorithm") | of_kind("an object", "args")
RUN = IDENTITY | of_kind("a text", "exp_name") | of_kind("an integer", "seed")
BENCHMARK = RUN | of_kind("a text", "env_id") | of_kind("a number", "eval_return_mean wall_seconds")
BENCHMARK |= of_kind("a number or null", "eval_success_rate train_return_mean")
BENCHMARK |= of_kind("an integer", "total_timesteps args.total_timesteps args.buffer_size args.num_envs args.num_steps")
GRAPHGPO = RUN | of_kind("an integer", "total_episodes")
GRAPHGPO |= of_kind("a number", "eval_success_rate credit_seconds wall_seconds")
POPO = RUN | of_kind("a text", "env_id") | of_kind("an integer", "iterations total_timesteps args.total_timesteps")
POPO |= of_kind("an integer", "args.num_prompts args.group_size") | of_kind("a number", "args.learning_rate eval_success_rate")
POPO |= of_kind("a number", "curve.0.rollouts curve.*.rollouts curve.*.updates curve.*.success_rate")
VLA = RUN | of_kind("a text", "env_id") | of_kind("an integer", "total_timesteps args.buffer_size args.critic_warmup")
VLA |= of_kind("a number or null", "train_success_rate") | of_kind("a number", "evaluations.*.successes.*.2")
VLA |= of_kind("an object", "evaluations.0")
# What is added when a run is collected.
MACHINE = of_kind("a text", "machine")
CURVES_TOO = MACHINE | of_kind("a number or null", "curves.*.*")
ON_GRID = CURVES_TOO | of_kind("a number or null", f"curves.*.{GRID_POINTS - 1}")


def entries(value, names: list[str]):
    """What a key such as curves.*.0, split at its dots, finds in nested objects and lists."""
    if not names:
        yield value
        return
    name, *rest = names
    if name == "*":
        for entry in value.values() if isinstance(value, dict) else value:
            yield from entries(entry, rest)
    else:
        yield from entries(value[int(name) if isinstance(value, list) else name], rest)


def read(file: Path, keys: dict[str, str]) -> dict:
    """The JSON object in a file; ReportError unless it is whole and has these keys with values of these kinds."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} cannot be read ({error}): move it away or run it again") from error
    if not isinstance(content, dict):
        raise ReportError(f"{file} holds no JSON object: move it away or run it again")
    for key, kind in keys.items():
        try:
            found = [*entries(content, key.split("."))]
        except (LookupError, TypeError, ValueError) as error:
            raise ReportError(f"{file} has no {key}: move it away or run it again") from error
        for value in found:
            if not isinstance(value, KINDS[kind]) or isinstance(value, bool):
                raise ReportError(f"{file}: {key} must be {kind}, not {value!r:.60}")
    return content


def read_scalars(folder: Path, last: int) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of a run folder's TensorBoard files; ReportError if they end before the run did."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    end = max((points[-1][0] for points in scalars.values()), default=0)
    for tag in {"charts/SPS", "losses/entropy"} & scalars.keys():  # once an iteration
        if any(step >= later for (step, _), (later, _) in itertools.pairwise(scalars[tag])):
            why = "its TensorBoard files are those of two runs, or of a clock that went back before a resume"
            raise ReportError(f"{folder}: {why}: move it away or run it again")
    if end < last:
        raise ReportError(f"{folder}: its TensorBoard files end at step {end:,} of {last:,}: move it away or run it again")
    return scalars


def load(folder: Path, keys: dict[str, str], new: dict[Path, dict] | None) -> dict[Path, dict]:
    """{file: run} of the runs collected in `folder`/runs and of those in `new`, which are not stored yet."""
    stored = {file: read(file, keys) for file in folder.glob("runs/*/*.json")}
    for file, run in stored.items():
        if len({len(curve) for curve in run.get("curves", {}).values()}) > 1:
            raise ReportError(f"{file}: its curves differ in length: move it away")
    return dict(sorted((stored | {file: run for file, run in (new or {}).items() if file.parents[2] == folder}).items()))


# -------------------- Finished runs --------------------
def outcome_args(args: dict) -> dict:
    """The arguments that decide a run's outcome."""
    unused = ["num_bins"] if args.get("policy_head") == "gaussian" else []
    if args.get("policy_head") == "categorical":
        args = {"num_bins": 256} | args  # runs from before the flag
    if "trust_side" in args and "suite" not in args:  # algorithm version 1
        args = {"adaptive_sigma": 0.0} | args  # likewise
    for mark, before in AS_BEFORE.items():
        if mark in args:
            args = before | args
    if "advantage" in args and args.get("model") is None:  # GraphGPO's own network: runs that stored None for a default
        defaults = {"learning_rate": 1e-3, "kl_coef": 0.0, "ent_coef": 0.01}
        defaults |= {"success_reward": 1.0} if args["reward"] == "sparse" else {}
        args = args | {key: value for key, value in defaults.items() if args.get(key) is None}
    if args.get("model", "") is None and not {"method", "advantage"}.isdisjoint(args):  # a network of POPO's or GraphGPO's own
        unused += MODEL_ONLY
    if "suite" not in args:
        unused.append("fast_env")  # Meta-World's is equal to 1e-15, LIBERO's up to the solver's tolerance only
    if args.get("env_kwargs"):
        args = args | {"env_kwargs": json.dumps(json.loads(args["env_kwargs"]), sort_keys=True)}  # however it was typed
    return {key: value for key, value in args.items() if key not in [*NOT_OUTCOME, *unused]}


def identity(result: dict) -> str:
    """Two results of one identity are the same run."""
    return json.dumps([result["versions"]["algorithm"], outcome_args(result["args"])], sort_keys=True)


def stored_runs(args: Args) -> list[dict]:
    """Every result: files collected in results/, then run folders that are not collected yet."""
    collected = [path for pattern in ("runs", "*/runs") for path in Path(args.results).glob(f"{pattern}/*/*.json")]
    folders = [path for suite in SUITES for path in Path(args.runs).glob(f"{suite}/*/result.json")]
    return [read(path, IDENTITY) for path in sorted(collected + folders)]


def chose_settings(run: dict) -> bool:
    """Whether this seed of Meta-World has chosen settings; of any other task all seeds are alike."""
    return run["seed"] in TUNING_SEEDS and re.fullmatch(r"[a-z-]+-v3", run["env_id"]) is not None


def store(file: Path, result: dict) -> None:
    """Write a collected run, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")  # two reports may be written at the same time
    temporary.write_text(json.dumps(result) + "\n")
    os.replace(temporary, file)


def setting(run: dict) -> dict:
    """What the runs of a table's cell have in common: all that decides the outcome but task and seed."""
    args = outcome_args(run["args"]) | {"algorithm_version": run["versions"]["algorithm"]}
    return {key: value for key, value in args.items() if key not in ("env_id", "suite", "seed")}


def differences(settings: list[dict]) -> list[str]:
    """The arguments that settings have different values of."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def refuse_mixture(name: str, runs: list[dict]) -> None:
    """ReportError unless the runs of a table's cell differ in task and seed only."""
    settings = [setting(run) for run in runs]
    for run, other in zip(runs, settings, strict=True):
        different = differences([settings[0], other])
        if different:
            pair = [f"{r.get('env_id')} seed {r['seed']}" for r in (runs[0], run)]
            raise ReportError(
                f"{name}: {' and '.join(pair)} differ in {', '.join(different)}: move the files of one setting away"
            )


def parsed(module, flags: list[str]):
    """A script's arguments; ReportError for those that it would refuse, a task that it does not know among them."""
    types = typing.get_type_hints(module.Args)
    field = "suite" if "suite" in types else "env_id"
    task, known = dict(itertools.pairwise(flags)).get(f"--{field.replace('_', '-')}"), typing.get_args(types[field])
    if known and task not in (*known, None):
        nearest = difflib.get_close_matches(task, known, n=3, cutoff=0.5) or known
        raise ReportError(f"--tasks {task} is unknown; try {', '.join(nearest)}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro's box of many lines
            args = module.parse_args(flags) if hasattr(module, "parse_args") else tyro.cli(module.Args, args=flags)
    except SystemExit as error:
        raise ReportError(f"{module.__name__}.py does not take the flags {shlex.join(flags)}") from error
    try:
        if field != "suite":  # LIBERO's check needs its assets
            module.check_args(args)
    except ValueError as error:
        raise ReportError(f"{module.__name__}.py: {error}".replace("--env-id", "--tasks")) from error
    return args


def pending(commands: list[str], args: Args) -> list[str]:
    """Those commands without a result of equal arguments and algorithm version. ReportError if one cannot run, or if its
    folder holds another run."""
    done = {identity(result) for result in stored_runs(args)}
    left = []
    for command in commands:
        _, script, *flags = shlex.split(command)
        if Path(script).name != script or not Path(__file__).with_name(script).is_file():
            raise ReportError(f"{script}: a line of benchmark.sh names a script beside it, and there is none of this name")
        module = importlib.import_module(script.removesuffix(".py"))
        run_args = parsed(module, flags)
        run_args = json.loads(json.dumps(vars(run_args)))  # tuples are lists in result.json
        replays = run_args.get("buffer_size", 0) >= 2 * run_args.get("num_envs", 0) * run_args.get("num_steps", 0)
        if "update_epochs" in run_args and not replays:
            run_args["recompute_advantages"] = False  # as ppo_baseline.py, or a copy of it, does on-policy
        if replays and run_args["exp_name"].endswith("_on-policy"):
            raise ReportError(f"{script} replays {run_args['buffer_size']:,} steps: its line needs the word replay")
        if identity({"versions": {"algorithm": module.ALGORITHM_VERSION}, "args": run_args}) not in done:
            left.append(command)
            task = run_args.get("env_id") or run_args["suite"]
            folder = Path(run_args["run_dir"]) / f"{task.replace('/', '-')}__{run_args['exp_name']}__{run_args['seed']}"
            saved = read(folder / "args.json", {}) if (folder / "args.json").exists() else None
            if saved is not None and saved.pop("algorithm_version", None) != module.ALGORITHM_VERSION:
                raise ReportError(f"{folder} holds a run of another algorithm version: move it out of {folder.parents[1]}")
            if saved is not None and outcome_args(saved) != outcome_args(run_args):
                raise ReportError(f"{folder} holds a run with other arguments: move it out of {folder.parents[1]}")
    return left


def on_grid(points: list[tuple[int, float]], total: int) -> list[float | None]:
    """Means of a curve's points over GRID_POINTS equal stretches of the run; None where there is no point."""
    edges = np.linspace(0, total, GRID_POINTS + 1)
    steps, values = np.array([step for step, _ in points]), np.array([value for _, value in points])
    stretches = [values[(steps > low) & (steps <= high)] for low, high in itertools.pairwise(edges)]
    return [round(float(stretch.mean()), 4) if len(stretch) else None for stretch in stretches]


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def machine_of(folder: Path) -> str:
    """Processor of a run: what benchmark.sh noted there, which on a cluster may be another one than here."""
    file = folder / "machine"
    return (file.read_text().strip() if file.exists() else "") or cpu_name()


def is_stored(result: dict, file: Path) -> bool:
    """Whether `file` holds this run already, or one of a newer algorithm version."""
    if not file.exists():
        return False
    stored = read(file, IDENTITY)
    equal = identity(stored) == identity(result)
    if equal and stored.get("sps") != result.get("sps"):
        print(f"not collected: another run than that of {file}, with equal arguments; move that file away to replace it")
    return equal or stored["versions"]["algorithm"] > result["versions"]["algorithm"]


def finished_runs(args: Args, folders: str, keys: dict[str, str], regimes: tuple[str, ...] = ()):
    """(folder, result) of every finished run that benchmark.sh may have started; others in its folders are only mentioned.

    ReportError for two of one name, length, model and version with other arguments, of which the tables would take turns.
    """
    seen = {}
    for path in sorted(Path(args.runs).glob(f"{folders}/*/result.json")):
        folder, result = path.parent, read(path, keys | of_kind("a text", "env_id"))
        name = f"{result['env_id'].replace('/', '-')}__{result['exp_name']}__{result['seed']}"
        why = "" if folder.name == name else f"it holds the run {name}"
        if regimes and not method_and_regime(result["exp_name"], regimes):
            why = f"its exp-name is not METHOD_REGIME; python report.py --compare {folder.parent} shows it"
        if why:
            print(f"not collected: {folder} ({why})")
            continue
        own = [result["args"].get(key) for key in ("total_timesteps", "total_episodes", "model")]
        other, its = seen.setdefault((name, *own, result["versions"]["algorithm"]), (folder, identity(result)))
        if its != identity(result):
            raise ReportError(f"{other} and {folder} hold runs of one name: move one of them out of {args.runs}")
        yield folder, result


def gridded(scalars: dict, tags: dict[str, str], total: int, axis: str) -> dict[str, list]:
    """The curves {name: tag} on a grid of GRID_POINTS stretches, whose ends are the curve `axis`."""
    curves = {name: on_grid(scalars.get(tag, []), total) for name, tag in tags.items()}
    return curves | {axis: np.linspace(0, total, GRID_POINTS + 1)[1:].round().astype(int).tolist()}


def collect(args: Args, keep=store) -> None:
    """Keep results/runs/<steps>/<run>.json of every finished run folder, over one of other arguments."""
    for folder, result in finished_runs(args, "benchmark-*", BENCHMARK, ("on-policy",)):
        total = result["total_timesteps"]
        file = Path(args.results) / "runs" / length_folder(result, "total_timesteps") / f"{folder.name}.json"
        if not is_stored(result, file):
            if file.exists():
                different = ", ".join(differences([setting(read(file, IDENTITY)), setting(result)]))
                print(f"replaced: {file}, whose run had another {different}")
            curves = gridded(read_scalars(folder, total), CURVES, total, "steps")
            keep(file, result | {"curves": curves, "machine": machine_of(folder)})


def length_folder(result: dict, length: str, first_version: int = 1) -> str:
    """Folder of a collected run: its length, language model, later algorithm version; so no kind of run replaces another."""
    version, model = result["versions"]["algorithm"], result["args"].get("model")
    name = f"{result['args'][length]}" + (f"-{Path(model).name}" if model else "")
    return name + (f"-v{version}" if version > first_version else "")


def collect_popo(args: Args, keep=store) -> None:
    """Keep results/popo_countdown/runs/<steps>/<run>.json of every finished run of popo_countdown.py; it has its curve."""
    for folder, result in finished_runs(args, "popo-*", POPO):
        file = (
            Path(args.results) / "popo_countdown" / "runs" / length_folder(result, "total_timesteps") / f"{folder.name}.json"
        )
        if not is_stored(result, file):
            keep(file, result | {"machine": machine_of(folder)})


# -------------------- Statistics --------------------
def interquartile_mean(scores):
    """Mean of the middle half of all scores, `scores` being one array per task, its seeds along the last axis.

    As in `rliable`, a quarter is cut from either side in whole scores, rounded down: 7 of 30.
    Every task counts the same: where some have more runs, each run stands for copies, up to the least common multiple.
    """
    tasks = [np.asarray(task) for task in scores]
    counts = [task.shape[-1] for task in tasks]
    copies = np.repeat([math.lcm(*counts) // count for count in counts], counts)  # that each score stands for
    pooled = np.concatenate(tasks, axis=-1)
    order = pooled.argsort(-1)
    pooled, copies = np.take_along_axis(pooled, order, -1), copies[order]
    ends, total = copies.cumsum(-1), copies.sum(-1).max()
    low, high = total // 4, total - total // 4
    kept = np.clip(np.minimum(ends, high) - np.maximum(ends - copies, low), 0, None)
    return (kept * pooled).sum(-1) / (high - low)  # NaN if any score is


def bootstrap_interval(scores: list[np.ndarray], statistic, repetitions: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of `statistic(scores)`; every task's seeds are resampled within the task.

    All draws at once: `statistic` gets arrays of shape (repetitions, seeds) and reduces the last axis.
    NaN where a task has one run: nothing is known of its spread then, and resampling would call it zero.
    """
    sizes = [len(task) for task in scores]
    if min(sizes) < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(0, np.repeat(sizes, sizes), (repetitions, sum(sizes)))
    by_task = np.split(chosen, np.cumsum(sizes)[:-1], axis=1)
    low, high = np.percentile(statistic([task[own] for task, own in zip(scores, by_task, strict=True)]), [2.5, 97.5])
    return float(low), float(high)


def probability_of_improvement(ours: list[np.ndarray], theirs: list[np.ndarray]):
    """P(a run of ours beats a run of theirs on the same task), ties counted half, mean over the tasks; NaN if a score is."""
    gaps = [x[..., :, None] - y[..., None, :] for x, y in zip(ours, theirs, strict=True)]
    wins = [(gap > 0).mean((-2, -1)) + 0.5 * (gap == 0).mean((-2, -1)) for gap in gaps]
    return np.mean([win + 0 * gap.mean((-2, -1)) for win, gap in zip(wins, gaps, strict=True)], axis=0)  # 0 * NaN is NaN


def improvement_interval(ours, theirs, repetitions: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the probability of improvement, both sides resampled; NaN where a task has a single run."""
    pairs = [*ours, *theirs]
    return bootstrap_interval(pairs, lambda s: probability_of_improvement(s[: len(ours)], s[len(ours) :]), repetitions)


def gap_and_interval(gaps: list[np.ndarray]) -> tuple[float, tuple[float, float]]:
    """Mean over the tasks of the mean gap of their seeds, and its 95 % interval by Student's t: the tasks are given, the seeds
    drawn, every task with a variance of its own (Welch, 1947). With three seeds it is wider, and nearer to the truth, than a
    bootstrap's.

    `gaps` has one array per task: ours less theirs, on equal seeds. No interval (NaN) if a task has one seed.
    """
    from scipy import stats

    gap, sizes = float(np.mean([task.mean() for task in gaps])), np.array([len(task) for task in gaps])
    if sizes.min() < 2:
        return gap, (math.nan, math.nan)
    variances = np.array([task.var(ddof=1) for task in gaps]) / sizes  # of the tasks' means
    if not variances.any():
        return gap, (gap, gap)
    freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(variances.sum()) / len(gaps)
    return gap, (gap - reach, gap + reach)


def share_of_pairs(gaps: list[np.ndarray]):
    """Share of the pairs with equal task and seed in which our run is better, ties counted half, mean over the tasks.

    `gaps` has one array per task: ours less theirs; NaN if one is.
    """
    return np.mean([((gap > 0) + 0.5 * (gap == 0) + 0 * gap).mean(-1) for gap in gaps], axis=0)


def filled_curve(run: dict, name: str) -> np.ndarray:
    """A training curve with the last value where a stretch saw no episode end; NaN before the first, or if it is missing."""
    missing = [None] * len(next(iter(run["curves"].values())))
    curve = itertools.accumulate(run["curves"].get(name, missing), lambda last, value: last if value is None else value)
    return np.array(list(curve), dtype=float)


def has_curve(run: dict, name: str) -> bool:
    """Whether a run has any point of a training curve."""
    return any(value is not None for value in run["curves"].get(name, ()))


def area_under_curve(run: dict, name: str) -> float:
    """Mean of a success curve over the run: its area. Nothing is solved before the first episode ends; NaN without a curve."""
    return mean(np.nan_to_num(filled_curve(run, name))) if has_curve(run, name) else math.nan


def mean_from_start(run: dict, name: str) -> float:
    """Mean of a training curve from the first finished episode on; NaN without a curve."""
    curve = filled_curve(run, name)
    return mean(curve[~np.isnan(curve)])


def mean_of_curve(run: dict, name: str) -> float:
    """Mean of a diagnostic over the stretches of the run that have it; NaN without any."""
    return mean([value for value in run["curves"].get(name, ()) if value is not None])


def mean(scores) -> float:
    """Mean, NaN of nothing."""
    return float(np.mean(scores)) if len(scores) else math.nan


# -------------------- Tables --------------------
def is_size(regime: str) -> bool:
    """Whether a regime is a number of steps."""
    return regime.isascii() and regime.isdigit()


def regime_order(regime: str) -> tuple:
    """On-policy first, then replay sizes, then names."""
    return (regime != "on-policy", int(regime) if is_size(regime) else 0, regime)


def method_order(method: str) -> tuple:
    """The main rows first."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def method_and_regime(exp_name: str, names=("on-policy",)) -> dict[str, str]:
    """Method and regime, which the benchmark writes into --exp-name as METHOD_REGIME; empty if it is another name.

    A regime is the steps of the replay buffer, or one of `names`; LIBERO's are LIBERO_REGIMES.
    """
    method, _, regime = exp_name.rpartition("_")
    return {"method": method, "regime": regime} if method and (is_size(regime) or regime in names) else {}


def labelled(runs: dict[Path, dict], names=("on-policy",)) -> list[dict]:
    """Collected runs with their method and regime; ReportError for a name without."""
    for file, run in runs.items():
        if not method_and_regime(run["exp_name"], names):
            raise ReportError(f"{file}: exp_name {run['exp_name']} is not METHOD_REGIME, as in gipo_5120: move it away")
    return [run | method_and_regime(run["exp_name"], names) for run in runs.values()]


def with_failures(runs: list[dict]) -> list[dict]:
    """The runs, where those without a success rate have failed if another run of their task has one: some environments report
    success only where there is one."""
    tasks = {run["env_id"] for run in runs if run["eval_success_rate"] is not None or has_curve(run, "success")}
    completed = []
    for run in runs:
        if run["env_id"] in tasks and run["eval_success_rate"] is None and run["eval_return_mean"] is not None:
            run = run | {"eval_success_rate": 0.0}
        if run["env_id"] in tasks and has_curve(run, "return") and not has_curve(run, "success"):
            curve = [None if value is None else 0.0 for value in run["curves"]["return"]]
            run = run | {"curves": run["curves"] | {"success": curve}}
        completed.append(run)
    return completed


def cells(runs: list[dict]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """{(regime, method): {task: runs}}, in a fixed order."""
    result = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in sorted(runs, key=lambda r: (regime_order(r["regime"]), method_order(r["method"]), r["env_id"], r["seed"])):
        result[run["regime"], run["method"]][run["env_id"]].append(run)
    return result


def values(tasks: dict[str, list[dict]], names: list[str], key) -> list[np.ndarray]:
    """One array per task of `key(run)`."""
    return [np.array([key(run) for run in tasks[name]], dtype=float) for name in names]


def number(value: float, form: str = ".2f") -> str:
    """A number, or a dash where it is missing; what rounds to zero has no minus."""
    if math.isnan(value):
        return "-"
    text = f"{value:{form}}"
    return text if float(text) else f"{0.0:{form}}"


def span(value: float, interval: tuple[float, float], form: str = ".2f") -> str:
    """A number and its interval, if it has one."""
    low, high = (number(end, form) for end in interval)
    return number(value, form) + ("" if math.isnan(interval[0]) else f" [{low}, {high}]")


def short(value: float) -> str:
    """A return or a speed, of whatever size, in three digits or whole numbers."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


EXPLANATION = (
    "A row is a method with a replay buffer of so many steps. success: of the deterministic policy in the last "
    "evaluation (Meta-World: the 50 training goals). A run that reports no success has failed where another run of its task "
    "reports one. area: mean success in training over the whole run, so it is larger where a task is learned earlier. IQM: "
    "mean of the middle half of all runs of a row, so a task that is much harder hardly counts in it. Brackets: 95 % interval "
    "of a bootstrap over the seeds of each task, of a gap by Student's t, whose intervals are wider. above: share of pairs "
    "with equal task and seed in which the row is better, ties counted half."
)
TUNING = "Seeds 1 to 3, on which settings were chosen, which no other table has (means over tasks and seeds)."
README_TABLE = (
    "{tasks} Meta-World tasks{names}, {seeds}, {steps:,} steps. *Area*: mean success over all of training, from 0 to 1. "
    "*Success*: share of the 50 training goals that the final policy reaches. A *lead* is a gap in area (before rounding) "
    "whose 95 % interval leaves out zero. All rows but `ppo` (textbook PPO) share one setup with replay: `ppo-clip-0.2` with "
    "PPO's clip, `sapo` with another published weight, `none` with no weight."
)
DIAGNOSTICS = "Diagnostics, mean of the first / last fifth of a run (docs/gipo_continuous.md explains them)."
BY_TASK = (
    "By task: area · success of the deterministic policy at the end (mean return). Without a success flag: mean return at "
)
BY_TASK += (
    "the end, its range over the seeds, and mean return over training. n: seeds, where they are not as many as in most cells."
)
SCORES = {  # of a run: what the table compares
    "success": lambda run: run["eval_success_rate"],
    "return": lambda run: run["eval_return_mean"],
    "area": functools.partial(area_under_curve, name="success"),
    "utilization": functools.partial(mean_of_curve, name="utilization"),
    "effective sample size": functools.partial(mean_of_curve, name="effective_sample_size"),
}


def matched(ours: dict[str, list[dict]], theirs: dict[str, list[dict]]) -> tuple[dict, dict]:
    """Of two cells, the runs whose task and seed both have: with other seeds, that is other goals, luck would be compared."""
    seeds = [{(task, run["seed"]) for task in cell for run in cell[task]} for cell in (ours, theirs)]
    both = seeds[0] & seeds[1]
    names = sorted({task for task, _ in both})
    return tuple(
        {task: [run for run in cell[task] if (task, run["seed"]) in both] for task in names} for cell in (ours, theirs)
    )


def improvements(ours: dict[str, list[dict]], theirs: dict[str, list[dict]]) -> list[str]:
    """Share of the pairs in which ours is better by success, area and return, each with its interval; of matched cells."""
    row = []
    for name in ("success", "area", "return"):
        gaps = [x - y for x, y in zip(*(values(cell, list(ours), SCORES[name]) for cell in (ours, theirs)), strict=True)]
        row.append(span(share_of_pairs(gaps), bootstrap_interval(gaps, share_of_pairs)))
    return row


def aggregate_table(runs: list[dict]) -> str:
    """One row per method and replay size: IQM of final success, area and return; shares of pairs better than textbook PPO."""
    rows = ["| replay | method | runs | success, IQM | area under success, IQM | return, IQM | success above ppo's |"]
    rows[0] += " area above | return above |"
    rows.append("|---" * 9 + "|")
    table = cells(runs)
    baseline = table.get(("on-policy", "ppo"), {})
    for (regime, method), tasks in table.items():
        scores = {name: values(tasks, sorted(tasks), SCORES[name]) for name in ("success", "area", "return")}
        ours, ppo = matched(tasks, baseline)
        row = [regime, method, sum(len(task) for task in scores["success"])]
        for name in ("success", "area"):
            row.append(span(interquartile_mean(scores[name]), bootstrap_interval(scores[name], interquartile_mean)))
        row.append(f"{interquartile_mean(scores['return']):,.0f}")
        row += ["-"] * 3 if method == "ppo" or not ours else improvements(ours, ppo)
        rows.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(rows)


def comparable(runs: list[dict]) -> tuple[list[dict], str]:
    """The runs that may share one row of scores each, since their cells have the same tasks, and a line that says so.

    Those of the cells that have every task, if on-policy PPO is one of them; otherwise those of shared_by_most().
    """
    table = cells(runs)
    every = {run["env_id"] for run in runs}
    complete = [cell for cell, tasks in table.items() if set(tasks) == every]
    if ("on-policy", "ppo") not in complete and len(complete) < len(table):
        return shared_by_most(runs)
    left_out = ", ".join(f"{method} {regime}" for regime, method in table if (regime, method) not in complete)
    note = f"; without the rows that lack some of them ({left_out})" if left_out else ""
    scope = f"Over {len(every)} {'task' if len(every) == 1 else 'tasks'}{note}:"
    return [run for run in runs if (run["regime"], run["method"]) in complete], scope


def shared(runs: list[dict]) -> tuple[list[dict], str]:
    """The runs on the tasks that every cell has, and a line that says so."""
    tasks = set.intersection(*(set(tasks) for tasks in cells(runs).values()))
    listed = ", ".join(sorted(tasks)).replace("-v3", "") or "none"
    chosen = [run for run in runs if run["env_id"] in tasks]
    return chosen, f"Over the {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'} that every row has ({listed}):"


def shared_by_most(runs: list[dict]) -> tuple[list[dict], str]:
    """As shared(), without the shortest cells, until the rest shares half of the longest one's tasks: rows only begun, say."""
    table = cells(runs)
    while len(table) > 1 and 2 * len(set.intersection(*map(set, table.values()))) < max(map(len, table.values())):
        del table[min(table, key=lambda cell: len(table[cell]))]
    chosen, scope = shared([run for run in runs if (run["regime"], run["method"]) in table])
    lost = ", ".join(f"{method} {regime}" for regime, method in cells(runs) if (regime, method) not in table)
    return chosen, scope.replace("):", f"); without the rows with too few of them ({lost}):") if lost else scope


def shared_if_any(runs: list[dict]) -> tuple[list[dict], str]:
    """As shared_by_most(); without a task that every cell has, all runs."""
    return shared_by_most(runs) if shared(runs)[0] else (runs, "The tasks differ between the rows:")


def same_replay_table(runs: list[dict]) -> str:
    """One row per replay size, method and PPO-clip of that size, over the tasks and seeds that both have; may be empty.

    A method that is not of the benchmark's own has a row against each of these (or against `ppo`, without replay), too.
    """
    rows = ["| replay | method | against | tasks | runs of each | success, IQM | area under success, IQM | mean gap in area |"]
    rows[0] += " success above | area above | return above |"
    rows.append("|---" * 11 + "|")
    table = cells(runs)
    for (regime, method), tasks in table.items():
        if method.startswith("ppo-clip"):
            continue
        known = METHODS if method not in METHODS else ()  # a method of one's own is compared with all of these
        for opponent in [name for size, name in table if size == regime and (name.startswith("ppo-clip") or name in known)]:
            ours, theirs = matched(tasks, table[regime, opponent])
            if opponent == method or not ours:
                continue
            row = [regime, method, opponent, len(ours), sum(map(len, ours.values()))]
            for name in ("success", "area"):
                pair = (interquartile_mean(values(cell, list(cell), SCORES[name])) for cell in (ours, theirs))
                row.append(" against ".join(map(number, pair)))
            areas = [values(cell, list(ours), SCORES["area"]) for cell in (ours, theirs)]
            row.append(span(*gap_and_interval([x - y for x, y in zip(*areas, strict=True)])))
            rows.append("| " + " | ".join(map(str, row + improvements(ours, theirs))) + " |")
    return "\n".join(rows) if len(rows) > 2 else ""


def tuning_table(runs: list[dict]) -> str:
    """One row per replay size and method: means over its runs, the largest area first."""
    rows = []
    for (regime, method), tasks in cells(runs).items():
        found = [run for group in tasks.values() for run in group]
        means = {name: np.mean([SCORES[name](run) for run in found], dtype=float) for name in ("success", "area", "return")}
        row = f"| {regime} | {method} | {len(found)} | {number(means['success'])} | {number(means['area'], '.3f')} | "
        rows.append((-np.nan_to_num(means["area"]), -means["return"], row + f"{means['return']:,.0f} |"))
    return "\n".join(
        ["| replay | method | runs | success | area | return |", "|---" * 6 + "|", *(row for *_, row in sorted(rows))]
    )


def readme_runs(runs: list[dict]) -> list[dict]:
    """The runs of the README: rows of METHODS with a size of README_SIZES, all on the same tasks.

    A row has its place once four tasks have it with README_SEEDS; a task counts once all of these rows have it. README_ROWS
    with 5,120 steps must be among them. Of a replay size, further seeds count once all of README_ROWS have them on all tasks.
    """
    done = {(run["method"], run["regime"], run["env_id"], run["seed"]) for run in runs}

    def finished(regime, tasks, seeds, methods=README_ROWS):
        return {(method, regime, task, seed) for method in methods for task in tasks for seed in seeds} <= done

    names = [f"{name}-v3" for name in README_TASKS]
    rows = {
        (method, size): [name for name in names if finished(size, [name], README_SEEDS, [method])]
        for method in METHODS
        for size in README_SIZES
    }
    whole = {row: tasks for row, tasks in rows.items() if len(tasks) >= LEAST_TASKS}
    tasks = [name for name in names if all(name in tasks for tasks in whole.values())]
    if len(tasks) < LEAST_TASKS or not all((method, "5120") in whole for method in README_ROWS):
        return []
    seeds = {
        regime: {*README_SEEDS} | {run["seed"] for run in runs if finished(regime, tasks, [run["seed"]])}
        for regime in {run["regime"] for run in runs}
    }
    runs = [run for run in runs if run["env_id"] in tasks and run["seed"] in seeds[run["regime"]]]
    rows = collections.Counter((run["regime"], run["method"]) for run in runs)
    return [run for run in runs if rows[run["regime"], run["method"]] == len(tasks) * len(seeds[run["regime"]])]


def readme_table(runs: list[dict], intervals: bool = False) -> str:
    """One row per method, one column per replay size: mean area, if asked for with its interval, and mean success. A method
    without replay stands in the first column."""
    table = cells(runs)
    sizes = [size for size in dict.fromkeys(regime for regime, _ in table) if is_size(size)]
    words = ["area · success", *(f"{int(size):,}" for size in sizes)]
    words[1] = f"replay of {words[1]}"
    rows = [f"| {' | '.join(words)} |", "|---" * len(words) + "|"]
    for method in sorted({method for _, method in table}, key=method_order):
        without = table.get(("on-policy", method), {})
        row = [f"`{method}`, without replay" if without else f"`{method}`"]
        for size in sizes:
            tasks = without if size == sizes[0] and without else table.get((size, method), {})
            if not tasks:
                row.append("")
                continue
            success, area = (values(tasks, sorted(tasks), SCORES[name]) for name in ("success", "area"))
            interval = bootstrap_interval(area, mean_of_tasks) if intervals else (math.nan, math.nan)
            row.append(f"{span(mean_of_tasks(area), interval)} · {100 * mean_of_tasks(success):.0f} %")
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def lead_table(runs: list[dict]) -> str:
    """GIPO against every method on the same replay, over the tasks that both have with README_SEEDS, if they are LEAST_TASKS
    or more, and over all seeds there that both have: mean areas and their gap."""
    rows = ["| replay | against | tasks | GIPO's area | the other's | gap | GIPO's is larger in |", "|---" * 7 + "|"]
    table = cells(runs)
    for (size, other), tasks in table.items():
        pair = matched(table.get((size, "gipo"), {}), tasks)
        whole = [task for task, found in pair[0].items() if {run["seed"] for run in found} >= {*README_SEEDS}]
        if len(whole) < LEAST_TASKS or other == "gipo" or other not in METHODS:
            continue
        pair = [{task: found[task] for task in whole} for found in pair]
        areas = [values(cell, list(cell), SCORES["area"]) for cell in pair]
        gaps = [x - y for x, y in zip(*areas, strict=True)]
        (gap, (low, high)), count = gap_and_interval(gaps), sum(map(len, gaps))
        shown = span(gap, (low, high))
        name = {"none": "no weight", "sapo": "SAPO"}.get(other, other.replace("ppo-clip-", "clip of "))
        row = [f"{int(size):,}", name, str(len(whole)), *(number(mean_of_tasks(area)) for area in areas)]
        row += [f"**{shown}**" if low > 0 or high < 0 else shown, f"{sum((task > 0).sum() for task in gaps)} of {count}"]
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def paper_score(rows: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """The rows' returns on the paper's scale: of each task the worst row's mean becomes 0 and the best row's 1.

    `rows` has per method one array per task. A task on which all means are equal is left out.
    """
    tasks = [task for task in zip(*rows, strict=True) if np.ptp([scores.mean() for scores in task]) > 0]
    ends = [(min(means), max(means)) for means in ([scores.mean() for scores in task] for task in tasks)]
    scaled = [[(scores - low) / (high - low) for scores in task] for task, (low, high) in zip(tasks, ends, strict=True)]
    return [list(row) for row in zip(*scaled, strict=True)]


def paper_table(runs: list[dict]) -> str:
    """GIPO and both clips with 20,000 steps of replay on the paper's tasks: success at the end, and the paper's measure, the
    return of the last 100 training episodes. One run each, with the first seed; empty unless every task has all three."""
    wanted = [f"{name}-v3" for name in PAPER_TASKS]
    table = cells([run for run in runs if run["env_id"] in wanted and run["seed"] == README_SEEDS[0]])
    rows = [table.get(("20000", method), {}) for method in README_ROWS]
    if not all(set(row) == set(wanted) for row in rows):
        return ""
    success = [values(row, wanted, SCORES["success"]) for row in rows]
    returns = [values(row, wanted, lambda run: run["train_return_mean"]) for row in rows]
    score = [f"{interquartile_mean(row) + 0.0:.2f}" for row in paper_score(returns)]
    names = [method.replace("ppo-clip-", "clip of ").replace("gipo", "GIPO") for method in README_ROWS]
    lines = ["| task | " + " | ".join([*(f"success: {names[0]}", *names[1:]), *(f"return: {names[0]}", *names[1:])]) + " |"]
    lines.append("|---" * (1 + 2 * len(rows)) + "|")
    for i, task in enumerate(PAPER_TASKS):
        cells_of_task = [f"{row[i].mean():.2f}" for row in success] + [f"{row[i].mean():,.0f}" for row in returns]
        lines.append(f"| {task} | " + " | ".join(cells_of_task) + " |")
    means = [f"{mean_of_tasks(row):.2f}" for row in success] + [f"{mean_of_tasks(row):,.0f}" for row in returns]
    lines += ["| mean | " + " | ".join(means) + " |", "| the paper's score | | | | " + " | ".join(score) + " |"]
    return "\n".join(lines)


def task_table(runs: list[dict]) -> str:
    """One row per replay size and method, one column per task, means over the seeds: area, success and (return) at the end.

    Of a task without a success flag: return at the end, its range, and return over training. n: seeds, if it is not the usual.
    """
    table = cells(runs)
    names = sorted({run["env_id"] for run in runs})
    usual = statistics.mode(len(found) for tasks in table.values() for found in tasks.values())
    rows = ["| replay | method | " + " | ".join(name.removesuffix("-v3") for name in names) + " |"]
    rows.append("|---" * (len(names) + 2) + "|")
    for (regime, method), tasks in table.items():
        row = [regime, method]
        for name in names:
            found = tasks.get(name, [])
            returns = [run["eval_return_mean"] for run in found]
            rates = [run["eval_success_rate"] for run in found if run["eval_success_rate"] is not None]
            text = short(np.mean(returns)) if found else ""
            if rates:
                text = f"{mean([SCORES['area'](run) for run in found]):.2f} · {np.mean(rates):.0%} ({text})"
            elif found:
                text += f" ({short(min(returns))} to {short(max(returns))})" if len(found) > 1 else ""
                on_the_way = mean([mean_from_start(run, "return") for run in found])
                text += "" if math.isnan(on_the_way) else f", in training {short(on_the_way)}"
            row.append(text + (f", n = {len(found)}" if len(found) not in (0, usual) else ""))
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def diagnostics_table(runs: list[dict]) -> str:
    """One row per replay size and method: diagnostics, means over the first and last fifth."""
    shown = [name for name in CURVES if name not in ("return", "success")]
    rows = ["| replay | method | " + " | ".join(shown).replace("_", " ") + " |\n" + "|---" * (len(shown) + 2) + "|"]
    for (regime, method), tasks in cells(runs).items():
        row = [regime, method]
        for name in shown:
            curves = [run["curves"].get(name, []) for group in tasks.values() for run in group]
            fifths = [[v for curve in curves for v in curve[part] if v is not None] for part in (slice(6), slice(-6, None))]
            row.append(" / ".join(number(mean(fifth), ".2g") for fifth in fifths) if any(fifths) else "-")
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


# -------------------- Plots --------------------
def style(method: str, methods) -> dict:
    """Colour and label of a method: its place in METHODS, then in the sorted rest of `methods`."""
    order = [*METHODS, *sorted(set(methods) - set(METHODS))]
    return {"color": COLORS[order.index(method) % len(COLORS)], "label": method}


def plot_curves(runs: list[dict]):
    """Training success, a row per replay size and a column per task: mean over the seeds, band from the worst to the best."""
    import matplotlib.pyplot as plt

    table, names = cells(runs), sorted({run["env_id"] for run in runs})
    methods = {method for _, method in table}
    regimes = list(dict.fromkeys(regime for regime, _ in table))
    width = max(2.4 * len(names), 5.6)  # inches
    legend = min(len(methods), int(width / 1.6))  # columns of the legend
    top = 0.1 + 0.19 * -(-len(methods) // legend)
    size = (width, 1.8 * len(regimes) + 0.3 + top)
    fig, axes = plt.subplots(len(regimes), len(names), figsize=size, sharex=True, sharey=True, squeeze=False)
    for (row, regime), (column, name) in itertools.product(enumerate(regimes), enumerate(names)):
        axis = axes[row][column]
        for method in [method for size, method in table if size == regime]:
            found = [run for run in table[regime, method].get(name, []) if has_curve(run, "success")]
            if found:
                curves = np.array([filled_curve(run, "success") for run in found])
                steps = np.array(found[0]["curves"]["steps"]) / 1000
                line = style(method, methods)
                axis.plot(steps, curves.mean(0), linewidth=1.3, **line)
                axis.fill_between(steps, curves.min(0), curves.max(0), color=line["color"], alpha=0.15, linewidth=0)
        if row == 0:
            axis.set_title(name.removesuffix("-v3"), fontsize=9)
        if column == 0:
            axis.set_ylabel(f"replay of {int(regime):,}" if is_size(regime) else regime, fontsize=8)
        axis.set_ylim(-0.03, 1.03)
        axis.tick_params(labelsize=7)
    fig.supxlabel("thousand environment steps (line: mean, band: from the worst to the best seed)", fontsize=9)
    fig.supylabel("success in training", fontsize=8)
    entries = {text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="upper center", ncols=legend, fontsize=8)
    fig.tight_layout(rect=(0, 0, 1, 1 - top / fig.get_figheight()))
    return fig


def plot_against_buffer(runs: list[dict], panels: dict[str, str]):
    """A panel {title: score} per quantity: mean over tasks and seeds of a method against its buffer size; textbook PPO."""
    import matplotlib.pyplot as plt

    table = cells(runs)
    methods = list(dict.fromkeys(method for _, method in table if method != "ppo"))
    fig, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.0), squeeze=False)
    for axis, (title, name) in zip(axes[0], panels.items(), strict=True):
        key = SCORES[name]
        if ("on-policy", "ppo") in table:
            tasks = table["on-policy", "ppo"]
            level = mean_of_tasks(values(tasks, sorted(tasks), key))
            axis.axhline(level, **style("ppo", ()) | {"linestyle": "--", "linewidth": 1, "label": "ppo, on-policy"})
        ticks = set()
        for i, method in enumerate(methods):
            points = []
            for (regime, name_of_row), tasks in table.items():
                if name_of_row == method and is_size(regime):
                    scores = values(tasks, sorted(tasks), key)
                    interval = bootstrap_interval(scores, mean_of_tasks, 500)
                    points.append((int(regime), mean_of_tasks(scores), *interval))
            points = [point for point in points if not math.isnan(point[1])]
            if not points:
                continue
            sizes, middles, lows, highs = np.array(points).T
            errors = np.maximum([middles - lows, highs - middles], 0)
            ticks |= set(sizes)
            sizes = sizes * 1.12 ** (i - (len(methods) - 1) / 2)  # side by side, or one interval hides another
            axis.errorbar(sizes, middles, errors, fmt="o", capsize=2, elinewidth=1.3, markersize=5, **style(method, methods))
        axis.set_xscale("log")
        axis.set_xticks(sorted(ticks), [f"{size:,.0f}" for size in sorted(ticks)], minor=False)
        axis.minorticks_off()
        axis.set_xlabel("replay in steps (means, 95 % bootstrap intervals)", fontsize=9)
        axis.set_title(title, fontsize=10)
        if name != "return":
            axis.set_ylim(-0.03, 1.03)
        axis.tick_params(labelsize=8)
    if axes[0][0].get_legend_handles_labels()[0]:
        axes[0][0].legend(fontsize=8)
    fig.tight_layout()
    return fig


def draw(path: Path, plot, *data) -> None:
    """Write the figure `plot(*data)`, unless the file shows it: it carries a digest of the data and of the function's text."""
    import matplotlib.pyplot as plt
    from PIL import Image

    digest = hashlib.sha256(repr((inspect.getsource(plot), data)).encode()).hexdigest()
    with contextlib.suppress(OSError), Image.open(path) as image:  # no file, or a damaged one
        if image.info.get("Digest") == digest:
            return
    figure = plot(*data)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None, "Digest": digest})
    os.replace(temporary, path)
    plt.close(figure)


# -------------------- GraphGPO --------------------
GRAPHGPO_CURVES = {
    "success": "charts/episodic_success",
    "held_out_success": "eval/success_rate",
    "excess_length": "charts/excess_length",
    "entropy": "losses/entropy",
    "unreachable": "graph/frac_unreachable",
    "singleton_steps": "graph/frac_singleton_steps",
    "groups_without_success": "graph/groups_without_success",
    "progress_steps_in_failures": "credit/frac_progress_steps_in_failures",
    "nonprogress_in_successes": "credit/frac_nonprogress_in_successes",
}


def collect_graphgpo(args: Args, keep=store) -> None:
    """Keep results/graphgpo_sokoban/runs/<episodes>/<run>.json of every finished run of graphgpo_sokoban.py."""
    for folder, result in finished_runs(args, "graphgpo-*", GRAPHGPO | of_kind("an integer", "args.total_episodes")):
        total = result["total_episodes"]
        file = (
            Path(args.results) / "graphgpo_sokoban" / "runs" / length_folder(result, "total_episodes") / f"{folder.name}.json"
        )
        if not is_stored(result, file):
            curves = gridded(read_scalars(folder, total), GRAPHGPO_CURVES, total, "episodes")
            keep(file, result | {"curves": curves, "machine": machine_of(folder)})


def mean_of_tasks(scores):
    """Mean over the tasks of the mean over a task's seeds."""
    return np.mean([task.mean(-1) for task in scores], axis=0)


def seed_mean(scores):
    """Mean over the seeds of the first (and only) task."""
    return scores[0].mean(-1)


def mean_and_interval(scores, form: str = ".3f") -> str:
    """Mean over the seeds with its 95 % bootstrap interval."""
    return span(np.mean(scores), bootstrap_interval([np.asarray(scores, dtype=float)], seed_mean), form)


def graphgpo_report(args: Args, new: dict[Path, dict] | None = None) -> str:
    """Table of graphgpo_sokoban.py's runs, and its plot unless --check; empty without runs."""
    by_method = collections.defaultdict(dict)
    for run in load(
        Path(args.results) / "graphgpo_sokoban", GRAPHGPO | ON_GRID | of_kind("a number", "curves.episodes.0"), new
    ).values():
        model = run["args"].get("model")
        task = run["args"].get("env_id", "Sokoban") + (f"-{Path(model).name}" if model else "")
        key = run["total_episodes"], run["versions"]["algorithm"], task
        by_method[key, run["exp_name"]][run["seed"]] = run
    parts = ["# GraphGPO on Sokoban", "Means over seeds with 95 % bootstrap intervals. Written by report.py."]
    area = functools.partial(area_under_curve, name="success")
    final = lambda run: run["eval_success_rate"]  # noqa: E731
    for total, version, env_id in sorted({key for key, _ in by_method}):
        names = sorted(name for key, name in by_method if key == (total, version, env_id))
        names.sort(key=lambda name: {"grpo": 0, "gigpo": 1, "graphgpo": 2}.get(name, 3))
        methods = {name: by_method[(total, version, env_id), name] for name in names}
        for name, runs in methods.items():
            refuse_mixture(f"{name}, {total:,} episodes", [*runs.values()])
        rows = ["| method | seeds | area under training success | IQM | P(larger area than GRPO) | held-out success, end |"]
        rows[0] += " P(more than GRPO) | credit's share of time |\n" + "|---" * 8 + "|"
        baseline = list(methods.get("grpo", {}).values())
        for name, runs in methods.items():
            runs = list(runs.values())
            better = []
            for score in (area, final):
                ours, theirs = ([np.array([score(run) for run in group])] for group in (runs, baseline))
                same = name == "grpo" or not baseline
                better.append(
                    "-" if same else span(probability_of_improvement(ours, theirs), improvement_interval(ours, theirs))
                )
            areas = [area(run) for run in runs]
            row = [name, len(runs), mean_and_interval(areas), number(interquartile_mean([areas]), ".3f"), better[0]]
            row += [mean_and_interval([final(run) for run in runs]), better[1]]
            share = np.sum([run["credit_seconds"] for run in runs]) / np.sum([run["wall_seconds"] for run in runs])
            rows.append("| " + " | ".join(map(str, [*row, f"{share:.0%}"])) + " |")
        task, other = ("", "") if env_id == "Sokoban" else (f"{env_id}, ", f"{env_id}-")
        parts += [f"## {task}{total:,} episodes, algorithm version {version}", "\n".join(rows)]
        differences = []
        compared = [("graphgpo", "gigpo"), ("gigpo", "grpo")]  # then each variant that both have
        compared += [(name, "gi" + name.removeprefix("graph")) for name in names if name.startswith("graphgpo-")]
        for better, worse in compared:
            seeds = sorted(methods.get(better, {}).keys() & methods.get(worse, {}).keys())
            if len(seeds) > 1:
                pairs = [(methods[better][seed], methods[worse][seed]) for seed in seeds]
                gaps = [np.array([score(a) - score(b) for a, b in pairs]) for score in (area, final)]
                gaps = [span(*gap_and_interval([gap]), "+.3f") for gap in gaps]
                differences.append(f"| {better} - {worse} | {len(seeds)} | {gaps[0]} | {gaps[1]} |")
        if differences:
            parts.append("Differences on the same seeds, hence the same levels (95 % intervals by Student's t):")
            parts.append("| difference | seeds | area | held-out success, end |\n|---|---|---|---|\n" + "\n".join(differences))
        shown = list(GRAPHGPO_CURVES)[2:]
        parts.append("Means over the run and the seeds (docs/graphgpo_sokoban.md explains them):")
        rows = ["| method | " + " | ".join(shown).replace("_", " ") + " |\n" + "|---" * (len(shown) + 1) + "|"]
        for name, runs in methods.items():
            curves = [[v for run in runs.values() for v in run["curves"].get(curve, []) if v is not None] for curve in shown]
            rows.append(f"| {name} | " + " | ".join(number(mean(v), ".3f") for v in curves) + " |")
        parts.append("\n".join(rows))
        if not args.check and {"grpo", "gigpo", "graphgpo"} & methods.keys():
            draw(Path(args.results) / "graphgpo_sokoban" / f"curves-{other}{total}-v{version}.png", plot_graphgpo, methods)
    machines = sorted({run["machine"] for runs in by_method.values() for run in runs.values()})
    return "\n\n".join([*parts, f"Machine: {'; '.join(machines)}."]) + "\n" if by_method else ""


def plot_graphgpo(methods: dict):
    """Success in training and on held-out levels against rollouts: mean over the seeds, band its 95 % bootstrap interval."""
    import matplotlib.pyplot as plt

    shown = [name for name in ("grpo", "gigpo", "graphgpo") if name in methods]
    labels = {"grpo": "GRPO", "gigpo": "GiGPO", "graphgpo": "GraphGPO"}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, curve, title in zip(axes, ("success", "held_out_success"), ("training levels", "held-out levels"), strict=True):
        ends = []
        for name, marker in zip(shown, "so^", strict=False):
            runs = [run for run in methods[name].values() if has_curve(run, curve)]
            if not runs:
                continue
            values = np.array([run["curves"][curve] for run in runs], dtype=float)
            keep = ~np.isnan(values).any(0)
            episodes, values = np.array(runs[0]["curves"]["episodes"])[keep] / 1000, values[:, keep]
            bands = np.array([bootstrap_interval([v], seed_mean, 500) for v in values.T])
            color = {"grpo": COLORS[7], "gigpo": COLORS[4], "graphgpo": COLORS[0]}[name]
            axis.plot(episodes, values.mean(0), color=color, marker=marker, markersize=3, linewidth=1.5)
            axis.fill_between(episodes, *bands.T, color=color, alpha=0.2, linewidth=0)
            ends.append((values.mean(0)[-1], name, color))
        height = 0.0
        for end, name, color in sorted(ends):  # labels at the lines' ends, pushed apart where they would overlap
            height = max(end, height + 0.05 * axis.get_ylim()[1])
            text = {"color": color, "va": "center", "fontsize": 9, "fontweight": "bold"}
            axis.annotate(labels[name], (episodes[-1], height), (6, 0), textcoords="offset points", **text)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("thousand rollouts", fontsize=9)
        last = next(iter(methods[shown[0]].values()))["curves"]["episodes"][-1] / 1000
        axis.set_xlim(0, last * 1.2)
        axis.set_xticks(np.linspace(0, last, 5))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"success rate, mean of {len(methods[shown[-1]])} seeds", fontsize=9)
    axes[0].set_ylim(0)
    fig.tight_layout()
    return fig


# -------------------- POPO on Countdown --------------------
def popo_curve(run: dict, axis: str, grid: np.ndarray) -> np.ndarray:
    """Held-out pass rate of a run, interpolated at `grid` rollouts or updates."""
    points = [(point[axis], point["success_rate"]) for point in run["curve"]]
    return np.interp(grid, *np.array(points, dtype=float).T)


def popo_rollouts(run: dict) -> int:
    """Rollouts of a run at one batch per iteration, as all methods but DAPO make them."""
    return run["iterations"] * run["args"]["num_prompts"] * run["args"]["group_size"]


def percent(scores: np.ndarray, statistic=interquartile_mean) -> str:
    """Statistic over the seeds and its 95 % bootstrap interval, in percent."""
    return span(statistic([100 * scores]), bootstrap_interval([100 * scores], statistic), ".1f")


def popo_table(methods: dict[str, list[dict]]) -> str:
    """One row per method: pass rate at the end, at equal rollouts, area, against GRPO, and rollouts to DAPO's accuracy."""
    columns = "method | runs | rollouts | at the end, IQM | at the end, mean | at equal rollouts, IQM"
    columns += " | area at equal rollouts, IQM | P(area above GRPO's) | share of DAPO's rollouts to its accuracy"
    rows = [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
    budget = min(popo_rollouts(run) for runs in methods.values() for run in runs)
    grid = np.linspace(0, budget, GRID_POINTS + 1)
    areas = {name: np.array([popo_curve(run, "rollouts", grid).mean() for run in runs]) for name, runs in methods.items()}
    for name, runs in methods.items():
        final = np.array([run["eval_success_rate"] for run in runs])
        equal = np.array([popo_curve(run, "rollouts", np.array([budget]))[0] for run in runs])
        row = [name, len(runs), f"{np.mean([run['total_timesteps'] for run in runs]):,.0f}"]
        row += [percent(final), percent(final, seed_mean), percent(equal), percent(areas[name]), "-", "-"]
        if name != "grpo" and "grpo" in methods:
            pair = [areas[name]], [areas["grpo"]]
            row[-2] = span(probability_of_improvement(*pair), improvement_interval(*pair))
        if name != "dapo" and "dapo" in methods:
            target = np.mean([run["eval_success_rate"] for run in methods["dapo"]])
            total = np.mean([run["total_timesteps"] for run in methods["dapo"]])
            curve = np.mean([popo_curve(run, "rollouts", grid) for run in runs], axis=0)
            reached = grid[curve >= target]
            best = f"not reached: {final.mean() / target:.0%} of its accuracy"
            row[-1] = f"{reached[0] / total:.0%}" if len(reached) else best
        rows.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(rows)


def is_about_age(run: dict) -> bool:
    """GRPO with another objective, or on answers that are iterations old: a run of the table below."""
    args = outcome_args(run["args"])
    return args.get("method") == "grpo" and (args["lag"], args["objective"]) != (0, "decoupled")


def lag_table(runs: list[dict]) -> str:
    """GRPO's area and final pass rate: a row per objective, a column per age of the answers in iterations."""
    groups = collections.defaultdict(list)
    for run in runs:
        args = outcome_args(run["args"])
        area = popo_curve(run, "rollouts", np.linspace(0, popo_rollouts(run), GRID_POINTS + 1)).mean()
        name = re.sub(r"-(fast|lr-[0-9e.-]+)$", "", run["exp_name"])  # a step size, which is the whole table's
        name = re.sub(r"^grpo-|-lag-\d+$", "", {"grpo": "grpo-decoupled"}.get(name, name))
        groups[name, args["lag"]].append((area, run["eval_success_rate"]))
    objectives, lags = dict.fromkeys(name for name, _ in groups), sorted({lag for _, lag in groups})
    columns = [(score, lag) for score in ("area", "end") for lag in lags]
    rows = ["| objective | seeds | " + " | ".join(f"{score}, lag {lag}" for score, lag in columns) + " |"]
    rows.append("|---" * (len(columns) + 2) + "|")
    for name in objectives:
        found = {lag: np.array(groups[name, lag]).T for lag in lags if (name, lag) in groups}
        row = [name, "/".join(str(found[lag].shape[1]) if lag in found else "-" for lag in lags)]
        row += [percent(found[lag][int(score == "end")], seed_mean) if lag in found else "-" for score, lag in columns]
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def plot_popo(methods: dict[str, list[dict]], axis_name: str):
    """Held-out pass rate against rollouts or updates: mean over the seeds, band of its 95 % bootstrap interval."""
    import matplotlib.pyplot as plt

    places = POPO_METHODS | {name: "ablations" for name in methods if name not in POPO_METHODS}
    panels = ["methods", "ablations"] if any(places[name] == "ablations" for name in methods) else ["methods"]
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in [name for name in methods if panel in places[name]]:
            grid = np.linspace(0, min(run["curve"][-1][axis_name] for run in methods[name]), GRID_POINTS + 1)
            curves = 100 * np.array([popo_curve(run, axis_name, grid) for run in methods[name]])
            rng = np.random.default_rng(0)
            draws = [curves[rng.integers(0, len(curves), len(curves))].mean(0) for _ in range(1000)]
            line = {"color": COLORS[list(places).index(name) % len(COLORS)], "label": name}
            axis.plot(grid, curves.mean(0), linewidth=1.6, **line)
            axis.fill_between(grid, *np.percentile(draws, [2.5, 97.5], axis=0), color=line["color"], alpha=0.15, linewidth=0)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel({"rollouts": "rollouts (responses)", "updates": "updates (gradient steps)"}[axis_name], fontsize=9)
        if axis.lines:
            axis.legend(fontsize=8)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("held-out pass rate, %", fontsize=9)
    fig.tight_layout()
    return fig


def write_popo_report(args: Args, write, new: dict[Path, dict] | None) -> None:
    """Table and plots of results/popo_countdown/, one set per task, length, step size and algorithm version."""
    folder, groups = Path(args.results) / "popo_countdown", collections.defaultdict(lambda: collections.defaultdict(list))
    for run in load(folder, POPO | MACHINE, new).values():
        task = run["env_id"] + (f"-{Path(run['args']['model']).name}" if run["args"].get("model") else "")
        group = task, run["args"]["total_timesteps"], run["args"]["learning_rate"], run["versions"]["algorithm"]
        groups[group][re.sub(r"-(fast|lr-[0-9e.-]+)$", "", run["exp_name"])].append(run)
    for (task, steps, rate, version), found in sorted(groups.items()):
        order = [*POPO_METHODS, *sorted(found.keys() - POPO_METHODS.keys())]
        methods = {method: found[method] for method in order if method in found}
        name = f"{task}-{steps}-lr{rate:g}-v{version}"
        for method, runs in methods.items():
            refuse_mixture(f"{method}, {name}", runs)
        runs = [run for runs in methods.values() for run in runs]
        machines = "; ".join(sorted({run["machine"] for run in runs}))
        heading = f"{len(runs)} runs, {len({run['seed'] for run in runs})} seeds, algorithm version {version}. Machine: "
        heading += f"{machines}. Held-out pass rate in percent, 95 % bootstrap intervals over the seeds. Written by report.py."
        by_age = [run for run in runs if is_about_age(run)]
        methods = {name: runs for name, runs in methods.items() if not is_about_age(runs[0])}
        parts = [f"# {task}, {steps:,} rollouts, step size {rate:g}", heading]
        if methods:
            parts.append(popo_table(methods))
        if by_age:
            parts.append("GRPO on answers that are so many iterations old (lag); means over the seeds:")
            parts.append(lag_table(methods.get("grpo", []) + by_age))
        if methods:
            parts += [f"![pass rate against {axis}]({axis}-{name}.png)" for axis in ("rollouts", "updates")]
        write(folder / f"benchmark-{name}.md", "\n\n".join(parts) + "\n")
        if methods and not args.check:
            for axis in ("rollouts", "updates"):
                draw(folder / f"{axis}-{name}.png", plot_popo, methods, axis)


# -------------------- VLA on LIBERO --------------------
VLA_CURVES = {
    "success": "charts/episodic_success",
    "entropy": "losses/entropy",
    "utilization": "gipo/utilization",
    "effective_sample_size": "gipo/effective_sample_size",
    "logratio_std": "gipo/logratio_std",
    "policy_lag": "gipo/policy_lag",
    "clipfrac": "losses/clipfrac",
}


def collect_vla(args: Args, keep=store) -> None:
    """Keep results/vla_tiny/runs/<steps>/<run>.json of every finished run of `benchmark.sh vla`, a point per rollout."""
    keys = VLA | of_kind("an integer", "args.total_timesteps")
    for folder, result in finished_runs(args, "vla-tiny", keys, LIBERO_REGIMES):
        steps = length_folder(result, "total_timesteps", first_version=3)  # of the versions before none is told apart
        file = Path(args.results) / "vla_tiny" / "runs" / steps / f"{folder.name}.json"
        if not is_stored(result, file):
            scalars = read_scalars(folder, result["total_timesteps"])
            points = {name: dict(scalars.get(tag, [])) for name, tag in VLA_CURVES.items()}
            steps = sorted(points["entropy"])
            curves = {name: [round(p[step], 4) if step in p else None for step in steps] for name, p in points.items()}
            keep(file, result | {"curves": curves | {"steps": steps}, "machine": machine_of(folder)})


def vla_success(run: dict, states: range, evaluation: int = -1) -> float:
    """Share of the initial states in `states` that an evaluation of the run solved, the last one unless told."""
    return float(np.mean([solved for _, state, solved in run["evaluations"][evaluation]["successes"] if state in states]))


def vla_report(args: Args, new: dict[Path, dict] | None = None) -> str:
    """Tables of `benchmark.sh vla`, and their plots unless --check, a set per suite, length, version; empty without runs."""
    groups = collections.defaultdict(lambda: collections.defaultdict(dict))
    runs = load(Path(args.results) / "vla_tiny", VLA | CURVES_TOO | of_kind("a number", "curves.steps.0"), new)
    for run in labelled(runs, LIBERO_REGIMES):
        group = run["env_id"], run["total_timesteps"], run["versions"]["algorithm"]
        groups[group][run["args"]["buffer_size"], run["method"]][run["seed"]] = run
    parts = []
    for (suite, steps, version), by_cell in sorted(groups.items()):
        plot = f"curves-{suite}-{steps}-v{version}.png"
        runs = [run for cell in by_cell.values() for run in cell.values()]
        machines = "; ".join(sorted({run["machine"] for run in runs}))
        heading = f"{len(runs)} run{'s' * (len(runs) > 1)}, algorithm version {version}. Machine: {machines}. Success in "
        heading += "percent, one number per seed; greedy policy but for the last three columns. Rows with other seeds are not "
        heading += "to be compared. Written by report.py."
        parts += [f"# GIPO and PPO on {suite}, tiny preset, {steps:,} steps", heading, *vla_tables(by_cell)]
        parts.append(f"![success in training]({plot})")
        if not args.check:
            draw(Path(args.results) / "vla_tiny" / plot, plot_vla, by_cell)
    return "\n\n".join(parts) + "\n" if parts else ""


def vla_tables(by_cell: dict) -> list[str]:
    """Success of every cell {(buffer size, method): {seed: run}}, GIPO less the others on shared seeds, and diagnostics."""
    rows = ["| buffer | method | seeds | cloned, 50 states | after RL, 50 states | states 0-39 | 40-49 (never trained on) |"]
    rows[0] += " sampled: cloned | whole run | last 100 episodes |"
    rows.append("|---" * (rows[0].count("|") - 1) + "|")
    shown = ["effective_sample_size", "utilization", "logratio_std", "clipfrac", "entropy", "policy_lag"]
    means = ["| buffer | method | seeds | " + " | ".join(shown).replace("_", " ") + " |", "|---" * (len(shown) + 3) + "|"]
    percents = lambda scores: ", ".join(number(100 * score, ".0f") for score in scores)  # noqa: E731
    final = lambda run: vla_success(run, range(50))  # noqa: E731
    training = functools.partial(area_under_curve, name="success")
    for (size, method), cell in sorted(by_cell.items()):
        refuse_mixture(f"{method}, buffer of {size:,}", [*cell.values()])
        found = [cell[seed] for seed in sorted(cell)]
        name = f"| {size:,} | {method} | {', '.join(map(str, sorted(cell)))} | "
        row = [percents(vla_success(run, range(50), 0) for run in found), percents(map(final, found))]
        row += [percents(vla_success(run, states) for run in found) for states in (range(40), range(40, 50))]
        # The policy is still the clone's while only the critic trains.
        row += [percents(filled_curve(run, "success")[: run["args"]["critic_warmup"] or 1][-1] for run in found)]
        lasts = [math.nan if run["train_success_rate"] is None else run["train_success_rate"] for run in found]
        row += [percents(map(training, found)), percents(lasts)]
        rows.append(name + " | ".join(row) + " |")
        averages = [mean([v for run in found for v in run["curves"].get(key, ()) if v is not None]) for key in shown]
        means.append(name + " | ".join(number(value, ".3f") for value in averages) + " |")
    tables = ["\n".join(rows)]
    differences = ["| buffer | against | seeds | success after RL, 50 states | success in training |", "|---" * 5 + "|"]
    for size, other in sorted(by_cell):
        ours, theirs = by_cell.get((size, "gipo"), {}), by_cell[size, other]
        seeds = sorted(ours.keys() & theirs.keys())
        if other != "gipo" and len(seeds) > 1:
            pairs = [(ours[seed], theirs[seed]) for seed in seeds]
            gaps = [np.array([score(a) - score(b) for a, b in pairs]) for score in (final, training)]
            gaps = [span(*gap_and_interval([gap]), "+.3f") if len(seeds) > 2 else number(gap.mean(), "+.3f") for gap in gaps]
            differences.append(f"| {size:,} | {other} | {', '.join(map(str, seeds))} | {gaps[0]} | {gaps[1]} |")
    if len(differences) > 2:
        tables.append("GIPO less the others on shared seeds and clones (95 % interval by Student's t from three seeds on):")
        tables.append("\n".join(differences))
    return [*tables, "Means over the run and the seeds (docs/gipo_vla_libero.md explains them):", "\n".join(means)]


def plot_vla(by_cell: dict):
    """Success in training against steps, a panel per buffer size: mean over the seeds, and every seed as a thin line."""
    import matplotlib.pyplot as plt

    sizes = sorted({size for size, _ in by_cell})
    methods = [*METHODS, *sorted({method for _, method in by_cell} - set(METHODS))]
    fig, axes = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes), 3.0), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for method in [m for m in methods if (size, m) in by_cell]:
            cell, line = by_cell[size, method], style(method, methods)
            line["label"] += f", seed{'s' * (len(cell) > 1)} {', '.join(map(str, sorted(cell)))}"
            curves = 100 * np.array([filled_curve(run, "success") for run in cell.values() if has_curve(run, "success")])
            if not len(curves):
                continue
            steps = next(iter(cell.values()))["curves"]["steps"]
            axis.plot(steps, curves.T, color=line["color"], linewidth=0.7, alpha=0.4)
            axis.plot(steps, curves.mean(0), linewidth=1.8, **line)
        axis.set_title(f"buffer of {size:,} steps", fontsize=10)
        axis.set_xlabel("environment steps", fontsize=9)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_ylim(0, 100)
        axis.tick_params(labelsize=8)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0][0].set_ylabel("success of the last 100 episodes, %", fontsize=9)
    fig.tight_layout()
    return fig


# -------------------- Any runs --------------------
COMPARED = RUN | of_kind("a text", "env_id") | of_kind("an integer", "total_timesteps") | of_kind("a number", "sps")
COMPARED |= of_kind("a number or null", "eval_success_rate eval_return_mean train_return_mean")
COLUMNS = {  # of the table of --compare: what it shows of a run
    "steps": lambda run: run["total_timesteps"],
    "success": lambda run: run["eval_success_rate"],
    "return": lambda run: run["eval_return_mean"],
    "training return": lambda run: run["train_return_mean"],
    "area, success": lambda run: area_under_curve(run, "success"),
    "area, return": lambda run: mean_from_start(run, "return"),
    "steps/s": lambda run: run["sps"],
}
LEGEND = "Mean [lowest, highest] over the seeds. success, return: of the final evaluation; training return: of the last 100 "
LEGEND += "episodes (POPO: groups); area: mean of the training curve. Before the first finished episode success is 0; returns "
LEGEND += "begin with it. A run that reports no success counts as 0 where another run of its task reports one."
GAPS = "Gap: area of `run` less area of `against` (of success where both report it, else of the return, from where both "
GAPS += "curves have begun), mean over the seeds that both have (pairs), then over the tasks, which are taken as given. "
GAPS += "Brackets: 95 % interval, Student's t. If it leaves out zero, the two differ; of twenty rows that do not, about one "
GAPS += "looks as if they did. larger in: pairs in which `run` has the larger area, ties half."
# Arguments that make another task of an env_id, so that areas cannot be compared.
TASK_ARGS = "env_kwargs max_steps room_size num_boxes wall_density min_solution max_solution slippery game_level".split()


def run_folders(folder: Path, depth: int = 3) -> list[Path]:
    """The folders that hold a run, finished or not, up to `depth` levels below `folder`; not what lies within a run."""
    names = [f"{'*/' * level}{name}" for level in range(1, depth + 1) for name in ("args.json", "result.json")]
    found = {file.parent for name in names for file in folder.glob(name)}
    return sorted(path for path in found if found.isdisjoint(path.parents))


def stored_files(folder: Path) -> list[Path]:
    """The collected runs in a folder such as results/runs/300000-v2."""
    return sorted(folder.glob("*__*__*.json"))


def read_runs(folders: list[Path]) -> tuple[dict[tuple[str, str], list[dict]], list[str]]:
    """{(task, name): finished runs with their curves}, and a line about every run that is not in them as it should be.

    Collected runs stand beside run folders for the tasks and replay sizes of these, and those without replay, but for copies
    of the same runs and for seeds on which settings were chosen.
    """
    found, notes, own = collections.defaultdict(dict), [], set()
    for path in [path for folder in folders for path in run_folders(folder)]:
        if not (path / "result.json").exists():
            try:
                args, scalars = read(path / "args.json", {}), read_scalars(path, 0)
                own.add((args.get("env_id"), args.get("buffer_size")))
            except ReportError as error:
                notes.append(f"unfinished: {error}")
                continue
            step = max((points[-1][0] for points in scalars.values()), default=0)
            total = args.get("total_timesteps", args.get("total_episodes", "?"))
            notes.append(f"unfinished: {path}, at step {step} of {total}")
            continue
        run = read(path / "result.json", COMPARED)
        total = run.get("total_episodes", run["total_timesteps"])  # GraphGPO's curves are over episodes
        try:
            scalars = read_scalars(path, total)
        except ReportError as error:
            notes.append(f"without its curves: {error}")
            scalars = {}
        run["curves"] = gridded(scalars, {name: CURVES[name] for name in ("return", "success")}, total, "steps")
        name = run["exp_name"] if folders == [path.parent] else f"{path.parent}/{run['exp_name']}"
        other, _ = found[run["env_id"], name].setdefault(run["seed"], (path, run))
        if other != path:
            raise ReportError(f"{other} and {path} hold runs of one task, name and seed: move one of them away")
    finished = [run for by_seed in found.values() for _, run in by_seed.values()]
    own |= {(run["env_id"], run["args"].get("buffer_size")) for run in finished}
    own |= {(task, 0) for task, _ in own}  # without replay
    # benchmark.sh collects its runs; a repetition has another speed.
    copies = {(identity(run), run["sps"]) for run in finished}
    for folder in (folder for folder in folders if stored_files(folder)):
        if "curves" not in read(stored_files(folder)[0], COMPARED):
            raise ReportError(f"--compare {folder}: its runs have no training curves, so that only their own table shows them")
        collected = [(file, read(file, COMPARED | CURVES_TOO)) for file in stored_files(folder)]
        if own:
            collected = [(f, run) for f, run in collected if (run["env_id"], run["args"].get("buffer_size")) in own]
        core = [(f, run) for f, run in collected if "policy_head" in run["args"] and run["versions"]["algorithm"] > 1]
        chosen = [f for f, run in core if chose_settings(run)]
        if chosen:
            notes.append(f"left out of {folder}, for seeds that chose settings: {len(chosen)} of {len(collected)} runs")
        if not collected:
            notes.append(f"{folder} has no run of these tasks and replay sizes")
        for file, run in collected:
            if file not in chosen and (identity(run), run["sps"]) not in copies:
                curves = run["curves"]
                run["curves"] = {"steps": curves["episodes"]} | curves if "episodes" in curves else curves
                found[run["env_id"], f"{file.parent}/{run['exp_name']}"][run["seed"]] = file, run
    completed = iter(with_failures([run for _, by_seed in sorted(found.items()) for _, (_, run) in sorted(by_seed.items())]))
    runs = {}
    for (task, name), by_seed in sorted(found.items()):
        group = [next(completed) for _ in by_seed]
        settings = [setting(run) for run in group]
        different = [f"{key} ({', '.join(str(one.get(key)) for one in settings)})" for key in differences(settings)]
        if different:
            notes.append(f"not averaged: {name} on {task}, whose runs differ in {', '.join(different)}")
            runs |= {(task, f"{name}, seed {run['seed']}"): [run] for run in group}
        else:
            runs[task, name] = group
    return runs, notes


def comparison_table(runs: dict[tuple[str, str], list[dict]]) -> str:
    """One row per task and name, without the columns that no run fills; aligned, to be read on a terminal, too."""

    def cell(values):
        known = [value for value in values if value is not None and not math.isnan(value)]
        spread = f" [{short(min(known))}, {short(max(known))}]" if len(known) > 1 and min(known) < max(known) else ""
        return short(mean(known)) + spread if known else "-"

    rows = [[task, name, ", ".join(str(run["seed"]) for run in group)] for (task, name), group in runs.items()]
    rows = [["task", "run", "seeds"], *rows]
    for column, key in COLUMNS.items():
        entries = [cell([key(run) for run in group]) for group in runs.values()]
        if {*entries} != {"-"}:
            rows = [[*row, entry] for row, entry in zip(rows, [column, *entries], strict=True)]
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table that can be read on a terminal, too; the first row has the names of the columns."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def same_task(one: dict, two: dict) -> bool:
    """Whether the areas of two runs with one env_id may be compared: equal length, but for a rollout, and one task."""
    lengths = sorted(run.get("total_episodes", run["total_timesteps"]) for run in (one, two))
    a, b = outcome_args(one["args"]), outcome_args(two["args"])
    return lengths[1] <= 1.05 * lengths[0] and all(a[key] == b[key] for key in TASK_ARGS if key in a and key in b)


def gaps_of_seeds(ours: list[dict], theirs: list[dict]) -> tuple[str, np.ndarray]:
    """Of two rows on one task: whose area it is, success or return, and the gaps of the seeds that both have, curves given."""
    by_seed = {run["seed"]: run for run in theirs}
    pairs = [(run, by_seed[run["seed"]]) for run in ours if run["seed"] in by_seed and same_task(run, by_seed[run["seed"]])]
    for quantity in ("success", "return"):
        having = [pair for pair in pairs if all(has_curve(run, quantity) for run in pair)]
        if having:
            return quantity, np.array([area_gap(*pair, quantity) for pair in having])
    return "return", np.array([])


def area_gap(one: dict, two: dict, quantity: str) -> float:
    """Mean gap between two training curves; of the return only where both have begun: more environments begin later."""
    curves = [filled_curve(run, quantity) for run in (one, two)]
    if quantity == "success":
        return np.mean(np.nan_to_num(curves[0])) - np.mean(np.nan_to_num(curves[1]))
    return float(np.nanmean(curves[0] - curves[1]))


def gap_table(runs: dict[tuple[str, str], list[dict]], stored: set[str]) -> tuple[str, list[str]]:
    """One row per two names with two common seeds or more on a task: the mean gap in area of equal seeds; may be empty. And
    a line about what is not in it.

    Tasks that report success are taken together, if each of the names has the same settings on them. Others stand alone,
    since every return has a unit of its own. Names in the folders of `stored` are compared with those of other folders only,
    and among many names those with one replay size, and those without replay.
    """
    rows = [["task", "run", "against", "area of", "pairs", "mean gap in area", "larger in"]]
    names = sorted({name for _, name in runs}, key=lambda name: (str(Path(name).parent) in stored, name))
    sizes, unlike, few = collections.defaultdict(set), [], []
    for (_, name), group in runs.items():
        sizes[name] |= {run["args"].get("buffer_size") or 0 for run in group}
    for ours, theirs in itertools.combinations(names, 2):
        if str(Path(ours).parent) in stored:
            continue
        if len(names) > 6 and len((sizes[ours] | sizes[theirs]) - {0}) > 1:
            unlike.append(f"{ours} and {theirs}")
            continue
        gaps = {}  # {what is taken together: {task: gaps of its seeds}}
        for task in sorted({task for task, name in runs if name == ours and (task, theirs) in runs}):
            cells = runs[task, ours], runs[task, theirs]
            quantity, found = gaps_of_seeds(*cells)
            together = json.dumps([setting(cell[0]) for cell in cells]) if quantity == "success" else task
            if len(found) > 1:
                gaps.setdefault((quantity, together), {})[task] = found
            else:
                few.append(f"{task} of {ours} and {theirs}")
        for (quantity, _), by_task in gaps.items():
            of_seeds = [*by_task.values()]
            count, (gap, (low, high)) = sum(map(len, of_seeds)), gap_and_interval(of_seeds)
            better = sum(((task > 0) + 0.5 * (task == 0)).sum() for task in of_seeds)
            text = functools.partial(number, form=".3f") if quantity == "success" else short
            tasks = ", ".join(by_task) if len(by_task) < 3 else f"{len(by_task)} tasks"
            shown = [f"{text(gap)} [{text(low)}, {text(high)}]", f"{better:g} of {count}"]
            rows.append([tasks, ours, theirs, quantity, str(count), *shown])
    notes = [("gaps between rows of unlike replay size, since the rows are more than six; name fewer folders", unlike)]
    notes += [("gaps with fewer than two common seeds of one length and --env-kwargs", few)] if len(rows) > 1 else []
    notes = [f"left out, {words}: {', '.join(pairs[:4])}" + ", ..." * (len(pairs) > 4) for words, pairs in notes if pairs]
    return aligned(rows) if len(rows) > 1 else "", notes


def on_one_axis(runs: list[dict], quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (30,) up to the end of the shortest run, and the runs' curves there, (runs, 30): DAPO's seeds differ in length."""
    axes = [run["curves"]["steps"] for run in runs]
    steps = np.array(min(axes, key=lambda axis: axis[-1]), dtype=float)
    return steps, np.array([np.interp(steps, axis, filled_curve(run, quantity)) for axis, run in zip(axes, runs, strict=True)])


def plot_comparison(runs: dict[tuple[str, str], list[dict]]):
    """Training return, and success where there is one, a panel per task: mean over the seeds, band from lowest to highest."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for _, name in runs))
    own = {name: METHODS.index(name.partition(", ")[0]) for name in names if name.partition(", ")[0] in METHODS}
    places = own if 0 < len({*own.values()}) == len(names) else {name: place for place, name in enumerate(names)}
    of_episodes = {task for (task, _), group in runs.items() if "total_episodes" in group[0]}  # GraphGPO's
    curves = {  # of every panel: {name: (steps, values)}
        (quantity, task): {
            name: on_one_axis(shown, quantity)
            for (of, name), group in runs.items()
            if of == task and (shown := [run for run in group if has_curve(run, quantity)])
        }
        for quantity in ("return", "success")
        for task in dict.fromkeys(task for task, _ in runs)
    }
    curves = {panel: lines for panel, lines in curves.items() if lines}
    columns = max(min(len(curves), 4), 1)
    rows = max(-(-len(curves) // columns), 1)
    legend = 0.6 + 0.17 * -(-len(names) // columns)  # inches
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.0 * rows + legend), squeeze=False)
    for axis, ((quantity, task), lines) in zip(axes.flat, curves.items(), strict=False):
        for name, (steps, values) in lines.items():
            place = places[name]
            line = {"color": COLORS[place % len(COLORS)], "linestyle": LINES[place // len(COLORS) % len(LINES)]}
            label = name.replace("$", r"\$")  # which would begin a formula
            axis.plot(steps, values.mean(0), label=f" {label}" if label.startswith("_") else label, linewidth=1.6, **line)
            axis.fill_between(steps, values.min(0), values.max(0), color=line["color"], alpha=0.15, linewidth=0)
        axis.set_title(f"{task}, {quantity}", fontsize=10)
        axis.set_xlabel("episodes" if task in of_episodes else "steps", fontsize=9)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    entries = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    title = "training: mean over the seeds, band from the lowest to the highest"
    fig.legend(entries.values(), entries.keys(), title=title, loc="upper center", ncols=columns, fontsize=8, title_fontsize=8)
    fig.tight_layout(rect=(0, 0, 1, 1 - (0.3 + 0.17 * -(-len(entries) // columns)) / fig.get_figheight()))
    return fig


def compare(folders: list[Path]) -> None:
    """Table and plot of any runs: to the terminal, and as compare.md and compare.png into the first folder."""
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"--compare {folder}: there is no such folder")
        if (folder / "args.json").exists():
            raise ReportError(f"--compare {folder} is a run itself: name the folder that holds it, {folder.parent}")
        if not run_folders(folder) + stored_files(folder):
            raise ReportError(f"--compare {folder}: no folder in it holds a run, that is an args.json or a result.json")
    runs, notes = read_runs(folders)
    file = folders[0] / "compare.md"
    parts = [comparison_table(runs), LEGEND] if runs else []
    stored = {str(folder) for folder in folders if stored_files(folder)}
    gaps, left_out = gap_table(runs, stored)
    notes += left_out
    if gaps:
        parts += [gaps, GAPS]
    elif not left_out and {str(Path(name).parent) for _, name in runs} - stored and len({name for _, name in runs}) > 1:
        notes.append("no gaps: they need two rows of one task, --env-kwargs and length with two common seeds or more")
    notes = "\n".join(f"* {note}" for note in notes)
    text = "\n\n".join(part for part in [*parts, notes] if part)
    try:
        if runs:
            draw(file.with_suffix(".png"), plot_comparison, runs)
            file.write_text(f"{text}\n\n![training curves](compare.png)\n")
            text += f"\n\nwritten: {file}, {file.with_suffix('.png')}"
    except OSError as error:
        raise ReportError(f"{file} and its plot cannot be written: {error.strerror or error}") from error
    finally:
        print(text, flush=True)


# -------------------- Report --------------------
def write_report(args: Args, new: dict[Path, dict] | None = None) -> list[str]:
    """Tables, plots and the README block from the collected JSON files; the names of files whose text has changed.

    With --check nothing is written, and runs in `new`, {file: run}, count as if they were stored.
    """
    results, changed = Path(args.results), []
    groups = collections.defaultdict(list)
    for run in labelled(load(results, BENCHMARK | ON_GRID | of_kind("a number", "curves.steps.0"), new)):
        groups[run["args"]["total_timesteps"], run["versions"]["algorithm"]].append(run)

    def write(path: Path, text: str) -> None:
        if not path.exists() or path.read_text() != text:
            changed.append(str(path))
            if not args.check:
                path.write_text(text)

    for folder, text in (("graphgpo_sokoban", graphgpo_report(args, new)), ("vla_tiny", vla_report(args, new))):
        if text:
            write(results / folder / "tables.md", text)
    readme_block = lead_block = paper_block = ""
    for (steps, version), runs in sorted(groups.items()):
        runs = with_failures(runs)
        for (regime, method), tasks in cells(runs).items():
            refuse_mixture(f"{method} {regime}, {steps:,} steps", [run for found in tasks.values() for run in found])
        name = f"{steps}-v{version}"
        tuning = [run for run in runs if chose_settings(run)]
        if len(tuning) == len(runs):  # a benchmark of somebody's own
            tuning = []
        runs = [run for run in runs if run not in tuning]
        seeds, tasks = len({run["seed"] for run in runs}), len({run["env_id"] for run in runs})
        tasks = f"{tasks} task{'s' * (tasks > 1)}"
        heading = f"{len(runs)} runs of {steps:,} steps each: {tasks}, up to {seeds} seeds, algorithm version {version}."
        scored = [run for run in runs if run["eval_success_rate"] is not None]  # Gymnasium's own tasks report none
        known = [run for run in scored if run["method"] in METHODS] or scored
        main = [run for run in known if run["env_id"].removesuffix("-v3") in README_TASKS] or known
        common, scope = comparable(main) if main else ([], "")
        own = {run["env_id"] for run in main}
        machines = "; ".join(sorted({run["machine"] for run in runs}))
        parts = [f"# Benchmark, {steps:,} steps", f"{heading} Machine: {machines}. Written by report.py.", EXPLANATION]
        parts += [scope, aggregate_table(common)] if main else []
        of_paper = {f"{task}-v3" for task in PAPER_TASKS} - own
        further = {run["env_id"] for run in scored} - own - of_paper  # of somebody's own
        for tasks in (of_paper, further):
            if others := [run for run in known if run["env_id"] in tasks]:
                others, other_scope = comparable(others)
                parts += [other_scope, aggregate_table(others)]
        for words, tasks in (("", own), (", other tasks", of_paper), (", further tasks", further)):
            table = same_replay_table([run for run in scored if run["env_id"] in tasks])
            parts += [f"On the same replay, by the tasks and seeds that both have{words}:", table] if table else []
        complete = readme_runs(main)
        three = readme_runs([run for run in main if run["seed"] in README_SEEDS])  # equal seeds at every size
        if three:
            parts += ["Means instead of interquartile means, seeds 4 to 6, as in the README:"]
            parts += [readme_table(three, intervals=True)]
        by_task = [found for tasks in cells(main).values() for found in tasks.values()]
        whole = [run for found in by_task if {run["seed"] for run in found} >= {*README_SEEDS} for run in found]
        every_row, shared_scope = shared(whole or main) if main else ([], "")  # without rows that were only begun
        more_rows = len(cells(every_row)) > len(cells(common))
        if more_rows:
            parts += [shared_scope, aggregate_table(every_row), f"![scores against buffer size](buffer-all-rows-{name}.png)"]
        unscored = {run["env_id"] for run in runs} - {run["env_id"] for run in scored}
        by_task = [[run for run in runs if run["env_id"] in tasks] for tasks in (own, of_paper, further, unscored)]
        parts += [BY_TASK, *(task_table(group) for group in by_task if group)]
        if tuning:
            tuned, tuned_scope = shared_if_any(tuning)
            parts += [f"{TUNING} {tuned_scope}", tuning_table(tuned)]
        on_main = [run for run in runs if run["env_id"] in own] or runs  # the paper's tasks have a few rows only
        alike, alike_scope = shared_if_any([run for run in on_main if run["method"] in METHODS] or on_main)
        tasks = {run["env_id"] for run in alike}
        of_others = [run for run in on_main if run["method"] not in METHODS and run["env_id"] in tasks]
        alike += [run for run in of_others if run not in alike]
        fewer = ", ".join(f"{method} {regime}" for (regime, method), found in cells(alike).items() if found.keys() < tasks)
        if fewer and "every row" in alike_scope:
            alike_scope = f"{alike_scope.replace('every row has', 'the standard rows have')[:-1]}; fewer of them in {fewer}:"
        parts += [f"{DIAGNOSTICS} {alike_scope}", diagnostics_table(alike)]
        write(results / f"benchmark-{name}.md", "\n\n".join(parts) + "\n")
        replayed = [run for run in common if run["regime"] != "on-policy"]
        if not main and not args.check:
            rows = {
                (task, f"{m}, {regime}"): found for (regime, m), tasks in cells(runs).items() for task, found in tasks.items()
            }
            draw(results / f"curves-{name}.png", plot_comparison, rows)
        if main and not args.check:
            draw(results / f"curves-{name}.png", plot_curves, common or main)
            if replayed:
                panels = {"success": "success", "area under success": "area", "return": "return"}
                draw(results / f"buffer-{name}.png", plot_against_buffer, common, panels)
                if more_rows:
                    draw(results / f"buffer-all-rows-{name}.png", plot_against_buffer, every_row, panels)
                panels = {score: score for score in ("utilization", "effective sample size")}
                draw(results / f"staleness-{name}.png", plot_against_buffer, replayed, panels)
        if complete and steps == README_STEPS:
            tasks = sorted({run["env_id"].removesuffix("-v3") for run in complete})
            names = "" if len(tasks) == len(README_TASKS) else f" of {NUMBERS[len(README_TASKS)].lower()} ({', '.join(tasks)})"
            words = {"tasks": NUMBERS[len(tasks)], "names": names, "steps": steps}
            words["seeds"] = f"seeds {min(README_SEEDS)} to {max(README_SEEDS)}"
            link = f"[Areas per task, intervals, diagnostics](results/benchmark-{name}.md)."
            text = README_TABLE.format(**words)
            shown = readme_table([run for run in three if run["regime"] in README_SIZES])
            readme_block = f"{text}\n\n{shown}\n\n{link}\n"
            lead_block = lead_table(main) + "\n"
            paper_block = paper_table(known) + "\n"
    write_popo_report(args, write, new)
    pattern = re.compile(r"(<!-- benchmark -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
    docs = Path(args.readme).with_name("docs")
    for file, block in (
        (Path(args.readme), readme_block),
        (docs / "benchmark.md", lead_block),
        (docs / "paper.md", paper_block),
    ):
        if Path(args.readme).exists() and file.exists() and block.strip():
            write(file, pattern.sub(lambda match, block=block: match[1] + block + match[2], file.read_text()))
    return changed


def main(args: Args) -> None:
    if args.pending:
        print("\n".join(pending(sys.stdin.read().splitlines(), args)))
        return
    runs = Path(args.runs)
    benchmark = [folder for suite in SUITES for folder in runs.glob(suite)]
    outside = [path for path in run_folders(runs, depth=2) if path.parent not in benchmark]
    if args.compare or (outside and not benchmark and args.runs != Args.runs and not args.check):
        compare([Path(folder) for folder in args.compare or [args.runs]])
        return
    if not args.check:
        if outside:
            print(f"{runs} has runs outside the benchmark, too: python report.py --compare {runs} shows them")
        deeper = sorted(file.parent for file in runs.glob("*/*/*/result.json"))
        if deeper:
            print(f"not looked at: {deeper[0]} and {len(deeper) - 1} more: runs belong into {runs}/SUITE/RUN")
        begun = [path for path in run_folders(runs, depth=2) if path not in outside and not (path / "result.json").exists()]
        if begun:
            print(f"not finished, and so in no table: {begun[0]} and {len(begun) - 1} more")
        new = {}
        for collect_suite in (collect, collect_graphgpo, collect_popo, collect_vla):
            collect_suite(args, new.__setitem__)
        if new:
            write_report(dataclasses.replace(args, check=True), new)  # what is wrong with them shows before they are stored
        for file, result in new.items():
            store(file, result)
    changed = write_report(args)
    if args.check and changed:
        sys.exit("not current: " + ", ".join(changed) + "; run python report.py")
    print("\n".join(["report written:", *changed]) if changed else "report is current")


if __name__ == "__main__":
    try:
        args = tyro.cli(Args)
        if "--compare" in sys.argv and not args.compare:
            raise ReportError("--compare names no folder of runs: give one or more")
        main(args)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder of somebody else
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
