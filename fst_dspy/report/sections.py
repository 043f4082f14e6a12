"""The parts of the page that Python renders: everything but the rollouts.

Every text that comes from a run goes through ``escape``, and every number through a format that
only numbers have; there are no style attributes, so that the page's content security policy can
forbid them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from fst_dspy.display import changed_components, diff_html, readable
from fst_dspy.report import data
from fst_dspy.report.data import Run
from fst_dspy.report.faults import FORMAT, Faults, faults_by_cycle, skipped_steps
from fst_dspy.report.rollouts import Outcome
from fst_dspy.report.svg import Series, legend, line_chart

ROLLOUTS_AXIS = "rollouts, all channels"


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
        f'<div class=scroll tabindex=0 role=region aria-label="{label}"><table>{title}'
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
    first, last = run.cycles[0], run.cycles[-1]
    width = data.half_width(data.best_scores(run))
    examples = f"{len(run.config['val_ids'])} examples"
    spread = f"± {width:.3f} (95 %, {examples})" if width else f"on {examples}"
    counts = last["total_rollouts"]
    facts = [
        (
            "best validation score",
            f"{best['val_score']:.3f}",
            f"cycle {best['cycle']} of {last['cycle']}; "
            f"{spread}; chosen as the best, so a little too high",
        ),
        ("before learning", f"{first['val_score']:.3f}", "validation score of the student"),
        ("KL to the base model", f"{best['kl_to_base']:.4f}", "nats a token, at the best"),
        (
            "rollouts",
            f"{data.total(counts):,}",
            f"fast {counts['fast']:,}, slow {counts['slow']:,}, validation {counts['eval']:,}; "
            f"{counts['reused']:,} more reused, which cost nothing",
        ),
        ("optimizer steps", f"{last['step']:,}", f"{last['cycle']} cycles"),
        ("time", duration(sum(data.spent(run).values())), "fast, slow and validation"),
    ]
    if run.quadrants:
        tested = run.quadrants
        facts.insert(
            1,
            (
                "test score",
                f"{tested['trained_evolved']:.3f}",
                f"base weights, original context: {tested['base_original']:.3f}; base, evolved: "
                f"{tested['base_evolved']:.3f}; trained, original: "
                f"{tested['trained_original']:.3f} ({tested['examples']} examples)",
            ),
        )
    return facts


# --- curves -------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> str:
    """Every curve of all runs, laid over one another, and the same figures as tables."""

    def by_cycle(y: str, x: Callable[[Mapping[str, Any]], float]) -> list[Series]:
        series = []
        for colour, run in enumerate(runs):
            rows = [cycle for cycle in run.cycles if cycle[y] is not None]
            names = tuple(f"cycle {row['cycle']}: {row[y]:.4g}" for row in rows)
            points = tuple((x(row), float(row[y])) for row in rows)
            series.append(Series(run.label, points, colour, names))
        return series

    def by_step(y: Callable[[Mapping[str, Any]], float]) -> list[Series]:
        return [
            Series(run.label, tuple((float(s["step"]), y(s)) for s in run.steps), colour)
            for colour, run in enumerate(runs)
        ]

    def rollouts(cycle: Mapping[str, Any]) -> float:
        return float(data.total(cycle["total_rollouts"]))

    figures = [
        line_chart("Validation score", ROLLOUTS_AXIS, by_cycle("val_score", rollouts)),
        line_chart(
            "Validation score",
            "KL to the base model, nats a token",
            by_cycle("val_score", lambda cycle: float(cycle["kl_to_base"])),
            caption="against KL: what the score cost in drift",
        ),
        line_chart("Train reward", ROLLOUTS_AXIS, by_cycle("train_reward", rollouts)),
        line_chart("KL to the base model", ROLLOUTS_AXIS, by_cycle("kl_to_base", rollouts), low=0),
        line_chart("Entropy", ROLLOUTS_AXIS, by_cycle("entropy", rollouts), low=0),
        line_chart(
            "Train reward",
            "optimizer step",
            by_step(lambda s: s["reward"]),
            whole=True,
            caption="by step",
        ),
        line_chart(
            "Entropy",
            "optimizer step",
            by_step(lambda s: s["stats"]["entropy"]),
            low=0,
            whole=True,
            caption="by step, nats a token",
        ),
        line_chart(
            "Gradient norm",
            "optimizer step",
            by_step(lambda s: s["stats"]["grad_norm"]),
            low=0,
            whole=True,
            caption="before clipping",
        ),
    ]
    names = legend([run.label for run in runs]) if len(runs) > 1 else ""
    return f"{names}<div class=charts>{''.join(figures)}</div>" + "".join(map(_cycle_table, runs))


def _cycle_table(run: Run) -> str:
    def cell(value: float | None, digits: int = 3) -> str:
        return "—" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            str(row["cycle"]),
            str(row["step"]),
            cell(row["train_reward"]),
            cell(row["val_score"]),
            cell(row["kl_to_base"], 4),
            cell(row["entropy"]),
            percent(row["constant_group_share"]),
            f"{data.total(row['total_rollouts']):,}",
            row["best_candidate_id"],
        ]
        for row in run.cycles
    ]
    head = (
        "cycle", "step", "train reward", "validation", "KL", "entropy", "constant groups",
        "rollouts", "best candidate",
    )  # fmt: skip
    return (
        f"<details><summary>The cycles of {escape(run.label)} as a table</summary>"
        f"{table(head, rows, f'Cycles of {run.label}')}</details>{_shares(run)}"
    )


SHARES = {"prompts": "prompts alone", "both": "weights, candidates tried", "weights": "weights"}
"""Who may have had the rollouts of a cycle, as ``CycleRecord.share`` names it, in words."""


def _shares(run: Run) -> str:
    """What the rollouts brought by who had them, and what was decided on that."""
    pairs = list(zip(run.cycles, run.cycles[1:], strict=False))
    rows = []
    for share, words in SHARES.items():
        own = [(before, row) for before, row in pairs if row.get("share") == share]
        if own:
            spent = sum(data.total(row["rollouts"]) for _, row in own)
            gain = sum(row["val_score"] - before["val_score"] for before, row in own)
            moved = sum(row["kl_to_base"] - before["kl_to_base"] for before, row in own)
            rows.append([words, str(len(own)), f"{spent:,}", f"{gain:+.3f}", f"{moved:+.4f}"])
    if not rows:
        return ""
    head = ("who had the rollouts", "cycles", "rollouts", "validation", "KL")
    said = "".join(
        f"<li>cycle {int(row['cycle'])}: {escape(text)}</li>"
        for row in run.cycles
        if (text := row.get("decided"))
    )
    brought = table(head, rows, f"What the rollouts of {run.label} brought")
    return brought + (f"<ul>{said}</ul>" if said else "")


# --- candidates ---------------------------------------------------------------------------------


def lineage(run: Run) -> str:
    """The tree of candidates, each with what it changed in its parent's texts."""
    roots = data.lineage(run)
    if not roots:
        return "<p class=none>No candidate is recorded yet.</p>"
    edges: list[Series] = []

    dots: list[Series] = []

    def place(node: data.Node) -> tuple[float, float]:
        return float(node.candidate.cycle), node.scores[-1][1]

    def walk(node: data.Node, above: data.Node | None) -> None:
        if node.scores:
            if above is not None and above.scores:
                edges.append(Series("", (place(above), place(node)), faint=True))
            name = f"{node.candidate.id}: {node.scores[-1][1]:.3f}"
            dots.append(Series("candidate", (place(node),), 1 if node.best else 0, (name,)))
        for child in node.children:
            walk(child, node)

    for root in roots:
        walk(root, None)
    chart = line_chart(
        "Last mean score",
        "cycle in which it was proposed",
        edges + dots,
        whole=True,
        caption="of each candidate, joined to its parent; the best in orange",
    )
    items = "".join(map(_tree_item, roots))
    fresh = all(data.is_validated(run, row) for row in run.populations)
    reused = "" if fresh else f" {_REUSED}"
    return (
        f"<div class=charts>{chart}</div><p>A candidate that did not outlive the cycle it was "
        f"proposed in is not kept in the run folder.{reused}</p><ul class=tree>{items}</ul>"
    )


