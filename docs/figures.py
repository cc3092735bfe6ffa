"""The pictures of the README and of its pages, written into docs/images.

    python docs/figures.py weight     # how much a sample counts against its log ratio, for GIPO and for PPO's clip
    python docs/figures.py curves     # success in training on four tasks, from the JSON files of the benchmark
    python docs/figures.py gif --model runs/NAME/best_model.pt    # the policy of a run before and after training, on one goal
    python docs/figures.py sokoban --model runs/NAME/model.pt     # the same on three levels of Sokoban
    python docs/figures.py smollm2    # held-out answers of a language model in training, from the JSON files of the benchmark
    python docs/figures.py age --runs FOLDER ...                  # what of the replay still counts, by its age
    python docs/figures.py libero --videos BEFORE.mp4 AFTER.mp4   # two videos of --capture-video, side by side
    python docs/figures.py graph --model runs/NAME/model.pt       # the graph of states of one group of Sokoban rollouts

door-open-v3.gif is of `python gipo_continuous.py --env-id door-open-v3`, sokoban.gif of `python graphgpo_sokoban.py`, and
results/graphgpo_sokoban/graph.png of the same with `--total-episodes 1280`. libero.gif is of the clone and of the policy after
RL of `./benchmark.sh vla --methods gipo --regimes recent`, each with --evaluate --capture-video. All have seed 1.

Filming without a display needs MUJOCO_GL=egl or osmesa, as --capture-video does.
"""

import collections
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gipo_continuous as gipo
import graphgpo_sokoban as graphgpo
import ppo_baseline as ppo
import report

IMAGES = Path(__file__).resolve().parent / "images"
RUNS = IMAGES.parent.parent / "results" / "runs" / "300000-v2"
REPLAYS = (20_000, 100_000)  # steps, a row of panels each
TASKS = ("button-press-topdown-v3", "door-open-v3", "drawer-open-v3", "push-v3")
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # of Okabe and Ito, 2008; also apart in grey


METHODS = {  # of the benchmark -> label and style of its line
    "gipo": ("GIPO", {"color": BLUE, "linestyle": "-", "linewidth": 2.2}),
    "ppo-clip-0.5": ("PPO, clip 0.5", {"color": GREEN, "linestyle": "-."}),
    "ppo-clip-0.2": ("PPO, clip 0.2", {"color": RED, "linestyle": "--"}),
}


LANGUAGE_RUNS = IMAGES.parent.parent / "results" / "popo_countdown" / "runs" / "768-smollm2"
LANGUAGE_METHODS = {
    "popo": ("POPO", {"color": BLUE, "linestyle": "-", "linewidth": 2.2}),
    "grpo": ("GRPO", {"color": RED, "linestyle": "--"}),
    "grpo-filter": ("GRPO, effective groups", {"color": RED, "linestyle": ":"}),
    "dapo": ("DAPO", {"color": GREY, "linestyle": "-."}),
}


@dataclass
class Args:
    figure: tyro.conf.Positional[Literal["weight", "curves", "smollm2", "age", "gif", "libero", "sokoban", "graph"]]
    """what to draw"""
    model: str = ""
    """gif, sokoban, graph: model.pt or best_model.pt of a run"""
    runs: tuple[Path, ...] = ()
    """age: folders of runs, each stopped with a checkpoint in its middle"""
    videos: tuple[Path, ...] = ()
    """libero: of the policy before and after training"""
    goal: int = 0
    """gif: number of the training goal"""
    every: int = 5
    """gif: keep one frame of so many steps"""
    steps: int = 200
    """gif: length in steps; a task that is solved earlier ends 20 steps later"""


def coefficient(script, flags: str, logratio: torch.Tensor, advantage: float) -> torch.Tensor:
    """d surrogate / d logratio at advantage +-1, by the script's own objective: 1 on-policy, 0 where a sample has no say."""
    args = script.parse_args(flags.split())
    logratio = logratio.clone().requires_grad_()
    objective, _ = script.policy_objective(logratio, torch.full_like(logratio, advantage), args)
    return torch.autograd.grad(objective.sum(), logratio)[0] / advantage


