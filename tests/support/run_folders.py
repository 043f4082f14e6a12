"""A run folder of any size, made of the real dataclasses by the code that writes real ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy

from fst_dspy.config import FSTConfig
from fst_dspy.fast.judge import Verdict
from fst_dspy.files import read_jsonl
from fst_dspy.loop.folder import RunFolder
from fst_dspy.results.result import Best, FSTResult
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import (
    Call,
    Candidate,
    CycleRecord,
    Failure,
    Group,
    Population,
    PredictorTrace,
    Rollout,
    RolloutCounts,
    StepRecord,
    StepStats,
)

TOPICS = ("visa", "refund", "baggage", "parking", "catering", "wifi", "insurance", "passport")
QUEUES = ("amber", "silver", "cobalt", "ivory", "crimson", "jade", "onyx", "coral")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
VAL = 24


def write_run(
    folder: Path,
    *,
    steps: int = 4,
    per_step: int = 16,
    cycles: int = 2,
    seed: int = 0,
    arm: str = "fst",
    finished: bool = True,
) -> FSTResult:
    """Write a run of ``steps * per_step`` rollouts in groups of 8, 4 candidates a population.

    A proposal a cycle is rejected, with hostile HTML in its text. The validation examples are
    answered by the student and by each cycle's best.

    About one rollout in eight does not parse, one in twenty is cut off, and one completion in
    fifty is hostile HTML; the reward of the others rises from step to step.
    """
    rng = random.Random(seed)
    run = RunFolder(folder)
    config = FSTConfig.make(max_cycles=cycles)
    population = Population((_seed(),), tuple(f"v{n:03}" for n in range(VAL)), (), 0)
    run.begin(
        {
            "arm": arm,
            "seed": seed,
            "settings": config.to_dict(),
            "model": "synthetic@0123456789ab",
            "student": dict(_seed().components),
            "train_ids": [f"e{n:03}" for n in range(64)],
            "val_ids": list(population.val_ids),
        }
    )
    records: list[CycleRecord] = []
    counts, best, step = RolloutCounts(), None, 0
    for cycle in range(cycles + 1):
        rewards: list[float] = []
        if cycle:
            before, population = population, _evolve(population, cycle, rng)
            run.record_verdicts(_verdicts(before, population, cycle), step)
            counts = counts.plus(RolloutCounts(fast=40, reused=5))
            for _ in range(steps // cycles):
                step += 1
                groups = _groups(population, per_step, step, step / steps, rng)
                rollouts = [r for group in groups for r in group.rollouts_G]
                rewards.append(sum(r.reward for r in rollouts) / len(rollouts))
                kinds = [r.failure.kind for r in rollouts if r.failure]
                record = StepRecord(
                    cycle,
                    step,
                    rewards[-1],
                    0.25,
                    {kind: kinds.count(kind) for kind in sorted(set(kinds))},
                    len(rollouts),
                    StepStats(0.1, 1 + rng.random(), 3e-4, 1.2 - step / steps, 0.0, per_step),
                )
                if step == 2:
                    record = replace(record, stats=replace(record.stats, skipped="constant"))
                run.record_step(record, groups, "group")
                counts = counts.plus(RolloutCounts(slow=len(rollouts)))
        skill = 0.2 + 0.6 * cycle / cycles
        population = _score(population, step, skill, rng)
        counts = counts.plus(RolloutCounts(fast=VAL * len(population.candidates)))
        records.append(_record(cycle, step, population, rewards, counts, records))
        run.record_cycle(records[-1], population)
        if best is None or records[-1].val_score >= best.score:
            top = next(c for c in population.candidates if c.id == records[-1].best_candidate_id)
            version = records[-1].weights_version
            best = Best(version, top, records[-1].val_score, cycle)
            answers = _answers(population, top, step, rng)
            run.record_answers(answers, cycle, step, None if cycle else _examples())
    assert best is not None
    result = FSTResult(
        arm=arm,
        seed=seed,
        config=config,
        records=tuple(records),
        population=population,
        best=best,
        seed_candidate=_seed(),
        base_version="synthetic@0123456789ab",
        weights_version=records[-1].weights_version,
        log_dir=str(folder),
    )
    if finished:
        run.finish(result)
    run.close()
    return result


def _seed() -> Candidate:
    return make_candidate(
        {"route.instructions": "Route the ticket to the right queue.", "route.demos": "[]"}
    )


def _evolve(population: Population, cycle: int, rng: random.Random) -> Population:
    """Up to four candidates: two that are kept, two new ones that learned a line more."""
    kept = population.candidates[:2]
    new = []
    for n in range(2):
        parent = kept[n % len(kept)]
        texts = dict(parent.components)
        rule = f"{rng.choice(TOPICS)} tickets go to {rng.choice(QUEUES)} ({cycle}.{n})."
        texts["route.instructions"] = (
            texts["route.instructions"].replace("Route the", "Send each") + f"\n{rule}"
        )
        new.append(make_candidate(texts, [parent.id], cycle, "instructions"))
    return replace(population, candidates=(*kept, *new), score_K_V=())


def _verdicts(before: Population, after: Population, cycle: int) -> list[Verdict]:
    """The two new candidates were accepted, a third one was not."""
    known = {c.id: c for c in (*before.candidates, *after.candidates)}
    verdicts = []
    for n, child in enumerate(c for c in after.candidates if c not in before.candidates):
        changed = {"route.instructions": child.components["route.instructions"]}
        assert child.parent_ids[0] in known
        verdicts.append(
            Verdict(child, 3 * cycle - 2 + n, True, "scores 3", (0.0, 1.0), (1.0, 1.0), changed)
        )
    parent = after.candidates[-1]
    changed = {"route.instructions": f"Guess. {HOSTILE} {cycle}"}
    child = make_candidate({**parent.components, **changed}, [parent.id], cycle, "instructions")
    why = f"scores 0, its parent 1 {HOSTILE}"
    verdicts.append(Verdict(child, 3 * cycle, False, why, (1.0, 0.0), (0.0, 0.0), changed))
    return verdicts


def _examples() -> list[dspy.Example]:
    return [
        dspy.Example(
            ticket=f"My {TOPICS[v % 8]}, number {v}. {HOSTILE}", queue=QUEUES[v % 8]
        ).with_inputs("ticket")
        for v in range(VAL)
    ]


def _answers(
    population: Population, candidate: Candidate, step: int, rng: random.Random
) -> list[Rollout]:
    """A candidate's answers to the validation examples, which agree with its scores."""
    k = population.candidates.index(candidate)
    rollouts = []
    for v, score in enumerate(population.score_K_V[k]):
        queue = QUEUES[v % 8] if score else "amber"
        outputs = (
            {"reasoning": f"I think {HOSTILE}", "queue": queue} if rng.random() < 0.9 else None
        )
        trace = PredictorTrace("route", {"ticket": "…"}, outputs, f"{queue}, I think. {HOSTILE}")
        told = f"{'Right' if score else 'Wrong'}: it goes to {QUEUES[v % 8]}. {HOSTILE}"
        failure = None if outputs else Failure("parse", "No field queue.")
        own = (f"v{v:03}", candidate.id, (), (trace,), score, told, failure, step)
        rollouts.append(Rollout(*own))
    return rollouts


