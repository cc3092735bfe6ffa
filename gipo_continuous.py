"""GIPO on continuous control: Gaussian Importance sampling Policy Optimization (arXiv 2603.03955), in one file.

    omega = exp(-(l / sigma)^2 / 2)      l = log pi(a|s) - log mu(a|s),  rho = exp(l),  mu = the policy that acted
    loss  = -mean(omega * rho * A)       omega is a constant in the backward pass

    python gipo_continuous.py --env-id reach-v3          # any Meta-World task, MT10, or a Gymnasium id with a Box action space
    -> success rate 1.0 on the 50 training goals after 300,000 steps, 5 minutes on one CPU core

What differs from PPO (`diff ppo_baseline.py gipo_continuous.py`; every hunk is marked by a `# GIPO:` comment):
1. A smooth trust weight replaces the hard clip: no sample is cut off, its gradient fades with |log ratio| and is bounded:
   omega * rho <= exp(sigma^2 / 2).
2. So data is not thrown away after one rollout: a replay buffer keeps the segments of many past rollouts.
3. Actions in the buffer are old, the critic is not: every update recomputes the advantages with the current critic.
4. Positive and negative advantages may have different widths (sigma, sigma * sigma_neg_ratio); a KL penalty to mu is optional.

Docs: docs/gipo_continuous.md.  Method: https://arxiv.org/abs/2603.03955
"""

import collections
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import metaworld
import numpy as np
import torch
import torch.nn as nn
import tyro
from metaworld.wrappers import OneHotWrapper, RandomTaskSelectWrapper

META_WORLD = metaworld.ALL_V3_ENVIRONMENTS
MT10 = list(metaworld.env_dict.MT10_V3)
ALGORITHM_VERSION = 1  # raised whenever equal arguments give other results; the benchmark never mixes versions
MAX_EPISODE_STEPS = 10_000  # of an environment that sets no time limit: without one, evaluation might never end
MAX_LOG_COEF = 20.0  # exp(20) is finite in float32 with room to spare; exp(l) alone overflows at l = 88


@dataclass
class Args:
    # ---- experiment
    exp_name: str = "gipo"  # GIPO: name
    """name of this experiment: the run lives in <run-dir>/{env_id}__{exp_name}__{seed}"""
    seed: int = 1
    """seed of the networks, the sampling, and the Meta-World goals (each seed has its own 50 training goals)"""
    run_dir: str = "runs"
    """parent folder of all runs"""
    resume: bool = False
    """continue an interrupted run exactly where its last checkpoint is; the arguments come from its args.json"""
    overwrite: bool = False
    """delete an existing run of the same name first"""
    evaluate: str | None = None
    """path of a model.pt: evaluate it, with the environment and seed it was trained on, and do nothing else"""
    eval_every: int = 100_000
    """environment steps between evaluations (0: only at the end)"""
    eval_episodes: int = 50
    """episodes of an evaluation: the first k training goals, k <= 50 on Meta-World (0: never evaluate); MT10: goals per task,
    at most 5 of them during training"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    capture_video: bool = False
    """record the first episode of every evaluation as mp4 (needs moviepy and an OpenGL library, see the README)"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project: str = "gipo"
    """Weights & Biases project"""

    # ---- environment
    env_id: str = "reach-v3"
    """a Meta-World task (reach-v3, ...), MT10, or any Gymnasium id with a Box action space (HalfCheetah-v5, ...)"""
    num_envs: int = 8
    """N: parallel environments (MT10: a multiple of 10); a rollout has N * num_steps steps, so a larger N makes the replay
    younger and uses every step less often unless buffer_size and updates_per_iteration grow with it"""
    async_envs: bool = False
    """one process per environment: for slow environments on many cores; on 2 cores reach-v3 runs at 0.89 and pick-place-v3 at
    0.96 of the speed of stepping them in turn"""
    fast_env: bool = True
    """Meta-World's slow helper functions rewritten, equal to 1e-14; --no-fast-env steps the stock package"""
    reward_scale: float = 0.01
    """constant factor on rewards in the losses, not in the logs: keeps values near 1-10 (Meta-World pays 0-10 per step)"""

    # ---- algorithm
    total_timesteps: int = 300_000
    """environment steps of the whole run, rounded up to whole rollouts"""
    num_steps: int = 16  # GIPO: short segments, replayed
    """T: steps per environment and rollout; also the length of a replayed segment (16-250)"""
    buffer_size: int = 5_120  # GIPO: replay of 40 rollouts
    """replay buffer in environment steps, rounded down to whole rollouts; 0: one rollout, near on-policy (0 to 500,000)"""
    minibatch_size: int = 128  # GIPO: 8 segments
    """environment steps per update; where segments are replayed, a multiple of num_steps"""
    updates_per_iteration: int = 10
    """updates after each rollout from replayed segments; times minibatch_size / (num_envs * num_steps): the replay ratio"""
    learning_rate: float = 3e-4
    """Adam step size of the actor (1e-4 to 1e-3)"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic (3e-4 to 3e-3)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the actor's step size falls to 0 over the run"""
    critic_lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the critic's step size falls to 0 over the run"""
    lr_warmup: float = 0.0
    """share of the run over which both step sizes rise linearly to their value, from 0 in the first rollout"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of GAE and of the V-trace trace"""
    recompute_advantages: bool = True
    """advantages from the current critic inside every update; --no-recompute-advantages keeps those of collection time"""
    vtrace: bool = False
    """V-trace targets and advantages (truncated joint ratios, arXiv 1802.01561) instead of GAE"""
    policy_head: Literal["gaussian", "categorical"] = "categorical"  # GIPO: as the authors do
    """diagonal Gaussian with a tanh-bounded mean, or evenly spaced bins per action dimension as in the paper"""
    num_bins: int = 256
    """bins of the categorical head per action dimension, 256 in the paper (64: half as fast again, and worse on door-open)"""
    init_log_std: float = -0.5
    """initial log standard deviation of the Gaussian head, actions being in [-1, 1] (-1 to 0)"""
    hidden_size: int = 256
    """width of the two hidden layers of actor and critic"""
    ratio: Literal["joint", "per-dim"] = "per-dim"  # GIPO: as the authors do
    """importance ratio of the whole action, or one per dimension as in the paper's code (sigma then acts per dimension)"""
    kl_coef: float = 0.0
    """weight of the penalty KL(mu || pi), estimated by mean(-l) (0 to 0.5)"""
    ent_coef: float = 0.001  # GIPO: many updates per sample narrow the policy fast
    """weight of the entropy bonus (0 to 0.02)"""
    vf_coef: float = 0.5
    """weight of the value loss; actor and critic share no parameters, so it matters only through gradient clipping"""
    max_grad_norm: float = 0.5
    """gradient norm limit, for actor and critic apart"""
    adv_std_floor: float = 0.1
    """advantages are divided by their standard deviation, but by no less than this share of its largest value so far"""

    # ---- GIPO
    sigma: float = 0.2  # GIPO: the trust weight
    """sigma: width of the trust weight in units of the log ratio (0.2 to 1; joint ratios spread wider: 0.5 to 2)"""
    sigma_neg_ratio: float = 1.0
    """sigma of negative advantages as a multiple of sigma (0.5 to 1)"""
    adaptive_sigma: float = 0.0
    """an ablation beyond the paper: sigma as a multiple of the log ratio's standard deviation in each minibatch, but at least
    0.05 (0.7; 0: the fixed sigma)"""
    kernel: Literal["gaussian", "laplacian", "cauchy"] = "gaussian"
    """shape of the trust weight; only the Gaussian bounds omega * rho for every sigma"""
    trust_weight: Literal["gipo", "sapo", "none"] = "gipo"
    """gipo, or its published baselines: sapo (arXiv 2511.20347), none (plain importance sampling, omega = 1)"""
    trust_side: Literal["both", "outward"] = "both"
    """outward: an ablation beyond the paper, omega = 1 where the policy moved against the advantage, as in PPO's clip"""
    sapo_tau_pos: float = 1.0
    """SAPO's temperature for positive advantages (1.0 in its paper, 2.0 in the GIPO authors' code)"""
    sapo_tau_neg: float = 1.05
    """SAPO's temperature for negative advantages (1.05 in its paper, 2.0 in the GIPO authors' code)"""

    # ---- runtime
    cuda: bool = False
    """run the networks on the GPU: does not pay for networks of this size (half to three quarters of the speed on reach-v3)"""
    torch_compile: bool = False
    """compile both networks: 1.1 times the speed on reach-v3 on a CPU, after up to a minute of compiling"""
    torch_threads: int = 1
    """CPU threads of PyTorch; 1 is best for these networks and lets several runs share a machine"""


