"""What an environment is: TRL's contract (``environment_factory`` of TRL's ``GRPOTrainer``).

A factory makes an environment. ``reset(**fields)`` begins an episode on the fields of an example
and returns the first observation, or ``None``; every other public method of its class is a tool,
which the model calls and whose return value it reads. Where the class has ``get_reward()``, the
episode's reward is its own. Three attributes are optional, by the custom of TRL's and OpenEnv's
examples: ``done``, true once the episode is over; ``reward``, the reward so far; ``feedback``, a
text about how it went. Each may be a property; a method ``reward()`` is taken for ``get_reward()``,
while methods ``done()`` and ``feedback()`` are tools as any other. An environment may have
``close()``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from fst_dspy import errors
from fst_dspy.agents.event_loop import EventLoop
from fst_dspy.errors import ProgramError

NOT_TOOLS = ("reset", "get_reward", "reward", "close")
"""Public methods of an environment that the model does not call."""

Factory = Callable[[], Any]
"""Makes an environment; a class, as a rule."""


class RemoteError(Exception):
    """What an environment raised in its own process; the message has the kind of error, too."""


class EpisodeOver(BaseException):
    """Ends an agent's loop once its environment is done; not for an agent's own ``except``."""


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """The environment's tools by name: the public methods of its class, in their order there.

    Raises:
        ProgramError: It has no ``reset``, or no tool.
    """
    kind = type(environment)
    if callable(getattr(kind, "fst_tools", None)):  # of one whose class does not say what they are
        return environment.fst_tools()
    if not callable(getattr(kind, "reset", None)):
        raise ProgramError(
            f"the environment {kind.__name__} has no reset(); an environment has reset(**fields) "
            "-> observation, and its other public methods are the model's tools"
        )
    # By the class: asking an instance would evaluate its properties.
    names = [
        name
        for base in reversed(kind.__mro__)
        for name in vars(base)
        # As TRL has it: static methods too, those of the class not.
        if inspect.isfunction(getattr(kind, name, None))
        and not name.startswith("_")
        and name not in NOT_TOOLS
    ]
    if not names:
        raise ProgramError(
            f"the environment {kind.__name__} has no tool: give it a public method with typed "
            "arguments and a docstring"
        )
    return {name: getattr(environment, name) for name in dict.fromkeys(names)}


def tool_of(environment: Any, name: str) -> Callable[..., Any]:
    """One of its tools, whatever attributes it has of that name."""
    if callable(getattr(type(environment), "fst_tools", None)):
        return environment.fst_tools()[name]
    return getattr(environment, name)


def said_of(error: BaseException) -> str:
    """An error in words, as it was in the environment's process if it has one."""
    return str(error) if isinstance(error, RemoteError) else errors.said_of(error)


def reset(environment: Any, fields: Mapping[str, Any], loop: EventLoop) -> Any:
    """Begin an episode; ``reset`` is given the fields that it takes.

    Raises:
        ProgramError: It takes one that the example does not have.
    """
    parameters = inspect.signature(environment.reset).parameters.values()
    varying = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    lacking = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name not in fields and p.kind not in varying
    ]
    if lacking:
        raise ProgramError(
            f"reset() of the environment needs {', '.join(map(repr, lacking))}, and the example"
            f" has {', '.join(map(repr, fields)) or 'no inputs'}; name it in with_inputs, or "
            "give the argument a default"
        )
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        fields = {name: value for name, value in fields.items() if name in names}
    return loop.finished(environment.reset(**fields))


def as_text(observation: Any) -> str:
    """An observation as the model reads it; of TRL's content blocks the texts.

    Raises:
        ProgramError: There is a picture in it, or there are only pictures, which a local model is
            not shown.
    """
    if observation is None:
        return ""
    if isinstance(observation, list) and observation and all(map(_is_block, observation)):
        if all(part["type"] != "text" for part in observation):
            raise ProgramError(f"the environment shows no text, {NO_PICTURES}")
        parts = [
            str(part["text"]) if part["type"] == "text" else f"[{part['type']}: not shown]"
            for part in observation
        ]
        return "\n".join(parts)
    if _is_picture(observation):
        raise ProgramError(f"the environment shows {_kind_of(observation)}, {NO_PICTURES}")
    return _shown(observation) if type(observation) in (dict, list, tuple) else str(observation)


