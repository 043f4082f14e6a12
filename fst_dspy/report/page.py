"""The page itself: one HTML file with its style, script and data inside, that asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from fst_dspy.errors import StoreError
from fst_dspy.files import write_atomically
from fst_dspy.report import data, sections
from fst_dspy.report.answer.answer import answer
from fst_dspy.report.answer.candidates import candidates
from fst_dspy.report.answer.examples import examples
from fst_dspy.report.answer.prompts import prompt
from fst_dspy.report.charts.agents import acted, agents
from fst_dspy.report.charts.compare import compare, settings
from fst_dspy.report.charts.cost import cost
from fst_dspy.report.charts.curves import curves
from fst_dspy.report.charts.figure import legend
from fst_dspy.report.charts.health import health
from fst_dspy.report.data import Run, read_runs
from fst_dspy.report.failures import failures
from fst_dspy.report.faults import find_faults
from fst_dspy.report.prompts import find_decoder
from fst_dspy.report.rollouts import Rollouts, read_rollouts

STYLES = ("charts/uPlot.min.css", "page.css", "charts/charts.css", "answer/answer.css")
SCRIPTS = ("charts/uPlot.iife.min.js", "charts/charts.js", "page.js", "answer/answer.js")
EXPLAINED = (("prompt", "Prompt"), ("lineage", "Candidates"), ("examples", "Examples"))
DETAILS = (
    ("pareto", "Scores by example"),
    ("failures", "Failures"),
    ("faults", "Faults"),
    ("cost", "Cost"),
)
"""Sections of a run and what they are called in the list of sections."""


def write_report(
    folders: Sequence[Path], out: Path, *, model: str | None = None, refresh: float | None = None
) -> list[Run]:
    """Write the page about some run folders; returns the runs it shows.

    Args:
        folders: One or more run folders, finished or not.
        out: The HTML file; it is replaced whole, so that a browser never sees half of it.
        model: Where the tokenizer of the runs' model is, for their prompts. The embedded model's
            is found without it.
        refresh: Seconds after which a browser loads the page again, while a run is not finished.

    Raises:
        StoreError: Not a run folder, or a damaged one, or ``out`` cannot be written.
        ModelError: ``model`` has no tokenizer on this machine.
    """
    runs = read_runs(folders)
    decoders = [find_decoder(str(run.config.get("model", "")), model) for run in runs]
    rollouts = [
        read_rollouts(run.folder, decode) for run, decode in zip(runs, decoders, strict=True)
    ]
    going_on = not all(run.finished for run in runs)
    page = render(runs, rollouts, refresh if going_on else None)
    # Half of a surrogate pair, which a byte-level model can write, has no form in UTF-8.
    try:
        write_atomically(out, lambda file: file.write(page.encode("utf-8", "replace")))
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error}; give another --out") from error
    return runs


def follow(
    folders: Sequence[Path],
    out: Path,
    every: float,
    *,
    model: str | None = None,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Write the page again and again until every run has finished."""
    while not all(run.finished for run in write_report(folders, out, model=model, refresh=every)):
        sleep(every)


def render(runs: Sequence[Run], rollouts: Sequence[Rollouts], refresh: float | None = None) -> str:
    """The page's HTML.

    Args:
        runs: At least one.
        rollouts: Theirs, in the same order.
        refresh: Seconds after which a browser loads the page again; ``None`` for never.
    """
    style = "\n".join(map(_asset, STYLES))
    script = "\n".join((_licence(), *map(_asset, SCRIPTS)))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    again = f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else ""
    several, explained = len(runs) > 1, ""
    packed, parts = [], []
    for number, (run, logged) in enumerate(zip(runs, rollouts, strict=True)):
        failure_score = data.failure_score(run)
        found = find_faults(logged.outcomes, failure_score)
        columns = {**logged.packed["columns"], "stock": [int(s) for s in found.stock]}
        packed.append({"label": run.label, **logged.packed, "columns": columns})
        own = (
            ("prompt", "The evolved prompt", prompt(run)),
            ("lineage", "Candidates", candidates(run, number)),
            ("examples", "Examples before and after", examples(run)),
        )
        more = (
            ("pareto", "Scores by example", sections.pareto(run)),
            ("failures", "Failures", failures(run)),
            ("faults", "Faults", sections.faults(run, found, logged.outcomes, failure_score)),
            ("cost", "Cost", cost(run)),
        )
        # Of one run, what explains the answer follows it; several are compared first.
        if several:
            parts.append(_run_part(number, run, (*own, *more), several=True))
        else:
            explained = _run_part(number, run, own, several=False)
            parts.append(_run_part(number, run, more, several=False))
    outcomes = [own.outcomes for own in rollouts]
    names = legend([run.label for run in runs]) if several else ""
    acts = any(map(acted, runs))
    title = ", ".join(run.label for run in runs)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    links = (
        ("answer", "Answer"),
        *((f"{name}-0", word) for name, word in EXPLAINED if not several),
        *((("compare", "Differences"),) if several else ()),
        ("summary", "Summary"),
        ("curves", "Curves"),
        ("health", "Optimization"),
        *((("agents", "Agent"),) if acts else ()),
        *((f"run-{n}", run.label) for n, run in enumerate(runs) if several),
        *((f"{name}-0", word) for name, word in DETAILS if not several),
        ("rollouts", "Rollouts"),
        ("settings", "Settings"),
    )
    nav = "".join(f'<li><a href="#{name}">{escape(word)}</a></li>' for name, word in links)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} · fst report</title><style>{style}</style></head><body>"
        '<a class=skip href="#main">Skip to the content</a>'
        f"<header><h1>Fast-Slow Training <span>{escape(title)}</span></h1>"
        f"<p>Made {made}{_refresh_words(refresh)}</p>"
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav></header><main id="main" tabindex="-1">'
        f'<section id="answer"><h2>Answer</h2>{answer(runs)}</section>'
        f"{explained}"
        f"{_section('compare', 'Differences', compare(runs)) if several else ''}"
        f'<section id="summary"><h2>Summary</h2>{sections.headline(runs)}</section>'
        f"{_section('curves', 'Curves', f'{_CHARTS}{names}{curves(runs, outcomes)}')}"
        f"{_section('health', 'Optimization', names + health(runs))}"
        f"{_section('agents', 'Agent', names + agents(runs, outcomes)) if acts else ''}"
        f"{''.join(parts)}"
        f'<section id="rollouts"><h2>Rollouts</h2>{_BROWSER}</section>'
        f'<section id="settings"><h2>Settings</h2>{settings(runs)}</section></main>'
        f'<script type="application/json" id="data">{script_json(packed)}</script>'
        f"<script>{script}</script></body></html>"
    )