_REUSED = (
    "After a slow phase the scores are those of its own rollouts, on recent training problems, so "
    "they differ from the validation scores above."
)


def _tree_item(node: data.Node) -> str:
    candidate = node.candidate
    scores = [score for _, score in node.scores]
    change = "" if not scores else f"{scores[0]:.3f}"
    if len(scores) > 1:
        change += f" → {scores[-1]:.3f}"
    marks = "".join(
        f"<mark>{word}</mark>"
        for word, holds in (("best", node.best), ("in the population", node.alive))
        if holds
    )
    lost = [parent for parent in candidate.parent_ids if node.parent is None]
    others = [p for p in candidate.parent_ids if node.parent is not None and p != node.parent.id]
    notes = [f"from {', '.join(lost)}, which is not kept or stands elsewhere"] if lost else []
    notes += [f"merged with {', '.join(others)}"] if others else []
    note = f"<p>{escape('; '.join(notes))}</p>" if notes else ""
    history = ", ".join(f"cycle {cycle}: {score:.3f}" for cycle, score in node.scores)
    opened = " open" if node.best and node.parent is not None else ""
    children = "".join(map(_tree_item, node.children))
    return (
        f"<li><details{opened}><summary><code>{escape(candidate.id)}</code> "
        f"{escape(candidate.source)}, cycle {candidate.cycle:d} <b>{change}</b> {marks}</summary>"
        f"{note}{_texts(node)}<p><small>{escape(history)}</small></p></details>"
        f"{f'<ul>{children}</ul>' if children else ''}</li>"
    )


