"""Calls of rollouts rendered again: under other texts, or with a note behind the instructions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import dspy

from fst_dspy.lm.engine import AsyncLocalEngine, LocalEngine
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.requests import prompt_ids
from fst_dspy.model.policy import Policy
from fst_dspy.student.adapter import strict_adapter
from fst_dspy.student.candidate import bind
from fst_dspy.student.modules import every_predictor
from fst_dspy.types import Call, Candidate, Rollout

NOT_MADE_AGAIN = (
    "%s says nothing of %d of %d answers: their prompts cannot be made again from the predictor's "
    "texts and inputs, as the program itself gives these calls a signature, demos, an adapter or "
    "options of the chat template"
)
"""A warning: for what the prompts were needed, how many answers they were, and of how many."""


class Renderer:
    """Renders the calls of a program's predictors under the texts of a candidate.

    Args:
        program: The program.
        context: The texts; ``None`` leaves it its own.
        lm: The local model; it is not called.
    """

    def __init__(self, program: dspy.Module, context: Candidate | None, lm: LocalLM) -> None:
        self._engine = _PromptEngine(lm.policy)
        self._lm = lm.copy(
            engine=self._engine,
            async_engine=AsyncLocalEngine(self._engine),
            cache=False,
            num_retries=0,
        )
        self._adapter = strict_adapter(dspy.settings.adapter)
        bound = program if context is None else bind(program, context)
        self._predictors = every_predictor(bound)

    def makes_again(self, call: Call, inputs: dict[str, Any]) -> bool:
        """Whether a call that ran under these texts has the prompt that is rendered for it.

        Another one than it ran under would have its answer judged in the light of what it was
        never told.
        """
        return self.prompt_ids(call.predictor, inputs) == call.prompt_ids_T

    def prompt_ids(
        self, predictor: str, inputs: dict[str, Any], note: str = ""
    ) -> tuple[int, ...] | None:
        """The prompt of one predictor's call; ``None`` if it cannot be made.

        Args:
            predictor: Its name.
            inputs: Its inputs.
            note: What stands behind its instructions, in a paragraph of its own.
        """
        self._engine.ids = None
        module = self._predictors.get(predictor)
        if module is None:  # made as the program ran: there is no other text of it
            return None
        if note:
            texts = f"{module.signature.instructions}\n\n{note}"
            module = copy.copy(module)
            module.signature = module.signature.with_instructions(texts)
        # The engine stops the call once it has seen the prompt.
        with (
            dspy.context(adapter=self._adapter, callbacks=[], trace=None, disable_history=True),
            suppress(Exception),
        ):
            module(lm=self._lm, **inputs)
        return self._engine.ids


def calls_with_inputs(rollout: Rollout) -> Iterator[tuple[Call, dict[str, Any]]]:
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
