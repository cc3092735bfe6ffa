"""The learning part of gipo_vla_libero.py: masks, ratios, and an update that is the same however its minibatch is cut."""

import ast
import dataclasses
import functools
import json
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, run_command
from vla_throughput import flops_per_chunk, log_ratios

import gipo_continuous as gipo
import gipo_vla_libero as vla
import ppo_baseline as ppo

T, SEGMENTS, CHUNK = 4, 4, 8


def tiny_args(**flags):
    settings = dict(preset="tiny", **vla.PRESETS["tiny"]) | {"tasks": (0, 1), "camera_size": 28, "num_steps": T, "seed": 3}
    return vla.Args(**settings | flags)


def tiny_agent(args):
    """A random policy of a few thousand weights, and its interface; no simulator."""
    tokenizer = vla.build_word_tokenizer(["pick up the bowl", "open the top drawer of it"])
    config = vla.tiny_config(
        tokenizer.get_vocab_size(), image_size=28, hidden=32, layers=1, heads=2, ffn=48, vision=16, depth=1
    )
    torch.manual_seed(args.seed)
    agent = vla.init_random(config, args, torch.device("cpu"))
    vla.prepare_training(agent, args)
    prompts = [vla.encode_prompt(tokenizer, text, config) for text in ("pick up the bowl", "open the top drawer of it")]
    stats = {"q01": [-1.0] * 8, "q99": [1.0] * 8}
    action = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    stats = {"proprio": stats, "action": action}
    return agent, vla.Interface(*vla.pad_prompts(prompts, config), stats, config, args, torch.device("cpu"))


def random_minibatch(agent, interface, args, seed=0, segments=SEGMENTS):
    """Segments as a rollout stores them, with an episode's end, its extra row and a chunk cut short by success."""
    g, shape = torch.Generator().manual_seed(seed), (T, segments)
    rows = (T + 1, segments)
    mb = {
        "images": torch.randint(0, 256, (*rows, 1, 28, 28, 3), generator=g, dtype=torch.uint8),
        "proprio": torch.rand(*rows, 8, generator=g),
        "tasks": torch.randint(0, 2, (1, segments), generator=g).expand(rows).clone(),
        "values": torch.randn(rows, generator=g),
        "tokens": torch.randint(0, 256, (*shape, CHUNK, 7), generator=g),
        "executed": torch.full(shape, 8.0),
        "rewards": torch.zeros(shape),
        "terminations": torch.zeros(shape),
        "dones": torch.zeros(shape),
        "valid": torch.ones(shape, dtype=torch.bool),
        "lag": torch.randint(0, 9, shape, generator=g).float(),
    }
    mb["rewards"][1, 0], mb["terminations"][1, 0], mb["dones"][1, 0], mb["executed"][1, 0] = 1.0, 1.0, 1.0, 3.0
    mb["valid"][2, 0], mb["executed"][2, 0] = False, 0.0
    mb["dones"][0, 1], mb["valid"][1, 1], mb["executed"][1, 1] = 1.0, False, 0.0
    flat = {key: value[:T].flatten(0, 1) for key, value in mb.items()}
    with torch.no_grad():
        inputs = interface.inputs(flat["images"], flat["proprio"], flat["tasks"])
        logprobs = agent.get_action_and_logprob(**inputs, tokens=flat["tokens"], temperature=args.temperature)[1]
    mb["logprobs"] = logprobs.view(*shape, CHUNK, 7) + 0.3 * torch.randn(*shape, CHUNK, 7, generator=g)
    return mb


def optimizer_of(agent, args):
    groups = vla.optimizer_parameters(agent)
    return torch.optim.SGD([{**groups[0], "lr": 1.0}, {**groups[1], "lr": 1.0}])


def gradients_after(agent, mb, interface, args, micro_batch=64, **kwargs):
    """Gradients, as the optimizer got them, and scalars of one update."""
    stats = vla.update(agent, optimizer_of(agent, args), mb, interface, args, micro_batch, **kwargs)
    trained = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}, stats