def _texts(node: data.Node) -> str:
    after = node.candidate.components
    if node.parent is None:
        parts = [(name, escape(readable(name, text))) for name, text in sorted(after.items())]
    else:
        changed = changed_components(node.parent.components, after)
        parts = [(name, diff_html(old, new)) for name, old, new in changed]
    return "".join(f"<h5>{escape(name)}</h5><pre>{html}</pre>" for name, html in parts)


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
    return (
        f"<p>After cycle {found.cycle:d}: {len(found.candidate_ids)} candidates (★ on the Pareto "
        f"front) on {len(found.val_ids)} {kind}, hardest first. On {shared} of them all score "
        "the same. Outlined elsewhere: none is better there.</p>"
        '<div class=scroll tabindex=0 role=region aria-label="Scores by example"><table '
        f'class=pareto><thead><tr><th scope="col">candidate</th><th scope="col">mean</th>'
        f'<th scope="col">best on</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>"
    )


# --- cost, faults, settings ---------------------------------------------------------------------


def split(run: Run) -> str:
    """Rollouts and time by channel."""
    if not run.cycles:
        return "<p class=none>Nothing measured yet.</p>"
    last = run.cycles[-1]
    counts, seconds = last["total_rollouts"], data.spent(run)
    names = {"fast": "fast", "slow": "slow", "eval": "validation"}
    rows = []
    for channel, name in names.items():
        share = counts[channel] / max(1, data.total(counts))
        time_share = seconds.get(channel, 0.0) / max(1e-9, sum(seconds.values()))
        rows.append(
            [
                Html(f'<span class=nowrap><span class="key {channel}"></span>{name}</span>'),
                f"{counts[channel]:,}",
                percent(share),
                duration(seconds.get(channel, 0.0)),
                percent(time_share),
            ]
        )
    rows.append(["reused", f"{counts['reused']:,}", "", "", ""])
    bars = _bar("Rollouts", [counts[c] for c in names]) + _bar(
        "Time", [seconds.get(c, 0.0) for c in names]
    )
    tokens = ", ".join(f"{n:,} {kind}" for kind, n in last["tokens"].items())
    return (
        f"{bars}{table(['channel', 'rollouts', 'share', 'time', 'share of time'], rows)}"
        f"<p><small>Tokens: {escape(tokens)}. Where the fast channel is on, the rollouts that "
        "validate the population count as fast, since the fast channel learns from their scores; "
        "their time is under validation.</small></p>"
    )


