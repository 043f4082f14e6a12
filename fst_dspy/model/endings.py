"""Where a completion ends: end tokens, stop strings, and the marker that closes an answer."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fst_dspy.model.policy import Policy
from fst_dspy.pretrained.chat import apply_template, once_a_template

_PROBE = "zebra crossing"


def eos_ids(policy: Policy) -> set[int]:
    """Every token that ends a completion: the model's, its generation settings', the tokenizer's.

    Beside these the token that the chat template puts behind an answer: where the files came
    without generation settings, nothing else names it. Those that the model cannot say are left
    out: a configuration's default may be of another vocabulary.
    """
    model = policy.model
    known = model.get_output_embeddings().weight.shape[0]
    found: set[int] = set()
    for value in (
        model.generation_config.eos_token_id if model.generation_config else None,
        model.config.get_text_config().eos_token_id,
        policy.tokenizer.eos_token_id,
        _turn_end(policy.tokenizer),
    ):
        found |= {value} if isinstance(value, int) else set(value or ())
    return {token for token in found if 0 <= token < known}


@once_a_template
def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer, if it puts one there."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        whole = apply_template(tokenizer, turns, tokenize=False)
    except Exception:  # a template that takes no such chat tells nothing
        return None
    _, found, behind = whole.rpartition(_PROBE)
    behind = behind.strip() if found else ""
    first = tokenizer(behind, add_special_tokens=False)["input_ids"][:1] if behind else []
    return first[0] if first and first[0] in special_tokens(tokenizer).values() else None


@dataclass(frozen=True)
class _Special:
    """What is known of a tokenizer of some size; some have thousands of special tokens."""

    size: int
    ids: dict[str, int]
    pattern: re.Pattern[str]


_special: weakref.WeakKeyDictionary[Any, _Special] = weakref.WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that are no text, which decoding leaves out, with their ids.

    Beside those that the tokenizer has a name for, as its end token, these are what its files mark
    so: most templates' marks of turns, Gemma's and Phi's end of an answer among them.
    """
    return _special_of(tokenizer).ids


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds ``special_tokens`` in a text, of several at one place the longest."""
    return _special_of(tokenizer).pattern


def _special_of(tokenizer: Any) -> _Special:
    size, known = len(tokenizer), _special.get(tokenizer)
    if known is None or known.size != size:
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        marked = tokenizer.added_tokens_decoder.items()
        found = {**dict(named), **{token.content: n for n, token in marked if token.special}}
        ids = {token: n for token, n in found.items() if token}
        any_of = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        known = _special[tokenizer] = _Special(size, ids, re.compile(any_of or "(?!)"))
    return known


class Ended(Protocol):
    """What is asked of a request here; see ``fst_dspy.model.generate.GenerationRequest``."""

    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def end(self) -> End | None: ...
    @property
    def thought(self) -> tuple[str, str] | None: ...
    @property
    def opened(self) -> bool: ...


def answer_at(text: str, thought: tuple[str, str] | None, opened: bool) -> int | None:
    """Where the answer begins in a completion's text; ``None`` in the middle of the thought.

    Args:
        thought: The marks around a thought; ``None`` where the model has none.
        opened: Whether the prompt has opened the thought already.
    """
    if thought is None:
        return 0
    opening, closing = thought
    closed = text.find(closing)
    if closed >= 0:
        return closed + len(closing)
    return None if opened or text.lstrip().startswith(opening) else 0


@dataclass(frozen=True)
class End:
    """A line that closes an answer: what is sampled behind it is no part of it.

    One token more is sampled and kept, untold: a model that ends there by itself says so with an
    end token, and goes on learning to.

    Attributes:
        marker: What the line begins with, not empty.
        thought, opened: As for ``answer_at``; in a thought the marker means nothing.
        count: The how many-th such line it is; those before it are headers of fields.
    """

    marker: str
    thought: tuple[str, str] | None = None
    opened: bool = False
    count: int = 1

    def place(self, text: str) -> int | None:
        """The place in a completion's text behind the marker; ``None`` where it is not there."""
        start, left = answer_at(text, self.thought, self.opened), self.count
        if start is None:
            return None
        while (at := text.find(self.marker, start)) >= 0:
            line = text.rfind("\n", 0, at) + 1
            left -= not text[max(line, start) : at].strip()
            if left == 0:
                return at + len(self.marker)
            start = at + 1
        return None

    def cut(self, text: str) -> str:
        """A completion's text up to the marker's end; white space behind it may stay."""
        place = self.place(text)
        return text if place is None or not text[place:].strip() else text[:place]


def kept_tokens(tokenizer: Any, ids_T: Sequence[int], end: End | None) -> int:
    """How many tokens of a row are its completion: up to the one behind the closing line."""
    high = len(ids_T) - 1
    if end is None or high < 1 or end.place(tokenizer.decode(ids_T[:-2])) is None:
        return len(ids_T)
    return _fewest(tokenizer, ids_T, high, lambda text: end.place(text) is not None) + 1


def stopped_tokens(tokenizer: Any, ids_T: Sequence[int], request: Ended) -> int:
    """How many tokens of a row are its completion: up to the one that completes a stop string."""
    if not request.stop or not is_stopped(tokenizer.decode(ids_T), request):
        return len(ids_T)
    return _fewest(tokenizer, ids_T, len(ids_T), lambda text: is_stopped(text, request))


def _fewest(tokenizer: Any, ids_T: Sequence[int], high: int, ends: Callable[[str], bool]) -> int:
    """The fewest tokens, at most ``high``, in whose text there is an end."""
    low = 1
    while low < high:
        middle = (low + high) // 2
        if ends(tokenizer.decode(ids_T[:middle])):
            high = middle
        else:
            low = middle + 1
    return high


_closing: weakref.WeakKeyDictionary[Any, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def closing_tokens(tokenizer: Any, marker: str, size: int) -> Tensor:
    """Which of ``size`` tokens may complete a marker: bool, (size,).

    To look at the text of these alone spares a decoding of every row after every token.
    """
    known = _closing.setdefault(tokenizer, {})
    key = f"{size} {marker}"
    if key not in known:
        last = marker[-1]
        parts = (last, f"<0x{ord(last):02X}>") if last.isascii() else ("",)
        tokens = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        may = [token is not None and any(part in token for part in parts) for token in tokens]
        known[key] = torch.tensor(may + [False] * (size - len(may)))
    return known[key]


def cut_before(
    text: str, stop: Sequence[str], thought: tuple[str, str] | None, opened: bool
) -> str:
    """A completion's text up to the first of some strings in its answer."""
    start = answer_at(text, thought, opened)
    if start is None:
        return text
    found = [text.find(string, start) for string in stop]
    return text[: min((place for place in found if place >= 0), default=len(text))]


def is_stopped(text: str, request: Ended) -> bool:
    """Whether a completion's text has a stop string in its answer."""
    return cut_before(text, request.stop, request.thought, request.opened) != text


def texts_of(
    policy: Policy, ids_BT: Sequence[Sequence[int]], requests_B: Sequence[Ended]
) -> list[str]:
    """Completions as text: without special tokens, cut before a stop string, behind the marker."""
    texts = policy.tokenizer.batch_decode(
        ids_BT, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    texts = [
        cut_before(text, request.stop, request.thought, request.opened)
        for text, request in zip(texts, requests_B, strict=True)
    ]
    ends = [request.end for request in requests_B]
    return [text if end is None else end.cut(text) for text, end in zip(texts, ends, strict=True)]