def draw_weight() -> None:
    """Coefficient of A grad log pi against the log ratio, a panel per sign of the advantage."""
    logratio = torch.linspace(-1.2, 1.2, 2401)
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.1), sharey=True)
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        for name, script, flags, style in (
            ("no weight", gipo, "--trust-weight none", {"color": GREY, "linestyle": ":"}),
            ("PPO, clip 0.2", ppo, "--clip-coef 0.2", {"color": RED, "linestyle": "--"}),
            ("PPO, clip 0.5", ppo, "--clip-coef 0.5", {"color": GREEN, "linestyle": "-."}),
            ("GIPO, sigma 0.2", gipo, "--sigma 0.2", {"color": BLUE, "linestyle": "-", "linewidth": 2.4}),
        ):
            axis.plot(logratio, coefficient(script, flags, logratio, advantage), label=name, **style)
        axis.set_title(f"{'good' if advantage > 0 else 'bad'} action (A {'>' if advantage > 0 else '<'} 0)", fontsize=10)
        axis.set_xlabel("log ratio: log π(a|s) − log μ(a|s)", fontsize=9)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_ylim(0, 2)
        axis.set_xlim(-1.2, 1.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("weight of the sample's gradient", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    fig.tight_layout()
    fig.savefig(IMAGES / "weight.png", dpi=110)


def seeds_stored(name: str) -> set[int]:
    """The seeds of a row's runs in results/."""
    return {int(file.stem.rsplit("__", 1)[1]) for file in RUNS.glob(f"{name}__*.json")}


def draw_curves() -> None:
    """Success in training, a row per replay size and a panel per task: mean over the seeds that every method has there, band
    from the worst to the best."""
    fig, axes = plt.subplots(len(REPLAYS), len(TASKS), figsize=(8.6, 4.3), sharex=True, sharey=True)
    counts = []
    for row, replay in zip(axes, REPLAYS, strict=True):
        seeds_of = [seeds_stored(f"{task}__{name}_{replay}") for task in TASKS for name in METHODS]
        seeds = sorted(set.intersection(*seeds_of) - {*report.TUNING_SEEDS})
        if not seeds:
            sys.exit(f"error: no seed has all of {', '.join(METHODS)} with {replay} steps on {', '.join(TASKS)} in {RUNS}")
        counts.append(report.NUMBERS.get(len(seeds), str(len(seeds))).lower())
        for axis, task in zip(row, TASKS, strict=True):
            for name, (label, style) in METHODS.items():
                runs = [json.loads((RUNS / f"{task}__{name}_{replay}__{seed}.json").read_text()) for seed in seeds]
                curves = np.array([report.filled_curve(run, "success") for run in runs])
                steps = np.array(runs[0]["curves"]["steps"]) / 1000
                axis.plot(steps, curves.mean(0), label=label, **style)
                axis.fill_between(steps, curves.min(0), curves.max(0), color=style["color"], alpha=0.1, linewidth=0)
            axis.set_xticks([0, 100, 200, 300])
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        row[0].set_ylabel(f"success, replay {replay:,}", fontsize=9)
    for axis, task in zip(axes[0], TASKS, strict=True):
        axis.set_title(task.removesuffix("-v3"), fontsize=9)
    line = f"line: mean of {' and '.join(counts)} seeds, band: worst to best seed"
    fig.supxlabel(f"thousand steps in the environment ({line})", fontsize=8)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 0.96))
    fig.savefig(IMAGES / "curves.png", dpi=110)


def draw_smollm2() -> None:
    """Held-out answers of SmolLM2 on Countdown-2 that are right: every evaluation as a dot, and a line through the means over
    the seeds of the first evaluation, the second, and so on.

    DAPO samples more than it trains on, so its evaluations lie elsewhere; those beyond the others' end are left out.
    """
    fig, axis = plt.subplots(figsize=(5.2, 2.7))
    grid = np.arange(0, 769, 192)
    for i, (name, (label, style)) in enumerate(LANGUAGE_METHODS.items()):
        files = [LANGUAGE_RUNS / f"countdown-2__{name}__{seed}.json" for seed in report.README_SEEDS]
        if not all(file.exists() for file in files):  # a method that is not finished
            continue
        runs = [json.loads(file.read_text()) for file in files]
        points = [[(point["rollouts"], 100 * point["success_rate"]) for point in run["curve"]] for run in runs]
        points = np.array([of_run[: min(map(len, points))] for of_run in points])  # (seeds, evaluations, 2)
        points = points[:, points[..., 0].mean(0) <= 1.1 * grid[-1]]
        axis.plot(*points.mean(0).T, label=label, marker="o", markersize=4, **style)
        x, y = points.reshape(-1, 2).T
        axis.plot(x + 6 * (i - 1.5), y, ".", color=style["color"], markersize=4, alpha=0.5)
    axis.set_xticks(grid)
    axis.set_xlabel("answers sampled in training (lines: means of three seeds)", fontsize=8)
    axis.set_ylabel("right held-out answers, %", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False)
    fig.tight_layout()
    fig.savefig(IMAGES / "smollm2.png", dpi=110)


