"""Grammars for the tiny models, small enough that all that they allow can be written down."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from fst_dspy.grammar.tokens import Walk, unpacked
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import vocabulary
from fst_dspy.types import Grammar

DESKS = ("silver", "gold", "sand")
SMALL = Grammar('%llguidance {}\nstart: "to: " ("silver" | "gold" | "sand") ".\\n\\nend"')
"""Three answers; their beginning and their end are forced."""
FREE = Grammar(
    "%llguidance {}\n"
    'start: "[[ ## reasoning ## ]]\\n" t0 ("silver" | "gold") "\\n\\n[[ ## completed ## ]]"\n'
    "T0: /(?s:.{0,12})\\n\\n\\[\\[ ## answer ## \\]\\]\\n/\n"
    "t0[lazy]: T0"
)
"""Free text of at most twelve characters between markers."""


def encode(policy: Policy, text: str) -> tuple[int, ...]:
    """Token ids of a text."""
    return tuple(policy.tokenizer.encode(text, add_special_tokens=False))


def allowed_after(policy: Policy, grammar: Grammar, ids: tuple[int, ...]) -> list[int]:
    """The tokens that may follow some."""
    own = vocabulary(policy)
    walk = Walk(own, grammar)
    for token in ids:
        walk.advance(token)
    bits = np.zeros(own.words, dtype=np.int32)
    walk.allowed_into(bits)
    return unpacked(torch.from_numpy(bits)[None], own.size)[0].nonzero().flatten().tolist()


def all_answers(
    policy: Policy, grammar: Grammar, begun: tuple[int, ...] = ()
) -> Iterator[tuple[int, ...]]:
    """Every sequence of tokens that a grammar allows, the end token included."""
    for token in allowed_after(policy, grammar, begun):
        ids = (*begun, token)
        if token in vocabulary(policy).eos:
            yield ids
        else:
            yield from all_answers(policy, grammar, ids)


def drawn_answer(policy: Policy, grammar: Grammar, seed: int, limit: int = 400) -> str | None:
    """An answer of a model to which all tokens are alike, but that likes to come to an end."""
    own, walk, said = vocabulary(policy), Walk(vocabulary(policy), grammar), []
    rng, bits = np.random.default_rng(seed), np.zeros(own.words, dtype=np.int32)
    ends = _ends(policy)
    while len(said) < limit:
        walk.allowed_into(bits)
        may = unpacked(torch.from_numpy(bits)[None], own.size)[0].nonzero().flatten().numpy()
        ending = may[ends[may]]
        pool = ending if len(ending) and rng.random() < 0.3 else may
        said.append(int(pool[rng.integers(len(pool))]))
        walk.advance(said[-1])
        if walk.ended:
            return policy.tokenizer.decode(said, skip_special_tokens=True)
    return None


@functools.cache
def _ends(policy: Policy) -> np.ndarray:
    """Of every token whether values come to an end by it."""
    texts = policy.tokenizer.batch_decode([[token] for token in range(vocabulary(policy).size)])
    return np.array([bool(set(text) & set('\n<"]}')) for text in texts])
