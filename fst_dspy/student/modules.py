"""A program as a graph of objects: all its predictors, and copies that share what is not a module.

A rollout needs modules and predictors of its own, whose texts and attributes it may change, and
nothing else: a retriever of a gigabyte is the same object in all rollouts, as it is in all threads
of ``dspy.Evaluate``. So of what a program holds there are copied

- its modules, predictors, and whatever leads to one: containers, bound methods, partial functions,
  functions that close over one, functions with a cache, whose copies begin with an empty one, weak
  references to what else is copied, and plain objects that hold one;
- small lists, dicts, sets and ``dspy.History`` that a module holds, which a program may write into,
  and functions and tools that hold the same ones, unless another object does too: what it wrote
  into them, the copy would not see;
- objects whose class has a method ``copy_for_rollout()``, by that method: an environment, say, that
  every rollout needs to itself.

All else, language models, clients, arrays and indexes, is shared.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import dspy

OWN_COPY = "copy_for_rollout"
"""The method by which an object says how it is copied for a rollout."""
MAX_OWN_ITEMS = 1000
"""Items of a container, and of those within it, up to which every copy gets its own."""
MAX_WALKED_ITEMS = 10_000
"""Items of a container up to which it is searched for modules; longer ones hold data."""

TRIED = ("candidate_programs", "mb_candidate_programs", "trial_logs", "detailed_results")
"""Attributes in which DSPy's optimizers leave what they tried: other programs, no parts of it."""
NOT_OF_THE_PROGRAM = "__fst_not_of_the_program__"
"""An attribute of classes whose objects a program may hold, and which are no part of it."""
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType)
_CONTAINERS = (list, dict, set, deque)
_WRITERS = (*_CONTAINERS, tuple, types.FunctionType, types.CellType, functools.partial, dspy.Tool)
"""What a copy has its own of, where it holds a container that the copy has its own of."""
_CACHED = type(functools.cache(len))


def every_predictor(program: dspy.Module) -> dict[str, dspy.Predict]:
    """All predictors of a program by name.

    First those of ``program.named_predictors()``. After them come the ones that it leaves out, as
    they lie in a sub-module that was compiled before, in nested containers or in another object;
    they are named by the way to them. No predictor occurs twice.
    """
    found = dict(program.named_predictors())
    seen = {id(predictor) for predictor in found.values()}
    for path, item in _walk(program):
        if isinstance(item, dspy.Predict) and id(item) not in seen:
            seen.add(id(item))
            found[path or "self"] = item
    return found


def every_module(program: dspy.Module) -> list[dspy.Module]:
    """All modules of a program, itself first, predictors among them."""
    return [item for _, item in _walk(program) if isinstance(item, dspy.Module)]


