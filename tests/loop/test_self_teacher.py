"""Text feedback into the weights, on tiny random models."""

import itertools
from dataclasses import replace

import dspy
import pytest
import torch
from chat_families import save_family
from helpers import Echo, RawAdapter, questions, vowels
from helpers import sampled_logprobs as by_one_pass
from tiny_compile import SETTINGS, compile_tiny, raw_adapter  # noqa: F401
from training_rows import rows_for

from fst_dspy import FST, LocalLM
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError
from fst_dspy.loop.self_teacher import ANSWER, FEEDBACK, MOST_NATS, SelfTeacher, taught_rows
from fst_dspy.model.logprobs import completion_logprobs, sampled_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.slow.advantage import group_rows
from fst_dspy.slow.averaged_weights import AveragedWeights
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.types import Group

SAMPLING = SamplingConfig(max_tokens=8)


def groups_of(program, lm, metric, size=3):
    """A group of rollouts for each of two questions."""
    runner = RolloutRunner(program, metric, lm, SAMPLING, seed=0)
    candidate = seed_candidate(program)
    jobs = [RolloutJob(q, candidate, n) for q in questions(2) for n in range(size)]
    rollouts = runner.run(jobs, channel="slow", salt=0)
    parts = (rollouts[:size], rollouts[size:])
    return [Group(p[0].example_id, tuple(p)) for p in parts], {candidate.id: candidate}


def taught(lm, metric, perfect=1.0):
    """Groups, rows of the reward, and what the teacher says of each."""
    program = Echo()
    groups, candidates = groups_of(program, lm, metric)
    lessons = SelfTeacher(program, lm, perfect).lessons(groups, candidates)
    return groups, group_rows(groups, "group"), lessons.of_rows


def under(lm, instructions, rollout):
    """Log-probabilities of a rollout's answer where the instructions are others."""
    program = Echo()
    program.say.signature = program.say.signature.with_instructions(instructions)
    call, candidate = rollout.calls[0], seed_candidate(program)
    job = RolloutJob(next(q for q in questions(2) if q.question in str(rollout.traces)), candidate)
    runner = RolloutRunner(program, vowels, lm, SAMPLING, seed=0)
    (other,) = runner.run([job], channel="eval", salt=0)
    asked = replace(call, prompt_ids_T=other.calls[0].prompt_ids_T)
    return by_one_pass(lm.policy, asked, asked)


