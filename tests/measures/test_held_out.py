"""Measures on models whose every token is a throw of one loaded coin, so that all is known."""

import math
from dataclasses import replace

import dspy
import pytest
import torch
from bundles import SETTINGS
from helpers import Echo, RawAdapter, questions, vowels

import fst_dspy
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ConfigError, DataError, ModelError, StoreError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.measures import (
    forgetting,
    held_out_drift,
    ideal_candidate,
    mean_at_k,
    quadrants,
    scores_by_example,
)
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import bind, make_candidate, seed_candidate
from fst_dspy.types import Task

ONE_TOKEN = SamplingConfig(max_tokens=1)


class Shouter(Echo):
    """An Echo that answers in capitals where its instruction says so."""

    def forward(self, question):
        answer = self.say(question=question).answer
        shout = "Shout" in self.say.signature.instructions
        return dspy.Prediction(answer=answer.upper() if shout else answer)


SHOUT = make_candidate({"say.instructions": "Shout."})


def table(**score_by_answer):
    """A metric that looks the answer's first letter up."""

    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return score_by_answer[pred.answer[:1]]

    return metric


def task(name, metric, ideal="Shout.", count=3):
    program, test = Shouter(), questions(count)
    return Task(name, program, metric, [], [], test, {"say": ideal} if ideal else {})


@torch.no_grad()
def load_coin(policy, chance):
    """Make the model write "a" with a chance and "z" else, whatever came before; a new version."""
    weights = dict(policy.model.named_parameters())
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        elif "embed" in name or "norm" in name:
            weight.fill_(1)
    head = policy.model.get_output_embeddings().weight
    head.fill_(-60 / head.shape[1])
    for letter, share in (("a", chance), ("z", 1 - chance)):
        token = policy.tokenizer.convert_tokens_to_ids(letter)
        head[token] = math.log(max(share, 1e-12)) / head.shape[1]
    return policy.keep()


@pytest.fixture(scope="module")
def coin(tiny_llama, tmp_path_factory):
    """Folder of a model that writes "a" and "z" with equal chances."""
    folder = tmp_path_factory.mktemp("models") / "coin"
    policy = Policy.load(tiny_llama, device="cpu")
    load_coin(policy, 0.5)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def raw_adapter():
    with dspy.context(adapter=RawAdapter()):
        yield


@pytest.fixture
def lm(coin):
    return LocalLM(str(coin), device="cpu", cache=False)


def runner_of(lm, metric=vowels, sampling=ONE_TOKEN):
    return RolloutRunner(Shouter(), metric, lm, sampling, seed=0)


def test_drift_is_exact(lm):
    policy = lm.policy
    nine = load_coin(policy, 0.9)
    live = load_coin(policy, 0.6)
    runner = runner_of(lm, sampling=SamplingConfig(max_tokens=3))
    seed = seed_candidate(Shouter())
    for version, p in ((nine, 0.9), (None, 0.6), (policy.base_version, 0.5)):
        found = held_out_drift(runner, seed, questions(5), version=version, samples=2)
        sides = (p, 1 - p)
        assert found.tokens == 5 * 2 * 3
        kl = sum(side * math.log(side / 0.5) for side in sides)
        assert found.kl_to_base == pytest.approx(kl, abs=1e-6)
        entropy = -sum(side * math.log(side) for side in sides)
        assert found.entropy == pytest.approx(entropy, abs=1e-6)
        assert policy.version() == live
    assert runner.counts.eval == runner.counts.total == 30


def test_drift_needs_something_to_measure_on(lm):
    runner, seed = runner_of(lm), seed_candidate(Shouter())
    for examples, samples in (([], 1), (questions(1), 0)):
        with pytest.raises(DataError, match="at least one held-out example"):
            held_out_drift(runner, seed, examples, samples=samples)


def test_quadrants(lm):
    base, trained = load_coin(lm.policy, 1), load_coin(lm.policy, 0)
    runner = runner_of(lm, table(a=0.1, A=0.2, z=0.3, Z=0.4))
    seed = seed_candidate(Shouter())
    found = quadrants(runner, seed, SHOUT, questions(3), base_version=base, trained_version=trained)
    assert found.base_original == pytest.approx(0.1)
    assert found.base_evolved == pytest.approx(0.2)
    assert found.trained_original == pytest.approx(0.3)
    assert found.trained_evolved == pytest.approx(0.4)
    assert found.examples == 3


@pytest.mark.parametrize(
    ("testset", "message"),
    [
        ([dspy.Example(question="number 1")], r"testset\[0\] does not say which fields are inputs"),
        ([{"question": "number 1"}], r"testset\[0\] is a dict"),
        (iter([]), "the testset is empty"),
    ],
    ids=["without inputs", "a dict", "nothing"],
)
def test_quadrants_of_what_cannot_be_run_are_refused_before_any_rollout(lm, testset, message):
    runner, seed, base = runner_of(lm), seed_candidate(Shouter()), lm.policy.base_version
    with pytest.raises(DataError, match=message):
        quadrants(runner, seed, SHOUT, testset, base_version=base, trained_version=base)
    assert runner.counts.total == 0


def test_quadrants_go_through_an_iterator_once(lm):
    runner, seed = runner_of(lm, table(a=0, A=1, z=0, Z=1)), seed_candidate(Shouter())
    base = lm.policy.base_version
    found = quadrants(
        runner, seed, SHOUT, iter(questions(2)), base_version=base, trained_version=base
    )
    assert (found.examples, found.trained_evolved) == (2, 1)


