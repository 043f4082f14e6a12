"""What is accepted: sums but for rounding, and never on lost rollouts or on none."""

import dataclasses
import random

import dspy
import pytest
from gepa.proposer.base import CandidateProposal, SubsampleEvaluation
from gepa.strategies.acceptance import ImprovementOrEqualAcceptance, StrictImprovementAcceptance
from records import make_rollout
from rule_runner import NAME, RULES, SEED, TRAIN, RuleRunner, Scripted, run, scored

from fst_dspy.config import FastConfig
from fst_dspy.fast.acceptance import BySums, criterion_for, proposal_of, without_lost
from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.gepa.strategies import NAMED, Strategies, WorstFirstComponentSelector
from fst_dspy.fast.gepa.strategies import acceptance_criterion as criterion_of
from fst_dspy.fast.judge import Judge
from fst_dspy.fast.memory import Memory
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.reflector import Trajectory
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import Failure, PredictorTrace

LOST = Failure("infrastructure", "connection reset")
CHILD = make_candidate({**SEED.components, NAME: "Child."}, [SEED.id], 1, "instructions")
MERGE = make_candidate(CHILD.components, [SEED.id], 1, "merge")
STATE = None  # gepa's criteria read the proposal alone


def accepts(rule, before, after):
    return rule.should_accept(proposal_of(CHILD, [before], after), STATE)


STRICT, AS_WELL = (
    criterion_of(FastConfig(acceptance_criterion=name), NAMED)
    for name in ("strict_improvement", "improvement_or_equal")
)


@pytest.mark.parametrize(
    ("before", "after", "strict", "as_well"),
    [
        ([0.3, 0.2, 0.1], [0.1, 0.2, 0.3], False, True),
        ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], False, True),
        ([0.3, 0.0], [0.1, 0.2], False, True),
        ([1e9, 0.1, 0.2], [0.2, 0.1, 1e9], False, True),
        ([0.0, 0.0], [0.0, 1e-6], True, True),
        ([0.0, 1e-6], [0.0, 0.0], False, False),
        ([1.0, 0.0], [1.0, 1.0], True, True),
    ],
)
def test_a_tie_is_one_however_it_was_added_up(before, after, strict, as_well):
    assert accepts(STRICT, before, after) is strict
    assert accepts(AS_WELL, before, after) is as_well
    assert accepts(criterion_for(MERGE, SEED, STRICT), before, after) is as_well


def test_ties_of_tenths_are_none_that_rounding_decides():
    rng, ties = random.Random(0), 0
    for _ in range(2000):
        one, other = ([rng.randrange(11) for _ in range(12)] for _ in range(2))
        if sum(one) == sum(other):
            ties += 1
            rows = [[tenths / 10 for tenths in row] for row in (one, other)]
            assert not accepts(STRICT, *rows) and accepts(AS_WELL, *rows)
    assert ties > 20


def test_the_users_own_criterion_is_asked_as_it_is():
    own = StrictImprovementAcceptance()
    assert criterion_of(FastConfig(), Strategies(acceptance_criterion=own)) is own
    assert criterion_for(CHILD, SEED, own) is own
    assert isinstance(criterion_for(MERGE, SEED, own), BySums)


class Always:
    def should_accept(self, proposal, state):
        return True


@pytest.mark.parametrize("rule", [STRICT, AS_WELL, ImprovementOrEqualAcceptance(), Always()])
@pytest.mark.parametrize("child", [CHILD, MERGE])
def test_nothing_that_was_observed_accepts_nothing(rule, child):
    judge = Judge(rule)
    assert not judge.accepts(child, [SEED], proposal_of(child, [[]], []), STATE, [])
    (verdict,) = judge.take_verdicts()
    assert "no example" in verdict.reason and judge.stats.rejected == 1
    assert MERGE.id not in judge.ancestors


def minibatch_of(before, after):
    """A proposal as gepa's, of rewards; a lost rollout has ``None``, and is scored 0."""
    sides = [
        [make_rollout(r or 0.0, failure=LOST if r is None else None) for r in rewards]
        for rewards in (before, after)
    ]
    scores = [[rollout.reward for rollout in side] for side in sides]
    return CandidateProposal(
        candidate=dict(CHILD.components),
        parent_program_ids=[0],
        subsample_indices=list(range(len(before))),
        subsample_scores_before=scores[0],
        subsample_scores_after=scores[1],
        eval_before=SubsampleEvaluation(scores[0], sides[0]),
        eval_after=SubsampleEvaluation(scores[1], sides[1]),
    )


