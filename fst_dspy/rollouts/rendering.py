"""Calls of rollouts rendered again: under other texts, or with a note behind the instructions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import dspy

from fst_dspy.lm.engine import AsyncLocalEngine, LocalEngine
from fst_dspy.lm.local_lm import COMPILED_ADAPTER, LocalLM
from fst_dspy.lm.predictors import resolved_lm, shares_policy
from fst_dspy.lm.requests import prompt_ids
from fst_dspy.model.policy import Policy
from fst_dspy.student.adapter import strict_adapter
from fst_dspy.student.candidate import bind
from fst_dspy.student.modules import every_predictor
from fst_dspy.types import Candidate, Rollout

OTHER_PROMPTS = (
    "their prompts could not be made again from their predictors' inputs, as the program gives a "
    "call an adapter, signature, demos or settings of its own as it runs (set them on the "
    "predictor, or with dspy.configure)"
)
"""Why calls have no ``Renderer.sources``, and what to do about it."""


class Renderer:
    """Renders the calls of a program's predictors under the texts of a candidate.

    Each with the settings of the language model that the predictor calls.

    Args:
        program: The program.
        context: The texts.
        lm: The local model; it is not called.
    """

    def __init__(self, program: dspy.Module, context: Candidate, lm: LocalLM) -> None:
        self._engine = _PromptEngine(lm.policy)
        self._adapter = strict_adapter(dspy.settings.adapter)
        self._predictors = every_predictor(bind(program, context))
        self._lms = {name: self._lm(p, lm) for name, p in self._predictors.items()}
        for predictor in self._predictors.values():
            # The program itself, where it is a predictor: what is rendered is no use of it.
            vars(predictor).pop(COMPILED_ADAPTER, None)

    def _lm(self, predictor: dspy.Predict, lm: LocalLM) -> LocalLM:
        own = resolved_lm(predictor)
        own = own if shares_policy(own, lm.policy) else lm
        return own.copy(
            engine=self._engine,
            async_engine=AsyncLocalEngine(self._engine),
            cache=False,
            num_retries=0,
        )

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
            module(lm=self._lms[predictor], **inputs)
        return self._engine.ids

    def sources(self, rollout: Rollout) -> dict[int, dict[str, Any]]:
        """The inputs from which the prompts of a rollout's calls can be made again.

        A call's inputs are those that give its very prompt under this candidate's texts, however
        many calls a run of the predictor has made, and in what order. A call has none where the
        program has chosen an adapter, a signature, demos or settings for it as it ran, or changed
        its predictor: under any other prompt its answer would say something else.

        Args:
            rollout: Run under this candidate.

        Returns:
            Inputs by ``id`` of the call.
        """
        made: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
        for trace in rollout.traces:
            ids = self.prompt_ids(trace.predictor, dict(trace.inputs))
            if ids is not None:
                made.setdefault((trace.predictor, ids), dict(trace.inputs))
        keys = {id(call): (call.predictor, call.prompt_ids_T) for call in rollout.calls}
        return {call: made[key] for call, key in keys.items() if key in made}


class Renderers:
    """A renderer for each of a program's candidates, kept from one step to the next.

    Args:
        program, lm: As for ``Renderer``.
    """

    def __init__(self, program: dspy.Module, lm: LocalLM) -> None:
        self._program, self._lm = program, lm
        self._by_id: dict[str, Renderer] = {}

    def of(self, candidates: Mapping[str, Candidate]) -> Mapping[str, Renderer]:
        """By the candidates' ids; those of others are let go."""
        self._by_id = {
            name: self._by_id.get(name) or Renderer(self._program, candidate, self._lm)
            for name, candidate in candidates.items()
        }
        return self._by_id


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
