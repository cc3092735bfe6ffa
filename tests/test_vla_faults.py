"""gipo_vla_libero.py: what would cost its user days is one sentence that names the flag or the file. No simulator here."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_vla_learning import gradients_after, random_minibatch, tiny_agent, tiny_args
from test_vla_policy import DATA, GOLDEN, check_batch, golden_agent, inputs, make_args, write_checkpoint
from test_vla_policy import weights as weights

import gipo_vla_libero as vla


@pytest.fixture(scope="module")
def public(weights, tmp_path_factory):
    return Path(write_checkpoint(tmp_path_factory.mktemp("public") / "checkpoint", weights))


@pytest.fixture
def folder(public, tmp_path):
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(public, tmp_path / "checkpoint"))


def saved_by_us(public, folder, **changes):
    """A policy with LoRA as this script saves it."""
    args = make_args(**changes)
    agent, tokenizer, norm_stats = vla.load_policy(str(public), args, "cpu")
    torch.manual_seed(0)
    for p in agent.parameters():
        if p.requires_grad:
            p.data.add_(0.02 * torch.randn_like(p))
    vla.save_policy(folder, agent, tokenizer, norm_stats, args)
    return agent


# -------------------- Files that cannot be used --------------------
SHARD = "model-00002-of-00003.safetensors"


def truncated(name):
    def change(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def removed(name):
    return lambda folder: (folder / name).unlink()


def config_with(**changes):
    def change(folder):
        content = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def tensors(key, change):
    def damage(folder):
        for path in folder.glob("*.safetensors"):
            content = load_file(path)
            if key in content:
                content[key] = change(content[key])
                save_file(content, path, metadata={"format": "pt"})

    return damage


DAMAGES = {
    "truncated shard": (truncated(SHARD), SHARD),
    "random shard": (written(SHARD, "random" * 100), SHARD),
    "empty shard": (written(SHARD, ""), SHARD),
    "missing shard": (removed(SHARD), SHARD),
    "broken index": (written("model.safetensors.index.json", "{"), "model.safetensors.index.json"),
    "missing tokenizer": (removed("tokenizer.json"), "tokenizer.json"),
    "broken tokenizer": (written("tokenizer.json", '{"version": '), "tokenizer.json"),
    "broken config": (written("config.json", "{"), "config.json"),
    "config that is a list": (written("config.json", "[]"), "config.json"),
    "config without text_config": (config_with(policy_config=None, text_config=None), "text_config"),
    "text_config of something else": (config_with(policy_config=None, text_config={"hidden_size": "big"}), "text_config"),
    "unknown policy_config key": (
        config_with(policy_config=dataclasses.asdict(GOLDEN) | {"colour": 1}),
        "policy_config.*colour",
    ),
    "broken statistics": (written("dataset_statistics.json", "nonsense"), "dataset_statistics.json"),
    "damaged value head": (written("value_head.pt", "nonsense"), "value_head.pt"),
    "value head of another size": (
        lambda folder: torch.save(vla.ValueHead(5, 5).state_dict(), folder / "value_head.pt"),
        "value_head.pt",
    ),
    "damaged adapters": (written("lora.pt", "nonsense"), "lora.pt"),
    "adapters of something else": (lambda folder: torch.save({"base": "x"}, folder / "lora.pt"), "lora.pt"),
    "NaN": (tensors("projector.fc1.weight", lambda w: w * math.nan), "projector.fc1.weight holds NaN"),
    "zero head": (tensors("language_model.lm_head.weight", torch.zeros_like), "lm_head.*zero"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named(folder, name):
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(vla.ArgumentError, match=f"(?s){words}") as error:
        vla.load_policy(str(folder), make_args(), "cpu")
    assert "\n" not in str(error.value)


STATISTICS = {
    "no q01": {"action": {"q99": [1.0] * 7}},
    "too few": {"action": {"q01": [0.0] * 6, "q99": [1.0] * 7}},
    "NaN": {"action": {"q01": [math.nan] * 7, "q99": [1.0] * 7}},
    "no numbers": {"action": {"q01": "low", "q99": [1.0] * 7}},
    "nothing": {},
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_without_quantiles(name):
    agent, _ = tiny_agent(tiny_args())
    tokenizer = vla.build_word_tokenizer(["pick up the bowl"])
    with pytest.raises(vla.ArgumentError, match=r"libero_spatial.*action needs 7 finite numbers q01"):
        vla.make_interface(agent, tokenizer, {"libero_spatial": STATISTICS[name]}, tiny_args(), torch.device("cpu"))


def test_base_of_an_adapter_that_has_moved(public, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    layer = "base_model.model.projector.fc1"
    pair = {f"{layer}.lora_A.weight": torch.ones(2, 80), f"{layer}.lora_B.weight": torch.ones(320, 2)}
    save_file(pair, adapter / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": "/nowhere/base", "r": 2, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(vla.ArgumentError, match=r"base /nowhere/base of .*adapter.*--base"):
        vla.load_policy(str(adapter), make_args(), "cpu")
    vla.load_policy(str(adapter), make_args(base=str(public)), "cpu")
    for bad in ({**settings, "r": None}, {"r": 2}):
        (adapter / "adapter_config.json").write_text(json.dumps(bad))
        with pytest.raises(vla.ArgumentError):
            vla.load_policy(str(adapter), make_args(base=str(public)), "cpu")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for damage in ({f"{layer}.lora_A.weight": torch.ones(2, 80)}, {**pair, f"{layer}.lora_B.weight": torch.ones(7, 2)}):
        save_file(damage, adapter / "adapter_model.safetensors")
        with pytest.raises(vla.ArgumentError, match=r"the adapter of projector.fc1.weight is missing or damaged"):
            vla.load_policy(str(adapter), make_args(base=str(public)), "cpu")


def test_own_adapters_remember_the_hub(public, tmp_path, monkeypatch):
    """The folder on the cache's disk may go; the hub id, with the commit, brings it back, and so does --base."""
    import huggingface_hub

    commit = tmp_path / "snapshots" / "c0ffee"
    shutil.copytree(public, commit)
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    saved_by_us("owner/name", tmp_path / "saved")
    lora = vla.load_checkpoint(tmp_path / "saved" / "lora.pt")
    assert (lora["hub_id"], lora["revision"], lora["base"]) == ("owner/name", "c0ffee", str(commit))
    moved = commit.rename(tmp_path / "moved")
    asked.clear()

    def download_again(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(moved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_again)
    one = vla.load_policy(str(tmp_path / "saved"), make_args(), "cpu")[0]
    assert set(asked) == {("owner/name", "c0ffee")}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("no download"))
    two = vla.load_policy(str(tmp_path / "saved"), make_args(base=str(moved)), "cpu")[0]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_adapters_in_pefts_format(public, tmp_path):
    """lora_adapter/ alone, on its base, is the policy."""
    agent = saved_by_us(public, tmp_path / "saved")
    adapter = tmp_path / "saved" / "lora_adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == str(public)
    assert (settings["r"], settings["lora_alpha"], settings["modules_to_save"]) == (4, 2, ["lm_head"])
    keys = set(load_file(adapter / "adapter_model.safetensors"))
    names = {f"base_model.model.{name}.lora_{x}.weight" for name in settings["target_modules"] for x in "AB"}
    assert keys == names | {"base_model.model.language_model.lm_head.weight"}
    again = vla.load_policy(str(adapter), make_args(), "cpu")[0]
    expected = agent(*inputs())[0]
    assert (again(*inputs())[0] - expected).abs().max() < 0.02 * expected.abs().max()  # lm_head is in bfloat16 there