class ProgramCopier:
    """Makes copies of one program; what is to be copied is found out once."""

    def __init__(self, program: dspy.Module) -> None:
        self.program = program
        self._copied = _to_copy(program)
        self._predictors = every_predictor(program)

    def __call__(self) -> tuple[dspy.Module, dict[str, dspy.Predict]]:
        """A copy of the program as it is now, and the copy's predictors by name."""
        made: dict[int, Any] = {}
        twin = self._copy(self.program, made)
        return twin, {name: self._copy(p, made) for name, p in self._predictors.items()}

    def _copy(self, item: Any, made: dict[int, Any]) -> Any:
        key = id(item)
        if key in made:
            return made[key]
        if key not in self._copied:
            return item
        if hasattr(type(item), OWN_COPY):
            made[key] = getattr(item, OWN_COPY)()
            return made[key]
        for kinds, make in _MAKERS:
            if isinstance(item, kinds):
                return make(self, item, made)
        return self._object(item, made)

    def _module(self, module: dspy.Module, made: dict[int, Any]) -> dspy.Module:
        twin = made[id(module)] = object.__new__(type(module))
        values = {name: self._copy(value, made) for name, value in attributes(module).items()}
        # As ``deepcopy``, which leaves them out; but who listens to a program goes on listening.
        own = {"history": [], "callbacks": list(values.get("callbacks") or [])}
        for name, value in (values | own).items():
            object.__setattr__(twin, name, value)
        return twin

    def _container(self, items: Any, made: dict[int, Any]) -> Any:
        twin = made[id(items)] = copy.copy(items)
        if isinstance(items, dict):
            twin.update((key, self._copy(value, made)) for key, value in items.items())
        elif isinstance(items, set):
            twin.clear()
            twin.update(self._copy(item, made) for item in items)
        else:
            for place, item in enumerate(items):
                twin[place] = self._copy(item, made)
        return twin

    def _fixed(self, items: Any, made: dict[int, Any]) -> Any:
        values = [self._copy(item, made) for item in items]
        twin = type(items)(*values) if hasattr(items, "_fields") else type(items)(values)
        return made.setdefault(id(items), twin)

    def _method(self, method: types.MethodType, made: dict[int, Any]) -> Any:
        return types.MethodType(method.__func__, self._copy(method.__self__, made))

    def _partial(self, call: functools.partial[Any], made: dict[int, Any]) -> Any:
        args = [self._copy(value, made) for value in call.args]
        kwargs = {name: self._copy(value, made) for name, value in call.keywords.items()}
        return made.setdefault(
            id(call), functools.partial(self._copy(call.func, made), *args, **kwargs)
        )

    def _cached(self, call: Any, made: dict[int, Any]) -> Any:
        twin = functools.lru_cache(**call.cache_parameters())(self._copy(call.__wrapped__, made))
        vars(twin).update((name, self._copy(value, made)) for name, value in vars(call).items())
        return made.setdefault(id(call), twin)

    def _reference(self, reference: Any, made: dict[int, Any]) -> Any:
        # Without its callback: that is for the end of the original, and copies end all the time.
        return made.setdefault(id(reference), weakref.ref(self._copy(reference(), made)))

    def _function(self, function: types.FunctionType, made: dict[int, Any]) -> Any:
        cells = tuple(
            made.setdefault(id(cell), types.CellType()) if id(cell) in self._copied else cell
            for cell in function.__closure__ or ()
        )
        twin = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        made[id(function)] = functools.update_wrapper(twin, function)
        del twin.__wrapped__  # type: ignore[attr-defined]
        twin.__kwdefaults__ = function.__kwdefaults__
        for cell, own in zip(function.__closure__ or (), cells, strict=True):
            if own is not cell:
                own.cell_contents = self._copy(cell.cell_contents, made)
        return twin

    def _object(self, item: Any, made: dict[int, Any]) -> Any:
        twin = made[id(item)] = _empty_twin(item)
        if twin is not item:
            for name, value in attributes(item).items():
                object.__setattr__(twin, name, self._copy(value, made))  # also where it is frozen
        return twin


_MAKERS: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (dspy.Module, ProgramCopier._module),
    (_CONTAINERS, ProgramCopier._container),
    ((tuple, frozenset), ProgramCopier._fixed),
    (types.MethodType, ProgramCopier._method),
    (functools.partial, ProgramCopier._partial),
    (types.FunctionType, ProgramCopier._function),
    (_CACHED, ProgramCopier._cached),
    (weakref.ref, ProgramCopier._reference),
)


def copy_program(program: dspy.Module) -> dspy.Module:
    """A copy of a program with modules of its own, which shares all else; see above."""
    return ProgramCopier(program)()[0]


def _to_copy(program: dspy.Module) -> set[int]:
    """Ids of the objects within a program that a copy has its own of."""
    parents: dict[int, list[int]] = {}
    wanted: list[int] = []
    own: set[int] = set()
    writers: set[int] = set()
    for item, children in _graph(program):
        if isinstance(item, dspy.Module) or hasattr(type(item), OWN_COPY):
            wanted.append(id(item))
        if isinstance(item, dspy.Module):
            for value in vars(item).values():
                own |= _small_containers(value)
        if type(item) in _WRITERS:
            writers.add(id(item))
        if type(item) is weakref.ref:  # it leads to what others hold: a copy of its own would end
            parents.setdefault(id(item()), []).append(id(item))
        for _, child in children:
            parents.setdefault(id(child), []).append(id(item))
    found = _with_parents(wanted, parents)
    own = _with_parents(own, {n: writers & {*above} for n, above in parents.items()}) - found
    while left := {n for n in own if not (found | own).issuperset(parents.get(n, ()))}:
        own -= left
    return found | own


def _with_parents(ids: Iterable[int], parents: Mapping[int, Iterable[int]]) -> set[int]:
    """Ids of objects and of all that leads to them."""
    found = set(ids)
    left = list(found)
    while left:
        new = set(parents.get(left.pop(), ())) - found
        found |= new
        left.extend(new)
    return found


