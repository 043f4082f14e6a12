"""A local and a remote model that answer in the format they are asked in, and keep what they were
asked; and a program run three ways with them: plainly, in a rollout, and compiled.
"""

from __future__ import annotations

import asyncio
import enum
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dspy
import pydantic
from dspy import lm15

from fst_dspy.config import SamplingConfig
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import bound_to, find_local_lm
from fst_dspy.model.generate import GenerationRequest, GenerationResult
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.types import Rollout

QA, DRAFT, QUESTION = "question -> answer", "question -> draft", {"question": "where?"}


class Place(pydantic.BaseModel):
    """A typed value."""

    city: str
    zip: int


class Kind(enum.Enum):
    """Another."""

    WARM = "warm"
    COLD = "cold"


ANSWERS: dict[str, Any] = {
    "reasoning": "so it is", "rationale": "thus", "answer": "jade", "draft": "a draft",
    "place": {"city": "Rome", "zip": 7}, "places": [{"city": "Oslo", "zip": 1}], "kind": "warm",
    "day": "2024-02-03", "score": 0.5, "count": 3, "flag": True, "tags": ["a", "b"],
    "next_thought": "I look", "choice": "left",
    "advice": {"self": "N/A", "a": "shorter"}, "discussion": "hm", "query": "what",
    "generated_code": "SUBMIT({'answer': 'jade'})", "finished": True, "code_output": "1",
    "code": "print(llm_query('which stone?'))\nSUBMIT(answer='jade')", "maybe": "yes",
    "table": {"x": 1}, "kinds": ["warm", "cold"], "by_name": {"a": {"city": "Bern", "zip": 3}},
    "either": 7, "both": ["x", 1], "point": {"x": 1.5, "y": 2}, "amount": "12.50",
}  # fmt: skip
LOOK: dict[str, Any] = {"name": "look", "args": {"word": "x"}}


def answer_to(prompt: str) -> str:
    """An answer in the format that the prompt asks for."""
    listed = re.search(r"Your output fields are:\n(.*?)\n(?:All|In adhering)", prompt, re.S)
    names = re.findall(r"^\d+\. `(\w+)`", listed[1], re.M) if listed else []
    if not names:  # the first step of a TwoStepAdapter, or a plain call
        return "it is jade, in Rome, at zip 7"
    done = "observation_0" in prompt or "is jade" in prompt
    submit = {"name": "submit", "args": {"answer": "jade"}}
    steps = {
        "next_tool_name": "finish" if done else "look",
        "next_tool_args": {} if done else LOOK["args"],
        "tool_calls": {"tool_calls": [submit if done else LOOK]},
    }
    values = {name: steps.get(name, ANSWERS.get(name)) for name in names}
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in values.items()}
    if "[[ ## completed ## ]]" in prompt and "JSON object in the following order" not in prompt:
        rows = [f"[[ ## {name} ## ]]\n{text}" for name, text in texts.items()]
        return "\n\n".join([*rows, "[[ ## completed ## ]]"])
    if f"<{names[0]}>" in prompt:
        return "\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in texts.items())
    return json.dumps(values)


