import dataclasses

import numpy as np
import pytest
from helpers import vowels
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy import FST
from fst_dspy.config import (
    AUTO,
    PARTS,
    REMOVED,
    BudgetConfig,
    FSTConfig,
    LoraConfig,
    settings_of_arm,
    without_effect,
    without_removed,
)
from fst_dspy.errors import ConfigError
from fst_dspy.results.result import flat_settings


def unused(fst):
    """What is told at its compile of options that do nothing."""
    return without_effect(fst.arm, fst.config, fst._given)


def propose(candidate, reflective_dataset, components_to_update):
    return {}


def test_flat_settings_reach_their_part():
    config = FSTConfig.make(learning_rate=1e-4, population_size=2, max_rollouts=100, val_size=7)
    assert config.slow.learning_rate == 1e-4
    assert config.fast.population_size == 2
    assert config.budget.max_rollouts == 100
    assert config.budget.max_cycles is None
    assert config.sampling.val_size == 7


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("distillation_weight", 0.3, {"slow_signal": "both"}),
        ("teacher_update_rate", 0.2, {"slow_signal": "feedback"}),
        ("discount", 0.9, {"credit": "turn"}),
        ("epsilon", 0.1, {"loss_type": "dapo"}),
        ("reuse_window", 300, {"reuse": True}),
        ("max_reflection_tokens", 1000, {"reflection_lm": "openai/gpt-5-mini"}),
    ],
)
def test_a_setting_that_others_leave_without_effect_is_told(name, value, needed, caplog):
    others = {"reuse": {"reuse": False}, "slow_signal": {"slow_signal": "reward"}}
    (told,) = unused(FST(vowels, **{name: value}, **others.get(next(iter(needed)), {})))
    assert told.startswith(f"{name} has no effect") and next(iter(needed)) in told
    assert unused(FST(vowels, **{name: value}, **needed)) == unused(FST(vowels)) == []
    assert unused(FST(vowels, **flat_settings(FST(vowels).config.to_dict()))) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"slow_signal": "feedback", "scale_rewards": "none"}, "scale_rewards"),
        ({"slow_signal": "both", "revisit_constant": 0.2}, "revisit_constant"),
        ({"loss_type": "sapo", "epsilon_high": 3.0}, "epsilon_high"),
        ({"reflection_context": "trajectory"}, "reflection_context"),
        ({"instruction_proposer": propose, "instruction_tokens": 9}, "instruction_tokens"),
        (
            {"instruction_proposer": propose, "reflection_lm": "openai/x"}
            | {"max_reflection_cost": 1.0},
            "max_reflection_cost",
        ),
        ({"arm": "rl_only", "reflection_lm": "openai/x"}, "reflection_lm"),
        ({"arm": "rl_only", "instruction_proposer": propose}, "instruction_proposer"),
        ({"arm": "rl_only", "gepa_kwargs": {"reflection_minibatch_size": 3}}, "reflection_m"),
        ({"arm": "gepa_only", "first_phase": "slow"}, "first_phase"),
        ({"arm": "gepa_only", "reuse": False}, "reuse"),
    ],
)
def test_an_option_that_is_taken_and_does_nothing_is_told(given, told):
    (text,) = unused(FST(vowels, **given))
    assert text.startswith(told) and " has no effect with" in text


def test_settings_of_a_channel_that_the_arm_does_not_have_are_told():
    given = {
        "learning_rate": 1e-4,
        "num_generations": 4,
        "demo_tokens": 64,
        "val_size": 9,
        "perfect_score": 2,
    }
    assert unused(FST(vowels, **given)) == []
    told = unused(FST(vowels, arm="rl_only", **given))
    assert told == ["demo_tokens has no effect with arm='rl_only'"]
    fst = FST(vowels, arm="gepa_only", learning_rate=1e-4, lora_rank=4, val_size=9)
    assert unused(fst) == [
        "learning_rate has no effect with arm='gepa_only'",
        "lora_rank has no effect with arm='gepa_only'",
    ]
    saved = flat_settings(FST(vowels).config.to_dict())
    for arm in ("rl_only", "gepa_only"):
        assert unused(FST(vowels, arm=arm, **saved)) == []


def test_light_is_the_default_budget_and_names_win_over_a_preset():
    assert FSTConfig.make().budget.max_cycles == AUTO["light"]["max_cycles"]
    assert FSTConfig.make("heavy", max_cycles=3).budget.max_cycles == 3


