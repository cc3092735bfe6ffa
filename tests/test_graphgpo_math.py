"""The credit functions of graphgpo_sokoban.py against hand-computed values, independent algorithms, and invariances."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.csgraph
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphgpo_sokoban import (
    SUCCESS,
    Args,
    compute_loss,
    discounted_returns,
    episode_advantage,
    graph_diagnostics,
    graph_distances,
    graph_rewards,
    standardise,
    step_rewards,
)

OMEGAS = pytest.mark.parametrize("omega", [0.1, 0.5, 0.8, 0.95])
INF = math.inf


def edges(*paths):
    """Rollouts as paths of states -> sources, targets, the rollout of every step."""
    rows = [(a, b, number) for number, path in enumerate(paths) for a, b in itertools.pairwise(path)]
    sources, targets, trajectories = (list(column) for column in zip(*rows, strict=True))
    return sources, targets, np.array(trajectories)


def graph_advantage(sources, targets, distances, omega, divide_by_std=True, penalties=0.0, **options):
    """A^G as the script makes it: the graph's rewards less the steps' own penalties, standardised by state."""
    rewards = graph_rewards(targets, distances, Args(omega=omega, **options))
    return standardise(rewards - penalties, sources, divide_by_std)


def step_return_advantage(sources, trajectories, rewards, gamma):
    """GiGPO's A^S."""
    return standardise(discounted_returns(trajectories, rewards, gamma), sources)


def credit(*paths, omega=0.8, **options):
    """{(rollout, step in it): A^G}."""
    sources, targets, trajectories = edges(*paths)
    found = graph_advantage(sources, targets, graph_distances(sources, targets), omega, **options)
    steps = [(number, step) for number, path in enumerate(paths) for step in range(len(path) - 1)]
    assert len(steps) == len(trajectories)
    return dict(zip(steps, found, strict=True))


@st.composite
def groups(draw, success=True):
    """A random group: a few rollouts among a few states, some of which end in success."""
    states = st.integers(0, 6)
    paths = draw(st.lists(st.lists(states, min_size=2, max_size=8), min_size=2, max_size=6))
    wins = draw(st.lists(st.booleans(), min_size=len(paths), max_size=len(paths)))
    if success:
        wins[0] = True
    return [path + [SUCCESS] * win for path, win in zip(paths, wins, strict=True)]


# -------------------- Standardisation --------------------
def test_standardise_is_the_unbiased_z_score_of_each_group():
    values, labels = np.array([1.0, 2.0, 6.0, 5.0, -1.0]), ["a", "b", "a", "a", "b"]
    expected = np.zeros(5)
    for label in "ab":
        rows = [i for i, other in enumerate(labels) if other == label]
        expected[rows] = (values[rows] - values[rows].mean()) / (values[rows].std(ddof=1) + 1e-6)
    np.testing.assert_allclose(standardise(values, labels), expected, rtol=1e-12)
    means = standardise(values, labels, divide_by_std=False)
    np.testing.assert_allclose(means, [-3, 1.5, 2, 1, -1.5], atol=1e-12)


def test_standardise_groups_of_one_and_of_equal_values_are_exactly_zero():
    found = standardise([0.1, 0.1, 0.1, 7.0, 1e300], ["a", "a", "a", "b", "c"])
    assert found.tolist() == [0.0] * 5


# -------------------- Distances --------------------
def test_chain():
    sources, targets, _ = edges(["s0", "s1", "s2", SUCCESS], ["s0", "s1", "s0"])
    assert graph_distances(sources, targets) == {SUCCESS: 0, "s2": 1, "s1": 2, "s0": 3}


@OMEGAS
def test_chain_credit(omega):
    """Two steps leave s1, one to s2 (reward 10 omega^2), one back to s0 (10 omega^4): +-1/sqrt(2), whatever omega is."""
    found = credit(["s0", "s1", "s2", SUCCESS], ["s0", "s1", "s0"], omega=omega)
    gap = 10 * (omega**2 - omega**4)
    expected = (gap / 2) / (gap / math.sqrt(2) + 1e-6)
    assert found[0, 1] == pytest.approx(expected, rel=1e-9) and found[0, 1] == pytest.approx(1 / math.sqrt(2), abs=1e-4)
    assert found[1, 1] == -found[0, 1]
    assert found[0, 0] == found[1, 0] == 0.0  # the same edge twice
    assert found[0, 2] == 0.0  # a state left once


