"""What a chat template reads of a message: its content as a text, or as a list of parts.

Templates of models that see images as well go through a content's parts. Given a text, such a
template goes through its letters, finds no part among them, and shows an empty message, in silence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar

Found = TypeVar("Found")

_SAID = "zebra crossing"

Form = Literal["text", "parts"]
"""How a template reads contents."""


def once_a_template(find: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """Remember what is found out about a tokenizer's chat template until it has another one."""
    known: weakref.WeakKeyDictionary[Any, tuple[str, Found]] = weakref.WeakKeyDictionary()

    @wraps(find)
    def found(tokenizer: Any) -> Found:
        template = str(tokenizer.chat_template)
        if tokenizer not in known or known[tokenizer][0] != template:
            known[tokenizer] = template, find(tokenizer)
        return known[tokenizer][1]

    return found


@once_a_template
def content_form(tokenizer: Any) -> Form | None:
    """How the template reads contents; ``None`` where it shows nothing of what a user says.

    A template that refuses a conversation tells so by itself, and counts as one that reads texts.
    """
    asked = {"role": "user", "content": _SAID}
    forms: dict[Form, dict[str, Any]] = {"text": asked, "parts": _in_parts(asked)}
    refused = False
    for form, message in forms.items():
        try:
            shown = tokenizer.apply_chat_template([message], tokenize=False)
        except Exception:  # jinja's, and whatever a template trips over
            refused = True
            continue
        if _SAID in shown.lower():
            return form
    return "text" if refused else None


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **given: Any) -> Any:
    """``tokenizer.apply_chat_template``, with contents in the form that the template reads.

    Raises:
        Exception: Whatever the template raises.
    """
    if content_form(tokenizer) == "parts":
        messages = list(map(_in_parts, messages))
    return tokenizer.apply_chat_template(list(messages), **given)


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
