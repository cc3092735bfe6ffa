"""Sokoban, MiniGrid and TextWorld as graphgpo_sokoban.py sees them: rules, levels, state keys, prompts."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graphgpo_sokoban import SUCCESS, Args, TextWorld, graph_distances, held_out_levels, make_env

ROWS = np.arange(8)
LEVELS = [(1, seed, 1, 0) for seed in range(8)]
BOTH = pytest.mark.parametrize(
    "flags", [{}, {"num_boxes": 2, "room_size": 7, "max_solution": 12}], ids=["6x6", "7x7, 2 boxes"]
)
KEYED = ("Sokoban", "MiniGrid-DoorKey-5x5-v0", "MiniGrid-FourRooms-v0", "BabyAI-GoToObj-v0")


def started(num_envs=8, levels=None, **flags):
    envs = make_env(Args(**flags), num_envs)
    envs.reset(LEVELS[:num_envs] if levels is None else levels)
    return envs


def act(envs, *actions):
    """Take the same action in all environments, several times: -> the last success, done."""
    result = None
    for action in actions:
        result = envs.step(np.arange(envs.num_envs), np.full(envs.num_envs, action))
    return result


def slow_step(room, action):
    """Sokoban on a dict of cells: {(row, column): set of "wall", "box", "target", "player"}."""
    (at,) = [cell for cell, things in room.items() if "player" in things]
    down, right = [(-1, 0), (1, 0), (0, -1), (0, 1)][action]
    ahead, beyond = (at[0] + down, at[1] + right), (at[0] + 2 * down, at[1] + 2 * right)
    if "wall" in room[ahead]:
        return
    if "box" in room[ahead]:
        if room[beyond] & {"wall", "box"}:
            return
        room[ahead].discard("box")
        room[beyond].add("box")
    room[at].discard("player")
    room[ahead].add("player")


SYMBOLS = {
    "#": {"wall"},
    ".": set(),
    "O": {"target"},
    "X": {"box"},
    "*": {"box", "target"},
    "P": {"player"},
    "S": {"player", "target"},
}


def rooms(envs):
    """The rooms as the prompts draw them."""
    found = []
    for prompt in envs.prompts(np.arange(envs.num_envs)):
        lines = [line for line in prompt.splitlines() if line and set(line) <= set(SYMBOLS)]
        found.append({(i, j): set(SYMBOLS[c]) for i, line in enumerate(lines) for j, c in enumerate(line)})
    return found


# -------------------- Sokoban --------------------
@BOTH
def test_sokoban_follows_the_rules(flags):
    """500 random steps in 8 rooms against the slow game; the prompt draws what the fast one holds."""
    envs, rng = started(**flags), np.random.default_rng(0)
    pushes = 0
    for step in range(500):
        if step % 25 == 0:  # boxes end in corners soon
            envs.reset([(1, row, step, 0) for row in range(8)])
            slow = rooms(envs)
        actions, before = rng.integers(0, 4, 8), envs.boxes.copy()
        success, _ = envs.step(ROWS, actions)
        for room, action in zip(slow, actions, strict=True):
            slow_step(room, action)
        assert rooms(envs) == slow
        solved = [all(("box" in things) == ("target" in things) for things in room.values()) for room in slow]
        assert success.tolist() == solved
        pushes += int((before != envs.boxes).any(1).sum())
    assert pushes > 100


@BOTH
def test_levels_are_solvable_in_the_stated_number_of_steps(flags):
    """All states of a level explored with step(): the graph's distance of the start is the level's shortest solution."""
    envs = started(**flags)
    for level in LEVELS[: 3 if flags else 8]:
        envs = started(1, [level], **flags)
        key = envs.keys(np.arange(1))[0]
        frontier, states, sources, targets = [key], {key: (envs.player.copy(), envs.boxes.copy())}, [], []
        while frontier:
            key = frontier.pop()
            for action in range(4):
                envs.player, envs.boxes = (part.copy() for part in states[key])
                success, _ = act(envs, action)
                after = envs.keys(np.arange(1))[0]
                sources.append(key)
                targets.append(SUCCESS if success[0] else after)
                if not success[0] and after not in states:
                    states[after] = envs.player.copy(), envs.boxes.copy()
                    frontier.append(after)
        start = next(iter(states))
        shortest = graph_distances(sources, targets)[start]
        assert shortest == envs.optimal[0] and 3 <= shortest <= Args(**flags).max_solution


def test_levels_depend_on_their_name_alone():
    envs = started(levels=[(1, 5, 2, group // 4) for group in range(8)])
    drawn = rooms(envs)
    assert drawn[0] == drawn[3] != drawn[4] == drawn[7]
    assert rooms(started(levels=[(1, 5, 2, 1)] * 8))[0] == drawn[4]
    assert len({str(room) for room in rooms(started(64, levels=[(1, 5, i, 0) for i in range(64)]))}) > 60


def test_held_out_levels_never_appear_in_training():
    """In rooms so small that levels repeat: without exclude() many of the held-out ones come up, with it none."""
    flags = {"room_size": 5, "wall_density": 0.0, "eval_episodes": 64}
    training = [(1, 1, iteration, 0) for iteration in range(300)]
    seen = {str(room) for room in rooms(started(64, held_out_levels(Args(**flags)), **flags))}
    open_envs = started(300, training, **flags)
    assert len(seen & {str(room) for room in rooms(open_envs)}) > 5
    open_envs.exclude(held_out_levels(Args(**flags)))
    open_envs.reset(training)
    assert not seen & {str(room) for room in rooms(open_envs)}


def test_observation_shows_everything():
    envs = started()
    planes = envs.observe(ROWS).reshape(8, 4, 4, 4)
    for room, (walls, boxes, targets, player) in zip(rooms(envs), planes, strict=True):
        for kind, plane in zip(("wall", "box", "target", "player"), (walls, boxes, targets, player), strict=True):
            assert {(i + 1, j + 1) for i, j in np.argwhere(plane)} == {
                cell for cell, things in room.items() if kind in things and 0 < cell[0] < 5 and 0 < cell[1] < 5
            }


def test_the_cap_ends_an_episode():
    for envs, steps in ((started(), 15), (started(max_steps=11), 11)):
        assert not act(envs, *[-1] * (steps - 1))[1].any()
        success, done = act(envs, -1)
        assert done.all() and not success.any()


def test_boxes_on_targets_are_counted_as_gym_sokoban_does():
    """1 for a box that comes to a target, -1 for one that leaves it: over an episode the change of their number."""
    envs, rng = (
        started(64, [(1, 1, i, 0) for i in range(64)], num_boxes=2, room_size=7, max_solution=12),
        np.random.default_rng(0),
    )
    rows, total = np.arange(64), np.zeros(64)
    before, seen = (envs.boxes & envs.targets).sum(1), set()
    for _ in range(12):
        envs.step(rows, rng.integers(0, 4, 64))
        total += envs.gains
        seen |= set(envs.gains.tolist())
    assert (total == (envs.boxes & envs.targets).sum(1) - before).all() and seen == {-1.0, 0.0, 1.0}


def test_rows_step_alone():
    envs = started()
    before, changed = envs.keys(ROWS), set()
    for action in range(4):
        envs.step(np.array([2, 5]), np.full(2, action))
        changed |= {row for row in ROWS if envs.keys(ROWS)[row] != before[row]}
    assert changed == {2, 5}


# -------------------- State keys --------------------
@pytest.mark.parametrize("env_id", KEYED)
def test_equal_levels_have_equal_keys(env_id):
    levels = [(1, 1, 1, row // 4) for row in range(8)]
    envs = started(levels=levels, env_id=env_id)
    keys = envs.keys(ROWS)
    assert len(set(keys[:4])) == len(set(keys[4:])) == 1
    observed = envs.observe(ROWS)
    assert observed.dtype == np.float32 and observed.shape == (8, envs.obs_dim)
    assert (observed[0] == observed[1]).all()
    envs.reset(levels)
    assert envs.keys(ROWS) == keys and (envs.observe(ROWS) == observed).all()


@pytest.mark.parametrize("env_id", KEYED)
def test_the_step_counter_is_not_in_the_key(env_id):
    envs = started(env_id=env_id)
    before = envs.keys(ROWS)
    act(envs, -1)  # time passes, nothing happens
    assert envs.keys(ROWS) == before
    if env_id != "Sokoban":
        act(envs, 0)  # turn left
        assert all(a != b for a, b in zip(envs.keys(ROWS), before, strict=True))
        act(envs, 1)  # and back
        assert envs.keys(ROWS) == before


@pytest.mark.parametrize("env_id", ["MiniGrid-Empty-5x5-v0", "MiniGrid-SimpleCrossingS9N1-v0", "MiniGrid-MemoryS7-v0"])
def test_minigrid_start_is_the_same_state_when_one_comes_back(env_id):
    """MiniGrid's hash is of the position's text, which before the first move has other types than after one."""
    envs = started(1, env_id=env_id)
    (before,) = envs.keys([0])
    turn = next(turn for turn in range(4) if free_ahead(envs, turn))
    act(envs, *[1] * turn, 2, 1, 1, 2, 1, 1, *[0] * turn)  # a step and back
    assert envs.keys([0]) == [before]


def free_ahead(envs, turns):
    """Whether the cell ahead is free after so many turns to the right."""
    env = envs.envs[0].unwrapped
    x, y = np.array(env.agent_pos) + [(1, 0), (0, 1), (-1, 0), (0, -1)][(env.agent_dir + turns) % 4]
    return env.grid.get(x, y) is None


def test_minigrid_keys_hold_what_is_carried_and_what_is_inside():
    from minigrid.core.world_object import Ball, Box, Key

    envs = started(1, env_id="MiniGrid-DoorKey-5x5-v0")
    keys = [envs.keys([0])[0]]
    for thing in (Key("yellow"), Key("red"), Ball("red"), Box("red", Key("blue")), Box("red")):
        envs.envs[0].carrying = thing
        keys.append(envs.keys([0])[0])
    cell = next(cell for cell in itertools.product(range(5), range(5)) if envs.envs[0].grid.get(*cell) is None)
    for inside in (None, Key("red"), Key("blue")):
        envs.envs[0].grid.set(*cell, Box("green", inside))
        keys.append(envs.keys([0])[0])
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("env_id", ["MiniGrid-GoToDoor-5x5-v0", "MiniGrid-GoToObject-6x6-N2-v0"])
def test_a_wrong_end_is_another_state_than_the_one_before_it(env_id):
    """It changes nothing in the grid; with one key it would be a harmless loop in the graph."""
    envs = started(1, env_id=env_id)
    before, end = envs.keys(np.arange(1)), envs.names.index("toggle")
    success, done = act(envs, end)
    assert done.all() and not success.any() and envs.keys(np.arange(1)) != before
    envs.reset(LEVELS[:1])
    assert envs.keys(np.arange(1)) == before
    envs = started(1, env_id=env_id, max_steps=1)  # running out of time is no such end
    act(envs, 0)
    key = envs.keys(np.arange(1))
    envs = started(1, env_id=env_id)
    act(envs, 0)
    assert envs.keys(np.arange(1)) == key


def test_minigrid_actions_are_those_of_the_environment():
    """Dynamic-Obstacles has three of the seven, and takes the others for the first."""
    envs = started(1, env_id="MiniGrid-Dynamic-Obstacles-5x5-v0")
    assert envs.names == ("left", "right", "forward") and envs.num_actions == 3


def test_an_environment_that_make_env_does_not_know_is_an_error():
    """And no Sokoban under another name."""
    with pytest.raises(KeyError, match="webshop"):
        make_env(Args(env_id="webshop-v0"), 1)


def test_minigrid_success_and_cap():
    """The empty 5x5 room, start top left, goal bottom right: forward twice, right, forward twice."""
    envs = started(2, env_id="MiniGrid-Empty-5x5-v0")
    for action in (2, 2, 1, 2):
        success, done = act(envs, action)
        assert not success.any() and not done.any()
    success, done = act(envs, 2)
    assert success.all() and done.all()
    envs = started(2, env_id="MiniGrid-Empty-5x5-v0", max_steps=9)
    assert not act(envs, *[0] * 8)[1].any()
    success, done = act(envs, 0)
    assert done.all() and not success.any()


def test_babyai_keeps_its_own_limits():
    """They are 0 until the reset, which computes them from the mission; --max-steps overrides them."""
    envs = started(4, env_id="BabyAI-GoToObj-v0")
    assert (envs.limits > 10).all()
    success, done = act(envs, *[0] * 10)
    assert not done.any() and not success.any()
    generator, found = np.random.default_rng(0), False
    while not found:  # a random walk meets the thing, with a reward, which divides by the limit
        envs.reset(LEVELS[:4])
        walks = [act(envs, action)[0].any() for action in generator.integers(0, 3, envs.limits.min() - 1).tolist()]
        found = any(walks)
    envs = started(2, env_id="BabyAI-GoToObj-v0", max_steps=3)
    assert not act(envs, 0, 0)[1].any() and act(envs, 0)[1].all()


def test_minigrid_prompt():
    envs = started(1, levels=[(1, 1, 1, 0)], env_id="MiniGrid-Empty-5x5-v0")
    (prompt,) = envs.prompts([0])
    assert "get to the green goal square" in prompt and "Possible actions: left, right, forward" in prompt
    assert "green goal (2 ahead, 2 right)" in prompt and "You carry nothing" in prompt
    act(envs, 1)  # facing down: the goal is now on the left
    assert "green goal (2 ahead, 2 left)" in envs.prompts([0])[0]


def test_parts_of_a_babyai_mission_are_in_the_key():
    """The first of "go to A, then go to B" leaves no trace in the grid; the mark for "not yet" changes from step to step."""
    envs = started(8, env_id="BabyAI-GoToSeqS5R2-v0")  # some of these levels have missions of one part
    row = next(row for row in ROWS if hasattr(envs.envs[row].instrs, "a_done"))
    keys = []
    for state in (False, "continue", "success"):
        envs.envs[row].instrs.a_done = state
        keys += envs.keys(ROWS[row : row + 1])
    assert keys[0] == keys[1] != keys[2] and hash(keys[2])


# -------------------- TextWorld --------------------
def test_a_stop_while_a_game_is_compiled(monkeypatch):
    """Ctrl-C is for the run, not for TextWorld's compiler, whose failure would end it."""
    envs, arrived = make_env(Args(env_id="tw-coin_collector", game_level=1, model="any"), 1), []
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"]

    compile_game = envs.textworld.generator.compile_game

    def interrupted(game, options):
        os.kill(os.getpid(), signal.SIGINT)
        assert subprocess.run(command).returncode == 0
        return compile_game(game, options)

    monkeypatch.setattr(envs.textworld.generator, "compile_game", interrupted)
    before = signal.signal(signal.SIGINT, lambda *_: arrived.append("stop"))
    try:
        assert Path(envs.make_game((1, 1, 1, 0))).exists() and set(arrived) == {"stop"}
    finally:
        signal.signal(signal.SIGINT, before)