# -------------------- Arguments --------------------
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset", "huge"], "--preset huge must be one of none, tiny"),
        (["--preset=huge"], "--preset huge must be one of none, tiny"),
        (["--preset", "tiny", "--noop-gripper", "2"], "--noop-gripper 2.0 must be between -1 and 1"),
        (["--preset", "tiny", "--eval-temperature", "-1"], "--eval-temperature"),
        (["--preset", "tiny", "--env-start-timeout", "0"], "--env-start-timeout"),
        (["--preset", "tiny", "--revision", "main"], "--revision"),
        (["--preset", "tiny", "--exp-name", "a/b"], "--exp-name"),
        (["--no-cuda", "--evaluate", ""], "--model is missing"),
        (["--preset", "tiny", "--num-steps", "1"], "--num-steps 1 must be 2 or more"),
        (["--preset", "tiny", "--env-timeout", "1e7"], "--env-timeout 10000000.0 must be positive, at most 1e6"),
        (["--preset", "tiny", "--tasks", "1", "0", "1"], "--tasks 1 0 1 names a task twice"),
    ],
)
def test_bad_arguments(flags, words):
    with pytest.raises(vla.ArgumentError, match=words):
        vla.main(vla.parse_args(flags))


def test_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(vla.ArgumentError, match=r"--run-dir.*Not a directory"):
        vla.main(vla.parse_args(["--preset", "tiny", "--run-dir", str(tmp_path / "file")]))


def test_a_run_folder_has_one_owner(tmp_path):
    args = vla.parse_args(["--preset", "tiny", "--run-dir", str(tmp_path)])
    with vla.lock_folder(vla.run_folder_of(args)), pytest.raises(vla.ArgumentError, match="in use by a run"):
        vla.main(args)


@pytest.mark.parametrize("content", ["{", "[]", '{"algorithm_version": 3}', None])
def test_broken_args_json(tmp_path, content):
    run = tmp_path / "libero_spatial__gipo__1"
    run.mkdir()
    if content is not None:
        (run / "args.json").write_text(content)
    with pytest.raises(vla.ArgumentError, match=r"args.json|another script's or version's run"):
        vla.parse_args(["--resume", str(run)])


def test_resume_takes_the_folder_and_refuses_what_contradicts_it(tmp_path):
    args = vla.parse_args(["--preset", "tiny", "--sigma", "0.3", "--tasks", "1", "2", "--run-dir", str(tmp_path)])
    run = vla.run_folder_of(args)
    run.mkdir()
    vla.write_json(run / "args.json", vars(args) | {"algorithm_version": vla.ALGORITHM_VERSION, "wandb_id": None})
    resumed = vla.parse_args(["--resume", str(run)])
    assert resumed == dataclasses.replace(args, resume=str(run)) and resumed.tasks == (1, 2)
    machine = vla.parse_args(["--resume", str(run), "--env-timeout", "9", "--checkpoint-every", "7"])
    vla.refuse_contradictions(machine, vars(vla.saved_args(run)), "the run")
    with pytest.raises(vla.ArgumentError, match=r"--sigma 1.0 contradicts the run to resume, which has 0.3: drop the flag"):
        vla.main(vla.parse_args(["--resume", str(run), "--sigma", "1"]))
    content = json.loads((run / "args.json").read_text())
    vla.write_json(run / "args.json", content | {"script": "mine.py"})  # a fork, which may differ in the code alone
    with pytest.raises(vla.ArgumentError, match=f"{run} is a run of mine.py: continue it with that file"):
        vla.parse_args(["--resume", str(run)])
    (run / "args.json").write_text(json.dumps(content | {"sigma": "wide"}))
    with pytest.raises(vla.ArgumentError, match=r"args.json: sigma is 'wide'"):
        vla.parse_args(["--resume", str(run)])


