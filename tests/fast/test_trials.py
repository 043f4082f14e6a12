"""Candidates tried in the slow phase's groups: slots, verdicts, resume, and what it saves."""

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from statistics import mean

import pytest
from rule_runner import NAME, RULES, SEED, Scripted, tickets, words
from simulated_loop import ScriptedRunner, simulate

from fst_dspy.config import FastConfig
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.population import choose
from fst_dspy.fast.proposers.demos import DemoProposer
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.trials import Trial, TrialPhase, lineup
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.student.candidate import example_id, make_candidate
from fst_dspy.types import Failure

TRAIN, VAL = tickets(200, 1), tickets(48, 2)
WHOLE = make_candidate({**SEED.components, NAME: "\n".join(["Answer.", *RULES.values()])})


def chance(example, candidate, step):
    """Right 6 times in 10 where the prompt states the rule, and more as the weights learn."""
    learned = 1 - 0.97**step
    known = RULES[example.topic] in candidate.components[NAME]
    return 0.6 + 0.38 * learned if known else 0.06 + 0.1 * learned


def reward(example, candidate, step, rng):
    right = rng.random() < chance(example, candidate, step)
    return float(right), "Correct." if right else f"Wrong. Lesson: {RULES[example.topic]}"


class Clumsy(LessonProposer):
    """Adds two lessons at a time, and every third proposal loses half of all."""

    calls = 0

    def propose(self, components, records, names):
        texts = super().propose(components, records, names)
        self.calls += 1
        for name, text in texts.items():
            old, lines = components[name].split("\n"), text.split("\n")
            if self.calls % 3 == 0:
                texts[name] = "\n".join([lines[0], *lines[1::2]])
            else:
                texts[name] = "\n".join([*old, *[x for x in lines if x not in old][:2]])
        return texts


def make_phase(reuse, proposer, seed, **config):
    if reuse:
        return TrialPhase(FastConfig(**config), proposer, seed, steps_per_cycle=6)
    return FastPhase(FastConfig(**config), proposer, seed)


def loop_with(reuse, kind=Clumsy, seed=0, **more):
    phase = make_phase(reuse, kind(256, words), seed)
    return simulate(phase, ScriptedRunner(reward, seed), SEED, TRAIN, VAL, **more), phase


def test_reuse_costs_a_tenth_at_most_and_loses_nothing():
    accuracy = {True: [], False: []}
    for reuse in (True, False):
        for seed in range(3):
            loop, _ = loop_with(reuse, seed=seed)
            accuracy[reuse].append(mean(chance(e, loop.best, 36) for e in VAL))
            share = loop.counts.fast / loop.counts.total
            if reuse:
                assert share <= 0.10 and loop.after_first.fast == 0
            else:
                assert share > 0.3
    assert mean(accuracy[True]) > mean(accuracy[False]) - 0.03
    assert mean(accuracy[True]) > 0.75


def test_the_same_seed_gives_the_same_run_and_a_resume_changes_nothing():
    def resumed(phase):
        other = TrialPhase(phase.config, Clumsy(256, words), 0, steps_per_cycle=6)
        other.proposer.calls = phase.proposer.calls
        other.load_state(json.loads(json.dumps(phase.state(), default=vars)))
        return other

    whole, again = loop_with(True, cycles=3)[0], loop_with(True, cycles=3)[0]
    cut = loop_with(True, cycles=3, after=resumed)[0]
    assert whole == again == cut
    assert loop_with(True, seed=1, cycles=3)[0].population != whole.population


def ranked_population(*candidates):
    rows = [[1.0 - 0.1 * k] * 2 for k in range(len(candidates))]
    return choose(candidates, rows, ["x", "y"], 4, 0)


M = [make_candidate({NAME: f"text {n}", "solve.demos": "[]"}) for n in range(5)]
CHILD = make_candidate({NAME: "child", "solve.demos": "[]"}, [M[0].id], 1, "instructions")


