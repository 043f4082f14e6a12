"""One episode: an environment from its reset to its end, and the turns taken in it."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import dspy

from fst_dspy.agents import contract
from fst_dspy.agents.contract import EpisodeOver
from fst_dspy.agents.event_loop import EventLoop
from fst_dspy.agents.gym import GymEnvironment
from fst_dspy.errors import LOST, ProgramError
from fst_dspy.rollouts.session import calls_so_far, note_turn
from fst_dspy.types import Turn, TurnStatus

NOTHING: Mapping[str, str] = {}
EPISODE = "fst_episode"
"""The DSPy setting that holds the episode in which an agent's tools are called."""


class Episode:
    """An environment that is being acted in. A context manager, which closes it whatever happens.

    Args:
        environment: As ``fst_dspy.agents.contract`` says.
        fields: The example's, for ``reset``.
        max_turns: Turns it may take.

    Raises:
        ProgramError: The environment is in another episode.

    Attributes:
        turns: Those taken so far.
        observation: What the environment showed last, as it gave it: a copy, as the environment
            may change its own.
        seen: The same as text.
        done: Whether it is over.
        lost: What the environment runs on has failed, in a tool that an agent called.
    """

    def __init__(self, environment: Any, fields: Mapping[str, Any], max_turns: int) -> None:
        self.environment, self.max_turns = environment, max_turns
        self.turns: list[Turn] = []
        self.lost: BaseException | None = None
        self._came_to: Counter[int] = Counter()
        self._loop = EventLoop()
        self._place = _enter(environment)
        try:
            self._see(contract.reset(environment, fields, self._loop))
            self._reward = contract.reward_so_far(environment)
            self.done = contract.is_done(environment)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Episode:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def over(self) -> bool:
        """Whether no turn is left."""
        return self.done or len(self.turns) >= self.max_turns

    def came_to(self, inputs: Mapping[str, Any]) -> int:
        """How often these inputs were come to before, now that they are again."""
        known = hash(str(inputs))
        self._came_to[known] += 1
        return self._came_to[known] - 1

    def step(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        action: str,
        said: Mapping[str, str] = NOTHING,
    ) -> Any:
        """Take a turn by calling a tool; its result is the next observation.

        An error of the tool is the turn's result, for the agent to read, and no observation: what
        was seen before still holds. One of what the environment runs on is raised.

        Raises:
            EpisodeOver: No turn was left.
        """
        if self.over:
            raise EpisodeOver
        began = time.perf_counter()
        status: TurnStatus = "ok"
        try:
            result = self._loop.finished(contract.tool_of(self.environment, tool)(**arguments))
        except LOST:
            raise
        except Exception as error:
            status, result = "error", contract.said_of(error)
        self.done = contract.is_done(self.environment)
        seconds = time.perf_counter() - began
        self._note(action, result, status, self._gained(), seconds, said)
        if status == "ok":
            self._see(result)
        return result

    def invalid(self, action: str, why: str, said: Mapping[str, str] = NOTHING) -> None:
        """Take a turn by an action that is none: the environment does not see it."""
        self._note(action, why, "invalid", 0.0, 0.0, said)

    def prediction(self, **fields: Any) -> dspy.Prediction:
        """How it went, once it has ended: see ``fst_dspy.agents.module.Env``."""
        reward = contract.final_reward(self.environment, self._loop)
        return dspy.Prediction(
            **fields,
            turns=tuple(self.turns),
            reward=reward,
            done=self.done,
            feedback=contract.feedback_of(self.environment),
        )

    def _close(self) -> None:
        with _guard:  # before it is closed, which may give it back to a pool
            _playing.discard(self._place)
        contract.close(self.environment, self._loop)

    def _see(self, observation: Any) -> None:
        self.seen = contract.as_text(observation)
        self.observation = observation
        with suppress(Exception):  # what cannot be copied is shown as it is
            self.observation = copy.deepcopy(observation)

    def _gained(self) -> float:
        """What the reward has grown by since it was last looked at."""
        before, self._reward = self._reward, contract.reward_so_far(self.environment)
        return (self._reward or 0.0) - (before or 0.0)

    def _note(
        self,
        action: str,
        result: Any,
        status: TurnStatus,
        reward: float,
        seconds: float,
        said: Mapping[str, str],
    ) -> None:
        turn = Turn(
            observation=self.seen,
            action=action,
            result=contract.as_text(result),
            reward=reward,
            status=status,
            seconds=seconds,
            calls=calls_so_far(),
            said=dict(said),
        )
        self.turns.append(turn)
        note_turn(turn)


_playing: set[int] = set()
_guard = threading.Lock()


def _enter(environment: Any) -> int:
    """Note that an environment is in an episode; what it is noted as.

    Raises:
        ProgramError: It is in another, where it would be reset in the middle.
    """
    played = environment.played if isinstance(environment, GymEnvironment) else environment
    with _guard:
        if id(played) in _playing:
            raise ProgramError(
                f"two episodes were given one {type(played).__name__} at once: the factory of an "
                "environment has to make a new one each time"
            )
        _playing.add(id(played))
    return id(played)


def current() -> Episode:
    """The episode in which the caller's tools are called.

    Raises:
        RuntimeError: There is none: a tool of an environment was called outside its program.
    """
    episode = dspy.settings.get(EPISODE)
    if not isinstance(episode, Episode):
        raise RuntimeError("this tool belongs to an environment, and no episode is running")
    return episode