def test_a_policy_that_has_moved_is_named_again(public, tmp_path, monkeypatch):
    """Its folder is remembered from the root; only where that is gone may --model name another."""
    shutil.copytree(public, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    flags = ["--no-cuda", "--model", "here", "--run-dir", "runs", "--suite", "libero_goal"]
    args = vla.parse_args(flags)
    assert args.model == str(tmp_path / "here")
    (run := vla.run_folder_of(args)).mkdir(parents=True)
    vla.write_json(run / "args.json", vars(args) | {"algorithm_version": vla.ALGORITHM_VERSION, "wandb_id": None})
    shutil.copytree("here", "there")
    again = vla.parse_args(["--resume", str(run), "--model", "there"])
    saved = vars(vla.saved_args(run))
    with pytest.raises(vla.ArgumentError, match=r"--model .*there contradicts the run, which has .*here: drop the flag"):
        vla.refuse_contradictions(again, saved, "the run")
    shutil.rmtree("here")
    vla.refuse_contradictions(again, saved, "the run")
    assert again.model == str(tmp_path / "there")


def test_resume_from_inside_the_run_folder(tmp_path, monkeypatch):
    """The cache of demonstrations lies beside the run, not in it."""
    args = vla.parse_args(["--preset", "tiny", "--run-dir", str(tmp_path)])
    run = vla.run_folder_of(args)
    (run / "videos").mkdir(parents=True)
    vla.write_json(run / "args.json", vars(args) | {"algorithm_version": vla.ALGORITHM_VERSION, "wandb_id": None})
    for folder, words in ((run, "."), (run / "videos", ".."), (run, "args.json"), (tmp_path, run.name)):
        monkeypatch.chdir(folder)
        resumed = vla.parse_args(["--resume", words])
        assert Path(resumed.run_dir).resolve() == tmp_path and Path(resumed.resume).resolve() == run


def test_a_policy_goes_to_another_suite_without_its_statistics(public, tmp_path):
    """Or the actions would be scaled by those of the suite that it was trained on."""
    saved_by_us(public, tmp_path / "saved", unnorm_key="libero_spatial_no_noops")
    flags = ["--no-cuda", "--evaluate", str(tmp_path / "saved")]
    assert vla.parse_args(flags).unnorm_key == "libero_spatial_no_noops"
    assert vla.parse_args([*flags, "--suite", "libero_object"]).unnorm_key == "auto"
    assert vla.parse_args([*flags, "--suite", "libero_object", "--unnorm-key", "x"]).unnorm_key == "x"


def test_a_simulator_that_cannot_be_started_ends_the_program(monkeypatch):
    """Where memory is short: the error, no process left, and signals that arrive."""
    kind, started = vla.multiprocessing.get_context("spawn").Process, []
    start = kind.start

    def start_two(self):
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(self)
        started.append(self)

    monkeypatch.setattr(kind, "start", start_two)
    monkeypatch.setattr(vla, "find_assets", lambda: "assets")
    monkeypatch.setattr(vla, "render_variables", lambda render: {})
    args = dataclasses.replace(tiny_args(), num_envs=2)
    envs = vla.VectorEnv(args)
    envs.processes[0].kill()
    envs.send(0, vla.LiberoEnv.reset, 0, 0)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(BlockingIOError):
        envs.receive(0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    envs.close()
    assert [process.is_alive() for process in started] == [False, False]


def test_a_cloned_policy_needs_no_demonstrations(tmp_path, monkeypatch):
    """They are collected for cloning alone; and a run that began with a policy which is gone says so at once."""
    made = []

    def collect(args, path, *_):
        made.append(path)
        return {"actions": torch.zeros(2, 7).numpy(), "proprio": torch.zeros(2, 8).numpy()}

    def save(folder, *_):
        assert state.exists()  # until the policy is there
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    def clone(agent, demos, interface, args, path):
        nonlocal state
        state = path.with_suffix(".part.pt")
        state.touch()

    state = None
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr(vla, "find_assets", lambda: tmp_path / "assets")
    for name, value in (("collect_demonstrations", collect), ("save_policy", save), ("clone", clone)):
        monkeypatch.setattr(vla, name, value)
    for name in ("init_random", "make_interface"):
        monkeypatch.setattr(vla, name, lambda *_: None)
    args = vla.parse_args(["--preset", "tiny", "--run-dir", str(tmp_path / "runs")])
    (cache := tmp_path / "cache").mkdir()
    folder = vla.cloned_policy(cache, args, "cpu")
    assert len(made) == 1 and not state.exists()
    assert vla.cloned_policy(cache, args, "cpu") == folder and len(made) == 1
    shutil.rmtree(folder)
    (run := vla.run_folder_of(args)).mkdir(parents=True)
    (run / "checkpoint.pt").touch()
    with pytest.raises(vla.ArgumentError, match=f"--resume: the run began with the policy {folder}, which is not there"):
        vla.cloned_policy(cache, dataclasses.replace(args, resume=str(run)), "cpu")
    assert len(made) == 1


def test_the_replay_of_all_processes_fits_twice(monkeypatch):
    """Once more while it is saved."""
    args, config = tiny_args(), tiny_agent(tiny_args())[0].config
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 0}
    monkeypatch.setattr(vla.os, "sysconf", pages.get)
    pages["SC_PHYS_PAGES"] = 10**15
    pages["SC_PHYS_PAGES"] = 2.01 * vla.make_replay(args, config)["images"].nbytes
    vla.make_replay(args, config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(vla.ArgumentError, match=r"--buffer-size .* on this machine, and as much again while it is saved, of "):
        vla.make_replay(args, config)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(vla.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vla.torch.cuda, "device_count", lambda: 4)
    for rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        vla.check_args(tiny_args(cuda=True))
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(vla.ArgumentError, match=r"--nproc-per-node is more than this machine's GPUs \(4\): lower it"):
        vla.check_args(tiny_args(cuda=True))


def test_a_bad_egl_device_is_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    vla.render_variables.cache_clear()
    with pytest.raises(vla.ArgumentError, match=r"--render egl.*device 99.*unset MUJOCO_EGL_DEVICE_ID"):
        vla.render_variables("egl")
    vla.render_variables.cache_clear()


# -------------------- Memory --------------------
def gpu_of(monkeypatch, gib):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch):
    gpu_of(monkeypatch, 80)
    full = vla.Args(model="x/y", train="full", gradient_checkpointing=True)
    with pytest.raises(
        vla.ArgumentError, match=r"--train full .* needs about 99 GiB, the GPU has 80.*--train lora \(1\d GiB\)"
    ):
        vla.check_memory(vla.PolicyConfig(), full, "cuda")
    vla.check_memory(vla.PolicyConfig(), dataclasses.replace(full, evaluate="x/y"), "cuda")
    vla.check_memory(vla.PolicyConfig(), vla.Args(model="x/y"), "cuda")
    with pytest.raises(vla.ArgumentError, match="--micro-batch 1 "):
        vla.check_memory(vla.PolicyConfig(), vla.Args(model="x/y", micro_batch="64"), "cuda")
    gpu_of(monkeypatch, 139)
    vla.check_memory(vla.PolicyConfig(), full, "cuda")
    gpu_of(monkeypatch, 8)
    with pytest.raises(vla.ArgumentError, match="nothing, take a GPU with more memory"):
        vla.check_memory(vla.PolicyConfig(), vla.Args(model="x/y"), "cuda")


def test_the_memory_check_comes_before_the_weights(folder, monkeypatch):
    gpu_of(monkeypatch, 0.0001)
    monkeypatch.setattr(vla, "load_weights", lambda *a: pytest.fail("loaded"))
    args = dataclasses.replace(tiny_args(), model=str(folder), preset="none")
    with pytest.raises(vla.ArgumentError, match="what would fit"):
        vla.load_policy(str(folder), args, torch.device("cuda"))


def test_no_chunk_fits(monkeypatch):
    """The measured size of a pass, not one as a last resort."""
    args = dataclasses.replace(tiny_args(), cuda=True)
    agent, interface = tiny_agent(tiny_args())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    with pytest.raises(vla.ArgumentError, match="not even one chunk per pass fits"):
        vla.find_micro_batch(agent, interface, args)


# -------------------- What a policy was trained with --------------------
def test_a_saved_policy_knows_its_interface(public, tmp_path):
    settings = {"append_stop": False, "preprocess": "rlinf", "jpeg": False, "noop_steps": 15, "noop_gripper": 0.0}
    settings |= {"temperature": 1.6, "dtype": "float32", "camera_size": 128, "max_steps": 512, "suite": "libero_goal"}
    settings |= {"train_init_states": 40}
    saved_by_us(public, tmp_path / "saved", **settings, unnorm_key="libero_spatial_no_noops", tasks=tuple(range(10)))
    args = vla.parse_args(["--no-cuda", "--evaluate", str(tmp_path / "saved")])
    assert {name: getattr(args, name) for name in settings} == settings
    changed = vla.parse_args(
        ["--no-cuda", "--evaluate", str(tmp_path / "saved"), "--suite", "libero_spatial", "--max-steps", "9"]
    )
    assert (changed.suite, changed.max_steps, changed.preprocess) == ("libero_spatial", 9, "rlinf")
    with pytest.raises(vla.ArgumentError, match=r"there is no .*/libero_goal__gipo__1;"):
        vla.parse_args(["--no-cuda", "--model", str(tmp_path / "saved"), "--run-dir", str(tmp_path), "--resume"])
    assert changed.tasks == ()  # it was trained on all of another suite, so this is not its first ten
    for kind in ("--evaluate", "--model"):
        flags = ["--no-cuda", kind, str(tmp_path / "saved"), "--preprocess", "oft", "--run-dir", str(tmp_path)]
        with pytest.raises(vla.ArgumentError, match=r"--preprocess oft contradicts .*saved, which has rlinf: drop the flag"):
            vla.main(vla.parse_args(flags))
    (tmp_path / "saved" / "interface.json").write_text('{"jpeg": "yes"}')
    with pytest.raises(vla.ArgumentError, match=r"interface.json: jpeg is 'yes'"):
        vla.parse_args(["--no-cuda", "--evaluate", str(tmp_path / "saved")])


def test_statistics_of_an_adapters_base(public, folder, tmp_path):
    """Public policies have those of LIBERO in dataset_statistics.json, and an adapter alone has none."""
    saved_by_us(public, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    del config["norm_stats"]
    vla.write_json(folder / "config.json", config)
    adapter = str(tmp_path / "saved" / "lora_adapter")
    own = vla.load_policy(adapter, make_args(base=str(folder)), "cpu")[2]
    assert own and own == vla.load_policy(adapter, make_args(base=str(public)), "cpu")[2]


def test_a_resume_notices_other_frozen_weights(weights, tmp_path):
    """A checkpoint holds the trained ones alone."""
    agent, _ = tiny_agent(args := tiny_args())
    before = vla.frozen_fingerprint(agent)
    frozen, trained = (next(p for p in agent.parameters() if p.requires_grad == kind) for kind in (False, True))
    trained.data += 1
    assert vla.frozen_fingerprint(agent) == before
    frozen.data.view(-1)[0] += 1
    vla.save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": 1, "world_size": 1, "frozen": before})
    with pytest.raises(vla.ArgumentError, match="began with other frozen weights than are there now"):
        vla.restore_run(tmp_path, args, agent, None, {}, None, None, None)


@pytest.mark.parametrize(
    ("kind", "words"), [("--evaluate", "a self-check"), ("--model", "leaves the policy none of 1 rollouts")]
)
def test_what_is_checked_before_a_simulator_starts(public, tmp_path, monkeypatch, kind, words):
    """That a policy has no silent fault, also for an evaluation; and that a run is long enough to train it."""

    def fail(*_):
        raise vla.ArgumentError("a self-check")

    monkeypatch.setattr(vla, "Simulators", lambda *_: pytest.fail("a simulator"))
    monkeypatch.setattr(vla, "self_check", fail)
    saved_by_us(public, tmp_path / "saved")
    flags = [
        "--no-cuda",
        kind,
        str(tmp_path / "saved"),
        "--run-dir",
        str(tmp_path),
        "--total-timesteps",
        "1",
        "--micro-batch",
        "1",
    ]
    with pytest.raises(vla.ArgumentError, match=words):
        vla.main(vla.parse_args([*flags, "--lora-rank", "4", "--lora-alpha", "2"]))


# -------------------- Versions, warnings --------------------
def test_another_simulator_is_said_in_one_line(monkeypatch):
    assert vla.version_warning() is None
    found = vla.TESTED_VERSIONS | {"mujoco": "3.3.7"}
    monkeypatch.setattr(vla.importlib.metadata, "version", lambda name: found[name])
    line = vla.version_warning()
    assert "\n" not in line and all(
        word in line for word in ("mujoco 3.3.7", "3.3.0", "libero_object", "36 grey levels", "3.4.0")
    )


def test_another_libero_is_named(monkeypatch):
    """From its repository it is no package hf-libero."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vla.importlib.metadata, "version", version)
    with pytest.raises(vla.ArgumentError, match=r"the package \w+ is not installed: if LIBERO came from elsewhere"):
        vla.version_warning()


def test_an_old_moviepy_is_found_before_training(monkeypatch):
    original = importlib.metadata.version
    monkeypatch.setattr(vla.importlib.metadata, "version", lambda name: "1.0.3" if name == "moviepy" else original(name))
    with pytest.raises(vla.ArgumentError, match="needs moviepy 2 or newer"):
        vla.check_args(vla.parse_args(["--preset", "tiny", "--capture-video"]))


# -------------------- A saved policy elsewhere --------------------
def test_a_folder_of_another_user_counts_as_absent(monkeypatch):
    """Path.is_dir() raises PermissionError where the parent may not be entered."""

    def is_dir(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(vla.Path, "is_dir", is_dir)
    with pytest.raises(vla.ArgumentError, match="the base is neither a folder nor a hub id such as owner/name: --base says"):
        vla.find_folder("/nobody/no/such/base", "the base", ": --base says where it is now")


def test_what_a_policy_knows_of_its_suite_and_adapters(tmp_path):
    """Its tasks are numbers of its own suite; rank and alpha of its adapters need no flags."""
    interface = {"suite": "libero_90", "tasks": [50, 51], "lora_rank": 64, "lora_alpha": 8}
    (tmp_path / "interface.json").write_text(json.dumps(interface))
    flags = ["--evaluate", str(tmp_path), "--no-cuda"]
    args = vla.parse_args(flags)
    assert (args.suite, args.tasks, args.lora_rank, args.lora_alpha) == ("libero_90", (50, 51), 64, 8)
    assert vla.parse_args([*flags, "--suite", "libero_90", "--tasks", "3"]).tasks == (3,)
    args = vla.parse_args([*flags, "--suite", "libero_object"])
    assert (args.suite, args.tasks, args.lora_rank) == ("libero_object", vla.Args().tasks, 64)
    vla.check_args(args)
    with pytest.raises(vla.ArgumentError, match="--eval-episodes 0 must be between 1 and 50"):
        vla.parse_args([*flags, "--eval-episodes", "0"])


def test_a_head_that_was_never_trained_is_noticed(weights, capsys):
    agent = golden_agent(weights)
    vla.self_check(agent, check_batch())
    assert "WARNING" not in capsys.readouterr().out
    with torch.no_grad():
        agent.language_model["lm_head"].weight *= 1e-3
    vla.self_check(agent, check_batch())
    assert "WARNING: the actions are nearly uniform" in (output := capsys.readouterr().out) and "L1 regression" in output


def test_an_evaluation_without_success_is_a_warning():
    args = vla.Args(train_init_states=40)
    result = {"success_rate": 0.5, "episodes": 2, "successes": [[0, 0, 1.0], [0, 45, 0.0]]}
    line = "success 50.0% of 2 episodes (greedy"
    assert vla.describe(result, args, trained=(0,)) == f"{line}; 1 begin as RL's own episodes do)"
    assert vla.describe(result, args, trained=(1,)) == f"{line}; 0 begin as RL's own episodes do)"  # another task
    assert vla.describe(result, args, trained=None) == f"{line})"  # a policy that RL here has never seen
    assert "WARNING: no episode succeeded" in vla.describe(result | {"success_rate": 0.0}, args, None)
    assert "sampled at temperature 1.6" in vla.describe(result, dataclasses.replace(args, eval_temperature=1.6), None)


def test_processes_of_an_evaluation_sample_by_numbers_of_their_own(monkeypatch, tmp_path):
    """torchrun's processes have equal seeds up to there; a single process keeps its own."""
    args, seeds = dataclasses.replace(tiny_args(tasks=(0,)), evaluate=str(tmp_path), run_dir=str(tmp_path)), []
    monkeypatch.setattr(vla, "self_check", lambda *a: None)
    monkeypatch.setattr(vla, "catch_signals", lambda at_exit: [])
    monkeypatch.setattr(vla, "Simulators", lambda *a: seeds.append(torch.initial_seed()) or sys.exit())
    agent = SimpleNamespace(config=SimpleNamespace(image_size=4))
    for rank in (0, 1, 2):
        torch.manual_seed(7)
        start = (rank, 3, agent, None, {}, SimpleNamespace(inputs=lambda *a: {}))
        monkeypatch.setattr(vla, "start", lambda args, at_exit, start=start: start)
        with contextlib.ExitStack() as at_exit, pytest.raises(SystemExit):
            vla.evaluate_saved_policy(args, at_exit)
    assert seeds[0] == 7 and len({*seeds}) == 3


def test_a_run_from_before_the_successes_goes_on(monkeypatch, tmp_path):
    """Its returns were its successes: means are over all of them, not over those since the resume."""
    progress, agent = vla.Progress(), SimpleNamespace(parameters=list)
    older = {"returns": [1.0, 0.0], "lengths": [10, 30], "failures": {}}
    own = {"progress": older, "replay": {}, "episodes": [], "rng": torch.get_rng_state()}
    own |= {"numpy_rng": np.random.default_rng(0).bit_generator.state, "cuda_rng": None}
    (tmp_path / "checkpoint-4").mkdir()
    vla.save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": 4, "world_size": 1})
    vla.save_checkpoint(tmp_path / "checkpoint-4" / "process-0.pt", own)
    monkeypatch.setattr(vla, "load_training_state", lambda *a: None)
    monkeypatch.setattr(vla, "as_shards", contextlib.nullcontext)
    simulators = SimpleNamespace(restore=lambda episodes: None)
    args = dataclasses.replace(tiny_args(), num_envs=0)
    vla.restore_run(tmp_path, args, agent, None, {}, progress, simulators, np.random.default_rng(1))
    assert progress.recent_means("cpu") == (0.5, 0.5, 20.0)
    progress.count({"task": 0, "success": 1.0, "return": 1.0, "length": 20})
    assert progress.recent_means("cpu")[0] == pytest.approx(2 / 3)


def test_what_a_killed_run_left_of_a_checkpoint_goes_with_the_resume(monkeypatch, tmp_path):
    """It may be of an iteration that is never saved again, and full training's checkpoints have 79 GB."""
    agent = SimpleNamespace(parameters=list)
    vla.save_checkpoint(tmp_path / "checkpoint.pt", {"iteration": 4, "world_size": 1})
    for name in ("checkpoint-4", "checkpoint-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "process-0.tmp").touch()
    monkeypatch.setattr(vla, "load_training_state", lambda *a: sys.exit())
    monkeypatch.setattr(vla, "as_shards", contextlib.nullcontext)
    with pytest.raises(SystemExit):
        vla.restore_run(tmp_path, tiny_args(), agent, None, {}, None, None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint.pt"]


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, (True, 1.0)), (1.6, (False, 1.6))])
def test_an_evaluation_is_greedy_or_sampled(temperature, expected):
    args = dataclasses.replace(tiny_args(tasks=(0,)), eval_episodes=2, eval_temperature=temperature)
    asked = []

    class TwoSteps:
        """A simulator whose second episode succeeds; each ends after one chunk."""

        groups, images, proprio, tasks = [[0]], torch.zeros(1), torch.zeros(1), torch.zeros(1)
        ended, lost, episodes = [False], [False], [{}]

        def start(self, i, task, init_state):
            self.episodes[i] = {"task": task, "init_state": init_state, "return": 0.0}
            self.ended[i] = False

        def act(self, i, actions):
            self.episodes[0]["return"] = self.episodes[0]["success"] = float(self.episodes[0]["init_state"] == 1)
            self.acted = True

        def wait(self, indices):
            self.ended[0] = self.__dict__.pop("acted", False)

    def act(deterministic, temperature):
        asked.append((deterministic, temperature))
        return (torch.zeros(1, 8, 7),)

    agent = SimpleNamespace(get_action_and_logprob=act)
    interface = SimpleNamespace(inputs=lambda *a: {}, actions=lambda tokens: tokens)
    result = vla.evaluate(agent, args, interface, TwoSteps())
    assert result["successes"] == [[0, 0, 0.0], [0, 1, 1.0]] and set(asked) == {expected}

    class Dies(TwoSteps):
        """Its process dies in the first episodes: these are no failures of the policy."""

        def wait(self, indices):
            super().wait(indices)
            self.lost[0] = self.ended[0] and self.deaths > 0
            self.deaths -= self.lost[0]

    simulators = Dies()
    simulators.deaths, simulators.episodes = 2, [{}]
    assert vla.evaluate(agent, args, interface, simulators)["successes"] == result["successes"]


def test_tasks_that_a_policy_was_trained_on(tmp_path):
    """By its interface.json; on another suite none, and for the checkpoints of others nothing is known."""
    args = dataclasses.replace(tiny_args(tasks=(0,)), evaluate=str(tmp_path))
    assert vla.trained_tasks(args) is None
    for suite, tasks, expected in ((args.suite, [2, 3], (2, 3)), (args.suite, [], tuple(range(10))), ("libero_goal", [2], ())):
        (tmp_path / "interface.json").write_text(json.dumps({"suite": suite, "tasks": tasks}))
        assert vla.trained_tasks(args) == expected


def test_a_stopped_evaluation_is_not_kept(tmp_path, monkeypatch, capsys):
    """Failures take all the steps they may, so the episodes that are over first are the better ones."""

    def evaluate(args, agent, interface, simulators, stop_signals):
        if stop is True:
            signal.raise_signal(signal.SIGTERM)
        return {"success_rate": 1.0, "return_mean": 1.0, "episodes": 1, "success_by_task": {}, "successes": [[0, 0, 1.0]]}

    interface = SimpleNamespace(inputs=lambda *_: {}, device="cpu")
    agent = SimpleNamespace(config=SimpleNamespace(image_size=8))
    monkeypatch.setattr(vla, "start", lambda args, at_exit: (0, 1, agent, None, {}, interface))
    monkeypatch.setattr(vla, "Simulators", lambda *_: SimpleNamespace(close=lambda: None))
    for name, value in (("self_check", None), ("settings_of", {}), ("trained_tasks", None)):
        monkeypatch.setattr(vla, name, lambda *_, value=value: value)
    monkeypatch.setattr(vla, "evaluate", evaluate)
    args = dataclasses.replace(tiny_args(tasks=(0,)), evaluate="policy", run_dir=str(tmp_path))
    for stop, kept in ((False, 1), (True, 1), ("elsewhere", 1), (False, 2)):
        with contextlib.ExitStack() as at_exit:
            monkeypatch.setattr(vla, "any_rank", (lambda flag: True) if stop == "elsewhere" else bool)  # another process
            if stop:
                with pytest.raises(SystemExit):
                    vla.evaluate_saved_policy(args, at_exit)
                assert "stopped after 1 episodes: nothing is kept of them" in capsys.readouterr().out
            else:
                vla.evaluate_saved_policy(args, at_exit)
        (file,) = tmp_path.rglob("evaluation.json")
        assert len(json.loads(file.read_text())["evaluations"]) == kept


def test_a_head_that_would_not_be_saved_is_named(public, tmp_path):
    """Of a fork of a checkpoint: the run's own checkpoints have it, its saved policies would not."""
    args = make_args()
    agent, tokenizer, norm_stats = vla.load_policy(str(public), args, "cpu")
    agent.action_head = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"action_head.weight would not be saved: give it a file of its own wherever"):
        vla.save_policy(tmp_path / "model", agent, tokenizer, norm_stats, args)
    assert not (tmp_path / "model").exists()


