"""How much work llguidance may put into one grammar, the same wherever one is made.

Its own limits are for servers that strangers send grammars to. A text of at most 130 characters
before a marker is already over them, and a Literal of 2,000 values.
"""

from __future__ import annotations

import functools
from typing import Any

LONGEST = 5_000
"""The longest text of which the characters are counted; each of them is states of the lexer."""


@functools.cache
def parser_limits() -> Any:
    """The limits of every grammar, for llguidance."""
    from llguidance import LLParserLimits  # only where answers are held to a format

    return LLParserLimits(
        max_items_in_row=100_000,
        step_max_items=1_000_000,
        initial_lexer_fuel=50_000_000,
        step_lexer_fuel=20_000_000,
        max_lexer_states=2_000_000,
        verbose_errors=False,
    )


def refusal(grammar: str) -> str:
    """What llguidance has against a grammar, as a matcher finds it; empty for nothing."""
    from llguidance import LLMatcher

    # Its validation makes no lexer, which is where large grammars fail.
    return str(LLMatcher(_bytes(), grammar, log_level=0, limits=parser_limits()).get_error())


@functools.cache
def steps_below_zero() -> bool:
    """Whether of numbers that are multiples of one those below 0 are let through as well.

    Before 1.8, which vLLM asks for, llguidance lets none through.
    """
    from llguidance import LLMatcher

    grammar = 'start: %json {"type": "integer", "multipleOf": 2}'
    return LLMatcher(_bytes(), grammar, log_level=0).try_consume_tokens(list(b"-2")) == 2


@functools.cache
def _bytes() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
