"""Tools' descriptions as components of the fast channel: what they bring, on and off.

A desk of a help centre as an environment: it shows a ticket, and each tool sends it to the
queue of its name. Which topics a queue takes only the feedback says, in lessons that name the tool.
Without ``tool_descriptions`` they go into the instruction; with it, into the descriptions too.

    python benchmarks/quality/tool_descriptions.py
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import dspy
import typer

import fst_dspy
from fst_dspy import FST, LocalLM
from fst_dspy.experiments.runner import revision
from fst_dspy.files import write_atomically

RESULTS = Path(__file__).parent.parent / "results" / "tool_descriptions.json"
TOPICS = ("visa", "refund", "baggage", "parking", "invoice", "password", "warranty", "voucher")
QUEUES = ("amber", "silver", "cobalt", "ivory")
SENTENCES = ("I have a question about {}.", "Who can help with {}?", "I need help with {}.")
SETTINGS: dict[str, Any] = {"max_tokens": 24, "val_size": 24, "max_env_steps": 1_500}
ADAPTER = dspy.ChatAdapter(use_json_adapter_fallback=False)


class Desk:
    """One ticket; the right queue ends the episode with reward 1."""

    def reset(self, ticket: str, topic: str, queue: str) -> str:
        """Show a ticket."""
        self._topic, self._queue = topic, queue
        self.done, self.reward, self.feedback = False, 0.0, ""
        return ticket

    def _send(self, queue: str) -> str:
        self.done, self.reward = True, float(queue == self._queue)
        self.feedback = f"Lesson: {self._topic} tickets go to {self._queue}."
        return "sent"

    def amber(self) -> str:
        """Send the ticket to amber."""
        return self._send("amber")

    def silver(self) -> str:
        """Send the ticket to silver."""
        return self._send("silver")

    def cobalt(self) -> str:
        """Send the ticket to cobalt."""
        return self._send("cobalt")

    def ivory(self) -> str:
        """Send the ticket to ivory."""
        return self._send("ivory")


def tickets(seed: int) -> list[dspy.Example]:
    """Tickets in an order of the seed, which also draws the queue of each topic."""
    rng = random.Random(f"desk {seed}")
    drawn = rng.sample(TOPICS, len(TOPICS))
    queue_of = {topic: QUEUES[number % len(QUEUES)] for number, topic in enumerate(drawn)}
    found = [
        dspy.Example(ticket=text.format(topic), topic=topic, queue=queue)
        for topic, queue in queue_of.items()
        for text in SENTENCES
    ]
    rng.shuffle(found)
    return [one.with_inputs("ticket", "topic", "queue") for one in found]


def compiled(arm: Any, on: bool, seed: int) -> dict[str, Any]:
    """Compile once; the best pair's validation score, and what it took.

    Args:
        arm: ``"fst"`` or ``"gepa_only"``.
        on: ``tool_descriptions``.
        seed: Of the tickets and everything random.
    """
    examples, began = tickets(seed), time.process_time()
    program = fst_dspy.env(Desk, "observation -> action", max_turns=1)
    with dspy.context(lm=LocalLM("embedded"), adapter=ADAPTER):
        fst = FST(
            fst_dspy.env_reward, arm=arm, seed=seed, tool_descriptions=on, track_stats=True,
            **SETTINGS,
        )  # fmt: skip
        result = fst.compile(program, trainset=examples[:16], valset=examples[16:]).detailed_results
    best, own = result.best.candidate.components, result.seed_candidate.components
    return {
        "arm": arm, "tool_descriptions": on, "seed": seed,
        "before": result.records[0].val_score, "after": result.best.score,
        "scores": [record.val_score for record in result.records],
        "steps": result.records[-1].turns.steps, "cpu_seconds": time.process_time() - began,
        "changed": sorted(name for name, text in best.items() if text != own.get(name)),
    }  # fmt: skip


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    arms: Annotated[str, typer.Option(help="Comma-separated.")] = "gepa_only,fst",
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS,
) -> None:
    """Compile with and without, and write the figures."""
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for arm in arms.split(","):
            for on in (False, True):
                runs.append(compiled(arm, on, seed))
                print({k: v for k, v in runs[-1].items() if k != "changed"}, flush=True)
                text = json.dumps({"revision": revision(), "runs": runs}, indent=1)
                write_atomically(out, lambda file, text=text: file.write(text.encode()))
    for arm in arms.split(","):
        for on in (False, True):
            own = [
                run["after"] for run in runs if (run["arm"], run["tool_descriptions"]) == (arm, on)
            ]
            print(f"{arm}, tool_descriptions={on}: {fmean(own):.3f} over {len(own)} seeds")


if __name__ == "__main__":
    typer.run(main)
