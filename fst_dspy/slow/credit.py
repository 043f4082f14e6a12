"""Which part of an agent's reward a call is credited with.

With ``credit="turn"`` a call is credited with what the rollout gained from the call's turn on: the
discounted sum of the rewards of that turn and all later ones. It is compared with the mean of what
the group's rollouts gained from the same turn on, so that a call is not blamed for what went wrong
before it, nor praised for what had been gained. A turn that one rollout of the group alone came to
has no such mean, and is compared with that of the first turn.

A turn whose action was none changed nothing, so what is gained later is not its gain: it has the
losses alone. Else a model learns to talk past its limit now and then, where another try is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from fst_dspy.types import Group, Rollout


def turn_returns(rollout: Rollout, discount: float) -> list[float]:
    """The discounted sum of rewards from each turn on; of a rollout without turns, its reward.

    Where the rollout's reward is not the sum of its turns', as with a metric of one's own, the last
    turn is given the rest.

    Args:
        rollout: It has been scored.
        discount: In (0, 1].
    """
    rewards = [turn.reward for turn in rollout.turns] or [0.0]
    rewards[-1] += rollout.reward - sum(rewards)
    backwards = accumulate(reversed(rewards), lambda later, own: own + discount * later)
    return_T = list(backwards)[::-1]
    for turn, one in enumerate(rollout.turns):
        if one.status == "invalid":
            return_T[turn] = min(return_T[turn], 0.0)
    return return_T


def turns_of_calls(rollout: Rollout) -> list[int]:
    """The turn that each call of a rollout was made in, from 0; after the last turn, that one."""
    ends = [turn.calls for turn in rollout.turns]
    last = max(0, len(ends) - 1)
    return [
        next((turn for turn, end in enumerate(ends) if call < end), last)
        for call in range(len(rollout.calls))
    ]


def centred_returns(group: Group, discount: float) -> list[list[float]]:
    """What each rollout gained from each turn on, less the mean of those that came to the turn."""
    return_G_T = [turn_returns(rollout, discount) for rollout in group.rollouts_G]
    longest = max(map(len, return_G_T), default=0)
    means: list[float] = []
    for turn in range(longest):
        came_to_it = [return_T[turn] for return_T in return_G_T if len(return_T) > turn]
        means.append(_mean(came_to_it) if len(came_to_it) > 1 or not means else means[0])
    return [
        [gained - means[turn] for turn, gained in enumerate(return_T)] for return_T in return_G_T
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
