"""One rollout in its thread: the program run, watched, scored, and all of it kept."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import dspy
from dspy import lm15
from dspy.utils.exceptions import (
    AdapterParseError,
    ContextWindowExceededError,
    is_retryable_lm_error,
)

from fst_dspy.config import SamplingConfig
from fst_dspy.errors import LOST, MetricError, said_of
from fst_dspy.lm.answers import ends_in_thought, fills_context
from fst_dspy.lm.asked import wanted_format
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.health import AT_THE_END, IN_THOUGHT
from fst_dspy.rollouts.inputs import own_inputs
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.quiet import OwnTime
from fst_dspy.rollouts.scheduler import RolloutEnded, Scheduler, Slot
from fst_dspy.rollouts.session import OpenCall, Session
from fst_dspy.student.candidate import example_id
from fst_dspy.student.metric import Score, ask_about_predictor, call_metric
from fst_dspy.types import Call, Failure, FailureKind, Rollout

TOLD = "fst_told"
"""The DSPy setting that holds from where DSPy has warned in the rollouts of a run."""
SHOWN = 80
"""Characters of an answer that could not be read, that are quoted where it is explained."""


@dataclass(frozen=True)
class Setting:
    """What the rollouts of a batch have in common.

    Attributes:
        metric: See ``fst_dspy.student.metric``.
        sampling: Limits and the failure score.
        settings: DSPy's settings that a rollout has of its own, such as the language model.
        version: The weights to sample from.
        ask_predictors: Ask the metric about each predictor too.
        explains_format: Say of an answer that could not be read why, and what was wanted.
    """

    metric: Callable[..., Any]
    sampling: SamplingConfig
    settings: Mapping[str, Any]
    version: str
    ask_predictors: bool
    explains_format: bool = False


class RolloutThread:
    """One rollout in its thread; everything it learns is in plain attributes.

    Args:
        setting: What it has in common with others.
        make_program: Gives the program with the candidate's texts in it, for this rollout alone,
            and its predictors by name.
        job: The example and the candidate.
        slot, scheduler: Its place among those that generate together.

    Attributes:
        done: Set once it has ended.
        error: What the program or the metric raised, if it ended by that.
        unasked: What the metric raised when it was asked about a predictor, if it did.
        interrupt: What ends the whole run, if the program or metric raised it: Ctrl-C.
    """

    def __init__(
        self,
        setting: Setting,
        make_program: Callable[[], tuple[dspy.Module, dict[str, dspy.Predict]]],
        job: RolloutJob,
        slot: Slot,
        scheduler: Scheduler,
    ) -> None:
        self.setting, self.make_program = setting, make_program
        self.job, self.slot, self.scheduler = job, slot, scheduler
        self.predictors: dict[str, dspy.Predict] = {}
        self.policy_version = scheduler.policy.step
        self.session = Session(self, setting.settings)
        self.done = threading.Event()
        self.interrupt: KeyboardInterrupt | None = None
        self.error: BaseException | None = None
        self.unasked: Exception | None = None
        self.time = OwnTime()
        self._given_up = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls_under_way = self._calls_begun = self._turns = 0
        self._lock = threading.Lock()
        self._rollout: Rollout | None = None

    def start(self) -> None:
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._work,), daemon=True).start()

    @property
    def is_outside(self) -> bool:
        """Whether it runs, and is in no call of the model."""
        return not self.done.is_set() and not self._calls_under_way

    def give_up_if_stuck(self, timeout: float) -> None:
        """End it where it has used up its time outside the model."""
        if self.is_outside and self.time.seconds > timeout:
            self.give_up(f"no answer within {timeout:g} s outside the model")

    def give_up(self, message: str, kind: FailureKind = "timeout") -> None:
        """End it for others; its thread ends at its next call of the model."""
        self._given_up = True
        self._finish(self._failed(kind, message))
        self.scheduler.leave(self.slot)

    def wake(self) -> None:
        """Let its event loop, if it has one, look at what is ready.

        What several loops share (the places of ``dspy.asyncify``, anyio's limiter) tells the next
        in turn without waking its loop, which would sleep on.
        """
        if self._loop is not None and not self.done.is_set():
            with suppress(RuntimeError):  # it is closed by now
                self._loop.call_soon_threadsafe(lambda: None)

    def result(self) -> Rollout:
        assert self._rollout is not None
        return self._rollout

    # --- the calls of the local model that the program makes -----------------------------------

    @property
    def policy(self) -> Policy:
        return self.scheduler.policy

    @property
    def calls(self) -> list[Call]:
        return self.slot.calls

    def complete(self, predictor: str, request: lm15.Request) -> tuple[lm15.Response, Call]:
        """Answer a call; the clock stands still meanwhile."""
        limit = self.setting.sampling.max_calls + self._turns
        with self._lock:
            if self._given_up:
                raise RolloutEnded("this rollout was given up")
            if self._calls_begun >= limit:
                beside = f", beside {self._turns} turns of environments" if self._turns else ""
                raise RuntimeError(
                    f"the program made more than max_calls={self.setting.sampling.max_calls} model "
                    f"calls{beside}"
                )
            self._calls_begun += 1
            self._calls_under_way += 1
        try:
            return self.scheduler.complete(self.slot, predictor, request, self.setting.version)
        finally:
            with self._lock:
                self._calls_under_way -= 1
            self.time.restart()

    # --- its thread ---------------------------------------------------------------------------

    def _finish(self, rollout: Rollout) -> None:
        # The thread and the watchdog may both end a rollout; the first one counts.
        with self._lock:
            if self._rollout is None:
                self._rollout = rollout
        if threading.get_native_id() == self.slot.thread:
            self.time.end()
        self.done.set()

    def _work(self) -> None:
        self.slot.thread = threading.get_native_id()
        self.time.begin()
        try:
            try:
                prediction = self._run_program()
            finally:
                self.scheduler.leave(self.slot)
            self.time.restart()
            self._finish(self._score(prediction))
        except BaseException as error:  # SystemExit and CancelledError among them
            self._finish(self._failed_by(self._cause(error)))

    def _cause(self, error: BaseException) -> BaseException:
        """What a rollout failed by, first of all.

        Programs may go on without an answer that could not be read: ``dspy.BestOfN`` and
        ``dspy.Refine`` give ``None`` where no attempt has one, which the program's next line or the
        metric fails on.
        """
        if isinstance(error, KeyboardInterrupt) or is_infrastructure(error):
            return error
        runs = self.session.runs()
        return (runs[-1].error if runs else None) or error

    def _failed_by(self, error: BaseException) -> Rollout:
        if isinstance(error, AdapterParseError):
            return self._parse_failure(error)
        if isinstance(error, ContextWindowExceededError):
            return self._failed("too_long", str(error))
        if isinstance(error, KeyboardInterrupt):
            self.interrupt = error
            return self._failed("infrastructure", "interrupted")
        kind: FailureKind = "program"
        self.error, message = error, said_of(error)
        if isinstance(error, MetricError):
            kind, self.error, message = "metric", error.__cause__ or error, str(error)
        # A judge that could not be reached says nothing of the answer.
        return self._failed("infrastructure" if is_infrastructure(error) else kind, message)

    def _run_program(self) -> Any:
        program, self.predictors = self.make_program()
        self._turns = _turns_of(program)
        for predictor in self.predictors.values():
            # DSPy's settings, where it listens as well, do not reach a program's own threads.
            predictor.callbacks = [*predictor.callbacks, self.session]
        with self.session.context():
            inputs = own_inputs(self.job.example)
            kind = type(program)  # asking the instance for forward makes DSPy warn
            if hasattr(kind, "aforward") and not hasattr(kind, "forward"):
                return asyncio.run(self._acall(program, inputs))
            return _that_ran(program(**inputs))

    async def _acall(self, program: dspy.Module, inputs: Mapping[str, Any]) -> Any:
        self._loop = asyncio.get_running_loop()
        return await program.acall(**inputs)

    def _score(self, prediction: Any) -> Rollout:
        try:
            score = call_metric(self.setting.metric, self.job.example, prediction)
        except (MetricError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise MetricError(f"the metric raised {said_of(error)}") from error
        rollout = self._rollout_with(score)
        if self.setting.ask_predictors:
            rollout = replace(rollout, feedback_by_predictor=self._ask(prediction, score))
        if not self.slot.calls:
            message = "the program never called the local model on this example"
            return replace(rollout, failure=Failure("no_calls", message))
        return rollout

    def _ask(self, prediction: Any, score: Score) -> dict[str, str]:
        """What the metric says of each predictor that ran, by its last call (dspy.GEPA's protocol).

        What it raises there costs the hint alone: the rollout has its reward.
        """
        trace = [
            (self.predictors[run.predictor], run.inputs, run.prediction)
            for run in self.session.runs()
            if run.prediction is not None and run.predictor in self.predictors
        ]
        said = {}
        for name, predictor in self.predictors.items():
            own = [call for call in trace if call[0] is predictor]
            if not own:
                continue
            try:
                asked = (self.setting.metric, self.job.example, prediction)
                feedback = ask_about_predictor(*asked, trace, name, own[-1:])
            except Exception as error:
                self.unasked = error
                continue
            if feedback is not None and feedback != score.feedback:
                said[name] = feedback
        return said

    def _parse_failure(self, error: AdapterParseError) -> Rollout:
        fields = ", ".join(error.signature.output_fields)
        last = self.slot.calls[-1] if self.slot.calls else None
        if last is not None and last.finish_reason == "length":
            message = (
                f"The answer was cut off after {len(last.completion_ids_T)} tokens, "
                f"{self._where_cut(last)}before it stated the fields {fields}."
            )
            return self._failed("truncated", message)
        if last is not None and not last.text.strip():
            return self._failed("empty", f"The answer was empty; expected the fields {fields}.")
        message = f"The answer did not state the fields {fields} as asked."
        if self.setting.explains_format:
            message = f"{message} {self._explained(error)}"
        return self._failed("parse", message)

    def _where_cut(self, call: Call) -> str:
        if fills_context(self.policy, call.prompt_ids_T, call.completion_ids_T):
            return f"{AT_THE_END}, "
        if ends_in_thought(self.policy, call.prompt_ids_T, call.completion_ids_T):
            return f"{IN_THOUGHT}, "
        return ""

    def _explained(self, error: AdapterParseError) -> str:
        """What was wrong with an answer, and what the adapter had asked for."""
        found = ", ".join(error.parsed_result or {})
        cause = _first_line(str(error.args[0] if error.args else ""))
        said = self.slot.calls[-1].text.strip() if self.slot.calls else ""
        parts = (
            f"It began with {said[:SHOWN]!r}." if said else "",
            f"Of the fields it had {found}." if found else "It had none of them.",
            f"{cause.rstrip('.')}." if cause.startswith("Failed to parse") else "",
            wanted_format(self.setting.settings["adapter"], error.signature),
        )
        return " ".join(part for part in parts if part)

    def _failed(self, kind: FailureKind, message: str) -> Rollout:
        score = Score(self.setting.sampling.failure_score, message)
        return replace(self._rollout_with(score), failure=Failure(kind, message))

    def _rollout_with(self, score: Score) -> Rollout:
        return Rollout(
            example_id=example_id(self.job.example),
            candidate_id=self.job.candidate.id,
            calls=tuple(self.slot.calls),
            traces=tuple(map(OpenCall.trace, self.session.runs())),
            reward=score.reward,
            feedback=score.feedback,
            failure=None,
            policy_version=self.policy_version,
            objective_scores=score.objectives,
            turns=tuple(self.session.turns),
        )


def _that_ran(returned: Any) -> Any:
    """What a program returned, unless that is code of which nothing has run."""
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        raise TypeError("forward returned something to be awaited: name an async forward aforward")
    if inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        raise TypeError(
            "forward is a generator (it has a yield), of which nothing runs until it is read: "
            "return a dspy.Prediction, and stream with dspy.streamify"
        )
    return returned


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""


def is_infrastructure(error: BaseException) -> bool:
    """Whether a rollout was lost to what it runs on, and says nothing of the program or the model.

    A connection that broke, a pool or a service that did not answer in time, another model's
    provider that refused for now.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    return any(
        isinstance(e, (*LOST, RolloutEnded))
        or (isinstance(e, Exception) and is_retryable_lm_error(e))
        for e in causes
    )


def _told_once(record: logging.LogRecord) -> bool:
    """DSPy warns anew in every call; of what each rollout would say again, the first one is told.

    That answers are cut off is not: in a rollout it is data, and counted.
    """
    told = dspy.settings.get(TOLD)
    if told is None:
        return True
    place = (record.name, record.lineno)
    if record.name == "dspy.clients.lm" or place in told:
        return False
    told.add(place)
    record.msg = f"{record.msg} (told once, of all the rollouts of a run)"
    return True


for _name in list(logging.root.manager.loggerDict):
    if _name.startswith("dspy."):  # what a logger filters is its own, and not its children's
        logging.getLogger(_name).addFilter(_told_once)


def _turns_of(program: dspy.Module) -> int:
    """Turns that the environments in a program (``fst_dspy.env``) may take, a call each."""
    limits = [getattr(one, "max_turns", 0) for _, one in program.named_sub_modules(dspy.Module)]
    return sum(limit for limit in limits if isinstance(limit, int))
