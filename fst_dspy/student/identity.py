"""What tells a program, its metric and its adapter from others: plain values for a run's folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import dspy

from fst_dspy.student.adapter import default_adapter
from fst_dspy.student.candidate import content_hash


def program_identity(program: dspy.Module) -> dict[str, Any]:
    """The program's class, and of each predictor its class, fields and own language model.

    Instructions and demos are left out: they are the student's texts, which a run names anyway.
    Beside these a hash of the source of its modules' classes, where there is one.
    """
    return {
        "class": _name_of(type(program)),
        **_sources(program),
        "predictors": {
            name: {
                "class": _name_of(type(predictor)),
                "fields": _fields(predictor.signature),
                "lm": lm_identity(predictor.lm),
                "config": content_hash(dict(getattr(predictor, "config", {}) or {})),
            }
            for name, predictor in program.named_predictors()
        },
    }


def lm_identity(lm: Any) -> dict[str, Any] | None:
    """A language model's name and settings, by hash: keys and the like do not go into a folder."""
    if lm is None:
        return None
    settings = {k: v for k, v in (getattr(lm, "kwargs", None) or {}).items() if "key" not in k}
    return {
        "model": str(getattr(lm, "model", type(lm).__name__)),
        "settings": content_hash(settings),
    }


def adapter_identity(adapter: dspy.Adapter | None) -> dict[str, Any]:
    """The adapter's class and its plain settings; DSPy's default for ``None``."""
    adapter = adapter or default_adapter()
    plain = {
        name: value
        for name, value in vars(adapter).items()
        if isinstance(value, str | int | float | bool | None) and not name.startswith("_")
    }
    return {"class": _name_of(type(adapter)), "settings": plain}


def writes_alike(adapter: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two adapters, by their identities, write the same prompts.

    Rollouts run without ChatAdapter's second try (``strict_adapter``), which is no difference.
    """
    told = [{**one["settings"], "use_json_adapter_fallback": False} for one in (adapter, other)]
    return adapter["class"] == other["class"] and told[0] == told[1]


def shown_adapter(identity: Mapping[str, Any]) -> str:
    """An adapter's identity in a line: class and plain settings."""
    settings = ", ".join(f"{name}={value!r}" for name, value in identity["settings"].items())
    return f"{identity['class'].rpartition('.')[2]}({settings})"


def metric_identity(metric: Callable[..., Any]) -> dict[str, str]:
    """The metric's name, and a hash of its source where there is one."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    named = metric if hasattr(metric, "__qualname__") else type(metric)
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):
        return {"name": _name_of(named)}
    return {"name": _name_of(named), "source": _short_hash(source)}


def _sources(program: dspy.Module) -> dict[str, str]:
    """A hash of the classes that the program's modules are made by, but for DSPy's own."""
    kinds = {
        kind
        for _, module in program.named_sub_modules(dspy.Module)
        for kind in type(module).__mro__
        if kind.__module__.partition(".")[0] not in ("dspy", "builtins")
    }
    texts = []
    for kind in sorted(kinds, key=_name_of):
        with contextlib.suppress(OSError, TypeError):
            texts.append(inspect.getsource(kind))
    return {"source": _short_hash("\n".join(texts))} if texts else {}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fields(signature: Any) -> list[dict[str, str]]:
    kinds: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("input", signature.input_fields),
        ("output", signature.output_fields),
    )
    return [
        {
            "name": name,
            "kind": kind,
            "type": str(field.annotation),
            "description": str((field.json_schema_extra or {}).get("desc", "")),
        }
        for kind, fields in kinds
        for name, field in fields.items()
    ]


def _name_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