def test_mean_at_4_of_a_loaded_coin(lm):
    load_coin(lm.policy, 0.8)
    scored = evaluate(
        runner_of(lm, table(a=1, z=0)), [seed_candidate(Shouter())], questions(100), samples=4
    )
    found = mean_at_k([scores_by_example(scored.rollouts_K[0])])
    assert (found.k, found.examples) == (4, 100)
    assert found.mean == pytest.approx(scored.mean_K[0])
    assert found.se_examples == pytest.approx(math.sqrt(0.8 * 0.2 / 400), rel=0.25)
    assert abs(found.mean - 0.8) < 4 * found.se_examples


def test_forgetting_under_ideal_instructions(lm):
    before, after = lm.at(load_coin(lm.policy, 1)), lm.at(load_coin(lm.policy, 0))
    lost, gained = forgetting(
        [task("lost", table(A=1, Z=0.25)), task("gained", table(A=0.5, Z=1), count=2)],
        before,
        after,
        sampling=ONE_TOKEN,
    )
    assert (lost.task, gained.task) == ("lost", "gained")
    assert (lost.before.mean, lost.after.mean) == (1, 0.25)
    assert (lost.before.k, lost.before.examples, gained.after.examples) == (4, 3, 2)
    assert (lost.change.low, lost.change.mean, lost.change.high) == (-0.75, -0.75, -0.75)
    assert gained.change.mean == 0.5


def test_weights_that_are_the_same_forget_nothing(lm):
    """Both sides throw the same coin with the same random numbers."""
    (found,) = forgetting([task("t", table(A=1, Z=0), count=8)], lm, lm, sampling=ONE_TOKEN)
    assert 0 < found.before.mean < 1
    assert found.before == found.after
    assert (found.change.low, found.change.high) == (0, 0)


def test_a_test_set_may_hold_an_example_twice(lm):
    twice = task("t", table(A=1, Z=0))
    twice = replace(twice, testset=[*twice.testset, twice.testset[0]])
    (found,) = forgetting([twice], lm.at(load_coin(lm.policy, 1)), lm, sampling=ONE_TOKEN)
    assert (found.before.mean, found.before.examples, found.change.n) == (1, 3, 4)
    assert found.change.mean == pytest.approx(found.after.mean - found.before.mean)


def test_forgetting_measures_the_weights_and_not_those_of_the_program(lm, coin):
    bound = task("t", table(A=1, Z=0))
    bound.program.say.lm = LocalLM(str(coin), device="cpu")
    before, after = lm.at(load_coin(lm.policy, 1)), lm.at(load_coin(lm.policy, 0))
    (found,) = forgetting([bound], before, after, sampling=ONE_TOKEN)
    assert (found.before.mean, found.after.mean) == (1, 0)
    assert bound.program.say.lm is not None


def test_forgetting_from_bundles(lm, coin, tmp_path):
    for name, version in (("base", lm.version), ("trained", load_coin(lm.policy, 0))):
        program = bind(Shouter(), SHOUT)
        program.say.lm = lm.at(version)
        fst_dspy.save(program, tmp_path / name)
    options = {"sampling": ONE_TOKEN, "base": coin}
    tasks = [task("t", table(A=1, Z=0), count=6)]
    (found,) = forgetting(tasks, tmp_path / "base", str(tmp_path / "trained"), **options)
    (live,) = forgetting(tasks, lm.at(lm.version), lm.at(lm.policy.version()), **options)
    assert found == live
    assert found.before.mean > found.after.mean == 0
    with pytest.raises(StoreError):
        forgetting(tasks, tmp_path / "base", tmp_path / "nothing", **options)


@pytest.mark.slow
def test_forgetting_from_a_run_folder(tiny_qwen3, tmp_path):
    lm = LocalLM(str(tiny_qwen3), max_tokens=8, cache=False)
    base = lm.policy.base_version
    optimizer = fst_dspy.FST(vowels, log_dir=tmp_path / "run", **SETTINGS)
    with dspy.context(lm=lm, adapter=RawAdapter()):
        compiled = optimizer.compile(Echo(), trainset=questions(6), valset=questions(4, 6))
    best = compiled.say.lm.version
    assert best != base  # or else this would say nothing
    other = Task("t", Echo(), vowels, [], [], questions(6, 20), {"say": "Write early letters."})
    options = {"sampling": SamplingConfig(max_tokens=8), "base": tiny_qwen3}
    (stored,) = forgetting([other], lm.at(base), tmp_path / "run", **options)
    (live,) = forgetting([other], lm.at(base), lm.at(best), **options)
    assert stored == live
    with pytest.raises(ModelError, match="base="):
        forgetting([other], lm, tmp_path / "run", sampling=SamplingConfig(max_tokens=8))


def test_forgetting_refuses_before_any_work(lm):
    with pytest.raises(DataError, match="states no ideal_instructions"):
        forgetting([task("t", vowels, ideal="")], lm, lm)
    with pytest.raises(DataError, match="no test set"):
        forgetting([task("t", vowels, count=0)], lm, lm)
    with pytest.raises(DataError, match="samples"):
        forgetting([task("t", vowels)], lm, lm, samples=0)
    stray = replace(task("t", vowels), ideal_instructions={"solve": "Shout."})
    with pytest.raises(ConfigError, match=r"\['solve'\].*\['say'\]"):
        forgetting([stray], lm, lm)


def test_ideal_candidate_keeps_the_programs_demos():
    found = ideal_candidate(task("t", vowels))
    assert found.components == {"say.instructions": "Shout."}
