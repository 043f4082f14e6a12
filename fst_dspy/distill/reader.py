"""The student's calls, rendered again as the teacher's program would have put them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from fst_dspy.errors import TrainingError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.rollouts.rendering import OTHER_PROMPTS, Renderer, Renderers
from fst_dspy.slow.advantage import row_of
from fst_dspy.slow.taught_trainer import Reading, Readings
from fst_dspy.types import Call, Candidate, Rollout, Untaught


class ContextReader:
    """Renders the calls of rollouts again, as a program with other texts would have made them.

    Args:
        program: The program that the rollouts ran.
        context: The other texts.
        lm: The local model; it is not called.
    """

    def __init__(self, program: dspy.Module, context: Candidate, lm: LocalLM) -> None:
        self.context_length = lm.policy.context_length
        self._own = Renderers(program, lm)
        self._renderer = Renderer(program, context, lm)

    def read(self, rollouts: Sequence[Rollout], candidates: Mapping[str, Candidate]) -> Readings:
        """One reading for each call of the rollouts, failed ones included.

        Left out are empty completions, calls whose own prompt cannot be made again
        (``Renderer.sources``), and those that do not fit into the context window with the longer
        prompt.

        Args:
            rollouts: Of the program.
            candidates: Those that they ran under, by id.

        Raises:
            TrainingError: None is left.
        """
        own, made = self._own.of(candidates), []
        for rollout in rollouts:
            sources = own[rollout.candidate_id].sources(rollout)
            answered = [call for call in rollout.calls if call.completion_ids_T]
            made += [self._reading(call, sources.get(id(call))) for call in answered]
        readings = Readings.of(made)
        if not readings.found:
            raise TrainingError(self._why_none(readings.untaught))
        return readings

    def _reading(self, call: Call, inputs: dict[str, Any] | None) -> Reading | Untaught:
        if inputs is None:
            return "prompt"
        ids = self._renderer.prompt_ids(call.predictor, inputs)
        return "prompt" if ids is None else Reading.under(ids, row_of(call), self.context_length)

    def _why_none(self, untaught: Mapping[Untaught, int]) -> str:
        why = f"its prompts and answers are too long for {self.context_length} tokens"
        if untaught.get("prompt", 0) > untaught.get("long", 0):
            why = OTHER_PROMPTS
        elif not untaught:
            why = "its answers are empty"
        return f"none of the student's calls could be read under the teacher's context: {why}"
