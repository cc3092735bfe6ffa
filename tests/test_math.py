"""The mathematics of both scripts against closed forms and slow reference implementations written independently here."""

import collections
import contextlib
import dataclasses
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gipo_continuous as gipo
import ppo_baseline as ppo

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
KERNELS = ["gaussian", "laplacian", "cauchy"]
ALL_KERNELS = pytest.mark.parametrize("kernel", KERNELS)
SCRIPTS = pytest.mark.parametrize("script", [gipo, ppo], ids=["gipo", "ppo"])
SIGMAS = pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 2.0])
LOGRATIOS = np.array([*np.linspace(-4.0, 4.0, 41), 0.19, -0.23, 1e-3, -1e-3])
ADVANTAGES = [2.5, 0.3, -0.3, -2.5]

METHODS = {  # name -> script and the flags that choose the surrogate
    **{f"gipo-{kernel}": (gipo, {"kernel": kernel}) for kernel in KERNELS},
    "gipo-narrow-negative": (gipo, {"sigma": 0.5, "sigma_neg_ratio": 0.5}),
    "sapo": (gipo, {"trust_weight": "sapo"}),
    "none": (gipo, {"trust_weight": "none"}),
    "ppo": (ppo, {}),
}
ALL_METHODS = pytest.mark.parametrize("method", METHODS)


def column(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def surrogate(method, logratio, advantages, **flags):
    """policy_objective of a method, and the gradient of its sum with respect to the log ratio."""
    script, own_flags = METHODS[method]
    leaf = logratio.clone().requires_grad_()
    objective, trust = script.policy_objective(leaf, advantages, script.Args(**own_flags | flags))
    return objective.detach(), trust, torch.autograd.grad(objective.sum(), leaf)[0]


def weight(*args):
    """omega, as gipo_log_weight has it."""
    return gipo.gipo_log_weight(*args).exp()


def omega_closed_form(kernel, logratio, sigma):
    if kernel == "gaussian":
        return math.exp(-(logratio**2) / (2 * sigma**2))
    if kernel == "laplacian":
        return math.exp(-abs(logratio) / sigma)
    return sigma**2 / (sigma**2 + logratio**2)


def expected(method, logratio, advantage):
    """Surrogate and trust of one sample, in plain floats from the published formulas."""
    ratio, args = math.exp(logratio), METHODS[method][0].Args(**METHODS[method][1])
    if method == "ppo":
        muted = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        return min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage), 0.0 if muted else 1.0
    if method == "sapo":
        tau = args.sapo_tau_pos if advantage > 0 else args.sapo_tau_neg
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return 4 / tau * gate * advantage, 4 * gate * (1 - gate)
    omega = 1.0
    if method != "none":
        sigma = args.sigma * (1.0 if advantage > 0 else args.sigma_neg_ratio)
        omega = omega_closed_form(args.kernel, logratio, sigma)
    return omega * ratio * advantage, omega


# -------------------- The trust weight --------------------
@ALL_KERNELS
@SIGMAS
def test_kernel_closed_form(kernel, sigma):
    weights = weight(column(LOGRATIOS), torch.ones(len(LOGRATIOS)), sigma, sigma, kernel)
    np.testing.assert_allclose(weights, [omega_closed_form(kernel, x, sigma) for x in LOGRATIOS], rtol=1e-5)


@ALL_KERNELS
@PROPERTY
@given(logratio=st.floats(-20, 20), sigma=st.sampled_from([0.25, 0.5, 1.0, 2.0]), advantage=st.floats(-5, 5))
def test_trust_weight_is_symmetric_and_in_unit_interval(kernel, logratio, sigma, advantage):
    pair = weight(column([logratio, -logratio]), column([advantage, advantage]), sigma, sigma / 2, kernel)
    assert pair[0] == pair[1]
    assert 0.0 <= pair[0] <= 1.0
    assert pair[0] < 1.0 or abs(logratio) < 1e-6


@SIGMAS
def test_gaussian_weight_at_sigma(sigma):
    weights = weight(column([sigma, -sigma, 0.0]), torch.ones(3), sigma, sigma, "gaussian")
    np.testing.assert_allclose(weights, [math.exp(-0.5), math.exp(-0.5), 1.0], rtol=1e-6)


@ALL_KERNELS
def test_limits_of_sigma(kernel):
    """A huge sigma is no clip at all, a tiny one keeps only the samples whose ratio is exactly 1."""
    logratio, ones = column([-3.0, -1e-3, 0.0, 1e-3, 3.0]), torch.ones(5)
    np.testing.assert_allclose(weight(logratio, ones, 1e9, 1e9, kernel), 1.0, atol=1e-8)
    np.testing.assert_allclose(weight(logratio, ones, 1e-9, 1e-9, kernel), [0, 0, 1, 0, 0], atol=1e-5)
    advantages = column([1.0, -1.0, 2.0, -2.0, 0.5])
    wide, _, _ = surrogate(f"gipo-{kernel}", logratio, advantages, sigma=1e9)
    unclipped, _, _ = surrogate("none", logratio, advantages)
    np.testing.assert_allclose(wide, unclipped, rtol=1e-8)


@ALL_KERNELS
def test_positive_and_negative_advantages_have_their_own_width(kernel):
    weights = weight(column([0.7] * 4), column([1.0, 1e-6, 0.0, -1.0]), 2.0, 0.5, kernel)
    wide, narrow = omega_closed_form(kernel, 0.7, 2.0), omega_closed_form(kernel, 0.7, 0.5)
    np.testing.assert_allclose(weights, [wide, wide, narrow, narrow], rtol=1e-6)


@ALL_KERNELS
@pytest.mark.parametrize("shapes", [((7,), (7,)), ((7, 3), (7, 3)), ((7, 3), (7, 1)), ((5, 7, 3), (5, 7, 1))])
def test_trust_weight_is_detached_and_keeps_the_shape(kernel, shapes):
    torch.manual_seed(0)
    logratio, advantages = torch.randn(shapes[0], requires_grad=True), torch.randn(shapes[1], requires_grad=True)
    log_weight = gipo.gipo_log_weight(logratio, advantages, 1.0, 0.5, kernel)
    assert log_weight.shape == shapes[0] and log_weight.dtype == torch.float32
    assert not log_weight.requires_grad


