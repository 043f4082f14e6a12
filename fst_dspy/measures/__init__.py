"""Measures of runs and of the models they trained, each a function.

On records or plain curves: ``rollouts_to_score``, ``steps_to_score``, ``area_under_curve``,
``mean_curve``, ``kl_at_score``, ``kl_at_matched_score``, ``asymptote``. On scores: ``mean_at_k``,
``mean_interval``, ``paired_difference``; over families: ``interquartile_mean``,
``mean_difference``, ``probability_of_improvement``. On a model: ``held_out_drift``,
``forgetting``, ``quadrants``.
"""

from fst_dspy.measures.aggregate import (
    interquartile_mean,
    mean_difference,
    probability_of_improvement,
)
from fst_dspy.measures.curves import (
    MatchedKL,
    area_under_curve,
    kl_at_matched_score,
    kl_at_score,
    mean_curve,
    rollouts_to_score,
    score_curve,
    steps_to_score,
    x_to_score,
)
from fst_dspy.measures.held_out import (
    Drift,
    Forgetting,
    forgetting,
    held_out_drift,
    ideal_candidate,
)
from fst_dspy.measures.sigmoid import Asymptote, SigmoidFit, asymptote, fit_sigmoid
from fst_dspy.measures.statistics import (
    Interval,
    MeanAtK,
    PairedDifference,
    mean_at_k,
    mean_interval,
    paired_difference,
    scores_by_example,
)
from fst_dspy.model.divergence import kl_to_base, token_entropy
from fst_dspy.rollouts.evaluate import Quadrants, quadrants

__all__ = [
    "Asymptote",
    "Drift",
    "Forgetting",
    "Interval",
    "MatchedKL",
    "MeanAtK",
    "PairedDifference",
    "Quadrants",
    "SigmoidFit",
    "area_under_curve",
    "asymptote",
    "fit_sigmoid",
    "forgetting",
    "held_out_drift",
    "ideal_candidate",
    "interquartile_mean",
    "kl_at_matched_score",
    "kl_at_score",
    "kl_to_base",
    "mean_at_k",
    "mean_curve",
    "mean_difference",
    "mean_interval",
    "paired_difference",
    "probability_of_improvement",
    "quadrants",
    "rollouts_to_score",
    "score_curve",
    "scores_by_example",
    "steps_to_score",
    "token_entropy",
    "x_to_score",
]
