"""A room of MiniGrid with a hidden house rule: which key opens which door.

The mission names a door, such as "open the red door". The room has two keys, and the house decides
by a rule, drawn from the seed, which colour of key opens which colour of door. Only the feedback of
an episode tells the rule. What is seen says all that matters, so there is no history, and a
reasoning leads from the rule to the action. ``GoTo`` and ``Pickup`` missions have no rule:
``goto``, ``pickup``.
"""

from __future__ import annotations

from random import Random
from typing import Any, Literal

import dspy

import fst_dspy
from fst_dspy.errors import DataError
from fst_dspy.types import Task

COLOURS = ("red", "green", "blue", "purple", "yellow")
MISSIONS = ("unlock", "goto", "pickup")
SIZE = 6
Action = Literal["left", "right", "forward", "pickup", "toggle"]


class Act(dspy.Signature):
    """Choose the next action to fulfil the mission. left and right turn on the spot, forward takes
    a step, pickup takes what is straight ahead, toggle opens a door straight ahead with the key
    that is carried."""

    mission: str = dspy.InputField()
    observation: str = dspy.InputField()
    reasoning: str = dspy.OutputField()
    action: str = dspy.OutputField()


def draw_rule(seed: int) -> dict[str, str]:
    """The house rule: the colour of the key for each colour of door, never its own."""
    rng = Random(f"gridworld {seed}")
    while True:
        keys = rng.sample(COLOURS, len(COLOURS))
        if all(door != key for door, key in zip(COLOURS, keys, strict=True)):
            return dict(zip(COLOURS, keys, strict=True))


def room(rule: dict[str, str], kind: str, seed: int) -> Any:
    """A MiniGrid environment: one room, its objects and mission drawn from the seed."""
    from minigrid.core.grid import Grid
    from minigrid.core.mission import MissionSpace
    from minigrid.core.world_object import Ball, Door, Key
    from minigrid.minigrid_env import MiniGridEnv

    rng = Random(f"room {kind} {seed}")
    colour, other = rng.sample(COLOURS, 2)
    text = {
        "unlock": f"open the {colour} door",
        "goto": f"go to the {colour} ball",
        "pickup": f"pick up the {colour} ball",
    }[kind]

    class HouseDoor(Door):
        def toggle(self, env: Any, pos: Any) -> bool:
            carried = env.carrying
            if isinstance(carried, Key) and carried.color == rule[self.color]:
                self.is_locked, self.is_open = False, True
                return True
            if isinstance(carried, Key):
                env.wrong_key = carried.color
            return False

    class Room(MiniGridEnv):
        def __init__(self) -> None:
            self.wrong_key = ""
            space = MissionSpace(mission_func=lambda: text)
            super().__init__(mission_space=space, grid_size=SIZE, max_steps=200)

        def _gen_grid(self, width: int, height: int) -> None:
            self.grid = Grid(width, height)
            self.grid.wall_rect(0, 0, width, height)
            self.mission = text
            if kind == "unlock":
                row = rng.randint(1, height - 2)
                self.put_obj(HouseDoor(colour, is_locked=True), width - 1, row)
                wrong = rng.choice([c for c in COLOURS if c != rule[colour]])
                things: list[Any] = [Key(rule[colour]), Key(wrong)]
                doorway = (width - 2, row)  # the other key there would bar the way for good
            else:
                things = [Ball(colour), Ball(other)]
                doorway = None
            rng.shuffle(things)
            for thing in things:
                self.place_obj(thing, reject_fn=lambda _, at: at == doorway, max_tries=100)
            self.place_agent()
            while self.grid.get(*self.front_pos) in things:  # there would be nothing to do
                self.place_agent()

    return Room()


