import logging
import threading
from collections import deque
from contextlib import suppress

import dspy
import pytest
from dspy.clients.base_lm import GLOBAL_HISTORY
from helpers import Echo, RawAdapter, Twice, questions, vowels

import fst_dspy
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ProgramError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.rollouts.health import check_first_rollouts, told_failures, unread_share
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.adapter import strict_adapter
from fst_dspy.student.candidate import example_id, seed_candidate

SAMPLING = SamplingConfig(max_tokens=8, rollout_timeout=30, failure_score=-1.0)


@pytest.fixture
def lm(tiny_qwen3):
    return LocalLM(str(tiny_qwen3))


def make_runner(lm, program=None, metric=vowels, sampling=SAMPLING, seed=0):
    with dspy.context(adapter=RawAdapter()):
        return RolloutRunner(program or Echo(), metric, lm, sampling, seed)


def jobs_for(program, count=4, repeats=3):
    candidate = seed_candidate(program)
    return [RolloutJob(q, candidate, i) for q in questions(count) for i in range(repeats)]


def test_rollouts_come_back_in_order_with_everything_recorded(lm):
    runner = make_runner(lm)
    jobs = jobs_for(Echo())
    rollouts = runner.run(jobs, channel="slow", salt=1)
    assert [r.candidate_id for r in rollouts] == [j.candidate.id for j in jobs]
    assert runner.counts.slow == len(jobs) and runner.counts.fast == 0
    for rollout in rollouts:
        (call,) = rollout.calls
        assert call.predictor == "say"
        assert len(call.completion_ids_T) == len(call.logprobs_T) > 0
        if rollout.failure is None:
            assert rollout.traces[0].outputs["answer"] == call.text
            assert rollout.feedback.startswith("Lesson")
    assert len({r.calls[0].completion_ids_T for r in rollouts}) > len(jobs) // 2


def test_the_same_seed_gives_the_same_rollouts_whatever_the_threads_do(lm):
    program = Twice()
    first = make_runner(lm, program).run(jobs_for(program), channel="slow", salt=1)
    again = make_runner(lm, program).run(jobs_for(program), channel="slow", salt=1)
    assert first == again
    other = make_runner(lm, program, seed=1).run(jobs_for(program), channel="slow", salt=1)
    assert other != first


def test_what_dspy_warns_of_in_every_call_is_told_once_a_run(lm, caplog):
    program = Echo()
    program.say = dspy.Predict("question: int -> answer")
    logger = logging.getLogger("dspy.predict.predict")  # DSPy's do not propagate
    logger.addHandler(caplog.handler)
    try:
        for runner in (make_runner(lm, program), make_runner(lm, program)):
            runner.run(jobs_for(program, 2, 1), channel="slow", salt=1)
            runner.run(jobs_for(program, 2, 1), channel="slow", salt=2)
    finally:
        logger.removeHandler(caplog.handler)
    # By record: where they do propagate, pytest hears each twice.
    told = {id(r): r.getMessage() for r in caplog.records if "Type mismatch" in r.getMessage()}
    assert len(told) == 2 and all("told once" in text for text in told.values())


class Refusing(RawAdapter):
    """Reads nothing."""

    def parse(self, signature, completion):
        raise dspy.utils.exceptions.AdapterParseError("Refusing", signature, completion)


def test_an_answer_that_fills_the_context_is_told_as_such(lm, caplog):
    with dspy.context(adapter=Refusing()):
        runner = RolloutRunner(Echo(), vowels, lm, SAMPLING, 0)
    (first,) = runner.run(jobs_for(Echo(), 1, 1), channel="slow", salt=1)
    lm.policy.context_length = len(first.calls[0].prompt_ids_T) + 3
    rollouts = runner.run(jobs_for(Echo(), 1, 8), channel="slow", salt=1)
    cut = [r.failure for r in rollouts if r.failure.kind == "truncated"]
    assert cut and all(
        "3 tokens, at the end of the context window, before" in f.message for f in cut
    )
    (told,) = told_failures({"truncated": 1.0}, {"truncated": cut[0].message}, lm.policy.tokenizer)
    assert "shorten instructions" in told and "max_tokens" not in told
    with dspy.context(adapter=Refusing(), lm=lm.copy(temperature=0.0)), suppress(Exception):
        Echo()(question="number 0")
    assert "at the end of the context window" in caplog.text


