"""PPO with the clipped surrogate (arXiv 1707.06347) on continuous control, the baseline of gipo_continuous.py, in one file.

    rho  = pi(a|s) / mu(a|s),  mu = the policy that acted
    loss = -mean(min(rho * A, clip(rho, 1 - eps, 1 + eps) * A))

    python ppo_baseline.py --env-id reach-v3        # or MT10, or a Gymnasium id with a Box of actions
    -> success rate 1.0 on the 50 training goals after 300,000 steps, in 3 minutes on one CPU core

--buffer-size 0 (default) is the textbook algorithm: one rollout, stored advantages, shuffled transitions, epochs.
A larger --buffer-size is PPO-clip on replayed segments with recomputed advantages, all else as in gipo_continuous.py; compare:
--buffer-size 5120 --num-steps 16 --minibatch-size 128 --policy-head categorical --ratio per-dim --ent-coef 0.001.

Read from make_env down to train; evaluation, processes, files and checks come after it.
Docs: docs/gipo_continuous.md.  Method: https://arxiv.org/abs/1707.06347
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "metaworld==3.1.1",
#     "mujoco==3.3.0",
#     "packaging==26.3",
#     "numpy==2.4.6",
#     "scipy==1.17.1",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "matplotlib==3.11.2",
# ]
# ///

import collections
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
import weakref
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin

try:  # before mujoco: with MUJOCO_GL=osmesa the LLVM of triton, part of PyTorch's CUDA builds, crashes after that of OSMesa
    import triton  # noqa: F401
except ImportError:
    pass

import gymnasium as gym
import metaworld
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from metaworld.wrappers import OneHotWrapper, RandomTaskSelectWrapper

META_WORLD = metaworld.ALL_V3_ENVIRONMENTS
MT10 = list(metaworld.env_dict.MT10_V3)
ALGORITHM_VERSION = 2  # raised whenever equal arguments give other results; the benchmark never mixes versions
MAX_EPISODE_STEPS = 10_000  # of an environment that sets no time limit: without one, evaluation might never end
MAX_EVAL_ENVS = 10  # episodes that an evaluation runs side by side
MAX_LOG_COEF = 20.0  # exp(20) is finite in float32 with room to spare; exp(l) alone overflows at l = 88; above 20 no gradient
MAX_MAGNITUDE = 1e15  # of rewards and observations: a float32 holds the sum of their squares
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Arguments that concern the machine or the files: a resumed run may change them. Results then differ by rounding (cuda,
# torch_compile) or not at all, unless an environment draws from the global generators (async_envs).
MACHINE_ARGS = "run_dir resume overwrite evaluate checkpoint_every capture_video track wandb_project".split()
MACHINE_ARGS += "async_envs overlap cuda torch_compile torch_threads".split()


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


@dataclasses.dataclass
class Args:
    # ---- experiment
    exp_name: str = "ppo"
    """name of this experiment: the run lives in <run-dir>/{env_id}__{exp_name}__{seed}"""
    seed: int = 1
    """seed of the networks, the sampling, and the Meta-World goals (each seed has its own 50 training goals)"""
    run_dir: str = "runs"
    """parent folder of all runs"""
    resume: Annotated[bool | str, OPTIONAL_FOLDER] = False
    """continue an interrupted run exactly where its last checkpoint is: give its folder, or the same command and --resume"""
    overwrite: bool = False
    """delete an existing run of the same name first"""
    evaluate: str | None = None
    """path of a model.pt: evaluate it, with the environment and seed it was trained on, and do nothing else"""
    eval_every: int = 100_000
    """environment steps between evaluations (0: only at the end)"""
    eval_episodes: int = 50
    """episodes per evaluation (0: never evaluate); Meta-World: one per goal, 50 at most; MT10: per task, 5 before the end"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    capture_video: bool = False
    """record the first episode of every evaluation as mp4 (needs moviepy and an OpenGL library: docs/gipo_continuous.md)"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project: str = "gipo"
    """Weights & Biases project"""

    # ---- environment
    env_id: str = "reach-v3"
    """a Meta-World task (reach-v3, ...), MT10, or any Gymnasium id with a Box action space (HalfCheetah-v5, ...)"""
    env_kwargs: str = "{}"
    """arguments of the environment's constructor, as JSON: '{"ctrl_cost_weight": 0.5}'"""
    num_envs: int = 8
    """N: parallel environments (MT10: a multiple of 10); replay's buffer_size and updates_per_iteration should grow with it"""
    async_envs: bool = False
    """one process per environment: for slow ones (10 ms per step and more) or many cores; evaluations have one for all"""
    reward_scale: float = 0.01
    """constant factor on rewards in the losses, not in the logs: keeps values near 1-10 (Meta-World pays 0-10 per step)"""

    # ---- algorithm
    total_timesteps: int = 300_000
    """environment steps of the whole run, rounded up to whole rollouts"""
    num_steps: int = 256
    """T: steps per environment and rollout; also the length of a replayed segment (16 to 256)"""
    buffer_size: int = 0
    """replay buffer in environment steps, rounded down to whole rollouts; 0: one rollout (0 to 500,000)"""
    minibatch_size: int = 64
    """environment steps per update; where segments are replayed, a multiple of num_steps"""
    updates_per_iteration: int = 10
    """updates after each rollout of replay; a step is used this * minibatch_size / (num_envs * num_steps) times (10)"""
    learning_rate: float = 3e-4
    """Adam step size of the actor (1e-4 to 1e-3)"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic (3e-4 to 3e-3)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """course of the actor's step size: constant, or falling to 0 over the run, in a line or half a cosine"""
    critic_lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """the same for the critic"""
    lr_warmup: float = 0.0
    """share of the run over which both step sizes rise linearly from 0; then the schedule as if there had been no warm-up"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of GAE and of the V-trace trace"""
    recompute_advantages: bool = True
    """with replay: advantages from the current critic in every update; --no-recompute-advantages: those of collection time"""
    vtrace: bool = False
    """V-trace targets and advantages (truncated joint ratios, arXiv 1802.01561) instead of GAE"""
    policy_head: Literal["gaussian", "categorical"] = "gaussian"
    """diagonal Gaussian with a tanh-bounded mean, or evenly spaced bins per action dimension as in the paper"""
    num_bins: int = 256
    """bins of the categorical head per action dimension (256 in the paper)"""
    init_log_std: float = -0.5
    """initial log standard deviation of the Gaussian head, actions being in [-1, 1] (-1 to 0)"""
    hidden_size: int = 256
    """width of the two hidden layers of actor and critic"""
    ratio: Literal["joint", "per-dim"] = "joint"
    """importance ratio of the whole action, or one per dimension as in the paper's code (the policy loss is then
    a mean over the dimensions, too, and limits act on each)"""
    kl_coef: float = 0.0
    """weight of the penalty KL(mu || pi), estimated by mean(-l) (0 to 0.5)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, a sum over the action dimensions with either --ratio (0 to 0.02)"""
    vf_coef: float = 0.5
    """weight of the value loss; actor and critic share no parameters, so it matters only through gradient clipping
    and Adam's epsilon (0: the critic does not learn)"""
    max_grad_norm: float = 0.5
    """gradient norm limit, of actor and critic separately"""
    adv_std_floor: float = 0.1
    """advantages are divided by their standard deviation, but by no less than this share of its largest value so far"""

    # ---- PPO
    clip_coef: float = 0.2
    """epsilon: no gradient where the ratio has left [1 - epsilon, 1 + epsilon] in the advantage's direction (0.1 to 0.8)"""
    update_epochs: int = 10
    """passes over the rollout per iteration, where the buffer holds one rollout (3 to 20)"""

    # ---- runtime
    overlap: bool = True
    """with replay: collect the next rollout in a process of its own during the update; --no-overlap: in turn, equal results"""
    cuda: bool = False
    """update the networks on the GPU (the policy acts on the CPU): slower for networks of this size"""
    torch_compile: bool = False
    """compile the loss with a C++ compiler: faster updates, after half a minute of compiling; does not pay in short runs"""
    torch_threads: int = 1
    """CPU threads of an update; 1 is best for networks of this size"""


