"""``python -m benchmarks.speed``: its figures, its files, and one part for real."""

import json

import pytest

from benchmarks.speed.__main__ import BEGIN, END, main, renew, table
from benchmarks.speed.call_history import read_at_least, read_now
from benchmarks.speed.measure import alternate, ratios, row_of


def test_a_ratio_is_taken_round_by_round_and_judged_by_its_median():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(values) for values in times.values()] == [3, 3]
    assert ratios({"a": [2.0, 9.0], "b": [1.0, 3.0]}, "a", "b") == [2.0, 3.0]
    assert row_of("a", "x", "x", [1.0, 1.4, 9.0], ">= 1.3").met
    assert row_of("a", "x", "x", [1.0, 1.2, 9.0], ">= 1.3").met is False
    assert row_of("b", "x", "x", [0.9], "<= 1.0").met
    assert row_of("b", "x", "x", [0.9]).met is None


def test_the_table_goes_between_its_marks_and_nowhere_else(tmp_path):
    row = row_of("a", "rollouts", "x", [1.0, 2.0, 3.0], ">= 1.3", "64 rollouts").to_json()
    machine = {"load_average": [0.1], "cores": 2}
    part = {"commit": "abc", "seconds": 3.0, "clock": "wall", "machine": machine, "rows": [row]}
    report = tmp_path / "RESULTS.md"
    report.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n")
    for _ in range(2):
        renew(report, table({"a": part}))
    text = report.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| a | rollouts | 2 x (1 to 3) | 3 | ≥ 1.3 | yes | 64 rollouts |" in text


def test_prompt_tokens_are_counted_once_a_round_or_once_in_all():
    rounds = [[(1, 2, 3, 4), (1, 2, 3, 5)], [(1, 2, 3, 4, 6), (1, 2, 3, 5, 7)]]
    assert (read_now(rounds), read_at_least(rounds)) == (5 + 7, 7)
    assert read_now([rounds[0] * 2]) == read_now(rounds[:1]) == read_at_least(rounds[:1]) == 5


@pytest.mark.slow
def test_a_part_runs(tmp_path, part="e"):  # the others take longer, even with --quick
    out = tmp_path / "speed.json"
    out.write_text('{"schema_version": 1, "parts": {"z": {}}}')
    main(parts=part, quick=True, out=out, cpu=False, report=None)
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == {"z", part} and parts[part]["quick"]
    for row in parts[part]["rows"]:
        assert row["low"] <= row["median"] <= row["high"] and row["part"] == part
