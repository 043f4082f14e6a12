"""The program in the README works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

README = ROOT / "README.md"


def own_program() -> str:
    """The README's block of Python that is a whole program."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    (program,) = [block for block in blocks if "fst.compile(" in block]
    return program


def test_the_program_is_as_short_as_promised() -> None:
    lines = [line for line in own_program().splitlines() if line.strip()]
    assert len(lines) <= 30


@pytest.mark.insides  # the compile of those
@pytest.mark.slow
def test_the_program_improves_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(own_program())
    done = subprocess.run(
        [sys.executable, file], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"^validation ([\d.]+) -> ([\d.]+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    before, after = map(float, found.groups())
    assert before <= 0.25
    assert after >= before + 0.5
