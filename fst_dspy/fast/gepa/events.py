"""gepa's callbacks and stop callbacks: what the fast channel tells the ones, and asks the others.

Callbacks hear of fast phases and of trials alike. Iterations are numbered from 1 over the whole
run; a candidate's index is its place in the state of that moment. A trial is an iteration that goes
on for some optimizer steps; its rollouts are the slow phase's, so that it has no minibatch and no
evaluation to tell of. As in gepa, a callback that fails is told of through logging.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gepa.core.callbacks import (
    BudgetUpdatedEvent,
    CandidateAcceptedEvent,
    CandidateRejectedEvent,
    CandidateSelectedEvent,
    ErrorEvent,
    IterationEndEvent,
    IterationStartEvent,
    MergeAcceptedEvent,
    MergeAttemptedEvent,
    MergeRejectedEvent,
    OptimizationEndEvent,
    OptimizationStartEvent,
    ParetoFrontUpdatedEvent,
    ProposalEndEvent,
    ProposalStartEvent,
    ReflectiveDatasetBuiltEvent,
    StateSavedEvent,
    ValsetEvaluatedEvent,
    notify_callbacks,
)
from gepa.core.data_loader import ensure_loader
from gepa.core.state import GEPAState
from gepa.proposer.base import CandidateProposal
from gepa.utils import StopperProtocol

from fst_dspy import distributed
from fst_dspy.fast.acceptance import without_lost

Told = tuple[str, Mapping[str, Any]]
"""A callback's method, and the event it is given."""


class Events:
    """Tells callbacks what happens, and asks stop callbacks whether to go on.

    Args:
        callbacks: Objects with some of the methods of gepa's ``GEPACallback``.
        stoppers: Called with gepa's state; in the main process, for all of them.
        calls: Counts the run's rollouts so far, over all channels: gepa's metric calls.
        max_calls: The run's budget of them; ``None`` for none.

    Attributes:
        iteration: Number of the iteration under way, or of the last one.
        stopped: Which stop callback has ended the run; ``None``: none has.
    """

    def __init__(
        self,
        callbacks: Sequence[Any] = (),
        stoppers: Sequence[StopperProtocol] = (),
        *,
        calls: Callable[[], int] = lambda: 0,
        max_calls: int | None = None,
    ) -> None:
        self.callbacks, self.stoppers = list(callbacks), tuple(stoppers)
        self.calls, self.max_calls = calls, max_calls
        self.iteration = 0
        self.stopped: str | None = None
        self._begun = False

    @property
    def heard(self) -> bool:
        """Whether there is anybody to tell or ask."""
        return bool(self.callbacks or self.stoppers)

    def stop(self, state: GEPAState) -> bool:
        """Whether a stop callback ends the run; once one does, it has ended.

        Args:
            state: gepa's, with the candidates and their scores; its counts are put in here.
        """
        if self.stopped is None and self.stoppers:
            self.count_in(state)
            name = distributed.from_main(lambda: self._who_stops(state))
            if name is not None:
                self.stopped = f"the stop callback {name} returned True"
        return self.stopped is not None

    def count_in(self, state: GEPAState) -> None:
        """Put the numbers of iterations and rollouts so far into gepa's state."""
        state.i, state.total_num_evals = self.iteration - 1, self.calls()

    # --- what happens ---------------------------------------------------------------------------

    def begin(
        self, seed: Mapping[str, str], trainset_size: int, valset_size: int, config: dict[str, Any]
    ) -> None:
        """The fast channel begins, in this process; told once."""
        if not self._begun:
            self._begun = True
            self.tell(
                "on_optimization_start",
                OptimizationStartEvent(
                    seed_candidate=dict(seed),
                    trainset_size=trainset_size,
                    valset_size=valset_size,
                    config=config,
                ),
            )

    def end(self, state: GEPAState, best: int) -> None:
        """The run ends."""
        if self._begun:
            self.count_in(state)
            self.tell(
                "on_optimization_end",
                OptimizationEndEvent(
                    best_candidate_idx=best,
                    total_iterations=self.iteration,
                    total_metric_calls=state.total_num_evals,
                    final_state=state,
                ),
            )

    def begin_iteration(self, number: int, state: GEPAState, trainset: Sequence[Any]) -> None:
        """An iteration begins, the ``number``-th of the run."""
        self.iteration = number
        self.count_in(state)
        state.add_budget_hook(self.budget)
        self.tell(
            "on_iteration_start",
            IterationStartEvent(
                iteration=number, state=state, trainset_loader=ensure_loader(list(trainset))
            ),
        )

    def end_iteration(self, state: GEPAState, accepted: bool) -> None:
        """An iteration ends."""
        self.tell(
            "on_iteration_end",
            IterationEndEvent(
                iteration=self.iteration, state=state, proposal_accepted=bool(accepted)
            ),
        )

    def judged(self, proposal: CandidateProposal, accepted: bool, index: int, why: str) -> None:
        """A child was accepted, as the candidate of that index, or not; ``why`` says why not."""
        proposal = without_lost(proposal)
        parents = proposal.parent_program_ids
        before, after = (
            float(sum(scores or ()))
            for scores in (proposal.subsample_scores_before, proposal.subsample_scores_after)
        )
        if proposal.tag == "merge":
            merged = MergeAcceptedEvent(
                iteration=self.iteration, new_candidate_idx=index, parent_ids=parents
            )
            refused = MergeRejectedEvent(iteration=self.iteration, parent_ids=parents, reason=why)
            if not accepted:
                self.tell("on_merge_rejected", refused)
                return
            self.tell("on_merge_accepted", merged)
        if accepted:
            self.tell(
                "on_candidate_accepted",
                CandidateAcceptedEvent(
                    iteration=self.iteration,
                    new_candidate_idx=index,
                    new_score=after,
                    parent_ids=parents,
                ),
            )
        else:
            self.tell(
                "on_candidate_rejected",
                CandidateRejectedEvent(
                    iteration=self.iteration, old_score=before, new_score=after, reason=why
                ),
            )

    def merging(self, parents: Sequence[int], child: Mapping[str, str]) -> None:
        """A merge of two candidates is tried."""
        self.tell(
            "on_merge_attempted",
            MergeAttemptedEvent(
                iteration=self.iteration, parent_ids=parents, merged_candidate=dict(child)
            ),
        )

    def front(self, before: GEPAState, after: GEPAState) -> None:
        """The front has changed: a candidate was added to the state."""
        old, new = (
            set().union(*state.get_pareto_front_mapping().values()) for state in (before, after)
        )
        self.tell(
            "on_pareto_front_updated",
            ParetoFrontUpdatedEvent(
                iteration=self.iteration,
                new_front=sorted(new),
                displaced_candidates=sorted(old - new),
            ),
        )

    def validated(
        self,
        index: int,
        candidate: Mapping[str, str],
        scores: Mapping[str, float],
        *,
        is_best: bool,
        parents: Sequence[int] = (),
    ) -> None:
        """A candidate was scored on the validation examples."""
        self.tell(
            "on_valset_evaluated",
            ValsetEvaluatedEvent(
                iteration=self.iteration,
                candidate_idx=index,
                candidate=dict(candidate),
                scores_by_val_id=dict(scores),
                average_score=sum(scores.values()) / max(1, len(scores)),
                num_examples_evaluated=len(scores),
                total_valset_size=len(scores),
                parent_ids=parents,
                is_best_program=is_best,
                outputs_by_val_id=None,
            ),
        )

    def budget(self, used: int, more: int) -> None:
        """Rollouts were run: so many in all, and so many of them just now."""
        left = None if self.max_calls is None else max(0, self.max_calls - used)
        self.tell(
            "on_budget_updated",
            BudgetUpdatedEvent(
                iteration=self.iteration,
                metric_calls_used=used,
                metric_calls_delta=more,
                metric_calls_remaining=left,
            ),
        )

    def saved(self, folder: str) -> None:
        """A checkpoint was written to the run folder."""
        self.tell("on_state_saved", StateSavedEvent(iteration=self.iteration, run_dir=folder))

    def failed(self, error: Exception) -> None:
        """An error ends the run."""
        self.tell(
            "on_error",
            ErrorEvent(iteration=self.iteration, exception=error, will_continue=False),
        )

    def tell(self, method: str, event: Any) -> None:
        """Call a method of the callbacks that have it, in the main process."""
        if self.callbacks and distributed.is_main():
            notify_callbacks(self.callbacks, method, event)

    def tell_all(self, told: Sequence[Told]) -> None:
        """Tell what was held back, as of the iteration under way."""
        for method, event in told:
            self.tell(method, {**event, "iteration": self.iteration})

    @property
    def for_gepa(self) -> list[Any] | None:
        """What gepa's own parts are to call: the callbacks, with our numbers of iterations."""
        return [_Renumbering(self)] if self.callbacks else None

    def _who_stops(self, state: GEPAState) -> str | None:
        return next((_name_of(stop) for stop in self.stoppers if stop(state)), None)


