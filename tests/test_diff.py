"""`diff ppo_baseline.py gipo_continuous.py` is a feature: small, tagged, and nothing else differs. Importing does nothing."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PPO, GIPO = ROOT / "ppo_baseline.py", ROOT / "gipo_continuous.py"
SCRIPTS = pytest.mark.parametrize("path", [PPO, GIPO], ids=["ppo", "gipo"])
MOST_CHANGED_LINES = 130
SPECIFIC = {"Args", "policy_objective", "check_args", "train"}  # in both, different where the algorithms are
GIPO_ONLY = {"gipo_log_weight"}
SHARED = """
make_env EpisodeRecorder FastRotation fast_meta_world meta_world_goals to_env_action layer_init mlp LogProbAndEntropy
Agent Collector Worker serve compute_gae compute_vtrace compute_advantages get_end_values
sample_segments compute_loss lr_share seeded evaluate save_checkpoint load_checkpoint saved_run
parse_args main
"""


# Names that two other scripts both define, each in its own way. All else that two of them have is a copy, and stays one.
OWN = {
    "gipo_continuous gipo_vla_libero": """
        Agent Args ArgumentError check_args evaluate gipo_log_weight load_weights main parse_args policy_objective
        run_folder_of sample_segments say train
    """,
    "gipo_continuous graphgpo_sokoban": """
        Agent Args check_args compute_loss evaluate evaluate_saved_model load_checkpoint main make_env parse_args
        train
    """,
    "gipo_continuous popo_countdown": """
        Args check_args evaluate evaluate_saved_model gipo_log_weight load_checkpoint main parse_args policy_objective
        train
    """,
    "gipo_vla_libero graphgpo_sokoban": """
        Agent Args ArgumentError check_args evaluate load_checkpoint main parse_args refuse_contradictions
        run_folder_of saved_args say train
    """,
    "gipo_vla_libero popo_countdown": """
        Args ArgumentError Progress check_args evaluate load_checkpoint main parse_args policy_objective
        refuse_contradictions run_folder_of saved_args say train
    """,
    "graphgpo_sokoban popo_countdown": "Args check_args evaluate evaluate_saved_model load_model train with_defaults",
}


@functools.cache
def top_level(path):
    """Source of every top-level statement, comments inside included: functions and classes by name, the rest in order."""
    source = path.read_text()
    definitions, rest = {}, []
    for node in ast.parse(source).body[1:]:  # less the docstring
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            definitions[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
        else:
            rest.append(ast.get_source_segment(source, node))
    return definitions, rest


def hunks():
    """The hunks of `diff`, each as its list of lines."""
    process = subprocess.run(["diff", str(PPO), str(GIPO)], capture_output=True, text=True)
    assert process.returncode == 1, process.stderr  # 1: they differ
    return [hunk.splitlines() for hunk in re.split(r"^(?=\d)", process.stdout, flags=re.MULTILINE) if hunk]


@pytest.mark.parametrize("name", SHARED.split())
def test_shared_definition_is_identical(name):
    ppo, gipo = top_level(PPO)[0], top_level(GIPO)[0]
    assert ppo[name] == gipo[name]


def test_only_the_algorithms_differ():
    """So everything else of one file is in the other too, in the same order, imports and constants included."""
    (ppo, ppo_rest), (gipo, gipo_rest) = top_level(PPO), top_level(GIPO)
    assert {name for name in ppo.keys() & gipo.keys() if ppo[name] != gipo[name]} == SPECIFIC
    assert gipo.keys() - ppo.keys() == GIPO_ONLY
    assert list(ppo) == [name for name in gipo if name not in GIPO_ONLY]
    assert ppo_rest == gipo_rest


@pytest.mark.parametrize(("scripts", "own"), OWN.items())
def test_copies_in_other_scripts_are_identical(scripts, own):
    ours, theirs = (top_level(ROOT / f"{script}.py")[0] for script in scripts.split())
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different == set(own.split())


def test_every_hunk_is_tagged():
    """The module docstrings say different things throughout, so they carry one tag together."""
    docstring = ast.parse(PPO.read_text()).body[0]
    assert "# GIPO:" in ast.get_docstring(ast.parse(GIPO.read_text()))
    code_hunks = [hunk for hunk in hunks() if int(re.match(r"\d+", hunk[0])[0]) > docstring.end_lineno]
    untagged = [hunk for hunk in code_hunks if not any("# GIPO:" in line for line in hunk)]
    assert not untagged, f"{len(untagged)} hunks without a `# GIPO:` line:\n\n" + "\n\n".join("\n".join(h) for h in untagged)


def test_the_diff_is_small():
    changed = sum(line[0] in "<>" for hunk in hunks() for line in hunk)
    assert 0 < changed <= MOST_CHANGED_LINES


def test_tags_stand_at_differences_only():
    """A tag that both files share, or PPO's file alone has, points at nothing."""
    tagged = [line for line in GIPO.read_text().splitlines() if "# GIPO:" in line]
    assert tagged and not set(tagged) & set(PPO.read_text().splitlines())


def test_readme_shows_the_core_of_the_diff():
    """Its lines, shortened only by the docstrings between them, stand in the file that each sign names."""
    shown = re.search(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1].splitlines()
    ppo, gipo = (" ".join(top_level(path)[0]["policy_objective"].split()) for path in (PPO, GIPO))
    assert {line[0] for line in shown} == {" ", "-", "+"}
    for line in shown:
        words = " ".join(line[1:].split())
        assert (words in ppo, words in gipo) == (line[0] != "+", line[0] != "-"), line


def test_style():
    """What .pre-commit-config.yaml does at every commit; ruff's settings are in pyproject.toml."""
    for command in (["check"], ["format", "--check"]):
        process = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout


@SCRIPTS
def test_no_project_module_is_imported(path):
    """Every script stands alone: it runs when it is the only file copied."""
    project = {file.stem for file in ROOT.glob("*.py")} | {folder.parent.name for folder in ROOT.glob("*/*.py")}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "torch" in imported
    assert not imported & project


IMPORT = """
import json, os, random, signal, sys, threading
try: import triton  # before mujoco, as in the scripts
except ImportError: pass
import gymnasium, metaworld, numpy, torch, tyro  # what they do is theirs (gymnasium hides a pygame banner)
def state():
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "torch_threads": torch.get_num_threads(),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "random": [hash(random.getstate()), str(numpy.random.get_state()), torch.initial_seed()],
        "folder": os.getcwd(),
        "files": sorted(os.listdir()) + sorted(os.listdir(sys.argv[1])),
        "dtype": str(torch.get_default_dtype()),
        "path": sys.path[1:],
    }
sys.path.insert(0, sys.argv[1])
before = state()
__import__(sys.argv[2])
print(json.dumps([before, state()]))
"""


@SCRIPTS
def test_importing_has_no_side_effects(path, tmp_path):
    """No environment variable, thread, file, signal handler, seed or torch setting changes."""
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", IMPORT, str(ROOT), path.stem]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    before, after = json.loads(process.stdout.splitlines()[-1])
    assert after == before
    assert after["threads"] == 1
    assert not list(tmp_path.iterdir())
