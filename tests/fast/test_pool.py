"""The pool of slow rollouts: scores with gaps, pairs, minibatches, and its way through JSON."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy.fast.pool import (
    RolloutPool,
    fill,
    minibatch,
    observed,
    paired,
    pool_from_json,
    problem_means,
    score_table,
)
from fst_dspy.fast.proposers.demos import SOURCE
from fst_dspy.fast.proposers.stated import marked_lessons, unmarked_sentences
from fst_dspy.student.candidate import encode_demos, make_candidate
from fst_dspy.types import Call, Failure, PredictorTrace, Rollout, Turn

A, B, C = (make_candidate({"solve.instructions": text}) for text in "abc")


def rollout(candidate=A, problem="p", reward=1.0, version=0, **more) -> Rollout:
    trace = PredictorTrace("solve", {"q": problem}, {"a": 1}, "text")
    call = Call("solve", (1,), (2,), (0.0,), "text", "stop", 1.0)
    values = {"traces": (trace,), "calls": (call,), "feedback": "f", "failure": None, **more}
    return Rollout(problem, candidate.id, reward=reward, policy_version=version, **values)


def test_scores_are_means_over_a_problems_rollouts():
    pool = RolloutPool().plus([rollout(reward=r) for r in (1.0, 0.0)] + [rollout(B, reward=0.0)])
    table = score_table(pool, [A, B, C])
    assert [c.id for c in table.candidates] == [A.id, B.id], "nothing is known of C"
    assert table.score_K_P == ((0.5,), (0.0,))


def test_the_window_forgets_old_versions():
    pool = RolloutPool().plus([rollout(version=v) for v in range(5)])
    assert [r.policy_version for r in pool.since(3).rollouts] == [3, 4]
    assert len(pool.latest(2).rollouts) == 2


def test_a_gap_is_filled_by_candidate_and_problem():
    # B ran on the hard problems alone, and did better there than A: it is the better one.
    scores = fill([[1.0, 0.2, 0.3], [None, 0.4, 0.5]])
    assert scores[1][0] == 1.0, "fitted 1.2, but no score is beyond those seen"
    assert fill([[0.6, 0.2, 0.3], [None, 0.4, 0.5]])[1][0] == pytest.approx(0.6)
    lower = fill([[0.6, 0.5], [None, 0.3]])
    assert lower[1][0] == pytest.approx(0.4)


def test_a_chain_of_pairs_is_ranked_by_its_steps():
    # Each beats the one before it by less and less, and each pair met on problems of its own.
    row = [
        [0.1, None, None],
        [0.5, 0.2, None],
        [None, 0.3, 0.6],
        [None, None, 0.65],
    ]
    means = [sum(r) / len(r) for r in fill(row)]
    assert means == sorted(means)


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=5),
    st.lists(st.floats(-1, 1), min_size=2, max_size=8),
    st.integers(0, 1000),
)
def test_filling_recovers_a_two_way_table(rows, columns, seed):
    rng = random.Random(seed)
    whole = [[a + b for b in columns] for a in rows]
    # One row and one column stay whole, so that all effects are tied together.
    gaps = [
        [x if k == 0 or p == 0 or rng.random() < 0.5 else None for p, x in enumerate(row)]
        for k, row in enumerate(whole)
    ]
    seen = [x for row in gaps for x in row if x is not None]
    for got, want in zip(fill(gaps), whole, strict=True):
        for x, y in zip(got, want, strict=True):
            assert x == pytest.approx(min(max(seen), max(min(seen), y)), abs=0.02)


def test_a_problem_that_a_candidates_demos_show_does_not_count():
    demo = encode_demos([{"q": "p", "a": 1, SOURCE: "p"}])
    shows = make_candidate({"solve.instructions": "a", "solve.demos": demo})
    pool = RolloutPool().plus(
        [rollout(c, p, r) for c, r in ((A, 0.5), (shows, 1.0)) for p in ("p", "q")]
    )
    others, child = paired(pool, shows, [A])
    assert (others, child) == ([[0.5]], [1.0]), "q alone"


def test_pairs_meet_on_common_problems_only():
    pool = RolloutPool().plus(
        [rollout(A, p, 0.0) for p in "pqr"] + [rollout(B, p, 1.0) for p in "qrs"]
    )
    assert paired(pool, B, [A]) == ([[0.0, 0.0]], [1.0, 1.0])
    assert paired(pool, C, [A, B]) == ([[], []], [])


def test_what_was_observed_at_once_is_a_block_and_nothing_else_is():
    pool = RolloutPool().plus(
        [
            *(rollout(A, "p", 0.0), rollout(A, "p", 1.0), rollout(B, "p", 1.0)),
            *(rollout(C, "p", 0.5), rollout(A, "q", 0.0), rollout(B, "r", 0.0)),
            *(rollout(A, "s", 0.0, version=0), rollout(B, "s", 1.0, version=1)),
        ]
    )
    assert observed(pool, A, B) == [([0.0, 1.0], [1.0])], "other problems, other weights"
    assert observed(pool, A, B, C) == [([0.0, 1.0], [1.0, 0.5])]


def test_wins_count_where_the_best_has_run():
    pool = RolloutPool().plus(
        [rollout(A, "p", 0.0), rollout(B, "p", 1.0), rollout(A, "q", 1.0), rollout(C, "q", 0.0)]
    )
    table = score_table(pool, [A, B, C])
    assert table.score_K_P[0] == (0.0, 1.0), "B is fitted to be the best on q as well"
    assert table.seen_K_P == ((0.0, None), (1.0, None), (None, None))


def test_a_minibatch_is_mostly_failures_of_different_problems():
    rollouts = [rollout(problem=f"p{n % 6}", reward=float(n % 6 > 2)) for n in range(24)]
    chosen = minibatch(rollouts, 8, random.Random(0))
    assert len(chosen) == 8
    assert {r.example_id for r in chosen if not r.reward} == {"p0", "p1", "p2"}
    assert sum(r.reward for r in chosen) >= 2
    assert chosen == minibatch(rollouts, 8, random.Random(0))
    assert len(minibatch(rollouts[:3], 8, random.Random(0))) == 3


def test_a_pool_goes_through_json_unchanged():
    odd = PredictorTrace("solve", {"q": object(), "long": "x" * 9000}, None, "y" * 9000)
    pool = RolloutPool().plus(
        [rollout(), rollout(traces=(odd,), failure=Failure("parse", "no"), version=3)]
    )
    again = pool_from_json(json.loads(json.dumps(pool.rollouts, default=vars)))
    assert again == pool
    assert again.rollouts[0].calls == () and len(again.rollouts[1].traces[0].text) == 4000


LOST = Failure("infrastructure", "connection reset")


def test_lost_rollouts_say_nothing_of_a_candidate():
    pool = RolloutPool().plus(
        [
            *(rollout(A, "p", 1.0), rollout(A, "p", 0.0, failure=LOST), rollout(B, "p", 1.0)),
            *(rollout(A, "q", 0.0, failure=LOST), rollout(B, "q", 1.0)),
        ]
    )
    assert problem_means(pool, A) == {"p": 1.0} and len(pool.rollouts) == 3
    assert observed(pool, B, A) == [([1.0], [1.0])] and paired(pool, B, [A]) == ([[1.0]], [1.0])
    assert RolloutPool().plus([rollout(failure=LOST)]) == RolloutPool()


def test_what_is_long_is_written_without_its_middle():
    long = (
        "Lesson: visas go to silver.\n" + "It is said again. " * 99_999 + "\nRule: taxes to teal."
    )
    turn = Turn(long, long, long, 0.0, "ok", 0.0, 1, {"reasoning": long})
    pool = RolloutPool().plus(
        [
            rollout(
                feedback=long,
                feedback_by_predictor={"solve": long},
                failure=Failure("program", long),
                turns=(turn,),
            )
        ]
    )
    (kept,) = pool.rollouts
    assert len(json.dumps(pool.rollouts, default=vars)) < 40_000
    assert kept.feedback == kept.feedback_by_predictor["solve"] == kept.failure.message
    assert marked_lessons(kept.feedback) == ["visas go to silver.", "taxes to teal."]


def test_what_was_left_out_and_half_sentences_are_no_lessons():
    whole = [f"Sentence number {n} is about something else." for n in range(999)]
    (kept,) = RolloutPool().plus([rollout(feedback=" ".join(whole))]).rollouts
    assert 3800 < len(kept.feedback) <= 4010
    assert set(unmarked_sentences(kept.feedback)) < set(whole)
    for sentence, join in (
        ("Ask Dr. Example in ward {} about it.", " "),
        ("第{}条：签证的信件送到银色部门。", ""),
    ):
        own = [sentence.format(n) for n in range(999)]
        (kept,) = RolloutPool().plus([rollout(feedback=join.join(own))]).rollouts
        head, tail = kept.feedback.split("\n\n[...]\n\n")
        assert head.endswith(tuple(own)) and tail.startswith(tuple(own))
    listed = "Lessons:\n" + "\n".join(f"- {sentence}" for sentence in whole)
    (kept,) = RolloutPool().plus([rollout(feedback=listed)]).rollouts
    assert set(marked_lessons(kept.feedback)) < set(whole)


def test_feedback_of_ordinary_length_is_kept_as_it_is():
    own = {"feedback": "a\n" * 2000, "failure": Failure("parse", "b" * 4000)}
    assert RolloutPool().plus([rollout(calls=(), **own)]).rollouts == (rollout(calls=(), **own),)