# -------------------- The surrogates --------------------
@ALL_METHODS
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_surrogate_trust_and_gradient_against_closed_forms(method, advantage):
    """d surrogate / d logratio = trust * ratio * A, both sides being the closed form."""
    objective, trust, gradient = surrogate(method, column(LOGRATIOS), torch.full((len(LOGRATIOS),), advantage).double())
    values, weights = np.array([expected(method, x, advantage) for x in LOGRATIOS]).T
    np.testing.assert_allclose(objective, values, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(trust, weights, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient, weights * np.exp(LOGRATIOS) * advantage, rtol=1e-4, atol=1e-6)
    assert not trust.requires_grad


@ALL_METHODS
@PROPERTY
@given(logratio=st.floats(-6, 6), advantage=st.floats(-10, 10), sigma=st.floats(0.1, 3))
def test_gradient_is_trust_times_ratio_times_advantage(method, logratio, advantage, sigma):
    """The same identity between what the code returns and what autograd says, for any width."""
    flags = {} if method == "ppo" else {"sigma": sigma}
    _, trust, gradient = surrogate(method, column([logratio]), column([advantage]), **flags)
    assert gradient.item() == pytest.approx(trust.item() * math.exp(logratio) * advantage, rel=1e-6, abs=1e-9)


@ALL_METHODS
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_method_is_the_policy_gradient_where_the_ratio_is_one(method, advantage):
    objective, trust, gradient = surrogate(method, column([0.0]), column([advantage]))
    assert trust.item() == pytest.approx(1.0)
    assert gradient.item() == pytest.approx(advantage)
    if method != "sapo":  # its surrogate has another offset
        assert objective.item() == pytest.approx(advantage)


@ALL_METHODS
def test_surrogate_of_per_dimension_ratios(method):
    """(B, d) log ratios with (B, 1) advantages: every entry is its own sample."""
    torch.manual_seed(1)
    logratio, advantages = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    both = surrogate(method, logratio, advantages)
    for single, entry in zip(both, surrogate(method, logratio.flatten(), advantages.expand(6, 3).flatten()), strict=True):
        assert single.shape == (6, 3)
        np.testing.assert_allclose(single.flatten(), entry, rtol=1e-12)


@SIGMAS
def test_coefficient_peaks_at_sigma_squared(sigma):
    """c(l) = exp(l - l^2 / (2 sigma^2)) has its maximum exp(sigma^2 / 2) at l = sigma^2."""
    logratio = torch.linspace(-6.0, 6.0, 120_001, dtype=torch.float64)
    _, _, coefficient = surrogate("gipo-gaussian", logratio, torch.ones_like(logratio), sigma=sigma)
    assert logratio[coefficient.argmax()].item() == pytest.approx(sigma**2, abs=1e-3)
    assert coefficient.max().item() == pytest.approx(math.exp(sigma**2 / 2), rel=1e-6)


@PROPERTY
@given(logratio=st.floats(-1e4, 1e4), advantage=st.floats(-100, 100), sigma=st.floats(0.05, 3), ratio=st.floats(0.3, 1))
def test_gaussian_bounds_the_gradient(logratio, advantage, sigma, ratio):
    """|omega rho A| <= exp(sigma^2 / 2) |A|, with the narrower bound of its own width for a negative advantage."""
    method, own_sigma = "gipo-gaussian", sigma * (1.0 if advantage > 0 else ratio)
    _, _, gradient = surrogate(method, column([logratio]), column([advantage]), sigma=sigma, sigma_neg_ratio=ratio)
    assert abs(gradient.item()) <= math.exp(own_sigma**2 / 2) * abs(advantage) * (1 + 1e-6)


def test_which_kernels_are_unbounded():
    """Cauchy, and Laplacian with sigma > 1, grow with the log ratio; Gaussian, and Laplacian with sigma <= 1, do not."""
    logratio = column([2.0, 4.0, 8.0, 16.0])
    largest = {}
    for kernel, sigma in (("cauchy", 0.2), ("cauchy", 1.0), ("laplacian", 2.0), ("laplacian", 1.0), ("gaussian", 2.0)):
        _, _, largest[kernel, sigma] = surrogate(f"gipo-{kernel}", logratio, torch.ones(4).double(), sigma=sigma)
    for grows in (("cauchy", 1.0), ("laplacian", 2.0)):
        assert (largest[grows].diff() > 0).all() and largest[grows][-1] > 1000
    assert largest["cauchy", 0.2][-1] > 1000
    assert largest["laplacian", 1.0].max() <= 1 + 1e-6
    assert largest["gaussian", 2.0].max() <= math.exp(2.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "muted"),
    [(1.21, 1, True), (1.19, 1, False), (0.1, 1, False), (0.79, -1, True), (0.81, -1, False), (5.0, -1, False)],
)
def test_ppo_mutes_only_what_has_moved_far_enough_with_its_advantage(ratio, advantage, muted):
    _, trust, gradient = surrogate("ppo", column([math.log(ratio)]), column([float(advantage)]))
    assert trust.item() == (0.0 if muted else 1.0)
    assert gradient.item() == pytest.approx(0.0 if muted else ratio * advantage)


@PROPERTY
@given(logratio=st.floats(-5, 5), advantage=st.floats(-10, 10), clip=st.sampled_from([0.1, 0.2, 0.3]))
def test_ppo_surrogate_is_the_textbook_minimum(logratio, advantage, clip):
    objective, _, _ = surrogate("ppo", column([logratio]), column([advantage]), clip_coef=clip)
    ratio = math.exp(logratio)
    minimum = min(ratio * advantage, float(np.clip(ratio, 1 - clip, 1 + clip)) * advantage)
    assert objective.item() == pytest.approx(minimum, rel=1e-9, abs=1e-12)


@ALL_METHODS
@pytest.mark.parametrize("sigma", [0.05, 1.0, 5.0])
def test_loss_and_gradient_are_finite_for_any_log_ratio_in_float32(method, sigma):
    magnitudes = torch.tensor([0.0, 1e-6, 0.2, 1.0, 15.0, 19.9, 20.1, 87.0, 89.0, 200.0, 1e3, 1e4])
    logratio = torch.cat([magnitudes, -magnitudes]).repeat(4)
    advantages = torch.tensor([3.0, -3.0, 0.0, 1e-8]).repeat_interleave(2 * len(magnitudes))
    flags = {} if method == "ppo" else {"sigma": sigma}
    objective, trust, gradient = surrogate(method, logratio, advantages, **flags)
    assert objective.dtype == gradient.dtype == trust.dtype == torch.float32
    for result in (objective, objective.mean(), trust, gradient):
        assert torch.isfinite(result).all()


@ALL_METHODS
def test_parameter_gradient_is_finite_for_an_extreme_policy(method):
    """The whole chain from parameters through a Gaussian log-prob, far outside of what exp() can hold."""
    script, flags = METHODS[method]
    mean = torch.tensor([0.0, 30.0, -140.0], requires_grad=True)
    logratio = -0.5 * (torch.zeros(3) - mean) ** 2 + torch.tensor([1e4, 0.0, 0.0])
    objective, _ = script.policy_objective(logratio, torch.tensor([1.0, -1.0, 1.0]), script.Args(**flags))
    (-objective.mean()).backward()
    assert torch.isfinite(mean.grad).all()


