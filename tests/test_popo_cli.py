"""popo_countdown.py end to end: every flag, what a run leaves, budgets, replay, learning, resuming, bad input."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, differences, read_json, read_pt, read_scalars, run_script, start_script, wait_for_line

import popo_countdown as popo

NET = "--hidden-size 32 --num-layers 1 --num-heads 2"
TINY = f"{NET} --num-prompts 8 --group-size 4 --warmup-steps 40 --eval-episodes 16 --eval-samples 2"
SHORT = f"{TINY} --total-timesteps 300 --eval-every 128 --checkpoint-every 64"  # rounded up to 320: 10 iterations
LONGER = "--warmup-steps 200 --warmup-learning-rate 3e-3"  # for more than two numbers
TWO = f"--env-id countdown-2 {SHORT} --warmup-steps 100 --warmup-learning-rate 3e-3"

RUNS = {  # each runs once, and every field of Args appears here or in SPECIAL
    "popo": f"{TWO} --exp-name a --seed 3 --learning-rate 3e-4",
    "grpo": f"{TWO} --method grpo --ent-coef 0 --kl-coef 0.1 --max-grad-norm 0.5 --clip-low 0.1 --clip-high 0.1 --dual-clip 3",
    "filter": f"--env-id countdown-34 {SHORT} --method grpo-filter --format-reward 0.1 --updates-per-iteration 2 {LONGER}",
    "dapo": f"{TWO} --method dapo --max-gen-batches 3 --temperature 0.9 --eval-temperature 0.6",
    "stale": f"{TWO} --buffer-groups 100 --replay-age-min 3 --max-age 6 --max-reuse 2 --is-cap inf --is-level sequence",
    "pi_old": f"{TWO} --replay ineff --objective pi_old --torch-threads 1",
    "behaviour": f"{TWO} --objective behaviour",
    "gipo": f"{TWO} --objective gipo --sigma 0.4 --sigma-neg-ratio 0.8 --kernel cauchy --is-level geometric",
    "sapo": f"{TWO} --objective sapo --lag 2",
    "cispo": f"{TWO} --method grpo --objective cispo --is-cap 3 --lag 5",
    "m2po": f"{TWO} --method grpo-filter --objective m2po --m2-threshold 0.1 --lag 1",
}
SPECIAL = f"{TWO} --overwrite --resume --evaluate --track --wandb-project --cuda"
# In test_popo_model.py.
SPECIAL += " --model --prompt --max-number --max-new-tokens --micro-batch --generation-batch --dtype --export"

RESULT_KEYS = set(
    "env_id exp_name seed total_timesteps iterations updates eval_success_rate eval_return_mean eval_episodes "
    "train_return_mean train_success_rate sps wall_seconds peak_memory_mb git_commit versions args curve".split()
)
TIMING = {"sps", "wall_seconds", "peak_memory_mb", "git_commit"}


def run_inline(run_dir, flags, name="run"):
    """Run to the end in this process: -> the result and the run folder."""
    args = popo.parse_args([*flags.split(), "--run-dir", str(run_dir)])
    result = popo.main(args)
    return result, run_dir / f"{args.env_id}__{args.exp_name}__{args.seed}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(name) -> the result and the folder of one of RUNS, which runs at the first call; all share one run folder."""
    run_dir, done = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in done:
            done[name] = run_inline(run_dir, RUNS[name] if "--exp-name" in RUNS[name] else f"{RUNS[name]} --exp-name {name}")
        return done[name]

    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """command(flags) -> exit code, stdout, stderr of the file run as __main__, in this process to save the imports."""

    def run(flags):
        monkeypatch.setattr(sys, "argv", ["popo_countdown.py", *flags])
        code = 0
        try:
            runpy.run_path(str(ROOT / "popo_countdown.py"), run_name="__main__")
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


# -------------------- Good runs --------------------
def test_every_flag_is_exercised():
    words = {word for flags in [*RUNS.values(), SPECIAL] for word in flags.split()} | {"--run-dir"}
    flags = [field.name.replace("_", "-") for field in dataclasses.fields(popo.Args)]
    assert [flag for flag in flags if not {f"--{flag}", f"--no-{flag}"} & words] == []


