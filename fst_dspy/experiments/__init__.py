"""Experiments: arms on equal footing, over seeds, in one store that can be taken up again.

``fst compare``, ``fst ablate``, ``fst plasticity`` and ``fst continual`` are the commands. A
protocol is a function that makes jobs, hands them to ``runner.run_jobs`` and, where later jobs
depend on earlier ones, does so again; see ``protocols``. What a job does is in ``worker.py`` and,
for streams of tasks, in ``stream_worker.py``.
"""

from fst_dspy.experiments.arms import ARMS, USUAL_ARMS, Arm, Stage
from fst_dspy.experiments.findings.show import write_results
from fst_dspy.experiments.jobs import Job, Outcome
from fst_dspy.experiments.packed import pack, unpack
from fst_dspy.experiments.plan import Plan
from fst_dspy.experiments.protocols.ablate import AXES, ablate
from fst_dspy.experiments.protocols.compare import compare
from fst_dspy.experiments.protocols.continual import SEED_PROMPT, continual
from fst_dspy.experiments.protocols.plasticity import plasticity
from fst_dspy.experiments.runner import ExperimentStore, run_jobs
from fst_dspy.experiments.runs import Run, load_runs
from fst_dspy.experiments.streams import Stream, StreamOutcome, load_streams

__all__ = [
    "ARMS",
    "AXES",
    "SEED_PROMPT",
    "USUAL_ARMS",
    "Arm",
    "ExperimentStore",
    "Job",
    "Outcome",
    "Plan",
    "Run",
    "Stage",
    "Stream",
    "StreamOutcome",
    "ablate",
    "compare",
    "continual",
    "load_runs",
    "load_streams",
    "pack",
    "plasticity",
    "run_jobs",
    "unpack",
    "write_results",
]
