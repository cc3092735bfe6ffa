"""popo_countdown.py, graphgpo_sokoban.py: train() and evaluate() hand the functions tested elsewhere what they should. Of four
training scripts: what is evaluated is saved."""

import contextlib
import dataclasses
import math
import signal

import numpy as np
import pytest
import torch
from conftest import differences, read_pt, read_scalars
from test_graphgpo_cli import SMALL_ROOM
from test_graphgpo_model import FLAGS
from test_graphgpo_model import folder as folder
from test_popo_cli import SHORT, TWO, run_inline
from test_popo_math import make

import gipo_continuous as gipo
import gipo_vla_libero as vla
import graphgpo_sokoban as graphgpo
import popo_countdown as popo
import ppo_baseline as ppo


def recorded(monkeypatch, place, name, keep):
    """Replace a function by one that also keeps `keep(arguments, result)`: -> the list of what was kept."""
    original, kept = getattr(place, name), []

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        kept.append(keep(args, result))
        return result

    monkeypatch.setattr(place, name, wrapper)
    return kept


# -------------------- POPO --------------------
def test_training_and_evaluation_never_share_a_problem(monkeypatch):
    """Evaluations ask the same problems whatever the seed, at a temperature of their own."""
    args, task, policy = make(env_id="countdown-2", num_prompts=40, eval_temperature=0.6)
    calls = recorded(monkeypatch, popo, "answer", lambda args, _: (args[3]["keys"], args[5]))
    popo.generate_groups(policy, task, args, 1)
    for seed in (1, 2):
        popo.evaluate(policy, dataclasses.replace(args, seed=seed), task, 64)
    keys, temperatures = zip(*calls, strict=True)
    assert not popo.held_out(keys[0]).any() and popo.held_out(keys[1]).all() and torch.equal(keys[1], keys[2])
    assert temperatures == (1.0, 0.6, 0.6)


def test_the_objective_is_given_the_three_policies(tmp_path, monkeypatch):
    """The present one, the one before this update, and the one that wrote the answers two iterations ago."""
    calls = recorded(monkeypatch, popo, "policy_objective", lambda args, _: [x.detach().clone() for x in args[:3]])
    run_inline(tmp_path, f"{TWO} --method grpo --lag 2 --learning-rate 1e-2 --updates-per-iteration 3")
    assert len(calls) == 8 * 3 and sum(len(new) for new, *_ in calls) == 8 * 8  # every group once
    for new, prox, _ in calls[::3]:
        torch.testing.assert_close(new, prox, atol=1e-4, rtol=0)
    assert max((new - prox).abs().max() for new, prox, _ in calls[1::3]) > 0.01
    assert max((prox - behaviour).abs().max() for _, prox, behaviour in calls) > 0.01


def test_the_bonus_raises_the_entropy(tmp_path, monkeypatch):
    monkeypatch.setattr(popo.Countdown, "rewards", lambda self, p, r, mask: (torch.zeros(mask.shape[:2]), mask[..., 0]))
    _, run = run_inline(tmp_path, f"{TWO} --method grpo --ent-coef 1 --learning-rate 1e-3")
    entropy = [value for _, value in read_scalars(run)["losses/entropy"]]
    assert entropy[-1] > entropy[0] + 0.05


def test_every_token_of_a_minibatch_weighs_the_same(tmp_path, monkeypatch):
    """Long answers and short ones: the mean is over tokens."""
    original, seen = popo.policy_objective, []

    def recording(*args):
        objective, *rest = original(*args)
        objective.register_hook(lambda grad: seen.append((grad, args[4])))
        return objective, *rest

    monkeypatch.setattr(popo, "policy_objective", recording)
    run_inline(tmp_path, f"--env-id countdown-34 {SHORT} --method grpo --updates-per-iteration 2 --total-timesteps 32")
    assert len(seen) == 2 and len({int(n) for _, mask in seen for n in mask.sum(-1).flatten()}) == 2
    for grad, mask in seen:
        torch.testing.assert_close(grad, -mask.float() / mask.sum())


def test_the_reference_penalty(tmp_path, monkeypatch):
    """log pi_start - log pi at training's temperature: zero in the first update, where both policies are one."""
    flags = f"{TWO} --method grpo --kl-coef 0.1 --temperature 0.5 --updates-per-iteration 1 --total-timesteps 32"
    _, run = run_inline(tmp_path / "equal", flags)
    ((_, kl),) = read_scalars(run)["losses/reference_kl"]
    assert kl == pytest.approx(0.0, abs=1e-8)
    zeros = torch.zeros(8, 4, 1)
    monkeypatch.setattr(popo, "fixed_logprobs", lambda policy, b, *_: zeros.expand_as(b["logprobs"]))
    penalties = recorded(monkeypatch, popo, "k3", lambda args, _: args[0].detach().clone())
    run_inline(tmp_path / "certain", flags)  # a start policy that is certain of every answer: log pi_start = 0
    to_start, approx_kl = penalties
    assert (to_start >= 0).all() and to_start.max() > 0.1 and torch.equal(approx_kl, -to_start)


