"""Sharded full training of gipo_vla_libero.py (FSDP2): gloo processes make the steps of one, and share checkpoints."""

import functools
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_vla_learning import random_minibatch, start_ranks, tiny_agent, tiny_args

import gipo_vla_libero as vla

SEGMENTS = 8
SHARES = {1: [8], 2: [1, 7], 4: [1, 4, 1, 2]}  # segments of each process: they make different numbers of passes


def worker(rank, world, port, args, out, save="", load="", steps=2):
    """Some updates from the start or from a checkpoint; leaves the weights, scalars and, if asked, a checkpoint."""
    torch.set_num_threads(1)
    if args.torch_compile:  # the graphs are what sharding could break; to translate them into C++ takes half a minute
        vla.torch.compile = functools.partial(torch.compile, backend="aot_eager")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    agent, interface = tiny_agent(args)
    mb = random_minibatch(agent, interface, args, segments=SEGMENTS)
    if world > 1 and args.train == "full":
        vla.shard_training(agent, args)
    optimizer = torch.optim.AdamW(vla.optimizer_parameters(agent), lr=1e-2, weight_decay=0.0)
    rb, progress, rng = replay_of(args, world), vla.Progress(), vla.np.random.default_rng(rank)
    simulators = Recorder(rank, args.num_envs)
    if load:
        vla.restore_run(out / load, args, agent, optimizer, rb, progress, simulators, rng)
    shares = SHARES[world]
    part = {key: value[:, sum(shares[:rank]) : sum(shares[: rank + 1])] for key, value in mb.items()}
    stats = []
    for _ in range(steps):
        stats.append(vla.update(agent, optimizer, part, interface, args, 3, train_policy=progress.iteration > 0))
        progress.iteration += 1
        if rank == 0 and world > 1:  # a process alone may act: no pass waits for the others
            with torch.no_grad():
                agent.get_action_and_logprob(**interface.inputs(*(part[key][0] for key in ("images", "proprio", "tasks"))))
    if save:
        progress.filled = rb["versions"].shape[1] if not load else progress.filled
        (out / save).mkdir(exist_ok=True)
        vla.save_run(out / save, agent, optimizer, rb, progress, simulators, rng)
    if rank == 0:
        vla.save_policy(out / f"model-{world}{load}", agent, vla.build_word_tokenizer(["bowl"]), {}, args)
    elements = sum(
        p.to_local().numel() if isinstance(p, vla.DTensor) else p.numel() for g in optimizer.param_groups for p in g["params"]
    )
    whole = {}
    with vla.as_shards(agent):
        for name, p in agent.named_parameters():
            if p.requires_grad:
                whole[name] = (p.full_tensor() if isinstance(p, vla.DTensor) else p).detach().clone()
    result = {"weights": whole, "stats": stats, "elements": elements, "filled": progress.filled, "slot": progress.slot}
    result |= {"versions": rb["versions"], "restored": simulators.restored, "started": simulators.started}
    torch.save(result, out / f"{world}-{rank}{load}.pt")
    if world > 1:
        vla.leave_processes(None, None, None)
        os._exit(0)  # as the script does: threads of PyTorch sometimes abort an orderly exit


class Recorder:
    """Simulators that only remember what they were told."""

    def __init__(self, rank, number):
        self.rank, self.number, self.restored, self.started = rank, number, [], []

    def snapshot(self):
        return [{"task": self.rank, "init_state": i} for i in range(self.number)]

    def restore(self, episodes):
        self.restored = [(e["task"], e["init_state"]) for e in episodes]

    def start(self, i, task, init_state, repeat):
        self.started.append(i)

    def wait(self, indices):
        pass


def replay_of(args, world):
    """Two rollouts of each process, of the iterations 1 and 2."""
    versions = torch.tensor([1.0, 2.0]).repeat_interleave(args.num_envs).expand(args.num_steps, -1).clone()
    return {"versions": versions, "rewards": torch.rand(versions.shape)}


def run(world, args, out, **kwargs):
    """The results of all processes of one run."""
    if world == 1:
        worker(0, 1, 0, args, out, **kwargs)
    else:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        start_ranks(functools.partial(worker, **kwargs), (world, port, args, out), world)
    return [torch.load(out / f"{world}-{r}{kwargs.get('load', '')}.pt", weights_only=True) for r in range(world)]


def assert_equal_runs(a, b, tolerance):
    largest = max((w - b["weights"][name]).abs().max().item() for name, w in a["weights"].items())
    print("largest difference of a weight:", largest)
    assert largest < tolerance
    for one, two in zip(a["stats"], b["stats"], strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=5e-3, abs=1e-4), name


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