def test_mean_of_weighted_ratios_stays_below_the_hoeffding_bound():
    """P(|mean - E| >= e) <= 2 exp(-N e^2 / (2 B^2)) on i.i.d. draws with B = exp(sigma^2 / 2); plain ratios break it."""
    rng, samples, trials, bound = np.random.default_rng(0), 64, 4000, math.exp(0.5)
    worst_case = np.ones((trials, samples)), rng.choice([-1.0, 1.0], (trials, samples))  # at the peak, l = sigma^2
    wide = rng.normal(0.0, 2.0, (trials, samples)), rng.choice([1.0, -0.5], (trials, samples))
    for logratio, advantages in (worst_case, wide):
        tails = {}
        for method in ("gipo-gaussian", "none"):
            sigma = {"sigma": 1.0} if method == "gipo-gaussian" else {}
            objective, _, _ = surrogate(method, torch.tensor(logratio), torch.tensor(advantages), **sigma)
            means = objective.mean(1)
            for e in (0.5, 0.6, 0.8):
                tails[method, e] = ((means - means.mean()).abs() >= e).double().mean().item()
        for e in (0.5, 0.6, 0.8):
            limit = 2 * math.exp(-samples * e**2 / (2 * bound**2))
            assert limit < 0.5  # else the bound says nothing
            assert tails["gipo-gaussian", e] <= limit
            assert tails["gipo-gaussian", 0.5] > 0 or logratio is wide[0]  # the worst case is one
            if logratio is wide[0]:
                assert tails["none", e] > limit


CATEGORICAL_LOGITS = np.array([0.3, -0.8, 1.1, 0.0, -0.2])
CATEGORICAL_MU = np.array([0.1, 0.4, 0.1, 0.25, 0.15])
CATEGORICAL_ADVANTAGES = np.array([1.0, -2.0, 0.5, 3.0, -0.7])


def exact_gradient(method):
    """Gradient of E_mu[surrogate] with respect to the logits, summed over all five actions by autograd."""
    script, flags = METHODS[method]
    logits = torch.tensor(CATEGORICAL_LOGITS, requires_grad=True)
    logratio = torch.log_softmax(logits, 0) - torch.tensor(CATEGORICAL_MU).log()
    objective, _ = script.policy_objective(logratio, torch.tensor(CATEGORICAL_ADVANTAGES), script.Args(**flags))
    (torch.tensor(CATEGORICAL_MU) * objective).sum().backward()
    return logits.grad.numpy()


def test_plain_importance_sampling_is_unbiased():
    """E_mu[rho A grad log pi] equals the policy gradient sum_a A(a) grad pi(a), here a finite sum."""
    pi = np.exp(CATEGORICAL_LOGITS) / np.exp(CATEGORICAL_LOGITS).sum()
    policy_gradient = pi * (CATEGORICAL_ADVANTAGES - pi @ CATEGORICAL_ADVANTAGES)
    np.testing.assert_allclose(exact_gradient("none"), policy_gradient, rtol=1e-10)


@ALL_METHODS
def test_expected_gradient_and_its_bias(method):
    """E_mu[omega rho A grad log pi], whose bias is E_pi[(omega - 1) A grad log pi]."""
    pi = np.exp(CATEGORICAL_LOGITS) / np.exp(CATEGORICAL_LOGITS).sum()
    score = np.eye(5) - pi  # row a: grad log pi(a)
    logratio = np.log(pi / CATEGORICAL_MU)
    omega = [expected(method, x, a)[1] for x, a in zip(logratio, CATEGORICAL_ADVANTAGES, strict=True)]
    bias = ((pi * (np.array(omega) - 1) * CATEGORICAL_ADVANTAGES)[:, None] * score).sum(0)
    unbiased = pi * (CATEGORICAL_ADVANTAGES - pi @ CATEGORICAL_ADVANTAGES)
    np.testing.assert_allclose(exact_gradient(method), unbiased + bias, rtol=1e-5, atol=1e-7)


# -------------------- Advantages --------------------
@st.composite
def segments(draw):
    """Random segments (T, S) with terminations and truncations anywhere, and a critic that is consistent with itself."""
    steps, number = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = rng.choice(3, p=[0.7, 0.15, 0.15], size=(steps, number))  # goes on, terminated, truncated
    dones, terminations = (kind > 0) * 1.0, (kind == 1) * 1.0
    values, last_values = rng.normal(0, 3, (steps, number)), rng.normal(0, 3, (steps, number))
    next_values = np.where(dones > 0, last_values, np.concatenate([values[1:], last_values[-1:]]))
    rewards, logratio = rng.normal(0, 1, (steps, number)), rng.normal(0, 1, (steps, number))
    return SimpleNamespace(
        rewards=rewards, values=values, next_values=next_values, terminations=terminations, dones=dones, logratio=logratio
    )


DISCOUNTS = {"gamma": st.sampled_from([0.0, 0.9, 0.99, 1.0]), "lam": st.sampled_from([0.0, 0.5, 0.95, 1.0])}


def tensors(data, *names):
    return [torch.tensor(getattr(data, name)) for name in names]


def gae_of(data, gamma, lam, **changed):
    data = SimpleNamespace(**vars(data) | changed)
    return gipo.compute_gae(*tensors(data, "rewards", "values", "next_values", "terminations", "dones"), gamma, lam).numpy()


def vtrace_of(data, gamma, lam, **changed):
    data = SimpleNamespace(**vars(data) | changed)
    names = ("rewards", "values", "next_values", "terminations", "dones", "logratio")
    advantages, targets = gipo.compute_vtrace(*tensors(data, *names), gamma, lam)
    return np.stack([advantages.numpy(), targets.numpy()])


def rows_until_the_trace_ends(data, t, s):
    """The rows t, t + 1, ... of the same episode inside the segment."""
    end = t
    while end < len(data.dones) - 1 and not data.dones[end, s]:
        end += 1
    return range(t, end + 1)


def slow_gae(data, gamma, lam):
    """GAE by its definition: the lambda-weighted mean of all n-step returns, less the value."""
    advantages = np.empty_like(data.values)
    for t, s in np.ndindex(advantages.shape):
        rows, returns = rows_until_the_trace_ends(data, t, s), []
        for n in range(1, len(rows) + 1):
            last = rows[n - 1]
            paid = sum(gamma**k * data.rewards[t + k, s] for k in range(n))
            returns.append(paid + gamma**n * (0.0 if data.terminations[last, s] else data.next_values[last, s]))
        weights = [(1 - lam) * lam**k for k in range(len(rows) - 1)] + [lam ** (len(rows) - 1)]
        advantages[t, s] = sum(w * g for w, g in zip(weights, returns, strict=True)) - data.values[t, s]
    return advantages


