"""gymnasium environments by TRL's contract: one tool, ``act``, and observations as text."""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal

from fst_dspy.agents import contract
from fst_dspy.agents.contract import described
from fst_dspy.errors import ProgramError

Describe = Callable[[Any, Any], str]
"""Puts an observation into words: ``describe(observation, environment)``."""


class GymEnvironment:
    """A gymnasium environment with discrete actions, as ``fst_dspy.env`` takes them.

    Args:
        environment: As ``gymnasium.make`` gives it.
        actions: A name for each action, in the environment's order.
        describe: Puts observations into words.

    Attributes:
        done: Whether the episode was terminated or truncated.
        reward: The sum of its rewards so far.
        mission: The environment's, where it has one (MiniGrid).
    """

    def __init__(self, environment: Any, actions: Sequence[str], describe: Describe) -> None:
        self._environment, self._actions, self._describe = environment, list(actions), describe
        self.done, self.reward, self.mission = False, 0.0, ""

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> str:
        """Begin an episode; the example's field ``seed`` decides which."""
        seed = None if seed is None else operator.index(seed)  # numpy's, too
        observation, _ = self._environment.reset(seed=seed, options=options)
        self.done, self.reward = False, 0.0
        self.mission = str(getattr(self._environment.unwrapped, "mission", ""))
        return self._describe(observation, self._environment)

    def act(self, action: str) -> str:
        """What to do next."""
        if self.done:
            raise ValueError("the episode is over")
        number = self._actions.index(action) + int(self._environment.action_space.start)
        observation, reward, terminated, truncated, _ = self._environment.step(number)
        self.reward += contract.as_float(reward)
        self.done = bool(terminated or truncated)
        return self._describe(observation, self._environment)

    def close(self) -> None:
        """Close it."""
        self._environment.close()

    @property
    def played(self) -> Any:
        """The environment itself, without its wrappers."""
        return self._environment.unwrapped

    def fst_tools(self) -> dict[str, Callable[..., str]]:
        """``act``, whose argument is one of the actions' names: the instance alone knows them."""
        parameter = inspect.Parameter(
            "action",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Literal[tuple(self._actions)],
        )
        signature = inspect.Signature([parameter])

        def act(action: str) -> str:
            return self.act(action)

        return {"act": described(act, "act", signature, GymEnvironment.act.__doc__)}


def gym_factory(
    name: str,
    *,
    actions: Sequence[str] | None = None,
    describe: Describe | None = None,
    wrap: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Callable[[], GymEnvironment]:
    """A factory of a gymnasium environment, for ``fst_dspy.env``.

    Args:
        name: Its id, such as ``"FrozenLake-v1"`` or ``"MiniGrid-GoToObject-6x6-N2-v0"``.
        actions: A name for each action. By default those of the environment's own enum of actions,
            where it has as many, or else their numbers.
        describe: Puts an observation into words: ``describe(observation, environment)``. By default
            the environment's ``render_mode="ansi"`` text where the settings ask for it, and
            otherwise the observation as ``str`` writes it.
        wrap: Applied to the environment, such as one of gymnasium's wrappers.
        **settings: For ``gymnasium.make``.

    Raises:
        ProgramError: gymnasium is not installed, does not know the id, the environment's actions
            are not discrete, or not as many as ``actions``, or it shows pictures.
    """
    describe = describe or _as_it_is

    def make() -> GymEnvironment:
        environment = _make(name, settings)
        return _adapted(name, environment if wrap is None else wrap(environment), actions, describe)

    return make


def made(factory: Callable[[], Any]) -> Any:
    """What a factory makes; a gymnasium environment as ``gym_factory`` would have it.

    Raises:
        ProgramError: It is one that ``gym_factory`` refuses.
    """
    environment = factory()
    # Another thread may be in the middle of its import; then this is none of its environments.
    kind = getattr(sys.modules.get("gymnasium"), "Env", None)
    if kind is None or not isinstance(environment, kind):
        return environment
    name = environment.spec.id if environment.spec else type(environment).__name__
    return _adapted(name, environment, None, _as_it_is)


def _adapted(
    name: str, environment: Any, actions: Sequence[str] | None, describe: Describe
) -> GymEnvironment:
    if describe is _as_it_is:
        _check_words(name, environment)
    return GymEnvironment(environment, _action_names(name, environment, actions), describe)


def _make(name: str, settings: dict[str, Any]) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ProgramError(f"{name!r} needs gymnasium: pip install 'fst_dspy[agents]'") from error
    if name.startswith(("MiniGrid-", "BabyAI-")) and name not in gymnasium.registry:
        try:
            import minigrid  # noqa: F401  (registers them)
        except ImportError as error:
            raise ProgramError(f"{name!r} needs minigrid: pip install minigrid") from error
    try:
        return gymnasium.make(name, **settings)
    except gymnasium.error.Error as error:
        raise ProgramError(f"gymnasium cannot make {name!r}: {error}") from error


def _action_names(name: str, environment: Any, given: Sequence[str] | None) -> list[str]:
    import gymnasium

    space = environment.action_space
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise ProgramError(
            f"the actions of {name!r} are {space}, not discrete; wrap it in one "
            "whose are, or write an environment with tools of its own"
        )
    count = int(space.n)
    own = getattr(environment.unwrapped, "actions", None)
    # A wrapper may leave some of them out; which, it does not say.
    if given is None and isinstance(own, type) and issubclass(own, Enum) and len(own) == count:
        given = [member.name for member in own]
    names = (
        list(given) if given is not None else [str(space.start + number) for number in range(count)]
    )
    if len(names) != count or len(set(names)) != len(names):
        raise ProgramError(
            f"{name!r} has {count} actions; actions must name each of them once, got {names}"
        )
    return names


def _check_words(name: str, environment: Any) -> None:
    """Refuse observations that are pictures, which nobody has put into words."""
    if environment.render_mode == "ansi":
        return
    for part, one in _parts("observation", environment.observation_space):
        shape = getattr(one, "shape", None) or ()
        if len(shape) > 1 and math.prod(shape) >= contract.PIXELS:
            raise ProgramError(
                f"{name!r} shows pictures ({part} of {shape}), {contract.NO_PICTURES} with "
                "describe=, or wrap it in one that does"
            )


def _parts(name: str, space: Any) -> Iterator[tuple[str, Any]]:
    """The spaces within a space, by name, however deep."""
    inside = getattr(space, "spaces", None)
    if inside is None:
        yield name, space
        return
    named = inside.items() if isinstance(inside, Mapping) else enumerate(inside)
    for part, one in named:
        yield from _parts(str(part), one)


def _as_it_is(observation: Any, environment: Any) -> str:
    """The environment's own text picture, if it was made to draw one; or the observation."""
    if getattr(environment, "render_mode", None) == "ansi":
        return str(environment.render()).strip()
    if isinstance(observation, dict):
        return "\n".join(f"{key}: {contract.as_text(one)}" for key, one in observation.items())
    return contract.as_text(observation)
