"""What candidates, populations and results look like in a notebook and in a terminal."""

import dataclasses
import io
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from run_folders import HOSTILE, write_run

from fst_dspy.display import (
    MOST_WORDS,
    changed_components,
    diff_html,
    readable,
    show,
    text_diff,
    word_diff,
)
from fst_dspy.results import plots
from fst_dspy.rollouts.evaluate import Quadrants
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import Population


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", steps=12, cycles=3)


def printed(thing, width=120):
    file = io.StringIO()
    show(thing, Console(file=file, width=width))
    return file.getvalue()


def visible(html):
    texts = []
    parser = HTMLParser()
    parser.handle_data = texts.append
    parser.feed(html)
    return "".join(texts)


words = st.lists(st.sampled_from(["a", "visa", " ", "  ", "\n", "go", ".", "é", "<b>"])).map(
    "".join
)


@given(words, words)
@settings(max_examples=300)
def test_a_diff_holds_both_texts(before, after):
    for pieces in (word_diff(before, after), text_diff(before, after)):
        assert "".join(t for kind, t in pieces if kind != "added") == before
        assert "".join(t for kind, t in pieces if kind != "removed") == after
        assert all(text for _, text in pieces)
    assert visible(diff_html(before, before)) == before


def test_a_rewritten_phrase_is_one_change():
    assert word_diff("Route the ticket.", "Send each ticket.") == [
        ("removed", "Route the"),
        ("added", "Send each"),
        ("same", " ticket."),
    ]


def test_words_are_compared_within_a_line_and_what_became_of_it():
    before = "Route it.\nvisa tickets go to amber.\nBe brief."
    after = "Route it.\nrefund tickets go to jade.\nvisa tickets go to coral.\nAnswer in one word."
    assert text_diff(before, after) == [
        ("same", "Route it.\n"),
        ("added", "refund tickets go to jade.\n"),
        ("same", "visa tickets go to "),
        ("removed", "amber"),
        ("added", "coral"),
        ("same", ".\n"),
        ("removed", "Be brief."),
        ("added", "Answer in one word."),
    ]


def test_long_texts_are_compared_by_lines():
    lines = [f"line {n} of many" for n in range(MOST_WORDS)]
    pieces = word_diff("\n".join(lines), "\n".join([*lines[:-1], "new"]))
    assert [kind for kind, _ in pieces] == ["same", "removed", "added"]


def test_demos_are_compared_a_field_a_line():
    (name, before, after), *rest = changed_components(
        {"p.demos": "[]", "p.instructions": "x"},
        {"p.demos": '[{"q": "How many?", "a": 3}, {"q": "Why <b>?"}]', "p.instructions": "x"},
    )
    assert (name, before, rest) == ("p.demos", "", [])
    assert after == "Example 1\n  q: How many?\n  a: 3\n\nExample 2\n  q: Why <b>?"
    for odd in ("no JSON", "[1]", "[" * 9000):
        assert readable("p.demos", odd) == odd


def test_a_candidate_shows_its_origin_and_texts():
    candidate = make_candidate({"p.instructions": HOSTILE}, ["parent00"], 3, "merge")
    html = candidate._repr_html_()
    assert HOSTILE in visible(html) and "<script" not in html and "<img" not in html
    for text in (visible(html), printed(candidate)):
        assert f"{candidate.id} · merge, cycle 3 from parent00" in text
        assert "p.instructions" in text
    # Square brackets are rich's markup; in an instruction they are text.
    assert "[bold]x[/]" in printed(make_candidate({"p.instructions": "[bold]x[/]"}))


def test_a_population_is_shown_best_first():
    one, two = (make_candidate({"p.instructions": text}) for text in ("one", "two"))
    population = Population((one, two), ("a", "b"), ((0.0, 0.0), (0.0, 1.0)), 6)
    assert population.ranked == [(two, 0.5, 2), (one, 0.0, 1)]
    for text in (visible(population._repr_html_()), printed(population)):
        assert text.index(two.id) < text.index(one.id) and "0.500" in text
    unscored = Population((one,), ("a",), (), 0)
    assert "—" in visible(unscored._repr_html_()) and "—" in printed(unscored)


