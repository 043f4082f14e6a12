"""The four scores that tell prompts and weights apart, as far as a run folder has them.

Test scores come from ``quadrants.json``. Without it, the validation scores of the run give some of
the cells: the student as it came always, the chosen pair always, the other two where the population
was validated with the texts and weights in question. A cell that was not measured stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fst_dspy.report import data
from fst_dspy.report.data import Run
from fst_dspy.report.intervals import Estimate, gain_of, mean_of

CELLS = ("base_original", "base_evolved", "trained_original", "trained_evolved")


@dataclass(frozen=True)
class Cell:
    """A score under one pair of weights and prompt.

    Attributes:
        mean: Over the examples.
        scores: By example, in an order that the cells of an answer share; empty where only the mean
            is known.
    """

    mean: float
    scores: tuple[float, ...] = ()

    @property
    def estimate(self) -> Estimate | None:
        """The mean with its interval; ``None`` without the examples' scores."""
        return mean_of(self.scores) if self.scores else None


@dataclass(frozen=True)
class Cells:
    """What is known of the four.

    Attributes:
        tested: Whether the examples are of a test set; else they are the validation examples, on
            which the best pair was chosen.
        examples: How many.
        trained: Whether the chosen weights are others than those the run began with.
        evolved: Whether the chosen prompt is another than the student's own.
        cells: By name, of ``CELLS``; a name that is not there was not measured.
        cycle: The cycle of the chosen pair.
    """

    tested: bool
    examples: int
    trained: bool
    evolved: bool
    cells: Mapping[str, Cell]
    cycle: int

    def gain(self, before: str, after: str) -> Estimate | None:
        """What the way from one cell to another brought, over the same examples."""
        one, other = self.cells.get(before), self.cells.get(after)
        if one is None or other is None:
            return None
        if one.scores and other.scores:
            return gain_of(one.scores, other.scores)
        return Estimate(other.mean - one.mean, None, None, self.examples, "")


def cells_of(run: Run) -> Cells | None:
    """The four scores of a run; ``None`` before its first validation."""
    best = data.best_cycle(run)
    if best is None:
        return None
    trained = best["weights_version"] != run.cycles[0]["weights_version"]
    evolved = data.chosen_id(run) != data.seed_id(run)
    names = [
        name
        for name in CELLS
        if (trained or name.startswith("base")) and (evolved or name.endswith("original"))
    ]
    if run.quadrants:
        kept = run.quadrants.get("scores", {})
        cells = {name: Cell(run.quadrants[name], tuple(kept.get(name, ()))) for name in names}
        return Cells(True, run.quadrants["examples"], trained, evolved, cells, best["cycle"])
    found = {name: _validated(run, best, name, own=name == names[-1]) for name in names}
    cells = {name: cell for name, cell in found.items() if cell is not None}
    examples = len(run.config["val_ids"])
    return Cells(False, examples, trained, evolved, cells, best["cycle"])


def _validated(run: Run, best: Mapping[str, Any], name: str, *, own: bool) -> Cell | None:
    """A cell that validations of the run give; ``own`` for that of the chosen pair."""
    candidate = data.chosen_id(run) if name.endswith("evolved") else data.seed_id(run)
    first = name == "base_original"  # as the student came, before a cold start changed anything
    weights = run.cycles[0] if name.startswith("base") else best
    scores = data.scores_of(run, candidate, weights, best["cycle"], asked_first=first)
    recorded = run.cycles[0]["val_score"] if first else best["val_score"] if own else None
    if scores and (first or recorded is None or data.is_mean(recorded, scores)):
        return Cell(sum(scores) / len(scores), scores)
    return None if recorded is None else Cell(recorded)
