"""Datasets of reasoning-gym as tasks: loading, formatting, scoring, and a run on a tiny model."""

from __future__ import annotations

import inspect
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import dspy
import numpy as np
import pytest
from helpers import RawAdapter
from places import ROOT
from reasoning_gym.factory import DATASETS
from typer.testing import CliRunner

from fst_dspy import FST, LocalLM
from fst_dspy.cli import app
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.fast.proposers.stated import unmarked_sentences
from fst_dspy.rollouts.checks import check_metric
from fst_dspy.tasks import load_task
from fst_dspy.types import Task
from programs import gym

pytestmark = pytest.mark.slow

SAMPLE = (
    # The paper's tasks, then some of every category.
    *("codeio", "gsm_symbolic", "path_star"),
    *("complex_arithmetic", "simple_equations", "simple_integration"),
    *("ab", "base_conversion", "cryptarithm", "graph_color", "group_anagrams", "jugs"),
    *("letter_counting", "palindrome_generation", "spiral_matrix", "word_sorting"),
    *("arc_1d", "basic_arithmetic", "chain_sum", "gcd", "prime_factorization"),
    *("bf", "needle_haystack", "number_sequence", "rectangle_count"),
    *("countdown", "emoji_mystery", "n_queens", "sudoku", "tower_of_hanoi"),
    *("simple_geometry", "family_relationships", "quantum_lock", "shortest_path"),
    *("acre", "list_functions", "knights_knaves", "propositional_logic", "syllogism"),
    *("coin_flip", "isomorphic_strings", "time_intervals"),
)
NEAR = 0.25
"""What verifiers give at most for an answer of the wrong kind; most give nothing."""
OWN_TEXT = {"basic_arithmetic", "bitwise_arithmetic", "number_sorting"}
"""Datasets that evaluate text of their own making, never an answer."""


def load(dataset: str, seed: int = 0, **config: object) -> Task:
    sizes = {"train": 5, "val": 3, "test": 2}
    return gym.load(seed, dataset, trust_answers=True, **{**sizes, **config})


def all_of(task: Task) -> list[dspy.Example]:
    return [*task.trainset, *task.valset, *task.testset]


@pytest.mark.parametrize("dataset", SAMPLE)
def test_the_verifier_takes_the_right_answer_and_no_other(dataset: str) -> None:
    task = load(dataset)
    check_metric(task.metric)
    assert task.name == f"gym-{dataset}"
    assert [len(task.trainset), len(task.valset), len(task.testset)] == [5, 3, 2]
    assert len({example.problem for example in all_of(task)}) == 10
    for gold in all_of(task):
        assert list(gold.inputs().keys()) == ["problem"] and len(gold.problem) > 10
        right = task.metric(
            gold, dspy.Prediction(answer=f" {gold.answer}\n"), None, "predict", None
        )
        assert right.score == 1.0 and right.feedback.startswith("Right: the answer was `")
        wrong = task.metric(gold, dspy.Prediction(answer="xyzzy"))
        assert wrong.score <= NEAR
        assert "xyzzy" in wrong.feedback
        assert gold.answer.replace("\n", "\\n") in wrong.feedback and "\n" not in wrong.feedback
        for nothing in (
            dspy.Prediction(answer=" "),
            dspy.Prediction(answer=None),
            dspy.Prediction(),
        ):
            none = task.metric(gold, nothing)
            assert none.score == 0.0 and "there was no answer" in none.feedback


def test_reasoning_may_be_left_out() -> None:
    fields = {
        reasoning: list(load("gcd", reasoning=reasoning).program.predictors()[0].signature.fields)
        for reasoning in (True, False)
    }
    assert fields == {True: ["problem", "reasoning", "answer"], False: ["problem", "answer"]}


def test_most_wrong_answers_get_nothing() -> None:
    task = load("codeio")
    for gold in all_of(task):
        assert task.metric(gold, dspy.Prediction(answer="xyzzy")).score == 0.0


