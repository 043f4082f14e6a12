"""The student's calls, rendered again as the teacher's program would have put them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dspy

from fst_dspy.errors import TrainingError
from fst_dspy.lm.engine import AsyncLocalEngine, LocalEngine
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.requests import prompt_ids
from fst_dspy.model.policy import Policy
from fst_dspy.student.adapter import strict_adapter
from fst_dspy.student.candidate import bind
from fst_dspy.student.modules import every_predictor
from fst_dspy.types import Call, Candidate, Rollout, TrainingRow

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
        self._engine = _PromptEngine(lm.policy)
        self._lm = lm.copy(
            engine=self._engine,
            async_engine=AsyncLocalEngine(self._engine),
            cache=False,
            num_retries=0,
        )
        self._adapter = strict_adapter(dspy.settings.adapter)
        self._predictors = every_predictor(bind(program, context))

    def read(self, rollouts: Sequence[Rollout]) -> list[Reading]:
        """One reading for each call of the rollouts, failed ones included.

        Left out are empty completions, calls that cannot be told apart from others of their
        predictor, and those that do not fit into the context window with the longer prompt.

        Raises:
            TrainingError: None is left.
        """
        readings = []
        for rollout in rollouts:
            for call, inputs in _calls_with_inputs(rollout):
                ids = self.prompt_ids(call.predictor, inputs)
                length = len(ids or ()) + len(call.completion_ids_T)
                if ids is None or not call.completion_ids_T or length > self.context_length:
                    logger.debug("a call of %s is left out", call.predictor)
                    continue
                own = (
                    call.completion_ids_T,
                    call.logprobs_T,
                    0.0,
                    call.temperature,
                    call.grammar,
                )
                rows = (TrainingRow(prompt, *own) for prompt in (call.prompt_ids_T, ids))
                readings.append(Reading(*rows))
        if not readings:
            raise TrainingError(
                "none of the student's calls could be read under the teacher's context; its "
                f"prompts and answers may be too long for {self.context_length} tokens"
            )
        return readings

    def prompt_ids(self, predictor: str, inputs: dict[str, Any]) -> tuple[int, ...] | None:
        """The prompt of one predictor's call under the context; ``None`` if it cannot be made."""
        self._engine.ids = None
        module = self._predictors.get(predictor)
        if module is None:  # made as the program ran: there is no other text of it
            return None
        # The engine stops the call once it has seen the prompt.
        with (
            dspy.context(adapter=self._adapter, callbacks=[], trace=None, disable_history=True),
            suppress(Exception),
        ):
            module(lm=self._lm, **inputs)
        return self._engine.ids


class _PromptEngine(LocalEngine):
    """An engine that keeps the prompt of a call and answers nothing."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.ids: tuple[int, ...] | None = None

    def complete(self, request: Any) -> Any:
        self.ids = prompt_ids(self.policy, request)
        raise _PromptSeen


class _PromptSeen(Exception):
    pass


def _calls_with_inputs(rollout: Rollout) -> Iterator[tuple[Call, dict[str, Any]]]:
    """The calls of a rollout with their predictor's inputs, predictor by predictor.

    A predictor's calls and traces are matched in order; where an adapter calls several times, or
    calls overtake each other, they do not match and are left out.
    """
    for name in dict.fromkeys(call.predictor for call in rollout.calls):
        calls = [call for call in rollout.calls if call.predictor == name]
        traces = [trace for trace in rollout.traces if trace.predictor == name]
        if len(calls) == len(traces):
            for call, trace in zip(calls, traces, strict=True):
                if call.text == trace.text:
                    yield call, dict(trace.inputs)
