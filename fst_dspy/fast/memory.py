"""What proposes, and what it has learned: kept from phase to phase and over a resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy

from fst_dspy.config import FastConfig
from fst_dspy.fast.acceptance import ProposalStats
from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.demos import DemoProposer
from fst_dspy.fast.proposers.protocol import (
    HasState,
    Proposer,
    StudiesExamples,
    TellsFindings,
)
from fst_dspy.fast.proposers.reflection import ReflectionUsage
from fst_dspy.fast.reflector import Reflector, Trajectory
from fst_dspy.student.candidate import DEMOS, example_id, split_component, texts_in
from fst_dspy.types import Rollout

PATIENCE = 4
"""Iterations without a better candidate before demos are tried, with ``demo_tokens="auto"``."""


class Memory:
    """The proposer of instructions, that of demos, and what rollouts have taught them.

    Args:
        proposer: Proposes instructions; see ``fst_dspy.fast.proposers.protocol``.
        demos: Proposes demos; ``None`` leaves them alone.
        config: What a proposer is shown, and what is refused.

    Attributes:
        guard: Refuses copies of training examples, the proposer's own where it has one; or
            ``None``.
        shows_demos: Whether demos are proposed; with ``demo_tokens="auto"`` not at first.
    """

    def __init__(
        self,
        proposer: Proposer,
        demos: DemoProposer | None = None,
        config: FastConfig | None = None,
    ) -> None:
        self.proposer, self.demos, self.config = proposer, demos, config or FastConfig()
        own = getattr(proposer, "guard", None)
        guard = own if isinstance(own, CopyGuard) else CopyGuard()
        self.guard = guard if self.config.copy_guard else None
        self.shows_demos = demos is not None and self.config.demo_tokens != "auto"
        self._studied: Sequence[dspy.Example] | None = None
        self._fell_short = False  # a rollout did: there is something to mend
        self._indexed: tuple[Sequence[dspy.Example], dict[str, dspy.Example]] = ((), {})

    def reflector(self, known_ids: Iterable[str]) -> Reflector:
        """What turns rollouts into new texts, none of which makes a candidate of ``known_ids``."""
        context = self.config.reflection_context
        return Reflector(self.proposer, set(known_ids), self.demos, context, self.guard)

    def observe(
        self,
        components: Sequence[str],
        trainset: Sequence[dspy.Example],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Learn from rollouts run for another purpose, at no cost.

        Args:
            components: The candidates' component names.
            trainset: The training examples that the rollouts were run on, and maybe others.
            rollouts: Such as those of the slow phase.
        """
        self.study(trainset)
        examples = self.by_id(trainset)
        pairs = [Trajectory(examples[rollout.example_id], rollout) for rollout in rollouts]
        self.reflector(()).learn(components, pairs)
        self.bank(rollouts)

    def study(self, trainset: Sequence[dspy.Example]) -> None:
        """Let the proposers learn from training examples, once for each set of them."""
        if self._studied is trainset:
            return
        self._studied = trainset
        if self.guard is not None:
            self.guard.study(list(self.by_id(trainset).values()))
        for proposer in (self.proposer, self.demos):
            if isinstance(proposer, StudiesExamples):
                proposer.study(self.by_id(trainset))

    def advice(self, stats: ProposalStats) -> str | None:
        """What to do where nothing was learned from feedback; ``None`` where something was."""
        found = self.proposer.findings() if isinstance(self.proposer, TellsFindings) else None
        if stats.accepted or not stats.iterations or found is None:
            return None
        changed_nothing = self._fell_short and stats.empty == stats.iterations
        if found.lessons and not stats.rejected and not changed_nothing:
            return None  # there was nothing to mend, or it is yet to be tried
        if not found.rollouts:
            return (
                f"0 of {stats.proposals} proposals were accepted: every rollout failed before it "
                "had a score, so that there is nothing to learn from; mend that first"
            )
        said, demos = "the metric gave no feedback", ", or demo_tokens to show labelled examples"
        if found.lessons:
            came_of_it = (
                "made no answers better"
                if stats.rejected
                else "changed no instruction: it stands there already, is longer than "
                "instruction_tokens, or copies training examples (copy_guard)"
            )
            said = f"what was read off feedback and labels ({found.lessons} rules) {came_of_it}"
        elif found.with_feedback:
            said = (
                f"the feedback of {found.with_feedback} rollouts states nothing that holds beyond "
                f"its own example (such as {found.sample!r}), and the labels show no rule"
            )
        return (
            f"0 of {stats.proposals} proposals were accepted: {said}. Write what is right as a "
            "general rule, e.g. 'visa tickets go to amber.', after 'Lesson:' where other text "
            f"stands beside it; or give a reflection_lm{demos if self.demos is None else ''}"
        )

    def turn_to_demos(self, stats: ProposalStats) -> str | None:
        """Propose demos from here on, if it is time for them: what to tell of it."""
        waits = self.demos is not None and not self.shows_demos
        if not waits or stats.accepted or stats.iterations < PATIENCE or not self._fell_short:
            return None
        self.shows_demos = True
        return (
            f"{stats.iterations} iterations found no better instructions: solved and labelled "
            "examples are tried as demos from here on (demo_tokens='auto')"
        )

    def bank(self, rollouts: Sequence[Rollout]) -> None:
        """Keep the successful calls of training rollouts, to be shown as demos."""
        self._fell_short |= any(r.reward < self.config.perfect_score for r in rollouts)
        if self.demos is not None:
            self.demos.bank(rollouts)

    def ready(self, components: Mapping[str, str]) -> list[str]:
        """The components to update: plain texts, and demos once there is something to show."""
        demos = self.demos if self.shows_demos else None
        named = [name for name in components if split_component(name)[1] == DEMOS]
        ready = [name for name in named if demos is not None and demos.ready(name)]
        return [*texts_in(components), *ready]

    def by_id(self, trainset: Sequence[dspy.Example]) -> dict[str, dspy.Example]:
        """The examples by their ids, which are hashes of what is in them, and not taken twice."""
        if self._indexed[0] is not trainset:
            self._indexed = (trainset, {example_id(example): example for example in trainset})
        return self._indexed[1]

    def usage(self) -> dict[str, Any] | None:
        """What the reflection LM cost, for JSON; ``None`` where there is none."""
        usage = getattr(self.proposer, "usage", None)
        return dataclasses.asdict(usage) if isinstance(usage, ReflectionUsage) else None

    def state(self) -> dict[str, Any]:
        """What the proposers remember, for JSON."""
        return {
            "proposer": self.proposer.state() if isinstance(self.proposer, HasState) else None,
            "demos": self.demos.state() if self.demos is not None else None,
            "shows_demos": self.shows_demos,
            "fell_short": self._fell_short,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        if isinstance(self.proposer, HasState) and state["proposer"] is not None:
            self.proposer.load_state(state["proposer"])
        if self.demos is not None and state["demos"] is not None:
            self.demos.load_state(state["demos"])
            self.shows_demos = state.get("shows_demos", True)  # earlier states had no other
        self._fell_short = state.get("fell_short", False)
