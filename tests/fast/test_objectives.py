"""A metric's objective scores: kept with rollouts, and what gepa's kinds of front make of them."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from gepa.strategies.candidate_selector import ParetoCandidateSelector
from records import make_rollout
from rule_runner import NAME, SEED, TRAIN, VAL, RuleRunner, Scripted, run
from simulated_loop import ScriptedRunner, simulate

from fst_dspy.config import FastConfig, FSTConfig
from fst_dspy.errors import ConfigError, MetricError
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.pool import RolloutPool, score_table
from fst_dspy.fast.population import choose, columns
from fst_dspy.fast.trials import TrialPhase
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.health import check_objectives
from fst_dspy.run.records import as_read_back, rollout_from_json
from fst_dspy.student.candidate import (
    example_id,
    make_candidate,
    population_from_json,
    population_to_json,
)
from fst_dspy.types import Failure

GOOD, SHORT, POLITE = (
    make_candidate({NAME: text, "solve.demos": "[]"}) for text in ("good", "short", "polite")
)
SCORES = [[1.0] * 8, [0.0] * 8, [0.0] * 8]
OBJECTIVES = [
    [{"right": 1.0, "short": 0.0}] * 8,
    [{"right": 0.0, "short": 1.0}] * 8,
    [{"right": 0.0, "short": 0.0}] * 7 + [{"right": 2.0, "short": 0.0}],
]


def chosen(frontier, objectives=OBJECTIVES):
    members, ids = [GOOD, SHORT, POLITE], list("abcdefgh")
    found = choose(members, SCORES, ids, 3, 0, objective_K_V=objectives, frontier=frontier)
    return {c.components[NAME] for c in found.candidates}, found


def test_the_front_decides_who_is_kept():
    assert chosen("instance")[0] == {"good"}, "the others are clearly worse"
    for frontier in ("objective", "hybrid", "cartesian"):
        names, found = chosen(frontier)
        assert names == {"good", "short"}, "best in an objective; a single cell is no niche"
        assert found.objective_K_V[1] == tuple(OBJECTIVES[1])
    assert chosen("cartesian", ())[0] == {"good"}, "no objectives: over examples"


def test_columns_are_those_of_gepa():
    scores, cells = [[0.5, 1.0]], [[{"b": 1.0, "a": 0.0}, {"b": 0.0, "a": 0.5}]]
    assert columns("instance", scores, cells) == [[0.5, 1.0]]
    assert columns("objective", scores, cells) == [[0.25, 0.5]]
    assert columns("hybrid", scores, cells) == [[0.5, 1.0, 0.25, 0.5]]
    assert columns("hybrid", [[1.0] * 5], [cells[0][:1] * 5]) == [[1.0] * 5 + [0.0, 1.0] * 2]
    assert columns("cartesian", scores, cells) == [[0.0, 1.0, 0.5, 0.0]]


class Styles(RuleRunner):
    """The reward is what is right; one candidate is right, another short."""

    def rollout(self, job, salt):
        kind = job.candidate.components[NAME].split()[0]
        right = float(kind == "good")
        return make_rollout(
            right,
            example_id=example_id(job.example),
            candidate_id=job.candidate.id,
            objective_scores={"right": right, "short": float(kind == "short")},
        )


def start_of(*members):
    scored = evaluate(Styles(), members, VAL)
    ids = [example_id(e) for e in VAL]
    return choose(members, scored.score_K_V, ids, 4, 0, objective_K_V=scored.objective_K_V,
                  frontier="objective")  # fmt: skip


class Watching(ParetoCandidateSelector):
    """Keeps the kinds and keys of the fronts it draws from."""

    def __init__(self):
        super().__init__(None)
        self.kinds, self.keys, self.drawn = set(), set(), set()

    def select_candidate_idx(self, state):
        self.kinds.add(state.frontier_type)
        self.keys |= set(state.get_pareto_front_mapping())
        k = super().select_candidate_idx(state)
        self.drawn.add(state.program_candidates[k][NAME])
        return k


def with_selector(monkeypatch):
    watching = Watching()
    for module in ("iterations", "trials"):
        path = f"fst_dspy.fast.{module}.candidate_selector"
        monkeypatch.setattr(path, lambda config, own, rng: watching)
    return watching


@pytest.mark.parametrize("frontier", get_args(get_type_hints(FastConfig)["frontier_type"]))
def test_parents_are_drawn_from_gepas_front(frontier, monkeypatch):
    watching = with_selector(monkeypatch)
    count = iter(range(100))
    proposer = Scripted(lambda n, texts, names: {NAME: f"good {next(count)}"})
    phase = FastPhase(FastConfig(frontier_type=frontier, merge_iterations=0), proposer, 0)
    found = run(phase, Styles(), start_of(GOOD, SHORT), iterations=6)
    assert watching.kinds == {frontier}
    if frontier == "instance":
        assert watching.drawn == {"good"} and not any("short" in k for k in map(str, watching.keys))
    else:
        assert frontier == "hybrid" or "short" in watching.drawn  # there it has 1 key of 26
        assert any("short" in str(key) for key in watching.keys)
    assert ("short" in {c.components[NAME] for c in found.candidates}) is (frontier != "instance")
    assert all(set(cell) == {"right", "short"} for row in found.objective_K_V for cell in row)


def test_trials_go_by_objectives_too(monkeypatch):
    watching = with_selector(monkeypatch)
    count = iter(range(1000))

    def reward(example, candidate, step, rng):
        return float(candidate.components[NAME].startswith("good")), ""

    class Both(ScriptedRunner):
        def rollout(self, job, salt):
            short = float(job.candidate.components[NAME].startswith("short"))
            made = super().rollout(job, salt)
            return replace(made, objective_scores={"right": made.reward, "short": short})

    def script(n, texts, names):
        return {NAME: f"{'good' if next(count) % 2 else 'short'} {n}"}

    config = FastConfig(frontier_type="objective", acceptance_criterion="improvement_or_equal")
    phase = TrialPhase(config, Scripted(script), 0, steps_per_cycle=6)
    loop = simulate(phase, Both(reward, 0), SEED, TRAIN, VAL, cycles=2)
    kinds = {c.components[NAME].split()[0] for c in loop.population.candidates}
    assert kinds == {"good", "short"} and "objective" in watching.kinds
    assert loop.population.objective_K_V


def test_a_rollout_without_objectives_has_its_reward_for_each():
    lost = make_rollout(0.0, example_id="b", failure=Failure("parse", "x"))
    whole = make_rollout(0.5, example_id="a", objective_scores={"x": 2.0, "y": 4.0})
    (row,) = score_table(RolloutPool((whole, lost)), [replace(SEED, id="c")]).objective_K_P
    assert row == ({"x": 2.0, "y": 4.0}, {"x": 0.0, "y": 0.0})

    class Half(RuleRunner):
        def rollout(self, job, salt):
            return lost if job.index else whole

    assert evaluate(Half(), [SEED], VAL[:1], samples=2).objective_K_V == (({"x": 1.0, "y": 2.0},),)
    assert evaluate(RuleRunner(), [SEED], VAL).objective_K_V == ()


def test_objectives_survive_json():
    one = make_rollout(1.0, objective_scores={"x": 0.5})
    assert rollout_from_json(json.loads(json.dumps(vars(one)))) == one == as_read_back(one)
    old = {k: v for k, v in vars(one).items() if k != "objective_scores"}
    assert rollout_from_json(old).objective_scores == {}
    population = chosen("objective")[1]
    assert (
        population_from_json(json.loads(json.dumps(population_to_json(population)))) == population
    )
    plain = choose([GOOD], [[1.0]], ["a"], 1, 0)
    assert "objective_K_V" not in population_to_json(plain)
    assert population_from_json(population_to_json(plain)) == plain


def test_a_front_over_objectives_needs_some():
    check_objectives([make_rollout(failure=Failure("parse", "x"))], "objective")
    check_objectives([make_rollout(), make_rollout(objective_scores={"x": 1.0})], "objective")
    with pytest.raises(MetricError, match="objective_scores"):
        check_objectives([make_rollout(), make_rollout(failure=Failure("parse", "x"))], "hybrid")
    with pytest.raises(ConfigError, match="'cartesian'"):
        FSTConfig.make(frontier_type="pareto")
