"""Charts carry the run's own figures; intervals, costs and agents come to known values."""

from __future__ import annotations

import dataclasses
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from run_folders import HOSTILE, change_rows, write_run

from fst_dspy.report import data
from fst_dspy.report.charts.agents import Acted, acted, agents
from fst_dspy.report.charts.compare import compare
from fst_dspy.report.charts.cost import cost, cost_facts
from fst_dspy.report.charts.curves import curves, mean_bounds, score_bounds
from fst_dspy.report.charts.figure import SHARE, Line, figure, score_range
from fst_dspy.report.charts.health import health
from fst_dspy.report.data import Run
from fst_dspy.report.intervals import gain_of, interval, wilson
from fst_dspy.report.rollouts import Outcome, read_rollouts
from fst_dspy.report.watch import run_view


def charts(html: str) -> dict[str, dict[str, Any]]:
    """The charts of some HTML by their titles, with what the script is given to draw."""
    found = re.findall(r"<figure data-chart='([^']*)'><figcaption><b>(.*?)</b>", html)
    return {title: json.loads(unescape(text)) for text, title in reversed(found)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write_run(tmp_path / "run", steps=6, cycles=3)
    return data.read_run(tmp_path / "run")


def test_a_mean_has_its_interval() -> None:
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4) and wilson(1.0, 10)[
        1
    ] == pytest.approx(1.0)
    assert interval([1.0] * 8 + [0.0] * 2) == pytest.approx(wilson(0.8, 10), abs=1e-6)
    assert interval([0.5, 0.5, 0.5]) is None


def test_lines_share_one_growing_x_and_no_text_leaves_the_attribute() -> None:
    name = f"<b>'\"&{HOSTILE}"
    html = figure(
        name,
        "x",
        [
            Line(
                name, [(3, 0.5), (1, 0.25), (1, float("nan")), (1, None)], names=["c", "a", "", ""]
            ),
            Line("other", [(2, 1.0), (2, 0.75)], 1, [(0.5, 1.0), None]),
            Line("nothing", [(9, None)], 2),
        ],
        ends=SHARE,
    )
    assert HOSTILE not in html and html.count("'") == 2 and html.count("<b>") == 1
    (chart,) = charts(html).values()
    assert chart["xs"] == [1, 2, 2, 3] and (chart["low"], chart["high"]) == (0, 1)
    first, second = chart["lines"]
    assert first["label"] == name and first["ys"] == [0.25, None, None, 0.5]
    assert first["names"] == ["a", "", "", "c"] and "lo" not in first
    assert second["ys"] == [None, 1, 0.75, None] and second["lo"] == [None, 0.5, None, None]
    assert figure("y", "x", [Line("a", [(0, float("inf"))])]) == ""


def test_a_path_keeps_its_order() -> None:
    html = figure("y", "x", [Line("a", [(2, 1), (0, 2), (2, 3)])], kind="path")
    (line,) = charts(html)["y"]["lines"]
    assert [line["ys"][n] for n in line["order"]] == [1, 2, 3]


def test_axes_of_scores_end_where_scores_do() -> None:
    assert score_range([None, 0.2, 1.0]) == (0.0, 1.0)
    assert score_range([-0.2, 1.0]) == score_range([0.0, 1.5]) == score_range([]) == (None, None)


def test_what_has_not_moved_has_no_curve(run: Run) -> None:
    still = [{**row, "kl_to_base": 0.0, "train_reward": None} for row in run.cycles]
    html = curves([dataclasses.replace(run, cycles=still, steps=())], [[]])
    assert html.count("<figure") == 1
    assert "Nothing measured yet" in curves([dataclasses.replace(run, cycles=(), steps=())], [[]])


def test_curves_show_the_cycles_with_their_intervals(run: Run) -> None:
    shown = charts(curves([run], [read_rollouts(run.folder).outcomes]))
    (line,) = shown["Validation score"]["lines"]
    assert line["ys"] == pytest.approx([cycle["val_score"] for cycle in run.cycles], abs=1e-4)
    for cycle, low, high in zip(run.cycles, line["lo"], line["hi"], strict=True):
        assert (low, high) == pytest.approx(wilson(cycle["val_score"], 24), abs=1e-4)
    assert line["names"] == ["cycle 0", "cycle 1", "cycle 2", "cycle 3"]
    rewards = shown["Train reward"]
    assert rewards["lines"][0]["ys"] == pytest.approx(
        [cycle["train_reward"] for cycle in run.cycles[1:]], abs=1e-4
    )