def selected(index: int, candidate: Mapping[str, str], state: GEPAState) -> Told:
    """A parent was drawn."""
    score = state.program_full_scores_val_set[index]
    return (
        "on_candidate_selected",
        CandidateSelectedEvent(
            iteration=0, candidate_idx=index, candidate=dict(candidate), score=score
        ),
    )


def reflecting(
    index: int,
    parent: Mapping[str, str],
    names: Sequence[str],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Told]:
    """A proposer is asked for new texts, from these records."""
    dataset = {name: [dict(record) for record in rows] for name, rows in records.items()}
    built = ReflectiveDatasetBuiltEvent(
        iteration=0, candidate_idx=index, components=list(names), dataset=dataset
    )
    begun = ProposalStartEvent(
        iteration=0,
        parent_candidate=dict(parent),
        components=list(names),
        reflective_dataset=dataset,
    )
    return [("on_reflective_dataset_built", built), ("on_proposal_start", begun)]


def proposed(texts: Mapping[str, str]) -> Told:
    """New texts were proposed."""
    event = ProposalEndEvent(
        iteration=0, new_instructions=dict(texts), prompts={}, raw_lm_outputs={}
    )
    return ("on_proposal_end", event)


class _Renumbering:
    """A callback with every method, which passes events on as of the run's iteration."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def __getattr__(self, method: str) -> Callable[[Mapping[str, Any]], None]:
        if not method.startswith("on_"):
            raise AttributeError(method)
        return lambda event: self._events.tell_all([(method, event)])


def _name_of(stop: Any) -> str:
    return getattr(stop, "__qualname__", type(stop).__name__)
