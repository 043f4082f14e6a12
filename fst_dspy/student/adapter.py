"""The adapter that rollouts, training and the compiled program share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import dspy
from dspy.adapters.chat_adapter import ChatAdapter

from fst_dspy.student.by_identity import cached_by_identity

BOUND_PROGRAMS = 64
"""Programs with a candidate's texts in them that are kept to be copied."""
SIGNATURES = 256
"""Signatures whose answers' ends are known; a candidate has signatures of its own."""
ADAPTERS = 64
"""Adapters whose end markers are known; every run has one of its own."""


def strict_adapter(adapter: dspy.Adapter | None) -> dspy.Adapter:
    """The adapter rollouts run with: the user's, without ChatAdapter's second try through JSON.

    The second try hides format failures from the reward and adds a call nobody asked for.
    """
    adapter = adapter or default_adapter()
    if isinstance(adapter, ChatAdapter):
        adapter = copy.copy(adapter)
        adapter.use_json_adapter_fallback = False
    if type(adapter) is ChatAdapter:
        # It writes a signature out, which is the same for all rollouts of a candidate; that is a
        # third of DSPy's own time for a call.
        written = functools.lru_cache(BOUND_PROGRAMS)(adapter.format_system_message)
        adapter.format_system_message = written
    return adapter


def default_adapter() -> dspy.Adapter:
    """What DSPy takes where the settings name no adapter."""
    return ChatAdapter()


def texts_of_prompt(prompt: Any) -> list[str]:
    """The texts of a prompt, message by message.

    Args:
        prompt: Messages as OpenAI has them, which an adapter's ``format`` gives in DSPy 3.4; or
            what has ``system`` and ``messages`` of lm15, as the ``Prompt`` that it gives from 3.5
            on, and lm15's ``Request``.
    """
    if isinstance(prompt, list | tuple):
        return [text for message in prompt for text in _texts(message)]
    system = getattr(prompt, "system", None)
    texts = _texts({"content": system}) if system is not None else []
    return texts + [text for message in prompt.messages for text in _texts(message)]


def _texts(message: Any) -> list[str]:
    content = _of(message, "content") if isinstance(message, Mapping) else message.parts
    if isinstance(content, str):
        return [content]
    found = (_of(part, "text") for part in content or ())
    return [text for text in found if isinstance(text, str)]


def _of(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


class _Probe(dspy.Signature):
    """A question."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


_A, _B = "zebra crossing", "violet lantern"
_default = default_adapter()


def end_marker(adapter: dspy.Adapter | None) -> str | None:
    """The line that an adapter puts behind every answer, such as ChatAdapter's ``completed``.

    Found in how it writes an answer for a demo, and held to be one only where it is the same behind
    answers with other fields: a closing brace or tag belongs to the answer.
    """
    return _find_marker(adapter or _default)


def end_lines(adapter: dspy.Adapter | None, signature: Any) -> int:
    """How many lines of an answer begin with the adapter's end marker; the last one closes it.

    More than one where a field's header is the same, as of one named ``completed``. Where no answer
    can be written for a try, one; none without a marker.
    """
    return _count_lines(adapter or _default, signature)


@cached_by_identity(SIGNATURES)
def _count_lines(adapter: dspy.Adapter, signature: Any) -> int:
    marker, values = end_marker(adapter), dict.fromkeys(signature.output_fields, _A)
    try:
        written = adapter.format_assistant_message_content(signature, values)
    except Exception:  # of an adapter that takes no text for a field of another type
        return int(marker is not None)
    lines = str(written).splitlines()
    return sum(line.strip().startswith(marker) for line in lines) if marker is not None else 0


@cached_by_identity(ADAPTERS)
def _find_marker(adapter: dspy.Adapter) -> str | None:
    other = _Probe.append("verdict", dspy.OutputField(), str)
    behind = set()
    for signature, values in ((_Probe, {"answer": _A}), (other, {"answer": _B, "verdict": _A})):
        try:
            written = adapter.format_assistant_message_content(signature, values)
        except Exception:  # of an adapter with other ways there is nothing to find
            return None
        behind.add(str(written).rpartition(_A)[2].strip())
    marker = behind.pop()
    is_line = "\n" not in marker and any(character.isalnum() for character in marker)
    return marker if is_line and not behind else None
