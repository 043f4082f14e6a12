"""``LocalLM``: a DSPy language model over weights in this process, which FST can train."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import dspy
import torch
from dspy import lm15
from dspy.clients.provider import Provider

from fst_dspy.display import on_a_screen
from fst_dspy.errors import ConfigError, ModelError
from fst_dspy.lm.asked import as_read, grammar_of_caller
from fst_dspy.lm.engine import AsyncLocalEngine, LocalEngine, one_call, serving
from fst_dspy.lm.in_use import over_base, remember
from fst_dspy.lm.lm_settings import MAX_TOKENS_TOO, check_settings
from fst_dspy.lm.requests import DEFAULT_MAX_TOKENS, EXTRA, OWN
from fst_dspy.lm.templates import check_options, thinks
from fst_dspy.model.hardware import dtype_named
from fst_dspy.model.policy import Policy
from fst_dspy.student.by_identity import cached_by_identity
from fst_dspy.student.identity import adapter_identity, shown_adapter, writes_alike
from fst_dspy.student.modules import every_predictor

logger = logging.getLogger(__name__)

COMPILED_LM = "fst_lm"
"""The attribute of a compiled program's modules that holds the LM they were compiled for."""
FOLLOWS = "fst_follows"
"""The attribute of a compiled predictor that holds its LM, where it had none of its own before."""
ENTERED_WITH = "fst_entered_with"
"""The DSPy setting, in a tuple, that holds the settings' LM as a compiled program was entered."""
COMPILED_ADAPTER = "fst_adapter"
"""The attribute of a compiled program that says which adapter it was compiled under."""
TOLD = 256
"""Programs of which it is known that they were told to be called under another adapter, and weights
of which it is known that they were told to be left out of what is saved."""
_ASKED = ("prompt", "messages", "request")  # of a call's arguments those that are no settings
_ANSWERS_WITH = "answers_with"  # in a pickle: the version id, also where ``model`` is the live one


