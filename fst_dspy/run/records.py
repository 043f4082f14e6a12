"""JSON of what a run records: cycles, rollouts, the pool."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from fst_dspy.student.candidate import canonical_json, plain_field
from fst_dspy.types import (
    Call,
    CycleRecord,
    Failure,
    Grammar,
    PredictorTrace,
    Rollout,
    RolloutCounts,
    Turn,
    TurnCounts,
)

CALL_REMOVED = ("allowed_logprob",)
"""Fields of calls that earlier versions had."""


def cycle_record(row: Mapping[str, Any]) -> CycleRecord:
    """A cycle record from a line of ``cycles.jsonl``."""
    counts = {name: RolloutCounts(**row[name]) for name in ("rollouts", "total_rollouts")}
    lists = {name: tuple(row[name]) for name in ("candidate_ids", "val_scores")}
    lists["cold_start"] = tuple(row.get("cold_start", ()))
    lists["early_scores"] = tuple(map(tuple, row.get("early_scores", ())))
    if row.get("reward_range") is not None:
        lists["reward_range"] = tuple(row["reward_range"])
    turns = TurnCounts(**row.get("turns", {}))
    kl = read_number(row["kl_to_base"])
    return CycleRecord(**{**row, **counts, **lists, "turns": turns, "kl_to_base": kl})


def read_number(value: Any) -> Any:
    """A number as it is read from a log, where those that are not finite are written as null."""
    return math.nan if value is None else value


def rollout_from_json(row: Mapping[str, Any]) -> Rollout:
    """A rollout from a JSON object with the fields of the dataclass."""
    return Rollout(
        **{
            **row,
            "calls": tuple(map(_call, row["calls"])),
            "traces": tuple(PredictorTrace(**trace) for trace in row["traces"]),
            "failure": Failure(**row["failure"]) if row["failure"] else None,
            "turns": tuple(Turn(**turn) for turn in row.get("turns", ())),
        }
    )


def _call(row: Mapping[str, Any]) -> Call:
    sequences = ("prompt_ids_T", "completion_ids_T", "logprobs_T")
    own: dict[str, Any] = {name: tuple(row[name]) for name in sequences}
    if row.get("grammar") is not None:
        own["grammar"] = _grammar(**row["grammar"])
    now = {name: value for name, value in row.items() if name not in CALL_REMOVED}
    return Call(**{**now, **own})


def _grammar(
    text: str, takes_runs: bool, thought: Any = None, opened: bool = False, **_: Any
) -> Grammar:
    # Earlier versions had token ids for the end of a thought, from which its marks are not to be
    # had.
    return Grammar(text, takes_runs, None if thought is None else (thought[0], thought[1]), opened)


def with_plain_traces(rollout: Rollout) -> Rollout:
    """The rollout, with JSON's kinds of values for the objects that its program was given."""
    if all(map(_is_text, rollout.traces)):  # as most are
        return rollout
    traces = tuple(with_fields(trace, _plain) for trace in rollout.traces)
    return dataclasses.replace(rollout, traces=traces)


def _is_text(trace: PredictorTrace) -> bool:
    values = (*trace.inputs.values(), *(trace.outputs or {}).values())
    return all(type(value) is str for value in values)


def as_read_back(rollout: Rollout) -> Rollout:
    """The rollout as a resumed run would read it from a checkpoint."""
    traces = tuple(with_fields(trace, _plain) for trace in rollout.traces)
    feedback, objectives = dict(rollout.feedback_by_predictor), dict(rollout.objective_scores)
    return dataclasses.replace(
        rollout, traces=traces, feedback_by_predictor=feedback, objective_scores=objectives
    )


def with_fields(
    trace: PredictorTrace, change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> PredictorTrace:
    """The trace with its inputs, and its outputs if there are any, changed."""
    outputs = None if trace.outputs is None else change(trace.outputs)
    return dataclasses.replace(trace, inputs=change(trace.inputs), outputs=outputs)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(sorted(fields.items()))
    if all(type(value) is str for value in fields.values()):  # as most are
        return fields
    try:
        return {name: plain_field(value) for name, value in fields.items()}
    except (TypeError, ValueError, RecursionError):  # of what has no such form, its ``repr``
        return json.loads(canonical_json(fields))
