"""What tells a program, its metric and its adapter from others: plain values for a run's folder."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import dspy

from fst_dspy.student.adapter import default_adapter
from fst_dspy.student.candidate import content_hash
from fst_dspy.student.mixins import plain_class
from fst_dspy.student.values import called, lm_identity, name_of, own_classes, values_of


def program_identity(program: dspy.Module) -> dict[str, Any]:
    """The program's class, and of each predictor its class, fields and own language model.

    Instructions and demos are left out: they are the student's texts, which a run names anyway.
    Beside these the plain attributes of its modules (``fst_dspy.student.values``), and a hash of
    the source of their classes, where there is one.
    """
    return {
        "class": name_of(type(program)),
        **_sources(program),
        "values": values_of(program, of_predictors=()),
        "predictors": {
            name: {
                "class": name_of(type(predictor)),
                "fields": _fields(predictor.signature),
                "lm": lm_identity(predictor.lm),
                "config": content_hash(dict(getattr(predictor, "config", {}) or {})),
            }
            for name, predictor in program.named_predictors()
        },
    }


def adapter_identity(adapter: dspy.Adapter | None) -> dict[str, Any]:
    """The adapter's class and its plain settings; DSPy's default for ``None``."""
    adapter = adapter or default_adapter()
    plain = {
        name: value
        for name, value in vars(adapter).items()
        if isinstance(value, str | int | float | bool | None) and not name.startswith("_")
    }
    return {"class": name_of(type(adapter)), "settings": plain}


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


def metric_identity(metric: Callable[..., Any]) -> dict[str, Any]:
    """The metric's name, what it depends on, and a hash of its source where there is one.

    It depends on the arguments of a ``functools.partial``, its attributes and the like; see
    ``fst_dspy.student.values``.
    """
    named, values = called(metric), values_of(metric)
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):
        return {"name": name_of(named), "values": values}
    return {"name": name_of(named), "source": _short_hash(source), "values": values}


def _sources(program: dspy.Module) -> dict[str, str]:
    """A hash of the classes that the program's modules are made by, but for DSPy's own."""
    kinds = {
        kind
        for _, module in program.named_sub_modules(dspy.Module)
        for kind in own_classes(plain_class(type(module)))
    }
    texts = []
    for kind in sorted(kinds, key=name_of):
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
