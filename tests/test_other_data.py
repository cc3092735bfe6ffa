"""A run that begins with another run's replay, as tests/other_data.py measures."""

import dataclasses
import importlib

import other_data
import pytest
import torch
from conftest import ROOT, SCRIPTS, read_json, read_pt

SMALL = "--env-id Pendulum-v1 --num-envs 2 --num-steps 16 --minibatch-size 32 --hidden-size 8 --updates-per-iteration 2"
SMALL += " --eval-episodes 0 --no-overlap --buffer-size 128 --ratio per-dim --policy-head categorical --num-bins 8"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_begins_with_another_runs_replay(script, tmp_path):
    """The foreign samples are kept as they are until own ones take their place; all else is as in a new run."""
    module = importlib.import_module(script.removesuffix(".py"))
    flags = [*SMALL.split(), "--run-dir", str(tmp_path)]
    donor = module.parse_args([*flags, "--seed", "1", "--exp-name", "donor", "--total-timesteps", "320"])
    module.main(donor)
    foreign = read_pt(module.run_folder_of(donor) / "checkpoint.pt")["replay"]
    oldest_first = [4, 5, 6, 7, 0, 1, 2, 3]  # the tenth rollout of the donor lies in the second of four places
    args = module.parse_args([*flags, "--seed", "2", "--exp-name", "with", "--total-timesteps", "160"])
    folder = other_data.start_from(module, args, foreign)
    assert module.main(dataclasses.replace(args, resume=str(folder)))["total_timesteps"] == 160  # 128 foreign, 32 own
    module.main(dataclasses.replace(args, exp_name="new", total_timesteps=32))
    alone, end = read_pt(tmp_path / "Pendulum-v1__new__2" / "checkpoint.pt"), read_pt(folder / "checkpoint.pt")
    assert torch.equal(end["replay"]["obs"][0, :2], alone["replay"]["obs"][0, :2])  # the first ones of this seed
    for key, value in end["replay"].items():
        if key not in ("versions", "advantages", "returns"):
            assert torch.equal(value[:, 2:], foreign[key][:, oldest_first[2:]]), key
            assert not torch.equal(value[:, :2], foreign[key][:, oldest_first[:2]]) or not value.any(), key
    assert end["model"]["obs_count"] == 128 + 32
    assert end["replay"]["versions"][0].tolist() == [5, 5, 2, 2, 3, 3, 4, 4]
    assert end["iteration"] == 5


@pytest.mark.parametrize("method", other_data.METHODS)
def test_every_row_is_a_command_of_its_script(method):
    """With the replay and the head that the stored data have."""
    name, *flags = other_data.flags_of(other_data.Args(output=None), "door-open-v3", 5, method, 1000, "none")
    args = importlib.import_module(name).parse_args(flags)
    assert (args.buffer_size, args.num_steps, args.minibatch_size, args.ratio) == (20_000, 16, 128, "per-dim")
    assert (args.policy_head, args.num_bins, args.ent_coef, args.lr_schedule) == ("categorical", 256, 0.001, "constant")


def test_a_run_is_not_resumed_under_other_settings(tmp_path, monkeypatch):
    """A finished folder whose row has got another sigma since is refused, not read as the new row's."""
    flags = [*SMALL.split(), "--total-timesteps", "64", "--run-dir", str(tmp_path), "--exp-name", "gipo_none_64"]
    args = other_data.Args(output=tmp_path / "all.json", run_dir=tmp_path, steps=64)
    monkeypatch.setattr(other_data, "EQUAL", SMALL)
    module = importlib.import_module("gipo_continuous")
    module.main(module.parse_args([*flags, "--seed", "5"]))
    command = other_data.prepare(args, "Pendulum-v1", 5, "gipo", "none")
    same = module.parse_args(command[1:-1])
    assert same.resume == command[-1] and module.main(same)["total_timesteps"] == 64
    monkeypatch.setitem(other_data.METHODS, "gipo", "gipo_continuous --sigma 0.7")
    with pytest.raises(ValueError, match=r"--sigma 0.7 contradicts the run to resume"):
        module.main(module.parse_args(other_data.prepare(args, "Pendulum-v1", 5, "gipo", "none")[1:-1]))


def test_the_page_has_the_stored_areas():
    """docs/old_data.md: every stored run, to two places."""
    runs = read_json(ROOT / "results" / "other_data.json")["runs"]
    page = (ROOT / "docs" / "old_data.md").read_text().split("## Begin with another run's replay")[1]
    assert len(runs) == 30 and {run["seed"] for run in runs} == {5}
    for method in other_data.METHODS:
        found = {(run["task"], run["data"]): run["area"] for run in runs if run["method"] == method}
        pairs = [(found[task, "none"], found[task, "seed 4"]) for task in other_data.Args.tasks]
        mean = tuple(sum(column) / 3 for column in zip(*pairs, strict=True))
        assert f"| `{method}` | {' | '.join(f'{empty:.2f} → {foreign:.2f}' for empty, foreign in [*pairs, mean])} |\n" in page
        gains = {round(foreign, 2) > round(empty, 2) for empty, foreign in pairs}
        assert gains == ({False} if method == "none" else {False, True})  # of any other on some tasks only
    ends = sorted(run["eval_success_rate"] for run in runs if run["method"] == "gipo")
    assert (
        ends == [0.16, 1, 1, 1, 1, 1] and "on drawer-open ends at 16 % of the goals; its five other runs end at 100 %" in page
    )