NO_PICTURES = "and pictures cannot be shown to the model yet: put into words what is to be seen"
PIXELS = 1024
"""Numbers in an array of two dimensions or more, from which on it is no observation in words."""
MEDIA = ("image", "image_url", "video", "audio", "input_audio")
"""What a content block may hold beside text, by its ``type``."""


def _is_block(part: Any) -> bool:
    """Whether it is a content block; other things may have a ``type`` too."""
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    return "text" in part if kind == "text" else kind in MEDIA


def _shown(value: Any) -> str:
    """What ``repr`` writes, but for what numpy adds to numbers and arrays within others."""
    if _is_picture(value):
        raise ProgramError(f"the environment shows {_kind_of(value)}, {NO_PICTURES}")
    if type(value) is dict:
        return f"{{{', '.join(f'{_shown(key)}: {_shown(one)}' for key, one in value.items())}}}"
    if type(value) in (list, tuple):
        inside = ", ".join(map(_shown, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    is_numpys = type(value).__module__ == "numpy" and not isinstance(value, str | bytes)
    return str(value) if is_numpys else repr(value)


def _is_picture(value: Any) -> bool:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return len(shape) > 1 and math.prod(shape) >= PIXELS
    return any(
        f"{kind.__module__}.{kind.__name__}" == "PIL.Image.Image" for kind in type(value).__mro__
    )


def _kind_of(value: Any) -> str:
    return f"{type(value).__name__} of {getattr(value, 'shape', None) or value.size}"


def is_done(environment: Any) -> bool:
    """Whether the episode is over, as far as the environment says."""
    done = getattr(environment, "done", False)
    return bool(done) and not callable(done)


def reward_so_far(environment: Any) -> float | None:
    """The environment's ``reward``; ``None`` where it has none that is a number."""
    return _number(getattr(environment, "reward", None))


def as_float(reward: Any) -> float:
    """A number of any kind, an array's or a tensor's only element among them."""
    return float(reward.item() if hasattr(reward, "item") else reward)


def _number(reward: Any) -> float | None:
    """A reward that is a finite number; ``None`` where it is none."""
    if reward is None or callable(reward) or isinstance(reward, str | bytes):
        return None
    try:
        found = as_float(reward)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if math.isfinite(found) else None


def final_reward(environment: Any, loop: EventLoop) -> float | None:
    """The reward of an episode that has ended: ``get_reward()``, or else ``reward``.

    It is asked once an episode: it may be costly.
    """
    for name in ("get_reward", "reward"):
        if callable(getattr(type(environment), name, None)):
            return _number(loop.finished(getattr(environment, name)()))
    return reward_so_far(environment)


def feedback_of(environment: Any) -> str:
    """What the environment says of the episode; empty where it says nothing."""
    said = getattr(environment, "feedback", None)
    return "" if said is None or callable(said) else str(said)


def close(environment: Any, loop: EventLoop) -> None:
    """Close it and its loop, whatever state they are in; errors then are of no use to anybody."""
    with suppress(Exception):
        if callable(getattr(environment, "close", None)):
            loop.finished(environment.close())
    loop.close()


def factory_for(factories: Factory | Mapping[str, Factory], name: str | None) -> Factory:
    """The factory of an example; among several, that which its field ``environment`` names.

    Raises:
        ProgramError: The field is missing, or names none of them.
    """
    if not isinstance(factories, Mapping):
        return factories
    known = ", ".join(map(repr, factories))
    if name is None:
        raise ProgramError(f"each example needs a field 'environment' that names one of {known}")
    if name not in factories:
        raise ProgramError(f"the field environment={name!r} of an example must name one of {known}")
    return factories[name]


def described(
    function: Callable[..., Any], name: str, signature: inspect.Signature, doc: str | None
) -> Callable[..., Any]:
    """A function that passes for a tool of this name, signature and docstring."""
    function.__name__, function.__doc__ = name, doc
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {
        p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty
    }
    return function
