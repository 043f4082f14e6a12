"""What a local model said, taken apart: the thought, the answer's text, and calls of tools."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy import lm15

from fst_dspy.lm.templates import chat_format, thought_field
from fst_dspy.model.endings import End, cut_before, special_pattern
from fst_dspy.model.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer in its parts.

    Attributes:
        text: Without the thought and without calls.
        thought: ``None`` where there is none.
        calls: Name and arguments of each.
        in_thought: Whether it ends in the middle of the thought.
    """

    text: str
    thought: str | None = None
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    in_thought: bool = False


def read_answer(
    policy: Policy,
    prompt_ids_T: Sequence[int],
    completion_ids_T: Sequence[int],
    text: str,
    *,
    stop: Sequence[str] = (),
    end: End | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Answer:
    """Take a completion apart.

    Args:
        policy: Who said it.
        prompt_ids_T: To what; a template may have opened the thought there.
        completion_ids_T: The tokens, marks and calls included, which may be special ones.
        text: The same as text, which it is where nothing is marked.
        stop, end: What the text has been cut at.
        tools: That the model was shown, in OpenAI's form.

    Returns:
        The parts. A call that cannot be read stays in the text.
    """
    tokenizer, found = policy.tokenizer, chat_format(policy.tokenizer)
    if not tools and found.thought is None and thought_field(found) is None:
        return Answer(text)
    opened = opens_thought(policy, prompt_ids_T)
    raw = cut_before(tokenizer.decode(completion_ids_T), stop, found.thought, opened)
    if end is not None:
        raw = end.cut(raw)
    if found.thought is not None and opened:
        raw = found.thought[0] + raw
    if found.syntax is not None and (tools or found.thought is None):
        parsed = _parsed(tokenizer, found.syntax, raw, tools)
        if parsed is not None:
            said, thought, calls = parsed
            body = said if not calls else _without_special(policy, said).strip()
            if calls or found.thought is None:
                cut_off = thought is not None and not said and not calls
                return Answer(_without_special(policy, body), thought, calls, cut_off)
    if found.thought is None:
        return Answer(text)
    return _split(policy, raw, found.thought, found.between)


def opens_thought(policy: Policy, prompt_ids_T: Sequence[int]) -> bool:
    """Whether a prompt ends in an open thought."""
    marks = chat_format(policy.tokenizer).thought
    if marks is None:
        return False
    tail = policy.tokenizer.decode(list(prompt_ids_T[-16:]))
    return bool(tail.rstrip().endswith(marks[0]))


def ends_in_thought(
    policy: Policy, prompt_ids_T: Sequence[int], completion_ids_T: Sequence[int]
) -> bool:
    """Whether a completion has been cut off before its thought came to an end."""
    text = policy.tokenizer.decode(list(completion_ids_T), skip_special_tokens=True)
    return read_answer(policy, prompt_ids_T, completion_ids_T, text).in_thought


def fills_context(
    policy: Policy, prompt_ids_T: Sequence[int], completion_ids_T: Sequence[int]
) -> bool:
    """Whether an answer came to its end as there was no room for more, whatever ``max_tokens``."""
    return len(prompt_ids_T) + len(completion_ids_T) >= policy.context_length


def tool_call_parts(
    prompt_ids_T: Sequence[int], calls: Sequence[tuple[str, Mapping[str, Any]]]
) -> Iterator[lm15.ToolCallPart]:
    """Calls as lm15 has them, with ids of nine letters and digits, which all templates take."""
    for number, (name, arguments) in enumerate(calls):
        key = json.dumps([list(prompt_ids_T), number, name, arguments], default=str)
        digest = hashlib.sha256(key.encode()).hexdigest()[:9]
        yield lm15.ToolCallPart(digest, name, dict(arguments))


def _parsed(
    tokenizer: Any, syntax: Mapping[str, Any], raw: str, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, str | None, tuple[tuple[str, Mapping[str, Any]], ...]] | None:
    """Text, thought and calls by transformers' ``parse_response``; ``None`` where it fails."""
    try:
        # The whole answer is given, so that nothing of the prompt is needed.
        message = tokenizer.parse_response(raw, dict(syntax), prefix="", tools=list(tools) or None)
        calls = tuple(_calls(message.get("tool_calls")))
    except (ValueError, TypeError, KeyError) as error:
        logger.debug("an answer cannot be taken apart: %s", error)
        return None
    names = ("reasoning_content", "thinking")
    thought = next((message[name] for name in names if message.get(name)), None)
    return message.get("content") or "", thought, calls


def _calls(found: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for item in found or ():
        if isinstance(item, list):
            yield from _calls(item)
            continue
        call = item.get("function", item)
        if isinstance(call, list):
            yield from _calls(call)
            continue
        name, arguments = call["name"], call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments or {}, Mapping):
            raise ValueError(f"no call of a tool: {call!r:.80}")
        yield name, arguments or {}


def _split(policy: Policy, raw: str, marks: tuple[str, str], between: str) -> Answer:
    opening, closing = marks
    before, closed, behind = raw.partition(closing)
    if not closed and not before.lstrip().startswith(opening):
        return Answer(_without_special(policy, raw))
    before = before.lstrip().removeprefix(opening).removesuffix(between)
    thought = _without_special(policy, before).strip()
    text = _without_special(policy, behind).lstrip("\n")
    return Answer(text, thought or None, in_thought=not closed)


def _without_special(policy: Policy, text: str) -> str:
    return special_pattern(policy.tokenizer).sub("", text)
