"""Compiles of programs, metrics and models that are hard to run, by the public names alone.

What each rollout of training came to is read from the run folder.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from helpers import RawAdapter, questions, vowels

from fst_dspy import FST, LocalLM
from fst_dspy.errors import TrainingError
from fst_dspy.model.generate import generate

SETTINGS: dict[str, Any] = {
    "arm": "rl_only", "max_cycles": 1, "steps_per_cycle": 1, "group_size": 4, "max_tokens": 4,
    "problems_per_step": 2, "val_size": 2,
}  # fmt: skip


class Program(dspy.Module):
    """One predictor, and something done around its call."""

    def __init__(self, around: Callable[[Any], Any] = lambda call: call()) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")
        self.around = around

    def forward(self, question: str) -> Any:
        return self.around(lambda: self.answer(question=question))


@pytest.fixture
def compiled(tiny_qwen3: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Compiles; gives the rollouts of training."""

    def compile_it(
        program: dspy.Module, metric: Any = vowels, problems: int = 6, **settings: Any
    ) -> list[dict[str, Any]]:
        fst = FST(metric, log_dir=tmp_path / "run", **(SETTINGS | settings))
        with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
            fst.compile(program, trainset=questions(problems), valset=questions(2, problems))
        lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return compile_it


def failures(rollouts: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["failure"]["kind"] for row in rollouts if row["failure"])


def test_a_lock_that_two_may_hold_across_the_call(compiled: Any) -> None:
    places = threading.Semaphore(2)

    def held(call: Callable[[], Any]) -> Any:
        with places:
            return call()

    rollouts = compiled(Program(held), rollout_timeout=2.0)
    assert len(rollouts) == 8 and not failures(rollouts)


def test_the_work_of_other_rollouts_is_no_time_of_ones_own(compiled: Any) -> None:
    def slow(gold: Any, pred: Any, trace: Any = None) -> float:
        until = time.thread_time() + 0.04
        while time.thread_time() < until:
            pass
        return vowels(gold, pred)

    rollouts = compiled(Program(), slow, group_size=32, rollout_timeout=0.6)
    assert len(rollouts) == 64 and not failures(rollouts)


@pytest.mark.parametrize("error", [SystemExit("out"), KeyError("out")], ids=["exit", "error"])
def test_a_program_that_exits_ends_its_own_rollout_at_once(compiled: Any, error: Any) -> None:
    lock, calls = threading.Lock(), iter(range(1000))

    def sometimes(call: Callable[[], Any]) -> Any:
        with lock:
            number = next(calls)
        if number % 3 == 2:
            raise error
        return call()

    begun = time.monotonic()
    rollouts = compiled(Program(sometimes), rollout_timeout=20.0)
    assert time.monotonic() - begun < 20.0
    failed = [row["failure"] for row in rollouts if row["failure"]]
    assert failed and {one["kind"] for one in failed} == {"program"}
    assert all(one["message"].startswith(type(error).__name__) for one in failed)


def test_a_problem_that_comes_twice_in_a_step_is_not_sampled_alike(compiled: Any) -> None:
    rollouts = compiled(Program(), problems=1)
    said = [row["calls"][0]["completion_ids_T"] for row in rollouts]
    assert len(said) == 8 and len({row["example_id"] for row in rollouts}) == 1
    assert said[:4] != said[4:]


def test_an_engine_that_breaks_ends_the_run_which_is_not_finished(
    tiny_qwen3: Any, tmp_path: Path
) -> None:
    lm, batches = LocalLM(str(tiny_qwen3)), iter(range(100))

    def breaks(policy: Any, requests: Any) -> Any:
        if next(batches) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return generate(policy, requests)

    lm.policy.generator = breaks
    fst = FST(vowels, log_dir=tmp_path / "run", **(SETTINGS | {"max_cycles": 3}))
    with (
        dspy.context(lm=lm, adapter=RawAdapter()),
        pytest.raises(TrainingError, match="CUDA error"),
    ):
        fst.compile(Program(), trainset=questions(6), valset=questions(2, 6))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_cycles_tokens_are_those_of_its_own_rollouts(tiny_qwen3: Any) -> None:
    found = []
    for cycles in (1, 3):
        fst = FST(vowels, track_stats=True, **(SETTINGS | {"max_cycles": cycles}))
        with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
            compiled = fst.compile(Program(), trainset=questions(6), valset=questions(2, 6))
        found.append(list(compiled.detailed_results.records))
    short, long = found
    assert len(short) < len(long)
    for one, other in zip(short, long, strict=False):
        assert (one.tokens, one.rollouts) == (other.tokens, other.rollouts)