# -------------------- Environment --------------------
def make_env(args, idx: int, render_mode: str | None = None):
    """Return a function that builds environment number `idx`; for MT10, `idx % 10` is the task.

    Meta-World ignores reset(seed): its goals come from the constructor's seed, the same 50 in all environments, and their
    order from `seed()`. The stack equals gym.make("Meta-World/MT1") less the wrappers that do nothing here.
    """
    task = MT10[idx % len(MT10)] if args.env_id == "MT10" else args.env_id
    goals = meta_world_goals(task, args.seed) if task in META_WORLD else None
    kwargs = json.loads(args.env_kwargs) | ({} if goals else {"id": task})
    kwargs |= {"render_mode": render_mode} if render_mode else {}

    def thunk():
        # fast_meta_world() also changes Meta-World's modules: called here, in the process that the environment lives in.
        build = functools.partial(fast_meta_world(task), reward_function_version="v2") if goals else gym.make
        try:
            env = build(**kwargs)
        except (gym.error.Error, ImportError, TypeError) as error:
            retired = isinstance(error, ImportError) and ":" not in task  # a user's own module keeps its traceback
            wrong_kwargs = any(f"keyword argument '{name}'" in str(error) for name in kwargs)
            if isinstance(error, gym.error.Error) or retired or wrong_kwargs:
                what = f"--env-id {args.env_id} cannot be built with --env-kwargs {args.env_kwargs}"
                raise ArgumentError(f"{what}: {' '.join(str(error).split())}") from error
            raise
        if goals:
            env.seed(1000 * args.seed + idx)
            env = gym.wrappers.TimeLimit(env, env.max_path_length)
            if args.env_id == "MT10":
                env = OneHotWrapper(env, idx % len(MT10), len(MT10))
            return EpisodeRecorder(RandomTaskSelectWrapper(env, goals))
        with contextlib.ExitStack() as on_error:
            on_error.callback(EpisodeRecorder(env).close)  # it may have started a simulator
            limited = env.spec.max_episode_steps if env.spec else env.has_wrapper_attr("_max_episode_steps")
            if not limited:  # an environment whose arguments cannot be copied has no spec
                env = gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)
            check_spaces(args, env.observation_space, env.action_space)
            if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
                env = gym.wrappers.FlattenObservation(env)  # discrete ones become one-hot
            env.reset(seed=1000 * args.seed + idx)
            on_error.pop_all()
        return EpisodeRecorder(env)

    return thunk


class EpisodeRecorder(gym.Wrapper):
    """Return, length and success of every episode, and what rebuilds it exactly: the generator at its reset and its actions.

    `info` is empty except at the last step of an episode: {"return", "length", "success"}, plain floats; success is latched,
    and nan where the environment reported none. Rewards and flags may be arrays or tensors of one element.
    """

    def reset(self, *, seed=None, options=None, snapshot=None):
        """Begin an episode, or with a snapshot go back to where it was taken."""
        state, rng = snapshot and snapshot["generator"], getattr(self.unwrapped, "np_random", None)
        if isinstance(rng, np.random.RandomState):  # the older generator, of dm_control
            if state:
                rng.set_state(state)
            state = rng.get_state(legacy=False)
        elif isinstance(rng, np.random.Generator):
            if state:
                rng.bit_generator.state = state
            state = rng.bit_generator.state
        self.generator = convert(state, np.ndarray, np.ndarray.tolist)  # plain types, so that a checkpoint needs no pickle
        self.actions, self.episode_return, self.success = [], 0.0, math.nan
        obs, _ = self.env.reset(seed=seed, options=options)
        for action in snapshot["actions"].numpy() if snapshot else ():
            obs, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:  # it has random numbers that we do not know of
                return self.reset()
        return obs, {}

    def step(self, action):
        self.actions.append(action.copy())  # before the step, which may change it in place
        obs, reward, terminated, truncated, info = self.env.step(action)
        reward, terminated, truncated = scalar(reward), bool(terminated), bool(truncated)
        self.episode_return += reward
        success = info.get("success", info.get("is_success"))  # Meta-World's name, Gymnasium-Robotics' name
        if success is not None and not math.isnan(success := scalar(success)):
            # One successful step makes a successful episode, as Meta-World defines it.
            self.success = max(success, 0.0 if math.isnan(self.success) else self.success)
        if not (terminated or truncated):
            return obs, reward, terminated, truncated, {}
        last_info = {"return": self.episode_return, "length": len(self.actions), "success": self.success}
        return np.array(obs), reward, terminated, truncated, last_info  # a copy: the reset that follows may reuse the memory

    def step_and_reset(self, action) -> tuple:
        """step(), and reset() if that ended the episode: -> the observation to act on next, and what step() returned."""
        result = self.step(action)
        return self.reset()[0] if result[2] or result[3] else result[0], *result

    def snapshot(self) -> dict:
        """What rebuilds the current episode, as tensors and plain types."""
        return {"generator": self.generator, "actions": torch.tensor(np.array(self.actions))}

    def close(self) -> None:
        """No run is lost because an environment cannot be closed."""
        try:
            super().close()
        except Exception as error:
            print(f"warning: close() of an environment: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def scalar(value) -> float:
    """A number, or an array or tensor with one element, as a float."""
    return float(value.item() if hasattr(value, "item") else value)


def success_rate(successes) -> float | None:
    """Mean over episodes. nan, which reported no success, counts as a failure; None if all are nan."""
    return None if np.isnan(list(successes)).all() else float(np.mean(np.nan_to_num(list(successes))))


def to_env_action(action: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Map policy actions to the Box: clip to [-1, 1], then affinely onto [low, high], which rounding must not overstep."""
    dtype = np.promote_types(space.dtype, np.float32)  # the width of a Box of float16 may be more than float16 holds
    low, high = space.low.astype(dtype), space.high.astype(dtype)
    action = low + (np.clip(action, -1.0, 1.0) + 1.0) * 0.5 * (high - low)
    return np.clip(action, low, high).astype(space.dtype)


# -------------------- Agent --------------------
# ALGO LOGIC: networks, policy heads, observation normaliser
def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, std: float) -> nn.Sequential:
    """Two hidden tanh layers; `std` scales the last layer."""
    layers = [layer_init(nn.Linear(inputs, hidden)), nn.Tanh(), layer_init(nn.Linear(hidden, hidden)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(hidden, outputs), std))


class LogProbAndEntropy(torch.autograd.Function):
    """Log-probability of one bin, and entropy: logits (..., bins), bin (...) -> (...), (...); a fused log_softmax and gather.

    d log p_k / d logits = onehot_k - p,  dH / d logits = -p (log p + H): the backward pass reads p once for both.
    """

    @staticmethod
    def forward(ctx, logits, token):
        logprobs = torch.log_softmax(logits, dim=-1)
        probs = logprobs.exp()
        entropy = -(probs * logprobs).sum(-1)
        ctx.save_for_backward(logprobs, probs, entropy, token)
        return logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1), entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        logprobs, probs, entropy, token = ctx.saved_tensors
        grad = logprobs * grad_entropy.unsqueeze(-1) + (grad_logprob + grad_entropy * entropy).unsqueeze(-1)
        return (-grad * probs).scatter_add(-1, token.unsqueeze(-1), grad_logprob.unsqueeze(-1)), None


class Agent(nn.Module):
    """Separate actor and critic MLPs behind one observation normaliser, which is part of the model, so it is saved with it."""

    def __init__(self, obs_dim: int, action_dim: int, args):
        super().__init__()
        self.categorical, self.action_dim, self.num_bins = args.policy_head == "categorical", action_dim, args.num_bins
        self.critic = mlp(obs_dim, args.hidden_size, 1, std=1.0)
        self.actor = mlp(obs_dim, args.hidden_size, action_dim * (self.num_bins if self.categorical else 1), std=0.01)
        if not self.categorical:
            # An unbounded mean drifts far outside [-1, 1]; then every sample is clipped to the same action, the reward no
            # longer depends on it, and there is no way back. tanh keeps the mean where the actions are.
            self.actor.append(nn.Tanh())
            self.actor_logstd = nn.Parameter(torch.full((action_dim,), args.init_log_std))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_var", torch.ones(obs_dim))
        self.register_buffer("obs_count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("adv_std_peak", torch.zeros(()))  # largest standard deviation of a minibatch's advantages so far

    def actor_parameters(self) -> list[nn.Parameter]:
        """All but the critic's: what a fork adds, an encoder say, is trained with the actor, and its gradient, also that from
        the critic, counts in the actor's clip."""
        critic = set(self.critic.parameters())
        return [p for p in self.parameters() if p not in critic]

    def update_normalizer(self, obs: torch.Tensor) -> None:
        """Merge a batch of raw observations (..., obs_dim) into the running mean and variance (Chan et al., 1979)."""
        obs = obs.flatten(0, -2)
        var, mean = torch.var_mean(obs, dim=0, correction=0)
        delta, total = mean - self.obs_mean, self.obs_count + len(obs)
        share = (len(obs) / total).float()
        self.obs_var += share * (var - self.obs_var + delta**2 * (1 - share))
        self.obs_mean += share * delta
        self.obs_count.copy_(total)

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """Standardise; std >= 0.01, or coordinates that hardly ever move (1e-6 m) would be blown up to noise."""
        return ((obs - self.obs_mean) * torch.rsqrt(self.obs_var + 1e-4)).clamp(-10.0, 10.0)

    def get_value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s): (..., obs_dim) -> (...)."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def get_action_and_logprob(self, obs, action=None, deterministic=False, generator=None):
        """Sample an action, or take one: (..., obs_dim) -> action, log-probs per dimension, entropy (all (..., action_dim)).

        Actions are unclipped samples in units of [-1, 1]; the joint log-prob is the sum over the last dimension.
        """
        out = self.actor(self.normalize(obs))
        if self.categorical:
            logits = out.unflatten(-1, (self.action_dim, self.num_bins))
            if action is None:
                probs = torch.softmax(logits, dim=-1)
                if deterministic:  # the mean: among many neighbours the most probable bin says little
                    action = probs @ torch.linspace(-1.0, 1.0, self.num_bins, device=out.device)
                else:  # the inverse of the distribution function; the bin found always has a probability above 0
                    cdf = probs.cumsum(-1)
                    uniform = torch.rand(cdf[..., -1:].shape, generator=generator, device=out.device) * cdf[..., -1:]
                    action = -1.0 + 2.0 * torch.searchsorted(cdf, uniform, right=True).squeeze(-1) / (self.num_bins - 1)
            token = ((action + 1.0) * 0.5 * (self.num_bins - 1)).round().long()
            return action, *LogProbAndEntropy.apply(logits, token)
        if action is None:
            noise = torch.randn(out.shape, generator=generator, device=out.device)
            action = out if deterministic else out + self.actor_logstd.exp() * noise
        z = (action - out) * torch.exp(-self.actor_logstd)
        logprob = -0.5 * z**2 - self.actor_logstd - 0.5 * math.log(2 * math.pi)
        return action, logprob, (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).expand_as(out)


# -------------------- Advantages and objective --------------------
# ALGO LOGIC: advantages, replay sampling, and policy_objective, where a new objective goes
# Shapes: T steps of S segments, time first; a rollout has one segment of each of N environments
def discounted_sum(deltas, decays):
    """x[t] = deltas[t] + decays[t] * x[t + 1], backwards from zero; time first."""
    sums, last = [], torch.zeros_like(deltas[0])
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind()), strict=True):
        last = torch.addcmul(delta, decay, last)
        sums.append(last)
    return torch.stack(sums[::-1])


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv 1506.02438); every argument and the result (T, ...), time first.

    Two masks: a termination has no future value; a done (termination or truncation) only ends the trace. `next_values` is
    V of the real next observation: the episode's own last one where it is done, never the next episode's first.
    """
    deltas = rewards + gamma * (1.0 - terminations) * next_values - values
    return discounted_sum(deltas, gamma * gae_lambda * (1.0 - dones))


def compute_vtrace(rewards, values, next_values, terminations, dones, logratio, gamma, gae_lambda):
    """V-trace (arXiv 1802.01561, eq. 1) with rho_bar = c_bar = 1: -> advantages, value targets v_s, both (T, ...).

    `logratio` is the joint log pi/mu. Advantage = r + gamma v_{s+1} - V(s): the ratio itself enters once, in the surrogate.
    """
    rho = torch.exp(logratio.clamp(max=0.0))
    deltas = rho * (rewards + gamma * (1.0 - terminations) * next_values - values)
    targets = values + discounted_sum(deltas, gamma * gae_lambda * (1.0 - dones) * rho)
    next_targets = next_values.clone()  # V itself where the trace ends: at done rows and after the last row
    next_targets[:-1] = torch.where(dones[:-1] > 0, next_values[:-1], targets[1:])
    return rewards + gamma * (1.0 - terminations) * next_targets - values, targets


def get_end_values(agent, next_obs, dones):
    """V of the real next observation where no following row has it, (T, S): in done rows and in the last one; 0 elsewhere."""
    ends, values = dones > 0, torch.zeros_like(dones)
    ends[-1] = True
    with torch.no_grad():
        values[ends] = agent.get_value(next_obs[ends])
    return values


def compute_advantages(values, mb, args, joint_logratio=None):
    """Advantages and value targets of segments, both (T, S), from the critic's `values` and mb["end_values"]."""
    following = torch.cat([values[1:], mb["end_values"][-1:]])  # of the next row, where the episode goes on
    next_values = torch.where(mb["dones"] > 0, mb["end_values"], following)
    gae_args = mb["rewards"] * args.reward_scale, values, next_values, mb["terminations"], mb["dones"]
    if args.vtrace:
        return compute_vtrace(*gae_args, joint_logratio, args.gamma, args.gae_lambda)
    advantages = compute_gae(*gae_args, args.gamma, args.gae_lambda)
    return advantages, advantages + values


