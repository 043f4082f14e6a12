"""Answers held to a grammar: at each token, which tokens may follow.

The library is llguidance. xgrammar, which was tried beside it, holds to formats as well, but needs
Triton on Linux (280 MB, for nothing that is used here) and cannot say "any text without this
marker", of which DSPy's formats are made. llguidance is one wheel of 3 MB for every Python from 3.9
on Linux, macOS and Windows, and is among vLLM's own backends.

**What is forced.** Where only one text can follow, llguidance gives its tokens as the tokenizer
itself would write them, as far as these cannot change with what comes after it
(``compute_ff_tokens``). Such a run is taken as it is: the policy there is sure, with
log-probability 0 and no gradient. Everywhere else every token that begins a text which may follow
is allowed. Both depend on the tokens before alone, so reading a completion again (``Walk``, from
its beginning) gives the very distributions that it was sampled from.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fst_dspy.errors import ConfigError, ModelError
from fst_dspy.grammar.limits import parser_limits
from fst_dspy.grammar.thoughts import Lead, Pieces
from fst_dspy.types import Grammar

logger = logging.getLogger(__name__)

WORD_BITS = 32
"""Bits of one number of a packed mask."""
ALL = np.int32(-1)
NOT_ALLOWED = "doesn't satisfy the grammar"
"""What llguidance says of a token that may not follow; all its other errors are its own limits."""
FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"})
"""Normalizers that write other texts in place of those that they are given."""
GLUE, SPELLED_GLUE = "\u00ff", "\ue0ff"
"""A byte that no text holds, as byte-level alphabets write it, and a character in its place: some
tokenizers (the embedded model's) put it where a word begins without a space."""


class Vocabulary:
    """A model's tokens, as llguidance looks at them; made once for each model.

    Raises:
        ConfigError: The tokenizer is none of the tokenizers library, or none that llguidance can
            read, or no token ends an answer.

    Attributes:
        size: Tokens; at least as many as the model gives logits.
        words: Numbers of 32 bits that a mask of them takes.
        eos: The tokens that end an answer.
        end: The one of them that ends it where nothing else can follow.
        spell: How texts are spelled for it, and what stands before them; ``None`` for as they are.
    """

    def __init__(self, tokenizer: Any, size: int, eos: Iterable[int]) -> None:
        self.size, self.eos = size, frozenset(eos)
        self.words = -(-size // WORD_BITS)
        if not self.eos:
            raise ConfigError(
                "structured decoding needs a token that ends an answer, and neither the tokenizer "
                "nor the model's settings name one that the model has; give the tokenizer an "
                "eos_token, or set structured=False"
            )
        own = tokenizer.eos_token_id
        self.end = own if own in self.eos else min(self.eos)
        self.spell: Callable[[str, str], str] | None = None
        self._ll = self._tokenizer(tokenizer)
        self._begun: dict[str, Any] = {}
        self._told: set[str] = set()
        self._guard = threading.Lock()
        self.end_bits = np.zeros(self.words, dtype=np.int32)
        for token in self.eos:
            self.end_bits[token // WORD_BITS] |= _bit(token)

    def matcher(self, text: str) -> Any:
        """A matcher at the beginning of a grammar, the caller's own; errors as ``compiled``."""
        return self.compiled(text).deep_copy()

    def compiled(self, text: str) -> Any:
        """A grammar's matcher, of which copies are to be taken; each grammar is compiled once.

        Raises:
            ModelError: llguidance refuses the grammar.
        """
        from llguidance import LLMatcher

        with self._guard:
            if text not in self._begun:
                made = LLMatcher(self._ll, text, log_level=0, limits=parser_limits())
                if made.is_error():
                    raise ModelError(f"llguidance refuses a grammar: {made.get_error()[:500]}")
                self._begun[text] = made
            return self._begun[text]

    @functools.cached_property
    def pieces(self) -> Pieces:
        """The texts of the tokens; made where the model may think first."""
        texts = (b"" if t in self.eos else self._ll.decode_bytes([t]) for t in range(self.size))
        return Pieces(tuple(texts), self.words)

    def tokens_of(self, text: bytes) -> list[int]:
        """A text in tokens."""
        return list(self._ll.tokenize_bytes(text))

    def forget(self, text: str, error: str) -> None:
        """Drop what was made of a grammar that llguidance gave up on; told once for each."""
        with self._guard:
            # Copies of a matcher share its lexer, which stays broken.
            self._begun.pop(text, None)
            if text in self._told:
                return
            self._told.add(text)
        logger.warning(
            "an answer is free from some token on: llguidance gave up on its format (%s); should "
            "many answers not be read, lower max_length, leave pattern out, or give a Literal "
            "fewer values. It is told once for each format: %s",
            error[:500],
            text[:500],
        )

    def _tokenizer(self, tokenizer: Any) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"structured decoding needs a tokenizer of the tokenizers library, not "
                f"{type(tokenizer).__name__}; set structured=False"
            )
        from llguidance import LLTokenizer

        state = json.loads(backend.to_str())
        own: Any
        if GLUE in json.dumps(state["normalizer"], ensure_ascii=False):
            self.spell = functools.partial(_spelled, backend.normalizer)
            own = _Glued(tokenizer, self.size)
        else:
            changed = {name: _verbatim(state[name]) for name in ("normalizer", "pre_tokenizer")}
            own = json.dumps({**state, **changed, "padding": None, "truncation": None})
        try:
            return LLTokenizer(own, n_vocab=self.size, eos_token=sorted(self.eos))
        except ValueError as error:
            raise ConfigError(
                "structured decoding needs a tokenizer that llguidance can read, and this model's "
                f"it cannot ({error}); set structured=False"
            ) from error


class Walk:
    """One completion's way through its grammar, token by token.

    Attributes:
        ended: An end token was taken; nothing may follow.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar) -> None:
        self._vocabulary = vocabulary
        self._matcher = vocabulary.matcher(grammar.text)
        self._grammar, self._takes_runs = grammar, grammar.takes_runs
        self._lead: Lead | None = None
        if grammar.thought is not None:
            self._lead = Lead(vocabulary.pieces, grammar.thought, grammar.opened)
        self._fits = True  # what was said where it may be a thought or not begins an answer as well
        self._queue: deque[int] = deque()
        self._free = False  # it has left the grammar, as tokens that others chose may
        self.ended = False
        if self._lead is None:
            self._refill()

    @property
    def forced(self) -> int | None:
        """The one token that can follow, where the grammar's text is forced; else ``None``."""
        return self._queue[0] if self._queue else None

    def begin(self) -> list[int]:
        """Take what is forced now, to its end."""
        taken = []
        while self._queue:
            taken.append(self._queue[0])
            self.advance(self._queue[0])
        return taken

    def to_the_end(self) -> list[int] | None:
        """What is left of the answer, if nothing but what is forced can follow; taken if so."""
        return self.begin() if self._queue and self._queue[-1] in self._vocabulary.eos else None

    def allowed_into(self, bits_W: np.ndarray) -> None:
        """Write which tokens may follow, one bit each."""
        own = self._vocabulary
        if self.ended or self._free:
            bits_W[:] = ALL
        elif self._lead is not None and (self._lead.inside or not self._fits):
            bits_W[:] = self._lead.bits
        elif self._queue:
            bits_W[:] = 0
            bits_W[self._queue[0] // WORD_BITS] = _bit(self._queue[0])
        else:
            self._matcher.unsafe_compute_mask_ptr(bits_W.ctypes.data, bits_W.nbytes)
            if self._matcher.is_accepting():
                bits_W |= own.end_bits
            if self._lead is not None:
                bits_W |= self._lead.bits
            if self._matcher.is_error() or not bits_W.any():
                self._leave()
                bits_W[:] = ALL

    def advance(self, token: int) -> None:
        """Take a token; one that is not allowed makes all that follow free."""
        if self.ended or self._free:
            return
        if self._lead is not None:
            self._lead_on(self._lead, token)
        elif self._queue:
            if token != self._queue.popleft():
                self._let_go()
        elif token in self._vocabulary.eos:
            self._free = not self._matcher.is_accepting()
        elif not self._matcher.consume_token(token):
            self._leave()
        self.ended = token in self._vocabulary.eos
        if not (self._queue or self._lead or self.ended or self._free):
            self._refill()

    def _lead_on(self, lead: Lead, token: int) -> None:
        """Take a token that may stand before the answer, or be its first."""
        if token in self._vocabulary.eos:
            self._free = lead.inside or not self._fits or not self._matcher.is_accepting()
            return
        was_closed = lead.closed
        lead.take(token)
        if lead.over:
            self._lead = None
        if lead.closed and not was_closed:
            # What may have begun an answer, too, was a thought.
            self._matcher, self._fits = self._vocabulary.matcher(self._grammar.text), True
            self._free = not lead.clean
        elif not (lead.inside or lead.blank):
            self._fits = self._fits and self._begins([token], lead.first)
            self._free = lead.over and not self._fits

    def _begins(self, tokens: list[int], first: bytes) -> bool:
        """Take the answer's first tokens, or their text without white space; whether it is one."""
        if first and self._matcher.validate_tokens(tokens) < len(tokens):
            tokens = self._vocabulary.tokens_of(first)
        if self._matcher.validate_tokens(tokens) < len(tokens):
            return False
        return bool(self._matcher.consume_tokens(tokens))

    def _refill(self) -> None:
        tokens = self._matcher.compute_ff_tokens() if self._takes_runs else []
        if tokens and self._matcher.consume_tokens(tokens):
            self._queue.extend(tokens)
        if self._matcher.is_error():
            self._leave(chosen=False)
        elif self._matcher.is_stopped():
            self._queue.append(self._vocabulary.end)

    def _let_go(self) -> None:
        """Leave the rest free: nothing of it is forced any more."""
        self._free = True
        self._queue.clear()

    def _leave(self, *, chosen: bool = True) -> None:
        """Leave the rest free, by llguidance's word.

        Args:
            chosen: By a token that was chosen, and not by one that llguidance says is forced.
        """
        self._let_go()
        error = self._matcher.get_error()
        if chosen and NOT_ALLOWED in error:
            # Tokens that others chose; as they are read again, they leave at the same place.
            logger.debug("an answer left its grammar: %s", error[:500])
        else:
            self._vocabulary.forget(self._grammar.text, error or "no token may follow")


def unpacked(bits_NW: Tensor, size: int) -> Tensor:
    """A packed mask as one bool a token, (N, V)."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=bits_NW.device)
    return (((bits_NW[..., None] >> shifts) & 1) != 0).flatten(-2)[..., :size]


def single(bits_NW: Tensor) -> Tensor:
    """Where exactly one token is allowed, (N,)."""
    # One number that is not 0, and one bit in it: then it has none in common with the one below.
    wide = bits_NW.long() & 0xFFFFFFFF
    return ((wide != 0).sum(-1) == 1) & ((wide & (wide - 1)) == 0).all(-1)


def _bit(token: int) -> np.int32:
    return np.uint32(1 << token % WORD_BITS).astype(np.int32)


def _spelled(normalizer: Any, text: str, before: str) -> str:
    """A text as the normalizer writes it behind another, with a character for the glue."""
    whole, start = (normalizer.normalize_str(part) for part in (before + text, before))
    parts = whole[len(start) :].split(GLUE)
    return SPELLED_GLUE.join(_decoded(part).decode() for part in parts)


@functools.cache
def _alphabet() -> dict[str, int]:
    """The byte that each character of byte-level tokenizers stands for."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def _decoded(text: str) -> bytes:
    return bytes(_alphabet()[character] for character in text)


def _verbatim(part: Any) -> Any:
    """A normalizer or pre-tokenizer that takes texts as they are, with no space before them.

    What is forced is written letter by letter, and goes on from what was said.
    """
    if isinstance(part, list):
        return [_verbatim(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") in FORMS:
        return {"type": "Sequence", "normalizers": []}
    own = {name: _verbatim(value) for name, value in part.items()}
    return own | {"add_prefix_space": False} if "add_prefix_space" in own else own


class _Glued:
    """A byte-level tokenizer with glue, as llguidance asks for one: the glue is a character."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, None
        self.special_token_ids = [
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        ]
        special = set(self.special_token_ids)
        glue = SPELLED_GLUE.encode()
        names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        self.tokens = [
            name.encode()
            if index in special or name is None
            else glue.join(_decoded(part) for part in name.split(GLUE))
            for index, name in enumerate(names)
        ]
        # Its bytes one by one would be the character, and no glue: these tokens are never said.
        self.tokens = [b"" if glue[:1] in text.replace(glue, b"") else text for text in self.tokens]
        self.tokens += [b""] * (size - len(self.tokens))
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        in_bytes = "".join(c for b in glue for c, own in _alphabet().items() if own == b)
        put_back = {"type": "Replace", "pattern": {"String": in_bytes}, "content": GLUE}
        state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}, put_back]}
        self._as_spelled = Tokenizer.from_str(json.dumps(state))

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._as_spelled.encode(text, add_special_tokens=False).ids
