"""The local training provider by itself: reinforcement jobs, fine-tuning jobs, versions, errors."""

import copy
import gc
import os
import threading

import dspy
import pytest
import torch
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus
from tiny_models import make_tokenizer, save_model

from fst_dspy import LocalLM
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError, DataError, FSTError, ModelError, TrainingError
from fst_dspy.lm.train_input import encode_turn
from fst_dspy.model.policy import DEFAULT_CHAT_TEMPLATE
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

pytestmark = pytest.mark.slow

CHAT, GRPO_CHAT = TrainDataFormat.CHAT, TrainDataFormat.GRPO_CHAT
FAST = {"learning_rate": 1e-2}


def prompt(text="where does a visa ticket go?"):
    return [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]


def answer(text, reward, messages=None):
    completion = {"role": "assistant", "content": text}
    return {"messages": messages or prompt(), "completion": completion, "reward": reward}


def group(*rewards, question="visa"):
    return [answer(f"queue {n}", r, prompt(question)) for n, r in enumerate(rewards)]


def batch(job, *groups):
    """A step's data as dspy.GRPO makes it: every pending place filled, groups repeated."""
    ids = job.get_status()["pending_batch_ids"]
    return [{"batch_id": i, "group": groups[n % len(groups)]} for n, i in enumerate(ids)]


def step(job, *groups):
    job.step(train_data=batch(job, *groups), train_data_format=GRPO_CHAT)


def conversation(text="silver queue", question="where does a visa ticket go?"):
    return {"messages": [*prompt(question), {"role": "assistant", "content": text}]}


def finetuned(lm, data, **kwargs):
    job = lm.finetune(data, CHAT, {"learning_rate": 1e-2, "num_train_epochs": 30, **kwargs})
    result = job.result(timeout=240)
    job.thread.join()  # it has the result before it ends
    if isinstance(result, Exception):
        raise result
    return result


def greedy(lm, text="where does a visa ticket go?"):
    request = dspy.lm15.Request(
        model=lm.model,
        messages=(dspy.lm15.Message(role="user", parts=(dspy.lm15.TextPart(text),)),),
        system="Answer.",
        config=dspy.lm15.Config(temperature=0.0, max_tokens=12),
    )
    return lm(request).message.parts[0].text


@pytest.fixture
def lm(tiny_qwen3):
    return LocalLM(str(tiny_qwen3), max_tokens=16)


# --- tokens --------------------------------------------------------------------------------------


def test_a_turn_is_tokenised_as_the_engine_samples_it(lm):
    greedy(lm, "where?")
    messages = prompt("where?")
    turn = encode_turn(lm.policy, messages, "silver queue", 512)
    response = lm(
        dspy.lm15.Request(
            model=lm.model,
            messages=(dspy.lm15.Message(role="user", parts=(dspy.lm15.TextPart("where?"),)),),
            system="Answer.",
            config=dspy.lm15.Config(max_tokens=2),
        )
    )
    assert list(turn.prompt_ids_T) == response.provider_data["prompt_ids"]
    tokenizer = lm.policy.tokenizer
    assert tokenizer.decode(turn.completion_ids_T) == "silver queue<|im_end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (DEFAULT_CHAT_TEMPLATE, " silver<|im_end|>"),
        (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
            "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "silver<|im_end|>",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}<|pad|>{% endfor %}"
            "{% if add_generation_prompt %}{{ '>' }}{% endif %}",
            "silver<|im_end|>",
        ),
    ],
    ids=["plain", "thinking", "prompt is no prefix"],
)
def test_answers_get_what_a_sampled_answer_has_around_it(lm, template, expected, monkeypatch):
    monkeypatch.setattr(lm.policy.tokenizer, "chat_template", template)
    turn = encode_turn(lm.policy, prompt(), "silver", 512)
    assert lm.policy.tokenizer.decode(turn.completion_ids_T) == expected


def test_the_end_token_is_the_one_of_the_template(lm):
    """A model may end its turns with another token than the tokenizer's own."""
    lm.policy.tokenizer.eos_token = "<|pad|>"
    turn = encode_turn(lm.policy, prompt(), "silver", 512)
    assert lm.policy.tokenizer.decode(turn.completion_ids_T) == "silver<|im_end|>"


def test_an_answer_that_is_empty_is_its_end(lm):
    turn = encode_turn(lm.policy, prompt(), "", 512)
    other = encode_turn(lm.policy, prompt(), "silver queue", 512)
    assert turn.prompt_ids_T == other.prompt_ids_T
    assert turn.completion_ids_T == other.completion_ids_T[-1:]


