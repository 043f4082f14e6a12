"""The arms of a comparison: ways of spending one budget of rollouts on one task.

An arm is one compile or several in a row, each going on from the program and the weights that the
one before it found best. A stage may be any DSPy optimizer that takes the arguments of ``FST`` and
leaves an ``FSTResult`` on the program as ``detailed_results``; adding an arm is adding to ``ARMS``.

The sequential arms run through ``dspy.BetterTogether`` (``stages.py``), over ``gepa_only`` and
``rl_only`` of ``FST`` in place of ``dspy.GEPA`` and DSPy's ``GRPO``: so both of its steps draw from
the budget that the other arms have, every rollout is counted, sampling has its seed, and a step
that was killed goes on. DSPy's ``GRPO`` has none of that, and renders answers again from their
parsed fields, which would make the arm weaker for reasons of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dspy.teleprompt import Teleprompter

from fst_dspy.config import used_by
from fst_dspy.errors import ConfigError
from fst_dspy.student.metric import call_metric
from fst_dspy.types import Arm as Channels

BY_SCORE: Mapping[str, Any] = {"slow_signal": "reward"}
"""Weights alone stand for RL as others have it, unless told otherwise."""


@dataclass(frozen=True)
class Stage:
    """One compile of an arm.

    Attributes:
        name: What it is called in folders and tables.
        make: ``make(metric, *, seed, log_dir, track_stats, progress, reflection_lm, **settings)``
            gives the optimizer.
        until: Share of the arm's budget that is spent when the stage ends, in (0, 1].
    """

    name: str
    make: Callable[..., Teleprompter]
    until: float = 1.0


@dataclass(frozen=True)
class Arm:
    """A way of spending the budget.

    Attributes:
        summary: What it does, for tables and help.
        stages: Its compiles, in order.
    """

    summary: str
    stages: tuple[Stage, ...]


def _fst(
    channels: Channels, own: Mapping[str, Any], metric: Callable[..., Any], **options: Any
) -> Teleprompter:
    from fst_dspy.optimizer import FST  # seconds of imports, which making jobs does not need

    usual = usual_settings(channels)
    return FST(metric, arm=channels, **used_by(channels, {**usual, **options, **own}))


def usual_settings(channels: str) -> Mapping[str, Any]:
    """What runs of some channels are given unless told otherwise."""
    return BY_SCORE if channels == "rl_only" else {}


def _distill(metric: Callable[..., Any], **options: Any) -> Teleprompter:
    from fst_dspy.distill.optimizer import FSTDistill

    return FSTDistill(metric, **options)


def _blind(metric: Callable[..., Any], **options: Any) -> Teleprompter:
    return _fst("fst", {}, ScoreAlone(metric), **options)


def _stage(channels: Channels, until: float = 1.0, **own: Any) -> Stage:
    """A compile of ``FST``, with settings that make the arm what it is."""
    return Stage(channels, partial(_fst, channels, own), until)


def _sequential(share: float) -> Arm:
    return Arm(
        f"prompts on {share:.0%} of the budget, then weights under the best prompts",
        (_stage("gepa_only", share), _stage("rl_only")),
    )


class ScoreAlone:
    """A metric whose feedback nobody hears: what was told is held apart from what is joint."""

    def __init__(self, metric: Callable[..., Any]) -> None:
        self.metric = metric

    def __call__(self, gold: Any, pred: Any, trace: Any = None) -> float:
        return call_metric(self.metric, gold, pred).reward


ARMS: dict[str, Arm] = {
    "fst": Arm("prompts and weights together", (_stage("fst"),)),
    "rl_only": Arm("weights alone", (_stage("rl_only"),)),
    "gepa_only": Arm("prompts alone", (_stage("gepa_only"),)),
    "sequential": _sequential(0.5),
    "sequential_10": _sequential(0.1),
    "sequential_25": _sequential(0.25),
    "sequential_75": _sequential(0.75),
    "sequential_reverse": Arm(
        "weights on half of the budget, then prompts for the best weights",
        (_stage("rl_only", 0.5), _stage("gepa_only")),
    ),
    "fst_distill": Arm(
        "prompts on half of the budget, then distilled into the weights of the bare prompt",
        (Stage("fst_distill", _distill),),
    ),
    "sdpo": Arm(
        "weights alone, by the metric's text in place of its score",
        (_stage("rl_only", slow_signal="feedback"),),
    ),
    "rl_both": Arm(
        "weights alone, by the metric's score and its text",
        (_stage("rl_only", slow_signal="both"),),
    ),
    "fst_both": Arm(
        "prompts and weights together, the weights by score and text",
        (_stage("fst", slow_signal="both"),),
    ),
    "fst_blind": Arm(
        "prompts and weights together, by the metric's score alone", (Stage("fst", _blind),)
    ),
}
USUAL_ARMS = ("fst", "rl_only", "gepa_only", "sequential", "sequential_reverse", "fst_distill")
"""What is compared unless arms are named."""


def find_arm(name: str) -> Arm:
    """The arm of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in ARMS:
        raise ConfigError(f"there is no arm {name!r}; known: {', '.join(ARMS)}")
    return ARMS[name]