def test_dapo_stops_as_soon_as_the_batch_is_full(tmp_path, monkeypatch):
    """With as many effective groups as the batch has: one batch per iteration, however many are allowed."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(popo.Countdown, "rewards", lambda self, p, r, mask: (rewards.expand(len(mask), 4), mask[..., 0]))
    result, _ = run_inline(tmp_path, f"{TWO} --method dapo --max-gen-batches 3 --total-timesteps 96")
    assert (result["iterations"], result["total_timesteps"]) == (3, 96)


def moment(run):
    """Norm of Adam's first moment, an average of clipped gradients."""
    state = read_pt(run / "checkpoint.pt")["optimizer"]["state"].values()
    return math.sqrt(sum((value["exp_avg"] ** 2).sum().item() for value in state))


def test_gradients_are_clipped(tmp_path):
    _, run = run_inline(tmp_path / "popo", f"{TWO} --max-grad-norm 1e-4 --total-timesteps 96")
    assert 0 < moment(run) <= 1.001e-4
    flags = {"num_groups": 2, "group_size": 4, "total_episodes": 16, "eval_episodes": 0, "max_grad_norm": 1e-4}
    graphgpo.main(graphgpo.Args(run_dir=str(tmp_path), **flags))
    assert 0 < moment(tmp_path / "Sokoban__graphgpo__1") <= 1.001e-4


