"""The short version of ``benchmarks/machines/kill_nine.py``: a real kill of a real compile."""

import subprocess
import sys

import pytest
from places import ROOT

SCRIPT = ROOT / "benchmarks" / "machines" / "kill_nine.py"


@pytest.mark.slow
def test_a_compile_killed_at_a_random_instant_ends_as_if_it_had_not_been():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--trials", "1", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 ended as the uninterrupted run" in done.stdout