def sample_segments(num_filled: int, args, generator=None) -> torch.Tensor:
    """Indices of each update's segments, (updates, S): in shuffled order, and none a second time before all had their turn."""
    segments = args.minibatch_size // args.num_steps
    draws = args.updates_per_iteration * segments
    passes = [torch.randperm(num_filled, generator=generator) for _ in range(math.ceil(draws / num_filled))]
    return torch.cat(passes)[:draws].view(-1, segments)


def policy_objective(logratio, advantages, args):
    """Per-sample surrogate to maximise, and its detached trust: d surrogate / d logratio = trust * ratio * advantage."""
    ratio = torch.exp(logratio.clamp(max=MAX_LOG_COEF))
    clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    trust = torch.where(advantages > 0, ratio <= 1.0 + args.clip_coef, ratio >= 1.0 - args.clip_coef)
    return objective, trust.float()


def compute_loss(agent, mb, args):
    """Loss of one minibatch, and what is logged of it: -> (), {name: ()}. `mb`: segments (T, S, ...), or rows (B, ...) with
    stored advantages; where they are recomputed, with the critic's `end_values`. It moves agent.adv_std_peak, too.
    --torch-compile compiles all of it."""
    _, newlogprob, entropy = agent.get_action_and_logprob(mb["obs"], mb["actions"])
    newvalue = agent.get_value(mb["obs"])
    logratio = newlogprob - mb["logprobs"]  # (T, S, action_dim)
    joint_logratio = logratio.sum(-1)

    with torch.no_grad():
        if args.recompute_advantages:
            mb_advantages, mb_returns = compute_advantages(newvalue.detach(), mb, args, joint_logratio)
        else:
            mb_advantages, mb_returns = mb["advantages"], mb["returns"]
        adv_std = mb_advantages.std(correction=0)
        agent.adv_std_peak.copy_(torch.maximum(agent.adv_std_peak, adv_std))
        adv_std = torch.maximum(adv_std, args.adv_std_floor * agent.adv_std_peak)
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (adv_std + 1e-8)

    if args.ratio == "joint":
        logratio = joint_logratio
    else:
        mb_advantages = mb_advantages.unsqueeze(-1)  # the same for every action dimension
    objective, trust = policy_objective(logratio, mb_advantages, args)
    pg_loss = -objective.mean()
    v_loss = 0.5 * ((newvalue - mb_returns) ** 2).mean()
    entropy_loss = entropy.sum(-1).mean()
    behavior_kl = -logratio.mean()  # KL(mu || pi), since the samples are mu's
    loss = pg_loss - args.ent_coef * entropy_loss + args.kl_coef * behavior_kl + args.vf_coef * v_loss

    with torch.no_grad():
        error_var, return_var = (mb_returns - newvalue).var(correction=0), mb_returns.var(correction=0)
        ratio = torch.exp(logratio.clamp(max=MAX_LOG_COEF))
        coef = trust * ratio  # of grad log pi * advantage; 1 on-policy
        return loss, {
            "losses/policy_loss": pg_loss.detach(),
            "losses/value_loss": v_loss.detach(),
            "losses/entropy": entropy_loss.detach(),
            "losses/approx_kl": ((ratio - 1) - logratio).mean(),
            "losses/clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
            "losses/explained_variance": 1 - error_var / return_var.clamp(min=1e-12),
            "gipo/trust_mean": trust.mean(),
            "gipo/trust_min": trust.min(),
            "gipo/effective_sample_size": coef.mean() ** 2 / (coef**2).mean().clamp(min=1e-12),
            "gipo/utilization": (coef > 1e-3).float().mean(),
            "gipo/logratio_std": logratio.std(correction=0),
        }


def lr_share(schedule: str, progress: float, warmup: float) -> float:
    """Factor on a learning rate once the share `progress` of the run, 0 to 1, is over."""
    if progress < warmup:
        return progress / warmup
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    return decay[schedule]


