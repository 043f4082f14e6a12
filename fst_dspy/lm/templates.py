"""A model's chat template: what it can say, found out by trying, and conversations put through it.

Nothing goes by a model's name. A template that refuses a system message gets its text in front of
the first user's; one that wants turns to alternate gets those of one role as one; what a template
drops in silence (tools, a system message) counts as refused.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from fst_dspy.errors import ConfigError
from fst_dspy.model.endings import special_pattern
from fst_dspy.model.policy import Policy
from fst_dspy.pretrained.chat import apply_template, once_a_template

logger = logging.getLogger(__name__)

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates switch thoughts on and off."""
EFFORT = "reasoning_effort"
"""The variable of templates that know how much is to be thought."""
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
"""Names that ``apply_chat_template`` takes for itself."""

_MARK = re.compile(r"<(/)((?:\w+:)?(?:think|thinking|thought|reasoning))>|\[(/)(THINK|THINKING)\]")
_A, _B = "zebra crossing", "violet lantern"
_NAME = "quiet_harbour"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
# Of models whose template TRL does not know. Each call is an object, or a list of objects.
_TOOL_SYNTAX: dict[str, dict[str, Any]] = {
    "[ARGS]": {
        "open_pattern": r"\[TOOL_CALLS\]\s*(?P<name>[^\s\[]+)\s*\[ARGS\]",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "repeats": True,
        "content": "json",
        "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
    },
    "[TOOL_CALLS]": {"open": "[TOOL_CALLS]", "content": "json"},
    "<|tool_call|>": {
        "open": "<|tool_call|>",
        "close_pattern": r"<\|/tool_call\|>",
        "content": "json",
    },
    "<tool_call>": {
        "open": "<tool_call>",
        "close_pattern": r"</tool_call>\s*",
        "repeats": True,
        "content": "json",
    },
}


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template can say.

    Attributes:
        takes_system: Whether it shows a system message.
        takes_more_system: Whether it shows others behind the first, at their places.
        takes_turns: Whether it shows what was said before the last question, such as demos.
        alternates: Whether it refuses two messages of one role, one after the other.
        thought: The marks around a thought; ``None`` where it names none.
        between: What stands between a thought and the closing mark, where every answer begins with
            that mark, whether the model has thought or not; else empty.
        switch: The variable that switches thoughts on and off; ``None`` without one.
        syntax: How an answer is read, for transformers' ``parse_response``, where that is known.
        tools: Whether it shows tools, calls and results, and calls can be read.
        takes_effort: Whether it knows ``reasoning_effort``.
    """

    takes_system: bool
    takes_more_system: bool
    takes_turns: bool
    alternates: bool
    thought: tuple[str, str] | None
    between: str
    switch: str | None
    syntax: Mapping[str, Any] | None
    tools: bool
    takes_effort: bool


@dataclass(frozen=True)
class Prompt:
    """A conversation as chat templates take it, as JSON, so that it can be a key.

    Attributes:
        messages: Of dicts with a role, content and what else the role has.
        tools: Of functions, in OpenAI's form.
        options: More variables of the template, by name.
    """

    messages: str
    tools: str = "[]"
    options: str = "{}"

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """From plain values."""
        return cls(json.dumps(list(messages)), json.dumps(list(tools)), json.dumps(options or {}))


@dataclass
class _Tried:
    """What has been found out about a tokenizer's template, and what was said of it."""

    format: ChatFormat
    thinks: dict[str, bool] = field(default_factory=dict)
    told: bool = False


def chat_format(tokenizer: Any) -> ChatFormat:
    """What a tokenizer's chat template can say; it is tried once."""
    return _known(tokenizer).format


def render(tokenizer: Any, prompt: Prompt, **how: Any) -> Any:
    """A conversation put through a chat template, once it is what the template takes.

    Args:
        prompt: The conversation.
        how: For ``apply_chat_template``, such as ``tokenize``.

    Raises:
        Exception: Whatever the template raises.
    """
    known = _known(tokenizer)
    messages = json.loads(prompt.messages)
    fitted = _fitted(messages, known.format)
    if fitted != messages and not known.told:
        known.told = True
        logger.warning(
            "the chat template takes no %s: %s",
            _refused(known.format),
            "its text goes in front of a user's message, and messages of one role become one",
        )
    return _apply(tokenizer, fitted, json.loads(prompt.tools), json.loads(prompt.options), **how)


