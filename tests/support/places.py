"""Where this checkout is, and the files of the tests that other processes are given."""

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
PROGRAM = str(SUPPORT / "study_program.py")