def _bar(label: str, amounts: Sequence[float]) -> str:
    total, x, parts = sum(amounts) or 1.0, 0.0, []
    for channel, amount in zip(data.CHANNELS, amounts, strict=True):
        width = 100 * amount / total
        parts.append(f'<rect class={channel} x="{x:.2f}" y="0" width="{width:.2f}" height="10"/>')
        x += width
    return (
        f'<p class=bar><span>{label}</span><svg viewBox="0 0 100 10" preserveAspectRatio=none '
        f'role=img aria-label="{label} by channel; the table has the figures">{"".join(parts)}'
        "</svg></p>"
    )


def faults(run: Run, found: Faults, outcomes: Sequence[Outcome], failure_score: float) -> str:
    """What went wrong, by what it means."""
    if not found.rollouts:
        return "<p class=none>No rollout is logged: the run had no slow phase yet.</p>"
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
    skipped = skipped_steps(run.steps)
    steps = ", ".join(f"{n} {escape(reason)}" for reason, n in skipped.items()) or "none"
    constant = [step["constant_group_share"] for step in run.steps]
    tokens = ", ".join(f"{name} {n:.0f}" for name, n in found.tokens.items())
    facts = (
        f"<ul><li>Optimizer steps skipped: {steps}, of {len(run.steps)}.</li>"
        f"<li>Groups with equal rewards (no gradient): "
        f"{percent(sum(constant) / max(1, len(constant)))} on average.</li>"
        f"<li>Model calls cut off at the token limit: {percent(found.cut_share)}.</li>"
        f"<li>Median completion tokens: {escape(tokens)}.</li></ul>"
    )
    by_cycle = faults_by_cycle(outcomes, failure_score)
    series = [
        Series(name, tuple((float(cycle), shares[name]) for cycle, shares in by_cycle), colour)
        for colour, name in enumerate(by_cycle[0][1])
    ]
    chart = line_chart(
        "Shares",
        "cycle",
        series,
        low=0,
        high=1,
        whole=True,
        caption="of the rollouts; of the most frequent answer, of the parsed",
    )
    return (
        f"{table(['what became of them', 'share', 'meaning'], rows)}"
        f"{legend([s.label for s in series])}<div class=charts>{chart}<div>{facts}"
        f"{table(['kind of failure', 'share', 'whose'], kinds) if kinds else ''}</div></div>"
        f"{table(['frequent answer', 'of parsed', 'examples', 'mean reward'], answers)}"
    )


def settings(runs: Sequence[Run]) -> str:
    """Settings of all runs side by side; those that differ first."""
    columns = []
    for run in runs:
        shown = {
            **{key: run.config.get(key) for key in ("arm", "seed", "model")},
            **run.config.get("settings", {}),
            "environment": run.config.get("environment", {}),
        }
        flat = data.dotted_settings(shown)
        flat["train examples"] = len(run.config.get("train_ids", ()))
        flat["validation examples"] = len(run.config.get("val_ids", ()))
        columns.append(flat)
    names = list(dict.fromkeys(name for flat in columns for name in flat))
    differ = [name for name in names if len({repr(flat.get(name)) for flat in columns}) > 1]
    same = [name for name in names if name not in differ]
    head = ["setting", *(run.label for run in runs)]

    def rows(wanted: Sequence[str]) -> list[list[str]]:
        return [[name, *(str(flat.get(name, "—")) for flat in columns)] for name in wanted]

    changed = table(head, rows(differ), "Settings that differ") if differ else ""
    alike = table(head[:2] if differ or len(runs) > 1 else head, [r[:2] for r in rows(same)])
    if len(runs) == 1:
        return alike
    return f"{changed}<details><summary>Settings that are the same</summary>{alike}</details>"


def _clip(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
