"""Advantages: how much better a rollout was than the others of its problem (paper, section 3).

One advantage a rollout, centred over all G rollouts of the problem, whichever candidates they ran
under; every call of the rollout becomes a training row with that advantage. The arithmetic is that
of TRL 1.16 (``GRPOTrainer._generate_and_score_completions``), in float32, with one difference: a
group of equal rewards has advantages of exactly 0, where TRL may leave rounding noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fst_dspy.slow.credit import centred_returns, turns_of_calls
from fst_dspy.types import Call, Group, TrainingRow

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""

Scale = Literal["group", "batch", "none"]
Credit = Literal["rollout", "turn"]


def is_constant(group: Group) -> bool:
    """Whether all rewards of the group are equal, so that it has no gradient."""
    return len({rollout.reward for rollout in group.rollouts_G}) <= 1


def constant_group_share(groups_P: Sequence[Group]) -> float:
    """Share of the groups whose rewards are all equal, 0 to 1; 0 for no groups."""
    return sum(map(is_constant, groups_P)) / len(groups_P) if groups_P else 0.0


def by_candidate(groups_P: Sequence[Group]) -> list[Group]:
    """The groups cut up by candidate, for an advantage over a candidate's own rollouts alone.

    Such an advantage cannot tell a good candidate's rollouts from a poor one's: what a step of
    several candidates loses without one advantage a problem (paper, section 3).
    """
    return [
        Group(group.example_id, tuple(r for r in group.rollouts_G if r.candidate_id == candidate))
        for group in groups_P
        for candidate in dict.fromkeys(rollout.candidate_id for rollout in group.rollouts_G)
    ]


def without_lost(group: Group) -> Group:
    """The group without rollouts that were lost to what they ran on (``Rollout.is_lost``)."""
    kept_G = tuple(rollout for rollout in group.rollouts_G if not rollout.is_lost)
    return group if len(kept_G) == len(group.rollouts_G) else Group(group.example_id, kept_G)


def group_advantages(group: Group, divisor: float | None = None) -> list[float]:
    """The advantage of each rollout of a group: ``(r - mean) / divisor``.

    Args:
        group: G rollouts of one problem.
        divisor: ``None`` takes the standard deviation of the group's own rewards (with Bessel's
            correction) plus 1e-4.

    Returns:
        Length G, in the order of the rollouts; all 0 when the rewards are equal.
    """
    reward_G = torch.tensor([rollout.reward for rollout in group.rollouts_G], dtype=torch.float32)
    if is_constant(group):
        return [0.0] * len(group.rollouts_G)
    centred_G = reward_G - reward_G.mean()
    scale = _spread(reward_G) if divisor is None else torch.tensor(divisor)
    return (centred_G / scale).tolist()


def group_rows(
    groups_P: Sequence[Group],
    scale_rewards: Scale,
    *,
    credit: Credit = "rollout",
    discount: float = 1.0,
) -> list[TrainingRow]:
    """The training rows of a step: one for each call of each rollout, in order.

    A call without completion tokens has nothing to learn from and gives no row, and neither does a
    greedy one, which was not drawn from the policy; their rollouts count in the advantages all the
    same. Rows with advantage 0 are kept: they count in the loss's normaliser. A rollout that was
    lost to what it ran on gives no row, and the others of its group are not compared with it.

    Args:
        groups_P: The problems of the step with their rollouts.
        scale_rewards: ``"group"`` divides by the group's standard deviation, ``"batch"`` by that
            of all rewards of the step, ``"none"`` by nothing.
        credit: ``"rollout"``: every call has its rollout's advantage; ``"turn"``: that of its turn
            (``fst_dspy.slow.credit``).
        discount: With ``credit="turn"``, in (0, 1].
    """
    groups_P = [without_lost(group) for group in groups_P]
    if credit == "turn":
        advantages_P = _turn_advantages(groups_P, scale_rewards, discount)
    else:
        advantages_P = [
            [
                [advantage] * len(rollout.calls)
                for rollout, advantage in zip(group.rollouts_G, advantages_G, strict=True)
            ]
            for group, advantages_G in zip(
                groups_P, step_advantages(groups_P, scale_rewards), strict=True
            )
        ]
    return [
        TrainingRow(
            call.prompt_ids_T,
            call.completion_ids_T,
            call.logprobs_T,
            advantage,
            call.temperature,
            call.grammar,
        )
        for group, advantages_G in zip(groups_P, advantages_P, strict=True)
        for rollout, advantages in zip(group.rollouts_G, advantages_G, strict=True)
        for call, advantage in zip(rollout.calls, advantages, strict=True)
        if gives_row(call)
    ]


def gives_row(call: Call) -> bool:
    """Whether a call has something to learn from: it has an answer, drawn from the policy."""
    return bool(call.completion_ids_T) and call.temperature > 0


def step_advantages(groups_P: Sequence[Group], scale_rewards: Scale) -> list[list[float]]:
    """The advantages of a step, G for each of P groups; see :func:`group_rows` for the scale."""
    if scale_rewards == "group":
        return [group_advantages(group) for group in groups_P]
    if scale_rewards == "none":
        return [group_advantages(group, divisor=1.0) for group in groups_P]
    rewards = [rollout.reward for group in groups_P for rollout in group.rollouts_G]
    if len(rewards) < 2:
        return [[0.0] * len(group.rollouts_G) for group in groups_P]
    divisor = _spread(torch.tensor(rewards, dtype=torch.float32)).item()
    return [group_advantages(group, divisor) for group in groups_P]


def _turn_advantages(
    groups_P: Sequence[Group], scale_rewards: Scale, discount: float
) -> list[list[list[float]]]:
    """The advantage of each call of each of G rollouts of P groups, by its turn."""
    centred_P = [centred_returns(group, discount) for group in groups_P]
    divisor_P = [1.0] * len(groups_P)
    if scale_rewards == "group":
        divisor_P = [_spread_of(_flat(centred_G)) for centred_G in centred_P]
    elif scale_rewards == "batch":
        together = [value for centred_G in centred_P for value in _flat(centred_G)]
        divisor_P = [_spread_of(together)] * len(groups_P)
    return [
        [
            [centred_T[turn] / divisor for turn in turns_of_calls(rollout)]
            for rollout, centred_T in zip(group.rollouts_G, centred_G, strict=True)
        ]
        for group, centred_G, divisor in zip(groups_P, centred_P, divisor_P, strict=True)
    ]


def _flat(values: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in values for value in row]


def _spread_of(values: Sequence[float]) -> float:
    return 1.0 if len(values) < 2 else _spread(torch.tensor(values, dtype=torch.float32)).item()


def _spread(reward_N: torch.Tensor) -> torch.Tensor:
    n = reward_N.numel()
    variance = ((reward_N - reward_N.mean()) ** 2).mean() * torch.tensor(n / (n - 1))
    return variance.sqrt() + EPSILON
