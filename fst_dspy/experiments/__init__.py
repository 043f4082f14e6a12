"""Experiments: arms on equal footing, over seeds, in one store that can be taken up again.

``fst compare`` and ``fst ablate`` are the commands. A protocol is a function that makes jobs, hands
them to ``runner.run_jobs`` and, where later jobs depend on earlier ones, does so again; see
``compare.py``. What a job does is in ``worker.py``.
"""

from fst_dspy.experiments.ablate import AXES, ablate
from fst_dspy.experiments.arms import ARMS, Arm, Stage
from fst_dspy.experiments.compare import compare
from fst_dspy.experiments.jobs import Job, Outcome
from fst_dspy.experiments.plan import Plan
from fst_dspy.experiments.runner import ExperimentStore, run_jobs
from fst_dspy.experiments.runs import Run, load_runs
from fst_dspy.experiments.show import write_results

__all__ = [
    "ARMS",
    "AXES",
    "Arm",
    "ExperimentStore",
    "Job",
    "Outcome",
    "Plan",
    "Run",
    "Stage",
    "ablate",
    "compare",
    "load_runs",
    "run_jobs",
    "write_results",
]
