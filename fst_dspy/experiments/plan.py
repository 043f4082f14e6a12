"""What all jobs of an experiment have in common: task, model, budget, seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.experiments.jobs import Job
from fst_dspy.measures import ideal_candidate
from fst_dspy.tasks import load_task


@dataclass(frozen=True)
class Plan:
    """The common footing.

    Attributes:
        program, model, rollouts, samples, test_size, forget_on, reflection_lm, instructions,
            adapter: As for ``Job``.
        seeds: Seeds 0, 1, ... of every arm.
        settings: FST's settings, flat, for every arm.
    """

    program: str
    model: str = "embedded"
    rollouts: int = 3000
    seeds: int = 5
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 4
    test_size: int | None = None
    forget_on: tuple[str, ...] = ()
    reflection_lm: str | None = None
    instructions: str | None = None
    adapter: str | None = None

    def check(self) -> None:
        """Load every task once, so that what cannot work is found before the first process starts.

        Raises:
            ConfigError, DataError, ProgramError: What it is.
        """
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {self.seeds}")
        if not load_task(self.program, 0).testset:
            raise DataError(f"{self.program} has no test set, on which the arms are compared")
        for program in self.forget_on:
            ideal_candidate(load_task(program, 0))

    def jobs(
        self,
        label: str,
        arm: str,
        settings: Mapping[str, Any] | None = None,
        *,
        rollouts: int | None = None,
    ) -> list[Job]:
        """A job a seed.

        Args:
            label, arm: As for ``Job``.
            settings: Beside the plan's own, which they win over; but tests are at the plan's
                temperature.
            rollouts: Another budget than the plan's.
        """
        return [
            Job(
                label=label,
                arm=arm,
                seed=seed,
                program=self.program,
                rollouts=self.rollouts if rollouts is None else rollouts,
                model=self.model,
                settings={**self.settings, **(settings or {})},
                samples=self.samples,
                test_size=self.test_size,
                test_temperature=self.settings.get("temperature", SamplingConfig().temperature),
                forget_on=self.forget_on,
                reflection_lm=self.reflection_lm,
                instructions=self.instructions,
                adapter=self.adapter,
            )
            for seed in range(self.seeds)
        ]


QUICK: dict[str, Any] = {"rollouts": 600, "seeds": 2, "samples": 2, "test_size": 40}
"""Fields of a plan that takes minutes on two cores; its figures say little."""
QUICK_SETTINGS: dict[str, Any] = {
    "steps_per_cycle": 3,
    "problems_per_step": 4,
    "first_cycle_iterations": 4,
    "minibatch_size": 8,
    "val_size": 24,
}
"""The settings that go with it."""