def test_long_answers_are_cut_and_long_prompts_left_out(lm):
    whole = encode_turn(lm.policy, prompt(), "silver queue", 512)
    room = len(whole.prompt_ids_T)
    cut = encode_turn(lm.policy, prompt(), "silver queue", room + 2)
    assert cut.completion_ids_T == whole.completion_ids_T[:2]
    assert encode_turn(lm.policy, prompt(), "silver queue", room) is None


# --- reinforcement -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, {"rank": 4}], ids=["full", "lora"])
def test_a_step_is_one_of_the_slow_channel(tiny_qwen3, lora):
    lm, other = LocalLM(str(tiny_qwen3)), LocalLM(str(tiny_qwen3))
    job = lm.reinforce({**FAST, "lora": lora, "seed": 3, "num_generations": 2})
    step(job, group(1.0, 0.0))

    if lora:
        other.policy.add_lora(SlowConfig(lora=job._trainer.slow.lora).lora, 3)
    slow = SlowConfig(learning_rate=1e-2)
    trainer = SlowTrainer(other.policy, slow, SamplingConfig(), 1, 3)
    turns = [encode_turn(other.policy, prompt("visa"), f"queue {n}", 512) for n in (0, 1)]
    advantage = 0.5 / (torch.tensor([1.0, 0.0]).std().item() + 1e-4)
    trainer.advance(
        [
            TrainingRow(t.prompt_ids_T, t.completion_ids_T, (), a)
            for t, a in zip(turns, (advantage, -advantage), strict=True)
        ]
    )
    assert lm.model == lm.policy.version() != lm.policy.base_version
    for name, weight in lm.policy.trainable_state().items():
        torch.testing.assert_close(weight, other.policy.trainable_state()[name])


def test_the_lm_follows_the_weights_and_the_cache_does_not_hold_it_back(lm):
    start, before = lm.model, greedy(lm)
    job = lm.reinforce(FAST)
    versions, answers = [start], [before]
    for _ in range(3):
        step(job, group(1.0, 0.0, 0.5), group(0.0, 1.0, 0.2, question="refund"))
        versions.append(lm.model)
        answers.append(greedy(lm))
    job.terminate()
    assert len(set(versions)) == 4 and len(set(answers)) > 1
    assert greedy(lm) == answers[-1] == greedy(lm.live())
    assert greedy(lm.at(start)) == before
    assert [record.step for record in job.records] == [1, 2, 3]
    assert job.records[0].reward == pytest.approx((1.0 + 0.0 + 0.5 + 0.0 + 1.0 + 0.2) / 6)


def test_batch_ids_are_never_used_twice(lm, tiny_llama):
    seen = []
    for model in (lm, lm, LocalLM(str(tiny_llama))):
        job = model.reinforce(FAST)
        for _ in range(2):
            status = job.get_status()
            assert len(status["pending_batch_ids"]) > 1
            seen += status["pending_batch_ids"]
            step(job, group(1.0, 0.0))
        job.terminate()
        assert job.get_status()["pending_batch_ids"] == []
    assert len(set(seen)) == len(seen)


def test_places_that_were_not_filled_stay_pending(lm):
    job = lm.reinforce(FAST)
    first, *others = job.get_status()["pending_batch_ids"]
    job.step([{"batch_id": first, "group": group(1.0, 0.0)}], "grpo_chat")
    pending = job.get_status()["pending_batch_ids"]
    assert set(others) < set(pending) and first not in pending


def test_constant_groups_take_no_step_but_the_job_goes_on(lm):
    job = lm.reinforce(FAST)
    before = job.get_status()
    step(job, group(1.0, 1.0))
    assert lm.model == before["current_model"] == lm.policy.base_version
    assert job.records[0].stats.skipped == "constant"
    assert job.records[0].constant_group_share == 1.0
    assert not set(before["pending_batch_ids"]) & set(job.get_status()["pending_batch_ids"])


def test_repeated_groups_count_once(tiny_qwen3):
    """dspy.GRPO repeats a step's groups to fill every place, and carries some over to the next."""
    once, often = LocalLM(str(tiny_qwen3)), LocalLM(str(tiny_qwen3))
    job_once, job_often = once.reinforce(FAST), often.reinforce(FAST)
    a, b, c = group(1.0, 0.0), group(0.0, 0.3, question="refund"), group(0.2, 0.9, question="wifi")
    ids = job_once.get_status()["pending_batch_ids"]
    job_once.step([{"batch_id": i, "group": g} for i, g in zip(ids, (a, b), strict=False)])
    step(job_often, a, b)
    assert once.model == often.model
    assert job_often.records[0].rollouts == 4
    job_once.step([{"batch_id": ids[2], "group": c}])
    step(job_often, b, c)
    assert once.model == often.model
    step(job_often, c)  # nothing new: taken again
    assert job_often.records[2].rollouts == 2


