"""Actions: what the model writes, and the call of a tool that it means.

Three forms, by the tools of the environment: a single tool with a single argument is called with
the answer itself, of the argument's type; tools without arguments are called by their names;
anything else is written as a call, ``move(steps=2)``, with literals for arguments.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import dspy
from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError
from typing_extensions import is_typeddict

from fst_dspy.agents.contract import described
from fst_dspy.errors import FSTError, ProgramError

Tool = Callable[..., Any]
"""A method of an environment, with a docstring and typed arguments."""


class InvalidActionError(FSTError):
    """The model's action is no call of a tool; the message says what would be one."""


@dataclass(frozen=True)
class ActionForm:
    """How the actions of some tools are written.

    Attributes:
        tools: What they are called, take and say, by name; these here do nothing, so that the
            environment they were read off is not kept.
        kind: ``"argument"``, ``"name"`` or ``"call"``, as in the module's docstring.
        texts: What the model reads of them, by tool; by default the first paragraph of the
            docstring and a line an argument that it describes, ``name: what it is``.
    """

    tools: Mapping[str, Tool]
    kind: Literal["argument", "name", "call"]
    texts: Mapping[str, str]

    @classmethod
    def of(cls, tools: Mapping[str, Tool]) -> ActionForm:
        """The simplest form that can say everything.

        Raises:
            ProgramError: A tool cannot be called by what a model writes.
        """
        for name, tool in tools.items():
            _check(name, tool)
        arguments = [_parameters(tool) for tool in tools.values()]
        texts = {name: _told(tool) for name, tool in tools.items()}
        shapes = {name: _shape(name, tool) for name, tool in tools.items()}
        if len(arguments) == 1 and len(arguments[0]) == 1:
            return cls(shapes, "argument", texts)
        return cls(shapes, "call" if any(arguments) else "name", texts)

    @property
    def annotation(self) -> Any:
        """The type of the output field that holds an action."""
        if self.kind == "name":
            return Literal[tuple(self.tools)]
        if self.kind == "argument":
            (parameter,) = _parameters(self._only).values()
            return str if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        return str

    @property
    def description(self) -> str:
        """What the model is told of its actions, one line a tool."""
        if self.kind == "argument":
            (name,), (said,) = _parameters(self._only), self.texts.values()
            return f"Your action is the {name}: {said}" if said else f"Your action is the {name}."
        lines = [f"- {self._written(name)}" for name in self.tools]
        return "\n".join(["Your action is one of these:", *lines])

    def read(self, value: Any) -> tuple[str, dict[str, Any]]:
        """The tool that an action calls, and its arguments.

        Raises:
            InvalidActionError: It calls none, or not as it is to be called.
        """
        if isinstance(value, Enum):
            value = value.value
        if self.kind == "argument":
            ((name, tool),) = self.tools.items()
            (argument,) = _parameters(tool)
            return name, self._checked(name, {argument: value})
        if isinstance(value, BaseModel):  # of the only tool its arguments, see ``check_type``
            (name,) = self.tools
            return name, self._checked(name, dict(value))
        text = str(value).strip()
        name, arguments = (text.removesuffix("()"), {}) if self.kind == "name" else _call(text)
        if name not in self.tools:
            raise InvalidActionError(
                f"{text!r} is no action; it must be one of {', '.join(self.tools)}"
            )
        return name, self._checked(name, arguments)

    def check_type(self, annotation: Any) -> None:
        """Refuse a type of the signature's, no value of which can be an action.

        Raises:
            ProgramError: It is such a one.
        """
        if self.kind == "argument" or annotation is str:
            return
        if _is_a(annotation, BaseModel):
            if self.kind == "call" and len(self.tools) == 1:
                return
        else:
            values = values_of(annotation)
            with suppress(InvalidActionError):
                for value in values:
                    self.read(value)
                if values:
                    return
        raise ProgramError(
            f"the output field of the action is a {_type_text(annotation)}, and not all of those "
            f"are actions of this environment; make it a str. {self.description}"
        )

    @property
    def _only(self) -> Tool:
        (tool,) = self.tools.values()
        return tool

    def _checked(self, tool_name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, each of its type."""
        parameters = _parameters(self.tools[tool_name])
        names = list(parameters)
        by_place = sum(key.isdigit() for key in arguments)
        found = {
            (names[int(key)] if key.isdigit() and int(key) < len(names) else key): value
            for key, value in arguments.items()
        }
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in found]
        unknown = [name for name in found if name not in parameters]
        wrong = ""
        if by_place > len(names):
            wrong = f"has {len(names)} arguments, not {by_place}"
        elif len(found) < len(arguments):
            wrong = "has each argument once"
        elif missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has no {', '.join(unknown)}"
        if wrong:
            raise InvalidActionError(
                f"{tool_name} {wrong}; it is called as {self._written(tool_name)}"
            )
        for name, value in found.items():
            annotation = parameters[name].annotation
            if annotation is not inspect.Parameter.empty:
                found[name] = _as_argument(tool_name, name, value, annotation)
        return found

    def _written(self, name: str) -> str:
        parameters = _parameters(self.tools[name])
        arguments = ", ".join(
            argument
            if parameter.annotation is parameter.empty
            else f"{argument}: {_type_text(parameter.annotation)}"
            for argument, parameter in parameters.items()
        )
        shown = f"{name}({arguments})" if parameters else name
        said = self.texts[name].replace("\n", "\n  ")  # those of tools stand in a list
        return f"{shown}: {said}" if said else shown


def as_written(value: Any) -> str:
    """A value of an answer as the model would write it: a pydantic model or a list as JSON."""
    if isinstance(value, Enum):
        return as_written(value.value)
    compound = isinstance(value, BaseModel | dict | list | tuple | set | frozenset)
    if not compound or isinstance(value, dspy.Type):  # those of DSPy write themselves
        return str(value)
    with suppress(PydanticSerializationError):
        return TypeAdapter(Any).dump_json(value).decode()
    return str(value)


def values_of(annotation: Any) -> tuple[Any, ...]:
    """What a ``Literal`` or an enum may be; of other types nothing."""
    if _is_a(annotation, Enum):
        return tuple(member.value for member in annotation)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _shape(name: str, tool: Tool) -> Tool:
    def shape(**_: Any) -> Any:
        raise NotImplementedError(f"{name} is called on an episode's environment")

    return described(shape, name, inspect.signature(tool, eval_str=True), tool.__doc__)


def _check(name: str, tool: Tool) -> None:
    """Refuse a tool that no written action can call.

    Raises:
        ProgramError: Its annotations cannot be read, or an argument has no name or a type of which
            nothing can be written.
    """
    try:
        parameters = _parameters(tool)
    except NameError as error:
        raise ProgramError(
            f"the annotations of the environment's tool {name!r} cannot be read: {error}"
        ) from error
    for argument, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ProgramError(
                f"the argument {argument!r} of the environment's tool {name!r} has no name to be "
                "called by: leave out the '/'"
            )
        if parameter.annotation is parameter.empty:
            continue
        try:
            TypeAdapter(parameter.annotation)
        except PydanticUserError as error:
            raise ProgramError(
                f"the argument {argument!r} of the environment's tool {name!r} is a "
                f"{_type_text(parameter.annotation)}, which cannot be written as text"
            ) from error


def _as_argument(tool: str, name: str, value: Any, annotation: Any) -> Any:
    """A value of an argument's type.

    Raises:
        InvalidActionError: It is none, nor is it as text: signatures may have types of their own,
            an ``int`` for what is the ``Literal`` of ``"0"`` and ``"1"`` here.
    """
    adapter = TypeAdapter(annotation)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        with suppress(ValidationError):
            if not isinstance(value, str):
                return adapter.validate_python(str(value))
        first = error.errors()[0]["msg"]
        raise InvalidActionError(f"{tool}: {name}={value!r} is wrong: {first}") from error


def _is_a(annotation: Any, kind: type) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, kind)


def _type_text(annotation: Any, within: tuple[Any, ...] = ()) -> str:
    """A type as the model reads it: of an enum its values, of what has fields its fields.

    So are those within a list, a union or a dict.

    Args:
        within: The types whose fields it is among; one that holds itself is named there.
    """
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if _is_a(annotation, Enum):
        return f"one of {', '.join(repr(member.value) for member in annotation)}"
    fields: dict[str, Any] = {}
    if _is_a(annotation, BaseModel):
        fields = {name: one.annotation for name, one in annotation.model_fields.items()}
    elif is_typeddict(annotation) or (is_dataclass(annotation) and isinstance(annotation, type)):
        fields = get_type_hints(annotation)
    if fields and annotation in within:
        return str(annotation.__name__)
    if fields:
        own = (*within, annotation)
        told = [f"{name!r}: {_type_text(one, own)}" for name, one in fields.items()]
        return f"{{{', '.join(told)}}}"
    origin = get_origin(annotation)
    parts = () if origin is Literal else get_args(annotation)
    told = [_type_text(part, within) for part in parts]
    if told == [inspect.formatannotation(part) for part in parts]:
        return inspect.formatannotation(annotation)
    if origin in (Union, UnionType):
        return " or ".join("None" if one == "NoneType" else one for one in told)
    return f"{getattr(origin, '__name__', origin)}[{', '.join(told)}]"


def _parameters(tool: Tool) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(tool, eval_str=True)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call such as ``move(steps=2)``; a bare name has no arguments.

    JSON's names for values are taken as well: an agent's history has lists and models as JSON.
    """
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        keywords = [keyword.arg for keyword in node.keywords]
        if None in keywords or len(set(keywords)) < len(keywords):
            raise ValueError
        given = [*enumerate(node.args), *((k.arg, k.value) for k in node.keywords)]
        arguments = {str(key): ast.literal_eval(_AsPython().visit(one)) for key, one in given}
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise InvalidActionError(
            f"{text!r} is not written as a call of a tool, such as tool(argument='value')"
        ) from error
    return node.func.id, arguments


class _AsPython(ast.NodeTransformer):
    """Puts values in place of JSON's names for them."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def _told(tool: Tool) -> str:
    """What a docstring of Google's form, as TRL asks for, says of a tool and its arguments."""
    description, _, rest = inspect.cleandoc(tool.__doc__ or "").partition("\n\n")
    section = _ARGS.search(rest)
    lines = [description]
    if section is not None:
        described = _ARGUMENT.findall(textwrap.dedent(section[1]))
        lines += [f"{name}: {said}" for name, said in described if name in _parameters(tool)]
    return "\n".join(" ".join(line.split()) for line in lines)


_ARGS = re.compile(r"^Arg(?:ument)?s:[ \t]*\n((?:[ \t]+\S.*\n?|[ \t]*\n)+)", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)(?: *\([^\n]*?\))?: *(.*(?:\n[ \t]+.*)*)", re.MULTILINE)