def _small_containers(value: Any) -> set[int]:
    """Ids of a container and those within it; none if they hold much."""
    found: set[int] = set()
    left, items = [value], 0
    while left:
        item = left.pop()
        if isinstance(item, dspy.History):
            found.add(id(item))
            item = item.messages
        if type(item) in _CONTAINERS and id(item) not in found:
            found.add(id(item))
            items += len(item)
            if items > MAX_OWN_ITEMS:
                return set()
            left.extend(item.values() if isinstance(item, dict) else item)
    return found


def _walk(program: dspy.Module) -> Iterator[tuple[str, Any]]:
    """Every object within a program with the way to it, nearest first, each once."""
    paths = {id(program): ""}
    for item, children in _graph(program):
        path = paths[id(item)]
        yield path, item
        for label, child in children:
            paths.setdefault(id(child), f"{path}{label}".removeprefix("."))


def _graph(program: dspy.Module) -> Iterator[tuple[Any, list[tuple[str, Any]]]]:
    """The objects within a program, nearest first, with what each holds."""
    left, seen = deque([program]), {id(program)}
    while left:
        item = left.popleft()
        children = [] if isinstance(item, _LEAVES) else list(_children(item))
        yield item, children
        for _, child in children:
            if id(child) not in seen:
                seen.add(id(child))
                left.append(child)


def _children(item: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with its name; nothing that is never copied."""
    held: Iterator[tuple[str, Any]]
    if hasattr(type(item), NOT_OF_THE_PROGRAM):
        held = iter([])
    elif isinstance(item, dspy.Module):
        skipped = ("history", "callbacks")
        held = (
            (f".{name}", value)
            for name, value in attributes(item).items()
            if name not in skipped and not _is_left(name, value)
        )
    elif isinstance(item, dict):
        held = ((f"['{key}']", value) for key, value in _short(item).items())
    elif isinstance(item, list | tuple | set | frozenset | deque):
        held = ((f"[{place}]", value) for place, value in enumerate(_short(item)))
    elif isinstance(item, types.MethodType):
        held = iter([("", item.__self__)])
    elif isinstance(item, functools.partial):
        held = iter([(".func", item.func), (".args", item.args), (".keywords", item.keywords)])
    elif isinstance(item, types.FunctionType):
        names = item.__code__.co_freevars
        cells = zip(names, item.__closure__ or (), strict=False)
        held = ((f".{name}", cell) for name, cell in cells)
    elif isinstance(item, types.CellType):
        held = iter([("", item.cell_contents)] if _is_filled(item) else [])
    elif isinstance(item, dspy.BaseLM | dspy.Adapter | dspy.Example):
        held = iter([])
    else:
        held = ((f".{name}", value) for name, value in attributes(item).items())
    return ((label, value) for label, value in held if not isinstance(value, _LEAVES))


def _is_left(name: str, value: Any) -> bool:
    """Whether an attribute of a module is what an optimizer left, in none of a program's forms."""
    if name not in TRIED:
        return False
    parts = value.values() if isinstance(value, dict) else value
    parts = parts if isinstance(value, dict | list | tuple) else [value]
    return not any(isinstance(part, dspy.Module) for part in parts)


def _empty_twin(item: Any) -> Any:
    """Another object of the same kind, to be given its attributes; itself where there is none.

    Classes may forbid copies, or be unfit for them (a ``__getattr__`` that asks
    an attribute, a ``__getstate__`` that raises), or say that they are their own copy, as one of
    which there is to be one alone does.
    """
    with contextlib.suppress(Exception):
        if (twin := copy.copy(item)) is not item:
            return twin
    try:
        return object.__new__(type(item))
    except TypeError:  # it is not made of attributes alone
        return item


def attributes(item: Any) -> dict[str, Any]:
    """An object's own attributes, those in slots too."""
    found = dict(getattr(item, "__dict__", {}))
    for kind in type(item).__mro__:
        if "__slots__" in vars(kind):
            slots = [n for n, v in vars(kind).items() if isinstance(v, types.MemberDescriptorType)]
            found |= {name: getattr(item, name) for name in slots if hasattr(item, name)}
    return found


def _short(items: Any) -> Any:
    """A container; one that is empty in the place of a long one, of whatever class."""
    if len(items) <= MAX_WALKED_ITEMS:
        return items
    return {} if isinstance(items, dict) else ()


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
