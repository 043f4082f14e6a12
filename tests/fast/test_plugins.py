"""What DSPy's and GEPA's users plug in: accepted as they are, or refused with what it should be."""

import functools
import random

import dspy
import pytest
from dspy.teleprompt.gepa import InstructionProposer
from dspy.teleprompt.gepa.instruction_proposal import (
    MultiModalInstructionProposer,
    SingleComponentMultiModalProposer,
)
from gepa.strategies.acceptance import ImprovementOrEqualAcceptance
from gepa.strategies.batch_sampler import EpochShuffledBatchSampler
from gepa.strategies.candidate_selector import CurrentBestCandidateSelector, ParetoCandidateSelector
from gepa.strategies.component_selector import (
    AllReflectionComponentSelector,
    RoundRobinReflectionComponentSelector,
)
from rule_runner import NAME, PAIR, RULES, SEED, VAL, RuleRunner, Scripted, rollout_of, run, scored

from fst_dspy import FST
from fst_dspy.config import (
    ALIASES,
    ELSEWHERE,
    FastConfig,
    FSTConfig,
    check_setting,
    without_removed,
)
from fst_dspy.errors import ConfigError, MetricError
from fst_dspy.fast.gepa.strategies import Strategies
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.population import best, choose
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.proposers.proposal_fn import ProposalFnProposer
from fst_dspy.student.candidate import example_id

ALL_RULES = "\n".join(RULES.values())


def metric(gold, pred, trace=None):
    return 1.0


# The reflection LM


def test_a_reflection_lm_may_be_named():
    fst = FST(metric, reflection_lm="openai/gpt-5")
    assert isinstance(fst.reflection_lm, dspy.LM) and fst.reflection_lm.model == "openai/gpt-5"
    lm = dspy.LM("openai/x")
    assert FST(metric, reflection_lm=lm).reflection_lm is lm


@pytest.mark.parametrize(
    ("lm", "message"),
    [("gpt-5", "provider"), ("", "provider"), (print, "must be a dspy.LM"), (5, "must be")],
)
def test_what_is_no_reflection_lm_is_refused(lm, message):
    with pytest.raises(ConfigError, match=message):
        FST(metric, reflection_lm=lm)


def test_a_reflection_prompt_needs_its_lm_and_its_placeholders():
    good = "Rewrite <curr_param> by <side_info>."
    assert FST(metric, reflection_lm="a/b", reflection_prompt_template=good).config
    assert FST(metric, reflection_lm="a/b", reflection_prompt_template={"solve": good}).config
    with pytest.raises(ConfigError, match="reflection_lm"):
        FST(metric, reflection_prompt_template=good)
    for bad in ("Rewrite <curr_param>.", {"solve": "x"}, 5):
        with pytest.raises(ConfigError, match="<side_info>"):
            FST(metric, reflection_lm="a/b", reflection_prompt_template=bad)


# Proposers


def propose_fn(candidate, reflective_dataset, components_to_update):
    assert set(candidate) == {"solve"} and components_to_update == ["solve"]
    (first, *_) = reflective_dataset["solve"]
    assert set(first) == {"Inputs", "Generated Outputs", "Feedback"}
    return {"solve": f"{candidate['solve']}\n{ALL_RULES}"}


def positional(texts, records, names):
    return {name: f"{texts[name]}\n{ALL_RULES}" for name in names}


class WithCall:
    def __call__(self, candidate, reflective_dataset, components_to_update):
        return propose_fn(candidate, reflective_dataset, components_to_update)


class AsModule(dspy.Module):
    def forward(self, candidate, reflective_dataset, components_to_update):
        return dspy.Prediction(**propose_fn(candidate, reflective_dataset, components_to_update))


class Single(dspy.Module):
    def forward(self, current_instruction, reflective_dataset):
        return dspy.Prediction(reasoning="so", better=f"{current_instruction}\n{ALL_RULES}")