def _score(population: Population, step: int, skill: float, rng: random.Random) -> Population:
    rows = tuple(
        tuple(float(rng.random() < skill * (0.6 + v / VAL)) for v in range(VAL))
        for _ in population.candidates
    )
    return replace(population, score_K_V=rows, policy_version=step)


def _record(
    cycle: int,
    step: int,
    population: Population,
    rewards: list[float],
    counts: RolloutCounts,
    before: list[CycleRecord],
) -> CycleRecord:
    means = tuple(sum(row) / VAL for row in population.score_K_V)
    ids = tuple(c.id for c in population.candidates)
    top = min(range(len(ids)), key=lambda k: (-means[k], ids[k]))
    return CycleRecord(
        cycle=cycle,
        step=step,
        candidate_ids=ids,
        best_candidate_id=ids[top],
        train_reward=sum(rewards) / len(rewards) if rewards else None,
        val_score=means[top],
        val_scores=means,
        kl_to_base=0.02 * cycle,
        entropy=1.2 - 0.1 * cycle if rewards else None,
        constant_group_share=0.25,
        failure_shares={"parse": 0.125, "truncated": 0.05} if rewards else {},
        failure_messages={"parse": f"no field 'queue' in {HOSTILE}"} if rewards else {},
        rollouts=counts.minus(before[-1].total_rollouts) if before else counts,
        total_rollouts=counts,
        tokens={"prompt": 1000 * cycle, "completion": 200 * cycle},
        seconds={"fast": 2.0 * cycle, "slow": 11.0 * cycle, "eval": 1.0 + cycle},
        weights_version=f"synthetic@{step:012}",
    )