def test_seeds_share_no_problems_and_repeat() -> None:
    one, again, other = load("gsm_symbolic"), load("gsm_symbolic"), load("gsm_symbolic", seed=1)
    assert [e.toDict() for e in all_of(one)] == [e.toDict() for e in all_of(again)]
    assert not {e.problem for e in all_of(one)} & {e.problem for e in all_of(other)}
    # This one draws from Python's global generator.
    drawn = [[e.problem for e in all_of(load("list_functions"))] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_problems_are_the_same_in_another_process() -> None:
    code = (
        "from programs import gym\n"
        "for name in ('codeio', 'gsm_symbolic'):\n"
        "    for e in gym.load(0, name, train=5, val=3, test=2).trainset: print(repr(e.problem))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [e.problem for name in ("codeio", "gsm_symbolic") for e in load(name).trainset]
    assert done.stdout.splitlines() == [repr(problem) for problem in here]


def test_loading_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    next_draws = set()
    # Files and prints of snippets; Python's own generator; NumPy's; neither.
    for dataset, train in (("codeio", 150), ("list_functions", 5), ("pool_matrix", 5), ("gcd", 5)):
        random.seed(3)
        np.random.seed(3)
        load(dataset, train=train)
        next_draws.add((random.random(), np.random.random()))
    assert len(next_draws) == 1
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_feedback_tells_how_the_answer_is_found() -> None:
    task = load("gsm_symbolic")
    feedback = task.metric(task.trainset[0], dspy.Prediction(answer="-1")).feedback
    assert f"is `{task.trainset[0].answer}`. The way to the right answer: " in feedback


def test_feedback_of_grids_holds_no_sentence_to_learn_by_heart() -> None:
    task = load("sudoku")
    wrong = task.metric(task.trainset[0], dspy.Prediction(answer="1 2 3 4\n5 6 7 8"))
    assert unmarked_sentences(wrong.feedback) == []


def test_an_answer_the_verifier_trips_over_is_wrong() -> None:
    task = load("prime_factorization")
    wrong = task.metric(task.trainset[0], dspy.Prediction(answer="two × two"))
    assert wrong.score == 0.0 and "It could not be read (ValueError" in wrong.feedback


def test_settings_of_the_dataset_are_passed_on() -> None:
    task = load_task("gym:dataset=chain_sum,min_terms=6,max_terms=6,train=4,val=2,test=2")
    assert all(len(re.findall(r"[+-] \d", e.problem)) == 5 for e in all_of(task))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "code_io"}, "has no dataset 'code_io'; did you mean 'codeio'"),
        ({"dataset": "poetry"}, "it has: ab, acre"),
        ({"dataset": "gcd", "min_number": 3}, "no setting 'min_number'; it has: max_num"),
        ({"dataset": "gcd", "size": 3}, "use train="),
        ({"dataset": "gcd", "min_numbers": 9}, "cannot make gcd .*AssertionError"),
        ({"dataset": "composite"}, "Must specify at least one dataset"),
        ({"dataset": "game_of_life_halting"}, "full marks to any answer"),
        ({"dataset": "countdown", "trust_answers": False}, "runs the model's answers as Python"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gym.load(0, **{"train": 3, "val": 2, "test": 2, "trust_answers": True, **arguments})


def test_too_few_different_problems_are_refused() -> None:
    with pytest.raises(DataError, match=r"gave 6 different problems in 350 draws, 35 are wanted"):
        load("tower_of_hanoi", train=30, max_disks=3, max_pegs=3)
    with pytest.raises(DataError, match="fewer than 0"):
        load("gcd", train=-1)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    result = CliRunner().invoke(app, ["compile", "gym:dataset=gcd"])
    assert result.exit_code == 1 and "fst-dspy[gym]" in result.output


def test_a_package_that_a_dataset_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bfi", None)
    monkeypatch.setattr(sys.modules[DATASETS["bf"][0].__module__], "bfi", None)

    def needs(self: object, index: int) -> dict:
        import bfi  # noqa: F401

        return {}

    monkeypatch.setattr(DATASETS["bf"][0], "__getitem__", needs)
    with pytest.raises(ConfigError, match=r"bf of reasoning-gym needs a package: .*bfi"):
        load("bf")


def test_every_verifier_that_runs_answers_is_listed() -> None:
    evaluates = re.compile(r"(?<![\w.])(?:eval|exec)\(|(?<!def )(?<![\w])(?:parse_expr|sympify)\(")
    found = set()
    for name, (kind, _) in DATASETS.items():
        source = inspect.getsource(sys.modules[kind.__module__])
        imported = "sympy" in source or "eval(" in source
        if imported and evaluates.search(source):
            found.add(name)
    assert found - OWN_TEXT - {"codeio"} <= gym.EVALUATING
    assert gym.EVALUATING - {"composite"} <= found


def test_a_tiny_random_model_compiles_on_a_dataset(tiny_qwen3: Path) -> None:
    task = load("gcd", train=8, val=4)
    fst = FST(
        task.metric,
        max_cycles=1,
        steps_per_cycle=2,
        group_size=4,
        population_size=2,
        problems_per_step=4,
        first_cycle_iterations=1,
        minibatch_size=2,
        max_tokens=16,
        learning_rate=1e-2,
        track_stats=True,
    )
    with dspy.context(adapter=RawAdapter(), lm=LocalLM(str(tiny_qwen3))):
        compiled = fst.compile(task.program, trainset=task.trainset, valset=task.valset)
    last = compiled.detailed_results.records[-1]
    assert last.total_rollouts.slow == 2 * 4 * 4
    assert last.train_reward is not None and 0 < last.train_reward < 1
    assert last.step == 2 and last.kl_to_base > 0