class SingleText(dspy.Module):
    def forward(self, current_instruction, examples_with_feedback):
        return f"{current_instruction}\n{ALL_RULES}"


@pytest.mark.parametrize(
    "proposer",
    [
        propose_fn,
        positional,
        lambda *args: positional(*args),
        lambda **kwargs: propose_fn(**kwargs),
        functools.partial(propose_fn),
        WithCall(),
        WithCall().__call__,
        AsModule(),
        Single(),
        SingleText(),
        Scripted(lambda n, texts, names: {NAME: f"{texts[NAME]}\n{ALL_RULES}"}),
    ],
)
def test_proposers_of_every_kind_propose(proposer):
    plugged = FST(metric, instruction_proposer=proposer).instruction_proposer
    runner = RuleRunner()
    phase = FastPhase(FastConfig(), plugged, 0)
    population = run(phase, runner, scored(runner, SEED), iterations=2)
    assert ALL_RULES in population.candidates[best(population)].components[NAME]
    assert phase.stats.accepted == 1


class Answers(dspy.BaseLM):
    """Answers every prompt with the same instruction."""

    def __init__(self, answer):
        super().__init__(model="scripted/answers")
        self.answer, self.asked = answer, 0

    def forward(self, prompt=None, messages=None, **kwargs):
        self.asked += 1
        message = {"role": "assistant", "content": self.answer}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return _Attributes(model=self.model, choices=[_Attributes(**choice)], usage={})


class _Attributes(dict):
    def __init__(self, **values):
        super().__init__({k: _Attributes(**v) if type(v) is dict else v for k, v in values.items()})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.mark.filterwarnings("ignore")
def test_dspys_own_proposers_ask_the_reflection_lm():
    lm = Answers('{"new_instruction": "Always answer with the queue."}')
    plugged = FST(metric, reflection_lm=lm, instruction_proposer=InstructionProposer())
    assert plugged.instruction_proposer.waits
    record = {"Inputs": {"ticket": "t"}, "Generated Outputs": "x", "Feedback": "f"}
    texts = plugged.instruction_proposer.propose(SEED.components, {NAME: [record]}, [NAME])
    assert texts == {NAME: "Always answer with the queue."} and lm.asked == 1
    predict = dspy.Predict("current_instruction, examples_with_feedback -> new_instruction")
    with dspy.context(adapter=dspy.JSONAdapter()):
        texts = ProposalFnProposer(predict, lm).propose(SEED.components, {NAME: [record]}, [NAME])
    assert texts == {NAME: "Always answer with the queue."} and lm.asked == 2
    thought = dspy.ChainOfThought("current_instruction, reflective_dataset -> better")
    others = (MultiModalInstructionProposer(), SingleComponentMultiModalProposer(), thought)
    for other in others:
        assert isinstance(
            FST(metric, instruction_proposer=other).instruction_proposer, ProposalFnProposer
        )


class NoProposer:
    def propose(self, state):
        return None


async def waits(candidate, reflective_dataset, components_to_update):
    return {}


class AsyncPropose:
    async def propose(self, components, records, names):
        return {}


@pytest.mark.parametrize(
    ("proposer", "message"),
    [
        (WithCall, "instance"),
        (LessonProposer, "instance"),
        (dspy.LM("openai/x"), "pass it as reflection_lm"),
        (lambda text: text, "function"),
        (NoProposer(), "NoProposer"),
        (waits, "async"),
        (AsyncPropose(), "async"),
        ("lessons", "str"),
        (dspy.Predict("question -> answer"), "Predict"),
    ],
)
def test_what_is_no_proposer_is_refused(proposer, message):
    with pytest.raises(ConfigError, match=message) as caught:
        FST(metric, instruction_proposer=proposer)
    assert "components_to_update" in str(caught.value)


def broken(candidate, reflective_dataset, components_to_update):
    return candidate["no such predictor"]


