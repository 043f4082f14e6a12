"""The words of a text, in any script: what lessons, rules of labels and demos are compared by.

Chinese, Japanese, Thai and others are written without spaces. What stands between two spaces there
is no word: of such a run each character counts as one, or each two neighbours, where a word is to
say something by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0eff\u1000-\u109f\u1780-\u17d3"  # Thai to Khmer
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_LETTER = rf"[^\W{_UNSPACED}]"
_COMPARISON = r"(?:<=|>=|!=|[<>])"
TOKEN = re.compile(
    rf"(?P<run>[{_UNSPACED}]+)"
    # Symbols that belong to a word, as in C++, .NET and -5; no ends of sentences.
    rf"|(?:(?<!\S)(?:[#@](?=[^\W\d])|\.(?=\w))|(?<![\w)\]-])-(?=\d))?"
    rf"{_LETTER}+(?:['’.-]{_LETTER}+)*(?:(?<=[^\W\d])[+#]+(?!\w))?"
    # Those of numbers count for themselves: who names 5% names the 5.
    r"|[$€£¥](?=\d)|(?<=\d)[+%°](?!\w)"
    # Comparisons, but no arrows and no tags: of two values, or with a number.
    rf"|[≤≥≠]|(?<=[\w)%] ){_COMPARISON}(?= [\w$€£¥.(-])"
    rf"|(?<![-=<>]){_COMPARISON}(?=\s?[-+.$€£¥]?\d)"
)
_CHARACTER = re.compile(r"\w\W*|\W+")
"""A character with the marks on it, which are no letters by themselves."""
_UNSPACED_CHARACTER = re.compile(rf"[{_UNSPACED}]")


def words(text: str) -> list[str]:
    """A text's words in lower case, in their order; comparisons such as ``<`` are among them."""
    found: list[str] = []
    for match in TOKEN.finditer(text.lower()):
        found += _CHARACTER.findall(match[0]) if match["run"] else [match[0]]
    return found


def telling_words(text: str) -> list[str]:
    """A text's words, such as one alone can tell what the text is about.

    That are two neighbouring characters of scripts without spaces, and no comparisons.
    """
    found: list[str] = []
    for match in TOKEN.finditer(text.lower()):
        pairs = ["".join(two) for two in pairwise(_CHARACTER.findall(match["run"] or ""))]
        found += pairs or [match[0]]
    return [word for word in found if re.search(r"\w", word)]


@lru_cache(maxsize=1024)  # an input's text is compared with every sentence about it
def key_of(text: str) -> str:
    """A text's words in lower case: texts with equal keys say the same."""
    return " ".join(words(text))


def holds(key: str, part: str) -> bool:
    """Whether one key has all words of another in a row; none has those of an empty one."""
    return bool(part) and f" {part} " in f" {key} "


def blanked(key: str, parts: Iterable[str]) -> str:
    """A key with ``_`` where it has all words of another in a row."""
    inside = f" {key} "
    for part in parts:
        inside = inside.replace(f" {part} ", " _ ")
    return inside.strip()


def length(text: str) -> int:
    """How many words a text has, of scripts without spaces one for every two characters."""
    return len(text.split()) + len(_UNSPACED_CHARACTER.findall(text)) // 2
