"""Actions: what the model writes, and the call of a tool that it means.

Three forms, by the tools of the environment: a single tool with a single argument is called with
the answer itself, of the argument's type; tools without arguments are called by their names;
anything else is written as a call, ``move(steps=2)``, with literals for arguments.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError

from fst_dspy.errors import FSTError, ProgramError

Tool = Callable[..., Any]
"""A method of an environment, with a docstring and typed arguments."""


class InvalidActionError(FSTError):
    """The model's action is no call of a tool; the message says what would be one."""


@dataclass(frozen=True)
class ActionForm:
    """How the actions of some tools are written.

    Attributes:
        tools: By name.
        kind: ``"argument"``, ``"name"`` or ``"call"``, as in the module's docstring.
        texts: What the model reads of them, by tool; by default the docstrings' first paragraphs.
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
        texts = {name: _first_paragraph(tool.__doc__) for name, tool in tools.items()}
        if len(arguments) == 1 and len(arguments[0]) == 1:
            return cls(tools, "argument", texts)
        return cls(tools, "call" if any(arguments) else "name", texts)

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
        if self.kind == "argument":
            ((name, tool),) = self.tools.items()
            (argument,) = _parameters(tool)
            return name, self._checked(name, {argument: value})
        text = str(value).strip()
        name, arguments = (text.removesuffix("()"), {}) if self.kind == "name" else _call(text)
        if name not in self.tools:
            raise InvalidActionError(
                f"{text!r} is no action; it must be one of {', '.join(self.tools)}"
            )
        return name, self._checked(name, arguments)

    @property
    def _only(self) -> Tool:
        (tool,) = self.tools.values()
        return tool

    def _checked(self, tool_name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, each of its type."""
        parameters = _parameters(self.tools[tool_name])
        names = list(parameters)
        found = {
            (names[int(key)] if key.isdigit() and int(key) < len(names) else key): value
            for key, value in arguments.items()
        }
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in found]
        unknown = [name for name in found if name not in parameters]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has no {', '.join(unknown)}"
            raise InvalidActionError(
                f"{tool_name} {wrong}; it is called as {self._written(tool_name)}"
            )
        for name, value in found.items():
            annotation = parameters[name].annotation
            if annotation is inspect.Parameter.empty:
                continue
            try:
                found[name] = TypeAdapter(annotation).validate_python(value)
            except ValidationError as error:
                first = error.errors()[0]["msg"]
                raise InvalidActionError(
                    f"{tool_name}: {name}={value!r} is wrong: {first}"
                ) from error
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


def _type_text(annotation: Any) -> str:
    """A type as the model reads it: of an enum its values, of a pydantic model its fields."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(repr(member.value) for member in annotation)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return f"{{{', '.join(f'{name!r}: {_type_text(one.annotation)}' for name, one in fields)}}}"
    return inspect.formatannotation(annotation)


def _parameters(tool: Tool) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(tool, eval_str=True)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call such as ``move(steps=2)``; a bare name has no arguments."""
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        for position, value in enumerate(node.args):
            arguments[str(position)] = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise InvalidActionError(
            f"{text!r} is not written as a call of a tool, such as tool(argument='value')"
        ) from error
    return node.func.id, arguments


def _first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, in one line: what follows are its arguments."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())
