"""Examples before and after: what still fails and what got worse, with both answers."""

import dataclasses

from run_folders import HOSTILE, write_run

from fst_dspy.report import data
from fst_dspy.report.answer.examples import examples, pairs


def test_examples_are_paired_and_those_that_fail_are_shown(tmp_path):
    write_run(tmp_path / "run", steps=4, per_step=16, cycles=2)
    run = data.read_run(tmp_path / "run")
    # One that the student got right and the trained program does not.
    rows, chosen = [dict(row) for row in run.answers], data.chosen_id(run)
    first = next(row for row in rows if row["reward"] == 0 and "inputs" in row)
    last = [
        r for r in rows if r["candidate_id"] == chosen and r["example_id"] == first["example_id"]
    ]
    first["reward"], last[-1]["reward"], last[-1]["failure"] = 1.0, 0.25, None
    last[-1]["outputs"] = {"queue": "worse than before"}
    run = dataclasses.replace(run, answers=rows)
    found = pairs(run)
    assert len(found) == 24
    assert sum(pair.after["reward"] for pair in found) == sum(
        row["reward"] for row in rows if row["candidate_id"] == chosen and row["cycle"] == 2
    )
    html = examples(run)
    failing = [pair for pair in found if pair.after["reward"] < 1]
    assert f"Still failing: {len(failing)}" in html and "Got worse: 1<" in html
    worse = html[html.index("Got worse") :]
    assert "<b>1 → 0.25</b>" in worse and "queue: worse than before" in worse
    assert worse.count("feedback ") == 2 and HOSTILE not in html


def test_without_answers_that_is_said(tmp_path):
    write_run(tmp_path / "run", steps=2, cycles=1)
    (tmp_path / "run" / "answers.jsonl").unlink()
    assert "log_rollouts=False" in examples(data.read_run(tmp_path / "run"))
