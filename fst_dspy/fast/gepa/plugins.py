"""What users plug into the fast channel, checked when ``FST`` is made.

Of DSPy's and GEPA's own kinds: a reflection LM, proposers, selectors, samplers, criteria.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import dspy
from gepa.core.callbacks import GEPACallback
from gepa.proposer.reflective_mutation.base import CandidateSelector
from gepa.strategies.acceptance import AcceptanceCriterion
from gepa.utils import StopperProtocol

from fst_dspy.config import ALIASES
from fst_dspy.errors import ConfigError
from fst_dspy.fast.gepa.arguments import refuse_elsewhere, settings_of
from fst_dspy.fast.gepa.strategies import Strategies
from fst_dspy.fast.proposers.proposal_fn import ProposalFnProposer, is_proposal_fn, is_proposer
from fst_dspy.fast.proposers.protocol import Proposer
from fst_dspy.student.metric import check_metric


@dataclass(frozen=True)
class Plugins:
    """What was plugged in, and the settings that are left.

    Attributes:
        reflection_lm: Rewrites instructions, or is there for ``proposer`` to use; ``None``: none.
        proposer: The user's own; ``None``: reflection or lessons.
        strategies: gepa's, given as objects.
        settings: Plain settings for ``FSTConfig.make``.
    """

    reflection_lm: dspy.BaseLM | None
    proposer: Proposer | None
    strategies: Strategies
    settings: Mapping[str, Any]


def read_plugins(
    metric: Callable[..., Any] | None,
    reflection_lm: Any,
    instruction_proposer: Any,
    settings: Mapping[str, Any],
    *,
    callbacks: Any = None,
    stop_callbacks: Any = None,
    gepa_kwargs: Any = None,
) -> Plugins:
    """Check what was plugged in, and bring it into the form that the fast channel works with.

    Args:
        metric, reflection_lm, instruction_proposer, callbacks, stop_callbacks, gepa_kwargs: As for
            ``FST``.
        settings: Its other settings, objects among them.

    Raises:
        ConfigError: Something of another kind than it should be.
        MetricError: The metric cannot be called, or is ``async``.
    """
    check_metric(metric)
    lm = read_reflection_lm(reflection_lm)
    refuse_elsewhere(settings)
    watching = {"callbacks": callbacks, "stop_callbacks": stop_callbacks}
    more = settings_of(gepa_kwargs, {**settings, **watching})
    callbacks = read_callbacks(more.pop("callbacks", callbacks))
    stoppers = read_stoppers(more.pop("stop_callbacks", stop_callbacks))
    strategies, settings = _strategies({**settings, **more})
    strategies = replace(strategies, callbacks=callbacks, stop_callbacks=stoppers)
    if settings.get("reflection_prompt_template") is not None and (
        lm is None or instruction_proposer is not None
    ):
        raise ConfigError(
            "reflection_prompt_template is the prompt of the reflection_lm: give one, and no "
            "instruction_proposer, which has a prompt of its own"
        )
    return Plugins(lm, read_proposer(instruction_proposer, lm), strategies, settings)


def read_reflection_lm(given: Any) -> dspy.BaseLM | None:
    """The reflection LM: a ``dspy.LM`` as it is, or one of the name that was given.

    Raises:
        ConfigError: It is neither.
    """
    if given is None or isinstance(given, dspy.BaseLM):
        return given
    if not isinstance(given, str):
        raise ConfigError(
            "reflection_lm must be a dspy.LM, or the name of one such as 'openai/gpt-5', got "
            f"{type(given).__name__}"
        )
    if "/" not in given.strip("/"):
        raise ConfigError(
            f"reflection_lm={given!r} names no provider; write it as dspy.LM does, "
            "'provider/model' such as 'openai/gpt-5', or give the LM itself"
        )
    try:
        return dspy.LM(given)
    except Exception as error:
        raise ConfigError(f"dspy.LM({given!r}) cannot be made: {error}") from error


def read_proposer(given: Any, lm: dspy.BaseLM | None) -> Proposer | None:
    """The user's proposer under our protocol, be it of that kind or of dspy.GEPA's.

    Args:
        given: The proposer.
        lm: The reflection LM, for one of dspy.GEPA's kind to use.

    Raises:
        ConfigError: It is of neither kind.
    """
    if given is None or is_proposer(given):
        return given
    if is_proposal_fn(given):
        return ProposalFnProposer(given, lm)
    if inspect.isclass(given):
        what = f"the class {given.__name__}; give an instance of it"
    elif isinstance(given, dspy.BaseLM):
        what = "a language model; pass it as reflection_lm"
    else:
        what = f"{type(given).__name__}"
    raise ConfigError(
        "instruction_proposer must have propose(components, records, names) (fst_dspy.Proposer) or "
        "be called as dspy.GEPA's are, (candidate, reflective_dataset, components_to_update) -> "
        f"{{component: text}}, and not be async; got {what}"
    )


def read_callbacks(given: Any) -> tuple[Any, ...]:
    """gepa's callbacks.

    Raises:
        ConfigError: It is no list, or one of them has none of the methods.
    """
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise ConfigError(f"callbacks must be a list of gepa's, got {type(given).__name__}")
    methods = [name for name in vars(GEPACallback) if name.startswith("on_")]
    for callback in given:
        if inspect.isclass(callback) or not any(hasattr(callback, name) for name in methods):
            raise ConfigError(
                f"a callback of gepa's is an object with some of {', '.join(methods)}; got "
                f"{callback!r} (DSPy's own go to dspy.configure(callbacks=[...]))"
            )
    return tuple(given)


def read_stoppers(given: Any) -> tuple[StopperProtocol, ...]:
    """gepa's stop callbacks, one or several.

    Raises:
        ConfigError: One of them cannot be called with a state.
    """
    stoppers = () if given is None else given if isinstance(given, list | tuple) else (given,)
    for stopper in stoppers:
        if inspect.isclass(stopper) or not _takes_state(stopper):
            raise ConfigError(
                "a stop callback is called with gepa's state and returns whether to stop "
                f"(gepa.utils.StopperProtocol), got {stopper!r}"
            )
    return tuple(stoppers)


def _takes_state(stopper: Any) -> bool:
    called = stopper if inspect.isroutine(stopper) else getattr(stopper, "__call__", None)  # noqa: B004
    if called is None or inspect.iscoroutinefunction(called):
        return False
    try:
        inspect.signature(stopper).bind(None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _strategies(settings: Mapping[str, Any]) -> tuple[Strategies, dict[str, Any]]:
    """The strategies that were given as objects, and the settings with their names instead."""
    left = {
        ALIASES.get(name, name) if _is_object(value) else name: value
        for name, value in settings.items()
    }
    found: dict[str, Any] = {}
    for setting, (field, check, protocol) in _OBJECTS.items():
        value = left.get(setting)
        if isinstance(value, str) and value == "custom":
            raise ConfigError(f"{setting}='custom' stands for an object: give the object itself")
        if not _is_object(value):
            continue
        if inspect.isclass(value) or not check(value):
            kind = f"the class {value.__name__}" if inspect.isclass(value) else type(value).__name__
            raise ConfigError(f"{setting} must be one of its names or {protocol}, got {kind}")
        found[field] = value
        left[setting] = "custom"
    if left.get("batch_sampler") in ("custom", "epoch_shuffled", None):
        left.pop("batch_sampler", None)
    else:
        raise ConfigError(
            f"batch_sampler must be 'epoch_shuffled' or an object with next_minibatch_ids, got "
            f"{left['batch_sampler']!r}"
        )
    return Strategies(**found), left


def _is_object(value: Any) -> bool:
    return value is not None and not isinstance(
        value, str | int | float | bool | dict | list | tuple
    )


def _selects(value: Any) -> bool:
    try:
        inspect.signature(value).bind(None, [], [], 0, {})
    except (TypeError, ValueError):
        return False
    return callable(value) and not inspect.iscoroutinefunction(value)


_OBJECTS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "component_selector": (
        "component_selector",
        _selects,
        "called with (state, trajectories, subsample_scores, candidate_idx, candidate)",
    ),
    "candidate_selection_strategy": (
        "candidate_selector",
        lambda value: isinstance(value, CandidateSelector),
        "an object with select_candidate_idx(state)",
    ),
    "batch_sampler": (
        "batch_sampler",
        lambda value: callable(getattr(value, "next_minibatch_ids", None)),
        "an object with next_minibatch_ids(loader, state)",
    ),
    "acceptance_criterion": (
        "acceptance_criterion",
        lambda value: isinstance(value, AcceptanceCriterion),
        "an object with should_accept(proposal, state)",
    ),
}
"""Settings that may be objects: their field of ``Strategies``, a check, and what they must be."""
