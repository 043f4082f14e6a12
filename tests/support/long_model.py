"""A tiny model that has room for DSPy's own formats."""

from __future__ import annotations

import json
from pathlib import Path

import dspy
from tiny_models import save_model

DESKS = ("silver", "gold", "sand")
TICKETS = [
    "visa",
    "card",
    "loan",
    "key",
    "door",
    "phone",
    "pen",
    "lamp",
    "cup",
    "bag",
    "hat",
    "dog",
]


def save_long_model(folder: Path) -> Path:
    """A tiny Llama whose context holds 4,096 tokens."""
    save_model(folder, "llama")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 4096}
    path.write_text(json.dumps(config))
    return folder


class Router(dspy.Module):
    """One predictor whose answer is one of three words."""

    def __init__(self) -> None:
        super().__init__()
        self.route = dspy.Predict("ticket -> desk: typing.Literal['silver', 'gold', 'sand']")

    def forward(self, ticket: str) -> dspy.Prediction:
        return self.route(ticket=ticket)


def tickets(count: int, start: int = 0) -> list[dspy.Example]:
    """Labelled tickets."""
    return [
        dspy.Example(ticket=f"{TICKETS[n % 12]} {n}", desk=DESKS[n % 3]).with_inputs("ticket")
        for n in range(start, start + count)
    ]


def right_desk(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """1 for the right desk, and a lesson."""
    return dspy.Prediction(
        score=float(gold.desk == pred.desk), feedback=f"Lesson: {gold.ticket} goes to {gold.desk}."
    )


def never(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """No answer is ever any good."""
    return dspy.Prediction(score=0.0, feedback="Lesson: that is not it.")