# -------------------- Rollouts --------------------
class Collector:
    """The environments and the policy that acts in them. Rollouts depend on the weights given and on snapshot() alone."""

    def __init__(self, args):
        torch.set_num_threads(1)  # before it computes: a forked process would wait for OpenMP threads of its parent
        seed_everything(args.seed)  # for environments that draw from the global generators
        self.args, self.steps, self.generator = args, 0, torch.Generator().manual_seed(2 * args.seed + 1)
        self.envs = []
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close, timeout=2.0)
            for i in range(args.num_envs):
                make_env(args, i)  # makes the goals before the processes are forked, not in each of them
                self.envs.append(Worker(build_env, args, i, own_process=args.async_envs))
            kinds = "observation_space", "action_space"
            spaces, *others = [[env.call("get_wrapper_attr", kind) for kind in kinds] for env in self.envs]
            if any(other != spaces for other in others):
                raise ArgumentError(f"--env-id {args.env_id} has environments with different spaces, such as {spaces}")
            self.max_episode_steps = max(env.call("get_wrapper_attr", "_max_episode_steps") for env in self.envs)
            on_error.pop_all()
        self.obs_space, self.action_space = spaces

    def sizes(self) -> tuple[int, int, int]:
        """Of an observation, of an action, and of an episode: its time limit."""
        return self.obs_space.shape[0], self.action_space.shape[0], self.max_episode_steps

    def reset(self, snapshot: dict | None = None) -> None:
        """Begin, or go on where the snapshot was taken."""
        with seeded(self.args.seed):
            self.agent = Agent(self.obs_space.shape[0], self.action_space.shape[0], self.args)
        if snapshot:
            self.generator.set_state(snapshot["generator"])
            self.steps = snapshot["steps"]
        for env, episode in zip(self.envs, snapshot["envs"] if snapshot else [None] * len(self.envs), strict=True):
            env.start("reset", snapshot=episode)
        self.next_obs = self.stack([env.result()[0] for env in self.envs])
        self.check_numbers("observation", self.next_obs)
        if snapshot and not torch.equal(self.next_obs, snapshot["next_obs"]):
            why = f"{self.args.env_id} has a state that no checkpoint holds, or this machine or its libraries are others"
            print(f"warning: the running episodes could not be rebuilt exactly: {why}", file=sys.stderr, flush=True)

    def snapshot(self) -> dict:
        """What reset() needs, as tensors and plain types."""
        state = {"next_obs": self.next_obs, "generator": self.generator.get_state(), "steps": self.steps}
        return state | {"envs": [env.call("snapshot") for env in self.envs]}

    def collect(self, weights: dict, version: int) -> dict:
        """Act with these weights, those of iteration `version`, for T steps.

        Returns `data`, a dict of (T, N, ...) tensors in float32; `episodes` that ended: (steps of the run, return, length,
        success); and `log_ratio_max`, an alarm: the largest difference between an action's log-prob when acting and when the
        same weights score the whole rollout as one batch. More than rounding: Agent has a state, dropout or batch statistics.
        """
        torch.set_num_threads(1)
        self.agent.load_state_dict(weights)
        columns, episodes, seconds = collections.defaultdict(list), [], {"env": 0.0, "policy": 0.0}
        for _ in range(self.args.num_steps):
            t0 = time.perf_counter()
            with torch.no_grad():
                action, logprob, _ = self.agent.get_action_and_logprob(self.next_obs, generator=self.generator)
            t1 = time.perf_counter()
            for env, env_action in zip(self.envs, to_env_action(action.numpy(), self.action_space), strict=True):
                env.start("step_and_reset", env_action)
            results = [env.result() for env in self.envs]
            seconds["policy"] += t1 - t0
            seconds["env"] += time.perf_counter() - t1
            next_obs, real_next_obs, rewards, terminations, truncations, infos = zip(*results, strict=True)
            dones = np.logical_or(terminations, truncations)
            obs, self.next_obs, real_next_obs = self.next_obs, self.stack(next_obs), self.stack(real_next_obs)
            self.steps += self.args.num_envs
            for info in filter(None, infos):
                episodes.append((self.steps, info["return"], info["length"], info["success"]))
            transition = {"obs": obs, "next_obs": real_next_obs, "actions": action, "logprobs": logprob}
            transition |= {"rewards": rewards, "terminations": terminations, "dones": dones}
            for key, value in transition.items():
                columns[key].append(torch.as_tensor(value))
            self.check_numbers("observation after a step", real_next_obs)
            self.check_numbers("reward", columns["rewards"][-1].float())
            self.check_numbers("observation", self.next_obs)
        data = {key: torch.stack(column).float() for key, column in columns.items()}
        with torch.no_grad():
            logprob = self.agent.get_action_and_logprob(data["obs"], data["actions"])[1]
        log_ratio_max = (logprob - data["logprobs"]).sum(-1).abs().max().item()
        return {"data": data, "episodes": episodes, "log_ratio_max": log_ratio_max, "seconds": seconds, "version": version}

    def check_numbers(self, name: str, values: torch.Tensor) -> None:
        """BadNumber if the values (N, ...) hold nan or more than MAX_MAGNITUDE: no policy can act on it or learn from it."""
        if not values.abs().max() <= MAX_MAGNITUDE:
            idx, *where = (~(values.abs() <= MAX_MAGNITUDE)).nonzero()[0].tolist()
            what = f"{name} {values[idx, *where].item()} of environment {idx} at step {self.steps:,}"
            raise BadNumber(f"--env-id {self.args.env_id}: {what}")

    def stack(self, observations) -> torch.Tensor:
        """One of each environment -> (N, obs_dim) in float32; ValueError if they are not as the space says."""
        array = np.stack(observations)
        if array.shape[1:] != self.obs_space.shape:  # of shape (1,) they would be broadcast without a word
            raise ValueError(f"observations have the shape {array.shape[1:]}, and the space {self.obs_space.shape}")
        return torch.as_tensor(array, dtype=torch.float32)

    def close(self, timeout: float = 60.0) -> None:
        """Close the environments, all at once; their own processes end after so many seconds."""
        deadline = time.time() + timeout
        with contextlib.ExitStack() as at_exit:  # each of them, also after another Ctrl-C
            for env in self.envs:
                at_exit.callback(lambda env=env: env.close(max(deadline - time.time(), 0.0)))
                env.hang_up()


# -------------------- Main --------------------
# ALGO LOGIC: the loop, in train(); what comes after it is evaluation, processes, files and checks
def main(args: Args) -> dict:
    """Train, and return what result.json holds. ArgumentError (a ValueError) on bad arguments, before anything is written.

    May be called from a program of your own: in turn, or in processes, since threads would share the global random generators.
    """
    if args.evaluate is not None:
        return evaluate_saved_model(args)
    started, given_folder = time.time(), run_folder_of(args)
    folder = given_folder.absolute()
    with contextlib.ExitStack() as at_exit:  # whatever happens: processes end, handlers and locks are given back
        try:
            return train(args, at_exit)
        except ArgumentError:
            raise
        except Exception as error:
            checkpoint = folder / "checkpoint.pt"
            # An older one is that of a run which --overwrite was to replace.
            ours = checkpoint.exists() and (args.resume or checkpoint.stat().st_mtime >= started)
            last_good = f"last good checkpoint: {given_folder / checkpoint.name if ours else 'none yet'}"
            if isinstance(error, BadNumber):
                raise BadNumber(f"{error}; {last_good}") from error
            if ours:
                error.add_note(f"{last_good}; --resume {given_folder} continues from it")
            raise


