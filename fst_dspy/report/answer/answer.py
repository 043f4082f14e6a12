"""The answer that the page opens with: what prompts and weights brought, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fst_dspy.report import data
from fst_dspy.report.answer.cells import Cell, Cells, cells_of
from fst_dspy.report.data import Run
from fst_dspy.report.intervals import Estimate

TEST_IT = (
    "For a fair test call <code>result.quadrants(testset)</code> with examples that nothing was "
    "learned on, or run <code>fst compile</code>, which does; then make this page again."
)


def answer(runs: Sequence[Run]) -> str:
    """For each run: the score before and after, the four scores, and what they say in words."""
    return "".join(_of_run(run, several=len(runs) > 1) for run in runs)


def _of_run(run: Run, *, several: bool) -> str:
    title = f"<h3>{escape(run.label)}</h3>" if several else ""
    found = cells_of(run)
    if found is None:
        return f"<div class=answer>{title}<p class=none>Nothing is validated yet.</p></div>"
    return (
        f"<div class=answer>{title}<p class=lead>{_lead(run, found)}</p><div class=pair>"
        f"{_table(found)}<div><ul>{_findings(run, found)}</ul>{_notes(run, found)}</div></div>"
        "</div>"
    )


def _lead(run: Run, found: Cells) -> str:
    """One sentence: from what to what, and whether it may be chance."""
    before, after, way = _ends(found)
    if before is None or after is None or way is None:
        text = "nothing was learned: the best pair is the student as it came."
    else:
        went = (
            f"stayed at <b>{_score(after.mean)}</b>"
            if _score(before.mean) == _score(after.mean)
            else f"went from <b>{_score(before.mean)}</b> to <b>{_score(after.mean)}</b>"
        )
        text = (
            f"the score on {found.examples:,} {'test' if found.tested else 'validation'} examples "
            f"{went}: {_verdict(way)}."
        )
    return f"So far, {text}" if not run.finished else text[0].upper() + text[1:]


def _ends(found: Cells) -> tuple[Cell | None, Cell | None, Estimate | None]:
    last = _name("trained" if found.trained else "base", found.evolved)
    if last == "base_original":
        return found.cells.get(last), None, None
    return (
        found.cells.get("base_original"),
        found.cells.get(last),
        found.gain("base_original", last),
    )


def _name(weights: str, evolved: bool) -> str:
    return f"{weights}_{'evolved' if evolved else 'original'}"


def _verdict(way: Estimate) -> str:
    if _score(abs(way.mean)) == _score(0):
        size = "no change"
    else:
        size = f"{'a gain' if way.mean > 0 else 'a loss'} of {_score(abs(way.mean))}"
    if way.bounds is None:
        if way.how and size == "no change":
            return f"{size} on any of the examples"
        why = ": all examples changed by the same" if way.how else ""
        return f"{size} (no interval{why})"
    low, high = (round(bound, 3) for bound in way.bounds)  # as they are shown
    sure = "" if size == "no change" else "more than chance; "
    words = "may be chance; " if low <= 0 <= high and sure else sure
    return f"{size} ({words}95 % interval {_signed(low)} to {_signed(high)})"


def _findings(run: Run, found: Cells) -> str:
    """What each of the two brought, as far as it was measured."""
    lines = []
    if found.evolved:
        way = found.gain("base_original", "base_evolved")
        lines.append(
            f"<b>Prompts alone</b>, on the weights as they came: {_verdict(way)}.{_warmed(run)}"
            if way
            else "<b>Prompts alone</b>: the chosen prompt was not measured on the weights as they "
            f"came.{_opening(run)}"
        )
    else:
        lines.append("<b>Prompts</b> brought nothing: the best prompt is the student's own.")
    if found.trained:
        way = found.gain("base_original", "trained_original")
        lines.append(
            f"<b>Weights alone</b>, under the original prompt: {_verdict(way)}."
            if way
            else "<b>Weights alone</b>: the trained weights were not measured under the original "
            "prompt."
        )
        if found.evolved and (way := found.gain("base_evolved", "trained_evolved")):
            lines.append(f"<b>Weights on top</b> of the evolved prompt: {_verdict(way)}.")
    else:
        lines.append("<b>Weights</b> are as they came at the best.")
    return "".join(f"<li>{line}</li>" for line in lines)


def _warmed(run: Run) -> str:
    """What the cold start has in the prompts' gain."""
    if not run.cycles[0].get("cold_start"):
        return ""
    before, after = data.first_score(run), run.cycles[0]["val_score"]
    return (
        f" Of it the cold start alone (below) took the validation score from {_score(before)} to "
        f"{_score(after)}."
    )


