"""Demos as fast weights: what predictors did in successful training rollouts, shown as examples.

A bank keeps a bounded number of successful calls of every predictor. A proposal picks the few that
cover most: each different answer, then as many words of the inputs as fit the budget of tokens.
An answer that no rollout has found is shown by a labelled training example, without what only a
rollout can tell, such as the reasoning.
Every other proposal for a candidate that has demos takes some away, so that demos which no longer
help, because the weights have learned what they show, go again.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dspy

from fst_dspy.fast.proposers.labels import drawn
from fst_dspy.fast.proposers.protocol import Record, both_ends, well_formed
from fst_dspy.fast.proposers.words import length, telling_words
from fst_dspy.student.candidate import (
    DEMOS,
    canonical_json,
    decode_demos,
    encode_demos,
    make_candidate,
    plain_field,
    split_component,
)
from fst_dspy.types import Candidate, PredictorTrace, Rollout

SOURCE = "from_example"
"""Field of a learned demo that names the training example it came from. Adapters ignore it."""
BANK_SIZE = 64
"""Successful calls kept of each predictor."""
TOP_SHARE = 0.25
"""A rollout succeeds if its reward lies in this top share of the range of rewards seen."""
SHORT_ANSWER = 6
"""Outputs of at most this many words are answers to be covered one by one; others are prose."""
COUNTED = 4096
"""Demos whose tokens are remembered: a choice is made among the same ones again and again."""
NOT_SUPPLIED = "Not supplied for this particular example."
"""What DSPy's adapters write for a field that a demo lacks."""
DEMO_SHARE = 0.25
"""Of the context window, that a predictor's demos may take where nobody has said how much."""
DEMO_TOKENS = 512
"""Most that learned ones then take: whatever is rolled out reads them."""
ANSWER_WEIGHT = 4.0
"""What covering another answer counts for, where another input word counts for 1."""


@dataclass(frozen=True)
class BankedCall:
    """One predictor call of a rollout.

    Attributes:
        inputs, outputs: Its fields, as JSON values.
        example_id: The training example of the rollout.
        reward: The rollout's reward.
    """

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    example_id: str
    reward: float