def test_a_token_is_credited_with_what_the_feedback_makes_of_it(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    groups, rows, lessons = taught(lm, vowels)
    rollouts = [rollout for group in groups for rollout in group.rollouts_G]
    assert len(rows) == len(lessons) == len(rollouts)
    for rollout, lesson in zip(rollouts, lessons, strict=True):
        note = f"Say something.\n\n{FEEDBACK.format(rollout.feedback)}"
        expected = under(lm, note, rollout) - torch.tensor(rollout.calls[0].logprobs_T)
        assert list(lesson) == pytest.approx(expected.tolist(), abs=1e-4)
        assert max(map(abs, lesson)) > 1e-3


def test_without_feedback_the_groups_best_answer_teaches_the_others(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    groups, _, lessons = taught(lm, lambda *given: vowels(*given).score)
    lessons = iter(lessons)
    for group in groups:
        best = max(group.rollouts_G, key=lambda rollout: rollout.reward)
        for rollout in group.rollouts_G:
            lesson = next(lessons)
            if rollout.reward == best.reward:
                assert lesson is None
                continue
            note = f"Say something.\n\n{ANSWER.format(best.calls[0].text.strip())}"
            expected = under(lm, note, rollout) - torch.tensor(rollout.calls[0].logprobs_T)
            assert list(lesson) == pytest.approx(expected.tolist(), abs=1e-4)


def test_nothing_is_said_of_what_was_perfect(tiny_qwen3):
    groups, _, lessons = taught(LocalLM(str(tiny_qwen3)), vowels, perfect=0.2)
    rewards = [rollout.reward for group in groups for rollout in group.rollouts_G]
    assert [lesson is None for lesson in lessons] == [reward >= 0.2 for reward in rewards]
    assert 0 < sum(lesson is None for lesson in lessons) < len(lessons)


def test_an_averaged_teacher_follows_the_live_weights_and_says_what_it_would(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    averaged = AveragedWeights(lm.policy, 0.25)
    before = lm.policy.trainable_state()
    slow = SlowConfig(learning_rate=1e-2)
    SlowTrainer(lm.policy, slow, SAMPLING, 3, seed=0).advance(rows_for(1))
    averaged.follow()
    after, version = lm.policy.trainable_state(), lm.policy.version()
    for name, tensor in averaged.state().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * after[name])
    program, other = Echo(), LocalLM(str(tiny_qwen3))
    groups, candidates = groups_of(program, lm, vowels)
    other.policy.load_trainable_state(averaged.state())
    lessons, expected, live = (
        SelfTeacher(program, reader, 1.0, teacher).lessons(groups, candidates)
        for reader, teacher in ((lm, averaged), (other, None), (lm, None))
    )
    assert lessons == expected != live
    assert lm.policy.version() == version
    assert lm.policy.trainable_state().keys() == after.keys()


def test_reward_and_feedback_are_mixed_by_the_weight():
    rows = rows_for(0, count=3)
    lessons = [[0.5] * len(rows[0].completion_ids_T), None, [9.0] * len(rows[2].completion_ids_T)]
    both = taught_rows(rows, lessons, SlowConfig(slow_signal="both", distillation_weight=0.25))
    first = 0.75 * rows[0].advantage + 0.125
    assert both[0].token_advantages_T == (first,) * len(rows[0].completion_ids_T)
    assert both[1].advantage == 0.75 * rows[1].advantage and not both[1].token_advantages_T
    assert both[2].token_advantages_T[0] == 0.75 * rows[2].advantage + 0.25 * MOST_NATS
    alone = taught_rows(rows, lessons, SlowConfig(slow_signal="feedback"))
    assert set(alone[0].token_advantages_T) == {0.5}
    assert not alone[1].has_gradient and alone[0].has_gradient


@pytest.mark.parametrize("loss_type", ["cispo", "grpo", "dr_grpo"])
def test_advantages_a_token_that_are_all_the_rows_make_the_same_step(loss_type, tiny_qwen3):
    steps = []
    for by_token in (False, True):
        rows = rows_for(1)
        if by_token:
            rows = [
                replace(
                    row, advantage=7.0, token_advantages_T=(row.advantage,) * len(row.logprobs_T)
                )
                for row in rows
            ]
        policy = Policy.load(tiny_qwen3)
        slow = SlowConfig(learning_rate=1e-2, loss_type=loss_type, micro_batch_size=4)
        stats = SlowTrainer(policy, slow, SAMPLING, 3, seed=0).advance(rows)
        steps.append((stats, policy.version()))
    assert steps[0] == steps[1]


def test_the_step_raises_what_the_teacher_prefers_token_by_token(tiny_qwen3):
    policy = Policy.load(tiny_qwen3)
    row = max(rows_for(2, advantages=[0.0] * 6), key=lambda row: len(row.logprobs_T))
    wanted = tuple((-1.0) ** n for n in range(len(row.completion_ids_T)))
    assert len(wanted) > 2
    (before,) = sampled_logprobs(policy, [row])
    slow = SlowConfig(learning_rate=1e-3, slow_signal="feedback")
    trainer = SlowTrainer(policy, slow, SAMPLING, 3, seed=0)
    for step in taught_rows([row], [wanted], slow):
        trainer.advance([step])
    (after,) = sampled_logprobs(policy, [row])
    moved = [b - a for a, b in zip(before, after, strict=True)]
    assert sum(m * w for m, w in zip(moved, wanted, strict=True)) > 0


def test_logprobs_of_sampled_tokens_are_those_of_the_vocabulary(tiny_qwen3, monkeypatch):
    policy, rows = Policy.load(tiny_qwen3), rows_for(3)
    whole = completion_logprobs(policy, rows)
    ids = torch.tensor([token for row in rows for token in row.completion_ids_T])
    expected = whole.gather(1, ids[:, None])[:, 0].tolist()
    # In parts of two tokens, which do not end where rows do.
    vocabulary = policy.model.config.vocab_size
    monkeypatch.setattr("fst_dspy.model.logprobs.CHUNK_BYTES", 2 * 4 * vocabulary)
    found = sampled_logprobs(policy, rows)
    assert [len(row.completion_ids_T) for row in rows] == list(map(len, found))
    assert [value for row in found for value in row] == pytest.approx(expected, abs=1e-5)


def wrong(gold, pred, *_):
    return dspy.Prediction(score=0.0, feedback="Write the letter b.")


@pytest.mark.parametrize("signal", ["reward", "feedback", "both"])
def test_groups_of_equal_rewards_have_a_gradient_by_feedback(signal, tiny_qwen3):
    settings = {"max_cycles": 1, "arm": "rl_only", "slow_signal": signal}
    _, lm, result = compile_tiny(tiny_qwen3, metric=wrong, on_no_signal="warn", **settings)
    record = result.records[-1]
    assert record.constant_group_share == 1.0
    moved = record.weights_version != lm.policy.base_version
    assert moved == (signal != "reward")


def of_ten(gold, pred, *_):
    return dspy.Prediction(score=10 * vowels(gold, pred).score + 2, feedback="Write the letter b.")


@pytest.mark.parametrize("by", [{"slow_signal": "feedback"}, {"skip_perfect_score": True}])
def test_a_metric_of_another_range_is_not_taken_for_perfect(by, tiny_qwen3):
    with pytest.raises(ConfigError, match=r"above perfect_score=1, and .* set perfect_score"):
        compile_tiny(tiny_qwen3, metric=of_ten, **by)
    arm = "rl_only" if "slow_signal" in by else "gepa_only"
    settings = {"arm": arm, "max_cycles": 1, "val_size": 1, "steps_per_cycle": 1}
    compile_tiny(tiny_qwen3, metric=of_ten, perfect_score=12.0, **by, **settings)


def test_scores_above_the_perfect_one_are_told_when_they_come(tiny_qwen3, caplog):
    asked = itertools.count()

    def later(gold, pred, trace=None):
        return dspy.Prediction(score=0.5 if next(asked) < 5 else 7.0, feedback="Write b.")

    settings = {"arm": "rl_only", "max_cycles": 1, "slow_signal": "feedback"}
    compile_tiny(tiny_qwen3, metric=later, **settings)
    assert "cycle 1: the metric gave 7, above perfect_score=1" in caplog.text


def test_weights_that_are_taught_nothing_end_the_run_and_it_is_told(tiny_qwen3, caplog):
    def silent(gold, pred, trace=None):
        return 0.0

    settings = {"arm": "rl_only", "max_cycles": 3, "slow_signal": "feedback"}
    result = compile_tiny(tiny_qwen3, metric=silent, **settings)[2]
    assert "slow_signal='feedback' taught the weights nothing" in caplog.text
    assert result.records[-1].cycle == 1 and "nothing to learn from" in result.stopped


class Told(dspy.Module):
    """Asks twice, with what it has been told in a history, and in a list, that it writes on in."""

    def __init__(self):
        super().__init__()
        fields = "history: dspy.History, seen: list[str], question -> answer"
        self.say = dspy.Predict(dspy.Signature(fields, "Say something."))

    def forward(self, question):
        history, seen = dspy.History(messages=[]), []
        for _ in range(2):
            found = self.say(history=history, seen=seen, question=question)
            history.messages.append({"question": question, "answer": found.answer})
            seen.append(found.answer)
        return found


def lessons_of(program, lm, metric=vowels):
    groups, candidates = groups_of(program, lm, metric, size=2)
    calls = [c for group in groups for rollout in group.rollouts_G for c in rollout.calls]
    return calls, SelfTeacher(program, lm, 1.0).lessons(groups, candidates), groups


def test_inputs_are_those_of_before_the_program_wrote_on_in_them(tiny_qwen3):
    lm, program = LocalLM(str(tiny_qwen3)), Told()
    calls, lessons, groups = lessons_of(program, lm)
    assert lessons.taught == len(calls) == 8 and not lessons.untaught
    for rollout in groups[0].rollouts_G:
        first, second = (trace.inputs for trace in rollout.traces)
        assert not first["seen"] and not first["history"].messages
        assert second["seen"] == [rollout.traces[0].outputs["answer"]]
        assert len(second["history"].messages) == 1


def in_context(self, question):
    with dspy.context(adapter=Loud()):
        return self.say(question=question)


def own_signature(self, question):
    signature = self.say.signature.with_instructions(f"Say {len(question)} words.")
    return self.say(question=question, signature=signature)


def own_texts(self, question):
    self.say.signature = self.say.signature.with_instructions(f"Say {len(question)} words.")
    return self.say(question=question)


class Loud(RawAdapter):
    """Another adapter, of another prompt."""

    def format(self, signature, demos, inputs):
        return [{"role": "user", "content": f"{signature.instructions} {inputs}!"}]


@pytest.mark.parametrize("forward", [in_context, own_signature, own_texts])
def test_calls_under_a_prompt_that_cannot_be_made_again_teach_nothing(forward, tiny_qwen3, caplog):
    program = type("Own", (Echo,), {"forward": forward})()
    calls, lessons, _ = lessons_of(program, LocalLM(str(tiny_qwen3)))
    assert lessons.of_rows == [None] * len(calls)
    assert lessons.untaught == {"prompt": len(calls)}
    settings = {"arm": "rl_only", "max_cycles": 1, "slow_signal": "feedback"}
    result = compile_tiny(tiny_qwen3, program, **settings)[2]
    assert result.records[-1].weights_version == result.base_version
    assert "taught the weights nothing: their prompts could not be made again" in caplog.text


class Sometimes(Echo):
    """Has one of its questions answered under another adapter."""

    def forward(self, question):
        return in_context(self, question) if question.endswith("0") else super().forward(question)


def test_that_some_prompts_cannot_be_made_again_is_told_once(tiny_qwen3, caplog):
    settings = {"arm": "rl_only", "max_cycles": 2, "slow_signal": "feedback", "steps_per_cycle": 3}
    result = compile_tiny(tiny_qwen3, Sometimes(), metric=wrong, on_no_signal="warn", **settings)[2]
    first, second = (record.lessons for record in result.records[1:])
    assert first["prompt"] and first["taught"] and second["prompt"]
    total = sum(first.values())
    assert caplog.text.count("could not be made again") == 1
    assert f"cycle 1: {first['prompt']} of {total} calls" in caplog.text


def test_every_answer_of_a_call_that_asks_for_several_is_taught(tiny_qwen3):
    program = Echo()
    program.say = dspy.Predict(program.say.signature, n=2)
    calls, lessons, _ = lessons_of(program, LocalLM(str(tiny_qwen3)), wrong)
    assert lessons.taught == len(calls) == 8


def test_a_predictor_is_read_with_the_settings_of_its_own_lm(tmp_path):
    lm, program = LocalLM(str(save_family(tmp_path, "qwen3"))), Echo()
    program.say.lm = lm.copy(chat_template_kwargs={"enable_thinking": False})
    calls, lessons, _ = lessons_of(program, lm)
    own, *_ = groups_of(Echo(), lm, vowels)[0][0].rollouts_G
    assert calls[0].prompt_ids_T != own.calls[0].prompt_ids_T
    assert lessons.taught == len(calls)


def test_lessons_that_do_not_fit_or_are_not_shown_are_counted(tiny_qwen3):
    lm, program = LocalLM(str(tiny_qwen3)), Echo()

    def wordy(gold, pred, trace=None):
        return dspy.Prediction(score=0.0, feedback="word " * lm.policy.context_length)

    assert lessons_of(program, lm, wordy)[1].untaught == {"long": 4}
    assert lessons_of(program, lm, lambda *given: 0.0)[1].untaught == {"silent": 4}

    class Mute(RawAdapter):
        def format(self, signature, demos, inputs):
            return [{"role": "user", "content": str(inputs)}]

    with dspy.context(adapter=Mute()):
        assert lessons_of(program, lm)[1].untaught == {"unshown": 4}


def test_that_all_answers_are_perfect_is_no_trouble(tiny_qwen3, caplog):
    settings = {"arm": "rl_only", "max_cycles": 1, "slow_signal": "feedback"}
    metric = lambda gold, pred, trace=None: dspy.Prediction(score=1.0, feedback="Well done.")  # noqa: E731
    result = compile_tiny(tiny_qwen3, metric=metric, on_no_signal="warn", **settings)[2]
    assert set(result.records[-1].lessons) == {"perfect"}
    assert "taught the weights nothing" not in caplog.text


def test_a_compiled_program_is_compiled_again_without_a_word_of_adapters(tiny_qwen3, caplog):
    program = dspy.Predict(dspy.Signature("question -> answer", "Say something."))
    settings = {"arm": "rl_only", "max_cycles": 1, "slow_signal": "both", "steps_per_cycle": 1}
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        for _ in range(2):
            fst = FST(vowels, **{**SETTINGS, **settings})
            program = fst.compile(program, trainset=questions(6), valset=questions(4, 6))
    assert "compiled under the adapter" not in caplog.text


def test_what_was_taught_is_recorded(tiny_qwen3, tmp_path):
    compile_tiny(tiny_qwen3, max_cycles=1, slow_signal="both", log_dir=tmp_path)
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert lines and all('"taught"' in line for line in lines)
