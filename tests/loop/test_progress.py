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


@pytest.fixture
def clock(monkeypatch):
    """The time that listeners see; moved by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_goes_by_what_was_done_since_the_run_was_taken_up_again(heard, clock):
    """Half was done before: a tenth in ten seconds leaves forty for the rest, not seven."""
    heard.begin(BudgetConfig(max_rollouts=1000))
    assert heard._pace.at(3, RolloutCounts(slow=500)).left == ""
    clock[0] += 10
    now = heard._pace.at(3, RolloutCounts(slow=600))
    assert (now.share, now.left) == (0.6, "about 40 s left")


def test_seconds_of_before_count_where_a_run_with_max_seconds_goes_on(heard, clock):
    heard.begin(BudgetConfig(max_seconds=100))
    heard.cycle_done(make_cycle(2, 0.5, RolloutCounts(eval=10), seconds={"slow": 60.0}))
    assert heard._pace.at(3, RolloutCounts(eval=10)).share == 0.6
    clock[0] += 10
    now = heard._pace.at(3, RolloutCounts(eval=12))
    assert (now.share, now.left) == (0.7, "about 30 s left")
