"""Bias and variance of the GIPO gradient on a 2x2 GridWorld, computed exactly, as arXiv 2603.03955 does, in one file.

    g(s, a) = c(l, A) A(s, a) grad log pi(a|s),   (s, a) ~ d_mu(s) mu(a|s),   l = log pi(a|s) - log mu(a|s)
    MSE at N samples = |E g - target|^2 + tr Cov(g) / N

    python gipo_bias_variance.py
    -> tables, plots and numbers in results/bias_variance/, in about 15 seconds on one CPU core
    python gipo_bias_variance.py --protocol authors     # the paper's own cases, for several batch sizes

A tabular softmax policy pi on a small MDP is updated with samples of an older policy mu. All expectations are finite sums
over 3 x 4 state-action pairs, so bias and variance of every trust weight are exact; only M2PO, whose mask depends on the whole
batch, and the tail of the mean need sampling. What differs from PPO is c alone: PPO's is rho or 0, GIPO's omega * rho.
1. Staleness is a path of policies: mu runs back along pi's own training, or away from pi in random directions.
2. Two targets: the gradient at the data's states, E_{d_mu, pi}[A grad log pi], for which c = rho (no clip) is unbiased, and
   the policy gradient of pi, E_{d_pi, pi}[A grad log pi], for which no weight on actions is, since d_mu is not d_pi.
3. Reported: squared bias against variance, MSE at N, effective sample size, utilisation, and the best sigma, by staleness.
4. The bound omega * rho <= exp(sigma^2 / 2) and the Hoeffding tail that follows from it, against what is observed.

Docs: docs/gipo_bias_variance.md.  Method: https://arxiv.org/abs/2603.03955
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "matplotlib==3.11.2",
# ]
# ///

import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

NUM_STATES, NUM_ACTIONS = 3, 4  # the fourth cell is the goal, where the episode ends
SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # shown
FINE_SIGMAS = tuple(float(f"{sigma:.4g}") for sigma in np.geomspace(0.01, 100.0, 161))  # searched for the best one
RIVALS = ("ppo", "sapo", "noclip", "truncated-1", "vespo")
MAX_LOG_COEF = 20.0


@dataclass
class Args:
    protocol: Literal["ours", "authors"] = "ours"
    """ours: paths of policies, the whole gradient; authors: the cases of the GIPO authors' script, one parameter"""
    out_dir: str = "results/bias_variance"
    """folder of the tables, plots and numbers"""
    seed: int = 1
    """seed of the random behaviour policies and of the sampled quantities"""
    gamma: float = 0.9
    """discount factor of the GridWorld (0 to 0.99)"""
    slip: float = 0.1
    """probability that a random action replaces the chosen one (0 to 1)"""
    training_steps: int = 60
    """exact policy-gradient steps of the path; the current policy pi is its last point"""
    learning_rate: float = 2.0
    """step size of the path"""
    advantage_noise: float = 0.0
    """the advantage is A + noise or A - noise with equal probability: an imperfect critic, still a finite sum (0 to 1)"""
    stale_advantages: bool = False
    """weights multiply A of the behaviour policy, as stored at collection, instead of A of the current one"""
    batch_sizes: tuple[int, ...] = (16, 64, 512)
    """N of the mean squared error"""
    clip_coef: float = 0.2
    """epsilon of PPO"""
    samples: int = 30_000
    """batches for what needs sampling: M2PO and the tails"""


# -------------------- Environment --------------------
def grid_world(slip: float) -> tuple[np.ndarray, np.ndarray]:
    """-> transition probabilities (S, A, S + 1), the last column the goal, and expected rewards (S, A).

    Cells 0 1 / 2 goal; actions up, down, left, right; walls keep the agent where it is. Reward 1 for reaching the goal, -0.1
    per step, and another -0.2 for entering cell 1, so that the two ways to the goal differ.
    """
    moves = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    probabilities, rewards = np.zeros((NUM_STATES, NUM_ACTIONS, NUM_STATES + 1)), np.full((NUM_STATES, NUM_ACTIONS), -0.1)
    for state in range(NUM_STATES):
        row, column = divmod(state, 2)
        for action in range(NUM_ACTIONS):
            for actual, (down, right) in enumerate(moves):
                chance = (1 - slip) * (actual == action) + slip / NUM_ACTIONS
                next_state = 2 * min(max(row + down, 0), 1) + min(max(column + right, 0), 1)
                probabilities[state, action, next_state] += chance
                rewards[state, action] += chance * (1.0 * (next_state == 3) - 0.2 * (next_state == 1 and state != 1))
    return probabilities, rewards


