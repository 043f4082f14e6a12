"""Streams of tasks as jobs: what came of one, and those of a store that have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fst_dspy.experiments.jobs import OUTCOME, Job, write_json
from fst_dspy.experiments.runner import ExperimentStore
from fst_dspy.experiments.runs import Run
from fst_dspy.files import read_json
from fst_dspy.types import RolloutCounts

MODULE = "fst_dspy.experiments.stream_worker"


@dataclass(frozen=True)
class StreamStage:
    """One stage of a stream.

    Attributes:
        task: The task's name.
        started_from: The task whose population it began with; ``None`` for its own prompt.
        val_score: Of its best pair, on the validation examples it was chosen on.
        kl_to_base: There, to the model as it came, nats a token.
        rollouts: By channel, the search for a population included; testing is not counted.
        steps: Optimizer steps.
        seconds: Wall time without testing.
        folder: Its run folder within the job's.
        version: Version id of the weights after it.
    """

    task: str
    started_from: str | None
    val_score: float
    kl_to_base: float
    rollouts: RolloutCounts
    steps: int
    seconds: float
    folder: str
    version: str


@dataclass(frozen=True)
class StreamOutcome:
    """What came of a stream of S - 1 stages over N tasks.

    Attributes:
        tasks: Names, in the order in which they were first learned.
        stages: In order.
        score_S_N: mean@k on the test set of every task before the first stage and after each one;
            see ``StreamScores``.
        base_version: Version id of the weights that it began with.
        test_seconds: Wall time of the tests.
    """

    tasks: tuple[str, ...]
    stages: tuple[StreamStage, ...]
    score_S_N: tuple[tuple[float, ...], ...]
    base_version: str
    test_seconds: float


@dataclass(frozen=True)
class Stream:
    """A stream that has ended."""

    name: str
    job: Job
    outcome: StreamOutcome

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs of its stages."""
        return (self.job.program, *self.job.then)

    def score(self, stage: int, task: str) -> float:
        """Test score of a task after so many stages."""
        return self.outcome.score_S_N[stage][self.outcome.tasks.index(task)]

    def alone(self, task: str, runs: Sequence[Run]) -> float | None:
        """Test score of a task's single compile from the base: same arm, seed and budget.

        The first task's is the first stage, which is just that.

        Args:
            task: Its name.
            runs: The single compiles of the store that have ended.
        """
        number = [stage.task for stage in self.outcome.stages].index(task)
        if number == 0:
            return self.score(1, task)
        wanted = self.job.arm, self.job.seed, self.programs[number]
        scores = (r.test for r in runs if (r.job.arm, r.job.seed, r.job.program) == wanted)
        return next(scores, None)


def write_stream(folder: Path, outcome: StreamOutcome) -> None:
    """Write the outcome, atomically."""
    write_json(folder / OUTCOME, asdict(outcome))


def read_stream(folder: Path) -> StreamOutcome:
    """The outcome of a stream that has ended."""
    plain = read_json(folder / OUTCOME)
    return StreamOutcome(
        **{
            **plain,
            "tasks": tuple(plain["tasks"]),
            "stages": tuple(
                StreamStage(**{**row, "rollouts": RolloutCounts(**row["rollouts"])})
                for row in plain["stages"]
            ),
            "score_S_N": tuple(tuple(row) for row in plain["score_S_N"]),
        }
    )


def load_streams(store: ExperimentStore) -> list[Stream]:
    """The streams of a store that have ended, in the order of their jobs."""
    jobs = [store.job(name) for name in store.status if store.is_done(name)]
    return [Stream(job.name, job, read_stream(store.folder / job.name)) for job in jobs if job.then]