# -------------------- Environment --------------------
class EpisodeRecorder(gym.Wrapper):
    """Latch success over the episode, and remember what rebuilds it exactly: the generator at its reset and its actions.

    `info` is empty except at the last step of an episode: {"episode": {r, l, t}} and, if the environment reports it,
    "success" 0.0 or 1.0. A vector environment that gathers Meta-World's seven entries at every step is slower by a tenth.
    """

    resume_from: dict | None = None  # set from outside before reset(): a snapshot to rebuild instead of a new episode

    def reset(self, *, seed=None, options=None):
        past_actions = []
        if self.resume_from is not None:
            self.unwrapped.np_random.bit_generator.state = self.resume_from["generator"]
            past_actions, self.resume_from = self.resume_from["actions"], None
        self.generator = self.unwrapped.np_random.bit_generator.state
        self.actions, self.success = [], None
        obs, _ = self.env.reset(seed=seed, options=options)
        for action in past_actions:
            obs, *_ = self.step(action)
        return obs, {}

    def step(self, action):
        self.actions.append(action.copy())  # before the step, which may change it in place
        obs, reward, terminated, truncated, info = self.env.step(action)
        success = info.get("success", info.get("is_success"))  # Meta-World's name, Gymnasium-Robotics' name
        if success is not None:  # one successful step makes a successful episode, as Meta-World defines it
            self.success = max(self.success or 0.0, float(success))
        if not (terminated or truncated):
            return obs, reward, terminated, truncated, {}
        last_info = {"episode": info["episode"]} | ({} if self.success is None else {"success": self.success})
        return np.array(obs), reward, terminated, truncated, last_info  # a copy: the reset that follows may reuse the memory

    def snapshot(self) -> dict:
        """State of the current episode as plain types."""
        return {"generator": self.generator, "actions": self.actions}


class PlainRotation:
    """scipy's Rotation.from_matrix(m).as_quat() for one orthogonal matrix, in plain floats and with scipy's choice of sign."""

    @staticmethod
    def from_matrix(matrix: np.ndarray):
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = matrix.tolist()
        trace = xx + yy + zz
        largest = max(xx, yy, zz, trace)
        if largest == xx:
            quat = (1 - trace + 2 * xx, yx + xy, zx + xz, zy - yz)
        elif largest == yy:
            quat = (xy + yx, 1 - trace + 2 * yy, zy + yz, xz - zx)
        elif largest == zz:
            quat = (xz + zx, yz + zy, 1 - trace + 2 * zz, yx - xy)
        else:
            quat = (zy - yz, xz - zx, yx - xy, 1 + trace)
        rotation = PlainRotation()
        rotation.quat = np.array(quat) / math.sqrt(sum(q * q for q in quat))
        return rotation

    def as_quat(self) -> np.ndarray:
        return self.quat


@functools.cache
def fast_meta_world(task: str) -> type:
    """Subclass of a Meta-World task with its slowest functions rewritten: equal numbers (1e-14) at about half the time.

    Most of a stock step is not physics but scipy and numpy calls on arrays of 3 to 9 numbers, and Python loops over contacts.
    """
    stock = META_WORLD[task]

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

    quat_objects = stock._get_quat_objects
    if "Rotation" in quat_objects.__globals__:  # the same code with its name `Rotation` bound to ours, the package unchanged
        names = {**quat_objects.__globals__, "Rotation": PlainRotation}
        FastTask._get_quat_objects = types.FunctionType(quat_objects.__code__, names, closure=quat_objects.__closure__)
    return FastTask


