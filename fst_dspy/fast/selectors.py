"""Which component of a candidate the next proposal rewrites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from gepa.core.state import GEPAState
from gepa.proposer.reflective_mutation.base import ReflectionComponentSelector
from gepa.strategies.component_selector import RoundRobinReflectionComponentSelector

from fst_dspy.fast.reflector import Trajectory
from fst_dspy.student.candidate import INSTRUCTIONS, split_component


class WorstFirstComponentSelector:
    """Picks a component of the predictor that fares worst on the minibatch.

    Worst is the largest share of calls that could not be read, then the lowest mean reward of the
    rollouts that reached the predictor. The components of equals take turns.
    """

    def __call__(
        self,
        state: GEPAState,
        trajectories: list[Any],
        subsample_scores: list[float],
        candidate_idx: int,
        candidate: dict[str, str],
    ) -> list[str]:
        """The one component to update."""
        names = state.list_of_named_predictors
        health = {name: _health(split_component(name)[0], trajectories) for name in names}
        worst = [name for name in names if health[name] == min(health.values())]
        turn = state.named_predictor_id_to_update_next_for_program_candidate[candidate_idx]
        return [worst[turn % len(worst)]]


def _health(predictor: str, trajectories: Sequence[Trajectory]) -> tuple[float, float]:
    reads, rewards = [], []
    for trajectory in trajectories:
        traces = [t for t in trajectory.rollout.traces if t.predictor == predictor]
        reads += [trace.outputs is not None for trace in traces]
        rewards += [trajectory.rollout.reward] if traces else []
    if not reads:
        return (1.0, float("inf"))
    return (sum(reads) / len(reads), sum(rewards) / len(rewards))


class TogetherWhileAlike:
    """Picks the instructions of several predictors at once while a minibatch scores alike.

    Such scores do not tell who is at fault. And where several predictors are, as at a reward of 0
    they may all be, a better text for one of them changes nothing: one at a time, no proposal would
    ever be accepted.

    Args:
        otherwise: Picks a component where scores differ.
    """

    def __init__(self, otherwise: ReflectionComponentSelector) -> None:
        self.otherwise = otherwise

    def __call__(
        self,
        state: GEPAState,
        trajectories: list[Any],
        subsample_scores: list[float],
        candidate_idx: int,
        candidate: dict[str, str],
    ) -> list[str]:
        """The components to update."""
        names = state.list_of_named_predictors
        texts = [name for name in names if split_component(name)[1] == INSTRUCTIONS]
        if len(texts) > 1 and len(set(subsample_scores)) == 1:
            return texts
        return self.otherwise(state, trajectories, subsample_scores, candidate_idx, candidate)


class AllComponentSelector:
    """Picks all components that may be updated: gepa's ``"all"``."""

    def __call__(
        self,
        state: GEPAState,
        trajectories: list[Any],
        subsample_scores: list[float],
        candidate_idx: int,
        candidate: dict[str, str],
    ) -> list[str]:
        """The components to update."""
        return list(state.list_of_named_predictors)


SELECTORS: dict[
    Literal["round_robin", "worst_first", "all"], Callable[[], ReflectionComponentSelector]
] = {
    "round_robin": lambda: TogetherWhileAlike(RoundRobinReflectionComponentSelector()),
    "worst_first": lambda: TogetherWhileAlike(WorstFirstComponentSelector()),
    "all": AllComponentSelector,
}
"""``FastConfig.component_selector`` by name."""