def train(args: Args, at_exit: contextlib.ExitStack) -> dict:
    """Set up; then in every iteration: rollout, advantages, update, log, checkpoint, evaluation."""
    # ==================== SETUP ====================
    # Nothing is written before all that can fail cheaply was tried.
    on_policy = args.buffer_size < 2 * args.num_envs * args.num_steps  # GIPO: the textbook form is PPO's alone
    if on_policy:
        args = dataclasses.replace(args, recompute_advantages=False, overlap=False)
    given_folder, commit = run_folder_of(args), git_commit()  # now, since the file may change while it runs
    run_folder = given_folder.absolute()  # for an environment may change the working directory
    check_args(args)
    refuse_existing(given_folder, args)
    if args.resume and (run_folder / "result.json").exists():
        say(f"{given_folder} is finished already: nothing to resume")
        return json.loads((run_folder / "result.json").read_text())
    this_script = ["python", os.path.relpath(__file__)]  # before an environment changes the folder
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own_process = args.overlap and cores > 1 and not multiprocessing.current_process().daemon  # which may have no children
    at_exit.enter_context(seeded(args.seed))  # what a fork draws in the update, too
    at_exit.callback(torch.set_num_threads, torch.get_num_threads())
    collector = Worker(Collector, args, own_process=own_process)
    at_exit.callback(collector.close)
    obs_dim, action_dim, max_episode_steps = collector.call("sizes")
    if args.capture_video:
        check_video(args)

    torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda" if args.cuda else "cpu")
    with seeded(args.seed):
        agent = Agent(obs_dim, action_dim, args).to(device)
    actor_parameters, critic_parameters = agent.actor_parameters(), list(agent.critic.parameters())
    optimizer = torch.optim.Adam([{"params": actor_parameters}, {"params": critic_parameters}], lr=0.0, eps=1e-5, fused=True)
    loss_function = torch.compile(compute_loss) if args.torch_compile else compute_loss
    generator = torch.Generator().manual_seed(2 * args.seed)  # draws the minibatches; the collector has its own

    # Replay of whole segments, time first: rb[key][:, j] is segment j, one environment's part of one rollout. (T, S, ...)
    rollout_size = args.num_envs * args.num_steps
    num_segments = max(args.buffer_size // rollout_size, 1) * args.num_envs
    shape = (args.num_steps, num_segments)
    gigabytes = (2 * obs_dim + 2 * action_dim + 6) * 4e-9 * math.prod(shape)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if args.cuda:
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    if gigabytes > memory:
        how = "lower it, --num-envs or --num-steps"
        raise ArgumentError(f"--buffer-size {args.buffer_size} needs {gigabytes:.0f} GB, of {memory:.0f}: {how}")
    rb = {
        "obs": torch.zeros(*shape, obs_dim, device=device),  # raw, not normalised
        "next_obs": torch.zeros(*shape, obs_dim, device=device),  # the real one, also where the episode ended
        "actions": torch.zeros(*shape, action_dim, device=device),  # unclipped samples
        "logprobs": torch.zeros(*shape, action_dim, device=device),  # log mu(a|s) per action dimension
        "rewards": torch.zeros(shape, device=device),  # raw, not scaled
        "terminations": torch.zeros(shape, device=device),
        "dones": torch.zeros(shape, device=device),  # termination or truncation
        "versions": torch.zeros(shape, device=device),  # iteration at whose start the acting weights were taken
        "advantages": torch.zeros(shape, device=device),  # of collection time; used unless they are recomputed
        "returns": torch.zeros(shape, device=device),
    }
    unread = ("advantages", "returns") if args.recompute_advantages else ("next_obs", "rewards", "terminations", "dones")
    used = [key for key in rb if key not in unread]  # by an update

    at_exit.enter_context(lock_folder(run_folder))
    refuse_existing(run_folder, args)  # again, now that no other start of this name can come between
    has_checkpoint = args.resume and (run_folder / "checkpoint.pt").exists()
    checkpoint = load_checkpoint(run_folder / "checkpoint.pt") if has_checkpoint else {}
    config = write_config(run_folder, args, at_exit)

    num_iterations, iteration, next_rollout = math.ceil(args.total_timesteps / rollout_size), 0, None
    seconds = {"env": 0.0, "policy": 0.0, "update": 0.0, "training": 0.0, "wall": 0.0}  # training: without evaluation
    recent_returns, recent_successes = collections.deque(maxlen=100), collections.deque(maxlen=100)  # nan: reports none
    if checkpoint:
        load_weights(agent, checkpoint["model"], run_folder / "checkpoint.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        for key, value in checkpoint.pop("replay").items():
            rb[key][:, : value.shape[1]] = value
        iteration, seconds, next_rollout = checkpoint["iteration"], checkpoint["seconds"], checkpoint["next_rollout"]
        recent_returns.extend(checkpoint["recent_returns"])
        recent_successes.extend(checkpoint["recent_successes"])
        generator.set_state(checkpoint["generator"])
    collector.call("reset", checkpoint.get("collector"))

    # Here, because its import takes a second that --help need not wait.
    from torch.utils.tensorboard import SummaryWriter, summary

    global_step = iteration * rollout_size
    writer = SummaryWriter(str(run_folder), purge_step=global_step + 1 if args.resume else None)
    at_exit.callback(writer.close)
    hparams = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
    for part in summary.hparams(hparams, {"eval/success_rate": 0.0, "eval/return_mean": 0.0}):  # TensorBoard's table of runs
        writer.file_writer.add_summary(part)

    stop_signals = catch_stop_signals(at_exit)
    start_time, last_print, tty = time.time() - seconds["wall"], time.time(), sys.stdout and sys.stdout.isatty()
    at_exit.push(lambda kind, *_: say("") if tty and kind and issubclass(kind, Exception) else None)  # ends the progress line
    uses = args.update_epochs if on_policy else args.updates_per_iteration * args.minibatch_size / rollout_size  # GIPO: replay
    what = f"{num_iterations * rollout_size:,} steps of {args.env_id}, each used {float(f'{uses:.3g}'):,g} times"
    say(f"{given_folder}: {what}, from step {global_step:,}")

    def passed(every: int) -> bool:  # has a multiple of `every` steps been passed in the last iteration?
        return every > 0 and global_step // every > (global_step - rollout_size) // every

    def weights() -> dict:  # NumPy, which they pass through, has no bfloat16
        return {k: (v.float() if v.dtype == torch.bfloat16 else v).cpu() for k, v in agent.state_dict().items()}

    def evaluation_phase() -> dict | None:  # also right after a resume: a run may die while it evaluates
        finished = iteration == num_iterations
        if stop_signals or not (args.eval_episodes and iteration and (finished or passed(args.eval_every))):
            return None
        episodes = min(args.eval_episodes, 5) if args.env_id == "MT10" and not finished else args.eval_episodes
        video_dir = run_folder / "videos" / str(global_step) if args.capture_video else None
        if tty and not finished:
            say("")  # ends the progress line
        evaluation = evaluate(agent, args, episodes, video_dir, stop_signals)
        if stop_signals:
            return None
        save_models(run_folder, agent, config, evaluation, global_step)
        writer.add_scalar("eval/return_mean", evaluation["return_mean"], global_step)
        line = f"eval at {global_step:,}: return {evaluation['return_mean']:.1f}"
        if evaluation["success_rate"] is not None:
            writer.add_scalar("eval/success_rate", evaluation["success_rate"], global_step)
            what = "goals" if args.env_id in [*META_WORLD, "MT10"] else "episodes"
            line += f", success {evaluation['success_rate']:.0%} of {evaluation['episodes']} {what}"
        for task, success in evaluation.get("success_by_task", {}).items():
            writer.add_scalar(f"eval/success_rate/{task}", success, global_step)
        say(line)
        return evaluation

    evaluation, saved = evaluation_phase(), True  # saved: does the checkpoint hold all that was done?
    while iteration < num_iterations and not (stop_signals and saved):
        # ==================== ROLLOUT ====================
        # With replay, as in GIPO; on-policy, with the weights after the last update.
        iteration += 1
        iteration_start = time.perf_counter()
        if not (collector.busy or next_rollout):
            collector.start("collect", weights(), iteration)
        rollout, next_rollout = next_rollout or collector.result(), None  # from the checkpoint, or the one on its way
        if iteration < num_iterations and not on_policy:
            collector.start("collect", weights(), iteration)
        slot = (iteration - 1) * args.num_envs % num_segments  # the oldest N segments of the ring
        new = slice(slot, slot + args.num_envs)
        for key, value in rollout["data"].items():
            rb[key][:, new] = value
        rb["versions"][:, new] = rollout["version"]
        global_step = iteration * rollout_size
        for step, episode_return, length, success in rollout["episodes"]:
            recent_returns.append(episode_return)
            recent_successes.append(success)
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", length, step)
            if success_rate(recent_successes) is not None:
                writer.add_scalar("charts/episodic_success", np.nan_to_num(success), step)

        torch.set_num_threads(args.torch_threads)
        fresh = {key: value[:, new] for key, value in rb.items()}  # views: writing into them writes into the replay
        if iteration == 1:  # the weights are still those that acted: compare on the device, and in the mode, of learning
            with torch.no_grad():
                logprob = agent.get_action_and_logprob(fresh["obs"], fresh["actions"])[1]
            log_ratio_max = (logprob - fresh["logprobs"]).sum(-1).abs().max().item()
            rollout["log_ratio_max"] = max(rollout["log_ratio_max"], log_ratio_max)

        # ==================== ADVANTAGES ====================
        # Those of collection time. With --recompute-advantages and replay every update makes its own.
        if not args.recompute_advantages:
            with torch.no_grad():
                fresh["end_values"] = get_end_values(agent, fresh["next_obs"], fresh["dones"])
                fresh["advantages"][:], fresh["returns"][:] = compute_advantages(agent.get_value(fresh["obs"]), fresh, args)

        # ==================== UPDATE ====================
        # ALGO LOGIC: gradient steps; the loss is in compute_loss
        progress = (iteration - 1) / num_iterations
        actor_group, critic_group = optimizer.param_groups
        actor_group["lr"] = args.learning_rate * lr_share(args.lr_schedule, progress, args.lr_warmup)
        critic_group["lr"] = args.critic_learning_rate * lr_share(args.critic_lr_schedule, progress, args.lr_warmup)
        t0 = time.perf_counter()
        num_filled, stats = min(iteration * args.num_envs, num_segments), collections.defaultdict(list)
        if on_policy:  # shuffled transitions, in epochs
            epochs = [torch.randperm(rollout_size, generator=generator) for _ in range(args.update_epochs)]
            minibatches = [mb_inds for epoch in epochs for mb_inds in epoch.split(args.minibatch_size)]
        else:
            minibatches = sample_segments(num_filled, args, generator)
        for mb_inds in minibatches:
            mb = {key: rb[key].flatten(0, 1)[mb_inds] if on_policy else rb[key][:, mb_inds] for key in used}
            if args.recompute_advantages:
                mb["end_values"] = get_end_values(agent, mb["next_obs"], mb["dones"])
            loss, mb_stats = loss_function(agent, mb, args)
            optimizer.zero_grad()
            loss.backward()
            mb_stats["losses/grad_norm"] = nn.utils.clip_grad_norm_(actor_parameters, args.max_grad_norm)
            nn.utils.clip_grad_norm_(critic_parameters, args.max_grad_norm)
            optimizer.step()
            mb_stats["gipo/policy_lag"] = iteration - mb["versions"].mean()
            for name, value in mb_stats.items():
                stats[name].append(value)
        agent.update_normalizer(fresh["obs"])  # after the update, in which gradients alone move the policy
        scalars = {name: torch.stack(values).mean().item() for name, values in stats.items()}  # waits for the GPU
        seconds["update"] += time.perf_counter() - t0

        # ==================== LOG ====================
        seconds["training"] += time.perf_counter() - iteration_start
        for part in ("env", "policy"):
            seconds[part] += rollout["seconds"][part]
        sps = global_step / seconds["training"]
        scalars |= {"charts/SPS": sps, "charts/learning_rate": actor_group["lr"]}
        scalars |= {"gipo/log_ratio_max": rollout["log_ratio_max"]}
        if rollout["log_ratio_max"] > 0.01:
            text = "gipo/log_ratio_max is above 0.01: with equal weights acting and learning give other log-probabilities."
            warnings.warn(f"{text} Has Agent a state, dropout or batch statistics?", stacklevel=1)  # shown once
        scalars |= {f"time/{part}": seconds[part] / seconds["training"] for part in ("env", "policy", "update")}
        for name, value in scalars.items():
            if not math.isfinite(value):
                raise BadNumber(f"{name} is {value} at step {global_step:,}")
            writer.add_scalar(name, value, global_step)
        if tty or time.time() - last_print > 10 or iteration == num_iterations:
            left, train_success = round((num_iterations - iteration) * rollout_size / sps), success_rate(recent_successes)
            line = f"first episode ends by step {max_episode_steps * args.num_envs:,}"
            if recent_returns:
                line = f"return {np.mean(recent_returns):8.1f}"
            line += "" if train_success is None else f"  success {train_success:4.0%}"
            line = f"step {global_step:>9,}  {line}  {sps:5.0f} steps/s  left {left // 60}m{left % 60:02d}s"
            say(f"\r{line}\x1b[K" if tty else line, end="" if tty and iteration < num_iterations else "\n")
            last_print = time.time()

        # ==================== CHECKPOINT ====================
        # Also before every evaluation, and when asked to stop.
        seconds["wall"] = time.time() - start_time
        saved = iteration == num_iterations or passed(args.checkpoint_every) or passed(args.eval_every) or bool(stop_signals)
        if saved:
            t0 = time.perf_counter()
            next_rollout = collector.result() if collector.busy else None
            seconds["training"] += time.perf_counter() - t0
            checkpoint = {
                "model": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                # Cloned while it fills up, for a slice would be saved with all the memory behind it.
                "replay": {k: v if num_filled == num_segments else v[:, :num_filled].clone() for k, v in rb.items()},
                "iteration": iteration,
                "seconds": seconds,
                "recent_returns": list(recent_returns),
                "recent_successes": list(recent_successes),
                "collector": collector.call("snapshot"),
                "next_rollout": next_rollout,
                "generator": generator.get_state(),
            }
            save_checkpoint(run_folder / "checkpoint.pt", checkpoint)
            writer.flush()

        # ==================== EVAL ====================
        evaluation = evaluation_phase()

    if stop_signals:
        how = shlex.join([*this_script, "--resume", str(given_folder)])
        say(f"\nstopped at step {global_step:,}; continue with: {how}")
        save_models(run_folder, agent, config, None, global_step)  # for --evaluate
        collector.close(timeout=60.0)  # simulators may take their time
        sys.exit(128 + stop_signals[0])
    if not args.eval_episodes:
        save_models(run_folder, agent, config, None, global_step)
    peak_memory = peak_memory_mb(multiprocessing.active_children())
    collector.close(timeout=60.0)
    seconds["wall"] = time.time() - start_time
    evaluation = evaluation or {"success_rate": None, "return_mean": None, "episodes": 0}
    result = {"env_id": args.env_id, "exp_name": args.exp_name, "seed": args.seed, "total_timesteps": global_step}
    result |= {f"eval_{key}": value for key, value in evaluation.items() if key != "returns"}
    result |= {
        "train_return_mean": float(np.mean(recent_returns)) if recent_returns else None,
        "train_success_rate": success_rate(recent_successes),
        "sps": global_step / seconds["training"],
        "wall_seconds": seconds["wall"],
        "peak_memory_mb": peak_memory,
        "git_commit": commit,
        "versions": {"python": sys.version.split()[0], "algorithm": ALGORITHM_VERSION}
        | {package: importlib.metadata.version(package) for package in ("torch", "numpy", "gymnasium", "metaworld", "mujoco")},
        "args": config,
    }
    write_json(run_folder / "result.json", result)
    shares = ", ".join(f"{part} {seconds[part] / seconds['training']:.0%}" for part in ("env", "policy", "update"))
    shares += " of the time" + (", in two processes" if own_process else "")
    say(f"finished in {seconds['wall']:.0f} s, {result['sps']:.0f} steps/s ({shares})\nfiles:  {given_folder}")
    say("curves: " + shlex.join(["tensorboard", "--logdir", str(given_folder.parent)]))
    if args.eval_episodes:
        model = str(given_folder / "best_model.pt")
        say("watch:  " + shlex.join([*this_script, "--evaluate", model, "--eval-episodes", "1", "--capture-video"]))
    return result


# -------------------- Evaluation --------------------
def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int):
    """Seed the global generators for a while, and leave them as they were: environments may draw from them, too."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@seeded(0)
@torch.no_grad()
def evaluate(agent, args, num_episodes: int, video_dir: Path | None = None, stop_signals=()) -> dict:
    """Run the deterministic policy once on each of the first `num_episodes` training goals (MT10: of every task).

    An environment without goals gets fixed reset seeds instead. Ends early once a signal arrived. Returns `success_rate` (None
    where the environment reports none), `return_mean`, `episodes`, `returns`, and for MT10 `success_by_task`.
    """
    returns, successes, has_goals = [], [], args.env_id in [*META_WORLD, "MT10"]
    for task_idx in range(len(MT10) if args.env_id == "MT10" else 1):
        if stop_signals:
            break
        render = ["rgb_array" if video_dir and i == 0 else None for i in range(min(num_episodes, MAX_EVAL_ENVS))]
        with contextlib.ExitStack() as at_end:
            envs = [at_end.enter_context(contextlib.closing(make_env(args, task_idx, mode)())) for mode in render]
            for first in range(0, num_episodes, len(envs)):
                running, frames, last_infos = {}, [], {}  # running: env -> observation
                for episode, env in zip(range(first, num_episodes), envs, strict=False):
                    if has_goals:
                        env.get_wrapper_attr("toggle_sample_tasks_on_reset")(False)
                        env.unwrapped.set_task(env.get_wrapper_attr("tasks")[episode])
                    running[env] = env.reset(seed=10_000 + episode)[0]
                while running and not stop_signals:
                    if video_dir and first == 0 and envs[0] in running and len(envs[0].get_wrapper_attr("actions")) % 4 == 0:
                        frames.append(envs[0].render())
                    obs = torch.as_tensor(np.stack([*running.values()]), dtype=torch.float32, device=agent.obs_mean.device)
                    if not obs.abs().max() <= MAX_MAGNITUDE:
                        raise BadNumber(f"--env-id {args.env_id}: an observation of an evaluation is {obs.abs().max().item()}")
                    action, *_ = agent.get_action_and_logprob(obs, deterministic=True)
                    env_actions = to_env_action(action.cpu().numpy(), envs[0].action_space)
                    for env, env_action in zip([*running], env_actions, strict=True):
                        running[env], _, terminated, truncated, info = env.step(env_action)
                        if terminated or truncated:
                            del running[env]
                            last_infos[env] = info
                if stop_signals:
                    break
                for env in envs[: num_episodes - first]:
                    returns.append(last_infos[env]["return"])
                    successes.append(last_infos[env]["success"])
                if frames:
                    from moviepy import ImageSequenceClip

                    video_dir.mkdir(parents=True, exist_ok=True)
                    try:
                        fps = (envs[0].metadata.get("render_fps") or 80) / 4  # of every fourth frame
                        ImageSequenceClip(frames, fps=fps).write_videofile(str(video_dir / f"task{task_idx}.mp4"), logger=None)
                    except OSError:  # Ctrl-C also ends ffmpeg
                        if not stop_signals:
                            raise
                        break
                    say(f"video: {video_dir / f'task{task_idx}.mp4'}")
    if not np.isfinite(returns).all():
        raise BadNumber(f"--env-id {args.env_id}: the returns of an evaluation are {returns}")
    mean = float(np.mean(returns)) if returns else None
    result = {"success_rate": success_rate(successes), "return_mean": mean, "episodes": len(returns), "returns": returns}
    if args.env_id == "MT10" and len(returns) == num_episodes * len(MT10):
        result["success_by_task"] = dict(zip(MT10, np.reshape(successes, (len(MT10), -1)).mean(1).tolist(), strict=True))
    return result


def evaluate_saved_model(args) -> dict:
    """`--evaluate model.pt`: the deterministic policy on the goals it was trained on."""
    check_args(args)
    _, weights = saved_run(args)
    video_dir = Path(args.evaluate).absolute().parent / "videos" if args.capture_video else None
    if args.capture_video:
        check_video(args)
    torch.set_num_threads(args.torch_threads)
    with contextlib.closing(make_env(args, 0)()) as env:
        agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    load_weights(agent, weights, args.evaluate)
    result = evaluate(agent, args, args.eval_episodes, video_dir)
    say(json.dumps({key: value for key, value in result.items() if key != "returns"}, indent=2))
    return result


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


# -------------------- Processes --------------------
class Worker:
    """Calls an object's methods in a process of its own, or in this one: `start(name, *arguments)`, then `result()`."""

    pipes: ClassVar = weakref.WeakSet()  # all that this process has to others

    def __init__(self, factory, *args, own_process: bool):
        self.process, self.busy, self.answer = None, False, None
        if not own_process:
            self.instance = factory(*args)
            return
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.pipe, theirs = context.Pipe()
        self.pipes.add(self.pipe)
        self.process = context.Process(target=serve, args=(theirs, factory, args))
        if context.get_start_method() == "spawn":  # now: start() would start it, and that unblocks the signals
            resource_tracker.ensure_running()
        with contextlib.ExitStack() as on_error:  # Ctrl-C, too: then nobody has this object to close it
            on_error.callback(self.pipe.close)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they wait for the handlers of follow_parent()
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            on_error.pop_all()

    def start(self, name: str, *arguments, **keywords) -> None:
        """Begin a call; in this process, also finish it."""
        self.busy = True
        if self.process is None:
            self.answer = getattr(self.instance, name)(*arguments, **keywords)
        else:
            with contextlib.suppress(OSError):  # if it has died, result() says so
                self.pipe.send(convert((name, arguments, keywords), torch.Tensor, SentTensor))

    def result(self):
        """Wait for what the started call returns."""
        self.busy = False
        if self.process is None:
            return self.answer
        try:
            error, text, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            how = f"exit code {self.process.exitcode}; -9: killed, perhaps for want of memory"
            raise RuntimeError(f"a process of the environments has died ({how})") from None
        if error is not None:
            raise pickle.loads(error) from RuntimeError(f"in a process of the environments:\n{text}")
        return convert(answer, SentTensor, SentTensor.tensor)

    def call(self, name: str, *arguments):
        """start() and result()."""
        self.start(name, *arguments)
        return self.result()

    def hang_up(self) -> None:
        """Have a process of its own close the object and end; close() waits for it."""
        if self.process is not None:
            self.pipe.close()

    def close(self, timeout: float = 2.0) -> None:
        """Close the object, once; end the process after so many seconds, whatever it is doing."""
        if self.process is None:
            instance, self.instance = self.instance, None
            if instance is not None:
                instance.close()
        else:
            self.pipe.close()
            try:
                self.process.join(timeout)
            finally:  # also after another Ctrl-C
                self.process.kill()
                self.process.join()


def serve(pipe, factory, args) -> None:
    """Main function of a Worker's process: build the object, then answer calls. An exception, also one of building it, is
    sent in place of the next answer, and the process ends."""
    for parents_end in [*Worker.pipes]:  # which a fork inherits: a process ends when nobody else holds the other end
        parents_end.close()
    follow_parent()
    with contextlib.ExitStack() as at_exit:
        try:
            instance = factory(*args)
            at_exit.callback(instance.close)
            while True:
                name, arguments, keywords = convert(pipe.recv(), SentTensor, SentTensor.tensor)
                pipe.send((None, "", convert(getattr(instance, name)(*arguments, **keywords), torch.Tensor, SentTensor)))
        except Exception as error:
            try:
                sent = pickle.dumps(error)  # pipe.send() would leave a tensor's numbers with this process, which ends
                pickle.loads(sent)
            except Exception:  # some exceptions do not survive the way
                sent = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
            with contextlib.suppress(OSError):  # the pipe is closed: no more calls
                pipe.send((sent, traceback.format_exc(), None))


def follow_parent() -> None:
    """In a process started by this script: leave signals to the main process, and end when that ends, for whatever reason."""
    for signum in STOP_SIGNALS:
        # A program that the environment starts inherits what is ignored, not a handler, so that terminate() can end it.
        signal.signal(signum, (lambda *_: None) if signum == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def build_env(args, idx: int) -> gym.Env:
    """What make_env() builds. In a process of its own it has a seed of its own, or all environments would draw the same."""
    if args.async_envs:
        seed_everything(1000 * args.seed + idx)
    return make_env(args, idx)()


class SentTensor:
    """A tensor on its way to another process: torch would pass it as an open file, and pickles it ten times as slowly."""

    def __init__(self, tensor: torch.Tensor):
        self.array = tensor.numpy()

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.array)


def convert(tree, kind: type, function):
    """Apply a function to all values of one type in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: convert(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [convert(value, kind, function) for value in tree]
        return values if isinstance(tree, list) else tuple(values)
    return function(tree) if isinstance(tree, kind) else tree


# -------------------- Meta-World: goals, and twice the speed --------------------
@functools.cache
def meta_world_goals(task: str, seed: int) -> list:
    """The 50 training goals of a Meta-World task: fixed by the seed, so all environments of a run share them (1 s)."""
    return metaworld.MT1(task, seed=seed).train_tasks


@functools.cache
def fast_meta_world(task: str) -> type:
    """Subclass of a Meta-World task with its slowest functions rewritten: equal numbers (1e-14) at about half the time."""
    stock = META_WORLD[task]
    if hasattr(sys.modules[stock.__module__], "Rotation"):  # half of the tasks convert a rotation at every step
        sys.modules[stock.__module__].Rotation = FastRotation

    class FastTask(stock):
        def _get_curr_obs_combined_no_goal(self):
            obs = np.zeros(4 + self._obs_obj_max_len)
            obs[:3] = self.get_endeff_pos()
            claws = self.data.body("rightclaw").xpos - self.data.body("leftclaw").xpos
            obs[3] = min(math.sqrt(claws.dot(claws)) / 0.1, 1.0)
            position, quaternion = self._get_pos_objects(), self._get_quat_objects()
            for i in range(len(position) // 3):
                obs[4 + 7 * i : 7 + 7 * i] = position[3 * i : 3 * i + 3]
                obs[7 + 7 * i : 11 + 7 * i] = quaternion[4 * i : 4 * i + 4]
            return obs

        def touching_object(self, object_geom_id):
            geoms, address = self.data.contact.geom, self.data.contact.efc_address
            touching = (geoms == object_geom_id).any(1)
            for pad in ("leftpad_geom", "rightpad_geom"):
                rows = address[touching & (geoms == self.data.geom(pad).id).any(1)]
                if not self.data.efc_force[rows].sum() > 0:
                    return False
            return True

    return FastTask


class FastRotation:
    """scipy's Rotation.from_matrix(m).as_quat() for one rotation matrix, with scipy's choice of sign."""

    @staticmethod
    def from_matrix(matrix: np.ndarray):
        rotation, wxyz = FastRotation(), np.empty(4)
        mujoco.mju_mat2Quat(wxyz, matrix.ravel())
        (xx, _, _), (_, yy, _), (_, _, zz) = matrix.tolist()
        signs = (xx, yy, zz, xx + yy + zz)
        rotation.quat = wxyz[[1, 2, 3, 0]]
        if rotation.quat[signs.index(max(signs))] < 0:
            rotation.quat = -rotation.quat
        return rotation

    def as_quat(self) -> np.ndarray:
        return self.quat


# -------------------- Files and terminal --------------------
def run_folder_of(args) -> Path:
    """The folder that --resume names, itself or by a file in it, or the one of these arguments."""
    if isinstance(args.resume, str):
        folder = Path(args.resume).parent if os.path.isfile(args.resume) else Path(args.resume)
        return folder if folder.name not in ("", "..") else folder.resolve()  # `.` has no name and no parent
    return Path(args.run_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"


def refuse_existing(run_folder: Path, args) -> None:
    """ArgumentError if a new run would end up in the folder of another."""
    left = {path.name for path in run_folder.iterdir()} if os.path.isdir(run_folder) else set()
    exists = left - {".lock", "args.tmp"}  # what a start on a full disk leaves
    if exists and not (args.resume or args.overwrite):
        raise ArgumentError(f"{run_folder} exists: --resume continues it, --overwrite replaces it, --exp-name names a new one")


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


def save_checkpoint(path: Path, state: dict) -> None:
    """Write tensors and plain types so that the file is complete or absent, whenever the process dies."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    """Read what save_checkpoint wrote; ArgumentError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        how = "it is missing, damaged, or no .pt file of this script"
        raise ArgumentError(f"cannot read {path} ({type(error).__name__}): {how}") from error


def load_weights(agent, weights: dict, path) -> None:
    """ArgumentError if they are those of other networks."""
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        how = "has Agent or the environment changed?"
        raise ArgumentError(f"{path} does not fit the networks of this script: {how}") from error


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


def say(text: str, end: str = "\n") -> None:
    """Print; once nobody reads it any more (`| head`), go on without."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -------------------- Arguments --------------------
def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; what it does not say, --resume and --evaluate take from the run that they name."""
    try:
        args = tyro.cli(Args, args=argv)
    except BrokenPipeError:  # of `--help | head`
        os._exit(0)
    saved, _ = saved_run(args)
    return dataclasses.replace(tyro.cli(Args, args=argv, default=saved), resume=saved.resume) if saved else args


def saved_run(args) -> tuple:
    """Of the run that --evaluate or --resume names: its arguments, with that flag set; and of --evaluate the weights."""
    if args.evaluate is not None:
        path, how = args.evaluate, "give the model.pt or best_model.pt of a run of this file"
        unused = [flag for flag in ("resume", "overwrite", "track", "cuda") if getattr(args, flag)]
        if unused:
            raise ArgumentError(f"--{unused[0]} means nothing with --evaluate: drop it")
        if not os.path.isfile(path):
            raise ArgumentError(f"--evaluate {path!r} is no file: {how}")
        model = load_checkpoint(Path(path))
        if not (isinstance(model, dict) and {"model", "args"} <= model.keys() and model["args"].keys() <= vars(args).keys()):
            raise ArgumentError(f"--evaluate {path} is no model of this script: {how}")
        machine = dict.fromkeys(("resume", "overwrite", "track", "cuda", "torch_compile", "capture_video"), False)
        return Args(**model["args"] | machine | {"evaluate": path}), model["model"]
    if args.overwrite or not args.resume:
        return None, None
    folder = run_folder_of(args)
    if not folder.is_dir():
        raise ArgumentError(f"--resume: there is no {folder}; check the folder or the flags that name it, or drop --resume")
    try:
        saved = json.loads((folder / "args.json").read_text())
        version, script, _ = saved.pop("algorithm_version"), saved.pop("script", None), saved.pop("wandb_id", None)
    except Exception as error:
        raise ArgumentError(f"--resume: {folder / 'args.json'} is missing or damaged: give the folder of a run") from error
    if script not in (None, Path(__file__).name):  # a fork may differ in no argument
        raise ArgumentError(f"--resume: {folder} is a run of {script}: continue it with that file")
    if not saved.keys() <= vars(args).keys():  # fewer: an older file's run
        raise ArgumentError(f"--resume: {folder} is another script's or version's run; --exp-name names a new one")
    if version != ALGORITHM_VERSION:
        how = "move it away and start anew"
        raise ArgumentError(f"--resume: {folder} is of version {version}, not {ALGORITHM_VERSION}: {how}")
    return Args(**saved | {"resume": str(folder), "run_dir": str(folder.parent)}), None


def check_args(args) -> None:
    """Raise ArgumentError, one sentence that names the flag and the fix, for arguments that cannot work."""

    def require(name: str, holds, words: str) -> None:
        if not holds:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)} {words}")

    (saved, _), run = saved_run(args), "to resume" if args.evaluate is None else "of the model"
    may_differ = MACHINE_ARGS if args.evaluate is None else [*MACHINE_ARGS, "eval_episodes"]
    if args.buffer_size < 2 * args.num_envs * args.num_steps:  # GIPO: the textbook form never recomputes
        may_differ = [*may_differ, "recompute_advantages"]
    for name in sorted(vars(saved).keys() - set(may_differ)) if saved else ():
        value = getattr(saved, name)
        require(name, getattr(args, name) == value, f"contradicts the run {run}, which has {value}: drop the flag")
    for name in ("gamma", "gae_lambda", "lr_warmup"):
        require(name, 0 <= getattr(args, name) <= 1, "must be between 0 and 1")
    require("seed", 0 <= args.seed <= 4_000_000, "must be between 0 and 4,000,000")  # 1000 * seed + i must be below 2^32
    require("init_log_std", -20 <= args.init_log_std <= 2, "must be between -20 and 2")
    require("num_bins", 2 <= args.num_bins <= 100_000, "must be 2 or more, at most 100,000")
    positive = "total_timesteps num_envs num_steps minibatch_size updates_per_iteration learning_rate critic_learning_rate"
    positive += " reward_scale max_grad_norm hidden_size checkpoint_every torch_threads"
    positive += " clip_coef update_epochs"
    may_be_zero = "buffer_size eval_every eval_episodes kl_coef ent_coef vf_coef adv_std_floor"
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        if get_origin(field.type) is Literal:
            require(name, value in get_args(field.type), f"must be one of {', '.join(get_args(field.type))}")
        elif name in may_be_zero.split():
            require(name, 0 <= value <= 1e12, "must be 0 or more, at most 1e12")
        elif name in positive.split():
            require(name, 1e-12 <= value <= 1e12, "must be positive, at most 1e12")
    for name, most in (("hidden_size", 16_384), ("torch_threads", 1_024)):
        require(name, getattr(args, name) <= most, f"must be {most:,} or fewer")
    if args.resume == "":
        raise ArgumentError("--resume '' is no folder: give that of a run, or --resume alone with the flags that name it")
    if args.resume and args.overwrite:
        raise ArgumentError("--resume and --overwrite contradict each other: drop one of them")
    if isinstance(args.resume, str) and os.path.abspath(args.run_dir) != os.path.dirname(os.path.abspath(run_folder_of(args))):
        raise ArgumentError(f"--run-dir {args.run_dir} contradicts --resume {args.resume}: drop one of them")
    if "/" in args.exp_name or "\0" in args.exp_name:
        raise ArgumentError(f"--exp-name {args.exp_name!r} is part of a folder's name: leave out the slash")
    try:
        limit = dict(**json.loads(args.env_kwargs)).get("max_episode_steps")
    except (TypeError, ValueError) as error:
        how = "must be a JSON object, as in --env-kwargs '{\"name\": 1}'"
        raise ArgumentError(f"--env-kwargs {args.env_kwargs} {how}") from error
    no_limit = limit is None or limit == -1  # of Gymnasium: then the script sets one
    require("env_kwargs", no_limit or (isinstance(limit, int) and limit > 0), "needs 1 or more max_episode_steps")
    module, colon, name = args.env_id.rpartition(":")
    if args.env_id.startswith("Meta-World/"):
        raise ArgumentError(f"--env-id {args.env_id}: give the name of a task, as in --env-id reach-v3, or --env-id MT10")
    try:
        found = not module or importlib.util.find_spec(module)
    except ImportError as error:  # the module is there if it lacks another one; a path is no module
        found = isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}.")
    if not found:
        raise ArgumentError(f"--env-id {args.env_id}: there is no module {module}; install it or set PYTHONPATH to its folder")
    known = [*META_WORLD, "MT10", *gym.registry]
    if not module and (colon or name not in known):  # module:Name-v0 registers itself
        nearest = difflib.get_close_matches(args.env_id, known, n=3, cutoff=0.5) or ["reach-v3", "HalfCheetah-v5"]
        require("env_id", False, f"is unknown; try {', '.join(nearest)}; or module:Name-v0, your own")
    equal_share = args.env_id != "MT10" or args.num_envs % 10 == 0
    goals = 50 if args.env_id in [*META_WORLD, "MT10"] else math.inf
    require("num_envs", equal_share, "must be a multiple of 10 for MT10, as many for every task")
    require("eval_episodes", args.eval_episodes <= goals, "must be 50 or fewer: there are 50 training goals")
    require("eval_episodes", args.evaluate is None or args.eval_episodes > 0, "must be positive with --evaluate")
    rollout = args.num_envs * args.num_steps
    buffer = args.buffer_size or rollout
    require("buffer_size", buffer >= rollout, f"must be 0 or at least num_envs * num_steps = {rollout}")
    buffer -= buffer % rollout
    require("minibatch_size", args.minibatch_size <= buffer, f"must not exceed the buffer of {buffer} steps")
    whole_segments = buffer < 2 * rollout or args.minibatch_size % args.num_steps == 0
    require("minibatch_size", whole_segments, f"must be a multiple of --num-steps {args.num_steps}")
    if args.vtrace and buffer < 2 * rollout:
        raise ArgumentError(f"--vtrace needs replayed segments: raise --buffer-size to {2 * rollout} or more")
    if args.vtrace and not args.recompute_advantages:
        raise ArgumentError("--vtrace needs the current ratios: drop --no-recompute-advantages")
    if args.cuda and not torch.cuda.is_available():
        raise ArgumentError("--cuda: PyTorch sees no GPU here; use --no-cuda or install a CUDA build of torch")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if args.torch_compile and shutil.which(compiler) is None:
        raise ArgumentError(f"--torch-compile needs a C++ compiler, {compiler}: install it, or give --no-torch-compile")
    if args.capture_video and not args.eval_episodes:
        raise ArgumentError("--capture-video records evaluations: drop it, or give 1 or more --eval-episodes")
    for flag, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, flag) and not getattr(importlib.util.find_spec(package), "origin", None):  # a folder has none
            raise ArgumentError(f"--{flag.replace('_', '-')} needs the package {package}: pip install {package}")


