"""FrozenLake (gymnasium): cross a frozen lake to the gift without falling into a hole.

Small enough for a laptop: 4 by 4 fields, four actions, the way told by words alone. Every example
is a lake of its own, drawn from its seed. The environment's reward is 1 at the gift, otherwise 0.
"""

from __future__ import annotations

from typing import Any

import dspy

import fst_dspy
from fst_dspy.types import Task

SIZE = 4
STEPS = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
"""Rows and columns of each step, in the order of gymnasium's actions."""
ACTIONS = tuple(STEPS)
HOLE, SHORE, ICE = "hole, no.", "shore, no.", "ice, yes."
WAY = "Go towards the gift."
"""What an episode that failed teaches, in the words of what is seen."""
WORDS = {b"F": "ice", b"S": "ice", b"H": "hole", b"G": "gift"}


class Act(dspy.Signature):
    """Choose the next step across the lake to the gift. Do not step into a hole."""

    observation: str = dspy.InputField()
    reasoning: str = dspy.OutputField()
    action: str = dspy.OutputField()


class FrozenLake:
    """A lake by TRL's contract of environments; ``seed`` draws it."""

    def __init__(self) -> None:
        self.done, self.reward, self.feedback = False, 0.0, ""
        self._lake: Any = None
        self._place = 0
        self._bumped = False

    def reset(self, seed: int) -> str:
        """Begin on the lake of a seed."""
        import gymnasium
        from gymnasium.envs.toy_text.frozen_lake import generate_random_map

        self.close()
        lake = generate_random_map(size=SIZE, seed=seed)
        self._lake = gymnasium.make("FrozenLake-v1", desc=lake, is_slippery=False)
        self._place, _ = self._lake.reset(seed=seed)
        self.done, self.reward, self.feedback, self._bumped = False, 0.0, "", False
        return self._told()

    def step(self, direction: str) -> str:
        """The next step: left, down, right or up."""
        if direction not in ACTIONS:
            raise ValueError(
                f"{direction!r} is no direction; it must be one of {', '.join(ACTIONS)}"
            )
        before = self._place
        self._place, reward, terminated, truncated, _ = self._lake.step(ACTIONS.index(direction))
        self.reward, self.done = float(reward), bool(terminated or truncated)
        fell = terminated and not reward
        self._bumped = self._bumped or self._place == before
        lessons = [*([SHORE] if self._bumped else []), *([HOLE] if fell else [ICE, WAY])]
        self.feedback = "" if reward else "\n".join(f"Lesson: {lesson}" for lesson in lessons)
        return "You fell into a hole." if fell else self._told()

    def close(self) -> None:
        """Close it."""
        if self._lake is not None:
            self._lake.close()

    def _told(self) -> str:
        desc = self._lake.unwrapped.desc
        row, column = divmod(int(self._place), SIZE)
        seen = []
        for name, (down, right) in STEPS.items():
            r, c = row + down, column + right
            inside = 0 <= r < SIZE and 0 <= c < SIZE
            seen.append(f"{name}: {WORDS[desc[r][c]] if inside else 'shore'}")
        gift_row, gift_column = SIZE - 1, SIZE - 1
        way = f"gift: {gift_row - row} down, {gift_column - column} right"
        return "; ".join([*seen, way])


def load(seed: int, train: int = 200, val: int = 48, test: int = 100, max_turns: int = 12) -> Task:
    """The task: lakes by their seeds, no two sets with one in common."""
    first = 100_000 * (seed + 1)
    lakes = [
        dspy.Example(seed=first + number).with_inputs("seed")
        for number in range(train + val + test)
    ]
    return Task(
        name="frozen_lake",
        program=fst_dspy.env(FrozenLake, Act, max_turns=max_turns),
        metric=fst_dspy.env_reward,
        trainset=lakes[:train],
        valset=lakes[train : train + val],
        testset=lakes[train + val :],
        ideal_instructions={
            "act": "\n".join((ICE, WAY, SHORE, HOLE)),
        },
    )
