"""What surrounds the code: inline metadata of the scripts, versions, links, and the figures that the README quotes."""

import json
import re
import tomllib
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_equal_the_requirements(script):
    """`uv run SCRIPT` installs what `pip install -r requirements.txt` does (PEP 723)."""
    (block,) = re.findall(r"(?m)^# /// script$\n((?:#.*\n)+?)# ///$", (ROOT / script).read_text())
    metadata = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(keepends=True)))
    assert set(metadata["dependencies"]) == requirements("requirements.txt") | SCRIPTS[script]
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
