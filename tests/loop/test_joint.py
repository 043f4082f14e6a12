"""The joint loop on tiny random models: real rollouts, real optimizer steps, real GEPA."""

import datetime
import signal
from dataclasses import replace
from itertools import pairwise

import dspy
import pytest
from helpers import Echo, RawAdapter, Twice, kill_before_steps, questions, vowels
from tiny_compile import SETTINGS, compile_tiny, raw_adapter  # noqa: F401

from fst_dspy import FST, LocalLM
from fst_dspy.config import FSTConfig, without_removed
from fst_dspy.errors import (
    ConfigError,
    DataError,
    FSTError,
    MetricError,
    ModelError,
    ProgramError,
    StoreError,
    TrainingError,
)
from fst_dspy.files import read_jsonl
from fst_dspy.loop import joint, validation
from fst_dspy.loop.progress import SilentProgress
from fst_dspy.report import write_report
from fst_dspy.rollouts.evaluate import evaluate, evaluation_of
from fst_dspy.run.records import cycle_record
from fst_dspy.run.rollout_log import unpack

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("repeatable_sampling")
@pytest.mark.parametrize("lora", [False, {"rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["tiny_qwen3", "tiny_llama"])
def test_both_channels_change_and_the_best_pair_is_bound(kind, lora, request):
    compiled, _, result = compile_tiny(request.getfixturevalue(kind), lora=lora)
    first, *_, last = result.records
    assert first.cycle == 0 and first.kl_to_base == 0 and first.rollouts.slow == 0
    assert last.step == 4 and last.weights_version != result.base_version
    assert last.kl_to_base > 0
    assert last.total_rollouts.slow == 4 * 2 * 4
    assert last.total_rollouts.fast > 0
    assert result.best.score == result.records[result.best.cycle].val_score
    assert compiled._compiled and compiled.say.lm.model == result.best.version
    instructions = result.best.candidate.components["say.instructions"]
    assert compiled.say.signature.instructions == instructions
    assert compiled(question="number 3").answer is not None


def test_whole_weights_are_not_asked_of_adapters_in_vain(tiny_qwen3):
    adapted = compile_tiny(tiny_qwen3, arm="rl_only", lora={"rank": 4}, max_cycles=1)[0]
    with pytest.raises(ConfigError, match=r"have adapters with .*lora='auto' takes them"):
        compile_tiny(tiny_qwen3, adapted, arm="rl_only", lora=False)


def test_weights_that_moved_are_validated_also_after_steps_that_moved_nothing(tiny_qwen3):
    def metric(gold, pred, trace=None):  # the groups of one problem are constant
        return 0.5 if gold.question.endswith("1") else vowels(gold, pred)

    own = {"problems_per_step": 1, "steps_per_cycle": 1, "max_cycles": 12, "on_no_signal": "warn"}
    own |= {"first_cycle_iterations": 0, "cycle_iterations": 0, "revisit_constant": 1.0}
    records = compile_tiny(tiny_qwen3, metric=metric, **own)[2].records
    pairs = [*pairwise(records)]
    moved = [after for before, after in pairs if before.weights_version != after.weights_version]
    assert 2 <= len(moved) < len(pairs) - 1  # the opening moves none
    assert all(record.rollouts.eval for record in moved)


def test_arms_are_the_same_loop_with_one_channel_off(tiny_qwen3):
    rl_only = compile_tiny(tiny_qwen3, arm="rl_only")[2]
    assert rl_only.rollouts.fast == 0 and rl_only.rollouts.slow > 0
    assert rl_only.best.candidate.id == rl_only.seed_candidate.id
    assert rl_only.weights_version != rl_only.base_version
    gepa_only = compile_tiny(tiny_qwen3, arm="gepa_only")[2]
    assert gepa_only.rollouts.slow == 0 and gepa_only.rollouts.fast > 0
    assert gepa_only.weights_version == gepa_only.base_version
    assert all(record.kl_to_base == 0 for record in gepa_only.records)


def test_a_program_of_several_predictors_compiles(tiny_qwen3):
    compiled, _, result = compile_tiny(tiny_qwen3, Twice())
    assert {name.split(".")[0] for name in result.best.candidate.components} == {"first", "second"}
    assert compiled.first.lm.model == compiled.second.lm.model == result.best.version


class Dated(dspy.Module):
    """Hands its predictor what JSON has no word for."""

    def __init__(self):
        super().__init__()
        self.say = dspy.Predict("question, day: datetime.date, queue -> answer")

    def forward(self, question):
        return self.say(question=question, day=datetime.date(2020, 1, 2), queue=Echo)


def test_a_program_whose_fields_are_not_json_goes_on_after_a_kill(
    tiny_qwen3, tmp_path, monkeypatch
):
    steps = kill_before_steps(monkeypatch, 3)
    with pytest.raises(RuntimeError, match="killed"):
        compile_tiny(tiny_qwen3, Dated(), log_dir=tmp_path)
    result = compile_tiny(tiny_qwen3, Dated(), log_dir=tmp_path)[2]
    assert steps == [0, 1, 2, 2, 3] and result.records[-1].step == 4
    rows = unpack(read_jsonl(tmp_path / "rollouts.jsonl"))
    assert {row["traces"][0]["inputs"]["day"] for row in rows} == {repr(datetime.date(2020, 1, 2))}


def test_the_same_seed_gives_the_same_run_also_where_its_rollouts_are_not_logged(
    tiny_qwen3, tmp_path
):
    logged = compile_tiny(tiny_qwen3, log_dir=tmp_path / "on")[2]
    unlogged = compile_tiny(tiny_qwen3, log_dir=tmp_path / "off", log_rollouts=False)[2]
    assert unlogged.weights_version == logged.weights_version
    assert unlogged.population == logged.population
    assert compile_tiny(tiny_qwen3, seed=1)[2].weights_version != logged.weights_version
    assert (tmp_path / "on" / "rollouts.jsonl").exists()
    assert not (tmp_path / "off" / "rollouts.jsonl").exists()
    assert not (tmp_path / "off" / "answers.jsonl").exists()
    asked = [row for row in read_jsonl(tmp_path / "on" / "answers.jsonl") if "inputs" in row]
    assert [row["inputs"]["question"] for row in asked] == [q.question for q in questions(4, 6)]
    assert sum(row["reward"] for row in asked) / 4 == pytest.approx(logged.records[0].val_score)
    write_report([tmp_path / "off"], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_every_sample_of_a_validation_example_is_logged(tiny_qwen3, tmp_path):
    result = compile_tiny(tiny_qwen3, log_dir=tmp_path, arm="gepa_only", val_samples=2)[2]
    asked = [row for row in read_jsonl(tmp_path / "answers.jsonl") if "inputs" in row]
    twice = [q.question for q in questions(4, 6) for _ in range(2)]
    assert [row["inputs"]["question"] for row in asked] == twice
    assert sum(row["reward"] for row in asked) / 8 == pytest.approx(result.records[0].val_score)
    write_report([tmp_path], tmp_path / "page.html")


def test_what_prompts_alone_know_within_a_cycle_is_recorded(tiny_qwen3, tmp_path):
    settings = {"arm": "gepa_only", "acceptance_criterion": "improvement_or_equal"}
    result = compile_tiny(tiny_qwen3, log_dir=tmp_path, **settings)[2]
    assert not result.records[0].early_scores
    before, cycle = result.records[:2]
    assert cycle.early_scores
    known = [(before.total_rollouts.total + 1, 0.0), *cycle.early_scores]
    known.append((cycle.total_rollouts.total, 1.0))
    for (spent, score), (later, after) in pairwise(known):
        assert spent <= later and score <= after
    rows = map(cycle_record, read_jsonl(tmp_path / "cycles.jsonl"))
    assert [row.early_scores for row in rows] == [r.early_scores for r in result.records]


def test_the_student_is_left_as_it_was(tiny_qwen3):
    student = Echo()
    compile_tiny(tiny_qwen3, student)
    assert student.say.lm is None and student.say.signature.instructions == "Say something."


def test_the_lm_given_keeps_answering_with_its_own_weights(tiny_qwen3):
    lm = compile_tiny(tiny_qwen3)[1]
    fresh = LocalLM(str(tiny_qwen3))
    assert lm.model == fresh.model
    assert lm("hello", temperature=0) == fresh("hello", temperature=0)


def test_budgets_in_rollouts_and_seconds_end_the_loop(tiny_qwen3):
    result = compile_tiny(tiny_qwen3, max_cycles=50, max_rollouts=40)[2]
    assert len(result.records) < 6
    assert result.records[-2].total_rollouts.total < 40 <= result.rollouts.total
    result = compile_tiny(tiny_qwen3, max_cycles=None, max_seconds=0.01)[2]
    assert len(result.records) == 1


@pytest.mark.parametrize(
    "settings",
    [{"lora": False}, {"lora": True}, {"slow_signal": "both", "teacher_update_rate": 0.3}],
    ids=["full", "lora", "averaged teacher"],
)
def test_a_killed_run_goes_on_to_the_same_end(tiny_qwen3, tmp_path, settings, monkeypatch):
    whole = compile_tiny(tiny_qwen3, log_dir=tmp_path / "whole", **settings)[2]
    steps = kill_before_steps(monkeypatch, 2, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            compile_tiny(tiny_qwen3, log_dir=tmp_path / "cut", **settings)
    resumed = compile_tiny(tiny_qwen3, log_dir=tmp_path / "cut", **settings)[2]
    assert steps == [0, 1, 1, 2, 2, 3]
    assert resumed.weights_version == whole.weights_version
    assert resumed.best == whole.best
    assert resumed.population == whole.population
    for name in ("answers", "proposals"):  # each once, whenever it was killed
        one, other = (
            list(read_jsonl(tmp_path / run / f"{name}.jsonl")) for run in ("whole", "cut")
        )
        assert one == other
    for name in ("cycles", "steps", "rollouts"):
        lines = [
            (tmp_path / run / f"{name}.jsonl").read_text().count("\n") for run in ("whole", "cut")
        ]
        assert lines[0] == lines[1]


@pytest.mark.usefixtures("repeatable_sampling")
def test_a_finished_run_is_returned_without_running_again(tiny_qwen3, tmp_path):
    first = compile_tiny(tiny_qwen3, log_dir=tmp_path)[2]
    compiled, _, again = compile_tiny(tiny_qwen3, log_dir=tmp_path)
    assert again.records == first.records and again.best == first.best
    assert compiled.say.lm.model == first.best.version
    assert compiled(question="number 1").answer is not None


def test_a_run_folder_of_other_settings_is_refused(tiny_qwen3, tmp_path):
    compile_tiny(tiny_qwen3, log_dir=tmp_path)
    with pytest.raises(StoreError, match="seed differs"):
        compile_tiny(tiny_qwen3, log_dir=tmp_path, seed=1)


def three(gold, pred, trace=None):
    return 1.0


class Empty(dspy.Module):
    def forward(self, question):
        return dspy.Prediction(answer="")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trainset": []}, DataError, "trainset is empty"),
        ({"valset": []}, DataError, "valset is empty"),
        ({"trainset": [dspy.Example(question="x")]}, DataError, "with_inputs"),
        ({"trainset": ["x"]}, DataError, "not a dspy.Example"),
        ({"metric": lambda gold: 1}, MetricError, "must accept"),
        ({"metric": None}, MetricError, "needs a metric"),
        ({"metric": lambda gold, pred, trace=None: None}, MetricError, "must return a number"),
        ({"metric": lambda gold, pred, trace=None: float("nan")}, MetricError, "finite"),
        ({"lm": None}, ProgramError, "needs a local model"),
        ({"student": Empty()}, ProgramError, "no predictors"),
        ({"student": "program"}, ProgramError, "must be a dspy.Module"),
        ({"settings": {"group_size": 6, "population_size": 4}}, ConfigError, "multiple"),
        ({"settings": {"arm": "rl"}}, ConfigError, "arm must be"),
        ({"teacher": Echo()}, ConfigError, "teacher"),
    ],
)
def test_bad_input_is_refused_before_any_work(tiny_qwen3, change, error, message, monkeypatch):
    from fst_dspy.rollouts import runner as rollout

    def no_work(*args, **kwargs):
        raise AssertionError("rollouts were run")

    monkeypatch.setattr(rollout.RolloutRunner, "run", no_work)
    lm = change.get("lm", LocalLM(str(tiny_qwen3)))
    with dspy.context(lm=lm), pytest.raises(error, match=message) as caught:
        fst = FST(change.get("metric", vowels), **{**SETTINGS, **change.get("settings", {})})
        fst.compile(
            change.get("student", Echo()),
            trainset=change.get("trainset", questions(4)),
            valset=change.get("valset", questions(2, 4)),
            teacher=change.get("teacher"),
        )
    assert isinstance(caught.value, FSTError)


def test_a_model_path_that_does_not_exist_is_a_clear_error(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        LocalLM(str(tmp_path / "nowhere"))


def test_a_metric_without_feedback_works(tiny_qwen3):
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        compiled = FST(three, **{**SETTINGS, "max_cycles": 1}).compile(
            Echo(), trainset=questions(4)
        )
    assert compiled._compiled


def test_a_metric_that_fails_on_every_rollout_ends_the_compile(tiny_qwen3):
    def broken(gold, pred, trace=None):
        return pred.no_such_field

    with dspy.context(lm=LocalLM(str(tiny_qwen3))), pytest.raises(MetricError, match="every"):
        FST(broken, **SETTINGS).compile(Echo(), trainset=questions(4), valset=questions(2, 4))


def test_steps_whose_groups_are_all_constant_are_skipped(tiny_qwen3):
    def flat(gold, pred, trace=None):
        return 0.5

    fst = FST(flat, track_stats=True, on_no_signal="warn", **SETTINGS)
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        result = fst.compile(Echo(), trainset=questions(6)).detailed_results
    assert result.weights_version == result.base_version
    assert result.records[-1].constant_group_share == 1
    assert result.rollouts.slow == 4 * 2 * 4


def test_settings_that_are_gone_are_read_where_they_were_off() -> None:
    saved = FSTConfig.make(lora=True).to_dict()
    now = without_removed(saved)
    saved["slow"] |= {"off_policy_steps": 0, "resample_constant": 0}
    assert without_removed(saved) == now
    saved["slow"]["off_policy_steps"] = 1
    assert without_removed(saved) != now


def test_a_loss_that_stays_non_finite_ends_the_run_at_the_best_weights(tiny_qwen3, monkeypatch):
    from fst_dspy.loop import learner
    from fst_dspy.types import TrainingRow

    real = learner.group_rows

    def poisoned(groups, scale, **credit):
        return [
            TrainingRow(r.prompt_ids_T, r.completion_ids_T, r.logprobs_T, float("nan"))
            for r in real(groups, scale, **credit)
        ]

    monkeypatch.setattr(learner, "group_rows", poisoned)
    lm = LocalLM(str(tiny_qwen3))
    with dspy.context(lm=lm), pytest.raises(TrainingError, match="3 optimizer steps in a row"):
        FST(vowels, **{**SETTINGS, "max_bad_steps": 3, "steps_per_cycle": 4}).compile(
            Echo(), trainset=questions(6)
        )
    assert lm.policy.version() == lm.policy.base_version


@pytest.fixture(scope="module")
def whole(tiny_qwen3):
    """What the usual compile comes to, where nothing comes between."""
    with dspy.context(adapter=RawAdapter()):
        return compile_tiny(tiny_qwen3)[2]


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    whole, tiny_qwen3, tmp_path, monkeypatch
):
    real = joint.Run._slow_step

    def interrupted(self, state):
        if state.step == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, state)

    monkeypatch.setattr(joint.Run, "_slow_step", interrupted)
    listener = Heard()
    with pytest.raises(KeyboardInterrupt, match="log_dir") as raised:
        compile_tiny(tiny_qwen3, log_dir=tmp_path, progress=listener)
    assert raised.value.folder == str(tmp_path) and not raised.value.at_once
    assert listener.said == ["stopping after this step; press Ctrl-C again to stop now"]
    assert [row["step"] for row in read_jsonl(tmp_path / "steps.jsonl")] == [1, 2]
    monkeypatch.setattr(joint.Run, "_slow_step", real)
    assert compile_tiny(tiny_qwen3, log_dir=tmp_path)[2].weights_version == whole.weights_version


class Heard(SilentProgress):
    """Keeps what it is told to say."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_ctrl_c_in_a_fast_phase_is_not_held_back_for_the_steps_after_it(
    tiny_qwen3, tmp_path, monkeypatch
):
    whole = compile_tiny(tiny_qwen3, reuse=False)[2]
    real = joint.Run._fast_phase

    def interrupted(self, state):
        if state.cycle == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, state)

    monkeypatch.setattr(joint.Run, "_fast_phase", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_tiny(tiny_qwen3, log_dir=tmp_path, reuse=False)
    assert [row["step"] for row in read_jsonl(tmp_path / "steps.jsonl")] == [1, 2]
    monkeypatch.setattr(joint.Run, "_fast_phase", real)
    again = compile_tiny(tiny_qwen3, log_dir=tmp_path, reuse=False)[2]
    assert again.weights_version == whole.weights_version


def test_two_compiles_at_once_do_not_train_each_others_weights(tiny_qwen3, tmp_path):
    lm, refused = LocalLM(str(tiny_qwen3)), list[str]()

    def compiled(metric=vowels):
        own = FST(metric, track_stats=True, **SETTINGS)
        with dspy.context(lm=lm):
            return own.compile(Echo(), trainset=questions(6), valset=questions(4, 6))

    def meanwhile(gold, pred, trace=None, pred_name=None, pred_trace=None):
        if pred.answer and not refused:  # not of the labels, before the compile
            with pytest.raises(ModelError, match="another compile in this process") as error:
                compiled()
            refused.append(str(error.value))
        return vowels(gold, pred)

    disturbed = compiled(meanwhile).detailed_results
    assert refused and compiled().detailed_results.weights_version == disturbed.weights_version
    with dspy.context(lm=lm), pytest.raises(StoreError):  # what fails holds nothing
        FST(vowels, log_dir=foreign(tmp_path), **SETTINGS).compile(
            Echo(), trainset=questions(6), valset=questions(4, 6)
        )
    assert compiled().detailed_results.weights_version == disturbed.weights_version


def foreign(folder):
    """A run folder of another run."""
    (folder / "config.json").write_text("[]")
    return folder


def test_prompts_without_further_iterations_end_with_their_first_cycle(tiny_qwen3):
    settings = {"arm": "gepa_only", "cycle_iterations": 0, "max_cycles": None, "max_rollouts": 99}
    result = compile_tiny(tiny_qwen3, **settings)[2]
    assert result.records[-1].cycle == 1 and 0 < result.rollouts.fast < 99


@pytest.mark.parametrize("first_phase", ["fast", "slow"])
def test_a_limit_that_validation_uses_up_is_told_and_can_be_raised(
    first_phase, tiny_qwen3, tmp_path
):
    listener, own = Heard(), {"first_phase": first_phase, "log_dir": tmp_path}
    short = compile_tiny(tiny_qwen3, max_rollouts=3, progress=listener, **own)[2]
    assert len(short.records) == 1
    assert listener.said[0].startswith("4 of 3 rollouts reached by the first validation: nothing")
    further = compile_tiny(tiny_qwen3, max_rollouts=40, **own)[2]
    assert further.records[:1] == short.records and 30 < further.rollouts.total <= 40


def test_a_limit_that_a_step_has_reached_is_not_put_down_to_validation(
    tiny_qwen3, tmp_path, monkeypatch
):
    own = {"arm": "rl_only", "max_rollouts": 5, "log_dir": tmp_path}
    real = joint.Run._slow_step

    def interrupted(self, state):
        signal.raise_signal(signal.SIGINT)
        return real(self, state)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(joint.Run, "_slow_step", interrupted)
        compile_tiny(tiny_qwen3, **own)
    listener = Heard()
    assert compile_tiny(tiny_qwen3, progress=listener, **own)[2].records[-1].step == 1
    assert not any("first validation" in words for words in listener.said)


def test_ctrl_c_in_the_first_validation_is_not_held_back_for_a_fast_phase(
    whole, tiny_qwen3, tmp_path, monkeypatch
):
    real = joint.score

    def interrupted(parts, state):
        if not state.records:
            signal.raise_signal(signal.SIGINT)
        return real(parts, state)

    monkeypatch.setattr(joint, "score", interrupted)
    with pytest.raises(KeyboardInterrupt, match="log_dir"):
        compile_tiny(tiny_qwen3, log_dir=tmp_path)
    assert not list(read_jsonl(tmp_path / "proposals.jsonl"))
    assert len(list(read_jsonl(tmp_path / "cycles.jsonl"))) == 1
    again = compile_tiny(tiny_qwen3, log_dir=tmp_path)[2]
    assert again.weights_version == whole.weights_version and again.rollouts == whole.rollouts


def test_a_budget_says_that_it_is_reached_and_what_is_done(whole, tiny_qwen3, tmp_path):
    _, opening, first, *_ = whole.records
    prompts, step, validation = opening.total_rollouts.total, 8, 4
    listener = Heard()
    budget = {"max_cycles": None, "log_dir": tmp_path, "progress": listener}
    # Prompts alone leave a rollout too few for a step, the first cycle with steps one too few for
    # a second step; in the end all is used up to the last.
    for limit, ended_at, steps in (
        (prompts + 11, prompts, 0),
        (prompts + 19, prompts + step + validation, 1),
        (prompts + 32, prompts + 32, 3),
    ):
        result = compile_tiny(tiny_qwen3, max_rollouts=limit, **budget)[2]
        assert (result.rollouts.total, result.records[-1].step) == (ended_at, steps)
        assert ended_at <= limit
        why = f"after {ended_at} rollouts, as the next optimizer step and its validation would go"
        if ended_at == limit:
            why = f"after {limit} of {limit} rollouts"
        assert why in listener.said[-1] and "the run ends" in listener.said[-1]
        compile_tiny(tiny_qwen3, max_rollouts=limit, **budget)
        assert listener.said[-1].startswith(f"this run had ended, {why}")
        assert listener.said[-1].endswith("; a higher limit lets it go on")
    assert first.total_rollouts.total == prompts + 2 * step + validation


def test_a_step_that_a_fast_phase_has_left_no_room_for_is_not_taken(tiny_qwen3):
    settings = {"reuse": False, "max_cycles": None}
    _, first, *_ = compile_tiny(tiny_qwen3, max_rollouts=46, **settings)[2].records
    limit = first.total_rollouts.total + 20  # an iteration and a step, but not the validation too
    result = compile_tiny(tiny_qwen3, max_rollouts=limit, **settings)[2]
    assert result.records[-1].cycle == 2 and result.records[-1].step == first.step
    assert result.records[-1].rollouts.fast > 0 and result.rollouts.total <= limit


def test_reused_rollouts_leave_the_fast_channel_its_first_phase_alone(tiny_qwen3):
    reused = compile_tiny(tiny_qwen3, max_cycles=3)[2]
    separate = compile_tiny(tiny_qwen3, max_cycles=3, reuse=False)[2]
    first, *later = reused.records
    assert first.rollouts.fast == 0 and first.rollouts.eval == 4
    assert later[0].rollouts.fast > 0
    for record in later[1:]:
        assert record.rollouts.fast == 0
        assert record.rollouts.eval == 4, "the best candidate on the validation examples"
        assert record.rollouts.reused == record.rollouts.slow == 2 * 2 * 4
    assert separate.records[-1].rollouts.fast > 0 and separate.rollouts.eval == 0
    assert reused.records[-1].proposals["iterations"] > later[0].proposals["iterations"] - 1
    assert reused.best.score == reused.records[reused.best.cycle].val_score


@pytest.mark.parametrize(
    ("setting", "opens"), [({}, True), ({"reuse": False}, False), ({"first_phase": "slow"}, False)]
)
def test_what_prompts_alone_reach_is_validated_before_the_weights_move(tiny_qwen3, setting, opens):
    result = compile_tiny(tiny_qwen3, max_cycles=1, **setting)[2]
    assert len(result.records) == 2 + opens, "max_cycles does not count the opening"
    first = result.records[1]
    assert (first.step == 0) == opens == (first.train_reward is None)
    assert (first.weights_version == result.base_version) == opens
    if opens:
        assert first.rollouts.fast > 0 and first.rollouts.slow == 0 and first.rollouts.eval == 4
        assert first.kl_to_base == 0 and result.records[2].rollouts.fast == 0


@pytest.mark.usefixtures("repeatable_sampling")
def test_demos_of_a_real_program_are_learned_and_bound(tiny_qwen3):
    compiled, _, result = compile_tiny(tiny_qwen3, max_cycles=3, demo_tokens=200)
    seen = {c.source for c in result.population.candidates}
    tried = result.records[-1].proposals
    assert tried["iterations"] > 0 and seen <= {"seed", "instructions", "demos", "merge"}
    assert compiled(question="number 3").answer is not None


def best_cycle_of(folder, scores, monkeypatch):
    """The cycle that is taken for best when the validation scores of each cycle are these."""
    rows = iter(scores)

    def scored(runner, candidates, valset, **_):
        found = evaluate(runner, candidates[:1], valset, channel="eval")
        return replace(found, score_K_V=(tuple(next(rows)),))

    def of_sample(rollouts, *counts):
        return replace(evaluation_of(rollouts, *counts), score_K_V=(tuple(next(rows)),))

    # The first validation is of all candidates at once, later ones are sample by sample.
    monkeypatch.setattr(validation, "evaluate", scored)
    monkeypatch.setattr(validation, "evaluation_of", of_sample)
    # Two of them are not of cycles with steps: the student's own and the opening's.
    return compile_tiny(folder, max_cycles=len(scores) - 2, steps_per_cycle=1)[2].best.cycle


def test_best_is_the_latest_that_is_not_likely_worse(tiny_qwen3, monkeypatch):
    def right(count):
        return [1.0] * count + [0.0] * (8 - count)

    assert best_cycle_of(tiny_qwen3, [right(2), right(8), right(7)], monkeypatch) == 2
    assert best_cycle_of(tiny_qwen3, [right(2), right(8), right(7), right(2)], monkeypatch) == 2
    # Likely worse than the highest, if not clearly; not than the one before.
    assert best_cycle_of(tiny_qwen3, [right(8), right(7), right(5)], monkeypatch) == 1
    equal = right(7)[::-1]  # as many as the one before, others than it
    assert best_cycle_of(tiny_qwen3, [right(8), right(7), equal, right(2)], monkeypatch) == 2
