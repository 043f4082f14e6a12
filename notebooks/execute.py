"""Run the notebooks from a clean kernel, in an empty folder, and write their outputs into them.

    python notebooks/execute.py              # all of them
    python notebooks/execute.py 01 03        # those whose names begin so

A notebook that raises is left as it was. What goes to standard error is not kept: warnings and log
lines, with the times and folders of one machine; nor are progress bars on standard output, of which
DSPy's optimizers write hundreds.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parent
TIMEOUT = 900
"""Seconds a cell may take: a machine that others share may be ten times slower than it is."""


def execute(notebook: NotebookNode, folder: Path, timeout: float = TIMEOUT) -> NotebookNode:
    """Run a notebook from a clean kernel; returns a copy with new outputs and no old ones.

    Args:
        notebook: What to run.
        folder: The kernel's working folder.
        timeout: Seconds a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
        nbclient.exceptions.CellTimeoutError: A cell took too long.
    """
    fresh = nbformat.from_dict(notebook)
    for cell in fresh.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    fresh.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    client = NotebookClient(
        fresh,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    # One thread, for the same figures everywhere; an empty cache, so that nothing is remembered.
    cache = str(folder / ".dspy_cache")
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "DSPY_CACHEDIR": cache})
    fresh.metadata["language_info"] = {"name": "python"}  # without the interpreter's version
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if is_kept(out)]
    return fresh


def is_kept(output: NotebookNode) -> bool:
    """Whether an output is what a reader wants to see: no log, no state of a progress bar."""
    if output.output_type != "stream":
        return True
    bar = re.fullmatch(r"\s*|.*\d+/\d+ \[[\d:?<]+.*\]\s*", output.text, re.DOTALL)
    return output.name != "stderr" and bar is None


def main(prefixes: list[str]) -> None:
    """Run the notebooks whose names begin with one of ``prefixes``, all where there are none."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if prefixes and not path.name.startswith(tuple(prefixes)):
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            done = execute(nbformat.read(path, as_version=4), Path(folder))
        nbformat.write(done, path)
        print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
