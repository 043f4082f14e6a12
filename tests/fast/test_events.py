"""gepa's callbacks hear of fast phases and trials as of gepa's own, and stop callbacks end them."""

import logging

import dspy
import pytest
from gepa.core import callbacks as gepa_callbacks
from gepa.utils import MaxCandidateProposalsStopper, ScoreThresholdStopper
from records import make_rollout
from rule_runner import NAME, RULES, SEED, TRAIN, VAL, RuleRunner, Scripted, run, scored, words
from simulated_loop import ScriptedRunner, simulate

from fst_dspy import FST
from fst_dspy.config import FastConfig
from fst_dspy.errors import ConfigError
from fst_dspy.fast.gepa.events import Events
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.population import best, choose
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.trials import TrialPhase
from fst_dspy.student.candidate import example_id, make_candidate

EVENTS = {
    "on_" + "".join(f"_{c.lower()}" if c.isupper() else c for c in name[:-5])[1:]: event
    for name, event in vars(gepa_callbacks).items()
    if name.endswith("Event")
}


class Listener:
    """Keeps all it hears, and the methods whose event is not of gepa's type."""

    def __init__(self):
        self.heard, self.wrong = [], []

    def __getattr__(self, method):
        if not method.startswith("on_"):
            raise AttributeError(method)
        return lambda event: self.hear(method, event)

    def hear(self, method, event):
        self.heard.append((method, event))
        if set(event) != set(EVENTS[method].__annotations__):
            self.wrong.append(method)

    def of(self, *methods):
        return [event for method, event in self.heard if method in methods]

    def names(self, iteration):
        return [name for name, event in self.heard if event.get("iteration") == iteration]


def metric(gold, pred, trace=None):
    return 1.0


def phase_with(*listeners, proposer=None, calls=None, stoppers=(), **config):
    runner = RuleRunner()
    start = scored(runner, SEED)
    runner.counts.clear()
    events = Events(listeners, stoppers, calls=runner.counts.total, max_calls=500)
    proposer = proposer or LessonProposer(256, words)
    return FastPhase(FastConfig(**config), proposer, 0, events=events), runner, start


def test_a_fast_phase_is_told_as_gepa_tells_it():
    listener = Listener()
    phase, runner, start = phase_with(listener)
    found = run(phase, runner, start, iterations=4)
    (begun,) = listener.of("on_optimization_start")
    assert begun["seed_candidate"] == SEED.components and begun["config"]["minibatch_size"] == 12
    assert (begun["trainset_size"], begun["valset_size"]) == (len(TRAIN), len(VAL))
    assert [e["iteration"] for e in listener.of("on_iteration_start")][:4] == [1, 2, 3, 4]
    accepted = listener.of("on_candidate_accepted")
    rejected = listener.of("on_candidate_rejected", "on_merge_rejected")
    assert len(accepted) == phase.stats.accepted > 0 and len(rejected) == phase.stats.rejected
    assert len(listener.of("on_iteration_end")) == phase.stats.iterations
    ended = {e["iteration"]: e["proposal_accepted"] for e in listener.of("on_iteration_end")}
    assert [n for n, was in ended.items() if was] == [e["iteration"] for e in accepted]
    first = accepted[0]["iteration"]
    assert listener.names(first) == [
        "on_iteration_start",
        "on_candidate_selected",
        "on_minibatch_sampled",
        "on_evaluation_start",
        "on_evaluation_end",
        "on_budget_updated",
        "on_reflective_dataset_built",
        "on_proposal_start",
        "on_proposal_end",
        "on_evaluation_start",
        "on_evaluation_end",
        "on_budget_updated",
        "on_budget_updated",
        "on_pareto_front_updated",
        "on_valset_evaluated",
        "on_candidate_accepted",
        "on_iteration_end",
    ]
    (valued, *_) = listener.of("on_valset_evaluated")
    assert set(valued["scores_by_val_id"]) == {example_id(e) for e in VAL}
    assert valued["candidate"][NAME] != SEED.components[NAME]
    last = listener.of("on_budget_updated")[-1]
    assert last["metric_calls_used"] <= runner.counts.total()
    assert last["metric_calls_remaining"] == 500 - last["metric_calls_used"]
    phase.validated(found, found.val_ids, found.score_K_V[best(found)])
    valued = listener.of("on_valset_evaluated")[-len(found.candidates) :]
    assert [e["candidate"] for e in valued] == [c.components for c in found.candidates]
    assert [e["is_best_program"] for e in valued].count(True) == 1
    phase.end(found)
    (ended,) = listener.of("on_optimization_end")
    assert ended["total_metric_calls"] == runner.counts.total()
    assert ended["total_iterations"] == phase.stats.iterations
    run(phase, runner, found, iterations=1, cycle=2)
    assert len(listener.of("on_optimization_start")) == 1, "once in a run"
    assert listener.wrong == []
    assert listener.of("on_iteration_start")[-2]["iteration"] > 4 or phase.stats.iterations == 5


