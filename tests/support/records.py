"""Records with everything in them that a test does not care for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fst_dspy.types import Call, CycleRecord, Group, Rollout, RolloutCounts

CALL = Call("p", (3, 4), (5,), (0.0,), "x", "stop", 1.0)


def make_call(tokens: int) -> Call:
    """A call whose completion has so many tokens."""
    return Call("p", (3,), tuple(range(3, 3 + tokens)), (0.0,) * tokens, "", "stop", 1.0)


def make_rollout(
    reward: float = 0.0, *, example_id: str = "e", candidate_id: str = "c", **fields: Any
) -> Rollout:
    empty: dict[str, Any] = {"calls": (), "traces": (), "feedback": "", "failure": None}
    return Rollout(
        example_id=example_id,
        candidate_id=candidate_id,
        reward=reward,
        **{**empty, "policy_version": 0, **fields},
    )


def make_group(rewards: Iterable[float], *, example_id: str = "e", **fields: Any) -> Group:
    """Rollouts of one problem that differ in their rewards only."""
    rollouts = (make_rollout(reward, example_id=example_id, **fields) for reward in rewards)
    return Group(example_id, tuple(rollouts))


def make_cycle(cycle: int, score: float, counts: RolloutCounts, **fields: Any) -> CycleRecord:
    """A cycle of one candidate, with its validation score."""
    values: dict[str, Any] = {
        "step": 0,
        "candidate_ids": ("c",),
        "best_candidate_id": "c",
        "train_reward": None,
        "val_score": score,
        "val_scores": (score,),
        "kl_to_base": 0.0,
        "entropy": None,
        "constant_group_share": 0.0,
        "failure_shares": {},
        "rollouts": counts,
        "total_rollouts": counts,
        "tokens": {},
        "seconds": {},
        "weights_version": "m@0",
    }
    return CycleRecord(cycle=cycle, **{**values, **fields})