@pytest.mark.parametrize(
    ("before", "after", "accepted"),
    [
        ([None, None, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], False),
        ([1.0, 1.0, 1.0, 0.0], [None, None, 1.0, 1.0], True),
        ([None, 1.0], [1.0, None], False),
        ([0.0, 1.0], [1.0, 1.0], True),
    ],
)
def test_what_was_lost_counts_for_neither_side(before, after, accepted):
    judge, proposal = Judge(STRICT), minibatch_of(before, after)
    blocks = [
        ([a], [b])
        for a, b in zip(
            proposal.subsample_scores_after, proposal.subsample_scores_before, strict=True
        )
    ]
    assert judge.accepts(CHILD, [SEED], proposal, STATE, blocks) is accepted
    (verdict,) = judge.take_verdicts()
    kept = [(b, a) for b, a in zip(before, after, strict=True) if None not in (a, b)]
    assert [*zip(verdict.before, verdict.after, strict=True)] == kept
    if not accepted:
        assert verdict.reason == judge.reason(proposal, STATE)


def test_a_child_is_not_proven_by_its_parents_outage():
    judge, proposal = Judge(STRICT), minibatch_of([None] * 11 + [0.0], [1.0] * 12)
    blocks = [([1.0], [0.0])] * 12
    assert judge.accepts(CHILD, [SEED], proposal, STATE, blocks)
    assert (judge.stats.accepted, judge.stats.proven) == (1, 0)
    assert without_lost(minibatch_of([0.0], [1.0])) == minibatch_of([0.0], [1.0])


class Outage(RuleRunner):
    """Loses the rollouts that ``lost`` says: by the run's number, from 1, and the job's index."""

    def __init__(self, lost):
        super().__init__()
        self.lost = lost

    def rollout(self, job, salt):
        made = super().rollout(job, salt)
        if not self.lost(len(self.runs), job.index):
            return made
        return dataclasses.replace(made, reward=0.0, feedback="connection reset", failure=LOST)


def whole(n, texts, names):
    return {NAME: "\n".join(["Answer.", *RULES.values()])}


def test_an_outage_while_the_parent_runs_accepts_no_child():
    runner, population = Outage(lambda number, index: number == 2), scored(RuleRunner(), SEED)
    runner.runs.append(("fast", 0, 0))
    phase = FastPhase(FastConfig(), Scripted(whole), 0)
    found = run(phase, runner, population, iterations=1)
    assert found.candidates == (SEED,) and phase.stats.proposals == 0
    assert phase.proposer.names == [], "there is nothing to reflect on"


def test_lost_rollouts_are_not_reflected_on():
    runner = Outage(lambda number, index: index % 2 == 0)
    shown = []

    class Watches(Scripted):
        def propose(self, components, records, names):
            shown.extend(records[NAME])
            return super().propose(components, records, names)

    phase = FastPhase(FastConfig(), Watches(whole), 0)
    run(phase, runner, scored(RuleRunner(), SEED), iterations=1)
    assert len(shown) == 6 and all("connection" not in record["Feedback"] for record in shown)
    (verdict,) = phase.take_verdicts()
    assert len(verdict.before) == len(verdict.after) == 6


def test_an_adapter_gives_no_trajectories_where_all_were_lost():
    adapter = GepaAdapter(
        Outage(lambda number, index: True), Memory(Scripted(whole)).reflector(()), 1
    )
    assert adapter.evaluate(TRAIN[:3], SEED.components, capture_traces=True).trajectories is None


def test_the_worst_predictor_is_not_one_whose_rollouts_were_lost():
    def trajectory(predictor, reward, failure=None):
        trace = PredictorTrace(predictor, {}, {}, "")
        made = make_rollout(reward, traces=(trace,), failure=failure)
        return Trajectory(dspy.Example(), made)

    class State:
        list_of_named_predictors = ("a.instructions", "b.instructions")
        named_predictor_id_to_update_next_for_program_candidate = (0,)

    rows = [trajectory("a", 0.5), trajectory("b", 0.6), trajectory("b", 0.0, LOST)]
    named = WorstFirstComponentSelector()(State, rows, [], 0, {})
    assert named == ["a.instructions"]
