"""What agents did: success, turns, invalid actions and environment steps, cycle by cycle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fst_dspy.report import data
from fst_dspy.report.charts.curves import folded, mean_bounds, score_bounds
from fst_dspy.report.charts.figure import SHARE, ZERO, Line, figure, score_range
from fst_dspy.report.data import Run
from fst_dspy.report.faults import state
from fst_dspy.report.rollouts import Outcome
from fst_dspy.report.sections import duration, percent


@dataclass(frozen=True)
class Acted:
    """What an agent did in a cycle, in the rollouts of all channels.

    Attributes:
        cycle: The cycle.
        turns: Turns an episode; ``None`` where there was no episode.
        invalid_share: Of these, the share whose action was none, 0 to 1; ``None`` without turns.
        steps, errors, seconds: Environment steps, failed tools and the environment's time, from
            the start of the run.
    """

    cycle: int
    turns: float | None
    invalid_share: float | None
    steps: int
    errors: int
    seconds: float


def acted(run: Run) -> list[Acted]:
    """What an agent did, cycle by cycle; nothing where the program is none."""
    found, turns, invalid = [], 0, 0
    for cycle in run.cycles:
        now = cycle.get("turns") or dict.fromkeys(("turns", "steps", "invalid", "errors"), 0)
        more, wrong = now["turns"] - turns, now["invalid"] - invalid
        episodes = data.total(cycle["rollouts"])
        found.append(
            Acted(
                cycle["cycle"],
                more / episodes if episodes else None,
                wrong / more if more > 0 else None,
                now["steps"],
                now["errors"],
                now.get("seconds", 0.0),
            )
        )
        turns, invalid = now["turns"], now["invalid"]
    return found if turns else []


def env_steps(run: Run) -> int:
    """Environment steps from the start of the run."""
    found = acted(run)
    return found[-1].steps if found else 0


def agents(runs: Sequence[Run], outcomes: Sequence[Sequence[Outcome]]) -> str:
    """Charts over cycles, and the same figures as tables.

    Args:
        runs: The runs; those without an agent have no lines.
        outcomes: The logged rollouts of each.
    """
    success, turns, invalid, scores, tables = [], [], [], [], []
    for colour, (run, own) in enumerate(zip(runs, outcomes, strict=True)):
        found = acted(run)
        if not found:
            continue
        won = _won(run)
        played, bounds = _episodes(own, won), mean_bounds(own, won)
        xs = [float(one.cycle) for one in found]
        success.append(
            Line(
                run.label,
                [(float(cycle), rewarded / count) for cycle, (rewarded, count) in played.items()],
                colour,
                [bounds[cycle] for cycle in played],
            )
        )
        by_turns = zip(xs, (one.turns for one in found), strict=True)
        turns.append(Line(run.label, list(by_turns), colour))
        by_share = zip(xs, (one.invalid_share for one in found), strict=True)
        invalid.append(Line(run.label, list(by_share), colour))
        scores.append(
            Line(
                run.label,
                [(one.steps, c["val_score"]) for one, c in zip(found, run.cycles, strict=True)],
                colour,
                [score_bounds(run, cycle) for cycle in run.cycles],
                [f"cycle {one.cycle}" for one in found],
            )
        )
        tables.append(_table(run, found, played))
    ends = score_range([y for line in scores for _, y in line.points])
    figures = [
        figure("Success", "cycle", success, whole=True, ends=SHARE,
               caption="share of training episodes that earned more than a failure, with 95 % "
               "intervals"),
        figure("Validation score", "environment steps", scores, ends=ends,
               caption="of the best candidate, with 95 % intervals"),
        figure("Turns", "cycle", turns, whole=True, ends=ZERO, caption="an episode, all channels"),
        figure("Invalid actions", "cycle", invalid, whole=True, ends=SHARE,
               caption="share of turns whose action was none"),
    ]  # fmt: skip
    return (
        f"<div class=charts>{''.join(figures)}</div>{''.join(tables)}<p>Single episodes, turn by "
        'turn: open a rollout <a href="#rollouts">below</a>.</p>'
    )


def _table(run: Run, found: Sequence[Acted], played: dict[int, tuple[int, int]]) -> str:
    rows = []
    for one in found:
        rewarded, count = played.get(one.cycle, (0, 0))
        rows.append(
            [
                str(one.cycle),
                f"{percent(rewarded / count)} of {count:,}" if count else "—",
                "—" if one.turns is None else f"{one.turns:.2f}",
                "—" if one.invalid_share is None else percent(one.invalid_share),
                f"{one.steps:,}",
                f"{one.errors:,}",
                duration(one.seconds),
            ]
        )
    head = (
        "cycle", "rewarded episodes", "turns an episode", "invalid actions",
        "environment steps so far", "failed tools so far", "environment time so far",
    )  # fmt: skip
    title = f"The agent of {run.label} as a table"
    return folded(title, head, rows, f"Agent of {run.label}")


def _won(run: Run) -> Callable[[Outcome], float]:
    failure_score = data.failure_score(run)
    return lambda outcome: float(state(outcome, failure_score) == "rewarded")


def _episodes(
    outcomes: Sequence[Outcome], won: Callable[[Outcome], float]
) -> dict[int, tuple[int, int]]:
    """By cycle: rewarded episodes and all of them, of those that are logged."""
    found: dict[int, tuple[int, int]] = {}
    for outcome in outcomes:
        rewarded, count = found.get(outcome.cycle, (0, 0))
        found[outcome.cycle] = (rewarded + int(won(outcome)), count + 1)
    return found
