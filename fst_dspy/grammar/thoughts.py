"""What may stand before an answer that is held to a grammar: line ends, and a thought.

The marks of a thought are looked for in the text of the tokens, as whoever reads the answer looks
for them. Many tokenizers have no token for them, and then no one way to write them: ``.</`` may be
one token, and so may ``>`` with the white space behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MOST_BLANK = 4
"""Tokens of line ends alone that may stand before an answer, or a model could go on with them."""


class Pieces:
    """The texts of a vocabulary's tokens, and which of them go with the marks of thoughts.

    Args:
        texts_V: Of all tokens that end no answer; empty for those that do.
        words: Numbers of 32 bits that a mask takes.
    """

    def __init__(self, texts_V: Sequence[bytes], words: int) -> None:
        self.texts_V, self._whole = texts_V, frozenset(texts_V)
        self._words = words
        self._known: dict[tuple[str, bytes, bytes], np.ndarray] = {}

    def opening(self, mark: bytes, begun: bytes) -> np.ndarray:
        """The tokens that go on with a mark of which a part is there, or line ends before it.

        Other white space may only be in a token with the mark: ChatAdapter reads no answer that
        has any in front of a header.
        """
        key = ("opening", mark, begun)
        return self._packed(key, lambda text: self._opens(mark, begun, text))

    def blank(self) -> np.ndarray:
        """The tokens of line ends alone, packed."""
        return self._packed(("blank", b"", b""), _is_blank)

    def none(self) -> np.ndarray:
        """No token, packed."""
        return np.zeros(self._words, dtype=np.int32)

    def _opens(self, mark: bytes, begun: bytes, text: bytes) -> bool:
        if not text.strip():
            return not begun and _is_blank(text)
        said = begun + text if begun else text.lstrip()
        return said.startswith(mark) or self.may_become(mark, said)

    def may_become(self, mark: bytes, said: bytes) -> bool:
        """Whether a text is a part of a mark; where the mark is a token, it is written so alone.

        Else a model that begins with ``<`` for another reason would be made to think.
        """
        return not said or (mark.startswith(said) and mark not in self._whole)

    def inside(self, mark: bytes, begun: bytes) -> np.ndarray:
        """The tokens that a thought may have where a part of its closing mark is there, packed.

        These are all but those that end the answer, or have more than white space behind the mark:
        it would be a part of the answer that no grammar has seen.
        """
        return self._packed(
            ("inside", mark, begun),
            lambda text: bool(text) and not (begun + text).partition(mark)[2].strip(),
        )

    def _packed(self, key: tuple[str, bytes, bytes], may: Callable[[bytes], bool]) -> np.ndarray:
        """The tokens whose text may follow, one bit each; kept by the key."""
        if key not in self._known:
            bits = np.zeros(self._words * 32, dtype=bool)
            bits[: len(self.texts_V)] = [may(text) for text in self.texts_V]
            self._known[key] = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
        return self._known[key]


class Lead:
    """What stands before one answer, token by token: a thought or none, and line ends around it.

    Args:
        pieces: The vocabulary's.
        marks: Around a thought.
        opened: Whether the prompt has opened it already; else what is said first decides.

    Attributes:
        inside: The thought is open.
        closed: It has been; no other may follow.
        blank: Nothing but white space has been said, since the thought was closed if it was.
        first: What the token before said behind such white space in itself, else empty.
        over: What may stand before the answer has come to its end, by a text that begins no
            thought.
        clean: Nothing of the answer was in the token that closed the thought.
    """

    def __init__(self, pieces: Pieces, marks: tuple[str, str], opened: bool) -> None:
        self._pieces = pieces
        self._opening, self._closing = (mark.encode() for mark in marks)
        self._begun = b""
        self._blanks = 0
        self.inside, self.blank, self.over, self.clean = opened, True, False, True
        self.closed, self.first = False, b""

    @property
    def bits(self) -> np.ndarray:
        """The tokens with which it may go on, packed."""
        if self.inside:
            return self._pieces.inside(self._closing, self._begun)
        enough = self._blanks >= MOST_BLANK
        if self.closed:
            return self._pieces.none() if enough else self._pieces.blank()
        bits = self._pieces.opening(self._opening, self._begun)
        return bits & ~self._pieces.blank() if enough else bits

    def take(self, token: int) -> None:
        """Take a token of it, or the first of what it is not."""
        said = self._begun + self._pieces.texts_V[token]
        if not self.inside:
            white, said = said, said.lstrip()
            self.first = said if said != white else b""
            self.blank = self.blank and not said
            self._blanks += self.blank
            if self.closed:
                self.over = bool(said)
                return
            self.inside = said.startswith(self._opening)
            self._begun = said
            if not self.inside:
                self.over = not self._pieces.may_become(self._opening, said)
                return
            said = said[len(self._opening) :]
        _, closing, behind = said.partition(self._closing)
        if closing:
            self.inside, self.closed, self.blank, self._blanks = False, True, True, 0
            self.clean, self._begun = not behind.strip(), b""
        else:
            self._begun = _begun(self._closing, said)


def _is_blank(text: bytes) -> bool:
    return bool(text) and not text.strip(b"\n")


def _begun(mark: bytes, said: bytes) -> bytes:
    """The longest end of a text with which a mark begins, but is not whole."""
    ends = (said[-n:] for n in range(min(len(mark) - 1, len(said)), 0, -1))
    return next((end for end in ends if mark.startswith(end)), b"")