def test_a_prompt_that_fills_the_context_is_told_as_such(lm):
    """It is not that the program fails, and to run it once shows nothing where examples differ."""
    runner = make_runner(lm)
    lm.policy.context_length = 8
    (rollout,) = runner.run(jobs_for(Echo(), 1, 1), channel="slow", salt=1)
    kind, message = rollout.failure.kind, rollout.failure.message
    assert kind == "too_long" and "holds 8 tokens of prompt and completion" in message
    (told,) = told_failures({kind: 1.0}, {kind: message}, lm.policy.tokenizer)
    assert "shorten instructions" in told and "the program fails" not in told
    with pytest.raises(ProgramError, match=r"holds 8 tokens.*prompts leave no room for answers"):
        check_first_rollouts([rollout], Echo())


def test_every_call_of_several_predictors_is_kept(lm):
    program = Twice()
    for rollout, job in zip(
        make_runner(lm, program).run(jobs_for(program), channel="eval", salt=0),
        jobs_for(program),
        strict=True,
    ):
        if rollout.failure is None:
            times = 1 + len(job.example.question) % 3
            assert [c.predictor for c in rollout.calls] == ["first", *["second"] * times]
            assert [t.predictor for t in rollout.traces] == [c.predictor for c in rollout.calls]


def test_a_program_reads_its_own_history_as_it_runs(lm):
    class Reads(Echo):
        def forward(self, question):
            self.say(question=question)
            found = super().forward(question)
            histories = (dspy.settings.lm.history, self.say.history, self.history)
            assert [len(history) for history in histories] == [2, 2, 2]
            assert all(question in str(history[-1]["messages"]) for history in histories)
            return dspy.Prediction(answer=str(self.say.history[-1]["outputs"][0]) + found.answer)

    before = len(GLOBAL_HISTORY)
    program = Reads()
    with dspy.context(lm=lm):
        rollouts = make_runner(lm, program).run(jobs_for(program), channel="slow", salt=1)
    assert all(r.failure is None or r.failure.kind != "program" for r in rollouts)
    assert sum(r.failure is None for r in rollouts) > len(rollouts) // 2
    assert not lm.history and not program.say.history and len(GLOBAL_HISTORY) == before


class Basket:
    def __init__(self, held=None):
        self.items, self.held = [], held

    def __repr__(self):
        return f"Basket({self.items})"


@pytest.mark.parametrize(
    ("basket", "shared"),
    [(Basket(), 0), (deque(), 0), (Basket(threading.Lock()), 12)],  # a lock cannot be copied
)
def test_a_program_may_write_into_what_it_is_given(lm, basket, shared):
    class Writes(Echo):
        def forward(self, question, basket):
            getattr(basket, "items", basket).append(question)
            return super().forward(question)

    program = Writes()
    jobs = [
        RolloutJob(job.example.copy(basket=basket).with_inputs("question", "basket"), job.candidate)
        for job in jobs_for(program)
    ]
    ids = [example_id(job.example) for job in jobs]
    rollouts = make_runner(lm, program).run(jobs, channel="slow", salt=1)
    assert [rollout.example_id for rollout in rollouts] == ids
    assert len(getattr(basket, "items", basket)) == shared


def test_a_parse_failure_is_a_scored_rollout_with_its_text(lm):
    class Unparsable(RawAdapter):
        def parse(self, signature, completion):
            return super().parse(signature, "!" + completion)

    with dspy.context(adapter=Unparsable()):
        runner = RolloutRunner(Echo(), vowels, lm, SAMPLING, 0)
    for rollout in runner.run(jobs_for(Echo()), channel="slow", salt=0):
        assert rollout.failure.kind in ("parse", "truncated", "empty")
        assert rollout.reward == -1.0
        assert rollout.calls and rollout.traces[0].outputs is None
        assert "answer" in rollout.feedback


def _unread(self, question):
    with suppress(dspy.utils.exceptions.AdapterParseError):
        self.say(question=question)


def _too_long(self, question):
    with suppress(dspy.ContextWindowExceededError):
        self.say(question="many words " * 500)


def _unread_and_on(self, question):
    return dspy.Prediction(answer=_unread(self, question).answer)


