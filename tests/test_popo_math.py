"""POPO against closed forms and independent implementations: verifier, advantages, objective, buffer, sampler."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import popo_countdown as popo

SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_prompts": 6, "group_size": 4}


def make(**values):
    args = popo.with_defaults(popo.Args(**{**SMALL, **values}))
    torch.manual_seed(args.seed)
    return args, *popo.make_task_and_policy(args)


def tokens_of(text: str) -> torch.Tensor:
    return torch.tensor([[popo.VOCABULARY.index(symbol) for symbol in text]])


TASK = popo.Countdown(popo.Args(env_id="countdown-4", format_reward=0.5))


def verify(numbers, target, text, length=None) -> tuple[bool, bool]:
    """By way of the task, which takes the padding off the numbers and cuts the response after its mask."""
    tokens = tokens_of(text or "=")[None]
    mask = torch.arange(tokens.shape[2])[None, None] < (len(text) if length is None else length)
    problems = {"numbers": torch.tensor([numbers]), "target": torch.tensor([target])}
    reward, well_formed = TASK.rewards(problems, tokens, mask)
    assert reward.item() in ((0.5, 1.0) if well_formed else (0.0,))
    return reward.item() == 1, well_formed.item()


# -------------------- Verifier --------------------
def reference_value(text: str) -> Fraction | None:
    """A plain stack machine on exact fractions; None if the expression is malformed."""
    stack = []
    for symbol in text:
        if symbol.isdigit():
            stack.append(Fraction(int(symbol)))
        elif symbol in "+-*" and len(stack) >= 2:
            right, left = stack.pop(), stack.pop()
            stack.append({"+": left + right, "-": left - right, "*": left * right}[symbol])
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def test_verifier_agrees_with_a_plain_stack_machine():
    """500 random strings and 500 random valid expressions of all lengths, with matching and other targets."""
    chance, texts = random.Random(0), []
    for _ in range(500):
        texts.append("".join(chance.choice(popo.VOCABULARY) for _ in range(chance.randint(1, 7))))
        n = chance.randint(2, 4)
        symbols, size = [], 0
        numbers = [str(chance.randint(1, 9)) for _ in range(n)]
        while numbers or size > 1:
            if numbers and (size < 2 or chance.random() < 0.5):
                symbols.append(numbers.pop())
                size += 1
            else:
                symbols.append(chance.choice("+-*"))
                size -= 1
        texts.append("".join(symbols))
    values = [reference_value(text) for text in texts]
    assert 400 < sum(value is not None for value in values) < 700
    for text, value in zip(texts, values, strict=True):
        numbers = [int(symbol) for symbol in text if symbol.isdigit()] or [1]
        legal = value is not None and 0 not in numbers
        numbers = [n for n in numbers if n] or [1]
        chance.shuffle(numbers)
        target = 7 if value is None else int(value)
        assert verify(numbers, target, text) == (legal, legal), text
        assert verify(numbers, target + 1, text) == (False, legal), text
        assert verify([*numbers, 0, 0], target, text) == (legal, legal), text  # padding


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("23+5*", None, (True, True)),
        ("52+3*", None, (False, True)),
        ("23+5*9", 5, (True, True)),  # what follows the mask does not count
        ("", 0, (False, False)),
        ("23+", None, (False, False)),  # unused number
        ("23+5*5-", None, (False, False)),  # reused number, too long
        ("22+5*", None, (False, False)),
        ("23+5", None, (False, False)),  # two values left
        ("2+35*", None, (False, False)),  # operator without operands
        ("23+5=", None, (False, False)),
        ("23+5*0+", None, (False, False)),  # 0 is none of the numbers
        ("+-*+-", None, (False, False)),
    ],
)
def test_malformed_responses_get_nothing(text, length, expected):
    assert verify([5, 3, 2], 25, text, length) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" (2 + 3) * 5", (True, True)),
        ("5*(3+2) ", (True, True)),
        ("2 * 3 - 5", (False, True)),
        ("(2 + 3) * 5 = 25", (False, False)),
        ("5 * 5", (False, False)),
        ("(2 + 3) * 5 * 5 / 5", (False, False)),
        ("2 / (3 - 3)", (False, False)),
        ("2 ** 3 + 5", (False, False)),
        ("__import__('os').getcwd()", (False, False)),
        ("", (False, False)),
        ("(" * 500, (False, False)),
        ("5.0 * (2 + 3)", (False, False)),
        ("25", (False, False)),
        ("(2 + 3) * 5 # or 9", (False, False)),
        ("(2 + 0x3) * 5", (False, False)),
        ("(2 + 3) * 5" + " " * 200 + "+ 9", (False, False)),
    ],
)
def test_infix_verifier(text, expected):
    assert popo.verify_infix([5, 3, 2], 25, text) == expected


def test_infix_division_is_exact():
    assert popo.verify_infix([7, 2, 2], 7, "7 / 2 * 2") == (True, True)
    assert popo.verify_infix([7, 2], 3, "7 / 2") == (False, True)


# -------------------- Problems --------------------
@pytest.mark.parametrize("env_id", ["countdown-2", "countdown-3", "countdown-4", "countdown-34"])
def test_problems_are_solvable_and_held_out_ones_are_apart(env_id):
    _, task, _ = make(env_id=env_id)
    torch.manual_seed(0)
    train, test = task.problems(2000, test=False), task.problems(500, test=True)
    for problems in (train, test):
        solutions = torch.where(problems["codes"] < 0, 9 - problems["codes"], problems["codes"])
        mask = torch.arange(solutions.shape[1]) < problems["lengths"][:, None]
        rewards, well_formed = task.rewards(problems, solutions[:, None], mask[:, None])
        assert (rewards == 1).all() and well_formed.all()
        assert problems["target"].min() >= 0 and problems["target"].max() <= 99
    sizes = set((train["numbers"] > 0).sum(1).tolist())
    assert sizes == set(popo.SIZES[env_id])
    assert not set(train["keys"].tolist()) & set(test["keys"].tolist())
    share = popo.held_out(train["keys"].unique()).float().mean(), popo.held_out(torch.arange(100_000)).float().mean()
    assert share[0] == 0 and abs(share[1] - 0.1) < 0.01


def test_every_order_of_numbers_and_operators_occurs():
    _, task, _ = make(env_id="countdown-4")
    assert {n: len(shapes) for n, shapes in task.shapes.items()} == {4: 5}  # Catalan number C_3
    codes = task.random_expressions(500, 4)["codes"]
    assert len({tuple(row) for row in (codes < 0).tolist()}) == 5
    assert set(codes.flatten().tolist()) == {-3, -2, -1, *range(1, 10)}


def test_a_problem_has_one_key_in_every_order():
    keys = [popo.problem_keys(torch.tensor([order]), torch.tensor([42])).item() for order in itertools.permutations((3, 7, 7))]
    assert len(set(keys)) == 1
    others = [popo.problem_keys(torch.tensor([n]), torch.tensor([t])).item() for n, t in (((3, 7, 8), 42), ((3, 7, 7), 41))]
    assert len({*keys, *others}) == 3


def test_warm_up_examples_teach_format_only():
    """Every example is well-formed for its prompt's numbers; its target is another problem's, right by accident at most."""
    _, task, _ = make(env_id="countdown-34")
    torch.manual_seed(0)
    prompts, responses, mask = task.examples(1000)
    numbers, target = prompts[:, :4], prompts[:, 5] * 10 + prompts[:, 6]
    assert (prompts[:, 4] == 13).all()
    rewards, well_formed = task.rewards({"numbers": numbers, "target": target}, responses[:, None], mask[:, None])
    assert well_formed.all() and rewards.mean() < 0.1


# -------------------- Sampler --------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("env_id", ["countdown-34", "countdown-2"])
def test_stored_logprobs_equal_teacher_forced_ones(env_id, temperature):
    """The sampler's cache, positions, mask and temperature against one pass without a cache, written out here."""
    args, task, policy = make(env_id=env_id, temperature=temperature)
    for parameter in policy.parameters():  # far from uniform, or nothing would show
        torch.nn.init.normal_(parameter, std=0.3)
    groups = popo.generate_groups(policy, task, args, 1)
    batch = popo.stack_groups(groups, "cpu")
    recomputed, entropy = popo.response_logprobs(policy, batch, temperature)
    torch.testing.assert_close(recomputed, batch["logprobs"], atol=1e-5, rtol=0)
    assert (batch["logprobs"][batch["mask"]] < 0).all() and (batch["logprobs"][~batch["mask"]] == 0).all()
    for group in groups:
        for response, mask, logprobs in zip(group["responses"], group["mask"], group["logprobs"], strict=True):
            length = int(mask.sum())
            assert mask[:length].all()
            logits = policy(torch.cat([group["prompts"], response[: length - 1]])[None])[0][0, len(group["prompts"]) - 1 :]
            expected = torch.log_softmax(logits / temperature, -1)
            torch.testing.assert_close(logprobs[:length], expected[torch.arange(length), response[:length]], atol=1e-5, rtol=0)
    assert (entropy[batch["mask"]] > 0).all() and (entropy <= math.log(14) + 1e-5).all()


