"""What a call's answer is held to: the format of the predictor that asks, or a schema.

DSPy does not tell a language model which signature it is asked for. But it says which module calls,
and the adapter is that of its settings; and whether the prompt was written by this adapter for this
signature is to be seen in the prompt itself, where the adapter's own words for what it wants stand.
So the mechanism is one for plain calls, for compiled programs and for rollouts, and it never holds
an answer to a format that was not asked for: of fields that went another way (tools, native
reasoning), of a second try through JSON, of an adapter that a module has put around the user's.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dspy
import pydantic
from dspy import lm15
from dspy.adapters.types.tool import ToolCalls
from dspy.signatures.signature import ensure_signature

from fst_dspy.grammar.answers import grammar_of_answer, grammar_of_json_schema
from fst_dspy.grammar.values import schema_of_model
from fst_dspy.lm.answers import opens_thought
from fst_dspy.lm.templates import chat_format, thinks
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import vocabulary
from fst_dspy.student.adapter import default_adapter, texts_of_prompt
from fst_dspy.student.by_identity import cached_by_identity
from fst_dspy.types import Grammar

logger = logging.getLogger(__name__)

KNOWN = 256
"""Signatures whose grammars are kept; a candidate has signatures of its own."""

_default, _json = default_adapter(), dspy.JSONAdapter()


def grammar_of_caller(policy: Policy, prompt: Any) -> str | None:
    """The grammar of the answer that the calling predictor will read.

    Args:
        policy: Who answers.
        prompt: As DSPy gives it to the language model: messages, or a request.

    Returns:
        ``None`` where no predictor calls, or another format is asked for than its signature's.

    Raises:
        ConfigError: The model's tokenizer is not one that answers can be held to a grammar with.
    """
    predictor = calling_predictor()
    if predictor is None or not isinstance(prompt, list | tuple | lm15.Request):
        return None
    asked = "\n".join(texts_of_prompt(prompt))
    adapter = dspy.settings.adapter or _default
    declared = ensure_signature(predictor.signature)
    # ChatAdapter's own is what others ask through, such as TwoStepAdapter when it extracts.
    for own in {id(one): one for one in (adapter, _default, _json)}.values():
        if not isinstance(own, dspy.ChatAdapter):
            continue  # its formats are not known, nor need it say what it wants
        for signature in _variants(declared):
            if wanted_format(own, signature) in asked:
                return _grammar(own, signature, vocabulary(policy).spell)
    if all(info.annotation is not ToolCalls for info in declared.output_fields.values()):
        # (Calls of tools are free on purpose.)
        known = isinstance(adapter, dspy.ChatAdapter)
        _tell_free(type(adapter).__name__, declared.signature if known else None)
    return None


def calling_predictor() -> dspy.Predict | None:
    """The predictor in whose call this is, the innermost one; ``None`` outside of predictors."""
    modules = reversed(dspy.settings.caller_modules or [])
    return next((module for module in modules if isinstance(module, dspy.Predict)), None)


def as_read(response_format: Any) -> Any:
    """A ``response_format`` whose schema says what pydantic will read, where it is a model."""
    if not (inspect.isclass(response_format) and issubclass(response_format, pydantic.BaseModel)):
        return response_format
    try:
        schema = schema_of_model(response_format)
    except Exception as error:  # as it is, it says what is wrong with it
        logger.debug("%s has no schema of ours: %s", response_format, error)
        return response_format
    # DSPy asks it for its name and its schema, and has every property in it, as it has elsewhere.
    stand_in: Any = pydantic.create_model(response_format.__name__)
    stand_in.model_json_schema = lambda *args, **kwargs: schema
    return stand_in


def grammar_of_format(response_format: Mapping[str, Any] | None) -> str | None:
    """The grammar of a request's ``response_format``; ``None`` without one.

    Raises:
        ValueError: A schema that answers cannot be held to.
    """
    if response_format is None:
        return None
    schema = response_format.get("schema", {"type": "object"})
    text = _schema_grammar(json.dumps(schema))
    if text is None:
        raise ValueError("an answer cannot be held to this schema; leave response_format out")
    return text


def held_to(
    policy: Policy, text: str | None, ids_T: Sequence[int], options: Mapping[str, Any]
) -> Grammar | None:
    """A grammar as the answer to a prompt is held to it: where the model thinks first, after that.

    Where it may think, but the prompt does not make it, a model that does not is held at once.

    Args:
        ids_T: The prompt.
        options: Of the chat template.
    """
    if text is None:
        return None
    takes_runs = policy.generator is None
    found = chat_format(policy.tokenizer)
    marks = found.thought
    # Where each answer begins with the closing mark, what comes before that is no answer.
    opened = opens_thought(policy, ids_T) or bool(found.between)
    if marks is None or not (opened or thinks(policy.tokenizer, options)):
        return Grammar(text, takes_runs)
    return Grammar(text, takes_runs, marks, opened)


@functools.lru_cache(KNOWN)
def _tell_free(adapter: str, fields: str | None) -> None:
    """Say so, once for an adapter whose format is not known, and for a predictor's fields."""
    if fields is None:
        logger.warning(
            "answers are free under %s, whose format is not known; they are held to those of "
            "ChatAdapter, XMLAdapter, JSONAdapter and their subclasses",
            adapter,
        )
    else:
        logger.warning(
            "an answer is free: the predictor of %r asks, under %s, for another format than its "
            "signature's; give each signature a dspy.Predict of its own, rather than signature=... "
            "with the call",
            fields,
            adapter,
        )


@cached_by_identity(KNOWN)
def wanted_format(adapter: Any, signature: Any) -> str:
    """The adapter's own words for the answer that it wants."""
    say = getattr(adapter, "user_message_output_requirements", None)
    return (say(signature) if say is not None else None) or adapter.format_system_message(signature)


@cached_by_identity(KNOWN)
def _grammar(adapter: Any, signature: Any, spell: Any) -> str | None:
    return grammar_of_answer(adapter, signature, spell)


@functools.lru_cache(KNOWN)
def _schema_grammar(schema: str) -> str | None:
    return grammar_of_json_schema(json.loads(schema))


def _variants(signature: Any) -> Iterator[Any]:
    """A signature, and what is left of it where fields go by ways of the model's own."""
    yield signature
    fields = signature.output_fields.items()
    for kinds in ((ToolCalls,), (dspy.Reasoning,), (ToolCalls, dspy.Reasoning)):
        left = signature
        for name, info in fields:
            if info.annotation in kinds:
                left = left.delete(name)
        if left is not signature and left.output_fields:
            yield left