def slow_vtrace(data, gamma, lam):
    """V-trace by equation 1 of its paper: v_s = V_s + sum_t gamma^(t-s) (c_s ... c_(t-1)) rho_t delta_t."""
    rho = np.minimum(np.exp(data.logratio), 1.0)

    def delta(t, s):
        future = 0.0 if data.terminations[t, s] else gamma * data.next_values[t, s]
        return rho[t, s] * (data.rewards[t, s] + future - data.values[t, s])

    targets = np.empty_like(data.values)
    for t, s in np.ndindex(targets.shape):
        rows = rows_until_the_trace_ends(data, t, s)
        corrections = [gamma ** (k - t) * math.prod(lam * rho[i, s] for i in range(t, k)) * delta(k, s) for k in rows]
        targets[t, s] = data.values[t, s] + sum(corrections)
    advantages = np.empty_like(data.values)
    for t, s in np.ndindex(advantages.shape):
        trace_goes_on = len(rows_until_the_trace_ends(data, t, s)) > 1
        future = targets[t + 1, s] if trace_goes_on else data.next_values[t, s]
        future = 0.0 if data.terminations[t, s] else future
        advantages[t, s] = data.rewards[t, s] + gamma * future - data.values[t, s]
    return np.stack([advantages, targets])


@PROPERTY
@given(data=segments(), **DISCOUNTS)
def test_gae_against_the_definition(data, gamma, lam):
    np.testing.assert_allclose(gae_of(data, gamma, lam), slow_gae(data, gamma, lam), rtol=1e-9, atol=1e-9)


@PROPERTY
@given(data=segments(), **DISCOUNTS)
def test_vtrace_against_the_definition(data, gamma, lam):
    np.testing.assert_allclose(vtrace_of(data, gamma, lam), slow_vtrace(data, gamma, lam), rtol=1e-9, atol=1e-9)


@PROPERTY
@given(data=segments(), **DISCOUNTS)
def test_vtrace_on_policy_is_gae(data, gamma, lam):
    """With all ratios 1 the targets are values + GAE(lambda), so with lambda = 1 the discounted return with bootstrap."""
    _, targets = vtrace_of(data, gamma, lam, logratio=np.zeros_like(data.values))
    np.testing.assert_allclose(targets, data.values + slow_gae(data, gamma, lam), rtol=1e-9, atol=1e-9)


def test_vtrace_clips_ratios_at_one_and_survives_extreme_ones():
    rows = [column([[1.0], [2.0], [3.0]]) for _ in range(3)]
    masks = [torch.zeros(3, 1).double() for _ in range(2)]
    on_policy = gipo.compute_vtrace(*rows, *masks, torch.zeros(3, 1).double(), 0.9, 0.95)
    for logratio, same in ((1e4, True), (0.5, True), (-0.5, False), (-1e4, False)):
        result = gipo.compute_vtrace(*rows, *masks, torch.full((3, 1), logratio).double(), 0.9, 0.95)
        assert all(torch.isfinite(x).all() for x in result)
        assert torch.allclose(result[1], on_policy[1]) == same
    np.testing.assert_allclose(result[1], rows[1], atol=1e-12)  # ratio 0: the targets are the values


@pytest.mark.parametrize("estimate", [gae_of, vtrace_of], ids=["gae", "vtrace"])
@PROPERTY
@given(data=segments(), row=st.integers(0, 11), kind=st.sampled_from([0.0, 1.0]))
def test_nothing_leaks_across_the_border_of_an_episode(estimate, data, row, kind):
    """Rewards, values and masks after a done have no influence on what is before it, and segments none on each other."""
    row %= len(data.dones)
    data.dones[row], data.terminations[row] = 1.0, kind
    before = estimate(data, 0.99, 0.95)
    after = slice(row + 1, None)
    for name in ("rewards", "values", "next_values", "logratio"):
        getattr(data, name)[after] += 100.0
    data.dones[after] = 1.0 - data.dones[after]
    data.terminations[after] *= data.dones[after]
    np.testing.assert_array_equal(estimate(data, 0.99, 0.95)[..., : row + 1, :], before[..., : row + 1, :])
    before = estimate(data, 0.99, 0.95)
    data.rewards[:, 0] += 5.0
    np.testing.assert_array_equal(estimate(data, 0.99, 0.95)[..., 1:], before[..., 1:])


@pytest.mark.parametrize("estimate", [gae_of, vtrace_of], ids=["gae", "vtrace"])
@PROPERTY
@given(data=segments(), row=st.integers(0, 11), **DISCOUNTS)
def test_termination_and_truncation_differ_by_the_bootstrap_alone(estimate, data, row, gamma, lam):
    """At the last step of an episode by gamma V(final observation), before it by that, discounted along the trace."""
    row %= len(data.dones)
    data.dones[row], data.logratio[:] = 1.0, 0.0
    results = []
    for terminated in (0.0, 1.0):
        data.terminations[row] = terminated
        results.append(estimate(data, gamma, lam))
    difference = results[0] - results[1]
    bootstrap = gamma * data.next_values[row]
    np.testing.assert_allclose(difference[..., row, :], np.broadcast_to(bootstrap, difference[..., row, :].shape), atol=1e-9)
    assert not difference[..., row + 1 :, :].any()
    if estimate is gae_of and row > 0:
        goes_on = 1.0 - data.dones[row - 1]
        np.testing.assert_allclose(difference[row - 1], goes_on * gamma * lam * bootstrap, atol=1e-9)


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 10), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_next_values_are_those_of_the_real_next_observation(seed, steps, share):
    """The critic is asked at done rows and after the last row only, and the answer equals asking it everywhere."""
    rng = np.random.default_rng(seed)
    obs, final_obs = torch.tensor(rng.normal(size=(steps, 4, 3))), torch.tensor(rng.normal(size=(steps, 4, 3)))
    dones = torch.tensor(rng.random((steps, 4)) < share).double()
    next_obs = torch.cat([obs[1:], final_obs[-1:]])
    next_obs = torch.where(dones.unsqueeze(-1) > 0, final_obs, next_obs)
    asked = []

    def get_value(x):
        asked.append(len(x))
        return (x * torch.tensor([1.0, -2.0, 0.5])).sum(-1)

    values, masks = get_value(obs), dones.clone()
    end_values = gipo.get_end_values(SimpleNamespace(get_value=get_value), next_obs, dones)
    zeros = torch.zeros_like(dones)  # without rewards, terminations and discount, targets of one step are the next values
    mb = {"end_values": end_values, "dones": dones, "rewards": zeros, "terminations": zeros}
    args = SimpleNamespace(vtrace=False, gamma=1.0, gae_lambda=0.0, reward_scale=1.0)
    next_values = gipo.compute_advantages(values, mb, args)[1]
    for t, j in np.ndindex(steps, 4):
        ends = t == steps - 1 or bool(dones[t, j])
        value = float(next_obs[t, j] @ torch.tensor([1.0, -2.0, 0.5]).double())
        assert next_values[t, j].item() == pytest.approx(value, rel=1e-12, abs=1e-12)
        assert end_values[t, j].item() == pytest.approx(value if ends else 0.0, rel=1e-12)
    assert torch.equal(dones, masks)
    assert asked[1:] == [int(dones[:-1].sum()) + 4]


