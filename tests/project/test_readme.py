"""The README is short, and the program in it works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

README = ROOT / "README.md"


FIRST_PAGE = ROOT / "docs" / "index.md"


def blocks(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def own_program() -> str:
    """The README's first block of Python."""
    return blocks(README)[0]


def learned(printed: str) -> list[str]:
    """The lines of the instruction in what the program prints."""
    return [line for line in printed.splitlines() if line.endswith(".")]


def test_it_is_read_in_a_minute() -> None:
    assert len(README.read_text().split()) < 500


def test_the_program_is_as_short_as_promised() -> None:
    lines = [line for line in own_program().splitlines() if line.strip()]
    assert len(lines) <= 16


@pytest.mark.slow
def test_the_agent_is_compiled_in_ten_lines() -> None:
    pytest.importorskip("gymnasium")
    agent = blocks(README)[1]
    assert len([line for line in agent.splitlines() if line.strip()]) <= 10
    # As it stands, but for how long it goes on.
    least = "val_size=2, first_cycle_iterations=1, minibatch_size=2, merge_iterations=0, "
    least += "steps_per_cycle=1, problems_per_step=1, max_tokens=12"
    short = agent.replace("max_env_steps=6_000", f"max_env_steps=20, {least}")
    assert short != agent
    done = subprocess.run(
        [sys.executable, "-c", short], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(r"[01]\.0 [01]\.0", done.stdout.splitlines()[-1])


def test_the_first_page_of_the_site_has_the_same_program() -> None:
    assert own_program() == blocks(FIRST_PAGE)[0]


def test_what_it_names_is_called_so() -> None:
    text = README.read_text()
    assert "dspy.GRPO" not in text  # it is dspy.teleprompt.grpo.GRPO
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", text)) <= targets


@pytest.mark.insides  # the compile of those
@pytest.mark.slow
def test_the_program_improves_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    # As it stands, but that an answer which runs on holds the others up for less.
    program = own_program().replace("max_cycles=2", "max_cycles=2, max_tokens=40")
    assert program != own_program()
    file.write_text(program + "".join(blocks(FIRST_PAGE)[1:]))  # what to do with it then
    done = subprocess.run(
        [sys.executable, file], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"^validation ([\d.]+) -> ([\d.]+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    before, after = map(float, found.groups())
    assert before <= 0.25
    assert after >= before + 0.5
    (shown,) = re.findall(r"^```text\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    # Which rule comes first is chance, and so another kind of CPU may have it otherwise.
    assert sorted(learned(done.stdout)) == sorted(learned(shown))
