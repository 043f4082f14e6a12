"""Text feedback into the weights: the policy that has read it teaches the one that has not.

After SDPO (arXiv 2601.20802; TRL's ``trl.experimental.sdpo`` in its mode ``full_logits``). A call
of a rollout that was not perfect is rendered again with the metric's feedback behind the
instructions, or with the group's best answer where there is no feedback. Weights that follow the
live ones (``teacher_update_rate``) say how probable each token of the vocabulary is at each place
of the call's own answer, and the live weights are moved towards that under the prompt as it was
(``fst_dspy.slow.taught_trainer``). No rollout is needed for it, and groups of equal rewards have a
gradient: so weights learn what they would never come upon by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import dspy

from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.rollouts.rendering import Renderer, Renderers
from fst_dspy.slow.advantage import gives_row, without_lost
from fst_dspy.slow.taught_trainer import Reading, Readings
from fst_dspy.types import Call, Candidate, Group, Rollout, TrainingRow, Untaught

FEEDBACK = "Feedback on an answer to this very input: {}"
ANSWER = "A good answer to this very input:\n{}"


class SelfTeacher:
    """Renders the calls of imperfect rollouts again, with what is known of them in the prompt.

    Args:
        program: The program that the rollouts ran.
        lm: The local model; it is not called.
        perfect_score: Rollouts of this reward, or more, have nothing to be taught.
    """

    def __init__(self, program: dspy.Module, lm: LocalLM, perfect_score: float) -> None:
        self._context_length, self._perfect = lm.policy.context_length, perfect_score
        self._renderers = Renderers(program, lm)

    def read(
        self,
        groups_P: Sequence[Group],
        rows: Sequence[TrainingRow],
        candidates: Mapping[str, Candidate],
    ) -> Readings:
        """A reading for each call of which something is to be said, and for the others why not.

        Args:
            groups_P: The groups, sampled from the weights as they are.
            rows: The rows of their calls, in order (``slow.advantage.group_rows``).
            candidates: The candidates of their rollouts, by id.
        """
        renderers = self._renderers.of(candidates)
        prompts = (
            prompt
            for group in map(without_lost, groups_P)
            for rollout in group.rollouts_G
            for prompt in self._prompts(group, rollout, renderers[rollout.candidate_id])
        )
        made: list[Reading | Untaught] = [
            prompt if isinstance(prompt, str) else Reading.under(prompt, row, self._context_length)
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return Readings.of(made)

    def _prompts(
        self, group: Group, rollout: Rollout, renderer: Renderer
    ) -> Iterator[tuple[int, ...] | Untaught]:
        """Each call's prompt as the teacher reads it, or why it has nothing to say."""
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
                ids = renderer.prompt_ids(call.predictor, sources[id(call)], note)
                yield "unshown" if ids is None or ids == call.prompt_ids_T else ids


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
