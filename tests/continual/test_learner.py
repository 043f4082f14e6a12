"""A stream of tasks on shared weights, on tiny random models and the embedded one."""

import dataclasses
import functools
import io
import threading
from types import SimpleNamespace

import dspy
import pytest
from helpers import Echo, Twice, kill_before_steps, questions, vowels
from records import make_rollout
from rich.console import Console
from tiny_compile import SETTINGS as TINY
from tiny_compile import raw_adapter  # noqa: F401
from training_helpers import late_letters

import fst_dspy
from fst_dspy import ContinualFST, LocalLM, Task, optimizer
from fst_dspy.config import LoraConfig
from fst_dspy.continual import scores as scores_of_streams
from fst_dspy.continual.origin import SEARCH_EXAMPLES, alike, fits, nearest
from fst_dspy.continual.scores import ScoreCache, StreamScores
from fst_dspy.errors import ConfigError, DataError, ModelError, ProgramError, StoreError
from fst_dspy.loop.parts import begin_lora
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import RolloutCounts

FOUR = RolloutCounts(eval=4)
SETTINGS = TINY | {"max_cycles": 1, "first_cycle_iterations": 1}


def make_task(name, metric=vowels, program=None, start=0):
    sets = (questions(6, start), questions(4, start + 6), questions(4, start + 10))
    return Task(name, program or Echo(), metric, *sets)


A, B = make_task("a"), make_task("b", late_letters, start=20)


def stream(folder, *tasks, lm=None, **options):
    """Learn tasks on a freshly loaded tiny model."""
    learner = ContinualFST(**{**SETTINGS, **options})
    with dspy.context(lm=lm or LocalLM(str(folder))):
        for task in tasks:
            learner.learn(task)
    return learner


def test_the_scores_of_a_stream_show_themselves():
    scores = StreamScores(("<a>", "b"), ("base", "<a>"), ((0.25, None), (0.75, 0.5)))
    assert scores.to_pandas().loc["1 <a>", "b"] == 0.5
    html = scores._repr_html_()
    assert "&lt;a&gt;" in html and "<a>" not in html and "0.750" in html and "—" in html
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(scores)
    assert "0 base" in (text := console.export_text()) and "0.750" in text
    (axes,) = scores.plot_scores().axes
    assert sorted(t.get_text() for t in axes.texts) == ["0.25", "0.50", "0.75"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0 base", "1 <a>"]


def test_a_score_is_not_taken_for_that_of_another_metric_program_or_temperature(monkeypatch):
    monkeypatch.setattr(scores_of_streams, "RolloutRunner", lambda *_: SimpleNamespace(counts=FOUR))
    monkeypatch.setattr(scores_of_streams, "evaluate", lambda *_, **__: SimpleNamespace(mean_K=[1]))
    cache, candidate = ScoreCache(None), make_candidate({"say.instructions": "own"})
    sampling = fst_dspy.FSTConfig().sampling
    cache.measure(A, candidate, "v", 1, None, sampling, 0)
    assert cache.find(make_task("a"), candidate, "v", 1, sampling) == 1
    harder = functools.partial(vowels, pred_name="all")
    for task in (
        make_task("a", late_letters),
        make_task("a", harder),
        make_task("a", program=Twice()),
    ):
        assert cache.find(task, candidate, "v", 1, sampling) is None
    cooler = dataclasses.replace(sampling, temperature=0.5)
    assert cache.find(A, candidate, "v", 1, cooler) is None


def versions(learner):
    return [stage.version for stage in learner.stages]


# --- the nearest task -----------------------------------------------------------------------------


class ScriptedRunner:
    """Rewards a candidate on every example by what the script says."""

    def __init__(self, rewards):
        self.rewards, self.jobs = rewards, []

    def run(self, jobs, *, channel, salt, version=None):
        assert channel == "fast" and version == "v"
        self.jobs += jobs
        return [
            make_rollout(self.rewards[job.candidate.id][n % 8], candidate_id=job.candidate.id)
            for n, job in enumerate(jobs)
        ]


@pytest.mark.parametrize(
    ("own", "one", "two", "expected"),
    [
        ("00000000", "11111110", "11111111", "two"),
        ("00000000", "11111111", "11111111", "one"),
        ("00000000", "00001111", "00000000", None),
        ("11111111", "11111111", "01111111", None),
        ("12121212", "34343434", "00000000", "one"),
    ],
)
def test_the_nearest_task_is_the_best_of_those_clearly_better(own, one, two, expected):
    candidates = [make_candidate({"say.instructions": text}) for text in ("own", "one", "two")]
    rows = [tuple(map(int, row)) for row in (own, one, two)]
    runner = ScriptedRunner(dict(zip([c.id for c in candidates], rows, strict=True)))
    known = {"one": candidates[1], "two": candidates[2]}
    assert nearest(runner, candidates[0], known, questions(8), "v") == expected
    assert len(runner.jobs) == 3 * 8


def test_tasks_share_candidates_where_predictors_and_fields_are_the_same():
    assert alike(A, B)
    assert not alike(A, make_task("c", program=Twice()))
    other = Echo()
    other.say = dspy.Predict("question -> reply")
    assert not alike(A, make_task("c", program=other))


def test_agents_with_other_tools_do_not_share_descriptions_of_tools():
    def agent(name):
        tool = dspy.Tool(lambda place: place, name=name, desc="Looks.")
        return make_task(name, program=dspy.ReAct("question -> answer", tools=[tool]))

    one, other = agent("look"), agent("ask")
    told = make_candidate({"react.tool:look": "Looks around."})
    assert alike(one, other) and fits(told, one.program) and not fits(told, other.program)


def test_adapters_are_trained_on_and_not_dropped(tiny_qwen3):
    policy = LocalLM(str(tiny_qwen3)).policy
    begin_lora(policy, LoraConfig(rank=4), seed=0)
    first = policy.version()
    begin_lora(policy, LoraConfig(rank=4), seed=1)
    assert policy.version() == first != policy.base_version
    with pytest.raises(ConfigError, match="same lora settings"):
        begin_lora(policy, LoraConfig(rank=8), seed=0)


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, {"rank": 4}], ids=["full", "lora"])
def test_weights_go_on_from_stage_to_stage_and_populations_stay_apart(tiny_qwen3, lora):
    learner = stream(tiny_qwen3, A, B, lora=lora)
    one, two = learner.stages
    assert learner.tasks == ("a", "b")
    first, base = two.result.records[0], two.result.base_version
    assert one.result.base_version == base != one.version
    assert first.weights_version == one.version and first.kl_to_base > 0
    before = dataclasses.replace(one)
    a, b = learner.program("a"), learner.program("b")
    assert a.say.lm.model == b.say.lm.model == two.version
    assert a.say.signature.instructions == one.candidate.components["say.instructions"]
    assert b.say.signature.instructions == two.candidate.components["say.instructions"]
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        assert a(question="number 1").answer is not None
    assert learner.stages[0] == before