def assert_close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for key in a:
        scale = max(float(torch.as_tensor(a[key]).abs().max()), 1e-3)
        assert float((torch.as_tensor(a[key]) - torch.as_tensor(b[key])).abs().max()) <= tolerance * scale, key


def parsed(module, name):
    """Syntax tree of a function: equal for equal code, whatever its comments."""
    tree = ast.parse(Path(module.__file__).read_text())
    return ast.dump(next(node for node in tree.body if getattr(node, "name", None) == name))


COPIED = "discounted_sum compute_gae gipo_log_weight lr_share save_checkpoint load_checkpoint write_json"
COPIED += " lock_folder refuse_existing"


@pytest.mark.parametrize("name", COPIED.split())
def test_copied_functions_stay_those_of_gipo_continuous(name):
    assert parsed(vla, name) == parsed(gipo, name)


@pytest.mark.parametrize("method", ["gipo", "sapo", "none", "ppo"])
def test_objective_equals_the_other_scripts(method):
    """Values, trust and gradient, from far below to far above ratio 1."""
    logratio = torch.linspace(-30, 30, 121, dtype=torch.float64)
    for advantage in (2.0, -0.5):
        adv = torch.full_like(logratio, advantage)
        mine, theirs = logratio.clone().requires_grad_(), logratio.clone().requires_grad_()
        objective, trust = vla.policy_objective(mine, adv, vla.Args(trust_weight=method, sigma=0.7))
        script, flags = (ppo, {}) if method == "ppo" else (gipo, {"trust_weight": method, "sigma": 0.7})
        objective2, trust2 = script.policy_objective(theirs, adv, script.Args(**flags))
        assert torch.equal(objective, objective2)
        assert torch.equal(trust.double(), trust2.double())
        gradients = [torch.autograd.grad(o.sum(), x)[0] for o, x in ((objective, mine), (objective2, theirs))]
        assert torch.equal(*gradients)


def test_unit_logratio():
    g = torch.Generator().manual_seed(0)
    logs, executed = torch.randn(3, CHUNK, 7, generator=g), torch.tensor([8.0, 3.0, 0.0])
    token, mask = vla.unit_logratio(logs, executed, "token")
    assert torch.equal(token, logs)
    assert mask.sum((1, 2)).tolist() == [56, 21, 0]
    assert mask[1, :3].all()  # the first steps, not the last
    action, mask = vla.unit_logratio(logs, executed, "action")
    assert torch.allclose(action, logs.sum(-1))
    assert mask.sum(1).tolist() == [8, 3, 0]
    chunk, mask = vla.unit_logratio(logs, executed, "chunk")
    assert torch.allclose(chunk[:, 0], torch.stack([logs[0].sum(), logs[1, :3].sum(), torch.tensor(0.0)]), atol=1e-5)
    assert mask[:, 0].tolist() == [True, True, False]


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("ratio", ["token", "action", "chunk"])
def test_update_does_not_depend_on_the_micro_batch(train, ratio):
    args = tiny_args(train=train, ratio=ratio, max_grad_norm=1e9, ent_coef=0.01, kl_coef=0.1, sigma=1.5)
    results = []
    for micro_batch in (64, 3):
        agent, interface = tiny_agent(args)
        results.append(gradients_after(agent, random_minibatch(agent, interface, args), interface, args, micro_batch))
    # Rounding depends on the processor, and 56 summed log-ratios in an exponent magnify it (1.2e-5 on an AMD EPYC).
    assert_close(results[0][0], results[1][0], 1e-4)
    assert_close(results[0][1], results[1][1], 1e-4)
    assert max(float(g.abs().max()) for g in results[0][0].values()) > 1e-6


