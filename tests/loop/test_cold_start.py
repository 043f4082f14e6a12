"""What is done where the first validation shows nothing to learn from, and that it lasts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from helpers import kill_before_steps
from long_model import DESKS, Router, never, right_desk, save_long_model, tickets

import fst_dspy
from fst_dspy import FST, LocalLM
from fst_dspy.errors import ConfigError
from fst_dspy.files import read_json, read_jsonl
from fst_dspy.lm import local_lm
from fst_dspy.loop.progress import cycle_line
from fst_dspy.results.result import result_from_json

pytestmark = pytest.mark.slow

SETTINGS = {
    "max_cycles": 1,
    "steps_per_cycle": 2,
    "group_size": 4,
    "population_size": 2,
    "problems_per_step": 2,
    "first_cycle_iterations": 1,
    "cycle_iterations": 1,
    "max_tokens": 40,
    "val_size": 4,
    "learning_rate": 1e-2,
    "demo_tokens": 200,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long_model(tmp_path_factory.mktemp("cold") / "tiny-long")


def compile_router(
    folder: Path,
    metric: Any = right_desk,
    program: type[dspy.Module] = Router,
    val: int = 4,
    **settings: Any,
) -> Any:
    lm = LocalLM(str(folder))
    with dspy.context(lm=lm):
        compiled = FST(metric, seed=0, track_stats=True, **{**SETTINGS, **settings}).compile(
            program(), trainset=tickets(8), valset=tickets(val, 8)
        )
    return compiled, compiled.detailed_results


def test_answers_that_cannot_be_read_are_held_to_the_format(folder: Path, tmp_path: Path) -> None:
    compiled, result = compile_router(folder, log_dir=tmp_path / "run")
    first, *_, last = result.records
    assert [text for text in first.cold_start if "(structured)" in text]
    assert first.failure_shares == {} and last.failure_shares == {}
    # Both validations were run, and count.
    assert first.rollouts.total >= 8
    assert 0 < first.format_share < 0.5 and last.format_share is not None
    assert "100% of the answers could not be read" in cycle_line(first)
    assert "format 0." in cycle_line(last)
    rows = list(read_jsonl(tmp_path / "run" / "cycles.jsonl"))
    assert [row["cycle"] for row in rows] == [record.cycle for record in result.records]
    assert rows[0]["cold_start"] == list(first.cold_start)
    # The program answers on, and so does what it is saved as.
    assert compiled(ticket="visa").desk in DESKS
    compiled.save(tmp_path / "bundle")
    assert fst_dspy.load(tmp_path / "bundle", program=Router())(ticket="visa").desk in DESKS


class Careful(Router):
    """It answers even where the model's answer could not be read."""

    def forward(self, ticket: str) -> dspy.Prediction:
        try:
            return super().forward(ticket)
        except Exception:
            return dspy.Prediction(desk="")


def best_of_two() -> dspy.Module:
    return dspy.BestOfN(Router(), 2, lambda given, pred: float(pred.desk in DESKS), 1.0)


@pytest.mark.parametrize("program", [Careful, best_of_two])
def test_so_they_are_where_the_program_goes_on_without_them(folder: Path, program: Any) -> None:
    result = compile_router(folder, program=program, steps_per_cycle=1)[1]
    assert result.structured
    (text,) = [text for text in result.records[0].cold_start if "(structured)" in text]
    assert text.startswith("100% of the answers could not be read") and "and 0% cannot" in text


def readable(gold, pred, trace=None, pred_name=None, pred_trace=None) -> float:
    """1 for any desk at all: an answer that cannot be read never comes here, and has 0."""
    return float(pred.desk in DESKS)


def four_scores(result: fst_dspy.FSTResult) -> tuple[float, ...]:
    found = result.quadrants(tickets(3, 20))
    return (
        found.base_original,
        found.base_evolved,
        found.trained_original,
        found.trained_evolved,
    )


def test_where_holding_them_does_not_help_it_is_told_why(folder: Path) -> None:
    (text, *_) = compile_router(folder, max_tokens=3, on_no_signal="warn")[1].records[0].cold_start
    assert "left free" in text and "; held: truncated 100%" in text and "raise max_tokens" in text


def test_where_they_cannot_be_held_it_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    """As with the tokenizers of T5 and of BERT, which llguidance does not know."""
    folder = save_long_model(tmp_path / "model")
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    metaspace = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    path.write_text(json.dumps(state | {"decoder": metaspace}))
    result = compile_router(folder, on_no_signal="warn")[1]
    (text,) = [text for text in result.records[0].cold_start if "held" in text]
    assert "cannot be held to the adapter's format: structured decoding needs" in text
    assert not result.structured and len(result.records) > 1


def test_where_the_program_fails_on_what_is_held_they_are_left_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise ValueError("no such grammar")

    monkeypatch.setattr(local_lm, "grammar_of_caller", refuse)
    result = compile_router(folder, on_no_signal="warn")[1]
    (text,) = [text for text in result.records[0].cold_start if "(structured)" in text]
    assert "100% of the rollouts fail: left free" in text and "no such grammar" in text
    assert not result.structured and len(result.records) > 1


