"""``make agents``: a small part for real, whose stages share the budget of environment steps."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gymnasium")

from benchmarks.quality.agents import main

BUDGET = 120
SETTINGS = (
    "val_size=2", "problems_per_step=1", "group_size=4", "population_size=2", "steps_per_cycle=1",
    "first_cycle_iterations=1", "minibatch_size=2", "merge_iterations=0", "max_tokens=12",
)  # fmt: skip


@pytest.mark.slow
def test_a_job_runs_once_and_its_stages_share_the_steps(tmp_path, jobs_run_here):
    def run():
        main(
            "frozen_lake", "sequential", seeds=1, workers=1, env_steps=BUDGET, test_size=2,
            limit=10, setting=list(SETTINGS), stores=tmp_path / "s", results=tmp_path / "r",
        )  # fmt: skip

    run()
    run()
    store = tmp_path / "s" / "frozen_lake"
    (job,) = json.loads((store / "index.json").read_text())["jobs"].values()
    assert (job["state"], job["attempts"]) == ("done", 1)
    steps = []
    for stage in ("0-gepa_only", "1-rl_only"):
        rows = (store / "sequential-0" / stage / "cycles.jsonl").read_text().splitlines()
        taken = [json.loads(row)["turns"]["steps"] for row in rows]
        steps.append((taken[-1], max(b - a for a, b in zip([0, *taken], taken, strict=False))))
    (first, most), (second, more) = steps
    assert first <= BUDGET / 2 + most and second <= BUDGET - first + more
    line = next(
        x for x in (tmp_path / "r" / "agents.md").read_text().splitlines() if "sequent" in x
    )
    assert f"| {first + second} |" in line
    assert (tmp_path / "r" / "agents.png").stat().st_size > 1000
