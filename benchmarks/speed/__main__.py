"""Run the speed benchmarks; figures as JSON, and as a table in ``benchmarks/results/speed.md``.

python -m benchmarks.speed               # all parts, half an hour on an idle core
python -m benchmarks.speed --parts ae    # some; the others' figures are kept
"""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.speed.measure import Clock, Row, commit, machine

PARTS = {
    "a": "rollouts",
    "b": "step",
    "c": "overhead",
    "d": "growth",
    "e": "startup",
    "f": "dspy_grpo_step",
    "g": "large_step",
}
RESULTS = Path(__file__).parent.parent / "results" / "speed.json"
BEGIN, END = "<!-- speed: made by `make bench` -->", "<!-- speed: end -->"
console = Console()


def main(
    parts: Annotated[str, typer.Option(help="Letters of the parts to run.")] = "abcdefg",
    quick: Annotated[bool, typer.Option(help="Toy sizes, to see whether it runs.")] = False,
    out: Annotated[Path, typer.Option(help="JSON file; parts not run are kept.")] = RESULTS,
    cpu: Annotated[bool, typer.Option(help="CPU seconds: for a machine with other work.")] = False,
    report: Annotated[Path | None, typer.Option(help="File with the table to renew.")] = None,
) -> None:
    """Take the figures, on one thread, and say which goals are met."""
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise typer.BadParameter(
            f"no part {', '.join(sorted(unknown))}; there are {''.join(PARTS)}"
        )
    torch.set_num_threads(1)
    Clock.cpu = cpu
    found = json.loads(out.read_text()) if out.exists() else {"schema_version": 1, "parts": {}}
    for letter in sorted(set(parts)):
        console.print(f"[bold]({letter})[/bold] {PARTS[letter]}")
        rows, started = [], time.perf_counter()
        for row in importlib.import_module(f"benchmarks.speed.{PARTS[letter]}").run(quick):
            rows.append(row)
            console.print(line_of(row), highlight=False)
        found["parts"][letter] = {
            "commit": commit(),
            "quick": quick,
            "clock": "cpu" if cpu else "wall",
            "machine": machine(),
            "seconds": round(time.perf_counter() - started, 1),
            "rows": [row.to_json() for row in rows],
        }
        write(out, json.dumps(found, indent=1))
    if report is not None:
        renew(report, table(found["parts"]))
    console.print(f"written to {out}")


def line_of(row: Row) -> str:
    """One figure, as it is shown while the benchmarks run."""
    verdict = {True: " met", False: " [bold]not met[/bold]", None: ""}[row.met]
    goal = f", goal {row.goal}{verdict}" if row.goal else ""
    return f"  {row.what}: {row.median:.4g} {row.unit} ({row.low:.4g} to {row.high:.4g}){goal}"


def table(parts: dict[str, Any]) -> str:
    """All parts' figures as a Markdown table, and where each part was taken."""
    lines = ["| | what | median (range) | repeats | goal | met | |", "| --- " * 7 + "|"]
    for letter, part in sorted(parts.items()):
        for row in part["rows"]:
            low, high = f"{row['low']:.3g}", f"{row['high']:.3g}"
            spread = f" ({low} to {high})" if row["repeats"] > 1 else ""
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            goal = row["goal"].replace("<=", "≤").replace(">=", "≥")
            lines.append(
                f"| {letter} | {row['what']} | {row['median']:.3g} {row['unit']}{spread} | "
                f"{row['repeats']} | {goal} | {met} | {row['note']} |"
            )
    sources = "; ".join(
        f"({letter}) commit {part['commit']}, {part['seconds']:.0f} s, {part['clock']} clock, load "
        f"{part['machine']['load_average'][0]} on {part['machine']['cores']} cores"
        for letter, part in sorted(parts.items())
    )
    return "\n".join([*lines, "", f"Taken at: {sources}."])


def renew(report: Path, text: str) -> None:
    """Put the table between its marks."""
    before, rest = report.read_text(encoding="utf-8").split(BEGIN)
    write(report, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def write(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    typer.run(main)
