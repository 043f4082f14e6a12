"""Optuna studies over FST's settings: ``tune`` many compiles, or ``TunedFST`` inside one.

Example::

    from fst_dspy.study import Objective, best_settings, tune

    study = tune("triage", objective=Objective(rollouts=3000), trials=20, workers=2)
    fst_dspy.FST(metric, **best_settings(study))
"""

from fst_dspy.study.objective import Objective
from fst_dspy.study.outcome import (
    best_settings,
    draw_front,
    draw_importances,
    front,
    hypervolume,
    importances,
)
from fst_dspy.study.runner import tune
from fst_dspy.study.space import Categorical, Float, Int, Space, default_space, load_space
from fst_dspy.study.tuned import TunedFST, TunedResult

__all__ = [
    "Categorical",
    "Float",
    "Int",
    "Objective",
    "Space",
    "TunedFST",
    "TunedResult",
    "best_settings",
    "default_space",
    "draw_front",
    "draw_importances",
    "front",
    "hypervolume",
    "importances",
    "load_space",
    "tune",
]