@pytest.mark.parametrize(
    ("members", "parents", "group_size", "k", "expected"),
    [
        (4, [0], 8, 4, {0: 2, 1: 2, 2: 2, "child": 2}),
        (4, [3], 8, 4, {0: 2, 1: 2, 3: 2, "child": 2}),
        (4, [2, 3], 8, 4, {0: 2, 2: 2, 3: 2, "child": 2}),
        (2, [0], 8, 4, {0: 3, 1: 3, "child": 2}),
        (1, [0], 8, 4, {0: 4, "child": 4}),
        (1, [0], 2, 1, {0: 1, "child": 1}),
        (2, [1], 8, 2, {0: 3, 1: 3, "child": 2}),
        (2, [1], 2, 2, {1: 1, "child": 1}),
    ],
)
def test_a_trial_takes_the_slots_of_the_weakest(members, parents, group_size, k, expected):
    trial = Trial(CHILD, tuple(M[i] for i in parents), 0, 3)
    slots = lineup(ranked_population(*M[:members]), trial, group_size, k)
    names = {m.id: n for n, m in enumerate(M)} | {CHILD.id: "child"}
    assert Counter(names[c.id] for c in slots) == expected and len(slots) == group_size


def step_through(phase, population, runner, steps):
    for _ in range(steps):
        jobs = [
            RolloutJob(example, candidate, index)
            for example in TRAIN[8 * runner.step : 8 * runner.step + 8]
            for index, candidate in enumerate(phase.lineup(population, 8))
        ]
        rollouts = runner.run(jobs, channel="slow", salt=runner.step)
        runner.step += 1
        population = phase.after_step(
            population, TRAIN, rollouts, cycle=1, policy_version=runner.step
        )
    return population


def started(text, first=SEED, **config):
    """A phase whose proposer always gives the same text, after one step without a trial."""
    phase = make_phase(True, Scripted(lambda n, c, names: {NAME: text}), 0, **config)
    runner = ScriptedRunner(reward, 0)
    population = choose([first], [[0.0]], ["x"], 4, 0)
    return phase, runner, step_through(phase, population, runner, 1)


def test_a_better_child_joins_after_its_trial_without_extra_rollouts():
    phase, runner, population = started(WHOLE.components[NAME])
    assert phase.trial.child.id == WHOLE.id and phase.trial.steps_left == 3
    population = step_through(phase, population, runner, 3)
    assert WHOLE.id in [c.id for c in population.candidates]
    assert (phase.stats.proposals, phase.stats.accepted) == (1, 1)
    assert population.policy_version == 4
    assert set(population.val_ids) <= {example_id(e) for e in TRAIN}
    assert (runner.counts.slow, runner.counts.fast) == (4 * 64, 0)


def test_a_worse_child_is_sent_away_and_not_tried_again():
    phase, runner, population = started("Bare.", first=WHOLE)
    population = step_through(phase, population, runner, 5)
    assert [c.id for c in population.candidates] == [WHOLE.id]
    assert (phase.stats.proposals, phase.stats.rejected) == (1, 1)
    assert phase.trial is None and phase.stats.duplicate == 3
    (verdict,) = phase.take_verdicts()
    assert (verdict.child.parent_ids, verdict.accepted) == ((WHOLE.id,), False)
    assert verdict.changed == {NAME: "Bare."} and sum(verdict.after) < sum(verdict.before)


@pytest.mark.parametrize("source", ["instructions", "merge"])
def test_a_child_whose_rollouts_were_all_lost_does_not_join(source):
    phase, runner, population = started(WHOLE.components[NAME])
    phase.trial = replace(phase.trial, child=replace(phase.trial.child, source=source))
    real = runner.rollout

    def rollout(job, salt):
        made = real(job, salt)
        lost = job.candidate.id == WHOLE.id
        return replace(made, reward=1.0, failure=Failure("infrastructure", "")) if lost else made

    runner.rollout = rollout
    population = step_through(phase, population, runner, 3)
    assert [c.id for c in population.candidates] == [SEED.id]
    (verdict,) = phase.take_verdicts()
    assert not verdict.accepted and "no example" in verdict.reason
    assert {r.candidate_id for r in phase.pool.rollouts} == {SEED.id}


def test_where_all_was_lost_nothing_is_proposed():
    def lost(job, salt):
        return replace(real(job, salt), failure=Failure("infrastructure", ""))

    phase = make_phase(True, Scripted(lambda *_: {NAME: "Bare."}), 0, skip_perfect_score=False)
    runner, population = ScriptedRunner(reward, 0), choose([SEED], [[0.0]], ["x"], 4, 0)
    real, runner.rollout = runner.rollout, lost
    assert step_through(phase, population, runner, 4).candidates == (SEED,)
    assert phase.proposer.names == [] and phase.trial is None


