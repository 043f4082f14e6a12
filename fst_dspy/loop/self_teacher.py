"""Text feedback into the weights: the policy that has read it teaches the one that has not.

After SDPO (arXiv 2601.20802; TRL's ``trl.experimental.sdpo`` in its mode ``sampled_token``). A call
of a rollout that was not perfect is rendered again with the metric's feedback behind the
instructions, or with the group's best answer where there is no feedback. The same weights then, or
an average of what they have been (``teacher_update_rate``), say how probable each token of the
call's own answer is. What feedback makes less probable was wrong, what it makes more probable was
right, and the difference of the two log-probabilities is the token's advantage: its gradient is
that of the reverse KL to the teacher, estimated on the tokens sampled. No rollout is needed for it,
and groups of equal rewards have a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import dspy

from fst_dspy import distributed
from fst_dspy.config import SlowConfig
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.model.logprobs import sampled_logprobs
from fst_dspy.rollouts.rendering import Renderer, Renderers
from fst_dspy.slow.advantage import gives_row, row_of, without_lost
from fst_dspy.slow.averaged_weights import AveragedWeights
from fst_dspy.types import Call, Candidate, Group, Rollout, TrainingRow, Untaught

FEEDBACK = "Feedback on an answer to this very input: {}"
ANSWER = "A good answer to this very input:\n{}"
MOST_NATS = 5.0
"""Bound of a token's advantage by the teacher: a token that it all but rules out counts e^-5."""


Lesson = Sequence[float]
"""Of each token of a completion, the teacher's log-probability less the sampling one (nats)."""


@dataclass(frozen=True)
class Lessons:
    """What the teacher has said in a step.

    Attributes:
        of_rows: Of each call that gives a row (``group_rows``), in their order; ``None`` where it
            said nothing.
        untaught: How many these were, by reason.
    """

    of_rows: Sequence[Lesson | None]
    untaught: Mapping[Untaught, int]

    @property
    def taught(self) -> int:
        """How many calls had a lesson."""
        return sum(lesson is not None for lesson in self.of_rows)

    @property
    def mean(self) -> float:
        """Mean over all tokens that had one, nats; 0 where none had."""
        nats = [value for lesson in self.of_rows for value in lesson or ()]
        return sum(nats) / max(1, len(nats))


class SelfTeacher:
    """Reads the calls of imperfect rollouts again, with what is known of them in the prompt.

    Args:
        program: The program that the rollouts ran.
        lm: The local model, whose weights are both teacher and student.
        perfect_score: Rollouts of this reward, or more, have nothing to be taught.
        averaged: Teaches in place of the live weights.
    """

    def __init__(
        self,
        program: dspy.Module,
        lm: LocalLM,
        perfect_score: float,
        averaged: AveragedWeights | None = None,
    ) -> None:
        self._lm, self._perfect = lm, perfect_score
        self._averaged = averaged
        self._renderers = Renderers(program, lm)

    def lessons(self, groups_P: Sequence[Group], candidates: Mapping[str, Candidate]) -> Lessons:
        """What the teacher says of each call that gives a row, and where it says nothing, why.

        Args:
            groups_P: The groups, sampled from the weights as they are.
            candidates: The candidates of their rollouts, by id.
        """
        renderers = self._renderers.of(candidates)
        made = [
            row
            for group in map(without_lost, groups_P)
            for rollout in group.rollouts_G
            for row in self._rows(group, rollout, renderers[rollout.candidate_id])
        ]
        rows = {n: row for n, row in enumerate(made) if isinstance(row, TrainingRow)}
        order = sorted(rows, key=lambda n: _length(rows[n]))  # of like length together
        read = distributed.spread(self._read, [rows[n] for n in order])
        lessons: list[Lesson | None] = [None] * len(made)
        for n, logprobs_T in zip(order, read, strict=True):
            pairs = zip(logprobs_T, rows[n].logprobs_T, strict=True)
            lessons[n] = [teacher - own for teacher, own in pairs]
        return Lessons(lessons, Counter(row for row in made if not isinstance(row, TrainingRow)))

    def _read(self, rows: list[TrainingRow]) -> list[tuple[float, ...]]:
        policy, averaged = self._lm.policy, self._averaged
        with policy.lock, policy.holding(averaged.state()) if averaged else nullcontext():
            return sampled_logprobs(policy, rows)

    def _rows(
        self, group: Group, rollout: Rollout, renderer: Renderer
    ) -> Iterator[TrainingRow | Untaught]:
        """Each call as the teacher reads it, or why it has nothing to say."""
        perfect, calls = rollout.reward >= self._perfect, list(filter(gives_row, rollout.calls))
        notes = ["" if perfect else _note(group, rollout, call) for call in calls]
        sources = renderer.sources(rollout) if any(notes) else {}
        for call, note in zip(calls, notes, strict=True):
            if perfect:
                yield "perfect"
            elif not note:
                yield "silent"
            elif id(call) not in sources:
                yield "prompt"
            else:
                yield self._row(renderer, call, sources[id(call)], note)

    def _row(
        self, renderer: Renderer, call: Call, inputs: dict[str, Any], note: str
    ) -> TrainingRow | Untaught:
        ids = renderer.prompt_ids(call.predictor, inputs, note)
        if ids is None or ids == call.prompt_ids_T:
            return "unshown"
        row = replace(row_of(call), prompt_ids_T=ids)
        return row if _length(row) <= self._lm.policy.context_length else "long"


def taught_rows(
    rows: Sequence[TrainingRow], lessons: Sequence[Lesson | None], slow: SlowConfig
) -> list[TrainingRow]:
    """Rows whose tokens have the advantages that the feedback gives them, beside the reward's.

    Args:
        rows: As rewards have made them.
        lessons: What the teacher said of each; ``None`` where it said nothing.
        slow: ``slow_signal``, which is not ``"reward"``, and ``distillation_weight``.
    """
    weight = 1.0 if slow.slow_signal == "feedback" else slow.distillation_weight
    out = []
    for row, lesson in zip(rows, lessons, strict=True):
        own = (1 - weight) * row.advantage
        if lesson is None:
            out.append(replace(row, advantage=own))
            continue
        bounded_T = (max(-MOST_NATS, min(MOST_NATS, nats)) for nats in lesson)
        token_T = tuple(own + weight * nats for nats in bounded_T)
        out.append(replace(row, advantage=own, token_advantages_T=token_T))
    return out


def _length(row: TrainingRow) -> int:
    return len(row.prompt_ids_T) + len(row.completion_ids_T)


def _note(group: Group, rollout: Rollout, call: Call) -> str:
    """What is known of a rollout's call: the feedback, else a better answer of the group's."""
    feedback = rollout.feedback_by_predictor.get(call.predictor, rollout.feedback).strip()
    if feedback:
        return FEEDBACK.format(feedback)
    best = max(group.rollouts_G, key=lambda other: other.reward)
    answers = [other.text for other in best.calls if other.predictor == call.predictor]
    if best.reward <= rollout.reward or len(answers) != 1:
        return ""
    return ANSWER.format(answers[0].strip())