def test_versions_stay_at_hand_while_named_and_no_longer(lm):
    base = lm.model
    job = lm.reinforce(FAST)
    step(job, group(1.0, 0.0))
    named, same = lm.copy(), copy.deepcopy(lm)
    first, expected = lm.model, greedy(lm)
    unnamed = []
    for _ in range(3):
        step(job, group(0.0, 1.0))
        unnamed.append(lm.model)
    job.terminate()
    last = unnamed.pop()
    assert lm.model == last and not any(lm.policy.has(version) for version in unnamed)
    assert named.model == same.model == first and lm.policy.has(first)
    assert greedy(named) == greedy(same) == expected
    del named, same
    gc.collect()
    other = lm.at(base).reinforce(FAST)
    assert lm.policy.has(last) and not lm.policy.has(first)
    other.terminate()
    with pytest.raises(ModelError, match="not at hand"):
        lm.at(first)


@pytest.mark.parametrize("train", ["reinforce", "finetune"])
def test_the_base_is_at_hand_though_its_files_have_changed(tmp_path, train):
    """Training can take hours, and the base is still named by the programs from before."""
    lm = LocalLM(str(save_model(tmp_path / "model", "qwen3")), max_tokens=16)
    before, base = greedy(lm), lm.copy(cache=False)
    if train == "reinforce":
        step(lm.reinforce(FAST), group(1.0, 0.0))
    else:
        lm = finetuned(lm, [conversation()])
    save_model(tmp_path / "model", "qwen3", seed=1)
    assert lm.model != base.model and greedy(base) == before


def test_jobs_one_after_another_go_on_from_the_weights_of_their_lm(lm):
    first = lm.reinforce(FAST)
    step(first, group(1.0, 0.0))
    first.terminate()
    middle = lm.model
    second = lm.reinforce(FAST)
    assert lm.policy.version() == middle
    step(second, group(1.0, 0.0))
    second.terminate()
    assert lm.model not in (middle, lm.policy.base_version)
    again = lm.at(lm.policy.base_version).copy(cache=True)
    third = again.reinforce(FAST)
    step(third, group(1.0, 0.0))
    assert again.model == middle
    assert [job.job_id for job in lm.provider.jobs] == [first.job_id, second.job_id, third.job_id]


def test_an_lm_that_follows_the_live_weights_is_bound_by_training(lm):
    live = lm.live()
    job = live.reinforce(FAST)
    step(job, group(1.0, 0.0))
    job.terminate()
    assert live.model == lm.policy.version() != lm.model


def test_checkpoints_outlast_the_job(lm):
    job = lm.reinforce(FAST)
    step(job, group(1.0, 0.0))
    job.save_checkpoint("one")
    expected = greedy(lm)
    step(job, group(0.0, 1.0))
    job.terminate()
    lm.reinforce(FAST).terminate()
    status = job.get_status()
    assert status["last_checkpoint"] == "one" and status["status"] == "succeeded"
    assert greedy(lm.at(status["checkpoints"]["one"])) == expected != greedy(lm)


def test_a_job_that_has_ended_takes_no_step(lm):
    job = lm.reinforce(FAST)
    step(job, group(1.0, 0.0))
    job.terminate()
    job.terminate()
    with pytest.raises(TrainingError, match="succeeded"):
        job.step([{"batch_id": 0, "group": group(1.0, 0.0)}])
    with pytest.raises(TrainingError, match="nothing to save"):
        job.save_checkpoint("x")
    cancelled = lm.reinforce(FAST)
    cancelled.cancel()
    assert cancelled.status() == TrainingStatus.cancelled
    with pytest.raises(TrainingError, match="cancelled"):
        cancelled.step([{"batch_id": 0, "group": group(1.0, 0.0)}])


def test_two_jobs_at_once_on_one_model_are_refused(lm):
    first, second = lm.reinforce(FAST), lm.copy().reinforce(FAST)
    step(second, group(1.0, 0.0))
    with pytest.raises(TrainingError, match="one training at a time"):
        step(first, group(1.0, 0.0))


