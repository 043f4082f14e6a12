"""Which component of a candidate the next proposal rewrites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from gepa.core.state import GEPAState
from gepa.proposer.reflective_mutation.base import ReflectionComponentSelector
from gepa.strategies.component_selector import RoundRobinReflectionComponentSelector

from fst_dspy.candidate import split_component
from fst_dspy.gepa_adapter import Trajectory


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


SELECTORS: dict[
    Literal["round_robin", "worst_first"], Callable[[], ReflectionComponentSelector]
] = {
    "round_robin": RoundRobinReflectionComponentSelector,
    "worst_first": WorstFirstComponentSelector,
}
"""``FastConfig.component_selector`` by name."""
