"""From a candidate's rollouts to new texts: what is reflected on, and by whom."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import dspy

from fst_dspy import distributed
from fst_dspy.display import visible
from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.demos import DemoProposer
from fst_dspy.fast.proposers.protocol import (
    FEEDBACK,
    MAX_TEXT,
    TRAJECTORY,
    CountsFaults,
    LearnsFromRecords,
    ProposalError,
    Proposer,
    Record,
    clipped,
    well_formed,
)
from fst_dspy.student.candidate import (
    DEMOS,
    INSTRUCTIONS,
    make_candidate,
    plain_fields,
    split_component,
    value_text,
)
from fst_dspy.types import Candidate, PredictorTrace, Rollout

logger = logging.getLogger(__name__)


PROGRAMMING_ERRORS = (
    TypeError,
    AttributeError,
    NameError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    NotImplementedError,
)
"""What a proposer raises because it is wrong, not because there is no proposal to be had."""
STEP_TEXT = 1000
"""Characters of one field of a step in a trajectory."""
MAX_STEPS = 24
"""Steps of a trajectory that go into a record, half of them the first and half the last."""


@dataclass(frozen=True)
class Trajectory:
    """A rollout with the example it was run on."""

    example: dspy.Example
    rollout: Rollout


@dataclass
class Reflector:
    """Turns a candidate's rollouts into new texts, and counts what came of it.

    Attributes:
        proposer: Proposes instructions; what it raises is counted and gives no texts, but for
            ``PROGRAMMING_ERRORS``.
        demos: Proposes demos, or ``None``.
        context: ``FastConfig.reflection_context``.
        guard: Refuses copies of training examples, or ``None``.
        known_ids: Ids of candidates that were tried, so that none is proposed and paid for twice.
        errors: Failures by kind.
        outcomes: ``"empty"`` and ``"duplicate"`` proposals.
    """

    proposer: Proposer
    known_ids: set[str]
    demos: DemoProposer | None = None
    context: str = "step"
    guard: CopyGuard | None = None
    errors: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """The texts that change, or none: an empty dict makes gepa skip the iteration.

        Raises:
            PROGRAMMING_ERRORS: The proposer is at fault.
        """
        try:
            texts = self._texts(components, records, names)
            changed = {name: text for name, text in texts.items() if text != components[name]}
            if self.guard is not None:
                self.guard.check(changed, components)
        except PROGRAMMING_ERRORS as error:
            error.add_note(f"raised by the proposer {type(self.proposer).__name__}")
            raise
        except Exception as error:
            kind = error.kind if isinstance(error, ProposalError) else type(error).__name__
            self.errors[kind] += 1
            logger.warning("no proposal (%s): %s", kind, visible(str(error)))
            return {}
        finally:
            if isinstance(self.proposer, CountsFaults):
                self.errors.update(self.proposer.take_faults())
        if not changed:
            self.outcomes["empty"] += 1
            return {}
        if make_candidate({**components, **changed}).id in self.known_ids:
            self.outcomes["duplicate"] += 1
            return {}
        return changed

    def records(self, component: str, trajectories: Sequence[Trajectory]) -> list[Record]:
        """What a proposer is shown for a component: see :func:`make_records`."""
        return make_records(component, trajectories, self.context)

    def learn(self, components: Iterable[str], trajectories: Sequence[Trajectory]) -> None:
        """Let a proposer of instructions that can learn from these rollouts."""
        if isinstance(self.proposer, LearnsFromRecords):
            for name in components:
                if split_component(name)[1] != DEMOS:
                    self.proposer.observe(name, make_records(name, trajectories))

    def _texts(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        of_demos = [name for name in names if split_component(name)[1] == DEMOS]
        others = [name for name in names if name not in of_demos]
        texts: dict[str, str] = {}
        if of_demos and self.demos is not None:
            texts |= self.demos.propose(components, records, of_demos)
        if others:
            rows = {name: records[name] for name in others}
            # A language model would give each process another answer.
            ask = partial(self.proposer.propose, components, rows, others)
            texts |= checked_texts(distributed.from_main(ask), components, self.proposer)
        return texts


def checked_texts(
    said: Any, components: Mapping[str, str], proposer: Proposer
) -> Mapping[str, str]:
    """What a proposer returned, once it is known to be texts of components.

    Raises:
        TypeError: It is not.
    """
    who = type(proposer).__name__
    if not isinstance(said, Mapping):
        raise TypeError(f"{who} must return {{component: text}}, got {type(said).__name__}")
    for name, text in said.items():
        if name not in components:
            raise TypeError(f"{who} named {name!r}; the components are {sorted(components)}")
        if not isinstance(text, str):
            raise TypeError(f"{who} gave {name} a {type(text).__name__}, not a text")
    return said


def make_records(
    component: str, trajectories: Sequence[Trajectory], context: str = "step"
) -> list[Record]:
    """One record a rollout, from the traces of the component's predictor.

    Args:
        component: What is to be rewritten.
        trajectories: The rollouts.
        context: ``"trajectory"`` adds all steps of the program.
    """
    predictor, _ = split_component(component)
    fields = _output_fields(predictor, trajectories)
    records = [_record(predictor, fields, trajectory) for trajectory in trajectories]
    if context != "trajectory":
        return records
    return [
        {**record, TRAJECTORY: _steps(trajectory.rollout)}
        for record, trajectory in zip(records, trajectories, strict=True)
    ]


def _steps(rollout: Rollout) -> list[dict[str, Any]]:
    """All steps of a program, in order; of very many, those in the middle are left out."""
    steps = [
        {
            "Step": f"{number} of {len(rollout.traces)}: {trace.predictor}",
            "Inputs": {name: _clip(value, STEP_TEXT) for name, value in trace.inputs.items()},
            "Generated Outputs": _outputs(trace, STEP_TEXT),
        }
        for number, trace in enumerate(rollout.traces, 1)
    ]
    if len(steps) <= MAX_STEPS:
        return steps
    half = MAX_STEPS // 2
    return [*steps[:half], *steps[-half:]]


def _record(predictor: str, fields: Sequence[str], trajectory: Trajectory) -> Record:
    example, rollout = trajectory.example, trajectory.rollout
    traces = [trace for trace in rollout.traces if trace.predictor == predictor]
    # A program may call a predictor several times: the call that could not be read, if there is
    # one, says most about what went wrong; else the last one stands nearest to the answer.
    failed = [trace for trace in traces if trace.outputs is None]
    trace = failed[0] if failed else (traces[-1] if traces else None)
    inputs = trace.inputs if trace is not None else plain_fields(example.inputs())
    return {
        "Inputs": {name: _clip(value) for name, value in inputs.items()},
        "Generated Outputs": _outputs(trace),
        FEEDBACK: _feedback(predictor, rollout, trace, fields),
        "score": rollout.reward,
        "example_id": rollout.example_id,
        "labels": {name: _clip(value) for name, value in plain_fields(example.labels()).items()},
        "failure": rollout.failure.kind if rollout.failure is not None else None,
    }


def _outputs(trace: PredictorTrace | None, limit: int = MAX_TEXT) -> dict[str, str] | str:
    if trace is None:
        return "(this step was not reached)"
    if trace.outputs is None:
        return f"(could not be read) {_clip(trace.text, limit)}"
    return {name: _clip(value, limit) for name, value in trace.outputs.items()}


def _feedback(
    predictor: str, rollout: Rollout, trace: PredictorTrace | None, fields: Sequence[str]
) -> str:
    parts = [rollout.feedback_by_predictor.get(predictor, rollout.feedback).strip()]
    message = rollout.failure.message.strip() if rollout.failure is not None else ""
    if message and message not in parts[0]:
        parts.append(message)
    if trace is not None and trace.outputs is None and fields:
        parts.append(f"The answer must state the fields {', '.join(fields)} in the format asked.")
    return well_formed("\n".join(part for part in parts if part))


def _output_fields(predictor: str, trajectories: Sequence[Trajectory]) -> list[str]:
    # Rollouts that were read tell which fields the others should have stated.
    for trajectory in trajectories:
        for trace in trajectory.rollout.traces:
            if trace.predictor == predictor and trace.outputs is not None:
                return list(trace.outputs)
    return []


def _clip(value: Any, limit: int = MAX_TEXT) -> str:
    return clipped(well_formed(value_text(value)), limit)


def candidate_of(texts: Mapping[str, str], parent: Candidate, cycle: int) -> Candidate:
    """The candidate that a proposal makes of its parent."""
    changed = [name for name, text in texts.items() if text != parent.components[name]]
    kinds = {split_component(name)[1] for name in changed}
    source = DEMOS if kinds == {DEMOS} else INSTRUCTIONS
    return make_candidate(texts, [parent.id], cycle, source)
