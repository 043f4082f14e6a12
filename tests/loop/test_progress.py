"""What a run without a terminal says: a line a cycle, and phases where cycles take long."""

from __future__ import annotations

import logging

import pytest
from records import make_cycle

from fst_dspy.config import BudgetConfig
from fst_dspy.loop import progress
from fst_dspy.types import RolloutCounts, TurnCounts


@pytest.fixture
def heard():
    """A listener that has begun, and the clock it looks at."""
    listener = progress.LogProgress()
    listener.begin(BudgetConfig(max_cycles=2))
    return listener


def test_a_phase_is_told_at_once_and_then_once_in_a_while(heard, monkeypatch, capsys):
    monkeypatch.setattr(progress, "logger", logging.Logger("alone"))  # nobody has set logging up
    heard.phase(0, "validation", RolloutCounts())
    heard.phase(1, "fast phase", RolloutCounts(eval=8))
    monkeypatch.setattr(progress, "PHASE_SECONDS", 0.0)
    heard.phase(1, "step 1/2", RolloutCounts(eval=8, fast=8))
    told = capsys.readouterr().err.splitlines()
    assert [line.split("  ·  ")[0] for line in told] == [
        "cycle   0  validation",
        "cycle   1  step 1/2",
    ]
    assert "16 rollouts" in told[1]


def test_where_logging_is_set_up_it_has_the_lines(heard, caplog, capsys):
    with caplog.at_level(logging.INFO, "fst_dspy"):
        heard.phase(0, "validation", RolloutCounts())
    assert [record.getMessage()[:21] for record in caplog.records] == ["cycle   0  validation"]
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_is_not_said_to_be_done(heard):
    """Cycles of prompts alone do not count, so that there may be more than asked for."""
    heard.begin(BudgetConfig(max_cycles=2))
    shares = [heard._pace.at(cycle, RolloutCounts(slow=10 * cycle)).share for cycle in range(5)]
    assert shares == [0, 0, 0.5, 0.5, 0.5]


def test_steps_of_environments_count_towards_the_end(heard):
    heard.begin(BudgetConfig(max_rollouts=1000, max_env_steps=400))
    record = make_cycle(0, 0.5, RolloutCounts(eval=10), turns=TurnCounts(turns=110, steps=100))
    heard.cycle_done(record)
    assert heard._pace.at(1, RolloutCounts(eval=10, slow=10)).share == pytest.approx(0.5)
