"""The parts of the page that Python renders: everything but the rollouts.

Every text that comes from a run goes through ``escape``, and every number through a format that
only numbers have; there are no style attributes, so that the page's content security policy can
forbid them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fst_dspy.report import data
from fst_dspy.report.charts.figure import SHARE, Line, figure, legend
from fst_dspy.report.data import Run
from fst_dspy.report.faults import FORMAT, Faults, faults_by_cycle
from fst_dspy.report.intervals import interval
from fst_dspy.report.rollouts import Outcome


class Html(str):
    """HTML that was made here; any other text is escaped where it is put in."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table in a box that scrolls by itself; cells are text, or ``Html``.

    The first cell of each row is its header.
    """
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{_cell(first)}</th>'
        + "".join(f"<td>{_cell(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or ", ".join(head))
    return (
        f'<div class=scroll tabindex=0 role=group aria-label="{label}"><table>{title}'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


def percent(share: float) -> str:
    """A share as per cent, with a digit more where it is small."""
    return f"{100 * share:.{1 if 0 < share < 0.1 else 0}f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- headline -----------------------------------------------------------------------------------


def headline(runs: Sequence[Run]) -> str:
    """A card for each run with the figures one asks for first."""
    return "<div class=cards>" + "".join(map(_card, runs)) + "</div>"


def _card(run: Run) -> str:
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        f"{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in headline_facts(run)
    )
    state = "finished" if run.finished else f"not finished; last written {duration(run.age)} ago"
    about = f"{run.config.get('arm')}, seed {run.config.get('seed')}, {run.config.get('model')}"
    return (
        f"<article><h3>{escape(run.label)}</h3><p class=about>{escape(about)} · {escape(state)}"
        f"</p><dl>{facts}</dl></article>"
    )


def headline_facts(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and note of each headline figure; fewer while nothing is validated yet."""
    best = data.best_cycle(run)
    if best is None:
        return [("validation score", "—", "no validation yet")]
    last = run.cycles[-1]
    scores = data.best_scores(run)
    bounds = interval(scores) if scores else None
    examples = f"{len(run.config['val_ids'])} examples"
    spread = f"95 %: {bounds[0]:.3f} to {bounds[1]:.3f}, {examples}" if bounds else f"on {examples}"
    counts = last["total_rollouts"]
    reused = f"; {n:,} more reused, which cost nothing" if (n := counts["reused"]) else ""
    facts = [
        (
            "best validation score",
            f"{best['val_score']:.3f}",
            f"cycle {best['cycle']} of {last['cycle']}; "
            f"{spread}; chosen as the best, so a little too high",
        ),
        ("before learning", f"{data.first_score(run):.3f}", _of_the_student(run)),
        ("KL to the base model", f"{best['kl_to_base']:.4f}", "nats a token, at the best"),
        (
            "rollouts",
            f"{data.total(counts):,}",
            f"fast {counts['fast']:,}, slow {counts['slow']:,}, validation {counts['eval']:,}"
            f"{reused}",
        ),
        (
            "optimizer steps",
            f"{last['step']:,}",
            f"in {last['cycle']:,} cycle{'' if last['cycle'] == 1 else 's'}",
        ),
        ("time", duration(sum(data.spent(run).values())), "fast, slow and validation"),
    ]
    if run.quadrants:
        tested = run.quadrants
        facts.insert(
            1,
            (
                "test score",
                f"{tested['trained_evolved']:.3f}",
                f"before learning {tested['base_original']:.3f}; on {tested['examples']} examples",
            ),
        )
    return facts


def _of_the_student(run: Run) -> str:
    """What a score before learning is of, and what the cold start made of it."""
    text, warmed = "validation score of the student", run.cycles[0]["val_score"]
    if not run.cycles[0].get("cold_start"):
        return text
    return f"{text}; {warmed:.3f} after the cold start"


# --- candidates ---------------------------------------------------------------------------------


