"""The figure on the first page: test scores on the four families, from the tables that are there.

    python benchmarks/quality/headline.py

Reads what ``families.py`` wrote, runs nothing, and writes ``benchmarks/results/headline.png``.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from fst_dspy.results.notebook_figure import NotebookFigure

RESULTS = Path(__file__).parent.parent / "results"
FAMILIES = ("triage", "star_graph", "multihop", "list_program")
BARS = {
    "before": ("rl", "fst", "base_original", "0.75"),
    "weights alone (GRPO, tuned)": ("rl", "rl_only", "trained_evolved", "C3"),
    "prompts alone": ("others", "gepa_only", "trained_evolved", "C1"),
    "prompts, then weights": ("others", "sequential", "trained_evolved", "C4"),
    "both at once: FST": ("rl", "fst", "trained_evolved", "C0"),
}
"""By name: the store, the arm in it, the quadrant of its test, and a colour."""


def scores(family: str, store: str, arm: str, quadrant: str) -> list[float]:
    """Mean test scores of an arm, a seed each."""
    found = json.loads((RESULTS / "families" / f"{family}-{store}" / "results.json").read_text())
    runs = [run for run in found["runs"] if run["job"]["label"] == arm]
    return [run["outcome"]["test"][quadrant] for run in runs]


def draw() -> NotebookFigure:
    """Bars of means, a group a family, with a point for every seed."""
    figure = NotebookFigure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(BARS)
    for place, (name, (store, arm, quadrant, colour)) in enumerate(BARS.items()):
        for number, family in enumerate(FAMILIES):
            x = number + (place - (len(BARS) - 1) / 2) * width
            found = scores(family, store, arm, quadrant)
            label = name if number == 0 else None
            axes.bar(x, fmean(found), width * 0.92, color=colour, label=label)
            axes.plot([x] * len(found), found, "k.", markersize=3, alpha=0.7)
            axes.text(x, max(found) + 0.015, f"{fmean(found):.3f}", ha="center", fontsize=7.5)
    axes.set_xticks(range(len(FAMILIES)), FAMILIES)
    axes.set(ylim=(0, 1.1), ylabel="test score")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(BARS), frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    draw().savefig(RESULTS / "headline.png", dpi=130)