def test_adapters_are_trained_on_and_other_ones_refused(lm):
    job = lm.reinforce({**FAST, "lora": {"rank": 4}})
    base = greedy(lm)
    step(job, group(1.0, 0.0))
    job.terminate()
    assert lm.policy.lora.rank == 4
    again = lm.reinforce(FAST)
    step(again, group(1.0, 0.0))
    again.terminate()
    assert lm.policy.lora.rank == 4 and greedy(lm.at(lm.policy.base_version)) == base
    with pytest.raises(ConfigError, match="leave lora out"):
        lm.reinforce({"lora": True})
    full = lm.at(lm.policy.base_version)
    job = full.reinforce(FAST)
    step(job, group(1.0, 0.0))
    job.terminate()
    with pytest.raises(ModelError, match=r"LoRA needs the base weights .* \(lm\.at\("):
        full.reinforce({"lora": True})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rat": 1.0}, "did you mean 'learning_rate'"),
        ({"loss": "cispo"}, "did you mean 'loss_type'"),
        ({"group_size": 4}, "unknown setting 'group_size'"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"learning_rate": "high"}, "learning_rate must be a number"),
        ({"temperature": 0.5}, "temperature=0.5"),
        ({"num_generations": 1}, "num_rollouts_per_grpo_step"),
        ({"lr_scheduler_type": "linear"}, "max_steps"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type must be 'constant'"),
        ({"lora": "yes"}, "lora must be"),
    ],
)
def test_bad_reinforcement_settings_are_clear_errors(lm, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        lm.reinforce(kwargs)
    assert lm.policy.version() == lm.policy.base_version


def test_greedy_rollouts_cannot_be_learned_from(tiny_qwen3):
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        LocalLM(str(tiny_qwen3), temperature=0.0).reinforce({})


def test_a_schedule_decays_over_max_steps(lm):
    job = lm.reinforce({**FAST, "lr_scheduler_type": "linear", "max_steps": 4})
    for _ in range(2):
        step(job, group(1.0, 0.0))
    assert [record.stats.learning_rate for record in job.records] == pytest.approx([1e-2, 7.5e-3])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "non-empty list"),
        (None, "non-empty list"),
        ("text", "non-empty list"),
        ([[answer("a", 1.0)]], "batch_id and a non-empty group"),
        ([{"batch_id": 0, "group": []}], "batch_id and a non-empty group"),
        ([{"batch_id": 0, "group": ["a"]}], r"\['group'\]\[0\] must be a dict"),
        ([{"batch_id": 0, "group": [{**answer("a", 1.0), "messages": []}]}], "list of messages"),
        ([{"batch_id": 0, "group": [{**answer("a", 1.0), "completion": "a"}]}], "role"),
        ([{"batch_id": 0, "group": [answer(None, 1.0)]}], "must be text"),
        ([{"batch_id": 0, "group": [answer("a", float("nan"))]}], "finite"),
        ([{"batch_id": 0, "group": [answer("a", None)]}], "finite"),
        ([{"batch_id": 0, "group": [answer("a", 1.0, prompt("long " * 600))]}], "room for an"),
    ],
)
def test_bad_groups_are_clear_errors(lm, data, message):
    job = lm.reinforce(FAST)
    with pytest.raises(DataError, match=message) as caught:
        job.step(data, GRPO_CHAT)
    assert isinstance(caught.value, FSTError)
    with pytest.raises(DataError, match="'chat' cannot be used here; give 'grpo_chat'"):
        job.step([{"batch_id": 0, "group": group(1.0, 0.0)}], CHAT)
    assert lm.policy.version() == lm.policy.base_version and not job.records


# --- fine-tuning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("tiny_qwen3", False), ("tiny_llama", True), ("tiny_lfm2", False)],
)
def test_fine_tuning_teaches_the_answers_and_where_they_end(kind, lora, request):
    lm = LocalLM(str(request.getfixturevalue(kind)), max_tokens=16)
    before = greedy(lm)
    data = [
        conversation("silver queue"),
        conversation("amber queue", "where does a refund ticket go?"),
    ]
    tuned = finetuned(lm, data, lora=lora, num_train_epochs=60)
    assert isinstance(tuned, LocalLM) and tuned.policy is lm.policy
    assert tuned.model == lm.policy.version() != lm.model
    assert greedy(tuned) == "silver queue"
    assert greedy(tuned, "where does a refund ticket go?") == "amber queue"
    assert greedy(lm) == before  # the language model given keeps its own weights
    assert (lm.policy.lora is not None) == lora


