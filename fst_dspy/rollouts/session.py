"""What goes on within one rollout: the calls of the local model, and which predictor made each.

The rollout is an entry in DSPy's settings. DSPy hands its settings on to the threads and tasks that
it starts (``dspy.Parallel``, ``dspy.asyncify``, a gather), so wherever the program calls a local
model, its engine finds the rollout there, and with it the predictor that is being run.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import dspy
from dspy import lm15
from dspy.signatures.signature import ensure_signature
from dspy.utils.callback import BaseCallback

from fst_dspy.lm.requests import ROLLOUT
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.inputs import own_values
from fst_dspy.student.mixins import plain_class
from fst_dspy.types import Call, PredictorTrace, Turn

NAME = "fst_predictor"
"""The attribute of a predictor that holds its name; copies of it keep it."""
UNNAMED = "unnamed"
"""The name of predictors that are not the program's own, such as one made as it runs."""


class Calls(Protocol):
    """Where a rollout's calls are answered and kept."""

    @property
    def policy(self) -> Policy:
        """Who answers."""
        ...

    @property
    def calls(self) -> list[Call]:
        """Those answered so far, in order."""
        ...

    def complete(self, predictor: str, request: lm15.Request) -> tuple[lm15.Response, Call]:
        """Answer one call."""
        ...


@dataclass
class OpenCall:
    """One run of a predictor: its inputs and, once there are any, its calls and its outputs.

    Attributes:
        predictor: Its name.
        inputs: As they were when it was given them; programs write on in lists and histories.
        before: Calls that the rollout had made when it began.
        calls: Its calls of the local model.
        prediction: ``None`` until it has ended, and where it failed.
        error: What it failed by.
        leave: Puts the settings back as they were.
    """

    predictor: str
    inputs: dict[str, Any]
    before: int
    calls: list[Call] = field(default_factory=list)
    prediction: dspy.Prediction | None = None
    error: BaseException | None = None
    leave: AbstractContextManager[Any] | None = None

    def trace(self) -> PredictorTrace:
        """What the rollout keeps of it."""
        outputs = None if self.prediction is None else dict(self.prediction.items())
        text = self.calls[-1].text if self.calls else ""
        return PredictorTrace(self.predictor, self.inputs, outputs, text)


@dataclass(frozen=True)
class Within:
    """The value in DSPy's settings: a rollout, and the run of a predictor within it, if any."""

    session: Session
    running: OpenCall | None = None

    @property
    def policy(self) -> Policy:
        """The policy that the rollout samples from."""
        return self.session.calls.policy

    def history(self, lm: Any) -> list[Any]:
        """What the rollout has asked a language model, as DSPy keeps it."""
        return self.session.histories.setdefault(id(lm), (lm, []))[1]

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer a call of the local model; see ``fst_dspy.lm.engine.serving``."""
        name = self.running.predictor if self.running else _caller()
        response, call = self.session.calls.complete(name, request)
        if self.running is not None:
            self.running.calls.append(call)
        return response


class Session(BaseCallback):
    """Keeps what each predictor in a rollout was given and what was parsed, also in vain.

    It listens twice: through DSPy's settings, which reach every module that the program runs or
    makes, and on the program's own predictors, which may run in threads that DSPy's settings do not
    reach. There it brings the settings along.

    Args:
        calls: Answers the calls of the local model.
        settings: DSPy's settings within the rollout, but for those that it adds itself.
    """

    def __init__(self, calls: Calls, settings: Mapping[str, Any]) -> None:
        self.calls = calls
        heard = [*(dspy.settings.callbacks or []), self]
        # A trace of its own, as the user's would hold every rollout's program from then on; none
        # where there is none, as in DSPy.
        trace: list[Any] | None = None if dspy.settings.trace is None else []
        self.settings = {**settings, ROLLOUT: Within(self), "callbacks": heard, "trace": trace}
        self.turns: list[Turn] = []
        self.histories: dict[int, tuple[Any, list[Any]]] = {}  # with the LM: ids are reused
        self._guard = threading.Lock()
        self._open: dict[str, OpenCall] = {}
        self._closed: list[OpenCall] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self  # a program may copy its predictors

    def context(self) -> AbstractContextManager[Any]:
        """DSPy's settings for the program of this rollout."""
        return dspy.context(**self.settings)

    def runs(self) -> list[OpenCall]:
        """The runs of predictors that have ended, in the order of their calls.

        The order in which they ended would depend on the threads, where some run at once.
        """
        place = {id(call): index for index, call in enumerate(self.calls.calls)}
        with self._guard:
            ended = list(self._closed)
        return sorted(
            ended, key=lambda run: place.get(id(run.calls[0]), 0) if run.calls else run.before
        )

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if not isinstance(instance, dspy.Predict) or call_id in self._open:
            return
        given = inputs.get("kwargs", {})
        fields = ensure_signature(given.get("signature", instance.signature)).input_fields
        run = OpenCall(
            predictor=vars(instance).get(NAME, UNNAMED),
            inputs=own_values({name: given[name] for name in given if name in fields}),
            before=len(self.calls.calls),
        )
        settings = {} if _session() is self else self.settings
        # A predictor runs an adapter and a language model, of which nothing need be heard: each
        # event that DSPy tells of takes as long as the work itself.
        heard = settings.get("callbacks", dspy.settings.callbacks) or []
        if plain_class(type(instance)) is dspy.Predict:
            heard = [listener for listener in heard if listener is not self]
        run.leave = dspy.context(**{**settings, ROLLOUT: Within(self, run), "callbacks": heard})
        run.leave.__enter__()
        self._open[call_id] = run

    def on_module_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        run = self._open.pop(call_id, None)
        if run is None:
            return
        if run.leave is not None:
            run.leave.__exit__(None, None, None)
        run.prediction = outputs if isinstance(outputs, dspy.Prediction) else None
        run.error = exception
        with self._guard:
            self._closed.append(run)


def in_rollout() -> bool:
    """Whether the caller is in a rollout."""
    return dspy.settings.get(ROLLOUT) is not None


def note_turn(turn: Turn) -> None:
    """Keep a turn with the rollout that the caller is in, if it is in one."""
    if (session := _session()) is not None:
        session.turns.append(turn)


def calls_so_far() -> int:
    """Calls of the local model that the caller's rollout has made; 0 where it is in none."""
    session = _session()
    return 0 if session is None else len(session.calls.calls)


def _session() -> Session | None:
    within = dspy.settings.get(ROLLOUT)
    return within.session if isinstance(within, Within) else None


def _caller() -> str:
    """The predictor that DSPy says is running, of which no event told."""
    modules = dspy.settings.caller_modules or []
    names = [vars(module).get(NAME) for module in modules if isinstance(module, dspy.Predict)]
    return next((name for name in reversed(names) if name), UNNAMED)
