"""Arms over several families: areas, probabilities, and the figure's curves."""

import pytest
from experiment_runs import column, made_run, record

from fst_dspy.errors import DataError
from fst_dspy.experiments.findings.over_families import (
    against_best,
    areas,
    arm_curves,
    draw_over_families,
    over_families,
)


def rising(arm, seed, scores):
    """A run with a validation every 50 rollouts, of 100 in all."""
    records = [record(n, 50 * n, score) for n, score in enumerate(scores)]
    return made_run(arm, "fst", seed, records, [scores[-1]])


FOUND = {
    "one": [
        *(rising("fst", seed, (0.0, 0.8, 1.0)) for seed in range(3)),
        *(rising("rl_only", seed, (0.0, 0.2, 0.4)) for seed in range(3)),
        *(rising("gepa_only", seed, (0.0, 1.0, 1.0)) for seed in range(3)),
    ],
    "two": [
        *(rising("fst", seed, (0.2, 0.6, 0.6)) for seed in range(3)),
        *(rising("rl_only", seed, (0.2, 0.2, 0.2)) for seed in range(3)),
        *(rising("gepa_only", seed, (0.2, 0.4, 0.4)) for seed in range(2)),
    ],
}


def test_areas_are_mean_scores_over_the_rollouts():
    assert areas(FOUND["one"])["fst"] == pytest.approx({0: 0.4, 1: 0.4, 2: 0.4})


def test_arms_are_compared_over_families():
    table = over_families(FOUND)
    assert column(table, "fst better: area")["rl_only"] == "1.000 (1.000 to 1.000)"
    assert column(table, "fst better: area")["gepa_only"] == "0.500 (0.500 to 0.500)"
    assert column(table, "runs") == {"fst": "6", "rl_only": "6", "gepa_only": "5"}


def test_differences_are_paired_by_seed_and_averaged_over_families():
    table = over_families(FOUND)
    assert column(table, "fst minus it: test")["gepa_only"] == "0.100 ± 0.000"
    assert column(table, "fst minus it: test")["rl_only"] == "0.500 ± 0.000"


def test_the_best_split_may_be_another_on_each_family():
    splits = {
        family: [
            *runs[:3],
            *(rising("sequential", seed, (0.0, early, 1.0)) for seed in range(2)),
            *(rising("sequential_25", seed, (0.0, 0.5, 1.0)) for seed in range(2)),
        ]
        for (family, runs), early in zip(FOUND.items(), (0.4, 0.8), strict=True)
    }
    table = over_families(splits)
    for family, area in (("one", "0.250"), ("two", "0.400")):
        assert column(table, f"area, {family}")["sequential-best"] == area
    assert "sequential-best" not in column(over_families(FOUND), "area")


def test_the_best_rival_may_be_another_on_each_family():
    table = against_best(FOUND)
    assert column(table, "best rival") == {"one": "gepa_only", "two": "gepa_only"}
    assert column(table, "share") == {"one": "0.800", "two": "1.333"}


def test_curves_are_means_over_families_at_shares_of_the_budget():
    fst, rl = arm_curves(FOUND, ["fst", "rl_only"])
    assert (fst.mean[0], fst.mean[-1], rl.mean[-1]) == pytest.approx((0.1, 0.8, 0.3))
    assert fst.low == pytest.approx(fst.mean) and fst.high == pytest.approx(fst.mean)
    figure = draw_over_families(FOUND, {"fst": "FST"}, {"fst": "C0"})
    assert [text.get_text() for text in figure.axes[0].texts] == ["FST"]


def test_families_without_the_arm_are_told():
    with pytest.raises(DataError, match="not every family has runs of sdpo"):
        arm_curves(FOUND, ["sdpo"])
    with pytest.raises(DataError, match="not every family has runs of fst"):
        over_families({"one": FOUND["one"][3:]})
