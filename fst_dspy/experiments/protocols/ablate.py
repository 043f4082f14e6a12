"""The protocol of ``fst ablate``: the arm ``fst`` with one setting changed at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fst_dspy.config import FSTConfig
from fst_dspy.errors import ConfigError
from fst_dspy.experiments.jobs import Job
from fst_dspy.experiments.plan import Plan
from fst_dspy.experiments.runner import ExperimentStore, run_jobs

REFERENCE = "fst"

AXES: dict[str, dict[str, dict[str, Any]]] = {
    "K": {f"K={k}": {"population_size": k} for k in (1, 2, 4, 8)},
    "T": {f"T={t}": {"steps_per_cycle": t} for t in (1, 3, 6, 12)},
    "advantage": {
        "advantage=problem": {"advantage": "problem"},
        "advantage=candidate": {"advantage": "candidate"},
    },
    "reuse": {"reuse=on": {"reuse": True}, "reuse=off": {"reuse": False}},
    "first": {"first=fast": {"first_phase": "fast"}, "first=slow": {"first_phase": "slow"}},
    "demos": {
        "demos=auto": {"demo_tokens": "auto"},
        "demos=off": {"demo_tokens": 0},
        "demos=on": {"demo_tokens": 256},
    },
    # Adapters want about ten times the rate of full fine-tuning (Schulman 2025, "LoRA Without
    # Regret"); with the same rate, the rate would be what is compared.
    "weights": {
        # The default, which trains all weights wherever that fits.
        "weights=full": {"lora": "auto"},
        "weights=lora": {"lora": True, "learning_rate": 1e-3},
    },
}
"""By axis and label, what is changed. The value that a plan has anyway is the reference itself."""


def ablate(
    store: ExperimentStore,
    plan: Plan,
    axes: Sequence[str] = tuple(AXES),
    *,
    workers: int = 1,
    console: Console | None = None,
) -> list[str]:
    """Run the reference and every variant with every seed, as far as they have not run yet.

    Args:
        store: Where all of it goes; ``about["axes"]`` has the labels of each axis.
        plan: The common footing; its settings are the reference.
        axes: Names in ``AXES``.
        workers: Processes at once.
        console: Where to tell of it.

    Returns:
        Names of the jobs that failed.

    Raises:
        FSTError: Input that cannot work, before anything has run.
    """
    variants = {axis: variants_of(axis, plan.settings) for axis in axes}
    plan.check()
    jobs: list[Job] = plan.jobs(REFERENCE, "fst")
    for changes in variants.values():
        for label, change in changes.items():
            if label != REFERENCE:
                jobs += plan.jobs(label, "fst", change)
    jobs.sort(key=lambda job: job.seed)
    with store.locked():
        store.about.setdefault("axes", {}).update(
            {
                axis: {label: dict(change) for label, change in changes.items()}
                for axis, changes in variants.items()
            }
        )
        store.begin("ablate")
        return run_jobs(store, jobs, workers=workers, console=console)


def variants_of(axis: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants of an axis by label; the one that changes nothing has the reference's.

    Raises:
        ConfigError: There is no such axis.
    """
    if axis not in AXES:
        raise ConfigError(f"there is no axis {axis!r}; known: {', '.join(AXES)}")
    reference = FSTConfig.make(**settings)
    return {
        REFERENCE if FSTConfig.make(**{**settings, **change}) == reference else label: change
        for label, change in AXES[axis].items()
    }
