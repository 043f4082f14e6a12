"""Agents whose tools take time: the scheduler's batches against the best that could be had.

Simulated, on a clock of its own: 128 agents that take turns of a model call and a tool. Generating
b rows takes ``fixed + row * b`` seconds. Three ways to serve them: a barrier, which waits for every
agent; the scheduler's rule, which opens a batch once whoever does not call has been waiting for
``GRACE_SECONDS``; and, as the bound, continuous batching, where a call joins at any token.

    python -m benchmarks.speed.scheduler
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from fst_dspy.rollouts.scheduler import GRACE_SECONDS

AGENTS = 128
TOKENS = 64
"""Tokens a call, for continuous batching."""

Turns = list[list[float]]
"""Seconds of the tool after each call, for each agent."""


@dataclass(frozen=True)
class Workload:
    """Agents and a machine.

    Attributes:
        turns: Fewest and most calls of an agent.
        tool: Mean seconds of a tool, exponentially distributed.
        fixed, row: Seconds of a batch, and of each row in it.
    """

    turns: tuple[int, int]
    tool: float
    fixed: float
    row: float

    def agents(self, seed: int) -> Turns:
        """Their tools' seconds."""
        drawn = random.Random(seed)
        counts = [drawn.randint(*self.turns) for _ in range(AGENTS)]
        return [[drawn.expovariate(1 / self.tool) for _ in range(count)] for count in counts]

    def seconds(self, rows: int) -> float:
        """What a batch takes."""
        return self.fixed + self.row * rows


WORKLOADS = (
    Workload((10, 30), 1.0, 0.5, 0.01),
    Workload((10, 30), 1.0, 1.0, 0.05),
    Workload((10, 30), 1.0, 0.2, 0.1),
    Workload((20, 60), 10.0, 0.5, 0.01),
    Workload((20, 60), 10.0, 1.0, 0.05),
)


def barrier(work: Workload, agents: Turns) -> float:
    """Seconds until all are done, where every batch waits for every live agent."""
    now = 0.0
    for turn in range(max(map(len, agents))):
        live = [tools for tools in agents if len(tools) > turn]
        now += work.seconds(len(live)) + max(tools[turn] for tools in live)
    return now


def scheduled(work: Workload, agents: Turns) -> float:
    """The same by the scheduler's rule."""
    now, end, done = 0.0, 0.0, [0] * len(agents)
    ready = [(0.0, agent) for agent in range(len(agents))]
    while ready:
        now = max(now, ready[0][0])
        if any(when > now for when, _ in ready):  # some are at their tools
            now += GRACE_SECONDS
        batch = []
        while ready and ready[0][0] <= now:
            batch.append(heapq.heappop(ready)[1])
        now += work.seconds(len(batch))
        for agent in batch:
            back = now + agents[agent][done[agent]]
            done[agent] += 1
            end = max(end, back)
            if done[agent] < len(agents[agent]):
                heapq.heappush(ready, (back, agent))
    return end


def continuous(work: Workload, agents: Turns) -> float:
    """The same where a call joins those under way at any token."""
    now, end, done = 0.0, 0.0, [0] * len(agents)
    ready = [(0.0, agent) for agent in range(len(agents))]
    left: dict[int, int] = {}
    while ready or left:
        while ready and ready[0][0] <= now:
            left[heapq.heappop(ready)[1]] = TOKENS
        if not left:
            now = ready[0][0]
            continue
        now += work.seconds(len(left)) / TOKENS
        for agent in list(left):
            left[agent] -= 1
            if left[agent] == 0:
                del left[agent]
                back = now + agents[agent][done[agent]]
                done[agent] += 1
                end = max(end, back)
                if done[agent] < len(agents[agent]):
                    heapq.heappush(ready, (back, agent))
    return end


def against_bound(way: Callable[[Workload, Turns], float], work: Workload, seeds: int = 3) -> float:
    """Mean ratio of a way's time to that of continuous batching."""
    drawn = [work.agents(seed) for seed in range(seeds)]
    return sum(way(work, agents) / continuous(work, agents) for agents in drawn) / seeds


def main() -> None:
    """A line a workload."""
    for work in WORKLOADS:
        old, new = against_bound(barrier, work), against_bound(scheduled, work)
        print(f"{work}: barrier {old:.2f}, scheduler {new:.2f} (goal <= 1.15)")


if __name__ == "__main__":
    main()
