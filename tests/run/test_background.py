"""Jobs beside the work: one at a time, and none that fails in silence."""

import threading
import time

import pytest

from fst_dspy.run.background import BackgroundWriter


def test_a_job_runs_beside_and_the_next_one_waits_for_it():
    writer, go, order = BackgroundWriter(), threading.Event(), []

    def slow():
        go.wait(10)
        order.append("first")

    writer.start(slow, time.monotonic() - 5)
    assert writer.busy and order == []
    threading.Timer(0.05, go.set).start()
    writer.start(lambda: order.append("second"), time.monotonic())
    writer.wait()
    assert order == ["first", "second"]
    assert not writer.busy


def test_what_a_job_took_counts_from_when_it_was_prepared():
    writer = BackgroundWriter()
    writer.start(lambda: None, time.monotonic() - 5)
    writer.wait()
    assert 5 <= writer.seconds < 8
    assert time.monotonic() - writer.ended_at < 3


def test_an_error_is_raised_once_at_the_next_call():
    writer = BackgroundWriter()
    writer.start(lambda: 1 / 0, time.monotonic())
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()
    writer.start(lambda: 1 / 0, time.monotonic())
    with pytest.raises(ZeroDivisionError):
        writer.start(lambda: None, time.monotonic())