def test_a_result_shows_its_figures_and_what_changed(result):
    first, best = result.records[0].val_score, result.best.score
    for text in (visible(result._repr_html_()), printed(result)):
        assert f"{first:.3f} → {best:.3f}" in text
        assert f"{result.rollouts.total:,}" in text and result.best.candidate.id in text
    html = result._repr_html_()
    changed = result.best.candidate != result.seed_candidate
    assert ("<ins>" in html) is changed


def test_to_pandas_has_a_row_a_cycle(result):
    frame = result.to_pandas()
    assert list(frame.index) == [0, 1, 2, 3]
    assert list(frame.val_score) == [record.val_score for record in result.records]
    assert frame.total_rollouts.iloc[-1] == result.rollouts.total
    assert frame.rollouts_slow.sum() == result.rollouts.slow
    assert frame.failure_parse.iloc[0] == 0 and frame.failure_parse.iloc[1] == 0.125
    told = dataclasses.replace(result.records[1], failure_messages={"parse": "no field"})
    told = dataclasses.replace(result, records=(result.records[0], told)).to_pandas()
    assert told.failure_messages_parse.isna().tolist() == [True, False]
    assert frame.seconds_eval.notna().all() and frame.train_reward.isna().sum() == 1


def test_figures_hold_the_records(result):
    score = result.plot_score().axes[0]
    assert list(score.lines[0].get_ydata()) == [r.val_score for r in result.records]
    assert len(score.lines[1].get_ydata()) == 3 and score.get_legend() is not None
    drift = result.plot_drift().axes[0]
    assert list(drift.lines[0].get_xdata()) == [r.kl_to_base for r in result.records]
    file = io.BytesIO()
    result.plot_lineage().savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_figure_shows_itself_without_pyplot():
    figure = plots.draw_curves([plots.Curve("one", (0, 1), (0, 1))], "x", "y")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_rollouts_stack_to_the_cycle_counts(result):
    axes = result.plot_rollouts().axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    assert tops == [record.rollouts.total for record in result.records]
    assert len(axes.containers) == 3


def test_quadrants_stand_in_their_places():
    scores = Quadrants(0.1, 0.4, 0.2, 0.9, examples=50)
    axes = plots.draw_quadrants(scores).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "0.10", (1, 0): "0.40", (0, 1): "0.20", (1, 1): "0.90"}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "base\nweights",
        "trained\nweights",
    ]


def test_lineage_shows_what_every_candidate_changed(result):
    html, text = result.lineage()._repr_html_(), printed(result.lineage())
    known = {candidate.id: candidate for candidate in result.candidates()}
    for name in known:
        assert name in visible(html) and name in text
    assert html.count("<details open>") == 1 and "<ins>" in html and "<script" not in html
    for node, before, changes in result.lineage().changes():
        after = known[node.id].components
        assert all(new == readable(name, after[name]) for name, _, new in changes)
        expected = node.parent_ids[0] if node.parent_ids else result.seed_candidate.id
        assert before.id == ("nothing" if node.id == expected else expected)


def test_lineage_takes_in_the_run_folder(result):
    nodes = plots.lineage(result.candidates(), result.records)
    assert len(nodes) == 1 + 2 * 3 and sum(node.best for node in nodes) == 1
    known = {node.id for node in nodes}
    assert all(set(node.parent_ids) <= known for node in nodes)
    last = result.records[-1]
    scores = {node.id: node.score for node in nodes}
    assert [scores[name] for name in last.candidate_ids] == list(last.val_scores)
    import dataclasses

    alone = dataclasses.replace(result, log_dir=None)
    assert len(alone.candidates()) < len(nodes)
