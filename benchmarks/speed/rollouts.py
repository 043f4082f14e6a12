"""(a) Rollouts through DSPy, against raw batched ``model.generate``, and against one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import torch
from dspy import lm15

from benchmarks.speed.measure import Row, alternate, ratios, row_of
from benchmarks.speed.models import (
    MODELS,
    WholeAnswer,
    early_letters,
    program,
    questions,
    without_end,
)
from fst_dspy import LocalLM
from fst_dspy.config import SamplingConfig
from fst_dspy.lm.requests import prompt_ids
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.rollouts.jobs import RolloutJob, calls_of
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.types import Call

GROUP = 8


@dataclass(frozen=True)
class Workload:
    """P problems of about ``prompt`` tokens, G rollouts each, of exactly ``completion`` tokens."""

    model: str
    name: str
    problems: int
    prompt: int
    completion: int
    goal: str


WORKLOADS = (
    Workload("embedded", "prompt 4 x completion", 8, 192, 48, ">= 1.3"),
    Workload("embedded", "equal lengths", 8, 128, 128, ">= 0.95"),
    Workload("middle", "prompt 4 x completion", 8, 128, 32, ">= 1.3"),
    Workload("middle", "equal lengths", 8, 96, 96, ">= 0.95"),
)


def run(quick: bool) -> Iterator[Row]:
    """A row a workload and question."""
    for work in WORKLOADS[: 1 if quick else None]:
        yield from _Side(work).rows(1 if quick else 5 if work.model == "embedded" else 3)


class _Side:
    """One workload, and the ways to get through it."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.lm = without_end(MODELS[work.model]())
        self.examples = questions(self.lm, work.problems, work.prompt)
        self.program = program()
        candidate = seed_candidate(self.program)
        self.jobs = [RolloutJob(e, candidate, i) for e in self.examples for i in range(GROUP)]
        sampling = SamplingConfig(max_tokens=work.completion)
        with dspy.context(adapter=WholeAnswer()):
            self.runner = RolloutRunner(self.program, early_letters, self.lm, sampling, 0)
        self.calls: list[Call] = []
        self.dspy_rollouts()

    def rows(self, repeats: int) -> Iterator[Row]:
        work = self.work
        batched = {"generate": self.raw_generate, "rollouts": self.dspy_rollouts}
        times = alternate(batched, repeats)
        label = f"{work.model}, {work.name}: "
        prompt = len(self.calls[0].prompt_ids_T)
        sizes = f"{len(self.jobs)} rollouts of {prompt} + {work.completion} tokens"
        tokens = len(self.jobs) * work.completion
        yield row_of(
            "a", label + "rollouts against batched generate", "x",
            ratios(times, "generate", "rollouts"), work.goal,
            f"{sizes}; {tokens / min(times['rollouts']):.0f} against "
            f"{tokens / min(times['generate']):.0f} tokens/s",
        )  # fmt: skip
        single = {"rollouts": self.dspy_rollouts, "stock": self.stock_one_by_one,
                  "local": self.local_one_by_one}  # fmt: skip
        times = alternate(single, max(1, repeats - 2))
        for name, how in (("stock", "generate"), ("local", "LocalLM")):
            # Only the first rollout of each problem is run one at a time.
            values = [GROUP * ratio for ratio in ratios(times, name, "rollouts")]
            yield row_of("a", f"{label}rollouts against one {how} call at a time", "x", values,
                         ">= 15" if name == "stock" else "")  # fmt: skip
        yield row_of("a", label + "greedy completions that differ from generate's", "of all",
                     [self.greedy_differences()], "<= 0")  # fmt: skip
        yield row_of("a", label + "logprobs against a full forward pass, largest difference",
                     "nats", [self.logprob_difference()], "<= 1e-4")  # fmt: skip

    def dspy_rollouts(self) -> None:
        """All rollouts, as a slow step runs them."""
        self.calls = calls_of(self.runner.run(self.jobs, channel="slow", salt=0))

    def raw_generate(self, *, sample: bool = True) -> torch.Tensor:
        """The same prompts and lengths in one call of transformers' own ``generate``."""
        return stock_generate(
            self.lm, [call.prompt_ids_T for call in self.calls], self.work.completion, sample
        )

    def stock_one_by_one(self) -> None:
        """DSPy over a model that answers one call at a time."""
        self._one_by_one(dspy.LM("stock", engine=StockEngine(self.lm, self.work.completion),
                                 cache=False, num_retries=0))  # fmt: skip

    def local_one_by_one(self) -> None:
        """The same through ``LocalLM``, which can do no better with one call at a time."""
        self._one_by_one(self.lm.live().copy(max_tokens=self.work.completion, num_retries=0))

    def _one_by_one(self, lm: dspy.LM) -> None:
        with dspy.context(lm=lm, adapter=WholeAnswer(), disable_history=True):
            for example in self.examples:
                early_letters(example, self.program(**example.inputs()))

    def greedy_differences(self) -> float:
        """Share of greedy completions that are not ``generate``'s, token for token."""
        length = self.work.completion
        requests = [GenerationRequest(c.prompt_ids_T, length, 0.0) for c in self.calls[::GROUP]]
        ours = [list(result.completion_ids_T) for result in generate(self.lm.policy, requests)]
        # One prompt at a time: left padding makes generate's own rounding depend on the batch.
        theirs = [
            stock_generate(self.lm, [request.prompt_ids_T], length, False)[0].tolist()
            for request in requests
        ]
        return sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(ours)

    def logprob_difference(self) -> float:
        """Largest difference of a sampled token's log-probability from a full forward pass."""
        worst = 0.0
        for call in self.calls[::3]:
            ids = torch.tensor([call.prompt_ids_T + call.completion_ids_T])
            with torch.no_grad():
                logits_TV = self.lm.policy.model(ids).logits[0, len(call.prompt_ids_T) - 1 : -1]
            expected_T = logits_TV.log_softmax(-1).gather(1, ids[0, -len(logits_TV) :, None])[:, 0]
            worst = max(worst, (expected_T - torch.tensor(call.logprobs_T)).abs().max().item())
        return worst


class StockEngine:
    """A DSPy engine that calls ``model.generate`` for one prompt at a time."""

    def __init__(self, lm: LocalLM, max_tokens: int) -> None:
        self.lm, self.max_tokens = lm, max_tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> StockEngine:
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        ids = prompt_ids(self.lm.policy, request)
        answer = stock_generate(self.lm, [ids], self.max_tokens, True)[0]
        text = self.lm.policy.tokenizer.decode(answer, skip_special_tokens=True)
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message(role="assistant", parts=(lm15.TextPart(text),)),
            finish_reason="length",
            usage=lm15.Usage(input_tokens=len(ids), output_tokens=len(answer)),
        )

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        raise lm15.UnsupportedFeatureError("no streaming", feature="stream")


def stock_generate(
    lm: LocalLM, prompts: Sequence[Sequence[int]], length: int, sample: bool
) -> torch.Tensor:
    """``model.generate`` on left-padded prompts; the completions' ids."""
    policy, widest = lm.policy, max(map(len, prompts))
    fill = policy.tokenizer.pad_token_id
    ids = torch.tensor([[fill] * (widest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        output = policy.model.generate(
            ids, attention_mask=mask, max_new_tokens=length, do_sample=sample, top_k=0,
            pad_token_id=fill,
        )  # fmt: skip
    return output[:, widest:]
