"""What a cache kept from call to call of a rollout would save: an estimate, in tokens and seconds.

    python -m benchmarks.speed.call_history

For 8 problems of 8 rollouts, all of whose texts differ: the prompt tokens that the engine reads,
with what a round's prompts begin with alike read once; and the fewest that caches which were all
kept would leave to read. One program is ``multihop``, the other a ``dspy.ReAct`` loop of four
calls, whose prompts grow by a step each. For the loop, 16 of the rollouts are then read, answered
in 40 tokens a call and trained on, in CPU seconds on one thread.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import dspy
import torch
from rich.console import Console

from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import find_prefixes
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.tasks import load_task
from fst_dspy.types import TrainingRow

P, G, CALLS = 8, 8, 4
TIMED, ANSWER = 16, 40  # rollouts that are timed, and tokens of an answer
Prompt = tuple[int, ...]
console = Console()


def read_now(prompts_R_N: Sequence[Sequence[Prompt]]) -> int:
    """Prompt tokens read in R rounds by N rollouts, one call each a round."""
    read = 0
    for prompts_N in prompts_R_N:
        distinct = list(dict.fromkeys(prompts_N))
        read += sum(map(len, distinct)) - find_prefixes(distinct).saved
    return read


def read_at_least(prompts_R_N: Sequence[Sequence[Prompt]]) -> int:
    """Those that are left when nothing is read twice, in whichever round or rollout it was."""
    prompts = sorted(itertools.chain(*prompts_R_N))
    common = sum(itertools.starmap(_common, itertools.pairwise(prompts)))
    return sum(map(len, prompts)) - common


def _common(one: Prompt, other: Prompt) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def encode(policy: Policy, predict: dspy.Predict, **inputs: str) -> Prompt:
    """A call's prompt as the engine gets it."""
    messages = dspy.ChatAdapter().format(predict.signature, predict.demos, inputs)
    ids = policy.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(ids)


def multihop(policy: Policy) -> list[list[Prompt]]:
    """Two rounds; the second's facts differ from rollout to rollout."""
    task = load_task("multihop", 0)
    search, rng = task.program.search, random.Random(0)
    rounds: list[list[Prompt]] = [[], []]
    for example, _ in itertools.product(task.trainset[:P], range(G)):
        found = search(example.claim, 2)
        fact = rng.choice(task.trainset).fact
        calls = (task.program.write_query, found), (task.program.judge, [*found, fact])
        for prompts_N, (module, facts) in zip(rounds, calls, strict=True):
            text = "\n".join(facts)
            prompts_N.append(encode(policy, module.predict, claim=example.claim, facts=text))
    return rounds


def react(policy: Policy) -> list[list[Prompt]]:
    """A loop that looks one fact up with each call."""
    task, rng = load_task("multihop", 0), random.Random(0)

    def look_up(query: str) -> str:
        """Find a fact."""
        return query

    agent = dspy.ReAct("claim -> verdict", tools=[look_up], max_iters=CALLS)
    rounds: list[list[Prompt]] = [[] for _ in range(CALLS)]
    for example, _ in itertools.product(task.trainset[:P], range(G)):
        trajectory: dict[str, object] = {}
        for number, prompts_N in enumerate(rounds):
            shown = agent._format_trajectory(trajectory)
            inputs = {"claim": example.claim, "trajectory": shown}
            prompts_N.append(encode(policy, agent.react, **inputs))
            fact = rng.choice(task.trainset).fact
            trajectory |= {
                f"thought_{number}": f"The claim needs to know: {fact}",
                f"tool_name_{number}": "look_up",
                f"tool_args_{number}": {"query": fact},
                f"observation_{number}": rng.choice(task.trainset).fact,
            }
    return rounds


def seconds(policy: Policy, prompts_R_N: Sequence[Sequence[Prompt]]) -> dict[str, float]:
    """CPU seconds to read the prompts, to answer them and to take an optimizer step on them."""
    spent = {"reading": 0.0, "answering": 0.0}
    rows = []
    for prompts_N in prompts_R_N:
        for name, length in (("reading", 1), ("answering", ANSWER)):
            started = time.process_time()
            results = generate(policy, [GenerationRequest(ids, length) for ids in prompts_N])
            spent[name] += time.process_time() - started
        for number, (ids, result) in enumerate(zip(prompts_N, results, strict=True)):
            advantage = 1.0 if number % 2 else -1.0
            rows.append(TrainingRow(ids, result.completion_ids_T, result.logprobs_T, advantage))
    spent["answering"] -= spent["reading"]
    trainer = SlowTrainer(policy, SlowConfig(), SamplingConfig(), 1, 0)
    started = time.process_time()
    trainer.advance(rows)
    return {**spent, "training": time.process_time() - started}


def main() -> None:
    """Print the estimate for both programs."""
    torch.set_num_threads(1)
    policy = Policy.load("embedded", device="cpu")
    for name, prompts_R_N in (("multihop", multihop(policy)), ("ReAct", react(policy))):
        whole = sum(len(prompt) for prompts_N in prompts_R_N for prompt in prompts_N)
        console.print(
            f"{name}: {P * G} rollouts of {len(prompts_R_N)} calls, {whole} prompt tokens; read "
            f"now {read_now(prompts_R_N)}, at least {read_at_least(prompts_R_N)}",
            soft_wrap=True,
        )
    loop = [prompts_N[:TIMED] for prompts_N in prompts_R_N]
    spent = seconds(policy, loop)
    told = ", ".join(f"{name} {value:.2f} s" for name, value in spent.items())
    console.print(
        f"{TIMED} rollouts of the loop: {told}; of it is read twice "
        f"{1 - read_at_least(loop) / read_now(loop):.0%} of the reading"
    )


if __name__ == "__main__":
    main()
