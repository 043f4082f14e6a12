"""The notebooks: what is committed, and that each runs from a clean kernel."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from places import ROOT

NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
LARGEST = 600_000
TIMEOUT = 300

OWN_NAMES = {
    "01_quickstart": {"RouteTicket", "metric"},
    "06_compared": {"Rollouts", "fresh", "gepa", "lessons", "on_lm_start"},
}
"""The user's own program, metric and the like, which a notebook may define."""

IN_TESTS = {
    "01_quickstart": {
        "max_cycles=2": "max_cycles=1, max_tokens=40",
        "examples[128:]": "examples[128:160]",
    },
    "02_watch_the_weights": {"test=40": "test=16", "max_cycles=4": "max_cycles=2"},
    "03_study": {
        "test=60": "test=1",  # which it has no use for
        "rollouts=160),\n    trials=4,": "rollouts=96),\n    trials=3,",
        "rollouts=160),\n    trials=2,": "rollouts=96),\n    trials=2,",
        "max_rollouts=320": "max_rollouts=96",
    },
    "04_continual": {"test=24": "test=12", "val_size=24": "val_size=12"},
    "05_real_models": {
        'LocalLM("smollm2")': 'LocalLM("embedded")',
        "test=24": "test=8",
        "max_rollouts=260": "max_rollouts=200",
        "first_cycle_iterations=4": "first_cycle_iterations=2",
    },
    "06_compared": {"budget = 800": "budget = 220", "test=64": "test=24"},
}
"""What is run otherwise here, for time and the network: texts of the notebook, and of the test."""

HOLDS = {
    "01_quickstart": [
        "before < 20 and after > before + 50",
        "compiled.detailed_results.best.score > compiled.detailed_results.records[0].val_score",
        "router.predict.signature.instructions == compiled.predict.signature.instructions",
        "router.predict.lm.version == compiled.predict.lm.version",
    ],
    "02_watch_the_weights": [
        "result.best.score > result.records[0].val_score + 0.3",
        "tested.trained_evolved > tested.base_original + 0.3",
        "0 < result.records[result.best.cycle].kl_to_base < 1",
        "__import__('pathlib').Path('report.html').stat().st_size > 10_000",
    ],
    "03_study": [
        "len(study.trials) == 3 and {t.state.name for t in study.trials} <= {'COMPLETE', 'PRUNED'}",
        "len(pareto.trials) == 2 and fst_dspy.study.front(pareto)",
        "max(t.value for t in study.trials) > min(t.value for t in study.trials)",
        "compiled.detailed_results.best.score > compiled.detailed_results.records[0].val_score",
    ],
    "04_continual": [
        "[stage.task for stage in stream.stages] == ['triage', 'triage-1', 'triage-2']",
        "scores.score_S_N[3][2] > scores.score_S_N[0][2] + 0.3",
        "scores.score_S_N[3][0] > scores.score_S_N[0][0] + 0.3",
        "scores.score_S_N[3][0] > scores.score_S_N[1][0] - 0.2",  # of twelve examples
        "stream.rollouts.total > 300",
    ],
    "05_real_models": [
        "result.best.score >= result.records[result.best.cycle].val_score",
        "result.rollouts.slow > 0 and result.rollouts.fast > 0",
        "tested.examples == 8",
        "again.lm.version == compiled.lm.version == result.best.version",
    ],
    "06_compared": [
        "0.7 * budget < fst_rollouts == by_fst.detailed_results.rollouts.total <= budget",
        "0.9 * budget < gepa_rollouts < 1.3 * budget",
        "0.9 * budget < both_rollouts < 1.3 * budget",
        "fst_score > untrained",
    ],
}
"""What must be true in the kernel of a notebook once it has run."""