def test_lengths_follow_the_problem():
    args, task, policy = make(env_id="countdown-34", num_prompts=40)
    groups = popo.generate_groups(policy, task, args, 1)
    for group in groups:
        assert (group["mask"].sum(1) == 2 * (group["prompts"][:4] > 0).sum() - 1).all()
    assert {int(group["mask"][0].sum()) for group in groups} == {5, 7}


def test_samples_follow_the_distribution():
    _, _, policy = make(env_id="countdown-2")
    torch.nn.init.normal_(policy.head.weight, std=0.3)
    prompts = torch.tensor([[3, 4, 5, 13]])
    mask = torch.ones_like(prompts, dtype=torch.bool)
    tokens, _, _ = popo.sample(policy, prompts, mask, 20_000, torch.tensor([1]), (), 0.8)
    expected = torch.softmax(policy(prompts)[0][0, -1] / 0.8, -1)
    frequency = torch.bincount(tokens.flatten(), minlength=14) / 20_000
    assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    assert expected.max() < 0.9


def test_an_end_token_ends_the_mask():
    _, _, policy = make()
    prompts = torch.randint(1, 10, (3, 6))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    tokens, mask, logprobs = popo.sample(policy, prompts, mask, 50, torch.tensor([4, 4, 2]), (5,), 1.0)
    for row, kept, limit in zip(tokens.flatten(0, 1), mask.flatten(0, 1), [4] * 100 + [2] * 50, strict=True):
        ends = [i for i in range(limit) if row[i] == 5]
        assert kept.sum() == (min([ends[0] + 1, limit]) if ends else limit)
    assert (mask.sum(-1) < 2).any() and (logprobs[~mask] == 0).all()


