"""Tickets, and a made-up model that routes them right where its prompt states the rule."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
from records import make_rollout

from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.population import choose
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.student.candidate import example_id, make_candidate
from fst_dspy.types import Candidate, Failure, Population, PredictorTrace, Rollout

NAME = "solve.instructions"
QUEUES = {
    "visa": "silver",
    "loan": "amber",
    "card": "cobalt",
    "login": "jade",
    "refund": "onyx",
    "travel": "pearl",
    "payroll": "ruby",
    "tax": "teal",
    "mobile": "violet",
    "pension": "coral",
    "fraud": "ivory",
    "branch": "slate",
}
TOPICS = list(QUEUES)
RULES = {topic: f"{topic} tickets go to {queue}." for topic, queue in QUEUES.items()}
SEED = make_candidate({NAME: "Answer with the queue.", "solve.demos": "[]"})


def words(text: str) -> int:
    return len(text.split())


def tickets(count: int, seed: int) -> list[dspy.Example]:
    rng = random.Random(seed)
    return [
        dspy.Example(ticket=f"{seed}-{n} on {(t := rng.choice(TOPICS))}", topic=t).with_inputs(
            "ticket"
        )
        for n in range(count)
    ]


class RuleRunner:
    """A model that answers right 7 times in 10 if the prompt states the rule, else 6 in 100."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.runs: list[tuple[str, int, int]] = []

    def run(
        self,
        jobs: Sequence[RolloutJob],
        *,
        channel: str,
        salt: int,
        version: str | None = None,
    ) -> list[Rollout]:
        self.counts[channel] += len(jobs)
        self.runs.append((channel, salt, len(jobs)))
        return [self.rollout(job, salt) for job in jobs]

    def rollout(self, job: RolloutJob, salt: int) -> Rollout:
        key = f"{self.seed}|{salt}|{example_id(job.example)}|{job.candidate.id}|{job.index}"
        rule = RULES[job.example.topic]
        known = rule in job.candidate.components[NAME]
        right = random.Random(key).random() < (0.7 if known else 0.06)
        trace = PredictorTrace("solve", {"ticket": job.example.ticket}, {"queue": "?"}, "?")
        return make_rollout(
            float(right),
            example_id=example_id(job.example),
            candidate_id=job.candidate.id,
            traces=(trace,),
            feedback="Correct." if right else f"Wrong queue. Lesson: {rule}",
        )


class Scripted:
    """A proposer that does as it is told."""

    def __init__(self, script: Callable[[int, Mapping[str, str], Sequence[str]], Any]) -> None:
        self.script = script
        self.names: list[str] = []

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Any]],
        names: Sequence[str],
    ) -> dict[str, str]:
        self.names += names
        return self.script(len(self.names), components, names)


TRAIN, VAL = tickets(60, 1), tickets(24, 2)


def scored(runner: Any, *candidates: Candidate) -> Population:
    rows = evaluate(runner, candidates, VAL, channel="fast").score_K_V
    return choose(candidates, rows, [example_id(e) for e in VAL], 4, 0)


def run(phase: FastPhase, runner: Any, population: Population, **more: Any) -> Population:
    settings = {"cycle": 1, "iterations": 8, "policy_version": 3, **more}
    return phase.run(runner, population, TRAIN, VAL, **settings)


PAIR = make_candidate({"a.instructions": "A.", "a.demos": "[]", "b.instructions": "B."})
EXAMPLE = dspy.Example(q="why", label="because").with_inputs("q")


def rollout_of(*traces: PredictorTrace, failure: Failure | None = None, **more: Any) -> Rollout:
    own = {"example_id": example_id(EXAMPLE), "candidate_id": PAIR.id, "feedback": "Feedback."}
    return make_rollout(**{**own, "traces": traces, "failure": failure, **more})