def load_execute():
    spec = importlib.util.spec_from_file_location("execute_notebooks", NOTEBOOKS / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def shown(path: Path) -> str:
    """All that the outputs of a notebook hold, images aside."""
    texts = []
    for cell in code_cells(path):
        for output in cell.outputs:
            texts.append(output.get("text", ""))
            data = output.get("data", {}).items()
            texts += [text for kind, text in data if not kind.startswith("image/")]
    return "\n".join(texts)


each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def test_there_are_notebooks() -> None:
    assert set(HOLDS) <= {path.stem for path in PATHS}


@each
def test_a_committed_notebook_was_run_in_order(path: Path) -> None:
    nbformat.validate(read(path))
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= 4
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert path.stat().st_size < LARGEST


@each
def test_outputs_say_nothing_of_the_machine(path: Path) -> None:
    text = shown(path)
    assert not re.findall(r"(?<![\w.<])/(?:work|home|root|tmp|usr|opt|Users|var)/\S*", text)
    assert "Warning" not in text and "Traceback" not in text
    assert not any(o.get("name") == "stderr" for cell in code_cells(path) for o in cell.outputs)
    assert not re.search(r"\d\d:\d\d:\d\d", text)  # the time of a log line


@each
def test_progress_is_one_output_a_cell(path: Path) -> None:
    for cell in code_cells(path):
        assert len(cell.outputs) <= 2, cell.source


@each
def test_a_notebook_has_no_logic_of_its_own(path: Path) -> None:
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.Lambda | ast.For | ast.While | ast.AsyncFunctionDef)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.name in OWN_NAMES.get(path.stem, set())


@each
def test_a_notebook_needs_public_names_alone(path: Path) -> None:
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            inner = [name for name in named if name.startswith("fst_dspy.")]
            assert not inner, f"import fst_dspy and use {inner} from there"


BEGUN = """
from fst_dspy.config import BudgetConfig
from fst_dspy.loop.progress import NotebookProgress, default_progress
from fst_dspy.types import CycleRecord, RolloutCounts

def record(cycle, rollouts):
    counts = RolloutCounts(slow=rollouts)
    return CycleRecord(cycle, cycle, ("a",), "a", 0.5, 0.25, (0.25,), 0.01, 1.0, 0.0, {},
                       counts, counts, {}, {}, "m@0")

listener = default_progress()
assert isinstance(listener, NotebookProgress)
listener.begin(BudgetConfig(max_cycles=2))
listener.cycle_done(record(0, 8))
listener.phase(2, "step 1/6", RolloutCounts(slow=16))
"""
PROGRESS = [BEGUN, BEGUN + "listener.cycle_done(record(1, 16))\nlistener.end()"]
PROGRESS_IN = "05_real_models"
"""The notebook whose kernel, which takes long to start, is asked for ``PROGRESS`` as well."""


def check_progress(under_way: NotebookNode, ended: NotebookNode) -> None:
    """Progress in a notebook is one output, rewritten in place."""
    ((first,), (last,)) = under_way.outputs, ended.outputs
    lines = first.data["text/plain"].splitlines()
    assert lines[0].startswith("cycle   0") and "validation 0.250" in lines[0]
    assert "step 1/6" in lines[1] and "50%" in lines[1] and "16 rollouts" in lines[1]
    lines = last.data["text/plain"].splitlines()
    assert [line[:9] for line in lines] == ["cycle   0", "cycle   1"]
    assert "step 1/6" not in last.data["text/plain"]


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT)
@each
def test_a_notebook_runs_from_a_clean_kernel(path: Path, tmp_path: Path) -> None:
    assert path.stem in HOLDS, f"say in HOLDS what must be true once {path.name} has run"
    fresh = read(path)
    for before, after in IN_TESTS.get(path.stem, {}).items():
        (cell,) = [cell for cell in fresh.cells if before in cell.source]
        cell.source = cell.source.replace(before, after)
    checks = "\n".join(f"assert {fact}, {fact!r}" for fact in HOLDS[path.stem])
    cells = [checks, *PROGRESS] if path.stem == PROGRESS_IN else [checks]
    fresh.cells += map(nbformat.v4.new_code_cell, cells)
    done = load_execute()(fresh, tmp_path, TIMEOUT)  # raises where a cell does
    if path.stem == PROGRESS_IN:
        check_progress(*done.cells[-2:])
    counts = [cell.execution_count for cell in done.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_the_page_on_other_optimizers_has_the_notebooks_figures() -> None:
    """The table in ``docs/compared.md`` is that which ``06_compared`` ends with."""
    last = code_cells(NOTEBOOKS / "06_compared.ipynb")[-1]
    shown = "".join(output["data"]["text/plain"] for output in last.outputs)
    rows = re.findall(r"^(\S.*?)\s{2,}(\d+)\s+([\d.]+)$", shown, re.MULTILINE)
    assert len(rows) == 4
    page = (ROOT / "docs" / "compared.md").read_text().split("06_compared.ipynb")[1]
    for name, rollouts, score in rows:
        line = next(n for n in page.splitlines() if n.startswith("|") and name.lower() in n.lower())
        assert line.endswith(f"| {rollouts} | {float(score) / 100:.2f} |"), (name, line)
