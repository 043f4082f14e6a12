"""Text feedback into the weights, on tiny random models."""

import itertools
import json
from dataclasses import replace

import dspy
import pytest
import torch
from chat_families import save_family
from helpers import (
    Echo,
    RawAdapter,
    Twice,
    assert_equal_but_for_rounding,
    kill_before_steps,
    questions,
    vowels,
)
from tiny_compile import SETTINGS, compile_tiny, raw_adapter  # noqa: F401
from training_rows import rows_for

from fst_dspy import FST, LocalLM
from fst_dspy.config import FSTConfig, SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError, TrainingError
from fst_dspy.loop import self_teacher
from fst_dspy.loop.learner import GRPOLearner
from fst_dspy.loop.progress import SilentProgress
from fst_dspy.loop.self_teacher import ANSWER, FEEDBACK, SelfTeacher
from fst_dspy.model.logprobs import completion_logprobs, completion_states, sampled_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.report import write_report
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.slow import taught_trainer
from fst_dspy.slow.advantage import group_rows
from fst_dspy.slow.averaged_weights import AveragedWeights
from fst_dspy.slow.taught_trainer import Reading, TaughtTrainer, jensen_shannon
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
    """Groups, the rows of their calls, and what the teacher reads of them."""
    program = Echo()
    groups, candidates = groups_of(program, lm, metric)
    rows = group_rows(groups, "group")
    return groups, rows, SelfTeacher(program, lm, perfect).read(groups, rows, candidates)


def asked_with(lm, instructions, rollout):
    """The prompt of a rollout's question where the instructions are others."""
    program = Echo()
    program.say.signature = program.say.signature.with_instructions(instructions)
    question = next(q for q in questions(2) if q.question in str(rollout.traces))
    runner = RolloutRunner(program, vowels, lm, SAMPLING, seed=0)
    job = RolloutJob(question, seed_candidate(program))
    (other,) = runner.run([job], channel="eval", salt=0)
    return other.calls[0].prompt_ids_T


