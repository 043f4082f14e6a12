"""The student's calls, rendered again as the teacher's program would have put them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import dspy

from fst_dspy import distributed
from fst_dspy.errors import TrainingError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.rollouts.rendering import NOT_MADE_AGAIN, Renderer, calls_with_inputs
from fst_dspy.slow.advantage import row_of
from fst_dspy.types import Candidate, Rollout, TrainingRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """One completion of the student's, under its own prompt and under the teacher's.

    Attributes:
        student, teacher: Rows with the same completion; the advantages are not used, and the
            temperature of a greedy one is 0.
    """

    student: TrainingRow
    teacher: TrainingRow


class ContextReader:
    """Renders the calls of rollouts again, as a program with other texts would have made them.

    Args:
        program: The program that the rollouts ran.
        context: The other texts.
        lm: The local model; it is not called.
    """

    def __init__(self, program: dspy.Module, context: Candidate, lm: LocalLM) -> None:
        self.context_length = lm.policy.context_length
        self._renderer = Renderer(program, context, lm)
        self._own = Renderer(program, None, lm)
        self._told = False

    def read(self, rollouts: Sequence[Rollout]) -> list[Reading]:
        """One reading for each call of the rollouts, failed ones included.

        Left out are empty completions, calls that cannot be told apart from others of their
        predictor, those that do not fit into the context window with the longer prompt, and those
        whose own prompt cannot be made again, which is told once.

        Raises:
            TrainingError: None is left.
        """
        readings, asked, strange = [], 0, 0
        for rollout in rollouts:
            for call, inputs in calls_with_inputs(rollout):
                asked += 1
                if not self._own.makes_again(call, inputs):
                    strange += 1
                    continue
                ids = self._renderer.prompt_ids(call.predictor, inputs)
                length = len(ids or ()) + len(call.completion_ids_T)
                if ids is None or not call.completion_ids_T or length > self.context_length:
                    logger.debug("a call of %s is left out", call.predictor)
                    continue
                student = row_of(call)
                readings.append(Reading(student, replace(student, prompt_ids_T=ids)))
        if strange and not self._told and distributed.is_main():
            self._told = True
            logger.warning(NOT_MADE_AGAIN, "the teacher", strange, asked)
        if not readings:
            raise TrainingError(
                "none of the student's calls could be read under the teacher's context; its "
                f"prompts and answers may be too long for {self.context_length} tokens"
            )
        return readings