def pareto(run: Run) -> str:
    """Scores of the newest population on each example that it was scored on."""
    found = data.pareto(run)
    if found is None:
        return "<p class=none>No population is scored yet.</p>"
    scores = [score for score_V in found.score_K_V for score in score_V]
    low, high = min(scores), max(scores)
    columns = list(zip(*found.score_K_V, strict=True))
    top_V, bottom_V = [max(column) for column in columns], [min(column) for column in columns]
    heads = "".join(
        f'<th scope="col"><abbr title="example {escape(name)}">{number}</abbr></th>'
        for number, name in enumerate(found.val_ids, start=1)
    )
    rows = []
    for k, name in enumerate(found.candidate_ids):
        cells = "".join(
            f'<td class="s{round(10 * (s - low) / (high - low)) if high > low else 5}'
            f'{" top" if s == top > bottom else ""}">{f"{s:.2f}".rstrip("0").rstrip(".")}</td>'
            for s, top, bottom in zip(found.score_K_V[k], top_V, bottom_V, strict=True)
        )
        star = " ★" if name in found.front else ""
        rows.append(
            f'<tr><th scope="row"><code>{escape(name[:6])}</code>{star}</th>'
            f"<td><b>{found.mean_K[k]:.3f}</b></td><td>{found.wins_K[k]}</td>{cells}</tr>"
        )
    shared = sum(len(set(column)) == 1 for column in columns)
    kind = "validation examples" if found.validated else "recent training problems"
    on = f"on {len(found.val_ids)} {kind}, hardest first."
    if len(rows) == 1:
        about = f"After cycle {found.cycle:d}: the one candidate of the population, {on}"
    else:
        about = (
            f"After cycle {found.cycle:d}: {len(rows)} candidates (★ on the Pareto front) {on} On "
            f"{shared} of them all score the same. Outlined elsewhere: none is better there."
        )
    return (
        f"<p>{about}</p>"
        '<div class=scroll tabindex=0 role=group aria-label="Scores by example"><table '
        f'class=pareto><thead><tr><th scope="col">candidate</th><th scope="col">mean</th>'
        f'<th scope="col">best on</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>"
    )


# --- faults ---------------------------------------------------------------------


def faults(run: Run, found: Faults, outcomes: Sequence[Outcome], failure_score: float) -> str:
    """What went wrong, by what it means."""
    if not found.rollouts:
        return (
            "<p class=none>No rollout is logged: the run has had no slow phase, or was made with "
            "log_rollouts=False.</p>"
        )
    rows = [
        ["rewarded", percent(found.rewarded_share), "scored better than a failure"],
        ["wrong answer", percent(found.wrong_share), "in the right format, scored no better"],
        [
            "of which stock",
            percent(found.stock_share),
            "wrong, and one of the three most frequent answers, each given on several "
            "examples. The format is filled, no more",
        ],
        ["wrong format", percent(found.format_share), "nothing to score"],
        ["other failure", percent(found.other_share), "the program's, the metric's, a timeout"],
    ]
    kinds = [
        [
            kind,
            percent(share),
            "format" if kind in FORMAT else "other",
        ]
        for kind, share in found.by_kind.items()
    ]
    answers = [
        [
            Html(f"<q>{escape(_clip(answer.text))}</q>"),
            percent(answer.share),
            str(answer.examples),
            f"{answer.reward:.3f}",
        ]
        for answer in found.answers
    ]
    tokens = ", ".join(f"{name} {n:.0f}" for name, n in found.tokens.items())
    facts = (
        "<ul>"
        f"<li>Model calls cut off at the token limit: {percent(found.cut_share)}.</li>"
        f"<li>Median completion tokens: {escape(tokens)}.</li></ul>"
    )
    by_cycle = faults_by_cycle(outcomes, failure_score)
    lines = [
        Line(name, [(float(cycle), shares[name]) for cycle, shares in by_cycle], colour)
        for colour, name in enumerate(by_cycle[0][1])
    ]
    chart = figure(
        "Shares",
        "cycle",
        lines,
        ends=SHARE,
        whole=True,
        caption="of the rollouts; of the most frequent answer, of the parsed",
    )
    head = ["cycle", *by_cycle[0][1]]
    by_row = [[str(cycle), *map(percent, shares.values())] for cycle, shares in by_cycle]
    each = f"<details><summary>The same, cycle by cycle</summary>{table(head, by_row)}</details>"
    return (
        f"{table(['what became of them', 'share', 'meaning'], rows)}"
        f"{legend([line.label for line in lines])}<div class=charts>{chart}<div>{facts}{each}"
        f"{table(['kind of failure', 'share', 'whose'], kinds) if kinds else ''}</div></div>"
        f"{table(['frequent answer', 'of parsed', 'examples', 'mean reward'], answers)}"
    )


def _clip(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