def test_an_answer_is_read_with_its_feedback_behind_the_instructions(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    groups, rows, readings = taught(lm, vowels)
    rollouts = [rollout for group in groups for rollout in group.rollouts_G]
    assert [reading.student for reading in readings.found] == rows and not readings.untaught
    for rollout, reading in zip(rollouts, readings.found, strict=True):
        note = f"Say something.\n\n{FEEDBACK.format(rollout.feedback)}"
        prompt = asked_with(lm, note, rollout)
        assert reading.teacher == replace(reading.student, prompt_ids_T=prompt)
        assert prompt != reading.student.prompt_ids_T == rollout.calls[0].prompt_ids_T


def test_without_feedback_the_groups_best_answer_teaches_the_others(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    groups, rows, readings = taught(lm, lambda *given: vowels(*given).score)
    by_row = {id(reading.student): reading.teacher for reading in readings.found}
    rows_left = iter(rows)
    for group in groups:
        best = max(group.rollouts_G, key=lambda rollout: rollout.reward)
        for rollout in group.rollouts_G:
            teacher = by_row.get(id(next(rows_left)))
            if rollout.reward == best.reward:
                assert teacher is None
                continue
            note = f"Say something.\n\n{ANSWER.format(best.calls[0].text.strip())}"
            assert teacher.prompt_ids_T == asked_with(lm, note, rollout)
    assert by_row and readings.untaught["silent"] == len(rows) - len(by_row)


def test_nothing_is_said_of_what_was_perfect(tiny_qwen3):
    groups, rows, readings = taught(LocalLM(str(tiny_qwen3)), vowels, perfect=0.2)
    rewards = [rollout.reward for group in groups for rollout in group.rollouts_G]
    told = [reading.student for reading in readings.found]
    assert told == [row for row, reward in zip(rows, rewards, strict=True) if reward < 0.2]
    assert 0 < len(told) < len(rows) and readings.untaught == {"perfect": len(rows) - len(told)}


def test_an_averaged_teacher_follows_the_live_weights(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    averaged = AveragedWeights(lm.policy, 0.25)
    before = lm.policy.trainable_state()
    slow = SlowConfig(learning_rate=1e-2)
    SlowTrainer(lm.policy, slow, SAMPLING, 3, seed=0).advance(rows_for(1))
    averaged.follow()
    after = lm.policy.trainable_state()
    for name, tensor in averaged.state().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * after[name])


# --- the step -------------------------------------------------------------------------------------


def readings_of(rows):
    """Rows, each read under another prompt."""
    return [Reading(row, replace(row, prompt_ids_T=(*row.prompt_ids_T[::-1], 5))) for row in rows]


def taught_by(policy, slow, weights):
    """A trainer whose teacher has weights of its own."""
    return TaughtTrainer(
        policy,
        slow,
        SAMPLING,
        9,
        0,
        teaching=lambda: policy.holding(weights),
        divergence=jensen_shannon,
    )


def step_of(folder, rows, readings, weight, *, before=None, **settings):
    """The gradients, the statistics and the policy of one step."""
    policy = Policy.load(folder)
    slow = SlowConfig(learning_rate=1e-2, max_grad_norm=0, **settings)
    trainer = taught_by(policy, slow, before or policy.trainable_state())
    caught = {}

    def catch(*_):
        caught.update((name, w.grad.clone()) for name, w in policy.model.named_parameters())

    trainer._trl.optimizer.optimizer.register_step_pre_hook(catch)
    return caught, trainer.imitate(readings, rows, weight), policy


def by_hand(folder, rows, readings, weight, before):
    """The same gradients: each row alone, its whole vocabulary at once."""
    policy = Policy.load(folder)
    tokens = sum(len(row.completion_ids_T) for row in rows)
    with torch.no_grad(), policy.holding(before):
        teacher = [completion_logprobs(policy, [reading.teacher]) for reading in readings]
    loss = 0.0
    for row in rows:
        own_TV = completion_logprobs(policy, [row])
        own_T = own_TV.gather(1, torch.tensor(row.completion_ids_T)[:, None])[:, 0]
        # On policy the ratio is 1, and only its gradient counts.
        value = -(1 - weight) * row.advantage * (own_T - own_T.detach()).exp().sum() / tokens
        for reading, other_TV in zip(readings, teacher, strict=True):
            if reading.student is row:
                mixed_TV = ((own_TV.exp() + other_TV.exp()) / 2).log()
                both = (
                    torch.nn.functional.kl_div(mixed_TV, p, reduction="sum", log_target=True)
                    for p in (own_TV, other_TV)
                )
                value = value + weight * sum(both) / 2 / tokens
        value.backward()
        loss += value.item()
    return {name: weight.grad for name, weight in policy.model.named_parameters()}, loss


def on_policy(folder, rows):
    """Rows with the log-probabilities that the model has for them."""
    policy = Policy.load(folder)
    found = sampled_logprobs(policy, rows)
    return [replace(row, logprobs_T=own) for row, own in zip(rows, found, strict=True)]


@pytest.mark.parametrize("size", [None, 2])
def test_the_gradient_is_that_of_reward_and_divergence_by_hand(size, tiny_qwen3, monkeypatch):
    rows = on_policy(tiny_qwen3, rows_for(1))
    readings = readings_of(rows[::2])
    before = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(n))
        for n, (name, tensor) in enumerate(Policy.load(tiny_qwen3).trainable_state().items())
    }
    expected, loss = by_hand(tiny_qwen3, rows, readings, 0.3, before)
    if size:  # parts of two tokens over the vocabulary
        vocabulary = Policy.load(tiny_qwen3).model.config.vocab_size
        monkeypatch.setattr("fst_dspy.model.logprobs.CHUNK_BYTES", 2 * 4 * vocabulary)
    options = {"before": before, "micro_batch_size": size, "loss_type": "dapo"}
    found, stats, policy = step_of(tiny_qwen3, rows, readings, 0.3, **options)
    assert_equal_but_for_rounding(found, expected)
    assert stats.loss == pytest.approx(loss, rel=1e-4)
    assert stats.skipped is None and policy.step == 1


def test_what_feedback_says_is_approached_and_nothing_is_said_of_the_rest(tiny_qwen3):
    rows = rows_for(2, advantages=[0.0] * 6)
    before = Policy.load(tiny_qwen3).trainable_state()
    policy = Policy.load(tiny_qwen3)
    slow = SlowConfig(learning_rate=1e-2, slow_signal="feedback")
    trainer = taught_by(policy, slow, before)
    lessons = [trainer.imitate(readings_of(rows[:3]), rows).lesson for _ in range(8)]
    assert lessons[-1] < 0.5 * lessons[0]
    version = policy.version()
    assert trainer.imitate([], rows).skipped == "constant" and policy.version() == version


