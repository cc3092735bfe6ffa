"""stable-baselines3 as an independent implementation: its GAE equals ours, and tests/sb3_ppo.py trains its PPO as it says."""

import numpy as np
import pytest
import sb3_ppo
import torch
from conftest import ROOT, read_json
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import ppo_baseline
import report


def test_gae_equals_that_of_stable_baselines3():
    """Random rewards, values, terminations and time limits; there they add the value of the last observation to the reward."""
    rng, (length, envs) = np.random.default_rng(0), (50, 3)
    buffer = RolloutBuffer(length, Box(-1, 1, (2,)), Box(-1, 1, (1,)), gae_lambda=0.9, gamma=0.97, n_envs=envs)
    rewards, values = rng.normal(size=(length, envs)), torch.tensor(rng.normal(size=(length + 1, envs)))
    ended, last_values = rng.random((length, envs)) < 0.2, rng.normal(size=(length, envs))
    cut = ended & (rng.random((length, envs)) < 0.5)
    starts = np.concatenate([np.ones((1, envs), bool), ended[:-1]])
    for t in range(length):
        reward = rewards[t] + 0.97 * cut[t] * last_values[t]
        buffer.add(np.zeros((envs, 2)), np.zeros((envs, 1)), reward, starts[t], values[t], torch.zeros(envs))
    buffer.compute_returns_and_advantage(values[-1], ended[-1])
    done, terminated = torch.tensor(ended).double(), torch.tensor(ended & ~cut).double()
    next_values = torch.where(done > 0, torch.tensor(last_values), values[1:])
    ours = ppo_baseline.compute_gae(torch.tensor(rewards), values[:-1], next_values, terminated, done, 0.97, 0.9)
    assert cut.any() and terminated.any() and np.allclose(buffer.advantages, ours.numpy(), atol=1e-5)
    assert np.allclose(buffer.returns, (ours + values[:-1]).numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def args():
    return ppo_baseline.Args(env_id="reach-v3", num_envs=2)


def model_of(method: str, args):
    envs = DummyVecEnv([ppo_baseline.make_env(args, i) for i in range(args.num_envs)])
    return PPO("MlpPolicy", envs, device="cpu", **sb3_ppo.settings(method, args))


def test_matched_settings_are_those_of_the_textbook_ppo(args):
    """Networks of equal shapes (ours ends in a tanh), equal initial exploration, as many gradient steps per rollout."""
    model = model_of("matched", args)
    agent = ppo_baseline.Agent(39, 4, args)
    sizes = [
        [tuple(p.shape) for p in part.parameters()]
        for part in (
            torch.nn.Sequential(model.policy.mlp_extractor.policy_net, model.policy.action_net),
            torch.nn.Sequential(model.policy.mlp_extractor.value_net, model.policy.value_net),
        )
    ]
    assert sizes == [[tuple(p.shape) for p in part.parameters()] for part in (agent.actor, agent.critic)]
    assert torch.equal(model.policy.log_std, agent.actor_logstd)
    assert (model.n_steps, model.batch_size, model.n_epochs) == (args.num_steps, args.minibatch_size, args.update_epochs)
    assert (model.gamma, model.gae_lambda) == (args.gamma, args.gae_lambda)
    assert model.clip_range(1.0) == args.clip_coef and model.max_grad_norm == args.max_grad_norm
    assert [model.lr_schedule(left) for left in (1.0, 0.25)] == [args.learning_rate, 0.25 * args.learning_rate]


def test_a_rollout_of_the_defaults_is_theirs(args):
    assert model_of("defaults", args).n_steps * args.num_envs == 2048


def test_the_evaluation_uses_the_statistics_of_training(args):
    envs = VecNormalize(DummyVecEnv([ppo_baseline.make_env(args, i) for i in range(2)]))
    envs.obs_rms.mean, envs.obs_rms.var = np.full(39, 5.0), np.full(39, 4.0)
    model, obs = PPO("MlpPolicy", envs, device="cpu"), torch.randn(3, 39)
    expected = model.predict((obs.numpy() - 5) / 2, deterministic=True)[0]
    assert np.allclose(sb3_ppo.Acting(model, envs).get_action_and_logprob(obs, True)[0], expected, atol=1e-5)


def test_a_run_of_a_task(tmp_path):
    """Two rollouts, 512 steps of each of eight environments: episodes end, are counted; an evaluation; then skipped."""
    flags = sb3_ppo.Args(
        tmp_path / "out.json", tasks=("reach-v3",), seeds=(4,), methods=("matched",), steps=4096, eval_episodes=2
    )
    sb3_ppo.main(flags)
    (run,) = read_json(flags.output)["runs"]
    assert run["total_timesteps"] == 4096 and 0 <= run["eval_success_rate"] <= 1 and run["eval_return_mean"] > 0
    assert run["train_return_mean"] > 0 and run["curves"]["steps"][-1] == 4096
    written = flags.output.stat().st_mtime_ns
    sb3_ppo.main(flags)
    assert flags.output.stat().st_mtime_ns == written


def test_a_box_that_they_would_not_map_is_refused():
    with pytest.raises(ValueError, match="Pendulum-v1: actions must be in"):
        sb3_ppo.train("Pendulum-v1", 1, "matched", 2048)


def test_the_page_has_its_results():
    """docs/fair_to_ppo.md: mean areas by task and over all, goals reached; of these runs and of ppo_baseline.py's."""
    runs = read_json(ROOT / "results" / "sb3_ppo.json")["runs"]
    tasks = ["button-press-topdown-v3", "door-open-v3", "drawer-open-v3", "push-v3"]
    rows = {
        method: [[run for run in runs if (run["task"], run["method"]) == (task, method)] for task in tasks]
        for method in sb3_ppo.METHODS
    }
    folder = ROOT / "results" / "runs" / "300000-v2"
    rows["ppo"] = [[read_json(folder / f"{task}__ppo_on-policy__{seed}.json") for seed in (4, 5, 6)] for task in tasks]
    page, readme = ((ROOT / name).read_text() for name in ("docs/fair_to_ppo.md", "README.md"))
    rows["setup"] = [[read_json(folder / f"{task}__ppo-clip-0.2_512__{seed}.json") for seed in (4, 5, 6)] for task in tasks]
    areas = {}
    for method, cells in rows.items():
        assert [[run["seed"] for run in cell] for cell in cells] == [[4, 5, 6]] * 4
        areas[method] = [np.array([report.area_under_curve(run, "success") for run in cell]) for cell in cells]
        means, ends = np.mean(areas[method], axis=1), np.mean([run["eval_success_rate"] for cell in cells for run in cell])
        row = " | ".join(f"{area:.2f}" for area in [*means, means.mean()]) + f" | {100 * ends:.0f} % |\n"
        assert row in page or method == "setup", (method, row)
    assert f"(stable-baselines3's own settings: {np.mean(areas['defaults']):.2f})" in readme

    def span(ours, theirs):
        return report.span(*report.gap_and_interval([x - y for x, y in zip(areas[ours], areas[theirs], strict=True)]))

    assert f"the gap is {span('matched', 'ppo')}, with three seeds." in page
    assert f"by {span('defaults', 'matched')} in its implementation." in page
    lead = span("setup", "defaults")
    assert f"on fresh data leads stable-baselines3's own settings** by {lead}, on door-open and drawer-open." in page
    assert (areas["defaults"][3] > areas["setup"][3]).all()  # "On push their own settings lead on all three seeds."


def test_the_page_has_its_returns_on_mujoco():
    runs = [run for run in read_json(ROOT / "results" / "sb3_ppo.json")["runs"] if run["steps"] == 1_000_000]
    page = (ROOT / "docs" / "beyond_meta_world.md").read_text()
    ends = {(run["method"], run["task"]): f"{run['eval_return_mean']:,.0f}" for run in runs}
    assert len(ends) == len(runs) == 4 and {run["seed"] for run in runs} == {4}
    for method, words in (("matched", "settings of `ppo`"), ("defaults", "its own settings")):
        row = f"| stable-baselines3's PPO, {words} | v5 | {ends[method, 'HalfCheetah-v5']} | {ends[method, 'Hopper-v5']} |"
        assert row in page
