"""The outcome of a compile: what ``detailed_results`` holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_dspy.config import FSTConfig, without_removed
from fst_dspy.files import read_jsonl
from fst_dspy.run.records import cycle_record
from fst_dspy.student.candidate import candidate_from_json, population_from_json
from fst_dspy.types import Arm, Candidate, CycleRecord, Population, RolloutCounts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from fst_dspy.result_display import Lineage

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Best:
    """The best (weights, candidate) pair on the validation examples.

    That is the latest whose scores are not clearly worse (``population.worse_by_sign_test``) than
    those of the highest mean.

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
        arm: ``"fst"``, ``"rl_only"``, ``"gepa_only"`` or, of ``FSTDistill``, ``"fst_distill"``.
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

    def candidates(self) -> list[Candidate]:
        """The candidates that are known: the student's, the run folder's, the last population's.

        Each once; those that did not outlive their cycle are kept nowhere. Without a run folder
        the populations of earlier cycles are missing.
        """
        found = {self.seed_candidate.id: self.seed_candidate}
        if self.log_dir is not None:
            for row in read_jsonl(Path(self.log_dir) / "population.jsonl"):
                for data in row["candidates"]:
                    found.setdefault(data["id"], candidate_from_json(data))
        for candidate in (*self.population.candidates, self.best.candidate):
            found.setdefault(candidate.id, candidate)
        return list(found.values())

    def to_pandas(self) -> pd.DataFrame:
        """The cycles as a table, a row each; see ``fst_dspy.display.records_frame``."""
        from fst_dspy.display import records_frame

        return records_frame(self.records)

    def plot_score(self) -> Figure:
        """Validation score and train reward against rollouts of all channels."""
        from fst_dspy import plots

        (score,) = plots.score_curves({"validation score": self.records})
        curves = [score, plots.reward_curve(self.records)]
        return plots.draw_curves(curves, "rollouts, all channels", "mean score")

    def plot_drift(self) -> Figure:
        """Validation score against KL to the base model."""
        from fst_dspy import plots

        curves = plots.drift_curves({self.arm: self.records})
        return plots.draw_curves(curves, "KL to the base model, nats a token", "validation score")

    def plot_lineage(self) -> Figure:
        """The candidates' last scores against the cycle of birth, joined to their parents."""
        from fst_dspy import plots

        return plots.draw_lineage(plots.lineage(self.candidates(), self.records))

    def plot_rollouts(self) -> Figure:
        """Rollouts by channel, a bar a cycle."""
        from fst_dspy import plots

        cycles = [record.cycle for record in self.records]
        return plots.draw_channels(cycles, plots.channel_counts(self.records))

    def lineage(self) -> Lineage:
        """The known candidates, each with what it changed in its parent's texts."""
        from fst_dspy.result_display import Lineage

        return Lineage.of(self)

    def _repr_html_(self) -> str:
        from fst_dspy.result_display import result_html

        return result_html(self)

    def __rich__(self) -> RenderableType:
        from fst_dspy.result_display import result_rich

        return result_rich(self)


def flat_settings(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of ``FSTConfig.to_dict`` as ``FST`` takes them."""
    return {
        name: value for part in without_removed(config).values() for name, value in part.items()
    }


def _result_from_json(plain: Mapping[str, Any]) -> FSTResult:
    best = plain["best"]
    return FSTResult(
        arm=plain["arm"],
        seed=plain["seed"],
        config=FSTConfig.make(**flat_settings(plain["config"])),
        records=tuple(cycle_record(row) for row in plain["records"]),
        population=population_from_json(plain["population"]),
        best=Best(**{**best, "candidate": candidate_from_json(best["candidate"])}),
        seed_candidate=candidate_from_json(plain["seed_candidate"]),
        base_version=plain["base_version"],
        weights_version=plain["weights_version"],
        log_dir=plain["log_dir"],
    )