def test_rows_of_which_nothing_is_said_shorten_the_step(tiny_qwen3):
    rows = rows_for(1, 4, [1.0, -1.0, 0.0, 0.0])
    rates = [
        step_of(tiny_qwen3, rows, readings_of(rows[:count]), 0.5)[1].learning_rate
        for count in (0, 3, 4)
    ]
    assert rates == pytest.approx([1e-2 * share**0.5 for share in (0.5, 0.75, 1.0)])


def test_where_memory_runs_out_fewer_are_read_at_once_and_the_step_is_the_same(
    tiny_qwen3, monkeypatch, caplog
):
    rows = on_policy(tiny_qwen3, rows_for(1))
    expected, _, _ = step_of(tiny_qwen3, rows, readings_of(rows), 0.5)
    sizes = []

    def scarce(policy, batch):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise MemoryError
        return completion_states(policy, batch)

    monkeypatch.setattr(taught_trainer, "completion_states", scarce)
    found, stats, _ = step_of(tiny_qwen3, rows, readings_of(rows), 0.5)
    assert stats.skipped is None and "memory ran out" in caplog.text
    assert sizes[-1] == 1 and max(sizes) > 1
    assert_equal_but_for_rounding(found, expected)


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


@pytest.mark.usefixtures("repeatable_sampling")
def test_rewards_that_say_nothing_leave_it_to_the_text(tiny_qwen3, tmp_path, monkeypatch, caplog):
    settings = {"arm": "rl_only", "max_cycles": 2, "steps_per_cycle": 2, "metric": wrong}
    whole = compile_tiny(tiny_qwen3, log_dir=tmp_path / "whole", **settings)[2]
    before, first, second = whole.records
    assert first.weights_version == before.weights_version != second.weights_version
    assert "100% of the groups of cycle 1 had equal rewards: the metric's text" in first.decided
    assert not first.ended and second.lessons["taught"] and "nothing to learn" not in caplog.text
    steps = kill_before_steps(monkeypatch, 2, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            compile_tiny(tiny_qwen3, log_dir=tmp_path / "cut", **settings)
    resumed = compile_tiny(tiny_qwen3, log_dir=tmp_path / "cut", **settings)[2]
    assert steps[-1] == 3 and resumed.weights_version == whole.weights_version


@pytest.mark.parametrize("signal", ["auto", "both"])
def test_each_predictor_is_taught_by_what_is_said_of_it(signal, tiny_qwen3, tmp_path, monkeypatch):
    notes, real = set(), self_teacher._note

    def heard(group, rollout, call):
        note = real(group, rollout, call)
        notes.add((call.predictor, note))
        return note

    monkeypatch.setattr(self_teacher, "_note", heard)

    def about(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=0.0, feedback=f"Of {pred_name or 'all'}.")

    settings = {"arm": "rl_only", "steps_per_cycle": 1, "slow_signal": signal}
    compile_tiny(tiny_qwen3, Twice(), metric=about, **settings)
    assert notes == {(name, FEEDBACK.format(f"Of {name}.")) for name in ("first", "second")}


def test_a_run_that_text_teaches_stops_where_all_fails(tiny_qwen3):
    class Losing(Echo):
        """What it runs on is gone after the first cycle."""

        def forward(self, question):
            if ended:
                raise ConnectionError("the service is gone")
            return super().forward(question)

    class Ends(SilentProgress):
        def cycle_done(self, record):
            ended.extend([record] * record.cycle)

    ended = []
    settings = {"arm": "rl_only", "max_cycles": 4, "steps_per_cycle": 1, "progress": Ends()}
    with pytest.raises(TrainingError, match=r"rollout of cycle 2 .* the service is gone"):
        compile_tiny(tiny_qwen3, Losing(), metric=wrong, **settings)
    assert "text teaches" in ended[0].decided


def test_what_a_checkpoint_is_written_of_moves_on_no_more(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    config = FSTConfig.make(slow_signal="both", lora=False, max_cycles=1)
    learner = GRPOLearner(lm, Echo(), config, 0)
    whole = learner._trainer.state().copied()  # as a GPU gives it: in copies of its own
    learner._trainer.state = lambda: replace(whole, live=False)
    teacher = learner.state().copied().teacher
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    with torch.no_grad():
        for weight in lm.policy.model.parameters():
            weight.add_(1.0)
    learner._averaged.follow()
    assert all(torch.equal(teacher[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("steps", "share"), [(5, "95%"), (2, None)])
def test_of_few_groups_one_with_a_gradient_is_enough(steps, share, tiny_qwen3):
    """One rollout of the whole cycle is right: of twenty groups that is next to nothing."""
    asked = itertools.count()

    def rarely(gold, pred, trace=None):
        right = next(asked) == 12  # after those of validation
        return dspy.Prediction(score=float(right), feedback="Write the letter b.")

    settings = {"arm": "rl_only", "max_cycles": 2, "steps_per_cycle": steps, "val_size": 2}
    settings |= {"problems_per_step": 4, "cold_start_demos": 0, "metric": rarely}
    first = compile_tiny(tiny_qwen3, **settings)[2].records[1]
    assert first.reward_range == (0.0, 1.0)
    assert (first.decided or "").startswith(f"{share} of the groups") == (share is not None)


def test_rewards_that_say_something_teach_as_ever(tiny_qwen3):
    found = [compile_tiny(tiny_qwen3, slow_signal=signal)[2] for signal in ("auto", "reward")]
    assert found[0].weights_version == found[1].weights_version
    assert not any(record.lessons for record in found[0].records)


def test_a_metric_without_words_ends_where_rewards_say_nothing(tiny_qwen3, caplog):
    settings = {"arm": "rl_only", "max_cycles": 3}
    result = compile_tiny(tiny_qwen3, metric=lambda *given: 0.0, **settings)[2]
    assert result.records[-1].cycle == 1 and "have it say in words what is right" in result.stopped


def test_words_are_not_advised_where_they_cannot_teach(tiny_qwen3, monkeypatch):
    monkeypatch.setattr("fst_dspy.loop.learner.uses_fsdp", lambda: True)
    result = compile_tiny(tiny_qwen3, metric=wrong, arm="rl_only", max_cycles=2)[2]
    assert result.stopped.endswith("(give partial credit in the metric); the run ends")


def of_ten(gold, pred, *_):
    return dspy.Prediction(score=10 * vowels(gold, pred).score + 2, feedback="Write the letter b.")


def test_a_score_above_the_perfect_one_is_not_the_end_without_a_word(tiny_qwen3):
    def five(gold, pred, *_):
        return dspy.Prediction(score=5.0, feedback="Write the letter b.")

    settings = {"arm": "rl_only", "max_cycles": 1, "metric": five}
    stopped = compile_tiny(tiny_qwen3, **settings)[2].stopped
    assert "(set perfect_score, now 1, to the best score that the metric gives)" in stopped
    assert compile_tiny(tiny_qwen3, perfect_score=10.0, **settings)[2].stopped is None


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
    rows = group_rows(groups, "group")
    return calls, SelfTeacher(program, lm, 1.0).read(groups, rows, candidates), groups


def test_inputs_are_those_of_before_the_program_wrote_on_in_them(tiny_qwen3):
    lm, program = LocalLM(str(tiny_qwen3)), Told()
    calls, lessons, groups = lessons_of(program, lm)
    assert len(lessons.found) == len(calls) == 8 and not lessons.untaught
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
    assert not lessons.found and lessons.untaught == {"prompt": len(calls)}
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
    assert len(lessons.found) == len(calls) == 8


def test_a_predictor_is_read_with_the_settings_of_its_own_lm(tmp_path):
    lm, program = LocalLM(str(save_family(tmp_path, "qwen3"))), Echo()
    program.say.lm = lm.copy(chat_template_kwargs={"enable_thinking": False})
    calls, lessons, _ = lessons_of(program, lm)
    own, *_ = groups_of(Echo(), lm, vowels)[0][0].rollouts_G
    assert calls[0].prompt_ids_T != own.calls[0].prompt_ids_T
    assert len(lessons.found) == len(calls)


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


def test_what_was_taught_is_recorded_and_shown(tiny_qwen3, tmp_path):
    folder = tmp_path / "run"
    compile_tiny(tiny_qwen3, max_cycles=1, slow_signal="both", log_dir=folder)
    steps = [json.loads(line)["stats"] for line in (folder / "steps.jsonl").open()]
    taught = sum(step["taught"] for step in steps)
    assert taught and all(step["lesson"] > 0 for step in steps if step["taught"])
    write_report([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"{taught:,} of " in page and "Distance from the teacher" in page