def tokens_of(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of a conversation, up to where the answer begins.

    What looks like a special token within a message is text, as it is to hosted models: a mail that
    has "<|im_end|>" in it would end its turn, and could go on in another role.

    Raises:
        Exception: Whatever the template raises.
    """
    messages = json.loads(prompt.messages)
    apart = [{**m, "content": _taken_apart(tokenizer, m["content"])} for m in messages]
    if apart != messages:
        marked = replace(prompt, messages=json.dumps(apart))
        how = {"add_generation_prompt": True, "tokenize": False}
        first, *others = render(tokenizer, marked, **how).split(_APART)
        if "".join((first, *others)) == render(tokenizer, prompt, **how):
            ids = _plain_ids(tokenizer, first)
            return ids + [token for text in others for token in _ids_within(tokenizer, text)]
    return list(render(tokenizer, prompt, add_generation_prompt=True, tokenize=True))


_APART = "\ufdd0\ufdd1"
"""Of characters that Unicode keeps out of texts: where one is cut."""


def _taken_apart(tokenizer: Any, text: str) -> str:
    """A text, cut within all that a tokenizer would read as a special token."""

    def apart(found: re.Match[str]) -> str:
        token = found[0]
        return token if len(token) == 1 else token[0] + _APART + token[1:]

    return special_pattern(tokenizer).sub(apart, text)


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids_within(tokenizer: Any, text: str) -> list[int]:
    """Without the space that tokenizers such as Llama 2's put in front of a text."""
    line, both = _plain_ids(tokenizer, "\n"), _plain_ids(tokenizer, f"\n{text}")
    return both[len(line) :] if both[: len(line)] == line else _plain_ids(tokenizer, text)


def generation_prompt(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """What the template puts in front of an answer to a short question."""
    return str(
        _apply(
            tokenizer,
            [{"role": "user", "content": _A}],
            [],
            options,
            tokenize=False,
            add_generation_prompt=True,
        )
    )


def thinks(tokenizer: Any, options: Mapping[str, Any]) -> bool:
    """Whether the model is asked to think before it answers.

    It is where the template opens a thought, or where a variable of the template would switch
    thoughts off and has not.
    """
    known = _known(tokenizer)
    key = json.dumps(options, sort_keys=True)
    if key not in known.thinks:
        known.thinks[key] = _find_thinks(tokenizer, known.format, options)
    return known.thinks[key]


def check_options(policy: Policy, options: Any) -> dict[str, Any]:
    """The variables that a user sets of a chat template.

    Raises:
        ConfigError: They are no dict of plain values, or the template does not read one of them:
            it would be dropped in silence.
    """
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ConfigError(
            f"chat_template_kwargs must be a dict, such as {{'enable_thinking': False}}, got "
            f"{options!r:.80}"
        )
    try:
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"chat_template_kwargs must hold plain values: {error}") from error
    template = str(policy.tokenizer.chat_template)
    for name in options:
        if name in RESERVED or not _reads(template, name):
            switch = chat_format(policy.tokenizer).switch
            raise ConfigError(
                f"the chat template of {policy.name} has no {name!r} to be set in "
                f"chat_template_kwargs"
                + (f"; it has {switch!r}" if switch else "; leave it out for this model")
            )
    return dict(options)


@once_a_template
def _known(tokenizer: Any) -> _Tried:
    return _Tried(_find_format(tokenizer))


def _find_format(tokenizer: Any) -> ChatFormat:
    template = str(tokenizer.chat_template)
    user, answer = {"role": "user", "content": _A}, {"role": "assistant", "content": _B}
    system = {"role": "system", "content": _B}
    first, said = {"role": "system", "content": _NAME}, {"role": "assistant", "content": _A}
    systems = [first, user, said, system, user]
    turns = [user, answer, {"role": "user", "content": _NAME}]
    syntax = _syntax(tokenizer, template)
    has_calls = syntax is not None and "tool_calls" in syntax["fields"]
    marks = _find_marks(template)
    thought, between = (marks, "") if marks is not None else _tried_marks(tokenizer)
    return ChatFormat(
        takes_system=_shows(tokenizer, [system, user], _B),
        takes_more_system=all(_shows(tokenizer, systems, text) for text in (_NAME, _B)),
        takes_turns=all(_shows(tokenizer, turns, text) for text in (_A, _B)),
        alternates=_shows(tokenizer, [user, answer], _A)
        and not _shows(tokenizer, [user, user, answer], _A),
        thought=thought,
        between=between,
        switch=next((name for name in SWITCHES if _switches(tokenizer, template, name)), None),
        syntax=syntax,
        tools=has_calls and _shows(tokenizer, [user], _NAME, [_TOOL]) and _takes_calls(tokenizer),
        takes_effort=_reads(template, EFFORT),
    )


def _find_marks(template: str) -> tuple[str, str] | None:
    found = _MARK.search(template)
    return (found.group().replace("/", ""), found.group()) if found is not None else None


def _tried_marks(tokenizer: Any) -> tuple[tuple[str, str] | None, str]:
    """The marks, and what is between, by what a thought adds to a turn that the template shows."""
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _NAME)
    asked = {"role": "user", "content": _A}
    said: dict[str, Any] = {"role": "assistant", "content": _B}
    calls: dict[str, Any] = {**said, "content": "", "tool_calls": [call_of("q4x8r2m6k", "say", {})]}
    for turn in (said, calls):  # some show a thought with calls alone
        turns = [[asked, turn], [asked, turn | thought]]
        try:
            head = generation_prompt(tokenizer, {})
            plain, shown = (_apply(tokenizer, each, [], {}, tokenize=False) for each in turns)
        except Exception:  # jinja's, and whatever a template trips over
            continue
        if not (plain.startswith(head) and shown.startswith(head) and _NAME in shown):
            continue
        opening, _, behind = shown.removeprefix(head).partition(_NAME)
        plain = plain.removeprefix(head)
        closing, header = behind[: len(behind) - _alike_at_end(behind, plain)], ""
        if turn is said:
            closing, header = (text.partition(_B)[0].strip() for text in (behind, plain))
        opening, closing = opening.strip(), closing.strip()
        if header and closing.endswith(header):
            return (opening, header), closing.removesuffix(header)
        if opening and closing:
            return (opening, closing), ""
    return None, ""


