from __future__ import annotations

import os
import subprocess
import time

import dspy
import pytest
from dspy.utils import DummyLM
from environments import Broken, Fragile, Hall

import fst_dspy
from fst_dspy.agents.contract import RemoteError
from fst_dspy.agents.workers import EnvironmentCrashedError, Workers
from fst_dspy.errors import ProgramError


@pytest.fixture
def workers():
    return Workers(timeout=30)


def test_an_environment_in_a_process_is_like_one_here(workers):
    here, there = Hall(), workers.make(Hall)
    assert here.reset(way="left") == there.reset(way="left")
    for direction in ("right", "left"):
        assert here.go(direction=direction) == there.go(direction=direction)
        assert (here.done, here.reward, here.feedback) == (there.done, there.reward, there.feedback)
    assert there.way == "left"
    assert there.get_reward() == 1.0
    with pytest.raises(AttributeError):
        _ = there.nothing
    there.close()


def test_what_it_raises_is_told_with_its_kind(workers):
    there = workers.make(Hall)
    there.reset(way="left")
    with pytest.raises(RemoteError, match=r"^ValueError: there are no stairs$"):
        there.go(direction="up")
    there.close()


def test_one_that_cannot_be_made_says_why(workers):
    with pytest.raises(ProgramError, match="RuntimeError: no display"):
        workers.make(Broken)


def test_a_crash_and_a_hang_end_that_process_alone():
    workers = Workers(timeout=2)
    first = workers.make(Fragile)
    first.reset(harm="crash")
    with pytest.raises(EnvironmentCrashedError, match="exit code 3"):
        first.push()
    with pytest.raises(EnvironmentCrashedError):
        first.wait()
    first.close()
    second = workers.make(Fragile)
    second.reset(harm="hang")
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="did not answer within 2 s"):
        second.push()
    assert time.monotonic() - began < 20
    second.close()
    third = workers.make(Fragile)
    assert third.reset(harm="no") == "ready"
    third.close()


def test_a_process_is_used_again_and_what_it_prints_does_no_harm(workers):
    first = workers.make(Fragile)
    first.reset(harm="print")
    assert first.push() == "done"
    process = first._worker.process
    first.close()
    second = workers.make(Hall)
    assert second._worker.process is process
    assert second.reset(way="left") == "you stand in a hall"
    second.close()


def test_an_environment_whose_server_is_down_is_lost_not_wrong(workers):
    there = workers.make(Fragile)
    there.reset(harm="offline")
    with pytest.raises(ConnectionError, match="the server is down"):
        there.push()
    there.close()


def test_a_program_over_processes_acts_as_over_threads():
    program = fst_dspy.env(Hall, processes=True, step_timeout=30)
    lm = DummyLM([{"action": text} for text in ("right", "up", "left")])
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        pred = program(way="left")
    assert [turn.status for turn in pred.turns] == ["ok", "error", "ok"]
    assert pred.turns[1].result == "ValueError: there are no stairs"
    assert (pred.reward, pred.done) == (1.0, True)


class Shell:
    """Starts a program that reads its standard input."""

    def reset(self) -> str:
        return "$"

    def run(self) -> str:
        """Run it."""
        return subprocess.run(["cat"], capture_output=True, text=True, check=True).stdout


def test_what_an_environment_starts_does_not_read_what_it_is_asked(workers):
    there = workers.make(Shell)
    assert there.reset() == "$"
    assert there.run() == ""
    there.close()


def test_a_process_that_died_while_idle_is_not_used_again(workers):
    first = workers.make(Hall)
    first.close()
    first._worker.process.kill()
    first._worker.process.wait()
    second = workers.make(Hall)
    assert second.reset(way="left") == "you stand in a hall"
    second.close()


def test_ctrl_c_in_the_terminal_is_not_for_the_processes(workers):
    there = workers.make(Hall)
    assert os.getpgid(there._worker.process.pid) != os.getpgid(0)
    there.close()


class Foreign:
    """A factory that cannot be made in another process."""

    def __reduce__(self):
        return compile, ("1 +", "elsewhere", "exec")

    def __call__(self) -> Hall:
        return Hall()


def test_what_cannot_be_made_there_says_why(workers):
    with pytest.raises(ProgramError, match="cannot be made: SyntaxError"):
        workers.make(Foreign())
