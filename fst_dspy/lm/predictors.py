"""Which of a program's predictors call the local model."""

from __future__ import annotations

from typing import Any

import dspy

from fst_dspy.errors import ProgramError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.student.candidate import bind, predictor_names
from fst_dspy.types import Candidate


def trained_predictors(program: dspy.Module, lm: LocalLM) -> list[str]:
    """Names of the predictors that call the trained policy."""
    own = {name: predictor.lm for name, predictor in program.named_predictors()}
    return [
        name
        for name in predictor_names(program)
        if own[name] is None or shares_policy(own[name], lm.policy)
    ]


def shares_policy(lm: Any, policy: Any) -> bool:
    """Whether a language model is a local one over this policy."""
    return isinstance(lm, LocalLM) and lm.policy is policy


def find_local_lm(program: dspy.Module) -> LocalLM:
    """The one ``LocalLM`` that the program's predictors call.

    Raises:
        ProgramError: There is none, or predictors call local models of several policies.
    """
    used = [
        predictor.lm if predictor.lm is not None else dspy.settings.lm
        for _, predictor in program.named_predictors()
    ]
    local = [lm for lm in used if isinstance(lm, LocalLM)]
    if not local:
        named = sorted({str(getattr(lm, "model", lm)) for lm in used if lm is not None})
        found = f"only {', '.join(named)}, which cannot be trained here" if named else "none"
        raise ProgramError(
            f"the program needs a local model to train, found {found}; set one with "
            'dspy.configure(lm=fst_dspy.LocalLM("embedded")) or program.set_lm(...)'
        )
    if any(lm.policy is not local[0].policy for lm in local):
        raise ProgramError(
            "the program's predictors call several local models; FST trains one: give them the "
            "same LocalLM"
        )
    assert trained_predictors(program, local[0])
    return local[0]


def bound_to(student: dspy.Module, candidate: Candidate, lm: LocalLM) -> dspy.Module:
    """A compiled copy of a program: a candidate's texts in it, its trained predictors on ``lm``."""
    compiled = bind(student, candidate)
    names = trained_predictors(student, lm)
    for name, predictor in compiled.named_predictors():
        if name in names:
            predictor.lm = lm
    compiled._compiled = True
    return compiled
