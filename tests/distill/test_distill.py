"""Distilling a context into the weights, on tiny random models and the embedded one."""

from dataclasses import fields

import dspy
import pytest
import torch
from helpers import (
    Echo,
    Telling,
    Twice,
    assert_equal_but_for_rounding,
    changed,
    kill_before_steps,
    questions,
    vowels,
)
from tiny_compile import SETTINGS as TINY
from tiny_compile import raw_adapter  # noqa: F401

from fst_dspy import FST, FSTDistill, LocalLM
from fst_dspy.config import (
    BudgetConfig,
    FastConfig,
    FSTConfig,
    LoraConfig,
    SamplingConfig,
    SlowConfig,
    without_effect,
)
from fst_dspy.distill.reader import ContextReader
from fst_dspy.errors import ConfigError, ProgramError, TrainingError
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.slow import taught_trainer
from fst_dspy.slow.taught_trainer import TaughtTrainer, jensen_shannon, reverse_kl
from fst_dspy.student.candidate import make_candidate, seed_candidate
from fst_dspy.tasks import load_task

SAMPLING = SamplingConfig(max_tokens=8)
FAST = {field.name for field in fields(FastConfig)}
SETTINGS = TINY | {"group_size": 2, "problems_per_step": 3, "first_cycle_iterations": 1}


def with_prompt(program, text):
    """A copy of a program with another instruction everywhere."""
    changed = program.deepcopy()
    for _, predictor in changed.named_predictors():
        predictor.signature = predictor.signature.with_instructions(text)
    return changed


def roll(program, lm, count=4, candidate=None):
    runner = RolloutRunner(program, vowels, lm, SAMPLING, seed=0)
    candidate = candidate or seed_candidate(program)
    jobs = [RolloutJob(question, candidate) for question in questions(count)]
    return runner.run(jobs, channel="slow", salt=0)


def read(program, context, lm, rollouts):
    """What is read of rollouts under the program's own texts."""
    own = seed_candidate(program)
    return ContextReader(program, context, lm).read(rollouts, {own.id: own})


# --- the loss -------------------------------------------------------------------------------------


