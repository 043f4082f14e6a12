"""What the documents say of files: they exist, and the order of the folders is the tests'."""

from __future__ import annotations

import re

import pytest
from places import ROOT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md"]
for folder in ("docs", "benchmarks/results"):
    DOCUMENTS += [f"{folder}/{page.name}" for page in sorted((ROOT / folder).glob("*.md"))]
BEGINNINGS = ["", "fst_dspy/", "tests/", "benchmarks/"]
OF_A_USER = {"desks.py", "my_progam.py", "my_program.py", "path/to/file.py"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    # A file named after another of its folder, as in "`loop/sampling.py`, `problems.py`", too.
    named, folder, missing = re.findall(r"([\w./-]*\w\.py)\b", text), "", []
    for name in named:
        places = [f"{beginning}{name}" for beginning in BEGINNINGS] + [f"fst_dspy/{folder}{name}"]
        if name not in OF_A_USER and not any((ROOT / place).is_file() for place in places):
            missing.append(name)
        folder = name[: name.rfind("/") + 1] or folder
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_lead_somewhere(document: str) -> None:
    file = ROOT / document
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text())
    assert not [link for link in links if not (file.parent / link).exists()]


def test_the_table_of_folders_is_in_the_order_of_imports() -> None:
    order = (ROOT / "tests" / "project" / "test_layers.py").read_text()
    rows = re.findall(r'^    "(\w+)": ', order[order.index("ORDER = {") :], re.MULTILINE)
    page = (ROOT / "docs" / "architecture.md").read_text()
    start = page.index("| folder or file |")
    table = re.findall(r"^\| (`.*?) \|", page[start : page.index("\n\n", start)], re.MULTILINE)
    named = [name for row in table for name in re.findall(r"`(\w+)(?:\.py|/)`", row)]
    assert set(rows) - {"__main__"} == set(named)
    assert [name for name in rows if name in named] == named