# -------------------- What of the replay still counts --------------------
AGES = {"0 to 2": (0, 2), "3 to 9": (3, 9), "10 to 19": (10, 19), "20 or more": (20, math.inf)}  # in rollouts
BY_AGE_FIGURES = "effective sample size", "share with next to no weight", "spread of the log ratio"
BY_AGE = IMAGES.parent.parent / "results" / "replay_by_age.json"


def diagnose(folder: Path) -> dict:
    """Three figures of a run's whole replay by the age of the samples, with the policy and the objective of its checkpoint.

    Of coef = trust * ratio, which multiplies A grad log pi and is 1 on-policy: effective sample size and share below 0.001.
    Of the log ratio per action dimension: its standard deviation.
    """
    saved = json.loads((folder / "args.json").read_text())
    script = ppo if "clip_coef" in saved else gipo
    args = script.Args(**{field.name: saved[field.name] for field in dataclasses.fields(script.Args)})
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    replay = checkpoint["replay"]  # (T, S, ...)
    agent = script.Agent(replay["obs"].shape[-1], replay["actions"].shape[-1], args)
    agent.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        _, logprob, _ = agent.get_action_and_logprob(replay["obs"], replay["actions"])
        ends = {"end_values": script.get_end_values(agent, replay["next_obs"], replay["dones"])}
        advantages, _ = script.compute_advantages(agent.get_value(replay["obs"]), replay | ends, args)
        logratio = logprob - replay["logprobs"]
        _, trust = script.policy_objective(logratio, (advantages - advantages.mean()).unsqueeze(-1), args)
    coef, ages = trust * torch.exp(logratio), checkpoint["iteration"] - replay["versions"]
    rows = {}
    for name, (low, high) in AGES.items():
        chosen = (ages >= low) & (ages <= high)
        w, spread = coef[chosen], logratio[chosen].std(correction=0)
        effective = w.mean() ** 2 / (w**2).mean()
        figures = effective, (w < 1e-3).float().mean(), spread
        rows[name] = {key: round(value.item(), 4) for key, value in zip(BY_AGE_FIGURES, figures, strict=True)}
    run = {key: saved[key] for key in ("env_id", "exp_name", "seed", "buffer_size")}
    return run | {"step": checkpoint["iteration"] * args.num_envs * args.num_steps, "ages": rows}


def draw_age(options: Args) -> None:
    """A panel per figure: mean of a method's runs for every age, and the runs as dots."""
    if options.runs:
        runs = [diagnose(folder) for folder in options.runs]
        missing = {f"{method}_N" for method in METHODS} - {
            run["exp_name"].replace(str(run["buffer_size"]), "N") for run in runs
        }
        if missing:
            sys.exit(f"error: --runs has none named {', '.join(sorted(missing))}, N being its buffer size: name all three")
        BY_AGE.write_text(json.dumps(runs, indent=1) + "\n")
    runs = json.loads(BY_AGE.read_text())
    fig, axes = plt.subplots(1, 3, figsize=(8.6, 2.6))
    for axis, figure in zip(axes, BY_AGE_FIGURES, strict=True):
        for i, (method, (label, style)) in enumerate(METHODS.items()):
            of_method = [run["ages"].values() for run in runs if run["exp_name"] == f"{method}_{run['buffer_size']}"]
            found = [[row[figure] for row in ages] for ages in of_method]
            places = np.arange(len(AGES)) + 0.12 * (i - 1)
            axis.plot(places, np.mean(found, axis=0), label=label, **style)
            axis.plot(places, np.transpose(found), ".", color=style["color"], markersize=4, alpha=0.5)
        axis.set_title(figure, fontsize=9)
        axis.set_xticks(range(len(AGES)), AGES, fontsize=7)
        axis.set_ylim(0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    fig.supxlabel("age of the samples in rollouts (lines: means, dots: runs)", fontsize=8)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 0.93))
    fig.savefig(IMAGES / "age.png", dpi=110)