@functools.cache
def meta_world_goals(task: str, seed: int) -> list:
    """The 50 training goals of a Meta-World task: fixed by the seed, so all environments of a run share them (1 s)."""
    return metaworld.MT1(task, seed=seed).train_tasks


def make_env(args, idx: int, render_mode: str | None = None):
    """Return a function that builds environment number `idx`; for MT10, `idx % 10` is the task.

    Meta-World ignores reset(seed): goals come from the constructor's seed and their order from `seed()`, which is what
    keeps the 50 goals equal and their order different over the environments. The stack equals gym.make("Meta-World/MT1")
    less the wrappers that do nothing here, and the goals are drawn once instead of once per environment.
    """
    task = MT10[idx % len(MT10)] if args.env_id == "MT10" else args.env_id
    goals = meta_world_goals(task, args.seed) if task in META_WORLD else None

    def thunk():
        if multiprocessing.parent_process() is not None:  # a worker of --async-envs: the main process handles Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if goals is not None:
            task_class = fast_meta_world(task) if args.fast_env else META_WORLD[task]
            env = task_class(reward_function_version="v2", render_mode=render_mode)
            env.seed(1000 * args.seed + idx)
            env = gym.wrappers.TimeLimit(env, env.max_path_length)
            if args.env_id == "MT10":
                env = OneHotWrapper(env, idx % len(MT10), len(MT10))
            env = RandomTaskSelectWrapper(gym.wrappers.RecordEpisodeStatistics(env), goals)
        else:
            env = gym.make(args.env_id, **({"render_mode": render_mode} if render_mode else {}))
            if env.spec.max_episode_steps is None:
                env = gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)
            env = gym.wrappers.RecordEpisodeStatistics(env)
            if len(env.observation_space.shape or ()) != 1:
                env = gym.wrappers.FlattenObservation(env)
            env.reset(seed=1000 * args.seed + idx)
        return EpisodeRecorder(env)

    return thunk


