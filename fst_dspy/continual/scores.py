"""Scores of every task at every stage of a stream, measured once each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig
from fst_dspy.display import notebook_html, score_text, table
from fst_dspy.errors import DataError
from fst_dspy.files import read_json, write_atomically
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import content_hash, example_id
from fst_dspy.student.identity import adapter_identity, metric_identity, program_identity
from fst_dspy.types import Candidate, Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import RenderableType


@dataclass(frozen=True)
class StreamScores:
    """Mean test scores of N tasks at S stages, stage 0 being the weights before any learning.

    At a stage, a task has the best candidate of the last time it was learned by then, and its
    program's own prompt before that. (The matrix of Lopez-Paz and Ranzato, 2017.)

    Attributes:
        tasks: Length N, in the order in which they were first learned.
        stages: Length S: ``"base"``, then the task that was learned.
        score_S_N: ``None`` where the weights of the stage are not at hand any more.
    """

    tasks: tuple[str, ...]
    stages: tuple[str, ...]
    score_S_N: tuple[tuple[float | None, ...], ...]

    def to_pandas(self) -> pd.DataFrame:
        """A row a stage, a column a task."""
        import pandas as pd

        return pd.DataFrame(
            self.score_S_N, index=self.labels, columns=list(self.tasks), dtype=float
        )

    @property
    def labels(self) -> list[str]:
        """The stages with their numbers: ``0 base`` and so on."""
        return [f"{number} {stage}" for number, stage in enumerate(self.stages)]

    def plot_scores(self) -> Figure:
        """The scores as shaded cells, a row a stage, a column a task."""
        from fst_dspy.results.plots import draw_stream

        return draw_stream(self.labels, self.tasks, self.score_S_N)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in ("after", *self.tasks))
        body = "".join(
            f"<tr><th>{escape(label)}</th>"
            + "".join(f"<td class=n>{score_text(score)}</td>" for score in score_N)
            + "</tr>"
            for label, score_N in zip(self.labels, self.score_S_N, strict=True)
        )
        return notebook_html(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def __rich__(self) -> RenderableType:
        rows = (
            (label, *map(score_text, score_N))
            for label, score_N in zip(self.labels, self.score_S_N, strict=True)
        )
        return table(("after", *self.tasks), rows, "Mean test scores", left=1)


class ScoreCache:
    """Test scores by weights, candidate, examples, metric and the like: none is measured twice.

    Args:
        file: Where they are kept, after each one; ``None`` keeps them in memory.

    Attributes:
        cells: ``{"score", "rollouts"}`` by content hash, ready for JSON.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.cells: dict[str, dict[str, Any]] = {}
        if file is not None and file.exists():
            self.cells = read_json(file)

    @property
    def rollouts(self) -> int:
        """Rollouts that all the cells took."""
        return sum(cell["rollouts"] for cell in self.cells.values())

    def find(
        self, task: Task, candidate: Candidate, version: str, samples: int, sampling: SamplingConfig
    ) -> float | None:
        """A cell that was measured before, or ``None``."""
        cell = self.cells.get(_key(task, candidate, version, samples, sampling))
        return cell["score"] if cell is not None else None

    def measure(
        self,
        task: Task,
        candidate: Candidate,
        version: str,
        samples: int,
        lm: LocalLM,
        sampling: SamplingConfig,
        seed: int,
    ) -> float:
        """Measure a cell and keep it: mean score of ``samples`` rollouts an example."""
        key = _key(task, candidate, version, samples, sampling)  # before a metric that counts does
        runner = RolloutRunner(task.program, task.metric, lm, sampling, seed)
        examples = test_examples(task)
        scored = evaluate(runner, [candidate], examples, samples=samples, version=version)
        score = scored.mean_K[0]
        self.cells[key] = {"score": score, "rollouts": runner.counts.total}
        if self.file is not None and distributed.is_main():
            text = json.dumps(self.cells, indent=1).encode()
            write_atomically(self.file, lambda file: file.write(text))
        return score


def test_examples(task: Task) -> list[Any]:
    """The test set or, where there is none, the validation set.

    Raises:
        DataError: There is neither.
    """
    if not (task.testset or task.valset):
        raise DataError(f"the task {task.name} has neither test nor validation examples")
    return task.testset or task.valset


def _key(
    task: Task, candidate: Candidate, version: str, samples: int, sampling: SamplingConfig
) -> str:
    """All that a score is of, by a hash: another metric or temperature gives another score."""
    ids = [example_id(example) for example in test_examples(task)]
    made_by = (
        metric_identity(task.metric),
        program_identity(task.program),
        adapter_identity(dspy.settings.adapter),
        asdict(sampling),
    )
    return content_hash([task.name, candidate.id, version, samples, ids, *made_by])
