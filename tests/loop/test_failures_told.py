"""No run fails in silence: what failed is told with its first cause, and a dead run stops."""

from __future__ import annotations

import logging

import dspy
import pytest
from chat_families import family_tokenizer
from helpers import Echo, RawAdapter, Twice, questions, vowels

from fst_dspy import FST, LocalLM
from fst_dspy.errors import ConfigError, MetricError, ProgramError, TrainingError
from fst_dspy.loop import ending
from fst_dspy.loop.share import Decision, Share
from fst_dspy.rollouts.health import IN_THOUGHT, Tally, check_first_rollouts, told_failures
from fst_dspy.types import Failure, Rollout

SETTINGS = dict(
    max_cycles=3,
    steps_per_cycle=2,
    group_size=4,
    population_size=2,
    problems_per_step=2,
    max_tokens=8,
    val_size=4,
    first_cycle_iterations=1,
)

BOTH = Share(True, True)


def compiled(model, metric=vowels, adapter=None, program=None, **settings):
    fst = FST(metric, track_stats=True, **(SETTINGS | settings))
    with dspy.context(lm=LocalLM(str(model)), adapter=adapter or RawAdapter()):
        student = program or Echo()
        return fst.compile(student, trainset=questions(6), valset=questions(4, 6)).detailed_results


def rollout(kind=None, message="", reward=0.0):
    failure = Failure(kind, message) if kind else None
    return Rollout("e", "c", (), (), reward, "", failure, 0)


def test_a_metric_that_fails_on_all_it_is_given_is_told_though_answers_fail_too():
    first = [rollout("parse", "no fields"), rollout("metric", "KeyError: 'label'")] * 2
    with pytest.raises(MetricError, match="KeyError: 'label'"):
        check_first_rollouts(first, Echo())
    with pytest.raises(ProgramError, match="boom"):
        check_first_rollouts([rollout("parse", "x"), rollout("program", "boom")], Echo())
    check_first_rollouts([rollout("parse", "x")] * 3, Echo())
    check_first_rollouts([rollout("metric", "x"), rollout(reward=1.0)], Echo())
    with pytest.raises(ProgramError, match="ConnectionError; what the program runs on fails"):
        check_first_rollouts([rollout("infrastructure", "ConnectionError")], Echo())
    with pytest.raises(ProgramError, match="program: too long; the program fails"):
        check_first_rollouts([rollout("program", "too long\n\n  To fix:\n  - Shorten")], Echo())


def test_predictors_that_are_only_asked_greedily_are_told_of(tiny_qwen3, caplog):
    program = Twice()
    compiled(tiny_qwen3, program=program, arm="rl_only", max_cycles=1)
    assert "learn nothing" not in caplog.text
    program.second.config["temperature"] = 0.0
    compiled(tiny_qwen3, program=program, arm="gepa_only", max_cycles=1)
    assert "learn nothing" not in caplog.text
    compiled(tiny_qwen3, program=program, arm="rl_only", max_cycles=1)
    assert "the weights learn nothing from the calls of second, which are at temperature 0" in (
        caplog.text
    )


def test_a_predictor_that_is_never_given_its_inputs_ends_the_run(tiny_qwen3):
    renamed = [dspy.Example(ticket=q.question).with_inputs("ticket") for q in questions(6)]
    fst = FST(lambda gold, pred: 1.0, **SETTINGS)
    with (
        dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()),
        pytest.raises(ProgramError, match=r"'self' was given none of its inputs \(question\)"),
    ):
        fst.compile(dspy.Predict("question -> answer"), trainset=renamed)


class Yields(Echo):
    def forward(self, question):
        yield self.say(question=question)


class Async(Echo):
    async def forward(self, question):
        return self.say(question=question)


@pytest.mark.parametrize(
    ("program", "told"), [(Yields, "forward is a generator"), (Async, "an async forward aforward")]
)
def test_a_forward_of_which_nothing_runs_is_told_as_that(program, told, tiny_qwen3):
    with pytest.raises(ProgramError, match=told):
        compiled(tiny_qwen3, program=program())


