"""How a compiled program goes on being DSPy's: marks on it that its language models look at.

A compiled program's predictors have the trained LM as their own, so that it needs no settings to
run. Two things of DSPy's would be lost by that. A program may choose another LM for some of its
calls, ``with dspy.context(lm=...)`` in its ``forward``, which an own LM of the predictor would
override; and predictors that it makes as it runs have no LM of their own, and would ask the one in
the settings, which names other weights. So the program notes the settings' LM as it is entered,
predictors that had no LM of their own are marked to follow a change of it, and modules are marked
with the LM that they were compiled for. ``LocalLM`` reads the marks. Copies keep them.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dspy

from fst_dspy.lm.local_lm import (
    COMPILED_ADAPTER,
    COMPILED_LM,
    ENTERED_WITH,
    FOLLOWS,
    LocalLM,
    check_adapter,
)
from fst_dspy.student.modules import every_module


def mark_compiled(
    program: dspy.Module,
    lm: LocalLM,
    following: Iterable[dspy.Predict] = (),
    adapter: Mapping[str, Any] | None = None,
) -> None:
    """Mark a program whose predictors have been given their language models.

    Args:
        program: It.
        lm: The LM that it was compiled for.
        following: The predictors that had no LM of their own before.
        adapter: The identity of the adapter that it was compiled under, if known.
    """
    for module in every_module(program):
        if not isinstance(module, dspy.Predict):
            setattr(module, COMPILED_LM, lm)
    for predictor in following:
        setattr(predictor, FOLLOWS, predictor.lm)
    if adapter is not None:
        setattr(program, COMPILED_ADAPTER, adapter)
    if not isinstance(program, dspy.Predict):
        for name in ("forward", "aforward"):
            own = vars(program).get(name)
            if own is not None or hasattr(type(program), name):
                vars(program)[name] = Entry(
                    program, name, own.own if isinstance(own, Entry) else own
                )


def follows(predictor: dspy.Predict) -> bool:
    """Whether a predictor has no LM of its own, or one that follows the settings' LM."""
    return predictor.lm is None or vars(predictor).get(FOLLOWS) is predictor.lm


class Entry:
    """A compiled program's ``forward``, which notes the settings' LM and runs the program's.

    It also says where the settings' adapter is another than that of the compile.

    As an attribute of the program, whose class stays the student's.

    Args:
        program: It.
        name: ``"forward"`` or ``"aforward"``.
        own: What the program had as this attribute; ``None`` where it had the class's.
    """

    def __init__(
        self, program: dspy.Module | None, name: str, own: Callable[..., Any] | None = None
    ) -> None:
        self.program, self.name, self.own = program, name, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # DSPy copies attribute by attribute where a program cannot be copied whole; then it does
        # not know itself, but DSPy says which module is running.
        program = self.program if self.program is not None else dspy.settings.caller_modules[-1]
        check_adapter(program, vars(program)[COMPILED_LM].policy)
        run = self.own or types.MethodType(getattr(type(program), self.name), program)
        if inspect.iscoroutinefunction(run):
            return self._awaited(run, *args, **kwargs)
        with dspy.context(**{ENTERED_WITH: (dspy.settings.lm,)}):
            return run(*args, **kwargs)

    async def _awaited(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        with dspy.context(**{ENTERED_WITH: (dspy.settings.lm,)}):
            return await run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        return Entry(memo.get(id(self.program)), self.name, copy.deepcopy(self.own, memo))
