"""gipo_vla_libero.py: that train(), update() and the simulators put together what is tested elsewhere; without LIBERO."""

import contextlib
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_vla_learning import CHUNK, T, assert_close, gradients_after, random_minibatch, tiny_agent, tiny_args

import gipo_vla_libero as vla


class Toys:
    """In VectorEnv's place: episodes of three chunks, with success in the third step of the last one."""

    def __init__(self, args, num_envs):
        self.calls, self.time = [None] * num_envs, [0] * num_envs

    def send(self, i, function, *arguments):
        self.calls[i] = function, arguments
        self.time[i] = 0 if function is vla.LiberoEnv.reset else self.time[i] + 1

    def answer(self, i):
        t = self.time[i]
        return {"images": np.full((1, 28, 28, 3), 10 * t, np.uint8), "proprio": np.full(8, t / 10, np.float32)}

    def receive(self, i):
        done = self.time[i] == 3
        return ((self.answer(i), np.eye(8, dtype=np.float32)[2] * done, 3 if done else 8, done, False),)

    def close(self):
        pass


def train_on_toys(monkeypatch, tmp_path, **flags):
    """train() of a random policy: -> result, replay at the checkpoints, names of the saved policies."""
    settings = {"tasks": (0,), "num_envs": 2, "minibatch_size": 64, "buffer_size": 128}
    settings |= {"updates_per_iteration": 1, "critic_warmup": 1, "total_timesteps": 128, "eval_every": 0, "eval_episodes": 1}
    args, replays, saved = tiny_args(**settings | {"run_dir": str(tmp_path)} | flags), [], []
    agent, interface = tiny_agent(args)
    start = (0, 1, agent, None, {"libero_spatial": interface.stats}, interface)
    patches = {"VectorEnv": Toys, "versions": dict, "self_check": lambda *_: None, "start": lambda *_: start}
    patches |= {"save_run": lambda folder, agent, optimizer, rb, *_: replays.append(rb)}
    patches |= {"save_policy": lambda folder, *_: saved.append(folder.name)}
    for name, value in patches.items():
        monkeypatch.setattr(vla, name, value)
    with contextlib.ExitStack() as at_exit:
        return vla.train(args, at_exit), replays, saved


@pytest.mark.parametrize("ratio", ["token", "action", "chunk"])
def test_the_loss_by_hand(ratio):
    """Every coefficient, a temperature, chunks cut short; the gradient by autograd."""
    flags = {"temperature": 1.6, "reward_scale": 3.0, "ent_coef": 100.0, "kl_coef": 0.7, "vf_coef": 0.25, "sigma": 2.0}
    args = tiny_args(ratio=ratio, recompute_advantages=False, max_grad_norm=1e9, **flags)
    agent, interface = tiny_agent(args)
    mb = random_minibatch(agent, interface, args)
    valid, v = mb["valid"], mb["values"]
    adv = vla.compute_gae(3.0 * mb["rewards"], v[:-1], v[1:], mb["terminations"], mb["dones"], args.gamma, args.gae_lambda)
    returns, adv = (adv + v[:-1])[valid], adv[valid]
    adv = (adv - adv.mean()) / adv.std(correction=0)
    inputs = interface.inputs(*(mb[key][:T][valid] for key in ("images", "proprio", "tasks")))
    _, logprob, entropy, value, _ = agent.get_action_and_logprob(**inputs, tokens=mb["tokens"][valid], temperature=1.6)
    steps = torch.arange(CHUNK) < mb["executed"][valid][:, None]
    logratio = (logprob - mb["logprobs"][valid]) * steps[..., None]
    units = {"token": (logratio, steps[..., None].expand_as(logratio)), "action": (logratio.sum(-1), steps)}
    logratio, mask = (units | {"chunk": (logratio.sum((1, 2)), steps.any(1))})[ratio]
    surrogate = vla.policy_objective(logratio, adv.view(-1, *[1] * (logratio.dim() - 1)), args)[0]
    loss = -surrogate[mask].mean() - 100 * entropy[steps].mean() - 0.7 * logratio[mask].mean()  # 100: it is nearly uniform
    loss = loss + 0.25 * 0.5 * ((value - returns) ** 2).mean()
    named = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gradients, strict=True)}
    assert_close(expected, gradients_after(agent, mb, interface, args)[0], 1e-4)


def test_step_sizes_and_the_best_policy_of_a_run(monkeypatch, tmp_path):
    """All groups of the policy follow the schedule and wait for the critic; the best evaluation so far is kept."""
    rates, steps, original = iter([0.5, 0.9, 0.2, 0.7, 0.6]), [], vla.optimizer_parameters

    def evaluate(*_):
        rate = next(rates)
        return {"success_rate": rate, "return_mean": rate, "episodes": 1, "successes": []}

    def update(agent, optimizer, mb, interface, args, micro_batch, train_policy):
        steps.append([float(train_policy), *(part["lr"] for part in optimizer.param_groups)])
        return {}

    def three_groups(agent):  # as in sharded training
        policy, critic = (part["params"] for part in original(agent))
        return [{"params": part} for part in (policy[:1], critic, policy[1:])]

    for name, function in (("evaluate", evaluate), ("update", update), ("optimizer_parameters", three_groups)):
        monkeypatch.setattr(vla, name, function)
    result, _, saved = train_on_toys(monkeypatch, tmp_path, total_timesteps=256, eval_every=64, lr_schedule="linear")
    for (on, *found), k in zip(steps, range(4), strict=True):
        share = 1 - k / 4
        assert on == (k > 0) and found == pytest.approx([3e-5 * share * on, 3e-3 * share, 3e-5 * share * on])
    assert saved == ["model", "best_model", "model", "best_model", "model", "model", "model"]
    assert result["eval_success_rate"] == 0.6 and [e["step"] for e in result["evaluations"]] == [0, 64, 128, 192, 256]


