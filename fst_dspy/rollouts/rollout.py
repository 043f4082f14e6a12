"""One rollout in its thread: the program run, watched, scored, and all of it kept."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError

from fst_dspy.config import SamplingConfig
from fst_dspy.errors import MetricError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import shares_policy
from fst_dspy.rollouts.barrier import BarrierBatcher, Slot
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.student.candidate import example_id
from fst_dspy.student.metric import Score, ask_about_predictor, call_metric
from fst_dspy.types import Failure, PredictorTrace, Rollout

logger = logging.getLogger(__name__)


_in_rollout: contextvars.ContextVar[bool] = contextvars.ContextVar("in_rollout", default=False)


@dataclass(frozen=True)
class Setting:
    """What the rollouts of a batch have in common.

    Attributes:
        metric: See ``fst_dspy.student.metric``.
        sampling: Limits and the failure score.
        lm: The language model of a rollout, but for its engine.
        adapter: What the program runs with.
        version: The weights to sample from; ``None`` means the live ones.
        ask_predictors: Ask the metric about each predictor too.
    """

    metric: Callable[..., Any]
    sampling: SamplingConfig
    lm: LocalLM
    adapter: dspy.Adapter
    version: str | None
    ask_predictors: bool


class RolloutThread:
    """One rollout in its thread; everything it learns is in plain attributes.

    Args:
        setting: What it has in common with others.
        make_program: Gives the program with the candidate's texts in it, for this rollout alone.
        job: The example and the candidate.
        slot, batcher: Its place among those that generate together.
    """

    def __init__(
        self,
        setting: Setting,
        make_program: Callable[[], dspy.Module],
        job: RolloutJob,
        slot: Slot,
        batcher: BarrierBatcher,
    ) -> None:
        self.setting, self.make_program = setting, make_program
        self.job, self.slot, self.batcher = job, slot, batcher
        self.predictors: dict[str, dspy.Predict] = {}
        self.policy_version = batcher.policy.step
        self.recorder = TraceRecorder(slot)
        self.done = threading.Event()
        self.clock = Clock()
        self._lock = threading.Lock()
        self._rollout: Rollout | None = None

    def start(self) -> None:
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._work,), daemon=True).start()

    def give_up_if_stuck(self, timeout: float | None) -> None:
        if self.done.is_set() or timeout is None:
            return
        if self.clock.seconds() > timeout:
            self.give_up(f"no answer within {timeout:g} s outside the model")

    def give_up(self, message: str) -> None:
        self.clock.given_up = True
        self._finish(self._failed("timeout", message))
        self.batcher.leave(self.slot)

    def result(self) -> Rollout:
        assert self._rollout is not None
        return self._rollout

    def _finish(self, rollout: Rollout) -> None:
        # The thread and the watchdog may both end a rollout; the first one counts.
        with self._lock:
            if self._rollout is None:
                self._rollout = rollout
        self.done.set()

    def _work(self) -> None:
        _in_rollout.set(True)
        try:
            try:
                prediction = self._run_program()
            finally:
                self.batcher.leave(self.slot)
            self.clock.restart()
            self._finish(self._score(prediction))
        except AdapterParseError as error:
            self._finish(self._parse_failure(error))
        except MetricError as error:
            self._finish(self._failed("metric", str(error)))
        except Exception as error:
            self._finish(self._failed("program", f"{type(error).__name__}: {error}"))

    def _run_program(self) -> Any:
        program = self.make_program()
        self.predictors = dict(program.named_predictors())
        self.recorder.names = {id(predictor): name for name, predictor in self.predictors.items()}
        for name, predictor in self.predictors.items():
            # On the predictors, not in the settings: those would hear adapter and LM as well, at a
            # quarter of what DSPy takes for a call.
            predictor.callbacks = [*predictor.callbacks, self.recorder]
            if predictor.lm is None or shares_policy(predictor.lm, self.batcher.policy):
                predictor.lm = self._slot_lm(name)
        with dspy.context(
            lm=self._slot_lm("unnamed"),
            adapter=self.setting.adapter,
            trace=[],
            disable_history=True,
        ):
            inputs = self.job.example.inputs().toDict()
            kind = type(program)  # asking the instance for forward makes DSPy warn
            if hasattr(kind, "aforward") and not hasattr(kind, "forward"):
                return asyncio.run(program.acall(**inputs))
            return program(**inputs)

    def _slot_lm(self, predictor: str) -> dspy.LM:
        engine = self.batcher.engine_for(self.slot, predictor, version=self.setting.version)
        limit = self.setting.sampling.max_calls
        return self.setting.lm.copy(
            engine=WatchedEngine(engine, self.clock, self.slot, limit),
            async_engine=WatchedAsyncEngine(engine.async_engine, self.clock, self.slot, limit),
        )

    def _score(self, prediction: Any) -> Rollout:
        try:
            score = call_metric(self.setting.metric, self.job.example, prediction)
        except MetricError:
            raise
        except Exception as error:
            raise MetricError(f"the metric raised {type(error).__name__}: {error}") from error
        rollout = self._rollout_with(score)
        if self.setting.ask_predictors:
            rollout = replace(rollout, feedback_by_predictor=self._ask(prediction, score))
        if not self.slot.calls:
            message = "the program never called the local model on this example"
            return replace(rollout, failure=Failure("no_calls", message))
        return rollout

    def _ask(self, prediction: Any, score: Score) -> dict[str, str]:
        """What the metric says of each predictor that ran, by its last call (dspy.GEPA's protocol).

        The scores it gives with that are not used: the reward is the rollout's.
        """
        trace = [
            (self.predictors[t.predictor], dict(t.inputs), dspy.Prediction(**t.outputs))
            for t in self.recorder.traces
            if t.outputs is not None and t.predictor in self.predictors
        ]
        said = {}
        for name, predictor in self.predictors.items():
            own = [call for call in trace if call[0] is predictor]
            if not own:
                continue
            try:
                feedback = ask_about_predictor(
                    self.setting.metric, self.job.example, prediction, trace, name, own[-1:]
                ).feedback
            except Exception as error:  # the rollout has its reward; only the hint is lost
                logger.debug("the metric raised %s about predictor %s", error, name)
                continue
            if feedback and feedback != score.feedback:
                said[name] = feedback
        return said

    def _parse_failure(self, error: AdapterParseError) -> Rollout:
        fields = ", ".join(error.signature.output_fields)
        last = self.slot.calls[-1] if self.slot.calls else None
        if last is not None and last.finish_reason == "length":
            message = (
                f"The answer was cut off after {len(last.completion_ids_T)} tokens, before it "
                f"stated the fields {fields}."
            )
            return self._failed("truncated", message)
        if last is not None and not last.text.strip():
            return self._failed("empty", f"The answer was empty; expected the fields {fields}.")
        return self._failed("parse", f"The answer did not state the fields {fields} as asked.")

    def _failed(self, kind: Any, message: str) -> Rollout:
        score = Score(self.setting.sampling.failure_score, message)
        return replace(self._rollout_with(score), failure=Failure(kind, message))

    def _rollout_with(self, score: Score) -> Rollout:
        return Rollout(
            example_id=example_id(self.job.example),
            candidate_id=self.job.candidate.id,
            calls=tuple(self.slot.calls),
            traces=tuple(self.recorder.traces),
            reward=score.reward,
            feedback=score.feedback,
            failure=None,
            policy_version=self.policy_version,
        )


class Clock:
    """Seconds a rollout has run outside the model: generation is not its fault."""

    def __init__(self) -> None:
        self.given_up = False
        self._inside = 0
        self._since = time.monotonic()

    def restart(self) -> None:
        self._since = time.monotonic()

    def enter(self, slot: Slot, max_calls: int) -> None:
        if self.given_up:
            raise RuntimeError("this rollout was given up")
        if len(slot.calls) >= max_calls:
            raise RuntimeError(f"the program made more than max_calls={max_calls} model calls")
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
        self.restart()

    def seconds(self) -> float:
        return 0.0 if self._inside else time.monotonic() - self._since


class WatchedEngine:
    """The slot's engine, with the clock stopped while it generates."""

    def __init__(self, engine: Any, clock: Clock, slot: Slot, max_calls: int) -> None:
        self.engine, self.clock, self.slot, self.max_calls = engine, clock, slot, max_calls

    def __deepcopy__(self, memo: dict[int, Any]) -> WatchedEngine:
        return self

    def complete(self, request: Any) -> Any:
        self.clock.enter(self.slot, self.max_calls)
        try:
            return self.engine.complete(request)
        finally:
            self.clock.leave()


class WatchedAsyncEngine(WatchedEngine):
    async def complete(self, request: Any) -> Any:
        self.clock.enter(self.slot, self.max_calls)
        try:
            return await self.engine.complete(request)
        finally:
            self.clock.leave()


class TraceRecorder(BaseCallback):
    """Keeps what each of the program's predictors was given and what was parsed, also in vain."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.names: Mapping[int, str] = {}
        self.traces: list[PredictorTrace] = []
        self._open: dict[str, tuple[str, dict[str, Any], int]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceRecorder:
        return self  # a program may copy its predictors

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        given = inputs.get("kwargs", {})
        fields = {k: v for k, v in given.items() if k in instance.signature.input_fields}
        name = self.names.get(id(instance), "unnamed")
        self._open[call_id] = (name, fields, len(self.slot.calls))

    def on_module_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        if call_id not in self._open:
            return
        name, inputs, first_call = self._open.pop(call_id)
        texts = [call.text for call in self.slot.calls[first_call:] if call.predictor == name]
        parsed = outputs.toDict() if isinstance(outputs, dspy.Prediction) else None
        self.traces.append(PredictorTrace(name, inputs, parsed, texts[-1] if texts else ""))


def _outside_rollouts(record: logging.LogRecord) -> bool:
    """DSPy warns of every truncated answer; in a rollout that is data, and counted."""
    return not _in_rollout.get()


logging.getLogger("dspy.clients.lm").addFilter(_outside_rollouts)