def _opening(run: Run) -> str:
    """The score that prompts had reached before the weights moved, whichever prompt it was."""
    rows = [cycle for cycle in run.cycles[1:] if cycle["step"] == 0]
    if not rows:
        return ""
    return (
        f" Before the weights moved (cycle {rows[-1]['cycle']:d}) the best prompt of then had "
        f"reached {_score(rows[-1]['val_score'])} from {_score(data.first_score(run))}."
    )


def _notes(run: Run, found: Cells) -> str:
    notes = []
    if not found.tested:
        notes.append(
            "These are the validation examples on which the best pair was chosen, so its score is "
            f"a little too high. {TEST_IT}"
        )
    if not all(cell.scores for cell in found.cells.values()):
        notes.append("Where an interval is missing, the folder keeps the mean alone.")
    kinds = {cell.estimate.how for cell in found.cells.values() if cell.estimate is not None}
    gains = "Newcombe’s for pairs" if kinds == {"Wilson"} else "the bootstrap’s over examples"
    if kinds:
        own = "Wilson’s" if kinds == {"Wilson"} else "Wilson’s of 0s and 1s, else the bootstrap’s"
        notes.append(
            f"Intervals are {own}, those of gains {gains}: 95 %, over the draw of examples, not of "
            "seeds. A difference is more than chance where 0 lies outside of its interval."
        )
    notes += [
        f"Cold start: {escape(text)}"
        for cycle in run.cycles[:1]
        for text in cycle.get("cold_start", ())
    ]
    return "".join(f"<p><small>{note}</small></p>" for note in notes)


def _table(found: Cells) -> str:
    title = (
        f"Mean score on {found.examples:,} "
        f"{'test' if found.tested else 'validation'} examples, with its 95 % interval"
    )
    rows = "".join(
        f'<tr><th scope="row">{weights} weights</th>'
        + "".join(_td(found, weights, evolved) for evolved in (False, True))
        + "</tr>"
        for weights in ("base", "trained")
    )
    return (
        f'<div class=scroll tabindex=0 role=group aria-label="{escape(title)}"><table class=four>'
        f"<caption>{escape(title)}</caption><thead><tr><td></td>"
        '<th scope="col">original prompt</th><th scope="col">evolved prompt</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _td(found: Cells, weights: str, evolved: bool) -> str:
    if weights == "trained" and not found.trained:
        return "<td><small>weights are as they came</small></td>"
    if evolved and not found.evolved:
        return "<td><small>the prompt is the original</small></td>"
    cell = found.cells.get(_name(weights, evolved))
    if cell is None:
        return "<td>—<small>not measured</small></td>"
    chosen = evolved == found.evolved and (weights == "trained") == found.trained
    mark = "<mark>chosen</mark>" if chosen else ""
    estimate = cell.estimate
    if estimate is None or estimate.bounds is None:
        return f"<td><b>{_score(cell.mean)}</b>{mark}<small>no interval</small></td>"
    span = " to ".join(map(_score, estimate.bounds))
    return f"<td><b>{_score(cell.mean)}</b>{mark}<small>{span}</small>{_bar(estimate)}</td>"


def _bar(estimate: Estimate) -> str:
    """The interval on a line from 0 to 1; none for scores that have another range."""
    mean, (low, high) = estimate.mean, estimate.bounds or (math.nan, math.nan)
    if not 0 <= min(low, mean) <= max(high, mean) <= 1:
        return ""
    return (
        '<svg class=span viewBox="-2 0 104 10" aria-hidden=true>'
        '<line x1="0" x2="100" y1="5" y2="5"/><line x1="0" x2="0" y1="2" y2="8"/>'
        '<line x1="100" x2="100" y1="2" y2="8"/>'
        f'<line class=wide x1="{100 * low:.1f}" x2="{100 * high:.1f}" y1="5" y2="5"/>'
        f'<circle cx="{100 * mean:.1f}" cy="5" r="2.6"/></svg>'
    )


def _score(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
