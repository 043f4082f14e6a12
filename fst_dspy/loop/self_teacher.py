"""Text feedback into the weights: the policy that has read it teaches the one that has not.

After SDPO (arXiv 2601.20802; TRL's ``trl.experimental.sdpo`` in its mode ``sampled_token``). A call
of a rollout that was not perfect is rendered again with the metric's feedback behind the
instructions, or with the group's best answer where there is no feedback. The same weights then say
how probable each token of the call's own answer is. What feedback makes less probable was wrong,
what it makes more probable was right, and the difference of the two log-probabilities is the
token's advantage: its gradient is that of the reverse KL to the teacher, estimated on the tokens
sampled. No rollout is needed for it, and groups of equal rewards have a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import dspy
import torch

from fst_dspy import distributed
from fst_dspy.config import SlowConfig
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.model.divergence import FORWARD_ROWS
from fst_dspy.model.logprobs import sampled_logprobs
from fst_dspy.rollouts.rendering import Renderer, calls_with_inputs
from fst_dspy.slow.advantage import gives_row, without_lost
from fst_dspy.types import Call, Candidate, Group, Rollout, TrainingRow

FEEDBACK = "Feedback on an answer to this very input: {}"
ANSWER = "A good answer to this very input:\n{}"
MOST_NATS = 5.0
"""Bound of a token's advantage by the teacher: a token that it all but rules out counts e^-5."""


Lesson = Sequence[float]
"""Of each token of a completion, the teacher's log-probability less the sampling one (nats)."""


class SelfTeacher:
    """Reads the calls of imperfect rollouts again, with what is known of them in the prompt.

    Args:
        program: The program that the rollouts ran.
        lm: The local model, whose weights are both teacher and student.
        perfect_score: Rollouts of this reward, or more, have nothing to be taught.
    """

    def __init__(self, program: dspy.Module, lm: LocalLM, perfect_score: float) -> None:
        self._program, self._lm, self._perfect = program, lm, perfect_score
        self._renderers: dict[str, Renderer] = {}

    def lessons(
        self, groups_P: Sequence[Group], candidates: Mapping[str, Candidate]
    ) -> list[Lesson | None]:
        """What the teacher says of each call that gives a row (``group_rows``), in their order.

        Nothing is said of calls of perfect rollouts and of those of which nothing is known, of
        those that do not fit into the context window with the longer prompt, and of those that
        cannot be told apart from others of their predictor.

        Args:
            groups_P: The groups, sampled from the weights as they are.
            candidates: The candidates of their rollouts, by id.
        """
        self._renderers = {
            name: self._renderers.get(name) or Renderer(self._program, candidate, self._lm)
            for name, candidate in candidates.items()
        }
        calls = [
            (group, rollout, call)
            for group in map(without_lost, groups_P)
            for rollout in group.rollouts_G
            for call in rollout.calls
            if gives_row(call)
        ]
        rows = {n: row for n, of in enumerate(calls) if (row := self._row(*of)) is not None}
        order = sorted(rows, key=lambda n: _length(rows[n]))  # of like length together
        read = distributed.spread(self._read, [rows[n] for n in order])
        logprobs = dict(zip(order, read, strict=True))
        return [
            [teacher - own for teacher, own in zip(logprobs[n], call.logprobs_T, strict=True)]
            if n in logprobs
            else None
            for n, (_, _, call) in enumerate(calls)
        ]

    def _read(self, rows: list[TrainingRow]) -> list[list[float]]:
        policy = self._lm.policy
        found: list[list[float]] = []
        with policy.lock, torch.no_grad():
            for start in range(0, len(rows), FORWARD_ROWS):
                found += sampled_logprobs(policy, rows[start : start + FORWARD_ROWS])
        return found

    def _row(self, group: Group, rollout: Rollout, call: Call) -> TrainingRow | None:
        """A call as the teacher reads it; ``None`` where it has nothing to say."""
        renderer = self._renderers.get(rollout.candidate_id)
        if renderer is None or rollout.reward >= self._perfect:
            return None
        note = _note(group, rollout, call)
        inputs = next((given for own, given in calls_with_inputs(rollout) if own is call), None)
        if not note or inputs is None:
            return None
        ids = renderer.prompt_ids(call.predictor, inputs, note)
        if ids is None or ids == call.prompt_ids_T:
            return None
        if len(ids) + len(call.completion_ids_T) > self._lm.policy.context_length:
            return None
        return TrainingRow(
            ids, call.completion_ids_T, call.logprobs_T, 0.0, call.temperature, call.grammar
        )


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
