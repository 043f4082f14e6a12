"""The rollouts of a run, packed for the page: tables of texts, and columns that point into them.

Prompts of one candidate differ in a few lines and completions share their format, so texts are
kept as lists of lines, each different line once. 10,000 rollouts take a few megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_dspy.report import schema
from fst_dspy.run.rollout_log import unpack

COLUMNS = (
    "step", "cycle", "reward", "advantage", "example", "candidate", "kind", "message", "feedback",
    "calls", "traces", "turns",
)  # fmt: skip

Decoder = Callable[[Sequence[int]], str]
"""From the token ids of a prompt to its text."""


@dataclass(frozen=True)
class Outcome:
    """What a rollout came to, without its texts.

    Attributes:
        cycle, step: When it was run.
        example_id: Its example.
        reward: Its reward.
        failure: Kind of failure, or ``None``.
        answer: What was parsed from the last predictor's answer, reasoning left out; ``None``
            where nothing was.
        calls: Calls of the local model.
        cut: How many of them ended at the token limit.
        tokens: Completion tokens over all calls.
    """

    cycle: int
    step: int
    example_id: str
    reward: float
    failure: str | None
    answer: str | None
    calls: int
    cut: int
    tokens: int


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of a run.

    Attributes:
        outcomes: One a rollout, in the order of the log.
        packed: The same rollouts with their texts, ready for JSON; see ``pack``.
    """

    outcomes: tuple[Outcome, ...]
    packed: dict[str, Any]


class _Names:
    """Numbers for things that come up again and again, counted from 0."""

    def __init__(self) -> None:
        self.number: dict[Any, int] = {}

    def __call__(self, thing: Any) -> int:
        return self.number.setdefault(thing, len(self.number))


class _Texts(_Names):
    """Numbers for texts, each kept as the numbers of its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = _Names()

    def __call__(self, thing: Any) -> int:
        return super().__call__(tuple(self.lines(line) for line in str(thing).split("\n")))


def read_rollouts(folder: Path, decode: Decoder | None = None) -> Rollouts:
    """The rollouts that a run folder logs: those of the slow phases.

    Args:
        folder: The run folder.
        decode: Makes texts of prompts; without it the page shows the predictors' inputs alone.

    Returns:
        The outcomes, and the packed form: ``lines`` (texts), ``texts`` (lists of line numbers);
        ``examples``, ``candidates``, ``kinds``, ``predictors`` (names); ``columns``, each with an
        entry a rollout: ``step``, ``cycle``, ``reward``, ``advantage``, ``example``,
        ``candidate``, ``kind`` (-1: none), ``message`` and ``feedback`` (text numbers), ``calls``
        (lists of ``[predictor, prompt or -1, completion, tokens, cut]``), ``traces`` (lists of
        ``[predictor, inputs, outputs or -1, feedback or -1]``), ``turns`` of an agent (lists of
        ``[observation, action, result, reward, status, calls so far]``, text numbers but for
        reward and calls).

    Raises:
        StoreError: The log is damaged.
    """
    texts = _Texts()
    names = {name: _Names() for name in ("examples", "candidates", "kinds", "predictors")}
    prompts: dict[tuple[int, ...], int] = {}
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def prompt(ids_T: Sequence[int]) -> int:
        if decode is None:
            return -1
        key = tuple(ids_T)
        if key not in prompts:
            prompts[key] = texts(decode(ids_T))
        return prompts[key]

    outcomes = []
    for row in unpack(schema.read_checked_rows(folder / "rollouts.jsonl", schema.ROLLOUT)):
        failure = row["failure"]
        outcomes.append(_outcome(row))
        values = {
            "step": row["step"],
            "cycle": row["cycle"],
            "reward": _short(row["reward"]),
            "advantage": _short(row["advantage"]),
            "example": names["examples"](row["example_id"]),
            "candidate": names["candidates"](row["candidate_id"]),
            "kind": names["kinds"](failure["kind"]) if failure else -1,
            "message": texts(failure["message"]) if failure else -1,
            "feedback": texts(row["feedback"]),
            "calls": [
                [
                    names["predictors"](call["predictor"]),
                    prompt(call["prompt_ids_T"]),
                    texts(call["text"]),
                    len(call["completion_ids_T"]),
                    int(call["finish_reason"] == "length"),
                ]
                for call in row["calls"]
            ],
            "traces": _traces(row, names["predictors"], texts),
            "turns": [
                [
                    *(texts(turn[name]) for name in ("observation", "action", "result")),
                    _short(turn["reward"]),
                    texts(turn["status"]),
                    turn["calls"],
                ]
                for turn in row.get("turns", ())
            ],
        }
        for name, value in values.items():
            columns[name].append(value)
    packed = {
        "lines": list(texts.lines.number),
        "texts": [list(lines) for lines in texts.number],
        **{name: list(numbers.number) for name, numbers in names.items()},
        "columns": columns,
    }
    return Rollouts(tuple(outcomes), packed)


def _traces(row: Mapping[str, Any], predictor: _Names, texts: _Texts) -> list[list[int]]:
    own = row.get("feedback_by_predictor", {})
    return [
        [
            predictor(trace["predictor"]),
            texts(fields_text(trace["inputs"])),
            -1 if trace["outputs"] is None else texts(fields_text(trace["outputs"])),
            texts(own[trace["predictor"]]) if trace["predictor"] in own else -1,
        ]
        for trace in row["traces"]
    ]


def fields_text(fields: Mapping[str, Any]) -> str:
    """Fields as ``name: value`` lines; what is not text is written as JSON."""
    return "\n".join(
        f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in fields.items()
    )


def _outcome(row: Mapping[str, Any]) -> Outcome:
    calls = row["calls"]
    return Outcome(
        cycle=row["cycle"],
        step=row["step"],
        example_id=row["example_id"],
        reward=row["reward"],
        failure=row["failure"]["kind"] if row["failure"] else None,
        answer=_answer(row["traces"]),
        calls=len(calls),
        cut=sum(call["finish_reason"] == "length" for call in calls),
        tokens=sum(len(call["completion_ids_T"]) for call in calls),
    )


def _answer(traces: Sequence[Mapping[str, Any]]) -> str | None:
    outputs = traces[-1]["outputs"] if traces else None
    if not outputs:
        return None
    answer = {name: value for name, value in outputs.items() if name != "reasoning"} or outputs
    if len(answer) == 1:
        (value,) = answer.values()
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return fields_text(answer)


def _short(number: float) -> float:
    """The number with the digits that are shown: it is written 10,000 times."""
    return float(f"{number:.4g}")
