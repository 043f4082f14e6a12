"""Which calls share a batch: those of all live rollouts, but never at the price of waiting."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from dspy import lm15
from helpers import Echo, RawAdapter, questions, vowels, wait_for

import fst_dspy.lm.requests as requests_module
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import TrainingError
from fst_dspy.lm.engine import LocalEngine
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.rollouts.scheduler import RolloutEnded, Scheduler, Slot
from fst_dspy.slow.advantage import group_rows
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.types import Group


@pytest.fixture
def policy(tiny_lfm2: Path) -> Policy:
    return Policy.load(tiny_lfm2)


@pytest.fixture
def lm(tiny_qwen3: Path) -> LocalLM:
    return LocalLM(str(tiny_qwen3))


def ask(policy: Policy, text: str, **config: Any) -> lm15.Request:
    return lm15.Request(
        model=policy.live_id,
        messages=(lm15.Message.user(text),),
        config=lm15.Config(**{"max_tokens": 12, **config}),
    )


# --- the scheduler alone --------------------------------------------------------------------------

Ask = Callable[..., str]


class Rollouts:
    """Some programs over one scheduler, each in its thread, as the runner has them."""

    def __init__(self, policy: Policy, programs: list[Callable[[Ask], None]]) -> None:
        self.policy, self.programs = policy, programs
        self.slots = [Slot((i,), seed=100 + i) for i in range(len(programs))]
        self.scheduler = Scheduler(policy, self.slots)
        self.errors: list[BaseException | None] = [None] * len(programs)

    def ask(self, place: int, version: str | None = None) -> Ask:
        def call(text: str, **config: Any) -> str:
            request = ask(self.policy, text, **config)
            weights = version or self.policy.live_id
            slot = self.slots[place]
            return self.scheduler.complete(slot, "solve", request, weights)[0].text or ""

        return call

    def run(self, jitter: random.Random | None = None) -> Rollouts:
        def work(place: int) -> None:
            self.slots[place].thread = threading.get_native_id()
            try:
                if jitter is not None:
                    time.sleep(jitter.random() * 0.02)
                self.programs[place](self.ask(place))
            except BaseException as error:
                self.errors[place] = error
            finally:
                self.scheduler.leave(self.slots[place])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(self.programs))]
        random.Random(len(threads)).shuffle(threads)
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while any(thread.is_alive() for thread in threads):
            assert time.monotonic() < deadline, "they wait for each other"
            time.sleep(0.01)
            self.scheduler.poll()
        return self


def steps(count: int, jitter: random.Random) -> Callable[[Ask], None]:
    def program(call: Ask) -> None:
        text = "start"
        for _ in range(count):
            text = call(f"say more: {text!r}")
            time.sleep(jitter.random() * 0.005)

    return program


def test_the_same_calls_however_threads_run(policy: Policy) -> None:
    counts = [1, 3, 2, 3, 1, 2]
    runs = []
    for repeat in range(3):
        jitter = random.Random(repeat)
        rollouts = Rollouts(policy, [steps(n, jitter) for n in counts]).run(jitter)
        assert rollouts.errors == [None] * len(counts)
        # One batch a round: nobody generates before all live rollouts wait for the model.
        assert rollouts.scheduler.batches == max(counts) and rollouts.scheduler.early == 0
        assert [len(slot.calls) for slot in rollouts.slots] == counts
        runs.append([slot.calls for slot in rollouts.slots])
    assert runs[0] == runs[1] == runs[2]
    first = [calls[0] for calls in runs[0]]
    assert len({call.completion_ids_T for call in first}) == len(first)  # own seeds
    assert {call.predictor for call in first} == {"solve"}


def test_a_bad_call_or_a_crash_fails_only_its_own_rollout(policy: Policy) -> None:
    def too_long(call: Ask) -> None:
        call("x" * 2000)

    def crash(call: Ask) -> None:
        call("hi")
        raise ZeroDivisionError

    programs = [steps(2, random.Random(0)), too_long, crash, lambda call: None]
    rollouts = Rollouts(policy, programs).run()
    assert [type(e).__name__ for e in rollouts.errors] == [
        "NoneType", "ContextLengthError", "ZeroDivisionError", "NoneType",
    ]  # fmt: skip
    assert [len(slot.calls) for slot in rollouts.slots] == [2, 0, 1, 0]
    assert rollouts.scheduler.batches == 2


def test_a_rollout_given_up_frees_the_others_and_its_own_blocked_call(policy: Policy) -> None:
    rollouts = Rollouts(policy, [steps(1, random.Random(0))] * 3)
    scheduler, slots = rollouts.scheduler, rollouts.slots
    outcomes: dict[int, Any] = {}

    def call(place: int) -> None:
        try:
            outcomes[place] = rollouts.ask(place)("hi")
        except BaseException as error:
            outcomes[place] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(scheduler._blocked) == 2)
    assert scheduler.batches == 0 and not outcomes  # slot 2 has not called yet
    scheduler.leave(slots[1])
    threads[1].join(timeout=30)
    assert isinstance(outcomes[1], RolloutEnded) and 0 not in outcomes
    scheduler.leave(slots[2])
    scheduler.leave(slots[2])
    threads[0].join(timeout=30)
    assert isinstance(outcomes[0], str) and len(slots[0].calls) == 1 and not slots[1].calls
    call(1)
    assert isinstance(outcomes[1], RolloutEnded)


def test_calls_at_once_are_one_batch_in_an_order_of_their_own(policy: Policy) -> None:
    texts = ("one", "two", "two", "three")

    def program(call: Ask) -> None:
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(call, texts))

    runs = []
    for _ in range(3):
        rollouts = Rollouts(policy, [program] * 3).run()
        assert rollouts.errors == [None] * 3
        assert rollouts.scheduler.batches == 1 and rollouts.scheduler.early == 0
        runs.append([slot.calls for slot in rollouts.slots])
    assert runs[0] == runs[1] == runs[2]
    # The same prompt asked twice by one rollout is sampled twice.
    assert all(len({c.completion_ids_T for c in calls}) == 4 for calls in runs[0])


def test_the_weights_are_the_schedulers_and_a_shared_seed_is_mixed_in(policy: Policy) -> None:
    base = LocalEngine(policy).complete(ask(policy, "hi", temperature=0)).text
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.5)
    rollouts = Rollouts(policy, [])
    rollouts.slots = [Slot((0,), seed=0)]
    rollouts.scheduler = Scheduler(policy, rollouts.slots)
    assert rollouts.ask(0, policy.base_version)("hi", temperature=0) == base
    seeded = Rollouts(policy, [lambda call: [call("hi", seed=7)]] * 2).run().slots
    assert seeded[0].calls[0].completion_ids_T != seeded[1].calls[0].completion_ids_T


def test_a_rollout_that_waits_for_a_tool_is_not_waited_for(policy: Policy) -> None:
    released = threading.Event()

    def slow(call: Ask) -> None:
        assert released.wait(30), "the others waited"
        call("late")

    def quick(call: Ask) -> None:
        call("first")
        call("second")
        released.set()

    rollouts = Rollouts(policy, [slow, quick]).run()
    assert rollouts.errors == [None, None]
    assert rollouts.scheduler.early == 2


def test_one_that_computes_is_waited_for(policy: Policy) -> None:
    def busy(call: Ask) -> None:
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass
        call("hi")

    rollouts = Rollouts(policy, [busy, lambda call: [call("hi")]]).run()
    assert rollouts.scheduler.early == 0 and rollouts.scheduler.batches == 1


def test_one_that_computes_is_waited_for_though_another_sleeps(policy: Policy) -> None:
    lock, held = threading.Lock(), threading.Event()

    def busy(call: Ask) -> None:
        with lock:
            held.set()
            end = time.thread_time() + 0.3
            while time.thread_time() < end:
                pass
        call("hi")

    def sleeps(call: Ask) -> None:
        assert held.wait(30)
        with lock:
            pass
        call("hi")

    rollouts = Rollouts(policy, [busy, sleeps, lambda call: [call("hi")]]).run()
    assert rollouts.scheduler.early == 0 and rollouts.scheduler.batches == 1


def test_tools_that_come_back_all_the_time_hold_nobody_up(policy: Policy) -> None:
    took = []

    def agent(place: int) -> Callable[[Ask], None]:
        def program(call: Ask) -> None:
            time.sleep(0.015 * place)
            for _ in range(9):
                time.sleep(0.3)
                end = time.thread_time() + 0.002
                while time.thread_time() < end:
                    pass

        return program

    def caller(call: Ask) -> None:
        time.sleep(0.5)
        began = time.monotonic()
        call("hi")
        took.append(time.monotonic() - began)

    rollouts = Rollouts(policy, [caller, *map(agent, range(20))]).run()
    assert rollouts.errors == [None] * 21
    assert took[0] < 1.6  # the agents go on for 2.7


# --- in rollouts ----------------------------------------------------------------------------------


def run(
    lm: LocalLM,
    program: dspy.Module,
    metric: Any = vowels,
    count: int = 4,
    repeats: int = 1,
    **sampling: Any,
) -> tuple[list[Any], RolloutRunner]:
    candidate = seed_candidate(program)
    jobs = [RolloutJob(q, candidate, i) for q in questions(count) for i in range(repeats)]
    config = SamplingConfig(**{"max_tokens": 4, "rollout_timeout": 20.0, **sampling})
    with dspy.context(adapter=RawAdapter(), lm=lm):
        runner = RolloutRunner(program, metric, lm, config, 0)
        return runner.run(jobs, channel="slow", salt=0), runner


def kinds(rollouts: list[Any]) -> set[Any]:
    found = {r.failure.kind if r.failure else None for r in rollouts}
    return found - {"parse", "empty", "truncated"}


def test_a_semaphore_held_across_the_call(lm: LocalLM) -> None:
    places = threading.Semaphore(2)

    class Two(Echo):
        def forward(self, question: str) -> Any:
            with places:
                return super().forward(question)

    rollouts, runner = run(lm, Two(), count=6)
    assert kinds(rollouts) == {None} and all(r.calls for r in rollouts)
    assert runner.early_batches > 0


def test_a_pool_of_four_that_the_calls_run_in(lm: LocalLM) -> None:
    pool = ThreadPoolExecutor(max_workers=4)

    class Pooled(Echo):
        def forward(self, question: str) -> Any:
            return pool.submit(self.say, question=question).result()

    rollouts, _ = run(lm, Pooled(), count=12)
    pool.shutdown()
    assert kinds(rollouts) == {None}
    assert all([c.predictor for c in r.calls] == ["say"] for r in rollouts)


def test_asyncify_in_128_rollouts(lm: LocalLM) -> None:
    class Later(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.say = dspy.Predict(dspy.Signature("question -> answer", "Say something."))

        async def aforward(self, question: str) -> Any:
            return await dspy.asyncify(self.say)(question=question)

    rollouts, _ = run(lm, Later(), count=16, repeats=8)
    assert kinds(rollouts) == {None} and all(len(r.calls) == 1 for r in rollouts)


def test_waiting_for_other_rollouts_metrics_is_no_timeout(lm: LocalLM) -> None:
    def slow(gold: Any, pred: Any, trace: Any = None) -> float:
        end = time.thread_time() + 0.08
        while time.thread_time() < end:
            pass
        return 1.0

    rollouts, _ = run(lm, Echo(), slow, count=64, rollout_timeout=2.0)
    assert kinds(rollouts) == {None}


def test_a_loop_that_never_ends_is_one_beside_others(lm: LocalLM) -> None:
    release = threading.Event()

    class Loop(Echo):
        def forward(self, question: str) -> Any:
            while question.endswith("1") and not release.is_set():
                pass
            return super().forward(question)

    rollouts, _ = run(lm, Loop(), count=4, rollout_timeout=1.0)
    release.set()
    assert [r.failure.kind for r in rollouts if r.failure and r.failure.kind == "timeout"]
    assert rollouts[1].failure.kind == "timeout" and kinds(rollouts) <= {"timeout", None}


@pytest.mark.parametrize("where", ["program", "metric"])
@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError("stop"), GeneratorExit()])
def test_what_is_no_exception_ends_its_rollout_at_once(
    lm: LocalLM, where: str, error: BaseException
) -> None:
    class Exits(Echo):
        def forward(self, question: str) -> Any:
            if where == "program" and question.endswith("1"):
                raise error
            return super().forward(question)

    def metric(gold: Any, pred: Any, trace: Any = None) -> float:
        if where == "metric" and gold.question.endswith("1"):
            raise error
        return 1.0

    started = time.monotonic()
    rollouts, _ = run(lm, Exits(), metric, rollout_timeout=60.0)
    assert time.monotonic() - started < 30
    assert rollouts[1].failure.kind == where
    assert type(error).__name__ in rollouts[1].failure.message
    assert all(r.failure is None or r.failure.kind != where for r in rollouts[2:])


def test_ctrl_c_in_a_rollout_stops_the_run(lm: LocalLM) -> None:
    def metric(gold: Any, pred: Any, trace: Any = None) -> float:
        if gold.question.endswith("2"):
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(lm, Echo(), metric)


def test_an_engine_that_fails_stops_the_run(lm: LocalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = requests_module.generate, []

    def broken(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(*args)

    class Stubborn(Echo):
        """Takes no exception for an answer."""

        def forward(self, question: str) -> Any:
            for _ in range(5):
                try:
                    answer = super().forward(question)
                except Exception:
                    answer = dspy.Prediction(answer="")
            return answer

    monkeypatch.setattr(requests_module, "generate", broken)
    with pytest.raises(TrainingError, match="illegal memory access") as caught:
        run(lm, Stubborn())
    assert isinstance(caught.value.__cause__, RuntimeError) and len(calls) == 3


def test_a_prompt_that_is_too_long_is_data(lm: LocalLM) -> None:
    class Long(Echo):
        def forward(self, question: str) -> Any:
            return super().forward(question * (1000 if question.endswith("1") else 1))

    rollouts, _ = run(lm, Long())
    assert rollouts[1].failure.kind == "too_long" and rollouts[0].calls


@pytest.mark.parametrize("error", [TimeoutError("the pool is full"), ConnectionResetError()])
def test_a_rollout_lost_to_the_infrastructure_is_not_trained_on(
    lm: LocalLM, error: Exception
) -> None:
    class Flaky(Echo):
        def forward(self, question: str) -> Any:
            answer = super().forward(question)
            if question.endswith("1"):
                raise RuntimeError("no answer from the store") from error
            return answer

    rollouts, _ = run(lm, Flaky(), count=2, repeats=2)
    assert [r.is_lost for r in rollouts] == [False, False, True, True]
    assert rollouts[2].failure.kind == "infrastructure" and rollouts[2].calls
    rows = group_rows([Group("p", tuple(rollouts))], "group")
    kept = [call.completion_ids_T for r in rollouts[:2] for call in r.calls]
    assert [row.completion_ids_T for row in rows] == [ids for ids in kept if ids]


def test_a_problem_that_comes_twice_in_a_step_is_sampled_twice(lm: LocalLM) -> None:
    with dspy.context(adapter=RawAdapter(), lm=lm):
        runner = RolloutRunner(Echo(), vowels, lm, SamplingConfig(max_tokens=8), 0)
    candidate = seed_candidate(runner.program)
    once = [RolloutJob(questions(1)[0], candidate, i) for i in range(3)]
    alone = runner.run(once, channel="slow", salt=0)
    twice = runner.run([*once, *once], channel="slow", salt=0)
    first, second = ([r.calls[0].completion_ids_T for r in part] for part in (twice[:3], twice[3:]))
    assert first == [r.calls[0].completion_ids_T for r in alone]
    assert not set(first) & set(second)


class Ticking:
    """Holds the interpreter now and then, as a progress bar does."""

    def __enter__(self) -> None:
        self.over = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self.over.wait(0.001):
            sum(range(20_000))

    def __exit__(self, *_: Any) -> None:
        self.over.set()


def test_a_program_that_only_calls_never_sees_an_early_batch(lm: LocalLM) -> None:
    class Thinks(Echo):
        def forward(self, question: str) -> Any:
            for _ in range(3):
                sum(range(100_000))
                answer = super().forward(question)
            return answer

    with Ticking():
        runs = [run(lm, Thinks(), count=16, repeats=2) for _ in range(2)]
    assert [runner.early_batches for _, runner in runs] == [0, 0]
    assert runs[0][0] == runs[1][0]