def softmax(logits: np.ndarray) -> np.ndarray:
    """Policy pi(a|s), (S, A), of logits (S, A)."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def advantages(policy: np.ndarray, world, gamma: float) -> np.ndarray:
    """Exact A(s, a) = Q - V of a policy, (S, A), from the linear Bellman equations."""
    probabilities, rewards = world
    inner = probabilities[..., :NUM_STATES]  # the goal has value 0
    values = np.linalg.solve(np.eye(NUM_STATES) - gamma * np.einsum("sa,sat->st", policy, inner), (policy * rewards).sum(-1))
    return rewards + gamma * inner @ values - values[:, None]


def occupancy(policy: np.ndarray, world, gamma: float) -> np.ndarray:
    """Discounted state distribution d(s) of a policy, (S,), normalised over the three cells; episodes start in cell 0."""
    inner = np.einsum("sa,sat->st", policy, world[0][..., :NUM_STATES])
    visits = np.linalg.solve(np.eye(NUM_STATES) - gamma * inner.T, np.eye(NUM_STATES)[0])
    return visits / visits.sum()


def scores(policy: np.ndarray) -> np.ndarray:
    """grad log pi(a|s) with respect to the logits, (S, A, S * A)."""
    gradients = np.zeros((NUM_STATES, NUM_ACTIONS, NUM_STATES, NUM_ACTIONS))
    for state in range(NUM_STATES):
        gradients[state, :, state] = np.eye(NUM_ACTIONS) - policy[state]
    return gradients.reshape(NUM_STATES, NUM_ACTIONS, -1)


def training_path(world, args: Args) -> list[np.ndarray]:
    """Logits along exact policy-gradient ascent from the uniform policy, training_steps + 1 of them."""
    logits = [np.zeros((NUM_STATES, NUM_ACTIONS))]
    for _ in range(args.training_steps):
        policy = softmax(logits[-1])
        weights = occupancy(policy, world, args.gamma)[:, None] * policy * advantages(policy, world, args.gamma)
        logits.append(logits[-1] + args.learning_rate * np.einsum("sa,sak->k", weights, scores(policy)).reshape(policy.shape))
    return logits


# -------------------- Trust weights --------------------
def gipo_weight(logratio, advantage, sigma_pos, sigma_neg, kernel="gaussian"):
    """Trust weight omega in (0, 1] (eq. 5 of the sister paper AcceRL, arXiv 2603.18464); sigma_pos applies where A > 0."""
    x = logratio / np.where(advantage > 0, sigma_pos, sigma_neg)
    return {"gaussian": np.exp(-0.5 * x**2), "laplacian": np.exp(-np.abs(x)), "cauchy": 1.0 / (1.0 + x**2)}[kernel]


def coefficient(method: str, logratio, advantage, args: Args, proximal=None):
    """c of `c * A * grad log pi` for one sample; 1 on-policy for every method. Sources beside each.

    `proximal` is log(pi_prox / mu) for decoupled PPO. Names with a number: gipo-SIGMA, laplacian-SIGMA, cauchy-SIGMA,
    outward-SIGMA (omega = 1 where the policy moved against the advantage, this project's ablation), truncated-CAP,
    sapo-TAU_NEG.
    """
    ratio = np.exp(np.minimum(logratio, MAX_LOG_COEF))
    name, _, number = method.partition("-")
    if name in ("gipo", "laplacian", "cauchy"):
        kernel = "gaussian" if name == "gipo" else name
        return gipo_weight(logratio, advantage, float(number), float(number), kernel) * ratio
    if name == "outward":
        weight = gipo_weight(logratio, advantage, float(number), float(number))
        return np.where(logratio * advantage > 0, weight, 1.0) * ratio
    if name == "noclip":
        return ratio
    if name == "ppo":  # arXiv 1707.06347
        inside = np.where(advantage > 0, ratio <= 1 + args.clip_coef, ratio >= 1 - args.clip_coef)
        return ratio * inside
    if name == "sapo":  # arXiv 2511.20347, temperatures 1 and 1.05
        tau = np.where(advantage > 0, 1.0, float(number or 1.05))
        gate = 1.0 / (1.0 + np.exp(-np.clip(tau * (ratio - 1.0), -700, 700)))
        return 4.0 * gate * (1.0 - gate) * ratio
    if name == "truncated":  # arXiv 1802.01561; also CISPO's gradient (arXiv 2506.13585), which has no lower cap either
        return np.minimum(ratio, float(number))
    if name == "vespo":  # arXiv 2602.10693 applied to single actions: W^k exp(lambda (1 - W)), (k, lambda) = (2, 3) or (3, 2)
        k, rate = np.where(advantage >= 0, 2.0, 3.0), np.where(advantage >= 0, 3.0, 2.0)
        return np.exp(np.maximum(k * logratio + rate * (1.0 - ratio), -700))
    if name == "decoupled":  # arXiv 2110.00641: PPO's clip around pi_prox, weight pi_prox / mu; above 5 dropped, as in AReaL
        inner = np.exp(np.minimum(logratio - proximal, MAX_LOG_COEF))
        inside = np.where(advantage > 0, inner <= 1 + args.clip_coef, inner >= 1 - args.clip_coef)
        return np.exp(np.minimum(proximal, MAX_LOG_COEF)) * (proximal <= math.log(5.0)) * inner * inside
    raise ValueError(f"unknown method {method}")


def m2po_kept(counts: np.ndarray, logratio: np.ndarray, advantage: np.ndarray, rng, threshold: float = 0.04) -> np.ndarray:
    """M2PO (algorithm 1 of arXiv 2510.01161): how many samples of each kind its mask keeps, (batches, M), like `counts`.

    Of the samples that PPO could clip (l A > 0) it drops the one with the largest l^2 until the mean of l^2 over those left is
    at most the threshold, the paper's 0.04. Samples of equal l^2 are dropped in random order.
    """
    kept, could_clip = counts.copy(), logratio * advantage > 0
    number, total = np.zeros(len(counts)), np.zeros(len(counts))  # of the samples with a smaller l^2, and their sum of l^2
    for square in np.unique(logratio[could_clip] ** 2):
        tied = np.flatnonzero(could_clip & (logratio**2 == square))
        group = counts[:, tied].sum(1)
        if square > threshold:  # k more samples keep the mean at (total + k l^2) / (number + k)
            room = np.floor((threshold * number - total) / (square - threshold) + 1e-9)
            room = np.clip(room, 0, group).astype(counts.dtype)
            for i, kind in enumerate(tied[:-1]):
                kept[:, kind] = rng.hypergeometric(counts[:, kind], counts[:, tied[i + 1 :]].sum(1), room)
                room = room - kept[:, kind]
            kept[:, tied[-1]] = room
        number, total = number + group, total + square * group
    return kept


def method_names() -> list[str]:
    """All methods with an exact mean and covariance."""
    names = ["noclip", "ppo", "sapo", "truncated-1", "truncated-2", "vespo", "decoupled"]
    return names + [f"{kernel}-{sigma:g}" for kernel in ("gipo", "laplacian", "cauchy", "outward") for sigma in SIGMAS]


# -------------------- Exact moments --------------------
def moments(probabilities: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (K,) and covariance (K, K) of a finite distribution: probabilities (M,), values (M, K)."""
    mean = probabilities @ samples
    centred = samples - mean
    return mean, (centred * probabilities[:, None]).T @ centred


@dataclass
class Problem:
    """One pair of policies and everything about it that is exact; arrays over M = S * A * 2 signs of the advantage noise."""

    probabilities: np.ndarray  # (M,) of a sample
    logratio: np.ndarray  # (M,)
    proximal: np.ndarray  # (M,) log pi_prox / mu
    advantage: np.ndarray  # (M,) what the estimator sees
    score: np.ndarray  # (M, K)
    target_at_data: np.ndarray  # (K,) E_{d_mu, pi}[A grad log pi]
    target_policy_gradient: np.ndarray  # (K,) E_{d_pi, pi}[A grad log pi]
    kl: float  # E_{d_mu} KL(mu || pi), nats


def make_problem(current: np.ndarray, behaviour: np.ndarray, proximal: np.ndarray, world, args: Args) -> Problem:
    """The estimation problem of logits `current` on data of logits `behaviour`."""
    pi, mu, prox = softmax(current), softmax(behaviour), softmax(proximal)
    states, exact = occupancy(mu, world, args.gamma), advantages(pi, world, args.gamma)
    seen = advantages(mu, world, args.gamma) if args.stale_advantages else exact
    logratio, gradient = np.log(pi) - np.log(mu), scores(pi)
    weights = (states[:, None] * mu).ravel()

    def target(distribution):
        return np.einsum("s,sa,sa,sak->k", distribution, pi, exact, gradient)

    return Problem(
        probabilities=np.tile(weights / 2, 2),
        logratio=np.tile(logratio.ravel(), 2),
        proximal=np.tile((np.log(prox) - np.log(mu)).ravel(), 2),
        advantage=np.concatenate([seen.ravel() + args.advantage_noise, seen.ravel() - args.advantage_noise]),
        score=np.tile(gradient.reshape(NUM_STATES * NUM_ACTIONS, -1), (2, 1)),
        target_at_data=target(states),
        target_policy_gradient=target(occupancy(pi, world, args.gamma)),
        kl=float(-(weights * logratio.ravel()).sum()),
    )


def evaluate(problem: Problem, method: str, args: Args) -> dict:
    """Exact squared bias (both targets), variance of one sample, effective sample size, utilisation, largest coefficient."""
    coef = coefficient(method, problem.logratio, problem.advantage, args, problem.proximal)
    mean, covariance = moments(problem.probabilities, (coef * problem.advantage)[:, None] * problem.score)
    first, second = problem.probabilities @ coef, problem.probabilities @ coef**2
    return {
        "bias2_at_data": float(((mean - problem.target_at_data) ** 2).sum()),
        "bias2_policy_gradient": float(((mean - problem.target_policy_gradient) ** 2).sum()),
        "variance": float(np.trace(covariance)),
        "effective_sample_size": float(first**2 / max(second, 1e-300)),
        "utilization": float(problem.probabilities @ (coef > 1e-3).astype(float)),
        "largest_coefficient": float(coef.max()),
    }


def mean_squared_error(row: dict, batch_size: int, target: str = "at_data") -> float:
    """Squared bias + variance / N."""
    return row[f"bias2_{target}"] + row["variance"] / batch_size


def sample_batches(problem: Problem, batches: int, batch_size: int, rng) -> np.ndarray:
    """How often each of the M kinds of sample occurs in each batch of N, (batches, M)."""
    return rng.multinomial(batch_size, problem.probabilities / problem.probabilities.sum(), size=batches)


def evaluate_m2po(problem: Problem, batch_size: int, args: Args, rng) -> dict:
    """M2PO's squared bias and N times the variance of its batch mean, by Monte Carlo; the noise of the bias is subtracted."""
    counts = sample_batches(problem, args.samples, batch_size, rng)
    kept = m2po_kept(counts, problem.logratio, problem.advantage, rng)
    terms = (np.exp(np.minimum(problem.logratio, MAX_LOG_COEF)) * problem.advantage)[:, None] * problem.score
    gradients = kept @ terms / batch_size
    mean, variance = gradients.mean(0), float(np.trace(np.cov(gradients.T)))
    noise = variance / args.samples  # E|mean - E mean|^2
    return {
        "bias2_at_data": float(max(((mean - problem.target_at_data) ** 2).sum() - noise, 0.0)),
        "bias2_policy_gradient": float(max(((mean - problem.target_policy_gradient) ** 2).sum() - noise, 0.0)),
        "variance": variance * batch_size,
        "utilization": float(kept.sum() / (args.samples * batch_size)),
    }


def hoeffding(sigma: float, largest_advantage: float, batch_size: int, error: float) -> float:
    """P(|mean of omega rho A - its expectation| >= error) is at most this: terms lie within +- exp(sigma^2 / 2) A_max."""
    bound = math.exp(sigma**2 / 2) * largest_advantage
    return min(1.0, 2.0 * math.exp(-batch_size * error**2 / (2.0 * bound**2)))


# -------------------- Main --------------------
def staleness_paths(world, args: Args) -> dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """{path: [(current, behaviour, proximal logits)]}, fresh data first.

    "training": mu is an older point of pi's own training, pi_prox the point one step before pi. "random": mu is pi plus
    noise of growing size along three random directions, pi_prox at most a noise of 0.05 away from pi along the same direction.
    """
    path, rng = training_path(world, args), np.random.default_rng(args.seed)
    current = path[-1]
    lags = np.unique(np.round(np.linspace(0, args.training_steps, 25)).astype(int))
    training = [(current, path[-1 - lag], path[-1 - min(lag, 1)]) for lag in lags]
    directions = rng.standard_normal((3, *current.shape))
    random = [
        (current, current + size * direction, current + min(size, 0.05) * direction)
        for size in np.linspace(0.0, 2.5, 11)
        for direction in directions
    ]
    return {"training": training, "random": random}


def tail(problem: Problem, sigma: float, batch_size: int, args: Args, rng) -> dict:
    """Measured P(|mean of N terms omega rho A - expectation| >= e) beside the Hoeffding bound, over a grid of e."""
    terms = coefficient(f"gipo-{sigma:g}", problem.logratio, problem.advantage, args) * problem.advantage
    means = sample_batches(problem, args.samples, batch_size, rng) @ terms / batch_size
    deviation = np.abs(means - problem.probabilities @ terms)
    largest = float(np.abs(problem.advantage).max())
    bound = math.exp(sigma**2 / 2) * largest
    errors = np.linspace(0.0, bound * math.sqrt(2.0 * math.log(2e3) / batch_size), 61)  # to where the bound is 0.001
    return {
        "sigma": sigma,
        "batch_size": batch_size,
        "errors": errors.tolist(),
        "measured": [float((deviation >= error).mean()) for error in errors],
        "hoeffding": [hoeffding(sigma, largest, batch_size, error) for error in errors],
    }


def dominated(row: dict, others: list[dict], target: str) -> bool:
    """Is one of `others` at least as good in squared bias and in variance, and better in one of them?"""
    bias = f"bias2_{target}"
    return any(
        other[bias] <= row[bias]
        and other["variance"] <= row["variance"]
        and (other[bias], other["variance"]) != (row[bias], row["variance"])
        for other in others
    )


def study(args: Args) -> dict:
    """Everything that is reported, as plain types."""
    world, rng = grid_world(args.slip), np.random.default_rng(args.seed)
    levels = {}
    for name, path in staleness_paths(world, args).items():
        levels[name] = []
        for policies in path:
            problem = make_problem(*policies, world, args)
            if not math.isfinite(problem.kl):
                raise ValueError("an action's probability reached 0 on the training path: lower --learning-rate")
            rows = {method: evaluate(problem, method, args) for method in method_names()}
            level = {"kl": problem.kl, "logratio_std": logratio_std(problem), "methods": rows}
            fine = {sigma: evaluate(problem, f"gipo-{sigma:g}", args) for sigma in FINE_SIGMAS}
            level["best"] = {f"{t} {n}": least_error(fine, n, t) for t in TARGETS for n in args.batch_sizes}
            level["dominated"] = {t: {m: dominated(rows[m], [*fine.values()], t) for m in RIVALS} for t in TARGETS}
            if name == "training":
                level["m2po"] = {str(n): evaluate_m2po(problem, n, args, rng) for n in args.batch_sizes}
            levels[name].append(level)
    if max(level["kl"] for level in levels["training"]) < 1e-6:
        raise ValueError("the policy does not move on the training path: raise --learning-rate or lower --slip")
    middle = staleness_paths(world, args)["training"][len(levels["training"]) // 2]
    problem = make_problem(*middle, world, args)
    tails = [tail(problem, sigma, 64, args, rng) for sigma in (0.2, 0.5, 1.0)]
    return {
        "args": asdict(args),
        "versions": {"numpy": np.__version__},
        "levels": levels,
        "tail_kl": problem.kl,
        "tails": tails,
    }


def logratio_std(problem: Problem) -> float:
    """Standard deviation of l over the samples, what the other scripts log as gipo/logratio_std."""
    mean = problem.probabilities @ problem.logratio
    return float(math.sqrt(max(problem.probabilities @ (problem.logratio - mean) ** 2, 0.0)))


def least_error(rows: dict[float, dict], batch_size: int, target: str) -> dict:
    """The sigma with the least mean squared error among `rows` (sigma -> what `evaluate` gives), and that error."""
    sigma = min(rows, key=lambda s: mean_squared_error(rows[s], batch_size, target))
    return {"sigma": sigma, "mse": mean_squared_error(rows[sigma], batch_size, target)}


def best_sigma(level: dict, batch_size: int, target: str = "at_data") -> float:
    """The sigma with the least mean squared error; at the ends of the search 0 (best not to update) or inf (not to clip)."""
    sigma = level["best"][f"{target} {batch_size}"]["sigma"]
    return {FINE_SIGMAS[0]: 0.0, FINE_SIGMAS[-1]: math.inf}.get(sigma, sigma)


# -------------------- The authors' cases --------------------
# From the public history of AcceRL (rl/plot/bias_variance_analysis_bold.py): reward -1 per step, no slip, gamma 0.9.
# Probabilities of up, down, left, right; of the target policies in the three cells, of the behaviour policies in the first.
TARGET_POLICIES = {
    "mild": [[0.20, 0.30, 0.20, 0.30], [0.15, 0.45, 0.25, 0.15], [0.15, 0.15, 0.25, 0.45]],
    "better": [[0.10, 0.40, 0.10, 0.40], [0.10, 0.60, 0.20, 0.10], [0.10, 0.10, 0.20, 0.60]],
    "near-optimal": [[0.05, 0.45, 0.05, 0.45], [0.05, 0.75, 0.10, 0.10], [0.05, 0.10, 0.10, 0.75]],
}
PARTS = {
    "random": [0.25, 0.25, 0.25, 0.25],
    "right": softmax(np.array([0.0, 0.0, 0.0, 1.0])),
    "down": softmax(np.array([0.0, 1.0, 0.0, 0.0])),
    "normal 1": [0.30, 0.20, 0.30, 0.20],
    "normal 2": [0.25, 0.30, 0.20, 0.25],
    "normal 3": [0.20, 0.35, 0.20, 0.25],
    "normal 4": [0.32, 0.18, 0.28, 0.22],
    "normal 5": [0.12, 0.38, 0.12, 0.38],
}
BEHAVIOUR_POLICIES = {  # mixtures; the seventh case, mu = pi, is not stale
    "A": {"random": 1.0},
    "B": {"random": 0.4, "right": 0.3, "down": 0.3},
    "C": {"random": 0.2, "right": 0.4, "down": 0.4},
    "E": {"normal 1": 0.45, "normal 4": 0.35, "random": 0.2},
    "F": {"normal 2": 0.45, "normal 5": 0.35, "random": 0.2},
    "G": {"normal 3": 0.4, "normal 4": 0.3, "normal 5": 0.3},
}
AUTHORS_METHODS = ("gipo-0.1", "gipo-0.3", "gipo-0.5", "gipo-1", "gipo-2", "ppo", "sapo-2", "noclip")


def authors_errors(target: list, behaviour: dict, args: Args, count_all: bool = False) -> dict[str, tuple[float, float]]:
    """{method: (squared bias, variance of one sample)} of the gradient of the start cell's parameter `right`.

    As in the authors' script, bias is against the importance sampling estimate, and a method whose gradient is zero for
    every action is left out; `count_all` keeps it.
    """
    world = grid_world(slip=0.0)[0], np.full((NUM_STATES, NUM_ACTIONS), -1.0)
    pi = np.array(target)
    mu = sum(weight * np.array(PARTS[name]) for name, weight in behaviour.items())
    advantage, logratio = advantages(pi, world, args.gamma)[0], np.log(pi[0] / mu)
    gradient = np.eye(NUM_ACTIONS)[3] - pi[0, 3]
    found = {}
    for method in (*AUTHORS_METHODS, "truncated-1"):
        values = coefficient(method, logratio, advantage, args) * advantage * gradient
        if count_all or np.abs(values).max() > 1e-12:
            mean = mu @ values
            bias = mean - mu @ (np.exp(logratio) * advantage * gradient)
            found[method] = bias**2, mu @ (values - mean) ** 2
    return found


def authors_wins(args: Args) -> dict[str, dict[int, dict[str, int]]]:
    """{title: {N: {method: in how many of the 18 stale cases it has the least squared bias + variance / N}}}."""
    wins, policies = {}, [*itertools.product(TARGET_POLICIES.values(), BEHAVIOUR_POLICIES.values())]
    for title, methods, count_all in (
        ("The authors' methods", AUTHORS_METHODS, False),
        ("Without noclip", AUTHORS_METHODS[:-1], False),
        ("With min(rho, 1)", (*AUTHORS_METHODS, "truncated-1"), False),
        ("The authors' methods, those counted that make no update", AUTHORS_METHODS, True),
    ):
        cases = [authors_errors(pi, mu, args, count_all) for pi, mu in policies]
        wins[title] = {size: dict.fromkeys(methods, 0) for size in (1, *args.batch_sizes)}
        for size, case in itertools.product(wins[title], cases):
            errors = {method: case[method][0] + case[method][1] / size for method in methods if method in case}
            wins[title][size][min(errors, key=errors.get)] += 1
    return wins


def authors_table(wins: dict, args: Args) -> str:
    """Markdown of authors_wins."""
    flags = flags_of(asdict(args) | {"out_dir": Args.out_dir})  # the numbers do not depend on the folder
    lines = ["# The GIPO authors' cases", "", f"Written by `python gipo_bias_variance.py{flags}`."]
    lines += [
        "In how many of the 18 stale cases does a method have the least mean squared error, squared bias + variance / N?"
    ]
    lines += ["N = 1 is the authors' choice. As in their script, a method that makes no update in a case is left out of it,"]
    lines += ["but in the last table."]
    lines += [""]
    for title, by_size in wins.items():
        methods = list(next(iter(by_size.values())))
        lines += [f"## {title}", "", "| N | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
        lines += [f"| {size} | " + " | ".join(map(str, counts.values())) + " |" for size, counts in by_size.items()] + [""]
    return "\n".join(lines)


# -------------------- Report --------------------
MARKERS = {  # of the plot: rival -> marker and name
    "ppo": ("s", "PPO, clip {clip_coef:g}"),
    "sapo": ("^", "SAPO"),
    "truncated-1": ("v", "min(rho, 1)"),
    "m2po": ("*", "M2PO"),
    "noclip": ("o", "no clip"),
}
TARGETS = {"at_data": "gradient at the data's states", "policy_gradient": "policy gradient of pi"}


def three_levels(levels: list[dict]) -> list[dict]:
    """A little, some and much staleness: the levels nearest to a KL divergence of 0.02, 0.2 and 1 nat."""
    return [min(levels, key=lambda level: abs(math.log(max(level["kl"], 1e-9) / kl))) for kl in (0.02, 0.2, 1.0)]


def shown_size(args: dict) -> int:
    """N of the tables and plots that show one: 64, or the first of --batch-sizes."""
    return 64 if 64 in args["batch_sizes"] else args["batch_sizes"][0]


def flags_of(args: dict) -> str:
    """The flags of a command line with these arguments, defaults left out."""
    flags = ""
    for name, value in asdict(Args()).items():
        words = [*args[name]] if isinstance(value, tuple) else [args[name]]
        if words != ([*value] if isinstance(value, tuple) else [value]):
            flags += " ".join(["", f"--{name.replace('_', '-')}", *(str(word) for word in words if word is not True)])
    return flags


def tables(result: dict) -> str:
    """Markdown: methods at three staleness levels, best sigma against staleness, dominance."""
    args, training, flags = result["args"], result["levels"]["training"], flags_of(result["args"])
    lines = [
        "# Bias and variance on the 2x2 GridWorld",
        "",
        f"Written by `python gipo_bias_variance.py{flags}`. Staleness: the path of pi's own training unless said.",
        "",
    ]
    for level in three_levels(training):
        size = shown_size(args)
        lines += [f"## KL(mu || pi) = {level['kl']:.3f}, std of l = {level['logratio_std']:.2f}", ""]
        lines += [f"| method | bias^2, data | bias^2, pg | variance | MSE, data, N = {size} | ESS | utilisation | max c |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        shown = [
            m for m in method_names() if not m.startswith(("laplacian", "cauchy", "outward")) or m.endswith(("-0.5", "-1"))
        ]
        rows = {**{m: level["methods"][m] for m in shown}, "m2po": level["m2po"][str(size)]}
        for method, row in sorted(rows.items(), key=lambda item: mean_squared_error(item[1], size)):
            numbers = [row["bias2_at_data"], row["bias2_policy_gradient"], row["variance"], mean_squared_error(row, size)]
            rest = [
                f"{row[key]:.2f}" if key in row else "-"
                for key in ("effective_sample_size", "utilization", "largest_coefficient")
            ]
            lines.append(f"| {method} | " + " | ".join([f"{number:.2e}" for number in numbers] + rest) + " |")
        lines.append("")
    lines += ["## The sigma with the least MSE (0: no update is best; inf: no clip is)", ""]
    lines += [
        "| KL(mu, pi) | std of l | " + " | ".join(f"N = {n}, {t}" for n in args["batch_sizes"] for t in ("data", "pg")) + " |"
    ]
    lines += ["|---" * (2 + 2 * len(args["batch_sizes"])) + "|"]
    for level in training[1:]:
        best = [f"{best_sigma(level, n, t):.2g}" for n in args["batch_sizes"] for t in TARGETS]
        lines.append(f"| {level['kl']:.4f} | {level['logratio_std']:.3f} | " + " | ".join(best) + " |")
    lines += [
        "",
        "## Dominance: share of the stale levels at which GIPO has no more bias and no more variance than a method",
        "",
    ]
    lines += [
        "| path | target | method | some sigma | sigma 0.2 | sigma 0.5 | sigma 1 | sigma 2 |",
        "|---" * 8 + "|",
    ]
    for path, levels in result["levels"].items():
        stale = [level for level in levels if level["kl"] > 1e-9]
        for target in TARGETS:
            for method in RIVALS:
                wins = [[level["dominated"][target][method] for level in stale]]
                for sigma in (0.2, 0.5, 1, 2):
                    rows = [level["methods"] for level in stale]
                    wins.append([dominated(row[method], [row[f"gipo-{sigma:g}"]], target) for row in rows])
                lines.append(f"| {path} | {target} | {method} | " + " | ".join(f"{np.mean(win):.0%}" for win in wins) + " |")
    lines += [
        "",
        "## MSE relative to GIPO at the best sigma of each level, geometric mean over the stale levels",
        "",
    ]
    methods = ["ppo", "sapo", "noclip", "truncated-1", "truncated-2", "vespo", "decoupled"]
    methods += ["gipo-0.2", "gipo-0.5", "gipo-1", "gipo-2"]
    lines += ["| path | target | N | " + " | ".join(methods) + " |", "|---" * (3 + len(methods)) + "|"]
    for path, levels in result["levels"].items():
        stale = [level for level in levels if level["kl"] > 1e-9]
        for target in TARGETS:
            for size in args["batch_sizes"]:
                best = [level["best"][f"{target} {size}"]["mse"] for level in stale]
                ratios = [[mean_squared_error(v["methods"][m], size, target) for v in stale] / np.array(best) for m in methods]
                means = [f"{np.exp(np.log(ratio).mean()):.2f}" for ratio in ratios]
                lines.append(f"| {path} | {TARGETS[target]} | {size} | " + " | ".join(means) + " |")
    lines += ["", "## Best sigma / std of l, over the levels with 0.001 < KL < 0.3: median (least to largest)", ""]
    lines += ["| path | N | at the data's states | policy gradient |", "|---|---|---|---|"]
    for path, levels in result["levels"].items():
        middle = [level for level in levels if 0.001 < level["kl"] < 0.3]
        for size in args["batch_sizes"] if middle else ():
            factors = [[best_sigma(level, size, t) / level["logratio_std"] for level in middle] for t in TARGETS]
            cells = [f"{np.median(f):.2g} ({min(f):.2g} to {max(f):.2g})" for f in factors]
            lines.append(f"| {path} | {size} | {cells[0]} | {cells[1]} |")
    lines += ["", "## The bound exp(sigma^2 / 2) on omega rho, and the largest value among the samples of all levels", ""]
    lines += ["| sigma | bound | training path | random path |", "|---|---|---|---|"]
    for sigma in SIGMAS:
        largest = [
            max(level["methods"][f"gipo-{sigma:g}"]["largest_coefficient"] for level in result["levels"][path])
            for path in ("training", "random")
        ]
        lines.append(f"| {sigma:g} | {math.exp(sigma**2 / 2):.4g} | {largest[0]:.4g} | {largest[1]:.4g} |")
    return "\n".join(lines) + "\n"


def plot_pareto(result: dict, path: Path) -> None:
    """Squared bias against variance at a KL divergence near 0.2: GIPO's curve over sigma, points for its rivals."""
    import matplotlib.pyplot as plt

    panels = [("training", "at_data"), ("random", "at_data"), ("training", "policy_gradient")]
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for axis, (name, target) in zip(axes, panels, strict=True):
        level = three_levels(result["levels"][name])[1]
        rows = {sigma: level["methods"][f"gipo-{sigma:g}"] for sigma in SIGMAS}
        variances, biases = ([row[key] for row in rows.values()] for key in ("variance", f"bias2_{target}"))
        axis.plot(variances, biases, ".-", color="#0072B2", lw=1.3, label="GIPO, sigma 0.05 to 5")
        for sigma in (0.2, 0.5, 1.0, 2.0):
            place = rows[sigma]["variance"], rows[sigma][f"bias2_{target}"]
            axis.annotate(f"{sigma:g}", place, (-4, -10), textcoords="offset points", fontsize=8, color="#0072B2", ha="right")
        rivals = {method: level["methods"][method] for method in MARKERS if method != "m2po"}
        rivals |= {"m2po": level["m2po"][str(shown_size(result["args"]))]} if "m2po" in level else {}
        for method, row in rivals.items():
            marker, label = MARKERS[method][0], MARKERS[method][1].format(**result["args"])
            if row[f"bias2_{target}"] < 1e-12:  # unbiased: nowhere on a logarithmic axis
                axis.axvline(row["variance"], color="black", lw=0.9, ls=":", label=f"{label} (unbiased)")
            elif row["variance"] > 1e-7:  # else it makes no update
                axis.plot(row["variance"], row[f"bias2_{target}"], marker, color="black", ms=7, mfc="none", label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(left=max(axis.get_xlim()[0], 1e-5))
        axis.set_title(f"{name} path, KL {level['kl']:.2g}:\n{TARGETS[target]}", fontsize=9)
        axis.set_xlabel("variance of one sample", fontsize=9)
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("squared bias", fontsize=9)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def plot_staleness(result: dict, path: Path) -> None:
    """MSE, best sigma, effective sample size and the two bounds against the KL divergence."""
    import matplotlib.pyplot as plt

    levels = [level for level in result["levels"]["training"] if level["kl"] > 1e-6]
    kl, size = [level["kl"] for level in levels], shown_size(result["args"])
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.2))
    lines = {"gipo-0.2": "#56B4E9", "gipo-0.5": "#0072B2", "gipo-1": "#CC79A7", "gipo-2": "#999999"}
    lines |= {"ppo": "#D55E00", "sapo": "#009E73", "noclip": "#000000", "truncated-1": "#E69F00"}
    for axis, target in zip(axes[0, :2], TARGETS, strict=True):
        for method, color in lines.items():
            errors = [mean_squared_error(level["methods"][method], size, target) for level in levels]
            axis.loglog(kl, errors, color=color, lw=1.3, ls="-" if method.startswith("gipo") else "--", label=method)
        axis.set_title(f"MSE at N = {size}: {TARGETS[target]}", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    for batch_size, color in zip(
        result["args"]["batch_sizes"], itertools.cycle(("#56B4E9", "#0072B2", "#000000")), strict=False
    ):
        axes[0, 2].loglog(
            kl, [best_sigma(level, batch_size) for level in levels], ".-", color=color, label=f"N = {batch_size}"
        )
    axes[0, 2].loglog(kl, [level["logratio_std"] for level in levels], color="#999999", ls="--", label="std of l")
    axes[0, 2].set_title("sigma with the least MSE (at the data's states)", fontsize=9)
    axes[0, 2].legend(fontsize=7)
    for axis, key, title in (
        (axes[1, 0], "effective_sample_size", "effective sample size"),
        (axes[1, 1], "utilization", "utilization"),
    ):
        for method, color in lines.items():
            style = "-" if method.startswith("gipo") else "--"
            axis.semilogx(kl, [level["methods"][method][key] for level in levels], color=color, lw=1.3, ls=style)
        axis.set_title(title, fontsize=9)
    for curve, color in zip(result["tails"], ("#56B4E9", "#0072B2", "#CC79A7"), strict=True):
        seen = [(error, share) for error, share in zip(curve["errors"], curve["measured"], strict=True) if share > 0]
        axes[1, 2].semilogy(*zip(*seen, strict=True), color=color, label=f"sigma {curve['sigma']:g}")
        axes[1, 2].semilogy(curve["errors"], curve["hoeffding"], color=color, ls="--")
    axes[1, 2].set_title(f"P(|mean - E| >= e), N = 64, KL {result['tail_kl']:.2f}; dashed: Hoeffding", fontsize=8)
    axes[1, 2].legend(fontsize=7)
    axes[1, 2].set_xlabel("e", fontsize=8)
    for axis in (*axes[0], *axes[1, :2]):
        axis.set_xlabel("KL(mu || pi), nats", fontsize=8)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(fig)


def check_args(args: Args) -> None:
    """Raise ValueError, one sentence that names the flag and the fix, for arguments that cannot work."""
    limits = {"gamma": (0, 0.999), "slip": (0, 1), "training_steps": (1, 10_000), "learning_rate": (1e-6, 100)}
    limits |= {"advantage_noise": (0, 100), "clip_coef": (1e-6, 1), "samples": (100, 10**7), "seed": (0, 2**32 - 1)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be between {low} and {high}")
    for name in "seed slip training_steps learning_rate advantage_noise stale_advantages samples".split():
        if args.protocol == "authors" and getattr(args, name) != getattr(Args, name):
            raise ValueError(f"--{name.replace('_', '-')} means nothing for --protocol authors: drop it")
    if not args.batch_sizes or min(args.batch_sizes) < 2:
        raise ValueError("--batch-sizes needs one or more sizes of at least 2")


def main(args: Args) -> dict:
    """Run the study and write numbers.json, tables.md and two plots. ValueError on bad arguments."""
    check_args(args)
    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out-dir {out_dir} cannot be made ({error.strerror}): name another folder") from error
    if args.protocol == "authors":
        result = authors_wins(args)
        (out_dir / "authors.md").write_text(authors_table(result, args))
        print(authors_table(result, args) + f"file: {out_dir / 'authors.md'}")
        return result
    result = study(args)
    text = tables(result)
    (out_dir / "numbers.json").write_text(json.dumps(rounded(result)) + "\n")
    (out_dir / "tables.md").write_text(text)
    plot_pareto(result, out_dir / "pareto.png")
    plot_staleness(result, out_dir / "staleness.png")
    print(text)
    print(f"files: {out_dir}")
    return result


def rounded(value):
    """Floats to four significant digits, so that the file is small and equal on other machines."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