def test_a_copy_of_a_checkpoint_is_kept(tmp_path):
    for name in ("checkpoint-7", "checkpoint-98", "checkpoint-98-keep", "checkpoint-old"):
        (tmp_path / name).mkdir()
    assert vla.checkpoint_folders(tmp_path) == {tmp_path / "checkpoint-7", tmp_path / "checkpoint-98"}


def test_a_subclass_of_the_simulator_plays_its_own_steps(monkeypatch):
    """Calls are named by LiberoEnv's methods; where a fork builds another class, that one's are meant."""

    class Mine(vla.LiberoEnv):
        def __init__(self, args):
            self.args = args

        def step(self, actions):
            return "mine", actions

    class Fork:  # not a patched `LiberoEnv.__new__`, which Python does not forget when it is taken back
        step = vla.LiberoEnv.step

        def __new__(cls, args):
            return Mine(args)

    calls = [(vla.LiberoEnv.step, (3,)), (lambda env, number: (type(env), number), (5,))]
    answers = []
    connection = SimpleNamespace(send=answers.append, recv=lambda: calls.pop(0) if calls else (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr(vla, "LiberoEnv", Fork)
    monkeypatch.setattr(vla, "setup_libero", lambda path: None)
    monkeypatch.setattr(vla.os, "_exit", lambda code: None)
    monkeypatch.setattr(vla.os, "environ", dict(os.environ))  # which the worker's process changes for good
    vla.env_worker(connection, tiny_args(), {"LIBERO_ASSETS": ""})
    assert [answer for kind, answer in answers if kind == "answer"] == [("mine", 3), (Mine, 5)], answers


def test_resume_and_evaluate_contradict_each_other():
    with pytest.raises(vla.ArgumentError, match="--resume and --evaluate contradict each other"):
        vla.main(dataclasses.replace(tiny_args(tasks=(0,)), resume="run", evaluate="policy"))


def test_a_run_without_evaluations_records_nothing():
    with pytest.raises(vla.ArgumentError, match="--capture-video records evaluations: drop it, or give 1 or more"):
        vla.check_args(tiny_args(capture_video=True, eval_episodes=0))


def test_adapters_stay_off_a_base_that_has_other_weights_now(public, folder, tmp_path, capsys):
    """Evaluated on what lies in the place of their base today: the merged weights are taken, or --base refused."""
    agent = saved_by_us(folder, tmp_path / "saved")
    vla.load_policy(str(tmp_path / "saved"), make_args(), "cpu")
    assert "unmerged" in capsys.readouterr().out
    shards = sorted(folder.glob("*.safetensors"))
    tensors = load_file(shards[0])
    save_file({key: value + 1 for key, value in tensors.items()}, shards[0], {"format": "pt"})
    again, *_ = vla.load_policy(str(tmp_path / "saved"), make_args(), "cpu")
    assert "is gone or has other weights now: its adapters stay merged" in capsys.readouterr().out
    layers = [dict(a.named_modules()) for a in (agent, again)]
    for name, layer in layers[0].items():
        if isinstance(layer, vla.LoRALinear):
            torch.testing.assert_close(layers[1][name].merged(), layer.merged(), atol=1e-2, rtol=1e-2)
    with pytest.raises(vla.ArgumentError, match=r"--base .* has other weights than those on which"):
        vla.load_policy(str(tmp_path / "saved"), make_args(base=str(folder)), "cpu")
    vla.load_policy(str(tmp_path / "saved"), make_args(base=str(public)), "cpu")  # the same weights elsewhere
    assert "unmerged" in capsys.readouterr().out


def test_training_success_is_that_of_all_processes(monkeypatch):
    progress = vla.Progress()
    assert progress.recent_means("cpu") == (None, None, None)
    for success in [0.0] * 50 + [1.0] * 100:
        progress.count({"task": 3, "success": success, "return": -2.0, "length": 20})
    assert progress.recent_means("cpu") == (1.0, -2.0, 20.0) and sum(progress.failures[3]) == 0
    other = torch.tensor([300.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # another process's episodes, successes, returns, steps
    monkeypatch.setattr(vla, "sum_over_ranks", lambda sums: sums + other)
    assert progress.recent_means("cpu") == (0.25, -0.5, 5.0)


def test_a_bad_number_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    def train(args, at_exit):
        raise vla.BadNumber("losses/entropy is nan at step 8")

    monkeypatch.setattr(vla, "train", train)
    args = vla.parse_args(["--preset", "tiny", "--run-dir", str(tmp_path)])
    with pytest.raises(vla.BadNumber, match="nan at step 8; last good checkpoint: none yet"):
        vla.main(args)
    (tmp_path / "libero_spatial__gipo__1").mkdir()
    (tmp_path / "libero_spatial__gipo__1" / "checkpoint.pt").touch()
    with pytest.raises(vla.BadNumber, match=r"last good checkpoint: .*checkpoint.pt"):
        vla.main(args)


def test_one_process_speaks(monkeypatch, capsys):
    vla.say("from the first")
    monkeypatch.setenv("RANK", "1")
    vla.say("from the second")
    assert capsys.readouterr().out == "from the first\n"


# -------------------- Small ones --------------------
def test_padding_and_truncation_of_a_tokenizer_are_switched_off(tmp_path):
    tokenizer = vla.build_word_tokenizer(["pick up the bowl"])
    config = vla.tiny_config(tokenizer.get_vocab_size())
    expected = vla.encode_prompt(tokenizer, "pick up the bowl", config)
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(max_length=6)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert vla.encode_prompt(vla.load_tokenizer(tmp_path / "tokenizer.json"), "pick up the bowl", config) == expected


@pytest.mark.parametrize("ratio", ["action", "chunk"])
def test_the_entropy_bonus_is_per_token_whatever_the_ratio(ratio):
    results = []
    for unit in ("token", ratio):
        args = tiny_args(ratio=unit, ent_coef=1.0, reward_scale=1e-6, adv_std_floor=1.0, max_grad_norm=1e9, vf_coef=0.0)
        agent, interface = tiny_agent(args)
        mb = random_minibatch(agent, interface, args)
        mb["rewards"] *= 0
        for p in agent.value_head.parameters():  # no values and no rewards: no advantages, so the bonus alone has a gradient
            p.data.zero_()
        results.append(gradients_after(agent, mb, interface, args))
    assert results[0][1]["losses/entropy"] == pytest.approx(results[1][1]["losses/entropy"], rel=1e-5)
    assert 0 < results[0][1]["losses/entropy"] < math.log(256)
    (first, _), (other, _) = results
    assert first.keys() == other.keys() and max(value.abs().max() for value in first.values()) > 1e-6
    for name in first:
        torch.testing.assert_close(first[name], other[name], rtol=1e-3, atol=1e-7)


def test_full_size_defaults_are_the_tiny_presets_where_they_can_be():
    full, tiny = vla.Args(), vla.parse_args(["--preset", "tiny"])
    names = "sigma critic_warmup adv_std_floor gamma gae_lambda ratio kernel"
    assert all(getattr(full, name) == getattr(tiny, name) for name in names.split())
    rollouts = [a.buffer_size / (a.num_envs * a.num_steps * vla.CHUNK) for a in (full, tiny)]
    assert rollouts == [10, 10]


def test_a_stopped_reader_does_not_stop_the_run():
    code = "import gipo_vla_libero as vla\nfor i in range(3): vla.say('x' * 100_000)\nopen('/dev/stderr', 'w').write('end')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read().endswith(b"end") and process.wait(60) == 0


@pytest.mark.parametrize("kind", ["missing", "damaged", "truncated"])
def test_a_checkpoint_of_a_run_that_cannot_be_read(tmp_path, kind):
    agent, _ = tiny_agent(tiny_args())
    optimizer = torch.optim.AdamW(vla.optimizer_parameters(agent), lr=1e-3)
    if kind == "damaged":
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / ".metadata").write_bytes(b"nonsense")
    if kind == "truncated":
        vla.dcp.save(vla.training_state(agent, optimizer), checkpoint_id=tmp_path / "weights", no_dist=True)
        (file,) = (tmp_path / "weights").glob("*.distcp")
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(vla.ArgumentError, match=r"weights is missing or damaged.*--overwrite"):
        vla.load_training_state(tmp_path / "weights", agent, optimizer)


def test_damaged_demonstrations_are_named(tmp_path):
    (tmp_path / "demos.npz").write_bytes(b"nonsense")
    with pytest.raises(vla.ArgumentError, match=r"demos.npz is missing or damaged .*delete it"):
        vla.collect_demonstrations(None, tmp_path / "demos.npz", (0,), range(1), 1)


def test_public_statistics_stay_usable():
    vla.check_statistics(DATA, "x", True)
