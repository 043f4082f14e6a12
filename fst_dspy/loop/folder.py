"""What the joint loop writes to its run folder, and reads back to go on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from fst_dspy import distributed
from fst_dspy.errors import StoreError
from fst_dspy.files import read_json, reading, write_atomically, writing_to
from fst_dspy.loop.learner import Learner
from fst_dspy.loop.state import LoopState, state_from_json, state_to_json
from fst_dspy.model.policy import Policy
from fst_dspy.results.result import FSTResult
from fst_dspy.run.records import with_plain_traces
from fst_dspy.run.store import RunStore, environment
from fst_dspy.slow.advantage import Scale, step_advantages
from fst_dspy.student.candidate import (
    population_to_json,
)
from fst_dspy.types import (
    CycleRecord,
    Group,
    Population,
    StepRecord,
)

CHECKPOINT_SECONDS = 20.0
"""Steps are checkpointed when this long has passed; phases and cycles always are."""


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

    def restore(self, policy: Policy, learner: Learner | None) -> LoopState:
        """Put weights and optimizer back, and return the loop's state.

        Raises:
            StoreError: A file is missing.
        """
        state = state_from_json(self.state)
        if state.best is not None and state.best.version != policy.version():
            if self.best is None or not self.best.exists():
                raise StoreError(f"the run folder lacks the best weights, {self.best}")
            with reading(self.best):
                policy.load_trainable_state(load_file(self.best))
            if policy.keep() != state.best.version:
                raise StoreError(f"{self.best} does not hold the weights {state.best.version}")
        elif state.best is not None:
            policy.keep()
        if learner is not None:
            learner.load(self.weights)
        return state


class RunFolder:
    """The run folder of one joint loop, locked until ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = RunStore(path)
        self._saved_at = time.monotonic()
        self._best: list[str] = []

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
                    | vars(with_plain_traces(rollout))
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
            with writing_to(self.path):
                write_atomically(path, lambda file: file.write(data))

    def is_old(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS

    def checkpoint(self, state: LoopState, learner: Learner | None) -> None:
        """Write a checkpoint."""
        self.store.checkpoint(
            state_to_json(state), learner.save if learner is not None else lambda folder: None
        )
        if state.best is not None:
            # Those of the checkpoint before as well, should this one be found damaged.
            self.store.keep_versions([*self._best, state.best.version])
            self._best = [state.best.version]
        self._saved_at = time.monotonic()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; ``None``, and no logs, when there is none."""
        found = self.store.latest()
        if found is None:
            self.store.clear_logs()
            return None
        state, weights = found
        best = self.store.version_path(state["best"]["version"]) if state["best"] else None
        self._best = [state["best"]["version"]] if state["best"] else []
        return Checkpoint(state, weights, best)

    def finish(self, result: FSTResult) -> None:
        """Write the outcome."""
        self.store.write_json("result.json", result.to_dict())