# -------------------- Films --------------------
def draw_libero(options: Args) -> None:
    """Every fourth frame of two videos, side by side."""
    from moviepy import VideoFileClip

    films = [[Image.fromarray(frame) for frame in VideoFileClip(str(path)).iter_frames()][::4] for path in options.videos]
    for frames, label in zip(films, ("before RL", "after RL"), strict=True):
        frames[:] = [frame.resize((240, 240)) for frame in frames]
        for i, frame in enumerate(frames):
            ImageDraw.Draw(frame).text((6, 4), f"{label}, step {4 * i}", fill="white")
    save_side_by_side(films, "libero.gif")


def save_side_by_side(films: list[list[Image.Image]], name: str) -> None:
    """Two films of 240 x 240 pixels as one GIF; the shorter one waits for the longer."""
    length, pictures = max(map(len, films)), []
    for left, right in zip(*[frames + frames[-1:] * (length - len(frames)) for frames in films], strict=True):
        both = Image.new("RGB", (484, 240), "white")
        both.paste(left, (0, 0))
        both.paste(right, (244, 0))
        pictures.append(both.quantize(96))
    path = IMAGES / name
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def film(agent, args, label: str, options: Args) -> list[Image.Image]:
    """Labelled frames of one episode of the deterministic policy; ends early once the task is solved."""
    args = dataclasses.replace(args, env_kwargs=json.dumps({"camera_name": "corner2"}))
    env = gipo.make_env(args, 0, render_mode="rgb_array")()
    env.get_wrapper_attr("toggle_sample_tasks_on_reset")(False)
    env.unwrapped.set_task(env.get_wrapper_attr("tasks")[options.goal])
    obs, frames, last = env.reset(seed=0)[0], [], options.steps
    for step in range(options.steps):
        if step % options.every == 0:
            picture = Image.fromarray(np.flipud(env.render())).resize((240, 240))  # corner cameras are upside down
            ImageDraw.Draw(picture).text((6, 4), f"{label}, step {step}", fill="white")
            frames.append(picture)
        with torch.no_grad():
            action, *_ = agent.get_action_and_logprob(torch.as_tensor(obs, dtype=torch.float32), deterministic=True)
        obs, *_ = env.step(gipo.to_env_action(action.numpy(), env.action_space))
        if env.get_wrapper_attr("success") == 1.0:
            last = min(last, step + 20)
        if step >= last:
            break
    env.close()
    return frames


def draw_gif(options: Args) -> None:
    """Before training on the left, after it on the right."""
    saved = torch.load(options.model, weights_only=True)
    args = gipo.Args(**saved["args"])
    films = []
    for trained in (False, True):
        torch.manual_seed(args.seed)
        agent = gipo.Agent(len(saved["model"]["obs_mean"]), make_action_dim(args), args)
        if trained:
            agent.load_state_dict(saved["model"])
        films.append(film(agent, args, "trained" if trained else "untrained", options))
    save_side_by_side(films, f"{args.env_id}.gif")


def make_action_dim(args) -> int:
    """Number of action dimensions of the run's environment."""
    env = gipo.make_env(args, 0)()
    env.close()
    return env.action_space.shape[0]


# -------------------- Sokoban --------------------
CELL = 20  # pixels
FRAMES = 3  # of a step


def sokoban_run(path: str, num_envs: int, trained: bool = True):
    """A saved model of graphgpo_sokoban.py, or what it was before training: -> agent, environments, arguments."""
    weights, args = graphgpo.load_model(path)
    envs = graphgpo.make_env(args, num_envs)
    torch.manual_seed(args.seed)
    agent = graphgpo.make_agent(args, envs)
    if trained:
        agent.load_state_dict(weights)
    return agent, envs, args


def episodes(agent, envs, levels, temperature: float):
    """Play one episode per level, side by side; yields the rows that moved and who succeeded, first before any has."""
    envs.reset(levels)
    alive = np.arange(len(levels))
    yield alive, np.zeros(len(levels), dtype=bool)
    while len(alive):
        with torch.no_grad():
            actions, *_ = agent.act(envs.observe(alive), envs.choices(alive), temperature, want_logprobs=False)
        success, done = envs.step(alive, actions)
        yield alive, success
        alive = alive[~done]


