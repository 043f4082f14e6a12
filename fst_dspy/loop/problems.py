"""Which problems the next optimizer step rolls out: shuffled epochs that pass over settled ones.

A problem whose last groups all had a constant reward, all right or all wrong, says little more: its
rows have no advantage. It is picked again with a probability that halves with every such group in a
row, so that it is still looked at now and then. After GRESO (Zheng et al. 2025, "Act Only When It
Pays: Efficient Reinforcement Learning for LLM Reasoning via Selective Rollouts"), which adapts the
two probabilities, for easy and for hard problems, to a target share.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import dspy

from fst_dspy.slow.advantage import is_constant
from fst_dspy.student.candidate import example_id
from fst_dspy.types import Group

LEAST = 1 / 16
"""Smallest probability that a problem of the epoch is picked."""


@dataclass(frozen=True)
class ProblemStream:
    """Where the stream of problems stands.

    Attributes:
        position: Problems passed so far, picked or not, over all epochs.
        constant: By example id, its latest groups in a row that were constant; none: left out.
    """

    position: int = 0
    constant: Mapping[str, int] = field(default_factory=dict)

    def pick(
        self, trainset: Sequence[dspy.Example], count: int, seed: int, revisit: float
    ) -> tuple[list[dspy.Example], ProblemStream]:
        """The next problems, each once where there are enough.

        Args:
            trainset: At least one example.
            count: P, problems to pick.
            seed: Of the epochs' order and of what is passed over.
            revisit: Probability of picking a problem after one constant group, in (0, 1].

        Returns:
            P examples, and the stream behind them.
        """
        picked: list[dspy.Example] = []
        position, taken = self.position, set[int]()
        for index, chance in _turns(len(trainset), seed, self.position):
            if len(picked) == count:
                break
            position += 1
            keep = revisit ** self.constant.get(example_id(trainset[index]), 0)
            again = index in taken and len(taken) < len(trainset)
            if not again and chance < max(keep, LEAST):
                taken.add(index)
                picked.append(trainset[index])
        return picked, replace(self, position=position)

    def after(self, groups_P: Sequence[Group]) -> ProblemStream:
        """The stream, once these groups have been scored.

        Groups of one problem (one a candidate, or several draws) are one: constant if all are.
        """
        moved = {g.example_id for g in groups_P if not is_constant(g)}
        constant = dict(self.constant)
        for name in {g.example_id for g in groups_P}:
            if name in moved:
                constant.pop(name, None)
            else:
                constant[name] = constant.get(name, 0) + 1
        return replace(self, constant=constant)


def _turns(size: int, seed: int, position: int) -> Iterator[tuple[int, float]]:
    """The problems by number, epoch after epoch, and a chance in [0, 1) with each turn."""
    first, offset = divmod(position, size)
    for epoch in itertools.count(first):
        begin = offset if epoch == first else 0
        yield from itertools.islice(_epoch(size, seed, epoch), begin, None)


@functools.lru_cache(2)  # of 100,000 problems a step takes a few, and the order takes a while
def _epoch(size: int, seed: int, epoch: int) -> Sequence[tuple[int, float]]:
    """An epoch's turns."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(size))
    rng.shuffle(order)
    return [(index, rng.random()) for index in order]