# -------------------- All --------------------
CORE = {"env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 32, "total_timesteps": 192, "overlap": False, "hidden_size": 8}


@pytest.mark.parametrize(
    ("script", "flags", "every"),
    [
        (gipo, CORE | {"buffer_size": 128, "minibatch_size": 32}, 64),
        (ppo, CORE | {"minibatch_size": 32}, 64),
        (popo, vars(popo.parse_args(TWO.split())) | {"total_timesteps": 96}, 32),
        (graphgpo, {"num_groups": 2, "group_size": 4, "total_episodes": 24, "max_solution": 4}, 8),
    ],
    ids=["gipo", "ppo", "popo", "graphgpo"],
)
def test_what_is_evaluated_is_in_the_checkpoint(script, flags, every, tmp_path, monkeypatch):
    """A run that dies while it evaluates goes on from there, however rare its other checkpoints are."""
    checkpoints = []

    def keep(args, _):
        (path,) = [*tmp_path.glob("*/checkpoint.pt")] or [None]
        checkpoints.append(path and read_pt(path)["iteration"])

    recorded(monkeypatch, script, "evaluate", keep)
    more = {"eval_every": every, "eval_episodes": 1, "checkpoint_every": 10**6, "run_dir": str(tmp_path)}
    script.main(script.Args(**flags | more))
    assert [at for at in checkpoints if at] == [1, 2, 3]


@pytest.mark.parametrize("catch", [popo.catch_stop_signals, graphgpo.catch_stop_signals, vla.catch_signals])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_copies_of_a_signal_are_ignored(catch, signum, capfd):
    """torchrun passes on what a scheduler sends to every process; only Ctrl-C stops at once then."""
    before = [signal.getsignal(s) for s in vla.STOP_SIGNALS]
    with contextlib.ExitStack() as at_exit:
        found = catch(at_exit)
        signal.raise_signal(signum)
        assert signal.SIG_DFL not in map(signal.getsignal, (signal.SIGTERM, signal.SIGHUP))  # or the next lines end pytest
        for again in (signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(again)
        assert found == [signum] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert capfd.readouterr().err.count("stopping soon; Ctrl-C now stops at once") == 1
    assert [signal.getsignal(s) for s in vla.STOP_SIGNALS] == before


# -------------------- GraphGPO --------------------
def test_a_run_trains_on_new_levels_that_are_not_held_out(tmp_path, monkeypatch):
    calls = recorded(monkeypatch, graphgpo.Sokoban, "reset", lambda args, _: (args[1], len(args[0].held_out)))
    flags = {"seed": 5, "num_groups": 2, "group_size": 3, "total_episodes": 12, "eval_episodes": 4, "eval_every": 0}
    graphgpo.main(graphgpo.Args(run_dir=str(tmp_path), **flags))
    *tried, (first, held_out), (second, _), (evaluated, _) = calls
    assert tried == [([(0, 0)] * 6, 0), ([(0, 0)] * 4, 0)]  # whether a level can be made, before anything is written
    assert first == [(1, 5, 1, 0)] * 3 + [(1, 5, 1, 1)] * 3 and second == [(1, 5, 2, 0)] * 3 + [(1, 5, 2, 1)] * 3
    assert evaluated == [(0, i) for i in range(4)] and held_out == 4


def test_loss_by_hand():
    """PPO's clip on both sides, the entropy bonus, and the k3 penalty of the reference."""
    ratio, advantages = torch.tensor([[1.5], [0.5], [1.5], [0.5]]), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    old = torch.full((4, 1), -1.0)
    new, args = old + ratio.log(), graphgpo.Args(clip_coef=0.2, ent_coef=0.1, kl_coef=0.5)
    loss, logged = graphgpo.compute_loss(new, torch.full((4, 1), 2.0), old, new + 0.3, advantages, args)
    pg_loss, kl = torch.tensor([[-1.2], [-0.5], [1.5], [0.8]]), math.exp(0.3) - 1 - 0.3
    torch.testing.assert_close(logged["losses/policy_loss"], pg_loss)
    torch.testing.assert_close(logged["losses/reference_kl"], torch.full((4, 1), kl))
    torch.testing.assert_close(loss, pg_loss - 0.1 * 2.0 + 0.5 * kl)


def test_returns_add_up(tmp_path):
    """What is logged of rollouts, and what result.json has of them and of the evaluation."""
    flags = {"num_groups": 4, "group_size": 4, "total_episodes": 64, "eval_episodes": 16, "eval_temperature": 1.0}
    flags |= SMALL_ROOM | {"eval_every": 0, "success_reward": 2.0, "step_penalty": 0.01, "run_dir": str(tmp_path)}
    result = graphgpo.main(graphgpo.Args(**flags))
    scalars = read_scalars(tmp_path / "Sokoban__graphgpo__1")
    names = ("return", "success", "length")
    returns, success, length = (np.array([v for _, v in scalars[f"charts/episodic_{name}"]]) for name in names)
    np.testing.assert_allclose(returns, 2.0 * success - 0.01 * length, atol=1e-6)
    assert result["train_success_rate"] == pytest.approx(success.mean()) and success.mean() > 0
    assert result["eval_spl"] <= result["eval_success_rate"] < 1
    assert result["eval_return_mean"] <= 2 * result["eval_success_rate"] - 0.02  # two steps at least
    assert min(value for _, value in scalars["charts/excess_length"]) >= 1


def test_every_token_of_a_minibatch_weighs_the_same_there_too(folder, tmp_path, monkeypatch):
    original, seen = graphgpo.compute_loss, []

    def recording(*args):
        loss, logged = original(*args)
        loss.register_hook(seen.append)
        return loss, logged

    monkeypatch.setattr(graphgpo, "compute_loss", recording)
    own = {"model": str(folder), "total_episodes": 6, "eval_episodes": 0, "micro_batch": 1000, "minibatch_size": 1000}
    graphgpo.main(graphgpo.Args(run_dir=str(tmp_path), **FLAGS | own))
    (grad,) = seen
    assert len({*(grad > 0).sum(1).tolist()}) > 1
    torch.testing.assert_close(grad[grad > 0], torch.full_like(grad[grad > 0], 1 / (grad > 0).sum()))


def test_every_step_is_used_once_per_epoch(tmp_path, monkeypatch):
    sizes = recorded(monkeypatch, graphgpo, "compute_loss", lambda args, _: len(args[0]))
    flags = {"num_groups": 2, "group_size": 4, "total_episodes": 16, "eval_episodes": 0, "update_epochs": 2}
    result = graphgpo.main(graphgpo.Args(run_dir=str(tmp_path), minibatch_size=50, **flags))
    assert sum(sizes) == 2 * result["total_timesteps"] and len(sizes) > 4


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        ({}, {"episode_norm": "steps"}),
        ({"beta_episode": 0.0}, {"divide_by_std": False}),
        ({"advantage": "gigpo"}, {"step_gamma": 0.5}),
    ],
)
def test_credit_flags_act(tmp_path, base, changed):
    flags = {"num_groups": 4, "group_size": 8, "eval_episodes": 0, "total_episodes": 320, "max_solution": 4, "ent_coef": 0.0}
    for name, own in (("a", base), ("b", base | changed)):
        graphgpo.main(graphgpo.Args(run_dir=str(tmp_path), exp_name=name, **flags | own))
    assert differences(*(read_pt(tmp_path / f"Sokoban__{name}__1" / "model.pt")["model"] for name in "ab"))


def test_evaluation_is_at_its_own_temperature(monkeypatch):
    temperatures = recorded(monkeypatch, graphgpo.Agent, "act", lambda args, _: args[3])
    args = graphgpo.with_defaults(graphgpo.Args(eval_episodes=2, eval_temperature=0.3))
    envs = graphgpo.make_env(args, 2)
    graphgpo.evaluate(graphgpo.make_agent(args, envs), args, envs)
    assert {*temperatures} == {0.3}


@pytest.mark.parametrize(
    ("script", "names", "expected"),
    [
        (popo, "learning_rate ent_coef", [[1e-4, 0.01], [1e-5, 0.001], [1e-6, 0.001]]),
        (
            graphgpo,
            "learning_rate ent_coef kl_coef success_reward",
            [[1e-3, 0.01, 0.0, 1.0], [1e-5, 0.0, 0.01, 10.0], [1e-6, 0.0, 0.01, 10.0]],
        ),
    ],
    ids=["popo", "graphgpo"],
)
def test_defaults_of_a_model(script, names, expected):
    """Of the small network, of SmolLM2, and of any other model."""
    found = [script.with_defaults(script.Args(model=model)) for model in (None, "smollm2", "Qwen/Qwen2.5")]
    assert [[getattr(args, name) for name in names.split()] for args in found] == expected