# -------------------- Groups --------------------
@pytest.mark.parametrize("k", range(2, 33))
def test_equal_rewards_teach_exactly_nothing(k):
    """Also where their float32 mean is rounded, as that of eight times 0.1."""
    for reward in (0.0, 0.1, 0.3, 1.0):
        assert not popo.group_advantages(torch.full((3, k), reward)).any()


def test_effective_groups():
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0.1, 0.1, 0.1], [0.1, 0, 0], [0.3, 0.3, 1]])
    assert popo.is_effective(rewards).tolist() == [False, False, True, False, True, True]


def test_advantages_by_hand():
    advantages = popo.group_advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.5  # the sample standard deviation is 0.5
    torch.testing.assert_close(advantages[0], expected, atol=1e-5, rtol=0)
    assert (advantages[1:] == 0).all()


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_are_a_groups_own(rows):
    """Sum 0, std 1 where effective, and the same whatever other groups are in the batch."""
    rewards = torch.tensor(rows)
    advantages = popo.group_advantages(rewards)
    for row, own in zip(rewards, advantages, strict=True):
        assert torch.equal(own, popo.group_advantages(row))
        assert abs(own.sum()) < 1e-5
        effective = popo.is_effective(row[None]).item()
        assert own.std().item() == pytest.approx(float(effective), abs=1e-3)


