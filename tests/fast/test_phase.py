import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from gepa.strategies.acceptance import ImprovementOrEqualAcceptance
from rule_runner import (
    EXAMPLE,
    NAME,
    PAIR,
    QUEUES,
    RULES,
    SEED,
    TOPICS,
    TRAIN,
    VAL,
    RuleRunner,
    Scripted,
    rollout_of,
    run,
    scored,
    tickets,
    words,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fst_dspy.config import FastConfig, SamplingConfig
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.gepa.events import Events
from fst_dspy.fast.gepa.strategies import Strategies, WorstFirstComponentSelector
from fst_dspy.fast.phase import FastPhase, ProposalStats
from fst_dspy.fast.population import best, choose, mean
from fst_dspy.fast.proposers.demos import DemoProposer
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.proposers.protocol import ProposalError
from fst_dspy.fast.reflector import Reflector, Trajectory, make_records
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import example_id, make_candidate, seed_candidate
from fst_dspy.types import Candidate, Failure, Population, PredictorTrace, Rollout


def lesson_phase(seed: int = 0, **more: Any) -> FastPhase:
    return FastPhase(FastConfig(), LessonProposer(256, words), seed, **more)


def rules_in(candidate: Candidate) -> int:
    return sum(rule in candidate.components[NAME] for rule in RULES.values())


def test_rules_are_learned_from_noisy_feedback() -> None:
    found = []
    for seed in range(10):
        runner = RuleRunner(seed)
        population = run(lesson_phase(seed), runner, scored(runner, SEED))
        found.append(rules_in(population.candidates[best(population)]))
        assert len(population.candidates) <= 4
        assert runner.counts["fast"] < 24 + 8 * (12 + 12 + 24) + 1
    assert sum(found) / len(found) > 10.5 and min(found) >= 8


def test_the_population_is_scored_under_the_version_it_says() -> None:
    runner = RuleRunner()
    start = scored(runner, SEED)
    population = run(lesson_phase(), runner, start)
    assert population.policy_version == 3
    assert population.val_ids == start.val_ids
    assert len(population.score_K_V) == len(population.candidates) > 1
    children = [c for c in population.candidates if c.parent_ids]
    assert children and all((c.cycle, c.source) == (1, "instructions") for c in children)
    assert all(c.components["solve.demos"] == "[]" for c in children)


def test_every_rollout_is_counted_on_fast_and_salts_differ() -> None:
    runner = RuleRunner()
    start = scored(runner, SEED)
    runner.runs.clear()
    phase = lesson_phase()
    run(phase, runner, start)
    stats = phase.stats
    assert {channel for channel, _, _ in runner.runs} == {"fast"}
    salts = [salt for _, salt, _ in runner.runs]
    assert len(set(salts)) == len(salts)
    spent = sum(size for _, _, size in runner.runs)
    assert spent == 12 * stats.iterations + 12 * stats.proposals + 24 * stats.accepted
    assert stats.iterations == stats.proposals + stats.empty + stats.duplicate == 8
    assert stats.proposals == stats.accepted + stats.rejected and stats.accepted > 0
    verdicts = phase.take_verdicts()
    assert [verdict.accepted for verdict in verdicts].count(True) == stats.accepted
    assert {len(verdict.answers) for verdict in verdicts if verdict.accepted} == {24}


def test_a_child_is_told_with_what_is_known_by_then() -> None:
    runner = RuleRunner()
    start = scored(runner, SEED)
    phase = lesson_phase(events=Events(calls=lambda: sum(runner.counts.values())))
    population = run(phase, runner, start)
    known = [verdict.known for verdict in phase.take_verdicts() if verdict.accepted]
    spent, highest = zip(*known, strict=True)
    assert len(known) > 1 and list(spent) == sorted(set(spent))
    assert spent[0] == 24 + 12 + 12 + 24 and spent[-1] <= sum(runner.counts.values())
    assert list(highest) == sorted(highest)
    assert highest[-1] == max(map(mean, population.score_K_V))


def test_the_same_seed_gives_the_same_population() -> None:
    def once(seed: int, cycle: int) -> Population:
        runner = RuleRunner()
        return run(lesson_phase(seed), runner, scored(runner, SEED), cycle=cycle)

    assert once(0, 1) == once(0, 1)
    assert once(0, 1) != once(1, 1)
    assert once(0, 1) != once(0, 2)


def test_a_resumed_phase_continues_identically() -> None:
    runner = RuleRunner()
    phase = lesson_phase()
    first = run(phase, runner, scored(runner, SEED), iterations=3)
    saved = json.loads(json.dumps(phase.state()))
    straight = run(phase, runner, first, cycle=2, iterations=4)
    other = lesson_phase()
    other.load_state(saved)
    assert run(other, runner, first, cycle=2, iterations=4) == straight
    assert other.state() == phase.state()


def test_the_whole_population_can_be_a_parent() -> None:
    topics = list(RULES.values())
    halves = [
        make_candidate({NAME: "\n".join(["Answer.", *part]), "solve.demos": "[]"})
        for part in (topics[:6], topics[6:])
    ]
    runner = RuleRunner()
    parents: set[str] = set()
    for seed in range(6):
        phase = FastPhase(
            FastConfig(population_size=8),
            Scripted(lambda n, texts, names: {names[0]: f"{texts[names[0]]}\nnothing {n}"}),
            seed,
            strategies=Strategies(acceptance_criterion=ImprovementOrEqualAcceptance()),
        )
        population = run(phase, runner, scored(runner, *halves), iterations=3)
        parents |= {i for c in population.candidates for i in c.parent_ids}
    assert parents >= {half.id for half in halves}


def test_a_child_that_does_worse_is_not_kept() -> None:
    whole = make_candidate({NAME: "\n".join(RULES.values()), "solve.demos": "[]"})
    runner = RuleRunner()
    start = scored(runner, whole)
    phase = FastPhase(FastConfig(), Scripted(lambda n, texts, names: {names[0]: f"Bare {n}"}), 0)
    population = run(phase, runner, start, iterations=5)
    assert [c.id for c in population.candidates] == [whole.id]
    assert phase.stats == ProposalStats(iterations=5, proposals=5, rejected=5)
    verdicts = phase.take_verdicts()
    assert [verdict.iteration for verdict in verdicts] == [1, 2, 3, 4, 5]
    for verdict in verdicts:
        assert verdict.changed.keys() == {NAME} and verdict.changed[NAME].startswith("Bare")
        assert not verdict.accepted and len(verdict.before) == len(verdict.after) == 12
        assert sum(verdict.after) < sum(verdict.before) and "its parent" in verdict.reason
        assert not verdict.answers
    assert phase.take_verdicts() == []


def test_failed_proposals_are_counted_and_the_phase_goes_on() -> None:
    def script(call: int, texts: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
        if call == 1:
            raise ConnectionError("no route")
        if call == 2:
            raise ProposalError("too_long", "over")
        if call == 3:
            return {}
        if call == 4:
            return dict(texts)
        return {names[0]: "Answer.\n" + "\n".join(RULES.values())}

    runner = RuleRunner()
    phase = FastPhase(FastConfig(), Scripted(script), 0)
    population = run(phase, runner, scored(runner, SEED), iterations=6)
    assert rules_in(population.candidates[best(population)]) == 12
    stats = phase.stats
    assert stats.errors == {"ConnectionError": 1, "too_long": 1}
    # The sixth draws the accepted child, which holds every rule already: empty once more.
    assert (stats.iterations, stats.empty, stats.accepted) == (6, 3, 1)


def test_a_proposal_that_exists_costs_no_second_minibatch() -> None:
    runner = RuleRunner()
    other = make_candidate({**SEED.components, NAME: "Other."})
    start = scored(runner, SEED, other)
    swap = {SEED.components[NAME]: "Other.", "Other.": SEED.components[NAME]}
    phase = FastPhase(FastConfig(), Scripted(lambda n, texts, names: {NAME: swap[texts[NAME]]}), 0)
    runner.counts.clear()
    run(phase, runner, start, iterations=2)
    assert phase.stats.duplicate == 2 and runner.counts["fast"] == 24


def test_a_child_of_this_phase_is_not_proposed_again() -> None:
    class Parity(RuleRunner):
        def rollout(self, job: RolloutJob, salt: int) -> Rollout:
            even = int(example_id(job.example), 16) % 2 == 0
            says_even = "even" in job.candidate.components[NAME]
            return rollout_of(reward=float(even == says_even))

    runner = Parity()
    start = scored(runner, *(make_candidate({NAME: text}) for text in ("even", "odd")))
    phase = FastPhase(
        FastConfig(),
        Scripted(lambda *_: {NAME: "even too"}),
        0,
        strategies=Strategies(acceptance_criterion=ImprovementOrEqualAcceptance()),
    )
    run(phase, runner, start, iterations=10)
    assert phase.stats.accepted == 1 and phase.stats.duplicate > 0


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    runner = RuleRunner()
    run(lesson_phase(), runner, scored(runner, SEED))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_no_iterations_cost_nothing() -> None:
    runner = RuleRunner()
    start = scored(runner, SEED)
    runner.runs.clear()
    assert run(lesson_phase(), runner, start, iterations=0) is start
    assert runner.runs == []


def test_a_trainset_smaller_than_the_minibatch_is_padded() -> None:
    runner = RuleRunner()
    start = scored(runner, SEED)
    population = lesson_phase().run(
        runner, start, TRAIN[:5], VAL, cycle=1, iterations=2, policy_version=0
    )
    assert len(population.candidates) >= 1
    assert ("fast", 12) in {(channel, size) for channel, _, size in runner.runs}


def test_unusable_data_is_refused_with_a_reason() -> None:
    runner = RuleRunner()
    start = scored(runner, SEED)
    phase = lesson_phase()
    with pytest.raises(DataError, match="training example"):
        phase.run(runner, start, [], VAL, cycle=1, iterations=1, policy_version=0)
    with pytest.raises(DataError, match="scored on 24"):
        phase.run(runner, start, TRAIN, VAL[:5], cycle=1, iterations=1, policy_version=0)
    demos = scored(RuleRunner(), SEED)
    bare = Population(
        (make_candidate({"solve.demos": "[]"}),), demos.val_ids, demos.score_K_V[:1], 0
    )
    with pytest.raises(ConfigError, match="instructions"):
        run(phase, runner, bare)


def test_a_fault_of_the_runner_is_raised() -> None:
    class Broken(RuleRunner):
        def run(self, jobs: Any, **settings: Any) -> list[Rollout]:
            raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        run(lesson_phase(), Broken(), scored(RuleRunner(), SEED))


def test_lessons_of_other_rollouts_are_taken_up_at_no_cost() -> None:
    runner = RuleRunner()
    start = scored(runner, SEED)
    phase = lesson_phase()
    examples = tickets(150, 3)
    slow = runner.run([RolloutJob(e, SEED, 0) for e in examples], channel="slow", salt=5)
    phase.observe(list(SEED.components), examples, slow)
    runner.counts.clear()
    population = run(phase, runner, start, iterations=1)
    assert rules_in(population.candidates[best(population)]) == 12
    assert runner.counts["fast"] == 12 + 12 + 24
    # A proposer that cannot learn that way is left alone.
    FastPhase(FastConfig(), Scripted(lambda *_: {}), 0).observe([NAME], examples, slow)


# Programs of two predictors, and what a proposer is shown


def test_round_robin_reaches_every_predictor_and_no_demos() -> None:
    class Uneven(RuleRunner):
        def rollout(self, job: RolloutJob, salt: int) -> Rollout:
            return rollout_of(reward=float(TOPICS.index(job.example.topic) % 2))

    start = choose([PAIR], [[0.0] * len(VAL)], [example_id(e) for e in VAL], 4, 0)
    proposer = Scripted(lambda *_: {})
    run(FastPhase(FastConfig(), proposer, 0), Uneven(), start, iterations=4)
    assert proposer.names == ["a.instructions", "b.instructions"] * 2
    # Short phases get round too.
    phase = FastPhase(FastConfig(), proposer, 0)
    for cycle in (1, 2, 3):
        run(phase, Uneven(), start, iterations=1, cycle=cycle)
    assert proposer.names[-3:] == ["a.instructions", "b.instructions", "a.instructions"]


@pytest.mark.parametrize("selector", ["round_robin", "worst_first"])
def test_predictors_that_are_all_at_fault_are_rewritten_together(selector: Any) -> None:
    """Nothing is right before both texts are: of one at a time, none would be accepted."""

    class Both(RuleRunner):
        def rollout(self, job: RolloutJob, salt: int) -> Rollout:
            texts = job.candidate.components
            good = all("good" in texts[f"{name}.instructions"] for name in "ab")
            return rollout_of(reward=float(good and TOPICS.index(job.example.topic) % 4 > 0))

    start = choose([PAIR], [[0.0] * len(VAL)], [example_id(e) for e in VAL], 4, 0)
    proposer = Scripted(lambda n, texts, names: {name: f"{texts[name]} good" for name in names})
    config = FastConfig(component_selector=selector)
    found = run(FastPhase(config, proposer, 0), Both(), start, iterations=2)
    assert max(sum(row) / len(row) for row in found.score_K_V) > 0.5
    assert proposer.names[:2] == ["a.instructions", "b.instructions"], "at once, and no demos"
    assert len(proposer.names) == 3, "then one by one"


def test_demos_of_an_only_predictor_take_their_turn_where_a_minibatch_scores_alike() -> None:
    class Wrong(RuleRunner):
        def rollout(self, job: RolloutJob, salt: int) -> Rollout:
            return rollout_of(PredictorTrace("solve", {"ticket": "t"}, {"queue": "?"}, "?"))

    demos = DemoProposer(100, words)
    right = PredictorTrace("solve", {"ticket": "t"}, {"queue": "jade"}, "jade")
    demos.bank([rollout_of(right, reward=1.0), replace(rollout_of(reward=0.0), example_id="-")])
    assert demos.ready("solve.demos")
    start = choose([SEED], [[0.0] * len(VAL)], [example_id(e) for e in VAL], 4, 0)
    proposer = Scripted(lambda *_: {})
    run(
        FastPhase(FastConfig(demo_tokens=60), proposer, 0, demos=demos),
        Wrong(),
        start,
        iterations=4,
    )
    assert proposer.names == [NAME] * 2, "every other turn is the demos'"


@pytest.mark.parametrize(
    ("traces", "expected"),
    [
        ((PredictorTrace("a", {}, {"x": 1}, ""), PredictorTrace("b", {}, None, "?")), "b"),
        ((PredictorTrace("a", {}, None, "?"),), "a"),
        ((PredictorTrace("a", {}, {"x": 1}, ""), PredictorTrace("b", {}, {"y": 1}, "")), "a"),
        ((), "a"),
    ],
)
def test_worst_first_picks_the_predictor_that_cannot_be_read(
    traces: tuple[PredictorTrace, ...], expected: str
) -> None:
    class Traced(RuleRunner):
        def rollout(self, job: RolloutJob, salt: int) -> Rollout:
            return rollout_of(*traces)

    start = choose([PAIR], [[0.0] * len(VAL)], [example_id(e) for e in VAL], 4, 0)
    proposer = Scripted(lambda *_: {})
    strategies = Strategies(WorstFirstComponentSelector())
    phase = FastPhase(FastConfig(), proposer, 0, strategies=strategies)
    run(phase, Traced(), start, iterations=1)
    assert proposer.names == [f"{expected}.instructions"]


def test_records_tell_what_the_predictor_saw_and_what_failed() -> None:
    good = PredictorTrace("a", {"q": "why"}, {"x": "so", "n": 3}, "raw")
    unread = PredictorTrace("a", {"q": "who"}, None, "mumble")
    failure = Failure("parse", "The answer did not state the fields x, n as asked.")
    rollouts = [
        rollout_of(good, reward=0.5),
        rollout_of(good, unread, failure=failure, feedback=failure.message),
        rollout_of(failure=Failure("timeout", "no answer within 1 s"), feedback=""),
    ]
    first, second, third = make_records(
        "a.instructions", [Trajectory(EXAMPLE, r) for r in rollouts]
    )
    assert first == {
        "Inputs": {"q": "why"},
        "Generated Outputs": {"x": "so", "n": "3"},
        "Feedback": "Feedback.",
        "score": 0.5,
        "example_id": example_id(EXAMPLE),
        "labels": {"label": "because"},
        "failure": None,
    }
    assert second["Inputs"] == {"q": "who"}
    assert second["Generated Outputs"] == "(could not be read) mumble"
    assert second["Feedback"].startswith(failure.message)
    assert second["Feedback"].count(failure.message) == 1
    assert "must state the fields x, n" in second["Feedback"]
    assert second["failure"] == "parse"
    assert third["Generated Outputs"] == "(this step was not reached)"
    assert third["Feedback"] == "no answer within 1 s"
    assert third["Inputs"] == {"q": "why"}


def test_long_texts_lose_their_middle() -> None:
    trace = PredictorTrace("a", {"q": "x" * 50_000 + "end"}, {"y": 1}, "")
    record = make_records("a.instructions", [Trajectory(EXAMPLE, rollout_of(trace))])[0]
    assert len(record["Inputs"]["q"]) < 4100
    assert record["Inputs"]["q"].endswith("end")


def test_the_adapter_gives_one_result_an_example() -> None:
    runner = RuleRunner()
    adapter = GepaAdapter(runner, Reflector(Scripted(lambda *_: {}), set()), 1)
    batch = [TRAIN[0], TRAIN[0], TRAIN[1]]
    result = adapter.evaluate(batch, SEED.components, capture_traces=True)
    assert len(result.scores) == len(result.outputs) == len(result.trajectories or []) == 3
    assert adapter.evaluate(batch, SEED.components).trajectories is None
    records = adapter.make_reflective_dataset(SEED.components, result, [NAME])
    assert len(records[NAME]) == 3


# The real runner, on a model that knows nothing


def test_a_phase_on_the_real_runner(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        ["Answer with the queue."],
        trainers.BpeTrainer(
            special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}assistant: "
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast_tokenizer),
            num_attention_heads=2,
            max_position_embeddings=4096,
            **shape,
        )
    )
    model.save_pretrained(tmp_path)
    fast_tokenizer.save_pretrained(tmp_path)

    class Route(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.solve = dspy.Predict(dspy.Signature("ticket -> queue", "Answer with the queue."))

        def forward(self, ticket: str) -> dspy.Prediction:
            return self.solve(ticket=ticket)

    def metric(gold: Any, pred: Any, trace=None, pred_name=None, pred_trace=None) -> float:
        return float(pred.queue == QUEUES[gold.topic])

    lm = LocalLM(str(tmp_path), max_tokens=4)
    runner = RolloutRunner(Route(), metric, lm, SamplingConfig(), 0)
    seed = seed_candidate(Route())
    start = choose(
        [seed],
        evaluate(runner, [seed], VAL[:4], channel="fast").score_K_V,
        [example_id(e) for e in VAL[:4]],
        4,
        0,
    )
    seen: list[Any] = []

    class Reader(Scripted):
        def propose(self, components: Any, records: Any, names: Any) -> dict[str, str]:
            seen.extend(records[names[0]])
            return {names[0]: "Answer with one word."}

    phase = FastPhase(FastConfig(minibatch_size=3), Reader(lambda *_: {}), 0)
    end = phase.run(runner, start, TRAIN, VAL[:4], cycle=1, iterations=1, policy_version=0)
    assert end.candidates[0].id == seed.id
    assert runner.counts.fast == 4 + 3 + 3 and runner.counts.total == runner.counts.fast
    assert [record["failure"] for record in seen] == ["truncated"] * 3
    assert all("could not be read" in record["Generated Outputs"] for record in seen)
    assert all("cut off after 4 tokens" in record["Feedback"] for record in seen)


def steps_of(count: int, **more: Any) -> Rollout:
    traces = [
        PredictorTrace("ab"[n % 2], {"q": f"q{n}"}, {"x": f"x{n}"} if n else None, f"t{n}")
        for n in range(count)
    ]
    return rollout_of(*traces, **more)


def test_a_record_may_show_the_whole_trajectory() -> None:
    trajectories = [Trajectory(EXAMPLE, steps_of(3)), Trajectory(EXAMPLE, rollout_of())]
    plain = make_records("b.instructions", trajectories)
    record, empty = make_records("b.instructions", trajectories, "trajectory")
    assert {k: v for k, v in record.items() if k != "Program Trajectory"} == plain[0]
    assert record["Program Trajectory"] == [
        {"Step": "1 of 3: a", "Inputs": {"q": "q0"}, "Generated Outputs": "(could not be read) t0"},
        {"Step": "2 of 3: b", "Inputs": {"q": "q1"}, "Generated Outputs": {"x": "x1"}},
        {"Step": "3 of 3: a", "Inputs": {"q": "q2"}, "Generated Outputs": {"x": "x2"}},
    ]
    assert empty["Program Trajectory"] == []


def test_a_long_trajectory_is_clipped() -> None:
    long = PredictorTrace("a", {"q": "w" * 9000}, {"x": "v" * 9000}, "")
    rollout = rollout_of(*[long] * 100)
    (record,) = make_records("a.instructions", [Trajectory(EXAMPLE, rollout)], "trajectory")
    steps = record["Program Trajectory"]
    assert [steps[0]["Step"], steps[-1]["Step"]] == ["1 of 100: a", "100 of 100: a"]
    assert len(steps) == 24 and len(str(steps)) < 60_000


def test_the_setting_decides_what_a_proposer_is_shown() -> None:
    seen: list[Mapping[str, Any]] = []

    class Looking:
        def propose(
            self,
            components: Mapping[str, str],
            records: Mapping[str, Sequence[Any]],
            names: Sequence[str],
        ) -> dict[str, str]:
            seen.extend(records[names[0]])
            return {}

    for context in ("step", "trajectory"):
        config, runner = FastConfig(reflection_context=context), RuleRunner()
        run(FastPhase(config, Looking(), 0), runner, scored(runner, SEED), iterations=1)
        assert {"Program Trajectory" in record for record in seen} == {context == "trajectory"}
        seen.clear()
    config, runner = FastConfig(reflection_context="trajectory"), RuleRunner()
    shown = FastPhase(config, LessonProposer(256, words), 0)
    start = scored(runner, SEED)
    other = RuleRunner()
    assert run(shown, runner, start) == run(lesson_phase(), other, start), "lessons do not look"
