"""What surrounds the code: inline metadata of the scripts, versions, links, and the figures that the README quotes."""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import gipo_continuous

SCRIPTS = {  # script -> what it needs beside requirements.txt
    "gipo_continuous.py": set(),
    "ppo_baseline.py": set(),
    "gipo_bias_variance.py": set(),
    "graphgpo_sokoban.py": {"minigrid==3.2.0"},
    "popo_countdown.py": set(),
}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/v1/README.md")]


def requirements(name: str) -> set[str]:
    """The pins of a requirements file, without those that it includes."""
    lines = (line.strip() for line in (ROOT / name).read_text().splitlines())
    return {line for line in lines if line and not line.startswith(("#", "-r"))}


@pytest.mark.parametrize(
    "script", ["ppo_baseline", "gipo_vla_libero", "gipo_continuous", "graphgpo_sokoban", "popo_countdown"]
)
def test_a_result_names_the_commit_and_changes_of_its_own_file(script, tmp_path, monkeypatch):
    """benchmark.sh rewrites tables beside running scripts; that makes no run another code's."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a script.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # which may sign commits or run hooks
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # as in a hook
        monkeypatch.delenv(name, raising=False)
    assert module.git_commit() is None

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    (tmp_path / "table.md").write_text("1")
    git("add", "table.md")
    assert module.git_commit() is None  # a repository without a commit
    git("commit", "-m", "1")
    (tmp_path / "a script.py").write_text("1")
    assert module.git_commit() == git("rev-parse", "HEAD") + "-dirty"  # a file that no commit has
    git("add", ".")
    git("commit", "-m", "2")
    (tmp_path / "table.md").write_text("2")
    assert module.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "a script.py").write_text("2")
    assert module.git_commit() == git("rev-parse", "HEAD") + "-dirty"
    git("rm", "--cached", "a script.py")
    (tmp_path / ".gitignore").write_text("a*")
    git("add", ".gitignore")
    git("commit", "-m", "3")
    assert module.git_commit() == git("rev-parse", "HEAD") + "-dirty"  # an ignored copy


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_equal_the_requirements(script):
    """`uv run SCRIPT` installs what `pip install -r requirements.txt` does, or of that what the script needs (PEP 723)."""
    (block,) = re.findall(r"(?m)^# /// script$\n((?:#.*\n)+?)# ///$", (ROOT / script).read_text())
    metadata = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(keepends=True)))
    wanted = requirements("requirements.txt") | SCRIPTS[script]
    if script in ("popo_countdown.py", "graphgpo_sokoban.py"):  # no simulator of theirs
        wanted = {name for name in wanted if not name.startswith(("metaworld", "mujoco", "packaging", "scipy", "matplotlib"))}
        wanted -= {name for name in wanted if name.startswith("gymnasium") and script == "popo_countdown.py"}
    if script == "gipo_bias_variance.py":  # arithmetic only
        wanted = {name for name in wanted if name.startswith(("numpy", "tyro", "matplotlib"))}
    assert set(metadata["dependencies"]) == wanted
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    assert SCRIPTS[script] <= requirements("requirements-dev.txt")


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every relative link and picture of a page is a file, and an anchor one of its headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name}: {target}"


def test_pictures_are_small_enough_for_a_page():
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 1_000_000, picture


def test_the_names_that_the_readme_sends_forkers_to_exist():
    """The table of what to change: every name in it is a function, class or method of gipo_continuous.py."""
    section = (ROOT / "README.md").read_text().split("## Fork it")[1].split("\n## ")[0]
    names = re.findall(r"`(?:class )?([A-Za-z_.]+)`", "".join(re.findall(r"(?m)^\|[^|]*\|([^|]*)\|$", section)))
    source = Path(ROOT / "gipo_continuous.py").read_text()
    assert len(names) >= 8
    for name in names:
        assert all(re.search(rf"(?m)^ *(def|class) {part}\b", source) for part in name.split(".")), name


def test_ci_runs_the_readmes_test_command():
    blocks = re.findall(r"(?m)^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL)
    (command,) = (" ".join(block.replace("\\\n", " ").split()) for block in blocks if "-m pytest" in block)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_first_output_is_the_committed_run():
    """Return, success and speed of the first command, from the result file of that run; its flags are the defaults."""
    run = json.loads((ROOT / "results" / "first_command.json").read_text())
    shown = (ROOT / "README.md").read_text()
    assert (
        f"eval at 100,096: return {run['eval_return_mean']:.1f}, success {run['eval_success_rate']:.0%} of 50 goals" in shown
    )
    assert f"finished in {run['wall_seconds']:.0f} s, {run['sps']:.0f} steps/s" in shown
    changed = {key for key, value in vars(gipo_continuous.Args()).items() if run["args"][key] != value}
    assert changed == {"total_timesteps"} and run["versions"]["algorithm"] == gipo_continuous.ALGORITHM_VERSION


# -------------------- Pictures --------------------
@pytest.fixture
def figures(monkeypatch, tmp_path):
    """docs/figures.py, drawing into a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    return module