def test_end_values_have_no_gradient():
    agent, dones = make_agent("gaussian"), torch.tensor([[0.0], [1.0], [0.0]])
    assert not gipo.get_end_values(agent, torch.randn(3, 1, OBS_DIM), dones).requires_grad


@SCRIPTS
@PROPERTY
@given(
    num_filled=st.integers(1, 40),
    num_steps=st.sampled_from([16, 64]),
    segments_per_update=st.integers(1, 9),
    updates=st.integers(1, 12),
)
def test_segments_are_drawn_once_before_any_is_repeated(script, num_filled, num_steps, segments_per_update, updates):
    args = script.Args(num_steps=num_steps, minibatch_size=num_steps * segments_per_update, updates_per_iteration=updates)
    inds = script.sample_segments(num_filled, args)
    assert inds.shape == (updates, segments_per_update)
    drawn = inds.flatten().tolist()
    for start in range(0, len(drawn), num_filled):
        once = drawn[start : start + num_filled]
        assert len(set(once)) == len(once)
        assert set(once) <= set(range(num_filled))


def test_segments_are_shuffled_by_the_generator_given():
    args = gipo.Args(num_steps=16, minibatch_size=160, updates_per_iteration=10)
    generator, again = (torch.Generator().manual_seed(4) for _ in range(2))
    state = torch.get_rng_state()
    first, second = (gipo.sample_segments(100, args, generator).flatten().tolist() for _ in range(2))
    assert first != second and first != sorted(first)
    assert gipo.sample_segments(100, args, again).flatten().tolist() == first
    assert torch.equal(torch.get_rng_state(), state)


# -------------------- The agent --------------------
OBS_DIM, ACTION_DIM = 5, 3


def make_agent(head, **flags):
    """An agent whose policy depends visibly on the observation, unlike a freshly initialised one."""
    torch.manual_seed(3)
    agent = gipo.Agent(OBS_DIM, ACTION_DIM, gipo.Args(policy_head=head, hidden_size=16, **flags))
    with torch.no_grad():
        for parameter in agent.actor[4].parameters():
            parameter.add_(torch.randn_like(parameter))
    return agent


HEADS = pytest.mark.parametrize("head", ["gaussian", "categorical"])


@pytest.mark.parametrize("shape", [(7,), (4, 7)])
@HEADS
def test_action_logprob_and_entropy_have_one_entry_per_dimension(head, shape):
    agent, obs = make_agent(head), torch.randn(*shape, OBS_DIM)
    action, logprob, entropy = agent.get_action_and_logprob(obs)
    assert action.shape == logprob.shape == entropy.shape == (*shape, ACTION_DIM)
    assert agent.get_value(obs).shape == shape
    again = agent.get_action_and_logprob(obs, action)
    torch.testing.assert_close(again[1], logprob, rtol=0, atol=1e-6)
    assert torch.equal(again[0], action)
    assert (agent.get_action_and_logprob(obs)[0] != action).any()


def test_gaussian_head_against_torch():
    agent, obs = make_agent("gaussian", init_log_std=-0.7), torch.randn(200, OBS_DIM)
    with torch.no_grad():
        agent.actor_logstd.copy_(torch.tensor([-1.0, 0.0, 0.4]))
    mean = agent.actor(agent.normalize(obs))
    reference = torch.distributions.Normal(mean, agent.actor_logstd.exp().expand_as(mean))
    action, logprob, entropy = agent.get_action_and_logprob(obs)
    torch.testing.assert_close(logprob, reference.log_prob(action), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, reference.entropy(), rtol=1e-5, atol=1e-6)
    assert (mean.abs() <= 1).all() and (action.abs() > 1).any()  # bounded mean, unclipped sample
    z = ((action - mean) / reference.stddev).detach()
    np.testing.assert_allclose(z.mean(0), 0.0, atol=0.3)
    np.testing.assert_allclose(z.std(0), 1.0, atol=0.2)
    torch.testing.assert_close(agent.get_action_and_logprob(obs, deterministic=True)[0], mean)


def test_initial_policy():
    """A fresh policy is centred with the flag's width whatever the observation, so that exploration starts as documented."""
    bins = gipo.Agent(OBS_DIM, ACTION_DIM, gipo.Args())
    mean, _, entropy = bins.get_action_and_logprob(torch.randn(50, OBS_DIM), deterministic=True)
    assert mean.abs().max() < 0.1 and entropy.min() > 0.999 * math.log(256)  # uniform
    agent = gipo.Agent(OBS_DIM, ACTION_DIM, gipo.Args(policy_head="gaussian", init_log_std=-0.25))
    mean = agent.get_action_and_logprob(torch.randn(50, OBS_DIM), deterministic=True)[0]
    assert mean.abs().max() < 0.1
    assert torch.equal(agent.actor_logstd, torch.full((ACTION_DIM,), -0.25))


@pytest.mark.parametrize("bins", [2, 7, 64, 256])
def test_categorical_head_against_torch(bins):
    agent, obs = make_agent("categorical", num_bins=bins), torch.randn(200, OBS_DIM)
    logits = agent.actor(agent.normalize(obs)).view(200, ACTION_DIM, bins)
    reference = torch.distributions.Categorical(logits=logits)
    action, logprob, entropy = agent.get_action_and_logprob(obs)
    token = torch.round((action + 1) / 2 * (bins - 1))
    torch.testing.assert_close(logprob, reference.log_prob(token), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, reference.entropy(), rtol=1e-4, atol=1e-5)
    action, logprob, _ = agent.get_action_and_logprob(obs, deterministic=True)
    mean = (reference.probs * torch.arange(bins)).sum(-1)
    torch.testing.assert_close(action, mean * 2 / (bins - 1) - 1, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprob, reference.log_prob(mean.round()), rtol=1e-4, atol=1e-5)


