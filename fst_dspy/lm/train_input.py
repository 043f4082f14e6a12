"""What DSPy hands its training providers: data and settings, checked, and conversations as tokens.

DSPy gives messages and the text of the answer, rendered again from parsed fields. The tokens that
were sampled are gone, so the answer is tokenised anew, to begin and end as a sampled one would.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy.clients.utils_finetune import TrainDataFormat

from fst_dspy.config import as_lora
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.lm.requests import encode
from fst_dspy.lm.templates import Prompt, render
from fst_dspy.model.endings import eos_ids
from fst_dspy.model.policy import Policy

ROLES = ("system", "user", "assistant")
_OTHER = "zebra crossing"


@dataclass(frozen=True)
class Turn:
    """One call of the model: the rendered prompt and the answer to learn, as token ids."""

    prompt_ids_T: tuple[int, ...]
    completion_ids_T: tuple[int, ...]


def encode_turn(
    policy: Policy,
    messages: Sequence[Mapping[str, str]],
    answer: str,
    max_length: int,
    options: Mapping[str, Any] | None = None,
) -> Turn | None:
    """The tokens of one call.

    The prompt is rendered as for generation. The answer has the white space in front that the chat
    template puts there, and one end token behind.

    Args:
        policy: Whose tokenizer and chat template are used.
        messages: The prompt, as ``check_messages`` accepts it.
        answer: The assistant's text.
        max_length: Tokens that both may have together, at least 1; the answer is cut to it.
        options: Variables of the chat template.

    Returns:
        The turn, or ``None`` when the prompt alone is that long: there is nothing to learn.
    """
    tokenizer, prompt = policy.tokenizer, [dict(message) for message in messages]
    ids = encode(policy, Prompt.of(prompt, options=options))
    room = max_length - len(ids)
    if room < 1:
        return None
    lead, end = _frame(policy, prompt, answer, options)
    answer_ids = tokenizer(lead + answer, add_special_tokens=False)["input_ids"] + end
    return Turn(tuple(ids), tuple(answer_ids[:room])) if answer_ids else None


def check_format(train_data: Any, given: Any, wanted: TrainDataFormat) -> None:
    """Raise ``DataError`` where there is no data, or data said to be of another format."""
    if given is not None and given != wanted:
        raise DataError(
            f"train data of format {getattr(given, 'value', given)!r} cannot be used here; "
            f"give {wanted.value!r}"
        )
    if not isinstance(train_data, list) or not train_data:
        raise DataError(
            f"train_data must be a non-empty list, got {train_data!r:.80}; with nothing to learn "
            "from, look at the metric and the adapter"
        )


def check_messages(where: str, messages: Any) -> list[dict[str, str]]:
    """Messages of one call: a non-empty list of ``{"role", "content"}`` with text in both.

    Args:
        where: Names the place in an error message.

    Raises:
        DataError: They are anything else.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} must be a non-empty list of messages, got {messages!r:.80}")
    for position, message in enumerate(messages):
        check_message(f"{where}[{position}]", message)
    return messages


def check_message(where: str, message: Any) -> dict[str, str]:
    """One message; see ``check_messages``."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise DataError(
            f"{where} must be a dict with a role of {', '.join(ROLES)} and a content, "
            f"got {message!r:.80}"
        )
    if not isinstance(message.get("content"), str):
        raise DataError(
            f"the content of {where} must be text, got {message.get('content')!r:.80}; a local "
            "model reads text only"
        )
    return dict(message)


def check_reward(where: str, reward: Any) -> float:
    """A finite number.

    Raises:
        DataError: It is none.
    """
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where} must be a finite number, got {reward!r:.80}")
    return value


def known_settings(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A copy of the settings, ``lora`` made a ``LoraConfig`` or ``None``.

    Raises:
        ConfigError: A name that is not among ``names``; the nearest one is suggested.
    """
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(names))}"
            raise ConfigError(f"unknown setting {name!r} in train_kwargs; {hint}")
    result = dict(settings)
    if "lora" in result:
        result["lora"] = as_lora(result["lora"])
    return result


def field_names(cls: Any) -> list[str]:
    """The names of a dataclass's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def _frame(
    policy: Policy, prompt: list[dict[str, str]], answer: str, options: Mapping[str, Any] | None
) -> tuple[str, list[int]]:
    """What stands around a sampled answer: white space in front of it, an end token behind.

    Both are those of the chat template. Anything else a template puts around past turns, such as an
    empty train of thought or a line break, is not what a model samples, and is left out.
    """
    tokenizer, ends = policy.tokenizer, eos_ids(policy)
    own = tokenizer.eos_token_id
    end = [own] if own in ends else sorted(ends)[:1]
    if not answer:  # of a model that ended at once, as it would have behind another answer
        return "", _frame(policy, prompt, _OTHER, options)[1]
    asked = Prompt.of(prompt, options=options)
    answered = Prompt.of([*prompt, {"role": "assistant", "content": answer}], options=options)
    before = render(tokenizer, asked, add_generation_prompt=True, tokenize=False)
    whole = render(tokenizer, answered, tokenize=False)
    lead, found, behind = whole.removeprefix(before).partition(answer)
    if not whole.startswith(before) or not found or lead.strip():
        return "", end
    first = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    return lead, first if ends.issuperset(first) and first else end