def test_fine_tuning_is_reproducible_and_leaves_nothing_behind(tiny_qwen3, capfd, tmp_path):
    os.environ["TMPDIR"], before = str(tmp_path), os.environ.get("TMPDIR")
    import tempfile

    tempfile.tempdir = None
    try:
        torch.manual_seed(7)
        state = torch.get_rng_state()
        # The first in a process starts a thread of huggingface_hub's, which stays.
        finetuned(LocalLM(str(tiny_qwen3)), [conversation()], num_train_epochs=1)
        threads = threading.active_count()
        versions = set()
        for _ in range(2):
            lm = LocalLM(str(tiny_qwen3))
            capfd.readouterr()
            tuned = finetuned(lm, [conversation()] * 5, num_train_epochs=2, lora=True)
            versions.add(tuned.model)
            out, err = capfd.readouterr()
            assert out == "" and err == ""
        assert len(versions) == 1
        assert torch.equal(torch.get_rng_state(), state)
        assert list(tmp_path.iterdir()) == []
        assert threading.active_count() <= threads
        assert "forward" not in lm.policy.model.__dict__
        assert "forward" not in lm.policy.model.get_base_model().__dict__
        assert all(weight.grad is None for weight in lm.policy.model.parameters())
        other = finetuned(LocalLM(str(tiny_qwen3)), [conversation()] * 5, lora=True, seed=1)
        assert other.model not in versions
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
        tempfile.tempdir = None


def test_jobs_at_the_same_time_each_start_from_the_weights_they_name(lm):
    """dspy.BootstrapFinetune(multitask=False) starts one job for each predictor."""
    kwargs = {"learning_rate": 1e-2, "num_train_epochs": 40}
    jobs = [
        lm.finetune([conversation(text)], CHAT, kwargs) for text in ("silver queue", "amber queue")
    ]
    tuned = [job.result(timeout=240) for job in jobs]
    assert [job.status() for job in jobs] == [TrainingStatus.succeeded] * 2
    assert [greedy(one) for one in tuned] == ["silver queue", "amber queue"]


def test_a_job_can_be_cancelled(lm):
    lm.policy.lock.acquire()  # so that the job has not begun yet
    job = lm.finetune([conversation()], CHAT, {"num_train_epochs": 10_000})
    assert job.status() in (TrainingStatus.pending, TrainingStatus.running)
    assert job.cancel()
    lm.policy.lock.release()
    assert isinstance(job.result(timeout=240), TrainingError)
    assert job.status() == TrainingStatus.cancelled and not job.cancel()
    assert lm.policy.version() == lm.model


def test_a_diverged_fine_tuning_puts_the_weights_back(lm):
    before = greedy(lm)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        finetuned(lm, [conversation()], learning_rate=1e30, max_grad_norm=0.0)
    assert lm.policy.version() == lm.model == lm.policy.base_version
    assert greedy(lm) == before


def test_conversations_too_long_are_left_out(lm, caplog):
    data = [conversation(), conversation(question="long " * 600)]
    tuned = finetuned(lm, data, num_train_epochs=1)
    assert tuned.model != lm.model and "1 of 2 conversations are left out" in caplog.text
    with pytest.raises(DataError, match="room for an answer in 8 tokens"):
        finetuned(lm, data, max_length=8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_seq_length": 8}, "did you mean 'max_length'"),
        ({"epochs": 8}, "unknown setting 'epochs'"),
        ({"num_train_epochs": 0}, "num_train_epochs must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type must be one of 'constant'"),
        ({"per_device_train_batch_size": "8"}, "at least 1"),
        ({"lora": 3}, "lora must be"),
    ],
)
def test_bad_fine_tuning_settings_are_clear_errors(lm, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        finetuned(lm, [conversation()], **kwargs)
    assert lm.policy.version() == lm.policy.base_version


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "non-empty list"),
        ([{"prompt": "a", "completion": "b"}], "list of messages"),
        ([{"messages": prompt()}], "must end in an assistant's answer"),
        ([{"messages": conversation()["messages"][-1:]}], "to what comes before it"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "reads text only"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "with a role of"),
    ],
)
def test_bad_conversations_are_clear_errors(lm, data, message):
    with pytest.raises(DataError, match=message):
        finetuned(lm, data)
    job = lm.finetune([conversation()], TrainDataFormat.COMPLETION, {})
    result = job.result(timeout=240)
    assert isinstance(result, DataError) and "give 'chat'" in str(result)
    assert job.status() == TrainingStatus.failed


def test_a_provider_is_carried_by_copies_and_by_loaded_lms(lm):
    assert lm.provider.finetunable and lm.provider.reinforceable
    assert lm.copy().provider is copy.deepcopy(lm).provider is lm.at(lm.model).provider
    loaded = LocalLM.load_state(lm.dump_state(), allow_custom_lm_class=True)
    assert loaded.provider.policy is loaded.policy


def test_the_tiny_tokenizer_has_the_end_token_the_tests_assume():
    assert make_tokenizer().eos_token == "<|im_end|>"