def sharp_agent(bins):
    """A policy whose bins differ by many nats, some with probability 0 in float32."""
    agent = make_agent("categorical", num_bins=bins)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.randn(bins * ACTION_DIM) * 3)
        agent.actor[-1].bias.view(ACTION_DIM, bins)[:, [0, bins // 2, -1]] = -200.0
    return agent


@pytest.mark.parametrize("bins", [7, 64, 256])
@pytest.mark.parametrize("make", [sharp_agent, lambda bins: make_agent("categorical", num_bins=bins)], ids=["sharp", "flat"])
def test_categorical_samples_follow_the_probabilities(make, bins):
    agent, draws = make(bins), 50_000
    obs = torch.randn(1, OBS_DIM).expand(draws, OBS_DIM)
    with torch.no_grad():
        action, *_ = agent.get_action_and_logprob(obs)
        probabilities = agent.actor(agent.normalize(obs[:1])).view(ACTION_DIM, bins).softmax(-1).double()
    for dim, expected in enumerate((probabilities * draws).numpy()):
        counts = np.bincount(np.rint((action[:, dim].numpy() + 1) / 2 * (bins - 1)).astype(int), minlength=bins)
        often = expected > 5  # chi-squared: its mean is the number of bins, its variance twice that
        chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
        assert chi2 < often.sum() + 6 * math.sqrt(2 * often.sum())
        assert counts[expected == 0].sum() == 0


def agent_with(logits):
    """An agent whose policy has these logits in every action dimension, whatever it sees."""
    agent = make_agent("categorical", num_bins=len(logits))
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.copy_(torch.tensor(logits).repeat(ACTION_DIM))
    return agent


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 2), (0.125, 2), (0.25, 3), (0.5, 6), (0.625, 6), (0.75, 7), (1.0 - 2.0**-24, 7)]
)
def test_bins_of_probability_zero_are_never_drawn(uniform, token, monkeypatch):
    """Not at the front, in the middle or at the back, even for the uniform draws at whose edges they are."""
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, uniform))
    never = -200.0
    action, logprob, _ = agent_with([never, never, 0, 0, never, never, 0, 0, never, never]).get_action_and_logprob(
        torch.zeros(2, OBS_DIM)
    )
    np.testing.assert_allclose((action + 1) / 2 * 9, token, atol=1e-5)
    np.testing.assert_allclose(logprob.detach(), math.log(0.25), rtol=1e-6)


@pytest.mark.parametrize("bins", [2, 7, 256])
def test_the_largest_uniform_draw_finds_a_bin(bins, monkeypatch):
    """Whatever a cumulative sum in float32 ends at, a little below or above 1."""
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, 1.0 - 2.0**-24))
    agent = make_agent("categorical", num_bins=bins)
    action, logprob, _ = agent.get_action_and_logprob(torch.randn(2000, OBS_DIM))
    assert action.max() <= 1.0 and torch.isfinite(logprob).all()


@HEADS
def test_a_generator_decides_the_sample(head):
    """The same one again gives the same actions, and the global one is neither asked nor moved."""
    agent, obs, state = make_agent(head), torch.randn(50, OBS_DIM), torch.get_rng_state()
    one, two = (torch.Generator().manual_seed(5) for _ in range(2))
    action = agent.get_action_and_logprob(obs, generator=one)[0]
    assert torch.equal(agent.get_action_and_logprob(obs, generator=two)[0], action)
    assert not torch.equal(agent.get_action_and_logprob(obs, generator=one)[0], action)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bins", [2, 7, 64, 256])
def test_every_bin_survives_the_way_to_an_action_and_back(bins):
    """token -> action in [-1, 1] (float32, as the buffer keeps it) -> token: the log-prob is that of the token."""
    agent, tokens = make_agent("categorical", num_bins=bins), torch.arange(bins)
    action = (-1.0 + 2.0 * tokens / (bins - 1)).unsqueeze(-1).expand(-1, ACTION_DIM)
    assert action[0, 0] == -1.0 and action[-1, 0] == 1.0
    obs = torch.randn(1, OBS_DIM).expand(bins, OBS_DIM)
    logits = agent.actor(agent.normalize(obs)).view(bins, ACTION_DIM, bins)
    expected_logprob = logits.log_softmax(-1)[tokens, :, tokens]
    torch.testing.assert_close(agent.get_action_and_logprob(obs, action)[1], expected_logprob)
    assert len(expected_logprob[:, 0].unique()) > 0.8 * bins  # so a neighbour's would be noticed


def test_actor_and_critic_share_no_parameters():
    agent = make_agent("gaussian")
    actor, critic = agent.actor_parameters(), list(agent.critic.parameters())
    assert {id(p) for p in actor} | {id(p) for p in critic} == {id(p) for p in agent.parameters()}
    assert not {id(p) for p in actor} & {id(p) for p in critic}
    assert any(p is agent.actor_logstd for p in actor)


