"""The adapter that rollouts, training and the compiled program share."""

from __future__ import annotations

import copy
import functools

import dspy
from dspy.adapters.chat_adapter import ChatAdapter

BOUND_PROGRAMS = 64
"""Programs with a candidate's texts in them that are kept to be copied."""


def strict_adapter(adapter: dspy.Adapter | None) -> dspy.Adapter:
    """The adapter rollouts run with: the user's, without ChatAdapter's second try through JSON.

    The second try hides format failures from the reward and adds a call nobody asked for.
    """
    if adapter is None:
        adapter = ChatAdapter()
    if isinstance(adapter, ChatAdapter):
        adapter = copy.copy(adapter)
        adapter.use_json_adapter_fallback = False
    if type(adapter) is ChatAdapter:
        # It writes a signature out, which is the same for all rollouts of a candidate; that is a
        # third of DSPy's own time for a call.
        written = functools.lru_cache(BOUND_PROGRAMS)(adapter.format_system_message)
        adapter.format_system_message = written
    return adapter
