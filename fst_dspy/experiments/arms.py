"""The arms of a comparison: ways of spending one budget of rollouts on one task.

An arm is one compile or several in a row, each going on from the program and the weights that the
one before it found best. A stage may be any DSPy optimizer that takes the arguments of ``FST`` and
leaves an ``FSTResult`` on the program as ``detailed_results``; adding an arm is adding to ``ARMS``.

The sequential arms run through ``dspy.BetterTogether`` (``stages.py``), over ``gepa_only`` and
``rl_only`` of ``FST`` in place of ``dspy.GEPA`` and ``dspy.GRPO``: so both of its steps draw from
the budget that the other arms have, every rollout is counted, sampling has its seed, and a step
that was killed goes on. ``dspy.GRPO`` has none of that, and renders answers again from their parsed
fields, which would make the arm weaker for reasons of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dspy.teleprompt import Teleprompter

from fst_dspy.errors import ConfigError
from fst_dspy.types import Arm as Channels


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


def _fst(channels: Channels, metric: Callable[..., Any], **options: Any) -> Teleprompter:
    from fst_dspy.optimizer import FST  # seconds of imports, which making jobs does not need

    return FST(metric, arm=channels, **options)


def _distill(metric: Callable[..., Any], **options: Any) -> Teleprompter:
    from fst_dspy.distill.optimizer import FSTDistill

    return FSTDistill(metric, **options)


def _stage(channels: Channels, until: float = 1.0) -> Stage:
    return Stage(channels, partial(_fst, channels), until)


ARMS: dict[str, Arm] = {
    "fst": Arm("prompts and weights together", (_stage("fst"),)),
    "rl_only": Arm("weights alone", (_stage("rl_only"),)),
    "gepa_only": Arm("prompts alone", (_stage("gepa_only"),)),
    "sequential": Arm(
        "prompts on half of the budget, then weights under the best prompts",
        (_stage("gepa_only", 0.5), _stage("rl_only")),
    ),
    "sequential_reverse": Arm(
        "weights on half of the budget, then prompts for the best weights",
        (_stage("rl_only", 0.5), _stage("gepa_only")),
    ),
    "fst_distill": Arm(
        "prompts on half of the budget, then distilled into the weights of the bare prompt",
        (Stage("fst_distill", _distill),),
    ),
}


def find_arm(name: str) -> Arm:
    """The arm of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in ARMS:
        raise ConfigError(f"there is no arm {name!r}; known: {', '.join(ARMS)}")
    return ARMS[name]
