"""Words and sentences of texts in any script, by which lessons are told apart."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy.fast.proposers.sentences import sentences
from fst_dspy.fast.proposers.words import key_of, length, telling_words, words

PARTS = "don't e-mail 3.5 a_b É so end. it’s, (in) “said” **bold** `x.y` ... — / _ a/b one:two !"


@given(st.lists(st.sampled_from(PARTS.split())).map(" ".join))
def test_words_between_spaces_are_runs_of_letters_and_what_joins_them(text: str) -> None:
    expected = re.findall(r"\w+(?:['’.-]\w+)*", text.lower())
    assert words(text) == telling_words(text) == expected
    assert length(text) == len(text.split())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("C++, C# and .NET.", ["c++", "c#", "and", ".net"]),
        ("a discount < 5", ["a", "discount", "<", "5"]),
        ("x<=5, y != z, ≥ 18", ["x", "<=", "5", "y", "!=", "z", "≥", "18"]),
        ("visa -> amber => b <b>c</b>", ["visa", "amber", "b", "b", "c", "b"]),
        ("$5 or 5% or -5 or 3-5", ["$", "5", "or", "5", "%", "or", "-5", "or", "3-5"]),
        ("**bold** `code` #tag # head", ["bold", "code", "#tag", "head"]),
        ("签证visa卡。", ["签", "证", "visa", "卡"]),
        ("กินข้าว", ["กิ", "น", "ข้", "า", "ว"]),
        ("ビザは東京", ["ビ", "ザ", "は", "東", "京"]),
        ("비자 티켓", ["비자", "티켓"]),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found
    assert key_of(text) == " ".join(found)


def test_telling_words_are_pairs_where_there_are_no_spaces() -> None:
    assert telling_words("签证工单 visa 卡 < 5") == ["签证", "证工", "工单", "visa", "卡", "5"]
    assert length("签证工单 visa") == 4


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("visa goes to silver. tax goes to jade.", ["visa goes to silver.", "tax goes to jade."]),
        ("U.S. visas go to amber.", ["U.S. visas go to amber."]),
        ("Dr. Smith's go to amber. Visas too.", ["Dr. Smith's go to amber.", "Visas too."]),
        ("J. Smith's go to amber.", ["J. Smith's go to amber."]),
        ("Use No. 5 for visas. Say no. Always.", ["Use No. 5 for visas.", "Say no.", "Always."]),
        ("Tickets zu z. B. Visa gehen an A.", ["Tickets zu z. B. Visa gehen an A."]),
        ("visa goes to A. tax goes to B.", ["visa goes to A.", "tax goes to B."]),
        ("Pens, ink etc. go there. Ask!", ["Pens, ink etc. go there.", "Ask!"]),
        ("It is 3.5 m (e.g. wide). Is it? Yes", ["It is 3.5 m (e.g. wide).", "Is it?", "Yes"]),
        ("签证归琥珀。护照归玛瑙！好", ["签证归琥珀。", "护照归玛瑙！", "好"]),
        ("他说“好。”然后走了。", ["他说“好。”", "然后走了。"]),
        ("", []),
    ],
)
def test_sentences(line: str, parts: list[str]) -> None:
    assert sentences(line) == parts
