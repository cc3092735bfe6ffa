import atexit
import contextlib
import copy
import functools
import importlib.util
import json
import multiprocessing
import os
import queue
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch

CHUNK = 8  # in the finished file: defined at the top


# -------------------- Environment --------------------
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
NOOP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])  # in LIBERO's units: stand still, gripper open
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
ASSETS_HINT = "set LIBERO_ASSETS to a folder with the contents of libero/libero/assets from the LIBERO repository"
RENDER_PROBE = """
import mujoco
xml = '<mujoco><worldbody><light pos="0 0 3"/><geom type="plane" size="1 1 .1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(xml)
data, renderer = mujoco.MjData(model), mujoco.Renderer(model, 32, 32)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER))
assert renderer.render().max() > 0, "black image"
"""


@functools.cache
def render_variables(render: str) -> dict[str, str]:
    """Variables that a process needs before it imports MuJoCo, found by drawing a small scene in another process.

    EGL fails in many ways: no driver, a device number that is not CUDA's, black images, a hang. Nothing is believed untried.
    """
    if render == "inherited":  # by a worker, from the process that started it
        return {}
    has_gpu, chosen, failures = Path("/proc/driver/nvidia").exists(), os.environ.get("MUJOCO_EGL_DEVICE_ID"), []
    order = ["egl", "osmesa"] if has_gpu else ["osmesa", "egl"]  # equally fast without a GPU, and OSMesa has fewer moods
    for gl in order if render == "auto" else [render]:
        for device in [chosen or "0"] if chosen or gl == "osmesa" else "01234567":
            variables = {"MUJOCO_GL": gl, "PYOPENGL_PLATFORM": gl, "MUJOCO_EGL_DEVICE_ID": device}
            variables["LP_NUM_THREADS"] = "1"  # or Mesa draws with a thread per core in every process
            try:
                command = [sys.executable, "-c", RENDER_PROBE]
                probe = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)
                error = (probe.stderr.strip().splitlines() or ["?"])[-1] if probe.returncode else ""
                if render == "auto" and gl == "egl" and has_gpu and "llvmpipe" in probe.stdout:
                    error = "EGL finds no GPU (in a container, NVIDIA_DRIVER_CAPABILITIES must contain graphics)"
            except subprocess.TimeoutExpired:
                error = "no answer within 60 s"
            if not error:
                if failures and has_gpu:
                    print(f"warning: images are rendered with {gl}, device {device}: {'; '.join(failures)}", flush=True)
                return variables
            failures.append(f"{gl}, device {device}: {error}")
            if "must be an integer between" in error:  # no such device, so no further ones either
                break
    raise ValueError(f"--render {render}: MuJoCo cannot draw ({'; '.join(failures)}): apt-get install libosmesa6, or libegl1")


def libero_root() -> Path:
    """Folder of the installed package that holds bddl_files and init_files, found without importing it."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise ValueError("LIBERO is not installed: pip install --no-deps -r requirements-vla.txt")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def find_assets() -> Path | None:
    """Folder of LIBERO's meshes and textures: LIBERO_ASSETS, else inside the package, else where hf-libero downloads them."""
    if "LIBERO_ASSETS" in os.environ:
        assets = Path(os.environ["LIBERO_ASSETS"]).expanduser()
        if not all((assets / name).is_dir() for name in ASSET_FOLDERS):
            raise ValueError(f"LIBERO_ASSETS={assets} does not hold the folders {', '.join(ASSET_FOLDERS)}: {ASSETS_HINT}")
        return assets
    folders = libero_root() / "assets", Path("~/.cache/libero/assets").expanduser()
    return next((f for f in folders if all((f / name).is_dir() for name in ASSET_FOLDERS)), None)


def ensure_assets() -> Path:
    """`find_assets`, or download them once."""
    assets = find_assets()
    if assets is None:
        assets = Path("~/.cache/libero/assets").expanduser()
        print(f"downloading LIBERO's assets once from the Hugging Face hub (lerobot/libero-assets) to {assets}", flush=True)
        try:
            from huggingface_hub import snapshot_download

            # hf-libero's own function passes an argument that huggingface_hub >= 1 refuses, and takes a broken download for
            # a complete one. So: the same data to the same place, but under another name until it is complete.
            partial = assets.with_name("assets.partial")
            snapshot_download("lerobot/libero-assets", repo_type="dataset", local_dir=partial)
            partial.rename(assets)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            text = f"LIBERO's assets are not on this machine and cannot be downloaded ({reason}): {ASSETS_HINT}"
            raise ValueError(text) from None
    return assets