def to_env_action(action: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Map policy actions to the Box: clip to [-1, 1], then affinely onto [low, high], which rounding must not overstep."""
    action = space.low + (np.clip(action, -1.0, 1.0) + 1.0) * 0.5 * (space.high - space.low)
    return np.clip(action, space.low, space.high).astype(space.dtype)


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
        self.register_buffer("adv_std_peak", torch.zeros(()))

    def actor_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.startswith("actor")]

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

    def get_action_and_logprob(self, obs, action=None, deterministic=False):
        """Sample an action, or take one: (..., obs_dim) -> action, log-probs per dimension, entropy (all (..., action_dim)).

        Actions are unclipped samples in units of [-1, 1]; the joint log-prob is the sum over the last dimension.
        """
        out = self.actor(self.normalize(obs))
        if self.categorical:
            logprobs = torch.log_softmax(out.unflatten(-1, (self.action_dim, self.num_bins)), dim=-1)
            probs = logprobs.exp()
            if action is None and deterministic:  # the mean: among many neighbours the most probable bin says little
                action = probs @ torch.linspace(-1.0, 1.0, self.num_bins, device=out.device)
            if action is not None:
                token = ((action + 1.0) * 0.5 * (self.num_bins - 1)).round().long()
            else:
                token = torch.multinomial(probs.flatten(0, -2), 1).view(logprobs.shape[:-1])
                action = -1.0 + 2.0 * token / (self.num_bins - 1)
            entropy = -(probs * logprobs).sum(-1)
            return action, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1), entropy
        if action is None:
            action = out if deterministic else out + self.actor_logstd.exp() * torch.randn_like(out)
        z = (action - out) * torch.exp(-self.actor_logstd)
        logprob = -0.5 * z**2 - self.actor_logstd - 0.5 * math.log(2 * math.pi)
        return action, logprob, (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).expand_as(out)


# -------------------- Advantages and objective --------------------
# ALGO LOGIC: advantages, replay sampling, and policy_objective, where a new objective goes
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


def get_next_values(agent, values, next_obs, dones):
    """V of the real next observation, (T, S): the following row's value, or the critic on `next_obs` where there is none."""
    ends = dones > 0
    ends[-1] = True
    next_values = torch.cat([values[1:], values[-1:]])
    next_values[ends] = agent.get_value(next_obs[ends])
    return next_values


def sample_segments(num_filled: int, args) -> torch.Tensor:
    """Indices of each update's segments, (updates, S), in shuffled passes: none is drawn again before all others were."""
    segments = args.minibatch_size // args.num_steps
    draws = args.updates_per_iteration * segments
    passes = [torch.randperm(num_filled) for _ in range(math.ceil(draws / num_filled))]
    return torch.cat(passes)[:draws].view(-1, segments)


def gipo_log_weight(logratio, advantages, sigma_pos, sigma_neg, kernel):  # GIPO: the trust weight
    """log omega: the kernel's closed form, in log space so that no product of a huge ratio and a tiny weight is formed."""
    x = logratio.detach() / torch.where(advantages > 0, sigma_pos, sigma_neg)
    if kernel == "gaussian":
        return -0.5 * x**2
    if kernel == "laplacian":
        return -x.abs()
    if kernel == "cauchy":
        return -torch.log1p(x**2)
    raise ValueError(f"unknown kernel {kernel}")


def gipo_weight(logratio, advantages, sigma_pos, sigma_neg, kernel):
    """Trust weight omega in (0, 1], detached (eq. 5 of the sister paper AcceRL, arXiv 2603.18464).

    `logratio` has shape (B,) or (B, d), `advantages` one that broadcasts to it; sigma_pos applies where A > 0. For importers:
    an update uses its logarithm.
    """
    return gipo_log_weight(logratio, advantages, sigma_pos, sigma_neg, kernel).exp()


def policy_objective(logratio, advantages, args):
    """Per-sample surrogate to maximise, and its detached trust: d surrogate / d logratio = trust * ratio * advantage."""
    if args.trust_weight == "sapo":
        tau = torch.where(advantages > 0, args.sapo_tau_pos, args.sapo_tau_neg)  # GIPO: its published baselines, by flag
        gate = torch.sigmoid(tau * (torch.exp(logratio.clamp(max=MAX_LOG_COEF)) - 1.0))
        return 4.0 / tau * gate * advantages, (4.0 * gate * (1.0 - gate)).detach()
    log_trust = torch.zeros_like(logratio)
    if args.trust_weight == "gipo":
        sigma = args.sigma
        if args.adaptive_sigma:  # wider where samples are older; the floor is for those just collected, l near 0
            sigma = max(args.adaptive_sigma * logratio.detach().std(correction=0).item(), 0.05)
        log_trust = gipo_log_weight(logratio, advantages, sigma, sigma * args.sigma_neg_ratio, args.kernel)
    if args.trust_side == "outward":
        log_trust = torch.where(logratio.detach() * advantages > 0, log_trust, 0.0)
    return torch.exp((logratio + log_trust.detach()).clamp(max=MAX_LOG_COEF)) * advantages, log_trust.exp()


# -------------------- Evaluation and files --------------------
@torch.no_grad()
def evaluate(agent, args, num_episodes: int, video_dir: Path | None = None, stop_signals=()) -> dict:
    """Run the deterministic policy once on each of the first `num_episodes` training goals (MT10: of every task).

    Gymnasium environments without goals get fixed reset seeds instead. Returns `success_rate` (None where the environment
    reports none), `return_mean`, `episodes`, `returns`, and for MT10 `success_by_task`. Ends early once a signal arrived.
    """
    returns, successes, has_goals = [], [], args.env_id in [*META_WORLD, "MT10"]
    for task_idx in range(len(MT10) if args.env_id == "MT10" else 1):
        env = make_env(args, task_idx, render_mode="rgb_array" if video_dir else None)()
        if has_goals:
            env.get_wrapper_attr("toggle_sample_tasks_on_reset")(False)
        for episode in range(num_episodes):
            if has_goals:
                env.unwrapped.set_task(env.get_wrapper_attr("tasks")[episode])
            obs, done, frames = env.reset(seed=10_000 + episode)[0], False, []
            while not done and not stop_signals:
                if video_dir and episode == 0 and len(env.get_wrapper_attr("actions")) % 4 == 0:
                    frames.append(env.render())
                obs = torch.as_tensor(obs, dtype=torch.float32, device=agent.obs_mean.device)
                action, *_ = agent.get_action_and_logprob(obs.unsqueeze(0), deterministic=True)
                obs, _, terminated, truncated, info = env.step(to_env_action(action[0].cpu().numpy(), env.action_space))
                done = terminated or truncated
            if stop_signals:
                break
            if frames:
                from moviepy import ImageSequenceClip

                video_dir.mkdir(parents=True, exist_ok=True)
                ImageSequenceClip(frames, fps=20).write_videofile(str(video_dir / f"task{task_idx}.mp4"), logger=None)
            returns.append(float(info["episode"]["r"]))
            successes.append(info.get("success"))
        env.close()
    has_success = bool(successes) and None not in successes
    result = {
        "success_rate": float(np.mean(successes)) if has_success else None,
        "return_mean": float(np.mean(returns)) if returns else None,
        "episodes": len(returns),
        "returns": returns,
    }
    if args.env_id == "MT10" and has_success and not stop_signals:
        result["success_by_task"] = dict(zip(MT10, np.reshape(successes, (10, -1)).mean(1).tolist(), strict=True))
    return result


def save_checkpoint(path: Path, state: dict) -> None:
    """Write tensors and plain types so that the file is complete or absent, whenever the process dies."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, device="cpu") -> dict:
    """Read what save_checkpoint wrote; ValueError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        how = "it is no .pt file of this script, or damaged; --overwrite instead of --resume starts the run anew"
        raise ValueError(f"cannot read {path} ({type(error).__name__}): {how}") from error


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def git_commit() -> str | None:
    """Commit of this file's repository, with -dirty appended if it has changes; None outside a repository."""
    command, folder = "git describe --always --dirty --abbrev=40 --exclude=*", Path(__file__).resolve().parent
    try:
        return subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save_models(run_folder: Path, agent, config: dict, evaluation: dict | None, global_step: int) -> None:
    """Write model.pt, and best_model.pt if this evaluation beats the one stored there: success first, then return."""
    model = {"model": agent.state_dict(), "args": config, "global_step": global_step, "score": None}
    if evaluation:
        success = evaluation["success_rate"]
        model["score"] = [-1.0 if success is None else success, evaluation["return_mean"]]
    save_checkpoint(run_folder / "model.pt", model)
    best = run_folder / "best_model.pt"
    if evaluation and (not best.exists() or model["score"] > load_checkpoint(best)["score"]):
        save_checkpoint(best, model)


def check_args(args) -> None:
    """Raise ValueError, one sentence that names the flag and the fix, for arguments that cannot work."""
    rollout, meta_world = args.num_envs * args.num_steps, [*META_WORLD, "MT10"]
    buffer = max(args.buffer_size, rollout)
    positive = "total_timesteps num_envs num_steps minibatch_size updates_per_iteration learning_rate critic_learning_rate"
    positive += " reward_scale max_grad_norm hidden_size checkpoint_every torch_threads"
    positive += " sigma sigma_neg_ratio sapo_tau_pos sapo_tau_neg"  # GIPO: its flags
    limits = dict.fromkeys(positive.split(), (1e-12, math.inf, "positive"))
    limits |= dict.fromkeys("gamma gae_lambda lr_warmup".split(), (0, 1, "between 0 and 1"))
    not_negative = "seed buffer_size eval_every eval_episodes kl_coef ent_coef vf_coef adv_std_floor"
    not_negative += " adaptive_sigma"  # GIPO: its flag
    limits |= dict.fromkeys(not_negative.split(), (0, math.inf, "0 or more"))
    for name, (low, high, words) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be {words}")
    if args.num_bins < 2:
        raise ValueError(f"--num-bins {args.num_bins} must be 2 or more")
    if ":" not in args.env_id and args.env_id not in [*meta_world, *gym.registry]:  # module:Name-v0 is registered when built
        nearest = difflib.get_close_matches(args.env_id, [*meta_world, *gym.registry], n=3, cutoff=0.5)
        raise ValueError(f"--env-id {args.env_id} is unknown; try {', '.join(nearest or ['reach-v3', 'HalfCheetah-v5'])}")
    if args.env_id == "MT10" and args.num_envs % len(MT10):
        raise ValueError(f"--num-envs {args.num_envs} must be a multiple of 10 for MT10, as many for every task")
    if args.env_id in meta_world and args.eval_episodes > 50:
        raise ValueError(f"--eval-episodes {args.eval_episodes} must be 50 or fewer: a Meta-World task has 50 training goals")
    if 0 < args.buffer_size < rollout:
        raise ValueError(f"--buffer-size {args.buffer_size} must be 0 or at least num_envs * num_steps = {rollout}")
    if args.minibatch_size > buffer:
        raise ValueError(f"--minibatch-size {args.minibatch_size} must not exceed the buffer of {buffer} steps")
    if args.minibatch_size % args.num_steps:  # GIPO: whole segments
        raise ValueError(f"--minibatch-size {args.minibatch_size} must be a multiple of --num-steps {args.num_steps}")
    if args.trust_side == "outward" and args.trust_weight != "gipo":  # GIPO: an ablation of its weight
        raise ValueError(f"--trust-side outward is for --trust-weight gipo, not {args.trust_weight}: drop one of the flags")
    if args.adaptive_sigma and args.trust_weight != "gipo":  # GIPO: a property of its weight
        raise ValueError(f"--adaptive-sigma is for --trust-weight gipo, not {args.trust_weight}: drop one of the flags")
    if args.vtrace and not args.recompute_advantages:  # GIPO: always replays segments
        raise ValueError("--vtrace needs the current ratios: drop --no-recompute-advantages")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda: PyTorch sees no GPU here; drop the flag or install a CUDA build of torch")
    for flag, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{flag.replace('_', '-')} needs the package {package}: pip install {package}")
    if args.capture_video:
        how = "without a display, set MUJOCO_GL=egl (Debian packages libegl1 libgl1) or MUJOCO_GL=osmesa (libosmesa6)"
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & set(os.environ):
            raise ValueError(f"--capture-video finds no display: {how}")
        try:
            env = make_env(args, 0, render_mode="rgb_array")()
            env.reset()
            env.render()
            env.close()
        except Exception as error:
            raise ValueError(f"--capture-video cannot render ({type(error).__name__}): {how}") from error


def env_spaces(args) -> tuple[gym.Space, gym.spaces.Box]:
    """Observation and action space of the task; ValueError if it cannot be built or its actions are no finite vector."""
    try:
        env = make_env(args, 0)()
    except Exception as error:  # another package is missing, a retired version, ...
        raise ValueError(f"--env-id {args.env_id} cannot be built: {' '.join(str(error).split())}") from error
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"--env-id {args.env_id} has the action space {space}: choose one with a Box of shape (d,)")
    if not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"--env-id {args.env_id} has the action space {space}: choose one with real numbers")
    if not (np.isfinite([space.low, space.high]).all() and np.abs([space.low, space.high]).max() < 1e30):
        raise ValueError(f"--env-id {args.env_id} has the action space {space}: choose one with a finite Box")
    env.close()
    return env.observation_space, space