@pytest.mark.parametrize("seed", range(200))
def test_distances_equal_scipy(seed):
    """Random graphs with parallel edges against Dijkstra's algorithm."""
    rng = np.random.default_rng(seed)
    nodes, number = int(rng.integers(2, 15)), int(rng.integers(1, 40))
    sources, targets = rng.integers(0, nodes, (2, number)).tolist()
    targets = [SUCCESS if rng.random() < 0.1 else target for target in targets]
    matrix = np.full((nodes + 1, nodes + 1), INF)
    for source, target in zip(sources, targets, strict=True):
        target = nodes if target == SUCCESS else target
        matrix[source, target] = 1
    graph = scipy.sparse.csgraph.csgraph_from_dense(matrix, null_value=INF)
    expected = scipy.sparse.csgraph.dijkstra(graph.T, indices=nodes)
    found = graph_distances(sources, targets)
    if SUCCESS not in targets:
        assert found == {}
    else:
        assert found == {SUCCESS if i == nodes else i: d for i, d in enumerate(expected) if d < INF}


def test_states_need_no_order():
    """Ties in the queue must not compare states: sets of facts are only partly ordered, tuples of mixed type not at all."""
    states = [frozenset("x"), frozenset("y"), (1, None), ("a", 2)]
    found = graph_distances(states, [SUCCESS] * 4)
    assert [found[state] for state in states] == [1] * 4


# -------------------- What the method claims --------------------
STITCH = (["S", "X", "Y", "Q"], ["S", "Y", SUCCESS], ["S", "X", "Z"])


def test_stitching():
    """X -> Y happened only in a failure, Y -> success in another rollout: the graph joins them, the other methods cannot."""
    sources, targets, trajectories = edges(*STITCH)
    assert graph_distances(sources, targets) == {SUCCESS: 0, "Y": 1, "X": 2, "S": 2}
    assert credit(*STITCH)[0, 1] == pytest.approx(1 / math.sqrt(2), abs=1e-4)
    assert credit(*STITCH)[2, 1] == -credit(*STITCH)[0, 1]
    step = sources.index("X")
    rewards = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert step_return_advantage(sources, trajectories, rewards, 0.95)[step] == 0.0
    assert episode_advantage([0.0, 1.0, 0.0], trajectories)[step] < 0


def test_unreachable_states_are_one_further_than_the_farthest():
    """At X: to Y, reward 10 omega^2; to Z, from where nobody succeeded: d = 2 + 1, reward 10 omega^4, or 0 for `inf`."""
    plain = credit(*STITCH, divide_by_std=False)
    assert plain[0, 1] - plain[2, 1] == pytest.approx(10 * (0.8**2 - 0.8**4))
    endless = credit(*STITCH, divide_by_std=False, unreachable_distance="inf")
    assert endless[0, 1] - endless[2, 1] == pytest.approx(10 * 0.8**2)


@OMEGAS
def test_loops_are_worse_than_progress(omega):
    """At s1: on to s2, into a wall (s1 -> s1), back to s0; each strictly worse than the one before."""
    found = credit(["s0", "s1", "s1", "s2", "s1", "s0", "s1", "s2", SUCCESS], omega=omega)
    on, wall, back = found[0, 2], found[0, 1], found[0, 4]
    assert on > wall > back and on == found[0, 6]
    assert on > 0 > back
    assert found[0, 3] < found[0, 7]  # at s2: back to s1, and on to success


@given(groups(), st.sampled_from([0.3, 0.5, 0.8, 0.95]), st.sampled_from(["dmax+1", "inf"]))
def test_credit_follows_the_distance(paths, omega, unreachable):
    """Among the steps that leave a state, the nearer the next state the higher the credit."""
    sources, targets, _ = edges(*paths)
    distances = graph_distances(sources, targets)
    found = graph_advantage(sources, targets, distances, omega, unreachable_distance=unreachable)
    after = [distances.get(state, INF) for state in targets]
    for i, j in itertools.combinations(range(len(sources)), 2):
        if sources[i] == sources[j]:
            assert np.sign(round(found[i] - found[j], 9)) == np.sign(after[j] - after[i] if after[i] != after[j] else 0)


