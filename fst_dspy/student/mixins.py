"""Methods given to one program, whose class becomes one made of a mixin and its own.

An attribute of the program that knows the program would know the original in a shallow copy. What
is looked up on a class is bound to whatever it is looked up on, so that a copy of any kind, and
what comes out of a pickle, has methods of its own. The made class is a subclass of the program's,
with its name; of one class and the same mixins there is one.
"""

from __future__ import annotations

from typing import Any, cast

import dspy

_MADE_OF = "__fst_made_of__"


class Mixin:
    """What is mixed into classes of programs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: a class that keeps account of its subclasses is not told of made ones."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: by the program's own class, as made ones have no place."""
        made = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        args = tuple(plain_class(made) if part is made else part for part in args)
        return _made_again, (make, args, _made_of(made)[:-1]), *rest


def mix_in(program: dspy.Module, mixin: type[Mixin]) -> None:
    """Give a program the methods of a mixin, in place; once, however often it is asked for."""
    if not isinstance(program, mixin):
        made = _made_class((mixin, *_made_of(type(program))))
        object.__setattr__(program, "__class__", made)


def plain_class(kind: type) -> type[dspy.Module]:
    """The class that a made class was made of; any other is its own."""
    return cast(type[dspy.Module], _made_of(kind)[-1])


def _made_of(kind: type) -> tuple[type, ...]:
    return cast(tuple[type, ...], vars(kind).get(_MADE_OF, (kind,)))


def _made_class(made_of: tuple[type, ...]) -> type:
    *_, kind = made_of
    subclasses: list[type] = type.__subclasses__(kind)
    if (known := next((sub for sub in subclasses if _made_of(sub) == made_of), None)) is not None:
        return known
    said = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, made_of, {**said, _MADE_OF: made_of})


def _made_again(make: Any, args: tuple[Any, ...], mixins: tuple[type[Mixin], ...]) -> Any:
    program = make(*args)
    for mixin in reversed(mixins):
        mix_in(program, mixin)
    return program