class House:
    """A room by TRL's contract of environments.

    Args:
        rule: The colour of the key for each colour of door.
        kind: ``"unlock"``, ``"goto"`` or ``"pickup"``.
    """

    def __init__(self, rule: dict[str, str], kind: str) -> None:
        self._rule, self._kind = rule, kind
        self._room: Any = None
        self.done, self.reward, self.feedback, self.mission = False, 0.0, "", ""

    def reset(self, seed: int) -> str:
        """Begin in the room of a seed."""
        self._room = room(self._rule, self._kind, seed)
        self._room.reset(seed=seed)
        self.mission = self._room.mission
        self.done, self.reward, self.feedback = False, 0.0, ""
        return self._told()

    def act(self, action: Action) -> str:
        """left, right, forward, pickup or toggle."""
        ahead = self._ahead()
        self._room.step(self._room.actions[action])
        colour = self.mission.split()[-2]
        if self._kind == "unlock":
            door = self._ahead()
            self.done = action == "toggle" and getattr(door, "is_open", False)
            if action == "toggle" and self._room.wrong_key:
                self.feedback = f"Lesson: {colour} doors need the {self._rule[colour]} key here."
        elif self._kind == "goto":
            thing = self._ahead()
            self.done = thing is not None and (thing.type, thing.color) == ("ball", colour)
        else:
            carried = self._room.carrying
            self.done = carried is not None and carried.color == colour
        self.reward = float(self.done)
        if action == "pickup" and self._room.carrying is None:
            return f"There is nothing to pick up. {self._told()}"
        if action == "forward" and ahead is not None:
            return f"You cannot go there. {self._told()}"
        return self._told()

    def close(self) -> None:
        """Close it."""
        if self._room is not None:
            self._room.close()

    def _ahead(self) -> Any:
        return self._room.grid.get(*self._room.front_pos)

    def _told(self) -> str:
        """What lies where, as seen by the agent: ahead or behind, to the left or the right."""
        room = self._room
        forward, right, at = room.dir_vec, room.right_vec, room.agent_pos
        seen = []
        for x in range(room.width):
            for y in range(room.height):
                thing = room.grid.get(x, y)
                if thing is None or thing.type == "wall":
                    continue
                away = (x - at[0], y - at[1])
                seen.append(f"{thing.color} {thing.type}: {_where(away, forward, right)}")
        ahead = self._ahead()
        seen.append(f"straight ahead: {_named(ahead) if ahead is not None else 'free'}")
        seen.append(f"you carry: {_named(room.carrying) if room.carrying else 'nothing'}")
        return "; ".join(seen)


def _named(thing: Any) -> str:
    return "wall" if thing.type == "wall" else f"{thing.color} {thing.type}"


def _where(away: Any, forward: Any, right: Any) -> str:
    ahead = int(away[0] * forward[0] + away[1] * forward[1])
    aside = int(away[0] * right[0] + away[1] * right[1])
    parts = [f"{abs(ahead)} {'ahead' if ahead > 0 else 'behind'}"] if ahead else []
    parts += [f"{abs(aside)} {'right' if aside > 0 else 'left'}"] if aside else []
    return " ".join(parts)


def load(
    seed: int,
    train: int = 200,
    val: int = 48,
    test: int = 100,
    kind: str = "unlock",
    max_turns: int = 16,
) -> Task:
    """The task: rooms by their seeds, no two sets with one in common.

    ``max_turns`` leaves little for detours: the shortest way takes 10 turns on average, and more
    than 16 in one room of a hundred.

    Raises:
        DataError: ``kind`` is none of ``unlock``, ``goto`` and ``pickup``.
    """
    if kind not in MISSIONS:
        raise DataError(f"kind must be one of {', '.join(MISSIONS)}, got {kind!r}")
    rule, first = draw_rule(seed), 100_000 * (seed + 1)
    rooms = [
        dspy.Example(seed=first + number).with_inputs("seed")
        for number in range(train + val + test)
    ]
    told = " ".join(f"{door} doors need the {key} key here." for door, key in rule.items())
    return Task(
        name="gridworld",
        program=fst_dspy.env(lambda: House(rule, kind), Act, max_turns=max_turns),
        metric=fst_dspy.env_reward,
        trainset=rooms[:train],
        valset=rooms[train : train + val],
        testset=rooms[train + val :],
        ideal_instructions={
            "act": f"Fetch the right key, carry it to the door and toggle it. {told}"
            if kind == "unlock"
            else "Turn towards it, and go forward until it is straight ahead."
        },
    )
