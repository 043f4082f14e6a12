"""Models that are quantized as they are loaded, by bitsandbytes or torchao, to train adapters over.

What is asked for is transformers' ``quantization_config``, an object of its or the dict of one. It
is kept as plain values, for whoever loads the same weights again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from transformers.quantizers import AutoQuantizationConfig

from fst_dspy.errors import ModelError

METHODS = ("bitsandbytes", "torchao")
"""Those over which adapters can be trained, by ``quant_method``, which is their package's name."""


def plain_quantization(given: Any) -> dict[str, Any] | None:
    """A ``quantization_config`` as plain values; ``None`` stays ``None``.

    Args:
        given: An object of transformers', such as ``BitsAndBytesConfig(load_in_4bit=True)``, or its
            dict.

    Raises:
        ModelError: It is neither, is of another method, or the method's package is missing.
    """
    if given is None:
        return None
    try:
        plain = dict(given) if isinstance(given, Mapping) else given.to_dict()
        made = AutoQuantizationConfig.from_dict(dict(plain)).to_dict()
        method = str(getattr(made["quant_method"], "value", made["quant_method"]))
        plain = json.loads(json.dumps({**made, "quant_method": method}))
    except ImportError as error:  # that of a method's package, where it is asked for at once
        raise ModelError(f"this quantization_config needs a package: {error}") from error
    except Exception as error:
        raise ModelError(
            f"quantization_config={given!r:.80} is none of transformers' ({error}): give "
            "BitsAndBytesConfig(load_in_4bit=True), TorchAoConfig(...), or a dict of one"
        ) from error
    if method not in METHODS:
        raise ModelError(
            f"models are quantized here by {' or '.join(METHODS)}, not by {method!r}; a folder "
            "that was saved so is loaded without quantization_config"
        )
    if find_spec(method) is None:
        raise ModelError(
            f"this quantization_config needs the package {method}: pip install {method}"
        )
    return plain


def quantization_of(plain: Mapping[str, Any]) -> Any:
    """Transformers' object, from what ``plain_quantization`` gave."""
    return AutoQuantizationConfig.from_dict(dict(plain))
