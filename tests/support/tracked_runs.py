"""Compiles that log to trackers, one of them killed in a process that can import it from here."""

import os
import signal
import sys
import time

import dspy
from helpers import Echo, RawAdapter, questions, vowels
from tiny_compile import SETTINGS

from fst_dspy import FST, LocalLM


def compile_tracked(model, folder, report_to, **settings):
    fst = FST(vowels, log_dir=folder, report_to=report_to, track_stats=True, **SETTINGS | settings)
    with dspy.context(lm=LocalLM(str(model)), adapter=RawAdapter()):
        compiled = fst.compile(Echo(), trainset=questions(6), valset=questions(4, 6))
    return compiled.detailed_results


def killed_in_step_2(model, folder, report_to):
    """In a process of its own: step 1 is in the trackers, and in no checkpoint."""
    # MLflow keeps quiet under test; W&B's background process would be the parent's.
    for name in ("CI", "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "WANDB_SERVICE"):
        os.environ.pop(name, None)

    def watch(event, arguments):
        if event == "socket.getaddrinfo" or (
            event == "socket.connect" and isinstance(arguments[1], tuple)
        ):
            with open(folder / "network.txt", "a") as file:
                file.write(f"{event} {arguments}\n")

    sys.addaudithook(watch)
    from fst_dspy.loop import joint

    real = joint.Run._slow_step

    def dying(self, state):
        if state.step == 1:
            time.sleep(3)  # W&B writes once a second
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, state)

    joint.Run._slow_step = dying
    compile_tracked(model, folder, report_to)