def test_normalizer_against_numpy_on_all_batches_together():
    rng, agent = np.random.default_rng(5), make_agent("gaussian")
    offset, scale = np.array([0.0, 5.0, -3.0, 100.0, 0.01]), np.array([1.0, 0.1, 20.0, 3.0, 0.5])
    batches = [(rng.normal(offset + i, scale, (8, n, OBS_DIM))).astype(np.float32) for i, n in enumerate([1, 64, 3, 200, 17])]
    for batch in batches:
        agent.update_normalizer(torch.tensor(batch))
    together = np.concatenate([b.reshape(-1, OBS_DIM) for b in batches]).astype(np.float64)
    np.testing.assert_allclose(agent.obs_mean, together.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(agent.obs_var, together.var(0), rtol=1e-3)
    assert agent.obs_count.item() == len(together)
    standardised = agent.normalize(torch.tensor(together, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(standardised.mean(0), 0.0, atol=1e-2)
    np.testing.assert_allclose(standardised.std(0), 1.0, atol=1e-2)


def test_normalizer_does_not_blow_up_coordinates_that_hardly_move():
    rng, agent = np.random.default_rng(6), make_agent("gaussian")
    obs = np.zeros((4, 500, OBS_DIM), np.float32)
    obs[..., 1] = 0.6 + 1e-6 * rng.normal(size=(4, 500))
    obs[..., 2] = rng.normal(size=(4, 500))
    for batch in obs:
        agent.update_normalizer(torch.tensor(batch))
    standardised = agent.normalize(torch.tensor(obs))
    assert standardised[..., [0, 1, 3, 4]].abs().max() < 1e-3
    assert standardised[..., 2].std().item() == pytest.approx(1.0, abs=0.05)
    assert (agent.normalize(torch.full((1, OBS_DIM), 1e6)) == 10.0).all()  # and outliers are cut


def test_normalizer_is_part_of_the_saved_model():
    agent = make_agent("gaussian")
    agent.update_normalizer(torch.randn(50, OBS_DIM) + 3.0)
    other = gipo.Agent(OBS_DIM, ACTION_DIM, gipo.Args(policy_head="gaussian", hidden_size=16))
    other.load_state_dict(agent.state_dict())
    obs = torch.randn(4, OBS_DIM)
    assert torch.equal(other.normalize(obs), agent.normalize(obs))


# -------------------- Log-probability and entropy of bins --------------------
SHAPES = pytest.mark.parametrize("shape", [(7, 3), (4, 7, 3)])
OUTPUTS = pytest.mark.parametrize("outputs", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "logprob", "entropy"])


def log_prob_and_entropy(logits, token):
    """The same by torch's own functions."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def values_and_gradient(function, logits, token, weights):
    """Both outputs, and the gradient of their sum under random weights of either sign."""
    leaf, generator = logits.clone().requires_grad_(), torch.Generator().manual_seed(1)
    values = function(leaf, token)
    factors = [torch.randn(v.shape, generator=generator).to(v.dtype) * w for v, w in zip(values, weights, strict=True)]
    sum((v * f).sum() for v, f in zip(values, factors, strict=True)).backward()
    return [v.detach() for v in values], leaf.grad


@SHAPES
@OUTPUTS
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["float64", "float32"])
def test_log_prob_and_entropy_against_autograd(shape, outputs, dtype, precision):
    torch.manual_seed(2)
    logits, token = 3 * torch.randn(*shape, 11, dtype=dtype), torch.randint(11, shape)
    (ours, our_gradient), (theirs, their_gradient) = (
        values_and_gradient(f, logits, token, outputs) for f in (gipo.LogProbAndEntropy.apply, log_prob_and_entropy)
    )
    for mine, reference in zip([*ours, our_gradient], [*theirs, their_gradient], strict=True):
        torch.testing.assert_close(mine, reference, rtol=precision, atol=precision)


@SHAPES
def test_log_prob_and_entropy_by_finite_differences(shape):
    torch.manual_seed(2)
    token = torch.randint(4, shape)
    logits = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gipo.LogProbAndEntropy.apply(x, token), logits)


@pytest.mark.parametrize("scale", [0.0, 50.0, 1e4, 1e30])
def test_log_prob_and_entropy_are_finite_for_extreme_logits(scale):
    """Every bin taken once, the impossible ones too; a gradient of an entry is no larger than the weights make it."""
    logits = torch.tensor([1.0, -1.0, 1.0, 0.5, 0.0]).mul(scale).expand(5, 5).contiguous()
    values, gradient = values_and_gradient(gipo.LogProbAndEntropy.apply, logits, torch.arange(5), (1.0, 1.0))
    reference, _ = values_and_gradient(log_prob_and_entropy, logits.double(), torch.arange(5), (1.0, 1.0))
    for mine, exact in zip(values, reference, strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and gradient.abs().max() < 20


# -------------------- The loss --------------------
def minibatch(script, agent, steps=4, number=3):
    """Segments of an older policy, as the replay buffer holds them, episode ends among them."""
    torch.manual_seed(5)
    obs, dones = torch.randn(steps, number, OBS_DIM), (torch.rand(steps, number) < 0.3).float()
    with torch.no_grad():
        action, logprob, _ = agent.get_action_and_logprob(obs)
    mb = {"obs": obs, "actions": action, "logprobs": logprob + 0.2 * torch.randn_like(logprob), "dones": dones}
    mb |= {"rewards": torch.randn(steps, number), "terminations": dones * (torch.rand(steps, number) < 0.5)}
    return mb | {"end_values": script.get_end_values(agent, torch.randn(steps, number, OBS_DIM), dones)}


def loss_and_gradient(function, agent, mb, args):
    agent.zero_grad()
    agent.adv_std_peak.zero_()
    loss, stats = function(agent, mb, args)
    loss.backward()
    return loss.detach(), stats, [p.grad.clone() for p in agent.parameters()], agent.adv_std_peak.clone()


@SCRIPTS
@pytest.mark.parametrize("ratio", ["joint", "per-dim"])
@pytest.mark.parametrize("vtrace", [False, True], ids=["gae", "vtrace"])
@HEADS
def test_loss_against_its_parts(script, head, ratio, vtrace):
    """Written out from slow advantages and the published formulas; the logged numbers are its parts."""
    args = script.Args(
        policy_head=head, hidden_size=16, num_bins=9, ratio=ratio, vtrace=vtrace, kl_coef=0.3, ent_coef=0.2, vf_coef=0.7
    )
    agent = make_agent(head, num_bins=9)
    mb = minibatch(script, agent)
    loss, stats, _, peak = loss_and_gradient(script.compute_loss, agent, mb, args)
    with torch.no_grad():
        _, logprob, entropy = agent.get_action_and_logprob(mb["obs"], mb["actions"])
        values = agent.get_value(mb["obs"])
    logratio = logprob - mb["logprobs"]
    following = torch.cat([values[1:], mb["end_values"][-1:]])
    columns = {
        "values": values,
        "next_values": torch.where(mb["dones"] > 0, mb["end_values"], following),
        "rewards": args.reward_scale * mb["rewards"],
        "logratio": logratio.sum(-1),
        "terminations": mb["terminations"],
        "dones": mb["dones"],
    }
    data = SimpleNamespace(**{name: value.double().numpy() for name, value in columns.items()})
    if vtrace:
        advantages, returns = slow_vtrace(data, args.gamma, args.gae_lambda)
    else:
        advantages = slow_gae(data, args.gamma, args.gae_lambda)
        returns = advantages + data.values
    assert peak.item() == pytest.approx(advantages.std(), rel=1e-4)
    advantages = (advantages - advantages.mean()) / advantages.std()
    per_sample, repeated = logratio.double().sum(-1).numpy(), advantages
    if ratio == "per-dim":
        per_sample, repeated = logratio.double().numpy(), np.broadcast_to(advantages[..., None], logratio.shape)
    method = "gipo-gaussian" if script is gipo else "ppo"
    pairs = zip(per_sample.flatten(), repeated.flatten(), strict=True)
    policy_loss = -np.mean([expected(method, x, advantage)[0] for x, advantage in pairs])
    value_loss = 0.5 * np.mean((data.values - returns) ** 2)
    mean_entropy = entropy.double().sum(-1).mean().item()
    total = policy_loss - 0.2 * mean_entropy - 0.3 * per_sample.mean() + 0.7 * value_loss
    logged = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": mean_entropy}
    for name, value in logged.items():
        assert stats[f"losses/{name}"].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert loss.item() == pytest.approx(total, rel=1e-4, abs=1e-6)
    rho = np.exp(per_sample)
    trust = np.array([expected(method, x, advantage)[1] for x, advantage in zip(per_sample.flat, repeated.flat, strict=True)])
    coefficient = trust * rho.flatten()
    diagnostics = {
        "losses/approx_kl": (rho - 1 - per_sample).mean(),
        "losses/clipfrac": (abs(rho - 1) > 0.2).mean(),
        "losses/explained_variance": 1 - (returns - data.values).var() / returns.var(),
        "gipo/trust_mean": trust.mean(),
        "gipo/trust_min": trust.min(),
        "gipo/effective_sample_size": coefficient.mean() ** 2 / (coefficient**2).mean(),
        "gipo/utilization": (coefficient > 1e-3).mean(),
        "gipo/logratio_std": per_sample.std(),
    }
    assert stats.keys() == {f"losses/{name}" for name in logged} | diagnostics.keys()
    for name, value in diagnostics.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-3, abs=1e-6), name


@SCRIPTS
def test_the_floor_of_the_advantages_is_relative_to_their_largest_spread(script):
    """With a hundred times the spread before, a floor of a tenth makes the gradient a tenth, whatever the rewards' scale."""
    agent, gradients = make_agent("gaussian"), []
    args = script.Args(policy_head="gaussian", hidden_size=16, ent_coef=0.0, adv_std_floor=0.1)
    mb = minibatch(script, agent)
    _, _, _, spread = loss_and_gradient(script.compute_loss, agent, mb, args)
    for peak in (spread, 100 * spread):
        agent.zero_grad()
        agent.adv_std_peak.copy_(peak)
        script.compute_loss(agent, mb, args)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.actor_parameters()]))
    torch.testing.assert_close(10 * gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert gradients[0].norm() > 1e-2


def test_normalised_observations_are_cut_on_both_sides():
    agent = make_agent("gaussian")
    assert agent.normalize(torch.tensor([[-1e9, 0.0, 1e9]]).repeat(1, OBS_DIM)[:, :OBS_DIM]).unique().tolist() == [
        -10.0,
        0.0,
        10.0,
    ]


@SCRIPTS
@HEADS
def test_log_ratios_of_the_acting_policy_are_zero(script, head):
    """Then every method's coefficient is 1, nothing is clipped, and the whole minibatch counts."""
    args, agent = script.Args(policy_head=head, num_bins=9), make_agent(head, num_bins=9)
    mb = minibatch(script, agent)
    mb["logprobs"] = agent.get_action_and_logprob(mb["obs"], mb["actions"])[1].detach()
    stats = script.compute_loss(agent, mb, args)[1]
    for name in ("losses/approx_kl", "losses/clipfrac", "gipo/logratio_std"):
        assert stats[name].item() == pytest.approx(0.0, abs=1e-6), name
    for name in ("gipo/trust_min", "gipo/trust_mean", "gipo/effective_sample_size", "gipo/utilization"):
        assert stats[name].item() == pytest.approx(1.0, abs=1e-6), name


@pytest.mark.parametrize(("head", "backend"), [("categorical", "inductor"), ("gaussian", "aot_eager")])
def test_the_compiled_loss_is_the_loss(head, backend):
    """One graph; loss, numbers of the log and every gradient. The Gaussian is traced alone: compiling takes long."""
    args, agent = gipo.Args(policy_head=head, num_bins=5, ent_coef=0.1, kl_coef=0.1), make_agent(head, num_bins=5)
    mb = minibatch(gipo, agent)
    torch.compiler.reset()
    compiled = torch.compile(gipo.compute_loss, backend=backend, fullgraph=True)
    eager, ours = (loss_and_gradient(function, agent, mb, args) for function in (gipo.compute_loss, compiled))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 1e-4 for gradient in eager[2])