def typed_flags() -> set[str]:
    """Names of the flags on the command line, also of those that were given their default's value."""
    words = [word.split("=")[0] for word in sys.argv if word.startswith("--")]
    return {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in words}


def saved_args(args, run_folder: Path):
    """Arguments of the run to resume, from its args.json; ValueError if a flag on the command line contradicts them."""
    if not run_folder.exists():
        raise ValueError(f"--resume: there is no {run_folder}; check the flags that name it, or drop --resume")
    if not (run_folder / "args.json").exists():
        return args
    saved = json.loads((run_folder / "args.json").read_text())
    version = saved.pop("algorithm_version", None)
    if version != ALGORITHM_VERSION:
        raise ValueError(f"--resume: {run_folder} is of version {version}, not {ALGORITHM_VERSION}: --overwrite starts anew")
    if not set(saved) <= set(vars(args)):  # fewer is an older file's run: what was added since has its default
        raise ValueError(f"--resume: {run_folder} is another script's or version's run; --exp-name names a new one")
    for field in dataclasses.fields(args):
        given, own = getattr(args, field.name), ("run_dir", "resume", "overwrite")
        named = field.name in typed_flags() or given != field.default
        has = saved.get(field.name, field.default)
        if field.name not in own and named and given != has:
            flag = f"--{field.name.replace('_', '-')}"
            raise ValueError(f"{flag} {given} contradicts the run to resume, which has {has}: drop the flag")
    return dataclasses.replace(type(args)(**saved), run_dir=args.run_dir, resume=True)


def evaluate_saved_model(args) -> dict:
    """`--evaluate model.pt`: the deterministic policy on the goals it was trained on."""
    path = Path(args.evaluate)
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or not {"model", "args"} <= saved.keys() or not set(saved["args"]) <= set(vars(args)):
        raise ValueError(f"--evaluate {path} is no model of this script: give the model.pt or best_model.pt of a run")
    own = {name: getattr(args, name) for name in ("eval_episodes", "capture_video", "torch_threads", "fast_env")}
    for name in sorted(typed_flags() & set(saved["args"]) - {*own, "evaluate", "run_dir"}):
        if getattr(args, name) != saved["args"][name]:
            flag, has = f"--{name.replace('_', '-')} {getattr(args, name)}", saved["args"][name]
            raise ValueError(f"{flag} contradicts the run of the model to evaluate, which has {has}: drop the flag")
    args = dataclasses.replace(type(args)(**saved["args"]), **own, cuda=False, track=False)
    check_args(args)
    torch.set_num_threads(args.torch_threads)
    obs_space, action_space = env_spaces(args)
    agent = Agent(obs_space.shape[0], action_space.shape[0], args)
    agent.load_state_dict(saved["model"])
    video_dir = path.parent / "videos" if args.capture_video else None
    result = evaluate(agent, args, args.eval_episodes, video_dir)
    print(json.dumps({key: value for key, value in result.items() if key != "returns"}, indent=2))
    return result


