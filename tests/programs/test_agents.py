"""The programs that act: they can be solved, not by chance; the house rule is told by feedback."""

from __future__ import annotations

import collections
import random
import sys

import dspy
import pytest

from fst_dspy.errors import DataError
from fst_dspy.tasks import load_task

pytest.importorskip("minigrid")

FORWARD = {0: (1, 0), 1: (0, 1), 2: (-1, 0), 3: (0, -1)}


def environments(task, count):
    factory = task.program._factories
    for example in task.trainset[:count]:
        environment = factory()
        yield environment, environment.reset(**example.inputs())
        environment.close()


def reaches(task, choose, count=30):
    """Share of episodes with reward, of a way to choose the next action."""
    form = task.program._forms[None]
    solved = 0
    for environment, seen in environments(task, count):
        for _ in range(task.program.max_turns):
            tool, arguments = form.read(choose(environment, seen))
            seen = getattr(environment, tool)(**arguments)
            if environment.done:
                break
        solved += environment.reward
    return solved / count


def way_over_the_ice(environment, seen):
    lake = environment._lake.unwrapped
    moves = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
    start = divmod(int(lake.s), 4)
    first, queue = {start: None}, collections.deque([start])
    while queue:
        at = queue.popleft()
        if lake.desc[at] == b"G":
            return first[at]
        for name, (down, right) in moves.items():
            there = (at[0] + down, at[1] + right)
            inside = 0 <= there[0] < 4 and 0 <= there[1] < 4
            if inside and there not in first and lake.desc[there] != b"H":
                first[there] = first[at] or name
                queue.append(there)
    raise AssertionError("no way")


def towards(room, goal):
    """The next of left, right and forward on a shortest way to stand before a cell."""
    start = (tuple(map(int, room.agent_pos)), int(room.agent_dir))
    first, queue = {start: None}, collections.deque([start])
    while queue:
        (x, y), facing = state = queue.popleft()
        ahead = (x + FORWARD[facing][0], y + FORWARD[facing][1])
        if ahead == goal:
            return first[state]
        thing = room.grid.get(*ahead)
        following = {
            "left": ((x, y), (facing - 1) % 4),
            "right": ((x, y), (facing + 1) % 4),
            **({"forward": (ahead, facing)} if thing is None else {}),
        }
        for name, there in following.items():
            if there not in first:
                first[there] = first[state] or name
                queue.append(there)
    return "left"


def find(room, wanted):
    for x in range(room.width):
        for y in range(room.height):
            thing = room.grid.get(x, y)
            if thing is not None and wanted(thing):
                return x, y
    return None


def keeper_of_the_house(rule):
    def choose(environment, seen):
        room = environment._room
        colour = environment.mission.split()[-2]
        key = rule[colour]
        if room.carrying is not None:
            goal = find(room, lambda thing: thing.type == "door")
            return towards(room, goal) or "toggle"
        goal = find(room, lambda thing: (thing.type, thing.color) == ("key", key))
        return towards(room, goal) or "pickup"

    return choose


def to_the_ball(environment, seen):
    room, colour = environment._room, environment.mission.split()[-2]
    goal = find(room, lambda thing: (thing.type, thing.color) == ("ball", colour))
    return towards(room, goal) or "pickup"


def anything(task, rng=None):
    rng = random.Random(0)
    form = task.program._forms[None]
    names = getattr(form.annotation, "__args__", ("left", "down", "right", "up"))
    return lambda environment, seen: rng.choice(names)


def test_lakes_can_be_crossed_and_seldom_by_chance():
    task = load_task("frozen_lake")
    assert reaches(task, way_over_the_ice) == 1.0
    assert reaches(task, anything(task), count=100) <= 0.2


@pytest.mark.parametrize("kind", ["unlock", "goto", "pickup"])
def test_missions_can_be_fulfilled(kind):
    task = load_task(f"gridworld:kind={kind}")
    gridworld = sys.modules[task.program._factories.__module__]
    choose = keeper_of_the_house(gridworld.draw_rule(0)) if kind == "unlock" else to_the_ball
    assert reaches(task, choose, count=20) >= 0.95


def test_doors_are_not_opened_by_chance():
    task = load_task("gridworld")
    assert reaches(task, anything(task), count=40) <= 0.2


def test_the_rule_is_told_by_feedback_alone_and_never_the_same_colour():
    task = load_task("gridworld")
    gridworld = sys.modules[task.program._factories.__module__]
    rule = gridworld.draw_rule(0)
    assert sorted(rule) == sorted(rule.values())
    assert all(door != key for door, key in rule.items())
    told = False
    for environment, seen in environments(task, 10):
        room, colour = environment._room, environment.mission.split()[-2]
        keys = [thing.color for thing in room.grid.grid if thing and thing.type == "key"]
        (wrong,) = set(keys) - {rule[colour]}
        for _ in range(task.program.max_turns):
            assert "need the" not in seen
            if room.carrying is None:
                goal = find(room, lambda thing: (thing.type, thing.color) == ("key", wrong))  # noqa: B023
                action = towards(room, goal) or "pickup"
            else:
                goal = find(room, lambda thing: thing.type == "door")
                action = towards(room, goal) or "toggle"
            seen = environment.act(action)
            if environment.feedback:
                told = True
                assert (
                    environment.feedback
                    == f"Lesson: {colour} doors need the {rule[colour]} key here."
                )
                assert not environment.done
                break
    assert told


def test_sets_share_no_episode_and_another_seed_has_others():
    tasks = [load_task("gridworld", seed) for seed in (0, 1)]
    seeds = [e.seed for t in tasks for e in [*t.trainset, *t.valset, *t.testset]]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(DataError, match="kind must be one of"):
        load_task("gridworld:kind=fly")


def test_a_lake_refuses_what_is_no_direction():
    task = load_task("frozen_lake")
    for environment, _ in environments(task, 1):
        with pytest.raises(ValueError, match="no direction"):
            environment.step("north")
    assert isinstance(task.trainset[0], dspy.Example)
