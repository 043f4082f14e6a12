"""The line that closes an answer: where it counts, and how much of a completion is kept."""

from __future__ import annotations

import pytest
from tiny_models import make_tokenizer

from fst_dspy.model.endings import End, closing_tokens, kept_tokens

MARK = "[[ ## completed ## ]]"
THOUGHT = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"silver\n\n{MARK}\nAnd now", f"silver\n\n{MARK}"),
        (f"silver\n  {MARK} so", f"silver\n  {MARK}"),
        (f"{MARK}", f"{MARK}"),
        (f"I am to end with {MARK} here\n{MARK}x", f"I am to end with {MARK} here\n{MARK}"),
        (f"I am to end with {MARK}", None),
        ("[[ ## completed ##", None),
    ],
)
def test_a_marker_counts_at_the_beginning_of_a_line(text: str, kept: str | None) -> None:
    place = End(MARK).place(text)
    assert (None if place is None else text[:place]) == kept


@pytest.mark.parametrize(
    ("text", "opened", "counts"),
    [
        (f"<think>\n{MARK}\n", False, False),
        (f"<think>\n{MARK}\n</think>\nsilver", False, False),
        (f"<think>\n{MARK}\n</think>\n{MARK}", False, True),
        (f"<think>hm</think>{MARK}", False, True),
        (f"hm\n{MARK}\n", True, False),
        (f"hm\n</think>\n{MARK}", True, True),
        (f"silver\n{MARK}", False, True),
    ],
)
def test_in_a_thought_it_means_nothing(text: str, opened: bool, counts: bool) -> None:
    place = End(MARK, THOUGHT, opened).place(text)
    assert (place is not None) is counts
    assert place is None or text[:place].endswith(MARK)


def test_headers_of_fields_that_are_the_same_are_passed_over() -> None:
    end, answer = End(MARK, count=2), f"{MARK}\nTrue, not {MARK}\n\n[[ ## why ## ]]\nSo.\n\n{MARK}"
    assert end.place(answer) == len(answer) and end.place(f"{answer}\n{MARK}") == len(answer)
    assert end.place(f"{MARK}\nTrue") is None
    thinking = End(MARK, THOUGHT, count=2)
    assert thinking.place(f"<think>\n{MARK}\n</think>\n{answer}") == len(answer) + 39
    tokenizer = make_tokenizer()
    ids = tokenizer(answer)["input_ids"]
    assert kept_tokens(tokenizer, [*ids, *ids], end) == len(ids) + 1


def test_one_token_is_kept_behind_it() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(f"silver\n\n{MARK}")["input_ids"]
    more = tokenizer(" and so on")["input_ids"]
    for behind in (0, 1, 2, len(more)):
        whole = [*ids, *more[:behind]]
        assert kept_tokens(tokenizer, whole, End(MARK)) == len(ids) + min(behind, 1)
        assert kept_tokens(tokenizer, whole, None) == len(whole)
    assert kept_tokens(tokenizer, [], End(MARK)) == 0


def test_tokens_that_may_close_it_are_those_with_its_last_letter() -> None:
    tokenizer = make_tokenizer()
    may = closing_tokens(tokenizer, MARK, len(tokenizer) + 5)
    assert may.sum() < len(may) / 10 and not may[-5:].any()
    assert may[tokenizer(MARK)["input_ids"][-1]]


@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
def test_white_space_behind_it_stays_as_a_model_that_ends_there_wrote_it(behind: str) -> None:
    assert End(MARK).cut(f"silver\n{MARK}{behind}") == f"silver\n{MARK}{behind}"
    assert End(MARK).cut(f"silver\n{MARK}{behind}But") == f"silver\n{MARK}"