def setup_libero(assets: Path) -> None:
    """Import LIBERO without its questions: it asks on stdin for a folder when it finds no config file."""
    with tempfile.TemporaryDirectory() as folder:  # needed during the import only, since we name every path ourselves
        os.environ["LIBERO_CONFIG_PATH"] = folder
        keys = "benchmark_root", "bddl_files", "init_states", "datasets", "assets"
        (Path(folder) / "config.yaml").write_text(json.dumps(dict.fromkeys(keys, str(libero_root()))))  # JSON is YAML
        # robosuite logs to /tmp/robosuite.log and fails where that belongs to another user, unless this module says otherwise.
        macros = types.ModuleType("robosuite.macros_private")
        macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL = None, "ERROR"
        sys.modules.setdefault("robosuite.macros_private", macros)
        import libero.libero.envs
    libero.libero._assets_path_cache = str(assets)  # hf-libero ignores the config's entry and would download


@functools.cache
def task_names(suite: str) -> list[str]:
    """File names of the tasks of a suite, in LIBERO's order, without importing LIBERO."""
    return runpy.run_path(str(libero_root() / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"][suite]


def num_tasks(suite: str) -> int:
    return len(task_names(suite))


def instruction(suite: str, task: int) -> str:
    """What the policy is told: made from the file name, as in the training data; the text in the bddl file differs."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task_names(suite)[task]).replace("_", " ")


class LiberoEnv:
    """One LIBERO simulator in this process: 1.2 GB, 20 control steps per simulated second.

    Observations are {"images": uint8 (num_images, H, W, 3), turned by 180 degrees as OpenVLA has them (a mirror image of
    the truth, but what checkpoints know), "proprio": float32 (8,): gripper position (m), axis-angle, two finger joints}.
    """

    def __init__(self, args):
        self.args, self.task, self.env, self.done, self.frames = args, None, None, True, []
        self.max_steps = args.max_steps or MAX_STEPS[args.suite]
        self.cameras = ["agentview", "robot0_eye_in_hand"][: args.num_images]
        if "libero.libero.envs" not in sys.modules:  # else it is too late for the variables
            os.environ.update(render_variables(args.render))
            setup_libero(ensure_assets())

    def build(self, task: int) -> None:
        """Compile the scene of a task: 2 to 4 s, so callers had better not switch tasks more often than they must."""
        import mujoco
        from libero.libero.envs import OffScreenRenderEnv

        self.close()
        name, size = task_names(self.args.suite)[task], self.args.camera_size
        self.env = OffScreenRenderEnv(
            bddl_file_name=str(libero_root() / "bddl_files" / self.args.suite / f"{name}.bddl"),
            camera_names=self.cameras,
            camera_heights=size,
            camera_widths=size,
            hard_reset=False,  # the same states to 1e-15 without compiling the scene again
            ignore_done=True,  # robosuite's own horizon of 1000 steps goes on counting over episodes
        )
        path = libero_root() / "init_files" / self.args.suite / f"{name}.pruned_init"
        self.init_states = torch.load(
            path, weights_only=False
        )  # the files are numpy arrays in pickles, and come with the package
        if not self.args.reflections:
            flags = self.env.sim._render_context_offscreen.scn.flags
            flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        # Rendering costs five times a step's physics. A switch inside robosuite's own camera sensors saves the images nobody
        # sees and leaves the others bit for bit as LIBERO renders them: one physics step (2 ms) before the control step ends.
        self.rendering = True
        for camera in self.cameras:
            self.env.env.modify_observable(f"{camera}_image", "sensor", self._switched(camera, self.env.env))
        self.task = task

    def _switched(self, camera: str, env):
        sensor, blank = env._observables[f"{camera}_image"]._sensor, np.zeros((self.args.camera_size,) * 2 + (3,), np.uint8)

        def image(obs_cache):
            if not self.rendering:
                return blank
            env.sim._render_context_offscreen.gl_ctx.make_current()  # robosuite draws into the newest simulator's instead
            return sensor(obs_cache)

        image.__modality__ = "image"
        return image

    def _observe(self, raw: dict) -> dict:
        from robosuite.utils.transform_utils import quat2axisangle

        images = np.stack([raw[f"{camera}_image"][::-1, ::-1] for camera in self.cameras])
        gripper = raw["robot0_eef_pos"], quat2axisangle(raw["robot0_eef_quat"].copy()), raw["robot0_gripper_qpos"]
        return {"images": images, "proprio": np.concatenate(gripper).astype(np.float32)}

    def reset(self, task: int, init_state: int) -> dict:
        """Start the episode of one of the 50 initial states of a task; always the same one for the same numbers."""
        if task != self.task:
            self.build(task)
        # The initial state does not hold where cabinets and stoves stand: reset() draws it (within 2 cm) from numpy's global
        # generator. set_init_state() alone is no reset: the controller would keep its goal. And robosuite's reset() forgets
        # what the gripper integrates its commands into: after an episode that ended with it closed, it would close again.
        np.random.seed(init_state)
        self.rendering = False
        self.env.reset()
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self.env.set_init_state(self.init_states[init_state])
        raw = None
        for i in range(self.args.noop_steps):
            self.rendering = i == self.args.noop_steps - 1
            raw = self.env.step(NOOP)[0]
        self.num_steps, self.done = 0, False
        obs = self._observe(raw) if raw is not None else self._look()
        self.frames = [obs["images"][0]] if self.args.render_every_step else []
        return obs

    def _look(self) -> dict:
        """The present state, where the last step was not rendered."""
        self.rendering = True
        self.env._update_observables(force=True)
        return self._observe(self.env.env._get_observations())

    def step(self, actions: np.ndarray):
        """Carry out a chunk of actions (k, 7) in the units of the data: 6 movements in [-1, 1], gripper 0 = close to 1 = open.

        -> obs after the chunk, rewards (chunk,) float32 with 1 at success, number of steps carried out, terminated, truncated.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset")
        actions = np.array(actions, np.float64)
        actions[:, 6] = np.where(actions[:, 6] > 0.5, -1.0, 1.0)  # LIBERO: -1 opens, 1 closes
        rewards = np.zeros(max(CHUNK, len(actions)), np.float32)
        steps = min(len(actions), self.max_steps - self.num_steps)
        for i in range(steps):
            self.rendering = self.args.render_every_step or i == steps - 1
            raw, _, success, _ = self.env.step(actions[i])
            if self.args.render_every_step:
                self.frames.append(raw["agentview_image"][::-1, ::-1])
            if success:
                rewards[i] = 1.0
                break
        self.num_steps += i + 1
        terminated = bool(success)
        truncated = not terminated and self.num_steps >= self.max_steps
        self.done = terminated or truncated
        return self._observe(raw) if self.rendering else self._look(), rewards, i + 1, terminated, truncated

    def close(self) -> None:
        if self.env is not None:
            self.env.sim._render_context_offscreen.gl_ctx.make_current()  # or another simulator's textures are freed
            self.env.close()
        self.env = self.task = None


def env_worker(connection, args, variables: dict) -> None:
    """A process with one simulator: carry out (function, arguments) until the connection is closed."""
    os.environ.update(variables)
    try:
        env = LiberoEnv(args)
        while True:
            function, arguments = connection.recv()
            connection.send((None, (function(env, *arguments),)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the main process closed the connection, or is gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send((error if isinstance(error, ValueError) else RuntimeError(traceback.format_exc()), None))
    finally:
        os._exit(0)  # EGL prints tracebacks in an orderly exit


class VectorEnv:
    """`num_envs` simulators in processes of their own, which are replaced when they die or do not answer in time.

    A replaced simulator's episode counts as truncated, after none of the chunk's steps, with "restarted": True in its answer.
    Processes are spawned: forked ones would inherit the threads and the GPU of this one.
    """

    def __init__(self, args, num_envs: int | None = None):
        # robosuite would take CUDA_VISIBLE_DEVICES for numbers of EGL devices, which differ; workers do not use CUDA.
        variables = {"LIBERO_ASSETS": str(ensure_assets()), "CUDA_VISIBLE_DEVICES": ""} | render_variables(args.render)
        self.args, self.variables, self.num_envs = copy.copy(args), variables, num_envs or args.num_envs
        self.args.render = "inherited"
        self.processes, self.connections = [None] * self.num_envs, [None] * self.num_envs
        self.calls, self.deadlines, self.last_obs = [None] * self.num_envs, [0.0] * self.num_envs, [None] * self.num_envs
        # multiprocessing's own exit handler, which runs after this one, waits for the workers for ever.
        atexit.register(self.close)
        for i in range(self.num_envs):
            self._start(i)

    def _start(self, i: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections[i], theirs = context.Pipe()
        self.processes[i] = context.Process(target=env_worker, args=(theirs, self.args, self.variables), daemon=True)
        resource_tracker.ensure_running()  # it unblocks the signals when it starts
        # A process keeps the signals blocked that were so at its start: Ctrl-C and SIGTERM are for the main process, which
        # writes a checkpoint first.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self.processes[i].start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def _kill(self, i: int) -> None:
        self.connections[i].close()
        self.processes[i].kill()  # SIGKILL: also works on a process that is stopped or stuck in a driver
        self.processes[i].join()

    def _send(self, i: int, function, *arguments) -> None:
        self.calls[i], self.deadlines[i] = (function, arguments), time.monotonic() + self.args.env_timeout
        with contextlib.suppress(OSError):  # a dead process: `_receive` will notice
            self.connections[i].send((function, arguments))

    def _receive(self, i: int):
        """(answer,) of worker i, or None after it had to be replaced."""
        try:
            if not self.connections[i].poll(max(0.0, self.deadlines[i] - time.monotonic())):
                raise TimeoutError(f"no answer within {self.args.env_timeout:g} s (--env-timeout)")
            error, answer = self.connections[i].recv()
        except TimeoutError as reason:
            error = reason
        except (EOFError, OSError):
            error = RuntimeError("its process died")
        if error is None:
            return answer
        if isinstance(error, ValueError):  # one of our sentences for the user
            self.close()
            raise error
        print(f"warning: simulator {i} is started anew: {str(error).strip()}", flush=True)
        self._kill(i)
        self._start(i)
        return None

    def call(self, i: int, function, *arguments, attempts: int = 3):
        """function(env, *arguments) in worker i, again after a restart."""
        for _ in range(attempts):
            self._send(i, function, *arguments)
            if (answer := self._receive(i)) is not None:
                return answer[0]
        raise RuntimeError(f"simulator {i} failed {attempts} times in a row")

    def reset_async(self, indices, tasks, init_states) -> None:
        for i, task, init_state in zip(indices, tasks, init_states, strict=True):
            self._send(i, LiberoEnv.reset, int(task), int(init_state))

    def step_async(self, indices, actions) -> None:
        for i, action in zip(indices, actions, strict=True):
            self._send(i, LiberoEnv.step, np.asarray(action))

    def wait(self, indices) -> list[dict]:
        """Answers to `reset_async`: {"obs"}; to `step_async`: also "rewards", "num_executed", "terminated", "truncated"."""
        answers = []
        for i in indices:
            (function, arguments), answer = self.calls[i], self._receive(i)
            if function is LiberoEnv.reset:
                answers.append({"obs": answer[0] if answer else self.call(i, function, *arguments)})
            else:
                values = answer[0] if answer else (self.last_obs[i], np.zeros(CHUNK, np.float32), 0, False, True)
                names = "obs", "rewards", "num_executed", "terminated", "truncated"
                answers.append(dict(zip(names, values, strict=True)) | ({} if answer else {"restarted": True}))
            self.last_obs[i] = answers[-1]["obs"]
        return answers

    def close(self) -> None:
        atexit.unregister(self.close)
        for i in range(self.num_envs):
            if self.processes[i] is not None:
                self._kill(i)
                self.processes[i] = None


# -------------------- Scripted expert --------------------
def scripted_expert(env: LiberoEnv, task: int, init_state: int, noise: float, rng) -> dict | None:
    """Put the bowl on the plate (libero_spatial), looking into the simulator: -> a demonstration, or None if that failed.

    A demonstration holds, for each step, the images and proprio before the action, and the action in the data's units. Noise
    (standard deviation, in units of the action) is added to the movements carried out but not to those recorded. What the
    expert does depends on the present state alone, so that a policy without memory can learn it.
    """
    obs = env.reset(task, init_state)
    world = env.env.env
    site, bodies, geoms = world.robots[0].eef_site_id, world.sim.data.body_xpos, world.robots[0].gripper.important_geoms
    fingers = [geoms["left_finger"], geoms["right_finger"]]
    bowl_name, plate_name = world.obj_of_interest
    rim = np.array([0.0, 0.047, 0.03])  # from the bowl's centre; the gripper opens along y
    steps, was_held = [], False
    while not env.done:
        hand, bowl, plate = (
            world.sim.data.site_xpos[site],
            bodies[world.obj_body_id[bowl_name]],
            bodies[world.obj_body_id[plate_name]],
        )
        offset, away = hand - bowl - rim, np.linalg.norm((bowl - plate)[:2])
        held = world._check_grasp(fingers, world.objects_dict[bowl_name])
        was_held |= held
        if was_held and np.linalg.norm(offset) > 0.05:  # lost: what follows teaches nothing good, even if it fell on the plate
            return None
        if not held:  # over the rim, then down
            aligned = np.linalg.norm(offset[:2]) < 0.02
            move, close = -offset, aligned and offset[2] < 0.01
            move[2] += 0.0 if aligned else 0.10
        else:  # up, over the plate, down until LIBERO calls it a success
            move, close = plate - bowl, True
            if away > 0.02:
                move[2] += 0.10
            if away > 0.06 and bowl[2] - plate[2] < 0.05:
                move[:2] = 0.0
            elif away <= 0.02:
                move[2] = -0.03
        action = np.concatenate([np.clip(move / 0.03, -1.0, 1.0), np.zeros(3), [0.0 if close else 1.0]]).astype(np.float32)
        steps.append((obs["images"], obs["proprio"], action))
        executed = action.copy()
        executed[:3] += rng.normal(0.0, noise, 3)
        obs, _, _, success, _ = env.step(executed[None])
    if not success:
        return None
    return {
        key: np.stack(values) for key, values in zip(("images", "proprio", "actions"), zip(*steps, strict=True), strict=True)
    }


def save_npz(path: Path, arrays: dict) -> None:
    """Written under another name first, so that a file is either complete or not there."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(path.with_suffix(".tmp"), path)


def collect_demonstrations(args, path: Path, tasks, init_states, per_state: int) -> dict[str, np.ndarray]:
    """Demonstrations of the scripted expert, `per_state` from each initial state; collected once and kept in the file `path`.

    -> images (M, num_images, H, W, 3), proprio (M, 8), actions (M, 7), tasks (M,), init_states (M,), ends (M,): the index
    after the last step of the episode. Failed ones are left out. What an interrupted run has collected is kept beside `path`.
    """
    path, jobs = Path(path), [(t, s, k) for t in tasks for s in init_states for k in range(per_state)]
    if path.exists():
        with np.load(path) as file:
            return dict(file)
    parts = path.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not (parts / "{}-{}-{}.npz".format(*job)).exists()]
    envs = VectorEnv(args, min(args.num_envs, max(len(todo), 1)))
    free, start = queue.SimpleQueue(), time.time()
    for i in range(envs.num_envs):
        free.put(i)

    def collect(job):
        i, rng = free.get(), np.random.default_rng([args.seed, *job])
        demo = envs.call(i, scripted_expert, *job[:2], args.demo_noise, rng)
        save_npz(parts / "{}-{}-{}.npz".format(*job), demo or {})
        free.put(i)

    try:
        with ThreadPoolExecutor(envs.num_envs) as pool:
            for done, _ in enumerate(pool.map(collect, todo), 1):
                left = (time.time() - start) / done * (len(todo) - done)
                print(f"demonstrations: {done}/{len(todo)}, left {left // 60:.0f}m{left % 60:02.0f}s", flush=True)
    finally:
        envs.close()
    demos, ends = [], [0]
    for task, init_state, k in jobs:
        with np.load(parts / f"{task}-{init_state}-{k}.npz") as file:
            demo = dict(file)
        if demo:  # empty: the expert failed
            length = len(demo["actions"])
            ends.append(ends[-1] + length)
            demo |= {
                "tasks": np.full(length, task),
                "init_states": np.full(length, init_state),
                "ends": np.full(length, ends[-1]),
            }
            demos.append(demo)
    if not demos:
        raise ValueError(
            f"the scripted expert failed in all {len(jobs)} episodes: it knows libero_spatial's tasks 0-3, 5, 7 and 8"
        )
    print(f"demonstrations: {len(demos)} of {len(jobs)} episodes succeeded, {ends[-1]} steps", flush=True)
    save_npz(path, {key: np.concatenate([demo[key] for demo in demos]) for key in demos[0]})
    shutil.rmtree(parts)
    with np.load(path) as file:
        return dict(file)
