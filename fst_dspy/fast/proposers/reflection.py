"""Reflection through a language model, and how the run goes on when it fails or costs too much.

Every call is retried with growing pauses while the provider is busy, down or garbled. When the
budget is spent, or the provider fails call after call, the LM is left alone for good and a proposer
that needs none takes over. Whatever went wrong is counted by kind.
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.exceptions import LMError
from gepa.strategies.instruction_proposal import InstructionProposalSignature

from fst_dspy.display import visible
from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.protocol import (
    FEEDBACK,
    TRAJECTORY,
    HasState,
    LearnsFromRecords,
    ProposalError,
    Proposer,
    Record,
    StudiesExamples,
    shown,
    well_formed,
)
from fst_dspy.student.candidate import split_component, texts_in, tool_in

logger = logging.getLogger(__name__)

PROMPT_KEYS = ("Inputs", "Generated Outputs", TRAJECTORY, FEEDBACK, "score")
RETRIED = frozenset({"rate_limit", "server", "timeout", "transport", "garbled", "no_text"})
"""Kinds of failure that may pass; others, such as a wrong key, come back the same."""
GARBLED = re.compile(r"is not JSON|Expecting value|is not a list|JSONDecodeError")
MAX_PAUSE = 60.0
"""Longest pause before a retry, in seconds, whatever the provider asks for."""
MAX_FAILURES = 3
"""Calls that fail in a row, retries included, before the LM is left alone."""
MAX_CALLS_AT_ONCE = 8
CHARACTERS_A_TOKEN = 32
"""More than a token has in any language: a longer text is too long without counting its tokens."""
_TAG = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
THOUGHT_BEGINS = re.compile(rf"<{_TAG}>|\[(?:THINK|THINKING)\]")
THOUGHT_ENDS = re.compile(rf"</{_TAG}>|\[/(?:THINK|THINKING)\]")
"""The marks around a thought, where the provider leaves it in the answer."""
REFUSAL = re.compile(
    r"^\W*(?:unfortunately,? |as an? (?:ai|language model|assistant)\b[^.\n]{0,80}?, )?"
    r"(?:(?:i['’]?m|i am) (?:very |so )?(?:sorry|afraid)\b|sorry\b|i apologi[sz]e"
    r"|i (?:cannot|can['’]t|can not|won['’]t|will not|am unable to|am not able to|must decline)\b"
    r"|i['’]m (?:unable|not able) to\b)",
    re.IGNORECASE,
)
"""How a text begins that is no instruction but an excuse."""


@dataclass(frozen=True)
class ReflectionUsage:
    """What the reflection LM was used for.

    Attributes:
        calls: Calls that were answered.
        tokens: Prompt and completion tokens, as the provider counted them.
        cost: US dollars by litellm's price list, over the calls whose price is known.
        unpriced: Calls whose price is not known; they count in ``tokens`` alone.
        failures: Calls in a row that failed, up to now.
        fallbacks: Instructions that the proposer without a language model wrote instead.
        stopped: Why the LM is left alone, ``None`` while it is not.
    """

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0
    failures: int = 0
    fallbacks: int = 0
    stopped: str | None = None


class ReflectionLMProposer:
    """Has a language model rewrite the instruction, with GEPA's reflection prompt.

    Args:
        lm: Any ``dspy.LM``. Its own settings hold: temperature, timeout, cache, and
            ``num_retries`` for the attempts after the first. These leave the cache out, and so do
            all at a prompt that had an answer of no use: the cache would give that again.
        instruction_tokens: Most tokens that an instruction may have beyond the student's own: the
            longest that was to be improved and was not written here.
        count_tokens: Counts the tokens of a text, best with the local model's tokenizer.
        fallback: Proposes in place of the LM whenever it gives nothing usable. Without one, a
            failure is raised, and that iteration has no proposal.
        max_cost: Budget in US dollars, or ``None``. It is checked before each call.
        max_tokens: Budget in prompt and completion tokens, or ``None``.
        pause: Seconds before the first retry; doubled each time. A longer ``Retry-After`` holds.
        template: gepa's ``reflection_prompt_template``, for all components or by the names of
            some of them or of their predictors; ``None`` means gepa's own prompt.
    """

    waits = True
    """Most of its time it waits for the LM: it can be asked while the policy generates."""

    def __init__(
        self,
        lm: dspy.BaseLM,
        instruction_tokens: int,
        count_tokens: Callable[[str], int],
        *,
        fallback: Proposer | None = None,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        pause: float = 1.0,
        template: str | Mapping[str, str] | None = None,
    ) -> None:
        self.lm = lm
        self.instruction_tokens = instruction_tokens
        self.count_tokens = count_tokens
        self.fallback = fallback
        self.max_cost = max_cost
        self.max_tokens = max_tokens
        self.pause = pause
        self.usage = ReflectionUsage()
        self._faults: Counter[str] = Counter()
        self._told: set[str] = set()
        self._own: dict[str, int] = {}  # tokens of the student's own texts by component
        self._written: set[str] = set()  # keys of the texts that are not among these
        self._useless: set[str] = set()  # keys of prompts that had an answer of no use
        self._lock = threading.RLock()
        self.template = template

    @property
    def guard(self) -> CopyGuard | None:
        """The fallback's guard against copies of training examples."""
        guard = getattr(self.fallback, "guard", None)
        return guard if isinstance(guard, CopyGuard) else None

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """New instructions, one call of the LM for each, at the same time; see ``Proposer``.

        Raises:
            ProposalError: The LM gave nothing usable, and there is no ``fallback``.
        """
        names = texts_in(names)
        self.observe_all(records)

        def one(name: str) -> str:
            self._take_own(name, components[name])
            text = self._instruction(name, components, records[name])
            with self._lock:
                self._written.add(_key(text))
            return text

        if len(names) < 2:
            return {name: one(name) for name in names}
        with ThreadPoolExecutor(min(len(names), MAX_CALLS_AT_ONCE)) as threads:
            # The settings of dspy.context live in context variables, which threads do not inherit.
            futures = [threads.submit(contextvars.copy_context().run, one, name) for name in names]
            return {name: future.result() for name, future in zip(names, futures, strict=True)}

    def observe(self, component: str, records: Sequence[Record]) -> None:
        """Let the fallback learn, once it has had to take over: as a rule it never has to."""
        if self.usage.fallbacks and isinstance(self.fallback, LearnsFromRecords):
            self.fallback.observe(component, records)

    def study(self, examples: Mapping[str, dspy.Example]) -> None:
        """Let the fallback learn from training examples too."""
        if isinstance(self.fallback, StudiesExamples):
            self.fallback.study(examples)

    def observe_all(self, records: Mapping[str, Sequence[Record]]) -> None:
        """:meth:`observe` for several components."""
        for component, rows in records.items():
            self.observe(component, rows)

    def take_faults(self) -> Counter[str]:
        """Failures since the last call, by kind, that a retry or the fallback made good."""
        faults, self._faults = self._faults, Counter()
        return faults

    def state(self) -> dict[str, Any]:
        """What was spent, what was asked and written, and the fallback's memory, for JSON."""
        memory = self.fallback.state() if isinstance(self.fallback, HasState) else None
        with self._lock:
            return {
                "usage": dataclasses.asdict(self.usage),
                "fallback": memory,
                "own": dict(self._own),
                "written": sorted(self._written),
                "useless": sorted(self._useless),
            }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave. A provider that was down is tried again."""
        usage = ReflectionUsage(**state["usage"])
        self.usage = dataclasses.replace(usage, failures=0, stopped=None)
        self._own = dict(state.get("own", {}))
        self._written, self._useless = (set(state.get(n, ())) for n in ("written", "useless"))
        if isinstance(self.fallback, HasState) and state["fallback"] is not None:
            self.fallback.load_state(state["fallback"])

    def _instruction(
        self, name: str, components: Mapping[str, str], records: Sequence[Record]
    ) -> str:
        self._check_budget()
        if self.usage.stopped is None:
            try:
                return self._reflect(name, components[name], records)
            except ProposalError as error:
                if self.fallback is None:
                    raise
                self._count(error.kind)
                words = visible(str(error))
                level = logging.INFO if error.kind in self._told else logging.WARNING
                self._told.add(error.kind)
                logger.log(
                    level,
                    "no usable reflection on %s (%s): %s; the lessons in the feedback stand in",
                    *(name, error.kind, words),
                )
        elif self.fallback is None:
            raise ProposalError(
                "stopped", f"the reflection LM is no longer asked: {self.usage.stopped}"
            )
        with self._lock:
            self._add(fallbacks=1)
            return self.fallback.propose(components, {name: records}, [name])[name]

    def _take_own(self, name: str, text: str) -> None:
        """Count a text that is to be improved among the student's own, unless it was written here.

        It may be one of several that a run begins with: the longest of them is what counts.
        """
        with self._lock:
            if _key(text) not in self._written:
                tokens = self.count_tokens(well_formed(text))
                self._own[name] = max(tokens, self._own.get(name, 0))

    def limit(self, name: str) -> int:
        """Tokens that a component's text may have: the student's own, and what may be learned."""
        return self._own.get(name, 0) + self.instruction_tokens

    def prompt_template(self, name: str) -> str:
        """The reflection prompt of a component, with what every new instruction must keep to."""
        own = self.template
        if isinstance(own, Mapping):
            own = own.get(name, own.get(split_component(name)[0]))
        words = max(1, self.limit(name) * 2 // 3)  # English: about 1.5 tokens a word
        tool = tool_in(name)
        if tool is not None:
            return (
                f"{own or InstructionProposalSignature.default_prompt_template}\n\n"
                "What is to be written is not the instruction itself but the description of the "
                f"tool {tool!r}, by which the assistant chooses and calls it. Say what it does, "
                "when it is of use and when not; lines at the end may describe an argument each, "
                f"as 'argument: what it is'. It must not be longer than {words} words."
            )
        return (
            f"{own or InstructionProposalSignature.default_prompt_template}\n\n"
            f"The new instruction must not be longer than {words} words, and must still name every "
            "input field that the current one names."
        )

    def _reflect(self, name: str, instruction: str, records: Sequence[Record]) -> str:
        prompt = InstructionProposalSignature.prompt_renderer(
            {
                "current_instruction_doc": instruction,
                "dataset_with_feedback": [shown(record, PROMPT_KEYS) for record in records],
                "prompt_template": self.prompt_template(name),
            }
        )
        key = _key(str(prompt))
        try:
            proposal = self._read(self._ask(str(prompt), key in self._useless))
            self._check_text(proposal, self.limit(name))
            dropped = dropped_fields(instruction, proposal, records)
            if dropped and tool_in(name) is None:  # a description need not name a program's inputs
                raise ProposalError(
                    "dropped_field",
                    f"the proposal no longer mentions the input {', '.join(dropped)}",
                )
        except ProposalError:
            with self._lock:
                self._useless.add(key)
            raise
        return proposal

    def _read(self, answer: str) -> str:
        """The instruction in an answer.

        Raises:
            ProposalError: There is but a thought that was cut off.
        """
        said = without_thoughts(answer)
        if said is None:
            raise ProposalError("truncated", "the reflection LM's answer ends within its thought")
        return str(InstructionProposalSignature.output_extractor(said)["new_instruction"]).strip()

    def _check_text(self, proposal: str, limit: int) -> None:
        """Check that a text can be an instruction, of so many tokens at most.

        Raises:
            ProposalError: It cannot.
        """
        if not proposal:
            raise ProposalError("empty", "the reflection LM proposed an empty instruction")
        if REFUSAL.match(proposal):
            raise ProposalError("refused", f"the reflection LM refused: {proposal[:200]!r}")
        if len(proposal) > limit * CHARACTERS_A_TOKEN:
            raise ProposalError(
                "too_long", f"the proposal has {len(proposal)} characters, over {limit} tokens"
            )
        if proposal != well_formed(proposal):
            raise ProposalError("garbled", "the proposal holds what is no character")
        tokens = self.count_tokens(proposal)
        if tokens > limit:
            raise ProposalError("too_long", f"the proposal has {tokens} tokens, over {limit}")

    def _ask(self, prompt: str, anew: bool) -> str:
        """The LM's answer, after as many attempts as it takes or ``num_retries`` allows.

        Args:
            prompt: What is asked.
            anew: Whether an answer from the LM's cache is of no use.
        """
        attempts = 1 + max(0, int(getattr(self.lm, "num_retries", 0) or 0))
        for attempt in range(attempts):
            try:
                answer = self._call(prompt, anew or attempt > 0)
            except Exception as error:
                kind = kind_of(error)
                if kind not in RETRIED or attempt + 1 == attempts:
                    self._failed(f"{attempt + 1} attempts, {kind}: {error}")
                    raise ProposalError(kind, f"the reflection LM failed: {error}") from error
                self._count(kind)
                asked = getattr(error, "retry_after", None) or 0.0
                time.sleep(min(MAX_PAUSE, max(asked, self.pause * 2**attempt)))
            else:
                with self._lock:
                    self.usage = dataclasses.replace(self.usage, failures=0)
                if answer.fault is not None:  # asked again, it would cost as much again
                    raise ProposalError(*answer.fault)
                return answer.text
        raise AssertionError("unreachable")

    def _call(self, prompt: str, anew: bool) -> _Answer:
        # A copy has a history of its own, so that calls at the same time can be told apart.
        own = {"num_retries": 0, **({"cache": False} if anew else {})}
        lm = self.lm.copy(**{name: value for name, value in own.items() if hasattr(self.lm, name)})
        with dspy.context(disable_history=False):
            answers = lm(prompt)
        entry = lm.history[-1] if lm.history else {}
        used = entry.get("usage") or {}
        tokens = int(used.get("total_tokens") or 0)
        cost = entry.get("cost")
        billed = tokens > 0  # a cache hit reports no usage
        unknown = billed and cost is None
        if unknown and self.max_cost is not None and self.usage.unpriced == 0:
            logger.warning(
                "the price of reflection LM %s is not known: max_reflection_cost cannot hold it "
                "back, max_reflection_tokens can",
                self.lm.model,
            )
        self._add(calls=1, tokens=tokens, cost=(cost or 0.0) if billed else 0.0, unpriced=unknown)
        answer = answers[0] if answers else ""
        text = answer.get("text") if isinstance(answer, dict) else answer
        fault = _fault(entry.get("response"))
        if fault is None and (not isinstance(text, str) or not text.strip()):
            raise ProposalError("no_text", "the reflection LM answered with no text")
        return _Answer(text if isinstance(text, str) else "", fault)

    def _check_budget(self) -> None:
        spent = None
        if self.max_cost is not None and self.usage.cost >= self.max_cost:
            spent = f"its budget of {self.max_cost:g} USD is spent"
        if self.max_tokens is not None and self.usage.tokens >= self.max_tokens:
            spent = f"its budget of {self.max_tokens} tokens is spent"
        if spent is not None:
            self._stop(spent)

    def _failed(self, message: str) -> None:
        self._add(failures=1)
        if self.usage.failures >= MAX_FAILURES:
            self._stop(f"{self.usage.failures} calls in a row failed ({message[:200]})")

    def _stop(self, reason: str) -> None:
        with self._lock:
            if self.usage.stopped is not None:
                return
            self.usage = dataclasses.replace(self.usage, stopped=reason)
        instead = "going on with the lessons in the feedback" if self.fallback else "no fallback"
        logger.warning("the reflection LM is no longer asked: %s; %s", visible(reason), instead)

    def _count(self, kind: str) -> None:
        with self._lock:
            self._faults[kind] += 1

    def _add(self, **counts: float) -> None:
        with self._lock:
            sums = {name: getattr(self.usage, name) + value for name, value in counts.items()}
            self.usage = dataclasses.replace(self.usage, **sums)


@dataclass(frozen=True)
class _Answer:
    """A text, and why it is of no use: a kind and a message, ``None`` where it may be."""

    text: str
    fault: tuple[str, str] | None


def _key(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def without_thoughts(answer: str) -> str | None:
    """What an answer says behind its thoughts; ``None`` where one of these has no end.

    Of some models the prompt has opened the thought, so that the answer holds its end alone. Marks
    within an answer that begins with none, such as an instruction that asks for thoughts, stay.
    """
    while True:
        begins, ends = THOUGHT_BEGINS.search(answer), THOUGHT_ENDS.search(answer)
        opened = begins is not None and not answer[: begins.start()].strip()
        if ends is None:
            return None if opened else answer
        if begins is not None and begins.start() < ends.start() and not opened:
            return answer
        answer = answer[ends.end() :]


def _fault(response: Any) -> tuple[str, str] | None:
    """Why a provider's response is no whole answer, if it says so."""
    responses = response if isinstance(response, list | tuple) else [response]
    choices = [c for r in responses for c in (_get(r, "choices") or [r])]
    ended = {str(_get(choice, "finish_reason")) for choice in choices}
    reasons = {str(_get(_get(choice, "incomplete_details"), "reason")) for choice in choices}
    if "length" in ended or "max_output_tokens" in reasons:
        return "truncated", "the reflection LM's answer was cut off; give it more max_tokens"
    parts = [p for choice in choices for p in _get(_get(choice, "message"), "parts") or ()]
    messages = [_get(choice, "message") for choice in choices]
    messages += [_get(message, "provider_specific_fields") for message in messages]
    refused = any(_get(message, "refusal") for message in messages)
    refused = refused or any(_get(part, "type") == "refusal" for part in parts)
    if refused or "content_filter" in ended | reasons:
        return "refused", "the reflection LM refused to answer"
    return None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def kind_of(error: Exception) -> str:
    """The kind of a failed call: DSPy's error code, or ``"garbled"`` where it hides bad JSON."""
    if isinstance(error, ProposalError):
        return error.kind
    if GARBLED.search(str(error)):
        return "garbled"
    return error.code if isinstance(error, LMError) else type(error).__name__


def dropped_fields(old: str, new: str, records: Sequence[Record]) -> list[str]:
    """Input fields that the old instruction names and the new one does not.

    A field is named by its name as a word, in any case, in the singular or the plural. Letters of
    other scripts may stand next to it: many of these have no space between words.
    """
    fields = sorted({field for record in records for field in record["Inputs"]})
    return [field for field in fields if _names(old, field) and not _names(new, field)]


def _names(text: str, field: str) -> bool:
    name = r"[\W_]+".join(map(re.escape, field.split("_")))
    return re.search(rf"(?<![a-z0-9]){name}s?(?![a-z0-9])", text, re.IGNORECASE) is not None