def lr_share(schedule: str, progress: float, warmup: float) -> float:
    """Factor on a step size after the share `progress` of the run, in [0, 1)."""
    if progress < warmup:
        return progress / warmup
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    return decay[schedule]


# -------------------- Main --------------------
def main(args: Args) -> dict:
    """Train, and return what result.json holds. ValueError on bad arguments, before anything is written."""
    if args.evaluate:
        return evaluate_saved_model(args)

    # ==================== SETUP ====================
    run_folder = Path(args.run_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite contradict each other: drop one of them")
    if args.resume:
        args = saved_args(args, run_folder)
    elif run_folder.exists() and not args.overwrite:
        raise ValueError(f"{run_folder} exists: --resume continues it, --overwrite replaces it, --exp-name names a new one")
    check_args(args)
    obs_space, action_space = env_spaces(args)
    if args.resume and (run_folder / "result.json").exists():
        print(f"{run_folder} is finished already: nothing to resume")
        return json.loads((run_folder / "result.json").read_text())
    has_checkpoint = args.resume and (run_folder / "checkpoint.pt").exists()
    checkpoint = load_checkpoint(run_folder / "checkpoint.pt") if has_checkpoint else None
    if not args.resume:
        shutil.rmtree(run_folder, ignore_errors=True)
        run_folder.mkdir(parents=True)
    config = vars(args) | {"resume": False, "overwrite": False}
    write_json(run_folder / "args.json", config | {"algorithm_version": ALGORITHM_VERSION})

    torch.set_num_threads(args.torch_threads)
    random.seed(args.seed)  # the first two for environments that draw from them
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    agent = Agent(obs_space.shape[0], action_space.shape[0], args).to(device)
    actor_parameters, critic_parameters = agent.actor_parameters(), list(agent.critic.parameters())
    optimizer = torch.optim.Adam([{"params": actor_parameters}, {"params": critic_parameters}], lr=0.0, eps=1e-5, fused=True)
    if args.torch_compile:
        for network in (agent.actor, agent.critic):
            network.forward = torch.compile(network.forward)  # Module.compile() skips a Sequential, whose code is torch's own

    # Replay of whole segments, time first: rb[key][:, j] is segment j, one environment's part of one rollout. (T, S, ...)
    rollout_size = args.num_envs * args.num_steps
    num_segments = max(args.buffer_size // rollout_size, 1) * args.num_envs
    shape, obs_dim, action_dim = (args.num_steps, num_segments), obs_space.shape[0], action_space.shape[0]
    rb = {
        "obs": torch.zeros(*shape, obs_dim, device=device),  # raw, not normalised
        "next_obs": torch.zeros(*shape, obs_dim, device=device),  # the real one, also where the episode ended
        "actions": torch.zeros(*shape, action_dim, device=device),  # unclipped samples
        "logprobs": torch.zeros(*shape, action_dim, device=device),  # log mu(a|s) per action dimension
        "rewards": torch.zeros(shape, device=device),  # raw, not scaled
        "terminations": torch.zeros(shape, device=device),
        "dones": torch.zeros(shape, device=device),  # termination or truncation
        "versions": torch.zeros(shape, device=device),  # iteration whose policy acted
        "advantages": torch.zeros(shape, device=device),  # of collection time; used unless they are recomputed
        "returns": torch.zeros(shape, device=device),
    }
    used = [key for key in rb if not (args.recompute_advantages and key in ("advantages", "returns"))]  # what an update reads

    num_iterations, iteration = math.ceil(args.total_timesteps / rollout_size), 0
    seconds = {"env": 0.0, "policy": 0.0, "update": 0.0, "training": 0.0, "wall": 0.0}  # training: without evaluation
    recent_returns, recent_successes = collections.deque(maxlen=100), collections.deque(maxlen=100)
    vector_env = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    envs = vector_env([make_env(args, i) for i in range(args.num_envs)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    if checkpoint:
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for key, value in checkpoint.pop("replay").items():
            rb[key][:, : value.shape[1]] = value
        iteration, seconds = checkpoint["iteration"], checkpoint["seconds"]
        recent_returns.extend(checkpoint["recent_returns"])
        recent_successes.extend(checkpoint["recent_successes"])
        envs.set_attr("resume_from", [{**e, "actions": list(e["actions"].numpy())} for e in checkpoint["envs"]])
        torch.set_rng_state(checkpoint["rng"])
        if args.cuda:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    next_obs = torch.as_tensor(envs.reset()[0], dtype=torch.float32, device=device)

    from torch.utils.tensorboard import SummaryWriter  # here, because its import takes a second that --help need not wait

    if args.track:
        import wandb

        name = run_folder.name  # also the id, so that a resumed run continues its own curves
        wandb.init(project=args.wandb_project, name=name, id=name, resume="allow", config=config, sync_tensorboard=True)
    global_step = iteration * rollout_size
    writer = SummaryWriter(str(run_folder), purge_step=global_step + 1 if args.resume else None)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in config.items()))

    stop_signals = []  # a first Ctrl-C or SIGTERM ends the run after this iteration, with a checkpoint; a second one at once
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: (stop_signals.append(number), signal.signal(number, signal.SIG_DFL)))
    start_time, last_print, tty = time.time() - seconds["wall"], time.time(), sys.stdout.isatty()
    print(f"{run_folder}: {num_iterations * rollout_size:,} steps of {args.env_id}, from step {global_step:,}", flush=True)

    def passed(every: int) -> bool:  # has a multiple of `every` steps been passed in the last iteration?
        return every > 0 and global_step // every > (global_step - rollout_size) // every

    while True:
        # ==================== EVAL ====================
        # Before collecting more, so that a run which died here evaluates again when resumed.
        finished, evaluation = iteration == num_iterations, None
        eval_due = args.eval_episodes > 0 and iteration > 0 and (finished or passed(args.eval_every))
        if eval_due:
            episodes = min(args.eval_episodes, 5) if args.env_id == "MT10" and not finished else args.eval_episodes
            video_dir = run_folder / "videos" / str(global_step) if args.capture_video else None
            evaluation = evaluate(agent, args, episodes, video_dir, stop_signals)
        if finished and not args.eval_episodes:
            save_models(run_folder, agent, config, None, global_step)
        if evaluation and not stop_signals:
            save_models(run_folder, agent, config, evaluation, global_step)
            writer.add_scalar("eval/return_mean", evaluation["return_mean"], global_step)
            line = f"eval at {global_step:,}: return {evaluation['return_mean']:.1f}"
            if evaluation["success_rate"] is not None:
                writer.add_scalar("eval/success_rate", evaluation["success_rate"], global_step)
                line += f", success {evaluation['success_rate']:.0%} of {evaluation['episodes']} goals"
            for task, success in evaluation.get("success_by_task", {}).items():
                writer.add_scalar(f"eval/success_rate/{task}", success, global_step)
            print(f"\n{line}" if tty else line, flush=True)
        if finished or stop_signals:
            break

        iteration += 1
        iteration_start = time.perf_counter()
        progress = (iteration - 1) / num_iterations
        actor_group, critic_group = optimizer.param_groups
        actor_group["lr"] = args.learning_rate * lr_share(args.lr_schedule, progress, args.lr_warmup)
        critic_group["lr"] = args.critic_learning_rate * lr_share(args.critic_lr_schedule, progress, args.lr_warmup)

        # ==================== ROLLOUT ====================
        # N environments, T steps, into the oldest N segments of the ring.
        slot = (iteration - 1) * args.num_envs % num_segments
        new = slice(slot, slot + args.num_envs)
        rollout = collections.defaultdict(list)
        for _ in range(args.num_steps):
            t0 = time.perf_counter()
            with torch.no_grad():
                action, logprob, _ = agent.get_action_and_logprob(next_obs)
            env_action = to_env_action(action.cpu().numpy(), action_space)
            t1 = time.perf_counter()
            obs_np, rewards, terminations, truncations, infos = envs.step(env_action)
            t2 = time.perf_counter()
            if not np.isfinite(obs_np).all():
                raise FloatingPointError(f"--env-id {args.env_id}: an observation is not finite after step {global_step:,}")
            seconds["policy"] += t1 - t0
            seconds["env"] += t2 - t1
            dones = terminations | truncations
            obs, next_obs = next_obs, torch.as_tensor(obs_np, dtype=torch.float32, device=device)
            real_next_obs = next_obs
            global_step += args.num_envs
            if dones.any():  # SAME_STEP autoreset: `obs_np` is the next episode's first, the last one is in final_obs
                done_idx, final_info = np.flatnonzero(dones), infos["final_info"]
                real_next_obs = next_obs.clone()
                real_next_obs[done_idx] = torch.as_tensor(np.stack(infos["final_obs"][done_idx]), device=device).float()
                recent_returns.extend(final_info["episode"]["r"][done_idx].tolist())
                writer.add_scalar("charts/episodic_return", final_info["episode"]["r"][done_idx].mean(), global_step)
                writer.add_scalar("charts/episodic_length", final_info["episode"]["l"][done_idx].mean(), global_step)
                if "success" in final_info:
                    recent_successes.extend(final_info["success"][done_idx].tolist())
                    writer.add_scalar("charts/episodic_success", final_info["success"][done_idx].mean(), global_step)
            transition = {"obs": obs, "next_obs": real_next_obs, "actions": action, "logprobs": logprob}
            transition |= {"rewards": rewards, "terminations": terminations, "dones": dones}
            for key, value in transition.items():
                rollout[key].append(value)
        for key, value in rollout.items():
            stacked = torch.stack(value) if torch.is_tensor(value[0]) else torch.as_tensor(np.stack(value), device=device)
            rb[key][:, new] = stacked.float()
        rb["versions"][:, new] = iteration

        # ==================== ADVANTAGES ====================
        # Those of collection time; by default the update recomputes them.
        fresh = {key: value[:, new] for key, value in rb.items()}  # views: writing into them writes into the replay
        with torch.no_grad():
            # Nothing changed since these actions were taken, so l is 0 up to rounding, or something is broken.
            fresh_logprob = agent.get_action_and_logprob(fresh["obs"], fresh["actions"])[1]
            log_ratio_max = (fresh_logprob - fresh["logprobs"]).sum(-1).abs().max()
            if not args.recompute_advantages:
                values = agent.get_value(fresh["obs"])
                next_values = get_next_values(agent, values, fresh["next_obs"], fresh["dones"])
                gae_args = fresh["rewards"] * args.reward_scale, values, next_values, fresh["terminations"], fresh["dones"]
                fresh["advantages"][:] = compute_gae(*gae_args, args.gamma, args.gae_lambda)
                fresh["returns"][:] = fresh["advantages"] + values

        # ==================== UPDATE ====================
        # ALGO LOGIC: losses and gradient steps
        t0 = time.perf_counter()
        num_filled, stats = min(iteration * args.num_envs, num_segments), collections.defaultdict(list)
        for mb_inds in sample_segments(num_filled, args):  # GIPO: segments of the whole buffer
            mb = {key: rb[key][:, mb_inds] for key in used}  # (T, S, ...)
            _, newlogprob, entropy = agent.get_action_and_logprob(mb["obs"], mb["actions"])
            newvalue = agent.get_value(mb["obs"])
            logratio = newlogprob - mb["logprobs"]  # (T, S, action_dim)
            joint_logratio = logratio.sum(-1)

            with torch.no_grad():
                if args.recompute_advantages:
                    values = newvalue.detach()
                    next_values = get_next_values(agent, values, mb["next_obs"], mb["dones"])
                    gae_args = mb["rewards"] * args.reward_scale, values, next_values, mb["terminations"], mb["dones"]
                    if args.vtrace:
                        mb_advantages, mb_returns = compute_vtrace(*gae_args, joint_logratio, args.gamma, args.gae_lambda)
                    else:
                        mb_advantages = compute_gae(*gae_args, args.gamma, args.gae_lambda)
                        mb_returns = mb_advantages + values
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

            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(actor_parameters, args.max_grad_norm)
            nn.utils.clip_grad_norm_(critic_parameters, args.max_grad_norm)
            optimizer.step()

            with torch.no_grad():
                error_var, return_var = (mb_returns - newvalue).var(correction=0), mb_returns.var(correction=0)
                ratio = torch.exp(logratio.clamp(max=MAX_LOG_COEF))
                coef = trust * ratio  # of grad log pi * advantage; 1 on-policy
                mb_stats = {
                    "losses/policy_loss": pg_loss,
                    "losses/value_loss": v_loss,
                    "losses/entropy": entropy_loss,
                    "losses/approx_kl": ((ratio - 1) - logratio).mean(),
                    "losses/clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
                    "losses/explained_variance": 1 - error_var / return_var.clamp(min=1e-12),
                    "losses/grad_norm": grad_norm,
                    "gipo/trust_mean": trust.mean(),
                    "gipo/trust_min": trust.min(),
                    "gipo/effective_sample_size": coef.mean() ** 2 / (coef**2).mean().clamp(min=1e-12),
                    "gipo/utilization": (coef > 1e-3).float().mean(),
                    "gipo/logratio_std": logratio.std(correction=0),
                    "gipo/policy_lag": iteration - mb["versions"].mean(),
                }
                for name, value in mb_stats.items():
                    stats[name].append(value.detach())
        agent.update_normalizer(fresh["obs"])  # after the update, so that log ratios on fresh data are 0
        scalars = {name: torch.stack(values).mean().item() for name, values in stats.items()}  # waits for the GPU
        seconds["update"] += time.perf_counter() - t0

        # ==================== LOG ====================
        for name, value in scalars.items():
            if not math.isfinite(value):
                last_good = run_folder / "checkpoint.pt" if (run_folder / "checkpoint.pt").exists() else "none yet"
                raise FloatingPointError(f"{name} is {value} at step {global_step:,}; last good checkpoint: {last_good}")
        seconds["training"] += time.perf_counter() - iteration_start
        sps = global_step / seconds["training"]
        scalars |= {"charts/SPS": sps, "charts/learning_rate": actor_group["lr"]}
        scalars["gipo/log_ratio_max"] = log_ratio_max.item()
        scalars |= {f"time/{part}": seconds[part] / seconds["training"] for part in ("env", "policy", "update")}
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step)
        if tty or time.time() - last_print > 10 or iteration == num_iterations:
            left = (num_iterations - iteration) * rollout_size / sps
            line = f"step {global_step:>9,}  return {np.mean(recent_returns) if recent_returns else math.nan:8.1f}"
            line += f"  success {np.mean(recent_successes):4.0%}" if recent_successes else ""
            line += f"  {sps:5.0f} steps/s  left {left // 60:.0f}m{left % 60:02.0f}s"
            print(f"\r{line} " if tty else line, end="" if tty else "\n", flush=True)
            last_print = time.time()

        # ==================== CHECKPOINT ====================
        # Also before every evaluation, and when asked to stop.
        seconds["wall"] = time.time() - start_time
        if iteration == num_iterations or passed(args.checkpoint_every) or passed(args.eval_every) or stop_signals:
            state = {
                "model": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                # Cloned while it fills up, for a slice would be saved with all the memory behind it.
                "replay": {k: v if num_filled == num_segments else v[:, :num_filled].clone() for k, v in rb.items()},
                "iteration": iteration,
                "seconds": seconds,
                "recent_returns": list(recent_returns),
                "recent_successes": list(recent_successes),
                "envs": [{**e, "actions": torch.tensor(np.array(e["actions"]))} for e in envs.call("snapshot")],
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if args.cuda else None,
            }
            save_checkpoint(run_folder / "checkpoint.pt", state)
            writer.flush()

    envs.close()
    writer.close()
    if stop_signals:
        print(f"\nstopped at step {global_step:,} with a checkpoint; continue with the same command and --resume", flush=True)
        sys.exit(128 + stop_signals[0])
    seconds["wall"], sps = time.time() - start_time, global_step / seconds["training"]
    evaluation = evaluation or {"success_rate": None, "return_mean": None, "episodes": 0}
    result = {
        "env_id": args.env_id,
        "exp_name": args.exp_name,
        "seed": args.seed,
        "total_timesteps": global_step,
        "eval_success_rate": evaluation["success_rate"],
        "eval_return_mean": evaluation["return_mean"],
        "eval_episodes": evaluation["episodes"],
        "train_return_mean": float(np.mean(recent_returns)) if recent_returns else None,
        "train_success_rate": float(np.mean(recent_successes)) if recent_successes else None,
        "sps": sps,
        "wall_seconds": seconds["wall"],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "algorithm": ALGORITHM_VERSION}
        | {package: importlib.metadata.version(package) for package in ("torch", "numpy", "gymnasium", "metaworld", "mujoco")},
        "args": config,
    }
    if "success_by_task" in evaluation:
        result["eval_success_by_task"] = evaluation["success_by_task"]
    write_json(run_folder / "result.json", result)
    shares = ", ".join(f"{part} {seconds[part] / seconds['training']:.0%}" for part in ("env", "policy", "update"))
    print(f"finished in {seconds['wall']:.0f} s, {sps:.0f} steps/s ({shares})")
    print(f"files: {run_folder}   curves: tensorboard --logdir {args.run_dir}")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