# -------------------- Objective --------------------
def test_without_replay_it_is_grpo():
    """Loss and gradient of fresh groups equal PPO-clip with GRPO's advantages, written out here, on and off the centre."""
    args, task, policy = make(dual_clip=math.inf)
    batch = popo.stack_groups(popo.generate_groups(policy, task, args, 1), "cpu")
    batch["advantages"] = popo.group_advantages(torch.rand(6, 4))
    for step in range(2):
        logprobs, _ = popo.response_logprobs(policy, batch, 1.0)
        old, mask, advantages = batch["logprobs"], batch["mask"], batch["advantages"].unsqueeze(-1)
        objective, ratio, coefficient = popo.policy_objective(logprobs, old, old, advantages, mask, args)
        loss = -(objective * mask).sum() / mask.sum()
        own = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
        r = torch.exp(logprobs - old)
        grpo = -torch.min(r * advantages, r.clamp(1 - 0.2, 1 + 0.28) * advantages)[mask].mean()
        reference = torch.autograd.grad(grpo, list(policy.parameters()))
        assert torch.equal(coefficient, ratio)  # w = 1
        torch.testing.assert_close(loss, grpo, atol=1e-7, rtol=0)
        torch.testing.assert_close(own, reference, atol=1e-7, rtol=1e-5)
        assert any(grad.abs().max() > 1e-4 for grad in own)
        if step == 0:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
        else:
            assert ((ratio - 1).abs()[mask] > 0.3).any()


def bandit(**values):
    """Three arms: exact expectation over the behaviour policy of the objective's gradient, at theta = prox, in float64."""
    args = popo.Args(clip_low=1e9, clip_high=1e9, dual_clip=math.inf, **values)
    theta = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    behaviour = torch.log_softmax(torch.tensor([1.5, 0.2, -0.7], dtype=torch.float64), 0)
    advantages = torch.tensor([1.0, -0.4, -1.3], dtype=torch.float64)
    logprobs = torch.log_softmax(theta, 0)
    mask = torch.ones(3, 1, dtype=torch.bool)
    columns = logprobs[:, None], logprobs.detach()[:, None], behaviour[:, None], advantages[:, None]
    objective, _, _ = popo.policy_objective(*columns, mask, args)
    gradient = torch.autograd.grad((behaviour.exp() * objective[:, 0]).sum(), theta, retain_graph=True)[0]
    on_policy = torch.autograd.grad((logprobs.exp() * advantages).sum(), theta, retain_graph=True)[0]
    scores = torch.stack([torch.autograd.grad(logprob, theta, retain_graph=True)[0] for logprob in logprobs])
    return gradient, on_policy, behaviour.exp(), logprobs.detach().exp(), advantages, scores


@pytest.mark.parametrize("is_level", ["token", "sequence", "geometric"])
def test_uncapped_weight_is_unbiased(is_level):
    gradient, on_policy, *_ = bandit(is_cap=math.inf, is_level=is_level)
    torch.testing.assert_close(gradient, on_policy, atol=1e-10, rtol=0)


def test_pi_old_is_biased_by_what_it_ignores():
    gradient, on_policy, behaviour, _, advantages, scores = bandit(objective="pi_old")
    torch.testing.assert_close(gradient, (behaviour * advantages) @ scores, atol=1e-10, rtol=0)
    assert (gradient - on_policy).abs().max() > 0.1


@pytest.mark.parametrize("cap", [1.0, 2.0, 3.0])
def test_bias_of_a_cap_is_the_sum_over_capped_arms(cap):
    gradient, on_policy, behaviour, prox, advantages, scores = bandit(is_cap=cap)
    w = prox / behaviour
    bias = ((behaviour * (w.clamp(max=cap) - w) * advantages)[w > cap]) @ scores[w > cap]
    assert (w > cap).any() and bias.abs().max() > 1e-3
    torch.testing.assert_close(gradient - on_policy, bias, atol=1e-10, rtol=0)


def slopes(behaviour, advantages, shift=0.0, **values):
    """d objective / d logprob of single-token responses at logprob = prox + shift."""
    args = popo.Args(**values)
    prox = torch.log(torch.tensor([0.2, 0.5, 0.9, 0.4]))
    logprobs = (prox + shift).requires_grad_()
    mask = torch.ones(4, 1, dtype=torch.bool)
    columns = logprobs[:, None], prox[:, None], torch.log(torch.tensor(behaviour))[:, None], torch.tensor(advantages)[:, None]
    objective, ratio, weight = popo.policy_objective(*columns, mask, args)
    return torch.autograd.grad(objective.sum(), logprobs)[0], ratio.detach().squeeze(1), weight.squeeze(1)