def _groups(
    population: Population, per_step: int, step: int, skill: float, rng: random.Random
) -> list[Group]:
    groups = []
    for _ in range(per_step // 8):
        example = rng.randrange(64)
        rollouts = tuple(
            _rollout(
                population.candidates[g % len(population.candidates)], example, step, skill, rng
            )
            for g in range(8)
        )
        groups.append(Group(f"e{example:03}", rollouts))
    return groups


def _rollout(
    candidate: Candidate, example: int, step: int, skill: float, rng: random.Random
) -> Rollout:
    topic, right = TOPICS[example % 8], QUEUES[example % 8]
    ticket = f"Hello, my {topic} request number {example} has had no answer for two weeks."
    queue = right if rng.random() < skill else rng.choice(("amber", "amber", "amber", *QUEUES))
    musing = " ".join(rng.choice(TOPICS + QUEUES) for _ in range(12))
    reasoning = f"The ticket is about {topic}; {musing}; the rule says {queue}."
    text = f"[[ ## reasoning ## ]]\n{reasoning}\n\n[[ ## queue ## ]]\n{queue}\n\n"
    failure, outputs = None, {"reasoning": reasoning, "queue": queue}
    chance = rng.random()
    if chance < 0.125:
        failure, text, outputs = Failure("parse", "No field queue."), f"{queue}, I think.", None
    elif chance < 0.175:
        failure, text, outputs = Failure("truncated", "Cut off."), text[:40], None
    elif chance < 0.195:
        text += HOSTILE
        outputs["reasoning"] = HOSTILE
    tokens = len(text) // 4
    reward = 0.0 if failure else float(queue == right)
    call = Call(
        "route",
        (*range(step % 7, 60), 200 + example),
        tuple(range(tokens)),
        tuple(-rng.random() for _ in range(tokens)),
        text,
        "length" if failure and failure.kind == "truncated" else "stop",
        1.0,
    )
    return Rollout(
        example_id=f"e{example:03}",
        candidate_id=candidate.id,
        calls=(call,),
        traces=(PredictorTrace("route", {"ticket": ticket}, outputs, text),),
        reward=reward,
        feedback=failure.message if failure else f"Lesson: {topic} tickets go to {right}.",
        failure=failure,
        policy_version=step - 1,
    )


def fake_prompt(ids_T) -> str:
    """A prompt as long and as repetitive as a real one, from the ids of a synthetic call."""
    rules = "\n".join(f"{t} tickets go to {q}." for t, q in zip(TOPICS, QUEUES, strict=True))
    fields = "\n".join(f"[[ ## {name} ## ]]\n{{{name}}}" for name in ("ticket", "queue"))
    return (
        f"<|system|>Your input fields are:\n1. `ticket` (str):\nYour output fields are:\n{fields}\n"
        f"Route the ticket.\n{rules[: 40 * (len(ids_T) % 7)]}\n<|user|>[[ ## ticket ## ]]\n"
        f"Ticket {ids_T[-1]} of the batch.\n\nRespond with the corresponding output fields."
        "<|assistant|>"
    )


def change_rows(folder: Path, name: str, change: Callable[[dict[str, Any]], Mapping[str, Any]]):
    """Change every row of a log: each with what ``change`` gives for it."""
    rows = [{**row, **change(row)} for row in read_jsonl(folder / name)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
