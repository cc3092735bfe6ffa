"""The pictures of the README, written into docs/images.

    python docs/figures.py weight     # how much a sample counts against its log ratio, for GIPO and for PPO's clip
    python docs/figures.py curves     # success in training on four tasks, from the JSON files of the benchmark
    python docs/figures.py gif --model runs/NAME/best_model.pt    # the policy of a run before and after training, on one goal

door-open-v3.gif is of `python gipo_continuous.py --env-id door-open-v3`, seed 1.

Filming without a display needs MUJOCO_GL=egl or osmesa, as --capture-video does.
"""

import dataclasses
import json
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
import ppo_baseline as ppo
import report

IMAGES = Path(__file__).resolve().parent / "images"
RUNS = IMAGES.parent.parent / "results" / "v1" / "runs" / "300000"
TASKS = ("button-press-topdown-v3", "door-open-v3", "drawer-open-v3", "push-v3")
BLUE, RED, GREY = "#0072B2", "#D55E00", "#666666"  # of Okabe and Ito, 2008; also apart in grey


METHODS = {  # name in RUNS -> label and style of its line
    "gipo_stale": ("GIPO", {"color": BLUE, "linestyle": "-", "linewidth": 2.2}),
    "ppo-clip-0.5_stale": ("PPO, clip 0.5", {"color": RED, "linestyle": "-."}),
    "ppo-clip_stale": ("PPO, clip 0.2", {"color": RED, "linestyle": "--"}),
}


@dataclass
class Args:
    figure: tyro.conf.Positional[Literal["weight", "curves", "gif"]]
    """what to draw"""
    model: str = ""
    """gif: best_model.pt of a run"""
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
            ("PPO, clip 0.5", ppo, "--clip-coef 0.5", {"color": RED, "linestyle": "-."}),
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


def draw_curves() -> None:
    """Success in training on replay of 20,000 steps: mean over three seeds, band from the worst to the best."""
    fig, axes = plt.subplots(1, len(TASKS), figsize=(8.6, 2.5), sharey=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for name, (label, style) in METHODS.items():
            runs = [json.loads(path.read_text()) for path in sorted(RUNS.glob(f"{task}__{name}__*.json"))]
            curves = np.array([report.filled_curve(run, "success") for run in runs])
            steps = np.array(runs[0]["curves"]["steps"]) / 1000
            axis.plot(steps, curves.mean(0), label=label, **style)
            axis.fill_between(steps, curves.min(0), curves.max(0), color=style["color"], alpha=0.1, linewidth=0)
        axis.set_title(task.removesuffix("-v3"), fontsize=9)
        axis.set_xticks([0, 100, 200, 300])
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("success in training", fontsize=9)
    fig.supxlabel("thousand steps in the environment (line: mean of three seeds, band: worst to best seed)", fontsize=8)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 0.93))
    fig.savefig(IMAGES / "curves.png", dpi=110)


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
    length = max(map(len, films))
    films = [frames + frames[-1:] * (length - len(frames)) for frames in films]
    pictures = []
    for left, right in zip(*films, strict=True):
        both = Image.new("RGB", (484, 240), "white")
        both.paste(left, (0, 0))
        both.paste(right, (244, 0))
        pictures.append(both.quantize(96))
    path = IMAGES / f"{args.env_id}.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def make_action_dim(args) -> int:
    """Number of action dimensions of the run's environment."""
    env = gipo.make_env(args, 0)()
    env.close()
    return env.action_space.shape[0]


if __name__ == "__main__":
    options = tyro.cli(Args)
    IMAGES.mkdir(exist_ok=True)
    if options.figure == "gif":
        draw_gif(options)
    else:
        {"weight": draw_weight, "curves": draw_curves}[options.figure]()