def draw_room(envs, row: int, boxes, player) -> Image.Image:
    """Picture of a room; boxes and player are places (row, column) and may be between two cells."""
    size = envs.args.room_size
    picture = Image.new("RGB", (size * CELL, size * CELL), (245, 245, 240))
    canvas, targets = ImageDraw.Draw(picture), np.argwhere(envs.targets[row].reshape(size, -1))
    shapes = [("rectangle", place, 0, (90, 90, 90)) for place in np.argwhere(envs.walls[row].reshape(size, -1))]
    shapes += [("rectangle", place, 4, (240, 228, 66)) for place in targets]
    for place in boxes:
        there = (place == targets).all(1).any()
        shapes.append(("rectangle", place, 2, (0, 158, 115) if there else (160, 100, 50)))
    for shape, (y, x), margin, color in [*shapes, ("ellipse", player, 4, (30, 30, 30))]:
        corner = CELL * np.array([x, y]) + margin
        getattr(canvas, shape)([*corner, *(corner + CELL - 1 - 2 * margin)], fill=color)
    return picture


def places(envs, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 2) and player (2,) of a room as it is now."""
    size = envs.args.room_size
    return np.argwhere(envs.boxes[row].reshape(size, -1)), np.array(divmod(int(envs.player[row]), size))


def draw_sokoban(options: Args) -> None:
    """The first three held-out levels that the trained policy solves and that need six steps; above, the untrained policy."""
    films, solved = [], set()
    for trained in (False, True):
        agent, envs, args = sokoban_run(options.model, graphgpo.load_model(options.model)[1].eval_episodes, trained)
        moments = []
        for rows, success in episodes(agent, envs, graphgpo.held_out_levels(args), args.eval_temperature):
            moments.append([places(envs, row) for row in range(envs.num_envs)])
            solved |= set(rows[success]) if trained else set()
        films.append(moments + moments[-1:] * 6)  # the last picture stays for a while
    shown = [row for row in sorted(solved) if envs.optimal[row] >= 6][:3]
    width = args.room_size * CELL + 8
    last, pictures = args.max_steps or 15, []
    for frame in range(FRAMES * (min(map(len, films)) - 1)):
        step, share = frame // FRAMES, frame % FRAMES / FRAMES
        picture = Image.new("RGB", (3 * width - 8, 2 * (width + 12)), "white")
        for i, (moments, label) in enumerate(zip(films, ("untrained", "trained"), strict=True)):
            ImageDraw.Draw(picture).text((2, i * (width + 12)), f"{label}, step {min(step, last)}", fill="black")
            for j, row in enumerate(shown):
                spots = [(1 - share) * a + share * b for a, b in zip(moments[step][row], moments[step + 1][row], strict=True)]
                picture.paste(draw_room(envs, row, *spots), (j * width, i * (width + 12) + 14))
        pictures.append(picture.quantize(32))
    path = IMAGES / "sokoban.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=110, loop=0, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {len(solved)} of {envs.num_envs} levels solved")


def draw_graph(options: Args) -> None:
    """One group of rollouts: states in columns by distance to success, steps coloured by their credit A^G.

    Of 16 groups on held-out levels that of the most states among those with both outcomes.
    """
    agent, envs, args = sokoban_run(options.model, 128)
    steps, at, pictures = collections.defaultdict(list), {}, {}
    for rows, success in episodes(agent, envs, [(0, row // 8) for row in range(128)], temperature=1.0):
        for row, key, won in zip(rows.tolist(), envs.keys(rows), success, strict=True):
            if row in at:
                steps[row // 8].append((at[row], graphgpo.SUCCESS if won else key, row))
            at[row] = key
            pictures.setdefault((row // 8, key), (row, *places(envs, row)))
    won = {group: len({row for _, target, row in rows if target == graphgpo.SUCCESS}) for group, rows in steps.items()}
    group = max((group for group in steps if 0 < won[group] < 8), key=lambda group: len({step[0] for step in steps[group]}))
    sources, targets, _ = zip(*steps[group], strict=True)
    distances = graphgpo.graph_distances(sources, targets)
    credits = graphgpo.standardise(graphgpo.graph_rewards(targets, distances, args), sources)
    images = {key: np.asarray(draw_room(envs, *what)) for (number, key), what in pictures.items() if number == group}
    figure = plot_graph(sources, targets, distances, credits, images, f"{won[group]} of 8 rollouts succeeded")
    figure.savefig(IMAGES.parent.parent / "results" / "graphgpo_sokoban" / "graph.png", dpi=110, bbox_inches="tight")


def plot_graph(sources, targets, distances, credits, images, title: str):
    """The picture of a graph; `images` shows its states."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    edges, neighbours = collections.defaultdict(list), collections.defaultdict(list)
    for source, target, credit in zip(sources, targets, credits, strict=True):
        edges[source, target].append(credit)
        neighbours[source].append(target)
        neighbours[target].append(source)
    far, lost = int(max(distances.values())), [state for state in neighbours if state not in distances]
    tall = max(4, *collections.Counter(distances.values()).values(), math.ceil(len(lost) / 4))
    column = {state: far - d for state, d in distances.items()}
    column |= {state: -1.5 - i // tall for i, state in enumerate(lost)}  # packed into columns at the left
    height = dict.fromkeys(neighbours, 0.0)
    for _ in range(10):  # order every column by the mean height of its neighbours: fewer crossings
        for x in set(column.values()):
            members = sorted((s for s in column if column[s] == x), key=lambda s: np.mean([height[n] for n in neighbours[s]]))
            height |= {state: (i + 0.5) / len(members) * tall for i, state in enumerate(members)}

    left, strongest = min(column.values()) - 0.6, max(np.abs(credits).max(), 1e-9)
    fig, axis = plt.subplots(figsize=(1.25 * (max(far, 5) + 0.6 - left), 0.78 * (tall + 2)))
    axis.set(xlim=(left, max(far, 5) + 0.6), ylim=(-1.1, tall + 0.9))
    axis.axis("off")
    for (source, target), values in edges.items():
        strength, bend, gap = abs(values[0]) / strongest, 0.3 if column[source] == column[target] else 0.12, 14
        begin, end = (np.array([column[state], height[state]]) for state in (source, target))
        if source == target:  # a step that changed nothing, such as one into a wall: a loop above the state
            begin, end, bend, gap = begin + np.array([0.14, 0.28]), end + np.array([-0.14, 0.28]), 1.3, 0
        hue = np.array([0, 114, 178] if values[0] > 0 else [213, 94, 0]) / 255
        arrow = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}", "shrinkA": gap, "shrinkB": gap}
        arrow |= {"color": (1 - strength) * 0.8 + strength * hue, "linewidth": 0.8 + 0.7 * math.sqrt(len(values))}
        axis.annotate("", end, begin, arrowprops=arrow | {"zorder": 1 + strength})
    for state in neighbours:
        spot = column[state], height[state]
        frame = {"edgecolor": "#CC79A7", "linewidth": 3} if state == sources[0] else {"edgecolor": "grey", "linewidth": 0.6}
        if state == graphgpo.SUCCESS:
            style = {"color": "white", "bbox": {"facecolor": "#009E73", "boxstyle": "round"}}
            axis.text(*spot, "success", ha="center", zorder=5, **style)
        else:
            image = OffsetImage(images[state], zoom=30 / len(images[state]), interpolation="antialiased")
            axis.add_artist(AnnotationBbox(image, spot, pad=0.15, bboxprops=frame, zorder=5))
    for distance in range(far + 1):
        axis.text(far - distance, -0.45, str(distance), ha="center")
    words = f"{len(lost)} states without an observed way; then by distance to success along observed steps"
    axis.text(left + 0.1, -0.95, words)
    words = "blue: better than the mean of the state, orange: worse, thicker: more often, pink frame: start"
    axis.set_title(f"{title}\n{words}", loc="left", fontsize=10)
    return fig


if __name__ == "__main__":
    options = tyro.cli(Args)
    IMAGES.mkdir(exist_ok=True)
    if options.figure in ("weight", "curves", "smollm2"):
        {"weight": draw_weight, "curves": draw_curves, "smollm2": draw_smollm2}[options.figure]()
    else:
        drawers = {"age": draw_age, "gif": draw_gif, "libero": draw_libero, "sokoban": draw_sokoban, "graph": draw_graph}
        drawers[options.figure](options)
