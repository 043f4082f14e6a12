"""Validation examples before and after: those that still fail, and those that got worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fst_dspy.report import data
from fst_dspy.report.data import Run
from fst_dspy.report.rollouts import fields_text
from fst_dspy.report.schema import LARGEST

SHOWN = 100
"""Examples of each kind, the worst first."""
PEEK = 90
"""Characters of an input in a line."""


@dataclass(frozen=True)
class Pair:
    """An example with its answer before learning and its answer at the best.

    Attributes:
        before, after: Rows of ``answers.jsonl``; the first has the example in it.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def gain(self) -> float:
        """Of the reward."""
        return float(self.after["reward"] - self.before["reward"])


def pairs(run: Run) -> list[Pair]:
    """The validation examples that were answered both by the student as it came and at the best."""
    best, chosen = data.best_cycle(run), data.chosen_id(run)
    if best is None:
        return []
    first = {row["example_id"]: row for row in run.answers if "inputs" in row}
    steps = data.steps_of(run, best)
    last = {
        row["example_id"]: row
        for row in run.answers
        if row["candidate_id"] == chosen and row["step"] in steps and row["cycle"] <= best["cycle"]
    }
    return [Pair(row, last[name]) for name, row in first.items() if name in last]


def examples(run: Run) -> str:
    """What still fails and what got worse, with the answers, and how many of each."""
    found = pairs(run)
    if not found:
        return (
            "<p class=none>No answers to validation examples are kept: the run is of an earlier "
            "version, was made with log_rollouts=False, or has not validated anything yet.</p>"
        )
    perfect = perfect_score(run)
    failing = [pair for pair in found if pair.after["reward"] < perfect]
    worse = sorted((pair for pair in found if pair.gain < 0), key=lambda pair: pair.gain)
    better = sum(pair.gain > 0 for pair in found)
    failing.sort(key=lambda pair: (pair.after["reward"], pair.gain))
    best = data.best_cycle(run)
    if best is not None and best["cycle"] == 0:
        return (
            f"<p>The best is the student as it came; on {len(failing)} of {len(found)} validation "
            f"examples it scores less than {perfect:g}. Where two answers to one differ, sampling "
            "or the cold start has changed it.</p>"
            f"{_list('Failing', failing)}"
        )
    return (
        f"<p>Of {len(found)} validation examples, {better} got better, {len(worse)} got worse and "
        f"{len(found) - better - len(worse)} scored the same; {len(failing)} score less than "
        f"{perfect:g}. Each is told by one answer before learning and one at the best, both "
        "sampled, so a single one may be chance.</p>"
        f"{_list('Still failing', failing)}{_list('Got worse', worse)}"
    )


def perfect_score(run: Run) -> float:
    """What the settings call a perfect score, or the highest that was given, where it is higher.

    1 where they do not say.
    """
    score = run.config.get("settings", {}).get("fast", {}).get("perfect_score", 1.0)
    known = type(score) in (int, float) and abs(score) <= LARGEST
    return max([float(score) if known else 1.0, *(row["reward"] for row in run.answers)])


def _list(title: str, found: Sequence[Pair]) -> str:
    if not found:
        return f"<h3>{title}: none</h3>"
    more = f"<p>The worst {SHOWN} are shown.</p>" if len(found) > SHOWN else ""
    items = "".join(f"<li>{_item(pair)}</li>" for pair in found[:SHOWN])
    return f"<h3>{title}: {len(found)}</h3>{more}<ul class=entries>{items}</ul>"


def _item(pair: Pair) -> str:
    before, after = pair.before, pair.after
    return (
        f"<details><summary><b>{before['reward']:.3g} → {after['reward']:.3g}</b> "
        f"{escape(_peek(before['inputs']))}</summary>"
        f"<h4 class=part>input</h4><pre>{escape(fields_text(before['inputs']))}</pre>"
        f"{_labels(before)}<div class=two>{_answer('before', before)}{_answer('after', after)}"
        "</div></details>"
    )


def _labels(row: Mapping[str, Any]) -> str:
    if not row.get("labels"):
        return ""
    return f"<h4 class=part>labels</h4><pre>{escape(fields_text(row['labels']))}</pre>"


def _answer(when: str, row: Mapping[str, Any]) -> str:
    """An answer with its reward and feedback; the text where nothing could be read from it."""
    if row["outputs"] is not None:
        text = fields_text(row["outputs"])
    else:
        text = row["text"] or "(no answer)"
    failure = f" · {escape(row['failure'])}" if row["failure"] else ""
    unread = " (could not be read)" if row["outputs"] is None and row["text"] else ""
    return (
        f"<div><h4 class=part>answer {when}{unread}: {row['reward']:.3g}{failure}</h4>"
        f"<pre>{escape(text)}</pre><h4 class=part>feedback {when}</h4>"
        f"<pre>{escape(row['feedback'])}</pre></div>"
    )


def _peek(inputs: Mapping[str, str]) -> str:
    line = " ".join(" ".join(inputs.values()).split())
    return (line if len(line) <= PEEK else line[: PEEK - 1] + "…") or "(no input)"
