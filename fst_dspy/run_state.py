"""The state of the joint loop between two of its parts, and its way to and from the run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save

from fst_dspy import distributed
from fst_dspy.errors import StoreError
from fst_dspy.files import read_json, write_atomically
from fst_dspy.model.policy import Policy
from fst_dspy.problems import ProblemStream
from fst_dspy.results.result import Best, FSTResult
from fst_dspy.run.records import cycle_record
from fst_dspy.run.store import RunStore, environment
from fst_dspy.slow.advantage import Scale, step_advantages
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.student.candidate import (
    candidate_from_json,
    candidate_to_json,
    population_from_json,
    population_to_json,
)
from fst_dspy.types import (
    CycleRecord,
    Group,
    Population,
    RolloutCounts,
    StepRecord,
    StepStats,
)

CHECKPOINT_SECONDS = 20.0
"""Steps are checkpointed when this long has passed; phases and cycles always are."""


@dataclass(frozen=True)
class LoopState:
    """Everything the joint loop carries from one part to the next, but for the trainer's tensors.

    Attributes:
        population: The fast weights.
        cycle: Cycles completed.
        step: Optimizer steps taken.
        phase: What comes next in the cycle under way.
        records: One record a completed cycle, the student's own first.
        steps: Records of the optimizer steps of the cycle under way.
        best: The best pair so far; ``None`` before the first validation.
        peak_V: Scores of the highest mean so far, on the V validation examples.
        counts: Rollouts so far.
        tokens: Prompt and completion tokens so far.
        seconds: Wall time so far, by channel.
        fast_state: What the fast phase remembers: plain values, and rollouts.
        stream: The problems that come next.
    """

    population: Population
    cycle: int = 0
    step: int = 0
    phase: Literal["fast", "slow", "validate"] = "fast"
    records: tuple[CycleRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    best: Best | None = None
    peak_V: tuple[float, ...] = ()
    counts: RolloutCounts = field(default_factory=RolloutCounts)
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    fast_state: Mapping[str, Any] = field(default_factory=dict)
    stream: ProblemStream = field(default_factory=ProblemStream)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the run folder.

    Attributes:
        state: The loop's state, as plain values.
        weights: Folder of the trainer's tensors.
        best: File of the best weights; ``None`` before the first validation.
    """

    state: Mapping[str, Any]
    weights: Path
    best: Path | None

    def restore(self, policy: Policy, trainer: SlowTrainer | None) -> LoopState:
        """Put weights and optimizer back, and return the loop's state.

        Raises:
            StoreError: A file is missing.
        """
        state = state_from_json(self.state)
        if state.best is not None and state.best.version != policy.version():
            if self.best is None or not self.best.exists():
                raise StoreError(f"the run folder lacks the best weights, {self.best}")
            policy.load_trainable_state(load_file(self.best))
            policy.keep()
        elif state.best is not None:
            policy.keep()
        if trainer is not None:
            trainer.load(self.weights)
        return state


class RunFolder:
    """What the joint loop writes to its run folder, and reads back to go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = RunStore(path)
        self._saved_at = time.monotonic()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Claim the folder for this run, or recognise it as this run's own."""
        count, config = distributed.processes(), self.path / "config.json"
        before = read_json(config).get("processes", 1) if config.exists() else count
        if before != count:
            raise StoreError(
                f"the run in {self.path} was begun with {before} processes, not {count}, which "
                f"round differently; go on with {before} (torchrun --nproc_per_node {before}), or "
                "choose another folder"
            )
        several = {"processes": count} if count > 1 else {}
        self.store.begin({**identity, **several, "environment": environment()})

    def close(self) -> None:
        """Let go of the folder."""
        self.store.close()

    def record_step(
        self, record: StepRecord, groups_P: Sequence[Group], scale_rewards: Scale
    ) -> None:
        """Log an optimizer step and its rollouts."""
        self.store.append("steps", [record])
        rows = []
        advantages_P_G = step_advantages(groups_P, scale_rewards)
        for group, advantages_G in zip(groups_P, advantages_P_G, strict=True):
            for rollout, advantage in zip(group.rollouts_G, advantages_G, strict=True):
                rows.append(
                    {"step": record.step, "cycle": record.cycle, "advantage": advantage}
                    | vars(rollout)
                )
        self.store.append("rollouts", rows)

    def record_cycle(self, record: CycleRecord, population: Population) -> None:
        """Log a cycle and the population it ended with."""
        self.store.append("cycles", [record])
        self.store.append("population", [{"cycle": record.cycle, **population_to_json(population)}])

    def keep_version(self, version: str, policy: Policy) -> None:
        """Keep the live weights as the best ones, and no others."""
        path = self.store.version_path(version)
        if not path.exists():
            data = save({k: v.contiguous() for k, v in policy.trainable_state().items()})
            write_atomically(path, lambda file: file.write(data))

    def is_old(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS

    def checkpoint(self, state: LoopState, trainer: SlowTrainer | None) -> None:
        """Write a checkpoint."""
        self.store.checkpoint(
            state_to_json(state), trainer.save if trainer is not None else lambda folder: None
        )
        if state.best is not None:
            self.store.keep_versions([state.best.version])
        self._saved_at = time.monotonic()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; ``None``, and no logs, when there is none."""
        found = self.store.latest()
        if found is None:
            self.store.clear_logs()
            return None
        state, weights = found
        best = self.store.version_path(state["best"]["version"]) if state["best"] else None
        return Checkpoint(state, weights, best)

    def finish(self, result: FSTResult) -> None:
        """Write the outcome."""
        self.store.write_json("result.json", result.to_dict())


def state_to_json(state: LoopState) -> dict[str, Any]:
    """The state for ``RunStore.checkpoint``: plain values, and dataclasses of such."""
    best = state.best
    return {
        **vars(state),
        "population": population_to_json(state.population),
        "best": None
        if best is None
        else {**asdict(best), "candidate": candidate_to_json(best.candidate)},
    }


def state_from_json(plain: Mapping[str, Any]) -> LoopState:
    """The inverse of ``state_to_json``."""
    best = plain["best"]
    return LoopState(
        population=population_from_json(plain["population"]),
        cycle=plain["cycle"],
        step=plain["step"],
        phase=plain["phase"],
        records=tuple(cycle_record(row) for row in plain["records"]),
        steps=tuple(
            StepRecord(**{**row, "stats": StepStats(**row["stats"])}) for row in plain["steps"]
        ),
        best=None
        if best is None
        else Best(**{**best, "candidate": candidate_from_json(best["candidate"])}),
        peak_V=tuple(plain["peak_V"]),
        counts=RolloutCounts(**plain["counts"]),
        tokens=plain["tokens"],
        seconds=plain["seconds"],
        fast_state=plain["fast_state"],
        stream=ProblemStream(**plain["stream"]),
    )