def test_without_scores_by_example_an_interval_needs_rewards_from_0_to_1(run: Run) -> None:
    change_rows(run.folder, "population.jsonl", lambda _: {"score_K_V": []})
    assert score_bounds(data.read_run(run.folder), run.cycles[1]) is None
    change_rows(run.folder, "cycles.jsonl", lambda _: {"reward_range": [0.0, 1.0]})
    again = data.read_run(run.folder)
    assert score_bounds(again, again.cycles[1]) == wilson(run.cycles[1]["val_score"], 24)
    change_rows(run.folder, "cycles.jsonl", lambda _: {"reward_range": [-1.0, 1.0]})
    assert score_bounds(data.read_run(run.folder), run.cycles[1]) is None


def test_intervals_of_rewards_are_over_problems() -> None:
    def outcomes(rewards: list[float]) -> list[Outcome]:
        return [Outcome(1, 1, f"e{n // 8}", r, None, "a", 1, 0, 9) for n, r in enumerate(rewards)]

    alike = mean_bounds(outcomes([1.0] * 8 + [0.0] * 8), lambda o: o.reward)
    assert alike[1] == pytest.approx(
        wilson(0.5, 2), abs=1e-6
    )  # two problems, whatever the number of rollouts
    assert mean_bounds(outcomes([1.0, 0.0] * 8), lambda o: o.reward)[1] is None


def test_health_shows_the_steps_that_were_taken(run: Run) -> None:
    change_rows(run.folder, "cycles.jsonl", lambda row: {"format_share": 0.1 * row["cycle"]})
    run = data.read_run(run.folder)
    html = health([run])
    shown = charts(html)
    assert "6 optimizer steps, of which skipped: 1 constant" in html
    assert 2 not in shown["Gradient norm"]["xs"] and len(shown["Gradient norm"]["xs"]) == 5
    assert shown["Loss"]["lines"][0]["ys"] == [0.1] * 5 and shown["Learning rate"]["low"] == 0
    parsed = shown["Parsed share"]["lines"][0]["ys"]
    for step, share in zip(run.steps, parsed, strict=True):
        failed = step["failures"].get("parse", 0) + step["failures"].get("truncated", 0)
        assert share == pytest.approx(1 - failed / 16)
    assert shown["Probability of the format"]["lines"][0]["ys"] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_cost_is_told_by_cycle_and_in_sum(run: Run) -> None:
    (slow,) = (x for x in charts(cost(run))["Rollouts"]["lines"] if x["label"] == "slow")
    assert slow["ys"] == [0, 32, 32, 32]
    assert "memory" not in str(cost_facts(run)) and "reflection" not in str(cost_facts(run))
    # What the bars show stands in a table, too; where validation counts is told where it is so.
    assert '<th scope="col">validation, rollouts</th>' in cost(run)
    assert "count as fast" not in cost(run)
    config = {**run.config, "arm": "gepa_only"}
    assert "count as fast" in cost(dataclasses.replace(run, config=config))
    reflection = {"calls": 7, "tokens": 9000, "cost": 0.0123, "unpriced": 2}
    change_rows(
        run.folder,
        "cycles.jsonl",
        lambda row: {"peak_memory": row["cycle"] * 2**30, "proposals": {"reflection": reflection}},
    )
    facts = {name: (value, note) for name, value, note in cost_facts(data.read_run(run.folder))}
    assert facts["peak memory"][0] == "3.00 GiB"
    assert facts["reflection LM"][0] == "$0.0123" and "2 calls at a price" in str(facts)


# --- agents ---------------------------------------------------------------------------------------


def turn(number: int, status: str = "ok") -> dict[str, Any]:
    seen, then = f"field {number}\nS.H\n{HOSTILE}", f"field {number + 1}\nS.H\n{HOSTILE}"
    return {
        "observation": seen, "action": "left", "result": then, "reward": 0.5, "status": status,
        "seconds": 0.1, "calls": number + 1,
    }  # fmt: skip


