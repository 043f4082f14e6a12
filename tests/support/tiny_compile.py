"""A compile on a tiny model, small enough to be run many times over."""

import dspy
import pytest
from helpers import Echo, RawAdapter, questions, vowels

from fst_dspy import FST, LocalLM

SETTINGS = {
    "max_cycles": 2,
    "steps_per_cycle": 2,
    "group_size": 4,
    "population_size": 2,
    "problems_per_step": 2,
    "first_cycle_iterations": 2,
    "cycle_iterations": 1,
    "minibatch_size": 3,
    "max_tokens": 8,
    "val_size": 4,
    "learning_rate": 1e-2,
}


@pytest.fixture(autouse=True)
def raw_adapter():
    with dspy.context(adapter=RawAdapter()):
        yield


def compile_tiny(
    folder, program=None, *, seed=0, log_dir=None, arm="fst", metric=vowels, **settings
):
    """Compile on a freshly loaded model: the compiled program, its LM and its results."""
    lm = LocalLM(str(folder))
    fst = FST(
        metric, seed=seed, log_dir=log_dir, arm=arm, track_stats=True, **{**SETTINGS, **settings}
    )
    with dspy.context(lm=lm):
        compiled = fst.compile(program or Echo(), trainset=questions(6), valset=questions(4, 6))
    return compiled, lm, compiled.detailed_results