# -------------------- Small helpers --------------------
def global_states():
    return hash(random.getstate()), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()


@SCRIPTS
@pytest.mark.parametrize("fails", [False, True])
def test_seeded_leaves_the_global_generators_as_they_were(script, fails):
    """Also when what runs inside fails; inside, the seed decides."""
    before, draws = global_states(), []
    for seed in (3, 3, 4):
        with contextlib.suppress(ZeroDivisionError), script.seeded(seed):
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
            1 // (not fails)
    assert global_states() == before
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])


@pytest.mark.parametrize(
    ("successes", "rate"),
    [
        ([], None),
        ([math.nan], None),
        ([math.nan, math.nan], None),
        ([0.0], 0.0),
        ([1.0, 0.0, 1.0, 1.0], 0.75),
        ([math.nan, 1.0, math.nan, math.nan], 0.25),
        ([math.nan, 0.0], 0.0),
        ((0.5, 1.0), 0.75),
    ],
)
def test_success_rate(successes, rate):
    assert gipo.success_rate(successes) == rate
    assert gipo.success_rate(collections.deque(successes, maxlen=100)) == rate


def test_convert_reaches_every_level_and_nothing_else():
    tensor, text = torch.arange(3), "text"
    tree = {"a": tensor, "b": [1, (tensor + 1, None)], "c": {"d": text, "e": (), "f": []}, 5: 2.5}
    arrays = gipo.convert(tree, torch.Tensor, torch.Tensor.numpy)
    assert type(arrays["a"]) is np.ndarray and type(arrays["b"][1]) is tuple and arrays["c"]["d"] is text
    back = gipo.convert(arrays, np.ndarray, torch.from_numpy)
    assert back.keys() == tree.keys() and type(back["b"]) is list and back["c"] == tree["c"] and back[5] == 2.5
    assert torch.equal(back["a"], tensor) and torch.equal(back["b"][1][0], tensor + 1) and back["b"][1][1] is None
    assert tree["a"] is tensor  # the original is left alone


# -------------------- Schedules --------------------
@pytest.mark.parametrize(
    ("schedule", "progress", "warmup", "share"),
    [
        ("constant", 0.0, 0.0, 1.0),
        ("constant", 0.99, 0.0, 1.0),
        ("linear", 0.0, 0.0, 1.0),
        ("linear", 0.25, 0.0, 0.75),
        ("linear", 0.999, 0.0, 0.001),
        ("cosine", 0.0, 0.0, 1.0),
        ("cosine", 0.5, 0.0, 0.5),
        ("cosine", 0.25, 0.0, (2 + math.sqrt(2)) / 4),
        ("constant", 0.05, 0.1, 0.5),
        ("linear", 0.05, 0.1, 0.5),
        ("constant", 0.1, 0.1, 1.0),
        ("linear", 0.5, 0.1, 0.5),
    ],
)
def test_lr_share(schedule, progress, warmup, share):
    assert gipo.lr_share(schedule, progress, warmup) == pytest.approx(share)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_lr_share_never_rises_after_the_warmup(schedule):
    shares = [gipo.lr_share(schedule, progress, 0.1) for progress in np.linspace(0, 0.999, 200)]
    peak = int(np.argmax(shares))
    assert all(np.diff(shares[: peak + 1]) >= 0) and all(np.diff(shares[peak:]) <= 0)
    assert 0 <= min(shares) and max(shares) <= 1


def test_defaults_of_the_methods():
    """What the closed forms above take for granted."""
    defaults = {field.name: field.default for field in dataclasses.fields(gipo.Args)}
    assert (defaults["sigma_neg_ratio"], defaults["sapo_tau_pos"], defaults["sapo_tau_neg"]) == (1.0, 1.0, 1.05)
    assert (defaults["kernel"], defaults["trust_weight"]) == ("gaussian", "gipo")
    assert ppo.Args().clip_coef == 0.2
