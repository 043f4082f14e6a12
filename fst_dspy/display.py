"""How candidates, populations and cycles show themselves in a notebook and in a terminal.

The HTML takes its colours from the notebook's own theme, light or dark; every text in it is
escaped, because instructions may hold whatever a language model wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from fst_dspy.word_diff import readable, word_diff

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from fst_dspy.types import Candidate, CycleRecord, Population

_STYLE = (
    "<style>.fst{font-family:system-ui,sans-serif;line-height:1.4}"
    ".fst table{border-collapse:collapse;margin:.4em 0}"
    ".fst td,.fst th{text-align:left;padding:.15em .7em;border-bottom:1px solid #8886;"
    "vertical-align:top}.fst .n{text-align:right;font-variant-numeric:tabular-nums}"
    ".fst pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0 .6em;padding:.4em .6em;"
    "border-left:3px solid #8886;background:none;color:inherit}"
    ".fst ins{background:#2a9d5733;text-decoration:underline}"
    ".fst del{background:#d4433a33;text-decoration:line-through}</style>"
)


def show(thing: Any, console: Any = None) -> None:
    """Print a candidate, a population or a result to a terminal.

    Args:
        thing: Anything with ``__rich__``.
        console: A ``rich.console.Console``; a new one on standard output when ``None``.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    console.print(thing)


# --- candidates ---------------------------------------------------------------------------------


def candidate_html(candidate: Candidate) -> str:
    """A candidate's origin and texts."""
    return notebook_html(f"<p>{_origin_html(candidate)}</p>{_texts_html(candidate)}")


def candidate_rich(candidate: Candidate) -> RenderableType:
    """The same for a terminal: a panel."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    texts: list[Text] = []
    for name, text in sorted(candidate.components.items()):
        texts += [Text(name, style="bold"), Text(readable(name, text) + "\n")]
    return Panel(Group(*texts), title=Text(origin(candidate)), title_align="left")


def origin(candidate: Candidate) -> str:
    """A candidate's id and how it came to be, in one line."""
    parents = f" from {', '.join(candidate.parent_ids)}" if candidate.parent_ids else ""
    return f"{candidate.id} · {candidate.source}, cycle {candidate.cycle}{parents}"


def _origin_html(candidate: Candidate) -> str:
    return f"<b>Candidate</b> {escape(origin(candidate))}"


def _texts_html(candidate: Candidate) -> str:
    return "".join(
        f"<div><code>{escape(name)}</code><pre>{escape(readable(name, text))}</pre></div>"
        for name, text in sorted(candidate.components.items())
    )


# --- populations --------------------------------------------------------------------------------


def population_html(population: Population) -> str:
    """A table of the candidates, best first, each with its texts folded under it."""
    rows = population_rows(population)
    body = "".join(
        f"<tr><td class=n>{score_text(mean)}</td><td class=n>{wins}</td>"
        f"<td><details><summary>{escape(origin(candidate))}</summary>"
        f"{_texts_html(candidate)}</details></td></tr>"
        for candidate, mean, wins in rows
    )
    return notebook_html(
        f"<p><b>Population</b> of {len(rows)}, scored on {len(population.val_ids)} examples after "
        f"{population.policy_version} optimizer steps</p><table><thead><tr><th>mean score</th>"
        f"<th>best on</th><th>candidate</th></tr></thead><tbody>{body}</tbody></table>"
    )


def population_rich(population: Population) -> RenderableType:
    """The same for a terminal, with the first line of each candidate's instructions."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{len(population.candidates)} candidates on {len(population.val_ids)} examples, "
        f"after {population.policy_version} optimizer steps"
    )
    for name in ("mean score", "best on"):
        table.add_column(name, justify="right")
    table.add_column("candidate")
    table.add_column("instructions", overflow="ellipsis", no_wrap=True, ratio=1)
    for candidate, mean, wins in population_rows(population):
        texts = [v for k, v in candidate.components.items() if k.endswith(".instructions")]
        first = " / ".join(" ".join(text.split()) for text in texts)
        table.add_row(score_text(mean), str(wins), Text(origin(candidate)), Text(first))
    return table


def population_rows(population: Population) -> list[tuple[Candidate, float | None, int]]:
    """Candidates, best first, with mean score and on how many examples none is better.

    The mean is ``None`` before the population has been scored.
    """
    if not population.score_K_V:
        return [(candidate, None, 0) for candidate in population.candidates]
    top_V = [max(column) for column in zip(*population.score_K_V, strict=True)]
    rows = []
    for candidate, score_V in zip(population.candidates, population.score_K_V, strict=True):
        mean = sum(score_V) / max(1, len(score_V))
        wins = sum(score == top for score, top in zip(score_V, top_V, strict=True))
        rows.append((-mean, candidate.id, candidate, mean, wins))
    rows.sort(key=lambda row: row[:2])
    return [(candidate, mean, wins) for _, _, candidate, mean, wins in rows]


# --- cycles ---------------------------------------------------------------------------------------


CYCLE_COLUMNS = ("cycle", "step", "train reward", "validation", "KL", "entropy", "rollouts")


def cycle_cells(record: CycleRecord) -> tuple[str, ...]:
    """A cycle's figures, formatted, in the order of ``CYCLE_COLUMNS``."""
    return (
        str(record.cycle),
        str(record.step),
        score_text(record.train_reward),
        score_text(record.val_score),
        f"{record.kl_to_base:.4f}",
        score_text(record.entropy),
        f"{record.total_rollouts.total:,}",
    )


def cycle_table(records: Iterable[CycleRecord]) -> RenderableType:
    """The cycles as a table for a terminal."""
    from rich.table import Table

    table = Table()
    for name in CYCLE_COLUMNS:
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(*cycle_cells(record))
    return table


def diff_text(before: str, after: str) -> Text:
    """A word diff for a terminal: removed words struck through, added ones underlined."""
    from rich.text import Text

    styles = {"same": "", "removed": "red strike", "added": "green underline"}
    return Text.assemble(*((text, styles[kind]) for kind, text in word_diff(before, after)))


def records_frame(records: Sequence[CycleRecord]) -> Any:
    """The cycles as a ``pandas.DataFrame``: a row a cycle, mappings spread over columns.

    Rollouts of the cycle are ``rollouts_fast`` and so on, all up to its end
    ``total_rollouts_fast`` and so on; failures and seconds likewise. A kind of failure that a
    cycle does not name had a share of 0.
    """
    import dataclasses

    import pandas as pd

    rows = []
    for record in records:
        row: dict[str, Any] = {}
        for name, value in dataclasses.asdict(record).items():
            if isinstance(value, Mapping):
                row |= {f"{name.removesuffix('_shares')}_{key}": v for key, v in value.items()}
            else:
                row[name] = value
        row["total_rollouts"] = record.total_rollouts.total
        rows.append(row)
    frame = pd.DataFrame(rows)
    shares = [name for name in frame.columns if name.startswith("failure_")]
    return frame.fillna(dict.fromkeys(shares, 0.0)).set_index("cycle")


def score_text(value: float | None) -> str:
    """Three digits, or a dash where nothing was measured."""
    return "—" if value is None else f"{value:.3f}"


def notebook_html(body: str) -> str:
    """HTML for a notebook's output, with the style that goes with it."""
    return f'<div class="fst">{_STYLE}{body}</div>'
