"""The settings of ``FST`` with type, default and meaning, as the dataclasses of ``config`` say."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from fst_dspy.config import ALIASES, DERIVED, PARTS, FSTConfig

MEANING = {
    "rollouts_per_candidate": "Rollouts a problem under each candidate: group_size is this times "
    "population_size. In place of group_size.",
    "lora_rank": "Rank of adapters whose alpha is twice that; 0 for none. In place of lora.",
}
"""Of the settings that stand for others."""


@dataclass(frozen=True)
class Setting:
    """A flat setting of ``FST``.

    Attributes:
        name: Its name.
        part: The part of ``FSTConfig`` that it belongs to; empty where it stands for another one.
        type: Its annotation.
        default: Its default; ``None`` where it stands for another one.
        meaning: What it is, in one paragraph.
    """

    name: str
    part: str
    type: str
    default: Any
    meaning: str


def all_settings() -> list[Setting]:
    """Every setting, part by part; those that stand for others come last, aliases are left out."""
    usual = FSTConfig.make()
    found = []
    for part, kind in PARTS.items():
        meanings = _attributes(kind)
        for field in dataclasses.fields(kind):
            default = getattr(getattr(usual, part), field.name)
            found.append(
                Setting(field.name, part, str(field.type), default, meanings.get(field.name, ""))
            )
    return found + [Setting(name, "", "int", None, MEANING[name]) for name in DERIVED]


def settings_text() -> str:
    """All settings with their defaults, for ``help``; the meaning's first sentence with each."""
    lines = ["Settings, with their defaults (``fst_dspy.config`` says more of each):"]
    part = None
    for setting in all_settings():
        if setting.part != part:
            part = setting.part
            lines.append(f"    {part or 'in place of others'}:")
        also = [alias for alias, own in ALIASES.items() if own == setting.name]
        names = f" (also {', '.join(also)})" if also else ""
        default = f" = {setting.default!r}" if setting.part else ""
        kind = re.sub(r"Literal\[(.*?)\]", _alternatives, without_custom(setting.type))
        text = f"{setting.name}: {kind}{default}{names}. {first_sentence(setting.meaning)}"
        lines += textwrap.wrap(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 12)
    return "\n".join(lines)


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    return re.split(r"(?<=[a-z\])`]\.)\s", text, maxsplit=1)[0]


def without_custom(kind: str) -> str:
    """A type without ``"custom"``, which stands for an object and is not to be given."""
    return kind.replace(", 'custom'", "")


def _alternatives(literal: re.Match[str]) -> str:
    return literal[1].replace(", ", " | ")


def _attributes(kind: type) -> dict[str, str]:
    """What a dataclass's docstring says of its attributes, by name."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found