# -------------------- Edge cases --------------------
@given(groups(success=False))
def test_a_group_without_success_gets_nothing(paths):
    paths = [[state for state in path if state != SUCCESS] for path in paths]
    sources, targets, trajectories = edges(*paths)
    distances = graph_distances(sources, targets)
    assert distances == {}
    assert not graph_advantage(sources, targets, distances, 0.8).any()
    assert not episode_advantage(np.zeros(len(paths)), trajectories).any()
    assert not step_return_advantage(sources, trajectories, np.zeros(len(sources)), 0.95).any()


def test_all_succeed_alike():
    paths = ["s", "a", SUCCESS], ["s", "b", SUCCESS]
    sources, _, trajectories = edges(*paths)
    assert not any(credit(*paths).values())
    assert not episode_advantage([1.0, 1.0], trajectories).any()
    assert not step_return_advantage(sources, trajectories, [0.0, 1.0, 0.0, 1.0], 0.95).any()


def test_all_succeed_some_sooner():
    """The episode credit is blind to it, the two others prefer the shorter way."""
    paths = ["s", "a", SUCCESS], ["s", "b", "c", SUCCESS]
    sources, _, trajectories = edges(*paths)
    assert not episode_advantage([1.0, 1.0], trajectories).any()
    by_graph = list(credit(*paths).values())
    by_return = step_return_advantage(sources, trajectories, [0.0, 1.0, 0.0, 0.0, 1.0], 0.95)
    for found in (by_graph, by_return):
        assert found[0] > 0.7 and found[0] == -found[2]
        assert found[1] == found[3] == found[4] == 0.0


def test_penalties_tell_steps_apart_without_a_success():
    sources, targets = ["s", "s", "s", "t"], ["s", "t", "t", "s"]
    found = graph_advantage(sources, targets, {}, 0.8, penalties=np.array([0.1, 0, 0, 0]))
    assert found[0] == pytest.approx(-2 / math.sqrt(3), abs=1e-4) and found[1] == found[2] > 0 == found[3]


def test_small_omega_vanishes_far_away():
    """The 1e-6 beside the standard deviation is a hidden horizon: with omega 0.1, seven steps away the credit is gone."""
    line = [f"s{i}" for i in range(9, 0, -1)]
    found = credit([*line, SUCCESS], ["s9", "s9"], ["s2", "s2"], omega=0.1)
    assert 0 < found[0, 0] < 0.01 and found[0, 7] > 0.7
    assert credit([*line, SUCCESS], ["s9", "s9"], omega=0.8)[0, 0] > 0.7


