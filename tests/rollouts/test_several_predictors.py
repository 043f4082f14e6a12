"""Programs of several predictors: credit to every call, and feedback for the predictor at hand."""

import dspy
import pytest
from helpers import RawAdapter, Twice, questions

from fst_dspy import FST, LocalLM
from fst_dspy.config import SamplingConfig
from fst_dspy.fast.reflector import Trajectory, make_records
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.slow.advantage import group_advantages, group_rows
from fst_dspy.student.candidate import example_id, seed_candidate
from fst_dspy.types import Group

SAMPLING = SamplingConfig(max_tokens=6)


class Rounds(dspy.Module):
    """Calls its predictor one to four times, as the question says."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict(dspy.Signature("question -> answer", "Go on."))

    def forward(self, question):
        for _ in range(1 + int(question.split()[1]) % 4):
            answer = self.step(question=question).answer
        return dspy.Prediction(answer=answer)


def by_length(gold, pred, trace=None):
    return len(pred.answer) / 10


def runner_of(folder, program, metric, **more):
    with dspy.context(adapter=RawAdapter()):
        return RolloutRunner(program, metric, LocalLM(str(folder)), SAMPLING, 0, **more)


def rollouts_of(runner, count=4, repeats=1, channel="slow"):
    candidate = seed_candidate(runner.program)
    jobs = [RolloutJob(q, candidate, i) for q in questions(count) for i in range(repeats)]
    return runner.run(jobs, channel=channel, salt=1), jobs


def test_every_call_of_a_loop_is_a_row_with_its_rollouts_advantage(tiny_qwen3):
    runner = runner_of(tiny_qwen3, Rounds(), by_length)
    rollouts, _ = rollouts_of(runner, count=4, repeats=4)
    groups = [
        Group(example_id(q), tuple(rollouts[4 * p : 4 * p + 4])) for p, q in enumerate(questions(4))
    ]
    rows = iter(group_rows(groups, "group"))
    calls = set()
    for p, group in enumerate(groups):
        advantages = group_advantages(group)
        assert len(set(advantages)) > 1
        for rollout, advantage in zip(group.rollouts_G, advantages, strict=True):
            if rollout.failure is None:
                assert len(rollout.calls) == 1 + p
            calls.add(len(rollout.calls))
            for call in rollout.calls:
                row = next(rows)
                assert row.completion_ids_T == call.completion_ids_T
                assert row.logprobs_T == call.logprobs_T
                assert row.prompt_ids_T == call.prompt_ids_T
                assert row.advantage == advantage
    assert next(rows, None) is None and calls >= {1, 2, 3, 4}


def test_a_program_with_a_loop_trains(tiny_qwen3):
    with dspy.context(adapter=RawAdapter(), lm=LocalLM(str(tiny_qwen3))):
        fst = FST(by_length, max_cycles=1, steps_per_cycle=2, group_size=4, population_size=2,
                  problems_per_step=3, first_cycle_iterations=1, minibatch_size=2, max_tokens=6,
                  val_size=2, learning_rate=1e-2, track_stats=True)  # fmt: skip
        result = fst.compile(
            Rounds(), trainset=questions(6), valset=questions(2, 6)
        ).detailed_results
    assert result.records[-1].step == 2
    assert result.weights_version != result.base_version


ASKED: list = []


def about(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """A metric that knows what each predictor should have done."""
    if pred_name is None:
        return dspy.Prediction(score=0.5, feedback="Overall.")
    ((predictor, inputs, outputs),) = pred_trace
    ASKED.append((pred_name, predictor, inputs, outputs, trace))
    if pred_name == "second":
        return dspy.Prediction(score=0.9, feedback=f"Second, of {len(trace)} calls.")
    return dspy.Prediction(score=0.1, feedback="Overall.")


def test_the_metric_is_asked_about_each_predictor_as_gepa_does(tiny_qwen3):
    ASKED.clear()
    runner = runner_of(tiny_qwen3, Twice(), about, predictor_feedback=True)
    rollouts, jobs = rollouts_of(runner)
    fine = [(r, j) for r, j in zip(rollouts, jobs, strict=True) if r.failure is None]
    assert fine and len(ASKED) == 2 * len(fine)
    for rollout, job in fine:
        assert rollout.reward == 0.5, "the score given with pred_name is not the reward"
        assert rollout.feedback == "Overall."
        said = f"Second, of {len(rollout.traces)} calls."
        assert rollout.feedback_by_predictor == {"second": said}
        pair = [Trajectory(job.example, rollout)]
        assert make_records("second.instructions", pair)[0]["Feedback"] == said
        assert make_records("first.instructions", pair)[0]["Feedback"] == "Overall."
    for name, predictor, inputs, outputs, trace in ASKED:
        assert isinstance(predictor, dspy.Predict) and isinstance(outputs, dspy.Prediction)
        assert set(inputs) == set(predictor.signature.input_fields)
        own = [call for call in trace if call[0] is predictor]
        assert own[-1][2] is outputs, f"the last call of {name}"


@pytest.mark.parametrize(
    ("program", "metric", "asked", "channel"),
    [
        (Twice, about, False, "slow"),
        (Twice, about, True, "eval"),
        (Rounds, about, True, "slow"),
        (Twice, by_length, True, "slow"),
    ],
    ids=["not asked for", "validation", "one predictor", "three arguments"],
)
def test_it_is_not_asked_where_nothing_would_come_of_it(
    tiny_qwen3, program, metric, asked, channel
):
    ASKED.clear()
    runner = runner_of(tiny_qwen3, program(), metric, predictor_feedback=asked)
    rollouts, _ = rollouts_of(runner, channel=channel)
    assert ASKED == [] and all(not r.feedback_by_predictor for r in rollouts)


def test_a_metric_that_fails_on_a_predictor_costs_only_the_hint(tiny_qwen3, caplog):
    def fragile(gold, pred, trace=None, pred_name=None, pred_trace=None):
        if pred_name:
            raise KeyError(pred_name)
        return 0.5

    runner = runner_of(tiny_qwen3, Twice(), fragile, predictor_feedback=True)
    rollouts = [*rollouts_of(runner)[0], *rollouts_of(runner)[0]]
    assert any(r.failure is None for r in rollouts)
    assert all(r.reward == 0.5 and not r.feedback_by_predictor for r in rollouts if not r.failure)
    (told,) = [r for r in caplog.records if "asked about a predictor" in r.message]
    assert told.exc_info[0] is KeyError, "once, with its cause"


@pytest.mark.parametrize(
    ("answer", "heard"),
    [
        (dspy.Prediction(score=0.5, feedback=""), ""),
        ({"score": 0.5, "feedback": ""}, ""),
        (dspy.Prediction(score=0.5), "Overall."),
        (dspy.Prediction(score=0.5, feedback=None), "Overall."),
        (0.5, "Overall."),
    ],
)
def test_a_metric_may_have_nothing_to_say_of_a_predictor(tiny_qwen3, answer, heard):
    """An empty feedback is its answer; where it gives none, that on the whole program stands."""

    def about_second(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=0.5, feedback="Overall.") if pred_name is None else answer

    runner = runner_of(tiny_qwen3, Twice(), about_second, predictor_feedback=True)
    rollouts, jobs = rollouts_of(runner)
    fine = [(r, j) for r, j in zip(rollouts, jobs, strict=True) if r.failure is None]
    assert fine
    for rollout, job in fine:
        pair = [Trajectory(job.example, rollout)]
        assert make_records("first.instructions", pair)[0]["Feedback"] == heard