@pytest.mark.slow
def test_a_task_learned_again_goes_on_with_its_population(tiny_qwen3):
    learner = stream(tiny_qwen3, A, B, A)
    first, _, again = learner.stages
    assert again.started_from == "a" and learner.tasks == ("a", "b")
    started = {c.id for c in first.candidates(2)}
    assert set(again.result.records[0].candidate_ids) == started
    assert again.result.records[0].total_rollouts.eval == 4 * len(started)
    assert learner.program("a").detailed_results == again.result


@pytest.mark.slow
def test_a_new_task_takes_the_nearest_population_and_counts_the_search(tiny_qwen3, monkeypatch):
    from fst_dspy.continual import origin as continual_search

    monkeypatch.setattr(continual_search, "better", lambda blocks, level: True)
    learner = stream(tiny_qwen3, A, B)
    one, two = learner.stages
    if one.candidate.id == one.result.seed_candidate.id:
        pytest.fail("the seed must be one whose stage finds a better prompt")
    assert two.started_from == "a"
    record = two.result.records[0]
    assert set(record.candidate_ids) == {c.id for c in one.candidates(2)}
    assert record.total_rollouts.fast == 2 * min(SEARCH_EXAMPLES, 6)
    assert record.tokens["prompt"] > 0
    total = one.result.rollouts.plus(two.result.rollouts)
    assert learner.rollouts == total


@pytest.mark.slow
def test_rl_only_shares_weights_under_the_programs_own_prompts(tiny_qwen3):
    learner = stream(tiny_qwen3, A, B, A, arm="rl_only")
    assert learner.rollouts.fast == 0
    assert [stage.started_from for stage in learner.stages] == [None] * 3
    assert {stage.candidate.id for stage in learner.stages} == {
        learner.stages[0].result.seed_candidate.id
    }
    one, two, _ = learner.stages
    assert two.result.records[0].weights_version == one.version != one.result.base_version


