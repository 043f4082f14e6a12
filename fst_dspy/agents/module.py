"""``fst_dspy.env``: an environment as a DSPy module, which acts in it turn by turn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import dspy
from dspy.signatures.signature import ensure_signature
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

from fst_dspy.agents import contract
from fst_dspy.agents.actions import ActionForm, InvalidActionError
from fst_dspy.agents.contract import EpisodeOver, Factory, described
from fst_dspy.agents.episode import EPISODE, Episode, current
from fst_dspy.agents.gym import gym_factory
from fst_dspy.agents.workers import Workers
from fst_dspy.errors import FSTError, ProgramError
from fst_dspy.types import Turn

ENVIRONMENT = "environment"
"""The field of an example that names its environment, where there are several."""
OWN = ("observation", "history", "actions")
"""Input fields that the module fills in itself."""
SHOWN = 200
"""Characters of a turn's result in the text of a history."""


class Env(dspy.Module):
    """An environment to act in, as a DSPy module; made by ``fst_dspy.env``.

    A call takes the example's fields and plays one episode: reset, then turns of one prediction and
    one tool call each, until the environment is done or ``max_turns`` are taken. What it returns
    has the last turn's outputs and, beside them, ``turns`` (``fst_dspy.types.Turn``), ``reward``
    (a float, or ``None`` where the environment has none), ``done`` and ``feedback``.

    Attributes:
        act: The predictor that chooses the next action; without ``agent``.
        agent: The agent that was given, such as a ``dspy.ReAct``, with the environment's tools.
    """

    def __init__(
        self,
        factory: Factory | Mapping[str, Factory] | str,
        signature: str | type[dspy.Signature],
        *,
        max_turns: int = 20,
        agent: Callable[..., dspy.Module] | None = None,
        processes: bool = False,
        step_timeout: float | None = None,
    ) -> None:
        super().__init__()
        if max_turns < 1:
            raise ProgramError(f"max_turns must be at least 1, got {max_turns}")
        if step_timeout is not None and not processes:
            raise ProgramError(
                "step_timeout needs processes=True: a thread cannot be ended, a process can "
                "(rollout_timeout bounds what a rollout waits for in either case)"
            )
        self._factories = _factories(factory)
        self._workers = Workers(step_timeout) if processes else None
        self.max_turns = max_turns
        self._forms = {name: self._probe(name) for name in self._names}
        signature = ensure_signature(signature)
        assert not isinstance(signature, str)
        self.agent: dspy.Module | None = None
        if agent is not None:
            tools = _dispatching(self._forms.values())
            self.agent = agent(signature, tools=tools, max_iters=max_turns)
            self._inputs = list(signature.input_fields)
        else:
            self.act = dspy.Predict(self._with_actions(signature))
            self._inputs = list(self.act.signature.input_fields)

    def forward(self, **fields: Any) -> dspy.Prediction:
        """Play one episode on the fields of an example."""
        name = fields.get(ENVIRONMENT) if isinstance(self._factories, Mapping) else None
        given = {key: value for key, value in fields.items() if key != ENVIRONMENT or name is None}
        with Episode(self._make(name), given, self.max_turns) as episode:
            inputs = self._constant_inputs(given, episode.environment)
            if self.agent is not None:
                return self._run_agent(self.agent, episode, inputs)
            form = self._forms[name]
            if isinstance(self._factories, Mapping):
                inputs["actions"] = form.description
            outputs: dict[str, Any] = {}
            while not episode.over:
                outputs = self._turn(episode, form, inputs) or outputs
            return episode.prediction(**outputs)

    def past(self, turns: Sequence[Turn]) -> Any:
        """The ``history`` field: a ``dspy.History`` where the signature says so, otherwise text.

        Override it to show earlier turns in another way.
        """
        annotation = self.act.signature.input_fields["history"].annotation
        if annotation is dspy.History:
            (action,) = list(self.act.signature.output_fields)[-1:]
            messages = [{"observation": turn.observation, action: turn.action} for turn in turns]
            return dspy.History(messages=messages)
        lines = [f"{n}. {t.action} -> {_clip(t.result)}" for n, t in enumerate(turns, 1)]
        return "\n".join(lines) or "(nothing yet)"

    # --- what is read of tools (fst_dspy.student.tools) ----------------------------------------

    def tool_texts(self) -> dict[str, str]:
        """What the model reads of each tool; of several environments, by ``environment.tool``."""
        if self.agent is not None:  # which has tools of DSPy's kind
            return {}
        return {
            tool if name is None else f"{name}.{tool}": text
            for name, form in self._forms.items()
            for tool, text in form.texts.items()
        }

    def set_tool_texts(self, texts: Mapping[str, str]) -> None:
        """Put other texts in their place; tools that are not named keep theirs."""
        forms = {}
        for name, form in self._forms.items():
            own = {tool if name is None else f"{name}.{tool}": tool for tool in form.tools}
            said = {tool: texts[key] for key, tool in own.items() if key in texts}
            forms[name] = replace(form, texts={**form.texts, **said})
        signature = self.act.signature
        action, field = list(signature.output_fields.items())[-1]
        desc = field.json_schema_extra["desc"]
        for name, form in self._forms.items():
            desc = desc.replace(form.description, forms[name].description)
        self._forms = forms
        self.act.signature = signature.with_updated_fields(action, desc=desc)

    # --- a turn -------------------------------------------------------------------------------

    def _turn(
        self, episode: Episode, form: ActionForm, inputs: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """One prediction and what it does; its outputs, if it could be read."""
        try:
            prediction = self._predict(episode, inputs)
        except AdapterParseError as error:
            fields = ", ".join(error.signature.output_fields)
            why = f"The answer did not state the fields {fields} as asked."
            episode.invalid(_clip(error.lm_response or ""), why)
            return None
        outputs = dict(prediction.items())
        action = outputs[list(self.act.signature.output_fields)[-1]]
        try:
            tool, arguments = form.read(action)
        except InvalidActionError as error:
            episode.invalid(str(action), str(error))
            return outputs
        episode.step(tool, arguments, str(action))
        return outputs

    def _predict(self, episode: Episode, inputs: Mapping[str, Any]) -> dspy.Prediction:
        """Ask for the next action; of a history too long for the model, the later part."""
        turns: Sequence[Turn] = episode.turns
        while True:
            fields = dict(inputs)
            if "observation" in self._inputs:
                fields["observation"] = self._observation(episode)
            if "history" in self._inputs:
                fields["history"] = self.past(turns)
            try:
                return self.act(**fields)
            except ContextWindowExceededError:
                if "history" not in self._inputs or not turns:
                    raise
                turns = turns[len(turns) // 2 + 1 :]

    def _observation(self, episode: Episode) -> Any:
        annotation = self.act.signature.input_fields["observation"].annotation
        seen = episode.observation
        if annotation is not str:
            return seen
        text = contract.as_text(seen)
        last = episode.turns[-1] if episode.turns else None
        if last is not None and last.status != "ok" and "history" not in self._inputs:
            return f"{text}\n{last.result}"  # nothing else would say why nothing has changed
        return text

    def _run_agent(
        self, agent: dspy.Module, episode: Episode, inputs: Mapping[str, Any]
    ) -> dspy.Prediction:
        if "observation" in self._inputs:
            inputs = {**inputs, "observation": contract.as_text(episode.observation)}
        outputs: dict[str, Any] = {}
        # An environment that is done needs no answer.
        with dspy.context(**{EPISODE: episode}), suppress(EpisodeOver):
            outputs = dict(agent(**inputs).items())
        return episode.prediction(**{k: v for k, v in outputs.items() if k not in _PREDICTED})

    # --- environments -------------------------------------------------------------------------

    @property
    def _names(self) -> list[str | None]:
        return list(self._factories) if isinstance(self._factories, Mapping) else [None]

    def _make(self, name: str | None) -> Any:
        factory = contract.factory_for(self._factories, name)
        return factory() if self._workers is None else self._workers.make(factory)

    def _probe(self, name: str | None) -> ActionForm:
        """The actions of an environment, by one that is made for it and closed."""
        try:
            environment = self._make(name)
        except FSTError:
            raise
        except Exception as error:
            which = "" if name is None else f" {name!r}"
            raise ProgramError(
                f"the environment{which} cannot be made: {contract.said_of(error)}"
            ) from error
        try:
            return ActionForm.of(contract.tools_of(environment))
        finally:
            contract.close(environment)

    def _with_actions(self, signature: type[dspy.Signature]) -> type[dspy.Signature]:
        """The signature whose last output says what actions there are, and is of their type."""
        if not signature.output_fields:
            raise ProgramError("the signature has no output field for the action")
        action, field = list(signature.output_fields.items())[-1]
        said = (field.json_schema_extra or {}).get("desc", "")
        said = "" if said == f"${{{action}}}" else said
        if isinstance(self._factories, Mapping):
            told = "one of the actions"
            signature = signature.prepend(
                "actions", dspy.InputField(desc="what can be done here"), type_=str
            )
            annotation: Any = field.annotation
        else:
            (form,) = self._forms.values()
            told = form.description
            # A type of the user's own, such as a narrower Literal, stands.
            annotation = form.annotation if field.annotation is str else field.annotation
        desc = f"{said}\n{told}" if said else told
        return signature.with_updated_fields(action, type_=annotation, desc=desc)

    def _constant_inputs(self, fields: Mapping[str, Any], environment: Any) -> dict[str, Any]:
        """Inputs that stay the same: the example's, or else the environment's attributes."""
        inputs = {}
        for name in self._inputs:
            if name in fields:
                inputs[name] = fields[name]
            elif name not in OWN:
                if not hasattr(environment, name):
                    raise ProgramError(
                        f"the input field {name!r} is neither a field of the example nor an "
                        f"attribute of {type(environment).__name__}"
                    )
                inputs[name] = getattr(environment, name)
        return inputs


_PREDICTED = ("turns", "reward", "done", "feedback")


def env(
    factory: Factory | Mapping[str, Factory] | str,
    signature: str | type[dspy.Signature] = "observation, history -> action",
    *,
    max_turns: int = 20,
    agent: Callable[..., dspy.Module] | None = None,
    processes: bool = False,
    step_timeout: float | None = None,
) -> Env:
    """A DSPy module that acts in an environment, and that ``FST`` compiles.

    Args:
        factory: Makes environments by TRL's contract (``fst_dspy.agents.contract``): a class, or a
            callable; or several by name, of which the example's field ``environment`` names its
            own; or the id of a gymnasium environment (``fst_dspy.agents.gym``).
        signature: Of one turn. ``observation`` and ``history`` are filled in from the episode;
            other inputs are the example's fields or the environment's attributes, such as a
            ``mission``. The last output is the action; one before it may be a ``reasoning``.
        max_turns: After which the episode is cut off, at least 1.
        agent: Makes the agent instead, called as ``dspy.ReAct`` is, with ``tools=`` and
            ``max_iters=``: its tools are the environment's, and the signature is that of the whole.
        processes: Run every environment in a process of its own: it may crash, hang or leak
            without harm to the others.
        step_timeout: Seconds that a reset or a tool may take, with ``processes``; then the rollout
            is lost, and counted as such.

    Raises:
        ProgramError: The environment cannot be made or has no tools, or the signature does not fit.
    """
    return Env(
        factory,
        signature,
        max_turns=max_turns,
        agent=agent,
        processes=processes,
        step_timeout=step_timeout,
    )


def _factories(given: Any) -> Factory | Mapping[str, Factory]:
    if isinstance(given, str):
        return gym_factory(given)
    if isinstance(given, Mapping):
        if not given or not all(callable(factory) for factory in given.values()):
            raise ProgramError("a dict of environments needs a factory, by name, for each")
        return dict(given)
    if not callable(given):
        raise ProgramError(
            "an environment is given as a class, a callable that makes one, a dict of those, or a "
            f"gymnasium id; got {type(given).__name__}"
        )
    return given


def _dispatching(forms: Iterable[ActionForm]) -> list[dspy.Tool]:
    """Tools for an agent that is made once: each calls that of the episode that is running."""
    methods = {name: method for form in forms for name, method in form.tools.items()}
    return [dspy.Tool(_dispatch(name, method), name=name) for name, method in methods.items()]


def _dispatch(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        episode = current()
        result = episode.step(name, arguments, f"{name}({shown})")
        if episode.done:  # where turns have run out, the agent may still give its answer
            raise EpisodeOver
        return result

    return described(call, name, inspect.signature(method, eval_str=True), method.__doc__)


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
