"""``gepa_kwargs`` of ``dspy.GEPA``: what goes to ``gepa.optimize`` there, under our names.

Every parameter of ``gepa.optimize`` is a setting of ``FST``, or answered with what to use instead.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import gepa

from fst_dspy.config import ALIASES, ELSEWHERE
from fst_dspy.errors import ConfigError

INSTEAD = {
    "seed": "give it to FST itself",
    "reflection_lm": "give it to FST itself",
    "trainset": "give it to compile",
    "valset": "give it to compile",
    "seed_candidate": "the student has texts of its own; give others to compile, seed_candidates=",
    "adapter": "programs run under DSPy's adapter, dspy.configure(adapter=...)",
    "task_lm": "the program's own LocalLM is trained",
    "evaluator": "this is metric",
    "reflection_lm_kwargs": "make the LM with them, reflection_lm=dspy.LM(name, ...)",
    "reflection_strategy": "give instruction_proposer",
    "merge_val_overlap_floor": "candidates are scored on the same examples",
    "logger": "what is told goes through logging",
    "display_progress_bar": "give progress",
    "use_cloudpickle": "nothing is pickled",
    "cache_evaluation": "scores go stale as the weights move, so that none are cached",
    "raise_on_exception": "a mistake in a proposer ends the run; what it cannot help is counted",
    "wandb_api_key": "log in to Weights & Biases, and give report_to='wandb'",
    "wandb_init_kwargs": "set wandb's environment variables, and give report_to='wandb'",
    "wandb_attach_existing": "give report_to='wandb'",
    "mlflow_tracking_uri": "set MLFLOW_TRACKING_URI, and give report_to='mlflow'",
    "mlflow_experiment_name": "set MLFLOW_EXPERIMENT_NAME, and give report_to='mlflow'",
    "mlflow_attach_existing": "give report_to='mlflow'",
    "tracking_key_prefix": "give report_to",
}
"""Parameters of ``gepa.optimize`` that are no settings of ours, besides those of ``ELSEWHERE``."""


def settings_of(gepa_kwargs: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``gepa_kwargs`` says, as arguments and settings of ``FST``; without what is ``None``.

    Args:
        gepa_kwargs: As for ``dspy.GEPA``; ``None`` for nothing.
        given: What was given to ``FST`` by name.

    Raises:
        ConfigError: It is no dict, names what ``gepa.optimize`` does not have or FST has no setting
            for, or says again what was given by name.
    """
    if gepa_kwargs is not None and not isinstance(gepa_kwargs, Mapping):
        raise ConfigError(f"gepa_kwargs must be a dict, got {type(gepa_kwargs).__name__}")
    known = list(inspect.signature(gepa.optimize).parameters)
    named = {ALIASES.get(name, name) for name, value in given.items() if value is not None}
    found: dict[str, Any] = {}
    for name, value in (gepa_kwargs or {}).items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "settings of FST's own go to FST"
            raise ConfigError(f"gepa_kwargs[{name!r}]: gepa.optimize has no such argument; {hint}")
        if value is None:
            continue
        own = ALIASES.get(str(name), str(name))
        refuse_elsewhere({own: value}, "gepa_kwargs has {}, for which there is no setting: {}")
        if own in named | set(found):
            raise ConfigError(f"gepa_kwargs[{name!r}] is given to FST as well; give one of them")
        found[own] = value
    return found


def refuse_elsewhere(
    settings: Mapping[str, Any], message: str = "FST has no setting {}: {}"
) -> None:
    """Answer names of gepa's that are no settings of ours.

    Raises:
        ConfigError: There is one.
    """
    own = {"callbacks", "stop_callbacks"}
    for name in settings:
        instead = INSTEAD.get(name) or (ELSEWHERE.get(name) if name not in own else None)
        if instead is not None:
            raise ConfigError(message.format(repr(name), instead))
