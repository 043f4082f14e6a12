"""The metric of an environment that rewards by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy

from fst_dspy.errors import MetricError
from fst_dspy.types import Turn

TOLD = 5
"""Turns that went wrong of which the feedback tells, at most."""


def env_reward(
    gold: Any,
    pred: dspy.Prediction,
    trace: Any = None,
    pred_name: str | None = None,
    pred_trace: Any = None,
) -> dspy.Prediction:
    """The environment's own reward, with feedback on how the episode went.

    The feedback is the environment's, if it has any, then the actions that were invalid and the
    tools that failed, and how the episode ended.

    Raises:
        AttributeError: ``pred`` is not what ``fst_dspy.env`` returns.
        MetricError: The environment gives no reward.
    """
    turns = pred.turns  # of what is no episode, such as an example's labels, nothing can be said
    if pred.reward is None:
        raise MetricError(
            "the environment gives no reward: it needs get_reward() or an attribute reward that is "
            "a finite number; or score pred.turns with a metric of your own"
        )
    return dspy.Prediction(score=float(pred.reward), feedback=_feedback(pred, turns))


def _feedback(pred: dspy.Prediction, turns: Sequence[Turn]) -> str:
    said = [pred.feedback] if pred.feedback else []
    wrong = {
        (turn.action, turn.result): number
        for number, turn in reversed(list(enumerate(turns, 1)))
        if turn.status != "ok"
    }
    for (action, result), number in sorted(wrong.items(), key=lambda item: item[1])[:TOLD]:
        said.append(f"Turn {number}, {action!r}: {result}")
    ended = "ended" if pred.done else "was cut off"
    said.append(f"The episode {ended} after {len(turns)} turns with reward {pred.reward:g}.")
    return "\n".join(said)