class LocalLM(dspy.LM):
    """A local causal language model for DSPy programs.

    ``lm.model`` is the version id of the weights it answers with, a content hash. The response
    cache is keyed on it, so an answer of other weights is never returned. Training moves the
    policy's live weights on, but not this LM: ``live()`` follows them, ``at()`` names others.

    Args:
        model: ``"embedded"`` for the model in the package; ``"smollm2"`` for a real model of 135
            million weights that is fetched once, under the adapter in the package
            (``"smollm2-base"``: without); a folder, a GGUF file, a hub id, or a loaded ``Policy``
            to share.
        temperature: In [0, 2]; 0 is greedy.
        max_tokens: Longest answer, in tokens; by default an eighth of the context, at most 512.
        device: Such as ``"cpu"``, ``"cuda"`` or ``"gpu"``; CUDA by default, where there is one.
        dtype: By default bfloat16 on CUDA and, for models of over 30 million parameters, on CPUs
            that multiply it (AMX, AVX512-BF16), else float32.
        trust_remote_code: Run Python code that comes with the model.
        quantization_config: Of transformers, such as ``BitsAndBytesConfig(load_in_4bit=True)`` or
            its dict: load the weights in fewer bits, to train adapters over.
        cache: Keep answers in DSPy's cache.
        chat_template_kwargs: Variables of the model's chat template, such as
            ``{"enable_thinking": False}``.
        structured: Hold the answers that predictors ask for to their signature's format, as the
            adapter reads it, so that they always parse (``docs/structured.md``).
        **kwargs: As for ``dspy.LM``, such as ``top_p``, ``top_k``, ``stop``, ``seed``,
            ``frequency_penalty``, ``presence_penalty`` and ``reasoning_effort``; and
            ``repetition_penalty``, as in transformers.

    All but the model's own (``device``, ``dtype``, ``trust_remote_code``,
    ``quantization_config``) may be given with a call as well, or as a predictor's ``config``, and
    are saved with a program.

    Raises:
        ModelError: The model cannot be loaded, or there is no such device or dtype.
        ConfigError: There is no such setting, a value is out of its range, the chat template does
            not read a variable in ``chat_template_kwargs``, or it is said how to load a policy that
            is loaded.
    """

    # DSPy writes this name into saved programs, so it must not tell where the code lies.
    __module__ = "fst_dspy"

    def __init__(
        self,
        model: str | Policy = "embedded",
        *,
        temperature: float | None = 1.0,
        max_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        quantization_config: Any = None,
        cache: bool = True,
        engine: LocalEngine | None = None,
        async_engine: AsyncLocalEngine | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        structured: bool = False,
        **kwargs: Any,
    ) -> None:
        max_tokens = kwargs.pop(MAX_TOKENS_TOO, max_tokens)
        own = {"temperature": temperature, "max_tokens": max_tokens, "structured": structured}
        check_settings({**kwargs, **own})
        if engine is not None:  # a saved state: the engine was loaded, ``model`` is the version id
            serving = _serving(engine, str(model))
            if serving is not engine:
                engine, async_engine = serving, None
            version = _must_have(engine.policy, str(model))
        else:
            policy = _loaded(
                model,
                device=device,
                dtype=dtype_named(dtype),
                trust_remote_code=trust_remote_code,
                quantization_config=quantization_config,
            )
            engine, version = LocalEngine(policy), policy.version()
        self._local = engine
        if chat_template_kwargs is not None:
            kwargs["chat_template_kwargs"] = check_options(engine.policy, chat_template_kwargs)
        if structured:
            kwargs["structured"] = True
        super().__init__(
            version,
            temperature=temperature,
            max_tokens=max_tokens or min(DEFAULT_MAX_TOKENS, self.policy.context_length // 8),
            cache=cache,
            engine=engine,
            async_engine=async_engine or AsyncLocalEngine(engine),
            **kwargs,
        )

        remember(self)

    def infer_provider(self) -> Provider:
        """The provider that trains these weights for DSPy's weight optimizers."""
        # Here, so that importing a language model does not import what trains it.
        from fst_dspy.lm.provider import LocalProvider

        return LocalProvider(self.policy)

    def __repr__(self) -> str:
        policy, sampling = self.policy, self.kwargs
        size = sum(weight.numel() for weight in policy.model.parameters())
        shown = (
            f"LocalLM({self.model!r}, {size:,} weights in {str(policy.model.dtype)[6:]} on "
            f"{policy.device}, temperature={sampling.get('temperature')}, "
            f"max_tokens={sampling.get('max_tokens')}, context of {policy.context_length:,} tokens)"
        )
        return on_a_screen([shown])

    def __copy__(self) -> LocalLM:
        return remember(super().__copy__())

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalLM:
        # As DSPy copies: engine, policy and provider are shared, all else is the copy's own.
        copied = memo[id(self)] = object.__new__(type(self))
        dspy.LM.__setstate__(copied, copy.deepcopy(super().__getstate__(), memo))
        return remember(copied)

    def dump_state(self) -> dict[str, Any]:
        """For a saved program: everything but the weights, which are named."""
        _tell_left_out(self.policy, self.version)
        return super().dump_state()

    def __getstate__(self) -> dict[str, Any]:
        """For a pickle: everything but the weights, which are named as in a saved program."""
        _tell_left_out(self.policy, self.version)
        state = {**super().__getstate__(), _ANSWERS_WITH: self.version}
        if type(self.provider) is type(self.infer_provider()):
            del state["provider"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle: weights at work in this process, or read again from where they came.

        Raises:
            ModelError: They are neither.
        """
        state = dict(state)
        version, engine = state.pop(_ANSWERS_WITH), state["_local"]
        found = _serving(engine, version)
        if found is not engine and state["_engine_spec"] is engine:
            state["_engine_spec"] = found
            state["_async_engine_spec"] = AsyncLocalEngine(found)
        state["_local"] = found
        _must_have(found.policy, version)
        super().__setstate__(state)
        if "provider" not in state:
            self.provider = self.infer_provider()
        remember(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lm = self._within_program()
        if lm is not self:
            return lm(*args, **kwargs)
        args, kwargs = self._carried(args, kwargs)
        with self._one_call(args, kwargs):
            return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        lm = self._within_program()
        if lm is not self:
            return await lm.acall(*args, **kwargs)
        args, kwargs = self._carried(args, kwargs)
        with self._one_call(args, kwargs):
            return await super().acall(*args, **kwargs)

    def _one_call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        said = {**self.kwargs, **kwargs}
        # A request of lm15 is for one answer, whatever the LM's settings.
        n = 1 if _request_in(args, kwargs) is not None else said.get("n") or 1
        return one_call(said.get("rollout_id"), n)

    def _carried(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the settings that DSPy's requests have no field for where there is room for them.

        As ``metadata``, which goes through unread; the cache's keys take it in.

        Raises:
            ConfigError: There is no such setting, or a value is out of its range.
        """
        check_settings({name: value for name, value in kwargs.items() if name not in _ASKED})
        if MAX_TOKENS_TOO in kwargs:
            kwargs = {**kwargs, "max_tokens": kwargs[MAX_TOKENS_TOO]}
            del kwargs[MAX_TOKENS_TOO]
        wanted = kwargs.get("response_format", self.kwargs.get("response_format"))
        if wanted is not None and (read := as_read(wanted)) is not wanted:
            kwargs = {**kwargs, "response_format": read}
        request = _request_in(args, kwargs)
        given = kwargs if request is None else (request.config.extensions or {})
        own = {name: given.get(name, self.kwargs.get(name)) for name in OWN}
        if own["structured"]:
            messages = kwargs.get("messages", args[1] if len(args) > 1 else None)
            own["grammar"] = grammar_of_caller(self.policy, request or messages)
        own = {name: value for name, value in own.items() if value is not None}
        if not own:
            return args, kwargs
        if "chat_template_kwargs" in own:
            check_options(self.policy, own["chat_template_kwargs"])
        if request is not None:
            # It takes no settings beside its own; those of the model's format are the LM's.
            left = {name: value for name, value in given.items() if name not in own}
            metadata = {**(left.get("metadata") or {}), EXTRA: own}
            config = replace(request.config, extensions={**left, "metadata": metadata})
            request = replace(request, config=config)
            if "request" in kwargs:
                return args, {**kwargs, "request": request}
            return (request, *args[1:]), kwargs
        metadata = kwargs.get("metadata", self.kwargs.get("metadata")) or {}
        # None keeps those of ``self.kwargs`` out of the request.
        return args, {**kwargs, **dict.fromkeys(own), "metadata": {**metadata, EXTRA: own}}

    @property
    def supports_response_schema(self) -> bool:
        """Answers are held to a ``response_format``, whatever the model."""
        return True

    @property
    def supports_reasoning(self) -> bool:
        """Whether it thinks before it answers; so that ``dspy.Reasoning`` is its thought."""
        return thinks(self.policy.tokenizer, self.kwargs.get("chat_template_kwargs") or {})

    def finetune(
        self, train_data: Any, train_data_format: Any, train_kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As ``dspy.LM.finetune``, on prompts that are rendered as this LM's are."""
        train_kwargs = dict(train_kwargs or self.train_kwargs)
        options = self.kwargs.get("chat_template_kwargs")
        if options:
            train_kwargs.setdefault("chat_template_kwargs", options)
        return super().finetune(train_data, train_data_format, train_kwargs)

    def _within_program(self) -> Any:
        """This LM, or what stands for it in the compiled program that calls it.

        See ``fst_dspy.lm.compiled``: a predictor that had no LM of its own follows the program to
        another; and one that the program has made as it runs is to ask the compiled weights.
        """
        modules = dspy.settings.caller_modules or ()
        if not modules:
            return self
        if isinstance(modules[-1], dspy.Predict):  # maybe the program itself, which has no entry
            check_adapter(modules[-1], self.policy)
        caller = vars(modules[-1])
        if caller.get("lm") is self:
            entered = dspy.settings.get(ENTERED_WITH)
            if caller.get(FOLLOWS) is not self or entered is None:
                return self
            return self if dspy.settings.lm is entered[0] else dspy.settings.lm or self
        for module in reversed(modules):
            compiled = vars(module).get(COMPILED_LM)
            if compiled is self:
                return self
            if isinstance(compiled, LocalLM) and compiled.stands_for(self, module):
                # Not to be looked at again: the same weights, with this LM's settings.
                # Held to formats if its answers are, as were those of rollouts.
                found = compiled.copy(cache=self.cache, callbacks=self.callbacks)
                found.kwargs, found.history = self.kwargs | compiled.held, self.history
                return found
        return self

    def stands_for(self, other: LocalLM, program: dspy.Module) -> bool:
        """Whether calls of another LM are meant for this one, within a program compiled for it."""
        alike = other.model == self.model and self.held.items() <= other.held.items()
        if alike or serving(other.policy) is not None:
            return False
        # By name: a program that was saved is loaded over a policy of its own.
        if other.policy.name != self.policy.name:
            return False
        own = [p.lm for p in every_predictor(program).values() if isinstance(p.lm, LocalLM)]
        # One that was given to another LM since (``set_lm``, a later optimizer) is that one's.
        return all(lm.model == self.model for lm in own if lm.policy is self.policy)

    @property
    def held(self) -> dict[str, Any]:
        """The setting by which answers are held to their formats; empty where they are not."""
        return {"structured": True} if self.kwargs.get("structured") else {}

    @property
    def history(self) -> list[Any]:
        """What was asked and answered, as DSPy keeps it; within a rollout, of that rollout."""
        rollout = serving(self.policy)
        return self._history if rollout is None else rollout.history(self)

    @history.setter
    def history(self, value: list[Any]) -> None:
        self._history = value

    def update_history(self, entry: dict[str, Any]) -> None:
        """As DSPy does; what rollouts say is not in the history that all programs share."""
        if serving(self.policy) is None:
            super().update_history(entry)
            return
        most = dspy.settings.max_history_size
        for owner in (self, *(dspy.settings.caller_modules or ())):
            owner.history.append(entry)
            del owner.history[: max(0, len(owner.history) - most)]

    @property
    def _cache_responses(self) -> bool:
        """DSPy's switch: no answer in a rollout is taken from the cache, nor kept there."""
        return serving(self.policy) is None

    @property
    def policy(self) -> Policy:
        """The weights and tokenizer; copies of this LM share it."""
        return self._local.policy

    @property
    def version(self) -> str:
        """Version id of the weights this LM answers with; of a live LM, as they are now."""
        return self.policy.version() if self.model == self.policy.live_id else self.model

    def copy(self, **kwargs: Any) -> Any:
        """As ``dspy.LM.copy``.

        Raises:
            ConfigError: There is no such setting, or a value is out of its range.
        """
        check_settings({name: value for name, value in kwargs.items() if not hasattr(self, name)})
        return super().copy(**kwargs)

    def at(self, version: str) -> LocalLM:
        """A copy bound to other weights of the same policy.

        Raises:
            ModelError: They are neither the base, nor live, nor kept.
        """
        return self.copy(model=_must_have(self.policy, version))

    def live(self) -> LocalLM:
        """A copy that follows the live weights, without the cache."""
        return self.copy(model=self.policy.live_id, cache=False)


def _request_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> lm15.Request | None:
    """The request of lm15 among a call's arguments, if it is made with one."""
    request = kwargs.get("request", args[0] if args else None)
    return request if isinstance(request, lm15.Request) else None


def check_adapter(program: dspy.Module, policy: Policy) -> None:
    """Say so, once for each, where a compiled program is called under another adapter.

    As it is entered: within, it may choose others, as it did in training.
    """
    compiled = vars(program).get(COMPILED_ADAPTER)
    if compiled is None or serving(policy) is not None:
        return
    here = adapter_identity(dspy.settings.adapter)
    if not writes_alike(here, compiled):
        _tell_adapters(program, shown_adapter(compiled), shown_adapter(here))


@cached_by_identity(TOLD)
def _tell_adapters(program: dspy.Module, compiled: str, here: str) -> None:
    logger.warning(
        "%s was compiled under the adapter %s and is called under %s, so that its prompts are "
        "others than those it was trained on; set the former with dspy.configure(adapter=...)",
        type(program).__name__,
        compiled,
        here,
    )


def _tell_left_out(policy: Policy, version: str) -> None:
    """Say so, once for each, where trained weights are not in what is saved."""
    if version != policy.base_version:
        _tell_trained(version)


@functools.lru_cache(TOLD)
def _tell_trained(version: str) -> None:
    logger.warning(
        "what is saved names the trained weights %s and does not hold them: to have them in "
        "another process save the program to a folder, with compiled.save(folder) or "
        "fst_dspy.save(program, folder), which fst_dspy.load reads",
        version,
    )


def _loaded(model: str | Policy, **how: Any) -> Policy:
    """The policy, or the model loaded as told."""
    if not isinstance(model, Policy):
        return Policy.load(model, **how)
    if given := [name for name, value in how.items() if value not in (None, False)]:
        raise ConfigError(
            f"the policy is loaded already, so that {' and '.join(given)} would change nothing: "
            "give them to Policy.load"
        )
    return model


def _serving(engine: LocalEngine, version: str) -> LocalEngine:
    """The engine given, or one at work in this process that has the weights which it lacks."""
    if engine.policy.has(version):
        return engine
    lms = [lm for lm in over_base(engine.policy.base_version) if isinstance(lm, LocalLM)]
    return next((lm._local for lm in lms if lm.policy.has(version)), engine)


def _must_have(policy: Policy, version: str) -> str:
    if not policy.has(version):
        raise ModelError(
            f"the weights {version} are not at hand, only {policy.base_version}, the live "
            f"{policy.version()} and kept ones; a saved program names its weights but does not "
            "hold them: fst_dspy.save writes them to a folder, and fst_dspy.load reads it"
        )
    return version
