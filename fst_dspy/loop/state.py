"""The state of the joint loop between two of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fst_dspy.loop.problems import ProblemStream
from fst_dspy.loop.share import Evidence, Share
from fst_dspy.results.result import Best
from fst_dspy.rollouts.health import Tally
from fst_dspy.run.records import cycle_record
from fst_dspy.run.rollout_log import pack
from fst_dspy.student.candidate import (
    candidate_from_json,
    candidate_to_json,
    population_from_json,
    population_to_json,
)
from fst_dspy.types import (
    Candidate,
    CycleRecord,
    Population,
    Rollout,
    RolloutCounts,
    StepRecord,
    StepStats,
    TurnCounts,
)

TALLY_REMOVED = ("held_calls", "held_logprob")
"""Fields of a tally that earlier versions had."""


@dataclass(frozen=True)
class Start:
    """What a run begins with; the weights are those that the student's LM names.

    Attributes:
        candidates: The first population; the student's own texts where there are none.
        counts, tokens, seconds, turns: What finding them has cost, as in ``CycleRecord``; the run
            counts on from there, also towards its budget.
    """

    candidates: tuple[Candidate, ...] = ()
    counts: RolloutCounts = field(default_factory=RolloutCounts)
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    turns: TurnCounts = field(default_factory=TurnCounts)


@dataclass(frozen=True)
class LoopState:
    """Everything the joint loop carries from one part to the next, but for the trainer's tensors.

    Attributes:
        population: The fast weights.
        cycle: Cycles completed.
        step: Optimizer steps taken.
        phase: What comes next in the cycle under way.
        records: One record a completed cycle, the student's own first.
        steps: Records of the optimizer steps of the cycle under way.
        best: The best pair so far; ``None`` before the first validation.
        peak_V: Scores of the highest mean so far, on the V validation examples.
        counts: Rollouts so far.
        tally: What became of those of the cycle under way.
        tokens: Prompt and completion tokens so far.
        lowest_score: The least that the metric has given; ``None`` before there is any.
        early_batches: As ``CycleRecord.early_batches``.
        turns: What agents did so far.
        seconds: Wall time so far, by channel.
        fast_state: What the fast phase remembers: plain values, and rollouts.
        stream: The problems that come next.
        share: Who has the rollouts of the cycle under way; ``None`` before that is known.
        evidence: What the student and the latest cycles have shown, in order.
        cold_start: As ``CycleRecord.cold_start``.
        early_scores: As ``CycleRecord.early_scores``, of the cycle under way.
        structured, explains_format: As the runner's, since then.
        by_text: Whether the metric's text teaches the weights.
    """

    population: Population
    cycle: int = 0
    step: int = 0
    phase: Literal["fast", "slow", "validate"] = "fast"
    records: tuple[CycleRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    best: Best | None = None
    peak_V: tuple[float, ...] = ()
    counts: RolloutCounts = field(default_factory=RolloutCounts)
    tally: Tally = field(default_factory=Tally)
    lowest_score: float | None = None
    early_batches: int = 0
    turns: TurnCounts = field(default_factory=TurnCounts)
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    fast_state: Mapping[str, Any] = field(default_factory=dict)
    stream: ProblemStream = field(default_factory=ProblemStream)
    share: Share | None = None
    evidence: tuple[Evidence, ...] = ()
    cold_start: tuple[str, ...] = ()
    early_scores: tuple[tuple[int, float], ...] = ()
    structured: bool = False
    explains_format: bool = False
    by_text: bool = False


def state_to_json(state: LoopState) -> dict[str, Any]:
    """The state for ``RunStore.checkpoint``: plain values, and dataclasses of such."""
    best = state.best
    return {
        **vars(state),
        "fast_state": {
            name: pack(value) if _are_rollouts(value) else value
            for name, value in state.fast_state.items()
        },
        "population": population_to_json(state.population),
        "best": None
        if best is None
        else {**asdict(best), "candidate": candidate_to_json(best.candidate)},
    }


def _are_rollouts(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Rollout)


def state_from_json(plain: Mapping[str, Any]) -> LoopState:
    """The inverse of ``state_to_json``."""
    best = plain["best"]
    return LoopState(
        population=population_from_json(plain["population"]),
        cycle=plain["cycle"],
        step=plain["step"],
        phase=plain["phase"],
        records=tuple(cycle_record(row) for row in plain["records"]),
        steps=tuple(
            StepRecord(**{**row, "stats": StepStats(**row["stats"])}) for row in plain["steps"]
        ),
        best=None
        if best is None
        else Best(**{**best, "candidate": candidate_from_json(best["candidate"])}),
        peak_V=tuple(plain["peak_V"]),
        counts=RolloutCounts(**plain["counts"]),
        tally=Tally(**{k: v for k, v in plain.get("tally", {}).items() if k not in TALLY_REMOVED}),
        lowest_score=plain.get("lowest_score"),
        early_batches=plain.get("early_batches", 0),
        turns=TurnCounts(**plain.get("turns", {})),
        tokens=plain["tokens"],
        seconds=plain["seconds"],
        fast_state=plain["fast_state"],
        stream=ProblemStream(**plain["stream"]),
        share=Share(**plain["share"]) if plain.get("share") else None,
        evidence=tuple(
            Evidence(**{**row, "score_V": tuple(row["score_V"])})
            for row in plain.get("evidence", ())
        ),
        cold_start=tuple(plain.get("cold_start", ())),
        early_scores=tuple(map(tuple, plain.get("early_scores", ()))),
        structured=plain.get("structured", False),
        explains_format=plain.get("explains_format", False),
        by_text=plain.get("by_text", False),
    )