def test_settings_without_effect_are_told_of_a_stream(tiny_qwen3, monkeypatch, caplog):
    def stop(*_):
        raise ConfigError("far enough")

    monkeypatch.setattr(optimizer, "make_parts", stop)
    with pytest.raises(ConfigError, match="far enough"):
        stream(tiny_qwen3, A, arm="rl_only", demo_tokens=64)
    assert caplog.messages.count("demo_tokens has no effect with arm='rl_only'") == 1


class Asking:
    """A proposer with a memory, and maybe a client, which cannot be copied."""

    def __init__(self, client=None):
        self.client, self.asked = client, 0

    def propose(self, components, records, names):
        self.asked += 1
        return {name: f"Say {self.asked}." for name in names}


def test_a_proposer_that_cannot_be_copied_is_shared_by_the_stages(tiny_qwen3, caplog):
    alone, shared = Asking(), Asking(threading.Lock())
    settings = {"arm": "gepa_only", "cycle_iterations": 0}
    for proposer in (alone, shared):
        stream(tiny_qwen3, A, instruction_proposer=proposer, **settings)
    assert (alone.asked, shared.asked) == (0, 1)
    assert caplog.text.count("cannot be copied") == 1


@pytest.mark.slow
def test_every_task_is_scored_at_every_stage_once(tiny_qwen3, tmp_path):
    learner = stream(tiny_qwen3, A, B, log_dir=tmp_path)
    scores = learner.evaluate()
    assert scores.tasks == ("a", "b") and scores.stages == ("base", "a", "b")
    assert all(0 <= score <= 1 for row in scores.score_S_N for score in row)
    assert list(scores.to_pandas().columns) == ["a", "b"]
    assert learner.rollouts.eval == sum(s.result.rollouts.eval for s in learner.stages) + 6 * 4
    before = learner.rollouts
    assert learner.evaluate() == scores and learner.rollouts == before
    # In another process the weights of all stages are read from the folder, or nothing is.
    again = stream(tiny_qwen3, A, B, log_dir=tmp_path)
    assert again.evaluate() == scores and again.rollouts == before
    (tmp_path / "scores.json").unlink()
    assert stream(tiny_qwen3, A, B, log_dir=tmp_path).evaluate() == scores
    with pytest.raises(ConfigError, match="samples"):
        learner.evaluate(samples=0)


@pytest.mark.slow
def test_a_stream_killed_in_its_second_stage_goes_on_there(tiny_qwen3, tmp_path, monkeypatch):
    whole = stream(tiny_qwen3, A, B, lora=True)
    steps = kill_before_steps(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="killed"):
        stream(tiny_qwen3, A, B, lora=True, log_dir=tmp_path)
    resumed = stream(tiny_qwen3, A, B, lora=True, log_dir=tmp_path)
    assert steps == [0, 1, 0, 1, 1], "the first stage is not run again"
    assert versions(resumed) == versions(whole)
    assert [s.result.population for s in resumed.stages] == [
        s.result.population for s in whole.stages
    ]
    assert resumed.rollouts == whole.rollouts
    with pytest.raises(StoreError, match="another task"):
        stream(tiny_qwen3, A, make_task("c"), lora=True, log_dir=tmp_path)


@pytest.mark.slow
def test_a_larger_budget_is_for_the_last_stage_that_was_begun(tiny_qwen3, tmp_path):
    one = {"log_dir": tmp_path, "on_no_signal": "warn"}
    before = stream(tiny_qwen3, A, B, **one).stages
    first, second = stream(tiny_qwen3, A, B, max_cycles=2, **one).stages
    assert first.result.records == before[0].result.records
    assert len(second.result.records) > len(before[1].result.records)


@pytest.mark.slow
def test_ctrl_c_says_how_the_stream_goes_on(tiny_qwen3, tmp_path, monkeypatch):
    from fst_dspy.loop import joint

    def interrupted(self, state):
        raise KeyboardInterrupt

    monkeypatch.setattr(joint.Run, "_slow_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"stage 1, a, .*{tmp_path.name}"):
        stream(tiny_qwen3, A, log_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, {"rank": 4}], ids=["full", "lora"])