def check_spaces(args, obs_space, action_space) -> None:
    """ArgumentError unless observations can become a vector and actions are one of finite real numbers."""
    if not obs_space.is_np_flattenable or isinstance(obs_space, gym.spaces.Text):
        what = f"observations of no fixed size, {obs_space}: wrap or choose another"
    elif gym.spaces.flatdim(obs_space) == 0:
        what = f"empty observations, {obs_space}: choose another"
    elif not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1 or 0 in action_space.shape:
        what = f"the action space {action_space}: choose one with a Box of shape (d,)"
    elif not np.issubdtype(action_space.dtype, np.floating):
        what = f"the action space {action_space}: choose one with real numbers"
    elif not np.abs([action_space.low, action_space.high]).max() < 1e30:
        what = f"the action space {action_space}: choose one with a finite Box"
    else:
        return
    raise ArgumentError(f"--env-id {args.env_id} has {what}")


@seeded(0)  # the environments of the run may draw from the same global generators
def check_video(args) -> None:
    """ArgumentError unless --capture-video can render."""
    try:
        from moviepy import ImageSequenceClip  # noqa: F401
    except ImportError as error:
        raise ArgumentError("--capture-video needs moviepy 2 or newer: pip install -U moviepy") from error
    how = "without a display, set MUJOCO_GL=egl (Debian: libegl1 libgl1 libopengl0) or MUJOCO_GL=osmesa (libosmesa6)"
    nowhere = sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & set(os.environ)
    try:
        with contextlib.closing(make_env(args, 0, render_mode="rgb_array")()) as env:
            blind = nowhere and hasattr(env.unwrapped, "mujoco_renderer")  # whose attempt would end the process
            env.reset()
            frame = None if blind else env.render()
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArgumentError(f"--capture-video cannot render ({why}); {how}") from error
    if blind:
        raise ArgumentError(f"--capture-video finds no display: {how}")
    if not isinstance(frame, np.ndarray):
        raise ArgumentError(f"--capture-video: render() of {args.env_id} returns {type(frame).__name__}, not an image")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ArgumentError, BadNumber) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