BEHAVIOUR = [0.1, 0.9, 0.3, 0.39]  # pi_prox / pi_b: 2, 0.56, 3, 1.03
ADVANTAGES = [1.0, -1.0, 1.0, -1.0]


def test_clip_is_centred_on_the_proximal_policy():
    """At theta = prox nothing is clipped, whoever wrote the data: the slope is w A."""
    slope, ratio, weight = slopes(BEHAVIOUR, ADVANTAGES, is_cap=math.inf)
    assert torch.equal(ratio, torch.ones(4))
    torch.testing.assert_close(slope, weight * torch.tensor(ADVANTAGES))
    torch.testing.assert_close(weight, torch.tensor([2.0, 5 / 9, 3.0, 40 / 39]))


def test_behaviour_clip_freezes_stale_tokens():
    """The paper's suboptimal constraint: r_b = 2 > 1.28 with A > 0, r_b = 0.56 < 0.8 with A < 0: no gradient left."""
    slope, ratio, _ = slopes(BEHAVIOUR, ADVANTAGES, objective="behaviour")
    torch.testing.assert_close(ratio, torch.tensor([2.0, 5 / 9, 3.0, 40 / 39]))
    assert (slope[:3] == 0).all()
    torch.testing.assert_close(slope[3], torch.tensor(-40 / 39))


@pytest.mark.parametrize("behaviour", [BEHAVIOUR, [0.2, 0.5, 0.9, 0.4], [0.9, 0.1, 0.1, 0.9]])
def test_trust_region_does_not_depend_on_the_behaviour_policy(behaviour):
    """Hilton et al.: which tokens are clipped is the same for every behaviour policy."""
    for shift in (-0.5, -0.1, 0.1, 0.5):
        slope, _, _ = slopes(behaviour, ADVANTAGES, shift)
        clipped = (slope == 0).tolist()
        assert clipped == [shift == 0.5, shift == -0.5, shift == 0.5, shift == -0.5]


def test_dual_clip_bounds_negative_advantages_only():
    args, one = popo.Args(dual_clip=3.0), torch.ones(2, 1, dtype=torch.bool)
    far = torch.full((2, 1), 5.0, requires_grad=True)
    zero, advantages = torch.zeros(2, 1), torch.tensor([[-1.0], [1.0]])
    objective, _, _ = popo.policy_objective(far, zero, zero, advantages, one, args)
    torch.testing.assert_close(objective.detach(), torch.tensor([[-3.0], [1.28]]))
    assert (torch.autograd.grad(objective.sum(), far)[0] == 0).all()


