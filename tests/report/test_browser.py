"""The page in a real browser: its policy lets its script draw, and what it shows can be reached."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from browser import BROWSER, Browser
from run_folders import change_rows, write_run

from fst_dspy.report import write_report
from fst_dspy.report.rollouts import read_rollouts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine"),
]

LISTED = "document.querySelector('#list > li')"
TEXTS = "(where) => [...document.querySelectorAll(where)].map((one) => one.textContent)"


def test_charts_are_drawn_and_read_and_problems_come_worst_first(tmp_path: Path) -> None:
    folder, page = tmp_path / "run", (tmp_path / "page.html").as_uri()
    write_run(folder, steps=8, per_step=32)
    turns = [
        {"observation": f"a\nb{n}", "action": "<i>left</i>", "result": f"a\nb{n + 1}"}
        | {"reward": 0.5, "status": status, "seconds": 0.1, "calls": 0}
        for n, status in enumerate(("ok", "invalid"))
    ]
    change_rows(folder, "rollouts.jsonl", lambda row: {"turns": turns, "feedback": "as before"})
    log = folder / "rollouts.jsonl"
    log.write_text(log.read_text().replace("as before", "once alone", 1))
    write_report([folder], tmp_path / "page.html")
    rewards = defaultdict(list)
    for outcome in read_rollouts(folder).outcomes:
        rewards[outcome.example_id].append(outcome.reward)
    means = {name: sum(own) / len(own) for name, own in rewards.items()}
    worst = min(means, key=lambda name: means[name])

    with Browser(tmp_path / "profile") as browser:
        browser.open(page, LISTED)
        browser.until(
            "document.querySelectorAll('canvas').length > 12 && document.querySelectorAll('canvas')"
            ".length === document.querySelectorAll('figure[data-chart]').length"
        )
        shown = browser.value(f"({TEXTS})('#list .reward')")
        assert len(shown) == min(25, len(means))
        shares = [float(text.removeprefix("r ")) for text in shown]
        assert shares == pytest.approx(sorted(means.values())[:25], abs=0.0051)

        # The first chart is read by its keys alone.
        read = browser.value(
            "new Promise((done) => { const plot = document.querySelector('.plot'); plot.focus();"
            "plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'End', bubbles: true}));"
            "setTimeout(() => done(plot.parentElement.querySelector('.read').textContent), 200)})"
        )
        assert "cycle 2: " in read and " to " in read

        # One problem alone is opened, with its rollouts.
        browser.open(f"{page}#rollouts:example={list(means).index(worst)}", LISTED)
        browser.until("document.querySelector('.rows > li')")
        count = len(rewards[worst])
        assert browser.value(f"({TEXTS})('#count')") == [f"{count} of 256 rollouts, of 1 problem"]
        assert len(browser.value(f"({TEXTS})('.rows > li')")) == min(25, count)

        # So is one rollout: an agent's turn by turn, and what it was shown is told once.
        browser.open(f"{page}#rollouts:show=rollout&text=once+alone", LISTED)
        browser.until("document.querySelector('.turns')")
        left = "<i>left</i>"
        assert browser.value(f"({TEXTS})('.turns pre')") == ["a\nb0", left, "a\nb1", left, "a\nb2"]
        assert browser.value(f"({TEXTS})('.turns .fail')") == ["invalid"]

    assert browser.complaints == []
    assert {address.partition("#")[0] for address in browser.asked_for} <= {
        page,
        "about:blank",
        "data:,",
    }
