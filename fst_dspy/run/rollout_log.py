"""Rollouts as they are written: what the rollouts of a step have in common is written once.

The rollouts of a group are given the same inputs and, under one candidate, the same prompt; a later
turn of an agent begins with the turn before. So a call names an earlier one of the step that it
begins with, prompt and completion, and how far (``prompt_of``, ``prompt_shared``); its
``prompt_ids_T`` are what follows. A trace names an earlier one with the same inputs
(``inputs_of``) and has none of its own. Calls and traces are counted from 0 over the rollouts
written together. What earlier versions of the package wrote has whole prompts and inputs, and is
read as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fst_dspy.errors import StoreError
from fst_dspy.types import Call, Rollout

LEAST_TOKENS = 16
"""Tokens that are written again rather than referred to."""
LEAST_CHARACTERS = 64
"""Likewise of inputs."""
MOST_TOKENS = 2**24
"""Of a prompt that is put together again."""


def pack(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """The rollouts as plain values, for JSON, but for what is inside of their fields."""
    prompts, inputs = _Prompts(), _Inputs()
    rows = []
    for rollout in rollouts:
        calls = [prompts.pack(call, place) for place, call in enumerate(rollout.calls)]
        traces = [inputs.pack(vars(trace)) for trace in rollout.traces]
        rows.append({**vars(rollout), "calls": calls, "traces": traces})
    return rows


def unpack(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of ``pack`` with all prompts and inputs whole.

    Args:
        rows: In their order; those of each step, if they tell it, were packed together.

    Raises:
        StoreError: One refers to what is not there.
    """
    step: Any = None
    seen: list[list[int]] = []
    inputs: list[Any] = []
    for row in rows:
        if row.get("step") != step:
            step, seen, inputs = row.get("step"), [], []
        calls = []
        for call in row["calls"]:
            plain = dict(call)
            if (of := plain.pop("prompt_of", None)) is not None:
                shared = plain.pop("prompt_shared", -1)
                begin = seen[of] if 0 <= of < len(seen) else []
                if not 0 <= shared <= min(len(begin), MOST_TOKENS):
                    raise _damaged("prompt")
                plain["prompt_ids_T"] = [*begin[:shared], *plain["prompt_ids_T"]]
            seen.append([*plain["prompt_ids_T"], *plain["completion_ids_T"]])
            calls.append(plain)
        traces = []
        for trace in row["traces"]:
            plain = dict(trace)
            if (of := plain.pop("inputs_of", None)) is not None:
                plain["inputs"] = inputs[of] if 0 <= of < len(inputs) else None
            if plain.get("inputs") is None:
                raise _damaged("inputs")
            inputs.append(plain["inputs"])
            traces.append(plain)
        yield {**row, "calls": calls, "traces": traces}


def _damaged(what: str) -> StoreError:
    return StoreError(
        f"the {what} of a logged rollout refers to what is not there; the run folder was edited or "
        "is damaged: leave it out, or take the file from a copy"
    )


class _Prompts:
    """The calls so far, and which of them to look at: the rollout before is likely the group's."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, ...]] = []
        self._same: dict[tuple[int, ...], int] = {}  # by prompt
        self._latest: dict[tuple[str, int], int] = {}  # by predictor and place in the rollout

    def pack(self, call: Call, place: int) -> dict[str, Any]:
        ids, number = call.prompt_ids_T, len(self._seen)
        close = [self._same.get(ids), self._latest.get((call.predictor, place))]
        if place > 0:
            close.append(number - 1)
        of, shared = 0, 0
        for other in close:
            if other is not None and (common := _common(self._seen[other], ids)) > shared:
                of, shared = other, common
        self._seen.append((*ids, *call.completion_ids_T))
        self._same.setdefault(ids, number)
        self._latest[call.predictor, place] = number
        if shared < LEAST_TOKENS:
            return vars(call)
        return {
            **vars(call),
            "prompt_ids_T": ids[shared:],
            "prompt_of": of,
            "prompt_shared": shared,
        }


class _Inputs:
    def __init__(self) -> None:
        self._same: dict[str, int] = {}
        self._count = 0

    def pack(self, trace: Mapping[str, Any]) -> dict[str, Any]:
        key, number = repr(trace["inputs"]), self._count
        self._count += 1
        of = self._same.setdefault(key, number) if len(key) >= LEAST_CHARACTERS else number
        if of == number:
            return dict(trace)
        own = {name: value for name, value in trace.items() if name != "inputs"}
        return {**own, "inputs_of": of}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, found by halving: slices are compared at C's speed."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