def typo(candidate, reflective_dataset, components_to_update):
    return candidate.itmes()


@pytest.mark.parametrize(
    ("proposer", "error", "message"),
    [
        (broken, KeyError, "no such predictor"),
        (typo, AttributeError, "itmes"),
        (lambda a, b, c: "text", TypeError, "component: text"),
        (lambda a, b, c: {"solve": 5}, TypeError, "not a text"),
        (lambda a, b, c: {"nowhere": "text"}, TypeError, "the components are"),
        (Scripted(lambda *_: 1 / 0), ZeroDivisionError, "division"),
        (Scripted(lambda *_: None), TypeError, "component: text"),
    ],
)
def test_a_mistake_in_a_proposer_is_raised(proposer, error, message):
    plugged = FST(metric, instruction_proposer=proposer).instruction_proposer
    runner = RuleRunner()
    with pytest.raises(error, match=message):
        run(FastPhase(FastConfig(), plugged, 0), runner, scored(runner, SEED))


def test_what_a_proposer_cannot_help_is_counted():
    def unlucky(candidate, reflective_dataset, components_to_update):
        raise TimeoutError("no answer")

    runner = RuleRunner()
    phase = FastPhase(FastConfig(), ProposalFnProposer(unlucky), 0)
    run(phase, runner, scored(runner, SEED), iterations=2)
    assert phase.stats.errors == {"TimeoutError": 2}


def test_the_metric_is_checked_too():
    with pytest.raises(MetricError, match="must accept"):
        FST(lambda gold: 1)


# gepa's strategies


class Recorder:
    """A selector that says what it saw."""

    def __init__(self, answer):
        self.answer, self.calls = answer, 0

    def __call__(self, state, trajectories, subsample_scores, candidate_idx, candidate):
        self.calls += 1
        return self.answer


def names_rewritten(**settings):
    class Uneven(RuleRunner):
        def rollout(self, job, salt):
            return rollout_of(reward=float(int(example_id(job.example), 16) % 2))

    fst = FST(metric, **settings)
    start = choose([PAIR], [[0.0] * len(VAL)], [example_id(e) for e in VAL], 4, 0)
    proposer = Scripted(lambda *_: {})
    phase = FastPhase(fst.config.fast, proposer, 0, strategies=fst.strategies)
    run(phase, Uneven(), start, iterations=2)
    return proposer.names


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"component_selector": "round_robin"}, ["a", "b"]),
        ({"component_selector": "all"}, ["a", "b"] * 2),
        ({"module_selector": "all"}, ["a", "b"] * 2),
        ({"component_selector": RoundRobinReflectionComponentSelector()}, ["a", "b"]),
        ({"component_selector": AllReflectionComponentSelector()}, ["a", "b"] * 2),
        ({"module_selector": lambda *_: ["b"]}, ["b", "b"]),
        ({"component_selector": Recorder(["b.instructions"])}, ["b", "b"]),
    ],
)
def test_components_are_selected_as_in_dspy_gepa(settings, names):
    assert names_rewritten(**settings) == [f"{name}.instructions" for name in names]


@pytest.mark.parametrize("answer", ["a", [], ["c"], None])
def test_a_selector_that_names_nothing_is_told(answer):
    with pytest.raises(TypeError, match="component_selector"):
        names_rewritten(component_selector=Recorder(answer))


class Never:
    def should_accept(self, proposal, state):
        assert state.program_candidates and proposal.eval_after.scores
        assert all(k < len(state.program_candidates) for k in proposal.parent_program_ids)
        return False


class Firsts:
    """Always the same minibatch."""

    def next_minibatch_ids(self, loader, state):
        return list(loader.all_ids())[:3]


def lessons_with(iterations=4, **settings):
    fst, runner = FST(metric, **settings), RuleRunner()
    start = scored(runner, SEED)
    runner.runs.clear()
    phase = FastPhase(fst.config.fast, LessonProposer(256, len), 0, strategies=fst.strategies)
    return run(phase, runner, start, iterations=iterations), phase, runner