def test_listeners_change_nothing():
    quiet, runner, start = phase_with()
    loud, other, _ = phase_with(Listener())
    assert run(quiet, runner, start) == run(loud, other, start)
    assert quiet.state() == loud.state() and runner.runs == other.runs


def test_a_skipped_minibatch_and_an_error_are_told():
    listener = Listener()
    phase, runner, start = phase_with(listener, skip_perfect_score=True, perfect_score=0.0)
    run(phase, runner, start, iterations=1)
    (skipped,) = listener.of("on_evaluation_skipped")
    assert skipped["reason"] == "all_scores_perfect" and skipped["iteration"] == 1
    phase, runner, start = phase_with(listener, proposer=Scripted(lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run(phase, runner, start, iterations=1)
    (error,) = listener.of("on_error")
    assert isinstance(error["exception"], ZeroDivisionError) and not error["will_continue"]


def test_a_callback_that_fails_is_told_of(caplog):
    class Broken:
        def on_iteration_start(self, event):
            raise RuntimeError("no")

    phase, runner, start = phase_with(Broken())
    with caplog.at_level(logging.WARNING):
        run(phase, runner, start, iterations=1)
    assert "failed on on_iteration_start: no" in caplog.text


def test_a_merge_is_told():
    listener = Listener()
    root = make_candidate({"a.instructions": "0", "b.instructions": "0"})
    left = make_candidate({"a.instructions": "1", "b.instructions": "0"}, [root.id], 1)
    right = make_candidate({"a.instructions": "0", "b.instructions": "1"}, [root.id], 1)

    class Perfect(RuleRunner):
        def rollout(self, job, salt):
            own = {"example_id": example_id(job.example), "candidate_id": job.candidate.id}
            return make_rollout(1.0, **own)

    rows = [[1.0] * len(VAL)] * 2
    start = choose([left, right], rows, [example_id(e) for e in VAL], 4, 0)
    events = Events([listener])
    phase = FastPhase(FastConfig(), Scripted(lambda *_: {}), 0, events=events)
    phase.judge.remember([root])
    found = run(phase, Perfect(), start, iterations=1)
    merged = {"a.instructions": "1", "b.instructions": "1"}
    (tried,) = listener.of("on_merge_attempted")
    assert tried["merged_candidate"] == merged and tried["iteration"] == 2
    (accepted,) = listener.of("on_merge_accepted")
    assert accepted["parent_ids"] == tried["parent_ids"]
    assert len(listener.of("on_candidate_accepted")) == 1
    assert listener.wrong == []
    assert merged in [dict(c.components) for c in found.candidates]


# Trials


def reward(example, candidate, step, rng):
    known = RULES[example.topic] in candidate.components[NAME]
    right = rng.random() < (0.7 if known else 0.06)
    return float(right), "Correct." if right else f"Wrong. Lesson: {RULES[example.topic]}"


def trials_with(listener, proposer=None, stoppers=(), cycles=2):
    runner = ScriptedRunner(reward, 0)
    events = Events([listener], stoppers, calls=lambda: runner.counts.total)
    proposer = proposer or Slowly(256, words)
    phase = TrialPhase(FastConfig(), proposer, 0, steps_per_cycle=6, events=events)
    return simulate(phase, runner, SEED, TRAIN, VAL, cycles=cycles), phase, runner


class Slowly(LessonProposer):
    """Adds two lessons at a time."""

    def propose(self, components, records, names):
        texts = super().propose(components, records, names)
        new = {n: [x for x in t.split("\n") if x not in components[n]] for n, t in texts.items()}
        return {name: "\n".join([components[name], *lines[:2]]) for name, lines in new.items()}


class Waiting(Slowly):
    """Is asked ahead, in another thread."""

    waits = True


@pytest.mark.parametrize("kind", [Slowly, Waiting])
def test_trials_are_told_as_iterations(kind):
    listener = Listener()
    _, phase, runner = trials_with(listener, kind(256, words))
    stats = phase.stats
    starts = [e["iteration"] for e in listener.of("on_iteration_start")]
    assert starts == list(range(1, stats.iterations + 1))
    under_way = int(phase.trial is not None)
    ends = [e["iteration"] for e in listener.of("on_iteration_end")]
    assert ends == starts[: len(starts) - under_way]
    accepted = listener.of("on_candidate_accepted")
    rejected = listener.of("on_candidate_rejected", "on_merge_rejected")
    assert (len(accepted), len(rejected)) == (stats.accepted, stats.rejected)
    told = [listener.names(n) for n in starts[8:]]
    reflected = [names for names in told if "on_proposal_end" in names]
    assert reflected
    for names in reflected:
        own = [name for name in names if name != "on_budget_updated"]
        assert own[:5] == [
            "on_iteration_start",
            "on_candidate_selected",
            "on_reflective_dataset_built",
            "on_proposal_start",
            "on_proposal_end",
        ]
    assert listener.of("on_budget_updated")[-1]["metric_calls_used"] <= runner.counts.total
    assert listener.of("on_pareto_front_updated") and listener.wrong == []


# Stop callbacks


def test_a_stop_callback_ends_a_fast_phase():
    stopper = MaxCandidateProposalsStopper(3)
    phase, runner, start = phase_with(stoppers=[stopper])
    found = run(phase, runner, start, iterations=8)
    assert phase.stats.iterations == 3 and found.candidates
    assert "MaxCandidateProposalsStopper" in phase.report()["stopped"]
    run(phase, runner, found, iterations=8, cycle=2)
    assert phase.stats.iterations == 3, "it has ended for good"


def test_a_stop_callback_sees_gepas_state():
    seen = []

    def stop(gepa_state):
        seen.append((gepa_state.i, gepa_state.total_num_evals, len(gepa_state.program_candidates)))
        assert len(gepa_state.program_full_scores_val_set) == len(gepa_state.program_candidates)
        return False

    phase, runner, start = phase_with(stoppers=[stop])
    run(phase, runner, start, iterations=4)
    assert [i for i, _, _ in seen] == [-1, 0, 1, 2]
    evals = [n for _, n, _ in seen]
    assert evals[0] == 0 and evals == sorted(evals) and evals[-1] > 24
    assert "stopped" not in phase.report()


def test_a_stop_callback_ends_trials():
    whole = trials_with(Listener(), cycles=3)[1]
    listener = Listener()
    _, phase, _ = trials_with(listener, stoppers=[MaxCandidateProposalsStopper(10)], cycles=3)
    assert phase.stats.iterations == 10 < whole.stats.iterations and phase.trial is None
    assert "stopped" in phase.report()


def test_validation_scores_decide_at_the_end_of_a_cycle():
    for threshold, stopped in ((0.9, True), (0.96, False)):
        events = Events(stoppers=[ScoreThresholdStopper(threshold)])
        phase = TrialPhase(FastConfig(), LessonProposer(256, words), 0, steps_per_cycle=6,
                           events=events)  # fmt: skip
        population = choose([SEED], [[0.1, 0.2]], ["x", "y"], 4, 0)
        phase.validated(population, ["v", "w", "z", "q"], [1.0, 1.0, 1.0, 0.8])
        assert ("stopped" in phase.report()) is stopped


# What is no callback


class DspyCallback(dspy.utils.callback.BaseCallback):
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callbacks": [object()]}, "on_candidate_accepted"),
        ({"callbacks": [Listener]}, "some of"),
        ({"callbacks": [DspyCallback()]}, "dspy.configure"),
        ({"callbacks": "all"}, "a list"),
        ({"stop_callbacks": [lambda: True]}, "StopperProtocol"),
        ({"stop_callbacks": 5}, "StopperProtocol"),
        ({"stop_callbacks": ScoreThresholdStopper}, "StopperProtocol"),
    ],
)
def test_what_is_no_callback_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        FST(metric, **given)
    listener, stop = Listener(), ScoreThresholdStopper(0.5)
    strategies = FST(metric, callbacks=[listener], stop_callbacks=stop).strategies
    assert strategies.callbacks == (listener,) and strategies.stop_callbacks == (stop,)