class Elsewhere(Echo):
    """Asks a predictor of its own only now and then."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, question):
        return (self.say if self.own(question) else dspy.Predict("question -> answer"))(
            question=question
        )


@pytest.mark.parametrize(
    ("own", "told"), [(lambda _: False, True), (lambda question: question.endswith("7"), False)]
)
def test_that_none_of_the_tuned_predictors_runs_is_told(own, told, tiny_qwen3, caplog):
    compiled(tiny_qwen3, program=Elsewhere(own), arm="gepa_only", max_cycles=1)
    said = "of the predictors whose instructions are tuned (say) none was run"
    assert (said in caplog.text) == told
    assert not told or "but others were (unnamed)" in caplog.text


def test_credit_by_turns_without_turns_is_told(tiny_qwen3, caplog):
    compiled(tiny_qwen3, arm="rl_only", max_cycles=1, steps_per_cycle=1, credit="turn")
    (told,) = [r.message for r in caplog.records if "credit='turn'" in r.message]
    assert "no effect" in told


def test_what_is_told_has_share_cause_and_advice():
    tally = Tally().plus(
        [rollout("parse", "no 'queue'\nin it")] * 9 + [rollout(reward=1.0)], learned_from=True
    )
    assert (tally.low, tally.high, tally.shares) == (0.0, 1.0, {"parse": 0.9})
    tokenizer = family_tokenizer("qwen3")
    (text,) = told_failures(tally.shares, tally.messages, tokenizer)
    assert text.startswith("parse 90%: no 'queue' (") and "adapter" in text
    assert told_failures(tally.shares, tally.messages) == ["parse 90%: no 'queue'"]
    assert told_failures({"parse": 0.04}, {}, tokenizer) == []


@pytest.mark.parametrize(("name", "switched"), [("qwen3", True), ("deepseek-r1", False)])
def test_thoughts_that_are_cut_off_are_to_be_switched_off_where_they_can_be(name, switched):
    messages = {"truncated": f"The answer was cut off after 9 tokens, {IN_THOUGHT}, before it"}
    (text,) = told_failures({"truncated": 1.0}, messages, family_tokenizer(name))
    assert "raise max_tokens" in text and ("'enable_thinking': False" in text) == switched


def test_a_model_that_cannot_speak_the_format_is_told_and_ends_the_run(tiny_qwen3, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingError, match="nothing to learn"):
        compiled(tiny_qwen3, adapter=dspy.ChatAdapter(), structured=False)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("cycle 0:")]
    assert told and any("truncated" in text or "parse" in text for text in told)


def test_on_no_signal_warn_goes_on(tiny_qwen3, caplog):
    with caplog.at_level(logging.WARNING):
        result = compiled(
            tiny_qwen3, adapter=dspy.ChatAdapter(), on_no_signal="warn", structured=False
        )
    assert result.records[-1].cycle == 4
    assert "nothing to learn from" in caplog.text
    last = result.records[-1]
    assert sum(last.failure_shares.values()) == pytest.approx(1.0)
    assert set(last.failure_messages) == set(last.failure_shares)


def test_failures_are_counted_in_the_arm_of_prompts_alone(tiny_qwen3):
    adapter = dspy.ChatAdapter()
    result = compiled(
        tiny_qwen3,
        adapter=adapter,
        arm="gepa_only",
        max_cycles=1,
        on_no_signal="warn",
        structured=False,
    )
    assert all(sum(r.failure_shares.values()) == pytest.approx(1.0) for r in result.records)


def test_rewards_that_are_all_the_same_end_the_run_well(tiny_qwen3, caplog):
    def flat(gold, pred, trace=None):
        return 0.5

    with caplog.at_level(logging.WARNING):
        result = compiled(tiny_qwen3, flat)
    assert result.records[-1].cycle == 2, "the opening, and one full cycle"
    assert "every rollout of cycle 2 had the reward 0.5" in caplog.text
    assert result.stopped.startswith("every rollout of cycle 2 had the reward 0.5")
    assert result.records[-1].ended


def test_a_run_that_has_ended_of_itself_goes_on_when_told_to(
    tiny_qwen3, tmp_path, caplog, monkeypatch
):
    def decide(history, now, **_):
        return Decision(Share(False, False), "enough") if len(history) == 3 else Decision(BOTH)

    monkeypatch.setattr(ending, "next_share", decide)
    settings = {"log_dir": tmp_path, "val_size": 2, "problems_per_step": 1, "steps_per_cycle": 1}
    ended = compiled(tiny_qwen3, **settings)
    assert ended.stopped == "enough" and len(ended.records) == 3
    with caplog.at_level(logging.WARNING):
        assert compiled(tiny_qwen3, **settings).records == ended.records
    assert 'this run had ended: enough; on_no_signal="warn" lets it go on' in caplog.text
    further = compiled(tiny_qwen3, on_no_signal="warn", **settings)
    assert [record.share for record in further.records[1:]] == ["both"] * 3
    assert further.records[:3] == ended.records and further.stopped is None
    assert further.records[-1].rollouts.slow == 4


@pytest.mark.parametrize("right", [0.0, 1.0], ids=["none", "one"])
def test_few_failures_of_prompts_alone_say_little_where_validation_differs(tiny_qwen3, right):
    hard = {question.question for question in questions(6)}

    def seldom(gold, pred, trace=None):
        score = 0.0 if gold.question in hard else right
        return dspy.Prediction(score=score, feedback="Lesson: say early letters.")

    settings = {"arm": "gepa_only", "max_cycles": 3, "cold_start_demos": 0}
    result = compiled(tiny_qwen3, seldom, **settings)
    cut_short = "nothing to learn from" in (result.stopped or "")
    assert cut_short == (right == 0.0) and result.records[1].reward_range == (0.0, 0.0)


def test_a_limit_that_counts_nothing_is_refused(tiny_qwen3):
    with pytest.raises(ConfigError, match="max_env_steps is the only limit, and would never be"):
        compiled(tiny_qwen3, max_cycles=None, max_env_steps=100)
    with pytest.raises(ConfigError, match="max_env_steps and max_env_seconds are the only limits"):
        compiled(tiny_qwen3, max_cycles=None, max_env_steps=100, max_env_seconds=9.0)
    compiled(tiny_qwen3, max_cycles=None, max_env_steps=100, max_rollouts=1)


@pytest.mark.parametrize("arm", ["fst", "gepa_only", "rl_only"])
def test_scores_may_be_negative(tiny_qwen3, arm):
    def below(gold, pred, trace=None):
        return vowels(gold, pred).score - 2.0

    result = compiled(tiny_qwen3, below, arm=arm, max_cycles=1)
    assert result.best.score < 0


def test_a_killed_run_counts_its_failures_once(tiny_qwen3, tmp_path, monkeypatch):
    from helpers import kill_before_steps

    settings = {"adapter": RawAdapter(), "on_no_signal": "warn", "max_cycles": 2}
    whole = compiled(tiny_qwen3, log_dir=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        kill_before_steps(patch, 2)
        with pytest.raises(RuntimeError, match="killed"):
            compiled(tiny_qwen3, log_dir=tmp_path / "cut", **settings)
    resumed = compiled(tiny_qwen3, log_dir=tmp_path / "cut", **settings)
    for one, other in zip(whole.records, resumed.records, strict=True):
        assert one.failure_shares == other.failure_shares
        assert one.reward_range == other.reward_range


@pytest.mark.parametrize("score", [-2.0, 0.25])
def test_to_fail_never_pays(tiny_qwen3, score):
    """Of a metric below zero a failure gets the least it has given; of others 0, as ever."""

    def half_fail(gold, pred, trace=None):
        if int(gold.question.split()[-1]) % 2:
            raise ValueError("no number")
        return score

    result = compiled(tiny_qwen3, half_fail, max_cycles=1)
    assert result.records[-1].reward_range == (min(score, 0.0), max(score, min(score, 0.0)))
    assert result.records[0].val_score == pytest.approx((score + min(score, 0.0)) / 2)