@pytest.mark.parametrize(
    "selector",
    [
        "pareto",
        "current_best",
        "epsilon_greedy",
        "top_k_pareto",
        CurrentBestCandidateSelector(),
        ParetoCandidateSelector(random.Random(0)),
    ],
)
def test_parents_are_selected_as_in_gepa(selector):
    found, phase, _ = lessons_with(candidate_selection_strategy=selector)
    assert phase.stats.iterations == 4 and found.candidates


def test_gepas_strategies_are_honoured():
    assert lessons_with(acceptance_criterion=Never())[1].stats.accepted == 0
    equal = lessons_with(acceptance_criterion=ImprovementOrEqualAcceptance())[1]
    by_name = lessons_with(acceptance_criterion="improvement_or_equal")[1]
    assert equal.stats == by_name.stats
    _, _, runner = lessons_with(batch_sampler=Firsts())
    assert {size for _, _, size in runner.runs} <= {3, len(VAL)}
    sampler = EpochShuffledBatchSampler(5, random.Random(0))
    assert 5 in {size for _, _, size in lessons_with(batch_sampler=sampler)[2].runs}
    _, phase, runner = lessons_with(skip_perfect_score=True, perfect_score=0.0)
    assert phase.stats.empty == 4 and phase.stats.proposals == 0
    assert lessons_with(reflection_minibatch_size=2)[2].runs[0][2] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"component_selector": AllReflectionComponentSelector}, "the class"),
        ({"component_selector": lambda state: []}, "component_selector"),
        ({"component_selector": "custom"}, "the object itself"),
        ({"candidate_selection_strategy": "best"}, "current_best"),
        ({"candidate_selection_strategy": object()}, "select_candidate_idx"),
        ({"acceptance_criterion": object()}, "should_accept"),
        ({"acceptance_criterion": "always"}, "strict_improvement"),
        ({"batch_sampler": "random"}, "epoch_shuffled"),
        ({"batch_sampler": object()}, "next_minibatch_ids"),
    ],
)
def test_other_strategies_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FST(metric, **settings)


# Names of settings elsewhere


def test_names_of_trl_gepa_and_dspy_are_taken_for_ours():
    config = FSTConfig.make(
        num_generations=12, lr=1e-5, max_metric_calls=500, reflection_minibatch_size=3
    )
    assert (config.slow.group_size, config.slow.learning_rate) == (12, 1e-5)
    assert (config.budget.max_rollouts, config.fast.minibatch_size) == (500, 3)
    assert config.budget.max_cycles is None, "a limit was given"


def test_a_setting_is_not_given_twice():
    with pytest.raises(ConfigError, match="another name of learning_rate"):
        FSTConfig.make(lr=1e-5, learning_rate=1e-5)


def test_other_names_are_answered_with_ours():
    for name in ELSEWHERE:
        with pytest.raises(ConfigError, match="FST has no setting"):
            FSTConfig.make(**{name: 1})
    for name, own in ALIASES.items():
        with pytest.raises(ConfigError, match=own):
            check_setting(name, 1)
    with pytest.raises(ConfigError, match="steps_per_cycle"):
        FSTConfig.make(max_steps=100)


def test_names_elsewhere_are_no_settings_of_ours():
    own = {name for part in FSTConfig.make().to_dict().values() for name in part}
    assert not own & {*ALIASES, *ELSEWHERE} and set(ALIASES.values()) <= own


def test_a_config_of_before_has_the_strategies_of_before():
    saved = FSTConfig.make().to_dict()
    old = {**saved, "fast": {k: v for k, v in saved["fast"].items() if "strategy" not in k}}
    assert without_removed(old) == saved


def test_strategies_are_none_by_default():
    assert FST(metric).strategies == Strategies()