def test_levels_of_the_weight():
    prox, behaviour = torch.log(torch.tensor([[[0.5, 0.4, 0.9]]])), torch.log(torch.tensor([[[0.25, 0.8, 0.1]]]))
    mask = torch.tensor([[[True, True, False]]])
    token = popo.importance_weight(prox, behaviour, mask, "token")[mask]
    sequence = popo.importance_weight(prox, behaviour, mask, "sequence")[mask]
    geometric = popo.importance_weight(prox, 2 * behaviour, mask, "geometric")[mask]
    torch.testing.assert_close(token, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(sequence, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(geometric, torch.tensor([math.sqrt(8 * 0.625)] * 2))


def test_no_gradient_through_the_weight():
    logits = torch.tensor([[0.2, 0.1]], requires_grad=True)
    behaviour, mask = torch.tensor([[-0.5, 0.3]]), torch.ones(1, 2, dtype=torch.bool)
    assert not popo.importance_weight(logits, behaviour, mask, "token").requires_grad


# -------------------- Trust weights --------------------
TRUST = ("gipo", "sapo", "cispo", "m2po")


@pytest.mark.parametrize("objective", TRUST)
def test_on_fresh_data_a_trust_weight_is_grpo(objective):
    """l = 0: the coefficient of every objective is 1 at every level, and the gradient the policy gradient."""
    args, task, policy = make(objective=objective, is_level="sequence" if objective == "gipo" else "token")
    batch = popo.stack_groups(popo.generate_groups(policy, task, args, 1), "cpu")
    mask, advantages = batch["mask"], popo.group_advantages(torch.rand(6, 4)).unsqueeze(-1)
    logprobs, _ = popo.response_logprobs(policy, batch, 1.0)
    behaviour = logprobs.detach()
    objective, _, coefficient = popo.policy_objective(logprobs, behaviour, behaviour, advantages, mask, args)
    torch.testing.assert_close(coefficient[mask], torch.ones_like(coefficient[mask]), atol=1e-6, rtol=0)
    own = torch.autograd.grad((objective * mask).sum(), list(policy.parameters()), retain_graph=True)
    plain = torch.autograd.grad((logprobs * advantages * mask).sum(), list(policy.parameters()))
    torch.testing.assert_close(own, plain, atol=1e-5, rtol=1e-4)


LOGRATIOS, SIGNS = [-2.0, -0.3, 0.0, 0.4, 1.5], [1.0, -1.0]


def coefficients(**values):
    """{(l, A): c} of single-token responses, by differentiation of the surrogate: its slope is c A."""
    args = popo.Args(**values)
    pairs = list(itertools.product(LOGRATIOS, SIGNS))
    x, advantages = (torch.tensor(column)[:, None] for column in zip(*pairs, strict=True))
    behaviour = torch.full_like(x, -1.0)
    logprobs = (behaviour + x).requires_grad_()
    mask = torch.ones_like(x, dtype=torch.bool)
    objective, _, coefficient = popo.policy_objective(logprobs, None, behaviour, advantages, mask, args)
    slope = torch.autograd.grad(objective.sum(), logprobs)[0]
    torch.testing.assert_close(slope, coefficient * advantages)
    return {pair: c.item() for pair, c in zip(pairs, coefficient, strict=True)}


@pytest.mark.parametrize(
    ("kernel", "weight"),
    [
        ("gaussian", lambda x: math.exp(-(x**2) / 2)),
        ("laplacian", lambda x: math.exp(-abs(x))),
        ("cauchy", lambda x: 1 / (1 + x**2)),
    ],
)
def test_gipo_by_hand(kernel, weight):
    for (x, sign), c in coefficients(objective="gipo", sigma=0.5, sigma_neg_ratio=0.6, kernel=kernel).items():
        assert c == pytest.approx(weight(x / (0.5 if sign > 0 else 0.3)) * math.exp(x), rel=1e-5)


def test_the_gaussian_bounds_the_coefficient():
    """omega rho <= exp(sigma^2 / 2), however far the policies are apart; no overflow either."""
    x = torch.linspace(-200, 200, 4001)[:, None]
    args = popo.Args(objective="gipo", sigma=0.7)
    c = popo.trust_coefficient(x, torch.ones_like(x), torch.ones_like(x, dtype=torch.bool), args)
    assert c.isfinite().all() and c.max().item() == pytest.approx(math.exp(0.7**2 / 2), rel=1e-3)


def test_weight_equals_gipo_continuous():
    import gipo_continuous

    x, advantages = torch.linspace(-3, 3, 50), torch.linspace(-1, 1, 50)
    for kernel in ("gaussian", "laplacian", "cauchy"):
        ours, theirs = (m.gipo_log_weight(x, advantages, 0.4, 0.2, kernel) for m in (popo, gipo_continuous))
        assert torch.equal(ours, theirs)


def test_sapo_and_cispo_by_hand():
    for (x, sign), c in coefficients(objective="sapo").items():
        tau = 1.0 if sign > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (math.exp(x) - 1)))
        assert c == pytest.approx(4 * gate * (1 - gate) * math.exp(x), rel=1e-3)
    for (x, _), c in coefficients(objective="cispo", is_cap=1.3).items():
        assert c == pytest.approx(min(math.exp(x), 1.3), rel=1e-5)


