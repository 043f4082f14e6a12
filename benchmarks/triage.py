"""FST against all other arms on triage, over five seeds: ``fst compare`` with its options set.

    python benchmarks/triage.py --workers 2

``rl_only`` is tuned by 20 trials at the same budget, and runs five times as long as well. Options
given are passed on to ``fst compare``; the store is ``runs/compare-triage``. The tables go to
``benchmarks/results/triage``; ``benchmarks/results/triage.json`` is of an earlier comparison.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fst_dspy.cli import app

RESULTS = Path(__file__).parent / "results" / "triage"
OPTIONS = ["--seeds", "5", "--rollouts", "3000", "--tune-rl", "20", "--rl-budget-factor", "5"]

if __name__ == "__main__":
    app(["compare", "triage", *OPTIONS, "--results", str(RESULTS), *sys.argv[1:]])