@pytest.mark.parametrize("name", RUNS)
def test_run_leaves_what_the_design_says(finished, name):
    result, folder = finished(name)
    files = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert files == {".lock", "args.json", "checkpoint.pt", "model.pt", "best_model.pt", "result.json"}
    assert result == read_json(folder / "result.json") and result.keys() == RESULT_KEYS
    more = {"algorithm_version": 1, "wandb_id": None, "script": "popo_countdown.py"}
    assert result["args"] | more == read_json(folder / "args.json")
    assert result["iterations"] == 10 and result["eval_episodes"] == 32
    clipped, lag = result["args"]["objective"] in popo.CLIPPED, result["args"]["lag"]
    assert result["curve"][0]["updates"] == 0 and len(result["curve"]) == 4
    assert result["curve"][-1] == {
        "rollouts": result["total_timesteps"],
        "updates": result["updates"],
        "success_rate": result["eval_success_rate"],
    }
    scalars = read_scalars(folder)
    assert scalars.keys() >= {
        *("charts/episodic_return", "charts/episodic_success", "charts/SPS", "charts/learning_rate", "charts/updates"),
        *("batch/effective_frac_fresh", "batch/frac_all_correct", "batch/frac_all_wrong", "batch/groups"),
        *("batch/frac_well_formed", "batch/frac_cut_off", "batch/response_length"),
        *("losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/grad_norm", "eval/success_rate"),
        *("eval/return_mean", "time/generate", "time/logprob", "time/update"),
        *("gipo/effective_sample_size", "gipo/utilization", "gipo/logratio_std", "gipo/policy_lag"),
    }
    clips = {f"clip/frac_{side}_{age}" for side in ("low", "high") for age in ("fresh", "replay")}
    assert clips <= scalars.keys() if clipped else not clips & scalars.keys()
    assert ("is/log_ratio_max_fresh" in scalars) == ("age/0/logratio_std" in scalars) == (lag == 0)
    first = min(step for step, _ in scalars["gipo/policy_lag"])
    assert first == 32 * (lag + 1) or result["args"]["method"] in ("dapo", "popo", "grpo-filter")
    assert min(value for _, value in scalars["gipo/policy_lag"]) >= lag
    assert ("batch/n_replayed" in scalars) == ("replay/buffer_size" in scalars) == (result["args"]["method"] == "popo")
    assert max([value for _, value in scalars.get("is/log_ratio_max_fresh", [])], default=0) < 1e-4
    shares = [dict(scalars[f"batch/{key}"]) for key in ("effective_frac_fresh", "frac_all_correct", "frac_all_wrong")]
    for step in shares[0]:
        assert sum(share[step] for share in shares) == pytest.approx(1, abs=1e-6)


def test_replay_is_logged(finished):
    _, folder = finished("stale")
    scalars = read_scalars(folder)
    ages = [value for _, value in scalars["replay/mean_age"]]
    assert min(ages) >= 3 and max(value for _, value in scalars["replay/max_age"]) <= 6
    assert max(value for _, value in scalars["replay/reuse_count"]) <= 2
    assert scalars.keys() >= {"is/w_mean", "is/w_max", "is/kl_b_prox", "replay/pass_rate_stored", "batch/refill_shortfall"}
    assert all(0 < value <= 1.001 for _, value in scalars["is/effective_sample_size"])
    assert all(value == 0 for _, value in scalars["is/frac_capped"])  # --is-cap inf
    behaviour = read_scalars(finished("behaviour")[1])
    assert "is/w_mean" in behaviour and "is/frac_capped" not in behaviour  # its loss has no cap
    delayed = read_scalars(finished("sapo")[1])
    assert [value for _, value in delayed["batch/refill_shortfall"]][:2] == [0, 0]  # --lag 2: no group has arrived


def test_rollout_budget(finished):
    """Every method but dapo makes exactly one batch per iteration; dapo as many as it needs, at most --max-gen-batches."""
    for name in RUNS:
        rollouts = finished(name)[0]["total_timesteps"]
        assert (320 < rollouts <= 960) if name == "dapo" else rollouts == 320


