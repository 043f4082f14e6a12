"""The four scores: those that a folder has, each what was measured, and no others."""

import dataclasses
import json

import pytest
from run_folders import write_run

from fst_dspy.errors import StoreError
from fst_dspy.report import data
from fst_dspy.report.answer.answer import _verdict, answer
from fst_dspy.report.answer.cells import CELLS, cells_of
from fst_dspy.report.intervals import gain_of
from fst_dspy.report.sections import headline_facts

MEANS = {"base_original": 0.25, "base_evolved": 0.5, "trained_original": 0.5, "trained_evolved": 1}
SCORES = {
    "base_original": [0, 0, 0, 1],
    "base_evolved": [0, 0, 1, 1],
    "trained_original": [1, 1, 0, 0],
    "trained_evolved": [1, 1, 1, 1],
}


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "run", steps=4, per_step=16, cycles=2, seed=2)
    return tmp_path / "run"


def with_test_scores(folder, **more):
    text = json.dumps({**MEANS, "examples": 4, **more})
    (folder / "quadrants.json").write_text(text)
    return data.read_run(folder)


def test_validations_give_the_cells_that_were_measured(folder):
    run = data.read_run(folder)
    found, result = cells_of(run), json.loads((folder / "result.json").read_text())
    assert not found.tested and found.examples == 24 and found.trained and found.evolved
    assert found.cells["base_original"].mean == run.cycles[0]["val_score"]
    assert found.cells["trained_evolved"].mean == result["best"]["score"]
    # The chosen prompt came with the trained weights: nothing says how it does without them.
    assert "base_evolved" not in found.cells
    shown = answer([run])
    assert shown.count("not measured") >= 1 and "a little too high" in shown
    # Without the answers, means and populations are left; still nothing is made up.
    run = dataclasses.replace(run, answers=(), populations=())
    found = cells_of(run)
    assert {name: cell.scores for name, cell in found.cells.items()} == {
        "base_original": (),
        "trained_evolved": (),
    }
    assert "no interval" in answer([run])


def test_of_several_answers_to_an_example_the_mean_counts(folder):
    run = data.read_run(folder)
    twice = [row for one in run.answers for row in (one, {**one, "reward": 0.0})]
    cycles = [{**cycle, "val_score": cycle["val_score"] / 2} for cycle in run.cycles]
    found = cells_of(dataclasses.replace(run, answers=twice, cycles=cycles))
    assert found.cells["base_original"].mean == pytest.approx(cycles[0]["val_score"])
    assert all(found.cells[name].scores for name in ("base_original", "trained_evolved"))


def test_test_scores_come_first_where_there_are_some(folder):
    run = with_test_scores(folder, scores=SCORES)
    found = cells_of(run)
    assert found.tested and {name: found.cells[name].mean for name in CELLS} == MEANS
    way = found.gain("base_original", "trained_evolved")
    assert way.mean == 0.75 and way.low > 0
    shown = answer([run])
    assert "4 test examples went from <b>0.250</b> to <b>1.000</b>" in shown
    assert "(more than chance; 95 % interval +" in shown and "(may be chance; 95" in shown
    # Those of before had means alone.
    old = cells_of(with_test_scores(folder))
    assert old.gain("base_original", "base_evolved").low is None
    shown = answer([with_test_scores(folder)])
    assert "a gain of 0.750 (no interval)." in shown and "keeps the mean alone" in shown
    # A score that stayed is no gain of nothing.
    same = {name: [1.0, 0.5, 0.25, 0.0] for name in CELLS}
    run = with_test_scores(folder, **{name: 0.4375 for name in CELLS}, scores=same)
    shown = answer([run])
    assert "stayed at <b>0.438</b>: no change on any of the examples." in shown
    assert "gain of" not in shown


def test_scores_that_do_not_fit_are_refused(folder):
    for scores in ({"base_original": [1]}, {**SCORES, "base_evolved": [1, 0]}):
        with pytest.raises(StoreError, match="scores"):
            with_test_scores(folder, scores=scores)


def test_what_was_not_changed_is_said(folder):
    run = data.read_run(folder)
    seed = run.config["student"]
    first = dataclasses.replace(run, cycles=run.cycles[:1], result=None, quadrants=None)
    assert cells_of(first).cells.keys() == {"base_original"} and seed
    shown = answer([first])
    assert shown.startswith("<div class=answer><p class=lead>So far, nothing was learned")
    assert "the prompt is the original" in shown and "weights are as they came" in shown
    assert "Nothing is validated yet" in answer([dataclasses.replace(first, cycles=())])


def test_a_test_of_another_pair_than_the_chosen_is_left_out(folder):
    """A run may go on after its test, and choose another pair."""
    best = data.read_run(folder)
    pair = {"version": data.best_cycle(best)["weights_version"], "candidate_id": "cafe"}
    assert not cells_of(with_test_scores(folder, pair=pair)).tested
    pair["candidate_id"] = data.chosen_id(best)
    assert cells_of(with_test_scores(folder, pair=pair)).tested
    # Nor is an outcome that the run has gone on from.
    result = json.loads((folder / "result.json").read_text())
    result["records"].pop()
    (folder / "result.json").write_text(json.dumps(result))
    assert best.finished and not data.read_run(folder).finished


def test_steps_that_moved_nothing_train_no_weights(folder):
    run = data.read_run(folder)
    still = [{**cycle, "weights_version": run.cycles[0]["weights_version"]} for cycle in run.cycles]
    found = cells_of(dataclasses.replace(run, cycles=still))
    assert not found.trained and found.cells.keys() == {"base_original", "base_evolved"}
    # The best pair's answers are of an earlier step with the same weights.
    best = data.best_cycle(run)
    later = [
        {**cycle, "step": cycle["step"] + 2} if cycle["cycle"] == best["cycle"] else cycle
        for cycle in run.cycles
    ]
    same = {**best, "cycle": 0, "step": best["step"]}
    found = cells_of(dataclasses.replace(run, cycles=[{**run.cycles[0]}, same, *later[1:]]))
    assert found.cells["trained_evolved"].scores


def test_what_the_cold_start_brought_is_told(folder):
    run = data.read_run(folder)
    before = data.first_score(run)
    assert before == run.cycles[0]["val_score"]
    warmed = {**run.cycles[0], "val_score": 0.9, "cold_start": ["answers are held"]}
    run = dataclasses.replace(run, cycles=[warmed, *run.cycles[1:]])
    assert data.first_score(run) == before
    facts = {name: (value, note) for name, value, note in headline_facts(run)}
    assert facts["before learning"][0] == f"{before:.3f}"
    assert "0.900 after the cold start" in facts["before learning"][1]
    # Where answers are not kept there is the student's own score of the first cycle.
    run = dataclasses.replace(run, answers=())
    assert data.first_score(run) == run.cycles[0]["val_scores"][0]


def test_chance_is_judged_by_the_bounds_that_are_shown(folder):
    gained = {**SCORES, "base_original": [0, 0, 0], "trained_evolved": [1, 1, 1]}
    assert "more than chance" in _verdict(gain_of(*map(gained.get, ("base_original", CELLS[3]))))
    half = _verdict(gain_of([0] * 6, [1, 1, 1, 0, 0, 0]))
    assert "may be chance; 95 % interval +0.000" in half
