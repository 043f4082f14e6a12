"""Writes ``fst_dspy/settings.py`` from the dataclasses.

``PYTHONPATH=. python tests/support/settings_file.py``
"""

import subprocess
import sys
import textwrap
from pathlib import Path

from fst_dspy.config import ALIASES, STRATEGIES
from fst_dspy.settings_help import all_settings, without_custom

FILE = Path(__file__).parents[2] / "fst_dspy" / "settings.py"

OBJECTS = {
    "component_selector": "Callable[..., list[str]]",
    "candidate_selection_strategy": "CandidateSelector",
    "acceptance_criterion": "AcceptanceCriterion",
}
"""What ``FST`` takes besides the names of ``STRATEGIES``."""

HEAD = '''"""The settings of ``FST`` for editors and type checkers, made from ``fst_dspy.config``.

Written by ``tests/support/settings_file.py``; a test compares it with the dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from gepa.proposer.reflective_mutation.base import CandidateSelector
    from gepa.strategies.acceptance import AcceptanceCriterion
    from gepa.strategies.batch_sampler import BatchSampler

    from fst_dspy.config import LoraConfig


class Settings(TypedDict, total=False):
    """What ``FST(**settings)`` takes; ``help(fst_dspy.FST)`` lists it with the defaults."""

'''


def entry(name, kind, meaning):
    text = textwrap.fill(meaning, 90).replace("\n", "\n    ")
    return f'    {name}: {kind}\n    """{text}"""\n'


def text():
    """The file, before it is formatted."""
    kinds, parts = {}, []
    for setting in all_settings():
        kind = setting.type
        if setting.name in STRATEGIES:
            kind = f"{without_custom(kind)} | {OBJECTS[setting.name]}"
        elif setting.name == "lora":
            kind = 'LoraConfig | Mapping[str, Any] | bool | Literal["auto"] | None'
        kinds[setting.name] = kind
        default = f"Default {setting.default!r}. " if setting.part else ""
        parts.append(entry(setting.name, kind, default + setting.meaning))
    sampler = 'Literal["epoch_shuffled"] | BatchSampler[Any, Any]'
    parts.append(entry("batch_sampler", sampler, "Draws the minibatches that are reflected on."))
    for alias, own in ALIASES.items():
        parts.append(entry(alias, kinds[own], f"Another name of ``{own}``."))
    return HEAD + "".join(parts)


def formatted():
    """The file as ruff formats it, in the project's own way."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(FILE), "-"]
    done = subprocess.run(command, input=text(), capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    FILE.write_text(formatted())