class DemoProposer:
    """Proposes demos from a bank of successful calls. Deterministic; implements ``Proposer``.

    Args:
        demo_tokens: Most tokens for the learned demos of one predictor.
        count_tokens: Counts the tokens of a text, best with the local model's tokenizer.
    """

    def __init__(self, demo_tokens: int, count_tokens: Callable[[str], int]) -> None:
        self.demo_tokens = demo_tokens
        self._count = lru_cache(maxsize=COUNTED)(count_tokens)
        self._bank: dict[str, list[BankedCall]] = {}
        self._rewards: list[float] = []  # the lowest and the highest seen
        self._turns: dict[str, int] = {}
        self._fields: dict[str, list[list[str]]] = {}  # of predictors: inputs, and outputs
        self._examples: Mapping[str, dspy.Example] = {}
        self._labels: dict[str, list[BankedCall]] = {}

    def study(self, examples: Mapping[str, dspy.Example]) -> None:
        """Take training examples by id, whose labels may be shown."""
        self._examples, self._labels = examples, {}

    def know(self, predictor: str, inputs: list[str], outputs: list[str]) -> None:
        """Tell a predictor's fields, where no rollout has shown them yet."""
        self._fields.setdefault(predictor, [inputs, outputs])

    def bank(self, rollouts: Sequence[Rollout]) -> None:
        """Keep the calls of training rollouts that the metric scored. Never pass validation ones.

        Calls whose fields JSON cannot hold, such as images, are left out.
        """
        for rollout in rollouts:
            for trace in rollout.traces:
                if trace.outputs is not None:
                    fields = [list(trace.inputs), list(trace.outputs)]
                    self._fields.setdefault(trace.predictor, fields)
            if rollout.failure is not None:
                continue
            self._rewards = [
                min([*self._rewards, rollout.reward]),
                max([*self._rewards, rollout.reward]),
            ]
            wrong = _wrong_turns(rollout)
            for number, trace in enumerate(rollout.traces):
                if number in wrong:
                    continue
                call = _banked(trace, rollout.example_id, rollout.reward)
                if call is not None:
                    self._keep(trace.predictor, call)

    def ready(self, component: str) -> bool:
        """Whether there is a call of the component's predictor, or a label, to show."""
        predictor, _ = split_component(component)
        calls = self._bank.get(predictor, [])
        return any(map(self._succeeded, calls)) or bool(self._labelled(predictor))

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """New demos for each component: another choice, or, on every other turn, fewer.

        Examples among ``records`` are not shown: the proposal is about to be tried on them.
        A component for which there is nothing to show keeps its text.
        """
        return {name: self._propose(name, components[name], records[name]) for name in names}

    def state(self) -> dict[str, Any]:
        """The bank, for JSON."""
        return {
            "bank": {
                name: [dict(vars(call)) for call in calls] for name, calls in self._bank.items()
            },
            "rewards": list(self._rewards),
            "turns": dict(self._turns),
            "fields": {name: [list(f) for f in both] for name, both in self._fields.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the bank that :meth:`state` gave."""
        self._bank = {
            name: [BankedCall(**row) for row in rows] for name, rows in state["bank"].items()
        }
        self._rewards = list(state["rewards"])
        self._turns = dict(state["turns"])
        self._fields = {name: list(both) for name, both in state.get("fields", {}).items()}
        self._labels = {}

    def _keep(self, predictor: str, call: BankedCall) -> None:
        key = (call.inputs, call.outputs)
        calls = [c for c in self._bank.get(predictor, []) if (c.inputs, c.outputs) != key]
        calls.append(call)
        if len(calls) > BANK_SIZE:
            # The least rewarded goes, of these one with the commonest answer, the oldest of them.
            common = Counter(_answer(c) for c in calls)
            calls.remove(min(calls, key=lambda c: (c.reward, -common[_answer(c)])))
        self._bank[predictor] = calls

    def _succeeded(self, call: BankedCall) -> bool:
        low, high = self._rewards
        return call.reward > low and call.reward >= high - TOP_SHARE * (high - low)

    def _propose(self, component: str, text: str, records: Sequence[Record]) -> str:
        turn = self._turns[component] = self._turns.get(component, 0) + 1
        demos = decode_demos(text)
        learned = [demo for demo in demos if SOURCE in demo]
        own = [demo for demo in demos if SOURCE not in demo]
        if learned and turn % 2 == 0:
            return encode_demos([*own, *learned[: len(learned) // 2]])
        shown = {record["example_id"] for record in records}
        predictor, _ = split_component(component)
        calls = [call for call in self._bank.get(predictor, []) if self._succeeded(call)]
        found = {_answer(call) for call in calls}
        calls += [call for call in self._labelled(predictor) if _answer(call) not in found]
        calls = [call for call in calls if call.example_id not in shown]
        failed = set().union(*(_words(r["Inputs"]) for r in records if self._is_low(r["score"])))
        rng = random.Random(f"{component}|{turn}")
        chosen = self._cover(predictor, calls, failed, self.demo_tokens, rng)
        return encode_demos([*own, *map(_demo, chosen)]) if chosen else text

    def _is_low(self, reward: float) -> bool:
        return not self._rewards or reward < self._rewards[1]

    def _labelled(self, predictor: str) -> list[BankedCall]:
        """Labelled examples as calls of a predictor, where it is given what they hold."""
        if predictor in self._labels or predictor not in self._fields:
            return self._labels.get(predictor, [])
        inputs, outputs = self._fields[predictor]
        calls = []
        for ident, example in drawn([*self._examples.items()]):
            given, labels = dict(example.inputs()), dict(example.labels())
            told = {name: labels[name] for name in outputs if name in labels}
            if told and set(inputs) <= given.keys():
                trace = PredictorTrace(predictor, {name: given[name] for name in inputs}, told, "")
                calls.append(_banked(trace, ident, 0.0))
        self._labels[predictor] = [call for call in calls if call is not None]
        return self._labels[predictor]

    def _cover(
        self,
        predictor: str,
        calls: Sequence[BankedCall],
        failed: set[str],
        room: int,
        rng: random.Random,
    ) -> list[BankedCall]:
        """Greedy budgeted cover: the most not yet shown for its tokens, again and again."""
        cost = [self._tokens(_demo(call), predictor) for call in calls]
        words_N = [_words(call.inputs) for call in calls]
        common = Counter(word for words in words_N for word in words)
        weights: list[dict[str, float]] = []
        for call, words in zip(calls, words_N, strict=True):
            telling = [word for word in words if 2 * common[word] <= max(2, len(calls))]
            weight = {f"word {word}": 2.0 if word in failed else 1.0 for word in telling}
            weights.append({**weight, f"answer {_answer(call)}": ANSWER_WEIGHT})
        # Near equals change places from turn to turn, so that other sets get their chance.
        jitter = [rng.uniform(0.8, 1.2) for _ in calls]
        chosen: list[int] = []
        covered: set[str] = set()
        while True:
            gain = {
                i: jitter[i] * sum(w for f, w in weights[i].items() if f not in covered) / cost[i]
                for i in range(len(calls))
                if i not in chosen and cost[i] <= room
            }
            best = max(gain, key=lambda i: gain[i], default=None)
            if best is None or gain[best] <= 0:
                return [calls[i] for i in chosen]
            chosen.append(best)
            covered |= weights[best].keys()
            room -= cost[best]

    def _tokens(self, demo: dspy.Example, predictor: str = "") -> int:
        """Tokens that a demo takes in a prompt, as ChatAdapter marks its fields."""
        fields = {name: value for name, value in demo.toDict().items() if name != SOURCE}
        missing = [n for both in self._fields.get(predictor, []) for n in both if n not in fields]
        fields |= dict.fromkeys(missing, NOT_SUPPLIED)
        lines = [f"[[ ## {name} ## ]]\n{value}\n" for name, value in fields.items()]
        text = "\n".join([*lines, "[[ ## completed ## ]]\n"])
        return max(1, self._count(well_formed(text)))


def only_fewer(new: str, old: str) -> bool:
    """Whether one demos text is another with some demos taken away."""
    rows = [canonical_json(demo.toDict()) for demo in decode_demos(new)]
    before = [canonical_json(demo.toDict()) for demo in decode_demos(old)]
    return len(rows) < len(before) and set(rows) <= set(before)


def shown_examples(candidate: Candidate) -> frozenset[str]:
    """Ids of the training examples that a candidate's demos come from.

    A score on one of them says nothing: the answer stands in the prompt.
    """
    return frozenset(
        demo[SOURCE]
        for name, text in candidate.components.items()
        if SOURCE in text and split_component(name)[1] == DEMOS
        for demo in decode_demos(text)
        if SOURCE in demo
    )


def without_answer(candidate: Candidate, example_id: str | None) -> Candidate:
    """The candidate without the learned demos of one training example, if it shows any.

    That is another candidate, of another id, whose parent is the one given.
    """
    if example_id is None or example_id not in shown_examples(candidate):
        return candidate
    texts = {
        name: encode_demos(d for d in decode_demos(text) if d.get(SOURCE) != example_id)
        if split_component(name)[1] == DEMOS
        else text
        for name, text in candidate.components.items()
    }
    return make_candidate(texts, [candidate.id], candidate.cycle, candidate.source)


def _wrong_turns(rollout: Rollout) -> set[int]:
    """Which traces of an agent's rollout led to no action, or to a tool's error: no examples.

    A predictor that was run once a turn, or once more to end the episode, is the one that acted.
    """
    numbers: dict[str, list[int]] = {}
    for number, trace in enumerate(rollout.traces):
        numbers.setdefault(trace.predictor, []).append(number)
    return {
        number
        for own in numbers.values()
        if len(own) - len(rollout.turns) in (0, 1)
        for number, turn in zip(own, rollout.turns, strict=False)
        if turn.status != "ok"
    }


def _banked(trace: PredictorTrace, example_id: str, reward: float) -> BankedCall | None:
    if trace.outputs is None:
        return None
    try:
        inputs, outputs = (
            {name: plain_field(value) for name, value in fields.items()}
            for fields in (trace.inputs, trace.outputs)
        )
        json.dumps([inputs, outputs], ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):  # what JSON or Unicode cannot hold
        return None
    return BankedCall(inputs, outputs, example_id, reward)


def _demo(call: BankedCall) -> dspy.Example:
    return dspy.Example({**call.inputs, **call.outputs, SOURCE: call.example_id})


def _answer(call: BankedCall) -> str:
    short = {k: str(v) for k, v in call.outputs.items() if length(str(v)) <= SHORT_ANSWER}
    return canonical_json(short)


def _words(fields: Mapping[str, Any]) -> set[str]:
    found = telling_words(" ".join(both_ends(str(value)) for value in fields.values()))
    return {part for word in found for part in re.findall(r"\w+", word)}
