"""How a compiled program goes on being DSPy's: marks on it that its language models look at.

A compiled program's predictors have the trained LM as their own, so that it needs no settings to
run. Two things of DSPy's would be lost by that. A program may choose another LM for some of its
calls, ``with dspy.context(lm=...)`` in its ``forward``, which an own LM of the predictor would
override; and predictors that it makes as it runs have no LM of their own, and would ask the one in
the settings, which names other weights. So the program notes the settings' LM as it is entered,
predictors that had no LM of their own are marked to follow a change of it, and modules are marked
with the LM that they were compiled for. ``LocalLM`` reads the marks. Copies keep them. To note how
it is entered, the program has a ``forward`` around its own, which its class has by a mixin.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import dspy

from fst_dspy.lm.local_lm import (
    COMPILED_ADAPTER,
    COMPILED_LM,
    ENTERED_WITH,
    FOLLOWS,
    LocalLM,
    check_adapter,
)
from fst_dspy.student.mixins import Mixin, mix_in
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
    mix_in(program, Kept if isinstance(program, dspy.Predict) else Entered)


def follows(predictor: dspy.Predict) -> bool:
    """Whether a predictor has no LM of its own, or one that follows the settings' LM."""
    return predictor.lm is None or vars(predictor).get(FOLLOWS) is predictor.lm


class _Entry:
    """``forward``, or ``aforward``, of a compiled program: it enters the program and runs its own.

    That is what the program has as this attribute, or else its class; and it looks like that.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, program: dspy.Module | None, kind: type) -> Any:
        of_class: Any = getattr(super(self.owner, kind), self.name, None)
        given = None if program is None else vars(program).get(self.name)
        if given is None and of_class is None:
            raise AttributeError(f"{kind.__name__!r} object has no attribute {self.name!r}")
        if program is None:
            return of_class
        if given is None:
            return types.MethodType(_entering(of_class, self._of_class), program)
        method = types.MethodType(_entering(given, lambda _: given), program)
        # What the program was given is no method, and must not look like one.
        return functools.wraps(given)(lambda *args, **kwargs: method(*args, **kwargs))

    def __set__(self, program: dspy.Module, value: Any) -> None:
        function = getattr(value, "__func__", None)
        if getattr(function, "__globals__", None) is globals() and value.__self__ is program:
            vars(program).pop(self.name, None)  # DSPy had put another in its place for a while
        else:
            vars(program)[self.name] = value

    def __delete__(self, program: dspy.Module) -> None:
        if vars(program).pop(self.name, None) is None:
            raise AttributeError(self.name)

    def _of_class(self, program: dspy.Module) -> Any:
        return getattr(super(self.owner, program), self.name)


def _entering(like: Callable[..., Any], find: Callable[[dspy.Module], Any]) -> Callable[..., Any]:
    """A function of a program that enters it and runs what is found for it."""

    def forward(program: dspy.Module, /, *args: Any, **kwargs: Any) -> Any:
        with _entered(program):
            return find(program)(*args, **kwargs)

    async def aforward(program: dspy.Module, /, *args: Any, **kwargs: Any) -> Any:
        with _entered(program):
            return await find(program)(*args, **kwargs)

    return functools.wraps(like)(aforward if inspect.iscoroutinefunction(like) else forward)


class Kept(Mixin):
    """A compiled program, which keeps the trained weights where an optimizer begins with it."""

    def reset_copy(self) -> Any:
        """As DSPy's, which takes predictors their language models as well as their demos."""
        twin: Any = super().reset_copy()  # type: ignore[misc]
        before = dict(cast(dspy.Module, self).named_predictors())
        for name, predictor in twin.named_predictors():
            own = before[name]
            # The copy's own copy of it, where there is one, for it to go on following.
            predictor.lm = vars(predictor).get(FOLLOWS) if follows(own) else own.lm
        return twin


class Entered(Kept):
    """A compiled program, which notes the settings' LM as it is entered.

    It also says where the settings' adapter is another than that of the compile.
    """

    forward, aforward = _Entry(), _Entry()


@contextlib.contextmanager
def _entered(program: dspy.Module) -> Iterator[None]:
    lm = vars(program).get(COMPILED_LM)
    if lm is None:  # another of its class, which it has made as it runs
        yield
        return
    check_adapter(program, lm.policy)
    with dspy.context(**{ENTERED_WITH: (dspy.settings.lm,)}):
        yield