def test_the_papers_settings_are_a_preset_without_what_is_ours():
    config = FSTConfig.make("paper", max_cycles=2)
    assert (config.fast.reuse, config.slow.steps_per_cycle, config.slow.group_size) == (False, 6, 8)
    assert (config.slow.damp_constant, config.slow.revisit_constant) == (False, 1)
    assert (config.sampling.val_samples, config.budget.max_cycles) == (4, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"group_size": 8, "population_size": 3}, "multiple of population_size"),
        ({"group_size": 1, "population_size": 1}, "at least 2"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"temperature": 0}, "above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_cycles": 0}, "positive"),
        ({"lora": "yes"}, "lora must be"),
        ({"lora": {"rank": 0}}, "rank"),
        ({"auto": "tiny"}, "auto must be one of"),
        ({"lr_scheduler_type": "cosine", "max_rollouts": 10}, "decays over max_cycles"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type must be 'constant', .* got 'greedy'"),
        ({"loss_type": "ppo"}, "loss_type must be 'cispo', .* got 'ppo'"),
        ({"beta": float("inf")}, "beta must be finite"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"temperature": 2.1}, "temperature must be above 0 .* and at most 2, got 2.1"),
        ({"max_seconds": float("inf")}, "max_seconds must be finite; None sets no limit"),
        ({"lora": {"alpha": float("inf")}}, "alpha must be positive and finite"),
        ({"failure_score": -1e300}, "failure_score must be a score, at most 1e"),
        ({"failure_score": float("nan")}, "failure_score must be a score"),
        ({"perfect_score": float("nan")}, "perfect_score must be a number"),
        ({"steps_per_cycle": "six"}, r"steps_per_cycle must be a whole number, got 'six' \(str\)"),
        ({"max_seconds": "1h"}, "max_seconds must be a number or None, got '1h'"),
        ({"reuse": "no"}, "reuse must be True or False, got 'no'"),
        ({"first_phase": "both"}, "first_phase must be 'fast' or 'slow', got 'both'"),
        ({"group_size": True}, r"group_size must be a whole number, got True \(bool\)"),
        ({"lora": {"rnk": 3}}, "lora has no 'rnk'; it takes: rank, alpha, dropout"),
        ({"lora": {"alpha": "8"}}, "LoRA alpha must be a number, got '8'"),
        ({"component_selector": "best_first"}, "round_robin"),
        ({"demo_tokens": -1}, "not be negative"),
        ({"reuse_window": 0}, "at least 1"),
        ({"device": "gpu"}, r"no setting 'device': the model has it: LocalLM\(..., device=\)"),
        ({"max_reflection_cost": -0.5}, "not be negative"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, message):
    with pytest.raises(ConfigError, match=message):
        FSTConfig.make(**settings)


def test_lora_true_stands_for_the_defaults():
    assert FSTConfig.make(lora=True).slow.lora == LoraConfig()
    assert FSTConfig.make(lora=False).slow.lora is None


@given(st.integers(1, 16), st.integers(1, 8))
def test_group_size_is_a_multiple_of_the_population_or_refused(population_size, times):
    group_size = population_size * times
    if group_size >= 2:
        FSTConfig.make(population_size=population_size, group_size=group_size)
    if population_size > 1:
        with pytest.raises(ConfigError):
            FSTConfig.make(population_size=population_size, group_size=group_size + 1)


@pytest.mark.parametrize("arm", ["fst", "rl_only", "gepa_only"])
def test_the_same_settings_give_groups_of_one_size_in_every_arm(arm):
    own = settings_of_arm(arm, {"population_size": 4, "rollouts_per_candidate": 2, "lora_rank": 4})
    config = FSTConfig.make(**own)
    assert config.slow.group_size == 8 and config.slow.lora.rank == 4
    assert config.fast.population_size == (1 if arm == "rl_only" else 4)
    usual = FSTConfig.make(**settings_of_arm(arm, {"rollouts_per_candidate": 2}))
    assert usual.slow.group_size == FSTConfig.make().slow.group_size
    assert FST(vowels, arm=arm, rollouts_per_candidate=1).config.slow.group_size == 4


def test_prompts_alone_have_no_groups_for_a_population_to_fit():
    assert FST(vowels, arm="gepa_only", population_size=6).config.fast.population_size == 6
    with pytest.raises(ConfigError, match="group_size"):
        FST(vowels, population_size=6)


@pytest.mark.parametrize("name", ["seed", "log_rollouts"])
def test_arguments_that_are_no_settings_are_named_as_options(name):
    with pytest.raises(ConfigError, match=r"no setting but an argument of FST.*--"):
        FSTConfig.make(**{name: 1})


def test_numbers_of_other_libraries_become_pythons_own():
    config = FSTConfig.make(max_cycles=np.int64(3), temperature=np.float32(0.5), val_size=6.0)
    found = config.budget.max_cycles, config.sampling.temperature, config.sampling.val_size
    assert found == (3, 0.5, 6) and [type(value) for value in found] == [int, float, int]


@pytest.mark.parametrize("part", [*PARTS.values(), LoraConfig])
def test_every_setting_is_checked_for_its_type(part):
    needed = {"max_cycles": 1} if part is BudgetConfig else {}
    for field in dataclasses.fields(part):
        with pytest.raises(ConfigError, match=field.name):
            part(**{**needed, field.name: object()})


FIRST = {
    "fast": "population_size first_cycle_iterations cycle_iterations minibatch_size "
    "instruction_tokens first_phase demo_tokens component_selector merge_iterations reuse "
    "reuse_window max_reflection_cost max_reflection_tokens",
    "slow": "steps_per_cycle group_size problems_per_step learning_rate lr_scheduler_type "
    "warmup_steps max_grad_norm weight_decay loss_type epsilon epsilon_high scale_rewards "
    "advantage beta entropy_coef micro_batch_size resample_constant revisit_constant "
    "damp_constant off_policy_steps max_bad_steps lora",
    "sampling": "temperature top_p max_tokens failure_score rollout_timeout max_calls "
    "num_threads val_size",
    "budget": "max_cycles max_rollouts max_seconds",
}
"""The settings of the first run folders, which are still gone on with."""


def test_a_setting_that_came_later_says_what_was_done_before_it():
    now = FSTConfig.make().to_dict()
    first = {
        part: {name: now[part].get(name, REMOVED.get(name)) for name in names.split()}
        for part, names in FIRST.items()
    }
    read = without_removed(first)
    assert {part: set(values) for part, values in read.items()} == {
        part: set(values) for part, values in now.items()
    }
