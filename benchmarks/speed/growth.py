"""(d) How time and peak memory grow as one thing does, by 2, 4 and 8, all else being equal.

What is judged is the last doubling, from 4 to 8 times: 2 is linear growth. Smaller sizes hide in
what does not grow at all.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import dspy
import torch

from benchmarks.speed.measure import (
    Clock,
    Row,
    alternate,
    peak_memory,
    ratios,
    resident_memory,
    row_of,
)
from benchmarks.speed.models import (
    WholeAnswer,
    early_letters,
    embedded,
    program,
    questions,
    without_end,
)
from fst_dspy import FST
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.loop.progress import SilentProgress
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.slow.advantage import group_rows
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.student.candidate import example_id, seed_candidate
from fst_dspy.types import Candidate, CycleRecord, Group

LINEAR = "<= 2.2"  # a tenth of room for noise
FLAT = "<= 5"  # percent; what the allocator keeps of the threads' memory settles slowly


@dataclass(frozen=True)
class Size:
    """A slow phase: P problems of G rollouts over K candidates, T times; lengths in tokens."""

    problems: int = 2
    group: int = 4
    candidates: int = 1
    steps: int = 1
    prompt: int = 112
    completion: int = 8


GROWING: dict[str, Callable[[int], Size]] = {
    "P, problems a step": lambda n: Size(problems=2 * n),
    "G, rollouts a problem": lambda n: Size(group=4 * n),
    "K, candidates a group": lambda n: Size(problems=4, group=8, candidates=n),
    "T, steps a cycle": lambda n: Size(steps=n),
    "prompt length": lambda n: Size(prompt=112 * n),
}
POPULATION = "population, with its group"


def run(quick: bool) -> Iterator[Row]:
    """A row for time and one for memory, for each thing that grows."""
    scales = (1, 2) if quick else (1, 2, 4, 8)
    # Each in a process of its own: what another size has freed would hide what this one takes.
    spawn = multiprocessing.get_context("spawn")
    for name in (*GROWING, POPULATION):
        runs = {str(n): _phase(name, n) for n in scales}
        times = alternate(runs, 1 if quick else 3)
        seconds = ", ".join(f"{statistics.median(values):.2f}" for values in times.values())
        growth = ratios(times, str(scales[-1]), str(scales[-2]))
        yield row_of("d", f"{name}: time, last doubling", "x", growth, LINEAR, f"{seconds} s")
        with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
            before, last = pool.map(_peak, [name] * 2, scales[-2:])
        note = f"{before:.0f}, {last:.0f} MiB"
        yield row_of("d", f"{name}: peak memory, last doubling", "x", [last / before], LINEAR, note)
    yield from _run_length(1 if quick else 4)


def _phase(name: str, scale: int) -> Callable[[], None]:
    return _compile_with(2 * scale) if name == POPULATION else _slow_phase(GROWING[name](scale))


def _peak(name: str, scale: int) -> float:
    """MiB of a phase above what the process has after a smallest one."""
    torch.set_num_threads(1)
    _phase(name, 1)()
    return peak_memory(_phase(name, scale))


def _slow_phase(size: Size) -> Callable[[], None]:
    """Rollouts and optimizer steps of a slow phase."""
    lm = without_end(embedded())
    examples = questions(lm, size.problems, size.prompt)
    base = seed_candidate(program())
    candidates = [_variant(base, number) for number in range(size.candidates)]
    sampling = SamplingConfig(max_tokens=size.completion)
    with dspy.context(adapter=WholeAnswer()):
        runner = RolloutRunner(program(), early_letters, lm, sampling, 0)
    trainer = SlowTrainer(lm.policy, SlowConfig(), sampling, 1000, 0)
    jobs = [
        RolloutJob(example, candidates[index % size.candidates], index)
        for example in examples
        for index in range(size.group)
    ]

    def phase() -> None:
        for step in range(size.steps):
            rollouts = runner.run(jobs, channel="slow", salt=step)
            assert not any(rollout.failure for rollout in rollouts)
            groups_P = [
                Group(example_id(example), tuple(rollouts[p * size.group : (p + 1) * size.group]))
                for p, example in enumerate(examples)
            ]
            trainer.advance(group_rows(groups_P, "group"))

    return phase


def _variant(base: Candidate, number: int) -> Candidate:
    texts = {
        name: f"{text} Be {number} times as brief." if name.endswith("instructions") else text
        for name, text in base.components.items()
    }
    return replace(base, id=f"{base.id}-{number}", components=texts)


SMALL = {"problems_per_step": 2, "steps_per_cycle": 2, "val_size": 4, "first_cycle_iterations": 2}


def _compile_with(population: int) -> Callable[[], None]:
    """A whole compile of one cycle, with one rollout a candidate in each group."""

    def compile_once() -> None:
        _compile(None, max_cycles=1, population_size=population, group_size=population, **SMALL)

    return compile_once


def _compile(progress: SilentProgress | None, **settings: int) -> None:
    lm = without_end(embedded())
    examples = questions(lm, 32, 112)
    with TemporaryDirectory() as folder, dspy.context(lm=lm, adapter=WholeAnswer()):
        fst = FST(early_letters, log_dir=Path(folder), progress=progress, max_tokens=16, **settings)
        fst.compile(program(), trainset=examples[:24], valset=examples[24:])


class _Cycles(SilentProgress):
    """Time and resident memory at the end of each cycle."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def cycle_done(self, record: CycleRecord) -> None:
        self.seconds.append(Clock.now())
        self.memory.append(resident_memory())


def _run_length(cycles: int) -> Iterator[Row]:
    """One compile of 8 times so many cycles: its second half against the quarter before."""
    told = _Cycles()
    _compile(told, max_cycles=8 * cycles, population_size=2, group_size=4, **SMALL)
    at = {n: told.seconds[n * cycles] - told.seconds[0] for n in (1, 2, 4, 8)}
    memory = {n: told.memory[n * cycles] for n in (1, 2, 4, 8)}
    seconds = ", ".join(f"{value:.1f}" for value in at.values())
    yield row_of("d", "run length: time, last doubling", "x", [at[8] / at[4]], LINEAR,
                 f"{seconds} s for {cycles} cycles and 2, 4, 8 times as many")  # fmt: skip
    mib = ", ".join(f"{value:.0f}" for value in memory.values())
    yield row_of("d", "run length: resident memory added, last doubling", "%",
                 [100 * (memory[8] / memory[4] - 1)], FLAT, f"{mib} MiB")  # fmt: skip