@pytest.mark.parametrize(
    ("forward", "kinds"),
    [
        (_unread, {"parse", "truncated", "empty"}),
        (_unread_and_on, {"parse", "truncated", "empty"}),
        (_too_long, {"too_long"}),
    ],
)
def test_a_program_that_goes_on_without_an_answer_fails_by_that(lm, forward, kinds):
    class Unparsable(RawAdapter):
        def parse(self, signature, completion):
            return super().parse(signature, "!" + completion)

    program = type("Careful", (Echo,), {"forward": forward})()
    with dspy.context(adapter=Unparsable()):
        runner = RolloutRunner(program, vowels, lm, SAMPLING, 0)
    rollouts = runner.run(jobs_for(program), channel="slow", salt=0)
    assert {r.failure.kind for r in rollouts} <= kinds
    if forward is not _too_long:  # it may be learned away
        check_first_rollouts(rollouts, program)
    assert unread_share(rollouts) == float(forward is not _too_long)


@pytest.mark.parametrize(
    ("result", "message"),
    [(None, "must return a number"), (float("nan"), "finite"), (1e30, "finite"), ("x", "number")],
)
def test_a_bad_score_is_a_metric_failure(lm, result, message):
    runner = make_runner(lm, metric=lambda gold, pred, trace=None: result)
    for rollout in runner.run(jobs_for(Echo(), 1), channel="slow", salt=0):
        if rollout.failure.kind == "metric":
            assert message in rollout.failure.message
            assert rollout.reward == -1.0 and rollout.calls


def test_a_metric_that_raises_and_a_program_that_raises_end_only_their_rollout(lm):
    class Half(Echo):
        def forward(self, question):
            if question.endswith(("1", "3")):
                raise ValueError("odd question")
            return super().forward(question)

    def metric(gold, pred, trace=None):
        if gold.question.endswith("2"):
            raise ZeroDivisionError("two")
        return 1.0

    rollouts = make_runner(lm, Half(), metric).run(jobs_for(Half()), channel="slow", salt=0)
    kinds = [r.failure.kind if r.failure else None for r in rollouts]
    assert kinds[3:6] == kinds[9:12] == ["program"] * 3
    assert "odd question" in rollouts[3].failure.message
    assert set(kinds[6:9]) <= {"metric", "parse", "truncated", "empty"}
    assert "metric" in kinds[6:9]
    assert None in kinds[0:3]


class _Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no message was set")


