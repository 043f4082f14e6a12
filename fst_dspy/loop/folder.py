"""What the joint loop writes to its run folder, and reads back to go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dspy
from safetensors.torch import load_file, save_file
from torch import Tensor

from fst_dspy import distributed
from fst_dspy.errors import StoreError
from fst_dspy.fast.judge import Verdict
from fst_dspy.files import reading, write_through, writing_to
from fst_dspy.loop.learner import Learner
from fst_dspy.loop.state import LoopState, state_from_json, state_to_json
from fst_dspy.model.hardware import free_memory
from fst_dspy.model.policy import Policy
from fst_dspy.plan.plan import Plan
from fst_dspy.results.result import FSTResult
from fst_dspy.run.answers import answer_rows
from fst_dspy.run.background import BackgroundWriter
from fst_dspy.run.records import with_plain_traces
from fst_dspy.run.rollout_log import pack
from fst_dspy.run.store import RunStore, environment
from fst_dspy.slow.advantage import Scale, step_advantages
from fst_dspy.slow.training_state import TrainingState
from fst_dspy.student.candidate import population_to_json
from fst_dspy.types import (
    CycleRecord,
    Group,
    Population,
    Rollout,
    StepRecord,
)

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 20.0
"""Steps and phases are checkpointed when this long has passed since the last checkpoint."""
CHECKPOINT_SHARE = 0.05
"""Of the time, that checkpoints may take: after one that took a second the next is due in 20."""
CHEAP_SECONDS = 1.0
"""A checkpoint that takes less is made after every cycle."""


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
            if state.by_text:
                learner.learn_from_text()
            learner.load(self.weights)
        return state


class RunFolder:
    """The run folder of one joint loop, locked until ``close``.

    Args:
        path: Of the folder.
        log_rollouts: Whether training rollouts are logged.
    """

    def __init__(self, path: Path, *, log_rollouts: bool = True) -> None:
        self.path, self.log_rollouts = path, log_rollouts
        self.store = RunStore(path)
        self._writer = BackgroundWriter()
        self._best: list[str] = []

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Claim the folder for this run, or recognise it as this run's own."""
        count, begun = distributed.processes(), (self.path / "config.json").exists()
        before = self.store.config().get("processes", 1) if begun else count
        if before != count:
            raise StoreError(
                f"the run in {self.path} was begun with {before} processes, not {count}, which "
                f"round differently; go on with {before} (torchrun --nproc_per_node {before}), or "
                "choose another folder"
            )
        several = {"processes": count} if count > 1 else {}
        self.store.begin({**identity, **several, "environment": environment()})

    def close(self) -> None:
        """Let go of the folder, once what was begun is written."""
        try:
            self.settle()
        except StoreError as error:
            logger.warning("the last checkpoint is not whole, the one before stands: %s", error)
        finally:
            self.store.close()

    def record_plan(self, plan: Plan) -> None:
        """Write down what the run is expected to take."""
        self.store.write_json("plan.json", plan.to_dict())

    def record_step(
        self, record: StepRecord, groups_P: Sequence[Group], scale_rewards: Scale
    ) -> None:
        """Log an optimizer step and, unless that is off, its rollouts."""
        self.store.append("steps", [record])
        if not self.log_rollouts:
            return
        advantages = [a for row in step_advantages(groups_P, scale_rewards) for a in row]
        rollouts = [with_plain_traces(r) for group in groups_P for r in group.rollouts_G]
        step = {"step": record.step, "cycle": record.cycle}
        rows = [
            {**step, "advantage": advantage, **row}
            for advantage, row in zip(advantages, pack(rollouts), strict=True)
        ]
        self.store.append("rollouts", rows)

    def record_verdicts(self, verdicts: Sequence[Verdict], step: int) -> None:
        """Log which candidates were accepted or not, and the answers of those that were."""
        if verdicts:
            rows = [{"step": step, **verdict.to_dict()} for verdict in verdicts]
            self.store.append("proposals", rows)
        for verdict in verdicts:
            self.record_answers(verdict.answers, verdict.child.cycle, step)

    def record_answers(
        self,
        rollouts: Sequence[Rollout],
        cycle: int,
        step: int,
        examples: Sequence[dspy.Example] | None = None,
    ) -> None:
        """Log the answers to the validation examples, unless that is off.

        Args:
            rollouts: One an example, or as many of each.
            cycle, step: When they were run.
            examples: In the same order, the first time, so that they are logged as well.
        """
        if self.log_rollouts and rollouts:
            when = {"cycle": cycle, "step": step}
            rows = answer_rows(rollouts, examples)
            self.store.append("answers", [{**when, **row} for row in rows])

    def record_cycle(self, record: CycleRecord, population: Population) -> None:
        """Log a cycle and the population it ended with."""
        self.store.append("cycles", [record])
        self.store.append("population", [{"cycle": record.cycle, **population_to_json(population)}])

    def is_due(self, *, closes: bool) -> bool:
        """Whether there should be another checkpoint by now.

        Args:
            closes: A cycle has just ended; such moments are saved where that takes no time.
        """
        if self._writer.busy:
            return False
        seconds = self._writer.seconds
        least = 0.0 if closes else CHECKPOINT_SECONDS
        if closes and seconds < CHEAP_SECONDS:
            return True
        return time.monotonic() - self._writer.ended_at >= max(least, seconds / CHECKPOINT_SHARE)

    def checkpoint(self, state: LoopState, learner: Learner | None, policy: Policy) -> None:
        """Begin to write a checkpoint, with the best weights, which the policy keeps.

        The run goes on meanwhile where there is memory for a copy of the trainer's tensors; else it
        waits. Errors of the writing are raised at the next checkpoint, or by ``settle``.
        """
        self.settle()
        begun = time.monotonic()
        finish = self.store.prepared(state_to_json(state))
        training = learner.state() if learner is not None else None
        if training is not None and 2 * training.bytes < free_memory():
            training = training.copied()
        best = self._best_weights(state, policy)
        self._writer.start(partial(self._write, finish, training, *best), begun)
        if training is not None and training.live:
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint that was begun is written.

        Raises:
            StoreError: It could not be.
        """
        self._writer.wait()

    def _best_weights(
        self, state: LoopState, policy: Policy
    ) -> tuple[str | None, Mapping[str, Tensor] | None]:
        """The best version, and its weights where they must be written."""
        if state.best is None:
            return None, None
        version = state.best.version
        # The base is read from where it came.
        there = version == policy.base_version or self.store.version_path(version).exists()
        return version, None if there else policy.kept_state(version)

    def _write(
        self,
        finish: Callable[[Callable[[Path], None]], None],
        training: TrainingState | None,
        best: str | None,
        weights: Mapping[str, Tensor] | None,
    ) -> None:
        if best is not None and weights is not None:
            whole = {name: tensor.contiguous() for name, tensor in weights.items()}
            with writing_to(self.path):
                write_through(
                    self.store.version_path(best), lambda temporary: save_file(whole, temporary)
                )
        finish(training.write if training is not None else lambda folder: None)
        if best is not None:
            # Those of the checkpoint before as well, should this one be found damaged.
            self.store.keep_versions([*self._best, best])
            self._best = [best]

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
