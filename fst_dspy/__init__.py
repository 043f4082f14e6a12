"""fst_dspy: Fast-Slow Training for DSPy.

Tunes a program's instructions and demos (fast weights) and its local model (slow weights) together.
The public names are loaded on first use, so that importing the package costs what DSPy costs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fst_dspy import measures, report, study
    from fst_dspy.agents.gym import gym_factory
    from fst_dspy.agents.metric import env_reward
    from fst_dspy.agents.module import env
    from fst_dspy.bundle.saving import export, load, save
    from fst_dspy.config import FSTConfig, LoraConfig
    from fst_dspy.continual.learner import ContinualFST
    from fst_dspy.distill.optimizer import FSTDistill
    from fst_dspy.fast.proposers.protocol import Proposer
    from fst_dspy.lm.engine import AsyncLocalEngine, LocalEngine
    from fst_dspy.lm.local_lm import LocalLM
    from fst_dspy.model.vllm_engine import use_vllm
    from fst_dspy.optimizer import FST
    from fst_dspy.results.result import FSTResult
    from fst_dspy.rollouts.evaluate import quadrants
    from fst_dspy.study import TunedFST
    from fst_dspy.tasks import load_task
    from fst_dspy.types import Task

__version__ = "0.1.0"

_HOME = {
    "AsyncLocalEngine": "fst_dspy.lm.engine",
    "ContinualFST": "fst_dspy.continual.learner",
    "FST": "fst_dspy.optimizer",
    "FSTConfig": "fst_dspy.config",
    "FSTDistill": "fst_dspy.distill.optimizer",
    "FSTResult": "fst_dspy.results.result",
    "LocalEngine": "fst_dspy.lm.engine",
    "LocalLM": "fst_dspy.lm.local_lm",
    "LoraConfig": "fst_dspy.config",
    "Proposer": "fst_dspy.fast.proposers.protocol",
    "Task": "fst_dspy.types",
    "TunedFST": "fst_dspy.study",
    "env": "fst_dspy.agents.module",
    "env_reward": "fst_dspy.agents.metric",
    "export": "fst_dspy.bundle.saving",
    "gym_factory": "fst_dspy.agents.gym",
    "load": "fst_dspy.bundle.saving",
    "load_task": "fst_dspy.tasks",
    "quadrants": "fst_dspy.rollouts.evaluate",
    "save": "fst_dspy.bundle.saving",
    "use_vllm": "fst_dspy.model.vllm_engine",
}

_MODULES = ("measures", "report", "study")

__all__ = [
    "FST",
    "AsyncLocalEngine",
    "ContinualFST",
    "FSTConfig",
    "FSTDistill",
    "FSTResult",
    "LocalEngine",
    "LocalLM",
    "LoraConfig",
    "Proposer",
    "Task",
    "TunedFST",
    "env",
    "env_reward",
    "export",
    "gym_factory",
    "load",
    "load_task",
    "measures",
    "quadrants",
    "report",
    "save",
    "study",
    "use_vllm",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fst_dspy.{name}")
    raise AttributeError(f"module 'fst_dspy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