def _alike_at_end(one: str, other: str) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _reads(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _switches(tokenizer: Any, template: str, name: str) -> bool:
    try:
        both = {generation_prompt(tokenizer, {name: on}) for on in (True, False)}
    except Exception:
        return False
    return _reads(template, name) and len(both) == 2


def _find_thinks(tokenizer: Any, found: ChatFormat, options: Mapping[str, Any]) -> bool:
    if found.thought is None and thought_field(found) is None:
        return False
    shown = generation_prompt(tokenizer, options)
    if found.thought is not None and shown.rstrip().endswith(found.thought[0]):
        return True
    if found.switch is None:
        return found.takes_effort or bool(found.between)
    return shown != generation_prompt(tokenizer, {**options, found.switch: False})


def cut_thought_advice(tokenizer: Any) -> str:
    """What to do where answers do not come, for their thoughts are cut off."""
    switch = chat_format(tokenizer).switch
    off = f", or set LocalLM(..., chat_template_kwargs={{{switch!r}: False}})" if switch else ""
    return f"in the middle of its thought; raise max_tokens{off}"


def thought_field(found: ChatFormat) -> str | None:
    """The name under which ``parse_response`` gives a thought."""
    fields = found.syntax["fields"] if found.syntax is not None else ()
    return next((name for name in ("reasoning_content", "thinking") if name in fields), None)


def _takes_calls(tokenizer: Any) -> bool:
    """Whether calls and their results are shown, which many templates drop in silence."""
    number = "q4x8r2m6k"  # nine letters and digits, as Mistral's wants them
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call_of(number, _NAME, {"a": _A})]},
        {"role": "tool", "name": _NAME, "tool_call_id": number, "content": _B},
    ]
    return all(_shows(tokenizer, turns, wanted) for wanted in (_NAME, _A, _B))