def test_dapo_batches_are_full_of_effective_groups(finished):
    _, folder = finished("dapo")
    scalars = read_scalars(folder)
    groups = [value for _, value in scalars["batch/groups"]]
    rollouts = [step for step, _ in scalars["batch/groups"]]
    batches = [(b - a) // 32 for a, b in itertools.pairwise([0, *rollouts])]
    assert set(batches) <= {1, 2, 3} and len(set(batches)) > 1
    assert all(size == 8 for size, batch in zip(groups, batches, strict=True) if batch < 3)


def test_saved_model_evaluates_to_the_runs_own_result(finished, command):
    result, folder = finished("popo")
    flags = ["--evaluate", str(folder / "model.pt"), "--eval-episodes", "16", "--eval-samples", "2"]
    code, out, _ = command(flags)
    assert code == 0 and json.loads(out[out.index("{") :])["success_rate"] == result["eval_success_rate"]
    code, _, err = command([*flags, "--model", "smollm2"])  # not a flag that --model brings
    assert code == 2 and err.startswith("error: --model smollm2 contradicts the run of the model, which has None")
    code, _, err = command([*flags, "--temperature", "0.1"])  # it would change nothing
    assert code == 2 and err.startswith("error: --temperature 0.1 contradicts the run of the model")
    best = read_pt(folder / "best_model.pt")
    assert best["score"][1] == max(point["success_rate"] for point in result["curve"])


def test_methods_of_a_seed_start_from_the_same_weights(tmp_path):
    """The warm-up is made once; a run that finds it equals the run that made it."""
    flags = f"{TWO} --total-timesteps 64"
    first, _ = run_inline(tmp_path, f"{flags} --exp-name first")
    (cached,) = (tmp_path / "warmup").iterdir()
    before = cached.stat().st_mtime_ns
    second, _ = run_inline(tmp_path, f"{flags} --exp-name second")
    grpo, _ = run_inline(tmp_path, f"{flags} --exp-name grpo --method grpo")
    assert cached.stat().st_mtime_ns == before and len([*(tmp_path / "warmup").iterdir()]) == 1
    assert first["curve"] == second["curve"] and first["curve"][0] == grpo["curve"][0]
    models = [read_pt(tmp_path / f"countdown-2__{name}__1" / "model.pt")["model"] for name in ("first", "second", "grpo")]
    assert differences(models[0], models[1]) == [] and differences(models[0], models[2])
    run_inline(tmp_path, f"{flags} --exp-name other --seed 2")
    result, folder = run_inline(tmp_path, f"{flags} --exp-name longer --warmup-steps 41 --eval-episodes 0")
    assert result["eval_episodes"] == 0 and not (folder / "best_model.pt").exists()
    assert differences(read_pt(folder / "model.pt")["model"], read_pt(folder / "checkpoint.pt")["model"]) == []
    assert len([*(tmp_path / "warmup").iterdir()]) == 3


def test_a_run_does_not_start_from_the_warm_up_of_other_code(tmp_path, monkeypatch, capsys):
    """Weights are cached for equal arguments; whoever edits the network, the task or the warm-up gets new ones. So does
    another number of threads, which rounds otherwise: a run must not depend on what ran before in the same folder."""
    flags = f"{TWO} --total-timesteps 64"
    run_inline(tmp_path, f"{flags} --exp-name first")
    run_inline(tmp_path, f"{flags} --exp-name second")
    assert "warm-up: done before" in capsys.readouterr().out
    original = popo.warm_up

    def edited(policy, task, args, progress):
        original(policy, task, args, progress)

    monkeypatch.setattr(popo, "warm_up", edited)
    run_inline(tmp_path, f"{flags} --exp-name edited")
    try:
        run_inline(tmp_path, f"{flags} --exp-name threads --torch-threads 2")
    finally:
        torch.set_num_threads(1)
    assert "warm-up: done before" not in capsys.readouterr().out and len([*(tmp_path / "warmup").iterdir()]) == 3


def test_the_buffer_holds_two_batches():
    """Or 64 groups, as in every committed run; with fewer, large batches could never be refilled."""
    sizes = [(8, None, 64), (32, None, 64), (256, None, 512), (256, 100, 100)]
    for num_prompts, given, expected in sizes:
        args = popo.with_defaults(popo.Args(num_prompts=num_prompts, buffer_groups=given))
        assert args.buffer_groups == expected
        popo.check_args(args)
    for saved in (None, 64):  # 64: of a run from before
        popo.check_args(popo.with_defaults(popo.Args(num_prompts=256, method="grpo", buffer_groups=saved)))


def test_warm_up_teaches_the_format_only():
    """From random weights hardly any response is well-formed; after it most are, at the chance level of correctness."""
    args = popo.Args(hidden_size=48, num_layers=2, num_heads=2, warmup_steps=100, format_reward=0.1, warmup_learning_rate=5e-3)
    torch.manual_seed(0)
    task, policy = popo.make_task_and_policy(args)
    untrained = popo.evaluate(policy, args, task, 256)
    lines = []
    popo.warm_up(policy, task, args, lines.append)
    assert lines[0].startswith("warm-up: step 1 of 100, loss 2.") and len(lines) == 100
    trained = popo.evaluate(policy, args, task, 256)
    formed = [(r["return_mean"] - 0.9 * r["success_rate"]) / 0.1 for r in (untrained, trained)]
    assert formed[0] < 0.02 and formed[1] > 0.4
    assert trained["success_rate"] < 0.15 * formed[1]


def test_track(tmp_path):
    """The real package, offline: a run of the right name, with the configuration and the event file."""
    flags = f"{TWO} --total-timesteps 64 --track --wandb-project paper".split()
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    process, _ = run_script("popo_countdown", tmp_path / "runs", *flags, **environment)
    assert process.returncode == 0, process.stderr
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert read_json(tmp_path / "runs" / "countdown-2__popo__1" / "args.json")["wandb_id"] in log.name
    assert all(word in content for word in (b"paper", b"buffer_groups", b"batch/effective_frac_fresh", b"losses/policy_loss"))


def test_progress_updates_in_place_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_inline(tmp_path, f"{TWO} --total-timesteps 96")
    shown = capsys.readouterr().out
    assert shown.count("\rstep ") == 3
    for line in shown.split("\r")[1:]:  # a shorter one leaves nothing of the one before
        assert line.split("\n")[0].endswith("\x1b[K")


# -------------------- Replay inside a run --------------------
def watch(monkeypatch):
    """Record what is pushed, selected and trained on: lists, one entry per call."""
    pushed, selected, batches = [], [], []
    push, select, stack = popo.GroupBuffer.push, popo.GroupBuffer.select, popo.stack_groups

    def recording_select(self, count, iteration, keys):
        chosen = select(self, count, iteration, keys)
        selected.append((iteration, count, list(keys), chosen))
        return chosen

    monkeypatch.setattr(popo.GroupBuffer, "push", lambda self, groups: (pushed.append(list(groups)), push(self, groups)))
    monkeypatch.setattr(popo.GroupBuffer, "select", recording_select)
    monkeypatch.setattr(popo, "stack_groups", lambda groups, device: (batches.append(list(groups)), stack(groups, device))[1])
    return pushed, selected, batches


def test_popo_replaces_every_ineffective_group(tmp_path, monkeypatch):
    pushed, selected, batches = watch(monkeypatch)
    run_inline(tmp_path, TWO)
    assert len(pushed) == len(selected) == 10
    assert sum(len(chosen) for *_, chosen in selected) > 5
    batches = iter(batches)
    for stored, (iteration, wanted, keys, chosen) in zip(pushed, selected, strict=True):
        assert all(group["version"] == iteration for group in stored)  # replayed groups are never pushed again
        assert all(popo.is_effective(group["rewards"][None]).item() for group in stored)
        assert wanted == 8 - len(stored) and len(keys) <= 8
        assert not {group["key"] for group in chosen} & set(keys)
        if not stored and not chosen:
            continue
        batch = next(batches)
        assert len(batch) == len(stored) + len(chosen) <= 8
        assert {id(group) for group in batch} == {id(group) for group in [*stored, *chosen]}
        for group in batch:
            assert torch.equal(group["advantages"], popo.group_advantages(group["rewards"]))
            assert group["version"] < iteration or any(group is own for own in stored)
    assert next(batches, None) is None


@pytest.mark.parametrize("method", ["grpo", "popo"])
def test_lag(method, tmp_path, monkeypatch):
    """Every batch was written K iterations ago, or is a replayed one and older; the first K iterations only generate."""
    pushed, _, batches = watch(monkeypatch)
    result, _ = run_inline(tmp_path, f"{TWO} --method {method} --lag 3 --objective gipo")
    versions = [sorted({group["version"] for group in batch}) for batch in batches]
    assert max(version for batch in versions for version in batch) == 7
    if method == "grpo":
        assert versions == [[version] for version in range(1, 8)] and result["updates"] == 7 * 4
    else:
        assert [{group["version"] for group in groups} for groups in pushed[:3]] == [set()] * 3
        assert all({group["version"] for group in groups} <= {i - 2} for i, groups in enumerate(pushed))


@pytest.mark.parametrize("more", ["--lag 4 --objective gipo", "--kl-coef 0.1"])
def test_resumed_with_a_lag_or_a_reference(more, tmp_path, monkeypatch):
    """The batches that wait are part of the checkpoint, and so is the start policy that the penalty keeps to."""
    flags = f"{TWO} {more}"
    _, reference = run_inline(tmp_path / "reference", flags)
    original = popo.generate_groups

    def die(policy, task, args, iteration):
        if iteration == 7:
            raise Crash
        return original(policy, task, args, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(popo, "generate_groups", die)
        with pytest.raises(Crash):
            run_inline(tmp_path / "crashed", flags)
    time.sleep(1.0)
    _, folder = run_inline(tmp_path / "crashed", f"{flags} --resume")
    assert_equal_runs(folder, reference)


def test_first_iteration_equals_grpo_filter(tmp_path):
    """The buffer is empty then: the same update, bit for bit."""
    flags = f"{TWO} --total-timesteps 32"
    models = [
        read_pt(run_inline(tmp_path, f"{flags} --exp-name {method} --method {method}")[1] / "model.pt")["model"]
        for method in ("popo", "grpo-filter", "grpo")
    ]
    assert differences(models[0], models[1]) == [] and differences(models[0], models[2])


def test_any_group_is_stored_in_the_ablation(tmp_path, monkeypatch):
    pushed, _, _ = watch(monkeypatch)
    run_inline(tmp_path, f"{TWO} --replay ineff")
    assert all(len(stored) == 8 for stored in pushed)


@pytest.mark.parametrize("method", ["grpo", "grpo-filter", "dapo"])
def test_baselines_do_not_replay(method, tmp_path, monkeypatch):
    pushed, selected, batches = watch(monkeypatch)
    run_inline(tmp_path, f"{TWO} --method {method}")
    assert pushed == selected == []
    for iteration, batch in enumerate(batches, start=1):
        assert {group["version"] for group in batch} == {iteration}
        effective = [popo.is_effective(group["rewards"][None]).item() for group in batch]
        assert len(batch) == 8 if method == "grpo" else all(effective)


def test_logprobs_of_training_are_at_the_sampling_temperature(tmp_path):
    """A mismatch would show as a log ratio on fresh responses."""
    _, folder = run_inline(tmp_path, f"--env-id countdown-34 {SHORT} {LONGER} --format-reward 0.1 --temperature 0.5")
    assert max(value for _, value in read_scalars(folder)["is/log_ratio_max_fresh"]) < 1e-4


@pytest.mark.parametrize("method", ["popo", "grpo"])
def test_it_learns(method, tmp_path):
    """Two numbers from nothing but the reward; with the sign flipped it gets worse instead. Single seeds may gain little."""
    flags = f"--env-id countdown-2 {NET} --warmup-steps 150 --warmup-learning-rate 3e-3 --learning-rate 1e-3 --eval-every 0"
    flags += " --total-timesteps 15000"
    flags += f" --eval-episodes 64 --eval-samples 8 --method {method}"
    results = [run_inline(tmp_path, f"{flags} --seed {seed}")[0] for seed in (2, 3, 4)]
    start = statistics.mean(result["curve"][0]["success_rate"] for result in results)
    end = statistics.mean(result["eval_success_rate"] for result in results)
    assert 0.15 < start < 0.3 and end > start + 0.08


# -------------------- Resuming --------------------
def assert_equal_runs(folder, reference):
    a, b = (read_pt(path / "checkpoint.pt") for path in (folder, reference))
    assert (
        differences(*({key: value for key, value in state.items() if key not in ("seconds", "scalars")} for state in (a, b)))
        == []
    )
    assert a["buffer"] or a["iteration"] == 0
    for name in ("model.pt", "best_model.pt"):
        assert differences(read_pt(folder / name)["model"], read_pt(reference / name)["model"]) == []
    a, b = (read_json(path / "result.json") for path in (folder, reference))
    assert a.keys() == b.keys() and all(a[key] == b[key] for key in a.keys() - TIMING - {"args"})
    a, b = (read_scalars(path) for path in (folder, reference))
    assert a.keys() == b.keys()
    for tag in b:
        if not tag.startswith("time/") and tag != "charts/SPS":
            assert a[tag] == b[tag], tag


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    return run_inline(tmp_path_factory.mktemp("short"), TWO)[1]


class Crash(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 4, 7, 10])
def test_resumed_run_equals_uninterrupted_one(calls, tmp_path, monkeypatch, short_run):
    """Dies at some moment, continues from the last checkpoint, replay buffer included: bit for bit the same run."""
    original, count = popo.generate_groups, []

    def crash(*args):
        count.append(1)
        if len(count) == calls:
            raise Crash
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(popo, "generate_groups", crash)
        with pytest.raises(Crash):
            run_inline(tmp_path / "crashed", TWO)
    time.sleep(1.0)  # TensorBoard orders event files by the second in their names
    _, folder = run_inline(tmp_path / "crashed", f"{TWO} --resume")
    assert_equal_runs(folder, short_run)


LONG = f"{TWO} --total-timesteps 2400 --eval-every 0 --checkpoint-every 80"


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    return run_inline(tmp_path_factory.mktemp("long"), LONG)[1]


def test_stopped_by_a_signal(tmp_path, long_run):
    process = start_script("popo_countdown", tmp_path / "stopped", *LONG.split())
    wait_for_line(process, "eval at")
    (folder,) = (path for path in (tmp_path / "stopped").iterdir() if path.name != "warmup")
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143 and f"popo_countdown.py --resume {folder}" in output and "Traceback" not in output
    assert "stopping soon; Ctrl-C now stops at once, without a new checkpoint" in output
    assert read_pt(folder / "model.pt")["global_step"] == read_pt(folder / "checkpoint.pt")["global_step"]  # to be evaluated
    time.sleep(1.0)
    popo.main(popo.parse_args(["--resume", str(folder)]))
    assert_equal_runs(folder, long_run)


def test_a_run_killed_after_its_evaluation_has_every_point_once(tmp_path, monkeypatch, short_run):
    """kill -9 between the evaluation and the next checkpoint: the evaluation is made again, its points are not doubled."""
    original = popo.generate_groups

    def die(policy, task, args, iteration):
        if iteration == 5:  # an evaluation was made after the fourth
            raise Crash
        return original(policy, task, args, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(popo, "generate_groups", die)
        with pytest.raises(Crash):
            run_inline(tmp_path, TWO)
    time.sleep(1.0)
    _, folder = run_inline(tmp_path, f"{TWO} --resume")
    for tag, points in read_scalars(folder).items():
        assert len({step for step, _ in points}) == len(points), tag
    assert_equal_runs(folder, short_run)


def test_one_run_one_owner(tmp_path, command):
    """A folder whose run goes on is neither resumed nor overwritten."""
    process = start_script("popo_countdown", tmp_path, *TWO.split(), "--total-timesteps", "1000000", "--eval-every", "0")
    wait_for_line(process, "eval at")
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "warmup")
    for flags in (["--resume", str(folder)], [*TWO.split(), "--run-dir", str(tmp_path), "--overwrite"]):
        if flags[0] == "--resume":
            code, _, err = command(flags)
        else:
            code, _, err = command([*flags, "--total-timesteps", "64"])
        assert code == 2 and "is in use by a run that goes on" in err, err
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert command([*TWO.split(), "--run-dir", str(tmp_path), "--overwrite", "--total-timesteps", "64"])[0] == 0


def test_an_exception_of_the_users_own_keeps_its_traceback(tmp_path):
    """Only the script's own argument checks are one sentence: a fork's ValueError is not."""
    source = (ROOT / "popo_countdown.py").read_text()
    changed = source.replace(
        "    centred = rewards - rewards.mean", "    int('a fork went wrong')\n    centred = rewards - rewards.mean"
    )
    (tmp_path / "fork.py").write_text(changed)
    command = [sys.executable, str(tmp_path / "fork.py"), *TWO.split(), "--run-dir", str(tmp_path / "runs")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" in process.stderr and "a fork went wrong" in process.stderr


def test_run_dir_that_is_a_file(tmp_path, command):
    (tmp_path / "file").write_text("")
    code, _, err = command([*TWO.split(), "--run-dir", str(tmp_path / "file")])
    assert code == 2 and err.startswith("error: --run-dir: ") and err.count("\n") == 1


def test_a_resumed_run_may_change_what_concerns_the_machine(tmp_path, command):
    flags = [*TWO.split(), "--run-dir", str(tmp_path), "--total-timesteps", "64"]
    assert command(flags)[0] == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "warmup")
    assert command(["--resume", str(folder), "--torch-threads", "2"])[0] == 0
    code, _, err = command(["--resume", str(folder), "--learning-rate", "0.5"])
    assert code == 2 and err.startswith("error: --learning-rate 0.5 contradicts the run to resume, which has 0.0001")
    code, _, err = command(["--resume", str(tmp_path / "nowhere")])
    assert code == 2 and "there is no" in err
    (folder / "args.json").write_text("{")
    code, _, err = command(["--resume", str(folder)])
    assert code == 2 and "is missing or damaged" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_checkpoint_of_another_network_is_refused(flag, tmp_path, monkeypatch):
    """With one sentence, and before args.json names what does not fit."""
    _, folder = run_inline(tmp_path, f"{TWO} --total-timesteps 64")
    (folder / "result.json").unlink()
    before = (folder / "args.json").read_text()
    original = popo.make_task_and_policy

    def wider(args):
        task, _ = original(args)
        return task, popo.GPT(3 * task.width + 1, dataclasses.replace(args, hidden_size=2 * args.hidden_size))

    monkeypatch.setattr(popo, "make_task_and_policy", wider)
    path = folder if flag == "--resume" else folder / "model.pt"
    with pytest.raises(popo.ArgumentError, match=r"\.pt does not fit the policy: has it, or --model's folder, changed\?"):
        popo.main(popo.parse_args([flag, str(path)]))
    assert (folder / "args.json").read_text() == before


@pytest.mark.parametrize("replay", ["popo", "ineff"])
def test_a_run_that_learns_nothing_says_so_again(replay, tmp_path, capsys):
    """At the first and the tenth such iteration; `ineff` replays groups from which nothing can be learned either."""
    flags = "--env-id countdown-4 --warmup-steps 0 --num-prompts 2 --group-size 2 --updates-per-iteration 1 --hidden-size 16"
    run_inline(tmp_path, f"{flags} --total-timesteps 48 --eval-episodes 0 --replay {replay}")
    assert capsys.readouterr().out.count("answers scored 0: nothing to learn from") == 2


def test_a_forks_run_is_continued_by_the_fork(tmp_path, command):
    """It may differ in the code alone."""
    _, folder = run_inline(tmp_path, f"{TWO} --total-timesteps 64")
    (folder / "args.json").write_text(json.dumps(read_json(folder / "args.json") | {"script": "mine.py"}))
    code, _, err = command(["--resume", str(folder)])
    assert code == 2 and err == f"error: --resume: {folder} is a run of mine.py: continue it with that file\n"


def test_arguments_of_an_older_run_get_their_defaults(tmp_path):
    """Its files hold null, or nothing, where the default depends on the policy; equal numbers as flags contradict no run."""
    _, folder = run_inline(tmp_path, f"{TWO} --total-timesteps 64")
    result, saved = read_json(folder / "result.json"), read_json(folder / "args.json")
    del saved["learning_rate"]
    (folder / "args.json").write_text(json.dumps(saved | {"ent_coef": None}))
    resume = ["--resume", str(folder), "--learning-rate"]
    assert popo.main(popo.parse_args([*resume, "0.0001", "--ent-coef", "0.01"])) == result
    with pytest.raises(popo.ArgumentError, match=r"--learning-rate 0\.01 contradicts the run to resume, which has 0\.0001"):
        popo.main(popo.parse_args([*resume, "0.01"]))
    model = read_pt(folder / "model.pt")
    torch.save(model | {"args": model["args"] | {"learning_rate": None}}, folder / "model.pt")
    assert popo.load_model(str(folder / "model.pt"))[1].learning_rate == 1e-4


@pytest.mark.parametrize("gpu", [False, True])
def test_a_model_of_a_gpu_is_evaluated_on_one_if_there_is_one(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(popo.torch.cuda, "is_available", lambda: gpu)
    _, folder = run_inline(tmp_path, f"{TWO} --total-timesteps 64")
    model = read_pt(folder / "model.pt")
    torch.save(model | {"args": model["args"] | {"cuda": True}}, folder / "model.pt")
    assert popo.parse_args(["--evaluate", str(folder / "model.pt")]).cuda == gpu
    assert not popo.parse_args(["--evaluate", str(folder / "model.pt"), "--no-cuda"]).cuda


def test_m2po_keeps_its_passes(tmp_path, command):
    """It chooses tokens within a pass, so another --micro-batch is another algorithm."""
    _, folder = run_inline(tmp_path, f"{TWO} --objective m2po --total-timesteps 64")
    code, _, err = command(["--resume", str(folder), "--micro-batch", "8"])
    assert code == 2 and err.startswith("error: --micro-batch 8 contradicts the run to resume, which has 32: m2po")


def test_another_model_is_named_before_what_it_brings(tmp_path):
    """And a model whose folder is gone may be named anew."""
    gpt, model = popo.Args(), popo.Args(model="smollm2", max_new_tokens=20, ent_coef=0.001)
    with pytest.raises(popo.ArgumentError, match="--model smollm2 contradicts the run, which has None: drop the flag"):
        popo.refuse_contradictions(model, gpt, "the run")
    there, gone = (popo.Args(model=str(path)) for path in (tmp_path, tmp_path / "gone"))
    popo.refuse_contradictions(there, gone, "the run")
    with pytest.raises(popo.ArgumentError, match="--model smollm2 contradicts the run"):
        popo.refuse_contradictions(popo.Args(model="smollm2"), gone, "the run")
    with pytest.raises(popo.ArgumentError, match=r"--model .*gone contradicts the run"):
        popo.refuse_contradictions(gone, there, "the run")


def test_resuming_a_finished_run_changes_nothing(tmp_path, capsys):
    _, folder = run_inline(tmp_path, TWO)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    run_inline(tmp_path, f"{TWO} --resume")
    assert "finished already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_existing_folder(tmp_path, command):
    flags = [*TWO.split(), "--total-timesteps", "32", "--run-dir", str(tmp_path)]
    assert command(flags)[0] == 0
    code, _, err = command(flags)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    assert command([*flags, "--overwrite"])[0] == 0
    code, _, err = command([*flags, "--resume", "--group-size", "5"])
    assert code == 2 and "--group-size 5 contradicts" in err
    code, _, err = command(["--resume", "--run-dir", str(tmp_path), "--seed", "77"])
    assert code == 2 and "there is no" in err


# -------------------- Bad input --------------------
BAD = [
    ({"total_timesteps": 0}, "--total-timesteps 0 must be positive"),
    ({"learning_rate": math.inf}, "--learning-rate inf must be positive and finite"),
    ({"seed": 2**64}, "--seed 18446744073709551616 must be between 0 and 4,294,967,295"),
    ({"eval_temperature": 50}, "--eval-temperature 50 must be between 0.01 and 10"),
    ({"is_cap": 0.1}, "--is-cap 0.1 must be 1 or more: w is 1 on fresh data"),
    ({"clip_low": 1.5}, "--clip-low 1.5 must be above 0 and below 1"),
    ({"method": "ppo"}, "--method ppo must be one of popo, grpo, grpo-filter, dapo"),
    ({"exp_name": "a/b"}, "--exp-name a/b is part of a folder's name"),
    ({"resume": ""}, "--resume '' is no folder: give that of a run"),
    ({"resume": True, "overwrite": True}, "--resume contradicts --overwrite: drop one of them"),
    ({"learning_rate": -1e-4}, "--learning-rate -0.0001 must be positive"),
    ({"learning_rate": math.nan}, "--learning-rate nan must be positive"),
    ({"group_size": 1}, "--group-size 1 must be 2 or more"),
    ({"format_reward": 1.0}, "--format-reward 1.0 must be"),
    ({"seed": -1}, "--seed -1 must be between 0"),
    ({"max_age": 0}, "--max-age 0 must be positive"),
    ({"is_cap": 0}, "--is-cap 0 must be 1 or more"),
    ({"replay_age_min": 11}, "--replay-age-min 11 must not exceed --max-age 10"),
    ({"num_heads": 5}, "--num-heads 5"),
    ({"updates_per_iteration": 33}, "must not exceed --num-prompts 32"),
    ({"dtype": "bfloat16"}, "--dtype bfloat16 needs --model"),
    ({"prompt": "chat"}, "--prompt chat needs --model"),
    ({"model": "m", "export": "x"}, "--export x needs --evaluate"),
    ({"kl_coef": -1}, "--kl-coef -1 must be 0 or more"),
    ({"max_number": 50}, "--max-number 50 needs --model"),
    ({"method": "grpo", "replay": "ineff"}, "--replay ineff needs --method popo"),
    ({"sigma": 0.3}, "--sigma 0.3 needs --objective gipo"),
    ({"objective": "gipo", "sigma": 0.0}, "--sigma 0.0 must be positive"),
    ({"objective": "gipo", "clip_high": 0.3}, "--clip-high 0.3 means nothing for --objective gipo"),
    ({"objective": "sapo", "is_level": "sequence"}, "--is-level sequence needs --objective decoupled or gipo"),
    ({"objective": "pi_old", "is_cap": 3.0}, "--is-cap 3.0 needs --objective decoupled or cispo"),
    ({"m2_threshold": 2.0}, "--m2-threshold 2.0 needs --objective m2po"),
    ({"lag": 10}, "--lag 10 must be below --max-age 10"),
    ({"lag": -1}, "--lag -1 must be 0 or more"),
    ({"method": "grpo", "lag": 4, "total_timesteps": 1000}, "--lag 4 must be below the 4 iterations of the run"),
    ({"method": "dapo", "buffer_groups": 10}, "--buffer-groups 10 needs --method popo"),
    ({"max_gen_batches": 3}, "--max-gen-batches 3 needs --method dapo"),
    ({"dual_clip": 0.5}, "--dual-clip 0.5 must be 1 or more"),
    ({"model": "m", "learning_rate": 1e-6, "hidden_size": 32}, "--hidden-size 32 belongs to the GPT"),
    ({"evaluate": "missing.pt"}, "--evaluate 'missing.pt' is no file"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments(fields, message, tmp_path):
    with pytest.raises(popo.ArgumentError, match=re.escape(message)) as error:
        popo.main(popo.Args(run_dir=str(tmp_path / "runs"), **fields))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_missing_packages_and_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fields, message in (
        ({"model": "m"}, "--model m needs the package transformers: pip install transformers"),
        ({"track": True}, "--track needs the package wandb: pip install wandb"),
        ({"cuda": True}, "--cuda finds no GPU"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            popo.main(popo.Args(run_dir=str(tmp_path), **fields))


def test_bad_command_line_in_a_process_of_its_own(tmp_path):
    process, _ = run_script("popo_countdown", tmp_path, "--group-size", "1")
    assert process.returncode == 2 and process.stderr.startswith("error: --group-size 1") and process.stderr.count("\n") == 1
    process, _ = run_script("popo_countdown", tmp_path, "--method", "ppo")
    assert process.returncode == 2 and "--method" in process.stderr


def test_commands_of_the_page_are_accepted(monkeypatch):
    """Every command line of the docs page and the README but those that need a run folder: known flags, and none that
    contradicts another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    page = "\n".join((ROOT / name).read_text() for name in ("docs/popo_countdown.md", "README.md")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("python popo_countdown.py")]
    assert len(commands) > 5
    for _, _, *flags in commands:
        if not {"--resume", "--evaluate"} & set(flags):
            popo.check_args(popo.parse_args(flags))


def test_evaluate_refuses_other_files(tmp_path, command):
    torch.save({"args": {"seed": 1}}, tmp_path / "model.pt")
    code, _, err = command(["--evaluate", str(tmp_path / "model.pt")])
    assert code == 2 and "is no model of this script" in err


def test_nan_stops_with_the_scalar_and_the_step(tmp_path, monkeypatch):
    original = popo.policy_objective
    monkeypatch.setattr(popo, "policy_objective", lambda *args: (original(*args)[0] * math.nan, *original(*args)[1:]))
    with pytest.raises(popo.BadNumber, match=r"losses/policy_loss is nan at step \d+; last good checkpoint: none yet"):
        run_inline(tmp_path, TWO)


def test_nan_in_the_warm_up(tmp_path):
    with pytest.raises(FloatingPointError, match="lower --warmup-learning-rate"):
        run_inline(tmp_path, f"{TWO} --warmup-learning-rate 1e12")


# -------------------- The file --------------------
def test_it_stands_alone():
    """No script of the project is imported, and transformers only where --model needs it."""
    code = "import sys, popo_countdown; print(sorted({'transformers', 'wandb', 'gipo_continuous'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stderr