@dataclass
class Models:
    """The local model, a remote one, and what both were asked."""

    policy: Policy
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)

    def generate(self, policy: Policy, requests: list[GenerationRequest]) -> list[GenerationResult]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: GenerationRequest) -> GenerationResult:
        tokenizer = self.policy.tokenizer
        prompt = tokenizer.decode(request.prompt_ids_T)
        kept = (request.max_tokens, request.temperature, request.top_p, request.stop)
        self.asked.append(("local", prompt, *kept))
        ids = tuple(tokenizer.encode(answer_to(prompt)))[: request.max_tokens]
        text = tokenizer.decode(ids)
        return GenerationResult(ids, (0.0,) * len(ids), text, "stop")

    def complete(self, request: lm15.Request) -> lm15.Response:
        """The remote one's."""
        texts = [
            request.system or "",
            *("".join(getattr(p, "text", p.type) for p in m.parts) for m in request.messages),
        ]
        self.parts |= {part.type for message in request.messages for part in message.parts}
        prompt = "\n".join(t if isinstance(t, str) else t[0].text for t in texts)
        self.asked.append(("remote", prompt, request.config.max_tokens, request.config.temperature))
        return lm15.Response(
            id=None, model=request.model, finish_reason="stop",
            message=lm15.Message.assistant(answer_to(prompt)),
            usage=lm15.Usage(input_tokens=1, output_tokens=1),
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Models:
        return self

    def local(self, **settings: Any) -> LocalLM:
        return LocalLM(self.policy, **{"cache": False, "max_tokens": 700, **settings})

    def remote(self, **settings: Any) -> dspy.LM:
        return dspy.LM("remote", engine=self, cache=False, num_retries=0, **settings)

    def take(self) -> list[tuple[Any, ...]]:
        asked, self.asked = self.asked, []
        return sorted(asked, key=repr)


def models_over(path: Any) -> Models:
    """Models, the local one with the tokenizer and the weights of a folder."""
    policy = Policy.load(path)
    policy.context_length = 20_000
    found = Models(policy)
    policy.generator = found.generate
    return found


def module(forward: Callable[..., Any], **parts: Any) -> dspy.Module:
    """A program of some parts; ``forward`` may be async."""
    name = "aforward" if asyncio.iscoroutinefunction(forward) else "forward"
    kind = type("Program", (dspy.Module,), {name: forward})
    program = kind()
    for part, value in parts.items():
        setattr(program, part, value)
    return program


def plainly(program: dspy.Module, inputs: dict[str, Any]) -> Any:
    if hasattr(type(program), "aforward") and not hasattr(type(program), "forward"):
        return asyncio.run(program.acall(**inputs))
    return program(**inputs)


def roll(
    program: dspy.Module,
    inputs: dict[str, Any],
    lm: LocalLM | None = None,
    count: int = 1,
    metric: Any = None,
    sampling: SamplingConfig | None = None,
    **more: Any,
) -> tuple[list[Rollout], list[Any]]:
    given: list[Any] = []

    def keep(gold: Any, pred: Any, *_: Any) -> float:
        given.append(pred)
        return 1.0

    example = dspy.Example(**inputs).with_inputs(*inputs)
    lm = lm or find_local_lm(program)
    runner = RolloutRunner(program, metric or keep, lm, sampling or SamplingConfig(), 0, **more)
    jobs = [RolloutJob(example, seed_candidate(program), i) for i in range(count)]
    return runner.run(jobs, channel="slow", salt=0), given


def types_of(prediction: Any) -> dict[str, Any]:
    values = prediction if hasattr(prediction, "items") else {"": prediction}
    return {name: (type(value), str(value)) for name, value in values.items()}


def one_in_three_ways(
    models: Models, adapter: dspy.Adapter, make: Callable[[Models], dspy.Module], inputs: Any
) -> list[tuple[Any, ...]]:
    """Run a program plainly, in a rollout and compiled: the same requests, the same outputs.

    Returns the requests.
    """
    lm = models.local()
    with dspy.context(lm=lm, adapter=adapter):
        program = make(models)
        expected = plainly(program, inputs)
        asked = models.take()
        assert asked and expected is not None
        (rollout,), (given,) = roll(program, inputs)
        assert rollout.failure is None, rollout.failure
        assert models.take() == asked
        assert types_of(given) == types_of(expected)
        local = [one for one in asked if one[0] == "local"]
        assert len(rollout.calls) == len(local)
        compiled = bound_to(program, seed_candidate(program), lm.at(lm.version))
        assert types_of(plainly(compiled, inputs)) == types_of(expected)
        assert models.take() == asked
        assert types_of(plainly(compiled.deepcopy(), inputs)) == types_of(expected)
        assert models.take() == asked
    return asked


def look(word: str) -> str:
    """Looks a word up."""
    return f"{word} is jade"


Make = Callable[[Models], dspy.Module]


class Shapes(dict[str, tuple[Any, dict[str, Any]]]):
    """Programs by name: how each is made, and what it is asked."""

    def add(self, name: str, **inputs: Any) -> Callable[[Any], Any]:
        """A decorator of what makes a program; it is asked a question where nothing is said."""

        def added(make: Any) -> Any:
            self[name] = (make, inputs or QUESTION)
            return make

        return added
