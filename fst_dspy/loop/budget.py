"""Whether a run's budget is spent, in words."""

from __future__ import annotations

from fst_dspy.loop.parts import Parts
from fst_dspy.loop.state import LoopState
from fst_dspy.types import CycleRecord


def cycles_spent(parts: Parts, state: LoopState) -> str | None:
    """``"6 of 6 cycles"`` where that was the last one; the opening does not count."""
    asked, opening = parts.budget.max_cycles, int(parts.has_opening)
    if asked is None or state.cycle < asked:
        return None
    return f"{state.cycle - opening} of {asked - opening} cycles"


def counts_spent(parts: Parts, rollouts: int, env_steps: int) -> str | None:
    """``"312 of 300 rollouts"`` where a limit of what is counted is reached."""
    budget = parts.budget
    if budget.max_rollouts is not None and rollouts >= budget.max_rollouts:
        return f"{rollouts:,} of {budget.max_rollouts:,} rollouts"
    if budget.max_env_steps is not None and env_steps >= budget.max_env_steps:
        return f"{env_steps:,} of {budget.max_env_steps:,} environment steps"
    return None


def time_spent(parts: Parts, state: LoopState) -> str | None:
    """``"620 of 600 s"`` where time is up on this process's clock."""
    asked, seconds = parts.budget.max_seconds, sum(state.seconds.values())
    return f"{seconds:.0f} of {asked:g} s" if asked is not None and seconds >= asked else None


def recorded_spent(parts: Parts, record: CycleRecord) -> str | None:
    """As ``counts_spent``, of what a cycle's record says."""
    return counts_spent(parts, record.total_rollouts.total, record.turns.steps)