CASES = [(2, {}), (4, {"gradient_checkpointing": True}), (2, {"torch_compile": True})]


@pytest.mark.parametrize(("world", "flags"), CASES, ids=["two", "four-checkpointing", "compiled"])
def test_sharded_processes_make_the_steps_of_one(tmp_path, world, flags):
    """The critic's warm-up and two steps of the policy, with unequal shares; the exported policies agree; memory is shared."""
    args = tiny_args(train="full", max_grad_norm=0.05)
    (one,) = run(1, args, tmp_path, steps=3)
    many = run(world, vla.dataclasses.replace(args, **flags), tmp_path, steps=3)
    for other in many:
        assert_equal_runs(one, other, 1e-3)
        assert other["elements"] < (0.7 if world == 2 else 0.55) * one["elements"]  # its own share, and what stays whole
    for other in many[1:]:
        assert all(torch.equal(w, many[0]["weights"][name]) for name, w in other["weights"].items())
    a, b = (load_file(tmp_path / f"model-{n}" / "model.safetensors") for n in (1, world))
    assert a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < 1e-3 for key in a)


CASES = [("full", 2, 2), ("full", 2, 4), ("full", 4, 1), ("full", 1, 2), ("lora", 2, 1)]


@pytest.mark.parametrize(("train", "before", "after"), CASES)
def test_another_number_of_processes_resumes(tmp_path, train, before, after):
    """Weights and Adam's averages are those of an uninterrupted run; replay and episodes are shared out among the new ones."""
    args = tiny_args(train=train, max_grad_norm=0.05, num_envs=2)
    (straight,) = run(1, args, tmp_path, steps=3)
    run(before, args, tmp_path, steps=2, save="run")
    resumed = run(after, args, tmp_path, steps=1, load="run")
    for name, w in straight["weights"].items():
        assert (w - resumed[0]["weights"][name]).abs().max() < 1e-3, name
    capacity = 2 * args.num_envs
    assert sum(r["filled"] for r in resumed) == min(before, after) * capacity
    for r in resumed:
        assert r["filled"] % args.num_envs == 0 and r["slot"] == r["filled"] % capacity
        newest = r["versions"][0, : r["filled"]].tolist()
        assert newest == sorted(newest)  # the oldest is overwritten first
    restored = [episode for r in resumed for episode in r["restored"]]
    assert len(set(restored)) == len(restored) == min(before, after) * args.num_envs
    assert sum(len(r["started"]) for r in resumed) == (after - min(before, after)) * args.num_envs


def test_plan_for_eight_gpus_of_80_gb(monkeypatch):
    """Full training of the 7B model: not on one, on eight with checkpointing; a refusal names what would fit."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    args = vla.Args(model="x/y", train="full", gradient_checkpointing=True)
    plan = vla.memory_plan(vla.PolicyConfig(), args, 8, 8)
    assert 50 < sum(plan.values()) < 62, plan
    with pytest.raises(vla.ArgumentError, match=r"8 GPUs \(torchrun --nproc-per-node 8 --shutdown-timeout 900\) \(5\d GiB\)"):
        vla.check_memory(vla.PolicyConfig(), args, "cuda")
    monkeypatch.setenv("WORLD_SIZE", "8")
    vla.check_memory(vla.PolicyConfig(), args, "cuda")


def test_passes_leave_room_for_the_simulators(monkeypatch):
    """Which draw on the same GPU with EGL, and for other programs there."""
    args = vla.Args(model="x/y", train="full", gradient_checkpointing=True, cuda=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * 2**30)
    monkeypatch.setattr(vla, "sharded_layers", lambda agent: [agent])
    monkeypatch.setenv("WORLD_SIZE", "8")
    config, found = vla.PolicyConfig(), {}
    agent, interface = SimpleNamespace(config=config), SimpleNamespace(device="cuda")
    for gl, left in (("osmesa", 0.95 * 70), ("egl", 0.95 * 70 - 0.4 * args.num_envs)):
        monkeypatch.setattr(vla, "render_variables", lambda render, gl=gl: {"MUJOCO_GL": gl})
        found[gl] = vla.find_micro_batch(agent, interface, args)
        sizes = [sum(vla.memory_plan(config, args, found[gl] * more, 8).values()) for more in (1, 2)]
        assert sizes[0] < left <= sizes[1], (gl, sizes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**30, 80 * 2**30))
    with pytest.raises(vla.ArgumentError, match=r"^--train full: not even one chunk per pass fits .*--micro-batch 1 to try"):
        vla.find_micro_batch(agent, interface, args)
