"""``fst_dspy.env``: an environment as a DSPy module, which acts in it turn by turn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum
from typing import Any

import dspy
from dspy.signatures.signature import ensure_signature
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

from fst_dspy.agents import contract
from fst_dspy.agents.actions import ActionForm, InvalidActionError, as_written, values_of
from fst_dspy.agents.contract import EpisodeOver, Factory, described
from fst_dspy.agents.episode import EPISODE, Episode, current
from fst_dspy.agents.event_loop import EventLoop
from fst_dspy.agents.gym import gym_factory, made
from fst_dspy.agents.workers import Workers
from fst_dspy.errors import LOST, FSTError, ProgramError
from fst_dspy.rollouts.session import in_rollout
from fst_dspy.types import Turn

ENVIRONMENT = "environment"
"""The field of an example that names its environment, where there are several."""
OWN = ("observation", "history")
"""Input fields that the module fills in itself."""
PREDICTED = ("turns", "reward", "done", "feedback")
"""What a prediction has beside the outputs of the last turn."""
AGAIN = 1_000_000
"""Between the ``rollout_id`` of a call and of its repetition; ``dspy.BestOfN`` counts by ones."""
SHOWN = 200
"""Characters of an answer that could not be read, in its turn."""


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
        taken = [name for name in signature.output_fields if name in PREDICTED]
        if taken:
            raise ProgramError(
                f"the output field {taken[0]!r} has the name of what an episode returns beside its "
                f"outputs ({', '.join(PREDICTED)}); give it another"
            )
        self.agent: dspy.Module | None = None
        if agent is not None:
            told = _without_history(signature)
            tools = _dispatching(self._forms.values())
            self.agent = agent(told, tools=tools, max_iters=max_turns)
            _check_names(self.agent, tools)
            self._inputs = list(told.input_fields)
        else:
            self.act = dspy.Predict(self._with_actions(signature))
            self._inputs = list(self.act.signature.input_fields)

    async def aforward(self, **fields: Any) -> dspy.Prediction:
        """Play one episode, in a thread."""
        return await dspy.asyncify(self._play)(fields)

    def forward(self, **fields: Any) -> dspy.Prediction:
        """Play one episode on the fields of an example."""
        return self._play(fields)

    def _play(self, given: dict[str, Any]) -> dspy.Prediction:
        name = given.get(ENVIRONMENT) if isinstance(self._factories, Mapping) else None
        # As TRL has it: of several environments, which one it is is no matter of its reset.
        fields = {key: value for key, value in given.items() if key != ENVIRONMENT or name is None}
        with Episode(self._make(name), fields, self.max_turns) as episode:
            if self.agent is not None:
                inputs = self._other_inputs(given, episode.environment)
                return self._run_agent(self.agent, episode, inputs)
            form = self._forms[name]
            if isinstance(self._factories, Mapping):
                given["actions"] = form.description
            outputs: dict[str, Any] = {}
            while not episode.over:
                outputs = self._turn(episode, form, given) or outputs
            return episode.prediction(**outputs)

    def past(self, turns: Sequence[Turn]) -> Any:
        """The ``history`` field: a ``dspy.History`` or a list of lines where the signature says so,
        otherwise text.

        It begins with what was seen first, where many environments put the task. Override it to
        show earlier turns in another way.

        Args:
            turns: Those taken so far; of a history too long for the model the first and the later
                ones.
        """
        annotation = self.act.signature.input_fields["history"].annotation
        if annotation is dspy.History:
            action = _action_of(self.act.signature)
            seen = ["", *(_without_effect(turn) for turn in turns)]
            messages = [
                {"observation": told + turn.observation, **turn.said, action: turn.action}
                for told, turn in zip(seen, turns, strict=False)
            ]
            return dspy.History(messages=messages)
        lines = [f"0. {_in_line(turns[0].observation)}"] if turns and turns[0].observation else []
        lines += [f"{n}. {t.action} -> {_in_line(t.result)}" for n, t in enumerate(turns, 1)]
        if annotation == list[str]:
            return lines
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
        action = _action_of(signature)
        desc = signature.output_fields[action].json_schema_extra["desc"]
        for name, form in self._forms.items():
            desc = desc.replace(form.description, forms[name].description)
        self._forms = forms
        self.act.signature = signature.with_updated_fields(action, desc=desc)

    # --- a turn -------------------------------------------------------------------------------

    def _turn(
        self, episode: Episode, form: ActionForm, given: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """One prediction and what it does; its outputs, if it could be read."""
        try:
            prediction = self._predict(episode, self._other_inputs(given, episode.environment))
        except AdapterParseError as error:
            fields = ", ".join(error.signature.output_fields)
            why = f"The answer did not state the fields {fields} as asked."
            episode.invalid(_clip(error.lm_response or ""), why)
            return None
        outputs = dict(prediction.items())
        name = _action_of(self.act.signature)
        action = outputs[name]
        said = {key: as_written(value) for key, value in outputs.items() if key != name}
        written = as_written(action)
        try:
            tool, arguments = form.read(action)
        except InvalidActionError as error:
            episode.invalid(written, str(error), said)
            return outputs
        episode.step(tool, arguments, written, said)
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
                return self.act(**fields, **self._afresh(episode.came_to(fields)))
            except ContextWindowExceededError:
                if "history" not in self._inputs or not turns:
                    raise
                later = turns[len(turns) // 2 + 1 :]
                turns = (turns[0], *later) if len(turns) > 1 else ()

    def _afresh(self, times: int) -> dict[str, Any]:
        """The ``config`` of a call whose inputs the episode has come to before, so many times.

        DSPy's cache would answer as before, and an agent that remembers nothing would go round in
        circles until its turns have run out. The same episode is still answered from the cache. In
        rollouts nothing is.
        """
        lm = self.act.lm or dspy.settings.lm
        if not times or in_rollout() or not isinstance(lm, dspy.LM):
            return {}
        own = {**lm.kwargs, **self.act.config}
        if own.get("temperature") == 0:  # there is one answer
            return {}
        return {"config": {"rollout_id": (own.get("rollout_id") or 0) + AGAIN * times}}

    def _observation(self, episode: Episode) -> Any:
        fields = self.act.signature.input_fields
        if fields["observation"].annotation is not str:
            return episode.observation
        written = "history" in fields and fields["history"].annotation is not dspy.History
        if written or not episode.turns:
            return episode.seen
        # Nothing else would say why nothing has changed.
        return _without_effect(episode.turns[-1]) + episode.seen

    def _run_agent(
        self, agent: dspy.Module, episode: Episode, inputs: Mapping[str, Any]
    ) -> dspy.Prediction:
        if "observation" in self._inputs:
            inputs = {**inputs, "observation": episode.seen}
        outputs: dict[str, Any] = {}
        # An environment that is done needs no answer.
        with dspy.context(**{EPISODE: episode}), suppress(EpisodeOver):
            outputs = dict(agent(**inputs).items())
        if episode.lost is not None:
            raise episode.lost
        return episode.prediction(**{k: v for k, v in outputs.items() if k not in PREDICTED})

    # --- environments -------------------------------------------------------------------------

    @property
    def _names(self) -> list[str | None]:
        return list(self._factories) if isinstance(self._factories, Mapping) else [None]

    def _make(self, name: str | None) -> Any:
        factory = contract.factory_for(self._factories, name)
        return made(factory) if self._workers is None else self._workers.make(factory)

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
            contract.close(environment, EventLoop())

    def _with_actions(self, signature: type[dspy.Signature]) -> type[dspy.Signature]:
        """The signature, whose action says what actions there are, and is of their type."""
        if not signature.output_fields:
            raise ProgramError("the signature has no output field for the action")
        action = _action_of(signature)
        field = signature.output_fields[action]
        said = (field.json_schema_extra or {}).get("desc", "")
        said = "" if said == f"${{{action}}}" else said
        if isinstance(self._factories, Mapping):
            told = "one of the actions"
            signature = signature.prepend(
                "actions", dspy.InputField(desc="what can be done here"), type_=str
            )
            annotation: Any = field.annotation
            for form in self._forms.values():
                if not values_of(annotation):  # which may be of some environments alone
                    form.check_type(annotation)
        else:
            (form,) = self._forms.values()
            told = form.description
            form.check_type(field.annotation)
            # A type of the user's own, such as a narrower Literal, stands.
            annotation = form.annotation if field.annotation is str else field.annotation
        desc = f"{said}\n{told}" if said else told
        return signature.with_updated_fields(action, type_=annotation, desc=desc)

    def _other_inputs(self, fields: Mapping[str, Any], environment: Any) -> dict[str, Any]:
        """The example's, or else the environment's attributes, as they are now."""
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
            other inputs are the example's fields or the environment's attributes as they are at
            that turn, such as a ``mission``. The output ``action``, or else the last one, is the
            action; one before it may be a ``reasoning``.
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


def _action_of(signature: type[dspy.Signature]) -> str:
    """The output field that holds the action: the one of that name, or else the last."""
    names = list(signature.output_fields)
    return "action" if "action" in names else names[-1]


def _dispatching(forms: Iterable[ActionForm]) -> list[dspy.Tool]:
    """Tools for an agent that is made once: each calls that of the episode that is running.

    Raises:
        ProgramError: Two environments have a tool of one name, and not the same.
    """
    methods: dict[str, Callable[..., Any]] = {}
    for form in forms:
        for name, method in form.tools.items():
            other = methods.setdefault(name, method)
            if inspect.signature(other, eval_str=True) != inspect.signature(method, eval_str=True):
                raise ProgramError(
                    f"two environments have a tool {name!r} with different arguments, and an agent "
                    "is told of one; give one of them another name"
                )
    return [_EpisodeTool(_dispatch(name, method), name=name) for name, method in methods.items()]


def _without_history(signature: type[dspy.Signature]) -> type[dspy.Signature]:
    """The signature of an agent, which keeps a history of its own.

    A ``dspy.History`` stays: that is a user's, and a field of the example.
    """
    field = signature.input_fields.get("history")
    if field is None or field.annotation is not str:
        return signature
    return signature.delete("history")


def _check_names(agent: dspy.Module, tools: Sequence[dspy.Tool]) -> None:
    """Refuse tools in place of which an agent has put its own, such as ``finish`` of ``ReAct``.

    Raises:
        ProgramError: There is one.
    """
    known = getattr(agent, "tools", None)
    if not isinstance(known, Mapping):
        return
    for tool in tools:
        if not isinstance(known.get(tool.name, tool), _EpisodeTool):
            raise ProgramError(
                f"the environment has a tool {tool.name!r}, which {type(agent).__name__} has of "
                "its own; give it another name"
            )


class _EpisodeTool(dspy.Tool):
    """A tool of the episode that is running. A call that does not fit it is an invalid turn."""

    def __call__(self, **arguments: Any) -> Any:
        with self._noted(arguments):
            return super().__call__(**arguments)

    async def acall(self, **arguments: Any) -> Any:
        with self._noted(arguments):
            return await super().acall(**arguments)

    @contextmanager
    def _noted(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        episode = current()
        before = len(episode.turns)
        try:
            yield
        except Exception as error:  # which the agent reads
            if len(episode.turns) == before and not episode.over:
                episode.invalid(_written(str(self.name), arguments), str(error))
            raise


def _dispatch(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        episode = current()
        try:
            result = episode.step(name, arguments, _written(name, arguments))
        except LOST as error:  # an agent would take it for what the tool answers
            episode.lost = error
            raise EpisodeOver from error
        if episode.done:  # where turns have run out, the agent may still give its answer
            raise EpisodeOver
        return result

    return described(call, name, inspect.signature(method, eval_str=True), method.__doc__)


def _written(name: str, arguments: Mapping[str, Any]) -> str:
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in arguments.items()}
    shown = [
        f"{key}={value!r}" if isinstance(value, str) else f"{key}={as_written(value)}"
        for key, value in plain.items()
    ]
    return f"{name}({', '.join(shown)})"


def _without_effect(turn: Turn) -> str:
    """What to say before the observation that such a turn has left as it was."""
    return "" if turn.status == "ok" else f"{turn.result}\n"


def _in_line(text: str) -> str:
    return " ".join(text.split())


def _clip(text: str) -> str:
    text = _in_line(text)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