def test_rollout_and_update_use_one_temperature(monkeypatch, tmp_path):
    original, calls = vla.Agent.get_action_and_logprob, set()

    def record(self, *args, **named):
        calls.add((named.get("tokens") is None, named.get("deterministic", False), named.get("temperature", 1.0)))
        return original(self, *args, **named)

    monkeypatch.setattr(vla.Agent, "get_action_and_logprob", record)
    train_on_toys(monkeypatch, tmp_path, temperature=1.6, eval_episodes=0)
    assert calls == {(True, False, 1.6), (False, False, 1.6)}


def test_a_rollout_as_the_buffer_keeps_it(monkeypatch, tmp_path):
    """Three chunks and the last observation, which is no decision; the reward comes in the third step of the last chunk."""
    result, (rb, *_), _ = train_on_toys(monkeypatch, tmp_path)
    assert rb["versions"][0].tolist() == [1, 1, 2, 2]
    for j in range(4):
        assert (10 * rb["proprio"][:, j, 0]).round().tolist() == [0, 1, 2, 3, 0]
        assert rb["images"][:, j, 0, 0, 0, 0].tolist() == [0, 10, 20, 30, 0]
        assert rb["valid"][:, j].tolist() == [True, True, True, False]
        assert rb["executed"][:, j].tolist() == [8, 8, 3, 0]
        for key in ("rewards", "dones", "terminations"):
            assert rb[key][:, j].tolist() == [0, 0, 1, 0], key
    assert result["train_success_rate"] == 1.0


def test_success_is_the_simulators_whatever_the_reward(monkeypatch, tmp_path):
    """A fork may pay for steps: its returns are then no successes, and failed episodes none either."""

    class Costly(Toys):
        def receive(self, i):
            obs, rewards, *rest = super().receive(i)[0]
            return ((obs, rewards - 1.0, *rest),)

    monkeypatch.setitem(train_on_toys.__globals__, "Toys", Costly)
    result, *_ = train_on_toys(monkeypatch, tmp_path)
    assert result["train_success_rate"] == result["eval_success_rate"] == 1.0
    assert result["train_return_mean"] == result["eval_return_mean"] == -23.0  # 3 chunks of 8 rewards of -1, and 1 at success


def test_rollout_and_update_that_disagree_are_reported(monkeypatch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_on_toys(monkeypatch, tmp_path / "plain")
    original = vla.normalize_images
    monkeypatch.setattr(vla, "normalize_images", lambda *args: original(*args) + torch.rand(()))  # as a random crop would
    with pytest.warns(UserWarning, match=r"gipo/log_ratio_max is .*: with equal weights rollout and update give other"):
        train_on_toys(monkeypatch, tmp_path / "noisy")


def test_a_simulator_begins_an_episode(monkeypatch):
    sent = []
    monkeypatch.setattr(vla, "VectorEnv", lambda args, number: SimpleNamespace(send=lambda *call: sent.append(call)))
    simulators = vla.Simulators(tiny_args(), tiny_agent(tiny_args())[0].config, 2)
    simulators.ended[:], simulators.lost[:] = True, True
    simulators.start(1, 7, 3)
    assert sent == [(1, vla.LiberoEnv.reset, 7, 3)] and simulators.tasks.tolist() == [0, 7]
    assert simulators.ended.tolist() == simulators.lost.tolist() == [True, False]


def test_an_interface_converts_units():
    """Tokens to actions, and the robot's state to inputs, by the policy's statistics."""
    _, interface = tiny_agent(tiny_args())
    interface.stats["action"] |= {"q01": [-0.5] * 7, "q99": [0.5] * 7}
    interface.stats["proprio"] |= {"q01": [0.0] * 8, "q99": [4.0] * 8}
    actions = interface.actions(torch.full((1, 8, 7), 255))
    np.testing.assert_allclose(actions[0], [[-0.49804] * 6 + [-0.99608]] * 8, atol=1e-4)
    inputs = interface.inputs(torch.zeros(1, 1, 28, 28, 3, dtype=torch.uint8), torch.ones(1, 8), torch.zeros(1).long())
    assert torch.allclose(inputs["proprio"], torch.tensor(-0.5))


def test_gradients_of_policy_and_critic_are_clipped_apart():
    args = tiny_args(max_grad_norm=1e-3)
    agent, interface = tiny_agent(args)
    gradients, _ = gradients_after(agent, random_minibatch(agent, interface, args), interface, args)
    for critic in (False, True):
        parts = [g.flatten() for name, g in gradients.items() if name.startswith("value_head") == critic]
        assert torch.cat(parts).norm().item() == pytest.approx(1e-3, rel=1e-2)
