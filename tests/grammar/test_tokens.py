"""What a grammar allows, token by token, against all answers written down."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

import dspy
import pytest
import torch
from held_answers import DESKS, SMALL, all_answers, allowed_after, encode
from tiny_models import save_model
from tokenizers import decoders, pre_tokenizers
from tokenizers.normalizers import NFC, Lowercase, Replace, Sequence

import fst_dspy.grammar.tokens as tokens_module
from fst_dspy.errors import ConfigError, ModelError
from fst_dspy.grammar.answers import grammar_of_answer
from fst_dspy.grammar.tokens import SPELLED_GLUE, Walk, single, unpacked
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import allowed_tokens, vocabulary
from fst_dspy.types import Grammar, TrainingRow

ANSWERS = [f"to: {desk}.\n\nend" for desk in DESKS]


def test_the_answers_are_the_grammar_s_and_no_others(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    found = list(all_answers(policy, SMALL))
    texts = {policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in found}
    assert texts == set(ANSWERS)
    # Each way to write them, but for where one way is forced.
    assert len(found) == len(set(found)) > len(ANSWERS)
    assert all(ids[-1] == policy.tokenizer.eos_token_id for ids in found)


@pytest.mark.parametrize("named", [None, -1, 50_256, [50_256, 2]])
def test_end_tokens_and_others_that_the_model_has_not_are_left_out(tiny_llama: Path, named) -> None:
    policy = Policy.load(tiny_llama)
    policy.tokenizer.add_tokens(["<added to the tokenizer alone>"])
    policy.model.config.eos_token_id = policy.model.generation_config.eos_token_id = named
    texts = {
        policy.tokenizer.decode(i, skip_special_tokens=True) for i in all_answers(policy, SMALL)
    }
    assert texts == set(ANSWERS)
    assert vocabulary(policy).eos == {policy.tokenizer.eos_token_id}


def test_an_end_token_that_the_tokenizer_has_not_ends_no_held_answer(tmp_path: Path) -> None:
    policy = Policy.load(save_model(tmp_path, "llama", vocab_size=384))
    policy.model.generation_config.eos_token_id = [330, policy.tokenizer.eos_token_id]
    assert vocabulary(policy).eos == {policy.tokenizer.eos_token_id}
    assert allowed_after(policy, SMALL, ())


def test_without_an_end_token_there_is_no_end(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    policy.model.config.eos_token_id = policy.model.generation_config.eos_token_id = None
    policy.tokenizer.eos_token, policy.tokenizer.chat_template = None, "{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="needs a token that ends an answer"):
        vocabulary(policy)


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.XMLAdapter(), dspy.JSONAdapter()])
def test_what_the_embedded_model_was_taught_to_write_is_allowed(adapter) -> None:
    policy = Policy.load("embedded")
    signature = dspy.Signature("ticket -> reasoning, queue")
    text = grammar_of_answer(adapter, signature, vocabulary(policy).spell)
    assert text is not None
    values = {"reasoning": "visa goes to teal.", "queue": "teal"}
    answer = adapter.format_assistant_message_content(signature, values)
    said = tuple(policy.tokenizer.encode(answer))
    for number, token in enumerate(said):
        assert token in allowed_after(policy, Grammar(text), said[:number]), answer
    assert policy.tokenizer.eos_token_id in allowed_after(policy, Grammar(text), said)


def test_all_that_begins_an_answer_is_allowed_and_nothing_else(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    free = Grammar(SMALL.text, takes_runs=False)
    pieces = [policy.tokenizer.decode([i]) for i in range(len(policy.tokenizer))]
    special = set(policy.tokenizer.all_special_ids)
    for said in ("", "to: ", "to: s", "to: silver", "to: gold.\n"):
        wanted = [
            token
            for token, piece in enumerate(pieces)
            if token not in special and any(a.startswith(said + piece) for a in ANSWERS)
        ]
        assert allowed_after(policy, free, encode(policy, said)) == wanted


def test_a_run_that_is_forced_is_written_as_the_tokenizer_writes_it(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    walk = Walk(vocabulary(policy), SMALL)
    begun = walk.begin()
    # All but what may yet be one token with what comes after it.
    assert len(begun) >= 2
    for answer in ANSWERS:
        assert list(encode(policy, answer)[: len(begun)]) == begun


SPACED = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("before", [SPACED, pre_tokenizers.Sequence([SPACED])])
def test_an_answer_begins_as_it_is_where_texts_begin_with_a_space(tiny_llama: Path, before) -> None:
    """Its tokenizer writes ``" to:"`` for ``"to:"``, which is another text than is forced."""
    plain, policy = Policy.load(tiny_llama), Policy.load(tiny_llama)
    policy.tokenizer.backend_tokenizer.pre_tokenizer = before
    assert encode(policy, "to:") == encode(plain, " to:")
    begun = Walk(vocabulary(policy), SMALL).begin()
    assert begun == Walk(vocabulary(plain), SMALL).begin() != []
    assert set(all_answers(policy, SMALL)) == set(all_answers(plain, SMALL))


@pytest.mark.parametrize("changes", [NFC(), Sequence([Lowercase(), NFC()])])
def test_an_answer_is_written_as_it_is_where_texts_are_given_another_form(
    tiny_llama: Path, changes
) -> None:
    plain, policy = Policy.load(tiny_llama), Policy.load(tiny_llama)
    policy.tokenizer.backend_tokenizer.normalizer = changes
    grammar = Grammar('%llguidance {}\nstart: "Cafe\u0301: " ("silver" | "gold") "\\nEnd"')
    begun = Walk(vocabulary(policy), grammar).begin()
    assert begun == Walk(vocabulary(plain), grammar).begin() != []
    assert set(all_answers(policy, grammar)) == set(all_answers(plain, grammar))


def test_a_tokenizer_that_cannot_write_what_is_forced_leaves_answers_free_and_is_told_of(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy.load(tiny_llama)
    policy.tokenizer.backend_tokenizer.normalizer = Replace("to", "TO")
    walk = Walk(vocabulary(policy), SMALL)
    assert walk.begin() == [] and walk.forced is None
    assert len(allowed_after(policy, SMALL, ())) == len(policy.tokenizer)
    (record,) = caplog.records
    assert "llguidance gave up" in record.getMessage()


def test_nothing_is_forced_once_an_answer_has_left_its_run(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    walk = Walk(vocabulary(policy), SMALL)
    forced = walk.forced
    assert forced is not None
    walk.advance(forced + 1)
    assert walk.forced is None and walk.begin() == [] and walk.to_the_end() is None


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.WordPiece()])
def test_a_tokenizer_that_llguidance_cannot_read_is_refused(tiny_llama: Path, decoder) -> None:
    policy = Policy.load(tiny_llama)
    policy.tokenizer.backend_tokenizer.decoder = decoder
    with pytest.raises(ConfigError, match="llguidance can read"):
        vocabulary(policy)


def test_tokens_that_others_chose_leave_the_grammar_without_harm(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    ids = encode(policy, "something else")
    row = TrainingRow((5,), ids, (0.0,) * len(ids), 1.0, 1.0, SMALL)
    bits_NW = allowed_tokens(policy, [row])
    assert bits_NW is not None
    assert unpacked(bits_NW[1:], len(policy.tokenizer)).all()


def test_a_mask_of_one_is_told_from_all_others() -> None:
    words = torch.tensor(
        [[0, 1], [0, 0], [1, 1], [-(2**31), 0], [3, 0], [-1, -1], [0, -(2**31)]],
        dtype=torch.int32,
    )
    assert single(words).tolist() == [True, False, False, True, False, False, True]


def test_a_grammar_that_is_none_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="refuses a grammar"):
        vocabulary(Policy.load(tiny_llama)).matcher("start: nothing")


def test_the_embedded_model_writes_a_grammar_s_words_in_its_own_tokens() -> None:
    policy = Policy.load("embedded")
    own = vocabulary(policy)
    assert own.spell is not None
    text = "\n\n[[ ## answer ## ]]\nsilver desk, it's (gold)"
    written = json.dumps(own.spell(text, ""), ensure_ascii=False)
    # Without the other no token would be forced, and each is looked at.
    grammar = Grammar(f"%llguidance {{}}\nstart: {written} | /[0-9\\n]{{2,99}}/")
    walk, ids = Walk(own, grammar), encode(policy, text)
    for place, token in enumerate(ids):
        if walk.forced is None:
            assert token in allowed_after(policy, grammar, ids[:place])
        else:
            assert token == walk.forced
        walk.advance(token)
    assert walk.forced == own.end


@pytest.mark.parametrize("most", [130, 500, 2000])
def test_a_text_of_limited_length_is_held_to_the_end(tiny_llama: Path, most: int) -> None:
    policy = Policy.load(tiny_llama)
    fields = {
        "ticket": (str, dspy.InputField()),
        "summary": (str, dspy.OutputField(max_length=most)),
        "desk": (Literal["silver", "gold"], dspy.OutputField()),
    }
    grammar = Grammar(str(grammar_of_answer(dspy.ChatAdapter(), dspy.Signature(fields))))
    text = "Visa goes to silver. " * (most // 25)
    said = encode(policy, f"[[ ## summary ## ]]\n{text}.\n\n[[ ## desk ## ]]\n")
    for _ in range(2):  # the second answer is as well held as the first
        allowed = allowed_after(policy, grammar, said)
        pieces = {policy.tokenizer.decode([token]).strip() for token in allowed}
        assert pieces and all(any(d.startswith(p) for d in ("silver", "gold")) for p in pieces)


def test_a_literal_of_thousands_of_values_is_held(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    names = Literal[tuple(f"v{number}" for number in range(3000))]  # type: ignore[valid-type]
    fields = {"ticket": (str, dspy.InputField()), "name": (names, dspy.OutputField())}
    grammar = Grammar(str(grammar_of_answer(dspy.ChatAdapter(), dspy.Signature(fields))))
    said = encode(policy, "[[ ## name ## ]]\nv2999")
    allowed = allowed_after(policy, grammar, said)
    assert allowed and all(policy.tokenizer.decode([t]).startswith("\n") for t in allowed)


def test_a_grammar_that_is_given_up_on_is_told_once_and_spoils_no_other_answer(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLParserLimits

    narrow = LLParserLimits(step_lexer_fuel=100_000)
    monkeypatch.setattr(tokens_module, "parser_limits", lambda: narrow)
    policy = Policy.load(tiny_llama)
    grammar = Grammar(r"start: T" "\n" r"T: /(?s:.{0,900})x\n/ & ~/(?s:.*)\[#(?s:.*)/")
    short, long = encode(policy, "ab"), encode(policy, "ab [" * 10)
    size = len(policy.tokenizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(allowed_after(policy, grammar, short)) < size
            assert len(allowed_after(policy, grammar, long)) == size
    (record,) = caplog.records
    assert "llguidance gave up" in record.getMessage()


def test_tokens_that_a_grammar_does_not_allow_are_no_warning(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy.load(tiny_llama)
    walk = Walk(vocabulary(policy), Grammar(SMALL.text, takes_runs=False))
    with caplog.at_level(logging.WARNING):
        for token in encode(policy, "other"):
            walk.advance(token)
    assert not caplog.records


def test_the_embedded_model_s_glue_is_no_character_of_its_bytes() -> None:
    """It is one in the grammar; said byte by byte it would be one in the answer."""
    own = vocabulary(policy := Policy.load("embedded"))
    begins = policy.tokenizer.convert_tokens_to_ids(chr(SPELLED_GLUE.encode()[0]))
    assert begins is not None and own.pieces.texts_V[begins] != SPELLED_GLUE.encode()[:1]
    assert SPELLED_GLUE.encode() in own.pieces.texts_V
