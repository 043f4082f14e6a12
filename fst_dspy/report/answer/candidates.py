"""Every candidate that was tried: its parents, what it changed, why it was accepted or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fst_dspy.report import data
from fst_dspy.report.answer.prompts import changes, whole_texts
from fst_dspy.report.answer.tree import Twig, tree
from fst_dspy.report.data import Node, Run
from fst_dspy.types import Candidate

MOST_REJECTED = 500
"""Rejected candidates that are listed, the latest."""
COUNTS = (
    ("empty", "proposed nothing"),
    ("duplicate", "proposed what had been tried"),
)
"""What becomes of an iteration without a candidate, as ``cycles.jsonl`` counts it."""


@dataclass(frozen=True)
class Entry:
    """A candidate as it is listed.

    Attributes:
        candidate: Its texts and origin.
        parent: The first parent that is known.
        verdict: The latest row of ``proposals.jsonl`` about it; ``None`` where there is none.
        node: Its place in the tree, with the scores of the cycles it lived through.
        place: Where it stands on the page.
        depth: Generations above it.
    """

    candidate: Candidate
    parent: Candidate | None
    verdict: Mapping[str, Any] | None
    node: Node
    place: str
    depth: int

    @property
    def outcome(self) -> str:
        """``"accepted"``, ``"rejected"`` or, of one that was never on trial, ``"given"``."""
        if self.verdict is None:
            return "accepted" if self.candidate.parent_ids else "given"
        accepted = self.verdict["accepted"] or self.node.scores
        return "accepted" if accepted else "rejected"


def entries(run: Run, number: int) -> list[Entry]:
    """All candidates that the folder knows, each after its parent.

    Args:
        run: Whose.
        number: Of the run on the page.
    """
    verdicts = {row["id"]: row for row in run.proposals}
    found: list[Entry] = []

    def walk(node: Node, depth: int) -> None:
        own, place = node.candidate, f"cand-{number}-{len(found)}"
        found.append(Entry(own, node.parent, verdicts.get(own.id), node, place, depth))
        for child in node.children:
            walk(child, depth + 1)

    for root in data.lineage(run):
        walk(root, 0)
    order = {row["id"]: number for number, row in enumerate(run.proposals)}
    rejected = [one for one in found if one.outcome == "rejected"]
    rejected.sort(key=lambda one: order[one.candidate.id])
    dropped = {one.place for one in rejected[:-MOST_REJECTED]}
    return [one for one in found if one.place not in dropped]


def candidates(run: Run, number: int) -> str:
    """The tree of candidates, then each with its verdict and what it changed."""
    found = entries(run, number)
    if not found:
        return "<p class=none>No candidate is recorded yet.</p>"
    places = {entry.candidate.id: entry.place for entry in found}
    twigs = [_twig(entry) for entry in found]
    items = "".join(_item(entry, places) for entry in found)
    return (
        f"<p>{_summary(run, found)}</p>{tree(twigs)}"
        f"{_filter(found, number) if len(found) > 1 else ''}"
        f"<ul class=entries>{items}</ul>"
    )


def _summary(run: Run, found: Sequence[Entry]) -> str:
    """How many were proposed and what became of them; what their scores are of."""
    outcomes = [entry.outcome for entry in found]
    tried = sum(entry.verdict is not None for entry in found)
    rejected = outcomes.count("rejected")
    text = (
        f"Candidates tried: {tried:,}, of which {tried - rejected:,} were accepted and "
        f"{rejected:,} rejected. Each is run on its parent’s examples, and must do better there."
    )
    counts = run.cycles[-1].get("proposals", {}) if run.cycles else {}
    others_are = "Of the other iterations"
    if not tried and counts.get("proposals") == 0:
        text, others_are = "No candidate was tried.", "Of the iterations"
    elif not run.proposals:
        text = "Proposals that were rejected are not in this folder: it has none, or is older."
    told = [(counts.get(name), words) for name, words in COUNTS]
    others = ", ".join(f"{n:,} {words}" for n, words in told if n)
    if others:
        text += f" {others_are}, {others}."
    trained = [row["cycle"] for row in run.populations if not data.is_validated(run, row)]
    if trained:
        text += (
            f" From cycle {trained[0]} on the scores here are of the rollouts that are learned "
            "from, on recent training problems, so they differ from the validation scores."
        )
    advice = counts.get("advice")
    return text + (f"</p><p><b>What to do:</b> {escape(advice)}" if advice else "")


def _filter(found: Sequence[Entry], number: int) -> str:
    outcomes = [entry.outcome for entry in found]
    kinds = (
        ("all", "All", len(found)),
        ("accepted", "Accepted", outcomes.count("accepted")),
        ("rejected", "Rejected", outcomes.count("rejected")),
    )
    choices = "".join(
        f'<label><input type="radio" name="show-{number}" value="{value}"'
        f"{' checked' if value == 'all' else ''}> {word} ({count:,})</label>"
        for value, word, count in kinds
    )
    return f"<fieldset class=show><legend>Show candidates</legend>{choices}</fieldset>"


def _twig(entry: Entry) -> Twig:
    scores = entry.node.scores
    return Twig(
        place=entry.place,
        name=entry.candidate.id,
        cycle=entry.candidate.cycle,
        score=scores[-1][1] if scores else None,
        outcome=entry.outcome,
        alive=entry.node.alive,
        chosen=entry.node.chosen,
        depth=entry.depth,
    )


def _item(entry: Entry, places: Mapping[str, str]) -> str:
    node, candidate = entry.node, entry.candidate
    marks = "".join(
        f"<mark>{word}</mark>"
        for word, holds in (("chosen", node.chosen), ("in the population", node.alive))
        if holds
    )
    outcome = "" if entry.outcome == "given" else f" <b class={entry.outcome}>{entry.outcome}</b>"
    opened = " open" if node.chosen and entry.parent is not None else ""
    body = (
        f"<p>Against its parent {_link(entry.parent, places)}:</p>"
        + changes(entry.parent.components, candidate.components)
        if entry.parent is not None
        else whole_texts(candidate.components)
    )
    return (
        f'<li id="{entry.place}" class="{entry.outcome}"><details{opened}><summary>'
        f"<code>{escape(candidate.id)}</code>{outcome} · {escape(candidate.source)}, cycle "
        f"{candidate.cycle:d}{_short(entry)} {marks}</summary>"
        f"{_why(entry)}{_life(entry)}{_others(entry, places)}{body}</details></li>"
    )


def _short(entry: Entry) -> str:
    if entry.verdict is None or not entry.verdict["after"]:
        scores = entry.node.scores
        return f" · {scores[-1][1]:.3f}" if scores else ""
    before, after = (_mean(entry.verdict[name]) for name in ("before", "after"))
    return f" · {before} → {after}"


def _mean(scores: Sequence[float]) -> str:
    return f"{sum(scores) / len(scores):.3f}" if scores else "—"


def _why(entry: Entry) -> str:
    """The verdict, with the scores it was based on."""
    row = entry.verdict
    if row is None:
        return ""
    before, after = row["before"], row["after"]
    words = "Accepted" if row["accepted"] else "Rejected"
    told = f"{words} (iteration {row['iteration']:,}, after {row['step']:,} optimizer steps): "
    told += escape(row["reason"])
    if len(before) != len(after) or not after:
        return f"<p>{told}.</p>"
    pairs = list(zip(before, after, strict=True))
    better, worse = sum(b < a for b, a in pairs), sum(b > a for b, a in pairs)
    same = len(pairs) - better - worse
    cells = ", ".join(f"{b:.3g} → {a:.3g}" for b, a in pairs)
    return (
        f"<p>{told}. Better on {better}, worse on {worse}, the same on {same}.</p>"
        f"<details><summary>The scores, parent → candidate</summary><p>{cells}</p></details>"
    )


def _life(entry: Entry) -> str:
    scores = entry.node.scores
    if scores:
        history = ", ".join(f"cycle {cycle}: {score:.3f}" for cycle, score in scores)
        return f"<p>Mean score at the end of each cycle in the population: {history}.</p>"
    if entry.outcome == "accepted":
        return "<p>It gave way to others before the end of its cycle.</p>"
    return ""


def _others(entry: Entry, places: Mapping[str, str]) -> str:
    first = entry.parent.id if entry.parent is not None else None
    others = [name for name in entry.candidate.parent_ids if name != first]
    notes = []
    if others:
        names = ", ".join(_name(name, places) for name in others)
        notes.append(
            f"Merged with {names}."
            if first is not None
            else f"From {names}, which is not kept or stands elsewhere."
        )
    if entry.node.children:
        own = [_link(child.candidate, places) for child in entry.node.children]
        notes.append(f"Children: {', '.join(own)}.")
    return f"<p>{' '.join(notes)}</p>" if notes else ""


def _link(candidate: Candidate, places: Mapping[str, str]) -> str:
    return _name(candidate.id, places)


def _name(name: str, places: Mapping[str, str]) -> str:
    code = f"<code>{escape(name)}</code>"
    return f'<a href="#{places[name]}">{code}</a>' if name in places else code
