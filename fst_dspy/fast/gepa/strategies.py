"""gepa's strategies, by name or as objects: parents, components, minibatches, acceptance."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gepa.core.state import GEPAState
from gepa.proposer.reflective_mutation.base import CandidateSelector, ReflectionComponentSelector
from gepa.strategies.acceptance import (
    AcceptanceCriterion,
    ImprovementOrEqualAcceptance,
    StrictImprovementAcceptance,
)
from gepa.strategies.batch_sampler import BatchSampler, EpochShuffledBatchSampler
from gepa.strategies.candidate_selector import (
    CurrentBestCandidateSelector,
    EpsilonGreedyCandidateSelector,
    ParetoCandidateSelector,
    TopKParetoCandidateSelector,
)
from gepa.strategies.component_selector import RoundRobinReflectionComponentSelector
from gepa.utils import StopperProtocol

from fst_dspy.config import FastConfig
from fst_dspy.errors import ConfigError
from fst_dspy.fast.acceptance import BySums
from fst_dspy.fast.reflector import Trajectory
from fst_dspy.student.candidate import INSTRUCTIONS, component_name, split_component


class WorstFirstComponentSelector:
    """Picks a component of the predictor that fares worst on the minibatch.

    Worst is the largest share of calls that could not be read, then the lowest mean reward of the
    rollouts that reached the predictor; of lost rollouts, nothing counts. The components of equals
    take turns.
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
        if trajectory.rollout.is_lost:
            continue
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


EPSILON = 0.1
"""gepa's share of parents that ``"epsilon_greedy"`` draws from all candidates."""
TOP_K = 5
"""gepa's number of candidates that ``"top_k_pareto"`` draws from."""


@dataclass(frozen=True)
class Strategies:
    """The user's own strategies, in place of those that ``FastConfig`` names, and who looks on.

    They are called in every process and every phase; what they remember is not in checkpoints.

    Attributes:
        component_selector: gepa's protocol; may name a predictor for its instructions.
        candidate_selector: gepa's protocol.
        batch_sampler: gepa's protocol; for iterations with rollouts of their own.
        acceptance_criterion: gepa's protocol. A merge, and a child with fewer demos, need not do
            better than its parent, whatever the criterion; one that has not run is not accepted.
        callbacks: Objects with methods of gepa's ``GEPACallback``.
        stop_callbacks: gepa's ``StopperProtocol``: called with gepa's state, they end the run.
    """

    component_selector: ReflectionComponentSelector | None = None
    candidate_selector: CandidateSelector | None = None
    batch_sampler: BatchSampler[Any, Any] | None = None
    acceptance_criterion: AcceptanceCriterion | None = None
    callbacks: tuple[Any, ...] = ()
    stop_callbacks: tuple[StopperProtocol, ...] = ()


NAMED = Strategies()
"""None of the user's own."""


def component_selector(config: FastConfig, own: Strategies) -> ReflectionComponentSelector:
    """The selector of the components that the next proposal rewrites.

    Raises:
        ConfigError: ``config`` says ``"custom"``, and there is none.
    """
    if own.component_selector is not None:
        return NamingSelector(own.component_selector)
    if config.component_selector == "custom":
        raise _missing("component_selector")
    return SELECTORS[config.component_selector]()


def candidate_selector(
    config: FastConfig, own: Strategies, rng: random.Random
) -> CandidateSelector:
    """What draws an iteration's parent.

    Raises:
        ConfigError: ``config`` says ``"custom"``, and there is none.
    """
    if own.candidate_selector is not None:
        return own.candidate_selector
    match config.candidate_selection_strategy:
        case "pareto":
            return ParetoCandidateSelector(rng)
        case "current_best":
            return CurrentBestCandidateSelector()
        case "epsilon_greedy":
            return EpsilonGreedyCandidateSelector(EPSILON, rng)
        case "top_k_pareto":
            return TopKParetoCandidateSelector(TOP_K, rng)
    raise _missing("candidate_selection_strategy")


def batch_sampler(
    config: FastConfig, own: Strategies, rng: random.Random
) -> BatchSampler[Any, Any]:
    """What draws an iteration's minibatch."""
    return own.batch_sampler or EpochShuffledBatchSampler(config.minibatch_size, rng)


def acceptance_criterion(config: FastConfig, own: Strategies) -> AcceptanceCriterion:
    """What a child must show to be accepted.

    Raises:
        ConfigError: ``config`` says ``"custom"``, and there is none.
    """
    if own.acceptance_criterion is not None:
        return own.acceptance_criterion
    match config.acceptance_criterion:
        case "strict_improvement":
            return BySums(StrictImprovementAcceptance())
        case "improvement_or_equal":
            return BySums(ImprovementOrEqualAcceptance())
    raise _missing("acceptance_criterion")


class NamingSelector:
    """The user's selector, whose answer is checked: gepa would pass over a wrong one in silence."""

    def __init__(self, own: ReflectionComponentSelector) -> None:
        self.own = own

    def __call__(
        self,
        state: GEPAState,
        trajectories: list[Any],
        subsample_scores: list[float],
        candidate_idx: int,
        candidate: dict[str, str],
    ) -> list[str]:
        """The components to update.

        Raises:
            TypeError: It named none, or one that there is not.
        """
        said = self.own(state, trajectories, subsample_scores, candidate_idx, candidate)
        return component_names(said, candidate, "component_selector")


def component_names(said: Any, components: Mapping[str, str], who: str) -> list[str]:
    """Component names from those of components or, as in ``dspy.GEPA``, of predictors.

    Args:
        said: What a plug-in named.
        components: The candidate's.
        who: The plug-in's setting, for the error.

    Raises:
        TypeError: It is no list of names, an empty one, or names what there is not.
    """
    if isinstance(said, str) or not isinstance(said, Sequence) or not said:
        raise TypeError(f"{who} must return a list of component names, got {said!r}")
    names = []
    for name in said:
        full = name if name in components else component_name(str(name), INSTRUCTIONS)
        if full not in components:
            raise TypeError(f"{who} named {name!r}; the components are {sorted(components)}")
        names.append(full)
    return names


def _missing(name: str) -> ConfigError:
    return ConfigError(f"{name}='custom' stands for an object: give the object itself")