def test_m2po_by_hand():
    """PPO could clip -2 and -0.3 where A < 0, 0.4 and 1.5 where A > 0: squares 0.09, 0.16, 2.25, 4. The first two have a
    mean of 0.125. The other tokens pull the policy back and stay, however far away they are."""
    for (x, a), c in coefficients(objective="m2po", m2_threshold=0.2).items():
        assert c == pytest.approx(0.0 if x * a > 0 and abs(x) > 1 else math.exp(x), rel=1e-5)


@given(st.lists(st.tuples(st.floats(-3, 3), st.sampled_from([-1.0, 0.0, 0.5])), min_size=1, max_size=30), st.floats(1e-3, 4))
def test_second_moment_mask_is_the_papers_loop(tokens, threshold):
    """Algorithm 1 of arXiv 2510.01161, literally: the trust-region tokens, less the largest while their mean is too large."""
    region = sorted((x**2 for x, a in tokens if x * a > 0), reverse=True)
    while region and sum(region) / len(region) > threshold + 1e-12:
        region.pop(0)
    limit = max(region, default=-1.0)
    logratio, advantages = torch.tensor(tokens, dtype=torch.float64).T
    kept = popo.second_moment_mask(logratio, advantages, threshold)
    assert kept.tolist() == [x * a <= 0 or x**2 <= limit for x, a in tokens]


def test_levels_of_gipo():
    """A response's tokens share the sum of its log ratios, or their mean; masked tokens are not in it."""
    logratio = torch.tensor([[0.2, 0.4, 9.0], [-0.1, 0.3, 0.1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for level, expected in (("sequence", [0.6, 0.3]), ("geometric", [0.3, 0.1])):
        args = popo.Args(objective="gipo", sigma=0.5, is_level=level)
        c = popo.trust_coefficient(logratio, torch.ones(2, 1), mask, args)
        for row, x in zip(c, expected, strict=True):
            torch.testing.assert_close(row, torch.full((3,), math.exp(x - 0.5 * (x / 0.5) ** 2)))


def test_update_statistics_by_hand():
    """Two passes; the first has a fresh token with a log ratio of 0 and a stale one."""
    ages, logratios, coefficients = torch.tensor([[0.0, 3, 0, 3, 20], [0, 1, 0, -1, 2], [1, 3, 1, 1, 0]])
    too_low, too_high = torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 1, 0, 1]])
    passes = torch.stack([ages, logratios, coefficients, too_low, too_high]).split([2, 3], 1)
    found = popo.update_statistics(passes, popo.Args(objective="gipo"))
    assert not [name for name in found if name.startswith("clip/")] and found["is/log_ratio_max_fresh"] == 0
    clips = popo.update_statistics(passes, popo.Args())
    shares = [clips[f"clip/frac_{side}_{age}"] for side in ("low", "high") for age in ("fresh", "replay")]
    assert shares == [pytest.approx(share) for share in (0, 0.2, 0.2, 0.2)]
    assert found["gipo/effective_sample_size"] == pytest.approx(36 / (5 * 12))
    assert found["gipo/utilization"] == pytest.approx(0.8) and found["gipo/policy_lag"] == pytest.approx(26 / 5)
    assert {name: found[name] for name in found if name.startswith("age/")} == {
        "age/0/effective_sample_size": pytest.approx(1),
        "age/0/logratio_std": 0.0,
        "age/2-3/effective_sample_size": pytest.approx(16 / 20),
        "age/2-3/logratio_std": pytest.approx(1.0),
        "age/16+/effective_sample_size": 0.0,
        "age/16+/logratio_std": 0.0,
    }


def test_the_stored_pass_rate_counts_right_answers():
    """With --format-reward a form alone has a reward, too."""
    stored = {"version": 2, "reuse": 1}
    replayed = [stored | {"rewards": torch.tensor(rewards)} for rewards in ([0.1, 0.1, 0.1, 0.0], [1.0, 1.0, 0.1, 0.0])]
    found = popo.replay_statistics(popo.GroupBuffer(4, 1, 10, 4), replayed, 3, iteration=5)
    assert found["replay/pass_rate_stored"] == 0.25 and found["batch/refill_shortfall"] == 1


# -------------------- Buffer --------------------
def group(version, key=None, reuse=0):
    return {"version": version, "key": 1000 * version if key is None else key, "reuse": reuse}