def test_textworld():
    """A generated game, played along its commands: one start for the group, keys come back, success at the end, the cap."""
    envs = started(2, [(1, 1, 1, 0)] * 2, env_id="tw-coin_collector", game_level=2, model="any", max_steps=9)
    assert isinstance(envs, TextWorld)
    rows = np.arange(2)
    start = envs.keys(rows)
    assert start[0] == start[1]
    (prompt, _), (names, _) = envs.prompts(rows), envs.choices(rows)
    assert "coin" in prompt and all(name in prompt for name in names)
    task = prompt.split("Your task: ")[-1].split("\n")[0]  # the last step of the solution, not the way
    assert "coin" in task and not any(way in task for way in ("north", "south", "east", "west"))
    assert prompt.endswith("\nAction:") and "$$" not in prompt and "|" not in prompt  # without the banner
    ways = [name for name in names if name.startswith("go ")]
    opposite = {"go north": "go south", "go south": "go north", "go east": "go west", "go west": "go east"}
    envs.step(rows[:1], np.array([names.index(ways[0])]))
    assert envs.keys(rows)[0] != envs.keys(rows)[1] == start[1]
    (names, _) = envs.choices(rows)
    envs.step(rows[:1], np.array([names.index(opposite[ways[0]])]))
    assert envs.keys(rows)[0] == start[0]
    assert [envs.step(rows, np.array([-1, -1]))[1].all() for _ in range(7)] == [False] * 6 + [True]
    assert envs.keys(rows) == start

    (file,) = map(Path, envs.files.values())
    written = file.stat().st_mtime_ns
    envs.reset([(1, 1, 1, 0)] * 2)
    assert file.stat().st_mtime_ns == written  # the game is not made again
    envs.reset([(1, 1, 2, 0)] * 2)
    assert not file.exists() and all(Path(file).exists() for file in envs.files.values())  # those before are gone
    envs.reset([(1, 1, 1, 0)] * 2)
    won, been = False, {start[0]}
    while not won:  # walk on to rooms not seen yet, take the coin where it lies
        names = envs.choices(rows)[0]
        take = [name for name in names if name.startswith("take")]
        for name in take or [name for name in names if name.startswith("go ")]:
            before = envs.states[0], envs.envs[0].copy()
            won = bool(envs.step(rows[:1], np.array([names.index(name)]))[0][0])
            if won or envs.keys(rows)[0] not in been:
                break
            envs.states[0], envs.envs[0] = before
        been.add(envs.keys(rows)[0])
        assert len(been) < 9
    assert won