def test_no_iterations_mean_no_trials():
    phase, runner, population = started("Bare.", cycle_iterations=0)
    step_through(phase, population, runner, 2)
    assert phase.trial is None and phase.stats.iterations == 0


def test_only_the_window_counts():
    phase, runner, population = started("Bare.", reuse_window=4)
    step_through(phase, population, runner, 8)
    assert {r.policy_version for r in phase.pool.rollouts} == {5, 6, 7, 8}


def test_merges_are_tried_in_trials_too():
    half = list(RULES.values())
    names = ("a.instructions", "b.instructions")
    root = make_candidate(dict.fromkeys(names, "x"))
    left, right = (
        make_candidate({**root.components, name: "better"}, [root.id], 1, "instructions")
        for name in names
    )

    def by_half(example, candidate, step, rng):
        first = RULES[example.topic] in half[:6]
        return float(candidate.components[names[0 if first else 1]] == "better"), ""

    phase = make_phase(True, Scripted(lambda *_: {}), 0, cycle_iterations=1, merge_iterations=1)
    phase._trials = 1  # the next one is a merge
    phase.judge.remember([root])
    runner = ScriptedRunner(by_half, 0)
    population = step_through(phase, choose([left, right], [[1.0], [0.9]], ["x"], 4, 0), runner, 1)
    assert phase.trial.child.source == "merge" and len(phase.trial.parents) == 2
    population = step_through(phase, population, runner, 6)
    assert phase.stats.merges == 1
    assert any(set(c.components.values()) == {"better"} for c in population.candidates)


def test_demos_come_from_slow_rollouts():
    demos = DemoProposer(120, words)
    phase = TrialPhase(
        FastConfig(demo_tokens=60), Scripted(lambda *_: {}), 0, steps_per_cycle=6, demos=demos
    )
    runner = ScriptedRunner(reward, 0)
    population = step_through(phase, choose([WHOLE], [[0.0]], ["x"], 4, 0), runner, 6)
    assert demos.ready("solve.demos")
    assert phase.trial is not None and phase.trial.child.source == "demos"
    assert population.candidates


class Waiting(Clumsy):
    """Takes its time, like a language model far away."""

    waits, seconds = True, 0.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.threads, self.asked = [], threading.Event()

    def propose(self, components, records, names):
        self.asked.set()
        self.threads.append(threading.current_thread())
        time.sleep(self.seconds)
        return super().propose(components, records, names)


class Late(Waiting):
    seconds = 0.02


def test_a_proposer_that_waits_brings_as_much():
    loop, phase = loop_with(True, Waiting)
    assert any(thread is not threading.main_thread() for thread in phase.proposer.threads)
    assert phase.stats.proposals >= 0.8 * loop_with(True)[1].stats.proposals
    assert mean(chance(e, loop.best, 36) for e in VAL) > 0.75


def test_the_last_step_of_a_trial_does_not_wait_for_the_proposal():
    phase = make_phase(True, Waiting(256, words), 0)
    runner, population = ScriptedRunner(reward, 0), choose([SEED], [[0.0]], ["x"], 4, 0)
    population = step_through(phase, population, runner, 3)
    assert phase.trial.steps_left == 1 and len(phase.proposer.threads) == 1
    phase.proposer.asked.clear()
    real = runner.run

    def run(jobs, **settings):
        assert phase.proposer.asked.wait(60), "not asked before the rollouts"
        return real(jobs, **settings)

    runner.run = run
    before = phase.trial.child.id
    step_through(phase, population, runner, 1)
    assert phase.trial.child.id != before and phase.trial.steps_left == 3


def test_a_proposals_latency_and_a_resume_change_nothing():
    def resumed(phase):
        other = TrialPhase(phase.config, Waiting(256, words), 0, steps_per_cycle=6)
        other.proposer.calls = phase.proposer.calls
        other.load_state(json.loads(json.dumps(phase.state(), default=vars)))
        return other

    whole = loop_with(True, Waiting, cycles=3)[0]
    assert whole == loop_with(True, Late, cycles=3)[0]
    assert whole == loop_with(True, Waiting, cycles=3, after=resumed)[0]
