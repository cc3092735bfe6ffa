"""Every script with --cuda: stopped, resumed, evaluated without the GPU. Skipped where there is none, as in CI.

gipo_vla_libero.py has `--cuda` by default and needs a checkpoint there: tests/vla_throughput.py measures it and can write one.
"""

import importlib
import re
import signal

import pytest
import torch
import tyro
from conftest import SCRIPTS, TINY, read_json, read_scalars, run_script, start_script
from test_graphgpo_model import FLAGS
from test_graphgpo_model import folder as chat_model  # noqa: F401  (a fixture)
from test_popo_model import save_model
from test_resume import wait_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

PENDULUM = ["--env-id", "Pendulum-v1", *TINY, "--total-timesteps", "2000", "--checkpoint-every", "200", "--eval-every", "1000"]
PENDULUM += ["--eval-episodes", "2"]
REPLAY = "--policy-head categorical --ratio per-dim".split()
SOKOBAN = "--num-groups 4 --group-size 4 --total-episodes 160 --checkpoint-every 16 --eval-every 80 --eval-episodes 4".split()
COUNTDOWN = "--num-prompts 8 --group-size 4 --warmup-steps 40 --eval-episodes 16 --eval-samples 2".split()
COUNTDOWN += "--total-timesteps 640 --checkpoint-every 32 --eval-every 320".split()
RUNS = {
    "gipo": ("gipo_continuous", [*PENDULUM, "--vtrace"]),
    "ppo": ("ppo_baseline", [*PENDULUM, *REPLAY]),
    "graphgpo": ("graphgpo_sokoban", SOKOBAN),
    "popo": ("popo_countdown", COUNTDOWN),
}
CURVE = {"gipo_continuous": "gipo/log_ratio_max", "ppo_baseline": "gipo/log_ratio_max"}


@pytest.mark.parametrize("name", RUNS)
def test_stopped_resumed_evaluated(name, tmp_path):
    script, flags = RUNS[name]
    flags = [*flags, "--cuda"]
    process = start_script(script, tmp_path, *flags)
    wait_for(lambda: any(tmp_path.glob("*/checkpoint.pt")), process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Traceback" not in output, output

    process, _ = run_script(script, tmp_path, *flags, "--resume")
    assert process.returncode == 0, process.stdout + process.stderr
    assert not re.search(r", from (step|episode) 0\b", process.stdout), process.stdout
    folder = next(tmp_path.glob("*/result.json")).parent
    assert read_json(folder / "result.json")["args"]["cuda"] is True
    scalars = read_scalars(folder)
    assert all(value == value for curve in scalars.values() for _, value in curve)
    if script in CURVE:  # sampling and training compute the same log-probabilities
        assert max(value for _, value in scalars[CURVE[script]]) < 1e-4

    process, _ = run_script(script, tmp_path, "--evaluate", folder / "model.pt", "--eval-episodes", 2, CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 0, process.stderr


def run_inline(script, run_dir, flags):
    """Run in this process: -> what the run took of the GPU, MiB."""
    module = importlib.import_module(script)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    module.main(tyro.cli(module.Args, args=[*map(str, flags), "--run-dir", str(run_dir)]))
    return torch.cuda.max_memory_allocated() / 2**20


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [[], ["--torch-compile"]], ids=["eager", "compiled"])
def test_metaworld_trains_on_the_gpu(script, flags, tmp_path):
    flags = [*flags, *"--env-id reach-v3 --total-timesteps 4000 --eval-episodes 1 --eval-every 0".split()]
    assert run_inline(script, tmp_path, flags) < 1
    assert run_inline(script, tmp_path, [*flags, "--cuda", "--overwrite"]) > 1
    (folder,) = tmp_path.iterdir()
    assert max(value for _, value in read_scalars(folder)["gipo/log_ratio_max"]) < 1e-4


def test_chat_models_train_in_bfloat16(chat_model, tmp_path):  # noqa: F811
    flags = [word for name, value in FLAGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags += ["--model", chat_model, "--total-episodes", 12, "--cuda", "--dtype", "bfloat16"]
    assert run_inline("graphgpo_sokoban", tmp_path / "sokoban", flags) > 0.1
    flags = "--env-id countdown-34 --method popo --num-prompts 4 --group-size 3 --updates-per-iteration 2 --eval-episodes 6"
    flags += " --eval-samples 2 --total-timesteps 24 --max-new-tokens 6 --learning-rate 1e-3 --eval-every 12"
    flags += " --dtype bfloat16 --cuda"
    flags = [*flags.split(), "--max-number", 99, "--model", save_model(tmp_path / "model", "{{ messages[0]['content'] }}")]
    assert run_inline("popo_countdown", tmp_path / "countdown", flags) > 0.1
    for curves in map(read_scalars, (path for task in ("sokoban", "countdown") for path in (tmp_path / task).iterdir())):
        assert all(value == value for curve in curves.values() for _, value in curve)


@pytest.mark.parametrize("head", ["categorical", "gaussian"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_networks_equal_those_on_the_cpu(script, head):
    """Random numbers differ on a GPU, but not log-probabilities, entropies, values and gradients for given actions."""
    module = importlib.import_module(script)
    torch.manual_seed(1)
    agent = module.Agent(39, 4, module.Args(policy_head=head))
    obs = torch.randn(64, 39)
    action = agent.get_action_and_logprob(obs)[0].detach()
    results = []
    for device in ("cpu", "cuda"):
        agent.to(device).zero_grad()
        _, logprob, entropy = agent.get_action_and_logprob(obs.to(device), action.to(device))
        value = agent.get_value(obs.to(device))
        (logprob.sum(-1) * value.detach() + 0.1 * entropy.sum(-1) + value**2).mean().backward()
        results.append([x.detach().cpu() for x in (logprob, entropy, value, *(p.grad for p in agent.parameters()))])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


def test_lora_rounds_alike_in_batches_of_any_size():
    """Rollout and update have other batch sizes; in bfloat16 a product that a GPU splits by size would tell them apart."""
    import gipo_vla_libero as vla

    torch.manual_seed(1)
    for width, out in ((1024, 3072), (4096, 4096), (4096, 11008), (11008, 4096)):  # of the 7B policy's layers
        layer = vla.LoRALinear(torch.nn.Linear(width, out, device="cuda", dtype=torch.bfloat16), 32, 16)
        torch.nn.init.normal_(layer.lora_b)
        with torch.no_grad():
            x = torch.randn(64, 352, width, device="cuda", dtype=torch.bfloat16)
            whole = layer(x)
            for size in (8, 16, 32):
                assert torch.equal(layer(x[:size]), whole[:size]), (width, out, size)