def make_agents(folder: Path) -> None:
    """Make the run one of an agent, whose episodes have two turns."""
    counted = {"turns": 200, "steps": 150, "invalid": 50, "errors": 3, "seconds": 1.5}
    change_rows(
        folder,
        "cycles.jsonl",
        lambda row: {"turns": {name: n * row["cycle"] for name, n in counted.items()}},
    )
    turns = [turn(0), turn(1, "invalid")]
    change_rows(folder, "rollouts.jsonl", lambda row: {"turns": turns})


def test_agents_are_told_of_by_cycle(run: Run) -> None:
    outcomes = [read_rollouts(run.folder).outcomes]
    assert acted(run) == []
    make_agents(run.folder)
    run = data.read_run(run.folder)
    found = acted(run)
    assert found[0] == Acted(0, 0.0, None, 0, 0, 0.0)
    episodes = data.total(run.cycles[2]["rollouts"])
    assert found[2] == Acted(2, pytest.approx(200 / episodes), 0.25, 300, 6, 3.0)
    shown = charts(agents([run], outcomes))
    assert shown["Invalid actions"]["lines"][0]["ys"] == [0.25] * 3
    assert shown["Validation score"]["xs"] == [0, 150, 300, 450]
    rewarded = sum(o.reward > 0 for o in outcomes[0] if o.cycle == 3)
    assert shown["Success"]["lines"][0]["ys"][-1] == pytest.approx(rewarded / 32, abs=1e-4)


def test_turns_are_packed_with_their_texts(run: Run) -> None:
    make_agents(run.folder)
    packed = read_rollouts(run.folder).packed
    (seen, did, then, reward, status, calls) = packed["columns"]["turns"][5][1]

    def text(number: int) -> str:
        return "\n".join(packed["lines"][line] for line in packed["texts"][number])

    assert text(seen) == turn(1)["observation"] and text(did) == "left"
    assert text(then) == turn(1)["result"] and text(status) == "invalid"
    assert (reward, calls) == (0.5, 2)


def test_watch_shows_environment_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    make_agents(run.folder)
    Console(width=100).print(run_view(data.read_run(run.folder)))
    shown = capsys.readouterr().out
    assert "450 steps (9 failed, 4 s)" in shown and "25 % of the actions" in shown.replace(
        "\N{NO-BREAK SPACE}", " "
    )


# --- several runs ---------------------------------------------------------------------------------


def test_runs_are_compared_best_first_with_what_differs(tmp_path: Path) -> None:
    for name, skill in (("one", 0.25), ("two", 0.75), (HOSTILE, 0.5)):
        folder = tmp_path / name.replace("/", "∕")
        write_run(folder, steps=2, cycles=1, arm="fst" if name == "one" else "rl_only")
        right = [float(v < skill * 24) for v in range(24)]
        change_rows(
            folder,
            "population.jsonl",
            lambda row, right=right: {"score_K_V": [right for _ in row["candidates"]]},
        )
        change_rows(
            folder, "cycles.jsonl", lambda row, skill=skill: {"val_score": skill * row["cycle"]}
        )
    html = compare(data.read_runs(sorted(tmp_path.iterdir())))
    assert HOSTILE.replace("/", "∕") not in html
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', html)
    assert [name for name, _ in rows][0::2] == ["two", "one"]
    assert '<td data-value="0.75">0.750 (0.551 to 0.880)</td><td>—</td>' in rows[0][1]
    gain = gain_of([1.0] * 18 + [0.0] * 6, [1.0] * 6 + [0.0] * 18)
    assert f">-0.500 ({gain.low:+.3f} to {gain.high:+.3f})</td>" in rows[2][1]
    # What one of them did not have yet is no difference, as long as nothing else was done.
    config = tmp_path / "two" / "config.json"
    kept = json.loads(config.read_text())
    del kept["settings"]["fast"]["frontier_type"]
    config.write_text(json.dumps(kept))
    html = compare(data.read_runs(sorted(tmp_path.iterdir())))
    heads = re.findall(r'<th scope="col">(.*?)</th>', html)
    assert heads[-1] == "arm" and "seed" not in heads and "reflection LM" not in heads
