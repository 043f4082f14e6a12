"""Merge: gepa's crossover over the components of two candidates."""

import random
from collections.abc import Sequence

from records import make_rollout
from rule_runner import VAL, RuleRunner, Scripted, run

from fst_dspy.config import FastConfig
from fst_dspy.fast.merge import merge
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.population import best, choose
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.student.candidate import example_id, make_candidate
from fst_dspy.types import Candidate, PredictorTrace, Rollout

SEED = make_candidate({"a.instructions": "A.", "b.instructions": "B."})


def child(parent: Candidate, **texts: str) -> Candidate:
    changes = {f"{name}.instructions": text for name, text in texts.items()}
    return make_candidate({**parent.components, **changes}, [parent.id], 1, "instructions")


LEFT, RIGHT = child(SEED, a="A better."), child(SEED, b="B better.")
ANCESTORS = {SEED.id: SEED, LEFT.id: LEFT}


def merged(*members: Candidate, means: Sequence[float] = (0.5, 0.5, 0.5, 0.5), seed: int = 0):
    known = {member.id for member in members}
    return merge(members, means[: len(members)], ANCESTORS, known, 2, random.Random(seed))


def test_each_component_comes_from_the_parent_that_changed_it() -> None:
    for seed in range(10):
        found = merged(LEFT, RIGHT, seed=seed)
        assert dict(found.components) == {
            "a.instructions": "A better.",
            "b.instructions": "B better.",
        }
        assert sorted(found.parent_ids) == sorted([LEFT.id, RIGHT.id])
        assert (found.source, found.cycle) == ("merge", 2)


def test_where_both_changed_a_component_the_better_parent_gives_it() -> None:
    both = child(LEFT, b="B too.")
    assert merged(both, RIGHT, means=(0.2, 0.9)).components["b.instructions"] == "B better."
    # The other way round the child would be that parent again, so there is none.
    assert merged(both, RIGHT, means=(0.9, 0.2)) is None


def test_nothing_to_merge() -> None:
    assert merged(LEFT) is None
    assert merged(LEFT, SEED) is None, "one is the other's ancestor"
    assert merged(LEFT, child(SEED, a="A else.")) is None, "the same component: a child is a parent"
    strangers = [make_candidate({"a.instructions": t, "b.instructions": t}) for t in "xy"]
    assert merged(*strangers) is None, "no common ancestor"
    done = merged(LEFT, RIGHT)
    assert merged(LEFT, RIGHT, done) is None, "it is there already"


def test_an_ancestor_better_than_its_descendant_is_no_ancestor() -> None:
    assert merged(LEFT, RIGHT, SEED, means=(0.5, 0.6, 0.9)) is None
    assert merged(LEFT, RIGHT, SEED, means=(0.5, 0.6, 0.1)) is not None


class HalfRunner(RuleRunner):
    """Even examples need predictor a's better text, odd ones predictor b's."""

    def rollout(self, job: RolloutJob, salt: int) -> Rollout:
        ident = example_id(job.example)
        name = "a" if int(ident, 16) % 2 == 0 else "b"
        better = "better" in job.candidate.components[f"{name}.instructions"]
        trace = PredictorTrace(name, {"ticket": "t"}, {"x": "y"}, "")
        return make_rollout(
            float(better), example_id=ident, candidate_id=job.candidate.id, traces=(trace,)
        )


def population_of(*members: Candidate):
    runner = HalfRunner()
    rows = [[runner.rollout(RolloutJob(e, m, 0), 0).reward for e in VAL] for m in members]
    return choose(members, rows, [example_id(e) for e in VAL], 4, 0)


def test_a_fast_phase_merges_what_evolved_apart() -> None:
    runner = HalfRunner()
    phase = FastPhase(FastConfig(), Scripted(lambda *_: {}), 0)
    phase.judge.remember([SEED])
    end = run(phase, runner, population_of(LEFT, RIGHT), iterations=1)
    winner = end.candidates[best(end)]
    assert winner.source == "merge" and sorted(winner.parent_ids) == sorted([LEFT.id, RIGHT.id])
    assert set(end.score_K_V[best(end)]) == {1.0}
    assert (phase.stats.merges, phase.stats.accepted) == (1, 1)
    # A minibatch for the iteration, another for the merge, and the validation examples.
    assert runner.counts["fast"] == 12 + 12 + 24


def test_merges_are_budgeted_and_can_be_switched_off() -> None:
    runner = HalfRunner()
    phase = FastPhase(FastConfig(merge_iterations=0), Scripted(lambda *_: {}), 0)
    phase.judge.remember([SEED])
    run(phase, runner, population_of(LEFT, RIGHT), iterations=1)
    assert phase.stats.merges == 0 and runner.counts["fast"] == 12


def test_ancestors_survive_a_resume() -> None:
    phase = FastPhase(FastConfig(), Scripted(lambda *_: {}), 0)
    phase.judge.remember([SEED, LEFT])
    other = FastPhase(FastConfig(), Scripted(lambda *_: {}), 0)
    other.load_state(phase.state())
    assert other.state() == phase.state()