def test_a_saved_stream_is_loaded_and_goes_on_as_the_first_would(tiny_qwen3, tmp_path, lora):
    lm = LocalLM(str(tiny_qwen3))
    learner = stream(tiny_qwen3, A, B, lora=lora, lm=lm)
    scores = learner.evaluate()
    folder = learner.save(tmp_path / "stream")
    learner.save(folder)  # replaces it
    (folder / "stages").mkdir()
    (folder / "stages" / "config.json").write_text("{}")  # of a log_dir in the same place
    with pytest.raises(StoreError, match="not overwritten"):
        learner.save(folder)
    weights = [folder / "tasks" / name / "model" / "model.safetensors" for name in "ab"]
    if not lora:
        assert weights[0].samefile(weights[1])
    served = fst_dspy.load(folder / "tasks" / "a", Echo(), base=tiny_qwen3)
    assert served.say.lm.model == learner.stages[-1].version
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        loaded = ContinualFST.load(folder, [A, B])
        assert loaded.config == learner.config and loaded.rollouts == learner.rollouts
        assert versions(loaded) == versions(learner)
        other = ContinualFST.load(folder, [A, B], lr=1e-4, rollouts_per_candidate=1).config.slow
        assert (other.learning_rate, other.group_size) == (1e-4, 2)
        assert loaded.program("a").say.lm.model == learner.stages[-1].version
        assert loaded.evaluate() == scores
        loaded.learn(A)
        known = loaded.evaluate().score_S_N
        assert known[:3] == scores.score_S_N and None not in known[3]
    with dspy.context(lm=lm):
        learner.learn(A)
    assert versions(loaded) == versions(learner)
    assert loaded.stages[-1].result.best == learner.stages[-1].result.best


@pytest.mark.slow
def test_a_damaged_or_foreign_folder_is_refused(tiny_qwen3, tiny_llama, tmp_path):
    learner = stream(tiny_qwen3, A)
    folder = learner.save(tmp_path / "stream")
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        with pytest.raises(ConfigError, match="pass it as well"):
            ContinualFST.load(folder, [B])
        with pytest.raises(StoreError, match="no saved stream"):
            ContinualFST.load(tmp_path, [A])
    with dspy.context(lm=LocalLM(str(tiny_llama))), pytest.raises(ModelError, match="learned on"):
        ContinualFST.load(folder, [A])
    model = folder / "tasks" / "a" / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with (
        dspy.context(lm=LocalLM(str(tiny_qwen3))),
        pytest.raises(StoreError, match="SHA-256"),
    ):
        ContinualFST.load(folder, [A])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(StoreError, match="not overwritten"):
        learner.save(tmp_path / "other")


@pytest.mark.slow
def test_early_weights_leave_memory_but_for_programs_that_name_them(tiny_qwen3, tmp_path):
    learner = ContinualFST(log_dir=tmp_path, **SETTINGS)
    lm = LocalLM(str(tiny_qwen3))
    with dspy.context(lm=lm):
        program = learner.learn(A)
        learner.learn(B)
        one = learner.stages[0].version
        assert program.say.lm.model == one and lm.policy.has(one)
        del program
        learner.learn(A)
        assert not lm.policy.has(one) and lm.policy.has(learner.stages[-1].version)


def test_bad_input_is_refused_before_any_work(tiny_qwen3, tiny_llama, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("rollouts were run")

    monkeypatch.setattr(RolloutRunner, "run", no_work)
    with pytest.raises(ConfigError, match="unknown setting"):
        ContinualFST(learning_rat=1)
    with pytest.raises(ConfigError, match="arm must be"):
        ContinualFST(arm="rl")
    learner = ContinualFST(**SETTINGS)
    with pytest.raises(ConfigError, match="nothing has been learned"):
        learner.save("nowhere")
    with pytest.raises(ConfigError, match="known: none yet"):
        learner.program("a")
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        with pytest.raises(ConfigError, match="must be made of"):
            learner.learn(make_task("../a"))
        with pytest.raises(DataError, match="trainset is empty"):
            learner.learn(dataclasses.replace(A, trainset=[]))
    with dspy.context(lm=None), pytest.raises(ProgramError, match="local model"):
        learner.learn(A)
    assert learner.stages == ()


@pytest.mark.slow
def test_tasks_of_another_model_or_form_are_refused(tiny_qwen3, tiny_llama):
    lm = LocalLM(str(tiny_qwen3))
    learner = stream(tiny_qwen3, A, lm=lm, steps_per_cycle=1)
    with dspy.context(lm=LocalLM(str(tiny_llama))), pytest.raises(ProgramError, match="share one"):
        learner.learn(B)
    twice = make_task("a", program=Twice())
    twice.program.set_lm(lm)
    with pytest.raises(ProgramError, match="another name"):
        learner.learn(twice)
