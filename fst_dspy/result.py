"""The outcome of a compile: what ``detailed_results`` holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fst_dspy.config import FSTConfig
from fst_dspy.types import Arm, Candidate, CycleRecord, Population, RolloutCounts

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Best:
    """The best (weights, candidate) pair on the validation examples.

    Attributes:
        version: Version id of the weights.
        candidate: The fast weights that go with them.
        score: Mean validation score of the pair.
        cycle: The cycle after which it was measured.
    """

    version: str
    candidate: Candidate
    score: float
    cycle: int


@dataclass(frozen=True)
class FSTResult:
    """What a compile did and found.

    Attributes:
        arm: ``"fst"``, ``"rl_only"`` or ``"gepa_only"``.
        seed: The seed it ran with.
        config: Every setting.
        records: One ``CycleRecord`` a cycle; the first is the student as it came.
        population: The fast weights at the end of the run.
        best: What was bound into the compiled program.
        seed_candidate: The student's own instructions and demos.
        base_version: Version id of the weights as the model was loaded.
        weights_version: Version id of the weights at the end, which need not be the best.
        log_dir: The run folder, or ``None``.
    """

    arm: Arm
    seed: int
    config: FSTConfig
    records: tuple[CycleRecord, ...]
    population: Population
    best: Best
    seed_candidate: Candidate
    base_version: str
    weights_version: str
    log_dir: str | None

    @property
    def rollouts(self) -> RolloutCounts:
        """Every rollout of the run, by channel."""
        return self.records[-1].total_rollouts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