def buffer_of(*groups, capacity=100, age_min=1, max_age=10, max_reuse=4):
    buffer = popo.GroupBuffer(capacity, age_min, max_age, max_reuse)
    buffer.push(list(groups))
    return buffer


def versions(groups):
    return [group["version"] for group in groups]


def test_newest_first():
    buffer = buffer_of(*map(group, (1, 2, 3, 4, 5)))
    assert versions(buffer.select(3, 6, ())) == [5, 4, 3]


def test_fifo_eviction():
    buffer = buffer_of(*map(group, (1, 2, 3, 4)), capacity=3)
    assert versions(buffer.groups) == [2, 3, 4]
    buffer.push([group(5), group(5, key=7)])
    assert versions(buffer.groups) == [4, 5, 5]


def test_age_limits():
    buffer = buffer_of(*map(group, range(1, 15)), max_age=5)
    assert versions(buffer.select(20, 15, ())) == [14, 13, 12, 11, 10]
    assert versions(buffer.groups) == [10, 11, 12, 13, 14]  # the others are evicted for good
    stale = buffer_of(*map(group, range(1, 15)), age_min=10, max_age=12)
    assert versions(stale.select(20, 15, ())) == [5, 4, 3]


def test_groups_of_short_problems_fit_among_longer_ones():
    """A batch that happens to hold three numbers only has answers as wide as all others of a task that also has four."""
    args, task, policy = make(env_id="countdown-34", num_prompts=1, eval_samples=1)
    torch.manual_seed(0)
    groups = [group for _ in range(12) for group in popo.generate_groups(policy, task, args, 1)]
    assert {int(group["mask"].any(0).sum()) for group in groups} == {5, 7}
    assert popo.stack_groups(groups, "cpu")["responses"].shape[-1] == 7
    assert all(popo.evaluate(policy, args, task, 512 + more)["episodes"] for more in range(1, 5))


def test_no_replayed_problem_twice_in_a_batch():
    buffer = buffer_of(group(1, key=7), group(2, key=8), group(3, key=7), group(4, key=9))
    assert [g["key"] for g in buffer.select(4, 5, {9})] == [7, 8]


def test_reuse_is_limited():
    buffer = buffer_of(group(1), group(2), max_reuse=2)
    chosen = [versions(buffer.select(1, 3, ())) for _ in range(5)]
    assert chosen == [[2], [2], [1], [1], []]
    assert len(buffer.groups) == 2


def test_short_and_empty_buffer():
    assert popo.GroupBuffer(5, 1, 10, 4).select(3, 1, ()) == []
    assert versions(buffer_of(group(1)).select(3, 2, ())) == [1]
    assert buffer_of(group(1)).select(0, 2, ()) == []


def test_fresh_groups_are_not_replayed_in_their_own_iteration():
    assert buffer_of(group(5)).select(1, 5, ()) == []


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), min_size=1), st.integers(1, 12), st.integers(1, 3))
def test_buffer_invariants(history, capacity, max_reuse):
    """Push and select at random: ages, reuse, order, capacity and problems always within their rules."""
    buffer, key = popo.GroupBuffer(capacity, 1, 4, max_reuse), 0
    for iteration, (pushed, count) in enumerate(history, start=1):
        chosen = buffer.select(count, iteration, ())
        assert len(chosen) <= count and versions(chosen) == sorted(versions(chosen), reverse=True)
        assert all(1 <= iteration - g["version"] <= 4 and g["reuse"] <= max_reuse for g in chosen)
        assert len({g["key"] for g in chosen}) == len(chosen)
        buffer.push([group(iteration, key=(key := key + 1) % 7) for _ in range(pushed)])
        assert len(buffer.groups) <= capacity and versions(buffer.groups) == sorted(versions(buffer.groups))


def test_k3_is_finite_for_any_ratio():
    """Also as the statistic of an update, whose ratio no clip bounds: exp(88) is more than float32 holds."""
    logratio = torch.tensor([-1e4, -1.0, 0.0, 1.0, 200.0, 1e4], requires_grad=True)
    divergence = popo.k3(logratio)
    divergence.sum().backward()
    assert divergence.isfinite().all() and logratio.grad.isfinite().all() and (divergence >= 0).all()