def random_logprobs(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_reverse_kl_of_known_distributions():
    student = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    teacher = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert reverse_kl(student[:1], teacher[:1]).item() == pytest.approx(expected.item(), rel=1e-5)
    assert reverse_kl(student, teacher) > reverse_kl(student[:1], teacher[:1])
    assert reverse_kl(student, student).item() == 0


@pytest.mark.parametrize(("ours", "beta"), [(reverse_kl, 1), (jensen_shannon, 0.5)])
def test_a_divergence_is_that_of_trl(ours, beta, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = random_logprobs(2, 5, 7, seed=0), random_logprobs(2, 5, 7, seed=1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    labels = torch.where(mask, 0, -100)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta)
    own = ours(student[mask], teacher[mask]) / mask.sum()
    assert own.item() == pytest.approx(theirs.item(), rel=1e-5)  # summed in another order


@pytest.mark.parametrize("divergence", [reverse_kl, jensen_shannon])
def test_what_a_format_leaves_out_adds_nothing_to_a_divergence(divergence):
    student, teacher = random_logprobs(3, 5, seed=0), random_logprobs(3, 5, seed=1)
    nothing = torch.full((3, 2), -torch.inf)
    held, other = (torch.cat([own, nothing], 1) for own in (student, teacher))
    held.requires_grad_()
    value = divergence(held, other)
    value.backward()
    assert value.item() == pytest.approx(divergence(student, teacher).item())
    assert not held.grad[:, 5:].any() and held.grad.isfinite().all()


# --- reading the student's calls under another context --------------------------------------------


@pytest.mark.parametrize("program", [Echo(), Twice()], ids=["one predictor", "two"])
def test_a_call_read_under_its_own_context_has_its_own_prompt(tiny_qwen3, program):
    lm = LocalLM(str(tiny_qwen3))
    rollouts = roll(program, lm)
    readings = read(program, seed_candidate(program), lm, rollouts).found
    assert len(readings) == sum(len(rollout.calls) for rollout in rollouts)
    for reading in readings:
        assert reading.teacher == reading.student


def test_a_call_read_under_another_context_has_the_prompt_of_that_program(tiny_qwen3):
    lm, program = LocalLM(str(tiny_qwen3)), Echo()
    evolved = with_prompt(program, "Say one thing, in early letters.")
    evolved.say.demos = [dspy.Example(question="number 9", answer="abc")]
    context = seed_candidate(evolved)
    asked = [rollout.calls[0].prompt_ids_T for rollout in roll(program, lm, candidate=context)]
    rollouts = roll(program, lm)
    readings = read(program, context, lm, rollouts).found
    assert [reading.teacher.prompt_ids_T for reading in readings] == asked
    for reading, rollout in zip(readings, rollouts, strict=True):
        assert reading.student.prompt_ids_T == rollout.calls[0].prompt_ids_T != asked[0]
        assert reading.teacher.completion_ids_T == rollout.calls[0].completion_ids_T


def test_calls_that_do_not_fit_under_the_longer_prompt_are_left_out(tiny_qwen3):
    lm, program = LocalLM(str(tiny_qwen3)), Echo()
    limit = lm.policy.context_length
    words = make_candidate({"say.instructions": "word " * limit})
    with pytest.raises(TrainingError, match="too long"):
        read(program, words, lm, roll(program, lm, count=1))


class Often(Echo):
    """Asks again under another signature; and always, or for one of its questions."""

    always = True

    def forward(self, question):
        if not self.always and not question.endswith("0"):
            return super().forward(question)
        signature = self.say.signature.with_instructions("Say it in other words.")
        return self.say(question=question, signature=signature)


def test_calls_whose_own_prompt_cannot_be_made_again_are_left_out_and_told(tiny_qwen3, caplog):
    lm, program = LocalLM(str(tiny_qwen3)), Often()
    evolved = with_prompt(program, "Say one thing, in early letters.")
    context = seed_candidate(evolved)
    with pytest.raises(TrainingError, match="their prompts could not be made again"):
        read(program, context, lm, roll(program, lm))
    program.always = evolved.always = False
    found = read(program, context, lm, roll(program, lm))
    assert (len(found.found), found.untaught) == (3, {"prompt": 1})
    with dspy.context(lm=lm):
        distill = FSTDistill(vowels, track_stats=True, **{**SETTINGS, "steps_per_cycle": 4})
        compiled = distill.compile(
            program, teacher=evolved, trainset=questions(4), valset=questions(4, 6)
        )
    (first, *_) = [r.lessons for r in compiled.detailed_results.records if r.train_reward]
    assert first["taught"] and first["prompt"]
    assert caplog.text.count("could not be made again") == 1


# --- steps ----------------------------------------------------------------------------------------


def by_base(policy, slow):
    """A trainer whose teacher has the base weights."""
    return TaughtTrainer(
        policy,
        slow,
        SAMPLING,
        10,
        0,
        teaching=lambda: policy.at(policy.base_version),
        divergence=reverse_kl,
    )


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_steps_lower_the_divergence_and_leave_the_teacher_alone(tiny_qwen3, lora):
    lm, program = LocalLM(str(tiny_qwen3)), Echo()
    policy = lm.policy
    context = seed_candidate(with_prompt(program, "Write many early letters and no others."))
    readings = read(program, context, lm, roll(program, lm, count=6)).found
    if lora is not None:
        policy.add_lora(lora, seed=0)
    slow = SlowConfig(learning_rate=1e-2, micro_batch_size=4)
    trainer = by_base(policy, slow)
    stats = [trainer.imitate(readings) for _ in range(6)]
    assert stats[-1].loss < 0.5 * stats[0].loss
    assert all(step.skipped is None and step.entropy > 0 for step in stats)
    assert policy.step == 6 and policy.version() != policy.base_version
    with policy.at(policy.base_version):
        assert policy.version() == policy.base_version


def test_a_student_that_is_its_own_teacher_takes_no_step(tiny_qwen3):
    lm, program = LocalLM(str(tiny_qwen3)), Echo()
    readings = read(program, seed_candidate(program), lm, roll(program, lm)).found
    trainer = by_base(lm.policy, SlowConfig())
    stats = trainer.imitate(readings)
    assert stats.skipped == "constant" and stats.loss == 0
    assert lm.policy.step == 0 and lm.policy.version() == lm.policy.base_version


def test_the_step_does_not_depend_on_how_it_is_cut(tiny_qwen3, monkeypatch):
    losses, gradients = [], []  # Adam would blow up what rounding leaves of a gradient near 0
    for size, limit in ((16, 2**29), (2, 1)):
        monkeypatch.setattr(taught_trainer, "CHUNK_BYTES", limit)
        lm, program = LocalLM(str(tiny_qwen3)), Echo()
        context = seed_candidate(with_prompt(program, "Another text."))
        readings = read(program, context, lm, roll(program, lm, count=5)).found
        slow = SlowConfig(micro_batch_size=size, max_grad_norm=0)
        trainer = by_base(lm.policy, slow)
        caught = {}

        def catch(*_, caught=caught, model=lm.policy.model):
            caught.update((name, weight.grad.clone()) for name, weight in model.named_parameters())

        trainer._trl.optimizer.optimizer.register_step_pre_hook(catch)
        losses.append(trainer.imitate(readings).loss)
        gradients.append(caught)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_equal_but_for_rounding(*gradients)


# --- the optimizer --------------------------------------------------------------------------------


def distill(
    folder, *, student=None, teacher="Write early letters.", lm=None, metric=vowels, **settings
):
    """Distill into a freshly loaded tiny model: the program, its LM and its results."""
    lm, student = lm or LocalLM(str(folder)), student or Echo()
    optimizer = FSTDistill(metric, track_stats=True, **{**SETTINGS, **settings})
    teacher = with_prompt(student, teacher) if isinstance(teacher, str) else teacher
    with dspy.context(lm=lm):
        compiled = optimizer.compile(
            student, teacher=teacher, trainset=questions(6), valset=questions(4, 6)
        )
    return compiled, lm, compiled.detailed_results


@pytest.mark.slow
@pytest.mark.usefixtures("repeatable_sampling")
@pytest.mark.parametrize("lora", [False, {"rank": 4}], ids=["full", "lora"])
def test_the_bare_prompt_is_kept_and_the_weights_learn(tiny_qwen3, lora):
    compiled, _, result = distill(tiny_qwen3, student=Twice(), lora=lora)
    assert result.arm == "fst_distill"
    assert result.best.candidate == result.seed_candidate == seed_candidate(Twice())
    assert result.context.components["first.instructions"] == "Write early letters."
    assert result.teacher_version == result.base_version and result.search is None
    last = result.records[-1]
    assert last.step == 4 and last.kl_to_base > 0
    assert result.weights_version != result.base_version
    assert result.rollouts.fast == 0 and result.rollouts.slow == 4 * 6
    assert result.rollouts.eval == 3 * 4
    assert compiled.first.lm.model == compiled.second.lm.model == result.best.version
    assert compiled.first.signature.instructions == "Draft."
    assert compiled(question="number 3").answer is not None


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_killed_distillation_goes_on_to_the_same_end(tiny_qwen3, tmp_path, lora, monkeypatch):
    whole = distill(tiny_qwen3, lora=lora)[2]
    steps = kill_before_steps(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="killed"):
        distill(tiny_qwen3, log_dir=tmp_path, lora=lora)
    resumed = distill(tiny_qwen3, log_dir=tmp_path, lora=lora)[2]
    assert steps == [0, 1, 2, 3, 3]
    assert resumed.weights_version == whole.weights_version and resumed.best == whole.best


@pytest.mark.slow
def test_without_a_teacher_one_is_searched_for_within_the_budget(tiny_qwen3, tmp_path):
    settings = {"max_cycles": 9, "max_rollouts": 80, "log_dir": tmp_path, "teacher": None}
    settings |= {"student": Telling(), "metric": changed}
    compiled, _, result = distill(tiny_qwen3, **settings)
    search, first = result.search, result.records[0]
    assert search.arm == "gepa_only"
    assert result.context.id == search.best.candidate.id != seed_candidate(Telling()).id
    assert 30 < search.rollouts.total <= 40
    assert first.total_rollouts.fast == search.rollouts.fast > 0
    assert first.total_rollouts.total == search.rollouts.total + 4
    assert first.seconds["fast"] >= search.records[-1].seconds["fast"]
    assert len(result.records) > 2 and 60 < result.rollouts.total <= 80
    assert (tmp_path / "search" / "result.json").is_file()
    again = distill(tiny_qwen3, **settings)[2]
    assert again.records == result.records
    # With more to spend the search would find another context, which is not what was distilled.
    more = distill(tiny_qwen3, **settings | {"max_rollouts": 160, "max_cycles": 4})[2]
    assert more.search.records == search.records and more.context == result.context
    assert more.records[:3] == result.records[:3] and len(more.records) == 5
    assert compiled.say.signature.instructions == "Say something."


@pytest.mark.slow
def test_a_search_that_accepts_no_proposal_costs_no_distillation(tiny_qwen3, tmp_path, caplog):
    def unexplained(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return vowels(gold, pred).score  # without feedback there is nothing to propose

    for _ in range(2):  # it has ended, and stays so
        caplog.clear()
        compiled, _, result = distill(
            tiny_qwen3, teacher=None, metric=unexplained, log_dir=tmp_path
        )
        (record,) = result.records
        assert result.context == result.best.candidate == seed_candidate(Echo())
        assert result.best.version == result.base_version
        assert record.total_rollouts.total == result.search.rollouts.total + 4
        assert result.rollouts.slow == 0
        assert "nothing is distilled: the search for a teacher kept" in caplog.text
    assert compiled(question="number 3").answer is not None


@pytest.mark.slow
@pytest.mark.usefixtures("repeatable_sampling")
def test_a_compiled_teacher_lends_its_weights(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3))
    with dspy.context(lm=lm):
        teacher = FST(vowels, **{**SETTINGS, "max_cycles": 1}).compile(
            with_prompt(Echo(), "Write early letters."),
            trainset=questions(6),
            valset=questions(4, 6),
        )
    trained = teacher.say.lm.model
    assert trained != lm.policy.base_version
    result = distill(tiny_qwen3, teacher=teacher, lm=lm, max_cycles=1)[2]
    assert result.teacher_version == result.records[0].weights_version == trained
    assert result.records[0].kl_to_base > 0, "measured to the original base"
    assert teacher(question="number 2").answer is not None


def test_bad_input_is_refused_before_any_work(tiny_qwen3, tiny_llama, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("rollouts were run")

    monkeypatch.setattr(RolloutRunner, "run", no_work)
    with pytest.raises(ConfigError, match="leave arm out"):
        FSTDistill(vowels, arm="fst")
    for share in (1.0, "half"):
        with pytest.raises(ConfigError, match="search_share"):
            FSTDistill(vowels, search_share=share)
    with pytest.raises(ConfigError, match="unknown setting"):
        FSTDistill(vowels, learning_rat=1)
    with pytest.raises(ConfigError, match="nothing to distill"):
        distill(tiny_qwen3, teacher=Echo())
    with pytest.raises(ConfigError, match="another program"):
        distill(tiny_qwen3, teacher=with_prompt(Twice(), "x"))
    other = with_prompt(Echo(), "x")
    other.set_lm(LocalLM(str(tiny_llama)))
    with pytest.raises(ProgramError, match="one LocalLM"):
        distill(tiny_qwen3, teacher=other)


def test_the_settings_of_groups_are_the_students_own():
    optimizer = FSTDistill(vowels, group_size=6, population_size=4)
    every_turn = FSTConfig.make(group_size=6, population_size=1, revisit_constant=1.0)
    assert optimizer.config == every_turn
    assert FSTDistill(vowels, num_generations=6).config.slow.group_size == 6


def test_what_has_no_effect_on_a_distillation_is_told_once():
    fst = FSTDistill(
        vowels, slow_signal="both", kl_coef=0.1, weight_decay=0.1, max_reflection_tokens=9
    )
    told, of_search = (without_effect(f.arm, f.config, f._given) for f in (fst, fst._search))
    names = ("kl_coef", "slow_signal")
    assert told == [f"{name} has no effect with arm='fst_distill'" for name in names]
    assert of_search == ["max_reflection_tokens has no effect without a reflection_lm"]


def test_what_only_a_search_has_a_use_for_is_told_where_there_is_a_teacher(tiny_qwen3, caplog):
    with pytest.raises(ConfigError, match="nothing to distill"):
        distill(tiny_qwen3, teacher=Echo(), search_share=0.3, demo_tokens=9, weight_decay=0.1)
    told = [text.split()[0] for text in caplog.messages if "no effect with a teacher" in text]
    assert {"demo_tokens", "search_share"} <= {*told} and "weight_decay" not in told
    assert all(name in {*FAST, "search_share"} for name in told)


def test_the_search_has_its_share_of_every_limit_by_whatever_name():
    def searched(**limits):
        return FSTDistill(vowels, search_share=0.25, **limits)._search.config.budget

    assert searched(max_metric_calls=80).max_rollouts == 20
    assert searched(gepa_kwargs={"max_metric_calls": 80}).max_rollouts == 20
    assert searched(max_full_evals=8).max_full_evals == 2
    assert searched(max_seconds=3).max_seconds == 0.75
    assert searched(max_env_steps=80, max_cycles=3) == BudgetConfig(max_cycles=3, max_env_steps=20)


@pytest.mark.slow
def test_distilling_raises_the_bare_prompts_score():
    task = load_task("triage", seed=0)
    teacher = with_prompt(task.program, task.ideal_instructions["predict"])
    distiller = FSTDistill(
        task.metric,
        track_stats=True,
        learning_rate=1e-3,
        max_cycles=1,
        steps_per_cycle=14,
        problems_per_step=8,
        group_size=2,
        val_size=32,
        max_tokens=40,
    )
    with dspy.context(lm=LocalLM("embedded"), adapter=None):
        result = distiller.compile(
            task.program, teacher=teacher, trainset=task.trainset, valset=task.valset
        ).detailed_results
    assert result.records[0].val_score < 0.1
    assert result.best.score > 0.25
    assert result.best.candidate == seed_candidate(task.program)
