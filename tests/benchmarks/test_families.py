"""The runner of all families: one family, small, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import families
from fst_dspy.experiments import ExperimentStore, load_runs

SMALL = {"group_size": 4, "problems_per_step": 2, "val_size": 4, "steps_per_cycle": 1}


@pytest.mark.slow
def test_a_family_runs_once_and_is_drawn_from_its_packed_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs_run_here: None
) -> None:
    family = families.Family("triage", 40, SMALL)
    monkeypatch.setattr(families, "FAMILIES", {"triage": family})
    monkeypatch.setattr(families, "ORDINARY", ("triage",))
    monkeypatch.setattr(families, "TEST_SIZE", 4)
    results = tmp_path / "results"

    def call(out: str, *, draw_only: bool = False) -> list[str]:
        families.main(
            "triage", "rl,untuned,same", 1, 1, 1, draw_only, out=tmp_path / out, results=results
        )
        (store,) = (tmp_path / out).iterdir()  # one trial has the defaults: they are tuned to
        assert store.name == "triage-rl"
        return [run.name for run in load_runs(ExperimentStore(store))]

    jobs = call("first")
    assert sorted(jobs) == ["fst-0", "rl_only-0"]
    for name in ("together.md", "against.md", "families.png"):
        assert (results / name).stat().st_size
    against = (results / "against.md").read_text()
    assert "| triage | rl_only | 1 |" in against

    # Another machine has the results alone.
    assert call("second", draw_only=True) == jobs
    assert (results / "against.md").read_text() == against
