"""Tools of agents as text: what the model reads of a tool, out of a program and into a copy of it.

A tool's text is its description; below it may stand a line an argument, ``name: what it is``. Two
kinds of module have tools: those with ``dspy.Tool``\\s by name in ``tools`` (DSPy's ``ReAct`` and
``ReActV2``), and those that say so themselves (``HasToolTexts``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import dspy


@runtime_checkable
class HasToolTexts(Protocol):
    """A module whose tools are no ``dspy.Tool``."""

    def tool_texts(self) -> dict[str, str]:
        """The texts of its tools by name."""
        ...

    def set_tool_texts(self, texts: Mapping[str, str]) -> None:
        """Put other texts in their place; tools that are not named keep theirs."""
        ...


def tool_texts(program: dspy.Module) -> dict[tuple[str, str], str]:
    """The texts of a program's tools, by the predictor that chooses among them and their names."""
    return {
        (predictor, name): text
        for predictor, module in _owners(program)
        for name, text in _texts_of(module).items()
    }


def set_tool_texts(program: dspy.Module, texts: Mapping[tuple[str, str], str]) -> None:
    """Put texts into a program, in place; they are keyed as ``tool_texts`` has them.

    The modules are to be the program's own, what they hold may be shared with others.

    Raises:
        KeyError: The program has no such tool.
    """
    unknown = sorted(set(texts) - set(tool_texts(program)))
    if unknown:
        raise KeyError(f"no tool {unknown[0][1]!r} of the predictor {unknown[0][0]!r}")
    predictors = dict(program.named_predictors())
    for predictor, module in _owners(program):
        own = _texts_of(module)
        changed = {
            name: texts[predictor, name]
            for name, text in own.items()
            if texts.get((predictor, name), text) != text
        }
        if not changed:
            continue
        if isinstance(module, HasToolTexts):
            module.set_tool_texts(changed)
        else:
            _rewrite(module, predictors[predictor], changed)


def _owners(program: dspy.Module) -> Iterator[tuple[str, Any]]:
    """The modules that have tools, each with the first predictor in it."""
    # DSPy writes the keys of dicts with quotes in the one list of names, and without in the other.
    names = {name.replace("'", ""): name for name, _ in program.named_predictors()}
    for path, module in program.named_sub_modules(dspy.Module):
        if not _texts_of(module):
            continue
        inside = path.removeprefix("self").removeprefix(".")
        within = [name for name in names if not inside or name.startswith(f"{inside}.")]
        if within:
            yield names[within[0]], module


def _texts_of(module: Any) -> dict[str, str]:
    if isinstance(module, HasToolTexts):
        return module.tool_texts()
    tools = getattr(module, "tools", None)
    if not isinstance(tools, dict):
        return {}
    return {name: _text(tool) for name, tool in tools.items() if isinstance(tool, dspy.Tool)}


def _text(tool: dspy.Tool) -> str:
    said = [
        f"{name}: {schema['description']}"
        for name, schema in (tool.args or {}).items()
        if isinstance(schema, dict) and schema.get("description")
    ]
    return "\n".join([inspect.cleandoc(tool.desc or ""), *said]).strip()


def _rewrite(module: Any, predictor: dspy.Predict, texts: Mapping[str, str]) -> None:
    tools = {
        **module.tools,
        **{name: _with_text(module.tools[name], texts[name]) for name in texts},
    }
    instructions = predictor.signature.instructions
    for name in texts:
        before, after = str(module.tools[name]), str(tools[name])
        # ReAct writes its tools into its instructions; those of ReActV2 are an input.
        if before in instructions:
            instructions = instructions.replace(before, after)
        elif after not in instructions and "tools" not in predictor.signature.input_fields:
            instructions = f"{instructions}\n{after}"
    module.tools = tools
    predictor.signature = predictor.signature.with_instructions(instructions)


def _with_text(tool: dspy.Tool, text: str) -> dspy.Tool:
    """A copy of a tool that reads as ``text`` says."""
    args = dict(tool.args or {})
    lines = []
    for line in text.split("\n"):
        found = re.match(r"(\w+): (.+)", line)
        if found is None or found[1] not in args:
            lines.append(line)
        elif isinstance(args[found[1]], dict):
            args[found[1]] = {**args[found[1]], "description": found[2]}
    return tool.model_copy(update={"desc": "\n".join(lines).strip(), "args": args})
