"""The evolved prompt against the original, of every predictor."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from fst_dspy.report import data
from fst_dspy.report.answer.diffs import diff_of, shown_text, text_block
from fst_dspy.report.data import Run

KEY = (
    "<p><small>A line with − was taken out, one with + put in; the words that differ are "
    "<del>struck</del> and <ins>underlined</ins>.</small></p>"
)


def prompt(run: Run) -> str:
    """The chosen candidate's texts as a diff against the student's own."""
    known, seed, chosen = data.candidates(run), data.seed_id(run), data.chosen_id(run)
    if seed is None or chosen not in known:
        return "<p class=none>No prompt is chosen yet, or the folder does not say the original.</p>"
    if chosen == seed:
        whole = whole_texts(known[seed].components)
        return f"<p>The best prompt is the student’s own; nothing was changed.</p>{whole}"
    return KEY + changes(known[seed].components, known[chosen].components)


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Each text that differs, as a diff; those that stayed, and the new ones whole, are folded."""
    parts, same = [], []
    for name in sorted({*before, *after}):
        old, new = (shown_text(name, texts.get(name, "")) for texts in (before, after))
        if before.get(name) == after.get(name):
            same.append(name)
            continue
        whole = f"<details><summary>The new text, whole</summary>{text_block(new)}</details>"
        parts.append(f"<h3 class=part>{escape(name)}</h3>{diff_of(old, new)}{whole}")
    kept = ", ".join(f"<code>{escape(name)}</code>" for name in same)
    note = f"<p><small>As they were: {kept}</small></p>" if same else ""
    return "".join(parts) + note


def whole_texts(components: Mapping[str, str]) -> str:
    """A candidate's texts as they stand."""
    return "".join(
        f"<h3 class=part>{escape(name)}</h3>{text_block(shown_text(name, text))}"
        for name, text in sorted(components.items())
    )