class _Raising(Echo):
    """It raises what it is made with."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, question):
        super().forward(question)
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_Unspeakable(), "_Unspeakable, whose message cannot be read (RuntimeError)"),
        (ValueError("<html>" * 1_000_000), "ValueError: <html><html>"),
    ],
    ids=["without a message", "a page long"],
)
def test_an_error_of_any_message_ends_its_rollout_in_a_few_words(lm, error, said):
    def metric(gold, pred, trace=None):
        raise error

    for program, scorer in ((_Raising(error), vowels), (Echo(), metric)):
        rollouts = make_runner(lm, program, scorer).run(
            jobs_for(program, 1, 3), channel="slow", salt=0
        )
        told = [r.failure.message for r in rollouts if r.failure.kind in ("program", "metric")]
        assert told and all(said in message and len(message) < 5000 for message in told)


def test_a_metric_that_returns_a_document_is_told_in_a_few_words(lm):
    runner = make_runner(lm, metric=lambda gold, pred: ["word"] * 1_000_000)
    (rollout,) = runner.run(jobs_for(Echo(), 1, 1), channel="slow", salt=1)
    assert "must return a number" in rollout.failure.message
    assert len(rollout.failure.message) < 500


def test_a_judge_that_cannot_be_reached_says_nothing_of_the_answer(lm):
    def metric(gold, pred, trace=None):
        raise ConnectionError("the judge is away")

    rollouts = make_runner(lm, metric=metric).run(jobs_for(Echo()), channel="slow", salt=0)
    scored = [r for r in rollouts if "the judge is away" in r.failure.message]
    assert scored and all(r.failure.kind == "infrastructure" for r in scored)


def test_a_program_that_never_calls_its_predictor_is_marked(lm):
    class Silent(Echo):
        def forward(self, question):
            return dspy.Prediction(answer="abc")

    rollouts = make_runner(lm, Silent()).run(jobs_for(Silent(), 1), channel="slow", salt=0)
    assert {r.failure.kind for r in rollouts} == {"no_calls"}


def test_a_program_that_loops_is_stopped_at_max_calls(lm):
    class Loop(Echo):
        def forward(self, question):
            while True:
                self.say(question=question)

    sampling = SamplingConfig(max_tokens=2, max_calls=3)
    rollouts = make_runner(lm, Loop(), sampling=sampling).run(
        jobs_for(Loop(), 2), channel="slow", salt=0
    )
    stopped = [r for r in rollouts if r.failure.kind == "program"]
    assert stopped and all("max_calls=3" in r.failure.message for r in stopped)
    assert all(len(r.calls) == 3 for r in stopped)


def test_an_environments_turns_are_no_loop(lm):
    class Long:
        def reset(self, question):
            self.reward = 0.0
            return "go on"

        def step(self, text: str) -> str:
            """Go on."""
            self.reward += 1.0
            return "go on"

    program = fst_dspy.env(Long, "observation -> action", max_turns=6)
    sampling = SamplingConfig(max_tokens=2, max_calls=3)
    runner = make_runner(lm, program, fst_dspy.env_reward, sampling)
    rollouts = runner.run(jobs_for(program, 2), channel="slow", salt=0)
    assert {(len(r.calls), r.failure) for r in rollouts} == {(6, None)}


@pytest.mark.slow
def test_a_program_or_metric_that_hangs_is_given_up_and_the_others_go_on(lm):
    release, waited = threading.Event(), []

    class Hang(Echo):
        def forward(self, question):
            if question.endswith("0"):
                waited.append(release.wait(60))
            return super().forward(question)

    def metric(gold, pred, trace=None):
        if gold.question.endswith("1"):
            waited.append(release.wait(60))
        return 1.0

    # Time enough for the others, whatever else the machine does.
    sampling = SamplingConfig(max_tokens=4, rollout_timeout=5.0)
    rollouts = make_runner(lm, Hang(), metric, sampling).run(
        jobs_for(Hang(), 3, 2), channel="slow", salt=0
    )
    assert not waited, "the rollouts that hang were waited for"
    release.set()
    assert [r.failure.kind for r in rollouts[:2]] == ["timeout"] * 2
    assert "timeout" in [r.failure.kind for r in rollouts[2:4] if r.failure]
    assert all(r.failure is None or r.failure.kind != "timeout" for r in rollouts[4:])


def test_metrics_run_while_the_other_rollouts_generate(lm):
    generated, waited = threading.Event(), []

    class Uneven(Echo):
        def forward(self, question):
            answer = super().forward(question)
            return answer if question.endswith("0") else super().forward(question)

    def metric(gold, pred, trace=None):
        if gold.question.endswith("0"):  # one call, and a metric that outlasts the others' second
            waited.append(generated.wait(60))
        else:
            generated.set()
        return 1.0

    make_runner(lm, Uneven(), metric).run(jobs_for(Uneven()), channel="slow", salt=0)
    assert waited and all(waited)


def test_async_programs_run(lm):
    class Async(dspy.Module):
        def __init__(self):
            super().__init__()
            self.say = dspy.Predict(dspy.Signature("question -> answer", "Say something."))

        async def aforward(self, question):
            return await self.say.acall(question=question)

    rollouts = make_runner(lm, Async()).run(jobs_for(Async(), 2), channel="slow", salt=0)
    assert all(len(r.calls) == 1 for r in rollouts)
    assert any(r.failure is None for r in rollouts)


def test_the_second_try_through_json_is_switched_off_on_a_copy():
    own = dspy.ChatAdapter()
    assert strict_adapter(own).use_json_adapter_fallback is False
    assert own.use_json_adapter_fallback is True
    assert isinstance(strict_adapter(dspy.JSONAdapter()), dspy.JSONAdapter)
    assert strict_adapter(None).use_json_adapter_fallback is False


def test_the_users_trace_holds_nothing_of_rollouts(tiny_qwen3):
    program, lm = Echo(), LocalLM(str(tiny_qwen3))
    with dspy.context(lm=lm, adapter=RawAdapter(), trace=[]):
        runner = RolloutRunner(program, vowels, lm, SamplingConfig(), 0)
        jobs = [RolloutJob(e, seed_candidate(program)) for e in questions(2)]
        runner.run(jobs, channel="eval", salt=0)
        assert dspy.settings.trace == []


def test_the_first_traceback_of_a_kind_is_shown_once(tiny_qwen3, caplog):
    def broken(gold, pred, trace=None):
        return {}["no such label"]

    program, lm = Echo(), LocalLM(str(tiny_qwen3))
    with dspy.context(lm=lm, adapter=RawAdapter()):
        runner = RolloutRunner(program, broken, lm, SamplingConfig(), 0)
        jobs = [RolloutJob(e, seed_candidate(program)) for e in questions(3)]
        runner.run(jobs, channel="eval", salt=0)
        runner.run(jobs, channel="eval", salt=1)
    assert caplog.text.count("Traceback") == 1
    assert 'return {}["no such label"]' in caplog.text
