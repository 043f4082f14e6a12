"""``gepa_kwargs`` and ``max_full_evals``: what dspy.GEPA takes is ours too, or answered."""

import inspect

import gepa
import pytest
from gepa.strategies.acceptance import ImprovementOrEqualAcceptance
from gepa.utils import MaxMetricCallsStopper

from fst_dspy import FST
from fst_dspy.config import ENV_LIMITS, BudgetConfig, FSTConfig, without_removed
from fst_dspy.errors import ConfigError


def metric(gold, pred, trace=None):
    return 1.0


class Listener:
    def on_iteration_end(self, event):
        pass


WANTED = {
    "batch_sampler": "epoch_shuffled",
    "reflection_minibatch_size": 5,
    "candidate_selection_strategy": "current_best",
    "module_selector": "all",
    "frontier_type": "hybrid",
    "skip_perfect_score": True,
    "perfect_score": 2.0,
    "acceptance_criterion": ImprovementOrEqualAcceptance(),
    "max_metric_calls": 400,
    "max_reflection_cost": 1.5,
    "callbacks": [Listener()],
    "stop_callbacks": MaxMetricCallsStopper(300),
    "use_wandb": None,
}


def test_what_gepa_has_a_setting_for_goes_to_ours():
    fst = FST(metric, gepa_kwargs=WANTED)
    fast = fst.config.fast
    assert (fast.minibatch_size, fast.frontier_type, fast.perfect_score) == (5, "hybrid", 2.0)
    assert fast.candidate_selection_strategy == "current_best" and fast.skip_perfect_score
    assert (fast.component_selector, fast.acceptance_criterion) == ("all", "custom")
    assert (fst.config.budget.max_rollouts, fast.max_reflection_cost) == (400, 1.5)
    assert fst.config.budget.max_cycles is None, "a limit was given"
    assert fst.strategies.callbacks == tuple(WANTED["callbacks"])
    assert fst.strategies.stop_callbacks == (WANTED["stop_callbacks"],)
    assert FST(metric, gepa_kwargs={}).config == FST(metric, gepa_kwargs=None).config


def test_every_argument_of_gepa_is_taken_or_answered():
    template = "<curr_param> <side_info>"
    own = WANTED | {"reflection_prompt_template": template}
    for name in inspect.signature(gepa.optimize).parameters:
        if name in own:
            FST(metric, reflection_lm="a/b", gepa_kwargs={name: own[name]})
            continue
        with pytest.raises(ConfigError, match=r"for which there is no setting: \w"):
            FST(metric, gepa_kwargs={name: 1})
        if name not in ("seed", "reflection_lm"):
            with pytest.raises((ConfigError, TypeError), match="FST has no setting"):
                FST(metric, **{name: 1})


@pytest.mark.parametrize(
    ("more", "kwargs", "message"),
    [
        ({}, {"reflection_minibach_size": 3}, "did you mean 'reflection_minibatch_size'"),
        ({}, {"learning_rate": 3}, "gepa.optimize has no such argument"),
        ({}, {5: 3}, "no such argument"),
        ({}, "batch_sampler", "must be a dict"),
        ({"minibatch_size": 3}, {"reflection_minibatch_size": 3}, "give one of them"),
        ({"callbacks": [Listener()]}, {"callbacks": [Listener()]}, "give one of them"),
        ({}, {"batch_sampler": "random"}, "epoch_shuffled"),
        ({}, {"callbacks": Listener()}, "a list"),
    ],
)
def test_what_cannot_be_is_refused(more, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        FST(metric, gepa_kwargs=kwargs, **more)


def test_full_evals_are_a_budget_in_rollouts():
    budget = FST(metric, max_full_evals=3).config.budget
    assert budget.max_cycles is None and budget.max_full_evals == 3
    assert budget.over(50) == BudgetConfig(max_rollouts=150)
    assert BudgetConfig(max_cycles=2).over(50) == BudgetConfig(max_cycles=2)


@pytest.mark.parametrize("other", [{"max_metric_calls": 9}, {"max_rollouts": 9}, {"auto": "light"}])
def test_there_is_one_budget_in_rollouts(other):
    with pytest.raises(ConfigError, match="max_full_evals"):
        FST(metric, max_full_evals=3, **other)
    with pytest.raises(ConfigError, match="positive"):
        FST(metric, max_full_evals=0)


def test_what_to_do_without_signal_is_no_limit():
    assert FST(metric, on_no_signal="warn").config.budget.max_cycles == 6


def test_a_config_of_before_is_read_and_its_run_goes_on():
    now = FSTConfig.make().to_dict()
    budget = {"max_full_evals", *ENV_LIMITS}
    new = {"reflection_context", "frontier_type", "copy_guard", *budget}
    old = {part: {k: v for k, v in row.items() if k not in new} for part, row in now.items()}
    assert without_removed(old) == now
