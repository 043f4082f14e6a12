"""Validation with several samples an example: it ends early where it is clear, and only there."""

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers import questions
from records import make_cycle
from rule_runner import SEED
from simulated_loop import ScriptedRunner

from fst_dspy.config import FSTConfig
from fst_dspy.loop.state import LoopState
from fst_dspy.loop.validation import score
from fst_dspy.student.candidate import example_id
from fst_dspy.types import Population, RolloutCounts

VAL = questions(24)


def validated(share: float, peak: float, seed: int = 0, samples: int = 4) -> tuple[float, int]:
    """The score and the rollouts of a later validation of a pair that is right so often."""

    def reward(example: Any, candidate: Any, step: int, rng: random.Random) -> tuple[float, str]:
        return float(rng.random() < share), ""

    runner = ScriptedRunner(reward, seed)
    parts = SimpleNamespace(
        runner=runner,
        valset=VAL,
        config=FSTConfig.make(val_samples=samples),
        fast=SimpleNamespace(reuses=True),
        fast_on=True,
        policy=SimpleNamespace(step=0, base_version="v"),
        lm=SimpleNamespace(version="v"),
        spec=SimpleNamespace(seed=0),
    )
    ids = tuple(map(example_id, VAL))
    population = Population((SEED,), ids, ((0.0,) * len(VAL),), 0)
    right = round(peak * len(VAL))
    peak_V = (1.0,) * right + (0.0,) * (len(VAL) - right)
    state = LoopState(
        population, cycle=1, records=(make_cycle(0, 0.0, RolloutCounts()),), peak_V=peak_V
    )
    found = score(cast(Any, parts), state)
    assert len(found.score_V) == len(VAL) and len(found.rollouts) == runner.counts.eval
    assert found.val_score == pytest.approx(
        sum(r.reward for r in found.rollouts) / runner.counts.eval
    )
    return found.val_score, runner.counts.eval


def test_what_is_clear_after_one_sample_is_not_sampled_again() -> None:
    assert validated(1.0, peak=0.25) == (1.0, len(VAL))
    assert validated(0.0, peak=0.75) == (0.0, len(VAL))


def test_what_stays_open_has_all_its_samples() -> None:
    assert validated(0.5, peak=0.5)[1] == 4 * len(VAL)
    assert validated(0.5, peak=0.5, samples=1)[1] == len(VAL)


def test_equals_seldom_end_early_and_a_gap_often_does() -> None:
    equal = [validated(0.6, peak=0.6, seed=seed)[1] for seed in range(40)]
    apart = [validated(0.3, peak=0.7, seed=seed)[1] for seed in range(20)]
    assert sum(used < 4 * len(VAL) for used in equal) <= 5
    assert sum(used < 4 * len(VAL) for used in apart) >= 10
    assert len(set(apart)) > 2, "some end after the first samples, others later"
