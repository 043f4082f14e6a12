"""The documentation's pages: what they quote is there, and what the site is built by does its work.

The site itself is built by ``make docs``, which CI runs too.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

import fst_dspy

DOCS = ROOT / "docs"
RUN = {
    "program.md": (
        "max_cycles=1, ",
        "max_cycles=1, steps_per_cycle=1, problems_per_step=2, group_size=4, population_size=2, "
        "first_cycle_iterations=1, minibatch_size=4, ",
    ),
    "metric.md": ("", ""),
}
"""Pages whose blocks of Python are run, one after the other; the first page's are the README's.

Of each, what is written otherwise to take less time, and how.
"""
GAP = "\x00"


def hooks():
    """``docs/hooks.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- what the site is built by ------------------------------------------------------------------


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img src="http://example/pixel.png">',
        '<img srcset="a.png 1x, https://example/b.png 2x">',
        '<iframe src="https://example"></iframe>',
        '<p style="background: url(https://example/b.png)">',
        "<style>@import 'https://example/x.css';</style>",
        '<pre class="mermaid">flowchart TB</pre>',
    ],
)
def test_what_a_page_would_load_from_elsewhere_is_found(html: str) -> None:
    assert len(hooks().loads_of_html(f"<html>{html}</html>")) == 1


def test_what_is_only_linked_or_lies_in_the_site_is_left_alone() -> None:
    html = '<a href="https://dspy.ai">DSPy</a><img src="a.png"><link rel="canonical" href="//x">'
    assert hooks().loads_of_html(html + '<script src="../b.js"></script>') == []


def test_styles_of_a_site_are_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("@font-face { src: url('https://fonts.example/a.woff2') }")
    (tmp_path / "index.html").write_text("<p>fine</p>")
    assert hooks().loads_of_site(tmp_path) == ["a.css: https://fonts.example/a.woff2"]


def test_links_of_the_repository_become_those_of_the_site() -> None:
    text = "[a](../benchmarks/RESULTS.md#speed) [b](metric.md) [c](../fst_dspy/config.py) [d](#x)"
    expected = "[a](results.md#speed) [b](metric.md) [c](../fst_dspy/config.py) [d](#x)"
    assert hooks().with_site_links(text, "docs/program.md", "program.md") == expected
    text = "![f](results/families/families.png) [c](../CONTRIBUTING.md) [d](../docs/metric.md)"
    expected = "![f](results/families/families.png) [c](contributing.md) [d](metric.md)"
    assert hooks().with_site_links(text, "benchmarks/RESULTS.md", "results.md") == expected
    text = "[a](budget.md#demos) ![b](families/families.png) [c](../../docs/metric.md#measured)"
    expected = "[a](budget.md#demos) ![b](families/families.png) [c](../metric.md#measured)"
    file, page = "benchmarks/results/families.md", "results/families.md"
    assert hooks().with_site_links(text, file, page) == expected


# --- what pages say -----------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {page.name for page in DOCS.glob("*.md")} | set(hooks().pages_from_elsewhere().values())
    assert listed == pages


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^::: (fst_dspy[\w.]*)", (DOCS / "reference.md").read_text(), re.MULTILINE)
    for name in fst_dspy.__all__:
        found = getattr(fst_dspy, name)
        home = getattr(found, "__module__", None)
        home = f"fst_dspy.{name}" if home is None or name == "measures" else home
        wanted = {home, f"{home}.{name}"} | {place for place in named if place.endswith(f".{name}")}
        assert wanted & set(named), name


@cache
def texts() -> list[str]:
    """Every text in the package's sources, what is put into it as ``GAP``."""
    found = []
    for file in sorted((ROOT / "fst_dspy").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else GAP for v in node.values]
                found.append("".join(map(str, parts)))
    return found


def messages() -> list[str]:
    """The messages that the page of troubleshooting explains."""
    page = (DOCS / "troubleshooting.md").read_text()
    return re.findall(r"^`(.+)`\n:   ", page, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_a_message_that_is_explained_is_the_codes(message: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    # One text of the sources has all its parts, in order; a gap of it is any of ours.
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), message


def test_there_are_messages() -> None:
    assert len(messages()) > 25


def test_every_kind_of_failure_is_explained() -> None:
    from fst_dspy.rollouts.health import ADVICE

    page = (DOCS / "troubleshooting.md").read_text()
    assert {kind for kind in ADVICE if f"| `{kind}` |" not in page} == set()


def test_settings_that_pages_name_exist() -> None:
    from fst_dspy.config import ALIASES, DERIVED, check_setting
    from fst_dspy.errors import ConfigError

    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    of_fst = {
        "arm",
        "auto",
        "log_dir",
        "log_rollouts",
        "reflection_lm",
        "report_to",
        "seed",
        "track_stats",
    }
    for page in pages:
        calls = re.findall(r"FST\(([^()]*)\)", page.read_text())
        settings = re.findall(r"--set (\w+)=", page.read_text())
        settings += [name for call in calls for name in re.findall(r"(\w+)=", call)]
        wrong = re.findall(r"unknown setting '(\w+)'", page.read_text())  # shown as a mistake
        for name in (
            set(settings) - set(wrong) - of_fst - set(ALIASES) - set(DERIVED) - {"metric", "name"}
        ):
            with pytest.raises(ConfigError) as told:
                check_setting(name, object())
            assert "unknown setting" not in str(told.value), (page.name, name)


@pytest.mark.parametrize("page, name", [("metric.md", "feedback"), ("ten_tasks.md", "mistakes")])
def test_a_table_is_the_measured_one(page: str, name: str) -> None:
    table = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
    assert f"{name}.py -->\n{table}<!-- end -->" in (DOCS / page).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    text = (DOCS / page).read_text()
    blocks = re.findall(
        r"^```python( title=\"[\w.]+\")?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    program = ""
    for title, block in blocks:
        if title:
            (tmp_path / title.split('"')[1]).write_text(block)
        else:
            program += block
    as_it_stands, shorter = RUN[page]
    assert as_it_stands in program
    (tmp_path / "page.py").write_text(program.replace(as_it_stands, shorter, 1))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