def test_pictures_are_drawn_from_committed_files(figures, tmp_path):
    figures.draw_weight()
    figures.draw_curves()
    figures.draw_smollm2()
    figures.draw_age(figures.Args(figure="age"))
    assert {path.name for path in tmp_path.iterdir()} == {"weight.png", "curves.png", "smollm2.png", "age.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


def test_stored_ages_are_kept_if_a_method_is_missing(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "BY_AGE", tmp_path / "replay_by_age.json")
    monkeypatch.setattr(figures, "diagnose", lambda folder: {"exp_name": "gipo_5120", "buffer_size": 5120, "ages": {}})
    with pytest.raises(SystemExit, match=r"error: --runs has none named ppo-clip-0.2_N, ppo-clip-0.5_N"):
        figures.draw_age(figures.Args(figure="age", runs=(tmp_path,)))
    assert not any(tmp_path.iterdir())


def test_replay_by_age_in_the_text(figures):
    """The figures that docs/old_data.md quotes of samples of 20 rollouts or more are the means of the stored runs."""
    runs = json.loads(figures.BY_AGE.read_text())
    tasks = ["button-press-topdown-v3", "door-open-v3", "drawer-open-v3", "push-v3"]
    means = {}
    for method in figures.METHODS:
        found = [run for run in runs if run["exp_name"] == f"{method}_5120"]
        assert sorted(run["env_id"] for run in found) == tasks and all(run["step"] == 150_016 for run in found)
        rows = [run["ages"]["20 or more"] for run in found]
        means[method] = [sum(row[name] for row in rows) / len(rows) for name in figures.BY_AGE_FIGURES]
    text = (ROOT / "docs" / "old_data.md").read_text()
    shares = [f"{means[method][1]:.0%}".replace("%", " %") for method in ("ppo-clip-0.2", "ppo-clip-0.5", "gipo")]
    assert "A clip of 0.2 drops {} of them, a clip of 0.5 {}, and GIPO {}".format(*shares) in text
    gipo, *clips = (means[method][0] for method in figures.METHODS)
    assert [round(x, 1) for x in clips] == [0.8, 0.8]
    assert f"an effective sample size of {gipo:.2f}, against 0.8 with either clip" in text
    spreads = [f"{means[method][2]:.1f}" for method in ("gipo", "ppo-clip-0.5", "ppo-clip-0.2")]
    spread = "spreads by {} with GIPO and with a clip of 0.5, and by {} with a clip of 0.2."
    assert spreads[0] == spreads[1] and spread.format(*spreads[1:]) in text


def test_diagnosis_by_age_by_hand(figures, tmp_path):
    """Of a run's replay: without an update every ratio is 1, so every sample counts alike, whatever its age."""
    args = gipo_continuous.Args(env_id="Pendulum-v1", num_steps=4, num_envs=2, buffer_size=16, policy_head="gaussian")
    agent = gipo_continuous.Agent(3, 1, args)
    obs, shape = torch.randn(4, 4, 3), (4, 4)
    with torch.no_grad():
        actions, logprobs, *_ = agent.get_action_and_logprob(obs)
    zeros, versions = torch.zeros(shape), torch.tensor([1.0, 1.0, 30.0, 30.0]).expand(shape)
    replay = {"obs": obs, "next_obs": obs, "actions": actions, "logprobs": logprobs.clone(), "versions": versions}
    replay |= {"rewards": torch.randn(shape), "terminations": zeros, "dones": zeros}
    replay["logprobs"][:, 0] -= 0.2  # of the oldest rollout one segment is now more likely than it was: l = 0.2
    torch.save({"model": agent.state_dict(), "replay": replay, "iteration": 31}, tmp_path / "checkpoint.pt")
    (tmp_path / "args.json").write_text(json.dumps(vars(args)))
    run = figures.diagnose(tmp_path)
    assert run["step"] == 31 * 8
    fresh, old = run["ages"]["0 to 2"].values(), run["ages"]["20 or more"].values()
    assert [*fresh] == pytest.approx([1, 0, 0], abs=1e-4)
    w = math.exp(0.2 - 0.5)  # omega * rho at l = sigma
    assert [*old] == pytest.approx([(1 + w) ** 2 / (2 * (1 + w**2)), 0, 0.1], abs=1e-3)