def rank_worker(rank, world, port, args, out, **kwargs):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    agent, interface = tiny_agent(args)
    mb = random_minibatch(agent, interface, args)
    share = SEGMENTS // world
    part = {key: value[:, rank * share : (rank + 1) * share] for key, value in mb.items()}
    gradients, stats = gradients_after(agent, part, interface, args, 5, **kwargs)
    none = [name for name, p in agent.named_parameters() if p.requires_grad and p.grad is None]
    torch.save({"gradients": gradients, "stats": stats, "none": none}, f"{out}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def start_ranks(function, args, number):
    """torch.multiprocessing.spawn() with forks of a process that has imported the script."""
    mp.get_context("forkserver").set_forkserver_preload(["gipo_vla_libero", "torch._dynamo", "pytest"])
    mp.start_processes(function, args, number, start_method="forkserver")


def two_processes(args, out, **kwargs):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start_ranks(functools.partial(rank_worker, **kwargs), (2, port, args, out), 2)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_two_processes_make_the_update_of_one_on_the_joined_batch(tmp_path, train):
    """gloo: the segment halves differ in length of episodes, so advantage statistics and token counts must be joint."""
    args = tiny_args(train=train, max_grad_norm=0.05)
    rank_worker(0, 1, 0, args, tmp_path)
    two_processes(args, tmp_path)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert_close(one["gradients"], first["gradients"])
    assert_close(first["gradients"], second["gradients"], 1e-7)
    assert_close(one["stats"], first["stats"], 1e-4)
    assert first["stats"] == second["stats"]


def test_critic_warmup_in_two_processes(tmp_path):
    """No gradient, not one of zeros: Adam's step count must not move before the policy does."""
    args = tiny_args()
    rank_worker(0, 1, 0, args, tmp_path, train_policy=False)
    two_processes(args, tmp_path, train_policy=False)
    one, first = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0"))
    assert one["none"] == first["none"] and len(one["none"]) > 10
    assert_close(one["gradients"], first["gradients"])


def test_what_was_not_executed_has_no_influence():
    """Tokens after success, and rows that only hold an episode's last observation."""
    args = tiny_args(max_grad_norm=1e9, ent_coef=0.01, kl_coef=0.1)
    agent, interface = tiny_agent(args)
    mb = random_minibatch(agent, interface, args)
    changed = {key: value.clone() for key, value in mb.items()}
    changed["tokens"][1, 0, 3:] = 255 - changed["tokens"][1, 0, 3:]
    changed["logprobs"][1, 0, 3:] -= 2.0
    changed["tokens"][2, 0] = 0
    changed["logprobs"][2, 0] += 3.0
    changed["tokens"][1, 1] = 0
    a, _ = gradients_after(agent, mb, interface, args)
    b, _ = gradients_after(tiny_agent(args)[0], changed, interface, args)
    assert_close(a, b, 1e-7)
    changed["tokens"][1, 0, 2] = 255 - changed["tokens"][1, 0, 2]  # an executed one matters
    c, _ = gradients_after(tiny_agent(args)[0], changed, interface, args)
    assert max(float((a[k] - c[k]).abs().max()) for k in a) > 1e-6


def test_an_episode_bootstraps_from_its_own_last_observation():
    """Truncated at row 0 of segment 1: the value of row 1, the final observation, counts, that of row 2 does not."""
    args = tiny_args(recompute_advantages=False, max_grad_norm=1e9, adv_std_floor=0.0)
    agent, interface = tiny_agent(args)
    base = random_minibatch(agent, interface, args)

    def moved(row, segment):
        mb = {key: value.clone() for key, value in base.items()}
        mb["values"][row, segment] += 5.0
        advantages = []

        def record(*a):
            advantages.append(vla_compute_gae(*a))
            return advantages[-1]

        vla_compute_gae, vla.compute_gae = vla.compute_gae, record
        try:
            vla.update(tiny_agent(args)[0], optimizer_of(agent, args), mb, interface, args, 64)
        finally:
            vla.compute_gae = vla_compute_gae
        return advantages[0]

    plain = moved(0, 3) * 0 + moved(T, 3)  # a change elsewhere: segment 1 is as it was
    assert abs(float(moved(1, 1)[0, 1] - plain[0, 1]) - 5 * args.gamma) < 1e-4
    assert float(moved(2, 1)[0, 1] - plain[0, 1]) == 0.0
    assert float(moved(2, 0)[1, 0] - plain[1, 0]) == 0.0  # after success there is no future
    assert abs(float(moved(T, 2)[T - 1, 2] - plain[T - 1, 2]) - 5 * args.gamma) < 1e-4


@pytest.mark.parametrize("bootstrap", [False, True])
def test_running_out_of_steps_is_a_failure_unless_told_otherwise(monkeypatch, bootstrap):
    """Success, time limit, a replaced simulator, an episode that goes on: which of them has no future value, which ends."""
    args = tiny_args(bootstrap_time_limit=bootstrap)
    obs = {"images": np.full((1, 28, 28, 3), 9, np.uint8), "proprio": np.ones(8, np.float32)}
    lost = "its process died"
    ends = [(True, False), (False, True), lost, (False, False)]
    answers = [end if end is lost else ((obs, np.eye(8)[0] * end[0], 8, *end),) for end in ends]
    envs = SimpleNamespace(receive=lambda i: answers[i], calls=[(vla.LiberoEnv.step, ())] * len(ends))
    monkeypatch.setattr(vla, "VectorEnv", lambda args, num_envs: envs)
    simulators = vla.Simulators(args, tiny_agent(args)[0].config, len(ends))
    simulators.episodes = [{"return": 0.0, "length": 0} for _ in ends]
    outcome = simulators.wait(range(len(ends)))
    assert outcome["terminations"].tolist() == [1, not bootstrap, 0, 0] and outcome["dones"].tolist() == [1, 1, 1, 0]
    assert outcome["executed"].tolist() == [8, 8, 0, 8] and simulators.ended.tolist() == [True, True, True, False]
    assert simulators.proprio[:, 0].tolist() == [1, 1, 0, 1]  # the replaced one keeps the last observation
    assert outcome["rewards"].tolist() == [1, 0, 0, 0]
    assert [e["length"] for e in simulators.episodes] == [8, 8, 0, 8] and simulators.episodes[0]["return"] == 1.0


def test_a_simulator_that_dies_in_every_episode_ends_the_run(monkeypatch):
    """Resets that succeed, and chunks before the fatal one, do not hide it; an episode that comes to its end does."""
    args = tiny_args()
    obs = {"images": np.full((1, 28, 28, 3), 9, np.uint8), "proprio": np.ones(8, np.float32)}
    dies, goes_on, ends = "its process died", ((obs, np.zeros(8), 8, False, False),), ((obs, np.zeros(8), 8, False, True),)
    answers = [goes_on, dies, dies, ends, goes_on, dies, dies, goes_on, dies]
    envs = SimpleNamespace(receive=lambda i: answers.pop(0), calls=[(vla.LiberoEnv.step, ())])
    monkeypatch.setattr(vla, "VectorEnv", lambda args, num_envs: envs)
    simulators = vla.Simulators(args, tiny_agent(args)[0].config, 1)
    simulators.episodes = [{"task": 3, "init_state": 7, "return": 0.0, "length": 0}]
    for _ in range(8):
        simulators.wait([0])
    with pytest.raises(vla.SimulatorError, match="died in three episodes in a row, the last one of task 3, initial state 7"):
        simulators.wait([0])
    assert not answers


@pytest.mark.parametrize("method", ["gipo", "ppo"])
def test_policy_gradient_on_fresh_data(method):
    """At ratio 1 the update is the plain policy gradient, whatever the objective."""
    args = tiny_args(trust_weight=method, max_grad_norm=1e9, vf_coef=0.0)
    agent, interface = tiny_agent(args)
    mb = random_minibatch(agent, interface, args)
    flat = {key: value[:T].flatten(0, 1) for key, value in mb.items()}
    inputs = interface.inputs(flat["images"], flat["proprio"], flat["tasks"])
    with torch.no_grad():
        logprobs = agent.get_action_and_logprob(**inputs, tokens=flat["tokens"])[1]
        values = torch.cat([agent.get_value(agent(**inputs)[1]), torch.zeros(0)]).view(T, SEGMENTS)
        last = interface.inputs(mb["images"][T], mb["proprio"][T], mb["tasks"][T])
        values = torch.cat([values, agent.get_value(agent(**last)[1])[None]])
    mb["logprobs"] = logprobs.view(T, SEGMENTS, CHUNK, 7)
    advantages = vla.compute_gae(
        mb["rewards"], values[:-1], values[1:], mb["terminations"], mb["dones"], args.gamma, args.gae_lambda
    )
    chosen = advantages[mb["valid"]]
    normalized = (advantages - chosen.mean()) / (chosen.std(correction=0) + 1e-8)
    steps = (torch.arange(CHUNK) < mb["executed"].unsqueeze(-1)) & mb["valid"].unsqueeze(-1)
    logp = agent.get_action_and_logprob(**inputs, tokens=flat["tokens"])[1].view(T, SEGMENTS, CHUNK, 7)
    loss = -(logp * steps.unsqueeze(-1) * normalized[..., None, None]).sum() / (7 * steps.sum())
    names = [name for name, p in agent.named_parameters() if p.requires_grad and not name.startswith("value_head")]
    parameters = dict(agent.named_parameters())
    expected = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    got, stats = gradients_after(agent, mb, interface, args)
    for name, gradient in zip(names, expected, strict=True):
        gradient = torch.zeros_like(got[name]) if gradient is None else gradient
        assert float((got[name] - gradient).abs().max()) <= 1e-5 * max(float(gradient.abs().max()), 1e-2), name
    assert stats["gipo/utilization"] == 1.0
    assert abs(stats["gipo/effective_sample_size"] - 1) < 1e-5
    assert stats["gipo/replay_logratio_max"] < 1e-4


def test_the_critics_first_step_at_full_width_stays_within_the_rewards_range():
    """Adam moves every weight by the step size, so that the wider the head, the further the first step moves its values."""
    torch.manual_seed(0)
    head, hidden, targets = vla.ValueHead(4096, 4096), torch.randn(32, 8, 4096), torch.rand(32)
    before = head(hidden)
    optimizer = torch.optim.AdamW(head.parameters(), vla.Args().critic_learning_rate)
    (before - targets).square().mean().backward()
    optimizer.step()
    assert 0.02 < float((head(hidden) - before).abs().mean()) < 0.5


def test_critic_warmup_leaves_the_policy_alone():
    args = tiny_args(max_grad_norm=1e9)
    agent, interface = tiny_agent(args)
    gradients, _ = gradients_after(agent, random_minibatch(agent, interface, args), interface, args, train_policy=False)
    moved = {name.startswith("value_head") for name, g in gradients.items() if float(g.abs().max()) > 0}
    assert moved == {True}


@pytest.mark.parametrize("train_policy", [True, False])
def test_one_graph_at_a_time(train_policy):
    """A micro-batch is all that memory has to hold: no graph outlives its piece, none is built for the critic."""
    args = tiny_args(train="lora")
    agent, interface = tiny_agent(args)
    counts, alive, layer = [], [], agent.language_model["model"].layers[0]

    class Token(torch.autograd.Function):  # saved by the graph and by nothing else
        @staticmethod
        def forward(ctx, x):
            token = torch.zeros(1)
            alive.append(weakref.ref(token))
            ctx.save_for_backward(token)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def hook(module, inputs, output):
        if torch.is_grad_enabled():
            marked = Token.apply(output)
            counts.append(sum(reference() is not None for reference in alive))
            return marked

    layer.register_forward_hook(hook)
    gradients_after(agent, random_minibatch(agent, interface, args), interface, args, 3, train_policy=train_policy)
    assert counts == ([1] * 5 if train_policy else [])


def test_rows_of_replaced_simulators_alone_in_a_piece():
    """Nothing of them was executed, so a piece may have no token at all."""
    args = tiny_args()
    agent, interface = tiny_agent(args)
    mb = random_minibatch(agent, interface, args)
    mb["executed"][3, 2] = 0.0
    whole, one = (gradients_after(tiny_agent(args)[0], mb, interface, args, size) for size in (64, 1))
    assert_close(whole[0], one[0], 1e-4)
    assert_close(whole[1], one[1], 1e-4)


def test_a_simulator_stays_on_its_task():
    args, rng = SimpleNamespace(tasks=(0, 1, 2), train_init_states=40), np.random.default_rng(0)
    args.episodes_per_task = 4
    failures, episode, tasks, later = {t: [] for t in range(3)}, {}, [], set()
    for _ in range(400):
        task, state, repeat = vla.next_episode(episode, failures, args, rng)
        episode = {"task": task, "init_state": state, "repeat": repeat}
        tasks.append(task)
        later |= {state} if repeat > 1 else set()
    assert later == set(range(40))  # of training's initial states alone, and a new one each time
    blocks = np.reshape(tasks, (100, 4))
    assert (blocks == blocks[:, :1]).all() and set(blocks[:, 0]) == {0, 1, 2}


def test_tasks_that_fail_are_drawn_more_often():
    failures = {0: [1.0] * 9, 1: [0.0] * 9}
    args, rng = SimpleNamespace(tasks=(0, 1), episodes_per_task=1, train_init_states=40), np.random.default_rng(0)
    before = {"task": 1, "init_state": 0, "repeat": 1}  # of one episode on a task no second follows
    draws = [vla.next_episode(before, failures, args, rng) for _ in range(4000)]
    share = np.mean([task == 0 for task, *_ in draws])
    assert abs(share - 10 / 11) < 0.02
    assert {state for _, state, _ in draws} == set(range(40)) and {repeat for *_, repeat in draws} == {1}


def test_videos_show_their_own_task(tmp_path, monkeypatch):
    """evaluate() plays the episodes in flight again; the last video's episode must not be one of them."""
    seen = []

    class OneSimulator:
        def __init__(self, args, config, num_envs):
            assert args.render_every_step and num_envs == 1
            self.episodes, self.envs = [{}], SimpleNamespace(call=lambda i, function: [np.zeros((4, 4, 3), np.uint8)])

        def close(self):
            seen.append("closed")

    def evaluate(agent, args, interface, simulators):
        seen.append((args.tasks, args.eval_episodes, list(simulators.episodes)))
        simulators.episodes = [{"task": args.tasks[0]}]

    video = SimpleNamespace(write_videofile=lambda path, logger: Path(path).touch())
    monkeypatch.setitem(sys.modules, "moviepy", SimpleNamespace(ImageSequenceClip=lambda frames, fps: video))
    monkeypatch.setattr(vla, "Simulators", OneSimulator)
    monkeypatch.setattr(vla, "evaluate", evaluate)
    vla.record_videos(None, SimpleNamespace(config=None), tiny_args(), tmp_path / "videos")
    assert seen == [((0,), 1, [{}]), ((1,), 1, [{}]), "closed"]
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {"task0.mp4", "task1.mp4"}


def test_each_process_draws_on_its_own_gpu(monkeypatch):
    """The order in which EGL devices are tried: first the one of the process, then the others."""
    tried = []

    def probe(command, env, **kwargs):
        tried.append(env["MUJOCO_EGL_DEVICE_ID"])
        return SimpleNamespace(returncode=1, stdout="", stderr="broken")

    monkeypatch.setattr(vla.subprocess, "run", probe)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    for rank, visible, order in (
        (0, "", "01234567"),
        (2, "", "20134567"),
        (1, "5,3", "30124567"),
        (1, "GPU-a,GPU-b", "10234567"),
    ):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        vla.render_variables.cache_clear()
        tried.clear()
        with pytest.raises(ValueError, match="--render egl"):
            vla.render_variables("egl")
        assert "".join(tried) == order
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")  # of some image: all processes of torchrun would draw there
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    vla.render_variables.cache_clear()
    tried.clear()
    with pytest.raises(ValueError, match="--render egl"):
        vla.render_variables("egl")
    assert "".join(tried) == "10234567"

    def hang(command, **kwargs):
        tried.append(kwargs["env"]["MUJOCO_GL"])
        if kwargs["env"]["MUJOCO_GL"] == "egl":
            raise subprocess.TimeoutExpired(command, 120)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(vla.subprocess, "run", hang)
    monkeypatch.setattr(vla.Path, "exists", lambda path: True)  # as on a machine with an NVIDIA GPU, where EGL goes first
    vla.render_variables.cache_clear()
    tried.clear()
    assert vla.render_variables("auto")["MUJOCO_GL"] == "osmesa" and tried == ["egl", "osmesa"]  # not two minutes per device
    vla.render_variables.cache_clear()


def test_an_evaluation_stays_with_a_compiled_scene():
    """A simulator goes on with its own task while there are episodes of it; others take the task that most are left of."""
    todo = [(task, init_state) for task in (3, 5) for init_state in range(3)]
    assert [vla.take(todo, task) for task in (None, None, 3, 9, 5, 3)] == [(3, 0), (5, 0), (3, 1), (5, 1), (5, 2), (3, 2)]
    assert todo == []


def test_segments_are_drawn_in_passes():
    args = SimpleNamespace(num_steps=4, minibatch_size=2 * 4 * 8, updates_per_iteration=6)
    drawn = vla.sample_segments(5, args, 8)
    assert drawn.shape == (6, 2)
    assert sorted(drawn.flatten()[:5].tolist()) == sorted(drawn.flatten()[5:10].tolist()) == list(range(5))


def test_presets_are_defaults_that_flags_override():
    args = vla.parse_args(["--preset", "tiny", "--sigma", "0.5", "--num-envs=2"])
    assert (args.preset, args.sigma, args.num_envs, args.train, args.cuda) == ("tiny", 0.5, 2, "full", False)
    assert vla.parse_args([]).num_envs == vla.Args().num_envs
    assert {f.name for f in dataclasses.fields(vla.Args)} >= set(vla.PRESETS["tiny"])


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"model": ""}, "--model"),
        ({"sigma": -1.0}, "--sigma"),
        ({"minibatch_size": 100}, "--minibatch-size"),
        ({"minibatch_size": 10**9}, "--minibatch-size"),
        ({"buffer_size": 8}, "--buffer-size"),
        ({"tasks": (10,)}, "--tasks"),
        ({"eval_episodes": 51}, "--eval-episodes"),
        ({"micro_batch": "some"}, "--micro-batch"),
        ({"gamma": 1.5}, "--gamma"),
    ],
)
def test_bad_arguments_are_named(flags, words):
    args = dataclasses.replace(vla.Args(model="x/y", cuda=False), **flags)
    with pytest.raises(ValueError, match=words):
        vla.check_args(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named():
    with pytest.raises(ValueError, match="--cuda"):
        vla.check_args(vla.Args(model="x/y"))


def test_measured_log_ratios_by_hand():
    """A policy whose log-probs are the number of chunks in the pass: 4 sampled at once, evaluated as 3 and 1."""

    class Counting:
        def get_action_and_logprob(self, pixel_values, proprio, tokens=None):
            assert proprio is None and (tokens is None or len(tokens) == len(pixel_values))
            return pixel_values.long(), torch.full((len(pixel_values), 2), float(len(pixel_values)))

    result = log_ratios(Counting(), lambda batch: {"pixel_values": torch.zeros(batch), "proprio": None}, (4,), 3)
    assert result == {"tokens": 8, "mean": 1.5, "percentile_99.9": 3.0, "max": 3.0}


def test_the_gpu_measurement_saves_a_policy_to_start_from(tmp_path):
    """--save writes a folder that the script loads, with statistics for libero_spatial and a prompt per task."""
    command = [sys.executable, "tests/vla_throughput.py", "--size", "tiny", "--device", "cpu", "--save", str(tmp_path / "ck")]
    process = run_command(command, cwd=ROOT)
    assert process.returncode == 0 and process.stdout == "", process.stderr
    script = vla.Args(cuda=False, dtype="float32", jpeg=False)
    agent, tokenizer, norm_stats = vla.load_policy(str(tmp_path / "ck"), script, torch.device("cpu"))
    again = vla.init_random(agent.config, script, torch.device("cpu"))
    assert torch.equal(agent.projector.fc1.weight, again.projector.fc1.weight) and agent.projector.fc1.weight.std() > 0
    assert vla.resolve_unnorm_key(norm_stats, "libero_spatial") == "libero_spatial"
    prompts = [vla.encode_prompt(tokenizer, vla.instruction("libero_spatial", t), agent.config) for t in range(10)]
    assert len({tuple(ids) for ids in prompts}) == 10 and not any(tokenizer.token_to_id("<unk>") in ids for ids in prompts)


def test_arithmetic_of_a_forward_pass():
    """4.94 and 8.78 TFLOP per chunk of the 7B model with one and two images; PyTorch's own counter on a small one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    assert flops_per_chunk(vla.PolicyConfig(), 1, 345) == pytest.approx(4.94e12, rel=0.01)
    assert flops_per_chunk(vla.PolicyConfig(), 2, 601) == pytest.approx(8.78e12, rel=0.01)
    agent, interface = tiny_agent(tiny_args())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        inputs = interface.inputs(torch.zeros(1, 1, 28, 28, 3, dtype=torch.uint8), torch.zeros(1, 8), torch.zeros(1).long())
        agent(**inputs)
    config, sequence = agent.config, agent.prefix + int(inputs["prompt_lengths"]) + 57
    patches = 2 * 4 * 3 * 14 * 14 * (config.dino.width + config.siglip.width)  # not worth counting in the real model
    proprio = 2 * (8 + config.hidden) * config.hidden
    counted = counter.get_total_flops() - patches - proprio
    assert counted == pytest.approx(flops_per_chunk(config, 1, sequence), rel=0.02)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_gpu_measurement_runs_anywhere(train, tmp_path):
    """The command that fills the table of docs/gipo_vla_libero.md, on the tiny architecture; it joins what is in the file."""
    command = [sys.executable, "tests/vla_throughput.py", "--size", "tiny", "--device", "cpu", "--train", train]
    command += ["--repeats", "1", "--batches", "2", "5", "--micro-batch", "3", "--output", str(tmp_path / "out.json")]
    (tmp_path / "out.json").write_text(json.dumps([{"another": "measurement"}]))
    process = run_command(command, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    other, result = json.loads((tmp_path / "out.json").read_text())
    assert other == {"another": "measurement"}
    assert [row["batch"] for row in result["rollout"]] == [2, 5]
    assert result["entropy"] == pytest.approx(1.0, abs=0.01) and result["log_ratio"]["max"] < 1e-4
    assert result["log_ratio"]["tokens"] == 56 * (3 + 5)
    # LoRA: a forward pass and a backward pass for activations only. Full: gradients of weights, too, but not in the towers.
    forward, update = result["tflop_per_chunk"], result["update"]["tflop_per_sample"]
    assert update == pytest.approx(2 * forward) if train == "lora" else 2 * forward < update < 3 * forward


def test_an_evaluation_that_a_signal_ends_plays_no_training_episode_again():
    """With a checkpoint written before it, that would be minutes for nothing."""
    said = []

    class Simulators:
        episodes, groups = [{"task": 0, "init_state": 3}], [[0]]

        def __getattr__(self, name):
            return lambda *args: said.append(name) or name

    args = tiny_args(eval_episodes=1, tasks=(0,))
    result = vla.evaluate(None, args, None, Simulators(), stop_signals=[signal.SIGTERM])
    assert result["success_rate"] is None and said == ["snapshot", "start", "wait"]
