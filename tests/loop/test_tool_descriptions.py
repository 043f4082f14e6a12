"""A compile that rewrites tools' descriptions, and what is left of it: run folder and bundle."""

from __future__ import annotations

import json
from pathlib import Path

import dspy
import pytest
from environments import Hall

import fst_dspy
from fst_dspy import LocalLM
from fst_dspy.student.tools import tool_texts

SETTINGS = {
    "max_cycles": 1,
    "steps_per_cycle": 1,
    "group_size": 4,
    "population_size": 2,
    "problems_per_step": 2,
    "first_cycle_iterations": 4,
    "minibatch_size": 4,
    "val_size": 2,
    "max_tokens": 16,
    "structured": True,
    "component_selector": "all",
    "acceptance_criterion": "improvement_or_equal",
    "merge_iterations": 0,
}
COMPONENT = "act.tool:go"


def lesson(gold, pred, trace=None, pred_name=None, pred_trace=None):
    feedback = "Lesson: go works on the left alone.\nLesson: halls are long."
    return dspy.Prediction(score=float(pred.reward), feedback=feedback)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    halls = [dspy.Example(way="left", n=n).with_inputs("way") for n in range(8)]
    fst = fst_dspy.FST(
        lesson, tool_descriptions=True, log_dir=tmp_path_factory.mktemp("run"), track_stats=True,
        **SETTINGS,
    )  # fmt: skip
    with dspy.context(lm=LocalLM("embedded"), adapter=dspy.ChatAdapter()):
        return fst.compile(fst_dspy.env(Hall, max_turns=1), trainset=halls[:6], valset=halls[6:])


def test_lessons_that_name_a_tool_go_to_its_description(compiled):
    result = compiled.detailed_results
    assert result.seed_candidate.components[COMPONENT] == "Go in a direction."
    learned = [c.components for c in result.population.candidates if c.parent_ids]
    assert learned
    for texts in learned:
        assert texts[COMPONENT] == "Go in a direction.\ngo works on the left alone."
        assert "halls are long." in texts["act.instructions"]


def test_the_bundle_and_the_run_keep_them(compiled, tmp_path):
    best = compiled.detailed_results.best.candidate
    assert tool_texts(compiled) == {("act", "go"): best.components[COMPONENT]}
    compiled.act.signature = compiled.act.signature.with_instructions("Act.")
    compiled.set_tool_texts({"go": "Go, and look."})
    compiled.save(tmp_path / "bundle")
    loaded = fst_dspy.load(tmp_path / "bundle", fst_dspy.env(Hall, max_turns=1))
    assert tool_texts(loaded) == {("act", "go"): "Go, and look."}
    assert "Go, and look." in loaded.act.signature.output_fields["action"].json_schema_extra["desc"]
    kept = json.loads((Path(compiled.detailed_results.log_dir) / "result.json").read_text())
    assert COMPONENT in kept["best"]["candidate"]["components"]