def _section(name: str, title: str, html: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{html}</section>'


def _run_part(
    number: int, run: Run, blocks: Sequence[tuple[str, str, str]], *, several: bool
) -> str:
    if not several:
        return "".join(
            f'<section id="{name}-{number}"><h2>{title}</h2>{html}</section>'
            for name, title, html in blocks
        )
    inner = "".join(
        f'<section id="{name}-{number}"><h3>{title}</h3>{html}</section>'
        for name, title, html in blocks
    )
    return (
        f'<section id="run-{number}"><details{" open" if number == 0 else ""}><summary><h2>'
        f"{escape(run.label)}</h2></summary>{inner}</details></section>"
    )


def _refresh_words(refresh: float | None) -> str:
    return f"; loads again every {refresh:g} s until the run has finished" if refresh else ""


def script_json(value: Any) -> str:
    """JSON that can stand in a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    text = (files("fst_dspy.report") / name).read_text("utf-8")
    # The first line of uPlot is its address: no address is in the page.
    return text.partition("\n")[2] if text.startswith("/*! http") else text


def _licence() -> str:
    return f"/*! uPlot 1.6.32\n{_asset('charts/uPlot.LICENSE')}*/"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_CHARTS = """
<p class=about>Point at a chart to read it, drag over a part to see it closer, double-click for the
whole; with the keyboard: arrows, plus and minus, 0.</p>
<noscript><p>Charts take JavaScript; the tables below have the same figures.</p></noscript>
"""


_BROWSER = """
<p>The rollouts of the slow phases; those of the fast phases and of validation are not logged.
A problem has the mean reward of its rollouts, and how it went from the first cycle to the last. A
rollout has its step, the reward r, the advantage A, the candidate or what failed, and the
answer.</p>
<noscript><p>Reading the rollouts takes JavaScript; the rest of the page does not.</p></noscript>
<form id="filters" hidden aria-label="Choose rollouts">
<label data-run>Run <select name="run"></select></label>
<label>Show <select name="show"><option value="problem">by problem</option>
<option value="rollout">one by one</option></select></label>
<label>Outcome <select name="kind"></select></label>
<label>Candidate <select name="candidate"></select></label>
<label>Example <select name="example"></select></label>
<label>Step <input name="step" type="number" min="1" step="1" placeholder="all"></label>
<label>Order <select name="order"><option value="low">worst first</option>
<option value="high">best first</option><option value="logged">as logged</option>
<option value="strong">largest advantage</option><option value="long">longest answer</option>
</select></label>
<label class=wide>Text <input name="text" type="search"
placeholder="in prompts, answers, feedback"></label>
<button type="reset">Clear</button>
</form>
<p id="count" role="status"></p>
<ol id="list"></ol>
<nav id="pages" aria-label="Pages of rollouts" hidden>
<button type="button" data-go="first">First</button>
<button type="button" data-go="back">Back</button>
<label>Page <input type="number" min="1" step="1" id="page"> of <span id="last"></span></label>
<button type="button" data-go="next">Next</button>
<button type="button" data-go="end">Last</button>
</nav>
"""