def call_of(number: str, name: str, arguments: Any) -> dict[str, Any]:
    """A tool call as chat templates take it."""
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def _syntax(tokenizer: Any, template: str) -> Mapping[str, Any] | None:
    """How answers are read: as the tokenizer says, or TRL for its template, or by marks in it."""
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return own if isinstance(own, Mapping) else None
    if not ("tool" in template or "reason" in template or "think" in template):
        return None
    from trl.chat_template_utils import add_response_schema

    try:
        # On a copy: what is set on a tokenizer is saved with it.
        return dict(add_response_schema(copy.copy(tokenizer)).response_template)
    except ValueError:  # not among those that TRL knows
        pass
    mark = next((mark for mark in _TOOL_SYNTAX if mark in template), None)
    if mark is None:
        return None
    call = dict(_TOOL_SYNTAX[mark])
    # Some close what they call with the end of the answer.
    ends = [call["close_pattern"]] if "close_pattern" in call else []
    ends += [re.escape(tokenizer.eos_token)] if tokenizer.eos_token else []
    call["close_pattern"] = "|".join([*ends, "$"])
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "\0",
        "fields": {"tool_calls": call, "content": {"content": "text"}},
    }


def _shows(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    wanted: str,
    tools: Sequence[Mapping[str, Any]] = (),
) -> bool:
    try:
        shown = _apply(tokenizer, messages, tools, {}, tokenize=False)
    except Exception:  # jinja's, and whatever a template trips over
        return False
    return wanted in shown


def _refused(found: ChatFormat) -> str:
    if not found.takes_system:
        return "system message"
    if not found.takes_turns:
        return "turns before the last one"
    return "two messages of a role in turn" if found.alternates else "second system message"


def _fitted(messages: list[dict[str, Any]], found: ChatFormat) -> list[dict[str, Any]]:
    if not found.takes_system:
        texts = [m["content"] for m in messages if m["role"] == "system"]
        messages = [m for m in messages if m["role"] != "system"]
        if texts:
            place = next((n for n, m in enumerate(messages) if m["role"] == "user"), None)
            if place is None:
                messages = [{"role": "user", "content": ""}, *messages]
                place = 0
            first = messages[place]
            joined = "\n\n".join(text for text in (*texts, first["content"]) if text)
            messages = [*messages]
            messages[place] = {**first, "content": joined}
    elif not found.takes_more_system:
        texts = [m["content"] for m in messages if m["role"] == "system"]
        if texts:
            rest = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *rest]
    called = any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
    if not (found.takes_turns or called):
        said = [m for m in messages if m["role"] != "system"]
        if len(said) > 1 and said[-1]["role"] == "user":
            text = "\n\n".join(filter(None, (m["content"] for m in said)))
            return [*(m for m in messages if m["role"] == "system"), {**said[-1], "content": text}]
    if found.alternates:
        merged: list[dict[str, Any]] = []
        for message in messages:
            same = bool(merged) and merged[-1]["role"] == message["role"] != "tool"
            if same and not message.get("tool_calls") and not merged[-1].get("tool_calls"):
                text = "\n\n".join((merged[-1]["content"], message["content"]))
                merged[-1] = {**merged[-1], "content": text}
            else:
                merged.append(message)
        messages = merged
    return messages


def _apply(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    **how: Any,
) -> Any:
    given = {**options, **how, "tools": list(tools) or None}
    if how.get("tokenize"):
        given["return_dict"] = False
    try:
        return apply_template(tokenizer, messages, **given)
    except TypeError:
        # Some templates put a call's arguments into a text as they are (transformers issue 45419).
        if not any(message.get("tool_calls") for message in messages):
            raise
        return apply_template(tokenizer, _with_written_arguments(messages), **given)


def _with_written_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    written = []
    for message in messages:
        calls = [
            call_of(c["id"], c["function"]["name"], json.dumps(c["function"]["arguments"]))
            for c in message.get("tool_calls", ())
        ]
        written.append({**message, "tool_calls": calls} if calls else message)
    return written