def test_what_was_held_is_tested_held(folder: Path, tmp_path: Path) -> None:
    result = compile_router(folder, readable, on_no_signal="warn", log_dir=tmp_path / "run")[1]
    assert result.structured and result.sampling.structured is True
    assert four_scores(result) == (1.0,) * 4
    again = result_from_json(read_json(tmp_path / "run" / "result.json"))
    assert again.structured and again.config.sampling.structured == "auto"
    free = compile_router(folder, readable, on_no_signal="warn", structured=False, max_cycles=1)[1]
    assert not free.structured and four_scores(free) == (0.0,) * 4


def test_it_can_be_switched_off_and_on(folder: Path) -> None:
    free = compile_router(folder, structured=False, max_cycles=1, on_no_signal="warn")[1]
    assert sum(free.records[0].failure_shares.values()) == 1
    assert free.records[0].format_share is None
    assert not any("(structured)" in text for text in free.records[0].cold_start)
    held = compile_router(folder, structured=True)[1]
    assert held.records[0].failure_shares == {} and held.records[0].format_share is not None
    assert not held.records[0].cold_start
    with pytest.raises(ConfigError, match="structured must be"):
        FST(right_desk, structured="always")


class Counting(Router):
    """It says how many demos it was shown."""

    def forward(self, ticket: str) -> dspy.Prediction:
        return dspy.Prediction(desk=super().forward(ticket).desk, demos=len(self.route.demos))


def with_demos(gold, pred, trace=None, pred_name=None, pred_trace=None) -> float:
    """What the demos alone decide."""
    return 50.0 + 10 * (pred.demos > 0)


SHOWN: dict[str, Any] = {
    "structured": True, "on_no_signal": "warn", "steps_per_cycle": 1, "val_size": 8,
    "program": Counting, "val": 8,
}  # fmt: skip


@pytest.mark.parametrize("demo_tokens", [200, 0])
def test_labels_that_help_are_shown_where_all_rewards_are_equal(
    demo_tokens: int, folder: Path
) -> None:
    """Also where the metric has another range, and where no demos are learned."""
    compiled, result = compile_router(folder, with_demos, **SHOWN, demo_tokens=demo_tokens)
    (told,) = result.records[0].cold_start
    assert told.startswith("every answer had the reward 50, and with 4 labelled demos")
    assert "the mean is 60.000" in told and told.endswith("was added")
    assert len(result.records[0].candidate_ids) == 2 and len(compiled.route.demos) == 4
    few = compile_router(folder, with_demos, **SHOWN, demo_tokens=1)[1]
    assert not few.records[0].cold_start, "what was asked for is kept to"


class Picking(dspy.Module):
    """One whose predictor has a name that a component's kind has too."""

    def __init__(self) -> None:
        super().__init__()
        self.pick_demos = dspy.Predict("ticket -> desk: typing.Literal['silver', 'gold', 'sand']")

    def forward(self, ticket: str) -> dspy.Prediction:
        return self.pick_demos(ticket=ticket)


def test_a_predictor_may_have_any_name(folder: Path) -> None:
    settings: dict[str, Any] = {"structured": True, "on_no_signal": "warn", "program": Picking}
    (told,) = compile_router(folder, never, **settings)[1].records[0].cold_start
    assert "4 labelled demos" in told


def test_labels_that_do_not_help_are_left_out(folder: Path) -> None:
    result = compile_router(folder, never, structured=True, on_no_signal="warn")[1]
    (told,) = result.records[0].cold_start
    assert "4 labelled demos" in told and told.endswith("left out")
    assert len(result.records[0].candidate_ids) == 1
    assert result.records[0].rollouts.total == 8, "both validations count"
    none = compile_router(folder, never, structured=True, on_no_signal="warn", cold_start_demos=0)[
        1
    ]
    assert not none.records[0].cold_start and len(none.records[0].candidate_ids) == 1


def test_what_could_not_be_read_is_explained_to_who_writes_instructions(
    folder: Path, tmp_path: Path
) -> None:
    settings = {"structured": False, "on_no_signal": "warn", "log_dir": tmp_path / "run"}
    result = compile_router(folder, **settings)[1]
    assert any("format_feedback" in text for text in result.records[0].cold_start)
    rows = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    feedback = [r["feedback"] for r in rows if (r["failure"] or {}).get("kind") == "parse"]
    assert feedback
    for text in feedback:
        assert "It began with" in text and "`[[ ## desk ## ]]`" in text
    plain = compile_router(folder, **{**settings, "log_dir": None, "format_feedback": False})[1]
    assert not any("format_feedback" in text for text in plain.records[0].cold_start)


def test_a_killed_run_goes_on_holding_answers_to_the_format(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_cycles": 2, "arm": "rl_only"}
    whole = compile_router(folder, log_dir=tmp_path / "whole", **settings)[1]
    kill_before_steps(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="killed"):
        compile_router(folder, log_dir=tmp_path / "killed", **settings)
    resumed = compile_router(folder, log_dir=tmp_path / "killed", **settings)[1]
    assert resumed.weights_version == whole.weights_version
    assert resumed.records[0].cold_start == whole.records[0].cold_start
