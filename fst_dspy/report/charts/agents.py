"""What agents did: success, turns, invalid actions and environment steps, cycle by cycle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fst_dspy.report import data
from fst_dspy.report.charts.curves import folded, mean_bounds
from fst_dspy.report.charts.figure import SHARE, ZERO, Line, figure
from fst_dspy.report.data import Run
from fst_dspy.report.faults import state
from fst_dspy.report.rollouts import Outcome
from fst_dspy.report.sections import duration, percent


def has_agents(runs: Sequence[Run]) -> bool:
    """Whether any of the runs is of an agent."""
    return any(_last(run).get("turns") for run in runs)


def agents(runs: Sequence[Run], outcomes: Sequence[Sequence[Outcome]]) -> str:
    """Charts over cycles, and the same figures as tables.

    Args:
        runs: The runs.
        outcomes: The logged rollouts of each.
    """
    success, turns, invalid, steps, tables = [], [], [], [], []
    for colour, (run, own) in enumerate(zip(runs, outcomes, strict=True)):
        found = _by_cycle(run)
        won = _won(run)
        played = _episodes(own, won)
        bounds = mean_bounds(own, won)
        success.append(
            Line(
                run.label,
                [(float(cycle), rewarded / count) for cycle, (rewarded, count) in played.items()],
                colour,
                [bounds[cycle] for cycle in played],
            )
        )
        xs = [float(cycle) for cycle, *_ in found]
        turns.append(Line(run.label, [(x, f[1]) for x, f in zip(xs, found, strict=True)], colour))
        invalid.append(Line(run.label, [(x, f[2]) for x, f in zip(xs, found, strict=True)], colour))
        steps.append(
            Line(run.label, [(x, float(f[3])) for x, f in zip(xs, found, strict=True)], colour)
        )
        rows = []
        for cycle, mean, share, total, errors, seconds in found:
            rewarded, count = played.get(cycle, (0, 0))
            rows.append(
                [
                    str(cycle),
                    f"{percent(rewarded / count)} of {count:,}" if count else "—",
                    "—" if mean is None else f"{mean:.2f}",
                    "—" if share is None else percent(share),
                    f"{total:,}",
                    f"{errors:,}",
                    duration(seconds),
                ]
            )
        head = (
            "cycle", "rewarded episodes", "turns an episode", "invalid actions",
            "environment steps so far", "failed tools so far", "environment time so far",
        )  # fmt: skip
        title = f"The agent of {run.label} as a table"
        tables.append(folded(title, head, rows, f"Agent of {run.label}"))
    figures = [
        figure("Success", "cycle", success, whole=True, ends=SHARE,
               caption="share of training episodes that earned more than a failure, with 95 % "
               "intervals"),
        figure("Turns", "cycle", turns, whole=True, ends=ZERO, caption="an episode, all channels"),
        figure("Invalid actions", "cycle", invalid, whole=True, ends=SHARE,
               caption="share of turns whose action was none"),
        figure("Environment steps", "cycle", steps, whole=True, ends=ZERO,
               caption="from the start of the run"),
    ]  # fmt: skip
    return (
        f"<div class=charts>{''.join(figures)}</div>{''.join(tables)}<p>Single episodes, turn by "
        'turn: open a rollout <a href="#rollouts">below</a>.</p>'
    )


def env_steps(run: Run) -> int:
    """Environment steps from the start of the run."""
    return int(_last(run).get("steps", 0))


def _last(run: Run) -> dict[str, int]:
    return run.cycles[-1].get("turns", {}) if run.cycles else {}


def _by_cycle(run: Run) -> list[tuple[int, float | None, float | None, int, int, float]]:
    """Cycle, turns an episode, invalid share; then, so far: steps, errors, seconds."""
    found, turns, invalid = [], 0, 0
    for cycle in run.cycles:
        now = cycle.get("turns", {})
        more, wrong = now.get("turns", 0) - turns, now.get("invalid", 0) - invalid
        episodes = data.total(cycle["rollouts"])
        found.append(
            (
                cycle["cycle"],
                more / episodes if episodes else None,
                min(1.0, wrong / more) if more > 0 else None,
                now.get("steps", 0),
                now.get("errors", 0),
                now.get("seconds", 0.0),
            )
        )
        turns, invalid = now.get("turns", 0), now.get("invalid", 0)
    return found


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
