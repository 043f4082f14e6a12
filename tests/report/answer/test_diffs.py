"""Diffs: both texts can be read from one, changes are elements, nothing slips out."""

import re
from html import unescape

from hypothesis import given, settings
from hypothesis import strategies as st

from fst_dspy.report.answer.diffs import demos_text, diff_of

ROW = re.compile(r"<p(?: class=\w+)?><b>(.)</b><span>(.*?)</span></p>", re.S)
LINES = st.lists(st.text(st.sampled_from("ab <&.'"), max_size=12), max_size=8).map("\n".join)


def rows(html):
    """``(sign, text)`` of each line of a diff."""
    return [
        (sign, unescape(re.sub(r"</?(?:ins|del)>", "", text))) for sign, text in ROW.findall(html)
    ]


@given(LINES, LINES)
@settings(max_examples=200)
def test_a_diff_holds_both_texts(before, after):
    html = diff_of(before, after)
    assert [text for sign, text in rows(html) if sign != "+"] == before.splitlines()
    assert [text for sign, text in rows(html) if sign != "−"] == after.splitlines()
    allowed = r"</?(?:p|div|b|span|ins|del|details|summary)(?: class=(?:diff|gone|new))?>"
    assert not re.search("[<>]", re.sub(allowed, "", html))


def test_lines_first_then_the_words_that_differ():
    before = "Keep.\nRoute the ticket to the right queue.\nOne.\nTwo.\nThree.\nFour.\nFive.\nSix."
    after = before.replace("the right queue", "a queue") + "\nVisa goes to amber."
    html = diff_of(before, after)
    assert "Route the ticket to <del>the right</del> queue." in html
    assert "Route the ticket to <ins>a</ins> queue." in html
    assert "<ins>Visa goes to amber.</ins>" in html and "2 lines the same" in html
    # Lines without a word in common were not changed but replaced: first what went.
    shown = [
        sign for sign, _ in rows(diff_of("Be brief.", "Answer with one name.\nBe kind to all."))
    ]
    assert shown == ["−", "+", "+"]


def test_demos_are_read_field_by_field():
    text = '[{"question": "How many?", "answer": 3}, {"question": "Why <b>?"}]'
    assert demos_text(text) == (
        "Example 1\n  question: How many?\n  answer: 3\n\nExample 2\n  question: Why <b>?"
    )
    for odd in ("no JSON", "[1]", "[" * 9000):
        assert demos_text(odd) == odd


def test_long_texts_take_no_time():
    before = "\n".join(f"rule {n} about {n % 7} things" for n in range(1500))
    after = "\n".join(f"law {n} on {n % 5} matters" for n in range(1500))
    assert len(rows(diff_of(before, after))) == 3000