# -------------------- Invariances --------------------
@given(groups(), st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter(paths, random):
    sources, targets, _ = edges(*paths)
    found = graph_advantage(sources, targets, graph_distances(sources, targets), 0.8)
    order = random.sample(range(len(sources)), len(sources))
    names = {state: (f"state {state}",) for state in range(7)} | {SUCCESS: SUCCESS}
    s, t = ([names[column[i]] for i in order] for column in (sources, targets))
    np.testing.assert_allclose(graph_advantage(s, t, graph_distances(s, t), 0.8), found[order], atol=1e-9)


@given(groups())
def test_scale_and_exponent_cancel(paths):
    """The factor 10 cancels, and so does the exponent's constant: the authors' code has d(s'), the paper d(s') + 1."""
    sources, targets, _ = edges(*paths)
    rewards = graph_rewards(targets, graph_distances(sources, targets), Args(omega=0.8))
    for factor in (0.1, 100.0, 1.0 / 0.8):
        np.testing.assert_allclose(standardise(factor * rewards, sources), standardise(rewards, sources), atol=1e-4)


# -------------------- Invalid answers, and rewards --------------------
def test_an_invalid_answer_is_punished_itself():
    """The authors' rule by hand: two failed rollouts of 15 steps, three and five of them invalid, over steps as in their code.

    30 scores, eight of -0.1: mean -0.0267, standard deviation 0.0450.
    """
    invalid = np.zeros(30)
    invalid[[0, 4, 9, 15, 16, 17, 20, 29]] = 1
    found = episode_advantage([0.0, 0.0], np.repeat([0, 1], 15), "steps", True, 0.1 * invalid)
    np.testing.assert_allclose(found[invalid == 0], 0.593, atol=1e-3)
    np.testing.assert_allclose(found[invalid == 1], -1.630, atol=1e-3)


def test_an_invalid_answer_where_every_rollout_counts_once():
    """Rollouts of two and three steps, the first of each invalid: the mean is that of -0.05 and -0.1 / 3."""
    returns, trajectories, penalties = [0.0, 0.0], np.array([0, 0, 1, 1, 1]), np.array([0.1, 0, 0.1, 0, 0])
    mean = -(0.05 + 0.1 / 3) / 2
    scores = -penalties - mean
    variance = (scores[:2] ** 2).mean() + (scores[2:] ** 2).mean()  # divided by the number of rollouts less one
    found = episode_advantage(returns, trajectories, "trajectories", True, penalties)
    np.testing.assert_allclose(found, scores / (math.sqrt(variance) + 1e-6), rtol=1e-9)
    assert (found[penalties > 0] < 0).all() and (found[penalties == 0] > 0).all()


@given(groups(), st.sampled_from(["trajectories", "steps"]))
def test_a_penalty_of_nothing_changes_nothing(paths, norm):
    sources, _, trajectories = edges(*paths)
    won = [float(path[-1] == SUCCESS) for path in paths]
    plain = episode_advantage(won, trajectories, norm)
    assert (episode_advantage(won, trajectories, norm, True, np.zeros(len(sources))) == plain).all()
    almost = episode_advantage(won, trajectories, norm, True, np.full(len(sources), 1e-300))
    np.testing.assert_allclose(almost, plain, atol=1e-9)


def test_a_penalty_is_not_discounted():
    """GiGPO: an invalid answer at the end costs the steps before it nothing."""
    returns = discounted_returns([0, 0, 0], [0.0, 0.0, 10.0], 0.5)
    assert returns.tolist() == [2.5, 5.0, 10.0]
    found = standardise(returns - np.array([0.0, 0.1, 0.0]), ["s", "s", "t"], divide_by_std=False)
    np.testing.assert_allclose(found, [-1.2, 1.2, 0.0])


def test_rewards():
    success, gains = np.array([True, False, False]), np.array([1.0, -1.0, 0.0])
    assert step_rewards(success, gains, Args(success_reward=10.0, step_penalty=0.1)).tolist() == [9.9, -0.1, -0.1]
    assert step_rewards(success, gains, Args(reward="gym-sokoban")).tolist() == [10.9, -1.1, -0.1]


# -------------------- The other two credits --------------------
def test_episode_advantage_over_rollouts_and_over_steps():
    returns, trajectories = [1.0, 0.0, 0.0], np.array([0, 1, 1, 1, 2, 2])
    over_rollouts = (np.array(returns) - 1 / 3) / (np.std(returns, ddof=1) + 1e-6)
    np.testing.assert_allclose(episode_advantage(returns, trajectories), over_rollouts[trajectories], rtol=1e-9)
    rows = np.array(returns)[trajectories]
    over_steps = (rows - rows.mean()) / (rows.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(episode_advantage(returns, trajectories, "steps"), over_steps, rtol=1e-9)
    assert not np.allclose(over_steps, over_rollouts[trajectories])


@given(groups(), st.floats(0.5, 1.0))
def test_step_return_advantage_is_gigpo(paths, gamma):
    """gamma^(T - t) R in every state, standardised; rows in the order of time, rollouts interleaved."""
    steps = [(t, number) for number, path in enumerate(paths) for t in range(len(path) - 1)]
    order = sorted(steps)  # all first steps, all second steps, ...: as the rollout collects them
    sources, trajectories = [paths[number][t] for t, number in order], [number for _, number in order]
    last = {number: len(path) - 2 for number, path in enumerate(paths)}
    won = {number: path[-1] == SUCCESS for number, path in enumerate(paths)}
    rewards = [float(won[number] and t == last[number]) for t, number in order]
    returns = [won[number] * gamma ** (last[number] - t) for t, number in order]
    found = step_return_advantage(sources, trajectories, rewards, gamma)
    np.testing.assert_allclose(found, standardise(returns, sources), atol=1e-6)


def test_diagnostics():
    sources, targets, trajectories = edges(*STITCH, ["S", "S", "S"])
    succeeded = np.array([False, True, False, False])[trajectories]
    found = graph_diagnostics(sources, targets, graph_distances(sources, targets), succeeded)
    assert found == {
        "graph/nodes": 5,  # S X Y Q Z
        "graph/edges": 7,  # S>X X>Y Y>Q S>Y Y>success X>Z S>S
        "graph/frac_unreachable": 2 / 5,
        "graph/frac_singleton_steps": 0.0,
        "graph/mean_group_size": 9 / 3,
        "graph/groups_without_success": 0.0,
        "graph/groups_all_success": 0.0,
        "graph/start_distance": 2,
        "credit/frac_progress_steps_in_failures": 1 / 7,  # X > Y
        "credit/frac_nonprogress_in_successes": 0.0,
    }
    lost = graph_diagnostics(["a"], ["b"], {}, np.array([False]))
    assert lost["graph/groups_without_success"] == lost["graph/frac_unreachable"] == 1.0 and "graph/start_distance" not in lost


# -------------------- Learning with a table --------------------
def train_table(next_state, num_states, method, iterations, seed, cap, group_size=8, groups=2):
    """Policy gradient on a table of logits with this file's credits; success rate of every iteration, and the logits."""
    generator, logits = torch.Generator().manual_seed(seed), torch.zeros(num_states, 2, requires_grad=True)
    optimizer, curve = torch.optim.Adam([logits], lr=0.1), []
    for _ in range(iterations):
        loss, wins = 0.0, []
        for _ in range(groups):
            paths, actions, won = [], [], []
            for _ in range(group_size):
                path, state = [0], 0
                while len(path) <= cap and state is not None and state != SUCCESS:
                    probabilities = torch.softmax(logits.detach()[state], 0)
                    action = int(torch.multinomial(probabilities, 1, generator=generator))
                    actions.append(action)
                    state = next_state(state, action)
                    path.append(state)
                paths.append(path)
                won.append(float(state == SUCCESS))
            sources, targets, trajectories = edges(*paths)
            rewards = [float(target == SUCCESS) for target in targets]
            found = episode_advantage(won, trajectories)
            if method == "graphgpo":
                found = found + graph_advantage(sources, targets, graph_distances(sources, targets), 0.8)
            elif method == "gigpo":
                found = found + step_return_advantage(sources, trajectories, rewards, 0.95)
            logprobs = torch.log_softmax(logits, 1)[sources, actions]
            loss = loss - (logprobs * torch.as_tensor(found)).mean()
            wins += won
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(np.mean(wins))
    return np.array(curve), logits.detach()


@pytest.mark.parametrize("method", ["grpo", "gigpo", "graphgpo"])
def test_two_arms(method):
    """One state, one arm to success, one into a trap."""
    _, logits = train_table(lambda state, action: SUCCESS if action == 0 else None, 1, method, 50, 0, cap=1)
    assert torch.softmax(logits[0], 0)[0] > 0.95


def test_corridor():
    """Twelve cells, left and right, 30 steps: the graph needs fewer iterations to half of all rollouts than the returns do."""

    def walk(cell, action):
        return SUCCESS if cell + action == 12 else max(cell + 2 * action - 1, 0) if action == 0 else cell + 1

    needed = {}
    for method in ("grpo", "graphgpo"):
        curves = [train_table(walk, 12, method, 40, seed, cap=30)[0] for seed in range(3)]
        needed[method] = np.mean([np.argmax(curve > 0.5) if (curve > 0.5).any() else len(curve) for curve in curves])
    assert needed["graphgpo"] < needed["grpo"]
    assert needed["graphgpo"] < 30


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_the_loss_is_finite_for_any_ratio(advantage):
    """Of tokens that one policy finds likely and the other impossible: exp(88) is more than float32 holds."""
    old = torch.tensor([[-1e4, -200.0, -1.0, -200.0]])
    new = torch.tensor([[-1.0, -200.0, -1e4, -1.0]], requires_grad=True)
    args = Args(kl_coef=0.1, ent_coef=0.01)
    loss, logged = compute_loss(new, torch.zeros(1, 4), old, old, torch.tensor([[advantage]]), args)
    loss.sum().backward()
    assert loss.isfinite().all() and new.grad.isfinite().all()
    assert all(value.isfinite().all() for value in logged.values()) and "losses/reference_kl" in logged
