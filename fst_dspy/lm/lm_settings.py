"""The settings of a ``LocalLM``: checked before any weights are read."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import dspy
from dspy import lm15

from fst_dspy.errors import ConfigError
from fst_dspy.lm.engine import SETTINGS
from fst_dspy.lm.requests import OWN, checked_penalty

MAX_TOKENS_TOO = "max_completion_tokens"
"""OpenAI's later name for ``max_tokens``; DSPy would have both in one request."""
OF_CALLS = (
    *("reasoning_effort", "response_format", "tools", "tool_choice", "parallel_tool_calls"),
    *("top_logprobs", "metadata", "rollout_id", MAX_TOKENS_TOO),
)
"""What requests have besides."""
_OF_LM = tuple(inspect.signature(dspy.LM.__init__).parameters)[1:-1]  # without self and kwargs
KNOWN = frozenset({*SETTINGS, *OWN, *OF_CALLS, *_OF_LM})
_RANGES = (
    *("temperature", "top_p", "top_k", "max_tokens", "stop", "seed"),
    *("frequency_penalty", "presence_penalty"),
)
"""Settings whose values lm15 checks."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what no call would take.

    Raises:
        ConfigError: A name that there is none of, or a value out of its range.
    """
    unknown = [name for name in settings if name not in KNOWN]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(KNOWN), n=1)
        known = f"known: {', '.join(sorted({*SETTINGS, *OWN, *OF_CALLS}))}"
        hint = f"did you mean {near[0]!r}?" if near else known
        raise ConfigError(f"LocalLM has no setting {unknown[0]!r}; {hint}")
    if settings.get("model_type") == "text":
        raise ConfigError(
            "LocalLM puts every prompt through the model's chat template, and takes no "
            "model_type='text'; leave it out: a model without a template gets a plain one"
        )
    structured = settings.get("structured")
    if not (structured is None or isinstance(structured, bool)):
        raise ConfigError(f"structured must be True or False, got {structured!r}")
    given = {n: settings[n] for n in _RANGES if settings.get(n) is not None}
    try:
        lm15.Config(**given)
        checked_penalty(settings.get("repetition_penalty"))
    except (ValueError, TypeError, lm15.InvalidRequestError) as error:
        raise ConfigError(f"LocalLM: {error}") from error
