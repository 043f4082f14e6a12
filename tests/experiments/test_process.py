"""How a job's process is stopped, on every system."""

import _thread
import os
import signal
import subprocess
import sys
import time

from rich.progress import TaskID

from fst_dspy.experiments import process, runner


def test_a_worker_is_stopped_by_the_end_of_its_input(monkeypatch):
    def no_such_signal(*_):  # as Windows has it
        raise ValueError("Unsupported signal: 2")

    monkeypatch.setattr(subprocess.Popen, "send_signal", no_such_signal)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a command with an & behind it
    # The file alone: the package takes seconds to import.
    code = (
        "import importlib.util, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('process', {process.__file__!r})\n"
        "process = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(process)\n"
        "sys.exit(process.work(lambda _: time.sleep(60), '.'))"
    )
    try:
        worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    with worker:
        runner._stop({"job": runner._Running(worker, time.monotonic(), TaskID(0))})
    assert worker.returncode == 130


def test_on_windows_a_process_interrupts_itself_without_ending(monkeypatch):
    interrupted = []
    monkeypatch.setattr(_thread, "interrupt_main", lambda: interrupted.append(True))
    monkeypatch.setattr(os, "kill", lambda *_: 1 / 0)
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        process._interrupt()
    assert interrupted == [True]
